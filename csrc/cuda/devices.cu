// What is done once for each device, before the first launch on it: every kernel is loaded, since CUDA loads a kernel
// at its first launch otherwise, which may be one that is captured into a graph; each may use all of the device's
// shared memory; and the device says how large a cluster it grants, which a slice of a GPU may not do for 8 blocks.
#include <map>
#include <mutex>

#include "kernels_common.cuh"

namespace rebalfer::gpu {
namespace {

int attribute(cudaDeviceAttr which, int device, const char* what) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), what);
  return value;
}

void load(int device) {
  load_tickets();
  const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, "shared memory");
  visit_kernels([&](const void* kernel, size_t) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "kernel");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared - int(attributes.sharedSizeBytes)),
          "dynamic shared memory");
  });
}

// log2 of the blocks of the largest cluster in which the device can run each kernel that runs in clusters.
int granted_cluster_bits(int device) {
  if (!attribute(cudaDevAttrClusterLaunch, device, "cluster launch")) return 0;
  int bits = kMaxClusterBits;
  visit_kernels([&](const void* kernel, size_t shared_bytes) {
    for (; shared_bytes && bits > 0; --bits) {
      const LaunchConfig launch(dim3(1u << bits), dim3(kThreads), 1u << bits, shared_bytes, nullptr);
      int clusters = 0;
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess && clusters > 0) return;
      cudaGetLastError();  // a refusal is an answer
    }
  });
  return bits;
}

}  // namespace

Granted prepare() {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  static std::mutex mutex;
  static std::map<int, Granted> prepared;
  const std::lock_guard lock(mutex);
  if (const auto known = prepared.find(device); known != prepared.end()) return known->second;
  // Loading allocates, which a capture on this thread forbids unless it is relaxed.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "stream capture mode");
  Granted granted{};
  try {
    load(device);
    granted = {granted_cluster_bits(device),
               {attribute(cudaDevAttrMultiProcessorCount, device, "multiprocessors"),
                attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, "shared memory of a multiprocessor")},
               attribute(cudaDevAttrComputeCapabilityMajor, device, "compute capability") >= 9};
  } catch (...) {
    cudaThreadExchangeStreamCaptureMode(&mode);
    throw;
  }
  check(cudaThreadExchangeStreamCaptureMode(&mode), "stream capture mode");
  return prepared[device] = granted;
}

}  // namespace rebalfer::gpu
