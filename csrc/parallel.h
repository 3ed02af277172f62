// Threads for the torch-free files: the bindings lend them torch's own pool.
#pragma once
#include <stdint.h>

namespace sbm {

using ParallelBody = void (*)(const void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, const void* context, ParallelBody body);

// One thread unless the bindings have put theirs here.
extern ParallelFor parallel_for_hook;

// How many threads there are, by the same rule.
using ThreadCount = int (*)();
extern ThreadCount thread_count_hook;
inline int thread_count() { return thread_count_hook(); }

// body(begin, end) over [0, count) in pieces of at least `grain`.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count == 0) return;
  if (count <= grain) return body(int64_t(0), count);
  parallel_for_hook(count, grain, &body, [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  });
}

}  // namespace sbm
