// How a grid covers [batch, numel]: the cut depends on sizes only, and no result on the cut.
#pragma once
#include <cuda_runtime.h>

#include "noise_kind.h"
#include "view_io.cuh"

namespace sbm {
namespace {

constexpr int kThreads = 256;                // of a block
constexpr int kGroup = 4;                    // elements of a thread: one Philox call
constexpr int64_t kEnoughBlocks = 132 * 32;  // four waves of an H200
constexpr int64_t kManySamples = 132 * 2;    // a block each keeps an H200 busy
static_assert(kThreads * kGroup == kTile, "a block works on one tile at a time");

// Where a block's threads find their work: tiles [first, first + count) of `sample`, of each the
// elements 4·lane … 4·lane+3.
struct Place {
  int64_t sample, first;
  int count, lane;
  uint32_t extent;  // elements from the first tile on, no more than the tiles hold
  bool inside;      // false behind the last sample
};

struct Cover {
  int64_t batch, numel, tiles;  // tiles of a sample
  int shift;                    // 2^shift threads share a sample; 8 where it fills blocks
  int per_block;                // tiles of a block
  uint32_t blocks;              // of a sample where it fills blocks
  // Tiles are visited channel by channel at each place where `channels` lie side by side in memory,
  // each `channel_tiles` tiles long, so that what one of them fetched serves the others.
  int64_t channels = 1, channel_tiles = 1;

  // most_per_block = 0: whole samples.
  Cover(int64_t batch, int64_t numel, int most_per_block = 8) : batch(batch), numel(numel) {
    tiles = numel > kTile ? (numel + kTile - 1) / kTile : 1;
    for (shift = 0; shift < 8 && (int64_t(kGroup) << shift) < numel; ++shift) {
    }
    per_block = 1;
    while (per_block < most_per_block && per_block < tiles &&
           batch * tiles >= 2 * per_block * kEnoughBlocks)
      per_block *= 2;
    if (most_per_block == 0) per_block = int(tiles);
    blocks = uint32_t((tiles + per_block - 1) / per_block);
  }

  dim3 grid() const {
    const int64_t together = kThreads >> shift;
    return dim3(unsigned(shift == 8 ? batch * blocks : (batch + together - 1) / together));
  }

  // Visits tiles in the order that suits a view whose innermost dimension is not its densest.
  void follow(const TensorView& v) {
    if (!v.given() || v.dims != 2 || v.stride[0] != 1 || v.size[1] % kTile != 0) return;
    channels = v.size[0], channel_tiles = v.size[1] / kTile;
  }

  // Places of a block in shared memory where each warp has one of its own for each of its samples.
  int places() const { return kThreads >> (shift < 5 ? shift : 5); }
  __device__ __forceinline__ int own_place() const {
    return int(threadIdx.x) >> (shift < 5 ? shift : 5);
  }

  __device__ Place place() const {
    const int thread = int(threadIdx.x);
    if (shift < 8) {
      const int64_t sample = (int64_t(blockIdx.x) << (8 - shift)) + (thread >> shift);
      return {sample, 0, 1, thread & ((1 << shift) - 1), uint32_t(numel), sample < batch};
    }
    const uint32_t sample = blockIdx.x / blocks, part = blockIdx.x - sample * blocks;
    const int64_t first = int64_t(part) * per_block, left = tiles - first;
    const int count = left < per_block ? int(left) : per_block;
    const int64_t exist = numel - first * kTile;
    const uint32_t extent = uint32_t(exist < count * kTile ? exist : count * kTile);
    return {int64_t(sample), first, count, thread, extent, true};
  }

  // A thread's elements in the k-th tile of its block. kOneOrigin: counted from the block's first
  // tile, for dense samples of whole groups.
  template <bool kOneOrigin>
  __device__ __forceinline__ Spot spot(const Place& place, int k) const {
    const uint32_t own = uint32_t(kGroup * place.lane);
    if constexpr (kOneOrigin) {
      const uint32_t local = uint32_t(k) * uint32_t(kTile) + own;
      return {place.first * kTile, local, local < place.extent ? kGroup : 0};
    }
    const int64_t turn = place.first + k;
    const int64_t origin = (channels == 1 ? turn : visited(turn)) * kTile;
    const int64_t left = numel - origin - own;
    return {origin, own, left >= kGroup ? kGroup : left > 0 ? int(left) : 0};
  }

 private:
  // The tile whose turn it is.
  __device__ int64_t visited(int64_t turn) const {
    const int64_t place = turn / channels;
    return (turn - place * channels) * channel_tiles + place;
  }
};

}  // namespace
}  // namespace sbm
