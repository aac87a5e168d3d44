// What the forward and the backward kernels share: how a warp's lanes divide channels and positions, the weight as
// float32, and sums over lanes.
#pragma once

#include <utility>

#include "intrinsics.cuh"
#include "kernels.cuh"

namespace rebalfer::gpu {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr unsigned kAll = ~0u;

__device__ __forceinline__ int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// The 16-bit or 32-bit elements of 16 bytes as float32.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[16 / sizeof(T)]) {
  const uint32_t r[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(r[i]);
    } else {
      x[2 * i] = to_float(T{uint16_t(r[i])});
      x[2 * i + 1] = to_float(T{uint16_t(r[i] >> 16)});
    }
  }
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[16 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  } else {
    return {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])};
  }
}

// The classifier's weight (L, C), or its bias with C = 1, whatever its dtype; zero outside.
template <typename T>
struct Weights {
  Parameter parameter;
  int L, C;
  bool vectors;  // rows may be read 16 bytes at a time

  __device__ Weights(const Parameter& parameter, int L, int C)
      : parameter(parameter), L(L), C(C), vectors(C % 8 == 0 && reinterpret_cast<uintptr_t>(parameter.data) % 16 == 0) {
  }

  __device__ __forceinline__ float at(int l, int c) const {
    if (l >= L || c >= C) return 0;
    const int64_t i = int64_t(l) * C + c;
    return parameter.is_float ? __ldg(static_cast<const float*>(parameter.data) + i)
                              : to_float(static_cast<const T*>(parameter.data)[i]);
  }
};

// Walks along the channels of rows of the weight, as many at a time as 16 bytes of features have.
template <typename T>
class WeightCursor {
 public:
  static constexpr int kChannels = 16 / sizeof(T);
  struct Bits {  // as many float32, or as many of T in the first 16 bytes
    uint4 of[sizeof(float) / sizeof(T)];
  };

  const bool floats;

  // From row l and channel c on, `step` channels at a time.
  __device__ __forceinline__ WeightCursor(const Weights<T>& weights, int l, int c, int step)
      : floats(sizeof(T) == 4 || weights.parameter.is_float), weights_(weights), l_(l), c_(c), step_(step),
        step_bytes_(step * size()), by_element_(!weights.vectors),
        from_(static_cast<const unsigned char*>(weights.parameter.data) + offset(l, c)) {
    keep(by_element_);
  }

  __device__ __forceinline__ void advance() {
    c_ += step_;
    from_ += step_bytes_;
    keep(from_);
  }

  // From the last of n steps to the first.
  __device__ __forceinline__ void rewind(int n) {
    c_ -= (n - 1) * step_;
    from_ -= int64_t(n - 1) * step_bytes_;
    keep(from_);
  }

  // Of the row that is k rows below the cursor's; zero outside.
  __device__ __forceinline__ Bits bits(int k) const {
    Bits b{};
    if (l_ + k >= weights_.L || c_ >= weights_.C) return b;
    if (!by_element_) {
      const uint4* from = reinterpret_cast<const uint4*>(from_ + offset(k, 0));
      b.of[0] = __ldg(from);
      if constexpr (sizeof(T) == 2)
        if (floats) b.of[1] = __ldg(from + 1);
      return b;
    }
    float x[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = weights_.at(l_ + k, c_ + i);
    if constexpr (sizeof(T) == 2)
      if (!floats) {
        b.of[0] = pack<T>(x);  // exactly: they were of T
        return b;
      }
#pragma unroll
    for (int i = 0; i < kChannels / 4; ++i)
      b.of[i] = uint4{__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]), __float_as_uint(x[4 * i + 2]),
                      __float_as_uint(x[4 * i + 3])};
    return b;
  }

 private:
  const Weights<T> weights_;
  const int l_;
  int c_;
  const int step_;
  int step_bytes_, by_element_;
  const unsigned char* from_;

  __device__ __forceinline__ int size() const { return floats ? 4 : int(sizeof(T)); }
  __device__ __forceinline__ int64_t offset(int l, int c) const { return (int64_t(l) * weights_.C + c) * size(); }
};

// x = high + low / kScale to about twice the digits of T. float16 has few exponents, so its low part is kept large.
template <typename T>
constexpr float kLowScale = std::is_same_v<T, Half> ? 2048.0f : 1.0f;

