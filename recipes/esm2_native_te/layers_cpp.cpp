// SPDX-License-Identifier: Apache-2.0
// Kernels of `layers_cpp.py`: attention of packed sequences with rotary positions, and layer norm, in FP32 and BF16;
// what lies between the feed-forward part's matrix products in BF16. Forward and backward. Sums are FP32. Results
// depend neither on the number of threads nor, for attention, on what else is in the batch.

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

namespace {

using at::BFloat16;
using at::native::cpublas::brgemm;

inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// To the nearest BF16, ties to even; the NaN that operations make stays one.
inline uint32_t to_bf16(float x) {
  const uint32_t u = bits(x);
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

// 2^x for x <= 0, or a little above, written so that the compiler makes vectors of it; the NaN that operations make
// stays one. The relative error is 2e-7 for FP32 and, since BF16 has one of 2e-3 itself, 3e-6 there.
template <typename T>
inline float power_of_two(float x) {
  x = x < -64.0f ? -64.0f : x;            // nothing beside 1, and its products are no denormal numbers, which are slow
  const float shifted = x + 12582912.0f;  // 1.5 x 2^23: rounds to a whole number, which are then the lower bits
  const float f = x - (shifted - 12582912.0f);
  float p;  // minimax for |f| <= 1/2
  if constexpr (std::is_same_v<T, float>) {
    p = 1.53458120e-4f;
    p = p * f + 1.33999312e-3f;
    p = p * f + 9.61848896e-3f;
    p = p * f + 5.55032878e-2f;
    p = p * f + 2.40226469e-1f;
    p = p * f + 6.93147206e-1f;
    p = p * f + 1.0f;
  } else {
    p = 9.57010e-3f;
    p = p * f + 5.591786e-2f;
    p = p * f + 2.4024745e-1f;
    p = p * f + 6.9312181e-1f;
    p = p * f + 9.9999926e-1f;
  }
  return from_bits(bits(p) + (bits(shifted) << 23));
}
constexpr float LOG2_E = 1.44269504f;

inline float load(const float* x) { return *x; }
inline float load(const BFloat16* x) {
  return from_bits(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(x)) << 16);
}
inline void store(float* to, float x) { *to = x; }
inline void store(BFloat16* to, float x) { *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(to_bf16(x)); }

// C [M, N] (+)= A [M, K] B [K, N], C in FP32.
template <typename T>
inline void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, bool add) {
  brgemm(m, n, k, lda, n, n, add, a, b, c, !std::is_same_v<T, float>);
}

// ---- attention
//
// A task is one head of one sequence; it goes through blocks of BLOCK queries against all keys. Scores are kept
// transposed, keys x queries: what belongs to a query (maximum, sum) is then a vector over columns, and no operation
// runs across one. The products are oneDNN's, through PyTorch: AMX or AVX-512 for BF16, AVX-512 or AVX2 for FP32.

constexpr int64_t DIM = HEAD_DIM, HALF = DIM / 2;  // compiled anew for each: short loops want constant bounds
constexpr int64_t VECTOR = 16;
constexpr int64_t STRIP = 64;  // rows of a task; sums over rows are added up task by task, in order
// Loops over half a head go on to a whole vector, if what they read and write too much is no further than the next
// row. Tables of angles have rows of so many.
constexpr int64_t FILLED = HALF % 8 ? (HALF + VECTOR - 1) / VECTOR * VECTOR : HALF;
constexpr int64_t WHOLE = HALF + FILLED <= 2 * DIM ? FILLED : HALF;
const float SCALE = 1.0f / std::sqrt(static_cast<float>(DIM)), LOG2_SCALE = SCALE * LOG2_E;
constexpr int64_t BLOCK = 64;  // queries at once: four AMX tiles
constexpr int64_t ROUND = 32;  // keys are padded to a multiple of it: few shapes of products, each compiled once

// Scratch of one thread, kept from call to call.
template <typename T>
T* scratch(int which, int64_t size) {
  static thread_local std::unique_ptr<char[]> buffers[16];
  static thread_local int64_t sizes[16] = {};
  const int64_t bytes = size * static_cast<int64_t>(sizeof(T)) + 64;
  if (sizes[which] < bytes) {
    buffers[which].reset(new char[bytes]);
    sizes[which] = bytes;
  }
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffers[which].get()) + 63) / 64 * 64);
}

