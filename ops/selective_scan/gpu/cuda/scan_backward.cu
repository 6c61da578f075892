// The backward pass of the selective scan, without the gate behind it:
//
//     step = softplus(dt + bias)      h = exp(step A) h + step u B      y = gate * (C h + D u)
//
// A mask in place multiplies the step. One warp walks one image in one direction over 32 channels of 16 states each.
//
// The way back needs every state in reverse order. From the state that the forward pass kept every CHUNK steps a warp
// computes those of a chunk again, leaving one every 4 steps in shared memory; such a group is then computed once more
// into registers and walked back.
//
// A lane holds 4 channels x 4 states, the warp 8 x 4 such tiles. So a sum over states crosses 4 lanes and one over
// channels 8. As there are 4 sums of each kind in a lane, a lane gives half of its values away at every crossing
// (`fold`): 13 shuffles a step. The lane that ends up with a channel's sum also reads and writes that channel's rows
// ("its" channel, one of the 4). What sums over more than 32 channels is written per warp and added up by the caller:
// no atomics, the same result every time.
//
// Everything is linear in grad_y but for the gate's gradient. The walk therefore ignores the gate and multiplies
// what it writes.
//
// Compiled at run time, without any header. Options:
//     SCALAR   float, Bfloat16 or Float16: the type of grad_y, u, dt, B, C and of their gradients
//     MASKED   whether a mask multiplies the steps: true or false
//     CHUNK    steps between kept states

constexpr int kStates = 16;
constexpr int kChannels = 32;  // of a warp
constexpr int kTile = 4;       // channels of a lane, and states of each
constexpr int kGroup = 4;      // steps that fit in the registers
constexpr int kAhead = 8;      // rows that a lane asks for at a time
constexpr unsigned kWarp = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Bfloat16 { unsigned short bits; };
struct Float16 { unsigned short bits; };

#ifdef __CUDACC__  // the tests, which run this file on a CPU, bring their own

// 2^x, relative error 2^-22.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float widen(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ __forceinline__ void narrow(float x, Float16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ __forceinline__ void narrow(float x, float& y) { y = x; }

