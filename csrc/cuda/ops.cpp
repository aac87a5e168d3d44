// The operators of rebalfer_kernels/ops.py on CUDA tensors: outputs, the current stream, and PyTorch's stable ABI.
//
// Nothing here waits for the device, so every operator can be captured into a CUDA graph.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../operators.h"
#include "kernels.cuh"

namespace rebalfer::gpu {
namespace {

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
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_), granted_(prepare()) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  int32_t index() const { return index_; }
  DeviceId id() const { return {aoti_torch_device_type_cuda(), index_}; }
  const Granted& granted() const { return granted_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Granted granted_;
};

// How the forward's blocks share the features.
void share(ForwardParams& params, Storage storage, const Device& device) {
  const Geometry& g = params.g;
  const Granted& granted = device.granted();
  params.cluster_bits = cluster_bits(g.C, int64_t(g.H) * g.W, storage == Storage::f32 ? 4 : 2, granted.cluster_bits);
  params.stages = ring_stages(g.N << params.cluster_bits, granted.multiprocessors.count);
  params.early = granted.early;
}

OptionalTensor feature_output_if(bool wanted, DeviceId device, int64_t M, int64_t C, int64_t H, int64_t W,
                                 ScalarType dtype, bool channels_last) {
  if (!wanted) return std::nullopt;
  return empty(device, {M, C, H, W}, feature_strides(C, H, W, channels_last), dtype);
}

// Null for a tensor without elements.
template <typename T = float>
T* pointer(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}
template <typename T = float>
T* pointer(const OptionalTensor& t) {
  return t ? pointer<T>(*t) : nullptr;
}

Geometry geometry(int64_t N, int64_t C, int64_t H, int64_t W, int64_t L, int views, bool channels_last, TwinMap twin) {
  STD_TORCH_CHECK(serves(C, H * W, L), "the CUDA kernels serve up to ", kMaxClasses, " classes and maps of up to ",
                  kMaxPositions, " positions, got ", L, " and ", H, " x ", W);
  STD_TORCH_CHECK(N < (int64_t(1) << 27) && N * ((C + 63) / 64) < std::numeric_limits<int>::max() - C, "features: got ",
                  N, " samples, more blocks than a grid has");
  return {N, int(C), int(H), int(W), int(L), views, channels_last, twin};
}

Parameter parameter(const Tensor& t) { return {pointer<void>(t), t.scalar_type() == ScalarType::Float}; }

Targets<float> targets_of(const OptionalTensor& targets, const OptionalTensor& table) {
  if (!targets) return {};
  const bool soft = targets->dim() == 2;
  return {soft ? nullptr : pointer<int64_t>(targets), soft ? pointer(targets) : nullptr, pointer(table)};
}

Upstream upstream(const OptionalTensor& t) { return {pointer(t), t && t->dim() ? t->stride(0) : 0}; }

// The ticket of a launch: one of those that are kept ready or, where they have run out, one of its own, which another
// launch zeroes first.
class Ticket {
 public:
  Ticket(const Device& device, const Tensor& like, cudaStream_t stream)
      : address_(take_ticket(device.index(), stream)) {
    if (address_) return;
    own_ = torch::stable::new_zeros(like, {1}, ScalarType::Int);
    address_ = pointer<unsigned>(*own_);
  }
  unsigned* get() const { return address_; }