// No exception may leave a parallel region: most likely there is no memory. Returns whether there was none.
template <typename F>
bool succeeds(F&& work) noexcept {
  try {
    work();
    return true;
  } catch (...) {
    return false;
  }
}

struct Head {
  int64_t length, padded, row;  // tokens, tokens rounded up, elements from one token to the next in qkv
  const float *cos, *sin;       // [length, WHOLE]
};

constexpr int64_t AHEAD = 16;  // rows; they are too far apart for the processor to see them coming
template <typename T>
inline void prefetch(const T* row) {
  for (int64_t d = 0; d < DIM; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d);
  __builtin_prefetch(row + DIM - 1);
}

// One head's rows [length, D], `stride` elements apart, side by side; with zeros behind the last.
template <typename T>
void gather(const T* from, int64_t stride, const Head& h, T* to) {
  for (int64_t i = 0; i < h.length; ++i) {
    prefetch(from + (i + AHEAD) * stride);
    std::memcpy(to + i * DIM, from + i * stride, DIM * sizeof(T));
  }
  std::memset(static_cast<void*>(to + h.length * DIM), 0, (h.padded - h.length) * DIM * sizeof(T));
}

// The same, turned by the rotary angles; for queries and keys, behind which there is another row in memory.
template <typename T>
void gather_turned(const T* from, int64_t stride, const Head& h, T* to) {
  for (int64_t i = 0; i < h.length; ++i) {
    prefetch(from + (i + AHEAD) * stride);
    const T *x = from + i * stride, *z = x + HALF;
    T *y = to + i * DIM, *w = y + HALF;
    const float *c = h.cos + i * WHOLE, *s = h.sin + i * WHOLE;
    float first[WHOLE], second[WHOLE];
    for (int64_t d = 0; d < WHOLE; ++d) {
      first[d] = load(x + d) * c[d] - load(z + d) * s[d];
      second[d] = load(z + d) * c[d] + load(x + d) * s[d];
    }
    for (int64_t d = 0; d < WHOLE; ++d) store(y + d, first[d]);
    for (int64_t d = 0; d < WHOLE; ++d) store(w + d, second[d]);
  }
  std::memset(static_cast<void*>(to + h.length * DIM), 0, (h.padded - h.length) * DIM * sizeof(T));
}

// Gradients of one head's rows, side by side, to rows `stride` elements apart.
template <typename T>
void scatter(const float* rows, const Head& h, T* to) {
  for (int64_t i = 0; i < h.length; ++i) {
    const float* __restrict g = rows + i * DIM;
    T* __restrict x = to + i * h.row;
    for (int64_t d = 0; d < DIM; ++d) store(x + d, g[d]);
  }
}

// The same, of the scores' factors: turned back by the rotary angles, and scaled as the scores are. What is written
// too much is overwritten by the keys' and values' gradients.
template <typename T>
void scatter_turned(const float* rows, const Head& h, T* to) {
  for (int64_t i = 0; i < h.length; ++i) {
    const float *g = rows + i * DIM, *e = g + HALF;
    T *x = to + i * h.row, *z = x + HALF;
    const float *c = h.cos + i * WHOLE, *s = h.sin + i * WHOLE;
    float first[WHOLE], second[WHOLE];
    for (int64_t d = 0; d < WHOLE; ++d) {
      first[d] = SCALE * (g[d] * c[d] + e[d] * s[d]);
      second[d] = SCALE * (e[d] * c[d] - g[d] * s[d]);
    }
    for (int64_t d = 0; d < WHOLE; ++d) store(x + d, first[d]);
    for (int64_t d = 0; d < WHOLE; ++d) store(z + d, second[d]);
  }
}

// [padded, D] to the left-hand factor [D, padded].
template <typename T>
void transpose(const T* rows, const Head& h, T* to) {
  for (int64_t i = 0; i < h.padded; ++i)
    for (int64_t d = 0; d < DIM; ++d) to[d * h.padded + i] = rows[i * DIM + d];
}

