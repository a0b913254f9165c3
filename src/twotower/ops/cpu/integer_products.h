// Products of packed int8 and int4 weights with tokens that are rounded to int8 too. Sums over all inputs (int8) or over
// a group (int4) are exact in int32; scales are applied in one fixed order, so every instruction set, number of tokens
// and number of threads gives the same bits. The order is that of ops/reference/integer.py. A step is 4 inputs.
#pragma once
#include "rounded_tokens.h"

constexpr int STEP_INPUTS = 4, STEPS_OF_RUN = RUN / STEP_INPUTS;
constexpr long STEP_BYTES = STEP_INPUTS * PANEL;
typedef int8_t bytes __attribute__((vector_size(4 * W)));  // 4 inputs of W outputs
typedef uint8_t ubytes __attribute__((vector_size(4 * W)));

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define VNNI(sums, u8, s8) (ivec)_mm512_dpbusd_epi32((__m512i)(sums), (__m512i)(u8), (__m512i)(s8))
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
#define VNNI(sums, u8, s8) (ivec)_mm256_dpbusd_avx_epi32((__m256i)(sums), (__m256i)(u8), (__m256i)(s8))
#elif defined(__AVX512BW__)
#define MADDUBS(u8, s8) (pairs)_mm512_maddubs_epi16((__m512i)(u8), (__m512i)(s8))
#define ADD_PAIRS(v) (ivec)_mm512_madd_epi16((__m512i)(v), _mm512_set1_epi16(1))
#elif defined(__AVX2__)
#define MADDUBS(u8, s8) (pairs)_mm256_maddubs_epi16((__m256i)(u8), (__m256i)(s8))
#define ADD_PAIRS(v) (ivec)_mm256_madd_epi16((__m256i)(v), _mm256_set1_epi16(1))
#endif
typedef int16_t pairs __attribute__((vector_size(4 * W)));

inline ivec four_inputs(const int8_t* q) {  // the same in every lane
    int32_t step; std::memcpy(&step, q, sizeof step);
    return ivec{} + step;
}

// The sums of 4 products of bytes; for instruction sets without one for it.
inline ivec dot4(ivec w, ivec token, bool w_is_signed) {
    const uvec u = (uvec)w;
    ivec sums = {};
    for (int shift = 24; shift >= 0; shift -= 8) {
        const ivec by = w_is_signed ? (ivec)(u << shift) >> 24 : (ivec)((u << shift) >> 24);
        sums += by * ((ivec)((uvec)token << shift) >> 24);
    }
    return sums;
}

// --- int8: weights of 4 inputs for W outputs, prepared for many tokens ---------------------------------------------------

// Byte 4·o + i is input i of output o, for outputs v·W … of a panel.
inline bytes step_weights(const int8_t* p, int v) {
#ifdef __AVX512F__
    (void)v;
    bytes w; std::memcpy(&w, p, sizeof w);
    return __builtin_shufflevector(w, w, 0, 16, 32, 48, 1, 17, 33, 49, 2, 18, 34, 50, 3, 19, 35, 51, 4, 20, 36, 52, 5, 21,
                                   37, 53, 6, 22, 38, 54, 7, 23, 39, 55, 8, 24, 40, 56, 9, 25, 41, 57, 10, 26, 42, 58, 11,
                                   27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63);
#elif defined(__AVX2__)
    const auto input = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i * PANEL + v * W)); };
    const __m128i low = _mm_unpacklo_epi8(input(0), input(1)), high = _mm_unpacklo_epi8(input(2), input(3));
    return (bytes)_mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
#else
    typedef int8_t half __attribute__((vector_size(16)));
    half low, high;
    for (int i = 0; i < 2; i++) {  // of inputs 0, 1 and 2, 3: 8 outputs each
        std::memcpy(reinterpret_cast<char*>(&low) + 8 * i, p + i * PANEL + v * W, 8);
        std::memcpy(reinterpret_cast<char*>(&high) + 8 * i, p + (i + 2) * PANEL + v * W, 8);
    }
    return __builtin_shufflevector(low, high, 0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27, 4, 12, 20, 28, 5,
                                   13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
#endif
}

