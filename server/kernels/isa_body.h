// The innermost loops, for the instruction set that the including file has chosen.

#pragma once

#include "simd.h"

namespace headrace {
namespace {

#include "isa_matmul.h"
#include "isa_codes.h"
#include "isa_rows.h"
#include "isa_attention.h"

const Isa TABLE = {
    KERNELS_NAME,
    KERNELS_LEVEL,
    ROWS_MAX,
    KERNELS_LEVEL >= 3,
    KERNELS_LEVEL >= 3 ? tile_bf_bf : nullptr,
    tile_f_bf,
    tile_f_f,
    widen,
    FEW_MAX,
    few,
    sink,
    convert,
    rms_norm,
    silu_mul,
    rope_and_kv_write,
    decode,
    merge,
    prefill,
};

}  // namespace
}  // namespace headrace
