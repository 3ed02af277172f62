#include "affine_step.h"

#include "tiles.h"

namespace sbm {
namespace {

void run(const StepArgs<float>& args, const Tile& tile) { cpu_kernels().step_f32(args, tile); }
void run(const StepArgs<double>& args, const Tile& tile) { cpu_kernels().step_f64(args, tile); }

}  // namespace

template <class S>
void affine_step_cpu(const StepArgs<S>& args) {
  Tiling(args.batch, args.numel, true).each([&](const Tile& tile, int64_t) { run(args, tile); });
}

template void affine_step_cpu(const StepArgs<float>&);
template void affine_step_cpu(const StepArgs<double>&);

}  // namespace sbm
