/* The whole forward of a list of spans, block by block of tokens, layer by layer; every thread walks through the same
   stages and takes items of each. Meaning: model/transformer.py, attention.py, experts.py in reference mode.

   A block's tokens see each other through the block's own buffers and the past through rings and pages, which a layer
   updates only after its attention: where a block begins is invisible in the result. */
#include "native.h"
#include "vector.h"

#define PAIR 2 /* tokens that share one reading of a site's weights */
#define FEW 8   /* up to so many tokens, the choice of a token's entries is shared out in PARTS */
#define PARTS 8
#define MIXES 32 /* outputs of a site's fn as packed: 24, or the head's 4, and zeros */
#define PARAMS (STREAMS + STREAMS * STREAMS) /* post and comb of a token */

/* The items of a stage, as many as this thread gets; END after it waits for the others'. */
#define EACH(item, count) for (int64_t item; (item = stage_take(stage, count)) >= 0; stage_done(stage, count))
#define END stage_end(stage)

typedef struct { const SpanRow *span; const int32_t *pages; int64_t first, begin, length; } Segment; /* first: in the block */
typedef struct { int64_t expert, first, count; } Group;                       /* rows [first, +count) of `order` */

typedef struct {
    float *q, *out, *weights, *tile, *index_q, *index_weights, *scores;
    const float **rows, **scores_at, **ape_at;
    Best best;
} Local; /* one thread's */

typedef struct {
    const Model *model;
    int64_t tokens, segments, head_rows, furthest; /* furthest: the last position of all */
    int64_t groups, routed_groups; /* routed_groups: those before the shared expert's */
    int64_t *id, *position;
    int32_t *segment, *chosen, *picks, *order, *fill;
    float *streams, *x, *first, *second, *attended, *latent, *y, *gate, *hidden, *down, *params, *weight, *table[2];
    uint64_t *part_ranks;
    int64_t *part_count;
    Segment *segment_of;
    Group *group;
    int64_t *head; /* tokens that want logits */
    float *logits, **streams_to; /* streams_to: by token, NULL where nobody asked */
    Local *local;
    const float *streams_in; /* of the block's first token; NULL for the backbone */
    int draft;
} Work;
_Static_assert(sizeof(Work) <= JOB_BYTES, "a job's argument");

typedef struct { int64_t first, second, gate_rows, inner; } Widths; /* the widest of each over layers */

static Widths widths(const Model *m) {
    Widths w = {0, 0, 0, m->heads * m->width};
    for (int64_t i = 0; i < m->layers + m->drafts; i++) {
        if (m->layer[i].first.n > w.first) w.first = m->layer[i].first.n;
        if (m->layer[i].second.n > w.second) w.second = m->layer[i].second.n;
        if (m->layer[i].gate.n > w.gate_rows) w.gate_rows = m->layer[i].gate.n;
    }
    if (w.inner < STREAMS * m->dim) w.inner = STREAMS * m->dim; /* the draft's normed streams share the room */
    return w;
}

/* Hand out `count` elements of `size` bytes from the arena, or only count them when it has no base. */
static void *carve(uint8_t *base, int64_t *used, int64_t count, size_t size) {
    void *at = base ? base + *used : NULL;
    *used = (*used + count * (int64_t)size + 63) / 64 * 64;
    return at;
}

#define CARVE(place, count) (place) = carve(base, &used, (count), sizeof *(place))

/* Lay out the scratch of a block of `tokens` for `threads`; returns its bytes. */
static int64_t lay_out(Work *w, const Model *m, uint8_t *base, int64_t tokens, int threads) {
    int64_t used = 0, slots = tokens * (m->picks + 1), wide = m->width > m->index_width ? m->width : m->index_width;
    int64_t index_heads = (m->index_heads + HEADS - 1) / HEADS * HEADS, keep = 2 * m->max_ratio + TILE;
    Widths n = widths(m);
    CARVE(w->local, threads);
    CARVE(w->id, tokens);
    CARVE(w->position, tokens);
    CARVE(w->segment, tokens);
    CARVE(w->segment_of, tokens);
    CARVE(w->chosen, tokens * m->picks);
    CARVE(w->weight, tokens * m->picks);
    CARVE(w->picks, tokens * m->topk);
    CARVE(w->part_ranks, FEW * PARTS * m->topk);
    CARVE(w->part_count, FEW * PARTS);
    CARVE(w->order, slots);
    CARVE(w->fill, m->experts + 1);
    CARVE(w->group, m->experts + slots / ROWS + tokens / ROWS + 2);
    CARVE(w->head, tokens);
    CARVE(w->streams_to, tokens);
    CARVE(w->table[0], tokens * m->rope);
    CARVE(w->table[1], tokens * m->rope);
    CARVE(w->params, tokens * PARAMS);
    CARVE(w->streams, tokens * STREAMS * m->dim);
    CARVE(w->x, tokens * m->dim);
    CARVE(w->y, tokens * m->dim);
    CARVE(w->first, tokens * n.first);
    CARVE(w->second, tokens * n.second);
    CARVE(w->attended, tokens * n.inner);
    CARVE(w->latent, tokens * m->groups * m->o_lora);
    CARVE(w->gate, tokens * n.gate_rows);
    CARVE(w->hidden, slots * m->hidden);
    CARVE(w->down, slots * m->dim);
    for (int i = 0; i < threads; i++) {
        Local unused, *l = base ? &w->local[i] : &unused;
        CARVE(l->q, HEADS * wide);
        CARVE(l->out, HEADS * wide);
        CARVE(l->weights, TILE * HEADS);
        CARVE(l->tile, ROWS * PANEL);
        CARVE(l->index_q, index_heads * m->index_width);
        CARVE(l->index_weights, index_heads);
        CARVE(l->scores, TILE);
        CARVE(l->rows, keep);
        CARVE(l->scores_at, keep);
        CARVE(l->ape_at, keep);
        CARVE(l->best.held, best_capacity(m->topk));
        CARVE(l->best.copy, best_capacity(m->topk));
    }
    return used;
}

