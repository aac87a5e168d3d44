// The views of one image, compiled once per instruction set (REBALFER_ISA names the exported function):
// rebalfer_kernels/reference.py says what is computed.
//
// Compiled without contraction of multiply and add, and in the reference's order of operations: what decides which
// pixels are read or erased must round as it does there. Noise alone is computed by other means, equal to rounding.
//
// A row of the view is made in a buffer that stays in the L1 cache: two rows of the image, interpolated across (the
// next row of the view needs one of them again), are interpolated down, coloured and normalised as one long vector.
//
// No container and no function of the standard library: the linker would keep one of three builds of it for all.
#include "views.h"

#include <cstring>

#include "simd.h"

namespace rebalfer {
namespace {

struct Words {
  uint32_t word[4];
  uint32_t operator[](int i) const { return word[i]; }
};

constexpr uint32_t kFirstNoise = 4;  // draws 0 to 3 are the image's own numbers, each later one is a pixel's noise
constexpr int kPixels = 64;          // whose noise is drawn at once
typedef float Pixel __attribute__((vector_size(16)));
constexpr int64_t kBehind = 4;  // elements of room behind a row: a pixel is copied as four

// Philox4x32-10 (Salmon et al., 2011) of `count` counters side by side.
template <int count>
void philox(uint64_t seed, uint32_t (&c)[4][count]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int i = 0; i < count; ++i) {
      const uint64_t a = uint64_t(c[0][i]) * 0xD2511F53u, b = uint64_t(c[2][i]) * 0xCD9E8D57u;
      const uint32_t upper = uint32_t(b >> 32) ^ c[1][i] ^ k0, lower = uint32_t(a >> 32) ^ c[3][i] ^ k1;
      c[0][i] = upper;
      c[1][i] = uint32_t(b);
      c[2][i] = lower;
      c[3][i] = uint32_t(a);
    }
}

float uniform(uint32_t word) { return float(int32_t(word >> 8)) * 0x1p-24f; }

// From [1, 1 + spread), or the inverse of such a number, by the uppermost bit.
float ratio_of(uint32_t word, float spread) {
  const float ratio = 1.0f + spread * uniform(word << 1);
  return word >> 31 ? 1.0f / ratio : ratio;
}

int64_t below(uint32_t word, int64_t count) { return int64_t(uint64_t(word) * uint64_t(count) >> 32); }

inline float at_least(float x, float low) { return x < low ? low : x; }
inline float at_most(float x, float high) { return x > high ? high : x; }
inline float within(float x, float low, float high) { return at_most(at_least(x, low), high); }

// sqrt(-2 log u) for u in [2^-24, 1]. log of a number within [sqrt(1/2), sqrt(2)) by a polynomial, error 2e-8.
inline float radius(float u) {
  int32_t bits;
  std::memcpy(&bits, &u, 4);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent * (1 << 23);
  float m;
  std::memcpy(&m, &bits, 4);
  const float f = m - 1.0f;
  float p = -0.080646627f;
  p = p * f + 0.12917872f;
  p = p * f - 0.13072553f;
  p = p * f + 0.14173454f;
  p = p * f - 0.16628921f;
  p = p * f + 0.20002696f;
  p = p * f - 0.25000751f;
  p = p * f + 0.33333313f;
  p = p * f - 0.49999998f;
  const float log = float(exponent) * 0.69314718f + (f + f * f * p);
  return __builtin_sqrtf(__builtin_fabsf(2.0f * log));  // of u = 1 the polynomial's logarithm is 0
}

// Cosine and sine of a share of a whole turn: a polynomial within an eighth of a turn, error 3e-8.
inline void on_circle(float turn, float& cosine, float& sine) {
  const int32_t quarter = int32_t(4.0f * turn + 0.5f), odd = -(quarter & 1);
  const float f = 4.0f * turn - float(quarter), s = f * f;
  const float along = 0.99999997f + s * (-1.23369701f + s * (0.25359864f + s * -0.02040835f));
  const float across = f * (1.57079632f + s * (-0.64596348f + s * (0.07968023f + s * -0.00460218f)));
  // By bits, since a loop with branches is not vectorised: an odd quarter exchanges the two, others change the sign.
  int32_t a, b;
  std::memcpy(&a, &along, 4);
  std::memcpy(&b, &across, 4);
  const int32_t x = (((a ^ b) & odd) ^ a) ^ int32_t(uint32_t((quarter + 1) & 2) << 30);
  const int32_t y = (((a ^ b) & odd) ^ b) ^ int32_t(uint32_t(quarter & 2) << 30);
  std::memcpy(&cosine, &x, 4);
  std::memcpy(&sine, &y, 4);
}

// The two pixels between whose centres that of an output pixel is, and the second's share.
struct Tap {
  int64_t first, second;
  float share;
};

Tap tap_of(int64_t place, float start, float scale, int64_t count) {
  const float at = (float(place) + 0.5f) * scale + (start - 0.5f), first = __builtin_floorf(at);
  const float last = float(count - 1);
  return {int64_t(within(first, 0.0f, last)), int64_t(within(first + 1.0f, 0.0f, last)), at - first};
}

// A pixel as a whole: four elements, of which the fourth of a colour pixel is the next one's first.
template <typename T>
inline void copy_pixel(const T* from, T* to) {
  std::memcpy(static_cast<void*>(to), from, 4 * sizeof(T));
}

// The view of one image of C channels, made row by row.
template <int C>
class View {
 public:
  View(const ViewPlan& plan, const uint8_t* image, int64_t sample, Scratch& scratch)
      : p(plan), image(image), low(uint32_t(sample)), high(uint32_t(uint64_t(sample) >> 32)) {
    const int64_t of_image = p.w * C + kBehind, of_view = p.W * C + kBehind;
    x_taps = scratch.take<Tap>(p.W);
    y_taps = scratch.take<Tap>(p.H);
    bytes = scratch.take<uint8_t>(of_image);
    moved = scratch.take<uint8_t>(of_view);
    source = scratch.take<float>(of_image);
    for (float*& row : across) row = scratch.take<float>(of_view);
    mean = scratch.take<float>(of_view);
    std = scratch.take<float>(of_view);
    value = scratch.take<float>(of_view);
    noise = scratch.take<float>(of_view);
    for (int64_t j = 0; j < p.W * C; ++j) mean[j] = p.mean[j % C], std[j] = p.std[j % C];
    const Words place = draw(0), tone = draw(1), rectangle = draw(2), corner = draw(3);
    float box_h = float(p.h), box_w = float(p.w), top, left;
    if (p.reach[0] || p.reach[1]) {
      top = float(below(place[0], 2 * p.reach[0] + 1)) - float(p.reach[0]);
      left = float(below(place[1], 2 * p.reach[1] + 1)) - float(p.reach[1]);
    } else {
      const float area = p.crop.area + p.crop.area_range * uniform(place[0]);
      const float ratio = ratio_of(place[1], p.crop.ratio_range);
      const float wide = at_least(at_most(__builtin_sqrtf(area * ratio), 1.0f), area);  // the nearest ratio that fits
      box_h = area / wide * float(p.h);
      box_w = wide * float(p.w);
      top = uniform(tone[0]) * (float(p.h) - box_h);
      left = uniform(tone[1]) * (float(p.w) - box_w);
    }
    const bool flipped = place[2] < p.chances[0];
    const float scale_y = box_h / float(p.H), scale_x = box_w / float(p.W);
    on_pixels = true;
    for (int64_t y = 0; y < p.H; ++y) {
      y_taps[y] = tap_of(y, top, scale_y, p.h);
      on_pixels = on_pixels && y_taps[y].share == 0.0f;
    }
    for (int64_t x = 0; x < p.W; ++x) {
      x_taps[x] = tap_of(flipped ? p.W - 1 - x : x, left, scale_x, p.w);
      on_pixels = on_pixels && x_taps[x].share == 0.0f;
    }

    const float contrast = 1.0f + p.contrast * (2.0f * uniform(tone[3]) - 1.0f);
    gain = (1.0f + p.brightness * (2.0f * uniform(tone[2]) - 1.0f)) * contrast;
    offset = 0.5f - 0.5f * contrast;
    noisy = p.noise > 0 && rectangle[3] < p.chances[1];
    if (rectangle[0] < p.chances[2]) choose_rectangle(rectangle, corner);
  }

