// The cross-entropy by itself, a thread a row, and the choice of the kernels by dtype.
#include "kernels_common.cuh"

namespace rebalfer::gpu {
namespace {

template <typename T>
struct Logits {  // a row, read as float32
  const T* row;
  __device__ float operator[](int64_t l) const { return to_float(row[l]); }
};

template <typename T>
struct Rounded {  // a row that float32 is written to
  struct Place {
    T* at;
    __device__ void operator=(float x) const { *at = from_float<T>(x); }
  };
  T* row;
  __device__ Place operator[](int64_t l) const { return {row + l}; }
};

template <typename T>
__global__ __launch_bounds__(kThreads) void cross_entropy_forward(const __grid_constant__ CrossEntropyParams p) {
  REBALFER_DYNAMIC_SHARED(double, room);
  const int64_t m = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (m < p.M) {
    const Logits<T> z{static_cast<const T*>(p.logits) + m * p.L};
    const float loss = cross_entropy(z, log_sum_exp(z, p.L), target_row(p.targets, m, p.L), p.L);
    (p.ticket ? p.per_sample : p.loss)[m] = loss;
  }
  if (!p.ticket) return;
  __syncthreads();
  if (!is_last_block(p.ticket, gridDim.x, reinterpret_cast<int*>(room + kWarps))) return;
  block_means<1>(
      p.M, reinterpret_cast<double (*)[1]>(room), [&](int64_t i, float* v) { v[0] = p.per_sample[i]; },
      [&](int, float mean) { *p.loss = mean; });
}

template <typename T>
__global__ __launch_bounds__(kThreads) void cross_entropy_backward(const __grid_constant__ CrossEntropyParams p) {
  const int64_t m = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (m >= p.M) return;
  const float g = __ldg(p.d_loss.data + m * p.d_loss.stride) * p.share;
  const Logits<T> z{static_cast<const T*>(p.logits) + m * p.L};
  cross_entropy_gradient(z, log_sum_exp(z, p.L), target_row(p.targets, m, p.L), p.L, g,
                         Rounded<T>{static_cast<T*>(p.d_logits) + m * p.L});
}

// choose.template operator()<T>() of the dtype.
template <typename F>
void with_type(Storage storage, const F& choose) {
  switch (storage) {
    case Storage::f32: return choose.template operator()<float>();
    case Storage::bf16: return choose.template operator()<BFloat16>();
    case Storage::f16: return choose.template operator()<Half>();
  }
}

dim3 row_blocks(int64_t M) { return dim3(unsigned((M + kThreads - 1) / kThreads)); }

}  // namespace

void launch_cross_entropy_forward(Storage storage, const CrossEntropyParams& p, cudaStream_t stream) {
  with_type(storage, [&]<typename T>() {
    launch(cross_entropy_forward<T>, row_blocks(p.M), dim3(kThreads), 1u, (kWarps + 1) * sizeof(double), stream, false,
           p);
  });
}

void launch_cross_entropy_backward(Storage storage, const CrossEntropyParams& p, cudaStream_t stream) {
  with_type(storage, [&]<typename T>() {
    launch(cross_entropy_backward<T>, row_blocks(p.M), dim3(kThreads), 1u, size_t(0), stream, false, p);
  });
}

void launch_forward(Storage storage, const ForwardParams& p, const Multiprocessors& on, cudaStream_t stream) {
  with_type(storage, [&]<typename T>() { launch_forward_as<T>(p, on, stream); });
}

void launch_cam_weight(Storage storage, const CamWeightParams& p, cudaStream_t stream) {
  with_type(storage, [&]<typename T>() { launch_cam_weight_as<T>(p, stream); });
}

void launch_backward(Storage storage, const BackwardParams& p, cudaStream_t stream) {
  with_type(storage, [&]<typename T>() { launch_backward_as<T>(p, stream); });
}

void visit_kernels(const Visit& visit) {
  for (const Storage storage : {Storage::f32, Storage::bf16, Storage::f16}) {
    with_type(storage, [&]<typename T>() {
      visit_forward_kernels_as<T>(visit);
      visit_cam_weight_kernels_as<T>(visit);
      visit_backward_kernels_as<T>(visit);
      visit(reinterpret_cast<const void*>(cross_entropy_forward<T>), 0);
      visit(reinterpret_cast<const void*>(cross_entropy_backward<T>), 0);
    });
  }
}

}  // namespace rebalfer::gpu