int64_t native_scratch(const Model *m, int64_t tokens, int threads) {
    Work none;
    return lay_out(&none, m, NULL, tokens, threads);
}

/* ---- places ---- */

static inline const Segment *segment_at(const Work *w, int64_t t) { return &w->segment_of[w->segment[t]]; }

static inline uint8_t *slot_of(const Work *w, const Segment *s) {
    return w->model->slots + s->span->slot * w->model->slot_bytes;
}

/* Row of `position`: in the block where that holds it, else in the slot's ring. */
static inline const float *row_at(const Segment *s, int64_t position, const float *block, int64_t stride,
                                  const uint8_t *ring, int64_t rows, int64_t width) {
    if (position >= s->begin) return block + (s->first + position - s->begin) * stride;
    return (const float *)ring + (position % rows) * width;
}

static inline float *entry_at(const Work *w, const Segment *s, int64_t section, int64_t ratio, int64_t entry,
                              int64_t width) {
    const Model *m = w->model;
    uint32_t in_page = (uint32_t)(m->page_tokens / ratio), number = (uint32_t)entry; /* half the time of 64 bits */
    uint8_t *page = m->pages + (int64_t)s->pages[number / in_page] * m->page_bytes;
    return (float *)(page + section) + number % in_page * width;
}

static void rope_at(const Model *m, int kind, int64_t position, float *table) {
    for (int64_t i = 0; i < m->rope / 2; i++) {
        double angle = (float)position * m->freqs[kind][i]; /* rounded to float32, as released */
        table[i] = (float)cos(angle);
        table[m->rope / 2 + i] = (float)sin(angle);
    }
}

/* ---- products ---- */

/* c = a . matrix for `rows` rows and `stacks` stacked weights, each with its own part of the rows. */
static void linear(Stage *stage, const Matrix *m, int64_t stacks, const float *a, int64_t a_row, int64_t a_stack, float *c,
                   int64_t c_row, int64_t c_stack, int64_t rows) {
    int64_t panels = panel_count(m), blocks = (rows + ROWS - 1) / ROWS;
    EACH(i, stacks * panels * blocks) {
        int64_t stack = i / (panels * blocks), panel = i / blocks % panels, first = i % blocks * ROWS;
        int count = (int)(rows - first < ROWS ? rows - first : ROWS);
        const float *from[ROWS];
        float *to[ROWS];
        for (int r = 0; r < count; r++) {
            from[r] = a + (first + r) * a_row + stack * a_stack;
            to[r] = c + (first + r) * c_row + stack * c_stack;
        }
        product_panel(m, stack, panel, from, to, count, 0);
    }
    END;
}

/* ---- hyper-connections ---- */

/* out[r] = fn . flat[r] for `nv` native vectors of outputs, one chain a stream, then the four by one tree: alone a
   chain would only wait for itself. */
INLINE void mix_tile(const int nv, const int rows, const float *weight, const float *const *flat, int64_t dim,
                     float *const *out) {
    vn sum[PAIR][STREAMS][2] = {0};
    for (int64_t i = 0; i < dim; i++)
        for (int j = 0; j < STREAMS; j++)
            for (int v = 0; v < nv; v++) {
                vn w = load_n(weight + (j * dim + i) * MIXES + v * NATIVE);
                for (int r = 0; r < rows; r++) sum[r][j][v] = sum[r][j][v] + w * splat_n(flat[r][j * dim + i]);
            }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < nv; v++)
            store_n(out[r] + v * NATIVE, (sum[r][0][v] + sum[r][1][v]) + (sum[r][2][v] + sum[r][3][v]));
}

