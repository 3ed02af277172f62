// One row of a plan: x' = a·x + b·F + c0·D + d·z + Σ c_k·H_k, and what goes with it.
#pragma once
#include <math.h>

#include "philox.h"

namespace sbm {

// Sources of a row in the order in which a plan stores their coefficients.
enum Source { kState, kNetwork, kDenoised, kNoise, kRegister0 };
constexpr int kMaxRegisters = 8;
constexpr int kMaxSources = kRegister0 + kMaxRegisters;

enum Norm { kNoNorm, kBatchMean, kPerSample, kSqrtD };

// Integer lanes of a packed row.
enum Field { kSlot, kStream, kDraw, kNorm, kFields };

// Where the real lanes of a packed row stand; a row has `lanes` high parts, then as many low ones.
struct RowLayout {
  int registers;
  SBM_BOTH constexpr int sources() const { return kRegister0 + registers; }
  SBM_BOTH constexpr int write() const { return sources(); }
  SBM_BOTH constexpr int denoise_x() const { return 2 * sources(); }
  SBM_BOTH constexpr int denoise_f() const { return denoise_x() + 1; }
  SBM_BOTH constexpr int limit() const { return denoise_x() + 2; }
  SBM_BOTH constexpr int next_scale() const { return denoise_x() + 3; }
  SBM_BOTH constexpr int next_label() const { return denoise_x() + 4; }
  SBM_BOTH constexpr int guidance() const { return denoise_x() + 5; }
  SBM_BOTH constexpr int step_scale() const { return denoise_x() + 6; }
  SBM_BOTH constexpr int score_x() const { return denoise_x() + 7; }
  SBM_BOTH constexpr int score_f() const { return denoise_x() + 8; }
  SBM_BOTH constexpr int lanes() const { return denoise_x() + 9; }
};

SBM_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
SBM_HD double fused(double a, double b, double c) { return ::fma(a, b, c); }

// Σ (hi_k + lo_k)·v_k: the low parts first, so that they are not lost beside the high ones.
template <class S, int N>
SBM_HD S combine(const S* hi, const S* lo, const S* v) {
  S acc = S(0);
  SBM_UNROLL
  for (int k = 0; k < N; ++k) acc = fused(lo[k], v[k], acc);
  SBM_UNROLL
  for (int k = 0; k < N; ++k) acc = fused(hi[k], v[k], acc);
  return acc;
}

// min(max(v, −limit), limit), but a NaN stays one (fminf and fmaxf would hide it).
template <class S>
SBM_HD S clamp_keep_nan(S v, S limit) {
  return v > limit ? limit : (v < -limit ? -limit : v);
}

// Classifier-free guidance: F_u + w·(F_c − F_u).
template <class S>
SBM_HD S guided(S conditional, S unconditional, S weight) {
  return fused(weight, conditional - unconditional, unconditional);
}

// The row's share of a sample's guidance weight: 1 + factor·(w − 1).
template <class S>
SBM_HD S guidance_weight(S factor, S weight) {
  return fused(factor, weight - S(1), S(1));
}

// ε = scale·(‖z‖/‖s‖)², scale = 2αr². A vanishing score has no step size: the sample then rests.
template <class S>
SBM_HD S langevin_epsilon(S scale, S noise_norm, S score_norm) {
  if (score_norm == S(0)) return S(0);
  const S ratio = noise_norm / score_norm;
  return scale * ratio * ratio;
}

// A coefficient in two parts of the state's type.
template <class S>
struct Split {
  S hi, lo;
};
template <class S>
SBM_HD Split<S> split(double c) {
  const S hi = S(c);
  const double rest = c - double(hi);
  return {hi, rest == rest ? S(rest) : S(0)};  // ∞ − ∞
}

}  // namespace sbm
