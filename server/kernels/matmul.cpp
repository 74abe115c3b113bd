// The matrix product, panel by panel, and the packing of weights for it.

#include <cstring>

#include "team.h"

namespace headrace {

namespace {
constexpr int ROWS_MOST = 12;           // of any level's tiles
constexpr long PREFETCH_BYTES = 16384;  // of the next weight, by each thread
// Of a coded weight: inputs that are widened at once, and rows that share them.
constexpr long STRIP = 128;
constexpr long STRIP_ROWS = 96;
// Reading codes so many times is faster than widening them once.
constexpr long FEW_TIMES = 3;

Codes codes_of(const Weight& weight, long panel) {
  const char* base = static_cast<const char*>(weight.data);
  const float* values = reinterpret_cast<const float*>(base);
  const char* at = base + weight.header_bytes() + panel * weight.panel_bytes();
  const float* scales = reinterpret_cast<const float*>(at);
  const float* zeros = scales + weight.groups() * PANEL;
  const auto* codes = reinterpret_cast<const uint8_t*>(zeros + weight.groups() * PANEL);
  // Codes that are their own numbers have no values: all of them are zero.
  bool numbers = true;
  for (int i = 0; i < 16; i++) numbers = numbers && values[i] == 0;
  const float* table = weight.type != CODE4 || numbers ? nullptr : values;
  return Codes{weight.type, weight.k, weight.group, table, scales, zeros, codes};
}

// x · panel.T in `out`, of up to STRIP_ROWS rows from `row` on.
void coded_panel(const Isa& with, const Matrix& x, const Codes& codes, long row, long rows,
                 float* out) {
  const long size = size_of(x.type);
  const char* from = static_cast<const char*>(x.data) + row * x.stride * size;
  if (rows <= FEW_TIMES * with.few_max) {
    for (long done = 0, some; done < rows; done += some) {
      some = rows - done < with.few_max ? rows - done : with.few_max;
      with.few(codes, from + done * x.stride * size, x.type, x.stride, some, out + done * PANEL);
    }
    return;
  }
  alignas(64) float strip[STRIP * PANEL];
  const auto run = x.type == BF16 ? with.tile_bf_bf : with.tile_f_f;
  const long tiles = (rows + with.rows_max - 1) / with.rows_max;
  for (long first = 0; first < codes.k; first += STRIP) {
    const long last = first + STRIP < codes.k ? first + STRIP : codes.k;
    with.widen(codes, first, last, x.type, strip);
    Tile tile{};
    tile.lda = x.stride;
    tile.panel = strip;
    tile.k = x.type == BF16 ? (last - first + 1) / 2 * 2 : last - first;
    tile.ldo = PANEL;
    tile.accumulate = first > 0;
    tile.prefetch = reinterpret_cast<const char*>(out);
    for (long t = 0, done = 0; t < tiles; t++) {
      const long some = rows * (t + 1) / tiles - done;
      tile.a = from + (done * x.stride + first) * size;
      tile.out = out + done * PANEL;
      run(some, tile);
      done += some;
    }
  }
}

void coded_matmul(Team& team, const Matrix& x, const Weight& weight, const Sink& sink,
                  const Weight* next) {
  const Isa& with = isa();
  const bool pairs = sink.then == SILU_MUL;
  const long columns_all = pairs ? weight.n / 2 : weight.n;
  team.for_each((columns_all + PANEL - 1) / PANEL, [&](long panel) {
    alignas(64) float out[STRIP_ROWS * PANEL], up[STRIP_ROWS * PANEL];
    const Codes codes = codes_of(weight, panel);
    const long column = panel * PANEL;
    const long columns = columns_all - column < PANEL ? columns_all - column : PANEL;
    for (long row = 0; row < x.rows; row += STRIP_ROWS) {
      const long rows = x.rows - row < STRIP_ROWS ? x.rows - row : STRIP_ROWS;
      coded_panel(with, x, codes, row, rows, out);
      if (pairs)
        coded_panel(with, x, codes_of(weight, panel + columns_all / PANEL), row, rows, up);
      with.sink(sink, out, up, rows, row, column, columns);
    }
  }, [&] { prefetch_share(team, next); });
}
}

void prefetch_share(const Team& team, const Weight* weight) {
  if (weight == nullptr) return;
  const char* first = static_cast<const char*>(weight->data) +
                      weight->panels() * team.rank / team.size * weight->panel_bytes();
  for (long at = 0; at < PREFETCH_BYTES; at += 64) __builtin_prefetch(first + at, 0, 2);
}

void team_matmul(Team& team, const Matrix& x, const Weight& weight, const Sink& sink,
                 const Weight* next) {
  if (x.rows == 0) return;  // a chunk in the middle of a prompt wants no logits
  if (weight.coded()) return coded_matmul(team, x, weight, sink, next);
  const Isa& with = isa();
  const auto run = x.type == BF16        ? with.tile_bf_bf
                   : weight.type == BF16 ? with.tile_f_bf
                                         : with.tile_f_f;
  const long bytes = weight.panel_bytes();
  const long tiles = (x.rows + with.rows_max - 1) / with.rows_max;
  // A gate is multiplied with its up: an item is a panel of either.
  const bool pairs = sink.then == SILU_MUL;
  const long columns_all = pairs ? weight.n / 2 : weight.n;
  const long up_offset = columns_all / PANEL * bytes;
  team.for_each((columns_all + PANEL - 1) / PANEL, [&](long panel) {
    alignas(64) float out[ROWS_MOST * PANEL], up[ROWS_MOST * PANEL];
    const char* packed = static_cast<const char*>(weight.data) + panel * bytes;
    Tile tile{};
    tile.lda = x.stride;
    tile.k = weight.type == BF16 ? (weight.k + 1) / 2 * 2 : weight.k;
    tile.ldo = PANEL;
    const long column = panel * PANEL;
    const long columns = columns_all - column < PANEL ? columns_all - column : PANEL;
    // The tiles of one panel read the next panel ahead, each its share.
    tile.prefetch_step = 4 * PANEL / tiles;
    for (long t = 0, row = 0; t < tiles; t++) {
      const long rows = x.rows * (t + 1) / tiles - row;
      const long ahead = bytes + t * bytes / tiles;
      tile.a = static_cast<const char*>(x.data) + row * x.stride * size_of(x.type);
      tile.panel = packed;
      tile.prefetch = packed + ahead;
      tile.out = out;
      run(rows, tile);
      if (pairs) {
        tile.panel = packed + up_offset;
        tile.prefetch = packed + up_offset + ahead;
        tile.out = up;
        run(rows, tile);
      }
      with.sink(sink, out, up, rows, row, column, columns);
      row += rows;
    }
  }, [&] { prefetch_share(team, next); });
}

void pack_weight(const void* from, DType from_type, long ld, const int64_t* rows,
                 const Weight& weight, void* to) {
  const Isa& with = isa();
  auto body = [&](Team& team) {
    team.for_each(weight.panels(), [&](long panel) {
      char* out = static_cast<char*>(to) + panel * weight.panel_bytes();
      std::memset(out, 0, size_t(weight.panel_bytes()));
      char* line = static_cast<char*>(scratch(size_t(weight.k) * 4 + 8));
      for (long c = 0; c < PANEL && panel * PANEL + c < weight.n; c++) {
        const long row = rows == nullptr ? panel * PANEL + c : rows[panel * PANEL + c];
        if (row < 0) continue;
        const char* source = static_cast<const char*>(from) + row * ld * size_of(from_type);
        std::memset(line, 0, size_t(weight.k) * 4 + 8);
        with.convert(source, from_type, line, weight.type, weight.k);
        const long steps = weight.type == BF16 ? (weight.k + 1) / 2 : weight.k;
        for (long k = 0; k < steps; k++)
          std::memcpy(out + (k * PANEL + c) * 4, line + k * 4, 4);
      }
    });
  };
  run_team(body);
}

void pack_codes(const uint8_t* codes, const float* scales, const float* zeros, const float* values,
                const Weight& weight, void* to) {
  char* header = static_cast<char*>(to);
  std::memset(header, 0, size_t(weight.header_bytes()));
  if (values != nullptr) std::memcpy(header, values, 16 * sizeof(float));
  const long groups = weight.groups(), width = weight.type == CODE4 ? weight.k / 2 : weight.k;
  auto body = [&](Team& team) {
    team.for_each(weight.panels(), [&](long panel) {
      char* out = header + weight.header_bytes() + panel * weight.panel_bytes();
      std::memset(out, 0, size_t(weight.panel_bytes()));
      float* scale = reinterpret_cast<float*>(out);
      float* zero = scale + groups * PANEL;
      auto* packed = reinterpret_cast<uint8_t*>(zero + groups * PANEL);
      for (long c = 0; c < PANEL && panel * PANEL + c < weight.n; c++) {
        const long n = panel * PANEL + c;
        for (long g = 0; g < groups; g++) {
          scale[g * PANEL + c] = scales[n * groups + g];
          if (zeros != nullptr) zero[g * PANEL + c] = zeros[n * groups + g];
        }
        const uint8_t* row = codes + n * width;
        if (weight.type != CODE4) {
          for (long k = 0; k < weight.k; k++) packed[k * PANEL + c] = row[k];
          continue;
        }
        for (long k = 0; k < weight.k; k++) {
          const uint8_t code = k % 2 == 0 ? row[k / 2] & 15 : row[k / 2] >> 4;
          packed[k * (PANEL / 2) + c % (PANEL / 2)] |= c < PANEL / 2 ? code : uint8_t(code << 4);
        }
      }
    });
  };
  run_team(body);
}

}  // namespace headrace
