// Bringing a tile of any tensor into a contiguous buffer of the state's type, and back.
// Included by kernels_cpu_impl.h only (see there for the unnamed namespace).
#pragma once
#include <type_traits>

#include "half.h"
#include "kernels_cpu.h"

namespace sbm {
namespace {

// Calls run(pointer to the view's memory as its own element type).
template <class Run>
void with_type(const TensorView& v, Run run) {
  switch (v.dtype) {
    case DType::f32:
      return run(static_cast<float*>(v.data));
    case DType::f64:
      return run(static_cast<double*>(v.data));
    case DType::bf16:
      return run(static_cast<Bf16*>(v.data));
    case DType::f16:
      return run(static_cast<Half*>(v.data));
  }
}

template <class S>
constexpr DType dtype_of() {
  return sizeof(S) == sizeof(float) ? DType::f32 : DType::f64;
}

// Whether the tile lies in memory just as in a buffer.
template <class S>
bool in_place(const TensorView& v, const Tile& t) {
  return v.dtype == dtype_of<S>() && v.dense() && (t.samples == 1 || v.sample_stride == t.count);
}

// Calls run(memory offset, memory stride, position in the tile, length) for every run of elements
// along the innermost dimension.
template <class Run>
void for_each_run(const TensorView& v, const Tile& t, Run run) {
  const int last = v.dims - 1;
  for (int64_t s = 0; s < t.samples; ++s) {
    const int64_t base = (t.sample + s) * v.sample_stride;
    if (v.dims == 0) {
      run(base, 1, s * t.count, t.count);
      continue;
    }
    int64_t index[TensorView::kMaxDims], rest = t.first;
    for (int d = last; d >= 0; --d) index[d] = rest % v.size[d], rest /= v.size[d];
    for (int64_t done = 0; done < t.count;) {
      int64_t offset = base;
      for (int d = 0; d <= last; ++d) offset += index[d] * v.stride[d];
      const int64_t left = v.size[last] - index[last], want = t.count - done;
      const int64_t length = left < want ? left : want;
      run(offset, v.stride[last], s * t.count + done, length);
      done += length;
      index[last] = 0;
      for (int d = last - 1; d >= 0; --d) {
        if (++index[d] < v.size[d]) break;
        index[d] = 0;
      }
    }
  }
}

// Asks for a tile that lies in one piece, without waiting for it.
inline void prefetch(const TensorView& v, const Tile& t) {
  if (!v.given() || !v.dense()) return;
  const int64_t size = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
  const char* const data = static_cast<const char*>(v.data);
  const char* const begin = data + (t.sample * v.sample_stride + t.first) * size;
  const int64_t bytes = t.samples == 1 ? t.count * size : t.samples * v.sample_stride * size;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i);
}

// The tile's elements: where they lie, or gathered into `buffer`.
template <class S>
const S* read(const TensorView& v, const Tile& t, S* buffer) {
  if (in_place<S>(v, t))
    return static_cast<const S*>(v.data) + t.sample * v.sample_stride + t.first;
  with_type(v, [&](const auto* data) {
    for_each_run(v, t, [&](int64_t offset, int64_t stride, int64_t at, int64_t length) {
      for (int64_t i = 0; i < length; ++i) buffer[at + i] = S(widen(data[offset + i * stride]));
    });
  });
  return buffer;
}

// Where to write the tile: in place, or into `buffer` until commit().
template <class S>
S* target(const TensorView& v, const Tile& t, S* buffer) {
  return in_place<S>(v, t) ? static_cast<S*>(v.data) + t.sample * v.sample_stride + t.first
                           : buffer;
}

// scale·values into the tile.
template <class S>
void store(const TensorView& v, const Tile& t, const S* values, S scale) {
  with_type(v, [&](auto* data) {
    using T = std::remove_reference_t<decltype(*data)>;
    for_each_run(v, t, [&](int64_t offset, int64_t stride, int64_t at, int64_t length) {
      for (int64_t i = 0; i < length; ++i)
        data[offset + i * stride] = narrow<T>(S(scale * values[at + i]));
    });
  });
}

template <class S>
void commit(const TensorView& v, const Tile& t, const S* values) {
  if (!in_place<S>(v, t)) store(v, t, values, S(1));
}

}  // namespace
}  // namespace sbm
