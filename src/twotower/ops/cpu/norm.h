// RMSNorm with the modulation before or after it, and the router.
#pragma once
#include "matmul.h"

// y = x̂ / rms(x̂) · weight. order 0: no modulation; 1: x̂ = x·(1 + scale) + shift; 2: modulation after the norm.
// shift, scale (tokens / each, H): one row per `each` tokens.
template <class X, class T>
void rms_norm(const X* x, const T* weight, const T* shift, const T* scale, T* y, long tokens, long H, long each,
              long stride, int order, float eps, int threads) {
    parallel(threads, tokens * H > MIN_PARALLEL_WORK, [&](int part, int parts) {
        Range own = partition(tokens, part, parts);
        float* row = scratch(0, H + W);
        for (long t = own.lo; t < own.hi; t++) {
            const T *plus = shift + t / each * stride, *times = scale + t / each * stride;
            vec squares = {};
            long h = 0;
            for (; h + W <= H; h += W) {
                vec v = load(x + t * H + h);
                if (order == 1) v = v * (1.0f + load(times + h)) + load(plus + h);
                squares += v * v;
                store(row + h, v);
            }
            float total = sum(squares);
            for (; h < H; h++) {
                float v = upcast(x[t * H + h]);
                if (order == 1) v = v * (1.0f + upcast(times[h])) + upcast(plus[h]);
                total += v * v;
                row[h] = v;
            }
            float by = 1.0f / std::sqrt(total / H + eps);
            for (h = 0; h + W <= H; h += W) {
                vec v = load(row + h) * by * load(weight + h);
                if (order == 2) v = v * (1.0f + load(times + h)) + load(plus + h);
                store(y + t * H + h, v);
            }
            for (; h < H; h++) {
                float v = row[h] * by * upcast(weight[h]);
                if (order == 2) v = v * (1.0f + upcast(times[h])) + upcast(plus[h]);
                put(y + t * H + h, v);
            }
        }
    });
}

// Sigmoid router: scores, selection by score + bias (within the best groups), weights of the selected experts.
// topk_ids, weight (tokens, top): best first; of equal scores the lower expert id wins.
template <class T>
void route(const T* x, const T* w, const float* bias, int64_t* topk_ids, float* weight, long tokens, long H, long E,
           long groups, long kept, long top, int normalise, float factor, int threads) {
    const float* in = upcast_rows(x, tokens, H, 0);
    float* scores = scratch(1, tokens * E);
    parallel(threads, tokens * H * E > MIN_PARALLEL_WORK, [&](int part, int parts) {
        Range own = partition(E, part, parts, 4);
        dot_rows(w, H, own.lo, own.hi, in, padded(H), tokens, H,
                 [&](long e, long t, auto v) { put(scores + t * E + e, v); });
    });
    float* ranked = scratch(2, E + groups);
    float* best = ranked + E;
    for (long t = 0; t < tokens; t++) {
        float* score = scores + t * E;
        for (long e = 0; e < E; e++) {
            score[e] = 1.0f / (1.0f + std::exp(-score[e]));
            ranked[e] = score[e] + bias[e];
        }
        long size = E / groups;
        if (groups > 1) {
            for (long g = 0; g < groups; g++) {  // a group's score: the sum of its two best
                float first = -INFINITY, second = -INFINITY;
                for (long e = g * size; e < (g + 1) * size; e++) {
                    if (ranked[e] > first) { second = first; first = ranked[e]; }
                    else if (ranked[e] > second) second = ranked[e];
                }
                best[g] = size > 1 ? first + second : first;
            }
            for (long g = 0; g < groups; g++) {
                long better = 0;
                for (long o = 0; o < groups; o++) better += best[o] > best[g] || (best[o] == best[g] && o < g);
                if (better >= kept)
                    for (long e = g * size; e < (g + 1) * size; e++) ranked[e] = 0;  // 0, not −∞, as published
            }
        }
        float total = 0;
        for (long j = 0; j < top; j++) {
            long at = 0;
            for (long e = 1; e < E; e++) if (ranked[e] > ranked[at]) at = e;
            ranked[at] = -INFINITY;
            topk_ids[t * top + j] = at;
            total += weight[t * top + j] = score[at];
        }
        float by = normalise ? factor / (total + 1e-20f) : factor;
        for (long j = 0; j < top; j++) weight[t * top + j] *= by;
    }
}
