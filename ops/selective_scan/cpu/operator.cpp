// The scan's inference as operators that C++ registers, for programs that run without Python: weights are packed once,
// where a compiler folds what depends on weights alone, and the scan reads them packed.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernel.cpp"

namespace {

using at::Tensor;

// Memory of this thread, overwritten by the next call: fresh from the system it costs as much as the convolution.
float* scratch(int which, int64_t size) {
  thread_local std::unique_ptr<float[]> held[2];
  thread_local int64_t room[2] = {};
  if (room[which] < size) {
    held[which].reset(new float[size]);
    room[which] = size;
  }
  return held[which].get();
}

int64_t whole_vectors(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

Problem sized(int64_t channels, int64_t states, int64_t rank) {
  Problem p = {};
  p.channels = channels;
  p.padded = whole_vectors(channels);
  p.states = states;
  p.rank = rank;
  p.threads = at::get_num_threads();
  return p;
}

// A contiguous copy [batch, *size]: a compiled program does not look at the sizes and strides that it is given.
Tensor received(const Tensor& images, at::IntArrayRef size) {
  TORCH_CHECK(images.dim() > 0 && images.sizes().slice(1) == size && images.size(0) > 0 &&
                  images.scalar_type() == at::kFloat && images.device().is_cpu(),
              "this model takes images [batch, ", c10::Join(", ", size), "] in float32 on the CPU, not ",
              images.sizes(), " in ", images.scalar_type(), " on ", images.device());
  return at::empty(images.sizes(), images.options().memory_format(at::MemoryFormat::Contiguous)).copy_(images);
}

// The arguments of BranchParams -> weights [4 + 3 + N + R, P] and projection [E, R + 2N rounded up]; see problem.h.
std::tuple<Tensor, Tensor> packed(const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& x_proj_weight,
                                  const Tensor& dt_proj_weight, const Tensor& dt_proj_bias, const Tensor& A,
                                  const Tensor& D) {
  Problem p = sized(A.size(0), A.size(1), dt_proj_weight.size(1));
  p.threads = 1;
  const Tensor weights = at::empty({kConvWidth + 3 + p.states + p.rank, p.padded}, A.options());
  const Tensor projection = at::empty({p.channels, p.padded_projections()}, A.options());
  Tensor given[] = {conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D};
  for (Tensor& each : given) {
    TORCH_CHECK(each.scalar_type() == at::kFloat && each.device().is_cpu(), "dyvm_cpu::pack takes float32 on the CPU");
    each = each.contiguous();
  }
  auto read = [&given](int index) { return given[index].const_data_ptr<float>(); };
  p.direction[0].given = {read(0), read(1), read(2), read(3), read(4), read(5), read(6)};
  p.direction[0].weights = weights.mutable_data_ptr<float>();
  p.direction[0].projection = projection.mutable_data_ptr<float>();
  pack(&p);
  return {weights, projection};
}

// scale * (forward + backward), of the directions that are active [B, 2]: xz [B, L, 2E] -> [B, L, E].
Tensor scanned(const Tensor& xz_, const Tensor& weights, const Tensor& projection, const Tensor& weights_b,
               const Tensor& projection_b, const std::optional<Tensor>& active_, int64_t states, int64_t rank,
               double scale) {
  TORCH_CHECK(xz_.dim() == 3 && xz_.scalar_type() == at::kFloat && xz_.device().is_cpu(),
              "dyvm_cpu::scan takes xz [B, L, 2E] in float32 on the CPU");
  const Tensor xz = xz_.contiguous();
  const Tensor active = active_ ? active_->contiguous() : Tensor();
  Problem p = sized(xz.size(2) / 2, states, rank);
  TORCH_CHECK(weights.size(1) == p.padded && projection.size(1) == p.padded_projections(),
              "dyvm_cpu::scan: the weights were packed for another processor");
  TORCH_CHECK(!active.defined() || active.scalar_type() == at::kBool, "dyvm_cpu::scan: active must be boolean");
  p.images = xz.size(0);
  p.tokens = xz.size(1);
  const Tensor out = at::empty({p.images, p.tokens, p.channels}, xz.options());
  const std::vector<float> mask(p.images * p.tokens, 1.f), factor(2 * p.images, (float)scale);
  std::vector<int64_t> table(kTotals * p.images + 4);
  p.xz = xz.const_data_ptr<float>();
  p.out = out.mutable_data_ptr<float>();
  p.mask = mask.data();
  p.factor = factor.data();
  const Tensor* packed[2][2] = {{&weights, &projection}, {&weights_b, &projection_b}};
  for (int which = 0; which < 2; ++which) {
    p.direction[which].weights = const_cast<float*>(packed[which][0]->const_data_ptr<float>());
    p.direction[which].projection = const_cast<float*>(packed[which][1]->const_data_ptr<float>());
  }
  measure(&p, nullptr, active.defined() ? active.const_data_ptr<bool>() : nullptr, 0, table.data());
  // Whole images to each thread is faster, unless threads would stand idle.
  if (p.images % p.threads == 0 || p.images >= 4 * p.threads) {
    forward_images(&p);
    return out;
  }
  std::vector<float> projected[2];
  for (int which = 0; which < 2; ++which) {
    projected[which].resize(p.rows[which] * p.projections());
    p.direction[which].u = scratch(which, p.rows[which] * p.padded);
    p.direction[which].projected = projected[which].data();
  }
  convolve(&p);
  project_images(&p);
  scan(&p);
  return out;
}

// A process may load the libraries of several packages: the first one registers.
std::unique_ptr<torch::Library> registered() {
  if (c10::Dispatcher::singleton().findSchema({"dyvm_cpu::scan", ""})) return nullptr;
  auto library = std::make_unique<torch::Library>(torch::Library::DEF, "dyvm_cpu", std::nullopt, "operator.cpp", 0);
  auto define = [&library](const char* schema, torch::CppFunction&& run) {
    library->def(schema, torch::dispatch(c10::DispatchKey::CPU, std::move(run)));
  };
  define("receive(Tensor images, int[] size) -> Tensor", torch::CppFunction(received));
  define(
      "pack(Tensor conv_weight, Tensor conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight, Tensor dt_proj_bias, "
      "Tensor A, Tensor D) -> (Tensor, Tensor)",
      torch::CppFunction(packed));
  define(
      "scan(Tensor xz, Tensor weights, Tensor projection, Tensor weights_b, Tensor projection_b, Tensor? active, "
      "int states, int rank, float scale) -> Tensor",
      torch::CppFunction(scanned));
  return library;
}

const std::unique_ptr<torch::Library> kRegistered = registered();

}  // namespace
