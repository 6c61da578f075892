// Vectors of float32 through the compiler's vector extensions: one source for AVX-512, AVX2, SSE and NEON.
// Lanes are channels.
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// How many states of a channel the registers hold beside what else a step needs.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisterStates = 16;
#else
constexpr int kRegisterStates = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec splat(float value) { return value - Vec{}; }
inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// Only the first `count` lanes exist in memory: the last channels of a row, when E is no multiple of the lanes.
inline Vec load(const float* p, int count) {
  if (count >= kLanes) return load(p);
  Vec v = {};
  for (int lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
}
inline void store(float* p, Vec v, int count) {
  if (count >= kLanes) return store(p, v);
  for (int lane = 0; lane < count; ++lane) p[lane] = v[lane];
}

inline float sum(Vec v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
inline float max(Vec v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i + half] <= lane[i] ? lane[i] : lane[i + half];  // keeps a NaN
  return lane[0];
}
// A NaN in x comes out as a NaN.
#if defined(__AVX512F__)
inline Vec at_least(Vec x, float low) { return (Vec)_mm512_max_ps((__m512)splat(low), (__m512)x); }
inline Vec at_most(Vec x, float high) { return (Vec)_mm512_min_ps((__m512)splat(high), (__m512)x); }
#else
inline Vec at_least(Vec x, float low) { return x < low ? splat(low) : x; }
inline Vec at_most(Vec x, float high) { return x > high ? splat(high) : x; }
#endif
inline Vec absolute(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

constexpr float kLog2E = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;
constexpr float kExp2Range = 126.f;

// 2^x for |x| <= 126, relative error 2e-7. Adding 1.5 * 2^23 (or 2^18) rounds x to an integer (or a multiple of 1/32),
// which then stands in the lowest bits of the sum; minimax polynomials to 2^f on the rest f.
#if defined(__AVX512F__)
// Bits of 2^(j/32), less the j that the shift below carries into the mantissa.
alignas(64) constexpr uint32_t kExp2Table[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
inline Vec exp2_in_range(Vec x) {
  const float kRound = 393216.f;
  // Products have two of Zen 4's pipes, sums have two others: hidden from the compiler, which would fuse it with both
  // sums that use it, x stays one product.
  asm("" : "+v"(x));
  Vec shifted = x + kRound;
  Vec f = x - (shifted - kRound);
  Vec p = (0.240224749f * f + 0.693157315f) * f + 1.f;
  IntVec part = (IntVec)_mm512_permutex2var_epi32(_mm512_load_si512(kExp2Table), (__m512i)shifted,
                                                  _mm512_load_si512(kExp2Table + 16));
  return p * (Vec)(part + ((IntVec)shifted << 18));
}
#else
inline Vec exp2_in_range(Vec x) {
  const float kRound = 12582912.f;
  Vec shifted = x + kRound;
  Vec f = x - (shifted - kRound);
  Vec p = 0.00132647239f * f + 0.00967151287f;
  p = p * f + 0.0555073375f;
  p = p * f + 0.240222421f;
  p = p * f + 0.693146978f;
  p = p * f + 1.0f;
  return (Vec)((IntVec)p + ((IntVec)shifted << 23));
}
#endif
inline Vec exp2_clamped(Vec x) { return exp2_in_range(at_most(at_least(x, -kExp2Range), kExp2Range)); }

inline Vec sigmoid(Vec x) { return 1.f / (1.f + exp2_clamped(x * -kLog2E)); }
inline Vec silu(Vec x) { return x / (1.f + exp2_clamped(x * -kLog2E)); }

// softplus(x) = max(x, 0) + log(1 + w) with w = exp(-|x|); `derivative` receives sigmoid(x).
// log(1 + w) / w by a minimax polynomial of degree 8 on (0, 1], error 3e-8.
inline Vec softplus(Vec x, Vec* derivative) {
  Vec w = exp2_in_range(at_least(absolute(x) * -kLog2E, -kExp2Range));
  Vec p = 0.00523260647f * w - 0.0295048826f;
  p = p * w + 0.0782253624f;
  p = p * w - 0.136631947f;
  p = p * w + 0.19105982f;
  p = p * w - 0.248429756f;
  p = p * w + 0.333190959f;
  p = p * w - 0.499994931f;
  p = p * w + 0.99999997f;
  if (derivative) {
    Vec r = 1.f / (1.f + w);
    *derivative = x < 0.f ? w * r : r;
  }
  return at_least(x, 0.f) + p * w;
}
