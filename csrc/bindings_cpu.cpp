// torch.ops.sbm_fast.*: definitions and CPU kernels. The only file here that sees torch, through
// the LibTorch stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "langevin_epsilon.h"
#include "noise.h"
#include "parallel.h"

namespace {

using sbm::DType;
using sbm::TensorView;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

void torch_parallel(int64_t count, int64_t grain, const void* context, sbm::ParallelBody body) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

DType dtype_of(const Tensor& t, const char* name) {
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
TensorView view(const Tensor& t, int64_t first, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  TensorView v;
  v.data = t.data_ptr();
  v.dtype = dtype_of(t, name);
  const auto sizes = t.sizes(), strides = t.strides();
  v.sample_stride = strides[size_t(first)];
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

int64_t samples(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1, name, ": expected [samples, …], got a scalar");
  return x.size(0);
}

int64_t numel_of_sample(const Tensor& x) {
  int64_t n = 1;
  for (int64_t size : x.sizes().slice(1)) n *= size;
  return n;
}

TensorView view_like(const MaybeTensor& t, const Tensor& x, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->sizes() == x.sizes(), name, ": expected the shape of x");
  return view(*t, 0, name);
}

void check_vector(const Tensor& t, int64_t batch, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == batch,
                  name, ": expected a CPU vector of ", batch, " samples in the op's dtype");
}

template <class T>
T* vector(const MaybeTensor& t, int64_t batch, ScalarType dtype, const char* name) {
  if (!t) return nullptr;
  check_vector(*t, batch, dtype, name);
  STD_TORCH_CHECK(batch <= 1 || t->stride(0) == 1, name, ": expected a contiguous vector");
  return static_cast<T*>(t->data_ptr());
}

template <class S>
constexpr ScalarType state_dtype() {
  return sizeof(S) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
}

int64_t element_size(const TensorView& v) {
  return v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
}

bool same_place(const TensorView& a, const TensorView& b) {
  bool same = a.data == b.data && a.dtype == b.dtype && a.dims == b.dims &&
              a.sample_stride == b.sample_stride;
  for (int d = 0; same && d < a.dims; ++d)
    same = a.size[d] == b.size[d] && a.stride[d] == b.stride[d];
  return same;
}

// The network may hand back what it was given, but not another view of it: the step writes `to`
// while it reads F, in the same order only if both lie in the same way.
void check_alias(const TensorView& f, const TensorView& to, int64_t batch, const char* name,
                 const char* what) {
  if (!f.given() || !to.given() || same_place(f, to)) return;
  int64_t last = (batch - 1) * to.sample_stride;
  for (int d = 0; d < to.dims; ++d) last += (to.size[d] - 1) * to.stride[d];
  const char* const begin = static_cast<const char*>(to.data);
  const char* const at = static_cast<const char*>(f.data);
  STD_TORCH_CHECK(at < begin || at > begin + last * element_size(to), name, ": is another view of ",
                  what, "; return a tensor of its own");
}

