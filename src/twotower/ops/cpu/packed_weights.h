// Matrix products with packed weights. A panel holds 16 output rows side by side. A vector holds the weights of
// several outputs, so no sum runs across a vector's lanes. Fast from one token to hundreds. Layout of a panel:
//   fp32  [in][16]
//   bf16  [in / 2][16][2], so that a shift and a mask upcast the weights of two inputs
//   int8  [in][16], with a scale for each row, stored elsewhere
//   int4  [in / 32] blocks of [16] scales in bf16 and 4 runs [16][4] of bytes with 8 inputs: byte b of a row has input b
//         in its low half and input b + 4 in its high half, each plus 8 (ops/reference/int4.py). A run is a register
//         of 32-bit lanes, and half of it the unsigned operand of VNNI's products of 4 bytes.
// Where the processor multiplies pairs of bf16 values (AVX-512 BF16), bf16 weights multiply bf16 tokens without an upcast.
// Missing rows and inputs are zeros. A token's result does not depend on the other tokens: each output is one sum in
// the order of the inputs, or with int4 one sum of the sums of groups.
#pragma once
#include "simd.h"

constexpr int PANEL = 16, VECTORS = PANEL / W;       // vectors per panel
constexpr int SUMS = W == 16 ? 24 : 12;              // accumulator vectors that fit in the registers
constexpr int TOKENS = W == 16 ? 12 : 6, PANELS = 4;  // maximum size of a tile: 9 to 12 tokens read the weights once

struct int4 { uint8_t pair; };                       // a byte of a block
constexpr long GROUP = 32, RUN = 8;                   // inputs of a block, and of a run in it
constexpr long BLOCK_SCALES = 2 * PANEL, BLOCK = BLOCK_SCALES + GROUP * PANEL / 2;  // bytes

template <class T> constexpr int STEP = std::is_same_v<T, bf16> ? 2 : 1;  // inputs per step
template <class T> inline long panel_size(long K) {                       // weights, for int4 bytes
    if constexpr (std::is_same_v<T, int4>) return (K + GROUP - 1) / GROUP * BLOCK;
    else return (K + STEP<T> - 1) / STEP<T> * STEP<T> * PANEL;
}
// Accumulators of a tile. int4 has two sums for each: of a group, and of all groups.
template <class T> constexpr int SUMS_OF = std::is_same_v<T, int4> ? SUMS * 2 / 3 : SUMS;
template <class T> constexpr int TOKENS_OF = std::is_same_v<T, int4> ? std::min(TOKENS, 8) : TOKENS;
inline long panel_count(long N) { return (N + PANEL - 1) / PANEL; }

// Loads the weights of inputs k…k + STEP for W outputs.
inline void upcast_panel(const float* p, vec* to) { to[0] = load(p); }
inline void upcast_panel(const int8_t* p, vec* to) { to[0] = load(p); }
inline void upcast_panel(const bf16* p, vec* to) {
    uvec both; std::memcpy(&both, p, sizeof both);
    const uvec first = both << 16, second = both & 0xffff0000u;
    std::memcpy(to, &first, sizeof first);
    std::memcpy(to + 1, &second, sizeof second);
}

// With few tokens the products are memory-bound: prefetch this many cache lines, continuing into the next panels. On an
// AMD Zen 5 processor, int8 reads 36 GB/s with it and 28 without, int4 20 and 10. int8 lost 5 % on an Intel Xeon.
constexpr long PREFETCH_LINES = 32, CACHE_LINE = 64;
constexpr int MEMORY_BOUND_TOKENS = 4;  // largest number of tokens with prefetch
template <class T> constexpr int LINE = CACHE_LINE / (PANEL * sizeof(T));  // inputs of a panel per cache line

// at: bytes from the start of a panel to what is read now; apart: bytes from one panel to the next, of R that are read
// side by side.
template <int R> inline void prefetch_panels(const void* first, long at, long apart) {
    const long ahead = at + PREFETCH_LINES * CACHE_LINE, from = ahead < apart ? ahead : ahead + (R - 1) * apart;
    for (int r = 0; r < R; r++) __builtin_prefetch(static_cast<const char*>(first) + r * apart + from);
}

// The panels that are read next, here or in the weight that follows in memory. With more tokens, a tile prefetches its
// share of them into the second cache: at each step `lines` cache lines. A
// condition here cost 10 to 20 % with 6 to 8 tokens on an AMD Zen 5 processor.
struct Ahead {
    const char* at;
    long pace;  // bytes of a step
    template <int LINES> void next() {
        for (int line = 0; line < LINES; line++) __builtin_prefetch(at + line * CACHE_LINE, 0, 2);
        at += pace;
    }
};

