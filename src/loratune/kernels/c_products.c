/* Sums of products of bf16 in tiles, each number summed in fp32 and rounded once at its end.

   Each is summed in one order, however the threads share the work. Included by c_blocks.c, after c_tiles.c. */

#ifdef AMX

#include <omp.h>

/* Bytes of right factors that a thread has in tiles at a time: what its second cache holds. */
#define RIGHT (3 << 19)
/* A sum of more tiles than this is gone through in parts of so many: what two rows of them take of the first cache. */
#define LONG 20
#define PART 12
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

/* How many of the threads share the rows, so that the one with the most has the least, and then the fewest columns to
   put into tiles; the others share columns. */
static int64_t threads_in_rows(int64_t threads, int64_t rows, int64_t columns) {
    int64_t best = threads, most = INT64_MAX, widest = INT64_MAX;
    for (int64_t n = threads; n > 0; n--) {
        if (threads % n) continue;
        int64_t high = by(rows, n) / n, wide = by(columns, threads / n) / (threads / n);
        if (high * wide > most || (high * wide == most && wide >= widest)) continue;
        best = n, most = high * wide, widest = wide;
    }
    return best;
}

/* An even number of `tiles` in each of as few equal parts as have `most` of them at most. */
static int64_t evenly(int64_t tiles, int64_t most) {
    int64_t parts = (tiles - 1) / (most > 2 ? most : 2) + 1;
    return by((tiles + parts - 1) / parts, 2);
}

