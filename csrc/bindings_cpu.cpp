// torch.ops.sbm_fast.*: definitions and CPU kernels.
#include "bindings_common.h"
#include "bindings_group_norm.h"
#include "bindings_winograd.h"
#include "error_norm.h"
#include "hutchinson.h"
#include "langevin_epsilon.h"
#include "noise.h"
#include "parallel.h"

namespace {

void torch_parallel(int64_t count, int64_t grain, const void* context, sbm::ParallelBody body) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

// Rows name sources; what they name must be there. The table is small beside a batch.
template <class S>
void check_sources(const sbm::StepArgs<S>& a, bool coupled) {
  if (a.numel == 0) return;
  const sbm::RowLayout layout{a.registers};
  for (int64_t b = 0; b < a.distinct(); ++b) {
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
  const auto a = step_args<S>(Home::cpu(), x, network, uncond, guidance, registers, keys, row, coef,
                              field, epsilon, noise, net_input, net_time, first_bad);
  check_sources(a, coupled);
  sbm::affine_step_cpu(a);
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
  const Home home = Home::cpu();
  const auto a = common_args<S>(home, x, network, uncond, guidance, keys, row, coef, field, noise);
  sbm::langevin_epsilon_cpu(a, vector<S>(home, epsilon, a.batch, state_dtype<S>(), "epsilon"));
}

void langevin_epsilon_(Tensor epsilon, const Tensor& x, const Tensor& network,
                       const MaybeTensor& uncond, const MaybeTensor& guidance, const Tensor& keys,
                       const Tensor& row, const Tensor& coef, const Tensor& field,
                       const MaybeTensor& noise) {
  const auto run = is_double(x) ? epsilon_of<double> : epsilon_of<float>;
  run(epsilon, x, network, uncond, guidance, keys, row, coef, field, noise);
}

// [batch, columns] of float64.
const double* table(const Tensor& t, int64_t batch, int64_t columns, const char* name,
                    int64_t* stride) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Double && t.dim() == 2 &&
                      t.size(0) == batch && t.size(1) == columns,
                  name, ": expected a float64 CPU tensor [", batch, ", ", columns, "]");
  stride[0] = t.stride(0), stride[1] = t.stride(1);
  return static_cast<const double*>(t.data_ptr());
}

// The first of tensors of x's shape that stand behind one another in t.
TensorView view_of_first(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.dim() == x.dim() + 1 && t.sizes().slice(1).equals(x.sizes()), name,
                  ": expected [count, *x.shape]");
  return view(Home::cpu(), t, 1, name);
}

void add_product(sbm::HutchinsonArgs& a, const Tensor& product, const Tensor& x) {
  a.product = view_of_first(product, x, "product");
  a.probes = product.size(0);
  a.product_step = product.stride(0) * element_size(a.product);
  const char* const begin = static_cast<const char*>(a.product.data);
  const char* const end =
      begin + (a.probes - 1) * a.product_step + reach(a.product, a.batch);  // of the last probe
  const char* const drift = static_cast<const char*>(a.drift.data);
  STD_TORCH_CHECK(a.probes == 0 || end <= drift || drift + reach(a.drift, a.batch) <= begin,
                  "product: shares memory with drift, which is written first");
}

void hutchinson_(Tensor drift, MaybeTensor divergence, const Tensor& x, const Tensor& network,
                 const MaybeTensor& product, const Tensor& keys, const Tensor& coef, int64_t draw,
                 int64_t stream, bool gaussian) {
  const Home home = Home::cpu();
  sbm::HutchinsonArgs a;
  a.batch = samples(x, "x");
  a.numel = numel_of_sample(x);
  is_double(x);
  STD_TORCH_CHECK(drift.scalar_type() == x.scalar_type(), "drift: expected the dtype of x");
  a.x = view(home, x, 0, "x");
  a.drift = view_like(home, drift, x, "drift");
  a.network = view_like(home, network, x, "network");
  check_alias(a.x, a.drift, a.batch, "x", "drift");
  check_alias(a.network, a.drift, a.batch, "network", "drift");
  a.keys = key_vector(home, keys, a.batch, "keys");
  a.coef = table(coef, a.batch, 3, "coef", a.coef_stride);
  a.draw = uint32_t(draw), a.stream = uint32_t(stream);
  a.probe = gaussian ? sbm::NoiseKind::normal : sbm::NoiseKind::rademacher;
  STD_TORCH_CHECK(product.has_value() == divergence.has_value(),
                  "product: is given with divergence, and only then");
  if (!product) return sbm::hutchinson_cpu<float>(a, nullptr);
  add_product(a, *product, x);
  const ScalarType sums = divergence->scalar_type();
  STD_TORCH_CHECK(home.has(*divergence) && divergence->dim() == 2 &&
                      divergence->size(0) == a.probes && divergence->size(1) == a.batch &&
                      divergence->is_contiguous() &&
                      (sums == ScalarType::Float || sums == ScalarType::Double),
                  "divergence: expected a contiguous float32 or float64 CPU tensor [", a.probes,
                  ", ", a.batch, "]");
  if (sums == ScalarType::Float)
    sbm::hutchinson_cpu(a, static_cast<float*>(divergence->data_ptr()));
  else
    sbm::hutchinson_cpu(a, static_cast<double*>(divergence->data_ptr()));
}

