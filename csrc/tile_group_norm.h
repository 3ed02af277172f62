// The passes of group_norm_silu over a piece of a sample, see group_norm_silu.h. Included by
// kernels_cpu_impl.h only.
#pragma once
#include "silu.h"
#include "tile_sum.h"

namespace sbm {
namespace {

// A number of every channel, along a row of one pixel's channels (kLast) or of one channel's
// pixels.
template <bool kLast, class S>
struct Along {
  const S* row;
  S same;
  Along(const S* numbers, int64_t channel)
      : row(numbers + channel), same(kLast ? S(0) : numbers[channel]) {}
  S operator[](int64_t i) const { return kLast ? row[i] : same; }
};

// Calls run(offset in the piece, length, channel) for every such row.
template <bool kLast, class Run>
void for_rows(const Piece& p, Run run) {
  const int64_t rows = kLast ? p.count / p.channels : p.channels;
  const int64_t length = kLast ? p.channels : p.count / p.channels;
  for (int64_t r = 0; r < rows; ++r) run(r * length, length, kLast ? 0 : p.channel + r);
}

// Calls run(std::true_type) or run(std::false_type).
template <class Run>
void with_flag(bool flag, Run run) {
  if (flag)
    run(std::true_type());
  else
    run(std::false_type());
}

template <class S>
bool lies_in_place(const TensorView& v) {
  return v.given() && v.dtype == dtype_of<S>();
}

template <class S>
S* place(const TensorView& v, int64_t sample, const Piece& p) {
  return static_cast<S*>(v.data) + sample * v.sample_stride + p.first;
}

// Calls run(pointer to the piece in the tensor's own element type).
template <class Run>
void with_piece(const TensorView& v, int64_t sample, const Piece& p, Run run) {
  with_type(v, [&](auto* data) { run(data + sample * v.sample_stride + p.first); });
}

template <class S>
const S* read_piece(const TensorView& v, int64_t sample, const Piece& p, S* buffer) {
  if (lies_in_place<S>(v)) return place<S>(v, sample, p);
  with_piece(v, sample, p, [&](const auto* from) {
    SBM_IVDEP
    for (int64_t i = 0; i < p.count; ++i) buffer[i] = S(widen(from[i]));
  });
  return buffer;
}

template <class S>
void write_piece(const TensorView& v, int64_t sample, const Piece& p, const S* values) {
  if (lies_in_place<S>(v) && place<S>(v, sample, p) == values) return;
  with_piece(v, sample, p, [&](auto* to) {
    using T = std::remove_reference_t<decltype(*to)>;
    SBM_IVDEP
    for (int64_t i = 0; i < p.count; ++i) to[i] = narrow<T>(values[i]);
  });
}

// A row of `n` channels; `otherwise` where it is not given.
template <class S>
void read_row(const TensorView& v, int64_t sample, int64_t n, S otherwise, S* to) {
  if (!v.given()) {
    for (int64_t c = 0; c < n; ++c) to[c] = otherwise;
    return;
  }
  with_type(v, [&](const auto* data) {
    const auto* const from = data + sample * v.sample_stride;
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c) to[c] = S(widen(from[c]));
  });
}

// γ = weight·(1 + scale) and β = bias·(1 + scale) + shift.
template <class S>
void read_affine(const GroupNormShape<S>& a, int64_t sample, const GroupNormRoom<S>& room) {
  using R = GroupNormRoom<S>;
  const int64_t n = a.channels;
  S *const gamma = room.row(R::kScale), *const beta = room.row(R::kOffset);
  S *const scale = room.row(R::kSlope), *const shift = room.row(R::kConstant);
  read_row(a.weight, sample, n, S(1), gamma);
  read_row(a.bias, sample, n, S(0), beta);
  if (!a.scale.given() && !a.shift.given()) return;
  read_row(a.scale, sample, n, S(0), scale);
  read_row(a.shift, sample, n, S(0), shift);
  SBM_IVDEP
  for (int64_t c = 0; c < n; ++c) {
    gamma[c] *= S(1) + scale[c];
    beta[c] = fused(beta[c], S(1) + scale[c], shift[c]);
  }
}

template <class S>
void begin_norm(const GroupNormArgs<S>& a, int64_t sample, const GroupNormRoom<S>& room) {
  read_affine(a, sample, room);
  read_row(a.add, sample, a.channels, S(0), room.row(GroupNormRoom<S>::kAdd));
}

template <class S>
bool is_plain(const GroupNormArgs<S>& a) {
  return !a.add.given() && !a.residual.given() && a.gain == S(1);
}

// h of a piece: where it lies, or made in `buffer`.
template <class S>
const S* sum_of(const GroupNormArgs<S>& a, int64_t sample, const Piece& p,
                const GroupNormRoom<S>& room, S* buffer) {
  if (is_plain(a)) return read_piece(a.x, sample, p, buffer);
  const S* const add = room.row(GroupNormRoom<S>::kAdd);
  with_flag(a.channels_last, [&](auto last) {
    with_piece(a.x, sample, p, [&](const auto* x) {
      for_rows<last.value>(p, [&](int64_t at, int64_t length, int64_t channel) {
        const Along<last.value, S> added(add, channel);
        SBM_IVDEP
        for (int64_t i = 0; i < length; ++i) buffer[at + i] = S(widen(x[at + i])) + added[i];
      });
    });
  });
  const S gain = a.gain;
  if (a.residual.given()) {
    with_piece(a.residual, sample, p, [&](const auto* residual) {
      SBM_IVDEP
      for (int64_t i = 0; i < p.count; ++i) buffer[i] = gain * (buffer[i] + S(widen(residual[i])));
    });
  } else if (gain != S(1)) {
    for (int64_t i = 0; i < p.count; ++i) buffer[i] *= gain;
  }
  return buffer;
}

// Moments of n numbers whose mean is near `shift`, from the sums of their distances to it.
template <class S>
Moments moments_of(double n, S shift, double sum, double squares) {
  const double off = sum / n;
  return {n, double(shift) + off, squares - sum * off};
}

// Channels are last: sums over the piece's pixels, channel by channel, then over a group's
// channels.
template <class S>
void moments_of_pixels(const S* h, int64_t pixels, int64_t n, int64_t groups, S* mean, S* sum,
                       S* squares, Moments* to) {
  const int64_t width = n / groups;
  const double count = double(pixels) * double(width);
  for (int64_t c = 0; c < n; ++c) sum[c] = S(0);
  int64_t r = 0;
  for (; r + 8 <= pixels; r += 8) {
    const S* const v = h + r * n;
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c)
      sum[c] += ((v[c] + v[c + n]) + (v[c + 2 * n] + v[c + 3 * n])) +
                ((v[c + 4 * n] + v[c + 5 * n]) + (v[c + 6 * n] + v[c + 7 * n]));
  }
  for (; r < pixels; ++r) {
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c) sum[c] += h[r * n + c];
  }
  for (int64_t g = 0; g < groups; ++g) {
    double total = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) total += double(sum[c]);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) mean[c] = S(total / count);
  }
  for (int64_t c = 0; c < n; ++c) sum[c] = squares[c] = S(0);
  for (r = 0; r + 4 <= pixels; r += 4) {
    const S* const v = h + r * n;
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c) {
      const S d0 = v[c] - mean[c], d1 = v[c + n] - mean[c];
      const S d2 = v[c + 2 * n] - mean[c], d3 = v[c + 3 * n] - mean[c];
      sum[c] += (d0 + d1) + (d2 + d3);
      squares[c] += fused(d0, d0, d1 * d1) + fused(d2, d2, d3 * d3);
    }
  }
  for (; r < pixels; ++r) {
    SBM_IVDEP
    for (int64_t c = 0; c < n; ++c) {
      const S d = h[r * n + c] - mean[c];
      sum[c] += d;
      squares[c] = fused(d, d, squares[c]);
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    double first = 0.0, second = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c)
      first += double(sum[c]), second += double(squares[c]);
    to[g] = moments_of(count, mean[g * width], first, second);
  }
}

