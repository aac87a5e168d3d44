// The CPU kernels as the operators call them: plain pointers, one table of functions per instruction set and dtype.
#pragma once

#include <cstdint>

namespace rebalfer {

struct Geometry {
  int64_t C, HW, L;
  bool channels_last;
};

// Features are stored as T (float, double, bfloat16 bits, float16 bits); everything else is in the compute type:
// double for double, float otherwise. Every function works on one view (one image of the batch) and uses scratch of
// scratch_bytes(g); pitches are in elements.
struct Kernels {
  // Lanes of a vector; packed rows and maps have a pitch rounded up to it.
  int lanes;
  // Elements of the packed weight: rows (L, pitch(C)) and, for NCHW, columns (C, L) behind them.
  int64_t (*packed_size)(Geometry g);
  // weight (L, C) of the features' dtype or of the compute type.
  void (*pack)(Geometry g, const void* weight, bool weight_is_compute_type, void* packed);
  int64_t (*scratch_bytes)(Geometry g);
  // maps[l, x] = sum_c W[l, c] F[c, x], pitch(HW) apart; pooled[c] = mean_x F[c, x].
  void (*maps)(Geometry g, const void* features, const void* packed, void* maps, void* pooled, void* scratch);
  // logits[l] = sum_c W[l, c] pooled[c] + bias[l].
  void (*logits)(Geometry g, const void* packed, const void* pooled, const void* bias, void* logits);
  // d_features[c, x] = sum_l W[l, c] (d_maps[l, x] + d_logits[l] / HW); d_logits may be null.
  void (*spread)(Geometry g, const void* packed, const void* d_maps, const void* d_logits, void* d_features,
                 bool streaming, void* scratch);
  // d_weight[l, c] += sum_x d_maps[l, x] F[c, x], rows C apart.
  void (*correlate)(Geometry g, const void* features, const void* d_maps, void* d_weight, void* scratch);
};

enum class Storage { f32, f64, bf16, f16 };

const Kernels& kernels_avx512(Storage storage);
const Kernels& kernels_avx2(Storage storage);
const Kernels& kernels_baseline(Storage storage);

}  // namespace rebalfer
