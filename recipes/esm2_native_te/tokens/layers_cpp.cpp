// SPDX-License-Identifier: Apache-2.0
// Kernels of `layers_cpp.py`: attention of packed sequences with rotary positions, and layer norm, in FP32 and BF16;
// what lies between the feed-forward part's matrix products in BF16. Forward and backward. Sums are FP32. Results
// depend neither on the number of threads nor, for attention, on what else is in the batch. What is in BF16 needs
// AVX-512 BF16, but for layer norm; attention's products take AMX where that is, and may be used.

#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#ifdef __AVX512BF16__
#define HAS_BFLOAT16
#ifdef __AMX_BF16__
#define HAS_TILES
#endif
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;

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

// Vectors as gcc and clang have them, with operators. LANES is what one operation takes.
#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
constexpr int64_t VECTOR = 16;  // words of 32 bits in AVX-512's vectors
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Words bits(Floats x) { return reinterpret_cast<Words>(x); }
inline Floats from_bits(Words u) { return reinterpret_cast<Floats>(u); }
inline Floats floats(const float* x) {
  Floats y;
  std::memcpy(&y, x, sizeof y);
  return y;
}
template <typename V>
inline void put(void* to, V x) {
  std::memcpy(to, &x, sizeof x);
}
// The larger of each; if one is NaN, b.
inline Floats larger(Floats a, Floats b) {
#ifdef __AVX512F__
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x up to 127; the NaN that operations make stays one. By a polynomial of degree 6, 4 or 3 the
// relative error is 2e-7, 3e-6 or 8e-5.
template <int DEGREE>
inline Floats power_of_two(Floats x) {
  const Floats least = Floats{} - 64.0f;  // nothing beside 1, and its products are no denormal numbers, which are slow
  x = larger(least, x);
  const Floats shifted = x + 12582912.0f;  // 1.5 x 2^23: rounds to a whole number, which are then the lower bits
  const Floats f = x - (shifted - 12582912.0f);
  Floats p;  // minimax for |f| <= 1/2
  if constexpr (DEGREE == 6) {
    p = 1.53458120e-4f * f + 1.33999312e-3f;
    p = p * f + 9.61848896e-3f;
    p = p * f + 5.55032878e-2f;
    p = p * f + 2.40226469e-1f;
    p = p * f + 6.93147206e-1f;
    p = p * f + 1.0f;
  } else if constexpr (DEGREE == 4) {
    p = 9.57010e-3f * f + 5.591786e-2f;
    p = p * f + 2.4024745e-1f;
    p = p * f + 6.9312181e-1f;
    p = p * f + 9.9999926e-1f;
  } else {
    static_assert(DEGREE == 3);
    p = 5.51716683e-2f * f + 2.42611121e-1f;
    p = p * f + 6.93261002e-1f;
    p = p * f + 9.99928066e-1f;
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

#ifdef HAS_BFLOAT16
// ---- vectors of BF16

inline Words words(const BFloat16* x, __mmask16 mask = 0xffff) {  // zeros where it is not set
  return (Words)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
}
inline Floats floats(const BFloat16* x) { return from_bits(words(x) << 16); }
inline void put_bf16(BFloat16* to, Floats x) { put(to, _mm512_cvtneps_pbh((__m512)x)); }
inline __m512i two_rows(Floats a, Floats b) {  // a[0], a[1], ..., b[0], b[1], ...
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
inline __m512i in_turn(Floats a, Floats b) {  // a[0], b[0], a[1], b[1], ...
  alignas(64) static constexpr uint16_t from[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(from), two_rows(a, b));
}

// One step of a transposition: for i and j without BIT, the words (i + BIT, j) and (i, j + BIT) trade places. Indices
// from VECTOR on are those of the second of two operands.
template <int BIT>
inline void exchange(__m512i (&rows)[VECTOR]) {
  const __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 set = _mm512_test_epi32_mask(column, _mm512_set1_epi32(BIT));
  const __m512i other = _mm512_xor_epi32(column, _mm512_set1_epi32(BIT));
  const __m512i upper = _mm512_mask_add_epi32(column, set, other, _mm512_set1_epi32(VECTOR));
  const __m512i lower = _mm512_mask_add_epi32(other, set, column, _mm512_set1_epi32(VECTOR));
  for (int i = 0; i < VECTOR; ++i) {
    if (i & BIT) continue;
    const __m512i a = rows[i], b = rows[i + BIT];
    rows[i] = _mm512_permutex2var_epi32(a, upper, b);
    rows[i + BIT] = _mm512_permutex2var_epi32(a, lower, b);
  }
}
inline void transpose_vectors(__m512i (&rows)[VECTOR]) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  exchange<8>(rows);
}

// ROWS by COLUMNS words, at most VECTOR each, transposed, and zeros behind them. Strides are words.
template <int64_t ROWS, int64_t COLUMNS>
inline void transpose_square(const uint32_t* from, int64_t stride, uint32_t* to, int64_t to_stride) {
  __m512i rows[VECTOR] = {};
  for (int i = 0; i < ROWS; ++i) rows[i] = _mm512_maskz_loadu_epi32((1 << COLUMNS) - 1, from + i * stride);
  transpose_vectors(rows);
  for (int i = 0; i < COLUMNS; ++i) _mm512_storeu_si512(to + i * to_stride, rows[i]);
}
// The same with any numbers of both, and matrices of whatever takes that room.
template <int64_t ROWS, int64_t COLUMNS>
inline void transpose_words(const void* from, int64_t stride, void* to, int64_t to_stride) {
  const auto* x = static_cast<const uint32_t*>(from);
  auto* y = static_cast<uint32_t*>(to);
  if constexpr (ROWS > VECTOR) {
    transpose_words<VECTOR, COLUMNS>(x, stride, y, to_stride);
    transpose_words<ROWS - VECTOR, COLUMNS>(x + VECTOR * stride, stride, y + VECTOR, to_stride);
  } else if constexpr (COLUMNS > VECTOR) {
    transpose_square<ROWS, VECTOR>(x, stride, y, to_stride);
    transpose_words<ROWS, COLUMNS - VECTOR>(x + VECTOR, stride, y + VECTOR * to_stride, to_stride);
  } else {
    transpose_square<ROWS, COLUMNS>(x, stride, y, to_stride);
  }
}
#endif

// ---- dropout: the draws of dropout.py, by words that are unsigned here

constexpr uint32_t FIRST = 0x7feb352d, SECOND = 0x846ca68b, GOLDEN = 0x9e3779b9;
inline uint32_t fold(uint32_t word, uint32_t number) {
  word += number * GOLDEN;
  word = (word ^ word >> 16) * FIRST;
  word = (word ^ word >> 15) * SECOND;
  return word ^ word >> 16;
}
// Signed numbers, or a vector of them, from a row's words and a column's; those below a limit are dropped.
template <typename W>
inline auto draw(W words) {
  words *= FIRST;
  words = (words ^ words >> 15) * SECOND;
  if constexpr (std::is_same_v<W, uint32_t>)
    return static_cast<int32_t>(words);
  else
    return reinterpret_cast<Integers>(words);
}
inline void column_words(int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = fold(0, static_cast<uint32_t>(i));
}
inline float kept_share(int64_t limit) { return static_cast<float>((2147483648.0 - limit) / 4294967296.0); }
constexpr int HEADS = 2;  // the place of the first head

// ---- attention
//
// A task is one head of one sequence; it goes through blocks of BLOCK queries, which may be those of some tokens only,
// against all keys. Scores are kept transposed, keys x queries: what belongs to a query (maximum, sum) is then a vector
// over columns, and no operation runs across one. FP32 takes all keys at once, BF16 a few, whose scores stay in the
// first cache.

constexpr int64_t rounded(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

constexpr int64_t DIM = HEAD_DIM, HALF = DIM / 2;  // compiled anew for each: short loops want constant bounds
constexpr int64_t STRIP = 64;  // rows of a task; sums over rows are added up task by task, in order
// Loops over half a head go on to a whole vector, if what they read and write too much is no further than the next
// row. Tables of angles have rows of so many.
constexpr int64_t FILLED = HALF % 8 ? rounded(HALF, VECTOR) : HALF;
constexpr int64_t WHOLE = HALF + FILLED <= 2 * DIM ? FILLED : HALF;
const float SCALE = 1.0f / std::sqrt(static_cast<float>(DIM)), LOG2_SCALE = SCALE * LOG2_E;
constexpr int64_t ROUND = 32;  // keys are padded to a multiple of it

// ---- matrix products: C [M, N] = A [M, K] B [K, N] in FP32, added to what sums `begin` with: nothing, C as it is, or
// in BF16 a row [N], the same for all. In BF16 they are ours, of AMX or of AVX-512, and B has pairs of rows side by side.
// In FP32 they are oneDNN's, through PyTorch, and whoever asks for them adds that row.

// What K and M are filled up to: tiles take 32 and 16 of them at once, products by AVX-512 pairs and 8.
#ifdef HAS_TILES
constexpr int64_t K_ROUND = 32, M_ROUND = 16;
#else
constexpr int64_t K_ROUND = 2, M_ROUND = 8;
#endif
template <typename T>
constexpr bool PAIRED = std::is_same_v<T, BFloat16>;
// A head's channels in scratch, filled up: with zeros, as columns of A or rows of B,
template <typename T>
constexpr int64_t WIDTH = PAIRED<T> ? rounded(DIM, K_ROUND) : DIM;
// as rows of A or C,
template <typename T>
constexpr int64_t HIGH = PAIRED<T> ? rounded(DIM, M_ROUND) : DIM;
// and as columns of B or C.
template <typename T>
constexpr int64_t OUT = PAIRED<T> ? rounded(DIM, VECTOR) : DIM;

// Queries at once; in BF16, as many as leave all that is at hand in the first cache.
template <typename T>
constexpr int64_t BLOCK = PAIRED<T> ? 32 : 64;
// Keys at once.
template <typename T>
constexpr int64_t chunk(int64_t padded) {
  return PAIRED<T> ? ROUND : padded;
}

inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, float* c,
                    const float* begin) {
  at::native::cpublas::brgemm(m, n, k, lda, n, n, begin == c, a, b, c, false);
}
#ifdef HAS_TILES
const bool TILES_ALLOWED = at::native::cpublas::could_pack(at::kBFloat16) && at::cpu::init_amx();

// Tiles 0 to 3 are 32 x 32 of C, 4 and 5 their rows of A, 6 and 7 their columns of B. M and N are multiples of 16, K
// of 32.
inline __attribute__((always_inline)) void product_tiles(int64_t m, int64_t n, int64_t k, const BFloat16* a,
                                                         int64_t lda, const BFloat16* b, float* c,
                                                         const float* begin) {
  const int64_t row = begin == c ? n : 0;  // from one of `begin` to the next
  __asm__ volatile("" ::: "memory");  // the compiler does not know what tiles read
  for (int64_t i = 0; i < m; i += 32) {
    for (int64_t j = 0; j < n; j += 32) {
      const bool below = i + 16 < m, beside = j + 16 < n;
      float *upper = c + i * n + j, *lower = upper + 16 * n;
      if (begin) {
        const float *from = begin + i * row + j, *from_lower = from + 16 * row;
        _tile_loadd(0, from, 4 * row);
        if (beside) _tile_loadd(1, from + 16, 4 * row);
        if (below) _tile_loadd(2, from_lower, 4 * row);
        if (below && beside) _tile_loadd(3, from_lower + 16, 4 * row);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t l = 0; l < k; l += 32) {
        const BFloat16 *rows = a + i * lda + l, *columns = b + l * n + 2 * j;
        _tile_loadd(4, rows, 2 * lda);
        _tile_loadd(6, columns, 4 * n);
        if (below) _tile_loadd(5, rows + 16 * lda, 2 * lda);
        if (beside) _tile_loadd(7, columns + 32, 4 * n);
        _tile_dpbf16ps(0, 4, 6);
        if (beside) _tile_dpbf16ps(1, 4, 7);
        if (below) _tile_dpbf16ps(2, 5, 6);
        if (below && beside) _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, upper, 4 * n);
      if (beside) _tile_stored(1, upper + 16, 4 * n);
      if (below) _tile_stored(2, lower, 4 * n);
      if (below && beside) _tile_stored(3, lower + 16, 4 * n);
    }
  }
  __asm__ volatile("" ::: "memory");
}
#endif
#ifdef HAS_BFLOAT16
// ROWS x COLUMNS vectors of C, held in registers: each pair of A's numbers meets a vector of B's pairs.
template <int ROWS, int COLUMNS>
inline __attribute__((always_inline)) void product_part(int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                                                        const BFloat16* b, float* c, const float* begin,
                                                        int64_t row) {
  __m512 sums[ROWS][COLUMNS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j)
      sums[i][j] = begin ? _mm512_loadu_ps(begin + i * row + j * VECTOR) : _mm512_setzero_ps();
  for (int64_t l = 0; l < k; l += 2) {
    __m512i columns[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) columns[j] = _mm512_loadu_si512(b + l * n + 2 * j * VECTOR);
    for (int i = 0; i < ROWS; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * lda + l, sizeof pair);
      const auto pairs = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < COLUMNS; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)columns[j], pairs);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) _mm512_storeu_ps(c + i * n + j * VECTOR, sums[i][j]);
}
// M is a multiple of 8, N of 16, K of 2.
inline void product_vectors(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b,
                            float* c, const float* begin) {
  const int64_t row = begin == c ? n : 0;  // from one of `begin` to the next
  for (int64_t j = 0; j < n; j += 2 * VECTOR)
    for (int64_t i = 0; i < m; i += 8) {
      const float* from = begin ? begin + i * row + j : nullptr;
      if (j + VECTOR < n)
        product_part<8, 2>(n, k, a + i * lda, lda, b + 2 * j, c + i * n + j, from, row);
      else
        product_part<8, 1>(n, k, a + i * lda, lda, b + 2 * j, c + i * n + j, from, row);
    }
}

inline __attribute__((always_inline)) void product(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                                                   const BFloat16* b, float* c, const float* begin) {
#ifdef HAS_TILES
  static_assert(HIGH<BFloat16> % 16 == 0 && WIDTH<BFloat16> % 32 == 0);
  if (TILES_ALLOWED) return product_tiles(m, n, k, a, lda, b, c, begin);
#endif
  product_vectors(m, n, k, a, lda, b, c, begin);
}
#endif

// What a thread does before its products in T, and after them.
template <typename T>
void begin_products() {
#ifdef HAS_TILES
  if constexpr (PAIRED<T>) {
    if (!TILES_ALLOWED) return;
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Configuration configuration;
    _tile_loadconfig(&configuration);
  }
#endif
}
template <typename T>
void end_products() {
#ifdef HAS_TILES
  if constexpr (PAIRED<T>) {
    if (TILES_ALLOWED) _tile_release();
  }
#endif
  if constexpr (!PAIRED<T>) at::native::cpublas::brgemm_release(false);
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

// Scratch of one thread, kept from call to call: pieces one behind the other, which share the first cache best. A
// thread has one at a time, because all have the same memory.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    static thread_local std::unique_ptr<char[]> kept;
    static thread_local int64_t size = 0;
    bytes += 64;
    if (size < bytes) {
      size = 0;
      kept.reset();
      kept.reset(new char[bytes]);
      size = bytes;
    }
    next_ = kept.get() + (64 - reinterpret_cast<uintptr_t>(kept.get()) % 64);
    end_ = kept.get() + size;
  }

  template <typename U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(next_);
    next_ += rounded(count * static_cast<int64_t>(sizeof(U)), 64);
    assert(next_ <= end_);
    return piece;
  }

 private:
  char *next_, *end_;
};

