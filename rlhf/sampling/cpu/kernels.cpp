// The two operations that dominate sampling on a CPU and that torch has no fast kernel for: a
// linear layer with few rows, and attention of one token to a KV cache, both in float32. kernels.py
// builds and loads this file.
//
// The result of a row depends on that row alone: the kernels round identically for any batch,
// number of threads and memory address. (The sampling loop does not quite: with more than
// MAX_KERNEL_ROWS rows, fast_linear.py uses torch's linear layer.)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

using torch::stable::Tensor;

constexpr int64_t WIDE = 8;  // floats in a vector
constexpr int64_t PARTIAL_TERMS = 256;  // terms of a partial sum
// Multiplications; fewer do not pay for another thread.
constexpr int64_t MIN_PER_THREAD = 1 << 15;
// Tokens that the cache is prefetched ahead: attention is bound by memory latency.
constexpr int64_t PREFETCH_TOKENS = 32;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int Ints __attribute__((vector_size(32)));

// Weights and the KV cache are larger than a processor's caches, so they come from memory at each
// token. Prefetching into the second level was faster than into the first.
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)

static inline Vec load(const float* p) { return *(const Vec*)p; }

static const float* floats(const Tensor& x) {
  const bool is_float = x.scalar_type() == torch::headeronly::ScalarType::Float;
  STD_TORCH_CHECK(x.is_cpu() && is_float, "a float32 tensor on a CPU is needed");
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.stride(last) == 1 || x.size(last) == 1, "the last dimension is not contiguous");
  return (const float*)x.const_data_ptr();
}

// ----------------------------------------------------------------------------------- linear layer

// y[r][c] = sum over i of x[r][i] w[c][i] + b[c], for C columns and V vectors of rows. Rows are the
// lanes of a vector: x is transposed, (k, V * WIDE), and w is not. Each weight is read once; those
// of the tile after the next are prefetched meanwhile.
template <int C, int V>
static inline void tile(const float* xt, const float* w, const float* b, float* y, int64_t k,
                        int64_t n, int64_t rows) {
  Vec sum[C][V] = {};
  for (int64_t i = 0; i < k;) {
    Vec partial[C][V] = {};  // a sum of partial sums has a smaller rounding error
    for (const int64_t end = std::min(k, i + PARTIAL_TERMS); i < end; i++) {
      Vec x[V];
      for (int v = 0; v < V; v++) x[v] = load(xt + (i * V + v) * WIDE);
      if (i % 16 == 0)
        for (int c = 0; c < C; c++) PREFETCH(w + (2 * C + c) * k + i);
      for (int c = 0; c < C; c++)
        for (int v = 0; v < V; v++) partial[c][v] += w[c * k + i] * x[v];
    }
    for (int c = 0; c < C; c++)
      for (int v = 0; v < V; v++) sum[c][v] += partial[c][v];
  }
  float columns[C][V * WIDE];
  for (int c = 0; c < C; c++)
    for (int v = 0; v < V; v++) *(Vec*)&columns[c][v * WIDE] = sum[c][v] + (b ? b[c] : 0.f);
  for (int64_t r = 0; r < rows; r++)
    for (int c = 0; c < C; c++) y[r * n + c] = columns[c][r];
}

template <int C, int V>
static void tiles(const float* xt, const float* w, const float* b, float* y, int64_t k, int64_t n,
                  int64_t rows, int64_t from, int64_t to) {
  for (; from + C <= to; from += C)
    tile<C, V>(xt, w + from * k, b ? b + from : nullptr, y + from, k, n, rows);
  for (; from < to; from++)
    tile<1, V>(xt, w + from * k, b ? b + from : nullptr, y + from, k, n, rows);
}