  // Row y of the view, (W, C), with room behind it.
  const float* row(int64_t y) {
    const Tap tap = y_taps[y];
    if (noisy) draw_noise(y);
    if (on_pixels) {
      move_pixels(tap.first);
      const uint8_t* const at = moved;
      normalise([at](int64_t j) { return float(at[j]); });
    } else {
      const float* const upper = source_row(tap.first);
      const float* const under = tap.share == 0.0f ? upper : source_row(tap.second);
      const float share = tap.share;
      normalise([=](int64_t j) { return upper[j] + share * (under[j] - upper[j]); });
    }
    if (y >= erase_y && y < erase_y + erase_h) std::memset(value + erase_x * C, 0, erase_w * C * sizeof(float));
    return value;
  }

 private:
  Words draw(uint32_t number) const {
    uint32_t c[4][1] = {{low}, {high}, {p.epoch}, {number}};
    philox(p.seed, c);
    return {{c[0][0], c[1][0], c[2][0], c[3][0]}};
  }

  void choose_rectangle(const Words& rectangle, const Words& corner) {
    const float area = (p.erase.area + p.erase.area_range * uniform(rectangle[1])) * float(p.H * p.W);
    const float ratio = ratio_of(rectangle[2], p.erase.ratio_range);
    const float wide =
        at_least(at_most(__builtin_sqrtf(area * ratio), float(p.W)), area / float(p.H));  // as of the crop
    erase_h = int64_t(within(__builtin_floorf(area / wide + 0.5f), 1.0f, float(p.H)));
    erase_w = int64_t(within(__builtin_floorf(wide + 0.5f), 1.0f, float(p.W)));
    erase_y = below(corner[0], p.H - erase_h + 1);
    erase_x = below(corner[1], p.W - erase_w + 1);
  }

