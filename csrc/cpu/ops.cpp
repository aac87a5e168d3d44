// The operators of rebalfer_kernels/ops.py on CPU tensors: what is parallel, what is saved, and PyTorch's stable ABI.
//
// Pairs of views are computed one by one, so a sample's results never depend on the batch; a task is a run of pairs.
// Sums over the batch are taken channel by channel, in the order of the samples. No task asks an input for its memory:
// a tensor that is copied on write would be copied then, which PyTorch forbids there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../head_math.h"
#include "../operators.h"
#include "kernels.h"
#include "tensors.h"
#include "views.h"

namespace rebalfer {
namespace {

constexpr int64_t kStreamingBytes = 24 << 20;  // gradients from this size on are written past the caches
constexpr int64_t kChannelChunk = 128;         // channels that are summed over the batch at once
constexpr int64_t kCopiedBytes = 128 << 10;    // a packed weight up to this size is copied by each task

struct Isa {
  const char* name;
  const Kernels& (*kernels)(Storage);
  const ViewKernels& (*views)();
};

// The widest instruction set of this CPU, or the one that REBALFER_CPU_ISA names.
const Isa& isa() {
  static const Isa chosen = [] {
    std::vector<Isa> available;
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;  // clang 14 knows no f16c by name
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512) available.push_back({"avx512", kernels_avx512, views_avx512});
    if (avx2) available.push_back({"avx2", kernels_avx2, views_avx2});
#endif
    available.push_back({"baseline", kernels_baseline, views_baseline});
    const char* asked = std::getenv("REBALFER_CPU_ISA");
    if (!asked || !*asked) return available.front();
    std::string names;
    for (const Isa& i : available) {
      if (std::string(i.name) == asked) return i;
      names += (names.empty() ? "" : ", ") + std::string(i.name);
    }
    STD_TORCH_CHECK(false, "REBALFER_CPU_ISA: got '", asked, "', expected one of this CPU's: ", names);
  }();
  return chosen;
}

const Kernels& kernels(Storage storage) { return isa().kernels(storage); }

Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Half: return Storage::f16;
    default: STD_TORCH_CHECK(false, "features: expected float32, bfloat16, float16 or float64");
  }
}

// run(begin, end) over tasks; one task needs no threads.
template <typename Run>
void in_parallel(int64_t tasks, const Run& run) {
  if (tasks == 1)
    run(0, 1);
  else
    torch::stable::parallel_for(0, tasks, 1, run);
}

// The weight as the kernels read it. A task packs one of its own: what another core has just written is far away, above
// all in another L3 cache. A large one is packed once for all.
template <typename A>
class PackedWeight {
 public:
  PackedWeight(const Kernels& k, Geometry g, const Tensor& weight, bool needed = true)
      : k_(k), g_(g), weight_(needed ? weight.data_ptr() : nullptr),
        is_compute_type_(weight.scalar_type() == kCompute<A>), size_(needed ? k.packed_size(g) : 0),
        shared_(size_ * int64_t(sizeof(A)) > kCopiedBytes ? pack() : Buffer<A>(0)) {}

  class OfTask {
   public:
    explicit OfTask(const PackedWeight& of)
        : own_(of.shared_.get() ? Buffer<A>(0) : of.pack()), data_(own_.get() ? own_.get() : of.shared_.get()) {}
    const A* get() const { return data_; }

   private:
    const Buffer<A> own_;
    const A* data_;
  };

 private:
  Buffer<A> pack() const {
    Buffer<A> packed(size_);
    if (size_) k_.pack(g_, weight_, is_compute_type_, packed.get());
    return packed;
  }

  const Kernels& k_;
  const Geometry g_;
  const void* const weight_;
  const bool is_compute_type_;
  const int64_t size_;
  const Buffer<A> shared_;
};

