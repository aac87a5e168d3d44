#include "machine.h"

#include <algorithm>
#include <array>
#include <bit>

namespace rebalfer::sass {
namespace {

enum Op : int {
  kNone,
  IADD3,
  UIADD3,
  IMAD,
  UIMAD,
  VIADD,
  LEA,
  ULEA,
  LOP3,
  ULOP3,
  PLOP3,
  UPLOP3,
  SHF,
  USHF,
  PRMT,
  UPRMT,
  SEL,
  USEL,
  FSEL,
  ISETP,
  UISETP,
  FSETP,
  DSETP,
  VIMNMX,
  IMNMX,
  VIADDMNMX,
  FMNMX,
  IABS,
  FADD,
  FMUL,
  FFMA,
  DADD,
  DMUL,
  DFMA,
  HADD2,
  HFMA2,
  HMMA,
  F2FP,
  F2F,
  I2F,
  I2FP,
  F2I,
  MUFU,
  FCHK,
  R2UR,
  S2R,
  S2UR,
  CS2R,
  MOV,
  UMOV,
  LDC,
  ULDC,
  SGXT,
  USGXT,
  R2P,
  P2R,
  UP2UR,
  ELECT,
  VOTE,
  VOTEU,
  SHFL,
  LDG,
  STG,
  LDS,
  STS,
  LD,
  ST,
  ATOMG,
  LDGSTS,
  LDGDEPBAR,
  DEPBAR,
  UBLKCP,
  STAS,
  SYNCS,
  LDSM,
  STSM,
  BRA,
  EXIT,
  BSSY,
  BSYNC,
  BREAK,
  CALL,
  RET,
  WARPSYNC,
  NOP,
  YIELD,
  BAR,
  MEMBAR,
  ERRBAR,
  CGAERRBAR,
  CCTL,
  FENCE,
  UCGABAR_ARV,
  UCGABAR_WAIT,
  PREEXIT,
  ACQBULK,
  POPC,
  FLO,
  REDUX,
  HGMMA,
  WARPGROUP,
};
const std::unordered_map<std::string, int> kOps = {
#define OP(x) {#x, x}
    OP(IADD3),     OP(UIADD3), OP(IMAD),     OP(UIMAD),       OP(VIADD),        OP(LEA),     OP(ULEA),    OP(LOP3),
    OP(ULOP3),     OP(PLOP3),  OP(UPLOP3),   OP(SHF),         OP(USHF),         OP(PRMT),    OP(UPRMT),   OP(SEL),
    OP(USEL),      OP(FSEL),   OP(ISETP),    OP(UISETP),      OP(FSETP),        OP(DSETP),   OP(VIMNMX),  OP(IMNMX),
    OP(VIADDMNMX), OP(FMNMX),  OP(IABS),     OP(FADD),        OP(FMUL),         OP(FFMA),    OP(DADD),    OP(DMUL),
    OP(DFMA),      OP(HADD2),  OP(HFMA2),    OP(HMMA),        OP(F2FP),         OP(F2F),     OP(I2F),     OP(I2FP),
    OP(F2I),       OP(MUFU),   OP(FCHK),     OP(R2UR),        OP(S2R),          OP(S2UR),    OP(CS2R),    OP(MOV),
    OP(UMOV),      OP(LDC),    OP(ULDC),     OP(SGXT),        OP(USGXT),        OP(R2P),     OP(P2R),     OP(UP2UR),
    OP(ELECT),     OP(VOTE),   OP(VOTEU),    OP(SHFL),        OP(LDG),          OP(STG),     OP(LDS),     OP(STS),
    OP(LD),        OP(ST),     OP(ATOMG),    OP(LDGSTS),      OP(LDGDEPBAR),    OP(DEPBAR),  OP(UBLKCP),  OP(STAS),
    OP(SYNCS),     OP(LDSM),   OP(STSM),     OP(BRA),         OP(EXIT),         OP(BSSY),    OP(BSYNC),   OP(BREAK),
    OP(CALL),      OP(RET),    OP(WARPSYNC), OP(NOP),         OP(YIELD),        OP(BAR),     OP(MEMBAR),  OP(ERRBAR),
    OP(CGAERRBAR), OP(CCTL),   OP(FENCE),    OP(UCGABAR_ARV), OP(UCGABAR_WAIT), OP(PREEXIT), OP(ACQBULK), OP(POPC),
    OP(FLO),       OP(REDUX),  OP(HGMMA),    OP(WARPGROUP),
#undef OP
};

float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float size = as_float(rest << 13) * 0x1p112f;
  return as_float(sign | bits_of(size));
}
uint16_t float_to_bfloat(float x) {
  const uint32_t b = bits_of(x);
  return x != x ? 0x7fff : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
uint16_t float_to_half(float x) {
  if (x != x) return 0x7fff;
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
  const uint32_t exponent = std::max(bits_of(size) >> 23, 113u);
  const float shifter = as_float((exponent + 13) << 23);
  const uint32_t mantissa = bits_of(size + shifter) - bits_of(shifter);
  return uint16_t(sign | (((exponent - 113) << 10) + mantissa));
}

class Rounding {
 public:
  explicit Rounding(const Instruction& i)
      : mode_(i.has("RM")   ? FE_DOWNWARD
              : i.has("RP") ? FE_UPWARD
              : i.has("RZ") ? FE_TOWARDZERO
                            : FE_TONEAREST) {
    if (mode_ != FE_TONEAREST) std::fesetround(mode_);
  }
  ~Rounding() {
    if (mode_ != FE_TONEAREST) std::fesetround(FE_TONEAREST);
  }

 private:
  int mode_;
};

uint32_t permute(uint32_t a, uint32_t selector, uint32_t b) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = uint32_t(bytes >> 8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

bool table(int64_t lut, bool a, bool b, bool c) { return lut >> (a << 2 | b << 1 | int(c)) & 1; }

}  // namespace

int opcode(const std::string& base) {
  const auto found = kOps.find(base);
  return found == kOps.end() ? kNone : found->second;
}

// ---------------------------------------------------------------------------------------------------- operands

uint64_t Machine::constant(const Operand& o, int lane, int bytes) {
  if (o.bank != 0) fail("constant bank");
  int64_t offset = o.offset;
  if (o.uniform >= 0) offset += o.uniform == 63 ? 0 : w_->ur[o.uniform];
  if (o.index != 255) offset += int32_t(w_->r[o.index][lane]);
  if (offset < 0 || offset + bytes > int64_t(constants_.size())) fail("constant outside the bank");
  uint64_t value = 0;
  std::memcpy(&value, &constants_[size_t(offset)], size_t(bytes));
  return value;
}

uint32_t Machine::word(const Operand& o, int lane, int part) {
  switch (o.kind) {
    case Operand::kRegister: return o.index == 255 ? 0 : w_->r[o.index + part][lane];
    case Operand::kUniform: return o.index == 63 ? 0 : w_->ur[o.index + part];
    case Operand::kImmediate: return uint32_t(uint64_t(o.offset) >> 32 * part);
    case Operand::kConstant: return uint32_t(constant(o, lane, 4 + 4 * part) >> 32 * part);
    default: fail("operand");
  }
}

namespace {
uint32_t modified(const Operand& o, uint32_t x) {
  if (o.plain) return x;
  if (o.byte > 0) x = x >> 8 * o.byte & 255;
  if (o.half >= 0) x = x >> 16 * o.half & 0xffff;
  if (o.absolute) x = int32_t(x) < 0 ? 0 - x : x;
  if (o.invert) x = ~x;
  if (o.minus) x = 0 - x;
  return x;
}
float modified_single(const Operand& o, uint32_t bits) {
  if (o.half >= 0) bits = bits_of(half_to_float(uint16_t(bits >> 16 * o.half)));
  if (o.absolute) bits &= 0x7fffffff;
  if (o.minus) bits ^= 0x80000000;
  return as_float(bits);
}
}  // namespace

uint32_t Machine::integer(const Operand& o, int lane, int part) { return modified(o, word(o, lane, part)); }

uint64_t Machine::wide(const Operand& o, int lane) {
  if (o.kind == Operand::kImmediate) return uint64_t(o.offset);
  const uint64_t x = uint64_t(word(o, lane, 1)) << 32 | word(o, lane, 0);
  return o.minus ? 0 - x : o.invert ? ~x : x;
}

float Machine::single(const Operand& o, int lane) {
  return modified_single(o, o.kind == Operand::kImmediate ? i_->immediate : word(o, lane));
}

double Machine::twofold(const Operand& o, int lane) {
  uint64_t bits = o.kind == Operand::kImmediate ? uint64_t(i_->immediate) << 32
                                                : uint64_t(word(o, lane, 1)) << 32 | word(o, lane, 0);
  if (o.absolute) bits &= ~0ull >> 1;
  if (o.minus) bits ^= 1ull << 63;
  return std::bit_cast<double>(bits);
}

bool Machine::predicate(const Operand& o, int lane) {
  const bool x = o.kind == Operand::kPredicate ? w_->p[o.index] >> lane & 1 : w_->up >> o.index & 1;
  return x != o.invert;
}

void Machine::set(const Operand& o, int lane, uint32_t value, int part) {
  if (o.kind == Operand::kRegister) {
    if (o.index != 255) w_->r[o.index + part][lane] = value;
  } else if (o.kind == Operand::kUniform) {
    if (o.index != 63) w_->ur[o.index + part] = value;
  } else {
    fail("destination");
  }
}

void Machine::set_wide(const Operand& o, int lane, uint64_t value) {
  set(o, lane, uint32_t(value)), set(o, lane, uint32_t(value >> 32), 1);
}

void Machine::set_predicate(const Operand& o, int lane, bool value) {
  if (o.index == 7) return;
  if (o.kind == Operand::kPredicate) {
    w_->p[o.index] = (w_->p[o.index] & ~(1u << lane)) | uint32_t(value) << lane;
  } else {
    w_->up = (w_->up & ~(1u << o.index)) | uint32_t(value) << o.index;
  }
}

uint64_t Machine::address(const Operand& o, int lane) {
  uint64_t x = 0;
  if (o.index != 255) {
    const uint32_t low = w_->r[o.index][lane];
    x = o.pair          ? uint64_t(w_->r[o.index + 1][lane]) << 32 | low
        : o.is_unsigned ? uint64_t(low)
                        : uint64_t(int64_t(int32_t(low))) * uint64_t(o.scale);
  }
  if (o.uniform >= 0 && o.uniform != 63) {
    x += w_->ur[o.uniform];
    if (o.pair || o.byte == 1 || (o.is_unsigned && o.descriptor)) x += uint64_t(w_->ur[o.uniform + 1]) << 32;
  }
  return x + uint64_t(o.offset);
}

// ------------------------------------------------------------------------------------------------------ memory

unsigned char* Machine::shared(uint32_t address, int bytes) {
  const uint32_t rank = address >> 24, offset = address & 0xffffff;
  if (rank >= blocks_.size()) fail("shared memory of block " + std::to_string(rank));
  auto& memory = blocks_[rank].shared;
  if (offset < kSharedBase || offset + uint32_t(bytes) > memory.size()) fail("outside shared memory");
  if (offset % uint32_t(std::min(bytes, 16))) fail("misaligned");
  return &memory[offset];
}

const Range& Machine::range(uint64_t address, uint64_t bytes) {
  for (const Range& r : ranges_)
    if (address >= r.begin && address + bytes <= r.end) return r;
  fail("outside global memory");
}

unsigned char* Machine::global(uint64_t address, int bytes) {
  range(address, uint64_t(bytes));
  if (address % uint64_t(bytes)) fail("misaligned");
  return reinterpret_cast<unsigned char*>(address);
}

// Shared memory is 32 banks of 4 bytes; lanes take turns in halves or quarters where they ask for 8 or 16 bytes. The
// cycle at which the first of them is served as late as the last one is.
int64_t Machine::note_shared(const std::vector<std::pair<uint32_t, int>>& accesses) {
  if (accesses.empty()) return issue_;
  const uint64_t before = counts[size_t(place_)].wavefronts;
  const size_t together = 128 / size_t(std::max(4, accesses[0].second));
  for (size_t first = 0; first < accesses.size(); first += together) {
    uint32_t words[128], of_bank[32] = {};
    size_t n = 0;
    for (size_t k = first; k < std::min(first + together, accesses.size()); ++k)
      for (uint32_t word = accesses[k].first / 4; word < (accesses[k].first + uint32_t(accesses[k].second) + 3) / 4;
           ++word)
        words[n++] = word;
    std::sort(words, words + n);
    const uint32_t* const end = std::unique(words, words + n);
    for (const uint32_t* word = words; word != end; ++word) ++of_bank[*word % 32];
    counts[size_t(place_)].wavefronts += *std::max_element(of_bank, of_bank + 32);
  }
  const int64_t turns = int64_t(counts[size_t(place_)].wavefronts - before), warps = int64_t(w_->block->warps.size());
  const int64_t start = std::max(issue_, w_->shared_free);
  w_->shared_free = start + turns * warps;
  return start + (turns - 1) * std::max(latencies_.wavefront, warps);
}

Wait Machine::note_global(const std::vector<std::pair<uint64_t, int>>& accesses, bool write) {
  std::vector<std::pair<uint64_t, bool>> sectors;  // and whether it is cold
  uint64_t bytes = 0;
  for (const auto& [address, size] : accesses) {
    const bool cold = range(address, uint64_t(size)).cold;
    bytes += uint64_t(size), counts[size_t(place_)].cold += cold ? uint64_t(size) : 0;
    for (uint64_t s = address / 32; s <= (address + uint64_t(size) - 1) / 32; ++s)
      if (sectors.empty() || sectors.back().first != s) sectors.push_back({s, cold});
  }
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  Count& count = counts[size_t(place_)];
  count.sectors += sectors.size();
  (write ? count.written : count.read) += bytes;
  Wait worst = Wait::kL1;
  for (const auto& [s, cold] : sectors) {
    const Wait w = w_->block->cached.contains(s) ? Wait::kL1 : cold && !warm_.contains(s) ? Wait::kGlobal : Wait::kL2;
    if (!write) w_->block->cached.insert(s), warm_.insert(s);
    worst = std::min(worst, w);
  }
  return worst;
}

namespace {
int access_bytes(const Instruction& i) {
  for (const auto& m : i.modifiers) {
    if (m == Name("128")) return 16;
    if (m == Name("64")) return 8;
    if (m == Name("U16") || m == Name("S16")) return 2;
    if (m == Name("U8") || m == Name("S8")) return 1;
  }
  return 4;
}
}  // namespace

void Machine::load(bool is_shared, bool is_generic) {
  const int bytes = access_bytes(*i_);
  const Operand *to = nullptr, *from = nullptr;
  for (const Operand& o : i_->operands)
    if (o.kind == Operand::kAddress)
      from = &o;
    else if (!to && o.kind == Operand::kRegister)
      to = &o;
  if (!to || !from) fail("operands");
  std::vector<std::pair<uint32_t, int>> in_shared;
  std::vector<std::pair<uint64_t, int>> in_global;
  bool distributed = false;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active_ >> lane & 1)) continue;
    const uint64_t a = address(*from, lane);
    const bool there = is_shared || (is_generic && a >> 32 == kSharedWindow);
    if (there)
      in_shared.push_back({uint32_t(a), bytes}), distributed |= (uint32_t(a) >> 24) != w_->block->rank;
    else
      in_global.push_back({a, bytes});
    const unsigned char* source = there ? shared(uint32_t(a), bytes) : global(a, bytes);
    uint32_t words[4] = {};
    std::memcpy(words, source, size_t(bytes));
    if (i_->has("S16")) words[0] = uint32_t(int32_t(int16_t(words[0])));
    if (i_->has("S8")) words[0] = uint32_t(int32_t(int8_t(words[0])));
    for (int k = 0; k < std::max(1, bytes / 4); ++k) set(*to, lane, words[k], k);
  }
  if (!in_shared.empty()) {
    const int64_t late = note_shared(in_shared) - issue_;
    result(distributed ? Wait::kDistributed : Wait::kShared,
           (distributed ? latencies_.distributed : latencies_.shared) + late);
  } else if (!in_global.empty()) {
    const Wait w = note_global(in_global, false);
    result(w, w == Wait::kGlobal ? latencies_.dram : w == Wait::kL2 ? latencies_.l2 : latencies_.l1);
  }
  operands_read();
}

