// Residual add + RMSNorm of one row; ops/rms_norm.py defines it.
#pragma once
#include <cmath>

#include "vector.h"

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
