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

// u = act'(n)·given (kSlope) or given, and u·x̂, of a row.
template <bool kLast, bool kSlope, class S>
void sum_row(const AtElement<kLast, S>& at, const S* given, const S* h, int64_t length, S* products,
             S* sums) {
  SBM_IVDEP
  for (int64_t i = 0; i < length; ++i) {
    const S normal = at.normalised(h[i], i);
    const S u = kSlope ? at.slope(normal, i) * given[i] : given[i];
    if (kLast) {
      products[i] = fused(u, normal, products[i]);
      sums[i] += u;
    } else {
      products[i] = u * normal;
      sums[i] = u;
    }
  }
}

template <class S>
void reduce_product(const GroupNormProductArgs<S>& a, int64_t sample, const Pieces& pieces,
                    const Piece& p, const GroupNormRoom<S>& room, ChannelSums* partial) {
  const S* const h = read_piece(a.h, sample, p, room.piece(pieces, 0));
  const S* const given = read_piece(a.given, sample, p, room.piece(pieces, 1));
  ChannelSums* const to = partial + p.slice * a.channels;
  with_flag(a.channels_last, [&](auto last) {
    with_flag(a.silu && !a.forward, [&](auto slope) {
      constexpr bool kLast = last.value;
      S values[2][kLast ? 1 : kTile];
      S* const products = kLast ? room.own_row(pieces, 0) : values[0];
      S* const sums = kLast ? room.own_row(pieces, 1) : values[1];
      if (kLast)
        for (int64_t c = 0; c < a.channels; ++c) products[c] = sums[c] = S(0);
      for_rows<kLast>(p, [&](int64_t at, int64_t length, int64_t channel) {
        const AtElement<kLast, S> element(room, channel);
        if (kLast) {
          sum_row<kLast, slope.value>(element, given + at, h + at, length, products, sums);
          return;
        }
        to[channel] = {0.0, 0.0};
        for (int64_t first = 0; first < length; first += kTile) {
          const int64_t n = length - first < kTile ? length - first : kTile;
          sum_row<kLast, slope.value>(element, given + at + first, h + at + first, n, products,
                                      sums);
          to[channel].product += double(tile_sum<S>(n, [&](int64_t i) { return products[i]; }));
          to[channel].sum += double(tile_sum<S>(n, [&](int64_t i) { return sums[i]; }));
        }
      });
      if (kLast)
        for (int64_t c = 0; c < a.channels; ++c) to[c] = {double(products[c]), double(sums[c])};
    });
  });
}

// sums, and the projection's means: kSlope is that of x̂·g, kConstant that of g.
template <class S>
void finish_product(const GroupNormProductArgs<S>& a, int64_t sample, const Pieces& pieces,
                    const ChannelSums* partial, const GroupNormRoom<S>& room) {
  using R = GroupNormRoom<S>;
  const int64_t n = a.channels, width = a.group_channels();
  const double count = double(width) * double(a.pixels);
  const S* const gamma = room.row(R::kScale);
  S *const slope = room.row(R::kSlope), *const constant = room.row(R::kConstant);
  for (int64_t g = 0; g < a.groups; ++g) {
    double product = 0.0, sum = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      ChannelSums all = partial[c];
      for (int64_t k = 1; k < pieces.slices; ++k) {
        all.product += partial[k * n + c].product;
        all.sum += partial[k * n + c].sum;
      }
      if (a.sums) {
        a.sums[2 * (sample * n + c)] = S(all.product);
        a.sums[2 * (sample * n + c) + 1] = S(all.sum);
      }
      const double weight = a.forward ? 1.0 : double(gamma[c]);
      product += weight * all.product, sum += weight * all.sum;
    }
    for (int64_t c = g * width; c < (g + 1) * width; ++c)
      slope[c] = S(product / count), constant[c] = S(sum / count);
  }
}

template <bool kLast, bool kSilu, bool kForward, class S>
void product_rows(const Piece& p, const S* given, const S* h, S gain, const GroupNormRoom<S>& room,
                  S* out) {
  using R = GroupNormRoom<S>;
  for_rows<kLast>(p, [&](int64_t at, int64_t length, int64_t channel) {
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
void apply_product(const GroupNormProductArgs<S>& a, int64_t sample, const Pieces& pieces,
                   const Piece& p, const GroupNormRoom<S>& room) {
  const S* const h = read_piece(a.h, sample, p, room.piece(pieces, 0));
  const S* const given = read_piece(a.given, sample, p, room.piece(pieces, 1));
  S* const out = lies_in_place<S>(a.out) ? place<S>(a.out, sample, p) : room.piece(pieces, 1);
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
