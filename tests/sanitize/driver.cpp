// Every function of the kernels' table and of head_math.h, and the views, on buffers of exactly the size they are
// promised, so that AddressSanitizer sees a read or a write past an end; results are checked against plain loops in
// double, views by their range and their twin. Outputs and scratch begin as NaN. Built by test_sanitizers.py, for one
// instruction set at a time.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#undef REBALFER_ISA
#define REBALFER_ISA kernels_under_test
#include "cpu/kernels.cpp"
#include "head_math.h"
#undef REBALFER_ISA
#define REBALFER_ISA views_under_test
#include "cpu/views.cpp"

namespace rebalfer {
namespace {

int failures = 0, checks = 0;

// Bytes on a cache line, or one element behind it, that end where the allocation ends.
struct Bytes {
  Bytes(int64_t bytes, int64_t shift = 0) : size(bytes) {
    if (posix_memalign(&base, 64, bytes + shift ? bytes + shift : 1)) std::abort();
    data = static_cast<char*>(base) + shift;
    std::memset(data, 0xff, bytes);
  }
  ~Bytes() { std::free(base); }
  Bytes(const Bytes&) = delete;
  void* base;
  char* data;
  int64_t size;
};

template <typename T>
struct Array : Bytes {
  explicit Array(int64_t count, bool shifted = false) : Bytes(count * sizeof(T), shifted ? sizeof(T) : 0) {}
  T* get() { return reinterpret_cast<T*>(data); }
  T& operator[](int64_t i) { return get()[i]; }
};

// Conversions of their own: the numbers are multiples of 1/8 up to 2, exact in every storage.
double decode(float x) { return x; }
double decode(double x) { return x; }
double decode(BFloat16 x) {
  const int exponent = x.bits >> 7 & 0xff, fraction = x.bits & 0x7f;
  if (exponent == 0xff) return NAN;
  const double magnitude = exponent ? std::ldexp(128 + fraction, exponent - 134) : std::ldexp(fraction, -133);
  return x.bits >> 15 ? -magnitude : magnitude;
}
double decode(Half x) {
  const int exponent = x.bits >> 10 & 0x1f, fraction = x.bits & 0x3ff;
  if (exponent == 0x1f) return NAN;
  const double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return x.bits >> 15 ? -magnitude : magnitude;
}
uint16_t encoded(double x, int fraction_bits, int bias) {
  if (x == 0) return 0;
  int exponent;
  const double fraction = std::frexp(std::fabs(x), &exponent);  // in [0.5, 1)
  const int bits = int(std::ldexp(fraction, fraction_bits + 1)) - (1 << fraction_bits);
  return uint16_t((x < 0 ? 0x8000 : 0) | ((exponent - 1 + bias) << fraction_bits) | bits);
}
void encode(double x, float& to) { to = float(x); }
void encode(double x, double& to) { to = x; }
void encode(double x, BFloat16& to) { to.bits = encoded(x, 7, 127); }
void encode(double x, Half& to) { to.bits = encoded(x, 10, 15); }

std::mt19937 generator(1);
double number() { return (int(generator() % 33) - 16) / 8.0; }

// Rows of `width` numbers in storage whose rows are `pitch` apart and end in zeros.
template <typename T>
std::vector<double> random_rows(Array<T>& to, int64_t rows, int64_t width, int64_t pitch) {
  std::vector<double> values(rows * width);
  for (int64_t i = 0; i < rows * pitch; ++i) {
    const int64_t r = i / pitch, x = i % pitch;
    encode(x < width ? values[r * width + x] = number() : 0, to[i]);
  }
  return values;
}

template <typename T>
void expect(const char* what, const T* got, int64_t pitch, const std::vector<double>& truth, int64_t width) {
  const double tolerance = sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 1e-5 : std::is_same_v<T, Half> ? 1e-3 : 8e-3;
  double scale = 1e-3, worst = 0;
  for (double t : truth) scale = std::max(scale, std::fabs(t));
  for (size_t i = 0; i < truth.size(); ++i) {
    const double error = std::fabs(decode(got[int64_t(i) / width * pitch + int64_t(i) % width]) - truth[i]);
    if (!(error <= worst)) worst = error;  // keeps a NaN
  }
  ++checks;
  if (worst <= tolerance * scale) return;
  ++failures;
  std::printf("%s: error %g of %g\n", what, worst, scale);
}

// Where T(A~) reads A~, and the tables that the kernels take; see TwinTables in ops.cpp.
struct Tables {
  Tables(const Kernels& k, const std::vector<int64_t>& map)
      : index(map.size()), base((map.size() + k.lanes - 1) / k.lanes), lanes(base.size / 4 * k.lanes) {
    const int64_t HW = map.size();
    for (int64_t x = 0; x < HW; ++x) index[x] = int32_t(map[x]);
    std::memset(lanes.data, 0, lanes.size);
    for (int64_t t = 0; t * k.lanes < HW; ++t) {
      const int64_t end = std::min(HW, (t + 1) * k.lanes);
      const auto [low, high] = std::minmax_element(&index[t * k.lanes], &index[0] + end);
      fits = fits && *high - *low < 2 * k.lanes;
      base[t] = *low;
      for (int64_t x = t * k.lanes; x < end; ++x) lanes[x] = index[x] - *low;
    }
    if (!k.permutes) fits = false;
  }
  Permutation get(bool permuted) { return {index.get(), permuted ? base.get() : nullptr, lanes.get()}; }
  Array<int32_t> index, base, lanes;
  bool fits = true;
};

struct Shape {
  int64_t C, H, W, L;
};

template <typename T>
void run(const Kernels& k, Shape s, bool channels_last, TwinMap map, bool shifted) {
  using A = typename Compute<T>::type;
  const int64_t C = s.C, HW = s.H * s.W, L = s.L;
  const Geometry g{C, HW, L, channels_last};
  const int64_t p = round_up(HW, k.lanes), pc = round_up(C, k.lanes);
  auto at = [&](int64_t c, int64_t x) { return channels_last ? x * C + c : c * HW + x; };

  Array<T> f(C * HW, shifted), f_twin(C * HW, shifted);
  const auto F = random_rows(f, 1, C * HW, C * HW), F_twin = random_rows(f_twin, 1, C * HW, C * HW);
  Array<T> w(L * C, shifted);
  const auto W = random_rows(w, L, C, C);
  Array<A> w_wide(L * C);
  for (int64_t i = 0; i < L * C; ++i) w_wide[i] = A(W[i]);
  Array<A> packed(k.packed_size(g)), packed_wide(k.packed_size(g));
  k.pack(g, w.get(), false, packed.get());
  k.pack(g, w_wide.get(), true, packed_wide.get());
  ++checks;
  if (std::memcmp(packed.data, packed_wide.data, packed.size)) ++failures, std::puts("pack: the two dtypes differ");

  std::vector<int64_t> reads(HW), inverse(HW);
  for (int64_t x = 0; x < HW; ++x) reads[x] = twin_index(map, x / s.W, x % s.W), inverse[reads[x]] = x;
  Tables there(k, reads), back(k, inverse);

  std::vector<double> maps(L * HW), maps_twin(L * HW), residual(L * HW), P(C), P_twin(C);
  for (int64_t l = 0; l < L; ++l)
    for (int64_t x = 0; x < HW; ++x)
      for (int64_t c = 0; c < C; ++c) {
        maps[l * HW + x] += W[l * C + c] * F[at(c, x)];
        maps_twin[l * HW + x] += W[l * C + c] * F_twin[at(c, x)];
      }
  for (int64_t l = 0; l < L; ++l)
    for (int64_t x = 0; x < HW; ++x) residual[l * HW + x] = maps[l * HW + x] - maps_twin[l * HW + reads[x]];
  for (int64_t c = 0; c < C; ++c)
    for (int64_t x = 0; x < HW; ++x) P[c] += F[at(c, x)] / HW, P_twin[c] += F_twin[at(c, x)] / HW;

  {
    Array<A> out(L * p);
    Bytes scratch(k.scratch_bytes(g));
    k.maps(g, f.get(), packed.get(), out.get(), scratch.data);
    expect("maps", out.get(), p, maps, HW);
  }
  for (int permuted = 0; permuted <= int(there.fits); ++permuted) {
    Array<A> out(L * p), pooled(pc), pooled_twin(pc);
    Bytes scratch(k.scratch_bytes(g));
    k.residual(g, there.get(permuted), f.get(), f_twin.get(), packed.get(), out.get(), pooled.get(), pooled_twin.get(),
               scratch.data);
    expect("residual", out.get(), p, residual, HW);
    expect("pooled", pooled.get(), pc, P, C);
    expect("pooled of the twin", pooled_twin.get(), pc, P_twin, C);
    Array<A> bias(L), logits(L);
    const auto b = random_rows(bias, 1, L, L);
    for (bool with_bias : {true, false}) {
      std::vector<double> z(L);
      for (int64_t l = 0; l < L; ++l) {
        z[l] = with_bias ? b[l] : 0;
        for (int64_t c = 0; c < C; ++c) z[l] += W[l * C + c] * P[c];
      }
      k.logits(g, packed.get(), pooled.get(), with_bias ? bias.get() : nullptr, logits.get());
      expect("logits", logits.get(), L, z, L);
    }
  }

  Array<A> d(L * p), dz(L), dz_twin(L);
  const auto D = random_rows(d, L, HW, p), Z = random_rows(dz, 1, L, L), Z_twin = random_rows(dz_twin, 1, L, L);
  std::vector<double> U(C * HW);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t x = 0; x < HW; ++x)
      for (int64_t l = 0; l < L; ++l) U[at(c, x)] += W[l * C + c] * D[l * HW + x];
  for (bool streaming : {false, true}) {
    Array<T> out(C * HW, shifted);
    Bytes scratch(k.scratch_bytes(g));
    k.view_gradient(g, packed.get(), d.get(), out.get(), streaming, scratch.data);
    expect("view_gradient", out.get(), C * HW, U, C * HW);
    for (int permuted = 0; permuted <= int(back.fits); ++permuted)
      for (bool classified : {true, false}) {
        std::vector<double> own(C * HW), twin(C * HW);
        for (int64_t c = 0; c < C; ++c)
          for (int64_t x = 0; x < HW; ++x) {
            own[at(c, x)] = U[at(c, x)], twin[at(c, x)] = -U[at(c, inverse[x])];
            for (int64_t l = 0; classified && l < L; ++l) {
              own[at(c, x)] += W[l * C + c] * Z[l] / HW;
              twin[at(c, x)] += W[l * C + c] * Z_twin[l] / HW;
            }
          }
        Array<T> out_own(C * HW, shifted), out_twin(C * HW, shifted);
        Bytes room(k.scratch_bytes(g));
        k.pair_gradient(g, back.get(permuted), packed.get(), d.get(), classified ? dz.get() : nullptr,
                        classified ? dz_twin.get() : nullptr, out_own.get(), out_twin.get(), streaming, room.data);
        expect("pair_gradient", out_own.get(), C * HW, own, C * HW);
        expect("pair_gradient of the twin", out_twin.get(), C * HW, twin, C * HW);
      }
  }
  {
    Array<A> out(L * C);
    auto d_weight = random_rows(out, L, C, C);
    for (int64_t l = 0; l < L; ++l)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t x = 0; x < HW; ++x) d_weight[l * C + c] += D[l * HW + x] * F[at(c, x)];
    Bytes scratch(k.scratch_bytes(g));
    k.correlate(g, f.get(), d.get(), out.get(), scratch.data);
    expect("correlate", out.get(), C, d_weight, C);
  }
}

