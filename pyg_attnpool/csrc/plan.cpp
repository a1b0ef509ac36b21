// A whole encoder or decoder of one mesh in one call: no allocation, no Python in between, one
// thread. Rows of features are filled up with zeros to whole vectors, so that every loop over
// channels runs over vectors; a convolution multiplies rows as soon as it has them, while they are
// in the registers.

#include "simd.h"

namespace {

using F = float;
constexpr int WIDTH = Simd<F>::width;
constexpr int64_t BLOCK = 8;  // rows that share one load of the weights

// One step, as models/compiled.py makes it. Indices have been checked there. Features [rows, in]
// and [rows, out] lie in scratch memory, at `source` and `target`; `work` is a place for more.
struct Step {
    int64_t kind;        // one of Kind
    int64_t rows;        // vertices of the output
    int64_t in, out;     // channels, filled up
    int64_t channels;    // channels that are in use: of the input, in FINISH and DOTS of the output
    int64_t slots;       // Chebyshev terms, vertices of a spiral, or inputs of a linear layer
    int64_t activation;  // one of Activation
    int64_t add;         // whether to add to what the target holds
    int64_t source, target, work;
    // The rows of a sparse matrix stand in an order in which most have as many entries as those
    // beside them, since a processor that guesses the end of a row wrong waits longer than the row
    // takes. `order` has the place of each. `col` holds the place of a row of features in numbers.
    const int32_t *order, *rowptr, *col;
    const F *value, *weight, *bias;
};

constexpr int64_t INPUT = -1, OUTPUT = -2;  // places outside of scratch memory

enum Kind : int64_t {
    STANDARDIZE, DENSE, DOTS, PRODUCT, CHEBYSHEV, TERMS, SPIRAL, PROJECT, CLENSHAW, PICK, FINISH
};
enum Activation : int64_t { NONE, RELU, ELU, SILU };

// Vectors of `W` numbers, of which rows of few channels take narrow ones.
template <int W>
struct Lanes {
    typedef F Vector __attribute__((vector_size(W * sizeof(F))));
    typedef F Unaligned __attribute__((vector_size(W * sizeof(F)), aligned(4), may_alias));
    typedef int32_t Ints __attribute__((vector_size(W * sizeof(F))));