 private:
  std::optional<Tensor> own_;
  unsigned* address_;
};

HeadForwardOutputs head_forward(const HeadForwardArguments& a) {
  const int64_t N = a.features.size(0) / 2, C = a.features.size(1), H = a.features.size(2), W = a.features.size(3);
  const Storage storage = storage_of(a.features.scalar_type());
  const Geometry g = geometry(N, C, H, W, a.weight.size(0), 2, is_channels_last(a.features), a.options.twin);
  const Device device(a.features);
  const cudaStream_t stream = device.stream();
  const SavedPieces pieces = saved_pieces(a);
  HeadForwardOutputs out = head_forward_outputs(a, pieces, device.id(), ScalarType::Float);
  if (N == 0) {  // NaN of nothing, as PyTorch's own losses
    for (const OptionalTensor* t : {&out.loss, &out.classification, &out.consistency})
      if (a.options.mean && *t) torch::stable::fill_(**t, std::numeric_limits<double>::quiet_NaN());
    return out;
  }
  ForwardParams params{};
  params.g = g;
  params.features = a.features.data_ptr();
  params.weight = parameter(a.weight);
  if (a.bias) params.bias = parameter(*a.bias);
  params.targets = targets_of(a.targets, a.target_table);
  params.map_weights = pointer(a.map_weights);
  params.consistency_weight = float(a.options.consistency_weight);
  params.p = a.options.p;
  params.both_views = a.options.both_views;
  share(params, storage, device);
  params.loss = pointer(out.loss), params.classification = pointer(out.classification);
  params.consistency = pointer(out.consistency), params.logits = pointer(out.logits), params.maps = pointer(out.maps);
  float* const saved = pointer(out.saved);
  params.map_grad = pieces.in(saved, pieces.map_grad), params.logit_grad = pieces.in(saved, pieces.logit_grad);
  params.pooled = pieces.in(saved, pieces.pooled), params.cam_grad = pieces.in(saved, pieces.cam_grad);
  std::optional<Tensor> per_sample;
  std::optional<Ticket> ticket;
  if (a.options.mean) {
    per_sample = output(device.id(), {2, N}, ScalarType::Float);
    params.per_sample = pointer(*per_sample);
    params.ticket = ticket.emplace(device, a.features, stream).get();
  }
  launch_forward(storage, params, device.granted().multiprocessors, stream);
  return out;
}

HeadGradients head_backward(const HeadBackwardArguments& a) {
  const int64_t N = a.N, H = a.H, W = a.W, L = a.weight.size(0), C = a.weight.size(1);
  const ScalarType weight_dtype = a.weight.scalar_type();
  const Device device(a.weight);
  const HeadGradients out{feature_output_if(a.need.features, device.id(), 2 * N, C, H, W, a.dtype, a.channels_last),
                          output_if(a.need.weight, device.id(), {L, C}, weight_dtype),
                          output_if(a.need.bias, device.id(), {L}, weight_dtype)};
  BackwardParams params{};
  params.early = device.granted().early;
  params.g = geometry(N, C, H, W, L, 2, a.channels_last, a.twin);
  params.d_loss = upstream(a.d_loss), params.d_classification = upstream(a.d_classification);
  params.d_consistency = upstream(a.d_consistency), params.d_logits = pointer(a.d_logits);
  params.weight = parameter(a.weight);
  const float* const saved = pointer(a.saved);
  params.map_grad = a.pieces.in(saved, a.pieces.map_grad), params.logit_grad = a.pieces.in(saved, a.pieces.logit_grad);
  if (a.need.weight)
    params.pooled = a.pieces.in(saved, a.pieces.pooled), params.cam_grad = a.pieces.in(saved, a.pieces.cam_grad);
  params.consistency_weight = float(a.consistency_weight);
  params.share = a.mean ? 1.0f / float(std::max<int64_t>(N, 1)) : 1.0f;
  params.d_features = pointer<void>(out.features), params.d_weight = pointer<void>(out.weight);
  params.d_bias = pointer<void>(out.bias);
  launch_backward(storage_of(a.dtype), params, device.stream());
  return out;
}

Tensor cam_forward(Tensor features, Tensor weight) {
  const int64_t C = features.size(1), H = features.size(2), W = features.size(3);
  const Device device(features);
  ForwardParams params{};
  params.g = geometry(features.size(0), C, H, W, weight.size(0), 1, is_channels_last(features), {});
  params.features = pointer<void>(features);
  params.weight = parameter(weight);
  share(params, storage_of(features.scalar_type()), device);
  Tensor maps = output(device.id(), {params.g.N, params.g.L, params.g.H, params.g.W}, ScalarType::Float);
  params.maps = pointer(maps);
  if (params.g.N)
    launch_forward(storage_of(features.scalar_type()), params, device.granted().multiprocessors, device.stream());
  return maps;
}

std::tuple<Tensor, Tensor> cam_backward(Tensor d_maps, Tensor features, Tensor weight, ScalarType dtype,
                                        bool channels_last, bool need_features, bool need_weight) {
  const int64_t M = d_maps.size(0), L = d_maps.size(1), H = d_maps.size(2), W = d_maps.size(3), C = weight.size(1);
  const Device device(weight);
  d_maps = dense(d_maps);
  OptionalTensor d_features = feature_output_if(need_features, device.id(), M, C, H, W, dtype, channels_last);
  OptionalTensor d_weight = output_if(need_weight, device.id(), {L, C}, weight.scalar_type());
  const OptionalTensor cam_grad = output_if(need_weight, device.id(), {M, L, C}, ScalarType::Float);
  const Geometry g = geometry(M, C, H, W, L, 1, channels_last, {});
  const Granted& granted = device.granted();
  if (need_weight && M) {
    CamWeightParams params{};
    params.g = g;
    params.features = pointer<void>(features);
    params.d_maps = pointer(d_maps);
    params.cam_grad = pointer(cam_grad);
    params.split_bits = cluster_bits(C, H * W, dtype == ScalarType::Float ? 4 : 2, kMaxClusterBits);
    params.stages = ring_stages(M << params.split_bits, granted.multiprocessors.count);
    params.early = granted.early;
    launch_cam_weight(storage_of(dtype), params, device.stream());
  }
  BackwardParams params{};
  params.early = granted.early;
  params.g = g;
  params.weight = parameter(weight);
  params.map_grad = pointer(d_maps);
  params.cam_grad = pointer(cam_grad);
  params.d_features = pointer<void>(d_features), params.d_weight = pointer<void>(d_weight);
  launch_backward(storage_of(dtype), params, device.stream());
  return {or_undefined(d_features), or_undefined(d_weight)};
}

Tensor cross_entropy_forward(Tensor logits, Tensor targets, Tensor target_table, bool mean) {
  const Device device(logits);
  CrossEntropyParams params{};
  params.M = logits.size(0), params.L = logits.size(1);
  Tensor loss = output(device.id(), mean ? Shape{} : Shape{params.M}, ScalarType::Float);
  if (params.M == 0) {
    if (mean) torch::stable::fill_(loss, std::numeric_limits<double>::quiet_NaN());
    return loss;
  }
  const cudaStream_t stream = device.stream();
  params.logits = logits.data_ptr();
  params.targets = targets_of(targets, target_table);
  params.loss = pointer(loss);
  std::optional<Tensor> per_sample;
  std::optional<Ticket> ticket;
  if (mean) {
    per_sample = output(device.id(), {params.M}, ScalarType::Float);
    params.per_sample = pointer(*per_sample);
    params.ticket = ticket.emplace(device, logits, stream).get();
  }
  launch_cross_entropy_forward(storage_of(logits.scalar_type()), params, stream);
  return loss;
}

Tensor cross_entropy_backward(Tensor d_loss, Tensor logits, Tensor targets, Tensor target_table, bool mean) {
  const Device device(logits);
  CrossEntropyParams params{};
  params.M = logits.size(0), params.L = logits.size(1);
  Tensor d_logits = output(device.id(), {params.M, params.L}, logits.scalar_type());
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
    prepare();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace
}  // namespace rebalfer::gpu

STABLE_TORCH_LIBRARY_IMPL(rebalfer_kernels, CUDA, m) {
  m.impl("head_forward_cuda", TORCH_BOX(&rebalfer::head_forward_operator<rebalfer::gpu::head_forward>));
  m.impl("head_backward_cuda", TORCH_BOX(&rebalfer::head_backward_operator<rebalfer::gpu::head_backward>));
  m.impl("cam_forward_cuda", TORCH_BOX(&rebalfer::gpu::cam_forward));
  m.impl("cam_backward_cuda", TORCH_BOX(&rebalfer::gpu::cam_backward));
  m.impl("cross_entropy_forward_cuda", TORCH_BOX(&rebalfer::gpu::cross_entropy_forward));
  m.impl("cross_entropy_backward_cuda", TORCH_BOX(&rebalfer::gpu::cross_entropy_backward));
}

STABLE_TORCH_LIBRARY_IMPL(rebalfer_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_problem", TORCH_BOX(&rebalfer::gpu::problem));
}
