// The kernels over the features, compiled once per instruction set (REBALFER_ISA names the exported table).
//
// NCHW keeps the sums of a tile of positions in registers and walks over the channels; channels_last keeps the sums of
// a few rows as vectors over the channels and adds their lanes at the end. Both take the difference of the two views on
// the load, A - T(A~) = W (F - T F~), which halves the arithmetic: at the size of an L3 cache that is what a core
// spends its time on. NCHW needs a permutation of lanes for it; without one it subtracts the maps of the two views.
//
// A row of an NCHW map is loaded as whole vectors: the lanes behind its end hold the next channel and are ignored, and
// only rows at the view's very end, where there is nothing behind, are copied first. A short rest of the row (49 = 3 *
// 16 + 1) is not worth a vector: its columns are gathered and treated as vectors over the channels.
#include "kernels.h"

#include <algorithm>

#include "simd.h"

namespace rebalfer {
namespace {

constexpr int64_t kBlockBytes = 8 * 1024;  // of one view: the block of a pair stays in an L1 cache
constexpr int64_t kMaxColumns = 4;
constexpr int kTile = kAccumulators >= 24 ? 3 : 2;  // vectors of positions, or rows of channels_last

template <typename T>
struct View {
  using A = typename Compute<T>::type;
  using V = Vec<A>;
  static constexpr int kN = kLanes<A>;

  static int64_t pitch(int64_t n) { return round_up(n, kN); }

  // How the positions of an NCHW row are divided: vectors, the last of which may be partial, then single columns.
  struct Row {
    explicit Row(int64_t HW) : vectors(HW / kN), columns(HW % kN), first_column(HW - HW % kN) {
      if (columns > kMaxColumns) ++vectors, columns = 0;
    }
    int64_t vectors, columns, first_column;
  };