// factors (M, L) and rows (M, count) with strides of their own; nothing behind the last element of either.
template <typename T>
void run_accumulate(const Kernels& k, int64_t M, int64_t L, int64_t count) {
  using A = typename Compute<T>::type;
  const int64_t factor_stride = L + 1, row_stride = count + 3, sum_stride = count + 2;
  Array<A> factors((M - 1) * factor_stride + L), rows((M - 1) * row_stride + count), sum((L - 1) * sum_stride + count);
  const auto a = random_rows(factors, 1, factors.size / sizeof(A), factors.size / sizeof(A));
  const auto x = random_rows(rows, 1, rows.size / sizeof(A), rows.size / sizeof(A));
  const auto before = random_rows(sum, 1, sum.size / sizeof(A), sum.size / sizeof(A));
  auto truth = before;  // what is stored between the rows stays as it was
  for (int64_t l = 0; l < L; ++l)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t m = 0; m < M; ++m) truth[l * sum_stride + c] += a[m * factor_stride + l] * x[m * row_stride + c];
  k.accumulate(M, L, count, factors.get(), factor_stride, rows.get(), row_stride, sum.get(), sum_stride);
  expect("accumulate", sum.get(), truth.size(), truth, truth.size());
}

template <typename A>
void run_head_math(int64_t L) {
  Array<A> z(L), t(L), dz(L);
  auto Z = random_rows(z, 1, L, L), t_row = random_rows(t, 1, L, L), truth = random_rows(dz, 1, L, L);
  for (int64_t l = 0; l < L; ++l) z[l] = A(Z[l] += 500);  // no overflow on the way
  double sum = 0, total = 0, loss = 0;
  for (double x : Z) sum += std::exp(x - 500);
  for (double x : t_row) total += x;
  const double lse = 500 + std::log(sum), upstream = -1.5;
  for (int64_t l = 0; l < L; ++l) {
    loss += t_row[l] * (lse - Z[l]);
    truth[l] = upstream * (total * std::exp(Z[l] - lse) - t_row[l]);
  }
  const auto of = log_sum_exp(z.get(), L);
  cross_entropy_gradient(z.get(), of, t.get(), L, A(upstream), dz.get());
  double error = std::fabs(of.log_sum - (lse - of.top));
  error = std::max(error, std::fabs(cross_entropy(z.get(), of, t.get(), L) - loss));
  const double tolerance = sizeof(A) == 8 ? 1e-11 : 2e-5;  // the digits of the differences, not those of 500
  for (int64_t l = 0; l < L; ++l) error = std::max(error, std::fabs(dz[l] - truth[l]));
  const A v = A(0.5), s = A(-3);
  const bool terms = consistency_term(v, s, 1) == A(1.5) && consistency_term(v, s, 2) == A(2.25) &&
                     consistency_gradient(v, s, 1) == A(-0.5) && consistency_gradient(v, -s, 1) == A(0.5) &&
                     consistency_gradient(v, s, 2) == A(-1.5) && consistency_gradient(v, A(0), 1) == A(0) &&
                     std::isnan(consistency_gradient(v, A(NAN), 1)) && std::isnan(consistency_gradient(v, A(NAN), 2));
  ++checks;
  if (!(error < tolerance) || !terms) ++failures, std::printf("head_math: error %g, terms %d\n", error, terms);
}

