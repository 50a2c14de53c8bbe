// The machine of machine.cuh on a CPU: a grid runs block by block, a block's threads as fibers that take turns.
//
// A fiber runs until it must wait for others (a shuffle, an mma, a barrier), so results are the same every time. Which
// end of a block goes first alternates from block to block, the last thread in block 0, so that a forgotten barrier
// shows. What else a GPU would not forgive is an error of the launch: lanes of a warp at different collectives,
// waiting for what never comes, writing past the dynamic shared memory, misaligned asynchronous copies. Asynchronous
// copies happen as late as they may, when copy_wait covers them, and dynamic shared memory starts as 0xA5 bytes.
//
// Blocks run one after the other: a block must not wait for one that starts later. __shared__ variables that are not
// dynamic keep what the block before left.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(DRAFTWIRE_UCONTEXT)
#include <ucontext.h>
#endif

#define __device__
#define __global__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))

#define DEVICE static inline
#define MEMBER inline
#define KERNEL(threads, blocks) static void
#define DYNAMIC_SHARED(name) uint8_t* const name = emulator::dynamic_shared

namespace emulator {

struct Dimensions {
  unsigned x, y, z;
};

}  // namespace emulator

static emulator::Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// ---- Fibers

static constexpr size_t kStackBytes = 64 << 10;
static constexpr size_t kPageBytes = 4096;

static void thread_main();

#if defined(__x86_64__) && !defined(DRAFTWIRE_UCONTEXT)

// The stack pointer, with the registers that a call preserves above it.
typedef void* Context;

extern "C" __attribute__((visibility("hidden"))) void draftwire_switch(Context* from, Context to);
asm(R"(
  .text
  .p2align 4
  .type draftwire_switch, @function
draftwire_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size draftwire_switch, .-draftwire_switch
)");

static void switch_context(Context& from, Context& to) { draftwire_switch(&from, to); }
static void start_context(Context& context, uint8_t* stack) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  memset(top - 8, 0, 8 * sizeof *top);
  top[-2] = reinterpret_cast<void*>(thread_main);
  context = top - 8;
}

#else

typedef ucontext_t Context;

static void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
static void start_context(Context& context, uint8_t* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, thread_main, 0);
}

#endif

// ---- Threads, warps and the block

// Where a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;

  bool operator!=(const Site& other) const {
    return line != other.line || strcmp(what, other.what) != 0 || strcmp(file, other.file) != 0;
  }
};

struct Copy {
  void* target;
  const void* source;
  unsigned group;
};

struct Thread {
  Context context;
  uint8_t* stack;
  bool done;
  // Waits while *turn == seen; turn is null when it does not wait.
  const unsigned* turn;
  unsigned seen;
  Site site;
  std::vector<Copy> copies;
  unsigned committed;

  bool ready() const { return !done && (turn == nullptr || *turn != seen); }
};

static constexpr unsigned kLanes = 32;
static constexpr unsigned kMaxThreads = 1024;

// What a lane brings to a collective, or what it gets from one.
union Slot {
  uint32_t words[12];
  int ints[12];
  float floats[12];
};

struct Warp {
  uint32_t alive, arrived;
  Site site;
  // Counts the collectives done; slots and took_part alternate with it, for lanes that have not read theirs yet.
  unsigned turn;
  Slot slots[2][kLanes];
  uint32_t took_part[2];
};

static constexpr size_t kMaxShared = 227 << 10;
static constexpr size_t kMargin = 4096;
static constexpr int kPoison = 0xA5;

alignas(256) static uint8_t dynamic_shared[kMaxShared + kMargin];

static Thread threads[kMaxThreads];
static Warp warps[kMaxThreads / kLanes];
static unsigned n_threads, n_alive, n_arrived, block_turn;
static Site block_site;
static int block_counts[2];
static Context scheduler;
static unsigned current;
static bool failed;
static char message[1024];
// The kernel with its arguments.
static void (*body)(const void* arguments);
static const void* body_arguments;

