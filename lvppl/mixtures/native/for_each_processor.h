/* Includes LOOPS once for each generation of processor, with vectors as wide as its registers.
 *
 * LOOPS sees VECTOR_BYTES and NAME(f), and defines static functions NAME(f); CHOSEN(f) is the one
 * for the processor at hand. On other processors, and with other compilers, there is nothing: there
 * torch is as fast.
 */

#ifndef LVPPL_FOR_EACH_PROCESSOR_H
#define LVPPL_FOR_EACH_PROCESSOR_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("arch=haswell")
#define NAME(f) f##_32
#define VECTOR_BYTES 32
#include LOOPS
#undef NAME
#undef VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=skylake-avx512")
#define NAME(f) f##_64
#define VECTOR_BYTES 64
#include LOOPS
#undef NAME
#undef VECTOR_BYTES
#pragma GCC pop_options

#define HAS(feature) __builtin_cpu_supports(feature)
#define HAS_64 (HAS("avx512f") && HAS("avx512dq") && HAS("avx512vl") && HAS("avx512bw"))
#define HAS_32 (HAS("avx2") && HAS("fma"))
#define CHOSEN(f) (HAS_64 ? f##_64 : f##_32)

#endif
#endif
