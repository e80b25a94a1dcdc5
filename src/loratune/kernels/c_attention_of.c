/* Attention of tensors of T. Included by c_attention.c, once for each dtype. */

/* The keys or values of a lane, its path's only where the run is `fresh`: by key (keys, dim), and where asked by
   feature (dim, most); zeros up to whole vectors. */
static void OF(gather)(const T *x, steps at, int64_t head, const work *w, const run *p, range lane, int fresh,
                       int64_t dim, int64_t most, float *by_key, float *by_feature) {
    int64_t j = fresh ? 0 : p->known, keys = by(p->known + length_of(lane), PADDED);
    for (int64_t r = fresh ? p->first_range : p->last_range; r <= p->last_range; r++) {
        range part = r < p->last_range ? w->ranges[r] : lane;
        for (int64_t token = part.start; token < part.stop; token++, j++) {
            const T *from = x + token * at.token + head * at.head;
            for (int64_t d = 0; d < dim; d++) by_key[j * dim + d] = OF(from)(from[d]);
        }
    }
    memset(by_key + j * dim, 0, (size_t)((keys - j) * dim) * sizeof(float));
    if (by_feature)
        for (int64_t first = fresh ? 0 : p->known / PADDED * PADDED; first < keys; first += PADDED)
            for (int64_t d = 0; d < dim; d++)
                for (int64_t i = first; i < first + PADDED; i++) by_feature[d * most + i] = by_key[i * dim + d];
}

/* Rows of some tokens, those of one token beside each other, times `scale`. */
static void OF(rows)(const T *x, steps at, int64_t head, const work *w, range tokens, int64_t dim, float scale,
                     float *to) {
    for (int64_t token = tokens.start; token < tokens.stop; token++)
        for (int64_t g = 0; g < w->groups; g++, to += dim) {
            const T *from = x + token * at.token + (head * w->groups + g) * at.head;
            for (int64_t d = 0; d < dim; d++) to[d] = OF(from)(from[d]) * scale;
        }
}

static void OF(put)(T *x, steps at, int64_t head, const work *w, range tokens, int64_t dim, float scale,
                    const float *from) {
    for (int64_t token = tokens.start; token < tokens.stop; token++)
        for (int64_t g = 0; g < w->groups; g++, from += dim) {
            T *to = x + token * at.token + (head * w->groups + g) * at.head;
            for (int64_t d = 0; d < dim; d++) to[d] = OF(to)(from[d] * scale);
        }
}

/* What each run gives the keys of its path, run after run, and all of it by token; by all threads. No two of them have
   one head's keys, or values. */
static void OF(put_by_token)(T *gk, steps gk_at, T *gv, steps gv_at, float *sums, const work *w) {
    int64_t both = w->dim + w->value_dim, row = w->heads * both;
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < 2 * w->heads; piece++) {
        int64_t head = piece / 2, of_values = piece % 2, features = of_values ? w->value_dim : w->dim;
        float *first = sums + head * both + (of_values ? w->dim : 0);
        for (int64_t i = 0; i < w->number; i++) {
            const run *p = w->runs + i;
            const float *from = first + (w->tokens + p->sum) * row;
            for (int64_t r = p->first_range; r < p->last_range; r++)
                for (int64_t token = w->ranges[r].start; token < w->ranges[r].stop; token++, from += row) {
                    float *to = first + token * row;
#pragma omp simd
                    for (int64_t d = 0; d < features; d++) to[d] += from[d];
                }
        }
        T *to = of_values ? gv + head * gv_at.head : gk + head * gk_at.head;
        for (int64_t token = 0; token < w->tokens; token++, to += of_values ? gv_at.token : gk_at.token)
            for (int64_t d = 0; d < features; d++) to[d] = OF(to)(first[token * row + d]);
    }
}

int OF(attend_forward)(const T *q, steps q_at, const T *k, steps k_at, const T *v, steps v_at, T *y, steps y_at,
                       const work *w) {
    int64_t dim = w->dim, wide = w->value_dim, most = by(most_keys(w), PADDED), rows = TOGETHER + w->groups;
    size_t floats = (size_t)(most * (2 * dim + wide) + rows * (dim + wide + most));
    int failed = 0;
#pragma omp parallel
    {
        float *place = malloc(floats * sizeof(float));
        if (!place) failed = 1;
        float *by_key = place, *keys_t = by_key + most * dim, *values = keys_t + most * dim;
        float *queries = values + most * wide, *scores = queries + rows * dim, *out = scores + rows * most;
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < w->number * w->heads; piece++) {
            const run *p = w->runs + piece / w->heads;
            int64_t head = piece % w->heads;
            for (int64_t i = p->first; place && i < p->last; i++) {
                range lane = w->lanes[i];
                OF(gather)(k, k_at, head, w, p, lane, i == p->first, dim, most, by_key, keys_t);
                OF(gather)(v, v_at, head, w, p, lane, i == p->first, wide, most, values, NULL);
                for (int64_t t = 0; t < length_of(lane); t += tokens_together(w)) {
                    range block = part_of(lane, t, tokens_together(w));
                    int64_t number = length_of(block) * w->groups, seen;
                    int64_t from = seen_of(w, p, lane, block, &seen);
                    OF(rows)(q, q_at, head, w, block, dim, w->scale, queries);
                    product(number, seen, dim, queries, dim, 1, keys_t + from, most, scores, seen, 0);
                    for (int64_t r = 0; r < number; r++) {
                        int64_t token = t + r / w->groups;
                        softmax_row(scores + r * seen, lowest(w, p, token) - from, p->known + token + 1 - from, seen);
                    }
                    product(number, wide, seen, scores, seen, 1, values + from * wide, wide, out, wide, 0);
                    OF(put)(y, y_at, head, w, block, wide, 1.0f, out);
                }
            }
        }
        free(place);
    }
    return failed;
}

