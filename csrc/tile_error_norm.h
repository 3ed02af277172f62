// The error of a tile in units of its tolerance, see error_norm.h. Included by kernels_cpu_impl.h
// only.
#pragma once
#include "tile_sum.h"

namespace sbm {
namespace {

// max(|a|, |b|), NaN where either is.
template <class S>
SBM_HD S larger(S a, S b) {
  const S u = fabs(a), v = fabs(b);
  return u > v || u != u ? u : v;
}

// e of the tile, sample behind sample. In double: it is the small difference of slopes that are
// nearly equal, and float would leave their rounding of it.
template <class S>
void step_error(const ErrorNormArgs<S>& a, const Tile& t, double* e) {
  Buffer<S> gathered;
  for (int64_t i = 0; i < t.samples * t.count; ++i) e[i] = 0.0;
  for (int64_t k = 1; k < a.stages; ++k) {
    const S* const v = read(a.stage(k), t, gathered.v);
    for (int64_t s = 0; s < t.samples; ++s) {
      const double weight = a.weight(t.sample + s, k);
      if (weight == 0.0) continue;  // 0·NaN is NaN
      const int64_t begin = s * t.count, end = begin + t.count;
      SBM_IVDEP
      for (int64_t i = begin; i < end; ++i) e[i] = fused(weight, double(v[i]), e[i]);
    }
  }
}

// Σ (e/tolerance)² of every sample of the tile.
template <class S>
void error_squares(const ErrorNormArgs<S>& a, const Tile& t, S* sums) {
  Buffer<S> before, after;
  Buffer<double> error;
  const S* const u0 = read(a.registers, t, before.v);
  const S* const u1 = read(a.x, t, after.v);
  step_error(a, t, error.v);
  const S atol = a.atol, rtol = a.rtol;
  for (int64_t s = 0; s < t.samples; ++s) {
    const S *const from = u0 + s * t.count, *const to = u1 + s * t.count;
    const double* const e = error.v + s * t.count;
    sums[s] = tile_sum<S>(t.count, [&](int64_t i) {
      const S ratio = S(e[i]) / fused(rtol, larger(from[i], to[i]), atol);
      return ratio * ratio;
    });
  }
}

}  // namespace
}  // namespace sbm