// The targets of a batch in the compute type, after a check of their classes.
template <typename A>
Targets<A> targets_of(const OptionalTensor& targets, const OptionalTensor& table, int64_t L) {
  if (!targets) return {};
  const A* of_table = static_cast<const A*>(table->data_ptr());
  if (targets->dim() == 2) return {nullptr, static_cast<const A*>(targets->data_ptr()), of_table};
  const auto* labels = static_cast<const int64_t*>(targets->data_ptr());
  for (int64_t i = 0; i < targets->size(0); ++i)
    if (labels[i] < 0 || labels[i] >= L)
      throw std::out_of_range("targets: got class " + std::to_string(labels[i]) + ", expected classes in [0, " +
                              std::to_string(L) + ")");
  return {labels, nullptr, of_table};
}

// The target distribution of sample i, computed once.
template <typename A>
void write_target_row(const Targets<A>& targets, int64_t i, int64_t L, A* out) {
  const TargetRow<A> row = targets.row(i, L);
  for (int64_t l = 0; l < L; ++l) out[l] = row[l];
}

template <typename A>
A mean_of(const A* x, int64_t count) {  // NaN of nothing, as PyTorch's own losses
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return A(sum / double(count));
}

// An upstream gradient: absent, a scalar, or one a sample (of any stride).
template <typename A>
struct Upstream {
  explicit Upstream(const OptionalTensor& t) {
    if (!t) return;
    data = static_cast<const A*>(t->data_ptr());
    stride = t->dim() ? t->stride(0) : 0;
  }
  explicit operator bool() const { return data; }
  A operator[](int64_t i) const { return data ? data[i * stride] : A(0); }
  const A* data = nullptr;
  int64_t stride = 0;
};

// The map that undoes the twin's transform, or the inverse of that map, as the kernels read it.
class PermutationTable {
 public:
  PermutationTable(const Kernels& k, Geometry g, TwinMap map, int64_t W, bool inverse)
      : HW_(g.HW), vectors_(k.permutes && !g.channels_last ? (g.HW + k.lanes - 1) / k.lanes : 0),
        lanes_(vectors_ * k.lanes), memory_(lanes_ + HW_ + vectors_) {
    for (int64_t h = 0; h < g.HW / W; ++h)
      for (int64_t w = 0; w < W; ++w) {
        const int64_t from = twin_index(map, h, w), to = h * W + w;
        index()[inverse ? from : to] = int32_t(inverse ? to : from);
      }
    fits_ = vectors_ > 0;
    for (int64_t t = 0; t < vectors_; ++t) choose_lanes(t, k.lanes);
  }
  Permutation get() const { return {index(), fits_ ? base() : nullptr, lanes()}; }

 private:
  // Of vector t of a permuted row.
  void choose_lanes(int64_t t, int64_t lanes_of_vector) {
    const int64_t begin = t * lanes_of_vector, end = std::min(HW_, begin + lanes_of_vector);
    const auto [low, high] = std::minmax_element(index() + begin, index() + end);
    fits_ = fits_ && *high - *low < 2 * lanes_of_vector;
    base()[t] = *low;
    for (int64_t x = begin; x < end; ++x) lanes()[x] = index()[x] - *low;
  }

  // One after the other in memory_.
  int32_t* lanes() const { return memory_.get(); }
  int32_t* index() const { return lanes() + lanes_; }
  int32_t* base() const { return index() + HW_; }

  const int64_t HW_, vectors_, lanes_;
  const Buffer<int32_t> memory_;
  bool fits_;
};

// The forward of the head.
template <typename A>
class HeadForward {
 public:
  explicit HeadForward(const HeadForwardArguments& a)
      : M(a.features.size(0)),
        g{a.features.size(1), a.features.size(2) * a.features.size(3), a.weight.size(0), is_channels_last(a.features)},
        k(kernels(storage_of(a.features.scalar_type()))), options(a.options), wanted(a.wanted),
        undo(k, g, options.twin, a.features.size(3), false), targets(targets_of<A>(a.targets, a.target_table, g.L)),
        weight(k, g, a.weight), bias(a.bias ? values<A>(*a.bias) : Buffer<A>(0)),
        v(static_cast<const A*>(a.map_weights.data_ptr())),
        features(a.features, g.C * g.HW * bytes_of(a.features.scalar_type())), pieces(saved_pieces(a)),
        out(head_forward_outputs(a, pieces, cpu(), kCompute<A>)), per_sample(2 * N) {}

