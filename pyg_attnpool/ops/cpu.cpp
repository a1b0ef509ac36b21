// The operations of this package on a CPU: sparse products on rows, the products of a convolution,
// and the search for the largest cosines. Plain C functions on contiguous arrays, called by
// _cpu.py; _cpu.py also says what each of them computes.
//
// Rows are vectors of batch and channels together, so the innermost loops run over a few hundred
// contiguous numbers. Vectors are of the width that the compiler was told of.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
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

// Sparse products /////////////////////////////////////////////////////////////////////////////

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

// Convolutions ////////////////////////////////////////////////////////////////////////////////

// `R` samples of one vertex times one vector's width of the columns of the weights.
template <class T, int R>
inline void multiply_rows(int64_t F, int64_t ldw, const T* x, const T* w, Vector<T>* sum) {
    for (int64_t f = 0; f < F; ++f) {
        const Vector<T> column = load(w + f * ldw);
        for (int r = 0; r < R; ++r) sum[r] += x[r * F + f] * column;
    }
}

template <class T, int R, class Entries>
inline void convolve_tile(int64_t F, int64_t ldw, int64_t width, const Entries& entries,
                          const T* w, const T* bias, T* out, int64_t ldo) {
    constexpr int W = Simd<T>::width;
    Vector<T> sum[R];
    for (int r = 0; r < R; ++r) sum[r] = load(bias);
    entries([&](const T* x, int64_t slot) {
        multiply_rows<T, R>(F, ldw, x, w + slot * F * ldw, sum);
    });
    for (int r = 0; r < R; ++r) {
        if (width == W) store(out + r * ldo, sum[r]);
        else std::memcpy(out + r * ldo, &sum[r], width * sizeof(T));
    }
}

// `visit(i, b, f)` calls f(row of x, slot) for every entry of vertex i, from sample b on.
template <class T, class Visit>
void convolve(int64_t M, int64_t B, int64_t F, int64_t G, int64_t S, const T* weight,
              const T* bias, T* out, const Visit& visit) {
    constexpr int W = Simd<T>::width;
    const int64_t ldw = (G + W - 1) / W * W;
    std::vector<T> w(S * F * ldw, 0), b(ldw, 0);  // columns filled up to whole vectors
    for (int64_t r = 0; r < S * F; ++r) std::copy_n(weight + r * G, G, w.data() + r * ldw);
    if (bias) std::copy_n(bias, G, b.data());
#pragma omp parallel for schedule(dynamic, 16) if (M * B * S * F * G > SERIAL)
    for (int64_t i = 0; i < M; ++i) {
        for (int64_t g = 0; g < G; g += W) {
            const int64_t width = std::min<int64_t>(W, G - g);
            auto tile = [&](auto rows, int64_t s) {
                convolve_tile<T, decltype(rows)::value>(
                    F, ldw, width, [&](auto f) { visit(i, s, f); }, w.data() + g, b.data() + g,
                    out + (i * B + s) * G + g, G);
            };
            int64_t s = 0;
            for (; s + ROWS <= B; s += ROWS) tile(std::integral_constant<int, ROWS>(), s);
            for (; s + 4 <= B; s += 4) tile(std::integral_constant<int, 4>(), s);
            for (; s < B; ++s) tile(std::integral_constant<int, 1>(), s);
        }
    }
}

// The gradient of `R` rows and one vector's width of columns of one slot's weights.
template <class T, int R>
inline void outer_tile(int64_t B, int64_t F, int64_t G, const T* x, const T* g, Vector<T>* sum) {
    for (int64_t s = 0; s < B; ++s) {
        const Vector<T> v = load(g + s * G);
        for (int r = 0; r < R; ++r) sum[r] += x[s * F + r] * v;
    }
}

