#include "kernels_cuda.h"
#include "launch.cuh"
#include "norms.cuh"

namespace sbm {
namespace {

// The caller's workspace: a ticket, the norms that are averaged, the sums of every block.
template <class S>
struct Workspace {
  uint32_t* ticket;
  S *norms, *sums;  // [2, batch] and [2, batch, blocks of a sample]

  __device__ Workspace(S* memory, int64_t batch)
      : ticket(reinterpret_cast<uint32_t*>(memory)), norms(memory + 4), sums(norms + 2 * batch) {}
};

// Other blocks, or other threads of this one, may have written it: not from this thread's cache.
template <class S>
__device__ __forceinline__ S fresh(const S* p) {
  return *static_cast<const volatile S*>(p);
}

// Neighbour trees over `rows` lines of `count` numbers, each left in its line's first number. All
// threads of the block take part.
template <class S>
__device__ void neighbour_sums(S* lines, int64_t rows, int64_t count, int64_t pitch) {
  constexpr int kWidth = 8;
  for (int64_t step = 1; step < count; step *= kWidth) {
    const int64_t left = (count + step - 1) / step, strips = (left + kWidth - 1) / kWidth;
    for (int64_t job = threadIdx.x; job < rows * strips; job += kThreads) {
      const int64_t first = job % strips * kWidth;
      S* const line = lines + job / strips * pitch;
      S v[kWidth];
      SBM_UNROLL
      for (int k = 0; k < kWidth; ++k)
        v[k] = first + k < left ? fresh(line + (first + k) * step) : S(0);
      SBM_UNROLL
      for (int width = 1; width < kWidth; width *= 2) {
        SBM_UNROLL
        for (int k = 0; k < kWidth; k += 2 * width)
          if (first + k + width < left) v[k] += v[k + width];
      }
      line[first * step] = v[0];
    }
    __syncthreads();
  }
}

// How many of the block's threads before this one say yes, and how many of all.
struct Votes {
  int before, all;
};
__device__ __forceinline__ Votes count_votes(bool yes, uint32_t* counts) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const uint32_t votes = __ballot_sync(kWarp, yes);
  __syncthreads();  // the last readers are done
  if (lane == 0) counts[warp] = uint32_t(__popc(votes));
  __syncthreads();
  Votes result = {__popc(votes & ((1u << lane) - 1)), 0};
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) result.before += int(counts[w]);
    result.all += int(counts[w]);
  }
  return result;
}

// ε of all samples from the sums of all blocks; by one block.
template <class S, class Io>
__device__ void finish(const StepArgs<S>& a, const Cover& cover, S* epsilon,
                       const Workspace<S>& memory, bool coupled, NormScratch<S>& scratch) {
  const int64_t batch = cover.batch, blocks = cover.blocks;
  neighbour_sums(memory.sums, 2 * batch, blocks, blocks);
  int64_t together = 0;  // samples whose norms are averaged, lined up in `norms`
  for (int64_t base = 0; base < batch; base += kThreads) {
    const int64_t b = base + threadIdx.x;
    const RowSquares<S, Io> row(a, b, b < batch);
    const bool averaged = coupled && row.norm() == kBatchMean;
    S score = S(0), noise = S(0);
    if (b < batch) {
      score = fresh(memory.sums + b * blocks);
      noise = fresh(memory.sums + (batch + b) * blocks);
      if (!averaged) epsilon[b] = row.epsilon(score, noise, coupled);
    }
    if (!coupled) continue;
    const Votes votes = count_votes(averaged, scratch.counts);
    if (averaged) {
      memory.norms[together + votes.before] = square_root(score);
      memory.norms[batch + together + votes.before] = square_root(noise);
    }
    together += votes.all;
  }
  if (together == 0) return;
  __syncthreads();
  neighbour_sums(memory.norms, 2, together, batch);
  const S score = fresh(memory.norms) / S(together);
  const S noise = fresh(memory.norms + batch) / S(together);
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    const RowSquares<S, Io> row(a, b, true);
    if (row.norm() == kBatchMean) epsilon[b] = row.from_norms(score, noise);
  }
}

// Every block sums its tiles; the last one to be done makes ε.
template <class S, class Io>
__global__ __launch_bounds__(kThreads, 1) void squares(const __grid_constant__ StepArgs<S> a,
                                                       const Cover cover, S* epsilon, S* workspace,
                                                       bool coupled) {
  SBM_DYNAMIC_SHARED(NormScratch<S>, scratch);
  const Place place = cover.place();
  RowSquares<S, Io> row(a, place.sample, place.inside);
  const SquareSums<S> sums = block_squares(row, cover, place, nullptr, *scratch);
  const bool first = place.inside && place.lane == 0;
  if (!coupled && cover.blocks == 1) {  // this block knows all about its samples
    if (first) epsilon[place.sample] = row.epsilon(sums.score, sums.noise, false);
    return;
  }
  const Workspace<S> memory(workspace, cover.batch);
  if (first) {
    const int64_t at = place.sample * cover.blocks + place.first / cover.per_block;
    memory.sums[at] = sums.score;
    memory.sums[cover.batch * cover.blocks + at] = sums.noise;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what the block wrote comes before its ticket
    scratch->last = atomicAdd(memory.ticket, 1u) == gridDim.x - 1;
    __threadfence();  // and what the others wrote before what follows
  }
  __syncthreads();
  if (!scratch->last) return;
  finish<S, Io>(a, cover, epsilon, memory, coupled, *scratch);
  if (threadIdx.x == 0) *memory.ticket = 0;  // for the next launch
}

}  // namespace

template <class S>
cudaError_t langevin_epsilon_cuda(const StepArgs<S>& args, S* epsilon, S* workspace, bool coupled,
                                  cudaStream_t stream) {
  if (args.batch == 0 || args.numel == 0) return cudaSuccess;
  const int64_t tiles = (args.numel + kTile - 1) / kTile;
  const bool whole = tiles <= kMostTiles && args.batch >= kManySamples;
  const Cover cover(args.batch, args.numel, whole ? 0 : kMostTiles);
  auto kernel = squares<S, AnyIo>;
  if constexpr (sizeof(S) == sizeof(float))
    if (all_dense(args)) kernel = squares<S, DenseIo>;
  return launch(kernel, cover.grid(), dim3(kThreads), sizeof(NormScratch<S>), stream, args, cover,
                epsilon, workspace, coupled);
}

template cudaError_t langevin_epsilon_cuda(const StepArgs<float>&, float*, float*, bool,
                                           cudaStream_t);
template cudaError_t langevin_epsilon_cuda(const StepArgs<double>&, double*, double*, bool,
                                           cudaStream_t);

}  // namespace sbm
