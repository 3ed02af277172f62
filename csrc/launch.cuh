// The only place where kernels are launched and shared memory is declared; tests/cuda_emulation
// brings its own.
#pragma once
#include <cuda_runtime.h>

// Shared memory of the size given to launch(), at least 16-byte aligned.
#define SBM_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char sbm_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(sbm_dynamic_shared)

namespace sbm {

constexpr size_t kPlainShared = 48 * 1024;  // a kernel has to ask for more

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   const A&... args) {
  if (shared > kPlainShared) {
    const auto error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();  // reported here, not once more by whoever launches next
      return error;
    }
  }
  kernel<<<grid, block, shared, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace sbm
