// Operations as a whole team runs them. Every thread of the team calls the same function with the
// same arguments; each ends with a barrier, so that the next may read its results.

#pragma once

#include "isa.h"
#include "pool.h"

namespace headrace {

struct Matrix {
  const void* data;
  DType type;
  long stride;  // elements from row to row
  long rows;
};

// sink.y = x · weight.T, then what the sink says. Types of x and weight: bf16 by bf16 only where
// isa().bf16_dot; float32 by either; coded weights by both. K is even where the weight is bf16. SILU_MUL: the gate has a
// multiple of PANEL outputs. `next` (may be null) is the weight of the next product: who waits for
// the others brings the start of his share of it into the cache.
void team_matmul(Team& team, const Matrix& x, const Weight& weight, const Sink& sink,
                 const Weight* next = nullptr);

void prefetch_share(const Team& team, const Weight* weight);

// dst is weight.panels() * weight.panel_bytes() long; row n of the weight is row rows[n] of `from`
// (null: row n).
void pack_weight(const void* from, DType from_type, long ld, const int64_t* rows,
                 const Weight& weight, void* to);

// `to` is weight.bytes() long. codes: [n][k] bytes, or of CODE4 [n][k / 2], input 2 j in the lower half
// of byte j; scales: [n][G]; zeros: as many (null: all zero); values: 16 (null: codes are numbers).
void pack_codes(const uint8_t* codes, const float* scales, const float* zeros, const float* values,
                const Weight& weight, void* to);

// The rows of a step, and how their attention is cut into pieces.
struct AttentionStep {
  const int32_t* row_start;  // position of the first query token of each row
  const int32_t* row_len;    // query tokens of each row
  const int32_t* table;      // [S][B]
  long table_stride;
  int rows;
};

struct Piece {
  const int32_t* table;
  long token;
  long begin, end;  // decode: positions; prefill: first position, query tokens
  int kv_head;      // -1: decode, all heads
  int part, parts;  // of a decode row
  long partial;     // floats into the partials
  long join;        // index of the row's counter of finished parts
};

// The pieces of a step, made once and used by all layers. Grows and never shrinks.
class AttentionPieces {
 public:
  AttentionPieces() = default;
  AttentionPieces(const AttentionPieces&) = delete;
  AttentionPieces& operator=(const AttentionPieces&) = delete;
  ~AttentionPieces();

  void plan(const AttentionStep& step, const Heads& shape, int window, int threads);

  Piece* pieces = nullptr;
  long count = 0;
  float* partials = nullptr;
  std::atomic<int>* joined = nullptr;

 private:
  long pieces_room_ = 0, partials_room_ = 0, joins_room_ = 0;
};

void team_attention(Team& team, const Attention& attention, AttentionPieces& pieces,
                    const Weight* next = nullptr);

}  // namespace headrace