void Machine::store(bool is_shared, bool is_generic) {
  const int bytes = access_bytes(*i_);
  const Operand &to = i_->operands.at(0), &from = i_->operands.at(1);
  std::vector<std::pair<uint32_t, int>> in_shared;
  std::vector<std::pair<uint64_t, int>> in_global;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active_ >> lane & 1)) continue;
    const uint64_t a = address(to, lane);
    const bool there = is_shared || (is_generic && a >> 32 == kSharedWindow);
    if (there)
      in_shared.push_back({uint32_t(a), bytes});
    else
      in_global.push_back({a, bytes});
    uint32_t words[4] = {};
    for (int k = 0; k < std::max(1, bytes / 4); ++k) words[k] = word(from, lane, k);
    std::memcpy(there ? shared(uint32_t(a), bytes) : global(a, bytes), words, size_t(bytes));
  }
  note_shared(in_shared);
  if (!in_global.empty()) {
    note_global(in_global, true);
    w_->stores.raise({issue_ + latencies_.l2, link(Wait::kL2, issue_ + latencies_.l2)});
  }
  operands_read();
}

void Machine::copy_async() {
  const int bytes = access_bytes(*i_);
  std::vector<std::pair<uint32_t, int>> in_shared;
  std::vector<std::pair<uint64_t, int>> in_global;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active_ >> lane & 1)) continue;
    const uint32_t to = uint32_t(address(i_->operands.at(0), lane));
    unsigned char* there = shared(to, bytes);
    in_shared.push_back({to, bytes});
    if (i_->operands.size() > 2 && !predicate(i_->operands[2], lane)) {
      std::memset(there, 0, size_t(bytes));  // the last operand: whether to read
      continue;
    }
    const uint64_t from = address(i_->operands.at(1), lane);
    in_global.push_back({from, bytes});
    std::memcpy(there, global(from, bytes), size_t(bytes));
  }
  if (!in_global.empty()) {
    const Wait w = note_global(in_global, false);
    const int64_t ready = issue_ + (w == Wait::kGlobal ? latencies_.dram : latencies_.l2);
    w_->copies.raise({ready, link(Wait::kAsync, ready)});
  }
  operands_read();
}

