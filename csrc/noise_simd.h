// Filling buffers with noise, one vector of Philox counters at a time.
// Included once per instruction set, inside that set's own translation unit.
#pragma once
#include "noise_values.h"
#include "side_by_side.h"

namespace sbm {
namespace {

template <class P>
struct Lanes {
  typename P::U w[4];
};

// Round keys of one key (the same for all lanes of a vector).
template <class P>
struct SharedKeys {
  uint64_t lo[kPhiloxRounds], hi[kPhiloxRounds];

  void set(uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      lo[round] = k0, hi[round] = k1;
      k0 += kPhiloxW0, k1 += kPhiloxW1;
    }
  }
  typename P::W low(int round) const { return P::setw(lo[round]); }
  typename P::W high(int round) const { return P::setw(hi[round]); }
};

// Round keys of as many keys as there are lanes.
template <class P>
struct LaneKeys {
  typename P::W lo[kPhiloxRounds], hi[kPhiloxRounds];

  void set(typename P::W key) {
    typename P::W k0 = key, k1 = P::high(key);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      lo[round] = k0, hi[round] = k1;
      k0 = P::addw(k0, P::setw(kPhiloxW0)), k1 = P::addw(k1, P::setw(kPhiloxW1));
    }
  }
  typename P::W low(int round) const { return lo[round]; }
  typename P::W high(int round) const { return hi[round]; }
};

// Ten rounds on `kPairs` pairs of vectors of 64-bit lanes, side by side because one pair alone
// waits for its multiplications. c1 and c3 are only ever xor-ed, and a product reads only the low
// word of its factors, so the rubbish in the high words never matters.
template <class P, int kPairs, class Keys>
SBM_HD void philox_lanes(const typename P::W* counter, uint32_t draw, uint32_t stream,
                         const Keys* const* keys, Lanes<P>* out) {
  using W = typename P::W;
  constexpr int n = 2 * kPairs;
  W c0[n], c1[n], c2[n], c3[n];
  for (int v = 0; v < n; ++v) {
    c0[v] = counter[v], c1[v] = P::high(counter[v]);
    c2[v] = P::setw(draw), c3[v] = P::setw(stream);
  }
  SBM_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    SBM_UNROLL
    for (int v = 0; v < n; ++v) {
      const W p0 = P::mul_low(c0[v], P::setw(kPhiloxM0));
      const W p1 = P::mul_low(c2[v], P::setw(kPhiloxM1));
      c0[v] = P::xor3(P::high(p1), c1[v], keys[v]->low(round));
      c2[v] = P::xor3(P::high(p0), c3[v], keys[v]->high(round));
      c1[v] = p1;
      c3[v] = p0;
    }
  }
  for (int i = 0; i < kPairs; ++i) {
    out[i].w[0] = P::interleave(c0[2 * i], c0[2 * i + 1]);
    out[i].w[1] = P::interleave(c1[2 * i], c1[2 * i + 1]);
    out[i].w[2] = P::interleave(c2[2 * i], c2[2 * i + 1]);
    out[i].w[3] = P::interleave(c3[2 * i], c3[2 * i + 1]);
  }
}

// Which counter of a batch of kLanes sits in lane l. store4 writes, for each quarter-register q,
// lanes 4q+i of register i side by side; this order makes its output contiguous.
template <class P>
constexpr int counter(int lane) {
  return (P::kLanes / 4) * (lane % 4) + lane / 4;
}

// Its inverse.
template <class P>
constexpr int lane(int counter) {
  return 4 * (counter % (P::kLanes / 4)) + counter / (P::kLanes / 4);
}

// What is made of n blocks of Philox calls: normals of all of them side by side.
template <class P, NoiseKind kind, int n>
SBM_HD void store_noise(const Lanes<P>* words, float* const* out) {
  typename P::F z[n][4];
  if constexpr (kind == NoiseKind::normal) {
    using All = SideBySide<P, 2 * n>;
    typename All::U radius, angle;
    typename All::F cosine, sine;
    for (int i = 0; i < 2 * n; ++i) {
      radius.v[i] = words[i / 2].w[i % 2 * 2];
      angle.v[i] = words[i / 2].w[i % 2 * 2 + 1];
    }
    box_muller<All>(radius, angle, cosine, sine);
    for (int i = 0; i < 2 * n; ++i) {
      z[i / 2][i % 2 * 2] = cosine.v[i];
      z[i / 2][i % 2 * 2 + 1] = sine.v[i];
    }
  } else {
    for (int i = 0; i < n; ++i) noise_values<P, kind>(words[i].w, z[i]);
  }
  for (int i = 0; i < n; ++i) P::store4(out[i], z[i][0], z[i][1], z[i][2], z[i][3]);
}

