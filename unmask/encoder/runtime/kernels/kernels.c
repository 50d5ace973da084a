// The forward of a decoder on a CPU, in float32: what lies between two matrix products never leaves the cache.
//
// One call computes a whole pack: embedding, layers, final norm. Rows (tokens) go through a layer in blocks that fit
// the L2 cache, so norms, gating, RoPE and residuals cost a few percent, where separate torch operations took a fifth.
//
// A matrix product is made of tiles of up to MR rows and NR columns that stay in registers while k runs from the first
// to the last. An output number is therefore summed in one order, whatever the other rows are and however many there
// are: a text has the same bits alone and in any batch.
//
// Weights are stored in panels of NR columns, [ceil(n / NR)][k][NR], padded with zeros; `panel_columns` tells NR. A
// weight that may change is read as it is, [n][k], and each panel is built again for every block of rows. A panel of 16
// or 8 bits is converted in registers by the first tile of a block, which keeps it in float32 for the others. Either way
// gives the same bits.
//
// On a processor with AMX a weight may be multiplied in bfloat16 instead (tiles.h), with sums in float32. Everything else
// stays in float32. The order of a sum does not depend on other rows there either.
//
// Several threads may compute one pack together: each calls `forward` with its own `part`. They divide the columns of
// the products, and meet at barriers.
//
// Dimension letters: T tokens, W hidden size, H query heads, K key-value heads, D head size, I intermediate size.

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16 // floats in a vector register
#define MR 14 // 28 accumulators of 32 registers
#define UNROLL 1
#elif defined(__AVX2__)
#define VL 8
#define MR 6 // 12 accumulators of 16 registers
#define UNROLL 4 // a step of k is so short that its prefetches and its counter would take a tenth of the time
#else
#define VL 4
#define MR 12 // 24 accumulators of 32 registers: NEON
#define UNROLL 1
#endif
#define NR (2 * VL)
#define TILE_ROWS 32    // of a product in bfloat16
#define LINEAR_ROWS 128 // of a single linear layer in bfloat16
#define PADDING 16 // floats behind each row of a buffer, so that rows do not share the sets of the cache
#define QUERY_ROWS (4 * MR)
#define CACHE_FLOATS (1 << 18) // largest block of rows: half of a usual L2 cache
#define TILE_FLOATS (3 << 16)  // the same for products in bfloat16, whose panels are in the cache as well

#define INLINE static inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(VL * 4), aligned(4), may_alias));

enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, ROW_MAJOR = 3, TILES = 4 };
enum { SILU = 0, GELU_TANH = 1 };

// A linear layer: n outputs of k inputs. In BFLOAT16, each 32-bit word holds column j in its low half and column
// j + VL in its high half. In INT8, a panel begins with NR floats: the step of each column, by which its bytes are
// multiplied. For TILES see tiles.h.
typedef struct {
    const void *weight; // panels, or float32 [n][k]
    const float *bias; // [n] or NULL
    int64_t n, k, kind;
    int64_t terms; // bfloat16 terms that an input is split into; 0: products in float32
} Linear;

// Weights of a layer. A norm that the architecture lacks is NULL.
typedef struct {
    Linear qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm, *attention_out_norm, *mlp_out_norm;
    int64_t reach; // farthest distance of a token that is attended to; negative: any
    int64_t rope;  // index in Pack.cosines
} Layer;

typedef struct {
    int64_t hidden, heads, kv_heads, head_dim, intermediate, activation, causal, num_layers;
    float eps, attention_scale, softcap, embedding_scale; // softcap 0: none
    const float *embedding, *final_norm;
    const Layer *layers;
} Model;

// The sequences of a pack, and the memory of its forward.
typedef struct {
    int64_t tokens, sequences, max_seqlen;
    const int64_t *ids;        // [T]
    const int64_t *cu_seqlens; // first token of each sequence and the end of the last one, [sequences + 1]
    const float *cosines[2], *sines[2]; // of each kind of layer, [positions][D / 2]
    float *x;                  // the residual stream, and in the end the hidden states, [T][W]
    float *shared;             // `shared_floats` of memory
    float *private;            // `private_floats` for each part
    atomic_int arrived, round; // of the barrier; zero at the start
} Pack;

static int64_t up_to(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE Vector load(const float *p) { return *(const Vector *)p; }
INLINE void store(float *p, Vector v) { *(Vector *)p = v; }
INLINE Vector broadcast(float value) { return value - (Vector){0}; }
INLINE Vector choose(Integers condition, Vector yes, Vector no) {
    return (Vector)(((Integers)yes & condition) | ((Integers)no & ~condition));
}

// VL bytes as floats. GCC would convert them one by one.
INLINE Vector floats(const int8_t *p) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(VL), aligned(1), may_alias));
    return __builtin_convertvector(*(const Bytes *)p, Vector);
