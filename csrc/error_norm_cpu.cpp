#include "error_norm.h"

#include <math.h>

#include <vector>

#include "tiles.h"

namespace sbm {
namespace {

void squares(const ErrorNormArgs<float>& args, const Tile& tile, float* sums) {
  cpu_kernels().error_squares_f32(args, tile, sums);
}
void squares(const ErrorNormArgs<double>& args, const Tile& tile, double* sums) {
  cpu_kernels().error_squares_f64(args, tile, sums);
}

}  // namespace

template <class S>
void error_norm_cpu(const ErrorNormArgs<S>& args, S* out) {
  static thread_local std::vector<S> kept;
  const Tiling tiling(args.batch, args.numel);
  const int64_t tiles = tiling.per_sample;
  S* partial = out;
  if (tiles > 1) {
    kept.resize(size_t(args.batch * tiles));
    partial = kept.data();
  }
  tiling.each(
      [&](const Tile& tile) {
        squares(args, tile, partial + tile.sample * tiles + tile.first / kTile);
      },
      args.stages);

  for (int64_t b = 0; b < args.batch; ++b) {
    if (args.numel == 0) {
      out[b] = S(0);
      continue;
    }
    const S sum = tree_sum(partial + b * tiles, tiles);
    out[b] = S(sqrt(sum / S(args.numel)));
  }
}

template void error_norm_cpu(const ErrorNormArgs<float>&, float*);
template void error_norm_cpu(const ErrorNormArgs<double>&, double*);

}  // namespace sbm
