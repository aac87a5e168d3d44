// The kernels over the features, compiled once per instruction set (REBALFER_ISA names the exported table).
//
// NCHW keeps the sums of a tile of positions in registers and walks over the channels; channels_last keeps the sums of
// a few rows as vectors over the channels and adds their lanes at the end. A row of an NCHW map is loaded as whole
// vectors: the lanes behind its end hold the next channel and are ignored, and only rows at the view's very end, where
// there is nothing behind, are copied first.
#include "kernels.h"

#include <algorithm>

#include "simd.h"

namespace rebalfer {
namespace {

constexpr int64_t kStagingBytes = 16 * 1024;  // half an L1 cache
constexpr int64_t kMinChannelBlock = 16;
constexpr int kMaxClassGroup = 8;

template <typename T>
struct View {
  using A = typename Compute<T>::type;
  using V = Vec<A>;
  static constexpr int kN = kLanes<A>;

  static int64_t pitch(int64_t n) { return round_up(n, kN); }

  // Channels of one block: whole cache lines of T, small enough to stay in L1 between the passes.
  static int64_t channel_block(Geometry g) {
    const int64_t fit = kStagingBytes / (g.HW * int64_t(sizeof(T)));
    return std::max<int64_t>(kMinChannelBlock * (4 / std::min<int64_t>(sizeof(T), 4)), fit / 32 * 32);
  }

  static int64_t packed_size(Geometry g) { return g.L * pitch(g.C) + (g.channels_last ? 0 : g.C * g.L); }

  static void pack(Geometry g, const void* weight, bool weight_is_compute_type, void* packed) {
    A* rows = static_cast<A*>(packed);
    const int64_t p = pitch(g.C);
    for (int64_t l = 0; l < g.L; ++l) {
      for (int64_t c = 0; c < g.C; ++c)
        rows[l * p + c] = weight_is_compute_type ? static_cast<const A*>(weight)[l * g.C + c]
                                                 : widen(static_cast<const T*>(weight)[l * g.C + c]);
      for (int64_t c = g.C; c < p; ++c) rows[l * p + c] = 0;
    }
    if (g.channels_last) return;
    A* columns = rows + g.L * p;
    for (int64_t c = 0; c < g.C; ++c)
      for (int64_t l = 0; l < g.L; ++l) columns[c * g.L + l] = rows[l * p + c];
  }

  // Staging of a block of T rows with room for the lanes behind the last, the constants of spread (pitch(C)), a row.
  static int64_t scratch_bytes(Geometry g) {
    return (channel_block(g) * g.HW + kN) * int64_t(sizeof(T)) + (pitch(g.C) + 4 * pitch(g.HW)) * int64_t(sizeof(A)) + 256;
  }

  // ------------------------------------------------------------------------------------------------ maps, NCHW

  template <int LG, int TV>
  static void maps_tile(int64_t channels, const T* f, int64_t stride, const A* w, int64_t L, A* maps, int64_t p,
                        bool first) {
    V acc[LG][TV];
    for (int l = 0; l < LG; ++l)
      for (int t = 0; t < TV; ++t) acc[l][t] = first ? zero<A>() : load(maps + l * p + t * kN);
    for (int64_t c = 0; c < channels; ++c, f += stride, w += L) {
      V x[TV];
      for (int t = 0; t < TV; ++t) x[t] = load(f + t * kN);
      for (int l = 0; l < LG; ++l)
        for (int t = 0; t < TV; ++t) acc[l][t] += w[l] * x[t];
    }
    for (int l = 0; l < LG; ++l)
      for (int t = 0; t < TV; ++t) store(maps + l * p + t * kN, acc[l][t]);
  }

  template <int TV>
  static void maps_group(int64_t group, int64_t channels, const T* f, int64_t stride, const A* w, int64_t L, A* maps,
                         int64_t p, bool first) {
    switch (group) {
      case 1: return maps_tile<1, TV>(channels, f, stride, w, L, maps, p, first);
      case 2: return maps_tile<2, TV>(channels, f, stride, w, L, maps, p, first);
      case 3: return maps_tile<3, TV>(channels, f, stride, w, L, maps, p, first);
      case 4: return maps_tile<4, TV>(channels, f, stride, w, L, maps, p, first);
      case 5: return maps_tile<5, TV>(channels, f, stride, w, L, maps, p, first);
      case 6: return maps_tile<6, TV>(channels, f, stride, w, L, maps, p, first);
      case 7: return maps_tile<7, TV>(channels, f, stride, w, L, maps, p, first);
      default: return maps_tile<8, TV>(channels, f, stride, w, L, maps, p, first);
    }
  }

