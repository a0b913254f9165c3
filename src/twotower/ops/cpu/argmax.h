// The most probable token of each position and its probability, in one read of the logits.
#pragma once
#include "matmul.h"

// logits (positions, V). Token excluded[position / each] of a position is left out (−1 or null: none).
// Of equal logits the lowest id wins.
template <class T>
void argmax(const T* logits, const int64_t* excluded, int64_t* tokens, float* confidence, long positions, long each,
            long V, int threads) {
    parallel(threads, positions * V > (1 << 14), [&](int part, int parts) {
        Range own = partition(positions, part, parts);
        float* row = scratch(0, V + W);
        for (long i = own.lo; i < own.hi; i++) {
            upcast_row(logits + i * V, V, row);
            store(row + V, splat(-INFINITY));  // pads the row to whole vectors
            const long out = excluded ? excluded[i / each] : -1;
            if (out >= 0 && out < V) row[out] = -INFINITY;
            vec most = splat(-INFINITY);
            ivec place = {};  // per lane: the first vector that has the lane's maximum
            for (long v = 0; v < V; v += W) {
                const vec x = load(row + v);
                place = x > most ? ivec{} + int32_t(v) : place;
                most = x > most ? x : most;
            }
            const float best = max_lane(most);
            int64_t token = V;
            for (int l = 0; l < W; l++)
                if (most[l] == best) token = std::min(token, int64_t(place[l]) + l);
            vec total = {};
            for (long v = 0; v < V; v += W) total += exp(load(row + v) - best);
            tokens[i] = token < V ? token : 0;
            confidence[i] = 1.0f / sum(total);
        }
    });
}
