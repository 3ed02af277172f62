// The drift of the probability flow and Hutchinson's estimate of its divergence.
#pragma once
#include "noise_kind.h"
#include "tensor_view.h"

namespace sbm {

// drift[b] = p_b·x_b + q_b·F_b
// divergence[k, b] = p_b·numel + r_b·Σ_i v_k[b, i]·product[k, b, i]
struct HutchinsonArgs {
  int64_t batch = 0, numel = 0;  // samples, elements of a sample
  int64_t probes = 0;
  TensorView drift, x, network;  // drift and x of the state's type
  TensorView product;            // the first probe's
  int64_t product_step = 0;      // bytes to the next probe's
  const uint64_t* keys = nullptr;
  const double* coef = nullptr;  // (p, q, r) of each sample
  int64_t coef_stride[2] = {};   // to the next sample's, to the next coefficient
  uint32_t draw = 0, stream = 0;
  NoiseKind probe = NoiseKind::rademacher;

  double coefficient(int64_t b, int which) const {
    return coef[b * coef_stride[0] + which * coef_stride[1]];
  }
};

// divergence [probes, batch]; A is the type of its sums.
template <class A>
void hutchinson_cpu(const HutchinsonArgs& args, A* divergence);

}  // namespace sbm
