/* bench - speed and memory, printed; nothing here passes or fails.
 *
 *     bench CHECKPOINT TOKENS [NSAMPLES SEQLEN]
 *
 * Products at the shapes of SmolLM2-135M, Llama-2-7B and Llama-3-8B beside OpenBLAS (where libopenblas.so is found at run
 * time; OPENBLAS_CORETYPE=Haswell and CFLAGS="-O3 -DBESA_SIMD_MAX=1" compare AVX2 on any machine), attention, passes bound
 * by memory beside memcpy, a whole block by parts beside OpenBLAS, and one prune run of the checkpoint: time per pass, what
 * is not a product, arena and plan. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <sys/resource.h>
#include <time.h>

#define BESA_IMPLEMENTATION
#include "besa.h"
#include "test.h"

static besa_error g_error;

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The best time of a statement over at least 5 runs and 0.15 seconds. */
#define BEST_TIME(result, statement)                                                               \
    do {                                                                                           \
        double best_start = seconds();                                                             \
        (result) = 1e30;                                                                           \
        for (int best_i = 0; best_i < 5 || seconds() - best_start < 0.15; best_i++) {              \
            double best_t = seconds();                                                             \
            statement;                                                                             \
            best_t = seconds() - best_t;                                                           \
            if (best_t < (result)) (result) = best_t;                                              \
        }                                                                                          \
    } while (0)

static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static besa_backend cpu_backend(int threads, int bf16)
{
    besa_backend be;
    besa_cpu_options cpu;
    memset(&cpu, 0, sizeof cpu);
    cpu.threads = threads;
    cpu.bf16 = bf16;
    if (besa_cpu_backend(&be, &cpu, &g_error) != BESA_OK) fail(g_error.message);
    return be;
}

static void set_workspace(besa_backend *be, const besa_workload *w)
{
    be->workspace_bytes = be->workspace_size(be, w);
    be->workspace = take(be->workspace_bytes + 256);
    be->workspace = (void *)(((uintptr_t)be->workspace + 255) & ~(uintptr_t)255);
}

