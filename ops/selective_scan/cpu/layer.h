// A layer's evaluation around its projections and scans: before them residual add + RMSNorm, the router, and which
// tokens the scans will walk; behind them the way of these tokens back to their images.
#pragma once
#include <cstring>
#include <vector>

#include "extent.h"
#include "norm.h"

// Mirrored field by field in library.py. Letters as in problem.h; d: width of the tokens.
struct Head {
  int64_t width, slots, threads;
  int64_t slot_stride;         // from one image's slots to the next one's; 0: all have the same
  const int64_t* slot;         // [slots] or [B, slots], the tokens whose mean the router reads; null: all that exist
  const int64_t* length;       // [B], so many tokens of an image exist; null: all
  const float* hidden;         // [B, L, d]; null: nothing is added
  const float* residual;       // [B, L, d]
  const float* norm_weight;    // [d]
  const float* router_weight;  // [2, d]; null: no router
  const float* router_bias;    // [2]
  float* total;                // [B, L, d], residual + hidden; null without hidden
  float* normed;               // [rows, d], existing tokens of the images that any scan runs for, without gaps
  float* gates;                // [B, 2], 1 or 0
  bool* active;                // [B, 2], the same of those images
  int64_t* running;            // [B], which they are, those with most to scan first
  int64_t* origin;             // [B + 1], where each of them begins in `normed`, and behind the last one
  int64_t* table;              // see extent.h
  float eps, threshold;        // a gate is open where its logit is above the threshold
};

// Tokens of an image that exist.
inline int64_t tokens_of(const Problem& p, const Head& h, int64_t image) {
  return h.length ? std::clamp<int64_t>(h.length[image], 0, p.tokens) : p.tokens;
}

// normed null: the sum alone.
inline void norm_token(const Head& h, int64_t row, float* normed) {
  const int64_t at = row * h.width;
  const float* hidden = h.hidden ? h.hidden + at : nullptr;
  float* total = h.total ? h.total + at : nullptr;
  if (normed) {
    norm_row(hidden, h.residual + at, h.norm_weight, total, normed, h.width, h.eps);
  } else if (hidden) {
    for (int64_t c = 0; c < h.width; ++c) total[c] = h.residual[at + c] + hidden[c];
  }
}

// place: [B], of each image among the running ones, or -1.
inline void norm_images(const Problem& p, const Head& h, const int64_t* place) {
#pragma omp parallel for num_threads((int)h.threads) if (h.threads > 1)
  for (int64_t row = 0; row < p.images * p.tokens; ++row) {
    const int64_t to = place[row / p.tokens], token = row % p.tokens;
    const bool read = to >= 0 && token < h.origin[to + 1] - h.origin[to];
    norm_token(h, row, read ? h.normed + (h.origin[to] + token) * h.width : nullptr);
  }
}

// The gates of an image from the sum of `count` normed tokens.
inline void route_image(const Head& h, int64_t image, const float* sums, int64_t count) {
  for (int which = 0; which < 2; ++which) {
    Vec products = {};
    for (int64_t c = 0; c < h.width; c += kLanes) {
      const int lanes = (int)std::min<int64_t>(kLanes, h.width - c);
      products += load(sums + c, lanes) * load(h.router_weight + which * h.width + c, lanes);
    }
    h.gates[2 * image + which] = sum(products) / (float)count + h.router_bias[which] > h.threshold;
  }
}

inline void route(const Problem& p, const Head& h) {
#pragma omp parallel num_threads((int)h.threads) if (h.threads > 1 && !h.slot)
  {
    std::vector<float> sums(h.width), normed(h.width);
#pragma omp for
    for (int64_t image = 0; image < p.images; ++image) {
      std::fill(sums.begin(), sums.end(), 0.f);
      const int64_t* slot = h.slot ? h.slot + image * h.slot_stride : nullptr;
      const int64_t count = slot ? h.slots : tokens_of(p, h, image);
      for (int64_t i = 0; i < count; ++i) {
        norm_token(h, image * p.tokens + (slot ? slot[i] : i), normed.data());
        for (int64_t c = 0; c < h.width; ++c) sums[c] += normed[c];
      }
      route_image(h, image, sums.data(), count);
    }
  }
}

// Everything of a layer up to its input projection. The problem is left with the images that any scan runs for. Those
// with equally much to scan stand together: threads that share a few of them are done at the same time. Returns
// whether these are all images, each whole and where it was.
inline bool enter_layer(Problem& p, const Head& h) {
  std::vector<int64_t> place(p.images, -1), length(p.images), steps(p.images);
  if (h.router_weight) route(p, h);
  int64_t running = 0;
  for (int64_t image = 0; image < p.images; ++image) {
    const float* gates = h.router_weight ? h.gates + 2 * image : nullptr;
    const int directions = gates ? (gates[0] != 0) + (gates[1] != 0) : 2;
    steps[image] = directions * tokens_of(p, h, image);
    if (directions) h.running[running++] = image;
  }
  std::stable_sort(h.running, h.running + running, [&](int64_t a, int64_t b) { return steps[a] > steps[b]; });
  h.origin[0] = 0;
  for (int64_t i = 0; i < running; ++i) {
    const int64_t image = h.running[i];
    place[image] = i;
    length[i] = tokens_of(p, h, image);
    h.origin[i + 1] = h.origin[i] + length[i];
    if (h.router_weight)
      for (int which = 0; which < 2; ++which) h.active[2 * i + which] = h.gates[2 * image + which] != 0;
  }
  norm_images(p, h, place.data());
  p.images = running;
  p.origin = h.origin;
  measure_extent(p, length.data(), h.router_weight ? h.active : nullptr, 0, h.table);
  read_extent(p, h.table);
  return h.origin[running] == (int64_t)place.size() * p.tokens && std::is_sorted(h.running, h.running + running);
}

// rows [rows, width] of the problem's images, without gaps -> out [., L, width] at the images of these numbers; 0 for
// tokens that do not exist.
inline void spread_images(const Problem& p, const int64_t* images, const float* rows, float* out, int64_t width,
                          int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
  for (int64_t i = 0; i < p.images; ++i) {
    const int64_t count = p.rows_of(i) * width, all = p.tokens * width;
    float* to = out + images[i] * all;
    std::memcpy(to, rows + p.row(i) * width, count * sizeof *rows);
    std::fill(to + count, to + all, 0.f);
  }
}
