/* One iteration of Lloyd's algorithm over rows of data: the nearest centre, and sums by centre.
 *
 *     label_t  = first argmax over k of bias_k + slope_k (y_t - shift)
 *     counts_k = number of t with label_t = k,   sums_k = sum of their (y_t - shift)
 *
 * Scores are in the precision of the data, sums in double.
 */

#define LOOPS "kmeans_types.h"
#include "for_each_processor.h"

#ifdef CHOSEN

/* Arguments: y (rows, dim); shift (dim); slope (count, dim); bias (count). Written: sums
 * (count, dim), counts (count). Nonzero where memory is lacking. */
int lvppl_kmeans_float(const float *y, int64_t rows, int64_t dim, int64_t count,
                       const float *shift, const float *slope, const float *bias, double *sums,
                       double *counts) {
    return CHOSEN(kmeans_float)(y, rows, dim, count, shift, slope, bias, sums, counts);
}

int lvppl_kmeans_double(const double *y, int64_t rows, int64_t dim, int64_t count,
                        const double *shift, const double *slope, const double *bias,
                        double *sums, double *counts) {
    return CHOSEN(kmeans_double)(y, rows, dim, count, shift, slope, bias, sums, counts);
}

#endif
