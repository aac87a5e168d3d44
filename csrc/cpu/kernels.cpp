// The kernels over the features, compiled once per instruction set (REBALFER_ISA names the exported table).
//
// NCHW keeps the sums of a tile of positions in registers and walks over the channels; channels_last keeps the sums of
// a few rows as vectors over the channels and adds their lanes at the end. Both take the difference of the two views on
// the load, A - T(A~) = W (F - T F~), which halves the arithmetic: on features in the L3 cache a core spends most of
// its time there. NCHW needs a permutation of lanes for it (AVX-512); without one it subtracts the maps of the two
// views.
//
// Where the features come from memory, waiting for them would take longer than all arithmetic: both layouts fetch what
// they will read, and the lines that they will write, into the L2 cache some kilobytes ahead.
//
// A row of an NCHW map is loaded as whole vectors: the lanes past its end hold the next channel and are ignored, and
// only rows at the very end of a view, which nothing follows, are copied first. A few positions left over at the end of
// a row (49 = 3 * 16 + 1) are not worth a vector: these columns are gathered and treated as vectors over the channels.
// With AVX-512 a pair's gradient, of maps of 17 to 64 positions, is written as whole cache lines, at which rows of such
// a length do not end (RowsWriter).
#include "kernels.h"

#include <algorithm>

#include "simd.h"

namespace rebalfer {
namespace {

constexpr int64_t kBlockBytes = 8 * 1024;  // of one view: the block of a pair stays in an L1 cache
constexpr int64_t kMaxColumns = 4;
constexpr int64_t kAhead = 4 * 1024;  // bytes from what is read or written to what is fetched
constexpr int64_t kRowsAhead = 8;  // the same in rows of channels_last: past a map's row, which a flip visits backwards
constexpr int kTile = kAccumulators >= 24 ? 3 : 2;  // vectors of positions, or rows of channels_last
constexpr int kClasses = 8;  // of channels_last's maps at once: another pass over the features costs more than spills

// The kernels for features stored as T. Template parameters that count: LG classes, TV vectors of positions, HT rows of
// channels_last, CH channels, CV vectors of channels.
template <typename T>
struct KernelsOf {
  using A = typename Compute<T>::type;
  using V = Vec<A>;
  static constexpr int kN = kLanes<A>;

  static int64_t pitch(int64_t n) { return round_up(n, kN); }

  // How the positions of an NCHW row are divided: vectors, the last of which may be partial, then single columns.
  struct RowParts {
    explicit RowParts(int64_t HW) : vectors(HW / kN), columns(HW % kN), first_column(HW - HW % kN) {
      if (columns > kMaxColumns) ++vectors, columns = 0;
    }
    int64_t vectors, columns, first_column;
  };

  // Channels of one NCHW block: whole cache lines of T, few enough to stay in L1 between the passes.
  static int64_t channel_block(Geometry g) {
    return std::max<int64_t>(32, kBlockBytes / (g.HW * int64_t(sizeof(T))) / 32 * 32);
  }

  static int64_t packed_size(Geometry g) { return g.L * pitch(g.C) + (g.channels_last ? 0 : g.C * g.L); }

  // The packed weight's columns (C, L), which follow its rows (L, pitch(C)).
  static const A* columns_of(Geometry g, const A* packed) { return packed + g.L * pitch(g.C); }

  static void pack(Geometry g, const void* weight, bool weight_is_compute_type, void* packed) {
    A* rows = static_cast<A*>(packed);
    const int64_t row_pitch = pitch(g.C);
    for (int64_t l = 0; l < g.L; ++l) {
      for (int64_t c = 0; c < g.C; ++c)
        rows[l * row_pitch + c] = weight_is_compute_type ? static_cast<const A*>(weight)[l * g.C + c]
                                                         : widen(static_cast<const T*>(weight)[l * g.C + c]);
      for (int64_t c = g.C; c < row_pitch; ++c) rows[l * row_pitch + c] = 0;
    }
    if (g.channels_last) return;
    A* columns = rows + g.L * row_pitch;
    for (int64_t c = 0; c < g.C; ++c)
      for (int64_t l = 0; l < g.L; ++l) columns[c * g.L + l] = rows[l * row_pitch + c];
  }

  // The most that any function takes: blocks of both views with room for two vectors behind, two rows of constants,
  // two sets of maps, a block of rows in the compute type, columns and sums.
  static int64_t scratch_bytes(Geometry g) {
    const int64_t block = channel_block(g), of_t = sizeof(T), of_a = sizeof(A);
    return 2 * (block * g.HW + 2 * kN) * of_t + 2 * pitch(g.C) * of_a + 2 * g.L * pitch(g.HW) * of_a +
           (block * (pitch(g.HW) + 2 * kN + 3) + 2 * kN) * of_a + kMaxColumns * g.L * kN * of_a + 16 * 64;
  }

  // What follows kAhead behind p, in as many vectors and the start of a cache line more: a row of positions.
  template <int Vectors>
  static void prefetch_ahead(const T* p) {
    constexpr int lines = Vectors * kN * int(sizeof(T)) / kCacheLine + 1;
    for (int i = 0; i < lines; ++i) prefetch(reinterpret_cast<const char*>(p) + kAhead + i * kCacheLine);
  }