// A block of rows, transposed, as a right-hand factor [D, BLOCK]. A word of 32 bits is an FP32 or a pair of BF16.
template <typename T>
void right_transposed(const T* rows, int64_t count, T* to) {
  const int64_t words = DIM * static_cast<int64_t>(sizeof(T)) / 4;
  const auto* from = reinterpret_cast<const uint32_t*>(rows);
  auto* words_to = reinterpret_cast<uint32_t*>(to);
  if (count < BLOCK) std::memset(static_cast<void*>(to), 0, BLOCK * DIM * sizeof(T));
  for (int64_t c = 0; c < count; ++c)
    for (int64_t w = 0; w < words; ++w) words_to[w * BLOCK + c] = from[c * words + w];
}

// A block of rows as a right-hand factor [BLOCK, D].
void right_rows(const float* rows, int64_t count, float* to) {
  std::memcpy(to, rows, count * DIM * sizeof(float));
  std::memset(to + count * DIM, 0, (BLOCK - count) * DIM * sizeof(float));
}
void right_rows(const BFloat16* rows, int64_t count, BFloat16* to) {
  if (count < BLOCK) std::memset(static_cast<void*>(to), 0, BLOCK * DIM * sizeof(BFloat16));
  for (int64_t i = 0; i < count; i += 2) {
    const auto* __restrict a = reinterpret_cast<const uint16_t*>(rows + i * DIM);
    auto* __restrict pairs = reinterpret_cast<uint32_t*>(to + i * DIM);
    if (i + 1 < count) {
      for (int64_t d = 0; d < DIM; ++d) pairs[d] = a[d] | (static_cast<uint32_t>(a[DIM + d]) << 16);
    } else {
      for (int64_t d = 0; d < DIM; ++d) pairs[d] = a[d];
    }
  }
}

// To the nearest BF16, ties away from zero, in the upper half: for factors that live no longer than their product.
inline uint32_t upper_bf16(float x) { return bits(x) + 0x8000; }
inline void store_fast(float* to, float x) { *to = x; }
inline void store_fast(BFloat16* to, float x) {
  *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(upper_bf16(x) >> 16);
}

// Two rows of a [keys, BLOCK] matrix as two rows of a right-hand factor.
inline void store_pair(float* to, int64_t row, const float* a, const float* b) {
  std::memcpy(to + row * BLOCK, a, BLOCK * sizeof(float));
  std::memcpy(to + (row + 1) * BLOCK, b, BLOCK * sizeof(float));
}
inline void store_pair(BFloat16* to, int64_t row, const float* a, const float* b) {
  auto* pairs = reinterpret_cast<uint32_t*>(to + row * BLOCK);
  for (int64_t c = 0; c < BLOCK; ++c) pairs[c] = (upper_bf16(a[c]) >> 16) | (upper_bf16(b[c]) & 0xffff0000);
}

// Keys that are padding get no weight. The pair of which one key is real is written by `store_pair`.
template <typename T>
void clear_padding(const Head& h, T* matrix) {
  std::memset(static_cast<void*>(matrix + h.length * BLOCK), 0, (h.padded - h.length) * BLOCK * sizeof(T));
}

template <typename T>
void forward_head(const Head& h, const T* qkv, T* context, int64_t context_row, float* lse, int64_t lse_row) {
  const int64_t n = h.length, padded = h.padded;
  T* queries = scratch<T>(0, padded * DIM + VECTOR);
  T* keys = scratch<T>(1, padded * DIM + VECTOR);
  T* values = scratch<T>(2, padded * DIM);
  T* values_transposed = scratch<T>(3, padded * DIM);
  T* query = scratch<T>(4, BLOCK * DIM);
  float* scores = scratch<float>(5, padded * BLOCK);
  T* weights = scratch<T>(6, padded * BLOCK);
  float* out = scratch<float>(7, DIM * BLOCK);
  gather_turned(qkv, h.row, h, queries);
  gather_turned(qkv + DIM, h.row, h, keys);
  gather(qkv + 2 * DIM, h.row, h, values);
  transpose(values, h, values_transposed);
  clear_padding(h, weights);

  for (int64_t first = 0; first < n; first += BLOCK) {
    const int64_t count = std::min(BLOCK, n - first);
    right_transposed(queries + first * DIM, count, query);
    product(padded, BLOCK, DIM, keys, DIM, query, scores, false);
    float largest[BLOCK], shift[BLOCK], sum[BLOCK] = {}, pair[2][BLOCK];
    std::copy(scores, scores + BLOCK, largest);
    for (int64_t j = 1; j < n; ++j) {
      const float* s = scores + j * BLOCK;
#pragma omp simd
      for (int64_t c = 0; c < BLOCK; ++c) largest[c] = s[c] > largest[c] ? s[c] : largest[c];
    }
    for (int64_t c = 0; c < BLOCK; ++c) shift[c] = -LOG2_SCALE * largest[c];
    for (int64_t j = 0; j < n; j += 2) {
      for (int64_t r = 0; r < 2; ++r) {
        if (j + r == n) {
          std::fill(pair[r], pair[r] + BLOCK, 0.0f);
          break;
        }
        const float* s = scores + (j + r) * BLOCK;
        for (int64_t c = 0; c < BLOCK; ++c) {
          pair[r][c] = power_of_two<T>(LOG2_SCALE * s[c] + shift[c]);
          sum[c] += pair[r][c];
        }
      }
      store_pair(weights, j, pair[0], pair[1]);
    }
    product(DIM, BLOCK, padded, values_transposed, padded, weights, out, false);
    for (int64_t c = 0; c < count; ++c) lse[(first + c) * lse_row] = std::log2(sum[c]) - shift[c];
    for (int64_t c = 0; c < BLOCK; ++c) sum[c] = 1.0f / sum[c];
    T* normalized = query;  // its room, once more
    for (int64_t d = 0; d < DIM; ++d)
      for (int64_t c = 0; c < BLOCK; ++c) store(normalized + d * BLOCK + c, out[d * BLOCK + c] * sum[c]);
    for (int64_t c = 0; c < count; ++c)
      for (int64_t d = 0; d < DIM; ++d) context[(first + c) * context_row + d] = normalized[d * BLOCK + c];
  }
}

