/* The norm, the gated product and the rotary embedding for processors: each reads and writes once. And, included at the
   end, cross-entropy, attention, products and low-rank adaptation.

   The formulas are those of norm.py, gated.py and rotary.py; everything is computed in fp32 and rounded once. A row is
   summed by one thread, so that the number of threads changes no bit. Compiled by c_build.py, called by c_blocks.py. */

#ifdef __clang__
#error "clang's threads are not GCC's, which torch has: two teams would wait for each other; CC=gcc is wanted"
#endif

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

/* Elements from which on several threads are worth their start. */
#define MANY 16384

typedef uint16_t bf16;

static inline float bits_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float from_bf16(bf16 x) { return bits_as_float((uint32_t)x << 16); }

/* To nearest, ties to even; a NaN stays one. */
static inline bf16 to_bf16(float x) {
    uint32_t bits = float_as_bits(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline float from_f32(float x) { return x; }
static inline float to_f32(float x) { return x; }

/* e^x as 2^n e^r with |r| <= ln 2 / 2, e^r by its series: within two units in the last place. Arguments beyond what fp32
   holds are cut to it. */
static inline float exp_of(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * bits_as_float((uint32_t)((int32_t)n + 127) << 23);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

/* Complementary error function with a relative error of 1.2e-7 (Press et al., Numerical Recipes, 6.2). */
static inline float erfc_of(float x) {
    float z = x < 0.0f ? -x : x;
    float t = 1.0f / (1.0f + 0.5f * z);
    float p = 0.17087277f;
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    float found = t * exp_of(p - z * z);
    return x < 0.0f ? 2.0f - found : found;
}

/* act(x) = x * share, and its derivative share + x * slope. */
static inline void silu(float x, float *share, float *slope) {
    *share = sigmoid(x);
    *slope = *share * (1.0f - *share);
}

static inline void gelu(float x, float *share, float *slope) {
    *share = 0.5f * erfc_of(x * -0.70710678f);
    *slope = exp_of(x * x * -0.5f) * 0.39894228f;
}

static inline void gelu_tanh(float x, float *share, float *slope) {
    /* (1 + tanh u) / 2 is sigmoid(2 u), which keeps its digits where 1 + tanh u loses them. */
    *share = sigmoid((x + x * x * x * 0.044715f) * 1.59576912f);
    *slope = *share * (1.0f - *share) * (x * x * (0.044715f * 3.0f) + 1.0f) * 1.59576912f;
}

#define NORM(T)                                                                                                        \
    void norm_forward_##T(const T *x, const float *w, T *y, float *inverse, int64_t rows, int64_t width, float eps) {  \
        _Pragma("omp parallel for schedule(static) if (rows * width > MANY)")                                          \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            const T *from = x + row * width;                                                                           \
            T *to = y + row * width;                                                                                   \
            float sum = 0.0f;                                                                                          \
            _Pragma("omp simd reduction(+ : sum)")                                                                     \
            for (int64_t i = 0; i < width; i++) sum += from_##T(from[i]) * from_##T(from[i]);                          \
            float scale = 1.0f / sqrtf(sum / (float)width + eps);                                                      \
            inverse[row] = scale;                                                                                      \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = 0; i < width; i++) to[i] = to_##T(from_##T(from[i]) * scale * w[i]);                      \
        }                                                                                                              \
    }                                                                                                                  \
    /* `v` is 1 / w. */                                                                                                \
    void norm_backward_##T(const T *gy, const T *y, const float *w, const float *v, const float *inverse, T *gx,       \
                           int64_t rows, int64_t width) {                                                              \
        _Pragma("omp parallel for schedule(static) if (rows * width > MANY)")                                          \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            const T *grad = gy + row * width, *normal = y + row * width;                                               \
            T *to = gx + row * width;                                                                                  \
            float sum = 0.0f, scale = inverse[row];                                                                    \
            _Pragma("omp simd reduction(+ : sum)")                                                                     \
            for (int64_t i = 0; i < width; i++) sum += from_##T(grad[i]) * from_##T(normal[i]);                        \
            sum /= (float)width;                                                                                       \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = 0; i < width; i++)                                                                        \
                to[i] = to_##T((from_##T(grad[i]) * w[i] - from_##T(normal[i]) * v[i] * sum) * scale);                 \
        }                                                                                                              \
    }