// ---- rows of a head

struct Head {
  int64_t length, padded, row;  // tokens, tokens rounded up, elements from one token to the next in qkv
  const float *cos, *sin;       // [length, WHOLE]
  const int64_t* selected;        // the tokens that ask, in rising order; none: all of them
  int64_t num_queries, start;   // how many those are; the number of the sequence's first token, as `selected` counts
  const uint32_t* words;        // of each token, for dropout; or none
  uint32_t number;              // of the head
  int64_t limit;                // draws below it are dropped

  // Whether a token is the next that asks, after `query` others.
  bool asks(int64_t token, int64_t query) const {
    return !selected || (query < num_queries && selected[query] - start == token);
  }
};

// What a head drops: weights of columns, which are queries, and rows, which are keys (dropout.py has it the other way).
template <bool DROPS, int64_t COLUMNS>
class Dropped {
 public:
  Dropped(const Head& h, uint32_t* keys) : head_(h), keys_(keys) {
    if (DROPS) column_words(h.length, keys);
  }
  void begin(int64_t first, int64_t count) {  // with so many queries
    for (int64_t c = 0; DROPS && c < count; ++c) {
      const int64_t token = head_.selected ? head_.selected[first + c] - head_.start : first + c;
      queries_[c] = fold(head_.words[token], HEADS + head_.number);
    }
  }
  // What remains of x, which belongs to LANES queries from c on and key j; `other` where nothing does.
  Floats of(Floats x, int64_t c, int64_t j, Floats other) const {
    if constexpr (!DROPS) return x;
    Words queries;
    std::memcpy(&queries, queries_ + c, sizeof queries);
    return draw(queries ^ keys_[j]) < static_cast<int32_t>(head_.limit) ? other : x;
  }

