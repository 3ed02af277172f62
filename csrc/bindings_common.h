// What the bindings of all devices share: schemas, and the way from torch's tensors to StepArgs.
// The stable ABI is all of torch that is used.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "affine_step.h"
#include "noise_kind.h"

namespace {

using sbm::DType;
using sbm::TensorView;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Where an op's tensors must be: with its first one.
struct Home {
  const char* name;
  int32_t cuda_device;  // −1: not a GPU

  static Home cpu() { return {"CPU", -1}; }
  static Home cuda(const Tensor& first) { return {"CUDA", first.get_device_index()}; }
  bool has(const Tensor& t) const {
    return cuda_device < 0 ? t.is_cpu() : t.is_cuda() && t.get_device_index() == cuda_device;
  }
};

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

// Dimension `first` counts samples; those behind it are merged where memory allows.
inline TensorView view(const Home& home, const Tensor& t, int64_t first, const char* name) {
  STD_TORCH_CHECK(home.has(t), name, ": expected a ", home.name, " tensor",
                  home.cuda_device < 0 ? "" : " on the device of the first argument");
  TensorView v;
  v.data = t.data_ptr();
  v.dtype = dtype_of(t, name);
  const auto sizes = t.sizes(), strides = t.strides();
  v.sample_stride = strides[size_t(first)];
  if (sizes[size_t(first)] <= 1) {  // nothing is that far away: as if dense
    v.sample_stride = 1;
    for (size_t d = size_t(first) + 1; d < sizes.size(); ++d) v.sample_stride *= sizes[d];
  }
  for (size_t d = size_t(first) + 1; d < sizes.size(); ++d) {
    const int64_t size = sizes[d], stride = strides[d];
    if (size == 1) continue;
    if (v.dims > 0 && v.stride[v.dims - 1] == size * stride) {
      v.size[v.dims - 1] *= size;
      v.stride[v.dims - 1] = stride;
      continue;
    }
    STD_TORCH_CHECK(v.dims < TensorView::kMaxDims, name, ": too many dimensions");
    v.size[v.dims] = size;
    v.stride[v.dims++] = stride;
  }
  return v;
}

inline int64_t samples(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1, name, ": expected [samples, …], got a scalar");
  return x.size(0);
}

inline int64_t numel_of_sample(const Tensor& x) {
  int64_t n = 1;
  for (int64_t size : x.sizes().slice(1)) n *= size;
  return n;
}

inline TensorView view_like(const Home& home, const MaybeTensor& t, const Tensor& x,
                            const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->sizes().equals(x.sizes()), name, ": expected the shape of x");
  return view(home, *t, 0, name);
}

inline void check_vector(const Home& home, const Tensor& t, int64_t batch, ScalarType dtype,
                         const char* name) {
  STD_TORCH_CHECK(home.has(t) && t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == batch,
                  name, ": expected a ", home.name, " vector of ", batch,
                  " samples in the op's dtype");
}

template <class T>
T* vector(const Home& home, const MaybeTensor& t, int64_t batch, ScalarType dtype,
          const char* name) {
  if (!t) return nullptr;
  check_vector(home, *t, batch, dtype, name);
  STD_TORCH_CHECK(batch <= 1 || t->stride(0) == 1, name, ": expected a contiguous vector");
  return static_cast<T*>(t->data_ptr());
}

inline uint64_t* key_vector(const Home& home, const Tensor& t, int64_t batch, const char* name) {
  return reinterpret_cast<uint64_t*>(vector<int64_t>(home, t, batch, ScalarType::Long, name));
}

template <class S>
constexpr ScalarType state_dtype() {
  return sizeof(S) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
}

inline bool is_double(const Tensor& x) {
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "x: expected a float32 or float64 state");
  return dtype == ScalarType::Double;
}

inline int64_t element_size(const TensorView& v) {
  return v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
}

inline bool same_place(const TensorView& a, const TensorView& b) {
  bool same = a.data == b.data && a.dtype == b.dtype && a.dims == b.dims &&
              a.sample_stride == b.sample_stride;
  for (int d = 0; same && d < a.dims; ++d)
    same = a.size[d] == b.size[d] && a.stride[d] == b.stride[d];
  return same;
}

