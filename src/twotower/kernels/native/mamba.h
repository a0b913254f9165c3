// The middle of a Mamba-2 mixer over one short block, and the state after a prefix of it.
#pragma once
#include "matmul.h"

struct Mamba { long heads, P, groups, N, taps; float low, high, eps; };

// projected (B, L, z | xBC | dt) → mixed (B, L, inner): convolution seeded with window, SiLU, scan seeded with state,
// D·x, gate, group norm. Row b reads slot slots[b] of window (R, K−1, C) and state (R, H, P, N). With a trace (xBC not
// null) it leaves what `fold` needs.
template <class T>
void mamba_block(const T* projected, const uint8_t* valid, const T* window, const float* state, const int64_t* slots,
                 const T* conv_weight, const T* conv_bias, const float* dt_bias, const float* A_log, const float* D,
                 const T* norm_weight, T* mixed, T* trace_xBC, float* trace_x, float* trace_dt, float* trace_decay,
                 float* trace_B, long rows, long L, Mamba dims, int threads) {
    const long H = dims.heads, P = dims.P, G = dims.groups, N = dims.N, K = dims.taps;
    const long inner = H * P, C = inner + 2 * G * N, wide = inner + C + H, each = H / G, X = each * P, own_C = X + 2 * N;
    parallel(threads, rows * L * H * P * N > WORTH, [&](int part, int parts) {
        Range tasks = share(rows * G, part, parts);
        float* in = scratch(0, (L + K - 1) * own_C);   // this group's inputs to the convolution: x | B | C
        float* out = scratch(1, L * own_C + W);        // and its outputs after SiLU
        float* taps = scratch(2, (K + 1) * own_C);
        float* y = scratch(3, L * X);
        float* score = scratch(4, L * L + L * P);
        float* seen = score + L * L;
        float* steps = scratch(5, 4 * L);
        for (long task = tasks.lo; task < tasks.hi; task++) {
            const long b = task / G, g = task % G, slot = slots ? slots[b] : b;
            // Where the group's channels lie among all C: three runs.
            const long from[3] = {g * X, inner + g * N, inner + (G + g) * N}, size[3] = {X, N, N};
            long at = 0;
            for (int run = 0; run < 3; run++) {
                for (long c = 0; c < size[run]; c++, at++) {
                    const T* w = conv_weight + (from[run] + c) * K;
                    for (long k = 0; k < K; k++) taps[k * own_C + at] = widen(w[k]);
                    taps[K * own_C + at] = conv_bias ? widen(conv_bias[from[run] + c]) : 0.0f;
                }
            }
            for (long l = 0; l < L + K - 1; l++) {
                at = 0;
                for (int run = 0; run < 3; run++) {
                    float* to = in + l * own_C + at;
                    if (l < K - 1) {
                        const T* w = window + (slot * (K - 1) + l) * C + from[run];
                        for (long c = 0; c < size[run]; c++) to[c] = window ? widen(w[c]) : 0.0f;
                    } else {
                        const long token = b * L + l - (K - 1);
                        const T* p = projected + token * wide + inner + from[run];
                        const bool counts = !valid || valid[token];
                        for (long c = 0; c < size[run]; c++) to[c] = counts ? widen(p[c]) : 0.0f;
                        if (trace_xBC)
                            for (long c = 0; c < size[run]; c++) put(trace_xBC + token * C + from[run] + c, to[c]);
                    }
                    at += size[run];
                }
            }
            for (long l = 0; l < L; l++) {
                float* to = out + l * own_C;
                long c = 0;
                for (; c + W <= own_C; c += W) {
                    vec v = load(in + l * own_C + c) * load(taps + c);
                    for (long k = 1; k < K; k++) v += load(in + (l + k) * own_C + c) * load(taps + k * own_C + c);
                    store(to + c, silu(v + load(taps + K * own_C + c)));
                }
                for (; c < own_C; c++) {
                    float v = in[l * own_C + c] * taps[c];
                    for (long k = 1; k < K; k++) v = std::fma(in[(l + k) * own_C + c], taps[k * own_C + c], v);
                    v += taps[K * own_C + c];
                    to[c] = v / (1.0f + std::exp(-v));
                }
            }
            const float *B = out + X, *Cs = out + X + N;  // both with stride own_C
            rows_dot(B, own_C, 0, L, Cs, own_C, L, N, [&](long m, long l, auto v) { put(score + l * L + m, v); });
            if (trace_B)
                for (long l = 0; l < L; l++)
                    std::memcpy(trace_B + ((b * L + l) * G + g) * N, B + l * own_C, N * sizeof(float));
            for (long i = 0; i < each; i++) {
                const long h = g * each + i;
                float *dt = steps, *decay = steps + L, *cum = steps + 2 * L;
                const float rate = -std::exp(A_log[h]), skip = D[h];
                float total = 0;
                for (long l = 0; l < L; l++) {
                    const long token = b * L + l;
                    const float raw = widen(projected[token * wide + inner + C + h]) + dt_bias[h];
                    float step = raw > 20 ? raw : std::log1p(std::exp(raw));
                    step = std::min(std::max(step, dims.low), dims.high);
                    if (valid && !valid[token]) step = 0;
                    dt[l] = step;
                    decay[l] = step * rate;
                    cum[l] = total += decay[l];
                    if (trace_dt) trace_dt[token * H + h] = dt[l], trace_decay[token * H + h] = decay[l];
                }
                if (state)
                    rows_dot(state + (slot * H + h) * P * N, N, 0, P, Cs, own_C, L, N,
                             [&](long p, long l, auto v) { put(seen + l * P + p, v); });
                for (long l = 0; l < L; l++) {
                    float* to = y + l * X + i * P;
                    const float *x = out + i * P, passed = state ? std::exp(cum[l]) : 0.0f;
                    for (long p = 0; p < P; p++) to[p] = (state ? seen[l * P + p] * passed : 0.0f);
                    for (long m = 0; m <= l; m++) {
                        const float by = score[l * L + m] * std::exp(cum[l] - cum[m]) * dt[m];
                        for (long p = 0; p < P; p++) to[p] += by * x[m * own_C + p];
                    }
                    for (long p = 0; p < P; p++) to[p] += skip * x[l * own_C + p];
                    if (trace_x) std::memcpy(trace_x + ((b * L + l) * H + h) * P, x + l * own_C, P * sizeof(float));
                }
            }
            for (long l = 0; l < L; l++) {  // gate, then the norm within the group
                const T* z = projected + (b * L + l) * wide + g * X;
                float* row = y + l * X;
                vec squares = {};
                long c = 0;
                for (; c + W <= X; c += W) {
                    vec v = load(row + c) * silu(load(z + c));
                    squares += v * v;
                    store(row + c, v);
                }
                float total = sum(squares);
                for (; c < X; c++) {
                    const float gate = widen(z[c]);
                    row[c] *= gate / (1.0f + std::exp(-gate));
                    total += row[c] * row[c];
                }
                const float by = 1.0f / std::sqrt(total / X + dims.eps);
                T* to = mixed + (b * L + l) * inner + g * X;
                for (c = 0; c < X; c++) put(to + c, row[c] * by * widen(norm_weight[g * X + c]));
            }
        }
    });
}

