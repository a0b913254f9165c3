// Norms of the heads of queries and keys, and their rotary position embedding.
#pragma once
#include "matmul.h"

// The rotations of a pass: cosines and sines (tokens, pairs) of each token. If `start` is not null, they are those of
// each position (positions, pairs), and start has the first position of each row of `length` tokens. interleaved: pairs
// are neighbours (0, 1), (2, 3), …, not halves (0, pairs), (1, pairs + 1), ….
struct Rotation {
    const float *cos, *sin;
    const int64_t* start;
    long length, pairs, interleaved;
    long place(long token) const { return (start ? start[token / length] + token % length : token) * pairs; }
};

// Turns the first 2·pairs values of a head in place. The products of a value are fused by hand.
inline void turn_halves(float* x, const float* cos, const float* sin, long pairs) {
    for (long i = 0; i < pairs; i += W) {
        const long n = pairs - i;
        const vec a = load<vec>(x + i, n), b = load<vec>(x + pairs + i, n);
        const vec c = load<vec>(cos + i, n), s = load<vec>(sin + i, n);
        put(x + i, fmadd(a, c, -(b * s)), n);
        put(x + pairs + i, fmadd(b, c, a * s), n);
    }
}

inline void turn_neighbours(float* x, const float* cos, const float* sin, long pairs) {
    for (long i = 0; i < pairs; i += W) {
        const long n = pairs - i, low = 2 * n, high = low - W;
        const vec first = load<vec>(x + 2 * i, low), second = high > 0 ? load<vec>(x + 2 * i + W, high) : vec{};
        const vec a = evens(first, second), b = odds(first, second);
        const vec c = load<vec>(cos + i, n), s = load<vec>(sin + i, n);
        const vec turned = fmadd(a, c, -(b * s)), other = fmadd(b, c, a * s);
        put(x + 2 * i, interleave_low(turned, other), low);
        if (high > 0) put(x + 2 * i + W, interleave_high(turned, other), high);
    }
}

// RMSNorm over each head; weight null: no norm.
template <class T> struct HeadNorm { const T* weight; float eps, offset; };

// x ↦ x / rms(x) · (offset + weight) over n values in place.
template <class T> inline void norm_head(float* x, HeadNorm<T> norm, long n) {
    vec squares = {};
    for (long i = 0; i < n; i += W) {
        const vec v = load<vec>(x + i, n - i);
        squares = fmadd(v, v, squares);
    }
    const float by = 1.0f / std::sqrt(sum(squares) / n + norm.eps);
    for (long i = 0; i < n; i += W)
        put(x + i, load<vec>(x + i, n - i) * by * (norm.offset + load<vec>(norm.weight + i, n - i)), n - i);
}

// x (tokens, heads, D) → y: normed, then turned; computed in fp32. turn.cos null: not turned. x and y may be the same.
template <class T>
void norm_and_rotate(const T* x, HeadNorm<T> norm, Rotation turn, T* y, long tokens, long heads, long D, int threads) {
    parallel(threads, tokens * heads * D > MIN_PARALLEL_WORK, [&](int part, int parts) {
        const Range own = partition(tokens, part, parts);
        float* row = scratch(0, D + W);
        for (long at = own.lo * heads; at < own.hi * heads; at++) {
            upcast_row(x + at * D, D, row);
            if (norm.weight) norm_head(row, norm, D);
            const long place = turn.place(at / heads);
            if (turn.cos && turn.interleaved) turn_neighbours(row, turn.cos + place, turn.sin + place, turn.pairs);
            else if (turn.cos) turn_halves(row, turn.cos + place, turn.sin + place, turn.pairs);
            for (long i = 0; i < D; i += W) put(y + at * D + i, load(row + i), D - i);
        }
    });
}
