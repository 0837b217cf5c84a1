/* One tile after another: scores, responsibilities, moments. See mixture.c for the mathematics. */

typedef double NAME(vec) __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t NAME(mask) __attribute__((vector_size(VECTOR_BYTES)));
#define vec NAME(vec)
#define mask NAME(mask)

#define LANES (VECTOR_BYTES / 8)
#define VECS (VECTOR_BYTES == 64 ? 8 : 4) /* accumulators that fit the registers */
#define TILE (VECS * LANES)

INLINE vec NAME(chosen)(mask where, vec yes, vec no) {
    return (vec)((where & (mask)yes) | (~where & (mask)no));
}

/* exp(x) for x <= 0 to an ulp or two: x = n ln 2 + r, and Taylor's series of exp r. Zero below
 * exp(-708), near the smallest normal number. */
INLINE vec NAME(exponential)(vec x) {
    const vec smallest = (vec){0} - 708.0, magic = (vec){0} + 0x1.8p52;
    mask vanishes = x < smallest;
    x = NAME(chosen)(vanishes, smallest, x);
    vec shifted = x * 0x1.71547652b82fep0 + magic; /* n in the low bits */
    vec n = shifted - magic;
    vec r = x - n * 0x1.62e42fefa38p-1;
    r = r - n * 0x1.ef35793c7673p-45;
    static const double series[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                    1.0 / 362880.0,    1.0 / 40320.0,    1.0 / 5040.0,
                                    1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,
                                    1.0 / 6.0,         0.5,              1.0,
                                    1.0};
    vec p = (vec){0} + 1.0 / 6227020800.0;
    for (int i = 0; i < 13; i++) p = p * r + series[i];
    mask power = ((mask)shifted + 1023) << 52;
    return (vec)((mask)(p * (vec)power) & ~vanishes);
}

INLINE double NAME(lanes_sum)(vec x) {
    double sum = 0.0;
    for (int l = 0; l < LANES; l++) sum += x[l];
    return sum;
}

/* Columns of the rows less the shift; what a tile lacks is zero. */
INLINE void NAME(load)(const void *y, int is_double, int64_t rows, int64_t dim,
                       const double *shift, double *tile) {
    if (rows < TILE) memset(tile, 0, sizeof(double) * dim * TILE);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t d = 0; d < dim; d++)
            tile[d * TILE + t] = (is_double ? ((const double *)y)[t * dim + d]
                                            : ((const float *)y)[t * dim + d]) -
                                 shift[d];
}

/* constant - |A y - b|^2 / 2; A is lower triangular, or its diagonal. */
INLINE void NAME(score)(const vec *tile, int64_t dim, const double *factor, const double *offset,
                        double constant, int diagonal, vec *out) {
    vec square[VECS] = {{0}};
    for (int64_t i = 0; i < dim; i++) {
        const double *row = diagonal ? factor : factor + i * dim;
        vec z[VECS];
        for (int v = 0; v < VECS; v++) z[v] = (vec){0} - offset[i];
        for (int64_t j = diagonal ? i : 0; j <= i; j++)
            for (int v = 0; v < VECS; v++) z[v] += row[j] * tile[j * VECS + v];
        for (int v = 0; v < VECS; v++) square[v] += z[v] * z[v];
    }
    for (int v = 0; v < VECS; v++) out[v] = constant - 0.5 * square[v];
}

/* Scores become responsibilities, zero beyond the rows; returns the sum of the log-evidence. */
INLINE double NAME(share)(vec *scores, int64_t count, int64_t rows) {
    double evidence = 0.0;
    const vec one = (vec){0} + 1.0;
    vec product = one;
    for (int v = 0; v < VECS; v++) {
        vec largest = scores[v], total = {0};
        for (int64_t k = 1; k < count; k++) {
            vec s = scores[k * VECS + v];
            largest = NAME(chosen)(s > largest, s, largest);
        }
        for (int64_t k = 0; k < count; k++)
            total += scores[k * VECS + v] = NAME(exponential)(scores[k * VECS + v] - largest);
        mask used = {0};
        for (int l = 0; l < LANES; l++) used[l] = v * LANES + l < rows ? -1 : 0;
        vec each = (vec)((mask)(1.0 / total) & used);
        for (int64_t k = 0; k < count; k++) scores[k * VECS + v] *= each;
        evidence += NAME(lanes_sum)((vec)((mask)largest & used));
        product *= NAME(chosen)(used, total, one);
    }
    /* totals are in [1, count]: few enough that their product is finite save at absurd counts */
    for (int l = 0; l < LANES; l++) evidence += log(product[l]);
    return evidence;
}