// The window and the state of the slots, in place, after the first accepted[b] tokens of the trace.
template <class T>
void fold(T* window, float* state, const int64_t* slots, const T* xBC, const float* x, const float* dt,
          const float* decay, const float* B, const int64_t* accepted, long rows, long L, Mamba dims, int threads) {
    const long H = dims.heads, P = dims.P, G = dims.groups, N = dims.N, K = dims.taps, C = H * P + 2 * G * N;
    parallel(threads, rows * L * H * P * N > WORTH, [&](int part, int parts) {
        Range tasks = share(rows * H, part, parts);
        float* fed = scratch(0, L);
        for (long task = tasks.lo; task < tasks.hi; task++) {
            const long b = task / H, h = task % H, g = h / (H / G), count = accepted[b];
            if (!count) continue;
            float total = 0;
            for (long l = 0; l < count; l++) fed[l] = total += decay[(b * L + l) * H + h];
            for (long l = 0; l < count; l++) fed[l] = std::exp(total - fed[l]) * dt[(b * L + l) * H + h];
            const float passed = std::exp(total);
            float* own = state + ((slots ? slots[b] : b) * H + h) * P * N;
            const float* from = B + (b * L * G + g) * N;
            for (long p = 0; p < P; p++) {
                float* row = own + p * N;
                long n = 0;
                for (; n + W <= N; n += W) {
                    vec v = load(row + n) * passed;
                    for (long l = 0; l < count; l++)
                        v += load(from + l * G * N + n) * (x[((b * L + l) * H + h) * P + p] * fed[l]);
                    store(row + n, v);
                }
                for (; n < N; n++) {
                    float v = row[n] * passed;
                    for (long l = 0; l < count; l++) v += from[l * G * N + n] * (x[((b * L + l) * H + h) * P + p] * fed[l]);
                    row[n] = v;
                }
            }
        }
        Range own = share(rows, part, parts);
        for (long b = own.lo; b < own.hi; b++) {
            const long count = accepted[b];
            T* to = window + (slots ? slots[b] : b) * (K - 1) * C;
            for (long k = 0; count && k < K - 1; k++) {  // oldest first: what is read is not yet written over
                const long l = k + count - (K - 1);
                std::memcpy(to + k * C, l < 0 ? to + (k + count) * C : xBC + (b * L + l) * C, C * sizeof(T));
            }
        }
    });
}
