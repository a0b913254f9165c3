// Tokens rounded to int8, for integer products (integer_products.h). See `round_activations` in
// ops/reference/integer.py.
#pragma once
#include "packed_weights.h"

// Value k of token m is about scale[m] · q[m·ld + k], q in −127…127; zeros up to a whole group. corrections: see
// `WEIGHT_OFFSET` and `NIBBLE_OFFSET`; of a token first that of all inputs, then those of the groups.
struct RoundedTokens {
    int8_t* q = nullptr;
    float* scale = nullptr;
    int32_t* corrections = nullptr;
    long ld = 0, each = 0;  // bytes and corrections of a token
    explicit operator bool() const { return q; }
    RoundedTokens from(long m) const { return {q + m * ld, scale + m, corrections + m * each, ld, each}; }
};

// Kernels that need unsigned weights add these to weights, and Σ q times the negative offset to the sums.
constexpr int WEIGHT_OFFSET = 128, NIBBLE_OFFSET = 8;

// Memory for M tokens of K values in a buffer of the calling thread.
inline RoundedTokens room_for_tokens(long M, long K, int which) {
    RoundedTokens to;
    to.ld = (K + GROUP - 1) / GROUP * GROUP;
    to.each = to.ld / GROUP + 1;
    to.corrections = reinterpret_cast<int32_t*>(scratch(which, M * (to.each + 1) + M * to.ld / 4));
    to.scale = reinterpret_cast<float*>(to.corrections + M * to.each);
    to.q = reinterpret_cast<int8_t*>(to.scale + M);
    return to;
}

inline int32_t sum(ivec v) {
    int32_t total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
}

// Rounds token m. The largest magnitude becomes 127. With a value that is not finite, the scale is NaN.
inline void round_token(const float* x, long K, const RoundedTokens& to, long m) {
    vec most = {}, zeros = {};
    for (long k = 0; k < K; k += W) {
        const vec v = load<vec>(x + k, K - k), size = v < 0.0f ? -v : v;
        most = size > most ? size : most;
        zeros += v * 0.0f;
    }
    const bool finite = sum(zeros) == 0;
    const float scale = finite ? max_lane(most) / 127.0f : NAN;
    const vec by = splat(finite && scale > 0 ? scale : 1.0f);
    int8_t* q = to.q + m * to.ld;
    int32_t total = 0;
    for (long k = 0, group = 1; k < to.ld; k += GROUP, group++) {
        ivec all = {};
        for (long i = k; i < k + GROUP; i += W) {
            vec v = (i < K ? load<vec>(x + i, K - i) : vec{}) / by;
            v = (v + 12582912.0f) - 12582912.0f;  // 1.5·2²³: rounds to the nearest integer, ties to even
            v = v > 127.0f ? splat(127.0f) : v;   // the scale of subnormal numbers is inexact
            v = v < -127.0f ? splat(-127.0f) : v;
            const ivec whole = finite ? __builtin_convertvector(v, ivec) : ivec{};
            const i8vec narrow = __builtin_convertvector(whole, i8vec);
            std::memcpy(q + i, &narrow, W);
            all += whole;
        }
        const int32_t own = sum(all);
        to.corrections[m * to.each + group] = -NIBBLE_OFFSET * own;
        total += own;
    }
    to.corrections[m * to.each] = -WEIGHT_OFFSET * total;
    to.scale[m] = scale;
}

inline void round_tokens(const float* x, long ldx, Range tokens, long K, const RoundedTokens& to) {
    for (long m = tokens.lo; m < tokens.hi; m++) round_token(x + m * ldx, K, to, m);
}
