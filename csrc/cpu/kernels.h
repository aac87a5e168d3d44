// The CPU kernels as the operators call them: plain pointers, one table of functions per instruction set and dtype.
#pragma once

#include <cstdint>

namespace rebalfer {

constexpr int64_t kCacheLine = 64;  // bytes

struct Geometry {
  int64_t C, HW, L;
  bool channels_last;
};

// A permutation of the HW positions of a row: permuted(row)[x] = row[index[x]]. It undoes the twin's transform, or is
// the inverse of that.
// Where base is not null, vector t of the permuted row is made of the two vectors of the row from base[t] on, by the
// choice of lanes[t * Kernels::lanes ...]; vectors that are not whole are left to index.
struct Permutation {
  const int32_t* index;
  const int32_t* base;
  const int32_t* lanes;
};

// Features are stored as T (float, double, bfloat16 bits, float16 bits); everything else is in the compute type:
// double for double, float otherwise. Every function works on one pair of views, or one view, and uses scratch of
// scratch_bytes(g). Rows of a map are pitch(HW) elements apart, pooled features have room for pitch(C), where pitch
// rounds up to a multiple of `lanes`.
struct Kernels {
  int lanes;
  bool permutes;  // whether Permutation::base and Permutation::lanes are of use, for NCHW
  // Elements of the packed weight: rows (L, pitch(C)) and, for NCHW, columns (C, L) behind them.
  int64_t (*packed_size)(Geometry g);
  // weight (L, C) of the features' dtype or of the compute type.
  void (*pack)(Geometry g, const void* weight, bool weight_is_compute_type, void* packed);
  int64_t (*scratch_bytes)(Geometry g);
  // residual[l, x] = sum_c W[l, c] (F[c, x] - T(F~)[c, x]), which is A - T(A~), where `undo` is T; pooled = mean_x F[c,
  // x] of both views.
  void (*residual)(Geometry g, Permutation undo, const void* original, const void* twin, const void* packed,
                   void* residual, void* pooled, void* pooled_twin, void* scratch);
  // maps[l, x] = sum_c W[l, c] F[c, x].
  void (*maps)(Geometry g, const void* features, const void* packed, void* maps, void* scratch);
  // logits[l] = sum_c W[l, c] pooled[c] + bias[l]; bias may be null.
  void (*logits)(Geometry g, const void* packed, const void* pooled, const void* bias, void* logits);
  // U[c, x] = sum_l W[l, c] d_maps[l, x]; d_original = U + W^T dz / HW; d_twin = -T'(U) + W^T dz~ / HW, where
  // `inverse` is the map T' that undoes T; dz and dz~ may be null. Streaming writes past the caches.
  void (*pair_gradient)(Geometry g, Permutation inverse, const void* packed, const void* d_maps, const void* dz,
                        const void* dz_twin, void* d_original, void* d_twin, bool streaming, void* scratch);
  // d_features[c, x] = sum_l W[l, c] d_maps[l, x].
  void (*view_gradient)(Geometry g, const void* packed, const void* d_maps, void* d_features, bool streaming,
                        void* scratch);
  // d_weight[l, c] += sum_x d_maps[l, x] F[c, x], rows C apart; d_maps has zeros behind each row.
  void (*correlate)(Geometry g, const void* features, const void* d_maps, void* d_weight, void* scratch);
  // sum[l, c] += sum_m factors[m, l] rows[m, c], in the order of m; the strides are those of m, L and c < count.
  void (*accumulate)(int64_t M, int64_t L, int64_t count, const void* factors, int64_t factor_stride, const void* rows,
                     int64_t row_stride, void* sum, int64_t sum_stride);
};

enum class Storage { f32, f64, bf16, f16 };

const Kernels& kernels_avx512(Storage storage);
const Kernels& kernels_avx2(Storage storage);
const Kernels& kernels_baseline(Storage storage);

}  // namespace rebalfer
