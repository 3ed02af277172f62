// The error of a Runge–Kutta step in units of its tolerance, one value a sample.
#pragma once
#include "tensor_view.h"

namespace sbm {

// e = Σ_{k≥1} weights[b, k]·registers[k, b]
// out[b] = √(mean_i (e_i / (atol + rtol·max(|u0_i|, |x_i|)))²), u0 = registers[0, b]
template <class S>
struct ErrorNormArgs {
  int64_t batch = 0, numel = 0;  // samples, elements of a sample
  TensorView x;
  TensorView registers;                   // the first
  int64_t stages = 0, register_step = 0;  // how many, and bytes to the next
  const double* weights = nullptr;
  int64_t weight_stride[2] = {};  // to the next sample's, to the next register's
  S atol = S(0), rtol = S(0);

  double weight(int64_t b, int64_t k) const {
    return weights[b * weight_stride[0] + k * weight_stride[1]];
  }
  TensorView stage(int64_t k) const {
    TensorView v = registers;
    v.data = static_cast<char*>(v.data) + k * register_step;
    return v;
  }
};

template <class S>
void error_norm_cpu(const ErrorNormArgs<S>& args, S* out);

}  // namespace sbm
