// Runs what `export.py --format aoti` has written, without Python:   run dyvm.pt2 dyvm.so photo.ppm
// The picture is squeezed to the model's size, as predict.py does for the demo's; of models that were trained on crops
// predict.py cuts out the middle.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <filesystem>
#include <iostream>

#include "picture.h"

torch::inductor::AOTIModelPackageLoader load(const char* package) try {
  return torch::inductor::AOTIModelPackageLoader(package);
} catch (const std::exception& error) {
  TORCH_CHECK(false, package, " is no package of export.py --format aoti, or not for this machine: ", error.what());
}

int main(int argc, char** argv) try {
  TORCH_CHECK(argc == 4, "usage: run PACKAGE.pt2 LIBRARY.so IMAGE.ppm");
  TORCH_CHECK(dlopen(std::filesystem::absolute(argv[2]).c_str(), RTLD_NOW), dlerror());  // the scan's operators, first
  auto model = load(argv[1]);
  auto texts = model.get_metadata();
  auto logits = model.run({prepared(read_ppm(argv[3]), texts)})[0];  // [batch, classes]
  auto [probability, index] = logits.softmax(1)[0].max(0);
  std::cout << "class " << index.item<int64_t>() << " of " << texts.at("class_names") << ", probability "
            << probability.item<float>() << "\n";
} catch (const std::exception& error) {
  std::cerr << "error: " << std::string(error.what()).substr(0, std::string(error.what()).find('\n')) << "\n";
  return 1;
}
