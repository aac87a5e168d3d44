// The head's autograd in C++: calls a backend's head_forward and records its head_backward, as HeadLossFunction of
// rebalfer_kernels/ops.py does in Python, for less of the host's time. PyTorch's stable ABI has no autograd, so this
// library is of one version of torch; where it cannot be built, Python's function serves.
#include "head.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <deque>
#include <mutex>

namespace rebalfer {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// The operators' types by their schemas.
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& features, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& targets,
    const OptionalTensor& target_table, const Tensor& map_weights, double consistency_weight, int64_t p,
    int64_t twin_map, bool both_views, bool mean, bool with_maps, bool save_gradients, bool save_pooled,
    bool save_cam_grad);
using Backward = std::tuple<Tensor, Tensor, Tensor>(
    const OptionalTensor& d_loss, const OptionalTensor& d_classification, const OptionalTensor& d_consistency,
    const OptionalTensor& d_logits, const Tensor& weight, const Tensor& map_grad, const Tensor& logit_grad,
    const Tensor& pooled, const Tensor& cam_grad, double consistency_weight, int64_t twin_map, bool mean,
    at::ScalarType dtype, bool channels_last, bool need_features, bool need_weight, bool need_bias);

// The operators of one backend.
struct Backend {
  explicit Backend(const std::string& name)
      : name(name), forward(find<Forward>("head_forward_")), backward(find<Backward>("head_backward_")) {}

  template <typename Schema>
  c10::TypedOperatorHandle<Schema> find(const std::string& op) const {
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow(("rebalfer_kernels::" + op + name).c_str(), "")
        .typed<Schema>();
  }

  const std::string name;
  const c10::TypedOperatorHandle<Forward> forward;
  const c10::TypedOperatorHandle<Backward> backward;
};

// Backends by number, in the order in which they were first asked for; none is ever removed.
class Backends {
 public:
  int64_t number(const std::string& name) {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < backends_.size(); ++i)
      if (backends_[i].name == name) return i;
    backends_.emplace_back(name);
    return backends_.size() - 1;
  }

  const Backend& operator[](int64_t number) {
    const std::lock_guard lock(mutex_);
    return backends_.at(number);
  }

 private:
  std::mutex mutex_;
  std::deque<Backend> backends_;  // a new one moves no other
};

Backends& backends() {
  static Backends all;
  return all;
}

// Identity on the gradients, which come first; refuses to be differentiated, whichever tensor the path leads to.
struct FirstOrderOnly : Function<FirstOrderOnly> {
  static variable_list forward(AutogradContext*, at::TensorList tensors, int64_t gradients) {
    variable_list same;
    for (const Tensor& gradient : tensors.slice(0, gradients)) same.push_back(gradient.view_as(gradient));
    return same;
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "rebalanced_head_loss: second-order gradients are not implemented by the fused backends; "
                "use backend=\"reference\" where a gradient must itself be differentiated");
  }
};

// HeadOptions, Wanted and the backend, packed in one number by rebalfer_kernels/ops.py.
struct Options {
  explicit Options(int64_t packed) : packed(packed) {}
  bool flag(int i) const { return packed >> (2 + i) & 1; }
  int64_t p() const { return packed & 3; }
  int64_t twin_map() const { return packed >> 8 & 63; }
  bool both_views() const { return flag(0); }
  bool mean() const { return flag(1); }
  bool maps() const { return flag(2); }
  bool gradients() const { return flag(3); }
  bool pooled() const { return flag(4); }
  bool cam_grad() const { return flag(5); }
  const Backend& backend() const { return backends()[packed >> 14]; }
  int64_t packed;
};

// The arguments that are not differentiable, and the output that is not.
struct Constants {
  const OptionalTensor &targets, &target_table;
  const Tensor& map_weights;
  double consistency_weight;
  Options options;
  Tensor& maps;
};

struct HeadLoss : Function<HeadLoss> {
  // The differentiable outputs, and map_grad: through it a second differentiation finds this node.
  static variable_list forward(AutogradContext* ctx, const Tensor& features, const Tensor& weight,
                               const OptionalTensor& bias, const Constants& a) {
    const Options of = a.options;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, classification, consistency, logits, maps, map_grad, logit_grad, pooled, cam_grad] =
        of.backend().forward.call(features, weight, bias, a.targets, a.target_table, a.map_weights,
                                  a.consistency_weight, of.p(), of.twin_map(), of.both_views(), of.mean(), of.maps(),
                                  of.gradients(), of.pooled(), of.cam_grad());
    if (of.maps()) a.maps = maps;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({weight, map_grad, logit_grad, pooled, cam_grad});
    ctx->saved_data["constants"] = std::make_tuple(a.consistency_weight, of.packed, int64_t(features.scalar_type()),
                                                   !features.is_contiguous(), bias.has_value());
    return {loss, classification, consistency, logits, map_grad};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto given = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const variable_list saved = ctx->get_saved_variables();
    const auto [consistency_weight, packed, dtype, channels_last, has_bias] =
        ctx->saved_data["constants"].to<std::tuple<double, int64_t, int64_t, bool, bool>>();
    const Options of(packed);
    const bool need[] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), has_bias && ctx->needs_input_grad(2)};
    variable_list gradients(4);  // one for each argument of the forward
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(gradients[0], gradients[1], gradients[2]) = of.backend().backward.call(
          given(upstream[0]), given(upstream[1]), given(upstream[2]), given(upstream[3]), saved[0], saved[1], saved[2],
          saved[3], saved[4], consistency_weight, of.twin_map(), of.mean(), at::ScalarType(dtype), channels_last,
          need[0], need[1], need[2]);
    }
    for (int i = 0; i < 3; ++i)
      if (!need[i]) gradients[i] = Tensor();
    if (at::GradMode::is_enabled()) refuse_second_order(gradients, saved[1], upstream);
    return gradients;
  }

  static void refuse_second_order(variable_list& gradients, const Tensor& map_grad, const variable_list& upstream) {
    variable_list tensors;
    const auto append = [&](const variable_list& more) {
      for (const Tensor& t : more)
        if (t.defined()) tensors.push_back(t);
    };
    append(gradients);
    const int64_t count = tensors.size();
    append({map_grad});
    append(upstream);
    auto same = FirstOrderOnly::apply(at::TensorList(tensors), count);
    auto next = same.begin();
    for (Tensor& gradient : gradients)
      if (gradient.defined()) gradient = *next++;
  }
};

}  // namespace

int64_t backend_number(const std::string& name) { return backends().number(name); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head(const Tensor& features, const Tensor& weight,
                                                        const OptionalTensor& bias, const OptionalTensor& targets,
                                                        const OptionalTensor& target_table, const Tensor& map_weights,
                                                        double consistency_weight, int64_t options) {
  Tensor maps;
  const Constants constants{targets, target_table, map_weights, consistency_weight, Options(options), maps};
  variable_list out = HeadLoss::apply(features, weight, bias, constants);
  return {std::move(out[0]), std::move(out[1]), std::move(out[2]), std::move(out[3]), std::move(maps)};
}

}  // namespace rebalfer
