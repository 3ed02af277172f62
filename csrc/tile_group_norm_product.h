// The passes of group_norm_silu_product over a piece of a sample, see group_norm_silu.h. Included
// by kernels_cpu_impl.h only.
#pragma once
#include "tile_group_norm.h"

namespace sbm {
namespace {

// γ, β, their changes, kMean and kFactor (r).
template <class S>
void begin_product(const GroupNormProductArgs<S>& a, int64_t sample, const GroupNormRoom<S>& room) {
  using R = GroupNormRoom<S>;
  read_affine(a, sample, room);
  read_row(a.weight_dot, sample, a.channels, S(0), room.row(R::kGammaDot));
  read_row(a.bias_dot, sample, a.channels, S(0), room.row(R::kBetaDot));
  const int64_t width = a.group_channels();
  S *const mean = room.row(R::kMean), *const factor = room.row(R::kFactor);
  for (int64_t g = 0; g < a.groups; ++g) {
    const S* const stats = a.stats + 2 * (sample * a.groups + g);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) mean[c] = stats[0], factor[c] = stats[1];
  }
}

// x̂, and act'(n) at it.
template <bool kLast, class S>
struct AtElement {
  using R = GroupNormRoom<S>;
  Along<kLast, S> mean, factor, gamma, beta;
  AtElement(const GroupNormRoom<S>& room, int64_t channel)
      : mean(room.row(R::kMean), channel),
        factor(room.row(R::kFactor), channel),
        gamma(room.row(R::kScale), channel),
        beta(room.row(R::kOffset), channel) {}
  S normalised(S h, int64_t i) const { return (h - mean[i]) * factor[i]; }
  S slope(S normal, int64_t i) const { return silu_slope(fused(normal, gamma[i], beta[i])); }
};

// products += u·x̂ and sums += u of a row, u = act'(n)·given (kSlope) or given.
template <bool kLast, bool kSlope, class S>
void add_row(const AtElement<kLast, S>& at, const S* given, const S* h, int64_t length, S* products,
             S* sums) {
  SBM_IVDEP
  for (int64_t i = 0; i < length; ++i) {
    const S normal = at.normalised(h[i], i);
    const S u = kSlope ? at.slope(normal, i) * given[i] : given[i];
    products[i] = fused(u, normal, products[i]);
    sums[i] += u;
  }
}

template <bool kSlope, class S>
void sums_of_pixels(const Piece& p, const S* given, const S* h, const GroupNormRoom<S>& room,
                    double* products, double* sums) {
  S *const product = room.own_row(0), *const sum = room.own_row(1);
  for (int64_t c = 0; c < p.channels; ++c) product[c] = sum[c] = S(0);
  const AtElement<true, S> element(room, 0);
  for_rows<true>(p, p.channels, [&](int64_t at, int64_t length, int64_t) {
    add_row<true, kSlope>(element, given + at, h + at, length, product, sum);
  });
  for (int64_t c = 0; c < p.channels; ++c)
    products[c] = double(product[c]), sums[c] = double(sum[c]);
}

// A channel's pixels are summed in kLanes columns.
template <bool kSlope, class S>
void sums_of_channels(const Piece& p, const S* given, const S* h, const GroupNormRoom<S>& room,
                      double* products, double* sums) {
  constexpr int64_t kLanes = GroupNormRoom<S>::kLanes;
  S *const product = room.own_row(0), *const sum = room.own_row(1);
  for_rows<false>(p, 0, [&](int64_t at, int64_t length, int64_t channel) {
    for (int64_t i = 0; i < kLanes; ++i) product[i] = sum[i] = S(0);
    const AtElement<false, S> element(room, channel);
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes)
      add_row<false, kSlope>(element, given + at + i, h + at + i, kLanes, product, sum);
    add_row<false, kSlope>(element, given + at + i, h + at + i, length - i, product, sum);
    fold_groups(product, kLanes, kLanes);
    fold_groups(sum, kLanes, kLanes);
    products[channel] = double(product[0]), sums[channel] = double(sum[0]);
  });
}

