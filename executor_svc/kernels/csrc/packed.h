/* Products with weights of 4 and 8 bits, which are made floats in registers where rows are few, and a panel at a time where they
 * are many. Both give the same numbers: a row's result does not depend on the others. */

typedef uint8_t NAME(vb_any) __attribute__((vector_size(LANES), aligned(1)));

/* The inputs number k that words of 32 bits hold: 0 ... 15 of 4 bits, -128 ... 127 of 8. */
INLINE vf NAME(codes)(const int bits, vu words, const int k) {
    vi values = bits == 4 ? (vi)(words >> (4 * k) & 15) : (vi)(words << (24 - 8 * k)) >> 24;
    return __builtin_convertvector(values, vf);
}

/* What LANES columns' codes of 4 bits are multiplied with, and what is then added. */
INLINE void NAME(units)(const struct packed *a, long panel, long group, long column, vf *scale, vf *offset) {
    long groups = (a->inputs + a->group - 1) / a->group, at = (panel * groups + group) * PANEL + column;
    vf zero = SPLAT(8);
    if (a->zeros) zero = __builtin_convertvector(__builtin_convertvector(*(const NAME(vb_any) *)(a->zeros + at), vi), vf);
    *scale = NAME(load)(a->scale_type, a->scales, at);
    *offset = -zero * *scale;
}

/* Words of an output whose weights share a scale, or whose products with integers float32 sums exactly. */
INLINE long NAME(stretch)(const int bits, const int round, const struct packed *a) {
    long words = bits == 4 ? a->group / 8 + (a->group % 8 != 0) : round ? EXACT / 4 : a->depth;
    return words < a->depth ? words : a->depth;
}

/* acc[r][v]: of `rows` rows, the sums of `count` vectors of a panel's columns: from `column` on, and every PANEL / count. */
INLINE void NAME(packed_sums)(const int bits, const int round, const int rows, const int count, const struct packed *a,
                              const float *x, long panel, long column, vf acc[ROWS][PANEL / LANES]) {
    const int each = 32 / bits, step = PANEL / count;
    const uint32_t *words = a->weight + panel * PANEL * a->depth + column;
    long stretch = NAME(stretch)(bits, round, a);
    vi exact[ROWS][PANEL / LANES];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < count; v++) {
            acc[r][v] = SPLAT(0);
            if (round) exact[r][v] = (vi)acc[r][v];
        }
    for (long first = 0; first < a->depth; first += stretch) {
        long last = first + stretch < a->depth ? first + stretch : a->depth;
        vf scale[PANEL / LANES], offset[PANEL / LANES];
        if (bits == 4)
#pragma GCC unroll 16
            for (int v = 0; v < count; v++) NAME(units)(a, panel, first / stretch, column + v * step, &scale[v], &offset[v]);
        for (long at = first; at < last; at++) {
            vu word[PANEL / LANES];
            for (int line = 0; line < PANEL; line += 16) __builtin_prefetch(words + at * PANEL + AHEAD / 4 + line, 0, 2);
#pragma GCC unroll 16
            for (int v = 0; v < count; v++) word[v] = *(const NAME(vu_any) *)(words + at * PANEL + v * step);
#pragma GCC unroll 8
            for (int k = 0; k < each; k++) {
                vf weight[PANEL / LANES];
#pragma GCC unroll 16
                for (int v = 0; v < count; v++) {
                    weight[v] = NAME(codes)(bits, word[v], k);
                    if (bits == 4) weight[v] = weight[v] * scale[v] + offset[v];
                }
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++) {
                    vf value = SPLAT(x[(at * each + k) * rows + r]);
#pragma GCC unroll 16
                    for (int v = 0; v < count; v++) acc[r][v] += value * weight[v];
                }
            }
        }
        if (round)
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
                for (int v = 0; v < count; v++) {
                    exact[r][v] += __builtin_convertvector(acc[r][v], vi);
                    acc[r][v] = SPLAT(0);
                }
    }
    if (round)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < count; v++) acc[r][v] = __builtin_convertvector(exact[r][v], vf);
}

