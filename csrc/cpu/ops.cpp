// The operators of rebalfer_kernels/ops.py on CPU tensors: what is parallel, what is saved, and PyTorch's stable ABI.
//
// One task is one pair of views, so a sample's results never depend on the batch; sums over the batch are taken in a
// fixed order, by channel, after all pairs are done.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
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

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../head_math.h"
#include "../layout.h"
#include "kernels.h"

namespace rebalfer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kHugePage = 2 << 20;         // bytes
constexpr int64_t kStreamingBytes = 24 << 20;  // gradients from this size on are written past the caches
constexpr int64_t kChannelChunk = 128;  // channels of one task in sums over the batch

struct Isa {
  const char* name;
  const Kernels& (*kernels)(Storage);
};

// The widest instruction set of this CPU, or the one that REBALFER_CPU_ISA names.
const Isa& isa() {
  static const Isa chosen = [] {
    std::vector<Isa> available;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512) available.push_back({"avx512", kernels_avx512});
    if (avx2) available.push_back({"avx2", kernels_avx2});
#endif
    available.push_back({"baseline", kernels_baseline});
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

template <typename A>
constexpr ScalarType kCompute = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// By the C shim, past the dispatcher, which a call would go through for every output.
Tensor empty(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor output(std::vector<int64_t> shape, ScalarType dtype, bool wanted = true) {
  if (!wanted) shape = {0};
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= std::max<int64_t>(shape[i], 1)) strides[i] = step;
  return empty(shape, strides, dtype);
}

// A gradient of the features. A large fresh one costs more in page faults than in stores, so it lies on whole huge pages
// of its own: of a mapping that begins anywhere, the ends would come in small pages.
Tensor feature_output(int64_t M, int64_t C, int64_t H, int64_t W, ScalarType dtype, bool channels_last, bool wanted) {
  if (!wanted) return output({0}, dtype);
  const std::vector<int64_t> shape{M, C, H, W};
  const std::vector<int64_t> strides = channels_last ? std::vector<int64_t>{C * H * W, 1, W * C, C}
                                                     : std::vector<int64_t>{C * H * W, H * W, W, 1};
  const int64_t size = bytes_of(dtype), bytes = M * C * H * W * size;
#if defined(__linux__)
  if (bytes >= kHugePage) {
    const int64_t whole = round_up(bytes, kHugePage);
    Tensor room = output({(whole + kHugePage) / size}, dtype);  // what is never touched never becomes memory
    const int64_t address = reinterpret_cast<int64_t>(room.data_ptr()), begin = round_up(address, kHugePage);
    madvise(reinterpret_cast<void*>(begin), whole, MADV_HUGEPAGE);  // advice: failure changes nothing
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(room.get(), 4, shape.data(), strides.data(),
                                                          (begin - address) / size, &handle));
    return Tensor(handle);
  }
#endif
  return empty(shape, strides, dtype);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Zeroed scratch, aligned to a cache line.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(A) + 127) / 64 * 64;
    data_.reset(static_cast<A*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_.get()), 0, bytes);
  }
  A* get() const { return data_.get(); }

 private:
  std::unique_ptr<A, Free> data_;
};

template <typename A>
Buffer<A> pack(const Kernels& k, Geometry g, const Tensor& weight) {
  Buffer<A> packed(k.packed_size(g));
  k.pack(g, weight.data_ptr(), weight.scalar_type() == kCompute<A>, packed.get());
  return packed;
}

float widened(uint16_t bits, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
  }
  return static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
}

// A small tensor (bias) in the compute type.
template <typename A>
std::vector<A> values(const Tensor& t) {
  std::vector<A> out(t.numel());
  for (size_t i = 0; i < out.size(); ++i) {
    switch (t.scalar_type()) {
      case ScalarType::Double: out[i] = A(static_cast<const double*>(t.data_ptr())[i]); break;
      case ScalarType::Float: out[i] = A(static_cast<const float*>(t.data_ptr())[i]); break;
      default: out[i] = widened(static_cast<const uint16_t*>(t.data_ptr())[i], t.scalar_type());
    }
  }
  return out;
}

