/* Attention of bf16 as in c_attention.c, with products in tiles.

   Scores, their exponentials and all sums are fp32; what goes into a product is rounded to bf16 before. Keys come some
   at a time, and the backward pass computes the probabilities again from each row's total (Dao, FlashAttention-2,
   arXiv:2307.08691, algorithms 1 and 2), so that nothing grows with a lane but its keys. Included by c_blocks.c. */

#ifdef AMX

/* Rows of queries, and keys, that are computed together: in tiles of 16 by 16. */
#define ROWS 64
#define KEYS 256

#define LOG2_E 1.44269504f
#define LOWEST -1e30f

typedef struct {
    int64_t dim, wide;         /* of keys, and of values, by whole tiles of 32 */
    int64_t step, rows;        /* tokens of a block of queries, and rows of it by whole tiles of 32 */
    int64_t most;              /* keys of the longest lane, by whole tiles of 32 */
} sizes;

static sizes sizes_of(const work *w) {
    int64_t step = ROWS / w->groups > 1 ? ROWS / w->groups : 1;
    return (sizes){by(w->dim, 32), by(w->value_dim, 32), step, by(step * w->groups, 32), by(most_keys(w), 32)};
}

/* Pieces of one thread's room, each on a line of its own. */
typedef struct {
    char *next;
} room;

static void *taken(room *from, int64_t bytes) {
    char *found = from->next;
    from->next += by(bytes, 64);
    return found;
}

static tile *taken_tiles(room *from, int64_t rows, int64_t columns) {
    return taken(from, rows * columns / 256 * (int64_t)sizeof(tile));
}

/* Rows of a lane's keys or values, its path's only where the run is `fresh`; zeros up to whole tiles. */
static void keys_of(const bf16 *x, steps at, int64_t head, const work *w, const run *p, range lane, int fresh,
                    int64_t dim, int64_t wide, bf16 *rows) {
    bf16 *to = rows + (fresh ? 0 : p->known * wide);
    for (int64_t r = fresh ? p->first_range : p->last_range; r <= p->last_range; r++) {
        range part = r < p->last_range ? w->ranges[r] : lane;
        for (int64_t token = part.start; token < part.stop; token++, to += wide) {
            memcpy(to, x + token * at.token + head * at.head, (size_t)dim * 2);
            memset(to + dim, 0, (size_t)(wide - dim) * 2);
        }
    }
    memset(to, 0, (size_t)(rows + by(p->known + length_of(lane), 32) * wide - to) * 2);
}

/* Rows of some tokens' queries, those of one token beside each other, zeros up to whole tiles. */
static void queries_of(const bf16 *x, steps at, int64_t head, const work *w, range tokens, int64_t dim,
                       int64_t wide, int64_t rows, bf16 *to) {
    bf16 *end = to + rows * wide;
    for (int64_t token = tokens.start; token < tokens.stop; token++)
        for (int64_t g = 0; g < w->groups; g++, to += wide) {
            memcpy(to, x + token * at.token + (head * w->groups + g) * at.head, (size_t)dim * 2);
            memset(to + dim, 0, (size_t)(wide - dim) * 2);
        }
    memset(to, 0, (size_t)(end - to) * 2);
}

/* Rows of a product in tiles, `columns` tiles from one row of tiles to the next, times a scale for each. */
static void put_rows(bf16 *x, steps at, int64_t head, const work *w, range tokens, int64_t dim,
                     const float *scales, const tile *from, int64_t columns) {
    int64_t r = 0;
    for (int64_t token = tokens.start; token < tokens.stop; token++)
        for (int64_t g = 0; g < w->groups; g++, r++) {
            bf16 *to = x + token * at.token + (head * w->groups + g) * at.head;
            const tile *row = from + r / 16 * columns;
            for (int64_t d = 0; d < dim; d += 16, row++) {
                __m512 scaled = _mm512_mul_ps(_mm512_load_ps(row->words[r % 16]), _mm512_set1_ps(scales[r]));
                _mm256_storeu_si256((__m256i *)(to + d), (__m256i)_mm512_cvtneps_pbh(scaled));
            }
        }
}

