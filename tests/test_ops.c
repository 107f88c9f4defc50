/* test_ops - the CPU backend under the cases of backend_ops.h, with any number of threads and as on processors that have
 * less than this one, and against stored reference arrays.
 *
 *     test_ops REFERENCE_DIRECTORY [part of a test's or a case's name]
 *     test_ops --cases test|grad|perf THREADS [part of a case's name]      the cases alone: their speed, say
 *
 * A case is a test of its own; a test that runs all of them again prints those that fail. */
static int simd_max = 2;                /* what besa__cpu_simd may say: the paths of lesser processors are tested too */
#define BESA_SIMD_MAX simd_max
#define BESA_API static inline          /* what is not called is not compiled */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "backend_ops.h"
#include "test.h"

static const char *g_reference;         /* the directory */
static besa_backend g_be;               /* of the running test */
static besa_error g_error;

/* Open g_be; its workspace is for matrices of that size, 0 leaves it to the cases. */
static int backend_begin(int threads, int bf16, int64_t rows, int64_t columns)
{
    besa_cpu_options options;
    memset(&options, 0, sizeof options);
    options.threads = threads, options.bf16 = bf16;
    if (!CHECK(besa_cpu_backend(&g_be, &options, &g_error) == BESA_OK, "besa_cpu_backend: %s", g_error.message)) return 0;
    if (rows) {
        besa_workload w = ops_sizes(rows, columns, 1);
        void *p;
        w.hessian_columns = columns;
        g_be.workspace_bytes = g_be.workspace_size(&g_be, &w);
        if (!CHECK(g_be.alloc(&g_be, &p, g_be.workspace_bytes) == BESA_OK, "no workspace: %s", g_be.error.message)) {
            g_be.destroy(&g_be);
            return 0;
        }
        g_be.workspace = p;
    }
    return 1;
}

static void backend_end(void)
{
    if (g_be.workspace) g_be.free(&g_be, g_be.workspace);
    g_be.destroy(&g_be);
}

#define CHECK_BE(call) CHECK((call) == BESA_OK, "%s: %s", #call, g_be.error.message)

/* ---- reference arrays ---------------------------------------------------------------------- */

static const char *folder(const char *name)
{
    char *path = (char *)take(512);
    snprintf(path, 512, "%s/%s", g_reference, name);
    return path;
}

static float *copy_of(array a)
{
    float *f = take_floats(a.count);
    memcpy(f, a.f, (size_t)a.count * sizeof *f);
    return f;
}

/* sqrt(sum (got - want)^2 / sum want^2) */
static double rms_error(const float *got, const double *want, int64_t n)
{
    double e = 0, s = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = (double)got[i] - want[i];
        e += d * d, s += want[i] * want[i];
    }
    return sqrt(e / (s > 0 ? s : 1));
}

#define CHECK_RMS(what, got, want, n, tolerance) check_rms(__LINE__, what, rms_error(got, want, n), tolerance)

static void check_rms(int line, const char *what, double error, double tolerance)
{
    if (getenv("TEST_VERBOSE")) printf("    %-28s error %.2e of %.0e\n", what, error, tolerance);
    test_check(error < tolerance, __FILE__, line, "%s: error %.3g, allowed %.3g", what, error, tolerance);
}

#define BETA(x) (sizeof(o.beta1) == 4 ? (float)(x) : (x)) /* the fields' own type */

/* theta is x - x0: in float the first steps of 1e-6 would drown in an x0 of size 1 */
static void test_prodigy(void)
{
    enum { N = 20, STEPS = 40 };
    const char *directory = folder("prodigy");
    array A = npy_load(directory, "A", N, N, 0), b = npy_load(directory, "b", N, 0, 0);
    array x0 = npy_load(directory, "x0", N, 0, 0), xs = npy_load(directory, "x", STEPS, N, 0);
    array ds = npy_load(directory, "d", STEPS, 0, 0);
    float *x = take_floats(N), *start = take_floats(N), *m = take_floats(N), *v = take_floats(N), *s = take_floats(N);
    float *g = take_floats(N);
    double scalars[BESA_OPTIMIZER_SCALARS] = {1e-6, 0}, limit_x = 2e-3, limit_d = 1e-4;
    besa_optimizer_step o;
    memset(&o, 0, sizeof o);
    o.kind = BESA_PRODIGY, o.lr = 1, o.d0 = 1e-6, o.d_coef = 5;
    o.beta1 = BETA(0.9), o.beta2 = BETA(0.999), o.beta3 = BETA(sqrt(0.999)), o.eps = BETA(1e-8);
    o.n = N, o.theta = x, o.theta0 = start, o.grad = g, o.m = m, o.v = v, o.s = s, o.scalars = scalars;
    if (sizeof o.beta2 == sizeof(double)) limit_x = 1e-4, limit_d = 1e-5; /* 1 - 0.999f is off by 1.3e-5: it is amplified */
    if (!backend_begin(0, 0, 1, 1)) return;
    for (o.step = 1; o.step <= STEPS; o.step++) {
        double *want = xs.v + (o.step - 1) * N;
        for (int64_t i = 0; i < N; i++) {
            double sum = -b.v[i];
            for (int64_t j = 0; j < N; j++) sum += A.v[i * N + j] * (x0.v[j] + (double)x[j]);
            g[i] = (float)sum;
        }
        CHECK_BE(g_be.optimizer_step(&g_be, &o));
        for (int64_t i = 0; i < N; i++) want[i] -= x0.v[i];
        CHECK_RMS("x", x, want, N, limit_x);
        check_rms(__LINE__, "d", fabs(scalars[0] / ds.v[o.step - 1] - 1), limit_d);
    }
    backend_end();
}

