// How the features of a pair come to the lanes of the forward kernel: through rings in shared memory, some steps ahead.
//
// A step of a block is kStepBytes of channels for each of its warps; a warp has one view. Its 8 groups of 4 lanes hold
// the positions group, group + 8, ..., lane `quarter` of a group 16 bytes of consecutive channels. Positions and
// channels outside are zero.
#pragma once

#include "kernels_common.cuh"

namespace rebalfer::gpu {

constexpr int kStepBytes = 64;

// Where a warp is in its block, and a lane in its warp.
struct Place {
  int thread, lane, warp, group, quarter, view, slice, views;

  __device__ __forceinline__ explicit Place(int views) : Place(views, int(threadIdx.x)) {}
  // With an unsigned index the divisions take fewer instructions but more registers, of which the forward has none to
  // spare.
  template <typename Index>
  __device__ __forceinline__ Place(int views, Index thread)
      : thread(thread), lane(thread % 32), warp(thread / 32), group(thread % 32 / 4), quarter(thread % 4),
        view(views == 2 ? thread / 32 % 2 : 0), slice(views == 2 ? thread / 64 : thread / 32), views(views) {}
};

// The channels of a block: `steps` times `width` from `first` on, of C.
struct Channels {
  int C, width, first, steps;

  // log2 of the width.
  template <typename T>
  static __host__ __device__ __forceinline__ int width_bits(int views) {
    static_assert(kWarps == 4 && kStepBytes / sizeof(T) == (sizeof(T) == 2 ? 32 : 16));
    return (sizeof(T) == 2 ? 5 : 4) + (views == 2 ? 1 : 2);
  }

  // Of the block `rank` of 2^cluster_bits, which differ by one step at most.
  template <typename T>
  static __device__ __forceinline__ Channels of(const Geometry& g, int rank, int cluster_bits) {
    const int bits = width_bits<T>(g.views);
    const int all = (g.C + (1 << bits) - 1) >> bits;
    const int each = all >> cluster_bits, rest = all - (each << cluster_bits);
    Channels channels{g.C, 1 << bits, (rank * each + min(rank, rest)) << bits, each + int(rank < rest)};
    keep(channels.width), keep(channels.steps);
    return channels;
  }
};

// Which of a lane's pairs of 16-bit channels is the i-th word that it has of a position; float32 are in order.
template <bool kChannelsLast>
__host__ __device__ constexpr int pair_of_word(int i) {
  return kChannelsLast ? i : i / 2 + 2 * (i % 2);  // of NCHW it is ours to choose: see Forward::accumulate
}

// 16 bytes of elements get(0), get(1), ...
template <typename T, typename Get>
__device__ __forceinline__ uint4 gather(const Get& get) {
  uint32_t r[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      r[i] = __float_as_uint(get(i));
    } else {
      r[i] = uint32_t(get(2 * i).bits) | uint32_t(get(2 * i + 1).bits) << 16;
    }
  }
  return uint4{r[0], r[1], r[2], r[3]};
}

// How the slabs of NCHW come; of channels_last each lane finds its own way.
template <typename T>
Copies copies(const void* features, const Geometry& g) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(features) % 16 == 0 && int64_t(g.C) * g.H * g.W * int64_t(sizeof(T)) % 16 == 0;
  const int bits = Channels::width_bits<T>(g.views);
  if (!aligned) return Copies::kElements;
  return g.C % (1 << bits) == 0 ? Copies::kBulk : Copies::kVectors;
}

// Until the oldest of `stages` groups of this thread's copies has come.
__device__ __forceinline__ void wait_for_oldest(int stages) {
  if (stages == kMostStages) {
    cp_async_wait<kMostStages - 1>();
  } else {
    cp_async_wait<kMostStages / 2 - 1>();
  }
}

// channels_last: this lane's 16-byte pieces, `passes` times over, `jump` pairs further each time. What a lane copies
// only it reads, so shared memory serves as more registers and no barrier is needed. If all steps of the same pair fit
// they are fetched once and stay.
template <typename T, int kTiles>
class LaneRing {
 public:
  static __host__ __device__ int64_t bytes(int64_t, int stages) { return int64_t(stages) * kWarps * kTiles * 32 * 16; }

