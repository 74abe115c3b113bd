// Which instruction set is used: the best that this CPU has, or a lower one for tests.

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "isa.h"

namespace headrace {
namespace {

const Isa* of_level(int level) {
  switch (level) {
    case 3:
      return isa_avx512bf16();
    case 2:
      return isa_avx512();
    case 1:
      return isa_avx2();
    default:
      return isa_baseline();
  }
}

#if defined(__x86_64__)
// Not every compiler knows the flag by name. A CPU with AVX2 has it; a virtual one might not.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;
}
#endif

bool cpu_has(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (level == 3) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (level == 2) return avx512;
  if (level == 1) return avx2;
#endif
  return level == 0;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

int best_isa() {
  int level = 3;
  while (level > 0 && (!cpu_has(level) || of_level(level) == nullptr)) level--;
  return level;
}

int set_isa(int level) {
  const int best = best_isa();
  level = level < 0 || level > best ? best : level;
  chosen.store(of_level(level));
  return level;
}

const Isa& isa() {
  const Isa* now = chosen.load(std::memory_order_relaxed);
  if (now == nullptr) {
    set_isa(-1);
    now = chosen.load();
  }
  return *now;
}

}  // namespace headrace
