// Activations of feed-forward layers, one vector at a time.
#pragma once
#include "simd.h"

enum Activation { RELU2, SILU, GELU, GELU_TANH };  // as ACTIVATIONS in kernels.py

// ½ · erfc(z) for z ≥ 0, to a few units in the last place. The polynomials are those of erff and erfcf of Cephes.
inline vec half_erfc(vec z) {
    const vec q = z * z;
    vec near = splat(7.853861353153693e-5f);
    near = near * q - 8.010193625184903e-4f;
    near = near * q + 5.188327685732524e-3f;
    near = near * q - 2.685381193529856e-2f;
    near = near * q + 1.128358514861418e-1f;
    near = near * q - 3.761262582423300e-1f;
    near = near * q + 1.128379165726710f;
    const vec by = 1.0f / (z > 1.0f ? z : splat(1.0f)), y = by * by;
    vec middle = splat(2.326819970068386e-2f);
    middle = middle * y - 1.387039388740657e-1f;
    middle = middle * y + 3.687424674597105e-1f;
    middle = middle * y - 5.824733027278666e-1f;
    middle = middle * y + 6.210004621745983e-1f;
    middle = middle * y - 4.944515323274145e-1f;
    middle = middle * y + 3.404879937665872e-1f;
    middle = middle * y - 2.741127028184656e-1f;
    middle = middle * y + 5.638259427386472e-1f;
    vec far = splat(-1.047766399936249e1f);
    far = far * y + 1.297719955372516e1f;
    far = far * y - 7.495518717768503f;
    far = far * y + 2.921019019210786f;
    far = far * y - 1.015265279202700f;
    far = far * y + 4.218463358204948e-1f;
    far = far * y - 2.820767439740514e-1f;
    far = far * y + 5.641895067754075e-1f;
    const vec tail = exp(-q) * by * (z < 2.0f ? middle : far);
    return 0.5f * (z < 1.0f ? 1.0f - z * near : tail);
}

// x · Φ(x) with the normal distribution Φ.
inline vec gelu(vec x) {
    const vec tail = half_erfc(0.70710678f * (x < 0.0f ? -x : x));
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// ½x · (1 + tanh u) = x / (1 + e^−2u) with u = √(2 / π) · (x + 0.044715x³).
inline vec gelu_tanh(vec x) {
    const vec u = 0.79788456f * (x + 0.044715f * x * x * x);
    return x * reciprocal(1.0f + exp(-2.0f * u));
}

inline vec activated(vec x, int activation) {
    switch (activation) {
        case SILU: return silu(x);
        case GELU: return gelu(x);
        case GELU_TANH: return gelu_tanh(x);
        default: return relu(x) * relu(x);
    }
}

// out = act(gate) · up, or act(up) if gate is null. One loop, whole vectors: a value does not depend on its place.
template <class T> inline void activate(const T* up, const T* gate, T* out, long n, int activation) {
    for (long i = 0; i < n; i += W) {
        const vec u = load<vec>(up + i, n - i);
        put(out + i, gate ? activated(load<vec>(gate + i, n - i), activation) * u : activated(u, activation), n - i);
    }
}
