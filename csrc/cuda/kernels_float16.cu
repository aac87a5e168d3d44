// The kernels for float16 features.
#include "kernels_backward.cuh"
#include "kernels_cam_weight.cuh"
#include "kernels_forward.cuh"

namespace rebalfer::gpu {

template void launch_forward_as<Half>(const ForwardParams&, const Multiprocessors&, cudaStream_t);
template void launch_cam_weight_as<Half>(const CamWeightParams&, cudaStream_t);
template void launch_backward_as<Half>(const BackwardParams&, cudaStream_t);
template void visit_forward_kernels_as<Half>(const Visit&);
template void visit_cam_weight_kernels_as<Half>(const Visit&);
template void visit_backward_kernels_as<Half>(const Visit&);

}  // namespace rebalfer::gpu
