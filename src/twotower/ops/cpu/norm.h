// RMSNorm with the modulation before or after it.
#pragma once
#include "matmul.h"

// y = x̂ / rms(x̂) · (offset + weight). order 0: no modulation; 1: x̂ = x·(1 + scale) + shift; 2: modulation after the
// norm. shift, scale (tokens / each, H): one row per `each` tokens. x and y may be the same.
template <class X, class T>
void rms_norm(const X* x, const T* weight, const T* shift, const T* scale, T* y, long tokens, long H, long each,
              long stride, int order, float eps, float offset, int threads) {
    parallel(threads, tokens * H > MIN_PARALLEL_WORK, [&](int part, int parts) {
        Range own = partition(tokens, part, parts);
        float* row = scratch(0, H + W);
        for (long t = own.lo; t < own.hi; t++) {
            const T *plus = shift + t / each * stride, *times = scale + t / each * stride;
            vec squares = {};
            long h = 0;
            for (; h + W <= H; h += W) {
                vec v = load(x + t * H + h);
                if (order == 1) v = v * (1.0f + load(times + h)) + load(plus + h);
                squares += v * v;
                store(row + h, v);
            }
            float total = sum(squares);
            for (; h < H; h++) {
                float v = upcast(x[t * H + h]);
                if (order == 1) v = v * (1.0f + upcast(times[h])) + upcast(plus[h]);
                total += v * v;
                row[h] = v;
            }
            float by = 1.0f / std::sqrt(total / H + eps);
            for (h = 0; h + W <= H; h += W) {
                vec v = load(row + h) * by * (offset + load(weight + h));
                if (order == 2) v = v * (1.0f + load(times + h)) + load(plus + h);
                store(y + t * H + h, v);
            }
            for (; h < H; h++) {
                float v = row[h] * by * (offset + upcast(weight[h]));
                if (order == 2) v = v * (1.0f + upcast(times[h])) + upcast(plus[h]);
                put(y + t * H + h, v);
            }
        }
    });
}
