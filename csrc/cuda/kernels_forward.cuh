// The forward kernel: maps, pooled features, residual, logits and losses of a pair of views in one launch that reads
// the features once.
//
// A cluster serves one pair, each of its blocks some of the channels, each warp one view and 32 channels at a time.
// A warp is 8 groups of 4 lanes: group g holds the positions g, g + 8, ..., lane `quarter` of it 16 bytes of
// consecutive channels, which is what a 16-byte copy of channels_last gives, and (with the channels of an mma's K axis
// renumbered, for the weight alike) the B operand of mma.m16n8k16. Its A operand holds 8 classes of the weight's
// high parts in rows 0-7 and of their low parts in rows 8-15, so a float32 weight costs no more than a 16-bit one.
// float32 features take the same road with FMAs. Both views' maps are summed and subtracted at the end, on the map:
// taking the difference on the load would halve the FMAs of float32, but at L = 7 they need 40 % of the time that the
// memory does, and the maps of both views would no longer be there for the logits, for return_maps and for the twin's
// index, which moves no feature here.
//
// channels_last: each lane copies the pieces that it will read, four steps ahead (LaneRing): as many loads in flight as
// registers could not hold, and at the paper's batch all of a warp's loads at once.
// NCHW: channels are strided by H W elements, 98 bytes for 7 x 7 at 16 bits, so a warp cannot load them as vectors.
// Slabs of whole channels, which are contiguous, come through a ring in shared memory: by the bulk copy engine where
// all of them are multiples of 16 bytes, by cp.async where only the base is aligned or before sm_90, else by
// element. Reading 8 channels a quarter apart costs at worst a two-way bank conflict at 7 x 7.
//
// Order of the sums: channels of a warp, warps, blocks of the cluster; it depends only on C, H W, L, layout and dtype.
#pragma once

#include "kernels_common.cuh"

namespace rebalfer::gpu {

constexpr int kTiles = kMaxPositions / 8;
constexpr int kPitch = kMaxPositions + 8;  // of a map's row in shared memory; 8 rows apart hit different banks

struct ForwardShared {  // the fixed part of a block's shared memory
  uint64_t full[4];
  double room[kWarps];
  float z[2][kMaxClasses], losses[2], sums[kWarps];
  int twin[kMaxPositions], last;
};

// 16 bytes of elements get(0), get(1), ...
template <typename T, typename Get>
__device__ __forceinline__ void gather(uint4& f, const Get& get) {
  uint32_t r[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      r[i] = __float_as_uint(get(i));
    } else {
      r[i] = uint32_t(get(2 * i).bits) | uint32_t(get(2 * i + 1).bits) << 16;
    }
  }
  f = uint4{r[0], r[1], r[2], r[3]};
}

// A block's slabs of NCHW channels, `passes` times over, through kStages stages. A stage holds kChannels / views
// channels of each view. If all slabs fit into the stages they are fetched once and stay.
template <typename T>
struct Ring {
  static constexpr int kStages = sizeof(T) == 2 ? 4 : 2;  // 50 KiB at 7 x 7
  static constexpr int kChannels = kWarps * kGroup;
  enum How { kBulk, kVectors, kElements };

  static __host__ __device__ int64_t stage_bytes(int64_t HW) { return kChannels * HW * int64_t(sizeof(T)); }

  T* stages;
  uint64_t* full;
  const T* source;  // the first view of the pair, from the block's first channel on
  int64_t to_twin;
  int C, HW, views, channels, chunks, slots, total, issued = 0, consumed = 0;
  How how;

