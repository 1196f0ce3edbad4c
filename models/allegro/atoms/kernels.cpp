// SPDX-License-Identifier: Apache-2.0
// Kernels of `kernels.py`: products of features with geometry over edges, their derivatives, and those of the
// derivatives, in float32 and float64. Threads share out the channels, which no sum runs over but that of couplings;
// so results depend on the number of threads in those alone, and there by rounding.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Vectors as gcc and clang have them, with operators. What is left of a row goes one by one.
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
template <typename T> struct Vector;
template <> struct Vector<float> { typedef Floats type; };
template <> struct Vector<double> { typedef Doubles type; };

template <typename V, typename T> inline V get(const T* from) {  // it may lie anywhere
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <typename V, typename T> inline void put(T* to, V x) { std::memcpy(to, &x, sizeof x); }
template <typename V, typename T> inline void add(T* to, V x) { put<V>(to, get<V>(to) + x); }

template <typename V, typename T> inline T total(const V& v) {
  T sum = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i) sum += reinterpret_cast<const T*>(&v)[i];
  return sum;
}

// Which channels a thread has: whole vectors, and the last what is left.
inline void share(int64_t channels, int64_t lanes, int64_t threads, int64_t thread, int64_t& first, int64_t& last) {
  const int64_t vectors = (channels + lanes - 1) / lanes;
  first = vectors * thread / threads * lanes;
  last = thread + 1 == threads ? channels : vectors * (thread + 1) / threads * lanes;
}

enum Order { VALUE, FIRST, SECOND };

// out[centre, k, u] += w[row, path(k), u] * sum_i c[e, i, k] x[neighbor, i, u]. FIRST: of sum(out * g) the derivatives
// by x, w and c. SECOND: of sum(dx * ax + dw * aw + dc * ac), the derivatives by g (to `out`), x, w and c.
template <typename T> struct EdgeSum {
  int64_t num_edges, I, K, P, U, w_stride;
  const int64_t *path, *centre, *neighbor, *row;
  const T *x, *w, *c, *g, *ax, *aw, *ac;
  T *out, *dx, *dw, *dc;
};

template <typename T, typename V, int I, Order order>
inline void edge_strip(const EdgeSum<T>& s, int64_t e, int64_t u, V* dc) {
  const int64_t K = s.K, U = s.U, r = s.row ? s.row[e] : e;
  const T* c = s.c + e * I * K;
  const int64_t x_at = s.neighbor[e] * I * U + u, out_at = s.centre[e] * K * U + u, dw_at = r * s.P * U + u;
  const T* w = s.w + r * s.w_stride + u;
  V x[I], ax[I], dx[I];
  for (int i = 0; i < I; ++i) {
    x[i] = get<V>(s.x + x_at + i * U);
    if constexpr (order == SECOND) ax[i] = get<V>(s.ax + x_at + i * U);
    dx[i] = V{};
  }
  for (int64_t k = 0; k < K; ++k) {
    const int64_t p = s.path[k] * U;
    V m = V{};
    for (int i = 0; i < I; ++i) m += c[i * K + k] * x[i];
    const V wk = get<V>(w + p);
    if constexpr (order == VALUE) {
      add<V>(s.out + out_at + k * U, wk * m);
      continue;
    }
    const V g = get<V>(s.g + out_at + k * U), dm = wk * g;
    if constexpr (order == FIRST) {
      add<V>(s.dw + dw_at + p, g * m);
      for (int i = 0; i < I; ++i) {
        dx[i] += c[i * K + k] * dm;
        dc[i * K + k] += x[i] * dm;
      }
    } else if constexpr (order == SECOND) {
      const T* ac = s.ac + e * I * K;
      const V awk = get<V>(s.aw + dw_at + p), dma = awk * g;
      V ma = V{};
      for (int i = 0; i < I; ++i) {
        ma += ac[i * K + k] * x[i] + c[i * K + k] * ax[i];
        dx[i] += ac[i * K + k] * dm + c[i * K + k] * dma;
        dc[i * K + k] += ax[i] * dm + x[i] * dma;
      }
      add<V>(s.out + out_at + k * U, awk * m + wk * ma);
      add<V>(s.dw + dw_at + p, g * ma);
    }
  }
  if constexpr (order != VALUE)
    for (int i = 0; i < I; ++i) add<V>(s.dx + x_at + i * U, dx[i]);
}

template <typename T, int I, Order order> void edge_sum(const EdgeSum<T>& s, int64_t threads) {
  typedef typename Vector<T>::type V;
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  const int64_t IK = I * s.K, vectors = (s.U + lanes - 1) / lanes;
  threads = threads < vectors ? threads : vectors;
  if (s.num_edges * IK * s.U < 100000) threads = 1;
  std::vector<T> others(order == VALUE ? 0 : (threads - 1) * s.num_edges * IK);  // couplings' derivatives by thread
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t thread = 0; thread < threads; ++thread) {
    int64_t first, last;
    share(s.U, lanes, threads, thread, first, last);
    T* dc = order == VALUE ? nullptr : thread ? others.data() + (thread - 1) * s.num_edges * IK : s.dc;
    std::vector<V> sums(IK);
    std::vector<T> ends(IK);
    for (int64_t e = 0; e < s.num_edges; ++e) {
      for (int64_t i = 0; order != VALUE && i < IK; ++i) sums[i] = V{}, ends[i] = 0;
      int64_t u = first;
      for (; u + lanes <= last; u += lanes) edge_strip<T, V, I, order>(s, e, u, sums.data());
      for (; u < last; ++u) edge_strip<T, T, I, order>(s, e, u, ends.data());
      for (int64_t i = 0; order != VALUE && i < IK; ++i) dc[e * IK + i] = total<V, T>(sums[i]) + ends[i];
    }
  }
  for (size_t i = 0; i < others.size(); ++i) s.dc[i % (s.num_edges * IK)] += others[i];
}