// Sum of at(0) … at(n − 1), for any n.
template <class S, class At>
double long_sum(int64_t n, const At& at) {
  double sum = 0.0;
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t left = n - first;
    sum +=
        double(tile_sum<S>(left < kTile ? left : kTile, [&](int64_t i) { return at(first + i); }));
  }
  return sum;
}

template <class S>
Moments moments_of_row(const S* h, int64_t n) {
  const S mean = S(long_sum<S>(n, [&](int64_t i) { return h[i]; }) / double(n));
  const double sum = long_sum<S>(n, [&](int64_t i) { return h[i] - mean; });
  const double squares = long_sum<S>(n, [&](int64_t i) { return (h[i] - mean) * (h[i] - mean); });
  return moments_of(double(n), mean, sum, squares);
}

template <class S>
void reduce_norm(const GroupNormArgs<S>& a, int64_t sample, const Pieces& pieces, const Piece& p,
                 const GroupNormRoom<S>& room, Moments* moments) {
  const bool keep = lies_in_place<S>(a.total);
  S* const buffer = keep ? place<S>(a.total, sample, p) : room.piece(pieces, 0);
  const S* const h = sum_of(a, sample, p, room, buffer);
  if (a.total.given()) write_piece(a.total, sample, p, h);
  Moments* const to = moments + p.part * a.groups;
  if (a.channels_last)
    moments_of_pixels(h, p.count / a.channels, a.channels, a.groups, room.own_row(pieces, 0),
                      room.own_row(pieces, 1), room.own_row(pieces, 2), to);
  else
    to[p.channel / a.group_channels()] = moments_of_row(h, p.count);
}