// UBLKCP [UR of the destination, and of its mbarrier], [UR pair of the source], UR with 16 bytes as the unit.
void Machine::bulk_copy() {
  const uint32_t to = w_->ur[i_->operands.at(0).uniform], barrier = w_->ur[i_->operands[0].uniform + 1];
  const int source = i_->operands.at(1).uniform;
  const uint64_t from = uint64_t(w_->ur[source + 1]) << 32 | w_->ur[source];
  const uint32_t bytes = (w_->ur[i_->operands.at(2).index] & 0xffff) * 16;
  range(from, bytes);
  const uint32_t rank = to >> 24, offset = to & 0xffffff;
  auto& memory = blocks_.at(rank).shared;
  if (offset < kSharedBase || offset + bytes > memory.size() || offset % 16 || from % 16) fail("bulk copy");
  std::memcpy(&memory[offset], reinterpret_cast<const void*>(from), bytes);
  Count& count = counts[size_t(place_)];
  count.read += bytes, count.sectors += (bytes + 31) / 32;
  count.cold += range(from, bytes).cold ? bytes : 0;
  MBarrier& m = mbarrier_at(barrier);
  const bool cold = range(from, bytes).cold && !warm_.contains(from / 32);
  for (uint64_t s = from / 32; s < (from + bytes) / 32; ++s) warm_.insert(s);
  const int64_t ready = issue_ + latencies_.bulk + (cold ? latencies_.dram : latencies_.l2);
  m.bytes -= bytes;
  m.settle({ready, link(Wait::kBulk, ready)});
}

// STAS [R pair of the destination and of its mbarrier], R: a store to a block of the cluster, which its mbarrier
// counts.
void Machine::push() {
  const int bytes = access_bytes(*i_);
  std::vector<std::pair<uint32_t, int>> accesses;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active_ >> lane & 1)) continue;
    const uint64_t both = address(i_->operands.at(0), lane);
    uint32_t words[4] = {};
    for (int k = 0; k < bytes / 4; ++k) words[k] = word(i_->operands.at(1), lane, k);
    std::memcpy(shared(uint32_t(both), bytes), words, size_t(bytes));
    accesses.push_back({uint32_t(both), bytes});
    MBarrier& m = mbarrier_at(uint32_t(both >> 32));
    m.bytes -= bytes;
    const int64_t ready = issue_ + latencies_.distributed;
    m.settle({ready, link(Wait::kDistributed, ready)});
  }
  note_shared(accesses);
  operands_read();
}

MBarrier& Machine::mbarrier_at(uint32_t address) {
  auto& mbarriers = blocks_.at(address >> 24).mbarriers;
  if (!mbarriers.contains(address & 0xffffff)) fail("no mbarrier");
  return mbarriers[address & 0xffffff];
}

void Machine::mbarrier() {
  const auto place = [&](int lane) { return uint32_t(address(i_->operands.at(1), lane)); };
  const int lane = std::countr_zero(active_);
  const uint32_t at = place(lane), rank = at >> 24;
  if (rank >= blocks_.size()) fail("mbarrier of block " + std::to_string(rank));
  if (i_->has("EXCH")) {
    const uint32_t count = 0x100000 - (w_->ur[i_->operands.at(2).index] >> 1);
    if (count == 0 || count > 1024) fail("mbarrier of " + std::to_string(count));
    blocks_[rank].mbarriers[at & 0xffffff] = MBarrier{count, count, 0, 0, {}, {}};
    return;
  }
  MBarrier& m = mbarrier_at(at);
  if (i_->has("ARRIVE") && i_->has("TRANS64") && i_->modifiers.size() == 2) {
    for (int l = 0; l < 32; ++l) {
      if (!(active_ >> l & 1)) continue;
      m.bytes += integer(i_->operands.at(2), l);
      if (!m.pending) fail("more arrivals than the mbarrier's");
      --m.pending;
    }
    m.settle({issue_ + latencies_.shared, w_->current});
    return;
  }
  if (!i_->has("PHASECHK") || !i_->has("TRANS64")) unknown();
  const Operand& to = i_->operands.at(0);
  const uint32_t parity = integer(i_->operands.at(2), lane) >> 31;
  const bool passed = (m.phase & 1) != parity;
  if (passed && m.phase) wait_for(m.finished.at(m.phase - 1));
  issue_ = std::max(issue_, w_->now);
  for (int l = 0; l < 32; ++l)
    if (active_ >> l & 1) set_predicate(to, l, passed);
  result(Wait::kShared, latencies_.shared);
}

void Machine::atomic() {
  if (!i_->has("ADD")) unknown();
  std::vector<std::pair<uint64_t, int>> accesses;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active_ >> lane & 1)) continue;
    const uint64_t a = address(i_->operands.at(2), lane);
    uint32_t* at = reinterpret_cast<uint32_t*>(global(a, 4));
    const uint32_t before = *at;
    *at += integer(i_->operands.at(3), lane);  // which may be in the register of the result
    set(i_->operands.at(1), lane, before);
    accesses.push_back({a, 4});
  }
  note_global(accesses, true);
  if (active_) result(Wait::kAtomic, latencies_.l2);
  operands_read();
}

// ldmatrix and stmatrix: lane 8 m + r has the address of row r of the m-th matrix of 8 x 8 16-bit elements.
void Machine::matrix_load() {
  const int n = i_->has("4") ? 4 : i_->has("2") ? 2 : 1;
  const bool transposed = i_->has("MT88");
  std::vector<std::pair<uint32_t, int>> accesses;
  uint16_t m[4][8][8];
  for (int k = 0; k < n; ++k)
    for (int row = 0; row < 8; ++row) {
      const uint32_t a = uint32_t(address(i_->operands.at(1), 8 * k + row));
      std::memcpy(m[k][row], shared(a, 16), 16);
      accesses.push_back({a, 16});
    }
  for (int k = 0; k < n; ++k)
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const uint32_t low = transposed ? m[k][column][row] : m[k][row][column];
      const uint32_t high = transposed ? m[k][column + 1][row] : m[k][row][column + 1];
      set(i_->operands[0], lane, high << 16 | low, k);
    }
  const int64_t late = note_shared(accesses) - issue_;
  result(Wait::kShared, latencies_.shared + late);
  operands_read();
}

void Machine::matrix_store() {
  const int n = i_->has("4") ? 4 : i_->has("2") ? 2 : 1;
  const bool transposed = i_->has("MT88");
  std::vector<std::pair<uint32_t, int>> accesses;
  for (int k = 0; k < n; ++k) {
    uint16_t m[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const uint32_t x = word(i_->operands.at(1), lane, k);
      (transposed ? m[column][row] : m[row][column]) = uint16_t(x);
      (transposed ? m[column + 1][row] : m[row][column + 1]) = uint16_t(x >> 16);
    }
    for (int row = 0; row < 8; ++row) {
      const uint32_t a = uint32_t(address(i_->operands.at(0), 8 * k + row));
      std::memcpy(shared(a, 16), m[row], 16);
      accesses.push_back({a, 16});
    }
  }
  note_shared(accesses);
  operands_read();
}