  __device__ __forceinline__ LaneRing(const Geometry& g, const T* features, int64_t pair, const Channels& channels,
                                      const Place& at, int HW, unsigned passes, unsigned jump, int stages,
                                      unsigned char* room, uint64_t*, Copies)
      : pieces_(shared_address(room + (at.warp * kTiles * 32 + at.lane) * 16)),
        source_(features + (at.view * g.N + pair) * int64_t(g.C) * HW + int64_t(at.group) * g.C),
        next_(channels.first + at.slice * (kStepBytes / int(sizeof(T))) + at.quarter * kSlots), C_(g.C),
        width_(channels.width), HW_(HW), group_(at.group), jump_(jump), steps_(channels.steps), stages_(stages),
        total_(!jump && channels.steps <= stages ? channels.steps : channels.steps * passes), left_(channels.steps),
        aligned_(g.C % kSlots == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0) {
    keep(total_);
    REBALFER_ROLLED
    for (unsigned s = 0; s < stages_; ++s) issue(s);
  }

  // Until the next step's features are there: of this lane's position in a tile of 8, and its channels.
  __device__ __forceinline__ void wait() const { wait_for_oldest(stages_); }
  __device__ __forceinline__ uint4 tile(int j) const { return load_shared_16B(piece(taken_) + 512 * j); }
  // What was taken may be overwritten.
  __device__ __forceinline__ void release() { issue(taken_++ + stages_); }
  // The next pass begins.
  __device__ __forceinline__ void rewind() {
    if (total_ == steps_) taken_ = 0;
  }

 private:
  static constexpr int kSlots = 16 / sizeof(T);

  SharedAddress pieces_;
  const T* source_;  // the lane's first position
  int next_;         // the first of the lane's channels that it fetches next
  const int C_, width_, HW_, group_;
  const unsigned jump_, steps_, stages_;
  unsigned total_, left_;  // of all steps; of those of a pass, which are still to be fetched
  const bool aligned_;
  unsigned taken_ = 0;

  __device__ __forceinline__ bool inside(int tile) const { return 8 * tile + 8 <= HW_ || 8 * tile + group_ < HW_; }
  __device__ __forceinline__ SharedAddress piece(unsigned use) const {
    return pieces_ + (use & (stages_ - 1)) * (kWarps * kTiles * 512);
  }

  __device__ __forceinline__ void issue(unsigned step) {
    if (step < total_) {
      const SharedAddress to = piece(step);
      const T* const from = source_ + next_;
      if (aligned_) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          cp_async_16B(to + 512 * j, from + int64_t(C_) * (8 * j), next_ < C_ && inside(j));
      } else {
        REBALFER_ROLLED
        for (int j = 0; j < kTiles; ++j)
          store_shared_16B(to + 512 * j, gather<T>([&](int i) {
                             return next_ + i < C_ && inside(j) ? from[int64_t(C_) * (8 * j) + i] : T{};
                           }));
      }
      next_ += width_;
      if (--left_ == 0) {
        left_ = steps_;
        next_ -= int(steps_) * width_;
        source_ += int64_t(jump_) * (C_ * HW_);
      }
    }
    cp_async_commit();
  }
};

// NCHW: slabs of whole channels, `passes` times over, `jump` pairs further each time; a stage holds a step's channels
// of each view. If all slabs of the same pair fit into the stages they are fetched once and stay.
template <typename T, int kTiles>
class SlabRing {
 public:
  static __host__ __device__ int64_t bytes(int64_t HW, int stages) { return stages * kWarps * kStepBytes * HW; }

  __device__ __forceinline__ SlabRing(const Geometry& g, const T* features, int64_t pair, const Channels& channels,
                                      const Place& at, int HW, unsigned passes, unsigned jump, int stages,
                                      unsigned char* room, uint64_t* full, Copies how)
      : room_(reinterpret_cast<T*>(room)),
        own_(room_ + at.group +
             (at.view * channels.width + at.slice * (kStepBytes / int(sizeof(T))) + at.quarter * kSlots) * HW),
        full_(full), source_(features + pair * int64_t(g.C) * HW), to_twin_(g.N * g.C * HW), channels_(channels),
        HW_(HW), views_(at.views), group_(at.group), jump_(jump), stages_(stages),
        total_(!jump && channels.steps <= stages ? channels.steps : channels.steps * passes), next_(channels.first),
        how_(how == Copies::kBulk && !REBALFER_HAS_BULK ? Copies::kVectors : how) {
    keep(total_);
    if (how_ == Copies::kBulk) {  // a warp each stage, all at once; then only the first thread goes on
      static_assert(kMostStages <= kWarps);
      if (at.lane == 0 && unsigned(at.warp) < stages_) {
        mbarrier_init(full_ + at.warp, 1);
        mbarrier_fence_init();
        REBALFER_ROLLED
        for (int s = 0; s < at.warp; ++s) advance();
        if (unsigned(at.warp) < total_) copy_bulk(at.warp);
        REBALFER_ROLLED
        for (unsigned s = at.warp; s < stages_; ++s) advance();
      }
      __syncthreads();
      return;
    }
    REBALFER_ROLLED
    for (unsigned s = 0; s < stages_; ++s) issue(s);
  }

