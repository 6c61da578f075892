// The projection, and all forward passes in one: a thread takes a whole image through convolution, projection and scan
// of one direction after the other, so that u does not leave its cache before it is read.
#pragma once
#include <memory>

#include "convolution.h"
#include "scan.h"

// Columns of the projection, in half vectors, and rows that are worked on at a time: their sums fill the registers.
constexpr int kHalfLanes = kLanes / 2;
constexpr int kPanel = kRegisterStates == 16 ? 8 : 6;
constexpr int kSums = kRegisterStates == 16 ? 24 : 12;
// Rows whose sums wait while the weights of so many channels, which stay in the nearest cache, meet one after the
// other. As many rows are one thread's at a time where an image is shared out.
constexpr int64_t kProjectedRows = 48, kDepth = 128;

typedef float HalfVec __attribute__((vector_size(4 * kHalfLanes)));
typedef float UnalignedHalfVec __attribute__((vector_size(4 * kHalfLanes), aligned(4), may_alias));

// Of a number in all lanes, so that both widths take it from memory once.
inline HalfVec lower_half(Vec v) {
  HalfVec half;
  __builtin_memcpy(&half, &v, sizeof half);
  return half;
}

// A row of a panel of kHalves half vectors.
template <int kHalves>
struct Sums {
  static constexpr int kVectors = kHalves / 2;
  Vec whole[kVectors ? kVectors : 1];
  HalfVec half;  // where kHalves is odd
};

// sums += u W over `depth` channels, for kRows rows.
template <int kHalves, int kRows>
inline void add_rows(const Problem& p, const float* u, const float* weight, int64_t depth, Sums<kHalves>* sums) {
  constexpr int kVectors = kHalves / 2;
  constexpr bool kHalf = kHalves % 2;
  Vec total[kRows][kVectors ? kVectors : 1];
  HalfVec rest[kRows];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) total[r][v] = sums[r].whole[v];
    rest[r] = sums[r].half;
  }
  for (int64_t e = 0; e < depth; ++e, weight += p.padded_projections()) {
    Vec w[kVectors ? kVectors : 1];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = load(weight + v * kLanes);
    HalfVec half = {};
    if (kHalf) half = *reinterpret_cast<const UnalignedHalfVec*>(weight + kVectors * kLanes);
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
      const Vec x = splat(u[r * p.padded + e]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[r][v] += w[v] * x;
      if (kHalf) rest[r] += half * lower_half(x);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r].whole[v] = total[r][v];
    sums[r].half = rest[r];
  }
}

// Of a panel of kHalves half vectors, `columns` exist. A row's sums do not depend on the rows beside it, so that an
// image's result depends on neither batch nor threads.
template <int kHalves>
inline void project_panel(const Problem& p, const float* u, const float* weight, float* out, int64_t rows,
                          int64_t columns) {
  constexpr int kRows = kSums / ((kHalves + 1) / 2), kVectors = kHalves / 2;
  Sums<kHalves> sums[kProjectedRows];
  for (int64_t begin = 0; begin < rows; begin += kProjectedRows, u += kProjectedRows * p.padded) {
    const int64_t count = std::min(kProjectedRows, rows - begin);
    std::fill(sums, sums + count, Sums<kHalves>{});
    for (int64_t e = 0; e < p.channels; e += kDepth) {
      const int64_t depth = std::min(kDepth, p.channels - e);
      const float* w = weight + e * p.padded_projections();
      int64_t row = 0;
      for (; row + kRows <= count; row += kRows)
        add_rows<kHalves, kRows>(p, u + row * p.padded + e, w, depth, sums + row);
      for (; row + kRows / 2 <= count; row += kRows / 2)
        add_rows<kHalves, kRows / 2>(p, u + row * p.padded + e, w, depth, sums + row);
      for (; row < count; ++row) add_rows<kHalves, 1>(p, u + row * p.padded + e, w, depth, sums + row);
    }
    for (int64_t row = 0; row < count; ++row, out += p.projections()) {
      for (int v = 0; v < kVectors; ++v)
        store(out + v * kLanes, sums[row].whole[v], (int)std::min<int64_t>(kLanes, columns - v * kLanes));
      const int64_t left = kHalves % 2 ? std::min<int64_t>(kHalfLanes, columns - kVectors * kLanes) : 0;
      for (int64_t lane = 0; lane < left; ++lane) out[kVectors * kLanes + lane] = sums[row].half[lane];
    }
  }
}

