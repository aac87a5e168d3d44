// The forward kernel: maps, pooled features, logits and losses of a pair of views, with the losses' gradients with
// respect to maps and logits, in one launch that reads the features once.
//
// A cluster serves one pair, then another if there are more pairs than clusters find room; each of its blocks some of
// the channels, each warp one view and 64 bytes of channels at a time (features.cuh). The blocks take turns in what
// comes after the maps, while they fetch the next pair. What a lane holds of the features, 16 bytes of consecutive
// channels at a position, is, with the channels of an mma's K axis renumbered, for the weight alike, the B operand of
// mma.m16n8k16. Its A operand holds 8 classes of the weight's high parts in rows 0-7 and of their low parts in rows
// 8-15, so a float32 weight costs no more mma than a 16-bit one. A second mma with the identity as A adds up the
// features over the tiles of 8 positions, in float32: what is left of the mean over positions is a sum of 8 numbers a
// channel. So no feature of 16 bits is ever converted. (A feature that is not finite makes the means of the channels
// that share an mma with it NaN.)
//
// float32 features take the same road with FMAs.
//
// Both views' maps are summed and subtracted at the end, on the map: taking the difference on the load would halve the
// FMAs of float32, but the maps of both views would no longer be there for the logits, for return_maps and for the
// twin's index, which moves no feature here.
//
// Order of the sums: channels of a warp, warps, blocks of the cluster; it depends only on C, H W, L, layout and dtype.
#pragma once

#include "correlation.cuh"

namespace rebalfer::gpu {

struct ForwardShared {  // the fixed part of a block's shared memory
  uint64_t full[kMostStages], gathered;
  double room[kWarps][3];
  float bias[kMaxClasses], map_weights[kMaxClasses], target[2][kMaxClasses];  // of this turn, of the next
  float sums[kWarps], classification;
  int twin[kMaxPositions], last;
};

// kPositions: H W where it is known when this is compiled, else 0. kTurns: a cluster serves several pairs. kCamGrad:
// one pair, whose features are needed once more, for the gradient of the CAM's weight.
template <typename T, bool kChannelsLast, int kBlocks, int kPositions, bool kTurns, bool kCamGrad>
struct Forward {
  static_assert(!kTurns || !kCamGrad);
  static constexpr int kTiles = ((kPositions ? kPositions : kMaxPositions) + 7) / 8;
  static constexpr int kPitch = 8 * kTiles + (kTiles % 4 ? 0 : 8);  // of a map's row: 8 rows apart hit different banks
  static constexpr int kSlots = 16 / sizeof(T);                     // channels of a lane
  static constexpr int kClasses = 8 * kBlocks;
  static constexpr int kMap = kClasses * kPitch;  // floats of one view's maps in shared memory
  static constexpr bool kTensorCore = sizeof(T) == 2;
  // Blocks that a multiprocessor is to hold.
  static constexpr bool kMany = kPositions && (kTensorCore || kChannelsLast);
  static constexpr int kResident = kBlocks == 2 ? 2 : kMany ? 4 : 3;
  // As the compiler has it: before sm_90 some have too few registers for that.
  static constexpr int kBound = kMany && !REBALFER_HAS_BULK && (kTurns || kCamGrad || !kTensorCore) ? 3 : kResident;
  // Whether a step's place is given to the next before the means of its channels are written; elsewhere the compiler
  // has too few registers for that too.
  static constexpr bool kFetchFirst = kChannelsLast || kTurns;
  using Map = float[kClasses][kPitch];
  using Source = std::conditional_t<kChannelsLast, LaneRing<T, kTiles>, SlabRing<T, kTiles>>;