// All parts of a group, by the update of Chan, Golub and LeVeque, "Updating formulae and a pairwise
// algorithm for computing sample variances", 1979.
inline Moments merged(const Moments* moments, int64_t parts, int64_t step) {
  Moments all = moments[0];
  for (int64_t k = 1; k < parts; ++k) {
    const Moments& next = moments[k * step];
    const double count = all.count + next.count, weight = next.count / count;
    const double off = next.mean - all.mean;
    all.squares += next.squares + off * off * all.count * weight;
    all.mean += off * weight;
    all.count = count;
  }
  return all;
}

template <class S>
void finish_norm(const GroupNormArgs<S>& a, int64_t sample, const Pieces& pieces,
                 const Moments* moments, const GroupNormRoom<S>& room) {
  using R = GroupNormRoom<S>;
  const int64_t width = a.group_channels();
  const S* const gamma = room.row(R::kScale);
  S *const beta = room.row(R::kOffset), *const means = room.row(R::kMean);
  S* const factor = room.row(R::kFactor);
  for (int64_t g = 0; g < a.groups; ++g) {
    const Moments all = merged(moments + g, pieces.parts(), a.groups);
    const double r = 1.0 / ::sqrt(all.squares / all.count + a.eps);
    const S mean = S(all.mean), rounded = S(r);
    const S rest = S((all.mean - double(mean)) * r);  // what the mean's rounding left
    S* const stats = a.stats + 2 * (sample * a.groups + g);
    stats[0] = mean, stats[1] = rounded;
    SBM_IVDEP
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      means[c] = mean;
      factor[c] = rounded * gamma[c];
      beta[c] = fused(-rest, gamma[c], beta[c]);
    }
  }
}

template <bool kLast, bool kSilu, class S>
void normalise_rows(const Piece& p, const S* h, const GroupNormRoom<S>& room, S* out) {
  using R = GroupNormRoom<S>;
  for_rows<kLast>(p, [&](int64_t at, int64_t length, int64_t channel) {
    const Along<kLast, S> mean(room.row(R::kMean), channel), factor(room.row(R::kFactor), channel);
    const Along<kLast, S> offset(room.row(R::kOffset), channel);
    const S* const from = h + at;
    S* const to = out + at;
    SBM_IVDEP
    for (int64_t i = 0; i < length; ++i) {
      const S n = fused(from[i] - mean[i], factor[i], offset[i]);
      to[i] = kSilu ? silu(n) : n;
    }
  });
}

template <class S>
void apply_norm(const GroupNormArgs<S>& a, int64_t sample, const Pieces& pieces, const Piece& p,
                const GroupNormRoom<S>& room) {
  S* const buffer = room.piece(pieces, 0);
  const S* const h =
      lies_in_place<S>(a.total) ? place<S>(a.total, sample, p) : sum_of(a, sample, p, room, buffer);
  S* const out = lies_in_place<S>(a.out) ? place<S>(a.out, sample, p) : room.piece(pieces, 1);
  with_flag(a.channels_last, [&](auto last) {
    with_flag(a.silu, [&](auto silu) { normalise_rows<last.value, silu.value>(p, h, room, out); });
  });
  write_piece(a.out, sample, p, out);
}

template <class S>
GroupNormKernel<S> norm_kernel() {
  return {begin_norm<S>, reduce_norm<S>, finish_norm<S>, apply_norm<S>};
}

}  // namespace
}  // namespace sbm
