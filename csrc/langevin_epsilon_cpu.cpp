#include "langevin_epsilon.h"

#include <math.h>

#include <vector>

#include "tiles.h"

namespace sbm {
namespace {

SquareSums<float> squares(const StepArgs<float>& args, const Tile& tile) {
  return cpu_kernels().squares_f32(args, tile);
}
SquareSums<double> squares(const StepArgs<double>& args, const Tile& tile) {
  return cpu_kernels().squares_f64(args, tile);
}

// Sum of neighbours, then of neighbouring sums, …: a tree that depends on `count` only.
template <class S, class Get>
S tree_sum(int64_t count, const Get& get) {
  S level[64];
  for (int64_t i = 0; i < count; ++i) {
    S carry = get(i);
    int k = 0;
    for (; i >> k & 1; ++k) carry = level[k] + carry;
    level[k] = carry;
  }
  bool any = false;
  S total = S(0);
  for (int k = 0; count >> k; ++k) {
    if (!(count >> k & 1)) continue;
    total = any ? level[k] + total : level[k];
    any = true;
  }
  return total;
}

template <class S>
S mean(const std::vector<S>& v) {
  return tree_sum<S>(int64_t(v.size()), [&](int64_t b) { return v[size_t(b)]; }) / S(v.size());
}

}  // namespace

template <class S>
void langevin_epsilon_cpu(const StepArgs<S>& args, S* epsilon) {
  const Tiling tiling(args.batch, args.numel, false);
  // Kept between calls: the loop of a sampler allocates nothing after its first step.
  static thread_local std::vector<SquareSums<S>> partial;
  static thread_local std::vector<S> score_norm, noise_norm;
  partial.resize(size_t(tiling.count()));
  score_norm.resize(size_t(args.batch));
  noise_norm.resize(size_t(args.batch));
  SquareSums<S>* const sums = partial.data();  // the workers must not name their own thread_local
  tiling.each([&](const Tile& tile, int64_t i) { sums[i] = squares(args, tile); });

  const RowLayout layout{args.registers};
  for (int64_t b = 0; b < args.batch; ++b) {
    const SquareSums<S>* own = sums + b * tiling.per_sample;
    const auto score = [&](int64_t i) { return own[i].score; };
    const auto noise = [&](int64_t i) { return own[i].noise; };
    score_norm[size_t(b)] = S(sqrt(tree_sum<S>(tiling.per_sample, score)));
    noise_norm[size_t(b)] = S(sqrt(tree_sum<S>(tiling.per_sample, noise)));
  }
  const S mean_score = mean(score_norm), mean_noise = mean(noise_norm);
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t row = args.row[b * args.row_stride];
    epsilon[b] = S(0);
    if (row < 0 || row >= args.rows) continue;
    const S scale = args.coef[row * 2 * layout.lanes() + layout.step_scale()];
    switch (args.field[row * kFields + kNorm]) {
      case kBatchMean:
        epsilon[b] = langevin_epsilon(scale, mean_noise, mean_score);
        break;
      case kPerSample:
        epsilon[b] = langevin_epsilon(scale, noise_norm[size_t(b)], score_norm[size_t(b)]);
        break;
      case kSqrtD:
        epsilon[b] = langevin_epsilon(scale, S(sqrt(S(args.numel))), score_norm[size_t(b)]);
        break;
    }
  }
}

template void langevin_epsilon_cpu(const StepArgs<float>&, float*);
template void langevin_epsilon_cpu(const StepArgs<double>&, double*);

}  // namespace sbm