template <typename T>
void run_all(Storage storage) {
  const Kernels& k = kernels_under_test(storage);
  const Shape shapes[] = {{1, 1, 1, 2},   {3, 1, 1, 7},   {5, 3, 3, 3},   {17, 5, 3, 4}, {32, 4, 4, 7},  {37, 7, 7, 8},
                          {33, 2, 2, 16}, {70, 7, 7, 11}, {130, 3, 5, 5}, {2, 9, 8, 2},  {64, 1, 17, 3}, {515, 2, 3, 2},
                          {16, 3, 5, 4},  {3, 4, 5, 600}, {32, 7, 7, 7},  {31, 7, 7, 3}, {9, 5, 7, 4},   {16, 8, 8, 5}};
  for (const Shape& s : shapes) {
    const int64_t H = s.H, W = s.W;
    std::vector<TwinMap> maps = {{W - 1, W, -1}, {H * W - 1, -W, -1}};  // hflip, rot180
    if (H == W) maps.push_back({(H - 1) * W, 1, -W});                   // rot90
    for (const TwinMap& map : maps)
      for (bool channels_last : {false, true})
        for (bool shifted : {false, true}) run<T>(k, s, channels_last, map, shifted);
  }
  for (int64_t count : {1, 7, 16, 37, 128}) run_accumulate<T>(k, 3, 9, count), run_accumulate<T>(k, 1, 1, count);
}

