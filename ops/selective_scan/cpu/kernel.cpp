// Entry points of the CPU kernels: plain C functions on data pointers, so that nothing depends on PyTorch's ABI.
// In the backward pass PyTorch multiplies the matrices between them.
#include "extent.h"
#include "forward.h"
#include "in_place.h"
#include "layer.h"
#include "norm.h"
#include "pack.h"
#include "scan_back.h"

namespace {

// f(image, block) for all images and channel blocks; setup() gives each thread its scratch.
template <class Setup, class F>
void parallel_over(const Problem& p, int64_t parts, Setup&& setup, F&& f) {
#pragma omp parallel num_threads((int)p.threads)
  {
    auto scratch = setup();
#pragma omp for collapse(2) schedule(guided)
    for (int64_t image = 0; image < p.images; ++image)
      for (int64_t part = 0; part < parts; ++part) f(image, part, scratch);
  }
}

}  // namespace

extern "C" {

int64_t lanes() { return kLanes; }
int64_t tile_steps() { return kTile; }
int64_t problem_bytes() { return sizeof(Problem); }
int64_t head_bytes() { return sizeof(Head); }
int64_t several_threads() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

void add_rms_norm(const float* hidden, const float* residual, const float* weight, float* total, float* normed,
                  float* scale, int64_t rows, int64_t width, float eps, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * width;
    scale[row] = norm_row(hidden ? hidden + at : nullptr, residual + at, weight, hidden ? total + at : nullptr,
                          normed + at, width, eps);
  }
}

int64_t norm_rows() { return kNormRows; }

// grad_weight: [rows / kNormRows rounded up, width], zeroed by the caller.
void add_rms_norm_backward(const float* grad_normed, const float* stream, const float* total, const float* scale,
                           const float* weight, float* grad, float* grad_weight, int64_t rows, int64_t width,
                           int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
  for (int64_t begin = 0; begin < rows; begin += kNormRows)
    for (int64_t row = begin; row < begin + kNormRows && row < rows; ++row) {
      const int64_t at = row * width;
      norm_row_back(grad_normed + at, stream ? stream + at : nullptr, total + at, scale[row], weight, grad + at,
                    grad_weight + begin / kNormRows * width, width);
    }
}

void pack(const Problem* p) {
#pragma omp parallel for collapse(2) num_threads((int)p->threads)
  for (int which = 0; which < 2; ++which)
    for (int64_t block = 0; block < p->blocks(); ++block)
      if (p->direction[which].weights) pack_block(*p, which, block);
}

void measure(Problem* p, const int64_t* lengths, const bool* active, int64_t masked, int64_t* table) {
  measure_extent(*p, lengths, active, masked, table);
  read_extent(*p, table);
}

int enter(Problem* p, const Head* head) { return enter_layer(*p, *head); }

void spread(const Problem* p, const int64_t* images, const float* rows, float* out, int64_t width, int64_t threads) {
  spread_images(*p, images, rows, out, width, threads);
}

void attach(Problem* p, const int64_t* table) { read_extent(*p, table); }

void convolve(const Problem* p) {
  parallel_over(*p, p->blocks(), [] { return 0; }, [p](int64_t image, int64_t block, int) {
    if (!p->in_place) return convolve_block(*p, image, block, 0, p->length[image]);
    convolve_in_place<0>(*p, image, block);
    convolve_in_place<1>(*p, image, block);
  });
}

void scan(const Problem* p) {
  struct Scratch { Decays decays; std::vector<Vec> state; };
  parallel_over(*p, p->blocks(), [p] { return Scratch{Decays(p->states), std::vector<Vec>(p->states)}; },
                [p](int64_t image, int64_t block, Scratch& s) { scan_block(*p, image, block, s.decays, s.state); });
}

// projected of both directions.
void project_images(const Problem* p) {
  const int64_t chunks = (p->tokens + kProjectedRows - 1) / kProjectedRows;
  parallel_over(*p, 2 * chunks, [] { return 0; }, [p, chunks](int64_t image, int64_t part, int) {
    const int which = part >= chunks;
    if (!p->on(which, image)) return;
    const Direction& d = p->direction[which];
    const int64_t begin = (part - which * chunks) * kProjectedRows, row = d.start[image] + begin;
    project(*p, d.u + row * p->padded, d.projection, d.projected + row * p->projections(),
            std::min<int64_t>(kProjectedRows, p->length[image] - begin));
  });
}

// Convolution, projection and scan in one; passes.py and operator.cpp choose it where the images are enough for the
// threads. Not for a mask in place. u and projected are kept where a direction has them.
void forward_images(const Problem* p) {
#pragma omp parallel num_threads((int)p->threads)
  {
    ForwardScratch scratch(*p);
#pragma omp for schedule(dynamic, 1)
    for (int64_t image = 0; image < p->images; ++image) forward_image(*p, image, scratch);
  }
}

// Whether any gradient arrives at a token that exists but that the scan did not walk.
int64_t gradient_behind(const Problem* p) {
  int64_t found = 0;
#pragma omp parallel for num_threads((int)p->threads) reduction(| : found)
  for (int64_t image = 0; image < p->images; ++image) {
    const float* grad_out = p->grad_out + image * p->tokens * p->channels;
    for (int64_t i = p->length[image] * p->channels; i < p->limit[image] * p->channels; ++i)
      found |= grad_out[i] != 0.f;
  }
  return found;
}

void scan_backward(const Problem* p) {
  const int64_t largest_group = (p->blocks() + p->groups - 1) / p->groups;
  parallel_over(*p, p->groups, [=] { return BackScratch(*p, largest_group); },
                [p](int64_t image, int64_t group, BackScratch& s) { scan_group_back(*p, image, group, s); });
}

void convolve_backward(const Problem* p) {
  struct Scratch { std::vector<Vec> grad_sum, grad_mask; };
  const size_t reached = p->tokens + 2 * Window::kReach, tokens = p->tokens;
  parallel_over(*p, p->blocks(),
                [=] { return Scratch{std::vector<Vec>(2 * reached), std::vector<Vec>(tokens)}; },
                [p](int64_t image, int64_t block, Scratch& s) {
                  Vec *grad_sum = s.grad_sum.data(), *grad_mask = s.grad_mask.data();
                  if (!p->in_place) return convolve_block_back(*p, image, block, grad_sum, grad_mask);
                  convolve_in_place_back(*p, image, block, grad_sum, grad_sum + p->tokens, grad_mask);
                });
}
}
