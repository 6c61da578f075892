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
    return {tensor + (image * p.tokens + first) * width + block * kLanes, stride * width};
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

// What the backward pass wants to know of every step of a state group.
template <int kStates>
struct History {
  Vec before[kTile][kStates], decay[kTile][kStates];
};

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

// y[t] += C h over one group of states; kInRange: every exponent is known to lie within exp2_in_range.
template <int kStates, bool kInRange, bool kHistory>
inline void scan_tile(const Tile& tile, const Steps& steps, int64_t first_state, const Vec* A, Vec* state, Vec* y,
                      const Ahead& ahead, History<kStates>* history) {
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
      if (kHistory) {
        history->before[t][s] = h[s];
        history->decay[t][s] = decay;
      }
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

// ---- forward

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
  for_state_groups<kRegisterStates>(p.states, [&](auto size, int64_t s) {
    if (steps.largest < decays.step_limit)
      scan_tile<size, true, false>(tile, steps, s, &decays.A[s], &state[s], y, s ? nothing : ahead, nullptr);
    else
      scan_tile<size, false, false>(tile, steps, s, &decays.A[s], &state[s], y, s ? nothing : ahead, nullptr);
  });
  for (int t = 0; t < tile.steps; ++t) {
    Vec total = (y[t] + skip * load(u[t])) * factor;
    if (!first) total += load(out[t], lanes);
    if (last) total *= silu(load(z[t], lanes));
    store(out[t], total, lanes);
  }
}

inline void scan_direction(const Problem& p, int which, int64_t image, int64_t block, bool first, bool last,
                           Decays& decays, std::vector<Vec>& state) {
  decays.read(p, which, block);
  std::fill(state.begin(), state.end(), Vec{});
  for (int64_t index = 0; index * kTile < p.length[image]; ++index) {
    const Tile tile(p, which, image, block, index);
    if (float* checkpoint = tile.checkpoint())
      for (int64_t s = 0; s < p.states; ++s) store(checkpoint + s * kLanes, state[s]);
    walk_tile(tile, first, last, decays, state.data());
  }
}

// The output of the tokens that no scan walks.
inline void clear_behind(const Problem& p, int64_t image, int64_t block, int64_t walked) {
  for (int64_t t = walked; t < p.tokens; ++t)
    store(p.out + (image * p.tokens + t) * p.channels + block * kLanes, Vec{}, p.lanes(block));
}

inline void scan_block(const Problem& p, int64_t image, int64_t block, Decays& decays, std::vector<Vec>& state) {
  const bool on[2] = {p.on(0, image), p.on(1, image)};
  clear_behind(p, image, block, on[0] || on[1] ? p.length[image] : 0);
  if (on[0]) scan_direction(p, 0, image, block, true, !on[1], decays, state);
  if (on[1]) scan_direction(p, 1, image, block, !on[0], true, decays, state);
}

// ---- backward

// Scratch of one thread, reused from task to task.
struct BackScratch {
  Decays decays;
  std::vector<Vec> state;        // [N]
  std::vector<Vec> grad_state;   // [blocks of the group, N], dL/dh carried from tile to tile
  std::vector<Vec> grad_steps;   // [blocks of the group, R], of the step's projection, gathered from tile to tile
  std::vector<Vec> grad_BC;      // [kTile, 2N], sums over the blocks of the group, lane by lane
  BackScratch(const Problem& p, int64_t blocks)
      : decays(p.states), state(p.states), grad_state(blocks * p.states), grad_steps(blocks * p.rank),
        grad_BC(kTile * 2 * p.states) {}
};

// The way back through one tile for one group of states. Per step: grad_y is dL/dy; `via_B` and `via_A` gather
// dL/d(delta u) and dL/ddelta as far as they come through the input and the decay.
template <int kStates>
inline void scan_tile_back(const Tile& tile, const Steps& steps, int64_t first_state, const Vec* A, const Vec* last,
                           const History<kStates>& history, const Vec* grad_y, Vec* via_B, Vec* via_A,
                           Vec* grad_state, Vec* grad_BC) {
  Vec carried[kStates], grad_A[kStates] = {};
  for (int s = 0; s < kStates; ++s) carried[s] = grad_state[s];
  const int64_t states = tile.p.states;
  for (int t = tile.steps - 1; t >= 0; --t) {
    const float* B = tile.projected(t) + tile.p.rank + first_state;
    const float* C = B + states;
    const Vec* after = t + 1 < tile.steps ? history.before[t + 1] : last;
    Vec* grad_B = grad_BC + t * 2 * states + first_state;
    Vec* grad_C = grad_B + states;
    const Vec g = grad_y[t], delta = steps.delta[t], input = steps.input[t];
    Vec sum_B = via_B[t], sum_A = via_A[t];
#pragma GCC unroll 16
    for (int s = 0; s < kStates; ++s) {
      grad_C[s] += g * after[s];
      const Vec grad_h = carried[s] + g * C[s];
      grad_B[s] += grad_h * input;
      sum_B += grad_h * B[s];
      carried[s] = grad_h * history.decay[t][s];
      const Vec grad_exponent = carried[s] * history.before[t][s];  // dL/d(delta A)
      sum_A += grad_exponent * A[s];
      grad_A[s] += grad_exponent * delta;
    }
    via_B[t] = sum_B;
    via_A[t] = sum_A;
  }
  for (int s = 0; s < kStates; ++s) {
    grad_state[s] = carried[s];
    float* sum = tile.p.grad_weight(tile.which, tile.image, tile.p.A(first_state + s), tile.block);
    store(sum, load(sum) + grad_A[s]);
  }
}