#define GATED(T, ACT)                                                                                                  \
    void gated_forward_##ACT##_##T(const T *gate, const T *up, T *y, int64_t gate_row, int64_t up_row, int64_t rows,   \
                                   int64_t width) {                                                                    \
        _Pragma("omp parallel for schedule(static) if (rows * width > MANY)")                                          \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            const T *g = gate + row * gate_row, *u = up + row * up_row;                                                \
            T *to = y + row * width;                                                                                   \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = 0; i < width; i++) {                                                                      \
                float value = from_##T(g[i]), share, slope;                                                            \
                ACT(value, &share, &slope);                                                                            \
                to[i] = to_##T(value * share * from_##T(u[i]));                                                        \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    void gated_backward_##ACT##_##T(const T *gy, const T *gate, const T *up, T *g_gate, T *g_up, int64_t gy_row,       \
                                    int64_t gate_row, int64_t up_row, int64_t rows, int64_t width) {                   \
        _Pragma("omp parallel for schedule(static) if (rows * width > MANY)")                                          \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            const T *d = gy + row * gy_row, *g = gate + row * gate_row, *u = up + row * up_row;                        \
            T *to_gate = g_gate + row * width, *to_up = g_up + row * width;                                            \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = 0; i < width; i++) {                                                                      \
                float value = from_##T(g[i]), grad = from_##T(d[i]), share, slope;                                     \
                ACT(value, &share, &slope);                                                                            \
                to_gate[i] = to_##T(grad * from_##T(u[i]) * (share + value * slope));                                  \
                to_up[i] = to_##T(grad * value * share);                                                               \
            }                                                                                                          \
        }                                                                                                              \
    }

/* `sign` is -1 for the gradient: y1 = x1 c1 - x2 s1 and y2 = x2 c2 + x1 s2, backwards y1 = x1 c1 + x2 s2 and
   y2 = x2 c2 - x1 s1. */
#define TURN(X, C, Y)                                                                                                  \
    void turn_##X##_##C(const X *x, const C *cos, const C *sin, Y *y, int64_t token_step, int64_t head_step,           \
                        int64_t tokens, int64_t heads, int64_t half, int64_t back) {                                   \
        _Pragma("omp parallel for schedule(static) if (tokens * heads * half > MANY / 2)")                             \
        for (int64_t token = 0; token < tokens; token++) {                                                             \
            const C *c1 = cos + token * 2 * half, *c2 = c1 + half, *s1 = sin + token * 2 * half, *s2 = s1 + half;      \
            const C *first = back ? s2 : s1, *second = back ? s1 : s2;                                                 \
            float sign = back ? -1.0f : 1.0f;                                                                          \
            for (int64_t head = 0; head < heads; head++) {                                                             \
                const X *x1 = x + token * token_step + head * head_step, *x2 = x1 + half;                              \
                Y *y1 = y + (token * heads + head) * 2 * half, *y2 = y1 + half;                                        \
                _Pragma("omp simd")                                                                                    \
                for (int64_t i = 0; i < half; i++) {                                                                   \
                    float a = from_##X(x1[i]), b = from_##X(x2[i]);                                                    \
                    y1[i] = to_##Y(a * from_##C(c1[i]) - sign * (b * from_##C(first[i])));                             \
                    y2[i] = to_##Y(b * from_##C(c2[i]) + sign * (a * from_##C(second[i])));                            \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

typedef float f32;

NORM(f32)
NORM(bf16)
GATED(f32, silu)
GATED(bf16, silu)
GATED(f32, gelu)
GATED(bf16, gelu)
GATED(f32, gelu_tanh)
GATED(bf16, gelu_tanh)
TURN(f32, f32, f32)
TURN(bf16, bf16, bf16)
TURN(bf16, f32, f32)

#include "c_loss.c"
#include "c_lanes.c"
#include "c_attention.c"
#include "c_tiles.c"
#include "c_tile_attention.c"
#include "c_products.c"
#include "c_low_rank.c"

const char *compiler(void) {
    return "GCC " __VERSION__;
}
