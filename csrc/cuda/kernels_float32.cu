// The kernels for float32 features.
#include "kernels_backward.cuh"
#include "kernels_cam_weight.cuh"
#include "kernels_forward.cuh"

namespace rebalfer::gpu {

template void launch_forward_as<float>(const ForwardParams&, const Multiprocessors&, cudaStream_t);
template void launch_cam_weight_as<float>(const CamWeightParams&, cudaStream_t);
template void launch_backward_as<float>(const BackwardParams&, cudaStream_t);
template void visit_forward_kernels_as<float>(const Visit&);
template void visit_cam_weight_kernels_as<float>(const Visit&);
template void visit_backward_kernels_as<float>(const Visit&);

}  // namespace rebalfer::gpu