template <class S>
void error_norm(const Tensor& out, const Tensor& x, const Tensor& registers, const Tensor& weights,
                double atol, double rtol) {
  const Home home = Home::cpu();
  sbm::ErrorNormArgs<S> a;
  a.batch = samples(x, "x");
  a.numel = numel_of_sample(x);
  a.x = view(home, x, 0, "x");
  a.registers = view_of_first(registers, x, "registers");
  a.stages = registers.size(0);
  a.register_step = registers.stride(0) * int64_t(sizeof(S));
  STD_TORCH_CHECK(a.registers.dtype == a.x.dtype, "registers: expected the dtype of x");
  STD_TORCH_CHECK(a.stages >= 1, "registers: expected the state before the step first, got none");
  a.weights = table(weights, a.batch, a.stages, "weights", a.weight_stride);
  a.atol = S(atol), a.rtol = S(rtol);
  sbm::error_norm_cpu(a, vector<S>(home, out, a.batch, state_dtype<S>(), "out"));
}

void error_norm_(Tensor out, const Tensor& x, const Tensor& registers, const Tensor& weights,
                 double atol, double rtol) {
  const auto run = is_double(x) ? error_norm<double> : error_norm<float>;
  run(out, x, registers, weights, atol, rtol);
}

template <class S>
void norm(const Tensor& out, const MaybeTensor& total, const Tensor& stats, const Tensor& x,
          const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& scale,
          const MaybeTensor& shift, const MaybeTensor& add, const MaybeTensor& residual,
          int64_t groups, double eps, double gain, bool silu) {
  const Home home = Home::cpu();
  sbm::GroupNormArgs<S> a;
  norm_shape(home, a, x, "x", weight, bias, scale, shift, groups, gain, silu);
  const bool last = a.channels_last;
  a.eps = eps;
  a.x = image(home, x, x, last, "x");
  a.out = written_image(home, out, x, last, "out");
  a.total = written_image(home, total, x, last, "total");
  a.residual = image(home, residual, x, last, "residual");
  a.add = rows(home, add, a.batch, a.channels, "add");
  a.stats = table_of<S>(home, stats, a.batch, groups, "stats");
  check_alias(a.x, a.out, a.batch, "x", "out");
  check_alias(a.residual, a.out, a.batch, "residual", "out");
  check_apart(a.total, a.x, a.batch, a.numel(), "total", "x");
  check_apart(a.total, a.residual, a.batch, a.numel(), "total", "residual");
  check_apart(a.total, a.out, a.batch, a.numel(), "total", "out");
  sbm::group_norm_silu_cpu(a);
}

void group_norm_silu_(Tensor out, MaybeTensor total, Tensor stats, const Tensor& x,
                      const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& scale,
                      const MaybeTensor& shift, const MaybeTensor& add, const MaybeTensor& residual,
                      int64_t groups, double eps, double gain, bool silu) {
  const auto run = x.scalar_type() == ScalarType::Double ? norm<double> : norm<float>;
  run(out, total, stats, x, weight, bias, scale, shift, add, residual, groups, eps, gain, silu);
}

template <class S>
void norm_product(const Tensor& out, const MaybeTensor& sums, const Tensor& given, const Tensor& h,
                  const Tensor& stats, const MaybeTensor& weight, const MaybeTensor& bias,
                  const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& weight_dot,
                  const MaybeTensor& bias_dot, int64_t groups, double gain, bool silu,
                  bool forward) {
  const Home home = Home::cpu();
  sbm::GroupNormProductArgs<S> a;
  norm_shape(home, a, h, "h", weight, bias, scale, shift, groups, gain, silu);
  const bool last = a.channels_last;
  a.forward = forward;
  a.h = image(home, h, h, last, "h");
  a.given = image(home, given, h, last, "given", "h");
  a.out = written_image(home, out, h, last, "out", "h");
  a.weight_dot = rows(home, weight_dot, a.batch, a.channels, "weight_dot");
  a.bias_dot = rows(home, bias_dot, a.batch, a.channels, "bias_dot");
  STD_TORCH_CHECK(forward || (!weight_dot && !bias_dot), weight_dot ? "weight_dot" : "bias_dot",
                  ": is read by the forward product only");
  STD_TORCH_CHECK(!forward || !sums, "sums: are made by the backward product only");
  a.stats = table_of<S>(home, stats, a.batch, groups, "stats");
  if (sums) a.sums = table_of<S>(home, *sums, a.batch, a.channels, "sums");
  check_alias(a.given, a.out, a.batch, "given", "out");
  check_alias(a.h, a.out, a.batch, "h", "out");
  sbm::group_norm_silu_product_cpu(a);
}