template <typename T>
void backward_head(const Head& h, const T* qkv, const T* context, const T* grad, int64_t context_row, const float* lse,
                   int64_t lse_row, T* grad_qkv) {
  const int64_t n = h.length, padded = h.padded;
  T* queries = scratch<T>(0, padded * DIM + VECTOR);
  T* keys = scratch<T>(1, padded * DIM + VECTOR);
  T* values = scratch<T>(2, padded * DIM);
  T* keys_transposed = scratch<T>(3, padded * DIM);
  T* factor = scratch<T>(4, BLOCK * DIM);
  float* scores = scratch<float>(5, padded * BLOCK);
  T* weights = scratch<T>(6, padded * BLOCK);
  float* out = scratch<float>(7, DIM * BLOCK);
  T* grads = scratch<T>(8, padded * DIM);
  float* grad_scores = scratch<float>(9, padded * BLOCK);
  T* grad_weights = scratch<T>(10, padded * BLOCK);
  T* grad_pairs = scratch<T>(11, padded * BLOCK);
  float* grad_queries = scratch<float>(12, n * DIM + VECTOR);
  float* grad_keys = scratch<float>(13, padded * DIM + VECTOR);
  float* grad_values = scratch<float>(14, padded * DIM);
  gather_turned(qkv, h.row, h, queries);
  gather_turned(qkv + DIM, h.row, h, keys);
  gather(qkv + 2 * DIM, h.row, h, values);
  gather(grad, context_row, h, grads);
  transpose(keys, h, keys_transposed);
  clear_padding(h, weights);
  clear_padding(h, grad_weights);
  clear_padding(h, grad_pairs);

  for (int64_t first = 0; first < n; first += BLOCK) {
    const int64_t count = std::min(BLOCK, n - first);
    const T *query = queries + first * DIM, *g = grads + first * DIM;
    float log_sum[BLOCK] = {}, delta[BLOCK] = {}, pair[2][BLOCK];
    for (int64_t c = 0; c < count; ++c) {
      const T* o = context + (first + c) * context_row;
      prefetch(o + AHEAD * context_row);
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < DIM; ++d) dot += load(g + c * DIM + d) * load(o + d);
      delta[c] = dot;
      log_sum[c] = lse[(first + c) * lse_row];
    }
    right_transposed(query, count, factor);
    product(padded, BLOCK, DIM, keys, DIM, factor, scores, false);
    right_transposed(g, count, factor);
    product(padded, BLOCK, DIM, values, DIM, factor, grad_scores, false);
    for (int64_t j = 0; j < n; j += 2) {
      for (int64_t r = 0; r < 2; ++r) {
        if (j + r == n) {
          std::fill(pair[r], pair[r] + BLOCK, 0.0f);
          break;
        }
        const float *s = scores + (j + r) * BLOCK, *gs = grad_scores + (j + r) * BLOCK;
        T *w = weights + (j + r) * BLOCK, *gw = grad_weights + (j + r) * BLOCK;
        for (int64_t c = 0; c < BLOCK; ++c) {
          const float p = power_of_two<T>(LOG2_SCALE * s[c] - log_sum[c]);
          const float q = p * (gs[c] - delta[c]);
          store_fast(w + c, p);
          store_fast(gw + c, q);
          pair[r][c] = q;
        }
      }
      store_pair(grad_pairs, j, pair[0], pair[1]);
    }
    right_rows(g, count, factor);
    product(padded, DIM, BLOCK, weights, BLOCK, factor, grad_values, first > 0);
    right_rows(query, count, factor);
    product(padded, DIM, BLOCK, grad_weights, BLOCK, factor, grad_keys, first > 0);
    product(DIM, BLOCK, padded, keys_transposed, padded, grad_pairs, out, false);
    for (int64_t c = 0; c < count; ++c)
      for (int64_t d = 0; d < DIM; ++d) grad_queries[(first + c) * DIM + d] = out[d * BLOCK + c];
  }
  scatter_turned(grad_queries, h, grad_qkv);
  scatter_turned(grad_keys, h, grad_qkv + DIM);
  scatter(grad_values, h, grad_qkv + 2 * DIM);
}

