/* One E-step of a Gaussian mixture over rows of data, and the moments that its M-step needs.
 *
 * For each tile of rows, while it is in the first-level cache:
 *
 *     score_kt = constant_k - |A_k (y_t - shift) - b_k|^2 / 2      A_k = L_k^-1, b_k = A_k mu_k
 *     r_kt     = exp(score_kt - ln sum_k exp score_kt), or 1 for the first largest if hard
 *     total_k += r_kt (y_i y_j for i <= j, y, 1)                   y less the shift
 *
 * in double precision, whatever the data are stored in.
 */

#define LOOPS "mixture_loops.h"
#include "for_each_processor.h"

#ifdef CHOSEN

/* Arguments: y (rows, dim), double or float; shift (dim); factor (count, dim, dim), or
 * (count, dim) where it is diagonal; offset (count, dim); constant (count). Written: total
 * (count, width), width = dim (dim + 1) / 2 + dim + 1, or 2 dim + 1 where it is diagonal; and the
 * sum of the log-evidence, or of the largest scores if hard. Nonzero where memory is lacking. */
int lvppl_mixture(const void *y, int is_double, int64_t rows, int64_t dim, int64_t count,
                  const double *shift, const double *factor, const double *offset,
                  const double *constant, int diagonal, int hard, double *total,
                  double *objective) {
    return CHOSEN(mixture)(y, is_double, rows, dim, count, shift, factor, offset, constant,
                           diagonal, hard, total, objective);
}

#endif

/* 64 or 32; 0 where these loops were not compiled, or the processor lacks what they need. */
int lvppl_vector_bytes(void) {
#ifdef CHOSEN
    return HAS_64 ? 64 : HAS_32 ? 32 : 0;
#else
    return 0;
#endif
}
