// Which tokens are worked on, and where their packed rows stand.
#pragma once
#include "problem.h"

// The table of extents, 6 B + 4 numbers: limit, length, start and chunk of both directions (see Problem and Direction)
// for each image, then the rows and the chunks of both directions.
constexpr int64_t kLimit = 0, kLength = 1, kStart = 2, kChunk = 4, kTotals = 6;

// Tokens up to the last one, within `limit`, whose mask is not zero.
inline int64_t visible(const float* mask, int64_t limit) {
  while (limit > 0 && mask[limit - 1] == 0.f) --limit;
  return limit;
}

// lengths: [B] tokens that exist, null: all. active: [B, 2], null: all. Directions without weights are off.
// masked: tokens behind the last one that the mask lets through are left out.
inline void measure_extent(const Problem& p, const int64_t* lengths, const bool* active, bool masked, int64_t* table) {
  int64_t* totals = table + kTotals * p.images;
  std::fill(totals, totals + 4, 0);
  for (int64_t image = 0; image < p.images; ++image) {
    const int64_t limit = lengths ? std::clamp<int64_t>(lengths[image], 0, p.tokens) : p.tokens;
    const int64_t length = masked ? visible(p.mask + image * p.tokens, limit) : limit;
    table[kLimit * p.images + image] = limit;
    table[kLength * p.images + image] = length;
    for (int which = 0; which < 2; ++which) {
      const bool on = p.direction[which].weights && (!active || active[2 * image + which]);
      table[(kStart + which) * p.images + image] = on ? totals[which] : -1;
      table[(kChunk + which) * p.images + image] = totals[2 + which];
      if (!on) continue;
      totals[which] += length;
      totals[2 + which] += (length + kTile - 1) / kTile;
    }
  }
}

inline void read_extent(Problem& p, const int64_t* table) {
  const int64_t* totals = table + kTotals * p.images;
  p.limit = table + kLimit * p.images;
  p.length = table + kLength * p.images;
  for (int which = 0; which < 2; ++which) {
    p.rows[which] = totals[which];
    p.chunks[which] = totals[2 + which];
    if (!p.direction[which].weights) continue;
    p.direction[which].start = table + (kStart + which) * p.images;
    p.direction[which].chunk = table + (kChunk + which) * p.images;
  }
}
