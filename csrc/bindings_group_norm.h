// From torch's tensors to the arguments of group_norm_silu.
#pragma once
#include "bindings_common.h"
#include "group_norm_silu.h"

namespace {

// Whether every sample lies in one piece, as [channels, …] or as […, channels].
inline bool lies_as(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  const auto fits = [&](size_t d) {
    const bool fit = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return fit;
  };
  bool fit = !channels_last || fits(1);
  for (size_t d = sizes.size() - 1; d >= 2; --d) fit = fits(d) && fit;
  return (channels_last || fits(1)) && fit;
}

// A tensor of x's shape that lies as x does.
inline TensorView image(const Home& home, const MaybeTensor& t, const Tensor& x, bool channels_last,
                        const char* name, const char* like = "x") {
  if (!t) return {};
  STD_TORCH_CHECK(home.has(*t), name, ": expected a ", home.name, " tensor");
  STD_TORCH_CHECK(t->sizes().equals(x.sizes()), name, ": expected the shape of ", like);
  STD_TORCH_CHECK(t->numel() == 0 || lies_as(*t, channels_last), name,
                  ": expected samples without gaps, with channels ",
                  channels_last ? "last" : "first", " in memory as those of ", like);
  TensorView v;
  v.data = t->data_ptr();
  v.dtype = dtype_of(*t, name);
  v.sample_stride = t->stride(0);
  return v;
}

// The same, to be written: no two samples share memory.
inline TensorView written_image(const Home& home, const MaybeTensor& t, const Tensor& x,
                                bool channels_last, const char* name, const char* like = "x") {
  const TensorView v = image(home, t, x, channels_last, name, like);
  STD_TORCH_CHECK(!t || t->size(0) <= 1 || v.sample_stride >= t->numel() / t->size(0), name,
                  ": its samples share memory");
  return v;
}

// Rows of `channels` numbers: one a sample, or one for all where `batch` is negative.
inline TensorView rows(const Home& home, const MaybeTensor& t, int64_t batch, int64_t channels,
                       const char* name) {
  if (!t) return {};
  const bool shared = batch < 0;
  const int64_t last = shared ? 0 : 1;
  STD_TORCH_CHECK(home.has(*t) && t->dim() == last + 1 && (shared || t->size(0) == batch) &&
                      t->size(last) == channels,
                  name, ": expected a ", home.name, " tensor [", shared ? "" : "samples, ",
                  channels, "]");
  STD_TORCH_CHECK(channels <= 1 || t->stride(last) == 1, name,
                  ": expected channels beside one another in memory");
  TensorView v;
  v.data = t->data_ptr();
  v.dtype = dtype_of(*t, name);
  v.sample_stride = shared ? 0 : t->stride(0);
  return v;
}

// Memory that is written before all of `other` is read.
inline void check_apart(const TensorView& written, const TensorView& other, int64_t batch,
                        int64_t numel, const char* name, const char* what) {
  if (!written.given() || !other.given() || batch == 0 || numel == 0) return;
  const auto end = [&](const TensorView& v) {
    return static_cast<const char*>(v.data) +
           ((batch - 1) * v.sample_stride + numel) * element_size(v);
  };
  STD_TORCH_CHECK(end(written) <= static_cast<const char*>(other.data) ||
                      end(other) <= static_cast<const char*>(written.data),
                  name, ": shares memory with ", what);
}

template <class S>
S* table_of(const Home& home, const Tensor& t, int64_t batch, int64_t columns, const char* name) {
  STD_TORCH_CHECK(home.has(t) && t.scalar_type() == state_dtype<S>() && t.dim() == 3 &&
                      t.size(0) == batch && t.size(1) == columns && t.size(2) == 2 &&
                      t.is_contiguous(),
                  name, ": expected a contiguous ", sizeof(S) == 4 ? "float32" : "float64", " ",
                  home.name, " tensor [", batch, ", ", columns, ", 2]");
  return static_cast<S*>(t.data_ptr());
}

// What both ops read; `x`: the tensor that the others are like.
template <class S>
void norm_shape(const Home& home, sbm::GroupNormShape<S>& a, const Tensor& x, const char* name,
                const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& scale,
                const MaybeTensor& shift, int64_t groups, double gain, bool silu) {
  STD_TORCH_CHECK(x.dim() >= 2, name, ": expected [samples, channels, …], got ", x.dim(),
                  " dimensions");
  a.batch = x.size(0), a.channels = x.size(1), a.pixels = 1;
  for (size_t d = 2; d < size_t(x.dim()); ++d) a.pixels *= x.sizes()[d];
  STD_TORCH_CHECK(groups >= 1 && a.channels % groups == 0 && a.channels > 0,
                  "groups: expected a divisor of the ", a.channels, " channels, got ", groups);
  a.groups = groups, a.gain = S(gain), a.silu = silu;
  // One pixel lies both ways: then rows of channels are the longer ones.
  a.channels_last = a.channels > 1 && (a.pixels == 1 || !lies_as(x, false));
  a.weight = rows(home, weight, -1, a.channels, "weight");
  a.bias = rows(home, bias, -1, a.channels, "bias");
  a.scale = rows(home, scale, a.batch, a.channels, "scale");
  a.shift = rows(home, shift, a.batch, a.channels, "shift");
}

}  // namespace
