// The C interface: single operations.

#include "kernels.h"

#include <vector>

#include "team.h"

using namespace headrace;

namespace {

// Few rows are not worth waking anybody for.
constexpr int64_t NUMBERS_WORTH_A_TEAM = 32 * 1024;

template <class Body>
void for_rows(int64_t rows, int64_t width, Body body) {
  if (rows * width < NUMBERS_WORTH_A_TEAM) {
    for (int64_t row = 0; row < rows; row++) body(row);
    return;
  }
  auto run = [&](Team& team) { team.for_each(rows, body); };
  run_team(run);
}

const char* at(const void* base, int64_t elements, int32_t type) {
  return static_cast<const char*>(base) + elements * size_of(DType(type));
}
char* at(void* base, int64_t elements, int32_t type) {
  return static_cast<char*>(base) + elements * size_of(DType(type));
}

}  // namespace

int32_t kernels_version() { return KERNELS_VERSION; }
int32_t kernels_best_isa() { return best_isa(); }
int32_t kernels_set_isa(int32_t level) { return set_isa(level); }
const char* kernels_isa_name() { return isa().name; }
int32_t kernels_set_threads(int32_t threads) { return set_threads(threads); }

void* kernels_allocate(size_t bytes) { return allocate(bytes); }
void kernels_release(void* memory) { release(memory); }

int64_t kernels_packed_bytes(int64_t n, int64_t k, int32_t type) {
  const Weight weight{nullptr, DType(type), n, k, 0};
  return weight.panels() * weight.panel_bytes();
}

int64_t kernels_coded_bytes(int64_t n, int64_t k, int64_t group, int32_t type) {
  return Weight{nullptr, DType(type), n, k, group}.bytes();
}

void kernels_pack_codes(const void* codes, const float* scales, const float* zeros,
                        const float* values, int64_t n, int64_t k, int64_t group, int32_t type,
                        void* to) {
  const Weight weight{to, DType(type), n, k, group};
  pack_codes(static_cast<const uint8_t*>(codes), scales, zeros, values, weight, to);
}

void kernels_pack(const void* from, int32_t from_type, int64_t ld, const int64_t* rows, int64_t n,
                  int64_t k, int32_t type, void* to) {
  pack_weight(from, DType(from_type), ld, rows, Weight{to, DType(type), n, k, 0}, to);
}

void kernels_matmul(const void* x, int32_t x_type, int64_t ldx, int64_t m, const void* weight,
                    int32_t weight_type, int64_t n, int64_t k, int64_t group, const void* bias,
                    void* y) {
  const Weight packed{weight, DType(weight_type), n, k, group};
  const Sink sink{STORE, y, n, DType(x_type), bias, DType(x_type), 0};
  Matrix from{x, DType(x_type), ldx, m};
  // bf16 is taken as it is where it can be multiplied with bf16, in whole pairs; else widened.
  const bool dot = isa().bf16_dot && weight_type != F32 && x_type == BF16;
  const bool direct = dot ? k % 2 == 0 : x_type == F32 && (weight_type != BF16 || k % 2 == 0);
  const DType type = dot ? BF16 : F32;
  const int64_t wide = (k + 1) / 2 * 2;
  static thread_local std::vector<char> widened;
  if (!direct) {
    widened.assign(size_t(m * wide * size_of(type)), 0);
    from = Matrix{widened.data(), type, wide, m};
  }
  char* to = widened.data();
  auto run = [&](Team& team) {
    if (!direct)
      team.for_each(m, [&](long row) {
        isa().convert(at(x, row * ldx, x_type), DType(x_type), at(to, row * wide, type), type, k);
      });
    team_matmul(team, from, packed, sink);
  };
  run_team(run);
}

void kernels_rms_norm(const void* x, void* residual, const void* weight, float eps, int32_t type,
                      int64_t rows, int64_t width, void* y) {
  const Norm norm{weight, DType(type), eps};
  for_rows(rows, width, [&](long row) {
    void* sum = residual == nullptr ? nullptr : at(residual, row * width, type);
    isa().rms_norm(at(x, row * width, type), DType(type), sum, norm, at(y, row * width, type),
                   DType(type), width);
  });
}

void kernels_silu_mul(const void* x, int32_t type, int64_t rows, int64_t width, void* y) {
  for_rows(rows, 2 * width, [&](long row) {
    const char* gate = at(x, 2 * row * width, type);
    isa().silu_mul(gate, at(gate, width, type), at(y, row * width, type), DType(type), width);
  });
}

void kernels_rope_and_kv_write(void* qkv, const float* cos_sin, void* k_cache, void* v_cache,
                               const int64_t* cells, int32_t type, int64_t tokens, int32_t heads,
                               int32_t kv_heads, int32_t head_dim, int32_t rotary_dim,
                               const void* q_norm, const void* k_norm, float eps) {
  const Heads shape{heads, kv_heads, head_dim};
  const int64_t columns = int64_t(heads + 2 * kv_heads) * head_dim;
  const int64_t cell = int64_t(kv_heads) * head_dim;
  const DType t = DType(type);
  for_rows(tokens, columns, [&](long token) {
    char* row = at(qkv, token * columns, type);
    const QkvRow work{row,
                      t,
                      cos_sin + token * rotary_dim,
                      row,
                      t,
                      at(k_cache, cells[token] * cell, type),
                      at(v_cache, cells[token] * cell, type),
                      t};
    isa().rope_and_kv_write(work, shape, rotary_dim, Norm{q_norm, t, eps}, Norm{k_norm, t, eps});
  });
}

void kernels_attention(const KernelsAttention* a) {
  static thread_local AttentionPieces pieces;
  const DType type = DType(a->type);
  const Heads shape{a->heads, a->kv_heads, a->head_dim};
  const AttentionStep step{a->row_start, a->row_len, a->table, long(a->table_stride), a->rows};
  const Attention attention{a->q,
                            type,
                            long(a->q_stride),
                            a->o,
                            type,
                            long(a->heads) * a->head_dim,
                            a->k_cache,
                            a->v_cache,
                            type,
                            shape,
                            a->block_tokens,
                            a->window,
                            a->scale};
  AttentionPieces& planned = pieces;
  planned.plan(step, shape, a->window, threads());
  auto run = [&](Team& team) { team_attention(team, attention, planned); };
  run_team(run);
}
