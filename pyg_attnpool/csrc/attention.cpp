// The weights at what the search found, and their gradients.

#include "simd.h"

namespace {

// Slots are the k of the attention and then the P of the prior. `scale` is beta of the softmax, or
// negative where scores are divided by their sum; `share` is that of the attention.
template <class T>
inline void attend(int64_t k, T scale, const T* score, T* weight) {
    T sum = 0;
    if (!(scale < 0)) {  // nor where it is no number
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

// The gradients of one row: those of its scores `d` [k], and of share and logarithm of the scale,
// from those of its weights. Sums nearly cancel, and are formed in double precision.
template <class T>
inline void through_weights(int64_t k, int64_t P, T scale, T share, const T* score, const T* prior,
                            const T* attended, const T* grad, T* d, double* of_share,
                            double* of_scale) {
    double mean = 0, of_prior = 0, norm = 0;
    for (int64_t e = 0; e < k; ++e) {
        mean += double(grad[e]) * attended[e];
        norm += std::max(score[e], T(1e-25));
    }
    for (int64_t e = 0; e < P; ++e) of_prior += double(grad[k + e]) * prior[e];
    *of_share += mean - of_prior;
    for (int64_t e = 0; e < k; ++e) {
        const double centred = share * (grad[e] - mean);
        if (!(scale < 0)) d[e] = scale * attended[e] * centred;
        else d[e] = score[e] >= T(1e-25) ? centred / norm : 0;
        *of_scale += double(d[e]) * score[e];
    }
}

// Rows whose sums are formed together, so that they do not depend on the number of threads.
constexpr int64_t BLOCK = 64;

inline double sum_of(const std::vector<double>& parts) {
    double sum = 0;
    for (double part : parts) sum += part;
    return sum;
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
    const int64_t blocks = (M + BLOCK - 1) / BLOCK;
    std::vector<double> of_share(blocks, 0), of_scale(blocks, 0);
#pragma omp parallel if (M * k * c > SERIAL)
    {
        std::vector<T> attended(k), sum(stride);
#pragma omp for
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = block * BLOCK; i < std::min(M, (block + 1) * BLOCK); ++i) {
                const T* s = score + i * k;
                T* d = of_score.data() + i * slots;
                attend(k, scale, s, attended.data());
                through_weights(k, P, scale, share, s, prior + i * P, attended.data(),
                                grad + i * slots, d, &of_share[block], &of_scale[block]);
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
    grad_scalars[0] = sum_of(of_share);
    grad_scalars[1] = sum_of(of_scale);  // of the logarithm
}

// A layer in one call: its weights, and their product with features ////////////////////////////////

// The slots of one row: their vertices, what the attention gives, and the weights.
template <class T>
struct Slots {
    int64_t k, P;
    const int64_t *index, *prior_index;
    const T *score, *prior;
    T scale, share;
    std::vector<int64_t> col;
    std::vector<T> attended, weight;

    Slots(int64_t k, int64_t P, const int64_t* index, const int64_t* prior_index, const T* score,
          const T* prior, T scale, T share)
        : k(k), P(P), index(index), prior_index(prior_index), score(score), prior(prior),
          scale(scale), share(share), col(k + P), attended(k), weight(k + P) {}

    void of_row(int64_t i) {
        std::copy_n(index + i * k, k, col.data());
        attend(k, scale, score + i * k, attended.data());
        for (int64_t e = 0; e < k; ++e) weight[e] = share * attended[e];
        for (int64_t e = 0; e < P; ++e) {
            col[k + e] = prior_index[i * P + e];
            weight[k + e] = (1 - share) * prior[i * P + e];
        }
    }
};

template <class T>
void attended(int64_t M, int64_t C, const Slots<T>& all, const T* x, T* out) {
    const int64_t slots = all.k + all.P;
#pragma omp parallel if (M * slots * C > SERIAL)
    {
        Slots<T> own = all;
#pragma omp for schedule(dynamic, 16)
        for (int64_t i = 0; i < M; ++i) {
            own.of_row(i);
            spmm_row<T>(0, slots, C, own.col.data(), nullptr, own.weight.data(), x, 1, nullptr,
                        out + i * C);
        }
    }
}

// `U` vectors of one row: the gradient `g` of its product goes to the features it met, and times
// these features to the weights, a vector of sums for each.
template <class T, int U>
inline void scatter_block(int64_t slots, int64_t C, const int64_t* col, const T* weight, const T* g,
                          const T* x, T* grad_x, T* sums) {
    constexpr int W = Simd<T>::width;
    Vector<T> own[U];
    for (int u = 0; u < U; ++u) own[u] = load(g + u * W);
    for (int64_t e = 0; e < slots; ++e) {
        const T* features = x + col[e] * C;
        T* to = grad_x + col[e] * C;
        const T v = weight[e];
        Vector<T> sum = load(sums + e * W);
        for (int u = 0; u < U; ++u) {
            sum += own[u] * load(features + u * W);
            store(to + u * W, load(to + u * W) + v * own[u]);
        }
        store(sums + e * W, sum);
    }
}

template <class T>
inline void scatter_row(int64_t slots, int64_t C, const int64_t* col, const T* weight, const T* g,
                        const T* x, T* grad_x, T* sums, T* grad_weight) {
    constexpr int W = Simd<T>::width;
    std::fill_n(sums, slots * W, T(0));
    int64_t c = 0;
    auto blocks = [&](auto vectors) {
        constexpr int U = decltype(vectors)::value;
        for (; c + U * W <= C; c += U * W)
            scatter_block<T, U>(slots, C, col, weight, g + c, x + c, grad_x + c, sums);
    };
    blocks(std::integral_constant<int, 8>());
    blocks(std::integral_constant<int, 2>());
    blocks(std::integral_constant<int, 1>());
    for (int64_t e = 0; e < slots; ++e) {
        T sum = sum_lanes<T>(load(sums + e * W));
        for (int64_t d = c; d < C; ++d) {
            sum += g[d] * x[col[e] * C + d];
            grad_x[col[e] * C + d] += weight[e] * g[d];
        }
        grad_weight[e] = sum;
    }
}

// The gradients where there are more targets than sources: every thread adds to features and keys of
// its own, which are few, and these are summed in the order of the threads. So nothing has to be
// transposed, and the rows of features that neighbours share stay in the cache.
template <class T>
void scatter_grads(int64_t M, int64_t N, int64_t C, int64_t threads, const Slots<T>& all,
                   const Units<T>& queries, const Units<T>& keys, const T* x, const T* grad,
                   T* scratch, T* grad_query, T* grad_key, T* grad_scalars, T* grad_x) {
    constexpr int W = Simd<T>::width;
    const int64_t slots = all.k + all.P, stride = keys.stride, c = keys.channels;
    const int64_t blocks = (M + BLOCK - 1) / BLOCK, size = N * C;
    std::vector<double> of_share(blocks, 0), of_scale(blocks, 0);
    std::vector<T> of_keys(threads * N * stride, 0);
    std::vector<T*> of_x(threads, nullptr);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Slots<T> own = all;
        std::vector<T> sums(slots * W), of_weight(slots), d(all.k), of_query(stride);
        T* of_key = of_keys.data() + thread() * N * stride;
        T* features = thread() ? scratch + (thread() - 1) * size : grad_x;
        of_x[thread()] = features;
        std::fill_n(features, size, T(0));
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = block * BLOCK; i < std::min(M, (block + 1) * BLOCK); ++i) {
                own.of_row(i);
                scatter_row<T>(slots, C, own.col.data(), own.weight.data(), grad + i * C, x,
                               features, sums.data(), of_weight.data());
                through_weights(all.k, all.P, all.scale, all.share, all.score + i * all.k,
                                all.prior + i * all.P, own.attended.data(), of_weight.data(),
                                d.data(), &of_share[block], &of_scale[block]);
                for (int64_t h = 0; h < stride; h += W) {
                    const Vector<T> q = load(queries[i] + h);
                    Vector<T> sum = {};
                    for (int64_t e = 0; e < all.k; ++e) {
                        sum += d[e] * load(keys[own.col[e]] + h);
                        T* to = of_key + own.col[e] * stride + h;
                        store(to, load(to) + d[e] * q);
                    }
                    store(of_query.data() + h, sum);
                }
                queries.through_length(i, of_query.data(), grad_query + i * c);
            }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < N; ++j) {
            T* of_key = of_keys.data() + j * stride;
            for (int64_t t = 1; t < threads; ++t) {
                if (of_x[t] == nullptr) continue;  // fewer threads ran
                for (int64_t h = 0; h < stride; ++h) of_key[h] += of_key[t * N * stride + h];
                for (int64_t d = 0; d < C; ++d) grad_x[j * C + d] += of_x[t][j * C + d];
            }
            keys.through_length(j, of_key, grad_key + j * c);
        }
    }
    grad_scalars[0] = sum_of(of_share);
    grad_scalars[1] = sum_of(of_scale);  // of the logarithm
}

// The same where there are fewer: through the transposed pattern, which is small.
template <class T>
void gather_grads(int64_t M, int64_t N, int64_t C, const Slots<T>& all, const Units<T>& queries,
                  const Units<T>& keys, const T* x, const T* grad, T* grad_query, T* grad_key,
                  T* grad_scalars, T* grad_x) {
    const int64_t slots = all.k + all.P, stride = keys.stride, c = keys.channels;
    const int64_t blocks = (M + BLOCK - 1) / BLOCK, E = M * slots;
    std::vector<int64_t> rowptr(M + 1), col(E), rowptr_t(N + 1), col_t(E), perm(E);
    std::vector<T> weight(E), of_score(E, 0);  // zero for the prior's
    std::vector<double> of_share(blocks, 0), of_scale(blocks, 0);
#pragma omp parallel if (E * C > SERIAL)
    {
        Slots<T> own = all;
        std::vector<T> of_weight(slots), sum(stride);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = block * BLOCK; i < std::min(M, (block + 1) * BLOCK); ++i) {
                own.of_row(i);
                std::copy_n(own.col.data(), slots, col.data() + i * slots);
                std::copy_n(own.weight.data(), slots, weight.data() + i * slots);
                for (int64_t e = 0; e < slots; ++e)
                    of_weight[e] = dot(grad + i * C, x + own.col[e] * C, C);
                T* d = of_score.data() + i * slots;
                through_weights(all.k, all.P, all.scale, all.share, all.score + i * all.k,
                                all.prior + i * all.P, own.attended.data(), of_weight.data(), d,
                                &of_share[block], &of_scale[block]);
                spmm_row<T>(0, all.k, stride, own.col.data(), nullptr, d, keys[0], 1, nullptr,
                            sum.data());
                queries.through_length(i, sum.data(), grad_query + i * c);
            }
#pragma omp single
        {
            for (int64_t i = 0; i <= M; ++i) rowptr[i] = i * slots;
            transpose(M, N, rowptr.data(), col.data(), rowptr_t.data(), col_t.data(), perm.data());
        }
#pragma omp for schedule(dynamic, 16)
        for (int64_t j = 0; j < N; ++j) {
            spmm_row<T>(rowptr_t[j], rowptr_t[j + 1], C, col_t.data(), perm.data(), weight.data(),
                        grad, 1, nullptr, grad_x + j * C);
            spmm_row<T>(rowptr_t[j], rowptr_t[j + 1], stride, col_t.data(), perm.data(),
                        of_score.data(), queries[0], 1, nullptr, sum.data());
            keys.through_length(j, sum.data(), grad_key + j * c);
        }
    }
    grad_scalars[0] = sum_of(of_share);
    grad_scalars[1] = sum_of(of_scale);  // of the logarithm
}

}  // namespace