// x (..., k), w (n, k), b (n,), all contiguous -> (..., n)
static Tensor linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(last >= 0 && w.dim() == 2, "linear: w needs two dimensions, x at least one");
  STD_TORCH_CHECK(x.size(last) == w.size(1) && w.size(1) > 0, "linear: sizes do not match");
  STD_TORCH_CHECK(x.is_contiguous() && w.is_contiguous(), "linear: x or w is not contiguous");
  STD_TORCH_CHECK(!bias || bias->numel() == w.size(0), "linear: the size of the bias is wrong");
  const int64_t k = w.size(1), n = w.size(0), m = x.numel() / k;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < last; i++) shape.push_back(x.size(i));
  shape.push_back(n);
  Tensor y = torch::stable::new_empty(x, shape);
  const float *xs = floats(x), *ws = floats(w), *bs = bias ? floats(*bias) : nullptr;
  float* ys = (float*)y.mutable_data_ptr();
  std::vector<float> xt;
  for (int64_t first = 0; first < m; first += 2 * WIDE) {
    const int64_t rows = std::min(2 * WIDE, m - first);
    const int64_t lanes = rows > WIDE ? 2 * WIDE : WIDE;
    xt.assign(k * lanes, 0.f);
    for (int64_t from = 0; from < k; from += 64)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = from; i < std::min(k, from + 64); i++)
          xt[i * lanes + r] = xs[(first + r) * k + i];
    const int64_t share = std::max((n + threads - 1) / threads, MIN_PER_THREAD / (k * lanes));
    torch::stable::parallel_for(0, n, (share + 5) / 6 * 6, [&](int64_t from, int64_t to) {
      auto f = lanes > WIDE ? tiles<6, 2> : tiles<6, 1>;
      f(xt.data(), ws, bs, ys + first * n, k, n, rows, from, to);
    });
  }
  return y;
}

