// A machine that runs a grid of CUDA threads on one CPU core, built to make mistakes show:
//   - blocks one cluster at a time, a block's threads as fibers that run until they must wait, a warp ahead of the
//   others
//     as far as it can; the order of all this can be reversed, and a result that changes with it lacks a barrier;
//   - shared memory holds NaN when a block begins, behind its end is a canary, and it is NaN again after its block;
//   - asynchronous copies arrive as late as the hardware may let them: what they will overwrite is NaN from the moment
//     they are issued; cp.async lands in its wait, a bulk copy or a push when every thread waits for something;
//   - a launch that may start early must wait for the kernel before it, ahead of what it copies or streams;
//   - a wait that can never end, a copy nobody waits for and a misaligned address are errors, thrown by launch().
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

namespace rebalfer::emulator {

enum class Order { forward, reverse };

// What launches did, for tests that count bytes. A thread's ordinary loads and stores are not seen.
struct Counters {
  uint64_t launches, mma;
  uint64_t streamed_stores, cp_async_copies, bulk_copies;  // bytes
  uint64_t blocks, threads, cluster, shared_bytes;         // of the last launch
};

// What the last launch was given, for other machines.
struct Recorded {
  std::string kernel;
  std::vector<unsigned char> parameters;
};

struct Copy {
  void* to;
  const void* from;  // null: `held`
  size_t bytes;
  unsigned char held[16] = {};

  void land() const { std::memcpy(to, from ? from : held, bytes); }
};

// A pending copy's destination holds nothing: NaN as float, bfloat16 and half.
inline void poison(void* p, size_t bytes) { std::memset(p, 0xff, bytes); }

struct Block;
struct Warp;
struct Thread;

struct MBarrier {
  uint64_t* place;
  unsigned count;
  unsigned pending;   // arrivals still to come in this phase
  int64_t bytes = 0;  // announced less landed
  unsigned phase = 0;
  bool fenced = false;
  Thread* maker;
  std::vector<Copy> copies;

  void settle() {
    if (pending == 0 && bytes == 0) ++phase, pending = count;
  }
  bool passed(unsigned parity) const { return (phase & 1) != (parity & 1); }
};

// A barrier of a block or a cluster: complete when as many have arrived as are alive.
struct Gate {
  unsigned alive = 0, arrived = 0;
  uint64_t generation = 0;

  void settle() {
    if (arrived && arrived == alive) arrived = 0, ++generation;
  }
};

// What one lane brings to a warp-wide operation, and takes from it.
struct Deposit {
  bool done = false;
};

struct Meeting {
  unsigned mask, arrived;
  const char* operation;
  Deposit* deposits[32];
};

struct Warp {
  unsigned alive = 0;  // a bit a lane
  std::vector<Meeting> meetings;
};

struct Thread {
  Context context;
  std::unique_ptr<Stack> stack = std::make_unique<Stack>();
  uint3 index;
  unsigned lane;
  Block* block;
  Warp* warp;
  bool finished;
  // What it waits for: null, or whether it may go on, and words for the deadlock message.
  bool (*ready)(void*);
  void* ready_argument;
  const char* waits_for;
  MBarrier* waits_at;
  uint64_t cluster_generation;  // that it has arrived in
  bool between_arrive_and_wait;
  bool may_touch_memory;  // it need not wait for the kernel before this one, or has
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  uint3 index;
  unsigned rank;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared;  // aligned to 128 bytes
  Gate gate;
  std::deque<MBarrier> mbarriers;
  std::vector<Warp> warps;
};

class Machine {
 public:
  Order order = Order::forward;
  Counters counters{};
  Recorded recorded;
  bool only_record = false;
  bool early = false;  // the launch may start before the kernel before it has ended
  Thread* current = nullptr;
  dim3 grid, block_shape;
  unsigned cluster_size = 1;
  size_t shared_bytes = 0;
  std::vector<Block> blocks;  // of the cluster that runs
  Gate cluster_gate;

