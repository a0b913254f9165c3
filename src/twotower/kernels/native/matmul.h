// Dot products of weight rows with a few tokens: what a pass of up to some dozens of tokens is made of. Weights are read
// once, as they lie (out, in), in whatever type they have; every token's result is the same whatever stands beside it.
#pragma once
#include "simd.h"

#ifdef __AVX512F__
constexpr int TILE_ROWS = 4, TILE_TOKENS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_TOKENS = 2;
#endif

template <int R, int M, class T, class Put>
inline void dots(const T* w, long ldw, const float* x, long ldx, long K, bool ahead, Put put) {
    vec acc[R][M] = {};
    long k = 0;
    for (; k + W <= K; k += W) {
        vec weights[R];
        for (int r = 0; r < R; r++) {
            weights[r] = load(w + r * ldw + k);
            if (ahead) __builtin_prefetch(w + (r + R) * ldw + k);
        }
        for (int m = 0; m < M; m++) {
            const vec token = load(x + m * ldx + k);
            for (int r = 0; r < R; r++) acc[r][m] += weights[r] * token;
        }
    }
    constexpr int COLUMNS = M == 3 ? 4 : M;  // a power of two
    vec all[R * COLUMNS];
    for (int m = 0; m < COLUMNS; m++)
        for (int r = 0; r < R; r++) all[m * R + r] = m < M ? acc[r][m < M ? m : 0] : vec{};
    alignas(64) float totals[W];
    store(totals, sums<R * COLUMNS>(all));
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++)
            for (long j = k; j < K; j++)
                totals[m * R + r] = std::fma(widen(w[r * ldw + j]), x[m * ldx + j], totals[m * R + r]);
    for (int m = 0; m < M; m++) {
        if constexpr (R == 4) {
            vec4 four;
            std::memcpy(&four, totals + m * 4, sizeof four);
            put(m, four);
        } else {
            put(m, totals[m]);
        }
    }
}

template <int R, class T, class Put>
inline void dots_tokens(const T* w, long ldw, const float* x, long ldx, long M, long K, Put put) {
    long m = 0;
    for (; m + TILE_TOKENS <= M; m += TILE_TOKENS)
        dots<R, TILE_TOKENS>(w, ldw, x + m * ldx, ldx, K, m == 0, [&](int i, auto v) { put(m + i, v); });
    if constexpr (TILE_TOKENS > 2) {
        if (M - m == 3) {
            dots<R, 3>(w, ldw, x + m * ldx, ldx, K, m == 0, [&](int i, auto v) { put(m + i, v); });
            return;
        }
        if (M - m == 2) {
            dots<R, 2>(w, ldw, x + m * ldx, ldx, K, m == 0, [&](int i, auto v) { put(m + i, v); });
            return;
        }
    }
    if (M - m == 1) dots<R, 1>(w, ldw, x + m * ldx, ldx, K, m == 0, [&](int, auto v) { put(m, v); });
}

// put(row, token, value) for weight rows lo…hi; value is a float, or a vec4 of that row and the next three.
template <class T, class Put>
inline void rows_dot(const T* w, long ldw, long lo, long hi, const float* x, long ldx, long M, long K, Put put) {
    long n = lo;
    for (; n + TILE_ROWS <= hi; n += TILE_ROWS)
        dots_tokens<TILE_ROWS>(w + n * ldw, ldw, x, ldx, M, K, [&](long m, vec4 v) { put(n, m, v); });
    for (; n < hi; n++) dots_tokens<1>(w + n * ldw, ldw, x, ldx, M, K, [&](long m, float v) { put(n, m, v); });
}

// Tokens as floats, each row a cache line longer than it need be: rows a power of two apart would share cache sets.
inline long padded(long K) { return (K + 15) / 16 * 16 + 16; }
template <class T> inline void widened(const T* x, long K, float* to) {
    long k = 0;
    for (; k + W <= K; k += W) store(to + k, load(x + k));
    for (; k < K; k++) to[k] = widen(x[k]);
}
template <class T> inline const float* widened(const T* x, long M, long K, int which) {
    const long ld = padded(K);
    float* out = scratch(which, M * ld);
    for (long m = 0; m < M; m++) widened(x + m * K, K, out + m * ld);
    return out;
}

constexpr long WORTH = 1 << 16;  // multiply-adds below which a second thread does not pay

// Weights (out, in) as they lie: of the tokens' type T, or int8 with a scale for each row.
template <class T> struct Matrix {
    const void* rows;
    const float* scale;  // null: of type T
    Matrix from(long row, long K) const {
        const char* at = static_cast<const char*>(rows) + row * K * (scale ? 1 : long(sizeof(T)));
        return {at, scale ? scale + row : nullptr};
    }
};