/* 2^x to 4e-6 of it: a polynomial that interpolates it at Chebyshev's points of [-1/2, 1/2]. */
static inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-1000.0f), x); /* of an infinity nothing is left; a NaN stays */
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(0.00966636852f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0559219758f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24022349f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693121045f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* Which of 16 keys from `first` on lie between `low` and `high`. */
static inline __mmask16 visible(int64_t first, int64_t low, int64_t high) {
    if (first >= low && first + 16 <= high) return 0xffff;
    int64_t from = low - first > 0 ? low - first : 0, to = high - first < 16 ? high - first : 16;
    return from >= to ? 0 : (__mmask16)((1u << to) - (1u << from));
}

/* A row of some keys' scores becomes its weights, 2^(c score - most), rounded, as a row of a left factor. `most`, the
   greatest c score, and `sum` are those of the row up to now; gives what earlier weights are to be multiplied by. */
static float weigh(const tile *scores, tile *weights, int64_t r, int64_t first, int64_t keys, int64_t low, int64_t high,
                   float c, float *most, float *sum) {
    __m512 greatest = _mm512_set1_ps(*most), scale = _mm512_set1_ps(c);
    for (int64_t n = 0; n < keys / 16; n++) {
        __mmask16 seen = visible(first + n * 16, low, high);
        __m512 x = _mm512_mul_ps(_mm512_load_ps(scores[n].words[r]), scale);
        greatest = _mm512_mask_max_ps(greatest, seen, greatest, x);
    }
    float now = _mm512_reduce_max_ps(greatest), before = *most;
    __m512 off = _mm512_set1_ps(-now), total = _mm512_setzero_ps();
    for (int64_t n = 0; n < keys / 16; n++) {
        __mmask16 seen = visible(first + n * 16, low, high);
        __m512 x = exp2_of(_mm512_fmadd_ps(_mm512_load_ps(scores[n].words[r]), scale, off));
        x = _mm512_maskz_mov_ps(seen, x);
        total = _mm512_add_ps(total, x);
        _mm256_store_si256((__m256i *)(weights[n / 2].words[r] + n % 2 * 8), (__m256i)_mm512_cvtneps_pbh(x));
    }
    float share = now == before ? 1.0f : exp_of((before - now) * (1 / LOG2_E));
    *most = now;
    *sum = *sum * share + _mm512_reduce_add_ps(total);
    return share;
}

static void multiplied(tile *t, int64_t r, int64_t columns, float by) {
    for (int64_t n = 0; n < columns; n++)
        _mm512_store_ps(t[n].words[r], _mm512_mul_ps(_mm512_load_ps(t[n].words[r]), _mm512_set1_ps(by)));
}

/* Where the total of a block's row is among those of (tokens, heads). */
static inline int64_t total_of(const work *w, range block, int64_t head, int64_t r) {
    return (block.start + r / w->groups) * w->heads * w->groups + head * w->groups + r % w->groups;
}

int attend_forward_tiles(const bf16 *q, steps q_at, const bf16 *k, steps k_at, const bf16 *v, steps v_at, bf16 *y,
                         steps y_at, float *totals, const work *w) {
    sizes s = sizes_of(w);
    int64_t dims = s.dim / 32, wides = s.wide / 16;
    int64_t bytes = 64 * 16 + s.most * (s.dim + s.wide) * 4 + s.rows * (s.dim * 4 + s.wide * 4 + 8 + KEYS * 6);
    float c = w->scale * LOG2_E;
    int failed = 0;
#pragma omp parallel
    {
        char *place = aligned_alloc(64, (size_t)by(bytes, 64));
        if (!place) failed = 1;
        room from = {place};
        bf16 *key_rows = taken(&from, s.most * s.dim * 2), *value_rows = taken(&from, s.most * s.wide * 2);
        bf16 *rows = taken(&from, s.rows * s.dim * 2);
        tile *keys = taken_tiles(&from, s.most, s.dim / 2), *values = taken_tiles(&from, s.most / 2, s.wide);
        tile *queries = taken_tiles(&from, s.rows, s.dim / 2), *out = taken_tiles(&from, s.rows, s.wide);
        tile *scores = taken_tiles(&from, s.rows, KEYS), *weights = taken_tiles(&from, s.rows, KEYS / 2);
        float *greatest = taken(&from, s.rows * 4), *sums = taken(&from, s.rows * 4);
        set_matrix_unit();
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < w->number * w->heads; piece++) {
            const run *p = w->runs + piece / w->heads;
            int64_t head = piece % w->heads;
            for (int64_t i = p->first; place && i < p->last; i++) {
                range lane = w->lanes[i];
                int64_t new = i == p->first ? 0 : p->known / 32 * 32, all = by(p->known + length_of(lane), 32) - new;
                keys_of(k, k_at, head, w, p, lane, i == p->first, w->dim, s.dim, key_rows);
                keys_of(v, v_at, head, w, p, lane, i == p->first, w->value_dim, s.wide, value_rows);
                row_tiles(key_rows + new * s.dim, all, s.dim, 1, keys + new / 16 * dims);
                pair_tiles(value_rows + new * s.wide, all, s.wide, 0, values + new / 32 * wides);
                for (int64_t t = 0; t < length_of(lane); t += s.step) {
                    range block = part_of(lane, t, s.step);
                    int64_t number = length_of(block) * w->groups, high = by(number, 32) / 16;
                    queries_of(q, q_at, head, w, block, w->dim, s.dim, high * 16, rows);
                    row_tiles(rows, high * 16, s.dim, 0, queries);
                    for (int64_t r = 0; r < number; r++) greatest[r] = LOWEST, sums[r] = 0.0f;
                    int64_t seen = by(p->known + t + length_of(block), 32), begin = lowest(w, p, t) / 32 * 32;
                    for (int64_t first = begin; first < seen; first += KEYS) {
                        int64_t some = seen - first < KEYS ? seen - first : KEYS;
                        tile_product(high, some / 16, dims, queries, (strides){dims, 1}, keys + first / 16 * dims,
                                     (strides){1, dims}, scores, (strides){some / 16, 1}, 0);
                        for (int64_t r = 0; r < number; r++) {
                            int64_t token = t + r / w->groups;
                            float share = weigh(scores + r / 16 * (some / 16), weights + r / 16 * (some / 32), r % 16,
                                                first, some, lowest(w, p, token), p->known + token + 1, c, greatest + r,
                                                sums + r);
                            if (first > begin && share != 1.0f) multiplied(out + r / 16 * wides, r % 16, wides, share);
                        }
                        tile_product(high, wides, some / 32, weights, (strides){some / 32, 1},
                                     values + first / 32 * wides, (strides){wides, 1}, out, (strides){wides, 1},
                                     first > begin);
                    }
                    for (int64_t r = 0; r < number; r++) {
                        totals[total_of(w, block, head, r)] = greatest[r] + log2f(sums[r]);
                        sums[r] = 1.0f / sums[r];
                    }
                    put_rows(y, y_at, head, w, block, w->value_dim, sums, out, wides);
                }
            }
        }
        _tile_release();
        free(place);
    }
    return failed;
}