// Calls f with the number of half vectors of a panel as a compile-time constant.
template <int kHalves, class F>
inline void for_panel(int64_t halves, F&& f) {
  if constexpr (kHalves > 1)
    if (halves < kHalves) return for_panel<kHalves - 1>(halves, f);
  f(std::integral_constant<int, kHalves>());
}

// projected [rows, R + 2N] = u [rows, P] x_proj^T
inline void project(const Problem& p, const float* u, const float* weight, float* projected, int64_t rows) {
  for (int64_t column = 0; column < p.projections(); column += kPanel * kHalfLanes) {
    const int64_t columns = p.projections() - column;
    for_panel<kPanel>((columns + kHalfLanes - 1) / kHalfLanes, [&](auto halves) {
      project_panel<halves>(p, u, weight + column, projected + column, rows, columns);
    });
  }
}

struct ForwardScratch {
  std::unique_ptr<Vec[]> u;            // of one image and one direction, where they are not kept
  std::unique_ptr<float[]> projected;  // the same
  std::vector<Vec> state;              // [blocks, N]
  std::vector<Decays> decays[2];       // of each block
  explicit ForwardScratch(const Problem& p) : state(p.blocks() * p.states) {
    for (int which = 0; which < 2; ++which) {
      if (!p.direction[which].start) continue;
      decays[which].assign(p.blocks(), Decays(p.states));
      for (int64_t block = 0; block < p.blocks(); ++block) decays[which][block].read(p, which, block);
      if (p.direction[which].u || u) continue;
      u.reset(new Vec[p.tokens * p.blocks()]);  // of whole vectors: none lies across two lines of the cache
      projected.reset(new float[p.tokens * p.projections()]);
    }
  }
  // u and projected of an image start here.
  void place(const Problem& all, int which, int64_t image, Direction& d) const {
    if (d.u) {
      d.u += all.direction[which].start[image] * all.padded;
      d.projected += all.direction[which].start[image] * all.projections();
      d.chunk += image;
    } else {
      d.u = reinterpret_cast<float*>(u.get());
      d.projected = projected.get();
    }
  }
};

// Tile by tile, and in each over all channels: whole rows of x, z and the output pass by, which a processor fetches
// ahead, while one block's share of them lies scattered over as many pages.
inline void forward_image(const Problem& all, int64_t image, ForwardScratch& scratch) {
  const bool on[2] = {all.on(0, image), all.on(1, image)};
  Problem p = all.only(image);
  const int64_t start = 0, length = on[0] || on[1] ? p.length[0] : 0;
  for (int64_t block = 0; block < p.blocks(); ++block) clear_behind(p, 0, block, length);
  for (int which = 0; which < 2; ++which) {
    if (!on[which]) continue;
    Direction& d = p.direction[which];
    scratch.place(all, which, image, d);
    d.start = &start;
    p.direction[1 - which].start = nullptr;
    for (int64_t begin = 0; begin < length; begin += kTile)
      for (int64_t block = 0; block < p.blocks(); ++block)
        convolve_block(p, 0, block, begin, std::min(begin + kTile, length));
    project(p, d.u, d.projection, d.projected, length);
    std::fill(scratch.state.begin(), scratch.state.end(), Vec{});
    for (int64_t index = 0; index * kTile < length; ++index)
      for (int64_t block = 0; block < p.blocks(); ++block) {
        const Tile tile(p, which, 0, block, index);
        Vec* state = &scratch.state[block * p.states];
        keep_state(tile, state);
        walk_tile(tile, which == 0 || !on[0], which == 1 || !on[1], scratch.decays[which][block], state);
      }
  }
}