  HeadForwardOutputs run() {
    in_parallel(N, [&](int64_t begin, int64_t end) {
      Workspace work(*this);
      for (int64_t i = begin; i < end; ++i) pair(i, work);
    });
    give(*out.consistency, consistency);
    if (targets) {
      give(*out.classification, classification);
      for (int64_t i = 0; i < N; ++i) classification[i] += A(options.consistency_weight) * consistency[i];
      give(*out.loss, classification);
    }
    return std::move(out);
  }

 private:
  // What a task needs for one pair after another.
  struct Workspace {
    explicit Workspace(const HeadForward& head)
        : weight(head.weight), scratch(head.k.scratch_bytes(head.g)),
          memory((1 + head.wanted.maps + head.wanted.cam_grad) * head.maps_size + 2 * head.pooled_pitch + 3 * head.g.L),
          residual(memory.get()), maps(residual + head.maps_size), d_twin(maps + head.wanted.maps * head.maps_size),
          pooled(d_twin + head.wanted.cam_grad * head.maps_size), z(pooled + 2 * head.pooled_pitch),
          target(z + 2 * head.g.L) {}
    const typename PackedWeight<A>::OfTask weight;
    const Buffer<char> scratch;
    const Buffer<A> memory;  // of what follows, each behind the last
    A *const residual, *const maps, *const d_twin, *const pooled, *const z, *const target;
  };

  void pair(int64_t i, Workspace& work) {
    k.residual(g, undo.get(), features[i], features[N + i], work.weight.get(), work.residual, work.pooled,
               work.pooled + pooled_pitch, work.scratch.get());
    view(i, work.pooled, work.z, work);
    view(N + i, work.pooled + pooled_pitch, work.z + g.L, work);
    consistency[i] = consistency_of(work.residual);
    if (targets) classify(i, work);
    if (!wanted.gradients) return;
    differentiate(work.residual);
    write_maps(work.residual, map_grad[i]);
    if (wanted.cam_grad) cam_gradient(i, work.residual, work);
  }

  // What is kept of view m: its pooled features, its logits z, its maps.
  void view(int64_t m, const A* pooled_view, A* z, Workspace& work) {
    if (wanted.pooled) std::memcpy(pooled[m], pooled_view, g.C * sizeof(A));
    if (targets) {
      k.logits(g, work.weight.get(), pooled_view, bias.get(), z);
      std::memcpy(logits[m], z, g.L * sizeof(A));
    }
    if (wanted.maps) {
      k.maps(g, features[m], work.weight.get(), work.maps, work.scratch.get());
      write_maps(work.maps, maps[m]);
    }
  }

  // Eq. 5 of one pair.
  A consistency_of(const A* s) const {
    A sum = 0;
    for (int64_t l = 0; l < g.L; ++l, s += pitch) {
      A of_class = 0;
      for (int64_t x = 0; x < g.HW; ++x) of_class += consistency_term(v[l], s[x], options.p);
      sum += of_class;
    }
    return sum / A(g.L * g.HW);
  }

  // The residual becomes the gradient of the pair's consistency with respect to the first view's maps, with zeros
  // behind each row.
  void differentiate(A* s) const {
    const A share = A(1) / A(g.L * g.HW);
    for (int64_t l = 0; l < g.L; ++l, s += pitch) {
      for (int64_t x = 0; x < g.HW; ++x) s[x] = share * consistency_gradient(v[l], s[x], options.p);
      std::fill(s + g.HW, s + pitch, A(0));
    }
  }

  // Eq. 1 of one pair, with its gradient.
  void classify(int64_t i, Workspace& work) {
    const A* const t = work.target;
    write_target_row(targets, i, g.L, work.target);
    classification[i] = 0;
    for (int view = 0; view < 2; ++view) {
      const A* const z = work.z + view * g.L;
      A* const dz = wanted.gradients ? logit_grad[view * N + i] : nullptr;
      if (view == 0 || options.both_views) {
        const auto of = log_sum_exp(z, g.L);
        classification[i] += cross_entropy(z, of, t, g.L);
        if (dz) cross_entropy_gradient(z, of, t, g.L, A(1), dz);
      } else if (dz) {
        std::fill(dz, dz + g.L, A(0));
      }
    }
  }

