// Attention of a short block over [cached keys ; the block's own keys]. Reads each row's cache in place.
#pragma once
#include "kv_append.h"
#include "matmul.h"
#include "small_gemm.h"

// How scores become weights, see `AttentionOptions` in reference/attention.py. 0 for none; scale 0: 1 / √D.
struct Scores {
    float scale, softcap;
    long window;
    // The first of `length` cached keys that a query of the pass sees.
    long first_key(long length) const { return window ? std::max(length - (window - 1), 0L) : 0; }
};

// SPAN: cached keys per task. CHUNK: keys per step of online softmax.
constexpr long SPAN = 1024, CHUNK = 256, LD_CHUNK = CHUNK + 16;

// State of online softmax for several queries: maximum score, sum of exp(score − maximum), weighted sum of values.
struct SoftmaxState { float *row_max, *row_sum, *acc; };

// One step of online softmax with n more keys. Turns the scores (row m of LD_CHUNK for query m) into weights and
// rescales the sums so far.
inline void online_softmax(float* scores, long n, long M, long D, SoftmaxState seen, long ld) {
    float base[TILE];
    for (long m = 0; m < M; m++) {
        float* row = scores + m * LD_CHUNK;
        store(row + n, splat(-INFINITY));  // pads the row to whole vectors
        vec highest = splat(seen.row_max[m]);
        for (long r = 0; r < n; r += W) {
            const vec next = load(row + r);
            highest = next > highest ? next : highest;
        }
        const float top = max_lane(highest), before = seen.row_max[m];
        if (top != before && before != -INFINITY) {
            const float shrink = std::exp(before - top);
            seen.row_sum[m] *= shrink;
            for (long d = 0; d < D; d++) seen.acc[m * ld + d] *= shrink;
        }
        seen.row_max[m] = top;
        base[m] = top == -INFINITY ? 0 : top;  // no key so far: weight 0
    }
    for (long m = 0; m < M; m++) {
        float* row = scores + m * LD_CHUNK;
        vec weights = {};
        for (long r = 0; r < n; r += W) {
            const vec e = exp(load(row + r) - base[m]);
            weights += e;
            store(row + r, e);
        }
        seen.row_sum[m] += sum(weights);
    }
}

// x = cap · tanh(x / cap), in whole vectors
inline void cap_scores(float* x, long n, float cap) {
    for (long i = 0; i < n; i += W) store(x + i, cap * tanh(load(x + i) / cap));
}

// Sets the first n scores to −∞.
inline void mask_first(float* x, long n) {
    if (n > 0) std::fill_n(x, n, -INFINITY);
}

template <class T> inline void divide(const float* x, float by, long n, T* y) {
    long i = 0;
    for (; i + W <= n; i += W) store(y + i, load(x + i) / by);
    for (; i < n; i++) put(y + i, x[i] / by);
}