// Bytes from the first element to behind the last one.
inline int64_t reach(const TensorView& v, int64_t batch) {
  bool empty = batch == 0;
  int64_t last = (batch - 1) * v.sample_stride;
  for (int d = 0; d < v.dims; ++d) {
    empty = empty || v.size[d] == 0;
    last += (v.size[d] - 1) * v.stride[d];
  }
  return empty ? 0 : (last + 1) * element_size(v);
}

// The network may hand back what it was given, but not another view of it: the step writes `to`
// while it reads F, in the same order only if both lie in the same way.
inline void check_alias(const TensorView& f, const TensorView& to, int64_t batch, const char* name,
                        const char* what) {
  if (!f.given() || !to.given() || same_place(f, to)) return;
  const char* const read = static_cast<const char*>(f.data);
  const char* const written = static_cast<const char*>(to.data);
  STD_TORCH_CHECK(read + reach(f, batch) <= written || written + reach(to, batch) <= read, name,
                  ": is another view of ", what, "; return a tensor of its own");
}

// What both ops read.
template <class S>
sbm::StepArgs<S> common_args(const Home& home, const Tensor& x, const MaybeTensor& network,
                             const MaybeTensor& uncond, const MaybeTensor& guidance,
                             const Tensor& keys, const Tensor& row, const Tensor& coef,
                             const Tensor& field, const MaybeTensor& noise) {
  constexpr ScalarType dtype = state_dtype<S>();
  sbm::StepArgs<S> a;
  a.batch = samples(x, "x");
  a.numel = numel_of_sample(x);
  a.x = view(home, x, 0, "x");
  a.network = view_like(home, network, x, "network");
  a.uncond = view_like(home, uncond, x, "uncond");
  a.noise = view_like(home, noise, x, "noise");
  check_alias(a.network, a.x, a.batch, "network", "the state x");
  check_alias(a.uncond, a.x, a.batch, "uncond", "the state x");
  a.guidance = vector<S>(home, guidance, a.batch, dtype, "guidance");
  STD_TORCH_CHECK(!uncond || (guidance && network), "uncond: needs network and guidance");
  a.keys = key_vector(home, keys, a.batch, "keys");
  check_vector(home, row, a.batch, ScalarType::Int, "row");
  a.row = static_cast<const int32_t*>(row.data_ptr());
  a.row_stride = row.stride(0);
  STD_TORCH_CHECK(home.has(coef) && coef.dim() == 3 && coef.size(1) == 2 && coef.is_contiguous() &&
                      coef.scalar_type() == dtype,
                  "coef: expected a contiguous ", home.name,
                  " tensor [rows, 2, lanes] of x's dtype");
  STD_TORCH_CHECK(home.has(field) && field.dim() == 2 && field.is_contiguous() &&
                      field.size(0) == coef.size(0) && field.size(1) == sbm::kFields &&
                      field.scalar_type() == ScalarType::Int,
                  "field: expected a contiguous int32 ", home.name, " tensor [rows, 4]");
  a.rows = coef.size(0);
  a.coef = static_cast<const S*>(coef.data_ptr());
  a.field = static_cast<const int32_t*>(field.data_ptr());
  a.registers = int((coef.size(2) - sbm::RowLayout{0}.lanes()) / 2);
  STD_TORCH_CHECK(a.registers >= 0 && a.registers <= sbm::kMaxRegisters &&
                      sbm::RowLayout{a.registers}.lanes() == coef.size(2),
                  "coef: no plan has ", coef.size(2), " lanes");
  return a;
}

template <class S>
void add_slots(const Home& home, sbm::StepArgs<S>& a, const MaybeTensor& registers,
               const Tensor& x) {
  if (a.registers == 0) return;
  STD_TORCH_CHECK(registers && registers->dim() == x.dim() + 1 &&
                      registers->size(0) >= a.registers &&
                      registers->sizes().slice(1).equals(x.sizes()),
                  "registers: expected [", a.registers, ", *x.shape]");
  TensorView slot = view(home, *registers, 1, "registers");
  const int64_t step = registers->stride(0) * int64_t(sizeof(S));
  STD_TORCH_CHECK(slot.dtype == a.x.dtype, "registers: expected the dtype of x");
  for (int k = 0; k < a.registers; ++k) {
    a.slots[k] = slot;
    a.slots[k].data = static_cast<char*>(slot.data) + k * step;
  }
}

