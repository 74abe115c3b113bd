// What one instruction set offers: the innermost loops, each for one thread.
//
// The same source (isa_body.h) is compiled once for every level; `isa()` gives the level in use.
//
// Packed weights: panels of PANEL output columns, padded with zeros. Within a panel bf16 weights lie
// as [K/2][PANEL] pairs (k even in the lower half of a 32-bit lane, k odd in the upper), float32
// weights as [K][PANEL]. K is padded to even in bf16.
//
// Coded weights begin with 16 values, what codes of four bits stand for. A panel is [G][PANEL]
// scales and as many zero points, in float32, and then its codes: [K][PANEL] bytes, or of four bits
// [K][PANEL / 2], outputs 0 to 15 in the lower halves and 16 to 31 in the upper ones. A weight is
// (value of its code - zero point) * scale.

#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

constexpr int PANEL = 32;

enum DType : int32_t { F32 = 0, BF16 = 1, CODE4 = 2, CODE8 = 3, E4M3 = 4, E5M2 = 5 };

inline long size_of(DType type) { return type == BF16 ? 2 : 4; }

struct Weight {
  const void* data;
  DType type;
  long n;  // outputs
  long k;  // inputs
  long group = 0;  // inputs that share a scale, of coded weights

  bool coded() const { return type >= CODE4; }
  long groups() const { return (k + group - 1) / group; }
  long panels() const { return (n + PANEL - 1) / PANEL; }
  long panel_bytes() const {
    if (coded()) {
      const long codes = type == CODE4 ? k * PANEL / 2 : k * PANEL;
      return groups() * 2 * 4 * PANEL + (codes + 63) / 64 * 64;
    }
    return type == BF16 ? (k + 1) / 2 * 4 * PANEL : k * 4 * PANEL;
  }
  long header_bytes() const { return coded() ? CODED_HEADER : 0; }
  long bytes() const { return header_bytes() + panels() * panel_bytes(); }

  static constexpr long CODED_HEADER = 64;
};

// One panel of a coded weight.
struct Codes {
  DType type;
  long k;
  long group;
  const float* values;  // of CODE4; null: a code is its number
  const float* scales;  // [G][PANEL]
  const float* zeros;
  const uint8_t* codes;
};

// out[rows][PANEL] (+)= a[rows][k] · panel
struct Tile {
  const void* a;
  long lda;  // elements from row to row
  const void* panel;
  long k;  // as packed: even for bf16 panels
  float* out;
  long ldo;
  bool accumulate;       // onto what `out` holds
  const char* prefetch;  // what will be read next; any address will do
  long prefetch_step;    // bytes a step of the inner loop moves it by
};

enum Then : int32_t {
  STORE = 0,     // y[row][column] = x
  ADD = 1,       // y[row][column] += x, y in float32
  SILU_MUL = 2,  // the first half of the outputs is gate, the rest up: y = silu(gate) · up
};

// Where a product goes, and what happens to it on the way.
struct Sink {
  Then then;
  void* y;
  long ldy;
  DType y_type;
  const void* bias;  // of all outputs; may be null
  DType bias_type;
  long half;  // SILU_MUL: outputs of the gate
};

struct Norm {
  const void* weight;  // may be null: no normalisation
  DType type;
  float eps;
};

// A row of the fused projection: H queries, K keys, K values of E numbers.
struct QkvRow {
  const void* qkv;
  DType qkv_type;
  const float* cos_sin;  // R/2 cosines, then R/2 sines
  void* q;               // [H][E]; may be `qkv` itself
  DType q_type;
  void* k;  // this token's cells, [K][E] each
  void* v;
  DType kv_type;
};

struct Heads {
  int heads, kv_heads, head_dim;
};

struct Attention {
  const void* q;
  DType q_type;
  long q_stride;  // elements from token to token
  void* o;
  DType o_type;
  long o_stride;
  const void* k_cache;  // [N][P][K][E]
  const void* v_cache;
  DType kv_type;
  Heads shape;
  int block_tokens;
  int window;  // 0: none
  float scale;
};

// One query token over the positions begin..end of its sequence, all heads. The result is whole
// (`partial` null), or goes to `partial`: H maxima, H sums, then H · E weighted sums of values.
struct DecodeItem {
  const int32_t* table;
  long token;
  long begin, end;
  float* partial;
};

// `tokens` query tokens of one sequence, the first at `position`, for one KV head.
struct PrefillItem {
  const int32_t* table;
  long token;
  long position;
  int tokens;
  int kv_head;
};

struct Isa {
  const char* name;
  int level;
  int rows_max;   // of a tile
  bool bf16_dot;  // tile_bf_bf is there; otherwise bf16 activations are widened first

  void (*tile_bf_bf)(long rows, const Tile& tile);
  void (*tile_f_bf)(long rows, const Tile& tile);
  void (*tile_f_f)(long rows, const Tile& tile);
  // The panel's weights of the inputs first..last, as a panel of `to` (F32 or BF16), in `out`; an odd
  // number of them is filled up with zeros in BF16.
  void (*widen)(const Codes& codes, long first, long last, DType to, void* out);
  // out[rows][PANEL] = x[rows][k] · panel, for so few rows that the codes are better multiplied as
  // they are; null where they are not.
  int few_max;
  void (*few)(const Codes& codes, const void* x, DType x_type, long ldx, long rows, float* out);
  // `up`: the tile of the second half, of SILU_MUL.
  void (*sink)(const Sink& sink, const float* tile, const float* up, long rows, long row,
               long column, long columns);

  void (*convert)(const void* from, DType from_type, void* to, DType to_type, long n);
  // y = norm(x); with `residual`, residual += x first and y = norm(residual). x, residual: x_type.
  void (*rms_norm)(const void* x, DType x_type, void* residual, const Norm& norm, void* y,
                   DType y_type, long n);
  void (*silu_mul)(const void* gate, const void* up, void* y, DType type, long n);
  void (*rope_and_kv_write)(const QkvRow& row, const Heads& shape, int rotary_dim,
                            const Norm& q_norm, const Norm& k_norm);
  void (*decode)(const Attention& attention, const DecodeItem& item);
  void (*merge)(const Attention& attention, long token, const float* partials, int count);
  void (*prefill)(const Attention& attention, const PrefillItem& item);
};

// Floats of a partial result of `decode`.
inline long partial_floats(const Heads& shape) { return long(shape.heads) * (shape.head_dim + 2); }

const Isa* isa_baseline();
const Isa* isa_avx2();        // null where not compiled in
const Isa* isa_avx512();      // null where not compiled in
const Isa* isa_avx512bf16();  // null where not compiled in

// The level in use: the best that this CPU has, unless set_isa chose a lower one.
const Isa& isa();
int best_isa();
int set_isa(int level);

}  // namespace headrace
