// The operators of rebalfer_kernels/ops.py on CUDA tensors: outputs, the current stream, and PyTorch's stable ABI.
//
// Nothing here waits for the device, so every operator can be captured into a CUDA graph.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../layout.h"
#include "kernels.cuh"

namespace rebalfer::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Half: return Storage::f16;
    default: STD_TORCH_CHECK(false, "the CUDA kernels serve float32, bfloat16 and float16");
  }
}

// Makes the tensors' device current while it lives.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  bool clusters() const {
    int there = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&there, cudaDevAttrClusterLaunch, index_);
    STD_TORCH_CHECK(error == cudaSuccess, "cluster launch: ", cudaGetErrorString(error));
    return there;
  }
  int32_t index() const { return index_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

Tensor output(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype, bool wanted = true) {
  if (!wanted) shape = {0};
  return torch::stable::new_empty(like, shape, dtype);
}

Tensor feature_output(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype, bool channels_last,
                      bool wanted) {
  if (!wanted) return output(like, {0}, dtype);
  return torch::stable::empty(
      shape, dtype, std::nullopt, like.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

// Null where there is nothing.
template <typename T = float>
T* data(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}
template <typename T = float>
const T* data(const OptionalTensor& t) {
  return t ? data<const T>(*t) : nullptr;
}

Geometry geometry(int64_t N, int64_t C, int64_t H, int64_t W, int64_t L, int views, bool channels_last, TwinMap twin) {
  STD_TORCH_CHECK(serves(C, H * W, L), "the CUDA kernels serve up to ", kMaxClasses, " classes and maps of up to ",
                  kMaxPositions, " positions, got ", L, " and ", H, " x ", W);
  STD_TORCH_CHECK(N < (int64_t(1) << 27) && N * ((C + 127) / 128) < std::numeric_limits<int>::max() - C,
                  "features: got ", N, " samples, more blocks than a grid has");
  return {N, int(C), int(H), int(W), int(L), views, channels_last, twin};
}

Parameter parameter(const Tensor& t) { return {data<void>(t), t.scalar_type() == ScalarType::Float}; }

Targets targets_of(const OptionalTensor& targets, const OptionalTensor& table) {
  if (!targets) return {};
  const bool soft = targets->dim() == 2;
  return {soft ? nullptr : data<int64_t>(targets), soft ? data(targets) : nullptr, data(table)};
}

Upstream upstream(const OptionalTensor& t) { return {data(t), t && t->dim() ? t->stride(0) : 0}; }

// The ticket of a launch: one of the tickets that lie ready or, where they have run out, one of its own, zeroed before
// it by a launch more.
class Ticket {
 public:
  Ticket(const Device& device, const Tensor& like, cudaStream_t stream)
      : address_(take_ticket(device.index(), stream)) {
    if (address_) return;
    own_ = torch::stable::new_zeros(like, {1}, ScalarType::Int);
    address_ = data<unsigned>(*own_);
  }
  unsigned* get() const { return address_; }

 private:
  std::optional<Tensor> own_;
  unsigned* address_;
};

using HeadForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

HeadForward head_forward(Tensor features, Tensor weight, OptionalTensor bias, OptionalTensor targets,
                         OptionalTensor target_table, Tensor map_weights, double consistency_weight, int64_t p,
                         std::vector<int64_t> twin_map, bool both_views, bool mean, bool with_maps, bool save_residual,
                         bool save_pooled, bool save_cam_grad) {
  const int64_t M = features.size(0), N = M / 2, C = features.size(1), H = features.size(2), W = features.size(3);
  const int64_t L = weight.size(0);
  const bool classified = targets.has_value();
  const Storage storage = storage_of(features.scalar_type());
  const Geometry g = geometry(N, C, H, W, L, 2, is_channels_last(features), twin_map_on(twin_map, H, W));
  const Device device(features);
  const cudaStream_t stream = device.stream();

  const std::vector<int64_t> losses = mean ? std::vector<int64_t>{} : std::vector<int64_t>{N};
  constexpr ScalarType dtype = ScalarType::Float;
  Tensor loss = output(features, losses, dtype, classified);
  Tensor classification = output(features, losses, dtype, classified);
  Tensor consistency = output(features, losses, dtype), logits = output(features, {M, L}, dtype, classified);
  Tensor maps = output(features, {M, L, H, W}, dtype, with_maps);
  Tensor residual = output(features, {N, L, H, W}, dtype, save_residual);
  Tensor pooled = output(features, {M, C}, dtype, save_pooled);
  Tensor cam_grad = output(features, {N, L, C}, dtype, save_cam_grad);
  HeadForward results{loss, classification, consistency, logits, maps, residual, pooled, cam_grad};
  if (N == 0) {  // NaN of nothing, as PyTorch's own losses
    for (Tensor* t : {&loss, &classification, &consistency})
      if (mean && t->numel()) torch::stable::fill_(*t, std::numeric_limits<double>::quiet_NaN());
    return results;
  }
  std::optional<Tensor> per_sample;
  std::optional<Ticket> ticket;
  if (mean) {
    per_sample = output(features, {2, N}, dtype);
    ticket.emplace(device, features, stream);
  }
  ForwardParams params{};
  params.g = g;
  params.features = features.data_ptr();
  params.weight = parameter(weight);
  if (bias) params.bias = parameter(*bias);
  params.targets = targets_of(targets, target_table);
  params.map_weights = data(map_weights);
  params.consistency_weight = float(consistency_weight);
  params.p = int(p);
  params.both_views = both_views;
  params.cluster = cluster_blocks(C, H * W, storage == Storage::f32 ? 4 : 2, device.clusters());
  params.loss = data(loss), params.classification = data(classification), params.consistency = data(consistency);
  if (per_sample) params.per_sample = data(*per_sample);
  params.ticket = ticket ? ticket->get() : nullptr;
  params.logits = data(logits), params.maps = data(maps), params.residual = data(residual);
  params.pooled = data(pooled), params.cam_grad = data(cam_grad);
  launch_forward(storage, params, stream);
  return results;
}

using HeadBackward = std::tuple<Tensor, Tensor, Tensor>;

HeadBackward head_backward(OptionalTensor d_loss, OptionalTensor d_classification, OptionalTensor d_consistency,
                           OptionalTensor d_logits, Tensor weight, OptionalTensor targets, OptionalTensor target_table,
                           Tensor map_weights, Tensor logits, Tensor residual, Tensor pooled, Tensor cam_grad,
                           double consistency_weight, int64_t p, std::vector<int64_t> twin_map, bool both_views,
                           bool mean, ScalarType dtype, bool channels_last, bool need_features, bool need_weight,
                           bool need_bias) {
  const int64_t N = residual.size(0), H = residual.size(2), W = residual.size(3), L = weight.size(0), C = weight.size(1);
  const Device device(weight);
  Tensor d_features = feature_output(weight, {2 * N, C, H, W}, dtype, channels_last, need_features);
  Tensor d_weight = output(weight, {L, C}, weight.scalar_type(), need_weight);
  Tensor d_bias = output(weight, {L}, weight.scalar_type(), need_bias);

  BackwardParams params{};
  params.g = geometry(N, C, H, W, L, 2, channels_last, twin_map_on(twin_map, H, W));
  params.d_loss = upstream(d_loss), params.d_classification = upstream(d_classification);
  params.d_consistency = upstream(d_consistency), params.d_logits = data(d_logits);
  params.weight = parameter(weight);
  params.targets = targets_of(targets, target_table);
  params.map_weights = data(map_weights), params.logits = data(logits), params.residual = data(residual);
  params.pooled = data(pooled), params.cam_grad = data(cam_grad);
  params.consistency_weight = float(consistency_weight);
  params.share = mean ? 1.0f / float(std::max<int64_t>(N, 1)) : 1.0f;
  params.p = int(p);
  params.both_views = both_views;
  params.d_features = data<void>(d_features), params.d_weight = data<void>(d_weight);
  params.d_bias = data<void>(d_bias);
  launch_backward(storage_of(dtype), params, device.stream());
  return {d_features, d_weight, d_bias};
}

// What both launches over single views start from.
ForwardParams single_views(const Tensor& features, const Tensor& weight, const Device& device) {
  const int64_t C = features.size(1), H = features.size(2), W = features.size(3);
  const bool is_float = features.scalar_type() == ScalarType::Float;
  ForwardParams params{};
  params.g = geometry(features.size(0), C, H, W, weight.size(0), 1, is_channels_last(features), {});
  params.features = data<void>(features);
  params.weight = parameter(weight);
  params.cluster = cluster_blocks(C, H * W, is_float ? 4 : 2, device.clusters());
  return params;
}

Tensor cam_forward(Tensor features, Tensor weight) {
  const Device device(features);
  ForwardParams params = single_views(features, weight, device);
  Tensor maps = output(features, {params.g.N, params.g.L, params.g.H, params.g.W}, ScalarType::Float);
  params.maps = data(maps);
  if (params.g.N) launch_forward(storage_of(features.scalar_type()), params, device.stream());
  return maps;
}

std::tuple<Tensor, Tensor> cam_backward(Tensor d_maps, Tensor features, Tensor weight, ScalarType dtype,
                                        bool channels_last, bool need_features, bool need_weight) {
  const int64_t M = d_maps.size(0), L = d_maps.size(1), H = d_maps.size(2), W = d_maps.size(3), C = weight.size(1);
  const Device device(weight);
  Tensor d_features = feature_output(weight, {M, C, H, W}, dtype, channels_last, need_features);
  Tensor d_weight = output(weight, {L, C}, weight.scalar_type(), need_weight);
  Tensor cam_grad = output(weight, {M, L, C}, ScalarType::Float, need_weight);
  if (need_weight && M) {
    ForwardParams params = single_views(features, weight, device);
    params.d_maps = data(d_maps);
    params.cam_grad = data(cam_grad);
    launch_forward(storage_of(dtype), params, device.stream());
  }
  BackwardParams params{};
  params.g = geometry(M, C, H, W, L, 1, channels_last, {});
  params.weight = parameter(weight);
  params.d_maps = data(d_maps);
  params.cam_grad = data(cam_grad);
  params.d_features = data<void>(d_features), params.d_weight = data<void>(d_weight);
  launch_backward(storage_of(dtype), params, device.stream());
  return {d_features, d_weight};
}

Tensor cross_entropy_forward(Tensor logits, Tensor targets, Tensor target_table, bool mean) {
  const Device device(logits);
  CrossEntropyParams params{};
  params.M = logits.size(0), params.L = logits.size(1);
  Tensor loss = output(logits, mean ? std::vector<int64_t>{} : std::vector<int64_t>{params.M}, ScalarType::Float);
  if (params.M == 0) {
    if (mean) torch::stable::fill_(loss, std::numeric_limits<double>::quiet_NaN());
    return loss;
  }
  const cudaStream_t stream = device.stream();
  params.logits = logits.data_ptr();
  params.targets = targets_of(targets, target_table);
  params.loss = data(loss);
  std::optional<Tensor> per_sample;
  std::optional<Ticket> ticket;
  if (mean) {
    per_sample = output(logits, {params.M}, ScalarType::Float);
    params.per_sample = data(*per_sample);
    params.ticket = ticket.emplace(device, logits, stream).get();
  }
  launch_cross_entropy_forward(storage_of(logits.scalar_type()), params, stream);
  return loss;
}

Tensor cross_entropy_backward(Tensor d_loss, Tensor logits, Tensor targets, Tensor target_table, bool mean) {
  const Device device(logits);
  CrossEntropyParams params{};
  params.M = logits.size(0), params.L = logits.size(1);
  Tensor d_logits = output(logits, {params.M, params.L}, logits.scalar_type());
  if (params.M == 0) return d_logits;
  params.logits = logits.data_ptr();
  params.targets = targets_of(targets, target_table);
  params.d_loss = upstream(d_loss);
  params.share = mean ? 1.0f / float(params.M) : 1.0f;
  params.d_logits = d_logits.data_ptr();
  launch_cross_entropy_backward(storage_of(logits.scalar_type()), params, device.stream());
  return d_logits;
}

// Why the kernels cannot run on the current device; nothing if they can.
std::string problem() {
  try {
    load_module();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace
}  // namespace rebalfer::gpu

STABLE_TORCH_LIBRARY_IMPL(rebalfer_kernels, CUDA, m) {
  m.impl("head_forward_cuda", TORCH_BOX(&rebalfer::gpu::head_forward));
  m.impl("head_backward_cuda", TORCH_BOX(&rebalfer::gpu::head_backward));
  m.impl("cam_forward_cuda", TORCH_BOX(&rebalfer::gpu::cam_forward));
  m.impl("cam_backward_cuda", TORCH_BOX(&rebalfer::gpu::cam_backward));
  m.impl("cross_entropy_forward_cuda", TORCH_BOX(&rebalfer::gpu::cross_entropy_forward));
  m.impl("cross_entropy_backward_cuda", TORCH_BOX(&rebalfer::gpu::cross_entropy_backward));
}

STABLE_TORCH_LIBRARY_IMPL(rebalfer_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_problem", TORCH_BOX(&rebalfer::gpu::problem));
}
