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

// Calls run(the view's data as its own element type). A state, and what is kept with it, is of
// type S: then nothing is asked.
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

// Elements i … i+3 (i a multiple of 4) of dense samples whose pieces are aligned.
struct DenseIo {
  template <class S>
  static __device__ __forceinline__ Quad<S> read(const TensorView& v, int64_t sample, int64_t i,
                                                 int) {
    Quad<S> q;
    with_type(v, [&](const auto* data) {
      using T = std::remove_const_t<std::remove_reference_t<decltype(*data)>>;
      q = read_piece<T, S>(data + (sample * v.sample_stride + i));
    });
    return q;
  }
  template <class S>
  static __device__ __forceinline__ void write(const TensorView& v, int64_t sample, int64_t i, int,
                                               const Quad<S>& q) {
    with_type(v, [&](auto* data) { write_piece(data + (sample * v.sample_stride + i), q); });
  }
  // The state and its registers.
  template <class S>
  static __device__ __forceinline__ Quad<S> read_state(const TensorView& v, int64_t sample,
                                                       int64_t i, int) {
    return read_piece<S, S>(static_cast<const S*>(v.data) + (sample * v.sample_stride + i));
  }
  template <class S>
  static __device__ __forceinline__ void write_state(const TensorView& v, int64_t sample,
                                                     int64_t i, int, const Quad<S>& q) {
    write_piece(static_cast<S*>(v.data) + (sample * v.sample_stride + i), q);
  }
};

__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) != 0) return a / b;
  return int64_t(uint32_t(a) / uint32_t(b));  // several times faster
}

// A sample's elements in logical order, from number i on.
class Walk {
 public:
  __device__ Walk(const TensorView& v, int64_t sample, int64_t i)
      : v_(v), base_(sample * v.sample_stride), i_(i) {
    seek();
  }
  __device__ int64_t offset() const { return offset_; }
  __device__ void next() {
    ++i_;
    offset_ += v_.stride[v_.dims - 1];
    if (--left_ == 0) seek();
  }

 private:
  __device__ void seek() {
    offset_ = base_, left_ = 1;
    int64_t rest = i_;
    for (int d = v_.dims - 1; d >= 0; --d) {
      const int64_t size = v_.size[d], outer = d > 0 ? divide(rest, size) : 0;
      const int64_t index = rest - outer * size;
      offset_ += index * v_.stride[d];
      if (d == v_.dims - 1) left_ = size - index;
      rest = outer;
    }
  }

  const TensorView& v_;
  const int64_t base_;
  int64_t i_, offset_, left_;
};

// Any tensor; `count` of the four elements exist.
struct AnyIo {
  template <class S>
  static __device__ __forceinline__ Quad<S> read(const TensorView& v, int64_t sample, int64_t i,
                                                 int count) {
    Quad<S> q = {};
    with_type(v, [&](const auto* data) {
      using T = std::remove_const_t<std::remove_reference_t<decltype(*data)>>;
      const T* const from = data + (sample * v.sample_stride + i);
      if (whole(v, from, count)) {
        q = read_piece<T, S>(from);
        return;
      }
      Walk walk(v, sample, i);
      SBM_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (e >= count) break;
        if (e > 0) walk.next();
        q.v[e] = S(widen(data[walk.offset()]));
      }
    });
    return q;
  }
  template <class S>
  static __device__ __forceinline__ void write(const TensorView& v, int64_t sample, int64_t i,
                                               int count, const Quad<S>& q) {
    with_type(v, [&](auto* data) {
      using T = std::remove_reference_t<decltype(*data)>;
      T* const to = data + (sample * v.sample_stride + i);
      if (whole(v, to, count)) return write_piece(to, q);
      Walk walk(v, sample, i);
      SBM_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (e >= count) break;
        if (e > 0) walk.next();
        data[walk.offset()] = narrow<T>(q.v[e]);
      }
    });
  }
  template <class S>
  static __device__ __forceinline__ Quad<S> read_state(const TensorView& v, int64_t sample,
                                                       int64_t i, int count) {
    return read<S>(v, sample, i, count);
  }
  template <class S>
  static __device__ __forceinline__ void write_state(const TensorView& v, int64_t sample,
                                                     int64_t i, int count, const Quad<S>& q) {
    write(v, sample, i, count, q);
  }

 private:
  template <class T>
  static __device__ __forceinline__ bool whole(const TensorView& v, const T* at, int count) {
    return count == 4 && v.dense() && reinterpret_cast<uintptr_t>(at) % alignof(Piece<T>) == 0;
  }
};

}  // namespace
}  // namespace sbm