template <class T>
void outer(int64_t M, int64_t B, int64_t F, int64_t G, int64_t S, const T* const* x,
           const T* const* g, const int64_t* index, T* out) {
    constexpr int W = Simd<T>::width;
    constexpr int64_t BLOCK = 64;  // vertices whose rows stay in the cache for all slots
    std::fill_n(out, S * F * G, T(0));
    const int64_t blocks = (M + BLOCK - 1) / BLOCK;
    std::vector<std::vector<T>> parts(num_threads(), std::vector<T>(S * F * G, 0));
    // Static, and summed in the order of the threads, so that the result repeats.
#pragma omp parallel for schedule(static) if (M * B * S * F * G > SERIAL)
    for (int64_t block = 0; block < blocks; ++block) {
        T* part = parts[thread()].data();
        const int64_t begin = block * BLOCK, end = std::min(M, begin + BLOCK);
        for (int64_t s = 0; s < S; ++s) {
            // Calls f(row of x, row of g) for every vertex that has this slot.
            auto vertices = [&](auto f) {
                for (int64_t i = begin; i < end; ++i) {
                    const int64_t j = index ? index[i * S + s] : i;
                    if (j >= 0) f(x[s] + j * B * F, g[s] + i * B * G);
                }
            };
            auto tile = [&](auto rows, int64_t f, int64_t c) {
                constexpr int R = decltype(rows)::value;
                Vector<T> sum[R] = {};
                vertices([&](const T* a, const T* b) {
                    outer_tile<T, R>(B, F, G, a + f, b + c, sum);
                });
                T* to = part + (s * F + f) * G + c;
                for (int r = 0; r < R; ++r) store(to + r * G, load(to + r * G) + sum[r]);
            };
            int64_t c = 0;
            for (; c + W <= G; c += W) {
                int64_t f = 0;
                for (; f + ROWS <= F; f += ROWS) tile(std::integral_constant<int, ROWS>(), f, c);
                for (; f + 3 <= F; f += 3) tile(std::integral_constant<int, 3>(), f, c);
                for (; f < F; ++f) tile(std::integral_constant<int, 1>(), f, c);
            }
            if (c == G) continue;
            vertices([&](const T* a, const T* b) {
                for (int64_t r = 0; r < B; ++r)
                    for (int64_t f = 0; f < F; ++f)
                        for (int64_t d = c; d < G; ++d)
                            part[(s * F + f) * G + d] += a[r * F + f] * b[r * G + d];
            });
        }
    }
    for (const auto& part : parts)
        for (int64_t r = 0; r < S * F * G; ++r) out[r] += part[r];
}

// The search for the largest cosines /////////////////////////////////////////////////////////////

template <class T>
struct Ranked {
    T score;
    int32_t index;
    bool operator<(const Ranked& other) const {  // comes before: of equal scores the smaller index
        return score > other.score || (score == other.score && index < other.index);
    }
};

// Puts the first K of a list in their order. In a short one the place of each is the number of
// those before it, counted without a branch, which is several times faster than sorting.
template <class T>
void order(Ranked<T>* list, int64_t n, int64_t K) {
    constexpr int W = Simd<T>::width;
    constexpr int64_t SHORT = 512;
    using Mask = decltype(Vector<T>() < Vector<T>());
    using Index = typename std::remove_reference<decltype(Mask()[0])>::type;
    if (n > SHORT) {
        std::partial_sort(list, list + K, list + n);
        return;
    }
    T score[SHORT];
    Index index[SHORT];
    Ranked<T> sorted[SHORT];
    for (int64_t e = 0; e < n; ++e) {
        const T s = list[e].score;
        score[e] = s == s ? s : -std::numeric_limits<T>::infinity();  // no numbers are the last
        index[e] = list[e].index;
    }
    for (int64_t e = n; e % W; ++e) score[e] = index[e] = 0;
    // Returns the sum of all places.
    auto place_all = [&](auto before) {
        int64_t sum = 0;
        for (int64_t e = 0; e < n; e += W) {
            Mask own, place = {};
            std::memcpy(&own, index + e, sizeof(own));
            const Vector<T> scores = load(score + e);
            for (int64_t f = 0; f < n; ++f) place -= before(f, scores, own);
            for (int w = 0; w < W && e + w < n; ++w) {
                sum += place[w];
                if (place[w] < K) sorted[place[w]] = list[e + w];
            }
        }
        return sum;
    };
    // Only where scores are equal does the sum fall short, and need indices be looked at.
    auto greater = [&](int64_t f, Vector<T> scores, Mask) { return Mask(score[f] > scores); };
    if (place_all(greater) < n * (n - 1) / 2)
        place_all([&](int64_t f, Vector<T> scores, Mask own) {
            return Mask((score[f] > scores) | ((score[f] == scores) & (index[f] < own)));
        });
    std::copy_n(sorted, K, list);
}

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

    // The gradient of a vector from that of the vector at unit length.
    void through_length(int64_t i, const T* of_unit, T* grad) const {
        const T* unit = (*this)[i];
        const T along = length[i] > T(1e-12) ? dot(of_unit, unit, stride) : 0;
        for (int64_t h = 0; h < channels; ++h) grad[h] = (of_unit[h] - along * unit[h]) / length[i];
    }
};