// q (B, L, Hq, D), k and v (B, L, Hkv, D) → out (B, L, Hq, D). Cached tokens
// t < lengths[b] of past_k and past_v are at the places of the layout. prefix (B,) or null: the first queries of each row
// that are causal; the others are not, whatever `causal` says.
template <class T>
void attention(const T* q, const T* k, const T* v, const uint8_t* token_mask, const int64_t* prefix, int causal,
               const T* past_k, const T* past_v, KVLayout at, T* out, long B, long L, long Hq, long Hkv, long D,
               Scores options, int threads) {
    const int64_t *start = at.start, *stride = at.stride, *lengths = at.lengths;
    const long group = Hq / Hkv, Q = group * L, ld = padded(D), part_size = Q * (ld + 2);
    struct Task { long b, h, from, to; };  // keys of [cached keys ; own keys]; the row's last task has the own keys
    static thread_local std::vector<Task> list;
    static thread_local std::vector<long> firsts;
    list.clear();
    firsts.clear();
    long work = 0;
    for (long b = 0; b < B; b++)
        for (long h = 0; h < Hkv; h++) {
            firsts.push_back(long(list.size()));
            const long length = past_k ? lengths[b] : 0;
            long t = options.first_key(length);
            for (; t + SPAN < length; t += SPAN) list.push_back({b, h, t, t + SPAN});
            list.push_back({b, h, t, length + L});
            work += (length + L - options.first_key(length)) * Q * D;
        }
    firsts.push_back(long(list.size()));
    const Task* tasks = list.data();
    const long *first = firsts.data(), count = long(list.size());
    float* partial = scratch(0, count * part_size);
    const float scale = options.scale ? options.scale : 1.0f / std::sqrt(float(D));
    parallel(threads, work > MIN_PARALLEL_WORK, [&](int part, int parts) {
        float* queries = scratch(1, Q * ld);
        float* scores = scratch(2, TILE * LD_CHUNK + W);
        float* transposed = scratch(3, D * LD_CHUNK + W);
        float* place = scratch(4, L + W);
        float* one = scratch(5, part_size);
        Range own = partition(count, part, parts);
        for (long at = own.lo; at < own.hi; at++) {
            const Task task = tasks[at];
            const long b = task.b, h = task.h, length = past_k ? lengths[b] : 0, wide = Hkv * D;
            const T *own_k = k + (b * L * Hkv + h) * D, *own_v = v + (b * L * Hkv + h) * D;
            const long base = past_k ? start[b] + h * stride[b] : 0;
            for (long g = 0; g < group; g++)
                for (long l = 0; l < L; l++)
                    scaled(q + ((b * L + l) * Hq + h * group + g) * D, D, scale, queries + (g * L + l) * ld);
            // A query attends to itself and to the valid keys of its block up to its limit.
            const long causal_queries = prefix ? prefix[b] : causal ? L : 0;
            bool masked = causal_queries > 0;
            for (long l = 0; l < L; l++) {
                const bool counts = !token_mask || token_mask[b * L + l];
                place[l] = counts ? float(l) : INFINITY;
                masked |= !counts;
            }
            const bool alone = first[b * Hkv + h] + 1 == first[b * Hkv + h + 1];
            float* most = alone ? one : partial + at * part_size;
            const SoftmaxState seen{most, most + Q, most + 2 * Q};
            std::fill(seen.row_max, seen.row_max + Q, -INFINITY);
            std::fill(seen.row_sum, seen.row_sum + Q + Q * ld, 0.0f);
            for (long t = task.from; t < task.to; t += CHUNK) {
                const long n = std::min(CHUNK, task.to - t), past = std::min(std::max(length - t, 0L), n);
                const long begin = std::max(t - length, 0L);  // first own key of this chunk
                const T *keys = own_k + begin * wide, *values = own_v + begin * wide;
                const T *past_keys = past_k + (base + t) * D, *past_values = past_v + (base + t) * D;
                if (Q > SMALL_ROWS) {
                    transpose(past_keys, D, past, D, transposed, LD_CHUNK);
                    transpose(keys, wide, n - past, D, transposed + past, LD_CHUNK);
                }
                for (long m = 0; m < Q; m += TILE) {
                    const long M = std::min(long(TILE), Q - m), last = m % L + M <= L ? m % L + M - 1 : L - 1;
                    const long near = std::max(last < causal_queries ? std::min(n - past, last + 1 - begin) : n - past, 0L);
                    if (Q > SMALL_ROWS) {
                        gemm(queries + m * ld, ld, 1, transposed, LD_CHUNK, D, M, round_up(past + near), scores,
                             LD_CHUNK, 0, prefetcher(past_values, past * D));
                    } else {
                        gemm_nt_small(queries, ld, Q, past_keys, D, past, D, scores, LD_CHUNK,
                                      prefetcher(past_values, past * D));
                        gemm_nt_small(queries, ld, Q, keys, wide, near, D, scores + past, LD_CHUNK);
                    }
                    for (long i = 0; options.softcap && i < M; i++)
                        cap_scores(scores + i * LD_CHUNK, past + near, options.softcap);
                    if (masked)
                        for (long i = 0; i < M; i++) {
                            const long l = (m + i) % L;
                            const float limit = l < causal_queries ? float(l) : float(L);
                            float *row = scores + i * LD_CHUNK + past, *itself = row + l - begin;
                            const bool here = l >= begin && l < begin + near;
                            const float kept = here ? *itself : 0;
                            for (long r = 0; r < near; r += W)
                                store(row + r, load(place + begin + r) > limit ? splat(-INFINITY) : load(row + r));
                            if (here) *itself = kept;
                        }
                    for (long i = 0; options.window && i < M; i++)
                        if (const long l = (m + i) % L; l < causal_queries)
                            mask_first(scores + i * LD_CHUNK,
                                       std::min(length + l - (options.window - 1) - t, past + near));
                    const SoftmaxState tile{seen.row_max + m, seen.row_sum + m, seen.acc + m * ld};
                    online_softmax(scores, past + near, M, D, tile, ld);
                    gemm(scores, LD_CHUNK, 1, past_values, D, past, M, D, tile.acc, ld, 1,
                         prefetcher(past_keys + past * D, std::min(CHUNK, std::max(length - t - CHUNK, 0L)) * D));
                    gemm(scores + past, LD_CHUNK, 1, values, wide, near, M, D, tile.acc, ld, 1);
                }
            }
            if (alone)
                for (long m = 0; m < Q; m++) {
                    T* to = out + ((b * L + m % L) * Hq + h * group + m / L) * D;
                    divide(seen.acc + m * ld, seen.row_sum[m], D, to);
                }
        }
        if (count == B * Hkv) return;
        barrier(parts);
        own = partition(B * Hkv, part, parts);
        for (long at = own.lo; at < own.hi; at++) {
            if (first[at + 1] - first[at] == 1) continue;
            const long b = at / Hkv, h = at % Hkv;
            for (long m = 0; m < Q; m++) {
                float top = -INFINITY, total = 0;
                for (long i = first[at]; i < first[at + 1]; i++) top = std::max(top, partial[i * part_size + m]);
                float* sum_ = queries;
                std::fill(sum_, sum_ + D, 0.0f);
                for (long i = first[at]; i < first[at + 1]; i++) {
                    const float* p = partial + i * part_size;
                    const float by = std::exp(p[m] - top);
                    total += p[Q + m] * by;
                    for (long d = 0; d < D; d++) sum_[d] += p[2 * Q + m * ld + d] * by;
                }
                divide(sum_, total, D, out + ((b * L + m % L) * Hq + h * group + m / L) * D);
            }
        }
    });
}
