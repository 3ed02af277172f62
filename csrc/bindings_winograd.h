// From torch's tensors to the arguments of Winograd's transforms.
#pragma once
#include "bindings_common.h"
#include "winograd.h"

namespace {

inline void check_float(const Home& home, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(home.has(t) && t.scalar_type() == ScalarType::Float, name,
                  ": expected a float32 ", home.name, " tensor");
}

// An image [samples, channels, height, width] with channels last in memory.
template <class T>
sbm::Nhwc<T> nhwc(const Home& home, const Tensor& t, const char* name) {
  check_float(home, t, name);
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected [samples, channels, height, width], got ",
                  t.dim(), " dimensions");
  STD_TORCH_CHECK(t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1, name,
                  ": expected channels last in memory");
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(2), t.stride(3)};
}

// What both ops read; `image`: x or y, `tiles`: its tiles or products.
inline void winograd_shape(const Home& home, sbm::WinogradShape& a, const Tensor& image,
                           const Tensor& tiles, int64_t first, const char* name) {
  check_float(home, tiles, name);
  a.samples = image.size(0), a.channels = image.size(1);
  a.height = image.size(2), a.width = image.size(3);
  STD_TORCH_CHECK(tiles.dim() == 3 && (tiles.size(0) == 16 || tiles.size(0) == 36) &&
                      tiles.size(2) == a.channels && tiles.is_contiguous(),
                  name, ": expected a contiguous tensor [16 or 36, tiles, ", a.channels, "]");
  a.side = tiles.size(0) == 16 ? 2 : 4;
  a.first = first, a.count = tiles.size(1);
  STD_TORCH_CHECK(first >= 0 && first <= a.tiles() - a.count, "first: expected ", a.count,
                  " of the ", a.tiles(), " tiles to lie behind it, got ", first);
}

}  // namespace
