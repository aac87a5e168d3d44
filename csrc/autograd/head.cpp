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
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& features, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& targets,
    const OptionalTensor& target_table, const Tensor& map_weights, double consistency_weight, int64_t p,
    int64_t twin_map, bool both_views, bool mean, bool with_maps, bool save_gradients, bool save_pooled,
    bool save_cam_grad);
using Backward = std::tuple<Tensor, Tensor, Tensor>(
    const OptionalTensor& d_loss, const OptionalTensor& d_classification, const OptionalTensor& d_consistency,
    const OptionalTensor& d_logits, const Tensor& weight, const Tensor& saved, c10::SymInt n, c10::SymInt height,
    c10::SymInt width, bool with_logit_grad, bool with_pooled, bool with_cam_grad, double consistency_weight,
    int64_t twin_map, bool mean, at::ScalarType dtype, bool channels_last, bool need_features, bool need_weight,
    bool need_bias);

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
  const Backend& backend() const { return backends()[packed >> 14 & 0xffff]; }

  // With what the backward needs to know of the inputs.
  Options with(const Tensor& features, bool targets, bool bias) const {
    return Options(packed | int64_t(features.scalar_type()) << 32 | int64_t(!features.is_contiguous()) << 40 |
                   int64_t(targets) << 41 | int64_t(bias) << 42);
  }
  at::ScalarType dtype() const { return at::ScalarType(packed >> 32 & 0xff); }
  bool channels_last() const { return packed >> 40 & 1; }
  bool has_targets() const { return packed >> 41 & 1; }
  bool has_bias() const { return packed >> 42 & 1; }

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
  // What is differentiable, and what is saved: through that a second differentiation finds this node. The consistency
  // and what is saved are there in every call, the loss, the classification and the logits only with targets.
  static variable_list forward(AutogradContext* ctx, const Tensor& features, const Tensor& weight,
                               const OptionalTensor& bias, const Constants& a) {
    const Options of = a.options;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, classification, consistency, logits, maps, saved] = of.backend().forward.call(
        features, weight, bias, a.targets, a.target_table, a.map_weights, a.consistency_weight, of.p(), of.twin_map(),
        of.both_views(), of.mean(), of.maps(), of.gradients(), of.pooled(), of.cam_grad());
    a.maps = maps;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({weight, saved});
    ctx->saved_data["consistency_weight"] = a.consistency_weight;
    ctx->saved_data["options"] = of.with(features, a.targets.has_value(), bias.has_value()).packed;
    ctx->saved_data["size"] = features.sizes();
    if (!a.targets) return {consistency, saved};
    return {consistency, saved, loss, classification, logits};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto given = [&](size_t i) {
      return i < upstream.size() && upstream[i].defined() ? OptionalTensor(upstream[i]) : std::nullopt;
    };
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> size = ctx->saved_data["size"].toIntVector();  // of the features
    const double consistency_weight = ctx->saved_data["consistency_weight"].toDouble();
    const Options of(ctx->saved_data["options"].toInt());
    const bool need[] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), of.has_bias() && ctx->needs_input_grad(2)};
    variable_list gradients(4);  // one for each argument of the forward
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(gradients[0], gradients[1], gradients[2]) = of.backend().backward.call(
          given(2), given(3), given(0), given(4), saved[0], saved[1], size[0] / 2, size[2], size[3], of.has_targets(),
          of.pooled(), of.cam_grad(), consistency_weight, of.twin_map(), of.mean(), of.dtype(), of.channels_last(),
          need[0], need[1], need[2]);
    }
    if (at::GradMode::is_enabled()) refuse_second_order(gradients, saved[1], upstream);
    return gradients;
  }

  static void refuse_second_order(variable_list& gradients, const Tensor& saved, const variable_list& upstream) {
    variable_list tensors;
    const auto append = [&](const variable_list& more) {
      for (const Tensor& t : more)
        if (t.defined()) tensors.push_back(t);
    };
    append(gradients);
    const int64_t count = tensors.size();
    append({saved});
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
  out.resize(5);  // those that are not there are undefined
  return {std::move(out[2]), std::move(out[3]), std::move(out[0]), std::move(out[4]), std::move(maps)};
}

}  // namespace rebalfer
