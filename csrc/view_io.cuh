// Four neighbouring elements of a sample, from any tensor and back.
#pragma once
#include <cuda_runtime.h>

#include "half.h"
#include "tensor_view.h"

#if defined(__CUDACC__)
#define SBM_OUT_OF_LINE __noinline__
#else
#define SBM_OUT_OF_LINE
#endif

namespace sbm {
namespace {

template <class S>
struct Quad {
  S v[4];
};

// Four elements as one piece of memory.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Piece {
  T v[4];
};

template <class T, class S>
__device__ __forceinline__ Quad<S> read_piece(const T* from) {
  const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(from);
  Quad<S> q;
  SBM_UNROLL
  for (int e = 0; e < 4; ++e) q.v[e] = S(widen(piece.v[e]));
  return q;
}

template <class T, class S>
__device__ __forceinline__ void write_piece(T* to, const Quad<S>& q) {
  Piece<T> piece;
  SBM_UNROLL
  for (int e = 0; e < 4; ++e) piece.v[e] = narrow<T>(q.v[e]);
  *reinterpret_cast<Piece<T>*>(to) = piece;
}

// Calls run(the view's data as its own element type).
template <class Run>
__device__ __forceinline__ void with_type(const TensorView& v, const Run& run) {
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

__host__ __device__ __forceinline__ int element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Whether DenseIo can read the view.
inline bool is_dense(const TensorView& v) {
  if (!v.given()) return true;
  const size_t piece = element_bytes(v.dtype) < 4 ? 8 : 16;
  return v.dense() && v.sample_stride % 4 == 0 && reinterpret_cast<uintptr_t>(v.data) % piece == 0;
}

// Both kinds of access: locate() elements i … i+count−1 of a sample (i a multiple of 4), then read
// or write them. The state and its registers are known to be of type S.

// Dense samples whose pieces are aligned, count always 4: see is_dense().
struct DenseIo {
  using Spot = int64_t;

  static __device__ __forceinline__ Spot locate(const TensorView& v, int64_t sample, int64_t i,
                                                int) {
    return sample * v.sample_stride + i;
  }
  template <class S>
  static __device__ __forceinline__ Quad<S> read(const TensorView& v, Spot at, int) {
    Quad<S> q;
    with_type(v, [&](const auto* data) {
      using T = std::remove_const_t<std::remove_reference_t<decltype(*data)>>;
      q = read_piece<T, S>(data + at);
    });
    return q;
  }
  template <class S>
  static __device__ __forceinline__ void write(const TensorView& v, Spot at, int,
                                               const Quad<S>& q) {
    with_type(v, [&](auto* data) { write_piece(data + at, q); });
  }
  template <class S>
  static __device__ __forceinline__ Quad<S> read_state(const TensorView& v, Spot at, int) {
    return read_piece<S, S>(static_cast<const S*>(v.data) + at);
  }
  template <class S>
  static __device__ __forceinline__ void write_state(const TensorView& v, Spot at, int,
                                                     const Quad<S>& q) {
    write_piece(static_cast<S*>(v.data) + at, q);
  }
};

__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) != 0) return a / b;
  return int64_t(uint32_t(a) / uint32_t(b));  // several times faster
}

// Any tensor.
struct AnyIo {
  struct Spot {
    int64_t at[4];  // offsets of the elements
    bool line;      // there are four, side by side
  };

  static __device__ __forceinline__ Spot locate(const TensorView& v, int64_t sample, int64_t i,
                                                int count) {
    const Run run = seek(v, i);
    Spot spot;
    spot.at[0] = sample * v.sample_stride + run.offset;
    SBM_UNROLL
    for (int e = 1; e < 4; ++e) spot.at[e] = spot.at[e - 1] + run.stride;
    if (run.left < count) {
      SBM_UNROLL
      for (int e = 1; e < 4; ++e)
        if (e < count) spot.at[e] = sample * v.sample_stride + seek(v, i + e).offset;
    }
    spot.line = count == 4 && run.left >= 4 && run.stride == 1;
    return spot;
  }
  template <class S>
  static __device__ __forceinline__ Quad<S> read(const TensorView& v, const Spot& spot, int count) {
    Quad<S> q;
    with_type(v, [&](const auto* data) { q = read_from<S>(data, spot, count); });
    return q;
  }
  template <class S>
  static __device__ __forceinline__ void write(const TensorView& v, const Spot& spot, int count,
                                               const Quad<S>& q) {
    with_type(v, [&](auto* data) { write_to(data, spot, count, q); });
  }
  template <class S>
  static __device__ __forceinline__ Quad<S> read_state(const TensorView& v, const Spot& spot,
                                                       int count) {
    return read_from<S>(static_cast<const S*>(v.data), spot, count);
  }
  template <class S>
  static __device__ __forceinline__ void write_state(const TensorView& v, const Spot& spot,
                                                     int count, const Quad<S>& q) {
    write_to(static_cast<S*>(v.data), spot, count, q);
  }

 private:
  // Elements in equal steps of memory: `left` of them from one on.
  struct Run {
    int64_t offset, stride, left;
  };

  static __device__ __forceinline__ Run seek(const TensorView& v, int64_t i) {
    if (v.dims == 0) return {0, 1, 1};
    if (v.dims == 1) return {i * v.stride[0], v.stride[0], v.size[0] - i};
    return seek_nested(v, i);
  }
  static __device__ SBM_OUT_OF_LINE Run seek_nested(const TensorView& v, int64_t i) {
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
  static __device__ __forceinline__ Quad<S> read_from(const T* data, const Spot& spot, int count) {
    if (spot.line && aligned(data + spot.at[0])) return read_piece<T, S>(data + spot.at[0]);
    Quad<S> q = {};
    SBM_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e < count) q.v[e] = S(widen(data[spot.at[e]]));
    return q;
  }
  template <class S, class T>
  static __device__ __forceinline__ void write_to(T* data, const Spot& spot, int count,
                                                  const Quad<S>& q) {
    if (spot.line && aligned(data + spot.at[0])) return write_piece(data + spot.at[0], q);
    SBM_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e < count) data[spot.at[e]] = narrow<T>(q.v[e]);
  }
};

}  // namespace
}  // namespace sbm
