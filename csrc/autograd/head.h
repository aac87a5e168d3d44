// The head with its autograd, as the Python module reaches it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace rebalfer {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A backend's name as a part of `options`.
int64_t backend_number(const std::string& name);

// Loss, classification, consistency, logits and, if they are wanted, maps of head_forward, whose backward is recorded.
// `options` is packed by rebalfer_kernels/ops.py.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head(const Tensor& features, const Tensor& weight,
                                                        const OptionalTensor& bias, const OptionalTensor& targets,
                                                        const OptionalTensor& target_table, const Tensor& map_weights,
                                                        double consistency_weight, int64_t options);

}  // namespace rebalfer
