// A machine that executes SASS, the instructions of an NVIDIA GPU as nvdisasm prints them, for sm_90: on a CPU, on
// host memory, one block of a cluster's after the other, to count what is issued and to find what waits for what.
//
// Results are those of the GPU, but for the last bits of MUFU, so a run that gives the right outputs proves that the
// instructions were understood. An instruction, operand or modifier without a meaning here is an error.
//
// Time is that of an SM with one scheduler for each warp: an instruction issues once the one before has (its stall
// count) and the scoreboards that it waits for are free, as the compiler has encoded both. Besides, shared memory
// serves one wavefront a cycle; the warps of a block are taken to access it at the same time, each a like amount.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "program.h"

namespace rebalfer::sass {

// Cycles from the issue of an instruction until what waits for it may issue; see LATENCIES in machine.py.
struct Latencies {
  int64_t shared, wavefront, distributed, l1, l2, dram, bulk, special, constant, barrier, cluster_barrier, fence, read,
      product;
};

struct Range {  // of host memory that the kernel may touch
  uint64_t begin, end;
  bool cold;  // not in the L2 cache when the kernel begins: the features, or their gradient
};

struct Launch {
  uint32_t blocks, threads, cluster, shared_bytes;
  std::vector<unsigned char> parameters;
};

struct Count {  // of one instruction of the program
  uint64_t issued = 0, lanes = 0;
  uint64_t wavefronts = 0;         // of shared memory
  uint64_t sectors = 0;            // of 32 bytes of global memory
  uint64_t read = 0, written = 0;  // bytes of global memory, by what its lanes ask for
  uint64_t cold = 0;               // of these, in cold ranges
};

enum class Wait : int {
  kStart,
  kGlobal,
  kL2,
  kL1,
  kShared,
  kDistributed,
  kBulk,
  kAsync,
  kAtomic,
  kSpecial,
  kConstant,
  kRead,
  kBarrier,
  kClusterBarrier,
  kFence
};

// A link of the critical path: what was issued at `issue` and waited for until `ready`, after what `parent` waited for.
struct Link {
  int parent;
  int place;  // of the program
  Wait wait;
  int64_t issue, ready;
};

constexpr uint32_t kSharedWindow = 0xdead0000;  // high half of a generic address of shared memory
constexpr uint32_t kSharedBase = 0x400;         // of dynamic shared memory; before it is the system's
constexpr uint32_t kParameters = 0x210;         // in constant bank 0
constexpr uint32_t kIsCluster = 0x140;          // in constant bank 0: cluster barriers look there

struct Moment {
  int64_t time = 0;
  int link = -1;

  void raise(const Moment& other) {
    if (other.time > time) *this = other;
  }
};

struct MBarrier {
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  Moment arrival;                // the latest of this phase
  std::vector<Moment> finished;  // of each phase

  // What comes at that moment has arrived; ends the phase if all has.
  void settle(const Moment& moment) {
    arrival.raise(moment);
    if (pending == 0 && bytes == 0) finished.push_back(arrival), arrival = {}, ++phase, pending = count;
  }
};

struct Block;

// Lanes of a warp that are at the same place.
struct Group {
  uint32_t mask;
  int place;
  enum State { kReady, kAtConvergence, kAtWarpSync, kAtBarrier, kAtClusterWait, kAtMBarrier } state = kReady;
  int convergence = 0;      // kAtConvergence
  uint64_t generation = 0;  // kAtBarrier, kAtClusterWait
};

struct Warp {
  Block* block;
  uint32_t number, alive;
  uint32_t r[256][32] = {}, ur[64] = {};
  uint32_t p[8] = {}, up = 0;         // a bit a lane; a bit a predicate
  uint32_t convergence[16][32] = {};  // the lanes that each lane meets: groups that parted may use one at a time
  uint64_t cluster_generation = 0;
  std::vector<Group> groups;
  // Time.
  int64_t now = 0;  // the next instruction may issue
  int current = -1;
  Moment scoreboard[6];
  Moment copies, stores;        // cp.async since the last LDGDEPBAR; stores
  Moment products;              // of a group of four warps
  int64_t shared_free = 0;      // when shared memory has served this warp's accesses
  std::vector<Moment> batches;  // of cp.async

  Warp() { p[7] = ~0u, up = 1u << 7; }
};

struct Gate {
  uint32_t alive = 0, arrived = 0;
  uint64_t generation = 0;
  Moment latest, released;

