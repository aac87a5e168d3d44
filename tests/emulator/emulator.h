// What csrc/cuda/intrinsics.cuh gives the kernels on a GPU, and the CUDA language around it, on an emulated machine.
#pragma once

#include <dlfcn.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "machine.h"

#if defined(REBALFER_EMULATE_SM80)
#define REBALFER_HAS_BULK 0
#else
#define REBALFER_HAS_BULK 1
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#define threadIdx (::rebalfer::emulator::machine().current->index)
#define blockIdx (::rebalfer::emulator::machine().current->block->index)
#define blockDim (::rebalfer::emulator::machine().block_shape)
#define gridDim (::rebalfer::emulator::machine().grid)

#define REBALFER_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::rebalfer::emulator::machine().current->block->shared)

using cudaStream_t = void*;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { ::rebalfer::emulator::machine().fail("trap"); }

inline unsigned atomicAdd(unsigned* p, unsigned x) {
  const unsigned before = *p;
  *p += x;
  return before;
}

inline void __syncthreads() {
  auto& m = rebalfer::emulator::machine();
  m.pass(m.current->block->gate, "__syncthreads");
}

inline void __syncwarp(unsigned mask = ~0u) {
  rebalfer::emulator::Deposit mine;
  rebalfer::emulator::machine().meet(mask, "__syncwarp", mine, [](auto&) {});
}

namespace rebalfer::emulator {

// Each lane of mask gets the value of lane source(lane), its own where that is negative.
template <typename T, typename Source>
T shuffle(unsigned mask, T value, const char* operation, Source source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Exchange : Deposit {
    T value, result;
    int source;
  } mine;
  mine.value = mine.result = value;
  mine.source = source(int(machine().current->lane));
  if (mine.source >= 0 && !(mask >> mine.source & 1)) {
    machine().fail("%s reads lane %d, which is not in the mask %08x", operation, mine.source, mask);
  }
  machine().meet(mask, operation, mine, [mask](Deposit* const(&all)[32]) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      auto& to = static_cast<Exchange&>(*all[lane]);
      if (to.source >= 0) to.result = static_cast<Exchange&>(*all[to.source]).value;
    }
  });
  return mine.result;
}

inline unsigned ballot(unsigned mask, bool predicate) {
  struct Vote : Deposit {
    bool predicate;
    unsigned result;
  } mine;
  mine.predicate = predicate;
  machine().meet(mask, "__ballot_sync", mine, [mask](Deposit* const(&all)[32]) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) votes |= unsigned(static_cast<Vote&>(*all[lane]).predicate) << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) static_cast<Vote&>(*all[lane]).result = votes;
    }
  });
  return mine.result;
}

// The mangled name of a kernel, the same as in a cubin; empty for one that the library does not export.
inline std::string symbol(const void* kernel) {
  Dl_info info;
  return dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "";
}

// Appends a parameter as a GPU's constant bank holds it.
template <typename T>
void record_parameter(std::vector<unsigned char>& to, const T& parameter) {
  to.resize((to.size() + alignof(T) - 1) / alignof(T) * alignof(T));
  const auto* bytes = reinterpret_cast<const unsigned char*>(&parameter);
  to.insert(to.end(), bytes, bytes + sizeof(T));
}

