#include "winograd.h"

#include "kernels_cpu.h"
#include "parallel.h"

namespace sbm {
namespace {

// Tiles are shared out among the threads, at least this many elements to one.
constexpr int64_t kGrain = 16384;

template <class Args>
void over_tiles(const Args& a, void (*run)(const Args&, int64_t begin, int64_t end)) {
  if (a.channels == 0) return;
  const int64_t of_tile = (a.side + 2) * (a.side + 2) * a.channels;
  parallel(a.count, 1 + kGrain / of_tile, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

}  // namespace

void winograd_input_cpu(const WinogradInputArgs& args) {
  over_tiles(args, cpu_kernels().winograd.input[args.side == 4]);
}

void winograd_output_cpu(const WinogradOutputArgs& args) {
  over_tiles(args, cpu_kernels().winograd.output[args.side == 4]);
}

}  // namespace sbm