  __device__ __forceinline__ void wait() const {
    if (how_ == Copies::kBulk) {
      mbarrier_wait_parity(full_ + slot(taken_), (taken_ & stages_) != 0);
    } else {
      wait_for_oldest(stages_);
      __syncthreads();
    }
  }
  __device__ __forceinline__ uint4 tile(int j) const {
    const T* const row = own_ + slot(taken_) * stage_elements();
    return gather<T>([&](int i) {
      const int channel = sizeof(T) == 4 ? i : 2 * pair_of_word<false>(i / 2) + i % 2;
      return inside(j) ? row[channel * HW_ + 8 * j] : T{};
    });
  }
  __device__ __forceinline__ void release() {
    const unsigned step = taken_++ + stages_;
    if (step < total_) __syncthreads();
    issue(step);
  }
  __device__ __forceinline__ void rewind() {
    if (total_ == unsigned(channels_.steps)) taken_ = 0;
  }

 private:
  static constexpr int kSlots = 16 / sizeof(T);

  T* const room_;
  const T* const own_;  // the lane's first position and channel of a stage
  uint64_t* const full_;
  const T* source_;  // the first view of the pair
  const int64_t to_twin_;
  const Channels channels_;
  const int HW_, views_, group_;
  const unsigned jump_, stages_;  // stages: a power of two
  unsigned total_;
  int next_;  // the first channel of the next slab
  const Copies how_;
  unsigned taken_ = 0;

  __device__ __forceinline__ bool inside(int tile) const { return 8 * tile + 8 <= HW_ || 8 * tile + group_ < HW_; }
  __device__ __forceinline__ int stage_elements() const { return kWarps * (kStepBytes / int(sizeof(T))) * HW_; }

  __device__ __forceinline__ unsigned slot(unsigned use) const { return use & (stages_ - 1); }
  __device__ __forceinline__ T* stage(unsigned use) const { return room_ + slot(use) * stage_elements(); }
  __device__ __forceinline__ int to_copy() const { return min(channels_.width, channels_.C - next_) * HW_; }

  // By a thread whose next step it is.
  __device__ __forceinline__ void copy_bulk(unsigned of) const {
    uint64_t* const barrier = full_ + slot(of);
    const unsigned bytes = to_copy() * sizeof(T);
    T* const to = stage(of);
    const T* const from = source_ + int64_t(next_) * HW_;
    mbarrier_arrive_expect_tx(barrier, views_ * bytes);
    bulk_copy_to_shared(to, from, bytes, barrier);
    if (views_ == 2) bulk_copy_to_shared(to + channels_.width * HW_, from + to_twin_, bytes, barrier);
  }

  // By all threads.
  __device__ __forceinline__ void copy(unsigned of) const {
    const int here = to_copy(), room = channels_.width * HW_, vectors = how_ == Copies::kVectors ? here / kSlots : 0;
    T* to = stage(of);
    const T* from = source_ + int64_t(next_) * HW_;
    REBALFER_ROLLED
    for (int view = 0; view < views_; ++view, to += room, from += to_twin_) {
#pragma unroll 4
      for (int i = threadIdx.x; i < vectors; i += kThreads)
        cp_async_16B(shared_address(to + i * kSlots), from + i * kSlots);
      REBALFER_ROLLED
      for (int i = vectors * kSlots + threadIdx.x; i < room; i += kThreads) to[i] = i < here ? from[i] : T{};
    }
  }

  // The step `of`, if there is one; in bulk by the first thread, whose next channels no other knows.
  __device__ __forceinline__ void issue(unsigned of) {
    if (how_ == Copies::kBulk) {
      if (threadIdx.x == 0 && of < total_) copy_bulk(of), advance();
    } else {
      if (of < total_) copy(of), advance();
      cp_async_commit();
    }
  }

  __device__ __forceinline__ void advance() {
    next_ += channels_.width;
    if (next_ != channels_.first + channels_.steps * channels_.width) return;
    next_ = channels_.first;
    source_ += int64_t(jump_) * (channels_.C * HW_);
  }
};

}  // namespace rebalfer::gpu
