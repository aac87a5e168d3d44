// The backward kernel: all gradients of the head in one launch that, for the features', writes only.
//
// The first blocks of the grid compute the gradients of weight and bias, 32 channels each, over the whole batch in a
// fixed order; every such block recomputes the gradient of all logits, which is cheaper than a second launch. The other
// blocks write the features' gradients, 128 channels of a pair each: U = W^T dS is computed once and written to both
// views, dF = U + W^T dz / (H W) and, where the twin's index says, dF~ = -U + W^T dz~ / (H W).
//
// 16-bit features: U by mma.m16n8k16 with 16 positions as rows, 8 channels as columns and as K 8 classes twice, once
// for the weight's high and once for its low parts; dS is split too and needs a second mma. Both operands are ours, so
// they are bfloat16 whatever the features are: float16 would lose gradients of 1 / (N L H W) to its few exponents.
// float32 features: IEEE FMAs. channels_last: the columns of four mma are the 8 channels of a lane's 16-byte store;
// NCHW: the block's channels are laid out in shared memory and leave in 16-byte stores.
#pragma once

#include "kernels_common.cuh"

namespace rebalfer::gpu {

constexpr int kGroup = 32;                       // channels that a warp works on at a time
constexpr int kBlockChannels = kWarps * kGroup;  // of a block that writes the features' gradients
constexpr int kWeightChannels = 32;              // of a block of the weight's gradient: a lane each
constexpr int kWeightRows = 128;                 // samples whose dz such a block holds at a time
constexpr int kRow = kMaxClasses + 1;            // their pitch: odd, so that rows hit different banks

__device__ __forceinline__ float upstream(const Upstream& u, int64_t i) {
  return u.data ? __ldg(u.data + i * u.stride) : 0;
}

// The upstream gradient of a sample's consistency, in units of its sum over samples.
__device__ __forceinline__ float consistency_upstream(const BackwardParams& p, int64_t i) {
  return p.d_maps ? 1.0f : (p.consistency_weight * upstream(p.d_loss, i) + upstream(p.d_consistency, i)) * p.share;
}

// dz of row m (view by view) of the logits.
__device__ __forceinline__ void logit_gradient(const BackwardParams& p, int64_t m, float* dz) {
  const int L = p.g.L;
  const int64_t i = m < p.g.N ? m : m - p.g.N;
  REBALFER_ROLLED
  for (int l = 0; l < L; ++l) dz[l] = p.d_logits ? p.d_logits[m * L + l] : 0.0f;
  if ((p.d_loss.data || p.d_classification.data) && (m < p.g.N || p.both_views)) {
    const float g = (upstream(p.d_loss, i) + upstream(p.d_classification, i)) * p.share;
    cross_entropy_gradient(p.logits + m * L, target_row(p.targets, i, L), L, g, dz);
  }
}

template <typename T>
__device__ __forceinline__ void store_parameter(void* to, bool is_float, int64_t i, float x) {
  if (sizeof(T) == 4 || is_float) {
    static_cast<float*>(to)[i] = x;
  } else {
    static_cast<T*>(to)[i] = from_float<T>(x);
  }
}

struct WeightShared {
  float dz[kWeightRows][kRow];
  float sums[kWarps][kMaxClasses][32];
};

// dW = sum_m dz_m P_m + sum_i g_S,i K_i for 32 channels, each warp every fourth sample; the first block also db.
template <typename T, int kClasses>
__device__ void parameter_gradients(const BackwardParams& p, int block, WeightShared& shared) {
  const int L = p.g.L, C = p.g.C, lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = block * kWeightChannels + lane;
  const bool classified = p.targets.table, with_bias = p.d_bias && block == 0;
  float acc[kClasses] = {}, bias[(kClasses + kWarps - 1) / kWarps] = {};
  const int64_t M = classified && (p.pooled || with_bias) ? 2 * p.g.N : 0;
  for (int64_t m0 = 0; m0 < M; m0 += kWeightRows) {
    __syncthreads();
    const int rows = int(min(int64_t(kWeightRows), M - m0));
    if (int(threadIdx.x) < rows) logit_gradient(p, m0 + threadIdx.x, shared.dz[threadIdx.x]);
    __syncthreads();
    if (p.d_weight && p.pooled && c < C) {
      const float* pooled = p.pooled + m0 * C + c;
#pragma unroll 4
      for (int r = warp; r < rows; r += kWarps) {
        const float x = __ldg(pooled + int64_t(r) * C);
#pragma unroll
        for (int l = 0; l < kClasses; ++l)
          if (l < L) acc[l] = fmaf(shared.dz[r][l], x, acc[l]);
      }
    }
    if (with_bias) {
#pragma unroll
      for (int k = 0; k < kClasses / kWarps; ++k) REBALFER_ROLLED
      for (int r = lane; r < rows; r += 32)
        if (k * kWarps + warp < L) bias[k] += shared.dz[r][k * kWarps + warp];
    }
  }
  if (with_bias) {
#pragma unroll
    for (int k = 0; k < kClasses / kWarps; ++k) {
      const float sum = warp_sum(bias[k]);
      if (lane == 0 && k * kWarps + warp < L) store_parameter<T>(p.d_bias, p.weight.is_float, k * kWarps + warp, sum);
    }
  }
  if (!p.d_weight) return;
  if (p.cam_grad && (p.d_maps || p.d_loss.data || p.d_consistency.data) && c < C) {
#pragma unroll(16 / kClasses)
    for (int64_t i = warp; i < p.g.N; i += kWarps) {
      const float g = consistency_upstream(p, i);
      const float* K = p.cam_grad + i * L * C + c;
#pragma unroll
      for (int l = 0; l < kClasses; ++l)
        if (l < L) acc[l] = fmaf(g, __ldg(K + int64_t(l) * C), acc[l]);
    }
  }
#pragma unroll
  for (int l = 0; l < kClasses; ++l) shared.sums[warp][l][lane] = acc[l];
  __syncthreads();
  REBALFER_ROLLED
  for (int l = warp; l < L; l += kWarps) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][l][lane];
    if (c < C) store_parameter<T>(p.d_weight, p.weight.is_float, int64_t(l) * C + c, sum);
  }
}

