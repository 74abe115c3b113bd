// The matrix product, panel by panel, and the packing of weights for it.

#include <cstring>

#include "team.h"

namespace headrace {

namespace {
constexpr int ROWS_MOST = 12;           // of any level's tiles
constexpr long PREFETCH_BYTES = 16384;  // of the next weight, by each thread
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

}  // namespace headrace
