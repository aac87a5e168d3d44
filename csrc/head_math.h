// The arithmetic of one sample, written once for the CPU and the CUDA kernels: the twin's map, the consistency term
// (Eq. 5) and the cross-entropy against a target table (Eq. 1 with Eq. 8), each with its gradient. No torch here.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define REBALFER_HD static __host__ __device__ __forceinline__
#else
#define REBALFER_HD static inline
#endif

namespace rebalfer {

// T(A~)[h, w] = A~.flatten()[offset + h * stride_h + w * stride_w]; see rebalfer_kernels/transforms.py.
struct TwinMap {
  int64_t offset, stride_h, stride_w;
};

REBALFER_HD int64_t twin_index(TwinMap map, int64_t h, int64_t w) {
  return map.offset + h * map.stride_h + w * map.stride_w;
}

// |v S|^p for p = 1 or 2.
template <typename A>
REBALFER_HD A consistency_term(A v, A s, int p) {
  const A x = v * s;
  return p == 1 ? (x < 0 ? -x : x) : x * x;
}

// d/dS |v S|^p = p v |v S|^(p-1) sign(v S), with sign(0) = 0 and NaN kept, as torch.
template <typename A>
REBALFER_HD A consistency_gradient(A v, A s, int p) {
  const A x = v * s;
  if (p == 2) return A(2) * v * x;
  return x > 0 ? v : x < 0 ? -v : x * v;
}

// log sum_l exp(z_l - top), where top is the largest logit: no exponential overflows, and since the differences are
// taken first, logits that are all large lose no digits.
template <typename A>
REBALFER_HD A log_sum_exp(const A* z, int64_t L, A& top) {
  top = z[0];
  for (int64_t l = 1; l < L; ++l) top = z[l] > top ? z[l] : top;
  A sum = 0;
  for (int64_t l = 0; l < L; ++l) sum += std::exp(z[l] - top);
  return std::log(sum);
}

// -sum_l t_l log softmax(z)_l. A zero target takes no part in the value, as in torch where it meets a finite log.
template <typename A>
REBALFER_HD A cross_entropy(const A* z, const A* t, int64_t L) {
  A top;
  const A lse = log_sum_exp(z, L, top);
  A loss = 0;
  for (int64_t l = 0; l < L; ++l) loss += t[l] * (lse - (z[l] - top));
  return loss;
}

// dz_l += g ((sum t) softmax(z)_l - t_l): the rows of the target table need not sum to 1.
template <typename A>
REBALFER_HD void cross_entropy_gradient(const A* z, const A* t, int64_t L, A g, A* dz) {
  A top;
  const A lse = log_sum_exp(z, L, top);
  A total = 0;
  for (int64_t l = 0; l < L; ++l) total += t[l];
  for (int64_t l = 0; l < L; ++l) dz[l] += g * (total * std::exp(z[l] - top - lse) - t[l]);
}

}  // namespace rebalfer