template <typename T>
bool run(bool backward, const T* qkv, const float* cos, const float* sin, const int32_t* cu_seqlens, int64_t num_seqs,
         int64_t num_heads, T* context, float* lse, const T* grad, T* grad_qkv, int64_t num_threads) {
  bool done = true;
#pragma omp parallel num_threads(num_threads) reduction(&& : done)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_seqs * num_heads; ++task) {
      const int64_t start = cu_seqlens[task / num_heads], head = task % num_heads;
      const int64_t length = cu_seqlens[task / num_heads + 1] - start, row = 3 * num_heads * DIM;
      if (length == 0 || !done) continue;
      const Head h{length, (length + ROUND - 1) / ROUND * ROUND, row, cos, sin};
      const int64_t at = start * row + head * 3 * DIM, to = (start * num_heads + head) * DIM;
      float* sums = lse + start * num_heads + head;
      done = succeeds([&] {
        if (backward)
          backward_head(h, qkv + at, context + to, grad + to, num_heads * DIM, sums, num_heads, grad_qkv + at);
        else
          forward_head(h, qkv + at, context + to, num_heads * DIM, sums, num_heads);
      });
    }
    at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
  }
  return done;
}

// ---- layer norm

// With `added`, `sum` = x + added is what is normalized.
template <typename X, typename Y>
void layer_norm_rows(const X* x, const Y* added, X* sum, const float* weight, const float* bias, Y* y, float* mean,
                     float* inverse, int64_t rows, int64_t width, float eps) {
  for (int64_t i = 0; i < rows; ++i) {
    const X* from = x + i * width;
    if (added) {
      const Y* more = added + i * width;
      X* both = sum + i * width;
#pragma omp simd
      for (int64_t e = 0; e < width; ++e) store(both + e, load(from + e) + load(more + e));
      from = both;
    }
    Y* __restrict to = y + i * width;
    float total = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t e = 0; e < width; ++e) total += load(from + e);
    const float m = total / width;
#pragma omp simd reduction(+ : squares)
    for (int64_t e = 0; e < width; ++e) squares += (load(from + e) - m) * (load(from + e) - m);
    const float r = 1.0f / std::sqrt(squares / width + eps);
    for (int64_t e = 0; e < width; ++e) store(to + e, (load(from + e) - m) * r * weight[e] + bias[e]);
    mean[i] = m;
    inverse[i] = r;
  }
}

