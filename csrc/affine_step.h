// The affine step: one row of a plan applied to every sample. See row.h for the formula.
#pragma once
#include "row.h"
#include "tensor_view.h"

namespace sbm {

// Optional tensors have data == nullptr. S is the state's type: float or double.
template <class S>
struct StepArgs {
  int64_t batch = 0, numel = 0;  // samples, elements of a sample
  int registers = 0;
  int64_t rows = 0;
  const S* coef = nullptr;         // [rows, 2, lanes]
  const int32_t* field = nullptr;  // [rows, kFields]
  const int32_t* row = nullptr;    // [batch]; a row outside [0, rows) leaves its sample alone
  int64_t row_stride = 1;
  const uint64_t* keys = nullptr;  // [batch]
  TensorView x, network, uncond, noise, net_input;
  TensorView slots[kMaxRegisters];
  const S* guidance = nullptr;   // [batch]
  S* epsilon = nullptr;          // [batch], receives the step sizes
  S* net_time = nullptr;         // [batch]
  int32_t* first_bad = nullptr;  // [batch]

  // The row that sample b stands at, −1 for none.
  SBM_BOTH int64_t row_of(int64_t b) const {
    const int64_t r = row[b * row_stride];
    return r < rows ? r : -1;
  }
  // Samples whose rows have to be looked at: one stands for all where all share a row number.
  int64_t distinct() const { return row_stride == 0 && batch > 0 ? 1 : batch; }
  SBM_BOTH int norm_of(int64_t b) const {
    const int64_t r = row_of(b);
    return r < 0 ? int(kNoNorm) : int(field[r * kFields + kNorm]);
  }
};

template <class S>
void affine_step_cpu(StepArgs<S> args);

}  // namespace sbm
