// Plain C++: any processor.
#include "noise_values.h"

namespace sbm {
namespace {

// `groups` Philox calls for each of `samples` keys: out[(s·groups + g)·4 + k].
template <class P, NoiseKind kind>
void fill_groups(const uint64_t* keys, int64_t samples, uint64_t first_group, int64_t groups,
                 uint32_t draw, uint32_t stream, float* out) {
  for (int64_t i = 0; i < samples * groups; ++i) {
    const Words n =
        sample_words(keys[i / groups], first_group + uint64_t(i % groups), draw, stream);
    noise_values<P, kind>(n.w, out + 4 * i);
  }
}

}  // namespace
}  // namespace sbm

#include "kernels_cpu_impl.h"

namespace sbm {

const CpuKernels& portable_kernels() {
  static const CpuKernels kernels = make_kernels<ScalarPack>("portable");
  return kernels;
}

}  // namespace sbm
