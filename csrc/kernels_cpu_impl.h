// The tile kernels, written once and compiled once per instruction set: each including file sets
// its own flags and instantiates make_kernels<Pack>. Everything is in an unnamed namespace, so that
// the linker can't merge the copies of different instruction sets. fill_groups comes from the
// including file.
#pragma once
#include <string.h>

#include <type_traits>

#include "kernels_cpu.h"
#include "tile_error_norm.h"
#include "tile_group_norm_product.h"
#include "tile_hutchinson.h"
#include "tile_winograd.h"

namespace sbm {
namespace {

// Infinities and NaNs are the values whose exponent bits are all ones: an integer maximum finds
// them at the speed of memory.
template <class S>
bool any_non_finite(const S* v, int64_t n) {
  using Bits = std::conditional_t<sizeof(S) == sizeof(float), uint32_t, uint64_t>;
  constexpr Bits kMagnitude = Bits(-1) >> 1;
  constexpr Bits kInfinity = sizeof(S) == sizeof(float) ? Bits(0x7f800000u) : Bits(0x7ffull << 52);
  Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    memcpy(&bits, v + i, sizeof bits);
    bits &= kMagnitude;
    largest = bits > largest ? bits : largest;
  }
  return largest >= kInfinity;
}

// One row at one tile: the row's numbers and the tile's buffers.
template <class P, class S>
class TileStep {
 public:
  TileStep(const StepArgs<S>& args, const Tile& tile)
      : a_(args),
        t_(tile),
        layout_{args.registers},
        row_(args.row[tile.sample * args.row_stride]),
        hi_(args.coef + int64_t(row_) * 2 * layout_.lanes()),
        lo_(hi_ + layout_.lanes()),
        field_(args.field + int64_t(row_) * kFields),
        n_(tile.samples * tile.count) {}

  // Network output after guidance, or null when the row does not read it.
  const S* network() {
    if (!a_.network.given()) return nullptr;
    const S* f = read(a_.network, t_, network_.v);
    if (!a_.uncond.given()) return f;
    const S* u = read(a_.uncond, t_, uncond_.v);
    const S w = guidance_weight(hi_[layout_.guidance()], a_.guidance[t_.sample]);
    SBM_IVDEP
    for (int64_t i = 0; i < n_; ++i) network_.v[i] = guided(f[i], u[i], w);
    return network_.v;
  }

  // z; made in `keep` where that is given and whole vectors fit the tile's samples.
  const S* noise(S* keep = nullptr) {
    if (a_.noise.given()) return read(a_.noise, t_, noise_.v);
    const uint32_t stream = uint32_t(field_[kStream]), draw = uint32_t(field_[kDraw]);
    if constexpr (sizeof(S) == sizeof(float)) {
      S* const z = keep && t_.count % kSlack == 0 ? keep : noise_.v;
      fill_tile<P, NoiseKind::normal>(a_.keys, t_, draw, stream, z);
      return z;
    } else {
      fill_tile<P, NoiseKind::normal>(a_.keys, t_, draw, stream, narrow_.v);
      for (int64_t i = 0; i < n_; ++i) noise_.v[i] = narrow_.v[i];
      return noise_.v;
    }
  }

  const S* state() { return read(a_.x, t_, state_.v); }

  void run() {
    const bool langevin = field_[kNorm] != kNoNorm;
    const bool uses_f = langevin || reads(kNetwork) || reads(kDenoised);
    fetch();
    const S* z = langevin || reads(kNoise) ? noise() : nullptr;
    const S* x = state();
    const S* f = uses_f ? network() : nullptr;
    if (f) note_bad(f);
    const S* d = reads(kDenoised) ? denoised(x, f) : nullptr;
    const S* source[kMaxSources] = {x, f, d, z};
    for (int k = 0; k < a_.registers; ++k)
      if (reads(kRegister0 + k)) source[kRegister0 + k] = read(a_.slots[k], t_, registers_[k].v);

    const int slot = field_[kSlot];
    if (slot >= 0) sum_terms(terms(source, layout_.write()), written_.v, n_);
    S* out = target(a_.x, t_, state_.v);
    sum_terms(langevin ? langevin_terms(source) : terms(source, 0), out, n_);
    commit(a_.x, t_, out);
    if (slot >= 0) store(a_.slots[slot], t_, written_.v, S(1));
    next_input(out);
  }

  // Lets the tile's inputs arrive from memory while its noise is made.
  void fetch() const {
    prefetch(a_.x, t_);
    prefetch(a_.network, t_);
    prefetch(a_.uncond, t_);
  }

  // The score s = p_s·x + q_s·F.
  const S* score() {
    Terms<S> t;
    t.add(network(), hi_[layout_.score_f()], lo_[layout_.score_f()]);
    t.add(state(), hi_[layout_.score_x()], lo_[layout_.score_x()]);
    sum_terms(t, written_.v, n_);
    return written_.v;
  }

 private:
  bool reads(int source) const {
    const bool to_slot = field_[kSlot] >= 0 && hi_[layout_.write() + source] != S(0);
    return hi_[source] != S(0) || to_slot;
  }

  Terms<S> terms(const S* const* source, int first) const {
    Terms<S> t;
    for (int k = kNetwork; k < layout_.sources(); ++k)
      t.add(source[k], hi_[first + k], lo_[first + k]);
    t.add(source[kState], hi_[first], lo_[first]);
    return t;
  }

