// Residual add + RMSNorm, row by row; ops/rms_norm.py defines it.
#pragma once
#include <cmath>

#include "vector.h"

// Rows that share one partial sum of the weight's gradient, so that the result does not depend on the threads.
constexpr int64_t kNormRows = 64;

// total = residual + hidden where there is a hidden, and normed = total * scale * weight; -> scale = 1 / rms.
inline float norm_row(const float* hidden, const float* residual, const float* weight, float* total, float* normed,
                      int64_t width, float eps) {
  Vec squares = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    const int count = (int)(width - c < kLanes ? width - c : kLanes);
    Vec x = load(residual + c, count);
    if (hidden) {
      x = x + load(hidden + c, count);
      store(total + c, x, count);
    }
    squares = squares + x * x;
  }
  const float scale = 1.f / std::sqrt(sum(squares) / (float)width + eps);
  const float* x = hidden ? total : residual;
  for (int64_t c = 0; c < width; c += kLanes) {
    const int count = (int)(width - c < kLanes ? width - c : kLanes);
    store(normed + c, load(x + c, count) * scale * load(weight + c, count), count);
  }
  return scale;
}

// Of one row: grad = dL/d(total) = scale (g - unit mean(g unit)) + stream with g = grad_normed * weight and
// unit = total * scale; adds grad_normed * unit to grad_weight.
inline void norm_row_back(const float* grad_normed, const float* stream, const float* total, float scale,
                          const float* weight, float* grad, float* grad_weight, int64_t width) {
  Vec products = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    const int count = (int)(width - c < kLanes ? width - c : kLanes);
    const Vec weighted = load(grad_normed + c, count) * (load(total + c, count) * scale);
    store(grad_weight + c, load(grad_weight + c, count) + weighted, count);
    products += weighted * load(weight + c, count);
  }
  const float mean = sum(products) / (float)width;
  for (int64_t c = 0; c < width; c += kLanes) {
    const int count = (int)(width - c < kLanes ? width - c : kLanes);
    const Vec unit = load(total + c, count) * scale;
    Vec g = (load(grad_normed + c, count) * load(weight + c, count) - unit * mean) * scale;
    if (stream) g += load(stream + c, count);
    store(grad + c, g, count);
  }
}