// -------------------------------------------------------------------------------------- attention

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has __builtin_shufflevector since version 12 only
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// The sum of each of 8 vectors.
static inline Vec sums(const Vec* a) {
  Vec b[4], c[2];
  for (int i = 0; i < 4; i++) {
    const Vec l = a[2 * i], r = a[2 * i + 1];
    b[i] = SHUFFLE(l, r, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(l, r, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; i++) {
    const Vec l = b[2 * i], r = b[2 * i + 1];
    c[i] = SHUFFLE(l, r, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(l, r, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return SHUFFLE(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         SHUFFLE(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// exp(x) for x <= 0 with a relative error of at most 2e-7, 0 below -87: 2^n e^f with
// |f| <= ln(2) / 2 and the Taylor series of e^f.
static inline Vec exponential(Vec x) {
  const Ints tiny = x < -87.f;
  x = tiny ? Vec{} - 87.f : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Vec nf = __builtin_convertvector(n, Vec);
  // ln(2) as the sum of two constants; products with the first one are exact
  const Vec f = x - nf * 0.693359375f + nf * 2.12194440e-4f;
  Vec e = Vec{} + 1.f / 5040;
  for (float coefficient : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f})
    e = e * f + coefficient;
  return tiny ? Vec{} : e * (Vec)((n + 127) << 23);
}

// sum over t of p[t] v[t][i] / total, for N vectors of i. Several independent sums run at a time,
// as each addition would wait for the previous one.
template <int N>
static inline void mean(const float* p, const float* v, float* out, int64_t T, int64_t vt,
                        float total) {
  constexpr int SUMS = 8 / N;
  Vec sum[SUMS][N] = {};
  int64_t t = 0;
  for (; t + SUMS <= T; t += SUMS)
    for (int s = 0; s < SUMS; s++)
      for (int j = 0; j < N; j++) {
        const float* value = v + (t + s) * vt + j * WIDE;
        PREFETCH(value + PREFETCH_TOKENS * vt);
        sum[s][j] += p[t + s] * load(value);
      }
  for (; t < T; t++)
    for (int j = 0; j < N; j++) sum[0][j] += p[t] * load(v + t * vt + j * WIDE);
  for (int j = 0; j < N; j++) {
    for (int s = 1; s < SUMS; s++) sum[0][j] += sum[s][j];
    *(Vec*)(out + j * WIDE) = sum[0][j] / total;
  }
}

// Attention of one token in one head: scores of T keys, softmax, weighted mean of the values.
// q (d,); k and v (T, d) with row strides kt and vt; mask (T,), added to the scores; scores: memory
// for T + WIDE floats -> out (d,).
static void attend_one(const float* q, const float* k, const float* v, const float* mask,
                       float* scores, float* out, int64_t T, int64_t d, int64_t kt, int64_t vt,
                       float scale) {
  float largest = -INFINITY;
  for (int64_t t = 0; t < T; t += WIDE) {
    const int64_t n_keys = std::min(WIDE, T - t);
    Vec sum[WIDE] = {};
    int64_t i = 0;
    for (; i + WIDE <= d; i += WIDE)
      for (int64_t j = 0; j < WIDE; j++) {
        const float* key = k + (t + std::min(j, n_keys - 1)) * kt + i;
        PREFETCH(key + PREFETCH_TOKENS * kt);
        sum[j] += load(q + i) * load(key);
      }
    const Vec all = sums(sum);
    for (int64_t j = 0; j < n_keys; j++) {
      float score = all[j];
      for (int64_t rest = i; rest < d; rest++) score += q[rest] * k[(t + j) * kt + rest];
      scores[t + j] = score * scale + mask[t + j];
      largest = std::max(largest, scores[t + j]);
    }
  }
  std::fill(scores + T, scores + T + WIDE, -INFINITY);
  Vec partial = {};
  for (int64_t t = 0; t < T; t += WIDE)
    partial += *(Vec*)(scores + t) = exponential(load(scores + t) - largest);
  float total = 0;
  for (int64_t j = 0; j < WIDE; j++) total += partial[j];

  int64_t i = 0;
  for (; i + 8 * WIDE <= d; i += 8 * WIDE) mean<8>(scores, v + i, out + i, T, vt, total);
  if (i + 4 * WIDE <= d) {
    mean<4>(scores, v + i, out + i, T, vt, total);
    i += 4 * WIDE;
  }
  for (; i + WIDE <= d; i += WIDE) mean<1>(scores, v + i, out + i, T, vt, total);
  for (; i < d; i++) {
    float sum = 0;
    for (int64_t t = 0; t < T; t++) sum += scores[t] * v[t * vt + i];
    out[i] = sum / total;
  }
}

// q (B, heads, 1, d), k and v (B, groups, T, d), mask (B, 1, 1, T), added to the scores; all
// contiguous in the last dimension -> (B, 1, heads, d). A row without any visible token gives NaN.
static Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
                     double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && mask.dim() == 4,
                  "attend: tensors need four dimensions");
  const int64_t B = q.size(0), heads = q.size(1), d = q.size(3), groups = k.size(1), T = k.size(2);
  for (const Tensor* x : {&k, &v}) {
    STD_TORCH_CHECK(x->size(0) == B && x->size(1) == groups, "attend: sizes do not match");
    STD_TORCH_CHECK(x->size(2) == T && x->size(3) == d, "attend: sizes do not match");
  }
  STD_TORCH_CHECK(q.size(2) == 1 && heads % groups == 0 && T > 0 && d > 0,
                  "attend: sizes do not match");
  STD_TORCH_CHECK(mask.size(0) == B && mask.size(1) == 1 && mask.size(2) == 1 && mask.size(3) == T,
                  "attend: the size of the mask is wrong");
  Tensor y = torch::stable::new_empty(q, {B, 1, heads, d});
  const float *qs = floats(q), *ks = floats(k), *vs = floats(v), *masks = floats(mask);
  float* ys = (float*)y.mutable_data_ptr();
  const auto offset = [](const Tensor& x, int64_t b, int64_t h) {
    return b * x.stride(0) + h * x.stride(1);
  };
  const int64_t kt = k.stride(2), vt = v.stride(2), mask_row = mask.stride(0);
  const int64_t share = std::max<int64_t>(1, MIN_PER_THREAD / (2 * T * d));
  torch::stable::parallel_for(0, B * heads, share, [&](int64_t from, int64_t to) {
    std::vector<float> scores(T + WIDE);
    for (; from < to; from++) {
      const int64_t b = from / heads, h = from % heads, g = h / (heads / groups);
      attend_one(qs + offset(q, b, h), ks + offset(k, b, g), vs + offset(v, b, g),
                 masks + b * mask_row, scores.data(), ys + from * d, T, d, kt, vt, scale);
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY(rlhf, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("attend", TORCH_BOX(&attend));
}