  static __host__ __device__ int64_t maps_offset() { return (sizeof(ForwardShared) + 127) / 128 * 128; }
  static __host__ __device__ int64_t ring_offset() { return maps_offset() + kWarps * kMap * sizeof(float); }
  // Where the blocks of the cluster push their maps.
  static __host__ __device__ int64_t inbox_offset(int64_t HW, int stages) {
    return ring_offset() + (Source::bytes(HW, stages) + 127) / 128 * 128;
  }
  static int64_t shared_bytes(int64_t HW, int stages, int cluster_bits) {
    return inbox_offset(HW, stages) + (cluster_bits ? int64_t(sizeof(float[2][kMap])) << cluster_bits : 0);
  }
  // The clusters that find room at once.
  static int64_t room(const ForwardParams& p, const Multiprocessors& on) {
    constexpr int64_t kReserved = 1024;  // of each block's, by CUDA
    const int64_t bytes = shared_bytes(p.g.H * p.g.W, p.stages, p.cluster_bits) + kReserved;
    return on.count * std::min<int64_t>(kResident, on.shared_bytes / bytes) >> p.cluster_bits;
  }

  const ForwardParams& p;
  const Weights<T> weights;
  ForwardShared& shared;
  Map* const maps;      // of each warp, then summed over the warps of a view in place
  Map* const total;     // of each view, over the cluster
  Map* const gradient;  // of the consistency with respect to each view's maps: where those of the warps were
  unsigned pair;        // that is served now
  const int HW, L, views;
  const Place at;
  const Channels channels;
  const int rank;

  __device__ __forceinline__ Forward(const ForwardParams& p, unsigned char* memory)
      : p(p), weights(p.weight, p.g.L, p.g.C), shared(*reinterpret_cast<ForwardShared*>(memory)),
        maps(reinterpret_cast<Map*>(memory + maps_offset())), total(maps + p.g.views), gradient(maps),
        pair(blockIdx.x >> p.cluster_bits), HW(kPositions ? kPositions : p.g.H * p.g.W), L(p.g.L), views(p.g.views),
        at(p.g.views), channels(Channels::of<T>(p.g, int(cluster_rank()), p.cluster_bits)), rank(int(cluster_rank())) {}

  __device__ __forceinline__ int lane_channel() const {
    return channels.first + at.slice * (kStepBytes / int(sizeof(T))) + at.quarter * kSlots;
  }
  __device__ __forceinline__ bool classified() const { return p.targets.table; }

  // The blocks of a cluster, and which of its pairs are this block's turns: every size-th from its rank on; all blocks
  // have one where the features are needed once more.
  __device__ __forceinline__ unsigned size() const { return 1u << p.cluster_bits; }
  __device__ __forceinline__ bool has_turn(unsigned k) const {
    return kCamGrad || (k & (size() - 1)) == unsigned(rank);
  }
  __device__ __forceinline__ bool has_turns() const {  // from the first pair on
    return kCamGrad || (kTurns ? pair + rank * p.turns.clusters < p.g.N : rank == 0);
  }
  __device__ __forceinline__ unsigned parity(unsigned k) const { return k >> p.cluster_bits & 1; }

  // What the end needs besides the maps, a value of each class and kind by a thread of its own; it arrives while the
  // features do.
  enum Kind { kTarget = 2, kBias = 4, kMapWeight = 6 };  // of 16 threads each, in warps of their own but the first
  __device__ __forceinline__ float fetch() const {
    const int l = threadIdx.x % kMaxClasses;
    float fetched = 0;
    switch (threadIdx.x / kMaxClasses) {
      case kTarget: fetched = target(kCamGrad ? pair : pair + rank * p.turns.clusters, l); break;
      case kBias: fetched = p.bias.data ? Weights<T>(p.bias, L, 1).at(l, 0) : 0.0f; break;
      case kMapWeight: fetched = l < L && p.map_weights ? __ldg(p.map_weights + l) : 0.0f; break;
      default: break;
    }
    if (views == 2 && threadIdx.x >= kThreads - kMaxPositions) {
      const int x = threadIdx.x - (kThreads - kMaxPositions), row = int(__fdividef(float(x) + 0.5f, float(p.g.W)));
      shared.twin[x] = x < HW ? int(twin_index(p.g.twin, row, x - row * p.g.W)) : x;
    }
    return fetched;
  }
  __device__ __forceinline__ void put(float fetched) const {
    const int l = threadIdx.x % kMaxClasses;
    switch (threadIdx.x / kMaxClasses) {
      case kTarget: shared.target[0][l] = fetched; break;
      case kBias: shared.bias[l] = fetched; break;
      case kMapWeight: shared.map_weights[l] = fetched; break;
      default: break;
    }
  }
  __device__ __forceinline__ float target(unsigned of, int l) const {
    return l < L && classified() && of < p.g.N ? target_row(p.targets, of, L)[l] : 0.0f;
  }