// Of kTogether rows of the step's projection, as in project_steps.
template <int kTogether>
inline void add_step_gradients(const Tile& tile, const Vec* grad_step, int64_t first, Vec* sums) {
  Vec total[kTogether];
  for (int r = 0; r < kTogether; ++r) total[r] = sums[first + r];
  for (int t = 0; t < tile.steps; ++t) {
    const float* dt = tile.projected(t) + first;
    for (int r = 0; r < kTogether; ++r) total[r] += grad_step[t] * dt[r];
  }
  for (int r = 0; r < kTogether; ++r) sums[first + r] = total[r];
}

// Adds one tile's part of the gradient of the step's projection to sums [R]; grad_step: with respect to what that gives.
inline void project_steps_back(const Tile& tile, const Vec* grad_step, Vec* sums) {
  int64_t r = 0;
  for (; r + 8 <= tile.p.rank; r += 8) add_step_gradients<8>(tile, grad_step, r, sums);
  for (; r + 4 <= tile.p.rank; r += 4) add_step_gradients<4>(tile, grad_step, r, sums);
  for (; r < tile.p.rank; ++r) add_step_gradients<1>(tile, grad_step, r, sums);
}

// One tile of one channel block. `first`: the first direction of this image writes dL/dz and, of a mask in place,
// what comes through the step; the second adds to them.
// `next`: this thread goes on to the next block.
inline void tile_back(const Tile& tile, bool first, bool next, BackScratch& scratch, Vec* grad_state,
                      Vec* grad_steps) {
  const Problem& p = tile.p;
  const Direction& d = p.direction[tile.which];
  const int lanes = p.lanes(tile.block);
  const auto u_of = tile.u(), z_of = tile.z(), grad_out_of = tile.whole(p.grad_out, p.channels);
  const auto grad_u_of = tile.packed(d.grad_u), grad_delta_of = tile.packed(d.grad_delta);
  const auto grad_z_of = tile.whole(p.grad_xz + p.channels, 2 * p.channels);
  const float factor = p.factor[2 * tile.image + tile.which];
  scratch.decays.read(p, tile.which, tile.block);
  const Vec* A = scratch.decays.A.data();
  Steps steps;
  compute_steps<true>(tile, steps);
  const bool in_range = steps.largest < scratch.decays.step_limit;

  Vec gated[kTile], grad_gate[kTile], grad_y[kTile];  // dL/dout silu(z), dL/dout silu'(z), dL/dy
  for (int t = 0; t < tile.steps; ++t) {
    const Vec z = load(z_of[t], lanes), s = sigmoid(z), g = load(grad_out_of[t], lanes);
    gated[t] = g * z * s;
    grad_gate[t] = g * s * (1.f + z * (1.f - s));
    grad_y[t] = gated[t] * factor;
  }

  Vec y[kTile] = {}, via_B[kTile] = {}, via_A[kTile] = {};
  Ahead reads, writes, nothing;
  if (next) {
    reads.add(u_of);
    reads.add(grad_out_of);
    reads.add(z_of);
    writes.add(grad_u_of);
    writes.add(grad_delta_of);
    writes.add(grad_z_of);
  }
  for_state_groups<kRegisterStates / 2>(p.states, [&](auto size, int64_t s) {
    History<size> history;
    Vec state[size];
    const float* checkpoint = tile.checkpoint() + s * kLanes;
    for (int i = 0; i < size; ++i) state[i] = load(checkpoint + i * kLanes);
    const Ahead& ahead = s == 0 ? reads : s + size == p.states ? writes : nothing;
    if (in_range)
      scan_tile<size, true, true>(tile, steps, s, A + s, state, y, ahead, &history);
    else
      scan_tile<size, false, true>(tile, steps, s, A + s, state, y, ahead, &history);
    scan_tile_back<size>(tile, steps, s, A + s, state, history, grad_y, via_B, via_A, grad_state + s,
                         scratch.grad_BC.data());
  });

  const Vec skip = load(p.weight(tile.which, p.skip(), tile.block));
  Vec grad_step[kTile], grad_skip = {}, grad_bias = {}, grad_factor = {};
  for (int t = 0; t < tile.steps; ++t) {
    const Vec u = load(u_of[t]), total = y[t] + skip * u;
    const Vec through_gate = grad_gate[t] * total * factor;
    store(grad_z_of[t], first ? through_gate : through_gate + load(grad_z_of[t], lanes), lanes);
    grad_factor += gated[t] * total;
    grad_skip += grad_y[t] * u;
    store(grad_u_of[t], skip * grad_y[t] + via_B[t] * steps.delta[t]);
    // A carries a factor log2(e)
    const Vec grad_delta = via_B[t] * u + via_A[t] * kLn2;
    grad_step[t] = grad_delta * steps.derivative[t];
    grad_bias += grad_step[t];
    store(grad_delta_of[t], grad_step[t]);
    if (!p.in_place) continue;
    float* grad_mask = p.grad_mask + (tile.block * p.images + tile.image) * p.tokens + tile.token(t);
    *grad_mask = (first ? 0.f : *grad_mask) + sum(grad_delta * steps.unmasked[t]);
  }
  project_steps_back(tile, grad_step, grad_steps);
  auto add_to = [&](int64_t row, Vec gradient) {
    float* sum = p.grad_weight(tile.which, tile.image, row, tile.block);
    store(sum, load(sum) + gradient);
  };
  add_to(p.skip(), grad_skip);
  add_to(p.step_bias(), grad_bias);
  p.grad_factor[(tile.block * p.images + tile.image) * 2 + tile.which] += sum(grad_factor);
}

