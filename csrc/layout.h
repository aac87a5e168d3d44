// The layout of feature maps, read off their strides, and the twin's map on them; for both backends' operators.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "head_math.h"

namespace rebalfer {

// The caller made the strides one of the two.
inline bool is_channels_last(const torch::stable::Tensor& features) {
  if (features.is_contiguous()) return false;
  const int64_t C = features.size(1), H = features.size(2), W = features.size(3);
  const bool ok = (C == 1 || features.stride(1) == 1) && (W == 1 || features.stride(3) == C) &&
                  (H == 1 || features.stride(2) == W * C) && (features.size(0) == 1 || features.stride(0) == H * W * C);
  STD_TORCH_CHECK(ok, "features: expected NCHW or channels_last strides");
  return true;
}

// The operators' twin_map, whose coefficients hold for maps of every size (rebalfer_kernels/transforms.py), on an H x W map.
inline TwinMap twin_map_on(const std::vector<int64_t>& t, int64_t H, int64_t W) {
  return {t[0] * (H - 1) * W + t[3] * (W - 1), t[1] * W + t[4], t[2] * W + t[5]};
}

}  // namespace rebalfer