// The keys in panels of one register of keys, channel after channel.
template <class T>
std::vector<T> panels(int64_t N, const Units<T>& keys) {
    constexpr int W = Simd<T>::width;
    const int64_t c = keys.channels;
    std::vector<T> out((N + W - 1) / W * W * c, 0);
#pragma omp parallel for if (N * c > SERIAL)
    for (int64_t j = 0; j < N; ++j)
        for (int64_t h = 0; h < c; ++h) out[(j / W * c + h) * W + j % W] = keys[j][h];
    return out;
}

// Which lanes reach `floor`, as bits.
template <class T>
inline uint32_t reaching(Vector<T> v, T floor) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(floor), _CMP_GE_OQ);
    else
        return _mm512_cmp_pd_mask((__m512d)v, _mm512_set1_pd(floor), _CMP_GE_OQ);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
        return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(floor), _CMP_GE_OQ));
    else
        return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_set1_pd(floor), _CMP_GE_OQ));
#else
    uint32_t bits = 0;
    for (int w = 0; w < Simd<T>::width; ++w) bits |= uint32_t(v[w] >= floor) << w;
    return bits;
#endif
}

// The K best keys of up to ROWS queries, of which at least K reach `floor`. What decides is the
// score as `dot` forms it, here and wherever it is formed again. Scores formed a panel at a time
// differ from it by less than `slack`, so they only say which keys may be among the best.
template <class T>
void search(int64_t N, int64_t K, const int64_t* rows, int count, const Units<T>& queries,
            const Units<T>& keys, const std::vector<T>& panels, const T* floor, T slack,
            std::vector<Ranked<T>>* found) {
    constexpr int W = Simd<T>::width;
    const int64_t c = keys.channels;
    std::vector<T> q(c * ROWS, 0);
    int64_t size[ROWS] = {}, room[ROWS];
    T least[ROWS];
    for (int r = 0; r < count; ++r) {
        for (int64_t h = 0; h < c; ++h) q[h * ROWS + r] = queries[rows[r]][h];
        room[r] = 2 * K + 64;
        found[r].resize(std::max<int64_t>(found[r].size(), room[r]));
        least[r] = floor[r] - slack;
    }
    for (int64_t j = 0; j < N; j += W) {
        const T* panel = panels.data() + j * c;
        Vector<T> sum[ROWS] = {};
        for (int64_t h = 0; h < c; ++h) {
            const Vector<T> k = load(panel + h * W);
            for (int r = 0; r < ROWS; ++r) sum[r] += q[h * ROWS + r] * k;
        }
        for (int r = 0; r < count; ++r) {
            uint32_t bits = reaching<T>(sum[r], least[r]);
            if (bits == 0) continue;
            if (size[r] + W > room[r]) {
                Ranked<T>* list = found[r].data();
                std::nth_element(list, list + K - 1, list + size[r]);
                least[r] = std::max(least[r], list[K - 1].score - 2 * slack);
                size[r] = std::remove_if(list + K, list + size[r],
                                         [&](auto& e) { return e.score < least[r]; }) - list;
                if (size[r] + W > room[r]) found[r].resize(room[r] = 2 * room[r]);  // many ties
            }
            for (; bits; bits &= bits - 1) {
                const int w = __builtin_ctz(bits);
                if (j + w < N) found[r][size[r]++] = {sum[r][w], int32_t(j + w)};
            }
        }
    }
    for (int r = 0; r < count; ++r) {
        Ranked<T>* list = found[r].data();
        for (int64_t e = 0; e < size[r]; ++e)
            list[e].score = dot(queries[rows[r]], keys[list[e].index], keys.stride);
        // Fewer only where scores are not numbers.
        for (; size[r] < K; ++size[r]) list[size[r]] = {-2, int32_t(size[r])};
        order(list, size[r], K);
    }
}

