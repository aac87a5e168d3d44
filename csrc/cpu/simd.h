// Vectors of the compute type, as wide as the instruction set this file is compiled for, and the conversions between
// them and what is stored. Everything has internal linkage: three builds of one source meet in one library.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__F16C__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace rebalfer {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 24;  // vector registers that a kernel may keep its sums in, of 32
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 12;  // of 16
#else
constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 12;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VectorOf<A>::type;
template <typename A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

using VecF = Vec<float>;
using VecD = Vec<double>;
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVecU __attribute__((vector_size(kVectorBytes / 2)));

template <typename A>
inline Vec<A> zero() {
  return Vec<A>{};
}

template <typename A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};  // exact for every x, signed zeros included
}

// Keeps a vector that several multiplications share in its register: GCC would read it from memory for each, and loads
// are what such a loop waits for.
template <typename V>
inline V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#endif
  return v;
}

// Scalars.

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float widen(Half x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  // Shift the exponent and the fraction into place, then correct the exponent's bias; a multiplication renormalises.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t bits = magnitude;
  float out;
  if (magnitude >= 0x0f800000) {  // infinity and NaN
    bits = magnitude | 0x7f800000;
    std::memcpy(&out, &bits, 4);
  } else {
    std::memcpy(&out, &bits, 4);
    out *= 0x1p112f;
  }
  std::memcpy(&bits, &out, 4);
  bits |= uint32_t(x.bits & 0x8000) << 16;
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}

