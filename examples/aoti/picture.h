// A picture as a model wants it: read, squeezed to its size, normalised.
#pragma once
#include <torch/torch.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

// The numbers in a text like "[0.485, 0.456, 0.406]", as [n, 1, 1].
inline torch::Tensor numbers(std::string text) {
  std::replace_if(text.begin(), text.end(), [](char c) { return c == '[' || c == ']' || c == ','; }, ' ');
  std::istringstream stream(text);
  std::vector<float> found{std::istream_iterator<float>(stream), {}};
  return torch::tensor(found).view({-1, 1, 1});
}

// A binary PPM of 8 bits -> [3, height, width] of bytes.
inline torch::Tensor read_ppm(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, path, " cannot be opened");
  std::string magic;
  int64_t width = 0, height = 0, maximum = 0;
  file >> magic >> std::ws;
  while (file.peek() == '#') file.ignore(1 << 20, '\n') >> std::ws;  // a comment
  file >> width >> height >> maximum;
  TORCH_CHECK(magic == "P6" && maximum == 255 && width > 0 && height > 0, path, " is no binary PPM of 8 bits");
  auto pixels = torch::empty({height, width, 3}, torch::kUInt8);
  file.ignore().read((char*)pixels.data_ptr(), pixels.numel());
  TORCH_CHECK(file, path, " is cut off");
  return pixels.permute({2, 0, 1});
}

// [1, 3, height, width]. In bytes, which are rounded as predict.py's library does; the texts are the model's metadata.
inline torch::Tensor prepared(const torch::Tensor& pixels, const std::unordered_map<std::string, std::string>& texts) {
  auto size = numbers(texts.at("input_size"));
  auto image = at::_upsample_bicubic2d_aa(pixels.unsqueeze(0), {size[0].item<int64_t>(), size[1].item<int64_t>()}, false);
  return ((image.to(torch::kFloat) / 255 - numbers(texts.at("mean"))) / numbers(texts.at("std"))).contiguous();
}