/* A panel as floats [inputs][32], which the sums above would make of it. */
static void NAME(unpack)(const struct packed *a, long panel, float *to) {
    const uint32_t *words = a->weight + panel * PANEL * a->depth;
    const int each = 32 / a->bits;
    for (long at = 0; at < a->depth; at++)
        for (int column = 0; column < PANEL; column += LANES) {
            vu word = *(const NAME(vu_any) *)(words + at * PANEL + column);
            vf scale, offset;
            if (a->bits == 4) NAME(units)(a, panel, at / NAME(stretch)(4, 0, a), column, &scale, &offset);
            for (int k = 0; k < each; k++)
                STORE(to + (at * each + k) * PANEL + column,
                      a->bits == 4 ? NAME(codes)(4, word, k) * scale + offset : NAME(codes)(8, word, k));
        }
}

/* The sums above of a panel that is unpacked. */
INLINE void NAME(float_sums)(const int round, const int rows, const struct packed *a, const float *x, const float *panel,
                             vf acc[ROWS][PANEL / LANES]) {
    const long inputs = a->depth * (32 / a->bits), stretch = round ? EXACT : inputs;
    vf part[ROWS][2] = {0};
    vi exact[ROWS][2] = {0};
    for (long first = 0; first < inputs; first += stretch) {
        long count = inputs - first < stretch ? inputs - first : stretch;
        NAME(tile)(FP32, rows, x + first * rows, panel + first * PANEL, count, 0, part);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < 2; half++)
                if (round) exact[r][half] += __builtin_convertvector(part[r][half], vi);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            acc[r][half] = round ? __builtin_convertvector(exact[r][half], vf) : part[r][half];
}

/* The panel's part of `rows` rows of the product, from row `first` on: of its floats, if it is unpacked. */
INLINE void NAME(packed_rows)(const int bits, const int round, const int rows, const int count, const struct packed *a,
                              const float *x, const float *units, const float *floats, long panel, long first) {
    const int step = PANEL / count;
    for (int group = 0; group < step; group += LANES) {
        vf acc[ROWS][PANEL / LANES];
        if (floats) NAME(float_sums)(round, rows, a, x, floats + group, acc);
        else NAME(packed_sums)(bits, round, rows, count, a, x, panel, group, acc);
#pragma GCC unroll 16
        for (int v = 0; v < count; v++) {
            long column = panel * PANEL + group + v * step;
            vf bias = SPLAT(0), scale = SPLAT(1);
            if (a->bias) bias = NAME(load)(a->type, a->bias, column);
            if (bits == 8) scale = NAME(load)(a->scale_type, a->scales, column);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                vf value = round ? acc[r][v] * units[first + r] : acc[r][v];
                NAME(store)(a->type, a->y, (first + r) * a->outputs + column, bits == 8 ? value * scale + bias : value + bias);
            }
        }
    }
}

static void NAME(packed_panel)(int rows, const struct packed *a, const float *x, const float *units, const float *floats,
                               long panel, long first) {
    switch (rows) {
#define FORM(bits, round, r, count) NAME(packed_rows)(bits, round, r, count, a, x, units, floats, panel, first)
#define EACH_FORM(r, count) (a->bits == 4 ? FORM(4, 0, r, count) : a->round ? FORM(8, 1, r, count) : FORM(8, 0, r, count))
#define CASE(r) case r: if (r <= ROWS) EACH_FORM((r <= ROWS ? r : 1), 2); break;
    case 1: /* a whole panel at once, because each column's sum waits for itself */
        if (floats) EACH_FORM(1, 2);
        else EACH_FORM(1, PANEL / LANES);
        break;
        CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
#undef EACH_FORM
#undef FORM
    }
}

/* The columns behind the last whole panel. In float64, which sums integers exactly, too. */
static void NAME(packed_rest)(const struct packed *a, const float *packed, const float *units, long block) {
    long whole = a->outputs / PANEL * PANEL, columns = a->outputs - whole, each = 32 / a->bits;
    long group = a->bits == 4 ? a->group : a->inputs, groups = (a->inputs + group - 1) / group;
    const uint32_t *words = a->weight + whole * a->depth;
    for (long row = 0; row < a->rows; row++) {
        long first = row / block * block, rows = a->rows - first < block ? a->rows - first : block;
        const float *x = packed + first * a->depth * each + (row - first);
        for (long c = 0; c < columns; c++) {
            double sum = 0;
            for (long i = 0; i < a->inputs; i++) {
                uint32_t word = words[i / each * columns + c];
                long at = whole * groups + i / group * columns + c;
                float weight = (int8_t)(word >> 8 * (i % 4));
                if (a->bits == 4)
                    weight = ((float)(word >> 4 * (i % 8) & 15) - (a->zeros ? a->zeros[at] : 8)) * scalar(a->scale_type, a->scales, at);
                sum += (double)(x[i * rows] * weight);
            }
            if (a->round) sum = (float)sum * units[row];
            if (a->bits == 8) sum *= scalar(a->scale_type, a->scales, whole + c);
            put(a->type, a->y, row * a->outputs + whole + c, (float)sum + (a->bias ? scalar(a->type, a->bias, whole + c) : 0));
        }
    }
}

