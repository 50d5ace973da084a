// What lies between the matrix products of a training step in bfloat16, forward and backward. Included by kernels.c.
//
// A product of a small decoder takes so little time on a processor with AMX that norms, gating, attention of short
// sequences and transposed copies took three quarters of a step as torch operations. The residual stream is float32,
// what goes into a product and comes out of it is bfloat16, and every sum here is float32.
//
// Widths (W, I and D / 2) are multiples of VL; the caller checks that.

typedef uint16_t Bfloat16;
typedef uint16_t Halves __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(VL * 4), aligned(4), may_alias));

INLINE Vector widen(const Bfloat16 *p) {
#if defined(__AVX512F__)
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    return (Vector)(__builtin_convertvector(*(const Halves *)p, Words) << 16);
#endif
}

// Rounds to the nearest bfloat16, ties to even. A number that is not one stays so: a step with NaN must be noticed.
INLINE void narrow(Bfloat16 *p, Vector v) {
    Words bits = (Words)v;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Words nan = (Words)(v != v);
    rounded = (rounded & ~nan) | (0x7fc0 & nan);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)rounded));
#else
    *(Halves *)p = __builtin_convertvector(rounded, Halves);
#endif
}

// x [T][W] * rstd * factor [W] -> y; rstd [T] = 1 / sqrt(mean(x^2) + eps).
void train_norm_forward(int64_t tokens, int64_t width, const float *x, const float *factor, float eps, Bfloat16 *y,
                        float *rstd) {
    for (int64_t t = 0; t < tokens; t++, x += width, y += width) {
        Vector squares = {0};
        for (int64_t i = 0; i < width; i += VL) squares += load(x + i) * load(x + i);
        rstd[t] = 1.0f / sqrtf(sum(squares) / (float)width + eps);
        for (int64_t i = 0; i < width; i += VL) narrow(y + i, load(x + i) * broadcast(rstd[t]) * load(factor + i));
    }
}

// Gradients of x (overwritten) and of the factor (added to).
void train_norm_backward(int64_t tokens, int64_t width, const float *x, const float *factor, const float *rstd,
                         const Bfloat16 *dy, float *dx, float *d_factor) {
    for (int64_t t = 0; t < tokens; t++, x += width, dy += width, dx += width) {
        Vector products = {0}, scale = broadcast(rstd[t]);
        for (int64_t i = 0; i < width; i += VL) {
            Vector along = widen(dy + i) * load(x + i);
            products += along * load(factor + i);
            store(d_factor + i, load(d_factor + i) + along * scale);
        }
        Vector mean = broadcast(sum(products) / (float)width * rstd[t] * rstd[t] * rstd[t]);
        for (int64_t i = 0; i < width; i += VL)
            store(dx + i, widen(dy + i) * load(factor + i) * scale - load(x + i) * mean);
    }
}

// silu(gate) * up, gate and up side by side: [T][2 I] -> [T][I].
void train_gate_forward(int64_t tokens, int64_t width, const Bfloat16 *gate_up, Bfloat16 *y) {
    for (int64_t t = 0; t < tokens; t++, gate_up += 2 * width, y += width)
        for (int64_t i = 0; i < width; i += VL) {
            Vector gate = widen(gate_up + i);
            narrow(y + i, gate / (broadcast(1.0f) + exponential(-gate)) * widen(gate_up + width + i));
        }
}

void train_gate_backward(int64_t tokens, int64_t width, const Bfloat16 *gate_up, const Bfloat16 *dy, Bfloat16 *d) {
    for (int64_t t = 0; t < tokens; t++, gate_up += 2 * width, dy += width, d += 2 * width)
        for (int64_t i = 0; i < width; i += VL) {
            Vector gate = widen(gate_up + i), gradient = widen(dy + i), one = broadcast(1.0f);
            Vector share = one / (one + exponential(-gate));
            narrow(d + i, gradient * widen(gate_up + width + i) * share * (one + gate * (one - share)));
            narrow(d + width + i, gradient * gate * share);
        }
}

// [rows][columns] -> [columns][rows].
void train_transpose(int64_t rows, int64_t columns, const Bfloat16 *x, Bfloat16 *y) {
    enum { BLOCK = 32 };
    for (int64_t r = 0; r < rows; r += BLOCK)
        for (int64_t c = 0; c < columns; c += BLOCK) {
            int64_t last_row = least(r + BLOCK, rows), last_column = least(c + BLOCK, columns);
            for (int64_t j = c; j < last_column; j++)
                for (int64_t i = r; i < last_row; i++) y[j * rows + i] = x[i * columns + j];
        }
}

typedef struct {
    int64_t sequences, heads, kv_heads, head_dim, max_seqlen;
    float scale;
    const int64_t *cu_seqlens;     // [sequences + 1]
    const float *cosines, *sines;  // of each token, [T][D / 2]
    const Bfloat16 *qkv;           // [T][H + 2 K][D]
    float *memory;                 // `train_attention_floats` of it
} TrainAttention;