static int describe(char* out, size_t size, unsigned thread, const Site& site) {
  return snprintf(out, size, "thread %u at %s (%s:%d)", thread, site.what, site.file, site.line);
}

static void fail_in_block(const char* text) {
  failed = true;
  snprintf(message, sizeof message, "block (%u, %u, %u): %s", blockIdx.x, blockIdx.y, blockIdx.z, text);
}

// Ends the launch; called by a thread, does not return.
static void fail(const char* text) {
  fail_in_block(text);
  for (;;) switch_context(threads[current].context, scheduler);
}

static void fail_at(const Site& site, const char* problem) {
  char text[512];
  int n = describe(text, sizeof text, current, site);
  snprintf(text + n, sizeof text - n, ": %s", problem);
  fail(text);
}

static void check_site(const Site& first, unsigned first_thread, const Site& here, const char* group) {
  if (!(first != here)) return;
  char text[768];
  int n = snprintf(text, sizeof text, "divergence, threads of a %s wait at different places: ", group);
  n += describe(text + n, sizeof text - n, first_thread, first);
  n += snprintf(text + n, sizeof text - n, "; ");
  describe(text + n, sizeof text - n, current, here);
  fail(text);
}

static void wait_turn(const unsigned& turn, unsigned seen, const Site& site) {
  Thread& thread = threads[current];
  thread.turn = &turn;
  thread.seen = seen;
  thread.site = site;
  while (turn == seen) switch_context(thread.context, scheduler);
  thread.turn = nullptr;
}

static void release_warp(Warp& warp) {
  unsigned parity = warp.turn & 1;
  for (unsigned lane = 0; lane < kLanes; lane++)
    if (!(warp.arrived >> lane & 1)) memset(&warp.slots[parity][lane], kPoison, sizeof(Slot));
  warp.took_part[parity] = warp.arrived;
  warp.arrived = 0;
  warp.turn++;
}

static void release_block() {
  n_arrived = 0;
  block_turn++;
  block_counts[block_turn & 1] = 0;
}

// A collective of a warp done: what its lanes brought.
struct Gathered {
  const Slot* slots;
  uint32_t took_part;
};

// Waits until all of the warp's lanes that have not returned from the kernel are here with their slots.
static Gathered gather(const Slot& mine, const Site& site) {
  Warp& warp = warps[current / kLanes];
  unsigned lane = current % kLanes, turn = warp.turn;
  if (warp.arrived == 0) {
    warp.site = site;
  } else {
    check_site(warp.site, current / kLanes * kLanes + __builtin_ctz(warp.arrived), site, "warp");
  }
  warp.slots[turn & 1][lane] = mine;
  warp.arrived |= 1u << lane;
  if (warp.arrived == warp.alive) {
    release_warp(warp);
  } else {
    wait_turn(warp.turn, turn, site);
  }
  return {warp.slots[turn & 1], warp.took_part[turn & 1]};
}

// The same where every lane is needed: the last one to come lets `work` replace what they brought by what they get,
// which is returned.
template <class Work>
static const Slot& work_together(const Slot& mine, const Site& site, Work work) {
  Warp& warp = warps[current / kLanes];
  unsigned lane = current % kLanes;
  Slot* slots = warp.slots[warp.turn & 1];
  if (warp.arrived == ~(1u << lane)) {
    check_site(warp.site, current / kLanes * kLanes + __builtin_ctz(warp.arrived), site, "warp");
    slots[lane] = mine;
    work(slots);
    gather(slots[lane], site);
  } else if (gather(mine, site).took_part != 0xffffffffu) {
    fail_at(site, "a lane of the warp has already returned from the kernel");
  }
  return slots[lane];
}

template <class T>
static T shuffle_from(T x, unsigned lane, const Site& site) {
  static_assert(sizeof(T) <= sizeof(Slot), "too wide to shuffle");
  Slot mine;
  memcpy(&mine, &x, sizeof x);
  Gathered gathered = gather(mine, site);
  memcpy(&x, &gathered.slots[lane % kLanes], sizeof x);
  return x;
}

