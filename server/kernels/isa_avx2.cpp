// The kernels for CPUs with AVX2, FMA and F16C.

#include "isa.h"
#include "pool.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define KERNELS_LEVEL 1
#define KERNELS_NAME "avx2"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), \
                             apply_to = function)
#else
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "isa_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace headrace {
const Isa* isa_avx2() { return &TABLE; }
}  // namespace headrace

#else

namespace headrace {
const Isa* isa_avx2() { return nullptr; }
}  // namespace headrace

#endif
