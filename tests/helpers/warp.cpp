// Runs a CUDA kernel of one warp on a CPU: the file SOURCE is compiled as C++, with the names of CUDA that it uses.
//
// The lanes are fibres. Each runs until it waits (a shuffle, __syncwarp), then the next one, in an order that turns
// round after every wait. So a lane that reads what another has yet to write finds it missing, at least every other
// time: shared memory holds NaN before a block starts. All lanes must wait at the same kind of place.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __shared__  // a global that others may see, lest the compiler keep its values over a wait
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define threadIdx (Index{(unsigned)warp.lane, 0, 0})

struct Index { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };

static Index blockIdx, gridDim;

using std::min;

static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

namespace {

constexpr int kLanes = 32, kSync = -1, kDone = -2;
constexpr size_t kStack = 1 << 16;

struct Warp {
  int lane;
  int waits_at[kLanes];  // the bit of a shuffle, kSync or kDone
  float value[2][kLanes];
  unsigned rounds;
  jmp_buf scheduler, resume[kLanes];
  bool started[kLanes];
  std::vector<char> stacks = std::vector<char>(kStack * kLanes);
  void (*body)();
} warp;

void wait(int place) {
  warp.waits_at[warp.lane] = place;
  if (!_setjmp(warp.resume[warp.lane])) _longjmp(warp.scheduler, 1);
}

void first_steps() {
  warp.body();
  warp.waits_at[warp.lane] = kDone;
  _longjmp(warp.scheduler, 1);
}

void go_on(int lane) {
  warp.lane = lane;
  if (_setjmp(warp.scheduler)) return;
  if (warp.started[lane]) _longjmp(warp.resume[lane], 1);
  warp.started[lane] = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = warp.stacks.data() + lane * kStack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, first_steps, 0);
  setcontext(&context);
}

// Whether the lanes stayed together.
bool run_warp(void (*body)()) {
  warp.body = body;
  warp.rounds = 0;
  std::fill(warp.started, warp.started + kLanes, false);
  do {
    const bool backwards = warp.rounds & 1;
    for (int i = 0; i < kLanes; ++i) go_on(backwards ? kLanes - 1 - i : i);
    for (int place : warp.waits_at) {
      if (place != warp.waits_at[0]) return false;
    }
    ++warp.rounds;
  } while (warp.waits_at[0] != kDone);
  return true;
}

}  // namespace

static void __syncwarp() { wait(kSync); }

// Lanes run on to their next wait only, so that two sets of values are enough.
static float __shfl_xor_sync(unsigned, float x, int bit) {
  float(&value)[kLanes] = warp.value[warp.rounds & 1];
  value[warp.lane] = x;
  wait(bit);
  return value[warp.lane ^ bit];
}

struct Float16;
static float exp2_fast(float x) { return exp2f(x); }
static float widen(Float16 x);
static void narrow(float x, Float16& y);

#include SOURCE

[[maybe_unused]] static float widen(Float16 x) {
  _Float16 y;
  memcpy(&y, &x, sizeof y);
  return y;
}

[[maybe_unused]] static void narrow(float x, Float16& y) {
  const _Float16 rounded = (_Float16)x;
  memcpy(&y, &rounded, sizeof y);
}

static const Problem* problem;

// 0, or 1 where the lanes of a warp parted. x, y, z: blocks.
extern "C" int run_kernel(const Problem* given, unsigned x, unsigned y, unsigned z) {
  problem = given;
  gridDim = {x, y, z};
  for (unsigned i = 0; i < x * y * z; ++i) {
    blockIdx = {i % x, i / x % y, i / x / y};
    memset((void*)&shared, 0xff, sizeof shared);
    if (!run_warp([] { scan_backward(*problem); })) return 1;
  }
  return 0;
}

extern "C" unsigned problem_bytes() { return sizeof(Problem); }
