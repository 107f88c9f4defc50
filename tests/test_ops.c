/* test_ops.c - the CPU backend under the cases of backend_ops.h.
 *
 *   test_ops [check|test|grad|perf] [threads] [filter]
 *
 * `test` also compares with the stored reference arrays (BESA_REFERENCE, default data/reference; SKIP where
 * they are absent), demands the same bytes from 1, 2, 3 and 8 threads, runs the cases with products in bf16, and as on
 * processors that have less than this one. */
static int simd_max = 2;                /* what besa__cpu_simd may say: the paths of lesser processors are tested too */
#define BESA_SIMD_MAX simd_max
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "backend_ops.h"

static int counts[3];

static void result(const char *name, int passed, const char *what, double got, double limit)
{
    counts[passed ? 0 : 1]++;
    if (passed) printf("PASS %s\n", name);
    else printf("FAIL %s %s: %g, limit %g\n", name, what, got, limit);
}

static void *pool[512];                /* all memory of the reference tests */
static int pooled;

static void *take(size_t count, size_t size)
{
    void *p = calloc(count + 1, size);
    if (!p || pooled == 512) abort();
    return pool[pooled++] = p;
}

/* ---- reference arrays ---------------------------------------------------------------------- */

/* A .npy file as doubles; NULL where there is none. */
static double *load(const char *folder, const char *name, int64_t *count)
{
    char path[512], header[4096], *shape;
    const char *base = getenv("BESA_REFERENCE");
    unsigned char start[10];
    size_t length, width;
    FILE *file;
    double *x;
    snprintf(path, sizeof path, "%s/%s/%s.npy", base ? base : "data/reference", folder, name);
    file = fopen(path, "rb");
    if (!file) return NULL;
    if (fread(start, 1, 10, file) != 10) abort();
    length = (size_t)start[8] + 256u * start[9];
    if (length >= sizeof header || fread(header, 1, length, file) != length) abort();
    header[length] = 0;
    shape = strchr(strstr(header, "'shape'"), '(') + 1;
    *count = 1;
    while (*shape != ')') {
        int64_t n = strtoll(shape, &shape, 10);
        if (n) *count *= n;
        while (*shape == ',' || *shape == ' ') shape++;
    }
    width = strstr(header, "'<f8'") ? 8 : strstr(header, "'|u1'") ? 1 : 4;
    x = (double *)take((size_t)*count, sizeof *x);
    for (int64_t i = 0; i < *count; i++) {
        unsigned char raw[8];
        float f;
        int32_t n;
        if (fread(raw, 1, width, file) != width) abort();
        memcpy(&f, raw, 4), memcpy(&n, raw, 4);
        if (width == 8) memcpy(&x[i], raw, 8);
        else x[i] = width == 1 ? raw[0] : strstr(header, "'<i4'") ? (double)n : (double)f;
    }
    fclose(file);
    return x;
}

static float *floats(const double *x, int64_t n)
{
    float *f = (float *)take((size_t)n, sizeof *f);
    for (int64_t i = 0; x && i < n; i++) f[i] = (float)x[i];
    return f;
}

static double error_of(const float *got, const double *want, int64_t n)
{
    double e = 0, s = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = (double)got[i] - want[i];
        e += d * d, s += want[i] * want[i];
    }
    return sqrt(e / (s > 0 ? s : 1));
}

static void workspace(besa_backend *be, int64_t rows, int64_t columns)
{
    besa_workload w = ops_sizes(rows, columns, 1);
    void *p;
    w.hessian_columns = columns;
    be->workspace_bytes = be->workspace_size(be, &w);
    if (be->alloc(be, &p, be->workspace_bytes) != BESA_OK) abort();
    be->workspace = p;
}

#define BETA(x) (sizeof(o.beta1) == 4 ? (float)(x) : (x)) /* the fields' own type */

