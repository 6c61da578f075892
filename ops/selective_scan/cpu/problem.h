// What Python hands over: sizes and data pointers, mirrored field by field by the ctypes structures in library.py.
//
// Letters: B images, L tokens, E inner channels, N states, R step rank, W lanes of a vector, P = E rounded up to a
// multiple of W, G groups of channel blocks. A channel block is W channels, the work of one vector.
//
// Only tokens that exist are worked on. Each direction packs them without gaps: image b owns the rows
// start[b] ... start[b] + length[b] of its [rows, .] buffers; start[b] = -1 says that the direction is off for b.
#pragma once
#include <algorithm>
#include <cstdint>

#include "vector.h"

constexpr int kTile = 16;     // steps from one checkpoint of the state to the next
constexpr int kConvWidth = 4;

// The weights of one direction as PyTorch holds them.
struct Given {
  const float* conv_weight;     // [E, 4]
  const float* conv_bias;       // [E]
  const float* x_proj_weight;   // [R + 2N, E]
  const float* dt_proj_weight;  // [E, R]
  const float* dt_proj_bias;    // [E]
  const float* A;               // [E, N]
  const float* D;               // [E]
};

struct Direction {
  Given given;           // read by pack() alone
  const int64_t* start;  // [B]; null: this direction is off for all images
  float* weights;        // [4 + 1 + 1 + N + 1 + R, P], from pack(): see the accessors of Problem
  float* u;              // [rows, P]; null: the thread's own, an image at a time
  float* projected;      // [rows, R + 2N]: low-rank step, B, C; null with u
  float* checkpoints;    // [chunks, P / W, N, W], state at the head of each tile; null when nothing is saved
  const int64_t* chunk;  // [B] first chunk of each image
  float* projection;     // [E, R + 2N rounded up to whole vectors], x_proj^T from pack(); not read by the backward pass
  // Written by the backward pass
  float* grad_u;          // [rows, P]
  float* grad_delta;      // [rows, P], with respect to the step before softplus
  float* grad_projected;  // [G, rows, R + 2N]: the columns of B and C, partial sums of each group; passes.py fills in
                          // those of the step
  float* grad_weights;    // [B, 4 + 1 + 1 + N + 1 + R, P]: of `weights`, one part per image
};

struct Problem {
  int64_t images, tokens, channels, padded, states, rank, rows[2], chunks[2], groups, threads;
  int64_t in_place;        // 1: the mask multiplies the step size and chooses the convolution's windows; 0: x and u
  const float* xz;         // [B, L, 2E]
  const float* mask;       // [B, L]
  const float* factor;     // [B, 2], multiplies the output of each direction
  const int64_t* length;   // [B] tokens that the scan walks: up to the last one that the mask lets through
  const int64_t* limit;    // [B] tokens that exist, length <= limit <= L
  float* out;              // [B, L, E]
  // Evaluation alone: [B], ascending rows of images whose tokens lie without gaps, so that xz is [rows, 2E] and out
  // [rows, E], which begin with the first image's; null: an image has L rows.
  const int64_t* origin;
  // Backward
  const float* grad_out;  // [B, L, E]
  float* grad_xz;         // [B, L, 2E]
  float* grad_mask;       // [P / W, B, L]; null: there is no mask
  float* grad_factor;     // [P / W, B, 2]
  Direction direction[2];

  int64_t blocks() const { return padded / kLanes; }
  // Channels of block `block` that exist.
  int lanes(int64_t block) const { return (int)std::min<int64_t>(kLanes, channels - block * kLanes); }
  int64_t row(int64_t image) const { return origin ? origin[image] - origin[0] : image * tokens; }
  int64_t rows_of(int64_t image) const { return origin ? limit[image] : tokens; }
  const float* x(int64_t image, int64_t token) const { return xz + (row(image) + token) * 2 * channels; }
  float* grad_x(int64_t image, int64_t token) const { return grad_xz + (image * tokens + token) * 2 * channels; }
  float* grad_z(int64_t image, int64_t token) const { return grad_x(image, token) + channels; }

  float step_mask(int64_t image, int64_t token) const { return mask[image * tokens + token]; }
  bool on(int which, int64_t image) const { return direction[which].start && direction[which].start[image] >= 0; }
  int64_t projections() const { return rank + 2 * states; }
  int64_t padded_projections() const { return (projections() + kLanes - 1) / kLanes * kLanes; }

  // The part of the problem that is one image's, as far as the forward pass reads it.
  Problem only(int64_t image) const {
    Problem one = *this;
    one.images = 1;
    one.tokens = rows_of(image);
    one.origin = nullptr;
    one.xz = x(image, 0);
    one.mask += image * tokens;
    one.factor += 2 * image;
    one.length += image;
    one.limit += image;
    one.out += row(image) * channels;
    return one;
  }

  // Rows of Direction::weights.
  static int64_t conv_tap(int tap) { return tap; }
  static int64_t conv_bias() { return kConvWidth; }
  static int64_t skip() { return kConvWidth + 1; }
  static int64_t A(int64_t state) { return kConvWidth + 2 + state; }  // times log2(e)
  int64_t step_bias() const { return A(states); }
  int64_t step_weight(int64_t r) const { return A(states) + 1 + r; }
  int64_t weight_rows() const { return step_weight(rank); }

  const float* weight(int which, int64_t row, int64_t block) const {
    return direction[which].weights + row * padded + block * kLanes;
  }
  float* grad_weight(int which, int64_t image, int64_t row, int64_t block) const {
    return direction[which].grad_weights + (image * weight_rows() + row) * padded + block * kLanes;
  }
};
