// The kernels for float16 features.
#include "kernels_backward.cuh"
#include "kernels_forward.cuh"

namespace rebalfer::gpu {

template void launch_forward_as<Half>(const ForwardParams&, cudaStream_t);
template void launch_backward_as<Half>(const BackwardParams&, cudaStream_t);

}  // namespace rebalfer::gpu
