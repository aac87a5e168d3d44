// Small kernels whose results are known, and small kernels that are wrong, one for each thing the emulator must notice.
#include "cuda/intrinsics.cuh"

using namespace rebalfer::gpu;
using rebalfer::emulator::attempt;

namespace {

template <typename T, int K>
__global__ void multiply(const T* a, const T* b, float* d) {  // a (16, K), b (K, 8), d (16, 8), row by row
  const int group = threadIdx.x / 4, pair = 2 * (threadIdx.x % 4);
  uint32_t fa[K / 4], fb[K / 8];
  for (int i = 0; i < K / 4; ++i) {
    const T* at = a + (group + 8 * (i % 2)) * K + pair + 8 * (i / 2);
    fa[i] = pack2<T>(to_float(at[0]), to_float(at[1]));
  }
  for (int i = 0; i < K / 8; ++i) {
    const T* at = b + (pair + 8 * i) * 8 + group;
    fb[i] = pack2<T>(to_float(at[0]), to_float(at[8]));
  }
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[(group + 8 * (i / 2)) * 8 + pair + i % 2];
  if constexpr (K == 16) {
    mma_m16n8k16<T>(fd, fa, fb);
  } else {
    mma_m16n8k8<T>(fd, fa, fb[0]);
  }
  for (int i = 0; i < 4; ++i) d[(group + 8 * (i / 2)) * 8 + pair + i % 2] = fd[i];
}

__global__ void shuffles(const float* in, float* out) {  // out (6, 32)
  const unsigned t = threadIdx.x;
  const float x = in[t];
  out[t] = __shfl_sync(~0u, x, 5);
  out[32 + t] = __shfl_xor_sync(~0u, x, 12);
  out[64 + t] = __shfl_down_sync(~0u, x, 3);
  out[96 + t] = __shfl_down_sync(~0u, x, 3, 8);
  out[128 + t] = __shfl_up_sync(~0u, x, 2);
  out[160 + t] = float(__ballot_sync(~0u, x > 0.5f) >> t & 1);
  if (t < 16) out[t] += __shfl_xor_sync(0xffff, x, 1);
}

template <typename T>
__global__ void convert(const float* in, T* out, float* back, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    out[i] = from_float<T>(in[i]);
    back[i] = to_float(out[i]);
  }
}

// The sum of each block's slabs by a ring of bulk copies; the last block by ticket adds up all blocks.
constexpr int kSlab = 256, kStages = 3;
__global__ void ring(const float* in, float* sums, float* total, unsigned* ticket, int64_t slabs, int64_t fault) {
  REBALFER_DYNAMIC_SHARED(float, stage);
  auto* full = reinterpret_cast<uint64_t*>(stage + kStages * kSlab);
  uint64_t* empty = full + kStages;
  auto* scratch = reinterpret_cast<float*>(empty + kStages);
  const unsigned t = threadIdx.x;
  const float* mine = in + blockIdx.x * slabs * kSlab;
  if (t == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, blockDim.x / 32);
    }
    if (fault != 4) mbarrier_fence_init();
  }
  __syncthreads();
  const auto copy = [&](int64_t slab) {
    const int s = int(slab % kStages);
    mbarrier_arrive_expect_tx(full + s, kSlab * 4);
    bulk_copy_to_shared(stage + s * kSlab, mine + slab * kSlab, kSlab * 4, full + s);
  };
  if (t == 0) {
    for (int64_t slab = 0; slab < kStages && slab < slabs; ++slab) copy(slab);
  }
  float sum = 0;
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int s = int(slab % kStages);
    const unsigned parity = slab / kStages & 1;
    if (fault != 1 || t == 0) mbarrier_wait_parity(full + s, parity);
    for (int i = int(t); i < kSlab; i += int(blockDim.x)) sum += stage[s * kSlab + i];
    __syncwarp();
    if (t % 32 == 0 && fault != 2) mbarrier_arrive_expect_tx(empty + s, 0);
    if (t == 0 && slab + kStages < slabs) {
      if (fault != 3) mbarrier_wait_parity(empty + s, parity);
      copy(slab + kStages);
    }
  }
  for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
  if (t % 32 == 0) scratch[t / 32] = sum;
  if (fault != 5) __syncthreads();
  if (t == 0) {
    sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += scratch[w];
    sums[blockIdx.x] = sum;
    if (ticket_increment(ticket) == gridDim.x - 1) {
      *total = 0;
      for (unsigned b = 0; b < gridDim.x; ++b) *total += sums[b];
      ticket_reset(ticket);
    }
  }
}

