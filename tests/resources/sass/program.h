// Instructions of SASS, parsed from nvdisasm's text and the control bits of its encoding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace rebalfer::sass {

// A modifier's name as a number, made when this is compiled or when a program is parsed.
struct Name {
  uint64_t hash = 14695981039346656037u;
  constexpr Name(const char* text) {
    for (; *text; ++text) hash = (hash ^ uint64_t(*text)) * 1099511628211u;
  }
  constexpr bool operator==(const Name&) const = default;
};

struct Operand {
  enum Kind {
    kRegister,
    kUniform,
    kPredicate,
    kUniformPredicate,
    kImmediate,
    kConstant,
    kAddress,
    kSpecial,
    kLabel,
    kBarrier,
    kMatrix
  };
  Kind kind = kImmediate;
  int index = 0;                                         // 255: RZ; of predicates 7: PT; of uniform registers 63: URZ
  bool minus = false, invert = false, absolute = false;  // invert: ~ or !
  int half = -1;                                         // .H0_H0, .H1_H1
  int byte = -1;                                         // .B1 and the like
  bool plain = true;                                     // the word as it is
  bool pair = false;                                     // .64 of an address' register
  int scale = 1;                                         // .X4 of an address' register
  bool is_unsigned = false;                              // .U32 of an address' register
  int uniform = -1;                                      // of an address or a constant's index
  bool descriptor = false;
  int64_t offset = 0;  // of an address or a constant; an immediate's value
  double number = 0;   // of an immediate
  int bank = 0;
  std::string name;  // of a special register; of a matrix in shared memory, ".tnspA" and the like
};

struct Instruction {
  std::string text, base;
  std::vector<Name> modifiers;
  Operand guard;  // PT if none
  std::vector<Operand> operands;
  uint32_t immediate = 0;  // bits 32 to 63 of the encoding
  int stall = 0, write_scoreboard = 7, read_scoreboard = 7, wait_mask = 0;
  int op = 0;

  bool has(Name modifier) const {
    for (const Name& m : modifiers)
      if (m == modifier) return true;
    return false;
  }
};

struct Program {
  std::vector<Instruction> instructions;
};

