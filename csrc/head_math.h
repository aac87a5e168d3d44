// The arithmetic of one sample, written once for the CPU and the CUDA kernels: the twin's map, the consistency term
// (Eq. 5) and the cross-entropy against a target table (Eq. 1 with Eq. 8), each with its gradient. No torch here.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#define REBALFER_HD_MEMBER __host__ __device__ __forceinline__
#define REBALFER_ROLLED _Pragma("unroll 1")  // a loop off the hot path: nvcc would unroll it, to no use
#else
#define REBALFER_HD_MEMBER inline
#define REBALFER_ROLLED
#endif
#define REBALFER_HD static REBALFER_HD_MEMBER

namespace rebalfer {

// T(A~)[h, w] = A~.flatten()[offset + h * stride_h + w * stride_w]; see rebalfer_kernels/transforms.py.
struct TwinMap {
  int64_t offset, stride_h, stride_w;
};

// What the head's forward needs besides tensors.
struct HeadOptions {
  double consistency_weight;  // lambda of Eq. 6
  int p;                      // of Eq. 5, 1 or 2
  TwinMap twin;               // undoes the twin's transform
  bool both_views;            // the twin is classified too (Eq. 1)
  bool mean;                  // losses are means over the batch, not per sample
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

// Rows of logits, targets and gradients below are pointers, or anything else with an index operator.
template <typename Row>
using Element = std::remove_cvref_t<decltype(std::declval<const Row&>()[0])>;

// The target distribution t of one sample: row `label` of the table (L, L), or soft (L) @ table where soft is not null.
// A label outside [0, L) reads nothing and gives NaN.
template <typename A>
struct TargetRow {
  const A* table;
  const A* soft;
  int64_t label, L;

  REBALFER_HD_MEMBER A operator[](int64_t l) const {
    if (!soft) return label >= 0 && label < L ? table[label * L + l] : A(NAN);
    A sum = 0;
    REBALFER_ROLLED
    for (int64_t y = 0; y < L; ++y) sum += soft[y] * table[y * L + l];
    return sum;
  }
};

// The targets of a batch: labels (N), or distributions soft (N, L) in their place, and the table (L, L). All are null
// where only the consistency is asked for.
template <typename A>
struct Targets {
  const int64_t* labels;
  const A* soft;
  const A* table;

  REBALFER_HD_MEMBER explicit operator bool() const { return table; }
  REBALFER_HD_MEMBER TargetRow<A> row(int64_t i, int64_t L) const {
    return {table, soft ? soft + i * L : nullptr, soft ? 0 : labels[i], L};
  }
};

// What the next two need of all logits: the largest, and log sum_l exp(z_l - top). No exponential overflows, and since
// the differences are taken first, logits that are all large lose no digits.
template <typename A>
struct LogSumExp {
  A top, log_sum;
};

template <typename Z>
REBALFER_HD LogSumExp<Element<Z>> log_sum_exp(const Z& z, int64_t L) {
  Element<Z> top = z[0], sum = 0;
  for (int64_t l = 1; l < L; ++l) top = z[l] > top ? z[l] : top;
  for (int64_t l = 0; l < L; ++l) sum += std::exp(z[l] - top);
  return {top, std::log(sum)};
}

// -sum_l t_l log softmax(z)_l. A target of 0 takes no part, so that a class masked by a logit of -inf costs nothing.
template <typename Z, typename T>
REBALFER_HD Element<Z> cross_entropy(const Z& z, LogSumExp<Element<Z>> of, const T& t, int64_t L) {
  Element<Z> loss = 0;
  for (int64_t l = 0; l < L; ++l) {
    const auto target = t[l];
    if (target != 0) loss += target * (of.log_sum - (z[l] - of.top));
  }
  return loss;
}

// dz_l = g ((sum t) softmax(z)_l - t_l): the rows of the target table need not sum to 1.
template <typename Z, typename T, typename D>
REBALFER_HD void cross_entropy_gradient(const Z& z, LogSumExp<Element<Z>> of, const T& t, int64_t L, Element<Z> g,
                                        const D& dz) {
  Element<Z> total = 0;
  for (int64_t l = 0; l < L; ++l) total += t[l];
  for (int64_t l = 0; l < L; ++l) dz[l] = g * (total * std::exp(z[l] - of.top - of.log_sum) - t[l]);
}

}  // namespace rebalfer
