// Plain C++: any processor.
#include "gaussian.h"
#include "kernels_cpu.h"

namespace sbm {
namespace {

// `groups` Philox calls for each of `samples` keys: out[(s·groups + g)·4 + k].
template <class P, NoiseKind kind>
void fill_groups(const uint64_t* keys, int64_t samples, uint64_t first_group, int64_t groups,
                 uint32_t draw, uint32_t stream, float* out) {
  for (int64_t i = 0; i < samples * groups; ++i) {
    const Words n =
        sample_words(keys[i / groups], first_group + uint64_t(i % groups), draw, stream);
    float* z = out + 4 * i;
    if constexpr (kind == NoiseKind::normal) {
      box_muller<P>(n.w[0], n.w[1], z[0], z[1]);
      box_muller<P>(n.w[2], n.w[3], z[2], z[3]);
    } else {
      for (int k = 0; k < 4; ++k) {
        if constexpr (kind == NoiseKind::uniform) z[k] = uniform<P>(n.w[k]);
        if constexpr (kind == NoiseKind::rademacher) z[k] = rademacher<P>(n.w[k]);
        if constexpr (kind == NoiseKind::words) z[k] = P::from_bits(int32_t(n.w[k]));
      }
    }
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
