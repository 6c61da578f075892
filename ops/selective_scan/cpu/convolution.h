// Causal depthwise convolution of width 4 + SiLU, both directions in one pass over x, and its gradient.
// The backward direction looks at the following tokens instead of the preceding ones: nothing is flipped.
#pragma once
#include <vector>

#include "problem.h"

struct Taps {
  Vec tap[kConvWidth], bias;
  Taps(const Problem& p, int which, int64_t block) {
    for (int k = 0; k < kConvWidth; ++k) tap[k] = load(p.weight(which, p.conv_tap(k), block));
    bias = load(p.weight(which, p.conv_bias(), block));
  }
};

// Sliding window over the masked x of one channel block: x[t - 3] ... x[t + 3], zero outside the sequence.
struct Window {
  static constexpr int kReach = kConvWidth - 1;
  Vec x[2 * kReach + 1] = {};
  const Problem& p;
  const int64_t image, block, length;
  const float* mask;

  // To be moved to `begin` first.
  Window(const Problem& problem, int64_t image_, int64_t block_, int64_t length_, int64_t begin = 0)
      : p(problem), image(image_), block(block_), length(length_), mask(problem.mask + image_ * problem.tokens) {
    for (int i = 1; i <= 2 * kReach; ++i) x[i] = token(begin - 1 - kReach + i);
  }
  Vec unmasked(int64_t t) const { return load(p.x(image, t) + block * kLanes, p.lanes(block)); }
  Vec token(int64_t t) const { return t >= 0 && t < length ? unmasked(t) * mask[t] : Vec{}; }
  void move_to(int64_t t) {  // from t - 1
    for (int i = 0; i < 2 * kReach; ++i) x[i] = x[i + 1];
    x[2 * kReach] = token(t + kReach);
  }
  // The token under tap k: the forward direction ends, the backward direction starts at t.
  template <int kWhich>
  Vec under(int k) const { return kWhich == 0 ? x[k] : x[2 * kReach - k]; }
  template <int kWhich>
  Vec convolve(const Taps& w) const {
    Vec s = w.bias;
    for (int k = 0; k < kConvWidth; ++k) s += w.tap[k] * under<kWhich>(k);
    return s;
  }
};

// u of the tokens begin ... end of one image and one channel block, in the directions that are on.
inline void convolve_block(const Problem& p, int64_t image, int64_t block, int64_t begin, int64_t end) {
  const bool on[2] = {p.on(0, image), p.on(1, image)};
  if (!on[0] && !on[1]) return;
  float* u[2] = {};
  for (int which = 0; which < 2; ++which)
    if (on[which]) u[which] = p.direction[which].u + p.direction[which].start[image] * p.padded + block * kLanes;
  const Taps forward(p, on[0] ? 0 : 1, block), backward(p, on[1] ? 1 : 0, block);
  Window window(p, image, block, p.length[image], begin);
  if (block + 1 < p.blocks())  // as Ahead in scan.h: what the next block reads and writes
    for (int64_t t = begin; t < end; ++t) {
      __builtin_prefetch(p.x(image, t) + (block + 1) * kLanes);
      for (int which = 0; which < 2; ++which)
        if (on[which]) __builtin_prefetch(u[which] + t * p.padded + kLanes);
    }
  for (int64_t t = begin; t < end; ++t) {
    window.move_to(t);
    if (on[0]) store(u[0] + t * p.padded, silu(window.convolve<0>(forward)) * window.mask[t]);
    if (on[1]) store(u[1] + t * p.padded, silu(window.convolve<1>(backward)) * window.mask[t]);
  }
}

// Of one direction: dL/d(the convolution's sum) into grad_sum, what the mask behind the SiLU receives added to
// grad_mask, and the gradients of the convolution's weights.
template <int kWhich>
void convolve_back(const Problem& p, int64_t image, int64_t block, Vec* grad_sum, Vec* grad_mask) {
  const Direction& d = p.direction[kWhich];
  const Taps taps(p, kWhich, block);
  const float* grad_u = d.grad_u + d.start[image] * p.padded + block * kLanes;
  Window window(p, image, block, p.length[image]);
  Vec grad_tap[kConvWidth] = {}, grad_bias = {};
  for (int64_t t = 0; t < window.length; ++t) {
    window.move_to(t);
    if (block + 1 < p.blocks()) {
      __builtin_prefetch(p.x(image, t) + (block + 1) * kLanes);
      __builtin_prefetch(grad_u + t * p.padded + kLanes);
    }
    Vec s = window.convolve<kWhich>(taps), gate = sigmoid(s), g = load(grad_u + t * p.padded);
    if (p.grad_mask) grad_mask[t] += g * s * gate;
    g *= window.mask[t] * gate * (1.f + s * (1.f - gate));
    grad_sum[t] = g;
    grad_bias += g;
    for (int k = 0; k < kConvWidth; ++k) grad_tap[k] += g * window.under<kWhich>(k);
  }
  for (int k = 0; k < kConvWidth; ++k) store(p.grad_weight(kWhich, image, p.conv_tap(k), block), grad_tap[k]);
  store(p.grad_weight(kWhich, image, p.conv_bias(), block), grad_bias);
}

// Gradients of x, of the convolution's weights and, if it is wanted, of the mask. grad_sum: 2 (L + 6), grad_mask: L
// vectors of scratch.
inline void convolve_block_back(const Problem& p, int64_t image, int64_t block, Vec* grad_sum, Vec* grad_mask) {
  constexpr int kReach = Window::kReach;
  // The mask may hide tokens behind the last one walked; the backward direction's taps still reach some of them.
  const int64_t visible = std::min(p.limit[image], p.length[image] + kReach), span = p.tokens + 2 * kReach;
  const int lanes = p.lanes(block);
  std::fill(grad_sum, grad_sum + 2 * span, Vec{});
  if (p.grad_mask) std::fill(grad_mask, grad_mask + p.tokens, Vec{});
  const Vec* sums[2] = {grad_sum + kReach, grad_sum + span + kReach};
  Vec tap[2][kConvWidth] = {};
  if (p.on(0, image)) convolve_back<0>(p, image, block, grad_sum + kReach, grad_mask);
  if (p.on(1, image)) convolve_back<1>(p, image, block, grad_sum + span + kReach, grad_mask);
  for (int which = 0; which < 2; ++which)
    for (int k = 0; k < kConvWidth && p.on(which, image); ++k) tap[which][k] = Taps(p, which, block).tap[k];

  const bool any = p.on(0, image) || p.on(1, image);
  const float* mask = p.mask + image * p.tokens;
  float* grad_mask_sum = p.grad_mask ? p.grad_mask + (block * p.images + image) * p.tokens : nullptr;
  for (int64_t t = 0; t < p.tokens; ++t) {
    float* grad_x = p.grad_x(image, t) + block * kLanes;
    if (grad_mask_sum) grad_mask_sum[t] = 0.f;
    if (!any || t >= visible) {
      store(grad_x, Vec{}, lanes);
      continue;
    }
    Vec g = {};
    for (int k = 0; k < kConvWidth; ++k)
      g += tap[0][k] * sums[0][t + kReach - k] + tap[1][k] * sums[1][t - kReach + k];
    if (block + 1 < p.blocks()) __builtin_prefetch(grad_x + kLanes);
    store(grad_x, g * mask[t], lanes);
    if (grad_mask_sum)
      grad_mask_sum[t] = sum(g * load(p.x(image, t) + block * kLanes, lanes) + grad_mask[t]);
  }
}
