// The C interface: each function for fp32 (type 0) and bf16 (type 1).
#include <type_traits>
#include "attention.h"
#include "argmax.h"
#include "decode.h"

#define BOTH(...)                                    \
    if (type == 0) { using T = float; __VA_ARGS__; } \
    else { using T = bf16; __VA_ARGS__; }
#define P(x) static_cast<const T*>(x)
#define Q(x) static_cast<T*>(x)
#define W_(w) Matrix<T>{P(w), w##_packed, w##_scale, int8_activations != 0}

extern "C" {
int vector_width() { return W; }  // floats per vector: tells which instruction set was compiled
int multiplies_bf16() { return BF16_PRODUCTS; }  // whether packed bf16 weights multiply tokens in bf16

// A weight w: unpacked (w), packed (w_packed) and the scales of packed int8 (w_scale); null if absent (see `Matrix`).
void linear_(int type, const void* x, const void* w, const void* w_packed, const float* w_scale, const void* bias,
             void* y, long M, long K, long N, int int8_activations, int threads) {
    BOTH(linear(P(x), W_(w), P(bias), Q(y), M, K, N, threads))
}

void pack_(int type, const void* w, void* packed, long matrices, long N, long K, int threads) {
    BOTH(pack(P(w), Q(packed), matrices, N, K, threads))
}

void experts_(int type, const void* x, const int64_t* topk_ids, const float* weight, const void* gate,
              const void* gate_packed, const float* gate_scale, const void* up, const void* up_packed,
              const float* up_scale, const void* down, const void* down_packed, const float* down_scale, void* y,
              long tokens, long top, long E, long I, long H, int activation, int int8_activations,
              int threads) {
    BOTH(const FeedForward<T> w{W_(gate), W_(up), W_(down), nullptr, nullptr, nullptr, I, activation};
         experts(P(x), topk_ids, weight, w, Q(y), tokens, top, E, H, threads))
}

void route_(int type, const void* x, const void* w, const float* bias, int64_t* topk_ids, float* weight, long tokens,
            long H, long E, long groups, long kept, long top, int normalise, int scores, float factor, int threads) {
    const Router rule{E, groups, kept, top, normalise, scores, factor};
    BOTH(route(P(x), P(w), bias, topk_ids, weight, tokens, H, rule, threads))
}

// out = act(gate) · up over n values, or act(up) if gate is null.
void activate_(int type, const void* up, const void* gate, void* out, long n, int activation, int threads) {
    BOTH(parallel(threads, n * 16 > MIN_PARALLEL_WORK, [&](int part, int parts) {
        const Range own = partition(n, part, parts, W);
        activate(P(up) + own.lo, gate ? P(gate) + own.lo : nullptr, Q(out) + own.lo, own.hi - own.lo, activation);
    }))
}

// The norms of the heads of q and k (weights or null), then their rotation (cos and sin or null).
void norm_and_rotate_(int type, const void* q, const void* k, const void* q_norm, const void* k_norm, const float* cos,
                      const float* sin, void* q_out, void* k_out, long tokens, long heads, long kv_heads, long D,
                      long pairs, int interleaved, float eps, float offset, int threads) {
    const Rotation turn{cos, sin, nullptr, 0, pairs, interleaved};
    BOTH(norm_and_rotate(P(q), HeadNorm<T>{P(q_norm), eps, offset}, turn, Q(q_out), tokens, heads, D, threads);
         norm_and_rotate(P(k), HeadNorm<T>{P(k_norm), eps, offset}, turn, Q(k_out), tokens, kv_heads, D, threads))
}

// wide: x is fp32 although the weights are bf16 (residual_in_fp32).
void rms_norm_(int type, int wide, const void* x, const void* weight, const void* shift, const void* scale, void* y,
               long tokens, long H, long each, long stride, int order, float eps, float offset, int threads) {
    if (wide && type) {
        using T = bf16;
        rms_norm(static_cast<const float*>(x), P(weight), P(shift), P(scale), Q(y), tokens, H, each, stride, order, eps,
                 offset, threads);
    } else {
        BOTH(rms_norm(P(x), P(weight), P(shift), P(scale), Q(y), tokens, H, each, stride, order, eps, offset, threads))
    }
}

void mamba_block_(int type, const void* projected, const uint8_t* token_mask, const void* window, const float* state,
                  const int64_t* slots, const void* conv_weight, const void* conv_bias, const float* dt_bias,
                  const float* A_log, const float* D, const void* norm_weight, void* mixed, void* xBC, float* x,
                  float* dt, float* decay, float* B, long rows, long L, long heads, long head_dim, long groups, long N,
                  long taps, float low, float high, float eps, int norm, int threads) {
    Mamba dims{heads, head_dim, groups, N, taps, low, high, eps, norm};
    BOTH(mamba_block(P(projected), token_mask, P(window), state, slots, P(conv_weight), P(conv_bias), dt_bias, A_log, D,
                     P(norm_weight), Q(mixed), Q(xBC), x, dt, decay, B, rows, L, dims, threads))
}

// parts: for each layer the pools (window, state) and the step inputs (xBC, x, dt, decay, B).
void state_update_(int type, long layers, void* const* parts, const int64_t* slots, const int64_t* accepted, long rows,
                   long L, long heads, long head_dim, long groups, long N, long taps, int threads) {
    Mamba dims{heads, head_dim, groups, N, taps, 0, 0, 0, AFTER_GATE};
    for (void* const* own = parts; own < parts + 7 * layers; own += 7) {
        const auto f = [&](int i) { return static_cast<float*>(own[i]); };
        BOTH(state_update(Q(own[0]), f(1), slots, P(own[2]), f(3), f(4), f(5), f(6), accepted, rows, L, dims, threads))
    }
}

// Appends the vectors of `parts` blocks (tokens, heads, D), rows of L tokens, to as many pools at the ends of the rows.
// counts: how many tokens of each row are appended.
void kv_append_(int type, long parts, void* const* pools, const void* const* blocks, const int64_t* start,
                const int64_t* stride, const int64_t* lengths, const int64_t* counts, long rows, long L, long heads,
                long D, int) {
    for (long part = 0; part < parts; part++)
        BOTH(kv_append(P(blocks[part]), Q(pools[part]), {start, stride, lengths}, counts, rows, L, heads, D))
}

void argmax_(int type, const void* logits, const int64_t* excluded, int64_t* tokens, float* confidence, long positions,
             long each, long V, int threads) {
    BOTH(argmax(P(logits), excluded, tokens, confidence, positions, each, V, threads))
}

void attention_(int type, const void* q, const void* k, const void* v, const uint8_t* token_mask,
                const int64_t* prefix, int causal, const void* past_k, const void* past_v, const int64_t* start, const int64_t* stride,
                const int64_t* lengths, void* out, long B, long L, long Hq, long Hkv, long D, float scale, float softcap,
                long window, int threads) {
    BOTH(attention(P(q), P(k), P(v), token_mask, prefix, causal, P(past_k), P(past_v), {start, stride, lengths}, Q(out), B, L,
                   Hq, Hkv, D, Scores{scale, softcap, window}, threads))
}

// x: the embedded tokens, overwritten by the residual stream. options: of each layer. ropes: a `Rotation` for each.
// counts, slots: see `Pass`.
void tower_(int type, void* x, const PassOptions* pass, const LayerOptions* options, const void* const* weights,
            const void* const* packed, const void* const* scales, const void* const* a, const void* const* b,
            const void* const* packed_a, const void* const* packed_b, long rank, const void* const* inputs,
            const Rotation* ropes, const void* norm_f, void* hidden, const uint8_t* token_mask, const int64_t* counts,
            const int64_t* slots, const int64_t* prefix, int causal, int threads) {
    const Tables tables{options, weights, packed, scales, inputs, ropes, {a, b, packed_a, packed_b}, rank};
    if (type && pass->wide) {
        using T = bf16;
        tower(static_cast<float*>(x), *pass, tables, P(norm_f), Q(hidden), token_mask, counts, slots, prefix, causal,
              threads);
    } else {
        BOTH(tower(static_cast<T*>(x), *pass, tables, P(norm_f), Q(hidden), token_mask, counts, slots, prefix, causal,
                   threads))
    }
}

// A decoding step of a tower; see decode.h for the arguments. wide: as in `PassOptions`.
#define DECODE(name, ...)                                                             \
    if (type && d->pass->wide) name<float, bf16>(*d, __VA_ARGS__, threads);           \
    else if (type) name<bf16, bf16>(*d, __VA_ARGS__, threads);                        \
    else name<float, float>(*d, __VA_ARGS__, threads);

void ar_steps_(int type, const Decoder* d, const int64_t* tokens, long steps, const int64_t* ends,
               const int64_t* end_ids, int64_t* chosen, float* confidence, int64_t* done, int threads) {
    DECODE(ar_steps, tokens, steps, ends, end_ids, chosen, confidence, done)
}

void read_drafts_(int type, const Decoder* d, const int64_t* tokens, const int64_t* counts, const int64_t* widths,
                  const int64_t* final, const float* least, int64_t* chosen, float* confidence, int64_t* accepted,
                  int threads) {
    DECODE(read_drafts, tokens, counts, widths, final, least, chosen, confidence, accepted)
}

void one_pass_rounds_(int type, const Decoder* d, const RoundRow* rows, const int64_t* tokens, const int64_t* counts,
                      long most, const int64_t* ends, const int64_t* end_ids, int64_t* chosen, float* confidence,
                      int64_t* accepted, int64_t* plans, int64_t* done, int threads) {
    DECODE(one_pass_rounds, rows, tokens, counts, most, ends, end_ids, chosen, confidence, accepted, plans, done)
}

void fill_blocks_(int type, const Decoder* d, const Blocks* blocks, const BlockRow* rows, long most, void* modulation,
                  int64_t* done, int threads) {
    DECODE(fill_blocks, *blocks, rows, most, modulation, done)
}
}