  // K, the gradient of the pair's consistency with respect to the weight of its maps, from d, that with respect to the
  // first view's maps.
  void cam_gradient(int64_t i, const A* d, Workspace& work) {
    A* const d_twin = work.d_twin;
    std::memset(static_cast<void*>(cam_grad[i]), 0, g.L * g.C * sizeof(A));
    std::fill_n(d_twin, maps_size, A(0));
    for (int64_t l = 0; l < g.L; ++l)
      for (int64_t x = 0; x < g.HW; ++x) d_twin[l * pitch + undo.get().index[x]] = -d[l * pitch + x];
    k.correlate(g, features[i], d, cam_grad[i], work.scratch.get());
    k.correlate(g, features[N + i], d_twin, cam_grad[i], work.scratch.get());
  }

  void write_maps(const A* from, A* to) const {
    for (int64_t l = 0; l < g.L; ++l) std::memcpy(to + l * g.HW, from + l * pitch, g.HW * sizeof(A));
  }

  void give(const Tensor& to, const A* losses) const {
    if (options.mean)
      *static_cast<A*>(to.data_ptr()) = mean_of(losses, N);
    else if (N)
      std::memcpy(to.data_ptr(), losses, N * sizeof(A));
  }

  const int64_t M, N = M / 2;
  const Geometry g;
  const Kernels& k;
  const HeadOptions options;
  const Wanted wanted;
  const int64_t pitch = round_up(g.HW, k.lanes), pooled_pitch = round_up(g.C, k.lanes), maps_size = g.L * pitch;
  const PermutationTable undo;
  const Targets<A> targets;
  const PackedWeight<A> weight;
  const Buffer<A> bias;
  const A* const v;
  const Views features;
  const SavedPieces pieces;
  HeadForwardOutputs out;
  const Rows<A> logits{out.logits, g.L}, maps{out.maps, g.L * g.HW};
  A* const saved = out.saved ? static_cast<A*>(out.saved->data_ptr()) : nullptr;
  const Rows<A> map_grad{pieces.in(saved, pieces.map_grad), g.L * g.HW};
  const Rows<A> logit_grad{pieces.in(saved, pieces.logit_grad), g.L}, pooled{pieces.in(saved, pieces.pooled), g.C};
  const Rows<A> cam_grad{pieces.in(saved, pieces.cam_grad), g.L * g.C};
  const Buffer<A> per_sample;
  A *const classification = per_sample.get(), *const consistency = classification + N;
};

HeadForwardOutputs head_forward(const HeadForwardArguments& a) {
  return a.features.scalar_type() == ScalarType::Double ? HeadForward<double>(a).run() : HeadForward<float>(a).run();
}

// The backward of the head: a task computes dF of its pairs, then dW of its share of the channels.
template <typename A>
class HeadBackward {
 public:
  explicit HeadBackward(const HeadBackwardArguments& a)
      : N(a.N), g{a.weight.size(1), a.H * a.W, a.weight.size(0), a.channels_last}, k(kernels(storage_of(a.dtype))),
        consistency_weight(A(a.consistency_weight)), need(a.need), weight_dtype(a.weight.scalar_type()),
        share(a.mean ? A(1) / A(std::max<int64_t>(N, 1)) : A(1)), inverse(k, g, a.twin, a.W, true), d_loss(a.d_loss),
        d_classification(a.d_classification), d_consistency(a.d_consistency),
        d_logits(a.d_logits ? static_cast<const A*>(a.d_logits->data_ptr()) : nullptr),
        saved(static_cast<A*>(a.saved.data_ptr())), map_grad(a.pieces.in(saved, a.pieces.map_grad), g.L * g.HW),
        logit_grad(a.pieces.in(saved, a.pieces.logit_grad), g.L), pooled(a.pieces.in(saved, a.pieces.pooled), g.C),
        cam_grad(a.pieces.in(saved, a.pieces.cam_grad), g.L * g.C), weight(k, g, a.weight, need.features),
        view_bytes(g.C * g.HW * bytes_of(a.dtype)),
        out{feature_output_if(need.features, 2 * N, g.C, a.H, a.W, a.dtype, g.channels_last),
            output_if(need.weight, cpu(), {g.L, g.C}, weight_dtype), output_if(need.bias, cpu(), {g.L}, weight_dtype)},
        d_features(out.features, view_bytes), of_samples(N * (2 * g.L + 1), true) {}

