// The operators' tensors and scratch on a CPU: how they are allocated, and small ones in the compute type.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../operators.h"
#include "kernels.h"

namespace rebalfer {

constexpr int64_t kHugePage = 2 << 20;  // bytes

template <typename A>
constexpr ScalarType kCompute = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

inline DeviceId cpu() { return {aoti_torch_device_type_cpu(), 0}; }

// A gradient of the features, or views. A large fresh one costs more in page faults than in stores, so it is allocated
// on whole huge pages of its own: the ends of a mapping that begins anywhere would be small pages.
inline Tensor feature_output(int64_t M, int64_t C, int64_t H, int64_t W, ScalarType dtype, bool channels_last) {
  const Shape shape{M, C, H, W}, strides = feature_strides(C, H, W, channels_last);
  const int64_t size = bytes_of(dtype), bytes = M * C * H * W * size;
#if defined(__linux__)
  if (bytes >= kHugePage) {
    const int64_t whole = round_up(bytes, kHugePage);
    Tensor room = output(cpu(), {(whole + kHugePage) / size}, dtype);  // what is never touched never becomes memory
    const int64_t address = reinterpret_cast<int64_t>(room.data_ptr()), begin = round_up(address, kHugePage);
    madvise(reinterpret_cast<void*>(begin), whole, MADV_HUGEPAGE);  // advice: failure changes nothing
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(room.get(), 4, shape.size, strides.size, (begin - address) / size, &handle));
    return Tensor(handle);
  }
#endif
  return empty(cpu(), shape, strides, dtype);
}

inline OptionalTensor feature_output_if(bool wanted, int64_t M, int64_t C, int64_t H, int64_t W, ScalarType dtype,
                                        bool channels_last) {
  return wanted ? OptionalTensor(feature_output(M, C, H, W, dtype, channels_last)) : std::nullopt;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Scratch, aligned to a cache line, with room for a vector behind it. By malloc, as aligned_alloc cuts each piece of
// memory out of a larger one, which a small call notices.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count, bool zeros = false) {
    if (!count) return;
    const size_t bytes = count * sizeof(A) + 2 * kCacheLine;
    memory_.reset(zeros ? std::calloc(1, bytes) : std::malloc(bytes));
    if (!memory_) throw std::bad_alloc();
    data_ = reinterpret_cast<A*>(round_up(reinterpret_cast<int64_t>(memory_.get()), kCacheLine));
  }
  A* get() const { return data_; }

 private:
  std::unique_ptr<void, Free> memory_;
  A* data_ = nullptr;
};

inline float widened(uint16_t bits, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
  }
  return static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
}

// A small tensor (bias, logits) in the compute type.
template <typename A>
Buffer<A> values(const Tensor& t) {
  const int64_t count = t.numel();
  Buffer<A> out(count);
  const void* const from = t.data_ptr();
  const ScalarType dtype = t.scalar_type();
  for (int64_t i = 0; i < count; ++i) {
    switch (dtype) {
      case ScalarType::Double: out.get()[i] = A(static_cast<const double*>(from)[i]); break;
      case ScalarType::Float: out.get()[i] = A(static_cast<const float*>(from)[i]); break;
      default: out.get()[i] = widened(static_cast<const uint16_t*>(from)[i], dtype);
    }
  }
  return out;
}

template <typename A>
void write(void* out, ScalarType dtype, int64_t i, A x) {
  switch (dtype) {
    case ScalarType::Double: static_cast<double*>(out)[i] = x; break;
    case ScalarType::Float: static_cast<float*>(out)[i] = float(x); break;
    case ScalarType::BFloat16: static_cast<c10::BFloat16*>(out)[i] = c10::BFloat16(float(x)); break;
    default: static_cast<c10::Half*>(out)[i] = c10::Half(float(x));
  }
}

// A tensor as rows of the same length; null where it is empty or absent.
template <typename A>
class Rows {
 public:
  Rows(const Tensor& t, int64_t length) : data_(t.numel() ? static_cast<A*>(t.data_ptr()) : nullptr), length_(length) {}
  Rows(const OptionalTensor& t, int64_t length) : Rows(t ? Rows(*t, length) : Rows(nullptr, length)) {}
  Rows(A* data, int64_t length) : data_(data), length_(length) {}
  explicit operator bool() const { return data_; }
  A* operator[](int64_t i) const { return data_ + i * length_; }

 private:
  A* data_;
  int64_t length_;
};

// The 2N views of a batch of features, or of their gradient.
class Views {
 public:
  Views(const Tensor& t, int64_t view_bytes) : data_(static_cast<char*>(t.data_ptr())), view_bytes_(view_bytes) {}
  Views(const OptionalTensor& t, int64_t view_bytes)
      : data_(t ? static_cast<char*>(t->data_ptr()) : nullptr), view_bytes_(view_bytes) {}
  void* operator[](int64_t m) const { return data_ + m * view_bytes_; }

 private:
  char* data_;
  int64_t view_bytes_;
};

}  // namespace rebalfer
