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
                    if (!(scale < 0)) d[e] = scale * weight[e] * centred;
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
    }

extern "C" {
FUNCTIONS(float)
FUNCTIONS(double)
}