// One product of 4 inputs. Without VNNI |w| times the token with the sign of w: two products are at most 2·127·127, so
// a sum of 16 bits does not saturate.
#ifdef VNNI
struct StepWeights { bytes w; };  // plus WEIGHT_OFFSET
inline StepWeights prepared(bytes w) { return {w ^ int8_t(-128)}; }
inline ivec add_step(ivec sums, StepWeights by, ivec token) { return VNNI(sums, by.w, token); }
#elif defined(__AVX512BW__)
struct StepWeights { __m512i size; __mmask64 negative; };
inline StepWeights prepared(bytes w) { return {_mm512_abs_epi8((__m512i)w), _mm512_movepi8_mask((__m512i)w)}; }
inline ivec add_step(ivec sums, StepWeights by, ivec token) {
    const __m512i x = (__m512i)token;
    return sums + ADD_PAIRS(MADDUBS(by.size, _mm512_mask_sub_epi8(x, by.negative, _mm512_setzero_si512(), x)));
}
#elif defined(__AVX2__)
struct StepWeights { __m256i size, w; };
inline StepWeights prepared(bytes w) { return {_mm256_abs_epi8((__m256i)w), (__m256i)w}; }
inline ivec add_step(ivec sums, StepWeights by, ivec token) {
    return sums + ADD_PAIRS(MADDUBS(by.size, _mm256_sign_epi8((__m256i)token, by.w)));
}
#else
struct StepWeights { bytes w; };
inline StepWeights prepared(bytes w) { return {w}; }
inline ivec add_step(ivec sums, StepWeights by, ivec token) { return sums + dot4((ivec)by.w, token, true); }
#endif

// out[r][m]: the values of W outputs of vector r of R panels for token m of M, without the scales of the rows.
template <int R, int M> void integer_tile(const int8_t* w, long apart, const RoundedTokens& x, long K, vec* out) {
    ivec acc[R * VECTORS][M];
    for (int r = 0; r < R * VECTORS; r++)
        for (int m = 0; m < M; m++) {
            acc[r][m] = ivec{};
#ifdef VNNI
            acc[r][m] += x.corrections[m * x.each];
#endif
        }
    const auto step = [&](const int8_t* own, long panel_apart, const int8_t* q) {
        StepWeights weights[R * VECTORS];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECTORS; v++)
                weights[r * VECTORS + v] = prepared(step_weights(own + r * panel_apart, v));
        for (int m = 0; m < M; m++) {
            const ivec token = four_inputs(q + m * x.ld);
            for (int r = 0; r < R * VECTORS; r++) acc[r][m] = add_step(acc[r][m], weights[r], token);
        }
    };
    const long whole = K / STEP_INPUTS;
    for (long s = 0; s < whole; s++) {
        if constexpr (M <= MEMORY_BOUND_TOKENS) {  // a step is a cache line; the last ones prefetch the next panels
            const long ahead = s + PREFETCH_LINES, next = ahead * STEP_BYTES + (ahead < whole ? 0 : (R - 1) * apart);
            for (int r = 0; r < R; r++) __builtin_prefetch(w + r * apart + next);
        }
        step(w + s * STEP_BYTES, apart, x.q + s * STEP_INPUTS);
    }
    if (const long left = K % STEP_INPUTS) {  // the panel ends before its last step does
        int8_t last[R * STEP_BYTES] = {};
        for (int r = 0; r < R; r++) std::memcpy(last + r * STEP_BYTES, w + r * apart + whole * STEP_BYTES, left * PANEL);
        step(last, STEP_BYTES, x.q + whole * STEP_INPUTS);
    }
    for (int r = 0; r < R * VECTORS; r++)
        for (int m = 0; m < M; m++) out[r * M + m] = __builtin_convertvector(acc[r][m], vec) * x.scale[m];
}

// --- int4 ----------------------------------------------------------------------------------------------------------------

// The sums of a group, of weights plus NIBBLE_OFFSET. Without VNNI a lane of 16 bits has at most 16 products of
// 15·127, so it does not saturate.
#if !defined(VNNI) && defined(MADDUBS)
typedef pairs GroupSums;
inline GroupSums no_sums(int32_t) { return GroupSums{}; }
inline GroupSums add_nibbles(GroupSums sums, ivec w, ivec token) { return sums + MADDUBS(w, token); }
inline ivec corrected(GroupSums sums, int32_t correction) { return ADD_PAIRS(sums) + correction; }
#else
typedef ivec GroupSums;
inline GroupSums no_sums(int32_t correction) { return ivec{} + correction; }
inline ivec corrected(GroupSums sums, int32_t) { return sums; }
#ifdef VNNI
inline GroupSums add_nibbles(GroupSums sums, ivec w, ivec token) { return VNNI(sums, w, token); }
#else
inline GroupSums add_nibbles(GroupSums sums, ivec w, ivec token) { return sums + dot4(w, token, false); }
#endif
#endif

constexpr long AHEAD = 4;  // blocks to prefetch

