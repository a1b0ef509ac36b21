// The search for the largest cosines.

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

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
        score[e] = list[e].score;
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
    // Only where scores are equal does the sum fall short, and need indices be looked at. A key that
    // is listed twice has one place for both.
    auto greater = [&](int64_t f, Vector<T> scores, Mask) { return Mask(score[f] > scores); };
    auto before = [&](int64_t f, Vector<T> scores, Mask own) {
        return Mask((score[f] > scores) | ((score[f] == scores) & (index[f] < own)));
    };
    if (place_all(greater) < n * (n - 1) / 2 && place_all(before) < n * (n - 1) / 2)
        std::partial_sort(list, list + K, list + n);
    else
        std::copy_n(sorted, K, list);
}

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
    if (!unit || !(square < 1)) return std::acos(-1.0);
    return 2 * std::asin(std::sqrt(square) / 2) * (1 + UNIT);
}

// The search where some vectors are not finite. A score that is no number comes before all others,
// as it does where PyTorch sorts, so that it reaches every query. Nothing is proved by such scores:
// the state becomes that of a new search.
template <class T>
void topk_of_any(int64_t M, int64_t N, int64_t k, int64_t K, const Units<T>& queries,
                 const Units<T>& keys, T* last_query, T* last_key, int32_t* candidates,
                 double* angle, int64_t* index, T* score, int64_t* searched) {
    constexpr T FIRST = 2;  // above every cosine
    std::vector<Ranked<T>> list(N);
    for (int64_t i = 0; i < M; ++i) {
        for (int64_t j = 0; j < N; ++j) {
            const T s = dot(queries[i], keys[j], keys.stride);
            list[j] = {s == s ? s : FIRST, int32_t(j)};
        }
        std::partial_sort(list.begin(), list.begin() + k, list.end());
        for (int64_t e = 0; e < k; ++e) {
            index[i * k + e] = list[e].index;
            score[i * k + e] =
                list[e].score == FIRST ? std::numeric_limits<T>::quiet_NaN() : list[e].score;
        }
        for (int64_t e = 0; e < K; ++e) candidates[i * K + e] = e;
    }
    std::fill_n(last_query, M * queries.channels, T(0));
    std::fill_n(last_key, N * keys.channels, T(0));
    std::fill_n(angle, M, 0.0);
    searched[0] += M;
    searched[1] += M;
}

template <class T>
void topk(int64_t M, int64_t N, int64_t c, int64_t k, int64_t K, const T* query, const T* key,
          T* last_query, T* last_key, int32_t* candidates, double* angle, int64_t* index,
          T* score, int64_t* searched) {
    const Units<T> queries(M, c, query), keys(N, c, key);
    if (!queries.finite() || !keys.finite())
        return topk_of_any(M, N, k, K, queries, keys, last_query, last_key, candidates, angle,
                           index, score, searched);
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

}  // namespace

#define FUNCTIONS(T)                                                                              \
    int64_t topk_##T(int64_t M, int64_t N, int64_t c, int64_t k, int64_t K, const T* query,       \
                     const T* key, T* last_query, T* last_key, int32_t* candidates,               \
                     double* angle, int64_t* index, T* score, int64_t* searched) {                \
        if (k < 1 || k > K || K > N || !inside(M * K, candidates, N)) return OUT_OF_RANGE;        \
        topk<T>(M, N, c, k, K, query, key, last_query, last_key, candidates, angle, index, score, \
                searched);                                                                        \
        return DONE;                                                                              \
    }

extern "C" {
FUNCTIONS(float)
FUNCTIONS(double)
}