// What both ops read.
template <class S>
sbm::StepArgs<S> common_args(const Tensor& x, const MaybeTensor& network, const MaybeTensor& uncond,
                             const MaybeTensor& guidance, const Tensor& keys, const Tensor& row,
                             const Tensor& coef, const Tensor& field, const MaybeTensor& noise) {
  constexpr ScalarType dtype = state_dtype<S>();
  sbm::StepArgs<S> a;
  a.batch = samples(x, "x");
  a.numel = numel_of_sample(x);
  a.x = view(x, 0, "x");
  a.network = view_like(network, x, "network");
  a.uncond = view_like(uncond, x, "uncond");
  a.noise = view_like(noise, x, "noise");
  check_alias(a.network, a.x, a.batch, "network", "the state x");
  check_alias(a.uncond, a.x, a.batch, "uncond", "the state x");
  a.guidance = vector<S>(guidance, a.batch, dtype, "guidance");
  STD_TORCH_CHECK(!uncond || (guidance && network), "uncond: needs network and guidance");
  a.keys = static_cast<const uint64_t*>(
      static_cast<void*>(vector<int64_t>(keys, a.batch, ScalarType::Long, "keys")));
  check_vector(row, a.batch, ScalarType::Int, "row");
  a.row = static_cast<const int32_t*>(row.data_ptr());
  a.row_stride = row.stride(0);
  STD_TORCH_CHECK(coef.is_cpu() && coef.dim() == 3 && coef.size(1) == 2 && coef.is_contiguous() &&
                      coef.scalar_type() == dtype,
                  "coef: expected a contiguous CPU tensor [rows, 2, lanes] of x's dtype");
  STD_TORCH_CHECK(field.is_cpu() && field.dim() == 2 && field.is_contiguous() &&
                      field.size(0) == coef.size(0) && field.size(1) == sbm::kFields &&
                      field.scalar_type() == ScalarType::Int,
                  "field: expected a contiguous int32 CPU tensor [rows, 4]");
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
void add_slots(sbm::StepArgs<S>& a, const MaybeTensor& registers, const Tensor& x) {
  if (a.registers == 0) return;
  STD_TORCH_CHECK(registers && registers->dim() == x.dim() + 1 &&
                      registers->size(0) >= a.registers && registers->sizes().slice(1) == x.sizes(),
                  "registers: expected [", a.registers, ", *x.shape]");
  TensorView slot = view(*registers, 1, "registers");
  const int64_t step = registers->stride(0) * int64_t(sizeof(S));
  STD_TORCH_CHECK(slot.dtype == a.x.dtype, "registers: expected the dtype of x");
  for (int k = 0; k < a.registers; ++k) {
    a.slots[k] = slot;
    a.slots[k].data = static_cast<char*>(slot.data) + k * step;
  }
}

// Rows name sources; what they name must be there. The table is small beside a batch.
template <class S>
void check_sources(const sbm::StepArgs<S>& a, bool coupled) {
  if (a.numel == 0) return;
  const sbm::RowLayout layout{a.registers};
  for (int64_t b = 0; b < (a.row_stride == 0 ? (a.batch > 0) : a.batch); ++b) {
    const int64_t row = a.row_of(b);
    if (row < 0) continue;
    const S* hi = a.coef + row * 2 * layout.lanes();
    const int32_t* field = a.field + row * sbm::kFields;
    const bool norm = field[sbm::kNorm] != sbm::kNoNorm;
    STD_TORCH_CHECK(coupled || field[sbm::kNorm] != sbm::kBatchMean, "coupled: is False, but row ",
                    row, " couples the samples (batch_mean)");
    bool network = norm;
    for (int k : {sbm::kNetwork, sbm::kDenoised})
      network =
          network || hi[k] != S(0) || (field[sbm::kSlot] >= 0 && hi[layout.write() + k] != S(0));
    STD_TORCH_CHECK(!network || a.network.given(), "network: row ", row, " needs it");
    STD_TORCH_CHECK(!norm || a.epsilon, "epsilon: row ", row, " needs it");
    STD_TORCH_CHECK(field[sbm::kSlot] < a.registers, "field: row ", row, " writes no register");
  }
}

template <class S>
void step(const Tensor& x, const MaybeTensor& network, const MaybeTensor& uncond,
          const MaybeTensor& guidance, const MaybeTensor& registers, const Tensor& keys,
          const Tensor& row, const Tensor& coef, const Tensor& field, const MaybeTensor& epsilon,
          const MaybeTensor& noise, const MaybeTensor& net_input, const MaybeTensor& net_time,
          const MaybeTensor& first_bad, bool coupled) {
  constexpr ScalarType dtype = state_dtype<S>();
  auto a = common_args<S>(x, network, uncond, guidance, keys, row, coef, field, noise);
  add_slots(a, registers, x);
  a.net_input = view_like(net_input, x, "net_input");
  check_alias(a.network, a.net_input, a.batch, "network", "net_input");
  check_alias(a.uncond, a.net_input, a.batch, "uncond", "net_input");
  a.epsilon = vector<S>(epsilon, a.batch, dtype, "epsilon");
  a.net_time = vector<S>(net_time, a.batch, dtype, "net_time");
  a.first_bad = vector<int32_t>(first_bad, a.batch, ScalarType::Int, "first_bad");
  check_sources(a, coupled);
  sbm::affine_step_cpu(a);
}

bool is_double(const Tensor& x) {
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "x: expected a float32 or float64 state");
  return dtype == ScalarType::Double;
}