  // The same of channels_last, a vector of a row's channels: the cache line that begins at channel c, if one does.
  static void prefetch_row_ahead(const T* p, int64_t C, int64_t c) {
    constexpr int64_t line = kCacheLine / sizeof(T);
    if (kN >= line || c % line == 0) prefetch(p + kRowsAhead * C);
  }

  // ------------------------------------------------------------------------------------------------ maps, NCHW

  // What the maps are summed over: the features of one view, or the difference of a pair's. A load gives that
  // difference, and in `own` what each view has there.
  struct OneView {
    static constexpr int kViews = 1;
    const T* features[1];
    // TV vectors of the rows from t on, with what is the same for all rows at hand.
    template <int TV>
    struct Tile {
      const T* features;
      Tile(const OneView& of, int64_t t) : features(of.features[0] + t * kN) {}
      V load(int64_t offset, int i, V (&own)[1]) const { return own[0] = rebalfer::load(features + offset + i * kN); }
    };
    A at(int64_t offset, int64_t x, A (&own)[1]) const { return own[0] = widen(features[0][offset + x]); }
    const T* row(int64_t C, int64_t x, int) const { return features[0] + x * C; }
  };
  struct Pair {
    static constexpr int kViews = 2;
    const T* features[2];
    Permutation undo;
    template <int TV>
    struct Tile {
      const T *original, *twin[TV];
      LaneIndex index[TV];
      Tile(const Pair& of, int64_t t) : original(of.features[0] + t * kN) {
        for (int i = 0; i < TV; ++i) {
          twin[i] = of.features[1] + of.undo.base[t + i];
          index[i] = load_index(of.undo.lanes + (t + i) * kN);
        }
      }
      V load(int64_t offset, int i, V (&own)[2]) const {
        own[0] = rebalfer::load(original + offset + i * kN);
        own[1] = load_permuted(twin[i] + offset, index[i]);
        return own[0] - own[1];
      }
    };
    A at(int64_t offset, int64_t x, A (&own)[2]) const {
      own[0] = widen(features[0][offset + x]);
      own[1] = widen(features[1][offset + undo.index[x]]);
      return own[0] - own[1];
    }
    // channels_last: the view's channels at what position x meets.
    const T* row(int64_t C, int64_t x, int view) const { return features[view] + (view ? undo.index[x] : x) * C; }
  };

  // Sums over the positions of each channel of a block: of the vectors (channels, kN), and of the single columns.
  struct PoolSums {
    A *vectors, *columns;
  };

  // A block of channels, whose rows may be loaded past their end, and what is summed over it.
  template <typename Source>
  struct MapsBlock {
    const Geometry g;
    const int64_t map_pitch, weight_pitch;
    A* maps;         // (L, map_pitch), the sums so far
    A* column;       // one column of the block, with zeros up to a whole vector
    A* column_sums;  // (columns, L, kN), the single columns' part of the maps, lanes not yet added
    PoolSums pool[Source::kViews] = {};
    // Of the present block:
    int64_t channels = 0;
    Source source = {};
    const A* weight_rows = nullptr;     // (L, weight_pitch)
    const A* weight_columns = nullptr;  // (channels, L)
  };

  // The maps of LG classes from l on and TV vectors of positions from t on, the first classes' fetching what comes
  // next.
  template <int LG, int TV, bool kFirst, bool kPool, typename Source>
  [[gnu::always_inline]] static void maps_tile(const MapsBlock<Source>& block, int64_t l, int64_t t) {
    constexpr int kViews = Source::kViews;
    const int64_t HW = block.g.HW, L = block.g.L, map_pitch = block.map_pitch, channels = block.channels;
    const A* weight = block.weight_columns + l;
    A* maps = block.maps + l * map_pitch + t * kN;
    const LaneMask in_row = first_lanes<A>(HW - (t + TV - 1) * kN);  // of the tile's last vector
    const typename Source::template Tile<TV> tile(block.source, t);
    A* pool[kViews];
    const T* features[kViews];
    for (int view = 0; view < kViews; ++view) {
      pool[view] = block.pool[view].vectors;
      features[view] = block.source.features[view] + t * kN;
    }
    V sums[LG][TV];
    for (int j = 0; j < LG; ++j)
      for (int i = 0; i < TV; ++i) sums[j][i] = load(maps + j * map_pitch + i * kN);
    for (int64_t c = 0; c < channels; ++c, weight += L) {
      if constexpr (kFirst) {  // written out: of a loop over the views, GCC 12 moves the sums to memory
        prefetch_ahead<TV>(features[0] + c * HW);
        if constexpr (kViews == 2) prefetch_ahead<TV>(features[1] + c * HW);
      }
      V difference[TV], pooled[kViews];
      for (int i = 0; i < TV; ++i) {
        V own[kViews];
        difference[i] = tile.load(c * HW, i, own);
        if constexpr (kPool)
          for (int view = 0; view < kViews; ++view) {
            const V kept = i == TV - 1 ? masked(in_row, own[view]) : own[view];
            pooled[view] = i ? pooled[view] + kept : kept;
          }
      }
      if constexpr (kPool)
        for (int view = 0; view < kViews; ++view) {
          A* to = pool[view] + c * kN;
          store(to, t ? load(to) + pooled[view] : pooled[view]);
        }
      for (int j = 0; j < LG; ++j)
        for (int i = 0; i < TV; ++i) sums[j][i] += weight[j] * difference[i];
    }
    for (int j = 0; j < LG; ++j)
      for (int i = 0; i < TV; ++i) store(maps + j * map_pitch + i * kN, sums[j][i]);
  }