  // The row from its pixel values in [0, 255].
  template <typename Pixels>
  void normalise(const Pixels& pixels) {
    const int64_t length = p.W * C;
    const float g = gain, o = offset, strength = p.noise;
    const float *const m = mean, *const s = std, *const n = noise;
    float* __restrict const to = value;
    if (noisy)
      for (int64_t j = 0; j < length; ++j)
        to[j] = (within(pixels(j) * (1.0f / 255.0f) * g + o + strength * n[j], 0.0f, 1.0f) - m[j]) / s[j];
    else
      for (int64_t j = 0; j < length; ++j)
        to[j] = (within(pixels(j) * (1.0f / 255.0f) * g + o, 0.0f, 1.0f) - m[j]) / s[j];
  }

  // Row y of the image, its pixels where those of the view are.
  void move_pixels(int64_t y) {
    std::memcpy(bytes, image + y * p.w * C, p.w * C);
    for (int64_t x = 0; x < p.W; ++x) copy_pixel(bytes + x_taps[x].first * C, moved + x * C);
  }

  // Row y of the image where the view's columns are, (W, C); of the last two rows that were asked for it is at hand.
  const float* source_row(int64_t y) {
    if (y == rows[0] || y == rows[1]) {
      latest = y == rows[1];
      return across[latest];
    }
    latest = !latest;
    rows[latest] = y;
    const uint8_t* from = image + y * p.w * C;
    for (int64_t j = 0; j < p.w * C; ++j) source[j] = float(from[j]);
    float* to = across[latest];
    for (int64_t x = 0; x < p.W; ++x, to += C) {
      const Tap tap = x_taps[x];
      Pixel first, second;
      std::memcpy(&first, source + tap.first * C, sizeof first);
      std::memcpy(&second, source + tap.second * C, sizeof second);
      const Pixel mixed = first + tap.share * (second - first);
      std::memcpy(to, &mixed, sizeof mixed);
    }
    return across[latest];
  }

  // Standard normal numbers of the pixels of row y, by Box and Muller's method.
  void draw_noise(int64_t y) {
    uint32_t c[4][kPixels];
    float normal[3][kPixels];
    for (int64_t x = 0; x < p.W; x += kPixels) {
      for (int i = 0; i < kPixels; ++i)
        c[0][i] = low, c[1][i] = high, c[2][i] = p.epoch, c[3][i] = kFirstNoise + uint32_t(y * p.W + x) + uint32_t(i);
      philox(p.seed, c);
      for (int i = 0; i < kPixels; ++i) {
        float cosine, sine;
        const float near = radius(uniform(c[0][i]) + 0x1p-24f);
        on_circle(uniform(c[1][i]), cosine, sine);
        normal[0][i] = near * cosine;
        normal[1][i] = near * sine;
      }
      if constexpr (C == 3)
        for (int i = 0; i < kPixels; ++i) {
          float cosine, sine;
          on_circle(uniform(c[3][i]), cosine, sine);
          normal[2][i] = radius(uniform(c[2][i]) + 0x1p-24f) * cosine;
        }
      const int64_t here = p.W - x < kPixels ? p.W - x : kPixels;
      for (int64_t i = 0; i < here; ++i)
        for (int j = 0; j < C; ++j) noise[(x + i) * C + j] = normal[j][i];
    }
  }