  HeadGradients run() {
    for (int64_t i = 0; i < N; ++i) {
      g_s[i] = (consistency_weight * d_loss[i] + d_consistency[i]) * share;
      if (logit_grad) logits_gradient(i);
    }
    in_parallel(N, [&](int64_t begin, int64_t end) {
      if (need.features) feature_gradients(begin, end);
      if (need.weight) weight_gradient(first_channel(begin), first_channel(end));
    });
    if (need.weight && !N) weight_gradient(0, g.C);
    if (need.bias) bias_gradient();
    return std::move(out);
  }

 private:
  A* dz_of(int64_t m) const { return dz + m * g.L; }

  // dz and dz~ of pair i. Without an upstream gradient its classification takes no part: it may be NaN.
  void logits_gradient(int64_t i) {
    const A g_z = (d_loss[i] + d_classification[i]) * share;
    for (int64_t m : {i, N + i}) {
      A* const to = dz_of(m);
      if (d_loss || d_classification)
        for (int64_t l = 0; l < g.L; ++l) to[l] = g_z * logit_grad[m][l];
      if (d_logits)
        for (int64_t l = 0; l < g.L; ++l) to[l] += d_logits[m * g.L + l];
    }
  }

  // dF and dF~ of the pairs from begin on.
  void feature_gradients(int64_t begin, int64_t end) {
    const typename PackedWeight<A>::OfTask of_task(weight);
    const Buffer<A> d_maps(g.L * pitch, true);  // what stands behind a row is multiplied, too: denormals would be slow
    const Buffer<char> scratch(k.scratch_bytes(g));
    for (int64_t i = begin; i < end; ++i) {
      const A* from = map_grad[i];
      for (int64_t l = 0; l < g.L; ++l)
        for (int64_t x = 0; x < g.HW; ++x) d_maps.get()[l * pitch + x] = g_s[i] * *from++;
      k.pair_gradient(g, inverse.get(), of_task.get(), d_maps.get(), logit_grad ? dz_of(i) : nullptr,
                      logit_grad ? dz_of(N + i) : nullptr, d_features[i], d_features[N + i], streaming, scratch.get());
    }
  }

  // The channels are divided as the pairs are, at cache lines of any dtype: the first that goes with the pairs from i
  // on.
  int64_t first_channel(int64_t i) const {
    constexpr int64_t in_line = kCacheLine / 2;
    return i == N ? g.C : g.C * i / N / in_line * in_line;
  }

  // dW of the channels from begin on: dz^T P of both views, and the sum of K where the CAM is not detached.
  void weight_gradient(int64_t begin, int64_t end) {
    const Buffer<A> sum(g.L * kChannelChunk);
    void* const to = out.weight->data_ptr();  // once: for each element, the call would take longer than the sums
    for (int64_t c0 = begin; c0 < end; c0 += kChannelChunk) {
      const int64_t count = std::min(kChannelChunk, end - c0);
      std::fill_n(sum.get(), g.L * kChannelChunk, A(0));
      if (pooled) k.accumulate(2 * N, g.L, count, dz, g.L, pooled[0] + c0, g.C, sum.get(), kChannelChunk);
      if (cam_grad && (d_loss || d_consistency))
        for (int64_t l = 0; l < g.L; ++l)
          k.accumulate(N, 1, count, g_s, 1, cam_grad[0] + l * g.C + c0, g.L * g.C, sum.get() + l * kChannelChunk,
                       kChannelChunk);
      for (int64_t l = 0; l < g.L; ++l)
        for (int64_t c = 0; c < count; ++c) write(to, weight_dtype, l * g.C + c0 + c, sum.get()[l * kChannelChunk + c]);
    }
  }