template <typename A>
void write(void* out, ScalarType dtype, int64_t i, A x) {
  switch (dtype) {
    case ScalarType::Double: static_cast<double*>(out)[i] = x; break;
    case ScalarType::Float: static_cast<float*>(out)[i] = float(x); break;
    case ScalarType::BFloat16: static_cast<c10::BFloat16*>(out)[i] = c10::BFloat16(float(x)); break;
    default: static_cast<c10::Half*>(out)[i] = c10::Half(float(x));
  }
}

// Target distributions t: a row of the table for a class, targets @ table for a distribution.
template <typename A>
class Targets {
 public:
  Targets(const Tensor& targets, const Tensor& table, int64_t L)
      : L_(L), table_(static_cast<const A*>(table.data_ptr())) {
    if (targets.dim() == 2) {
      soft_ = static_cast<const A*>(targets.data_ptr());
      return;
    }
    classes_ = static_cast<const int64_t*>(targets.data_ptr());
    for (int64_t i = 0; i < targets.size(0); ++i)
      if (classes_[i] < 0 || classes_[i] >= L)
        throw std::out_of_range("targets: got class " + std::to_string(classes_[i]) + ", expected classes in [0, " +
                                std::to_string(L) + ")");
  }
  // The row of sample i; `room` (L) holds it where it must be computed.
  const A* row(int64_t i, A* room) const {
    if (classes_) return table_ + classes_[i] * L_;
    for (int64_t l = 0; l < L_; ++l) {
      A sum = 0;
      for (int64_t y = 0; y < L_; ++y) sum += soft_[i * L_ + y] * table_[y * L_ + l];
      room[l] = sum;
    }
    return room;
  }

 private:
  int64_t L_;
  const A* table_;
  const A* soft_ = nullptr;
  const int64_t* classes_ = nullptr;
};

template <typename A>
A mean_of(const std::vector<A>& x) {  // NaN of nothing, as PyTorch's own losses
  double sum = 0;
  for (A v : x) sum += v;
  return A(sum / double(x.size()));
}

// An upstream gradient: absent, a scalar, or one a sample (of any stride).
template <typename A>
struct Upstream {
  explicit Upstream(const OptionalTensor& t) {
    if (!t) return;
    data = static_cast<const A*>(t->data_ptr());
    stride = t->dim() ? t->stride(0) : 0;
  }
  A operator[](int64_t i) const { return data ? data[i * stride] : A(0); }
  const A* data = nullptr;
  int64_t stride = 0;
};

// A spatial map and, if wanted, its inverse as the kernels read them.
class TwinTables {
 public:
  TwinTables(const Kernels& k, TwinMap map, int64_t H, int64_t W, bool inverse) : index_(H * W) {
    const int64_t HW = H * W, lanes = k.lanes;
    for (int64_t h = 0; h < H; ++h)
      for (int64_t w = 0; w < W; ++w) {
        const int64_t from = twin_index(map, h, w), to = h * W + w;
        index_[inverse ? from : to] = int32_t(inverse ? to : from);
      }
    if (!k.permutes) return;
    const int64_t vectors = (HW + lanes - 1) / lanes;
    base_.resize(vectors);
    lanes_.resize(vectors * lanes);
    for (int64_t t = 0; t < vectors; ++t) {
      const auto begin = index_.begin() + t * lanes, end = index_.begin() + std::min(HW, (t + 1) * lanes);
      const auto [low, high] = std::minmax_element(begin, end);
      fits_ = fits_ && *high - *low < 2 * lanes;
      base_[t] = *low;
      for (auto x = begin; x != end; ++x) lanes_[x - index_.begin()] = *x - *low;
    }
  }
  Twin get() const { return {index_.data(), fits_ && !base_.empty() ? base_.data() : nullptr, lanes_.data()}; }

