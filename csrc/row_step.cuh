// A row at four elements of a sample, in one GPU thread.
#pragma once
#include "affine_step.h"
#include "noise.cuh"
#include "view_io.cuh"

namespace sbm {
namespace {

// Whether DenseIo can read everything.
template <class S>
bool all_dense(const StepArgs<S>& a) {
  bool dense = a.numel % 4 == 0;
  for (const TensorView* v : {&a.x, &a.network, &a.uncond, &a.noise, &a.net_input})
    dense = dense && is_dense(*v);
  for (int k = 0; k < a.registers; ++k) dense = dense && is_dense(a.slots[k]);
  return dense;
}

// Whether a step needs neither kSlots nor kNorms nor kExtras (see below).
template <class S>
bool is_plain(const StepArgs<S>& a) {
  const bool wide = a.network.dtype == DType::f64 || a.net_input.dtype == DType::f64;
  return a.registers == 0 && !a.epsilon && !a.uncond.given() && !a.noise.given() && !wide;
}

template <class S>
__device__ __forceinline__ S not_a_number() {
  return S(NAN);
}

template <class S>
__device__ __forceinline__ Quad<S> all(S v) {
  return {{v, v, v, v}};
}

// acc += c·v
template <class S>
__device__ __forceinline__ void add_term(S c, const Quad<S>& v, Quad<S>& acc) {
  SBM_UNROLL
  for (int e = 0; e < 4; ++e) acc.v[e] = fused(c, v.v[e], acc.v[e]);
}

// p·x + q·F, each part left out where its high half is 0.
template <class S>
__device__ __forceinline__ Quad<S> form(Split<S> p, const Quad<S>& x, Split<S> q,
                                        const Quad<S>& f) {
  Quad<S> acc = all(S(0));
  if (q.hi != S(0)) add_term(q.lo, f, acc);
  if (p.hi != S(0)) add_term(p.lo, x, acc);
  if (q.hi != S(0)) add_term(q.hi, f, acc);
  if (p.hi != S(0)) add_term(p.hi, x, acc);
  return acc;
}

// Where a sample's noise comes from.
struct alignas(16) NoiseKey {
  uint64_t key;
  uint32_t draw, stream;
};

// What a sample's row says and the sample brings to it; nothing is read before it is known that the
// sample stands at a row. An input that the row needs and nobody gave is NaN: the host cannot look
// at the table.
//
// kExtras: guidance, noise that is given and float64 beside a float32 state are possible.
template <class S, class Io, bool kExtras>
class SampleRow {
 public:
  __device__ __forceinline__ SampleRow(const StepArgs<S>& a, int registers, int64_t sample,
                                       bool inside)
      : a_(a), layout_{registers}, b_(sample), row_(inside ? int32_t(a.row_of(sample)) : -1) {}

  __device__ __forceinline__ bool live() const { return row_ >= 0; }
  __device__ __forceinline__ int norm() const { return live() ? number(kNorm) : int(kNoNorm); }

 protected:
  __device__ __forceinline__ int number(Field lane) const {
    return a_.field[int64_t(row_) * kFields + lane];
  }
  __device__ __forceinline__ S high(int lane) const {
    return a_.coef[int64_t(row_) * 2 * layout_.lanes() + lane];
  }
  __device__ __forceinline__ S low(int lane) const { return high(layout_.lanes() + lane); }
  __device__ __forceinline__ Split<S> part(int lane) const { return {high(lane), low(lane)}; }

  __device__ __forceinline__ void prepare_state(int64_t origin) {
    x_ = Io::template state_cursor<S>(a_.x, b_, origin);
  }
  __device__ __forceinline__ void prepare_network(int64_t origin) {
    if (a_.network.given()) f_ = Io::cursor(a_.network, b_, origin);
    if (guides()) weight_ = guidance_weight(high(layout_.guidance()), a_.guidance[b_]);
  }
  __device__ __forceinline__ NoiseKey noise_key() const {
    if (noise_given()) return {};
    return {a_.keys[b_], uint32_t(number(kDraw)), uint32_t(number(kStream))};
  }

