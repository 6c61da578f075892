// The scan's way back: scan_tile computes a tile's states again from its checkpoint and keeps them, then the tile is
// walked from its last step to its first.
#pragma once
#include "scan.h"

// States at a time: their history stays in the nearest cache beside the sums of dL/dB and dL/dC.
constexpr int kBackStates = 4;

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

// What a tile's way back works on, step by step.
struct TileBack {
  Steps steps;
  Vec gated[kTile], grad_gate[kTile], grad_y[kTile];  // dL/dout silu(z), dL/dout silu'(z), dL/dy
  Vec y[kTile] = {};
  Vec via_B[kTile] = {}, via_A[kTile] = {};  // dL/d(delta u) and dL/ddelta, through the input and through the decay
};

// What the way back wants to know of every step of a state group.
template <int kStates>
struct History {
  Vec before[kTile][kStates], decay[kTile][kStates];
};

// The way back through one tile for one group of states; last: behind the last step.
template <int kStates>
inline void scan_tile_back(const Tile& tile, TileBack& back, int64_t first_state, const Vec* A, const Vec* last,
                           const History<kStates>& history, Vec* grad_state, GradBC<kStates>* grad_BC) {
  Vec carried[kStates], grad_A[kStates] = {};
  for (int s = 0; s < kStates; ++s) carried[s] = grad_state[s];
  for (int t = tile.steps - 1; t >= 0; --t) {
    const float* B = tile.projected(t) + tile.p.rank + first_state;
    const float* C = B + tile.p.states;
    const Vec* after = t + 1 < tile.steps ? history.before[t + 1] : last;
    Vec *grad_B = grad_BC[t].of, *grad_C = grad_B + kStates;
    const Vec g = back.grad_y[t], delta = back.steps.delta[t], input = back.steps.input[t];
    Vec sum_B = back.via_B[t], sum_A = back.via_A[t];
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
    back.via_B[t] = sum_B;
    back.via_A[t] = sum_A;
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

// Adds one tile's part of the gradient of the step's projection to sums [R]; grad_step: with respect to what that
// gives.
inline void project_steps_back(const Tile& tile, const Vec* grad_step, Vec* sums) {
  int64_t r = 0;
  for (; r + 8 <= tile.p.rank; r += 8) add_step_gradients<8>(tile, grad_step, r, sums);
  for (; r + 4 <= tile.p.rank; r += 4) add_step_gradients<4>(tile, grad_step, r, sums);
  for (; r < tile.p.rank; ++r) add_step_gradients<1>(tile, grad_step, r, sums);
}

// Steps, gate and dL/dy of a tile.
inline void enter_tile_back(const Tile& tile, TileBack& back) {
  const Problem& p = tile.p;
  const int lanes = p.lanes(tile.block);
  const auto z_of = tile.z(), grad_out_of = tile.whole(p.grad_out, p.channels);
  const float factor = p.factor[2 * tile.image + tile.which];
  compute_steps<true>(tile, back.steps);
  for (int t = 0; t < tile.steps; ++t) {
    const Vec z = load(z_of[t], lanes), s = sigmoid(z), g = load(grad_out_of[t], lanes);
    back.gated[t] = g * z * s;
    back.grad_gate[t] = g * s * (1.f + z * (1.f - s));
    back.grad_y[t] = back.gated[t] * factor;
  }
}

// What the states' way back gave, on to u, the step, z and the weights. `first`: the first direction of this image
// writes dL/dz and, of a mask in place, what comes through the step; the second adds to them.
inline void leave_tile_back(const Tile& tile, const TileBack& back, bool first, Vec* grad_steps) {
  const Problem& p = tile.p;
  const Direction& d = p.direction[tile.which];
  const int lanes = p.lanes(tile.block);
  const auto u_of = tile.u();
  const auto grad_u_of = tile.packed(d.grad_u), grad_delta_of = tile.packed(d.grad_delta);
  const auto grad_z_of = tile.whole(p.grad_xz + p.channels, 2 * p.channels);
  const float factor = p.factor[2 * tile.image + tile.which];
  const Steps& steps = back.steps;
  const Vec skip = load(p.weight(tile.which, p.skip(), tile.block));
  Vec grad_step[kTile], grad_skip = {}, grad_bias = {}, grad_factor = {};
  for (int t = 0; t < tile.steps; ++t) {
    const Vec u = load(u_of[t]), total = back.y[t] + skip * u;
    const Vec through_gate = back.grad_gate[t] * total * factor;
    store(grad_z_of[t], first ? through_gate : through_gate + load(grad_z_of[t], lanes), lanes);
    grad_factor += back.gated[t] * total;
    grad_skip += back.grad_y[t] * u;
    store(grad_u_of[t], skip * back.grad_y[t] + back.via_B[t] * steps.delta[t]);
    // A carries a factor log2(e)
    const Vec grad_delta = back.via_B[t] * u + back.via_A[t] * kLn2;
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

// One tile of a channel block, the block `at` of its group. `next`: this thread goes on to the one behind.
inline void tile_back(const Tile& tile, int64_t at, bool first, bool next, BackScratch& scratch) {
  const Problem& p = tile.p;
  const Direction& d = p.direction[tile.which];
  const Decays& decays = scratch.decays[at];
  TileBack back;
  enter_tile_back(tile, back);
  Ahead reads, writes, nothing;
  if (next) {
    reads.add(tile.u());
    reads.add(tile.whole(p.grad_out, p.channels));
    reads.add(tile.z());
    writes.add(tile.packed(d.grad_u));
    writes.add(tile.packed(d.grad_delta));
    writes.add(tile.whole(p.grad_xz + p.channels, 2 * p.channels));
  }
  for_state_groups<kBackStates>(p.states, [&](auto size, int64_t s) {
    History<size> history;
    Vec state[size];
    const Vec* A = &decays.A[s];
    const float* checkpoint = tile.checkpoint() + s * kLanes;
    for (int i = 0; i < size; ++i) state[i] = load(checkpoint + i * kLanes);
    const Ahead& ahead = s == 0 ? reads : s + size == p.states ? writes : nothing;
    const auto keep = [&](int t, int i, Vec before, Vec decay) {
      history.before[t][i] = before;
      history.decay[t][i] = decay;
    };
    if (back.steps.largest < decays.step_limit)
      scan_tile<size, true>(tile, back.steps, s, A, state, back.y, ahead, keep);
    else
      scan_tile<size, false>(tile, back.steps, s, A, state, back.y, ahead, keep);
    scan_tile_back<size>(tile, back, s, A, state, history, &scratch.grad_state[at * p.states + s],
                         scratch.grad_BC_of<size>(s));
  });
  leave_tile_back(tile, back, first, &scratch.grad_steps[at * p.rank]);
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
      tile_back(Tile(p, which, image, block, index), block - begin, first, block + 1 < end, scratch);
    const Tile tile(p, which, image, begin, index);
    for_state_groups<kBackStates>(p.states, [&](auto size, int64_t first_state) {
      float sums[kTile][2][size];
      sum_each(scratch.grad_BC_of<size>(first_state)->of, tile.steps * 2 * size, sums[0][0]);
      for (int t = 0; t < tile.steps; ++t) {
        float* row = d.grad_projected + (group * p.rows[which] + tile.row(t)) * p.projections();
        float* grad_B = row + p.rank + first_state;
        std::copy(sums[t][0], sums[t][1], grad_B);
        std::copy(sums[t][1], sums[t][1] + size, grad_B + p.states);
      }
    });
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
