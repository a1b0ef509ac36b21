// The products of a convolution: rows times the weights of their slots, and the weights' gradient.

#include "simd.h"

namespace {

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

}  // namespace

#define FUNCTIONS(T)                                                                              \
    int64_t convolve_slots_##T(int64_t M, int64_t B, int64_t F, int64_t G, int64_t S,             \
                               const T* const* x, const T* weight, const T* bias, T* out) {       \
        convolve<T>(M, B, F, G, S, weight, bias, out, [=](int64_t i, int64_t b, auto f) {         \
            for (int64_t s = 0; s < S; ++s) f(x[s] + (i * B + b) * F, s);                         \
        });                                                                                       \
        return DONE;                                                                              \
    }                                                                                             \
    int64_t convolve_entries_##T(int64_t M, int64_t B, int64_t F, int64_t G, int64_t S,           \
                                 int64_t N, int64_t E, const int64_t* rowptr, const int64_t* col, \
                                 const int64_t* slot, const T* x, const T* weight, const T* bias, \
                                 T* out) {                                                        \
        if (!is_pattern(M, N, E, rowptr, col) || !inside(E, slot, S)) return OUT_OF_RANGE;        \
        convolve<T>(M, B, F, G, S, weight, bias, out, [=](int64_t i, int64_t b, auto f) {         \
            for (int64_t e = rowptr[i]; e < rowptr[i + 1]; ++e)                                   \
                f(x + (col[e] * B + b) * F, slot[e]);                                             \
        });                                                                                       \
        return DONE;                                                                              \
    }                                                                                             \
    int64_t outer_##T(int64_t M, int64_t B, int64_t F, int64_t G, int64_t S, int64_t N,           \
                      const T* const* x, const T* const* g, const int64_t* index, T* out) {       \
        if (index ? !inside(M * S, index, N, -1) : N != M) return OUT_OF_RANGE;                   \
        outer<T>(M, B, F, G, S, x, g, index, out);                                                \
        return DONE;                                                                              \
    }

extern "C" {
FUNCTIONS(float)
FUNCTIONS(double)
}
