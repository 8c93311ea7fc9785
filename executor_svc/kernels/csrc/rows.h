/* Operators that treat every row by itself: norms, activations, rotations. */

/* A piece of a row: y = x / rms(x) * weight, or y = (x - mean(x)) / deviation(x) * weight + bias if `layer`; x += residual
 * before it where there is one. Rounded where the reference rounds. */
INLINE void NAME(norm_piece)(const int type, const int weight_type, const int layer, const struct norm *a, long row, long piece) {
    const char *x = (const char *)a->x + (row * a->stride + piece * a->size) * SIZE(type);
    const char *residual = a->residual ? (const char *)a->residual + row * a->residual_stride * SIZE(type) : 0;
    long at = (row * a->pieces + piece) * a->size * SIZE(type);
    char *sum = (char *)a->sum + at, *y = (char *)a->y + at;
    vf total = SPLAT(0), squares = SPLAT(0);
    VECTORS(a->size, {
        vf v = NAME(load_some)(type, x, i, n);
        if (residual) {
            v = NAME(through)(type, v + NAME(load_some)(type, residual, i, n));
            NAME(store_some)(type, sum, i, v, n);
        }
        if (layer) total += v;
        else squares += v * v;
    });
    const char *from = residual ? sum : x;
    float mean = layer ? NAME(sum)(total) / a->size : 0;
    if (layer)
        VECTORS(a->size, {
            vf v = NAME(keep)(NAME(load_some)(type, from, i, n) - mean, n);
            squares += v * v;
        });
    float scale = 1.0f / sqrtf(NAME(sum)(squares) / a->size + a->eps);
    VECTORS(a->size, {
        vf v = NAME(load_some)(type, from, i, n), weight = NAME(load_some)(weight_type, a->weight, i, n);
        v = layer ? (v - mean) * scale * weight : NAME(through)(weight_type, v * scale) * weight;
        if (layer && a->bias) v += NAME(load_some)(weight_type, a->bias, i, n);
        NAME(store_some)(type, y, i, v, n);
    });
}

INLINE void NAME(norm_row)(const int layer, const struct norm *a, long row) {
    for (long piece = 0; piece < a->pieces; piece++)
        if (a->type == FP32) NAME(norm_piece)(FP32, FP32, layer, a, row, piece);
        else if (a->weight_type == FP32) NAME(norm_piece)(BF16, FP32, layer, a, row, piece);
        else NAME(norm_piece)(BF16, BF16, layer, a, row, piece);
}

static void NAME(norm)(const struct norm *a) {
#pragma omp parallel for schedule(static) if (a->rows * a->pieces * a->size > ALONE)
    for (long row = 0; row < a->rows; row++)
        if (a->layer) NAME(norm_row)(1, a, row);
        else NAME(norm_row)(0, a, row);
}

INLINE vf NAME(activation)(const int kind, vf v) {
    if (kind == SILU) return v / NAME(below_sigmoid)(v);
    if (kind == GELU) return v * NAME(phi)(v);
    return v / NAME(below_sigmoid)(v * (1.595769122f + 0.071354816f * v * v)); /* (1 + tanh(u)) / 2 is the sigmoid of 2u */
}

/* y = activation(x), times `up` where there is one. y may be x. */
INLINE void NAME(activate_row)(const int type, const int kind, const char *x, const char *up, long size, char *y) {
    VECTORS(size, {
        vf v = NAME(activation)(kind, NAME(load_some)(type, x, i, n));
        if (up) v = NAME(through)(type, v) * NAME(load_some)(type, up, i, n);
        NAME(store_some)(type, y, i, v, n);
    });
}

/* A row's first `size` elements; those behind them are `up` if `gated`. */
static void NAME(activate)(int type, int kind, int gated, const void *x, long size, void *y) {
    const char *up = gated ? (const char *)x + size * SIZE(type) : 0;
    switch (type * 3 + kind) {
#define CASE(type, kind) case type * 3 + kind: NAME(activate_row)(type, kind, x, up, size, y); break;
        CASE(FP32, SILU) CASE(FP32, GELU) CASE(FP32, GELU_TANH) CASE(BF16, SILU) CASE(BF16, GELU) CASE(BF16, GELU_TANH)
#undef CASE
    }
}

static void NAME(activations)(int type, int kind, int gated, const void *x, long stride, long rows, long size, void *y) {
#pragma omp parallel for schedule(static) if (rows * size > ALONE)
    for (long row = 0; row < rows; row++)
        NAME(activate)(type, kind, gated, (const char *)x + row * stride * SIZE(type), size, (char *)y + row * size * SIZE(type));
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
