// The views of one image as the operator paired_views calls them: a function for each instruction set.
#pragma once

#include <cstdint>

#include "../head_math.h"
#include "kernels.h"

namespace rebalfer {

// Smallest area, its range, the range of the ratio of the sides.
struct Rectangle {
  float area, area_range, ratio_range;
};

// What is done to every image alike: ViewPlan of reference.py and the shapes.
struct ViewPlan {
  int64_t h, w, C, H, W;  // of the images and of the views
  float mean[3], std[3];  // of each channel
  int64_t chances[3];     // flipped, noisy, erased
  int64_t reach[2];
  Rectangle crop;
  float brightness, contrast, noise;
  Rectangle erase;
  uint64_t seed;
  uint32_t epoch;
  TwinMap twin;
};

struct ViewKernels {
  int64_t (*scratch_bytes)(const ViewPlan& plan);
  // The view (H, W, C) of an image (h, w, C), and its twin unless that is null, as the storage says.
  void (*write)(const ViewPlan& plan, Storage storage, const uint8_t* image, int64_t sample, void* view, void* twin,
                void* scratch);
};

const ViewKernels& views_avx512();
const ViewKernels& views_avx2();
const ViewKernels& views_baseline();

}  // namespace rebalfer