 private:
  std::vector<int32_t> index_, base_, lanes_;
  bool fits_ = true;
};

// g dS, in rows `pitch` apart; those of the residual are residual_pitch apart.
template <typename A>
void residual_gradient(int64_t L, int64_t HW, const A* residual, int64_t residual_pitch, const A* v, int p, A g,
                       A* d_residual, int64_t pitch) {
  const A scale = g / A(L * HW);
  for (int64_t l = 0; l < L; ++l)
    for (int64_t x = 0; x < HW; ++x)
      d_residual[l * pitch + x] = scale * consistency_gradient(v[l], residual[l * residual_pitch + x], p);
}

using HeadForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
HeadForward head_forward_as(const Tensor& features, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& targets, const OptionalTensor& target_table,
                            const Tensor& map_weights, double consistency_weight, int p, TwinMap twin, bool both_views,
                            bool mean, bool with_maps, bool save_residual, bool save_pooled, bool save_cam_grad) {
  const int64_t M = features.size(0), N = M / 2, C = features.size(1), H = features.size(2), W = features.size(3);
  const int64_t L = weight.size(0), HW = H * W;
  const Geometry g{C, HW, L, is_channels_last(features)};
  const Kernels& k = kernels(storage_of(features.scalar_type()));
  const TwinTables tables(k, twin, H, W, false);
  const int64_t pitch = round_up(HW, k.lanes), row = round_up(C, k.lanes), cams = L * pitch;
  const bool classified = targets.has_value();
  const ScalarType dtype = kCompute<A>;
  std::optional<Targets<A>> target_rows;
  if (classified) target_rows.emplace(*targets, *target_table, L);

  const std::vector<int64_t> losses = mean ? std::vector<int64_t>{} : std::vector<int64_t>{N};
  Tensor loss = output(losses, dtype, classified), classification = output(losses, dtype, classified);
  Tensor consistency = output(losses, dtype), logits = output({M, L}, dtype, classified);
  Tensor maps = output({M, L, H, W}, dtype, with_maps);
  Tensor residual = output({N, L, H, W}, dtype, save_residual);
  Tensor pooled = output({M, C}, dtype, save_pooled);
  Tensor cam_grad = output({N, L, C}, dtype, save_cam_grad);

  const auto packed = pack<A>(k, g, weight);
  const std::vector<A> b = bias ? values<A>(*bias) : std::vector<A>();
  const A* v = static_cast<const A*>(map_weights.data_ptr());
  const char* f = static_cast<const char*>(features.data_ptr());
  const int64_t view_bytes = C * HW * bytes_of(features.scalar_type());
  std::vector<A> cls(N), cons(N);

  torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> s(cams), pool(2 * row), z(2 * L), t(L), cam(with_maps ? cams : 0), d(save_cam_grad ? 2 * cams : 0);
    Buffer<char> scratch(k.scratch_bytes(g));
    for (int64_t i = begin; i < end; ++i) {
      const char* views[2] = {f + i * view_bytes, f + (N + i) * view_bytes};
      k.residual(g, tables.get(), views[0], views[1], packed.get(), s.get(), pool.get(), pool.get() + row,
                 scratch.get());
      for (int64_t view = 0; view < 2; ++view) {
        const int64_t m = view * N + i;
        const A* pool_view = pool.get() + view * row;
        if (save_pooled) std::memcpy(static_cast<A*>(pooled.data_ptr()) + m * C, pool_view, C * sizeof(A));
        if (classified) {
          k.logits(g, packed.get(), pool_view, b.empty() ? nullptr : b.data(), z.get() + view * L);
          std::memcpy(static_cast<A*>(logits.data_ptr()) + m * L, z.get() + view * L, L * sizeof(A));
        }
        if (with_maps) {
          k.maps(g, views[view], packed.get(), cam.get(), scratch.get());
          for (int64_t l = 0; l < L; ++l)
            std::memcpy(static_cast<A*>(maps.data_ptr()) + (m * L + l) * HW, cam.get() + l * pitch, HW * sizeof(A));
        }
      }
      A sum = 0;
      for (int64_t l = 0; l < L; ++l) {
        const A* row_s = s.get() + l * pitch;
        A of_class = 0;
        for (int64_t x = 0; x < HW; ++x) of_class += consistency_term(v[l], row_s[x], p);
        sum += of_class;
        if (save_residual)
          std::memcpy(static_cast<A*>(residual.data_ptr()) + (i * L + l) * HW, row_s, HW * sizeof(A));
      }
      cons[i] = sum / A(L * HW);
      if (classified) {
        const A* row_t = target_rows->row(i, t.get());
        cls[i] = cross_entropy(z.get(), row_t, L) + (both_views ? cross_entropy(z.get() + L, row_t, L) : A(0));
      }
      if (save_cam_grad) {
        A *out = static_cast<A*>(cam_grad.data_ptr()) + i * L * C, *d_twin = d.get() + cams;
        std::memset(static_cast<void*>(out), 0, L * C * sizeof(A));
        residual_gradient(L, HW, s.get(), pitch, v, p, A(1), d.get(), pitch);
        for (int64_t l = 0; l < L; ++l)
          for (int64_t x = 0; x < HW; ++x) d_twin[l * pitch + tables.get().index[x]] = -d.get()[l * pitch + x];
        k.correlate(g, views[0], d.get(), out, scratch.get());
        k.correlate(g, views[1], d_twin, out, scratch.get());
      }
    }
  });

  auto give = [&](Tensor& to, const std::vector<A>& from) {
    if (mean)
      *static_cast<A*>(to.data_ptr()) = mean_of(from);
    else if (N)
      std::memcpy(to.data_ptr(), from.data(), N * sizeof(A));
  };
  give(consistency, cons);
  if (classified) {
    give(classification, cls);
    for (int64_t i = 0; i < N; ++i) cls[i] += A(consistency_weight) * cons[i];
    give(loss, cls);
  }
  return {loss, classification, consistency, logits, maps, residual, pooled, cam_grad};
}

