// GroupNorm with what stands beside it in a network: a sum before it, FiLM and SiLU behind it; and
// the product of its Jacobian with one tensor.
#pragma once
#include "tensor_view.h"

namespace sbm {

// What both ops read. A sample lies in one piece, as [pixels, channels] or as [channels, pixels];
// of its TensorView only data, dtype and sample_stride count. So it is for rows of `channels`
// numbers, whose sample_stride is 0 where all samples share one.
template <class S>
struct GroupNormShape {
  int64_t batch = 0, channels = 0, pixels = 0, groups = 1;
  bool channels_last = false, silu = true;
  S gain = S(1);
  TensorView weight, bias, scale, shift;

  int64_t numel() const { return channels * pixels; }
  int64_t group_channels() const { return channels / groups; }
};

// h = gain·(x + add + residual)
// out = act(((h − mean)·r·weight + bias)·(1 + scale) + shift), mean and r = 1/√(var + eps) of every
// group of channels of a sample.
template <class S>
struct GroupNormArgs : GroupNormShape<S> {
  double eps = 0.0;
  TensorView x, residual, out, total;  // total: h, where it is wanted
  TensorView add;
  S* stats = nullptr;  // [batch, groups, 2]: mean, r
};

// With x̂ = (h − mean)·r, γ = weight·(1 + scale), n = x̂·γ + bias·(1 + scale) + shift and
// P g = r·(g − mean g − x̂·mean(x̂·g)):
//   vjp: dn = act'(n)·given, out = gain·P(γ·dn), sums = Σ_pixels (dn·x̂, dn)
//   jvp: out = act'(n)·(γ·P(gain·given) + x̂·weight_dot + bias_dot)
template <class S>
struct GroupNormProductArgs : GroupNormShape<S> {
  bool forward = false;  // jvp
  TensorView given, h, out;
  TensorView weight_dot, bias_dot;
  const S* stats = nullptr;
  S* sums = nullptr;  // [batch, channels, 2]
};

template <class S>
void group_norm_silu_cpu(const GroupNormArgs<S>& args);
template <class S>
void group_norm_silu_product_cpu(const GroupNormProductArgs<S>& args);

// Elements of a piece: what a kernel does at a time, so that it stays in the first-level cache.
constexpr int64_t kPiece = 4096;
constexpr int64_t kPieceRows = 128;  // at most: float sums stay short

// Elements [first, first + count) of a sample's memory: whole pixels where channels are last, else
// whole channels of one group or a part of one channel.
struct Piece {
  int64_t first, count;
  int64_t channel, channels;  // those it has
  int64_t slice;              // which part of a channel's pixels
  int64_t part;               // which part of its groups' elements
};

// The cut of a sample. It depends on the sample's shape only, never on threads.
struct Pieces {
  bool channels_last;
  int64_t channels, pixels, group_channels;
  int64_t pixel_step, channel_step;  // of a piece
  int64_t slices;                    // of a channel's pixels

  template <class S>
  explicit Pieces(const GroupNormShape<S>& a)
      : channels_last(a.channels_last),
        channels(a.channels),
        pixels(a.pixels),
        group_channels(a.group_channels()) {
    const int64_t fit = kPiece / (channels_last ? channels : pixels);
    channel_step = channels_last ? channels : within(fit, group_channels);
    pixel_step = within(channels_last ? (fit < kPieceRows ? fit : kPieceRows) : kPiece, pixels);
    slices = (pixels + pixel_step - 1) / pixel_step;
  }

  int64_t count() const { return parts() * (channels_last ? 1 : channels / group_channels); }

  // Elements of the largest.
  int64_t most() const { return channel_step * pixel_step; }

  // Pieces that every group is spread over.
  int64_t parts() const {
    return channels_last ? slices : slices * ((group_channels + channel_step - 1) / channel_step);
  }

  Piece operator[](int64_t i) const {
    const int64_t slice = i % slices, pixel = slice * pixel_step;
    const int64_t wide = within(pixel_step, pixels - pixel);
    if (channels_last) return {pixel * channels, wide * channels, 0, channels, slice, slice};
    const int64_t part = i % parts(), of_group = part / slices * channel_step;
    const int64_t channel = i / parts() * group_channels + of_group;
    const int64_t rows = within(channel_step, group_channels - of_group);
    return {channel * pixels + pixel, rows * wide, channel, rows, slice, part};
  }

 private:
  static int64_t within(int64_t wanted, int64_t most) {
    return wanted < 1 ? 1 : wanted < most ? wanted : most;
  }
};

// Count, mean and sum of squared deviations of some elements.
struct Moments {
  double count, mean, squares;
};

// Σ u·x̂ and Σ u of some elements of a channel.
struct ChannelSums {
  double product, sum;
};

// What the kernels get of a sample beside its tensors: rows of `channels` numbers, made once and
// read at every pixel, and room of the thread's own.
template <class S>
struct GroupNormRoom {
  enum Row {
    kScale,
    kOffset,
    kMean,
    kFactor,
    kSlope,
    kConstant,
    kGammaDot,
    kBetaDot,
    kRows,
    kAdd = kGammaDot
  };
  S* rows;
  int64_t channels;
  S* buffer;

  S* row(Row which) const { return rows + which * channels; }
  static int64_t buffer_size(const Pieces& pieces) {
    return 2 * pieces.most() + 3 * pieces.channels;
  }
  S* piece(const Pieces& pieces, int which) const { return buffer + which * pieces.most(); }
  S* own_row(const Pieces& pieces, int which) const {
    return buffer + 2 * pieces.most() + which * channels;
  }
};

// The kernels of an instruction set for one state dtype. Both ops go over a sample twice: `begin`,
// `reduce` for every piece, `finish`, `apply` for every piece.
template <class Args, class S, class Partial>
struct GroupNormPasses {
  void (*begin)(const Args&, int64_t sample, const GroupNormRoom<S>&);
  void (*reduce)(const Args&, int64_t sample, const Pieces&, const Piece&, const GroupNormRoom<S>&,
                 Partial*);
  void (*finish)(const Args&, int64_t sample, const Pieces&, const Partial*,
                 const GroupNormRoom<S>&);
  void (*apply)(const Args&, int64_t sample, const Pieces&, const Piece&, const GroupNormRoom<S>&);
};

// The piece's part of group g goes to moments[part·groups + g].
template <class S>
using GroupNormKernel = GroupNormPasses<GroupNormArgs<S>, S, Moments>;
// The piece's part of channel c goes to sums[slice·channels + c].
template <class S>
using GroupNormProductKernel = GroupNormPasses<GroupNormProductArgs<S>, S, ChannelSums>;

}  // namespace sbm