 private:
  const Head& head_;
  uint32_t* keys_;
  alignas(64) uint32_t queries_[COLUMNS] = {};
};

constexpr int64_t AHEAD = 16;  // rows; they are too far apart for the processor to see them coming
template <int64_t WRITE, typename T>
inline void prefetch(T* row, int64_t count) {
  for (int64_t d = 0; d < count; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d, WRITE);
  __builtin_prefetch(row + count - 1, WRITE);
}

// Zeros behind the channels of a row in scratch, and behind a head's rows.
template <typename T>
inline void clear_behind(T* row) {
  std::memset(static_cast<void*>(row + DIM), 0, (WIDTH<T> - DIM) * sizeof(T));
}
template <typename T>
void clear_rows(int64_t count, T* rows) {
  const int64_t more = rounded(count, ROUND) - count;
  std::memset(static_cast<void*>(rows + count * WIDTH<T>), 0, more * WIDTH<T> * sizeof(T));
}

// The widest vector that divides WHOLE, or one number.
typedef float Eight __attribute__((vector_size(32)));
using Turned = std::conditional_t<WHOLE % LANES == 0, Floats, std::conditional_t<WHOLE % 8 == 0, Eight, float>>;
constexpr int64_t TURNED = sizeof(Turned) / 4;
template <typename V>
inline void read(const float* from, V& x) {
  std::memcpy(&x, from, sizeof x);
}
template <typename V>
inline void write(float* to, V x) {
  put(to, x);
}
#ifdef HAS_BFLOAT16
inline void read(const BFloat16* from, float& x) { x = load(from); }
inline void read(const BFloat16* from, Eight& x) {
  __m128i numbers;
  std::memcpy(&numbers, from, sizeof numbers);
  x = (Eight)_mm256_slli_epi32(_mm256_cvtepu16_epi32(numbers), 16);
}
inline void read(const BFloat16* from, Floats& x) { x = floats(from); }
inline void write(BFloat16* to, float x) { store(to, x); }
inline void write(BFloat16* to, Eight x) { put(to, _mm256_cvtneps_pbh((__m256)x)); }
inline void write(BFloat16* to, Floats x) { put_bf16(to, x); }
#endif

