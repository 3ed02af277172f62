#include "kernels_cuda.h"
#include "launch.cuh"
#include "norms.cuh"

namespace sbm {
namespace {

// Samples of so many tiles are stepped in one launch with their norms, a block each: always, and
// where there are enough of them to fill a GPU.
constexpr int64_t kAlwaysOneBlock = 4;

bool fits_one_block(int64_t batch, int64_t numel) {
  return numel <= kTile * (batch < kManySamples ? kAlwaysOneBlock : int64_t(kMostTiles));
}

template <class S>
bool uses_dense(const StepArgs<S>& a) {
  return sizeof(S) == sizeof(float) && all_dense(a);
}

// Whether norms and step of every sample are one launch: samples stand alone and fit. Registers in
// layouts of their own would cost that kernel too many of the processor's.
template <class S>
bool is_one_launch(const StepArgs<S>& a, bool coupled) {
  return !coupled && fits_one_block(a.batch, a.numel) && (a.registers == 0 || uses_dense(a));
}

// What a multiprocessor of Turing has room for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostBlocks = 1024 / kThreads;
#else
constexpr int kMostBlocks = 5;
#endif

// Blocks that a multiprocessor should hold: as many as the registers of each kernel allow.
template <class S, class Io, bool kExtras>
constexpr int kBlocks = sizeof(S) > sizeof(float) ? 1
                        : !Io::kOneOrigin         ? 2
                        : kExtras                 ? 3
                                                  : kMostBlocks;

template <class S, class Io, bool kSlots, bool kNorms, bool kExtras>
__global__ __launch_bounds__(kThreads, (kBlocks<S, Io, kExtras>)) void step(
    const __grid_constant__ StepArgs<S> a, const Cover cover) {
  SBM_DYNAMIC_SHARED(Parked<S>, parked);
  const Place place = cover.place();
  RowStep<S, Io, kSlots, kNorms, kExtras> row(a, place.sample, place.inside,
                                              parked + cover.own_place());
  if (!row.live()) return;
  row.prepare(place.first * kTile,
              kNorms && a.epsilon ? a.epsilon[place.sample] : not_a_number<S>());
  if (place.first == 0 && place.lane == 0) row.write_label();
  for (int k = 0; k < place.count; ++k) {
    const Spot at = cover.spot<Io::kOneOrigin>(place, k);
    if (at.count > 0) row.run(at, nullptr);
  }
}

// Norms and step of a sample in one block; z is made once and kept on chip.
template <class S, class Io>
__global__ __launch_bounds__(kThreads, (kBlocks<S, Io, true>)) void step_with_norms(
    const __grid_constant__ StepArgs<S> a, const Cover cover) {
  SBM_DYNAMIC_SHARED(NormScratch<S>, scratch);
  Piece<float>* const kept = reinterpret_cast<Piece<float>*>(scratch + 1);
  const Place place = cover.place();
  {
    RowSquares<S, Io> row(a, place.sample, place.inside);
    const SquareSums<S> sums = block_squares(row, cover, place, kept, *scratch);
    if (place.lane == 0 && place.inside) {
      const S epsilon = row.epsilon(sums.score, sums.noise, false);
      scratch->epsilon[threadIdx.x >> cover.shift] = epsilon;
      a.epsilon[place.sample] = epsilon;
    }
  }
  __syncthreads();
  RowStep<S, Io, Io::kOneOrigin, true, true> row(a, place.sample, place.inside,
                                                 scratch->parked + cover.own_place());
  if (!row.live()) return;
  row.prepare(0, scratch->epsilon[threadIdx.x >> cover.shift]);
  if (place.lane == 0) row.write_label();
  for (int k = 0; k < place.count; ++k) {
    const Spot at = cover.spot<Io::kOneOrigin>(place, k);
    if (at.count > 0) row.run(at, kept + k * kThreads + threadIdx.x);
  }
}

template <class S>
cudaError_t run_step_with_norms(const StepArgs<S>& args, cudaStream_t stream) {
  const Cover cover(args.batch, args.numel, 0);
  auto kernel = step_with_norms<S, AnyIo>;
  if constexpr (sizeof(S) == sizeof(float))
    if (uses_dense(args)) kernel = step_with_norms<S, DenseIo>;
  const size_t kept = args.noise.given() ? 0 : size_t(cover.tiles) * kTile * sizeof(float);
  return launch(kernel, cover.grid(), dim3(kThreads), sizeof(NormScratch<S>) + kept, stream, args,
                cover);
}

template <class S>
cudaError_t run_step(const StepArgs<S>& args, cudaStream_t stream) {
  Cover cover(args.batch, args.numel);
  auto kernel = step<S, AnyIo, true, true, true>;
  if constexpr (sizeof(S) == sizeof(float)) {
    const bool dense = uses_dense(args), plain = is_plain(args);
    if (dense)
      kernel = plain           ? step<S, DenseIo, false, false, false>
               : !args.epsilon ? step<S, DenseIo, true, false, true>
                               : step<S, DenseIo, true, true, true>;
    else if (plain)
      kernel = step<S, AnyIo, false, false, false>;
  }
  cover.follow(args.network.given() ? args.network : args.x);
  return launch(kernel, cover.grid(), dim3(kThreads), cover.places() * sizeof(Parked<S>), stream,
                args, cover);
}

}  // namespace

template <class S>
bool needs_workspace(const StepArgs<S>& args, bool coupled) {
  return args.epsilon && !is_one_launch(args, coupled);
}

template <class S>
cudaError_t affine_step_cuda(const StepArgs<S>& args, S* workspace, bool coupled,
                             cudaStream_t stream) {
  if (args.batch == 0 || args.numel == 0) return cudaSuccess;
  if (args.epsilon && is_one_launch(args, coupled)) return run_step_with_norms(args, stream);
  if (args.epsilon) {
    const auto error = langevin_epsilon_cuda(args, args.epsilon, workspace, coupled, stream);
    if (error != cudaSuccess) return error;
  }
  return run_step(args, stream);
}

template bool needs_workspace(const StepArgs<float>&, bool);
template bool needs_workspace(const StepArgs<double>&, bool);
template cudaError_t affine_step_cuda(const StepArgs<float>&, float*, bool, cudaStream_t);
template cudaError_t affine_step_cuda(const StepArgs<double>&, double*, bool, cudaStream_t);

}  // namespace sbm