#endif
}

INLINE float sum(Vector v) {
    float total = 0;
    for (int i = 0; i < VL; i++) total += v[i];
    return total;
}

// e to the power x, to 2 units in the last place; 0 below -87.
INLINE Vector exponential(Vector x) {
    const Vector shift = broadcast(12582912.0f); // 1.5 * 2^23: adding it rounds to a whole number
    Integers tiny = (Integers)(x < broadcast(-87.0f));
    x = choose(tiny, broadcast(-87.0f), x);
    x = choose((Integers)(x > broadcast(88.0f)), broadcast(88.0f), x);
    Vector shifted = x * broadcast(1.44269504088896341f) + shift;
    Vector n = shifted - shift;
    Vector r = x - n * broadcast(0.693359375f) + n * broadcast(2.12194440e-4f); // ln 2 in two parts
    Vector p = broadcast(1.9875691500e-4f); // Cephes, expf
    p = p * r + broadcast(1.3981999507e-3f);
    p = p * r + broadcast(8.3334519073e-3f);
    p = p * r + broadcast(4.1665795894e-2f);
    p = p * r + broadcast(1.6666665459e-1f);
    p = p * r + broadcast(5.0000001201e-1f);
    p = p * (r * r) + r + broadcast(1.0f);
    Integers exponent = ((Integers)shifted - (Integers)shift + 127) << 23;
    return choose(tiny, (Vector){0}, p * (Vector)exponent);
}

INLINE Vector hyperbolic_tangent(Vector x) {
    return broadcast(1.0f) - broadcast(2.0f) / (exponential(x + x) + broadcast(1.0f));
}

INLINE Vector activate(Vector x, int64_t activation) {
    if (activation == SILU) return x / (broadcast(1.0f) + exponential(-x));
    Vector inner = broadcast(0.7978845608028654f) * (x + broadcast(0.044715f) * x * x * x);
    return broadcast(0.5f) * x * (broadcast(1.0f) + hyperbolic_tangent(inner));
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

// Two vectors of columns of a panel at step k.
INLINE void weights(const void *panel, int64_t k, int64_t kind, Vector *first, Vector *second) {
    if (kind == FLOAT32) {
        const float *row = (const float *)panel + k * NR;
        if (UNROLL == 1) {
            __builtin_prefetch(row + 8 * NR);
            __builtin_prefetch(row + 8 * NR + 16);
        }
        *first = load(row), *second = load(row + VL);
    } else if (kind == BFLOAT16) {
        const float *row = (const float *)panel + k * VL;
        __builtin_prefetch(row + 16 * VL);
        Integers words = (Integers)load(row);
        *first = (Vector)(words << 16), *second = (Vector)(words & (int32_t)0xffff0000);
    } else {
        const float *steps = panel;
        const int8_t *row = (const int8_t *)(steps + NR) + k * NR;
        __builtin_prefetch(row + 32 * NR);
        *first = floats(row) * load(steps);
        *second = floats(row + VL) * load(steps + VL);
    }
}

// sums += a [rows] at step k times a panel's columns at step k. The panel is written to `kept` in float32, if `keeps`.
INLINE void add_step(const int rows, const int kind, const int keeps, int64_t k, const float *a, int64_t stride,
                     const void *panel, float *kept, Vector sums[MR][2]) {
    Vector first, second;
    weights(panel, k, kind, &first, &second);
    if (keeps) store(kept + k * NR, first), store(kept + k * NR + VL, second);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        Vector value = broadcast(a[i * stride + k]);
        sums[i][0] += value * first;
        sums[i][1] += value * second;
    }
}

// tile [rows][NR] = a [rows][depth] @ panel [depth][NR]. Meanwhile memory behind `next` is fetched into the L2 cache,
// `step` bytes for each k, and the panel is written to `kept` in float32, if `keeps`.
INLINE void tile_of(const int rows, const int kind, const int keeps, int64_t depth, const float *a, int64_t stride,
                    const void *panel, float *tile, const char *next, int64_t step, float *kept) {
    Vector sums[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (Vector){0};
    int64_t k = 0;
    for (; k + UNROLL <= depth; k += UNROLL) {
        if (UNROLL == 1)
            __builtin_prefetch(next, 0, 2), __builtin_prefetch(next + 64, 0, 2);
        else
            for (int64_t i = 0; i < UNROLL * step; i += 64) __builtin_prefetch(next + i, 0, 2);
        next += UNROLL * step;
#pragma GCC unroll 16
        for (int i = 0; i < UNROLL; i++) add_step(rows, kind, keeps, k + i, a, stride, panel, kept, sums);
    }
    for (; k < depth; k++) add_step(rows, kind, keeps, k, a, stride, panel, kept, sums);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) store(tile + i * NR, sums[i][0]), store(tile + i * NR + VL, sums[i][1]);
}

