// Filling buffers with noise, one vector of Philox counters at a time.
// Included once per instruction set, inside that set's own translation unit.
#pragma once
#include "gaussian.h"
#include "kernels_cpu.h"

namespace sbm {
namespace {

template <class P>
struct Lanes {
  typename P::U w[4];
};

// Round keys, spread over 64-bit lanes.
template <class P>
struct RoundKeys {
  typename P::W lo[kPhiloxRounds], hi[kPhiloxRounds];

  RoundKeys(typename P::W key_lo, typename P::W key_hi) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
      lo[round] = key_lo, hi[round] = key_hi;
      key_lo = P::addw(key_lo, P::setw(kPhiloxW0));
      key_hi = P::addw(key_hi, P::setw(kPhiloxW1));
    }
  }
};

// Ten rounds on `kPairs` pairs of vectors of 64-bit lanes, side by side because one pair alone
// waits for its multiplications. c1 and c3 are only ever xor-ed, and a product reads only the low
// word of its factors, so the rubbish in the high words never matters.
template <class P, int kPairs>
SBM_HD void philox_lanes(const typename P::W* counter, uint32_t draw, uint32_t stream,
                         const RoundKeys<P>* const* keys, Lanes<P>* out) {
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
      c0[v] = P::xor3(P::high(p1), c1[v], keys[v]->lo[round]);
      c2[v] = P::xor3(P::high(p0), c3[v], keys[v]->hi[round]);
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

template <class P, NoiseKind kind>
SBM_HD void store_noise(const Lanes<P>& n, float* out) {
  typename P::F z[4];
  if constexpr (kind == NoiseKind::normal) {
    box_muller<P>(n.w[0], n.w[1], z[0], z[1]);
    box_muller<P>(n.w[2], n.w[3], z[2], z[3]);
  } else {
    for (int k = 0; k < 4; ++k) {
      if constexpr (kind == NoiseKind::uniform) z[k] = uniform<P>(n.w[k]);
      if constexpr (kind == NoiseKind::rademacher) z[k] = rademacher<P>(n.w[k]);
      if constexpr (kind == NoiseKind::words) z[k] = P::from_bits(P::as_int(n.w[k]));
    }
  }
  P::store4(out, z[0], z[1], z[2], z[3]);
}

// `groups` consecutive Philox calls of one key.
template <class P, NoiseKind kind>
void fill_sample(uint64_t key, uint64_t first_group, int64_t groups, uint32_t draw, uint32_t stream,
                 float* out) {
  using W = typename P::W;
  constexpr int kPairs = 2;
  uint64_t start[2 * kPairs][P::kLanes / 2];
  for (int i = 0; i < kPairs; ++i)
    for (int l = 0; l < P::kLanes; ++l)
      start[2 * i + l % 2][l / 2] = first_group + uint64_t(i * P::kLanes + counter<P>(l));
  W c[2 * kPairs];
  for (int v = 0; v < 2 * kPairs; ++v) c[v] = P::loadw(start[v]);
  const RoundKeys<P> round_keys(P::setw(key), P::setw(key >> 32));
  const RoundKeys<P>* const keys[2 * kPairs] = {&round_keys, &round_keys, &round_keys, &round_keys};
  const W step = P::setw(kPairs * P::kLanes);
  Lanes<P> noise[kPairs];
  int64_t g = 0;
  for (; g + P::kLanes < groups; g += kPairs * P::kLanes) {
    philox_lanes<P, kPairs>(c, draw, stream, keys, noise);
    for (int i = 0; i < kPairs; ++i) store_noise<P, kind>(noise[i], out + 4 * (g + i * P::kLanes));
    for (int v = 0; v < 2 * kPairs; ++v) c[v] = P::addw(c[v], step);
  }
  if (g >= groups) return;
  philox_lanes<P, 1>(c, draw, stream, keys, noise);
  store_noise<P, kind>(noise[0], out + 4 * g);
}

// `groups` Philox calls for each of `samples` keys: out[(s·groups + g)·4 + k]. Writes whole
// vectors, up to kSlack floats past the end.
template <class P, NoiseKind kind>
void fill_groups(const uint64_t* keys, int64_t samples, uint64_t first_group, int64_t groups,
                 uint32_t draw, uint32_t stream, float* out) {
  using W = typename P::W;
  if (samples == 1 || groups % P::kLanes == 0) {
    for (int64_t s = 0; s < samples; ++s)
      fill_sample<P, kind>(keys[s], first_group, groups, draw, stream, out + 4 * groups * s);
    return;
  }
  // Small samples share a vector: every lane has its own key.
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
    const W c[2] = {P::loadw(start[0]), P::loadw(start[1])};
    const RoundKeys<P> even(P::loadw(key[0]), P::high(P::loadw(key[0])));
    const RoundKeys<P> odd(P::loadw(key[1]), P::high(P::loadw(key[1])));
    const RoundKeys<P>* const round_keys[2] = {&even, &odd};
    Lanes<P> noise;
    philox_lanes<P, 1>(c, draw, stream, round_keys, &noise);
    store_noise<P, kind>(noise, out + 4 * first);
  }
}

}  // namespace
}  // namespace sbm