template <typename T, Order order> bool edge_sum_of(const EdgeSum<T>& s, int64_t threads) {
  switch (s.I) {
    case 1: edge_sum<T, 1, order>(s, threads); return true;
    case 3: edge_sum<T, 3, order>(s, threads); return true;
    case 5: edge_sum<T, 5, order>(s, threads); return true;
    case 7: edge_sum<T, 7, order>(s, threads); return true;
    case 9: edge_sum<T, 9, order>(s, threads); return true;
    case 11: edge_sum<T, 11, order>(s, threads); return true;
    case 13: edge_sum<T, 13, order>(s, threads); return true;
  }
  return false;
}

// out[e, k, u] = sum_i x[e, i, u] m[centre, i, k, u]; FIRST and SECOND as above, by x and m.
template <typename T> struct CentreProduct {
  int64_t num_edges, I, K, U;
  const int64_t* centre;
  const T *x, *m, *g, *ax, *am;
  T *out, *dx, *dm;
};

template <typename T, typename V, Order order> inline void centre_strip(const CentreProduct<T>& s, int64_t e, int64_t u) {
  const int64_t I = s.I, K = s.K, U = s.U, m_at = s.centre[e] * I * K * U + u;
  const T *x = s.x + e * I * U + u, *m = s.m + m_at;
  if constexpr (order != FIRST)
    for (int64_t k = 0; k < K; ++k) {
      V sum = V{};
      for (int64_t i = 0; i < I; ++i) {
        const int64_t ik = (i * K + k) * U;
        if constexpr (order == VALUE) sum += get<V>(x + i * U) * get<V>(m + ik);
        else sum += get<V>(s.ax + e * I * U + u + i * U) * get<V>(m + ik) + get<V>(x + i * U) * get<V>(s.am + m_at + ik);
      }
      put<V>(s.out + (e * K + k) * U + u, sum);
    }
  if constexpr (order != VALUE)
    for (int64_t i = 0; i < I; ++i) {
      const V factor = get<V>(order == FIRST ? x + i * U : s.ax + e * I * U + u + i * U);
      const T* by = order == FIRST ? m : s.am + m_at;
      V sum = V{};
      for (int64_t k = 0; k < K; ++k) {
        const V g = get<V>(s.g + (e * K + k) * U + u);
        sum += get<V>(by + (i * K + k) * U) * g;
        add<V>(s.dm + m_at + (i * K + k) * U, factor * g);
      }
      put<V>(s.dx + (e * I + i) * U + u, sum);
    }
}

template <typename T, Order order> void centre_product(const CentreProduct<T>& s, int64_t threads) {
  typedef typename Vector<T>::type V;
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  const int64_t vectors = (s.U + lanes - 1) / lanes;
  threads = threads < vectors ? threads : vectors;
  if (s.num_edges * s.I * s.K * s.U < 100000) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t thread = 0; thread < threads; ++thread) {
    int64_t first, last;
    share(s.U, lanes, threads, thread, first, last);
    for (int64_t e = 0; e < s.num_edges; ++e) {
      int64_t u = first;
      for (; u + lanes <= last; u += lanes) centre_strip<T, V, order>(s, e, u);
      for (; u < last; ++u) centre_strip<T, T, order>(s, e, u);
    }
  }
}

}  // namespace

// Outputs come as zeros. All arrays are contiguous but rows of w, which are w_stride apart.
#define KERNELS(T, NAME)                                                                                            \
  extern "C" bool edge_sum_##NAME(int64_t order, int64_t num_edges, int64_t I, int64_t K, int64_t P, int64_t U,     \
      int64_t w_stride, const int64_t* path, const int64_t* centre, const int64_t* neighbor, const int64_t* row,    \
      const T* x, const T* w, const T* c, const T* g, const T* ax, const T* aw, const T* ac, T* out, T* dx, T* dw,  \
      T* dc, int64_t threads) {                                                                                     \
    const EdgeSum<T> s{num_edges, I, K, P, U, w_stride, path, centre, neighbor, row, x, w, c, g, ax, aw, ac,        \
                       out, dx, dw, dc};                                                                            \
    return order == VALUE ? edge_sum_of<T, VALUE>(s, threads)                                                       \
           : order == FIRST ? edge_sum_of<T, FIRST>(s, threads) : edge_sum_of<T, SECOND>(s, threads);               \
  }                                                                                                                 \
  extern "C" bool centre_product_##NAME(int64_t order, int64_t num_edges, int64_t I, int64_t K, int64_t U,          \
      const int64_t* centre, const T* x, const T* m, const T* g, const T* ax, const T* am, T* out, T* dx, T* dm,    \
      int64_t threads) {                                                                                            \
    const CentreProduct<T> s{num_edges, I, K, U, centre, x, m, g, ax, am, out, dx, dm};                             \
    if (order == VALUE) centre_product<T, VALUE>(s, threads);                                                       \
    else if (order == FIRST) centre_product<T, FIRST>(s, threads);                                                  \
    else centre_product<T, SECOND>(s, threads);                                                                     \
    return true;                                                                                                    \
  }
KERNELS(float, float32)
KERNELS(double, float64)
