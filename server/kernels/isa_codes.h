// Products with coded weights: strips of a panel are widened for the tiles of isa_matmul.h, which
// many rows share; few rows multiply codes as they are and scale the sums of a group.

constexpr int FEW_MAX = KERNELS_LEVEL >= 2 ? 4 : KERNELS_LEVEL == 1 ? 2 : 0;
// What float8 e4m3 is multiplied with after its bits were read as those of half precision.
constexpr float E4M3_SCALE = 256.0f;

#if KERNELS_LEVEL >= 2

KERNELS_INLINE I i_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
KERNELS_INLINE I i_low(I x) { return _mm512_and_si512(x, _mm512_set1_epi32(15)); }
KERNELS_INLINE I i_high(I x) { return _mm512_srli_epi32(x, 4); }
KERNELS_INLINE F f_of(I x) { return _mm512_cvtepi32_ps(x); }
struct Values {
  F all;
};
KERNELS_INLINE Values values_of(const float* p) { return {_mm512_loadu_ps(p)}; }
KERNELS_INLINE F f_value(const Values& values, I code) {
  return _mm512_permutexvar_ps(code, values.all);
}
KERNELS_INLINE F f_halves(__m256i x) { return _mm512_cvtph_ps(x); }
KERNELS_INLINE F f_e4m3(const uint8_t* p) {
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7);
  return f_mul(f_halves(_mm256_or_si256(sign, rest)), f_set(E4M3_SCALE));
}
KERNELS_INLINE F f_e5m2(const uint8_t* p) {
  return f_halves(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 8));
}

#elif KERNELS_LEVEL == 1

KERNELS_INLINE I i_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
KERNELS_INLINE I i_low(I x) { return _mm256_and_si256(x, _mm256_set1_epi32(15)); }
KERNELS_INLINE I i_high(I x) { return _mm256_srli_epi32(x, 4); }
KERNELS_INLINE F f_of(I x) { return _mm256_cvtepi32_ps(x); }
struct Values {
  F low, high;
};
KERNELS_INLINE Values values_of(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
KERNELS_INLINE F f_value(const Values& values, I code) {
  const F low = _mm256_permutevar8x32_ps(values.low, code);
  const F high = _mm256_permutevar8x32_ps(values.high, code);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
}
KERNELS_INLINE F f_e4m3(const uint8_t* p) {
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x80)), 8);
  const __m128i rest = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x7f)), 7);
  return f_mul(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), f_set(E4M3_SCALE));
}
KERNELS_INLINE F f_e5m2(const uint8_t* p) {
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p));
  return _mm256_cvtph_ps(_mm_slli_epi16(x, 8));
}

#else

KERNELS_INLINE I i_bytes(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
KERNELS_INLINE I i_low(I x) { return x & 15; }
KERNELS_INLINE I i_high(I x) { return x >> 4; }
KERNELS_INLINE F f_of(I x) { return __builtin_convertvector(x, F); }
struct Values {
  const float* all;
};
KERNELS_INLINE Values values_of(const float* p) { return {p}; }
KERNELS_INLINE F f_value(const Values& values, I code) {
  return F{values.all[code[0]], values.all[code[1]], values.all[code[2]], values.all[code[3]]};
}
// A number of few bits of exponent and mantissa from the same bits of float32, whose exponent counts
// from elsewhere.
KERNELS_INLINE F f_small(const uint8_t* p, int mantissa, float scale) {
  const I x = i_bytes(p);
  const F size = (F)((x & 0x7f) << (23 - mantissa));
  return (F)((I)(size * scale) | (x & 0x80) << 24);
}
KERNELS_INLINE F f_e4m3(const uint8_t* p) { return f_small(p, 3, 0x1p120f); }
KERNELS_INLINE F f_e5m2(const uint8_t* p) { return f_small(p, 2, 0x1p112f); }

#endif

enum CodeKind { NUMBERS4, VALUES4, NUMBERS8, FLOATS_E4M3, FLOATS_E5M2 };

// The values of vector v of a panel's row of codes.
template <CodeKind KIND>
KERNELS_INLINE F decoded(const uint8_t* row, int v, const Values& values) {
  if constexpr (KIND == NUMBERS8) return f_of(i_bytes(row + v * W));
  if constexpr (KIND == FLOATS_E4M3) return f_e4m3(row + v * W);
  if constexpr (KIND == FLOATS_E5M2) return f_e5m2(row + v * W);
  const I bytes = i_bytes(row + v * W % (PANEL / 2));
  const I code = v * W < PANEL / 2 ? i_low(bytes) : i_high(bytes);
  return KIND == VALUES4 ? f_value(values, code) : f_of(code);
}

template <CodeKind KIND>
constexpr long ROW_BYTES_OF = KIND == NUMBERS4 || KIND == VALUES4 ? PANEL / 2 : PANEL;

// Calls body(integral constant of the kind).
template <class Body>
KERNELS_INLINE void with_kind(const Codes& codes, Body body) {
  if (codes.type == CODE8) return body(Index<NUMBERS8>{});
  if (codes.type == E4M3) return body(Index<FLOATS_E4M3>{});
  if (codes.type == E5M2) return body(Index<FLOATS_E5M2>{});
  if (codes.values == nullptr) return body(Index<NUMBERS4>{});
  body(Index<VALUES4>{});
}

#if KERNELS_LEVEL >= 3
// Pairs of bf16 as a panel's row has them: `even` below.
KERNELS_INLINE void store_pair(char* to, F even, F odd) {
  const I low = _mm512_cvtepu16_epi32(f_bf16(even));
  const I high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(f_bf16(odd)), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(low, high));
}
#endif

