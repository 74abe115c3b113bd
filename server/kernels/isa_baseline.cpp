// The kernels for whatever the compiler targets.

#include "isa.h"
#include "pool.h"

#define KERNELS_LEVEL 0
#define KERNELS_NAME "baseline"

#include "isa_body.h"

namespace headrace {
const Isa* isa_baseline() { return &TABLE; }
}  // namespace headrace
