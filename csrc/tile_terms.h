// A tile's noise, and sums of its sources with coefficients.
// Included by kernels_cpu_impl.h only (see there for the unnamed namespace and fill_groups).
#pragma once
#include "tile_io.h"

namespace sbm {
namespace {

template <class S>
struct alignas(64) Buffer {
  S v[kTile + kSlack];
};

// The tile's noise in its own order. Samples whose size is no multiple of four leave words unused.
template <class P, NoiseKind kind>
void fill_tile(const uint64_t* keys, const Tile& t, uint32_t draw, uint32_t stream, float* out) {
  const int64_t groups = (t.count + 3) / 4;
  fill_groups<P, kind>(keys + t.sample, t.samples, uint64_t(t.first) / 4, groups, draw, stream,
                       out);
  if (t.samples == 1 || t.count % 4 == 0) return;
  for (int64_t s = 1; s < t.samples; ++s) {  // forwards, and towards the front
    const float* const from = out + s * groups * 4;
    float* const to = out + s * t.count;
    for (int64_t i = 0; i < t.count; ++i) to[i] = from[i];
  }
}

// What a tile's sources look like to the inner loop: pointers and split coefficients, those with a
// zero coefficient left out (0·NaN is NaN).
template <class S>
struct Terms {
  int count = 0;
  const S* value[kMaxSources];
  S hi[kMaxSources], lo[kMaxSources];

  void add(const S* v, S h, S l) {
    if (h == S(0)) return;  // nobody fetched v then: see reads()
    value[count] = v, hi[count] = h, lo[count] = l;
    ++count;
  }
};

template <class S, int N>
void sum_terms(const Terms<S>& t, S* out, int64_t n) {
  const S* v[N];
  S hi[N], lo[N];
  for (int k = 0; k < N; ++k) v[k] = t.value[k], hi[k] = t.hi[k], lo[k] = t.lo[k];
  // Elements are independent: out may be one of the inputs, at the same index.
  SBM_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    S e[N];
    SBM_UNROLL
    for (int k = 0; k < N; ++k) e[k] = v[k][i];
    out[i] = combine<S, N>(hi, lo, e);
  }
}

template <class S>
void sum_terms(const Terms<S>& t, S* out, int64_t n) {
  using Sum = void (*)(const Terms<S>&, S*, int64_t);
  static constexpr Sum kSums[] = {
      sum_terms<S, 0>,  sum_terms<S, 1>,  sum_terms<S, 2>, sum_terms<S, 3>, sum_terms<S, 4>,
      sum_terms<S, 5>,  sum_terms<S, 6>,  sum_terms<S, 7>, sum_terms<S, 8>, sum_terms<S, 9>,
      sum_terms<S, 10>, sum_terms<S, 11>, sum_terms<S, 12>};
  static_assert(sizeof kSums / sizeof *kSums == kMaxSources + 1, "one sum per number of terms");
  kSums[t.count](t, out, n);
}

}  // namespace
}  // namespace sbm
