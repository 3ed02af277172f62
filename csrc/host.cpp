// The Python module `sbm_fast._host`: build facts, the CPU's level, and host versions of the shared
// formulas for known-answer tests. Tensor ops never go through here.
#include <pybind11/pybind11.h>

#include "build_facts.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr char kCompiler[] = __VERSION__;
#else
constexpr char kCompiler[] = "gcc " __VERSION__;
#endif

const char* volatile kSourceHash = "sbm_fast-source-hash:" SBM_SOURCE_HASH;  // see module.cpp

// What this process may run, whatever was compiled in.
const char* cpu_level() {
#if SBM_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return "avx512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["flags"] = SBM_FLAGS;
  info["torch"] = SBM_TORCH_VERSION;
  info["torch_target"] = SBM_TORCH_TARGET;
  info["source_hash"] = std::string(kSourceHash).substr(sizeof("sbm_fast-source-hash:") - 1);
  info["cuda"] = bool(SBM_CUDA);
  info["simd"] = py::str(SBM_SIMD).attr("split")();
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts, CPU level and host versions of the shared formulas.";
  m.def("build_info", &build_info, "How this library was compiled.");
  m.def("cpu_level", &cpu_level, "\"portable\", \"avx2\" or \"avx512\": what this CPU runs.");
}