    static Vector load(const F* p) { return *reinterpret_cast<const Unaligned*>(p); }
    static void store(F* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
};
template <int W>
using Vec = typename Lanes<W>::Vector;

// Calls f with the width of the vectors that rows of C channels consist of.
template <class Function>
inline void by_width(int64_t C, const Function& f) {
    if (C % WIDTH == 0) return f(std::integral_constant<int, WIDTH>());
    if constexpr (WIDTH > 8)
        if (C == 8) return f(std::integral_constant<int, 8>());
    f(std::integral_constant<int, 4>());
}

// exp(x) = power (1 + p) for x <= 0, with a polynomial p in |r| <= log(2) / 2, that of Cephes' expf.
template <int W>
inline void exponential(Vec<W> x, Vec<W>& power, Vec<W>& p) {
    const Vec<W> low = Vec<W>{} - 87.0f;
    x = x < low ? low : x;
    const F shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Vec<W> n = (x * 1.44269504f + shift) - shift;
    const Vec<W> r = x - n * 0.693359375f - n * -2.12194440e-4f;
    p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r;
    using Ints = typename Lanes<W>::Ints;
    const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
    std::memcpy(&power, &bits, sizeof(power));
}

template <int W>
inline Vec<W> activate(Vec<W> x, int64_t activation) {
    const Vec<W> zero = {};
    if (activation == NONE) return x;
    // Each keeps NaN, of which no comparison is true.
    if (activation == RELU) return x < zero ? zero : x;
    Vec<W> power, p;
    if (activation == ELU) {
        exponential<W>(x > zero ? zero : x, power, p);
        return x > zero ? x : p * power + (power - 1.0f);
    }
    exponential<W>(x > zero ? -x : x, power, p);
    const Vec<W> e = p * power + power;
    return x * (x > zero ? zero + 1.0f : e) / (1.0f + e);
}

// Rows of a sparse product ////////////////////////////////////////////////////////////////////////

// What becomes of the sums of entries: y = activation(scale sum + plus - minus), by row.
struct Into {
    F scale;
    const F *plus, *minus;
    F* y;
    int64_t activation;
};

// `R` rows of as many entries each, `W` of their numbers. Unlike spmm_block, which serves rows of
// many samples, it prefetches nothing: the rows of one mesh are in the cache.
template <int W, int R>
inline void product_block(const Step& s, int64_t i, int64_t C, const F* x, int64_t c, Into to) {
    using L = Lanes<W>;
    const int64_t first = s.rowptr[i], length = s.rowptr[i + 1] - first;
    const int32_t* col = s.col + first;
    const F* value = s.value + first;
    Vec<W> sum[R] = {};
    for (int64_t e = 0; e < length; ++e)
        for (int r = 0; r < R; ++r)
            sum[r] += value[r * length + e] * L::load(x + col[r * length + e] + c);
    for (int r = 0; r < R; ++r) {
        const int64_t at = s.order[i + r] * C + c;
        Vec<W> y = to.scale * sum[r];
        if (to.plus) y += L::load(to.plus + at);
        if (to.minus) y -= L::load(to.minus + at);
        L::store(to.y + at, activate<W>(y, to.activation));
    }
}

// `R` rows from the i-th of the order on.
template <int W, int R>
inline void product_rows(const Step& s, int64_t i, int64_t C, const F* x, const Into& to) {
    constexpr int HALF = R > 4 ? 4 : R;
    for (int64_t j = i; j < i + R; j += HALF) {
        const int64_t length = s.rowptr[j + 1] - s.rowptr[j];
        bool equal = true;
        for (int r = 1; r < HALF; ++r) equal &= s.rowptr[j + r + 1] - s.rowptr[j + r] == length;
        for (int64_t c = 0; c < C; c += W) {
            if (equal) product_block<W, HALF>(s, j, C, x, c, to);
            else
                for (int r = 0; r < HALF; ++r) product_block<W, 1>(s, j + r, C, x, c, to);
        }
    }
}

// Calls f(i, number of rows) for blocks of rows.
template <class Rows>
inline void each_block(int64_t rows, const Rows& f) {
    int64_t i = 0;
    for (; i + BLOCK <= rows; i += BLOCK) f(i, std::integral_constant<int, BLOCK>());
    for (; i < rows; ++i) f(i, std::integral_constant<int, 1>());
}

void products(const Step& s, int64_t C, const F* x, const Into& to) {
    by_width(C, [&](auto width) {
        each_block(s.rows, [&](int64_t i, auto block) {
            product_rows<decltype(width)::value, decltype(block)::value>(s, i, C, x, to);
        });
    });
}

// Products of rows with weights ///////////////////////////////////////////////////////////////////

// Adds one vector's width of the columns of a matrix [channels, out], multiplied by `R` rows.
template <int R>
inline void add_product(int64_t channels, int64_t out, const F* const* x, const F* w,
                        Vector<F>* sum) {
    for (int64_t f = 0; f < channels; ++f) {
        const Vector<F> column = load(w + f * out);
        for (int r = 0; r < R; ++r) sum[r] += x[r][f] * column;
    }
}

// T_0 lies in x; T_k takes the place of T_{k-2}. Every term is multiplied when it is made.
void chebyshev(const Step& s, F* x, F* other, F* y) {
    F *last = other, *term = x;
    for (int64_t k = 0; k < s.slots; ++k) {
        if (k > 0) std::swap(last, term);
        const Into into = {F(k > 1 ? 2 : 1), nullptr, k > 1 ? term : nullptr, term, NONE};
        const F* w = s.weight + k * s.channels * s.out;
        const int64_t activation = k + 1 == s.slots ? s.activation : NONE;
        each_block(s.rows, [&](int64_t i, auto block) {
            constexpr int R = decltype(block)::value;
            if (k > 0) product_rows<WIDTH, R>(s, i, s.in, last, into);
            const F* rows[R];
            for (int r = 0; r < R; ++r) rows[r] = term + s.order[i + r] * s.in;
            for (int64_t g = 0; g < s.out; g += WIDTH) {
                Vector<F> sum[R];
                for (int r = 0; r < R; ++r)
                    sum[r] = load(k ? y + s.order[i + r] * s.out + g : s.bias + g);
                add_product<R>(s.channels, s.out, rows, w + g, sum);
                for (int r = 0; r < R; ++r)
                    store(y + s.order[i + r] * s.out + g, activate<WIDTH>(sum[r], activation));
            }
        });
    }
}

// Sums over the slots of a row: `find(i, slot)` is the row of features that a slot of row i meets.
template <class Find>
void convolve(const Step& s, const Find& find, F* y) {
    each_block(s.rows, [&](int64_t i, auto block) {
        constexpr int R = decltype(block)::value;
        for (int64_t g = 0; g < s.out; g += WIDTH) {
            Vector<F> sum[R];
            for (int r = 0; r < R; ++r) sum[r] = load(s.bias + g);
            for (int64_t l = 0; l < s.slots; ++l) {
                const F* rows[R];
                for (int r = 0; r < R; ++r) rows[r] = find(i + r, l);
                add_product<R>(s.channels, s.out, rows, s.weight + l * s.channels * s.out + g, sum);
            }
            for (int r = 0; r < R; ++r)
                store(y + (i + r) * s.out + g, activate<WIDTH>(sum[r], s.activation));
        }
    });
}

// The Chebyshev terms of few channels, all before any is multiplied: T_0 in x, the others in `more`.
void terms(const Step& s, const F* x, F* more, F* y) {
    const int64_t size = s.rows * s.in;
    auto term = [&](int64_t k) { return k ? more + (k - 1) * size : x; };
    for (int64_t k = 1; k < s.slots; ++k)
        products(s, s.in, term(k - 1),
                 {F(k > 1 ? 2 : 1), nullptr, k > 1 ? term(k - 2) : nullptr, more + (k - 1) * size, NONE});
    convolve(s, [&](int64_t i, int64_t k) { return term(k) + i * s.in; }, y);
}

// Row `rows` of x is zero, and stands for no vertex.
void spiral(const Step& s, F* x, F* y) {
    std::fill_n(x + s.rows * s.in, s.in, F(0));
    convolve(s, [&](int64_t i, int64_t l) { return x + s.col[i * s.slots + l]; }, y);
}

// Every row times the weights of all slots, [channels, slots * out] filled up, into one plane of
// rows + 1 rows for each slot. The last row of a plane is zero.
void project(const Step& s, const F* x, F* y) {
    const int64_t columns = (s.slots * s.out + WIDTH - 1) / WIDTH * WIDTH;
    const int64_t plane = (s.rows + 1) * s.out;
    for (int64_t k = 0; k < s.slots; ++k) std::fill_n(y + k * plane + s.rows * s.out, s.out, F(0));
    by_width(s.out, [&](auto width) {
        constexpr int W = decltype(width)::value;
        each_block(s.rows, [&](int64_t i, auto block) {
            constexpr int R = decltype(block)::value;
            const F* rows[R];
            for (int r = 0; r < R; ++r) rows[r] = x + (i + r) * s.in;
            for (int64_t g = 0; g < columns; g += WIDTH) {
                Vector<F> sum[R] = {};
                add_product<R>(s.channels, columns, rows, s.weight + g, sum);
                F* to = y + g / s.out * plane + i * s.out + g % s.out;
                const int64_t slots = std::min<int64_t>(WIDTH / W, (s.slots * s.out - g) / W);
                for (int r = 0; r < R; ++r) {
                    F row[WIDTH];
                    store(row, sum[r]);
                    for (int64_t k = 0; k < slots; ++k)
                        Lanes<W>::store(to + k * plane + r * s.out, Lanes<W>::load(row + k * W));
                }
            }
        });
    });
}

// b_k = y_k + 2 A b_{k+1} - b_{k+2}, every one in the place of its product y_k. The first has A for
// 2 A. The bias stands in y_0.
void clenshaw(const Step& s, F* planes, F* y) {
    const int64_t plane = (s.rows + 1) * s.out;
    by_width(s.out, [&](auto width) {
        constexpr int W = decltype(width)::value;
        for (int64_t i = 0; i < s.rows; ++i)
            for (int64_t g = 0; g < s.out; g += W) {
                F* to = planes + i * s.out + g;
                const Vec<W> v = Lanes<W>::load(to) + Lanes<W>::load(s.bias + g);
                Lanes<W>::store(to, v);
                if (s.slots == 1) Lanes<W>::store(y + i * s.out + g, activate<W>(v, s.activation));
            }
    });
    for (int64_t k = s.slots - 2; k >= 0; --k) {
        F* b = planes + k * plane;
        const F* after = k + 2 < s.slots ? b + 2 * plane : nullptr;
        if (k > 0) products(s, s.out, b + plane, {2, b, after, b, NONE});
        else products(s, s.out, b + plane, {1, b, after, y, s.activation});
    }
}

// The sum of what the slots of a spiral meet in their planes.
void pick(const Step& s, const F* planes, F* y) {
    const int64_t plane = (s.rows + 1) * s.out;
    by_width(s.out, [&](auto width) {
        constexpr int W = decltype(width)::value;
        each_block(s.rows, [&](int64_t i, auto block) {
            constexpr int R = decltype(block)::value;
            for (int64_t g = 0; g < s.out; g += W) {
                Vec<W> sum[R];
                for (int r = 0; r < R; ++r) sum[r] = Lanes<W>::load(s.bias + g);
                for (int64_t l = 0; l < s.slots; ++l)
                    for (int r = 0; r < R; ++r)
                        sum[r] += Lanes<W>::load(planes + l * plane + s.col[(i + r) * s.slots + l] + g);
                for (int r = 0; r < R; ++r)
                    Lanes<W>::store(y + (i + r) * s.out + g, activate<W>(sum[r], s.activation));
            }
        });
    });
}

// Linear layers on all numbers of a mesh or a code //////////////////////////////////////////////////

// `out` numbers: a bias plus the columns of the weights, which lie in blocks of four vectors, each
// [slots, width of the block], so that they are read in order.
void dense(const Step& s, const F* x, F* y) {
    constexpr int64_t U = 4;
    auto block = [&](int64_t i, int64_t width, auto vectors, int64_t c) {
        constexpr int R = decltype(vectors)::value;
        const F* w = s.weight + i * s.slots + c;
        Vector<F> sum[R];
        for (int r = 0; r < R; ++r) sum[r] = load(s.bias + i + c + r * WIDTH);
        for (int64_t d = 0; d < s.slots; ++d)
            for (int r = 0; r < R; ++r) sum[r] += x[d] * load(w + d * width + r * WIDTH);
        for (int r = 0; r < R; ++r) {
            F* to = y + i + c + r * WIDTH;
            const Vector<F> v = activate<WIDTH>(sum[r], s.activation);
            store(to, s.add ? v + load(to) : v);
        }
    };
    int64_t i = 0;
    for (; i + U * WIDTH <= s.out; i += U * WIDTH)
        block(i, U * WIDTH, std::integral_constant<int, U>(), 0);
    const int64_t width = s.out - i;
    int64_t c = 0;
    for (; c + WIDTH <= width; c += WIDTH) block(i, width, std::integral_constant<int, 1>(), c);
    for (; c < width; ++c) {
        Vec<4> sum = {s.bias[i + c]};
        for (int64_t d = 0; d < s.slots; ++d) sum[0] += x[d] * s.weight[i * s.slots + d * width + c];
        const F v = activate<4>(sum, s.activation)[0];
        y[i + c] = s.add ? v + y[i + c] : v;
    }
}

// Few numbers, each a bias plus the product of all inputs with a row of the weights.
void row_products(const Step& s, const F* x, F* y) {
    Vec<4> sum = {};
    auto finish = [&](int64_t i, F product) {
        sum[0] = s.bias[i] + product;
        const F v = activate<4>(sum, s.activation)[0];
        y[i] = s.add ? v + y[i] : v;
    };
    constexpr int R = 8;
    int64_t i = 0;
    F out[R];
    for (; i + R <= s.channels; i += R) {
        const F* rows[R];
        for (int r = 0; r < R; ++r) rows[r] = s.weight + (i + r) * s.slots;
        dots<F, R>(x, rows, s.slots, out);
        for (int r = 0; r < R; ++r) finish(i + r, out[r]);
    }
    for (; i < s.channels; ++i) finish(i, dot(x, s.weight + i * s.slots, s.slots));
    if (!s.add) std::fill(y + s.channels, y + s.out, F(0));
}

// In and out of filled up rows ////////////////////////////////////////////////////////////////////

// (x - bias) * weight of rows [rows, channels], filled up.
void standardize(const Step& s, const F* x, F* y) {
    int64_t i = 0;
    if (s.channels == 3 && s.out == 4) {
        using L = Lanes<4>;
        for (; i + 1 < s.rows; ++i)
            L::store(y + 4 * i,
                     (L::load(x + 3 * i) - L::load(s.bias + 4 * i)) * L::load(s.weight + 4 * i));
    }
    for (; i < s.rows; ++i)
        for (int64_t c = 0; c < s.out; ++c) {
            const int64_t j = i * s.out + c;
            y[j] = c < s.channels ? (x[i * s.channels + c] - s.bias[j]) * s.weight[j] : F(0);
        }
}

// weight * x + bias of every feature, packed.
void finish(const Step& s, const F* x, F* y) {
    int64_t i = 0;
    if (s.channels == 3 && s.in == 4 && !s.add) {
        using L = Lanes<4>;
        // The next row overwrites the fourth number.
        for (; i + 1 < s.rows; ++i)
            L::store(y + 3 * i, L::load(s.weight + 3 * i) * L::load(x + 4 * i)
                                    + L::load(s.bias + 3 * i));
    }
    for (; i < s.rows; ++i)
        for (int64_t c = 0; c < s.channels; ++c) {
            const int64_t j = i * s.channels + c;
            const F v = s.weight[j] * x[i * s.in + c] + s.bias[j];
            y[j] = s.add ? y[j] + v : v;
        }
}

void run(const Step& s, F* x, F* y, F* work) {
    switch (s.kind) {
        case STANDARDIZE: return standardize(s, x, y);
        case DENSE: return dense(s, x, y);
        case DOTS: return row_products(s, x, y);
        case PRODUCT: return products(s, s.in, x, {1, nullptr, nullptr, y, NONE});
        case CHEBYSHEV: return chebyshev(s, x, work, y);
        case TERMS: return terms(s, x, work, y);
        case SPIRAL: return spiral(s, x, y);
        case PROJECT: return project(s, x, y);
        case CLENSHAW: return clenshaw(s, x, y);
        case PICK: return pick(s, x, y);
        case FINISH: return finish(s, x, y);
    }
}

}  // namespace

extern "C" {

int64_t plan_width() { return WIDTH; }

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

// Runs a plan on B samples of `in` numbers, each to `out` numbers. Every thread has `size` numbers
// of scratch memory.
void run_plan(int64_t steps, int64_t B, int64_t in, int64_t out, int64_t size, int64_t threads,
              const Step* step, const F* x, F* y, F* scratch) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < B; ++b) {
        auto at = [&](int64_t place) {
            if (place == INPUT) return const_cast<F*>(x + b * in);  // which no step writes to
            return place == OUTPUT ? y + b * out : scratch + thread() * size + place;
        };
        for (const Step* s = step; s < step + steps; ++s)
            run(*s, at(s->source), at(s->target), at(s->work));
    }
}
}
