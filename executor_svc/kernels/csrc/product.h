/* Products with packed weights. */

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

/* Rows are computed in blocks of like size, of which this is the largest. */
INLINE long NAME(block)(long rows) {
    long blocks = (rows + ROWS - 1) / ROWS;
    return blocks ? (rows + blocks - 1) / blocks : 1;
}

/* to[i][r] = from[r][i]. */
INLINE void NAME(gather)(int type, const void *const *from, long rows, long inputs, float *to) {
    for (long i = 0; i < inputs; i++)
        for (long r = 0; r < rows; r++) to[i * rows + r] = scalar(type, from[r], i);
}

/* Packs a block of rows of x as [inputs][rows], in float32. */
static void NAME(pack_block)(const struct linear *a, long number, float *packed) {
    const void *from[ROWS];
    long block = NAME(block)(a->rows), first = number * block, rows = a->rows - first < block ? a->rows - first : block;
    for (long r = 0; r < rows; r++) {
        long row = a->order ? a->order[first + r] : first + r;
        from[r] = (const char *)a->x + row * a->stride * SIZE(a->type);
    }
    if (a->type == BF16) NAME(gather)(BF16, from, rows, a->inputs, packed + first * a->inputs);
    else NAME(gather)(FP32, from, rows, a->inputs, packed + first * a->inputs);
}

/* Panels that are computed together, because they stay in the second-level cache while the blocks of rows pass. */
INLINE long NAME(group)(const struct linear *a) {
    long panels = a->outputs / PANEL, bytes = PANEL * a->inputs * SIZE(a->weight_type);
    long group = a->rows <= ROWS ? (panels + 63) / 64 : CACHE / bytes;
    if (group > panels / 8) group = panels / 8;
    return group < 1 ? 1 : group;
}

/* The pieces of a product that threads take: groups of panels, and what is left of the columns. */
INLINE long NAME(pieces)(const struct linear *a) {
    long group = NAME(group)(a);
    return (a->outputs / PANEL + group - 1) / group + (a->outputs % PANEL != 0);
}

static void NAME(piece)(const struct linear *a, long number, const float *packed) {
    long panels = a->outputs / PANEL, group = NAME(group)(a), start = number * group, block = NAME(block)(a->rows);
    if (start >= panels) NAME(rest)(a, packed, block);
    for (long first = 0; first < a->rows; first += block) {
        long rows = a->rows - first < block ? a->rows - first : block;
        long ahead = first == 0 ? AHEAD : 0; /* later blocks find the panels in the cache */
        for (long panel = start; panel < start + group && panel < panels; panel++)
            NAME(panel)(rows, a, packed + first * a->inputs, panel, first, ahead);
    }
}

/* y = x W^T + b. */
static void NAME(linear)(const struct linear *a, float *packed) {
    long block = NAME(block)(a->rows), blocks = (a->rows + block - 1) / block, pieces = NAME(pieces)(a);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long number = 0; number < blocks; number++) NAME(pack_block)(a, number, packed);
#pragma omp for schedule(dynamic) nowait
        for (long number = 0; number < pieces; number++) NAME(piece)(a, number, packed);
    }
}
