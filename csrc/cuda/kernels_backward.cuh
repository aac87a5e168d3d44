// The backward kernel: all gradients of the head in one launch that, for the features', writes only.
//
// The forward has saved the gradients of each sample's losses; what is left is linear in them.
//
// The first blocks of the grid compute the gradients of weight and bias, 8 channels each, over the whole batch in a
// fixed order; every such block computes the gradient of all logits, which is cheaper than a second launch. The other
// blocks write the features' gradients of some channels of a pair. With
//   E = dS + dz / (H W)  and, where the twin's index says,  E~ = -dS + dz~ / (H W),
// dF = W^T E and dF~ = W^T E~. So each warp writes one view, and no feature's gradient is added to or moved.
//
// 16-bit features: mma.m16n8k8 with 16 channels as rows, 8 classes as K and 8 positions as columns, for the high and
// the low parts of E; where the weight is not of bfloat16, for its low parts too. Both operands are ours, so they are
// bfloat16 whatever the features are: float16 would lose gradients of 1 / (N L H W) to its few exponents. The rows of
// four mma are, for each group of 4 lanes, 8 consecutive channels: of channels_last, what a lane stores at a position
// in 16 bytes; of NCHW, every second mma has the odd channels, whose columns begin one position earlier where H W is
// odd, so that each lane stores two positions in one aligned word. There a warp lays its channels out in shared memory,
// from where they leave in 16-byte stores. Columns that are no positions are computed from what happens to be there.
//
// float32 features: IEEE FMAs.
#pragma once

#include "features.cuh"

namespace rebalfer::gpu {

constexpr int kWeightChannels = 8;  // of a block of the weight's gradient
// Rows of the logits whose gradient such a block holds at a time: it waits for all of them at once.
template <int kClasses>
constexpr int kWeightRows = kClasses > 8 ? 128 : 256;

__device__ __forceinline__ float upstream(const Upstream& u, int64_t i) {
  return u.data ? __ldg(u.data + i * u.stride) : 0;
}

// The upstream gradient of a sample's consistency, in units of its sum over samples.
__device__ __forceinline__ float consistency_upstream(const BackwardParams& p, int64_t i) {
  return p.g.views == 1 ? 1.0f
                        : (p.consistency_weight * upstream(p.d_loss, i) + upstream(p.d_consistency, i)) * p.share;
}

// The upstream gradient of a sample's classification, and whether there is one: without one, its gradient takes no
// part.
__device__ __forceinline__ bool has_classification_upstream(const BackwardParams& p) {
  return p.logit_grad && (p.d_loss.data || p.d_classification.data);
}
__device__ __forceinline__ float classification_upstream(const BackwardParams& p, int64_t i) {
  return (upstream(p.d_loss, i) + upstream(p.d_classification, i)) * p.share;
}

// A row (view by view) of dz, zero from L on. load() only loads and store() adds up, so that all of a thread's rows are
// under way at once.
template <int kClasses>
struct LogitGradient {
  float of_loss[kClasses] = {}, given[kClasses] = {}, g = 0;

  __device__ __forceinline__ void load(const BackwardParams& p, int m, bool inside) {
    const int L = inside ? p.g.L : 0;
    const auto row = [&](const float* from, float (&to)[kClasses]) {
#pragma unroll
      for (int l = 0; l < kClasses; ++l) to[l] = l < L ? __ldg(from + int64_t(m) * p.g.L + l) : 0.0f;
    };
    if (has_classification_upstream(p)) {
      row(p.logit_grad, of_loss);
      if (inside) g = classification_upstream(p, m < int(p.g.N) ? m : m - int(p.g.N));
    }
    if (p.d_logits) row(p.d_logits, given);
  }

  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int l = 0; l < kClasses; l += 4)
      *reinterpret_cast<float4*>(to + l) =
          make_float4(fmaf(g, of_loss[l], given[l]), fmaf(g, of_loss[l + 1], given[l + 1]),
                      fmaf(g, of_loss[l + 2], given[l + 2]), fmaf(g, of_loss[l + 3], given[l + 3]));
  }
};

template <typename T>
__device__ __forceinline__ void store_parameter(void* to, bool is_float, int64_t i, float x) {
  if (sizeof(T) == 4 || is_float) {
    static_cast<float*>(to)[i] = x;
  } else {
    static_cast<T*>(to)[i] = from_float<T>(x);
  }
}

