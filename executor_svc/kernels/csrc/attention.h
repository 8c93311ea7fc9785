/* Attention over a cache of blocks. */

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

/* A row's scores of keys, the first of which lies `from` positions behind the query, after soft cap and alibi. */
static void NAME(bend)(float *scores, long keys, float cap, float slope, long from) {
    for (long key = 0; key < keys; key += LANES) {
        vf score = LOAD(scores + key);
        if (cap) score = NAME(tanh)(score / cap) * cap;
        STORE(scores + key, score + (NAME(ramp)() + (float)(from + key)) * slope);
    }
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
            float slope = a->alibi ? a->alibi[head * heads + row % heads] : 0;
            if (a->cap || slope) NAME(bend)(line, padded, a->cap, slope, from - at);
            for (long key = at - from + 1 < 0 ? 0 : at - from + 1; key < padded; key++) line[key] = -INFINITY;
            if (a->window)
                for (long key = 0; key < padded && from + key <= at - a->window; key++) line[key] = -INFINITY;
            vf tops = SPLAT(highest[row]);
            for (long key = 0; key < padded; key += LANES) {
                vf score = LOAD(line + key);
                tops = NAME(choose)((vu)(score > tops), score, tops);
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
            float shrink = highest[row] == most ? 1 : highest[row] < most - 80 ? 0 : expf(highest[row] - most);
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
