/* A pool whose threads walk through the same stages of a job and take items of each from one word. A stage ends when
   its items are done, not when its threads have come: a thread that the system has put aside holds nobody up, it finds
   its stages passed and skips them. Nothing is ever summed across threads, so who takes what cannot be seen. */
#define _GNU_SOURCE
#include "native.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SPINS 200        /* looks at the word before the processor is offered to others */
#define IDLE_NS 1000000  /* an idle thread looks this long for the next job (decode steps follow closely), then sleeps */
#define ITEM_BITS 24     /* of the word: items taken of the stage; above them the stage's number */
#define JOB_BITS 12      /* of the number: stages of a job; above them the job's number, which may wrap */
#define ID(word) ((word) >> ITEM_BITS)

struct Pool {
    _Alignas(64) atomic_uint_fast64_t word;
    _Alignas(64) atomic_long done; /* items of the present stage */
    _Alignas(64) atomic_uint jobs; /* jobs handed out */
    atomic_int stop;
    int threads, sleeping;
    pid_t process;
    Job job;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    /* A thread put aside may look at an argument after its job has ended, so it lives here. */
    _Alignas(64) uint8_t argument[JOB_BYTES];
};

typedef struct { Pool *pool; int thread; unsigned seen; } Worker;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int64_t stage_take(Stage *stage, int64_t count) {
    atomic_uint_fast64_t *word = &stage->pool->word;
    uint_fast64_t seen = atomic_load_explicit(word, memory_order_acquire);
    while (ID(seen) == stage->id) {
        int64_t item = (int64_t)(seen & ((1u << ITEM_BITS) - 1));
        if (item >= count && count) return -1;
        uint_fast64_t next = count ? seen + 1 : (stage->id + 1) << ITEM_BITS;
        if (atomic_compare_exchange_weak_explicit(word, &seen, next, memory_order_acq_rel, memory_order_acquire))
            return count ? item : -1;
    }
    return -1;
}

void stage_done(Stage *stage, int64_t count) {
    Pool *pool = stage->pool;
    if (atomic_fetch_add_explicit(&pool->done, 1, memory_order_acq_rel) + 1 < count) return;
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->word, (stage->id + 1) << ITEM_BITS, memory_order_release);
}

void stage_end(Stage *stage) {
    atomic_uint_fast64_t *word = &stage->pool->word;
    for (long spin = 0; ID(atomic_load_explicit(word, memory_order_acquire)) == stage->id; spin++) {
        if (spin < SPINS) relax();
        else sched_yield();
    }
    stage->id++;
}

static Stage first_stage(Pool *pool, int thread, unsigned jobs) {
    uint64_t mask = ((uint64_t)1 << (64 - ITEM_BITS)) - 1;
    return (Stage){pool, ((uint64_t)jobs << JOB_BITS) & mask, thread};
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Wait for a job after the one `seen`; returns its number. */
static unsigned await_job(Pool *pool, unsigned seen) {
    int64_t until = now_ns() + IDLE_NS;
    unsigned jobs;
    while (now_ns() < until) {
        for (int spin = 0; spin < 64; spin++) {
            if ((jobs = atomic_load_explicit(&pool->jobs, memory_order_acquire)) != seen) return jobs;
            relax();
        }
        sched_yield();
    }
    pthread_mutex_lock(&pool->mutex);
    pool->sleeping++;
    while ((jobs = atomic_load(&pool->jobs)) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
    pool->sleeping--;
    pthread_mutex_unlock(&pool->mutex);
    return jobs;
}

static void *work(void *argument) {
    Worker worker = *(Worker *)argument;
    Pool *pool = worker.pool;
    free(argument);
    for (unsigned seen = worker.seen;;) {
        seen = await_job(pool, seen);
        if (atomic_load(&pool->stop)) return NULL;
        Stage stage = first_stage(pool, worker.thread, seen);
        pool->job(pool->argument, &stage);
    }
}

static void pool_start(Pool *pool) {
    pool->process = getpid();
    pool->sleeping = 0;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (int i = 1; i < pool->threads; i++) {
        Worker *worker = malloc(sizeof *worker);
        if (worker) *worker = (Worker){pool, i, atomic_load(&pool->jobs)};
        if (!worker || pthread_create(&pool->workers[i], NULL, work, worker)) {
            free(worker);
            pool->threads = i; /* fewer threads, same bits */
            return;
        }
    }
}

Pool *pool_new(int threads) {
    Pool *pool = aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64);
    if (!pool) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->threads = threads < 1 ? 1 : threads;
    pool->workers = calloc((size_t)pool->threads, sizeof *pool->workers);
    if (!pool->workers) { free(pool); return NULL; }
    pool_start(pool);
    return pool;
}

int pool_threads(const Pool *pool) { return pool->threads; }

void pool_run(Pool *pool, Job job, const void *argument, size_t size) {
    if (pool->process != getpid()) pool_start(pool); /* a fork copies the pool but none of its threads */
    memcpy(pool->argument, argument, size);
    pool->job = job;
    unsigned jobs = atomic_load(&pool->jobs) + 1;
    Stage stage = first_stage(pool, 0, jobs);
    atomic_store_explicit(&pool->word, stage.id << ITEM_BITS, memory_order_relaxed);
    if (pool->threads > 1) pthread_mutex_lock(&pool->mutex);
    atomic_store_explicit(&pool->jobs, jobs, memory_order_release);
    if (pool->threads > 1) {
        if (pool->sleeping) pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    job(pool->argument, &stage);
}

void pool_free(Pool *pool) {
    if (pool->process == getpid()) {
        pthread_mutex_lock(&pool->mutex);
        atomic_store(&pool->stop, 1);
        atomic_fetch_add(&pool->jobs, 1);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
        for (int i = 1; i < pool->threads; i++) pthread_join(pool->workers[i], NULL);
    }
    free(pool->workers);
    free(pool);
}
