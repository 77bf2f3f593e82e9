/* One query against keys: scores of four heads and four keys at a time, an online softmax over tiles counted along the
   query's own key list, and the indexer's choice. The key list alone decides the order of every operation. */
#include "native.h"
#include "vector.h"

#if NATIVE == 16
/* Lane 4 * key + head of the result is the dot product of that key and head: channels summed by index mod 16, then
   the lanes by one tree. Adding in pairs while transposing keeps the sixteen sums in one vector. */
INLINE v16 dots(const float *q, int64_t stride, const float *const *keys, int64_t width) {
    v16 sum[16];
    for (int i = 0; i < 16; i++) sum[i] = (v16){0};
    for (int64_t c = 0; c < width; c += LANES) {
        v16 head[4];
        for (int h = 0; h < 4; h++) { head[h] = load(q + h * stride + c); HOLD(head[h]); }
        for (int k = 0; k < 4; k++) {
            v16 key = load(keys[k] + c);
            HOLD(key);
            for (int h = 0; h < 4; h++) sum[4 * k + h] = sum[4 * k + h] + key * head[h];
        }
    }
    v16 quarter[4];
    for (int k = 0; k < 4; k++) {
        v16 half[2];
        for (int j = 0; j < 2; j++) {
            v16 a = sum[4 * k + 2 * j], b = sum[4 * k + 2 * j + 1];
            half[j] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                      __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
        quarter[k] = __builtin_shufflevector(half[0], half[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
                     __builtin_shufflevector(half[0], half[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
    }
    v16 pair[2];
    for (int j = 0; j < 2; j++) {
        v16 a = quarter[2 * j], b = quarter[2 * j + 1];
        pair[j] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    return __builtin_shufflevector(pair[0], pair[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(pair[0], pair[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#else
/* Lane 4 * key + head: channels summed by index mod NATIVE, two heads at a time as registers allow, then the lanes. */
INLINE v16 dots(const float *q, int64_t stride, const float *const *keys, int64_t width) {
    float out[16];
    for (int h = 0; h < 4; h += 2) {
        vn sum[4][2];
        for (int k = 0; k < 4; k++) sum[k][0] = sum[k][1] = (vn){0};
        for (int64_t c = 0; c < width; c += NATIVE) {
            vn one = load_n(q + h * stride + c), two = load_n(q + (h + 1) * stride + c);
            for (int k = 0; k < 4; k++) {
                vn key = load_n(keys[k] + c);
                sum[k][0] = sum[k][0] + key * one;
                sum[k][1] = sum[k][1] + key * two;
            }
        }
        for (int k = 0; k < 4; k++)
            for (int j = 0; j < 2; j++) {
                float lane[NATIVE];
                store_n(lane, sum[k][j]);
                for (int n = NATIVE / 2; n; n /= 2)
                    for (int i = 0; i < n; i++) lane[i] = lane[i] + lane[i + n];
                out[4 * k + h + j] = lane[0];
            }
    }
    return load(out);
}
#endif

/* Fill up keys to a multiple of four with the last one; returns how many lanes of the last vector are real. */
INLINE i16 real_lanes(int left) {
    i16 lane = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    return lane < left;
}

INLINE void pad_keys(const float **keys, int count) {
    for (int k = count; k % 4; k++) keys[k] = keys[count - 1];
}

void attend_begin(Attend *state, const float *sink) {
    for (int i = 0; i < LANES; i++) {
        state->peak[i] = sink[i % HEADS];
        state->sum[i] = i < HEADS ? 1.0f : 0.0f; /* the sink's own exp(0), once a head */
    }
    memset(state->out, 0, (size_t)(HEADS * state->width) * sizeof(float));
}

/* out[h] = out[h] * scale[h] + sum_k weights[k][h] * keys[k] for `nv` native vectors of channels, keys in order. */
INLINE void mix(const int nv, float *out, int64_t width, const float *scale, const float *weights,
                const float *const *keys, int count) {
    vn sum[HEADS][4];
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < nv; v++) sum[h][v] = load_n(out + h * width + v * NATIVE) * splat_n(scale[h]);
    for (int k = 0; k < count; k++) {
        vn key[4];
        for (int v = 0; v < nv; v++) key[v] = load_n(keys[k] + v * NATIVE);
        for (int h = 0; h < HEADS; h++) {
            vn weight = splat_n(weights[k * HEADS + h]);
            for (int v = 0; v < nv; v++) sum[h][v] = sum[h][v] + weight * key[v];
        }
    }
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < nv; v++) store_n(out + h * width + v * NATIVE, sum[h][v]);
}

/* Functions of their own, or the compiler runs out of registers inside the caller. */
#define MIX_OF(name, nv)                                                                                       \
    static __attribute__((noinline)) void name(float *out, int64_t width, const float *scale,                  \
                                               const float *weights, const float *const *keys, int count) {    \
        mix(nv, out, width, scale, weights, keys, count);                                                      \
    }
MIX_OF(mix_narrow, 16 / NATIVE)
#if NATIVE == 16
#define WIDE 64
MIX_OF(mix_wide, 4)
#else
#define WIDE 16
#define mix_wide mix_narrow
#endif

void attend_tile(Attend *state, const float *q, const float **keys, int count) {
    float *weights = state->weights, scale[LANES];
    int64_t width = state->width;
    v16 old = load(state->peak), peak = old;
    pad_keys(keys, count);
    for (int k = 0; k < count; k += 4) {
        v16 score = blend(real_lanes(count - k), dots(q, width, keys + k, width), splat(-INFINITY));
        peak = vmax(peak, score);
        store(weights + k * HEADS, score);
    }
    peak = max_columns(peak);
    v16 factor = vexp(old - peak), sum = load(state->sum) * factor;
    for (int k = 0; k < count; k += 4) {
        v16 weight = vexp(load(weights + k * HEADS) - peak);
        sum = sum + weight;
        store(weights + k * HEADS, weight);
    }
    store(state->peak, peak);
    store(state->sum, sum);
    store(scale, factor);
    const float *at[TILE];
    for (int64_t c = 0, step; c < width; c += step) {
        step = width - c >= WIDE ? WIDE : LANES;
        for (int k = 0; k < count; k++) at[k] = keys[k] + c;
        if (step == WIDE) mix_wide(state->out + c, width, scale, weights, at, count);
        else mix_narrow(state->out + c, width, scale, weights, at, count);
    }
}

void attend_end(Attend *state) {
    float sum[LANES];
    store(sum, sum_columns(load(state->sum)));
    for (int h = 0; h < HEADS; h++) {
        float *out = state->out + h * state->width;
        for (int64_t c = 0; c < state->width; c += LANES) store(out + c, load(out + c) / splat(sum[h]));
    }
}

void index_scores(const float *q, const float *weights, int64_t heads, int64_t width, const float **keys, int count,
                  float *scores) {
    pad_keys(keys, count);
    for (int k = 0; k < count; k += 4) {
        v16 sum = {0};
        for (int64_t h = 0; h < heads; h += HEADS) {
            v16 dot = vmax(dots(q + h * width, width, keys + k, width), (v16){0});
            const float *w = weights + h;
            v16 weight = {w[0], w[1], w[2], w[3], w[0], w[1], w[2], w[3], w[0], w[1], w[2], w[3], w[0], w[1], w[2], w[3]};
            sum = sum + weight * dot;
        }
        sum = sum_rows(sum);
        for (int i = 0; i < 4; i++) scores[k + i] = sum[4 * i];
    }
}

int64_t best_capacity(int64_t topk) { return 2 * topk + TILE; }

/* Ranks order by score from high to low, then by index; + 0.0f makes both zeros one. */
INLINE uint64_t rank_of(float score, int64_t index) {
    score = score + 0.0f;
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits = bits >> 31 ? bits : ~bits & 0x7FFFFFFFu;
    return (uint64_t)bits << 32 | (uint64_t)index;
}

/* The k-th smallest (from 0) of x (n,), which is reordered. */
static uint64_t nth(uint64_t *x, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
        uint64_t a = x[low], b = x[(low + high) / 2], c = x[high];
        uint64_t pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] < pivot) i++;
            while (x[j] > pivot) j--;
            if (i <= j) { uint64_t t = x[i]; x[i++] = x[j]; x[j--] = t; }
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else break;
    }
    return x[k];
}

/* Drop all but the best topk; what stays keeps its order, which is ascending by index. */
static void best_shrink(Best *best) {
    if (best->count <= best->topk) return;
    memcpy(best->copy, best->held, (size_t)best->count * sizeof(uint64_t));
    best->limit = nth(best->copy, best->count, best->topk - 1);
    int64_t kept = 0;
    for (int64_t i = 0; i < best->count; i++) {
        best->held[kept] = best->held[i];
        kept += best->held[i] <= best->limit;
    }
    best->count = best->topk;
}

void best_begin(Best *best, int64_t topk) {
    best->topk = topk;
    best->count = 0;
    best->limit = UINT64_MAX;
}

/* Add a rank; the caller has seen to the room. */
INLINE void best_add(Best *best, uint64_t rank) {
    best->held[best->count] = rank;
    best->count += rank <= best->limit;
}

void best_offer(Best *best, const float *scores, int64_t first, int count) {
    if (best->count + count > best_capacity(best->topk)) best_shrink(best);
    for (int i = 0; i < count; i++) best_add(best, rank_of(scores[i], first + i));
}

int64_t best_ranks(Best *best, uint64_t *ranks) {
    best_shrink(best);
    memcpy(ranks, best->held, (size_t)best->count * sizeof *ranks);
    return best->count;
}

void best_merge(Best *best, const uint64_t *ranks, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (best->count == best_capacity(best->topk)) best_shrink(best);
        best_add(best, ranks[i]);
    }
}

void best_take(Best *best, int32_t *picks) {
    best_shrink(best);
    for (int64_t i = 0; i < best->count; i++) picks[i] = (int32_t)(uint32_t)best->held[i];
}
