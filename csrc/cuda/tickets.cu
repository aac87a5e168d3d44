// The counters by which a block detects that it is the last of its launch.
//
// A ticket is zero before and after each launch, so launches that run one after the other may share one. Launches that
// can run at the same time may not: each stream has a ticket, and each launch captured into a graph, which may be
// replayed on any stream, one for good. A stream is known by its number: a handle may be reused, and that of a thread's
// own stream is the same in all threads. Tickets are stored in the module's own memory, which every device has, zeroed,
// without an allocation that a capture would forbid.
#include <map>
#include <mutex>

#include "intrinsics.cuh"
#include "kernels.cuh"

namespace rebalfer::gpu {
namespace {

constexpr unsigned kTickets = 4096;
__device__ unsigned tickets[kTickets];

struct Taken {
  unsigned count = 0;
  std::map<unsigned long long, unsigned> of_stream;
};

unsigned* base() {
  void* address = nullptr;
  check(cudaGetSymbolAddress(&address, tickets), "tickets");
  return static_cast<unsigned*>(address);
}

}  // namespace

void load_tickets() { base(); }

unsigned* take_ticket(int device, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "stream capture status");
  const bool captured = status != cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (!captured) check(cudaStreamGetId(stream, &id), "stream id");

  static std::mutex mutex;
  static std::map<int, Taken> devices;
  const std::lock_guard lock(mutex);
  Taken& taken = devices[device];
  const auto known = taken.of_stream.find(id);
  unsigned slot = taken.count;
  if (!captured && known != taken.of_stream.end()) {
    slot = known->second;
  } else {
    if (taken.count == kTickets) return nullptr;
    if (!captured) taken.of_stream[id] = slot;
    ++taken.count;
  }
  return base() + slot;
}

}  // namespace rebalfer::gpu
