// The mixers of a tower's layers, as model/{attention,mamba2,moe}.py define them. Values are rounded where they are
// rounded there, so that a pass gives the same as its layers.
#pragma once
#include "attention.h"
#include "feed_forward.h"
#include "kv_append.h"
#include "mamba.h"
#include "norm.h"
#include "rope.h"
#include "routing.h"

enum Kind { MAMBA, ATTENTION, MOE, MLP, PARALLEL };
enum QKNorm { NO_QK_NORM, HEAD_NORM, WIDTH_NORM };

// The options of a layer; the same structure as `LayerOptions` in runners/layer_options.py. Absent options are neutral:
// factors 1, window, softcap and clip 0, rope −1.
struct LayerOptions {
    int64_t kind, heads, rope, window, qk_norm;
    int64_t width, activation, shared_width, shared_activation;  // of the MLP or the experts, and of the shared expert
    int64_t experts, groups, kept, top, normalise, scores, latent;
    int64_t gate_norm, scaled;  // Mamba-2; scaled: the parts of its projection have factors
    float scale, softcap, clip, gate_factor, shared_gate_factor, expert_factor, residual_factor;
    float dt_low, dt_high, parts[5];                                          // factors of z, x, B, C and dt
    float attention_input, attention_output, mamba_input, mamba_output;      // factors of PARALLEL
};

// What all layers share; the same structure as `PassOptions` in runners/layer_options.py.
struct PassOptions {
    int64_t rows, L, H, layers, modulation_stride, wide;  // wide: the residual stream is fp32, whatever the weights
    int64_t int8_activations;  // see `Matrix`
    int64_t mamba_heads, mamba_head_dim, mamba_groups, state_size, taps, kv_heads, head_dim;
    float eps, offset;  // of all norms
};

// Places of the weights of a layer; absent weights are null. See WEIGHT_PLACES in runners/weight_table.py.
enum WeightPlace {
    NORM, POST_NORM, Q_PROJ, K_PROJ = 4, V_PROJ = 6, O_PROJ = 8, Q_NORM = 10, K_NORM,                                   // attention
    IN_PROJ = 12, CONV = 14, CONV_BIAS, DT_BIAS, A_LOG, D_SKIP, GATED_NORM, OUT_PROJ,               // Mamba-2
    GATE = 2, UP = 4, DOWN = 6,                                                                     // MLP
    ROUTER = 2, ROUTER_BIAS, EXPERT_GATE, EXPERT_UP, EXPERT_DOWN, SHARED_GATE, SHARED_UP = 9, SHARED_DOWN = 11,
    SHARED_SCALE = 13, LATENT_IN, LATENT_OUT = 16,                                                  // MoE
    WEIGHTS = 22
};

// Places of the inputs and outputs of a layer in a pass. See runners/pass_tables.py.
enum InputPlace {
    SHIFT, SCALE, MODULATION_GATE, PAST_K, PAST_V, START, STRIDE, LENGTHS, OWN_K, OWN_V, WINDOW, STATE, XBC, STEP_X,
    STEP_DT, STEP_DECAY, STEP_B, INPUTS
};

// The four tables of adapters: the matrices a and b of each weight, unpacked and packed. Null without adapters.
struct AdapterTables {
    const void *const *a, *const *b, *const *packed_a, *const *packed_b;
    AdapterTables of(long weights) const { return {a + weights, b + weights, packed_a + weights, packed_b + weights}; }
};

template <class T> struct LayerWeights {
    const void *const *rows, *const *packed, *const *scales;
    AdapterTables adapters;
    bool int8_activations;
    const T* operator()(int i) const { return static_cast<const T*>(rows[i]); }
    const float* wide(int i) const { return static_cast<const float*>(rows[i]); }
    Matrix<T> matrix(int i) const {
        return {(*this)(i), packed[i], static_cast<const float*>(scales[i]), int8_activations};
    }
};

struct LayerInputs {
    const void* const* places;
    template <class V> V* at(int i) const { return static_cast<V*>(const_cast<void*>(places[i])); }
};

// x ↦ x · by over n values
template <class T> inline void multiply(T* x, float by, long n) {
    for (long i = 0; by != 1.0f && i < n; i += W) put(x + i, load<vec>(x + i, n - i) * by, n - i);
}

// x ↦ min(max(x, −limit), limit) over n values
template <class T> inline void clip(T* x, float limit, long n) {
    for (long i = 0; limit && i < n; i += W) {
        const vec v = load<vec>(x + i, n - i), low = v < -limit ? splat(-limit) : v;
        put(x + i, low > limit ? splat(limit) : low, n - i);
    }
}

