// Filling a tensor [samples, numel] with noise.
#pragma once
#include "kernels_cpu.h"

namespace sbm {

void noise_cpu(const TensorView& out, int64_t batch, int64_t numel, const uint64_t* keys,
               uint32_t draw, uint32_t stream, NoiseKind kind);

}  // namespace sbm
