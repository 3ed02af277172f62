// The GPU kernels' host side. Every call puts work on the stream and returns at once; it neither
// allocates nor waits, so all of it can be captured. Pointers in the arguments are device pointers.
#pragma once
#include <cuda_runtime.h>

#include "affine_step.h"
#include "noise_kind.h"

namespace sbm {

// S numbers of the workspace: a ticket, two norms a sample, two sums a tile. Zeroed once; the
// kernels leave the ticket at zero.
inline int64_t workspace_size(int64_t batch, int64_t numel) {
  return 4 + 2 * batch * (1 + (numel + kTile - 1) / kTile);
}

// Whether the step needs the workspace: rows may have norms, and one block a sample won't do.
template <class S>
bool needs_workspace(const StepArgs<S>& args, bool coupled);

// The row of every sample. With args.epsilon == nullptr no row may have a norm (x turns NaN where
// one has). coupled == false: a batch_mean row gets ε = NaN.
template <class S>
cudaError_t affine_step_cuda(const StepArgs<S>& args, S* workspace, bool coupled,
                             cudaStream_t stream);

// ε[b] of the rows, 0 where a row has no norm; see langevin_epsilon.h.
template <class S>
cudaError_t langevin_epsilon_cuda(const StepArgs<S>& args, S* epsilon, S* workspace, bool coupled,
                                  cudaStream_t stream);

cudaError_t noise_cuda(const TensorView& out, int64_t batch, int64_t numel, const uint64_t* keys,
                       uint32_t draw, uint32_t noise_stream, NoiseKind kind, cudaStream_t stream);

// The keys of samples first … first + count − 1.
cudaError_t keys_cuda(uint64_t* out, int64_t count, uint64_t seed, uint64_t first,
                      cudaStream_t stream);

}  // namespace sbm
