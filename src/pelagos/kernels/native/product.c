/* Products with packed weights. An output is one chain of fused multiply-adds over k, first to last, whatever the tile
   it is computed in: vectors run along outputs, never along k. */
#include "native.h"
#include "vector.h"

#define AHEAD 4096 /* bytes */

#ifdef __AVX512F__
#define ROOM 24 /* accumulators that fit the registers beside weights and one broadcast */
#define MOST_ROWS 6
#else
#define ROOM 4
#define MOST_ROWS 2
#endif

/* Vectors [0, nv) of the panel at w (elements `stride` apart along k) for mr rows. */
INLINE void tile(const int nv, const int mr, const int bf16, const void *w, int64_t stride, int64_t k,
                 const float *const *a, float *const *c, int64_t column, int64_t room) {
    v16 sum[6][4];
    for (int r = 0; r < mr; r++)
        for (int v = 0; v < nv; v++) sum[r][v] = (v16){0};
    for (int64_t i = 0; i < k; i++) {
        v16 weight[4];
        if (mr <= 2) /* a step over few rows waits for its weights; each is read once */
            for (int byte = 0; byte < nv * LANES * (bf16 ? 2 : 4); byte += 64)
                __builtin_prefetch((const char *)w + i * stride * (bf16 ? 2 : 4) + byte + AHEAD);
        for (int v = 0; v < nv; v++) {
            const uint16_t *half = (const uint16_t *)w + i * stride + v * LANES;
            if (!bf16) weight[v] = load((const float *)w + i * stride + v * LANES);
            else if (nv == 1) weight[v] = load_bf16(half);
            else if (v % 2 == 0) { /* one word holds outputs j and j + 16 */
                u16 words = *(const u16_any *)half;
                weight[v] = (v16)(words << 16);
                weight[v + 1] = (v16)(words & 0xFFFF0000u);
            }
        }
        for (int r = 0; r < mr; r++) {
            v16 x = splat(a[r][i]);
            for (int v = 0; v < nv; v++) sum[r][v] = sum[r][v] + weight[v] * x;
        }
    }
    for (int r = 0; r < mr; r++)
        for (int v = 0; v < nv; v++) {
            int64_t left = room - v * LANES; /* the last panel may be padded beyond the matrix */
            if (left >= LANES) store(c[r] + column + v * LANES, sum[r][v]);
            else if (left > 0) memcpy(c[r] + column + v * LANES, &sum[r][v], (size_t)left * sizeof(float));
        }
}

#define TILE_OF(nv, mr)                                                              \
    static void tile_##nv##_##mr(int bf16, const void *w, int64_t stride, int64_t k, \
                                 const float *const *a, float *const *c, int64_t column, int64_t room) { \
        if (bf16) tile(nv, mr, 1, w, stride, k, a, c, column, room);                  \
        else tile(nv, mr, 0, w, stride, k, a, c, column, room);                       \
    }
#define TILES_OF(nv) \
    TILE_OF(nv, 1) TILE_OF(nv, 2) TILE_OF(nv, 3) TILE_OF(nv, 4) TILE_OF(nv, 5) TILE_OF(nv, 6)
TILES_OF(1)
TILES_OF(2)
TILES_OF(4)

typedef void (*Tile)(int, const void *, int64_t, int64_t, const float *const *, float *const *, int64_t, int64_t);
static const Tile TILES[3][6] = {
    {tile_1_1, tile_1_2, tile_1_3, tile_1_4, tile_1_5, tile_1_6},
    {tile_2_1, tile_2_2, tile_2_3, tile_2_4, tile_2_5, tile_2_6},
    {tile_4_1, tile_4_2, tile_4_3, tile_4_4, tile_4_5, tile_4_6},
};

int64_t panel_count(const Matrix *m) {
    int64_t padded = (m->n + 15) / 16;
    return padded / 4 + (padded % 4 >= 2) + padded % 2;
}

int64_t product_panel(const Matrix *m, int64_t which, int64_t panel, const float *const *a, float *const *c, int rows,
                      int relative) {
    int64_t padded = (m->n + 15) / 16 * 16, whole = padded / PANEL, size = m->bf16 ? 2 : 4;
    int64_t column = panel * PANEL, width = PANEL;
    if (panel >= whole) {
        width = panel == whole && padded - whole * PANEL >= 32 ? 32 : 16;
        column = width == 32 ? whole * PANEL : padded - 16;
    }
    const uint8_t *data = (const uint8_t *)m->data + (which * padded + column) * m->k * size;
    for (int r = 0; r < rows;) {
        int mr = rows - r < MOST_ROWS ? rows - r : MOST_ROWS;
        int nv = (int)width / LANES;
        while (nv > 2 && nv * mr > ROOM) nv /= 2; /* 1 is for panels of 16 alone */
        for (int64_t v = 0; v < width; v += nv * LANES)
            TILES[nv / 2][mr - 1]((int)m->bf16, data + v * size, width, m->k, a + r, c + r,
                                (relative ? 0 : column) + v, m->n - column - v);
        r += mr;
    }
    return column;
}
