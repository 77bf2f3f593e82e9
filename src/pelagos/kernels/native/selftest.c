/* What must hold on this machine and compiler before the library is used: every tile gives an output the same bits, in
   both weight formats, and the polynomials are accurate. */
#include "native.h"
#include "vector.h"

#include <stdlib.h>

enum { N = 96, K = 37, M = 17 }; /* panels of 64 and 32; rows 6 + 6 + 5 */

/* Returns 0, or the number of the first check that fails. */
int native_self_test(void) {
    static float weight[N * K], a[M * K], whole[M * N], part[M * N];
    static uint16_t half[N * K];
    uint32_t seed = 1;
    for (int i = 0; i < N * K; i++) {
        seed = seed * 1664525u + 1013904223u;
        uint32_t bits = seed >> 31 << 31 | (0x3F000000u + (seed >> 4 & 0xFF0000u));
        int j = i % 32, paired = i - j + j % LANES * 2 + j / LANES; /* as the panels have it */
        memcpy(&weight[i], &bits, sizeof bits);
        half[paired] = (uint16_t)(bits >> 16);
    }
    for (int i = 0; i < M * K; i++) {
        seed = seed * 1664525u + 1013904223u;
        a[i] = (float)(int32_t)seed * 1e-9f;
    }
    Matrix plain = {weight, N, K, 0}, narrow = {half, N, K, 1};
    const float *from[M];
    float *to[M];
    for (int r = 0; r < M; r++) { from[r] = a + r * K; to[r] = whole + r * N; }
    for (int64_t p = 0; p < panel_count(&plain); p++) product_panel(&plain, 0, p, from, to, M, 0);
    for (int rows = 1; rows <= 7; rows++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            for (int r = 0; r < M; r++) to[r] = part + r * N;
            for (int first = 0; first < M; first += rows)
                for (int64_t p = 0; p < panel_count(&plain); p++)
                    product_panel(bf16 ? &narrow : &plain, 0, p, from + first, to + first,
                                  M - first < rows ? M - first : rows, 0);
            if (memcmp(whole, part, sizeof whole)) return 1;
        }
    for (int r = 0; r < M; r++) {
        double exact = 0.0; /* output 70: lane 6 of the panel of 32 that follows 64 outputs */
        for (int i = 0; i < K; i++) exact += (double)a[r * K + i] * (double)weight[64 * K + i * 32 + 6];
        if (fabs(exact - (double)whole[r * N + 70]) > 1e-4) return 2;
    }
    for (float x = -85.0f; x < 85.0f; x += 0.37f) {
        double e = exp((double)x), s = x > 0.0f ? x + log1p(exp(-(double)x)) : log1p(e);
        if (fabs((double)vexp(splat(x))[3] - e) > 4e-7 * e) return 3;
        if (fabs((double)softplus(splat(x))[5] - s) > 8e-7 * s) return 4;
    }
    return 0;
}
