/* The kernels for one instruction set. native.c includes this file once for each, with NAME(x), LANES (floats in a vector),
 * SPLAT(x) (a vector of one value) and ROWS (rows of a product that are computed together, as many as there are registers
 * for) defined. */

typedef float NAME(vf) __attribute__((vector_size(4 * LANES)));
typedef float NAME(vf_any) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t NAME(vu) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(vu_any) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t NAME(vi) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(vh) __attribute__((vector_size(2 * LANES)));
typedef uint16_t NAME(vh_any) __attribute__((vector_size(2 * LANES), aligned(2)));

#define vf NAME(vf)
#define vu NAME(vu)
#define vi NAME(vi)
#define vh NAME(vh)
#define LOAD(p) ((vf) * (const NAME(vf_any) *)(p))
#define STORE(p, v) (*(NAME(vf_any) *)(p) = (v))

INLINE vf NAME(widen)(const uint16_t *p) {
#if LANES == 16 && defined(__x86_64__) /* the compiler would take two halves */
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    vh h = *(const NAME(vh_any) *)p;
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

INLINE vf NAME(load)(int type, const void *p, long at) {
    return type == BF16 ? NAME(widen)((const uint16_t *)p + at) : LOAD((const float *)p + at);
}

/* To bfloat16, to nearest and even; a NaN stays one. */
INLINE vu NAME(rounded)(vf v) {
    vu bits = (vu)v, even = (bits >> 16) & 1;
    vu sum = (bits + 0x7fff + even) >> 16, nan = (vu)(v != v);
    return (sum & ~nan) | (0x7fc0 & nan);
}

INLINE void NAME(store)(int type, void *p, long at, vf v) {
    if (type == BF16)
        *(NAME(vh_any) *)((uint16_t *)p + at) = __builtin_convertvector(NAME(rounded)(v), vh);
    else
        STORE((float *)p + at, v);
}

/* What the value is after a trip through the type. */
INLINE vf NAME(through)(int type, vf v) { return type == BF16 ? (vf)(NAME(rounded)(v) << 16) : v; }

INLINE float NAME(sum)(vf v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

/* e to the v for v <= 88: 2^n times a polynomial on |r| <= log(2)/2 (coefficients of Cephes' expf); 0 below -87. */
INLINE vf NAME(exp)(vf v) {
    vu low = (vu)(v < -87.0f);
    v = (vf)(((vu)v & ~low) | ((vu)SPLAT(-87.0f) & low));
    vf n = v * 1.44269504f + 12582912.0f; /* rounds to an integer in the low bits */
    vi k = (vi)n - 0x4b400000;
    n -= 12582912.0f;
    vf r = v - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = SPLAT(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vu)(p * (vf)((k + 127) << 23)) & ~low);
}

/* acc[r] += x[i][r] * panel[i], for `rows` rows and the 2 * LANES columns of one group of a panel. What lies `ahead` bytes
 * behind is fetched meanwhile, unless that is 0: the processor's own prefetching leaves a third of the memory's speed. */
INLINE void NAME(tile)(int type, const int rows, const float *x, const void *panel, long n, long ahead, vf acc[ROWS][2]) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = SPLAT(0);
    for (long i = 0; i < n; i++) {
        vf low, high;
        for (int line = 0; ahead && line < PANEL * SIZE(type); line += 64)
            __builtin_prefetch((const char *)panel + ahead + i * PANEL * SIZE(type) + line, 0, 2);
        if (type == BF16) {
            vu pair = *(const NAME(vu_any) *)((const uint32_t *)panel + i * (PANEL / 2));
            low = (vf)(pair << 16), high = (vf)(pair & 0xffff0000u);
        } else {
            low = LOAD((const float *)panel + i * PANEL), high = LOAD((const float *)panel + i * PANEL + PANEL / 2);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vf value = SPLAT(x[i * rows + r]);
            acc[r][0] += value * low, acc[r][1] += value * high;
        }
    }
}