  // The r-th of a row's single columns, gathered from all channels of the block; adds to the pool's sums.
  template <bool kPool, typename Source>
  static void gather_column(const MapsBlock<Source>& block, int64_t r) {
    const int64_t channels = block.channels, x = RowParts(block.g.HW).first_column + r;
    for (int64_t c = 0; c < channels; ++c) {
      A own[Source::kViews];
      block.column[c] = block.source.at(c * block.g.HW, x, own);
      if constexpr (kPool)
        for (int view = 0; view < Source::kViews; ++view) block.pool[view].columns[c] += own[view];
    }
    std::fill(block.column + channels, block.column + pitch(channels), A(0));
  }

  template <typename Source>
  static void multiply_column(const MapsBlock<Source>& block, int64_t r) {
    for_groups<8>(block.g.L, [&]<int LG>(int64_t l) {
      const A* weight = block.weight_rows + l * block.weight_pitch;
      A* to = block.column_sums + (r * block.g.L + l) * kN;
      V sums[LG];
      for (int i = 0; i < LG; ++i) sums[i] = load(to + i * kN);
      for (int64_t c = 0; c < block.channels; c += kN)
        for (int i = 0; i < LG; ++i) sums[i] += load(weight + i * block.weight_pitch + c) * load(block.column + c);
      for (int i = 0; i < LG; ++i) store(to + i * kN, sums[i]);
    });
  }

  template <bool kPool, typename Source>
  static void maps_block(const MapsBlock<Source>& block) {
    const RowParts row(block.g.HW);
    for_groups<kTile>(row.vectors, [&]<int TV>(int64_t t) {
      for_groups<kAccumulators / kTile>(block.g.L, [&]<int LG>(int64_t l) {
        if (l == 0)
          maps_tile<LG, TV, true, kPool>(block, l, t);
        else
          maps_tile<LG, TV, false, false>(block, l, t);
      });
    });
    if constexpr (kPool)
      for (const PoolSums& pool : block.pool) std::fill_n(pool.columns, pitch(block.channels), A(0));
    for (int64_t r = 0; r < row.columns; ++r) {
      gather_column<kPool>(block, r);
      multiply_column(block, r);
    }
  }

  // Pooled features of a block from its sums; there are no vectors where a row has none.
  static void pool_block(Geometry g, int64_t channels, PoolSums sums, A* pooled) {
    const A scale = A(1) / A(g.HW);
    for (int64_t c = 0; c < channels; c += kN) {
      V total = load(sums.columns + c);
      if (RowParts(g.HW).vectors) {
        V vectors[kN];
        for (int64_t i = 0; i < kN; ++i) vectors[i] = c + i < channels ? load(sums.vectors + (c + i) * kN) : zero<A>();
        total += lane_sums<A>(vectors);
      }
      store(pooled + c, total * scale);
    }
  }

  // Maps and, if kPool, pooled features of each view.
  template <bool kPool, typename Source>
  static void maps_nchw(Geometry g, Source source, const A* packed, A* maps, A* const (&pooled)[Source::kViews],
                        Scratch scratch) {
    const int64_t block_channels = channel_block(g), behind = 2 * kN;
    T* copies[Source::kViews];
    for (T*& copy : copies) copy = scratch.take<T>(block_channels * g.HW + behind);
    MapsBlock<Source> block{
        g, pitch(g.HW), pitch(g.C), maps, scratch.take<A>(block_channels), scratch.take<A>(kMaxColumns * g.L * kN)};
    std::fill_n(maps, g.L * block.map_pitch, A(0));
    std::fill_n(block.column_sums, kMaxColumns * g.L * kN, A(0));
    for (PoolSums& pool : block.pool) pool = {scratch.take<A>(block_channels * kN), scratch.take<A>(block_channels)};
    // The channels that have at least `behind` elements of their view after their row, in whole vectors of channels.
    const int64_t safe = std::max<int64_t>(0, g.C - (behind + g.HW - 1) / g.HW) / kN * kN;
    for (int64_t c = 0; c < g.C; c += block.channels) {
      block.channels = std::min(block_channels, c < safe ? safe - c : g.C - c);
      block.weight_rows = packed + c;
      block.weight_columns = columns_of(g, packed) + c * g.L;
      block.source = source;
      for (int view = 0; view < Source::kViews; ++view) {
        const T*& features = block.source.features[view];
        features += c * g.HW;
        if (c >= safe) features = copy_padded(copies[view], features, block.channels * g.HW, behind);
      }
      maps_block<kPool>(block);
      if constexpr (kPool)
        for (int view = 0; view < Source::kViews; ++view)
          pool_block(g, block.channels, block.pool[view], pooled[view] + c);
    }
    const RowParts row(g.HW);
    for (int64_t r = 0; r < row.columns; ++r)
      for (int64_t l = 0; l < g.L; ++l)
        maps[l * block.map_pitch + row.first_column + r] = lane_sum<A>(load(block.column_sums + (r * g.L + l) * kN));
  }