// All that the step reads and writes.
template <class S>
sbm::StepArgs<S> step_args(const Home& home, const Tensor& x, const MaybeTensor& network,
                           const MaybeTensor& uncond, const MaybeTensor& guidance,
                           const MaybeTensor& registers, const Tensor& keys, const Tensor& row,
                           const Tensor& coef, const Tensor& field, const MaybeTensor& epsilon,
                           const MaybeTensor& noise, const MaybeTensor& net_input,
                           const MaybeTensor& net_time, const MaybeTensor& first_bad) {
  constexpr ScalarType dtype = state_dtype<S>();
  auto a = common_args<S>(home, x, network, uncond, guidance, keys, row, coef, field, noise);
  add_slots(home, a, registers, x);
  a.net_input = view_like(home, net_input, x, "net_input");
  check_alias(a.network, a.net_input, a.batch, "network", "net_input");
  check_alias(a.uncond, a.net_input, a.batch, "uncond", "net_input");
  a.epsilon = vector<S>(home, epsilon, a.batch, dtype, "epsilon");
  a.net_time = vector<S>(home, net_time, a.batch, dtype, "net_time");
  a.first_bad = vector<int32_t>(home, first_bad, a.batch, ScalarType::Int, "first_bad");
  return a;
}

// Where noise goes: words travel as float bits, nothing calculates with them.
inline TensorView noise_view(const Home& home, const Tensor& out, sbm::NoiseKind kind) {
  if (kind != sbm::NoiseKind::words) return view(home, out, 0, "out");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Int && out.is_contiguous() && home.has(out),
                  "out: expected a contiguous int32 ", home.name, " tensor");
  TensorView v;
  v.data = out.data_ptr();
  v.sample_stride = v.size[0] = numel_of_sample(out);
  v.stride[0] = v.dims = 1;
  return v;
}

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  m.def("normal_(Tensor(a!) out, Tensor keys, int draw, int stream) -> ()");
  m.def("uniform_(Tensor(a!) out, Tensor keys, int draw, int stream) -> ()");
  m.def("rademacher_(Tensor(a!) out, Tensor keys, int draw, int stream) -> ()");
  m.def("words_(Tensor(a!) out, Tensor keys, int draw, int stream) -> ()");
  m.def("keys_(Tensor(a!) out, int seed, int first_sample) -> ()");
  m.def(
      "affine_step_(Tensor(a!) x, Tensor? network, Tensor? uncond, Tensor? guidance, "
      "Tensor(b!)? registers, Tensor keys, Tensor row, Tensor coef, Tensor field, "
      "Tensor(c!)? epsilon, Tensor? noise, Tensor(d!)? net_input, Tensor(e!)? net_time, "
      "Tensor(f!)? first_bad, Tensor(g!)? workspace=None, bool coupled=True) -> ()");
  m.def(
      "langevin_epsilon_(Tensor(a!) epsilon, Tensor x, Tensor network, Tensor? uncond, "
      "Tensor? guidance, Tensor keys, Tensor row, Tensor coef, Tensor field, Tensor? noise) "
      "-> ()");
  m.def(
      "hutchinson_(Tensor(a!) drift, Tensor(b!)? divergence, Tensor x, Tensor network, "
      "Tensor? product, Tensor keys, Tensor coef, int draw, int stream, bool gaussian) -> ()");
  m.def(
      "error_norm_(Tensor(a!) out, Tensor x, Tensor registers, Tensor weights, float atol, "
      "float rtol) -> ()");
  m.def(
      "group_norm_silu_(Tensor(a!) out, Tensor(b!)? total, Tensor(c!) stats, Tensor x, "
      "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? add, "
      "Tensor? residual, int groups, float eps, float gain, bool silu) -> ()");
  m.def("winograd_input_(Tensor(a!) tiles, Tensor x, int first) -> ()");
  m.def(
      "winograd_output_(Tensor(a!) y, Tensor products, Tensor? bias, Tensor? plus, int first, "
      "float gain) -> ()");
  m.def(
      "group_norm_silu_product_(Tensor(a!) out, Tensor(b!)? sums, Tensor given, Tensor h, "
      "Tensor stats, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
      "Tensor? weight_dot, Tensor? bias_dot, int groups, float gain, bool silu, bool forward) "
      "-> ()");
}

}  // namespace
