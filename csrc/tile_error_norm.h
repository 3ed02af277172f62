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

// Σ (e/tolerance)² of every sample of the tile.
template <class S>
void error_squares(const ErrorNormArgs<S>& a, const Tile& t, S* sums) {
  Buffer<S> state, error, gathered[kMaxStages];
  const S *const x = read(a.x, t, state.v), *registers[kMaxStages];
  for (int k = 0; k < a.stages; ++k) registers[k] = read(a.registers[k], t, gathered[k].v);
  const S atol = a.atol, rtol = a.rtol;
  for (int64_t s = 0; s < t.samples; ++s) {
    const int64_t at = s * t.count;
    Terms<S> terms;
    for (int k = 1; k < a.stages; ++k) {
      const Split<S> weight = split<S>(a.weight(t.sample + s, k));
      terms.add(registers[k] + at, weight.hi, weight.lo);
    }
    sum_terms(terms, error.v, t.count);
    const S *const u0 = registers[0] + at, *const u1 = x + at;
    sums[s] = tile_sum<S>(t.count, [&](int64_t i) {
      const S ratio = error.v[i] / fused(rtol, larger(u0[i], u1[i]), atol);
      return ratio * ratio;
    });
  }
}

}  // namespace
}  // namespace sbm