/* The published sparse layer. */
enum { SPARSE_R = 12, SPARSE_C = 203, SPARSE_D = 100, SPARSE_T = 30, SPARSE_RC = SPARSE_R * SPARSE_C };

/* dW (R, C) = dy^T x of the stored x (T, C) and dy (T, R) */
static float *sparse_weight_gradient(const char *directory)
{
    array x = npy_load(directory, "x", SPARSE_T, SPARSE_C, 0), dy = npy_load(directory, "dy", SPARSE_T, SPARSE_R, 0);
    float *dw = take_floats(SPARSE_RC);
    for (int r = 0; r < SPARSE_R; r++)
        for (int j = 0; j < SPARSE_C; j++) {
            double sum = 0;
            for (int t = 0; t < SPARSE_T; t++) sum += dy.v[t * SPARSE_R + r] * x.v[t * SPARSE_C + j];
            dw[r * SPARSE_C + j] = (float)sum;
        }
    return dw;
}

/* The last candidate d < D whose (D - d) C / D ranks hold rank j, as the published code cuts them. */
static uint16_t *sparse_buckets(void)
{
    uint16_t *bucket = (uint16_t *)take(SPARSE_C * sizeof *bucket);
    for (int j = 0; j < SPARSE_C; j++)
        for (int d = 0; d < SPARSE_D; d++)
            if (j < ((SPARSE_D - d) * SPARSE_C) / SPARSE_D) bucket[j] = (uint16_t)d;
    return bucket;
}

/* groups: of rates, one per row or 1 for the layer-wise form */
static void check_sparse_layer(const char *name, int plain, int groups)
{
    const char *directory = folder(name);
    int64_t n0 = groups > 1 ? groups : SPARSE_D + 1, n1 = groups > 1 ? SPARSE_D + 1 : 0;
    array w = npy_load(directory, "weight", SPARSE_R, SPARSE_C, 0), norm = npy_load(directory, "colnorm", SPARSE_C, 0, 0);
    array theta = npy_load(directory, "theta", n0, n1, 0), grad = npy_load(directory, "grad_theta", n0, n1, 0);
    array alpha = npy_load(directory, "alpha", groups, 0, 0), mask = npy_load(directory, "mask", SPARSE_R, SPARSE_C, 0);
    float *score = take_floats(SPARSE_RC), *sums = take_floats(SPARSE_R * SPARSE_D), *got = take_floats(theta.count);
    float *rate = take_floats(SPARSE_R), *dw = sparse_weight_gradient(directory);
    float *layer = groups > 1 ? NULL : theta.f, *row = groups > 1 ? theta.f : NULL;
    uint16_t *rank = (uint16_t *)take(SPARSE_RC * sizeof *rank), *bucket = sparse_buckets();
    int32_t n[SPARSE_R];
    int64_t wrong = 0;
    besa_rate_shape s;
    memset(&s, 0, sizeof s);
    s.rows = SPARSE_R, s.units = SPARSE_C, s.logits = SPARSE_D + 1, s.plain = plain;
    s.group_rows = groups > 1 ? 1 : SPARSE_R;
    s.layer_scale = groups > 1 ? 0.0f : 1.0f, s.row_scale = groups > 1 ? 1.0f : 0.0f;
    if (!backend_begin(0, 0, SPARSE_R, SPARSE_C)) return;
    CHECK_BE(g_be.score(&g_be, score, w.f, BESA_F32, norm.f, 1, SPARSE_R, SPARSE_C));
    CHECK_BE(g_be.rank_rows(&g_be, rank, score, SPARSE_R, SPARSE_C));
    CHECK_BE(g_be.rate_forward(&g_be, rate, n, layer, row, NULL, &s));
    for (int i = 0; i < groups; i++)
        CHECK(fabs((double)rate[i] / alpha.v[i] - 1) < 2.5e-7, "rate %d is %.9g, expected %.9g", i, (double)rate[i],
              alpha.v[i]);
    for (int i = 0; i < SPARSE_RC; i++) wrong += (rank[i] >= n[i / SPARSE_C]) != (mask.v[i] != 0);
    CHECK(wrong == 0, "%d bits of the mask are wrong", (int)wrong);
    CHECK_BE(g_be.bucket_gradient(&g_be, sums, dw, BESA_F32, w.f, BESA_F32, rank, bucket, SPARSE_R, SPARSE_C, SPARSE_D));
    CHECK_BE(g_be.rate_backward(&g_be, layer ? got : NULL, row ? got : NULL, sums, layer, row, NULL, &s));
    CHECK_RMS("grad_theta", got, grad.v, grad.count, 1e-5);
    backend_end();
}