typedef void Tile(int64_t depth, const float *a, int64_t stride, const void *panel, float *tile, const char *next,
                  int64_t step, float *kept);

// The number of rows is a constant of each function, so that its sums stay in registers.
#define TILE_FUNCTION(name, rows, kind, keeps)                                                                         \
    static void name(int64_t depth, const float *a, int64_t stride, const void *panel, float *tile, const char *next,  \
                     int64_t step, float *kept) {                                                                      \
        tile_of(rows, kind, keeps, depth, a, stride, panel, tile, next, step, kept);                                   \
    }
#define TILE(name, rows, kind) TILE_FUNCTION(name##rows, rows, kind, 0)
#if MR == 6
#define FOR_ALL_ROWS(DO, name, kind)                                                                                   \
    DO(name, 1, kind) DO(name, 2, kind) DO(name, 3, kind) DO(name, 4, kind) DO(name, 5, kind) DO(name, 6, kind)
#elif MR == 12
#define FOR_ALL_ROWS(DO, name, kind)                                                                                   \
    DO(name, 1, kind) DO(name, 2, kind) DO(name, 3, kind) DO(name, 4, kind) DO(name, 5, kind) DO(name, 6, kind)        \
    DO(name, 7, kind) DO(name, 8, kind) DO(name, 9, kind) DO(name, 10, kind) DO(name, 11, kind) DO(name, 12, kind)
#else
#define FOR_ALL_ROWS(DO, name, kind)                                                                                   \
    DO(name, 1, kind) DO(name, 2, kind) DO(name, 3, kind) DO(name, 4, kind) DO(name, 5, kind) DO(name, 6, kind)        \
    DO(name, 7, kind) DO(name, 8, kind) DO(name, 9, kind) DO(name, 10, kind) DO(name, 11, kind) DO(name, 12, kind)     \
    DO(name, 13, kind) DO(name, 14, kind)
#endif
#define NAME(name, rows, kind) name##rows,
FOR_ALL_ROWS(TILE, tile32_, FLOAT32)
FOR_ALL_ROWS(TILE, tile16_, BFLOAT16)
FOR_ALL_ROWS(TILE, tile8_, INT8)
static Tile *const tiles[3][MR] = {{FOR_ALL_ROWS(NAME, tile32_, FLOAT32)},
                                   {FOR_ALL_ROWS(NAME, tile16_, BFLOAT16)},
                                   {FOR_ALL_ROWS(NAME, tile8_, INT8)}};

TILE_FUNCTION(keeping_tile16, MR, BFLOAT16, 1)
TILE_FUNCTION(keeping_tile8, MR, INT8, 1)

// Bytes that a panel takes for each k, without the steps of INT8.
static int64_t row_bytes(const Linear *linear) {
    return NR * (linear->kind == BFLOAT16 || linear->kind == TILES ? 2 : linear->kind == INT8 ? 1 : 4);
}

// A panel as it is stored, or the NR rows of a row-major weight.
static const char *stored_panel(const Linear *linear, int64_t index) {
    int64_t steps = linear->kind == INT8 ? NR * 4 : 0, k = linear->kind == TILES ? up_to(linear->k, 32) : linear->k;
    return (const char *)linear->weight + index * (steps + k * row_bytes(linear));
}

// Panel [k][NR] of a row-major weight.
static void gather(const Linear *linear, int64_t index, float *panel) {
    const float *values = (const float *)stored_panel(linear, index);
    int64_t k = linear->k, columns = least(NR, linear->n - index * NR);
    for (int64_t j = 0; j < NR; j++)
        for (int64_t i = 0; i < k; i++) panel[i * NR + j] = j < columns ? values[j * k + i] : 0;
}

