#include "langevin_epsilon.h"

#include <math.h>

#include <vector>

#include "tiles.h"

namespace sbm {
namespace {

void squares(const StepArgs<float>& args, const Tile& tile, SquareSums<float>* sums, float* z) {
  cpu_kernels().squares_f32(args, tile, sums, z);
}
void squares(const StepArgs<double>& args, const Tile& tile, SquareSums<double>* sums, double* z) {
  cpu_kernels().squares_f64(args, tile, sums, z);
}

template <class S>
S mean(const std::vector<S>& v) {
  return tree_sum<S>(int64_t(v.size()), [&](int64_t b) { return v[size_t(b)]; }) / S(v.size());
}

// Working memory, kept between calls: a sampler's loop allocates nothing after its first step.
template <class S>
struct Scratch {
  std::vector<SquareSums<S>> partial;
  std::vector<S> score, noise, batch_score, batch_noise;
};

}  // namespace

template <class S>
void langevin_epsilon_cpu(const StepArgs<S>& args, S* epsilon, S* keep_noise) {
  static thread_local Scratch<S> scratch;
  Scratch<S>& m = scratch;  // the workers below must not name their own thread's
  const Tiling tiling(args.batch, args.numel);
  m.partial.resize(size_t(args.batch * tiling.per_sample));
  tiling.each([&](const Tile& tile) {
    SquareSums<S>* sums = m.partial.data() + tile.sample * tiling.per_sample + tile.first / kTile;
    squares(args, tile, sums,
            keep_noise ? keep_noise + tile.sample * args.numel + tile.first : nullptr);
  });

  m.score.resize(size_t(args.batch));
  m.noise.resize(size_t(args.batch));
  m.batch_score.clear();
  m.batch_noise.clear();
  for (int64_t b = 0; b < args.batch; ++b) {
    const SquareSums<S>* own = m.partial.data() + b * tiling.per_sample;
    const auto score = [&](int64_t i) { return own[i].score; };
    const auto noise = [&](int64_t i) { return own[i].noise; };
    m.score[size_t(b)] = S(sqrt(tree_sum<S>(tiling.per_sample, score)));
    m.noise[size_t(b)] = S(sqrt(tree_sum<S>(tiling.per_sample, noise)));
    if (args.norm_of(b) != kBatchMean) continue;
    m.batch_score.push_back(m.score[size_t(b)]);
    m.batch_noise.push_back(m.noise[size_t(b)]);
  }
  const S mean_score = mean(m.batch_score), mean_noise = mean(m.batch_noise);

  const RowLayout layout{args.registers};
  for (int64_t b = 0; b < args.batch; ++b) {
    const int norm = args.norm_of(b);
    epsilon[b] = S(0);
    if (norm == kNoNorm) continue;
    const S scale = args.coef[args.row_of(b) * 2 * layout.lanes() + layout.step_scale()];
    const S score = norm == kBatchMean ? mean_score : m.score[size_t(b)];
    const S noise = norm == kBatchMean ? mean_noise
                    : norm == kSqrtD   ? S(sqrt(S(args.numel)))
                                       : m.noise[size_t(b)];
    epsilon[b] = langevin_epsilon(scale, noise, score);
  }
}

template void langevin_epsilon_cpu(const StepArgs<float>&, float*, float*);
template void langevin_epsilon_cpu(const StepArgs<double>&, double*, double*);

}  // namespace sbm