  __device__ __forceinline__ Ring(const Geometry& g, const T* features, int64_t pair, int first, int chunks, int passes,
                                  T* stages, uint64_t* full)
      : stages(stages), full(full), to_twin(g.N * g.C * g.H * g.W), C(g.C), HW(g.H * g.W), views(g.views),
        channels(kChannels / g.views), chunks(chunks), slots(min(chunks, kStages)),
        total(chunks <= kStages ? chunks : chunks * passes) {
    const int64_t view = int64_t(C) * HW;
    source = features + pair * view + int64_t(first) * channels * HW;
    C -= first * channels;
    const bool aligned = reinterpret_cast<uintptr_t>(features) % 16 == 0 && view * int64_t(sizeof(T)) % 16 == 0;
    how = !aligned ? kElements : REBALFER_HAS_BULK && C % channels == 0 ? kBulk : kVectors;
    if (how == kBulk) {
      if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) mbarrier_init(full + s, 1);
        mbarrier_fence_init();
      }
      __syncthreads();
    }
    REBALFER_ROLLED
    for (int s = 0; s < kStages; ++s) issue();
  }

  __device__ __forceinline__ T* stage(int use) const { return stages + int64_t(use % slots) * kChannels * HW; }

  __device__ __forceinline__ void issue() {
    if (issued < total) {
      const int c0 = issued % chunks * channels, here = min(channels, C - c0) * HW, room = channels * HW;
      T* to = stage(issued);
      const T* from = source + int64_t(c0) * HW;
      if (how == kBulk) {
        if (threadIdx.x == 0) {
          uint64_t* barrier = full + issued % slots;
          const unsigned bytes = here * sizeof(T);
          mbarrier_arrive_expect_tx(barrier, views * bytes);
          REBALFER_ROLLED
          for (int view = 0; view < views; ++view, to += room, from += to_twin)
            bulk_copy_to_shared(to, from, bytes, barrier);
        }
      } else {
        constexpr int kVector = 16 / sizeof(T);
        const int vectors = how == kVectors ? here / kVector : 0;
        REBALFER_ROLLED
        for (int view = 0; view < views; ++view, to += room, from += to_twin) {
#pragma unroll 4
          for (int i = threadIdx.x; i < vectors; i += kThreads) cp_async_16(to + i * kVector, from + i * kVector);
          REBALFER_ROLLED
          for (int i = vectors * kVector + threadIdx.x; i < room; i += kThreads) to[i] = i < here ? from[i] : T{};
        }
      }
    }
    if (how != kBulk) cp_async_commit();
    ++issued;
  }

  // The next slab, whole and visible to all threads.
  __device__ __forceinline__ const T* wait() {
    if (consumed < total) {
      if (how == kBulk) {
        mbarrier_wait_parity(full + consumed % slots, (consumed / slots) & 1);
      } else {
        cp_async_wait<kStages - 1>();
        __syncthreads();
      }
    }
    return stage(consumed++);
  }

  // The slab that was waited for may be overwritten.
  __device__ __forceinline__ void release() {
    if (issued < total) __syncthreads();
    issue();
  }
};

// This lane's 16-byte pieces of a view in channels_last, kStages steps ahead, `passes` times over. What a lane copies
// only it reads, so shared memory serves as more registers and no barrier is needed. If all steps fit they are
// fetched once and stay.
template <typename T>
struct LaneRing {
  static constexpr int kStages = 4;

  static __host__ __device__ int64_t bytes(int64_t HW) { return kWarps * kStages * ((HW + 7) / 8) * 32 * 16; }

  uint4* pieces;
  const T* source;  // the lane's first position
  int C, HW, group, tiles, steps, slots, total, issued = 0, consumed = 0;
  bool aligned;

  __device__ __forceinline__ LaneRing(const Geometry& g, const T* view, int group, int steps, int passes, uint4* pieces)
      : source(view + int64_t(group) * g.C), C(g.C), HW(g.H * g.W), group(group), tiles((HW + 7) / 8), steps(steps),
        slots(min(steps, kStages)), total(steps <= kStages ? steps : steps * passes),
        aligned(C % (16 / sizeof(T)) == 0 && reinterpret_cast<uintptr_t>(view) % 16 == 0) {
    this->pieces = pieces + threadIdx.x / 32 * kStages * tiles * 32 + threadIdx.x % 32;
  }

  __device__ __forceinline__ uint4* piece(int use) const { return pieces + use % slots * tiles * 32; }

  // Starts to fetch the next step's pieces; channel(step) is the lane's first channel.
  template <typename Channel>
  __device__ __forceinline__ void issue(const Channel& channel) {
    if (aligned && issued < total) {
      const int c = channel(issued % steps);
      uint4* to = piece(issued);
      const T* from = source + c;
      if (c < C) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          if (8 * j + group < HW) cp_async_16(to + 32 * j, from + int64_t(8 * j) * C);
      }
    }
    cp_async_commit();
    ++issued;
  }

  // The pieces whose first channel is c; zero outside.
  __device__ __forceinline__ void take(uint4 (&f)[kTiles], int c) {
    if (aligned) {
      cp_async_wait<kStages - 1>();
      const uint4* from = piece(consumed);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        f[j] = uint4{0, 0, 0, 0};
        if (8 * j + group < HW && c < C) f[j] = from[32 * j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const T* from = source + int64_t(8 * j) * C + c;
        gather<T>(f[j], [&](int i) { return 8 * j + group < HW && c + i < C ? from[i] : T{}; });
      }
    }
    ++consumed;
  }
};