  // A block of channels whose rows may be loaded past their end.
  static void maps_block(Geometry g, int64_t c0, int64_t channels, const T* f, const A* columns, A* maps, A* pooled) {
    const int64_t p = pitch(g.HW), vectors = p / kN;
    constexpr int kGroup = kAccumulators / 2 < kMaxClassGroup ? kAccumulators / 2 : kMaxClassGroup;
    // Pooled features: the lanes past the row's end are masked away in the last vector alone.
    const int64_t whole = g.HW / kN, rest = g.HW % kN;
    using Bits = decltype(V{} < V{});
    Bits keep{};
    for (int i = 0; i < kN; ++i) keep[i] = i < rest ? -1 : 0;
    const A scale = A(1) / A(g.HW);
    for (int64_t c = 0; c < channels; c += kN) {
      V sums[kN];
      const int64_t here = std::min<int64_t>(kN, channels - c);
      for (int64_t i = 0; i < kN; ++i) {
        V sum = zero<A>();
        if (i < here) {
          const T* row = f + (c + i) * g.HW;
          for (int64_t t = 0; t < whole; ++t) sum += load(row + t * kN);
          if (rest) sum += keep ? load(row + whole * kN) : zero<A>();
        }
        sums[i] = sum;
      }
      store_first(pooled + c0 + c, lane_sums<A>(sums) * scale, here);
    }
    for (int64_t l = 0; l < g.L; l += kGroup) {
      const int64_t group = std::min<int64_t>(kGroup, g.L - l);
      for (int64_t t = 0; t < vectors;) {
        A* out = maps + l * p + t * kN;
        const A* w = columns + c0 * g.L + l;
        if (vectors - t >= 2) {
          maps_group<2>(group, channels, f + t * kN, g.HW, w, g.L, out, p, c0 == 0);
          t += 2;
        } else {
          maps_group<1>(group, channels, f + t * kN, g.HW, w, g.L, out, p, c0 == 0);
          t += 1;
        }
      }
    }
  }

  static void maps_nchw(Geometry g, const T* f, const A* packed, A* maps, A* pooled, T* scratch) {
    const A* columns = packed + g.L * pitch(g.C);
    const int64_t block = channel_block(g), p = pitch(g.HW);
    // Rows from here on would be loaded past the view's end.
    const int64_t safe = std::max<int64_t>(0, (g.C * g.HW - p) / g.HW + (g.C * g.HW >= p ? 1 : 0));
    int64_t c = 0;
    while (c < g.C) {
      if (c < safe) {
        const int64_t n = std::min(block, safe - c);
        maps_block(g, c, n, f + c * g.HW, columns, maps, pooled);
        c += n;
      } else {
        const int64_t n = std::min(block, g.C - c);
        std::memcpy(scratch, f + c * g.HW, n * g.HW * sizeof(T));
        std::memset(static_cast<void*>(scratch + n * g.HW), 0, kN * sizeof(T));
        maps_block(g, c, n, scratch, columns, maps, pooled);
        c += n;
      }
    }
  }

  // --------------------------------------------------------------------------------------- maps, channels_last

  template <int LG, int HT>
  static void rows_tile(Geometry g, const T* f, const A* rows, A* maps, A* pooled) {
    const int64_t pc = pitch(g.C), p = pitch(g.HW);
    V acc[LG][HT];
    for (int l = 0; l < LG; ++l)
      for (int h = 0; h < HT; ++h) acc[l][h] = zero<A>();
    auto step = [&](int64_t c, auto get) __attribute__((always_inline)) {
      V x[HT];
      for (int h = 0; h < HT; ++h) x[h] = get(f + h * g.C + c);
      if (pooled) {
        V sum = x[0];
        for (int h = 1; h < HT; ++h) sum += x[h];
        store(pooled + c, load(pooled + c) + sum);
      }
      for (int l = 0; l < LG; ++l) {
        const V w = load(rows + l * pc + c);
        for (int h = 0; h < HT; ++h) acc[l][h] += w * x[h];
      }
    };
    const int64_t whole = g.C / kN * kN, rest = g.C - whole;
    for (int64_t c = 0; c < whole; c += kN) step(c, [](const T* q) { return load(q); });
    if (rest) step(whole, [rest](const T* q) { return load_first(q, rest); });
    V flat[round_up_static(LG * HT)];
    for (int i = 0; i < round_up_static(LG * HT); ++i) flat[i] = i < LG * HT ? acc[i / HT][i % HT] : zero<A>();
    for (int i = 0; i < LG * HT; i += kN) {
      V(&group)[kN] = reinterpret_cast<V(&)[kN]>(flat[i]);
      const V sums = lane_sums<A>(group);
      for (int j = i; j < std::min(i + kN, LG * HT); ++j) maps[(j / HT) * p + j % HT] = sums[j - i];
    }
  }
  static constexpr int round_up_static(int n) { return (n + kN - 1) / kN * kN; }

