// How a step's attention is cut into pieces that keep every thread busy.

#include "team.h"

#include <cstdlib>
#include <new>

namespace headrace {

namespace {

constexpr long PREFILL_ROWS = 96;  // query rows (tokens times heads of a group) of a piece
constexpr long PART_LEAST = 64;    // positions of a part of a decode row
constexpr int PIECES_PER_THREAD = 3;

template <class T>
void grow(T*& array, long& room, long wanted) {
  if (wanted <= room) return;
  std::free(array);
  room = wanted + wanted / 2;
  array = static_cast<T*>(std::malloc(size_t(room) * sizeof(T)));
  if (array == nullptr) throw std::bad_alloc();
}

long least(long a, long b) { return a < b ? a : b; }
long most(long a, long b) { return a > b ? a : b; }

}  // namespace

AttentionPieces::~AttentionPieces() {
  std::free(pieces);
  std::free(partials);
  std::free(static_cast<void*>(joined));
}

void AttentionPieces::plan(const AttentionStep& step, const Heads& shape, int window, int threads) {
  const long group = shape.heads / shape.kv_heads;
  const long tile = most(1, PREFILL_ROWS / group);
  const auto seen = [&](int row) {
    const long context = step.row_start[row] + long(step.row_len[row]);
    return window > 0 ? least(window, context) : context;
  };
  long total = 0, room = 0;
  for (int row = 0; row < step.rows; row++) {
    total += seen(row) * step.row_len[row];
    room += step.row_len[row] == 1 ? 0 : (step.row_len[row] + tile - 1) / tile * shape.kv_heads;
  }
  // A decode row is cut where it is longer than a fair share of the work.
  const long part = threads == 1 ? total + 1
                                 : most(PART_LEAST, (total + threads * PIECES_PER_THREAD - 1) /
                                                        (threads * PIECES_PER_THREAD));
  const auto parts_of = [&](int row) { return (seen(row) + part - 1) / part; };
  long partial_count = 0, joins = 0;
  for (int row = 0; row < step.rows; row++) {
    if (step.row_len[row] != 1) continue;
    const long parts = parts_of(row);
    room += parts;
    if (parts > 1) partial_count += parts, joins++;
  }
  grow(pieces, pieces_room_, room);
  grow(partials, partials_room_, partial_count * partial_floats(shape));
  grow(joined, joins_room_, joins);
  for (long i = 0; i < joins; i++) new (joined + i) std::atomic<int>(0);

  count = 0;
  long token = 0, partial = 0, join = 0;
  for (int row = 0; row < step.rows; row++) {
    const int32_t* table = step.table + row * step.table_stride;
    const long start = step.row_start[row], tokens = step.row_len[row];
    if (tokens == 1) {
      const long parts = parts_of(row), context = start + 1, first = context - seen(row);
      for (long p = 0; p < parts; p++) {
        Piece& piece = pieces[count++];
        piece = Piece{};
        piece.table = table;
        piece.token = token;
        piece.begin = first + (context - first) * p / parts;
        piece.end = first + (context - first) * (p + 1) / parts;
        piece.kv_head = -1;
        piece.part = int(p);
        piece.parts = int(parts);
        piece.partial = partial;
        piece.join = join;
        if (parts > 1) partial += partial_floats(shape);
      }
      if (parts > 1) join++;
    } else {
      for (long at = 0; at < tokens; at += tile)
        for (int kv = 0; kv < shape.kv_heads; kv++) {
          Piece& piece = pieces[count++];
          piece = Piece{};
          piece.table = table;
          piece.token = token + at;
          piece.begin = start + at;
          piece.end = least(tile, tokens - at);
          piece.kv_head = kv;
        }
    }
    token += tokens;
  }
}

void team_attention(Team& team, const Attention& attention, AttentionPieces& pieces,
                    const Weight* next) {
  const Isa& with = isa();
  team.for_each(pieces.count, [&](long index) {
    const Piece& piece = pieces.pieces[index];
    if (piece.kv_head >= 0) {
      with.prefill(attention, {piece.table, piece.token, piece.begin, int(piece.end), piece.kv_head});
      return;
    }
    float* partial = piece.parts > 1 ? pieces.partials + piece.partial : nullptr;
    with.decode(attention, {piece.table, piece.token, piece.begin, piece.end, partial});
    if (partial == nullptr) return;
    // Whoever finishes the last part of a row joins them, and leaves the counter ready for the
    // next layer.
    if (pieces.joined[piece.join].fetch_add(1) + 1 < piece.parts) return;
    pieces.joined[piece.join].store(0);
    const long size = partial_floats(attention.shape);
    with.merge(attention, piece.token, partial - piece.part * size, piece.parts);
  }, [&] { prefetch_share(team, next); });
}

}  // namespace headrace
