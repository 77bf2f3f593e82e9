/* Sixteen float32 lanes in the compiler's own vector types (AVX-512, AVX2 and NEON alike), and the functions whose
   bits must not come from a library: exp and softplus as fixed polynomials, sums over lanes as fixed trees. */
#ifndef PELAGOS_VECTOR_H
#define PELAGOS_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef float v16_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16_any __attribute__((vector_size(32), aligned(2), may_alias));

/* The machine's own width, for loops that live in registers: compilers keep wider vectors in memory. */
#if defined(__AVX512F__)
#define NATIVE 16
#define ROOM 24 /* accumulators that fit the registers beside weights and one broadcast */
#elif defined(__AVX__)
#define NATIVE 8
#define ROOM 12
#else
#define NATIVE 4
#define ROOM 12
#endif
typedef float vn __attribute__((vector_size(4 * NATIVE)));
typedef uint32_t un __attribute__((vector_size(4 * NATIVE)));
typedef float vn_any __attribute__((vector_size(4 * NATIVE), aligned(4), may_alias));
typedef uint32_t un_any __attribute__((vector_size(4 * NATIVE), aligned(4), may_alias));
INLINE vn load_n(const float *p) { return *(const vn_any *)p; }
INLINE void store_n(float *p, vn x) { *(vn_any *)p = x; }
INLINE vn splat_n(float x) { return x - (vn){0}; }

INLINE v16 load(const float *p) { return *(const v16_any *)p; }
INLINE void store(float *p, v16 x) { *(v16_any *)p = x; }
INLINE v16 splat(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16 load_bf16(const uint16_t *p) {
    return (v16)(__builtin_convertvector(*(const h16_any *)p, u16) << 16);
}
INLINE v16 blend(i16 mask, v16 yes, v16 no) { return (v16)((mask & (i16)yes) | (~mask & (i16)no)); }
INLINE v16 vmax(v16 a, v16 b) { return blend(a > b, a, b); }
INLINE v16 vmin(v16 a, v16 b) { return blend(a < b, a, b); }

/* Hold x in a register: compilers read an operand from memory again for each use, and here loads are what runs out. */
#ifdef __AVX512F__
#define HOLD(x) __asm__("" : "+v"(x))
#else
#define HOLD(x) (void)(x)
#endif

#define XOR8(v) __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define XOR4(v) __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define XOR2(v) __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define XOR1(v) __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)

INLINE v16 sum_rows(v16 v) { v = v + XOR1(v); return v + XOR2(v); }    /* over the four lanes of a 4x4 row */
INLINE v16 sum_columns(v16 v) { v = v + XOR4(v); return v + XOR8(v); } /* over the four rows */
INLINE v16 max_rows(v16 v) { v = vmax(v, XOR1(v)); return vmax(v, XOR2(v)); }
INLINE v16 max_columns(v16 v) { v = vmax(v, XOR4(v)); return vmax(v, XOR8(v)); }
INLINE float sum_lanes(v16 v) { return sum_rows(sum_columns(v))[0]; }

/* exp within 2 ulp; below -86 it is 0, above 88 it stays at exp(88). */
INLINE v16 vexp(v16 x) {
    v16 bound = vmin(x, splat(88.0f));
    v16 shifted = bound * 1.44269504088896341f + 12582912.0f; /* the nearest whole number lies in the low bits */
    v16 n = shifted - 12582912.0f;
    v16 r = bound - n * 0.693145751953125f;
    r = r - n * 1.42860682030941723212e-6f;
    v16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    v16 scaled = (v16)((i16)p + (((i16)shifted - 0x4B400000) << 23));
    return blend(x < -86.0f, (v16){0}, scaled);
}

INLINE v16 sigmoid(v16 x) { return 1.0f / (1.0f + vexp(-x)); }

/* log(1 + exp(x)): the series of 2 atanh(y / (2 + y)) with y = exp(-|x|) <= 1. */
INLINE v16 softplus(v16 x) {
    v16 y = vexp(-blend(x < 0.0f, -x, x));
    v16 s = y / (2.0f + y);
    v16 z = s * s;
    v16 p = splat(1.0f / 15.0f);
    p = p * z + 1.0f / 13.0f;
    p = p * z + 1.0f / 11.0f;
    p = p * z + 1.0f / 9.0f;
    p = p * z + 1.0f / 7.0f;
    p = p * z + 1.0f / 5.0f;
    p = p * z + 1.0f / 3.0f;
    p = p * z + 1.0f;
    return vmax(x, (v16){0}) + 2.0f * s * p;
}

/* 1 / rms of x (n,): squares summed by index mod 16, then over lanes. */
INLINE float inverse_rms(const float *x, int64_t n, float eps) {
    v16 sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) { v16 v = load(x + i); sum = sum + v * v; }
    if (i < n) {
        v16 v = {0};
        memcpy(&v, x + i, (size_t)(n - i) * sizeof(float));
        sum = sum + v * v;
    }
    return 1.0f / sqrtf(sum_lanes(sum) / (float)n + eps);
}

/* out = x / rms(x) * weight; weight may be NULL, out may be x. */
INLINE void rms_norm(const float *x, const float *weight, float *out, int64_t n, float eps) {
    float scale = inverse_rms(x, n, eps);
    if (weight) for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
    else for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale;
}

/* Rotate the last `rope` channels of x (n,) as adjacent pairs by a table of rope/2 cosines, then rope/2 sines. */
INLINE void rotate(float *x, int64_t n, int64_t rope, const float *table, float sign) {
    float *pair = x + n - rope;
    for (int64_t i = 0; i < rope / 2; i++) {
        float a = pair[2 * i], b = pair[2 * i + 1], c = table[i], s = sign * table[rope / 2 + i];
        pair[2 * i] = a * c - b * s;
        pair[2 * i + 1] = b * c + a * s;
    }
}

#endif
