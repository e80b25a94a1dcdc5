/* The equation of low-rank adaptation and its gradients, for projections of one x: y = W x + b + s B A x.

   The sums, and the order in them, are those of sum_of_products and product_over_rows, called one after the other as
   lora/linear.py does elsewhere. Here each way is one call, in which threads wait for each other where one reads what
   another wrote, not after each product. Included by c_blocks.c, after c_products.c. */

#ifdef AMX

/* W (out, inner) row after row, or (inner, out) where `by_columns`. A (r, inner) and B (out, r), row after row, in fp32
   where they are fine. y, or its gradient, (rows, out); gradients of A and B in fp32, or nowhere. */
typedef struct {
    const bf16 *weight, *bias;
    const void *a, *b;
    bf16 *y;
    float *ga, *gb;
    int64_t weight_row, by_columns, out, r, fine_a, fine_b, y_row;
    float scale;
    /* Set here: A and B in bf16, and which of the columns of h are this one's. */
    bf16 *rounded_a, *rounded_b;
    int64_t first;
} projection;

/* x (rows, inner), h (rows, ranks): s A x of all projections, or its gradient. */
typedef struct {
    const bf16 *x;
    bf16 *h;
    projection *p;
    int64_t x_row, rows, inner, number, ranks;
} adaptation;

static const bf16 ONE = 0x3f80;

static adaptation adaptation_of(projection *p, int64_t number, const bf16 *x, int64_t x_row, int64_t rows,
                                int64_t inner, bf16 *h) {
    adaptation t = {x, h, p, x_row, rows, inner, number, 0};
    for (int64_t i = 0; i < number; t.ranks += p[i++].r) p[i].first = t.ranks;
    return t;
}

/* Bytes, so that what comes next begins at a line. */
static inline int64_t bytes_of(int64_t elements, int64_t size) { return by(elements * size, 64); }

static int64_t bytes_rounded(const adaptation *t) {
    int64_t bytes = bytes_of(t->ranks * t->inner, sizeof(bf16));
    for (int64_t i = 0; i < t->number; i++) bytes += bytes_of(t->p[i].out * t->p[i].r, sizeof(bf16));
    return bytes;
}

/* Where the rounded factors go: the As below each other, then each B. */
static void place_rounded(const adaptation *t, char *room) {
    char *b = room + bytes_of(t->ranks * t->inner, sizeof(bf16));
    for (int64_t i = 0; i < t->number; i++) {
        projection *p = t->p + i;
        p->rounded_a = (bf16 *)room + p->first * t->inner;
        p->rounded_b = (bf16 *)b;
        b += bytes_of(p->out * p->r, sizeof(bf16));
    }
}

static void round_share(const void *from, int64_t fine, int64_t elements, bf16 *to) {
    const float *wide = from;
    range own = share_of(elements, omp_get_thread_num(), omp_get_num_threads());
    if (fine)
        for (int64_t i = own.start; i < own.stop; i++) to[i] = to_bf16(wide[i]);
    else memcpy(to + own.start, (const bf16 *)from + own.start, (size_t)length_of(own) * sizeof(bf16));
}

static void round_in_team(const adaptation *t) {
    for (int64_t i = 0; i < t->number; i++) {
        const projection *p = t->p + i;
        round_share(p->a, p->fine_a, p->r * t->inner, p->rounded_a);
        round_share(p->b, p->fine_b, p->out * p->r, p->rounded_b);
    }
}

/* h = s A x: in one product where the scales are alike. */
static int inner_in_team(const adaptation *t) {
    int alike = 1, failed = 0;
    for (int64_t i = 1; i < t->number; i++) alike &= t->p[i].scale == t->p[0].scale;
    for (int64_t i = 0; i < (alike ? 1 : t->number); i++) {
        const projection *p = t->p + i;
        factors f = {t->x, p->rounded_a, t->x_row, t->inner, t->inner, 1};
        sum s = sum_of(&f, 1, t->h + p->first, t->ranks, t->rows, alike ? t->ranks : p->r, p->scale, 0);
        failed |= sum_in_team(&s);
    }
    return failed;
}

/* y = W x + b + B h; the terms of B come last, so that those of zeros change no bit. */
static int output_in_team(const adaptation *t, const projection *p) {
    factors f[3] = {{t->x, p->weight, t->x_row, p->weight_row, t->inner, !p->by_columns}};
    int64_t number = 1;
    if (p->bias) f[number++] = (factors){&ONE, p->bias, 0, p->out, 1, 0};
    f[number++] = (factors){t->h + p->first, p->rounded_b, t->ranks, p->r, p->r, 1};
    sum s = sum_of(f, number, p->y, p->y_row, t->rows, p->out, 1, 0);
    return sum_in_team(&s);
}

