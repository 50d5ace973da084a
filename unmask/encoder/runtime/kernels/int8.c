// The inputs of a linear layer in 8 bits, and its outputs in float32 again. Included by kernels.c.
//
// Blocks of 64 inputs are rotated by a Hadamard matrix with random signs (QuaRot, arXiv 2404.00456), so that an outlier
// is spread over its block. The fast transform needs 6 additions for each number, where a matrix product needs 64.

#define BLOCK 64
#define REGISTERS (BLOCK / VL)

#if defined(__clang__)
#define PARTNERS(v, h) __builtin_shufflevector(v, v, LANES(h))
#else
#define PARTNERS(v, h) __builtin_shuffle(v, (Integers){LANES(h)})
#endif
#if VL == 16
#define LANES(h) FOUR(0, h), FOUR(4, h), FOUR(8, h), FOUR(12, h)
#elif VL == 8
#define LANES(h) FOUR(0, h), FOUR(4, h)
#else
#define LANES(h) FOUR(0, h)
#endif
#define FOUR(first, h) (first) ^ h, (first + 1) ^ h, (first + 2) ^ h, (first + 3) ^ h

typedef uint8_t Bytes __attribute__((vector_size(VL), aligned(1), may_alias));

static const float lane_numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// 1 in lanes whose number has no bit h, -1 in the others.
INLINE Vector lane_signs(int h) {
    Integers lanes = __builtin_convertvector(load(lane_numbers), Integers);
    return broadcast(1) - broadcast(2) * __builtin_convertvector((lanes / h) & 1, Vector);
}

// One stage of the transform between lanes: sums in lanes without bit h, differences in the others.
#define STAGE(h)                                                                                                       \
    for (int r = 0; VL > h && r < REGISTERS; r++) v[r] = PARTNERS(v[r], h) + v[r] * lane_signs(h);

// The product of a block with signs / 8 and the Hadamard matrix.
INLINE void rotate_block(const float *x, const float *signs, float *y) {
    Vector v[REGISTERS];
    for (int r = 0; r < REGISTERS; r++) v[r] = load(x + r * VL) * load(signs + r * VL);
    for (int h = 1; h < REGISTERS; h *= 2)
        for (int r = 0; r < REGISTERS; r++)
            if (!(r & h)) {
                Vector sum = v[r] + v[r + h];
                v[r + h] = v[r] - v[r + h];
                v[r] = sum;
            }
    STAGE(1)
    STAGE(2)
#if VL > 4
    STAGE(4)
#endif
#if VL > 8
    STAGE(8)
#endif
    for (int r = 0; r < REGISTERS; r++) store(y + r * VL, v[r]);
}

// x [tokens][width], rotated in blocks -> steps [tokens][width] with zero point 128, and the size of a step [tokens].
// `signs` are those of a block, divided by 8. `memory` has room for a row. Width is a multiple of BLOCK.
void quantise_rows(int64_t tokens, int64_t width, const float *x, const float *signs, uint8_t *steps, float *sizes,
                   float *memory) {
    for (int64_t t = 0; t < tokens; t++, x += width, steps += width) {
        // Compared as bits: those of NaN are above all others, so a row with one gets a step that is none.
        Integers largest = (Integers)broadcast(1e-30f);
        for (int64_t i = 0; i < width; i += BLOCK) {
            rotate_block(x + i, signs, memory + i);
            for (int64_t j = i; j < i + BLOCK; j += VL) {
                Integers bits = (Integers)load(memory + j) & 0x7fffffff, larger = bits > largest;
                largest = (bits & larger) | (largest & ~larger);
            }
        }
        int32_t top_bits = 0;
        for (int lane = 0; lane < VL; lane++) top_bits = largest[lane] > top_bits ? largest[lane] : top_bits;
        float top;
        memcpy(&top, &top_bits, sizeof top);
        sizes[t] = top / 127.0f;
        // From 2^23 on, float32 has whole numbers only: adding it rounds, and leaves the integer in the last byte.
        Vector scale = broadcast(127.0f / top), rounding = broadcast(8388608.0f + 128.0f);
        for (int64_t i = 0; i < width; i += VL) {
            Integers bits = (Integers)(load(memory + i) * scale + rounding) & 0xff;
#if defined(__AVX512F__)
            _mm_storeu_si128((__m128i *)(steps + i), _mm512_cvtepi32_epi8((__m512i)bits));
#else
            *(Bytes *)(steps + i) = __builtin_convertvector(bits, Bytes);
#endif
        }
    }
}

// out [tokens][width] * sizes [tokens] + bias [width], in place. `bias` may be NULL.
void rescale_rows(int64_t tokens, int64_t width, const float *sizes, const float *bias, float *out) {
    for (int64_t t = 0; t < tokens; t++, out += width)
        for (int64_t i = 0; i < width; i++) out[i] = out[i] * sizes[t] + (bias ? bias[i] : 0.0f);
}
