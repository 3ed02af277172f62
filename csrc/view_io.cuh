// Four neighbouring elements of a sample, from any tensor and back.
#pragma once
#include <cuda_runtime.h>

#include "half.h"
#include "tensor_view.h"

namespace sbm {
namespace {

template <class S>
struct Quad {
  S v[4];
};

// Four elements as they lie in memory, moved by the widest instructions.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Piece {
  T v[4];
};

template <class T, class S>
__device__ __forceinline__ Quad<S> read_piece(const T* from) {
  const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(from);
  return {{S(widen(piece.v[0])), S(widen(piece.v[1])), S(widen(piece.v[2])), S(widen(piece.v[3]))}};
}

template <class T, class S>
__device__ __forceinline__ void write_piece(T* to, const Quad<S>& q) {
  *reinterpret_cast<Piece<T>*>(to) = {
      {narrow<T>(q.v[0]), narrow<T>(q.v[1]), narrow<T>(q.v[2]), narrow<T>(q.v[3])}};
}

// Calls run(the data as its own element type). kF64 = false: it is not float64.
template <bool kF64, class Run>
__device__ __forceinline__ void with_type(void* data, DType dtype, const Run& run) {
  if (dtype == DType::f32)
    run(static_cast<float*>(data));
  else if (dtype == DType::bf16)
    run(static_cast<Bf16*>(data));
  else if (!kF64 || dtype == DType::f16)
    run(static_cast<Half*>(data));
  else
    run(static_cast<double*>(data));
}

__host__ __device__ __forceinline__ int element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Whether DenseIo can read the view.
inline bool is_dense(const TensorView& v) {
  if (!v.given()) return true;
  const size_t piece = element_bytes(v.dtype) < 4 ? 8 : 16;
  return v.dense() && v.sample_stride % 4 == 0 && reinterpret_cast<uintptr_t>(v.data) % piece == 0;
}

// Four elements of a sample: origin + local … origin + local + 3, a multiple of 4; the last ones
// may not exist. `origin` is the same for a whole block, or for a tile of it.
struct Spot {
  int64_t origin;
  uint32_t local;
  int count;  // how many exist: 1 … 4
  __device__ __forceinline__ int64_t first() const { return origin + local; }
};

// Both kinds of access: a cursor is a sample of a tensor. The state and its registers are known to
// be of type S.

// Dense samples whose pieces are aligned, count always 4: see is_dense(). The origin never changes.
struct DenseIo {
  static constexpr bool kOneOrigin = true;
  using Cursor = char*;  // to the element at the origin

  static __device__ __forceinline__ Cursor cursor(const TensorView& v, int64_t sample,
                                                  int64_t origin) {
    const int64_t offset = (sample * v.sample_stride + origin) * element_bytes(v.dtype);
    return static_cast<char*>(v.data) + kept(offset);
  }
  template <class S>
  static __device__ __forceinline__ Cursor state_cursor(const TensorView& v, int64_t sample,
                                                        int64_t origin) {
    const int64_t offset = sample * v.sample_stride + origin;
    return static_cast<char*>(v.data) + kept(offset * int64_t(sizeof(S)));
  }
  template <class S, bool kF64>
  static __device__ __forceinline__ Quad<S> read(const TensorView& v, Cursor c, const Spot& at) {
    Quad<S> q;
    with_type<kF64>(c, v.dtype, [&](const auto* data) {
      using T = std::remove_const_t<std::remove_reference_t<decltype(*data)>>;
      q = read_piece<T, S>(data + at.local);
    });
    return q;
  }
  template <bool kF64, class S>
  static __device__ __forceinline__ void write(const TensorView& v, Cursor c, const Spot& at,
                                               const Quad<S>& q) {
    with_type<kF64>(c, v.dtype, [&](auto* data) { write_piece(data + at.local, q); });
  }
  template <class S>
  static __device__ __forceinline__ Quad<S> read_state(const TensorView&, Cursor c,
                                                       const Spot& at) {
    return read_piece<S, S>(reinterpret_cast<const S*>(c) + at.local);
  }
  template <class S>
  static __device__ __forceinline__ void write_state(const TensorView&, Cursor c, const Spot& at,
                                                     const Quad<S>& q) {
    write_piece(reinterpret_cast<S*>(c) + at.local, q);
  }

