// SiLU and its derivative, and the exponential in them.
#pragma once
#include <math.h>

#include "half.h"
#include "row.h"

namespace sbm {
namespace {

// 1 + e⁻ⁿ with e⁻ⁿ as p·2ᵏ: −n = k·ln 2 + r with |r| ≤ ½ ln 2, and p a minimax fit of eʳ (relative
// error 3e-9 before rounding). Beyond ±88 the exponential is infinite or as good as 0. A NaN does
// not pass: n itself must be in what is made of this.
SBM_HD float one_plus_exp(float n) {
  // [−88.8, 87.3], on the bits: larger negative numbers are larger unsigned integers, and integers
  // have minima that are one instruction.
  const uint32_t low = bits_of(n) < 0xc2b1999au ? bits_of(n) : 0xc2b1999au;
  const int32_t both = int32_t(low) < 0x42ae999a ? int32_t(low) : 0x42ae999a;
  const float v = float_of(uint32_t(both));
  // The last bit is worth 1: adding it rounds to an integer. 127 is the exponent's bias.
  constexpr float kShift = 0x1.8p23f + 127.0f;
  const float shifted = fused(v, -0x1.715476p+0f, kShift);
  const float k = shifted - kShift;
  // ln 2 = 0.693359375 − 2.12194440e-4: the first part times k is exact.
  const float r = fused(k, 2.12194440e-4f, fused(k, -0.693359375f, -v));
  float p = fused(r, 0.0013814560370519757f, 0.008368735201656818f);
  p = fused(r, p, 0.04166838899254799f);
  p = fused(r, p, 0.1666652113199234f);
  p = fused(r, p, 0.4999999403953552f);
  p = fused(r, p, 1.0f);
  p = fused(r, p, 1.0f);
  return fused(p, float_of(bits_of(shifted) << 23), 1.0f);
}
SBM_HD double one_plus_exp(double n) { return 1.0 + ::exp(-n); }

// n·σ(n), σ(n) = 1/(1 + e⁻ⁿ)
template <class S>
SBM_HD S silu(S n) {
  return n / one_plus_exp(n);
}

// σ·(1 + n·(1 − σ))
template <class S>
SBM_HD S silu_slope(S n) {
  const S sigmoid = S(1) / one_plus_exp(n);
  return sigmoid * fused(n, S(1) - sigmoid, S(1));
}

}  // namespace
}  // namespace sbm
