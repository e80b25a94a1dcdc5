/* Attention over a tree of segments for processors: softmax(s Q K^T + mask) V, and its gradients.

   A lane is a segment with the keys of its path, as in tree_attention.py. One lane of one key head is one piece of
   work, done by one thread from its keys to its result, so that the number of threads changes no bit. Everything is
   computed in fp32 and rounded once; scores and probabilities of some queries stand in the cache, no more of them.
   Included by c_blocks.c. */

#include <stdlib.h>

/* Rows of queries (tokens times the heads that share a key head) that are computed together. */
#define TOGETHER 48
#define PADDED 16

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));

#if defined(__AVX512F__)
#define WIDE 2
#else
#define WIDE 1
#endif
#define TALL 6

/* C (+)= A B for a few rows and vectors of columns; A's element (i, k) is at i * down + k * along. */
#define FEW(M, N)                                                                                                      \
    static void product_##M##_##N(int64_t inner, const float *a, int64_t down, int64_t along, const float *b,          \
                                  int64_t b_row, float *c, int64_t c_row, int add) {                                   \
        vec sum[M][N];                                                                                                 \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int n = 0; n < N; n++) sum[m][n] = (vec){0};                                                          \
        for (int64_t k = 0; k < inner; k++) {                                                                          \
            vec right[N];                                                                                              \
            for (int n = 0; n < N; n++) right[n] = *(const vec *)(b + k * b_row + n * PADDED);                         \
            for (int m = 0; m < M; m++) {                                                                              \
                float left = a[m * down + k * along];                                                                  \
                for (int n = 0; n < N; n++) sum[m][n] += left * right[n];                                              \
            }                                                                                                          \
        }                                                                                                              \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int n = 0; n < N; n++) {                                                                              \
                vec *to = (vec *)(c + m * c_row + n * PADDED);                                                         \
                if (add) sum[m][n] += *to;                                                                             \
                *to = sum[m][n];                                                                                       \
            }                                                                                                          \
    }

#define FEWER(N) FEW(1, N) FEW(2, N) FEW(3, N) FEW(4, N) FEW(5, N) FEW(6, N)

FEWER(1)
FEWER(2)

typedef void (*few)(int64_t, const float *, int64_t, int64_t, const float *, int64_t, float *, int64_t, int);
#define ROW(N) {product_1_##N, product_2_##N, product_3_##N, product_4_##N, product_5_##N, product_6_##N}
static const few FEW_BY_SIZE[2][TALL] = {ROW(1), ROW(2)};

/* C (+)= A B of (rows, inner) and (inner, columns), columns whole vectors. */
static void product(int64_t rows, int64_t columns, int64_t inner, const float *a, int64_t down, int64_t along,
                    const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
    for (int64_t n = 0; n < columns; n += WIDE * PADDED) {
        int wide = columns - n >= WIDE * PADDED ? WIDE : 1;
        for (int64_t m = 0; m < rows; m += TALL) {
            int tall = rows - m < TALL ? (int)(rows - m) : TALL;
            FEW_BY_SIZE[wide - 1][tall - 1](inner, a + m * down, down, along, b + n, b_row, c + m * c_row + n, c_row,
                                            add);
        }
    }
}

/* A tensor of (tokens, heads, dim): elements from token to token and from head to head. */
typedef struct {
    int64_t token, head;
} steps;

/* own_start, own_stop: the lane's tokens; known: keys of its path; first, last: its ranges among `ranges`; sum: where
   the gradients of its path's keys begin among those of all lanes. */
typedef struct {
    int64_t own_start, own_stop, known, first, last, sum;
} lane;

typedef struct {
    int64_t start, stop;
} range;

typedef struct {
    const lane *lanes;
    const range *ranges;
    int64_t number, tokens, heads, groups, dim, value_dim, window;
    float scale;
} work;

static inline int64_t padded(int64_t n) { return (n + PADDED - 1) / PADDED * PADDED; }

static int64_t most_keys(const work *w) {
    int64_t most = 0;
    for (int64_t i = 0; i < w->number; i++) {
        int64_t keys = w->lanes[i].known + w->lanes[i].own_stop - w->lanes[i].own_start;
        most = keys > most ? keys : most;
    }
    return padded(most);
}