  template <int HT>
  static void rows_group(int64_t group, Geometry g, const T* f, const A* rows, A* maps, A* pooled) {
    switch (group) {
      case 1: return rows_tile<1, HT>(g, f, rows, maps, pooled);
      case 2: return rows_tile<2, HT>(g, f, rows, maps, pooled);
      case 3: return rows_tile<3, HT>(g, f, rows, maps, pooled);
      case 4: return rows_tile<4, HT>(g, f, rows, maps, pooled);
      case 5: return rows_tile<5, HT>(g, f, rows, maps, pooled);
      case 6: return rows_tile<6, HT>(g, f, rows, maps, pooled);
      case 7: return rows_tile<7, HT>(g, f, rows, maps, pooled);
      default: return rows_tile<8, HT>(g, f, rows, maps, pooled);
    }
  }

  static void maps_channels_last(Geometry g, const T* f, const A* rows, A* maps, A* pooled) {
    const int64_t pc = pitch(g.C), p = pitch(g.HW);
    constexpr int kRows = 3, kGroup = kAccumulators / kRows;
    std::fill(pooled, pooled + pc, A(0));
    for (int64_t x = 0; x < g.HW;) {
      const bool tile = g.HW - x >= kRows;
      for (int64_t l = 0; l < g.L; l += kGroup) {
        const int64_t group = std::min<int64_t>(kGroup, g.L - l);
        A* sum = l == 0 ? pooled : nullptr;
        if (tile)
          rows_group<kRows>(group, g, f + x * g.C, rows + l * pc, maps + l * p + x, sum);
        else
          rows_group<1>(group, g, f + x * g.C, rows + l * pc, maps + l * p + x, sum);
      }
      x += tile ? kRows : 1;
    }
    const A scale = A(1) / A(g.HW);
    for (int64_t c = 0; c < pc; c += kN) store(pooled + c, load(pooled + c) * scale);
  }

  // pooled has room for pitch(C) elements.
  static void maps(Geometry g, const void* features, const void* packed, void* maps, void* pooled, void* scratch) {
    const T* f = static_cast<const T*>(features);
    const A* w = static_cast<const A*>(packed);
    if (g.channels_last)
      maps_channels_last(g, f, w, static_cast<A*>(maps), static_cast<A*>(pooled));
    else
      maps_nchw(g, f, w, static_cast<A*>(maps), static_cast<A*>(pooled), static_cast<T*>(scratch));
  }

  static void logits(Geometry g, const void* packed, const void* pooled, const void* bias, void* logits) {
    const A* rows = static_cast<const A*>(packed);
    const A* x = static_cast<const A*>(pooled);
    const int64_t pc = pitch(g.C), whole = g.C / kN * kN;
    for (int64_t l = 0; l < g.L; ++l) {
      V sum = zero<A>();
      for (int64_t c = 0; c < whole; c += kN) sum += load(rows + l * pc + c) * load(x + c);
      sum += load_first(rows + l * pc + whole, g.C - whole) * load_first(x + whole, g.C - whole);
      A total = bias ? static_cast<const A*>(bias)[l] : A(0);
      for (int i = 0; i < kN; ++i) total += sum[i];
      static_cast<A*>(logits)[l] = total;
    }
  }

  // ---------------------------------------------------------------------------------------------------- spread

