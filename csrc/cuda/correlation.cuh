// The gradient of the CAM's weight by a view's maps: K[l, c] = sum_x d[l, x] F[c, x], of the channels of a step.
#pragma once

#include "features.cuh"

namespace rebalfer::gpu {

// Of kTogether classes at a time: each lane multiplies the positions and channels that it has (features.cuh), then the
// lanes of a warp exchange what they have of 32 sums, of which each keeps 4.
template <typename T, bool kChannelsLast, int kTiles>
struct Correlation {
  static constexpr int kSlots = 16 / sizeof(T);  // channels of a lane
  static constexpr int kTogether = 32 / kSlots;  // classes

  // This lane's 4 sums for the classes from l0 on. d (classes, positions) is zero beyond the maps.
  template <int kClasses, int kPitch>
  static __device__ __forceinline__ void sums(const float (&d)[kClasses][kPitch], const uint4 (&f)[kTiles], int l0,
                                              const Place& at, float (&own)[4]) {
    float all[kTogether][kSlots] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float x[kSlots];
      unpack<T>(f[j], x);
#pragma unroll
      for (int l = 0; l < kTogether; ++l) {
        const float factor = d[l0 + l][8 * j + at.group];
#pragma unroll
        for (int i = 0; i < kSlots; ++i) all[l][i] = fmaf(factor, x[i], all[l][i]);
      }
    }
    sum_and_spread<16, 4, 32>(&all[0][0], at.lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i] = (&all[0][0])[i];
  }

  // The sums to K (L, C) of their view or pair; c is the first of the lane's channels.
  static __device__ __forceinline__ void write(float* K, const Geometry& g, int l0, int c, const Place& at,
                                               const float (&own)[4]) {
    const int l = l0 + 4 * at.group / kSlots;
    if (l >= g.L) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = 4 * at.group % kSlots + i;
      const int channel = c + (sizeof(T) == 2 ? 2 * pair_of_word<kChannelsLast>(slot / 2) + slot % 2 : slot);
      if (channel < g.C) K[int64_t(l) * g.C + channel] = own[i];
    }
  }
};

}  // namespace rebalfer::gpu
