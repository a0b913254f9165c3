// Low-rank updates of products: y += b·(a·x) at some tokens of a pass (model/adapters.py).
#pragma once

// The tokens at which adapters act, in order: `count` numbers of real tokens of a pass.
struct TokenList {
    const long* list = nullptr;
    long count = 0;
    bool together() const { return list[count - 1] - list[0] + 1 == count; }
    // These rows of `in`, where they lie if they are neighbours, otherwise copied to buffer 19.
    Tokens gathered(const Tokens& in, long K) const {
        if (together()) return in.from(list[0]);
        const Tokens to = new_tokens(19, 19, count, K, (in.wide ? WIDE : 0) | (in.narrow ? NARROW : 0));
        for (long i = 0; i < count; i++) {
            if (in.wide) std::memcpy(to.wide + i * to.ld, in.wide + list[i] * in.ld, (K + 1) * sizeof(float));
            if (in.narrow) std::memcpy(to.narrow + i * to.ld, in.narrow + list[i] * in.ld, (K + 1) * sizeof(bf16));
        }
        return to;
    }
};

// v, rounded to the precision of T; a float, a vec4 or a vec.
template <class T, class V> inline V rounded_value(V v) {
    if constexpr (std::is_same_v<T, float>) return v;
    else if constexpr (std::is_same_v<V, vec>) return rounded<T>(v);
    else {
        T as[sizeof v / sizeof(float)];
        put(as, v, long(sizeof v / sizeof(float)));
        return load<V>(as, long(sizeof v / sizeof(float)));
    }
}

// The matrices of an adapter, a (rank, K) and b (N, rank), and where it acts. The products a·x and b·(a·x) are rounded to
// T, and their sum with y is.
template <class T> struct Adapter {
    Matrix<T> a, b;
    long rank = 0;
    TokenList places;
    explicit operator bool() const { return rank && places.count; }
    int forms() const { return *this ? a.form() : 0; }  // of the tokens that `reduce` reads
    // Room for a·x; number: of the adapters that are in use at once.
    Tokens room(int number) const {
        const Tokens to = new_tokens(20 + number, 20 + number, places.count, rank, b.form());
        for (long i = 0; i < places.count; i++) to.end_row(i, rank);
        return to;
    }
    // A thread's share of a·x, of the tokens that `TokenList::gathered` has given.
    void reduce(const Tokens& x, long K, const Tokens& low, int part, int parts) const {
        if (!*this) return;
        const Range own = partition(a.units(rank), part, parts, a.grain());
        matmul(a, (const T*)nullptr, own.lo, own.hi, x, places.count, K, rank,
               [&](long n, long m, auto v, long count) { low.put(m, n, rounded_value<T>(v), count); });
    }
    // The same adapter of a weight that is packed or not: shares of its outputs begin where panels of b do.
    Adapter with(const Matrix<T>& w) const {
        Adapter own = *this;
        if (!w.packed) own.b.packed = nullptr;
        return own;
    }
    // Adds b·low to y, whose first column is output `first`, for units lo…hi of w. Y: float or T. rows: where y has the
    // real tokens.
    template <class Y>
    void expand(const Tokens& low, const Matrix<T>& w, long lo, long hi, long N, RealTokens rows, Y* y, long ld,
                long first = 0) const {
        const long unit = w.packed && !b.packed ? PANEL : 1;
        hi = std::min(hi * unit, b.units(N));
        matmul(b, (const T*)nullptr, lo * unit, hi, low, places.count, rank, N, [&](long n, long m, auto v, long count) {
            Y* to = y + rows[places.list[m]] * ld + n - first;
            const auto before = rounded_value<T>(load<decltype(v)>(to, count));
            put(to, rounded_value<T>(before + rounded_value<T>(v)), count);
        });
    }
};