INLINE void NAME(panel_rows)(const int rows, const struct linear *a, const float *x, long panel, long first, long ahead) {
    const char *weight = (const char *)a->weight + panel * PANEL * a->inputs * SIZE(a->weight_type);
    for (int group = 0; group < PANEL / 2; group += LANES) {
        vf acc[ROWS][2];
        long column = panel * PANEL + group;
        if (a->weight_type == FP32) NAME(tile)(FP32, rows, x, weight + 4 * group, a->inputs, ahead, acc);
        else if (ahead) NAME(tile)(BF16, rows, x, weight + 4 * group, a->inputs, ahead, acc);
        else NAME(tile)(BF16, rows, x, weight + 4 * group, a->inputs, 0, acc);
        vf bias[2] = {SPLAT(0), SPLAT(0)};
        if (a->bias)
            for (int half = 0; half < 2; half++) bias[half] = NAME(load)(a->type, a->bias, column + half * PANEL / 2);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < 2; half++)
                NAME(store)(a->type, a->y, (first + r) * a->outputs + column + half * PANEL / 2, acc[r][half] + bias[half]);
    }
}

/* The panel's part of `rows` rows of the product. */
static void NAME(panel)(int rows, const struct linear *a, const float *x, long panel, long first, long ahead) {
    switch (rows) {
#define CASE(r) case r: if (r <= ROWS) NAME(panel_rows)(r <= ROWS ? r : 1, a, x, panel, first, ahead); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

/* The columns behind the last whole panel, which lie as [inputs][columns]. */
static void NAME(rest)(const struct linear *a, const float *packed, long block) {
    long whole = a->outputs / PANEL * PANEL, columns = a->outputs - whole;
    const char *weight = (const char *)a->weight + whole * a->inputs * SIZE(a->weight_type);
    for (long row = 0; row < a->rows; row++) {
        long first = row / block * block, rows = a->rows - first < block ? a->rows - first : block;
        const float *x = packed + first * a->inputs + (row - first);
        float sums[PANEL] = {0};
        for (long i = 0; i < a->inputs; i++)
            for (long c = 0; c < columns; c++) sums[c] += x[i * rows] * scalar(a->weight_type, weight, i * columns + c);
        for (long c = 0; c < columns; c++) {
            float bias = a->bias ? scalar(a->type, a->bias, whole + c) : 0;
            put(a->type, a->y, row * a->outputs + whole + c, sums[c] + bias);
        }
    }
}

/* to[i][r] = from[r][i]. */
INLINE void NAME(gather)(int type, const void *from, long stride, long rows, long inputs, float *to) {
    for (long i = 0; i < inputs; i++)
        for (long r = 0; r < rows; r++) to[i * rows + r] = scalar(type, from, r * stride + i);
}

/* y = x W^T + b. Rows are computed in blocks of like size, panels in groups that stay in the second-level cache meanwhile. */
static void NAME(linear)(const struct linear *a, float *packed) {
    long blocks = (a->rows + ROWS - 1) / ROWS, block = (a->rows + blocks - 1) / blocks;
    long panels = a->outputs / PANEL, bytes = PANEL * a->inputs * SIZE(a->weight_type);
    long group = blocks == 1 ? (panels + 63) / 64 : CACHE / bytes;
    if (group > panels / 8) group = panels / 8;
    if (group < 1) group = 1;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long first = 0; first < a->rows; first += block) {
            long rows = a->rows - first < block ? a->rows - first : block;
            float *to = packed + first * a->inputs;
            const char *from = (const char *)a->x + first * a->stride * SIZE(a->type);
            if (a->type == BF16) NAME(gather)(BF16, from, a->stride, rows, a->inputs, to);
            else NAME(gather)(FP32, from, a->stride, rows, a->inputs, to);
        }
#pragma omp for schedule(dynamic) nowait
        for (long start = 0; start < panels; start += group)
            for (long first = 0; first < a->rows; first += block) {
                long rows = a->rows - first < block ? a->rows - first : block;
                long ahead = first == 0 ? AHEAD : 0; /* later blocks find the panels in the cache */
                for (long panel = start; panel < start + group && panel < panels; panel++)
                    NAME(panel)(rows, a, packed + first * a->inputs, panel, first, ahead);
            }
#pragma omp single nowait
        if (a->outputs % PANEL) NAME(rest)(a, packed, block);
    }
}

