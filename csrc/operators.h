// What the operators of both native backends share: the arguments of their schemas (rebalfer_kernels/ops.py) gathered
// in structs, the head's outputs, and the layout of features, read off their strides.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "head_math.h"

namespace rebalfer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Sizes or strides of at most four dimensions; off the heap, as a call makes a dozen.
struct Shape {
  Shape(std::initializer_list<int64_t> sizes) : rank(sizes.size()) { std::copy(sizes.begin(), sizes.end(), size); }
  int64_t rank, size[4];
};

struct DeviceId {
  int32_t type, index;
};

// By the C shim: on a CPU past the dispatcher, else by a plain call of it in place of a boxed one.
inline Tensor empty(DeviceId device, const Shape& shape, const Shape& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      shape.rank, shape.size, strides.size, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device.type, device.index, &handle));
  return Tensor(handle);
}

// Contiguous.
inline Tensor output(DeviceId device, const Shape& shape, ScalarType dtype) {
  Shape strides = shape;
  int64_t step = 1;
  for (int64_t i = shape.rank; i-- > 0; step *= std::max<int64_t>(shape.size[i], 1)) strides.size[i] = step;
  return empty(device, shape, strides, dtype);
}

inline OptionalTensor output_if(bool wanted, DeviceId device, const Shape& shape, ScalarType dtype) {
  return wanted ? OptionalTensor(output(device, shape, dtype)) : std::nullopt;
}

// An output as an operator returns it: undefined, for Python None, where it is not wanted.
inline Tensor or_undefined(OptionalTensor& t) { return t ? std::move(*t) : Tensor(); }

// An upstream gradient, which has any strides, as kernels read it.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The strides of features (M, C, H, W).
inline Shape feature_strides(int64_t C, int64_t H, int64_t W, bool channels_last) {
  return channels_last ? Shape{C * H * W, 1, W * C, C} : Shape{C * H * W, H * W, W, 1};
}

// The caller made sure that the strides are one of the two.
inline bool is_channels_last(const Tensor& features) {
  if (features.is_contiguous()) return false;
  const int64_t C = features.size(1), H = features.size(2), W = features.size(3);
  const bool ok = (C == 1 || features.stride(1) == 1) && (W == 1 || features.stride(3) == C) &&
                  (H == 1 || features.stride(2) == W * C) && (features.size(0) == 1 || features.stride(0) == H * W * C);
  STD_TORCH_CHECK(ok, "features: expected NCHW or channels_last strides");
  return true;
}

// The operators' twin_map, three corners of a 2 x 2 map (TwinMap.of in rebalfer_kernels/transforms.py), on the maps
// (..., H, W) of one size.
inline TwinMap twin_map_on(int64_t corners, int64_t H, int64_t W) {
  const int64_t start = corners / 16, down = corners / 4 % 4, right = corners % 4;
  const int64_t row = start / 2, column = start % 2;
  return {row * (H - 1) * W + column * (W - 1), (down / 2 - row) * W + down % 2 - column,
          (right / 2 - row) * W + right % 2 - column};
}

// The outputs of the head's forward that not every call needs; cam_grad only beside gradients.
struct Wanted {
  bool maps, gradients, pooled, cam_grad;
};

struct HeadForwardArguments {
  const Tensor &features, &weight;
  const OptionalTensor &bias, &targets, &target_table;
  const Tensor& map_weights;
  HeadOptions options;
  Wanted wanted;
};

// Where in its one tensor lies what the forward saves for the backward (Saved of rebalfer_kernels/ops.py), in elements.
// One tensor, as each more costs a small call time.
struct SavedPieces {
  static constexpr int64_t kAbsent = -1;
  int64_t size = 0;
  const int64_t pooled, cam_grad, logit_grad, map_grad;

  SavedPieces(int64_t N, int64_t C, int64_t HW, int64_t L, bool with_logit_grad, bool with_pooled, bool with_cam_grad)
      : pooled(add(2 * N * C, with_pooled)), cam_grad(add(N * L * C, with_cam_grad)),
        logit_grad(add(2 * N * L, with_logit_grad)), map_grad(add(N * L * HW, true)) {}

  // Null where nothing is saved, or not this piece.
  template <typename A>
  static A* in(A* saved, int64_t piece) {
    return saved && piece != kAbsent ? saved + piece : nullptr;
  }

