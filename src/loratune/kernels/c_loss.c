/* Cross-entropy over rows of logits, and its derivative, each row by one thread: read once from memory, then from its
   cache. Included by c_blocks.c. */

/* Terms that are summed in fp32 before the sum goes on in fp64; the likeliest choice's, which is 1, stands apart: of a
   token that is nearly certain the others are what is left. */
#define SUMMED 512

/* lost = -times log softmax(x)[target], slope = times (softmax(x) - [target]); `times` is 1 where there are none. `e`
   has room for a row. Returns 1 where there is no such room, 2 where a target is none of the choices. */
#define CROSS_ENTROPY(T)                                                                                               \
    static float loss_of_row_##T(const T *x, int64_t target, float times, int64_t choices, T *slope, float *e) {       \
        float most = -INFINITY;                                                                                        \
        _Pragma("omp simd reduction(max : most)")                                                                      \
        for (int64_t i = 0; i < choices; i++) most = from_##T(x[i]) > most ? from_##T(x[i]) : most;                    \
        int64_t top = 0;                                                                                               \
        while (top < choices - 1 && from_##T(x[top]) != most) top++;                                                   \
        double rest = 0.0;                                                                                             \
        for (int64_t first = 0; first < choices; first += SUMMED) {                                                    \
            int64_t stop = first + SUMMED < choices ? first + SUMMED : choices;                                        \
            float sum = 0.0f;                                                                                          \
            _Pragma("omp simd reduction(+ : sum)")                                                                     \
            for (int64_t i = first; i < stop; i++) {                                                                   \
                float below = from_##T(x[i]) - most;                                                                   \
                e[i] = below < -87.0f ? 0.0f : exp_of(below);                                                          \
                sum += i == top ? e[i] - 1.0f : e[i];                                                                  \
            }                                                                                                          \
            rest += (double)sum;                                                                                       \
        }                                                                                                              \
        double total = 1.0 + rest;                                                                                     \
        float share = (float)((double)times / total);                                                                  \
        _Pragma("omp simd")                                                                                            \
        for (int64_t i = 0; i < choices; i++) slope[i] = to_##T(e[i] * share);                                         \
        double over = (double)e[target] / total - 1.0;                                                                 \
        slope[target] = to_##T((float)(over * (double)times));                                                         \
        return (float)(((double)most + log1p(rest) - (double)from_##T(x[target])) * (double)times);                    \
    }                                                                                                                  \
    int cross_entropy_##T(const T *x, const int64_t *targets, const float *times, T *slope, float *lost, int64_t rows, \
                          int64_t choices) {                                                                           \
        int failed = 0;                                                                                                \
        for (int64_t row = 0; row < rows; row++)                                                                       \
            if (targets[row] < 0 || targets[row] >= choices) return 2;                                                 \
        _Pragma("omp parallel")                                                                                        \
        {                                                                                                              \
            float *e = malloc((size_t)choices * sizeof(float));                                                        \
            if (!e) failed = 1;                                                                                        \
            _Pragma("omp for schedule(static)")                                                                        \
            for (int64_t row = 0; row < rows; row++)                                                                   \
                if (e) {                                                                                               \
                    int64_t at = row * choices;                                                                        \
                    float often = times ? times[row] : 1.0f;                                                           \
                    lost[row] = loss_of_row_##T(x + at, targets[row], often, choices, slope + at, e);                  \
                }                                                                                                      \
            free(e);                                                                                                   \
        }                                                                                                              \
        return failed;                                                                                                 \
    }

CROSS_ENTROPY(f32)
CROSS_ENTROPY(bf16)