// Views of one image: whole pixels unless they are resized, every element written, the twin where the map says.
template <typename T>
void run_views(Storage storage, int64_t C, int64_t h, int64_t w, int64_t H, int64_t W, bool changed, TwinMap twin) {
  ViewPlan plan{h, w, C, H, W, {0.25f, 0.25f, 0.25f}, {0.5f, 0.5f, 0.5f}};
  plan.seed = 7;
  plan.twin = twin;
  plan.crop = changed ? Rectangle{0.3f, 0.6f, 0.4f} : Rectangle{1, 0, 0};
  plan.erase = {0.1f, 0.4f, 1};
  if (changed)
    for (int64_t& chance : plan.chances) chance = int64_t(1) << 31, plan.noise = 0.25f, plan.contrast = 0.5f;
  else
    plan.reach[0] = h / 3, plan.reach[1] = w / 3;
  Array<uint8_t> image(h * w * C);
  for (int64_t i = 0; i < h * w * C; ++i) image[i] = uint8_t(generator());
  Array<T> view(H * W * C), other(H * W * C);
  const ViewKernels& k = views_under_test();
  Bytes scratch(k.scratch_bytes(plan));
  for (int64_t sample : {0, 1, 2, 3}) {
    k.write(plan, storage, image.get(), sample, view.get(), other.get(), scratch.data);
    bool right = true;
    for (int64_t y = 0; y < H; ++y)
      for (int64_t x = 0; x < W; ++x)
        for (int64_t c = 0; c < C; ++c) {
          const double value = decode(view[(y * W + x) * C + c]);
          right = right && value >= -0.51 && value <= 1.51 && value == decode(other[twin_index(twin, y, x) * C + c]);
        }
    k.write(plan, storage, image.get(), sample, view.get(), nullptr, scratch.data);
    ++checks;
    if (!right) ++failures, std::printf("views: %dx%dx%d to %dx%d\n", int(h), int(w), int(C), int(H), int(W));
  }
}

template <typename T>
void run_all_views(Storage storage) {
  const int64_t sizes[][4] = {{1, 1, 1, 1}, {1, 5, 1, 5}, {7, 9, 7, 9}, {6, 4, 67, 67}, {9, 70, 5, 3}};
  for (int64_t C : {1, 3})
    for (bool changed : {false, true})
      for (const auto& [h, w, H, W] : sizes)
        for (TwinMap twin : {TwinMap{W - 1, W, -1}, TwinMap{H * W - 1, -W, -1}, TwinMap{0, W, 1}, TwinMap{0, 1, H}})
          if (twin.stride_h != 1 || H == W) run_views<T>(storage, C, h, w, H, W, changed, twin);
}

}  // namespace
}  // namespace rebalfer

int main() {
  using namespace rebalfer;
  run_all<float>(Storage::f32);
  run_all<double>(Storage::f64);
  run_all<BFloat16>(Storage::bf16);
  run_all<Half>(Storage::f16);
  run_all_views<float>(Storage::f32);
  run_all_views<BFloat16>(Storage::bf16);
  run_all_views<Half>(Storage::f16);
  for (int64_t L : {2, 3, 7, 17}) run_head_math<float>(L), run_head_math<double>(L);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
