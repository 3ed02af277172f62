// torch.ops.sbm_fast.*: definitions and CPU kernels.
#include "bindings_common.h"
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
  m.impl("normal_", TORCH_BOX(&fill_<sbm::NoiseKind::normal>));
  m.impl("uniform_", TORCH_BOX(&fill_<sbm::NoiseKind::uniform>));
  m.impl("rademacher_", TORCH_BOX(&fill_<sbm::NoiseKind::rademacher>));
  m.impl("words_", TORCH_BOX(&fill_<sbm::NoiseKind::words>));
  m.impl("keys_", TORCH_BOX(&keys_));
  m.impl("affine_step_", TORCH_BOX(&affine_step_));
  m.impl("langevin_epsilon_", TORCH_BOX(&langevin_epsilon_));
}
