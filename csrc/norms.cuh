// Norms of score and noise on a GPU: the fixed tree of langevin_epsilon.h.
#pragma once
#include "cover.cuh"
#include "langevin_epsilon.h"
#include "row_step.cuh"

namespace sbm {
namespace {

constexpr int kMostTiles = 16;  // of a block that sums squares
constexpr unsigned kWarp = 0xffffffffu;

// A block's shared memory while it sums squares.
template <class S>
struct NormScratch {
  union {
    Piece<S> upper[2][kThreads / 2];
    Parked<S> parked[kThreads];  // after the sums
  };
  S tile[2][kMostTiles];
  S epsilon[kThreads];
  uint32_t counts[kThreads / 32];
  uint32_t last;
};

template <class S>
__device__ __forceinline__ S square_root(S v) {
  if constexpr (sizeof(S) == sizeof(float))
    return sqrtf(v);
  else
    return ::sqrt(v);
}

// A norm row at four elements.
template <class S, class Io>
class RowSquares : public SampleRow<S, Io, true> {
 public:
  __device__ __forceinline__ RowSquares(const StepArgs<S>& a, int64_t sample, bool inside)
      : SampleRow<S, Io, true>(a, a.registers, sample, inside) {}

  // Where the row has a norm.
  __device__ __forceinline__ void prepare(int64_t origin) {
    this->prepare_state(origin);
    this->prepare_network(origin);
    key_ = this->noise_key();
    p_ = this->part(this->layout_.score_x());
    q_ = this->part(this->layout_.score_f());
    measures_noise_ = number(kNorm) != kSqrtD;
  }

  // z is left in `keep` where that is given and z is made here.
  __device__ __forceinline__ void run(const Spot& at, Quad<S>& score, Quad<S>& noise,
                                      Piece<float>* keep) const {
    const Quad<S> x = this->state(at);
    const Quad<S> f = this->network(at);
    Quad<S> z = all(S(0));
    if (a_.noise.given()) {
      if (measures_noise_) z = this->given_noise(at);
    } else if (measures_noise_ || keep) {
      const Quad<float> made = this->normals(key_, at);
      if (keep) *keep = {{made.v[0], made.v[1], made.v[2], made.v[3]}};
      if (measures_noise_) z = this->as_state(made);
    }
    const Quad<S> s = form(p_, x, q_, f);
    SBM_UNROLL
    for (int e = 0; e < 4; ++e) {
      score.v[e] = e < at.count ? s.v[e] * s.v[e] : S(0);
      noise.v[e] = e < at.count ? z.v[e] * z.v[e] : S(0);
    }
  }

  // ε from the squared norms.
  __device__ __forceinline__ S epsilon(S score, S noise, bool coupled) const {
    const int norm = this->norm();
    if (norm == kNoNorm) return S(0);
    if (norm == kBatchMean && !coupled) return not_a_number<S>();
    return from_norms(square_root(score),
                      norm == kSqrtD ? square_root(S(a_.numel)) : square_root(noise));
  }
  __device__ __forceinline__ S from_norms(S score, S noise) const {
    return langevin_epsilon(this->high(this->layout_.step_scale()), noise, score);
  }

 private:
  using Base = SampleRow<S, Io, true>;
  using Base::a_;
  using Base::b_;
  using Base::number;

  Split<S> p_ = {S(0), S(0)}, q_ = {S(0), S(0)};
  NoiseKey key_ = {};
  bool measures_noise_ = false;
};

// Sums over the 2^shift threads that share a sample, by halves of the tile; the first of these
// threads gets the result in v[0]. All threads of the block take part.
template <class S>
__device__ __forceinline__ void tile_sums(Quad<S>& score, Quad<S>& noise, int shift,
                                          NormScratch<S>& scratch) {
  const int threads = 1 << shift, group = int(threadIdx.x) >> shift;
  const int lane = int(threadIdx.x) & (threads - 1);
  int half = threads / 2;
  for (; half >= 32; half /= 2) {
    const int at = group * half + (lane & (half - 1));
    __syncthreads();  // the last readers are done
    if (lane >= half && lane < 2 * half) {
      SBM_UNROLL
      for (int e = 0; e < 4; ++e) {
        scratch.upper[0][at].v[e] = score.v[e];
        scratch.upper[1][at].v[e] = noise.v[e];
      }
    }
    __syncthreads();
    if (lane < half) {
      SBM_UNROLL
      for (int e = 0; e < 4; ++e) {
        score.v[e] += scratch.upper[0][at].v[e];
        noise.v[e] += scratch.upper[1][at].v[e];
      }
    }
  }
  if (lane - int(threadIdx.x) % 32 > 0) return;  // only the first warp has something left to add
  for (; half > 0; half /= 2) {
    SBM_UNROLL
    for (int e = 0; e < 4; ++e) {
      score.v[e] += __shfl_down_sync(kWarp, score.v[e], unsigned(half));
      noise.v[e] += __shfl_down_sync(kWarp, noise.v[e], unsigned(half));
    }
  }
  for (Quad<S>* q : {&score, &noise}) q->v[0] = (q->v[0] + q->v[2]) + (q->v[1] + q->v[3]);
}

// The neighbour tree over few values, in place; by one thread.
template <class S>
__device__ __forceinline__ S neighbour_sum(S* v, int count) {
  for (; count > 1; count = (count + 1) / 2) {
    for (int i = 0; i < count / 2; ++i) v[i] = v[2 * i] + v[2 * i + 1];
    if (count % 2) v[count / 2] = v[count - 1];
  }
  return v[0];
}

// Σ s² and Σ z² over a block's tiles, for the first of the threads that share a sample. All threads
// of the block take part. z is kept where `keep` is given, at tile·kThreads + thread.
template <class S, class Io>
__device__ __forceinline__ SquareSums<S> block_squares(RowSquares<S, Io>& row, const Cover& cover,
                                                       const Place& place, Piece<float>* keep,
                                                       NormScratch<S>& scratch) {
  const bool here = row.norm() != kNoNorm;
  if (here) row.prepare(place.first * kTile);
  // A block that serves one sample passes over it as one.
  const int count = cover.shift < 8 || here ? place.count : 0;
  SquareSums<S> sums = {S(0), S(0)};
  for (int k = 0; k < count; ++k) {
    const Spot at = cover.spot<Io::kOneOrigin>(place, k);
    Quad<S> score = all(S(0)), noise = all(S(0));
    if (here && at.count > 0)
      row.run(at, score, noise, keep ? keep + k * kThreads + threadIdx.x : nullptr);
    tile_sums(score, noise, cover.shift, scratch);
    sums = {score.v[0], noise.v[0]};
    if (count > 1 && threadIdx.x == 0) {
      scratch.tile[0][k] = sums.score;
      scratch.tile[1][k] = sums.noise;
    }
  }
  if (count > 1 && threadIdx.x == 0)
    sums = {neighbour_sum(scratch.tile[0], count), neighbour_sum(scratch.tile[1], count)};
  return sums;
}

}  // namespace
}  // namespace sbm
