// The C interface of the CPU kernels, as headrace/native.py calls it.
//
// Types are DType (0 float32, 1 bfloat16; of weights 2 codes of four bits, 3 of eight, 4 float8 e4m3,
// 5 float8 e5m2, which have scales for groups of inputs). Pointers are to host memory that stays for the call;
// nothing is checked here: the Python side has. One call at a time computes: others wait.

#pragma once

#include <cstddef>
#include <cstdint>

#define KERNELS_API extern "C" __attribute__((visibility("default")))

// Counts changes of this interface; the Python side refuses another number.
constexpr int32_t KERNELS_VERSION = 3;

KERNELS_API int32_t kernels_version();
// Levels of instruction sets: 0 baseline, 1 avx2, 2 avx512, 3 avx512bf16.
KERNELS_API int32_t kernels_best_isa();
KERNELS_API int32_t kernels_set_isa(int32_t level);  // negative: the best; returns the level in use
KERNELS_API const char* kernels_isa_name();
KERNELS_API int32_t kernels_set_threads(int32_t threads);  // the caller included; returns what is set

// Memory for packed weights, in huge pages where the system grants them.
KERNELS_API void* kernels_allocate(size_t bytes);
KERNELS_API void kernels_release(void* memory);
KERNELS_API int64_t kernels_packed_bytes(int64_t n, int64_t k, int32_t type);
// `rows` (may be null): which row of `from` becomes output n; negative: zeros. `ld`: elements a row.
KERNELS_API void kernels_pack(const void* from, int32_t from_type, int64_t ld, const int64_t* rows,
                              int64_t n, int64_t k, int32_t type, void* to);

// Coded weights: codes [n][k] bytes, or of four bits [n][k / 2], input 2 j in the lower half of byte j;
// scales [n][ceil(k / group)], zeros as many (null: all zero), values 16 (null: codes are numbers).
// A group has an even number of inputs, or there is only one.
KERNELS_API int64_t kernels_coded_bytes(int64_t n, int64_t k, int64_t group, int32_t type);
KERNELS_API void kernels_pack_codes(const void* codes, const float* scales, const float* zeros,
                                    const float* values, int64_t n, int64_t k, int64_t group,
                                    int32_t type, void* to);

// y[m][n] = x[m][k] · weight.T + bias; y and bias in x's type, ldx elements from row to row of x.
// `group`: of a coded weight, else 0.
KERNELS_API void kernels_matmul(const void* x, int32_t x_type, int64_t ldx, int64_t m,
                                const void* weight, int32_t weight_type, int64_t n, int64_t k,
                                int64_t group, const void* bias, void* y);

// One type for all of x, residual, weight, y. Without residual (null) y = norm(x); with it
// residual += x, y = norm(residual).
KERNELS_API void kernels_rms_norm(const void* x, void* residual, const void* weight, float eps,
                                  int32_t type, int64_t rows, int64_t width, void* y);
// y[t][f] = silu(x[t][f]) · x[t][width + f]
KERNELS_API void kernels_silu_mul(const void* x, int32_t type, int64_t rows, int64_t width, void* y);
// Rotates queries in place and writes keys and values to their cells. Norm weights may be null.
KERNELS_API void kernels_rope_and_kv_write(void* qkv, const float* cos_sin, void* k_cache,
                                           void* v_cache, const int64_t* cells, int32_t type,
                                           int64_t tokens, int32_t heads, int32_t kv_heads,
                                           int32_t head_dim, int32_t rotary_dim,
                                           const void* q_norm, const void* k_norm, float eps);

struct KernelsAttention {
  const void* q;
  const void* k_cache;
  const void* v_cache;
  void* o;
  const int32_t* row_start;
  const int32_t* row_len;
  const int32_t* table;
  int64_t q_stride;
  int64_t table_stride;
  int32_t rows;
  int32_t type;  // of all
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t block_tokens;
  int32_t window;  // 0: none
  float scale;
};
KERNELS_API void kernels_attention(const KernelsAttention* attention);

// A packed weight and its bias (may be null, of the decoder's type).
struct KernelsLinear {
  const void* weight;
  const void* bias;
  int64_t outputs;
  int64_t inputs;
  int32_t type;
  int32_t group;  // of a coded weight
};

struct KernelsLayer {
  KernelsLinear qkv;      // H queries, K keys, K values
  KernelsLinear out;
  KernelsLinear gate_up;  // gate, then up
  KernelsLinear down;
  const void* attention_norm;
  const void* mlp_norm;
  const void* q_norm;  // may be null, with k_norm
  const void* k_norm;
  void* k_cache;  // [N][P][K][E]
  void* v_cache;
  int64_t window;  // 0: none
};

struct KernelsDecoder {
  const KernelsLayer* layers;
  const void* embedding;  // [V][D], row by row
  const void* norm;
  KernelsLinear head;
  int64_t layer_count;
  int32_t type;  // of norms, biases, embedding and caches
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t block_tokens;
  float eps;
};

struct KernelsStep {
  const int64_t* ids;
  const float* cos_sin;  // [T][E]: cosines, then sines
  const int64_t* cells;
  const int64_t* sampled;  // indices of tokens
  const int32_t* row_start;
  const int32_t* row_len;
  const int32_t* table;
  int64_t table_stride;
  int64_t tokens;
  int64_t sampled_count;
  int64_t rows;
  float* logits;  // [sampled_count][head.outputs]
};

// A whole step of a decoder of Llama's family: embedding, layers, norm, head of the sampled tokens.
// The residual stream, and what a product hands to the next operation, is float32; what a product
// takes is rounded to `type` once.
KERNELS_API void kernels_decoder(const KernelsDecoder* decoder, const KernelsStep* step);