/* y = weight * x / rms(x), x += residual before it where there is one; rounded where the reference rounds. */
INLINE void NAME(norm_rows)(const int type, const struct norm *a, long row) {
    long whole = a->size / LANES * LANES;
    const char *x = (const char *)a->x + row * a->stride * SIZE(type);
    const char *residual = a->residual ? (const char *)a->residual + row * a->residual_stride * SIZE(type) : 0;
    char *sum = (char *)a->sum + row * a->size * SIZE(type), *y = (char *)a->y + row * a->size * SIZE(type);
    vf squares = SPLAT(0);
    float square = 0;
    for (long i = 0; i < whole; i += LANES) {
        vf v = NAME(load)(type, x, i);
        if (residual) {
            v = NAME(through)(type, v + NAME(load)(type, residual, i));
            NAME(store)(type, sum, i, v);
        }
        squares += v * v;
    }
    for (long i = whole; i < a->size; i++) {
        float v = scalar(type, x, i);
        if (residual) {
            put(type, sum, i, v + scalar(type, residual, i));
            v = scalar(type, sum, i);
        }
        square += v * v;
    }
    const char *from = residual ? sum : x;
    float scale = 1.0f / sqrtf((square + NAME(sum)(squares)) / a->size + a->eps);
    for (long i = 0; i < whole; i += LANES) {
        vf v = NAME(through)(type, NAME(load)(type, from, i) * scale);
        NAME(store)(type, y, i, v * NAME(load)(type, a->weight, i));
    }
    for (long i = whole; i < a->size; i++)
        put(type, y, i, through(type, scalar(type, from, i) * scale) * scalar(type, a->weight, i));
}

static void NAME(norm)(const struct norm *a) {
#pragma omp parallel for schedule(static) if (a->rows * a->size > ALONE)
    for (long row = 0; row < a->rows; row++)
        if (a->type == BF16) NAME(norm_rows)(BF16, a, row);
        else NAME(norm_rows)(FP32, a, row);
}

/* y = silu(gate) * up, of a row [gate, up]. */
INLINE void NAME(silu_row)(const int type, const char *gate, long size, char *y) {
    const char *up = gate + size * SIZE(type);
    long whole = size / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) {
        vf v = NAME(load)(type, gate, i), negative = -v;
        vu large = (vu)(negative > 88.0f);
        vf e = NAME(exp)((vf)(((vu)negative & ~large) | ((vu)SPLAT(88.0f) & large)));
        NAME(store)(type, y, i, NAME(through)(type, v / (1.0f + e)) * NAME(load)(type, up, i));
    }
    for (long i = whole; i < size; i++) {
        float v = scalar(type, gate, i);
        put(type, y, i, through(type, v / (1.0f + expf(-v))) * scalar(type, up, i));
    }
}

static void NAME(silu_mul)(int type, const void *x, long stride, long rows, long size, void *y) {
#pragma omp parallel for schedule(static) if (rows * size > ALONE)
    for (long row = 0; row < rows; row++) {
        const char *from = (const char *)x + row * stride * SIZE(type);
        char *to = (char *)y + row * size * SIZE(type);
        if (type == BF16) NAME(silu_row)(BF16, from, size, to);
        else NAME(silu_row)(FP32, from, size, to);
    }
}

/* scores[r][0 .. KEYS) of a block of keys for `rows` packed queries. */
INLINE void NAME(score_rows)(int type, const int rows, const float *q, const void *keys, long dim, float *scores) {
    for (int group = 0; group < KEYS; group += LANES) {
        vf acc[ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) acc[r] = SPLAT(0);
        for (long d = 0; d < dim; d++) {
            vf key = NAME(load)(type, keys, d * KEYS + group);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) acc[r] += SPLAT(q[d * rows + r]) * key;
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) STORE(scores + r * CHUNK + group, acc[r]);
    }
}

