// From Philox words to uniforms, signs and normals: one formula for every backend.
//
// The functions are templates over a "pack" P of lanes (one float on a GPU or in portable code,
// 8 or 16 in a vector register). Every operation is an IEEE one, with fused multiply-adds spelled
// out, so all packs give the same bits.
#pragma once
#include <math.h>
#include <string.h>

#include "philox.h"

namespace sbm {

struct ScalarPack {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  SBM_HD F set(float v) { return v; }
  SBM_HD I seti(int32_t v) { return v; }
  SBM_HD F from_words(U w) { return float(w); }
  SBM_HD I as_int(U w) { return I(w); }
  SBM_HD F fma(F a, F b, F c) { return fmaf(a, b, c); }
  SBM_HD F mul(F a, F b) { return a * b; }
  SBM_HD F sub(F a, F b) { return a - b; }
  SBM_HD F sqrt(F a) { return sqrtf(a); }
  SBM_HD F from_bits(I i) {
    F f;
    memcpy(&f, &i, sizeof f);
    return f;
  }
  SBM_HD I bits(F f) {
    I i;
    memcpy(&i, &f, sizeof i);
    return i;
  }
  SBM_HD I addi(I a, I b) { return I(uint32_t(a) + uint32_t(b)); }
  SBM_HD I band(I a, I b) { return a & b; }
  template <int N>
  SBM_HD I shift_right(I a) {
    return a >> N;
  }
  template <int N>
  SBM_HD I shift_left(I a) {
    return I(uint32_t(a) << N);
  }
  SBM_HD F to_float(I i) { return float(i); }
  SBM_HD I nearest(F f) { return I(rintf(f)); }
  SBM_HD F if_odd(I k, F odd, F even) { return k & 1 ? odd : even; }
  // −v where the top bit of k is set
  SBM_HD F flip(F v, I k) { return from_bits(bits(v) ^ (k & INT32_MIN)); }
};

// u(w) = fma(float32(w), 2⁻³², 2⁻³³), in (0, 1].
template <class P>
SBM_HD typename P::F uniform(typename P::U w) {
  return P::fma(P::from_words(w), P::set(0x1p-32f), P::set(0x1p-33f));
}

// ±1 by the word's top bit.
template <class P>
SBM_HD typename P::F rademacher(typename P::U w) {
  return P::flip(P::set(1.0f), P::as_int(w));
}

// −2 ln u for u in [2⁻³³, 1]: u = 2ᵉ·(1+f) with 1+f in [√½, √2), and a minimax fit of
// (ln(1+f) − f + f²/2)/f³ (relative error of the logarithm below 6e-9 before rounding), summed in
// pairs because a long chain of additions would be waited for. f is exact and e = 0 near u = 1, so
// the relative accuracy holds where ln u → 0. All constants carry the factor −2.
template <class P>
SBM_HD typename P::F minus_two_log(typename P::F u) {
  const auto shifted = P::addi(P::bits(u), P::seti(-0x3f3504f3));  // bits of √½
  const auto e = P::to_float(P::template shift_right<23>(shifted));
  const auto m = P::from_bits(P::addi(P::band(shifted, P::seti(0x007fffff)), P::seti(0x3f3504f3)));
  const auto f = P::sub(m, P::set(1.0f));
  const auto f2 = P::mul(f, f), f4 = P::mul(f2, f2);
  const auto c01 = P::fma(f, P::set(0.500016450881958f), P::set(-0.6666666269302368f));
  const auto c23 = P::fma(f, P::set(0.33246713876724243f), P::set(-0.40002453327178955f));
  const auto c45 = P::fma(f, P::set(0.263203889131546f), P::set(-0.28403523564338684f));
  const auto c67 = P::fma(f, P::set(0.15268859267234802f), P::set(-0.25523099303245544f));
  const auto low = P::fma(c23, f2, c01), high = P::fma(c67, f2, c45);
  auto y = P::fma(P::fma(high, f4, low), f, P::set(1.0f));
  // ln 2 = 0.693359375 − 2.12194440e-4: the first part times e is exact.
  y = P::fma(y, f2, P::mul(e, P::set(4.24388880e-4f)));
  return P::fma(e, P::set(-1.38671875f), P::fma(f, P::set(-2.0f), y));
}

// cos 2πu and sin 2πu: 4u = k + r with |r| ≤ ½ exactly, then minimax fits in r² of
// sin(πr/2)/r and (cos(πr/2) − 1)/r².
template <class P>
SBM_HD void cos_sin_turn(typename P::F u, typename P::F& c, typename P::F& s) {
  const auto turns = P::mul(u, P::set(4.0f));
  const auto k = P::nearest(turns);
  const auto r = P::sub(turns, P::to_float(k));
  const auto r2 = P::mul(r, r);
  auto sine = P::set(-0.00460165785625577f);
  sine = P::fma(sine, r2, P::set(0.07968003302812576f));
  sine = P::fma(sine, r2, P::set(-0.6459634900093079f));
  sine = P::fma(sine, r2, P::set(1.5707963705062866f));
  sine = P::mul(sine, r);
  auto cosine = P::set(0.0009040216100402176f);
  cosine = P::fma(cosine, r2, P::set(-0.02086028829216957f));
  cosine = P::fma(cosine, r2, P::set(0.25366923213005066f));
  cosine = P::fma(cosine, r2, P::set(-1.2337005138397217f));
  cosine = P::fma(cosine, r2, P::set(1.0f));
  // Quadrant k: (c, s), (−s, c), (−c, −s), (s, −c).
  const auto next = P::addi(k, P::seti(1));
  c = P::flip(P::if_odd(k, sine, cosine), P::template shift_left<30>(next));
  s = P::flip(P::if_odd(k, cosine, sine), P::template shift_left<30>(k));
}

// z0 = r cos 2πu(w_angle), z1 = r sin 2πu(w_angle), r = √(−2 ln u(w_radius)).
// Within 2e-6 of the float64 evaluation on the same float32 u.
template <class P>
SBM_HD void box_muller(typename P::U w_radius, typename P::U w_angle, typename P::F& z0,
                       typename P::F& z1) {
  const auto r = P::sqrt(minus_two_log<P>(uniform<P>(w_radius)));
  typename P::F c, s;
  cos_sin_turn<P>(uniform<P>(w_angle), c, s);
  z0 = P::mul(r, c);
  z1 = P::mul(r, s);
}

}  // namespace sbm
