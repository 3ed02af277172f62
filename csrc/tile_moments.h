// Means and sums of squared deviations of groups of channels, see group_norm_silu.h. Included by
// tile_group_norm.h only.
#pragma once
#include "group_norm_silu.h"
#include "row.h"

namespace sbm {
namespace {

// v[i] := the sum of v[i·width] … v[(i + 1)·width − 1], for n numbers.
template <class S>
SBM_HD void fold_groups(S* v, int64_t n, int64_t width) {
  for (; width % 2 == 0; width /= 2) {
    n /= 2;
    SBM_IVDEP
    for (int64_t i = 0; i < n; ++i) v[i] = v[2 * i] + v[2 * i + 1];
  }
  if (width == 1) return;
  for (int64_t i = 0; i < n / width; ++i) {
    S sum = v[i * width];
    for (int64_t k = 1; k < width; ++k) sum += v[i * width + k];
    v[i] = sum;
  }
}

template <int kWidth, class From, class S>
SBM_HD void repeat(const From* from, int64_t groups, S* to) {
  SBM_IVDEP
  for (int64_t g = 0; g < groups; ++g)
    for (int k = 0; k < kWidth; ++k) to[g * kWidth + k] = S(from[g]);
}

// The inverse in shape: each number `width` times.
template <class From, class S>
void spread_groups(const From* from, int64_t groups, int64_t width, S* to) {
  switch (width) {
    case 1:
      return repeat<1>(from, groups, to);
    case 2:
      return repeat<2>(from, groups, to);
    case 4:
      return repeat<4>(from, groups, to);
    case 8:
      return repeat<8>(from, groups, to);
  }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t k = 0; k < width; ++k) to[g * width + k] = S(from[g]);
}

// sum[c] += Σ_r h[r·n + c], eight rows at a time.
template <class S>
SBM_HD void add_rows(const S* h, int64_t rows, int64_t n, S* sum) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    const S* const v = h + r * n;
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c)
      sum[c] += ((v[c] + v[c + n]) + (v[c + 2 * n] + v[c + 3 * n])) +
                ((v[c + 4 * n] + v[c + 5 * n]) + (v[c + 6 * n] + v[c + 7 * n]));
  }
  for (; r < rows; ++r) {
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c) sum[c] += h[r * n + c];
  }
}

// sum[c] += Σ_r d and squares[c] += Σ_r d², d = h[r·n + c] − shift[c].
template <class S>
SBM_HD void add_moments(const S* h, int64_t rows, int64_t n, const S* shift, S* sum, S* squares) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const S* const v = h + r * n;
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c) {
      const S d0 = v[c] - shift[c], d1 = v[c + n] - shift[c];
      const S d2 = v[c + 2 * n] - shift[c], d3 = v[c + 3 * n] - shift[c];
      sum[c] += (d0 + d1) + (d2 + d3);
      squares[c] += fused(d0, d0, d1 * d1) + fused(d2, d2, d3 * d3);
    }
  }
  for (; r < rows; ++r) {
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c) {
      const S d = h[r * n + c] - shift[c];
      sum[c] += d;
      squares[c] = fused(d, d, squares[c]);
    }
  }
}

// Means and sums of squared deviations of `groups` groups of a matrix [rows, n] and of `rest`
// numbers behind it, which join the first columns. The mean of a first reading is the shift of the
// second, so that neither loses digits to a mean far from 0.
template <class S>
SBM_HD void moments_of(const S* h, int64_t rows, int64_t n, int64_t rest, int64_t groups,
                       const GroupNormRoom<S>& room, double* means, double* squares) {
  const int64_t width = n / groups;
  const double per_count = 1.0 / (double(rows) * double(width) + double(rest));
  S *const sum = room.own_row(0), *const square = room.own_row(1), *const shift = room.own_row(2);
  S* const mean = room.own_row(3);
  for (int64_t c = 0; c < n; ++c) sum[c] = S(0);
  add_rows(h, rows, n, sum);
  if (rest) add_rows(h + rows * n, 1, rest, sum);
  fold_groups(sum, n, width);
  for (int64_t g = 0; g < groups; ++g) mean[g] = S(double(sum[g]) * per_count);
  spread_groups(mean, groups, width, shift);
  for (int64_t c = 0; c < n; ++c) sum[c] = square[c] = S(0);
  add_moments(h, rows, n, shift, sum, square);
  if (rest) add_moments(h + rows * n, 1, rest, shift, sum, square);
  fold_groups(sum, n, width);
  fold_groups(square, n, width);
  SBM_IVDEP
  for (int64_t g = 0; g < groups; ++g) {
    const double off = double(sum[g]) * per_count;
    means[g] = double(mean[g]) + off;
    squares[g] = double(square[g]) - double(sum[g]) * off;
  }
}

// Of n numbers, in 64 columns, or in 16 where they are few.
template <class S>
void moments_of_row(const S* h, int64_t n, const GroupNormRoom<S>& room, double* mean,
                    double* squares) {
  constexpr int64_t kLanes = GroupNormRoom<S>::kLanes, kFew = 16;
  if (n < 16 * kLanes)
    moments_of(h, n / kFew, kFew, n % kFew, 1, room, mean, squares);
  else
    moments_of(h, n / kLanes, kLanes, n % kLanes, 1, room, mean, squares);
}

// All parts of every group into the first, by the update of Chan, Golub and LeVeque, "Updating
// formulae and a pairwise algorithm for computing sample variances", 1979.
inline void merge_moments(const Pieces& pieces, int64_t groups, double* moments) {
  double *const means = moments, *const squares = moments + groups;
  double count = double(pieces.in_part(0));
  for (int64_t part = 1; part < pieces.parts(); ++part) {
    const double *const mean = moments + part * 2 * groups, *const square = mean + groups;
    const double more = double(pieces.in_part(part)), weight = more / (count + more);
    const double between = count * weight;
    SBM_IVDEP
    for (int64_t g = 0; g < groups; ++g) {
      const double off = mean[g] - means[g];
      squares[g] += fused(off * off, between, square[g]);
      means[g] = fused(off, weight, means[g]);
    }
    count += more;
  }
}

}  // namespace
}  // namespace sbm