static void mix_logits(const Matrix *fn, const float *const *flat, int64_t rows, int64_t dim, float *const *out) {
    const int nv = NATIVE == 16 ? 2 : 1;
    const float *weight = fn->data;
    float *to[PAIR] = {0};
    for (int64_t first = 0; first < MIXES; first += nv * NATIVE) {
        for (int64_t r = 0; r < rows; r++) to[r] = out[r] + first;
        if (rows == 1) mix_tile(nv, 1, weight + first, flat, dim, to);
        else mix_tile(nv, 2, weight + first, flat, dim, to);
    }
}

static v16 sinkhorn(v16 logits, int64_t iters, float eps) {
    v16 mix = vexp(logits - max_rows(logits));
    mix = mix / sum_rows(mix) + eps;
    mix = mix / (sum_columns(mix) + eps);
    for (int64_t i = 1; i < iters; i++) {
        mix = mix / (sum_rows(mix) + eps);
        mix = mix / (sum_columns(mix) + eps);
    }
    return mix;
}

/* out = normed sum_j pre_j X_j */
static void collapse(const float *streams, const float *pre, const float *norm, int64_t dim, float eps, float *out) {
    for (int64_t i = 0; i < dim; i += LANES) {
        v16 sum = load(streams + i) * splat(pre[0]);
        for (int j = 1; j < STREAMS; j++) sum = sum + load(streams + j * dim + i) * splat(pre[j]);
        store(out + i, sum);
    }
    rms_norm(out, norm, out, dim, eps);
}

/* Enter a site with token t whose mix logits are `mix`: x, and what `leave` needs. */
static void enter_token(const Work *w, int64_t t, float *mix, const Site *site) {
    const Model *m = w->model;
    float *streams = w->streams + t * STREAMS * m->dim, *params = w->params + t * PARAMS;
    float inverse = inverse_rms(streams, STREAMS * m->dim, (float)m->eps);
    for (int i = 0; i < STREAMS * (2 + STREAMS); i++) {
        int part = i < STREAMS ? 0 : i < 2 * STREAMS ? 1 : 2;
        mix[i] = mix[i] * inverse * site->scale[part] + site->base[i];
    }
    float gates[LANES];
    store(gates, sigmoid(load(mix)));
    for (int j = 0; j < STREAMS; j++) {
        params[j] = 2.0f * gates[STREAMS + j];
        gates[j] = gates[j] + (float)m->hc_eps;
    }
    store(params + STREAMS, sinkhorn(load(mix + 2 * STREAMS), m->iters, (float)m->hc_eps));
    collapse(streams, gates, site->norm, m->dim, (float)m->eps, w->x + t * m->dim);
}

/* Enter a site with tokens [first, first + rows), at most PAIR. */
static void enter(const Work *w, int64_t first, int64_t rows, const Site *site) {
    const float *flat[PAIR] = {0};
    float mix[PAIR][MIXES], *out[PAIR] = {0};
    for (int64_t r = 0; r < rows; r++) {
        flat[r] = w->streams + (first + r) * STREAMS * w->model->dim;
        out[r] = mix[r];
    }
    mix_logits(&site->fn, flat, rows, w->model->dim, out);
    for (int64_t r = 0; r < rows; r++) enter_token(w, first + r, mix[r], site);
}

/* Leave a site: X'_k = post_k y + sum_j comb[j][k] X_j. */
static void leave(const Work *w, int64_t t, const float *y) {
    int64_t dim = w->model->dim;
    float *streams = w->streams + t * STREAMS * dim;
    const float *post = w->params + t * PARAMS, *comb = post + STREAMS;
    for (int64_t i = 0; i < dim; i += LANES) {
        v16 x[STREAMS], add = load(y + i);
        for (int j = 0; j < STREAMS; j++) x[j] = load(streams + j * dim + i);
        for (int k = 0; k < STREAMS; k++) {
            v16 sum = x[0] * splat(comb[k]);
            for (int j = 1; j < STREAMS; j++) sum = sum + x[j] * splat(comb[j * STREAMS + k]);
            store(streams + k * dim + i, sum + add * splat(post[k]));
        }
    }
}

/* ---- attention ---- */

typedef struct { int64_t kv, pool_kv[2], pool_score[2], weights; } Columns; /* of `first` */

static Columns columns(const Model *m, const Layer *l) {
    int64_t main = m->width * (1 + l->overlap), index = m->index_width * 2, at = m->q_lora + m->width, next = at + 2 * main;
    return (Columns){m->q_lora, {at, next}, {at + main, next + index}, next + 2 * index};
}