// Block r of a cluster gives its neighbour r + 1 and keeps what it is given.
__global__ void cluster(float* out, unsigned size, int64_t fault) {
  struct Shared {
    float4 inbox;
    uint64_t full;
  };
  REBALFER_DYNAMIC_SHARED(Shared, shared);
  const unsigned rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared->full, 1);
    if (fault != 1) mbarrier_fence_init();
    mbarrier_arrive_expect_tx(&shared->full, sizeof shared->inbox);
  }
  if (fault != 2) __syncthreads();
  if (fault != 2) cluster_arrive();
  if (fault == 3 && rank == 1) return;
  if (fault != 2) cluster_wait();
  const float x = float(rank + 1);
  if (threadIdx.x == 0) push_16B(&shared->inbox, float4{x, x, x, x}, (rank + 1) % size, &shared->full);
  if (fault == 4) return;
  mbarrier_wait_parity(&shared->full, fault == 5);
  if (threadIdx.x == 1) out[blockIdx.x] = shared->inbox.w;
}

// Reverses 16-byte vectors through shared memory, a group of copies each half.
__global__ void staged(const uint4* in, uint4* out, int64_t fault) {
  REBALFER_DYNAMIC_SHARED(uint4, stage);
  const unsigned t = threadIdx.x, n = blockDim.x;
  for (unsigned half = 0; half < 2; ++half) {
    cp_async_16B(shared_address(stage + half * n + t), in + half * n + t);
    cp_async_commit();
  }
  if (fault != 1) cp_async_wait<1>();
  if (fault != 2) __syncthreads();
  store_16B_streaming(out + t, stage[n - 1 - t]);
  if (fault != 3) cp_async_wait<0>();
  __syncthreads();
  store_16B_streaming(out + n + t, stage[2 * n - 1 - t]);
}

__global__ void odd(const char* in, unsigned* out, int64_t fault) {
  REBALFER_DYNAMIC_SHARED(unsigned, shared);
  if (fault == 8) store_16B_streaming(out + 4 * threadIdx.x, uint4{});  // early
  if (fault != 9) wait_for_previous();
  if (fault == 0) out[threadIdx.x] = *reinterpret_cast<const unsigned*>(in + 16 * threadIdx.x + 4);
  if (fault == 1) store_16B_streaming(out + threadIdx.x + 1, uint4{});  // misaligned
  if (fault == 2) store_16B_streaming(out + 4 * threadIdx.x, uint4{});  // past the end: by ASan
  if (fault == 3) shared[32 + threadIdx.x] = 1;                         // behind shared memory
  if (fault == 4 && threadIdx.x < 16) __syncwarp();                     // half a warp
  if (fault == 5) out[threadIdx.x] = threadIdx.x < 16 ? __shfl_sync(~0u, 1, 0) : __ballot_sync(~0u, 1);
  if (fault == 6 && threadIdx.x != 7) __syncthreads();
  if (fault == 6 && threadIdx.x == 7) mbarrier_wait_parity(reinterpret_cast<uint64_t*>(shared), 0);
  if (fault == 7) cp_async_16B(shared_address(shared + 4 * 8), in);
}

}  // namespace

extern "C" {

const char* run_multiply(int64_t half, int64_t depth, const void* a, const void* b, float* d) {
  const auto run = [&]<typename T>() {
    launch(depth == 16 ? multiply<T, 16> : multiply<T, 8>, 1, 32, 1, 0, nullptr, false, static_cast<const T*>(a),
           static_cast<const T*>(b), d);
  };
  return attempt([&] { half ? run.template operator()<Half>() : run.template operator()<BFloat16>(); });
}
const char* run_shuffles(const float* in, float* out) {
  return attempt([&] { launch(shuffles, 1, 32, 1, 0, nullptr, false, in, out); });
}
const char* run_convert(int64_t half, const float* in, void* out, float* back, int64_t count) {
  return attempt([&] {
    if (half)
      launch(convert<Half>, 1, 64, 1, 0, nullptr, false, in, static_cast<Half*>(out), back, count);
    else
      launch(convert<BFloat16>, 1, 64, 1, 0, nullptr, false, in, static_cast<BFloat16*>(out), back, count);
  });
}
const char* run_ring(const float* in, float* sums, float* total, unsigned* ticket, int64_t blocks, int64_t slabs,
                     int64_t fault) {
  const size_t shared = kStages * (kSlab * 4 + 16) + 16;
  return attempt(
      [&] { launch(ring, unsigned(blocks), 128, 1, shared, nullptr, false, in, sums, total, ticket, slabs, fault); });
}
const char* run_cluster(float* out, int64_t blocks, int64_t size, int64_t fault) {
  return attempt(
      [&] { launch(cluster, unsigned(blocks), 64, unsigned(size), 32, nullptr, false, out, unsigned(size), fault); });
}
const char* run_staged(const void* in, void* out, int64_t fault) {
  const auto* from = static_cast<const uint4*>(in);
  return attempt([&] { launch(staged, 1, 96, 1, 2 * 96 * 16, nullptr, false, from, static_cast<uint4*>(out), fault); });
}
const char* run_odd(const char* in, unsigned* out, int64_t fault) {
  return attempt([&] { launch(odd, 1, 32, 1, 128, nullptr, fault == 0 || fault > 7, in, out, fault); });
}

}  // extern "C"