 private:
  // Keeps nvcc from taking the sum apart and making it again for every tile.
  static __device__ __forceinline__ int64_t kept(int64_t offset) {
#if defined(__CUDA_ARCH__)
    asm("" : "+l"(offset));
#endif
    return offset;
  }
};

__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) != 0) return a / b;
  return int64_t(uint32_t(a) / uint32_t(b));  // several times faster
}

// Any tensor.
struct AnyIo {
  static constexpr bool kOneOrigin = false;
  using Cursor = int64_t;  // offset of the sample

  static __device__ __forceinline__ Cursor cursor(const TensorView& v, int64_t sample, int64_t) {
    return sample * v.sample_stride;
  }
  template <class S>
  static __device__ __forceinline__ Cursor state_cursor(const TensorView& v, int64_t sample,
                                                        int64_t) {
    return sample * v.sample_stride;
  }
  template <class S, bool kF64>
  static __device__ __forceinline__ Quad<S> read(const TensorView& v, Cursor c, const Spot& at) {
    Quad<S> q;
    const Places places = locate(v, c, at);
    with_type<kF64>(v.data, v.dtype,
                    [&](const auto* data) { q = read_from<S>(data, places, at.count); });
    return q;
  }
  template <bool kF64, class S>
  static __device__ __forceinline__ void write(const TensorView& v, Cursor c, const Spot& at,
                                               const Quad<S>& q) {
    const Places places = locate(v, c, at);
    with_type<kF64>(v.data, v.dtype, [&](auto* data) { write_to(data, places, at.count, q); });
  }
  template <class S>
  static __device__ __forceinline__ Quad<S> read_state(const TensorView& v, Cursor c,
                                                       const Spot& at) {
    return read_from<S>(static_cast<const S*>(v.data), locate(v, c, at), at.count);
  }
  template <class S>
  static __device__ __forceinline__ void write_state(const TensorView& v, Cursor c, const Spot& at,
                                                     const Quad<S>& q) {
    write_to(static_cast<S*>(v.data), locate(v, c, at), at.count, q);
  }

 private:
  struct Places {
    int64_t at[4];  // offsets of the elements
    bool line;      // there are four, side by side
  };

  // One turn of the loop, unless the innermost dimension ends within the four.
  static __device__ __forceinline__ Places locate(const TensorView& v, Cursor sample,
                                                  const Spot& at) {
    Places places = {};
    int done = 0;
    do {
      const Run run = seek(v, at.first() + done);
      SBM_UNROLL
      for (int e = 0; e < 4; ++e)
        if (e >= done) places.at[e] = sample + run.offset + (e - done) * run.stride;
      places.line = at.count == 4 && done == 0 && run.left >= 4 && run.stride == 1;
      done += run.left < 4 ? int(run.left) : 4;
    } while (done < at.count);
    return places;
  }

  // Elements in equal steps of memory: `left` of them from one on.
  struct Run {
    int64_t offset, stride, left;
  };

  static __device__ __forceinline__ Run seek(const TensorView& v, int64_t i) {
    if (v.dims == 0) return {0, 1, 1};
    if (v.dims == 1) return {i * v.stride[0], v.stride[0], v.size[0] - i};
    return seek_nested(v, i);
  }
  static __device__ __forceinline__ Run seek_nested(const TensorView& v, int64_t i) {
    const int last = v.dims - 1;
    Run run = {0, v.stride[last], 0};
    for (int d = last; d >= 0; --d) {
      const int64_t outer = d > 0 ? divide(i, v.size[d]) : 0, index = i - outer * v.size[d];
      run.offset += index * v.stride[d];
      if (d == last) run.left = v.size[d] - index;
      i = outer;
    }
    return run;
  }

  template <class T>
  static __device__ __forceinline__ bool aligned(const T* at) {
    return reinterpret_cast<uintptr_t>(at) % alignof(Piece<T>) == 0;
  }
  template <class S, class T>
  static __device__ __forceinline__ Quad<S> read_from(const T* data, const Places& places,
                                                      int count) {
    if (places.line && aligned(data + places.at[0])) return read_piece<T, S>(data + places.at[0]);
    Quad<S> q = {};
    SBM_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e < count) q.v[e] = S(widen(data[places.at[e]]));
    return q;
  }
  template <class S, class T>
  static __device__ __forceinline__ void write_to(T* data, const Places& places, int count,
                                                  const Quad<S>& q) {
    if (places.line && aligned(data + places.at[0])) return write_piece(data + places.at[0], q);
    SBM_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e < count) data[places.at[e]] = narrow<T>(q.v[e]);
  }
};

}  // namespace
}  // namespace sbm