template <typename T, bool kChannelsLast, int kBlocks>
struct FeatureGradient {
  static constexpr int kSlots = 16 / sizeof(T);
  static constexpr int kClasses = 8 * kBlocks;
  static constexpr bool kTensorCore = sizeof(T) == 2;
  static constexpr int kWeightPitch = kBlockChannels + 8;

  // dS and the weight of the block's channels, in the form the arithmetic needs.
  struct MmaOperands {
    uint32_t d_high[kBlocks][kMaxPositions][4], d_low[kBlocks][kMaxPositions][4];  // classes 2 q, 2 q + 1
    uint32_t w_high[4 * kBlocks][kWeightPitch], w_low[4 * kBlocks][kWeightPitch];
  };
  struct FmaOperands {
    float d[kMaxPositions][kClasses];
    float w[kBlockChannels][kClasses];
  };
  struct Shared {
    float dz[2][kMaxClasses];
    float constant[2][kBlockChannels];  // W^T dz / (H W)
    int twin[kMaxPositions];
    alignas(16) std::conditional_t<kTensorCore, MmaOperands, FmaOperands> operands;
  };
  static __host__ __device__ int64_t stage_offset() { return (sizeof(Shared) + 127) / 128 * 128; }

  const BackwardParams& p;
  const Weights<T> weights;
  Shared& shared;
  T* const stage;  // NCHW: (views, channels of the block, H W)
  const int64_t pair;
  const int c0, here, HW, views, lane, warp, group, quarter;
  T *const out, *const out_twin;  // gradients of the two views

