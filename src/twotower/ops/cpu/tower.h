// All layers of a tower in one call, in the order of model/tower.py.
#pragma once
#include "layers.h"

// The weights, inputs and options of all layers.
struct Tables {
    const LayerOptions* options;
    const void *const *weights, *const *packed, *const *scales, *const *inputs;
    const Rotation* ropes;
    AdapterTables adapters;
    long rank;  // of adapters
};

// The tokens that token_mask marks; null: all.
inline RealTokens real_tokens(const PassOptions& s, const uint8_t* token_mask) {
    static thread_local std::vector<long> list;
    if (!token_mask) return {s.rows * s.L};
    list.clear();
    for (long t = 0; t < s.rows * s.L; t++)
        if (token_mask[t]) list.push_back(t);
    return {list, s.rows * s.L};
}

// The tokens from the first mask of each row on, at which adapters act. prefix null: none.
inline TokenList adapted_places(const PassOptions& s, RealTokens real, const int64_t* prefix) {
    static thread_local std::vector<long> list;
    list.clear();
    for (long i = 0; prefix && i < real.count; i++)
        if (real[i] % s.L >= prefix[real[i] / s.L]) list.push_back(i);
    return {list.data(), long(list.size())};
}

// x += y · factor · gate, per token of H values; each product is rounded to T before the next. gate null: 1. In fp32, the
// product with the gate and the sum are rounded once.
template <class X, class T> inline void add_gated(const T* y, float factor, const T* gate, long n, X* x) {
    for (long i = 0; i < n; i += W) {
        vec v = load<vec>(y + i, n - i);
        const vec before = load<vec>(x + i, n - i);
        if (factor != 1.0f) v = rounded<T>(v * factor);
        if (!gate) v = before + v;
        else if constexpr (std::is_same_v<T, float>) v = fmadd(v, load<vec>(gate + i, n - i), before);
        else v = before + rounded<T>(v * load<vec>(gate + i, n - i));
        put(x + i, v, n - i);
    }
}

// y = x · (1 + scale) + shift, for a layer without a norm of its input; shift null: y = x.
template <class X, class T> inline void modulate(const X* x, const T* shift, const T* scale, T* y, long n) {
    for (long i = 0; i < n; i += W) {
        vec v = load<vec>(x + i, n - i);
        if (shift) {
            const vec by = rounded<T>(1.0f + load<vec>(scale + i, n - i));
            v = rounded<T>(v * by) + load<vec>(shift + i, n - i);
        }
        put(y + i, v, n - i);
    }
}

// The largest number of values a token that a layer keeps in a buffer of `Pass`.
inline long widest(const PassOptions& s, const LayerOptions* options) {
    const long inner = s.mamba_heads * s.mamba_head_dim;
    long most = std::max(s.H, 2 * inner + 2 * s.mamba_groups * s.state_size + s.mamba_heads);
    for (const LayerOptions* o = options; o < options + s.layers; o++)
        most = std::max({most, 2 * o->heads * s.head_dim, o->latent});
    return most;
}

template <class T>
Pass<T> new_pass(const PassOptions& s, const Tables& tables, const uint8_t* token_mask, const int64_t* counts,
                 const int64_t* slots, const int64_t* prefix, int causal, int threads) {
    const long tokens = s.rows * s.L, width = widest(s, tables.options);
    const RealTokens real = real_tokens(s, token_mask);
    long top = 1;
    for (long i = 0; i < s.layers; i++) top = std::max(top, tables.options[i].top);
    return {s, tables.ropes, token_mask, counts, slots, prefix, causal, threads, adapted_places(s, real, prefix),
            tables.rank, tokens, real,
            reinterpret_cast<T*>(scratch(10, tokens * width)), reinterpret_cast<T*>(scratch(11, tokens * width)),
            reinterpret_cast<T*>(scratch(15, 2 * tokens * s.kv_heads * s.head_dim)),
            reinterpret_cast<int64_t*>(scratch(12, 2 * tokens * top)), scratch(13, tokens * top)};
}

// x: the residual stream (tokens, H), overwritten. hidden: the result, after the last norm.
template <class X, class T>
void tower(X* x, const PassOptions& s, const Tables& tables, const T* norm_f, T* hidden, const uint8_t* token_mask,
           const int64_t* counts, const int64_t* slots, const int64_t* prefix, int causal, int threads) {
    const Pass<T> pass = new_pass<T>(s, tables, token_mask, counts, slots, prefix, causal, threads);
    const long tokens = pass.tokens, H = s.H;
    T* normed = reinterpret_cast<T*>(scratch(8, tokens * H));
    T* out = reinterpret_cast<T*>(scratch(9, 3 * tokens * H));  // and the halves of PARALLEL
    for (long layer = 0; layer < s.layers; layer++) {
        const LayerOptions& o = tables.options[layer];
        const LayerWeights<T> w{tables.weights + layer * WEIGHTS, tables.packed + layer * WEIGHTS,
                                tables.scales + layer * WEIGHTS, tables.adapters.of(layer * WEIGHTS),
                                s.int8_activations != 0};
        const LayerInputs in{tables.inputs + layer * INPUTS};
        const T *shift = in.at<T>(SHIFT), *scale = in.at<T>(SCALE), *gate = in.at<T>(MODULATION_GATE);
        const bool before = o.kind == MAMBA || o.kind == ATTENTION || o.kind == PARALLEL;
        if (w(NORM))
            rms_norm(x, w(NORM), shift, scale, normed, tokens, H, s.L, s.modulation_stride, !shift ? 0 : before ? 1 : 2,
                     s.eps, s.offset, threads);
        for (long t = 0; !w(NORM) && t < tokens; t++) {
            const long row = t / s.L * s.modulation_stride;
            modulate(x + t * H, shift ? shift + row : nullptr, scale ? scale + row : nullptr, normed + t * H, H);
        }
        switch (o.kind) {
            case MAMBA: pass.mamba_mixer(normed, w, in, o, out); break;
            case ATTENTION: pass.attention_mixer(normed, w, in, o, out); break;
            case MOE: pass.moe_mixer(normed, w, o, out); break;
            case PARALLEL: pass.parallel_mixer(normed, w, in, o, out, out + tokens * H); break;
            default: pass.mlp_mixer(normed, w, o, out);
        }
        if (w(POST_NORM)) pass.norm(out, w(POST_NORM), out, tokens, H);
        for (long t = 0; t < tokens; t++)
            add_gated(out + t * H, o.residual_factor, gate ? gate + t / s.L * s.modulation_stride : nullptr, H,
                      x + t * H);
    }
    rms_norm(x, norm_f, (const T*)nullptr, (const T*)nullptr, hidden, tokens, H, 1, 0, 0, s.eps, s.offset, threads);
}
