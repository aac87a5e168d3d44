// paired_views on CPU tensors: rebalfer_kernels/reference.py says what is computed. A task is one image, so its views
// depend on no other. Compiled without contraction of multiply and add: what decides which pixels are read or erased
// must round as it does there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "../head_math.h"

namespace rebalfer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Words = std::array<uint32_t, 4>;

constexpr uint32_t kFirstNoise = 4;  // draws 0 to 3 are the image's own numbers, each later one is a pixel's noise

// Philox4x32-10 (Salmon et al., 2011).
Words philox(uint64_t seed, Words c) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
    c = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

float uniform(uint32_t word) { return float(word >> 8) * 0x1p-24f; }

// From [1, 1 + spread), or the inverse of such a number, by the uppermost bit.
float ratio_of(uint32_t word, float spread) {
  const float ratio = 1.0f + spread * uniform(word << 1);
  return word >> 31 ? 1.0f / ratio : ratio;
}

int64_t below(uint32_t word, int64_t count) { return int64_t(uint64_t(word) * uint64_t(count) >> 32); }

// Smallest area, its range, the range of the ratio of the sides.
struct Rectangle {
  float area, area_range, ratio_range;
};

// What is done to every image alike: ViewPlan of reference.py and the shapes.
struct Plan {
  int64_t h, w, C, H, W;  // of the images and of the views
  std::vector<float> mean, std;
  std::array<int64_t, 3> chances;  // flipped, noisy, erased
  std::array<int64_t, 2> reach;
  Rectangle crop;
  float brightness, contrast, noise;
  Rectangle erase;
  uint64_t seed;
  uint32_t epoch;
  TwinMap twin;
  bool both;
};

// The two pixels between whose centres that of an output pixel is, and the second's share.
struct Tap {
  int64_t first, second;
  float share;
};

Tap tap_of(int64_t place, float start, float scale, int64_t count) {
  const float at = (float(place) + 0.5f) * scale + (start - 0.5f), first = std::floor(at);
  const float last = float(count - 1);
  return {int64_t(std::clamp(first, 0.0f, last)), int64_t(std::clamp(first + 1.0f, 0.0f, last)), at - first};
}

// One image: its numbers, and the rows of its view.
class View {
 public:
  View(const Plan& plan, int64_t sample)
      : p(plan), low(uint32_t(sample)), high(uint32_t(uint64_t(sample) >> 32)), x_taps(p.W), y_taps(p.H) {
    const Words place = draw(0), tone = draw(1), rectangle = draw(2), corner = draw(3);
    float box_h = float(p.h), box_w = float(p.w), top, left;
    if (p.reach[0] || p.reach[1]) {
      top = float(below(place[0], 2 * p.reach[0] + 1)) - float(p.reach[0]);
      left = float(below(place[1], 2 * p.reach[1] + 1)) - float(p.reach[1]);
    } else {
      const float area = p.crop.area + p.crop.area_range * uniform(place[0]);
      const float ratio = ratio_of(place[1], p.crop.ratio_range);
      const float wide = std::max(std::min(std::sqrt(area * ratio), 1.0f), area);  // the nearest ratio that fits
      box_h = area / wide * float(p.h);
      box_w = wide * float(p.w);
      top = uniform(tone[0]) * (float(p.h) - box_h);
      left = uniform(tone[1]) * (float(p.w) - box_w);
    }
    const bool flipped = place[2] < p.chances[0];
    const float scale_y = box_h / float(p.H), scale_x = box_w / float(p.W);
    for (int64_t y = 0; y < p.H; ++y) y_taps[y] = tap_of(y, top, scale_y, p.h);
    for (int64_t x = 0; x < p.W; ++x) x_taps[x] = tap_of(flipped ? p.W - 1 - x : x, left, scale_x, p.w);
    const auto whole = [](const Tap& tap) { return tap.share == 0.0f; };
    on_pixels = std::all_of(y_taps.begin(), y_taps.end(), whole) && std::all_of(x_taps.begin(), x_taps.end(), whole);

    const float contrast = 1.0f + p.contrast * (2.0f * uniform(tone[3]) - 1.0f);
    gain = (1.0f + p.brightness * (2.0f * uniform(tone[2]) - 1.0f)) * contrast;
    offset = 0.5f - 0.5f * contrast;
    noisy = p.noise > 0 && rectangle[3] < p.chances[1];
    if (rectangle[0] < p.chances[2]) choose_rectangle(rectangle, corner);
    // What becomes of each pixel value, where nothing but the value decides.
    if (on_pixels && !noisy) {
      table.resize(p.C * 256);
      for (int64_t c = 0; c < p.C; ++c)
        for (int v = 0; v < 256; ++v) table[c * 256 + v] = normalised(float(v) * (1.0f / 255.0f), c);
    }
  }

