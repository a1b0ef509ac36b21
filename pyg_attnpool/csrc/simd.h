// Vectors, and what several of the sources share. The sources are compiled into one library of plain
// C functions on contiguous arrays; ops/_cpu.py calls them and says what each of them computes.
//
// Rows hold batch and channels side by side, so the innermost loops run over a few hundred
// contiguous numbers. The compiler's target decides how wide a vector is.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T>
struct Simd {
    static constexpr int width = BYTES / sizeof(T);
    typedef T Vector __attribute__((vector_size(BYTES)));
    typedef T Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
inline Vector<T> load(const T* p) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
inline void store(T* p, Vector<T> v) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

#ifdef _OPENMP
inline int num_threads() { return omp_get_max_threads(); }
inline int thread() { return omp_get_thread_num(); }
#else
inline int num_threads() { return 1; }
inline int thread() { return 0; }
#endif

// The sum of all lanes, halving the vector.
#ifdef __clang__
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) __builtin_shuffle(v, decltype(v < v){__VA_ARGS__})
#endif
template <class T>
inline T sum_lanes(Vector<T> v) {
    constexpr int W = Simd<T>::width;
    if constexpr (W == 16) v += SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (W == 16) v += SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    if constexpr (W == 16) v += SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    if constexpr (W == 8) v += SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3);
    if constexpr (W == 8) v += SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5);
    if constexpr (W == 4) v += SHUFFLE(v, 2, 3, 0, 1);
    return v[0] + v[1];
}

// Rows of accumulators that fit into the registers beside what they are multiplied with.
constexpr int ROWS = BYTES == 64 ? 16 : 8;

// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t SERIAL = 1 << 15;

// Indices from outside ///////////////////////////////////////////////////////////////////////////

// Indices come from files and from users, who may change them at any time. Every function looks at
// its own before it reads or writes where they point, and returns one of these.
enum Status : int64_t { DONE = 0, OUT_OF_RANGE = 1 };

// Whether all of `n` indices are from `low` to `end - 1`. The sign of what leaves the range on
// either side is gathered without a branch, in vectors, which costs next to nothing.
template <class I>
inline bool inside(int64_t n, const I* index, int64_t end, int64_t low = 0) {
    using U = typename std::make_unsigned<I>::type;
    const U first = U(low), last = U(end - 1);
    U signs = 0;
    for (int64_t e = 0; e < n; ++e) signs |= (U(index[e]) - first) | (last - U(index[e]));
    return n == 0 || (end > low && I(signs) >= 0);
}

// Whether `rowptr` and `col` are a CSR pattern of `E` entries with M rows and N columns.
inline bool is_pattern(int64_t M, int64_t N, int64_t E, const int64_t* rowptr, const int64_t* col) {
    if (M < 0 || rowptr[0] != 0 || rowptr[M] != E) return false;
    bool ascends = true;
    for (int64_t i = 0; i < M; ++i) ascends &= rowptr[i] <= rowptr[i + 1];
    return ascends && inside(E, col, N);
}

// The pattern of the transposed matrix: a stable counting sort by column.
inline void transpose(int64_t M, int64_t N, const int64_t* rowptr, const int64_t* col, int64_t* rowptr_t,
               int64_t* col_t, int64_t* perm) {
    std::fill_n(rowptr_t, N + 1, 0);
    for (int64_t e = 0; e < rowptr[M]; ++e) ++rowptr_t[col[e] + 1];
    for (int64_t j = 0; j < N; ++j) rowptr_t[j + 1] += rowptr_t[j];
    std::vector<int64_t> next(rowptr_t, rowptr_t + N);
    for (int64_t i = 0; i < M; ++i)
        for (int64_t e = rowptr[i]; e < rowptr[i + 1]; ++e) {
            const int64_t to = next[col[e]]++;
            col_t[to] = i;
            perm[to] = e;
        }
}

// One row of a sparse product ////////////////////////////////////////////////////////////////////