/* Pool the window that ends with token t into its entry: a softmax over its rows, channel by channel. */
static void pool_window(const Work *w, const Layer *l, int which, int64_t t, int thread) {
    const Model *m = w->model;
    const Segment *s = segment_at(w, t);
    const Pooled *p = &l->pool[which];
    Local *local = &w->local[thread];
    const uint8_t *slot = slot_of(w, s);
    Columns at = columns(m, l);
    int64_t ratio = l->ratio, width = p->width, span = width * (1 + l->overlap), stride = l->first.n;
    const float *kv = w->first + at.pool_kv[which], *scores = w->first + at.pool_score[which];
    int64_t begin = w->position[t] + 1 - ratio, count = 0;
    for (int64_t i = l->overlap && begin ? begin - ratio : begin; i < begin + ratio; i++, count++) {
        int64_t half = l->overlap && i >= begin ? width : 0; /* the previous window gives its first channels */
        local->rows[count] = row_at(s, i, kv, stride, slot + p->kv, p->rows, span) + half;
        local->scores_at[count] = row_at(s, i, scores, stride, slot + p->score, p->rows, span) + half;
        local->ape_at[count] = i >= s->begin ? p->ape + i % ratio * span + half : NULL; /* rings hold it added */
    }
    float *entry = entry_at(w, s, p->entries, ratio, begin / ratio, width);
    for (int64_t c = 0; c < width; c += LANES) {
        v16 peak = splat(-INFINITY), sum = {0}, mixed = {0};
        for (int64_t i = 0; i < count; i++) {
            v16 score = load(local->scores_at[i] + c);
            if (local->ape_at[i]) score = score + load(local->ape_at[i] + c);
            peak = vmax(peak, score);
        }
        for (int64_t i = 0; i < count; i++) {
            v16 score = load(local->scores_at[i] + c);
            if (local->ape_at[i]) score = score + load(local->ape_at[i] + c);
            v16 weight = vexp(score - peak);
            sum = sum + weight;
            mixed = mixed + weight * load(local->rows[i] + c);
        }
        store(entry + c, mixed / sum);
    }
    rms_norm(entry, p->norm, entry, width, (float)m->eps);
    float *table = local->out; /* not in use between attentions; rope <= width */
    rope_at(m, 1, begin, table);
    rotate(entry, width, m->rope, table, 1.0f);
}

/* After `first`: norms, the window row, and the entries that token t completes. */
static void prepare(const Work *w, const Layer *l, int64_t t, int thread) {
    const Model *m = w->model;
    Columns at = columns(m, l);
    float *first = w->first + t * l->first.n, eps = (float)m->eps;
    rms_norm(first, l->q_norm, first, m->q_lora, eps);
    rms_norm(first + at.kv, l->kv_norm, first + at.kv, m->width, eps);
    rotate(first + at.kv, m->width, m->rope, w->table[l->ratio > 0] + t * m->rope, 1.0f);
    if (!l->ratio || (w->position[t] + 1) % l->ratio || w->position[t] < segment_at(w, t)->span->frozen) return;
    for (int i = 0; i <= l->overlap; i++) pool_window(w, l, i, t, thread);
}

/* Keys one part of a choice scores: few tokens share their keys out, so that a long past has all threads at work. */
static int64_t part_keys(const Work *w, int64_t visible) {
    int64_t parts = w->tokens <= FEW ? PARTS : 1, least = 4 * w->model->topk;
    int64_t keys = (visible + parts - 1) / parts;
    return keys > least || parts == 1 ? keys : least;
}

/* Score part `part` of what token t may see, when that is more than topk, and keep its best. */
static void choose(const Work *w, const Layer *l, int64_t t, int64_t part, int thread) {
    const Model *m = w->model;
    int64_t visible = (w->position[t] + 1) / l->ratio, heads = (m->index_heads + HEADS - 1) / HEADS * HEADS;
    int64_t keys = part_keys(w, visible), begin = part * keys, end = begin + keys < visible ? begin + keys : visible;
    if (visible <= m->topk) return;
    const Segment *s = segment_at(w, t);
    Local *local = &w->local[thread];
    const float *from = w->second + t * l->second.n + m->heads * m->width;
    const float *weights = w->first + t * l->first.n + columns(m, l).weights;
    float scale = (float)(1.0 / sqrt((double)m->index_width) / sqrt((double)m->index_heads));
    memset(local->index_q, 0, (size_t)(heads * m->index_width) * sizeof(float));
    memset(local->index_weights, 0, (size_t)heads * sizeof(float));
    for (int64_t h = 0; h < m->index_heads; h++) {
        float *q = local->index_q + h * m->index_width;
        memcpy(q, from + h * m->index_width, (size_t)m->index_width * sizeof(float));
        rotate(q, m->index_width, m->rope, w->table[1] + t * m->rope, 1.0f);
        local->index_weights[h] = weights[h] * scale;
    }
    best_begin(&local->best, m->topk);
    for (int64_t first = begin; first < end; first += TILE) {
        int count = (int)(end - first < TILE ? end - first : TILE);
        for (int i = 0; i < count; i++)
            local->rows[i] = entry_at(w, s, l->pool[1].entries, l->ratio, first + i, m->index_width);
        index_scores(local->index_q, local->index_weights, heads, m->index_width, local->rows, count, local->scores);
        best_offer(&local->best, local->scores, first, count);
    }
    if (w->tokens > FEW) best_take(&local->best, w->picks + t * m->topk);
    else w->part_count[t * PARTS + part] = best_ranks(&local->best, w->part_ranks + (t * PARTS + part) * m->topk);
}

