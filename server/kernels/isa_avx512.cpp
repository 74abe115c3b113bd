// The kernels for CPUs with AVX-512 (F, BW, DQ, VL) and without BF16 dot products.

#include "isa.h"
#include "pool.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define KERNELS_LEVEL 2
#define KERNELS_NAME "avx512"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "isa_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace headrace {
const Isa* isa_avx512() { return &TABLE; }
}  // namespace headrace

#else

namespace headrace {
const Isa* isa_avx512() { return nullptr; }
}  // namespace headrace

#endif