// A block of `U` vectors of one row of the product stays in registers while its entries pass.
template <class T, int U>
inline void spmm_block(int64_t begin, int64_t end, int64_t C, const int64_t* col,
                       const int64_t* perm, const T* value, const T* x, T scale, const T* minus,
                       T* out) {
    constexpr int W = Simd<T>::width;
    Vector<T> sum[U] = {};
    for (int64_t e = begin; e < end; ++e) {
        const T* row = x + col[e] * C;
        const T v = value[perm ? perm[e] : e];
        if (e + 4 < end)
            for (int u = 0; u < U; ++u) __builtin_prefetch(x + col[e + 4] * C + u * W);
        for (int u = 0; u < U; ++u) sum[u] += v * load(row + u * W);
    }
    for (int u = 0; u < U; ++u) {
        Vector<T> y = scale * sum[u];
        store(out + u * W, minus ? y - load(minus + u * W) : y);
    }
}

// One row of the product.
template <class T>
inline void spmm_row(int64_t begin, int64_t end, int64_t C, const int64_t* col,
                     const int64_t* perm, const T* value, const T* x, T scale, const T* minus,
                     T* out) {
    constexpr int W = Simd<T>::width;
    int64_t c = 0;
    auto blocks = [&](auto vectors) {
        constexpr int U = decltype(vectors)::value;
        for (; c + U * W <= C; c += U * W)
            spmm_block<T, U>(begin, end, C, col, perm, value, x + c, scale,
                             minus ? minus + c : nullptr, out + c);
    };
    blocks(std::integral_constant<int, 8>());
    blocks(std::integral_constant<int, 2>());
    blocks(std::integral_constant<int, 1>());
    for (; c < C; ++c) {
        T sum = 0;
        for (int64_t e = begin; e < end; ++e) sum += value[perm ? perm[e] : e] * x[col[e] * C + c];
        out[c] = minus ? scale * sum - minus[c] : scale * sum;
    }
}

// Dot products ///////////////////////////////////////////////////////////////////////////////////

// The products of `a` with `R` rows, so that one load of `a` serves them all.
template <class T, int R>
inline void dots(const T* a, const T* const* b, int64_t C, T* out) {
    constexpr int W = Simd<T>::width;
    Vector<T> sum[R] = {};
    int64_t c = 0;
    for (; c + W <= C; c += W) {
        const Vector<T> v = load(a + c);
        for (int r = 0; r < R; ++r) sum[r] += v * load(b[r] + c);
    }
    for (int r = 0; r < R; ++r) out[r] = sum_lanes<T>(sum[r]);
    for (; c < C; ++c)
        for (int r = 0; r < R; ++r) out[r] += a[c] * b[r][c];
}

template <class T>
inline T dot(const T* a, const T* b, int64_t C) {
    T out;
    dots<T, 1>(a, &b, C, &out);
    return out;
}

// Vectors at unit length /////////////////////////////////////////////////////////////////////////

// Vectors at unit length, each filled up with zeros to whole registers.
template <class T>
struct Units {
    int64_t channels, stride;
    std::vector<T> rows, length;

    Units(int64_t n, int64_t c, const T* from)
        : channels(c), stride((c + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width),
          rows(n * stride, 0), length(n) {
#pragma omp parallel for if (n * c > SERIAL)
        for (int64_t i = 0; i < n; ++i) {
            T square = 0;
            for (int64_t h = 0; h < c; ++h) square += from[i * c + h] * from[i * c + h];
            length[i] = std::max(std::sqrt(square), T(1e-12));
            for (int64_t h = 0; h < c; ++h) rows[i * stride + h] = from[i * c + h] / length[i];
        }
    }

    const T* operator[](int64_t i) const { return rows.data() + i * stride; }

    bool finite() const {
        return std::all_of(length.begin(), length.end(), [](T l) { return std::isfinite(l); });
    }

    // The gradient of a vector from that of the vector at unit length.
    void through_length(int64_t i, const T* of_unit, T* grad) const {
        const T* unit = (*this)[i];
        const T along = length[i] > T(1e-12) ? dot(of_unit, unit, stride) : 0;
        for (int64_t h = 0; h < channels; ++h) grad[h] = (of_unit[h] - along * unit[h]) / length[i];
    }
};

}  // namespace