// All tiles of one direction for the channel blocks begin ... end of one image. The blocks are the inner loop, so
// that dL/dB and dL/dC, sums over all channels, stay in the cache.
inline void scan_direction_back(const Problem& p, int which, int64_t image, int64_t group, int64_t begin, int64_t end,
                                bool first, BackScratch& scratch) {
  const Direction& d = p.direction[which];
  std::fill(scratch.grad_state.begin(), scratch.grad_state.end(), Vec{});
  std::fill(scratch.grad_steps.begin(), scratch.grad_steps.end(), Vec{});
  for (int64_t index = (p.length[image] + kTile - 1) / kTile - 1; index >= 0; --index) {
    std::fill(scratch.grad_BC.begin(), scratch.grad_BC.end(), Vec{});
    for (int64_t block = begin; block < end; ++block)
      tile_back(Tile(p, which, image, block, index), first, block + 1 < end, scratch,
                &scratch.grad_state[(block - begin) * p.states], &scratch.grad_steps[(block - begin) * p.rank]);
    const Tile tile(p, which, image, begin, index);
    for (int t = 0; t < tile.steps; ++t) {
      float* grad_BC = d.grad_projected + (group * p.rows[which] + tile.row(t)) * p.projections() + p.rank;
      for (int64_t s = 0; s < 2 * p.states; ++s) grad_BC[s] = sum(scratch.grad_BC[t * 2 * p.states + s]);
    }
  }
  for (int64_t block = begin; block < end; ++block)
    for (int64_t r = 0; r < p.rank; ++r)
      store(p.grad_weight(which, image, p.step_weight(r), block), scratch.grad_steps[(block - begin) * p.rank + r]);
}

inline void scan_group_back(const Problem& p, int64_t image, int64_t group, BackScratch& scratch) {
  const int64_t begin = group * p.blocks() / p.groups, end = (group + 1) * p.blocks() / p.groups;
  const bool on[2] = {p.on(0, image), p.on(1, image)};
  const int64_t written = on[0] || on[1] ? p.length[image] : 0;
  for (int64_t t = written; t < p.tokens; ++t)
    for (int64_t block = begin; block < end; ++block)
      store(p.grad_z(image, t) + block * kLanes, Vec{}, p.lanes(block));
  for (int which = 0; which < 2; ++which)
    for (int64_t row = 0; p.direction[which].grad_weights && row < p.weight_rows(); ++row)
      for (int64_t block = begin; block < end; ++block) store(p.grad_weight(which, image, row, block), Vec{});
  if (on[0]) scan_direction_back(p, 0, image, group, begin, end, true, scratch);
  if (on[1]) scan_direction_back(p, 1, image, group, begin, end, !on[0], scratch);
}