// Whether a tile of more tokens does so, and the largest number of tokens without. AVX2 upcasts bf16, and loses by it; in
// fp32, 4 to 16 tokens take 0.65 to 0.8 of the time.
template <class T> constexpr bool READS_AHEAD = sizeof(T) > (W == 16 ? 1 : 2);
template <class T> constexpr int NEAR_TOKENS = READS_AHEAD<T> && W == 8 ? 3 : MEMORY_BOUND_TOKENS;

// out[r][m]: W outputs of vector r of R panels, `apart` weights from one panel to the next, for token m of M.
template <int R, int M, class T>
void tile(const T* w, long apart, const float* x, long ldx, long K, Ahead ahead, vec* out) {
    constexpr int S = STEP<T>;
    vec acc[R * VECTORS][M] = {};
    const auto add = [&](long k) {
        vec weights[R * VECTORS][S];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECTORS; v++)
                upcast_panel(w + r * apart + k * PANEL + S * v * W, weights[r * VECTORS + v]);
        for (int s = 0; s < S; s++)
            for (int m = 0; m < M; m++) {
                const vec token = splat(x[m * ldx + k + s]);
                for (int r = 0; r < R * VECTORS; r++) acc[r][m] = fmadd(weights[r][s], token, acc[r][m]);
            }
    };
    long k = 0;
    if constexpr (M <= NEAR_TOKENS<T> || READS_AHEAD<T>) {
        for (; k + LINE<T> <= K; k += LINE<T>) {
            if constexpr (M <= NEAR_TOKENS<T>) prefetch_panels<R>(w, k * PANEL * sizeof(T), apart * sizeof(T));
            else ahead.template next<R>();
            for (int i = 0; i < LINE<T>; i += S) add(k + i);
        }
    }
    for (; k < K; k += S) add(k);
    for (int r = 0; r < R * VECTORS; r++)
        for (int m = 0; m < M; m++) out[r * M + m] = acc[r][m];
}

// `tile` for bf16 weights and bf16 tokens, with products of pairs.
template <int R, int M>
void tile_pairs(const bf16* w, long apart, const bf16* x, long ldx, long K, Ahead ahead, vec* out) {
    vec acc[R][M] = {};
    // Few addresses: other tokens are at constant distances.
    const bf16* four[3] = {x, x + 4 * ldx, x + 8 * ldx};
    for (long k = 0; k < K; k += 2, four[0] += 2, four[1] += 2, four[2] += 2) {
        if constexpr (M <= MEMORY_BOUND_TOKENS) prefetch_panels<R>(w, k * PANEL * sizeof(bf16), apart * sizeof(bf16));
        else ahead.template next<R>();
        uvec weights[R];
        for (int r = 0; r < R; r++) std::memcpy(weights + r, w + r * apart + k * PANEL, sizeof(uvec));
        for (int m = 0; m < M; m++) {
            uint32_t pair;
            std::memcpy(&pair, four[m / 4] + m % 4 * ldx, sizeof pair);
            const uvec token = pair - uvec{};
            for (int r = 0; r < R; r++) acc[r][m] = dot_pairs(weights[r], token, acc[r][m]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) out[r * M + m] = acc[r][m];
}

// Input I of a run for W rows, without their scales.
template <int I> inline vec upcast_run(uvec run) {
    constexpr int SHIFT = I % 4 * 8 + I / 4 * 4;
#ifdef __AVX512F__
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vec)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)run, SHIFT), values);  // reads 4 bits of a lane
#else
    return __builtin_convertvector((ivec)(run >> SHIFT & 15), vec) - 8.0f;
#endif
}

// Adds the products of a run's inputs I… to the sums. count: inputs of the run that the weight has.
template <int R, int M, int I = 0>
[[gnu::always_inline]] inline void add_run(const uvec* runs, const float* x, long ldx, long count, vec (*acc)[M]) {
    if constexpr (I < RUN) {
        if (I >= count) return;
        vec weights[R * VECTORS];
        for (int r = 0; r < R * VECTORS; r++) weights[r] = upcast_run<I>(runs[r]);
        for (int m = 0; m < M; m++) {
            const vec token = splat(x[m * ldx + I]);
            for (int r = 0; r < R * VECTORS; r++) acc[r][m] = fmadd(weights[r], token, acc[r][m]);
        }
        add_run<R, M, I + 1>(runs, x, ldx, count, acc);
    }
}

