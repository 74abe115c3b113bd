// A whole step of a decoder in one run of the team: no dispatch between the operations, barriers
// only where a thread reads what another wrote.

#include "kernels.h"

#include <cmath>
#include <memory>
#include <vector>

#include "team.h"

using namespace headrace;

namespace {

// So few rows are normalised by every thread for itself: that is faster than a barrier.
constexpr long ROWS_FOR_ONESELF = 3;

// Arrays of a step, kept from step to step. Only grows.
struct Workspace {
  void* memory = nullptr;
  size_t room = 0;

  char* of(size_t bytes) {
    if (room < bytes) {
      release(memory);
      room = bytes + bytes / 2;
      memory = allocate(room);
    }
    return static_cast<char*>(memory);
  }
};

long aligned(long bytes) { return (bytes + 63) / 64 * 64; }

Weight weight_of(const KernelsLinear& linear) {
  return Weight{linear.weight, DType(linear.type), long(linear.outputs), long(linear.inputs),
                long(linear.group)};
}

class Run {
 public:
  Run(const KernelsDecoder& decoder, const KernelsStep& step)
      : d_(decoder),
        s_(step),
        type_(DType(decoder.type)),
        act_(isa().bf16_dot ? type_ : F32),
        shape_{decoder.heads, decoder.kv_heads, decoder.head_dim},
        tokens_(long(step.tokens)),
        width_(long(decoder.head.inputs)),
        queries_(long(decoder.heads) * decoder.head_dim),
        columns_(queries_ + 2L * decoder.kv_heads * decoder.head_dim) {
    long mlp = 0;
    for (long i = 0; i < d_.layer_count; i++) {
      const long wide = long(d_.layers[i].down.inputs);
      mlp = wide > mlp ? wide : mlp;
      plan(long(d_.layers[i].window));
    }
    const long rows = tokens_ > s_.sampled_count ? tokens_ : long(s_.sampled_count);
    own_ = aligned(ROWS_FOR_ONESELF * width_ * size_of(act_));
    const long shared = aligned(rows * width_ * size_of(act_)), each = threads() * own_;
    const long sizes[] = {aligned(tokens_ * width_ * 4),
                          shared > each ? shared : each,
                          aligned(tokens_ * columns_ * 4),
                          aligned(tokens_ * queries_ * size_of(act_)),
                          aligned(tokens_ * queries_ * size_of(act_)),
                          aligned(tokens_ * mlp * size_of(act_)),
                          aligned(tokens_ * mlp * 2 * 4)};
    long total = 0;
    for (long size : sizes) total += size;
    static thread_local Workspace workspace;
    char* at = workspace.of(size_t(total));
    char** arrays[] = {&residual_, &normed_, &qkv_, &q_, &o_, &gated_, &gate_up_};
    for (int i = 0; i < 7; i++) {
      *arrays[i] = at;
      at += sizes[i];
    }
  }

  void operator()(Team& team) {
    const Weight first = weight_of(d_.layers[0].qkv);
    team.for_each(
        tokens_,
        [&](long t) {
          const char* row = static_cast<const char*>(d_.embedding) + s_.ids[t] * width_ * size_of(type_);
          isa().convert(row, type_, residual_ + t * width_ * 4, F32, width_);
        },
        [&] { prefetch_share(team, &first); });
    for (long i = 0; i < d_.layer_count; i++) {
      attention(team, d_.layers[i]);
      const KernelsLinear& next = i + 1 < d_.layer_count ? d_.layers[i + 1].qkv : d_.head;
      mlp(team, d_.layers[i], weight_of(next));
    }
    if (s_.sampled_count == 0) return;  // A chunk of a prompt, which goes on in a later step.
    const Matrix x = normed(team, d_.norm, long(s_.sampled_count), s_.sampled);
    team_matmul(team, x, weight_of(d_.head), into(STORE, s_.logits, d_.head));
  }

 private:
  struct Planned {
    long window;
    std::unique_ptr<AttentionPieces> pieces;
    bool fresh;
  };

  void plan(long window) {
    static thread_local std::vector<Planned> kept;
    if (plans_ == nullptr) {
      plans_ = &kept;
      for (Planned& planned : kept) planned.fresh = false;
    }
    Planned* found = nullptr;
    for (Planned& planned : kept)
      if (planned.window == window) found = &planned;
    if (found == nullptr) {
      kept.push_back(Planned{window, std::make_unique<AttentionPieces>(), false});
      found = &kept.back();
    }
    if (found->fresh) return;
    found->fresh = true;
    const AttentionStep step{s_.row_start, s_.row_len, s_.table, long(s_.table_stride), int(s_.rows)};
    found->pieces->plan(step, shape_, int(window), threads());
  }

