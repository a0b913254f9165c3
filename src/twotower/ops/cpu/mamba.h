// A Mamba-2 mixer between its projections over a short block, and the update of its state after a prefix of the block.
#pragma once
#include "matmul.h"
#include "small_gemm.h"

enum GateNorm { AFTER_GATE, BEFORE_GATE, NO_NORM };  // as GATE_NORMS in kernels.py

struct Mamba { long heads, P, groups, N, taps; float low, high, eps; int norm; };

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

// out[l] = SiLU(bias + Σ_k taps[k] · in[l + k]) over C channels; the bias follows the K taps. KNOWN: K if known when
// compiling, else 0.
template <int KNOWN> inline void convolve(const float* in, const float* taps, long any, long L, long C, float* out) {
    const long K = KNOWN ? KNOWN : any;
    long c = 0;
    for (; c + W <= C; c += W)
        for (long l = 0; l < L; l++) {
            vec v = load(taps + K * C + c);
            for (long k = 0; k < K; k++) v = fmadd(load(in + (l + k) * C + c), load(taps + k * C + c), v);
            store(out + l * C + c, silu(v));
        }
    for (; c < C; c++)
        for (long l = 0; l < L; l++) {
            float v = taps[K * C + c];
            for (long k = 0; k < K; k++) v = std::fma(in[(l + k) * C + c], taps[k * C + c], v);
            out[l * C + c] = silu(v);
        }
}

// by[l][m] = score[l][m] · exp(cum[l] − cum[m]) · dt[m] for m ≤ l < L, then zeros to the end of the tile of rows.
inline void decay_scores(const float* score, const float* cum, const float* dt, long L, float* by, long ld) {
    for (long l = 0; l < L; l++) {
        const long end = std::min(L, (l / TILE + 1) * TILE);
        for (long m = 0; m < end; m += W) {
            const vec passed = cum[l] - load(cum + m);
            const vec taken = load(score + l * ld + m) * exp(passed) * load(dt + m);
            store(by + l * ld + m, LANE_INDEX + float(m) > float(l) ? vec{} : taken);
        }
    }
}

// x ↦ x · SiLU(z) over n channels; returns the sum of the squares.
template <class T> inline float gate(float* x, const T* z, long n) {
    vec squares = {};
    long c = 0;
    for (; c + W <= n; c += W) {
        const vec v = load(x + c) * silu(load(z + c));
        squares += v * v;
        store(x + c, v);
    }
    float total = sum(squares);
    for (; c < n; c++) {
        x[c] *= silu(upcast(z[c]));
        total += x[c] * x[c];
    }
    return total;
}

inline float sum_of_squares(const float* x, long n) {
    vec squares = {};
    for (long i = 0; i < n; i += W) {
        const vec v = load<vec>(x + i, n - i);
        squares = fmadd(v, v, squares);
    }
    return sum(squares);
}

// y = norm(x · SiLU(z)) · weight over n channels, or norm(x) · weight · SiLU(z), or x · SiLU(z); overwrites x.
template <class T>
inline void gate_and_norm(float* x, const T* z, const T* weight, long n, float eps, int norm, T* y) {
    const float total = norm == BEFORE_GATE ? sum_of_squares(x, n) : gate(x, z, n);
    const float by = norm == NO_NORM ? 1.0f : 1.0f / std::sqrt(total / n + eps);
    long c = 0;
    for (; norm != NO_NORM && c + W <= n; c += W) store(x + c, load(x + c) * by * load(weight + c));
    for (; norm != NO_NORM && c < n; c++) x[c] = x[c] * by * upcast(weight[c]);
    if (norm == BEFORE_GATE) gate(x, z, n);
    for (c = 0; c < n; c += W) put(y + c, load<vec>(x + c, n - c), n - c);
}