  template <int CH, int TV>
  static void spread_tile(Geometry g, const A* columns, const A* d_maps, const A* constants, T* out) {
    const int64_t p = pitch(g.HW);
    V acc[CH][TV];
    for (int c = 0; c < CH; ++c)
      for (int t = 0; t < TV; ++t) acc[c][t] = splat(constants[c]);
    for (int64_t l = 0; l < g.L; ++l) {
      V d[TV];
      for (int t = 0; t < TV; ++t) d[t] = load(d_maps + l * p + t * kN);
      for (int c = 0; c < CH; ++c)
        for (int t = 0; t < TV; ++t) acc[c][t] += columns[c * g.L + l] * d[t];
    }
    for (int c = 0; c < CH; ++c)
      for (int t = 0; t < TV; ++t) store(out + c * g.HW + t * kN, acc[c][t]);
  }

  template <int TV>
  static void spread_rows(Geometry g, int64_t channels, const A* columns, const A* d_maps, const A* constants, T* out) {
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4)
      spread_tile<4, TV>(g, columns + c * g.L, d_maps, constants + c, out + c * g.HW);
    for (; c < channels; ++c) spread_tile<1, TV>(g, columns + c * g.L, d_maps, constants + c, out + c * g.HW);
  }

  static void spread_nchw(Geometry g, const A* packed, const A* d_maps, const A* constants, T* out, bool streaming,
                          T* staging) {
    const A* columns = packed + g.L * pitch(g.C);
    const int64_t block = channel_block(g), vectors = pitch(g.HW) / kN;
    for (int64_t c0 = 0; c0 < g.C; c0 += block) {
      const int64_t channels = std::min(block, g.C - c0), count = channels * g.HW;
      // The last tile first: the lanes it writes behind a row's end belong to the next row's first tile.
      for (int64_t t = vectors; t > 0;) {
        const int64_t width = t % 2 ? 1 : 2;
        t -= width;
        const A* d = d_maps + t * kN;
        if (width == 2)
          spread_rows<2>(g, channels, columns + c0 * g.L, d, constants + c0, staging + t * kN);
        else
          spread_rows<1>(g, channels, columns + c0 * g.L, d, constants + c0, staging + t * kN);
      }
      copy_out(out + c0 * g.HW, staging, count, streaming);
    }
  }

  template <int HT, int CV>
  static void spread_cells(Geometry g, const A* rows, const A* d_maps, const A* constants, T* out, int64_t stride,
                           bool streaming) {
    const int64_t pc = pitch(g.C), p = pitch(g.HW);
    V acc[HT][CV];
    for (int h = 0; h < HT; ++h)
      for (int c = 0; c < CV; ++c) acc[h][c] = load(constants + c * kN);
    for (int64_t l = 0; l < g.L; ++l) {
      V w[CV];
      for (int c = 0; c < CV; ++c) w[c] = load(rows + l * pc + c * kN);
      for (int h = 0; h < HT; ++h)
        for (int c = 0; c < CV; ++c) acc[h][c] += d_maps[l * p + h] * w[c];
    }
    for (int h = 0; h < HT; ++h)
      for (int c = 0; c < CV; ++c) {
        T* q = out + h * stride + c * kN;
        if (streaming)
          store_streaming(q, acc[h][c]);
        else
          store(q, acc[h][c]);
      }
  }

  static void spread_channels_last(Geometry g, const A* rows, const A* d_maps, const A* constants, T* out,
                                   bool streaming) {
    constexpr int kH = 4, kC = 2;
    const int64_t whole = g.C / (kC * kN) * (kC * kN);
    streaming = streaming && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 && (g.C * sizeof(T)) % kVectorBytes == 0;
    int64_t x = 0;
    for (; x + kH <= g.HW; x += kH)
      for (int64_t c = 0; c < whole; c += kC * kN)
        spread_cells<kH, kC>(g, rows + c, d_maps + x, constants + c, out + x * g.C + c, g.C, streaming);
    for (; x < g.HW; ++x)
      for (int64_t c = 0; c < whole; c += kC * kN)
        spread_cells<1, kC>(g, rows + c, d_maps + x, constants + c, out + x * g.C + c, g.C, streaming);
    for (int64_t c = whole; c < g.C; c += kN)  // the last channels, one vector at a time and no wider than the row
      for (x = 0; x < g.HW; ++x) {
        T cell[kN];
        spread_cells<1, 1>(g, rows + c, d_maps + x, constants + c, cell, 0, false);
        std::memcpy(static_cast<void*>(out + x * g.C + c), cell, std::min<int64_t>(kN, g.C - c) * sizeof(T));
      }
  }