  // Row y of the view, (W, C), of one image (h, w, C).
  void row(const uint8_t* image, int64_t y, float* out) const {
    if (p.C == 3)
      row_of<3>(image, y, out);
    else
      row_of<1>(image, y, out);
    if (y >= erase_y && y < erase_y + erase_h) std::fill_n(out + erase_x * p.C, erase_w * p.C, 0.0f);
  }

 private:
  Words draw(uint32_t number) const { return philox(p.seed, {low, high, p.epoch, number}); }

  void choose_rectangle(const Words& rectangle, const Words& corner) {
    const float area = (p.erase.area + p.erase.area_range * uniform(rectangle[1])) * float(p.H * p.W);
    const float ratio = ratio_of(rectangle[2], p.erase.ratio_range);
    const float wide = std::max(std::min(std::sqrt(area * ratio), float(p.W)), area / float(p.H));  // as of the crop
    erase_h = int64_t(std::clamp(std::floor(area / wide + 0.5f), 1.0f, float(p.H)));
    erase_w = int64_t(std::clamp(std::floor(wide + 0.5f), 1.0f, float(p.W)));
    erase_y = below(corner[0], p.H - erase_h + 1);
    erase_x = below(corner[1], p.W - erase_w + 1);
  }

  float normalised(float value, int64_t c) const {
    return (std::clamp(value * gain + offset, 0.0f, 1.0f) - p.mean[c]) / p.std[c];
  }

  template <int C>
  void row_of(const uint8_t* image, int64_t y, float* out) const {
    const Tap tap = y_taps[y];
    const uint8_t *upper = image + tap.first * p.w * C, *lower = image + tap.second * p.w * C;
    if (!table.empty()) {
      for (int64_t x = 0; x < p.W; ++x)
        for (int c = 0; c < C; ++c) out[x * C + c] = table[c * 256 + upper[x_taps[x].first * C + c]];
      return;
    }
    for (int64_t x = 0; x < p.W; ++x) {
      const Tap across = x_taps[x];
      for (int c = 0; c < C; ++c) {
        const float a = upper[across.first * C + c], b = upper[across.second * C + c];
        const float d = lower[across.first * C + c], e = lower[across.second * C + c];
        const float above = a + across.share * (b - a), under = d + across.share * (e - d);
        out[x * C + c] = (above + tap.share * (under - above)) * (1.0f / 255.0f) * gain + offset;
      }
    }
    if (noisy) add_noise<C>(y, out);
    for (int64_t x = 0; x < p.W; ++x)
      for (int c = 0; c < C; ++c)
        out[x * C + c] = (std::clamp(out[x * C + c], 0.0f, 1.0f) - p.mean[c]) / p.std[c];
  }

  // By Box and Muller's method.
  template <int C>
  void add_noise(int64_t y, float* out) const {
    constexpr float kTurn = 6.283185307179586f;
    for (int64_t x = 0; x < p.W; ++x) {
      const Words words = draw(kFirstNoise + uint32_t(y * p.W + x));
      const float near = std::sqrt(-2.0f * std::log(uniform(words[0]) + 0x1p-24f)), turn = kTurn * uniform(words[1]);
      out[x * C] += p.noise * (near * std::cos(turn));
      if (C == 3) {
        const float far = std::sqrt(-2.0f * std::log(uniform(words[2]) + 0x1p-24f));
        out[x * C + 1] += p.noise * (near * std::sin(turn));
        out[x * C + 2] += p.noise * (far * std::cos(kTurn * uniform(words[3])));
      }
    }
  }

