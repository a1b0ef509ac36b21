// The whole decoder of one mesh in one call: no allocation, no Python in between, one thread. Rows of
// features are filled up with zeros to whole vectors, so that every loop over channels runs over
// vectors; a convolution multiplies rows as soon as it has them, while they are in the registers.

#include "simd.h"

namespace {

using F = float;
constexpr int64_t WIDTH = Simd<F>::width;
constexpr int64_t BLOCK = 8;  // rows that share one load of the weights

// One step, as ops/decoder.py makes it. Indices have been checked there.
struct Step {
    int64_t kind;        // one of Kind
    int64_t rows;        // vertices of the output
    int64_t in, out;     // channels, filled up to whole vectors
    int64_t slots;       // Chebyshev terms, vertices of a spiral, or latent channels
    int64_t activation;  // one of Activation
    const int32_t *rowptr, *col;
    const F *value, *weight, *bias;
};

enum Kind : int64_t { DENSE, PRODUCT, CHEBYSHEV, SPIRAL, FINISH };
enum Activation : int64_t { NONE, RELU, ELU };

typedef int32_t Ints __attribute__((vector_size(BYTES)));

// exp(x) - 1 for x <= 0: exp(r) 2^n with |r| <= log(2) / 2. The polynomial is that of Cephes' expf.
inline Vector<F> expm1_of_negative(Vector<F> x) {
    const Vector<F> low = Vector<F>{} - 87.0f;
    x = x < low ? low : x;
    const F shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Vector<F> n = (x * 1.44269504f + shift) - shift;
    const Vector<F> r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Vector<F> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r;
    const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
    Vector<F> power;
    std::memcpy(&power, &bits, sizeof(power));
    return p * power + (power - 1.0f);
}

inline Vector<F> activate(Vector<F> x, int64_t activation) {
    const Vector<F> zero = {};
    if (activation == RELU) return x > zero ? x : zero;
    if (activation == ELU) return x > zero ? x : expm1_of_negative(x > zero ? zero : x);
    return x;
}

// `U` vectors of a row of a sparse product. Unlike spmm_block, which serves rows of many samples, it
// prefetches nothing: the rows of one mesh are in the cache.
template <int U>
inline void product(int64_t begin, int64_t end, int64_t C, const int32_t* col, const F* value,
                    const F* x, F scale, const F* minus, F* out) {
    Vector<F> sum[U] = {};
    for (int64_t e = begin; e < end; ++e) {
        const F* row = x + col[e] * C;
        for (int u = 0; u < U; ++u) sum[u] += value[e] * load(row + u * WIDTH);
    }
    for (int u = 0; u < U; ++u) {
        const Vector<F> y = scale * sum[u];
        store(out + u * WIDTH, minus ? y - load(minus + u * WIDTH) : y);
    }
}

inline void product_row(const Step& s, int64_t i, int64_t C, const F* x, F scale, const F* minus,
                        F* out) {
    int64_t c = 0;
    auto blocks = [&](auto vectors) {
        constexpr int U = decltype(vectors)::value;
        for (; c + U * WIDTH <= C; c += U * WIDTH)
            product<U>(s.rowptr[i], s.rowptr[i + 1], C, s.col, s.value, x + c, scale,
                       minus ? minus + c : nullptr, out + c);
    };
    blocks(std::integral_constant<int, 4>());
    blocks(std::integral_constant<int, 2>());
    blocks(std::integral_constant<int, 1>());
}

// Adds one vector's width of the columns of a matrix [in, out], multiplied by `R` rows.
template <int R>
inline void add_product(int64_t in, int64_t out, const F* const* x, const F* w, Vector<F>* sum) {
    for (int64_t f = 0; f < in; ++f) {
        const Vector<F> column = load(w + f * out);
        for (int r = 0; r < R; ++r) sum[r] += x[r][f] * column;
    }
}

// Adds `R` rows times a matrix [in, out] to rows of the output, and activates the last sum.
template <int R>
inline void multiply(int64_t in, int64_t out, const F* const* x, const F* w, const F* first, F* y,
                     int64_t activation) {
    for (int64_t g = 0; g < out; g += WIDTH) {
        Vector<F> sum[R];
        for (int r = 0; r < R; ++r) sum[r] = load(first ? first + g : y + r * out + g);
        add_product<R>(in, out, x, w + g, sum);
        for (int r = 0; r < R; ++r) store(y + r * out + g, activate(sum[r], activation));
    }
}

// Calls f(i, number of rows) for blocks of rows.
template <class Rows>
inline void each_block(int64_t rows, const Rows& f) {
    int64_t i = 0;
    for (; i + BLOCK <= rows; i += BLOCK) f(i, std::integral_constant<int, BLOCK>());
    for (; i < rows; ++i) f(i, std::integral_constant<int, 1>());
}

// T_0 lies in x; T_k takes the place of T_{k-2}.
void chebyshev(const Step& s, F* x, F* other, F* y) {
    F *last = other, *term = x;
    for (int64_t k = 0; k < s.slots; ++k) {
        if (k > 0) std::swap(last, term);
        const F scale = k > 1 ? 2 : 1;
        const int64_t activation = k + 1 == s.slots ? s.activation : NONE;
        each_block(s.rows, [&](int64_t i, auto block) {
            constexpr int R = decltype(block)::value;
            const F* rows[R];
            for (int r = 0; r < R; ++r) {
                F* row = term + (i + r) * s.in;
                if (k > 0) product_row(s, i + r, s.in, last, scale, k > 1 ? row : nullptr, row);
                rows[r] = row;
            }
            multiply<R>(s.in, s.out, rows, s.weight + k * s.in * s.out, k ? nullptr : s.bias,
                        y + i * s.out, activation);
        });
    }
}

// Row `source` of x is zero, and stands for no vertex.
void spiral(const Step& s, const F* x, F* y) {
    each_block(s.rows, [&](int64_t i, auto block) {
        constexpr int R = decltype(block)::value;
        for (int64_t g = 0; g < s.out; g += WIDTH) {
            Vector<F> sum[R];
            for (int r = 0; r < R; ++r) sum[r] = load(s.bias + g);
            for (int64_t l = 0; l < s.slots; ++l) {
                const F* rows[R];
                for (int r = 0; r < R; ++r) rows[r] = x + s.col[(i + r) * s.slots + l] * s.in;
                add_product<R>(s.in, s.out, rows, s.weight + l * s.in * s.out + g, sum);
            }
            for (int r = 0; r < R; ++r)
                store(y + (i + r) * s.out + g, activate(sum[r], s.activation));
        }
    });
}

// A bias plus the columns of a matrix [slots, size] times the latent code, added to what is there
// if `add`.
void dense(const Step& s, int64_t size, const F* z, F* y, bool add) {
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) {
        Vector<F> sum = load(s.bias + i);
        for (int64_t d = 0; d < s.slots; ++d) sum += z[d] * load(s.weight + d * size + i);
        sum = activate(sum, s.activation);
        store(y + i, add ? sum + load(y + i) : sum);
    }
    for (; i < size; ++i) {
        F sum = s.bias[i];
        for (int64_t d = 0; d < s.slots; ++d) sum += z[d] * s.weight[d * size + i];
        y[i] = add ? sum + y[i] : sum;
    }
}