  __device__ FeatureGradient(const BackwardParams& p, int64_t pair, int c0, unsigned char* memory)
      : p(p), weights(p.weight, p.g.L, p.g.C), shared(*reinterpret_cast<Shared*>(memory)),
        stage(reinterpret_cast<T*>(memory + stage_offset())), pair(pair), c0(c0), here(min(kBlockChannels, p.g.C - c0)),
        HW(p.g.H * p.g.W), views(p.g.views), lane(threadIdx.x % 32), warp(threadIdx.x / 32), group(lane / 4),
        quarter(lane % 4), out(static_cast<T*>(p.d_features) + pair * p.g.C * HW), out_twin(out + p.g.N * p.g.C * HW) {}

  // dS, with the upstream.
  __device__ __forceinline__ float d_map(float g, int l, int x) const {
    if (l >= p.g.L || x >= HW) return 0;
    const int64_t i = (pair * p.g.L + l) * HW + x;
    return p.d_maps ? __ldg(p.d_maps + i)
                    : g * consistency_gradient(__ldg(p.map_weights + l), __ldg(p.residual + i), p.p);
  }

  __device__ __forceinline__ void prepare() const {
    if (views == 2) fill_twin_table(p.g, shared.twin);
    const bool classified = p.targets.table;
    if (lane == 0 && warp < 2) {
      if (classified) {
        logit_gradient(p, warp * p.g.N + pair, shared.dz[warp]);
      } else {
        for (int l = 0; l < p.g.L; ++l) shared.dz[warp][l] = 0;
      }
    }
    const float g = consistency_upstream(p, pair) / float(p.g.L * HW);
    for (int e = threadIdx.x; e < kMaxPositions * kClasses / 2; e += kThreads) {
      const int x = e % kMaxPositions, q = e / kMaxPositions;
      const float d0 = d_map(g, 2 * q, x), d1 = d_map(g, 2 * q + 1, x);
      if constexpr (kTensorCore) {
        split2<BFloat16>(d0, d1, shared.operands.d_high[q / 4][x][q % 4], shared.operands.d_low[q / 4][x][q % 4]);
      } else {
        shared.operands.d[x][2 * q] = d0, shared.operands.d[x][2 * q + 1] = d1;
      }
    }
    __syncthreads();
    const int c = threadIdx.x;  // of the block's channels
    float sum = 0, sum_twin = 0;
#pragma unroll
    for (int q = 0; q < kClasses / 2; ++q) {
      const float w0 = weights.at(2 * q, c0 + c), w1 = weights.at(2 * q + 1, c0 + c);
      if constexpr (kTensorCore) {
        split2<BFloat16>(w0, w1, shared.operands.w_high[q][c], shared.operands.w_low[q][c]);
      } else {
        shared.operands.w[c][2 * q] = w0, shared.operands.w[c][2 * q + 1] = w1;
      }
      if (2 * q < p.g.L) sum = fmaf(w0, shared.dz[0][2 * q], sum), sum_twin = fmaf(w0, shared.dz[1][2 * q], sum_twin);
      if (2 * q + 1 < p.g.L)
        sum = fmaf(w1, shared.dz[0][2 * q + 1], sum), sum_twin = fmaf(w1, shared.dz[1][2 * q + 1], sum_twin);
    }
    shared.constant[0][c] = sum / float(HW);
    shared.constant[1][c] = sum_twin / float(HW);
    __syncthreads();
  }

  // kSlots consecutive channels from c on, relative to the block's, at position x; channels_last.
  __device__ __forceinline__ void store(T* view, int x, int c, const float (&u)[kSlots]) const {
    if (c >= here) return;
    T* to = view + int64_t(x) * p.g.C + c0 + c;
    if (p.g.C % kSlots == 0) return store_16B_streaming(to, pack<T>(u));
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (c + i < here) to[i] = from_float<T>(u[i]);
  }