  static const T* copy_padded(T* to, const T* from, int64_t count, int64_t behind) {
    std::memcpy(static_cast<void*>(to), from, count * sizeof(T));
    std::memset(static_cast<void*>(to + count), 0, behind * sizeof(T));
    return to;
  }

  // --------------------------------------------------------------------------------------- maps, channels_last

  template <typename Source>
  struct MapsRows {
    Geometry g;
    const A* packed;
    A* maps;                    // (L, pitch(HW))
    A* pooled[Source::kViews];  // (pitch(C)) sums over the positions so far, of a pair
    Source source;
  };

  // The maps of LG classes from l on and HT positions from x on; a pair is pooled on the way, once, with the first
  // classes.
  template <int LG, int HT, typename Source>
  static void rows_tile(MapsRows<Source> of, int64_t l, int64_t x) {
    constexpr int kViews = Source::kViews;
    const int64_t C = of.g.C, weight_pitch = pitch(C), map_pitch = pitch(of.g.HW);
    const A* weight = of.packed + l * weight_pitch;
    A* maps = of.maps + l * map_pitch + x;
    const T* rows[kViews][HT];
    for (int view = 0; view < kViews; ++view)
      for (int h = 0; h < HT; ++h) rows[view][h] = of.source.row(C, x + h, view);
    constexpr bool kRoom = LG * HT <= kAccumulators + 2;  // measured: with more sums, a weight is read once a row
    V sums[LG][HT];
    for (int j = 0; j < LG; ++j)
      for (int h = 0; h < HT; ++h) sums[j][h] = zero<A>();
    auto step = [&](int64_t c, auto get) __attribute__((always_inline)) {
      V own[kViews][HT];
      for (int view = 0; view < kViews; ++view)
        for (int h = 0; h < HT; ++h) {
          if (l == 0) prefetch_row_ahead(rows[view][h] + c, C, c);
          own[view][h] = get(rows[view][h] + c);
        }
      if constexpr (kViews == 2) {
        if (l == 0)
          for (int view = 0; view < 2; ++view) {
            V sum = own[view][0];
            for (int h = 1; h < HT; ++h) sum += own[view][h];
            store(of.pooled[view] + c, load(of.pooled[view] + c) + sum);
          }
        for (int h = 0; h < HT; ++h) own[0][h] -= own[1][h];
      }
      for (int j = 0; j < LG; ++j) {
        const V of_class = load(weight + j * weight_pitch + c), w = kRoom ? in_register(of_class) : of_class;
        for (int h = 0; h < HT; ++h) sums[j][h] += w * own[0][h];
      }
    };
    const int64_t whole = C / kN * kN, rest = C - whole;
    for (int64_t c = 0; c < whole; c += kN) step(c, [](const T* q) { return load(q); });
    if (rest) step(whole, [rest](const T* q) { return load_first(q, rest); });
    constexpr int kFlat = (LG * HT + kN - 1) / kN * kN;
    V flat[kFlat] = {};
    for (int j = 0; j < LG; ++j)
      for (int h = 0; h < HT; ++h) flat[j * HT + h] = sums[j][h];
    A totals[kFlat];
    for (int i = 0; i < kFlat; i += kN) store(totals + i, lane_sums<A>(reinterpret_cast<V(&)[kN]>(flat[i])));
    for (int j = 0; j < LG; ++j)
      for (int h = 0; h < HT; ++h) maps[j * map_pitch + h] = totals[j * HT + h];
  }

  template <typename Source>
  static void maps_channels_last(const MapsRows<Source>& of) {
    // Classes outside: a group's weights stay in the L1 cache, and the features of a pair in the L2 cache.
    for_groups<kClasses>(of.g.L, [&]<int LG>(int64_t l) {
      for_groups<kTile>(of.g.HW, [&]<int HT>(int64_t x) { rows_tile<LG, HT>(of, l, x); });
    });
  }

  // ------------------------------------------------------------------------------------------ forward functions

  static void residual(Geometry g, Permutation undo, const void* original, const void* twin, const void* packed,
                       void* residual, void* pooled, void* pooled_twin, void* scratch) {
    const Pair pair{{static_cast<const T*>(original), static_cast<const T*>(twin)}, undo};
    const A* weight = static_cast<const A*>(packed);
    A *s = static_cast<A*>(residual), *const pool[2] = {static_cast<A*>(pooled), static_cast<A*>(pooled_twin)};
    if (g.channels_last) {
      const A scale = A(1) / A(g.HW);
      for (A* view : pool) std::fill_n(view, pitch(g.C), A(0));
      maps_channels_last(MapsRows<Pair>{g, weight, s, {pool[0], pool[1]}, pair});
      for (A* view : pool)
        for (int64_t c = 0; c < pitch(g.C); ++c) view[c] *= scale;
      return;
    }
    Scratch room(scratch);
    if constexpr (kPermutesAtOnce<A>)  // else it costs what the difference saves
      if (undo.base) return maps_nchw<true>(g, pair, weight, s, pool, room);
    const int64_t map_pitch = pitch(g.HW);
    A* maps[2] = {s, room.take<A>(g.L * map_pitch)};
    for (int view = 0; view < 2; ++view)
      maps_nchw<true>(g, OneView{{pair.features[view]}}, weight, maps[view], {pool[view]}, room);
    for (int64_t l = 0; l < g.L; ++l)
      for (int64_t x = 0; x < g.HW; ++x) s[l * map_pitch + x] -= maps[1][l * map_pitch + undo.index[x]];
  }