static inline __m512 widened(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

/* y (rows, columns) = scale * sum of products, or that and y. `deep`: tiles along the sum; `apart`: tiles from a column
   of right factors to the next one, an odd number, so that not all are in the same places of a cache. */
typedef struct {
    const factors *f;
    int64_t number, deep, apart, rows, columns, y_row;
    bf16 *y;
    float scale;
    int add;
} sum;

/* Up to 2 x 2 tiles of a result that are not put where they belong yet: rows from `row` to before `stop` are left. */
typedef struct {
    const tile *tiles;
    int64_t first, column, row, stop;
} waiting;

/* The next row of them, if there is one. */
static inline __attribute__((always_inline)) void put_row(const sum *s, waiting *w) {
    if (w->row >= w->stop) return;
    int64_t row = w->row++ - w->first;
    const tile *pair = w->tiles + row / 16 * 2;
    bf16 *y = s->y + (w->first + row) * s->y_row + w->column;
    __m512 scale = _mm512_set1_ps(s->scale);
    __m512 low = _mm512_load_ps(pair[0].words[row % 16]), high = _mm512_load_ps(pair[1].words[row % 16]);
    __mmask32 there = (__mmask32)((1ull << least(s->columns - w->column, 32)) - 1);
    if (s->add) {
        __m512i before = _mm512_maskz_loadu_epi16(there, y);
        low = _mm512_fmadd_ps(low, scale, widened(_mm512_castsi512_si256(before)));
        high = _mm512_fmadd_ps(high, scale, widened(_mm512_extracti64x4_epi64(before, 1)));
    } else {
        low = _mm512_mul_ps(low, scale);
        high = _mm512_mul_ps(high, scale);
    }
    __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    /* What is new goes past the cache: it is read much later, and nothing is fetched to be written over. */
    if (there != 0xffffffffu) _mm512_mask_storeu_epi16(y, there, rounded);
    else if (s->add || (uintptr_t)y % 64) _mm512_storeu_si512(y, rounded);
    else _mm512_stream_si512((void *)y, rounded);
}

static inline void put_all(const sum *s, waiting *w) {
    while (w->row < w->stop) put_row(s, w);
}

/* Two rows of tiles of one left factor, and how many tiles along the sum they are. */
typedef struct {
    left_factor a;
    int64_t inner;
} stretch;

/* Up to 2 x 2 tiles of a result, as few_tiles. What is read of right factors passes by the first cache, so that the
   left ones stay there; and what waits is put away meanwhile, which costs nothing while the unit is busy. */
static inline __attribute__((always_inline)) void passing_tiles(int tall, const stretch *some, int64_t number,
                                                                const tile *b, tile *c, int add, const sum *s,
                                                                waiting *w) {
    STORED();
    if (add) {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + 1, 64);
        if (tall > 1) _tile_loadd(2, c + 2, 64);
        if (tall > 1) _tile_loadd(3, c + 3, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < number; i++) {
        left_factor a = some[i].a;
        for (int64_t k = 0; k < some[i].inner; k++, a.at += a.along, b++) {
            _tile_loadd(4, a.at, a.row);
            _tile_stream_loadd(6, b, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_stream_loadd(7, b + s->apart, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (tall > 1) {
                _tile_loadd(5, a.at + a.down, a.row);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            put_row(s, w);
            put_row(s, w);
        }
    }
    if (w->tiles == c) put_all(s, w);
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 1, 64);
    if (tall > 1) _tile_stored(2, c + 2, 64);
    if (tall > 1) _tile_stored(3, c + 3, 64);
    STORED();
}

/* Right factors in tiles, one column of tiles after the other; an even number of them. */
static void right_tiles(const sum *s, range n, tile *to) {
    int64_t first = n.start * 16, columns = least(n.stop * 16, s->columns) - first;
    for (int64_t i = 0; i < s->number; to += tiles_along(s->f + i++)) {
        const factors *f = s->f + i;
        const bf16 *w = f->w + first * (f->turned ? f->w_row : 1);
        if (f->turned)
            for (int64_t c = 0; c < by(columns, 32); c += 16)
                strip_of_rows(w + c * f->w_row, f->w_row, columns - c, f->inner, 1, to + c / 16 * s->apart);
        else
            for (int64_t k = 0; k < f->inner; k += 32)
                tiles_of_columns(w + k * f->w_row, f->w_row, f->inner - k, columns, 0, to + k / 32, s->apart);
    }
}

/* Two rows of tiles of a left factor from row `first` on, of its tiles `k` along: where they lie; or put into tiles
   where they fill none, or where their rows would be in the same places of a cache. */
static left_factor two_rows(const factors *f, int64_t first, int64_t rows, range k, tile *to) {
    const bf16 *x = f->x + first * f->x_row + k.start * 32;
    int64_t inner = least(k.stop * 32, f->inner) - k.start * 32, size = sizeof(tile), lines = f->x_row / 32;
    if (rows >= 32 && inner % 32 == 0 && f->x_row % 32 == 0 && lines % 32 && (uintptr_t)x % 64 == 0)
        return (left_factor){(const char *)x, f->x_row * 2, f->x_row * 32, 64};
    strip_of_rows(x, f->x_row, rows, inner, 0, to);
    if (rows > 16) strip_of_rows(x + 16 * f->x_row, f->x_row, rows - 16, inner, 0, to + length_of(k));
    return (left_factor){(const char *)to, 64, length_of(k) * size, size};
}

/* What tiles `k` along a sum are of left factors, for two rows of tiles from `i` on; returns how many stretches. */
static int64_t stretches(const sum *s, int64_t i, range k, tile *left, stretch *to) {
    int64_t number = 0, start = 0;
    for (int64_t t = 0; t < s->number; start += tiles_along(s->f + t++)) {
        range own = {k.start - start, least(k.stop - start, tiles_along(s->f + t))};
        if (own.start < 0) own.start = 0;
        if (length_of(own) <= 0) continue;
        to[number++] = (stretch){two_rows(s->f + t, i * 16, s->rows - i * 16, own, left), length_of(own)};
        left += 2 * length_of(own);
    }
    return number;
}

/* A thread's own room. */
typedef struct {
    tile *right, *left, *sums;
    stretch *some;
    waiting w;
} workplace;

/* Two rows of tiles from `i` on of columns n. A long sum is gone through in parts, so that what is read of left factors
   for each of the columns stays at hand. */
static void multiply(const sum *s, workplace *at, int64_t i, range n, int64_t tall) {
    int64_t parts = s->deep > LONG && length_of(n) > 2 ? by(s->deep, PART) / PART : 1;
    for (int64_t part = 0; part < parts; part++) {
        range k = share_of(s->deep, part, parts);
        int64_t number = stretches(s, i, k, at->left, at->some);
        for (int64_t j = n.start; j < n.stop; j += 2) {
            /* Of two places one is put away while the other is filled. */
            tile *to = at->sums + (parts > 1 ? (j - n.start) * 2 : at->w.tiles == at->sums ? 4 : 0);
            const tile *b = at->right + (j - n.start) * s->apart + k.start;
            if (tall > 1) passing_tiles(2, at->some, number, b, to, part > 0, s, &at->w);
            else passing_tiles(1, at->some, number, b, to, part > 0, s, &at->w);
            if (part < parts - 1) continue;
            put_all(s, &at->w);
            at->w = (waiting){to, i * 16, j * 16, i * 16, least((i + tall) * 16, s->rows)};
        }
    }
}

/* A thread's share of a sum: some columns at a time, in tiles of its own, for all of its rows. */
static int own_share(const sum *s, range m, range n) {
    int64_t size = sizeof(tile), wide = evenly(length_of(n), RIGHT / (s->apart * size));
    int64_t room = wide * s->apart + 2 * s->deep + 2 * wide + 8;
    tile *right = aligned_alloc(64, by(room * size + s->number * (int64_t)sizeof(stretch), 64));
    if (!right) return 1;
    tile *left = right + wide * s->apart;
    workplace at = {right, left, left + 2 * s->deep, (stretch *)(right + room), {NULL, 0, 0, 0, 0}};
    set_matrix_unit();
    for (range some = {n.start, n.start}; some.start < n.stop; some.start = some.stop) {
        some.stop = least(some.start + wide, n.stop);
        right_tiles(s, some, right);
        for (int64_t i = m.start; i < m.stop; i += 2) multiply(s, &at, i, some, least(m.stop - i, 2));
        put_all(s, &at.w);
    }
    _mm_sfence();
    _tile_release();
    free(right);
    return 0;
}

static sum sum_of(const factors *f, int64_t number, bf16 *y, int64_t y_row, int64_t rows, int64_t columns, float scale,
                  int add) {
    sum s = {f, number, 0, 0, rows, columns, y_row, y, scale, add};
    for (int64_t i = 0; i < number; i++) s.deep += tiles_along(f + i);
    s.apart = s.deep | 1;
    return s;
}

/* What one thread of a team does of it; nobody waits for the others. */
static int sum_in_team(const sum *s) {
    int64_t high = by(s->rows, 32) / 32, wide = by(s->columns, 32) / 32;
    int64_t threads = omp_get_num_threads(), in_rows = threads_in_rows(threads, high, wide);
    range m = share_of(high, omp_get_thread_num() % in_rows, in_rows);
    range n = share_of(wide, omp_get_thread_num() / in_rows, threads / in_rows);
    m = (range){m.start * 2, least(m.stop * 2, by(s->rows, 16) / 16)}, n = (range){n.start * 2, n.stop * 2};
    return length_of(m) > 0 && length_of(n) > 0 && own_share(s, m, n);
}

/* y (rows, columns) = scale * sum of products, or that and y. */
int sum_of_products(const factors *f, int64_t number, bf16 *y, int64_t y_row, int64_t rows, int64_t columns,
                    float scale, int add) {
    sum s = sum_of(f, number, y, y_row, rows, columns, scale, add);
    int failed = 0;
#pragma omp parallel
    if (sum_in_team(&s)) failed = 1;
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

/* y (u_columns, v_columns) fp32, row after row, = u^T v over `rows`. */
typedef struct {
    const bf16 *u, *v;
    int64_t u_row, u_columns, v_row, v_columns, rows;
    float *y;
} over_rows;

static inline int tall(const over_rows *p) { return p->u_columns >= p->v_columns; }

static inline int64_t tiles_deep(const over_rows *p) { return by(p->rows, 32) / 32; }

/* Tiles across the shorter side. */
static inline int64_t tiles_few(const over_rows *p) { return by(tall(p) ? p->v_columns : p->u_columns, 32) / 16; }

/* Tiles of the shorter side, which all threads read. */
static inline int64_t tiles_shared(const over_rows *p) { return tiles_few(p) * tiles_deep(p); }

/* The shorter side in tiles, by a team, which has to wait for them. */
static void shorter_side(const over_rows *p, tile *all) {
    int64_t deep = tiles_deep(p);
#pragma omp for schedule(static) nowait
    for (int64_t k = 0; k < deep; k++)
        if (tall(p))
            tiles_of_columns(p->v + k * 32 * p->v_row, p->v_row, p->rows - k * 32, p->v_columns, 0, all + k, deep);
        else
            tiles_of_columns(p->u + k * 32 * p->u_row, p->u_row, p->rows - k * 32, p->u_columns, 1, all + k, deep);
}

/* What one thread of a team does of it, some of the longer side; nobody waits for the others. */
static int over_rows_in_team(const over_rows *p, const tile *all) {
    int64_t few = tiles_few(p), deep = tiles_deep(p), many = tall(p) ? p->u_columns : p->v_columns;
    range share = share_of(by(many, 32) / 32, omp_get_thread_num(), omp_get_num_threads());
    int64_t start = share.start * 32, own = least(share.stop * 32, many) - start, wide = by(own, 32) / 16;
    if (own <= 0) return 0;
    tile *strips = aligned_alloc(64, (size_t)(wide * (SOME + few)) * sizeof(tile)), *sums = strips + wide * SOME;
    if (!strips) return 1;
    set_matrix_unit();
    for (int64_t first = 0; first < deep; first += SOME) {
        int64_t some = least(deep - first, SOME);
        for (int64_t k = 0; k < some; k++) {
            int64_t row = (first + k) * 32, left = p->rows - row;
            if (tall(p)) tiles_of_columns(p->u + row * p->u_row + start, p->u_row, left, own, 1, strips + k, SOME);
            else tiles_of_columns(p->v + row * p->v_row + start, p->v_row, left, own, 0, strips + k, SOME);
        }
        if (tall(p))
            tile_product(wide, few, some, strips, (strides){SOME, 1}, all + first, (strides){1, deep}, sums,
                         (strides){few, 1}, first > 0);
        else
            tile_product(few, wide, some, all + first, (strides){deep, 1}, strips, (strides){1, SOME}, sums,
                         (strides){wide, 1}, first > 0);
    }
    if (tall(p)) put_wide(sums, wide, few, p->y + start * p->v_columns, own, p->v_columns, p->v_columns);
    else put_wide(sums, few, wide, p->y + start, p->u_columns, own, p->v_columns);
    _tile_release();
    free(strips);
    return 0;
}

int product_over_rows(const bf16 *u, int64_t u_row, int64_t u_columns, const bf16 *v, int64_t v_row, int64_t v_columns,
                      int64_t rows, float *y) {
    over_rows p = {u, v, u_row, u_columns, v_row, v_columns, rows, y};
    tile *all = aligned_alloc(64, (size_t)tiles_shared(&p) * sizeof(tile));
    if (!all) return 1;
    int failed = 0;
#pragma omp parallel
    {
        shorter_side(&p, all);
#pragma omp barrier
        if (over_rows_in_team(&p, all)) failed = 1;
    }
    free(all);
    return failed;
}
#endif