  __device__ __forceinline__ bool guides() const { return kExtras && a_.uncond.given(); }
  __device__ __forceinline__ bool noise_given() const { return kExtras && a_.noise.given(); }

  __device__ __forceinline__ Quad<S> read(const TensorView& v, const Spot& at) const {
    return Io::template read<S, kExtras>(v, Io::cursor(v, b_, at.origin), at);
  }
  __device__ __forceinline__ Quad<S> state(const Spot& at) const {
    return Io::template read_state<S>(a_.x, x_, at);
  }
  __device__ __forceinline__ Quad<S> network(const Spot& at) const {
    if (!a_.network.given()) return all(not_a_number<S>());
    Quad<S> f = Io::template read<S, kExtras>(a_.network, f_, at);
    if (!guides()) return f;
    const Quad<S> u = read(a_.uncond, at);
    SBM_UNROLL
    for (int e = 0; e < 4; ++e) f.v[e] = guided(f.v[e], u.v[e], weight_);
    return f;
  }

  static __device__ __forceinline__ Quad<float> normals(const NoiseKey& k, const Spot& at) {
    const Words words = sample_words(k.key, uint64_t(at.first()) / 4, k.draw, k.stream);
    Quad<float> z;
    noise_values<CudaPack, NoiseKind::normal>(words.w, z.v);
    return z;
  }
  __device__ __forceinline__ Quad<S> given_noise(const Spot& at) const {
    return read(a_.noise, at);
  }
  static __device__ __forceinline__ Quad<S> as_state(const Quad<float>& z) {
    return {{S(z.v[0]), S(z.v[1]), S(z.v[2]), S(z.v[3])}};
  }

  const StepArgs<S>& a_;
  const RowLayout layout_;
  const int64_t b_;
  const int32_t row_;
  typename Io::Cursor x_ = {}, f_ = {};
  S weight_ = S(0);
};

// What a row needs before and after its noise is made lies in shared memory: registers are what
// limits the threads of a multiprocessor.
template <class S>
struct Parked {
  struct {
    Piece<S> high, low;
  } own;  // coefficients of x' for x, F, D and z
  NoiseKey noise;
  S next_scale;
};

// The step itself. kSlots: the plan has registers. kNorms: rows may have a norm.
template <class S, class Io, bool kSlots, bool kNorms, bool kExtras>
class RowStep : public SampleRow<S, Io, kExtras> {
 public:
  // `parked`: this sample's place in shared memory, of this warp alone.
  __device__ __forceinline__ RowStep(const StepArgs<S>& a, int64_t sample, bool inside,
                                     Parked<S>* parked)
      : SampleRow<S, Io, kExtras>(a, kSlots ? a.registers : 0, sample, inside), parked_(parked) {}

  // epsilon is read where the row has a norm.
  __device__ __forceinline__ void prepare(int64_t origin, S epsilon) {
    const bool norm = number(kNorm) != kNoNorm;
    langevin_ = kNorms && norm;
    slot_ = number(kSlot);
    // What this launch cannot do turns x into NaN.
    bool lost = (norm && !kNorms) || slot_ >= layout_.registers;
    if (slot_ >= layout_.registers) slot_ = -1;
    Split<S> own[kRegister0];
    for (int k = 0; k < kRegister0; ++k) own[k] = part(k);
    if (langevin_) add_langevin(own, epsilon);
    out_ = write_ = 0;
    for (int k = 0; k < kRegister0; ++k) {
      if (own[k].hi != S(0)) out_ |= 1u << k;
      if (slot_ >= 0 && high(layout_.write() + k) != S(0)) write_ |= 1u << k;
    }
    if constexpr (kSlots) {
      for (int k = kRegister0; k < layout_.sources(); ++k) {
        if (register_part(k).hi != S(0)) out_ |= 1u << k;
        if (slot_ >= 0 && high(layout_.write() + k) != S(0)) write_ |= 1u << k;
      }
    }
    uses_ = out_ | write_;
    if (uses_ >> kDenoised & 1) {
      uses_ |= 1u << kNetwork;
      if (high(layout_.denoise_x()) != S(0)) uses_ |= 1u << kState;
    }
    if (langevin_) uses_ |= 1u << kNetwork | 1u << kNoise;
    this->prepare_state(origin);
    if (uses(kNetwork)) this->prepare_network(origin);
    lost = lost || (uses(kNetwork) && !a_.network.given());
    if (lost) own[kState] = {not_a_number<S>(), S(0)}, out_ |= 1u << kState;
    // All threads that share the place write the same numbers, and each reads after its own write.
    for (int k = 0; k < kRegister0; ++k)
      parked_->own.high.v[k] = own[k].hi, parked_->own.low.v[k] = own[k].lo;
    if (uses(kNoise)) parked_->noise = this->noise_key();
    parked_->next_scale = high(layout_.next_scale());
    if (a_.net_input.given()) net_input_ = Io::cursor(a_.net_input, b_, origin);
  }