// How far the squared length of a normalised vector may be from one.
constexpr double UNIT = 4e-6;

// The angle that a unit vector turned by, from above. A vector of zeros has none.
template <class T>
double turned(int64_t c, const T* from, const T* to) {
    if (std::equal(from, from + c, to)) return 0;
    double square = 0, a = 0, b = 0;
    for (int64_t h = 0; h < c; ++h) {
        const double x = from[h], y = to[h];
        square += (x - y) * (x - y), a += x * x, b += y * y;
    }
    const bool unit = std::abs(a - 1) < UNIT && std::abs(b - 1) < UNIT;
    if (!unit || !(square < 1)) return M_PI;
    return 2 * std::asin(std::sqrt(square) / 2) * (1 + UNIT);
}

template <class T>
void topk(int64_t M, int64_t N, int64_t c, int64_t k, int64_t K, const T* query, const T* key,
          T* last_query, T* last_key, int32_t* candidates, double* angle, int64_t* index,
          T* score, int64_t* searched) {
    const Units<T> queries(M, c, query), keys(N, c, key);
    const T slack = 4 * c * std::numeric_limits<T>::epsilon();
    // Of what rounding and lengths close to one leave open between scores and angles.
    const double margin = 1e-5 + slack;
    double key_turn = 0;
#pragma omp parallel for reduction(max : key_turn) if (N * c > SERIAL)
    for (int64_t j = 0; j < N; ++j) {
        key_turn = std::max(key_turn, turned(c, last_key + j * c, keys[j]));
        std::copy_n(keys[j], c, last_key + j * c);
    }

    std::vector<T> floor(M);
    std::vector<char> unproven(M);
#pragma omp parallel if (M * K * c > SERIAL)
    {
        std::vector<Ranked<T>> list(K);
#pragma omp for schedule(dynamic, 64)
        for (int64_t i = 0; i < M; ++i) {
            int32_t* own = candidates + i * K;
            angle[i] -= key_turn + turned(c, last_query + i * c, queries[i]);
            std::copy_n(queries[i], c, last_query + i * c);
            for (int64_t e = 0; e < K; ++e)
                list[e] = {dot(queries[i], keys[own[e]], keys.stride), own[e]};
            order(list.data(), K, K);
            for (int64_t e = 0; e < K; ++e) own[e] = list[e].index;
            for (int64_t e = 0; e < k; ++e) {
                index[i * k + e] = list[e].index;
                score[i * k + e] = list[e].score;
            }
            floor[i] = list[K - 1].score;
            const double outside = std::cos(std::max(angle[i], 0.0)) + margin;
            unproven[i] = K < N && !(list[k - 1].score > outside);
        }
    }

    std::vector<int64_t> rows;
    for (int64_t i = 0; i < M; ++i)
        if (unproven[i]) rows.push_back(i);
    searched[0] += rows.size();
    searched[1] += M;
    if (rows.empty()) return;
    const std::vector<T> all = panels(N, keys);
    const int64_t groups = (rows.size() + ROWS - 1) / ROWS;
#pragma omp parallel if (groups * ROWS * N * c > SERIAL)
    {
        std::vector<Ranked<T>> found[ROWS];
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t* own = rows.data() + group * ROWS;
            const int count = std::min<int64_t>(ROWS, rows.size() - group * ROWS);
            T least[ROWS];
            for (int r = 0; r < count; ++r) least[r] = floor[own[r]];
            search(N, K, own, count, queries, keys, all, least, slack, found);
            for (int r = 0; r < count; ++r) {
                const int64_t i = own[r];
                for (int64_t e = 0; e < K; ++e) candidates[i * K + e] = found[r][e].index;
                for (int64_t e = 0; e < k; ++e) {
                    index[i * k + e] = found[r][e].index;
                    score[i * k + e] = found[r][e].score;
                }
                angle[i] = std::acos(std::min(1.0, found[r][K - 1].score + margin));
            }
        }
    }
}

// The weights at what was found ///////////////////////////////////////////////////////////////////

