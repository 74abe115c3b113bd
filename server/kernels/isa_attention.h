// Attention over the paged cache: one query token (decode), or a tile of them (prefill).
//
// Both go over the context in chunks and keep, per query, the largest score so far, the sum of the
// exponentials and the weighted sum of the values, which are scaled down when a larger score comes.

constexpr long DECODE_CHUNK = 256;   // positions whose scores are held at once
constexpr long RUN = 16;             // positions of one block that are taken together
constexpr float NO_SCORE = -1e30f;   // finite, so that differences of two are numbers
constexpr long PREFILL_CHUNK = 128;  // positions whose keys and values are packed at once

KERNELS_INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }
KERNELS_INLINE long least(long a, long b) { return a < b ? a : b; }

// Cuts the scratch memory of the thread into aligned arrays.
struct Carver {
  char* at;
  template <class T>
  inline __attribute__((always_inline)) T* take(long n) {
    T* array = reinterpret_cast<T*>(at);
    at += round_up(n * long(sizeof(T)), 64);
    return array;
  }
};

#if KERNELS_LEVEL >= 2
// Sums of the lanes of 16 vectors, as the lanes of one.
KERNELS_INLINE F sum_each(const F (&x)[16]) {
  F a[8], b[4], c[2];
  for (int i = 0; i < 8; i++)
    a[i] = f_add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                 _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d lo = _mm512_castps_pd(a[2 * i]), hi = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = f_add(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)),
                 _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
  }
  // A 128-bit lane of b[i] now holds sums of vectors 4i … 4i + 3, a quarter each.
  for (int i = 0; i < 2; i++)
    c[i] = f_add(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                 _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return f_add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}
#endif

// scores[i] = q · k of position i, for `run` <= RUN positions `stride` numbers apart.
template <class KV>
KERNELS_INLINE void scores_f32(const float* q, const KV* k, long stride, long dim, long run,
                               float* scores) {
#if KERNELS_LEVEL >= 2
  F sum[RUN];
  for (long i = 0; i < RUN; i++) sum[i] = f_zero();
  for (long i = 0; i < run; i++)
    f_each(dim, [&](long e, long n) {
      sum[i] = f_fma(f_get(q + e, n), f_get(k + i * stride + e, n), sum[i]);
    });
  f_put(scores, sum_each(sum), run);
#else
  for (long i = 0; i < run; i++) {
    F sum = f_zero();
    f_each(dim, [&](long e, long n) {
      sum = f_fma(f_get(q + e, n), f_get(k + i * stride + e, n), sum);
    });
    scores[i] = f_sum(sum);
  }
#endif
}

#if KERNELS_LEVEL >= 3
template <int VECS>
KERNELS_INLINE void scores_bf16_of(const uint16_t* q, const uint16_t* k, long stride, long run,
                                   float* scores) {
  I query[VECS];
  for (int v = 0; v < VECS; v++) query[v] = i_load(q + 32 * v);
  F sum[RUN];
  if (run == RUN) {
    unrolled<RUN>([&](auto i) {
      F s = f_zero();
      for (int v = 0; v < VECS; v++) s = dot_pairs(s, query[v], i_load(k + i.value * stride + 32 * v));
      sum[i.value] = s;
    });
    f_store(scores, sum_each(sum));
    return;
  }
  for (long i = 0; i < RUN; i++) sum[i] = f_zero();
  for (long i = 0; i < run; i++)
    for (int v = 0; v < VECS; v++)
      sum[i] = dot_pairs(sum[i], query[v], i_load(k + i * stride + 32 * v));
  f_store_n(scores, sum_each(sum), run);
}

KERNELS_INLINE bool has_dot(long dim) { return dim == 32 || dim == 64 || dim == 96 || dim == 128 || dim == 256; }

KERNELS_INLINE void scores_bf16(const uint16_t* q, const uint16_t* k, long stride, long dim,
                                long run, float* scores) {
  if (dim == 64) return scores_bf16_of<2>(q, k, stride, run, scores);
  if (dim == 128) return scores_bf16_of<4>(q, k, stride, run, scores);
  if (dim == 96) return scores_bf16_of<3>(q, k, stride, run, scores);
  if (dim == 32) return scores_bf16_of<1>(q, k, stride, run, scores);
  scores_bf16_of<8>(q, k, stride, run, scores);
}
#endif

