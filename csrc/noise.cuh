// Noise in a GPU's thread.
#pragma once
#include "noise_values.h"

namespace sbm {
namespace {

// As ScalarPack, to the bit, with less work for the slow pipe that converts numbers.
struct CudaPack : ScalarPack {
  // |f| < 2²² here: 1.5·2²³ + f has its last bit at 1, so the addition rounds as rintf does.
  SBM_HD I nearest(F f) { return I(uint32_t(bits(f + 0x1.8p23f)) - uint32_t(bits(0x1.8p23f))); }
  SBM_HD F to_float(I i) { return from_bits(addi(i, bits(0x1.8p23f))) - 0x1.8p23f; }
  // 0 or between 2⁻²⁴ and 2⁶ here. In between sqrtf is exactly this, behind a branch.
  SBM_HD F sqrt(F a) {
#if defined(__CUDA_ARCH__)
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaxf(a, 0x1p-64f)));
    const float root = a * r;
    return fmaf(fmaf(-root, root, a), 0.5f * r, root);
#else
    return sqrtf(a);
#endif
  }
};

}  // namespace
}  // namespace sbm