// `tile` for int4 weights. Sums each group of inputs, then adds the sum times the scale.
template <int R, int M>
void tile_int4(const int4* w, long apart, const float* x, long ldx, long K, Ahead, vec* out) {
    vec acc[R * VECTORS][M] = {};
    for (long k = 0, at = 0; k < K; k += GROUP, at += BLOCK) {
        vec group[R * VECTORS][M] = {};
        const long end = std::min(GROUP, K - k);
        for (long i = 0; i < end; i += RUN) {
            const long run = at + BLOCK_SCALES + i * PANEL / 2;
            if constexpr (M <= MEMORY_BOUND_TOKENS) prefetch_panels<R>(w, run, apart);
            uvec runs[R * VECTORS];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < VECTORS; v++)
                    std::memcpy(runs + r * VECTORS + v, w + r * apart + run + v * W * 4, W * 4);
            const float* token = x + k + i;
            if (end - i >= RUN) add_run<R, M>(runs, token, ldx, RUN, group);
            else add_run<R, M>(runs, token, ldx, end - i, group);
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECTORS; v++) {
                const vec scale = load(reinterpret_cast<const bf16*>(w + r * apart + at) + v * W);
                for (int m = 0; m < M; m++)
                    acc[r * VECTORS + v][m] = fmadd(scale, group[r * VECTORS + v][m], acc[r * VECTORS + v][m]);
            }
    }
    for (int r = 0; r < R * VECTORS; r++)
        for (int m = 0; m < M; m++) out[r * M + m] = acc[r][m];
}

// The instance of `tile` for R panels and M tokens known at run time.
template <class T, class X> using Tile = void (*)(const T*, long, const X*, long, long, Ahead, vec*);
template <class T, class X, int R = 1, int M = 1> inline Tile<T, X> tile_of(long panels, long tokens) {
    if constexpr (R < PANELS && (R + 1) * VECTORS <= SUMS_OF<T>) {
        if (panels > R) return tile_of<T, X, R + 1, M>(panels, tokens);
    }
    if constexpr (M < TOKENS_OF<T> && R * VECTORS * (M + 1) <= SUMS_OF<T>) {
        if (tokens > M) return tile_of<T, X, R, M + 1>(panels, tokens);
    }
    if constexpr (std::is_same_v<T, int4>) return tile_int4<R, M>;
    else if constexpr (std::is_same_v<X, bf16>) return tile_pairs<R, M>;
    else return tile<R, M, T>;
}

// Calls put(row, token, values) for the W rows from `row` on, of panels lo…hi.
template <class T, class X, class Put>
inline void dot_panels(const T* w, long lo, long hi, const X* x, long ldx, long M, long K, Put put) {
    if (!M) return;
    constexpr long LIMIT = std::min(TOKENS_OF<T>, SUMS_OF<T> / VECTORS);
    const long parts = (M + LIMIT - 1) / LIMIT, most = (M + parts - 1) / parts;  // tiles of similar numbers of tokens
    const long at_once = std::min(long(PANELS), SUMS_OF<T> / (VECTORS * most)), size = panel_size<T>(K);
    vec out[SUMS];
    for (long p = lo; p < hi; p += at_once) {
        const long count = std::min(at_once, hi - p);
        for (long m = 0; m < M; m += most) {
            const long tokens = std::min(most, M - m);
            // The first tile prefetches. The addresses of the others do not move.
            const Ahead ahead{reinterpret_cast<const char*>(w + (p + count) * size), m ? 0 : count * CACHE_LINE};
            tile_of<T, X>(count, tokens)(w + p * size, size, x + m * ldx, ldx, K, ahead, out);
            for (long r = 0; r < count * VECTORS; r++)
                for (long i = 0; i < tokens; i++) put(p * PANEL + r * W, m + i, out[r * tokens + i]);
        }
    }
}

// Packs w (matrices, N, K), matrix after matrix.
template <class T> void pack(const T* w, T* to, long matrices, long N, long K, int threads) {
    const long each = panel_count(N), size = panel_size<T>(K);
    parallel(threads, true, [&](int part, int parts) {
        Range own = partition(matrices * each, part, parts);
        for (long p = own.lo; p < own.hi; p++) {
            T* panel = to + p * size;
            std::memset(static_cast<void*>(panel), 0, size * sizeof(T));
            for (long i = 0; i < std::min(long(PANEL), N - p % each * PANEL); i++) {
                const T* row = w + (p / each * N + p % each * PANEL + i) * K;
                for (long k = 0; k < K; k++) panel[k / STEP<T> * STEP<T> * PANEL + i * STEP<T> + k % STEP<T>] = row[k];
            }
        }
    });
}
