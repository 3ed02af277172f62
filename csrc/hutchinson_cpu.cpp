#include "hutchinson.h"

#include <algorithm>
#include <vector>

#include "row.h"
#include "tiles.h"

namespace sbm {
namespace {

void trace(const HutchinsonArgs& args, const Tile& tile, float* sums, int64_t step) {
  cpu_kernels().trace_f32(args, tile, sums, step);
}
void trace(const HutchinsonArgs& args, const Tile& tile, double* sums, int64_t step) {
  cpu_kernels().trace_f64(args, tile, sums, step);
}

}  // namespace

template <class A>
void hutchinson_cpu(const HutchinsonArgs& args, A* divergence) {
  static thread_local std::vector<A> kept;
  const Tiling tiling(args.batch, args.numel);
  const int64_t tiles = tiling.per_sample, sums = args.probes * args.batch;
  if (args.numel == 0) {
    std::fill_n(divergence, sums, A(0));
    return;
  }
  // Where a tile holds a sample, its sum waits in the result's own place.
  A* partial = divergence;
  if (tiles > 1) {
    kept.resize(size_t(sums * tiles));
    partial = kept.data();
  }
  const auto drift = cpu_kernels().drift[args.x.dtype == DType::f64];
  tiling.each(
      [&](const Tile& tile) {
        drift(args, tile);
        trace(args, tile, partial + tile.sample * tiles + tile.first / kTile, args.batch * tiles);
      },
      1 + args.probes);

  for (int64_t b = 0; b < args.batch; ++b) {
    const double scale = args.coefficient(b, 2);
    const double trivial = args.coefficient(b, 0) * double(args.numel);
    for (int64_t i = b; i < sums; i += args.batch) {
      const A sum = tree_sum(partial + i * tiles, tiles);
      divergence[i] = A(fused(scale, double(sum), trivial));
    }
  }
}

template void hutchinson_cpu(const HutchinsonArgs&, float*);
template void hutchinson_cpu(const HutchinsonArgs&, double*);

}  // namespace sbm
