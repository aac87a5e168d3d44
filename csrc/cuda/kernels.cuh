// What the operators (ops.cpp) ask of the kernels: plain parameters, plain launch functions, no torch.
//
// Served: L <= 16 classes, H W <= 64 positions, any C, NCHW and channels_last, float32, bfloat16 and float16 features
// with a weight of the same dtype or float32 (see `serves`); the cross-entropy serves any L. A float32 weight meets
// 16-bit features as two parts of their dtype, so with float16 features it has float16's range. One launch forward and
// one backward for the head; class_activation_maps is one launch forward, and two backward where the weight needs a
// gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>

#include "../head_math.h"

namespace rebalfer::gpu {

constexpr int kMaxClasses = 16, kMaxPositions = 64;
// An H200 ran clusters of 8 blocks 10 to 17 % slower than of 4 where C = 2048.
constexpr int kMaxClusterBits = 2;

inline bool serves(int64_t C, int64_t HW, int64_t L) {
  return C >= 1 && C < (int64_t(1) << 30) && HW >= 1 && HW <= kMaxPositions && L >= 1 && L <= kMaxClasses;
}

// log2 of the number of blocks that share one pair's channels, from what a sample is, never from how many there are:
// its sums keep their order in every batch. 24 KiB of each view a block or more: with 12 an H200 ran N = 32, C = 512
// alike to 2 %, and more pairs slower. `granted`: the most that the device allows (prepare), 0 before sm_90.
inline int cluster_bits(int64_t C, int64_t HW, int64_t element_bytes, int granted) {
  constexpr int64_t kViewBytes = 24 * 1024;
  int bits = 0;
  while (bits < granted && bits < kMaxClusterBits && C * HW * element_bytes >= (2 << bits) * kViewBytes) ++bits;
  return bits;
}

// Stages of the rings through which a block fetches: few blocks have more on their way each, of many blocks more are to
// find room on a multiprocessor.
constexpr int kMostStages = 4;
inline int ring_stages(int64_t blocks, int multiprocessors) {
  return blocks <= 2 * int64_t(multiprocessors) ? kMostStages : kMostStages / 2;
}

// A device's multiprocessors.
struct Multiprocessors {
  int count;
  int64_t shared_bytes;  // of each
};

// Which pairs the clusters of a grid serve: a cluster pairs `cluster`, cluster + clusters, ..., so that the features of
// its next pair are under way while it ends with one.
struct Turns {
  unsigned clusters = 0, each = 0, rest = 0;  // each pairs a cluster, the first `rest` of them one more
  unsigned ending = 0;                        // blocks that end with a pair at least: those of a cluster take turns

  // Of n pairs, with no more clusters of `size` blocks than find room at once.
  static Turns of(int64_t n, int64_t room, unsigned size) {
    Turns turns;
    turns.clusters = unsigned(std::max<int64_t>(1, std::min(n, room)));
    turns.each = unsigned(n / turns.clusters), turns.rest = unsigned(n % turns.clusters);
    turns.ending =
        turns.rest * std::min(turns.each + 1, size) + (turns.clusters - turns.rest) * std::min(turns.each, size);
    return turns;
  }
};

enum class Storage { f32, bf16, f16 };

// log2 of the blocks of the largest cluster that serves several pairs. An H200 ran clusters of 2 so 5 to 11 % faster
// than a cluster for each pair, but clusters of 4 slower by 3 to 20 %.
constexpr int kMostTurnsBits = 1;

// Of features into shared memory: by the bulk copy engine, from sm_90 on, 16 bytes at a time, or by element.
enum class Copies { kBulk, kVectors, kElements };

// (L, C) of the classifier, or (L,) of its bias: float32 or the features' dtype.
struct Parameter {
  const void* data;
  bool is_float;
};

struct Geometry {
  int64_t N;  // pairs of views, or single views
  int C, H, W, L, views;
  bool channels_last;
  TwinMap twin;
};

// Null pointers are inputs that the call has not, and outputs that nobody wants.
struct ForwardParams {
  Geometry g;
  const void* features;  // (views N, C, H, W)
  Parameter weight, bias;
  Targets<float> targets;
  const float* map_weights;  // (L,)
  float consistency_weight;
  int p;
  bool both_views;
  bool early;        // Granted::early
  int cluster_bits;  // 2^cluster_bits blocks of one pair, at most kMaxClusterBits
  int stages;        // ring_stages: kMostStages or half as many
  Turns turns;       // set by the launch, with the next
  Copies copies;