#if defined(__AVX512F__)
#include "tiles.h"
#else // only a library for AVX-512 is given weights with terms
int use_tiles(int use) { return 0 * use; }
static void split_row(const float *x, int64_t k, int64_t terms, float *rows, int64_t row) {
    (void)x, (void)k, (void)terms, (void)rows, (void)row;
}
static uint16_t *split_at(float *rows, int64_t k, int64_t terms, int64_t row, int64_t column) {
    (void)k, (void)terms, (void)row, (void)column;
    return (uint16_t *)rows;
}
static void split_vector(Vector value, int64_t terms, uint16_t *out) { (void)value, (void)terms, (void)out; }
static Vector silu(Vector x) { return activate(x, SILU); }
static void begin_tiles(const Linear *linear) { (void)linear; }
static void end_tiles(const Linear *linear) { (void)linear; }
static void multiply_split(const Linear *linear, int64_t index, int64_t row, int64_t rows, const float *a,
                           float *memory, float *tile) {
    (void)linear, (void)index, (void)row, (void)rows, (void)a, (void)memory, (void)tile;
}
#endif

// Floats of a panel in the form that it is multiplied in.
static int64_t panel_floats(int64_t k) { return up_to(k, 32) * NR; }

static int64_t tile_rows(const Linear *linear) { return linear->terms ? TILE_ROWS : MR; }

// Floats for a row of k numbers in a buffer: room for the numbers, or for two bfloat16 terms of each.
static int64_t row_stride(int64_t k) { return up_to(k, 32) + PADDING; }

// tile [rows from `row` to at most row + MR][NR] = a @ a panel, for all `rows` of a block in their order. What the tiles
// of a block read in another form than it is stored in, the first one leaves in `memory` [k][NR]. Each tile fetches its
// share of the next panel.
static void multiply_tile(const Linear *linear, int64_t index, int64_t row, int64_t rows, const float *a,
                          int64_t stride, float *memory, float *tile) {
    if (linear->terms) {
        multiply_split(linear, index, row, rows, a, memory, tile);
        return;
    }
    int64_t count = least(MR, rows - row), tile_count = up_to(rows, MR) / MR;
    int64_t step = (row_bytes(linear) + tile_count - 1) / tile_count;
    const char *next = stored_panel(linear, index + 1) + linear->k * (row / MR * step);
    const void *panel = stored_panel(linear, index);
    Tile *compute = tiles[FLOAT32][count - 1];
    if (linear->kind == ROW_MAJOR) {
        if (row == 0) gather(linear, index, memory);
        panel = memory;
    } else if (linear->kind != FLOAT32) {
        if (rows <= MR)
            compute = tiles[linear->kind][count - 1];
        else if (row == 0)
            compute = linear->kind == BFLOAT16 ? keeping_tile16 : keeping_tile8;
        else
            panel = memory;
    }
    compute(linear->k, a + row * stride, stride, panel, tile, next, step, memory);
}

// Columns of a linear layer's panels that one part computes, as [first, last) panels.
typedef struct {
    int64_t first, last;
} Share;

static Share share_of(int64_t panels, int64_t part, int64_t parts) {
    return (Share){panels * part / parts, panels * (part + 1) / parts};
}

// out [rows][n] = a @ weight (+ bias), or out += that, for the columns of a share.
static void multiply(const Linear *linear, Share share, int64_t rows, const float *a, int64_t stride, float *out,
                     int64_t out_stride, int add, float *memory) {
    float tile[TILE_ROWS * NR] __attribute__((aligned(64)));
    int64_t height = tile_rows(linear);
    begin_tiles(linear);
    for (int64_t panel = share.first; panel < share.last; panel++) {
        int64_t column = panel * NR, columns = least(NR, linear->n - column);
        for (int64_t row = 0; row < rows; row += height) {
            int64_t count = least(height, rows - row);
            multiply_tile(linear, panel, row, rows, a, stride, memory, tile);
            for (int64_t i = 0; i < count; i++) {
                float *target = out + (row + i) * out_stride + column;
                const float *source = tile + i * NR;
                if (columns == NR && !linear->bias) {
                    Vector first = load(source), second = load(source + VL);
                    if (add) first += load(target), second += load(target + VL);
                    store(target, first), store(target + VL, second);
                    continue;
                }
                for (int64_t j = 0; j < columns; j++) {
                    float value = source[j] + (linear->bias ? linear->bias[column + j] : 0);
                    target[j] = add ? target[j] + value : value;
                }
            }
        }
    }
    end_tiles(linear);
}