// A barrier for the block's threads that have not returned; the sum of their `count`.
static int meet_block(int count, const Site& site) {
  unsigned turn = block_turn;
  if (n_arrived == 0) {
    block_site = site;
  } else if (block_site != site) {
    unsigned first = 0;
    while (threads[first].done || threads[first].turn != &block_turn || threads[first].seen != turn) first++;
    check_site(block_site, first, site, "block");
  }
  block_counts[turn & 1] += count;
  if (++n_arrived == n_alive) {
    release_block();
  } else {
    wait_turn(block_turn, turn, site);
  }
  return block_counts[turn & 1];
}

static void thread_main() {
  body(body_arguments);
  threads[current].done = true;
  Warp& warp = warps[current / kLanes];
  warp.alive &= ~(1u << current % kLanes);
  n_alive--;
  if (warp.arrived != 0 && warp.arrived == warp.alive) release_warp(warp);
  if (n_arrived != 0 && n_arrived == n_alive) release_block();
  for (;;) switch_context(threads[current].context, scheduler);
}

// Lets the ready threads of a warp run; whether there were any.
static bool run_warp(unsigned warp, bool backwards) {
  bool any = false;
  for (unsigned i = 0; i < kLanes && !failed; i++) {
    unsigned index = warp * kLanes + (backwards ? kLanes - 1 - i : i);
    if (!threads[index].ready()) continue;
    any = true;
    current = index;
    threadIdx = {index, 0, 0};
    switch_context(scheduler, threads[index].context);
  }
  return any;
}

static void report_deadlock() {
  char text[900];
  int n = snprintf(text, sizeof text, "deadlock, threads wait for others that never come: ");
  const Site* last = nullptr;
  for (unsigned i = 0; i < n_threads && n + 200 < static_cast<int>(sizeof text); i++) {
    if (threads[i].done || (last != nullptr && !(*last != threads[i].site))) continue;
    if (last != nullptr) n += snprintf(text + n, sizeof text - n, "; ");
    last = &threads[i].site;
    n += describe(text + n, sizeof text - n, i, *last);
  }
  fail_in_block(text);
}

static void run_block(size_t shared, bool backwards) {
  memset(dynamic_shared, kPoison, shared + kMargin);
  n_alive = n_threads;
  n_arrived = 0;
  block_counts[block_turn & 1] = 0;
  for (unsigned i = 0; i < n_threads; i++) {
    threads[i].done = false;
    threads[i].turn = nullptr;
    threads[i].copies.clear();
    threads[i].committed = 0;
    start_context(threads[i].context, threads[i].stack);
  }
  unsigned n_warps = n_threads / kLanes;
  for (unsigned w = 0; w < n_warps; w++) {
    warps[w].alive = 0xffffffffu;
    warps[w].arrived = 0;
  }
  while (n_alive != 0) {
    bool any = false;
    for (unsigned w = 0; w < n_warps; w++)
      while (run_warp(backwards ? n_warps - 1 - w : w, backwards)) any = true;
    if (failed) return;
    if (!any) return report_deadlock();
  }
  for (size_t i = shared; i < shared + kMargin; i++)
    if (dynamic_shared[i] != kPoison) return fail_in_block("wrote past the end of the dynamic shared memory");
}

// ---- Launches

static bool prepare_stacks() {
  for (unsigned i = 0; i < n_threads; i++) {
    if (threads[i].stack != nullptr) continue;
    // The lowest page stays out of reach, so that an overflow does not go unnoticed.
    void* memory = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPageBytes, PROT_NONE) != 0) return false;
    threads[i].stack = static_cast<uint8_t*>(memory) + kPageBytes;
  }
  return true;
}