// What an entry point for Python returns: null, or what went wrong.
template <typename F>
const char* attempt(F&& f) {
  static std::string error;
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace rebalfer::emulator

extern "C" inline __attribute__((used)) void rebalfer_emulator_begin(int order) {
  auto& m = rebalfer::emulator::machine();
  m.order = rebalfer::emulator::Order(order);
  m.counters = {};
}
// From now on launches are only recorded, or run.
extern "C" inline __attribute__((used)) void rebalfer_emulator_only_record(int only) {
  rebalfer::emulator::machine().only_record = only != 0;
}
// The last launch's kernel, and its parameters: their number, and the bytes themselves.
extern "C" inline __attribute__((used)) const char* rebalfer_emulator_recorded(uint64_t* bytes,
                                                                               const unsigned char** parameters) {
  const auto& recorded = rebalfer::emulator::machine().recorded;
  *bytes = recorded.parameters.size(), *parameters = recorded.parameters.data();
  return recorded.kernel.c_str();
}
extern "C" inline __attribute__((used)) void rebalfer_emulator_counters(rebalfer::emulator::Counters* out) {
  *out = rebalfer::emulator::machine().counters;
}

// Lanes are renumbered within segments of `width`.
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return rebalfer::emulator::shuffle(mask, value, "__shfl_sync",
                                     [=](int lane) { return (lane & ~(width - 1)) | (from & (width - 1)); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return rebalfer::emulator::shuffle(mask, value, "__shfl_xor_sync", [=](int lane) {
    return (lane ^ bits) <= (lane | (width - 1)) ? lane ^ bits : -1;
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return rebalfer::emulator::shuffle(mask, value, "__shfl_down_sync",
                                     [=](int lane) { return lane % width + int(by) < width ? lane + int(by) : -1; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return rebalfer::emulator::shuffle(mask, value, "__shfl_up_sync",
                                     [=](int lane) { return lane % width >= int(by) ? lane - int(by) : -1; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return rebalfer::emulator::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

namespace rebalfer::gpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float size = std::bit_cast<float>(rest << 13) * 0x1p112f;  // the exponent's bias; subnormals are normalised
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(size));
}

// Rounds to nearest even.
template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    static_assert(std::is_same_v<T, Half>);
    if (x != x) return {0x7fff};
    const uint16_t sign = uint16_t(std::bit_cast<uint32_t>(x) >> 16 & 0x8000);
    const float size = std::fabs(x);
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    // Adding a power of two whose last bit is worth one last bit of the result makes the addition round.
    const uint32_t exponent = std::max(std::bit_cast<uint32_t>(size) >> 23, 113u);
    const float shifter = std::bit_cast<float>((exponent + 13) << 23);
    const uint32_t mantissa = std::bit_cast<uint32_t>(size + shifter) - std::bit_cast<uint32_t>(shifter);
    return {uint16_t(sign | (((exponent - 113) << 10) + mantissa))};
  }
}

template <typename T>
uint32_t pack2(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

// Exact products, added by float32 fma in the order of k (a tensor core's own order is not documented). K is `depth`.
template <typename T, int depth>
void mma(float (&d)[4], const uint32_t* a, const uint32_t* b, const char* name) {
  auto& m = emulator::machine();
  struct Fragments : emulator::Deposit {
    float* d;
    const uint32_t *a, *b;
  } mine;
  mine.d = d, mine.a = a, mine.b = b;
  m.meet(~0u, name, mine, [&m](emulator::Deposit* const(&all)[32]) {
    const auto value = [](uint32_t pair, int half) { return to_float(T{uint16_t(half ? pair >> 16 : pair)}); };
    float A[16][depth], B[depth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& f = static_cast<const Fragments&>(*all[lane]);
      for (int i = 0; i < depth / 4; ++i) {
        for (int half = 0; half < 2; ++half) {
          const int k = 2 * (lane % 4) + 8 * (i / 2) + half;
          A[lane / 4 + 8 * (i % 2)][k] = value(f.a[i], half);
          if (i % 2 == 0) B[k][lane / 4] = value(f.b[i / 2], half);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto& f = static_cast<const Fragments&>(*all[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < depth; ++k) f.d[i] = std::fma(A[row][k], B[k][column], f.d[i]);
      }
    }
    ++m.counters.mma;
  });
}
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<T, 16>(d, a, b, "mma_m16n8k16");
}
template <typename T>
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  mma<T, 8>(d, a, &b, "mma_m16n8k8");
}

inline void store_16B_streaming(void* global, uint4 v) {
  auto& m = emulator::machine();
  m.require_waited("store_16B_streaming");
  m.require_aligned(global, 16, "store_16B_streaming");
  m.counters.streamed_stores += 16;
  *static_cast<uint4*>(global) = v;
}

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* shared) { return static_cast<unsigned char*>(shared); }
inline uint4 load_shared_16B(SharedAddress from) {
  emulator::machine().require_aligned(from, 16, "load_shared_16B");
  emulator::machine().require_shared(from, 16, "load_shared_16B");
  return *reinterpret_cast<const uint4*>(from);
}
inline void store_shared_16B(SharedAddress to, uint4 v) {
  emulator::machine().require_aligned(to, 16, "store_shared_16B");
  emulator::machine().require_shared(to, 16, "store_shared_16B");
  *reinterpret_cast<uint4*>(to) = v;
}
template <typename V>
void keep(V&) {}
inline int thread_index_anew() { return int(threadIdx.x); }

inline void cp_async_16B(SharedAddress shared, const void* global, bool wanted = true) {
  static const uint4 zeros{};
  auto& m = emulator::machine();
  m.require_waited("cp_async_16B");
  m.require_aligned(shared, 16, "cp_async_16B");
  m.require_aligned(global, 16, "cp_async_16B");
  m.require_shared(shared, 16, "cp_async_16B");
  m.counters.cp_async_copies += wanted ? 16 : 0;
  emulator::poison(shared, 16);
  m.current->open_group.push_back({shared, wanted ? global : &zeros, 16});
}
inline void cp_async_commit() {
  auto& t = *emulator::machine().current;
  t.groups.push_back(std::move(t.open_group));
  t.open_group.clear();
}
template <int N>
void cp_async_wait() {
  auto& groups = emulator::machine().current->groups;
  for (; groups.size() > N; groups.pop_front()) {
    for (const auto& copy : groups.front()) copy.land();
  }
}

inline void mbarrier_init(uint64_t* barrier, unsigned count) {
  auto& m = emulator::machine();
  m.require_aligned(barrier, 8, "mbarrier_init");
  m.require_shared(barrier, 8, "mbarrier_init");
  *barrier = m.kMBarrierMark;
  std::erase_if(m.current->block->mbarriers, [=](const auto& known) { return known.place == barrier; });
  m.current->block->mbarriers.push_back({barrier, count, count, 0, 0, false, m.current, {}});
}
inline void mbarrier_fence_init() {
  auto& t = *emulator::machine().current;
  for (auto& known : t.block->mbarriers) known.fenced |= known.maker == &t;
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, unsigned bytes) {
  auto& m = emulator::machine();
  if (!REBALFER_HAS_BULK) m.fail("mbarrier_arrive_expect_tx before sm_90");
  auto& known = m.mbarrier(barrier, "mbarrier_arrive_expect_tx");
  if (known.pending == 0) m.fail("mbarrier_arrive_expect_tx: more than the %u arrivals of a phase", known.count);
  known.bytes += bytes;
  --known.pending;
  known.settle();
}
template <bool kPushed = false>
void mbarrier_wait_parity(uint64_t* barrier, unsigned parity) {
  struct Wait {
    emulator::MBarrier* barrier;
    unsigned parity;
  } wait{&emulator::machine().mbarrier(barrier, "mbarrier_wait_parity"), parity};
  const auto ready = [](void* p) { return static_cast<Wait*>(p)->barrier->passed(static_cast<Wait*>(p)->parity); };
  emulator::machine().wait(ready, &wait, "mbarrier_wait_parity", wait.barrier);
}

inline void bulk_copy_to_shared(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  auto& m = emulator::machine();
  if (!REBALFER_HAS_BULK) m.fail("bulk_copy_to_shared before sm_90");
  m.require_waited("bulk_copy_to_shared");
  auto& known = m.mbarrier(barrier, "bulk_copy_to_shared");
  if (!known.fenced) m.fail("bulk_copy_to_shared: mbarrier_fence_init is missing");
  if (bytes == 0 || bytes % 16) m.fail("bulk_copy_to_shared: %u bytes are no multiple of 16", bytes);
  m.require_aligned(shared, 16, "bulk_copy_to_shared");
  m.require_aligned(global, 16, "bulk_copy_to_shared");
  m.require_shared(shared, bytes, "bulk_copy_to_shared");
  m.counters.bulk_copies += bytes;
  emulator::poison(shared, bytes);
  known.copies.push_back({shared, global, bytes});
}

inline unsigned cluster_rank() { return emulator::machine().current->block->rank; }
inline void cluster_arrive() {
  auto& m = emulator::machine();
  if (m.current->between_arrive_and_wait) m.fail("cluster_arrive twice before cluster_wait");
  m.current->between_arrive_and_wait = true;
  m.current->cluster_generation = m.arrive(m.cluster_gate);
}
inline void cluster_wait() {
  auto& m = emulator::machine();
  if (!m.current->between_arrive_and_wait) m.fail("cluster_wait without cluster_arrive");
  m.current->between_arrive_and_wait = false;
  m.leave(m.cluster_gate, m.current->cluster_generation, "cluster_wait");
}
inline void push_16B(void* shared, float4 v, unsigned rank, uint64_t* barrier) {
  auto& m = emulator::machine();
  if (!REBALFER_HAS_BULK) m.fail("push_16B before sm_90");
  if (rank >= m.cluster_size) m.fail("push_16B: rank %u of %u", rank, m.cluster_size);
  m.require_aligned(shared, 16, "push_16B");
  m.require_shared(shared, 16, "push_16B");
  emulator::Block &own = *m.current->block, &other = m.blocks[rank];
  if (other.gate.alive == 0) m.fail("push_16B to block %u of the cluster, which has exited", rank);
  const auto there = [&](void* p) { return other.shared + (static_cast<unsigned char*>(p) - own.shared); };
  auto& known = m.mbarrier(other, reinterpret_cast<uint64_t*>(there(barrier)), "push_16B");
  if (!known.fenced) m.fail("push_16B: mbarrier_fence_init is missing");
  emulator::Copy copy{there(shared), nullptr, 16};
  std::memcpy(copy.held, &v, 16);
  emulator::poison(copy.to, 16);
  known.copies.push_back(copy);
}

inline void wait_for_previous() { emulator::machine().current->may_touch_memory = true; }
inline void next_may_start() {}

inline unsigned ticket_increment(unsigned* global) { return atomicAdd(global, 1); }
inline void ticket_reset(unsigned* global) { *global = 0; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster_size, size_t dynamic_shared_bytes,
            cudaStream_t, bool early, Arguments&&... arguments) {
  if (!REBALFER_HAS_BULK && cluster_size > 1) throw std::runtime_error("kernel launch: clusters before sm_90");
  emulator::machine().early = early;
  auto& recorded = emulator::machine().recorded;
  recorded.kernel = emulator::symbol(reinterpret_cast<const void*>(kernel));
  recorded.parameters.clear();
  (emulator::record_parameter(recorded.parameters, Parameters(arguments)), ...);
  emulator::machine().launch(grid, block, cluster_size, dynamic_shared_bytes,
                             [&] { kernel(Parameters(arguments)...); });
}

}  // namespace rebalfer::gpu