  // U at position x, for channels `channel(i)`, to both views.
  template <int n, typename Channel>
  __device__ __forceinline__ void emit(int x, const float (&u)[n], const float (&k)[2][n],
                                       const Channel& channel) const {
    if constexpr (kChannelsLast) {
      float v[n];
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] = u[i] + k[0][i];
      store(out, x, channel(0), v);
      if (views == 1) return;
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] = k[1][i] - u[i];
      store(out_twin, shared.twin[x], channel(0), v);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        T* to = stage + channel(i) * HW;
        to[x] = from_float<T>(u[i] + k[0][i]);
        if (views == 2) to[kBlockChannels * HW + shared.twin[x]] = from_float<T>(k[1][i] - u[i]);
      }
    }
  }

  __device__ __forceinline__ void by_mma() const {
    // Column n of the q-th of four mma is channel 8 (n / 2) + 2 q + n % 2 of channels_last, so that a lane holds 8
    // consecutive ones, or n / 2 + 4 (n % 2) + 8 q of NCHW, so that its lanes' stores hit different banks.
    const auto channel = [&](int q, int n) {
      return warp * kGroup + (kChannelsLast ? 8 * (n / 2) + 2 * q + n % 2 : n / 2 + 4 * (n % 2) + 8 * q);
    };
    const auto own = [&](int i) { return channel(i / 2, 2 * quarter + i % 2); };
    uint32_t w[kBlocks][4][2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        w[b][q][0] = shared.operands.w_high[4 * b + quarter][channel(q, group)];
        w[b][q][1] = shared.operands.w_low[4 * b + quarter][channel(q, group)];
      }
    float k[2][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) k[0][i] = shared.constant[0][own(i)], k[1][i] = shared.constant[1][own(i)];
    REBALFER_ROLLED
    for (int x0 = 0; x0 < HW; x0 += 16) {
      float d[4][4] = {};
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const auto &high = shared.operands.d_high[b], &low = shared.operands.d_low[b];
        const uint32_t h0 = high[x0 + group][quarter], h1 = high[x0 + group + 8][quarter];
        const uint32_t l0 = low[x0 + group][quarter], l1 = low[x0 + group + 8][quarter];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          mma_m16n8k16<BFloat16>(d[q], {h0, h1, h0, h1}, w[b][q]);
          mma_m16n8k16<BFloat16>(d[q], {l0, l1, l0, l1}, w[b][q]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int x = x0 + group + 8 * half;
        if (x >= HW) continue;
        float u[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) u[i] = d[i / 2][2 * half + i % 2];
        emit(x, u, k, own);
      }
    }
  }

  // channels_last: a lane holds the weight of 4 channels and walks over positions.
  __device__ __forceinline__ void by_fma_over_positions() const {
    const int c = 4 * lane;
    const auto own = [&](int i) { return c + i; };
    float w[kClasses][4], k[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      k[0][i] = shared.constant[0][c + i], k[1][i] = shared.constant[1][c + i];
#pragma unroll
      for (int l = 0; l < kClasses; ++l) w[l][i] = shared.operands.w[c + i][l];
    }
    REBALFER_ROLLED
    for (int x = warp; x < HW; x += kWarps) {
      float u[4] = {};
#pragma unroll
      for (int l = 0; l < kClasses; ++l)
#pragma unroll
        for (int i = 0; i < 4; ++i) u[i] = fmaf(w[l][i], shared.operands.d[x][l], u[i]);
      emit(x, u, k, own);
    }
  }

  // NCHW: a lane holds dS of two positions and walks over channels.
  __device__ __forceinline__ void by_fma_over_channels() const {
    float d[2][kClasses];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int l = 0; l < kClasses; ++l) d[half][l] = shared.operands.d[lane + 32 * half][l];