/* Join the parts of token t's choice. */
static void join_parts(const Work *w, const Layer *l, int64_t t, int thread) {
    const Model *m = w->model;
    Best *best = &w->local[thread].best;
    if ((w->position[t] + 1) / l->ratio <= m->topk) return;
    best_begin(best, m->topk);
    for (int64_t i = t * PARTS; i < (t + 1) * PARTS; i++)
        best_merge(best, w->part_ranks + i * m->topk, w->part_count[i]);
    best_take(best, w->picks + t * m->topk);
}

/* Pointers to keys [first, first + count) of token t's list: window rows from position `oldest`, then entries, all of
   them or those picked. Steps along ring and page, as divisions for every key would cost as much as a score. */
static void list_keys(const Work *w, const Layer *l, int64_t t, int64_t oldest, const int32_t *picks, int64_t first,
                      int count, const float **rows) {
    const Model *m = w->model;
    const Segment *s = segment_at(w, t);
    const float *ring = (const float *)(slot_of(w, s) + l->window);
    int64_t near = w->position[t] + 1 - oldest, position = oldest + first, row = position % l->window_rows;
    int i = 0;
    for (; i < count && first + i < near; i++, position++) {
        rows[i] = position >= s->begin ? w->first + (s->first + position - s->begin) * l->first.n + m->q_lora
                                       : ring + row * m->width;
        if (++row == l->window_rows) row = 0;
    }
    if (i == count) return;
    int64_t entry = first + i - near;
    if (picks) {
        for (; i < count; i++) rows[i] = entry_at(w, s, l->pool[0].entries, l->ratio, picks[entry++], m->width);
        return;
    }
    int64_t in_page = m->page_tokens / l->ratio;
    for (const float *at = NULL; i < count; i++, entry++, at += m->width) {
        if (!at || entry % in_page == 0) at = entry_at(w, s, l->pool[0].entries, l->ratio, entry, m->width);
        rows[i] = at;
    }
}

/* Attend with heads [head, head + 4) of token t: window rows ascending, then entries ascending. */
static void attend(const Work *w, const Layer *l, int64_t t, int64_t head, int thread) {
    const Model *m = w->model;
    Local *local = &w->local[thread];
    const float *table = w->table[l->ratio > 0] + t * m->rope;
    int64_t width = m->width, position = w->position[t], heads = m->heads - head < HEADS ? m->heads - head : HEADS;
    float sink[HEADS] = {0}, scale = (float)(1.0 / sqrt((double)width));
    for (int64_t h = 0; h < HEADS; h++) {
        float *q = local->q + h * width;
        if (h >= heads) { memset(q, 0, (size_t)width * sizeof(float)); continue; }
        rms_norm(w->second + t * l->second.n + (head + h) * width, NULL, q, width, (float)m->eps);
        rotate(q, width, m->rope, table, 1.0f);
        for (int64_t c = 0; c < width; c++) q[c] *= scale;
        sink[h] = l->sink[head + h];
    }
    Attend state = {.out = local->out, .weights = local->weights, .width = width};
    attend_begin(&state, sink);
    int64_t oldest = position + 1 - m->window > 0 ? position + 1 - m->window : 0, near = position + 1 - oldest;
    int64_t visible = l->ratio ? (position + 1) / l->ratio : 0, far = visible;
    const int32_t *picks = NULL;
    if (l->overlap && visible > m->topk) { picks = w->picks + t * m->topk; far = m->topk; }
    for (int64_t first = 0; first < near + far; first += TILE) {
        int count = (int)(near + far - first < TILE ? near + far - first : TILE);
        list_keys(w, l, t, oldest, picks, first, count, local->rows);
        attend_tile(&state, local->q, local->rows, count);
    }
    attend_end(&state);
    for (int64_t h = 0; h < heads; h++) {
        float *out = w->attended + t * m->heads * width + (head + h) * width;
        memcpy(out, local->out + h * width, (size_t)width * sizeof(float));
        rotate(out, width, m->rope, table, -1.0f);
    }
}

/* Leave the last rows of a segment in one ring; `ape` is added where the ring holds scores. */
static void keep_rows(const Segment *s, const float *block, int64_t stride, uint8_t *ring, int64_t rows, int64_t width,
                      const float *ape, int64_t ratio) {
    for (int64_t i = s->length > rows ? s->length - rows : 0; i < s->length; i++) {
        const float *from = block + (s->first + i) * stride;
        float *to = (float *)ring + (s->begin + i) % rows * width;
        if (!ape) memcpy(to, from, (size_t)width * sizeof(float));
        else for (int64_t c = 0; c < width; c++) to[c] = from[c] + ape[(s->begin + i) % ratio * width + c];
    }
}