// Slots are the k of the attention and then the P of the prior. `scale` is beta of the softmax, or
// zero where scores are divided by their sum; `share` is that of the attention.
template <class T>
inline void attend(int64_t k, T scale, const T* score, T* weight) {
    T sum = 0;
    if (scale > 0) {
        const T most = *std::max_element(score, score + k);
        for (int64_t e = 0; e < k; ++e) sum += weight[e] = std::exp(scale * (score[e] - most));
    } else {
        for (int64_t e = 0; e < k; ++e) sum += weight[e] = std::max(score[e], T(1e-25));
    }
    for (int64_t e = 0; e < k; ++e) weight[e] /= sum;
}

template <class T>
void attention(int64_t M, int64_t k, int64_t P, const T* score, const T* prior, T scale, T share,
               T* weight) {
#pragma omp parallel for schedule(static) if (M * k * 16 > SERIAL)
    for (int64_t i = 0; i < M; ++i) {
        T* w = weight + i * (k + P);
        attend(k, scale, score + i * k, w);
        for (int64_t e = 0; e < k; ++e) w[e] *= share;
        for (int64_t e = 0; e < P; ++e) w[k + e] = (1 - share) * prior[i * P + e];
    }
}

template <class T>
void attention_backward(int64_t M, int64_t N, int64_t c, int64_t k, int64_t P, const T* query,
                        const T* key, const int64_t* index, const T* score, const T* prior,
                        T scale, T share, const T* grad, const int64_t* rowptr_t,
                        const int64_t* col_t, const int64_t* perm, T* grad_query, T* grad_key,
                        T* grad_scalars) {
    const Units<T> queries(M, c, query), keys(N, c, key);
    const int64_t slots = k + P, stride = keys.stride;
    std::vector<T> of_score(M * slots, 0);  // zero for the prior's
    // Sums that nearly cancel, over all vertices: in double precision, block by block.
    constexpr int64_t BLOCK = 256;
    const int64_t blocks = (M + BLOCK - 1) / BLOCK;
    std::vector<double> of_share(blocks, 0), of_scale(blocks, 0);
#pragma omp parallel if (M * k * c > SERIAL)
    {
        std::vector<T> weight(k), sum(stride);
#pragma omp for
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = block * BLOCK; i < std::min(M, (block + 1) * BLOCK); ++i) {
                const T *s = score + i * k, *g = grad + i * slots;
                T* d = of_score.data() + i * slots;
                attend(k, scale, s, weight.data());
                double mean = 0, of_prior = 0, norm = 0;
                for (int64_t e = 0; e < k; ++e) {
                    mean += double(g[e]) * weight[e];
                    norm += std::max(s[e], T(1e-25));
                }
                for (int64_t e = 0; e < P; ++e) of_prior += double(g[k + e]) * prior[i * P + e];
                of_share[block] += mean - of_prior;
                for (int64_t e = 0; e < k; ++e) {
                    const double centred = share * (g[e] - mean);
                    if (scale > 0) d[e] = scale * weight[e] * centred;
                    else d[e] = s[e] >= T(1e-25) ? centred / norm : 0;
                    of_scale[block] += double(d[e]) * s[e];
                }
                spmm_row<T>(0, k, stride, index + i * slots, nullptr, d, keys[0], 1, nullptr,
                            sum.data());
                queries.through_length(i, sum.data(), grad_query + i * c);
            }
#pragma omp for schedule(dynamic, 16)
        for (int64_t j = 0; j < N; ++j) {
            spmm_row<T>(rowptr_t[j], rowptr_t[j + 1], stride, col_t, perm, of_score.data(),
                        queries[0], 1, nullptr, sum.data());
            keys.through_length(j, sum.data(), grad_key + j * c);
        }
    }
    double share_sum = 0, scale_sum = 0;
    for (int64_t b = 0; b < blocks; ++b) share_sum += of_share[b], scale_sum += of_scale[b];
    grad_scalars[0] = share_sum;
    grad_scalars[1] = scale_sum;  // of the logarithm
}

// The pattern of the transposed matrix: a stable counting sort by column.
void transpose(int64_t M, int64_t N, const int64_t* rowptr, const int64_t* col, int64_t* rowptr_t,
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

}  // namespace

