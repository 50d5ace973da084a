// Matrix products in bfloat16 on the tile registers of a processor with AMX, for kernels.c.
//
// A number x of the left side is split into bfloat16 terms, high = bfloat16(x) and low = bfloat16(x - high), which keep
// 16 of its 24 bits. The right side is a weight in bfloat16. Products are exact and sums are float32, so the result is
// nearly as exact as if only the weight were rounded.
//
// A tile register holds 16 rows of 64 bytes. The left side is stored as it is loaded, in blocks of 32 rows:
// [ceil(rows / 32)][ceil(k / 32)][terms][32][32]. Strided rows took up to twice the time. Weights are stored as they are loaded: a panel of 32 columns is
// [ceil(k / 32)][2][16][16][2]: for 32 steps of k two tiles of 16 columns, whose rows are pairs of k. Behind k and n are
// zeros. Steps of INT8 are whole numbers below 128 and so are bfloat16 numbers; they are converted for each block of
// rows, and their sizes are multiplied in behind the sum.
//
// Without AMX, `plain_tile` computes the same bits, so that every machine with AVX-512 can test what is built on it.

enum { STEP = 32, SPAN = 32 }; // inputs of one tile instruction, and columns of a panel

_Static_assert(NR == SPAN, "a panel has two tiles of 16 columns");

// Bits of a number rounded to bfloat16, to the nearest, ties to even, in the upper half of a word.
#define ROUNDED(bits) (((bits) + 0x7fff + (((bits) >> 16) & 1)) & 0xffff0000)

// Where a number's first term is among split rows of k numbers. The others are SPLIT_STEP behind each other.
#define SPLIT_STEP (TILE_ROWS * STEP)
INLINE uint16_t *split_at(float *rows, int64_t k, int64_t terms, int64_t row, int64_t column) {
    int64_t block = row / TILE_ROWS * up_to(k, STEP) / STEP + column / STEP;
    return (uint16_t *)rows + block * terms * SPLIT_STEP + row % TILE_ROWS * STEP + column % STEP;
}

// x / (1 + exp(-x)) in half the time of `activate`, to 4 units in the last place, for numbers that are split next.
INLINE Vector silu(Vector x) {
    __m512 value = _mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)x); // keeps NaN
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(value, _mm512_set1_ps(-1.44269504088896341f)), 0);
    Vector r = (Vector)_mm512_fnmadd_ps(n, _mm512_set1_ps(0.69314718055994531f), _mm512_sub_ps(_mm512_setzero_ps(), value));
    Vector p = broadcast(1.0f / 720);
    p = p * r + broadcast(1.0f / 120);
    p = p * r + broadcast(1.0f / 24);
    p = p * r + broadcast(1.0f / 6);
    p = p * r + broadcast(0.5f);
    p = p * r + broadcast(1.0f);
    p = p * r + broadcast(1.0f);
    Vector divisor = broadcast(1.0f) + (Vector)_mm512_scalef_ps((__m512)p, n);
    Vector inverse = (Vector)_mm512_rcp14_ps((__m512)divisor);
    return x * (inverse * (broadcast(2.0f) - divisor * inverse));
}

// Write the terms of 16 numbers.
INLINE void split_vector(Vector value, int64_t terms, uint16_t *out) {
    for (int64_t term = 0; term < terms; term++, out += SPLIT_STEP) {
        Integers bits = (Integers)value;
        bits = ROUNDED(bits);
        _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)bits, 16)));
        value -= (Vector)bits;
    }
}

// Split a row of k numbers; zeros behind k.
static void split_row(const float *x, int64_t k, int64_t terms, float *rows, int64_t row) {
    for (int64_t j = 0; j < up_to(k, STEP); j += VL) {
        __mmask16 inside = (__mmask16)(j + VL <= k ? 0xffff : j < k ? (1 << (k - j)) - 1 : 0);
        split_vector((Vector)_mm512_maskz_loadu_ps(inside, x + j), terms, split_at(rows, k, terms, row, j));
    }
}

