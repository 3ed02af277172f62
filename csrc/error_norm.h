// The error of a Runge–Kutta step in units of its tolerance, one value a sample.
#pragma once
#include "row.h"
#include "tensor_view.h"

namespace sbm {

constexpr int kMaxStages = kMaxSources + 1;  // registers of an error norm

// e = Σ_{k≥1} weights[b, k]·registers[k, b]
// out[b] = √(mean_i (e_i / (atol + rtol·max(|u0_i|, |x_i|)))²), u0 = registers[0, b]
template <class S>
struct ErrorNormArgs {
  int64_t batch = 0, numel = 0;  // samples, elements of a sample
  int stages = 0;
  TensorView x, registers[kMaxStages];
  const double* weights = nullptr;
  int64_t weight_stride[2] = {};  // to the next sample's, to the next register's
  S atol = S(0), rtol = S(0);

  double weight(int64_t b, int k) const {
    return weights[b * weight_stride[0] + k * weight_stride[1]];
  }
};

template <class S>
void error_norm_cpu(const ErrorNormArgs<S>& args, S* out);

}  // namespace sbm