  AttentionPieces& pieces(long window) const {
    for (Planned& planned : *plans_)
      if (planned.window == window) return *planned.pieces;
    __builtin_unreachable();  // the constructor planned every layer's window
  }

  Sink into(Then then, void* y, const KernelsLinear& linear) const {
    return Sink{then, y, long(linear.outputs), F32, linear.bias, type_, 0};
  }

  // Rows of the residual stream (those of `which`, or all), normalised.
  Matrix normed(Team& team, const void* weight, long rows, const int64_t* which) {
    const Norm norm{weight, type_, d_.eps};
    const bool alone = rows <= ROWS_FOR_ONESELF;
    char* to = normed_ + (alone ? team.rank * own_ : 0);
    const auto row = [&](long r) {
      const long t = which == nullptr ? r : long(which[r]);
      isa().rms_norm(residual_ + t * width_ * 4, F32, nullptr, norm, to + r * width_ * size_of(act_),
                     act_, width_);
    };
    if (alone)
      for (long r = 0; r < rows; r++) row(r);
    else
      team.for_each(rows, row);
    return Matrix{to, act_, width_, rows};
  }

  void attention(Team& team, const KernelsLayer& layer) {
    const Weight out = weight_of(layer.out);
    team_matmul(team, normed(team, layer.attention_norm, tokens_, nullptr), weight_of(layer.qkv),
                into(STORE, qkv_, layer.qkv));
    const long cell = long(d_.kv_heads) * d_.head_dim * size_of(type_);
    const Norm q_norm{layer.q_norm, type_, d_.eps}, k_norm{layer.k_norm, type_, d_.eps};
    // Every write of a layer comes before any read: rows of one step may share blocks.
    team.for_each(tokens_, [&](long t) {
      const QkvRow row{qkv_ + t * columns_ * 4,
                       F32,
                       s_.cos_sin + t * d_.head_dim,
                       q_ + t * queries_ * size_of(act_),
                       act_,
                       static_cast<char*>(layer.k_cache) + s_.cells[t] * cell,
                       static_cast<char*>(layer.v_cache) + s_.cells[t] * cell,
                       type_};
      isa().rope_and_kv_write(row, shape_, d_.head_dim, q_norm, k_norm);
    });
    const Attention work{q_,
                         act_,
                         queries_,
                         o_,
                         act_,
                         queries_,
                         layer.k_cache,
                         layer.v_cache,
                         type_,
                         shape_,
                         d_.block_tokens,
                         int(layer.window),
                         1.0f / std::sqrt(float(d_.head_dim))};
    team_attention(team, work, pieces(long(layer.window)), &out);
    const Weight gate_up = weight_of(layer.gate_up);
    team_matmul(team, Matrix{o_, act_, queries_, tokens_}, out, into(ADD, residual_, layer.out),
                &gate_up);
  }

  void mlp(Team& team, const KernelsLayer& layer, const Weight& next) {
    const long wide = long(layer.down.inputs);
    const Weight gate_up = weight_of(layer.gate_up), down = weight_of(layer.down);
    const Matrix x = normed(team, layer.mlp_norm, tokens_, nullptr);
    if (wide % PANEL == 0) {
      const Sink sink{SILU_MUL, gated_, wide, act_, layer.gate_up.bias, type_, wide};
      team_matmul(team, x, gate_up, sink, &down);
    } else {
      team_matmul(team, x, gate_up, into(STORE, gate_up_, layer.gate_up), &down);
      team.for_each(tokens_, [&](long t) {
        float* gate = reinterpret_cast<float*>(gate_up_) + t * 2 * wide;
        isa().silu_mul(gate, gate + wide, gate, F32, wide);
        isa().convert(gate, F32, gated_ + t * wide * size_of(act_), act_, wide);
      });
    }
    team_matmul(team, Matrix{gated_, act_, wide, tokens_}, down, into(ADD, residual_, layer.down),
                &next);
  }

  const KernelsDecoder& d_;
  const KernelsStep& s_;
  const DType type_, act_;  // of parameters and caches; of what products take
  const Heads shape_;
  const long tokens_, width_, queries_, columns_;
  std::vector<Planned>* plans_ = nullptr;
  long own_ = 0;  // bytes of normed rows that a thread makes for itself
  char *residual_ = nullptr, *normed_ = nullptr, *qkv_ = nullptr, *q_ = nullptr, *o_ = nullptr,
       *gated_ = nullptr, *gate_up_ = nullptr;
};

}  // namespace

void kernels_decoder(const KernelsDecoder* decoder, const KernelsStep* step) {
  if (step->tokens == 0) return;
  Run run(*decoder, *step);
  run_team(run);
}
