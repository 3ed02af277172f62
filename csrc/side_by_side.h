// Several vectors as one pack of lanes.
//
// A formula of many operations, each waiting for the one before, fills a processor's queue with
// operations that wait. Over this pack every operation is done for all vectors before the next one,
// so the queue holds what can begin.
#pragma once
#include "philox.h"

namespace sbm {

template <class P, int kVectors>
struct SideBySide {
  struct F {
    typename P::F v[kVectors];
  };
  struct I {
    typename P::I v[kVectors];
  };
  struct U {
    typename P::U v[kVectors];
  };

  template <class V, class One>
  SBM_HD V each(const One& one) {
    V r;
    SBM_UNROLL
    for (int i = 0; i < kVectors; ++i) r.v[i] = one(i);
    return r;
  }
  SBM_HD F set(float v) {
    return each<F>([&](int) { return P::set(v); });
  }
  SBM_HD I seti(int32_t v) {
    return each<I>([&](int) { return P::seti(v); });
  }
  SBM_HD F from_words(const U& w) {
    return each<F>([&](int i) { return P::from_words(w.v[i]); });
  }
  SBM_HD F fma(const F& a, const F& b, const F& c) {
    return each<F>([&](int i) { return P::fma(a.v[i], b.v[i], c.v[i]); });
  }
  SBM_HD F mul(const F& a, const F& b) {
    return each<F>([&](int i) { return P::mul(a.v[i], b.v[i]); });
  }
  SBM_HD F sub(const F& a, const F& b) {
    return each<F>([&](int i) { return P::sub(a.v[i], b.v[i]); });
  }
  SBM_HD F sqrt(const F& a) {
    return each<F>([&](int i) { return P::sqrt(a.v[i]); });
  }
  SBM_HD F from_bits(const I& a) {
    return each<F>([&](int i) { return P::from_bits(a.v[i]); });
  }
  SBM_HD I bits(const F& a) {
    return each<I>([&](int i) { return P::bits(a.v[i]); });
  }
  SBM_HD I addi(const I& a, const I& b) {
    return each<I>([&](int i) { return P::addi(a.v[i], b.v[i]); });
  }
  SBM_HD I band(const I& a, const I& b) {
    return each<I>([&](int i) { return P::band(a.v[i], b.v[i]); });
  }
  template <int N>
  SBM_HD I shift_right(const I& a) {
    return each<I>([&](int i) { return P::template shift_right<N>(a.v[i]); });
  }
  template <int N>
  SBM_HD I shift_left(const I& a) {
    return each<I>([&](int i) { return P::template shift_left<N>(a.v[i]); });
  }
  SBM_HD F to_float(const I& a) {
    return each<F>([&](int i) { return P::to_float(a.v[i]); });
  }
  SBM_HD I nearest(const F& a) {
    return each<I>([&](int i) { return P::nearest(a.v[i]); });
  }
  SBM_HD F if_odd(const I& k, const F& odd, const F& even) {
    return each<F>([&](int i) { return P::if_odd(k.v[i], odd.v[i], even.v[i]); });
  }
  SBM_HD F flip(const F& v, const I& k) {
    return each<F>([&](int i) { return P::flip(v.v[i], k.v[i]); });
  }
};

}  // namespace sbm