template <typename T, bool kChannelsLast, int kBlocks>
struct Forward {
  static constexpr int kSlots = 16 / sizeof(T);         // channels of a lane
  static constexpr int kSteps = kGroup / (4 * kSlots);  // of a warp through its 32 channels
  static constexpr int kClasses = 8 * kBlocks;
  static constexpr int kMap = kClasses * kPitch;  // floats of one view's maps in shared memory
  static constexpr bool kTensorCore = sizeof(T) == 2;
  using Map = float[kClasses][kPitch];

  static __host__ __device__ int64_t maps_offset() { return (sizeof(ForwardShared) + 127) / 128 * 128; }
  static __host__ __device__ int64_t ring_offset() { return maps_offset() + kWarps * kMap * sizeof(float); }

  const ForwardParams& p;
  const Weights<T> weights;
  ForwardShared& shared;
  Map* const maps;  // of each warp, then summed over the warps of a view in place; from maps + views on of the cluster
  const int64_t pair;
  const int HW, views, lane, warp, group, quarter, view, slice, channels;

  __device__ Forward(const ForwardParams& p, unsigned char* memory)
      : p(p), weights(p.weight, p.g.L, p.g.C), shared(*reinterpret_cast<ForwardShared*>(memory)),
        maps(reinterpret_cast<Map*>(memory + maps_offset())), pair(blockIdx.x / p.cluster), HW(p.g.H * p.g.W),
        views(p.g.views), lane(threadIdx.x % 32), warp(threadIdx.x / 32), group(lane / 4), quarter(lane % 4),
        view(warp % views), slice(warp / views), channels(kWarps * kGroup / views) {}

  // The first of this lane's kSlots channels, relative to the warp's 32.
  __device__ __forceinline__ int lane_channel(int step) const {
    if constexpr (kTensorCore) return 8 * quarter;
    return kChannelsLast ? 16 * step + 4 * quarter : 8 * quarter + 4 * step;
  }

  // The lane's first channel in a step of the block's.
  __device__ __forceinline__ int channel(int first, int step) const {
    return (first + step / kSteps) * channels + slice * kGroup + lane_channel(step % kSteps);
  }