  void launch(dim3 g, dim3 b, unsigned cluster, size_t bytes, std::function<void()> body) {
    const unsigned count = b.x * b.y * b.z;
    if (count == 0 || count > 1024 || cluster == 0 || cluster > 8 || g.x % cluster || bytes > (227 << 10)) {
      throw std::runtime_error("kernel launch: invalid configuration");
    }
    ++counters.launches;
    counters.blocks = uint64_t(g.x) * g.y * g.z;
    counters.threads = count, counters.cluster = cluster, counters.shared_bytes = bytes;
    if (only_record) return;
    grid = g, block_shape = b, cluster_size = cluster, shared_bytes = bytes, body_ = std::move(body);
    error_.clear();
    while (threads_.size() < size_t(count) * cluster) threads_.push_back(std::make_unique<Thread>());
    blocks.clear();
    blocks.resize(cluster);
    const uint64_t clusters = counters.blocks / cluster;
    for (uint64_t i = 0; i < clusters && error_.empty(); ++i) {
      run_cluster((order == Order::forward ? i : clusters - 1 - i) * cluster, count);
    }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  // Suspends the thread until ready(argument).
  void wait(bool (*ready)(void*), void* argument, const char* waits_for, MBarrier* at = nullptr) {
    if (ready(argument)) return;
    Thread* self = current;
    self->ready = ready, self->ready_argument = argument, self->waits_for = waits_for, self->waits_at = at;
    switch_context(self->context, scheduler_);
    self->ready = nullptr;
  }

  void pass(Gate& gate, const char* name) { leave(gate, arrive(gate), name); }
  // Returns the generation to leave.
  uint64_t arrive(Gate& gate) {
    const uint64_t generation = gate.generation;
    ++gate.arrived;
    gate.settle();
    return generation;
  }
  void leave(Gate& gate, uint64_t generation, const char* name) {
    struct Seen {
      Gate* gate;
      uint64_t generation;
    } seen{&gate, generation};
    wait([](void* p) { return static_cast<Seen*>(p)->gate->generation != static_cast<Seen*>(p)->generation; }, &seen,
         name);
  }

  // Lanes of `mask` meet; the last one to come runs complete(deposits), which must serve them all.
  template <typename Complete>
  void meet(unsigned mask, const char* operation, Deposit& mine, Complete complete) {
    Warp& warp = *current->warp;
    const unsigned bit = 1u << current->lane;
    if (!(mask & bit)) fail("%s: the calling lane %u is not in the mask %08x", operation, current->lane, mask);
    if (mask & ~warp.alive) fail("%s: lanes %08x of the mask have exited or never were", operation, mask & ~warp.alive);
    auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](auto& m) { return m.mask & mask; });
    if (meeting == warp.meetings.end()) {
      warp.meetings.push_back({mask, 0, operation, {}});
      meeting = warp.meetings.end() - 1;
    } else if (meeting->mask != mask || std::strcmp(meeting->operation, operation)) {
      fail("lanes of one warp meet in %s (mask %08x) and %s (mask %08x)", meeting->operation, meeting->mask, operation,
           mask);
    }
    meeting->deposits[current->lane] = &mine;
    meeting->arrived |= bit;
    if (meeting->arrived == mask) {
      const Meeting whole = *meeting;
      warp.meetings.erase(meeting);
      complete(whole.deposits);
      for (unsigned lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) whole.deposits[lane]->done = true;
      }
    }
    wait([](void* p) { return static_cast<Deposit*>(p)->done; }, &mine, operation);
  }

  MBarrier& mbarrier(const uint64_t* place, const char* operation) {
    return mbarrier(*current->block, place, operation);
  }
  MBarrier& mbarrier(Block& block, const uint64_t* place, const char* operation) {
    MBarrier* found = nullptr;
    for (MBarrier& m : block.mbarriers) {
      if (m.place == place) found = &m;
    }
    if (!found || *place != kMBarrierMark) fail("%s on what is no initialised mbarrier of the block", operation);
    return *found;
  }

  static constexpr uint64_t kMBarrierMark = 0x6d62617272696572;

  void require_shared(const void* p, size_t bytes, const char* operation) {
    const auto* begin = static_cast<const unsigned char*>(p);
    const Block& b = *current->block;
    if (begin < b.shared || begin + bytes > b.shared + shared_bytes) {
      fail("%s: %zu bytes at offset %td are not within the block's %zu bytes of shared memory", operation, bytes,
           begin - b.shared, shared_bytes);
    }
  }

  void require_waited(const char* operation) {
    if (!current->may_touch_memory) fail("%s before wait_for_previous, in a launch that may start early", operation);
  }

  void require_aligned(const void* p, size_t alignment, const char* operation) {
    if (reinterpret_cast<uintptr_t>(p) % alignment)
      fail("%s: address %p is no multiple of %zu", operation, p, alignment);
  }

  // Ends the launch with an error; the threads are abandoned where they are.
  [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    error_ = name(*current) + ": " + text;
    switch_context(current->context, scheduler_);
    __builtin_unreachable();
  }

 private:
  std::vector<std::unique_ptr<Thread>> threads_;  // of a cluster, block by block
  Context scheduler_;
  std::function<void()> body_;
  std::string error_;

  static Machine*& running() {
    static Machine* machine = nullptr;
    return machine;
  }

  static std::string name(const Thread& t) {
    char text[100];
    std::snprintf(text, sizeof text, "block (%u, %u, %u) thread (%u, %u, %u)", t.block->index.x, t.block->index.y,
                  t.block->index.z, t.index.x, t.index.y, t.index.z);
    return text;
  }

  static void thread_main() {
    Machine& m = *running();
    fiber_started(m.scheduler_);
    m.body_();
    Thread& self = *m.current;
    const bool copies = std::any_of(self.groups.begin(), self.groups.end(), [](const auto& g) { return !g.empty(); });
    if (!self.open_group.empty() || copies) m.fail("exits while a cp.async of its is under way");
    m.require_waited("the end of the kernel");
    if (self.between_arrive_and_wait) m.fail("exits between cluster_arrive and cluster_wait");
    self.finished = true;
    self.warp->alive &= ~(1u << self.lane);
    --self.block->gate.alive;
    self.block->gate.settle();
    --m.cluster_gate.alive;
    m.cluster_gate.settle();
    if (self.block->gate.alive == 0) m.end(*self.block);
    switch_context(self.context, m.scheduler_);
    __builtin_unreachable();
  }

  static constexpr size_t kCanary = 128;

  void begin(Block& b, unsigned rank, uint64_t number, unsigned count) {
    b.index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    b.rank = rank;
    if (!b.memory) {
      b.memory = std::make_unique<unsigned char[]>(shared_bytes + kCanary + 128);
      b.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(b.memory.get()) + 127) / 128 * 128);
    }
    poison(b.shared, shared_bytes);
    std::memset(b.shared + shared_bytes, 0xca, kCanary);
    b.gate = {count, 0, 0};
    b.mbarriers.clear();
    b.warps.assign((count + 31) / 32, Warp{});
    for (unsigned t = 0; t < count; ++t) {
      Thread& thread = *threads_[size_t(rank) * count + t];
      thread.index = {t % block_shape.x, t / block_shape.x % block_shape.y, t / block_shape.x / block_shape.y};
      thread.lane = t % 32;
      thread.block = &b;
      thread.warp = &b.warps[t / 32];
      thread.warp->alive |= 1u << thread.lane;
      thread.finished = false;
      thread.ready = nullptr;
      thread.between_arrive_and_wait = false;
      thread.may_touch_memory = !early;
      thread.open_group.clear();
      thread.groups.clear();
      start_fiber(thread.context, *thread.stack, thread_main);
    }
  }

  void end(Block& b) {
    for (const MBarrier& m : b.mbarriers) {
      if (!m.copies.empty()) fail("the block ends while a copy into it is under way");
    }
    for (size_t i = 0; i < kCanary; ++i) {
      if (b.shared[shared_bytes + i] != 0xca)
        fail("the block wrote behind its %zu bytes of shared memory", shared_bytes);
    }
    poison(b.shared, shared_bytes);  // the cluster's other blocks must not read it any more
  }

  void run_cluster(uint64_t first_block, unsigned count) {
    running() = this;
    for (unsigned rank = 0; rank < cluster_size; ++rank) begin(blocks[rank], rank, first_block + rank, count);
    const size_t total = size_t(count) * cluster_size;
    cluster_gate = {unsigned(total), 0, 0};
    std::vector<size_t> warps;  // their first threads
    for (size_t block = 0; block < total; block += count) {
      for (unsigned t = 0; t < count; t += 32) warps.push_back(block + t);
    }
    if (order == Order::reverse) std::reverse(warps.begin(), warps.end());
    for (size_t left = total; left;) {
      bool progress = false;
      for (const size_t warp : warps) {
        // A warp runs ahead of the others as far as it can, so that it meets what they have not done yet.
        while (run_warp(warp, std::min<size_t>(32, count - warp % count), left)) {
          if (!error_.empty()) return;
          progress = true;
        }
      }
      if (!progress && left && !land_a_bulk_copy(total)) return deadlock(total);
    }
  }

  // Lets each of the warp's threads that can go on do so once; returns how many could.
  size_t run_warp(size_t first, size_t lanes, size_t& left) {
    size_t steps = 0;
    for (size_t i = 0; i < lanes && error_.empty(); ++i) {
      Thread& t = *threads_[first + (order == Order::forward ? i : lanes - 1 - i)];
      if (t.finished || (t.ready && !t.ready(t.ready_argument))) continue;
      current = &t;
      ++steps;
      switch_context(scheduler_, t.context);
      left -= t.finished;
    }
    return steps;
  }

  // Lands what the first thread that waits only for bulk copies is waiting for.
  bool land_a_bulk_copy(size_t total) {
    for (size_t i = 0; i < total; ++i) {
      const Thread& t = *threads_[order == Order::forward ? i : total - 1 - i];
      MBarrier* m = t.finished || !t.ready ? nullptr : t.waits_at;
      if (!m || m->pending || m->copies.empty()) continue;
      for (const Copy& c : m->copies) {
        c.land();
        m->bytes -= int64_t(c.bytes);
      }
      m->copies.clear();
      m->settle();
      return true;
    }
    return false;
  }

  void deadlock(size_t total) {
    error_ = "deadlock:";
    unsigned named = 0, waiting = 0;
    for (size_t i = 0; i < total; ++i) {
      const Thread& t = *threads_[i];
      if (t.finished || ++waiting > 4) continue;
      error_ += (named++ ? "; " : " ") + name(t) + " waits for " + t.waits_for;
      if (t.waits_at) {
        error_ += " (phase " + std::to_string(t.waits_at->phase) + ", " + std::to_string(t.waits_at->pending) +
                  " arrivals and " + std::to_string(t.waits_at->bytes) + " bytes to come)";
      }
    }
    if (waiting > named) error_ += "; and " + std::to_string(waiting - named) + " more";
  }
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

}  // namespace rebalfer::emulator