template <int kClasses>
struct WeightShared {
  alignas(16) float dz[kWeightRows<kClasses>][kClasses + 4];  // 16 bytes of each of 8 rows are in different banks
  float sums[kWarps][kClasses][kWeightChannels];
};

// dW = sum_m dz_m P_m + sum_i g_S,i K_i for 8 channels from `first` on, where the bias is the weight of channel C,
// whose features are 1. A lane has one channel, or two of up to 8 classes, of every 16th or 32nd sample.
template <typename T, int kClasses>
__device__ void parameter_gradients(const BackwardParams& p, int first, WeightShared<kClasses>& shared) {
  const int L = p.g.L, C = p.g.C, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kRows = kWeightRows<kClasses>, kOwn = 16 / kClasses, kLanes = kWeightChannels / kOwn,
                kParts = kThreads / kLanes;
  const int part = threadIdx.x / kLanes, own = kOwn * (int(threadIdx.x) % kLanes), c = first + own;
  float acc[kOwn][kClasses] = {};
  const int M = p.logit_grad && (p.pooled || p.d_bias) ? 2 * int(p.g.N) : 0;
  const float* pooled = p.pooled + int64_t(part) * C + c;
  const int64_t step = int64_t(kParts) * C;
  for (int m0 = 0; m0 < M; m0 += kRows, pooled += kRows / kParts * step) {
    const int rows = min(kRows, M - m0);
    // The part's rows are under way while the logits' gradient is computed.
    int own_rows[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) own_rows[j] = p.pooled && c + j < C ? rows - part : 0;
    float x[kRows / kParts][kOwn];
#pragma unroll
    for (int k = 0; k < kRows / kParts; ++k)
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        x[k][j] = k * kParts < own_rows[j] ? __ldg(pooled + k * step + j) : c + j == C ? 1.0f : 0.0f;
    LogitGradient<kClasses> dz[kRows / kThreads];
#pragma unroll
    for (int k = 0; k < kRows / kThreads; ++k) {
      const int row = k * kThreads + threadIdx.x;
      dz[k].load(p, m0 + row, row < rows);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRows / kThreads; ++k) dz[k].store(shared.dz[k * kThreads + threadIdx.x]);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRows / kParts; ++k) {
      if (k * kParts >= rows) break;
#pragma unroll
      for (int l = 0; l < kClasses; l += 4) {
        const float4 row = *reinterpret_cast<const float4*>(&shared.dz[k * kParts + part][l]);
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          acc[j][l] = fmaf(row.x, x[k][j], acc[j][l]), acc[j][l + 1] = fmaf(row.y, x[k][j], acc[j][l + 1]);
          acc[j][l + 2] = fmaf(row.z, x[k][j], acc[j][l + 2]), acc[j][l + 3] = fmaf(row.w, x[k][j], acc[j][l + 3]);
        }
      }
    }
  }
  if (p.cam_grad && (p.g.views == 1 || p.d_loss.data || p.d_consistency.data)) {
#pragma unroll(16 / kClasses)
    for (int64_t i = part; i < p.g.N; i += kParts) {
      const float g = consistency_upstream(p, i);
      const float* K = p.cam_grad + i * L * C + c;
#pragma unroll
      for (int l = 0; l < kClasses; ++l)
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
          if (l < L && c + j < C) acc[j][l] = fmaf(g, __ldg(K + int64_t(l) * C + j), acc[j][l]);
    }
  }
#pragma unroll
  for (int l = 0; l < kClasses; ++l)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
#pragma unroll
      for (int bit = 16; bit >= kLanes; bit /= 2) acc[j][l] += __shfl_xor_sync(kAll, acc[j][l], bit);
      if (lane < kLanes) shared.sums[warp][l][own + j] = acc[j][l];
    }
  __syncthreads();
  static_assert(kThreads >= kClasses * kWeightChannels);
  const int l = threadIdx.x / kWeightChannels, k = threadIdx.x % kWeightChannels, to = first + k;
  if (l >= L || to > C) return;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][l][k];
  if (to < C && p.d_weight) store_parameter<T>(p.d_weight, p.weight.is_float, int64_t(l) * C + to, sum);
  if (to == C && p.d_bias) store_parameter<T>(p.d_bias, p.weight.is_float, l, sum);
}

// kPositions: H W where it is known when this is compiled, else 0.
template <typename T, bool kChannelsLast, int kBlocks, int kPositions>
struct FeatureGradient {
  static constexpr bool kTensorCore = sizeof(T) == 2;
  static constexpr int kSlots = 16 / sizeof(T);
  static constexpr int kClasses = 8 * kBlocks;
  static constexpr int kTiles = ((kPositions ? kPositions : kMaxPositions) + 7) / 8;
  static constexpr int kWarpChannels = kTensorCore ? 64 : kChannelsLast ? 128 : 32;