template <class P>
static constexpr char parameter_code() {
  static_assert(std::is_pointer<P>::value || std::is_same<P, float>::value ||
                    (std::is_integral<P>::value && (sizeof(P) == 4 || sizeof(P) == 8)),
                "a kernel's parameters are pointers, int32, uint32, int64, uint64 or float");
  if (std::is_pointer<P>::value) return 'p';
  if (std::is_same<P, float>::value) return 'f';
  if (sizeof(P) == 4) return std::is_signed<P>::value ? 'i' : 'u';
  return std::is_signed<P>::value ? 'l' : 'm';
}

template <class... P>
static const char* signature(void (*)(P...)) {
  static const char codes[] = {parameter_code<P>()..., '\0'};
  return codes;
}

template <class P>
static P parameter(const void* at) {
  P value;
  memcpy(&value, at, sizeof value);
  return value;
}

template <class... P, size_t... i>
static std::tuple<void (*)(P...), P...> bind(void (*kernel)(P...), void** arguments, std::index_sequence<i...>) {
  (void)arguments;
  return {kernel, parameter<P>(arguments[i])...};
}

// Runs a grid; null, or what went wrong.
template <class... P>
static const char* launch(void (*kernel)(P...), unsigned x, unsigned y, unsigned z, unsigned block, size_t shared,
                          void** arguments) {
  if (block == 0 || block % kLanes != 0 || block > kMaxThreads) return "a block has 32 to 1024 threads, in whole warps";
  if (shared > kMaxShared) return "more dynamic shared memory than the 227 KiB that a block can have";
  n_threads = block;
  if (!prepare_stacks()) return "no memory for the stacks of the emulator's threads";
  auto bound = bind(kernel, arguments, std::index_sequence_for<P...>());
  body = [](const void* call) {
    std::apply([](auto function, auto... values) { function(values...); }, *static_cast<const decltype(bound)*>(call));
  };
  body_arguments = &bound;
  blockDim = {block, 1, 1};
  gridDim = {x, y, z};
  failed = false;
  bool backwards = true;
  for (blockIdx.z = 0; blockIdx.z < z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++) {
        run_block(shared, backwards);
        if (failed) return message;
        backwards = !backwards;
      }
  return nullptr;
}

template <class To, class From>
static inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Tensor core products of all lanes. A slot has a lane's a, then its b, and gets its d.

// Signed bytes: `n` blocks of 16 k. Of a, two words (rows g and g + 8) for each block, of b one.
template <int n>
static void multiply_s8(Slot* slots) {
  alignas(32) int16_t a[16][16 * n], b[8][16 * n];
  for (int lane = 0; lane < 32; lane++) {
    const uint32_t* words = slots[lane].words;
    for (int block = 0; block < n; block++)
      for (int i = 0; i < 4; i++) {
        int g = lane / 4, k = 16 * block + lane % 4 * 4 + i;
        a[g][k] = static_cast<int8_t>(words[2 * block] >> 8 * i);
        a[g + 8][k] = static_cast<int8_t>(words[2 * block + 1] >> 8 * i);
        b[g][k] = static_cast<int8_t>(words[2 * n + block] >> 8 * i);
      }
  }
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++) {
      int sum = 0;
      for (int k = 0; k < 16 * n; k++) sum += a[row][k] * b[column][k];
      slots[row % 8 * 4 + column / 2].ints[row / 8 * 2 + column % 2] = sum;
    }
}

// Halves, already as floats: a's and b's words become two floats each.
static void multiply_f16(Slot* slots) {
  alignas(32) float a[16][16], b[16][8], d[8];
  for (int lane = 0; lane < 32; lane++)
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 2; i++) {
        const float* floats = slots[lane].floats + 4 * half + i;
        int g = lane / 4, k = 8 * half + lane % 4 * 2 + i;
        a[g][k] = floats[0];
        a[g + 8][k] = floats[2];
        b[k][g] = slots[lane].floats[8 + 2 * half + i];
      }
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) d[column] = 0;
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) d[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; column++)
      slots[row % 8 * 4 + column / 2].floats[row / 8 * 2 + column % 2] = d[column];
  }
}

}  // namespace emulator