template <class S>
void reduce_product(const GroupNormProductArgs<S>& a, int64_t sample, const Piece& p,
                    const GroupNormRoom<S>& room, double* partial) {
  const S* const h = read_piece(a.h, sample, p, room.own_piece(0));
  const S* const given = read_piece(a.given, sample, p, room.own_piece(1));
  double *const products = partial + p.slice * 2 * a.channels, *const sums = products + a.channels;
  with_flag(a.silu && !a.forward, [&](auto slope) {
    if (a.channels_last)
      sums_of_pixels<slope.value>(p, given, h, room, products, sums);
    else
      sums_of_channels<slope.value>(p, given, h, room, products, sums);
  });
}

// sums, and the projection's means: kSlope is that of x̂·g, kConstant that of g.
template <class S>
void finish_product(const GroupNormProductArgs<S>& a, int64_t sample, const Pieces& pieces,
                    double* partial, const GroupNormRoom<S>& room) {
  using R = GroupNormRoom<S>;
  const int64_t n = a.channels, width = a.group_channels();
  double *const products = partial, *const sums = partial + n;
  for (int64_t k = 1; k < pieces.slices(); ++k) {
    SBM_IVDEP
    for (int64_t i = 0; i < 2 * n; ++i) partial[i] += partial[k * 2 * n + i];
  }
  if (a.sums) {
    S* const to = a.sums + 2 * sample * n;
    for (int64_t c = 0; c < n; ++c) to[2 * c] = S(products[c]), to[2 * c + 1] = S(sums[c]);
  }
  if (!a.forward) {
    const S* const gamma = room.row(R::kScale);
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c) products[c] *= double(gamma[c]), sums[c] *= double(gamma[c]);
  }
  fold_groups(products, n, width);
  fold_groups(sums, n, width);
  const double count = double(width) * double(a.pixels);
  for (int64_t g = 0; g < a.groups; ++g) products[g] /= count, sums[g] /= count;
  spread_groups(products, a.groups, width, room.row(R::kSlope));
  spread_groups(sums, a.groups, width, room.row(R::kConstant));
  for (int row = 0; row < R::kRows; ++row) repeat_row(room, room.row(typename R::Row(row)), n);
}

template <bool kLast, bool kSilu, bool kForward, class S>
void product_rows(const Piece& p, const S* given, const S* h, S gain, const GroupNormRoom<S>& room,
                  S* out) {
  using R = GroupNormRoom<S>;
  for_rows<kLast>(p, room.row_length, [&](int64_t at, int64_t length, int64_t channel) {
    const AtElement<kLast, S> element(room, channel);
    const Along<kLast, S> slope(room.row(R::kSlope), channel);
    const Along<kLast, S> constant(room.row(R::kConstant), channel);
    const Along<kLast, S> gamma_dot(room.row(R::kGammaDot), channel);
    const Along<kLast, S> beta_dot(room.row(R::kBetaDot), channel);
    const S *const v = given + at, *const from = h + at;
    S* const to = out + at;
    SBM_IVDEP
    for (int64_t i = 0; i < length; ++i) {
      const S normal = element.normalised(from[i], i), gamma = element.gamma[i];
      const S act = kSilu ? element.slope(normal, i) : S(1);
      const S g = kForward ? v[i] : gamma * (act * v[i]);
      const S projected =
          gain * element.factor[i] * fused(-slope[i], normal, g - constant[i]);  // gain·P g
      to[i] = kForward ? act * fused(gamma, projected, fused(normal, gamma_dot[i], beta_dot[i]))
                       : projected;
    }
  });
}

template <class S>
void apply_product(const GroupNormProductArgs<S>& a, int64_t sample, const Piece& p,
                   const GroupNormRoom<S>& room) {
  const S* const h = read_piece(a.h, sample, p, room.own_piece(0));
  const S* const given = read_piece(a.given, sample, p, room.own_piece(1));
  S* const out = lies_in_place<S>(a.out) ? place<S>(a.out, sample, p) : room.own_piece(1);
  with_flag(a.channels_last, [&](auto last) {
    with_flag(a.silu, [&](auto silu) {
      with_flag(a.forward, [&](auto forward) {
        product_rows<last.value, silu.value, forward.value>(p, given, h, a.gain, room, out);
      });
    });
  });
  write_piece(a.out, sample, p, out);
}

template <class S>
GroupNormProductKernel<S> product_kernel() {
  return {begin_product<S>, reduce_product<S>, finish_product<S>, apply_product<S>};
}

}  // namespace
}  // namespace sbm