int low_rank_forward(projection *p, int64_t number, const bf16 *x, int64_t x_row, int64_t rows, int64_t inner,
                     bf16 *h) {
    adaptation t = adaptation_of(p, number, x, x_row, rows, inner, h);
    char *room = aligned_alloc(64, (size_t)bytes_rounded(&t));
    if (!room) return 1;
    place_rounded(&t, room);
    int failed = 0;
#pragma omp parallel
    {
        round_in_team(&t);
#pragma omp barrier
        int own = inner_in_team(&t);
#pragma omp barrier
        for (int64_t i = 0; i < number; i++) own |= output_in_team(&t, p + i);
        if (own) failed = 1;
    }
    free(room);
    return failed;
}

/* gh = s B^T gy of each. */
static int inner_gradient_in_team(const adaptation *t) {
    int failed = 0;
    for (int64_t i = 0; i < t->number; i++) {
        const projection *p = t->p + i;
        factors f = {p->y, p->rounded_b, p->y_row, p->r, p->out, 0};
        sum s = sum_of(&f, 1, t->h + p->first, t->ranks, t->rows, p->r, p->scale, 0);
        failed |= sum_in_team(&s);
    }
    return failed;
}

/* gx = sum of W^T gy, and A^T gh. */
static int input_gradient_in_team(const adaptation *t, bf16 *gx) {
    factors f[t->number + 1];
    for (int64_t i = 0; i < t->number; i++) {
        const projection *p = t->p + i;
        f[i] = (factors){p->y, p->weight, p->y_row, p->weight_row, p->out, p->by_columns};
    }
    f[t->number] = (factors){t->h, t->p->rounded_a, t->ranks, t->inner, t->ranks, 0};
    sum s = sum_of(f, t->number + 1, gx, t->inner, t->rows, t->inner, 1, 0);
    return sum_in_team(&s);
}

/* A gradient of factors, and its shorter side in tiles. */
typedef struct {
    over_rows product;
    tile *shared;
} factor_gradient;

/* Which there are: gA = gh^T x of all projections at once, then each gB = gy^T h. Returns how many. */
static int64_t factor_gradients(const adaptation *t, const bf16 *h, float *ga, factor_gradient *to) {
    int64_t number = 0;
    if (ga)
        to[number++].product = (over_rows){t->h, t->x, t->ranks, t->ranks, t->x_row, t->inner, t->rows, ga};
    for (int64_t i = 0; i < t->number; i++) {
        const projection *p = t->p + i;
        over_rows gb = {p->y, h + p->first, p->y_row, p->out, t->ranks, p->r, t->rows, p->gb};
        if (p->gb) to[number++].product = gb;
    }
    return number;
}

/* The gradients of the As to where they belong. */
static void part_in_team(const adaptation *t, const float *ga) {
    for (int64_t i = 0; i < t->number; i++) {
        const projection *p = t->p + i;
        range own = share_of(p->r * t->inner, omp_get_thread_num(), omp_get_num_threads());
        if (!p->ga || p->ga == ga) continue;
        memcpy(p->ga + own.start, ga + p->first * t->inner + own.start, (size_t)length_of(own) * sizeof(float));
    }
}

/* y are their gradients, h as it was; gx may be wanted nowhere. */
int low_rank_backward(projection *p, int64_t number, const bf16 *x, int64_t x_row, int64_t rows, int64_t inner,
                      const bf16 *h, bf16 *gx) {
    adaptation t = adaptation_of(p, number, x, x_row, rows, inner, NULL);
    int any = 0;
    for (int64_t i = 0; i < number; i++) any |= p[i].ga != NULL;
    int64_t own_ga = any && number > 1 ? bytes_of(t.ranks * inner, sizeof(float)) : 0;
    int64_t gh = bytes_of(rows * t.ranks, sizeof(bf16));
    char *room = aligned_alloc(64, (size_t)(gh + own_ga + bytes_rounded(&t)));
    if (!room) return 1;
    t.h = (bf16 *)room;
    float *ga = own_ga ? (float *)(room + gh) : p->ga;
    place_rounded(&t, room + gh + own_ga);
    factor_gradient of[number + 1];
    int64_t products = factor_gradients(&t, h, ga, of), shared = 0;
    for (int64_t i = 0; i < products; i++) shared += tiles_shared(&of[i].product);
    tile *at = aligned_alloc(64, (size_t)shared * sizeof(tile)), *tiles = at;
    int failed = 0;
    if (shared && !tiles) {
        free(room);
        return 1;
    }
    for (int64_t i = 0; i < products; at += tiles_shared(&of[i++].product)) of[i].shared = at;
#pragma omp parallel
    {
        round_in_team(&t);
#pragma omp barrier
        int own = inner_gradient_in_team(&t);
#pragma omp barrier
        for (int64_t i = 0; i < products; i++) shorter_side(&of[i].product, of[i].shared);
        if (gx) own |= input_gradient_in_team(&t, gx);
#pragma omp barrier
        for (int64_t i = 0; i < products; i++) own |= over_rows_in_team(&of[i].product, of[i].shared);
        if (own_ga) {
#pragma omp barrier
            part_in_team(&t, ga);
        }
        if (own) failed = 1;
    }
    free(tiles);
    free(room);
    return failed;
}
#endif