#pragma unroll 2
    for (int c = warp; c < here; c += kWarps) {
      const float k[2][1] = {{shared.constant[0][c]}, {shared.constant[1][c]}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lane + 32 * half >= HW) break;
        float u[1] = {};
#pragma unroll
        for (int l = 0; l < kClasses; ++l) u[0] = fmaf(shared.operands.w[c][l], d[half][l], u[0]);
        emit(lane + 32 * half, u, k, [&](int) { return c; });
      }
    }
  }

  // The block's channels of an NCHW view are contiguous, in the stage as in memory.
  __device__ __forceinline__ void copy_out() const {
    __syncthreads();
    const bool vectors = int64_t(p.g.C) * HW % kSlots == 0;
    const int count = here * HW, whole = vectors ? count / kSlots : 0;
    REBALFER_ROLLED
    for (int view = 0; view < views; ++view) {
      const T* from = stage + view * kBlockChannels * HW;
      T* to = (view ? out_twin : out) + int64_t(c0) * HW;
      for (int i = threadIdx.x; i < whole; i += kThreads)
        store_16B_streaming(to + i * kSlots, reinterpret_cast<const uint4*>(from)[i]);
      REBALFER_ROLLED
      for (int i = whole * kSlots + threadIdx.x; i < count; i += kThreads) to[i] = from[i];
    }
  }

  __device__ __forceinline__ void run() const {
    prepare();
    if constexpr (kTensorCore) {
      by_mma();
    } else if constexpr (kChannelsLast) {
      by_fma_over_positions();
    } else {
      by_fma_over_channels();
    }
    if constexpr (!kChannelsLast) copy_out();
  }
};

template <typename T, bool kChannelsLast, int kBlocks>
__global__ __launch_bounds__(kThreads, 5) void backward_kernel(const __grid_constant__ BackwardParams p,
                                                               int weight_blocks) {
  REBALFER_DYNAMIC_SHARED(unsigned char, memory);
  const int64_t block = int64_t(blockIdx.x) - weight_blocks;
  if (block < 0) {
    parameter_gradients<T, 8 * kBlocks>(p, blockIdx.x, *reinterpret_cast<WeightShared*>(memory));
    return;
  }
  const int64_t of_pair = ceil_div(p.g.C, kBlockChannels);
  FeatureGradient<T, kChannelsLast, kBlocks>(p, block / of_pair, int(block % of_pair) * kBlockChannels, memory).run();
}

// use(kernel, bytes of shared memory besides the features' gradient in NCHW) of the kernel that serves these classes.
template <typename T, typename F>
void with_backward_kernel(bool channels_last, int L, const F& use) {
  const auto with = [&]<bool kChannelsLast, int kBlocks>() {
    use(backward_kernel<T, kChannelsLast, kBlocks>, FeatureGradient<T, kChannelsLast, kBlocks>::stage_offset());
  };
  const auto of_layout = [&]<bool kChannelsLast>() {
    L > 8 ? with.template operator()<kChannelsLast, 2>() : with.template operator()<kChannelsLast, 1>();
  };
  channels_last ? of_layout.template operator()<true>() : of_layout.template operator()<false>();
}

template <typename T>
void visit_backward_kernels_as(const Visit& visit) {
  for (const bool channels_last : {false, true}) {
    for (const int L : {8, kMaxClasses}) {
      with_backward_kernel<T>(channels_last, L,
                              [&](auto* kernel, int64_t) { visit(reinterpret_cast<const void*>(kernel), 0); });
    }
  }
}

template <typename T>
void launch_backward_as(const BackwardParams& p, cudaStream_t stream) {
  const int weight_blocks = p.d_weight ? (p.g.C + kWeightChannels - 1) / kWeightChannels : p.d_bias ? 1 : 0;
  const int64_t feature_blocks = p.d_features ? p.g.N * ((p.g.C + kBlockChannels - 1) / kBlockChannels) : 0;
  if (weight_blocks + feature_blocks == 0) return;
  with_backward_kernel<T>(p.g.channels_last, p.g.L, [&](auto* kernel, int64_t fixed) {
    const int64_t stage = p.g.channels_last ? 0 : int64_t(p.g.views) * kBlockChannels * p.g.H * p.g.W * sizeof(T);
    const int64_t bytes = std::max<int64_t>(sizeof(WeightShared), fixed + (feature_blocks ? stage : 0));
    launch(kernel, dim3(unsigned(weight_blocks + feature_blocks)), dim3(kThreads), 1u, size_t(bytes), stream, p,
           weight_blocks);
  });
}

}  // namespace rebalfer::gpu
