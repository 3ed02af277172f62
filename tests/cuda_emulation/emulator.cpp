// Runs CUDA kernels on one CPU thread: blocks one after another, the threads of a block as fibers
// that give way only where threads meet (barriers, shuffles, votes). The order of blocks and
// threads is free: forward, backward or shuffled, so that what rests on an order shows.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kMostShared = 163 * 1024;  // of a block on sm_80
constexpr int kNaN = 0xff;                  // as every byte of a float or double

// What the tests set and read through the functions at the end.
struct Control {
  int64_t seed = 0;         // 0 forward, 1 backward, else shuffled
  int64_t last_blocks = 0;  // where not 0, only these blocks of a grid run
  int64_t launches = 0;
} control;

enum class State { fresh, ready, at_block, at_warp, done };
struct Thread {
  State state = State::fresh;
  int fiber = -1;
  Site site{};
  unsigned mask = 0;
  int source = 0;
  uint64_t value = 0, result = 0;
};

// Everything of the block that runs now.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  void* stack;
  bool made, begun;
};
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<int> idle;
std::vector<Thread> threads;
size_t arrived = 0;                   // threads at a barrier or ended
std::vector<size_t> arrived_in_warp;  // at a meeting of their warp
bool ended = false;                   // some thread has
const Launch* current_launch = nullptr;
int current = -1;
std::string failure;
std::unique_ptr<char[]> shared;

// Between scheduler and fibers: jumps, since swapcontext would ask the system for the signal mask.
jmp_buf scheduler;
void give_way() {
  if (!_setjmp(fibers[size_t(threads[current].fiber)]->at)) _longjmp(scheduler, 1);
}
void resume(Fiber& f) {
  if (_setjmp(scheduler)) return;
  if (f.begun) _longjmp(f.at, 1);
  f.begun = true;
  setcontext(&f.context);
}

std::string place(Site s) {
  const char* const name = strrchr(s.file, '/');
  return std::string(name ? name + 1 : s.file) + ":" + std::to_string(s.line);
}

// Ends the launch with an error; a fiber never comes back from it.
void fail(const std::string& what) {
  if (current < 0) {  // host code
    fprintf(stderr, "emulator: %s\n", what.c_str());
    abort();
  }
  if (failure.empty())
    failure = what + " (block " + std::to_string(blockIdx.x) + ", thread " +
              std::to_string(current) + ")";
  for (;;) give_way();
}

bool same_place(const Site& a, const Site& b) {
  return a.kind == b.kind && a.line == b.line && !strcmp(a.file, b.file);
}

// Lets a barrier's threads go once every thread that still runs has come.
void open_barrier() {
  if (++arrived < threads.size()) return;
  const Site* site = nullptr;
  uint64_t count = 0;
  for (const Thread& t : threads) {
    if (t.state == State::done) continue;
    if (site && !same_place(*site, t.site))
      fail("divergent barrier: " + place(*site) + " and " + place(t.site));
    site = &t.site;
    count += t.value != 0;
  }
  for (Thread& t : threads)
    if (t.state == State::at_block) t.state = State::ready, t.result = count, --arrived;
}

size_t warp_begin(int thread) { return size_t(thread) / 32 * 32; }

void open_warp(unsigned mask) {
  const size_t first = warp_begin(current), end = std::min(first + 32, threads.size());
  const Thread& own = threads[size_t(current)];
  uint64_t votes = 0;
  size_t& here = arrived_in_warp[first / 32];
  if (++here < size_t(__builtin_popcount(mask)) && first + 32 <= threads.size() && !ended) return;
  for (size_t i = first; i < first + 32; ++i) {
    if (!(mask >> (i - first) & 1)) continue;
    if (i >= end || threads[i].state == State::done)
      fail("the mask at " + place(own.site) + " names a lane that has ended");
    const Thread& t = threads[i];
    if (t.state != State::at_warp) return;
    if (t.mask != mask || !same_place(t.site, own.site))
      fail("divergent warp: " + place(own.site) + " and " + place(t.site));
    votes |= uint64_t(t.value != 0) << (i - first);
  }
  for (size_t i = first; i < end; ++i) {
    if (!(mask >> (i - first) & 1)) continue;
    Thread& t = threads[i];
    if (t.site.kind == Meeting::shuffle && !(mask >> t.source & 1))
      fail("the shuffle at " + place(own.site) + " reads a lane that takes no part");
    t.result = t.site.kind == Meeting::shuffle ? threads[first + size_t(t.source)].value : votes;
    t.state = State::ready;
    --here;
  }
}

void fiber_main() {
  for (;;) {
    current_launch->thread();
    Thread& t = threads[size_t(current)];
    t.state = State::done;
    ended = true;
    open_barrier();
    idle.push_back(t.fiber);
    give_way();
  }
}

int free_fiber() {
  if (idle.empty()) {
    fibers.push_back(std::make_unique<Fiber>());
    void* const stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fibers.back()->stack = stack;
    idle.push_back(int(fibers.size()) - 1);
  }
  const int f = idle.back();
  idle.pop_back();
  Fiber& fiber = *fibers[size_t(f)];
  if (!fiber.made) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack, fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.made = true, fiber.begun = false;
  }
  return f;
}

// The thread-local memory of this library in this thread: what __shared__ declares, and the
// variables above.
struct Memory {
  void* begin;
  size_t size;
};

int find_module(dl_phdr_info* info, size_t, void* found) {
  Dl_info module;
  dladdr(reinterpret_cast<void*>(&run), &module);
  if (module.dli_fbase != reinterpret_cast<void*>(info->dlpi_addr)) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS)
      *static_cast<Memory*>(found) = {info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz};
  return 1;
}