// -------------------------------------------------------------------------------------------------- arithmetic

bool Machine::compare_integers(uint32_t a, uint32_t b, int lane) {
  const Instruction& i = *i_;
  const bool is_unsigned = i.has("U32"), ex = i.has("EX");
  const bool less = is_unsigned ? a < b : int32_t(a) < int32_t(b), equal = a == b, more = !less && !equal;
  const bool low = ex ? predicate(i.operands.at(5), lane) : true;  // the same comparison of the low halves
  if (i.has("EQ")) return equal && low;
  if (i.has("NE")) return !equal || (ex && low);
  if (i.has("LT")) return less || (ex && equal && low);
  if (i.has("LE")) return less || (equal && low);
  if (i.has("GT")) return more || (ex && equal && low);
  if (i.has("GE")) return more || (equal && low);
  unknown();
}

bool Machine::compare_floats(double a, double b) const {
  const Instruction& i = *i_;
  const bool unordered = a != a || b != b;
  if (i.has("NAN")) return unordered;
  if (i.has("NUM")) return !unordered;
  for (const auto& m : i.modifiers) {
    if (m == Name("EQU")) return unordered || a == b;
    if (m == Name("NEU")) return unordered || a != b;
    if (m == Name("LTU")) return unordered || a < b;
    if (m == Name("LEU")) return unordered || a <= b;
    if (m == Name("GTU")) return unordered || a > b;
    if (m == Name("GEU")) return unordered || a >= b;
    if (m == Name("EQ")) return a == b;
    if (m == Name("NE")) return !unordered && a != b;
    if (m == Name("LT")) return a < b;
    if (m == Name("LE")) return a <= b;
    if (m == Name("GT")) return a > b;
    if (m == Name("GE")) return a >= b;
  }
  unknown();
}

// What each lane does by itself, and the uniform datapath does once.
void Machine::uniform_or_lanes() {
  const Instruction& i = *i_;
  const auto& o = i.operands;
  const bool uniform = i.base[0] == 'U';
  const Rounding rounding(i);
  const auto is_predicate = [](const Operand& x) {
    return x.kind == Operand::kPredicate || x.kind == Operand::kUniformPredicate;
  };
  const auto combined = [&](bool x, int lane) {
    const bool other = predicate(o.at(4), lane);
    return i.has("AND") ? x && other : i.has("OR") ? x || other : i.has("XOR") ? x != other : (unknown(), false);
  };
  const auto ftz = [&](float x) {
    return i.has("FTZ") && std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
  };
  const auto saturate = [&](float x) { return i.has("SAT") ? x > 0 ? std::min(x, 1.0f) : 0.0f : x; };
  // The operands' words of all lanes; a lane writes only its own, after it has read.
  uint32_t raw[8][32];
  if (o.size() > 8) unknown();
  const int lanes = uniform ? 1 : 32;
  for (size_t k = 0; k < o.size(); ++k) {
    if (is_predicate(o[k]) || o[k].kind == Operand::kSpecial) continue;
    if (o[k].kind == Operand::kRegister && o[k].index != 255)
      std::memcpy(raw[k], w_->r[o[k].index], sizeof raw[k]);
    else
      std::fill_n(raw[k], lanes, o[k].kind == Operand::kConstant && o[k].index != 255 ? (unknown(), 0) : word(o[k], 0));
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if (!uniform && !(active_ >> lane & 1)) continue;
    const auto in = [&](size_t k) { return modified(o[k], raw[k][lane]); };
    const auto real = [&](size_t k) {
      return modified_single(o[k], o[k].kind == Operand::kImmediate ? i.immediate : raw[k][lane]);
    };
    switch (i.op) {
      case IADD3:
      case UIADD3: {
        size_t k = 1;
        while (is_predicate(o.at(k))) ++k;
        uint64_t sum = 0;
        for (size_t n = k; n < k + 3; ++n) {
          const Operand& x = o.at(n);
          // A negative operand counts as ~x + 1, so that a carry is the absence of a borrow.
          if (x.minus && x.kind != Operand::kImmediate)
            sum += uint64_t(~raw[n][lane]) + 1;
          else
            sum += in(n);
        }
        if (i.has("X"))
          for (size_t n = k + 3; n < o.size(); ++n) sum += predicate(o[n], lane);
        set(o[0], lane, uint32_t(sum));
        for (size_t n = 1; n < k; ++n) set_predicate(o[n], lane, sum >> 32 >= n);
        break;
      }
      case IMAD:
      case UIMAD: {
        size_t k = 1;
        while (is_predicate(o.at(k))) ++k;
        if (i.has("WIDE") || i.has("HI")) {
          const bool is_unsigned = i.has("U32");
          const uint64_t product =
              is_unsigned ? uint64_t(in(k)) * in(k + 1) : uint64_t(int64_t(int32_t(in(k))) * int32_t(in(k + 1)));
          const uint64_t addend = wide(o.at(k + 2), lane);
          unsigned __int128 sum = (unsigned __int128)product + addend;
          if (i.has("X")) sum += predicate(o.at(k + 3), lane);
          if (i.has("HI"))
            set(o[0], lane, uint32_t(uint64_t(sum) >> 32));
          else
            set_wide(o[0], lane, uint64_t(sum));
          if (k > 1) set_predicate(o[1], lane, bool(sum >> 64 & 1));
        } else {
          uint32_t x = in(k) * in(k + 1) + in(k + 2);
          if (i.has("X"))
            x += predicate(o.at(k + 3), lane);
          else if (k > 1)
            unknown();
          set(o[0], lane, x);
        }
        break;
      }
      case VIADD: set(o[0], lane, in(1) + in(2)); break;
      case LEA:
      case ULEA: {
        size_t k = 1;
        while (is_predicate(o.at(k))) ++k;
        uint64_t sum;
        if (i.has("HI")) {
          const bool sx32 = i.has("SX32");
          const int shift = int(in(k + (sx32 ? 2 : 3)));
          const uint64_t a = sx32 ? uint64_t(int64_t(int32_t(in(k)))) : uint64_t(in(k + 2)) << 32 | in(k);
          sum = uint64_t(uint32_t((a << shift) >> 32)) + in(k + 1);
          if (i.has("X")) sum += predicate(o.at(k + (sx32 ? 3 : 4)), lane);
        } else {
          sum = uint64_t(uint32_t(in(k) << in(k + 2))) + in(k + 1);
          if (i.has("X")) sum += predicate(o.at(k + 3), lane);
        }
        set(o[0], lane, uint32_t(sum));
        if (k > 1) set_predicate(o[1], lane, sum >> 32 & 1);
        break;
      }
      case LOP3:
      case ULOP3: {
        const size_t k = is_predicate(o[0]) ? 1 : 0;
        const uint32_t a = in(k + 1), b = in(k + 2), c = in(k + 3);
        const uint32_t lut = in(k + 4);
        uint32_t x = 0;
        for (int bit = 0; bit < 8; ++bit)
          if (lut >> bit & 1) x |= (bit & 4 ? a : ~a) & (bit & 2 ? b : ~b) & (bit & 1 ? c : ~c);
        set(o[k], lane, x);
        if (k) set_predicate(o[0], lane, x != 0 || predicate(o.at(k + 5), lane));
        break;
      }
      case PLOP3:
      case UPLOP3: {
        const bool a = predicate(o.at(2), lane), b = predicate(o.at(3), lane), c = predicate(o.at(4), lane);
        set_predicate(o[0], lane, table(o.at(5).offset, a, b, c));
        set_predicate(o[1], lane, table(o.at(6).offset, a, b, c));
        break;
      }
      case SHF:
      case USHF: {
        const uint64_t x = uint64_t(in(3)) << 32 | in(1);
        const bool is64 = i.has("U64") || i.has("S64");
        uint32_t by = in(2);
        by = i.has("W") ? by & (is64 ? 63 : 31) : std::min(by, is64 ? 63u : 32u);
        uint64_t shifted;
        if (i.has("L"))
          shifted = is64 || i.has("HI") ? x << by : by > 31 ? 0 : uint64_t(uint32_t(in(1)) << by);
        else if (i.has("S32") || i.has("S64"))
          shifted = uint64_t(int64_t(x) >> by);
        else
          shifted = x >> by;
        set(o[0], lane, uint32_t(i.has("HI") ? shifted >> 32 : shifted));
        break;
      }
      case PRMT:
      case UPRMT: set(o[0], lane, permute(in(1), in(2), in(3))); break;
      case SEL:
      case USEL: set(o[0], lane, predicate(o.at(3), lane) ? in(1) : in(2)); break;
      case FSEL: set(o[0], lane, bits_of(predicate(o.at(3), lane) ? real(1) : real(2))); break;
      case ISETP:
      case UISETP: {
        const bool x = compare_integers(in(2), in(3), lane), first = combined(x, lane), second = combined(!x, lane);
        set_predicate(o[0], lane, first), set_predicate(o[1], lane, second);
        break;
      }
      case FSETP: {
        const bool x = compare_floats(ftz(real(2)), ftz(real(3)));
        const bool first = combined(x, lane), second = combined(!x, lane);
        set_predicate(o[0], lane, first), set_predicate(o[1], lane, second);
        break;
      }
      case DSETP: {
        const bool x = compare_floats(twofold(o.at(2), lane), twofold(o.at(3), lane));
        const bool first = combined(x, lane), second = combined(!x, lane);
        set_predicate(o[0], lane, first), set_predicate(o[1], lane, second);
        break;
      }
      case VIMNMX:
      case IMNMX:
      case VIADDMNMX: {
        const size_t k = i.op == VIADDMNMX ? 2 : 1;
        const uint32_t a = k == 2 ? in(1) + in(2) : in(1), b = in(k + 1);
        const bool less = i.has("U32") ? a < b : int32_t(a) < int32_t(b);
        set(o[0], lane, less == predicate(o.at(k + 2), lane) ? a : b);
        break;
      }
      case FMNMX: {
        const float a = real(1), b = real(2);
        set_single(o[0], lane, predicate(o.at(3), lane) ? std::fmin(a, b) : std::fmax(a, b));
        break;
      }
      case POPC: set(o[0], lane, uint32_t(std::popcount(in(1)))); break;
      case FLO:  // the place of the highest one
        if (i.modifiers.size() != 1 || !i.has("U32")) unknown();
        set(o[0], lane, in(1) ? 31 - uint32_t(std::countl_zero(in(1))) : ~0u);
        break;
      case IABS: set(o[0], lane, int32_t(in(1)) < 0 ? 0 - in(1) : in(1)); break;
      case FADD: {
        const float a = ftz(real(1)), b = ftz(real(2));
        set_single(o[0], lane, saturate(ftz(a + b)));
        break;
      }
      case FMUL: {
        const float a = ftz(real(1)), b = ftz(real(2));
        set_single(o[0], lane, saturate(ftz(a * b)));
        break;
      }
      case FFMA: {
        const float a = ftz(real(1)), b = ftz(real(2)), c = ftz(real(3));
        set_single(o[0], lane, saturate(ftz(std::fma(a, b, c))));
        break;
      }
      case DADD: {
        const double a = twofold(o.at(1), lane), b = twofold(o.at(2), lane);
        set_twofold(o[0], lane, a + b);
        break;
      }
      case DMUL: {
        const double a = twofold(o.at(1), lane), b = twofold(o.at(2), lane);
        set_twofold(o[0], lane, a * b);
        break;
      }
      case DFMA: {
        const double a = twofold(o.at(1), lane), b = twofold(o.at(2), lane), c = twofold(o.at(3), lane);
        set_twofold(o[0], lane, std::fma(a, b, c));
        break;
      }
      case HADD2:
        if (!i.has("F32")) unknown();
        set_single(o[0], lane, real(1) + real(2));
        break;
      case HFMA2:  // as a move of a constant to another pipe
        if (o.at(1).index != 255 || o.at(2).index != 255 || o.size() != 5) unknown();
        set(o[0], lane, i.immediate);
        break;
      case F2FP: {
        const float high = real(1), low = real(2);
        if (i.has("BF16"))
          set(o[0], lane, uint32_t(float_to_bfloat(high)) << 16 | float_to_bfloat(low));
        else if (i.has("F16"))
          set(o[0], lane, uint32_t(float_to_half(high)) << 16 | float_to_half(low));
        else
          unknown();
        break;
      }
      case MOV:
      case UMOV: set(o[0], lane, in(1)); break;
      case SGXT:
      case USGXT: {
        const uint32_t bits = in(2), x = in(1);
        if (bits >= 32)
          set(o[0], lane, x);
        else if (i.has("U32"))
          set(o[0], lane, x & ((1u << bits) - 1));
        else
          set(o[0], lane, bits ? uint32_t(int32_t(x << (32 - bits)) >> (32 - bits)) : 0);
        break;
      }
      case R2P: {
        const uint32_t x = in(1), mask = in(2);
        for (int k = 0; k < 7; ++k)
          if (mask >> k & 1) w_->p[k] = (w_->p[k] & ~(1u << lane)) | (x >> k & 1) << lane;
        break;
      }
      case P2R: {
        uint32_t x = in(2);
        const uint32_t mask = in(3);
        for (int k = 0; k < 7; ++k)
          if (mask >> k & 1) x = (x & ~(1u << k)) | (w_->p[k] >> lane & 1) << k;
        set(o[0], lane, x);
        break;
      }
      case UP2UR: {
        const uint32_t mask = in(3) & 0x7f;
        set(o[0], lane, (in(2) & ~mask) | (w_->up & mask));
        break;
      }
      case FCHK: {  // whether a / b needs the slow way
        const float a = real(1), b = real(2);
        const int ea = int(bits_of(a) >> 23 & 255), eb = int(bits_of(b) >> 23 & 255);
        const bool odd =
            ea == 255 || eb == 255 || eb == 0 || (a != 0 && (ea < 32 || ea - eb > 125 || eb - ea > 125)) || eb > 252;
        set_predicate(o[0], lane, odd);
        break;
      }
      default: unknown();
    }
  }
}

