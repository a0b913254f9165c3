// Attention of a short block over [cached keys ; its own], each row's cache where it lies and as long as it is.
#pragma once
#include "matmul.h"

constexpr long SPAN = 1024, CHUNK = 128;  // cached keys of a task, and of one turn of its running softmax
constexpr long MANY = 8;                  // queries for which turning the keys around pays

// acc[m][d] += Σ_r p[m][r] · v[r][d] over n rows of v, of D columns, for M rows of p.
template <int M, class T>
inline void weigh(const float* p, long ldp, const T* v, long ldv, long n, long D, float* acc, long ld) {
    long d = 0;
    for (; d + 2 * W <= D; d += 2 * W) {
        vec a[M][2];
        for (int m = 0; m < M; m++) a[m][0] = load(acc + m * ld + d), a[m][1] = load(acc + m * ld + d + W);
        for (long r = 0; r < n; r++) {
            vec v0 = load(v + r * ldv + d), v1 = load(v + r * ldv + d + W);
            for (int m = 0; m < M; m++) a[m][0] += p[m * ldp + r] * v0, a[m][1] += p[m * ldp + r] * v1;
        }
        for (int m = 0; m < M; m++) store(acc + m * ld + d, a[m][0]), store(acc + m * ld + d + W, a[m][1]);
    }
    for (; d < D; d++)
        for (int m = 0; m < M; m++) {
            float total = acc[m * ld + d];
            for (long r = 0; r < n; r++) total = std::fma(p[m * ldp + r], widen(v[r * ldv + d]), total);
            acc[m * ld + d] = total;
        }
}

template <class T>
inline void weigh_all(const float* p, long ldp, long M, const T* v, long ldv, long n, long D, float* acc, long ld) {
    long m = 0;
    for (; m + 4 <= M; m += 4) weigh<4>(p + m * ldp, ldp, v, ldv, n, D, acc + m * ld, ld);
    for (; m < M; m++) weigh<1>(p + m * ldp, ldp, v, ldv, n, D, acc + m * ld, ld);
}

// n ≤ CHUNK more keys for Q queries: running maximum `most`, sum `total` and weighted values acc (Q, ld).
template <class T, class Sees>
inline void attend(const float* q, long ldq, long Q, const T* k, const T* v, long n, long D, float* scores, float* most,
                   float* total, float* acc, long ld, Sees sees) {
    if (Q < MANY) {
        rows_dot(k, D, 0, n, q, ldq, Q, D, [&](long r, long m, auto s) { put(scores + m * CHUNK + r, s); });
    } else {  // keys turned around: no sums within a vector
        float* turned = scratch(4, D * CHUNK);
        for (long r = 0; r < n; r++)
            for (long d = 0; d < D; d++) turned[d * CHUNK + r] = widen(k[r * D + d]);
        std::fill(scores, scores + Q * CHUNK, 0.0f);
        weigh_all(q, ldq, Q, turned, CHUNK, D, (n + W - 1) / W * W, scores, CHUNK);
    }
    for (long m = 0; m < Q; m++) {
        float* row = scores + m * CHUNK;
        for (long r = 0; r < n; r++) if (!sees(m, r)) row[r] = -INFINITY;
        for (long r = n; r % W; r++) row[r] = -INFINITY;  // to the end of a vector
        float top = most[m];
        vec highest = splat(top);
        for (long r = 0; r < n; r += W) {
            const vec next = load(row + r);
            highest = next > highest ? next : highest;
        }
        for (int i = 0; i < W; i++) top = std::max(top, highest[i]);
        if (top == -INFINITY) {
            for (long r = 0; r < n; r++) row[r] = 0;
            continue;
        }
        const float shrink = std::exp(most[m] - top);
        vec sums_ = {};
        for (long r = 0; r < n; r += W) {
            vec e = exp(load(row + r) - top);
            sums_ += e;
            store(row + r, e);
        }
        total[m] = total[m] * shrink + sum(sums_);
        most[m] = top;
        if (shrink != 1) for (long d = 0; d < D; d++) acc[m * ld + d] *= shrink;
    }
    weigh_all(scores, CHUNK, Q, v, D, n, D, acc, ld);
}