static void NAME(score)(int type, int rows, const float *q, const void *keys, long dim, float *scores) {
    switch (rows) {
#define CASE(r)                                                                                   \
    case r:                                                                                       \
        if (r <= ROWS && type == BF16) NAME(score_rows)(BF16, r <= ROWS ? r : 1, q, keys, dim, scores); \
        else if (r <= ROWS) NAME(score_rows)(FP32, r <= ROWS ? r : 1, q, keys, dim, scores);            \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

/* sums[r][column ..] += weights[r] * values, for `rows` rows and `wide` vectors of columns; values [keys][dim] in pieces of KEYS. */
INLINE void NAME(mix_rows)(int type, const int rows, const int wide, const float *weights, const void *const *values, long keys,
                           long dim, long column, float *sums) {
    vf acc[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < wide; c++) acc[r][c] = LOAD(sums + r * dim + column + c * LANES);
    for (long key = 0; key < keys; key++) {
        vf value[4];
#pragma GCC unroll 4
        for (int c = 0; c < wide; c++) value[c] = NAME(load)(type, values[key / KEYS], key % KEYS * dim + column + c * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < wide; c++) acc[r][c] += SPLAT(weights[r * CHUNK + key]) * value[c];
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < wide; c++) STORE(sums + r * dim + column + c * LANES, acc[r][c]);
}

INLINE void NAME(mix_typed)(int type, long rows, const float *weights, const void *const *values, long keys, long dim, float *sums) {
    const int wide = LANES * 4 <= 64 ? 4 : 2, tall = ROWS >= 12 ? 4 : 2;
    long column = 0, row;
    for (; column + wide * LANES <= dim; column += wide * LANES) {
        for (row = 0; row + tall <= rows; row += tall)
            NAME(mix_rows)(type, tall, wide, weights + row * CHUNK, values, keys, dim, column, sums + row * dim);
        for (; row < rows; row++)
            NAME(mix_rows)(type, 1, wide, weights + row * CHUNK, values, keys, dim, column, sums + row * dim);
    }
    for (; column + LANES <= dim; column += LANES)
        for (row = 0; row < rows; row++)
            NAME(mix_rows)(type, 1, 1, weights + row * CHUNK, values, keys, dim, column, sums + row * dim);
    for (; column < dim; column++)
        for (row = 0; row < rows; row++)
            for (long key = 0; key < keys; key++)
                sums[row * dim + column] += weights[row * CHUNK + key] * scalar(type, values[key / KEYS], key % KEYS * dim + column);
}

/* Attention of queries [first, last) of a sequence, one key head: softmax as it goes (Milakov and Gimelshein 2018), CHUNK
 * keys at a time, read where they lie. Row r of the scratch is query first + r / heads, head r % heads. */
INLINE void NAME(attend_typed)(const int type, const struct attention *a, long sequence, long head, long first, long last,
                               float *scratch) {
    long heads = a->heads / a->groups, rows = (last - first) * heads, dim = a->dim, query = a->starts[sequence];
    long begin = a->contexts[sequence] - (a->starts[sequence + 1] - query); /* position of the sequence's first query */
    long position = begin + first, end = begin + last;
    long start = a->window && position - a->window + 1 > 0 ? (position - a->window + 1) / KEYS * KEYS : 0;
    const int32_t *table = a->tables + sequence * a->table_stride;
    float *packed = scratch, *scores = packed + rows * dim, *sums = scores + rows * CHUNK, *highest = sums + rows * dim;
    float *total = highest + rows;

    for (long row = 0; row < rows; row++) {
        long block = row / ROWS * ROWS, height = rows - block < ROWS ? rows - block : ROWS;
        long at = (query + first + row / heads) * a->q_stride + (head * heads + row % heads) * dim;
        for (long d = 0; d < dim; d++) packed[block * dim + d * height + row - block] = scalar(type, a->q, at + d) * a->scale;
        highest[row] = -INFINITY, total[row] = 0;
    }
    memset(sums, 0, rows * dim * sizeof(float));
    for (long from = start; from < end; from += CHUNK) {
        long keys = end - from < CHUNK ? end - from : CHUNK, padded = (keys + KEYS - 1) / KEYS * KEYS;
        const void *values[CHUNK / KEYS];
        for (long key = 0; key < keys; key += KEYS) {
            long at = ((long)table[(from + key) / KEYS] * a->groups + head) * dim * KEYS * SIZE(type);
            values[key / KEYS] = (const char *)a->v_cache + at;
            for (long row = 0; row < rows; row += ROWS)
                NAME(score)(type, rows - row < ROWS ? rows - row : ROWS, packed + row * dim, (const char *)a->k_cache + at, dim,
                            scores + row * CHUNK + key);
        }
        for (long row = 0; row < rows; row++) {
            float *line = scores + row * CHUNK;
            long at = position + row / heads; /* sees keys up to its own, and not before its window */
            for (long key = at - from + 1 < 0 ? 0 : at - from + 1; key < padded; key++) line[key] = -INFINITY;
            if (a->window)
                for (long key = 0; key < padded && from + key <= at - a->window; key++) line[key] = -INFINITY;
            vf tops = SPLAT(highest[row]);
            for (long key = 0; key < padded; key += LANES) {
                vf score = LOAD(line + key);
                vu higher = (vu)(score > tops);
                tops = (vf)(((vu)score & higher) | ((vu)tops & ~higher));
            }
            float most = tops[0];
            for (int lane = 1; lane < LANES; lane++) most = tops[lane] > most ? tops[lane] : most;
            if (most == -INFINITY) {
                memset(line, 0, padded * sizeof(float));
                continue;
            }
            vf mass = SPLAT(0);
            for (long key = 0; key < padded; key += LANES) {
                vf weight = NAME(exp)(LOAD(line + key) - most);
                STORE(line + key, weight);
                mass += weight;
            }
            float shrink = highest[row] == most ? 1 : expf(highest[row] - most);
            total[row] = total[row] * shrink + NAME(sum)(mass);
            if (shrink != 1)
                for (long d = 0; d < dim; d++) sums[row * dim + d] *= shrink;
            highest[row] = most;
        }
        NAME(mix_typed)(type, rows, scores, values, keys, dim, sums);
    }
    for (long row = 0; row < rows; row++) {
        long at = (query + first + row / heads) * a->heads * dim + (head * heads + row % heads) * dim;
        float scale = 1 / total[row];
        for (long d = 0; d < dim; d++) put(type, a->y, at + d, sums[row * dim + d] * scale);
    }
}

static void NAME(attend)(const struct attention *a, long sequence, long head, long first, long last, float *scratch) {
    if (a->type == BF16) NAME(attend_typed)(BF16, a, sequence, head, first, last, scratch);
    else NAME(attend_typed)(FP32, a, sequence, head, first, last, scratch);
}

/* Turns the first 2 * half dimensions of a row's heads by its angles. */
INLINE void NAME(turn)(const int type, const int interleaved, const char *x, long heads, long dim, const float *cosines,
                       const float *sines, long half, char *y) {
    for (long head = 0; head < heads; head++) {
        const char *from = x + head * dim * SIZE(type);
        char *to = y + head * dim * SIZE(type);
        long whole = interleaved ? 0 : half / LANES * LANES;
        for (long i = 0; i < whole; i += LANES) {
            vf a = NAME(load)(type, from, i), b = NAME(load)(type, from, i + half);
            vf c = LOAD(cosines + i), s = LOAD(sines + i);
            NAME(store)(type, to, i, a * c - b * s);
            NAME(store)(type, to, i + half, b * c + a * s);
        }
        for (long i = whole; i < half; i++) {
            long one = interleaved ? 2 * i : i, other = interleaved ? 2 * i + 1 : i + half;
            float a = scalar(type, from, one), b = scalar(type, from, other);
            put(type, to, one, a * cosines[i] - b * sines[i]);
            put(type, to, other, b * cosines[i] + a * sines[i]);
        }
        memcpy(to + 2 * half * SIZE(type), from + 2 * half * SIZE(type), (dim - 2 * half) * SIZE(type));
    }
}

static void NAME(rope)(int type, const void *x, long stride, long rows, long heads, long dim, const float *cosines,
                       const float *sines, long half, int interleaved, void *y) {
#pragma omp parallel for schedule(static) if (rows * heads * dim > ALONE)
    for (long row = 0; row < rows; row++) {
        const char *from = (const char *)x + row * stride * SIZE(type);
        const float *c = cosines + row * half, *s = sines + row * half;
        char *to = (char *)y + row * heads * dim * SIZE(type);
        if (type == BF16 && !interleaved) NAME(turn)(BF16, 0, from, heads, dim, c, s, half, to);
        else if (type == BF16) NAME(turn)(BF16, 1, from, heads, dim, c, s, half, to);
        else if (!interleaved) NAME(turn)(FP32, 0, from, heads, dim, c, s, half, to);
        else NAME(turn)(FP32, 1, from, heads, dim, c, s, half, to);
    }
}

#undef vf
#undef vu
#undef vi
#undef vh
#undef LOAD
#undef STORE
