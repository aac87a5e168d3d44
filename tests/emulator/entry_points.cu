// The launch functions of csrc/cuda for Python: test_cuda_kernels.py.
#include "cuda/features.cuh"

using namespace rebalfer::gpu;
using rebalfer::emulator::attempt;

namespace {

Geometry geometry(int64_t N, int64_t C, int64_t H, int64_t W, int64_t L, int64_t views, int64_t channels_last,
                  const int64_t* twin) {
  return {N, int(C), int(H), int(W), int(L), int(views), channels_last != 0, {twin[0], twin[1], twin[2]}};
}

}  // namespace

extern "C" {

const char* get_cluster_blocks(int64_t C, int64_t HW, int64_t element_bytes, int64_t granted, int64_t* blocks) {
  *blocks = 1 << cluster_bits(C, HW, element_bytes, int(granted));
  return nullptr;
}

const char* get_ring_stages(int64_t blocks, int64_t multiprocessors, int64_t* stages) {
  *stages = ring_stages(blocks, int(multiprocessors));
  return nullptr;
}

// First channel and number of channels, multiples of a step, of a block.
const char* get_channels(int64_t storage, int64_t C, int64_t views, int64_t rank, int64_t bits, int64_t* channels) {
  const Geometry g{1, int(C), 7, 7, 7, int(views), true, {}};
  const Channels of_block = Storage(storage) == Storage::f32 ? Channels::of<float>(g, int(rank), int(bits))
                                                             : Channels::of<BFloat16>(g, int(rank), int(bits));
  channels[0] = of_block.first, channels[1] = int64_t(of_block.steps) * of_block.width;
  return nullptr;
}

const char* run_forward(int64_t storage, int64_t N, int64_t C, int64_t H, int64_t W, int64_t L, int64_t views,
                        int64_t channels_last, const int64_t* twin, const void* features, const void* weight,
                        int64_t weight_is_float, const void* bias, const int64_t* labels, const float* soft,
                        const float* table, const float* map_weights, float consistency_weight, int64_t p,
                        int64_t both_views, int64_t cluster, int64_t stages, int64_t multiprocessors, float* loss,
                        float* classification, float* consistency, float* per_sample, unsigned* ticket, float* logits,
                        float* maps, float* map_grad, float* logit_grad, float* pooled, float* cam_grad) {
  return attempt([&] {
    const ForwardParams params{geometry(N, C, H, W, L, views, channels_last, twin),
                               features,
                               {weight, weight_is_float != 0},
                               {bias, weight_is_float != 0},
                               {labels, soft, table},
                               map_weights,
                               consistency_weight,
                               int(p),
                               both_views != 0,
                               true,
                               std::countr_zero(uint64_t(cluster)),
                               int(stages),
                               {},
                               {},
                               loss,
                               classification,
                               consistency,
                               per_sample,
                               ticket,
                               logits,
                               maps,
                               map_grad,
                               logit_grad,
                               pooled,
                               cam_grad};
    launch_forward(Storage(storage), params, {int(multiprocessors), 228 * 1024}, nullptr);
  });
}

const char* run_cam_weight(int64_t storage, int64_t N, int64_t C, int64_t H, int64_t W, int64_t L,
                           int64_t channels_last, const void* features, const float* d_maps, float* cam_grad,
                           int64_t blocks, int64_t stages) {
  return attempt([&] {
    const int64_t none[6] = {};
    const CamWeightParams params{geometry(N, C, H, W, L, 1, channels_last, none),
                                 features,
                                 d_maps,
                                 cam_grad,
                                 std::countr_zero(uint64_t(blocks)),
                                 int(stages),
                                 true,
                                 {}};
    launch_cam_weight(Storage(storage), params, nullptr);
  });
}

const char* run_backward(int64_t storage, int64_t N, int64_t C, int64_t H, int64_t W, int64_t L, int64_t views,
                         int64_t channels_last, const int64_t* twin, const float* d_loss, int64_t loss_stride,
                         const float* d_classification, int64_t classification_stride, const float* d_consistency,
                         int64_t consistency_stride, const float* d_logits, const void* weight, int64_t weight_is_float,
                         const float* map_grad, const float* logit_grad, const float* pooled, const float* cam_grad,
                         float consistency_weight, float share, void* d_features, void* d_weight, void* d_bias) {
  return attempt([&] {
    const BackwardParams params{geometry(N, C, H, W, L, views, channels_last, twin),
                                {d_loss, loss_stride},
                                {d_classification, classification_stride},
                                {d_consistency, consistency_stride},
                                d_logits,
                                {weight, weight_is_float != 0},
                                map_grad,
                                logit_grad,
                                pooled,
                                cam_grad,
                                consistency_weight,
                                share,
                                true,
                                d_features,
                                d_weight,
                                d_bias};
    launch_backward(Storage(storage), params, nullptr);
  });
}

const char* run_cross_entropy(int64_t storage, int64_t M, int64_t L, const void* logits, const int64_t* labels,
                              const float* soft, const float* table, float* loss, float* per_sample, unsigned* ticket,
                              const float* d_loss, int64_t stride, float share, void* d_logits) {
  return attempt([&] {
    const CrossEntropyParams params{
        M, L, logits, {labels, soft, table}, loss, per_sample, ticket, {d_loss, stride}, share, d_logits};
    (d_logits ? launch_cross_entropy_backward : launch_cross_entropy_forward)(Storage(storage), params, nullptr);
  });
}

}  // extern "C"
