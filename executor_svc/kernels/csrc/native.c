/* Operators on the CPU. Compiled when the package is installed, if there is a C compiler; without one, torch's operators are
 * used (kernels/cpu.py). Meaning and rounding are those of the references in engine/ops.py; sums run in float32, a row's in an
 * order that does not depend on the other rows of the batch.
 *
 * Weights lie in panels of 32 outputs, [outputs / 32][inputs][32], so that each is read once, from its beginning to its end,
 * however many rows there are; in bfloat16 a panel's columns c and c + 16 lie beside each other, as the two halves of a
 * 32-bit word, which a shift and a mask make float32. What is left of the outputs lies behind, as [inputs][outputs % 32].
 * Keys lie as [blocks][heads][dim][16], values as [blocks][heads][16][dim]: a vector holds what 16 keys have in one dimension.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FP32 = 0, BF16 = 1 };
enum { SILU = 0, GELU = 1, GELU_TANH = 2 };
enum { PANEL = 32, KEYS = 16, CHUNK = 128, QUERY_ROWS = 48, CACHE = 512 << 10, AHEAD = 8 << 10 };
enum { EXACT = 1024 }; /* products of two integers of 8 bits, whose sum float32 still holds exactly */
enum { ALONE = 1 << 14 }; /* elements up to which one thread is quicker than two */
enum { SUMMED = 512 }; /* tokens whose probabilities are summed in float32 */
enum { EACH = 128 }; /* rows of an expert, on average, that are computed at a time: they pay for reading its weights once more */

#define SIZE(type) ((type) == BF16 ? 2 : 4)
#define INLINE static inline __attribute__((always_inline))

/* Strides count elements, of one row to the next. */
struct linear {
    int type, weight_type; /* of x, bias and y; of weight */
    long rows, inputs, outputs, stride;
    const void *x, *weight, *bias;
    void *y;
    const int32_t *order; /* which row of x each row of the product is made of; 0: the rows as they come */
};

/* A product whose weight is packed: each word of 32 bits has so many inputs of an output as fit in, the first in its lowest bits.
 * Words lie in panels as floats do, [outputs / 32][depth][32] and [depth][outputs % 32]; so do scales and zeros, by group. */
struct packed {
    int type, bits, scale_type, round; /* of x, bias and y; of a weight; of scales; whether x is rounded to 8 bits, too */
    long rows, inputs, depth, outputs, stride, group; /* depth: words of an output; group: inputs that share a scale of 4 bits */
    float input_scale; /* by which x is rounded; 0: by each row's own */
    const void *x, *scales, *bias;
    const uint32_t *weight;
    const uint8_t *zeros; /* 0: all of them 8 */
    void *y;
};

struct norm {
    int type, weight_type, layer; /* of x, residual, y and sum; of weight and bias; whether the mean is taken away */
    long rows, pieces, size, stride, residual_stride; /* each row's pieces, of this size, are normed by themselves */
    float eps;
    const void *x, *residual, *weight, *bias;
    void *y, *sum;
};

struct experts {
    int type, weight_type;
    long tokens, count, top_k, hidden, size, stride; /* size: columns of an expert's gate */
    const void *x, *gate_up, *down;
    const int64_t *chosen; /* [tokens][top_k], each less than count */
    const float *weights; /* of the chosen */
    void *y;
};

/* What the experts' kernel works in. */
struct experts_memory {
    float *packed;
    void *made, *out; /* gate and up, then the activations; what the experts give */
    int32_t *order, *places; /* a pair's token by place, a pair's place */
    long *starts, *first, *blocks, *ups, *downs; /* by expert; then by used expert: its first place, ends of its pieces */
    struct linear *up, *down; /* by used expert */
};

struct attention {
    int type; /* of all tensors, the caches among them */
    long sequences, tokens, heads, groups, dim, window, table_stride, q_stride, k_stride, v_stride;
    float scale, cap;
    const void *q, *k, *v;
    const float *alibi; /* [heads], or 0 */
    void *k_cache, *v_cache, *y;
    const int64_t *starts, *contexts, *slots; /* a sequence's first token [sequences + 1], its visible keys, a token's place */
    const int32_t *tables;
};