// out [rows][I] = activation(gate) * up of a layer whose outputs are gate [I] and up [I], as `reader` reads it; I is a
// multiple of NR.
static void multiply_gated(const Linear *linear, const Linear *reader, Share share, int64_t rows, const float *a,
                           int64_t stride, float *out, int64_t out_stride, int64_t activation, float *memory) {
    float gate[TILE_ROWS * NR] __attribute__((aligned(64))), up[TILE_ROWS * NR] __attribute__((aligned(64)));
    int64_t half = linear->n / 2, height = tile_rows(linear);
    begin_tiles(linear);
    for (int64_t panel = share.first; panel < share.last; panel++) {
        int64_t column = panel * NR;
        for (int64_t row = 0; row < rows; row += height) {
            int64_t count = least(height, rows - row);
            multiply_tile(linear, panel, row, rows, a, stride, memory, gate);
            multiply_tile(linear, panel + half / NR, row, rows, a, stride, memory + panel_floats(linear->k), up);
            for (int64_t i = 0; i < count; i++) {
                float *target = out + (row + i) * out_stride;
                for (int64_t j = 0; j < NR; j += VL) {
                    Vector g = load(gate + i * NR + j), u = load(up + i * NR + j);
                    if (linear->bias) g += load(linear->bias + column + j), u += load(linear->bias + half + column + j);
                    if (reader->terms) {
                        g = activation == SILU ? silu(g) : activate(g, activation);
                        split_vector(g * u, reader->terms, split_at(out, half, reader->terms, row + i, column + j));
                    } else {
                        store(target + column + j, activate(g, activation) * u);
                    }
                }
            }
        }
    }
    end_tiles(linear);
}

// ---- Rows -----------------------------------------------------------------------------------------------------------

// y = x / rms(x) * weight, of one row (arXiv 1910.07467).
static void normalise(const float *x, const float *weight, int64_t size, float eps, float *y) {
    Vector sums[2] = {{0}, {0}};
    int64_t whole = size / NR * NR;
    for (int64_t j = 0; j < whole; j += NR) {
        sums[0] += load(x + j) * load(x + j);
        sums[1] += load(x + j + VL) * load(x + j + VL);
    }
    float squares = sum(sums[0] + sums[1]);
    for (int64_t j = whole; j < size; j++) squares += x[j] * x[j];
    float scale = 1.0f / sqrtf(squares / (float)size + eps);
    for (int64_t j = 0; j < size; j++) y[j] = x[j] * scale * weight[j];
}

// One head of one token: normalised where the architecture does, turned by its position (RoPE), and scaled.
static void head_of(const Model *model, const float *source, const float *norm, const float *cosine, const float *sine,
                    float scale, float *head) {
    int64_t size = model->head_dim, half = size / 2;
    if (norm) {
        normalise(source, norm, size, model->eps, head);
        source = head;
    }
    int64_t j = 0;
    for (; j + VL <= half; j += VL) {
        Vector first = load(source + j), second = load(source + j + half), c = load(cosine + j), s = load(sine + j);
        store(head + j, (first * c - second * s) * scale);
        store(head + j + half, (second * c + first * s) * scale);
    }
    for (; j < half; j++) {
        float first = source[j], second = source[j + half];
        head[j] = (first * cosine[j] - second * sine[j]) * scale;
        head[j + half] = (second * cosine[j] + first * sine[j]) * scale;
    }
}

// ---- Attention ------------------------------------------------------------------------------------------------------

// Scores of one query -> weights exp(score - largest), in place; returns one over their sum.
static float soften(const Model *model, const Layer *layer, float *scores, int64_t query, int64_t length) {
    int64_t padded = up_to(length, VL);
    if (model->softcap > 0)
        for (int64_t j = 0; j < padded; j += VL)
            store(scores + j, broadcast(model->softcap) * hyperbolic_tangent(load(scores + j) / model->softcap));
    int64_t first = 0, last = length; // keys that the query may see
    if (layer->reach >= 0) {
        first = query - layer->reach > 0 ? query - layer->reach : 0;
        last = least(length, query + layer->reach + 1);
    }
    if (model->causal) last = query + 1;
    for (int64_t j = 0; j < first; j++) scores[j] = -INFINITY;
    for (int64_t j = last; j < padded; j++) scores[j] = -INFINITY;
    Vector top = load(scores), total = {0};
    for (int64_t j = VL; j < padded; j += VL) {
        Vector v = load(scores + j);
        top = choose((Integers)(v > top), v, top);
    }
    float largest = top[0];
    for (int i = 1; i < VL; i++) largest = top[i] > largest ? top[i] : largest;
    for (int64_t j = 0; j < padded; j += VL) {
        Vector e = exponential(load(scores + j) - broadcast(largest));
        store(scores + j, e);
        total += e;
    }
    return 1.0f / sum(total);
}