// To the nearest, to even; a NaN stays one, which rounding up could make an infinity.
__device__ __forceinline__ void narrow(float x, Bfloat16& y) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const unsigned bits = __float_as_uint(x);
  y.bits = (unsigned short)(x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

__device__ __forceinline__ void load_tile(const float* from, float (&to)[kTile]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void load_tile(const Bfloat16* from, float (&to)[kTile]) {
  const uint2 v = *reinterpret_cast<const uint2*>(from);
  to[0] = __uint_as_float(v.x << 16), to[1] = __uint_as_float(v.x & 0xffff0000u);
  to[2] = __uint_as_float(v.y << 16), to[3] = __uint_as_float(v.y & 0xffff0000u);
}

__device__ __forceinline__ void load_tile(const Float16* from, float (&to)[kTile]) {
  const uint2 v = *reinterpret_cast<const uint2*>(from);
  to[0] = widen(Float16{(unsigned short)v.x}), to[1] = widen(Float16{(unsigned short)(v.x >> 16)});
  to[2] = widen(Float16{(unsigned short)v.y}), to[3] = widen(Float16{(unsigned short)(v.y >> 16)});
}

// log(1 + e^x), where log(1 + e) = e P(e) on (0, 1] with a relative error of 3e-8. A NaN passes through e.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(-kLog2e * fabsf(x));
  float p = 0.0052534577972598f;
  p = p * e - 0.029588507394128293f;
  p = p * e + 0.07836166802132702f;
  p = p * e - 0.13674769705812267f;
  p = p * e + 0.19111431080749117f;
  p = p * e - 0.24844369892523394f;
  p = p * e + 0.33319271342510437f;
  p = p * e - 0.49999501516787803f;
  p = p * e + 0.9999999705406569f;
  return fmaxf(x, 0.0f) + e * p;
}

// The derivative of softplus where it is s: 1 - e^-s, by its series where the difference would lose digits.
__device__ __forceinline__ float softplus_slope(float s) {
  float series = 1.0f - s * (1.0f / 7);
  series = 1.0f - s * (1.0f / 6) * series;
  series = 1.0f - s * (1.0f / 5) * series;
  series = 1.0f - s * (1.0f / 4) * series;
  series = 1.0f - s * (1.0f / 3) * series;
  series = 1.0f - s * (1.0f / 2) * series;
  return s < 0.25f ? s * series : 1.0f - exp2_fast(-kLog2e * s);
}

// Adds two values up over the pairs of lanes that differ in `bit`: the lane without it gets the sum of a, the other
// that of b.
__device__ __forceinline__ float fold(float a, float b, int lane, int bit) {
  const bool upper = lane & bit;
  const float kept = upper ? b : a, given = upper ? a : b;
  return kept + __shfl_xor_sync(kWarp, given, bit);
}

// The same for 4 values and the lanes that differ in `bit` and in the bit after it: these two bits say which sum a lane
// gets.
__device__ __forceinline__ float fold4(const float (&x)[4], int lane, int bit) {
  return fold(fold(x[0], x[1], lane, bit), fold(x[2], x[3], lane, bit), lane, 2 * bit);
}

__device__ __forceinline__ float sum_over_lanes(float x, int first_bit) {
  for (int bit = first_bit; bit < 32; bit *= 2) x += __shfl_xor_sync(kWarp, x, bit);
  return x;
}

using Scalar = SCALAR;

// The type of partial sums: with a loss scale, those of float16 would overflow.
template <class T> struct PartialOf { using Type = T; };
template <> struct PartialOf<Float16> { using Type = float; };
using Partial = PartialOf<Scalar>::Type;

// B images, L tokens, E channels, N states, G directions, K blocks of 32 channels. One direction: G = 1.
struct Problem {
  const Scalar* grad_y;      // [B, L, E]
  const Scalar* u;           // [G, B, L, E]
  const Scalar* dt;          // [G, B, L, E]
  const Scalar* bc;          // [G, B, L, 2N], rows `stride_bc` apart: B, then C
  const float* mask;         // [B, L], if MASKED
  const long long* lengths;  // [B] or null: tokens of an image
  const bool* active;        // [B, G] or null: whether a direction runs
  const float* gates;        // [B, 2] or null
  const float* a[2];         // per direction: A [N, E]
  const float* skip[2];      // D [E]
  const float* bias[2];      // [E]
  const float* kept;         // [G, B, saved, N, E]: states after every CHUNK steps
  Scalar* grad_u;            // [G, B, L, E], as are the others zero where no token is
  Scalar* grad_dt;           // [G, B, L, E]
  Partial* grad_bc;          // [K, G, B, L, 2N]
  float* grad_a;             // [G, B, N, E]
  float* grad_channel;       // [G, B, 2, E]: of D, then of the bias
  float* grad_gate;          // [G, B, K], if there are gates
  float* grad_mask;          // [K, G, B, L], if MASKED
  long long stride_active[2];
  int tokens, channels, stride_bc, saved;
  int reverse;  // whether the only direction is the reversed one
};

struct Tile { float at[kTile][kTile]; };  // of a lane: [state][channel]

// A chunk. Channels that do not exist and steps behind the end are zero: they change nothing.
struct Shared {
  alignas(16) float step[CHUNK][kChannels];  // without the mask
  alignas(16) float bc[CHUNK][2 * kStates];  // in the order of `place`
  alignas(16) Scalar u[CHUNK][kChannels];
  alignas(16) Scalar g[CHUNK][kChannels];
  float4 states[CHUNK / kGroup - 1][kTile][32];  // before each group but the last, as its lane holds them
  float mask[MASKED ? CHUNK : 1];
};
__shared__ Shared shared;

static_assert(CHUNK == 32 && CHUNK % kAhead == 0 && kAhead % kGroup == 0, "a lane loads the mask of a step");

// Lane group g of 4 holds the states g, g + 4, g + 8, g + 12, so that a sum ends in the lane of its column. They lie
// side by side in shared memory.
__device__ __forceinline__ int place(int column) { return (column & 16) | (column & 3) << 2 | (column >> 2 & 3); }

// What a lane's tile needs of a step.
struct Step {
  float delta[kTile], input[kTile], b[kTile];  // the step size times the mask, that times u, and B
};

__device__ __forceinline__ Step load_step(int s, int channels, int states) {
  Step step;
  load_tile(&shared.step[s][channels], step.delta);
  if (MASKED) {
    for (int k = 0; k < kTile; ++k) step.delta[k] *= shared.mask[s];
  }
  load_tile(&shared.u[s][channels], step.input);
  for (int k = 0; k < kTile; ++k) step.input[k] *= step.delta[k];
  load_tile(&shared.bc[s][states], step.b);
  return step;
}

// One step forward; a in base 2. Also gives the factor of the old state.
__device__ __forceinline__ Tile advance(const Step& step, const Tile& a, const Tile& h, Tile& decay) {
  Tile next;
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      decay.at[j][k] = exp2_fast(step.delta[k] * a.at[j][k]);
      next.at[j][k] = decay.at[j][k] * h.at[j][k] + step.input[k] * step.b[j];
    }
  }
  return next;
}