// `integer_tile` for int4. The product of a group's sum and its scale is exact in fp32: 15 and 8 bits.
template <int R, int M> void integer_tile(const int4* w, long apart, const RoundedTokens& x, long K, vec* out) {
    vec acc[R * VECTORS * M] = {};
    for (long group = 0; group * GROUP < K; group++, w += BLOCK) {
        if constexpr (M <= MEMORY_BOUND_TOKENS) {
            const long next = AHEAD * BLOCK + ((group + AHEAD) * GROUP < K ? 0 : (R - 1) * apart);
            for (int r = 0; r < R; r++)
                for (long line = 0; line < BLOCK; line += 64) __builtin_prefetch(w + r * apart + next + line);
        }
        GroupSums sums[R * VECTORS][M];
        for (int m = 0; m < M; m++)
            for (int r = 0; r < R * VECTORS; r++) sums[r][m] = no_sums(x.corrections[m * x.each + 1 + group]);
        for (long i = 0; i < GROUP; i += RUN) {
            uvec runs[R * VECTORS];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < VECTORS; v++)
                    std::memcpy(runs + r * VECTORS + v, w + r * apart + BLOCK_SCALES + i * PANEL / 2 + v * W * 4, W * 4);
            const int8_t* q = x.q + group * GROUP + i;
            for (long half = 0; half < STEPS_OF_RUN; half++)  // the low, then the high halves of the bytes
                for (int m = 0; m < M; m++) {
                    const ivec token = four_inputs(q + m * x.ld + half * STEP_INPUTS);
                    for (int r = 0; r < R * VECTORS; r++)
                        sums[r][m] = add_nibbles(sums[r][m], (ivec)(runs[r] >> 4 * half & 0x0f0f0f0fu), token);
                }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECTORS; v++) {
                const vec scale = load(reinterpret_cast<const bf16*>(w + r * apart) + v * W);
                for (int m = 0; m < M; m++) {
                    const ivec sum = corrected(sums[r * VECTORS + v][m], x.corrections[m * x.each + 1 + group]);
                    vec& total = acc[(r * VECTORS + v) * M + m];
                    total = fmadd(__builtin_convertvector(sum, vec), scale, total);
                }
            }
    }
    for (int r = 0; r < R * VECTORS; r++)
        for (int m = 0; m < M; m++) out[r * M + m] = acc[r * M + m] * x.scale[m];
}

// --- all panels ----------------------------------------------------------------------------------------------------------

// Maximum size of a tile: sums of integers in registers, and tokens. With int4, 4 tokens of 4 panels take 0.75 × the time
// of 8 tokens of 2 panels.
template <class T> constexpr int INTEGER_SUMS = std::is_same_v<T, int4> ? SUMS * 2 / 3 : SUMS;
template <class T> constexpr int INTEGER_TOKENS = std::is_same_v<T, int4> ? 4 : TOKENS;

// The instance of `integer_tile` for R panels and M tokens known at run time.
template <class T> using IntegerTile = void (*)(const T*, long, const RoundedTokens&, long, vec*);
template <class T, int R = 1, int M = 1> inline IntegerTile<T> integer_tile_of(long panels, long tokens) {
    if constexpr (R < PANELS && (R + 1) * VECTORS <= INTEGER_SUMS<T>) {
        if (panels > R) return integer_tile_of<T, R + 1, M>(panels, tokens);
    }
    if constexpr (M < INTEGER_TOKENS<T> && R * VECTORS * (M + 1) <= INTEGER_SUMS<T>) {
        if (tokens > M) return integer_tile_of<T, R, M + 1>(panels, tokens);
    }
    return integer_tile<R, M>;
}

// As `dot_panels`, with rounded tokens.
template <class T, class Put>
inline void integer_panels(const T* w, long lo, long hi, const RoundedTokens& x, long M, long K, Put put) {
    if (!M) return;
    constexpr long LIMIT = std::min(INTEGER_TOKENS<T>, INTEGER_SUMS<T> / VECTORS);
    const long parts = (M + LIMIT - 1) / LIMIT, most = (M + parts - 1) / parts;
    const long at_once = std::min(long(PANELS), INTEGER_SUMS<T> / (VECTORS * most)), size = panel_size<T>(K);
    vec out[SUMS];
    for (long p = lo; p < hi; p += at_once) {
        const long count = std::min(at_once, hi - p);
        for (long m = 0; m < M; m += most) {
            const long tokens = std::min(most, M - m);
            integer_tile_of<T>(count, tokens)(w + p * size, size, x.from(m), K, out);
            for (long r = 0; r < count * VECTORS; r++)
                for (long i = 0; i < tokens; i++) put(p * PANEL + r * W, m + i, out[r * tokens + i]);
        }
    }
}