void group_norm_silu_product_(Tensor out, MaybeTensor sums, const Tensor& given, const Tensor& h,
                              const Tensor& stats, const MaybeTensor& weight,
                              const MaybeTensor& bias, const MaybeTensor& scale,
                              const MaybeTensor& shift, const MaybeTensor& weight_dot,
                              const MaybeTensor& bias_dot, int64_t groups, double gain, bool silu,
                              bool forward) {
  const auto run =
      h.scalar_type() == ScalarType::Double ? norm_product<double> : norm_product<float>;
  run(out, sums, given, h, stats, weight, bias, scale, shift, weight_dot, bias_dot, groups, gain,
      silu, forward);
}

void winograd_input_(Tensor tiles, const Tensor& x, int64_t first) {
  const Home home = Home::cpu();
  sbm::WinogradInputArgs a;
  a.x = nhwc<const float>(home, x, "x");
  winograd_shape(home, a, x, tiles, first, "tiles");
  a.tiles = static_cast<float*>(tiles.data_ptr());
  sbm::winograd_input_cpu(a);
}

void winograd_output_(Tensor y, const Tensor& products, const MaybeTensor& bias,
                      const MaybeTensor& plus, int64_t first, double gain) {
  const Home home = Home::cpu();
  sbm::WinogradOutputArgs a;
  a.y = nhwc<float>(home, y, "y");
  winograd_shape(home, a, y, products, first, "products");
  a.products = static_cast<const float*>(products.data_ptr());
  a.bias = vector<float>(home, bias, a.channels, ScalarType::Float, "bias");
  if (plus) {
    a.plus = nhwc<const float>(home, *plus, "plus");
    STD_TORCH_CHECK(plus->sizes().equals(y.sizes()), "plus: expected the shape of y");
    check_alias(view(home, *plus, 0, "plus"), view(home, y, 0, "y"), a.samples, "plus", "y");
  }
  a.gain = float(gain);
  sbm::winograd_output_cpu(a);
}

template <sbm::NoiseKind kind>
void fill_(Tensor out, const Tensor& keys, int64_t draw, int64_t stream) {
  const Home home = Home::cpu();
  const int64_t batch = samples(out, "out");
  const uint64_t* key = key_vector(home, keys, batch, "keys");
  sbm::noise_cpu(noise_view(home, out, kind), batch, numel_of_sample(out), key, uint32_t(draw),
                 uint32_t(stream), kind);
}

void keys_(Tensor out, int64_t seed, int64_t first_sample) {
  uint64_t* key = key_vector(Home::cpu(), out, samples(out, "out"), "out");
  for (int64_t b = 0; b < out.size(0); ++b)
    key[b] = sbm::sample_key(uint64_t(seed), uint64_t(first_sample + b));
}

}  // namespace

STABLE_TORCH_LIBRARY(sbm_fast, m) { define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(sbm_fast, CPU, m) {
  sbm::parallel_for_hook = torch_parallel;
  sbm::thread_count_hook = [] { return int(torch::stable::get_num_threads()); };
  m.impl("normal_", TORCH_BOX(&fill_<sbm::NoiseKind::normal>));
  m.impl("uniform_", TORCH_BOX(&fill_<sbm::NoiseKind::uniform>));
  m.impl("rademacher_", TORCH_BOX(&fill_<sbm::NoiseKind::rademacher>));
  m.impl("words_", TORCH_BOX(&fill_<sbm::NoiseKind::words>));
  m.impl("keys_", TORCH_BOX(&keys_));
  m.impl("affine_step_", TORCH_BOX(&affine_step_));
  m.impl("langevin_epsilon_", TORCH_BOX(&langevin_epsilon_));
  m.impl("hutchinson_", TORCH_BOX(&hutchinson_));
  m.impl("error_norm_", TORCH_BOX(&error_norm_));
  m.impl("group_norm_silu_", TORCH_BOX(&group_norm_silu_));
  m.impl("group_norm_silu_product_", TORCH_BOX(&group_norm_silu_product_));
  m.impl("winograd_input_", TORCH_BOX(&winograd_input_));
  m.impl("winograd_output_", TORCH_BOX(&winograd_output_));
}