  // Releases who waits if all have come.
  bool settle() {
    if (!arrived || arrived < alive) return false;
    arrived = 0, ++generation;
    released = latest, latest = {};
    return true;
  }
};

struct Block {
  uint32_t index, rank;
  std::vector<unsigned char> shared;
  std::vector<std::unique_ptr<Warp>> warps;
  Gate gate;
  std::map<uint32_t, MBarrier> mbarriers;
  std::unordered_set<uint64_t> cached;  // sectors of global memory
};

class Machine {
 public:
  Machine(const Program& program, Latencies latencies) : program_(program), latencies_(latencies) {
    counts.resize(program.instructions.size());
  }

  std::vector<Count> counts;
  std::vector<Link> links;
  Moment finish;              // of the slowest warp so far
  uint64_t limit = 1u << 28;  // warp instructions, of a loop that never ends

  void run(const Launch& launch, uint32_t first_block, uint32_t blocks, std::vector<Range> ranges);

 private:
  const Program& program_;
  Latencies latencies_;
  Launch launch_;
  std::vector<Range> ranges_;
  std::vector<unsigned char> constants_;
  std::vector<Block> blocks_;
  Gate cluster_gate_;
  std::unordered_set<uint64_t> warm_;  // sectors that some block has read
  // Of the instruction that is being executed.
  Warp* w_ = nullptr;
  Group* g_ = nullptr;
  const Instruction* i_ = nullptr;
  int place_ = 0;
  uint32_t active_ = 0;  // lanes whose guard is true
  int64_t issue_ = 0;

  [[noreturn]] void fail(const std::string& what) const {
    char where[80];
    std::snprintf(where, sizeof where, "block %u warp %u at /*%04x*/ ", w_->block->index, w_->number, 16 * place_);
    throw std::runtime_error(where + i_->text + ": " + what);
  }
  [[noreturn]] void unknown() const { fail("has no meaning in tests/resources/sass"); }

  // Operands.
  uint64_t constant(const Operand& o, int lane, int bytes);
  uint32_t word(const Operand& o, int lane, int part = 0);  // of a register pair, part 1 is the high half; no sign
  uint32_t integer(const Operand& o, int lane, int part = 0);
  uint64_t wide(const Operand& o, int lane);
  float single(const Operand& o, int lane);
  double twofold(const Operand& o, int lane);
  bool predicate(const Operand& o, int lane);
  void set(const Operand& o, int lane, uint32_t value, int part = 0);
  void set_wide(const Operand& o, int lane, uint64_t value);
  void set_single(const Operand& o, int lane, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    set(o, lane, bits);
  }
  void set_twofold(const Operand& o, int lane, double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    set_wide(o, lane, bits);
  }
  void set_predicate(const Operand& o, int lane, bool value);
  uint64_t address(const Operand& o, int lane);

  // Memory.
  unsigned char* shared(uint32_t address, int bytes);
  unsigned char* global(uint64_t address, int bytes);
  const Range& range(uint64_t address, uint64_t bytes);
  void load(bool is_shared, bool is_generic);
  void store(bool is_shared, bool is_generic);
  void copy_async();
  void bulk_copy();
  void push();
  void matrix_load();
  void matrix_store();
  MBarrier& mbarrier_at(uint32_t address);
  void mbarrier();
  void atomic();
  int64_t note_shared(const std::vector<std::pair<uint32_t, int>>& accesses);
  Wait note_global(const std::vector<std::pair<uint64_t, int>>& accesses, bool write);

  // Arithmetic.
  void execute();
  void uniform_or_lanes();
  void shuffle();
  void mma();
  void group_mma();
  void special();
  void convert();
  bool compare_integers(uint32_t a, uint32_t b, int lane);
  bool compare_floats(double a, double b) const;

  // Control.
  void control();
  void step(Warp& w, size_t group);
  bool wake(Warp& w, Group& g);
  void converge(Warp& w);
  void leave(Warp& w, uint32_t lanes);
  void arrived(Gate& gate, uint32_t mask, Wait wait, int64_t latency);
  void wait_for(const Moment& m) {
    if (m.time > w_->now) w_->now = m.time, w_->current = m.link;
  }
  int link(Wait wait, int64_t ready) {
    links.push_back({w_->current, place_, wait, issue_, ready});
    return int(links.size()) - 1;
  }
  // What the instruction's scoreboards wait for is there after `latency`.
  Moment result(Wait wait, int64_t latency) {
    Moment m{issue_ + latency, link(wait, issue_ + latency)};
    if (i_->write_scoreboard < 6) w_->scoreboard[i_->write_scoreboard].raise(m);
    return m;
  }
  void operands_read() {
    if (i_->read_scoreboard >= 6) return;
    w_->scoreboard[i_->read_scoreboard].raise({issue_ + latencies_.read, link(Wait::kRead, issue_ + latencies_.read)});
  }
};

}  // namespace rebalfer::sass
