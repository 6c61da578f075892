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
alignas(64) constexpr float kExp2Table[32] = {  // 2^(j/32)
    1.f, 1.0218972f, 1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f, 1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f, 1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f, 1.87416768f, 1.91520655f, 1.95714414f};
inline Vec exp2_in_range(Vec x) {
  const float kRound = 393216.f;
  // Products have two of Zen 4's pipes, sums have two others: hidden from the compiler, which would fuse it with both
  // sums that use it, x stays one product.
  asm("" : "+v"(x));
  Vec shifted = x + kRound;
  Vec rounded = shifted - kRound, f = x - rounded;
  Vec p = (0.240224749f * f + 0.693157315f) * f + 1.f;
  Vec part = (Vec)_mm512_permutex2var_ps(_mm512_load_ps(kExp2Table), (__m512i)shifted,
                                         _mm512_load_ps(kExp2Table + 16));
  return (Vec)_mm512_scalef_ps((__m512)(p * part), (__m512)rounded);  // times 2^floor(rounded)
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
