// The selective scan of both directions with step projection, skip and gate, for one image and one channel block:
//
//     delta = softplus(W_dt dt + bias)      h = exp(delta A) h + delta u B      y = C h + D u
//     out = silu(z) * (factor_0 y_0 + factor_1 y_1)
//
// A mask in place multiplies delta.
//
// Work goes in tiles of kTile steps, counted in scan order: the backward direction walks from the last token to the
// first. Within a tile the states pass by in groups that fit the registers.
#pragma once
#include <vector>

#include "problem.h"

// Calls f with the size of each group of states as a compile-time constant, and the group's first state.
template <int kLargest, class F>
inline void for_state_groups(int64_t states, F&& f) {
  int64_t s = 0;
  for (; s + kLargest <= states; s += kLargest) f(std::integral_constant<int, kLargest>(), s);
  for (; s + 4 <= states; s += 4) f(std::integral_constant<int, 4>(), s);
  for (; s < states; ++s) f(std::integral_constant<int, 1>(), s);
}

// Where the steps of a tile lie in a matrix of tokens, for one channel block.
template <class T>
struct Rows {
  T* first;
  int64_t stride;  // from one step to the next
  T* operator[](int step) const { return first + step * stride; }
};

// Position of one tile: image, direction, channel block and the tokens.
struct Tile {
  const Problem& p;
  const int which;
  const int64_t image, block, index;
  int steps;
  int64_t first;   // token of step 0
  int64_t stride;  // tokens from one step to the next: 1 or -1

  Tile(const Problem& p_, int which_, int64_t image_, int64_t block_, int64_t index_)
      : p(p_), which(which_), image(image_), block(block_), index(index_) {
    const int64_t begin = index * kTile, length = p.length[image];
    steps = (int)std::min<int64_t>(kTile, length - begin);
    first = which == 0 ? begin : length - 1 - begin;
    stride = which == 0 ? 1 : -1;
  }
  int64_t token(int step) const { return first + stride * step; }
  int64_t row(int step) const { return p.direction[which].start[image] + token(step); }
  template <class T>
  Rows<T> packed(T* buffer) const {  // [rows, P]
    return {buffer + row(0) * p.padded + block * kLanes, stride * p.padded};
  }
  template <class T>
  Rows<T> whole(T* tensor, int64_t width) const {  // [B, L, width]
    return {tensor + (p.row(image) + first) * width + block * kLanes, stride * width};
  }
  Rows<const float> u() const { return packed<const float>(p.direction[which].u); }
  Rows<const float> z() const { return whole(p.xz + p.channels, 2 * p.channels); }
  const float* projected(int step) const { return p.direction[which].projected + row(step) * p.projections(); }
  float* checkpoint() const {
    const Direction& d = p.direction[which];
    if (!d.checkpoints) return nullptr;
    return d.checkpoints + ((d.chunk[image] + index) * p.blocks() + block) * p.states * kLanes;
  }
};

// The step sizes of a tile and what the scan needs of them.
struct Steps {
  Vec delta[kTile], input[kTile];  // input = delta u
  Vec derivative[kTile];           // of delta with respect to the projected step; backward pass only
  Vec unmasked[kTile];             // softplus; backward pass of a mask in place only
  float largest;
};

// Eight tokens at a time: each row of the weight is loaded once for all, and no sum waits for the one before it.
inline void project_steps(const Tile& tile, Vec* delta) {
  constexpr int kTogether = 8;
  const Problem& p = tile.p;
  const Vec bias = load(p.weight(tile.which, p.step_bias(), tile.block));
  const float* weight = p.weight(tile.which, p.step_weight(0), tile.block);
  for (int step = 0; step < tile.steps; step += kTogether) {
    const float* dt[kTogether];
    Vec total[kTogether];
    for (int k = 0; k < kTogether; ++k) {
      dt[k] = tile.projected(std::min(step + k, tile.steps - 1));
      total[k] = bias;
    }
    for (int64_t r = 0; r < p.rank; ++r) {
      const Vec w = load(weight + r * p.padded);
      for (int k = 0; k < kTogether; ++k) total[k] += w * dt[k][r];
    }
    for (int k = 0; k < kTogether; ++k) delta[step + k] = total[k];
  }
}

template <bool kDerivative>
inline void compute_steps(const Tile& tile, Steps& steps) {
  project_steps(tile, steps.delta);
  Largest largest;
  const auto u = tile.u();
  for (int t = 0; t < tile.steps; ++t) {
    Vec delta = softplus(steps.delta[t], kDerivative ? &steps.derivative[t] : nullptr);
    if (tile.p.in_place) {
      const float mask = tile.p.step_mask(tile.image, tile.token(t));
      if (kDerivative) {
        steps.unmasked[t] = delta;
        steps.derivative[t] *= mask;
      }
      delta *= mask;
    }
    steps.delta[t] = delta;
    steps.input[t] = delta * load(u[t]);
    largest.see(delta);
  }
  steps.largest = largest.value();
}