  // x + ε·s + √(2ε)·z on top of the row, folded in float64 and split again.
  Terms<S> langevin_terms(const S* const* source) const {
    const double eps = double(a_.epsilon[t_.sample]);
    double c[kMaxSources];
    for (int k = 0; k < layout_.sources(); ++k) c[k] = double(hi_[k]) + double(lo_[k]);
    const int px = layout_.score_x(), pf = layout_.score_f();
    c[kState] += eps * (double(hi_[px]) + double(lo_[px]));
    c[kNetwork] += eps * (double(hi_[pf]) + double(lo_[pf]));
    c[kNoise] += ::sqrt(2.0 * eps);
    Terms<S> t;
    for (int i = 1; i <= layout_.sources(); ++i) {
      const int k = i % layout_.sources();  // the state last
      const Split<S> part = split<S>(c[k]);
      t.add(source[k], part.hi, part.lo);
    }
    return t;
  }

  const S* denoised(const S* x, const S* f) {
    Terms<S> t;
    t.add(f, hi_[layout_.denoise_f()], lo_[layout_.denoise_f()]);
    t.add(x, hi_[layout_.denoise_x()], lo_[layout_.denoise_x()]);
    sum_terms(t, denoised_.v, n_);
    const S limit = hi_[layout_.limit()];
    for (int64_t i = 0; i < n_; ++i) denoised_.v[i] = clamp_keep_nan(denoised_.v[i], limit);
    return denoised_.v;
  }

  void note_bad(const S* f) {
    if (!a_.first_bad || !any_non_finite(f, n_)) return;
    for (int64_t s = 0; s < t_.samples; ++s) {
      int32_t* bad = a_.first_bad + t_.sample + s;
      if (any_non_finite(f + s * t_.count, t_.count) && __atomic_load_n(bad, __ATOMIC_RELAXED) < 0)
        __atomic_store_n(bad, int32_t(row_), __ATOMIC_RELAXED);
    }
  }

  void next_input(const S* x) {
    const S scale = hi_[layout_.next_scale()];
    if (scale != S(0) && a_.net_input.given()) store(a_.net_input, t_, x, scale);
  }

  const StepArgs<S>& a_;
  const Tile t_;
  const RowLayout layout_;
  const int64_t row_;
  const S *hi_, *lo_;
  const int32_t* field_;
  const int64_t n_;
  Buffer<S> state_, network_, uncond_, noise_, denoised_, written_, registers_[kMaxRegisters];
  Buffer<float> narrow_;
};

template <class T>
bool all_same(const T* v, int64_t count) {
  int others = 0;
  for (int64_t i = 1; i < count; ++i) others |= v[i] != v[0];
  return !others;
}

// Whether samples [first, first + count) can be treated as one long sample.
template <class S>
bool alike(const StepArgs<S>& a, int64_t first, int64_t count) {
  for (int64_t b = first + 1; a.row_stride != 0 && b < first + count; ++b)
    if (a.row[b * a.row_stride] != a.row[first * a.row_stride]) return false;
  return (!a.epsilon || all_same(a.epsilon + first, count)) &&
         (!a.guidance || all_same(a.guidance + first, count));
}

template <class P, class S>
void step(const StepArgs<S>& args, const Tile& tile) {
  if (tile.samples > 1 && !alike(args, tile.sample, tile.samples)) {
    for (int64_t s = 0; s < tile.samples; ++s)
      step<P, S>(args, {tile.sample + s, 1, tile.first, tile.count});
    return;
  }
  if (args.row_of(tile.sample) >= 0) TileStep<P, S>(args, tile).run();
}

// Rows without a norm give zeros.
template <class P, class S>
void squares(const StepArgs<S>& args, const Tile& tile, SquareSums<S>* sums, S* keep_noise) {
  if (tile.samples > 1 && !alike(args, tile.sample, tile.samples)) {
    for (int64_t s = 0; s < tile.samples; ++s)
      squares<P, S>(args, {tile.sample + s, 1, tile.first, tile.count}, sums + s,
                    keep_noise ? keep_noise + s * tile.count : nullptr);
    return;
  }
  for (int64_t s = 0; s < tile.samples; ++s) sums[s] = {S(0), S(0)};
  const int norm = args.norm_of(tile.sample);
  if (norm == kNoNorm) return;
  TileStep<P, S> step(args, tile);
  step.fetch();
  const bool needs_noise = norm != kSqrtD || keep_noise;
  const S* const z = needs_noise ? step.noise(keep_noise) : nullptr;
  const S* const score = step.score();
  for (int64_t s = 0; s < tile.samples; ++s) {
    sums[s].score = sum_squares(score + s * tile.count, tile.count);
    if (z) sums[s].noise = sum_squares(z + s * tile.count, tile.count);
  }
  if (keep_noise && z != keep_noise)
    memcpy(keep_noise, z, size_t(tile.samples * tile.count) * sizeof(S));
}

template <class P>
CpuKernels make_kernels(const char* level) {
  return {level,
          {fill_tile<P, NoiseKind::normal>, fill_tile<P, NoiseKind::uniform>,
           fill_tile<P, NoiseKind::rademacher>, fill_tile<P, NoiseKind::words>},
          step<P, float>,
          step<P, double>,
          squares<P, float>,
          squares<P, double>,
          {drift<float>, drift<double>},
          trace<P, float>,
          trace<P, double>,
          error_squares<float>,
          error_squares<double>,
          norm_kernel<float>(),
          norm_kernel<double>(),
          product_kernel<float>(),
          product_kernel<double>(),
          winograd_kernel()};
}

}  // namespace
}  // namespace sbm
