// Drift and divergence of a tile, see hutchinson.h. Included by kernels_cpu_impl.h only.
#pragma once
#include "tile_sum.h"

namespace sbm {
namespace {

// How many samples of the tile, from s on, share the coefficients of drift.
inline int64_t alike(const HutchinsonArgs& a, const Tile& t, int64_t s) {
  const int64_t b = t.sample + s;
  int64_t count = 1;
  while (s + count < t.samples && a.coefficient(b + count, 0) == a.coefficient(b, 0) &&
         a.coefficient(b + count, 1) == a.coefficient(b, 1))
    ++count;
  return count;
}

template <class S>
void drift(const HutchinsonArgs& a, const Tile& t) {
  Buffer<S> state, network, written;
  prefetch(a.x, t);
  prefetch(a.network, t);
  const S* const x = read(a.x, t, state.v);
  const S* const f = read(a.network, t, network.v);
  S* const out = target(a.drift, t, written.v);
  for (int64_t s = 0; s < t.samples;) {
    const int64_t together = alike(a, t, s), at = s * t.count;
    const Split<S> p = split<S>(a.coefficient(t.sample + s, 0));
    const Split<S> q = split<S>(a.coefficient(t.sample + s, 1));
    Terms<S> terms;
    terms.add(f + at, q.hi, q.lo);
    terms.add(x + at, p.hi, p.lo);
    sum_terms(terms, out + at, together * t.count);
    s += together;
  }
  commit(a.drift, t, out);
}

// Σ v·product. A sign changes no rounding, so it meets the product as it lies in memory.
template <NoiseKind kind, class A, class T>
A dot(const float* v, const T* product, int64_t n) {
  return tile_sum<A>(n, [&](int64_t i) {
    if constexpr (kind == NoiseKind::rademacher)
      return A(v[i] * widen(product[i]));
    else
      return A(v[i]) * A(widen(product[i]));
  });
}

template <NoiseKind kind, class A>
void dots(const TensorView& product, const Tile& t, const float* v, A* sums) {
  Buffer<A> gathered;
  if (!product.dense()) {
    read(product, t, gathered.v);
    for (int64_t s = 0; s < t.samples; ++s)
      sums[s] = dot<kind, A>(v + s * t.count, gathered.v + s * t.count, t.count);
    return;
  }
  with_type(product, [&](const auto* data) {
    for (int64_t s = 0; s < t.samples; ++s)
      sums[s] = dot<kind, A>(v + s * t.count,
                             data + (t.sample + s) * product.sample_stride + t.first, t.count);
  });
}

// Σ v_k·product_k over every sample of the tile; a probe's sums lie `step` behind the one's before.
template <class P, class A>
void trace(const HutchinsonArgs& a, const Tile& t, A* sums, int64_t step) {
  Buffer<float> probe;
  TensorView product = a.product;
  for (int64_t k = 0; k < a.probes; ++k) {
    prefetch(product, t);
    const uint32_t draw = a.draw + uint32_t(k);
    if (a.probe == NoiseKind::rademacher) {
      fill_tile<P, NoiseKind::rademacher>(a.keys, t, draw, a.stream, probe.v);
      dots<NoiseKind::rademacher>(product, t, probe.v, sums + k * step);
    } else {
      fill_tile<P, NoiseKind::normal>(a.keys, t, draw, a.stream, probe.v);
      dots<NoiseKind::normal>(product, t, probe.v, sums + k * step);
    }
    product.data = static_cast<char*>(product.data) + a.product_step;
  }
}

}  // namespace
}  // namespace sbm