// A row turned by the rotary angles, or BACK, and scaled. WHOLE numbers of each half are read and written.
template <bool BACK, typename From, typename To>
inline __attribute__((always_inline)) void turn(const From* from, const float* cos, const float* sin, float scale,
                                                To* to) {
  Turned first[WHOLE / TURNED], second[WHOLE / TURNED];
  for (int64_t d = 0; d < WHOLE; d += TURNED) {
    Turned x, z, c, s;
    read(from + d, x);
    read(from + HALF + d, z);
    read(cos + d, c);
    read(sin + d, s);
    first[d / TURNED] = scale * (BACK ? x * c + z * s : x * c - z * s);
    second[d / TURNED] = scale * (BACK ? z * c - x * s : z * c + x * s);
  }
  for (int64_t d = 0; d < WHOLE; d += TURNED) write(to + d, first[d / TURNED]);
  for (int64_t d = 0; d < WHOLE; d += TURNED) write(to + HALF + d, second[d / TURNED]);
}

// A head's rows, which are far apart, side by side [padded, WIDTH]; queries and keys turned, the former also scaled.
template <typename T>
void gather(const Head& h, const T* qkv, float scale, T* queries, T* keys, T* values) {
  int64_t query = 0;
  for (int64_t i = 0; i < h.length; ++i) {
    const T* from = qkv + i * h.row;
    prefetch<0>(from + AHEAD * h.row, 3 * DIM);
    const float *cos = h.cos + i * WHOLE, *sin = h.sin + i * WHOLE;
    const int64_t at = i * WIDTH<T>;
    if (h.asks(i, query)) {
      turn<false>(from, cos, sin, scale, queries + query * WIDTH<T>);
      clear_behind(queries + query * WIDTH<T>);
      ++query;
    }
    turn<false>(from + DIM, cos, sin, 1.0f, keys + at);
    std::memcpy(values + at, from + 2 * DIM, DIM * sizeof(T));
    for (T* rows : {keys, values}) clear_behind(rows + at);
  }
  clear_rows(h.num_queries, queries);
  for (T* rows : {keys, values}) clear_rows(h.length, rows);
}

// The gradients of a head's context, side by side as well, and their products with it [num_queries].
template <typename T>
void gather_grads(const Head& h, const T* grad, const T* context, int64_t stride, T* grads, float* products) {
  for (int64_t i = 0; i < h.num_queries; ++i) {
    const T *g = grad + i * stride, *c = context + i * stride;
    prefetch<0>(g + AHEAD * stride, DIM);
    prefetch<0>(c + AHEAD * stride, DIM);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < DIM; ++d) sum += load(g + d) * load(c + d);
    products[i] = sum;
    std::memcpy(grads + i * WIDTH<T>, g, DIM * sizeof(T));
    clear_behind(grads + i * WIDTH<T>);
  }
  clear_rows(h.num_queries, grads);
}

// The gradients of a head's rows [length, OUT] to where those come from, times `scale`; queries' and keys' turned back.
// What they write too much is overwritten by what comes next to them. A token that does not ask gets zeros.
template <typename T>
void scatter(const Head& h, const float* queries, const float* keys, const float* values, float scale, T* grad_qkv) {
  int64_t query = 0;
  for (int64_t i = 0; i < h.length; ++i) {
    T* __restrict to = grad_qkv + i * h.row;
    prefetch<1>(to + AHEAD * h.row, 3 * DIM);
    const float *cos = h.cos + i * WHOLE, *sin = h.sin + i * WHOLE, *__restrict v = values + i * OUT<T>;
    if (h.asks(i, query))
      turn<true>(queries + query++ * OUT<T>, cos, sin, SCALE * scale, to);
    else
      std::memset(static_cast<void*>(to), 0, DIM * sizeof(T));
    turn<true>(keys + i * OUT<T>, cos, sin, scale / LOG2_E, to + DIM);  // queries were scaled by LOG2_SCALE
    for (int64_t d = 0; d < DIM; ++d) store(to + 2 * DIM + d, v[d] * scale);
  }
}

// In what follows BF16 has the zeros behind a head's rows to go on with.

// A block of rows, transposed, as a right-hand factor [WIDTH, BLOCK].
void right_transposed(const float* rows, int64_t count, float* to) {
  if (count < BLOCK<float>) std::fill(to, to + BLOCK<float> * DIM, 0.0f);
  for (int64_t c = 0; c < count; ++c)
    for (int64_t d = 0; d < DIM; ++d) to[d * BLOCK<float> + c] = rows[c * DIM + d];
}
// A block of rows as a right-hand factor [BLOCK, OUT].
void right_rows(const float* rows, int64_t count, float* to) {
  std::memcpy(to, rows, count * DIM * sizeof(float));
  std::memset(to + count * DIM, 0, (BLOCK<float> - count) * DIM * sizeof(float));
}
// Rows [padded, WIDTH] as a left-hand factor, transposed [HIGH, padded].
void left_transposed(const float* rows, const Head& h, float* to) {
  for (int64_t i = 0; i < h.padded; ++i)
    for (int64_t d = 0; d < DIM; ++d) to[d * h.padded + i] = rows[i * DIM + d];
}
// A result [HIGH, BLOCK], each column times its factor, transposed to `count` rows that are further apart.
void store_columns(const float* from, const float* factors, int64_t count, float* to, int64_t stride) {
  for (int64_t c = 0; c < count; ++c)
    for (int64_t d = 0; d < DIM; ++d) to[c * stride + d] = from[d * BLOCK<float> + c] * factors[c];
}