HeadForward head_forward(Tensor features, Tensor weight, OptionalTensor bias, OptionalTensor targets,
                         OptionalTensor target_table, Tensor map_weights, double consistency_weight, int64_t p,
                         std::vector<int64_t> twin_map, bool both_views, bool mean, bool with_maps, bool save_residual,
                         bool save_pooled, bool save_cam_grad) {
  auto run = features.scalar_type() == ScalarType::Double ? head_forward_as<double> : head_forward_as<float>;
  return run(features, weight, bias, targets, target_table, map_weights, consistency_weight, int(p),
             twin_map_on(twin_map, features.size(2), features.size(3)), both_views, mean, with_maps, save_residual, save_pooled, save_cam_grad);
}

using HeadBackward = std::tuple<Tensor, Tensor, Tensor>;

template <typename A>
HeadBackward head_backward_as(const OptionalTensor& d_loss, const OptionalTensor& d_classification,
                              const OptionalTensor& d_consistency, const OptionalTensor& d_logits, const Tensor& weight,
                              const OptionalTensor& targets, const OptionalTensor& target_table,
                              const Tensor& map_weights, const Tensor& logits, const Tensor& residual,
                              const Tensor& pooled, const Tensor& cam_grad, double consistency_weight, int p,
                              TwinMap twin, bool both_views, bool mean, ScalarType dtype, bool channels_last,
                              bool need_features, bool need_weight, bool need_bias) {
  const int64_t N = residual.size(0), M = 2 * N, L = weight.size(0), C = weight.size(1);
  const int64_t H = residual.size(2), W = residual.size(3), HW = H * W;
  const Geometry g{C, HW, L, channels_last};
  const Kernels& k = kernels(storage_of(dtype));
  const TwinTables inverse(k, twin, H, W, true);
  const int64_t pitch = round_up(HW, k.lanes);
  const bool classified = targets.has_value();
  std::optional<Targets<A>> target_rows;
  if (classified) target_rows.emplace(*targets, *target_table, L);

  Tensor d_features = feature_output(M, C, H, W, dtype, channels_last, need_features);
  Tensor d_weight = output({L, C}, weight.scalar_type(), need_weight);
  Tensor d_bias = output({L}, weight.scalar_type(), need_bias);

  const Upstream<A> g_loss(d_loss), g_cls(d_classification), g_cons(d_consistency);
  const A share = mean ? A(1) / A(std::max<int64_t>(N, 1)) : A(1);
  const A* z = classified ? static_cast<const A*>(logits.data_ptr()) : nullptr;
  const A* g_logits = d_logits ? static_cast<const A*>(d_logits->data_ptr()) : nullptr;
  const A* s = static_cast<const A*>(residual.data_ptr());
  const A* v = static_cast<const A*>(map_weights.data_ptr());
  const auto packed = need_features ? pack<A>(k, g, weight) : Buffer<A>(0);
  const int64_t view_bytes = C * HW * bytes_of(dtype);
  const bool streaming = M * view_bytes >= kStreamingBytes;
  char* out = static_cast<char*>(d_features.data_ptr());
  Buffer<A> dz(M * L);
  std::vector<A> g_s(N);

  torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> d(L * pitch), t(L);
    Buffer<char> scratch(k.scratch_bytes(g));
    for (int64_t i = begin; i < end; ++i) {
      g_s[i] = (A(consistency_weight) * g_loss[i] + g_cons[i]) * share;
      A* dz_view[2] = {dz.get() + i * L, dz.get() + (N + i) * L};
      if (classified) {
        const A g_z = (g_loss[i] + g_cls[i]) * share;
        const A* row_t = target_rows->row(i, t.get());
        cross_entropy_gradient(z + i * L, row_t, L, g_z, dz_view[0]);
        if (both_views) cross_entropy_gradient(z + (N + i) * L, row_t, L, g_z, dz_view[1]);
        if (g_logits)
          for (int64_t l = 0; l < L; ++l) {
            dz_view[0][l] += g_logits[i * L + l];
            dz_view[1][l] += g_logits[(N + i) * L + l];
          }
      }
      if (!need_features) continue;
      residual_gradient(L, HW, s + i * L * HW, HW, v, p, g_s[i], d.get(), pitch);
      k.spread_pair(g, inverse.get(), packed.get(), d.get(), classified ? dz_view[0] : nullptr,
                    classified ? dz_view[1] : nullptr, out + i * view_bytes, out + (N + i) * view_bytes, streaming,
                    scratch.get());
    }
  });

  const ScalarType weight_dtype = weight.scalar_type();
  if (need_weight) {
    void* to = d_weight.data_ptr();
    const A* P = pooled.numel() ? static_cast<const A*>(pooled.data_ptr()) : nullptr;
    const A* K = cam_grad.numel() ? static_cast<const A*>(cam_grad.data_ptr()) : nullptr;
    const int64_t chunks = (C + kChannelChunk - 1) / kChannelChunk;
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> sum(L * kChannelChunk);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t c0 = chunk * kChannelChunk, here = std::min(kChannelChunk, C - c0);
        std::fill(sum.get(), sum.get() + L * kChannelChunk, A(0));
        if (classified && P) k.accumulate(M, L, here, dz.get(), L, P + c0, C, sum.get(), kChannelChunk);
        if (K && (g_loss.data || g_cons.data))
          for (int64_t l = 0; l < L; ++l)
            k.accumulate(N, 1, here, g_s.data(), 1, K + l * C + c0, L * C, sum.get() + l * kChannelChunk, kChannelChunk);
        for (int64_t l = 0; l < L; ++l)
          for (int64_t c = 0; c < here; ++c)
            write(to, weight_dtype, l * C + c0 + c, sum.get()[l * kChannelChunk + c]);
      }
    });
  }
  if (need_bias)
    for (int64_t l = 0; l < L; ++l) {
      A sum = 0;
      for (int64_t m = 0; m < M; ++m) sum += dz.get()[m * L + l];
      write(d_bias.data_ptr(), weight_dtype, l, sum);
    }
  return {d_features, d_weight, d_bias};
}

