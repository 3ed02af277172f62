// The CPU kernels as a table of functions, one table an instruction set.
#pragma once
#include "error_norm.h"
#include "group_norm_silu.h"
#include "hutchinson.h"
#include "langevin_epsilon.h"
#include "noise_kind.h"
#include "winograd.h"

namespace sbm {

// Buffers are filled in whole vectors and may be written past the tile's end by this much.
constexpr int64_t kSlack = 64;

// Elements [first, first + count) of samples [sample, sample + samples). More than one sample
// only with first == 0 and count == numel.
struct Tile {
  int64_t sample, samples, first, count;
};

struct CpuKernels {
  const char* level;
  // Noise of a tile, by NoiseKind; `out` has room for kTile + kSlack floats.
  void (*fill[4])(const uint64_t* keys, const Tile& tile, uint32_t draw, uint32_t stream,
                  float* out);
  void (*step_f32)(const StepArgs<float>&, const Tile&);
  void (*step_f64)(const StepArgs<double>&, const Tile&);
  // One pair of sums for every sample of the tile; z itself too where keep_noise is given.
  void (*squares_f32)(const StepArgs<float>&, const Tile&, SquareSums<float>*, float* keep_noise);
  void (*squares_f64)(const StepArgs<double>&, const Tile&, SquareSums<double>*,
                      double* keep_noise);
  // The state is float32, float64.
  void (*drift[2])(const HutchinsonArgs&, const Tile&);
  // A sum for every sample of the tile, then `step` behind it those of the next probe.
  void (*trace_f32)(const HutchinsonArgs&, const Tile&, float* sums, int64_t step);
  void (*trace_f64)(const HutchinsonArgs&, const Tile&, double* sums, int64_t step);
  void (*error_squares_f32)(const ErrorNormArgs<float>&, const Tile&, float* sums);
  void (*error_squares_f64)(const ErrorNormArgs<double>&, const Tile&, double* sums);
  GroupNormKernel<float> norm_f32;
  GroupNormKernel<double> norm_f64;
  GroupNormProductKernel<float> norm_product_f32;
  GroupNormProductKernel<double> norm_product_f64;
  WinogradKernel winograd;
};

const CpuKernels& portable_kernels();
#if SBM_X86
const CpuKernels& avx2_kernels();
const CpuKernels& avx512_kernels();
#endif

// The best table that this processor runs; SBM_FAST_CPU=portable|avx2|avx512 asks for a lesser one.
const CpuKernels& cpu_kernels();

}  // namespace sbm