  static void maps(Geometry g, const void* features, const void* packed, void* maps, void* scratch) {
    const OneView view{{static_cast<const T*>(features)}};
    const A* weight = static_cast<const A*>(packed);
    if (g.channels_last)
      maps_channels_last(MapsRows<OneView>{g, weight, static_cast<A*>(maps), {nullptr}, view});
    else
      maps_nchw<false>(g, view, weight, static_cast<A*>(maps), {nullptr}, Scratch(scratch));
  }

  static void logits(Geometry g, const void* packed, const void* pooled, const void* bias, void* logits) {
    const A* x = static_cast<const A*>(pooled);
    const int64_t weight_pitch = pitch(g.C), whole = g.C / kN * kN, rest = g.C - whole;
    for_groups<8>(g.L, [&]<int LG>(int64_t l) {
      const A* weight = static_cast<const A*>(packed) + l * weight_pitch;
      V sum[LG] = {};
      for (int64_t c = 0; c < whole; c += kN)
        for (int i = 0; i < LG; ++i) sum[i] += load(weight + i * weight_pitch + c) * load(x + c);
      for (int i = 0; i < LG; ++i) {
        sum[i] += load_first(weight + i * weight_pitch + whole, rest) * load_first(x + whole, rest);
        static_cast<A*>(logits)[l + i] = lane_sum<A>(sum[i]) + (bias ? static_cast<const A*>(bias)[l + i] : A(0));
      }
    });
  }

  // ------------------------------------------------------------------------------- gradient of the features, NCHW

  // The gradient of one view's features, or of a pair's: constants[0] + U and constants[1] - T'(U), where U = W^T
  // d_maps.
  struct FeatureGradient {
    Geometry g;
    const A* packed;
    const A* d_maps;  // (L, pitch(HW))
    int views;
    const A* constants[2];  // (pitch(C)), W^T dz / HW
    T* out[2];
    Permutation inverse;  // T'
    bool streaming;
  };

  // CH rows of U, TV vectors each, pitch(HW) apart.
  template <int CH, int TV>
  static void gradient_rows(Geometry g, const A* columns, const A* d_maps, A* u) {
    const int64_t map_pitch = pitch(g.HW);
    V sums[CH][TV];
    for (int c = 0; c < CH; ++c)
      for (int t = 0; t < TV; ++t) sums[c][t] = zero<A>();
    for (int64_t l = 0; l < g.L; ++l) {
      V d[TV];
      for (int t = 0; t < TV; ++t) d[t] = load(d_maps + l * map_pitch + t * kN);
      for (int c = 0; c < CH; ++c)
        for (int t = 0; t < TV; ++t) sums[c][t] += columns[c * g.L + l] * d[t];
    }
    for (int c = 0; c < CH; ++c)
      for (int t = 0; t < TV; ++t) store(u + c * map_pitch + t * kN, sums[c][t]);
  }

  // Not inlined, a pair takes 3 % fewer instructions (AVX2, 7 x 7, C = 512, counted by callgrind).
  [[gnu::noinline]] static void gradient_block(Geometry g, const A* packed, const A* d_maps, int64_t first_channel,
                                               int64_t channels, A* u) {
    const int64_t map_pitch = pitch(g.HW), weight_pitch = pitch(g.C);
    const A* columns = columns_of(g, packed) + first_channel * g.L;
    const RowParts row(g.HW);
    for_groups<kTile>(row.vectors, [&]<int TV>(int64_t t) {
      for_groups<4>(channels, [&]<int CH>(int64_t c) {
        gradient_rows<CH, TV>(g, columns + c * g.L, d_maps + t * kN, u + c * map_pitch + t * kN);
      });
    });
    for (int64_t x = row.first_column; x < row.first_column + row.columns; ++x)
      for (int64_t c = 0; c < channels; c += kN) {
        V sum = zero<A>();
        for (int64_t l = 0; l < g.L; ++l)
          sum += d_maps[l * map_pitch + x] * load(packed + l * weight_pitch + first_channel + c);
        for (int64_t i = 0; i < std::min<int64_t>(kN, channels - c); ++i) u[(c + i) * map_pitch + x] = sum[i];
      }
  }