  // A lane's share of the maps: of mma, D's fragments; else positions group + 8 j, all classes, of its own channels.
  using Sums = std::conditional_t<kTensorCore, float[kBlocks][kTiles][4], float[kTiles][kClasses]>;

  // A lane's share of the weight: of mma, a row of A for each 8 classes; else all classes. Its bits only, so that
  // nobody waits for them before the features are there.
  struct Rows {
    typename WeightCursor<T>::Bits of[kTensorCore ? kBlocks : kClasses];
  };
  __device__ __forceinline__ Rows rows(const WeightCursor<T>& cursor) const {
    Rows w;
#pragma unroll
    for (int k = 0; k < int(sizeof w.of / sizeof w.of[0]); ++k) w.of[k] = cursor.bits(kTensorCore ? 8 * k : k);
    return w;
  }

  // A of mma, 8 classes each, for channels 0-3 of each lane and for channels 4-7.
  struct Fragments {
    uint32_t a[kBlocks][2][4];
  };
  __device__ __forceinline__ Fragments fragments(const Rows& w, bool floats) const {
    Fragments f;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const auto word = [&](int i) { return word_of(w.of[b].of[i / 4], i % 4); };
      const auto pair = [](int i) { return pair_of_word<kChannelsLast>(i); };
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t (&a)[4] = f.a[b][half];
        if (floats) {  // high parts in rows 0-7, low parts in rows 8-15
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int i = 2 * pair(2 * half + k);
            split2<T>(__uint_as_float(word(i)), __uint_as_float(word(i + 1)), a[2 * k], a[2 * k + 1]);
          }
        } else {  // nobody wants rows 8-15, which are the other channels': no zeros need be made
#pragma unroll
          for (int k = 0; k < 2; ++k) a[2 * k] = word(pair(2 * half + k)), a[2 * k + 1] = word(pair(2 - 2 * half + k));
        }
      }
    }
    return f;
  }

  // A step's share of the maps and of the means over positions.
  // `w` becomes the next step's, whose loads are under way meanwhile; after the `last`, the first's.
  template <typename Pool>
  __device__ __forceinline__ void accumulate(Sums& acc, Pool& pool, const Source& source, Rows& w,
                                             WeightCursor<T>& cursor, bool last) const {
    const auto next = [&] {
      if (kTurns && last) {
        cursor.rewind(channels.steps);
      } else {
        cursor.advance();
      }
      w = rows(cursor);
    };
    if constexpr (kTensorCore) {
      const Fragments by = fragments(w, cursor.floats);
      next();
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 f = source.tile(j);
        const uint32_t halves[2][2] = {{f.x, f.y}, {f.z, f.w}};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma_m16n8k16<T>(pool.sums[half], pool.identity, halves[half]);
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) mma_m16n8k16<T>(acc[b][j], by.a[b][half], halves[half]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float x[kSlots];
        unpack<T>(source.tile(j), x);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) pool.sums[0][i] += x[i];
#pragma unroll
        for (int l = 0; l < kClasses; ++l) {
          if (l >= L) break;
          float of_class[kSlots];
          unpack<T>(w.of[l].of[0], of_class);
#pragma unroll
          for (int i = 0; i < kSlots; ++i) acc[j][l] = fmaf(of_class[i], x[i], acc[j][l]);
        }
      }
      next();
    }
  }

  // The means over positions, a channel each lane (of float32: each second lane).
  struct Pool {
    // A of mma, with a one in each row and column. Which column of a row is chosen so that each of a lane's registers
    // is another function of the lane: the compiler would not keep constants, but make them anew at every step.
    uint32_t identity[4];
    float sums[2][4] = {};  // of mma, D's fragments; else of each channel
    float* to;
    int c;
    bool writes;

    __device__ __forceinline__ Pool(const Forward& f)
        : c(f.lane_channel()), writes(f.p.pooled && (kTensorCore || f.at.group % 2 == 0)) {
      const int g = f.at.group, q = f.at.quarter;
      if constexpr (kTensorCore) {
        const int columns[2] = {g < 4 ? g : g + 8, g < 4 ? 8 + (g ^ 1) : g ^ 1};  // of rows g and g + 8
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = columns[i % 2] - 8 * (i / 2);
          identity[i] = k >= 0 && k / 2 == q ? (k % 2 ? pack2<T>(0.0f, 1.0f) : pack2<T>(1.0f, 0.0f)) : 0;
        }
        // Column k of A is a channel of lane k % 8 / 2: of its words 0 and 2, or from column 8 on 1 and 3.
        const int k = q % 2 ? columns[1] : columns[0];
        c += 8 * (k % 8 / 2 - q) + 2 * pair_of_word<kChannelsLast>(2 * (q / 2) + k / 8) + k % 2;
      } else {
        c += g / 2;
      }
      to = f.p.pooled + (f.at.view * f.p.g.N + f.pair) * f.p.g.C + c;
    }

    // Of the channels whose sums were added up; then come the next.
    __device__ __forceinline__ void write(const Forward& of) {
      float own[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        own[i] = kTensorCore ? sums[i / 2][2 * (i % 2)] + sums[i / 2][2 * (i % 2) + 1] : sums[0][i];
      kTensorCore ? sum_and_spread<2, 1, 4>(own, of.at.lane) : sum_and_spread<16, 4, 4>(own, of.at.lane);
      if (writes && c < of.p.g.C) *to = own[0] * (1.0f / float(of.HW));
      to += of.channels.width, c += of.channels.width;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0;
    }
    // The first channels again, of the next pair.
    __device__ __forceinline__ void rewind(const Forward& of) {
      const int all = of.channels.steps * of.channels.width;
      to += int64_t(of.p.turns.clusters) * of.p.g.C - all, c -= all;
    }
  };

  // This warp's sums to its maps in shared memory.
  __device__ __forceinline__ void store(Sums& acc, bool floats, const Place& at) const {
    Map& to = maps[at.warp];
    if constexpr (kTensorCore) {
      const auto give = [&](const auto& sum) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
            *reinterpret_cast<float2*>(&to[8 * b + at.group][8 * j + 2 * at.quarter]) =
                make_float2(sum(acc[b][j], 0), sum(acc[b][j], 1));
      };
      constexpr float scale = 1.0f / kLowScale<T>;
      if (floats) {
        give([](const auto& d, int i) { return fmaf(d[2 + i], scale, d[i]); });
      } else {
        give([](const auto& d, int i) { return d[i]; });
      }
    } else {
#pragma unroll
      for (int l = 0; l < kClasses; l += 4)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          sum_and_spread<2, 1, 4>(&acc[j][l], at.lane);
          to[l + at.quarter][8 * j + at.group] = acc[j][l];
        }
    }
  }

  static constexpr int kVectors = 2 * kMap / 4, kRounds = (kVectors + kThreads - 1) / kThreads;

  // use(e, sum) for the elements of both views' maps, 4 floats each, that are this thread's, and their sums.
  using OwnSums = float4[kRounds];
  template <typename Use>
  __device__ __forceinline__ void for_own_vectors(OwnSums& sums, int thread, const Use& use) const {
#pragma unroll
    for (int k = 0; k < kRounds; ++k)
      if (const int e = thread + k * kThreads; e < (views == 2 ? kVectors : kVectors / 2)) use(e, sums[k]);
  }
  // The sum of from[i stride + e] over i < n, in this order.
  template <int n>
  static __device__ __forceinline__ float4 sum_of(const float4* from, int stride, int e) {
    float4 x[n];
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = from[i * stride + e];
#pragma unroll
    for (int i = 1; i < n; ++i) x[0].x += x[i].x, x[0].y += x[i].y, x[0].z += x[i].z, x[0].w += x[i].w;
    return x[0];
  }

  // The inbox is to take the maps of the cluster's other blocks, once; by one thread.
  __device__ __forceinline__ void expect() const {
    mbarrier_arrive_expect_tx(&shared.gathered, views * sizeof(float[kMap]) * (size() - 1));
  }

  // Sums the k-th pair's maps over the warps of a view and the blocks of the cluster, for the block whose turn it is,
  // or for all. A block pushes a pair's maps after it has used those of its own turn before, which a block waits for
  // before it has a turn again: so the inbox is free.
  __device__ __forceinline__ void combine(unsigned k, int thread) const {
    const float4* const own = reinterpret_cast<const float4*>(maps);
    float4* const whole = reinterpret_cast<float4*>(total);
    __syncthreads();
    OwnSums sums;
    for_own_vectors(sums, thread, [&](int e, float4& sum) {
      sum = views == 2 ? sum_of<kWarps / 2>(own, kVectors, e) : sum_of<kWarps>(own, kVectors / 2, e);
    });
    if (p.cluster_bits) {
      // Of each of the cluster's blocks, both views.
      float4* const inbox =
          reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(&shared) + inbox_offset(HW, p.stages));
      if (k == 0) cluster_wait();  // for the other blocks' first expect()
      const int first = kCamGrad ? 0 : int(k & (size() - 1)), receivers = kCamGrad ? int(size()) : 1;
      REBALFER_ROLLED
      for (int r = first; r < first + receivers; ++r)
        for_own_vectors(sums, thread, [&](int e, const float4& sum) {
          float4* const to = inbox + rank * kVectors + e;
          r == rank ? void(*to = sum) : push_16B(to, sum, r, &shared.gathered);
        });
      if (!has_turn(k)) return;
      mbarrier_wait_parity<true>(&shared.gathered, parity(k));
      if (thread == 0 && pair + size() * p.turns.clusters < p.g.N) expect();
      for_own_vectors(sums, thread, [&](int e, float4& sum) {
        sum = p.cluster_bits == 1 ? sum_of<2>(inbox, kVectors, e) : sum_of<4>(inbox, kVectors, e);
      });
    }
    for_own_vectors(sums, thread, [&](int e, const float4& sum) { whole[e] = sum; });
    __syncthreads();
  }

  // The maps, where they are wanted.
  __device__ __forceinline__ void write_maps(int thread) const {
    REBALFER_ROLLED
    for (int row = thread / 8; row < views * kClasses; row += kThreads / 8) {
      const int v = row / kClasses, l = row % kClasses;
      if (l >= L) continue;
      float* const to = p.maps + ((v * p.g.N + pair) * L + l) * HW;
      REBALFER_ROLLED
      for (int x = thread % 8; x < HW; x += 8) to[x] = total[v][l][x];
    }
  }

  // This warp's share of the consistency (Eq. 5), by all warps but the last, and its gradient with respect to the first
  // view's maps, in gradient[0] where the features are needed once more.
  __device__ __forceinline__ void compare_maps(bool writes, const Place& at) const {
    constexpr int kLanes = (kThreads - 32) / kClasses, kEach = (8 * kTiles + kLanes - 1) / kLanes;  // of a row
    const int l = at.thread / kLanes, x0 = at.thread % kLanes;
    float sum = 0;
    if (l < L) {
      const float v = shared.map_weights[l], share = 1.0f / float(L * HW);
      float s[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k)
        if (const int x = x0 + k * kLanes; x < HW) s[k] = total[0][l][x] - total[1][l][shared.twin[x]];
      float* const to = p.map_grad + (int64_t(pair) * L + l) * HW + x0;
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        if (const int x = x0 + k * kLanes; x < HW) {
          sum += consistency_term(v, s[k], p.p);
          const float d = share * consistency_gradient(v, s[k], p.p);
          if (kCamGrad) gradient[0][l][x] = d;
          if (p.map_grad && writes) to[k * kLanes] = d;
        }
      }
    }
    sum = warp_sum(sum);
    if (at.lane == 0) shared.sums[at.warp] = sum;
  }

  // By one warp, half a warp a view: the logit of class lane % kClasses. Positions outside are zero, so whole rows are
  // added up.
  __device__ __forceinline__ float logit(const Place& at) const {
    constexpr int kParts = 16 / kClasses, kEach = 2 * kTiles / kParts;  // of a row; vectors of a part
    const int l = at.lane % kClasses;
    const float4* const row = reinterpret_cast<const float4*>(total[at.lane / 16][l]) + at.lane % 16 / kClasses * kEach;
    const float4 of = sum_of<kEach>(row, 1, 0);
    float sum = (of.x + of.y) + (of.z + of.w);
    if (kParts == 2) sum += __shfl_xor_sync(kAll, sum, kClasses);
    return sum * (1.0f / float(HW)) + shared.bias[l];
  }

  // By one warp, half a warp a view, a lane a class: the sum of the cross-entropies (Eq. 1), for its first lane, and
  // their gradients with respect to the logits. As head_math.h's cross_entropy and cross_entropy_gradient, but that
  // sum_l t_l (log sum - (z_l - top)) is taken apart, so that all sums over classes are under way at once.
  __device__ __forceinline__ float classify(const float* target, const Place& at) const {
    const int v = at.lane / 16, l = at.lane % 16;
    const float own = logit(at), z = l < L ? own : -INFINITY, t = l < L ? target[l] : 0.0f;
    const int64_t to = (v * p.g.N + pair) * L + l;
    if (l < L) p.logits[to] = z;
    float top = z;
#pragma unroll
    for (int bit = kClasses / 2; bit; bit /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, bit));
    const float below = z - top, e = l < L ? std::exp(below) : 0.0f;
    float sum = e, all = t, of_targets = t != 0 ? t * below : 0.0f;