// `sums` [2, width]: the gradients of weight and bias from these rows. With `grad_added`, x is a sum that has the
// gradient `grad_sum` (which may be none) besides, and `grad_added` is the whole once more.
template <typename X, typename Y>
void layer_norm_rows_backward(const Y* grad, const X* grad_sum, const X* x, const float* weight, const float* mean,
                              const float* inverse, X* grad_x, Y* grad_added, float* sums, int64_t rows,
                              int64_t width) {
  std::fill(sums, sums + 2 * width, 0.0f);
  float* __restrict grad_weight = sums, * __restrict grad_bias = sums + width;
  for (int64_t i = 0; i < rows; ++i) {
    const Y* __restrict g = grad + i * width;
    const X* __restrict from = x + i * width;
    X* __restrict to = grad_x + i * width;
    const float m = mean[i], r = inverse[i];
    float first = 0.0f, second = 0.0f;
#pragma omp simd reduction(+ : first, second)
    for (int64_t e = 0; e < width; ++e) {
      const float gradient = load(g + e), normal = (load(from + e) - m) * r;
      first += gradient * weight[e];
      second += gradient * weight[e] * normal;
      grad_weight[e] += gradient * normal;
      grad_bias[e] += gradient;
    }
    first /= width;
    second /= width;
    const auto gradient = [&](int64_t e) {
      return r * (load(g + e) * weight[e] - first - (load(from + e) - m) * r * second);
    };
    if (!grad_added) {
      for (int64_t e = 0; e < width; ++e) store(to + e, gradient(e));
      continue;
    }
    Y* __restrict to_added = grad_added + i * width;
    const X* __restrict beside = grad_sum ? grad_sum + i * width : nullptr;
    for (int64_t e = 0; e < width; ++e) {
      const float whole = gradient(e) + (beside ? load(beside + e) : 0.0f);
      store(to + e, whole);
      store(to_added + e, whole);
    }
  }
}

template <typename X, typename Y>
void layer_norm(bool backward, const X* x, const Y* added, X* sum, const float* weight, const float* bias, Y* y,
                float* mean, float* inverse, const Y* grad, const X* grad_sum, X* grad_x, Y* grad_added, float* sums,
                int64_t rows, int64_t width, float eps, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t first = 0; first < rows; first += STRIP) {
    const int64_t count = std::min(STRIP, rows - first), at = first * width;
    const auto part = [at](auto* rows) { return rows ? rows + at : nullptr; };
    if (backward)
      layer_norm_rows_backward(grad + at, part(grad_sum), x + at, weight, mean + first, inverse + first, grad_x + at,
                               part(grad_added), sums + first / STRIP * 2 * width, count, width);
    else
      layer_norm_rows(x + at, part(added), part(sum), weight, bias, y + at, mean + first, inverse + first, count,
                      width, eps);
  }
}

// ---- between matrix products, in BF16

// GELU is x * cdf(x), its derivative cdf(x) + x * density(x) with the normal distribution's; Abramowitz and Stegun
// 26.2.17, which is off by less than 1e-7, with a power that is off by 3e-6.
inline void normal(float x, float& cdf, float& density) {
  density = 0.39894228f * power_of_two<BFloat16>(-0.5f * LOG2_E * x * x);
  const float t = 1.0f / (1.0f + 0.2316419f * std::abs(x));
  float p = 1.330274429f;
  p = p * t - 1.821255978f;
  p = p * t + 1.781477937f;
  p = p * t - 0.356563782f;
  p = p * t + 0.319381530f;
  const float tail = density * p * t;
  cdf = x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace

// Called from Python by name: what differs between types is the suffix. The result is whether it worked.
#define ATTENTION(NAME, T)                                                                                           \
  bool attention_##NAME(bool backward, const T* qkv, const float* cos, const float* sin, const int32_t* cu_seqlens,  \
                        int64_t num_seqs, int64_t num_heads, T* context, float* lse, const T* grad, T* grad_qkv,     \
                        int64_t num_threads) {                                                                       \
    return run(backward, qkv, cos, sin, cu_seqlens, num_seqs, num_heads, context, lse, grad, grad_qkv, num_threads); \
  }
#define LAYER_NORM(NAME, X, Y)                                                                                      \
  bool layer_norm_##NAME(bool backward, const X* x, const Y* added, X* sum, const float* weight, const float* bias, \
                         Y* y, float* mean, float* inverse, const Y* grad, const X* grad_sum, X* grad_x,            \
                         Y* grad_added, float* sums, int64_t rows, int64_t width, float eps, int64_t num_threads) { \
    layer_norm(backward, x, added, sum, weight, bias, y, mean, inverse, grad, grad_sum, grad_x, grad_added, sums,   \
               rows, width, eps, num_threads);                                                                      \
    return true;                                                                                                    \
  }