  // out[c, x] = constants[c] + U[c, x] or, for the twin, constants[c] - U[c, inverse.index[x]].
  template <bool kTwin>
  static void write_rows(const FeatureGradient& of, int64_t channels, const A* constants, const A* u, T* out) {
    const Geometry g = of.g;
    const Permutation inverse = of.inverse;
    const int64_t ahead = of.streaming ? 0 : g.HW * int64_t(sizeof(T));
    const int64_t map_pitch = pitch(g.HW), whole = g.HW / kN, rest = g.HW - whole * kN;
    const RowParts row(g.HW);
    auto value = [&](const A* q, int64_t t) __attribute__((always_inline)) {
      if constexpr (kTwin)
        return permute(load(q + inverse.base[t]), load(q + inverse.base[t] + kN), load_index(inverse.lanes + t * kN));
      else
        return load(q + t * kN);
    };
    for (int64_t c = 0; c < channels; ++c, u += map_pitch, out += g.HW) {
      const V constant = splat(constants[c]);
      for (int64_t b = 0; b < ahead; b += kCacheLine) prefetch(reinterpret_cast<const char*>(out) + kAhead + b);
      for (int64_t t = 0; t < whole; ++t) store(out + t * kN, kTwin ? constant - value(u, t) : constant + value(u, t));
      if (row.vectors > whole)
        store_first(out + whole * kN, kTwin ? constant - value(u, whole) : constant + value(u, whole), rest);
      for (int64_t x = row.first_column; x < row.first_column + row.columns; ++x)
        out[x] = narrow<T>(kTwin ? constants[c] - u[inverse.index[x]] : constants[c] + u[x]);
    }
  }

  // -T'(d_maps), with zeros behind each row.
  static const A* twin_of(Geometry g, Permutation inverse, const A* d_maps, A* d_twin) {
    const int64_t map_pitch = pitch(g.HW);
    for (int64_t l = 0; l < g.L; ++l)
      for (int64_t x = 0; x < map_pitch; ++x)
        d_twin[l * map_pitch + x] = x < g.HW ? -d_maps[l * map_pitch + inverse.index[x]] : 0;
    return d_twin;
  }

  // Writes rows that lie one behind the other, whatever their length, a cache line at a time: a store that meets two
  // lines costs several that meet one.
  class RowsWriter {
   public:
    // From the beginning of a line on, or more slowly from elsewhere.
    RowsWriter(T* to, bool streaming) : to_(to), streaming_(streaming) {}

    // A row of Count vectors, of the last one `lanes`.
    template <int Count>
    [[gnu::always_inline]] void put(const V (&row)[Count], int lanes) {
      const LaneIndex next = lanes_from(kN - left_);
      for (int i = 0; i + 1 < Count; ++i) {
        write(permute(last_, row[i], next));
        last_ = row[i];
      }
      if (left_ + lanes >= kN) write(permute(last_, row[Count - 1], next));
      last_ = permute(last_, row[Count - 1], lanes_from(lanes));
      left_ = (left_ + lanes) % kN;
    }

    // What is less than a line.
    [[gnu::always_inline]] void finish() {
      if (has_first_) store(to_, first_), to_ += kN;
      if (left_) store_first(to_, permute(last_, last_, lanes_from(kN - left_)), left_);
    }

   private:
    static constexpr int kOfLine = int(sizeof(A) / sizeof(T));  // vectors in a line of T

    [[gnu::always_inline]] void write(V v) {
      if constexpr (kOfLine == 1) {
        write_line({v});
      } else {
        if (has_first_) write_line({first_, v});
        first_ = v;
        has_first_ = !has_first_;
      }
    }
    [[gnu::always_inline]] void write_line(const V (&line)[kOfLine]) {
      if (streaming_) {
        alignas(kCacheLine) T narrowed[kOfLine * kN];
        store(narrowed, line);
        copy_out(to_, narrowed, kOfLine * kN);
      } else {
        prefetch(reinterpret_cast<const char*>(to_) + kAhead);
        store(to_, line);
      }
      to_ += kOfLine * kN;
    }

    T* to_;
    const bool streaming_;
    V last_ = zero<A>();  // its last left_ lanes are not written yet
    int left_ = 0;
    V first_ = zero<A>();     // of a line of two vectors
    bool has_first_ = false;  // which is not written yet
  };

  // CH channels of a pair's gradients from c on, whose rows are TV vectors, `lanes` of the last: U stays in registers.
  // Twin lane i of vector t is of U's element from[t][i].
  template <int CH, int TV>
  static void pair_rows(const FeatureGradient& of, int64_t c, const LaneIndex (&from)[TV], int lanes,
                        RowsWriter (&out)[2]) {
    const int64_t L = of.g.L, map_pitch = pitch(of.g.HW);
    const A* weight = columns_of(of.g, of.packed) + c * L;
    V u[CH][TV];
    for (int i = 0; i < CH; ++i)
      for (int t = 0; t < TV; ++t) u[i][t] = zero<A>();
    for (int64_t l = 0; l < L; ++l) {
      V d[TV];
      for (int t = 0; t < TV; ++t) d[t] = in_register(load(of.d_maps + l * map_pitch + t * kN));
      for (int i = 0; i < CH; ++i)
        for (int t = 0; t < TV; ++t) u[i][t] += weight[i * L + l] * d[t];
    }
    for (int i = 0; i < CH; ++i) {
      const V constants[2] = {splat(of.constants[0][c + i]), splat(of.constants[1][c + i])};
      V original[TV], twin[TV];
      for (int t = 0; t < TV; ++t) {
        original[t] = constants[0] + u[i][t];
        twin[t] = constants[1] - permute(u[i], from[t]);
      }
      out[0].put(original, lanes);
      out[1].put(twin, lanes);
    }
  }

