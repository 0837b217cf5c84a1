/* The loops of k-means for float and for double, for one processor. */

#define REAL float
#define INDEX int32_t
#define TYPED(f) NAME(f##_float)
#include "kmeans_loops.h"
#undef REAL
#undef INDEX
#undef TYPED

#define REAL double
#define INDEX int64_t
#define TYPED(f) NAME(f##_double)
#include "kmeans_loops.h"
#undef REAL
#undef INDEX
#undef TYPED
