/* Products with packed weights. An output is one chain of fused multiply-adds over k, first to last, whatever the tile
   it is computed in: vectors run along outputs, never along k. */
#include "native.h"
#include "vector.h"

#define AHEAD 4096 /* bytes */
#define MOST_ROWS 6
#define SPLIT (16 / NATIVE) /* native vectors in sixteen outputs */

/* Outputs of pair `q` of a panel: a native vector at this place and one sixteen further. */
INLINE int64_t pair_place(int64_t q) { return q / SPLIT * 32 + q % SPLIT * NATIVE; }

INLINE void store_room(float *to, vn x, int64_t room) { /* the last panel may be padded beyond the matrix */
    if (room >= NATIVE) store_n(to, x);
    else if (room > 0) memcpy(to, &x, (size_t)room * sizeof(float));
}

/* Pairs [from, from + pairs) of the panel at w, whose rows along k are `stride` apart, for mr rows of a. */
INLINE void tile(const int pairs, const int mr, const int bf16, const void *w, int64_t from, int64_t stride, int64_t k,
                 const float *const *a, float *const *c, int64_t column, int64_t room) {
    const int size = bf16 ? 2 : 4;
    vn sum[MOST_ROWS][8];
    const char *at[4];
    for (int q = 0; q < pairs; q++) /* a word holds two outputs: its place counts twice */
        at[q] = (const char *)w + (bf16 ? (from + q) / SPLIT * 64 + (from + q) % SPLIT * NATIVE * 4 : pair_place(from + q) * 4);
    for (int r = 0; r < mr; r++)
        for (int v = 0; v < 2 * pairs; v++) sum[r][v] = (vn){0};
    for (int64_t i = 0; i < k; i++) {
        vn weight[8];
        for (int q = 0; q < pairs; q++) {
            const char *here = at[q] + i * stride * size;
            if (mr <= 2) __builtin_prefetch(here + AHEAD); /* a step over few rows waits for its weights */
            if (mr <= 2 && !bf16) __builtin_prefetch(here + AHEAD + 64);
            if (bf16) {
                un words = *(const un_any *)here;
                weight[2 * q] = (vn)(words << 16);
                weight[2 * q + 1] = (vn)(words & 0xFFFF0000u);
            } else {
                weight[2 * q] = load_n((const float *)here);
                weight[2 * q + 1] = load_n((const float *)here + 16);
            }
        }
        for (int r = 0; r < mr; r++) {
            vn x = splat_n(a[r][i]);
            for (int v = 0; v < 2 * pairs; v++) sum[r][v] = sum[r][v] + weight[v] * x;
        }
    }
    for (int r = 0; r < mr; r++)
        for (int q = 0; q < pairs; q++) {
            int64_t place = pair_place(from + q);
            store_room(c[r] + column + place, sum[r][2 * q], room - place);
            store_room(c[r] + column + place + 16, sum[r][2 * q + 1], room - place - 16);
        }
}

#define TILE_OF(pairs, mr)                                                                                       \
    static void tile_##pairs##_##mr(int bf16, const void *w, int64_t from, int64_t stride, int64_t k,            \
                                    const float *const *a, float *const *c, int64_t column, int64_t room) {      \
        if (bf16) tile(pairs, mr, 1, w, from, stride, k, a, c, column, room);                                    \
        else tile(pairs, mr, 0, w, from, stride, k, a, c, column, room);                                         \
    }
#define TILES_OF(pairs) \
    TILE_OF(pairs, 1) TILE_OF(pairs, 2) TILE_OF(pairs, 3) TILE_OF(pairs, 4) TILE_OF(pairs, 5) TILE_OF(pairs, 6)
TILES_OF(1)
TILES_OF(2)
TILES_OF(4)

typedef void (*Tile)(int, const void *, int64_t, int64_t, int64_t, const float *const *, float *const *, int64_t,
                     int64_t);
static const Tile TILES[3][MOST_ROWS] = {
    {tile_1_1, tile_1_2, tile_1_3, tile_1_4, tile_1_5, tile_1_6},
    {tile_2_1, tile_2_2, tile_2_3, tile_2_4, tile_2_5, tile_2_6},
    {tile_4_1, tile_4_2, tile_4_3, tile_4_4, tile_4_5, tile_4_6},
};

int64_t panel_count(const Matrix *m) { return (m->n + PANEL - 1) / PANEL; }

int64_t product_panel(const Matrix *m, int64_t which, int64_t panel, const float *const *a, float *const *c, int rows,
                      int relative) {
    int64_t padded = (m->n + 31) / 32 * 32, column = panel * PANEL, size = m->bf16 ? 2 : 4;
    int64_t width = padded - column < PANEL ? padded - column : PANEL;
    const uint8_t *data = (const uint8_t *)m->data + (which * padded + column) * m->k * size;
    for (int r = 0; r < rows;) {
        int mr = rows - r < MOST_ROWS ? rows - r : MOST_ROWS;
        int64_t all = width / (2 * NATIVE), pairs = all < 4 ? all : 4;
        while (pairs > 1 && 2 * pairs * mr > ROOM) pairs /= 2;
        for (int64_t from = 0; from < all; from += pairs)
            TILES[pairs / 2][mr - 1]((int)m->bf16, data, from, width, m->k, a + r, c + r, relative ? 0 : column,
                                     m->n - column);
        r += mr;
    }
    return column;
}