/* Two rows of a right factor from two rows of numbers. */
static inline __m512i paired(__m512 low, __m512 high) {
    __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    return _mm512_or_si512(first, _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high)), 16));
}

/* A row of queries: which keys it sees, log2 of its total, and the sum over its probabilities times their gradients. */
typedef struct {
    int64_t low, high;
    float total, mean;
} seen_row;

/* Rows r and r + 1 of scores and of the probabilities' gradients for some keys become p = 2^(c score - total) and
   d = p (gradient - mean): both as rows of right factors, d as rows of a left one too. */
static void weigh_back(const tile *scores, const tile *grads, int64_t r, int64_t first, int64_t keys,
                       const seen_row *row, float c, int64_t pair, tile *p_pairs, tile *d_pairs, tile *d_rows) {
    __m512 scale = _mm512_set1_ps(c), p[2], d[2];
    for (int64_t n = 0; n < keys / 16; n++) {
        for (int i = 0; i < 2; i++) {
            __mmask16 seen = visible(first + n * 16, row[i].low, row[i].high);
            __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores[n].words[r + i]), scale, _mm512_set1_ps(row[i].total));
            p[i] = _mm512_maskz_mov_ps(seen, exp2_of(x));
            x = _mm512_sub_ps(_mm512_load_ps(grads[n].words[r + i]), _mm512_set1_ps(row[i].mean));
            d[i] = _mm512_maskz_mul_ps(seen, p[i], x);
            _mm256_store_si256((__m256i *)(d_rows[n / 2].words[r + i] + n % 2 * 8), (__m256i)_mm512_cvtneps_pbh(d[i]));
        }
        _mm512_store_si512(p_pairs[n].words[pair], paired(p[0], p[1]));
        _mm512_store_si512(d_pairs[n].words[pair], paired(d[0], d[1]));
    }
}

static float dot(const bf16 *a, const bf16 *b, int64_t n) {
    float sum = 0.0f;
    #pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += from_bf16(a[i]) * from_bf16(b[i]);
    return sum;
}

