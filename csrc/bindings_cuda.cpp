// torch.ops.sbm_fast.* on CUDA tensors. Nothing here waits for the device or reads from it.
//
// With SBM_CUDA_EMULATED (tests/cuda_emulation) the same kernels serve CPU tensors, in a namespace
// of their own.
#include <cuda_runtime.h>

#include "bindings_common.h"
#include "kernels_cuda.h"

#ifdef SBM_CUDA_EMULATED
#define SBM_NAMESPACE sbm_fast_emulated
#define SBM_DISPATCH_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define SBM_NAMESPACE sbm_fast
#define SBM_DISPATCH_KEY CUDA
// In libtorch_cuda, which a CPU-only torch lacks: the library has to load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace {

void check(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
}

#ifdef SBM_CUDA_EMULATED
struct Device {
  explicit Device(const Tensor&) {}
  const Home home = Home::cpu();
  const cudaStream_t stream = nullptr;
};
#else
// The device of an op's first tensor, made current, and torch's stream there.
class Device {
 public:
  explicit Device(const Tensor& first)
      : home(Home::cuda(first)),
        stream(current_stream(home.cuda_device)),
        guard_(home.cuda_device) {}
  const Home home;
  const cudaStream_t stream;

 private:
  static cudaStream_t current_stream(int32_t device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    const auto failed = aoti_torch_get_current_cuda_stream(device, &stream);
    STD_TORCH_CHECK(!failed, "torch has no current stream on CUDA device ", device);
    return static_cast<cudaStream_t>(stream);
  }
  const torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// The caller's workspace, or one for this call; `own` keeps that alive until the launches are
// enqueued (torch hands the memory out again in the stream's order only).
template <class S>
S* workspace_of(const Home& home, const MaybeTensor& workspace, const sbm::StepArgs<S>& a,
                const Tensor& like, MaybeTensor& own) {
  const int64_t size = sbm::workspace_size(a.batch, a.numel);
  if (!workspace) {
    own = torch::stable::new_zeros(like, {size});
    return static_cast<S*>(own->data_ptr());
  }
  STD_TORCH_CHECK(home.has(*workspace) && workspace->scalar_type() == state_dtype<S>() &&
                      workspace->is_contiguous() && workspace->numel() >= size,
                  "workspace: expected what workspace_for(x) gives, ", size,
                  " numbers of x's dtype on its device");
  return static_cast<S*>(workspace->data_ptr());
}

// A step may write its time before another block has read F.
template <class S>
void check_time(const sbm::StepArgs<S>& a) {
  if (!a.net_time) return;
  TensorView time;
  time.data = a.net_time;
  time.dtype = a.x.dtype;
  time.sample_stride = 1;
  check_alias(a.network, time, a.batch, "network", "net_time");
  check_alias(a.uncond, time, a.batch, "uncond", "net_time");
}

template <class S>
void step(const Tensor& x, const MaybeTensor& network, const MaybeTensor& uncond,
          const MaybeTensor& guidance, const MaybeTensor& registers, const Tensor& keys,
          const Tensor& row, const Tensor& coef, const Tensor& field, const MaybeTensor& epsilon,
          const MaybeTensor& noise, const MaybeTensor& net_input, const MaybeTensor& net_time,
          const MaybeTensor& first_bad, const MaybeTensor& workspace, bool coupled) {
  const Device device(x);
  const auto a = step_args<S>(device.home, x, network, uncond, guidance, registers, keys, row, coef,
                              field, epsilon, noise, net_input, net_time, first_bad);
  check_time(a);
  MaybeTensor own;
  S* memory = nullptr;
  if (sbm::needs_workspace(a, coupled)) memory = workspace_of(device.home, workspace, a, x, own);
  check(sbm::affine_step_cuda(a, memory, coupled, device.stream), "affine_step_");
}

void affine_step_(Tensor x, const MaybeTensor& network, const MaybeTensor& uncond,
                  const MaybeTensor& guidance, const MaybeTensor& registers, const Tensor& keys,
                  const Tensor& row, const Tensor& coef, const Tensor& field,
                  const MaybeTensor& epsilon, const MaybeTensor& noise,
                  const MaybeTensor& net_input, const MaybeTensor& net_time,
                  const MaybeTensor& first_bad, const MaybeTensor& workspace, bool coupled) {
  const auto run = is_double(x) ? step<double> : step<float>;
  run(x, network, uncond, guidance, registers, keys, row, coef, field, epsilon, noise, net_input,
      net_time, first_bad, workspace, coupled);
}

template <class S>
void epsilon_of(const Tensor& epsilon, const Tensor& x, const Tensor& network,
                const MaybeTensor& uncond, const MaybeTensor& guidance, const Tensor& keys,
                const Tensor& row, const Tensor& coef, const Tensor& field,
                const MaybeTensor& noise) {
  const Device device(x);
  const auto a =
      common_args<S>(device.home, x, network, uncond, guidance, keys, row, coef, field, noise);
  S* to = vector<S>(device.home, epsilon, a.batch, state_dtype<S>(), "epsilon");
  MaybeTensor own;
  S* memory = workspace_of(device.home, {}, a, x, own);
  check(sbm::langevin_epsilon_cuda(a, to, memory, true, device.stream), "langevin_epsilon_");
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
  const Device device(out);
  const int64_t batch = samples(out, "out");
  const uint64_t* key = key_vector(device.home, keys, batch, "keys");
  check(sbm::noise_cuda(noise_view(device.home, out, kind), batch, numel_of_sample(out), key,
                        uint32_t(draw), uint32_t(stream), kind, device.stream),
        "noise");
}

void keys_(Tensor out, int64_t seed, int64_t first_sample) {
  const Device device(out);
  uint64_t* key = key_vector(device.home, out, samples(out, "out"), "out");
  check(sbm::keys_cuda(key, out.size(0), uint64_t(seed), uint64_t(first_sample), device.stream),
        "keys_");
}

}  // namespace

#ifdef SBM_CUDA_EMULATED
STABLE_TORCH_LIBRARY(sbm_fast_emulated, m) { define_ops(m); }
#endif

#define SBM_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
SBM_LIBRARY_IMPL(SBM_NAMESPACE, SBM_DISPATCH_KEY, m) {
  m.impl("normal_", TORCH_BOX(&fill_<sbm::NoiseKind::normal>));
  m.impl("uniform_", TORCH_BOX(&fill_<sbm::NoiseKind::uniform>));
  m.impl("rademacher_", TORCH_BOX(&fill_<sbm::NoiseKind::rademacher>));
  m.impl("words_", TORCH_BOX(&fill_<sbm::NoiseKind::words>));
  m.impl("keys_", TORCH_BOX(&keys_));
  m.impl("affine_step_", TORCH_BOX(&affine_step_));
  m.impl("langevin_epsilon_", TORCH_BOX(&langevin_epsilon_));
}
