// The weights as the kernels read them: channels last, padded with zeros to whole vectors.
#pragma once
#include "problem.h"

// Rows of weights[., P] from a matrix [E, columns] of one block's channels.
inline void pack_rows(const Problem& p, int which, int64_t block, int64_t row, const float* matrix, int64_t columns,
                      float factor = 1.f) {
  const int lanes = p.lanes(block);
  matrix += block * kLanes * columns;
  for (int64_t column = 0; column < columns; ++column) {
    float* out = p.direction[which].weights + (row + column) * p.padded + block * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = lane < lanes ? matrix[lane * columns + column] * factor : 0.f;
  }
}

inline void pack_block(const Problem& p, int which, int64_t block) {
  const Given& given = p.direction[which].given;
  pack_rows(p, which, block, p.conv_tap(0), given.conv_weight, kConvWidth);
  pack_rows(p, which, block, p.conv_bias(), given.conv_bias, 1);
  pack_rows(p, which, block, p.skip(), given.D, 1);
  pack_rows(p, which, block, p.A(0), given.A, p.states, kLog2E);
  pack_rows(p, which, block, p.step_bias(), given.dt_proj_bias, 1);
  pack_rows(p, which, block, p.step_weight(0), given.dt_proj_weight, p.rank);
  for (int lane = 0; lane < p.lanes(block); ++lane) {
    const int64_t channel = block * kLanes + lane;
    float* out = p.direction[which].projection + channel * p.padded_projections();
    for (int64_t column = 0; column < p.padded_projections(); ++column)
      out[column] = column < p.projections() ? given.x_proj_weight[column * p.channels + channel] : 0.f;
  }
}
