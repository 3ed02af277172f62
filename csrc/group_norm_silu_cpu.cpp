#include "group_norm_silu.h"

#include <algorithm>
#include <vector>

#include "kernels_cpu.h"
#include "parallel.h"

namespace sbm {
namespace {

enum Kept { kPartials, kRows, kPartialsOfCall, kRowsOfCall };

// Room that is kept from call to call, from the beginning of a cache line.
template <Kept, class T>
T* kept(int64_t size) {
  struct alignas(64) Line {
    char bytes[64];
  };
  static thread_local std::vector<Line> memory;
  const size_t lines = size_t(size) * sizeof(T) / sizeof(Line) + 1;
  if (memory.size() < lines) memory.resize(lines);
  return reinterpret_cast<T*>(memory.data());
}

constexpr int64_t kGrain = 8192;  // elements that are worth a thread

// Both passes over all samples; `partials`: of a sample. Samples are shared out among the threads,
// or, where they are few, their pieces are; what is calculated is the same.
template <class S, class Args>
void run(const Args& a, const GroupNormPasses<Args, S>& kernel, const Pieces& pieces,
         int64_t partials) {
  using Room = GroupNormRoom<S>;
  const int64_t of_rows = Room::rows_size(pieces), count = pieces.count();
  const auto grain = [](int64_t elements) { return 1 + (kGrain - 1) / (elements + 1); };
  const auto own = [&] { return kept<kRows, S>(of_rows + Room::buffer_size(pieces)); };

  const int64_t threads = thread_count();
  if (a.batch % threads == 0 || a.batch > 4 * threads) {
    parallel(a.batch, grain(a.numel()), [&](int64_t begin, int64_t end) {
      double* const partial = kept<kPartials, double>(partials);
      S* const rows = own();
      const Room room(pieces, rows, rows + of_rows);
      for (int64_t b = begin; b < end; ++b) {
        kernel.begin(a, b, room);
        for (int64_t i = 0; i < count; ++i) kernel.reduce(a, b, pieces[i], room, partial);
        kernel.finish(a, b, pieces, partial, room);
        for (int64_t i = 0; i < count; ++i) kernel.apply(a, b, pieces[i], room);
      }
    });
    return;
  }

  double* const partial = kept<kPartialsOfCall, double>(a.batch * partials);
  S* const rows = kept<kRowsOfCall, S>(a.batch * of_rows);
  const auto room = [&](int64_t b) { return Room(pieces, rows + b * of_rows, own()); };
  const auto each_piece = [&](const auto& body) {
    parallel(a.batch * count, grain(pieces.most()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / count, pieces[i % count]);
    });
  };
  for (int64_t b = 0; b < a.batch; ++b) kernel.begin(a, b, room(b));
  each_piece(
      [&](int64_t b, const Piece& p) { kernel.reduce(a, b, p, room(b), partial + b * partials); });
  for (int64_t b = 0; b < a.batch; ++b)
    kernel.finish(a, b, pieces, partial + b * partials, room(b));
  each_piece([&](int64_t b, const Piece& p) { kernel.apply(a, b, p, room(b)); });
}

const GroupNormKernel<float>& norm_of(float) { return cpu_kernels().norm_f32; }
const GroupNormKernel<double>& norm_of(double) { return cpu_kernels().norm_f64; }
const GroupNormProductKernel<float>& product_of(float) { return cpu_kernels().norm_product_f32; }
const GroupNormProductKernel<double>& product_of(double) { return cpu_kernels().norm_product_f64; }

}  // namespace

template <class S>
void group_norm_silu_cpu(const GroupNormArgs<S>& args) {
  if (args.batch == 0 || args.numel() == 0) {
    std::fill_n(args.stats, 2 * args.batch * args.groups, S(0));
    return;
  }
  const Pieces pieces(args);
  run(args, norm_of(S()), pieces, 2 * pieces.parts() * args.groups);
}

template <class S>
void group_norm_silu_product_cpu(const GroupNormProductArgs<S>& args) {
  if (args.batch == 0 || args.numel() == 0) {
    if (args.sums) std::fill_n(args.sums, 2 * args.batch * args.channels, S(0));
    return;
  }
  const Pieces pieces(args);
  run(args, product_of(S()), pieces, 2 * pieces.slices() * args.channels);
}

template void group_norm_silu_cpu(const GroupNormArgs<float>&);
template void group_norm_silu_cpu(const GroupNormArgs<double>&);
template void group_norm_silu_product_cpu(const GroupNormProductArgs<float>&);
template void group_norm_silu_product_cpu(const GroupNormProductArgs<double>&);

}  // namespace sbm