/* sums: the gradients of keys and values of all tokens, and of all runs' paths: (tokens + keys, heads, dims) fp32. */
int OF(attend_backward)(const T *gy, steps gy_at, const T *q, steps q_at, const T *k, steps k_at, const T *v,
                        steps v_at, T *gq, steps gq_at, T *gk, steps gk_at, T *gv, steps gv_at, float *sums,
                        const work *w) {
    int64_t dim = w->dim, wide = w->value_dim, most = by(most_keys(w), PADDED), rows = TOGETHER + w->groups;
    size_t floats = (size_t)(3 * most * (dim + wide) + rows * (2 * dim + wide + 2 * most));
    int failed = 0;
#pragma omp parallel
    {
        float *place = malloc(floats * sizeof(float));
        if (!place) failed = 1;
        float *keys = place, *keys_t = keys + most * dim, *values = keys_t + most * dim;
        float *values_t = values + most * wide, *g_keys = values_t + most * wide, *g_values = g_keys + most * dim;
        float *queries = g_values + most * wide, *grads = queries + rows * dim, *probs = grads + rows * wide;
        float *g_probs = probs + rows * most, *out = g_probs + rows * most;
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < w->number * w->heads; piece++) {
            const run *p = w->runs + piece / w->heads;
            int64_t head = piece % w->heads;
            for (int64_t i = p->first; place && i < p->last; i++) {
                range lane = w->lanes[i];
                int64_t new = i == p->first ? 0 : p->known, all = by(p->known + length_of(lane), PADDED);
                OF(gather)(k, k_at, head, w, p, lane, !new, dim, most, keys, keys_t);
                OF(gather)(v, v_at, head, w, p, lane, !new, wide, most, values, values_t);
                memset(g_keys + new * dim, 0, (size_t)((all - new) * dim) * sizeof(float));
                memset(g_values + new * wide, 0, (size_t)((all - new) * wide) * sizeof(float));
                for (int64_t t = 0; t < length_of(lane); t += tokens_together(w)) {
                    range block = part_of(lane, t, tokens_together(w));
                    int64_t number = length_of(block) * w->groups, seen;
                    int64_t from = seen_of(w, p, lane, block, &seen);
                    OF(rows)(q, q_at, head, w, block, dim, w->scale, queries);
                    OF(rows)(gy, gy_at, head, w, block, wide, 1.0f, grads);
                    product(number, seen, dim, queries, dim, 1, keys_t + from, most, probs, seen, 0);
                    product(number, seen, wide, grads, wide, 1, values_t + from, most, g_probs, seen, 0);
                    for (int64_t r = 0; r < number; r++) {
                        int64_t token = t + r / w->groups, low = lowest(w, p, token) - from;
                        int64_t high = p->known + token + 1 - from;
                        softmax_row(probs + r * seen, low, high, seen);
                        softmax_back(probs + r * seen, g_probs + r * seen, low, high, seen);
                    }
                    product(seen, wide, number, probs, 1, seen, grads, wide, g_values + from * wide, wide, 1);
                    product(seen, dim, number, g_probs, 1, seen, queries, dim, g_keys + from * dim, dim, 1);
                    product(number, dim, seen, g_probs, seen, 1, keys + from * dim, dim, out, dim, 0);
                    OF(put)(gq, gq_at, head, w, block, dim, w->scale, out);
                }
                int64_t last = i + 1 == p->last ? 0 : p->known;
                for (int64_t j = last; j < p->known + length_of(lane); j++) {
                    float *to = sums_of(sums, w, p, lane, head, j);
                    memcpy(to, g_keys + j * dim, (size_t)dim * sizeof(float));
                    memcpy(to + dim, g_values + j * wide, (size_t)wide * sizeof(float));
                }
            }
        }
        free(place);
        OF(put_by_token)(gk, gk_at, gv, gv_at, sums, w);
    }
    return failed;
}