  template <int TV>
  static void pair_in_registers(const FeatureGradient& of) {
    const Geometry g = of.g;
    int32_t padded[TV * kN] = {};
    std::copy_n(of.inverse.index, g.HW, padded);
    LaneIndex from[TV];
    for (int t = 0; t < TV; ++t) from[t] = load_index(padded + t * kN);
    RowsWriter out[2] = {{of.out[0], of.streaming}, {of.out[1], of.streaming}};
    for_groups<kAccumulators * 2 / 3 / TV>(
        g.C, [&]<int CH>(int64_t c) { pair_rows<CH, TV>(of, c, from, int(g.HW - (TV - 1) * kN), out); });
    out[0].finish(), out[1].finish();  // in a loop, the compiler would keep both in memory throughout
  }

  // False, and nothing is written, for what is no pair or whose maps are too large, or small enough for one vector:
  // such rows are written as fast one by one.
  static bool pair_in_registers(const FeatureGradient& of) {
    if constexpr (kPermutesAtOnce<A>)
      if (of.views == 2) switch ((of.g.HW + kN - 1) / kN) {
          case 2: return pair_in_registers<2>(of), true;
          case 3: return pair_in_registers<3>(of), true;
          case 4: return pair_in_registers<4>(of), true;
        }
    return false;
  }

  static void gradient_nchw(const FeatureGradient& of, Scratch scratch) {
    if (pair_in_registers(of)) return;
    const Geometry g = of.g;
    const int64_t block = channel_block(g);
    A* u = scratch.take<A>(block * pitch(g.HW) + 2 * kN);
    T* const staging[2] = {scratch.take<T>(block * g.HW + kN), scratch.take<T>(block * g.HW + kN)};
    const A* d_twin = nullptr;  // where vectors can't be permuted
    if (of.views == 2 && !(kPermutes<A> && of.inverse.base))
      d_twin = twin_of(g, of.inverse, of.d_maps, scratch.take<A>(g.L * pitch(g.HW)));
    for (int64_t c = 0; c < g.C; c += block) {
      const int64_t channels = std::min(block, g.C - c);
      T* out[2];
      for (int view = 0; view < of.views; ++view) out[view] = of.streaming ? staging[view] : of.out[view] + c * g.HW;
      for (int view = 0; view < of.views; ++view) {
        const A* constants = of.constants[view] + c;
        if (view == 0 || d_twin) {
          gradient_block(g, of.packed, view ? d_twin : of.d_maps, c, channels, u);
          write_rows<false>(of, channels, constants, u, out[view]);
        } else if constexpr (kPermutes<A>) {
          write_rows<true>(of, channels, constants, u, out[view]);
        }
      }
      for (int view = 0; view < of.views && of.streaming; ++view)
        copy_out(of.out[view] + c * g.HW, out[view], channels * g.HW);
    }
  }

  // ---------------------------------------------------------------------- gradient of the features, channels_last

  // HT positions of the view, or of the twin and where they come from, from x on, in CV vectors of channels from c on;
  // the last of these has `count` lanes.
  template <int HT, int CV>
  [[gnu::always_inline]] static void gradient_tile(const FeatureGradient& of, int64_t x, int64_t c, int64_t count) {
    const int64_t C = of.g.C, L = of.g.L, weight_pitch = pitch(C), map_pitch = pitch(of.g.HW);
    const bool streaming = sizeof(T) == sizeof(A) && of.streaming;  // 16 bits are not streamed
    const A* weight = of.packed + c;
    const A* d[HT];
    T* out[2][HT];
    for (int h = 0; h < HT; ++h) {
      const int64_t source = of.views == 2 ? of.inverse.index[x + h] : x + h;
      d[h] = of.d_maps + source;
      out[0][h] = of.out[0] + source * C + c;
      out[1][h] = of.out[1] + (x + h) * C + c;
    }
    V u[HT][CV];
    for (int h = 0; h < HT; ++h)
      for (int i = 0; i < CV; ++i) u[h][i] = zero<A>();
    for (int64_t l = 0; l < L; ++l)
      for (int i = 0; i < CV; ++i) {
        const V w = in_register(load(weight + l * weight_pitch + i * kN));
        for (int h = 0; h < HT; ++h) u[h][i] += d[h][l * map_pitch] * w;
      }
    if (!streaming)
      for (int view = 0; view < of.views; ++view)
        for (int h = 0; h < HT; ++h)
          for (int i = 0; i < CV; ++i) prefetch_row_ahead(out[view][h] + i * kN, C, c + i * kN);
    constexpr int kAtOnce = CV % 2 ? 1 : 2;
    auto put = [&](T* const(&to)[HT], const A* constants, auto value) __attribute__((always_inline)) {
      for (int i = 0; i < CV; i += kAtOnce) {
        V constant[kAtOnce], v[kAtOnce];
        for (int k = 0; k < kAtOnce; ++k) constant[k] = load(constants + c + (i + k) * kN);
        for (int h = 0; h < HT; ++h) {
          for (int k = 0; k < kAtOnce; ++k) v[k] = value(constant[k], u[h][i + k]);
          if (CV == 1)
            store_first(to[h], v[0], count);
          else if (streaming)
            for (int k = 0; k < kAtOnce; ++k) store_streaming(to[h] + (i + k) * kN, v[k]);
          else
            store(to[h] + i * kN, v);
        }
      }
    };
    put(out[0], of.constants[0], [](V constant, V of_u) { return constant + of_u; });
    if (of.views == 2) put(out[1], of.constants[1], [](V constant, V of_u) { return constant - of_u; });
  }

