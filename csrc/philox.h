// Philox4x32-10, shared by every backend.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define SBM_BOTH __host__ __device__  // for members
#define SBM_HD static __host__ __device__ __forceinline__
#else
#define SBM_BOTH
#define SBM_HD static inline __attribute__((always_inline))
#endif

// Before a loop over a few compile-time steps, and before one over independent elements.
#if defined(__CUDA_ARCH__)
#define SBM_UNROLL _Pragma("unroll")
#define SBM_IVDEP
#elif defined(__CUDACC__)  // nvcc's look at the host code
#define SBM_UNROLL
#define SBM_IVDEP
#elif defined(__clang__)
#define SBM_UNROLL _Pragma("GCC unroll 16")
#define SBM_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define SBM_UNROLL _Pragma("GCC unroll 16")
#define SBM_IVDEP _Pragma("GCC ivdep")
#endif

namespace sbm {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // Weyl increments of the key
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kKeyDomain = 0x53424Du;  // "SBM": separates key derivation from the noise

struct Words {
  uint32_t w[4];
};

SBM_HD uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // from the multiplication of 64-bit numbers nvcc makes one instruction more
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

SBM_HD Words philox(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = wide_product(kPhiloxM0, c.w[0]), p1 = wide_product(kPhiloxM1, c.w[2]);
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ k1,
          uint32_t(p0)}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// The words of elements 4j … 4j+3 of the sample that owns `key`.
SBM_HD Words sample_words(uint64_t key, uint64_t j, uint32_t draw, uint32_t stream) {
  return philox({{uint32_t(j), uint32_t(j >> 32), draw, stream}}, uint32_t(key),
                uint32_t(key >> 32));
}

// The key of global sample b under `seed`.
SBM_HD uint64_t sample_key(uint64_t seed, uint64_t b) {
  const Words w = philox({{uint32_t(b), uint32_t(b >> 32), kKeyDomain, 0u}}, uint32_t(seed),
                         uint32_t(seed >> 32));
  return uint64_t(w.w[0]) | uint64_t(w.w[1]) << 32;
}

}  // namespace sbm