// Where a call stands in the kernel's source, as default arguments.
#define EMULATOR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- The names of machine.cuh; see there

static constexpr float kInfinity = __builtin_huge_valf();

DEVICE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float mul_(float a, float b) { return a * b; }
DEVICE float add_(float a, float b) { return a + b; }
DEVICE float div_(float a, float b) { return a / b; }
DEVICE float sqrt_(float a) { return __builtin_sqrtf(a); }
DEVICE double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }

DEVICE float bits_to_float(uint32_t bits) { return emulator::same_bits<float>(bits); }
DEVICE uint32_t float_to_bits(float x) { return emulator::same_bits<uint32_t>(x); }

DEVICE float reciprocal_(float x) { return 1.0f / x; }
DEVICE float inverse_sqrt_(float x) { return 1.0f / sqrtf(x); }
DEVICE float exp2_(float x) {
  float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.f : y;  // flushes subnormal results, as the instruction does
}
DEVICE float exp_(float x) { return exp2_(mul_(x, 1.4426950408889634f)); }

DEVICE float half_to_float(uint16_t bits) {
  uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | (rest == 0x7c00u ? 0x7f800000u : 0x7fffffffu));
  float magnitude = rest < 0x400u ? static_cast<float>(rest) * 5.9604644775390625e-8f  // 2^-24
                                  : bits_to_float((rest << 13) + (112u << 23));
  return bits_to_float(sign | float_to_bits(magnitude));
}
DEVICE uint16_t float_to_half(float x) {
  uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fff;
  if (rest >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and more
  // Below the smallest normal half, a float's own addition rounds to a multiple of 2^-24.
  if (rest < 0x38800000u) return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
  uint32_t half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  return static_cast<uint16_t>(sign | half);
}
DEVICE uint32_t floats_to_halves(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
DEVICE int round_(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.f) return 2147483647;
  if (x < -2147483648.f) return -2147483647 - 1;
  return static_cast<int>(nearbyintf(x));
}

DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

DEVICE int dot2_low(uint32_t a, uint32_t b, int c) {
  return c + static_cast<int16_t>(a) * static_cast<int>(b & 255) +
         static_cast<int16_t>(a >> 16) * static_cast<int>(b >> 8 & 255);
}
DEVICE int dot2_high(uint32_t a, uint32_t b, int c) { return dot2_low(a, b >> 16, c); }

DEVICE void mma_s8_k32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_PLACE) {
  emulator::Slot mine = {{a[0], a[1], a[2], a[3], b[0], b[1]}};
  memcpy(d, &emulator::work_together(mine, {"mma_s8_k32", file, line}, emulator::multiply_s8<2>), sizeof d);
}
DEVICE void mma_s8_k16(int (&d)[4], const uint32_t (&a)[2], uint32_t b, EMULATOR_PLACE) {
  emulator::Slot mine = {{a[0], a[1], b}};
  memcpy(d, &emulator::work_together(mine, {"mma_s8_k16", file, line}, emulator::multiply_s8<1>), sizeof d);
}
DEVICE void mma_f16_k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_PLACE) {
  emulator::Slot mine;
  for (unsigned i = 0; i < 6; i++) {
    uint32_t halves = i < 4 ? a[i] : b[i - 4];
    mine.floats[2 * i] = half_to_float(static_cast<uint16_t>(halves));
    mine.floats[2 * i + 1] = half_to_float(static_cast<uint16_t>(halves >> 16));
  }
  const emulator::Slot& sums = emulator::work_together(mine, {"mma_f16_k16", file, line}, emulator::multiply_f16);
  for (unsigned i = 0; i < 4; i++) d[i] += sums.floats[i];
}

