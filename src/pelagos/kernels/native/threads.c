/* A pool whose threads all walk through the same stages. A stage's items are handed out by one counter and a barrier
   ends it; nothing is ever summed across threads, so who takes what cannot be seen in the result. */
#define _GNU_SOURCE
#include "native.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define SPINS 4000       /* looks at a barrier before the processor is offered to others */
#define IDLE_NS 200000   /* an idle thread looks this long for the next job (decode steps follow closely), then sleeps */

struct Pool {
    _Alignas(64) atomic_long next;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint passed;   /* barriers passed */
    _Alignas(64) atomic_uint jobs;     /* jobs handed out */
    _Alignas(64) atomic_int stop;
    int threads;
    pid_t process;
    Job job;
    void *argument;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int sleeping;
};

typedef struct { Pool *pool; int thread; unsigned seen; } Worker;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

long pool_take(Pool *pool) { return atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed); }

int pool_threads(const Pool *pool) { return pool->threads; }

void pool_barrier(Pool *pool) {
    unsigned passed = atomic_load_explicit(&pool->passed, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) == pool->threads - 1) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->passed, passed + 1, memory_order_release);
        return;
    }
    for (long spin = 0; atomic_load_explicit(&pool->passed, memory_order_acquire) == passed; spin++) {
        if (spin < SPINS) relax();
        else sched_yield();
    }
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void await_job(Pool *pool, unsigned seen) {
    int64_t until = now_ns() + IDLE_NS;
    while (now_ns() < until)
        for (int spin = 0; spin < 64; spin++) {
            if (atomic_load_explicit(&pool->jobs, memory_order_acquire) != seen) return;
            relax();
        }
    pthread_mutex_lock(&pool->mutex);
    pool->sleeping++;
    while (atomic_load(&pool->jobs) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
    pool->sleeping--;
    pthread_mutex_unlock(&pool->mutex);
}

static void *work(void *argument) {
    Worker worker = *(Worker *)argument;
    Pool *pool = worker.pool;
    free(argument);
    for (unsigned seen = worker.seen;; seen++) {
        await_job(pool, seen);
        if (atomic_load(&pool->stop)) return NULL;
        pool->job(pool->argument, worker.thread);
        pool_barrier(pool);
    }
}

static int pool_start(Pool *pool) {
    pool->process = getpid();
    pool->sleeping = 0;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->arrived, 0);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (int i = 1; i < pool->threads; i++) {
        Worker *worker = malloc(sizeof *worker);
        if (worker) *worker = (Worker){pool, i, atomic_load(&pool->jobs)};
        if (!worker || pthread_create(&pool->workers[i], NULL, work, worker)) {
            free(worker);
            pool->threads = i; /* fewer threads, same bits */
            return 0;
        }
    }
    return 1;
}

Pool *pool_new(int threads) {
    Pool *pool = aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64);
    if (!pool) return NULL;
    *pool = (Pool){.threads = threads < 1 ? 1 : threads};
    pool->workers = calloc((size_t)pool->threads, sizeof *pool->workers);
    if (!pool->workers) { free(pool); return NULL; }
    pool_start(pool);
    return pool;
}

void pool_run(Pool *pool, Job job, void *argument) {
    if (pool->process != getpid()) pool_start(pool); /* a fork copies the pool but none of its threads */
    pool->job = job;
    pool->argument = argument;
    if (pool->threads > 1) {
        pthread_mutex_lock(&pool->mutex);
        atomic_fetch_add_explicit(&pool->jobs, 1, memory_order_release);
        if (pool->sleeping) pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    job(argument, 0);
    pool_barrier(pool);
}

void pool_free(Pool *pool) {
    if (pool->process == getpid()) {
        atomic_store(&pool->stop, 1);
        pthread_mutex_lock(&pool->mutex);
        atomic_fetch_add(&pool->jobs, 1);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
        for (int i = 1; i < pool->threads; i++) pthread_join(pool->workers[i], NULL);
    }
    free(pool->workers);
    free(pool);
}