#pragma unroll
    for (int bit = kClasses / 2; bit; bit /= 2) {
      sum += __shfl_xor_sync(kAll, sum, bit);
      all += __shfl_xor_sync(kAll, all, bit);
      of_targets += __shfl_xor_sync(kAll, of_targets, bit);
    }
    const bool counts = v == 0 || p.both_views;
    if (p.logit_grad && l < L) p.logit_grad[to] = counts ? all * __fdividef(e, sum) - t : 0.0f;
    const float own_view = counts ? all * std::log(sum) - of_targets : 0.0f;
    return own_view + __shfl_xor_sync(kAll, own_view, 16);
  }

  // This pair's losses, by one thread.
  __device__ __forceinline__ void write_losses() const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps - 1; ++w) sum += shared.sums[w];
    const float consistency = __fdividef(sum, float(L * HW)), classification = shared.classification;
    if (p.ticket) {
      p.per_sample[p.g.N + pair] = consistency;
      p.per_sample[pair] = classification;
    } else {
      p.consistency[pair] = consistency;
      if (classified())
        p.classification[pair] = classification, p.loss[pair] = classification + p.consistency_weight * consistency;
    }
  }

  // The batch's losses, by the last block of those that had a turn.
  __device__ __forceinline__ void write_means() const {
    if (!is_last_block(p.ticket, p.turns.ending, &shared.last)) return;
    block_means<3>(
        p.g.N, shared.room,
        [&](int64_t i, float* v) {
          v[0] = p.per_sample[i], v[1] = p.per_sample[p.g.N + i], v[2] = v[0] + p.consistency_weight * v[1];
        },
        [&](int k, float mean) {
          float* const to = k == 0 ? p.classification : k == 1 ? p.consistency : p.loss;
          if (k == 1 || classified()) *to = mean;
        });
  }

  // From the whole maps on. The last warp has the logits' part, while the others have the maps', and fetches what it
  // needs for the block's next turn.
  __device__ __forceinline__ void finish(unsigned k, bool writes, const Place& at) const {
    if (p.maps && writes) write_maps(at.thread);
    if (views == 1) return;
    if (at.warp < kWarps - 1) {
      compare_maps(writes, at);
    } else if (writes) {
      const float classification = classified() ? classify(shared.target[parity(k)], at) : 0.0f;
      if (at.lane == 0) shared.classification = classification;
    }
    if (!writes) return;
    __syncthreads();
    if (at.thread == 0) write_losses();
    if (kTurns && at.warp == kWarps - 1 && at.lane < kMaxClasses)
      shared.target[parity(k) ^ 1][at.lane] = target(pair + size() * p.turns.clusters, at.lane);
  }

  // K = <d, F> - <d~, F~>, of the features of a step: d (L, HW) of this warp's view meets each channel.
  __device__ __forceinline__ void correlate(const Map& d, const uint4 (&f)[kTiles], int c) const {
    using Products = Correlation<T, kChannelsLast, kTiles>;
    REBALFER_ROLLED
    for (int l0 = 0; l0 < L; l0 += Products::kTogether) {
      float own[4];
      Products::sums(d, f, l0, at, own);
      float* exchange = &total[0][0][0] + at.slice * 128 + at.lane;
      __syncthreads();
      if (at.view == 1)
#pragma unroll
        for (int i = 0; i < 4; ++i) exchange[32 * i] = own[i];
      __syncthreads();
      if (at.view == 1) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) own[i] += exchange[32 * i];
      Products::write(p.cam_grad + int64_t(pair) * L * p.g.C, p.g, l0, c, at, own);
    }
  }

  // gradient[0] is that of the consistency with respect to the first view's maps; gradient[1] becomes that with respect
  // to the twin's. Rows and positions outside become zero in both.
  __device__ __forceinline__ void differentiate_twin() const {
    REBALFER_ROLLED
    for (int e = threadIdx.x; e < kMap; e += kThreads) {
      const int l = e / kPitch, x = e % kPitch;
      if (l >= L || x >= HW) {
        gradient[0][l][x] = gradient[1][l][x] = 0;
        continue;
      }
      gradient[1][l][shared.twin[x]] = -gradient[0][l][x];
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run(unsigned char* memory) {
    if (p.cluster_bits && threadIdx.x == 0) {
      mbarrier_init(&shared.gathered, 1);
      mbarrier_fence_init();
      expect();
    }
    // Pairs of a cluster. For channels_last this is asked, though kTurns says it: the code takes fewer registers so.
    const bool several = kChannelsLast ? p.g.N > p.turns.clusters : kTurns;
    Source source(p.g, static_cast<const T*>(p.features), pair, channels, at, HW,
                  kCamGrad ? 2 : p.turns.each + (pair < p.turns.rest), several ? p.turns.clusters : 0, p.stages,
                  memory + ring_offset(), shared.full, p.copies);
    if (p.cluster_bits) cluster_arrive();
    WeightCursor<T> cursor(weights, kTensorCore ? at.group : 0, lane_channel(), channels.width);
    Rows w = rows(cursor);
    const float fetched = has_turns() ? fetch() : 0.0f;
    Pool pool(*this);
    if (channels.steps) source.wait();
    if (has_turns()) put(fetched);
    REBALFER_ROLLED
    for (unsigned k = 0;; ++k) {
      Sums acc = {};
      REBALFER_ROLLED
      for (int step = 0; step < channels.steps; ++step) {
        source.wait();
        accumulate(acc, pool, source, w, cursor, step + 1 == channels.steps);
        if (kFetchFirst) source.release();
        pool.write(*this);
        if (!kFetchFirst) source.release();
      }
      if (k) __syncthreads();  // the maps of the pair before have been used
      const Place now(views, thread_index_anew());
      store(acc, cursor.floats, now);
      combine(k, now.thread);
      if (has_turn(k)) finish(k, !kCamGrad || rank == 0, now);
      if (!kTurns || pair + p.turns.clusters >= p.g.N) {
        if (p.ticket && unsigned(rank) <= k) write_means();
        break;
      }
      pair += p.turns.clusters;
      pool.rewind(*this);
    }
    if constexpr (kCamGrad) add_cam_gradient(source);
  }

  // After the maps: the features once more, for the gradient of the CAM's weight.
  __device__ __forceinline__ void add_cam_gradient(Source& source) const {
    source.rewind();
    __syncthreads();
    differentiate_twin();
    REBALFER_ROLLED
    for (int step = 0, c = lane_channel(); step < channels.steps; ++step, c += channels.width) {
      source.wait();
      uint4 f[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) f[j] = source.tile(j);
      correlate(gradient[at.view], f, c);
      source.release();
    }
  }
};

template <typename T, bool kChannelsLast, int kBlocks, int kPositions, bool kTurns, bool kCamGrad>
__global__ __launch_bounds__(kThreads,
                             Forward<T, kChannelsLast, kBlocks, kPositions, kTurns,
                                     kCamGrad>::kBound) void forward_kernel(const __grid_constant__ ForwardParams p) {
  REBALFER_DYNAMIC_SHARED(unsigned char, memory);
  wait_for_previous();
  next_may_start();
  Forward<T, kChannelsLast, kBlocks, kPositions, kTurns, kCamGrad>(p, memory).run(memory);
}

// Of float32 the sums need all registers: there a cluster always serves one pair, and so before sm_90.
template <typename T>
constexpr bool kMayTakeTurns = sizeof(T) == 2;

template <typename T>
void launch_forward_as(const ForwardParams& p, const Multiprocessors& on, cudaStream_t stream) {
  const int HW = p.g.H * p.g.W;
  with_instance(p.g.channels_last, p.g.L, HW, [&]<bool kChannelsLast, int kBlocks, int kPositions>() {
    const auto launch_as = [&]<bool kTurns, bool kCamGrad>(int64_t clusters) {
      using Instance = Forward<T, kChannelsLast, kBlocks, kPositions, kTurns, kCamGrad>;
      ForwardParams own = p;
      own.copies = copies<T>(p.features, p.g);
      own.turns = Turns::of(p.g.N, clusters, 1u << p.cluster_bits);
      launch(forward_kernel<T, kChannelsLast, kBlocks, kPositions, kTurns, kCamGrad>,
             dim3(own.turns.clusters << p.cluster_bits), dim3(kThreads), 1u << p.cluster_bits,
             size_t(Instance::shared_bytes(HW, p.stages, p.cluster_bits)), stream, p.early, own);
    };
    if (p.cam_grad) return launch_as.template operator()<false, true>(p.g.N);
    if constexpr (kMayTakeTurns<T>) {
      const int64_t room = Forward<T, kChannelsLast, kBlocks, kPositions, true, false>::room(p, on);
      if (p.early && p.cluster_bits <= kMostTurnsBits && p.g.N > room)
        return launch_as.template operator()<true, false>(room);
    }
    launch_as.template operator()<false, false>(p.g.N);
  });
}

template <typename T>
void visit_forward_kernels_as(const Visit& visit) {
  with_every_instance([&]<bool kChannelsLast, int kBlocks, int kPositions>(int HW) {
    const auto visit_as = [&]<bool kTurns, bool kCamGrad>() {
      using Instance = Forward<T, kChannelsLast, kBlocks, kPositions, kTurns, kCamGrad>;
      visit(reinterpret_cast<const void*>(forward_kernel<T, kChannelsLast, kBlocks, kPositions, kTurns, kCamGrad>),
            size_t(Instance::shared_bytes(HW, kMostStages, kMaxClusterBits)));
    };
    visit_as.template operator()<false, false>();
    visit_as.template operator()<false, true>();
    if constexpr (kMayTakeTurns<T>) visit_as.template operator()<true, false>();
  });
}

}  // namespace rebalfer::gpu
