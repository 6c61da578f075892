// The scan's way back: a tile's states are computed again from its checkpoint, then it is walked from its last step to
// its first.
#pragma once
#include "scan.h"

// dL/dB and dL/dC of a group of states at one step, sums over channel blocks, lane by lane. The steps of a group lie
// one behind the other: a load waits for an earlier store whose address has the same twelve low bits, and so they are
// as many steps apart as can be.
template <int kStates>
struct GradBC { Vec of[2 * kStates]; };

// Scratch of one thread, reused from task to task.
struct BackScratch {
  std::vector<Decays> decays;    // of each block of the group
  std::vector<Vec> grad_state;   // [blocks of the group, N], dL/dh carried from tile to tile
  std::vector<Vec> grad_steps;   // [blocks of the group, R], of the step's projection, gathered from tile to tile
  std::vector<Vec> grad_BC;      // GradBC [kTile] of each group of states
  BackScratch(const Problem& p, int64_t blocks)
      : decays(blocks, Decays(p.states)), grad_state(blocks * p.states), grad_steps(blocks * p.rank),
        grad_BC(kTile * 2 * p.states) {}
  template <int kStates>
  GradBC<kStates>* grad_BC_of(int64_t first_state) {
    return reinterpret_cast<GradBC<kStates>*>(&grad_BC[first_state * 2 * kTile]);
  }
};

// The way back through one tile for one group of states. Per step: grad_y is dL/dy; `via_B` and `via_A` gather
// dL/d(delta u) and dL/ddelta as far as they come through the input and the decay.
template <int kStates>
inline void scan_tile_back(const Tile& tile, const Steps& steps, int64_t first_state, const Vec* A, const Vec* last,
                           const History<kStates>& history, const Vec* grad_y, Vec* via_B, Vec* via_A,
                           Vec* grad_state, GradBC<kStates>* grad_BC) {
  Vec carried[kStates], grad_A[kStates] = {};
  for (int s = 0; s < kStates; ++s) carried[s] = grad_state[s];
  const int64_t states = tile.p.states;
  for (int t = tile.steps - 1; t >= 0; --t) {
    const float* B = tile.projected(t) + tile.p.rank + first_state;
    const float* C = B + states;
    const Vec* after = t + 1 < tile.steps ? history.before[t + 1] : last;
    Vec *grad_B = grad_BC[t].of, *grad_C = grad_B + kStates;
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

// For kTogether rows of the step's weight, whose sums stay in registers over the tile.
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
inline void tile_back(const Tile& tile, bool first, bool next, const Decays& decays, BackScratch& scratch,
                      Vec* grad_state, Vec* grad_steps) {
  const Problem& p = tile.p;
  const Direction& d = p.direction[tile.which];
  const int lanes = p.lanes(tile.block);
  const auto u_of = tile.u(), z_of = tile.z(), grad_out_of = tile.whole(p.grad_out, p.channels);
  const auto grad_u_of = tile.packed(d.grad_u), grad_delta_of = tile.packed(d.grad_delta);
  const auto grad_z_of = tile.whole(p.grad_xz + p.channels, 2 * p.channels);
  const float factor = p.factor[2 * tile.image + tile.which];
  const Vec* A = decays.A.data();
  Steps steps;
  compute_steps<true>(tile, steps);
  const bool in_range = steps.largest < decays.step_limit;

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
                         scratch.grad_BC_of<size>(s));
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
  for (int64_t block = begin; block < end; ++block) scratch.decays[block - begin].read(p, which, block);
  for (int64_t index = (p.length[image] + kTile - 1) / kTile - 1; index >= 0; --index) {
    std::fill(scratch.grad_BC.begin(), scratch.grad_BC.end(), Vec{});
    for (int64_t block = begin; block < end; ++block)
      tile_back(Tile(p, which, image, block, index), first, block + 1 < end, scratch.decays[block - begin], scratch,
                &scratch.grad_state[(block - begin) * p.states], &scratch.grad_steps[(block - begin) * p.rank]);
    const Tile tile(p, which, image, begin, index);
    for (int t = 0; t < tile.steps; ++t) {
      float* grad_B = d.grad_projected + (group * p.rows[which] + tile.row(t)) * p.projections() + p.rank;
      float* grad_C = grad_B + p.states;
      for_state_groups<kRegisterStates / 2>(p.states, [&](auto size, int64_t first) {
        float sums[2 * size];
        sum_each(scratch.grad_BC_of<size>(first)[t].of, 2 * size, sums);
        std::copy(sums, sums + size, grad_B + first);
        std::copy(sums + size, sums + 2 * size, grad_C + first);
      });
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
