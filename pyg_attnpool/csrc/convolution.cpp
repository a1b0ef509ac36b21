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

// The same of `S` slots at once, where one side has only `D` numbers: sums of one slot would be too
// few to keep the processor busy. `wide` has one vector's width in every sample.
template <class T, int S, int D>
inline void narrow_tile(int64_t B, const T* const* wide, int64_t wide_stride,
                        const T* const* narrow, int64_t narrow_stride, Vector<T> (*sum)[D]) {
    for (int64_t b = 0; b < B; ++b)
        for (int s = 0; s < S; ++s) {
            const Vector<T> v = load(wide[s] + b * wide_stride);
            for (int d = 0; d < D; ++d) sum[s][d] += narrow[s][b * narrow_stride + d] * v;
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
    const std::vector<T> zeros(B * F, 0);  // the features of no vertex
    // Static, and summed in the order of the threads, so that the result repeats.
#pragma omp parallel for schedule(static) if (M * B * S * F * G > SERIAL)
    for (int64_t block = 0; block < blocks; ++block) {
        T* part = parts[thread()].data();
        const int64_t begin = block * BLOCK, end = std::min(M, begin + BLOCK);
        auto row = [&](int64_t i, int64_t s) {
            const int64_t j = index ? index[i * S + s] : i;
            return j < 0 ? zeros.data() : x[s] + j * B * F;
        };
        // Slots from s on; `into(slot, place on the narrow side, sum)` takes the sums.
        auto narrow = [&](auto slots, auto size, int64_t s, bool of_x, int64_t wide_at,
                          int64_t narrow_at, auto into) {
            constexpr int N = decltype(slots)::value, D = decltype(size)::value;
            Vector<T> sum[N][D] = {};
            for (int64_t i = begin; i < end; ++i) {
                const T *wide[N], *small[N];
                for (int n = 0; n < N; ++n) {
                    const T *a = row(i, s + n), *b = g[s + n] + i * B * G;
                    wide[n] = (of_x ? b : a) + wide_at;
                    small[n] = (of_x ? a : b) + narrow_at;
                }
                narrow_tile<T, N, D>(B, wide, of_x ? G : F, small, of_x ? F : G, sum);
            }
            for (int n = 0; n < N; ++n)
                for (int d = 0; d < D; ++d) into(s + n, narrow_at + d, sum[n][d]);
        };
        auto all_slots = [&](bool of_x, int64_t wide_at, auto into) {
            int64_t s = 0;
            auto some = [&](auto slots) {
                constexpr int N = decltype(slots)::value;
                for (; s + N <= S; s += N) {
                    const int64_t size = of_x ? F : G;
                    int64_t d = 0;
                    for (; d + 3 <= size; d += 3)
                        narrow(slots, std::integral_constant<int, 3>(), s, of_x, wide_at, d, into);
                    for (; d < size; ++d)
                        narrow(slots, std::integral_constant<int, 1>(), s, of_x, wide_at, d, into);
                }
            };
            some(std::integral_constant<int, 4>());
            some(std::integral_constant<int, 1>());
        };
        int64_t c = 0;
        for (; c + W <= G; c += W) {
            if (F <= 6) {
                all_slots(true, c, [&](int64_t s, int64_t f, Vector<T> sum) {
                    T* to = part + (s * F + f) * G + c;
                    store(to, load(to) + sum);
                });
                continue;
            }
            for (int64_t s = 0; s < S; ++s) {
                auto tile = [&](auto rows, int64_t f) {
                    constexpr int R = decltype(rows)::value;
                    Vector<T> sum[R] = {};
                    for (int64_t i = begin; i < end; ++i) {
                        const int64_t j = index ? index[i * S + s] : i;
                        if (j < 0) continue;
                        outer_tile<T, R>(B, F, G, x[s] + j * B * F + f, g[s] + i * B * G + c, sum);
                    }
                    T* to = part + (s * F + f) * G + c;
                    for (int r = 0; r < R; ++r) store(to + r * G, load(to + r * G) + sum[r]);
                };
                int64_t f = 0;
                for (; f + ROWS <= F; f += ROWS) tile(std::integral_constant<int, ROWS>(), f);
                for (; f + 3 <= F; f += 3) tile(std::integral_constant<int, 3>(), f);
                for (; f < F; ++f) tile(std::integral_constant<int, 1>(), f);
            }
        }
        if (c == G) continue;
        // The last columns, which fill no vector: vectors of the features instead.
        int64_t f = 0;
        for (; f + W <= F; f += W)
            all_slots(false, f, [&](int64_t s, int64_t d, Vector<T> sum) {
                if (d < c) return;
                for (int w = 0; w < W; ++w) part[(s * F + f + w) * G + d] += sum[w];
            });
        for (int64_t s = 0; s < S; ++s)
            for (int64_t i = begin; i < end; ++i) {
                const T *a = row(i, s), *b = g[s] + i * B * G;
                for (int64_t r = 0; r < B; ++r)
                    for (int64_t e = f; e < F; ++e)
                        for (int64_t d = c; d < G; ++d)
                            part[(s * F + e) * G + d] += a[r * F + e] * b[r * G + d];
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