// What follows takes a vector each from the same columns of two rows of a matrix [keys, BLOCK]: a from row j, which is
// even, and b from the next. `store_rows` puts them into two rows, at `to` and below it; `store_pairs` into two rows
// of a right-hand factor, of which the first begins at `rows`.
inline void store_rows(float* to, Floats a, Floats b) {
  put(to, a);
  put(to + BLOCK<float>, b);
}
inline void store_pairs(float* rows, int64_t column, Floats a, Floats b) { store_rows(rows + column, a, b); }
#ifdef HAS_BFLOAT16
void right_transposed(const BFloat16* rows, int64_t, BFloat16* to) {
  constexpr int64_t block = BLOCK<BFloat16>, width = WIDTH<BFloat16>;
  transpose_words<block, width / 2>(rows, width / 2, to, block);  // of pairs of channels
}
void right_rows(const BFloat16* rows, int64_t, BFloat16* to) {
  constexpr int64_t width = WIDTH<BFloat16>, out = OUT<BFloat16>;
  for (int64_t i = 0; i < BLOCK<BFloat16>; i += 2)
    for (int64_t d = 0; d < out; d += VECTOR) {
      const __mmask16 mask = (1 << std::min(VECTOR, DIM - d)) - 1;
      const BFloat16* from = rows + i * width + d;
      put(to + i * out + 2 * d, words(from, mask) | words(from + width, mask) << 16);
    }
}
void left_transposed(const BFloat16* rows, const Head& h, BFloat16* to) {
  constexpr int64_t block = BLOCK<BFloat16>, out = OUT<BFloat16>;
  static_assert(ROUND % block == 0);
  alignas(64) BFloat16 pairs[block * out];
  for (int64_t i = 0; i < h.padded; i += block) {
    right_rows(rows + i * WIDTH<BFloat16>, block, pairs);
    transpose_words<block / 2, HIGH<BFloat16>>(pairs, out, to + i, h.padded / 2);
  }
}
void store_columns(const float* from, const float* factors, int64_t count, BFloat16* to, int64_t stride) {
  constexpr int64_t block = BLOCK<BFloat16>;
  for (int64_t c = 0; c < count; c += VECTOR)
    for (int64_t d = 0; d < DIM; d += 2 * VECTOR) {
      const Floats factor = floats(factors + c);
      const auto row = [&](int64_t e) { return floats(from + e * block + c) * factor; };
      __m512i rows[VECTOR] = {};  // of pairs of channels
      const int64_t pairs = std::min(VECTOR, (DIM - d) / 2);
      for (int64_t p = 0; p < pairs; ++p) rows[p] = in_turn(row(d + 2 * p), row(d + 2 * p + 1));
      transpose_vectors(rows);
      const __mmask16 mask = (1 << pairs) - 1;
      for (int64_t i = 0; i < VECTOR; ++i)
        if (c + i < count) _mm512_mask_storeu_epi32(to + (c + i) * stride + d, mask, rows[i]);
    }
}
inline void store_rows(BFloat16* to, Floats a, Floats b) {
  const __m512i rows = two_rows(a, b);
  put(to, _mm512_castsi512_si256(rows));
  put(to + BLOCK<BFloat16>, _mm512_extracti64x4_epi64(rows, 1));
}
inline void store_pairs(BFloat16* rows, int64_t column, Floats a, Floats b) { put(rows + 2 * column, in_turn(a, b)); }
#endif

// A result [HIGH, BLOCK], transposed to rows [BLOCK, OUT].
template <typename T>
void transpose_result(const float* from, int64_t count, float* to) {
  constexpr int64_t block = BLOCK<T>, out = OUT<T>;
#ifdef HAS_BFLOAT16
  if constexpr (PAIRED<T>) return transpose_words<HIGH<T>, block>(from, block, to, out);
#endif
  for (int64_t c = 0; c < count; ++c)
    for (int64_t d = 0; d < DIM; ++d) to[c * out + d] = from[d * block + c];
}

// Products of BF16 have begun with what else is to be added.
template <typename T>
inline Floats plus(Floats x, Floats added) {
  return PAIRED<T> ? x : x + added;
}

// 2^x, as exact as T can make use of.
template <typename T>
inline Floats weight_of(Floats x) {
  return power_of_two<PAIRED<T> ? 3 : 6>(x);
}

inline bool any_above(Floats x, float limit) {
  bool above = false;
  for (int64_t i = 0; i < LANES; ++i) above |= x[i] > limit;
  return above;
}

// Bound of what a head takes below, forward or backward, each number as large as FP32; 4,096 for rounding and VECTOR.
template <typename T>
constexpr int64_t head_bytes(int64_t padded) {
  constexpr int64_t B = BLOCK<T>, W = std::max(WIDTH<T>, OUT<T>);
  return 4 * ((8 * padded + 5 * B) * W + 5 * padded * B + 2 * padded) + 4096;
}

