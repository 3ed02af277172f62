#include "noise.h"

#include "tile_io.h"
#include "tiles.h"

namespace sbm {

void noise_cpu(const TensorView& out, int64_t batch, int64_t numel, const uint64_t* keys,
               uint32_t draw, uint32_t stream, NoiseKind kind) {
  const auto fill = cpu_kernels().fill[int(kind)];
  Tiling(batch, numel).each([&](const Tile& tile) {
    alignas(64) float buffer[kTile + kSlack];
    fill(keys, tile, draw, stream, buffer);
    const int64_t n = tile.samples * tile.count;
    if (in_place<float>(out, tile))
      memcpy(target<float>(out, tile, nullptr), buffer, size_t(n) * sizeof(float));
    else
      store(out, tile, buffer, 1.0f);
  });
}

}  // namespace sbm