static void keep(const Work *w, const Layer *l, int64_t segment) {
    const Model *m = w->model;
    const Segment *s = &w->segment_of[segment];
    uint8_t *slot = slot_of(w, s);
    Columns at = columns(m, l);
    int64_t stride = l->first.n;
    keep_rows(s, w->first + at.kv, stride, slot + l->window, l->window_rows, m->width, NULL, 1);
    for (int i = 0; l->ratio && i <= l->overlap; i++) {
        const Pooled *p = &l->pool[i];
        int64_t span = p->width * (1 + l->overlap);
        keep_rows(s, w->first + at.pool_kv[i], stride, slot + p->kv, p->rows, span, NULL, 1);
        keep_rows(s, w->first + at.pool_score[i], stride, slot + p->score, p->rows, span, p->ape, l->ratio);
    }
}

/* ---- experts ---- */

/* hidden = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight for rows that hold 16 gates, 16 ups in turn. */
static void swiglu(const float *from, float *hidden, int64_t count, float limit, float weight) {
    for (int64_t i = 0; i < count; i += LANES) {
        v16 gate = vmin(load(from + 2 * i), splat(limit));
        v16 up = vmax(vmin(load(from + 2 * i + LANES), splat(limit)), splat(-limit));
        store(hidden + i, gate * sigmoid(gate) * up * splat(weight));
    }
}

/* Choose the experts of token t and their weights; the shared expert's hidden vector on the way. */
static void route(const Work *w, const Layer *l, int64_t t) {
    const Model *m = w->model;
    float *gate = w->gate + t * l->gate.n, *weight = w->weight + t * m->picks, sum = 0.0f;
    int32_t *chosen = w->chosen + t * m->picks;
    int64_t padded = (m->experts + 15) / 16 * 16;
    swiglu(gate + padded, w->hidden + (t * (m->picks + 1) + m->picks) * m->hidden, m->hidden, (float)m->limit, 1.0f);
    for (int64_t e = 0; e < padded; e += LANES) {
        v16 score = softplus(load(gate + e));
        for (int i = 0; i < LANES; i++) gate[e + i] = sqrtf(score[i]);
    }
    for (int64_t i = 0; i < m->picks; i++) {
        int64_t best = l->tid2eid ? l->tid2eid[w->id[t] * m->picks + i] : -1;
        for (int64_t e = 0; !l->tid2eid && e < m->experts; e++) {
            int taken = 0;
            for (int64_t j = 0; j < i; j++) taken |= chosen[j] == e;
            if (!taken && (best < 0 || gate[e] + l->bias[e] > gate[best] + l->bias[best])) best = e;
        }
        chosen[i] = (int32_t)best;
        weight[i] = gate[best];
        sum = sum + weight[i];
    }
    for (int64_t i = 0; i < m->picks; i++) weight[i] = weight[i] / (sum + 1e-20f) * (float)m->scaling;
}

/* Sort the block's (token, pick) pairs by expert and cut them into groups of rows; the shared expert's come last. */
static void group_rows(Work *w) {
    const Model *m = w->model;
    int64_t slots = w->tokens * (m->picks + 1), placed = 0;
    memset(w->fill, 0, (size_t)(m->experts + 1) * sizeof *w->fill);
    w->groups = 0;
    for (int64_t i = 0; i < w->tokens * m->picks; i++) w->fill[w->chosen[i]]++;
    w->fill[m->experts] = (int32_t)w->tokens;
    for (int64_t e = 0; e <= m->experts; e++) {
        int64_t begin = placed;
        if (e == m->experts) w->routed_groups = w->groups;
        placed += w->fill[e];
        w->fill[e] = (int32_t)begin;
        for (int64_t first = begin; first < placed; first += ROWS)
            w->group[w->groups++] = (Group){e, first, placed - first < ROWS ? placed - first : ROWS};
    }
    for (int64_t i = 0; i < slots; i++) {
        int64_t t = i / (m->picks + 1), pick = i % (m->picks + 1);
        w->order[w->fill[pick < m->picks ? w->chosen[t * m->picks + pick] : m->experts]++] = (int32_t)i;
    }
}

static void expert_in(const Work *w, const Layer *l, int64_t item, int thread) {
    const Model *m = w->model;
    int64_t panels = panel_count(&l->w13);
    const Group *g = &w->group[item / panels];
    const float *from[ROWS];
    float *to[ROWS], *tile = w->local[thread].tile;
    for (int r = 0; r < g->count; r++) {
        from[r] = w->x + w->order[g->first + r] / (m->picks + 1) * m->dim;
        to[r] = tile + r * PANEL;
    }
    int64_t place = l->place ? l->place[g->expert] : g->expert;
    int64_t column = product_panel(&l->w13, place, item % panels, from, to, (int)g->count, 1);
    int64_t count = 2 * m->hidden - column < PANEL ? 2 * m->hidden - column : PANEL;
    for (int r = 0; r < g->count; r++) {
        int64_t slot = w->order[g->first + r], token = slot / (m->picks + 1), pick = slot % (m->picks + 1);
        swiglu(tile + r * PANEL, w->hidden + slot * m->hidden + column / 2, count / 2, (float)m->limit,
               w->weight[token * m->picks + pick]);
    }
}

