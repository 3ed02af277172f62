// Compiled with this instruction set's flags (setup.py reads them off the file's name).
#include "simd_avx512.h"

#include "noise_simd.h"

#include "kernels_cpu_impl.h"

namespace sbm {

const CpuKernels& avx512_kernels() {
  static const CpuKernels kernels = make_kernels<Avx512Pack>("avx512");
  return kernels;
}

}  // namespace sbm
