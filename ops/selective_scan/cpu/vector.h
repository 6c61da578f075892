// Vectors of float32 through the compiler's vector extensions: one source for AVX-512, AVX2, SSE and NEON.
// Lanes are channels.
#pragma once
#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
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
// The halves of blocks of kBlock lanes added: those of a, then those of b.
template <int kBlock, int... kLane>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  constexpr auto lower = [](int lane) { return lane / (kBlock / 2) * kBlock + lane % (kBlock / 2); };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lower(kLane)...) + __builtin_shufflevector(a, b, lower(kLane) + kBlock / 2 ...);
#else
  constexpr IntVec first{lower(kLane)...}, second{lower(kLane) + kBlock / 2 ...};
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
#endif
}
template <int kCount>
inline Vec folded(const Vec* v) {
  if constexpr (kCount == 1)
    return v[0];
  else
    return fold<2 * kLanes / kCount>(folded<kCount / 2>(v), folded<kCount / 2>(v + kCount / 2),
                                     std::make_integer_sequence<int, kLanes>());
}
// `sum` of `count` vectors, to the same bits: many at a time take a tenth as long.
inline void sum_each(const Vec* v, int count, float* sums) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(sums + i, folded<kLanes>(v + i));
  for (; i < count; ++i) sums[i] = sum(v[i]);
}
inline Vec absolute(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }
// The largest absolute value of many, which is a NaN where one of them is: bits of numbers without a sign are in the
// order of the numbers, and a NaN's are above all.
struct Largest {
  IntVec bits = {};
  void see(Vec v) {
    const IntVec other = (IntVec)absolute(v);
    bits = other > bits ? other : bits;
  }
  float value() const {
    int32_t lane[kLanes];
    __builtin_memcpy(lane, &bits, sizeof lane);
    for (int half = kLanes / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
    float found;
    __builtin_memcpy(&found, lane, sizeof found);
    return found;
  }
};
// A NaN in x comes out as a NaN, here and in what follows unless said otherwise.
#if defined(__AVX512F__)
inline Vec at_least(Vec x, float low) { return (Vec)_mm512_max_ps((__m512)splat(low), (__m512)x); }
inline Vec at_most(Vec x, float high) { return (Vec)_mm512_min_ps((__m512)splat(high), (__m512)x); }
#else
inline Vec at_least(Vec x, float low) { return x < low ? splat(low) : x; }
inline Vec at_most(Vec x, float high) { return x > high ? splat(high) : x; }
#endif

constexpr float kLog2E = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr float kExp2Range = 121.f;
#else
constexpr float kExp2Range = 126.f;
#endif

// 2^x for |x| <= kExp2Range, undefined for a NaN, relative error below 5e-7 (AVX-512), 4e-7 (AVX2) or 2e-7. Adding
// 1.5 * 2^23 (or 2^18, 2^20) rounds x to an integer (or a multiple of 1/32, 1/8), which then stands in the lowest bits
// of the sum.
#if defined(__AVX512F__)
// With f = x - k/32, at most 1/64, 2^f is a parabola to within 2e-7, and any parabola is G ((f + a)^2 + b): one fused
// operation once f + a is known. The vertex, 1.4427 for the best parabola, is moved to a = 46/32, so that f + a comes
// in one subtraction too, of (k - 46)/32. The table holds the rest for each of the low bits j of k:
// G 2^(k/32) / 2^floor((k - 46)/32) = G 2^(j/32) times 4 for j < 14, else 2. G and b are such that 2^0 is 1 and
// that the error has a mean of zero: products of many decays do not drift.
alignas(64) constexpr float kExp2Table[32] = {
    0.964390278f, 0.985507667f, 1.00708747f, 1.02913976f, 1.05167508f, 1.07470369f, 1.09823668f, 1.12228489f,
    1.14685977f, 1.17197275f, 1.19763553f, 1.22386038f, 1.25065947f, 1.2780453f, 0.653015435f, 0.667314589f,
    0.681926906f, 0.696859121f, 0.712118387f, 0.727711737f, 0.743646562f, 0.759930313f, 0.776570618f, 0.793575287f,
    0.810952306f, 0.828709841f, 0.846856236f, 0.865399957f, 0.884349763f, 0.903714478f, 0.92350328f, 0.943725348f};
inline Vec exp2_in_range(Vec x) {
  constexpr float kRound = 393216.f, kVertex = 1.4375f;
#if defined(__znver4__) || defined(__znver5__)
  // Products have two of Zen's pipes, sums have two others: hidden from the compiler, which would fuse it with both
  // sums that use it, x stays one product.
  asm("" : "+v"(x));
#endif
  Vec shifted = x + kRound, rounded = shifted - (kRound + kVertex), t = x - rounded;
  Vec p = t * t + 2.08129191f;
  Vec part = (Vec)_mm512_permutex2var_ps(_mm512_load_ps(kExp2Table), (__m512i)shifted,
                                         _mm512_load_ps(kExp2Table + 16));
  return (Vec)_mm512_scalef_ps((__m512)(p * part), (__m512)rounded);  // times 2^floor(rounded)
}
#elif defined(__AVX2__)
// The same for a table of eight: with f = x - k/8, at most 1/16, 2^f is a cubic to within 1.3e-7, and any cubic is
// G (t (t^2 + b) + c) with t = f + a. The best a is 1.4427; 1.5 is taken, as k/8 - 1.5 is exact. The table holds the
// bits of G 2^(j/8) less j 2^20, so that k 2^20 makes them those of G 2^(k/8): G is 2^-4.2, hence the smaller range.
// b and c are such that 2^0 is 1 and that no entry rounds by much: the mean error of each is below 2e-8.
alignas(32) constexpr int32_t kExp2Table[8] = {0x3d5ab2f8, 0x3d5e7e39, 0x3d620a0d, 0x3d5dcf0f,
                                               0x3d5aa4c4, 0x3d58a3db, 0x3d57e73e, 0x3d588c47};
inline Vec exp2_in_range(Vec x) {
  constexpr float kRound = 1572864.f, kVertex = 1.5f;
  Vec shifted = x + kRound, t = x - (shifted - (kRound + kVertex));
  Vec p = (t * t + 6.232047f) * t + 6.0058584f;
  IntVec part = (IntVec)_mm256_permutevar8x32_epi32(*(const __m256i*)kExp2Table, (__m256i)shifted);
  return p * (Vec)(part + ((IntVec)shifted << 20));
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
inline Vec clamped(Vec x) { return at_most(at_least(x, -kExp2Range), kExp2Range); }
inline Vec exp2_clamped(Vec x) {
  Vec y = exp2_in_range(clamped(x));
#if defined(__AVX512F__)
  return y;
#else
  return x == x ? y : x;  // the sum of integers can make a number of a NaN
#endif
}

// 1 / x for 1 <= x <= 2^127. A division of this width takes as long as all that stands around it.
#if defined(__AVX512F__)
inline Vec reciprocal(Vec x) {
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);  // to within 2^-14, and after one step of Newton's method 2^-23
  return r + r * (1.f - x * r);
}
#else
inline Vec reciprocal(Vec x) { return 1.f / x; }
#endif

inline Vec sigmoid(Vec x) { return reciprocal(1.f + exp2_clamped(x * -kLog2E)); }
inline Vec silu(Vec x) {
  return x * reciprocal(1.f + exp2_in_range(clamped(x * -kLog2E)));  // x itself makes a NaN of what a NaN gave
}

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
    const Vec r = reciprocal(1.f + w);
    *derivative = x < 0.f ? w * r : r;
  }
  return at_least(x, 0.f) + p * w;
}