HeadBackward head_backward(OptionalTensor d_loss, OptionalTensor d_classification, OptionalTensor d_consistency,
                           OptionalTensor d_logits, Tensor weight, OptionalTensor targets, OptionalTensor target_table,
                           Tensor map_weights, Tensor logits, Tensor residual, Tensor pooled, Tensor cam_grad,
                           double consistency_weight, int64_t p, std::vector<int64_t> twin_map, bool both_views,
                           bool mean, ScalarType dtype, bool channels_last, bool need_features, bool need_weight,
                           bool need_bias) {
  auto run = dtype == ScalarType::Double ? head_backward_as<double> : head_backward_as<float>;
  return run(d_loss, d_classification, d_consistency, d_logits, weight, targets, target_table, map_weights, logits,
             residual, pooled, cam_grad, consistency_weight, int(p),
             twin_map_on(twin_map, residual.size(2), residual.size(3)), both_views, mean, dtype,
             channels_last, need_features, need_weight, need_bias);
}

template <typename A>
Tensor cam_forward_as(const Tensor& features, const Tensor& weight) {
  const int64_t M = features.size(0), C = features.size(1), H = features.size(2), W = features.size(3);
  const int64_t L = weight.size(0), HW = H * W;
  const Geometry g{C, HW, L, is_channels_last(features)};
  const Kernels& k = kernels(storage_of(features.scalar_type()));
  const int64_t pitch = round_up(HW, k.lanes);
  Tensor maps = output({M, L, H, W}, kCompute<A>);
  const auto packed = pack<A>(k, g, weight);
  const char* f = static_cast<const char*>(features.data_ptr());
  const int64_t view_bytes = C * HW * bytes_of(features.scalar_type());
  torch::stable::parallel_for(0, M, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> cam(L * pitch);
    Buffer<char> scratch(k.scratch_bytes(g));
    for (int64_t m = begin; m < end; ++m) {
      k.maps(g, f + m * view_bytes, packed.get(), cam.get(), scratch.get());
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
  Tensor d_features = feature_output(M, C, H, W, dtype, channels_last, need_features);
  Tensor d_weight = output({L, C}, weight.scalar_type(), need_weight);
  const auto packed = need_features ? pack<A>(k, g, weight) : Buffer<A>(0);
  const int64_t view_bytes = C * HW * bytes_of(dtype);
  const bool streaming = M * view_bytes >= kStreamingBytes;
  Buffer<A> partial(need_weight ? M * L * C : 0);
  torch::stable::parallel_for(0, M, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> d(L * pitch);
    Buffer<char> scratch(k.scratch_bytes(g));
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t l = 0; l < L; ++l)
        std::memcpy(d.get() + l * pitch, static_cast<const A*>(d_maps.data_ptr()) + (m * L + l) * HW, HW * sizeof(A));
      if (need_features)
        k.spread(g, packed.get(), d.get(), static_cast<char*>(d_features.data_ptr()) + m * view_bytes,
                 streaming, scratch.get());
      if (need_weight)
        k.correlate(g, static_cast<const char*>(features.data_ptr()) + m * view_bytes, d.get(),
                    partial.get() + m * L * C, scratch.get());
    }
  });
  if (need_weight) {
    void* to = d_weight.data_ptr();
    const ScalarType weight_dtype = weight.scalar_type();
    for (int64_t i = 0; i < L * C; ++i) {
      A sum = 0;
      for (int64_t m = 0; m < M; ++m) sum += partial.get()[m * L * C + i];
      write(to, weight_dtype, i, sum);
    }
  }
  return {d_features, d_weight};
}

