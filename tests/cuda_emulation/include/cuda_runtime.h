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

#define EMULATED_VECTORS(T, name)                            \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(16) name##4 { T x, y, z, w; };              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(double, double)
EMULATED_VECTORS(unsigned, uint)
#undef EMULATED_VECTORS

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
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

inline const char* cudaGetErrorString(cudaError_t e) { return emulator::message(e); }

// Default arguments are made where the call stands: that is how a meeting knows its place.
#define EMULATED_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATED_AT(kind) {emulator::Meeting::kind, file, line}

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

// One block at a time runs, and a thread gives way only at a meeting.
inline void __threadfence() {}
template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = T(old + v);
  return old;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
