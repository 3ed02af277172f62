// Which instruction set this process may use.
#pragma once
#include <stdlib.h>
#include <string.h>

namespace sbm {

// "avx512", "avx2" or "portable": the best one that the processor runs, or what SBM_FAST_CPU asks
// for where that is less.
inline const char* cpu_level() {
#if SBM_X86
  const char* asked = getenv("SBM_FAST_CPU");
  const bool any = !asked || !*asked;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw");
  if (avx512 && (any || !strcmp(asked, "avx512"))) return "avx512";
  if (avx2 && (any || !strcmp(asked, "avx512") || !strcmp(asked, "avx2"))) return "avx2";
#endif
  return "portable";
}

}  // namespace sbm