// projected (B, L, z | xBC | dt) → mixed (B, L, inner): convolution from the window, SiLU, scan from the state, D·x,
// gate, group norm. Row b reads slot slots[b] of window (R, K−1, C) and state (R, H, P, N). If kept_xBC is not null,
// writes the step inputs of `state_update` to kept_*.
template <class T>
void mamba_block(const T* projected, const uint8_t* token_mask, const T* window, const float* state,
                 const int64_t* slots, const T* conv_weight, const T* conv_bias, const float* dt_bias,
                 const float* A_log, const float* D, const T* norm_weight, T* mixed, T* kept_xBC, float* kept_x,
                 float* kept_dt, float* kept_decay, float* kept_B, long rows, long L, Mamba dims, int threads) {
    const long H = dims.heads, P = dims.P, G = dims.groups, N = dims.N, K = dims.taps;
    const long inner = H * P, C = inner + 2 * G * N, wide = inner + C + H;
    const long each = H / G, X = each * P, own_C = X + 2 * N;
    const long ldl = round_up(L) + W, ldp = round_up(P) + W;
    parallel(threads, rows * L * H * P * N > MIN_PARALLEL_WORK, [&](int part, int parts) {
        Range tasks = partition(rows * G, part, parts);
        float* in = scratch(0, (L + K - 1) * own_C);   // the group's convolution inputs: x | B | C
        float* out = scratch(1, L * own_C + W);        // the outputs after SiLU
        float* taps = scratch(2, (K + 1) * own_C);
        float* y = scratch(3, L * X);
        float* score = scratch(4, L * ldl);            // C·B of each pair of tokens
        float* by = scratch(5, L * ldl);               // weight of each earlier token in a token's output
        float* transposed = scratch(6, N * std::max(ldl, ldp));
        float* steps = scratch(7, (each + 1) * ldl);
        float* seen = scratch(14, L * ldp);            // C·state
        long prepared = -1;
        for (long task = tasks.lo; task < tasks.hi; task++) {
            const long g = task / rows, b = task % rows, slot = slots ? slots[b] : b;
            // The group's channels are three ranges of the C channels.
            const long from[3] = {g * X, inner + g * N, inner + (G + g) * N}, size[3] = {X, N, N};
            for (long run = 0, at = 0; run < 3 && g != prepared; at += size[run++])
                for (long c = 0; c < size[run]; c++) {
                    const T* w = conv_weight + (from[run] + c) * K;
                    for (long k = 0; k < K; k++) taps[k * own_C + at + c] = upcast(w[k]);
                    taps[K * own_C + at + c] = conv_bias ? upcast(conv_bias[from[run] + c]) : 0.0f;
                }
            prepared = g;
            for (long l = 0; l < L + K - 1; l++) {
                const long token = b * L + l - (K - 1);
                const bool counts = l < K - 1 ? window != nullptr : !token_mask || token_mask[token];
                for (long run = 0, at = 0; run < 3; at += size[run++]) {
                    const T* source = l < K - 1 ? window + (slot * (K - 1) + l) * C + from[run]
                                                : projected + token * wide + inner + from[run];
                    if (counts) upcast_row(source, size[run], in + l * own_C + at);
                    else std::fill_n(in + l * own_C + at, size[run], 0.0f);
                    if (!kept_xBC || l < K - 1) continue;
                    T* to = kept_xBC + token * C + from[run];
                    if (counts) std::memcpy(to, source, size[run] * sizeof(T));
                    else std::memset(to, 0, size[run] * sizeof(T));
                }
            }
            if (K == 4) convolve<4>(in, taps, K, L, own_C, out);
            else convolve<0>(in, taps, K, L, own_C, out);
            const float *B = out + X, *Cs = out + X + N;  // both have stride own_C
            gemm_nt(Cs, own_C, L, B, own_C, L, N, score, ldl, transposed, ldl);
            for (long l = 0; l < L && kept_B; l++) {
                std::memcpy(kept_B + ((b * L + l) * G + g) * N, B + l * own_C, N * sizeof(float));
                std::memcpy(kept_x + (b * L + l) * inner + g * X, out + l * own_C, X * sizeof(float));
            }
            float* cum = steps + each * ldl;
            for (long i = 0; i < each; i++) {
                const long h = g * each + i;
                float* dt = steps + i * ldl;
                for (long l = 0; l < L; l++) dt[l] = upcast(projected[(b * L + l) * wide + inner + C + h]) + dt_bias[h];
            }
            for (long l = 0; l < each * ldl; l += W) {
                vec step = softplus(load(steps + l));
                step = step < dims.low ? splat(dims.low) : step;
                store(steps + l, step > dims.high ? splat(dims.high) : step);
            }
            for (long i = 0; i < each; i++) {
                const long h = g * each + i;
                float* dt = steps + i * ldl;
                const float rate = -std::exp(A_log[h]);
                float total = 0;
                for (long l = 0; l < L; l++) {
                    const long token = b * L + l;
                    if (token_mask && !token_mask[token]) dt[l] = 0;
                    const float decay = dt[l] * rate;
                    cum[l] = total += decay;
                    if (kept_dt) kept_dt[token * H + h] = dt[l], kept_decay[token * H + h] = decay;
                }
                decay_scores(score, cum, dt, L, by, ldl);
                for (long l = 0; l < L; l++) by[l * ldl + l] += D[h];
                float* to = y + i * P;
                if (state) {
                    if (i + 1 < each) prefetch_all(state + (slot * H + h + 1) * P * N, P * N);
                    gemm_nt(Cs, own_C, L, state + (slot * H + h) * P * N, N, P, N, seen, ldp, transposed, ldp);
                    for (long l = 0; l < L; l++) scaled(seen + l * ldp, P, std::exp(cum[l]), to + l * X);
                }
                for (long l = 0; l < L; l += TILE) {
                    const long M = std::min(long(TILE), L - l);
                    gemm(by + l * ldl, ldl, 1, out + i * P, own_C, l + M, M, P, to + l * X, X, state ? 1 : 0);
                }
            }
            for (long l = 0; l < L; l++) {
                const long token = b * L + l;
                const T* weight = norm_weight ? norm_weight + g * X : nullptr;
                gate_and_norm(y + l * X, projected + token * wide + g * X, weight, X, dims.eps, dims.norm,
                              mixed + token * inner + g * X);
            }
        }
    });
}