// Scores are logarithms to base 2 here and in the backward pass: queries are scaled by LOG2_SCALE.
template <typename T, bool DROPS>
void forward_head(const Head& h, const T* qkv, T* context, int64_t context_row, float* lse, int64_t lse_row) {
  constexpr int64_t B = BLOCK<T>, W = WIDTH<T>, H = HIGH<T>;
  constexpr float FAR = 16.0f;  // of the 127 that exponents leave room for
  if (h.num_queries == 0) return;
  const int64_t n = h.length, padded = h.padded, step = chunk<T>(padded);
  Scratch scratch(head_bytes<T>(padded));
  auto* query = scratch.take<T>(B * W);
  auto* weights = scratch.take<T>(step * B);
  auto* out = scratch.take<float>(H * B);
  auto* scores = scratch.take<float>(step * B);
  auto* values_transposed = scratch.take<T>(padded * H);
  auto* keys = scratch.take<T>(padded * W + VECTOR);
  auto* values = scratch.take<T>(padded * W);
  auto* queries = scratch.take<T>(padded * W + VECTOR);
  Dropped<DROPS, B> dropped(h, scratch.take<uint32_t>(padded));
  gather(h, qkv, LOG2_SCALE, queries, keys, values);
  left_transposed(values, h, values_transposed);

  for (int64_t first = 0; first < h.num_queries; first += B) {
    const int64_t count = std::min(B, h.num_queries - first);
    dropped.begin(first, count);
    right_transposed(queries + first * W, count, query);
    float shift[B] = {}, sum[B] = {};  // of the weights 2^(score + shift)
    for (int64_t at = 0; at < n; at += step) {
      const int64_t real = std::min(step, n - at);
      float largest[B];
      const auto score = [&](const float* begin) {  // whether any is FAR above 0
        product(step, B, W, keys + at * W, W, query, scores, begin);
        bool far = false;
        for (int64_t c = 0; c < B; c += LANES) {
          Floats most = floats(scores + c), other = most;  // two, because one would wait for itself
          for (int64_t j = 1; j + 1 < real; j += 2) {
            most = larger(floats(scores + j * B + c), most);
            other = larger(floats(scores + (j + 1) * B + c), other);
          }
          most = larger(larger(floats(scores + (real - 1) * B + c), other), most);
          put(largest + c, most);
          far = far || any_above(most, FAR);
        }
        return far;
      };
      // The shift is minus the largest score of the first keys. It follows later ones only when one is FAR above, and
      // then from scores of which it has taken no digits.
      const bool far = score(at > 0 ? shift : nullptr);
      if (at > 0 && far) score(nullptr);
      for (int64_t c = 0; (at == 0 || far) && c < B; c += LANES) {
        const Floats before = -floats(shift + c), most = larger(Floats{} - 3e38f, floats(largest + c));
        const Floats now = at > 0 ? larger(before, most) : most;
        put(shift + c, -now);
        if (at > 0) {
          const Floats less = power_of_two<6>(before - now);
          put(sum + c, floats(sum + c) * less);
          for (int64_t d = 0; d < H; ++d) put(out + d * B + c, floats(out + d * B + c) * less);
        }
        if constexpr (PAIRED<T>)
          for (int64_t j = 0; j < real; ++j) put(scores + j * B + c, floats(scores + j * B + c) - now);
      }
      for (int64_t c = 0; c < B; c += LANES) {
        const Floats shifts = floats(shift + c);
        Floats total = floats(sum + c);
        const auto weight = [&](int64_t j) {
          const Floats p = weight_of<T>(plus<T>(floats(scores + j * B + c), shifts));
          total += p;
          return dropped.of(p, c, at + j, Floats{});
        };
        int64_t j = 0;
        for (; j + 1 < real; j += 2) {
          const Floats p = weight(j);
          store_pairs(weights + j * B, c, p, weight(j + 1));
        }
        for (; j < step; j += 2) store_pairs(weights + j * B, c, j < real ? weight(j) : Floats{}, Floats{});
        put(sum + c, total);
      }
      product(H, B, step, values_transposed + at, padded, weights, out, at > 0 ? out : nullptr);
    }
    for (int64_t c = 0; c < count; ++c) lse[(first + c) * lse_row] = std::log2(sum[c]) - shift[c];
    const float share = DROPS ? kept_share(h.limit) : 1.0f;
    for (int64_t c = 0; c < B; ++c) sum[c] = 1.0f / (sum[c] * share);
    store_columns(out, sum, count, context + first * context_row, context_row);
  }
}