// q (B, L, Hq, D), k and v (B, L, Hkv, D) → out (B, L, Hq, D). Cached: of row b, head h, token t < lengths[b] the vector
// start[b] + h·stride[b] + t of past_k, past_v.
template <class T>
void attention(const T* q, const T* k, const T* v, const uint8_t* valid, int causal, const T* past_k, const T* past_v,
               const int64_t* start, const int64_t* stride, const int64_t* lengths, T* out, long B, long L, long Hq,
               long Hkv, long D, int threads) {
    const long group = Hq / Hkv, Q = group * L, ldq = padded(D), ld = padded(D), part_size = Q * (ld + 2);
    struct Task { long b, h, from, to; };  // cached keys from…to; its own block where from < 0
    static thread_local std::vector<Task> list;
    static thread_local std::vector<long> firsts;
    list.clear();
    firsts.clear();
    long work = 0;
    for (long b = 0; b < B; b++)
        for (long h = 0; h < Hkv; h++) {
            firsts.push_back(long(list.size()));
            const long length = past_k ? lengths[b] : 0;
            for (long t = 0; t < length; t += SPAN) list.push_back({b, h, t, std::min(length, t + SPAN)});
            list.push_back({b, h, -1, L});
            work += (length + L) * Q * D;
        }
    firsts.push_back(long(list.size()));
    const Task* tasks = list.data();
    const long *first = firsts.data(), count = long(list.size());
    float* partial = scratch(0, count * part_size);
    const float scale = 1.0f / std::sqrt(float(D));
    parallel(threads, work > WORTH, [&](int part, int parts) {
        float* queries = scratch(1, Q * ldq);
        float* scores = scratch(2, Q * CHUNK + W);
        Range own = share(count, part, parts);
        for (long at = own.lo; at < own.hi; at++) {
            const Task task = tasks[at];
            for (long m = 0; m < Q; m++) {
                const T* from = q + ((task.b * L + m % L) * Hq + task.h * group + m / L) * D;
                for (long d = 0; d < D; d++) queries[m * ldq + d] = widen(from[d]) * scale;
            }
            float *most = partial + at * part_size, *total = most + Q, *acc = total + Q;
            for (long m = 0; m < Q; m++) most[m] = -INFINITY, total[m] = 0;
            std::fill(acc, acc + Q * ld, 0.0f);
            if (task.from >= 0) {
                const long base = start[task.b] + task.h * stride[task.b];
                for (long t = task.from; t < task.to; t += CHUNK)
                    attend(queries, ldq, Q, past_k + (base + t) * D, past_v + (base + t) * D, std::min(CHUNK, task.to - t), D,
                           scores, most, total, acc, ld, [](long, long) { return true; });
            } else {
                T* own_k = reinterpret_cast<T*>(scratch(3, 2 * L * D));  // this head's keys and values without gaps
                T* own_v = own_k + L * D;
                for (long l = 0; l < L; l++) {
                    std::memcpy(own_k + l * D, k + ((task.b * L + l) * Hkv + task.h) * D, D * sizeof(T));
                    std::memcpy(own_v + l * D, v + ((task.b * L + l) * Hkv + task.h) * D, D * sizeof(T));
                }
                for (long t = 0; t < L; t += CHUNK)
                    attend(queries, ldq, Q, own_k + t * D, own_v + t * D, std::min(CHUNK, L - t), D, scores, most, total, acc,
                           ld, [&](long m, long r) {
                               const long query = m % L, key = t + r;
                               return (!valid || valid[task.b * L + key] || key == query) && (!causal || key <= query);
                           });
            }
        }
        barrier(parts);
        own = share(B * Hkv, part, parts);
        for (long at = own.lo; at < own.hi; at++) {
            const long b = at / Hkv, h = at % Hkv;
            for (long m = 0; m < Q; m++) {
                float top = -INFINITY, total = 0;
                for (long i = first[at]; i < first[at + 1]; i++) top = std::max(top, partial[i * part_size + m]);
                T* to = out + ((b * L + m % L) * Hq + h * group + m / L) * D;
                float* sum_ = queries;
                std::fill(sum_, sum_ + D, 0.0f);
                for (long i = first[at]; i < first[at + 1]; i++) {
                    const float* p = partial + i * part_size;
                    const float by = std::exp(p[m] - top);
                    total += p[Q + m] * by;
                    for (long d = 0; d < D; d++) sum_[d] += p[2 * Q + m * ld + d] * by;
                }
                for (long d = 0; d < D; d++) put(to + d, sum_[d] / total);
            }
        }
    });
}
