// Which table of kernels this processor gets.
#include "kernels_cpu.h"

#include <stdlib.h>
#include <string.h>

#include "parallel.h"

namespace sbm {
namespace {

const CpuKernels& choose() {
#if SBM_X86
  const char* asked = getenv("SBM_FAST_CPU");
  if (asked && !*asked) asked = nullptr;
  const auto allowed = [&](const char* level) {
    if (!asked || !strcmp(asked, level)) return true;
    return !strcmp(asked, "avx512") && !strcmp(level, "avx2");
  };
  __builtin_cpu_init();
  if (allowed("avx512") && (!asked || !strcmp(asked, "avx512")) &&
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return avx512_kernels();
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2_kernels();
#endif
  return portable_kernels();
}

void serial(int64_t count, int64_t, const void* context, ParallelBody body) {
  body(context, 0, count);
}

}  // namespace

ParallelFor parallel_for_hook = serial;

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

}  // namespace sbm
