// Cutting a batch into tiles. The cut depends on the sample's size only, never on threads.
#pragma once
#include "kernels_cpu.h"
#include "parallel.h"

namespace sbm {

struct Tiling {
  int64_t batch, numel;
  int64_t per_sample;  // tiles of a sample, when a sample is larger than a tile
  int64_t together;    // samples of a tile, when a tile holds whole samples

  Tiling(int64_t batch, int64_t numel)
      : batch(batch), numel(numel), per_sample((numel + kTile - 1) / kTile), together(1) {
    const int64_t padded = (numel + 3) / 4 * 4;  // noise comes in fours
    if (padded > 0 && padded <= kTile / 2) together = kTile / padded;
  }

  int64_t count() const {
    return numel == 0 ? 0 : together > 1 ? (batch + together - 1) / together : batch * per_sample;
  }

  Tile operator[](int64_t i) const {
    if (together > 1) {
      const int64_t first = i * together, left = batch - first;
      return {first, left < together ? left : together, 0, numel};
    }
    const int64_t start = i % per_sample * kTile, left = numel - start;
    return {i / per_sample, 1, start, left < kTile ? left : kTile};
  }

  // Tiles that are worth a thread: about eight thousand elements, ten microseconds of noise.
  // `passes`: how many times as much each element takes.
  int64_t grain(int64_t passes) const {
    const int64_t size = together > 1 ? together * numel : (numel < kTile ? numel : kTile);
    return 1 + (8 * kTile - 1) / (passes * size + 1);
  }

  template <class Body>
  void each(const Body& body, int64_t passes = 1) const {
    parallel(count(), grain(passes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body((*this)[i]);
    });
  }
};

// Sum of neighbours, then of neighbouring sums, …: a tree that depends on `count` only. The numbers
// are overwritten.
template <class S>
S tree_sum(S* v, int64_t count) {
  if (count == 0) return S();
  while (count > 1) {
    const int64_t pairs = count / 2, left = count % 2;
    SBM_IVDEP
    for (int64_t i = 0; i < pairs; ++i) v[i] = v[2 * i] + v[2 * i + 1];
    if (left) v[pairs] = v[count - 1];
    count = pairs + left;
  }
  return v[0];
}

}  // namespace sbm
