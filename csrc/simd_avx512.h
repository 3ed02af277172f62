// Sixteen lanes (AVX-512 F, DQ, VL, BW). Only files compiled with those flags may include this.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header starts "undefined" vectors from themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "gaussian.h"

namespace sbm {

struct Avx512Pack {
  static constexpr int kLanes = 16;
  using F = __m512;
  using I = __m512i;
  using U = __m512i;
  SBM_HD F set(float v) { return _mm512_set1_ps(v); }
  SBM_HD I seti(int32_t v) { return _mm512_set1_epi32(v); }
  SBM_HD F from_words(U w) { return _mm512_cvtepu32_ps(w); }
  SBM_HD I as_int(U w) { return w; }
  SBM_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  SBM_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  SBM_HD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  SBM_HD F sqrt(F a) { return _mm512_sqrt_ps(a); }
  SBM_HD F from_bits(I i) { return _mm512_castsi512_ps(i); }
  SBM_HD I bits(F f) { return _mm512_castps_si512(f); }
  SBM_HD I addi(I a, I b) { return _mm512_add_epi32(a, b); }
  SBM_HD I band(I a, I b) { return _mm512_and_si512(a, b); }
  template <int N>
  SBM_HD I shift_right(I a) {
    return _mm512_srai_epi32(a, N);
  }
  template <int N>
  SBM_HD I shift_left(I a) {
    return _mm512_slli_epi32(a, N);
  }
  SBM_HD F to_float(I i) { return _mm512_cvtepi32_ps(i); }
  SBM_HD I nearest(F f) { return _mm512_cvtps_epi32(f); }
  SBM_HD F if_odd(I k, F odd, F even) {
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(k, seti(1)), even, odd);
  }
  SBM_HD F flip(F v, I k) {  // v ^ (k & top bit)
    return from_bits(_mm512_ternarylogic_epi32(bits(v), k, seti(INT32_MIN), 0x78));
  }

  // 64-bit lanes for Philox: only the low word of a lane counts, the high one may hold rubbish.
  using W = __m512i;
  SBM_HD W setw(uint64_t v) { return _mm512_set1_epi64(int64_t(v)); }
  SBM_HD W loadw(const uint64_t* p) { return _mm512_loadu_si512(p); }
  SBM_HD W mul_low(W a, W b) { return _mm512_mul_epu32(a, b); }
  SBM_HD W high(W a) { return _mm512_srli_epi64(a, 32); }
  SBM_HD W addw(W a, W b) { return _mm512_add_epi64(a, b); }
  SBM_HD W xor3(W a, W b, W c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  // Lanes a0 b0 a1 b1 …
  SBM_HD U interleave(W a, W b) {
    return _mm512_mask_blend_epi32(0xaaaa, a, _mm512_slli_epi64(b, 32));
  }

  SBM_HD void store(void* p, U v) { _mm512_storeu_si512(p, v); }
  // Element k of lane l goes to out[4·counter(l) + k], see counter() in noise_simd.h.
  SBM_HD void store4(float* out, F z0, F z1, F z2, F z3) {
    const F a = _mm512_unpacklo_ps(z0, z1), b = _mm512_unpackhi_ps(z0, z1);
    const F c = _mm512_unpacklo_ps(z2, z3), d = _mm512_unpackhi_ps(z2, z3);
    _mm512_storeu_ps(out, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_storeu_ps(out + 16, _mm512_shuffle_ps(a, c, 0xee));
    _mm512_storeu_ps(out + 32, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_storeu_ps(out + 48, _mm512_shuffle_ps(b, d, 0xee));
  }
};

}  // namespace sbm