  // E of each view, as the arithmetic needs it.
  struct MmaMaps {
    uint2 e[2][kBlocks][kMaxPositions + 1][4];  // high and low parts of classes 2 q, 2 q + 1; position -1 comes first

    __device__ __forceinline__ void put(int view, int x, int q, float e0, float e1) {
      uint2 parts;
      split2<BFloat16>(e0, e1, parts.x, parts.y);
      e[view][q / 4][x + 1][q % 4] = parts;
    }
  };
  struct FmaMaps {
    static constexpr int kPitch = kClasses + 4;  // 16 bytes of each of 8 rows are in different banks
    float e[2][kMaxPositions][kPitch];
    float w[kChannelsLast ? 1 : kWarps * kWarpChannels][kPitch];  // of NCHW

    __device__ __forceinline__ void put(int view, int x, int q, float e0, float e1) {
      *reinterpret_cast<float2*>(&e[view][x][2 * q]) = make_float2(e0, e1);
    }
  };
  struct Shared {
    float dz[2][kMaxClasses];  // over H W
    float upstream;            // g_S
    alignas(16) std::conditional_t<kTensorCore, MmaMaps, FmaMaps> maps;
  };

  static __host__ __device__ __forceinline__ int block_channels(int views) {
    return (views == 2 ? kWarps / 2 : kWarps) * kWarpChannels;
  }
  static __host__ __device__ int64_t stage_offset() { return (sizeof(Shared) + 127) / 128 * 128; }
  static __host__ __device__ int64_t shared_bytes(int64_t HW) {
    return stage_offset() + (kChannelsLast ? 0 : kWarps * kWarpChannels * HW * int64_t(sizeof(T)));
  }

  const BackwardParams& p;
  const Weights<T> weights;
  Shared& shared;
  const int HW, L, views;
  const Place at;
  T* const stage;  // NCHW: of this warp, (channels, H W)
  const int64_t pair;
  const int c0;  // the warp's first channel
  T* const out;  // the gradient of the warp's view

  __device__ __forceinline__ FeatureGradient(const BackwardParams& p, int64_t pair, int block_channel,
                                             unsigned char* memory)
      : p(p), weights(p.weight, p.g.L, p.g.C), shared(*reinterpret_cast<Shared*>(memory)),
        HW(kPositions ? kPositions : p.g.H * p.g.W), L(p.g.L), views(p.g.views), at(p.g.views, threadIdx.x),
        stage(reinterpret_cast<T*>(memory + stage_offset()) + at.warp * kWarpChannels * HW), pair(pair),
        c0(block_channel + at.slice * kWarpChannels),
        out(static_cast<T*>(p.d_features) + (at.view * p.g.N + pair) * p.g.C * HW) {}

  // dz / (H W) of both views, by one warp, half a warp a view, a lane a class.
  __device__ __forceinline__ void put_logit_gradients() const {
    const int v = at.lane / 16, l = at.lane % 16;
    const int64_t i = (v * p.g.N + pair) * L + l;
    const bool here = l < L;
    float dz = here && p.d_logits ? __ldg(p.d_logits + i) : 0.0f;
    if (has_classification_upstream(p))
      dz = fmaf(classification_upstream(p, pair), here ? __ldg(p.logit_grad + i) : 0.0f, dz);
    shared.dz[v][l] = dz * (1.0f / float(HW));
  }

  // E of both views: a thread has a position and half of the classes, two of each four.
  __device__ __forceinline__ void prepare() const {
    static_assert(kThreads == 2 * kMaxPositions);
    const int x = threadIdx.x % kMaxPositions, half = threadIdx.x / kMaxPositions;
    const auto row_of = [](int k) { return 4 * (k / 2) + k % 2; };  // from class 2 half on
    float d[kClasses / 2] = {};
    if (x < HW) {
      const float* from = p.map_grad + (pair * L + 2 * half) * HW + x;
      keep(from);  // or each load would compute its address anew
#pragma unroll
      for (int k = 0; k < kClasses / 2; ++k)
        if (row_of(k) < L - 2 * half) d[k] = __ldg(from + row_of(k) * HW);
    }
    if (at.warp == 0) put_logit_gradients();
    if (at.warp == 1 && at.lane == 0) shared.upstream = consistency_upstream(p, pair);
    __syncthreads();
    if (x < HW) {
      const auto put = [&](int view, int to, float g) {
#pragma unroll
        for (int k = 0; k < kClasses / 2; k += 2) {
          const int l = 2 * half + row_of(k);
          const float2 dz = *reinterpret_cast<const float2*>(&shared.dz[view][l]);
          shared.maps.put(view, to, l / 2, fmaf(g, d[k], dz.x), fmaf(g, d[k + 1], dz.y));
        }
      };
      const float g = shared.upstream;
      put(0, x, g);
      if (views == 2) {
        const int row = int(__fdividef(float(x) + 0.5f, float(p.g.W)));
        put(1, int(twin_index(p.g.twin, row, x - row * p.g.W)), -g);
      }
    }
    __syncthreads();
  }