  // Of a slab: channels from lane_channel(step) on at the positions group + 8 j; zero outside.
  __device__ __forceinline__ void load(uint4 (&f)[kTiles], const T* slab, int step) const {
    const T* row = slab + (view * channels + slice * kGroup + lane_channel(step)) * HW + group;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      f[j] = uint4{0, 0, 0, 0};
      if (8 * j >= HW) continue;
      const bool inside = 8 * j + group < HW;
      gather<T>(f[j], [&](int i) { return inside ? row[i * HW + 8 * j] : T{}; });
    }
  }

  using Source = std::conditional_t<kChannelsLast, LaneRing<T>, Ring<T>>;

  __device__ __forceinline__ Source open(int first, int chunks, int passes, unsigned char* room) const {
    const T* features = static_cast<const T*>(p.features);
    if constexpr (kChannelsLast) {
      const T* own = features + (view * p.g.N + pair) * int64_t(p.g.C) * HW;
      LaneRing<T> ring(p.g, own, group, chunks * kSteps, passes, reinterpret_cast<uint4*>(room));
      REBALFER_ROLLED
      for (int s = 0; s < LaneRing<T>::kStages; ++s) ring.issue([&](int step) { return channel(first, step); });
      return ring;
    } else {
      return Ring<T>(p.g, features, pair, first, chunks, passes, reinterpret_cast<T*>(room), shared.full);
    }
  }

  // Calls use(features, c, weights(c)) for each piece of the block's channels that this warp handles; the weights are
  // asked for before the features are waited for.
  template <typename OfChannel, typename Use>
  __device__ __forceinline__ void for_channels(Source& source, int first, int chunks, const OfChannel& weights,
                                               const Use& use) const {
    if constexpr (kChannelsLast) {
      REBALFER_ROLLED
      for (int step = 0; step < chunks * kSteps; ++step) {
        const int c = channel(first, step);
        const auto w = weights(c);
        uint4 f[kTiles];
        source.take(f, c);
        use(f, c, w);
        source.issue([&](int next) { return channel(first, next); });
      }
    } else {
      REBALFER_ROLLED
      for (int k = 0; k < chunks; ++k) {
        const T* slab = nullptr;
        REBALFER_ROLLED
        for (int step = k * kSteps; step < (k + 1) * kSteps; ++step) {
          const int c = channel(first, step);
          const auto w = weights(c);
          if (!slab) slab = source.wait();
          uint4 f[kTiles];
          load(f, slab, step % kSteps);
          use(f, c, w);
        }
        source.release();
      }
    }
  }

  // acc += W F, for this lane's share: of mma, D's fragments; else positions group + 8 j, all classes.
  using Sums = std::conditional_t<kTensorCore, float[kBlocks][kTiles][4], float[kTiles][kClasses]>;

  // What a lane needs of the weight at once: of mma, its rows of A; FMAs load all classes as they come.
  struct Rows {
    float of[kTensorCore ? kBlocks : 1][kSlots];
  };
  __device__ __forceinline__ Rows rows(int c) const {
    Rows w{};
    if constexpr (kTensorCore) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) weights.load(w.of[b], 8 * b + group, c);
    }
    return w;
  }

  __device__ __forceinline__ void accumulate(Sums& acc, const uint4 (&f)[kTiles], int c, const Rows& rows) const {
    if constexpr (kTensorCore) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const auto& w = rows.of[b];
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) split2<T>(w[2 * i], w[2 * i + 1], a[i / 2][2 * (i % 2)], a[i / 2][2 * (i % 2) + 1]);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (8 * j >= HW) break;
          mma_m16n8k16<T>(acc[b][j], a[0], {f[j].x, f[j].y});
          mma_m16n8k16<T>(acc[b][j], a[1], {f[j].z, f[j].w});
        }
      }
    } else {
#pragma unroll
      for (int l = 0; l < kClasses; ++l) {
        if (l >= p.g.L) break;
        float w[kSlots];
        weights.load(w, l, c);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          float x[kSlots];
          unpack<T>(f[j], x);
#pragma unroll
          for (int i = 0; i < kSlots; ++i) acc[j][l] = fmaf(w[i], x[i], acc[j][l]);
        }
      }
    }
  }

  __device__ __forceinline__ void pool(const uint4 (&f)[kTiles], int c) const {
    float sums[kSlots] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float x[kSlots];
      unpack<T>(f[j], x);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) sums[i] += x[i];
    }
    sum_and_spread<16, 4, kSlots>(sums, lane);
    const int slot = group * kSlots / 8;
    if (c + slot < p.g.C && group % (8 / kSlots) == 0)
      p.pooled[(view * p.g.N + pair) * p.g.C + c + slot] = sums[0] / float(HW);
  }

  // This warp's sums to its maps in shared memory.
  __device__ __forceinline__ void store(Sums& acc) const {
    Map& to = maps[warp];
    if constexpr (kTensorCore) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          float* d = acc[b][j];
          constexpr float scale = 1.0f / kLowScale<T>;
          *reinterpret_cast<float2*>(&to[8 * b + group][8 * j + 2 * quarter]) =
              make_float2(fmaf(d[2], scale, d[0]), fmaf(d[3], scale, d[1]));
        }
    } else {
      sum_and_spread<2, 1, kTiles * kClasses>(&acc[0][0], lane);
#pragma unroll
      for (int j = 0; j < kTiles / 4; ++j)
#pragma unroll
        for (int l = 0; l < kClasses; ++l) to[l][8 * (kTiles / 4 * quarter + j) + group] = acc[j][l];
    }
  }

  // Sums the maps of a view over its warps and the blocks of the cluster; all blocks get them.
  __device__ __forceinline__ void combine() const {
    float* own = &maps[0][0][0];
    __syncthreads();
    for (int e = threadIdx.x; e < views * kMap; e += kThreads) {
      float sum = own[e];
      for (int s = 1; s < kWarps / views; ++s) sum += own[s * views * kMap + e];
      own[e] = sum;
    }
    if (p.cluster > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
    if (cluster_rank() == 0 || p.cam_grad) {
      for (int e = threadIdx.x; e < views * kMap; e += kThreads) {
        float sum = 0;
        for (int r = 0; r < p.cluster; ++r) sum += *map_shared_rank(own + e, r);
        own[views * kMap + e] = sum;
      }
    }
    if (p.cluster > 1) {
      cluster_sync();  // no block leaves before its maps are read
    } else {
      __syncthreads();
    }
  }

  // Writes maps, residual, logits and losses to global memory once the maps are whole; leaves the residual in place of
  // the first view's maps.
  __device__ __forceinline__ void finish(Map* total, bool writes) const {
    const int L = p.g.L;
    REBALFER_ROLLED
    for (int row = warp; row < views * L; row += kWarps) {
      const int v = row / L, l = row % L;
      float sum = 0;
#pragma unroll 2
      for (int x = lane; x < HW; x += 32) {
        sum += total[v][l][x];
        if (p.maps && writes) p.maps[((v * p.g.N + pair) * L + l) * HW + x] = total[v][l][x];
      }
      sum = warp_sum(sum);
      if (lane == 0) shared.z[v][l] = sum / float(HW) + (p.bias.data ? Weights<T>(p.bias, L, 1).at(l, 0) : 0.0f);
    }
    __syncthreads();
    if (views == 1) return;
    float sum = 0;
    REBALFER_ROLLED
    for (int l = warp; l < L; l += kWarps) {
      const float v = __ldg(p.map_weights + l);
#pragma unroll 2
      for (int x = lane; x < HW; x += 32) {
        const float s = total[0][l][x] - total[1][l][shared.twin[x]];
        sum += consistency_term(v, s, p.p);
        total[0][l][x] = s;
        if (p.residual && writes) p.residual[(pair * L + l) * HW + x] = s;
      }
    }
    if (!writes) return;
    sum = warp_sum(sum);
    if (lane == 0) shared.sums[warp] = sum;
    const bool classified = p.targets.table;
    if (classified) {
      for (int row = threadIdx.x; row < 2 * L; row += kThreads)
        p.logits[(row / L * p.g.N + pair) * L + row % L] = shared.z[row / L][row % L];
      if (lane == 0 && warp < 2)
        shared.losses[warp] =
            warp == 1 && !p.both_views ? 0.0f : cross_entropy(shared.z[warp], target_row(p.targets, pair, L), L);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared.sums[w];
      const float cons = sum / float(L * HW), cls = shared.losses[0] + shared.losses[1];
      if (p.ticket) {
        p.per_sample[p.g.N + pair] = cons;
        if (classified) p.per_sample[pair] = cls;
      } else {
        p.consistency[pair] = cons;
        if (classified) p.classification[pair] = cls, p.loss[pair] = cls + p.consistency_weight * cons;
      }
    }
    if (!p.ticket || !is_last_block(p.ticket, p.g.N, &shared.last)) return;
    const float *cls = p.per_sample, *cons = p.per_sample + p.g.N;
    const auto give = [&](float* to, const auto& value) {
      const float mean = block_mean(p.g.N, shared.room, value);
      if (threadIdx.x == 0) *to = mean;
    };
    give(p.consistency, [&](int64_t i) { return cons[i]; });
    if (!classified) return;
    give(p.classification, [&](int64_t i) { return cls[i]; });
    give(p.loss, [&](int64_t i) { return cls[i] + p.consistency_weight * cons[i]; });
  }

  // K = <d, F> (minus the twin's): d (L, HW) of this warp's view meets each channel, a few classes at a time.
  __device__ __forceinline__ void correlate(const Map& d, const uint4 (&f)[kTiles], int c) const {
    constexpr int kTogether = 32 / kSlots;  // classes; 32 sums, of which a lane keeps 4 consecutive ones
    REBALFER_ROLLED
    for (int l0 = 0; l0 < p.g.L; l0 += kTogether) {
      float sums[kTogether][kSlots] = {};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (8 * j >= HW) break;
        float x[kSlots];
        unpack<T>(f[j], x);
#pragma unroll
        for (int l = 0; l < kTogether; ++l) {
          const float factor = d[l0 + l][8 * j + group];
#pragma unroll
          for (int i = 0; i < kSlots; ++i) sums[l][i] = fmaf(factor, x[i], sums[l][i]);
        }
      }
      sum_and_spread<16, 4, 32>(&sums[0][0], lane);
      float* own = &sums[0][0];
      if (views == 2) {
        float* exchange = &maps[0][0][0] + slice * 128 + lane;
        __syncthreads();
        if (view == 1)
#pragma unroll
          for (int i = 0; i < 4; ++i) exchange[32 * i] = own[i];
        __syncthreads();
        if (view == 1) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) own[i] += exchange[32 * i];
      }
      const int l = l0 + 4 * group / kSlots, first = c + 4 * group % kSlots;
      if (l >= p.g.L) continue;
      float* to = p.cam_grad + (pair * p.g.L + l) * p.g.C + first;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + i < p.g.C) to[i] = own[i];
    }
  }

  // total[0] (the residual) becomes the gradient of the consistency with respect to the first view's maps, total[1]
  // that of the twin's; rows and positions outside become zero.
  __device__ __forceinline__ void differentiate(Map* total) const {
    REBALFER_ROLLED
    for (int e = threadIdx.x; e < kMap; e += kThreads) {
      const int l = e / kPitch, x = e % kPitch;
      if (l >= p.g.L || x >= HW) {
        total[0][l][x] = total[views - 1][l][x] = 0;
        continue;
      }
      if (p.d_maps) {
        total[0][l][x] = p.d_maps[(pair * p.g.L + l) * HW + x];
        continue;
      }
      const float d = consistency_gradient(__ldg(p.map_weights + l), total[0][l][x], p.p) / float(p.g.L * HW);
      total[0][l][x] = d;
      total[1][l][shared.twin[x]] = -d;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run(unsigned char* memory) {
    const int all = int(ceil_div(p.g.C, channels)), each = int(ceil_div(all, p.cluster)), rank = int(cluster_rank());
    const int first = min(rank * each, all), chunks = min(each, all - first);
    const bool forward = !p.d_maps;
    if (views == 2) fill_twin_table(p.g, shared.twin);
    Source source = open(first, chunks, int(forward) + (p.cam_grad != nullptr), memory + ring_offset());
    Map* const total = maps + views;
    if (forward) {
      Sums acc = {};
      for_channels(
          source, first, chunks, [&](int c) { return rows(c); },
          [&](const uint4(&f)[kTiles], int c, const Rows& w) {
            accumulate(acc, f, c, w);
            if (p.pooled) pool(f, c);
          });
      store(acc);
      combine();
      if (rank == 0 || p.cam_grad) finish(total, rank == 0);
    }
    if (!p.cam_grad) return;
    __syncthreads();
    differentiate(total);
    for_channels(
        source, first, chunks, [](int) { return 0; },
        [&](const uint4(&f)[kTiles], int c, int) { correlate(total[view], f, c); });
  }
};

template <typename T, bool kChannelsLast, int kBlocks>
__global__ __launch_bounds__(kThreads, 4 - kBlocks) void forward_kernel(const __grid_constant__ ForwardParams p) {
  REBALFER_DYNAMIC_SHARED(unsigned char, memory);
  Forward<T, kChannelsLast, kBlocks>(p, memory).run(memory);
}

template <typename T>
void launch_forward_as(const ForwardParams& p, cudaStream_t stream) {
  const auto start = [&](auto* kernel, int64_t fixed) {
    const int HW = p.g.H * p.g.W, channels = Ring<T>::kChannels / p.g.views;
    const int64_t chunks = ((p.g.C + channels - 1) / channels + p.cluster - 1) / p.cluster;
    const int64_t ring = p.g.channels_last ? LaneRing<T>::bytes(HW)
                                           : std::min<int64_t>(chunks, Ring<T>::kStages) * Ring<T>::stage_bytes(HW);
    const dim3 blocks(unsigned(p.g.N * p.cluster));
    launch(kernel, blocks, dim3(kThreads), unsigned(p.cluster), size_t(fixed + ring), stream, p);
  };
  const bool one = p.g.L <= 8;
  if (p.g.channels_last) {
    one ? start(forward_kernel<T, true, 1>, Forward<T, true, 1>::ring_offset())
        : start(forward_kernel<T, true, 2>, Forward<T, true, 2>::ring_offset());
  } else {
    one ? start(forward_kernel<T, false, 1>, Forward<T, false, 1>::ring_offset())
        : start(forward_kernel<T, false, 2>, Forward<T, false, 2>::ring_offset());
  }
}

}  // namespace rebalfer::gpu