/* theta is x - x0: in float the first steps of 1e-6 would drown in an x0 of size 1 */
static void prodigy(besa_backend *be)
{
    int64_t n, nn, all, steps;
    double *A = load("prodigy", "A", &nn), *b = load("prodigy", "b", &n), *x0 = load("prodigy", "x0", &n);
    double *xs = load("prodigy", "x", &all), *ds = load("prodigy", "d", &steps), scalars[BESA_OPTIMIZER_SCALARS] = {1e-6, 0};
    double worst_x = 0, worst_d = 0, limit_x = 2e-3, limit_d = 1e-4;
    float *x = floats(NULL, n), *start = floats(NULL, n), *m = floats(NULL, n), *v = floats(NULL, n), *s = floats(NULL, n);
    float *g = floats(NULL, n);
    besa_optimizer_step o;
    if (!A) {
        counts[2]++, printf("SKIP reference prodigy\n");
        return;
    }
    memset(&o, 0, sizeof o);
    o.kind = BESA_PRODIGY, o.lr = 1, o.beta1 = BETA(0.9), o.beta2 = BETA(0.999), o.beta3 = BETA(sqrt(0.999)), o.eps = BETA(1e-8);
    o.d0 = 1e-6, o.d_coef = 5, o.n = n, o.theta = x, o.theta0 = start, o.grad = g, o.m = m, o.v = v, o.s = s, o.scalars = scalars;
    workspace(be, 1, 1);
    for (o.step = 1; o.step <= steps; o.step++) {
        double *want = xs + (o.step - 1) * n;
        double e, d;
        for (int64_t i = 0; i < n; i++) {
            double sum = -b[i];
            for (int64_t j = 0; j < n; j++) sum += A[i * n + j] * (x0[j] + (double)x[j]);
            g[i] = (float)sum;
        }
        if (be->optimizer_step(be, &o) != BESA_OK) abort();
        for (int64_t i = 0; i < n; i++) want[i] -= x0[i];
        e = error_of(x, want, n), d = fabs(scalars[0] / ds[o.step - 1] - 1);
        worst_x = e > worst_x ? e : worst_x, worst_d = d > worst_d ? d : worst_d;
    }
    be->free(be, be->workspace);
    if (sizeof o.beta2 == sizeof(double)) limit_x = 1e-4, limit_d = 1e-5; /* 1 - 0.999f is off by 1.3e-5, which 40 steps amplify */
    printf("  prodigy: relative error of x %.2g, of d %.2g over %d steps\n", worst_x, worst_d, (int)steps);
    result("reference prodigy x", worst_x < limit_x, "relative error", worst_x, limit_x);
    result("reference prodigy d", worst_d < limit_d, "relative error", worst_d, limit_d);
}

/* folder: the published sparse layer; groups 1 for the layer-wise form */
static void sparse_layer(besa_backend *be, const char *folder, int plain, int layer_wise)
{
    int64_t rc, C, th, td, R;
    double *w = load(folder, "weight", &rc), *norm = load(folder, "colnorm", &C), *theta = load(folder, "theta", &th);
    double *alpha = load(folder, "alpha", &td), *mask = load(folder, "mask", &rc), *grad = load(folder, "grad_theta", &th);
    double *x = load(folder, "x", &td), *dy = load(folder, "dy", &td), worst = 0;
    int64_t D = 100, wrong = 0, T = 30;
    float *scale, *score, *wf, *sums, *dw, *theta_f, *dtheta, *alpha_f;
    uint16_t *rank, bucket[4096];
    int32_t *n;
    besa_rate_shape s;
    char name[128];
    if (!w) {
        counts[2]++, printf("SKIP reference %s\n", folder);
        return;
    }
    R = rc / C;
    memset(&s, 0, sizeof s);
    s.rows = R, s.units = C, s.group_rows = layer_wise ? R : 1, s.candidates = D + 1, s.plain = plain;
    s.layer_scale = layer_wise ? 1.0f : 0.0f, s.row_scale = layer_wise ? 0.0f : 1.0f;
    scale = floats(norm, C), wf = floats(w, rc), score = floats(NULL, rc), sums = floats(NULL, R * D), dw = floats(NULL, rc);
    theta_f = floats(theta, th), dtheta = floats(NULL, th), alpha_f = floats(NULL, R);
    rank = (uint16_t *)take((size_t)rc, 2), n = (int32_t *)take((size_t)R, 4);
    workspace(be, R, C);
    if (be->score(be, score, wf, BESA_F32, scale, 1, R, C) || be->rank_rows(be, rank, score, R, C) ||
        be->rate_forward(be, alpha_f, n, layer_wise ? theta_f : NULL, layer_wise ? NULL : theta_f, NULL, &s)) abort();
    for (int64_t i = 0; i < (layer_wise ? 1 : R); i++) {
        double e = fabs((double)alpha_f[i] / alpha[i] - 1);
        worst = e > worst ? e : worst;
    }
    snprintf(name, sizeof name, "reference %s alpha", folder);
    result(name, worst < 2.5e-7, "relative error", worst, 2.5e-7);
    for (int64_t i = 0; i < rc; i++) wrong += (rank[i] >= n[i / C]) != (mask[i] != 0);
    snprintf(name, sizeof name, "reference %s mask", folder);
    result(name, wrong == 0, "wrong bits", (double)wrong, 0);
    for (int64_t j = 0; j < C; j++)
        for (int64_t d = 0; d < D; d++)
            if (j < ((D - d) * C) / D) bucket[j] = (uint16_t)d;
    for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < C; j++) {
            double sum = 0;
            for (int64_t t = 0; t < T; t++) sum += dy[t * R + r] * x[t * C + j];
            dw[r * C + j] = (float)sum;
        }
    if (be->bucket_gradient(be, sums, dw, wf, BESA_F32, rank, bucket, R, C, D) ||
        be->rate_backward(be, layer_wise ? dtheta : NULL, layer_wise ? NULL : dtheta, sums, layer_wise ? theta_f : NULL,
                          layer_wise ? NULL : theta_f, NULL, &s)) abort();
    snprintf(name, sizeof name, "reference %s grad_theta", folder);
    result(name, error_of(dtheta, grad, th) < 1e-5, "relative error", error_of(dtheta, grad, th), 1e-5);
    be->free(be, be->workspace);
}