template <typename T, bool DROPS>
void backward_head(const Head& h, const T* qkv, const T* context, const T* grad, int64_t context_row, const float* lse,
                   int64_t lse_row, T* grad_qkv) {
  constexpr int64_t B = BLOCK<T>, W = WIDTH<T>, H = HIGH<T>, O = OUT<T>;
  if (h.num_queries == 0) {
    for (int64_t i = 0; i < h.length; ++i)
      std::memset(static_cast<void*>(grad_qkv + i * h.row), 0, 3 * DIM * sizeof(T));
    return;
  }
  const int64_t n = h.length, padded = h.padded, step = chunk<T>(padded);
  Scratch scratch(head_bytes<T>(padded));
  auto* query_columns = scratch.take<T>(B * W);
  auto* grad_columns = scratch.take<T>(B * W);
  auto* query_rows = scratch.take<T>(B * O);
  auto* grad_rows = scratch.take<T>(B * O);
  auto* scores = scratch.take<float>(step * B);
  auto* grad_scores = scratch.take<float>(step * B);
  auto* weights = scratch.take<T>(step * B);
  auto* grad_weights = scratch.take<T>(step * B);
  auto* grad_pairs = scratch.take<T>(step * B);
  auto* out = scratch.take<float>(H * B);
  auto* keys = scratch.take<T>(padded * W + VECTOR);
  auto* values = scratch.take<T>(padded * W);
  auto* keys_transposed = scratch.take<T>(padded * H);
  auto* grad_keys = scratch.take<float>(padded * O + VECTOR);
  auto* grad_values = scratch.take<float>(padded * O);
  auto* queries = scratch.take<T>(padded * W + VECTOR);
  auto* grads = scratch.take<T>(padded * W);
  auto* grad_queries = scratch.take<float>(padded * O + VECTOR);
  auto* products = scratch.take<float>(h.num_queries);
  Dropped<DROPS, B> dropped(h, scratch.take<uint32_t>(padded));
  // The weights that stay are larger by 1 / share: that all gradients get at the end.
  const float share = DROPS ? kept_share(h.limit) : 1.0f;
  gather(h, qkv, LOG2_SCALE, queries, keys, values);
  gather_grads(h, grad, context, context_row, grads, products);
  left_transposed(keys, h, keys_transposed);

  for (int64_t first = 0; first < h.num_queries; first += B) {
    const int64_t count = std::min(B, h.num_queries - first);
    const T *query = queries + first * W, *g = grads + first * W;
    float shift[B] = {}, grad_shift[B] = {};  // of the scores and their gradients
    for (int64_t c = 0; c < count; ++c) {
      shift[c] = -lse[(first + c) * lse_row];
      grad_shift[c] = -products[first + c] * share;
    }
    dropped.begin(first, count);
    right_transposed(query, count, query_columns);
    right_transposed(g, count, grad_columns);
    right_rows(query, count, query_rows);
    right_rows(g, count, grad_rows);
    for (int64_t at = 0; at < n; at += step) {
      product(step, B, W, keys + at * W, W, query_columns, scores, shift);
      product(step, B, W, values + at * W, W, grad_columns, grad_scores, grad_shift);
      const int64_t real = std::min(step, n - at);
      for (int64_t c = 0; c < B; c += LANES) {
        const Floats shifts = floats(shift + c), grad_shifts = floats(grad_shift + c);
        const auto store_two = [&](int64_t j, Floats pa, Floats qa, Floats pb, Floats qb) {
          store_rows(weights + j * B + c, pa, pb);
          store_rows(grad_weights + j * B + c, qa, qb);
          store_pairs(grad_pairs + j * B, c, qa, qb);
        };
        struct Pair {
          Floats weight, grad;  // of a weight that may be dropped, and of its score
        };
        const auto pair_at = [&](int64_t j) {
          const Floats p = weight_of<T>(plus<T>(floats(scores + j * B + c), shifts));
          const Floats grad = plus<T>(floats(grad_scores + j * B + c), grad_shifts);
          return Pair{dropped.of(p, c, at + j, Floats{}), p * dropped.of(grad, c, at + j, grad_shifts)};
        };
        int64_t j = 0;
        for (; j + 1 < real; j += 2) {
          const Pair a = pair_at(j), b = pair_at(j + 1);
          store_two(j, a.weight, a.grad, b.weight, b.grad);
        }
        for (; j < step; j += 2) {  // padding has no weight
          const Pair a = j < real ? pair_at(j) : Pair{};
          store_two(j, a.weight, a.grad, Floats{}, Floats{});
        }
      }
      float *grad_v = grad_values + at * O, *grad_k = grad_keys + at * O;
      product(step, O, B, weights, B, grad_rows, grad_v, first > 0 ? grad_v : nullptr);
      product(step, O, B, grad_weights, B, query_rows, grad_k, first > 0 ? grad_k : nullptr);
      product(H, B, step, keys_transposed + at, padded, grad_pairs, out, at > 0 ? out : nullptr);
    }
    transpose_result<T>(out, count, grad_queries + first * O);
  }
  scatter(h, grad_queries, grad_keys, grad_values, 1.0f / share, grad_qkv);
}

template <typename T>
bool run(bool backward, const T* qkv, const float* cos, const float* sin, const int32_t* cu_seqlens, int64_t num_seqs,
         int64_t num_heads, const int64_t* selected, int64_t num_selected, const uint32_t* words, int64_t limit,
         int64_t first_head, T* context, float* lse, const T* grad, T* grad_qkv, int64_t num_threads) {
  bool done = true;
#pragma omp parallel num_threads(num_threads) reduction(&& : done)
  {
    begin_products<T>();
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_seqs * num_heads; ++task) {
      const int64_t start = cu_seqlens[task / num_heads], head = task % num_heads;
      const int64_t length = cu_seqlens[task / num_heads + 1] - start, row = 3 * num_heads * DIM;
      if (length == 0 || !done) continue;
      int64_t first = start, num_queries = length;  // where its queries begin among all, and how many they are
      if (num_selected >= 0) {
        const int64_t *from = std::lower_bound(selected, selected + num_selected, start);
        first = from - selected;
        num_queries = std::lower_bound(from, selected + num_selected, start + length) - from;
      }
      const Head h{length, rounded(length, ROUND), row, cos, sin, num_selected < 0 ? nullptr : selected + first,
                   num_queries, start, words ? words + start : nullptr, static_cast<uint32_t>(first_head + head), limit};
      const int64_t at = start * row + head * 3 * DIM, to = (first * num_heads + head) * DIM;
      float* sums = lse + first * num_heads + head;
      const auto work = [&](auto drops) {
        constexpr bool DROPS = decltype(drops)::value;
        if (backward)
          backward_head<T, DROPS>(h, qkv + at, context + to, grad + to, num_heads * DIM, sums, num_heads,
                                  grad_qkv + at);
        else
          forward_head<T, DROPS>(h, qkv + at, context + to, num_heads * DIM, sums, num_heads);
      };
      done = succeeds([&] { words ? work(std::true_type{}) : work(std::false_type{}); });
    }
    end_products<T>();
  }
  return done;
}

// ---- dropout of rows

template <typename T>
void drop(const T* x, const uint32_t* words, int64_t limit, int64_t place, T* y, int64_t rows, int64_t width,
          int64_t num_threads) {
  const float scale = 1.0f / kept_share(limit);
  const auto least = static_cast<int32_t>(limit);
  const std::unique_ptr<uint32_t[]> columns(new uint32_t[width]);
  column_words(width, columns.get());
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < rows; ++i) {
    const uint32_t word = fold(words[i], static_cast<uint32_t>(place)), *column = columns.get();
    const T* from = x + i * width;
    T* to = y + i * width;
#pragma omp simd
    for (int64_t e = 0; e < width; ++e) {
      const uint32_t is_kept = draw(word ^ column[e]) < least ? 0u : 1u;
      store(to + e, load(from + e) * (static_cast<float>(is_kept) * scale));
    }
  }
}

// ---- layer norm, and without `mean` and `bias` RMSNorm

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
    if (mean) {
#pragma omp simd reduction(+ : total)
      for (int64_t e = 0; e < width; ++e) total += load(from + e);
    }
    const float m = total / width;