  // Which of a lane's 8 consecutive channels is row group + 8 h of the t-th mma.
  static __device__ __forceinline__ constexpr int channel_of(int t, int h) {
    return kChannelsLast ? 2 * t + h : 4 * (t % 2) + 2 * h + t / 2;
  }

  // A: the high and the low parts of the weight of a lane's channels, classes 2 q, 2 q + 1; as it is loaded before.
  struct Rows {
    uint32_t high[kBlocks][8], low[kBlocks][8];  // by channel
  };
  struct Loaded {
    typename WeightCursor<T>::Bits of[kBlocks][2];
    bool floats;
  };
  __device__ __forceinline__ Loaded load_rows() const {
    const WeightCursor<T> cursor(weights, 2 * at.quarter, c0 + 8 * at.group, 0);
    Loaded loaded;
    loaded.floats = cursor.floats;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) loaded.of[b][0] = cursor.bits(8 * b), loaded.of[b][1] = cursor.bits(8 * b + 1);
    return loaded;
  }
  template <bool kExact>
  __device__ __forceinline__ Rows rows(const Loaded& loaded) const {
    Rows w;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const auto &even = loaded.of[b][0], &odd = loaded.of[b][1];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (kExact) {
          const uint32_t x = word_of(even.of[0], i / 2), y = word_of(odd.of[0], i / 2);
          w.high[b][i] = i % 2 ? x >> 16 | (y & 0xffff0000) : (x & 0xffff) | y << 16;
        } else {
          const auto value = [&](const typename WeightCursor<T>::Bits& bits) {
            return loaded.floats ? __uint_as_float(word_of(bits.of[i / 4], i % 4))
                                 : to_float(T{uint16_t(word_of(bits.of[0], i / 2) >> 16 * (i % 2))});
          };
          split2<BFloat16>(value(even), value(odd), w.high[b][i], w.low[b][i]);
        }
      }
    }
    return w;
  }

  // d += W^T E for four mma's rows and the 8 positions from x on.
  template <bool kExact>
  __device__ __forceinline__ void multiply(float (&d)[4][4], const Rows& w, int tile, int shift, int t0, int t1) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint2 e = shared.maps.e[at.view][b][8 * tile + at.group + 1 - shift][at.quarter];