  static void gradient_channels_last(FeatureGradient of) {
    const int64_t C = of.g.C, whole = C / kN, rest = C % kN;
    const uintptr_t bases = reinterpret_cast<uintptr_t>(of.out[0]) | reinterpret_cast<uintptr_t>(of.out[1]);
    of.streaming = of.streaming && bases % kVectorBytes == 0 && (C * sizeof(T)) % kVectorBytes == 0;
    for_groups<kTile>(of.g.HW, [&]<int HT>(int64_t x) {
      for_groups<kAccumulators / kTile>(whole, [&]<int CV>(int64_t i) { gradient_tile<HT, CV>(of, x, i * kN, kN); });
      if (rest) gradient_tile<HT, 1>(of, x, whole * kN, rest);
    });
  }

  // ----------------------------------------------------------------------------------------- backward functions

  static void write_gradient(const FeatureGradient& of, Scratch scratch) {
    if (of.g.channels_last)
      gradient_channels_last(of);
    else
      gradient_nchw(of, scratch);
    finish_streaming(of.streaming);
  }

  // W^T dz / HW, or zeros.
  static const A* logit_constants(Geometry g, const A* packed, const void* d_logits, A* constants) {
    const A* dz = static_cast<const A*>(d_logits);
    const int64_t weight_pitch = pitch(g.C);
    const A scale = A(1) / A(g.HW);
    for (int64_t c = 0; c < weight_pitch; c += kN) {
      V sum = zero<A>();
      if (dz)
        for (int64_t l = 0; l < g.L; ++l) sum += dz[l] * load(packed + l * weight_pitch + c);
      store(constants + c, sum * scale);
    }
    return constants;
  }

  static void pair_gradient(Geometry g, Permutation inverse, const void* packed, const void* d_maps, const void* dz,
                            const void* dz_twin, void* d_original, void* d_twin, bool streaming, void* scratch) {
    Scratch room(scratch);
    const A* weight = static_cast<const A*>(packed);
    const A* const constants[2] = {logit_constants(g, weight, dz, room.take<A>(pitch(g.C))),
                                   logit_constants(g, weight, dz_twin, room.take<A>(pitch(g.C)))};
    write_gradient({g,
                    weight,
                    static_cast<const A*>(d_maps),
                    2,
                    {constants[0], constants[1]},
                    {static_cast<T*>(d_original), static_cast<T*>(d_twin)},
                    inverse,
                    streaming},
                   room);
  }

  static void view_gradient(Geometry g, const void* packed, const void* d_maps, void* d_features, bool streaming,
                            void* scratch) {
    Scratch room(scratch);
    const A* weight = static_cast<const A*>(packed);
    const A* zeros = logit_constants(g, weight, nullptr, room.take<A>(pitch(g.C)));
    write_gradient({g, weight, static_cast<const A*>(d_maps), 1, {zeros}, {static_cast<T*>(d_features)}, {}, streaming},
                   room);
  }

  static void store_streaming(T* to, V v) {
    if constexpr (sizeof(T) != sizeof(A)) return store(to, v);
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)v);
#else
    store(to, v);
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
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
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
    const int64_t map_pitch = pitch(g.HW), vectors = map_pitch / kN;
    if (g.channels_last) {
      for (int64_t c = 0; c < g.C; c += kN) {
        const int64_t here = std::min<int64_t>(kN, g.C - c);
        for_groups<4>(g.L, [&]<int LG>(int64_t l) {
          V acc[LG] = {};
          for (int64_t x = 0; x < g.HW; ++x) {
            const V v = load_first(f + x * g.C + c, here);
            for (int i = 0; i < LG; ++i) acc[i] += d[(l + i) * map_pitch + x] * v;
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
            for (int64_t t = 0; t < vectors; ++t) sum += load(d + (l + i) * map_pitch + t * kN) * load(row + t * kN);
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
    return {kN,   kPermutes<A>, packed_size,   pack,          scratch_bytes, residual,
            maps, logits,       pair_gradient, view_gradient, correlate,     accumulate};
  }
};

}  // namespace

const Kernels& REBALFER_ISA(Storage storage) {
  static const Kernels f32 = KernelsOf<float>::table(), f64 = KernelsOf<double>::table(),
                       bf16 = KernelsOf<BFloat16>::table(), f16 = KernelsOf<Half>::table();
  switch (storage) {
    case Storage::f32: return f32;
    case Storage::f64: return f64;
    case Storage::bf16: return bf16;
    default: return f16;
  }
}

}  // namespace rebalfer