// x ↦ x + y over n values; the factor of y is applied and rounded first
template <class T> inline void add(const T* y, float by, long n, T* x) {
    for (long i = 0; i < n; i += W)
        put(x + i, load<vec>(x + i, n - i) + rounded<T>(load<vec>(y + i, n - i) * by), n - i);
}

// One pass: what the mixers share. Buffers of several rows are scratch memory of the calling thread. prefix: the tokens of
// each row before its first mask, see `AttentionMetadata` in model/layer_io.py; null: adapters do not act.
// counts: how many tokens of each row the pass appends to the caches that it reads; null: none. slots: of the rows in the
// pools of Mamba states; null: all rows in order.
template <class T> struct Pass {
    const PassOptions& s;
    const Rotation* ropes;
    const uint8_t* token_mask;
    const int64_t *counts, *slots, *prefix;
    int causal, threads;
    TokenList adapted;
    long rank, tokens;
    RealTokens real;
    T *first, *second;            // buffers of `widest` values a token
    T* own_keys;                  // buffer of the keys and values of a layer that the caller does not want
    int64_t* topk_ids;
    float* topk_weights;

    Product<T> product(const LayerWeights<T>& w, int place, T* y, long N) const {
        return {w.matrix(place), w(place + 1), y, N, adapter(w, place)};
    }
    void project(const T* x, const LayerWeights<T>& w, int place, T* y, long K, long N) const {
        linears(x, {product(w, place, y, N)}, real, K, threads);
    }
    Adapter<T> adapter(const LayerWeights<T>& w, int place) const {
        if (!adapted.count || !rank || !w.adapters.a[place]) return {};
        const auto matrix = [&](const void* rows, const void* packed) {
            return Matrix<T>{static_cast<const T*>(rows), packed, nullptr};
        };
        const AdapterTables& own = w.adapters;
        return {matrix(own.a[place], own.packed_a[place]), matrix(own.b[place], own.packed_b[place]), rank, adapted};
    }
    void norm(const T* x, const T* weight, T* y, long count, long width) const {
        const T* none = nullptr;
        rms_norm(x, weight, none, none, y, count, width, 1, 0, 0, s.eps, s.offset, threads);
    }

    void attention_mixer(const T* x, const LayerWeights<T>& w, const LayerInputs& in, const LayerOptions& o, T* out) const {
        const long d = s.head_dim, wide = o.heads * d, narrow = s.kv_heads * d;
        T *q = first, *attended = first + tokens * wide, *k = in.at<T>(OWN_K), *v = in.at<T>(OWN_V);
        if (!k) k = own_keys, v = own_keys + tokens * narrow;
        T *past_k = in.at<T>(PAST_K), *past_v = in.at<T>(PAST_V);
        const KVLayout at{in.at<int64_t>(START), in.at<int64_t>(STRIDE), in.at<int64_t>(LENGTHS)};
        linears(x, {product(w, Q_PROJ, q, wide), product(w, K_PROJ, k, narrow), product(w, V_PROJ, v, narrow)}, real,
                s.H, threads);
        if (o.qk_norm == WIDTH_NORM) {
            norm(q, w(Q_NORM), q, tokens, wide);
            norm(k, w(K_NORM), k, tokens, narrow);
        }
        clip(q, o.clip, tokens * wide);
        clip(k, o.clip, tokens * narrow);
        clip(v, o.clip, tokens * narrow);
        const Rotation turn = o.rope < 0 ? Rotation{} : ropes[o.rope];
        const auto head = [&](int place) {
            return HeadNorm<T>{o.qk_norm == HEAD_NORM ? w(place) : nullptr, s.eps, s.offset};
        };
        if (o.qk_norm == HEAD_NORM || o.rope >= 0) {
            norm_and_rotate(q, head(Q_NORM), turn, q, tokens, o.heads, d, threads);
            norm_and_rotate(k, head(K_NORM), turn, k, tokens, s.kv_heads, d, threads);
        }
        attention(q, k, v, token_mask, prefix, causal, past_k, past_v, at, attended, s.rows, s.L, o.heads, s.kv_heads,
                  d, Scores{o.scale, o.softcap, o.window}, threads);
        if (counts) {
            kv_append(k, past_k, at, counts, s.rows, s.L, s.kv_heads, d);
            kv_append(v, past_v, at, counts, s.rows, s.L, s.kv_heads, d);
        }
        project(attended, w, O_PROJ, out, wide, s.H);
    }

    void mamba_mixer(const T* x, const LayerWeights<T>& w, const LayerInputs& in, const LayerOptions& o, T* out) const {
        const Mamba m{s.mamba_heads, s.mamba_head_dim, s.mamba_groups, s.state_size, s.taps, o.dt_low, o.dt_high, s.eps,
                      int(o.gate_norm)};
        const long inner = m.heads * m.P, groups = m.groups * m.N, width = 2 * inner + 2 * groups + m.heads;
        const long sizes[5] = {inner, inner, groups, groups, m.heads};
        project(x, w, IN_PROJ, first, s.H, width);
        for (long t = 0; o.scaled && t < tokens; t++)
            for (long part = 0, at = t * width; part < 5; at += sizes[part++])
                multiply(first + at, o.parts[part], sizes[part]);
        mamba_block(first, token_mask, in.at<T>(WINDOW), in.at<float>(STATE), slots, w(CONV),
                    w(CONV_BIAS), w.wide(DT_BIAS), w.wide(A_LOG), w.wide(D_SKIP), w(GATED_NORM), second, in.at<T>(XBC),
                    in.at<float>(STEP_X), in.at<float>(STEP_DT), in.at<float>(STEP_DECAY), in.at<float>(STEP_B), s.rows,
                    s.L, m, threads);
        project(second, w, OUT_PROJ, out, inner, s.H);
    }

    FeedForward<T> feed_forward(const LayerWeights<T>& w, int gate, int up, int down, long width, int activation,
                                float factor) const {
        return {w.matrix(gate), w.matrix(up), w.matrix(down), w(gate + 1), w(up + 1), w(down + 1), width, activation,
                factor, adapter(w, gate), adapter(w, up), adapter(w, down)};
    }

    void mlp_mixer(const T* x, const LayerWeights<T>& w, const LayerOptions& o, T* out) const {
        mlp(x, feed_forward(w, GATE, UP, DOWN, o.width, int(o.activation), o.gate_factor), out, real, s.H, threads);
    }

    void moe_mixer(const T* x, const LayerWeights<T>& w, const LayerOptions& o, T* out) const {
        const Router rule{o.experts, o.groups, o.kept, o.top, int(o.normalise), int(o.scores), o.expert_factor};
        route(x, w(ROUTER), w.wide(ROUTER_BIAS), topk_ids, topk_weights, tokens, s.H, rule, threads);
        const FeedForward<T> routed{w.matrix(EXPERT_GATE), w.matrix(EXPERT_UP), w.matrix(EXPERT_DOWN), nullptr, nullptr,
                                    nullptr, o.width, int(o.activation), o.gate_factor};
        if (o.latent) {
            project(x, w, LATENT_IN, first, s.H, o.latent);
            experts(first, topk_ids, topk_weights, routed, second, real, o.top, o.experts, o.latent, threads);
            project(second, w, LATENT_OUT, out, o.latent, s.H);
        } else {
            experts(x, topk_ids, topk_weights, routed, out, real, o.top, o.experts, s.H, threads);
        }
        if (o.shared_width) shared_expert(x, w, o, out);
    }

    // Adds the shared expert, times the sigmoid of its gate if it has one.
    void shared_expert(const T* x, const LayerWeights<T>& w, const LayerOptions& o, T* out) const {
        const FeedForward<T> shared = feed_forward(w, SHARED_GATE, SHARED_UP, SHARED_DOWN, o.shared_width,
                                                   int(o.shared_activation), o.shared_gate_factor);
        mlp(x, shared, second, real, s.H, threads);
        const Matrix<T> scale = w.matrix(SHARED_SCALE);
        const bool scaled = scale.rows || scale.packed;
        if (scaled) linear(x, scale, (const T*)nullptr, first, real, s.H, 1, threads);
        for (long t = 0; t < tokens; t++) {
            T by = {};
            if (scaled) put(&by, 1.0f / (1.0f + std::exp(-upcast(first[t]))));
            add(second + t * s.H, scaled ? upcast(by) : 1.0f, s.H, out + t * s.H);
        }
    }

    // Attention and Mamba-2 side by side. halves: buffers of 2 · tokens · H values.
    void parallel_mixer(const T* x, const LayerWeights<T>& w, const LayerInputs& in, const LayerOptions& o, T* out,
                        T* halves) const {
        const long n = tokens * s.H;
        T *input = halves, *other = halves + n;
        std::copy_n(x, n, input);
        multiply(input, o.attention_input, n);
        attention_mixer(input, w, in, o, out);
        std::copy_n(x, n, input);
        multiply(input, o.mamba_input, n);
        mamba_mixer(input, w, in, o, other);
        multiply(out, o.attention_output, n);
        add(other, o.mamba_output, n, out);
    }
};
