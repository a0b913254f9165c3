// Vectors of floats in the compiler's vector extension: AVX-512, AVX2 and NEON from one source.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint32_t uvec __attribute__((vector_size(W * 4)));
typedef uint16_t u16vec __attribute__((vector_size(W * 2)));
typedef int8_t i8vec __attribute__((vector_size(W)));
typedef int16_t i16vec __attribute__((vector_size(W * 2)));

struct bf16 { uint16_t bits; };

typedef float vec4 __attribute__((vector_size(16)));  // results of four neighbouring weight rows

#ifdef __AVX512F__
constexpr vec LANE_INDEX = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr vec LANE_INDEX = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

inline vec splat(float x) { return x - vec{}; }

// a·b + c, rounded once. An intrinsic, because compilers may fuse the operations in one loop and not in another (GCC
// tuned for Zen). Then a row's sum would depend on the number of rows beside it.
inline vec fmadd(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
inline vec fmadd(float a, vec b, vec c) { return fmadd(splat(a), b, c); }

// v, rounded by now: the compiler does not fuse a product with what follows.
inline vec once(vec v) {
    asm("" : "+m"(v));
    return v;
}

// Products of pairs of neighbouring bf16 values, added to a sum in fp32: an instruction of AVX-512 BF16. It takes bf16
// and fp32 values below 2⁻¹²⁶ as 0.
#ifdef __AVX512BF16__
constexpr bool BF16_PRODUCTS = true;
inline vec dot_pairs(uvec a, uvec b, vec c) {
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}
#else
constexpr bool BF16_PRODUCTS = false;
#endif

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }

inline vec load(const bf16* p) {  // a bf16 is the upper half of a float
    u16vec half; std::memcpy(&half, p, sizeof half);
    uvec wide = __builtin_convertvector(half, uvec) << 16;
    vec v; std::memcpy(&v, &wide, sizeof v); return v;
}

inline vec load(const int8_t* p) {  // exact
#if defined(__AVX512F__)  // the portable form compiles to a dozen instructions
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    i8vec v; std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(v, i16vec), ivec), vec);
#endif
}

inline float upcast(float x) { return x; }
inline float upcast(int8_t x) { return x; }
inline float upcast(bf16 x) { uint32_t b = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &b, 4); return f; }

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t b; std::memcpy(&b, &x, 4);
    p->bits = x != x ? 0x7fc0 : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
#ifdef __AVX512BF16__  // rounds in one instruction, fp32 values below 2⁻¹²⁶ to 0
inline __m256i to_bf16(vec v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
inline void store(bf16* p, vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v)); }
template <class T> inline vec rounded(vec v) {  // rounds to the precision of T
    if constexpr (std::is_same_v<T, float>) return v;
    else return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(v)), 16);
}
#else
inline void store(bf16* p, vec v) {
    uvec b; std::memcpy(&b, &v, sizeof v);
    uvec rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    uvec nan = (uvec)(v != v);
    rounded = (rounded & ~nan) | (nan & 0x7fc0u);
    u16vec half = __builtin_convertvector(rounded, u16vec);
    std::memcpy(p, &half, sizeof half);
}
template <class T> inline vec rounded(vec v) {  // rounds to the precision of T
    T as[W];
    store(as, v);
    return load(as);
}
#endif

// Sums over the lanes of n ≤ W vectors (a power of two) at once, halving by neighbouring lanes. A vector's sum does not
// depend on the other vectors.
inline vec evens(vec a, vec b) {
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#endif
}
inline vec odds(vec a, vec b) {
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}
inline vec interleave_low(vec a, vec b) {  // a₀ b₀ a₁ b₁ …
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#endif
}
inline vec interleave_high(vec a, vec b) {
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}
inline vec pairwise_sums(vec a, vec b) { return evens(a, b) + odds(a, b); }
template <int N> inline vec sums(const vec* v) {  // lane i (modulo N) is the sum of vector i
    if constexpr (N == 1) {
        vec s = v[0];
        for (int n = W; n > 1; n /= 2) s = pairwise_sums(s, s);
        return s;
    } else {
        vec level[N];
        for (int i = 0; i < N; i++) level[i] = v[i];
        int done = 1;
        for (int n = N; n > 1; n /= 2, done *= 2)
            for (int i = 0; i < n / 2; i++) level[i] = pairwise_sums(level[2 * i], level[2 * i + 1]);
        for (; done < W; done *= 2) level[0] = pairwise_sums(level[0], level[0]);
        return level[0];
    }
}
inline float sum(vec v) { return sums<1>(&v)[0]; }
inline float max_lane(vec v) {
    for (int n = W; n > 1; n /= 2) {
        const vec a = evens(v, v), b = odds(v, v);
        v = a > b ? a : b;
    }
    return v[0];
}