static void sparsegpt(besa_backend *be)
{
    static const char *const names[3] = {"pruned_50", "pruned_2of4", "pruned_4of8"};
    int64_t cc, rc, C = 256, R;
    double *h = load("sparsegpt", "hessian", &cc), *u = load("sparsegpt", "chol_upper_of_inverse", &cc);
    double *w = load("sparsegpt", "weight", &rc), e;
    float *hf = floats(h, cc), *err;
    int32_t dead[256];
    if (!h) {
        counts[2]++, printf("SKIP reference sparsegpt\n");
        return;
    }
    R = rc / C;
    err = floats(NULL, R * 128);
    workspace(be, R, C);
    if (be->hessian_factor(be, hf, dead, 0.01f, C)) abort();
    e = error_of(hf, u, cc);
    result("reference sparsegpt factor", e < 2e-5, "relative error", e, 2e-5);
    for (int k = 0; k < 3; k++) {
        double *want = load("sparsegpt", names[k], &rc);
        float *wf = floats(w, rc);
        int64_t wrong = 0;
        char name[64];
        for (int64_t first = 0; first < C; first += 128)
            if (be->sparsegpt_slab(be, wf, err, hf, dead, first, 128, 0.5, k == 0 ? 0 : 2 * k, 4 * k, R, C) ||
                be->sparsegpt_push(be, wf, err, hf, first, 128, R, C)) abort();
        for (int64_t i = 0; i < rc; i++) wrong += (wf[i] == 0.0f) != (want[i] == 0.0);
        e = error_of(wf, want, rc);
        printf("  %s: relative error %.2g\n", names[k], e);
        snprintf(name, sizeof name, "reference sparsegpt %s", names[k]);
        result(name, wrong == 0 && e < 2e-5, wrong ? "wrong zeros" : "relative error", wrong ? (double)wrong : e, 2e-5);
    }
    be->free(be, be->workspace);
}

/* scores w^2 / U_jj (published code) and w^2 / U_jj^2: the Hessian is given, column 7 dead */
static void sparsegpt_scores(besa_backend *be, const char *folder, float exponent)
{
    int64_t cc, rc, C = 40, R, wrong = 0;
    double *h = load(folder, "hessian", &cc), *w = load(folder, "weight", &rc), *want = load(folder, "score", &rc);
    float *hf = floats(h, cc), *wf = floats(w, rc), *score = floats(NULL, rc), *scale = floats(NULL, C);
    double e = 0, norm = 0;
    int32_t dead[40];
    char name[64];
    if (!h) {
        counts[2]++, printf("SKIP reference %s\n", folder);
        return;
    }
    R = rc / C;
    workspace(be, R, C);
    if (be->hessian_factor(be, hf, dead, 0.01f, C) || be->diagonal(be, scale, hf, dead, C) ||
        be->power(be, scale, scale, exponent, C) || be->score(be, score, wf, BESA_F32, scale, 2, R, C)) abort();
    for (int64_t i = 0; i < rc; i++) {
        double d = (double)score[i] - want[i];
        e += d * d, norm += want[i] * want[i];
    }
    for (int64_t j = 0; j < C; j++) wrong += dead[j] != (j == 7);
    snprintf(name, sizeof name, "reference %s", folder);
    result(name, wrong == 0 && sqrt(e / norm) < 2e-5, "relative error", sqrt(e / norm), 2e-5);
    be->free(be, be->workspace);
}

/* ---- exp ----------------------------------------------------------------------------------- */