static void test_sparse_row_sigmoid(void) { check_sparse_layer("sparse_row_sigmoid", 0, SPARSE_R); }
static void test_sparse_row_softmax(void) { check_sparse_layer("sparse_row_softmax", 1, SPARSE_R); }
static void test_sparse_layer_sigmoid(void) { check_sparse_layer("sparse_layer_sigmoid", 0, 1); }

static void test_sparsegpt(void)
{
    static const struct {
        const char *name;
        int64_t n, m;                           /* n zeros in each group of m, 0: half of the slab */
    } t[] = {
        { "pruned_50", 0, 0 },
        { "pruned_2of4", 2, 4 },
        { "pruned_4of8", 4, 8 } };
    enum { R = 24, C = 256, SLAB = 128 };
    const char *directory = folder("sparsegpt");
    array h = npy_load(directory, "hessian", C, C, 0), u = npy_load(directory, "chol_upper_of_inverse", C, C, 0);
    array w = npy_load(directory, "weight", R, C, 0);
    float *factor = copy_of(h), *errors = take_floats(R * SLAB);
    int32_t dead[C];
    if (!backend_begin(0, 0, R, C)) return;
    CHECK_BE(g_be.hessian_factor(&g_be, factor, dead, 0.01f, C));
    CHECK_RMS("the factor", factor, u.v, C * C, 2e-5);
    for (int k = 0; k < 3; k++) {
        array want = npy_load(directory, t[k].name, R, C, 0);
        float *got = copy_of(w);
        int wrong = 0;
        for (int64_t first = 0; first < C; first += SLAB) {
            CHECK_BE(g_be.sparsegpt_slab(&g_be, got, errors, factor, dead, first, SLAB, 0.5, t[k].n, t[k].m, NULL, R, C));
            CHECK_BE(g_be.sparsegpt_push(&g_be, got, errors, factor, first, SLAB, R, C));
        }
        for (int i = 0; i < R * C; i++) wrong += (got[i] == 0.0f) != (want.v[i] == 0.0);
        CHECK(wrong == 0, "%s: %d zeros are wrong", t[k].name, wrong);
        CHECK_RMS(t[k].name, got, want.v, R * C, 2e-5);
    }
    backend_end();
}

/* w^2 / U_jj (published code) and w^2 / U_jj^2: the Hessian is given, column 7 dead */
static void check_sparsegpt_score(const char *name, float exponent)
{
    enum { R = 8, C = 40 };
    const char *directory = folder(name);
    array h = npy_load(directory, "hessian", C, C, 0), w = npy_load(directory, "weight", R, C, 0);
    array want = npy_load(directory, "score", R, C, 0);
    float *factor = copy_of(h), *score = take_floats(R * C), *scale = take_floats(C);
    int32_t dead[C];
    if (!backend_begin(0, 0, R, C)) return;
    CHECK_BE(g_be.hessian_factor(&g_be, factor, dead, 0.01f, C));
    CHECK_BE(g_be.diagonal(&g_be, scale, factor, dead, C));
    CHECK_BE(g_be.power(&g_be, scale, scale, exponent, C));
    CHECK_BE(g_be.score(&g_be, score, w.f, BESA_F32, scale, 2, R, C));
    CHECK_RMS("scores", score, want.v, R * C, 2e-5);
    for (int j = 0; j < C; j++) CHECK(dead[j] == (j == 7), "column %d: dead is %d", j, (int)dead[j]);
    backend_end();
}

static void test_sparsegpt_score(void) { check_sparsegpt_score("score_sparsegpt", -1.0f); }
static void test_sparsegpt_score_git(void) { check_sparsegpt_score("score_sparsegpt_git", -2.0f); }

/* ---- exp ----------------------------------------------------------------------------------- */

static void test_exp(void)
{
    double worst = 0;
    for (int64_t i = 0; i < 4000000; i++) {
        float x = -87.3f + (float)i * (176.0f / 4000000.0f), y;
        double want = exp((double)x), ulp;
        besa__cpu_exp_sum(&y, &x, 0.0f, 1);
        ulp = fabs((double)y - want) / (ldexp(1.0, ilogb(want) - 23));
        if (!(ulp <= worst)) worst = ulp;
    }
    CHECK(worst < 2, "%.2f units in the last place", worst);
}