/* What is known of the rows of a block of queries, from their gradients and results; rows beyond see no key. */
static void look_up(seen_row *told, int64_t rows, const bf16 *grads, int64_t wide, const bf16 *y, steps y_at,
                    int64_t head, const float *totals, const work *w, const run *p, range lane, range block) {
    int64_t number = length_of(block) * w->groups;
    for (int64_t r = 0; r < number; r++) {
        int64_t token = block.start + r / w->groups, own = token - lane.start;
        const bf16 *result = y + token * y_at.token + (head * w->groups + r % w->groups) * y_at.head;
        told[r] = (seen_row){lowest(w, p, own), p->known + own + 1, totals[total_of(w, block, head, r)],
                             dot(grads + r * wide, result, w->value_dim)};
    }
    for (int64_t r = number; r < rows; r++) told[r] = (seen_row){0, 0, 0.0f, 0.0f};
}

/* What lanes gave a run's keys or values from the j-th on, of tiles of (features, keys), `tiles` below each other. */
static void put_sums(float *sums, const work *w, const run *p, range lane, int64_t head, int64_t j, const tile *grads,
                     int64_t features, int64_t tiles, int64_t at, float scale) {
    tile turned;
    int64_t number = p->known + length_of(lane);
    for (int64_t first = j / 16 * 16; first < number; first += 16)
        for (int64_t n = 0; n < features / 16; n++) {
            turned = grads[first / 16 * tiles + n];
            transposed(&turned);
            for (int64_t i = first > j ? first : j; i < number && i < first + 16; i++) {
                __m512 scaled = _mm512_mul_ps(_mm512_load_ps(turned.words[i - first]), _mm512_set1_ps(scale));
                _mm512_storeu_ps(sums_of(sums, w, p, lane, head, i) + at + n * 16, scaled);
            }
        }
}

/* Zeros from the j-th key on, of tiles of (features, keys) with `tiles` below each other. */
static void zeros_from(int64_t j, int64_t keys, tile *grads, int64_t tiles) {
    tile *first = grads + j / 16 * tiles, *next = grads + by(j, 16) / 16 * tiles;
    for (tile *t = first; t < next; t++)
        for (int d = 0; d < 16; d++) memset(t->words[d] + j % 16, 0, (size_t)(16 - j % 16) * 4);
    memset(next, 0, (size_t)(grads + keys / 16 * tiles - next) * sizeof(tile));
}

