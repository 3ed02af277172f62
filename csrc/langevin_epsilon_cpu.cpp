#include "langevin_epsilon.h"

#include <math.h>

#include <algorithm>
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

// Working memory, kept between calls: a sampler's loop allocates nothing after its first step.
template <class S>
struct Scratch {
  std::vector<SquareSums<S>> partial;
  std::vector<S> score, noise, coupled;
};

// ‖s‖ and ‖z‖ of every sample.
template <class S>
void find_norms(const StepArgs<S>& args, S* keep_noise, Scratch<S>& m) {
  const Tiling tiling(args.batch, args.numel);
  const int64_t tiles = tiling.per_sample;
  m.partial.resize(size_t(args.batch * tiles));
  SquareSums<S>* const partial = m.partial.data();
  tiling.each([&](const Tile& tile) {
    squares(args, tile, partial + tile.sample * tiles + tile.first / kTile,
            keep_noise ? keep_noise + tile.sample * args.numel + tile.first : nullptr);
  });
  m.score.resize(size_t(args.batch));
  m.noise.resize(size_t(args.batch));
  S *const score = m.score.data(), *const noise = m.noise.data();
  for (int64_t b = 0; b < args.batch; ++b) {
    const SquareSums<S> sum = tree_sum(partial + b * tiles, tiles);
    score[b] = sum.score, noise[b] = sum.noise;
  }
  for (int64_t b = 0; b < args.batch; ++b) score[b] = sqrt(score[b]), noise[b] = sqrt(noise[b]);
}

// Mean over the samples that stand at a row which couples them; `all`: every one does.
template <class S>
S coupled_mean(const StepArgs<S>& args, bool all, const std::vector<S>& norms,
               std::vector<S>& room) {
  if (all) {
    room = norms;
  } else {
    room.clear();
    for (int64_t b = 0; b < args.batch; ++b)
      if (args.norm_of(b) == kBatchMean) room.push_back(norms[size_t(b)]);
  }
  const size_t count = room.size();
  return count == 0 ? S(0) : tree_sum(room.data(), int64_t(count)) / S(count);
}

}  // namespace

template <class S>
void langevin_epsilon_cpu(const StepArgs<S>& args, S* epsilon, S* keep_noise) {
  static thread_local Scratch<S> scratch;
  Scratch<S>& m = scratch;  // the workers must not name their own thread's
  find_norms(args, keep_noise, m);
  const bool all = args.distinct() == 1 && args.norm_of(0) == kBatchMean;
  const S mean_score = coupled_mean(args, all, m.score, m.coupled);
  const S mean_noise = coupled_mean(args, all, m.noise, m.coupled);

  const RowLayout layout{args.registers};
  const S *const score = m.score.data(), *const noise = m.noise.data();
  const int64_t count = all ? 1 : args.batch;
  for (int64_t b = 0; b < count; ++b) {
    const int norm = args.norm_of(b);
    if (norm == kNoNorm) {
      epsilon[b] = S(0);
      continue;
    }
    const S scale = args.coef[args.row_of(b) * 2 * layout.lanes() + layout.step_scale()];
    if (norm == kBatchMean) {
      epsilon[b] = langevin_epsilon(scale, mean_noise, mean_score);
    } else {
      const S own = norm == kSqrtD ? S(sqrt(S(args.numel))) : noise[b];
      epsilon[b] = langevin_epsilon(scale, own, score[b]);
    }
  }
  if (all) std::fill_n(epsilon + 1, args.batch - 1, epsilon[0]);
}

template void langevin_epsilon_cpu(const StepArgs<float>&, float*, float*);
template void langevin_epsilon_cpu(const StepArgs<double>&, double*, double*);

}  // namespace sbm