  static void store_streaming(T* p, V v) {
    if constexpr (sizeof(T) != sizeof(A)) return store(p, v);
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
    store(p, v);
#endif
  }

  static void copy_out(T* out, const T* staging, int64_t count, bool streaming) {
#if defined(__SSE2__)
    const int64_t bytes = count * int64_t(sizeof(T));
    if (streaming && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 && bytes % kVectorBytes == 0) {
      char* to = reinterpret_cast<char*>(out);
      const char* from = reinterpret_cast<const char*>(staging);
      for (int64_t i = 0; i < bytes; i += kVectorBytes) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX2__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
      }
      return;
    }
#endif
    std::memcpy(static_cast<void*>(out), staging, count * sizeof(T));
  }

  static void spread(Geometry g, const void* packed, const void* d_maps, const void* d_logits, void* d_features,
                     bool streaming, void* scratch) {
    const A* rows = static_cast<const A*>(packed);
    const A* dz = static_cast<const A*>(d_logits);
    const int64_t pc = pitch(g.C);
    A* constants = static_cast<A*>(scratch);  // W^T dz / HW
    const A scale = A(1) / A(g.HW);
    for (int64_t c = 0; c < pc; c += kN) {
      V sum = zero<A>();
      if (dz)
        for (int64_t l = 0; l < g.L; ++l) sum += dz[l] * load(rows + l * pc + c);
      store(constants + c, sum * scale);
    }
    const A* d = static_cast<const A*>(d_maps);
    T* out = static_cast<T*>(d_features);
    if (g.channels_last)
      spread_channels_last(g, rows, d, constants, out, streaming);
    else
      spread_nchw(g, rows, d, constants, out, streaming, reinterpret_cast<T*>(constants + pc));
#if defined(__SSE2__)
    if (streaming) _mm_sfence();
#endif
  }

  // ------------------------------------------------------------------------------------------------- correlate

  static void correlate(Geometry g, const void* features, const void* d_maps, void* d_weight, void* scratch) {
    const T* f = static_cast<const T*>(features);
    const A* d = static_cast<const A*>(d_maps);
    A* out = static_cast<A*>(d_weight);
    const int64_t p = pitch(g.HW), vectors = p / kN;
    if (g.channels_last) {
      for (int64_t c = 0; c < g.C; c += kN) {
        const int64_t here = std::min<int64_t>(kN, g.C - c);
        for (int64_t l = 0; l < g.L; l += 4) {
          const int64_t group = std::min<int64_t>(4, g.L - l);
          V acc[4] = {};
          for (int64_t x = 0; x < g.HW; ++x) {
            const V v = load_first(f + x * g.C + c, here);
            for (int64_t i = 0; i < group; ++i) acc[i] += d[(l + i) * p + x] * v;
          }
          for (int64_t i = 0; i < group; ++i) {
            A* q = out + (l + i) * g.C + c;
            store_first(q, load_first(q, here) + acc[i], here);
          }
        }
      }
      return;
    }
    A* row = static_cast<A*>(scratch);
    for (int64_t c = 0; c < g.C; ++c) {
      for (int64_t t = 0; t < vectors; ++t)
        store(row + t * kN, load_first(f + c * g.HW + t * kN, std::min<int64_t>(kN, g.HW - t * kN)));
      for (int64_t l = 0; l < g.L; l += kN) {
        V sums[kN];
        for (int64_t i = 0; i < kN; ++i) {
          V sum = zero<A>();
          if (l + i < g.L)
            for (int64_t t = 0; t < vectors; ++t) sum += load(d + (l + i) * p + t * kN) * load(row + t * kN);
          sums[i] = sum;
        }
        const V total = lane_sums<A>(sums);
        for (int64_t i = 0; i < kN && l + i < g.L; ++i) out[(l + i) * g.C + c] += total[i];
      }
    }
  }

  static constexpr Kernels table() {
    return {kN, packed_size, pack, scratch_bytes, maps, logits, spread, correlate};
  }
};

}  // namespace

const Kernels& REBALFER_ISA(Storage storage) {
  static const Kernels f32 = View<float>::table(), f64 = View<double>::table(), bf16 = View<BFloat16>::table(),
                       f16 = View<Half>::table();
  switch (storage) {
    case Storage::f32: return f32;
    case Storage::f64: return f64;
    case Storage::bf16: return bf16;
    default: return f16;
  }
}

}  // namespace rebalfer