INLINE float scalar(int type, const void *p, long at) {
    if (type == FP32) return ((const float *)p)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[at] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void put(int type, void *p, long at, float value) {
    if (type == FP32) {
        ((float *)p)[at] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    ((uint16_t *)p)[at] = value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE float through(int type, float value) {
    uint16_t half;
    if (type == FP32) return value;
    put(BF16, &half, 0, value);
    return scalar(BF16, &half, 0);
}

/* Scratch memory of a thread, which stays: two pieces of it. */
static float *scratch(int number, size_t count) {
    static _Thread_local float *buffer[2];
    static _Thread_local size_t size[2];
    if (count > size[number]) {
        free(buffer[number]);
        size[number] = count + count / 4;
        if (posix_memalign((void **)&buffer[number], 64, size[number] * sizeof(float))) abort();
    }
    return buffer[number];
}

#define SPLAT_4(x) {x, x, x, x}
#define SPLAT_8(x) {x, x, x, x, x, x, x, x}
#define SPLAT_16(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#define NAME(x) x##_avx512
#define LANES 16
#define SPLAT(x) ((vf)SPLAT_16(x))
#define ROWS 12
#include "level.h"
#undef NAME
#undef LANES
#undef SPLAT
#undef ROWS
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(x) x##_avx2
#define LANES 8
#define SPLAT(x) ((vf)SPLAT_8(x))
#define ROWS 6
#include "level.h"
#undef NAME
#undef LANES
#undef SPLAT
#undef ROWS
#pragma GCC pop_options
#endif
#define NAME(x) x##_plain
#define LANES 4
#define SPLAT(x) ((vf)SPLAT_4(x))
#define ROWS 6
#include "level.h"

#if defined(__x86_64__)
static int level(void) {
    static int known = -1;
    if (known < 0) {
        const char *most = getenv("ENGINEHOUSE_CPU"); /* "avx2" or "plain": no more than that */
        int allowed = !most || !*most ? 2 : strcmp(most, "avx2") == 0 ? 1 : strcmp(most, "plain") == 0 ? 0 : 2;
        int has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq")
                      ? 2
                      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        known = has < allowed ? has : allowed;
    }
    return known;
}
#define CALL(f, ...) (level() == 2 ? f##_avx512(__VA_ARGS__) : level() == 1 ? f##_avx2(__VA_ARGS__) : f##_plain(__VA_ARGS__))
#else
#define CALL(f, ...) f##_plain(__VA_ARGS__)
#endif

/* Rows [outputs][inputs] -> panels, in place. */
void enginehouse_pack(int type, void *weight, long outputs, long inputs) {
#pragma omp parallel for schedule(dynamic)
    for (long first = 0; first < outputs; first += PANEL) {
        long columns = outputs - first < PANEL ? outputs - first : PANEL;
        size_t bytes = (size_t)columns * inputs * SIZE(type);
        char *panel = (char *)weight + first * inputs * SIZE(type), *copy = (char *)scratch(0, bytes / 4 + 1);
        memcpy(copy, panel, bytes);
        for (long i = 0; i < inputs; i++)
            for (long c = 0; c < columns; c++) {
                long to = columns < PANEL || type == FP32 ? c : c % 16 * 2 + c / 16;
                if (type == BF16) ((uint16_t *)panel)[i * columns + to] = ((const uint16_t *)copy)[c * inputs + i];
                else ((float *)panel)[i * columns + to] = ((const float *)copy)[c * inputs + i];
            }
    }
}

/* Rows of a packed weight: y [count][inputs]. */
void enginehouse_rows(int type, const void *weight, long outputs, long inputs, const int32_t *ids, long count, void *y) {
    for (long n = 0; n < count; n++) {
        long first = ids[n] / PANEL * PANEL, c = ids[n] - first, columns = outputs - first < PANEL ? outputs - first : PANEL;
        const char *panel = (const char *)weight + first * inputs * SIZE(type);
        long from = columns < PANEL || type == FP32 ? c : c % 16 * 2 + c / 16;
        for (long i = 0; i < inputs; i++)
            if (type == BF16) ((uint16_t *)y)[n * inputs + i] = ((const uint16_t *)panel)[i * columns + from];
            else ((float *)y)[n * inputs + i] = ((const float *)panel)[i * columns + from];
    }
}

void enginehouse_linear(const struct linear *a) {
    if (a->rows && a->outputs) CALL(linear, a, scratch(0, (size_t)a->rows * a->inputs));
}

void enginehouse_packed(const struct packed *a) {
    if (a->rows && a->outputs) CALL(packed_linear, a, scratch(0, (size_t)a->rows * (a->depth * (32 / a->bits) + 1)));
}

void enginehouse_norm(const struct norm *a) { CALL(norm, a); }

void enginehouse_activation(int type, int kind, int gated, const void *x, long stride, long rows, long size, void *y) {
    CALL(activations, type, kind, gated, x, stride, rows, size, y);
}

/* The next `bytes` of memory, in whole cache lines. */
static void *carve(uintptr_t *memory, size_t bytes) {
    uintptr_t piece = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return (void *)piece;
}

static struct experts_memory carve_experts(const struct experts *a, uintptr_t *memory) {
    size_t pairs = a->tokens * a->top_k, numbers = (a->count + 1) * sizeof(long), widest = a->hidden > a->size ? a->hidden : a->size;
    return (struct experts_memory){
        .packed = carve(memory, pairs * widest * sizeof(float)),
        .made = carve(memory, pairs * 2 * a->size * SIZE(a->type)),
        .out = carve(memory, pairs * a->hidden * SIZE(a->type)),
        .order = carve(memory, pairs * sizeof(int32_t)),
        .places = carve(memory, pairs * sizeof(int32_t)),
        .starts = carve(memory, numbers),
        .first = carve(memory, numbers),
        .blocks = carve(memory, numbers),
        .ups = carve(memory, numbers),
        .downs = carve(memory, numbers),
        .up = carve(memory, a->count * sizeof(struct linear)),
        .down = carve(memory, a->count * sizeof(struct linear)),
    };
}

void enginehouse_experts(const struct experts *a) {
    struct experts part = *a;
    long most = a->count * EACH / a->top_k;
    for (long first = 0; first < a->tokens; first += most) {
        uintptr_t bytes = 0;
        part.tokens = a->tokens - first < most ? a->tokens - first : most;
        carve_experts(&part, &bytes); /* counts them */
        uintptr_t memory = (uintptr_t)scratch(0, bytes / sizeof(float));
        struct experts_memory pieces = carve_experts(&part, &memory);
        part.x = (const char *)a->x + first * a->stride * SIZE(a->type);
        part.y = (char *)a->y + first * a->hidden * SIZE(a->type);
        part.chosen = a->chosen + first * a->top_k, part.weights = a->weights + first * a->top_k;
        CALL(experts, &part, &pieces);
    }
}

void enginehouse_rope(int type, const void *x, long stride, long rows, long heads, long dim, const float *cosines,
                      const float *sines, long half, int interleaved, void *y) {
    CALL(rope, type, x, stride, rows, heads, dim, cosines, sines, half, interleaved, y);
}

/* `masks` has an address for each row, or 0. */
void enginehouse_choose(const float *logits, long stride, long rows, long size, const uint8_t *const *masks,
                        const float *temperatures, const double *numbers, int64_t *tokens) {
    CALL(choose_tokens, logits, stride, rows, size, masks, temperatures, numbers, tokens);
}

void enginehouse_forbid(float *logits, long stride, long rows, long size, const uint8_t *const *masks) {
    CALL(forbid, logits, stride, rows, size, masks);
}

/* Writes the new keys and values, then lets every query see what it may. */
void enginehouse_attention(const struct attention *a) {
    long heads = a->heads / a->groups, span = QUERY_ROWS / heads < 1 ? 1 : QUERY_ROWS / heads, rows = span * heads;
    size_t room = (size_t)rows * (2 * a->dim + CHUNK + 2);
    long items = 0;
    for (long s = 0; s < a->sequences; s++) items += (a->starts[s + 1] - a->starts[s] + span - 1) / span;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long t = 0; t < a->tokens; t++) {
            long block = a->slots[t] / KEYS, offset = a->slots[t] % KEYS;
            for (long g = 0; g < a->groups; g++) {
                long base = (block * a->groups + g) * a->dim * KEYS, k = t * a->k_stride + g * a->dim, v = t * a->v_stride + g * a->dim;
                if (a->type == BF16)
                    for (long d = 0; d < a->dim; d++) {
                        ((uint16_t *)a->k_cache)[base + d * KEYS + offset] = ((const uint16_t *)a->k)[k + d];
                        ((uint16_t *)a->v_cache)[base + offset * a->dim + d] = ((const uint16_t *)a->v)[v + d];
                    }
                else
                    for (long d = 0; d < a->dim; d++) {
                        ((float *)a->k_cache)[base + d * KEYS + offset] = ((const float *)a->k)[k + d];
                        ((float *)a->v_cache)[base + offset * a->dim + d] = ((const float *)a->v)[v + d];
                    }
            }
        }
        float *own = scratch(0, room);
#pragma omp for schedule(dynamic) nowait
        for (long item = 0; item < items * a->groups; item++) {
            long left = item / a->groups, sequence = 0, count;
            while (left >= (count = (a->starts[sequence + 1] - a->starts[sequence] + span - 1) / span)) left -= count, sequence++;
            long queries = a->starts[sequence + 1] - a->starts[sequence], first = left * span;
            long last = first + span < queries ? first + span : queries;
            CALL(attend, a, sequence, item % a->groups, first, last, own);
        }
    }
}