static int64_t columns_of(int64_t length) { return up_to(length, VL); }

int64_t train_attention_floats(int64_t max_seqlen, int64_t head_dim) {
    int64_t columns = columns_of(max_seqlen);
    return 2 * columns * columns + 8 * columns * head_dim; // of the backward, which needs more
}

// Rows [length][D] of one head as floats, rotated by each token's angle if there are angles.
static void read_head(const TrainAttention *a, int64_t first, int64_t length, int64_t head, int rotated, float *to) {
    int64_t stride = (a->heads + 2 * a->kv_heads) * a->head_dim, half = a->head_dim / 2;
    for (int64_t t = 0; t < length; t++, to += a->head_dim) {
        const Bfloat16 *from = a->qkv + (first + t) * stride + head * a->head_dim;
        const float *cosine = a->cosines + (first + t) * half, *sine = a->sines + (first + t) * half;
        for (int64_t i = 0; i < half; i += VL) {
            Vector left = widen(from + i), right = widen(from + half + i);
            Vector cos = rotated ? load(cosine + i) : broadcast(1.0f), sin = rotated ? load(sine + i) : (Vector){0};
            store(to + i, left * cos - right * sin);
            store(to + half + i, right * cos + left * sin);
        }
    }
}

// The inverse of `read_head` for gradients: turned back, as bfloat16, into the place of the head.
static void write_head(const TrainAttention *a, int64_t first, int64_t length, int64_t head, int rotated,
                       const float *from, Bfloat16 *d_qkv) {
    int64_t stride = (a->heads + 2 * a->kv_heads) * a->head_dim, half = a->head_dim / 2;
    for (int64_t t = 0; t < length; t++, from += a->head_dim) {
        Bfloat16 *to = d_qkv + (first + t) * stride + head * a->head_dim;
        const float *cosine = a->cosines + (first + t) * half, *sine = a->sines + (first + t) * half;
        for (int64_t i = 0; i < half; i += VL) {
            Vector left = load(from + i), right = load(from + half + i);
            Vector cos = rotated ? load(cosine + i) : broadcast(1.0f), sin = rotated ? load(sine + i) : (Vector){0};
            narrow(to + i, left * cos + right * sin);
            narrow(to + half + i, right * cos - left * sin);
        }
    }
}

// [length][D] -> [D][columns], padded with zeros.
static void flip(const float *x, int64_t length, int64_t columns, int64_t dim, float *y) {
    for (int64_t d = 0; d < dim; d++) {
        for (int64_t t = 0; t < length; t++) y[d * columns + t] = x[t * dim + d];
        for (int64_t t = length; t < columns; t++) y[d * columns + t] = 0.0f;
    }
}

// Products of rows: a [length][D] with b, which is flipped, [D][columns] -> [length][columns], times a factor.
static void row_products(const float *a, const float *b, int64_t length, int64_t columns, int64_t dim, float factor,
                         float *to) {
    for (int64_t j = 0; j < columns; j += VL) {
        int64_t i = 0;
        for (; i + 4 <= length; i += 4) {
            Vector s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
            for (int64_t d = 0; d < dim; d++) {
                Vector column = load(b + d * columns + j);
                s0 += broadcast(a[i * dim + d]) * column;
                s1 += broadcast(a[(i + 1) * dim + d]) * column;
                s2 += broadcast(a[(i + 2) * dim + d]) * column;
                s3 += broadcast(a[(i + 3) * dim + d]) * column;
            }
            store(to + i * columns + j, s0 * broadcast(factor));
            store(to + (i + 1) * columns + j, s1 * broadcast(factor));
            store(to + (i + 2) * columns + j, s2 * broadcast(factor));
            store(to + (i + 3) * columns + j, s3 * broadcast(factor));
        }
        for (; i < length; i++) {
            Vector s = {0};
            for (int64_t d = 0; d < dim; d++) s += broadcast(a[i * dim + d]) * load(b + d * columns + j);
            store(to + i * columns + j, s * broadcast(factor));
        }
    }
}

// Rows [length][columns] -> softmax over the first `length` numbers of each; zeros behind them.
static void softmax_rows(float *rows, int64_t length, int64_t columns) {
    for (int64_t i = 0; i < length; i++, rows += columns) {
        float largest = rows[0];
        for (int64_t j = 1; j < length; j++) largest = rows[j] > largest ? rows[j] : largest;
        for (int64_t j = length; j < columns; j++) rows[j] = -INFINITY;
        Vector total = {0};
        for (int64_t j = 0; j < columns; j += VL) {
            Vector e = exponential(load(rows + j) - broadcast(largest));
            total += e;
            store(rows + j, e);
        }
        Vector share = broadcast(1.0f / sum(total));
        for (int64_t j = 0; j < columns; j += VL) store(rows + j, load(rows + j) * share);
    }
}