  float *loss, *classification, *consistency;  // (N,), or () with per_sample and ticket
  float* per_sample;                           // (2, N) scratch: classification and consistency
  unsigned* ticket;                            // zero before and after
  float *logits, *maps;                        // (2N, L), (views N, L, H, W)
  // Saved for the backward (rebalfer_kernels/ops.py): (N, L, H, W), (2N, L), (2N, C), (N, L, C).
  float *map_grad, *logit_grad, *pooled, *cam_grad;
};

// Of single views, by the gradient of their maps.
struct CamWeightParams {
  Geometry g;
  const void* features;  // (N, C, H, W)
  const float* d_maps;   // (N, L, H, W)
  float* cam_grad;       // (N, L, C)
  int split_bits;        // 2^split_bits blocks of one view
  int stages;            // ring_stages
  bool early;            // Granted::early
  Copies copies;         // set by the launch
};

struct Upstream {  // absent, a scalar (stride 0), or one a sample
  const float* data;
  int64_t stride;
};

// For single views map_grad is the gradient of the maps itself, and there are no upstream gradients.
struct BackwardParams {
  Geometry g;
  Upstream d_loss, d_classification, d_consistency;
  const float* d_logits;  // (2N, L)
  Parameter weight;
  const float *map_grad, *logit_grad, *pooled, *cam_grad;  // as the forward saved them, the last two for the weight
  float consistency_weight, share;                         // share: 1 / N under "mean"
  bool early;                                              // Granted::early

  void* d_features;
  void *d_weight, *d_bias;  // of the weight's dtype
};

struct CrossEntropyParams {
  int64_t M, L;
  const void* logits;
  Targets<float> targets;
  // Forward.
  float* loss;
  float* per_sample;
  unsigned* ticket;
  // Backward.
  Upstream d_loss;
  float share;
  void* d_logits;
};

void launch_forward(Storage storage, const ForwardParams& p, const Multiprocessors& on, cudaStream_t stream);
void launch_cam_weight(Storage storage, const CamWeightParams& p, cudaStream_t stream);
void launch_backward(Storage storage, const BackwardParams& p, cudaStream_t stream);
void launch_cross_entropy_forward(Storage storage, const CrossEntropyParams& p, cudaStream_t stream);
void launch_cross_entropy_backward(Storage storage, const CrossEntropyParams& p, cudaStream_t stream);

// A ticket, zero now, for a launch on this stream of the current device, or null where there are no more (tickets.cu).
unsigned* take_ticket(int device, cudaStream_t stream);

void load_tickets();

struct Granted {
  int cluster_bits;  // log2 of the blocks of the largest cluster
  Multiprocessors multiprocessors;
  bool early;  // a kernel may start before the one before it has ended, as it allows: from sm_90 on
};
// Before the first launch on the current device (devices.cu): what it has.
// Throws where the compiled code cannot run on it: its driver is too old, or the code is for other GPUs.
Granted prepare();

// Of one dtype, each in a file of its own so that they compile side by side.
template <typename T>
void launch_forward_as(const ForwardParams& p, const Multiprocessors& on, cudaStream_t stream);
template <typename T>
void launch_cam_weight_as(const CamWeightParams& p, cudaStream_t stream);
template <typename T>
void launch_backward_as(const BackwardParams& p, cudaStream_t stream);

// Each kernel once at least; of one that runs in clusters, the shared memory that it needs at most, else 0.
using Visit = std::function<void(const void* kernel, size_t cluster_shared_bytes)>;
void visit_kernels(const Visit& visit);
template <typename T>
void visit_forward_kernels_as(const Visit& visit);
template <typename T>
void visit_cam_weight_kernels_as(const Visit& visit);
template <typename T>
void visit_backward_kernels_as(const Visit& visit);

}  // namespace rebalfer::gpu
