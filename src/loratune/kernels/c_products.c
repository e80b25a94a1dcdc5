/* Sums of products of bf16 in tiles, each number summed in fp32 and rounded once at its end.

   Each is summed in one order, however the threads share the work. Included by c_blocks.c, after c_tiles.c. */

#ifdef AMX

#include <omp.h>

/* Bytes of left factors that a thread goes through right factors with: what stays in its cache. */
#define STAYS (1 << 19)
/* Tiles of right factors that all threads have at once. */
#define SHARED (1 << 15)
/* Tiles below each other that are summed over at a time. */
#define SOME 8

/* x (rows, inner) times w (inner, columns), or its transposed (columns, inner) where `turned`; elements from row to
   row. */
typedef struct {
    const bf16 *x, *w;
    int64_t x_row, w_row, inner, turned;
} factors;

static inline int64_t tiles_along(const factors *f) { return by(f->inner, 32) / 32; }

/* A part of `number`, for one of `parts`. */
static inline range share_of(int64_t number, int64_t part, int64_t parts) {
    return (range){number * part / parts, number * (part + 1) / parts};
}

/* How many of the threads share the rows, so that the one with the most has the least; the others share columns. */
static int64_t threads_in_rows(int64_t threads, int64_t rows, int64_t columns) {
    int64_t best = threads, most = INT64_MAX;
    for (int64_t n = threads; n > 0; n--) {
        if (threads % n) continue;
        int64_t own = by(rows, n) / n * (by(columns, threads / n) / (threads / n));
        if (own < most) best = n, most = own;
    }
    return best;
}