int attend_backward_tiles(const bf16 *gy, steps gy_at, const bf16 *q, steps q_at, const bf16 *k, steps k_at,
                          const bf16 *v, steps v_at, const bf16 *y, steps y_at, bf16 *gq, steps gq_at, bf16 *gk,
                          steps gk_at, bf16 *gv, steps gv_at, const float *totals, float *sums, const work *w) {
    sizes s = sizes_of(w);
    int64_t dims = s.dim / 16, wides = s.wide / 16, across = s.dim > s.wide ? s.dim : s.wide;
    int64_t bytes = 64 * 24 + s.most * (s.dim * 10 + s.wide * 8)
                    + s.rows * (across * 2 + s.dim * 8 + s.wide * 4 + KEYS * 14 + 4 + (int64_t)sizeof(seen_row));
    float c = w->scale * LOG2_E;
    int failed = 0;
#pragma omp parallel
    {
        char *place = aligned_alloc(64, (size_t)by(bytes, 64));
        if (!place) failed = 1;
        room from = {place};
        bf16 *key_rows = taken(&from, s.most * s.dim * 2), *value_rows = taken(&from, s.most * s.wide * 2);
        tile *keys_t = taken_tiles(&from, s.most, s.dim / 2), *keys = taken_tiles(&from, s.most / 2, s.dim);
        tile *values_t = taken_tiles(&from, s.most, s.wide / 2);
        tile *g_keys = taken_tiles(&from, s.most, s.dim), *g_values = taken_tiles(&from, s.most, s.wide);
        bf16 *rows = taken(&from, s.rows * across * 2);
        tile *queries = taken_tiles(&from, s.rows, s.dim / 2), *queries_t = taken_tiles(&from, s.rows / 2, s.dim);
        tile *grads = taken_tiles(&from, s.rows, s.wide / 2), *grads_t = taken_tiles(&from, s.rows / 2, s.wide);
        tile *out = taken_tiles(&from, s.rows, s.dim);
        tile *scores = taken_tiles(&from, s.rows, KEYS), *g_weights = taken_tiles(&from, s.rows, KEYS);
        tile *p_pairs = taken_tiles(&from, s.rows / 2, KEYS), *d_pairs = taken_tiles(&from, s.rows / 2, KEYS);
        tile *d_rows = taken_tiles(&from, s.rows, KEYS / 2);
        seen_row *told = taken(&from, s.rows * (int64_t)sizeof(seen_row));
        float *scales = taken(&from, s.rows * 4);
        for (int64_t r = 0; place && r < s.rows; r++) scales[r] = w->scale;
        set_matrix_unit();
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < w->number * w->heads; piece++) {
            const run *p = w->runs + piece / w->heads;
            int64_t head = piece % w->heads;
            for (int64_t i = p->first; place && i < p->last; i++) {
                range lane = w->lanes[i];
                int64_t new = i == p->first ? 0 : p->known, all = by(p->known + length_of(lane), 32);
                int64_t old = new / 32 * 32;
                keys_of(k, k_at, head, w, p, lane, i == p->first, w->dim, s.dim, key_rows);
                keys_of(v, v_at, head, w, p, lane, i == p->first, w->value_dim, s.wide, value_rows);
                row_tiles(key_rows + old * s.dim, all - old, s.dim, 1, keys_t + old / 16 * (dims / 2));
                pair_tiles(key_rows + old * s.dim, all - old, s.dim, 0, keys + old / 32 * dims);
                row_tiles(value_rows + old * s.wide, all - old, s.wide, 1, values_t + old / 16 * (wides / 2));
                zeros_from(new, all, g_keys, dims);
                zeros_from(new, all, g_values, wides);
                for (int64_t t = 0; t < length_of(lane); t += s.step) {
                    range block = part_of(lane, t, s.step);
                    int64_t high = by(length_of(block) * w->groups, 32) / 16;
                    queries_of(q, q_at, head, w, block, w->dim, s.dim, high * 16, rows);
                    row_tiles(rows, high * 16, s.dim, 0, queries);
                    pair_tiles(rows, high * 16, s.dim, 1, queries_t);
                    queries_of(gy, gy_at, head, w, block, w->value_dim, s.wide, high * 16, rows);
                    row_tiles(rows, high * 16, s.wide, 0, grads);
                    pair_tiles(rows, high * 16, s.wide, 1, grads_t);
                    look_up(told, high * 16, rows, s.wide, y, y_at, head, totals, w, p, lane, block);
                    int64_t seen = by(p->known + t + length_of(block), 32), begin = lowest(w, p, t) / 32 * 32;
                    for (int64_t first = begin; first < seen; first += KEYS) {
                        int64_t some = seen - first < KEYS ? seen - first : KEYS, n = some / 16, key = first / 16;
                        tile_product(high, n, dims / 2, queries, (strides){dims / 2, 1}, keys_t + key * (dims / 2),
                                     (strides){1, dims / 2}, scores, (strides){n, 1}, 0);
                        tile_product(high, n, wides / 2, grads, (strides){wides / 2, 1}, values_t + key * (wides / 2),
                                     (strides){1, wides / 2}, g_weights, (strides){n, 1}, 0);
                        for (int64_t r = 0; r < high * 16; r += 2)
                            weigh_back(scores + r / 16 * n, g_weights + r / 16 * n, r % 16, first, some, told + r, c,
                                       r / 2 % 16, p_pairs + r / 32 * n, d_pairs + r / 32 * n,
                                       d_rows + r / 16 * (n / 2));
                        tile_product(wides, n, high / 2, grads_t, (strides){1, wides}, p_pairs, (strides){n, 1},
                                     g_values + key * wides, (strides){1, wides}, 1);
                        tile_product(dims, n, high / 2, queries_t, (strides){1, dims}, d_pairs, (strides){n, 1},
                                     g_keys + key * dims, (strides){1, dims}, 1);
                        tile_product(high, dims, n / 2, d_rows, (strides){n / 2, 1}, keys + key / 2 * dims,
                                     (strides){dims, 1}, out, (strides){dims, 1}, first > begin);
                    }
                    put_rows(gq, gq_at, head, w, block, w->dim, scales, out, dims);
                }
                int64_t from_key = i + 1 == p->last ? 0 : p->known;
                put_sums(sums, w, p, lane, head, from_key, g_keys, w->dim, dims, 0, w->scale);
                put_sums(sums, w, p, lane, head, from_key, g_values, w->value_dim, wides, w->dim, 1.0f);
            }
        }
        _tile_release();
        free(place);
        put_by_token_bf16(gk, gk_at, gv, gv_at, sums, w);
    }
    return failed;
}
#endif