  const Plan& p;
  const uint32_t low, high;
  std::vector<Tap> x_taps, y_taps;
  std::vector<float> table;  // (C, 256)
  bool on_pixels, noisy;
  float gain, offset;
  int64_t erase_y = 0, erase_x = 0, erase_h = 0, erase_w = 0;
};

template <typename T>
void write_views(const Plan& p, const Tensor& images, const Tensor& indices, const Tensor& samples, Tensor& out) {
  const int64_t N = indices.size(0), K = images.size(0), pixels = p.H * p.W, view = pixels * p.C;
  const auto* from = static_cast<const uint8_t*>(images.data_ptr());
  const auto *index = static_cast<const int64_t*>(indices.data_ptr()),
             *sample = static_cast<const int64_t*>(samples.data_ptr());
  auto* const to = static_cast<T*>(out.data_ptr());
  torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(p.W * p.C);
    for (int64_t i = begin; i < end; ++i) {
      T *const original = to + i * view, *const twin = to + (N + i) * view;
      if (index[i] < 0 || index[i] >= K) {
        std::fill_n(original, view, T(std::numeric_limits<float>::quiet_NaN()));
        if (p.both) std::fill_n(twin, view, T(std::numeric_limits<float>::quiet_NaN()));
        continue;
      }
      const View drawn(p, sample[i]);
      for (int64_t y = 0; y < p.H; ++y) {
        drawn.row(from + index[i] * p.h * p.w * p.C, y, row.data());
        T* const line = original + y * p.W * p.C;
        for (int64_t j = 0; j < p.W * p.C; ++j) line[j] = T(row[j]);
        if (!p.both) continue;
        for (int64_t x = 0; x < p.W; ++x) {
          T* const pixel = twin + twin_index(p.twin, y, x) * p.C;
          for (int64_t c = 0; c < p.C; ++c) pixel[c] = line[x * p.C + c];
        }
      }
    }
  });
}

Tensor paired_views(const Tensor& images, const Tensor& indices, const Tensor& samples,
                    const std::optional<Tensor>& epoch_tensor, int64_t epoch, int64_t seed,
                    const std::vector<int64_t>& size, const std::vector<double>& mean, const std::vector<double>& std,
                    const std::vector<int64_t>& chances, const std::vector<int64_t>& reach,
                    const std::vector<double>& crop, double brightness, double contrast, double noise,
                    const std::vector<double>& erase, const std::vector<int64_t>& twin_map, bool both,
                    ScalarType dtype) {
  const int64_t H = size[0], W = size[1], C = images.size(3), M = indices.size(0) * (both ? 2 : 1);
  const auto rectangle = [](const std::vector<double>& x) {
    return Rectangle{float(x[0]), float(x[1]), float(x[2])};
  };
  if (epoch_tensor) epoch = *static_cast<const int64_t*>(epoch_tensor->data_ptr());
  const auto& t = twin_map;  // as twin_map_on of operators.h
  const TwinMap twin{t[0] * (H - 1) * W + t[3] * (W - 1), t[1] * W + t[4], t[2] * W + t[5]};
  const Plan plan{images.size(1),
                  images.size(2),
                  C,
                  H,
                  W,
                  {mean.begin(), mean.end()},
                  {std.begin(), std.end()},
                  {chances[0], chances[1], chances[2]},
                  {reach[0], reach[1]},
                  rectangle(crop),
                  float(brightness),
                  float(contrast),
                  float(noise),
                  rectangle(erase),
                  uint64_t(seed),
                  uint32_t(epoch),
                  twin,
                  both};
  const std::vector<int64_t> shape{M, C, H, W}, strides{H * W * C, 1, W * C, C};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  switch (dtype) {
    case ScalarType::Float: write_views<float>(plan, images, indices, samples, out); break;
    case ScalarType::BFloat16: write_views<c10::BFloat16>(plan, images, indices, samples, out); break;
    case ScalarType::Half: write_views<c10::Half>(plan, images, indices, samples, out); break;
    default: STD_TORCH_CHECK(false, "dtype: expected float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace
}  // namespace rebalfer

STABLE_TORCH_LIBRARY_IMPL(rebalfer_kernels, CPU, m) {
  m.impl("paired_views_cpu", TORCH_BOX(&rebalfer::paired_views));
}