// Sum over j of weights[i][j] * x[j] -> to [length][D]; transposed: of weights[j][i] * x[j]. Added to what is there.
static void mix(const float *weights, const float *x, int64_t length, int64_t columns, int64_t dim, int transposed,
                float *to) {
    int64_t row = transposed ? 1 : columns, step = transposed ? columns : 1;
    for (int64_t i = 0; i < length; i++)
        for (int64_t d = 0; d < dim; d += 2 * VL) {
            Vector low = load(to + i * dim + d), high = load(to + i * dim + d + VL);
            for (int64_t j = 0; j < length; j++) {
                Vector weight = broadcast(weights[i * row + j * step]);
                low += weight * load(x + j * dim + d);
                high += weight * load(x + j * dim + d + VL);
            }
            store(to + i * dim + d, low);
            store(to + i * dim + d + VL, high);
        }
}

static void clear(float *x, int64_t count) { memset(x, 0, (size_t)count * sizeof(float)); }

// Every token attends to the tokens of its own sequence -> y [T][H][D].
void train_attention_forward(const TrainAttention *a, Bfloat16 *y) {
    int64_t dim = a->head_dim, most = columns_of(a->max_seqlen), group = a->heads / a->kv_heads;
    float *weights = a->memory, *q = weights + most * most, *k = q + most * dim, *v = k + most * dim;
    float *flipped = v + most * dim, *mixed = flipped + most * dim;
    for (int64_t s = 0; s < a->sequences; s++) {
        int64_t first = a->cu_seqlens[s], length = a->cu_seqlens[s + 1] - first, columns = columns_of(length);
        for (int64_t kv = 0; kv < a->kv_heads; kv++) {
            read_head(a, first, length, a->heads + kv, 1, k);
            read_head(a, first, length, a->heads + a->kv_heads + kv, 0, v);
            flip(k, length, columns, dim, flipped);
            for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
                read_head(a, first, length, head, 1, q);
                row_products(q, flipped, length, columns, dim, a->scale, weights);
                softmax_rows(weights, length, columns);
                clear(mixed, length * dim);
                mix(weights, v, length, columns, dim, 0, mixed);
                for (int64_t t = 0; t < length; t++)
                    for (int64_t i = 0; i < dim; i += VL)
                        narrow(y + ((first + t) * a->heads + head) * dim + i, load(mixed + t * dim + i));
            }
        }
    }
}

// Gradient of qkv from that of the output, dy [T][H][D]. The weights are computed again.
void train_attention_backward(const TrainAttention *a, const Bfloat16 *dy, Bfloat16 *d_qkv) {
    int64_t dim = a->head_dim, most = columns_of(a->max_seqlen), group = a->heads / a->kv_heads;
    float *weights = a->memory, *gradients = weights + most * most, *q = gradients + most * most;
    float *k = q + most * dim, *v = k + most * dim, *flipped_k = v + most * dim, *flipped_v = flipped_k + most * dim;
    float *out = flipped_v + most * dim, *dk = out + most * dim, *dv = dk + most * dim;
    for (int64_t s = 0; s < a->sequences; s++) {
        int64_t first = a->cu_seqlens[s], length = a->cu_seqlens[s + 1] - first, columns = columns_of(length);
        for (int64_t kv = 0; kv < a->kv_heads; kv++) {
            read_head(a, first, length, a->heads + kv, 1, k);
            read_head(a, first, length, a->heads + a->kv_heads + kv, 0, v);
            flip(k, length, columns, dim, flipped_k);
            flip(v, length, columns, dim, flipped_v);
            clear(dk, length * dim);
            clear(dv, length * dim);
            for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
                read_head(a, first, length, head, 1, q);
                for (int64_t t = 0; t < length; t++)
                    for (int64_t i = 0; i < dim; i += VL)
                        store(out + t * dim + i, widen(dy + ((first + t) * a->heads + head) * dim + i));
                row_products(q, flipped_k, length, columns, dim, a->scale, weights);
                softmax_rows(weights, length, columns);
                mix(weights, out, length, columns, dim, 1, dv);
                row_products(out, flipped_v, length, columns, dim, 1.0f, gradients);
                for (int64_t i = 0; i < length; i++) {
                    float *p = weights + i * columns, *g = gradients + i * columns;
                    Vector products = {0};
                    for (int64_t j = 0; j < columns; j += VL) products += load(p + j) * load(g + j);
                    Vector mean = broadcast(sum(products)), scale = broadcast(a->scale);
                    for (int64_t j = 0; j < columns; j += VL)
                        store(g + j, load(p + j) * (load(g + j) - mean) * scale);
                }
                mix(gradients, q, length, columns, dim, 1, dk);
                clear(out, length * dim);
                mix(gradients, k, length, columns, dim, 0, out);
                write_head(a, first, length, head, 1, out, d_qkv);
            }
            write_head(a, first, length, a->heads + kv, 1, dk, d_qkv);
            write_head(a, first, length, a->heads + a->kv_heads + kv, 0, dv, d_qkv);
        }
    }
}
