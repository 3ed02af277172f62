#include "affine_step.h"

#include <algorithm>
#include <vector>

#include "langevin_epsilon.h"
#include "tiles.h"

namespace sbm {
namespace {

// Batches up to this many elements (1 MiB of float32) keep z between the norms and the step, in the
// cache; larger ones make it twice, which costs less than the memory.
constexpr int64_t kKeptNoise = 256 * 1024;

void run(const StepArgs<float>& args, const Tile& tile) { cpu_kernels().step_f32(args, tile); }
void run(const StepArgs<double>& args, const Tile& tile) { cpu_kernels().step_f64(args, tile); }

template <class S>
bool has_norm(const StepArgs<S>& args) {
  for (int64_t b = 0; b < args.distinct(); ++b)
    if (args.norm_of(b) != kNoNorm) return true;
  return false;
}

// ε of the rows that have a norm, and their z as explicit noise where it was worth keeping.
template <class S>
void find_epsilon(StepArgs<S>& args) {
  static thread_local std::vector<S> kept;
  const int64_t size = args.batch * args.numel;
  bool keep = !args.noise.given() && size <= kKeptNoise;
  // Other rows make their own z.
  for (int64_t b = 0; keep && b < args.distinct(); ++b) keep = args.norm_of(b) != kNoNorm;
  if (keep) kept.resize(size_t(size));
  langevin_epsilon_cpu(args, args.epsilon, keep ? kept.data() : nullptr);
  if (!keep) return;
  args.noise = TensorView{};
  args.noise.data = kept.data();
  args.noise.dtype = args.x.dtype;
  args.noise.sample_stride = args.noise.size[0] = args.numel;
  args.noise.stride[0] = args.noise.dims = 1;
}

// After all tiles: the network's output may be a view of its time.
template <class S>
void write_next_time(const StepArgs<S>& args) {
  const RowLayout layout{args.registers};
  const int64_t each = args.distinct(), count = each == 1 ? args.batch : 1;
  for (int64_t b = 0; b < each; ++b) {
    const int64_t row = args.row_of(b);
    if (row < 0) continue;
    const S* hi = args.coef + row * 2 * layout.lanes();
    if (hi[layout.next_scale()] != S(0))
      std::fill_n(args.net_time + b, count, hi[layout.next_label()]);
  }
}

}  // namespace

template <class S>
void affine_step_cpu(StepArgs<S> args) {
  if (has_norm(args))
    find_epsilon(args);
  else if (args.epsilon)
    std::fill_n(args.epsilon, args.batch, S(0));
  Tiling(args.batch, args.numel).each([&](const Tile& tile) { run(args, tile); });
  if (args.net_time) write_next_time(args);
}

template void affine_step_cpu(StepArgs<float>);
template void affine_step_cpu(StepArgs<double>);

}  // namespace sbm