static int64_t qkv_stride(const Model *m) { return (m->heads + 2 * m->kv_heads) * m->head_dim + PADDING; }
static int64_t attended_width(const Model *m) { return m->heads * m->head_dim; }
static int64_t attended_stride(const Model *m) { return attended_width(m) + PADDING; }

// Attention of one sequence over one key-value head, for all query heads that share it.
//
// Both products read their right side in panels, as weights are: keys transposed [panels][D][NR], values
// [panels][length][NR]. The query heads of a token are rows side by side.
static void attend(const Model *model, const Layer *layer, const Pack *pack, int64_t sequence, int64_t kv_head,
                   const float *qkv, float *attended, float *memory) {
    int64_t start = pack->cu_seqlens[sequence], length = pack->cu_seqlens[sequence + 1] - start;
    int64_t size = model->head_dim, group = model->heads / model->kv_heads, stride = size + PADDING;
    int64_t key_columns = up_to(length, NR), value_columns = up_to(size, NR), score_stride = key_columns + PADDING;
    float *keys = memory, *values = keys + key_columns * size, *queries = values + value_columns * length;
    float *scores = queries + QUERY_ROWS * stride, *head = scores + QUERY_ROWS * score_stride;
    const float *cosines = pack->cosines[layer->rope], *sines = pack->sines[layer->rope];
    const float *first = qkv + start * qkv_stride(model);
    memset(keys + (key_columns - NR) * size, 0, (size_t)(NR * size) * sizeof(float));
    for (int64_t j = 0; j < length; j++) {
        const float *key = first + j * qkv_stride(model) + (model->heads + kv_head) * size;
        const float *value = key + model->kv_heads * size;
        head_of(model, key, layer->k_norm, cosines + j * size / 2, sines + j * size / 2, 1.0f, head);
        float *column = keys + j / NR * NR * size + j % NR;
        for (int64_t d = 0; d < size; d++) column[d * NR] = head[d];
        for (int64_t d = 0; d < value_columns; d += NR) {
            float *row = values + d * length + j * NR;
            if (d + NR <= size)
                store(row, load(value + d)), store(row + VL, load(value + d + VL));
            else
                for (int64_t i = 0; i < NR; i++) row[i] = d + i < size ? value[d + i] : 0;
        }
    }
    float tile[MR * NR] __attribute__((aligned(64))), inverse[MR];
    for (int64_t from = 0; from < length * group; from += MR) {
        int64_t rows = least(MR, length * group - from);
        Tile *compute = tiles[FLOAT32][rows - 1];
        for (int64_t i = 0; i < rows; i++) {
            int64_t token = (from + i) / group, query_head = kv_head * group + (from + i) % group;
            head_of(model, first + token * qkv_stride(model) + query_head * size, layer->q_norm,
                    cosines + token * size / 2, sines + token * size / 2, model->attention_scale, queries + i * stride);
        }
        for (int64_t j = 0; j < key_columns; j += NR) {
            compute(size, queries, stride, keys + j * size, tile, (const char *)keys, 0, NULL);
            for (int64_t i = 0; i < rows; i++) {
                store(scores + i * score_stride + j, load(tile + i * NR));
                store(scores + i * score_stride + j + VL, load(tile + i * NR + VL));
            }
        }
        for (int64_t i = 0; i < rows; i++)
            inverse[i] = soften(model, layer, scores + i * score_stride, (from + i) / group, length);
        for (int64_t d = 0; d < value_columns; d += NR) {
            compute(length, scores, score_stride, values + d * length, tile, (const char *)values, 0, NULL);
            for (int64_t i = 0; i < rows; i++) {
                int64_t token = (from + i) / group, query_head = kv_head * group + (from + i) % group;
                float *target = attended + (start + token) * attended_stride(model) + query_head * size + d;
                const float *source = tile + i * NR;
                if (d + NR <= size)
                    store(target, load(source) * inverse[i]), store(target + VL, load(source + VL) * inverse[i]);
                else
                    for (int64_t c = 0; c < size - d; c++) target[c] = source[c] * inverse[i];
            }
        }
    }
}

// ---- Forward --------------------------------------------------------------------------------------------------------

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of a block: a whole number of tiles whose widest buffer fits the cache.
static int64_t block_rows(const Model *model) {
    int64_t widest = most(model->intermediate, model->hidden);
    if (model->layers->down.terms) return TILE_ROWS * most(2, least(8, TILE_FLOATS / widest / TILE_ROWS));
    return MR * most(2, least(16, CACHE_FLOATS / widest / MR));
}

// Rows of a buffer: a tile may read behind the last row of a block.
static int64_t buffer_rows(const Model *model) { return up_to(block_rows(model), TILE_ROWS); }