template <typename T>
__device__ __forceinline__ void split2(float x0, float x1, uint32_t& high, uint32_t& low) {
  high = pack2<T>(x0, x1);
  const float r0 = x0 - to_float(T{uint16_t(high)}), r1 = x1 - to_float(T{uint16_t(high >> 16)});
  low = pack2<T>(r0 * kLowScale<T>, r1 * kLowScale<T>);
}

// A reduce-scatter in fixed butterfly order over the lanes that differ in the bits first, first / 2, ..., last of their
// number; these lane bits choose which sums a lane keeps: n / 2^bits of them, in v[0...]. Where there are fewer sums
// than lanes, the lanes that differ in the lowest bits keep the same.
template <int first, int last, int n>
__device__ __forceinline__ void sum_and_spread(float* v, int lane) {
  if constexpr (first >= last) {
    if constexpr (n > 1) {
      const bool upper = lane & first;
#pragma unroll
      for (int i = 0; i < n / 2; ++i) {
        const float send = upper ? v[i] : v[i + n / 2], keep = upper ? v[i + n / 2] : v[i];
        v[i] = keep + __shfl_xor_sync(kAll, send, first);
      }
      sum_and_spread<first / 2, last, n / 2>(v, lane);
    } else {
      v[0] += __shfl_xor_sync(kAll, v[0], first);
      sum_and_spread<first / 2, last, 1>(v, lane);
    }
  }
}

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(kAll, x, bit);
  return x;
}

__device__ __forceinline__ TargetRow<float> target_row(const Targets<float>& t, int64_t i, int64_t L) {
  return {t.table, t.soft ? t.soft + i * L : nullptr, t.soft ? 0 : __ldg(t.labels + i), L};
}

// Called by all threads of a block whose thread 0 has written what the last of `blocks` blocks is to read: whether
// this is that block. `room` is shared.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, int64_t blocks, int* room) {
  if (threadIdx.x == 0) {
    const bool last = ticket_increment(ticket) == unsigned(blocks - 1);
    if (last) ticket_reset(ticket);
    *room = last;
  }
  __syncthreads();
  return *room;
}

// write(k, mean) for the means of the n values that value(i, v) puts into v, over i < N, in an order that depends only
// on N, each by a thread of its own. `room` is shared.
template <int n, typename Value, typename Write>
__device__ __forceinline__ void block_means(int64_t N, double (*room)[n], const Value& value, const Write& write) {
  double sums[n] = {};
  REBALFER_ROLLED
  for (int64_t i = threadIdx.x; i < N; i += kThreads) {
    float v[n];
    value(i, v);
#pragma unroll
    for (int k = 0; k < n; ++k) sums[k] += double(v[k]);
  }
#pragma unroll
  for (int k = 0; k < n; ++k) sums[k] = warp_sum(sums[k]);
  __syncthreads();
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int k = 0; k < n; ++k) room[threadIdx.x / 32][k] = sums[k];
  __syncthreads();
  const int k = threadIdx.x;
  if (k >= n) return;
  double total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += room[w][k];
  write(k, float(total / double(N)));
}

// use.operator()<kChannelsLast, kBlocks, kPositions>(): which instance of a kernel serves these classes and positions,
// 8 kBlocks classes at most and H W = kPositions, or any if that is 0.
template <typename F>
void with_instance(bool channels_last, int L, int HW, const F& use) {
  const auto of_layout = [&]<bool kChannelsLast>() {
    if (L > 8) return use.template operator()<kChannelsLast, 2, 0>();
    if (HW == 49) return use.template operator()<kChannelsLast, 1, 49>();
    use.template operator()<kChannelsLast, 1, 0>();
  };
  channels_last ? of_layout.template operator()<true>() : of_layout.template operator()<false>();
}

// The same of every instance, with the most positions that it serves: use.operator()<...>(HW).
template <typename F>
void with_every_instance(const F& use) {
  for (const bool channels_last : {false, true}) {
    for (const auto& [L, HW] : {std::pair(8, 49), std::pair(8, kMaxPositions), std::pair(kMaxClasses, kMaxPositions)}) {
      with_instance(channels_last, L, HW, [&]<bool kChannelsLast, int kBlocks, int kPositions>() {
        use.template operator()<kChannelsLast, kBlocks, kPositions>(HW);
      });
    }
  }
}

}  // namespace rebalfer::gpu
