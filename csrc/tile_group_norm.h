// The passes of group_norm_silu over a piece of a sample, see group_norm_silu.h. Included by
// kernels_cpu_impl.h only.
#pragma once
#include <string.h>

#include <initializer_list>

#include "silu.h"
#include "tile_io.h"
#include "tile_moments.h"

namespace sbm {
namespace {

// A number of every channel, along a row of pixels' channels (kLast) or of one channel's pixels.
template <bool kLast, class S>
struct Along {
  const S* row;
  S same;
  Along(const S* numbers, int64_t channel)
      : row(numbers + channel), same(kLast ? S(0) : numbers[channel]) {}
  S operator[](int64_t i) const { return kLast ? row[i] : same; }
};

// Calls run(offset in the piece, length, channel) for every such row; `longest`: of pixels'
// channels.
template <bool kLast, class Run>
void for_rows(const Piece& p, int64_t longest, Run run) {
  const int64_t step = kLast ? longest : p.count / p.channels;
  for (int64_t at = 0, channel = p.channel; at < p.count; at += step, channel += !kLast) {
    const int64_t left = p.count - at;
    run(at, left < step ? left : step, channel);
  }
}

// Repeats a row of n numbers to its full length.
template <class S>
void repeat_row(const GroupNormRoom<S>& room, S* row, int64_t n) {
  for (int64_t i = n; i < room.row_length; i += n) memcpy(row + i, row, size_t(n) * sizeof(S));
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
bool is_plain(const GroupNormArgs<S>& a) {
  return !a.add.given() && !a.residual.given() && a.gain == S(1);
}

template <class S>
void begin_norm(const GroupNormArgs<S>& a, int64_t sample, const GroupNormRoom<S>& room) {
  S* const add = room.row(GroupNormRoom<S>::kAdd);
  read_affine(a, sample, room);
  if (is_plain(a)) return;
  read_row(a.add, sample, a.channels, S(0), add);
  repeat_row(room, add, a.channels);
}

// h of a piece: where it lies, or made in `buffer`.
template <class S>
const S* sum_of(const GroupNormArgs<S>& a, int64_t sample, const Piece& p,
                const GroupNormRoom<S>& room, S* buffer) {
  if (is_plain(a)) return read_piece(a.x, sample, p, buffer);
  const S* const add = room.row(GroupNormRoom<S>::kAdd);
  with_flag(a.channels_last, [&](auto last) {
    with_piece(a.x, sample, p, [&](const auto* x) {
      for_rows<last.value>(p, room.row_length, [&](int64_t at, int64_t length, int64_t channel) {
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

template <class S>
void reduce_norm(const GroupNormArgs<S>& a, int64_t sample, const Piece& p,
                 const GroupNormRoom<S>& room, double* moments) {
  const bool keep = lies_in_place<S>(a.total);
  S* const buffer = keep ? place<S>(a.total, sample, p) : room.own_piece(0);
  const S* const h = sum_of(a, sample, p, room, buffer);
  if (a.total.given()) write_piece(a.total, sample, p, h);
  double *const means = moments + p.part * 2 * a.groups, *const squares = means + a.groups;
  if (a.channels_last) {
    moments_of(h, p.count / a.channels, a.channels, 0, a.groups, room, means, squares);
    return;
  }
  const int64_t width = a.group_channels();
  const int64_t groups = p.channels > width ? p.channels / width : 1, n = p.count / groups;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t g = p.channel / width + i;
    moments_of_row(h + i * n, n, room, means + g, squares + g);
  }
}

// stats, and the rows that `apply` reads.
template <class S>
void finish_norm(const GroupNormArgs<S>& a, int64_t sample, const Pieces& pieces, double* moments,
                 const GroupNormRoom<S>& room) {
  using R = GroupNormRoom<S>;
  const int64_t n = a.channels, width = a.group_channels(), groups = a.groups;
  merge_moments(pieces, groups, moments);
  const double *const means = moments, *const squares = moments + groups;
  const double per_count = 1.0 / (double(width) * double(a.pixels));
  S *const mean = room.own_row(0), *const r = room.own_row(1), *const rest = room.own_row(2);
  SBM_IVDEP
  for (int64_t g = 0; g < groups; ++g) {
    const double wide = 1.0 / ::sqrt(fused(squares[g], per_count, a.eps));
    mean[g] = S(means[g]), r[g] = S(wide);
    rest[g] = S((means[g] - double(mean[g])) * wide);  // what the mean's rounding left
  }
  S* const stats = a.stats + 2 * sample * groups;
  for (int64_t g = 0; g < groups; ++g) stats[2 * g] = mean[g], stats[2 * g + 1] = r[g];
  S *const left = room.own_row(3), *const factor = room.row(R::kFactor);
  spread_groups(mean, groups, width, room.row(R::kMean));
  spread_groups(r, groups, width, factor);
  spread_groups(rest, groups, width, left);
  const S* const gamma = room.row(R::kScale);
  S* const beta = room.row(R::kOffset);
  SBM_IVDEP
  for (int64_t c = 0; c < n; ++c) {
    factor[c] *= gamma[c];
    beta[c] = fused(-left[c], gamma[c], beta[c]);
  }
  for (S* row : {room.row(R::kMean), factor, beta}) repeat_row(room, row, n);
}

// SiLU is a long chain of operations. Behind loads that wait for the second-level cache it fills
// the processor's queue, so it gets loops of its own, over this many numbers.
constexpr int64_t kSiluBlock = 128;

// out[i] = act(normalised(i)) for i < n.
template <bool kSilu, class S, class Normalised>
SBM_HD void activate(const Normalised& normalised, int64_t n, S* out) {
  int64_t i = 0;
  if (kSilu) {
    for (; i + kSiluBlock <= n; i += kSiluBlock) {
      alignas(64) S v[kSiluBlock];
      SBM_IVDEP
      for (int64_t k = 0; k < kSiluBlock; ++k) v[k] = normalised(i + k);
      SBM_IVDEP
      for (int64_t k = 0; k < kSiluBlock; ++k) out[i + k] = silu(v[k]);
    }
  }
  SBM_IVDEP
  for (int64_t k = i; k < n; ++k) {
    const S v = normalised(k);
    out[k] = kSilu ? silu(v) : v;
  }
}

template <bool kLast, bool kSilu, bool kAdd, class S>
void normalise_rows(const Piece& p, const S* h, const GroupNormRoom<S>& room, S* out) {
  using R = GroupNormRoom<S>;
  for_rows<kLast>(p, room.row_length, [&](int64_t at, int64_t length, int64_t channel) {
    const Along<kLast, S> mean(room.row(R::kMean), channel), factor(room.row(R::kFactor), channel);
    const Along<kLast, S> offset(room.row(R::kOffset), channel);
    const Along<kLast, S> add(room.row(R::kAdd), channel);
    const S* const from = h + at;
    const auto normalised = [&](int64_t i) {
      const S v = kAdd ? from[i] + add[i] : from[i];
      return fused(v - mean[i], factor[i], offset[i]);
    };
    activate<kSilu>(normalised, length, out + at);
  });
}

template <class S>
void apply_norm(const GroupNormArgs<S>& a, int64_t sample, const Piece& p,
                const GroupNormRoom<S>& room) {
  const bool kept = lies_in_place<S>(a.total);
  const bool adds = !kept && a.add.given() && !a.residual.given() && a.gain == S(1);
  S* const buffer = room.own_piece(0);
  const S* const h = kept   ? place<S>(a.total, sample, p)
                     : adds ? read_piece(a.x, sample, p, buffer)
                            : sum_of(a, sample, p, room, buffer);
  S* const out = lies_in_place<S>(a.out) ? place<S>(a.out, sample, p) : room.own_piece(1);
  with_flag(a.channels_last, [&](auto last) {
    with_flag(a.silu, [&](auto silu) {
      with_flag(adds, [&](auto add) {
        normalise_rows<last.value, silu.value, add.value>(p, h, room, out);
      });
    });
  });
  write_piece(a.out, sample, p, out);
}

template <class S>
GroupNormKernel<S> norm_kernel() {
  return {begin_norm<S>, reduce_norm<S>, finish_norm<S>, apply_norm<S>};
}

}  // namespace
}  // namespace sbm
