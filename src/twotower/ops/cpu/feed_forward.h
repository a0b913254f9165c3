// MLPs and mixtures of experts: down(act(gate·x · gate_factor) · up·x), or down(act(up·x)) without a gate.
#pragma once
#include "activation.h"
#include "matmul.h"

// The weights of an MLP, or of all experts stacked. gate: absent if `gated` is false.
template <class T> struct FeedForward {
    Matrix<T> gate, up, down;
    const T *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
    long width;  // outputs of `up`
    int activation;
    float gate_factor = 1.0f;
    Adapter<T> gate_adapter = {}, up_adapter = {}, down_adapter = {};
    bool gated() const { return gate.rows || gate.packed; }
    // Of the tokens of `gate` and `up`, and of those of `down`.
    int forms() const { return up.form() | (gated() ? gate.form() : 0) | up_adapter.forms() | gate_adapter.forms(); }
    int inner_forms() const { return down.form() | down_adapter.forms(); }
    FeedForward of(long expert, long H) const {
        FeedForward own = *this;
        if (gated()) own.gate = gate.of(expert, width, H);
        own.up = up.of(expert, width, H);
        own.down = down.of(expert, H, width);
        return own;
    }
    // The same weights with `gate` and `up` both packed or both not, so that a unit is the same rows of both.
    FeedForward aligned() const {
        FeedForward own = *this;
        if (gated() && !gate.packed != !up.packed) own.gate.packed = own.up.packed = nullptr;
        own.gate_adapter = gate_adapter.with(own.gate);
        own.up_adapter = up_adapter.with(own.up);
        own.down_adapter = down_adapter.with(own.down);
        return own;
    }
};

constexpr long PART = 1 << 14;  // values of `up` that a thread computes before the activation: they stay in the cache

// Writes the columns of units lo…hi of `up` to `inner`, for M tokens. The products and the result are rounded to R.
// part: a buffer of the calling thread. low_up, low_gate: a·x of adapters.
template <class R, class T>
inline void feed_inner(const FeedForward<T>& w, long lo, long hi, const Tokens& x, long M, long K, const Tokens& inner,
                       int part, const Tokens& low_up = {}, const Tokens& low_gate = {}) {
    const long unit = w.up.packed ? PANEL : 1;
    const long step = std::max(PART / std::max(M, 1L), 12L * PANEL) / unit, ld = step * unit;  // units of a part
    for (long at = lo; at < hi; at += step) {
        const long end = std::min(hi, at + step), from = at * unit, count = std::min(end * unit, w.width) - from;
        float *ups = scratch(part, 2 * M * ld), *gates = ups + M * ld;
        const auto into = [&](float* to) {
            return [=](long n, long m, auto v, long left) { put(to + m * ld + n - from, v, left); };
        };
        matmul(w.up, w.up_bias, at, end, x, M, K, w.width, into(ups));
        if (w.gated()) matmul(w.gate, w.gate_bias, at, end, x, M, K, w.width, into(gates));
        if (w.up_adapter) w.up_adapter.expand(low_up, w.up, at, end, w.width, M, ups, ld, from);
        if (w.gate_adapter) w.gate_adapter.expand(low_gate, w.gate, at, end, w.width, M, gates, ld, from);
        for (long m = 0; m < M; m++) {
            const float *up = ups + m * ld, *gate = gates + m * ld;
            for (long i = 0; i < count; i += W) {
                const vec u = rounded<R>(load<vec>(up + i, count - i));
                vec v = u;
                if (w.gated()) {
                    v = rounded<R>(load<vec>(gate + i, count - i));
                    if (w.gate_factor != 1.0f) v = rounded<R>(v * w.gate_factor);
                    v = activated(v, w.activation) * u;
                } else {
                    v = activated(u, w.activation);
                }
                inner.put(m, from + i, rounded<R>(v), count - i);
            }
        }
    }
}

// Rounds a thread's share of the inner values, if `down` needs that, between two barriers.
inline void round_inner(const Tokens& inner, long M, long K, int part, int parts) {
    barrier(parts);
    if (!inner.rounded) return;
    inner.round(partition(M, part, parts), K);
    barrier(parts);
}

