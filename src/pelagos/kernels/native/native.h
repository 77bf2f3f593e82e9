/* What the files of the native forward share: descriptors (which kernels/native.py reads from here), the thread pool and the
   products.

   The rule of every file: a value of a token is computed by one fixed sequence of operations that depends on the
   token's own position and data only. Tiles, threads, batches and chunks choose who computes it and when, never how. */
#ifndef PELAGOS_NATIVE_H
#define PELAGOS_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define STREAMS 4 /* hc_mult */
#define HEADS 4   /* heads that attend together: their scores of four keys fill one vector */
#define TILE 128  /* keys between two rescalings of the online softmax, counted along a query's own key list */
#define ROWS 96   /* rows one work item of a product takes */
#define PANEL 64  /* outputs of one packed panel */

/* Stacked weights (n, k), each padded to whole 32 outputs and packed as panels [n / 64][k][64], then one of 32 as
   needed; in bfloat16 when that loses nothing, and then outputs j and j + 16 of each 32 share a word. */
typedef struct {
    const void *data;
    int64_t n, k, bf16;
} Matrix;

/* A compressor: byte offsets of its entries in a page and of its tail rings, of `rows` rows, in a slot. */
typedef struct {
    int64_t width, entries, kv, score, rows;
    const float *ape, *norm;
} Pooled;

/* The hyper-connection before a site or the head, and the norm behind it. */
typedef struct {
    Matrix fn;
    const float *base, *scale, *norm;
} Site;

typedef struct {
    int64_t ratio, overlap;
    int64_t window, window_rows;                    /* byte offset in a slot, ring rows */
    Pooled pool[2];                                 /* of entries, and of index keys where windows overlap */
    Site site[2];                                   /* attention, experts */
    Matrix first, second, wo_a, wo_b, gate, w13, w2, shared_w2;
    const float *q_norm, *kv_norm, *sink, *bias;
    const int64_t *tid2eid;                         /* (V, K), or NULL where `bias` chooses */
    const int64_t *place;                           /* (E,) of each expert among w13 and w2, or NULL: its own number */
} Layer;

typedef int (*Fetch)(int64_t layer, const int32_t *chosen, int64_t count); /* fills places; not 0: failed */

typedef struct {
    int64_t dim, heads, width, rope, q_lora, groups, o_lora, window, index_heads, index_width, topk;
    int64_t experts, picks, hidden, vocab, iters, layers, drafts, page_tokens, page_bytes, slot_bytes, max_ratio;
    double scaling, limit, hc_eps, eps;
    const Layer *layer;                             /* `layers` of the backbone, then `drafts` */
    const void *embed;
    int64_t embed_bf16;
    Matrix head, e_proj, h_proj;
    const float *enorm, *hnorm;
    Site collapse[2];                               /* backbone, draft */
    const float *freqs[2];                          /* rope / 2 each: window-only layers, compressed layers */
    uint8_t *pages, *slots;
    Fetch fetch;                                    /* or NULL */
} Model;

/* One row of the span table (int64 each); tokens and pages are offsets into the flat lists. */
typedef struct {
    int64_t tokens, length, start, slot, pages, frozen, logits, streams;
} SpanRow;

/* ---- threads.c ---- */
#define JOB_BYTES 1024 /* room for a job's argument */
typedef struct Pool Pool;
typedef struct { Pool *pool; uint64_t id; int thread; } Stage; /* where one thread is in a job */
typedef void (*Job)(void *argument, Stage *stage);
Pool *pool_new(int threads);
void pool_free(Pool *pool);
int pool_threads(const Pool *pool);
/* Run a job on all threads; its argument (`size` <= JOB_BYTES) is copied. Outside of a
   stage's items nothing but the argument may be read: a late thread still walks by when the job has ended. */
void pool_run(Pool *pool, Job job, const void *argument, size_t size);
int64_t stage_take(Stage *stage, int64_t count); /* an item of the stage, -1 when all are taken */
void stage_done(Stage *stage, int64_t count);    /* after each item */
void stage_end(Stage *stage);                    /* wait for all items, then go on to the next stage */

/* ---- product.c ---- */
int64_t panel_count(const Matrix *m);
/* c[r][col .. col+width) = a[r] . rows of panel `panel` of stacked weight `which`; returns the panel's first column. */
int64_t product_panel(const Matrix *m, int64_t which, int64_t panel, const float *const *a, float *const *c, int rows,
                      int relative);

/* ---- attend.c ---- */
/* The online softmax of HEADS heads of one query over its key list, tile by tile. q and out are (HEADS, width). */
typedef struct {
    float peak[16], sum[16]; /* lane 4 * (key mod 4) + head */
    float *out, *weights;    /* weights (TILE, HEADS) */
    int64_t width;
} Attend;
void attend_begin(Attend *state, const float *sink);
void attend_tile(Attend *state, const float *q, const float **keys, int count);
void attend_end(Attend *state);
/* scores[k] = sum over heads of weights[h] * relu(q[h] . keys[k]); `heads` is a multiple of HEADS. */
void index_scores(const float *q, const float *weights, int64_t heads, int64_t width, const float **keys, int count,
                  float *scores);

/* Keep the best `topk` of scores offered in ascending order of index; ties go to the lower index. */
typedef struct {
    uint64_t *held, *copy; /* best_capacity(topk) each */
    int64_t count, topk;
    uint64_t limit; /* the worst rank that still counts */
} Best;
int64_t best_capacity(int64_t topk);
void best_begin(Best *best, int64_t topk);
void best_offer(Best *best, const float *scores, int64_t first, int count);
int64_t best_ranks(Best *best, uint64_t *ranks); /* the best so far, for best_merge; returns how many */
void best_merge(Best *best, const uint64_t *ranks, int64_t count);
void best_take(Best *best, int32_t *picks);

#endif