// Asks for what is read next, a share with each step of the work at hand: a page of keys is read
// head by head, in strides that the hardware does not foresee.
struct Ahead {
  const char* at;
  long lines;  // of one share
  inline __attribute__((always_inline)) void share() {
    for (long i = 0; i < lines; i++) __builtin_prefetch(at + i * 64, 0, 2);
    at += lines * 64;
  }
};

#if KERNELS_LEVEL >= 3
// Columns of a vector of pairs as unpacking leaves them: 0-3, 8-11, 16-19, 24-27 and 4-7, 12-15, …
// o keeps that order until it is complete; `straighten` brings 32 numbers back to theirs.
KERNELS_INLINE void straighten(float* o) {
  const F low = f_load(o), high = f_load(o + W);
  const I first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const I second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  f_store(o, _mm512_permutex2var_ps(low, first, high));
  f_store(o + W, _mm512_permutex2var_ps(low, second, high));
}

// As `weigh_tile`, two positions at once. p: bf16; VECS: of 32 columns.
template <int G, int VECS>
KERNELS_INLINE void weigh_pairs(const uint16_t* p, long p_stride, const uint16_t* v, long stride,
                                long run, float* o, long dim) {
  F sum[G][2 * VECS];
  for (int g = 0; g < G; g++)
    for (int j = 0; j < 2 * VECS; j++) sum[g][j] = f_load(o + g * dim + j * W);
  for (long i = 0; i < run; i += 2) {
    I pairs[2 * VECS];
    for (int j = 0; j < VECS; j++) {
      const I a = i_load(v + i * stride + 32 * j);
      const I b = i + 1 < run ? i_load(v + (i + 1) * stride + 32 * j) : _mm512_setzero_si512();
      pairs[2 * j] = _mm512_unpacklo_epi16(a, b);
      pairs[2 * j + 1] = _mm512_unpackhi_epi16(a, b);
    }
    for (int g = 0; g < G; g++) {
      const uint16_t* at = p + g * p_stride + i;
      // Half of a pair: the weight beyond the run is another's, or was never written.
      const I weight = i + 1 < run ? set_pair(reinterpret_cast<const char*>(at))
                                   : _mm512_set1_epi32(int(*at));
      for (int j = 0; j < 2 * VECS; j++) sum[g][j] = dot_pairs(sum[g][j], weight, pairs[j]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int j = 0; j < 2 * VECS; j++) f_store(o + g * dim + j * W, sum[g][j]);
}

template <int G>
KERNELS_INLINE void weigh_pairs_heads(const uint16_t* p, long p_stride, const uint16_t* v,
                                      long stride, long dim, long run, float* o) {
  long e = 0;
  for (; e + 64 <= dim; e += 64) weigh_pairs<G, 2>(p, p_stride, v + e, stride, run, o + e, dim);
  if (e < dim) weigh_pairs<G, 1>(p, p_stride, v + e, stride, run, o + e, dim);
}
#endif

// o[g][e] += sum of p[g][i] · v[i][e] for G heads of one group and VECS vectors of e.
template <int G, int VECS, class KV>
KERNELS_INLINE void weigh_tile(const float* p, long p_stride, const KV* v, long stride, long run,
                               float* o, long dim, long lanes) {
  F sum[G][VECS];
  for (int g = 0; g < G; g++)
    for (int j = 0; j < VECS; j++) sum[g][j] = f_get(o + g * dim + j * W, lanes);
  for (long i = 0; i < run; i++) {
    F value[VECS];
    for (int j = 0; j < VECS; j++) value[j] = f_get(v + i * stride + j * W, lanes);
    for (int g = 0; g < G; g++) {
      const F weight = f_set(p[g * p_stride + i]);
      for (int j = 0; j < VECS; j++) sum[g][j] = f_fma(weight, value[j], sum[g][j]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int j = 0; j < VECS; j++) f_put(o + g * dim + j * W, sum[g][j], lanes);
}

template <int G, class KV>
KERNELS_INLINE void weigh_heads(const float* p, long p_stride, const KV* v, long stride, long dim,
                                long run, float* o) {
  constexpr int VECS = W == 4 ? 2 : 4;
  long e = 0;
  for (; e + VECS * W <= dim; e += VECS * W)
    weigh_tile<G, VECS>(p, p_stride, v + e, stride, run, o + e, dim, W);
  for (; e < dim; e += W)
    weigh_tile<G, 1>(p, p_stride, v + e, stride, run, o + e, dim, least(W, dim - e));
}

#if KERNELS_LEVEL >= 3
KERNELS_INLINE void weigh_bf16(const uint16_t* p, long p_stride, const uint16_t* v, long stride,
                               long dim, long run, long group, float* o) {
  for (; group >= 4; group -= 4, p += 4 * p_stride, o += 4 * dim)
    weigh_pairs_heads<4>(p, p_stride, v, stride, dim, run, o);
  if (group == 3) weigh_pairs_heads<3>(p, p_stride, v, stride, dim, run, o);
  if (group == 2) weigh_pairs_heads<2>(p, p_stride, v, stride, dim, run, o);
  if (group == 1) weigh_pairs_heads<1>(p, p_stride, v, stride, dim, run, o);
}
#endif

template <class KV>
KERNELS_INLINE void weigh(const float* p, long p_stride, const KV* v, long stride, long dim,
                          long run, long group, float* o) {
  constexpr int G = KERNELS_LEVEL >= 2 ? 3 : 2;
  long g = 0;
  for (; g + G <= group; g += G)
    weigh_heads<G>(p + g * p_stride, p_stride, v, stride, dim, run, o + g * dim);
  for (; g < group; g++)
    weigh_heads<1>(p + g * p_stride, p_stride, v, stride, dim, run, o + g * dim);
}

// Turns `n` scores of one query into weights. Returns what the sums so far are to be scaled by.
// weights: may be the scores.
template <class P>
KERNELS_INLINE float soften(const float* scores, P* weights, long n, float scale, float* most,
                            float* sum) {
  F largest = f_set(NO_SCORE);
  long i = 0;
  for (; i + W <= n; i += W) largest = f_max(f_load(scores + i), largest);
  float now = f_most(largest);
  for (; i < n; i++) now = scores[i] > now ? scores[i] : now;
  now = now * scale > *most ? now * scale : *most;
  F total = f_zero();
  float total_tail = 0;
  const F less = f_set(-now), by = f_set(scale);
  f_each(n, [&](long at, long lanes) {
    const F x = f_exp_to_88(f_fma(f_get(scores + at, lanes), by, less));
    f_put(weights + at, x, lanes);
    if (lanes == W) {
      total = f_add(total, x);
    } else {
      float each[W];
      f_store(each, x);
      for (long j = 0; j < lanes; j++) total_tail += each[j];
    }
  });
  float lanes[W];
  f_store(lanes, f_exp_to_88(f_set(*most - now)));
  *most = now;
  *sum = *sum * lanes[0] + f_sum(total) + total_tail;
  return lanes[0];
}

KERNELS_INLINE void scale_row(float* x, long n, float by) {
  f_each(n, [&](long i, long lanes) { f_put(x + i, f_mul(f_get(x + i, lanes), f_set(by)), lanes); });
}

KERNELS_INLINE void put_row(const Attention& a, long token, long head, const float* x, float by) {
  const long dim = a.shape.head_dim, at = token * a.o_stride + head * dim;
  f_each(dim, [&](long i, long lanes) {
    const F y = f_mul(f_get(x + i, lanes), f_set(by));
    if (a.o_type == BF16) f_put(static_cast<uint16_t*>(a.o) + at + i, y, lanes);
    else f_put(static_cast<float*>(a.o) + at + i, y, lanes);
  });
}

// Calls body(position, cell, positions) for pieces of begin..end that lie together in a block.
template <class Body>
KERNELS_INLINE void runs(const int32_t* table, long block_tokens, long begin, long end, Body body) {
  for (long t = begin; t < end;) {
    const long block = t / block_tokens, offset = t - block * block_tokens;
    const long run = least(least(block_tokens - offset, RUN), end - t);
    body(t, long(table[block]) * block_tokens + offset, run);
    t += run;
  }
}

// The work on one query token: arrays of the thread's scratch memory, and the two passes.
template <class KV, bool DOT>
struct Decode {
  const Attention& a;
  const DecodeItem& item;
  const long heads = a.shape.heads, kv_heads = a.shape.kv_heads, dim = a.shape.head_dim;
  const long group = heads / kv_heads, stride = kv_heads * dim;
  const long lines = (RUN * stride * long(sizeof(KV)) / 64 + heads - 1) / heads;
  void* q = nullptr;            // [H][E], bf16 where DOT
  float* scores = nullptr;      // [H][DECODE_CHUNK]
  uint16_t* weights = nullptr;  // the same in bf16, where DOT
  float* o = nullptr;           // [H][E]
  float* most = nullptr;        // [H]
  float* sum = nullptr;         // [H]

  inline __attribute__((always_inline)) void take_memory() {
    Carver carver{static_cast<char*>(
        scratch(size_t(heads * (2 * dim * 4 + DECODE_CHUNK * 6 + 2 * 4) + 6 * 64)))};
    q = carver.take<float>(heads * dim);
    scores = carver.take<float>(heads * DECODE_CHUNK);
    weights = carver.take<uint16_t>(heads * DECODE_CHUNK);
    o = carver.take<float>(heads * dim);
    most = carver.take<float>(heads);
    sum = carver.take<float>(heads);
  }

  // What to read ahead while position t is worked on: two runs on in `now`, or what comes after its
  // end: the positions from `begin` on in `then`.
  inline __attribute__((always_inline)) Ahead ahead(const void* now, long t, long end,
                                                    const void* then, long begin) const {
    const char* base = static_cast<const char*>(now);
    t += 2 * RUN;
    if (t >= end) {
      base = static_cast<const char*>(then);
      t += begin - end;
    }
    if (t >= item.end) return Ahead{base, 0};
    const long block = t / a.block_tokens;
    const long cell = long(item.table[block]) * a.block_tokens + (t - block * a.block_tokens);
    return Ahead{base + cell * stride * long(sizeof(KV)), lines};
  }

  inline __attribute__((always_inline)) void score(long begin, long end) {
    const KV* keys = static_cast<const KV*>(a.k_cache);
    runs(item.table, a.block_tokens, begin, end, [&](long t, long cell, long run) {
      Ahead next = ahead(a.k_cache, t, end, a.v_cache, begin);
      for (long h = 0; h < heads; h++) {
        const KV* k = keys + cell * stride + h / group * dim;
        float* to = scores + h * DECODE_CHUNK + (t - begin);
        next.share();
#if KERNELS_LEVEL >= 3
        if constexpr (DOT) {
          scores_bf16(static_cast<const uint16_t*>(q) + h * dim, k, stride, dim, run, to);
          continue;
        }
#endif
        scores_f32(static_cast<const float*>(q) + h * dim, k, stride, dim, run, to);
      }
    });
  }

  inline __attribute__((always_inline)) void weigh_values(long begin, long end) {
    const KV* values = static_cast<const KV*>(a.v_cache);
    runs(item.table, a.block_tokens, begin, end, [&](long t, long cell, long run) {
      Ahead next = ahead(a.v_cache, t, end, a.k_cache, end);
      next.lines *= group;
      for (long kv = 0; kv < kv_heads; kv++) {
        const long at = kv * group * DECODE_CHUNK + (t - begin);
        const KV* v = values + cell * stride + kv * dim;
        float* to = o + kv * group * dim;
        next.share();
#if KERNELS_LEVEL >= 3
        if constexpr (DOT) {
          weigh_bf16(weights + at, DECODE_CHUNK, v, stride, dim, run, group, to);
          continue;
        }
#endif
        weigh(scores + at, DECODE_CHUNK, v, stride, dim, run, group, to);
      }
    });
  }

  void run() {
    take_memory();
    convert(static_cast<const char*>(a.q) + item.token * a.q_stride * size_of(a.q_type), a.q_type,
            q, DOT ? BF16 : F32, heads * dim);
    for (long i = 0; i < heads * dim; i++) o[i] = 0;
    for (long h = 0; h < heads; h++) most[h] = NO_SCORE, sum[h] = 0;
    for (long begin = item.begin; begin < item.end; begin += DECODE_CHUNK) {
      const long end = least(begin + DECODE_CHUNK, item.end);
      score(begin, end);
      for (long h = 0; h < heads; h++) {
        float* row = scores + h * DECODE_CHUNK;
        float by = 1;
        if constexpr (DOT) {
          uint16_t* to = weights + h * DECODE_CHUNK;
          by = soften(row, to, end - begin, a.scale, most + h, sum + h);
        } else {
          by = soften(row, row, end - begin, a.scale, most + h, sum + h);
        }
        if (begin > item.begin && by != 1.0f) scale_row(o + h * dim, dim, by);
      }
      weigh_values(begin, end);
    }
#if KERNELS_LEVEL >= 3
    if constexpr (DOT)
      for (long i = 0; i < heads * dim; i += 32) straighten(o + i);
#endif
    if (item.partial == nullptr) {
      for (long h = 0; h < heads; h++) put_row(a, item.token, h, o + h * dim, 1.0f / sum[h]);
      return;
    }
    __builtin_memcpy(item.partial, most, size_t(heads) * 4);
    __builtin_memcpy(item.partial + heads, sum, size_t(heads) * 4);
    __builtin_memcpy(item.partial + 2 * heads, o, size_t(heads * dim) * 4);
  }
};

void decode(const Attention& a, const DecodeItem& item) {
  if (a.kv_type == F32) return Decode<float, false>{a, item}.run();
#if KERNELS_LEVEL >= 3
  if (has_dot(a.shape.head_dim)) return Decode<uint16_t, true>{a, item}.run();
#endif
  Decode<uint16_t, false>{a, item}.run();
}

// Joins `count` partial results of one query token, which lie one after another.
void merge(const Attention& a, long token, const float* partials, int count) {
  const long heads = a.shape.heads, dim = a.shape.head_dim, size = partial_floats(a.shape);
  float* o = static_cast<float*>(scratch(size_t(dim) * 4));
  for (long h = 0; h < heads; h++) {
    float most = NO_SCORE, sum = 0;
    for (int c = 0; c < count; c++)
      most = partials[c * size + h] > most ? partials[c * size + h] : most;
    for (long e = 0; e < dim; e++) o[e] = 0;
    for (int c = 0; c < count; c++) {
      const float* partial = partials + c * size;
      float by[W];
      f_store(by, f_exp(f_set(partial[h] - most)));
      sum += partial[heads + h] * by[0];
      const float* from = partial + 2 * heads + h * dim;
      f_each(dim, [&](long i, long n) {
        f_put(o + i, f_fma(f_get(from + i, n), f_set(by[0]), f_get(o + i, n)), n);
      });
    }
    put_row(a, token, h, o, 1.0f / sum);
  }
}

// Keys of `n` positions as panels of weights of which each position is an output.
KERNELS_INLINE void pack_key(const uint16_t* k, long dim, uint32_t* panel, long column) {
  for (long e = 0; e < dim; e += 2) {
    uint32_t pair;
    __builtin_memcpy(&pair, k + e, 4);
    panel[e / 2 * PANEL + column] = pair;
  }
}
template <class KV>
KERNELS_INLINE void pack_key(const KV* k, long dim, float* panel, long column) {
  for (long e = 0; e < dim; e++) panel[e * PANEL + column] = one_f32(k[e]);
}

#if KERNELS_LEVEL >= 2
// A square of 16 rows of 16 32-bit numbers, transposed.
KERNELS_INLINE void transpose_16(const char* from, long stride, uint32_t* to, long to_stride) {
  I r[16], s[16];
  for (int i = 0; i < 16; i++) r[i] = i_load(from + i * stride);
  for (int i = 0; i < 8; i++) {
    s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(s[4 * i], s[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd));
  }
}
#endif

// The packed form of a chunk: of bf16 pairs where the dot product of pairs is used, else float32.
template <bool DOT>
struct Chunk {
  using Number = float;
  using Probability = float;
};
template <>
struct Chunk<true> {
  using Number = uint32_t;
  using Probability = uint16_t;
};

template <class KV, bool DOT, class Number>
KERNELS_INLINE void pack_keys(const KV* keys, const PrefillItem& item, const Attention& a,
                              long begin, long end, Number* packed) {
  const long dim = a.shape.head_dim, stride = long(a.shape.kv_heads) * dim;
  const long panel = (DOT ? dim / 2 : dim) * PANEL;
  if ((end - begin) % PANEL != 0)
    for (long i = 0, n = round_up(end - begin, PANEL) * panel / PANEL; i < n; i++) packed[i] = 0;
  runs(item.table, a.block_tokens, begin, end, [&](long t, long cell, long run) {
    const KV* k = keys + cell * stride + item.kv_head * dim;
    const long at = t - begin;
#if KERNELS_LEVEL >= 2
    Number* to = packed + at / PANEL * panel;
    if (sizeof(KV) * (DOT ? 2 : 1) == 4 && run == RUN && at % RUN == 0 && panel % (16 * PANEL) == 0) {
      for (long e = 0; e < panel / PANEL; e += 16)
        transpose_16(reinterpret_cast<const char*>(k) + e * 4, stride * long(sizeof(KV)),
                     reinterpret_cast<uint32_t*>(to) + e * PANEL + at % PANEL, PANEL);
      return;
    }
#endif
    for (long i = 0; i < run; i++)
      pack_key(k + i * stride, dim, packed + (at + i) / PANEL * panel, (at + i) % PANEL);
  });
}

#if KERNELS_LEVEL >= 2
// As `pack_values`, of pairs, for whole panels.
KERNELS_INLINE void pack_value_pairs(const uint16_t* values, const PrefillItem& item,
                                     const Attention& a, long begin, long end, uint32_t* packed) {
  const long dim = a.shape.head_dim, stride = long(a.shape.kv_heads) * dim;
  const auto row = [&](long t) {
    const long block = t / a.block_tokens;
    const long cell = long(item.table[block]) * a.block_tokens + (t - block * a.block_tokens);
    return values + cell * stride + item.kv_head * dim;
  };
  // Halves of the columns as unpacking leaves them, and back in order.
  const I first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const I second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (long t = begin; t < end; t += 2) {
    const uint16_t* even = row(t);
    const uint16_t* odd = t + 1 < end ? row(t + 1) : nullptr;
    uint32_t* to = packed + (t - begin) / 2 * PANEL;
    for (long e = 0; e < dim; e += PANEL, to += PREFILL_CHUNK / 2 * PANEL) {
      const I x = i_load(even + e), y = odd != nullptr ? i_load(odd + e) : _mm512_setzero_si512();
      const I low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi32(low, first, high));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi32(low, second, high));
    }
  }
}
#endif

// Values as panels of weights of which each position is an input.
template <class KV, bool DOT, class Number>
KERNELS_INLINE void pack_values(const KV* values, const PrefillItem& item, const Attention& a,
                                long begin, long end, Number* packed) {
  const long dim = a.shape.head_dim, stride = long(a.shape.kv_heads) * dim;
  const long inputs = DOT ? PREFILL_CHUNK / 2 : PREFILL_CHUNK;
  const long panels = round_up(dim, PANEL) / PANEL;
#if KERNELS_LEVEL >= 2
  if (DOT && dim % PANEL == 0) {
    pack_value_pairs(reinterpret_cast<const uint16_t*>(values), item, a, begin, end,
                     reinterpret_cast<uint32_t*>(packed));
    return;
  }
#endif
  if (DOT || dim % PANEL != 0)
    for (long i = 0; i < panels * inputs * PANEL; i++) packed[i] = 0;
  runs(item.table, a.block_tokens, begin, end, [&](long t, long cell, long run) {
    for (long i = 0; i < run; i++) {
      const KV* v = values + (cell + i) * stride + item.kv_head * dim;
      const long at = t - begin + i;
      for (long p = 0; p < panels; p++) {
        const long columns = least(PANEL, dim - p * PANEL);
        Number* to = packed + (p * inputs + (DOT ? at / 2 : at)) * PANEL;
        if constexpr (DOT) {
          // Pairs of positions: the even one in the lower half.
          const uint32_t shift = at % 2 * 16;
          for (long c = 0; c < columns; c++) to[c] |= uint32_t(v[p * PANEL + c]) << shift;
        } else {
          for (long c = 0; c < columns; c++) to[c] = one_f32(v[p * PANEL + c]);
        }
      }
    }
  });
}

template <bool DOT>
KERNELS_INLINE void tile_any(long rows, const Tile& tile) {
#if KERNELS_LEVEL >= 3
  if constexpr (DOT) return tile_bf_bf(rows, tile);
#endif
  tile_f_f(rows, tile);
}

template <class KV, bool DOT>
KERNELS_INLINE void prefill_as(const Attention& a, const PrefillItem& item) {
  using Number = typename Chunk<DOT>::Number;
  using Probability = typename Chunk<DOT>::Probability;
  constexpr long A_BYTES = DOT ? 2 : 4;
  const long dim = a.shape.head_dim, group = a.shape.heads / a.shape.kv_heads;
  const long rows = item.tokens * group, wide = round_up(dim, PANEL);
  const long inputs = DOT ? PREFILL_CHUNK / 2 : PREFILL_CHUNK;
  Carver carver{static_cast<char*>(scratch(size_t(
      rows * (dim * A_BYTES + PREFILL_CHUNK * (4 + A_BYTES) + wide * 4 + 8) +
      PREFILL_CHUNK * dim * 4 + wide * PREFILL_CHUNK * 4 + 8 * 64)))};
  char* q = carver.take<char>(rows * dim * A_BYTES);
  float* scores = carver.take<float>(rows * PREFILL_CHUNK);
  Probability* weights = carver.take<Probability>(rows * PREFILL_CHUNK);
  float* o = carver.take<float>(rows * wide);
  float* most = carver.take<float>(rows);
  float* sum = carver.take<float>(rows);
  Number* keys = carver.take<Number>(PREFILL_CHUNK * dim);
  Number* values = carver.take<Number>(wide * PREFILL_CHUNK);
  // Row r is query token r / group, head r % group of the group.
  for (long i = 0; i < item.tokens; i++)
    convert(static_cast<const char*>(a.q) +
                ((item.token + i) * a.q_stride + item.kv_head * group * dim) * size_of(a.q_type),
            a.q_type, q + i * group * dim * A_BYTES, DOT ? BF16 : F32, group * dim);
  for (long i = 0; i < rows * wide; i++) o[i] = 0;
  for (long r = 0; r < rows; r++) most[r] = NO_SCORE, sum[r] = 0;
  const long first = a.window > 0 && item.position - a.window + 1 > 0 ? item.position - a.window + 1 : 0;
  const long last = item.position + item.tokens;
  for (long begin = first; begin < last; begin += PREFILL_CHUNK) {
    const long end = least(begin + PREFILL_CHUNK, last), n = end - begin;
    pack_keys<KV, DOT>(static_cast<const KV*>(a.k_cache), item, a, begin, end, keys);
    pack_values<KV, DOT>(static_cast<const KV*>(a.v_cache), item, a, begin, end, values);
    Tile tile{};
    tile.lda = dim;
    tile.k = dim;
    tile.ldo = PREFILL_CHUNK;
    for (long r = 0; r < rows; r += ROWS_MAX)
      for (long p = 0; p * PANEL < n; p++) {
        tile.a = q + r * dim * A_BYTES;
        tile.panel = keys + p * (DOT ? dim / 2 : dim) * PANEL;
        tile.prefetch = static_cast<const char*>(tile.panel);
        tile.out = scores + r * PREFILL_CHUNK + p * PANEL;
        tile_any<DOT>(least(ROWS_MAX, rows - r), tile);
      }
    for (long r = 0; r < rows; r++) {
      const long position = item.position + r / group;
      const float* row = scores + r * PREFILL_CHUNK;
      Probability* to = weights + r * PREFILL_CHUNK;
      const long seen = least(end, position + 1) - begin;
      long from = a.window > 0 ? position - a.window + 1 - begin : 0;
      if (from < 0) from = 0;
      if (from >= seen) {
        __builtin_memset(to, 0, PREFILL_CHUNK * A_BYTES);
        continue;
      }
      for (long i = 0; i < from; i++) to[i] = 0;
      const float by = soften(row + from, to + from, seen - from, a.scale, most + r, sum + r);
      for (long i = seen; i < round_up(n, 2); i++) to[i] = 0;
      if (begin > first && by != 1.0f) scale_row(o + r * wide, wide, by);
    }
    tile.lda = PREFILL_CHUNK;
    tile.k = DOT ? round_up(n, 2) : n;
    tile.ldo = wide;
    tile.accumulate = true;
    for (long r = 0; r < rows; r += ROWS_MAX)
      for (long p = 0; p * PANEL < wide; p++) {
        tile.a = weights + r * PREFILL_CHUNK;
        tile.panel = values + p * inputs * PANEL;
        tile.prefetch = static_cast<const char*>(tile.panel);
        tile.out = o + r * wide + p * PANEL;
        tile_any<DOT>(least(ROWS_MAX, rows - r), tile);
      }
  }
  for (long r = 0; r < rows; r++)
    put_row(a, item.token + r / group, item.kv_head * group + r % group, o + r * wide, 1.0f / sum[r]);
}

void prefill(const Attention& a, const PrefillItem& item) {
  if (a.kv_type == F32) return prefill_as<float, false>(a, item);
  prefill_as<uint16_t, (KERNELS_LEVEL >= 3)>(a, item);
}