  __device__ __forceinline__ void write_label() const {
    if (a_.net_time && parked_->next_scale != S(0)) a_.net_time[b_] = high(layout_.next_label());
  }

  // `kept`: z of these elements, made before for a row with a norm; or null.
  __device__ __forceinline__ void run(const Spot& at, const Piece<float>* kept) const {
    Values v;  // what the row does not use stays empty, and is not read below
    // What comes from memory is asked for before the noise is made, and arrives meanwhile.
    if (uses(kState)) v.x = this->state(at);
    v.f = uses(kNetwork) ? this->network(at) : all(S(0));
    if constexpr (kSlots) {
      SBM_UNROLL
      for (int k = 0; k < kHeld; ++k)
        if (uses(kRegister0 + k)) v.held[k] = register_value(k, at);
    }
    if (uses(kNoise)) v.z = noise(at, kept);
    if (uses(kNetwork)) note_bad(v.f);
    if (uses(kDenoised)) v.d = denoised(v);

    Quad<S> next = all(S(0)), written = all(S(0));
    if (kSlots && slot_ >= 0) {
      const int low = layout_.lanes() + layout_.write(), high = layout_.write();
      add_terms(
          write_, at, v, written, [&](int k) { return this->high(low + k); },
          [&](int k) { return this->high(low + k); });
      add_terms(
          write_, at, v, written, [&](int k) { return this->high(high + k); },
          [&](int k) { return this->high(high + k); });
    }
    const auto own = fetch_parked(parked_->own);
    add_terms(
        out_, at, v, next, [&](int k) { return own.low.v[k]; },
        [&](int k) { return register_part(k).lo; });
    add_terms(
        out_, at, v, next, [&](int k) { return own.high.v[k]; },
        [&](int k) { return register_part(k).hi; });

    Io::write_state(a_.x, x_, at, next);
    if (kSlots && slot_ >= 0) Io::write_state(a_.slots[slot_], slot(slot_, at), at, written);
    const S scale = fetch_parked(parked_->next_scale);
    if (a_.net_input.given() && scale != S(0)) {
      SBM_UNROLL
      for (int e = 0; e < 4; ++e) next.v[e] = scale * next.v[e];
      Io::template write<kExtras>(a_.net_input, net_input_, at, next);
    }
  }

 private:
  using Base = SampleRow<S, Io, kExtras>;
  using Base::a_;
  using Base::b_;
  using Base::high;
  using Base::layout_;
  using Base::number;
  using Base::part;
  using Base::row_;
  using Base::x_;

  // Registers whose values a thread asks for early and holds; the others are read twice.
  static constexpr int kHeld = kSlots && Io::kOneOrigin ? 2 : 0;
  struct Values {
    Quad<S> x, f, d, z, held[kHeld > 0 ? kHeld : 1];
  };

  __device__ __forceinline__ bool uses(int source) const { return uses_ >> source & 1; }