std::vector<int64_t> order(int64_t first, int64_t end, uint64_t salt) {
  std::vector<int64_t> o(size_t(end - first));
  std::iota(o.begin(), o.end(), first);
  if (control.seed == 1) std::reverse(o.begin(), o.end());
  if (control.seed > 1) std::shuffle(o.begin(), o.end(), std::mt19937_64(control.seed ^ salt));
  return o;
}

void set_built_ins(const Launch& l, uint64_t block) {
  gridDim = l.grid, blockDim = l.block;
  blockIdx = {unsigned(block % l.grid.x), unsigned(block / l.grid.x % l.grid.y),
              unsigned(block / l.grid.x / l.grid.y)};
}

void run_block(const Launch& l, uint64_t block, Memory declared) {
  memset(declared.begin, kNaN, declared.size);
  shared.reset(new char[l.shared + 1]);  // on its own, so that AddressSanitizer sees its end
  memset(shared.get(), kNaN, l.shared);
  set_built_ins(l, block);
  threads.assign(l.block.x * l.block.y * l.block.z, Thread{});
  arrived_in_warp.assign(threads.size() / 32 + 1, 0);
  arrived = 0, ended = false;
  const auto turns = order(0, int64_t(threads.size()), block);
  for (bool moved = true; moved && failure.empty();) {
    moved = false;
    for (int64_t i : turns) {
      Thread& t = threads[size_t(i)];
      if (t.state != State::fresh && t.state != State::ready) continue;
      if (t.state == State::fresh) t.fiber = free_fiber();
      t.state = State::ready;
      current = int(i);
      const unsigned n = unsigned(i);
      threadIdx = {n % l.block.x, n / l.block.x % l.block.y, n / l.block.x / l.block.y};
      resume(*fibers[size_t(t.fiber)]);
      moved = true;
      if (!failure.empty()) break;
    }
  }
  current = -1;
  for (const Thread& t : threads)
    if (failure.empty() && t.state != State::done)
      failure = "deadlock: block " + std::to_string(block) + " waits at " + place(t.site);
}

}  // namespace

cudaError_t run(const Launch& l) {
  ++control.launches;
  const uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  const unsigned size = l.block.x * l.block.y * l.block.z;
  if (!blocks || l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535 || !size ||
      size > 1024)
    return cudaErrorInvalidConfiguration;
  if (l.shared > kMostShared) return cudaErrorInvalidValue;
  current_launch = &l;
  failure.clear();
  set_built_ins(l, 0);  // thread-local memory exists from its first use on
  Memory declared{};
  dl_iterate_phdr(find_module, &declared);
  const int64_t skip = control.last_blocks ? int64_t(blocks) - control.last_blocks : 0;
  for (int64_t b : order(std::max<int64_t>(skip, 0), int64_t(blocks), 0)) {
    run_block(l, uint64_t(b), declared);
    if (failure.empty()) continue;
    // Fibers that stand in the middle of a thread begin anew.
    idle.clear();
    for (size_t f = 0; f < fibers.size(); ++f) fibers[f]->made = false, idle.push_back(int(f));
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

int meet_block(int value, Site site) {
  const int own = current;
  Thread& t = threads[size_t(own)];
  t.site = site, t.value = uint64_t(value), t.state = State::at_block;
  open_barrier();
  give_way();
  return int(t.result);
}

uint64_t meet_warp(unsigned mask, uint64_t value, int source, Site site) {
  Thread& t = threads[size_t(current)];
  if (!(mask >> lane() & 1)) fail("the mask at " + place(site) + " leaves out its own lane");
  t.site = site, t.mask = mask, t.value = value, t.source = source, t.state = State::at_warp;
  open_warp(mask);
  give_way();
  return t.result;
}

int lane() { return current % 32; }
void* dynamic_shared() { return shared.get(); }

const char* message(cudaError_t e) {
  if (e == cudaErrorLaunchFailure) return failure.c_str();
  return e == cudaSuccess             ? "no error"
         : e == cudaErrorInvalidValue ? "invalid argument"
                                      : "invalid configuration argument";
}

}  // namespace emulator

#pragma GCC visibility push(default)
extern "C" {
void emulator_order(int64_t seed) { emulator::control.seed = seed; }
void emulator_last_blocks(int64_t count) { emulator::control.last_blocks = count; }
int64_t emulator_launches() { return emulator::control.launches; }

// -fsanitize=undefined calls these; each has the source's place as the first thing in `data`.
struct Found {
  const char* file;
  unsigned line, column;
};
#define SANITIZER(name, ...)                                                                   \
  void __ubsan_handle_##name(Found* data, ##__VA_ARGS__) {                                     \
    emulator::fail(std::string(#name " at ") + data->file + ":" + std::to_string(data->line)); \
  }
void __ubsan_handle_type_mismatch_v1(Found* data, void* address) {
  char text[32];
  snprintf(text, sizeof text, " (address %p)", address);
  emulator::fail(std::string("misaligned access at ") + data->file + ":" +
                 std::to_string(data->line) + text);
}
SANITIZER(out_of_bounds, void*)
SANITIZER(shift_out_of_bounds, void*, void*)
SANITIZER(add_overflow, void*, void*)
SANITIZER(sub_overflow, void*, void*)
SANITIZER(mul_overflow, void*, void*)
SANITIZER(negate_overflow, void*)
SANITIZER(divrem_overflow, void*, void*)
}
#pragma GCC visibility pop
