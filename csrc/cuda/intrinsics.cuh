// Every hardware primitive the CUDA kernels use, in one place. Compiled by nvcc these are PTX, guarded so that each
// architecture from sm_80 on compiles; compiled as plain C++ they come from an emulator that runs the same kernels on a
// CPU (tests/emulator/emulator.h). Kernels use dynamic shared memory only.
#pragma once

#ifndef __CUDACC__
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

// Copies by the bulk copy engine and thread block clusters: sm_90 and later. Before that a bulk copy traps, and a
// cluster is one block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define REBALFER_HAS_BULK 1
#else
#define REBALFER_HAS_BULK 0
#endif

// name points to the block's dynamic shared memory, aligned to 128 bytes.
#define REBALFER_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)

namespace rebalfer::gpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T y;
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    }
    return y;
  }
}

// Two values in one register, `low` in the lower half, which is the first in memory.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t y;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, Half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  }
  return y;
}

// D += A B for A (16, 16), B (16, 8), D (16, 8), float32 accumulation. With group = lane / 4, pair = 2 * (lane % 4):
// a[0] A[group][pair, +1], a[1] A[group + 8][pair, +1], a[2] A[group][pair + 8, +9], a[3] A[group + 8][pair + 8, +9],
// b[0] B[pair, +1][group], b[1] B[pair + 8, +9][group], d[0, 1] D[group][pair, +1], d[2, 3] D[group + 8][pair, +1].
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, Half>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The same for A (16, 8), B (8, 8): a[0] A[group][pair, +1], a[1] A[group + 8][pair, +1], b B[pair, +1][group].
template <typename T>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    static_assert(std::is_same_v<T, Half>);
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// 16 bytes that nobody reads soon; the address is a multiple of 16.
__device__ __forceinline__ void store_16B_streaming(void* global, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1,%2,%3,%4};"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Of a place in shared memory: what the compiler need not compute anew from the block's window wherever it is used.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ uint4 load_shared_16B(SharedAddress from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_16B(SharedAddress to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Keeps a value of 4 or 8 bytes in registers: the compiler, which would rather compute it anew in every step of a loop,
// cannot. Not for pointers that are dereferenced as such: it would no longer know which memory they point to.
template <typename V>
__device__ __forceinline__ void keep(V& value) {
  if constexpr (sizeof(V) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

// threadIdx.x, read anew: what follows from it need not be kept in registers since it was read before.
__device__ __forceinline__ int thread_index_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// 16 bytes, both addresses multiples of 16; there after cp_async_wait, for other threads after a barrier besides. What
// is not wanted becomes zero, and nothing is read. The L2 cache fetches the whole 128 bytes around: others want the
// rest, and an H200 ran channels_last 3 to 6 % faster so where N = 512.
__device__ __forceinline__ void cp_async_16B(SharedAddress shared, const void* global, bool wanted = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(wanted ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// An mbarrier's phase ends when `count` arrivals and all announced bytes have come.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// By the thread that initialised: then it may start copies that count on the mbarriers; others wait for a barrier too.
__device__ __forceinline__ void mbarrier_fence_init() {
#if REBALFER_HAS_BULK
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, unsigned bytes) {
#if REBALFER_HAS_BULK
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}
// Waits for the end of the phase of this parity: the first phase has parity 0, and before it ends a wait for 1 returns.
// Then what was copied is there, and, if kPushed, what the cluster's other blocks pushed.
template <bool kPushed = false>
__device__ __forceinline__ void mbarrier_wait_parity(uint64_t* barrier, unsigned parity) {
  const uint32_t address = shared_address(barrier);
  unsigned done;
  do {
#if REBALFER_HAS_BULK
    if constexpr (kPushed) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(address), "r"(parity)
          : "memory");
    } else {
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(address), "r"(parity)
                   : "memory");
    }
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
#endif
  } while (!done);
  __syncwarp();  // what follows may be for whole warps: mma
}

// One thread copies; addresses and size are multiples of 16. The bytes count against the mbarrier's announced ones.
__device__ __forceinline__ void bulk_copy_to_shared(void* shared, const void* global, unsigned bytes,
                                                    uint64_t* barrier) {
#if REBALFER_HAS_BULK
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes),
                 "r"(shared_address(barrier))
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ unsigned cluster_rank() {
#if REBALFER_HAS_BULK
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
// Two halves of a barrier for all threads of all blocks of the cluster. They order no memory but mbarriers that were
// initialised before (mbarrier_fence_init): what is told others goes through push_16B, so that nobody waits for the
// stores to global memory that are under way.
__device__ __forceinline__ void cluster_arrive() {
#if REBALFER_HAS_BULK
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if REBALFER_HAS_BULK
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Stores 16 bytes at the same place in the shared memory of the cluster's block `rank`, which must not have exited;
// they count against the announced ones of its mbarrier at `barrier`.
__device__ __forceinline__ void push_16B(void* shared, float4 v, unsigned rank, uint64_t* barrier) {
#if REBALFER_HAS_BULK
  asm volatile(
      "{ .reg .b32 to, at; mapa.shared::cluster.u32 to, %0, %6; mapa.shared::cluster.u32 at, %5, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%1,%2,%3,%4}, [at]; }" ::"r"(
          shared_address(shared)),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
#else
  __trap();
#endif
}

// The value before. What this thread saw of its block (after __syncthreads, all of it) is seen by whoever comes later.
__device__ __forceinline__ unsigned ticket_increment(unsigned* global) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return before;
}
__device__ __forceinline__ void ticket_reset(unsigned* global) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(0) : "memory");
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Launches of kernels one after the other on a stream: what a kernel does before it waits overlaps with the end of the
// one before it, if the one before it allows that (next_may_start) and its own launch asks for it (`early`, from sm_90
// on; such a kernel calls wait_for_previous before it touches memory).
__device__ __forceinline__ void wait_for_previous() {
#if REBALFER_HAS_BULK
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void next_may_start() {
#if REBALFER_HAS_BULK
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The grid counts blocks, not clusters, and is a multiple of the cluster size along x.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};

  LaunchConfig(dim3 grid, dim3 block, unsigned cluster_size, size_t dynamic_shared_bytes, cudaStream_t stream,
               bool early = false) {
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = dynamic_shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (cluster_size > 1) {
      auto& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {cluster_size, 1, 1};
    }
    if (early) {
      auto& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster_size, size_t dynamic_shared_bytes,
            cudaStream_t stream, bool early, Arguments&&... arguments) {
  const LaunchConfig launch(grid, block, cluster_size, dynamic_shared_bytes, stream, early);
  check(cudaLaunchKernelEx(&launch.config, kernel, Parameters(arguments)...), "kernel launch");
}

}  // namespace rebalfer::gpu

#endif  // __CUDACC__