  // x + ε·s + √(2ε)·z on top of the row, folded in float64 and split again.
  __device__ __forceinline__ void add_langevin(Split<S>* own, S epsilon) const {
    const double eps = double(epsilon);
    double c[kRegister0];
    for (int k = 0; k < kRegister0; ++k) c[k] = double(own[k].hi) + double(own[k].lo);
    c[kState] += eps * both(layout_.score_x());
    c[kNetwork] += eps * both(layout_.score_f());
    c[kNoise] += ::sqrt(2.0 * eps);
    for (int k = 0; k < kRegister0; ++k) own[k] = split<S>(c[k]);
  }
  __device__ __forceinline__ double both(int lane) const {
    return double(high(lane)) + double(this->low(lane));
  }

  template <class T>
  static __device__ __forceinline__ T fetch_parked(const T& parked) {
#if defined(__CUDA_ARCH__)
    asm volatile("" ::: "memory");  // else nvcc keeps it in registers all the time
#endif
    return parked;
  }

  __device__ __forceinline__ Split<S> register_part(int k) const {
    return langevin_ ? split<S>(both(k)) : part(k);
  }
  __device__ __forceinline__ typename Io::Cursor slot(int k, const Spot& at) const {
    return Io::template state_cursor<S>(a_.slots[k], b_, at.origin);
  }
  __device__ __forceinline__ Quad<S> register_value(int k, const Spot& at) const {
    return Io::template read_state<S>(a_.slots[k], slot(k, at), at);
  }

  __device__ __forceinline__ Quad<S> noise(const Spot& at, const Piece<float>* kept) const {
    if (this->noise_given()) return this->given_noise(at);
    if (!kept || !langevin_) return this->as_state(this->normals(fetch_parked(parked_->noise), at));
    const Piece<float> z = *kept;
    return this->as_state({{z.v[0], z.v[1], z.v[2], z.v[3]}});
  }

  __device__ __forceinline__ void note_bad(const Quad<S>& f) const {
    if (!a_.first_bad) return;
    bool finite = true;
    SBM_UNROLL
    for (int e = 0; e < 4; ++e) finite = finite & (fabs(f.v[e]) < S(INFINITY));
    // Threads of a sample race here, but all of them write the same row.
    if (!finite && a_.first_bad[b_] < 0) a_.first_bad[b_] = row_;
  }

  __device__ __forceinline__ Quad<S> denoised(const Values& v) const {
    Quad<S> d = form(part(layout_.denoise_x()), v.x, part(layout_.denoise_f()), v.f);
    const S limit = high(layout_.limit());
    SBM_UNROLL
    for (int e = 0; e < 4; ++e) d.v[e] = clamp_keep_nan(d.v[e], limit);
    return d;
  }

  // One half of combine(): the sources of `mask` in its order, the state last.
  template <class Part, class RegisterPart>
  __device__ __forceinline__ void add_terms(uint32_t mask, const Spot& at, const Values& v,
                                            Quad<S>& acc, const Part& part,
                                            const RegisterPart& register_part) const {
    if (mask >> kNetwork & 1) add_term(part(kNetwork), v.f, acc);
    if (mask >> kDenoised & 1) add_term(part(kDenoised), v.d, acc);
    if (mask >> kNoise & 1) add_term(part(kNoise), v.z, acc);
    if constexpr (kSlots) {
      SBM_UNROLL
      for (int k = 0; k < kHeld; ++k)
        if (mask >> (kRegister0 + k) & 1) add_term(register_part(kRegister0 + k), v.held[k], acc);
      for (int k = kHeld; k < layout_.registers; ++k)
        if (mask >> (kRegister0 + k) & 1)
          add_term(register_part(kRegister0 + k), register_value(k, at), acc);
    }
    if (mask >> kState & 1) add_term(part(kState), v.x, acc);
  }

  Parked<S>* const parked_;
  uint32_t out_ = 0, write_ = 0, uses_ = 0;  // bit k: source k
  int slot_ = -1;
  typename Io::Cursor net_input_ = {};
  bool langevin_ = false;
};

}  // namespace
}  // namespace sbm