std::tuple<Tensor, Tensor> cam_backward(Tensor d_maps, Tensor features, Tensor weight, ScalarType dtype,
                                        bool channels_last, bool need_features, bool need_weight) {
  auto run = dtype == ScalarType::Double ? cam_backward_as<double> : cam_backward_as<float>;
  return run(d_maps, features, weight, dtype, channels_last, need_features, need_weight);
}

template <typename A>
Tensor cross_entropy_forward_as(const Tensor& logits, const Tensor& targets, const Tensor& table, bool mean) {
  const int64_t M = logits.size(0), L = logits.size(1);
  const Targets<A> rows(targets, table, L);
  const std::vector<A> z = values<A>(logits);
  std::vector<A> losses(M), room(L);
  for (int64_t m = 0; m < M; ++m) losses[m] = cross_entropy(z.data() + m * L, rows.row(m, room.data()), L);
  Tensor out = output(mean ? std::vector<int64_t>{} : std::vector<int64_t>{M}, kCompute<A>);
  if (mean)
    *static_cast<A*>(out.data_ptr()) = mean_of(losses);
  else if (M)
    std::memcpy(out.data_ptr(), losses.data(), M * sizeof(A));
  return out;
}

Tensor cross_entropy_forward(Tensor logits, Tensor targets, Tensor target_table, bool mean) {
  auto run = logits.scalar_type() == ScalarType::Double ? cross_entropy_forward_as<double> : cross_entropy_forward_as<float>;
  return run(logits, targets, target_table, mean);
}