/* x / unit to nearest even, where the unit is the given one, or makes the row's largest number 127. */
static float NAME(round_row)(const struct packed *a, const void *x, long rows, float *to) {
    vf most = SPLAT(1e-12f);
    VECTORS(a->inputs, {
        vf size = (vf)((vu)NAME(load_some)(a->type, x, i, n) & 0x7fffffffu);
        most = NAME(choose)((vu)(size > most), size, most);
    });
    float largest = 0;
    for (int lane = 0; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
    float unit = a->input_scale ? a->input_scale : largest / 127;
    VECTORS(a->inputs, {
        vf v = NAME(load_some)(a->type, x, i, n) / unit;
        v = NAME(choose)((vu)(v > 127.0f), SPLAT(127), v);
        v = NAME(choose)((vu)(v < -127.0f), SPLAT(-127), v);
        v = v + 12582912.0f - 12582912.0f; /* to an integer: 1.5 * 2^23 leaves no room behind the point */
        for (long lane = 0; lane < n; lane++) to[(i + lane) * rows] = v[lane];
    });
    return unit;
}

/* A block of rows of x as [depth][rows], in float32, with zeros for the inputs that fill up the last words. */
static void NAME(packed_block)(const struct packed *a, long number, float *packed, float *units) {
    const void *from[ROWS];
    long block = NAME(block)(a->rows), first = number * block, rows = a->rows - first < block ? a->rows - first : block;
    long inputs = a->depth * (32 / a->bits);
    float *to = packed + first * inputs;
    for (long r = 0; r < rows; r++) {
        from[r] = (const char *)a->x + (first + r) * a->stride * SIZE(a->type);
        if (a->round) units[first + r] = NAME(round_row)(a, from[r], rows, to + r);
    }
    if (!a->round && a->type == BF16) NAME(gather)(BF16, from, rows, a->inputs, to);
    else if (!a->round) NAME(gather)(FP32, from, rows, a->inputs, to);
    memset(to + a->inputs * rows, 0, (inputs - a->inputs) * rows * sizeof(float));
}

/* y = x W^T + b; `packed` has room for the rows of x, and for a number a row. */
static void NAME(packed_linear)(const struct packed *a, float *packed) {
    long block = NAME(block)(a->rows), blocks = (a->rows + block - 1) / block, panels = a->outputs / PANEL;
    long inputs = a->depth * (32 / a->bits), group = blocks > 1 ? CACHE / (PANEL * inputs * 4) : (panels + 63) / 64;
    float *units = packed + a->rows * inputs;
    if (group > panels / 8) group = panels / 8;
    if (group < 1) group = 1;
    long pieces = (panels + group - 1) / group;
#pragma omp parallel
    {
        float *floats = blocks > 1 ? scratch(1, (size_t)PANEL * inputs * group) : 0;
#pragma omp for schedule(static)
        for (long number = 0; number < blocks; number++) NAME(packed_block)(a, number, packed, units);
#pragma omp for schedule(dynamic) nowait
        for (long number = 0; number < pieces + (a->outputs % PANEL != 0); number++) {
            long start = number * group, end = start + group < panels ? start + group : panels;
            if (number == pieces) NAME(packed_rest)(a, packed, units, block);
            for (long panel = start; floats && panel < end; panel++)
                NAME(unpack)(a, panel, floats + (panel - start) * PANEL * inputs);
            for (long first = 0; first < a->rows; first += block)
                for (long panel = start; panel < end; panel++)
                    NAME(packed_panel)(a->rows - first < block ? a->rows - first : block, a, packed + first * inputs, units,
                                       floats ? floats + (panel - start) * PANEL * inputs : 0, panel, first);
        }
    }
}