#pragma unroll
      for (int t = t0; t < t1; ++t) {
        const int i = channel_of(t, 0), j = channel_of(t, 1);
        mma_m16n8k8<BFloat16>(d[t], {w.high[b][i], w.high[b][j]}, e.x);
        mma_m16n8k8<BFloat16>(d[t], {w.high[b][i], w.high[b][j]}, e.y);
        if constexpr (!kExact) mma_m16n8k8<BFloat16>(d[t], {w.low[b][i], w.low[b][j]}, e.x);
      }
    }
  }

  // channels_last: where a lane's consecutive channels go, position by position.
  struct Column {
    unsigned char* to;  // at the lane's position 0
    unsigned pitch;     // bytes
    int here;           // of the lane's channels

    __device__ __forceinline__ Column(const FeatureGradient& f, int channel, int x)
        : to(reinterpret_cast<unsigned char*>(f.out + int64_t(x) * f.p.g.C + channel)),
          pitch(f.p.g.C * unsigned(sizeof(T))), here(min(kSlots, f.p.g.C - channel)) {}

    // kWide: in one store of 16 bytes.
    template <bool kWide>
    __device__ __forceinline__ void store(int x, bool inside, const float (&u)[kSlots]) const {
      T* const at = reinterpret_cast<T*>(to + uint64_t(pitch) * unsigned(x));
      if constexpr (kWide) {
        if (inside && here > 0) store_16B_streaming(at, pack<T>(u));
      } else if (inside) {
#pragma unroll
        for (int i = 0; i < kSlots; ++i)
          if (i < here) at[i] = from_float<T>(u[i]);
      }
    }
  };

  template <bool kExact, bool kWide>
  __device__ __forceinline__ void to_columns(const Rows& w) const {
    const Column column(*this, c0 + 8 * at.group, 2 * at.quarter);
#pragma unroll(kWide ? kTiles : 1)
    for (int j = 0; j < kTiles; ++j) {
      if (8 * j >= HW) break;
      float d[4][4] = {};
      multiply<kExact>(d, w, j, 0, 0, 4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float u[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) u[i] = d[i / 2][2 * (i % 2) + e];
        column.template store<kWide>(8 * j + e, 8 * j + 8 <= HW || 8 * j + 2 * at.quarter + e < HW, u);
      }
    }
  }

  template <bool kExact>
  __device__ __forceinline__ void to_stage(const Rows& w) const {
    const int odd = HW % 2;
    T* const own = stage + 8 * at.group * HW + 2 * at.quarter;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (8 * j >= HW + odd) break;
      float d[4][4] = {};
      multiply<kExact>(d, w, j, 0, 0, 2);
      multiply<kExact>(d, w, j, odd, 2, 4);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int shift = t < 2 ? 0 : odd, x = 8 * j + 2 * at.quarter - shift;  // and x + 1
        const bool all = 8 * j >= shift && 8 * j + 8 - shift <= HW;             // of the tile's columns are positions
        const bool first = all || (x >= 0 && x < HW), second = all || (x + 1 >= 0 && x + 1 < HW);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          T* const to = own + channel_of(t, h) * HW + 8 * j - shift;
          const uint32_t two = pack2<T>(d[t][2 * h], d[t][2 * h + 1]);
          if (first && second) *reinterpret_cast<uint32_t*>(to) = two;
          if (first && !second) to[0] = T{uint16_t(two)};
          if (!first && second) to[1] = T{uint16_t(two >> 16)};
        }
      }
    }
  }

  template <bool kExact>
  __device__ __forceinline__ void by_mma(const Loaded& loaded) const {
    const Rows w = rows<kExact>(loaded);
    if constexpr (!kChannelsLast) {
      to_stage<kExact>(w);
    } else if (p.g.C % kSlots == 0) {
      to_columns<kExact, true>(w);
    } else {
      to_columns<kExact, false>(w);
    }
  }

  // channels_last: a lane holds the weight of 4 channels and walks over positions.
  template <bool kWide>
  __device__ __forceinline__ void by_fma_over_positions() const {
    const int c = c0 + 4 * at.lane;
    const WeightCursor<T> cursor(weights, 0, c, 0);
    const Column column(*this, c, 0);
    float w[kClasses][4];
#pragma unroll
    for (int l = 0; l < kClasses; ++l) unpack<float>(cursor.bits(l).of[0], w[l]);
#pragma unroll 4
    for (int x = 0; x < HW; ++x) {
      float u[4] = {};
#pragma unroll
      for (int l = 0; l < kClasses; ++l)
#pragma unroll
        for (int i = 0; i < 4; ++i) u[i] = fmaf(w[l][i], shared.maps.e[at.view][x][l], u[i]);
      column.template store<kWide>(x, true, u);
    }
  }

  // NCHW: a lane holds E of two positions and walks over channels.
  __device__ __forceinline__ void by_fma_over_channels() const {
    auto* const w = shared.maps.w + at.warp * kWarpChannels;
#pragma unroll
    for (int l = 0; l < kClasses; l += 4)
      *reinterpret_cast<float4*>(&w[at.lane][l]) =
          make_float4(weights.at(l, c0 + at.lane), weights.at(l + 1, c0 + at.lane), weights.at(l + 2, c0 + at.lane),
                      weights.at(l + 3, c0 + at.lane));
    __syncwarp();
    float e[2][kClasses];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int l = 0; l < kClasses; ++l) e[half][l] = shared.maps.e[at.view][at.lane + 32 * half][l];