// Floats of a row that a part prepares for a linear layer.
static int64_t prepared_stride(const Model *model) { return row_stride(most(model->hidden, attended_width(model))); }

static int64_t is_gated_whole(const Model *model) { return model->intermediate % NR == 0; }

int64_t panel_columns(void) { return NR; }

// Floats of `Pack.shared` that the forward of a pack needs.
int64_t shared_floats(const Model *model, int64_t tokens) {
    int64_t gated = row_stride(model->intermediate), both = is_gated_whole(model) ? 0 : row_stride(2 * model->intermediate);
    return tokens * (qkv_stride(model) + attended_stride(model)) +
           buffer_rows(model) * (gated + both + row_stride(model->hidden));
}

// Floats of `Pack.private` that each part needs.
int64_t private_floats(const Model *model, int64_t max_seqlen) {
    int64_t size = model->head_dim;
    int64_t attention = up_to(max_seqlen, NR) * size + up_to(size, NR) * max_seqlen + QUERY_ROWS * (size + PADDING) +
                        QUERY_ROWS * (up_to(max_seqlen, NR) + PADDING) + size;
    int64_t widest = most(most(model->intermediate, model->hidden), attended_width(model));
    int64_t prepared = buffer_rows(model) * prepared_stride(model) + 2 * panel_floats(widest); // and two panels
    return up_to(most(attention, prepared), NR);
}