static float *noise(int64_t n)
{
    float *p = take_floats(n);
    uint32_t u = 12345;
    for (int64_t i = 0; i < n; i++) p[i] = (float)((u = u * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1;
    return p;
}

/* ---- products -------------------------------------------------------------------------------- */

typedef void (*sgemm_function)(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                               const float *b, int ldb, float beta, float *c, int ldc);
enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };
enum { OPENBLAS, FLOATS, BF16_WEIGHTS, BF16_PRODUCTS, WAYS };           /* how a product is computed */

static sgemm_function g_sgemm;          /* OpenBLAS's, or NULL */
static void (*g_set_threads)(int);

static void find_openblas(void)
{
    static const char *const library[] = { "libopenblas.so.0", "libopenblas.so" };
    void *dl = NULL;
    for (int i = 0; i < 2 && !dl; i++) dl = dlopen(library[i], RTLD_NOW);
    if (!dl) return;
    *(void **)&g_sgemm = dlsym(dl, "cblas_sgemm");
    *(void **)&g_set_threads = dlsym(dl, "openblas_set_num_threads");
}

/* Arrays (T, C), (R, C) and (T, R) of one layer of R rows and C columns, with room for the largest */
typedef struct products {
    sgemm_function sgemm;               /* or NULL */
    besa_backend be[2];                 /* float and bf16 products */
    int T, R, C;
    float *x, *w, *dy, *y, *dx, *dw;
    uint16_t *w16;
} products;

static void run_product(products *p, int kind, int way)
{
    besa_backend *be = &p->be[way == BF16_PRODUCTS];
    const void *w = way == BF16_WEIGHTS ? (const void *)p->w16 : p->w;
    besa_dtype dtype = way == BF16_WEIGHTS ? BESA_BF16 : BESA_F32;
    int T = p->T, R = p->R, C = p->C;
    if (way != OPENBLAS) {
        if (kind == 0) be->linear_forward(be, p->y, p->x, w, dtype, NULL, T, R, C, 0);
        if (kind == 1) be->linear_backward_input(be, p->dx, p->dy, w, dtype, T, R, C, 0);
        if (kind == 2) be->linear_backward_weight(be, p->dw, BESA_F32, p->dy, p->x, T, R, C, 0, R, 0);
        return;
    }
    if (kind == 0) p->sgemm(ROW_MAJOR, PLAIN, TRANSPOSED, T, R, C, 1, p->x, C, p->w, C, 0, p->y, R);
    if (kind == 1) p->sgemm(ROW_MAJOR, PLAIN, PLAIN, T, C, R, 1, p->dy, R, p->w, C, 0, p->dx, C);
    if (kind == 2) p->sgemm(ROW_MAJOR, TRANSPOSED, PLAIN, R, C, T, 1, p->dy, R, p->x, C, 0, p->dw, C);
}

/* One layer: the ways in turn, the best time of each; log_ratio (WAYS) += ln(OpenBLAS's time / the way's) */
static void bench_layer(products *p, const char *name, int threads, double *log_ratio)
{
    static const char *const kinds[] = { "Y = X W' ", "dX = dY W", "dW = dY'X" };
    for (int kind = 0; kind < 3; kind++) {
        double best[WAYS] = { 1e30, 1e30, 1e30, 1e30 }, start = seconds(), gflop = 2e-9 * p->T * p->R * p->C;
        for (int round = 0; round < 3 || seconds() - start < 0.3; round++)
            for (int way = p->sgemm ? OPENBLAS : FLOATS; way < WAYS; way++) {
                double t = seconds();
                run_product(p, kind, way);
                t = seconds() - t;
                if (t < best[way]) best[way] = t;
            }
        printf("  %d %5d   %s %s", threads, p->T, name, kinds[kind]);
        for (int way = OPENBLAS; way < WAYS; way++) {
            printf("  %7.1f (%4.2f)", best[way] < 1e30 ? gflop / best[way] : 0, p->sgemm ? best[OPENBLAS] / best[way] : 0);
            log_ratio[way] += p->sgemm ? log(best[OPENBLAS] / best[way]) : 0;
        }
        printf("\n");
    }
}

static void bench_products(void)
{
    enum { LAYERS = 8 };
    static const struct { const char *name; int rows, columns, most; } layer[LAYERS] = {   /* most: of tokens, to end in time */
        { "SmolLM2 q, o    ", 576, 576, 2048 },   { "SmolLM2 k, v    ", 192, 576, 2048 },
        { "SmolLM2 gate, up", 1536, 576, 2048 },  { "SmolLM2 down    ", 576, 1536, 2048 },
        { "7B q, k, v, o   ", 4096, 4096, 512 },  { "7B gate, up     ", 11008, 4096, 512 },
        { "8B k, v         ", 1024, 4096, 2048 }, { "8B gate, up     ", 14336, 4096, 512 } };
    products p;
    int64_t activations = 0, weights = 0;
    memset(&p, 0, sizeof p);
    for (int i = 0; i < LAYERS; i++) {
        activations = besa__max(activations, (int64_t)layer[i].most * besa__max(layer[i].rows, layer[i].columns));
        weights = besa__max(weights, (int64_t)layer[i].rows * layer[i].columns);
    }
    p.x = noise(activations), p.dy = noise(activations), p.y = take_floats(activations), p.dx = take_floats(activations);
    p.w = noise(weights), p.dw = take_floats(weights), p.w16 = (uint16_t *)take((size_t)weights * 2);
    p.sgemm = g_sgemm;
    printf("products, GFLOP/s (and of OpenBLAS's speed%s)\n", p.sgemm ? "" : ", which is not here");
    printf("  threads tokens layer, kind              OpenBLAS            float          bf16 weights    bf16 products\n");
    for (int threads = 1; threads <= 2; threads++)
        for (p.T = 512; p.T <= 2048; p.T *= 4) {
            double log_ratio[WAYS] = { 0 };
            int layers = 0;
            besa_workload load;
            memset(&load, 0, sizeof load);
            load.rows = load.columns = 1, load.tokens = load.seqlen = p.T;
            for (int bf16 = 0; bf16 < 2; bf16++) {
                p.be[bf16] = cpu_backend(threads, bf16);
                set_workspace(&p.be[bf16], &load);
            }
            p.be[0].convert(&p.be[0], p.w16, BESA_BF16, p.w, BESA_F32, weights);
            if (g_set_threads) g_set_threads(threads);
            for (int i = 0; i < LAYERS; i++) {
                if (p.T > layer[i].most) continue;
                p.R = layer[i].rows, p.C = layer[i].columns;
                bench_layer(&p, layer[i].name, threads, log_ratio);
                layers++;
            }
            printf("  %d %5d   geometric mean of the ratios: float %.3f, bf16 weights %.3f, bf16 products %.3f\n", threads, p.T,
                   exp(log_ratio[FLOATS] / layers / 3), exp(log_ratio[BF16_WEIGHTS] / layers / 3),
                   exp(log_ratio[BF16_PRODUCTS] / layers / 3));
            for (int bf16 = 0; bf16 < 2; bf16++) p.be[bf16].destroy(&p.be[bf16]);
        }
}

/* ---- attention ------------------------------------------------------------------------------- */

/* Beside the block's product of the same heads, at the same moment; of attention's products only the causal half counts. */
static void bench_attention(void)
{
    static const int heads[][3] = { { 9, 3, 64 }, { 32, 32, 128 }, { 32, 8, 128 } };
    printf("attention, GFLOP/s of the causal half, and its ratio to a product's of as many columns\n");
    printf("  threads heads     tokens    product  forward  ratio  backward  ratio  workspace\n");
    for (int i = 0; i < 12; i++) {
        int threads = 1 + i % 2, h = heads[i / 4][0], kv = heads[i / 4][1], dh = heads[i / 4][2], T = i / 2 % 2 ? 2048 : 512;
        int64_t d = h * dh, n = T * d;
        besa_attention_shape s = { 1, T, h, kv, dh, 0, 0, 0 };
        double causal = 1e-9 * (double)d * T * (T + 1), t[3];
        float *q = noise(n), *k = noise(n), *v = noise(n), *d_o = noise(n), *o = take_floats(n), *dk = take_floats(n);
        float *dv = take_floats(n), *w = noise(d * d);
        besa_backend be = cpu_backend(threads, 0);
        besa_workload load;
        memset(&load, 0, sizeof load);
        load.rows = load.columns = d, load.tokens = load.seqlen = T;
        load.num_attention_heads = h, load.num_key_value_heads = kv, load.head_dim = dh;
        set_workspace(&be, &load);
        BEST_TIME(t[1], be.attention_forward(&be, o, q, k, v, &s));
        BEST_TIME(t[0], be.linear_forward(&be, o, q, w, BESA_F32, NULL, T, d, d, 0));
        BEST_TIME(t[2], be.attention_backward(&be, o, dk, dv, d_o, q, k, v, &s));
        t[0] = 2e-9 * (double)n * (double)d / t[0], t[1] = 2 * causal / t[1], t[2] = 5 * causal / t[2];
        printf("  %d       %2d/%-2d %3d %6d     %7.1f  %7.1f   %4.2f   %7.1f   %4.2f  %6.1f MB\n", threads, h, kv, dh, T, t[0],
               t[1], t[1] / t[0], t[2], t[2] / t[0], 1e-6 * (double)besa__cpu_attention_bytes(&load, threads));
        be.destroy(&be);
    }
}

/* ---- passes bound by memory ------------------------------------------------------------------ */

static void bench_passes(int threads)
{
    enum { R = 4096, C = 2048, D = 100 };       /* larger than any cache */
    int64_t n = (int64_t)R * C;
    float *w = noise(n), *s = take_floats(n), *what = take_floats(n), *dw = noise(n), *scale = noise(C);
    float *sums = take_floats((int64_t)R * D), *inv = take_floats(R), *norm = take_floats(C), *loss = take_floats(1);
    uint16_t *rank = (uint16_t *)take((size_t)n * 2), *bucket = (uint16_t *)take(C * 2), *w16 = (uint16_t *)take((size_t)n * 2);
    uint16_t *what16 = (uint16_t *)take((size_t)n * 2);
    int32_t *keep = (int32_t *)take(R * 4), *zeros = (int32_t *)take(R * 4);
    besa_backend be = cpu_backend(threads, 0);
    besa_workload load;
    double copy, t;
    int32_t bad = 0;
    memset(&load, 0, sizeof load);
    load.rows = R, load.columns = C, load.tokens = load.seqlen = R;
    set_workspace(&be, &load);
    for (int r = 0; r < R; r++) keep[r] = C / 2;
    for (int j = 0; j < C; j++) bucket[j] = (uint16_t)((C - 1 - j) * D / C);
    be.convert(&be, w16, BESA_BF16, w, BESA_F32, n);
    BEST_TIME(copy, memcpy(what, w, (size_t)n * 4)); /* one thread: a copy by several is what the pass itself would be */
    copy = 8e-9 * (double)n / copy;
    printf("passes bound by memory, %d x %d, %d threads, GB/s (memcpy by one thread: %.1f)\n", R, C, threads, copy);
#define PASS(name, bytes, call)                                                                    \
    do {                                                                                           \
        BEST_TIME(t, call);                                                                        \
        printf("  %-34s %6.1f   %4.2f of memcpy   %6.2f ms\n", name, (bytes) * 1e-9 / t, (bytes) * 1e-9 / t / copy, 1e3 * t); \
    } while (0)
    PASS("copy (device)", 8.0 * (double)n, be.copy(&be, BESA_QUEUE_COMPUTE, what, w, (size_t)n * 4));
    PASS("score, f32", 8.0 * (double)n, be.score(&be, s, w, BESA_F32, scale, 1, R, C));
    PASS("score, bf16", 6.0 * (double)n, be.score(&be, s, w16, BESA_BF16, scale, 1, R, C));
    PASS("score_rows, f32", 4.0 * (double)n, be.score_rows(&be, NULL, zeros, w, BESA_F32, scale, 1, R, C));
    PASS("rank_rows (a sort)", 6.0 * (double)n, be.rank_rows(&be, rank, s, R, C));
    PASS("mask_apply, f32", 10.0 * (double)n, be.mask_apply(&be, what, w, BESA_F32, rank, keep, R, C));
    PASS("mask_apply, bf16", 6.0 * (double)n, be.mask_apply(&be, what16, w16, BESA_BF16, rank, keep, R, C));
    PASS("bucket_gradient, f32", 10.0 * (double)n, be.bucket_gradient(&be, sums, dw, BESA_F32, w, BESA_F32, rank, bucket, R, C, D));
    PASS("bucket_gradient, bf16", 8.0 * (double)n, be.bucket_gradient(&be, sums, dw, BESA_F32, w16, BESA_BF16, rank, bucket, R, C, D));
    PASS("count_zeros, f32", 4.0 * (double)n, be.count_zeros(&be, zeros, &bad, w, BESA_F32, R, C));
    PASS("convert, bf16 to f32", 6.0 * (double)n, be.convert(&be, what, BESA_F32, w16, BESA_BF16, n));
    PASS("column_sumsq", 4.0 * (double)n, be.column_sumsq(&be, norm, w, R, C));
    PASS("rmsnorm_forward", 8.0 * (double)n, be.rmsnorm_forward(&be, what, inv, w, scale, R, C, 1e-5f));
    PASS("rmsnorm_backward", 12.0 * (double)n, be.rmsnorm_backward(&be, what, dw, w, scale, inv, R, C, 0));
    PASS("swiglu_forward", 12.0 * (double)n, be.swiglu_forward(&be, s, w, dw, n));
    PASS("swiglu_backward", 20.0 * (double)n, be.swiglu_backward(&be, what, s, dw, w, dw, n));
    PASS("block_loss", 12.0 * (double)n, be.block_loss(&be, loss, what, w, dw, norm, 1, R, C, 0));
#undef PASS
    be.destroy(&be);
}

/* ---- a run ----------------------------------------------------------------------------------- */

enum { PRODUCTS, ATTENTION, BETWEEN, SCORES, MASKS, RATES, PARTS };    /* what a pass consists of */
static const char *const g_part[PARTS] = { "products", "attention", "norms, rope, SwiGLU, loss", "scores and ranks",
                                           "masks and bucket gradients", "rates and optimiser" };

static struct watch {
    besa_backend inner;                         /* the table that the timed one calls */
    double time[PARTS], flop[PARTS];
    size_t live, peak;
    struct { void *p; size_t bytes; } block[64];
} g_watch;

/* An operation that adds its time and its FLOP to a part. */
#define TIMED(part, count, op, params, args)                                                       \
    static besa_result timed_##op params                                                           \
    {                                                                                              \
        double timed_start = seconds();                                                            \
        besa_result timed_result = g_watch.inner.op args;                                          \
        g_watch.time[part] += seconds() - timed_start;                                             \
        g_watch.flop[part] += (count);                                                             \
        return timed_result;                                                                       \
    }

/* of one product with every visible key: a causal half */
static double attention_flop(const besa_attention_shape *s)
{
    return (double)(s->batch * s->seqlen * s->num_attention_heads * s->head_dim) * (double)(s->seqlen + 1);
}

TIMED(PRODUCTS, 2.0 * (double)n * (double)(r * c), linear_forward, (besa_backend *be, void *y, const void *x, const void *w,
      besa_dtype t, const float *b, int64_t n, int64_t r, int64_t c, int a), (be, y, x, w, t, b, n, r, c, a))
TIMED(PRODUCTS, 2.0 * (double)n * (double)(r * c), linear_backward_input, (besa_backend *be, void *dx, const void *dy,
      const void *w, besa_dtype t, int64_t n, int64_t r, int64_t c, int a), (be, dx, dy, w, t, n, r, c, a))
TIMED(PRODUCTS, 2.0 * (double)n * (double)(rows * c), linear_backward_weight, (besa_backend *be, void *dw, besa_dtype dt,
      const void *dy, const void *x, int64_t n, int64_t r, int64_t c, int64_t first, int64_t rows, int a),
      (be, dw, dt, dy, x, n, r, c, first, rows, a))
TIMED(PRODUCTS, (double)n * (double)(c * c), gram, (besa_backend *be, float *h, const void *x, float s, int64_t n, int64_t c),
      (be, h, x, s, n, c))
TIMED(ATTENTION, 2 * attention_flop(s), attention_forward, (besa_backend *be, void *o, const void *q, const void *k,
      const void *v, const besa_attention_shape *s), (be, o, q, k, v, s))
TIMED(ATTENTION, 5 * attention_flop(s), attention_backward, (besa_backend *be, void *dq, void *dk, void *dv, const void *d_o,
      const void *q, const void *k, const void *v, const besa_attention_shape *s), (be, dq, dk, dv, d_o, q, k, v, s))
TIMED(BETWEEN, 0, rmsnorm_forward, (besa_backend *be, void *y, float *r, const void *x, const float *g, int64_t n, int64_t d,
      float e), (be, y, r, x, g, n, d, e))
TIMED(BETWEEN, 0, rmsnorm_backward, (besa_backend *be, void *dx, const void *dy, const void *x, const float *g,
      const float *r, int64_t n, int64_t d, int a), (be, dx, dy, x, g, r, n, d, a))
TIMED(BETWEEN, 0, rope, (besa_backend *be, void *x, const float *c, const float *s, int64_t n, int64_t t, int64_t h,
      int64_t d, int64_t r, int direction), (be, x, c, s, n, t, h, d, r, direction))
TIMED(BETWEEN, 0, swiglu_forward, (besa_backend *be, void *z, const void *g, const void *u, int64_t n), (be, z, g, u, n))
TIMED(BETWEEN, 0, swiglu_backward, (besa_backend *be, void *dg, void *du, const void *dz, const void *g, const void *u,
      int64_t n), (be, dg, du, dz, g, u, n))
TIMED(BETWEEN, 0, column_sumsq, (besa_backend *be, float *out, const void *x, int64_t n, int64_t d), (be, out, x, n, d))
TIMED(BETWEEN, 0, column_sum, (besa_backend *be, float *out, const void *dy, const void *x, const float *r, int64_t n, int64_t d),
      (be, out, dy, x, r, n, d))
TIMED(BETWEEN, 0, block_loss, (besa_backend *be, float *loss, void *dy, const void *y, const void *r, const float *q, float s,
      int64_t n, int64_t d, int a), (be, loss, dy, y, r, q, s, n, d, a))
TIMED(SCORES, 0, score, (besa_backend *be, float *s, const void *w, besa_dtype t, const float *scale, int power, int64_t r,
      int64_t c), (be, s, w, t, scale, power, r, c))
TIMED(SCORES, 0, rank_rows, (besa_backend *be, void *rank, const float *s, int64_t r, int64_t c), (be, rank, s, r, c))
TIMED(MASKS, 0, mask_apply, (besa_backend *be, void *y, const void *w, besa_dtype t, const void *rank, const int32_t *n,
      int64_t r, int64_t c), (be, y, w, t, rank, n, r, c))
TIMED(MASKS, 0, mask_update, (besa_backend *be, void *y, const void *w, besa_dtype t, const void *rank, const int32_t *n,
      int32_t *before, int64_t r, int64_t c), (be, y, w, t, rank, n, before, r, c))
TIMED(MASKS, 0, bucket_gradient, (besa_backend *be, float *sums, const void *dw, besa_dtype dt, const void *w, besa_dtype t,
      const void *rank, const uint16_t *bucket, int64_t r, int64_t c, int64_t d), (be, sums, dw, dt, w, t, rank, bucket, r, c, d))
TIMED(RATES, 0, rate_forward, (besa_backend *be, float *alpha, int32_t *n, const float *layer, const float *row,
      const int32_t *zeros, const besa_rate_shape *s), (be, alpha, n, layer, row, zeros, s))
TIMED(RATES, 0, rate_backward, (besa_backend *be, float *dlayer, float *drow, const float *sums, const float *layer,
      const float *row, const besa_penalty *p, const besa_rate_shape *s), (be, dlayer, drow, sums, layer, row, p, s))
TIMED(RATES, 0, optimizer_step, (besa_backend *be, const besa_optimizer_step *o), (be, o))

static besa_result watched_alloc(besa_backend *be, void **p, size_t bytes)
{
    besa_result r = g_watch.inner.alloc(be, p, bytes);
    for (int i = 0; r == BESA_OK && i < 64; i++)
        if (!g_watch.block[i].p) {
            g_watch.block[i].p = *p, g_watch.block[i].bytes = bytes;
            if ((g_watch.live += bytes) > g_watch.peak) g_watch.peak = g_watch.live;
            break;
        }
    return r;
}
static void watched_free(besa_backend *be, void *p)
{
    for (int i = 0; p && i < 64; i++)
        if (g_watch.block[i].p == p) g_watch.live -= g_watch.block[i].bytes, g_watch.block[i].p = NULL;
    g_watch.inner.free(be, p);
}

/* The table whose operations are timed, all counts at zero. */
static besa_backend watch(const besa_backend *inner)
{
    besa_backend be = *inner;
    memset(&g_watch, 0, sizeof g_watch);
    g_watch.inner = *inner;
#define INSTALL(op) be.op = timed_##op;
    INSTALL(linear_forward) INSTALL(linear_backward_input) INSTALL(linear_backward_weight) INSTALL(gram)
    INSTALL(attention_forward) INSTALL(attention_backward) INSTALL(rmsnorm_forward) INSTALL(rmsnorm_backward) INSTALL(rope)
    INSTALL(swiglu_forward) INSTALL(swiglu_backward) INSTALL(column_sumsq) INSTALL(column_sum) INSTALL(block_loss)
    INSTALL(score) INSTALL(rank_rows) INSTALL(mask_apply) INSTALL(mask_update) INSTALL(bucket_gradient) INSTALL(rate_forward)
    INSTALL(rate_backward) INSTALL(optimizer_step)
#undef INSTALL
    be.alloc = watched_alloc, be.free = watched_free;
    return be;
}

/* GFLOP/s of the 20 products of one learning step of a block (no input gradient of q, k, v), the best of 3 */
static double step_products(products *p, const besa_block_shape *shape, int way)
{
    double best = 1e30, flop = 0;
    for (int round = 0; round < 3; round++) {
        double t = seconds();
        flop = 0;
        for (int layer = 0; layer < BESA_LAYERS; layer++) {
            int64_t rows, columns;
            besa_block_layer(shape, layer, &rows, &columns);
            p->R = (int)rows, p->C = (int)columns;
            for (int kind = 0; kind < 3; kind++) {
                if (kind == 1 && layer <= BESA_V) continue;
                run_product(p, kind, way);
                flop += 2.0 * p->T * p->R * p->C;
            }
        }
        t = seconds() - t;
        if (t < best) best = t;
    }
    return 1e-9 * flop / best;
}

/* A block of SmolLM2's shape, pruned by BESA's default preset on 4 sequences: each part's time and speed, with the same
   products by OpenBLAS before and after */
static void bench_block(int threads, int T)
{
    enum { SAMPLES = 4 };
    besa_block_shape shape;
    besa_prune_options o;
    besa_pruner *pruner;
    besa_block block;
    void *pruned[BESA_LAYERS];
    besa_backend inner = cpu_backend(threads, 0), be = watch(&inner);
    int64_t d = 576, n = (int64_t)SAMPLES * T * d;
    float *x = noise(n), *ones = take_floats(d), *cosine = take_floats(T * 32), *sine = take_floats(T * 32);
    besa_workload load;
    products p;
    double blas = 0, ours, t, all = 0, flop = 0;
    memset(&o, 0, sizeof o);
    memset(&shape, 0, sizeof shape);
    memset(&block, 0, sizeof block);
    memset(&p, 0, sizeof p);
    o.rates.target = 0.5;
    shape.hidden_size = d, shape.intermediate_size = 1536, shape.head_dim = 64, shape.rms_norm_eps = 1e-5f;
    shape.num_attention_heads = 9, shape.num_key_value_heads = 3, shape.rope.theta = 1e4;
    load = besa_block_workload(&shape, 1, T);
    block.shape = shape, block.dtype = BESA_F32, block.norm1 = block.norm2 = ones;
    block.rope_cos = cosine, block.rope_sin = sine;
    besa_rope_table(&shape, T, cosine, sine);
    for (int64_t i = 0; i < d; i++) ones[i] = 1;
    for (int layer = 0; layer < BESA_LAYERS; layer++) {
        int64_t rows, columns;
        besa_block_layer(&shape, layer, &rows, &columns);
        float *w = noise(rows * columns);
        for (int64_t i = 0; i < rows * columns; i++) w[i] /= 24;
        block.weight[layer] = w, pruned[layer] = take_floats(rows * columns);
    }
    p.sgemm = g_sgemm, p.T = T, p.be[0] = inner, p.w = (float *)(uintptr_t)block.weight[BESA_GATE];
    p.x = noise(1536 * T), p.y = take_floats(1536 * T), p.dy = noise(1536 * T), p.dx = take_floats(1536 * T);
    p.dw = take_floats(1536 * 576);
    set_workspace(&p.be[0], &load);
    if (g_set_threads) g_set_threads(threads);
    if (p.sgemm) blas = step_products(&p, &shape, OPENBLAS);
    ours = step_products(&p, &shape, FLOATS);
    if (besa_pruner_create(&pruner, &be, &shape, BESA_F32, 0, &o, SAMPLES, T, &g_error) != BESA_OK) fail(g_error.message);
    t = seconds();
    if (besa_pruner_run(pruner, &block, NULL, x, NULL, pruned, NULL, &g_error) != BESA_OK) fail(g_error.message);
    t = seconds() - t;
    if (p.sgemm) blas = fmax(blas, step_products(&p, &shape, OPENBLAS));
    printf("a block of SmolLM2, %d x %d tokens, %d threads: %.3f s; its products alone: OpenBLAS %.1f, ours %.1f GFLOP/s\n",
           SAMPLES, T, threads, t, blas, ours);
    for (int i = 0; i < PARTS; i++) {
        all += g_watch.time[i], flop += g_watch.flop[i];
        printf("  %-28s %5.1f %% of the time", g_part[i], 100 * g_watch.time[i] / t);
        if (g_watch.flop[i] > 0)
            printf("   %7.1f GFLOP/s (%4.2f of OpenBLAS)", 1e-9 * g_watch.flop[i] / g_watch.time[i],
                   blas > 0 ? 1e-9 * g_watch.flop[i] / g_watch.time[i] / blas : 0);
        printf("\n");
    }
    printf("  %-28s %5.1f %%\n  %-28s %5.1f %%               %7.1f GFLOP/s (%4.2f of OpenBLAS), %.0f tokens/s\n", "the rest",
           100 * (1 - all / t), "all", 100.0, 1e-9 * flop / t, blas > 0 ? 1e-9 * flop / t / blas : 0, SAMPLES * T / t);
    besa_pruner_destroy(pruner);
    inner.destroy(&inner);
}

static void bench_run(const besa_checkpoint *checkpoint, const int32_t *ids, int64_t nsamples, int64_t seqlen,
                      besa_method method, int bf16)
{
    static const char *const name[] = { "besa", "wanda", "sparsegpt", "magnitude" };
    besa_calibration c;
    besa_prune_options o;
    besa_plan_result plan;
    besa_report report;
    besa_backend inner = cpu_backend(0, bf16), be = watch(&inner);
    double t, part[BESA_PASS_COUNT] = { 0 };
    struct rusage usage;
    memset(&c, 0, sizeof c);
    memset(&o, 0, sizeof o);
    memset(&report, 0, sizeof report);
    c.ids = ids, c.nsamples = nsamples, c.seqlen = seqlen;
    o.rates.target = 0.5;
    o.method = method;
    if (besa_plan(checkpoint, &be, &c, &o, &plan, &g_error) != BESA_OK) fail(g_error.message);
    t = seconds();
    if (besa_prune(checkpoint, NULL, &be, &c, &o, &report, &g_error) != BESA_OK) fail(g_error.message);
    t = seconds() - t;
    for (int64_t b = 0; b < report.num_blocks; b++)
        for (int p = 0; p < BESA_PASS_COUNT; p++) part[p] += report.block[b].seconds[p];
    printf("%s%s, %d x %d tokens: %.2f s;", name[method], bf16 ? " with bf16 products" : "", (int)nsamples, (int)seqlen, t);
    for (int p = 0; p < BESA_PASS_COUNT; p++) printf(" %s %.2f", besa_pass_name((besa_pass)p), part[p]);
    printf("\n  products %.2f s, attention %.2f s, the rest %.1f %% of the run; %.1f GFLOP/s over all\n", g_watch.time[PRODUCTS],
           g_watch.time[ATTENTION], 100 * (1 - (g_watch.time[PRODUCTS] + g_watch.time[ATTENTION]) / t), plan.flop * 1e-9 / t);
    getrusage(RUSAGE_SELF, &usage);
    printf("  arena %zu bytes, plan %zu; micro-batch %d; peak resident so far %.1f MB\n", g_watch.peak, plan.device_bytes,
           (int)plan.micro_batch, (double)usage.ru_maxrss / 1e3);
    besa_report_free(&report);
    inner.destroy(&inner);
}

int main(int argc, char **argv)
{
    besa_checkpoint *checkpoint = NULL;
    besa_tokens tokens;
    int32_t *ids;
    int64_t nsamples = argc > 4 ? atoll(argv[3]) : 64, seqlen = argc > 4 ? atoll(argv[4]) : 512;
    if (argc < 3) return fprintf(stderr, "usage: %s CHECKPOINT TOKENS [NSAMPLES SEQLEN]\n", argv[0]), 2;
    if (besa_checkpoint_open(&checkpoint, argv[1], &g_error) != BESA_OK ||
        besa_tokens_load(&tokens, argv[2], &g_error) != BESA_OK) fail(g_error.message);
    ids = (int32_t *)take((size_t)(nsamples * seqlen) * sizeof *ids);
    if (besa_tokens_sample(&tokens, nsamples, seqlen, 0, besa_checkpoint_config(checkpoint)->vocab_size, ids, &g_error) !=
        BESA_OK) fail(g_error.message);
    find_openblas();
    if (!getenv("BENCH_RUN_ONLY")) {
        bench_products();
        bench_attention();
        bench_passes(1);
        bench_passes(2);
        for (int i = 0; i < 4; i++) bench_block(1 + i % 2, i / 2 ? 2048 : 512);
    }
    for (int method = BESA_METHOD_BESA; method <= BESA_METHOD_MAGNITUDE; method++)
        bench_run(checkpoint, ids, nsamples, seqlen, (besa_method)method, 0);
    bench_run(checkpoint, ids, nsamples, seqlen, BESA_METHOD_BESA, 1);
    besa_tokens_free(&tokens);
    besa_checkpoint_close(checkpoint);
    return test_finish();
}
