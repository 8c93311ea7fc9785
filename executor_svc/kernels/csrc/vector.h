/* Vectors: memory to float32 and back, and the functions of them that operators need. */

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
/* The statement for each vector of a row: i is its first element, n what is left of the row if that is less than a vector. */
#define VECTORS(size, ...)                      \
    do {                                        \
        long i = 0;                             \
        for (; i + LANES <= (size); i += LANES) { \
            const long n = LANES;               \
            __VA_ARGS__                         \
        }                                       \
        if (i < (size)) {                       \
            const long n = (size) - i;          \
            __VA_ARGS__                         \
        }                                       \
    } while (0)

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

INLINE vf NAME(choose)(vu mask, vf yes, vf no) { return (vf)(((vu)yes & mask) | ((vu)no & ~mask)); }

/* 0, 1, 2 ... */
INLINE vf NAME(ramp)(void) {
    vf v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = lane;
    return v;
}

/* The first `count` lanes, and 0 in the others. */
INLINE vf NAME(keep)(vf v, long count) {
    return count >= LANES ? v : NAME(choose)((vu)(NAME(ramp)() < (float)count), v, SPLAT(0));
}

/* Of a vector in which a row may end, the `count` lanes that are left of it. */
INLINE vf NAME(load_some)(int type, const void *p, long at, long count) {
    if (count >= LANES) return NAME(load)(type, p, at);
    vf v = SPLAT(0);
    for (long lane = 0; lane < count; lane++) v[lane] = scalar(type, p, at + lane);
    return v;
}

INLINE void NAME(store_some)(int type, void *p, long at, vf v, long count) {
    if (count >= LANES) NAME(store)(type, p, at, v);
    else
        for (long lane = 0; lane < count; lane++) put(type, p, at + lane, v[lane]);
}

INLINE float NAME(sum)(vf v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

/* e to the v: 2^n times a polynomial on |r| <= log(2)/2 (coefficients of Cephes' expf); 0 below -87. v must be at most 88. */
INLINE vf NAME(exp)(vf v) {
    vu low = (vu)(v < -87.0f);
    v = NAME(choose)(low, SPLAT(-87.0f), v);
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

/* 1 + e^-v, over which 1 is the sigmoid. */
INLINE vf NAME(below_sigmoid)(vf v) { return 1.0f + NAME(exp)(NAME(choose)((vu)(v < -88.0f), SPLAT(88.0f), -v)); }

/* Near 0 a polynomial (coefficients of Cephes' tanhf), elsewhere by e^-2|v|, which keeps a NaN. */
INLINE vf NAME(tanh)(vf v) {
    vu sign = (vu)v & 0x80000000u;
    vf size = (vf)((vu)v & 0x7fffffffu), square = v * v, e = NAME(exp)(-2.0f * size);
    vf p = SPLAT(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    vf near = p * square * size + size, far = (1.0f - e) / (1.0f + e);
    return (vf)((vu)NAME(choose)((vu)(size < 0.625f), near, far) | sign);
}

/* The normal distribution's Phi(v) = erfc(-v / sqrt(2)) / 2, exact in both tails: erfc(z) = t e^(p(t) - z^2) with t = 1 / (1 + z / 2)
 * (coefficients of Press et al., Numerical Recipes, 1992, erfcc). */
INLINE vf NAME(phi)(vf v) {
    vf z = (vf)((vu)v & 0x7fffffffu) * 0.707106781f, t = 1.0f / (1.0f + 0.5f * z);
    vf p = SPLAT(0.17087277f);
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    vf tail = 0.5f * t * NAME(exp)(p - z * z);
    return NAME(choose)((vu)(v < 0.0f), tail, 1.0f - tail);
}
