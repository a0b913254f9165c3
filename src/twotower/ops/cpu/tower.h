// All layers of a tower in one call: the functions of the other files in the order of model/tower.py.
#pragma once
#include "attention.h"
#include "feed_forward.h"
#include "mamba.h"
#include "norm.h"
#include "rope.h"
#include "routing.h"

enum Kind { MAMBA, ATTENTION, MOE, MLP };

// The weights and inputs of a layer by index, see runners/weight_table.py. Weights, packed copies and scales are null
// if absent (see `Matrix`); the inputs belong to one pass.
constexpr int WEIGHTS = 12, INPUTS = 12;

struct Shape {
    long rows, L, H, layers, order_stride, wide;           // wide: the residual stream is fp32, whatever the weights
    Mamba mamba;
    long heads, kv_heads, head_dim;                         // attention
    long experts, groups, kept, top, inner, shared, normalise;  // mixture of experts
    float factor;
    long mlp;                                               // width of a plain MLP
    float norm_eps;
};

// x += y
template <class T> inline void add(const T* y, long n, T* x) {
    long i = 0;
    for (; i + W <= n; i += W) store(x + i, load(x + i) + load(y + i));
    for (; i < n; i++) put(x + i, upcast(x[i]) + upcast(y[i]));
}

// x += y · gate; the product is rounded to T before the sum. gate null: x += y.
template <class X, class T> inline void add_gated(const T* y, const T* gate, long n, X* x) {
    long i = 0;
    for (; i + W <= n; i += W)
        store(x + i, load(x + i) + (gate ? rounded<T>(load(y + i) * load(gate + i)) : load(y + i)));
    for (; i < n; i++) {
        T part = y[i];
        if (gate) put(&part, upcast(part) * upcast(gate[i]));
        put(x + i, upcast(x[i]) + upcast(part));
    }
}

template <class X, class T>
void tower(X* x, const int64_t* kinds, const void* const* weights, const void* const* packed, const void* const* scales,
           const void* const* inputs, const T* norm_f, T* hidden, const uint8_t* token_mask, int causal,
           const int64_t* start, const int64_t* stride, const int64_t* lengths, const Shape& s, int threads) {
    const long tokens = s.rows * s.L, H = s.H, d = s.head_dim;
    const Mamba& m = s.mamba;
    const long inner = m.heads * m.P, C = inner + 2 * m.groups * m.N;
    const long widest = std::max({inner + C + m.heads, 2 * s.heads * d, s.shared, s.mlp, H});
    T* normed = reinterpret_cast<T*>(scratch(8, tokens * H));
    T* out = reinterpret_cast<T*>(scratch(9, tokens * H));
    T* first = reinterpret_cast<T*>(scratch(10, tokens * widest));
    T* second = reinterpret_cast<T*>(scratch(11, tokens * std::max(widest, H)));
    int64_t* topk_ids = reinterpret_cast<int64_t*>(scratch(12, 2 * tokens * std::max(s.top, 1L)));
    float* topk_weights = scratch(13, tokens * std::max(s.top, 1L));
    long representative = 0;  // index of the representative token: a valid token, if any
    while (token_mask && representative < tokens - 1 && !token_mask[representative]) representative++;
    if (token_mask && !token_mask[representative]) representative = 0;
    for (long layer = 0; layer < s.layers; layer++) {
        const auto w = [&](int i) { return static_cast<const T*>(weights[layer * WEIGHTS + i]); };
        const auto wide = [&](int i) { return static_cast<const float*>(weights[layer * WEIGHTS + i]); };
        const auto matrix = [&](int i) {
            return Matrix<T>{w(i), packed[layer * WEIGHTS + i], static_cast<const float*>(scales[layer * WEIGHTS + i])};
        };
        const auto in = [&](int i) { return const_cast<void*>(inputs[layer * INPUTS + i]); };
        const T *shift = static_cast<T*>(in(0)), *scale = static_cast<T*>(in(1)), *gate = static_cast<T*>(in(2));
        const int kind = int(kinds[layer]);
        const int order = !shift ? 0 : kind == MAMBA || kind == ATTENTION ? 1 : 2;
        rms_norm(x, w(0), shift, scale, normed, tokens, H, s.L, s.order_stride, order, s.norm_eps, 0, threads);
        if (kind == MAMBA) {
            linear(normed, matrix(1), w(2), first, tokens, H, inner + C + m.heads, threads);
            mamba_block(first, token_mask, static_cast<const T*>(in(3)), static_cast<const float*>(in(4)),
                        (const int64_t*)nullptr, w(3), w(4), wide(5), wide(6), wide(7), w(8), second,
                        static_cast<T*>(in(5)), static_cast<float*>(in(6)), static_cast<float*>(in(7)),
                        static_cast<float*>(in(8)), static_cast<float*>(in(9)), s.rows, s.L, m, threads);
            linear(second, matrix(9), w(10), out, tokens, inner, H, threads);
        } else if (kind == ATTENTION) {
            T *q = first, *attended = first + tokens * s.heads * d;
            T *k = static_cast<T*>(in(5)), *v = static_cast<T*>(in(6));
            linear(normed, matrix(1), w(2), q, tokens, H, s.heads * d, threads);
            linear(normed, matrix(3), w(4), k, tokens, H, s.kv_heads * d, threads);
            linear(normed, matrix(5), w(6), v, tokens, H, s.kv_heads * d, threads);
            attention(q, k, v, token_mask, causal, static_cast<const T*>(in(3)), static_cast<const T*>(in(4)), start,
                      stride, lengths, attended, s.rows, s.L, s.heads, s.kv_heads, d, Scores{}, threads);
            linear(attended, matrix(7), w(8), out, tokens, s.heads * d, H, threads);
        } else if (kind == MOE) {
            const Router rule{s.experts, s.groups, s.kept, s.top, int(s.normalise), SIGMOID, s.factor};
            route(normed, w(1), wide(2), topk_ids, topk_weights, tokens, H, rule, threads);
            for (long t = 0; token_mask && t < tokens; t++)  // padding loads no extra weights
                if (!token_mask[t]) std::copy_n(topk_ids + representative * s.top, s.top, topk_ids + t * s.top);
            const FeedForward<T> routed{{}, matrix(3), matrix(4), nullptr, nullptr, nullptr, s.inner, RELU2};
            experts(normed, topk_ids, topk_weights, routed, out, tokens, s.top, s.experts, H, threads);
            const FeedForward<T> shared{{}, matrix(5), matrix(7), nullptr, w(6), w(8), s.shared, RELU2};
            mlp(normed, shared, second, tokens, H, threads);
            add(second, tokens * H, out);
        } else {
            const FeedForward<T> own{{}, matrix(1), matrix(3), nullptr, w(2), w(4), s.mlp, RELU2};
            mlp(normed, own, out, tokens, H, threads);
        }
        for (long t = 0; t < tokens; t++)
            add_gated(out + t * H, gate ? gate + t / s.L * s.order_stride : nullptr, H, x + t * H);
    }
    rms_norm(x, norm_f, (const T*)nullptr, (const T*)nullptr, hidden, tokens, H, 1, 0, 0, s.norm_eps, 0, threads);
}
