#include "cover.cuh"
#include "kernels_cuda.h"
#include "launch.cuh"
#include "noise.cuh"
#include "view_io.cuh"

namespace sbm {
namespace {

template <NoiseKind kind>
__global__ __launch_bounds__(kThreads, 3) void fill(const __grid_constant__ TensorView out,
                                                    const Cover cover, const uint64_t* keys,
                                                    uint32_t draw, uint32_t stream) {
  const Place place = cover.place();
  if (!place.inside) return;
  const uint64_t key = keys[place.sample];
  for (int k = 0; k < place.count; ++k) {
    const Spot at = cover.spot<false>(place, k);
    if (at.count == 0) return;
    const Words words = sample_words(key, uint64_t(at.first()) / kGroup, draw, stream);
    Quad<float> q;
    noise_values<CudaPack, kind>(words.w, q.v);
    AnyIo::write<true>(out, AnyIo::cursor(out, place.sample, 0), at, q);
  }
}

__global__ __launch_bounds__(kThreads) void keys(uint64_t* out, int64_t count, uint64_t seed,
                                                 uint64_t first) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b < count) out[b] = sample_key(seed, first + uint64_t(b));
}

}  // namespace

cudaError_t noise_cuda(const TensorView& out, int64_t batch, int64_t numel, const uint64_t* keys,
                       uint32_t draw, uint32_t noise_stream, NoiseKind kind, cudaStream_t stream) {
  if (batch == 0 || numel == 0) return cudaSuccess;
  static constexpr decltype(&fill<NoiseKind::normal>) kFills[] = {
      fill<NoiseKind::normal>, fill<NoiseKind::uniform>, fill<NoiseKind::rademacher>,
      fill<NoiseKind::words>};
  Cover cover(batch, numel);
  cover.follow(out);
  return launch(kFills[int(kind)], cover.grid(), dim3(kThreads), 0, stream, out, cover, keys, draw,
                noise_stream);
}

cudaError_t keys_cuda(uint64_t* out, int64_t count, uint64_t seed, uint64_t first,
                      cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 grid(unsigned((count + kThreads - 1) / kThreads));
  return launch(keys, grid, dim3(kThreads), 0, stream, out, count, seed, first);
}

}  // namespace sbm