  void bias_gradient() {
    for (int64_t l = 0; l < g.L; ++l) {
      A sum = 0;
      for (int64_t m = 0; m < 2 * N; ++m) sum += dz_of(m)[l];
      write(out.bias->data_ptr(), weight_dtype, l, sum);
    }
  }

  const int64_t N;
  const Geometry g;
  const Kernels& k;
  const A consistency_weight;
  const Needed need;
  const ScalarType weight_dtype;
  const int64_t pitch = round_up(g.HW, k.lanes);
  const A share;  // of a sample in the losses
  const PermutationTable inverse;
  const Upstream<A> d_loss, d_classification, d_consistency;
  const A* const d_logits;
  A* const saved;
  const Rows<A> map_grad, logit_grad, pooled, cam_grad;
  const PackedWeight<A> weight;
  const int64_t view_bytes;
  const bool streaming = 2 * N * view_bytes >= kStreamingBytes;
  HeadGradients out;
  const Views d_features;
  const Buffer<A> of_samples;
  A *const dz = of_samples.get(), *const g_s = dz + 2 * N * g.L;  // (2N, L), (N,)
};

HeadGradients head_backward(const HeadBackwardArguments& a) {
  return a.dtype == ScalarType::Double ? HeadBackward<double>(a).run() : HeadBackward<float>(a).run();
}

template <typename A>
Tensor cam_forward_as(const Tensor& features, const Tensor& weight) {
  const int64_t M = features.size(0), C = features.size(1), H = features.size(2), W = features.size(3);
  const int64_t L = weight.size(0), HW = H * W;
  const Geometry g{C, HW, L, is_channels_last(features)};
  const Kernels& k = kernels(storage_of(features.scalar_type()));
  const int64_t pitch = round_up(HW, k.lanes);
  Tensor maps = output(cpu(), {M, L, H, W}, kCompute<A>);
  const PackedWeight<A> packed(k, g, weight);
  const char* f = static_cast<const char*>(features.data_ptr());
  const int64_t view_bytes = C * HW * bytes_of(features.scalar_type());
  in_parallel(M, [&](int64_t begin, int64_t end) {
    const typename PackedWeight<A>::OfTask of_task(packed);
    const Buffer<A> cam(L * pitch);
    const Buffer<char> scratch(k.scratch_bytes(g));
    for (int64_t m = begin; m < end; ++m) {
      k.maps(g, f + m * view_bytes, of_task.get(), cam.get(), scratch.get());
      for (int64_t l = 0; l < L; ++l)
        std::memcpy(static_cast<A*>(maps.data_ptr()) + (m * L + l) * HW, cam.get() + l * pitch, HW * sizeof(A));
    }
  });
  return maps;
}

Tensor cam_forward(Tensor features, Tensor weight) {
  return features.scalar_type() == ScalarType::Double ? cam_forward_as<double>(features, weight)
                                                      : cam_forward_as<float>(features, weight);
}

