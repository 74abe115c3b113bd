// Products of a few rows of activations with one panel of packed weights.
//
// A tile's sums stay in registers over the whole of K: a panel row is loaded once and used for all
// rows of the tile, an activation is broadcast once and used for all PANEL columns.

constexpr int VECTORS = PANEL / W;  // of a panel's row

#if KERNELS_LEVEL >= 2
constexpr int ROWS_MAX = 12;  // 24 of 32 registers are sums
#elif KERNELS_LEVEL == 1 || defined(__aarch64__)
constexpr int ROWS_MAX = 3;
#else
constexpr int ROWS_MAX = 1;
#endif

// Addresses of up to 12 rows from three pointers: x86 adds one and two strides for nothing.
template <int I>
KERNELS_INLINE const char* row_of(const char* p0, const char* p1, const char* p2, long ld,
                                  long ld3) {
  const char* p = I / 4 == 0 ? p0 : I / 4 == 1 ? p1 : p2;
  return I % 4 == 0 ? p : I % 4 == 1 ? p + ld : I % 4 == 2 ? p + 2 * ld : p + ld3;
}

// Runs body(integral constant 0), body(1), … body(N - 1), unrolled.
template <int I>
struct Index {
  static constexpr int value = I;
};
template <int N, int I = 0, class Body>
KERNELS_INLINE void unrolled(Body body) {
  if constexpr (I < N) {
    body(Index<I>{});
    unrolled<N, I + 1>(body);
  }
}

KERNELS_INLINE float load_float(const char* p) {
  float x;
  __builtin_memcpy(&x, p, 4);
  return x;
}

#if KERNELS_LEVEL >= 3
KERNELS_INLINE F dot_pairs(F sum, I a, I b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
KERNELS_INLINE I set_pair(const char* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
#endif

enum TileKind { BF_BF, F_BF, F_F };

template <TileKind KIND, int M>
void tile_rows(const Tile& t) {
  constexpr long A_BYTES = KIND == BF_BF ? 2 : 4;       // of an activation
  constexpr long K_STEP = KIND == F_F ? 1 : 2;          // inputs a panel row holds
  constexpr long ROW_BYTES = 4 * PANEL;                 // of a panel row
  F sum[M][VECTORS];
  for (int i = 0; i < M; i++)
    for (int v = 0; v < VECTORS; v++)
      sum[i][v] = t.accumulate ? f_load(t.out + i * t.ldo + v * W) : f_zero();
  const long ld = t.lda * A_BYTES, ld3 = 3 * ld;
  const char* p0 = static_cast<const char*>(t.a);
  const char *p1 = p0 + 4 * ld, *p2 = p0 + 8 * ld;
  const char* b = static_cast<const char*>(t.panel);
  const char* ahead = t.prefetch;
  const long ahead_step = t.prefetch_step;
  for (const char* end = b + t.k / K_STEP * ROW_BYTES; b != end; b += ROW_BYTES) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + 64, 0, 2);
    ahead += ahead_step;
    if constexpr (KIND == BF_BF) {
#if KERNELS_LEVEL >= 3
      const I b0 = i_load(b), b1 = i_load(b + 64);
      unrolled<M>([&](auto i) {
        const I a = set_pair(row_of<i.value>(p0, p1, p2, ld, ld3));
        sum[i.value][0] = dot_pairs(sum[i.value][0], a, b0);
        sum[i.value][1] = dot_pairs(sum[i.value][1], a, b1);
      });
#endif
    } else {
      // So many vectors of the panel's row at a time as registers hold beside the sums.
      constexpr int TOGETHER = VECTORS == 2 ? 2 : 1;
      unrolled<VECTORS / TOGETHER>([&](auto part) {
        constexpr int FIRST = part.value * TOGETHER;
        F even[TOGETHER], odd[TOGETHER];
        for (int v = 0; v < TOGETHER; v++) {
          const char* w = b + (FIRST + v) * W * 4;
          even[v] = KIND == F_F ? f_load(reinterpret_cast<const float*>(w)) : f_even(i_load(w));
          if (KIND == F_BF) odd[v] = f_odd(i_load(w));
        }
        unrolled<M>([&](auto i) {
          const char* a = row_of<i.value>(p0, p1, p2, ld, ld3);
          F* s = sum[i.value] + FIRST;
          const F x = f_set(load_float(a));
          for (int v = 0; v < TOGETHER; v++) s[v] = f_fma(x, even[v], s[v]);
          if constexpr (KIND == F_BF) {
            const F y = f_set(load_float(a + 4));
            for (int v = 0; v < TOGETHER; v++) s[v] = f_fma(y, odd[v], s[v]);
          }
        });
      });
    }
    p0 += K_STEP * A_BYTES;
    p1 += K_STEP * A_BYTES;
    p2 += K_STEP * A_BYTES;
  }
  for (int i = 0; i < M; i++)
    for (int v = 0; v < VECTORS; v++) f_store(t.out + i * t.ldo + v * W, sum[i][v]);
}

template <TileKind KIND, int M = ROWS_MAX>
KERNELS_INLINE void tile_of(long rows, const Tile& tile) {
  if constexpr (M > 1) {
    if (rows != M) return tile_of<KIND, M - 1>(rows, tile);
  }
  tile_rows<KIND, M>(tile);
}

#if KERNELS_LEVEL >= 3
void tile_bf_bf(long rows, const Tile& tile) { tile_of<BF_BF>(rows, tile); }
#else
constexpr void (*tile_bf_bf)(long, const Tile&) = nullptr;
#endif
void tile_f_bf(long rows, const Tile& tile) { tile_of<F_BF>(rows, tile); }
void tile_f_f(long rows, const Tile& tile) { tile_of<F_F>(rows, tile); }

KERNELS_INLINE F f_silu(F x) {
  return f_div(x, f_add(f_set(1), f_exp(f_sub(f_set(0), x))));
}

template <class Y, class B>
KERNELS_INLINE void sink_as(const Sink& s, const float* tile, const float* up, long rows, long row,
                            long column, long columns) {
  const B* bias = static_cast<const B*>(s.bias);
  for (long i = 0; i < rows; i++) {
    Y* y = static_cast<Y*>(s.y) + (row + i) * s.ldy + column;
    f_each(columns, [&](long c, long n) {
      F x = f_get(tile + i * PANEL + c, n);
      if (bias != nullptr) x = f_add(x, f_get(bias + column + c, n));
      if (s.then == ADD) x = f_add(x, f_get(y + c, n));
      if (s.then == SILU_MUL) {
        F u = f_get(up + i * PANEL + c, n);
        if (bias != nullptr) u = f_add(u, f_get(bias + s.half + column + c, n));
        x = f_mul(f_silu(x), u);
      }
      f_put(y + c, x, n);
    });
  }
}

void sink(const Sink& s, const float* tile, const float* up, long rows, long row, long column,
          long columns) {
  if (s.y_type == BF16 && s.bias_type == BF16)
    sink_as<uint16_t, uint16_t>(s, tile, up, rows, row, column, columns);
  else if (s.y_type == BF16)
    sink_as<uint16_t, float>(s, tile, up, rows, row, column, columns);
  else if (s.bias_type == BF16)
    sink_as<float, uint16_t>(s, tile, up, rows, row, column, columns);
  else
    sink_as<float, float>(s, tile, up, rows, row, column, columns);
}