static void test_exp_special(void)
{
    static const struct {
        float x;
        double least, most;
    } t[] = {
        { INFINITY, INFINITY, INFINITY },
        { -INFINITY, 0, 0 },
        { 0, 1, 1 },
        { 88.72f, 3.0000001e38, 3.4028234663852886e38 },
        { -103.9f, 1e-46, 1e-38 } };
    float x[6], e[6];
    for (int i = 0; i < 5; i++) x[i] = t[i].x;
    x[5] = NAN;
    besa__cpu_exp_sum(e, x, 0.0f, 6);
    for (int i = 0; i < 5; i++)
        CHECK((double)e[i] >= t[i].least && (double)e[i] <= t[i].most, "exp(%g) is %g", (double)x[i], (double)e[i]);
    CHECK(isnan(e[5]), "exp(NaN) is %g", (double)e[5]);
}

/* What attention takes of scores that are at most their maximum; subnormal results may be 0. */
static void test_exp_scores(void)
{
    enum { N = 100003, MORE = 4 };
    float *x = take_floats(N), *y = take_floats(N), *sum = take_floats(N), *most = take_floats(N);
    double worst = 0;
    for (int64_t i = 0; i < N; i++) x[i] = y[i] = -(float)i * (87.3f / N), sum[i] = 2, most[i] = 0;
    besa__cpu_lanes_exp(sum, y, most, N);
    for (int64_t i = 0; i < N; i++) {
        double want = exp((double)x[i]), ulp = fabs((double)y[i] - want) / ldexp(1.0, ilogb(want) - 23);
        if (!(ulp <= worst)) worst = ulp;
        if (!(fabs((double)sum[i] - 2 - want) < 3e-7)) worst = 1e9;
    }
    CHECK(worst < 2, "%.2f units in the last place", worst);
    x[0] = -INFINITY, x[1] = -1e30f, x[2] = NAN, x[3] = INFINITY, most[3] = INFINITY;
    besa__cpu_lanes_exp(sum, x, most, MORE);
    CHECK(x[0] == 0 && x[1] == 0, "exp(-inf) is %g, exp(-1e30) %g", (double)x[0], (double)x[1]);
    CHECK(isnan(x[2]) && isnan(x[3]), "exp(NaN) is %g, exp(inf - inf) %g", (double)x[2], (double)x[3]);
}

/* ---- attention ----------------------------------------------------------------------------- */

enum { ATTENTION_T = 150, ATTENTION_H = 4, ATTENTION_K = 2, ATTENTION_D = 24, ATTENTION_N = ATTENTION_T * ATTENTION_H * ATTENTION_D };

typedef struct attention_arrays { float *q, *k, *v, *d_o, *o, *dq, *dk, *dv; } attention_arrays;