// The states before a group, which only the lane itself reads.
__device__ __forceinline__ void keep_states(int group, int lane, const Tile& h) {
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
    shared.states[group][j][lane] = make_float4(h.at[j][0], h.at[j][1], h.at[j][2], h.at[j][3]);
  }
}

__device__ __forceinline__ Tile kept_states(int group, int lane) {
  Tile h;
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
    const float4 v = shared.states[group][j][lane];
    h.at[j][0] = v.x, h.at[j][1] = v.y, h.at[j][2] = v.z, h.at[j][3] = v.w;
  }
  return h;
}

__device__ __forceinline__ int tokens_to_walk(const Problem& p, long long image, int direction) {
  if (p.active && !p.active[image * p.stride_active[0] + direction * p.stride_active[1]]) return 0;
  if (!p.lengths) return p.tokens;
  const long long n = p.lengths[image];
  return n < 0 ? 0 : n < p.tokens ? (int)n : p.tokens;
}

// Grid: K, B, G.
extern "C" __global__ void __launch_bounds__(32) scan_backward(const Problem p) {
  const int E = p.channels, L = p.tokens, lane = threadIdx.x;
  const int blocks = gridDim.x, block = blockIdx.x, images = gridDim.y, direction = blockIdx.z;
  const long long image = blockIdx.y, walk = direction * images + image;
  const long long partial = ((long long)block * gridDim.z * images + walk) * L;
  const bool reverse = gridDim.z == 2 ? direction == 1 : p.reverse != 0;
  const int n = tokens_to_walk(p, image, direction);

  const int first_channel = lane / 4 * kTile, first_state = lane % 4 * kTile;  // of the lane's tile in `shared`
  const int c = block * kChannels + lane;                                     // its channel
  const bool inside = c < E;
  const int tile_channel = block * kChannels + first_channel;
  // Of the lane's tile in [N, E]. What lies outside reads another channel's values, and nothing comes of them.
  const auto at = [=](int j, int k) { return (unsigned)((lane % 4 + 4 * j) * E + min(tile_channel + k, E - 1)); };
  const float gate = p.gates && n > 0 ? p.gates[2 * image + direction] : 1.0f;
  const float skip = inside ? p.skip[direction][c] : 0.0f;

  // Bases that the whole warp shares and 32-bit offsets take few registers.
  const Scalar *grad_y = p.grad_y + image * L * E, *u = p.u + walk * L * E, *dt = p.dt + walk * L * E;
  const Scalar* bc = p.bc + walk * L * p.stride_bc;
  Scalar *grad_u = p.grad_u + walk * L * E, *grad_dt = p.grad_dt + walk * L * E;
  Partial* grad_bc = p.grad_bc + partial * 2 * kStates;

  for (int t = n; t < L; ++t) {
    if (inside) narrow(0.0f, grad_u[(unsigned)(t * E + c)]), narrow(0.0f, grad_dt[(unsigned)(t * E + c)]);
    narrow(0.0f, grad_bc[(unsigned)(t * 2 * kStates + lane)]);
    if (MASKED && lane == 0) p.grad_mask[partial + t] = 0.0f;
  }

  Tile a, grad_h, sum_a;  // grad_h is carried back through time
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      a.at[j][k] = kLog2e * p.a[direction][at(j, k)];
      grad_h.at[j][k] = sum_a.at[j][k] = 0.0f;
    }
  }
  float sum_skip = 0.0f, sum_bias = 0.0f, sum_gate = 0.0f;

  for (int chunk = (n + CHUNK - 1) / CHUNK - 1; chunk >= 0; --chunk) {
    const int steps = min(CHUNK, n - chunk * CHUNK), groups = (steps + kGroup - 1) / kGroup;
    const int first = reverse ? n - 1 - chunk * CHUNK : chunk * CHUNK, onward = reverse ? -1 : 1;  // tokens

    const float bias = p.bias[direction][min(c, E - 1)];
    __syncwarp();  // the chunk before has been read
#pragma unroll 1
    for (int ahead = 0; ahead < steps; ahead += kAhead) {
      Scalar dt_rows[kAhead], u_rows[kAhead], g_rows[kAhead], bc_rows[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {  // all loads first; what does not exist is read elsewhere and not used
        const int t = first + onward * min(ahead + i, steps - 1);
        const unsigned row = t * E + min(c, E - 1);
        dt_rows[i] = dt[row], u_rows[i] = u[row], g_rows[i] = grad_y[row];
        bc_rows[i] = bc[(unsigned)(t * p.stride_bc + lane)];
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int s = ahead + i;
        const bool exists = s < steps, here = exists && inside;
        const float step = softplus(widen(dt_rows[i]) + bias);
        shared.step[s][lane] = here ? step : 0.0f;
        shared.u[s][lane] = here ? u_rows[i] : Scalar{};
        shared.g[s][lane] = here ? g_rows[i] : Scalar{};
        shared.bc[s][place(lane)] = exists ? widen(bc_rows[i]) : 0.0f;
      }
    }
    if (MASKED) shared.mask[lane] = lane < steps ? p.mask[image * L + first + onward * lane] : 0.0f;
    __syncwarp();

    Tile h;
    const float* kept = p.kept + (walk * p.saved + chunk - 1) * kStates * E;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
#pragma unroll
      for (int k = 0; k < kTile; ++k) h.at[j][k] = chunk > 0 ? kept[at(j, k)] : 0.0f;
    }
#pragma unroll 1
    for (int group = 0; group < groups - 1; ++group) {
      keep_states(group, lane, h);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        Tile decay;
        h = advance(load_step(group * kGroup + i, first_channel, first_state), a, h, decay);
      }
    }