// Rows that the next channel block of a tile reads and writes: asked for step by step while this one is scanned. They
// lie a row of all channels apart, in more places than the processor follows by itself.
struct Ahead {
  Rows<const float> rows[3];
  int count = 0;
  template <class T>
  void add(const Rows<T>& own) { rows[count++] = {own.first + kLanes, own.stride}; }
  void fetch(int step) const {
    for (int i = 0; i < count; ++i) __builtin_prefetch(rows[i][step]);
  }
};

// y[t] += C h over one group of states; kInRange: every exponent is known to lie within exp2_in_range. keep(t, s, h
// before the step, decay) is called for every state of every step.
template <int kStates, bool kInRange, class Keep>
inline void scan_tile(const Tile& tile, const Steps& steps, int64_t first_state, const Vec* A, Vec* state, Vec* y,
                      const Ahead& ahead, Keep&& keep) {
  Vec h[kStates];
  for (int s = 0; s < kStates; ++s) h[s] = state[s];
  const float* B = tile.projected(0) + tile.p.rank + first_state;
  const float* C = B + tile.p.states;
  const int64_t stride = tile.stride * tile.p.projections();
  for (int t = 0; t < tile.steps; ++t, B += stride, C += stride) {
    const Vec delta = steps.delta[t], input = steps.input[t];
    Vec total = y[t];
    ahead.fetch(t);
#pragma GCC unroll 16
    for (int s = 0; s < kStates; ++s) {
      const Vec decay = kInRange ? exp2_in_range(delta * A[s]) : exp2_clamped(delta * A[s]);
      keep(t, s, h[s], decay);
      h[s] = decay * h[s] + input * B[s];
      total += h[s] * C[s];
    }
    y[t] = total;
  }
  for (int s = 0; s < kStates; ++s) state[s] = h[s];
}

// A of one channel block, and the largest step for which no exponent leaves the range of exp2_in_range.
struct Decays {
  std::vector<Vec> A;
  float step_limit;
  explicit Decays(int64_t states) : A(states) {}
  void read(const Problem& p, int which, int64_t block) {
    Largest largest;
    for (int64_t s = 0; s < p.states; ++s) {
      A[s] = load(p.weight(which, p.A(s), block));
      largest.see(A[s]);
    }
    step_limit = kExp2Range / largest.value();
  }
};

// One tile from step sizes to output. The first direction of an image writes the output, a second one adds to it, and
// the last one gates it.
inline void walk_tile(const Tile& tile, bool first, bool last, const Decays& decays, Vec* state) {
  const Problem& p = tile.p;
  const Vec skip = load(p.weight(tile.which, p.skip(), tile.block));
  const float factor = p.factor[2 * tile.image + tile.which];
  const int lanes = p.lanes(tile.block);
  const auto u = tile.u(), z = tile.z();
  const auto out = tile.whole(p.out, p.channels);
  Steps steps;
  compute_steps<false>(tile, steps);
  Vec y[kTile] = {};
  Ahead ahead, nothing;
  if (tile.block + 1 < p.blocks()) {
    ahead.add(u);
    ahead.add(out);
    if (last) ahead.add(z);
  }
  const auto forget = [](int, int, Vec, Vec) {};
  for_state_groups<kRegisterStates>(p.states, [&](auto size, int64_t s) {
    if (steps.largest < decays.step_limit)
      scan_tile<size, true>(tile, steps, s, &decays.A[s], &state[s], y, s ? nothing : ahead, forget);
    else
      scan_tile<size, false>(tile, steps, s, &decays.A[s], &state[s], y, s ? nothing : ahead, forget);
  });
  for (int t = 0; t < tile.steps; ++t) {
    Vec total = (y[t] + skip * load(u[t])) * factor;
    if (!first) total += load(out[t], lanes);
    if (last) total *= silu(load(z[t], lanes));
    store(out[t], total, lanes);
  }
}

// The state at the head of a tile, for the backward pass.
inline void keep_state(const Tile& tile, const Vec* state) {
  if (float* checkpoint = tile.checkpoint())
    for (int64_t s = 0; s < tile.p.states; ++s) store(checkpoint + s * kLanes, state[s]);
}

inline void scan_direction(const Problem& p, int which, int64_t image, int64_t block, bool first, bool last,
                           Decays& decays, std::vector<Vec>& state) {
  decays.read(p, which, block);
  std::fill(state.begin(), state.end(), Vec{});
  for (int64_t index = 0; index * kTile < p.length[image]; ++index) {
    const Tile tile(p, which, image, block, index);
    keep_state(tile, state.data());
    walk_tile(tile, first, last, decays, state.data());
  }
}

// The output of the tokens that no scan walks.
inline void clear_behind(const Problem& p, int64_t image, int64_t block, int64_t walked) {
  for (int64_t t = walked; t < p.rows_of(image); ++t)
    store(p.out + (p.row(image) + t) * p.channels + block * kLanes, Vec{}, p.lanes(block));
}

inline void scan_block(const Problem& p, int64_t image, int64_t block, Decays& decays, std::vector<Vec>& state) {
  const bool on[2] = {p.on(0, image), p.on(1, image)};
  clear_behind(p, image, block, on[0] || on[1] ? p.length[image] : 0);
  if (on[0]) scan_direction(p, 0, image, block, true, !on[1], decays, state);
  if (on[1]) scan_direction(p, 1, image, block, !on[0], true, decays, state);
}
