// The half-precision types: what they are worth in float, and back. On the bits, because not every
// compiler has the types; a GPU has the instructions.
#pragma once
#include <string.h>

#include <type_traits>

#include "philox.h"

namespace sbm {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

SBM_HD float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

SBM_HD uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

SBM_HD float widen(float v) { return v; }
SBM_HD double widen(double v) { return v; }
SBM_HD float widen(Bf16 v) { return float_of(uint32_t(v.bits) << 16); }

SBM_HD float widen(Half v) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = uint32_t(v.bits & 0x7fff) << 13;
  const uint32_t infinite = rest >= 0x0f800000u ? 0x7f800000u : 0u;  // keeps ∞ and NaN
  // Multiplying by 2¹¹² moves the exponent from half's bias to float's, subnormals included.
  return float_of(bits_of(float_of(rest) * 0x1p112f) | sign | infinite);
#endif
}

// Round to nearest even; a NaN stays one.
SBM_HD uint16_t bf16_bits(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t to;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to) : "f"(v));
  return to;
#else
  const uint32_t bits = bits_of(v);
  if (v != v) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

SBM_HD uint16_t half_bits(float v) {
#if defined(__CUDA_ARCH__)
  uint16_t to;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to) : "f"(v));
  return to;
#else
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to ∞
  if (magnitude < 0x38800000) {                                 // subnormal: let an add round it
    const uint32_t sum = bits_of(float_of(magnitude) + 0.5f);
    return uint16_t(sign | (sum - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return uint16_t(sign | ((rounded - 0x38000000) >> 13));
#endif
}

template <class T, class S>
SBM_HD T narrow(S v) {
  if constexpr (std::is_same_v<T, Bf16>)
    return {bf16_bits(float(v))};
  else if constexpr (std::is_same_v<T, Half>)
    return {half_bits(float(v))};
  else
    return T(v);
}

}  // namespace
}  // namespace sbm