extern "C" {
int64_t padded_half() { return WHOLE; }  // columns of the tables of angles
bool has_bfloat16() { return at::native::cpublas::could_pack(at::kBFloat16); }
ATTENTION(float32, float)
ATTENTION(bfloat16, BFloat16)
LAYER_NORM(float32_float32, float, float)
LAYER_NORM(float32_bfloat16, float, BFloat16)
LAYER_NORM(bfloat16_bfloat16, BFloat16, BFloat16)

// [rows, columns] to [columns, stride]; columns are a multiple of VECTOR. Zeros fill up the rest. A product over
// rows, as the gradient of a weight is, runs twice as fast if its left-hand factor lies there transposed.
bool transpose_bfloat16(const BFloat16* x, BFloat16* transposed, int64_t rows, int64_t columns, int64_t stride,
                        int64_t num_threads) {
  bool done = true;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) reduction(&& : done)
  for (int64_t first = 0; first < rows; first += STRIP) {
    uint32_t* pairs = nullptr;  // two rows as one: half as many numbers to move singly
    done = done && succeeds([&] { pairs = scratch<uint32_t>(0, STRIP / 2 * columns); });
    if (!done) continue;
    const int64_t count = std::min(STRIP, rows - first);
    if (count < STRIP) std::fill(pairs, pairs + STRIP / 2 * columns, 0);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t* __restrict pair = pairs + i / 2 * columns;
      const BFloat16* __restrict from = x + (first + i) * columns;
      if (i % 2 == 0)
        for (int64_t c = 0; c < columns; ++c) pair[c] = bits(load(from + c)) >> 16;
      else
        for (int64_t c = 0; c < columns; ++c) pair[c] |= bits(load(from + c));
    }
    for (int64_t column = 0; column < columns; column += VECTOR)
      for (int64_t p = 0; p < STRIP / 2; p += VECTOR)
        for (int64_t c = column; c < column + VECTOR; ++c) {
          auto* __restrict to = reinterpret_cast<uint32_t*>(transposed + c * stride + first) + p;
          for (int64_t q = 0; q < VECTOR; ++q) to[q] = pairs[(p + q) * columns + c];
        }
    const int64_t end = first + STRIP;
    for (int64_t c = 0; end >= rows && c < columns; ++c)
      std::memset(static_cast<void*>(transposed + c * stride + end), 0, (stride - end) * sizeof(BFloat16));
  }
  return done;
}

// The sums of strips [rows / STRIP, columns].
bool column_sums_bfloat16(const BFloat16* x, float* sums, int64_t rows, int64_t columns, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t first = 0; first < rows; first += STRIP) {
    float* __restrict sum = sums + first / STRIP * columns;
    std::fill(sum, sum + columns, 0.0f);
    for (int64_t i = first; i < std::min(first + STRIP, rows); ++i) {
      const BFloat16* __restrict from = x + i * columns;
      for (int64_t c = 0; c < columns; ++c) sum[c] += load(from + c);
    }
  }
  return true;
}

bool gelu_bfloat16(const BFloat16* x, BFloat16* y, int64_t rows, int64_t columns, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < rows; ++i) {
    const BFloat16* __restrict from = x + i * columns;
    BFloat16* __restrict to = y + i * columns;
    for (int64_t c = 0; c < columns; ++c) {
      float cdf, density;
      normal(load(from + c), cdf, density);
      store(to + c, load(from + c) * cdf);
    }
  }
  return true;
}

// The gradient of `y` = GELU(x) becomes that of x, in place; also y, and the gradient's sums [rows / STRIP, columns].
bool gelu_backward_bfloat16(BFloat16* grad, const BFloat16* x, BFloat16* y, float* sums, int64_t rows, int64_t columns,
                            int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t first = 0; first < rows; first += STRIP) {
    float* __restrict sum = sums + first / STRIP * columns;
    std::fill(sum, sum + columns, 0.0f);
    for (int64_t i = first; i < std::min(first + STRIP, rows); ++i) {
      const BFloat16* __restrict from = x + i * columns;
      BFloat16* __restrict to = y + i * columns;
      BFloat16* __restrict g = grad + i * columns;
      for (int64_t c = 0; c < columns; ++c) {
        const float value = load(from + c);
        float cdf, density;
        normal(value, cdf, density);
        const float gradient = load(g + c) * (cdf + value * density);
        store(to + c, value * cdf);
        store(g + c, gradient);
        sum[c] += gradient;
      }
    }
  }
  return true;
}
}