#define FUNCTIONS(T)                                                                              \
    int64_t attention_##T(int64_t M, int64_t k, int64_t P, const T* score, const T* prior,        \
                          double scale, double share, T* weight) {                                \
        if (k < 1) return OUT_OF_RANGE;                                                           \
        attention<T>(M, k, P, score, prior, scale, share, weight);                                \
        return DONE;                                                                              \
    }                                                                                             \
    int64_t attention_backward_##T(                                                               \
        int64_t M, int64_t N, int64_t c, int64_t k, int64_t P, const T* query, const T* key,      \
        const int64_t* index, const T* score, const T* prior, double scale, double share,         \
        const T* grad, const int64_t* rowptr_t, const int64_t* col_t, const int64_t* perm,        \
        T* grad_query, T* grad_key, T* grad_scalars) {                                            \
        const int64_t E = M * (k + P);                                                            \
        if (k < 1 || !inside(E, index, N) || !is_pattern(N, M, E, rowptr_t, col_t) ||             \
            !inside(E, perm, E))                                                                  \
            return OUT_OF_RANGE;                                                                  \
        attention_backward<T>(M, N, c, k, P, query, key, index, score, prior, scale, share, grad, \
                              rowptr_t, col_t, perm, grad_query, grad_key, grad_scalars);         \
        return DONE;                                                                              \
    }                                                                                             \
    int64_t attended_##T(int64_t M, int64_t N, int64_t C, int64_t k, int64_t P,                   \
                         const int64_t* index, const T* score, const int64_t* prior_index,        \
                         const T* prior, double scale, double share, const T* x, T* out) {        \
        if (k < 1 || !inside(M * k, index, N) || !inside(M * P, prior_index, N))                  \
            return OUT_OF_RANGE;                                                                  \
        const Slots<T> all(k, P, index, prior_index, score, prior, scale, share);                 \
        attended<T>(M, C, all, x, out);                                                           \
        return DONE;                                                                              \
    }                                                                                             \
    int64_t attended_backward_##T(                                                                \
        int64_t M, int64_t N, int64_t C, int64_t c, int64_t k, int64_t P, int64_t threads,        \
        const T* query, const T* key, const int64_t* index, const T* score,                       \
        const int64_t* prior_index, const T* prior, double scale, double share, const T* x,       \
        const T* grad, T* scratch, T* grad_query, T* grad_key, T* grad_scalars, T* grad_x) {      \
        if (k < 1 || threads < 1 || !inside(M * k, index, N) || !inside(M * P, prior_index, N))   \
            return OUT_OF_RANGE;                                                                  \
        const Units<T> queries(M, c, query), keys(N, c, key);                                     \
        const Slots<T> all(k, P, index, prior_index, score, prior, scale, share);                 \
        if (M >= N)                                                                               \
            scatter_grads<T>(M, N, C, threads, all, queries, keys, x, grad, scratch, grad_query,  \
                             grad_key, grad_scalars, grad_x);                                     \
        else                                                                                      \
            gather_grads<T>(M, N, C, all, queries, keys, x, grad, grad_query, grad_key,           \
                            grad_scalars, grad_x);                                                \
        return DONE;                                                                              \
    }

extern "C" {
FUNCTIONS(float)
FUNCTIONS(double)
}
