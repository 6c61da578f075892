// The head of a layer at evaluation: residual add + RMSNorm, the router, and which tokens the scans will walk.
#pragma once
#include "extent.h"
#include "norm.h"

// Mirrored field by field in library.py. Letters as in problem.h; d: width of the tokens.
struct Head {
  int64_t width, slots, threads;
  const int64_t* slot;         // [slots], the tokens whose mean the router reads; null: all of them
  const float* hidden;         // [B, L, d]; null: nothing is added
  const float* residual;       // [B, L, d]
  const float* norm_weight;    // [d]
  const float* router_weight;  // [2, d]; null: no router
  const float* router_bias;    // [2]
  float* total;                // [B, L, d], residual + hidden; null without hidden
  float* normed;               // [B, L, d]
  float* gates;                // [B, 2], 1 or 0
  bool* active;                // [B, 2], the same
  int64_t* table;              // see extent.h
  float eps, threshold;        // a gate is open where its logit is above the threshold
};

inline void norm_rows(const Head& h, int64_t rows) {
#pragma omp parallel for num_threads((int)h.threads) if (h.threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * h.width;
    norm_row(h.hidden ? h.hidden + at : nullptr, h.residual + at, h.norm_weight, h.total ? h.total + at : nullptr,
             h.normed + at, h.width, h.eps);
  }
}

inline void route_image(const Problem& p, const Head& h, int64_t image) {
  Vec products[2] = {};
  for (int64_t c = 0; c < h.width; c += kLanes) {
    const int count = (int)std::min<int64_t>(kLanes, h.width - c);
    Vec sum = {};
    for (int64_t i = 0; i < h.slots; ++i) {
      const int64_t token = h.slot ? h.slot[i] : i;
      sum += load(h.normed + (image * p.tokens + token) * h.width + c, count);
    }
    for (int which = 0; which < 2; ++which)
      products[which] += sum * load(h.router_weight + which * h.width + c, count);
  }
  for (int which = 0; which < 2; ++which) {
    const float logit = sum(products[which]) / (float)h.slots + h.router_bias[which];
    const bool open = logit > h.threshold;
    h.active[2 * image + which] = open;
    h.gates[2 * image + which] = open;
  }
}

inline void route(const Problem& p, const Head& h) {
#pragma omp parallel for num_threads((int)h.threads) if (h.threads > 1 && !h.slot)
  for (int64_t image = 0; image < p.images; ++image) route_image(p, h, image);
}
