// What is done to one row or one token at a time.

template <class X, class Y>
KERNELS_INLINE void convert_as(const void* from, void* to, long n) {
  const X* x = static_cast<const X*>(from);
  Y* y = static_cast<Y*>(to);
  f_each(n, [&](long i, long lanes) { f_put(y + i, f_get(x + i, lanes), lanes); });
}

void convert(const void* from, DType from_type, void* to, DType to_type, long n) {
  if (from_type == to_type)
    __builtin_memcpy(to, from, size_t(n * size_of(to_type)));
  else if (from_type == BF16)
    convert_as<uint16_t, float>(from, to, n);
  else
    convert_as<float, uint16_t>(from, to, n);
}

KERNELS_INLINE F norm_weight(const Norm& norm, long at, long lanes) {
  if (norm.type == BF16) return f_get(static_cast<const uint16_t*>(norm.weight) + at, lanes);
  return f_get(static_cast<const float*>(norm.weight) + at, lanes);
}

KERNELS_INLINE float rms_factor(float sum_of_squares, long n, float eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares / float(n) + eps);
}

template <class X, class Y>
KERNELS_INLINE void rms_norm_as(const X* x, X* residual, const Norm& norm, Y* y, long n) {
  F squares = f_zero();
  f_each(n, [&](long i, long lanes) {
    F value = f_get(x + i, lanes);
    if (residual != nullptr) {
      f_put(residual + i, f_add(value, f_get(residual + i, lanes)), lanes);
      value = f_get(residual + i, lanes);  // as rounded
    }
    squares = f_fma(value, value, squares);
  });
  const F factor = f_set(rms_factor(f_sum(squares), n, norm.eps));
  const X* sum = residual != nullptr ? residual : x;
  f_each(n, [&](long i, long lanes) {
    F value = f_mul(f_get(sum + i, lanes), factor);
    f_put(y + i, f_mul(value, norm_weight(norm, i, lanes)), lanes);
  });
}

void rms_norm(const void* x, DType x_type, void* residual, const Norm& norm, void* y, DType y_type,
              long n) {
  if (x_type == BF16)
    rms_norm_as(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(residual), norm,
                static_cast<uint16_t*>(y), n);
  else if (y_type == BF16)
    rms_norm_as(static_cast<const float*>(x), static_cast<float*>(residual), norm,
                static_cast<uint16_t*>(y), n);
  else
    rms_norm_as(static_cast<const float*>(x), static_cast<float*>(residual), norm,
                static_cast<float*>(y), n);
}

template <class T>
KERNELS_INLINE void silu_mul_as(const void* gate, const void* up, void* y, long n) {
  f_each(n, [&](long i, long lanes) {
    const F g = f_get(static_cast<const T*>(gate) + i, lanes);
    const F u = f_get(static_cast<const T*>(up) + i, lanes);
    f_put(static_cast<T*>(y) + i, f_mul(f_silu(g), u), lanes);
  });
}

void silu_mul(const void* gate, const void* up, void* y, DType type, long n) {
  if (type == BF16)
    silu_mul_as<uint16_t>(gate, up, y, n);
  else
    silu_mul_as<float>(gate, up, y, n);
}

// Normalises (if asked) and rotates one head: the pairs (x[i], x[i + R/2]) of its first R numbers.
template <class X, class Y>
KERNELS_INLINE void rotate(const X* x, Y* y, long dim, long rotary, const float* cos_sin,
                           const Norm& norm) {
  const long half = rotary / 2;
  F factor = f_set(1);
  if (norm.weight != nullptr) {
    F squares = f_zero();
    f_each(dim, [&](long i, long lanes) {
      const F value = f_get(x + i, lanes);
      squares = f_fma(value, value, squares);
    });
    factor = f_set(rms_factor(f_sum(squares), dim, norm.eps));
  }
  const auto value = [&](long i, long lanes) __attribute__((always_inline)) {
    F v = f_get(x + i, lanes);
    if (norm.weight != nullptr) v = f_mul(f_mul(v, factor), norm_weight(norm, i, lanes));
    return v;
  };
  f_each(half, [&](long i, long lanes) {
    const F low = value(i, lanes), high = value(half + i, lanes);
    const F cos = f_get(cos_sin + i, lanes), sin = f_get(cos_sin + half + i, lanes);
    f_put(y + i, f_sub(f_mul(low, cos), f_mul(high, sin)), lanes);
    f_put(y + half + i, f_add(f_mul(high, cos), f_mul(low, sin)), lanes);
  });
  f_each(dim - rotary, [&](long i, long lanes) {
    f_put(y + rotary + i, value(rotary + i, lanes), lanes);
  });
}

template <class X, class Q, class KV>
KERNELS_INLINE void rope_and_kv_write_as(const QkvRow& row, const Heads& shape, long rotary,
                                         const Norm& q_norm, const Norm& k_norm) {
  const long dim = shape.head_dim;
  const X* x = static_cast<const X*>(row.qkv);
  Q* q = static_cast<Q*>(row.q);
  KV* k = static_cast<KV*>(row.k);
  for (long h = 0; h < shape.heads; h++)
    rotate(x + h * dim, q + h * dim, dim, rotary, row.cos_sin, q_norm);
  x += shape.heads * dim;
  for (long h = 0; h < shape.kv_heads; h++)
    rotate(x + h * dim, k + h * dim, dim, rotary, row.cos_sin, k_norm);
  x += shape.kv_heads * dim;
  convert_as<X, KV>(x, row.v, shape.kv_heads * dim);
}

void rope_and_kv_write(const QkvRow& row, const Heads& shape, int rotary, const Norm& q_norm,
                       const Norm& k_norm) {
  if (row.qkv_type == BF16)
    rope_and_kv_write_as<uint16_t, uint16_t, uint16_t>(row, shape, rotary, q_norm, k_norm);
  else if (row.kv_type == F32)
    rope_and_kv_write_as<float, float, float>(row, shape, rotary, q_norm, k_norm);
  else if (row.q_type == F32)
    rope_and_kv_write_as<float, float, uint16_t>(row, shape, rotary, q_norm, k_norm);
  else
    rope_and_kv_write_as<float, uint16_t, uint16_t>(row, shape, rotary, q_norm, k_norm);
}