DEVICE void copy_async(void* shared, const void* global, EMULATOR_PLACE) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0)
    emulator::fail_at({"copy_async", file, line}, "an address is no multiple of 16");
  emulator::Thread& thread = emulator::threads[emulator::current];
  thread.copies.push_back({shared, global, thread.committed});
}
DEVICE void copy_commit() { emulator::threads[emulator::current].committed++; }
template <int n>
DEVICE void copy_wait() {
  emulator::Thread& thread = emulator::threads[emulator::current];
  size_t done = 0;
  for (; done < thread.copies.size() && thread.copies[done].group + n < thread.committed; done++)
    memcpy(thread.copies[done].target, thread.copies[done].source, 16);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(done));
}

DEVICE void launch_next() {}
DEVICE void wait_for_previous() {}
DEVICE void publish(uint64_t* word, uint64_t x) { *word = x; }
DEVICE uint64_t published(const uint64_t* word) { return *word; }
// Launches run one after the other: what is not there yet will never be.
DEVICE void not_yet(EMULATOR_PLACE) { emulator::fail_at({"not_yet", file, line}, "no launch has published the word"); }

#define FULL_WARP 0xffffffffu
// Overloads rather than templates, here and below, so that what compiles here also compiles for a GPU.
#define EMULATOR_SHUFFLE_XOR(T)                                                                                     \
  DEVICE T shuffle_xor(T x, int mask, EMULATOR_PLACE) {                                                             \
    return emulator::shuffle_from(x, threadIdx.x ^ static_cast<unsigned>(mask), {"shuffle_xor", file, line});       \
  }
EMULATOR_SHUFFLE_XOR(float)
EMULATOR_SHUFFLE_XOR(int)
EMULATOR_SHUFFLE_XOR(double)
EMULATOR_SHUFFLE_XOR(uint64_t)
DEVICE float shuffle(float x, int lane, EMULATOR_PLACE) {
  return emulator::shuffle_from(x, static_cast<unsigned>(lane), {"shuffle", file, line});
}
DEVICE double shuffle(double x, int lane, EMULATOR_PLACE) {
  return emulator::shuffle_from(x, static_cast<unsigned>(lane), {"shuffle", file, line});
}
DEVICE int shuffle(int x, int lane, EMULATOR_PLACE) {
  return emulator::shuffle_from(x, static_cast<unsigned>(lane), {"shuffle", file, line});
}
DEVICE uint32_t vote(bool x, EMULATOR_PLACE) {
  emulator::Gathered gathered = emulator::gather({{x}}, {"vote", file, line});
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < 32; lane++) bits |= (gathered.slots[lane].words[0] & 1u) << lane;
  return bits & gathered.took_part;
}
DEVICE void sync_warp(EMULATOR_PLACE) { emulator::gather({}, {"sync_warp", file, line}); }
DEVICE void sync_block(EMULATOR_PLACE) { emulator::meet_block(0, {"sync_block", file, line}); }
DEVICE int sync_block_count(bool x, EMULATOR_PLACE) {
  return emulator::meet_block(x, {"sync_block_count", file, line});
}
DEVICE uint32_t max_of_warp(uint32_t x) {
  for (int mask = 16; mask; mask /= 2) {
    const uint32_t other = static_cast<uint32_t>(shuffle_xor(static_cast<int>(x), mask));
    x = x > other ? x : other;
  }
  return x;
}
DEVICE int count_bits(uint32_t x) { return __builtin_popcount(x); }

// ---- CUDA's own names that kernels use

#define EMULATOR_ATOMICS(T)          \
  DEVICE T atomicAdd(T* at, T x) {   \
    T before = *at;                  \
    *at = before + x;                \
    return before;                   \
  }                                  \
  DEVICE T atomicMax(T* at, T x) {   \
    T before = *at;                  \
    *at = before < x ? x : before;   \
    return before;                   \
  }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(uint32_t)
EMULATOR_ATOMICS(uint64_t)
DEVICE float atomicAdd(float* at, float x) {
  float before = *at;
  *at = before + x;
  return before;
}

template <class T>
DEVICE T __ldg(const T* at) {
  return *at;
}
DEVICE void __threadfence() {}
DEVICE float rsqrtf(float x) { return 1.f / __builtin_sqrtf(x); }