// Scales and shifts the features of every vertex.
void finish(const Step& s, int64_t C, const F* x, F* y, bool add) {
    for (int64_t i = 0; i < s.rows; ++i) {
        for (int64_t c = 0; c < C; ++c) {
            const int64_t j = i * C + c;
            const F v = s.weight[j] * x[i * s.in + c] + s.bias[j];
            y[j] = add ? y[j] + v : v;
        }
    }
}

}  // namespace

extern "C" {

int64_t decoder_width() { return WIDTH; }

// A number that changes with any of n arrays of `words` 32-bit numbers.
uint64_t checksum(int64_t n, const int64_t* words, const uint32_t* const* arrays) {
    typedef uint32_t Words __attribute__((vector_size(BYTES)));
    typedef uint32_t Unaligned __attribute__((vector_size(BYTES), aligned(4), may_alias));
    constexpr int64_t U = 4;  // products that wait for each other no more
    Words hash[U] = {};
    uint64_t sum = 14695981039346656037u;
    auto mix = [&](uint32_t word) { sum = (sum ^ word) * 1099511628211u; };
    for (int64_t a = 0; a < n; ++a) {
        int64_t i = 0;
        for (; i + U * WIDTH <= words[a]; i += U * WIDTH)
            for (int64_t u = 0; u < U; ++u)
                hash[u] = hash[u] * 16777619u
                        + *reinterpret_cast<const Unaligned*>(arrays[a] + i + u * WIDTH);
        for (; i < words[a]; ++i) mix(arrays[a][i]);
    }
    for (int64_t u = 0; u < U; ++u)
        for (int64_t w = 0; w < WIDTH; ++w) mix(hash[u][w]);
    return sum;
}

// Latent codes [B, latent] to vertices [B, N, C], of which `size` is N C. Each of the threads has
// three buffers of `buffer` numbers in `scratch`. A path ends with FINISH, which scales and shifts
// its features, or with a DENSE of no vertices; what a later path gives is added.
void decode(int64_t steps, int64_t B, int64_t latent, int64_t size, int64_t buffer,
            int64_t threads, const Step* step, const F* z, F* out, F* scratch) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < B; ++b) {
        F* x = scratch + thread() * 3 * buffer;
        F *y = x + buffer, *other = y + buffer;
        const F* code = z + b * latent;
        F* to = out + b * size;
        bool add = false;
        for (const Step* s = step; s < step + steps; ++s) {
            switch (s->kind) {
                case DENSE:
                    if (s->rows) {
                        dense(*s, s->rows * s->out, code, y, false);
                    } else {
                        dense(*s, size, code, to, add);
                        add = true;
                    }
                    break;
                case PRODUCT:
                    for (int64_t i = 0; i < s->rows; ++i)
                        product_row(*s, i, s->in, x, 1, nullptr, y + i * s->in);
                    break;
                case CHEBYSHEV: chebyshev(*s, x, other, y); break;
                case SPIRAL:
                    std::fill_n(x + s->rows * s->in, s->in, F(0));
                    spiral(*s, x, y);
                    break;
                case FINISH:
                    finish(*s, size / s->rows, x, to, add);
                    add = true;
                    break;
            }
            std::swap(x, y);
        }
    }
}
}