// Rows are widened once for all tokens where there are more than a tile of them: the same products either way.
template <class Put>
inline void int8_rows_dot(const int8_t* w, long lo, long hi, const float* x, long ldx, long M, long K, Put put) {
    if (M <= TILE_TOKENS) return rows_dot(w, K, lo, hi, x, ldx, M, K, put);
    const long ld = padded(K);
    float* wide = scratch(6, TILE_ROWS * ld);
    for (long n = lo; n < hi; n += TILE_ROWS) {
        const long rows = std::min(long(TILE_ROWS), hi - n);
        for (long r = 0; r < rows; r++) widened(w + (n + r) * K, K, wide + r * ld);
        rows_dot(wide, ld, 0, rows, x, ldx, M, K, [&](long r, long m, auto v) { put(n + r, m, v); });
    }
}

// With a bias (null: none). Scaled and added in one rounding, always: left to the compiler, it depends on the tile.
template <class T, class Put>
inline void rows_dot(Matrix<T> w, const T* bias, long lo, long hi, const float* x, long ldx, long M, long K, Put put) {
    if (!w.scale)
        return rows_dot(static_cast<const T*>(w.rows), K, lo, hi, x, ldx, M, K,
                        [&](long n, long m, auto v) { put(n, m, bias ? v + widen4<decltype(v)>(bias + n) : v); });
    int8_rows_dot(static_cast<const int8_t*>(w.rows), lo, hi, x, ldx, M, K, [&](long n, long m, auto v) {
        const auto scale = widen4<decltype(v)>(w.scale + n);
        put(n, m, bias ? fma(v, scale, widen4<decltype(v)>(bias + n)) : v * scale);
    });
}

template <class T> void linear(const T* x, Matrix<T> w, const T* bias, T* y, long M, long K, long N, int threads) {
    const float* in = widened(x, M, K, 0);
    parallel(threads, M * N * K > WORTH, [&](int part, int parts) {
        Range own = share(N, part, parts, 16);
        rows_dot(w, bias, own.lo, own.hi, in, padded(K), M, K,
                 [&](long n, long m, auto v) { put(y + m * N + n, v); });
    });
}

// Mixture of experts: y[t] = Σ_j weight[t, j] · down[e] relu(up[e] x[t])², e = choice[t, j]; one read of each chosen
// expert's weights.
template <class T>
void experts(const T* x, const int64_t* choice, const float* weight, Matrix<T> up, Matrix<T> down, T* y, long tokens,
             long top, long E, long I, long H, int threads) {
    long pairs = tokens * top;
    const long ldx = padded(H), ldi = padded(I);
    const T* no_bias = nullptr;
    // Pairs grouped by expert; `place` says where each went.
    static thread_local std::vector<long> start, place, list;
    start.assign(E + 1, 0);
    place.resize(pairs);
    list.clear();
    for (long p = 0; p < pairs; p++) start[choice[p] + 1]++;
    for (long e = 0; e < E; e++) {
        if (start[e + 1]) list.push_back(e);
        start[e + 1] += start[e];
    }
    float* gathered = scratch(1, pairs * ldx);
    {
        std::vector<long> next(start.begin(), start.end() - 1);
        for (long p = 0; p < pairs; p++) {
            place[p] = next[choice[p]]++;
            widened(x + p / top * H, H, gathered + place[p] * ldx);
        }
    }
    float* inner = scratch(2, pairs * ldi);
    float* parts_out = scratch(3, pairs * H);
    // Other threads see these through the pointers: thread_local names would be their own.
    const long *starts = start.data(), *places = place.data(), *active = list.data();
    long count = long(list.size());
    parallel(threads, pairs * H * I > WORTH, [&](int part, int parts) {
        Range own = share(count * I, part, parts, 4);
        for (long at = own.lo; at < own.hi;) {
            long e = active[at / I], lo = at % I, hi = std::min(I, lo + own.hi - at), first = starts[e];
            rows_dot(up.from(e * I, H), no_bias, lo, hi, gathered + first * ldx, ldx, starts[e + 1] - first, H,
                     [&](long i, long m, auto v) { put(inner + (first + m) * ldi + i, relu(v) * relu(v)); });
            at += hi - lo;
        }
        barrier(parts);
        own = share(count * H, part, parts, 4);
        for (long at = own.lo; at < own.hi;) {
            long e = active[at / H], lo = at % H, hi = std::min(H, lo + own.hi - at), first = starts[e];
            rows_dot(down.from(e * H, I), no_bias, lo, hi, inner + first * ldi, ldi, starts[e + 1] - first, I,
                     [&](long h, long m, auto v) { put(parts_out + (first + m) * H + h, v); });
            at += hi - lo;
        }
        barrier(parts);
        own = share(tokens, part, parts);
        for (long t = own.lo; t < own.hi; t++)
            for (long h = 0; h < H; h++) {
                float total = 0;
                for (long j = 0; j < top; j++) total += weight[t * top + j] * parts_out[places[t * top + j] * H + h];
                put(y + t * H + h, total);
            }
    });
}
