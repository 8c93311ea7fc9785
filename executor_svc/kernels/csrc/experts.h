/* Feed-forward parts that each token chooses from. */

/* Which product has piece `*number` of all; *number becomes its own. ends[n] counts the pieces up to the end of product n. */
INLINE long NAME(owner)(const long *ends, long *number) {
    long n = 0;
    while (*number >= ends[n]) n++;
    if (n) *number -= ends[n - 1];
    return n;
}

/* Pairs of a token and one of its experts are sorted by expert, so that those of one are the rows of two products. All experts'
 * products are computed together, one kind after the other. A token's parts are summed in the order of its choices. */
static void NAME(experts)(const struct experts *a, const struct experts_memory *m) {
    long pairs = a->tokens * a->top_k, used = 0, blocks = 0, ups = 0, downs = 0, size = SIZE(a->type);
    memset(m->starts, 0, (a->count + 1) * sizeof(long));
    for (long pair = 0; pair < pairs; pair++) m->starts[a->chosen[pair] + 1]++;
    for (long e = 0; e < a->count; e++) m->starts[e + 1] += m->starts[e];
    for (long pair = 0; pair < pairs; pair++) { /* moves each start to the next one's place */
        long place = m->starts[a->chosen[pair]]++;
        m->places[pair] = place, m->order[place] = pair / a->top_k;
    }
    for (long e = 0, first = 0; e < a->count; first = m->starts[e++]) {
        long rows = m->starts[e] - first, weight = a->hidden * a->size * SIZE(a->weight_type);
        if (!rows) continue;
        char *made = (char *)m->made + first * 2 * a->size * size;
        m->first[used] = first;
        m->up[used] = (struct linear){a->type, a->weight_type, rows, a->hidden, 2 * a->size, a->stride, a->x,
                                      (const char *)a->gate_up + e * 2 * weight, 0, made, m->order + first};
        m->down[used] = (struct linear){a->type, a->weight_type, rows, a->size, a->hidden, 2 * a->size, made,
                                        (const char *)a->down + e * weight, 0, (char *)m->out + first * a->hidden * size, 0};
        long block = NAME(block)(rows);
        m->blocks[used] = blocks += (rows + block - 1) / block;
        m->ups[used] = ups += NAME(pieces)(&m->up[used]);
        m->downs[used] = downs += NAME(pieces)(&m->down[used]);
        used++;
    }
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long i = 0; i < blocks; i++) {
            long number = i, n = NAME(owner)(m->blocks, &number);
            NAME(pack_block)(&m->up[n], number, m->packed + m->first[n] * a->hidden);
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < ups; i++) {
            long number = i, n = NAME(owner)(m->ups, &number);
            NAME(piece)(&m->up[n], number, m->packed + m->first[n] * a->hidden);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < blocks; i++) {
            long number = i, n = NAME(owner)(m->blocks, &number), rows = m->down[n].rows, block = NAME(block)(rows);
            for (long row = number * block; row < (number + 1) * block && row < rows; row++) {
                char *gate = (char *)m->down[n].x + row * 2 * a->size * size;
                NAME(activate)(a->type, SILU, 1, gate, a->size, gate);
            }
            NAME(pack_block)(&m->down[n], number, m->packed + m->first[n] * a->size);
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < downs; i++) {
            long number = i, n = NAME(owner)(m->downs, &number);
            NAME(piece)(&m->down[n], number, m->packed + m->first[n] * a->size);
        }
#pragma omp for schedule(static) nowait
        for (long token = 0; token < a->tokens; token++)
            VECTORS(a->hidden, {
                vf total = SPLAT(0);
                for (long pair = token * a->top_k; pair < (token + 1) * a->top_k; pair++)
                    total += NAME(load_some)(a->type, m->out, m->places[pair] * a->hidden + i, n) * through(a->type, a->weights[pair]);
                NAME(store_some)(a->type, a->y, token * a->hidden + i, total, n);
            });
    }
}