template <class T>
void mlp(const T* x, const FeedForward<T>& weights, T* y, RealTokens real, long H, int threads) {
    const FeedForward<T> w = weights.aligned();
    const long I = w.width, tokens = real.count;
    real.clear_padding(y, H);
    const Tokens in = tokens_of(x, real, H, w.forms(), threads);
    const Tokens inner = new_tokens(1, 6, tokens, I, w.inner_forms());
    for (long m = 0; m < tokens; m++) inner.end_row(m, I);
    const Adapter<T>&a = w.up_adapter, &b = w.gate_adapter, &c = w.down_adapter;
    const Tokens low_up = a ? a.room(0) : Tokens{}, low_gate = b ? b.room(1) : Tokens{}, low = c ? c.room(2) : Tokens{};
    const Tokens adapted = a || b ? (a ? a : b).places.gathered(in, H) : Tokens{};
    parallel(threads, tokens * I * H > MIN_PARALLEL_WORK, [&](int part, int parts) {
        a.reduce(adapted, H, low_up, part, parts);
        b.reduce(adapted, H, low_gate, part, parts);
        if (adapted) barrier(parts);
        Range own = partition(w.up.units(I), part, parts, w.up.packed ? 1 : 16);
        feed_inner<T>(w, own.lo, own.hi, in, tokens, H, inner, 2, low_up, low_gate);
        round_inner(inner, tokens, I, part, parts);
        if (c) {
            c.reduce(c.places.gathered(inner, I), I, low, part, parts);
            barrier(parts);
        }
        own = partition(w.down.units(H), part, parts, w.down.packed ? 1 : 16);
        matmul(w.down, w.down_bias, own.lo, own.hi, inner, tokens, I, H,
               [&](long n, long m, auto v, long left) { put(y + real[m] * H + n, v, left); });
        if (c) c.expand(low, w.down, own.lo, own.hi, H, real, y, H);
    });
}

// Mixture of experts: y[t] = Σ_j weight[t, j] · (expert topk_ids[t, j] of x[t]). Reads the weights of each expert that a
// real token selects once.
template <class T>
void experts(const T* x, const int64_t* topk_ids, const float* weight, const FeedForward<T>& weights, T* y,
             RealTokens real, long top, long E, long H, int threads) {
    const FeedForward<T> w = weights.aligned();
    const long tokens = real.count, pairs = tokens * top, I = w.width;
    const auto expert = [&](long pair) { return topk_ids[real[pair / top] * top + pair % top]; };
    real.clear_padding(y, H);
    // Pairs grouped by expert; `place` is the position of each pair.
    static thread_local std::vector<long> start, place, list;
    start.assign(E + 1, 0);
    place.resize(pairs);
    list.clear();
    for (long p = 0; p < pairs; p++) start[expert(p) + 1]++;
    for (long e = 0; e < E; e++) {
        if (start[e + 1]) list.push_back(e);
        start[e + 1] += start[e];
    }
    const Tokens gathered = new_tokens(1, 5, pairs, H, w.forms()), inner = new_tokens(2, 6, pairs, I, w.down.form());
    float* parts_out = scratch(3, pairs * H);
    {
        std::vector<long> next(start.begin(), start.end() - 1);
        for (long p = 0; p < pairs; p++) {
            place[p] = next[expert(p)]++;
            gathered.set_row(place[p], x + real[p / top] * H, H);
            inner.end_row(p, I);
        }
    }
    // Pointers, because other threads would see their own instances of the thread_local vectors.
    const long *starts = start.data(), *places = place.data(), *active = list.data();
    const long count = long(list.size());
    // Calls each(expert, first pair, pairs, lo, hi) for a thread's share of the units of all active experts.
    const auto share = [&](long units, long grain, int part, int parts, auto each) {
        const Range own = partition(count * units, part, parts, grain);
        for (long at = own.lo; at < own.hi;) {
            const long e = active[at / units], lo = at % units, hi = std::min(units, lo + own.hi - at);
            each(w.of(e, H), starts[e], starts[e + 1] - starts[e], lo, hi);
            at += hi - lo;
        }
    };
    parallel(threads, pairs * H * I > MIN_PARALLEL_WORK, [&](int part, int parts) {
        if (gathered.rounded) {
            gathered.round(partition(pairs, part, parts), H);
            barrier(parts);
        }
        share(w.up.units(I), w.up.grain(), part, parts, [&](const auto& own, long first, long M, long lo, long hi) {
            feed_inner<float>(own, lo, hi, gathered.from(first), M, H, inner.from(first), 4);
        });
        round_inner(inner, pairs, I, part, parts);
        share(w.down.units(H), w.down.grain(), part, parts, [&](const auto& own, long first, long M, long lo, long hi) {
            matmul(own.down, (const T*)nullptr, lo, hi, inner.from(first), M, I, H,
                   [&](long h, long m, auto v, long left) { put(parts_out + (first + m) * H + h, v, left); });
        });
        barrier(parts);
        Range own = partition(tokens, part, parts);
        for (long i = own.lo; i < own.hi; i++)
            for (long h = 0; h < H; h++) {
                const float* by = weight + real[i] * top;
                float total = 0;
                for (long j = 0; j < top; j++) total += by[j] * parts_out[places[i * top + j] * H + h];
                put(y + real[i] * H + h, total);
            }
    });
}
