// The router of a mixture of experts.
#pragma once
#include "matmul.h"

enum RouterScores { SIGMOID, SOFTMAX };  // as ROUTER_SCORES in kernels.py

// How experts are selected, see `Routing` in reference/routing.py.
struct Router { long experts, groups, kept, top; int normalise, scores; float factor; };

// The logits of E experts become scores in place.
inline void router_scores(float* score, long E, int kind) {
    float total = 0;
    const float most = kind == SOFTMAX ? *std::max_element(score, score + E) : 0;
    for (long e = 0; e < E; e++) {
        score[e] = kind == SOFTMAX ? std::exp(score[e] - most) : 1.0f / (1.0f + std::exp(-score[e]));
        total += score[e];
    }
    for (long e = 0; kind == SOFTMAX && e < E; e++) score[e] /= total;
}

// Sets the scores of all but the `kept` best groups to 0. best: a buffer of `groups` floats.
inline void mask_groups(float* ranked, long E, long groups, long kept, float* best) {
    const long size = E / groups;
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

// Scores, selection by score + bias (within the best groups), weights of the selected experts. bias: null: 0.
// topk_ids, weight (tokens, top): best first; of equal scores the lower expert id wins.
template <class T>
void route(const T* x, const T* w, const float* bias, int64_t* topk_ids, float* weight, long tokens, long H,
           const Router& rule, int threads) {
    const long E = rule.experts, top = rule.top;
    const Tokens in = tokens_of(x, tokens, H, WIDE, threads);
    float* scores = scratch(1, tokens * E);
    parallel(threads, tokens * H * E > MIN_PARALLEL_WORK, [&](int part, int parts) {
        Range own = partition(E, part, parts, 4);
        dot_rows(w, H, own.lo, own.hi, in.wide, in.ld, tokens, H,
                 [&](long e, long t, auto v) { put(scores + t * E + e, v); });
    });
    float* ranked = scratch(2, E + rule.groups);
    for (long t = 0; t < tokens; t++) {
        float* score = scores + t * E;
        router_scores(score, E, rule.scores);
        for (long e = 0; e < E; e++) ranked[e] = bias ? score[e] + bias[e] : score[e];
        if (rule.groups > 1) mask_groups(ranked, E, rule.groups, rule.kept, ranked + E);
        float total = 0;
        for (long j = 0; j < top; j++) {
            long at = 0;
            for (long e = 1; e < E; e++) if (ranked[e] > ranked[at]) at = e;
            ranked[at] = -INFINITY;
            topk_ids[t * top + j] = at;
            total += weight[t * top + j] = score[at];
        }
        const float by = rule.normalise ? rule.factor / (total + 1e-20f) : rule.factor;
        for (long j = 0; j < top; j++) weight[t * top + j] *= by;
    }
}