#pragma omp simd reduction(+ : squares)
    for (int64_t e = 0; e < width; ++e) squares += (load(from + e) - m) * (load(from + e) - m);
    const float r = 1.0f / std::sqrt(squares / width + eps);
    inverse[i] = r;
    if (mean) {
      for (int64_t e = 0; e < width; ++e) store(to + e, (load(from + e) - m) * r * weight[e] + bias[e]);
      mean[i] = m;
    } else {
      for (int64_t e = 0; e < width; ++e) store(to + e, load(from + e) * r * weight[e]);
    }
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
    const float m = mean ? mean[i] : 0.0f, r = inverse[i];
    float first = 0.0f, second = 0.0f;
#pragma omp simd reduction(+ : first, second)
    for (int64_t e = 0; e < width; ++e) {
      const float gradient = load(g + e), normal = (load(from + e) - m) * r;
      first += gradient * weight[e];
      second += gradient * weight[e] * normal;
      grad_weight[e] += gradient * normal;
      grad_bias[e] += gradient;
    }
    first = mean ? first / width : 0.0f;
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
    float* means = mean ? mean + first : nullptr;
    if (backward)
      layer_norm_rows_backward(grad + at, part(grad_sum), x + at, weight, means, inverse + first, grad_x + at,
                               part(grad_added), sums + first / STRIP * 2 * width, count, width);
    else
      layer_norm_rows(x + at, part(added), part(sum), weight, bias, y + at, means, inverse + first, count, width,
                      eps);
  }
}

// ---- between matrix products, in BF16
#ifdef HAS_BFLOAT16

// GELU is x * cdf(x), its derivative cdf(x) + x * density(x) with the normal distribution's; Abramowitz and Stegun
// 26.2.17, which is off by less than 1e-7, with a power that is off by 3e-6.
inline void normal(Floats x, Floats& cdf, Floats& density) {
  density = 0.39894228f * power_of_two<4>(-0.5f * LOG2_E * x * x);
  const Floats size = from_bits(bits(x) & 0x7fffffff), most = Floats{} + 1e37f;  // nothing here may be infinite
  const Floats denominator = 1.0f + 0.2316419f * (Floats)_mm512_min_ps((__m512)most, (__m512)size);  // NaN stays
  const Floats guess = (Floats)_mm512_rcp14_ps((__m512)denominator);
  const Floats t = guess * (2.0f - denominator * guess);  // a division would take longer than all else here
  Floats p = 1.330274429f * t - 1.821255978f;
  p = p * t + 1.781477937f;
  p = p * t - 0.356563782f;
  p = p * t + 0.319381530f;
  const Floats tail = density * p * t;
  cdf = x < 0.0f ? tail : 1.0f - tail;
}
#endif

}  // namespace

// Called from Python by name: what differs between types is the suffix. The result is whether it worked.
#define ATTENTION(NAME, T)                                                                                           \
  bool attention_##NAME(bool backward, const T* qkv, const float* cos, const float* sin, const int32_t* cu_seqlens,  \
                        int64_t num_seqs, int64_t num_heads, const int64_t* selected, int64_t num_selected,          \
                        const uint32_t* words, int64_t limit, int64_t first_head, T* context, float* lse,            \
                        const T* grad, T* grad_qkv, int64_t num_threads) {                                           \
    return run(backward, qkv, cos, sin, cu_seqlens, num_seqs, num_heads, selected, num_selected, words, limit,       \
               first_head, context, lse, grad, grad_qkv, num_threads);                                               \
  }
#define DROP(NAME, T)                                                                                               \
  bool drop_##NAME(const T* x, const uint32_t* words, int64_t limit, int64_t place, T* y, int64_t rows,             \
                   int64_t width, int64_t num_threads) {                                                            \
    return succeeds([&] { drop(x, words, limit, place, y, rows, width, num_threads); });                            \
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
ATTENTION(float32, float)
DROP(float32, float)
DROP(bfloat16, BFloat16)
LAYER_NORM(float32_float32, float, float)
LAYER_NORM(float32_bfloat16, float, BFloat16)
LAYER_NORM(bfloat16_bfloat16, BFloat16, BFloat16)

#ifndef HAS_BFLOAT16
bool has_bfloat16() { return false; }
#else
bool has_bfloat16() { return true; }
ATTENTION(bfloat16, BFloat16)

// What follows takes columns that are a multiple of VECTOR.

// [rows, columns] to [columns, stride]; zeros fill up the rest. A product over rows, as the gradient of a weight is,
// runs twice as fast if its left-hand factor lies there transposed.
bool transpose_bfloat16(const BFloat16* x, BFloat16* transposed, int64_t rows, int64_t columns, int64_t stride,
                        int64_t num_threads) {
  bool done = true;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) reduction(&& : done)
  for (int64_t first = 0; first < rows; first += STRIP) {
    uint32_t* pairs = nullptr;  // two rows as one, for `transpose_words`
    const int64_t size = STRIP / 2 * columns;
    done = done && succeeds([&pairs, size] { pairs = Scratch(4 * size).take<uint32_t>(size); });
    if (!done) continue;
    const int64_t count = std::min(STRIP, rows - first);
    for (int64_t i = 0; i < STRIP; i += 2) {
      const BFloat16* from = x + (first + i) * columns;
      for (int64_t c = 0; c < columns; c += LANES) {
        const Words even = i < count ? words(from + c) : Words{};
        put(pairs + i / 2 * columns + c, i + 1 < count ? even | words(from + columns + c) << 16 : even);
      }
    }
    for (int64_t column = 0; column < columns; column += VECTOR)
      for (int64_t p = 0; p < STRIP / 2; p += VECTOR)
        transpose_words<VECTOR, VECTOR>(pairs + p * columns + column, columns,
                                        transposed + column * stride + first + 2 * p, stride / 2);
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
    for (int64_t c = 0; c < columns; c += LANES) {
      const Floats value = floats(from + c);
      Floats cdf, density;
      normal(value, cdf, density);
      put_bf16(to + c, value * cdf);
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
      for (int64_t c = 0; c < columns; c += LANES) {
        const Floats value = floats(from + c);
        Floats cdf, density;
        normal(value, cdf, density);
        const Floats gradient = floats(g + c) * (cdf + value * density);
        put_bf16(to + c, value * cdf);
        put_bf16(g + c, gradient);
        put(sum + c, floats(sum + c) + gradient);
      }
    }
  }
  return true;
}
#endif
}