/* Scores become one for the first largest and zero; returns the sum of the largest. */
INLINE double NAME(choose)(vec *scores, int64_t count, int64_t rows) {
    double won = 0.0;
    for (int v = 0; v < VECS; v++) {
        vec largest = scores[v];
        mask label = {0};
        for (int64_t k = 1; k < count; k++) {
            vec s = scores[k * VECS + v];
            mask more = (s > largest) | (s != s); /* a NaN wins, and stays */
            largest = NAME(chosen)(more, s, largest);
            label = (more & k) | (~more & label);
        }
        for (int l = 0; l < LANES; l++) {
            if (v * LANES + l < rows) won += largest[l];
            else label[l] = -1;
        }
        for (int64_t k = 0; k < count; k++)
            scores[k * VECS + v] = (vec)((label == k) & (mask)((vec){0} + 1.0));
    }
    return won;
}

INLINE int NAME(is_zero)(const vec *r) {
    mask any = {0};
    int64_t bits = 0;
    for (int v = 0; v < VECS; v++) any |= (mask)r[v];
    for (int l = 0; l < LANES; l++) bits |= any[l];
    return bits == 0;
}

/* total += r (second order, y, 1), in as many partial sums as a vector has lanes. */
INLINE void NAME(add_moments)(const vec *tile, int64_t dim, const vec *r, int diagonal,
                              vec *total) {
    vec *first = total + (diagonal ? dim : dim * (dim + 1) / 2);
    for (int64_t i = 0; i < dim; i++) {
        vec ry[VECS], sum = first[i];
        for (int v = 0; v < VECS; v++) sum += ry[v] = r[v] * tile[i * VECS + v];
        first[i] = sum;
        for (int64_t j = i; j < (diagonal ? i + 1 : dim); j++) {
            vec product = *total;
            for (int v = 0; v < VECS; v++) product += ry[v] * tile[j * VECS + v];
            *total++ = product;
        }
    }
    for (int v = 0; v < VECS; v++) first[dim] += r[v];
}

INLINE int NAME(sweep)(const void *y, int is_double, int64_t rows, int64_t dim, int64_t count,
                       const double *shift, const double *factor, const double *offset,
                       const double *constant, int diagonal, int hard, double *total,
                       double *objective) {
    int64_t width = (diagonal ? dim : dim * (dim + 1) / 2) + dim + 1;
    int64_t size = diagonal ? dim : dim * dim, vectors = VECS * (dim + count) + count * width;
    void *memory = NULL;
    if (posix_memalign(&memory, VECTOR_BYTES, sizeof(vec) * vectors)) return 1;
    vec *tile = memset(memory, 0, sizeof(vec) * vectors);
    vec *scores = tile + VECS * dim, *sums = scores + VECS * count;
    double evidence = 0.0;
    for (int64_t start = 0; start < rows; start += TILE) {
        int64_t here = rows - start < TILE ? rows - start : TILE;
        const char *from = (const char *)y + start * dim * (is_double ? 8 : 4);
        NAME(load)(from, is_double, here, dim, shift, (double *)tile);
        for (int64_t k = 0; k < count; k++)
            NAME(score)(tile, dim, factor + k * size, offset + k * dim, constant[k], diagonal,
                        scores + k * VECS);
        evidence += hard ? NAME(choose)(scores, count, here) : NAME(share)(scores, count, here);
        for (int64_t k = 0; k < count; k++)
            if (!NAME(is_zero)(scores + k * VECS))
                NAME(add_moments)(tile, dim, scores + k * VECS, diagonal, sums + k * width);
    }
    for (int64_t i = 0; i < count * width; i++) total[i] = NAME(lanes_sum)(sums[i]);
    *objective = evidence;
    free(memory);
    return 0;
}

/* Specialised: the tests on `diagonal` leave the loops. */
static int NAME(mixture)(const void *y, int is_double, int64_t rows, int64_t dim, int64_t count,
                         const double *shift, const double *factor, const double *offset,
                         const double *constant, int diagonal, int hard, double *total,
                         double *objective) {
    if (diagonal)
        return NAME(sweep)(y, is_double, rows, dim, count, shift, factor, offset, constant, 1,
                           hard, total, objective);
    return NAME(sweep)(y, is_double, rows, dim, count, shift, factor, offset, constant, 0, hard,
                       total, objective);
}

#undef vec
#undef mask
#undef LANES
#undef VECS
#undef TILE