// Stores a float, the vec4 of four neighbouring rows, or the first `count` values of a vector.
template <class T> inline void put(T* p, float v, long) { put(p, v); }
inline void put(float* p, vec4 v) { std::memcpy(p, &v, sizeof v); }
inline void put(float* p, vec4 v, long) { put(p, v); }
inline void put(bf16* p, vec4 v, long) { for (int i = 0; i < 4; i++) put(p + i, v[i]); }
template <class T> inline void put(T* p, vec v, long count) {
    if (count >= W) store(p, v);
    else for (long i = 0; i < count; i++) put(p + i, v[i]);
}
template <class V, class T> inline V load(const T* p, long count) {
    if constexpr (std::is_same_v<V, float>) return upcast(*p);
    else if constexpr (std::is_same_v<V, vec4>) return vec4{upcast(p[0]), upcast(p[1]), upcast(p[2]), upcast(p[3])};
    else if (count >= W) return load(p);
    else {
        V v = {};
        for (long i = 0; i < count; i++) v[i] = upcast(p[i]);
        return v;
    }
}
inline float relu(float v) { return v > 0 ? v : 0; }
inline vec4 relu(vec4 v) { return v > 0 ? v : vec4{}; }
inline vec relu(vec v) { return v > 0 ? v : vec{}; }

// exp to about one unit in the last place: 2^n · p(r), r in ±ln2/2; 0 below −87, saturated above 88.
inline vec exp(vec x) {
    const vec clipped = x > 88.0f ? splat(88.0f) : x;
    vec shifted = clipped * 1.44269504f + 12582912.0f;  // 1.5·2²³: the integer part lands in the low bits
    vec n = shifted - 12582912.0f;
    vec r = clipped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec power; std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? vec{} : p * power;
}

// 1 / x to about one unit in the last place, for x below 2¹²⁶; a division would take as long as all of `exp`.
inline vec reciprocal(vec x) {
#ifdef __AVX512F__
    const vec guess = (vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

// tanh to a few units in the last place: a polynomial near 0 (Cephes), otherwise 1 − 2 / (e^2|x| + 1).
inline vec tanh(vec x) {
    const vec size = x < 0.0f ? -x : x, q = x * x;
    vec p = splat(-5.70498872745e-3f);
    p = p * q + 2.06390887954e-2f;
    p = p * q - 5.37397155531e-2f;
    p = p * q + 1.33314422036e-1f;
    p = p * q - 3.33332819422e-1f;
    const vec far = 1.0f - 2.0f * reciprocal(exp(2.0f * (size > 10.0f ? splat(10.0f) : size)) + 1.0f);
    return size < 0.625f ? p * q * x + x : x < 0.0f ? -far : far;
}

inline vec silu(vec x) { return x * reciprocal(1.0f + exp(-x)); }

// ln(1 + eˣ) to a few units in the last place: max(x, 0) + ln(1 + z), z = e^−|x|, as a series of 2·artanh(z / (2 + z)).
inline vec softplus(vec x) {
    const vec z = exp(x > 0.0f ? -x : x), s = z * reciprocal(2.0f + z), q = s * s;
    vec p = q * (1 / 13.0f) + 1 / 11.0f;
    p = p * q + 1 / 9.0f;
    p = p * q + 1 / 7.0f;
    p = p * q + 1 / 5.0f;
    p = p * q + 1 / 3.0f;
    p = p * q + 1.0f;
    return (x > 0.0f ? x : vec{}) + 2.0f * s * p;
}

// Runs a job in equal parts, one per thread. Small jobs stay on one thread: waking another takes microseconds.
template <class F> inline void parallel(int threads, bool enough_work, F part) {
#ifdef _OPENMP
    if (threads > 1 && enough_work) {
#pragma omp parallel num_threads(threads)
        part(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void)threads, (void)enough_work;
    part(0, 1);
}

inline void barrier(int parts) {
    (void)parts;
#ifdef _OPENMP
    if (parts > 1) {
#pragma omp barrier
    }
#endif
}

struct Range { long lo, hi; };
inline Range partition(long n, int part, int parts, long grain = 1) {  // in multiples of grain
    long units = (n + grain - 1) / grain;
    return {std::min(n, units * part / parts * grain), std::min(n, units * (part + 1) / parts * grain)};
}

// Per-thread buffers that are kept between calls, so that loops do not allocate. 8 to 13 and 15 belong to
// the pass of a tower (tower.h), 16 to 18 to decoding (decode.h), 19 to 22 to adapters (low_rank.h), the others to the
// kernel that runs. A larger request moves a buffer.
inline float* scratch(int which, long floats) {
    static thread_local std::vector<float> buffers[23];
    std::vector<float>& buffer = buffers[which];
    if (long(buffer.size()) < floats + 16) buffer.resize(floats + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);  // on a cache line
}