// Blocks of kLanes consecutive groups of one sample, two blocks side by side. A sample's last block
// may reach into the next sample's place, which is written later, or past the end.
template <class P, NoiseKind kind>
void fill_blocks(const uint64_t* keys, int64_t samples, uint64_t first_group, int64_t groups,
                 uint32_t draw, uint32_t stream, float* out) {
  using W = typename P::W;
  uint64_t order[2][P::kLanes / 2];
  for (int l = 0; l < P::kLanes; ++l) order[l % 2][l / 2] = uint64_t(counter<P>(l));
  const W even = P::loadw(order[0]), odd = P::loadw(order[1]);
  SharedKeys<P> round_keys[2];
  int64_t held[2] = {-1, -1};  // whose round keys these are
  int64_t s = 0, g = 0;
  while (s < samples) {
    W c[4];
    float* to[2];
    int count = 0;
    for (; count < 2 && s < samples; ++count) {
      if (held[count] != s) round_keys[count].set(keys[s]), held[count] = s;
      const W base = P::setw(first_group + uint64_t(g));
      c[2 * count] = P::addw(even, base), c[2 * count + 1] = P::addw(odd, base);
      to[count] = out + 4 * (s * groups + g);
      if ((g += P::kLanes) >= groups) g = 0, ++s;
    }
    const SharedKeys<P>* const k[4] = {&round_keys[0], &round_keys[0], &round_keys[1],
                                       &round_keys[1]};
    Lanes<P> words[2];
    if (count == 2) {
      philox_lanes<P, 2>(c, draw, stream, k, words);
      store_noise<P, kind, 2>(words, to);
    } else {
      philox_lanes<P, 1>(c, draw, stream, k, words);
      store_noise<P, kind, 1>(words, to);
    }
  }
}

// Small samples share a vector: every lane has its own key.
template <class P, NoiseKind kind>
void fill_packed(const uint64_t* keys, int64_t samples, uint64_t first_group, int64_t groups,
                 uint32_t draw, uint32_t stream, float* out) {
  const int64_t total = samples * groups;
  int64_t s = 0, g = 0;
  for (int64_t first = 0; first < total; first += P::kLanes) {
    uint64_t start[2][P::kLanes / 2], key[2][P::kLanes / 2];
    for (int i = 0; i < P::kLanes; ++i) {
      const int l = lane<P>(i);
      start[l % 2][l / 2] = first_group + uint64_t(g);
      key[l % 2][l / 2] = keys[s];
      if (first + i + 1 >= total) continue;  // a lane past the end repeats the last one
      if (++g == groups) g = 0, ++s;
    }
    const typename P::W c[2] = {P::loadw(start[0]), P::loadw(start[1])};
    LaneKeys<P> even, odd;
    even.set(P::loadw(key[0]));
    odd.set(P::loadw(key[1]));
    const LaneKeys<P>* const round_keys[2] = {&even, &odd};
    Lanes<P> words;
    philox_lanes<P, 1>(c, draw, stream, round_keys, &words);
    float* const to = out + 4 * first;
    store_noise<P, kind, 1>(&words, &to);
  }
}

// `groups` Philox calls for each of `samples` keys: out[(s·groups + g)·4 + k]. Writes whole
// vectors, up to kSlack floats past the end.
template <class P, NoiseKind kind>
void fill_groups(const uint64_t* keys, int64_t samples, uint64_t first_group, int64_t groups,
                 uint32_t draw, uint32_t stream, float* out) {
  const bool whole = samples == 1 || groups % P::kLanes == 0;
  const auto fill = whole ? fill_blocks<P, kind> : fill_packed<P, kind>;
  fill(keys, samples, first_group, groups, draw, stream, out);
}

}  // namespace
}  // namespace sbm