static inline __m512 widened(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

/* scale * two tiles beside each other, or that and what is there, as up to 16 rows and 32 columns of bf16. */
static void put_tiles(const tile *left, const tile *right, float scale, int add, bf16 *y, int64_t y_row, int64_t rows,
                      int64_t columns) {
    __mmask32 there = (__mmask32)((1ull << least(columns, 32)) - 1);
    __m512 by_scale = _mm512_set1_ps(scale), low = _mm512_setzero_ps(), high = low;
    for (int64_t r = 0; r < least(rows, 16); r++, y += y_row) {
        if (add) {
            __m512i before = _mm512_maskz_loadu_epi16(there, y);
            low = widened(_mm512_castsi512_si256(before));
            high = widened(_mm512_extracti64x4_epi64(before, 1));
        }
        __m512 first = _mm512_fmadd_ps(_mm512_load_ps(left->words[r]), by_scale, low);
        __m512 second = _mm512_fmadd_ps(_mm512_load_ps(right->words[r]), by_scale, high);
        __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        /* What is new goes past the cache: it is read much later, and nothing is fetched to be written over. */
        if (columns < 32) _mm512_mask_storeu_epi16(y, there, rounded);
        else if (add || (uintptr_t)y % 64) _mm512_storeu_si512(y, rounded);
        else _mm512_stream_si512((void *)y, rounded);
    }
}

/* The columns from `begin` on of y (rows, columns) = scale * sum of products, or of that and y. */
static int some_columns(const factors *f, int64_t number, int64_t deep, int64_t begin, bf16 *y, int64_t y_row,
                        int64_t rows, int64_t columns, float scale, int add, tile *right) {
    int64_t high = by(rows, 32) / 32, wide = by(columns, 32) / 32;
    int64_t some = by(STAYS / (deep * (int64_t)sizeof(tile)) + 1, 2); /* tiles of rows at once */
    int failed = 0;
#pragma omp parallel
    {
        tile *left = aligned_alloc(64, (size_t)(some * deep) * sizeof(tile)), places[2][4] = {0};
        if (!left) failed = 1;
        tile *to = right;
        for (int64_t i = 0; i < number; to += tiles_along(f + i++))
            if (f[i].turned)
#pragma omp for schedule(static) nowait
                for (int64_t n = 0; n < by(columns, 32); n += 16)
                    strip_of_rows(f[i].w + (begin + n) * f[i].w_row, f[i].w_row, columns - n, f[i].inner, 1,
                                  to + n / 16 * deep);
            else
#pragma omp for schedule(static) nowait
                for (int64_t k = 0; k < f[i].inner; k += 32)
                    tiles_of_columns(f[i].w + k * f[i].w_row + begin, f[i].w_row, f[i].inner - k, columns, 0,
                                     to + k / 32, deep);
#pragma omp barrier
        int64_t threads = omp_get_num_threads(), in_rows = threads_in_rows(threads, high, wide);
        range m_share = share_of(high, omp_get_thread_num() % in_rows, in_rows);
        range n_share = share_of(wide, omp_get_thread_num() / in_rows, threads / in_rows);
        set_matrix_unit();
        int64_t m_begin = m_share.start * 2;
        if (left && number == 1 && columns <= 32 && f->inner % 32 == 0) {
            /* Each tile of x is read once: where it lies, but for rows that fill none. */
            m_begin = least(m_share.stop * 2, rows / 32 * 2);
            for (int64_t m = m_share.start * 2; n_share.start < n_share.stop && m < m_begin; m += 2) {
                left_factor lying = {(const char *)(f->x + m * 16 * f->x_row), f->x_row * 2, f->x_row * 32, 64};
                product_of(2, 2, deep, lying, right, (strides){1, deep}, places[0], (strides){2, 1}, 0);
                for (int64_t i = 0; i < 2; i++)
                    put_tiles(places[0] + 2 * i, places[0] + 2 * i + 1, scale, add, y + (m + i) * 16 * y_row, y_row, 16,
                              columns);
            }
        }
        for (int64_t first = m_begin; left && first < m_share.stop * 2; first += some) {
            int64_t last = least(first + some, least(m_share.stop * 2, by(rows, 16) / 16));
            for (int64_t m = first; m < last; m++) {
                tile *to = left + (m - first) * deep;
                for (int64_t i = 0; i < number; to += tiles_along(f + i++))
                    strip_of_rows(f[i].x + m * 16 * f[i].x_row, f[i].x_row, rows - m * 16, f[i].inner, 0, to);
            }
            /* Some columns at a time, and row after row of them: what is written lies together. */
            int64_t end = n_share.stop * 2;
            for (int64_t n_first = n_share.start * 2; n_first < end; n_first += some)
                for (int64_t m = first; m < last; m += 2)
                    for (int64_t n = n_first; n < least(n_first + some, end); n += 2) {
                        int64_t tall = least(last - m, 2);
                        tile *sums = places[n / 2 % 2]; /* the next ones need not wait until these are put away */
                        tile_product(tall, 2, deep, left + (m - first) * deep, (strides){deep, 1}, right + n * deep,
                                     (strides){1, deep}, sums, (strides){2, 1}, 0);
                        for (int64_t i = 0; i < tall; i++)
                            put_tiles(sums + 2 * i, sums + 2 * i + 1, scale, add, y + (m + i) * 16 * y_row + n * 16,
                                      y_row, rows - (m + i) * 16, columns - n * 16);
                    }
        }
        _mm_sfence();
        _tile_release();
        free(left);
    }
    return failed;
}

/* y (rows, columns) = scale * sum of products, or that and y. */
int sum_of_products(const factors *f, int64_t number, bf16 *y, int64_t y_row, int64_t rows, int64_t columns,
                    float scale, int add) {
    int64_t deep = 0;
    for (int64_t i = 0; i < number; i++) deep += tiles_along(f + i);
    int64_t some = by(least(columns, by(SHARED / deep + 1, 2) * 16), 32);
    tile *right = aligned_alloc(64, (size_t)(some / 16 * deep) * sizeof(tile));
    if (!right) return 1;
    int failed = 0;
    for (int64_t n = 0; n < columns && !failed; n += some)
        failed = some_columns(f, number, deep, n, y + n, y_row, rows, least(columns - n, some), scale, add, right);
    free(right);
    return failed;
}

/* Tiles of a product as up to so many rows and columns of fp32. */
static void put_wide(const tile *t, int64_t high, int64_t wide, float *y, int64_t rows, int64_t columns,
                     int64_t y_row) {
    for (int64_t m = 0; m < high; m++, t += wide, y += 16 * y_row)
        for (int64_t n = 0; n < wide && n * 16 < columns; n++) {
            __mmask16 there = (__mmask16)((1u << least(columns - n * 16, 16)) - 1);
            for (int64_t r = 0; r < least(rows - m * 16, 16); r++)
                _mm512_mask_storeu_ps(y + r * y_row + n * 16, there, _mm512_load_ps(t[n].words[r]));
        }
}

/* y (u_columns, v_columns) fp32, row after row, = u^T v over `rows`; threads share the longer side. */
int product_over_rows(const bf16 *u, int64_t u_row, int64_t u_columns, const bf16 *v, int64_t v_row, int64_t v_columns,
                      int64_t rows, float *y) {
    int tall = u_columns >= v_columns;
    int64_t few = by(tall ? v_columns : u_columns, 32) / 16, many = tall ? u_columns : v_columns;
    int64_t deep = by(rows, 32) / 32;
    tile *all = aligned_alloc(64, (size_t)(few * deep) * sizeof(tile));
    if (!all) return 1;
    int failed = 0;
#pragma omp parallel
    {
        range share = share_of(by(many, 32) / 32, omp_get_thread_num(), omp_get_num_threads());
        int64_t start = share.start * 32, own = least(share.stop * 32, many) - start, wide = by(own, 32) / 16;
        tile *strips = aligned_alloc(64, (size_t)(wide * (SOME + few) + 1) * sizeof(tile));
        tile *sums = strips + wide * SOME;
        if (!strips) failed = 1;
#pragma omp for schedule(static)
        for (int64_t k = 0; k < deep; k++)
            if (tall) tiles_of_columns(v + k * 32 * v_row, v_row, rows - k * 32, v_columns, 0, all + k, deep);
            else tiles_of_columns(u + k * 32 * u_row, u_row, rows - k * 32, u_columns, 1, all + k, deep);
        set_matrix_unit();
        for (int64_t first = 0; strips && own > 0 && first < deep; first += SOME) {
            int64_t some = least(deep - first, SOME);
            for (int64_t k = 0; k < some; k++) {
                int64_t row = (first + k) * 32;
                if (tall) tiles_of_columns(u + row * u_row + start, u_row, rows - row, own, 1, strips + k, SOME);
                else tiles_of_columns(v + row * v_row + start, v_row, rows - row, own, 0, strips + k, SOME);
            }
            if (tall)
                tile_product(wide, few, some, strips, (strides){SOME, 1}, all + first, (strides){1, deep}, sums,
                             (strides){few, 1}, first > 0);
            else
                tile_product(few, wide, some, all + first, (strides){deep, 1}, strips, (strides){1, SOME}, sums,
                             (strides){wide, 1}, first > 0);
        }
        if (strips && own > 0 && tall) put_wide(sums, wide, few, y + start * v_columns, own, v_columns, v_columns);
        if (strips && own > 0 && !tall) put_wide(sums, few, wide, y + start, u_columns, own, v_columns);
        _tile_release();
        free(strips);
    }
    free(all);
    return failed;
}
#endif
