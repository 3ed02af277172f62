// A tensor as the kernels see it: [samples, numel] in the sample's logical C order, however it lies
// in memory.
#pragma once
#include "philox.h"

namespace sbm {

enum class DType : int { f32, f64, bf16, f16 };

struct TensorView {
  static constexpr int kMaxDims = 8;
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t sample_stride = 0;  // in elements
  int dims = 0;               // of a sample, adjacent ones merged where memory allows
  int64_t size[kMaxDims] = {}, stride[kMaxDims] = {};

  SBM_BOTH bool given() const { return data != nullptr; }
  SBM_BOTH bool dense() const { return dims == 0 || (dims == 1 && stride[0] == 1); }
};

}  // namespace sbm