void affine_step_(Tensor x, const MaybeTensor& network, const MaybeTensor& uncond,
                  const MaybeTensor& guidance, const MaybeTensor& registers, const Tensor& keys,
                  const Tensor& row, const Tensor& coef, const Tensor& field,
                  const MaybeTensor& epsilon, const MaybeTensor& noise,
                  const MaybeTensor& net_input, const MaybeTensor& net_time,
                  const MaybeTensor& first_bad, const MaybeTensor& /* workspace: for GPUs */,
                  bool coupled) {
  const auto run = is_double(x) ? step<double> : step<float>;
  run(x, network, uncond, guidance, registers, keys, row, coef, field, epsilon, noise, net_input,
      net_time, first_bad, coupled);
}

template <class S>
void epsilon_of(const Tensor& epsilon, const Tensor& x, const Tensor& network,
                const MaybeTensor& uncond, const MaybeTensor& guidance, const Tensor& keys,
                const Tensor& row, const Tensor& coef, const Tensor& field,
                const MaybeTensor& noise) {
  const auto a = common_args<S>(x, network, uncond, guidance, keys, row, coef, field, noise);
  sbm::langevin_epsilon_cpu(a, vector<S>(epsilon, a.batch, state_dtype<S>(), "epsilon"));
}

void langevin_epsilon_(Tensor epsilon, const Tensor& x, const Tensor& network,
                       const MaybeTensor& uncond, const MaybeTensor& guidance, const Tensor& keys,
                       const Tensor& row, const Tensor& coef, const Tensor& field,
                       const MaybeTensor& noise) {
  const auto run = is_double(x) ? epsilon_of<double> : epsilon_of<float>;
  run(epsilon, x, network, uncond, guidance, keys, row, coef, field, noise);
}

template <sbm::NoiseKind kind>
void fill_(Tensor out, const Tensor& keys, int64_t draw, int64_t stream) {
  const int64_t batch = samples(out, "out");
  const auto* key = vector<int64_t>(keys, batch, ScalarType::Long, "keys");
  TensorView v;
  if constexpr (kind == sbm::NoiseKind::words) {
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Int && out.is_contiguous() && out.is_cpu(),
                    "out: expected a contiguous int32 CPU tensor");
    // Words travel as float bits; nothing calculates with them.
    v.data = out.data_ptr();
    v.sample_stride = v.size[0] = numel_of_sample(out);
    v.stride[0] = v.dims = 1;
  } else {
    v = view(out, 0, "out");
  }
  sbm::noise_cpu(v, batch, numel_of_sample(out), reinterpret_cast<const uint64_t*>(key),
                 uint32_t(draw), uint32_t(stream), kind);
}

void keys_(Tensor out, int64_t seed, int64_t first_sample) {
  auto* key = vector<int64_t>(out, samples(out, "out"), ScalarType::Long, "out");
  for (int64_t b = 0; b < out.size(0); ++b)
    key[b] = int64_t(sbm::sample_key(uint64_t(seed), uint64_t(first_sample + b)));
}

}  // namespace

STABLE_TORCH_LIBRARY(sbm_fast, m) {
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
}

STABLE_TORCH_LIBRARY_IMPL(sbm_fast, CPU, m) {
  sbm::parallel_for_hook = torch_parallel;
  m.impl("normal_", TORCH_BOX(&fill_<sbm::NoiseKind::normal>));
  m.impl("uniform_", TORCH_BOX(&fill_<sbm::NoiseKind::uniform>));
  m.impl("rademacher_", TORCH_BOX(&fill_<sbm::NoiseKind::rademacher>));
  m.impl("words_", TORCH_BOX(&fill_<sbm::NoiseKind::words>));
  m.impl("keys_", TORCH_BOX(&keys_));
  m.impl("affine_step_", TORCH_BOX(&affine_step_));
  m.impl("langevin_epsilon_", TORCH_BOX(&langevin_epsilon_));
}
