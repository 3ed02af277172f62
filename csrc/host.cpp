// The Python module `sbm_fast._host`: build facts, the CPU's level, and host versions of the shared
// formulas for known-answer tests. Tensor ops never go through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "build_facts.h"
#include "cpu_level.h"
#include "gaussian.h"
#include "philox.h"
#include "row.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr char kCompiler[] = __VERSION__;
#else
constexpr char kCompiler[] = "gcc " __VERSION__;
#endif

constexpr char kMark[] = "sbm_fast-source-hash:";
const char* volatile kSourceHash = "sbm_fast-source-hash:" SBM_SOURCE_HASH;  // see module.cpp

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["flags"] = SBM_FLAGS;
  info["torch"] = SBM_TORCH_VERSION;
  info["torch_target"] = SBM_TORCH_TARGET;
  info["source_hash"] = kSourceHash + sizeof(kMark) - 1;
  info["cuda"] = bool(SBM_CUDA);
  info["simd"] = py::str(SBM_SIMD).attr("split")();
  return info;
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter,
                               const std::array<uint32_t, 2>& key) {
  const auto out = sbm::philox({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {out.w[0], out.w[1], out.w[2], out.w[3]};
}

std::pair<float, float> box_muller(uint32_t word_radius, uint32_t word_angle) {
  std::pair<float, float> z;
  sbm::box_muller<sbm::ScalarPack>(word_radius, word_angle, z.first, z.second);
  return z;
}

template <class S>
S row(const std::vector<double>& coefficients, const std::vector<S>& values) {
  constexpr size_t kMost = sbm::kMaxSources;
  if (coefficients.size() != values.size() || values.size() > kMost) {
    throw std::invalid_argument("row: expected as many values as coefficients, at most " +
                                std::to_string(kMost) + ", got " + std::to_string(values.size()) +
                                " and " + std::to_string(coefficients.size()));
  }
  S hi[kMost] = {}, lo[kMost] = {}, v[kMost] = {};
  for (size_t k = 0; k < values.size(); ++k) {
    const auto parts = sbm::split<S>(coefficients[k]);
    hi[k] = parts.hi, lo[k] = parts.lo, v[k] = values[k];
  }
  return sbm::combine<S, kMost>(hi, lo, v);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  using py::arg;
  m.doc() = "Build facts, CPU level and host versions of the shared formulas.";
  m.def("build_info", &build_info, "How this library was compiled.");
  m.def("cpu_level", &sbm::cpu_level,
        "\"portable\", \"avx2\" or \"avx512\": what this processor runs, or less where the "
        "environment's SBM_FAST_CPU asks for less.");
  m.def("philox", &philox, "Philox4x32-10: four words.", arg("counter"), arg("key"));
  m.def("sample_key", &sbm::sample_key, "The 64-bit key of a sample.", arg("seed"), arg("sample"));
  m.def("uniform", &sbm::uniform<sbm::ScalarPack>, "u(w) = fma(float32(w), 2^-32, 2^-33).",
        arg("word"));
  m.def("box_muller", &box_muller,
        "Two normals: radius from the first word, angle from the second.", arg("word_radius"),
        arg("word_angle"));
  m.def("row_f32", &row<float>, "The sum of coefficients times values, as a float32 state gets it.",
        arg("coefficients"), arg("values"));
  m.def("row_f64", &row<double>,
        "The sum of coefficients times values, as a float64 state gets it.", arg("coefficients"),
        arg("values"));
}