void Machine::special() {
  const auto& o = i_->operands;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active_ >> lane & 1)) continue;
    if (i_->has("RCP64H")) {
      const double x = std::bit_cast<double>(uint64_t(integer(o.at(1), lane)) << 32);
      set(o[0], lane, uint32_t(std::bit_cast<uint64_t>(1 / x) >> 32));
      continue;
    }
    const float x = single(o.at(1), lane);
    if (i_->has("EX2"))
      set_single(o[0], lane, std::exp2(x));
    else if (i_->has("LG2"))
      set_single(o[0], lane, std::log2(x));
    else if (i_->has("RCP"))
      set_single(o[0], lane, 1 / x);
    else if (i_->has("RSQ"))
      set_single(o[0], lane, 1 / std::sqrt(x));
    else if (i_->has("SQRT"))
      set_single(o[0], lane, std::sqrt(x));
    else
      unknown();
  }
}

void Machine::convert() {
  const Instruction& i = *i_;
  const auto& o = i.operands;
  const Rounding rounding(i);
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active_ >> lane & 1)) continue;
    if (i.op == F2F) {
      if (i.has("BF16"))
        set(o[0], lane, float_to_bfloat(single(o.at(1), lane)));
      else if (i.has("F16"))
        set(o[0], lane, float_to_half(single(o.at(1), lane)));
      else if (i.modifiers.at(0) == Name("F64"))
        set_twofold(o[0], lane, single(o.at(1), lane));
      else if (i.modifiers.at(0) == Name("F32") && i.has("F64"))
        set_single(o[0], lane, float(twofold(o.at(1), lane)));
      else
        unknown();
    } else if (i.op == I2F || i.op == I2FP) {
      const bool is64 = i.has("S64") || i.has("U64");
      const bool is_unsigned = i.has("U32") || i.has("U64") || i.has("U16") || i.has("U8");
      volatile int64_t x = is64          ? int64_t(wide(o.at(1), lane))
                           : is_unsigned ? int64_t(integer(o.at(1), lane))
                                         : int64_t(int32_t(integer(o.at(1), lane)));
      if (i.has("F64"))
        set_twofold(o[0], lane, is64 && is_unsigned ? double(uint64_t(x)) : double(x));
      else
        set_single(o[0], lane, is64 && is_unsigned ? float(uint64_t(x)) : float(x));
    } else {
      if (!i.has("TRUNC")) unknown();
      const double x = i.has("F64") ? twofold(o.at(1), lane) : single(o.at(1), lane);
      if (i.has("U64"))
        set_wide(o[0], lane, x <= 0 ? 0 : x >= 0x1p64 ? ~0ull : uint64_t(x));
      else if (i.has("S64"))
        set_wide(o[0], lane, uint64_t(int64_t(x)));
      else if (i.has("U32"))
        set(o[0], lane, x <= 0 ? 0 : x >= 0x1p32 ? ~0u : uint32_t(x));
      else
        set(o[0], lane, uint32_t(int32_t(x)));
    }
  }
}

