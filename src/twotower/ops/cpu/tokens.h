// The tokens of a matrix product, in the forms that weights multiply: as floats, as bf16 for packed bf16 weights where the
// processor multiplies bf16, and rounded to int8.
#pragma once
#include "rounded_tokens.h"

enum TokenForm { WIDE = 1, NARROW = 2, ROUNDED = 4 };  // floats, bf16, int8 (rounded from the floats)

constexpr long MIN_PARALLEL_ROUNDING = 1 << 15;  // values

// Rows are padded by a cache line, because rows at a power-of-two distance would share cache sets. Packed bf16 weights with
// an odd number of inputs read one more input, which is 0.
inline long padded(long K) { return (K + 15) / 16 * 16 + 16; }

template <class T> inline void upcast_row(const T* x, long K, float* to) {
    long k = 0;
    for (; k + W <= K; k += W) store(to + k, load(x + k));
    for (; k < K; k++) to[k] = upcast(x[k]);
}

// Rows of `ld` values in each form that is not null; of `rounded.ld` in int8.
struct Tokens {
    float* wide = nullptr;
    bf16* narrow = nullptr;
    long ld = 0;
    RoundedTokens rounded;
    explicit operator bool() const { return wide || narrow; }
    Tokens from(long m) const {
        return {wide ? wide + m * ld : nullptr, narrow ? narrow + m * ld : nullptr, ld,
                rounded ? rounded.from(m) : rounded};
    }
    void end_row(long m, long K) const {
        if (wide) wide[m * ld + K] = 0;
        if (narrow) narrow[m * ld + K] = bf16{0};
    }
    void round(Range tokens, long K) const { round_tokens(wide, ld, tokens, K, rounded); }
    template <class T> void set_row(long m, const T* x, long K) const {
        if (wide) upcast_row(x, K, wide + m * ld);
        if constexpr (std::is_same_v<T, bf16>)
            if (narrow) std::memcpy(narrow + m * ld, x, K * sizeof(bf16));
        end_row(m, K);
    }
    // Columns c…c + count of a row, rounded to bf16 in that form; v is a float, a vec4 or a vec.
    template <class V> void put(long m, long c, V v, long count) const {
        if (wide) ::put(wide + m * ld + c, v, count);
        if (narrow) ::put(narrow + m * ld + c, v, count);
    }
};

// Room for M tokens of K values in the forms of `forms` (a sum of `TokenForm`s), in two buffers of this thread.
inline Tokens new_tokens(int which, int for_rounded, long M, long K, int forms) {
    const long ld = padded(K), wide = forms & WIDE ? M * ld : 0, narrow = forms & NARROW ? (M * ld + 1) / 2 : 0;
    float* at = scratch(which, wide + narrow);
    return {wide ? at : nullptr, narrow ? reinterpret_cast<bf16*>(at + wide) : nullptr, ld,
            forms & ROUNDED ? room_for_tokens(M, K, for_rounded) : RoundedTokens{}};
}

// The tokens of a pass that are not padding, in order: products compute these `count` of its `all` rows. list null: all.
struct RealTokens {
    long count, all;
    const long* list = nullptr;
    RealTokens(long all) : count(all), all(all) {}
    RealTokens(const std::vector<long>& real, long all) : count(long(real.size())), all(all), list(real.data()) {}
    long operator[](long i) const { return list ? list[i] : i; }
    // Sets the rows of padding in y (all, N) to 0.
    template <class T> void clear_padding(T* y, long N) const {
        for (long t = 0, i = 0; list && t < all; t++)
            if (i < count && list[i] == t) i++;
            else std::fill_n(y + t * N, N, T{});
    }
};

// The real tokens of x (all, K) in buffers 0 and 5.
template <class T> inline Tokens tokens_of(const T* x, RealTokens real, long K, int forms, int threads) {
    const long M = real.count;
    const Tokens to = new_tokens(0, 5, M, K, forms);
    for (long m = 0; m < M; m++) to.set_row(m, x + real[m] * K, K);
    if (to.rounded)
        parallel(threads, M * K > MIN_PARALLEL_ROUNDING,
                 [&](int part, int parts) { to.round(partition(M, part, parts), K); });
    return to;
}