#pragma unroll 4
    for (int c = 0; c < kWarpChannels; ++c) {
      float u[2] = {};
#pragma unroll
      for (int l = 0; l < kClasses; ++l)
#pragma unroll
        for (int half = 0; half < 2; ++half) u[half] = fmaf(w[c][l], e[half][l], u[half]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (at.lane + 32 * half < HW) stage[c * HW + at.lane + 32 * half] = u[half];
    }
  }

  // The warp's channels of an NCHW view are contiguous, in its stage as in memory.
  __device__ __forceinline__ void copy_out() const {
    constexpr int kMost = kWarpChannels * (kPositions ? kPositions : kMaxPositions) / kSlots;
    __syncwarp();
    const int count = min(kWarpChannels, p.g.C - c0) * HW;
    const int vectors = int64_t(p.g.C) * HW % kSlots == 0 ? count / kSlots : 0;
    T* const to = out + int64_t(c0) * HW;
    const uint4* const from = reinterpret_cast<const uint4*>(stage) + at.lane;
    T* own = to + at.lane * kSlots;
    keep(own);  // or each store would compute its address anew
#pragma unroll
    for (int k = 0; k < (kMost + 31) / 32; ++k)
      if (32 * k < vectors - at.lane) store_16B_streaming(own + 32 * k * kSlots, from[32 * k]);
    REBALFER_ROLLED
    for (int i = max(vectors, 0) * kSlots + at.lane; i < count; i += 32) to[i] = stage[i];
  }

  __device__ __forceinline__ void run() const {
    if constexpr (kTensorCore) {
      const Loaded loaded = load_rows();
      prepare();
      if (std::is_same_v<T, BFloat16> && !loaded.floats) {
        by_mma<true>(loaded);
      } else {
        by_mma<false>(loaded);
      }
    } else {
      prepare();
      if constexpr (!kChannelsLast) {
        by_fma_over_channels();
      } else if (p.g.C % kSlots == 0) {
        by_fma_over_positions<true>();
      } else {
        by_fma_over_positions<false>();
      }
    }
    if constexpr (!kChannelsLast) copy_out();
  }
};

template <typename T, bool kChannelsLast, int kBlocks, int kPositions>
__global__ __launch_bounds__(kThreads, 6 - kBlocks) void backward_kernel(const __grid_constant__ BackwardParams p,
                                                                         unsigned of_pair, unsigned weight_blocks) {
  REBALFER_DYNAMIC_SHARED(unsigned char, memory);
  wait_for_previous();
  using Gradient = FeatureGradient<T, kChannelsLast, kBlocks, kPositions>;
  if (blockIdx.x < weight_blocks) {
    const int left = p.d_weight ? 0 : p.g.C / kWeightChannels;  // only the bias is wanted
    parameter_gradients<T, 8 * kBlocks>(p, (left + blockIdx.x) * kWeightChannels,
                                        *reinterpret_cast<WeightShared<8 * kBlocks>*>(memory));
    return;
  }
  const unsigned block = blockIdx.x - weight_blocks, pair = block / of_pair;
  Gradient(p, pair, (block - pair * of_pair) * Gradient::block_channels(p.g.views), memory).run();
}

template <typename T>
void visit_backward_kernels_as(const Visit& visit) {
  with_every_instance([&]<bool kChannelsLast, int kBlocks, int kPositions>(int) {
    visit(reinterpret_cast<const void*>(backward_kernel<T, kChannelsLast, kBlocks, kPositions>), 0);
  });
}

template <typename T>
void launch_backward_as(const BackwardParams& p, cudaStream_t stream) {
  const int channels = p.d_weight ? p.g.C + (p.d_bias ? 1 : 0) : p.d_bias ? 1 : 0;  // the bias is the last
  const int weight_blocks = (channels + kWeightChannels - 1) / kWeightChannels;
  with_instance(p.g.channels_last, p.g.L, p.g.H * p.g.W, [&]<bool kChannelsLast, int kBlocks, int kPositions>() {
    using Gradient = FeatureGradient<T, kChannelsLast, kBlocks, kPositions>;
    const int of_block = Gradient::block_channels(p.g.views);
    const unsigned of_pair = unsigned((p.g.C + of_block - 1) / of_block);
    const int64_t feature_blocks = p.d_features ? p.g.N * of_pair : 0;
    if (weight_blocks + feature_blocks == 0) return;
    const int64_t bytes = std::max<int64_t>(weight_blocks ? sizeof(WeightShared<8 * kBlocks>) : 0,
                                            feature_blocks ? Gradient::shared_bytes(p.g.H * p.g.W) : 0);
    launch(backward_kernel<T, kChannelsLast, kBlocks, kPositions>, dim3(unsigned(weight_blocks + feature_blocks)),
           dim3(kThreads), 1u, size_t(bytes), stream, p.early, p, of_pair, unsigned(weight_blocks));
  });
}

}  // namespace rebalfer::gpu