void Machine::shuffle() {
  const auto& o = i_->operands;  // predicate, destination, source, lane, clamp and segment mask
  uint32_t values[32];
  for (int lane = 0; lane < 32; ++lane) values[lane] = word(o.at(2), lane);
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active_ >> lane & 1)) continue;
    const int b = int(integer(o.at(3), lane)), c = int(integer(o.at(4), lane));
    const int clamp = c & 31, segment = c >> 8 & 31, low = lane & segment, high = low | (clamp & ~segment);
    int from;
    bool inside;
    if (i_->has("BFLY"))
      from = lane ^ b, inside = from <= high;
    else if (i_->has("IDX"))
      from = low | (b & ~segment), inside = from <= high;
    else if (i_->has("DOWN"))
      from = lane + b, inside = from <= high;
    else if (i_->has("UP"))
      from = lane - b, inside = from >= high;
    else
      unknown();
    set_predicate(o[0], lane, inside);
    set(o[1], lane, values[inside ? from : lane]);
    if (inside && !(active_ >> from & 1)) fail("reads a lane that takes no part");
  }
}

void Machine::mma() {
  const int depth = i_->has("16816") ? 16 : i_->has("1688") ? 8 : 0;  // of K
  if (!depth || !i_->has("F32") || active_ != ~0u) unknown();
  const auto& o = i_->operands;
  const bool bf16 = i_->has("BF16");
  const auto value = [&](uint32_t pair, int half) {
    const uint16_t x = uint16_t(pair >> 16 * half);
    return bf16 ? as_float(uint32_t(x) << 16) : half_to_float(x);
  };
  float A[16][16], B[16][8], D[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int k = 0; k < depth / 4; ++k)
      for (int half = 0; half < 2; ++half) {
        const int column = 2 * (lane % 4) + 8 * (k / 2) + half;
        A[lane / 4 + 8 * (k % 2)][column] = value(word(o.at(1), lane, k), half);
        if (k % 2 == 0) B[column][lane / 4] = value(word(o.at(2), lane, k / 2), half);
      }
  for (int lane = 0; lane < 32; ++lane)
    for (int k = 0; k < 4; ++k) D[lane / 4 + 8 * (k / 2)][2 * (lane % 4) + k % 2] = as_float(word(o.at(3), lane, k));
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column)
      for (int k = 0; k < depth; ++k) D[row][column] = std::fma(A[row][k], B[k][column], D[row][column]);
  for (int lane = 0; lane < 32; ++lane)
    for (int k = 0; k < 4; ++k) set(o[0], lane, bits_of(D[lane / 4 + 8 * (k / 2)][2 * (lane % 4) + k % 2]), k);
}

namespace {
// A matrix of 16-bit elements in shared memory, as a descriptor has it: rows of the M or N axis, columns of K. Blocks
// of 8 x 16 bytes are permuted within rows of 128, 64 or 32 bytes (or not at all).
struct SharedMatrix {
  uint32_t start, leading, stride, row;  // bytes; row: of the permutation, 16 for none
  bool transposed;                       // the M or N axis is the contiguous one

  SharedMatrix(uint64_t descriptor, bool transposed) : transposed(transposed) {
    start = uint32_t(descriptor & 0x3fff) * 16, leading = uint32_t(descriptor >> 16 & 0x3fff) * 16;
    stride = uint32_t(descriptor >> 32 & 0x3fff) * 16;
    row = std::array{16u, 128u, 64u, 32u}[descriptor >> 62];
    if (transposed && row == 16) std::swap(leading, stride);  // PTX ISA, wgmma, "Strides": without permutation
  }
  uint32_t at(uint32_t m, uint32_t k) const {
    const uint32_t inner = transposed ? m : k, outer = transposed ? k : m, wide = row / 2;
    uint32_t place = start + outer % 8 * row + inner % wide * 2;
    place += transposed ? inner / wide * leading + outer / 8 * stride : outer / 8 * stride + inner / wide * leading;
    return place ^ ((place >> 7 & (row / 16 - 1)) << 4);
  }
};
}  // namespace

// The share of one warp of four: 16 of the 64 rows. A is in registers, or in shared memory as B is.
void Machine::group_mma() {
  const auto& o = i_->operands;
  int n = 0;
  if (std::sscanf(i_->text.c_str(), "HGMMA.64x%dx16.F32.", &n) != 1 || n % 8 || n > 256 || active_ != ~0u) unknown();
  const bool bf16 = i_->has("BF16"), of_registers = o.at(1).kind == Operand::kRegister;
  const Operand& matrices = o.at(of_registers ? 2 : 1);
  const Operand& addend = o.at(of_registers ? 3 : 2);
  if (matrices.kind != Operand::kMatrix || addend.kind != Operand::kRegister) unknown();
  const bool tnspA = matrices.name.find(".tnspA") != std::string::npos;
  const bool tnspB = matrices.name.find(".tnspB") != std::string::npos;
  if (matrices.name.size() != 6u * (size_t(tnspA) + size_t(tnspB))) unknown();
  bool adds = addend.index != 255;
  for (const Operand& x : o)
    if (x.kind == Operand::kUniformPredicate) adds = adds && predicate(x, 0);
  const auto value = [&](uint32_t x) { return bf16 ? as_float(x << 16) : half_to_float(uint16_t(x)); };
  const auto descriptor = [&](int place) { return uint64_t(w_->ur[place + 1]) << 32 | w_->ur[place]; };
  const SharedMatrix of_a(descriptor(matrices.uniform), tnspA);
  const SharedMatrix of_b(descriptor(matrices.uniform + 2), tnspB);
  const auto element = [&](const SharedMatrix& m, int row, int k) {
    uint16_t x;
    std::memcpy(&x, shared(w_->block->rank << 24 | m.at(uint32_t(row), uint32_t(k)), 2), 2);
    return value(x);
  };
  float A[16][16];
  for (int lane = 0; lane < 32; ++lane)
    for (int k = 0; k < 8; ++k) {
      const int row = lane / 4 + 8 * (k / 2 % 2), column = 2 * (lane % 4) + 8 * (k / 4) + k % 2;
      A[row][column] = of_registers ? value(word(o[1], lane, k / 2) >> 16 * (k % 2) & 0xffff)
                                    : element(of_a, int(16 * (w_->number % 4)) + row, column);
    }
  for (int column = 0; column < n; ++column) {
    float B[16], D[16] = {};
    for (int k = 0; k < 16; ++k) B[k] = element(of_b, column, k);
    for (int row = 0; row < 16; ++row) {
      const int lane = row % 8 * 4 + column % 8 / 2, part = column / 8 * 4 + row / 8 * 2 + column % 2;
      if (adds) D[row] = as_float(word(addend, lane, part));
      for (int k = 0; k < 16; ++k) D[row] = std::fma(A[row][k], B[k], D[row]);
      set(o[0], lane, bits_of(D[row]), part);
    }
  }
  const int64_t latency = std::max(latencies_.product, int64_t(n / 2));  // of 8 columns 4 cycles
  w_->products.raise({issue_ + latency, link(Wait::kSpecial, issue_ + latency)});
}