template <typename T>
inline T narrow(typename Compute<T>::type x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline double narrow<double>(double x) {
  return x;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
template <>
inline Half narrow<Half>(float x) {
#ifdef __F16C__
  return {uint16_t(_cvtss_sh(x, 0))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (bits < 0x38800000) {                                   // subnormal: adding 0.5 rounds at the 24th bit
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, 4);
    return {uint16_t(sign | (rounded - 0x3f000000))};
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return {uint16_t(sign | ((bits - 0x38000000) >> 13))};
#endif
}

// Vectors.

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline VecD load(const double* p) {
  VecD v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// Each number goes to the high half of its lane, by one instruction where there is one.
inline VecF load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m512i of_halves = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4,
                                             0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i numbers = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (VecF)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, of_halves, numbers);
#elif defined(__AVX2__)
  const __m256i of_bytes = _mm256_set_epi8(15, 14, -1, -1, 13, 12, -1, -1, 11, 10, -1, -1, 9, 8, -1, -1,  //
                                           7, 6, -1, -1, 5, 4, -1, -1, 3, 2, -1, -1, 1, 0, -1, -1);
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (VecF)_mm256_shuffle_epi8(twice, of_bytes);
#else
  HalfVecU half;
  std::memcpy(&half, p, sizeof half);
  return (VecF)(__builtin_convertvector(half, VecU) << 16);
#endif
}
inline VecF load(const Half* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && defined(__AVX2__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecF v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, VecD v) { std::memcpy(p, &v, sizeof v); }
// v as bfloat16 in the high half of each lane: to nearest, ties to even. A NaN becomes a default one, of
// either sign, as rounding could make a number of another.
inline VecU round_to_bfloat16(VecF v) {
#if defined(__AVX512F__)
  const __m512i nan = _mm512_set1_epi32(0x33);  // either kind of NaN becomes the default one, all else stays
  const __m512i bits = _mm512_castps_si512(_mm512_fixupimm_ps((__m512)v, (__m512)v, nan, 0));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i even = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return (VecU)_mm512_mask_add_epi32(even, odd, bits, _mm512_set1_epi32(0x8000));
#else
  const VecU bits = (VecU)v;
  return (v != v) ? (VecU{} + 0x7fc00000) : bits + 0x7fff + ((bits >> 16) & 1);
#endif
}
inline void store(BFloat16* p, VecF v) {
  const HalfVecU half = __builtin_convertvector(round_to_bfloat16(v) >> 16, HalfVecU);
  std::memcpy(p, &half, sizeof half);
}
inline void store(Half* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow<Half>(v[i]);
#endif
}

// Vectors one behind the other; two of bfloat16 at a time, which takes fewer instructions.
template <typename T, typename V>
inline void store_two(T* p, V a, V b) {
  store(p, a);
  store(p + kVectorBytes / sizeof(a[0]), b);
}
#if defined(__AVX512F__)
inline void store_two(BFloat16* p, VecF a, VecF b) {
  alignas(64) static constexpr uint16_t high_halves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                           23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                           45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)round_to_bfloat16(a), _mm512_load_si512(high_halves),
                                                   (__m512i)round_to_bfloat16(b)));
}
#elif defined(__AVX2__)
inline void store_two(BFloat16* p, VecF a, VecF b) {
  const __m256i by_halves =  // of the registers: the first of a, the first of b, the others
      _mm256_packus_epi32((__m256i)(round_to_bfloat16(a) >> 16), (__m256i)(round_to_bfloat16(b) >> 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(by_halves, 0b11'01'10'00));
}
#endif
template <typename T, typename V, int Count>
inline void store(T* p, const V (&v)[Count]) {
  constexpr int lanes = kVectorBytes / sizeof(v[0][0]);
  for (int i = 0; i + 1 < Count; i += 2) store_two(p + i * lanes, v[i], v[i + 1]);
  if constexpr (Count % 2) store(p + (Count - 1) * lanes, v[Count - 1]);
}

// The first n lanes, zeros behind: reads and writes nothing past them.
template <typename T>
inline Vec<typename Compute<T>::type> load_first(const T* p, int64_t n) {
  constexpr int lanes = kLanes<typename Compute<T>::type>;
  if (n >= lanes) return load(p);
  T padded[lanes] = {};
  std::memcpy(static_cast<void*>(padded), p, n * sizeof(T));
  return load(padded);
}
template <typename T>
inline void store_first(T* p, Vec<typename Compute<T>::type> v, int64_t n) {
  constexpr int lanes = kLanes<typename Compute<T>::type>;
  if (n >= lanes) return store(p, v);
#if defined(__AVX512F__)
  const __mmask16 first = __mmask16((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, first, (__m512)v);
  if constexpr (sizeof(T) == 2) {
    T all[lanes];
    store(all, v);
    return _mm256_mask_storeu_epi16(p, first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(all)));
  }
#endif
  T padded[lanes];
  store(padded, v);
  std::memcpy(static_cast<void*>(p), padded, n * sizeof(T));
}

// The lanes of a vector that are kept; the others become zero.
#if defined(__AVX512F__)
using LaneMask = __mmask16;
template <typename A>
inline LaneMask first_lanes(int64_t n) {
  return n >= kLanes<A> ? LaneMask(-1) : LaneMask((1u << n) - 1);
}
inline VecF masked(LaneMask keep, VecF v) { return (VecF)_mm512_maskz_mov_ps(keep, (__m512)v); }
inline VecD masked(LaneMask keep, VecD v) { return (VecD)_mm512_maskz_mov_pd(__mmask8(keep), (__m512d)v); }
#else
typedef int32_t LaneMask __attribute__((vector_size(kVectorBytes)));
template <typename A>
inline LaneMask first_lanes(int64_t n) {
  LaneMask keep;
  for (int i = 0; i < kVectorBytes / 4; ++i) keep[i] = i < n * int64_t(sizeof(A) / 4) ? -1 : 0;
  return keep;
}
template <typename V>
inline V masked(LaneMask keep, V v) {
  return (V)((LaneMask)v & keep);
}
#endif

// Whether lanes can be picked out of two vectors of the compute type (kPermutes), whether one instruction does it
// (kPermutesAtOnce), and how: lane i of the result is element index[i] of the vectors in turn.
#if defined(__AVX512F__)
template <typename A>
constexpr bool kPermutes = std::is_same_v<A, float>;
template <typename A>
constexpr bool kPermutesAtOnce = kPermutes<A>;
using LaneIndex = __m512i;
inline LaneIndex load_index(const int32_t* index) { return _mm512_loadu_si512(index); }
inline VecF permute(VecF a, VecF b, LaneIndex index) {
  return (VecF)_mm512_permutex2var_ps((__m512)a, index, (__m512)b);
}
// Lane i is element index[i] of the two vectors from p on.
template <typename T>
inline VecF load_permuted(const T* p, LaneIndex index) {
  return permute(load(p), load(p + kLanes<float>), index);
}
inline VecF load_permuted(const BFloat16* p, LaneIndex index) {
  return (VecF)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_slli_epi32(index, 16), _mm512_loadu_si512(p));
}
template <int Count>
inline VecF permute(const VecF (&v)[Count], LaneIndex index) {
  static_assert(Count <= 4);
  const VecF low = permute(v[0], v[Count > 1], index);
  if constexpr (Count <= 2) return low;
  const __mmask16 is_high = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(2 * kLanes<float>));
  return (VecF)_mm512_mask_mov_ps((__m512)low, is_high, (__m512)permute(v[2 % Count], v[Count - 1], index));
}
#elif defined(__AVX2__)
template <typename A>
constexpr bool kPermutes = std::is_same_v<A, float>;
template <typename A>
constexpr bool kPermutesAtOnce = false;
using LaneIndex = __m256i;
inline LaneIndex load_index(const int32_t* index) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
}
inline VecF permute(VecF a, VecF b, LaneIndex index) {
  const __m256 of_b = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // its sign bit: the index is 8 or more
  return (VecF)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)a, index), _mm256_permutevar8x32_ps((__m256)b, index),
                                of_b);
}
#else
template <typename A>
constexpr bool kPermutes = false;
template <typename A>
constexpr bool kPermutesAtOnce = false;
struct LaneIndex {};
inline LaneIndex load_index(const int32_t*) { return {}; }
#endif