static attention_arrays attention_take(void)
{
    attention_arrays a;
    float **in[4] = { &a.q, &a.k, &a.v, &a.d_o }, **out[4] = { &a.o, &a.dq, &a.dk, &a.dv };
    uint32_t u = 1;
    for (int i = 0; i < 4; i++) {
        *in[i] = take_floats(ATTENTION_N), *out[i] = take_floats(ATTENTION_N);
        for (int j = 0; j < ATTENTION_N; j++) (*in[i])[j] = (float)((u = u * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1;
    }
    return a;
}

/* Both passes over `batch` sequences, with no more workspace than attention asks for sequences of `seqlen` and spare bytes. */
static void attention_run(const attention_arrays *a, int64_t batch, int64_t tokens, int64_t seqlen, int threads, size_t spare)
{
    besa_attention_shape s = { batch, ATTENTION_T / batch, ATTENTION_H, ATTENTION_K, ATTENTION_D, 0, 0, 0 };
    besa_workload w = ops_sizes(1, 1, tokens);
    void *p = NULL;
    if (!backend_begin(threads, 0, 0, 0)) return;
    w.seqlen = seqlen, w.num_attention_heads = ATTENTION_H, w.num_key_value_heads = ATTENTION_K, w.head_dim = ATTENTION_D;
    g_be.workspace_bytes = (size_t)besa__cpu_attention_bytes(&w, threads) + spare;
    if (CHECK_BE(g_be.alloc(&g_be, &p, g_be.workspace_bytes))) {
        g_be.workspace = p;
        CHECK_BE(g_be.attention_forward(&g_be, a->o, a->q, a->k, a->v, &s));
        CHECK_BE(g_be.attention_backward(&g_be, a->dq, a->dk, a->dv, a->d_o, a->q, a->k, a->v, &s));
    }
    backend_end();
}

/* The workspace is sized by the largest sequence and the most tokens; what of it is free decides only how many key/value
 * heads are worked on at a time. */
static void test_attention_workspace(void)
{
    static const struct { int64_t batch, tokens, seqlen; int threads; size_t spare; } t[] = {
        { 1, ATTENTION_T, ATTENTION_T, 5, 0 }, { 1, 1000, 300, 2, 0 }, { 1, ATTENTION_T, ATTENTION_T, 2, 1 << 22 },
        { 3, ATTENTION_T, ATTENTION_T, 1, 0 }, { 3, ATTENTION_T, ATTENTION_T, 7, 0 }, { 3, 1000, 1000, 16, 0 },
        { 50, ATTENTION_T, ATTENTION_T, 1, 0 }, { 50, ATTENTION_T, ATTENTION_T, 33, 0 } };
    attention_arrays a = attention_take(), b = attention_take();
    int64_t before = 0;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        size_t bytes = ATTENTION_N * sizeof(float), kv = bytes / (ATTENTION_H / ATTENTION_K);
        if (t[i].batch != before) attention_run(&a, t[i].batch, ATTENTION_T, ATTENTION_T / t[i].batch, 1, 0);
        before = t[i].batch;
        attention_run(&b, t[i].batch, t[i].tokens, t[i].seqlen, t[i].threads, t[i].spare);
        CHECK(!memcmp(a.o, b.o, bytes) && !memcmp(a.dq, b.dq, bytes), "case %d: other O or dQ", (int)i);
        CHECK(!memcmp(a.dk, b.dk, kv) && !memcmp(a.dv, b.dv, kv), "case %d: other dK or dV", (int)i);
    }
}

static int64_t count_bad(const float *x, int64_t n)
{
    int64_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad += !isfinite(x[i]);
    return bad;
}

/* What is not finite stays so: a row of which a score is not, and all rows that see a value that is not. */
static void test_attention_not_finite(void)
{
    enum { ROW = ATTENTION_H * ATTENTION_D, KV_ROW = ATTENTION_K * ATTENTION_D, AT = 70 };
    static const float put[3] = { INFINITY, NAN, 3e38f };
    for (int which = 0; which < 3; which++)
        for (int i = 0; i < 3; i++) {
            attention_arrays a = attention_take();
            float *in = which == 0 ? a.q + AT * ROW : which == 1 ? a.k + AT * KV_ROW : a.v + AT * KV_ROW;
            int64_t bad, last;
            if (which == 2 && i == 2) continue; /* is a value like any other */
            in[0] = in[1] = put[i];
            if (which == 0 && i == 2) a.k[0] = a.k[1] = 3e38f; /* the score overflows */
            if (which == 1 && i == 2) for (int t = AT; t < ATTENTION_T; t++) a.q[t * ROW] = a.q[t * ROW + 1] = 3e38f;
            attention_run(&a, 1, ATTENTION_T, ATTENTION_T, 2, 0);
            bad = count_bad(a.o + AT * ROW, ATTENTION_D), last = count_bad(a.o + (ATTENTION_T - 1) * ROW, ATTENTION_D);
            CHECK(which == 2 ? bad >= 1 : bad == ATTENTION_D, "tensor %d, %g: %d of its row are not finite", which,
                  (double)put[i], (int)bad);
            CHECK(which == 0 || last > 0, "tensor %d, %g: the last row is finite", which, (double)put[i]);
            CHECK(count_bad(a.dq, ATTENTION_N) > 0, "tensor %d, %g: dQ is finite", which, (double)put[i]);
            CHECK(which == 1 || count_bad(a.dk, ATTENTION_N / 2) > 0, "tensor %d, %g: dK is finite", which, (double)put[i]);
            CHECK(which == 2 || count_bad(a.dv, ATTENTION_N / 2) > 0, "tensor %d, %g: dV is finite", which, (double)put[i]);
        }
}

/* ---- the cases ----------------------------------------------------------------------------- */

/* Run the cases of a mode; how many failed. quiet: only those are printed. hashes (OPS_CASES) may be NULL. */
static int run_cases(int threads, int bf16, const char *mode, const char *only, int quiet, uint64_t *hashes)
{
    ops t;
    double bandwidth = 0;
    int counts[3] = {0, 0, 0};
    if (!backend_begin(threads, bf16, 0, 0)) return 1;
    memset(&t, 0, sizeof t);
    t.be = &g_be, t.mode = mode, t.quiet = t.brief = quiet, t.product_tolerance = bf16 ? 1e-2 : 0;
    if (ops_is(&t, "perf")) {
        bandwidth = ops_copy_bandwidth(&g_be, besa__cpu_of(&g_be)->threads);
        printf("%d threads, copy bandwidth %.1f GB/s, reads and writes\n", besa__cpu_of(&g_be)->threads, bandwidth);
    }
    ops_run(&t, only, bandwidth, hashes, counts);
    g_be.workspace = NULL;                      /* was the last case's */
    backend_end();
    return counts[1];
}

/* However many threads there are. */
static void check_same_bytes(int bf16)
{
    static const int teams[4] = {1, 2, 3, 8};
    static uint64_t hashes[4][OPS_CASES];
    for (int k = 0; k < 4; k += TEST_SANITIZED ? 2 : 1) {
        int failed = run_cases(teams[k], bf16, "test", NULL, 1, hashes[k]);
        CHECK(failed == 0, "%d cases failed with %d threads", failed, teams[k]);
        for (int i = 0; i < OPS_CASES; i++)
            CHECK(hashes[k][i] == hashes[0][i], "%s: %d threads give other bytes than one", ops_cases[i].name, teams[k]);
    }
}

/* ---- packing ------------------------------------------------------------------------------- */

static float element(const besa__gemm_operand *x, int64_t at)
{
    const uint16_t *half = (const uint16_t *)x->data;
    float f = x->dtype == BESA_F32 ? ((const float *)x->data)[at] : x->dtype == BESA_BF16 ? besa__bf16_to_f32(half[at])
                                                                                        : besa__f16_to_f32(half[at]);
    return x->round ? besa__bf16_to_f32(besa__f32_to_bf16(f)) : f;
}

/* Panels of `width` from an operand that ends where its memory ends; dst has room for nothing more. */
static void check_pack(const besa__gemm_kernel *kernel, besa__gemm_operand x, int64_t width, int64_t count, int64_t k)
{
    int64_t n = (count - 1) * x.outer_step + (k - 1) * x.k_step + 1, wrong = 0;
    int64_t units = besa__parts(k, kernel->unit), panels = besa__parts(count, width);
    size_t bytes = (size_t)n * (x.dtype == BESA_F32 ? 4 : 2);
    unsigned char *data = (unsigned char *)malloc(bytes);
    float *dst = (float *)malloc((size_t)(panels * units * width) * sizeof *dst);
    uint32_t u = 7;
    for (size_t i = 0; i < bytes; i++) data[i] = (unsigned char)((u = u * 1664525u + 1013904223u) >> 24);
    x.data = data;
    kernel->pack(dst, width, &x, 0, count, k);
    for (int64_t i = 0; i < panels * width; i++)
        for (int64_t p = 0; p < units * kernel->unit; p++) {
            float want = i < count && p < k ? element(&x, i * x.outer_step + p * x.k_step) : 0.0f, got;
            int64_t at = (i / width * units + p / kernel->unit) * width + i % width;
            if (kernel->unit == 1) got = dst[at];
            else got = besa__bf16_to_f32(((const uint16_t *)dst)[at * 2 + p % 2]);
            wrong += isnan(want) ? !isnan(got) : besa__float_bits(want) != besa__float_bits(got);
        }
    CHECK(wrong == 0, "%d of %d x %d elements are wrong: dtype %d, steps %d and %d, width %d", (int)wrong, (int)count, (int)k,
          (int)x.dtype, (int)x.outer_step, (int)x.k_step, (int)width);
    free(data), free(dst);
}

static void check_packs(int bf16)
{
    static const int lengths[] = {1, 3, 8, 9, 31, 64, 67, 130};
    static const besa_dtype dtypes[] = {BESA_F32, BESA_BF16, BESA_F16};
    besa__gemm_kernel kernel = besa__gemm_choose(bf16);
    const int64_t width[4] = {kernel.mr, kernel.nr, BESA__GEMM_TOKENS, BESA__GEMM_SPAN};
    int widths = kernel.compress ? 4 : 2;
    for (int d = 0; d < 3; d++)
        for (int form = 0; form < 3; form++)
            for (int l = 0; l < 8; l++)
                for (int c = 0; c < 6 * widths; c++) {
                    int64_t w = width[c % widths], k = lengths[l], edge = c / widths, count = edge < 3 ? edge + w - 1 : 0;
                    besa__gemm_operand x = {NULL, dtypes[d], 1, 1, bf16};
                    if (edge == 3) count = 1;
                    if (edge == 4) count = 3 * w;
                    if (edge == 5) count = 3 * w - 5 > 0 ? 3 * w - 5 : 2;
                    if (form == 0) x.k_step = count + 3; /* rows */
                    if (form == 1) x.outer_step = k + 5; /* columns */
                    if (form == 2) x.outer_step = 2 * k + 3, x.k_step = 2;
                    if (count > 0) check_pack(&kernel, x, w, count, k);
                }
}

/* ---- products of several blocks ------------------------------------------------------------ */

/* The product by slices of `rows` rows of A. */
static void multiply(const besa__gemm_args *whole, int64_t rows, int threads, int bf16)
{
    void *scratch = take(besa__gemm_scratch(threads) + 64);
    for (int64_t i = 0; i < whole->m; i += rows) {
        besa__gemm_args g = *whole;
        g.m = besa__min(rows, g.m - i), g.a = (const float *)g.a + i * g.a_row, g.c += i * g.c_row;
        besa__gemm(&g, threads, bf16, (void *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63));
    }
}

/* C = 0.5 A B + C + bias by 1, 2 and 8 threads, the same bytes: some elements against fp64. lower: above the diagonal C is
   free to hold anything */
static void check_product(int64_t m, int64_t n, int64_t k, int lower)
{
    static const int teams[] = {1, 2, 8};
    float *a = take_floats(m * k + 1), *b = take_floats(n * k + 1), *bias = take_floats(n), *start = take_floats(m * n);
    float *first = take_floats(m * n), *c = take_floats(m * n);
    uint32_t u = 3;
    for (int64_t i = 0; i < m * k; i++) a[i] = (float)((u = u * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1;
    for (int64_t i = 0; i < n * k; i++) b[i] = (float)((u = u * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1;
    for (int64_t i = 0; i < m * n; i++) start[i] = (float)(i % 17);
    for (int64_t j = 0; j < n; j++) bias[j] = (float)(j % 5);
    for (int team = 0; team < 3; team++) {
        besa__gemm_args g = {m, n, k, a, k, 1, BESA_F32, b, 1, k, BESA_F32, c, n, 0.5f, 1, bias, lower};
        memcpy(c, start, (size_t)(m * n) * sizeof *c);
        multiply(&g, m, teams[team], 0);
        if (team == 0) memcpy(first, c, (size_t)(m * n) * sizeof *c);
        CHECK(!memcmp(first, c, (size_t)(m * n) * sizeof *c), "%d threads give other bytes than one", teams[team]);
    }
    for (int64_t at = 0; at < m * n; at += 13) {
        double sum = 0;
        int64_t i = at / n, j = at % n;
        if (lower && j > i) continue;
        for (int64_t p = 0; p < k; p++) sum += (double)a[i * k + p] * (double)b[j * k + p];
        sum = 0.5 * sum + (double)start[at] + (double)bias[j];
        if (!CHECK(fabs((double)c[at] - sum) < 1e-4, "C(%d, %d) is %g, expected %g", (int)i, (int)j, (double)c[at], sum)) break;
    }
}

/* Zeros of w, (n,k) or if turned (k,n), that are left out change no byte: the oracle is the product of a few rows at a
   time, where they never are. */
static void check_zeros(int64_t m, int64_t n, int64_t k, double share, besa_dtype dtype, int turned, int add, int bf16)
{
    static const int teams[] = {1, 2, 8};
    int64_t step = n + 3;                       /* what lies between the rows of y stays */
    float *x = take_floats(m * k), *bias = take_floats(n), *start = take_floats(m * step);
    float *want = take_floats(m * step), *got = take_floats(m * step);
    uint16_t *w = (uint16_t *)take((size_t)(n * k) * sizeof(float));
    besa__gemm_args g = {m, n, k, x, k, 1, BESA_F32, w, turned ? n : 1, turned ? 1 : k, dtype, want, step, 1, add,
                         add ? bias : NULL, 0};
    besa__gemm_operand b = {w, dtype, g.b_col, g.b_row, 0};
    uint32_t u = 3;
    for (int64_t i = 0; i < m * k; i++) x[i] = (float)((u = u * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1;
    for (int64_t i = 0; i < m * step; i++) start[i] = (float)(i % 17);
    for (int64_t j = 0; j < n; j++) bias[j] = (float)(j % 5);
    for (int64_t i = 0; i < n * k; i++) {
        float f = (float)((u = u * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1;
        if ((u = u * 1664525u + 1013904223u) / 4294967296.0 < share) f = i % 3 ? 0.0f : -0.0f;
        if (dtype == BESA_F32) memcpy(w + 2 * i, &f, sizeof f);
        else w[i] = dtype == BESA_BF16 ? besa__f32_to_bf16(f) : besa__f32_to_f16(f);
    }
    CHECK(besa__gemm_pays(&b, m, n, k) && !besa__gemm_pays(&b, 8, n, k), "it pays for %d rows, for 8 not", (int)m);
    memcpy(want, start, (size_t)(m * step) * sizeof *want);
    multiply(&g, 8, 1, bf16);
    for (int team = 0; team < 3; team++) {
        memcpy(g.c = got, start, (size_t)(m * step) * sizeof *got);
        multiply(&g, m, teams[team], bf16);
        CHECK(!memcmp(want, got, (size_t)(m * step) * sizeof *got), "%d x %d x %d by %d threads: other bytes", (int)m, (int)n,
              (int)k, teams[team]);
    }
}

/* Where they are left out, what is not finite reaches the outputs of weights that are not 0 alone; and a triangle is no matrix
   of few weights. */
static void check_not_finite(void)
{
    enum { M = 128, N = 1024, K = 1024 };
    float *x = take_floats(M * K), *w = take_floats(N * K), *y = take_floats(M * N);
    besa__gemm_args g = {M, N, K, x, K, 1, BESA_F32, w, 1, K, BESA_F32, y, N, 1, 0, NULL, 0};
    besa__gemm_operand b = {w, BESA_F32, K, 1, 0};
    for (int i = 0; i < M * K; i++) x[i] = i % K ? 1.0f : INFINITY;
    for (int i = 0; i < N * K; i++) w[i] = i % K > 1 && i % K < 3 + i / K % 9 ? 1.0f : 0.0f;
    CHECK(besa__gemm_pays(&b, M, N, K), "it does not pay");
    multiply(&g, M, 1, 0);
    for (int i = 0; i < M * N; i++)
        if (!CHECK(y[i] == (float)(1 + i % N % 9), "row %d is %g", i % N, (double)y[i])) break;
    for (int i = 0; i < N * K; i++) w[i] = i % K <= i / K ? 1.0f : 0.0f;
    CHECK(!besa__gemm_pays(&b, M, N, K), "it pays for a triangle");
}

static void check_all_zeros(int bf16)
{
    if (besa__gemm_choose(bf16).compress) check_not_finite();
    check_zeros(512, 250, 330, 0.5, BESA_F32, 0, 0, bf16);       /* two blocks of k, and an odd rest */
    check_zeros(512, 250, 330, 0.5, BESA_F32, 1, 1, bf16);
    check_zeros(195, 121, 1000, 0.7, BESA_BF16, 0, 1, bf16);
    check_zeros(195, 121, 97, 0.7, BESA_BF16, 1, 0, bf16);
    check_zeros(2000, 9, 95, 0.9, BESA_F16, 0, 1, bf16);         /* two blocks of tokens; fewer rows than threads take */
    check_zeros(259, 37, 3, 0.6, BESA_F16, 1, 1, bf16);
    check_zeros(130, 300, 64, 1.1, BESA_F32, 0, 1, bf16);        /* nothing is left */
}

static void check_products(void)
{
    check_product(70, 2100, 700, 0);            /* several blocks of columns and of k */
    check_product(500, 40, 330, 0);             /* several strips */
    check_product(13, 1100, 400, 0);             /* fewer rows than threads have strips: groups of columns */
    check_product(600, 600, 70, 1);
    check_product(33, 35, 0, 0);
}

/* ---- lesser processors --------------------------------------------------------------------- */

/* As on a processor of that level. */
static void check_level(int level)
{
    int failed;
    simd_max = level;
    failed = run_cases(1, 0, "test", NULL, 1, NULL);
    CHECK(failed == 0, "%d cases failed", failed);
    simd_max = 2;
}

/* Each level has a tile of its own, the last is plain C. */
static void check_tiles(int most)
{
    besa__gemm_tile_fn *above = besa__gemm_choose(0).tile;
    for (simd_max = most - 1; simd_max >= 0; simd_max--) {
        besa__gemm_tile_fn *tile = besa__gemm_choose(0).tile;
        CHECK(besa__cpu_simd() == simd_max, "level %d is level %d", simd_max, besa__cpu_simd());
        CHECK(tile != above, "level %d has the tile of the one above it", simd_max);
        above = tile;
    }
    CHECK(above == besa__gemm_tile_c, "the last is not plain C");
    simd_max = 2;
}

/* ---- main ---------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    int failed, most = besa__cpu_simd();
    if (argc > 3 && !strcmp(argv[1], "--cases"))
        return run_cases(atoi(argv[3]), 0, argv[2], argc > 4 ? argv[4] : NULL, 0, NULL) != 0;
    if (argc < 2) return printf("usage: test_ops REFERENCE_DIRECTORY [part of a test's name]\n"), 2;
    g_reference = argv[1];
    test.only = argc > 2 ? argv[2] : NULL;
    failed = run_cases(0, 0, "test", test.only, 0, NULL) + run_cases(0, 0, "grad", test.only, 0, NULL);
    for (simd_max = 0; simd_max <= most; simd_max++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            char *name = (char *)take(64);
            snprintf(name, 64, "packing at level %d%s", simd_max, bf16 ? ", rounded to bf16" : "");
            TEST(name) check_packs(bf16);
            snprintf(name = (char *)take(64), 64, "products of several blocks at level %d", simd_max);
            if (!bf16) TEST(name) check_products();
            snprintf(name = (char *)take(64), 64, "zeros left out at level %d%s", simd_max, bf16 ? ", rounded to bf16" : "");
            TEST(name) check_all_zeros(bf16);
        }
    simd_max = 2;
    TEST("exp within 2 units in the last place") test_exp();
    TEST("exp of what is special") test_exp_special();
    TEST("exp of scores") test_exp_scores();
    TEST("attention in a workspace for more") test_attention_workspace();
    TEST("attention of what is not finite") test_attention_not_finite();
    TEST("reference prodigy") test_prodigy();
    TEST("reference sparse_row_sigmoid") test_sparse_row_sigmoid();
    TEST("reference sparse_row_softmax") test_sparse_row_softmax();
    TEST("reference sparse_layer_sigmoid") test_sparse_layer_sigmoid();
    TEST("reference sparsegpt") test_sparsegpt();
    TEST("reference score_sparsegpt") test_sparsegpt_score();
    TEST("reference score_sparsegpt_git") test_sparsegpt_score_git();
    TEST("the same bytes from 1, 2, 3 and 8 threads") check_same_bytes(0);
    TEST("the same bytes from 1, 2, 3 and 8 threads, products in bf16") check_same_bytes(1);
    for (int level = most - 1; level >= 0; level--) {
        char *name = (char *)take(64);
        snprintf(name, 64, "instructions of level %d", level);
        TEST(name) check_level(level);
    }
    TEST("each level of instructions has a tile of its own") check_tiles(most);
    return test_finish() || failed;
}