void Machine::execute() {
  const Instruction& i = *i_;
  const auto& o = i.operands;
  const int first = active_ ? std::countr_zero(active_) : 0;
  switch (i.op) {
    case HMMA: return mma();
    case HGMMA: return group_mma();
    case MUFU: return special();
    case F2F:
    case I2F:
    case I2FP:
    case F2I: return convert();
    case SHFL: return shuffle();
    case LDG: return load(false, false);
    case LD: return load(false, true);
    case LDS: return load(true, false);
    case STG: return store(false, false);
    case ST: return store(false, true);
    case STS: return store(true, false);
    case LDSM: return matrix_load();
    case STSM: return matrix_store();
    case LDGSTS: return copy_async();
    case STAS: return push();
    case ATOMG: return atomic();
    case LDC: {
      const int bytes = i.has("64") ? 8 : i.has("U8") ? 1 : i.has("U16") ? 2 : 4;
      if (i.has("S8") || i.has("S16")) unknown();
      for (int lane = 0; lane < 32; ++lane) {
        if (!(active_ >> lane & 1)) continue;
        const uint64_t x = constant(o.at(1), lane, bytes);
        set(o[0], lane, uint32_t(x));
        if (bytes == 8) set(o[0], lane, uint32_t(x >> 32), 1);
      }
      return;
    }
    case R2UR: {  // of one lane; with a predicate, whether a lane has another value and is to come later
      if (!active_) return;
      const uint32_t one = integer(o.back(), first);
      if (o.at(0).kind == Operand::kPredicate)
        for (int lane = 0; lane < 32; ++lane)
          if (active_ >> lane & 1) set_predicate(o[0], lane, integer(o.back(), lane) != one);
      set(o.at(o.size() - 2), 0, one);
      return;
    }
    case S2R:
    case CS2R:
      for (int lane = 0; lane < 32; ++lane) {
        if (!(active_ >> lane & 1)) continue;
        const std::string& name = o.at(1).name;
        const uint32_t thread = 32 * w_->number + uint32_t(lane);
        if (name == "SRZ")
          set(o[0], lane, 0), i.has("32") ? void() : set(o[0], lane, 0, 1);
        else if (name == "SR_TID.X")
          set(o[0], lane, thread);
        else if (name == "SR_TID.Y" || name == "SR_TID.Z" || name == "SR_CTAID.Y" || name == "SR_CTAID.Z")
          set(o[0], lane, 0);
        else if (name == "SR_CTAID.X")
          set(o[0], lane, w_->block->index);
        else if (name == "SR_LANEID")
          set(o[0], lane, uint32_t(lane));
        else if (name == "SR_LTMASK")
          set(o[0], lane, (1u << lane) - 1);
        else if (name == "SR_CgaCtaId")
          set(o[0], lane, w_->block->rank);
        else if (name == "SR_SWINHI")
          set(o[0], lane, kSharedWindow);
        else
          fail("special register");
      }
      return;
    default: return uniform_or_lanes();
  }
}

// ----------------------------------------------------------------------------------------------------- control

void Machine::arrived(Gate& gate, uint32_t mask, Wait wait, int64_t latency) {
  const int64_t ready = std::max(issue_, w_->shared_free) + latency;
  gate.arrived += uint32_t(std::popcount(mask));
  if (ready >= gate.latest.time) gate.latest = {ready, link(wait, ready)};
  gate.settle();
}

void Machine::leave(Warp& w, uint32_t lanes) {
  w.alive &= ~lanes;
  for (auto& masks : w.convergence)
    for (auto& mask : masks) mask &= ~lanes;
  w.block->gate.alive -= uint32_t(std::popcount(lanes));
  cluster_gate_.alive -= uint32_t(std::popcount(lanes));
  w.block->gate.settle(), cluster_gate_.settle();
}

// Joins groups that have met where their lanes converge.
void Machine::converge(Warp& w) {
  for (size_t a = 0; a < w.groups.size(); ++a) {
    Group& g = w.groups[a];
    if (g.state != Group::kAtConvergence && g.state != Group::kAtWarpSync) continue;
    const uint32_t wanted =
        g.state == Group::kAtWarpSync ? w.alive : w.convergence[g.convergence][std::countr_zero(g.mask)] & w.alive;
    uint32_t here = 0;
    for (const Group& other : w.groups)
      if (other.state == g.state && other.place == g.place) here |= other.mask;
    if ((here & wanted) != wanted) continue;
    Group joined = g;
    joined.mask = here, joined.state = Group::kReady, ++joined.place;
    const auto [state, place] = std::pair(g.state, g.place);
    std::erase_if(w.groups, [&](const Group& other) { return other.state == state && other.place == place; });
    w.groups.push_back(joined);
    return converge(w);
  }
}

bool Machine::wake(Warp& w, Group& g) {
  Gate* gate = g.state == Group::kAtBarrier       ? &w.block->gate
               : g.state == Group::kAtClusterWait ? &cluster_gate_
                                                  : nullptr;
  if (gate) {
    if (gate->generation == g.generation) return false;
    if (gate->released.time > w.now) w.now = gate->released.time, w.current = gate->released.link;
    g.state = Group::kReady, ++g.place;
    return true;
  }
  if (g.state == Group::kAtMBarrier) {
    g.state = Group::kReady;  // asks again
    return true;
  }
  return g.state == Group::kReady;
}

// Runs a group until it has to wait or its lanes part.
void Machine::step(Warp& w, size_t group) {
  w_ = &w;
  for (;;) {
    Group& g = w.groups[group];
    g_ = &g, place_ = g.place;
    if (place_ < 0 || size_t(place_) >= program_.instructions.size()) fail("left the program");
    const Instruction& i = program_.instructions[size_t(place_)];
    i_ = &i;
    const uint32_t guard = i.guard.kind == Operand::kPredicate ? w.p[i.guard.index]
                           : w.up >> i.guard.index & 1         ? ~0u
                                                               : 0;
    active_ = g.mask & (i.guard.invert ? ~guard : guard);
    for (int k = 0; k < 6; ++k)
      if (i.wait_mask >> k & 1) wait_for(w.scoreboard[k]);
    issue_ = w.now;
    w.now += std::max(1, i.stall);
    Count& count = counts[size_t(place_)];
    ++count.issued, count.lanes += uint64_t(std::popcount(active_));
    if (!limit--) fail("too many instructions");
    const auto& o = i.operands;
    switch (i.op) {
      case BRA: {
        if (i.has("DIV")) {
          const bool apart = g.mask != w.ur[o.at(0).index];
          g.place = apart ? int(o.at(1).offset / 16) : g.place + 1;
          break;
        }
        uint32_t taken = active_;
        if (o.at(0).kind != Operand::kLabel)
          for (int lane = 0; lane < 32; ++lane)
            if (!predicate(o[0], lane)) taken &= ~(1u << lane);
        if (i.has("ANY"))
          taken = taken ? g.mask : 0;
        else if (i.has("U") || i.has("CONV"))
          unknown();
        const int target = int(o.back().offset / 16);
        if (taken == g.mask) {
          g.place = target;
        } else if (taken == 0) {
          ++g.place;
        } else {
          Group other{taken, target, Group::kReady, 0, 0};
          g.mask &= ~taken, ++g.place;
          w.groups.push_back(other);
          return;
        }
        break;
      }
      case EXIT: {
        uint32_t lanes = active_;
        if (!o.empty())
          for (int lane = 0; lane < 32; ++lane)
            if (!predicate(o[0], lane)) lanes &= ~(1u << lane);
        finish.raise({w.now, w.current});
        leave(w, lanes);
        g.mask &= ~lanes, ++g.place;
        if (!g.mask) {
          w.groups.erase(w.groups.begin() + std::ptrdiff_t(group));
          converge(w);
          return;
        }
        break;
      }
      case BSSY:
        for (int lane = 0; lane < 32; ++lane)
          if (g.mask >> lane & 1) w.convergence[o.at(0).index][lane] = g.mask;
        ++g.place;
        break;
      case BREAK:
        for (auto& mask : w.convergence[o.at(0).index])
          if (mask & active_) mask &= ~active_;
        ++g.place;
        break;
      case BSYNC:
        if (!active_) {
          ++g.place;
          break;
        }
        g.state = Group::kAtConvergence, g.convergence = o.at(0).index;
        converge(w);
        return;
      case WARPSYNC:
        if (!i.has("ALL")) unknown();
        g.state = Group::kAtWarpSync;
        converge(w);
        return;
      case CALL: g.place = active_ ? int(o.back().offset / 16) : g.place + 1; break;
      case RET: {
        if (!active_) {
          ++g.place;
          break;
        }
        const uint32_t to = word(o.at(0), std::countr_zero(active_));
        for (int lane = 0; lane < 32; ++lane)
          if (active_ >> lane & 1 && word(o.at(0), lane) != to) fail("lanes return to different places");
        g.place = int(to / 16);
        break;
      }
      case BAR:
        if (!active_) {
          ++g.place;
          break;
        }
        if (!i.has("SYNC") || o.size() != 1 || o[0].offset != 0) unknown();
        g.state = Group::kAtBarrier, g.generation = w.block->gate.generation;
        arrived(w.block->gate, g.mask, Wait::kBarrier, latencies_.barrier);
        return;
      case UCGABAR_ARV:
        w.cluster_generation = cluster_gate_.generation;
        arrived(cluster_gate_, g.mask, Wait::kClusterBarrier, latencies_.cluster_barrier);
        ++g.place;
        break;
      case UCGABAR_WAIT: g.state = Group::kAtClusterWait, g.generation = w.cluster_generation; return;
      case SYNCS:
        if (active_) mbarrier();
        ++g.place;
        if (i.has("PHASECHK") && active_ && !predicate(o.at(0), std::countr_zero(active_))) {
          // Asks again when others have run, as if for the first time.
          --count.issued, count.lanes -= uint64_t(std::popcount(active_));
          w.now = issue_;
          --g.place;
          g.state = Group::kAtMBarrier;
          return;
        }
        break;
      case UBLKCP:
        if (active_) bulk_copy();
        ++g.place;
        break;
      case LDGDEPBAR:
        w.batches.push_back(w.copies);
        w.copies = {};
        ++g.place;
        break;
      case DEPBAR: {
        if (!i.has("LE") || o.at(0).index != 0) unknown();
        const int64_t last = int64_t(w.batches.size()) - o.at(1).offset;
        for (int64_t k = 0; k < last; ++k) wait_for(w.batches[size_t(k)]);
        ++g.place;
        break;
      }
      case MEMBAR: {
        const bool gpu = i.has("GPU");
        Moment m{issue_ + (gpu ? latencies_.fence : 1), 0};
        m.time = std::max(m.time, gpu ? w.stores.time : 0);
        issue_ = std::min(issue_, m.time);
        m.link = link(Wait::kFence, m.time);
        if (i.write_scoreboard < 6) w.scoreboard[i.write_scoreboard].raise(m);
        ++g.place;
        break;
      }
      case CCTL:
        if (i.has("IVALL")) w.block->cached.clear();
        ++g.place;
        break;
      case WARPGROUP:
        if (i.has("DEPBAR"))
          wait_for(w.products);
        else if (!i.has("ARRIVE"))
          unknown();
        ++g.place;
        break;
      case NOP:
      case YIELD:
      case ERRBAR:
      case CGAERRBAR:
      case PREEXIT:  // which kernel overlaps with which is not ours
      case ACQBULK:
      case FENCE: ++g.place; break;
      case ELECT: {
        const int lane = active_ ? std::countr_zero(active_) : 0;
        for (int l = 0; l < 32; ++l)
          if (active_ >> l & 1) set_predicate(o.at(0), l, l == lane);
        if (active_) set(o.at(1), 0, 1u << lane);
        ++g.place;
        break;
      }
      case VOTE:
      case VOTEU: {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane)
          if (active_ >> lane & 1 && predicate(o.back(), lane)) votes |= 1u << lane;
        const bool verdict = i.has("ALL") ? votes == active_ : i.has("ANY") ? votes != 0 : (unknown(), false);
        for (const Operand& x : o) {
          if (&x == &o.back()) continue;
          for (int lane = 0; lane < 32; ++lane) {
            if (!(active_ >> lane & 1)) continue;
            if (x.kind == Operand::kRegister || x.kind == Operand::kUniform)
              set(x, lane, votes);
            else
              set_predicate(x, lane, verdict);
          }
        }
        ++g.place;
        break;
      }
      case ULDC: {
        if (predicate(i.guard, 0)) {
          const int bytes = i.has("64") ? 8 : i.has("U8") ? 1 : i.has("U16") ? 2 : 4;
          const uint64_t x = constant(o.at(1), 0, bytes);
          set(o[0], 0, uint32_t(x));
          if (bytes == 8) set(o[0], 0, uint32_t(x >> 32), 1);
        }
        ++g.place;
        break;
      }
      case S2UR:
        if (o.at(1).name == "SR_CTAID.X")
          set(o[0], 0, w.block->index);
        else if (o.at(1).name == "SR_CgaCtaId")
          set(o[0], 0, w.block->rank);
        else if (o.at(1).name == "SR_CTAID.Y" || o.at(1).name == "SR_CTAID.Z")
          set(o[0], 0, 0);
        else if (o.at(1).name == "SR_SWINHI")
          set(o[0], 0, kSharedWindow);
        else
          fail("special register");
        result(Wait::kSpecial, latencies_.special);
        ++g.place;
        break;
      default: {
        const size_t before = links.size();
        if (i.base[0] == 'U' ? predicate(i.guard, 0) : active_ != 0) execute();
        // Results of other units than memory, of which the compiler does not know when they come.
        if (i.write_scoreboard < 6 && links.size() == before)
          result(i.op == LDC ? Wait::kConstant : Wait::kSpecial,
                 i.op == LDC ? latencies_.constant : latencies_.special);
        ++g.place;
      }
    }
  }
}

