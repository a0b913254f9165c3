// Small matrix products that accumulate in registers, never across the lanes of a vector. Terms are added one by one in
// order, so a result does not depend on the other rows.
#pragma once
#include "simd.h"

#ifdef __AVX512F__
constexpr int TILE = 8;  // rows that share one load of x
#else
constexpr int TILE = 4;
#endif

inline long round_up(long n) { return (n + W - 1) / W * W; }  // to whole vectors

// Memory that is read soon, prefetched in small steps while few rows are computed, when the products are memory-bound.
struct Prefetcher {
    const char *at, *end;
    void next() {
        for (int line = 0; line < 4 && at < end; line++, at += 64) __builtin_prefetch(at);
    }
};
template <class T> inline Prefetcher prefetcher(const T* from, long count) {
    return {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + count)};
}

// Prefetches a head's state while the work before it is computed: a Mamba layer whose state is not in a cache takes half
// the time for one token on an AMD Zen 5 processor, and a third for 16.
inline void prefetch_all(const float* from, long count) {
    for (long i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

// acc[m][c] = beta · acc[m][c] + Σ_r w[m][r] · x[r][c] for V vectors of columns c; w[m][r] is at w + m·row + r·step.
// With beta 0, acc is not read.
template <int M, int V, class T>
inline void gemm_tile(const float* w, long row, long step, const T* x, long ldx, long n, float* acc, long ld,
                      float beta, Prefetcher& prefetch) {
    vec a[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) a[m][v] = beta == 0 ? vec{} : beta * load(acc + m * ld + v * W);
    for (long r = 0; r < n; r++) {
        if constexpr (M <= 4) prefetch.next();
        vec part[V];
        for (int v = 0; v < V; v++) part[v] = load(x + r * ldx + v * W);
        for (int m = 0; m < M; m++) {
            const float by = w[m * row + r * step];
            for (int v = 0; v < V; v++) a[m][v] = fmadd(by, part[v], a[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(acc + m * ld + v * W, a[m][v]);
}

template <int M, class T>
inline void gemm_rows(const float* w, long row, long step, const T* x, long ldx, long n, long C, float* acc, long ld,
                      float beta, Prefetcher& prefetch) {
    long c = 0;
    if constexpr (4 * M <= W)  // enough independent sums to hide the latency of an addition
        for (; c + 4 * W <= C; c += 4 * W) gemm_tile<M, 4>(w, row, step, x + c, ldx, n, acc + c, ld, beta, prefetch);
    for (; c + 2 * W <= C; c += 2 * W) gemm_tile<M, 2>(w, row, step, x + c, ldx, n, acc + c, ld, beta, prefetch);
    for (; c + W <= C; c += W) gemm_tile<M, 1>(w, row, step, x + c, ldx, n, acc + c, ld, beta, prefetch);
    for (; c < C; c++)
        for (int m = 0; m < M; m++) {
            float total = beta == 0 ? 0 : beta * acc[m * ld + c];
            for (long r = 0; r < n; r++) total = std::fma(w[m * row + r * step], upcast(x[r * ldx + c]), total);
            acc[m * ld + c] = total;
        }
}

// The same for M rows of C columns.
template <class T>
inline void gemm(const float* w, long row, long step, const T* x, long ldx, long n, long M, long C, float* acc, long ld,
                      float beta, Prefetcher prefetch = {nullptr, nullptr}) {
    long m = 0;
    for (; m + TILE <= M; m += TILE)
        gemm_rows<TILE>(w + m * row, row, step, x, ldx, n, C, acc + m * ld, ld, beta, prefetch);
    if (TILE > 4)
        for (; m + 4 <= M; m += 4) gemm_rows<4>(w + m * row, row, step, x, ldx, n, C, acc + m * ld, ld, beta, prefetch);
    for (; m + 2 <= M; m += 2) gemm_rows<2>(w + m * row, row, step, x, ldx, n, C, acc + m * ld, ld, beta, prefetch);
    if (m < M) gemm_rows<1>(w + m * row, row, step, x, ldx, n, C, acc + m * ld, ld, beta, prefetch);
}

template <class T> inline void scaled(const T* x, long n, float by, float* y) {
    long i = 0;
    for (; i + W <= n; i += W) store(y + i, load(x + i) * by);
    for (; i < n; i++) y[i] = upcast(x[i]) * by;
}

// Transposes a W × W square of vectors: each step moves one bit of an element's row index to its column index.
template <int LEFT = W> inline void transpose_square(vec* v) {
    if constexpr (LEFT > 1) {
        vec next[W];
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = interleave_low(v[i], v[i + W / 2]);
            next[2 * i + 1] = interleave_high(v[i], v[i + W / 2]);
        }
        for (int i = 0; i < W; i++) v[i] = next[i];
        transpose_square<LEFT / 2>(v);
    }
}

// Loads and transposes up to W rows and W columns of x; zeros where there are fewer.
template <class T> inline void load_transposed(const T* x, long ldx, long rows, long columns, vec* v) {
    if (rows >= W && columns >= W) {
        for (int i = 0; i < W; i++) v[i] = load(x + i * ldx);
    } else {
        for (int i = 0; i < W; i++) v[i] = vec{};
        for (int i = 0; i < std::min(rows, long(W)); i++)
            for (int j = 0; j < std::min(columns, long(W)); j++) v[i][j] = upcast(x[i * ldx + j]);
    }
    transpose_square(v);
}

// to[d][r] = x[r][d] for n rows of D columns. Overwrites `to` from r = n to the end of a vector.
template <class T> inline void transpose(const T* x, long ldx, long n, long D, float* to, long ld) {
    for (long r = 0; r < n; r += W)
        for (long d = 0; d < D; d += W) {
            vec v[W];
            load_transposed(x + r * ldx + d, ldx, n - r, D - d, v);
            if (D - d >= W)
                for (int i = 0; i < W; i++) store(to + (d + i) * ld + r, v[i]);
            else
                for (int i = 0; i < D - d; i++) store(to + (d + i) * ld + r, v[i]);
        }
}

template <int M, class T>
inline void gemm_nt_small(const float* w, long ldw, const T* x, long ldx, long n, long D, float* out, long ld,
                          Prefetcher& prefetch) {
    for (long r = 0; r < n; r += W) {
        vec acc[M] = {};
        for (long d = 0; d < D; d += W) {
            vec v[W];
            prefetch.next();
            load_transposed(x + r * ldx + d, ldx, n - r, D - d, v);
            if (D - d >= W) {
                for (int i = 0; i < W; i++)
                    for (int m = 0; m < M; m++) acc[m] = fmadd(w[m * ldw + d + i], v[i], acc[m]);
            } else {
                for (int i = 0; i < D - d; i++)
                    for (int m = 0; m < M; m++) acc[m] = fmadd(w[m * ldw + d + i], v[i], acc[m]);
            }
        }
        for (int m = 0; m < M; m++) store(out + m * ld + r, acc[m]);
    }
}

constexpr long SMALL_ROWS = 4;  // up to which x is not transposed in memory: 1.1 to 1.2 × as fast with AVX2

// out[m][r] = Σ_d w[m][d] · x[r][d] for M ≤ SMALL_ROWS rows of w and n rows of x. Writes `out` to the end of a vector.
template <class T>
inline void gemm_nt_small(const float* w, long ldw, long M, const T* x, long ldx, long n, long D, float* out, long ld,
                         Prefetcher prefetch = {nullptr, nullptr}) {
    if (M == 1) gemm_nt_small<1>(w, ldw, x, ldx, n, D, out, ld, prefetch);
    if (M == 2) gemm_nt_small<2>(w, ldw, x, ldx, n, D, out, ld, prefetch);
    if (M == 3) gemm_nt_small<3>(w, ldw, x, ldx, n, D, out, ld, prefetch);
    if (M == 4) gemm_nt_small<4>(w, ldw, x, ldx, n, D, out, ld, prefetch);
}

// The same for any M, bit-identical; transposed (D, ldt) is a buffer for the transpose of x.
template <class T>
inline void gemm_nt(const float* w, long ldw, long M, const T* x, long ldx, long n, long D, float* out, long ld,
                    float* transposed, long ldt) {
    if (M <= SMALL_ROWS) return gemm_nt_small(w, ldw, M, x, ldx, n, D, out, ld);
    transpose(x, ldx, n, D, transposed, ldt);
    gemm(w, ldw, 1, transposed, ldt, D, M, round_up(n), out, ld, 0);
}