inline std::string trimmed(const std::string& s) {
  const size_t a = s.find_first_not_of(" \t"), b = s.find_last_not_of(" \t");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

inline int register_number(const std::string& digits, int zero) { return digits == "Z" ? zero : std::stoi(digits); }

// One operand, such as "-R12.reuse", "|R3|", "!P0", "c[0x0][0x210]", "desc[UR8][R2.64+0x10]", "0x1f" or "@0x1230".
inline Operand parse_operand(std::string s) {
  Operand o;
  const std::string whole = s;
  const auto bad = [&]() -> std::runtime_error { return std::runtime_error("operand " + whole); };
  if (s.rfind("desc[", 0) == 0) s = s.substr(s.find(']') + 1), o.descriptor = true;
  if (s[0] == '@') {
    o.kind = Operand::kLabel, o.offset = std::stoll(s.substr(1), nullptr, 16);
    return o;
  }
  if (s.rfind("gdesc[UR", 0) == 0) {
    o.kind = Operand::kMatrix, o.uniform = std::stoi(s.substr(8)), o.name = s.substr(s.find(']') + 1);
    return o;
  }
  if (s[0] == '[') {
    o.kind = Operand::kAddress, o.index = 255;
    std::string inner = s.substr(1, s.find(']') - 1);
    size_t start = 0;
    while (start <= inner.size()) {
      const size_t plus = std::min(inner.find('+', start), inner.size());
      const std::string part = inner.substr(start, plus - start);
      start = plus + 1;
      if (part.empty()) continue;
      if (part[0] == 'U' && part[1] == 'R') {
        o.uniform = register_number(part.substr(2, part.find('.') - 2), 63);
        if (part.find(".64") != std::string::npos) o.byte = 1;  // the uniform register is a pair
      } else if (part[0] == 'R') {
        const size_t dot = part.find('.');
        o.index = register_number(part.substr(1, dot == std::string::npos ? dot : dot - 1), 255);
        const std::string rest = dot == std::string::npos ? "" : part.substr(dot);
        if (rest == ".64")
          o.pair = true;
        else if (rest == ".U32")
          o.is_unsigned = true;
        else if (rest == ".X4")
          o.scale = 4;
        else if (rest == ".X8")
          o.scale = 8;
        else if (rest == ".X16")
          o.scale = 16;
        else if (!rest.empty())
          throw bad();
      } else {
        o.offset += std::stoll(part, nullptr, 16);
      }
    }
    return o;
  }
  for (bool more = true; more;) {
    more = false;
    if (s[0] == '-' && s.size() > 1 && (s[1] == 'R' || s[1] == 'U' || s[1] == '|' || s[1] == 'c'))
      o.minus = more = true;
    else if (s[0] == '+' && s.size() > 1 && s[1] == 'R')
      more = true;
    else if (s[0] == '!' || s[0] == '~')
      o.invert = more = true;
    if (more) s = s.substr(1);
  }
  if (s[0] == '|') {
    o.absolute = true;
    const size_t close = s.find('|', 1);
    s = s.substr(1, close - 1) + s.substr(close + 1);
  }
  if (s[0] == 'c' && s[1] == '[') {
    o.kind = Operand::kConstant;
    o.bank = std::stoi(s.substr(2), nullptr, 16);
    o.index = 255;
    std::string inner = s.substr(s.find("][") + 2);
    inner = inner.substr(0, inner.find(']'));
    if (inner[0] == 'U') {
      o.uniform = register_number(inner.substr(2, inner.find('+') - 2), 63);
      inner = inner.find('+') == std::string::npos ? "0" : inner.substr(inner.find('+') + 1);
    } else if (inner[0] == 'R') {
      o.index = register_number(inner.substr(1, inner.find('+') - 1), 255);
      inner = inner.find('+') == std::string::npos ? "0" : inner.substr(inner.find('+') + 1);
    }
    o.offset = std::stoll(inner, nullptr, 16);
    return o;
  }
  const size_t dot = s.find('.');
  const std::string stem = s.substr(0, dot);
  const auto numbered = [&](const char* prefix) {
    const size_t n = std::strlen(prefix);
    if (stem.rfind(prefix, 0) != 0 || stem.size() == n) return false;
    return stem.find_first_not_of("0123456789", n) == std::string::npos;
  };
  const auto suffixes = [&] {
    std::string rest = dot == std::string::npos ? "" : s.substr(dot);
    for (size_t at; (at = rest.find(".reuse")) != std::string::npos;) rest.erase(at, 6);
    if (rest == ".H0_H0")
      o.half = 0;
    else if (rest == ".H1_H1")
      o.half = 1;
    else if (rest == ".B1")
      o.byte = 1;
    else if (rest == ".B2")
      o.byte = 2;
    else if (rest == ".B3")
      o.byte = 3;
    else if (!rest.empty())
      throw bad();
  };
  if (stem == "RZ" || numbered("R")) {
    o.kind = Operand::kRegister, o.index = register_number(stem.substr(1), 255);
    suffixes();
  } else if (stem == "URZ" || numbered("UR")) {
    o.kind = Operand::kUniform, o.index = register_number(stem.substr(2), 63);
    suffixes();
  } else if (stem == "PT" || (numbered("P") && stem.size() == 2)) {
    o.kind = Operand::kPredicate, o.index = stem == "PT" ? 7 : stem[1] - '0';
  } else if (stem == "UPT" || (numbered("UP") && stem.size() == 3)) {
    o.kind = Operand::kUniformPredicate, o.index = stem == "UPT" ? 7 : stem[2] - '0';
  } else if (numbered("B") || numbered("SB")) {
    o.kind = Operand::kBarrier, o.index = std::stoi(stem.substr(stem[0] == 'S' ? 2 : 1));
  } else if (stem.rfind("SR", 0) == 0 || stem == "PR" || stem == "UPR" || stem.rfind("gsb", 0) == 0) {
    o.kind = Operand::kSpecial, o.name = s;
  } else if (s.find("INF") != std::string::npos || s.find("QNAN") != std::string::npos) {
    o.number = s.find("QNAN") != std::string::npos ? NAN : s[0] == '-' ? -INFINITY : INFINITY;
  } else {
    char* end = nullptr;
    if (s.find("0x") != std::string::npos) {
      o.offset = std::strtoll(s.c_str(), &end, 16), o.number = double(o.offset);
    } else {
      o.number = std::strtod(s.c_str(), &end), o.offset = int64_t(o.number);
    }
    if (end == s.c_str() || *end) throw bad();
  }
  return o;
}

// A line is "address control immediate|guard|text", the numbers hexadecimal; the text's labels are "@0x1230".
inline Program parse(const char* lines) {
  Program program;
  std::istringstream input(lines);
  for (std::string line; std::getline(input, line);) {
    const size_t a = line.find('|'), b = line.find('|', a + 1);
    std::istringstream numbers(line.substr(0, a));
    uint64_t address, control;
    Instruction i;
    numbers >> std::hex >> address >> control >> i.immediate;
    if (address != 16 * program.instructions.size()) throw std::runtime_error("SASS: address of " + line);
    i.stall = control & 15, i.write_scoreboard = control >> 5 & 7, i.read_scoreboard = control >> 8 & 7;
    i.wait_mask = control >> 11 & 63;
    const std::string guard = line.substr(a + 1, b - a - 1);
    try {
      i.guard = parse_operand(guard.empty() ? "PT" : guard);
      i.text = line.substr(b + 1);
      const size_t space = std::min(i.text.find(' '), i.text.size());
      std::istringstream mnemonic(i.text.substr(0, space));
      std::getline(mnemonic, i.base, '.');
      for (std::string m; std::getline(mnemonic, m, '.');) i.modifiers.push_back(m.c_str());
      std::string rest = i.text.substr(space);
      int depth = 0;
      std::string part;
      for (char c : rest + ",") {
        depth += c == '[', depth -= c == ']';
        if (c != ',' || depth) {
          part += c;
        } else if (part = trimmed(part); !part.empty()) {
          for (size_t gap; (gap = part.find(' ')) != std::string::npos; part = trimmed(part.substr(gap)))
            i.operands.push_back(parse_operand(part.substr(0, gap)));
          i.operands.push_back(parse_operand(part)), part.clear();
        }
      }
    } catch (const std::exception& error) {
      throw std::runtime_error("SASS: " + i.text + ": " + error.what());
    }
    for (Operand& o : i.operands) o.plain = !o.minus && !o.invert && !o.absolute && o.half < 0 && o.byte < 0;
    program.instructions.push_back(std::move(i));
  }
  return program;
}

}  // namespace rebalfer::sass