void Machine::run(const Launch& launch, uint32_t first_block, uint32_t blocks, std::vector<Range> ranges) {
  launch_ = launch, ranges_ = std::move(ranges);
  if (first_block % launch.cluster || blocks % launch.cluster) throw std::runtime_error("SASS: parts of a cluster");
  constants_.assign(0x10000, 0);
  const uint32_t header[6] = {launch.threads, 1, 1, launch.blocks, 1, 1};
  std::memcpy(constants_.data(), header, sizeof header);
  constants_[kIsCluster] = launch.cluster > 1;
  std::memcpy(&constants_[kParameters], launch.parameters.data(), launch.parameters.size());
  for (uint32_t first = first_block; first < first_block + blocks; first += launch.cluster) {
    blocks_.clear();
    blocks_.resize(launch.cluster);
    cluster_gate_ = {launch.cluster * launch.threads, 0, 0, {}, {}};
    for (uint32_t rank = 0; rank < launch.cluster; ++rank) {
      Block& b = blocks_[rank];
      b.index = first + rank, b.rank = rank;
      b.shared.assign(kSharedBase + launch.shared_bytes, 0xff);
      b.gate = {launch.threads, 0, 0, {}, {}};
      for (uint32_t n = 0; 32 * n < launch.threads; ++n) {
        auto w = std::make_unique<Warp>();
        w->block = &b, w->number = n;
        w->alive = launch.threads - 32 * n >= 32 ? ~0u : (1u << (launch.threads - 32 * n)) - 1;
        w->groups.push_back({w->alive, 0, Group::kReady, 0, 0});
        b.warps.push_back(std::move(w));
      }
    }
    for (bool left = true; left;) {
      left = false;
      bool progress = false;
      for (Block& b : blocks_)
        for (auto& w : b.warps) {
          for (bool again = true; again;) {
            again = false;
            for (size_t k = 0; k < w->groups.size(); ++k) {
              const bool polls = w->groups[k].state == Group::kAtMBarrier;
              if (!wake(*w, w->groups[k])) continue;
              step(*w, k);
              const bool still = polls && k < w->groups.size() && w->groups[k].state == Group::kAtMBarrier;
              progress |= !still, again = !still;
              break;
            }
          }
          left |= !w->groups.empty();
        }
      if (left && !progress) throw std::runtime_error("SASS: deadlock");
    }
  }
}

}  // namespace rebalfer::sass

// ------------------------------------------------------------------------------------------------------ Python

using namespace rebalfer::sass;

namespace {
std::string error;
template <typename F>
const char* attempt(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
}  // namespace

extern "C" {

const char* sass_parse(const char* lines, void** program) {
  return attempt([&] {
    auto* p = new Program(parse(lines));
    for (auto& i : p->instructions) i.op = opcode(i.base);
    *program = p;
  });
}

// ranges: begin, end, cold of each. Counts: of each instruction, the seven of Count. Links: parent, place, wait, issue,
// ready of each on the critical path, the last first.
const char* sass_run(const void* program, const int64_t* latencies, const uint32_t* shape,
                     const unsigned char* parameters, uint64_t parameter_bytes, uint32_t first_block, uint32_t blocks,
                     const uint64_t* ranges, uint64_t range_count, uint64_t* counts, int64_t* path, uint64_t path_room,
                     uint64_t* path_length, int64_t* finish) {
  return attempt([&] {
    const auto& p = *static_cast<const Program*>(program);
    Latencies l;
    std::memcpy(&l, latencies, sizeof l);
    Machine m(p, l);
    Launch launch{shape[0], shape[1], shape[2], shape[3], {parameters, parameters + parameter_bytes}};
    std::vector<Range> known;
    for (uint64_t k = 0; k < range_count; ++k)
      known.push_back({ranges[3 * k], ranges[3 * k + 1], ranges[3 * k + 2] != 0});
    m.run(launch, first_block, blocks, known);
    for (size_t k = 0; k < m.counts.size(); ++k) {
      const Count& c = m.counts[k];
      const uint64_t row[7] = {c.issued, c.lanes, c.wavefronts, c.sectors, c.read, c.written, c.cold};
      std::memcpy(counts + 7 * k, row, sizeof row);
    }
    *finish = m.finish.time;
    *path_length = 0;
    for (int at = m.finish.link; at >= 0 && *path_length < path_room; at = m.links[size_t(at)].parent) {
      const Link& x = m.links[size_t(at)];
      const int64_t row[5] = {x.parent, x.place, int64_t(x.wait), x.issue, x.ready};
      std::memcpy(path + 5 * (*path_length)++, row, sizeof row);
    }
  });
}
}
