/* Attention over a tree of segments for processors: softmax(s Q K^T + mask) V, and its gradients.

   Everything is computed in fp32 and rounded once; scores and probabilities of some queries stand in the cache, no more
   of them. Included by c_blocks.c, after c_lanes.c. */

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

/* Softmax of a row of scores over the keys from `low` to `high`; no weight elsewhere. */
static void softmax_row(float *s, int64_t low, int64_t high, int64_t keys) {
    float most = s[low], sum = 0.0f;
    #pragma omp simd reduction(max : most)
    for (int64_t j = low; j < high; j++) most = s[j] > most ? s[j] : most;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = low; j < high; j++) {
        float e = exp_of(s[j] - most);
        s[j] = e;
        sum += e;
    }
    float share = 1.0f / sum;
    #pragma omp simd
    for (int64_t j = low; j < high; j++) s[j] *= share;
    for (int64_t j = 0; j < low; j++) s[j] = 0.0f;
    for (int64_t j = high; j < keys; j++) s[j] = 0.0f;
}

/* With p the probabilities and d the gradients of a row: d = p (d - sum p d). */
static void softmax_back(const float *p, float *d, int64_t low, int64_t high, int64_t keys) {
    float sum = 0.0f;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = low; j < high; j++) sum += p[j] * d[j];
    #pragma omp simd
    for (int64_t j = low; j < high; j++) d[j] = p[j] * (d[j] - sum);
    for (int64_t j = 0; j < low; j++) d[j] = 0.0f;
    for (int64_t j = high; j < keys; j++) d[j] = 0.0f;
}

/* Tokens of a block of queries. */
static inline int64_t tokens_together(const work *w) { return TOGETHER / w->groups > 1 ? TOGETHER / w->groups : 1; }

/* The first key that some query of a block may see, and how many from there on, by whole vectors. */
static inline int64_t seen_of(const work *w, const run *p, range lane, range block, int64_t *seen) {
    int64_t from = lowest(w, p, block.start - lane.start) / PADDED * PADDED;
    *seen = by(p->known + block.stop - lane.start, PADDED) - from;
    return from;
}

#define T float
#define OF(name) name##_f32
#include "c_attention_of.c"
#undef T
#undef OF
#define T bf16
#define OF(name) name##_bf16
#include "c_attention_of.c"
#undef T
#undef OF