/* Softmax of a row of scores over the keys from `low` to `high`; no weight elsewhere. */
static void softmax_row(float *s, int64_t low, int64_t high, int64_t keys) {
    float most = s[low], sum = 0.0f;
    _Pragma("omp simd reduction(max : most)")
    for (int64_t j = low; j < high; j++) most = s[j] > most ? s[j] : most;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t j = low; j < high; j++) {
        float e = exp_of(s[j] - most);
        s[j] = e;
        sum += e;
    }
    float share = 1.0f / sum;
    _Pragma("omp simd")
    for (int64_t j = low; j < high; j++) s[j] *= share;
    for (int64_t j = 0; j < low; j++) s[j] = 0.0f;
    for (int64_t j = high; j < keys; j++) s[j] = 0.0f;
}

/* With p the probabilities and d the gradients of a row: d = p (d - sum p d). */
static void softmax_back(const float *p, float *d, int64_t low, int64_t high, int64_t keys) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t j = low; j < high; j++) sum += p[j] * d[j];
    _Pragma("omp simd")
    for (int64_t j = low; j < high; j++) d[j] = p[j] * (d[j] - sum);
    for (int64_t j = 0; j < low; j++) d[j] = 0.0f;
    for (int64_t j = high; j < keys; j++) d[j] = 0.0f;
}

/* Which keys the query of a lane's token t may see, counted along path and lane. */
static inline int64_t lowest(const work *w, const lane *l, int64_t t) {
    int64_t low = w->window ? l->known + t + 1 - w->window : 0;
    return low > 0 ? low : 0;
}

/* The first key, by whole vectors, that a token from t on may see: what lies before it is left out. */
static inline int64_t first_seen(const work *w, const lane *l, int64_t t) { return lowest(w, l, t) / PADDED * PADDED; }