static void exponential(void)
{
    double worst = 0;
    float special[6] = {INFINITY, -INFINITY, NAN, 0.0f, 88.72f, -103.9f}, e[6];
    for (int64_t i = 0; i < 4000000; i++) {
        float x = -87.3f + (float)i * (176.0f / 4000000.0f), y;
        double want = exp((double)x), ulp;
        besa__cpu_exp_sum(&y, &x, 0.0f, 1);
        ulp = fabs((double)y - want) / (ldexp(1.0, ilogb(want) - 23));
        worst = ulp > worst ? ulp : worst;
    }
    printf("  exp: %.2f ulp\n", worst);
    result("exp", worst < 2, "ulp", worst, 2);
    besa__cpu_exp_sum(e, special, 0.0f, 6);
    result("exp special", e[0] == INFINITY && e[1] == 0 && e[2] != e[2] && e[3] == 1 && e[4] > 3e38f && e[4] < INFINITY &&
           e[5] > 0, "value", (double)e[5], 0);
}

/* ---- main ---------------------------------------------------------------------------------- */

static void run(int threads, int bf16, const char *mode, const char *filter, int quiet, uint64_t *hashes)
{
    besa_cpu_options options;
    besa_backend be;
    besa_error error;
    ops t;
    double bandwidth = 0;
    memset(&t, 0, sizeof t);
    options.threads = threads, options.bf16 = bf16;
    if (besa_cpu_backend(&be, &options, &error) != BESA_OK) {
        printf("FAIL besa_cpu_backend %s\n", error.message);
        counts[1]++;
        return;
    }
    t.be = &be, t.mode = mode, t.quiet = t.brief = quiet, t.product_tolerance = bf16 ? 1e-2 : 0;
    if (ops_is(&t, "perf")) {
        bandwidth = ops_copy_bandwidth(&be, besa__cpu_of(&be)->threads);
        printf("%d threads, copy bandwidth %.1f GB/s, reads and writes\n", besa__cpu_of(&be)->threads, bandwidth);
    }
    ops_run(&t, filter, bandwidth, hashes, counts);
    if (ops_is(&t, "test") && !quiet && !filter) {
        exponential();
        prodigy(&be);
        sparse_layer(&be, "sparse_row_sigmoid", 0, 0);
        sparse_layer(&be, "sparse_row_softmax", 1, 0);
        sparse_layer(&be, "sparse_layer_sigmoid", 0, 1);
        sparsegpt(&be);
        sparsegpt_scores(&be, "score_sparsegpt", -1.0f);
        sparsegpt_scores(&be, "score_sparsegpt_git", -2.0f);
    }
    while (pooled > 0) free(pool[--pooled]);
    be.destroy(&be);
}

/* ---- lesser processors --------------------------------------------------------------------- */

/* Every path below the one of this processor, down to plain C. */
static void lesser(const char *filter)
{
    int most = besa__cpu_simd(), tiles = 0;
    besa__gemm_tile_fn *tile = besa__gemm_choose(0).tile;
    for (simd_max = most - 1; simd_max >= 0; simd_max--) {
        int failed = counts[1];
        char name[64];
        tiles += besa__cpu_simd() == simd_max && besa__gemm_choose(0).tile != tile;
        tile = besa__gemm_choose(0).tile;
        run(1, 0, "test", filter, 1, NULL);
        snprintf(name, sizeof name, "instructions of level %d", simd_max);
        result(name, failed == counts[1], "cases", counts[1] - failed, 0);
    }
    simd_max = 2;
    result("each level has a tile of its own, the last is plain C", tiles == most && tile == besa__gemm_tile_c, "tiles", tiles,
           most);
}

int main(int argc, char **argv)
{
    static const int teams[4] = {1, 2, 3, 8};
    static uint64_t hashes[4][OPS_CASES];
    const char *given = argc > 1 ? argv[1] : "check", *filter = argc > 3 ? argv[3] : NULL;
    int threads = argc > 2 ? atoi(argv[2]) : 0, different = 0, check = strcmp(given, "check") == 0;
    const char *mode = check ? "test" : given; /* check: test, then grad */
    run(threads, 0, mode, filter, 0, NULL);
    if (check) run(threads, 0, "grad", filter, 0, NULL);
    if (strcmp(mode, "test") == 0 && threads == 0) {
        for (int bf16 = 0; bf16 < 2; bf16++) {
            for (int k = 0; k < 4; k++) run(teams[k], bf16, mode, filter, 1, hashes[k]);
            for (int k = 1; k < 4; k++)
                for (int i = 0; i < OPS_CASES; i++)
                    if (hashes[k][i] != hashes[0][i])
                        different++, printf("FAIL %s: %d threads give other bytes than one%s\n", ops_cases[i].name, teams[k], bf16 ? " (bf16)" : "");
            result(bf16 ? "same bytes for 1, 2, 3, 8 threads, bf16 products" : "same bytes for 1, 2, 3, 8 threads", different == 0,
                   "cases", different, 0);
        }
    }
    if (check && threads == 0) lesser(filter);
    printf("%d passed, %d failed, %d skipped\n", counts[0], counts[1], counts[2]);
    return counts[1] != 0;
}