template <typename A>
std::tuple<Tensor, Tensor> cam_backward_as(const Tensor& d_maps, const Tensor& features, const Tensor& weight,
                                           ScalarType dtype, bool channels_last, bool need_features, bool need_weight) {
  const int64_t M = d_maps.size(0), L = d_maps.size(1), H = d_maps.size(2), W = d_maps.size(3), HW = H * W;
  const int64_t C = weight.size(1);
  const Geometry g{C, HW, L, channels_last};
  const Kernels& k = kernels(storage_of(dtype));
  const int64_t pitch = round_up(HW, k.lanes);
  OptionalTensor d_features = feature_output_if(need_features, M, C, H, W, dtype, channels_last);
  OptionalTensor d_weight = output_if(need_weight, cpu(), {L, C}, weight.scalar_type());
  const PackedWeight<A> packed(k, g, weight, need_features);
  const int64_t view_bytes = C * HW * bytes_of(dtype);
  const bool streaming = M * view_bytes >= kStreamingBytes;
  const Views views(features, view_bytes), gradients(d_features, view_bytes);
  const Rows<const A> upstream(d_maps, HW);
  const Buffer<A> partial(need_weight ? M * L * C : 0, true);
  in_parallel(M, [&](int64_t begin, int64_t end) {
    const typename PackedWeight<A>::OfTask of_task(packed);
    const Buffer<A> d(L * pitch, true);
    const Buffer<char> scratch(k.scratch_bytes(g));
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t l = 0; l < L; ++l) std::memcpy(d.get() + l * pitch, upstream[m * L + l], HW * sizeof(A));
      if (need_features) k.view_gradient(g, of_task.get(), d.get(), gradients[m], streaming, scratch.get());
      if (need_weight) k.correlate(g, views[m], d.get(), partial.get() + m * L * C, scratch.get());
    }
  });
  if (need_weight) {
    void* to = d_weight->data_ptr();
    const ScalarType weight_dtype = weight.scalar_type();
    for (int64_t i = 0; i < L * C; ++i) {
      A sum = 0;
      for (int64_t m = 0; m < M; ++m) sum += partial.get()[m * L * C + i];
      write(to, weight_dtype, i, sum);
    }
  }
  return {or_undefined(d_features), or_undefined(d_weight)};
}

std::tuple<Tensor, Tensor> cam_backward(Tensor d_maps, Tensor features, Tensor weight, ScalarType dtype,
                                        bool channels_last, bool need_features, bool need_weight) {
  auto run = dtype == ScalarType::Double ? cam_backward_as<double> : cam_backward_as<float>;
  return run(dense(d_maps), features, weight, dtype, channels_last, need_features, need_weight);
}

template <typename A>
Tensor cross_entropy_forward_as(const Tensor& logits, const Tensor& targets, const Tensor& table, bool mean) {
  const int64_t M = logits.size(0), L = logits.size(1);
  const auto of_batch = targets_of<A>(targets, table, L);
  const Buffer<A> z = values<A>(logits);
  std::vector<A> losses(M), t(L);
  for (int64_t m = 0; m < M; ++m) {
    write_target_row(of_batch, m, L, t.data());
    const A* const row = z.get() + m * L;
    losses[m] = cross_entropy(row, log_sum_exp(row, L), t.data(), L);
  }
  Tensor out = output(cpu(), mean ? Shape{} : Shape{M}, kCompute<A>);
  if (mean)
    *static_cast<A*>(out.data_ptr()) = mean_of(losses.data(), M);
  else if (M)
    std::memcpy(out.data_ptr(), losses.data(), M * sizeof(A));
  return out;
}

Tensor cross_entropy_forward(Tensor logits, Tensor targets, Tensor target_table, bool mean) {
  auto run =
      logits.scalar_type() == ScalarType::Double ? cross_entropy_forward_as<double> : cross_entropy_forward_as<float>;
  return run(logits, targets, target_table, mean);
}

template <typename A>
Tensor cross_entropy_backward_as(const Tensor& d_loss, const Tensor& logits, const Tensor& targets, const Tensor& table,
                                 bool mean) {
  const int64_t M = logits.size(0), L = logits.size(1);
  const auto of_batch = targets_of<A>(targets, table, L);
  const Buffer<A> z = values<A>(logits);
  const Upstream<A> g{OptionalTensor(d_loss)};
  const ScalarType dtype = logits.scalar_type();
  Tensor out = output(cpu(), {M, L}, dtype);
  void* const to = out.data_ptr();
  std::vector<A> dz(L), t(L);
  for (int64_t m = 0; m < M; ++m) {
    write_target_row(of_batch, m, L, t.data());
    const A* const row = z.get() + m * L;
    cross_entropy_gradient(row, log_sum_exp(row, L), t.data(), L, mean ? g[m] / A(M) : g[m], dz.data());
    for (int64_t l = 0; l < L; ++l) write(to, dtype, m * L + l, dz[l]);
  }
  return out;
}

