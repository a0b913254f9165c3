// The most probable token of each position and its probability, in one read of the logits.
#pragma once
#include "simd.h"

// logits (positions, V); token excluded[position / each] is left out (−1: none). Of equal logits the lowest id wins.
template <class T>
void choose(const T* logits, const int64_t* excluded, int64_t* tokens, float* confidence, long positions, long each, long V,
            int threads) {
    parallel(threads, positions * V > (1 << 14), [&](int part, int parts) {
        Range own = share(positions, part, parts);
        for (long i = own.lo; i < own.hi; i++) {
            const T* row = logits + i * V;
            const long out = excluded[i / each];
            vec most = splat(-INFINITY);
            long v = 0;
            for (; v + W <= V; v += W) {
                vec x = load(row + v);
                if (out >= v && out < v + W) x[out - v] = -INFINITY;
                most = x > most ? x : most;
            }
            float best = -INFINITY;
            for (int l = 0; l < W; l++) best = std::max(best, most[l]);
            for (; v < V; v++) if (v != out) best = std::max(best, widen(row[v]));
            vec total = {};
            for (v = 0; v + W <= V; v += W) {
                vec x = load(row + v);
                if (out >= v && out < v + W) x[out - v] = -INFINITY;
                total += exp(x - best);
            }
            float sum_ = sum(total);
            for (; v < V; v++) if (v != out) sum_ += std::exp(widen(row[v]) - best);
            for (v = 0; v < V && (v == out || widen(row[v]) != best); v++) {}
            tokens[i] = v < V ? v : 0;
            confidence[i] = 1.0f / sum_;
        }
    });
}
