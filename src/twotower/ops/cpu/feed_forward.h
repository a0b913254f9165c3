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
    bool gated() const { return gate.rows || gate.packed; }
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
        return own;
    }
};

// inner[m][n] for units lo…hi of `up` and M tokens. The products and the result are rounded to R. gates: a buffer like
// `inner`, for a gate.
template <class R, class T>
inline void feed_inner(const FeedForward<T>& w, long lo, long hi, const Tokens& x, long M, long K, float* inner,
                       float* gates, long ld) {
    const long unit = w.up.packed ? PANEL : 1, from = lo * unit, count = std::min(hi * unit, w.width) - from;
    const auto into = [&](float* to) {
        return [=](long n, long m, auto v, long left) { put(to + m * ld + n, v, left); };
    };
    matmul(w.up, w.up_bias, lo, hi, x, M, K, w.width, into(inner));
    if (w.gated()) matmul(w.gate, w.gate_bias, lo, hi, x, M, K, w.width, into(gates));
    for (long m = 0; m < M; m++) {
        float *up = inner + m * ld + from, *gate = gates + m * ld + from;
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
            put(up + i, rounded<R>(v), count - i);
        }
    }
}

// Rounds a thread's share of the inner values, if `down` needs that, between two barriers.
inline void round_inner(const Tokens& inner, long M, long K, int part, int parts) {
    barrier(parts);
    if (!inner.rounded) return;
    round_tokens(inner.rows, inner.ld, partition(M, part, parts), K, inner.rounded);
    barrier(parts);
}

template <class T>
void mlp(const T* x, const FeedForward<T>& weights, T* y, long tokens, long H, int threads) {
    const FeedForward<T> w = weights.aligned();
    const long I = w.width, ldi = padded(I);
    const Tokens in = tokens_of(x, tokens, H, w.up.rounds() || w.gate.rounds(), threads);
    float* inner = scratch(1, tokens * ldi);
    const Tokens fed{inner, ldi, w.down.rounds() ? room_for_tokens(tokens, I, 6) : RoundedTokens{}};
    float* gates = scratch(2, w.gated() ? tokens * ldi : 0);
    for (long m = 0; m < tokens; m++) inner[m * ldi + I] = 0;  // as `padded_row`
    parallel(threads, tokens * I * H > MIN_PARALLEL_WORK, [&](int part, int parts) {
        Range own = partition(w.up.units(I), part, parts, w.up.packed ? 1 : 16);
        feed_inner<T>(w, own.lo, own.hi, in, tokens, H, inner, gates, ldi);
        round_inner(fed, tokens, I, part, parts);
        own = partition(w.down.units(H), part, parts, w.down.packed ? 1 : 16);
        matmul(w.down, w.down_bias, own.lo, own.hi, fed, tokens, I, H,
               [&](long n, long m, auto v, long left) { put(y + m * H + n, v, left); });
    });
}

// Mixture of experts: y[t] = Σ_j weight[t, j] · (expert topk_ids[t, j] of x[t]). Reads each selected expert's weights
// once.
template <class T>
void experts(const T* x, const int64_t* topk_ids, const float* weight, const FeedForward<T>& weights, T* y, long tokens,
             long top, long E, long H, int threads) {
    const FeedForward<T> w = weights.aligned();
    const long pairs = tokens * top, I = w.width, ldx = padded(H), ldi = padded(I);
    // Pairs grouped by expert; `place` is the position of each pair.
    static thread_local std::vector<long> start, place, list;
    start.assign(E + 1, 0);
    place.resize(pairs);
    list.clear();
    for (long p = 0; p < pairs; p++) start[topk_ids[p] + 1]++;
    for (long e = 0; e < E; e++) {
        if (start[e + 1]) list.push_back(e);
        start[e + 1] += start[e];
    }
    const bool rounds = w.up.rounds();  // the matrices of experts have one scheme
    float* gathered = scratch(1, pairs * ldx);
    float* inner = scratch(2, pairs * ldi);
    float* gates = scratch(4, w.gated() ? pairs * ldi : 0);
    float* parts_out = scratch(3, pairs * H);
    {
        std::vector<long> next(start.begin(), start.end() - 1);
        for (long p = 0; p < pairs; p++) {
            place[p] = next[topk_ids[p]]++;
            padded_row(x + p / top * H, H, gathered + place[p] * ldx);
            inner[p * ldi + I] = 0;
        }
    }
    Tokens in{gathered, ldx, {}}, fed{inner, ldi, {}};
    if (rounds) in.rounded = room_for_tokens(pairs, H, 5), fed.rounded = room_for_tokens(pairs, I, 6);
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
        if (rounds) {
            round_tokens(gathered, ldx, partition(pairs, part, parts), H, in.rounded);
            barrier(parts);
        }
        share(w.up.units(I), w.up.grain(), part, parts, [&](const auto& own, long first, long M, long lo, long hi) {
            feed_inner<float>(own, lo, hi, in.from(first), M, H, inner + first * ldi, gates + first * ldi, ldi);
        });
        round_inner(fed, pairs, I, part, parts);
        share(w.down.units(H), w.down.grain(), part, parts, [&](const auto& own, long first, long M, long lo, long hi) {
            matmul(own.down, (const T*)nullptr, lo, hi, fed.from(first), M, I, H,
                   [&](long h, long m, auto v, long left) { put(parts_out + (first + m) * H + h, v, left); });
        });
        barrier(parts);
        Range own = partition(tokens, part, parts);
        for (long t = own.lo; t < own.hi; t++)
            for (long h = 0; h < H; h++) {
                float total = 0;
                for (long j = 0; j < top; j++) total += weight[t * top + j] * parts_out[places[t * top + j] * H + h];
                put(y + t * H + h, total);
            }
    });
}