Tensor cross_entropy_backward(Tensor d_loss, Tensor logits, Tensor targets, Tensor target_table, bool mean) {
  auto run =
      logits.scalar_type() == ScalarType::Double ? cross_entropy_backward_as<double> : cross_entropy_backward_as<float>;
  return run(d_loss, logits, targets, target_table, mean);
}

// A task is one image. Its index is outside [0, K) only in compiled calls, which cannot check it before: NaN.
Tensor paired_views(const Tensor& images, const Tensor& indices, const Tensor& samples,
                    const OptionalTensor& epoch_tensor, int64_t epoch, int64_t seed, const std::vector<int64_t>& size,
                    const std::vector<double>& mean, const std::vector<double>& std,
                    const std::vector<int64_t>& chances, const std::vector<int64_t>& reach,
                    const std::vector<double>& crop, double brightness, double contrast, double noise,
                    const std::vector<double>& erase, int64_t twin_map, bool both, ScalarType dtype) {
  const auto rectangle = [](const std::vector<double>& x) { return Rectangle{float(x[0]), float(x[1]), float(x[2])}; };
  if (epoch_tensor) epoch = *static_cast<const int64_t*>(epoch_tensor->data_ptr());
  const int64_t K = images.size(0), N = indices.size(0), C = images.size(3), H = size[0], W = size[1];
  Tensor out = feature_output(N * (both ? 2 : 1), C, H, W, dtype, true);
  ViewPlan plan{images.size(1),
                images.size(2),
                C,
                H,
                W,
                {},
                {},
                {chances[0], chances[1], chances[2]},
                {reach[0], reach[1]},
                rectangle(crop),
                float(brightness),
                float(contrast),
                float(noise),
                rectangle(erase),
                uint64_t(seed),
                uint32_t(epoch),
                twin_map_on(twin_map, H, W)};
  std::copy(mean.begin(), mean.end(), plan.mean);
  std::copy(std.begin(), std.end(), plan.std);
  const auto* from = static_cast<const uint8_t*>(images.data_ptr());
  const auto* index = static_cast<const int64_t*>(indices.data_ptr());
  const auto* sample = static_cast<const int64_t*>(samples.data_ptr());
  const int64_t view_bytes = H * W * C * bytes_of(dtype);
  const Views views(out, view_bytes);
  const ViewKernels& k = isa().views();
  in_parallel(N, [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(k.scratch_bytes(plan));
    for (int64_t i = begin; i < end; ++i) {
      void* const twin = both ? views[N + i] : nullptr;
      if (index[i] >= 0 && index[i] < K) {
        k.write(plan, storage_of(dtype), from + index[i] * plan.h * plan.w * C, sample[i], views[i], twin,
                scratch.get());
        continue;
      }
      for (int64_t j = 0; j < H * W * C; ++j) write(views[i], dtype, j, NAN);
      if (both) std::memcpy(twin, views[i], view_bytes);
    }
  });
  return out;
}

std::string cpu_isa() { return isa().name; }

}  // namespace
}  // namespace rebalfer

STABLE_TORCH_LIBRARY_IMPL(rebalfer_kernels, CPU, m) {
  m.impl("head_forward_cpu", TORCH_BOX(&rebalfer::head_forward_operator<rebalfer::head_forward>));
  m.impl("head_backward_cpu", TORCH_BOX(&rebalfer::head_backward_operator<rebalfer::head_backward>));
  m.impl("cam_forward_cpu", TORCH_BOX(&rebalfer::cam_forward));
  m.impl("cam_backward_cpu", TORCH_BOX(&rebalfer::cam_backward));
  m.impl("paired_views_cpu", TORCH_BOX(&rebalfer::paired_views));
  m.impl("cross_entropy_forward_cpu", TORCH_BOX(&rebalfer::cross_entropy_forward));
  m.impl("cross_entropy_backward_cpu", TORCH_BOX(&rebalfer::cross_entropy_backward));
}

STABLE_TORCH_LIBRARY_IMPL(rebalfer_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rebalfer::cpu_isa));
}
