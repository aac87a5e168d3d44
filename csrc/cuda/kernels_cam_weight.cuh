// The gradient of the CAM's weight where nothing but maps is differentiated (the backward of class_activation_maps): of
// each view by itself, dA^T F; the backward kernel sums them over the views.
//
// A block has one view and some of its channels. No sum is over channels, so how many blocks share a view changes
// nothing of the result.
#pragma once

#include "correlation.cuh"

namespace rebalfer::gpu {

// kPositions: H W where it is known when this is compiled, else 0.
template <typename T, bool kChannelsLast, int kBlocks, int kPositions>
struct CamWeight {
  static constexpr int kTiles = ((kPositions ? kPositions : kMaxPositions) + 7) / 8;
  static constexpr int kClasses = 8 * kBlocks;
  using Source = std::conditional_t<kChannelsLast, LaneRing<T, kTiles>, SlabRing<T, kTiles>>;
  using Products = Correlation<T, kChannelsLast, kTiles>;

  struct Shared {
    uint64_t full[kMostStages];
    float d_maps[kClasses][8 * kTiles];  // of this block's view
  };

  static __host__ __device__ int64_t ring_offset() { return (sizeof(Shared) + 127) / 128 * 128; }
  static int64_t shared_bytes(int64_t HW, int stages) { return ring_offset() + Source::bytes(HW, stages); }

  static __device__ __forceinline__ void run(const CamWeightParams& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int HW = kPositions ? kPositions : p.g.H * p.g.W;
    const int64_t view = blockIdx.x >> p.split_bits;
    const int rank = blockIdx.x & ((1u << p.split_bits) - 1);
    const Place at(1);
    const Channels channels = Channels::of<T>(p.g, rank, p.split_bits);
    Source source(p.g, static_cast<const T*>(p.features), view, channels, at, HW, 1, 0, p.stages,
                  memory + ring_offset(), shared.full, p.copies);
    REBALFER_ROLLED
    for (int e = at.thread; e < kClasses * 8 * kTiles; e += kThreads) {
      const int l = e / (8 * kTiles), x = e % (8 * kTiles);
      shared.d_maps[l][x] = l < p.g.L && x < HW ? __ldg(p.d_maps + (view * p.g.L + l) * HW + x) : 0.0f;
    }
    __syncthreads();
    float* const K = p.cam_grad + view * p.g.L * p.g.C;
    int c = channels.first + at.slice * (kStepBytes / int(sizeof(T))) + at.quarter * Products::kSlots;
    REBALFER_ROLLED
    for (int step = 0; step < channels.steps; ++step, c += channels.width) {
      source.wait();
      uint4 f[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) f[j] = source.tile(j);
      REBALFER_ROLLED
      for (int l0 = 0; l0 < p.g.L; l0 += Products::kTogether) {
        float own[4];
        Products::sums(shared.d_maps, f, l0, at, own);
        Products::write(K, p.g, l0, c, at, own);
      }
      source.release();
    }
  }
};

template <typename T, bool kChannelsLast, int kBlocks, int kPositions>
__global__ __launch_bounds__(kThreads, 3) void cam_weight_kernel(const __grid_constant__ CamWeightParams p) {
  REBALFER_DYNAMIC_SHARED(unsigned char, memory);
  wait_for_previous();
  next_may_start();
  CamWeight<T, kChannelsLast, kBlocks, kPositions>::run(p, memory);
}

template <typename T>
void launch_cam_weight_as(const CamWeightParams& p, cudaStream_t stream) {
  const int HW = p.g.H * p.g.W;
  with_instance(p.g.channels_last, p.g.L, HW, [&]<bool kChannelsLast, int kBlocks, int kPositions>() {
    using Instance = CamWeight<T, kChannelsLast, kBlocks, kPositions>;
    CamWeightParams own = p;
    own.copies = copies<T>(p.features, p.g);
    launch(cam_weight_kernel<T, kChannelsLast, kBlocks, kPositions>, dim3(unsigned(p.g.N) << p.split_bits),
           dim3(kThreads), 1, size_t(Instance::shared_bytes(HW, p.stages)), stream, p.early, own);
  });
}

template <typename T>
void visit_cam_weight_kernels_as(const Visit& visit) {
  with_every_instance([&]<bool kChannelsLast, int kBlocks, int kPositions>(int) {
    visit(reinterpret_cast<const void*>(cam_weight_kernel<T, kChannelsLast, kBlocks, kPositions>), 0);
  });
}

}  // namespace rebalfer::gpu
