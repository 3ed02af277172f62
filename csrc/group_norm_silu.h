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

// Elements [first, first + count) of a sample's memory. Where channels are last, whole pixels; else
// whole groups, or whole channels of one group, or a part of one channel.
struct Piece {
  int64_t first, count;
  int64_t channel, channels;  // those it has
  int64_t slice;              // which part of its channels' pixels
  int64_t part;               // which part of its groups' elements
};

// The cut of a sample. It depends on the sample's shape only, never on threads.
class Pieces {
 public:
  template <class S>
  explicit Pieces(const GroupNormShape<S>& a)
      : last_(a.channels_last),
        channels_(a.channels),
        pixels_(a.pixels),
        width_(a.group_channels()) {
    const int64_t fit = kPiece / (last_ ? channels_ : pixels_);  // pixels, channels
    pixel_step_ = within(last_ ? (fit < kPieceRows ? fit : kPieceRows) : kPiece, pixels_);
    if (last_)
      channel_step_ = channels_;
    else
      channel_step_ = fit < width_ ? within(fit, width_) : within(fit / width_, a.groups) * width_;
    slices_ = pieces(pixels_, pixel_step_);
    parts_ = slices_ * (last_ ? 1 : pieces(width_, channel_step_));
    count_ = last_ ? slices_ : parts_ * pieces(channels_, parts_ > 1 ? width_ : channel_step_);
  }

  int64_t count() const { return count_; }
  bool channels_last() const { return last_; }
  int64_t channels() const { return channels_; }
  // Pieces that every channel, and every group, is spread over.
  int64_t slices() const { return slices_; }
  int64_t parts() const { return parts_; }
  // Elements of the largest.
  int64_t most() const { return channel_step_ * pixel_step_; }
  // Elements of a group in one of its parts.
  int64_t in_part(int64_t part) const {
    const Piece p = (*this)[part];  // of the first group
    return p.count / p.channels * (p.channels < width_ ? p.channels : width_);
  }

  Piece operator[](int64_t i) const {
    const int64_t slice = i % slices_, pixel = slice * pixel_step_;
    const int64_t wide = within(pixel_step_, pixels_ - pixel);
    if (last_) return {pixel * channels_, wide * channels_, 0, channels_, slice, slice};
    const int64_t part = i % parts_, of_group = part / slices_ * channel_step_;
    const bool whole = parts_ == 1;
    const int64_t channel = whole ? i * channel_step_ : i / parts_ * width_ + of_group;
    const int64_t rows = within(channel_step_, whole ? channels_ - channel : width_ - of_group);
    return {channel * pixels_ + pixel, rows * wide, channel, rows, slice, part};
  }

 private:
  static int64_t within(int64_t wanted, int64_t most) {
    return wanted < 1 ? 1 : wanted < most ? wanted : most;
  }
  static int64_t pieces(int64_t all, int64_t step) { return (all + step - 1) / step; }

  bool last_;
  int64_t channels_, pixels_, width_;  // width: channels of a group
  int64_t channel_step_, pixel_step_;  // of a piece
  int64_t slices_, parts_, count_;
};

// What the kernels get of a sample beside its tensors: rows of a number for every channel, made
// once and read at every pixel, and room of the thread's own. All of it begins at cache lines.
template <class S>
struct GroupNormRoom {
  enum Row { kScale, kOffset, kMean, kFactor, kSlope, kConstant, kGammaDot, kBetaDot, kRows };
  static constexpr Row kAdd = kGammaDot;
  static constexpr int kOwnRows = 4, kOwnPieces = 2;
  static constexpr int64_t kLanes = 64;  // the least size of a row of the thread's own

  // Where channels are last, a row is repeated to about this many numbers, for as many pixels at a
  // time: short loops are slow.
  static constexpr int64_t kLong = 512;

  S* rows;
  int64_t row_length, row_size, piece_size;
  S* buffer;

  static int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
  static int64_t buffer_size(const Pieces& pieces) {
    return kOwnRows * padded(length(pieces)) + kOwnPieces * padded(pieces.most());
  }
  static int64_t length(const Pieces& pieces) {
    const int64_t n = pieces.channels(),
                  times = pieces.channels_last() && n < kLong ? kLong / n : 1;
    return n * times;
  }
  static int64_t rows_size(const Pieces& pieces) { return kRows * padded(length(pieces)); }
  GroupNormRoom(const Pieces& pieces, S* rows, S* buffer)
      : rows(rows),
        row_length(length(pieces)),
        row_size(padded(row_length)),
        piece_size(padded(pieces.most())),
        buffer(buffer) {}

  S* row(Row which) const { return rows + which * row_size; }
  S* own_row(int which) const { return buffer + which * row_size; }
  S* own_piece(int which) const { return buffer + kOwnRows * row_size + which * piece_size; }
};

// The kernels of an instruction set for one state dtype. Both ops go over a sample twice: `begin`,
// `reduce` for every piece, `finish`, `apply` for every piece. `reduce` leaves two numbers for
// every group of a part, [parts, 2, groups] (mean, sum of squared deviations), or for every channel
// of a slice, [slices, 2, channels] (Σ u·x̂, Σ u with u = dn or given).
template <class Args, class S>
struct GroupNormPasses {
  void (*begin)(const Args&, int64_t sample, const GroupNormRoom<S>&);
  void (*reduce)(const Args&, int64_t sample, const Piece&, const GroupNormRoom<S>&, double*);
  void (*finish)(const Args&, int64_t sample, const Pieces&, double*, const GroupNormRoom<S>&);
  void (*apply)(const Args&, int64_t sample, const Piece&, const GroupNormRoom<S>&);
};

template <class S>
using GroupNormKernel = GroupNormPasses<GroupNormArgs<S>, S>;
template <class S>
using GroupNormProductKernel = GroupNormPasses<GroupNormProductArgs<S>, S>;

}  // namespace sbm
