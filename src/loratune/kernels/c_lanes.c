/* A packed row as attention reads it: runs of lanes behind one path. As in lanes.py. Included by c_blocks.c. */


/* A tensor of (tokens, heads, dim): elements from token to token and from head to head. */
typedef struct {
    int64_t token, head;
} steps;

/* Of tokens. */
typedef struct {
    int64_t start, stop;
} range;

/* Lanes from `first` to before `last`, all behind the `known` keys of the ranges from `first_range` to before
   `last_range`; sum: where the gradients of these keys begin among those of all runs.

   One run of one key head is one piece of work, done by one thread from its keys to its result, so that the number of
   threads changes no bit. */
typedef struct {
    int64_t first, last, known, first_range, last_range, sum;
} run;

typedef struct {
    const run *runs;
    const range *lanes, *ranges;
    int64_t number, tokens, heads, groups, dim, value_dim, window;
    float scale;
} work;

static inline int64_t by(int64_t n, int64_t whole) { return (n + whole - 1) / whole * whole; }

static inline int64_t length_of(range lane) { return lane.stop - lane.start; }

/* A block of a lane's queries from its token t on. */
static inline range part_of(range lane, int64_t t, int64_t step) {
    int64_t stop = lane.start + t + step;
    return (range){lane.start + t, stop < lane.stop ? stop : lane.stop};
}

/* The most keys that a lane has, its own included. */
static int64_t most_keys(const work *w) {
    int64_t most = 0;
    for (int64_t i = 0; i < w->number; i++)
        for (int64_t j = w->runs[i].first; j < w->runs[i].last; j++) {
            int64_t keys = w->runs[i].known + length_of(w->lanes[j]);
            most = keys > most ? keys : most;
        }
    return most;
}

/* The first key, counted along path and lane, that the query of a lane's token t may see. */
static inline int64_t lowest(const work *w, const run *p, int64_t t) {
    int64_t low = w->window ? p->known + t + 1 - w->window : 0;
    return low > 0 ? low : 0;
}

/* Where the gradients of a run's key, on its path, or of its lane's j-th own, are in `sums`: after those of all tokens,
   or with its token. */
static inline float *sums_of(float *sums, const work *w, const run *p, range lane, int64_t head, int64_t j) {
    int64_t place = j < p->known ? w->tokens + p->sum + j : lane.start + j - p->known;
    return sums + (place * w->heads + head) * (w->dim + w->value_dim);
}