static void expert_out(const Work *w, const Layer *l, int64_t item) {
    const Model *m = w->model;
    int64_t panels = panel_count(&l->w2);
    const Group *g = &w->group[item / panels];
    int shared = g->expert == m->experts;
    int64_t place = shared ? 0 : l->place ? l->place[g->expert] : g->expert;
    const float *from[ROWS];
    float *to[ROWS];
    for (int r = 0; r < g->count; r++) {
        from[r] = w->hidden + w->order[g->first + r] * m->hidden;
        to[r] = w->down + w->order[g->first + r] * m->dim;
    }
    product_panel(shared ? &l->shared_w2 : &l->w2, place, item % panels, from, to, (int)g->count, 0);
}

/* y of token t: the chosen experts in order of choice, then the shared one. */
static void sum_experts(const Work *w, int64_t t) {
    const Model *m = w->model;
    const float *down = w->down + t * (m->picks + 1) * m->dim;
    for (int64_t i = 0; i < m->dim; i += LANES) {
        v16 sum = load(down + i);
        for (int64_t k = 1; k <= m->picks; k++) sum = sum + load(down + k * m->dim + i);
        store(w->y + t * m->dim + i, sum);
    }
}

/* ---- the walk ---- */

static void embed(const Model *m, int64_t id, float *out) {
    for (int64_t i = 0; i < m->dim; i += LANES)
        store(out + i, m->embed_bf16 ? load_bf16((const uint16_t *)m->embed + id * m->dim + i)
                                     : load((const float *)m->embed + id * m->dim + i));
}

/* Streams of the block's tokens as they enter the first layer, and their rotary tables. */
static void begin(const Work *w, Stage *stage) {
    const Model *m = w->model;
    int64_t dim = m->dim;
    EACH(t, w->tokens) {
        float *streams = w->streams + t * STREAMS * dim, *x = w->x + t * dim;
        for (int kind = 0; kind < 2; kind++) rope_at(m, kind, w->position[t], w->table[kind] + t * m->rope);
        embed(m, w->id[t], x);
        if (!w->draft) {
            for (int j = 0; j < STREAMS; j++) memcpy(streams + j * dim, x, (size_t)dim * sizeof(float));
            continue;
        }
        rms_norm(x, m->enorm, x, dim, (float)m->eps);
        for (int j = 0; j < STREAMS; j++)
            rms_norm(w->streams_in + (t * STREAMS + j) * dim, m->hnorm, w->attended + (t * STREAMS + j) * dim, dim,
                     (float)m->eps);
    }
    END;
    if (!w->draft) return;
    linear(stage, &m->e_proj, 1, w->x, dim, 0, w->y, dim, 0, w->tokens);
    linear(stage, &m->h_proj, 1, w->attended, dim, 0, w->streams, dim, 0, w->tokens * STREAMS);
    EACH(t, w->tokens)
        for (int64_t i = 0; i < STREAMS * dim; i += LANES) {
            float *x = w->streams + t * STREAMS * dim + i;
            store(x, load(w->y + t * dim + i % dim) + load(x));
        }
    END;
}

/* Leave the site before (0: none, 1: attention, 2: the experts) with tokens of pair `i`, and enter the next. */
static void cross(const Work *w, int64_t i, int before, const Site *next) {
    int64_t first = i * PAIR, rows = w->tokens - first < PAIR ? w->tokens - first : PAIR;
    for (int64_t t = first; before && t < first + rows; t++) {
        if (before == 2) sum_experts(w, t);
        leave(w, t, w->y + t * w->model->dim);
    }
    enter(w, first, rows, next);
}