  // Channels of one NCHW block: whole cache lines of T, few enough to stay in L1 between the passes.
  static int64_t channel_block(Geometry g) {
    return std::max<int64_t>(32, kBlockBytes / (g.HW * int64_t(sizeof(T))) / 32 * 32);
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

  // Hands out pieces of the scratch, each on a cache line.
  struct Scratch {
    explicit Scratch(void* p) : next(static_cast<char*>(p)) {}
    template <typename E>
    E* take(int64_t count) {
      E* piece = reinterpret_cast<E*>(next);
      next += round_up(count * int64_t(sizeof(E)), 64);
      return piece;
    }
    char* next;
  };

  // The most that any function takes: blocks of both views with room for two vectors behind, two rows of constants,
  // two sets of maps, a block of rows in the compute type, columns and sums.
  static int64_t scratch_bytes(Geometry g) {
    const int64_t block = channel_block(g), of_t = sizeof(T), of_a = sizeof(A);
    return 2 * (block * g.HW + 2 * kN) * of_t + 2 * pitch(g.C) * of_a + 2 * g.L * pitch(g.HW) * of_a +
           (block * (pitch(g.HW) + 2 * kN + 3) + 2 * kN) * of_a + kMaxColumns * g.L * kN * of_a + 16 * 64;
  }

  // ------------------------------------------------------------------------------------------------ maps, NCHW

  // What the sums run over: the features of a view, or the difference of a pair. `own` and `twin` are the two views.
  struct One {
    const T* f;
    static constexpr bool kPair = false;
    V load(int64_t offset, int64_t t, V& own, V&) const { return own = rebalfer::load(f + offset + t * kN); }
    A at(int64_t offset, int64_t x, A& own, A&) const { return own = widen(f[offset + x]); }
    One from(int64_t offset) const { return {f + offset}; }
  };
  struct Pair {
    const T *f, *f_twin;
    Twin table;
    static constexpr bool kPair = true;
    V load(int64_t offset, int64_t t, V& own, V& twin) const {
      const T* q = f_twin + offset + table.base[t];
      own = rebalfer::load(f + offset + t * kN);
      twin = permute(rebalfer::load(q), rebalfer::load(q + kN), table.lanes + t * kN);
      return own - twin;
    }
    A at(int64_t offset, int64_t x, A& own, A& twin) const {
      own = widen(f[offset + x]);
      twin = widen(f_twin[offset + table.index[x]]);
      return own - twin;
    }
    Pair from(int64_t offset) const { return {f + offset, f_twin + offset, table}; }
  };

  // Sums over the positions of each channel of a block, as vectors and, of the single columns, as numbers.
  struct Sums {
    A *own, *twin, *own_column, *twin_column;
  };

  template <int LG, int TV, bool Pool, typename Source>
  static void maps_tile(Geometry g, int64_t channels, Source source, int64_t t0, const A* w, A* maps, bool first,
                        Sums sums) {
    const int64_t p = pitch(g.HW), partial = g.HW - (t0 + TV - 1) * kN;  // lanes of the tile's last vector
    using Bits = decltype(V{} < V{});
    Bits keep;
    for (int i = 0; i < kN; ++i) keep[i] = i < partial ? -1 : 0;
    V acc[LG][TV];
    for (int l = 0; l < LG; ++l)
      for (int t = 0; t < TV; ++t) acc[l][t] = first ? zero<A>() : load(maps + l * p + t * kN);
    for (int64_t c = 0; c < channels; ++c, w += g.L) {
      V x[TV], own[TV], twin[TV];
      for (int t = 0; t < TV; ++t) x[t] = source.load(c * g.HW, t0 + t, own[t], twin[t]);
      if constexpr (Pool) {
        auto pool = [&](A* to, V(&v)[TV]) __attribute__((always_inline)) {
          V sum = (V)((Bits)v[TV - 1] & keep);
          for (int t = 0; t < TV - 1; ++t) sum += v[t];
          store(to + c * kN, t0 ? load(to + c * kN) + sum : sum);
        };
        pool(sums.own, own);
        if constexpr (Source::kPair) pool(sums.twin, twin);
      }
      for (int l = 0; l < LG; ++l)
        for (int t = 0; t < TV; ++t) acc[l][t] += w[l] * x[t];
    }
    for (int l = 0; l < LG; ++l)
      for (int t = 0; t < TV; ++t) store(maps + l * p + t * kN, acc[l][t]);
  }

  // A block of channels whose rows may be loaded past their end; `first` starts the sums.
  template <bool Pool, typename Source>
  static void maps_block(Geometry g, int64_t c0, int64_t channels, Source source, const A* packed, A* maps, bool first,
                         A* column, A* column_sums, Sums sums) {
    const int64_t p = pitch(g.HW), pc = pitch(g.C), padded = round_up(channels, kN);
    const A* w = packed + g.L * pc + c0 * g.L;
    const Row row(g.HW);
    for_groups<kTile>(row.vectors, [&]<int TV>(int64_t t) {
      for_groups<kAccumulators / kTile>(g.L, [&]<int LG>(int64_t l) {
        A* out = maps + l * p + t * kN;
        if (Pool && l == 0)
          maps_tile<LG, TV, Pool>(g, channels, source, t, w + l, out, first, sums);
        else
          maps_tile<LG, TV, false>(g, channels, source, t, w + l, out, first, sums);
      });
    });
    if (Pool) std::fill(sums.own_column, sums.own_column + padded, A(0));
    if (Pool) std::fill(sums.twin_column, sums.twin_column + padded, A(0));
    for (int64_t r = 0; r < row.columns; ++r) {
      for (int64_t c = 0; c < channels; ++c) {
        A own = 0, twin = 0;
        column[c] = source.at(c * g.HW, row.first_column + r, own, twin);
        if (Pool) sums.own_column[c] += own, sums.twin_column[c] += twin;
      }
      for (int64_t c = channels; c < padded; ++c) column[c] = 0;
      for_groups<8>(g.L, [&]<int LG>(int64_t l) {
        A* q = column_sums + (r * g.L + l) * kN;
        V total[LG];
        for (int i = 0; i < LG; ++i) total[i] = first ? zero<A>() : load(q + i * kN);
        for (int64_t c = 0; c < padded; c += kN)
          for (int i = 0; i < LG; ++i) total[i] += load(packed + (l + i) * pc + c0 + c) * load(column + c);
        for (int i = 0; i < LG; ++i) store(q + i * kN, total[i]);
      });
    }
  }

  // Pooled features of a block from its sums; the vectors are absent where a row has none.
  static void pool_block(Geometry g, int64_t channels, const A* vectors, const A* columns, A* pooled) {
    const A scale = A(1) / A(g.HW);
    for (int64_t c = 0; c < channels; c += kN) {
      V total = load(columns + c);
      if (Row(g.HW).vectors) {
        V sums[kN];
        for (int64_t i = 0; i < kN; ++i) sums[i] = c + i < channels ? load(vectors + (c + i) * kN) : zero<A>();
        total += lane_sums<A>(sums);
      }
      store(pooled + c, total * scale);
    }
  }

  // Maps, and pooled features if Pool.
  template <bool Pool, typename Source>
  static void maps_nchw(Geometry g, Source source, const A* packed, A* maps, A* pooled, A* pooled_twin,
                        Scratch scratch) {
    const int64_t block = channel_block(g), behind = 2 * kN;
    T* copies[2] = {scratch.take<T>(block * g.HW + behind), scratch.take<T>(block * g.HW + behind)};
    A* column = scratch.take<A>(block);
    A* column_sums = scratch.take<A>(kMaxColumns * g.L * kN);
    const Sums sums{scratch.take<A>(block * kN), scratch.take<A>(block * kN), scratch.take<A>(block),
                    scratch.take<A>(block)};
    // The channels that have at least `behind` elements of their view after their row, in whole vectors of channels.
    const int64_t safe = std::max<int64_t>(0, g.C - (behind + g.HW - 1) / g.HW) / kN * kN;
    for (int64_t c = 0; c < g.C;) {
      const int64_t n = std::min(block, c < safe ? safe - c : g.C - c);
      Source here = source.from(c * g.HW);
      if (c >= safe) {
        here.f = copy_padded(copies[0], here.f, n * g.HW, behind);
        if constexpr (Source::kPair) here.f_twin = copy_padded(copies[1], here.f_twin, n * g.HW, behind);
      }
      maps_block<Pool>(g, c, n, here, packed, maps, c == 0, column, column_sums, sums);
      if (Pool) pool_block(g, n, sums.own, sums.own_column, pooled + c);
      if (Pool && Source::kPair) pool_block(g, n, sums.twin, sums.twin_column, pooled_twin + c);
      c += n;
    }
    const Row row(g.HW);
    for (int64_t r = 0; r < row.columns; ++r)
      for (int64_t l = 0; l < g.L; ++l)
        maps[l * pitch(g.HW) + row.first_column + r] = lane_sum<A>(load(column_sums + (r * g.L + l) * kN));
  }

  static const T* copy_padded(T* to, const T* from, int64_t count, int64_t behind) {
    std::memcpy(static_cast<void*>(to), from, count * sizeof(T));
    std::memset(static_cast<void*>(to + count), 0, behind * sizeof(T));
    return to;
  }

  // --------------------------------------------------------------------------------------- maps, channels_last

  // HT positions from x on; the pair's difference is taken, and both views pooled, where there is a twin.
  template <int LG, int HT, bool IsPair>
  static void rows_tile(Geometry g, Pair pair, int64_t x, const A* rows, A* maps, A* pooled, A* pooled_twin) {
    const int64_t pc = pitch(g.C), p = pitch(g.HW);
    const T *f[HT], *f_twin[HT];
    for (int h = 0; h < HT; ++h) {
      f[h] = pair.f + (x + h) * g.C;
      if constexpr (IsPair) f_twin[h] = pair.f_twin + pair.table.index[x + h] * g.C;
    }
    V acc[LG][HT];
    for (int l = 0; l < LG; ++l)
      for (int h = 0; h < HT; ++h) acc[l][h] = zero<A>();
    auto step = [&](int64_t c, auto get) __attribute__((always_inline)) {
      V d[HT];
      for (int h = 0; h < HT; ++h) d[h] = get(f[h] + c);
      if constexpr (IsPair) {
        V twin[HT];
        for (int h = 0; h < HT; ++h) twin[h] = get(f_twin[h] + c);
        if (pooled) {
          V sum = d[0], sum_twin = twin[0];
          for (int h = 1; h < HT; ++h) sum += d[h], sum_twin += twin[h];
          store(pooled + c, load(pooled + c) + sum);
          store(pooled_twin + c, load(pooled_twin + c) + sum_twin);
        }
        for (int h = 0; h < HT; ++h) d[h] -= twin[h];
      }
      for (int l = 0; l < LG; ++l) {
        const V w = in_register(load(rows + l * pc + c));
        for (int h = 0; h < HT; ++h) acc[l][h] += w * d[h];
      }
    };
    const int64_t whole = g.C / kN * kN, rest = g.C - whole;
    for (int64_t c = 0; c < whole; c += kN) step(c, [](const T* q) { return load(q); });
    if (rest) step(whole, [rest](const T* q) { return load_first(q, rest); });
    constexpr int kFlat = (LG * HT + kN - 1) / kN * kN;
    V flat[kFlat];
    for (int i = 0; i < kFlat; ++i) flat[i] = i < LG * HT ? acc[i / HT][i % HT] : zero<A>();
    for (int i = 0; i < kFlat; i += kN) {
      const V sums = lane_sums<A>(reinterpret_cast<V(&)[kN]>(flat[i]));
      for (int j = i; j < std::min(i + kN, LG * HT); ++j) maps[(j / HT) * p + j % HT] = sums[j - i];
    }
  }

  template <bool IsPair>
  static void maps_channels_last(Geometry g, Pair pair, const A* rows, A* maps, A* pooled, A* pooled_twin) {
    const int64_t pc = pitch(g.C), p = pitch(g.HW);
    for_groups<kTile>(g.HW, [&]<int HT>(int64_t x) {
      for_groups<kAccumulators / kTile>(g.L, [&]<int LG>(int64_t l) {
        rows_tile<LG, HT, IsPair>(g, pair, x, rows + l * pc, maps + l * p + x, l ? nullptr : pooled, pooled_twin);
      });
    });
  }

  // ------------------------------------------------------------------------------------------ forward functions

  static void residual(Geometry g, Twin twin, const void* original, const void* mirrored, const void* packed,
                       void* residual, void* pooled, void* pooled_twin, void* scratch) {
    const Pair pair{static_cast<const T*>(original), static_cast<const T*>(mirrored), twin};
    const A* w = static_cast<const A*>(packed);
    A *s = static_cast<A*>(residual), *pool = static_cast<A*>(pooled), *pool_twin = static_cast<A*>(pooled_twin);
    if (g.channels_last) {
      const int64_t pc = pitch(g.C);
      const A scale = A(1) / A(g.HW);
      std::fill(pool, pool + pc, A(0));
      std::fill(pool_twin, pool_twin + pc, A(0));
      maps_channels_last<true>(g, pair, w, s, pool, pool_twin);
      for (int64_t c = 0; c < pc; ++c) pool[c] *= scale, pool_twin[c] *= scale;
      return;
    }
    Scratch room(scratch);
    if constexpr (kPermutes<A>)
      if (twin.base) return maps_nchw<true>(g, pair, w, s, pool, pool_twin, room);
    const int64_t p = pitch(g.HW);
    A* maps_twin = room.take<A>(g.L * p);
    maps_nchw<true>(g, One{pair.f}, w, s, pool, nullptr, room);
    maps_nchw<true>(g, One{pair.f_twin}, w, maps_twin, pool_twin, nullptr, room);
    for (int64_t l = 0; l < g.L; ++l)
      for (int64_t x = 0; x < g.HW; ++x) s[l * p + x] -= maps_twin[l * p + twin.index[x]];
  }

  static void maps(Geometry g, const void* features, const void* packed, void* maps, void* scratch) {
    const T* f = static_cast<const T*>(features);
    const A* w = static_cast<const A*>(packed);
    if (g.channels_last)
      maps_channels_last<false>(g, Pair{f, nullptr, {}}, w, static_cast<A*>(maps), nullptr, nullptr);
    else
      maps_nchw<false>(g, One{f}, w, static_cast<A*>(maps), nullptr, nullptr, Scratch(scratch));
  }

  static void logits(Geometry g, const void* packed, const void* pooled, const void* bias, void* logits) {
    const A* rows = static_cast<const A*>(packed);
    const A* x = static_cast<const A*>(pooled);
    const int64_t pc = pitch(g.C), whole = g.C / kN * kN;
    for_groups<8>(g.L, [&]<int LG>(int64_t l) {
      V sum[LG] = {};
      for (int64_t c = 0; c < whole; c += kN)
        for (int i = 0; i < LG; ++i) sum[i] += load(rows + (l + i) * pc + c) * load(x + c);
      for (int i = 0; i < LG; ++i) {
        sum[i] += load_first(rows + (l + i) * pc + whole, g.C - whole) * load_first(x + whole, g.C - whole);
        static_cast<A*>(logits)[l + i] = lane_sum<A>(sum[i]) + (bias ? static_cast<const A*>(bias)[l + i] : A(0));
      }
    });
  }

  // ---------------------------------------------------------------------------------------------- spread, NCHW

  // CH rows of U, TV vectors each, pitch(HW) apart.
  template <int CH, int TV>
  static void spread_tile(Geometry g, const A* columns, const A* d_maps, A* u) {
    const int64_t p = pitch(g.HW);
    V acc[CH][TV];
    for (int c = 0; c < CH; ++c)
      for (int t = 0; t < TV; ++t) acc[c][t] = zero<A>();
    for (int64_t l = 0; l < g.L; ++l) {
      V d[TV];
      for (int t = 0; t < TV; ++t) d[t] = load(d_maps + l * p + t * kN);
      for (int c = 0; c < CH; ++c)
        for (int t = 0; t < TV; ++t) acc[c][t] += columns[c * g.L + l] * d[t];
    }
    for (int c = 0; c < CH; ++c)
      for (int t = 0; t < TV; ++t) store(u + c * p + t * kN, acc[c][t]);
  }

  static void spread_block(Geometry g, int64_t c0, int64_t channels, const A* packed, const A* d_maps, A* u) {
    const int64_t p = pitch(g.HW), pc = pitch(g.C);
    const A* columns = packed + g.L * pc + c0 * g.L;
    const Row row(g.HW);
    for_groups<kTile>(row.vectors, [&]<int TV>(int64_t t) {
      for_groups<4>(channels, [&]<int CH>(int64_t c) {
        spread_tile<CH, TV>(g, columns + c * g.L, d_maps + t * kN, u + c * p + t * kN);
      });
    });
    for (int64_t x = row.first_column; x < row.first_column + row.columns; ++x)
      for (int64_t c = 0; c < channels; c += kN) {
        V sum = zero<A>();
        for (int64_t l = 0; l < g.L; ++l) sum += d_maps[l * p + x] * load(packed + l * pc + c0 + c);
        for (int64_t i = 0; i < std::min<int64_t>(kN, channels - c); ++i) u[(c + i) * p + x] = sum[i];
      }
  }

  // out[c, x] = constants[c] + U[c, x], or constants[c] - U[c, index[x]] where there is a twin.
  template <bool IsTwin>
  static void write_rows(Geometry g, Twin twin, int64_t channels, const A* constants, const A* u, T* out) {
    const int64_t p = pitch(g.HW), whole = g.HW / kN, rest = g.HW - whole * kN;
    const Row row(g.HW);
    auto value = [&](const A* q, int64_t t) __attribute__((always_inline)) {
      if constexpr (IsTwin)
        return permute(load(q + twin.base[t]), load(q + twin.base[t] + kN), twin.lanes + t * kN);
      else
        return load(q + t * kN);
    };
    for (int64_t c = 0; c < channels; ++c, u += p, out += g.HW) {
      const V constant = splat(constants[c]);
      for (int64_t t = 0; t < whole; ++t)
        store(out + t * kN, IsTwin ? constant - value(u, t) : constant + value(u, t));
      if (row.vectors > whole)
        store_first(out + whole * kN, IsTwin ? constant - value(u, whole) : constant + value(u, whole), rest);
      for (int64_t x = row.first_column; x < row.first_column + row.columns; ++x)
        out[x] = narrow<T>(IsTwin ? constants[c] - u[twin.index[x]] : constants[c] + u[x]);
    }
  }

  // One view, or a pair whose second view is -T'(U).
  static void spread_nchw(Geometry g, Twin inverse, const A* packed, const A* d_maps, const A* const (&constants)[2],
                          T* const (&out)[2], bool streaming, Scratch scratch) {
    const int64_t block = channel_block(g), p = pitch(g.HW);
    A* u = scratch.take<A>(block * p + 2 * kN);
    T* staging = scratch.take<T>(block * g.HW + kN);
    const A* d_twin = nullptr;  // T'(d_maps), where vectors can't be permuted
    if (out[1] && !(kPermutes<A> && inverse.base)) {
      A* d = scratch.take<A>(g.L * p);
      for (int64_t l = 0; l < g.L; ++l)
        for (int64_t x = 0; x < p; ++x) d[l * p + x] = x < g.HW ? -d_maps[l * p + inverse.index[x]] : 0;
      d_twin = d;
    }
    for (int64_t c0 = 0; c0 < g.C; c0 += block) {
      const int64_t channels = std::min(block, g.C - c0), count = channels * g.HW;
      for (int view = 0; view < (out[1] ? 2 : 1); ++view) {
        T* to = streaming ? staging : out[view] + c0 * g.HW;
        const A* k = constants[view] + c0;
        if (view == 0 || d_twin) {
          spread_block(g, c0, channels, packed, view ? d_twin : d_maps, u);
          write_rows<false>(g, inverse, channels, k, u, to);
        } else if constexpr (kPermutes<A>) {
          write_rows<true>(g, inverse, channels, k, u, to);
        }
        if (streaming) copy_out(out[view] + c0 * g.HW, staging, count);
      }
    }
  }

  // -------------------------------------------------------------------------------------- spread, channels_last

  // CV vectors of channels from c on, at position x of the view, or of the twin and where it comes from; the last of
  // them has `count` lanes.
  template <int CV>
  static void spread_cell(Geometry g, Twin inverse, int64_t x, int64_t c, const A* rows, const A* d_maps,
                          const A* const (&constants)[2], T* const (&out)[2], int64_t count, bool streaming) {
    const int64_t pc = pitch(g.C), p = pitch(g.HW), source = out[1] ? inverse.index[x] : x;
    V acc[CV] = {};
    for (int64_t l = 0; l < g.L; ++l)
      for (int i = 0; i < CV; ++i) acc[i] += d_maps[l * p + source] * load(rows + l * pc + c + i * kN);
    auto put = [&](T* q, V v) __attribute__((always_inline)) {
      if (CV == 1)
        store_first(q, v, count);
      else if (streaming)
        store_streaming(q, v);
      else
        store(q, v);
    };
    T* original = out[0] + source * g.C + c;
    for (int i = 0; i < CV; ++i) put(original + i * kN, acc[i] + load(constants[0] + c + i * kN));
    if (!out[1]) return;
    T* twin = out[1] + x * g.C + c;
    for (int i = 0; i < CV; ++i) put(twin + i * kN, load(constants[1] + c + i * kN) - acc[i]);
  }

  static void spread_channels_last(Geometry g, Twin inverse, const A* rows, const A* d_maps,
                                   const A* const (&constants)[2], T* const (&out)[2], bool streaming) {
    const int64_t whole = g.C / kN, rest = g.C % kN;
    const uintptr_t bases = reinterpret_cast<uintptr_t>(out[0]) | reinterpret_cast<uintptr_t>(out[1]);
    streaming = streaming && bases % kVectorBytes == 0 && (g.C * sizeof(T)) % kVectorBytes == 0;
    for (int64_t x = 0; x < g.HW; ++x) {
      for_groups<8>(whole, [&]<int CV>(int64_t i) {
        spread_cell<CV>(g, inverse, x, i * kN, rows, d_maps, constants, out, kN, streaming);
      });
      if (rest) spread_cell<1>(g, inverse, x, whole * kN, rows, d_maps, constants, out, rest, false);
    }
  }

  // ----------------------------------------------------------------------------------------- backward functions

  // W^T dz / HW, or zeros.
  static const A* spread_logits(Geometry g, const A* rows, const void* d_logits, A* constants) {
    const A* dz = static_cast<const A*>(d_logits);
    const int64_t pc = pitch(g.C);
    const A scale = A(1) / A(g.HW);
    for (int64_t c = 0; c < pc; c += kN) {
      V sum = zero<A>();
      if (dz)
        for (int64_t l = 0; l < g.L; ++l) sum += dz[l] * load(rows + l * pc + c);
      store(constants + c, sum * scale);
    }
    return constants;
  }

  static void spread_pair(Geometry g, Twin inverse, const void* packed, const void* d_residual, const void* dz,
                          const void* dz_twin, void* d_original, void* d_twin, bool streaming, void* scratch) {
    Scratch room(scratch);
    const A* rows = static_cast<const A*>(packed);
    A *one = room.take<A>(pitch(g.C)), *two = room.take<A>(pitch(g.C));
    const A* const constants[2] = {spread_logits(g, rows, dz, one), spread_logits(g, rows, dz_twin, two)};
    T* const out[2] = {static_cast<T*>(d_original), static_cast<T*>(d_twin)};
    const A* d = static_cast<const A*>(d_residual);
    if (g.channels_last)
      spread_channels_last(g, inverse, rows, d, constants, out, streaming);
    else
      spread_nchw(g, inverse, rows, d, constants, out, streaming, room);
    finish_streaming(streaming);
  }

  static void spread(Geometry g, const void* packed, const void* d_maps, void* d_features, bool streaming,
                     void* scratch) {
    Scratch room(scratch);
    const A* rows = static_cast<const A*>(packed);
    A* zeros = room.take<A>(pitch(g.C));
    const A* const constants[2] = {spread_logits(g, rows, nullptr, zeros), nullptr};
    T* const out[2] = {static_cast<T*>(d_features), nullptr};
    if (g.channels_last)
      spread_channels_last(g, {}, rows, static_cast<const A*>(d_maps), constants, out, streaming);
    else
      spread_nchw(g, {}, rows, static_cast<const A*>(d_maps), constants, out, streaming, room);
    finish_streaming(streaming);
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

  static void copy_out(T* out, const T* staging, int64_t count) {
#if defined(__SSE2__)
    const int64_t bytes = count * int64_t(sizeof(T));
    if (reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 && bytes % kVectorBytes == 0) {
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

  static void finish_streaming(bool streaming) {
#if defined(__SSE2__)
    if (streaming) _mm_sfence();
#endif
  }

  // ------------------------------------------------------------------------------------------- weight gradients

  static void correlate(Geometry g, const void* features, const void* d_maps, void* d_weight, void* scratch) {
    const T* f = static_cast<const T*>(features);
    const A* d = static_cast<const A*>(d_maps);
    A* out = static_cast<A*>(d_weight);
    const int64_t p = pitch(g.HW), vectors = p / kN;
    if (g.channels_last) {
      for (int64_t c = 0; c < g.C; c += kN) {
        const int64_t here = std::min<int64_t>(kN, g.C - c);
        for_groups<4>(g.L, [&]<int LG>(int64_t l) {
          V acc[LG] = {};
          for (int64_t x = 0; x < g.HW; ++x) {
            const V v = load_first(f + x * g.C + c, here);
            for (int i = 0; i < LG; ++i) acc[i] += d[(l + i) * p + x] * v;
          }
          for (int i = 0; i < LG; ++i) {
            A* q = out + (l + i) * g.C + c;
            store_first(q, load_first(q, here) + acc[i], here);
          }
        });
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

  static void accumulate(int64_t M, int64_t L, int64_t count, const void* factors, int64_t factor_stride,
                         const void* rows, int64_t row_stride, void* sum, int64_t sum_stride) {
    const A *factor = static_cast<const A*>(factors), *from = static_cast<const A*>(rows);
    A* to = static_cast<A*>(sum);
    for (int64_t c = 0; c < count; c += kN) {
      const int64_t here = std::min<int64_t>(kN, count - c);
      for_groups<8>(L, [&]<int LG>(int64_t l) {
        V acc[LG];
        for (int i = 0; i < LG; ++i) acc[i] = load_first(to + (l + i) * sum_stride + c, here);
        for (int64_t m = 0; m < M; ++m) {
          const V x = load_first(from + m * row_stride + c, here);
          for (int i = 0; i < LG; ++i) acc[i] += factor[m * factor_stride + l + i] * x;
        }
        for (int i = 0; i < LG; ++i) store_first(to + (l + i) * sum_stride + c, acc[i], here);
      });
    }
  }

  static constexpr Kernels table() {
    return {kN,   kPermutes<A>, packed_size, pack,   scratch_bytes, residual,
            maps, logits,       spread_pair, spread, correlate,     accumulate};
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