template <CodeKind KIND>
KERNELS_INLINE void widen_as(const Codes& c, long first, long last, DType to, void* out) {
  constexpr long STEP = ROW_BYTES_OF<KIND>;
  const Values values = values_of(c.values != nullptr ? c.values : c.scales);
  for (long begin = first; begin < last;) {
    const long g = begin / c.group;
    const long end = (g + 1) * c.group < last ? (g + 1) * c.group : last;
    for (int v = 0; v < VECTORS; v++) {
      const F scale = f_load(c.scales + g * PANEL + v * W);
      const F zero = f_load(c.zeros + g * PANEL + v * W);
      const auto weight = [&](long k) __attribute__((always_inline)) {
        return f_mul(f_sub(decoded<KIND>(c.codes + k * STEP, v, values), zero), scale);
      };
      if (to == F32) {
        float* at = static_cast<float*>(out) + (begin - first) * PANEL + v * W;
        for (long k = begin; k < end; k++, at += PANEL) f_store(at, weight(k));
      } else {
#if KERNELS_LEVEL >= 3
        // A group of an odd number of inputs is the only one: pairs never lie in two.
        char* at = static_cast<char*>(out) + (begin - first) / 2 * 4 * PANEL + v * W * 4;
        for (long k = begin; k < end; k += 2, at += 4 * PANEL)
          store_pair(at, weight(k), k + 1 < end ? weight(k + 1) : f_zero());
#endif
      }
    }
    begin = end;
  }
}

void widen(const Codes& codes, long first, long last, DType to, void* out) {
  with_kind(codes, [&](auto kind) __attribute__((always_inline)) {
    widen_as<CodeKind(kind.value)>(codes, first, last, to, out);
  });
}

template <CodeKind KIND, class X, int M>
KERNELS_INLINE void few_rows(const Codes& c, const X* x, long ldx, float* out) {
  constexpr long STEP = ROW_BYTES_OF<KIND>;
  const Values values = values_of(c.values != nullptr ? c.values : c.scales);
  F total[M][VECTORS];
  for (int i = 0; i < M; i++)
    for (int v = 0; v < VECTORS; v++) total[i][v] = f_zero();
  for (long begin = 0; begin < c.k; begin += c.group) {
    const long end = begin + c.group < c.k ? begin + c.group : c.k, g = begin / c.group;
    F sum[M][VECTORS];
    F inputs[M];
    for (int i = 0; i < M; i++) {
      inputs[i] = f_zero();
      for (int v = 0; v < VECTORS; v++) sum[i][v] = f_zero();
      f_each(end - begin, [&](long k, long n) __attribute__((always_inline)) {
        inputs[i] = f_add(inputs[i], f_get(x + i * ldx + begin + k, n));
      });
    }
    const uint8_t* row = c.codes + begin * STEP;
    for (long k = begin; k < end; k++, row += STEP) {
      F xs[M];
      for (int i = 0; i < M; i++) xs[i] = f_set(one_f32(x[i * ldx + k]));
      for (int v = 0; v < VECTORS; v++) {
        const F w = decoded<KIND>(row, v, values);
        for (int i = 0; i < M; i++) sum[i][v] = f_fma(xs[i], w, sum[i][v]);
      }
    }
    for (int i = 0; i < M; i++) {
      const F all = f_set(f_sum(inputs[i]));
      for (int v = 0; v < VECTORS; v++) {
        const F zero = f_load(c.zeros + g * PANEL + v * W);
        const F whole = f_sub(sum[i][v], f_mul(zero, all));
        total[i][v] = f_fma(whole, f_load(c.scales + g * PANEL + v * W), total[i][v]);
      }
    }
  }
  for (int i = 0; i < M; i++)
    for (int v = 0; v < VECTORS; v++) f_store(out + i * PANEL + v * W, total[i][v]);
}

template <CodeKind KIND, class X, int M = FEW_MAX>
KERNELS_INLINE void few_of(const Codes& c, const X* x, long ldx, long rows, float* out) {
  if constexpr (M > 1) {
    if (rows != M) return few_of<KIND, X, M - 1>(c, x, ldx, rows, out);
  }
  if constexpr (M > 0) few_rows<KIND, X, M>(c, x, ldx, out);
}

void few(const Codes& codes, const void* x, DType x_type, long ldx, long rows, float* out) {
  with_kind(codes, [&](auto kind) __attribute__((always_inline)) {
    constexpr CodeKind KIND = CodeKind(kind.value);
    if (x_type == BF16)
      few_of<KIND>(codes, static_cast<const uint16_t*>(x), ldx, rows, out);
    else
      few_of<KIND>(codes, static_cast<const float*>(x), ldx, rows, out);
  });
}
