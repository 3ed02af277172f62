// Eight lanes (AVX2 + FMA). Only files compiled with those flags may include this.
#pragma once
#include <immintrin.h>

#include "gaussian.h"

namespace sbm {

struct Avx2Pack {
  static constexpr int kLanes = 8;
  using F = __m256;
  using I = __m256i;
  using U = __m256i;
  SBM_HD F set(float v) { return _mm256_set1_ps(v); }
  SBM_HD I seti(int32_t v) { return _mm256_set1_epi32(v); }
  // hi·2¹⁶ + lo with one rounding: AVX2 has no unsigned conversion.
  SBM_HD F from_words(U w) {
    const F hi = _mm256_cvtepi32_ps(_mm256_srli_epi32(w, 16));
    const F lo = _mm256_cvtepi32_ps(_mm256_and_si256(w, seti(0xffff)));
    return fma(hi, set(65536.0f), lo);
  }
  SBM_HD I as_int(U w) { return w; }
  SBM_HD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  SBM_HD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  SBM_HD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  SBM_HD F sqrt(F a) { return _mm256_sqrt_ps(a); }
  SBM_HD F from_bits(I i) { return _mm256_castsi256_ps(i); }
  SBM_HD I bits(F f) { return _mm256_castps_si256(f); }
  SBM_HD I addi(I a, I b) { return _mm256_add_epi32(a, b); }
  SBM_HD I band(I a, I b) { return _mm256_and_si256(a, b); }
  template <int N>
  SBM_HD I shift_right(I a) {
    return _mm256_srai_epi32(a, N);
  }
  template <int N>
  SBM_HD I shift_left(I a) {
    return _mm256_slli_epi32(a, N);
  }
  SBM_HD F to_float(I i) { return _mm256_cvtepi32_ps(i); }
  SBM_HD I nearest(F f) { return _mm256_cvtps_epi32(f); }
  SBM_HD F if_odd(I k, F odd, F even) {
    return _mm256_blendv_ps(even, odd, _mm256_castsi256_ps(_mm256_slli_epi32(k, 31)));
  }
  SBM_HD F flip(F v, I k) { return from_bits(_mm256_xor_si256(bits(v), band(k, seti(INT32_MIN)))); }

  // 64-bit lanes for Philox: only the low word of a lane counts, the high one may hold rubbish.
  using W = __m256i;
  SBM_HD W setw(uint64_t v) { return _mm256_set1_epi64x(int64_t(v)); }
  SBM_HD W loadw(const uint64_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  SBM_HD W mul_low(W a, W b) { return _mm256_mul_epu32(a, b); }
  SBM_HD W high(W a) { return _mm256_srli_epi64(a, 32); }
  SBM_HD W addw(W a, W b) { return _mm256_add_epi64(a, b); }
  SBM_HD W xor3(W a, W b, W c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
  // Lanes a0 b0 a1 b1 …
  SBM_HD U interleave(W a, W b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa); }

  SBM_HD void store(void* p, U v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  // Element k of lane l goes to out[4·counter(l) + k], see counter() in noise_simd.h.
  SBM_HD void store4(float* out, F z0, F z1, F z2, F z3) {
    const F a = _mm256_unpacklo_ps(z0, z1), b = _mm256_unpackhi_ps(z0, z1);
    const F c = _mm256_unpacklo_ps(z2, z3), d = _mm256_unpackhi_ps(z2, z3);
    _mm256_storeu_ps(out, _mm256_shuffle_ps(a, c, 0x44));
    _mm256_storeu_ps(out + 8, _mm256_shuffle_ps(a, c, 0xee));
    _mm256_storeu_ps(out + 16, _mm256_shuffle_ps(b, d, 0x44));
    _mm256_storeu_ps(out + 24, _mm256_shuffle_ps(b, d, 0xee));
  }
};

}  // namespace sbm
