// The fixed tree that sums a tile. Included by kernels_cpu_impl.h only.
#pragma once
#include "tile_terms.h"

namespace sbm {
namespace {

// w[i] += w[i + half], a loop of known length.
template <int kHalf, class S>
SBM_HD void fold(S* w) {
  SBM_IVDEP
  for (int i = 0; i < kHalf; ++i) w[i] += w[i + kHalf];
}

// Halves `width` values, a power of two, until one is left.
template <class S>
S halve(S* w, int64_t width) {
  static_assert(kTile == 1024, "the halvings begin at a tile's size");
  switch (width) {
    case 1024:
      fold<512>(w);
      [[fallthrough]];
    case 512:
      fold<256>(w);
      [[fallthrough]];
    case 256:
      fold<128>(w);
      [[fallthrough]];
    case 128:
      fold<64>(w);
      [[fallthrough]];
    case 64:
      fold<32>(w);
      [[fallthrough]];
    case 32:
      fold<16>(w);
      [[fallthrough]];
    case 16:
      fold<8>(w);
      [[fallthrough]];
    case 8:
      fold<4>(w);
      [[fallthrough]];
    case 4:
      fold<2>(w);
      [[fallthrough]];
    case 2:
      fold<1>(w);
  }
  return w[0];
}

// Pairwise sum of at(0) … at(n − 1), n ≤ kTile: padded with zeros to a power of two, then halved
// until one is left.
template <class S, class At>
S tile_sum(int64_t n, const At& at) {
  Buffer<S> values;
  S* const w = values.v;
  if (n == kTile) {  // the first two halvings while the values are made
    constexpr int kQuarter = kTile / 4;
    SBM_IVDEP
    for (int i = 0; i < kQuarter; ++i)
      w[i] = (at(i) + at(i + 2 * kQuarter)) + (at(i + kQuarter) + at(i + 3 * kQuarter));
    return halve(w, kQuarter);
  }
  int64_t width = 1;
  while (width < n) width *= 2;
  SBM_IVDEP
  for (int64_t i = 0; i < n; ++i) w[i] = at(i);
  for (int64_t i = n; i < width; ++i) w[i] = S(0);
  return halve(w, width);
}

template <class S>
S sum_squares(const S* v, int64_t n) {
  if (n <= 4) {  // the same tree, without the cost of its loops
    const S a = v[0] * v[0], b = n > 1 ? v[1] * v[1] : S(0);
    const S c = n > 2 ? v[2] * v[2] : S(0), d = n > 3 ? v[3] * v[3] : S(0);
    return (a + c) + (b + d);
  }
  return tile_sum<S>(n, [&](int64_t i) { return v[i] * v[i]; });
}

}  // namespace
}  // namespace sbm