template <typename A>
Tensor cross_entropy_backward_as(const Tensor& d_loss, const Tensor& logits, const Tensor& targets, const Tensor& table,
                                 bool mean) {
  const int64_t M = logits.size(0), L = logits.size(1);
  const Targets<A> rows(targets, table, L);
  const std::vector<A> z = values<A>(logits);
  const Upstream<A> g{OptionalTensor(d_loss)};
  Tensor out = output({M, L}, logits.scalar_type());
  std::vector<A> dz(L), room(L);
  for (int64_t m = 0; m < M; ++m) {
    std::fill(dz.begin(), dz.end(), A(0));
    cross_entropy_gradient(z.data() + m * L, rows.row(m, room.data()), L, mean ? g[m] / A(M) : g[m], dz.data());
    for (int64_t l = 0; l < L; ++l) write(out.data_ptr(), logits.scalar_type(), m * L + l, dz[l]);
  }
  return out;
}

Tensor cross_entropy_backward(Tensor d_loss, Tensor logits, Tensor targets, Tensor target_table, bool mean) {
  auto run =
      logits.scalar_type() == ScalarType::Double ? cross_entropy_backward_as<double> : cross_entropy_backward_as<float>;
  return run(d_loss, logits, targets, target_table, mean);
}

std::string cpu_isa() { return isa().name; }

}  // namespace
}  // namespace rebalfer

STABLE_TORCH_LIBRARY_IMPL(rebalfer_kernels, CPU, m) {
  m.impl("head_forward_cpu", TORCH_BOX(&rebalfer::head_forward));
  m.impl("head_backward_cpu", TORCH_BOX(&rebalfer::head_backward));
  m.impl("cam_forward_cpu", TORCH_BOX(&rebalfer::cam_forward));
  m.impl("cam_backward_cpu", TORCH_BOX(&rebalfer::cam_backward));
  m.impl("cross_entropy_forward_cpu", TORCH_BOX(&rebalfer::cross_entropy_forward));
  m.impl("cross_entropy_backward_cpu", TORCH_BOX(&rebalfer::cross_entropy_backward));
}

STABLE_TORCH_LIBRARY_IMPL(rebalfer_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rebalfer::cpu_isa));
}