static void wait_for_all(Pack *pack, int parts) {
    if (parts == 1) return;
    int round = atomic_load(&pack->round);
    if (atomic_fetch_add(&pack->arrived, 1) + 1 == parts) {
        atomic_store(&pack->arrived, 0);
        atomic_store(&pack->round, round + 1);
        return;
    }
    for (int spins = 1; atomic_load_explicit(&pack->round, memory_order_acquire) == round; spins++) {
        if (spins % 4096 == 0) sched_yield(); // the other part may wait for this core
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

// x [rows][W] += linear(a), normalised first where the architecture has a norm behind the layer.
static void add_product(const Model *model, Pack *pack, const Linear *linear, const float *norm, int64_t rows,
                        const float *a, int64_t stride, float *x, float *product, float *memory, int part, int parts) {
    Share share = share_of(up_to(linear->n, NR) / NR, part, parts);
    int64_t product_stride = row_stride(model->hidden);
    if (!norm) {
        multiply(linear, share, rows, a, stride, x, model->hidden, 1, memory);
        return;
    }
    multiply(linear, share, rows, a, stride, product, product_stride, 0, memory);
    wait_for_all(pack, parts);
    for (int64_t i = part; i < rows; i += parts) {
        float *row = product + i * product_stride;
        normalise(row, norm, model->hidden, model->eps, row);
        for (int64_t j = 0; j < model->hidden; j++) x[i * model->hidden + j] += row[j];
    }
}

// Rows of the residual stream, normalised, as `reader` reads them. `memory` has room for one.
static void normalise_rows(const Model *model, const Linear *reader, const float *x, const float *weight, int64_t rows,
                           float *normed, float *memory) {
    for (int64_t i = 0; i < rows; i++) {
        float *row = normed + i * prepared_stride(model);
        normalise(x + i * model->hidden, weight, model->hidden, model->eps, reader->terms ? memory : row);
        if (reader->terms) split_row(memory, model->hidden, reader->terms, normed, i);
    }
}

static void gated(const Model *model, Pack *pack, const Layer *layer, int64_t rows, const float *normed, float *out,
                  float *both, float *memory, int part, int parts) {
    int64_t half = model->intermediate, stride = row_stride(half), both_stride = row_stride(2 * half);
    if (is_gated_whole(model)) {
        multiply_gated(&layer->gate_up, &layer->down, share_of(half / NR, part, parts), rows, normed,
                       prepared_stride(model), out, stride, model->activation, memory);
        return;
    }
    multiply(&layer->gate_up, share_of(up_to(2 * half, NR) / NR, part, parts), rows, normed, prepared_stride(model),
             both, both_stride, 0, memory);
    wait_for_all(pack, parts);
    for (int64_t i = part; i < rows; i += parts) {
        float *row = both + i * both_stride;
        for (int64_t j = 0; j < half; j++) row[j] = activate(broadcast(row[j]), model->activation)[0] * row[half + j];
        if (layer->down.terms)
            split_row(row, half, layer->down.terms, out, i);
        else
            memcpy(out + i * stride, row, (size_t)half * sizeof(float));
    }
}

static void mlp_blocks(const Model *model, Pack *pack, const Layer *layer, const float *attended, float *blocks,
                       float *normed, int part, int parts) {
    int64_t hidden = model->hidden, block = block_rows(model), height = buffer_rows(model);
    float *product = blocks, *out = product + height * row_stride(hidden);
    float *both = out + height * row_stride(model->intermediate), *memory = normed + height * prepared_stride(model);
    for (int64_t row = 0; row < pack->tokens; row += block) {
        int64_t rows = least(block, pack->tokens - row);
        float *x = pack->x + row * hidden;
        const float *heads = attended + row * attended_stride(model);
        int64_t heads_stride = attended_stride(model);
        if (layer->out.terms) {
            for (int64_t i = 0; i < rows; i++)
                split_row(heads + i * heads_stride, attended_width(model), layer->out.terms, normed, i);
            heads = normed;
        }
        add_product(model, pack, &layer->out, layer->attention_out_norm, rows, heads, heads_stride, x, product, memory,
                    part, parts);
        wait_for_all(pack, parts);
        normalise_rows(model, &layer->gate_up, x, layer->mlp_norm, rows, normed, memory);
        gated(model, pack, layer, rows, normed, out, both, memory, part, parts);
        wait_for_all(pack, parts);
        add_product(model, pack, &layer->down, layer->mlp_out_norm, rows, out, row_stride(model->intermediate), x,
                    product, memory, part, parts);
        wait_for_all(pack, parts);
    }
}

// Hidden states of a pack, into pack->x. Every one of `parts` threads calls this with its own `part`.
void forward(const Model *model, Pack *pack, int part, int parts) {
    int64_t hidden = model->hidden, tokens = pack->tokens, block = block_rows(model);
    float *qkv = pack->shared, *attended = qkv + tokens * qkv_stride(model);
    float *blocks = attended + tokens * attended_stride(model);
    float *private = pack->private + part * private_floats(model, pack->max_seqlen);
    float *memory = private + buffer_rows(model) * prepared_stride(model);
    for (int64_t t = part; t < tokens; t += parts)
        for (int64_t j = 0; j < hidden; j++)
            pack->x[t * hidden + j] = model->embedding[pack->ids[t] * hidden + j] * model->embedding_scale;
    wait_for_all(pack, parts);
    for (int64_t index = 0; index < model->num_layers; index++) {
        const Layer *layer = model->layers + index;
        for (int64_t row = 0; row < tokens; row += block) {
            int64_t rows = least(block, tokens - row);
            normalise_rows(model, &layer->qkv, pack->x + row * hidden, layer->attention_norm, rows, private, memory);
            multiply(&layer->qkv, share_of(up_to(layer->qkv.n, NR) / NR, part, parts), rows, private,
                     prepared_stride(model), qkv + row * qkv_stride(model), qkv_stride(model), 0, memory);
        }
        wait_for_all(pack, parts);
        for (int64_t unit = part; unit < pack->sequences * model->kv_heads; unit += parts)
            attend(model, layer, pack, unit / model->kv_heads, unit % model->kv_heads, qkv, attended, private);
        wait_for_all(pack, parts);
        mlp_blocks(model, pack, layer, attended, blocks, private, part, parts);
    }
    for (int64_t t = part; t < tokens; t += parts)
        normalise(pack->x + t * hidden, model->final_norm, hidden, model->eps, pack->x + t * hidden);
}

// Floats of memory that `linear` needs.
int64_t linear_floats(const Linear *weight) {
    return panel_floats(weight->k) + (weight->terms ? LINEAR_ROWS * row_stride(weight->k) : 0);
}

// out [rows][n] = x [rows][k] @ weight + bias, of contiguous rows. `memory` has room for `linear_floats`.
void linear(const Linear *weight, int64_t rows, const float *x, float *out, float *memory) {
    Share all = share_of(up_to(weight->n, NR) / NR, 0, 1);
    if (!weight->terms) {
        multiply(weight, all, rows, x, weight->k, out, weight->n, 0, memory);
        return;
    }
    float *split = memory + panel_floats(weight->k);
    for (int64_t row = 0; row < rows; row += LINEAR_ROWS) {
        int64_t count = least(LINEAR_ROWS, rows - row), stride = row_stride(weight->k);
        for (int64_t i = 0; i < count; i++)
            split_row(x + (row + i) * weight->k, weight->k, weight->terms, split, i);
        multiply(weight, all, count, split, stride, out + row * weight->n, weight->n, 0, memory);
    }
}

#include "training.c"
#include "int8.c"
