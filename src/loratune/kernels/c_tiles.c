/* Products of bf16 in tiles, summed in fp32, by the matrix unit of a processor (AMX).

   A matrix is stored tile by tile, 16 rows of 16 words each, so that what a product reads lies in one piece. A word of
   a left factor is two neighbours of a row, of a right factor two neighbours of a column, of a product one fp32.
   Included by c_blocks.c. */

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__)
#define AMX

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    uint32_t words[16][16];
} __attribute__((aligned(64))) tile;

/* How many tiles from one to the next along rows, and along columns. */
typedef struct {
    int64_t down, along;
} strides;

/* GCC 12's intrinsics do not say all that they read: what was stored before is in its place when they are used. */
#define STORED() __asm__ volatile("" ::: "memory")

static const struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) SHAPES = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* Each thread sets its own unit before products, and gives it back after them. */
static void set_matrix_unit(void) {
    STORED();
    _tile_loadconfig(&SHAPES);
}

/* A left factor as a product reads it: bytes from row to row, from one row of tiles to the next, and along it. */
typedef struct {
    const char *at;
    int64_t row, down, along;
} left_factor;

/* Up to 2 x 2 tiles of the product in the unit's registers 0 to 3, factors in 4 to 7. */
static inline __attribute__((always_inline)) void few_tiles(int tall, int wide, int64_t inner, left_factor a,
                                                            const tile *b, strides b_at, tile *c, strides c_at,
                                                            int add) {
    tile *c01 = c + c_at.along, *c10 = c + c_at.down, *c11 = c10 + c_at.along;
    STORED();
    if (add) {
        _tile_loadd(0, c, 64);
        if (wide > 1) _tile_loadd(1, c01, 64);
        if (tall > 1) _tile_loadd(2, c10, 64);
        if (tall > 1 && wide > 1) _tile_loadd(3, c11, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < inner; k++, a.at += a.along, b += b_at.down) {
        _tile_loadd(4, a.at, a.row);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (wide > 1) {
            _tile_loadd(7, b + b_at.along, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tall > 1) {
            _tile_loadd(5, a.at + a.down, a.row);
            _tile_dpbf16ps(2, 5, 6);
            if (wide > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 64);
    if (wide > 1) _tile_stored(1, c01, 64);
    if (tall > 1) _tile_stored(2, c10, 64);
    if (tall > 1 && wide > 1) _tile_stored(3, c11, 64);
}

/* C (+)= A B, all counted in tiles. */
static void tile_product(int64_t rows, int64_t columns, int64_t inner, const tile *a, strides a_at, const tile *b,
                         strides b_at, tile *c, strides c_at, int add) {
    int64_t size = sizeof(tile);
    for (int64_t n = 0; n < columns; n += 2)
        for (int64_t m = 0; m < rows; m += 2) {
            left_factor left = {(const char *)(a + m * a_at.down), 64, a_at.down * size, a_at.along * size};
            const tile *right = b + n * b_at.along;
            tile *to = c + m * c_at.down + n * c_at.along;
            int tall = rows - m > 1, wide = columns - n > 1;
            if (tall && wide) few_tiles(2, 2, inner, left, right, b_at, to, c_at, add);
            else if (tall) few_tiles(2, 1, inner, left, right, b_at, to, c_at, add);
            else if (wide) few_tiles(1, 2, inner, left, right, b_at, to, c_at, add);
            else few_tiles(1, 1, inner, left, right, b_at, to, c_at, add);
        }
}

/* Rows become columns. */
static void transposed(tile *t) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_load_si512(t->words[i]);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + 4 + j], 0x88);
            y[i + 4 + j] = _mm512_shuffle_i32x4(x[i + j], x[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        _mm512_store_si512(t->words[j], _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88));
        _mm512_store_si512(t->words[8 + j], _mm512_shuffle_i32x4(y[j], y[8 + j], 0xdd));
    }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Up to 16 rows of a left factor, row after row: tile after tile. Turned, they are columns of a right factor. */
static void strip_of_rows(const bf16 *x, int64_t x_row, int64_t rows, int64_t inner, int turned, tile *to) {
    for (int64_t i = 0; i < 16; i++, x += x_row)
        for (int64_t k = 0; k < inner; k += 32) {
            __mmask32 there = i < rows ? (__mmask32)((1ull << least(inner - k, 32)) - 1) : 0;
            _mm512_store_si512(to[k / 32].words[i], _mm512_maskz_loadu_epi16(there, x + k));
        }
    for (int64_t k = 0; turned && k < inner; k += 32) transposed(to + k / 32);
}

static inline __m512i words_of(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

/* Up to 32 rows of a right factor, pair of rows after pair: a tile of each strip of 16 columns, `apart` from one to the
   next, in pairs. Turned, they are columns of a left factor. */
static void tiles_of_columns(const bf16 *x, int64_t x_row, int64_t rows, int64_t columns, int turned, tile *to,
                             int64_t apart) {
    for (int64_t i = 0; i < 32; i += 2, x += 2 * x_row)
        for (int64_t n = 0; n < columns; n += 32) {
            __mmask32 there = (__mmask32)((1ull << least(columns - n, 32)) - 1);
            __m512i low = _mm512_maskz_loadu_epi16(i < rows ? there : 0, x + n);
            __m512i high = _mm512_maskz_loadu_epi16(i + 1 < rows ? there : 0, x + x_row + n);
            tile *first = to + n / 16 * apart, *second = first + apart;
            __m512i left = words_of(_mm512_castsi512_si256(low), _mm512_castsi512_si256(high));
            __m512i right = words_of(_mm512_extracti64x4_epi64(low, 1), _mm512_extracti64x4_epi64(high, 1));
            _mm512_store_si512(first->words[i / 2], left);
            _mm512_store_si512(second->words[i / 2], right);
        }
    for (int64_t n = 0; turned && n < by(columns, 32); n += 16) transposed(to + n / 16 * apart);
}

/* The same of (rows, columns) of whole tiles: tile after tile along a row. */
static void row_tiles(const bf16 *from, int64_t rows, int64_t columns, int turned, tile *to) {
    for (int64_t r = 0; r < rows; r += 16)
        strip_of_rows(from + r * columns, columns, 16, columns, turned, to + r / 16 * (columns / 32));
}

static void pair_tiles(const bf16 *from, int64_t rows, int64_t columns, int turned, tile *to) {
    for (int64_t r = 0; r < rows; r += 32)
        tiles_of_columns(from + r * columns, columns, 32, columns, turned, to + r / 32 * (columns / 16), 1);
}
#endif

/* Whether there is a matrix unit, and the system lets this process use it. */
int tiles(void) {
#ifdef AMX
    return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* the tiles' data */);
#else
    return 0;
#endif
}