// A row-major or 8-bit panel -> tiles of bfloat16.
static void tiles_of(const Linear *linear, int64_t index, uint32_t *tiles) {
    int64_t k = linear->k, columns = least(SPAN, linear->n - index * SPAN);
    const char *panel = stored_panel(linear, index);
    for (int64_t pair = 0; pair < up_to(k, STEP) / 2; pair++) {
        uint32_t *target = tiles + pair / 16 * 16 * SPAN + pair % 16 * 16;
        if (linear->kind == INT8) {
            const int8_t *row = (const int8_t *)panel + NR * sizeof(float) + 2 * pair * NR;
            for (int64_t half = 0; half < 2; half++, row += VL) {
                Integers low = {0}, high = {0};
                if (2 * pair < k) low = (Integers)floats(row);
                if (2 * pair + 1 < k) high = (Integers)floats(row + NR);
                store((float *)(target + half * 256), (Vector)((low >> 16 & 0xffff) | (high & (int32_t)0xffff0000)));
            }
            continue;
        }
        for (int64_t j = 0; j < SPAN; j++) {
            uint32_t bits[2] = {0, 0};
            for (int64_t i = 0; i < 2; i++)
                if (j < columns && 2 * pair + i < k) memcpy(bits + i, (const float *)panel + j * k + 2 * pair + i, 4);
            for (int64_t i = 0; i < 2; i++) bits[i] = ROUNDED(bits[i]);
            target[j / 16 * 256 + j % 16] = bits[0] >> 16 | bits[1];
        }
    }
}

// out [count][SPAN] = a panel's product with `count` rows, summed as the tile instruction sums: of each STEP inputs the
// even and the odd ones in their order, then both together, then onto the sum.
static void plain_tile(int64_t count, int64_t steps, int64_t terms, const uint16_t *a, const uint32_t *tiles,
                       float *out) {
    for (int64_t i = 0; i < count; i++) {
        Vector sums[2] = {{0}, {0}};
        for (int64_t s = 0; s < steps; s++)
            for (int64_t term = 0; term < terms; term++)
                for (int64_t half = 0; half < 2; half++) {
                    const uint32_t *row = (const uint32_t *)(a + (s * terms + term) * SPLIT_STEP + i * STEP);
                    Vector even = {0}, odd = {0};
                    for (int64_t pair = 0; pair < 16; pair++) {
                        int32_t values = (int32_t)row[pair];
                        Integers words = (Integers)load((const float *)tiles + (s * 2 + half) * 256 + pair * 16);
                        Integers both = (Integers){0} + values;
                        even += (Vector)(both << 16) * (Vector)(words << 16);
                        odd += (Vector)(both & (int32_t)0xffff0000) * (Vector)(words & (int32_t)0xffff0000);
                    }
                    sums[half] += even + odd;
                }
        store(out + i * SPAN, sums[0]), store(out + i * SPAN + VL, sums[1]);
    }
}

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

#define WITH_TILES __attribute__((target("amx-tile,amx-bf16")))
#define REQUEST_PERMISSION 0x1023 // arch_prctl: ARCH_REQ_XCOMP_PERM
#define TILE_DATA 18              // the registers' part of the processor's state