  const ViewPlan& p;
  const uint8_t* const image;
  const uint32_t low, high;
  Tap *x_taps, *y_taps;
  uint8_t *bytes, *moved;      // a row of the image, (w, C), and its pixels where the view has them, (W, C)
  float* source;               // a row of the image, (w, C)
  float* across[2];            // rows of the image where the view's columns are, (W, C)
  int64_t rows[2] = {-1, -1};  // which
  int latest = 0;              // the one that was asked for last, to be kept
  float *mean, *std;           // of a row's elements
  float *value, *noise;        // a row of the view
  bool on_pixels, noisy;
  float gain, offset;
  int64_t erase_y = 0, erase_x = 0, erase_h = 0, erase_w = 0;
};

// The pixels of a row, which have room behind them, where the twin has them.
template <int C, typename T>
void write_twin_row(const T* row, const ViewPlan& p, int64_t y, T* twin) {
  const int64_t step = p.twin.stride_w;
  T* const first = twin + twin_index(p.twin, y, 0) * C;
  if (step == 1) {
    std::memcpy(static_cast<void*>(first), row, p.W * C * sizeof(T));
    return;
  }
  int64_t x = p.W;
  if (step == -1 && C == 3)  // forwards in memory, so that the next pixel repairs what the fourth element overwrote
    while (--x > 0) copy_pixel(row + x * C, first - x * C);
  else
    x = p.W - 1;
  for (int64_t left = step == -1 && C == 3 ? 0 : x; left >= 0; --left)
    for (int c = 0; c < C; ++c) first[left * step * C + c] = row[left * C + c];
}

template <int C, typename T>
void write_as(const ViewPlan& p, const uint8_t* image, int64_t sample, T* view, T* twin, void* memory) {
  Scratch scratch(memory);
  View<C> made(p, image, sample, scratch);
  const int64_t length = p.W * C;
  T* const narrowed = scratch.take<T>(length + kBehind);
  for (int64_t y = 0; y < p.H; ++y) {
    const float* const values = made.row(y);
    const T* row;
    if constexpr (sizeof(T) == sizeof(float)) {
      row = values;
    } else {
      int64_t j = 0;
      for (; j + kLanes<float> <= length; j += kLanes<float>) store(narrowed + j, load(values + j));
      for (; j < length; ++j) narrowed[j] = narrow<T>(values[j]);
      row = narrowed;
    }
    std::memcpy(static_cast<void*>(view + y * length), row, length * sizeof(T));
    if (twin) write_twin_row<C>(row, p, y, twin);
  }
}

template <typename T>
void write_stored(const ViewPlan& p, const uint8_t* image, int64_t sample, void* view, void* twin, void* scratch) {
  const auto of_channels = p.C == 3 ? write_as<3, T> : write_as<1, T>;
  of_channels(p, image, sample, static_cast<T*>(view), static_cast<T*>(twin), scratch);
}

void write(const ViewPlan& p, Storage storage, const uint8_t* image, int64_t sample, void* view, void* twin,
           void* scratch) {
  const auto stored = storage == Storage::f32    ? write_stored<float>
                      : storage == Storage::bf16 ? write_stored<BFloat16>
                                                 : write_stored<Half>;
  stored(p, image, sample, view, twin, scratch);
}

// Taps, two rows of bytes, and of floats a row of the image and seven of the view (a narrowed one is smaller).
int64_t scratch_bytes(const ViewPlan& p) {
  const int64_t of_image = p.w * p.C + kBehind, of_view = p.W * p.C + kBehind;
  return (p.W + p.H) * int64_t(sizeof(Tap)) + of_image * 5 + of_view * 29 + 16 * 64;
}

}  // namespace

const ViewKernels& REBALFER_ISA() {
  static const ViewKernels kernels{scratch_bytes, write};
  return kernels;
}

}  // namespace rebalfer
