// Small products whose sums run from register to register, none within a vector: a sum's terms are added one by one in
// their order, so that it is the same whatever stands beside it.
#pragma once
#include "simd.h"

#ifdef __AVX512F__
constexpr int TILE = 8;  // rows that share a read of what they weigh
#else
constexpr int TILE = 4;
#endif

inline long whole(long n) { return (n + W - 1) / W * W; }  // up to the end of a vector

// Memory that is read soon, asked for bit by bit where a few rows are computed: they wait for memory most of the time.
struct Ahead {
    const char *at, *end;
    void ask() {
        for (int line = 0; line < 4 && at < end; line++, at += 64) __builtin_prefetch(at);
    }
};
template <class T> inline Ahead ahead(const T* from, long count) {
    return {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + count)};
}

// acc[m][c] = keep · acc[m][c] + Σ_r w[m][r] · x[r][c] for V vectors of columns c; w[m][r] lies at w + m·row + r·step.
// keep 0: what stands in acc is not read.
template <int M, int V, class T>
inline void weigh(const float* w, long row, long step, const T* x, long ldx, long n, float* acc, long ld, float keep,
                  Ahead& later) {
    vec a[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) a[m][v] = keep == 0 ? vec{} : keep * load(acc + m * ld + v * W);
    for (long r = 0; r < n; r++) {
        if constexpr (M <= 4) later.ask();
        vec part[V];
        for (int v = 0; v < V; v++) part[v] = load(x + r * ldx + v * W);
        for (int m = 0; m < M; m++) {
            const float by = w[m * row + r * step];
            for (int v = 0; v < V; v++) a[m][v] = fused(by, part[v], a[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(acc + m * ld + v * W, a[m][v]);
}

template <int M, class T>
inline void weigh_rows(const float* w, long row, long step, const T* x, long ldx, long n, long C, float* acc, long ld,
                       float keep, Ahead& later) {
    long c = 0;
    if constexpr (4 * M <= W)  // enough sums under way to hide how long one addition takes
        for (; c + 4 * W <= C; c += 4 * W) weigh<M, 4>(w, row, step, x + c, ldx, n, acc + c, ld, keep, later);
    for (; c + 2 * W <= C; c += 2 * W) weigh<M, 2>(w, row, step, x + c, ldx, n, acc + c, ld, keep, later);
    for (; c + W <= C; c += W) weigh<M, 1>(w, row, step, x + c, ldx, n, acc + c, ld, keep, later);
    for (; c < C; c++)
        for (int m = 0; m < M; m++) {
            float total = keep == 0 ? 0 : keep * acc[m * ld + c];
            for (long r = 0; r < n; r++) total = std::fma(w[m * row + r * step], widen(x[r * ldx + c]), total);
            acc[m * ld + c] = total;
        }
}

// The same for M rows of C columns.
template <class T>
inline void weigh_all(const float* w, long row, long step, const T* x, long ldx, long n, long M, long C, float* acc, long ld,
                      float keep, Ahead later = {nullptr, nullptr}) {
    long m = 0;
    for (; m + TILE <= M; m += TILE) weigh_rows<TILE>(w + m * row, row, step, x, ldx, n, C, acc + m * ld, ld, keep, later);
    if (TILE > 4)
        for (; m + 4 <= M; m += 4) weigh_rows<4>(w + m * row, row, step, x, ldx, n, C, acc + m * ld, ld, keep, later);
    for (; m + 2 <= M; m += 2) weigh_rows<2>(w + m * row, row, step, x, ldx, n, C, acc + m * ld, ld, keep, later);
    if (m < M) weigh_rows<1>(w + m * row, row, step, x, ldx, n, C, acc + m * ld, ld, keep, later);
}

template <class T> inline void scaled(const T* x, long n, float by, float* y) {
    long i = 0;
    for (; i + W <= n; i += W) store(y + i, load(x + i) * by);
    for (; i < n; i++) y[i] = widen(x[i]) * by;
}

inline vec lower(vec a, vec b) {  // a₀ b₀ a₁ b₁ …
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#endif
}
inline vec upper(vec a, vec b) {
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

// W vectors as the rows of a square, turned around: each step moves a bit of an element's row to its column.
template <int LEFT = W> inline void turn_square(vec* v) {
    if constexpr (LEFT > 1) {
        vec next[W];
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = lower(v[i], v[i + W / 2]);
            next[2 * i + 1] = upper(v[i], v[i + W / 2]);
        }
        for (int i = 0; i < W; i++) v[i] = next[i];
        turn_square<LEFT / 2>(v);
    }
}

// Up to W rows of x and up to W columns of them, turned around; zeros where there are fewer.
template <class T> inline void turned_square(const T* x, long ldx, long rows, long columns, vec* v) {
    if (rows >= W && columns >= W) {
        for (int i = 0; i < W; i++) v[i] = load(x + i * ldx);
    } else {
        for (int i = 0; i < W; i++) v[i] = vec{};
        for (int i = 0; i < std::min(rows, long(W)); i++)
            for (int j = 0; j < std::min(columns, long(W)); j++) v[i][j] = widen(x[i * ldx + j]);
    }
    turn_square(v);
}

// to[d][r] = x[r][d] for n rows of D columns; what stands in `to` from r = n to the end of a vector is written over.
template <class T> inline void turn(const T* x, long ldx, long n, long D, float* to, long ld) {
    for (long r = 0; r < n; r += W)
        for (long d = 0; d < D; d += W) {
            vec v[W];
            turned_square(x + r * ldx + d, ldx, n - r, D - d, v);
            if (D - d >= W)
                for (int i = 0; i < W; i++) store(to + (d + i) * ld + r, v[i]);
            else
                for (int i = 0; i < D - d; i++) store(to + (d + i) * ld + r, v[i]);
        }
}

template <int M, class T>
inline void few_products(const float* w, long ldw, const T* x, long ldx, long n, long D, float* out, long ld, Ahead& later) {
    for (long r = 0; r < n; r += W) {
        vec acc[M] = {};
        for (long d = 0; d < D; d += W) {
            vec v[W];
            later.ask();
            turned_square(x + r * ldx + d, ldx, n - r, D - d, v);
            if (D - d >= W) {
                for (int i = 0; i < W; i++)
                    for (int m = 0; m < M; m++) acc[m] = fused(w[m * ldw + d + i], v[i], acc[m]);
            } else {
                for (int i = 0; i < D - d; i++)
                    for (int m = 0; m < M; m++) acc[m] = fused(w[m * ldw + d + i], v[i], acc[m]);
            }
        }
        for (int m = 0; m < M; m++) store(out + m * ld + r, acc[m]);
    }
}

constexpr long FEW_ROWS = 4;  // for which x need not be kept turned around: 1.1 to 1.2 times as fast, AVX2

// out[m][r] = Σ_d w[m][d] · x[r][d] for M ≤ FEW_ROWS rows of w and n rows of x; `out` is written to the end of a vector.
template <class T>
inline void few_products(const float* w, long ldw, long M, const T* x, long ldx, long n, long D, float* out, long ld,
                         Ahead later = {nullptr, nullptr}) {
    if (M == 1) few_products<1>(w, ldw, x, ldx, n, D, out, ld, later);
    if (M == 2) few_products<2>(w, ldw, x, ldx, n, D, out, ld, later);
    if (M == 3) few_products<3>(w, ldw, x, ldx, n, D, out, ld, later);
    if (M == 4) few_products<4>(w, ldw, x, ldx, n, D, out, ld, later);
}

// The same, to the bit, for any M; turned (D, ldt) is room for x turned around.
template <class T>
inline void products(const float* w, long ldw, long M, const T* x, long ldx, long n, long D, float* out, long ld,
                     float* turned, long ldt) {
    if (M <= FEW_ROWS) return few_products(w, ldw, M, x, ldx, n, D, out, ld);
    turn(x, ldx, n, D, turned, ldt);
    weigh_all(w, ldw, 1, turned, ldt, D, M, whole(n), out, ld, 0);
}
