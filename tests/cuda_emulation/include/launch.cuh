// Stands in for csrc/launch.cuh: the emulator runs the kernel's threads.
#pragma once
#include <cuda_runtime.h>

#define SBM_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulator::dynamic_shared())

namespace sbm {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                   const A&... args) {
  return emulator::run({grid, block, shared, [=] { kernel(args...); }});
}

}  // namespace sbm
