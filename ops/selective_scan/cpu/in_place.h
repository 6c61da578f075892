// The convolution of a mask in place, and its gradient: a token, kept or dropped, reads itself and its nearest kept
// predecessors in scan order. Each direction is walked by itself, with the kept rows behind it in registers.
#pragma once
#include "convolution.h"

constexpr int kKept = kConvWidth - 1;  // kept rows of a window

// One direction of one image and one channel block, step by step in scan order.
template <int kWhich>
struct Walk {
  const Problem& p;
  const int64_t image, block, length;
  const float* mask;
  Vec tap[kConvWidth], bias;  // tap[0]: of the token itself, tap[k]: of its k-th kept predecessor

  Walk(const Problem& problem, int64_t image_, int64_t block_)
      : p(problem), image(image_), block(block_), length(p.length[image]), mask(p.mask + image * p.tokens) {
    const Taps taps(p, kWhich, block);
    for (int k = 0; k < kConvWidth; ++k) tap[k] = taps.tap[kConvWidth - 1 - k];
    bias = taps.bias;
  }
  int64_t token(int64_t step) const { return kWhich == 0 ? step : length - 1 - step; }
  bool keeps(int64_t t) const { return mask[t] > 0.5f; }
  Vec x(int64_t t) const { return load(p.x(image, t) + block * kLanes, p.lanes(block)); }
  int64_t at(int64_t t) const {  // into a [rows, P] buffer
    return (p.direction[kWhich].start[image] + t) * p.padded + block * kLanes;
  }
  Vec convolve(Vec row, const Vec* kept) const {
    Vec s = bias + tap[0] * row;
    for (int k = 0; k < kKept; ++k) s += tap[k + 1] * kept[k];
    return s;
  }
};

// The newest comes first.
template <class T>
inline void push(T* queue, T newest) {
  for (int k = kKept - 1; k > 0; --k) queue[k] = queue[k - 1];
  queue[0] = newest;
}

template <int kWhich>
void convolve_in_place(const Problem& p, int64_t image, int64_t block) {
  if (!p.on(kWhich, image)) return;
  const Walk<kWhich> walk(p, image, block);
  Vec kept[kKept] = {};
  for (int64_t step = 0; step < walk.length; ++step) {
    const int64_t t = walk.token(step);
    const Vec row = walk.x(t);
    store(p.direction[kWhich].u + walk.at(t), silu(walk.convolve(row, kept)));
    if (walk.keeps(t)) push(kept, row);
  }
}

// grad_sum[t] = dL/d(the convolution's sum); grad_x receives what comes back to x. The gradients of the convolution's
// weights are stored.
template <int kWhich>
void convolve_in_place_back(const Walk<kWhich>& walk, Vec* grad_sum, Vec* grad_x) {
  const Problem& p = walk.p;
  Vec kept[kKept] = {}, grad_kept[kKept] = {}, grad_tap[kConvWidth] = {}, grad_bias = {};
  int64_t where[kKept] = {-1, -1, -1};
  for (int64_t step = 0; step < walk.length; ++step) {
    const int64_t t = walk.token(step);
    const Vec row = walk.x(t), s = walk.convolve(row, kept), gate = sigmoid(s);
    const Vec g = load(p.direction[kWhich].grad_u + walk.at(t)) * gate * (1.f + s * (1.f - gate));
    grad_sum[t] = g;
    grad_bias += g;
    grad_tap[0] += g * row;
    grad_x[t] += g * walk.tap[0];
    for (int k = 0; k < kKept; ++k) {
      grad_tap[k + 1] += g * kept[k];
      grad_kept[k] += g * walk.tap[k + 1];
    }
    if (!walk.keeps(t)) continue;
    if (where[kKept - 1] >= 0) grad_x[where[kKept - 1]] += grad_kept[kKept - 1];
    push(kept, row);
    push(grad_kept, Vec{});
    push(where, t);
  }
  for (int k = 0; k < kKept; ++k)
    if (where[k] >= 0) grad_x[where[k]] += grad_kept[k];
  for (int k = 0; k < kConvWidth; ++k)
    store(p.grad_weight(kWhich, walk.image, p.conv_tap(k), walk.block), grad_tap[kConvWidth - 1 - k]);
  store(p.grad_weight(kWhich, walk.image, p.conv_bias(), walk.block), grad_bias);
}

// What a token changes in the windows of its next kept successors: with it, the window of the j-th holds it at tap j
// and the kept ones before it one tap further; without it, all of these stand one tap nearer.
template <int kWhich>
void windows_back(const Walk<kWhich>& walk, const Vec* grad_sum, Vec* grad_mask) {
  Vec kept[kKept] = {}, after[kKept] = {};  // rows behind, grad_sum ahead
  int64_t ahead = 0;
  auto advance = [&] {  // `after` loses the nearest successor and gains one
    for (int k = 0; k + 1 < kKept; ++k) after[k] = after[k + 1];
    while (ahead < walk.length && !walk.keeps(walk.token(ahead))) ++ahead;
    after[kKept - 1] = ahead < walk.length ? grad_sum[walk.token(ahead++)] : Vec{};
  };
  for (int k = 0; k < kKept; ++k) advance();
  for (int64_t step = 0; step < walk.length; ++step) {
    const int64_t t = walk.token(step);
    const Vec row = walk.x(t);
    if (walk.keeps(t)) advance();
    Vec nearer = row;
    for (int i = 0; i < kKept; ++i) {
      Vec moved = {};
      for (int j = 1; j <= kKept - i; ++j) moved += walk.tap[i + j] * after[j - 1];
      grad_mask[t] += (nearer - kept[i]) * moved;
      nearer = kept[i];
    }
    if (walk.keeps(t)) push(kept, row);
  }
}

// Gradients of x, of the windows' part of the mask (added to what the scan left in p.grad_mask) and of the
// convolution's weights. grad_sum, grad_x, grad_mask: L vectors of scratch each.
inline void convolve_in_place_back(const Problem& p, int64_t image, int64_t block, Vec* grad_sum, Vec* grad_x,
                                   Vec* grad_mask) {
  std::fill(grad_x, grad_x + p.tokens, Vec{});
  std::fill(grad_mask, grad_mask + p.tokens, Vec{});
  auto direction = [&](auto walk) {
    convolve_in_place_back(walk, grad_sum, grad_x);
    windows_back(walk, grad_sum, grad_mask);
  };
  if (p.on(0, image)) direction(Walk<0>(p, image, block));
  if (p.on(1, image)) direction(Walk<1>(p, image, block));
  const int64_t walked = p.on(0, image) || p.on(1, image) ? p.length[image] : 0;
  float* grad_mask_sum = p.grad_mask + (block * p.images + image) * p.tokens;
  for (int64_t t = 0; t < p.tokens; ++t) {
    store(p.grad_x(image, t) + block * kLanes, grad_x[t], p.lanes(block));
    grad_mask_sum[t] = t < walked ? grad_mask_sum[t] + sum(grad_mask[t]) : 0.f;
  }
}