// As the compiler's intrinsics, which in GCC 12 do not say that they read and write memory.
#define LOAD_TILE(number, from, stride)                                                                                \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #number ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define STORE_TILE(number, to, stride)                                                                                 \
    __asm__ volatile("tilestored %%tmm" #number ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
#define CLEAR_TILE(number) __asm__ volatile("tilezero %tmm" #number)
#define MULTIPLY_TILES(sum, left, right)                                                                               \
    __asm__ volatile("tdpbf16ps %tmm" #right ", %tmm" #left ", %tmm" #sum)

static int has_tiles = 0;

// Ask the system for the tile registers. Returns 1 if this process has them, and uses them from now on if `use`.
int use_tiles(int use) {
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    int present = (d >> 22 & 1) && (d >> 24 & 1) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    has_tiles = present && use;
    return present;
}

// Shape the registers of this thread: eight of 16 rows of 64 bytes. Other libraries shape them as well.
WITH_TILES static void shape_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}

// As `plain_tile`, of 32 rows if `tall`, else of 16. Meanwhile memory behind `next` is fetched into the L2 cache, `ahead`
// bytes for each step.
WITH_TILES INLINE void register_tile(const int tall, const int64_t terms, int64_t steps, const uint16_t *a,
                                     const char *tiles, const char *next, int64_t ahead, float *out) {
    CLEAR_TILE(0);
    CLEAR_TILE(1);
    CLEAR_TILE(2);
    CLEAR_TILE(3);
    for (int64_t s = 0; s < steps; s++, tiles += 2048, next += ahead) {
        LOAD_TILE(6, tiles, 64);
        LOAD_TILE(7, tiles + 1024, 64);
#pragma GCC unroll 2
        for (int64_t term = 0; term < terms; term++, a += SPLIT_STEP) {
            LOAD_TILE(4, a, 64);
            MULTIPLY_TILES(0, 4, 6);
            MULTIPLY_TILES(1, 4, 7);
            if (!tall) continue;
            LOAD_TILE(5, a + SPLIT_STEP / 2, 64);
            MULTIPLY_TILES(2, 5, 6);
            MULTIPLY_TILES(3, 5, 7);
        }
        for (int64_t at = 0; at < ahead; at += 64) __builtin_prefetch(next + at, 0, 2);
    }
    STORE_TILE(0, out, SPAN * 4);
    STORE_TILE(1, out + 16, SPAN * 4);
    if (!tall) return;
    STORE_TILE(2, out + 16 * SPAN, SPAN * 4);
    STORE_TILE(3, out + 16 * SPAN + 16, SPAN * 4);
}

WITH_TILES static void register_tiles(int64_t count, int64_t steps, int64_t terms, const uint16_t *a,
                                      const char *tiles, const char *next, int64_t ahead, float *out) {
    if (count > 16 && terms == 1)
        register_tile(1, 1, steps, a, tiles, next, ahead, out);
    else if (count > 16)
        register_tile(1, 2, steps, a, tiles, next, ahead, out);
    else if (terms == 1)
        register_tile(0, 1, steps, a, tiles, next, ahead, out);
    else
        register_tile(0, 2, steps, a, tiles, next, ahead, out);
}

WITH_TILES static void release_tiles(void) { __asm__ volatile("tilerelease" ::: "memory"); }
#else
enum { has_tiles = 0 };
int use_tiles(int use) { return 0 * use; }
static void shape_tiles(void) {}
static void release_tiles(void) {}
static void register_tiles(int64_t count, int64_t steps, int64_t terms, const uint16_t *a, const char *tiles,
                           const char *next, int64_t ahead, float *out) {
    (void)next, (void)ahead;
    plain_tile(count, steps, terms, a, (const uint32_t *)tiles, out);
}
#endif

static void begin_tiles(const Linear *linear) {
    if (has_tiles && linear->terms) shape_tiles();
}

static void end_tiles(const Linear *linear) {
    if (has_tiles && linear->terms) release_tiles();
}

// `multiply_tile` of kernels.c for a weight that is multiplied in bfloat16: at most 32 rows, which are split already.
// Whatever stands behind the last row in its block is multiplied as well.
static void multiply_split(const Linear *linear, int64_t index, int64_t row, int64_t rows, const float *a,
                           float *memory, float *tile) {
    int64_t steps = up_to(linear->k, STEP) / STEP, count = least(TILE_ROWS, rows - row);
    const uint16_t *left = split_at((float *)a, linear->k, linear->terms, row, 0);
    const char *panel = stored_panel(linear, index);
    int64_t tile_count = up_to(rows, TILE_ROWS) / TILE_ROWS;
    int64_t ahead = up_to((row_bytes(linear) * STEP + tile_count - 1) / tile_count, 64);
    const char *next = stored_panel(linear, index + 1) + row / TILE_ROWS * ahead * steps;
    if (linear->kind != TILES) {
        if (row == 0) tiles_of(linear, index, (uint32_t *)memory);
        panel = (const char *)memory;
    }
    if (has_tiles)
        register_tiles(count, steps, linear->terms, left, panel, next, ahead, tile);
    else
        plain_tile(count, steps, linear->terms, left, (const uint32_t *)panel, tile);
    if (linear->kind != INT8) return;
    Vector first = load((const float *)stored_panel(linear, index));
    Vector second = load((const float *)stored_panel(linear, index) + VL);
    for (int64_t i = 0; i < count; i++) {
        store(tile + i * NR, load(tile + i * NR) * first);
        store(tile + i * NR + VL, load(tile + i * NR + VL) * second);
    }
}