#define ATTEND(T)                                                                                                      \
    /* The keys or values of a lane's path and its own: by key (keys, dim) and by feature (dim, keys). */              \
    static void gather_##T(const T *x, steps at, int64_t head, const work *w, const lane *l, int64_t dim,              \
                           int64_t keys, float *by_key, float *by_feature) {                                           \
        int64_t j = 0;                                                                                                 \
        for (int64_t r = l->first; r <= l->last; r++) {                                                                \
            range part = {l->own_start, l->own_stop};                                                                  \
            if (r < l->last) part = w->ranges[r];                                                                      \
            for (int64_t token = part.start; token < part.stop; token++, j++) {                                        \
                const T *from = x + token * at.token + head * at.head;                                                 \
                for (int64_t d = 0; d < dim; d++) by_key[j * dim + d] = from_##T(from[d]);                             \
            }                                                                                                          \
        }                                                                                                              \
        memset(by_key + j * dim, 0, (size_t)((keys - j) * dim) * sizeof(float));                                       \
        if (by_feature)                                                                                                \
            for (int64_t first = 0; first < keys; first += PADDED)                                                     \
                for (int64_t d = 0; d < dim; d++)                                                                      \
                    for (int64_t i = first; i < first + PADDED; i++) by_feature[d * keys + i] = by_key[i * dim + d];   \
    }                                                                                                                  \
    /* Rows of some tokens, those of one token beside each other, times `scale`. */                                    \
    static void rows_##T(const T *x, steps at, int64_t head, const work *w, int64_t start, int64_t stop, int64_t dim,  \
                         float scale, float *to) {                                                                     \
        for (int64_t token = start; token < stop; token++)                                                             \
            for (int64_t g = 0; g < w->groups; g++, to += dim) {                                                       \
                const T *from = x + token * at.token + (head * w->groups + g) * at.head;                               \
                for (int64_t d = 0; d < dim; d++) to[d] = from_##T(from[d]) * scale;                                   \
            }                                                                                                          \
    }                                                                                                                  \
    static void put_##T(T *x, steps at, int64_t head, const work *w, int64_t start, int64_t stop, int64_t dim,         \
                        float scale, const float *from) {                                                              \
        for (int64_t token = start; token < stop; token++)                                                             \
            for (int64_t g = 0; g < w->groups; g++, from += dim) {                                                     \
                T *to = x + token * at.token + (head * w->groups + g) * at.head;                                       \
                for (int64_t d = 0; d < dim; d++) to[d] = to_##T(from[d] * scale);                                     \
            }                                                                                                          \
    }                                                                                                                  \
    int attend_forward_##T(const T *q, steps q_at, const T *k, steps k_at, const T *v, steps v_at, T *y, steps y_at,   \
                           const work *w) {                                                                            \
        int64_t dim = w->dim, wide = w->value_dim, most = most_keys(w), rows = TOGETHER + w->groups;                   \
        size_t floats = (size_t)(most * (2 * dim + wide) + rows * (dim + wide + most));                                \
        int failed = 0;                                                                                                \
        _Pragma("omp parallel")                                                                                        \
        {                                                                                                              \
            float *place = malloc(floats * sizeof(float));                                                             \
            if (!place) failed = 1;                                                                                    \
            float *by_key = place, *keys_t = by_key + most * dim, *values = keys_t + most * dim;                       \
            float *queries = values + most * wide, *scores = queries + rows * dim, *out = scores + rows * most;        \
            _Pragma("omp for schedule(dynamic, 1)")                                                                    \
            for (int64_t piece = 0; piece < w->number * w->heads; piece++) {                                           \
                if (!place) continue;                                                                                  \
                const lane *l = w->lanes + piece / w->heads;                                                           \
                int64_t head = piece % w->heads, length = l->own_stop - l->own_start;                                  \
                int64_t all = padded(l->known + length), step = TOGETHER / w->groups > 1 ? TOGETHER / w->groups : 1;   \
                gather_##T(k, k_at, head, w, l, dim, all, by_key, keys_t);                                             \
                gather_##T(v, v_at, head, w, l, wide, all, values, NULL);                                              \
                for (int64_t t = 0; t < length; t += step) {                                                           \
                    int64_t end = t + step < length ? t + step : length, number = (end - t) * w->groups;               \
                    int64_t from = first_seen(w, l, t), seen = padded(l->known + end) - from;                          \
                    rows_##T(q, q_at, head, w, l->own_start + t, l->own_start + end, dim, w->scale, queries);          \
                    product(number, seen, dim, queries, dim, 1, keys_t + from, all, scores, seen, 0);                  \
                    for (int64_t r = 0; r < number; r++) {                                                             \
                        int64_t token = t + r / w->groups, high = l->known + token + 1 - from;                         \
                        softmax_row(scores + r * seen, lowest(w, l, token) - from, high, seen);                        \
                    }                                                                                                  \
                    product(number, wide, seen, scores, seen, 1, values + from * wide, wide, out, wide, 0);            \
                    put_##T(y, y_at, head, w, l->own_start + t, l->own_start + end, wide, 1.0f, out);                  \
                }                                                                                                      \
            }                                                                                                          \
            free(place);                                                                                               \
        }                                                                                                              \
        return failed;                                                                                                 \
    }                                                                                                                  \
    /* `sums` has room for (dim + value_dim) of each head of each token, and after them of each key of each path. */   \
    int attend_backward_##T(const T *gy, steps gy_at, const T *q, steps q_at, const T *k, steps k_at, const T *v,      \
                            steps v_at, T *gq, steps gq_at, T *gk, steps gk_at, T *gv, steps gv_at, float *sums,       \
                            const work *w) {                                                                           \
        int64_t dim = w->dim, wide = w->value_dim, both = dim + wide, most = most_keys(w);                             \
        int64_t rows = TOGETHER + w->groups;                                                                           \
        size_t floats = (size_t)(3 * most * both + rows * (2 * dim + wide + 2 * most));                                \
        int failed = 0;                                                                                                \
        _Pragma("omp parallel")                                                                                        \
        {                                                                                                              \
            float *place = malloc(floats * sizeof(float));                                                             \
            if (!place) failed = 1;                                                                                    \
            float *keys = place, *keys_t = keys + most * dim, *values = keys_t + most * dim;                           \
            float *values_t = values + most * wide, *g_keys = values_t + most * wide, *g_values = g_keys + most * dim; \
            float *queries = g_values + most * wide, *grads = queries + rows * dim, *p = grads + rows * wide;          \
            float *dp = p + rows * most, *out = dp + rows * most;                                                      \
            _Pragma("omp for schedule(dynamic, 1)")                                                                    \
            for (int64_t piece = 0; piece < w->number * w->heads; piece++) {                                           \
                if (!place) continue;                                                                                  \
                const lane *l = w->lanes + piece / w->heads;                                                           \
                int64_t head = piece % w->heads, length = l->own_stop - l->own_start;                                  \
                int64_t all = padded(l->known + length), step = TOGETHER / w->groups > 1 ? TOGETHER / w->groups : 1;   \
                gather_##T(k, k_at, head, w, l, dim, all, keys, keys_t);                                               \
                gather_##T(v, v_at, head, w, l, wide, all, values, values_t);                                          \
                memset(g_keys, 0, (size_t)(all * dim) * sizeof(float));                                                \
                memset(g_values, 0, (size_t)(all * wide) * sizeof(float));                                             \
                for (int64_t t = 0; t < length; t += step) {                                                           \
                    int64_t end = t + step < length ? t + step : length, number = (end - t) * w->groups;               \
                    int64_t start = l->own_start + t, stop = l->own_start + end, from = first_seen(w, l, t);           \
                    int64_t seen = padded(l->known + end) - from;                                                      \
                    rows_##T(q, q_at, head, w, start, stop, dim, w->scale, queries);                                   \
                    rows_##T(gy, gy_at, head, w, start, stop, wide, 1.0f, grads);                                      \
                    product(number, seen, dim, queries, dim, 1, keys_t + from, all, p, seen, 0);                       \
                    product(number, seen, wide, grads, wide, 1, values_t + from, all, dp, seen, 0);                    \
                    for (int64_t r = 0; r < number; r++) {                                                             \
                        int64_t token = t + r / w->groups, low = lowest(w, l, token) - from;                           \
                        int64_t high = l->known + token + 1 - from;                                                    \
                        softmax_row(p + r * seen, low, high, seen);                                                    \
                        softmax_back(p + r * seen, dp + r * seen, low, high, seen);                                    \
                    }                                                                                                  \
                    product(seen, wide, number, p, 1, seen, grads, wide, g_values + from * wide, wide, 1);             \
                    product(seen, dim, number, dp, 1, seen, queries, dim, g_keys + from * dim, dim, 1);                \
                    product(number, dim, seen, dp, seen, 1, keys + from * dim, dim, out, dim, 0);                      \
                    put_##T(gq, gq_at, head, w, start, stop, dim, w->scale, out);                                      \
                }                                                                                                      \
                for (int64_t j = 0; j < l->known + length; j++) {                                                      \
                    int64_t at = j < l->known ? w->tokens + l->sum + j : l->own_start + j - l->known;                  \
                    float *to = sums + (at * w->heads + head) * both;                                                  \
                    memcpy(to, g_keys + j * dim, (size_t)dim * sizeof(float));                                         \
                    memcpy(to + dim, g_values + j * wide, (size_t)wide * sizeof(float));                               \
                }                                                                                                      \
            }                                                                                                          \
            free(place);                                                                                               \
            /* What each lane gives the keys of its path, lane after lane; no two threads have one head. */            \
            _Pragma("omp for schedule(static)")                                                                        \
            for (int64_t head = 0; head < w->heads; head++) {                                                          \
                for (int64_t i = 0; i < w->number; i++) {                                                              \
                    int64_t j = w->tokens + w->lanes[i].sum;                                                           \
                    for (int64_t r = w->lanes[i].first; r < w->lanes[i].last; r++)                                     \
                        for (int64_t token = w->ranges[r].start; token < w->ranges[r].stop; token++, j++) {            \
                            float *to = sums + (token * w->heads + head) * both;                                       \
                            const float *from = sums + (j * w->heads + head) * both;                                   \
                            for (int64_t d = 0; d < both; d++) to[d] += from[d];                                       \
                        }                                                                                              \
                }                                                                                                      \
                for (int64_t token = 0; token < w->tokens; token++) {                                                  \
                    const float *from = sums + (token * w->heads + head) * both;                                       \
                    T *to = gk + token * gk_at.token + head * gk_at.head;                                              \
                    for (int64_t d = 0; d < dim; d++) to[d] = to_##T(from[d]);                                         \
                    to = gv + token * gv_at.token + head * gv_at.head;                                                 \
                    for (int64_t d = 0; d < wide; d++) to[d] = to_##T(from[dim + d]);                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        return failed;                                                                                                 \
    }

ATTEND(f32)
ATTEND(bf16)
