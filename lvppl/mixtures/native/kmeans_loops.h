/* Included once for float and once for double: REAL, INDEX of the same width, TYPED(f). */

typedef REAL TYPED(vec) __attribute__((vector_size(VECTOR_BYTES)));
typedef INDEX TYPED(mask) __attribute__((vector_size(VECTOR_BYTES)));
#define vec TYPED(vec)
#define mask TYPED(mask)

#define LANES ((int)(VECTOR_BYTES / sizeof(REAL)))
#define VECS (VECTOR_BYTES == 64 ? 8 : 4) /* accumulators that fit the registers */
#define TILE (VECS * LANES)

/* Columns of the rows less the shift; what a tile lacks is zero. */
INLINE void TYPED(load)(const REAL *y, int64_t rows, int64_t dim, const REAL *shift, REAL *tile) {
    if (rows < TILE) memset(tile, 0, sizeof(REAL) * dim * TILE);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t d = 0; d < dim; d++) tile[d * TILE + t] = y[t * dim + d] - shift[d];
}

/* The first of the largest bias + slope y, for each datum of a tile. */
INLINE void TYPED(nearest)(const vec *tile, int64_t dim, int64_t count, const REAL *slope,
                           const REAL *bias, vec *largest, mask *label) {
    for (int64_t k = 0; k < count; k++) {
        vec score[VECS];
        for (int v = 0; v < VECS; v++) score[v] = (vec){0} + bias[k];
        for (int64_t d = 0; d < dim; d++)
            for (int v = 0; v < VECS; v++) score[v] += slope[k * dim + d] * tile[d * VECS + v];
        for (int v = 0; v < VECS; v++) {
            mask more = score[v] > largest[v];
            largest[v] = (vec)((more & (mask)score[v]) | (~more & (mask)largest[v]));
            label[v] = (more & (INDEX)k) | (~more & label[v]);
        }
    }
}

INLINE void TYPED(add)(const REAL *restrict row, const REAL *restrict shift, int64_t dim,
                       double *restrict sum) {
#pragma omp simd
    for (int64_t d = 0; d < dim; d++) sum[d] += row[d] - shift[d];
}

static int TYPED(kmeans)(const REAL *y, int64_t rows, int64_t dim, int64_t count,
                         const REAL *shift, const REAL *slope, const REAL *bias, double *sums,
                         double *counts) {
    void *memory = NULL;
    if (posix_memalign(&memory, VECTOR_BYTES, sizeof(vec) * VECS * dim)) return 1;
    vec *tile = memory;
    memset(sums, 0, sizeof(double) * count * dim);
    memset(counts, 0, sizeof(double) * count);
    for (int64_t start = 0; start < rows; start += TILE, y += TILE * dim) {
        int64_t here = rows - start < TILE ? rows - start : TILE;
        vec largest[VECS];
        mask label[VECS];
        for (int v = 0; v < VECS; v++) {
            largest[v] = (vec){0} - INFINITY;
            label[v] = (mask){0};
        }
        TYPED(load)(y, here, dim, shift, (REAL *)tile);
        TYPED(nearest)(tile, dim, count, slope, bias, largest, label);
        for (int64_t t = 0; t < here; t++) {
            int64_t k = ((INDEX *)label)[t];
            counts[k] += 1.0;
            TYPED(add)(y + t * dim, shift, dim, sums + k * dim);
        }
    }
    free(memory);
    return 0;
}

#undef vec
#undef mask
#undef LANES
#undef VECS
#undef TILE
