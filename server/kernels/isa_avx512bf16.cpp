// The kernels for CPUs with AVX-512 and its BF16 dot products.

#include "isa.h"
#include "pool.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define KERNELS_LEVEL 3
#define KERNELS_NAME "avx512bf16"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#include "isa_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace headrace {
const Isa* isa_avx512bf16() { return &TABLE; }
}  // namespace headrace

#else

namespace headrace {
const Isa* isa_avx512bf16() { return nullptr; }
}  // namespace headrace

#endif