#define FOR_TYPE(T, NAME)                                                                         \
    void spmm_##NAME(int64_t M, int64_t C, const int64_t* rowptr, const int64_t* col,             \
                     const int64_t* perm, const T* value, const T* x, double scale,               \
                     const T* minus, T* out) {                                                    \
        spmm<T>(M, C, rowptr, col, perm, value, x, scale, minus, out);                            \
    }                                                                                             \
    void terms_##NAME(int64_t N, int64_t C, int64_t K, const int64_t* rowptr, const int64_t* col, \
                      const T* value, const T* x, T* out) {                                       \
        terms<T>(N, C, K, rowptr, col, value, x, out);                                            \
    }                                                                                             \
    void sddmm_##NAME(int64_t M, int64_t C, const int64_t* rowptr, const int64_t* col,            \
                      const T* a, const T* b, T* out) {                                           \
        sddmm<T>(M, C, rowptr, col, a, b, out);                                                   \
    }                                                                                             \
    void spmm_grads_##NAME(int64_t N, int64_t C, const int64_t* rowptr_t, const int64_t* col_t,   \
                           const int64_t* perm, const T* value, const T* g, const T* x,           \
                           T* grad_x, T* grad_value) {                                            \
        spmm_grads<T>(N, C, rowptr_t, col_t, perm, value, g, x, grad_x, grad_value);              \
    }                                                                                             \
    void convolve_slots_##NAME(int64_t M, int64_t B, int64_t F, int64_t G, int64_t S,             \
                               const T* const* x, const T* weight, const T* bias, T* out) {       \
        convolve<T>(M, B, F, G, S, weight, bias, out, [=](int64_t i, int64_t b, auto f) {         \
            for (int64_t s = 0; s < S; ++s) f(x[s] + (i * B + b) * F, s);                         \
        });                                                                                       \
    }                                                                                             \
    void convolve_entries_##NAME(int64_t M, int64_t B, int64_t F, int64_t G, int64_t S,           \
                                 const int64_t* rowptr, const int64_t* col, const int64_t* slot,  \
                                 const T* x, const T* weight, const T* bias, T* out) {            \
        convolve<T>(M, B, F, G, S, weight, bias, out, [=](int64_t i, int64_t b, auto f) {         \
            for (int64_t e = rowptr[i]; e < rowptr[i + 1]; ++e)                                   \
                f(x + (col[e] * B + b) * F, slot[e]);                                             \
        });                                                                                       \
    }                                                                                             \
    void outer_##NAME(int64_t M, int64_t B, int64_t F, int64_t G, int64_t S, const T* const* x,   \
                      const T* const* g, const int64_t* index, T* out) {                          \
        outer<T>(M, B, F, G, S, x, g, index, out);                                                \
    }                                                                                             \
    void topk_##NAME(int64_t M, int64_t N, int64_t c, int64_t k, int64_t K, const T* query,       \
                     const T* key, T* last_query, T* last_key, int32_t* candidates,               \
                     double* angle, int64_t* index, T* score, int64_t* searched) {                \
        topk<T>(M, N, c, k, K, query, key, last_query, last_key, candidates, angle, index, score, \
                searched);                                                                        \
    }                                                                                             \
    void attention_##NAME(int64_t M, int64_t k, int64_t P, const T* score, const T* prior,        \
                          double scale, double share, T* weight) {                                \
        attention<T>(M, k, P, score, prior, scale, share, weight);                                \
    }                                                                                             \
    void attention_backward_##NAME(                                                               \
        int64_t M, int64_t N, int64_t c, int64_t k, int64_t P, const T* query, const T* key,      \
        const int64_t* index, const T* score, const T* prior, double scale, double share,         \
        const T* grad, const int64_t* rowptr_t, const int64_t* col_t, const int64_t* perm,        \
        T* grad_query, T* grad_key, T* grad_scalars) {                                            \
        attention_backward<T>(M, N, c, k, P, query, key, index, score, prior, scale, share, grad, \
                              rowptr_t, col_t, perm, grad_query, grad_key, grad_scalars);         \
    }

extern "C" {
void pyg_attnpool_3() {}  // the version that _cpu.py looks for

FOR_TYPE(float, float)
FOR_TYPE(double, double)

void transpose_pattern(int64_t M, int64_t N, const int64_t* rowptr, const int64_t* col,
                       int64_t* rowptr_t, int64_t* col_t, int64_t* perm) {
    transpose(M, N, rowptr, col, rowptr_t, col_t, perm);
}
}