static void layer(Work *w, const Layer *l, int first, Stage *stage) {
    const Model *m = w->model;
    int64_t tokens = w->tokens, pairs = (tokens + PAIR - 1) / PAIR, dim = m->dim;
    int64_t head_groups = (m->heads + HEADS - 1) / HEADS;
    int thread = stage->thread;
    EACH(i, pairs) cross(w, i, first ? 0 : 2, &l->site[0]);
    END;
    linear(stage, &l->first, 1, w->x, dim, 0, w->first, l->first.n, 0, tokens);
    EACH(t, tokens) prepare(w, l, t, thread);
    END;
    linear(stage, &l->second, 1, w->first, l->first.n, 0, w->second, l->second.n, 0, tokens);
    if (l->overlap && (w->furthest + 1) / l->ratio > m->topk) {
        int64_t parts = tokens <= FEW ? PARTS : 1;
        EACH(i, tokens * parts) choose(w, l, i / parts, i % parts, thread);
        END;
        if (parts > 1) {
            EACH(t, tokens) join_parts(w, l, t, thread);
            END;
        }
    }
    EACH(i, tokens * head_groups) attend(w, l, i / head_groups, i % head_groups * HEADS, thread);
    END;
    int64_t inner = m->heads * m->width, group = inner / m->groups;
    linear(stage, &l->wo_a, m->groups, w->attended, inner, group, w->latent, m->groups * m->o_lora, m->o_lora, tokens);
    linear(stage, &l->wo_b, 1, w->latent, m->groups * m->o_lora, 0, w->y, dim, 0, tokens);
    EACH(i, pairs + w->segments) {
        if (i < pairs) cross(w, i, 1, &l->site[1]);
        else keep(w, l, i - pairs);
    }
    END;
    linear(stage, &l->gate, 1, w->x, dim, 0, w->gate, l->gate.n, 0, tokens);
    EACH(t, tokens) route(w, l, t);
    END;
    EACH(i, 1) {
        group_rows(w);
        if (m->fetch && m->fetch(l - m->layer, w->chosen, tokens * m->picks)) w->groups = w->routed_groups = 0;
    }
    END;
    EACH(i, w->routed_groups * panel_count(&l->w13)) expert_in(w, l, i, thread);
    END;
    EACH(i, w->groups * panel_count(&l->w2)) expert_out(w, l, i);
    END;
}

/* Leave the last layer; logits and streams of those tokens that want them. */
static void finish(const Work *w, Stage *stage) {
    const Model *m = w->model;
    const Site *c = &m->collapse[w->draft];
    int64_t size = STREAMS * m->dim;
    EACH(t, w->tokens) {
        sum_experts(w, t);
        leave(w, t, w->y + t * m->dim);
        if (w->streams_to[t]) memcpy(w->streams_to[t], w->streams + t * size, (size_t)size * sizeof(float));
    }
    END;
    EACH(i, w->head_rows) {
        const float *streams = w->streams + w->head[i] * size;
        float mix[MIXES], *out = mix;
        mix_logits(&c->fn, &streams, 1, m->dim, &out);
        float inverse = inverse_rms(streams, size, (float)m->eps);
        for (int j = 0; j < STREAMS; j++) mix[j] = mix[j] * inverse * c->scale[0] + c->base[j];
        for (int j = STREAMS; j < LANES; j++) mix[j] = 0.0f;
        store(mix, sigmoid(load(mix)) + (float)m->hc_eps);
        collapse(streams, mix, c->norm, m->dim, (float)m->eps, w->x + i * m->dim);
    }
    END;
    linear(stage, &m->head, 1, w->x, m->dim, 0, w->logits, m->vocab, 0, w->head_rows);
}

static void walk(void *argument, Stage *stage) {
    Work *w = argument;
    const Model *m = w->model;
    begin(w, stage);
    int64_t first = w->draft ? m->layers : 0, end = w->draft ? m->layers + 1 : m->layers;
    for (int64_t i = first; i < end; i++) layer(w, &m->layer[i], i == first, stage);
    finish(w, stage);
}

/* Run `count` spans. scratch holds native_scratch(model, block, threads) bytes, 64-byte aligned; `streams_in` (tokens,
   4, D) makes it the draft's forward. logits (sum of span.logits, V), streams_out (sum of span.streams, 4, D). */
void native_forward(const Model *m, Pool *pool, const SpanRow *spans, int64_t count, const int64_t *tokens,
                    const int32_t *pages, int64_t block, uint8_t *scratch, const float *streams_in, float *logits,
                    float *streams_out) {
    Work w = {.model = m, .draft = streams_in != NULL, .streams_in = streams_in, .logits = logits};
    int64_t size = STREAMS * m->dim;
    lay_out(&w, m, scratch, block, pool_threads(pool));
    for (int64_t s = 0, done = 0; s < count;) {
        w.tokens = w.segments = w.head_rows = w.furthest = 0;
        while (s < count && w.tokens < block) {
            const SpanRow *span = &spans[s];
            int64_t length = span->length - done < block - w.tokens ? span->length - done : block - w.tokens;
            w.segment_of[w.segments] = (Segment){span, pages + span->pages, w.tokens, span->start + done, length};
            for (int64_t i = done; i < done + length; i++, w.tokens++) {
                w.id[w.tokens] = tokens[span->tokens + i];
                w.position[w.tokens] = span->start + i;
                w.segment[w.tokens] = (int32_t)w.segments;
                w.streams_to[w.tokens] = NULL;
                if (i >= span->length - span->streams) { w.streams_to[w.tokens] = streams_out; streams_out += size; }
                if (i >= span->length - span->logits) w.head[w.head_rows++] = w.tokens;
            }
            if (span->start + done + length - 1 > w.furthest) w.furthest = span->start + done + length - 1;
            w.segments++;
            done += length;
            if (done == span->length) { s++; done = 0; }
        }
        pool_run(pool, walk, &w, sizeof w);
        w.logits += w.head_rows * m->vocab;
        if (w.streams_in) w.streams_in += w.tokens * size;
    }
}