 private:
  int64_t add(int64_t count, bool wanted) {
    if (!wanted) return kAbsent;
    const int64_t begin = size;
    size += count;
    return begin;
  }
};

struct HeadForwardOutputs {
  OptionalTensor loss, classification, consistency, logits, maps, saved;
};

inline SavedPieces saved_pieces(const HeadForwardArguments& a) {
  return {a.features.size(0) / 2, a.features.size(1),    a.features.size(2) * a.features.size(3),
          a.weight.size(0),       a.targets.has_value(), a.wanted.pooled,
          a.wanted.cam_grad};
}

inline HeadForwardOutputs head_forward_outputs(const HeadForwardArguments& a, const SavedPieces& pieces,
                                               DeviceId device, ScalarType compute) {
  const int64_t M = a.features.size(0), H = a.features.size(2), W = a.features.size(3);
  const int64_t N = M / 2, L = a.weight.size(0);
  const bool classified = a.targets.has_value();
  const Shape losses = a.options.mean ? Shape{} : Shape{N};
  const auto allocate = [&](const Shape& shape, bool wanted) { return output_if(wanted, device, shape, compute); };
  return {
      allocate(losses, classified), allocate(losses, classified),          allocate(losses, true),
      allocate({M, L}, classified), allocate({M, L, H, W}, a.wanted.maps), allocate({pieces.size}, a.wanted.gradients)};
}

// The inputs whose gradients a backward is asked for.
struct Needed {
  bool features, weight, bias;
};

struct HeadBackwardArguments {
  const OptionalTensor &d_loss, &d_classification, &d_consistency, d_logits;
  const Tensor &weight, &saved;
  SavedPieces pieces;
  int64_t N, H, W;
  double consistency_weight;
  TwinMap twin;
  bool mean;
  ScalarType dtype;  // of the features
  bool channels_last;
  Needed need;
};

struct HeadGradients {
  OptionalTensor features, weight, bias;
};

// The head's operators as PyTorch calls them, with the arguments of the schema in its order.
template <HeadForwardOutputs (*run)(const HeadForwardArguments&)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_forward_operator(
    const Tensor& features, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& targets,
    const OptionalTensor& target_table, const Tensor& map_weights, double consistency_weight, int64_t p,
    int64_t twin_map, bool both_views, bool mean, bool with_maps, bool save_gradients, bool save_pooled,
    bool save_cam_grad) {
  const TwinMap twin = twin_map_on(twin_map, features.size(2), features.size(3));
  const HeadOptions options{consistency_weight, int(p), twin, both_views, mean};
  HeadForwardOutputs out = run({features,
                                weight,
                                bias,
                                targets,
                                target_table,
                                map_weights,
                                options,
                                {with_maps, save_gradients, save_pooled, save_cam_grad}});
  return {or_undefined(out.loss),   or_undefined(out.classification), or_undefined(out.consistency),
          or_undefined(out.logits), or_undefined(out.maps),           or_undefined(out.saved)};
}

template <HeadGradients (*run)(const HeadBackwardArguments&)>
std::tuple<Tensor, Tensor, Tensor> head_backward_operator(
    const OptionalTensor& d_loss, const OptionalTensor& d_classification, const OptionalTensor& d_consistency,
    const OptionalTensor& d_logits, const Tensor& weight, const Tensor& saved, int64_t n, int64_t height, int64_t width,
    bool with_logit_grad, bool with_pooled, bool with_cam_grad, double consistency_weight, int64_t twin_map, bool mean,
    ScalarType dtype, bool channels_last, bool need_features, bool need_weight, bool need_bias) {
  const int64_t L = weight.size(0), C = weight.size(1);
  const SavedPieces pieces(n, C, height * width, L, with_logit_grad, with_pooled, with_cam_grad);
  STD_TORCH_CHECK(saved.numel() == pieces.size, "saved: got ", saved.numel(), " elements, expected ", pieces.size);
  HeadGradients out = run({d_loss,
                           d_classification,
                           d_consistency,
                           d_logits ? OptionalTensor(dense(*d_logits)) : std::nullopt,
                           weight,
                           saved,
                           pieces,
                           n,
                           height,
                           width,
                           consistency_weight,
                           twin_map_on(twin_map, height, width),
                           mean,
                           dtype,
                           channels_last,
                           {need_features, need_weight, need_bias}});
  return {or_undefined(out.features), or_undefined(out.weight), or_undefined(out.bias)};
}

}  // namespace rebalfer