// Of two vectors' lanes those from n on.
inline LaneIndex lanes_from(int n) {
  int32_t index[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) index[i] = n + i;
  return load_index(index);
}

// Asks for the cache line of p, from memory into the L2 cache: a core's own guesses end at the next page, and there are
// more streams here than it follows.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Calls f<n>(start) for [0, count) in groups of n = Most, then of the smaller sizes that a loop is compiled for.
template <int Most, typename F>
[[gnu::always_inline]] inline void for_groups(int64_t count, F f, int64_t start = 0) {
  for (; count - start >= Most; start += Most) f.template operator()<Most>(start);
  constexpr int next = Most > 7 ? 7 : Most > 4 ? 4 : Most - 1;
  if constexpr (next > 0) for_groups<next>(count, f, start);
}

// Sums of the lanes of kLanes vectors, as one vector: a tree of pairwise additions that transposes on the way, about
// three instructions a vector where a horizontal sum of each would take eight.
template <typename A, int Count, int... I>
inline void fold(Vec<A>* v, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<A>;
  for (int i = 0; i < Count / 2; ++i) {
    const Vec<A> a = v[2 * i], b = v[2 * i + 1];
    v[i] =
        __builtin_shufflevector(a, b, (2 * I % (2 * n))...) + __builtin_shufflevector(a, b, (2 * I % (2 * n) + 1)...);
  }
  if constexpr (Count > 2) fold<A, Count / 2>(v, std::integer_sequence<int, I...>{});
}
template <typename A>
inline Vec<A> lane_sums(Vec<A> (&v)[kLanes<A>]) {
  fold<A, kLanes<A>>(v, std::make_integer_sequence<int, kLanes<A>>{});
  return v[0];
}

template <typename A>
inline A lane_sum(Vec<A> v) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out pieces of the scratch, each on a cache line.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}
  template <typename E>
  E* take(int64_t count) {
    E* piece = reinterpret_cast<E*>(next_);
    next_ += round_up(count * int64_t(sizeof(E)), 64);
    return piece;
  }

 private:
  char* next_;
};

}  // namespace
}  // namespace rebalfer
