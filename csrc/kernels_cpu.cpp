// Which table of kernels this processor gets.
#include "kernels_cpu.h"

#include <string.h>

#include "cpu_level.h"
#include "parallel.h"

namespace sbm {
namespace {

const CpuKernels& choose() {
#if SBM_X86
  const char* level = cpu_level();
  if (!strcmp(level, "avx512")) return avx512_kernels();
  if (!strcmp(level, "avx2")) return avx2_kernels();
#endif
  return portable_kernels();
}

void serial(int64_t count, int64_t, const void* context, ParallelBody body) {
  body(context, 0, count);
}

}  // namespace

ParallelFor parallel_for_hook = serial;
ThreadCount thread_count_hook = [] { return 1; };

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

}  // namespace sbm