// Updates window and state of the slots in place with the first accepted[b] tokens of the step inputs.
template <class T>
void state_update(T* window, float* state, const int64_t* slots, const T* xBC, const float* x, const float* dt,
          const float* decay, const float* B, const int64_t* accepted, long rows, long L, Mamba dims, int threads) {
    const long H = dims.heads, P = dims.P, G = dims.groups, N = dims.N, K = dims.taps, C = H * P + 2 * G * N;
    parallel(threads, rows * L * H * P * N > MIN_PARALLEL_WORK, [&](int part, int parts) {
        Range tasks = partition(rows * H, part, parts);
        float* fed = scratch(0, L * P + L);
        float* by = fed + L * P;
        for (long task = tasks.lo; task < tasks.hi; task++) {
            const long b = task / H, h = task % H, g = h / (H / G), count = accepted[b];
            if (!count) continue;
            float total = 0;
            for (long l = 0; l < count; l++) by[l] = total += decay[(b * L + l) * H + h];
            for (long l = 0; l < count; l++) {
                const float left = std::exp(total - by[l]) * dt[(b * L + l) * H + h];
                for (long p = 0; p < P; p++) fed[l * P + p] = x[((b * L + l) * H + h) * P + p] * left;
            }
            float* own = state + ((slots ? slots[b] : b) * H + h) * P * N;
            gemm(fed, 1, P, B + (b * L * G + g) * N, G * N, count, P, N, own, N, std::exp(total));
        }
        Range own = partition(rows, part, parts);
        for (long b = own.lo; b < own.hi; b++) {
            const long count = accepted[b];
            T* to = window + (slots ? slots[b] : b) * (K - 1) * C;
            for (long k = 0; count && k < K - 1; k++) {  // oldest first, so no element is overwritten before it is read
                const long l = k + count - (K - 1);
                std::memcpy(to + k * C, l < 0 ? to + (k + count) * C : xBC + (b * L + l) * C, C * sizeof(T));
            }
        }
    });
}
