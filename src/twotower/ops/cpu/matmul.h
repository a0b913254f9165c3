// Matrix products of a weight (out, in) with few tokens as dot products. Reads the weight once, in its stored dtype. A
// token's result does not depend on the other tokens. Reads the packed copy (packed_weights.h) instead if there is one.
#pragma once
#include "integer_products.h"
#include "tokens.h"

#ifdef __AVX512F__
constexpr int TILE_ROWS = 4, TILE_TOKENS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_TOKENS = 2;
#endif

template <int R, int M, class T, class Put>
inline void dot_tile(const T* w, long ldw, const float* x, long ldx, long K, bool prefetch, Put put) {
    vec acc[R][M] = {};
    long k = 0;
    for (; k + W <= K; k += W) {
        vec weights[R];
        for (int r = 0; r < R; r++) {
            weights[r] = load(w + r * ldw + k);
            if (prefetch) __builtin_prefetch(w + (r + R) * ldw + k);
        }
        for (int m = 0; m < M; m++) {
            const vec token = load(x + m * ldx + k);
            for (int r = 0; r < R; r++) acc[r][m] = fmadd(weights[r], token, acc[r][m]);
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
                totals[m * R + r] = std::fma(upcast(w[r * ldw + j]), x[m * ldx + j], totals[m * R + r]);
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
inline void dot_tokens(const T* w, long ldw, const float* x, long ldx, long M, long K, Put put) {
    long m = 0;
    for (; m + TILE_TOKENS <= M; m += TILE_TOKENS)
        dot_tile<R, TILE_TOKENS>(w, ldw, x + m * ldx, ldx, K, m == 0, [&](int i, auto v) { put(m + i, v); });
    if constexpr (TILE_TOKENS > 2) {
        if (M - m == 3) {
            dot_tile<R, 3>(w, ldw, x + m * ldx, ldx, K, m == 0, [&](int i, auto v) { put(m + i, v); });
            return;
        }
        if (M - m == 2) {
            dot_tile<R, 2>(w, ldw, x + m * ldx, ldx, K, m == 0, [&](int i, auto v) { put(m + i, v); });
            return;
        }
    }
    if (M - m == 1) dot_tile<R, 1>(w, ldw, x + m * ldx, ldx, K, m == 0, [&](int, auto v) { put(m, v); });
}

// Calls put(row, token, value) for weight rows lo…hi; value is a float, or a vec4 of this row and the next three.
template <class T, class Put>
inline void dot_rows(const T* w, long ldw, long lo, long hi, const float* x, long ldx, long M, long K, Put put) {
    long n = lo;
    for (; n + TILE_ROWS <= hi; n += TILE_ROWS)
        dot_tokens<TILE_ROWS>(w + n * ldw, ldw, x, ldx, M, K, [&](long m, vec4 v) { put(n, m, v); });
    for (; n < hi; n++) dot_tokens<1>(w + n * ldw, ldw, x, ldx, M, K, [&](long m, float v) { put(n, m, v); });
}

constexpr long MIN_PARALLEL_WORK = 1 << 16;  // multiply-adds; below, a second thread costs more than it saves

// A weight (out, in) or (experts, out, in): unpacked and packed, either may be null; with scales (…, out): packed
// int8 only. The scales of int4 are in its blocks, and `scale` is `packed` itself. A unit is a row of an unpacked
// weight or a panel of a packed weight. int8_activations: products of int8 and int4 weights round the tokens to int8 too.
template <class T> struct Matrix {
    const T* rows;
    const void* packed;
    const float* scale;
    bool int8_activations = false;
    bool rounds() const { return scale && int8_activations; }
    bool is_int4() const { return scale && static_cast<const void*>(scale) == packed; }
    // The forms of the tokens that this weight needs.
    int form() const {
        if (rounds()) return WIDE | ROUNDED;
        return BF16_PRODUCTS && std::is_same_v<T, bf16> && packed && !scale ? NARROW : WIDE;
    }
    long units(long N) const { return packed ? panel_count(N) : N; }
    long grain() const { return packed ? 1 : TILE_ROWS; }
    Matrix of(long expert, long N, long K) const {
        const long narrow = is_int4() ? panel_size<int4>(K) : panel_size<int8_t>(K);
        const long size = scale ? narrow : panel_size<T>(K) * long(sizeof(T));
        const char* own = packed ? static_cast<const char*>(packed) + expert * panel_count(N) * size : nullptr;
        const float* scales = is_int4() ? reinterpret_cast<const float*>(own) : scale ? scale + expert * N : nullptr;
        return {rows ? rows + expert * N * K : nullptr, own, scales, int8_activations};
    }
};

// Units lo…hi of w (N, K) times M tokens, plus a bias or null. Calls put(n, m, value, count) for output n and following
// outputs; value is a float, a vec4, or the first `count` of a vec.
template <class T, class Put>
inline void matmul(Matrix<T> w, const T* bias, long lo, long hi, const Tokens& in, long M, long K, long N, Put put) {
    const float* x = in.wide;
    const long ldx = in.ld;
    const auto finished = [&](long n, long m, auto v, long count) {
        put(n, m, bias ? v + load<decltype(v)>(bias + n, count) : v, count);
    };
    const auto unscaled = [&](long n, long m, vec v) { finished(n, m, v, N - n); };
    const auto scaled = [&](long n, long m, vec v) { finished(n, m, v * load<vec>(w.scale + n, N - n), N - n); };
    const auto *narrow = static_cast<const int8_t*>(w.packed);
    const auto *nibbles = static_cast<const int4*>(w.packed);
    if (w.is_int4() && w.rounds())
        integer_panels(nibbles, lo, hi, in.rounded, M, K, [&](long n, long m, vec v) { unscaled(n, m, once(v)); });
    else if (w.rounds())
        integer_panels(narrow, lo, hi, in.rounded, M, K,
                       [&](long n, long m, vec v) { unscaled(n, m, once(v * load<vec>(w.scale + n, N - n))); });
    else if (w.is_int4())
        dot_panels(nibbles, lo, hi, x, ldx, M, K, unscaled);
    else if (w.scale)
        dot_panels(narrow, lo, hi, x, ldx, M, K, scaled);
    else if (w.form() == NARROW) {
        if constexpr (BF16_PRODUCTS)
            dot_panels(static_cast<const bf16*>(w.packed), lo, hi, static_cast<const bf16*>(in.narrow), ldx, M, K,
                       unscaled);
    } else if (w.packed)
        dot_panels(static_cast<const T*>(w.packed), lo, hi, x, ldx, M, K, unscaled);
    else
        dot_rows(w.rows, K, lo, hi, x, ldx, M, K, [&](long n, long m, auto v) { finished(n, m, v, 0); });
}

#include "low_rank.h"

// One of several products of the same tokens: y (tokens, N) = x·Wᵀ + bias, plus the update of an adapter; 0 for padding.
template <class T> struct Product {
    Matrix<T> w;
    const T* bias;  // or null
    T* y;
    long N;
    Adapter<T> adapter = {};
};

// Products of x (tokens, K) as one parallel job, because each start of the threads takes microseconds.
template <class T, int COUNT>
void linears(const T* x, const Product<T> (&products)[COUNT], RealTokens real, long K, int threads) {
    const long M = real.count;
    long outputs = 0;
    int forms = 0;
    for (const Product<T>& p : products) {
        outputs += p.N, forms |= p.w.form() | p.adapter.forms();
        real.clear_padding(p.y, p.N);
    }
    const Tokens in = tokens_of(x, real, K, forms, threads);
    Tokens low[COUNT];
    Tokens adapted;
    for (int i = 0; i < COUNT; i++)
        if (products[i].adapter) {
            if (!adapted) adapted = products[i].adapter.places.gathered(in, K);
            low[i] = products[i].adapter.with(products[i].w).room(i);
        }
    parallel(threads, M * outputs * K > MIN_PARALLEL_WORK, [&](int part, int parts) {
        for (int i = 0; adapted && i < COUNT; i++) products[i].adapter.reduce(adapted, K, low[i], part, parts);
        if (adapted) barrier(parts);
        for (int i = 0; i < COUNT; i++) {
            const Product<T>& p = products[i];
            const Range own = partition(p.w.units(p.N), part, parts, p.w.packed ? 1 : 16);
            matmul(p.w, p.bias, own.lo, own.hi, in, M, K, p.N,
                   [&](long n, long m, auto v, long count) { put(p.y + real[m] * p.N + n, v, count); });
            if (p.adapter) p.adapter.with(p.w).expand(low[i], p.w, own.lo, own.hi, p.N, real, p.y, p.N);
        }
    });
}

template <class T>
void linear(const T* x, Matrix<T> w, const T* bias, T* y, RealTokens real, long K, long N, int threads) {
    linears(x, {{w, bias, y, N}}, real, K, threads);
}
