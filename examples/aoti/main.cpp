// Runs what `export.py --format aoti` has written, without Python:   run dyvm.pt2 dyvm.so photo.ppm
// The picture is squeezed to the model's size, as predict.py does for the demo's; of models that were trained on crops
// predict.py cuts out the middle.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

// The numbers in a text like "[0.485, 0.456, 0.406]", as [n, 1, 1].
torch::Tensor numbers(std::string text) {
  std::replace_if(text.begin(), text.end(), [](char c) { return c == '[' || c == ']' || c == ','; }, ' ');
  std::istringstream stream(text);
  std::vector<float> found{std::istream_iterator<float>(stream), {}};
  return torch::tensor(found).view({-1, 1, 1});
}

int main(int argc, char** argv) try {
  TORCH_CHECK(argc == 4, "usage: run PACKAGE.pt2 LIBRARY.so IMAGE.ppm");
  TORCH_CHECK(dlopen(std::filesystem::absolute(argv[2]).c_str(), RTLD_NOW), dlerror());  // the scan's operators, before the package
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  auto texts = model.get_metadata();
  auto size = numbers(texts.at("input_size"));  // height, width

  std::ifstream file(argv[3], std::ios::binary);
  TORCH_CHECK(file, argv[3], " cannot be opened");
  std::string magic;
  int64_t width = 0, height = 0, maximum = 0;
  file >> magic >> std::ws;
  while (file.peek() == '#') file.ignore(1 << 20, '\n') >> std::ws;  // a comment
  file >> width >> height >> maximum;
  TORCH_CHECK(magic == "P6" && maximum == 255 && width > 0 && height > 0, argv[3], " is no binary PPM of 8 bits");
  auto pixels = torch::empty({height, width, 3}, torch::kUInt8);
  file.ignore().read((char*)pixels.data_ptr(), pixels.numel());
  TORCH_CHECK(file, argv[3], " is cut off");
  auto image = at::_upsample_bicubic2d_aa(pixels.permute({2, 0, 1}).unsqueeze(0).to(torch::kFloat) / 255,
                                          {size[0].item<int64_t>(), size[1].item<int64_t>()}, false);
  image = (image - numbers(texts.at("mean"))) / numbers(texts.at("std"));

  auto logits = model.run({image.contiguous()})[0];  // [batch, classes]
  auto [probability, index] = logits.softmax(1)[0].max(0);
  std::cout << "class " << index.item<int64_t>() << " of " << texts.at("class_names") << ", probability "
            << probability.item<float>() << "\n";
} catch (const std::exception& error) {
  std::cerr << "error: " << std::string(error.what()).substr(0, std::string(error.what()).find('\n')) << "\n";
  return 1;
}
