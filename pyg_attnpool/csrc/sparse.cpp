// Sparse products on rows, and the transposed pattern of a matrix.

#include "simd.h"

namespace {

template <class T>
void spmm(int64_t M, int64_t C, const int64_t* rowptr, const int64_t* col, const int64_t* perm,
          const T* value, const T* x, T scale, const T* minus, T* out) {
#pragma omp parallel for schedule(dynamic, 16) if (rowptr[M] * C > SERIAL)
    for (int64_t i = 0; i < M; ++i)
        spmm_row(rowptr[i], rowptr[i + 1], C, col, perm, value, x, scale,
                 minus ? minus + i * C : nullptr, out + i * C);
}

// The Chebyshev terms T_1 x to T_{K-1} x, one after the other.
template <class T>
void terms(int64_t N, int64_t C, int64_t K, const int64_t* rowptr, const int64_t* col,
           const T* value, const T* x, T* out) {
    const T *before = nullptr, *last = x;
    for (int64_t k = 1; k < K; ++k, out += N * C) {
        spmm(N, C, rowptr, col, nullptr, value, last, T(k == 1 ? 1 : 2), before, out);
        before = last, last = out;
    }
}

template <class T>
void sddmm(int64_t M, int64_t C, const int64_t* rowptr, const int64_t* col, const T* a, const T* b,
           T* out) {
#pragma omp parallel for schedule(dynamic, 16) if (rowptr[M] * C > SERIAL)
    for (int64_t i = 0; i < M; ++i) {
        int64_t e = rowptr[i];
        for (; e + 4 <= rowptr[i + 1]; e += 4) {
            const T* rows[4];
            for (int r = 0; r < 4; ++r) rows[r] = b + col[e + r] * C;
            dots<T, 4>(a + i * C, rows, C, out + e);
        }
        for (; e < rowptr[i + 1]; ++e) out[e] = dot(a + i * C, b + col[e] * C, C);
    }
}

// A block of `U` vectors of one row of both gradients of a product, which share the rows of `g`.
template <class T, int U>
inline void spmm_grads_block(int64_t begin, int64_t end, int64_t C, const int64_t* col_t,
                             const int64_t* perm, const T* value, const T* g, const T* x,
                             T* grad_x, T* grad_value) {
    constexpr int W = Simd<T>::width;
    Vector<T> own[U], sum[U] = {};
    for (int u = 0; u < U; ++u) own[u] = load(x + u * W);
    for (int64_t e = begin; e < end; ++e) {
        const T* row = g + col_t[e] * C;
        const T v = value[perm[e]];
        if (e + 4 < end)
            for (int u = 0; u < U; ++u) __builtin_prefetch(g + col_t[e + 4] * C + u * W);
        Vector<T> product = {};
        for (int u = 0; u < U; ++u) {
            const Vector<T> features = load(row + u * W);
            sum[u] += v * features;
            product += own[u] * features;
        }
        grad_value[perm[e]] += sum_lanes<T>(product);
    }
    for (int u = 0; u < U; ++u) store(grad_x + u * W, sum[u]);
}

// The gradients of x and of the values in one pass through the transposed pattern: every row of
// the gradient `g` of the product is fetched once for both.
template <class T>
void spmm_grads(int64_t N, int64_t C, const int64_t* rowptr_t, const int64_t* col_t,
                const int64_t* perm, const T* value, const T* g, const T* x, T* grad_x,
                T* grad_value) {
    constexpr int W = Simd<T>::width;
    std::fill_n(grad_value, rowptr_t[N], T(0));
#pragma omp parallel for schedule(dynamic, 16) if (rowptr_t[N] * C > SERIAL)
    for (int64_t j = 0; j < N; ++j) {
        const int64_t begin = rowptr_t[j], end = rowptr_t[j + 1];
        int64_t c = 0;
        auto blocks = [&](auto vectors) {
            constexpr int U = decltype(vectors)::value;
            for (; c + U * W <= C; c += U * W)
                spmm_grads_block<T, U>(begin, end, C, col_t, perm, value, g + c, x + j * C + c,
                                       grad_x + j * C + c, grad_value);
        };
        blocks(std::integral_constant<int, 8>());
        blocks(std::integral_constant<int, 2>());
        blocks(std::integral_constant<int, 1>());
        for (; c < C; ++c) {
            T sum = 0;
            for (int64_t e = begin; e < end; ++e) {
                const T feature = g[col_t[e] * C + c];
                sum += value[perm[e]] * feature;
                grad_value[perm[e]] += x[j * C + c] * feature;
            }
            grad_x[j * C + c] = sum;
        }
    }
}

}  // namespace

#define FUNCTIONS(T)                                                                              \
    int64_t spmm_##T(int64_t M, int64_t C, int64_t N, int64_t E, const int64_t* rowptr,           \
                     const int64_t* col, const int64_t* perm, const T* value, const T* x,         \
                     double scale, const T* minus, T* out) {                                      \
        if (!is_pattern(M, N, E, rowptr, col) || (perm && !inside(E, perm, E)))                   \
            return OUT_OF_RANGE;                                                                  \
        spmm<T>(M, C, rowptr, col, perm, value, x, scale, minus, out);                            \
        return DONE;                                                                              \
    }                                                                                             \
    int64_t terms_##T(int64_t N, int64_t C, int64_t K, int64_t E, const int64_t* rowptr,          \
                      const int64_t* col, const T* value, const T* x, T* out) {                   \
        if (!is_pattern(N, N, E, rowptr, col)) return OUT_OF_RANGE;                               \
        terms<T>(N, C, K, rowptr, col, value, x, out);                                            \
        return DONE;                                                                              \
    }                                                                                             \
    int64_t sddmm_##T(int64_t M, int64_t C, int64_t N, int64_t E, const int64_t* rowptr,          \
                      const int64_t* col, const T* a, const T* b, T* out) {                       \
        if (!is_pattern(M, N, E, rowptr, col)) return OUT_OF_RANGE;                               \
        sddmm<T>(M, C, rowptr, col, a, b, out);                                                   \
        return DONE;                                                                              \
    }                                                                                             \
    int64_t spmm_grads_##T(int64_t N, int64_t C, int64_t M, int64_t E, const int64_t* rowptr_t,   \
                           const int64_t* col_t, const int64_t* perm, const T* value,             \
                           const T* g, const T* x, T* grad_x, T* grad_value) {                    \
        if (!is_pattern(N, M, E, rowptr_t, col_t) || !inside(E, perm, E)) return OUT_OF_RANGE;    \
        spmm_grads<T>(N, C, rowptr_t, col_t, perm, value, g, x, grad_x, grad_value);              \
        return DONE;                                                                              \
    }

extern "C" {
void pyg_attnpool_8() {}  // the version that _cpu.py looks for

FUNCTIONS(float)
FUNCTIONS(double)

int64_t transpose_pattern(int64_t M, int64_t N, int64_t E, const int64_t* rowptr,
                          const int64_t* col, int64_t* rowptr_t, int64_t* col_t, int64_t* perm) {
    if (!is_pattern(M, N, E, rowptr, col)) return OUT_OF_RANGE;
    transpose(M, N, rowptr, col, rowptr_t, col_t, perm);
    return DONE;
}
}
