// The CUDA that csrc/*.cu uses, for a C++ compiler: words, vector types, and device functions that
// ask the scheduler of ../emulator.cpp wherever threads meet.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <string>

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after another on one thread, so a block's memory is the thread's. The scheduler
// fills all of it with NaN bits before every block.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATED_VECTOR(T, name)                                          \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                      \
  struct name##3 { T x, y, z; };                                          \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }              \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTOR(float, float)
EMULATED_VECTOR(double, double)
EMULATED_VECTOR(int, int)
EMULATED_VECTOR(unsigned short, ushort)
EMULATED_VECTOR(long long, longlong)
EMULATED_VECTOR(unsigned long long, ulonglong)
#undef EMULATED_VECTOR
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
typedef struct EmulatedStream* cudaStream_t;

namespace emulator {

struct Launch {
  dim3 grid, block;
  size_t shared;
  std::function<void()> thread;  // one thread of the kernel
};
cudaError_t run(const Launch& launch);
const char* message(cudaError_t error);
cudaError_t attribute(int* value, cudaDeviceAttr which);
void* dynamic_shared();

// What threads do together; all must do it at one place of the program.
enum class Meeting : int { block, warp, ballot, shuffle };
struct Site {
  Meeting kind;
  const char* file;
  int line;
};
// The number of threads of the block that came with `value` != 0.
int meet_block(int value, Site site);
// What lane `source` brought, or for a ballot the lanes of `mask` whose value is not 0.
uint64_t meet_warp(unsigned mask, uint64_t value, int source, Site site);
int lane();

}  // namespace emulator

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) { return emulator::message(e); }
inline const char* cudaGetErrorName(cudaError_t e) { return emulator::message(e); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return emulator::attribute(value, which);
}
// Default arguments are made where the call stands: that is how a meeting knows its place.
#define EMULATED_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATED_AT(kind) \
  { emulator::Meeting::kind, file, line }

inline void __syncthreads(EMULATED_SITE) { emulator::meet_block(0, EMULATED_AT(block)); }
inline int __syncthreads_count(int v, EMULATED_SITE) {
  return emulator::meet_block(v, EMULATED_AT(block));
}
inline int __syncthreads_or(int v, EMULATED_SITE) {
  return emulator::meet_block(v, EMULATED_AT(block)) != 0;
}
inline int __syncthreads_and(int v, EMULATED_SITE) {
  return emulator::meet_block(!v, EMULATED_AT(block)) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, EMULATED_SITE) {
  emulator::meet_warp(mask, 0, 0, EMULATED_AT(warp));
}
inline unsigned __ballot_sync(unsigned mask, int v, EMULATED_SITE) {
  return unsigned(emulator::meet_warp(mask, v != 0, 0, EMULATED_AT(ballot)));
}
inline int __any_sync(unsigned mask, int v, EMULATED_SITE) {
  return emulator::meet_warp(mask, v != 0, 0, EMULATED_AT(ballot)) != 0;
}
inline int __all_sync(unsigned mask, int v, EMULATED_SITE) {
  return emulator::meet_warp(mask, v == 0, 0, EMULATED_AT(ballot)) == 0;
}
template <class T>
T emulated_shuffle(unsigned mask, T v, int source, emulator::Site site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to eight bytes");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  bits = emulator::meet_warp(mask, bits, source, site);
  memcpy(&v, &bits, sizeof v);
  return v;
}
// A source outside the lane's segment of `width` lanes gives the lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32, EMULATED_SITE) {
  const int first = emulator::lane() / width * width;
  return emulated_shuffle(mask, v, first + (from & (width - 1)), EMULATED_AT(shuffle));
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, EMULATED_SITE) {
  const int own = emulator::lane(), to = own + int(delta), end = own / width * width + width;
  return emulated_shuffle(mask, v, to < end ? to : own, EMULATED_AT(shuffle));
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, EMULATED_SITE) {
  const int own = emulator::lane(), to = own - int(delta), first = own / width * width;
  return emulated_shuffle(mask, v, to >= first ? to : own, EMULATED_AT(shuffle));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, EMULATED_SITE) {
  const int own = emulator::lane(), to = own ^ bits, end = own / width * width + width;
  return emulated_shuffle(mask, v, to < end ? to : own, EMULATED_AT(shuffle));
}

// One block at a time runs, and a thread gives way only at a meeting.
inline void __threadfence() {}
template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = T(old + v);
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  *p = old < v ? v : old;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  const unsigned old = *p;
  *p = old >= last ? 0 : old + 1;
  return old;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T, class V>
void __stcs(T* p, V v) {
  *p = v;
}
template <class T, class V>
void __stcg(T* p, V v) {
  *p = v;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class To, class From>
To emulated_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}
inline int __float_as_int(float v) { return emulated_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
inline float __int_as_float(int v) { return emulated_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
