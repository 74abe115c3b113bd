// Vectors of float32 for one instruction set, chosen by KERNELS_LEVEL in the including file.
//
// Levels: 0 whatever the compiler targets (SSE2, NEON), 1 AVX2 + FMA, 2 AVX-512 (F, BW, DQ, VL),
// 3 AVX-512 with BF16 dot products. The including file has already set the target for the code
// that follows, and includes no standard header after this: an inline function of the standard
// library compiled for AVX-512 could be the copy that the linker keeps for everybody.
//
// bfloat16 is the upper half of a float32, kept in uint16_t, rounded to nearest even.

#pragma once

#define KERNELS_INLINE static inline __attribute__((always_inline))

namespace {

KERNELS_INLINE float one_f32(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

KERNELS_INLINE float one_f32(float x) { return x; }

KERNELS_INLINE uint16_t one_bf16(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

KERNELS_INLINE void one_put(float* to, float x) { *to = x; }
KERNELS_INLINE void one_put(uint16_t* to, float x) { *to = one_bf16(x); }

#if KERNELS_LEVEL >= 2

constexpr int W = 16;  // lanes
typedef __m512 F;
typedef __m512i I;

KERNELS_INLINE F f_zero() { return _mm512_setzero_ps(); }
KERNELS_INLINE F f_set(float x) { return _mm512_set1_ps(x); }
KERNELS_INLINE F f_load(const float* p) { return _mm512_loadu_ps(p); }
KERNELS_INLINE void f_store(float* p, F x) { _mm512_storeu_ps(p, x); }
KERNELS_INLINE F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
KERNELS_INLINE F f_add(F a, F b) { return _mm512_add_ps(a, b); }
KERNELS_INLINE F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
KERNELS_INLINE F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
KERNELS_INLINE F f_div(F a, F b) { return _mm512_div_ps(a, b); }
KERNELS_INLINE F f_max(F a, F b) { return _mm512_max_ps(a, b); }
KERNELS_INLINE float f_sum(F x) { return _mm512_reduce_add_ps(x); }
KERNELS_INLINE float f_most(F x) { return _mm512_reduce_max_ps(x); }
// 2^n for integral n, and x where it is not below the limit, else 0.
KERNELS_INLINE F f_round(F x) { return _mm512_roundscale_ps(x, 8); }
KERNELS_INLINE F f_pow2(F n) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
KERNELS_INLINE F f_zero_below(F x, F limit, F value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), value);
}
KERNELS_INLINE F f_load(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
KERNELS_INLINE __m256i f_bf16(F x) {
#if KERNELS_LEVEL >= 3
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  I bits = _mm512_castps_si512(x);
  I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  I up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}
KERNELS_INLINE void f_store(uint16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, f_bf16(x)); }
KERNELS_INLINE __mmask16 f_first(long n) { return __mmask16((1u << n) - 1); }
KERNELS_INLINE F f_load_n(const float* p, long n) { return _mm512_maskz_loadu_ps(f_first(n), p); }
KERNELS_INLINE F f_load_n(const uint16_t* p, long n) {
  __m256i half = _mm256_maskz_loadu_epi16(f_first(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
KERNELS_INLINE void f_store_n(float* p, F x, long n) { _mm512_mask_storeu_ps(p, f_first(n), x); }
KERNELS_INLINE void f_store_n(uint16_t* p, F x, long n) {
  _mm256_mask_storeu_epi16(p, f_first(n), f_bf16(x));
}
KERNELS_INLINE I i_load(const void* p) { return _mm512_loadu_si512(p); }
// A lane of packed weights holds two bf16: of an even k below, of the odd k above.
KERNELS_INLINE F f_even(I pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
KERNELS_INLINE F f_odd(I pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}

#elif KERNELS_LEVEL == 1

constexpr int W = 8;
typedef __m256 F;
typedef __m256i I;

KERNELS_INLINE F f_zero() { return _mm256_setzero_ps(); }
KERNELS_INLINE F f_set(float x) { return _mm256_set1_ps(x); }
KERNELS_INLINE F f_load(const float* p) { return _mm256_loadu_ps(p); }
KERNELS_INLINE void f_store(float* p, F x) { _mm256_storeu_ps(p, x); }
KERNELS_INLINE F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
KERNELS_INLINE F f_add(F a, F b) { return _mm256_add_ps(a, b); }
KERNELS_INLINE F f_sub(F a, F b) { return _mm256_sub_ps(a, b); }
KERNELS_INLINE F f_mul(F a, F b) { return _mm256_mul_ps(a, b); }
KERNELS_INLINE F f_div(F a, F b) { return _mm256_div_ps(a, b); }
KERNELS_INLINE F f_max(F a, F b) { return _mm256_max_ps(a, b); }
KERNELS_INLINE float f_sum(F x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
KERNELS_INLINE float f_most(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
KERNELS_INLINE F f_round(F x) { return _mm256_round_ps(x, 8); }
KERNELS_INLINE F f_pow2(F n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
KERNELS_INLINE F f_zero_below(F x, F limit, F value) {
  return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_GE_OQ), value);
}
KERNELS_INLINE F f_load(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
KERNELS_INLINE void f_store(uint16_t* p, F x) {
  I bits = _mm256_castps_si256(x);
  I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  I up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  up = _mm256_blendv_epi8(up, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
  up = _mm256_srli_epi32(up, 16);
  I packed = _mm256_packus_epi32(up, up);
  _mm_storel_epi64((__m128i*)p, _mm256_castsi256_si128(packed));
  _mm_storel_epi64((__m128i*)(p + 4), _mm256_extracti128_si256(packed, 1));
}
KERNELS_INLINE I i_load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
KERNELS_INLINE F f_even(I pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
KERNELS_INLINE F f_odd(I pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}

#else

constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

KERNELS_INLINE F f_zero() { return F{0, 0, 0, 0}; }
KERNELS_INLINE F f_set(float x) { return F{x, x, x, x}; }
KERNELS_INLINE F f_load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
KERNELS_INLINE void f_store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
KERNELS_INLINE F f_fma(F a, F b, F c) { return a * b + c; }
KERNELS_INLINE F f_add(F a, F b) { return a + b; }
KERNELS_INLINE F f_sub(F a, F b) { return a - b; }
KERNELS_INLINE F f_mul(F a, F b) { return a * b; }
KERNELS_INLINE F f_div(F a, F b) { return a / b; }
KERNELS_INLINE F f_max(F a, F b) { return a > b ? a : b; }
KERNELS_INLINE float f_sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
KERNELS_INLINE float f_most(F x) {
  float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
KERNELS_INLINE F f_round(F x) {
  F magic = f_set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, |x| < 2^22
  return (x + magic) - magic;
}
KERNELS_INLINE F f_pow2(F n) { return (F)((__builtin_convertvector(n, I) + 127) << 23); }
KERNELS_INLINE F f_zero_below(F x, F limit, F value) { return (F)((I)value & (I)(x >= limit)); }
KERNELS_INLINE F f_load(const uint16_t* p) {
  return F{one_f32(p[0]), one_f32(p[1]), one_f32(p[2]), one_f32(p[3])};
}
KERNELS_INLINE void f_store(uint16_t* p, F x) {
  for (int i = 0; i < W; i++) p[i] = one_bf16(x[i]);
}
KERNELS_INLINE I i_load(const void* p) {
  I x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
KERNELS_INLINE F f_even(I pairs) { return (F)(pairs << 16); }
KERNELS_INLINE F f_odd(I pairs) { return (F)(pairs & int32_t(0xffff0000)); }

#endif

#if KERNELS_LEVEL < 2
// The first n < W lanes; the others are zero.
template <class T>
KERNELS_INLINE F f_load_n(const T* p, long n) {
  float lanes[W] = {};
  for (long i = 0; i < n; i++) lanes[i] = one_f32(p[i]);
  return f_load(lanes);
}
template <class T>
KERNELS_INLINE void f_store_n(T* p, F x, long n) {
  float lanes[W];
  f_store(lanes, x);
  for (long i = 0; i < n; i++) one_put(p + i, lanes[i]);
}
#endif

// e^x for x <= 88, to two units in the last place; 0 where x < -87.3, the smallest normal result.
KERNELS_INLINE F f_exp_to_88(F x) {
  const F low = f_set(-87.33f);
  const F y = f_max(x, low);
  const F n = f_round(f_mul(y, f_set(1.44269504f)));
  F r = f_fma(n, f_set(-0.693359375f), y);
  r = f_fma(n, f_set(2.12194440e-4f), r);
  F p = f_set(1.9875691500e-4f);
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_fma(p, f_mul(r, r), f_add(r, f_set(1)));
  return f_zero_below(x, low, f_mul(p, f_pow2(n)));
}

KERNELS_INLINE F f_exp(F x) {
  const F minus = f_max(f_sub(f_set(0), x), f_set(-88.37f));
  return f_exp_to_88(f_sub(f_set(0), minus));
}

// Runs `body(vector index, lanes)` over n elements, the last time with what is left.
template <class Body>
KERNELS_INLINE void f_each(long n, Body body) {
  long i = 0;
  for (; i + W <= n; i += W) body(i, long(W));
  if (i < n) body(i, n - i);
}
template <class T>
KERNELS_INLINE F f_get(const T* p, long n) {
  return n == W ? f_load(p) : f_load_n(p, n);
}
template <class T>
KERNELS_INLINE void f_put(T* p, F x, long n) {
  if (n == W)
    f_store(p, x);
  else
    f_store_n(p, x, n);
}

}  // namespace