#pragma unroll 1
    for (int group = groups - 1; group >= 0; --group) {
      Tile states[kGroup + 1], decays[kGroup];  // decays[0] is computed twice, for want of registers
      float mask_terms[kGroup], mask_pairs[2];  // of the mask's gradient: the channel's, then sums of two lanes
      states[0] = h;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const Step step = load_step(group * kGroup + i, first_channel, first_state);
        states[i + 1] = advance(step, a, states[i], decays[i]);
      }
#pragma unroll
      for (int i = kGroup - 1; i >= 0; --i) {
        // A step behind the end writes its zeros where the last step, which comes next, writes over them.
        const int s = group * kGroup + i, t = first + onward * min(s, steps - 1);
        const Step step = load_step(s, first_channel, first_state);
        float c_row[kTile], g[kTile];
        load_tile(&shared.bc[s][kStates + first_state], c_row);
        load_tile(&shared.g[s][first_channel], g);

        // Sums over channels: of the gradients of B and C.
        float by_c[kTile] = {}, by_b[kTile] = {};
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
#pragma unroll
          for (int k = 0; k < kTile; ++k) by_c[j] += states[i + 1].at[j][k] * g[k];
        }
        // Sums over states: of grad_h B, and of the gradient of step A times A.
        float along_b[kTile] = {}, exponent[kTile] = {};
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
#pragma unroll
          for (int k = 0; k < kTile; ++k) {
            float e = grad_h.at[j][k] + c_row[j] * g[k];
            along_b[k] += e * step.b[j];
            by_b[j] += e * step.input[k];
            e *= i == 0 ? exp2_fast(step.delta[k] * a.at[j][k]) : decays[i].at[j][k];
            grad_h.at[j][k] = e;
            const float flow = e * states[i].at[j][k];
            exponent[k] += flow * a.at[j][k];
            sum_a.at[j][k] += flow * step.delta[k];
          }
        }
        const float column = fold(fold4(by_b, lane, 4), fold4(by_c, lane, 4), lane, 16);
        const float to_input = fold4(along_b, lane, 1), to_exponent = fold4(exponent, lane, 1) * kLn2;

        // What is left is for the lane's own channel and its own column of B and C.
        const float own_step = shared.step[s][lane], own_u = widen(shared.u[s][lane]), own_g = widen(shared.g[s][lane]);
        const float own_mask = MASKED ? shared.mask[s] : 1.0f;
        const float grad_step = (to_input * own_u + to_exponent) * gate;  // of the step times the mask
        const float grad_projected = grad_step * softplus_slope(own_step) * own_mask;
        sum_skip += own_g * own_u;
        sum_bias += grad_projected;
        sum_gate += column * shared.bc[s][place(lane)];
        mask_terms[i] = grad_step * own_step;
        if (MASKED && i % 2 == 0) mask_pairs[i / 2] = fold(mask_terms[i], mask_terms[i + 1], lane, 1);
        Scalar to_u, to_dt;
        Partial to_bc;
        narrow((skip * own_g + to_input * own_step * own_mask) * gate, to_u);
        narrow(grad_projected, to_dt);
        narrow(column * gate, to_bc);
        if (inside) grad_u[(unsigned)(t * E + c)] = to_u, grad_dt[(unsigned)(t * E + c)] = to_dt;
        grad_bc[(unsigned)(t * 2 * kStates + lane)] = to_bc;
      }
      if (MASKED) {
        const float sum = sum_over_lanes(fold(mask_pairs[0], mask_pairs[1], lane, 2), 4);
        const int s = group * kGroup + lane;
        if (lane < kGroup && s < steps) p.grad_mask[partial + first + onward * s] = sum;
      }
      if (group > 0) h = kept_states(group - 1, lane);
    }
  }

  float* grad_a = p.grad_a + walk * kStates * E;  // the offsets once more: kept meanwhile they take registers
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const unsigned to = (threadIdx.x % 4 + 4 * j) * E + block * kChannels + threadIdx.x / 4 * kTile + k;
      if (tile_channel + k < E) grad_a[to] = sum_a.at[j][k] * gate;
    }
  }
  if (inside) {
    p.grad_channel[walk * 2 * E + c] = sum_skip * gate;
    p.grad_channel[walk * 2 * E + E + c] = sum_bias;
  }
  if (p.gates) {
    // y without the gate is C h, which the lanes of C's columns have, and D u.
    const float sum = sum_over_lanes((lane < kStates ? 0.0f : sum_gate) + skip * sum_skip, 1);
    if (lane == 0) p.grad_gate[walk * blocks + block] = sum;
  }
}
