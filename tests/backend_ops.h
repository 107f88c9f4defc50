/* backend_ops.h - one list of cases for every operation of a besa_backend.
 *
 *   int besa_test_backend(besa_backend *be, const char *mode);
 *
 * mode "test": each operation against a plain double-precision version, written here from its formula.
 * mode "grad": each backward operation against central differences of that version, along random directions.
 * mode "perf": GB/s beside the bandwidth of a copy, or GFLOP/s.
 * Data goes in and out through the table alone; activations are rounded to be->activation_dtype before both sides see
 * them, and the tolerance depends on it. Outputs and workspace hold NaN bytes before each operation, the workspace is
 * exactly as large as workspace_size() says and is followed by a guard. Include after besa.h with its implementation.
 * Prints PASS, FAIL or SKIP per case and `N passed, N failed, N skipped`; returns the number of failures. */
#ifndef BESA_BACKEND_OPS_H
#define BESA_BACKEND_OPS_H
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OPS_BUFFERS = 64, OPS_GUARD = 4096 };

typedef struct ops {
    besa_backend *be;
    const char *mode;
    int quiet;
    int brief;                         /* leave out what neither threads nor products change */
    double product_tolerance;          /* relative error of matrix products, 0: by the activations' type */
    uint64_t random, hash;             /* hash: of all bytes that came down in this case */
    void *buffer[OPS_BUFFERS];         /* device memory of this case */
    void *host[4 * OPS_BUFFERS];       /* host memory of this case */
    int buffers, hosts;
    void *workspace;
    size_t workspace_bytes;
    char detail[1400];
    int failed;
    double seconds, work;              /* perf: of one call, bytes or FLOP */
    const char *unit;
} ops;

typedef struct ops_case {
    const char *name;
    void (*run)(ops *t, const struct ops_case *c);
    int64_t n[8];
    besa_dtype dtype;
    const char *modes;                 /* any of t, g, p */
} ops_case;

/* ---- data ---------------------------------------------------------------------------------- */

static double ops_uniform(ops *t) /* -1 .. 1 */
{
    t->random = t->random * 6364136223846793005u + 1442695040888963407u;
    return (double)(t->random >> 11) / 4503599627370496.0 - 1.0;
}

static void ops_fail(ops *t, const char *what, double got, double limit)
{
    if (t->failed++ == 0) snprintf(t->detail, sizeof t->detail, "%s: %g, limit %g", what, got, limit);
}

static void ops_call(ops *t, besa_result result, const char *what)
{
    if (result != BESA_OK && t->failed++ == 0)
        snprintf(t->detail, sizeof t->detail, "%s: %s (%s)", what, besa_result_string(result), t->be->error.message);
}

static void *ops_host(ops *t, size_t bytes)
{
    void *p = calloc(bytes ? bytes : 1, 1);
    if (!p || t->hosts == 4 * OPS_BUFFERS) abort();
    t->host[t->hosts++] = p;
    return p;
}

static double *ops_doubles(ops *t, int64_t n) { return (double *)ops_host(t, (size_t)n * sizeof(double)); }
static float *ops_floats(ops *t, int64_t n) { return (float *)ops_host(t, (size_t)n * sizeof(float)); }

/* Device memory full of NaN bytes. */
static void *ops_device(ops *t, size_t bytes)
{
    void *p, *poison = malloc(bytes ? bytes : 1);
    if (!poison || t->buffers == OPS_BUFFERS) abort();
    memset(poison, 0xFF, bytes);
    ops_call(t, t->be->alloc(t->be, &p, bytes), "alloc");
#ifndef OPS_NO_POISON /* for memory checkers, which have their own mark for memory that was never written */
    ops_call(t, t->be->upload(t->be, BESA_QUEUE_COMPUTE, p, poison, bytes), "upload");
    ops_call(t, t->be->synchronize(t->be, BESA_QUEUE_COMPUTE), "synchronize");
#endif
    free(poison);
    t->buffer[t->buffers++] = p;
    return p;
}

static void *ops_put(ops *t, const void *data, size_t bytes)
{
    void *p = ops_device(t, bytes);
    ops_call(t, t->be->upload(t->be, BESA_QUEUE_COMPUTE, p, data, bytes), "upload");
    ops_call(t, t->be->synchronize(t->be, BESA_QUEUE_COMPUTE), "synchronize");
    return p;
}

static void ops_get(ops *t, void *data, const void *device, size_t bytes)
{
    const unsigned char *byte = (const unsigned char *)data;
    ops_call(t, t->be->download(t->be, BESA_QUEUE_COMPUTE, data, device, bytes), "download");
    ops_call(t, t->be->synchronize(t->be, BESA_QUEUE_COMPUTE), "synchronize");
    for (size_t i = 0; i < bytes; i++) t->hash = (t->hash ^ byte[i]) * 1099511628211u;
}

/* The 16-bit types from their definition, not by the library's own converters. A code is sign, exponent, fraction; codes
 * of one sign count through the numbers in order, from 0 over the subnormals to infinity. */
static int ops_fraction_bits(besa_dtype dtype) { return dtype == BESA_F16 ? 10 : 7; }
static int ops_least_exponent(besa_dtype dtype) { return dtype == BESA_F16 ? -14 : -126; } /* of a normal number */

static double ops_decode(besa_dtype dtype, uint16_t code)
{
    int bits = ops_fraction_bits(dtype), exponent = (code & 0x7FFF) >> bits, fraction = code & ((1 << bits) - 1);
    double x = ldexp(fraction + (exponent ? 1 << bits : 0), ops_least_exponent(dtype) - bits + (exponent ? exponent - 1 : 0));
    if (exponent == 0x7FFF >> bits) x = fraction ? (double)NAN : (double)INFINITY;
    return code & 0x8000 ? -x : x;
}

/* The nearest code, of two equally near ones the even one; what is half a step beyond the largest number is infinite. */
static uint16_t ops_encode(besa_dtype dtype, double x)
{
    int bits = ops_fraction_bits(dtype), least = ops_least_exponent(dtype), exponent = least;
    uint32_t infinity = (0x7FFFu >> bits) << bits, code = infinity;
    double a = fabs(x), steps, rest;
    if (x != x) return (uint16_t)(infinity + 1);
    if (a <= (double)FLT_MAX) {
        if (a > 0 && ilogb(a) > least) exponent = ilogb(a);
        rest = ldexp(a, bits - exponent);
        steps = floor(rest), rest -= steps;
        code = (uint32_t)steps;
        if (rest > 0.5 || (rest == 0.5 && code % 2 == 1)) code++;
        code += (uint32_t)(exponent - least) << bits;
        if (code > infinity) code = infinity;
    }
    return (uint16_t)(code | (signbit(x) ? 0x8000u : 0));
}

static double ops_round(besa_dtype dtype, double x)
{
    return dtype == BESA_F32 ? (double)(float)x : ops_decode(dtype, ops_encode(dtype, (double)(float)x));
}

/* values of x (n) are rounded to dtype and sent */
static void *ops_send(ops *t, double *x, besa_dtype dtype, int64_t n)
{
    unsigned char *data = (unsigned char *)ops_host(t, (size_t)n * besa_dtype_size(dtype));
    for (int64_t i = 0; i < n; i++) {
        float f = (float)x[i];
        uint16_t h = ops_encode(dtype, (double)f);
        x[i] = dtype == BESA_F32 ? (double)f : ops_decode(dtype, h);
        if (dtype == BESA_F32) memcpy(data + 4 * i, &f, 4);
        else memcpy(data + 2 * i, &h, 2);
    }
    return ops_put(t, data, (size_t)n * besa_dtype_size(dtype));
}

static double *ops_random(ops *t, int64_t n, double scale)
{
    double *x = ops_doubles(t, n);
    for (int64_t i = 0; i < n; i++) x[i] = scale * ops_uniform(t);
    return x;
}

static void *ops_act(ops *t, double *x, int64_t n) { return ops_send(t, x, t->be->activation_dtype, n); }
static void *ops_float(ops *t, double *x, int64_t n) { return ops_send(t, x, BESA_F32, n); }
static void *ops_act_out(ops *t, int64_t n) { return ops_device(t, (size_t)n * besa_dtype_size(t->be->activation_dtype)); }
static float *ops_float_out(ops *t, int64_t n) { return (float *)ops_device(t, (size_t)n * sizeof(float)); }

static double *ops_fetch(ops *t, const void *device, besa_dtype dtype, int64_t n)
{
    unsigned char *data = (unsigned char *)ops_host(t, (size_t)n * besa_dtype_size(dtype));
    double *x = ops_doubles(t, n);
    ops_get(t, data, device, (size_t)n * besa_dtype_size(dtype));
    for (int64_t i = 0; i < n; i++) {
        float f = 0;
        uint16_t h = 0;
        if (dtype == BESA_F32) memcpy(&f, data + 4 * i, 4);
        else memcpy(&h, data + 2 * i, 2);
        x[i] = dtype == BESA_F32 ? (double)f : ops_decode(dtype, h);
    }
    return x;
}

/* relative root-mean-square error, and the largest single error beside the root mean square */
static void ops_near(ops *t, const char *what, const double *got, const double *want, int64_t n, double limit)
{
    double error = 0, norm = 0, worst = 0, rms;
    for (int64_t i = 0; i < n; i++) {
        double e = fabs(got[i] - want[i]);
        if (!(got[i] - want[i] == got[i] - want[i])) e = got[i] == want[i] ? 0 : 1e30;
        error += e * e, norm += want[i] * want[i];
        worst = e > worst ? e : worst;
    }
    rms = sqrt(norm / (double)(n ? n : 1));
    if (!(sqrt(error) <= limit * sqrt(norm) + 1e-30)) ops_fail(t, what, sqrt(error / (norm > 0 ? norm : 1)), limit);
    if (!(worst <= 30 * limit * rms + 1e-30)) ops_fail(t, what, worst / (rms > 0 ? rms : 1), 30 * limit);
}

static void ops_near_act(ops *t, const char *what, const void *device, const double *want, int64_t n, double limit)
{
    besa_dtype dtype = t->be->activation_dtype;
    ops_near(t, what, ops_fetch(t, device, dtype, n), want, n, dtype == BESA_F32 ? limit : 1e-2);
}

static void ops_same(ops *t, const char *what, const void *device, const void *want, size_t bytes)
{
    unsigned char *got = (unsigned char *)ops_host(t, bytes);
    ops_get(t, got, device, bytes);
    for (size_t i = 0; i < bytes; i++)
        if (got[i] != ((const unsigned char *)want)[i]) {
            ops_fail(t, what, (double)i, (double)bytes);
            return;
        }
}

/* What a buffer holds. */
static void *ops_raw(ops *t, const void *device, size_t bytes)
{
    void *data = ops_host(t, bytes);
    ops_get(t, data, device, bytes);
    return data;
}

static void ops_workspace(ops *t, const besa_workload *w)
{
    size_t bytes = t->be->workspace_size(t->be, w);
    t->workspace = ops_device(t, bytes + OPS_GUARD);
    t->be->workspace = t->workspace;
    t->be->workspace_bytes = t->workspace_bytes = bytes;
}

static void ops_guard(ops *t)
{
    unsigned char guard[OPS_GUARD];
    uint64_t hash = t->hash;
#ifdef OPS_NO_POISON
    return;
#endif
    if (!t->workspace) return;
    ops_get(t, guard, (unsigned char *)t->workspace + t->workspace_bytes, sizeof guard);
    t->hash = hash;
    for (int i = 0; i < OPS_GUARD; i++)
        if (guard[i] != 0xFF) {
            ops_fail(t, "workspace overrun", i, 0);
            return;
        }
}

static besa_workload ops_sizes(int64_t rows, int64_t columns, int64_t tokens)
{
    besa_workload w;
    memset(&w, 0, sizeof w);
    w.rows = rows, w.columns = columns, w.tokens = tokens, w.seqlen = tokens;
    return w;
}

static double ops_products(const ops *t, double limit) { return t->product_tolerance > 0 ? t->product_tolerance : limit; }
static int ops_is(const ops *t, const char *mode) { return strcmp(t->mode, mode) == 0; }

#ifndef OPS_CLOCK
#define OPS_CLOCK CLOCK_MONOTONIC      /* CLOCK_PROCESS_CPUTIME_ID: one thread on a busy machine */
#endif
static double ops_now(void)
{
    struct timespec now;
    clock_gettime(OPS_CLOCK, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* perf: repeats the call for a quarter of a second, five times, and keeps the fastest */
#define OPS_TIME(t, work_, unit_, call)                                                            \
    do {                                                                                           \
        double ops__best = 1e30;                                                                   \
        (t)->work = (work_), (t)->unit = (unit_);                                                  \
        call;                                                                                      \
        for (int ops__i = 0; ops__i < 5; ops__i++) {                                               \
            int ops__n = 0;                                                                        \
            double ops__t0 = ops_now(), ops__t1;                                                   \
            do {                                                                                   \
                call;                                                                              \
                (void)(t)->be->synchronize((t)->be, BESA_QUEUE_COMPUTE);                           \
                ops__n++, ops__t1 = ops_now();                                                     \
            } while (ops__t1 - ops__t0 < 0.05);                                                    \
            if ((ops__t1 - ops__t0) / ops__n < ops__best) ops__best = (ops__t1 - ops__t0) / ops__n; \
        }                                                                                          \
        (t)->seconds = ops__best;                                                                  \
    } while (0)

/* grad: want = (f(x + h u) - f(x - h u)) / 2h for a random direction u, against <grad, u>; f reads x */
typedef double ops_function(const void *user);
static void ops_gradient(ops *t, const char *what, double *x, const double *grad, int64_t n, double h, ops_function *f,
                         const void *user, double limit)
{
    double *keep = ops_doubles(t, n), *u = ops_random(t, n, 1.0);
    double up, down, got = 0, want, size = 0;
    memcpy(keep, x, (size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = keep[i] + h * u[i];
    up = f(user);
    for (int64_t i = 0; i < n; i++) x[i] = keep[i] - h * u[i];
    down = f(user);
    memcpy(x, keep, (size_t)n * sizeof *x);
    want = (up - down) / (2 * h);
    for (int64_t i = 0; i < n; i++) got += grad[i] * u[i], size += grad[i] * grad[i];
    size = sqrt(size) + 1e-12;
    if (t->be->activation_dtype != BESA_F32) limit = 2e-2;
    if (!(fabs(got - want) <= limit * size)) ops_fail(t, what, (got - want) / size, limit);
}

/* ---- matrix products ----------------------------------------------------------------------- */

/* c (m,n) = [c +] alpha sum_p a[i ai + p ap] b[p bp + j bj] */
static void ref_product(double *c, const double *a, int64_t ai, int64_t ap, const double *b, int64_t bp, int64_t bj,
                        int64_t m, int64_t n, int64_t k, double alpha, int add)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t p = 0; p < k; p++) sum += a[i * ai + p * ap] * b[p * bp + j * bj];
            c[i * n + j] = (add ? c[i * n + j] : 0) + alpha * sum;
        }
}

static void ops_linear(ops *t, const ops_case *c)
{
    int64_t T = c->n[0], R = c->n[1], C = c->n[2];
    int bias = (int)c->n[3], add = (int)c->n[4];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, T);
    double limit = ops_products(t, 3e-6);
    double *x = ops_random(t, T * C, 1), *w = ops_random(t, R * C, 1), *b = ops_random(t, R, 1);
    for (int64_t i = 0; c->n[5] && i < R * C; i++) if (ops_uniform(t) < 0.4) w[i] = 0;
    double *y = ops_random(t, T * R, 1), *dx = ops_random(t, T * C, 1), *dw = ops_random(t, R * C, 1);
    void *dx_ = ops_act(t, dx, T * C), *x_ = ops_act(t, x, T * C), *w_ = ops_send(t, w, c->dtype, R * C);
    void *b_ = ops_float(t, b, R), *y_ = ops_act(t, y, T * R), *dy_ = ops_act(t, y, T * R);
    float *dw_ = add ? (float *)ops_float(t, dw, R * C) : ops_float_out(t, R * C);
    double *dy = ops_doubles(t, T * R);
    memcpy(dy, y, (size_t)(T * R) * sizeof *dy);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, 2.0 * (double)T * (double)R * (double)C, "GFLOP/s",
                 ops_call(t, be->linear_forward(be, y_, x_, w_, c->dtype, NULL, T, R, C, 0), "linear_forward"));
        return;
    }
    ref_product(y, x, C, 1, w, 1, C, T, R, C, 1, add);
    for (int64_t i = 0; bias && i < T * R; i++) y[i] += b[i % R];
    ref_product(dx, dy, R, 1, w, C, 1, T, C, R, 1, add);
    ref_product(dw, dy, 1, R, x, C, 1, R, C, T, 1, add);
    ops_call(t, be->linear_forward(be, y_, x_, w_, c->dtype, bias ? (float *)b_ : NULL, T, R, C, add), "linear_forward");
    ops_call(t, be->linear_backward_input(be, dx_, dy_, w_, c->dtype, T, R, C, add), "linear_backward_input");
    ops_call(t, be->linear_backward_weight(be, dw_, BESA_F32, dy_, x_, T, R, C, 0, R / 3, add), "linear_backward_weight");
    ops_call(t, be->linear_backward_weight(be, dw_ + R / 3 * C, BESA_F32, dy_, x_, T, R, C, R / 3, R - R / 3, add), "linear_backward_weight");
    ops_near_act(t, "linear_forward", y_, y, T * R, limit);
    ops_near_act(t, "linear_backward_input", dx_, dx, T * C, limit);
    ops_near(t, "linear_backward_weight", ops_fetch(t, dw_, BESA_F32, R * C), dw, R * C, limit);
    if (add || be->gradient_dtype == BESA_F32) return;
    void *short_ = ops_device(t, (size_t)(R * C) * besa_dtype_size(be->gradient_dtype));
    ops_call(t, be->linear_backward_weight(be, short_, be->gradient_dtype, dy_, x_, T, R, C, 0, R, 0), "linear_backward_weight");
    ops_near(t, "linear_backward_weight, rounded", ops_fetch(t, short_, be->gradient_dtype, R * C), dw, R * C, 1e-2);
}

static void ops_gram(ops *t, const ops_case *c)
{
    int64_t T = c->n[0], C = c->n[1];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, C, T);
    double *x = ops_random(t, T * C, 1), *h = ops_random(t, C * C, 1), *got;
    void *x_ = ops_act(t, x, T * C);
    float *h_ = (float *)ops_float(t, h, C * C);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, (double)T * (double)C * (double)C, "GFLOP/s", ops_call(t, be->gram(be, h_, x_, 0.1f, T, C), "gram"));
        return;
    }
    ref_product(h, x, 1, C, x, C, 1, C, C, T, (double)0.1f, 1);
    ops_call(t, be->gram(be, h_, x_, 0.1f, T, C), "gram");
    got = ops_fetch(t, h_, BESA_F32, C * C);
    for (int64_t i = 0; i < C; i++)
        for (int64_t j = i + 1; j < C; j++) got[i * C + j] = h[i * C + j]; /* free to hold anything */
    t->hash = 0;
    ops_near(t, "gram", got, h, C * C, ops_products(t, 3e-6));
}

/* ---- the block's pieces -------------------------------------------------------------------- */

static void ops_convert(ops *t, const ops_case *c)
{
    static const float special[] = {0.0f, -0.0f, 1.0f, 65504.0f, 65519.0f, 65520.0f, 1e-7f, 6e-8f, 3e-8f, -2.98e-8f,
                                    6.1e-5f, 1e30f, 3.4e38f, 1.00390625f, 1.01171875f, -1e-40f};
    besa_backend *be = t->be;
    int64_t n = c->n[0];
    for (int from = 0; from < 3; from++)
        for (int to = 0; to < 3; to++) {
            besa_dtype a = (besa_dtype)from, b = (besa_dtype)to;
            double *x = ops_random(t, n, 3), *want = ops_doubles(t, n);
            void *x_, *y_ = ops_device(t, (size_t)n * besa_dtype_size(b));
            for (int64_t i = 0; i < n && i < 16; i++) x[i] = (double)special[i];
            if (n > 18) x[16] = (double)INFINITY, x[17] = -(double)INFINITY;
            x_ = ops_send(t, x, a, n);
            for (int64_t i = 0; i < n; i++) want[i] = ops_round(b, x[i]);
            ops_call(t, be->convert(be, y_, b, x_, a, n), "convert");
            x = ops_fetch(t, y_, b, n);
            for (int64_t i = 0; i < n; i++)
                if (!(x[i] == want[i]) || signbit(x[i]) != signbit(want[i])) ops_fail(t, "convert", x[i], want[i]);
            if (ops_is(t, "perf") && from == 2 && to == 0)
                OPS_TIME(t, 6.0 * (double)n, "GB/s", ops_call(t, be->convert(be, y_, b, x_, a, n), "convert"));
        }
}

/* got (n) as converted from want; NaN stays NaN, all else to the bit */
static void ops_converted(ops *t, const void *device, besa_dtype from, besa_dtype to, const double *x, int64_t n)
{
    const double *got = ops_fetch(t, device, to, n);
    for (int64_t i = 0; i < n; i++) {
        double want = ops_round(to, x[i]);
        if (got[i] != got[i] && want != want) continue;
        if (got[i] == want && signbit(got[i]) == signbit(want)) continue;
        ops_fail(t, to == BESA_F32 ? "to f32" : to == BESA_F16 ? "to f16" : "to bf16", got[i], want);
        if (t->failed == 1) snprintf(t->detail + strlen(t->detail), 60, ", from %.9g of type %d", x[i], (int)from);
    }
}

/* Every number of a 16-bit type to f32 and to the other one. From f32 to it: every number, the middle between it and the next,
 * and the floats on both sides of that; the last are half a step below infinity, and infinite. */
static void ops_convert_all(ops *t, const ops_case *c)
{
    enum { CODES = 65536, PLACES = 4 };
    besa_backend *be = t->be;
    besa_dtype dtype = c->dtype, other = dtype == BESA_F16 ? BESA_BF16 : BESA_F16;
    double *x = ops_doubles(t, CODES), *y = ops_doubles(t, PLACES * CODES);
    void *x_, *y_, *wide_ = ops_device(t, CODES * 4), *other_ = ops_device(t, CODES * 2), *out_ = ops_device(t, PLACES * CODES * 2);
    uint16_t *codes = (uint16_t *)ops_host(t, CODES * 2);
    if (t->brief) return;
    for (int i = 0; i < CODES; i++) {
        codes[i] = (uint16_t)i;
        x[i] = ops_decode(dtype, codes[i]);
    }
    for (int i = 0; i < CODES; i++) {
        double next = (i & 0x7FFF) == 0x7FFF ? x[i] : x[i + 1];
        float middle;
        if (fabs(next) > (double)FLT_MAX && fabs(x[i]) <= (double)FLT_MAX) next = 2 * x[i] - x[i - 1]; /* a step that is not there */
        middle = (float)(0.5 * (x[i] + next));
        y[PLACES * i] = x[i], y[PLACES * i + 1] = (double)middle;
        y[PLACES * i + 2] = (double)nextafterf(middle, 0), y[PLACES * i + 3] = (double)nextafterf(middle, i & 0x8000 ? -INFINITY : INFINITY);
    }
    x_ = ops_put(t, codes, CODES * 2);
    y_ = ops_send(t, y, BESA_F32, PLACES * CODES);
    ops_call(t, be->convert(be, wide_, BESA_F32, x_, dtype, CODES), "convert");
    ops_call(t, be->convert(be, other_, other, x_, dtype, CODES), "convert");
    ops_call(t, be->convert(be, out_, dtype, y_, BESA_F32, PLACES * CODES), "convert");
    ops_converted(t, wide_, dtype, BESA_F32, x, CODES);
    ops_converted(t, other_, dtype, other, x, CODES);
    ops_converted(t, out_, BESA_F32, dtype, y, PLACES * CODES);
}

typedef struct ref_norm {
    const double *x, *g, *dy;
    double *y;
    int64_t n, d;
    double eps;
} ref_norm;

static double ref_rmsnorm(const void *user) /* y; returns <dy, y> */
{
    const ref_norm *r = (const ref_norm *)user;
    double total = 0;
    for (int64_t i = 0; i < r->n; i++) {
        double sum = 0;
        for (int64_t c = 0; c < r->d; c++) sum += r->x[i * r->d + c] * r->x[i * r->d + c];
        for (int64_t c = 0; c < r->d; c++) {
            double y = r->x[i * r->d + c] / sqrt(sum / (double)r->d + r->eps) * r->g[c];
            if (r->y) r->y[i * r->d + c] = y;
            total += y * r->dy[i * r->d + c];
        }
    }
    return total;
}

static void ops_rmsnorm(ops *t, const ops_case *c)
{
    int64_t n = c->n[0], d = c->n[1];
    int add = (int)c->n[2];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, d, n);
    double *x = ops_random(t, n * d, c->n[3] ? 4e-3 : 2), *g = ops_random(t, d, 1), *dy = ops_random(t, n * d, 1);
    double *y = ops_doubles(t, n * d), *dx = ops_random(t, n * d, 1), *grad;
    void *x_ = ops_act(t, x, n * d), *dy_ = ops_act(t, dy, n * d), *dx_ = ops_act(t, dx, n * d), *y_ = ops_act_out(t, n * d);
    float *g_ = (float *)ops_float(t, g, d), *inv = ops_float_out(t, n);
    ref_norm r = {x, g, dy, y, n, d, (double)1e-5f};
    ops_workspace(t, &sizes);
    ops_call(t, be->rmsnorm_forward(be, y_, inv, x_, g_, n, d, 1e-5f), "rmsnorm_forward");
    if (ops_is(t, "perf")) {
        double bytes = (double)(n * d) * (double)besa_dtype_size(be->activation_dtype);
        if (add) OPS_TIME(t, 4 * bytes, "GB/s", ops_call(t, be->rmsnorm_backward(be, dx_, dy_, x_, g_, inv, n, d, 1), ""));
        else OPS_TIME(t, 2 * bytes, "GB/s", ops_call(t, be->rmsnorm_forward(be, y_, inv, x_, g_, n, d, 1e-5f), ""));
        return;
    }
    ref_rmsnorm(&r);
    ops_near_act(t, "rmsnorm_forward", y_, y, n * d, 1e-6);
    if (add) {
        ops_call(t, be->rmsnorm_backward(be, dx_, dy_, x_, g_, inv, n, d, 1), "rmsnorm_backward");
        grad = ops_fetch(t, dx_, be->activation_dtype, n * d);
        for (int64_t i = 0; i < n * d; i++) grad[i] -= dx[i];
    } else { /* in place */
        ops_call(t, be->rmsnorm_backward(be, dy_, dy_, x_, g_, inv, n, d, 0), "rmsnorm_backward");
        grad = ops_fetch(t, dy_, be->activation_dtype, n * d);
    }
    r.y = NULL;
    if (ops_is(t, "grad")) ops_gradient(t, "rmsnorm_backward", x, grad, n * d, 1e-5, ref_rmsnorm, &r, 1e-5);
    else
        for (int64_t i = 0; i < n; i++) {
            double sum = 0, dot = 0;
            for (int64_t j = 0; j < d; j++) {
                sum += x[i * d + j] * x[i * d + j];
                dot += x[i * d + j] * dy[i * d + j] * g[j];
            }
            for (int64_t j = 0; j < d; j++) {
                double q = 1 / sqrt(sum / (double)d + r.eps);
                y[i * d + j] = q * (g[j] * dy[i * d + j] - x[i * d + j] * q * q * dot / (double)d);
                if (d == 1) y[i] += q * dy[i] * g[0], grad[i] += q * dy[i] * g[0]; /* all but cancels: a scale for the error */
            }
        }
    if (ops_is(t, "test")) ops_near(t, "rmsnorm_backward", grad, y, n * d, be->activation_dtype == BESA_F32 ? 3e-6 : 2e-2);
}

static void ops_rope(ops *t, const ops_case *c)
{
    int64_t T = c->n[0], L = c->n[1], heads = c->n[2], dh = c->n[3], turned = c->n[4] ? c->n[4] : dh, pairs = turned / 2;
    int64_t n = T * heads * dh;
    besa_backend *be = t->be;
    double *x = ops_random(t, n, 1), *y = ops_doubles(t, n), *co = ops_doubles(t, L * pairs), *si = ops_doubles(t, L * pairs);
    void *x_ = ops_act(t, x, n);
    float *co_, *si_;
    for (int64_t i = 0; i < L * pairs; i++) {
        double angle = (double)(i / pairs) * pow(10000, -2.0 * (double)(i % pairs) / (double)turned);
        co[i] = cos(angle), si[i] = sin(angle);
    }
    co_ = (float *)ops_float(t, co, L * pairs), si_ = (float *)ops_float(t, si, L * pairs);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, 2.0 * (double)n * (double)besa_dtype_size(be->activation_dtype), "GB/s",
                 ops_call(t, be->rope(be, x_, co_, si_, T, L, heads, dh, turned, 1), "rope"));
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t token = i / (heads * dh), j = i % dh, k = token % L * pairs + j % pairs;
        y[i] = j >= turned ? x[i] : j < pairs ? x[i] * co[k] - x[i + pairs] * si[k] : x[i] * co[k] + x[i - pairs] * si[k];
    }
    ops_call(t, be->rope(be, x_, co_, si_, T, L, heads, dh, turned, 1), "rope");
    ops_near_act(t, "rope", x_, y, n, 1e-6);
    ops_call(t, be->rope(be, x_, co_, si_, T, L, heads, dh, turned, -1), "rope"); /* the transpose of a turn is its inverse */
    ops_near_act(t, "rope back", x_, x, n, 1e-6);
}

typedef struct ref_att {
    const besa_attention_shape *s;
    const double *q, *k, *v, *d_o;
    double *o, *dq, *dk, *dv;          /* all or none */
    double *p, *dp;                    /* (seqlen) */
} ref_att;

static double ref_attention(const void *user) /* returns <dO, O> */
{
    const ref_att *r = (const ref_att *)user;
    const besa_attention_shape *s = r->s;
    int64_t dh = s->head_dim, H = s->num_attention_heads, K = s->num_key_value_heads, L = s->seqlen;
    double total = 0, cap = (double)s->softcap, scale = s->scale != 0 ? (double)s->scale : 1 / sqrt((double)dh);
    for (int64_t b = 0; b < s->batch; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < L; i++) {
                int64_t qi = ((b * L + i) * H + h) * dh, first = 0;
                double most = -1e300, sum = 0, dot = 0;
                if (s->sliding_window > 0 && i - s->sliding_window + 1 > 0) first = i - s->sliding_window + 1;
                for (int64_t j = first; j <= i; j++) {
                    int64_t kj = ((b * L + j) * K + h / (H / K)) * dh;
                    r->p[j] = 0;
                    for (int64_t e = 0; e < dh; e++) r->p[j] += scale * r->q[qi + e] * r->k[kj + e];
                    if (cap != 0) r->p[j] = cap * tanh(r->p[j] / cap);
                    most = r->p[j] > most ? r->p[j] : most;
                }
                for (int64_t j = first; j <= i; j++) sum += r->p[j] = exp(r->p[j] - most);
                for (int64_t j = first; j <= i; j++) {
                    int64_t kj = ((b * L + j) * K + h / (H / K)) * dh;
                    r->p[j] /= sum;
                    r->dp[j] = 0;
                    for (int64_t e = 0; e < dh; e++) {
                        r->dp[j] += r->d_o[qi + e] * r->v[kj + e];
                        if (r->o) r->o[qi + e] += r->p[j] * r->v[kj + e];
                    }
                    dot += r->p[j] * r->dp[j];
                }
                total += dot;
                for (int64_t j = first; r->o && j <= i; j++) {
                    int64_t kj = ((b * L + j) * K + h / (H / K)) * dh;
                    double ds = scale * r->p[j] * (r->dp[j] - dot), s0 = 0;
                    for (int64_t e = 0; e < dh && cap != 0; e++) s0 += scale * r->q[qi + e] * r->k[kj + e];
                    if (cap != 0) ds *= 1 - tanh(s0 / cap) * tanh(s0 / cap);
                    for (int64_t e = 0; e < dh; e++) {
                        r->dq[qi + e] += ds * r->k[kj + e];
                        r->dk[kj + e] += ds * r->q[qi + e];
                        r->dv[kj + e] += r->p[j] * r->d_o[qi + e];
                    }
                }
            }
    return total;
}

static void ops_attention(ops *t, const ops_case *c)
{
    besa_attention_shape s = {c->n[0], c->n[1], c->n[2], c->n[3], c->n[4], c->n[5], (float)c->n[6] / 100, (float)c->n[7] / 10};
    int64_t T = s.batch * s.seqlen, n = T * s.num_attention_heads * s.head_dim, m = T * s.num_key_value_heads * s.head_dim;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, 1, T);
    double *q = ops_random(t, n, 2), *k = ops_random(t, m, 2), *v = ops_random(t, m, 1), *d_o = ops_random(t, n, 1);
    void *q_ = ops_act(t, q, n), *k_ = ops_act(t, k, m), *v_ = ops_act(t, v, m), *do_ = ops_act(t, d_o, n);
    void *o_ = ops_act_out(t, n), *dq_ = ops_act_out(t, n), *dk_ = ops_act_out(t, m), *dv_ = ops_act_out(t, m);
    ref_att r = {&s, q, k, v, d_o, NULL, NULL, NULL, NULL, NULL, NULL};
    double limit = ops_products(t, 5e-6), flop;
    besa_dtype act = be->activation_dtype;
    sizes.seqlen = s.seqlen;
    sizes.num_attention_heads = s.num_attention_heads, sizes.num_key_value_heads = s.num_key_value_heads;
    sizes.head_dim = s.head_dim;
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) { /* FLOP of the visible half */
        flop = 2.0 * (double)n * (double)s.seqlen;
        if (c->dtype == BESA_F32)
            OPS_TIME(t, flop, "GFLOP/s", ops_call(t, be->attention_forward(be, o_, q_, k_, v_, &s), ""));
        else OPS_TIME(t, 2.5 * flop, "GFLOP/s",
                      ops_call(t, be->attention_backward(be, dq_, dk_, dv_, do_, q_, k_, v_, &s), ""));
        return;
    }
    ops_call(t, be->attention_forward(be, o_, q_, k_, v_, &s), "attention_forward");
    ops_call(t, be->attention_backward(be, dq_, dk_, dv_, do_, q_, k_, v_, &s), "attention_backward");
    r.p = ops_doubles(t, s.seqlen), r.dp = ops_doubles(t, s.seqlen);
    if (ops_is(t, "grad")) {
        ops_gradient(t, "dq", q, ops_fetch(t, dq_, act, n), n, 1e-5, ref_attention, &r, 4 * limit);
        ops_gradient(t, "dk", k, ops_fetch(t, dk_, act, m), m, 1e-5, ref_attention, &r, 4 * limit);
        ops_gradient(t, "dv", v, ops_fetch(t, dv_, act, m), m, 1e-5, ref_attention, &r, 4 * limit);
        return;
    }
    r.o = ops_doubles(t, n), r.dq = ops_doubles(t, n), r.dk = ops_doubles(t, m), r.dv = ops_doubles(t, m);
    ref_attention(&r);
    ops_near_act(t, "attention_forward", o_, r.o, n, limit);
    ops_near_act(t, "dv", dv_, r.dv, m, limit);
    if (s.seqlen > 1) { /* of one token alone dQ and dK are zero */
        ops_near_act(t, "dq", dq_, r.dq, n, limit);
        ops_near_act(t, "dk", dk_, r.dk, m, limit);
    }
}

typedef struct ref_glu {
    const double *g, *u, *dz;
    double *z;
    int64_t n;
} ref_glu;

static double ref_swiglu(const void *user)
{
    const ref_glu *r = (const ref_glu *)user;
    double total = 0;
    for (int64_t i = 0; i < r->n; i++) {
        double z = r->g[i] / (1 + exp(-r->g[i])) * r->u[i];
        if (r->z) r->z[i] = z;
        total += z * r->dz[i];
    }
    return total;
}

static void ops_swiglu(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    besa_backend *be = t->be;
    double *g = ops_random(t, n, 4), *u = ops_random(t, n, 1), *dz = ops_random(t, n, 1), *z = ops_doubles(t, n);
    double *dg = ops_doubles(t, n), *du = ops_doubles(t, n), bytes = (double)n * (double)besa_dtype_size(be->activation_dtype);
    void *g_, *u_ = ops_act(t, u, n), *dz_ = ops_act(t, dz, n), *z_ = ops_act_out(t, n);
    ref_glu r = {g, u, dz, z, n};
    if (ops_is(t, "test") && n > 4) g[0] = 100, g[1] = -100, g[2] = 0, g[3] = -88.5;
    g_ = ops_act(t, g, n);
    ops_call(t, be->swiglu_forward(be, z_, g_, u_, n), "swiglu_forward");
    if (ops_is(t, "perf")) {
        if (c->n[1]) {
            void *x_ = ops_act_out(t, n), *y_ = ops_act_out(t, n);
            OPS_TIME(t, 5 * bytes, "GB/s", ops_call(t, be->swiglu_backward(be, x_, y_, dz_, g_, u_, n), ""));
        } else OPS_TIME(t, 3 * bytes, "GB/s", ops_call(t, be->swiglu_forward(be, z_, g_, u_, n), ""));
        return;
    }
    ref_swiglu(&r);
    ops_near_act(t, "swiglu_forward", z_, z, n, 1e-6);
    ops_call(t, be->swiglu_backward(be, g_, u_, dz_, g_, u_, n), "swiglu_backward"); /* in place */
    r.z = NULL;
    if (ops_is(t, "grad")) {
        ops_gradient(t, "dgate", g, ops_fetch(t, g_, be->activation_dtype, n), n, 1e-5, ref_swiglu, &r, 1e-5);
        ops_gradient(t, "dup", u, ops_fetch(t, u_, be->activation_dtype, n), n, 1e-5, ref_swiglu, &r, 1e-5);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        double s = 1 / (1 + exp(-g[i]));
        dg[i] = dz[i] * u[i] * s * (1 + g[i] * (1 - s));
        du[i] = dz[i] * g[i] * s;
    }
    ops_near_act(t, "dgate", g_, dg, n, 1e-6);
    ops_near_act(t, "dup", u_, du, n, 1e-6);
}

static double ref_geglu(const void *user)
{
    const ref_glu *r = (const ref_glu *)user;
    double total = 0;
    for (int64_t i = 0; i < r->n; i++) {
        double g = r->g[i], z = 0.5 * g * (1 + tanh(sqrt(2 / acos(-1)) * (g + 0.044715 * g * g * g))) * r->u[i];
        if (r->z) r->z[i] = z;
        total += z * r->dz[i];
    }
    return total;
}

static void ops_geglu(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    besa_backend *be = t->be;
    double *g = ops_random(t, n, 4), *u = ops_random(t, n, 1), *dz = ops_random(t, n, 1), *z = ops_doubles(t, n);
    double *dg = ops_doubles(t, n), *du = ops_doubles(t, n);
    void *g_, *u_ = ops_act(t, u, n), *dz_ = ops_act(t, dz, n), *z_ = ops_act_out(t, n);
    ref_glu r = {g, u, dz, z, n};
    if (ops_is(t, "test") && n > 4) g[0] = 50, g[1] = -50, g[2] = 0, g[3] = -1e-3;
    g_ = ops_act(t, g, n);
    ops_call(t, be->geglu_forward(be, z_, g_, u_, n), "geglu_forward");
    ref_geglu(&r);
    ops_near_act(t, "geglu_forward", z_, z, n, 2e-6);
    ops_call(t, be->geglu_backward(be, g_, u_, dz_, g_, u_, n), "geglu_backward"); /* in place */
    r.z = NULL;
    if (ops_is(t, "grad")) {
        ops_gradient(t, "dgate", g, ops_fetch(t, g_, be->activation_dtype, n), n, 1e-5, ref_geglu, &r, 1e-5);
        ops_gradient(t, "dup", u, ops_fetch(t, u_, be->activation_dtype, n), n, 1e-5, ref_geglu, &r, 1e-5);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        double k = sqrt(2 / acos(-1)), th = tanh(k * (g[i] + 0.044715 * g[i] * g[i] * g[i]));
        dg[i] = dz[i] * u[i] * (0.5 * (1 + th) + 0.5 * g[i] * (1 - th * th) * k * (1 + 3 * 0.044715 * g[i] * g[i]));
        du[i] = dz[i] * 0.5 * g[i] * (1 + th);
    }
    ops_near_act(t, "dgate", g_, dg, n, 2e-6);
    ops_near_act(t, "dup", u_, du, n, 2e-6);
}

/* n[1] 0: Y = X + s Z; 1: Y = s Z; 2: Y = Y + s Z; 3: Z = X + s Z */
static void ops_residual(ops *t, const ops_case *c)
{
    int64_t n = c->n[0], kind = c->n[1];
    double *x = ops_random(t, n, 1), *z = ops_random(t, n, 1), *y = ops_doubles(t, n), s = -0.375;
    void *x_ = ops_act(t, x, n), *z_ = ops_act(t, z, n), *y_ = kind == 2 ? x_ : kind == 3 ? z_ : ops_act_out(t, n);
    for (int64_t i = 0; i < n; i++) y[i] = (kind == 1 ? 0 : x[i]) + s * z[i];
    ops_call(t, t->be->residual(t->be, y_, kind == 1 ? NULL : x_, z_, (float)s, n), "residual");
    ops_near_act(t, "y", y_, y, n, 1e-6);
}

static void ops_shift(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    double *y = ops_random(t, n, 1);
    float *y_ = (float *)ops_float(t, y, n);
    for (int64_t i = 0; i < n; i++) y[i] += 1;
    ops_call(t, t->be->shift(t->be, y_, 1.0f, n), "shift");
    ops_near(t, "y", ops_fetch(t, y_, BESA_F32, n), y, n, 1e-6);
}

/* n[1]: the cap; values from far below to far above it */
static void ops_softcap(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    double cap = (double)c->n[1], *y = ops_random(t, n, 1), scale = 0.75;
    float *y_;
    for (int64_t i = 0; i < n; i++) y[i] *= pow(10, (double)(i % 7) - 3);
    if (n > 2) y[0] = 0, y[1] = -3000;
    y_ = (float *)ops_float(t, y, n);
    ops_call(t, t->be->softcap(t->be, y_, (float)scale, (float)cap, n), "softcap");
    double *got = ops_fetch(t, y_, BESA_F32, n), worst = 0;
    for (int64_t i = 0; i < n; i++) {
        double want = cap != 0 ? cap * tanh(scale * y[i] / cap) : scale * y[i], error = fabs(got[i] - want);
        if (!(error <= worst * (fabs(want) + 1e-30))) worst = error / (fabs(want) + 1e-30);
    }
    if (!(worst < 4e-7)) ops_fail(t, "softcap", worst, 4e-7);
}

/* ---- statistics and loss ------------------------------------------------------------------- */

static void ops_sumsq(ops *t, const ops_case *c)
{
    int64_t T = c->n[0], d = c->n[1];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, d, T);
    double *x = ops_random(t, T * d, 1), *out = ops_random(t, d, 1);
    void *x_ = ops_act(t, x, T * d);
    float *out_ = (float *)ops_float(t, out, d);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, (double)(T * d) * (double)besa_dtype_size(be->activation_dtype), "GB/s",
                 ops_call(t, be->column_sumsq(be, out_, x_, T, d), ""));
        return;
    }
    for (int64_t i = 0; i < T * d; i++) out[i % d] += x[i] * x[i];
    ops_call(t, be->column_sumsq(be, out_, x_, T, d), "column_sumsq");
    ops_near(t, "column_sumsq", ops_fetch(t, out_, BESA_F32, d), out, d, 1e-6);
}

/* n[2] 0: of a bias; 1: of a norm's weight */
static void ops_column_sum(ops *t, const ops_case *c)
{
    int64_t n = c->n[0], d = c->n[1];
    int norm = c->n[2] != 0;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, d, n);
    double *dy = ops_random(t, n * d, 1), *x = ops_random(t, n * d, 1), *r = ops_random(t, n, 1), *out = ops_random(t, d, 1);
    void *dy_ = ops_act(t, dy, n * d), *x_ = norm ? ops_act(t, x, n * d) : NULL;
    float *r_ = norm ? (float *)ops_float(t, r, n) : NULL, *out_ = (float *)ops_float(t, out, d);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, (double)(n * d * (norm ? 2 : 1)) * (double)besa_dtype_size(be->activation_dtype), "GB/s",
                 ops_call(t, be->column_sum(be, out_, dy_, x_, r_, n, d), ""));
        return;
    }
    for (int64_t i = 0; i < n * d; i++) out[i % d] += norm ? dy[i] * x[i] * r[i / d] : dy[i];
    ops_call(t, be->column_sum(be, out_, dy_, x_, r_, n, d), "column_sum");
    ops_near(t, "column_sum", ops_fetch(t, out_, BESA_F32, d), out, d, 1e-6);
}

typedef struct ref_los {
    const double *y, *yref, *norm2;
    int64_t T, d;
    double scale;
} ref_los;

static double ref_loss(const void *user)
{
    const ref_los *r = (const ref_los *)user;
    double sum = 0;
    for (int64_t i = 0; i < r->T * r->d; i++)
        if (r->norm2[i % r->d] > 0) sum += (r->yref[i] - r->y[i]) * (r->yref[i] - r->y[i]) / r->norm2[i % r->d];
    return r->scale / (double)r->d * sum;
}

static void ops_loss(ops *t, const ops_case *c)
{
    int64_t T = c->n[0], d = c->n[1], n = T * d;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, d, T);
    double *y = ops_random(t, n, 1), *yref = ops_random(t, n, 1), *norm2 = ops_random(t, d, 1), *dy = ops_doubles(t, n);
    double one[1] = {1.5}, want;
    void *y_ = ops_act(t, y, n), *yref_ = ops_act(t, yref, n);
    float *norm2_, *loss_ = (float *)ops_float(t, one, 1);
    ref_los r = {y, yref, norm2, T, d, (double)0.7f};
    for (int64_t j = 0; j < d; j++) norm2[j] = j % 7 == 3 ? 0 : fabs(norm2[j]) + 0.1;
    norm2_ = (float *)ops_float(t, norm2, d);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        void *dy_ = ops_act_out(t, n);
        OPS_TIME(t, 3.0 * (double)n * (double)besa_dtype_size(be->activation_dtype), "GB/s",
                 ops_call(t, be->block_loss(be, loss_, dy_, y_, yref_, norm2_, 0.7f, T, d, 0), ""));
        return;
    }
    double *sum = ops_random(t, n, 1);
    void *sum_ = ops_act(t, sum, n);
    ops_call(t, be->block_loss(be, loss_, NULL, y_, yref_, norm2_, 0.7f, T, d, 0), "block_loss");
    ops_call(t, be->block_loss(be, loss_, sum_, y_, yref_, norm2_, 0.7f, T, d, 1), "block_loss");
    ops_call(t, be->block_loss(be, loss_, y_, y_, yref_, norm2_, 0.7f, T, d, 0), "block_loss");
    want = 1.5 + 3 * ref_loss(&r);
    ops_near(t, "block_loss", ops_fetch(t, loss_, BESA_F32, 1), &want, 1, 1e-6);
    if (ops_is(t, "grad"))
        ops_gradient(t, "dy", y, ops_fetch(t, y_, be->activation_dtype, n), n, 1e-5, ref_loss, &r, 1e-5);
    for (int64_t i = 0; i < n; i++)
        dy[i] = norm2[i % d] > 0 ? 2 * r.scale / (double)d * (y[i] - yref[i]) / norm2[i % d] : 0;
    ops_near_act(t, "dy", y_, dy, n, 1e-6);
    for (int64_t i = 0; i < n; i++) sum[i] += dy[i];
    ops_near_act(t, "dy added", sum_, sum, n, 1e-6);
}

/* ---- sparsity ------------------------------------------------------------------------------ */

/* random weights with zeros of both signs and repeated values */
static double *ops_weights(ops *t, int64_t n)
{
    double *w = ops_random(t, n, 1);
    for (int64_t i = 0; i < n; i++) {
        if (i % 11 == 3) w[i] = i % 2 ? 0.0 : -0.0;
        if (i % 13 == 5) w[i] = 0.25;
    }
    return w;
}

static void ops_score(ops *t, const ops_case *c)
{
    static const float exponents[3] = {-2.0f, -1.0f, 0.5f};
    int64_t R = c->n[0], C = c->n[1];
    int power = (int)c->n[2], scaled = (int)c->n[3];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 0);
    double *w = ops_weights(t, R * C), *scale = ops_random(t, C, 1), *s = ops_doubles(t, R * C), *powers = ops_doubles(t, C);
    int32_t *zeros = (int32_t *)ops_host(t, (size_t)R * 4), special[1] = {7}, fill[3] = {-5, -5, -5};
    void *w_, *zeros_ = ops_device(t, (size_t)R * 4), *special_ = ops_put(t, special, 4), *fill_ = ops_device(t, 12);
    float *scale_, *s_ = ops_float_out(t, R * C);
    for (int64_t j = 0; j < C; j++) scale[j] = fabs(scale[j]) + 0.1;
    scale_ = (float *)ops_float(t, scale, C);
    w_ = ops_send(t, w, c->dtype, R * C);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        double bytes = (double)besa_dtype_size(c->dtype) * (double)(R * C);
        if (c->n[4]) OPS_TIME(t, bytes, "GB/s", ops_call(t, be->count_zeros(be, (int32_t *)zeros_, (int32_t *)special_, w_, c->dtype, R, C), ""));
        else OPS_TIME(t, bytes + 4.0 * (double)(R * C), "GB/s", ops_call(t, be->score(be, s_, w_, c->dtype, scale_, power, R, C), ""));
        return;
    }
    for (int64_t i = 0; i < R * C; i++) {
        s[i] = w[i] == 0 ? -1 : pow(fabs(w[i]), power) * (scaled ? scale[i % C] : 1);
        zeros[i / C] += w[i] == 0;
    }
    ops_call(t, be->score(be, s_, w_, c->dtype, scaled ? scale_ : NULL, power, R, C), "score");
    ops_near(t, "score", ops_fetch(t, s_, BESA_F32, R * C), s, R * C, 3e-7);
    ops_call(t, be->count_zeros(be, (int32_t *)zeros_, (int32_t *)special_, w_, c->dtype, R, C), "count_zeros");
    ops_same(t, "zeros", zeros_, zeros, (size_t)R * 4);
    ops_same(t, "not finite", special_, special, 4);
    w[R * C - 1] = (double)NAN, w[0] = -(double)INFINITY; /* one of each */
    special[0] += R * C > 1 ? 2 : 1;
    w_ = ops_send(t, w, c->dtype, R * C);
    ops_call(t, be->count_zeros(be, (int32_t *)zeros_, (int32_t *)special_, w_, c->dtype, R, C), "count_zeros");
    ops_same(t, "not finite", special_, special, 4);
    ops_call(t, be->fill(be, (int32_t *)fill_, -5, 3), "fill");
    ops_same(t, "fill", fill_, fill, 12);
    for (int64_t j = 2; j < C; j += 5) scale[j] = (double)INFINITY;
    for (int k = 0; k < 3; k++) { /* columns of zeros under the root, dead ones in the others */
        for (int64_t j = 0; j < C; j++) {
            if (k == 2 && j % 5 == 2) scale[j] = 0;
            powers[j] = j % 5 == 2 ? 0 : pow(scale[j], (double)exponents[k]);
        }
        scale_ = (float *)ops_float(t, scale, C);
        ops_call(t, be->power(be, scale_, scale_, exponents[k], C), "power");
        ops_near(t, "power", ops_fetch(t, scale_, BESA_F32, C), powers, C, 1e-6);
    }
}

/* Sums in double of products in float, and counts above a limit that is one of these products. */
static void ops_score_rows(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 0);
    double *w = ops_weights(t, R * C), *scale = ops_random(t, C, 1), *sums = ops_doubles(t, R), *got = ops_doubles(t, R);
    int32_t *above = (int32_t *)ops_host(t, (size_t)R * 4);
    void *w_, *sums_ = ops_device(t, (size_t)R * 8), *above_ = ops_device(t, (size_t)R * 4);
    float *scale_, limit;
    for (int64_t j = 0; j < C; j++) scale[j] = j % 17 == 6 ? 0 : fabs(scale[j]) + 0.1;
    scale_ = (float *)ops_float(t, scale, C);
    w_ = ops_send(t, w, c->dtype, R * C);
    limit = (float)fabs(w[7 % (R * C)]) * (float)scale[7 % C];
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, (double)besa_dtype_size(c->dtype) * (double)(R * C), "GB/s", ops_call(t, be->score_rows(be, (double *)sums_, (int32_t *)above_, w_, c->dtype, scale_, limit, R, C), ""));
        return;
    }
    for (int64_t i = 0; i < R * C; i++) {
        float score = (float)fabs(w[i]) * (float)scale[i % C];
        sums[i / C] += (double)score;
        above[i / C] += score > limit;
    }
    ops_call(t, be->score_rows(be, (double *)sums_, NULL, w_, c->dtype, scale_, 0, R, C), "score_rows");
    ops_get(t, got, sums_, (size_t)R * 8);
    ops_near(t, "sums", got, sums, R, 1e-14);
    ops_call(t, be->score_rows(be, NULL, (int32_t *)above_, w_, c->dtype, scale_, limit, R, C), "score_rows");
    ops_same(t, "above", above_, above, (size_t)R * 4);
    for (int64_t r = 0; r < R; r++) above[r] = -1;
    above_ = ops_put(t, above, (size_t)R * 4);
    memset(above, 0, (size_t)R * 4);
    for (int64_t i = 0; i < R * C; i++) above[i / C] += (float)fabs(w[i]) * (float)scale[i % C] > 0.0f;
    ops_call(t, be->score_rows(be, (double *)sums_, (int32_t *)above_, w_, c->dtype, scale_, 0, R, C), "score_rows");
    ops_same(t, "above 0", above_, above, (size_t)R * 4);
    ops_get(t, got, sums_, (size_t)R * 8);
    ops_near(t, "sums beside counts", got, sums, R, 1e-14);
    w[R * C - 1] = (double)NAN;
    w_ = ops_send(t, w, c->dtype, R * C);
    ops_call(t, be->score_rows(be, (double *)sums_, NULL, w_, c->dtype, scale_, 0, R, C), "score_rows");
    ops_get(t, got, sums_, (size_t)R * 8);
    if (got[R - 1] == got[R - 1]) ops_fail(t, "a sum with a NaN", got[R - 1], 0);
}

static const float *ops_sort_keys;
static int ops_sort_compare(const void *a, const void *b)
{
    int64_t i = *(const int64_t *)a, j = *(const int64_t *)b;
    if (ops_sort_keys[i] < ops_sort_keys[j]) return -1;
    if (ops_sort_keys[i] > ops_sort_keys[j]) return 1;
    return i < j ? -1 : i > j;
}

/* order (n) = positions of keys, ascending and stable */
static void ref_sort(const float *keys, int64_t n, int64_t *order)
{
    for (int64_t i = 0; i < n; i++) order[i] = i;
    ops_sort_keys = keys;
    qsort(order, (size_t)n, sizeof *order, ops_sort_compare);
}

/* scores as they come: -1 for zeros, ties near and far, a negative number, both zeros */
static float *ops_scores(ops *t, int64_t n)
{
    float *s = ops_floats(t, n);
    for (int64_t i = 0; i < n; i++) {
        double x = ops_uniform(t);
        s[i] = (float)fabs(x);
        if (i % 17 == 1) s[i] = -1.0f;
        if (i % 19 == 4) s[i] = 0.5f;
        if (i % 23 == 6) s[i] = i % 2 ? -0.0f : 0.0f;
        if (i % 29 == 8) s[i] = (float)(1e-30 * x);
        if (i % 13 > 9) s[i] = s[i - 1];        /* the same three times in a row */
    }
    return s;
}

static void ops_write_rank(void *rank, int64_t C, int64_t i, int64_t value)
{
    if (C > 65536) ((uint32_t *)rank)[i] = (uint32_t)value;
    else ((uint16_t *)rank)[i] = (uint16_t)value;
}

static void *ops_ranks(ops *t, const float *s, int64_t R, int64_t C, size_t *bytes)
{
    int64_t *order = (int64_t *)ops_host(t, (size_t)C * sizeof *order);
    void *rank = ops_host(t, *bytes = (size_t)(R * C) * (C > 65536 ? 4 : 2));
    for (int64_t r = 0; r < R; r++) {
        ref_sort(s + r * C, C, order);
        for (int64_t j = 0; j < C; j++) ops_write_rank(rank, C, r * C + order[j], j);
    }
    return rank;
}

static void ops_rank(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 0);
    float *s = ops_scores(t, R * C), *s_ = (float *)ops_put(t, s, (size_t)(R * C) * 4);
    size_t bytes;
    void *rank = ops_ranks(t, s, R, C, &bytes), *rank_ = ops_device(t, bytes);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, 6.0 * (double)(R * C), "GB/s", ops_call(t, be->rank_rows(be, rank_, s_, R, C), ""));
        return;
    }
    ops_call(t, be->rank_rows(be, rank_, s_, R, C), "rank_rows");
    ops_same(t, "rank_rows", rank_, rank, bytes);
}

/* weights as stored, and a masked copy */
static void ops_zero(unsigned char *w, besa_dtype dtype, int64_t i)
{
    memset(w + (size_t)i * besa_dtype_size(dtype), 0, besa_dtype_size(dtype));
}

static void ops_mask(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 0);
    size_t bytes, wide = (size_t)(R * C) * besa_dtype_size(c->dtype);
    double *w = ops_weights(t, R * C);
    float *s = ops_scores(t, R * C), *s_ = (float *)ops_put(t, s, (size_t)(R * C) * 4);
    void *rank = ops_ranks(t, s, R, C, &bytes), *rank_ = ops_put(t, rank, bytes), *w_ = ops_send(t, w, c->dtype, R * C);
    void *out_ = ops_device(t, wide), *n_, *before_;
    int32_t *n = (int32_t *)ops_host(t, (size_t)R * 4);
    unsigned char *raw = (unsigned char *)ops_host(t, wide), *want = (unsigned char *)ops_host(t, wide);
    int64_t *order = (int64_t *)ops_host(t, (size_t)(R * C) * sizeof *order);
    for (int64_t r = 0; r < R; r++)
        n[r] = (int32_t)(r % 3 == 0 ? C / 2 : r % 3 == 1 ? (r % 2 ? C : 0) : (int64_t)(0.3 * (double)C));
    n_ = ops_put(t, n, (size_t)R * 4);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        double traffic = (double)(R * C) * (2 + 2 * (double)besa_dtype_size(c->dtype));
        if (c->n[2] == 1)
            OPS_TIME(t, 8.0 * (double)(R * C), "GB/s", ops_call(t, be->mask_smallest(be, out_, w_, c->dtype, s_, R * C / 2, R, C), ""));
        else if (c->n[2] == 2)
            OPS_TIME(t, 8.0 * (double)(R * C), "GB/s", ops_call(t, be->mask_pattern(be, out_, w_, c->dtype, s_, 2, 4, R, C), ""));
        else OPS_TIME(t, traffic, "GB/s", ops_call(t, be->mask_apply(be, out_, w_, c->dtype, rank_, (const int32_t *)n_, R, C), ""));
        return;
    }
    ops_get(t, raw, w_, wide);
    memcpy(want, raw, wide);
    for (int64_t i = 0; i < R * C; i++) {
        int64_t k = C > 65536 ? (int64_t)((uint32_t *)rank)[i] : (int64_t)((uint16_t *)rank)[i];
        if (k < n[i / C]) ops_zero(want, c->dtype, i);
    }
    ops_call(t, be->mask_apply(be, out_, w_, c->dtype, rank_, (const int32_t *)n_, R, C), "mask_apply");
    ops_same(t, "mask_apply", out_, want, wide);
    before_ = ops_put(t, n, (size_t)R * 4);
    for (int64_t r = 0; r < R; r++) n[r] = (int32_t)(r % 4 == 0 ? n[r] : r % 4 == 1 ? n[r] / 2 : r % 4 == 2 ? (n[r] + C) / 2 : C);
    n_ = ops_put(t, n, (size_t)R * 4);
    memcpy(want, raw, wide);
    for (int64_t i = 0; i < R * C; i++) {
        int64_t k = C > 65536 ? (int64_t)((uint32_t *)rank)[i] : (int64_t)((uint16_t *)rank)[i];
        if (k < n[i / C]) ops_zero(want, c->dtype, i);
    }
    ops_call(t, be->mask_update(be, out_, w_, c->dtype, rank_, (const int32_t *)n_, (int32_t *)before_, R, C), "mask_update");
    ops_same(t, "mask_update", out_, want, wide);
    ops_same(t, "mask_update: before", before_, n, (size_t)R * 4);
    ref_sort(s, R * C, order);
    for (int k = 0; k < 5; k++) { /* among them: within the equal scores, none, all */
        const int64_t counts[5] = {R * C * 3 / 5, R * C / 40, 0, R * C, 1};
        memcpy(want, raw, wide);
        for (int64_t i = 0; i < counts[k]; i++) ops_zero(want, c->dtype, order[i]);
        ops_call(t, be->mask_smallest(be, out_, w_, c->dtype, s_, counts[k], R, C), "mask_smallest");
        ops_same(t, "mask_smallest", out_, want, wide);
    }
    for (int k = 0; k < 5; k++) {
        static const int patterns[5][2] = {{2, 4}, {1, 2}, {3, 4}, {5, 8}, {2, 3}};
        int less = patterns[k][0], m = patterns[k][1];
        if (C % m != 0) continue;
        memcpy(want, raw, wide);
        for (int64_t i = 0; i < R * C; i += m) {
            ref_sort(s + i, m, order);
            for (int q = 0; q < less; q++) ops_zero(want, c->dtype, i + order[q]);
        }
        ops_call(t, be->mask_pattern(be, out_, w_, c->dtype, s_, less, m, R, C), "mask_pattern");
        ops_same(t, "mask_pattern", out_, want, wide);
    }
    memcpy(want, raw, wide);
    for (int64_t i = 0; i < R * C; i++) {
        int64_t k = C > 65536 ? (int64_t)((uint32_t *)rank)[i] : (int64_t)((uint16_t *)rank)[i];
        if (k < n[i / C]) ops_zero(want, c->dtype, i);
    }
    ops_call(t, be->mask_apply(be, w_, w_, c->dtype, rank_, (const int32_t *)n_, R, C), "mask_apply"); /* in place */
    ops_same(t, "mask_apply in place", w_, want, wide);
}

static void ops_bucket(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1], D = c->n[2];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 0);
    double *w = ops_weights(t, R * C), *dw = ops_random(t, R * C, 1), *sums = ops_random(t, R * D, 1);
    float *s = ops_scores(t, R * C), *dw_ = (float *)ops_float(t, dw, R * C), *sums_ = (float *)ops_float(t, sums, R * D);
    size_t bytes;
    void *rank = ops_ranks(t, s, R, C, &bytes), *rank_ = ops_put(t, rank, bytes), *w_ = ops_send(t, w, c->dtype, R * C);
    uint16_t *bucket = (uint16_t *)ops_host(t, (size_t)C * 2), *bucket_;
    for (int64_t j = 0; j < C; j++)
        for (int64_t d = 0; d < D; d++)
            if (j < ((D - d) * C) / D) bucket[j] = (uint16_t)d;
    bucket_ = (uint16_t *)ops_put(t, bucket, (size_t)C * 2);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, (double)(R * C) * (6 + (double)besa_dtype_size(c->dtype)), "GB/s",
                 ops_call(t, be->bucket_gradient(be, sums_, dw_, BESA_F32, w_, c->dtype, rank_, bucket_, R, C, D), ""));
        return;
    }
    for (int64_t i = 0; i < R * C; i++) {
        int64_t k = C > 65536 ? (int64_t)((uint32_t *)rank)[i] : (int64_t)((uint16_t *)rank)[i];
        sums[i / C * D + bucket[k]] += dw[i] * w[i];
    }
    ops_call(t, be->bucket_gradient(be, sums_, dw_, BESA_F32, w_, c->dtype, rank_, bucket_, R, C, D), "bucket_gradient");
    ops_near(t, "bucket_gradient", ops_fetch(t, sums_, BESA_F32, R * D), sums, R * D, 2e-6);
    if (be->gradient_dtype == BESA_F32) return;
    double *rounded = ops_doubles(t, R * C);
    memcpy(rounded, dw, (size_t)(R * C) * sizeof *rounded);
    void *short_ = ops_send(t, rounded, be->gradient_dtype, R * C); /* which rounds them */
    for (int64_t i = 0; i < R * C; i++) {
        int64_t k = C > 65536 ? (int64_t)((uint32_t *)rank)[i] : (int64_t)((uint16_t *)rank)[i];
        sums[i / C * D + bucket[k]] += rounded[i] * w[i];
    }
    ops_call(t, be->bucket_gradient(be, sums_, short_, be->gradient_dtype, w_, c->dtype, rank_, bucket_, R, C, D), "bucket_gradient");
    ops_near(t, "bucket_gradient, rounded", ops_fetch(t, sums_, BESA_F32, R * D), sums, R * D, 4e-6); /* twice as many */
}

typedef struct ref_rat {
    const besa_rate_shape *s;
    const double *layer, *row, *sums;  /* sums (R,D) */
    double *alpha, *beta;              /* (G), (D+1) */
    double lambda, target;             /* penalty lambda ((S - t) / t)^2, S = mean alpha */
} ref_rat;

/* The loss whose gradient the rates take: - sum of beta_gd times the bucket sums, and the penalty. */
static double ref_rates(const void *user)
{
    const ref_rat *r = (const ref_rat *)user;
    const besa_rate_shape *s = r->s;
    int64_t D = s->logits - 1, G = (s->rows + s->group_rows - 1) / s->group_rows;
    double loss = 0, mean = 0;
    for (int64_t g = 0; g < G; g++) {
        double sum = 0, most = -1e300;
        r->alpha[g] = 0;
        for (int64_t d = 0; d <= D; d++) {
            double a = r->layer ? r->layer[d] : 0, b = r->row ? r->row[g * (D + 1) + d] : 0;
            if (!s->plain) a = 1 / (1 + exp(-a)) - 0.5, b = 1 / (1 + exp(-b)) - 0.5;
            r->beta[d] = (double)s->tilt * (1 - (double)d / (double)D) + (double)s->layer_scale * a + (double)s->row_scale * b;
            most = r->beta[d] > most ? r->beta[d] : most;
        }
        for (int64_t d = 0; d <= D; d++) sum += r->beta[d] = exp(r->beta[d] - most);
        for (int64_t d = 0; d <= D; d++) {
            r->beta[d] /= sum;
            r->alpha[g] += r->beta[d] * (1 - (double)d / (double)D);
            for (int64_t q = g * s->group_rows; q < s->rows && q < (g + 1) * s->group_rows; q++)
                for (int64_t b = d; b < D; b++) loss -= r->beta[d] * r->sums[q * D + b];
        }
        mean += r->alpha[g] * (double)((g + 1) * s->group_rows < s->rows ? s->group_rows : s->rows - g * s->group_rows) / (double)s->rows;
    }
    return loss + r->lambda * (mean - r->target) * (mean - r->target) / r->target / r->target;
}

static void ops_rates(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1], D = c->n[2], G = (R + c->n[3] - 1) / c->n[3];
    int form = (int)c->n[4], plain = c->n[5] != 0; /* form: 0 both, 1 rows, 2 layer; n[5] 2: rows at rates of 0 and 1 */
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 0);
    besa_rate_shape s = {R, C, c->n[3], D + 1, 0.7f, form == 1 ? 0.0f : 1.5f, form == 2 ? 0.0f : 0.5f, plain};
    double *layer = ops_random(t, D + 1, 2), *row = ops_random(t, G * (D + 1), 2), *sums = ops_random(t, R * D, 1e-3);
    double *grad_row, *grad_layer, mean = 0, first, share = 0.25, zero[1] = {0.125}, *rate = ops_doubles(t, R);
    float *layer_ = (float *)ops_float(t, layer, D + 1), *row_;
    float *sums_ = (float *)ops_float(t, sums, R * D), *alpha_ = ops_float_out(t, R), *mean_ = (float *)ops_float(t, zero, 1);
    float *dlayer_ = ops_float_out(t, D + 1), *drow_ = ops_float_out(t, G * (D + 1));
    int32_t *zeros = (int32_t *)ops_host(t, (size_t)R * 4), *zeros_, *n = (int32_t *)ops_host(t, (size_t)R * 4);
    int32_t *n_ = (int32_t *)ops_device(t, (size_t)R * 4);
    ref_rat r = {&s, form == 1 ? NULL : layer, form == 2 ? NULL : row, sums, NULL, NULL, 0.3, 0.5};
    besa_penalty penalty;
    double *alpha;
    for (int64_t g = 0; c->n[5] == 2 && g < G; g++) row[g * (D + 1) + (g % 2 ? D : 0)] = 1000;
    row_ = (float *)ops_float(t, row, G * (D + 1));
    zeros[R - 1] = (int32_t)C;
    zeros_ = (int32_t *)ops_put(t, zeros, (size_t)R * 4);
    r.alpha = ops_doubles(t, G), r.beta = ops_doubles(t, D + 1);
    ops_workspace(t, &sizes);
    ref_rates(&r);
    ops_call(t, be->rate_forward(be, alpha_, n_, form == 1 ? NULL : layer_, form == 2 ? NULL : row_, zeros_, &s), "rate_forward");
    alpha = ops_fetch(t, alpha_, BESA_F32, R);
    for (int64_t i = 0; i < R; i++) rate[i] = r.alpha[i / s.group_rows];
    ops_near(t, "alpha", alpha, rate, R, 3e-7);
    for (int64_t i = 0; i < R; i++) {
        n[i] = (int32_t)floorf((float)alpha[i] * (float)C);
        if (n[i] < zeros[i]) n[i] = zeros[i];
        mean += alpha[i] / (double)R;
    }
    ops_same(t, "n", n_, n, (size_t)R * 4);
    ops_call(t, be->rate_mean(be, mean_, alpha_, (float)share, 1, R), "rate_mean");
    first = share * mean, mean = zero[0] + share * mean;
    ops_near(t, "mean", ops_fetch(t, mean_, BESA_F32, 1), &mean, 1, 1e-6);
    ops_call(t, be->rate_mean(be, mean_, alpha_, (float)share, 0, R), "rate_mean");
    ops_near(t, "mean of the first layer", ops_fetch(t, mean_, BESA_F32, 1), &first, 1, 1e-6);
    mean = 0;
    for (int64_t i = 0; i < R; i++) mean += rate[i] / (double)R;
    mean_ = (float *)ops_float(t, &mean, 1);
    penalty.mean = mean_, penalty.coefficient = (float)(2 * r.lambda / r.target / r.target), penalty.target = (float)r.target;
    if (ops_is(t, "perf")) {
        double bytes = 4.0 * (double)(G * (D + 1));
        if (c->dtype == BESA_F32) OPS_TIME(t, bytes, "GB/s", ops_call(t, be->rate_forward(be, alpha_, n_, layer_, row_, zeros_, &s), ""));
        else OPS_TIME(t, 3 * bytes, "GB/s", ops_call(t, be->rate_backward(be, dlayer_, drow_, sums_, layer_, row_, &penalty, &s), ""));
        return;
    }
    ops_call(t, be->rate_backward(be, form == 1 ? NULL : dlayer_, form == 2 ? NULL : drow_, sums_,
                                  form == 1 ? NULL : layer_, form == 2 ? NULL : row_, &penalty, &s), "rate_backward");
    if (form != 1) {
        grad_layer = ops_fetch(t, dlayer_, BESA_F32, D + 1);
        ops_gradient(t, "dtheta_layer", layer, grad_layer, D + 1, 1e-4, ref_rates, &r, 1e-4);
    }
    if (form != 2) {
        grad_row = ops_fetch(t, drow_, BESA_F32, G * (D + 1));
        ops_gradient(t, "dtheta_row", row, grad_row, G * (D + 1), 1e-4, ref_rates, &r, 1e-4);
    }
}

/* n (R) from the definition: exact for one shift, then one each to the largest rests. Returns the rows' sum of least
 * beyond count, -1 for a rate that is not finite. */
static int64_t ref_project(ops *t, int32_t *n, const float *alpha, const int32_t *least, const int32_t *columns, int64_t count,
                           int64_t R)
{
    double low = -60, high = 60, *exact = ops_doubles(t, R);
    int64_t sum = 0, total = 0;
    for (int64_t r = 0; r < R; r++)
        if (columns[r] && !isfinite(alpha[r])) return -1;
    for (int64_t r = 0; r < R; r++) sum += columns[r] ? least[r] : 0;
    if (sum > count) return sum - count;
    for (int i = 0; i <= 80; i++) {
        double shift = i < 80 ? 0.5 * (low + high) : low;
        sum = 0;
        for (int64_t r = 0; r < R; r++) {
            double p = fmin(fmax((double)alpha[r], 1e-7), 1 - 1e-7);
            if (!columns[r]) continue;
            exact[r] = (double)columns[r] / (1 + exp(-(log(p / (1 - p)) + shift)));
            n[r] = (int32_t)fmin(fmax(floor(exact[r]), (double)least[r]), (double)columns[r]);
            sum += n[r];
        }
        total = sum;
        *(sum <= count ? &low : &high) = shift;
    }
    for (int64_t r = 0; r < R; r++) exact[r] -= n[r];
    for (int64_t best; total < count; total++) {        /* rows that have had theirs come behind all others */
        best = -1;
        for (int64_t r = 0; r < R; r++)
            if (columns[r] && n[r] < columns[r] && (best < 0 || exact[r] > exact[best])) best = r;
        if (best < 0) break;
        n[best]++;
        exact[best] -= 1e6;
    }
    return 0;
}

static void ops_project(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1], kind = c->n[3], total = 0, excess = 77, want;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, 1, 0);
    double *rate = ops_random(t, R, 0.4), target = (double)c->n[2] / 1000;
    float *alpha = ops_floats(t, R), *alpha_;
    int32_t *least = (int32_t *)ops_host(t, (size_t)R * 4), *columns = (int32_t *)ops_host(t, (size_t)R * 4);
    int32_t *n = (int32_t *)ops_host(t, (size_t)R * 4), *n_, *least_, *columns_;
    int64_t *excess_ = (int64_t *)ops_put(t, &excess, sizeof excess);
    for (int64_t r = 0; r < R; r++) {
        alpha[r] = kind == 1 ? 0.5f : (float)(0.5 + rate[r]);               /* 1: all the same */
        if (kind == 5) alpha[r] = 0.25f + 0.125f * (float)(r * 7 % 5);      /* 5: five rates, each of many rows */
        columns[r] = kind == 2 && r % 3 == 1 ? 0 : (int32_t)(C + (kind ? 0 : r % 7)); /* 2: rows that are left out */
        least[r] = kind >= 2 && kind < 5 && r % 5 == 0 ? (int32_t)(C * (kind == 3 ? 1 : 0.6)) : 0; /* 3: too many zeros */
        n[r] = 123;
        total += columns[r];
    }
    if (kind == 4) alpha[R / 2] = NAN;
    int64_t count = (int64_t)floor(target * (double)total + 0.5);
    sizes.projected_rows = R;
    alpha_ = (float *)ops_put(t, alpha, (size_t)R * 4), least_ = (int32_t *)ops_put(t, least, (size_t)R * 4);
    columns_ = (int32_t *)ops_put(t, columns, (size_t)R * 4), n_ = (int32_t *)ops_put(t, n, (size_t)R * 4);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, 80.0 * 12.0 * (double)R, "GB/s",
                 ops_call(t, be->project_counts(be, n_, excess_, alpha_, least_, columns_, count, R), ""));
        return;
    }
    want = ref_project(t, n, alpha, least, columns, count, R);
    ops_call(t, be->project_counts(be, n_, excess_, alpha_, least_, columns_, count, R), "project_counts");
    ops_same(t, "excess", excess_, &want, sizeof want);
    ops_same(t, "n", n_, n, (size_t)R * 4);
}

/* Adam on the weights that are not masked; n[1] 1: weights near the dtype's smallest, which must not become 0; n[2] 1: there
 * is no mask, and what is 0 moves too */
static void ops_weight_step(ops *t, const ops_case *c)
{
    enum { STEPS = 5 };
    int64_t n = c->n[0], wrong = 0;
    int free = c->n[2] != 0;
    double scale = c->n[1] ? c->dtype == BESA_F16 ? 3e-7 : 1e-37 : 1, unit = c->n[1] ? 2 * scale : 0.25;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, 1, 0);
    besa_weight_step o;
    double *w = ops_random(t, n, scale), *w0 = ops_doubles(t, n), *m = ops_doubles(t, n), *v = ops_doubles(t, n), *got, *masked;
    double *what = ops_doubles(t, n), *g = ops_doubles(t, n), *source;
    float *grad_ = ops_float_out(t, n), *gf = ops_floats(t, n);
    for (int64_t i = 0; i < n; i++) w[i] = ops_round(c->dtype, w[i]);
    for (int64_t i = 0; i < n && free; i += 3) w[i] = 0;
    for (int64_t i = 0; i < n; i++) what[i] = i % 3 == 1 ? i % 2 ? 0.0 : -0.0 : w[i];
    memcpy(w0, w, (size_t)n * sizeof *w);
    memset(&o, 0, sizeof o);
    o.lr = 0.1, o.beta1 = 0.9, o.beta2 = 0.99, o.eps = 1e-7, o.n = n, o.dtype = c->dtype, o.grad = grad_;
    o.w = (float *)ops_float(t, w, n), o.m = (float *)ops_float(t, m, n), o.v = (float *)ops_float(t, v, n);
    o.masked = free ? NULL : ops_send(t, what, c->dtype, n);
    o.source = free ? NULL : c->dtype == BESA_F32 ? (void *)o.w : ops_send(t, w, c->dtype, n);
    o.rms = (float *)ops_float(t, &unit, 1);
    ops_workspace(t, &sizes);
    for (o.step = 1; o.step <= STEPS; o.step++) {
        for (int64_t i = 0; i < n; i++) gf[i] = (float)(1e-4 * sin((double)(i + 3 * o.step)) + (i % 7 ? 1e-5 : 3e-4 * w[i] / scale));
        ops_call(t, be->upload(be, BESA_QUEUE_COMPUTE, grad_, gf, (size_t)n * 4), "upload");
        ops_call(t, be->weight_step(be, &o), "weight_step");
        for (int64_t i = 0; i < n; i++) {
            double m1, v1, w1;
            g[i] = (double)gf[i];
            m1 = o.beta1 * m[i] + (1 - o.beta1) * g[i], v1 = o.beta2 * v[i] + (1 - o.beta2) * g[i] * g[i];
            w1 = w[i] - o.lr * unit * m1 / (1 - pow(o.beta1, (double)o.step)) /
                 (sqrt(v1 / (1 - pow(o.beta2, (double)o.step))) + o.eps);
            if (!free && (what[i] == 0 || ops_round(c->dtype, w1) == 0)) continue;
            m[i] = m1, v[i] = v1, w[i] = w1;
        }
    }
    if (ops_is(t, "perf")) {
        OPS_TIME(t, (double)n * (c->dtype == BESA_F32 ? 36 : 34), "GB/s", ops_call(t, be->weight_step(be, &o), ""));
        return;
    }
    got = ops_fetch(t, o.w, BESA_F32, n), masked = free ? NULL : ops_fetch(t, o.masked, c->dtype, n);
    source = free ? NULL : ops_fetch(t, o.source, c->dtype, n);
    for (int64_t i = 0; i < n && free; i++) wrong += got[i] == w0[i], got[i] -= w0[i], w[i] -= w0[i];
    for (int64_t i = 0; i < n && !free; i++) {
        double rounded = ops_round(c->dtype, got[i]);
        wrong += source[i] != rounded || masked[i] != (what[i] == 0 ? what[i] : rounded) || (what[i] == 0 && got[i] != w0[i]);
        wrong += (masked[i] == 0) != (what[i] == 0);
        got[i] -= w0[i], w[i] -= w0[i];
    }
    if (wrong) ops_fail(t, "weights that are not as the mask and w have them", (double)wrong, 0);
    if (c->n[1]) return;                        /* whether a step ends at 0 is a matter of rounding */
    ops_near(t, "w", got, w, n, 1e-4);
    ops_near(t, "m", ops_fetch(t, o.m, BESA_F32, n), m, n, 1e-4);
    ops_near(t, "v", ops_fetch(t, o.v, BESA_F32, n), v, n, 1e-4);
}

static void ops_mask_zeros(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    double *w = ops_random(t, n, 1), *mask = ops_random(t, n, 1), *got;
    besa_workload sizes = ops_sizes(1, 1, 0);
    void *mask_, *w_;
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i % 3 == 0) mask[i] = i % 2 ? 0.0 : -0.0;
        if (i % 5 == 0) w[i] = -0.0;
    }
    mask_ = ops_send(t, mask, c->dtype, n), w_ = ops_send(t, w, c->dtype, n);
    ops_workspace(t, &sizes);
    ops_call(t, t->be->mask_zeros(t->be, mask_, w_, c->dtype, n), "mask_zeros");
    got = ops_fetch(t, mask_, c->dtype, n);
    for (int64_t i = 0; i < n; i++) {
        double want = mask[i] == 0 || w[i] == 0 ? 0.0 : w[i];
        wrong += got[i] != want || (want == 0 && signbit(got[i]));
    }
    if (wrong) ops_fail(t, "weights that are not as masked", (double)wrong, 0);
}

/* ---- quantisation -------------------------------------------------------------------------- */

typedef struct ref_grid {
    double *logit;                     /* (R,G,2) of the clips; NULL: they are 1 */
    const double *range, *dw, *w;      /* (R,G,2), (R,C), (R,C) */
    double *scale, *zero;              /* (R,G) */
    const double *held;                /* (R,C) round(W / h) as it is, NULL: to be worked out; with it the zero point is held too */
    int64_t rows, columns, group;
    int bits;
} ref_grid;

static int64_t ref_groups(const ref_grid *r) { return (r->columns + r->group - 1) / r->group; }

static void ref_scales(const ref_grid *r)
{
    for (int64_t i = 0; i < r->rows * ref_groups(r); i++) {
        double high = r->range[2 * i], low = r->range[2 * i + 1];
        if (r->logit) high /= 1 + exp(-r->logit[2 * i]), low /= 1 + exp(-r->logit[2 * i + 1]);
        r->scale[i] = (high - low) / (double)((1 << r->bits) - 1);
        if (!r->held) r->zero[i] = r->scale[i] > 0 ? -nearbyint(low / r->scale[i]) : 0;
        if (!(r->scale[i] > 0)) r->scale[i] = 0;
    }
}

/* <dW, What>; where rounding is held, a weight within the grid is W + h (round(W / h) - W / h) with W / h a variable and its
 * rounding passed straight through: then h d(W / h) + (round(W / h)) dh - W / h dh is what the operation's comment says. */
static double ref_quantized(const void *user)
{
    const ref_grid *r = (const ref_grid *)user;
    double sum = 0, most = (double)((1 << r->bits) - 1);
    ref_scales(r);
    for (int64_t i = 0; i < r->rows * r->columns; i++) {
        int64_t g = i / r->columns * ref_groups(r) + i % r->columns / r->group;
        double h = r->scale[g], z = r->zero[g], u;
        if (h == 0) continue;
        u = r->held[i] + z;
        sum += r->dw[i] * (u > 0 && u < most ? h * (r->held[i] - r->w[i] / r->held[r->rows * r->columns + g]) : h * (fmin(fmax(u, 0), most) - z));
    }
    return sum;
}

/* n: rows, columns, group, bits, 1 without clips, 2 a row of zeros and one of equal weights */
static void ops_quantize(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1], group = c->n[2], wrong = 0, far = 0;
    int bits = (int)c->n[3], bare = c->n[4] == 1;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 0);
    int64_t G = (C + group - 1) / group, groups = R * G;
    double *w = ops_random(t, R * C, 1), *range = ops_doubles(t, 2 * groups), *logit = ops_random(t, 2 * groups, 1), *got;
    double *dw = ops_random(t, R * C, 1), *dlogit = ops_random(t, 2 * groups, 1), *held = ops_doubles(t, R * C + groups);
    double *scale = ops_doubles(t, groups), *zero = ops_doubles(t, groups), most = (double)((1 << bits) - 1);
    ref_grid ref = {bare ? NULL : logit, range, dw, w, scale, zero, NULL, R, C, group, bits};
    besa_quantizer q = {bits, R, C, group, NULL, NULL, ops_float_out(t, groups), ops_float_out(t, groups)};
    void *w_, *what_ = ops_device(t, (size_t)(R * C) * besa_dtype_size(c->dtype));
    float *range_ = ops_float_out(t, 2 * groups), *dw_ = (float *)ops_float(t, dw, R * C), *dlogit_;
    for (int64_t i = 0; i < R * C; i++) w[i] = c->n[4] == 2 && i / C < 2 ? (double)(i / C) : w[i] * (i % 7 ? 0.3 : 1);
    for (int64_t i = 0; i < 2 * groups; i++) logit[i] += 2;
    w_ = ops_send(t, w, c->dtype, R * C);
    dlogit_ = (float *)ops_float(t, dlogit, 2 * groups);
    if (!bare) q.logit = (float *)ops_float(t, logit, 2 * groups);
    q.range = range_;
    ops_workspace(t, &sizes);
    for (int64_t i = 0; i < R * C; i++) {
        double *of = range + 2 * (i / C * G + i % C / group);
        of[0] = fmax(of[0], w[i]), of[1] = fmin(of[1], w[i]);
    }
    ops_call(t, be->quantize_range(be, range_, w_, c->dtype, group, R, C), "quantize_range");
    ops_call(t, be->quantize_grid(be, &q), "quantize_grid");
    if (ops_is(t, "perf")) {
        double width = (double)besa_dtype_size(c->dtype);
        if (c->n[4] == 3) OPS_TIME(t, (double)(R * C) * (4 + width), "GB/s", ops_call(t, be->quantize_gradient(be, dlogit_, dw_, w_, c->dtype, &q), ""));
        else OPS_TIME(t, (double)(R * C) * 2 * width, "GB/s", ops_call(t, be->quantize(be, what_, w_, c->dtype, &q), ""));
        return;
    }
    ops_near(t, "range", ops_fetch(t, range_, BESA_F32, 2 * groups), range, 2 * groups, 1e-30);
    ref_scales(&ref);
    ops_near(t, "scale", ops_fetch(t, q.scale, BESA_F32, groups), scale, groups, 1e-6);
    got = ops_fetch(t, q.zero, BESA_F32, groups);
    for (int64_t i = 0; i < groups; i++) /* a zero point half-way between two whole numbers may be either */
        wrong += got[i] != rint(got[i]) || fabs(got[i] - zero[i]) > 1 || got[i] < 0 || got[i] > most, far += got[i] != zero[i];
    if (wrong || far > 1 + groups / 100) ops_fail(t, "zero points that are wrong", (double)(wrong + far), 1);
    memcpy(zero, got, (size_t)groups * sizeof *zero);
    memcpy(scale, ops_fetch(t, q.scale, BESA_F32, groups), (size_t)groups * sizeof *scale);
    ops_call(t, be->quantize(be, what_, w_, c->dtype, &q), "quantize");
    got = ops_fetch(t, what_, c->dtype, R * C);
    wrong = far = 0;
    for (int64_t i = 0; i < R * C; i++) {
        int64_t g = i / C * G + i % C / group;
        float h = (float)scale[g];
        double place = h > 0 ? (double)((float)w[i] / h) : 0, u = fmin(fmax(rint(place) + zero[g], 0), most);
        held[i] = rint(place), held[R * C + g] = (double)h;
        wrong += got[i] != ops_round(c->dtype, (double)(h * (float)(u - zero[g]))) || (got[i] == 0 && signbit(got[i]));
    }
    if (wrong) ops_fail(t, "weights that are not on their level", (double)wrong, 0);
    if (bare) return;
    ref.held = held;
    for (int64_t i = 0; i < groups && !ops_is(t, "grad"); i++) { /* from the comment's formula */
        double sum = 0, g0 = 1 / (1 + exp(-logit[2 * i])), g1 = 1 / (1 + exp(-logit[2 * i + 1]));
        for (int64_t j = i % G * group; j < C && j < (i % G + 1) * group && scale[i] > 0; j++) {
            int64_t k = i / G * C + j;
            double u = held[k] + zero[i], place = w[k] / scale[i];
            sum += dw[k] * (u > 0 && u < most ? held[k] - place : fmin(fmax(u, 0), most) - zero[i]);
        }
        dlogit[2 * i] += sum * range[2 * i] * g0 * (1 - g0) / most, dlogit[2 * i + 1] -= sum * range[2 * i + 1] * g1 * (1 - g1) / most;
    }
    if (ops_is(t, "grad")) {
        ops_call(t, be->zero(be, BESA_QUEUE_COMPUTE, dlogit_, (size_t)(2 * groups) * 4), "zero");
        ops_call(t, be->quantize_gradient(be, dlogit_, dw_, w_, c->dtype, &q), "quantize_gradient");
        ops_gradient(t, "clips", logit, ops_fetch(t, dlogit_, BESA_F32, 2 * groups), 2 * groups, 1e-4, ref_quantized, &ref, 1e-3);
        return;
    }
    ops_call(t, be->quantize_gradient(be, dlogit_, dw_, w_, c->dtype, &q), "quantize_gradient");
    ops_near(t, "quantize_gradient", ops_fetch(t, dlogit_, BESA_F32, 2 * groups), dlogit, 2 * groups, 1e-5);
    ops_call(t, be->quantize(be, w_, w_, c->dtype, &q), "quantize");
    ops_same(t, "in place", w_, ops_raw(t, what_, (size_t)(R * C) * besa_dtype_size(c->dtype)), (size_t)(R * C) * besa_dtype_size(c->dtype));
}

static void ops_rms(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    double *w = ops_random(t, n, 3), want = 0;
    float *w_ = (float *)ops_float(t, w, n), *out_ = ops_float_out(t, 1);
    besa_workload sizes = ops_sizes(1, 1, 0);
    ops_workspace(t, &sizes);
    for (int64_t i = 0; i < n; i++) want += w[i] * w[i];
    want = sqrt(want / (double)n);
    ops_call(t, t->be->rms(t->be, out_, w_, n), "rms");
    ops_near(t, "rms", ops_fetch(t, out_, BESA_F32, 1), &want, 1, 1e-6);
}

static void ops_mix(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    double *y = ops_random(t, n, 1), *x = ops_random(t, n, 2), share = 0.375;
    void *y_ = ops_act(t, y, n), *x_ = ops_act(t, x, n);
    besa_workload sizes = ops_sizes(1, 1, 0);
    ops_workspace(t, &sizes);
    for (int64_t i = 0; i < n; i++) y[i] = (1 - share) * y[i] + share * x[i];
    ops_call(t, t->be->mix(t->be, y_, x_, (float)share, n), "mix");
    ops_near_act(t, "y", y_, y, n, 1e-6);
}

static void ops_squares(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    double *y = ops_random(t, n, 1), *x = ops_random(t, n, 1e-3);
    float *y_ = (float *)ops_float(t, y, n), *x_ = (float *)ops_float(t, x, n);
    besa_workload sizes = ops_sizes(1, 1, 0);
    ops_workspace(t, &sizes);
    for (int64_t i = 0; i < n; i++) y[i] += x[i] * x[i];
    ops_call(t, t->be->accumulate_squares(t->be, y_, x_, n), "accumulate_squares");
    ops_near(t, "y", ops_fetch(t, y_, BESA_F32, n), y, n, 1e-6);
}

/* -1 and 0 stay as they are */
static void ops_score_scale(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    double *s = ops_random(t, n, 1), *g = ops_random(t, n, 2);
    for (int64_t i = 0; i < n; i++) {
        s[i] = i % 5 == 3 ? -1 : i % 7 == 2 ? 0 : fabs(s[i]);
        g[i] = fabs(g[i]);
    }
    float *s_ = (float *)ops_float(t, s, n), *g_ = (float *)ops_float(t, g, n);
    besa_workload sizes = ops_sizes(1, 1, 0);
    ops_workspace(t, &sizes);
    for (int64_t i = 0; i < n; i++) s[i] = s[i] > 0 ? s[i] * g[i] : s[i];
    ops_call(t, t->be->score_scale(t->be, s_, g_, n), "score_scale");
    ops_near(t, "s", ops_fetch(t, s_, BESA_F32, n), s, n, 1e-6);
}

/* Rows `first` and on of a layer, by sums of all of its columns */
static void ops_score_relative(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1], first = c->n[2], n = R * C;
    double *w = ops_random(t, n, 1), *s = ops_doubles(t, n), *columns = ops_doubles(t, C);
    for (int64_t i = 0; i < n; i++) w[i] = i % 11 == 3 || i % C == 4 || i / C == 2 ? 0 : w[i]; /* an empty column, an empty row */
    void *w_ = ops_send(t, w, c->dtype, n);
    for (int64_t i = 0; i < n; i++) s[i] = w[i] == 0 ? -1 : fabs(w[i]) * (1 + 0.5 * (double)(i % 3)), columns[i % C] += fabs(w[i]);
    float *s_ = (float *)ops_float(t, s, n), *sums_ = ops_float_out(t, C);
    besa_workload sizes = ops_sizes(R, C, 0);
    ops_workspace(t, &sizes);
    ops_call(t, t->be->absolute_sums(t->be, sums_, w_, c->dtype, R, C), "absolute_sums");
    ops_near(t, "sums", ops_fetch(t, sums_, BESA_F32, C), columns, C, 1e-5);
    ops_call(t, t->be->score_relative(t->be, s_ + first * C, (char *)w_ + (size_t)(first * C) * besa_dtype_size(c->dtype), c->dtype,
                                      sums_, R - first, C), "score_relative");
    for (int64_t r = first; r < R; r++) {
        double row = 0;
        for (int64_t j = 0; j < C; j++) row += fabs(w[r * C + j]);
        for (int64_t j = 0; j < C; j++)
            if (s[r * C + j] > 0) s[r * C + j] *= 1 / row + 1 / columns[j];
    }
    ops_near(t, "s", ops_fetch(t, s_, BESA_F32, n), s, n, 1e-5);
}

static void ops_optimizer(ops *t, const ops_case *c)
{
    int64_t n = c->n[0];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, 1, 0);
    besa_optimizer_step o;
    double *x = ops_random(t, n, c->n[1] ? 1 : 1e-4), *x0 = ops_doubles(t, n), *m = ops_doubles(t, n), *v = ops_doubles(t, n), *s = ops_doubles(t, n);
    double *g = ops_doubles(t, n), scalars[BESA_OPTIMIZER_SCALARS] = {1e-6, 0}, want[2] = {1e-6, 0}, *got;
    float *x_ = (float *)ops_float(t, x, n), *grad_ = ops_float_out(t, n);
    memcpy(x0, x, (size_t)n * sizeof *x);
    memset(&o, 0, sizeof o);
    o.kind = c->n[1] ? BESA_ADAMW : BESA_PRODIGY;
    o.lr = c->n[1] ? 0.01f : 1.0f, o.beta1 = 0.9f, o.beta2 = 0.999f, o.beta3 = sqrtf(0.999f);
    o.eps = c->n[3] ? 3e-4f : 1e-8f; /* 3e-4: as large as the gradients */
    o.weight_decay = c->n[2] ? 0.1f : 0.0f;
    o.d0 = 1e-6, o.d_coef = 5, o.n = n;
    o.theta = x_, o.theta0 = (float *)ops_float(t, x0, n), o.grad = grad_;
    o.m = (float *)ops_float(t, m, n), o.v = (float *)ops_float(t, v, n), o.s = (float *)ops_float(t, s, n);
    o.scalars = (double *)ops_put(t, scalars, sizeof scalars);
    ops_workspace(t, &sizes);
    for (o.step = 1; o.step <= 12; o.step++) {
        double b1 = (double)o.beta1, b2 = (double)o.beta2, b3 = (double)o.beta3, d = want[0], dlr = d * (double)o.lr, sum = 0, num = b3 * want[1];
        float *gf = ops_floats(t, n);
        for (int64_t i = 0; i < n; i++) {
            g[i] = ops_round(BESA_F32, o.step == 1 && !c->n[1] && c->n[2] ? 0 : 1e-3 * (x[i] + 0.5 * sin((double)i)));
            gf[i] = (float)g[i];
        }
        ops_call(t, be->upload(be, BESA_QUEUE_COMPUTE, grad_, gf, (size_t)n * 4), "upload");
        ops_call(t, be->optimizer_step(be, &o), "optimizer_step");
        if (c->n[1]) {
            for (int64_t i = 0; i < n; i++) {
                m[i] = b1 * m[i] + (1 - b1) * g[i];
                v[i] = b2 * v[i] + (1 - b2) * g[i] * g[i];
                x[i] -= (double)o.lr * (double)o.weight_decay * x[i];
                x[i] -= (double)o.lr / (1 - pow(b1, (double)o.step)) * m[i] /
                        (sqrt(v[i]) / sqrt(1 - pow(b2, (double)o.step)) + (double)o.eps);
            }
            continue;
        }
        for (int64_t i = 0; i < n; i++) {
            num += d / o.d0 * dlr * g[i] * (x0[i] - x[i]);
            m[i] = b1 * m[i] + (1 - b1) * d * g[i];
            v[i] = b2 * v[i] + (1 - b2) * d * d * g[i] * g[i];
            s[i] = b3 * s[i] + d / o.d0 * dlr * g[i];
            sum += fabs(s[i]);
        }
        if (sum == 0) continue;
        want[0] = d > o.d_coef * num / sum ? d : o.d_coef * num / sum;
        want[1] = num;
        for (int64_t i = 0; i < n; i++)
            x[i] += -dlr * (double)o.weight_decay * x[i] - dlr * m[i] / (sqrt(v[i]) + want[0] * (double)o.eps);
    }
    if (ops_is(t, "perf")) {
        OPS_TIME(t, 4.0 * (double)n * (c->n[1] ? 7 : 14), "GB/s", ops_call(t, be->optimizer_step(be, &o), ""));
        return;
    }
    got = ops_fetch(t, x_, BESA_F32, n);
    for (int64_t i = 0; i < n; i++) got[i] -= x0[i], x[i] -= x0[i];
    ops_near(t, "theta", got, x, n, 1e-4);
    ops_near(t, "m", ops_fetch(t, o.m, BESA_F32, n), m, n, 1e-4);
    ops_near(t, "v", ops_fetch(t, o.v, BESA_F32, n), v, n, 1e-4);
    if (!c->n[1]) {
        ops_near(t, "s", ops_fetch(t, o.s, BESA_F32, n), s, n, 1e-4);
        ops_get(t, scalars, o.scalars, sizeof scalars);
        ops_near(t, "scalars", scalars, want, BESA_OPTIMIZER_SCALARS, 1e-4);
    }
}

/* ---- SparseGPT ----------------------------------------------------------------------------- */

/* u (C,C) = upper Cholesky factor of inv(h), all in double */
static void ref_factor(ops *t, double *u, const double *h, int64_t C)
{
    double *l = ops_doubles(t, C * C), *inv = ops_doubles(t, C * C);
    for (int64_t j = 0; j < C; j++) /* h = l l' */
        for (int64_t i = j; i < C; i++) {
            double sum = h[i * C + j];
            for (int64_t k = 0; k < j; k++) sum -= l[i * C + k] * l[j * C + k];
            l[i * C + j] = i == j ? sqrt(sum) : sum / l[j * C + j];
        }
    for (int64_t e = 0; e < C; e++) { /* columns of the inverse */
        for (int64_t i = 0; i < C; i++) {
            double sum = i == e;
            for (int64_t k = 0; k < i; k++) sum -= l[i * C + k] * inv[k * C + e];
            inv[i * C + e] = sum / l[i * C + i];
        }
        for (int64_t i = C - 1; i >= 0; i--) {
            double sum = inv[i * C + e];
            for (int64_t k = i + 1; k < C; k++) sum -= l[k * C + i] * inv[k * C + e];
            inv[i * C + e] = sum / l[i * C + i];
        }
    }
    for (int64_t j = 0; j < C; j++) /* inv = u'u */
        for (int64_t i = j; i < C; i++) {
            double sum = inv[i * C + j];
            for (int64_t k = 0; k < j; k++) sum -= u[k * C + i] * u[k * C + j];
            u[j * C + i] = i == j ? sqrt(sum) : sum / u[j * C + j];
        }
}

/* H of random inputs, column 2 dead */
static double *ops_hessian(ops *t, int64_t C, int32_t *dead)
{
    int64_t T = 2 * C + 8;
    double *x = ops_random(t, T * C, 1), *h = ops_doubles(t, C * C);
    if (C > 200) { /* a quick one: diagonal plus rank 8 */
        for (int64_t i = 0; i < C; i++)
            for (int64_t j = 0; j < C; j++) {
                h[i * C + j] = i == j;
                for (int k = 0; k < 8; k++) h[i * C + j] += x[k * C + i] * x[k * C + j];
            }
        for (int64_t i = 0; i < C; i++) h[i * C + 2] = h[2 * C + i] = 0;
    } else {
        for (int64_t i = 0; i < T; i++)
            for (int64_t j = 0; j < C; j++) x[i * C + j] = j == 2 ? 0 : x[i * C + j] + (j > 0 ? 0.5 * x[i * C + j - 1] : 0);
        ref_product(h, x, 1, C, x, C, 1, C, C, T, 2.0 / (double)T, 0);
    }
    if (C > 2) dead[2] = 1;
    return h;
}

static void ops_factor(ops *t, const ops_case *c)
{
    int64_t C = c->n[0];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, C, 0);
    int32_t *dead = (int32_t *)ops_host(t, (size_t)C * 4);
    double *h = ops_hessian(t, C, dead), *u = ops_doubles(t, C * C), *diag = ops_doubles(t, C), mean = 0, *got;
    float *h_ = (float *)ops_float(t, h, C * C), *diag_ = ops_float_out(t, C), *bad_;
    void *dead_ = ops_device(t, (size_t)C * 4);
    sizes.hessian_columns = C;
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        float *keep_ = (float *)ops_float(t, h, C * C);
        OPS_TIME(t, 2.0 / 3 * (double)C * (double)C * (double)C, "GFLOP/s",
                 (ops_call(t, be->copy(be, BESA_QUEUE_COMPUTE, h_, keep_, (size_t)(C * C) * 4), ""),
                  ops_call(t, be->hessian_factor(be, h_, (int32_t *)dead_, 0.01f, C), "")));
        return;
    }
    for (int64_t i = 0; i < C; i++) {
        if (h[i * C + i] == 0) h[i * C + i] = 1;
        mean += h[i * C + i] / (double)C;
    }
    for (int64_t i = 0; i < C; i++) h[i * C + i] += (double)0.01f * mean;
    ref_factor(t, u, h, C);
    ops_call(t, be->hessian_factor(be, h_, (int32_t *)dead_, 0.01f, C), "hessian_factor");
    ops_near(t, "U", got = ops_fetch(t, h_, BESA_F32, C * C), u, C * C, 1e-4);
    for (int64_t i = 0; i < C; i++)
        for (int64_t j = 0; j < i; j++)
            if (got[i * C + j] != 0) ops_fail(t, "U below its diagonal", got[i * C + j], 0);
    ops_same(t, "dead", dead_, dead, (size_t)C * 4);
    for (int64_t j = 0; j < C; j++) diag[j] = dead[j] ? (double)INFINITY : got[j * C + j];
    ops_call(t, be->diagonal(be, diag_, h_, (const int32_t *)dead_, C), "diagonal");
    got = ops_fetch(t, diag_, BESA_F32, C);
    for (int64_t j = 0; j < C; j++)
        if (got[j] != diag[j]) ops_fail(t, "diagonal", got[j], diag[j]);
    for (int64_t i = 0; i < C * C; i++) h[i] = i % (C + 1) == 0 ? 1 : 0;
    h[(C / 2) * (C + 1)] = -5;
    bad_ = (float *)ops_float(t, h, C * C);
    if (be->hessian_factor(be, bad_, (int32_t *)dead_, 0.0f, C) != BESA_ERROR_NUMERIC) ops_fail(t, "negative pivot accepted", 0, 0);
}

/* one slab in double (SparseGPT, arXiv 2301.00774) */
static void ref_slab(ops *t, double *w, double *err, const double *u, const int32_t *dead, int64_t first, int64_t width,
                     double target, int n, int m, int64_t R, int64_t C)
{
    float *score = ops_floats(t, R * width);
    int64_t *order = (int64_t *)ops_host(t, (size_t)(R * width + 1) * sizeof *order), place;
    float threshold = -1;
    for (int64_t i = 0; i < R * width; i++) {
        int64_t j = first + i % width;
        double *x = w + i / width * C + j;
        if (dead[j]) *x = 0;
        score[i] = (float)(*x * *x / (u[j * C + j] * u[j * C + j]));
    }
    if (m == 0) {
        place = (int64_t)floor((double)(width * R) * target);
        ref_sort(score, R * width, order);
        threshold = score[order[place < R * width ? place : R * width - 1]];
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t i = 0; i < width; i++) {
            double *x = w + r * C + first, d = u[(first + i) * (C + 1)];
            if (m > 0 && i % m == 0) {
                float part[64];
                for (int k = 0; k < m; k++) part[k] = (float)(x[i + k] * x[i + k] / u[(first + i + k) * (C + 1)] / u[(first + i + k) * (C + 1)]);
                ref_sort(part, m, order);
                for (int k = 0; k < m; k++) score[r * width + i + order[k]] = k < n ? -2.0f : 1.0f;
            }
            err[r * width + i] = 0;
            if (score[r * width + i] > threshold) continue;
            err[r * width + i] = x[i] / d;
            for (int64_t j = i + 1; j < width; j++) x[j] -= err[r * width + i] * u[(first + i) * C + first + j];
            x[i] = 0;
        }
}

static void ops_slab(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1], first = c->n[2], width = c->n[3], rest = C - first - width;
    int n = (int)c->n[4], m = (int)c->n[5]; /* without m, n is per cent, 0: 50 */
    double target = m == 0 && n > 0 ? 0.01 * n : 0.5;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 1);
    int32_t *dead = (int32_t *)ops_host(t, (size_t)C * 4);
    double *h = ops_hessian(t, C, dead), *u = ops_doubles(t, C * C), *w = ops_weights(t, R * C), *err = ops_doubles(t, R * width);
    float *w_, *u_, *err_ = ops_float_out(t, R * width);
    int32_t *dead_;
    for (int64_t i = 0; i < C; i++) h[i * C + i] += 0.1;
    ref_factor(t, u, h, C);
    dead_ = (int32_t *)ops_put(t, dead, (size_t)C * 4);
    w_ = (float *)ops_float(t, w, R * C), u_ = (float *)ops_float(t, u, C * C);
    sizes.hessian_columns = C;
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        if (m < 0) OPS_TIME(t, 2.0 * (double)R * (double)width * (double)rest, "GFLOP/s",
                            ops_call(t, be->sparsegpt_push(be, w_, err_, u_, first, width, R, C), ""));
        else {
            float *keep_ = (float *)ops_float(t, w, R * C);
            OPS_TIME(t, 12.0 * (double)(R * width), "GB/s",
                     (ops_call(t, be->copy(be, BESA_QUEUE_COMPUTE, w_, keep_, (size_t)(R * C) * 4), ""),
                      ops_call(t, be->sparsegpt_slab(be, w_, err_, u_, dead_, first, width, 0.5, n, m, NULL, R, C), "")));
        }
        return;
    }
    ref_slab(t, w, err, u, dead, first, width, target, n, m, R, C);
    ops_call(t, be->sparsegpt_slab(be, w_, err_, u_, dead_, first, width, target, n, m, NULL, R, C), "sparsegpt_slab");
    ops_near(t, "slab", ops_fetch(t, w_, BESA_F32, R * C), w, R * C, 1e-5);
    ops_near(t, "err", ops_fetch(t, err_, BESA_F32, R * width), err, R * width, 1e-5);
    for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < rest; j++)
            for (int64_t i = 0; i < width; i++)
                w[r * C + first + width + j] -= err[r * width + i] * u[(first + i) * C + first + width + j];
    ops_call(t, be->sparsegpt_push(be, w_, err_, u_, first, width, R, C), "sparsegpt_push");
    ops_near(t, "push", ops_fetch(t, w_, BESA_F32, R * C), w, R * C, 1e-5);
}

/* A slab whose kept weights go to their levels. Where a weight lies half-way rounding decides, and all that follows it: so each
 * weight is looked at with the errors that came before it as they are. n: rows, columns, first, width, group; 2 of 4 go in
 * every other case. */
static void ops_slab_levels(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1], first = c->n[2], width = c->n[3], group = c->n[4], G = (C + group - 1) / group, wrong = 0, pruned = 0;
    int m = (int)c->n[5];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 1);
    int32_t *dead = (int32_t *)ops_host(t, (size_t)C * 4);
    double *h = ops_hessian(t, C, dead), *u = ops_doubles(t, C * C), *w = ops_weights(t, R * C), *err, *got, *scale, *zero;
    besa_quantizer q = {3, R, C, group, NULL, NULL, ops_float_out(t, R * G), ops_float_out(t, R * G)};
    float *w_, *u_, *err_ = ops_float_out(t, R * width), *range_ = ops_float_out(t, 2 * R * G);
    for (int64_t i = 0; i < C; i++) h[i * C + i] += 0.1;
    ref_factor(t, u, h, C);
    int32_t *dead_ = (int32_t *)ops_put(t, dead, (size_t)C * 4);
    w_ = (float *)ops_float(t, w, R * C), u_ = (float *)ops_float(t, u, C * C);
    q.range = range_;
    sizes.hessian_columns = C;
    ops_workspace(t, &sizes);
    ops_call(t, be->quantize_range(be, range_, w_, BESA_F32, group, R, C), "quantize_range");
    ops_call(t, be->quantize_grid(be, &q), "quantize_grid");
    ops_call(t, be->sparsegpt_slab(be, w_, err_, u_, dead_, first, width, 0.5, m ? 2 : 0, m, &q, R, C), "sparsegpt_slab");
    err = ops_fetch(t, err_, BESA_F32, R * width), got = ops_fetch(t, w_, BESA_F32, R * C);
    scale = ops_fetch(t, q.scale, BESA_F32, R * G), zero = ops_fetch(t, q.zero, BESA_F32, R * G);
    for (int64_t i = 0; i < R * C; i++) {
        int64_t j = i % C - first, g = i / C * G + i % C / group;
        double x = i % C >= first && dead[i % C] && j < width ? 0 : w[i], step = scale[g], code;
        if (j < 0 || j >= width) wrong += got[i] != w[i];
        if (j < 0 || j >= width) continue;
        for (int64_t k = 0; k < j; k++) x -= err[i / C * width + k] * u[(first + k) * C + first + j];
        code = step > 0 ? rint(got[i] / step) + zero[g] : 0; /* on the grid, and the nearest level or 0 */
        wrong += fabs(got[i] - (step > 0 ? step * (code - zero[g]) : 0)) > 1e-6 || code < 0 || code > 7;
        wrong += fabs(err[i / C * width + j] * u[(first + j) * (C + 1)] - (x - got[i])) > 1e-4;
        wrong += got[i] != 0 && fabs(got[i] - x) > 0.5 * step + 1e-4 && !(code == 0 && x < got[i]) && !(code == 7 && x > got[i]);
        pruned += got[i] == 0;
    }
    if (wrong) ops_fail(t, "weights or errors that are wrong", (double)wrong, 0);
    if (pruned < R * width / 2 || pruned == R * width) ops_fail(t, "pruned", (double)pruned, (double)(R * width / 2));
}

/* Two scores that are the last bit apart: the third smallest of four goes, the fourth stays. */
static void ops_slab_close(ops *t, const ops_case *c)
{
    enum { C = 4 };
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, C, 1);
    double *w = ops_doubles(t, C), *u = ops_doubles(t, C * C), *got;
    int32_t *dead = (int32_t *)ops_host(t, C * 4);
    float *w_, *u_, *err_ = ops_float_out(t, C);
    (void)c;
    w[0] = 1, w[1] = 0.5, w[2] = 1, w[3] = 0.25;
    for (int i = 0; i < C; i++) u[i * C + i] = i ? 1 : 1 - 1.0 / (1 << 24);
    w_ = (float *)ops_float(t, w, C), u_ = (float *)ops_float(t, u, C * C);
    dead = (int32_t *)ops_put(t, dead, C * 4);
    sizes.hessian_columns = C;
    ops_workspace(t, &sizes);
    ops_call(t, be->sparsegpt_slab(be, w_, err_, u_, dead, 0, C, 0.5, 0, 0, NULL, 1, C), "sparsegpt_slab");
    got = ops_fetch(t, w_, BESA_F32, C);
    for (int i = 0; i < C; i++) if (got[i] != (i == 0)) ops_fail(t, "a weight", got[i], i == 0);
}

/* ---- kept weights fitted anew -------------------------------------------------------------- */

/* A slab whose mask is given, and what its errors do to the later columns. */
static void ops_given(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1], first = c->n[2], width = c->n[3], next = first + width;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 1);
    int32_t *dead = (int32_t *)ops_host(t, (size_t)C * 4);
    double *h = ops_hessian(t, C, dead), *u = ops_doubles(t, C * C), *w = ops_weights(t, R * C), *err = ops_doubles(t, R * width);
    double *kept = ops_random(t, R * C, 1);
    float *w_, *u_, *kept_, *err_ = ops_float_out(t, R * width);
    for (int64_t i = 0; i < C; i++) h[i * C + i] += 0.1;
    ref_factor(t, u, h, C);
    for (int64_t i = 0; i < R * C; i++)
        if (kept[i] < 0.2 || i / C == 1) kept[i] = i % 2 ? 0.0 : -0.0;
    w_ = (float *)ops_float(t, w, R * C), u_ = (float *)ops_float(t, u, C * C), kept_ = (float *)ops_float(t, kept, R * C);
    sizes.hessian_columns = C;
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        OPS_TIME(t, 16.0 * (double)(R * width), "GB/s",
                 ops_call(t, be->sparsegpt_given(be, w_, err_, u_, kept_, first, width, R, C), ""));
        return;
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t i = first; i < next; i++) {
            double e = kept[r * C + i] == 0 ? w[r * C + i] / u[i * (C + 1)] : 0;
            err[r * width + i - first] = e;
            for (int64_t j = i + 1; j < next; j++) w[r * C + j] -= e * u[i * C + j];
            if (kept[r * C + i] == 0) w[r * C + i] = 0;
        }
    ops_call(t, be->sparsegpt_given(be, w_, err_, u_, kept_, first, width, R, C), "sparsegpt_given");
    ops_near(t, "slab", ops_fetch(t, w_, BESA_F32, R * C), w, R * C, 1e-5);
    ops_near(t, "err", ops_fetch(t, err_, BESA_F32, R * width), err, R * width, 1e-5);
}

/* H as a whole, and a product with it */
static void ops_whole(ops *t, const ops_case *c)
{
    int64_t R = c->n[0], C = c->n[1];
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 1);
    int32_t *dead = (int32_t *)ops_host(t, (size_t)C * 4);
    double *h = ops_hessian(t, C, dead), *x = ops_random(t, R * C, 1), *y = ops_doubles(t, R * C), *scale = ops_doubles(t, C);
    double *got, mean = 0, damping = c->n[2] ? 0 : 0.03;
    float *h_, *x_ = (float *)ops_float(t, x, R * C), *y_ = ops_float_out(t, R * C), *scale_ = ops_float_out(t, C);
    int64_t wrong = 0;
    for (int64_t i = 0; i < C; i++)
        for (int64_t j = i + 1; j < C; j++) h[i * C + j] = 7;
    h_ = (float *)ops_float(t, h, C * C);
    for (int64_t i = 0; i < C; i++) mean += h[i * C + i] / (double)C;
    for (int64_t i = 0; i < C; i++) {
        h[i * C + i] += damping * mean;
        for (int64_t j = i + 1; j < C; j++) h[i * C + j] = h[j * C + i];
        scale[i] = h[i * C + i] != 0 ? 1 / h[i * C + i] : 0;
    }
    sizes.hessian_columns = C;
    ops_workspace(t, &sizes);
    ops_call(t, be->hessian_whole(be, h_, scale_, (float)damping, C), "hessian_whole");
    ops_call(t, be->hessian_product(be, y_, x_, h_, R, C), "hessian_product");
    if (ops_is(t, "perf")) {
        OPS_TIME(t, 2.0 * (double)R * (double)C * (double)C, "GFLOP/s", ops_call(t, be->hessian_product(be, y_, x_, h_, R, C), ""));
        return;
    }
    got = ops_fetch(t, h_, BESA_F32, C * C);
    ops_near(t, "H", got, h, C * C, 1e-6);
    for (int64_t i = 0; i < C; i++)
        for (int64_t j = 0; j < i; j++) wrong += got[i * C + j] != h[i * C + j] || got[j * C + i] != h[i * C + j];
    if (wrong) ops_fail(t, "weights of H that are not those below the diagonal", (double)wrong, 0);
    ops_near(t, "scale", ops_fetch(t, scale_, BESA_F32, C), scale, C, 1e-6);
    ref_product(y, x, C, 1, h, C, 1, R, C, C, 1, 0);
    ops_near(t, "product", ops_fetch(t, y_, BESA_F32, R * C), y, R * C, ops_products(t, 3e-6));
}

/* One step of a row in double */
static void ref_refit_step(int first, double *x, double *r, double *p, const double *q, const double *scale, double *rho,
                           double *rho0, int64_t C)
{
    double curved = 0, alpha, now = 0;
    for (int64_t j = 0; j < C; j++) curved += p[j] * q[j];
    alpha = *rho / curved;
    if (!first && !(curved > 1e-30 && *rho > 1e-14 * *rho0 && alpha > 0 && alpha < 3e38)) {
        *rho = 0;
        return;
    }
    for (int64_t j = 0; j < C; j++) {
        if (first) r[j] = x[j] != 0 ? q[j] : 0;
        else if (x[j] != 0) x[j] += alpha * p[j], r[j] -= alpha * q[j];
        now += r[j] * r[j] * scale[j];
    }
    for (int64_t j = 0; j < C; j++) p[j] = scale[j] * r[j] + (first ? 0 : now / *rho * p[j]);
    *rho = now;
    if (first) *rho0 = now;
}

/* Steps with a Q made up here, and rows that are special: 0 nothing is kept, 1 the residual is 0, 2 curvature is negative,
 * 3 there is next to none, 4 a weight that comes to 0 and is still kept, 5 the second step leaves next to nothing */
static void ops_refit_step(ops *t, const ops_case *c)
{
    enum { STEPS = 4 };
    int64_t R = c->n[0], C = c->n[1], n = R * C, zeros = 0;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(R, C, 0);
    besa_refit_step o;
    double *x = ops_random(t, n, 1), *q = ops_random(t, n, 1), *r = ops_doubles(t, n), *p = ops_doubles(t, n), *got;
    double *scale = ops_random(t, C, 1), *rho = ops_doubles(t, 2 * R);
    float *q_ = ops_float_out(t, n), *qf = ops_floats(t, n);
    for (int64_t j = 0; j < C; j++) scale[j] = j == 0 ? 1 : 1 / (1.5 + scale[j]);
    for (int64_t i = 0; i < n; i++) {
        int64_t row = i / C, j = i % C;
        if (x[i] < -0.1 || row == 0) x[i] = 0;
        if (row == 1) q[i] = 0;
        if (row == 4) x[i] = j == 0 ? -1 : 0, q[i] = j == 0 ? 1 : q[i];
    }
    memset(&o, 0, sizeof o);
    o.rows = R, o.columns = C, o.q = q_;
    o.x = (float *)ops_float(t, x, n), o.scale = (const float *)ops_float(t, scale, C);
    o.r = ops_float_out(t, n), o.p = ops_float_out(t, n), o.rho = ops_float_out(t, 2 * R);
    ops_workspace(t, &sizes);
    for (int step = 0; step < STEPS; step++) {
        o.first = step == 0;
        for (int64_t i = 0; i < n && step > 0; i++) {
            double h = (i / C == 2 ? -1 : i / C == 3 ? 1e-34 : 1 + (double)(i % C % 7)) / scale[i % C];
            q[i] = p[i] == 0 ? cos((double)i) : h * p[i];
            if (i / C == 5 && p[i] != 0) q[i] = step == 1 ? p[i] * (1 + 1e-8) / scale[i % C] : p[i];
        }
        for (int64_t i = 0; i < n; i++) q[i] = (double)(qf[i] = (float)q[i]);
        ops_call(t, be->upload(be, BESA_QUEUE_COMPUTE, q_, qf, (size_t)n * 4), "upload");
        ops_call(t, be->refit_step(be, &o), "refit_step");
        if (ops_is(t, "perf")) continue;
        for (int64_t row = 0; row < R; row++)
            ref_refit_step(o.first, x + row * C, r + row * C, p + row * C, q + row * C, scale, rho + row, rho + R + row, C);
        got = ops_fetch(t, o.x, BESA_F32, n);
        ops_near(t, "x", got, x, n, 1e-4);
        for (int64_t i = 0; i < n; i++) zeros += (got[i] == 0) != (x[i] == 0 && (i / C != 4 || i % C != 0));
        ops_near(t, "r", ops_fetch(t, o.r, BESA_F32, n), r, n, 1e-4);
        ops_near(t, "p", ops_fetch(t, o.p, BESA_F32, n), p, n, 1e-4);
        ops_near(t, "rho", ops_fetch(t, o.rho, BESA_F32, 2 * R), rho, 2 * R, 1e-4);
        if (R > 4) x[4 * C] = x[4 * C] == 0 ? (double)FLT_MIN : x[4 * C];
    }
    if (ops_is(t, "perf")) OPS_TIME(t, 32.0 * (double)n, "GB/s", ops_call(t, be->refit_step(be, &o), ""));
    if (zeros) ops_fail(t, "weights that are 0 and were kept, or the other way round", (double)zeros, 0);
}

/* From weights to floats, and back with the same mask; n[1] 1: weights near the dtype's smallest */
static void ops_refit_ends(ops *t, const ops_case *c)
{
    int64_t n = c->n[0], wrong = 0;
    double unit = c->n[1] ? c->dtype == BESA_F16 ? 3e-7 : 1e-40 : 1;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(1, 1, 0);
    double *w = ops_random(t, n, unit), *what = ops_random(t, n, unit), *new_ = ops_random(t, n, 0.4 * unit), *got;
    float *x_ = ops_float_out(t, n), *p_ = ops_float_out(t, n), *new_x;
    void *w_, *what_;
    for (int64_t i = 0; i < n; i++) {
        if (i % 3 == 1) what[i] = i % 2 ? 0.0 : -0.0;
        if (i % 5 == 2) new_[i] = i % 2 ? 0.0 : -0.0;
    }
    w_ = ops_send(t, w, c->dtype, n), what_ = ops_send(t, what, c->dtype, n), new_x = (float *)ops_float(t, new_, n);
    ops_workspace(t, &sizes);
    ops_call(t, be->refit_begin(be, x_, p_, w_, what_, c->dtype, n), "refit_begin");
    got = ops_fetch(t, x_, BESA_F32, n);
    for (int64_t i = 0; i < n; i++) wrong += got[i] != what[i];
    got = ops_fetch(t, p_, BESA_F32, n);
    for (int64_t i = 0; i < n; i++) wrong += got[i] != (double)((float)w[i] - (float)what[i]);
    if (wrong) ops_fail(t, "floats that are not What or W - What", (double)wrong, 0);
    ops_call(t, be->refit_end(be, what_, new_x, c->dtype, n), "refit_end");
    got = ops_fetch(t, what_, c->dtype, n);
    for (int64_t i = 0; i < n; i++) {
        double rounded = ops_round(c->dtype, new_[i]);
        wrong += got[i] != (what[i] == 0 ? 0 : rounded != 0 ? rounded : what[i]) || (what[i] == 0 && signbit(got[i]));
    }
    if (wrong) ops_fail(t, "weights that are not as the mask and x have them", (double)wrong, 0);
}

/* ---- head ---------------------------------------------------------------------------------- */

static void ops_nll(ops *t, const ops_case *c)
{
    int64_t windows = c->n[0], L = c->n[1], V = c->n[2], d = c->n[3], T = windows * L, cut = V * 2 / 3;
    besa_backend *be = t->be;
    besa_workload sizes = ops_sizes(V, d, T);
    double *h = ops_random(t, T * d, 3), *w = ops_random(t, V * d, 1), *logits = ops_doubles(t, T * V), *want = ops_doubles(t, windows);
    double *got = ops_doubles(t, windows);
    void *h_ = ops_act(t, h, T * d), *w_ = ops_send(t, w, c->dtype, V * d), *sum_ = ops_device(t, (size_t)windows * 8);
    float *a_ = ops_float_out(t, T * V), *state_ = ops_float_out(t, T * 3);
    int32_t *target = (int32_t *)ops_host(t, (size_t)T * 4), *target_;
    for (int64_t i = 0; i < T; i++) target[i] = i % L == L - 1 ? -1 : (int32_t)((i * 7919) % V);
    target_ = (int32_t *)ops_put(t, target, (size_t)T * 4);
    ops_workspace(t, &sizes);
    if (ops_is(t, "perf")) {
        ops_call(t, be->logits(be, a_, h_, w_, c->dtype, T, V, d), "logits");
        OPS_TIME(t, 4.0 * (double)(T * V), "GB/s", ops_call(t, be->nll_update(be, state_, a_, target_, 0, V, T, 1), ""));
        return;
    }
    ref_product(logits, h, d, 1, w, 1, d, T, V, d, 1, 0);
    ops_call(t, be->logits(be, a_, h_, w_, c->dtype, T, V, d), "logits");
    ops_near(t, "logits", ops_fetch(t, a_, BESA_F32, T * V), logits, T * V, ops_products(t, 3e-6));
    for (int64_t i = 0; i < T; i++) {
        double most = -1e300, sum = 0;
        if (target[i] < 0) continue;
        for (int64_t j = 0; j < V; j++) most = logits[i * V + j] > most ? logits[i * V + j] : most;
        for (int64_t j = 0; j < V; j++) sum += exp(logits[i * V + j] - most);
        want[i / L] += most + log(sum) - logits[i * V + target[i]];
    }
    for (int64_t part = 0; part < 2; part++) { /* the vocabulary in two chunks */
        int64_t at = part ? cut : 0, count = part ? V - cut : cut;
        size_t bytes = (size_t)(count * d) * besa_dtype_size(c->dtype);
        void *part_ = ops_device(t, bytes);
        if (count == 0) continue;
        ops_call(t, be->copy(be, BESA_QUEUE_COMPUTE, part_, besa__at(w_, c->dtype, at * d), bytes), "copy");
        ops_call(t, be->logits(be, a_, h_, part_, c->dtype, T, count, d), "logits");
        ops_call(t, be->nll_update(be, state_, a_, target_, at, count, T, at == 0), "nll_update");
    }
    ops_call(t, be->nll_sum(be, (double *)sum_, state_, target_, windows, L), "nll_sum");
    ops_get(t, got, sum_, (size_t)windows * 8);
    ops_near(t, "nll", got, want, windows, ops_products(t, 2e-6));
}

/* Two models' logits in chunks of the vocabulary; the first of equal largest ones counts. n[3] = 1: both models are the same. */
static void ops_divergence(ops *t, const ops_case *c)
{
    int64_t T = c->n[0], V = c->n[1], cut = c->n[2], wrong = 0;
    besa_backend *be = t->be;
    double *p = ops_random(t, T * V, 5), *q = ops_random(t, T * V, 4), *want = ops_doubles(t, T * 4), *got, *id = ops_doubles(t, T * 2);
    float *state_ = ops_float_out(t, T * 4);
    int32_t *best_ = (int32_t *)ops_float_out(t, T * 2), *best = (int32_t *)ops_host(t, (size_t)T * 8);
    for (int64_t i = 0; i < T * V; i++) {
        p[i] = (float)(p[i] + (i / V % 3) * 30); /* the float of them is what both have */
        q[i] = c->n[3] ? p[i] : (float)(q[i] + i / V);
    }
    for (int64_t i = 0; i < T && V > 4; i += 2) p[i * V + V / 2] = p[i * V + V - 1] = (float)(p[i * V] + 40), q[i * V + 1] = q[i * V + V - 2] = (float)(q[i * V] + 40);
    for (int64_t i = 0; i < T; i++) {
        double *w = want + 4 * i, *a = p + i * V, *b = q + i * V;
        w[0] = -1e300, w[3] = -1e300;
        for (int64_t j = 0; j < V; j++) {
            if (a[j] > w[0]) w[0] = a[j], id[2 * i] = (double)j;
            if (b[j] > w[3]) w[3] = b[j], id[2 * i + 1] = (double)j;
        }
        for (int64_t j = 0; j < V; j++) w[1] += exp(a[j] - w[0]), w[2] += exp(a[j] - w[0]) * (a[j] - b[j]);
    }
    for (int64_t at = 0, n = 0; at < V; at += n) {
        double *part = ops_doubles(t, T * V), *other = ops_doubles(t, T * V);
        n = V - at < cut ? V - at : cut;
        for (int64_t i = 0; i < T * n; i++) part[i] = p[i / n * V + at + i % n], other[i] = q[i / n * V + at + i % n];
        ops_call(t, be->divergence_update(be, state_, best_, (float *)ops_float(t, part, T * n), (float *)ops_float(t, other, T * n), at, n, T, at == 0),
                 "divergence_update");
    }
    got = ops_fetch(t, state_, BESA_F32, T * 4);
    ops_get(t, best, best_, (size_t)T * 8);
    for (int64_t i = 0; i < T * 2; i++) wrong += best[i] != (int32_t)id[i];
    for (int64_t i = 0; i < T; i++) wrong += got[4 * i] != want[4 * i] || got[4 * i + 3] != want[4 * i + 3];
    if (wrong) ops_fail(t, "ids or maxima that are not those of the logits", (double)wrong, 0);
    for (int64_t i = 0; i < T; i++) {
        double scale = want[4 * i + 1] * 60 + 1; /* of what is summed up: exp(p - max) (p - q) */
        if (fabs(got[4 * i + 1] - want[4 * i + 1]) > 2e-6 * want[4 * i + 1]) ops_fail(t, "sum", got[4 * i + 1], want[4 * i + 1]);
        if (fabs(got[4 * i + 2] - want[4 * i + 2]) > 2e-6 * scale) ops_fail(t, "sum of differences", got[4 * i + 2], want[4 * i + 2]);
    }
}

/* zero, copy, upload and download of bytes that no wider word divides, beside others that must stay */
static void ops_memory(ops *t, const ops_case *c)
{
    besa_backend *be = t->be;
    size_t bytes = (size_t)c->n[0], room = bytes + 64;
    unsigned char *data = (unsigned char *)ops_host(t, room), *want = (unsigned char *)ops_host(t, room), *a_, *b_;
    for (size_t i = 0; i < room; i++) data[i] = (unsigned char)(i * 37 + 11);
    a_ = (unsigned char *)ops_put(t, data, room), b_ = (unsigned char *)ops_device(t, room);
    ops_same(t, "upload", a_, data, room);
    memset(want, 0xFF, room);
    memcpy(want + 3, data + 17, bytes);
    ops_call(t, be->copy(be, BESA_QUEUE_COMPUTE, b_ + 3, a_ + 17, bytes), "copy");
#ifndef OPS_NO_POISON
    ops_same(t, "copy", b_, want, room);
#endif
    memcpy(want, data, room);
    memset(want + 5, 0, bytes);
    ops_call(t, be->zero(be, BESA_QUEUE_COMPUTE, a_ + 5, bytes), "zero");
    ops_same(t, "zero", a_, want, room);
}

/* ---- the list ------------------------------------------------------------------------------ */

#define OPS_TYPES(name, run, modes, ...) \
    {name " f32", run, {__VA_ARGS__}, BESA_F32, modes}, {name " f16", run, {__VA_ARGS__}, BESA_F16, modes}, \
    {name " bf16", run, {__VA_ARGS__}, BESA_BF16, modes}

static const ops_case ops_cases[] = {
    {"memory 1", ops_memory, {1}, BESA_F32, "t"}, {"memory 1003", ops_memory, {1003}, BESA_F32, "t"}, {"memory 100001", ops_memory, {100001}, BESA_F32, "t"},
    OPS_TYPES("linear 1x1x1", ops_linear, "t", 1, 1, 1, 0, 0), OPS_TYPES("linear 1x33x127", ops_linear, "t", 1, 33, 127, 1, 1),
    OPS_TYPES("linear 65x31x1000", ops_linear, "t", 65, 31, 1000, 1, 0), OPS_TYPES("linear 130x200x77", ops_linear, "t", 130, 200, 77, 0, 1),
    {"gram 70x33", ops_gram, {70, 33}, BESA_F32, "t"}, {"gram 1x1", ops_gram, {1, 1}, BESA_F32, "t"}, {"gram 33x300", ops_gram, {33, 300}, BESA_F32, "t"},
    {"convert 1", ops_convert, {1}, BESA_F32, "t"}, {"convert 1000", ops_convert, {1000}, BESA_F32, "t"}, {"convert 70001", ops_convert, {70001}, BESA_F32, "t"},
    {"convert every f16 and every tie", ops_convert_all, {0}, BESA_F16, "t"}, {"convert every bf16 and every tie", ops_convert_all, {0}, BESA_BF16, "t"},
    {"rmsnorm 1x1", ops_rmsnorm, {1, 1, 0}, BESA_F32, "t"}, {"rmsnorm 3x31", ops_rmsnorm, {3, 31, 1}, BESA_F32, "tg"},
    {"rmsnorm 200x127", ops_rmsnorm, {200, 127, 0}, BESA_F32, "tg"}, {"rmsnorm 77x1000 add", ops_rmsnorm, {77, 1000, 1}, BESA_F32, "tg"},
    {"rope 1x1 dh 2", ops_rope, {1, 1, 1, 2}, BESA_F32, "t"}, {"rope 40/20 3 heads dh 64", ops_rope, {40, 20, 3, 64}, BESA_F32, "t"},
    {"rope 1000/500 5 heads dh 18", ops_rope, {1000, 500, 5, 18}, BESA_F32, "t"},
    {"attention one token", ops_attention, {2, 1, 4, 2, 16, 0}, BESA_F32, "t"}, {"attention 2x33 mha", ops_attention, {2, 33, 3, 3, 20, 0}, BESA_F32, "tg"},
    {"attention 1x200 gqa 6/2", ops_attention, {1, 200, 6, 2, 64, 0}, BESA_F32, "tg"}, {"attention 2x193 gqa 4/1", ops_attention, {2, 193, 4, 1, 31, 0}, BESA_F32, "tg"},
    {"attention 1x300 window 40", ops_attention, {1, 300, 4, 2, 32, 40}, BESA_F32, "tg"}, {"attention 1x97 window 1", ops_attention, {1, 97, 2, 2, 8, 1}, BESA_F32, "t"},
    {"attention 1x150 window 200", ops_attention, {1, 150, 2, 1, 8, 200}, BESA_F32, "tg"},
    {"swiglu 1", ops_swiglu, {1}, BESA_F32, "t"}, {"swiglu 33", ops_swiglu, {33}, BESA_F32, "tg"}, {"swiglu 50001", ops_swiglu, {50001}, BESA_F32, "tg"},
    {"column_sumsq 1x1", ops_sumsq, {1, 1}, BESA_F32, "t"}, {"column_sumsq 33x127", ops_sumsq, {33, 127}, BESA_F32, "t"},
    {"column_sumsq 1000x1000", ops_sumsq, {1000, 1000}, BESA_F32, "t"},
    {"block_loss 1x31", ops_loss, {1, 31}, BESA_F32, "tg"}, {"block_loss 100x127", ops_loss, {100, 127}, BESA_F32, "tg"}, {"block_loss 33x1000", ops_loss, {33, 1000}, BESA_F32, "tg"},
    OPS_TYPES("score 1x1", ops_score, "t", 1, 1, 1, 0), OPS_TYPES("score 3x31", ops_score, "t", 3, 31, 1, 1),
    OPS_TYPES("score 70x1000 squared", ops_score, "t", 70, 1000, 2, 1), OPS_TYPES("score 5x127 squared", ops_score, "t", 5, 127, 2, 0),
    {"rank 1x1", ops_rank, {1, 1}, BESA_F32, "t"}, {"rank 7x31", ops_rank, {7, 31}, BESA_F32, "t"}, {"rank 100x1000", ops_rank, {100, 1000}, BESA_F32, "t"},
    {"rank 2x65536", ops_rank, {2, 65536}, BESA_F32, "t"}, {"rank 2x70000", ops_rank, {2, 70000}, BESA_F32, "t"},
    OPS_TYPES("mask 1x1", ops_mask, "t", 1, 1), OPS_TYPES("mask 9x33", ops_mask, "t", 9, 33), OPS_TYPES("mask 70x1000", ops_mask, "t", 70, 1000),
    OPS_TYPES("mask 3x70000", ops_mask, "t", 3, 70000), OPS_TYPES("mask 3x65536", ops_mask, "t", 3, 65536),
    OPS_TYPES("bucket 1x1", ops_bucket, "t", 1, 1, 100), OPS_TYPES("bucket 9x127", ops_bucket, "t", 9, 127, 100), OPS_TYPES("bucket 70x1000", ops_bucket, "t", 70, 1000, 100),
    OPS_TYPES("bucket 2x70000", ops_bucket, "t", 2, 70000, 10), OPS_TYPES("bucket 2x33 D 9000", ops_bucket, "t", 2, 33, 9000), OPS_TYPES("bucket 2x500 D 1", ops_bucket, "t", 2, 500, 1),
    {"rates 33x127 both", ops_rates, {33, 127, 100, 1, 0, 0}, BESA_F32, "tg"}, {"rates 1x1 row", ops_rates, {1, 1, 100, 1, 1, 0}, BESA_F32, "tg"},
    {"rates 300x1000 row plain", ops_rates, {300, 1000, 100, 1, 1, 1}, BESA_F32, "tg"}, {"rates 100x31 layer", ops_rates, {100, 31, 100, 100, 2, 0}, BESA_F32, "tg"},
    {"rates 100x200 groups of 7", ops_rates, {100, 200, 10, 7, 0, 0}, BESA_F32, "tg"}, {"rates 65x50 D 1 plain", ops_rates, {65, 50, 1, 1, 0, 1}, BESA_F32, "tg"},
    {"rates 3x2000 D 1999", ops_rates, {3, 2000, 1999, 2, 0, 0}, BESA_F32, "tg"},
    {"project 1", ops_project, {1, 31, 500, 0}, BESA_F32, "t"}, {"project 33", ops_project, {33, 127, 700, 0}, BESA_F32, "t"},
    {"project 3000", ops_project, {3000, 1000, 999, 0}, BESA_F32, "t"}, {"project 300 equal", ops_project, {300, 1000, 503, 1}, BESA_F32, "t"},
    {"project 200 left out", ops_project, {200, 333, 400, 2}, BESA_F32, "t"}, {"project 50 zeros", ops_project, {50, 100, 100, 3}, BESA_F32, "t"},
    {"project 1300 equal", ops_project, {1300, 1000, 503, 1}, BESA_F32, "t"}, {"project 2000x7 equal", ops_project, {2000, 7, 371, 1}, BESA_F32, "t"},
    {"project 1001x8", ops_project, {1001, 8, 333, 0}, BESA_F32, "t"}, {"project 9 not finite", ops_project, {9, 100, 100, 4}, BESA_F32, "t"},
    /* rows of one rate pass a whole number together, and only some of them may: others have smaller fractions */
    {"project 301 of five rates", ops_project, {301, 128, 501, 5}, BESA_F32, "t"},
    {"project 50 of five rates", ops_project, {50, 333, 417, 5}, BESA_F32, "t"},
    {"project 1999 of five rates", ops_project, {1999, 64, 355, 5}, BESA_F32, "t"},
    {"prodigy 1", ops_optimizer, {1, 0, 0}, BESA_F32, "t"}, {"prodigy 20001", ops_optimizer, {20001, 0, 0}, BESA_F32, "t"},
    {"prodigy 1000 decay", ops_optimizer, {1000, 0, 1}, BESA_F32, "t"}, {"adamw 20001", ops_optimizer, {20001, 1, 0}, BESA_F32, "t"}, {"adamw 31 decay", ops_optimizer, {31, 1, 1}, BESA_F32, "t"},
    {"factor 3", ops_factor, {3}, BESA_F32, "t"}, {"factor 31", ops_factor, {31}, BESA_F32, "t"}, {"factor 128", ops_factor, {128}, BESA_F32, "t"},
    {"factor 150", ops_factor, {150}, BESA_F32, "t"}, {"factor 300", ops_factor, {300}, BESA_F32, "t"},
    {"slab 5x96 50 %", ops_slab, {5, 96, 0, 32, 0, 0}, BESA_F32, "t"}, {"slab 40x150 50 %", ops_slab, {40, 150, 22, 128, 0, 0}, BESA_F32, "t"},
    {"slab 33x128 2:4", ops_slab, {33, 128, 32, 64, 2, 4}, BESA_F32, "t"}, {"slab 1x192 4:8", ops_slab, {1, 192, 0, 128, 4, 8}, BESA_F32, "t"},
    OPS_TYPES("nll 3x31 V 127", ops_nll, "t", 3, 31, 127, 33), OPS_TYPES("nll 1x2 V 1", ops_nll, "t", 1, 2, 1, 8), OPS_TYPES("nll 2x40 V 6400", ops_nll, "t", 2, 40, 6400, 2),

    /* every operation on rows of 1, 31, 33, 127 and 1000, one row, one token, as far as the cases above lack them */
    OPS_TYPES("linear 300x130x400, zeros", ops_linear, "t", 300, 130, 400, 1, 1, 1),
    OPS_TYPES("linear 1x1x31", ops_linear, "t", 1, 1, 31, 0, 1), OPS_TYPES("linear 33x1x33", ops_linear, "t", 33, 1, 33, 1, 0), OPS_TYPES("linear 1x1000x127", ops_linear, "t", 1, 1000, 127, 1, 1),
    {"gram 1x31", ops_gram, {1, 31}, BESA_F32, "t"}, {"gram 5x127", ops_gram, {5, 127}, BESA_F32, "t"}, {"gram 2x1000", ops_gram, {2, 1000}, BESA_F32, "t"},
    {"convert 31", ops_convert, {31}, BESA_F32, "t"}, {"convert 33", ops_convert, {33}, BESA_F32, "t"}, {"convert 127", ops_convert, {127}, BESA_F32, "t"},
    {"rmsnorm 7x127 beside eps", ops_rmsnorm, {7, 127, 0, 1}, BESA_F32, "t"}, {"rmsnorm 1x33", ops_rmsnorm, {1, 33, 0}, BESA_F32, "t"}, {"rmsnorm 1x1000", ops_rmsnorm, {1, 1000, 1}, BESA_F32, "t"},
    {"rope 1x1 dh 62", ops_rope, {1, 1, 1, 62}, BESA_F32, "t"}, {"rope 33/11 2 heads dh 66", ops_rope, {33, 11, 2, 66}, BESA_F32, "t"},
    {"rope 3/1 dh 254", ops_rope, {3, 1, 1, 254}, BESA_F32, "t"}, {"rope 1x1 5 heads dh 200", ops_rope, {1, 1, 5, 200}, BESA_F32, "t"},
    {"attention 3x31 mqa", ops_attention, {3, 31, 3, 1, 33, 0}, BESA_F32, "t"}, {"attention 1x127 dh 1", ops_attention, {1, 127, 2, 1, 1, 0}, BESA_F32, "t"},
    {"attention 1x1000", ops_attention, {1, 1000, 1, 1, 8, 0}, BESA_F32, "t"},
    /* beside the edges of blocks of 48 queries and of panels of 8, 16 and 32 keys; more than 256 keys; blocks of fewer queries */
    {"attention 1x49 dh 2 window 12", ops_attention, {1, 49, 2, 2, 2, 12}, BESA_F32, "t"}, {"attention 2x96 dh 96", ops_attention, {2, 96, 2, 1, 96, 0}, BESA_F32, "t"},
    {"attention 3x32 window 33", ops_attention, {3, 32, 5, 5, 34, 33}, BESA_F32, "t"}, {"attention 1x145 window 48", ops_attention, {1, 145, 3, 3, 16, 48}, BESA_F32, "t"},
    {"attention 1x97 gqa 13/1", ops_attention, {1, 97, 13, 1, 6, 0}, BESA_F32, "tg"}, {"attention 1x130 dh 256", ops_attention, {1, 130, 2, 1, 256, 0}, BESA_F32, "t"},
    {"attention 1x700 window 290", ops_attention, {1, 700, 3, 1, 10, 290}, BESA_F32, "t"}, {"attention 1x1301 window 65", ops_attention, {1, 1301, 1, 1, 7, 65}, BESA_F32, "t"},
    {"attention 1x1100 gqa 2/1", ops_attention, {1, 1100, 2, 1, 4, 0}, BESA_F32, "t"},
    {"swiglu 31", ops_swiglu, {31}, BESA_F32, "t"}, {"swiglu 127", ops_swiglu, {127}, BESA_F32, "t"}, {"swiglu 1000", ops_swiglu, {1000}, BESA_F32, "t"},
    {"column_sumsq 1x31", ops_sumsq, {1, 31}, BESA_F32, "t"}, {"column_sumsq 3x33", ops_sumsq, {3, 33}, BESA_F32, "t"}, {"column_sumsq 1x1000", ops_sumsq, {1, 1000}, BESA_F32, "t"},
    {"block_loss 1x1", ops_loss, {1, 1}, BESA_F32, "t"}, {"block_loss 3x33", ops_loss, {3, 33}, BESA_F32, "t"}, {"block_loss 1x1000", ops_loss, {1, 1000}, BESA_F32, "t"},
    OPS_TYPES("score 1x33", ops_score, "t", 1, 33, 1, 1), OPS_TYPES("score 1x1000", ops_score, "t", 1, 1000, 1, 0),
    {"rank 1x33", ops_rank, {1, 33}, BESA_F32, "t"}, {"rank 3x127", ops_rank, {3, 127}, BESA_F32, "t"}, {"rank 1x1000", ops_rank, {1, 1000}, BESA_F32, "t"},
    OPS_TYPES("mask 5x24", ops_mask, "t", 5, 24), OPS_TYPES("mask 1x31", ops_mask, "t", 1, 31), OPS_TYPES("mask 3x127", ops_mask, "t", 3, 127), OPS_TYPES("mask 1x1000", ops_mask, "t", 1, 1000),
    OPS_TYPES("bucket 3x31", ops_bucket, "t", 3, 31, 100), OPS_TYPES("bucket 1x1000", ops_bucket, "t", 1, 1000, 100),
    {"rates 6x50 all or nothing", ops_rates, {6, 50, 20, 1, 0, 2}, BESA_F32, "t"}, {"rates 1x33 both", ops_rates, {1, 33, 31, 1, 0, 0}, BESA_F32, "t"}, {"rates 31x1 layer", ops_rates, {31, 1, 33, 31, 2, 0}, BESA_F32, "t"},
    {"prodigy 500 eps", ops_optimizer, {500, 0, 0, 1}, BESA_F32, "t"}, {"adamw 500 eps", ops_optimizer, {500, 1, 1, 1}, BESA_F32, "t"},
    {"prodigy 33", ops_optimizer, {33, 0, 0}, BESA_F32, "t"}, {"adamw 127", ops_optimizer, {127, 1, 0}, BESA_F32, "t"},
    {"factor 1", ops_factor, {1}, BESA_F32, "t"}, {"factor 33", ops_factor, {33}, BESA_F32, "t"}, {"factor 127", ops_factor, {127}, BESA_F32, "t"},
    {"slab, scores a bit apart", ops_slab_close, {0}, BESA_F32, "t"},
    {"slab 7x64 93 %", ops_slab, {7, 64, 0, 64, 93, 0}, BESA_F32, "t"}, {"slab 5x40 3 %", ops_slab, {5, 40, 0, 33, 3, 0}, BESA_F32, "t"},
    {"slab 3x126 1:3", ops_slab, {3, 126, 0, 126, 1, 3}, BESA_F32, "t"}, {"slab 9x64 31:32", ops_slab, {9, 64, 0, 64, 31, 32}, BESA_F32, "t"},
    {"slab 2x31 50 %", ops_slab, {2, 31, 0, 31, 0, 0}, BESA_F32, "t"}, {"slab 1x33 50 %", ops_slab, {1, 33, 1, 31, 0, 0}, BESA_F32, "t"}, {"slab 3x127 50 %", ops_slab, {3, 127, 0, 127, 0, 0}, BESA_F32, "t"},
    OPS_TYPES("nll 1x1 V 31", ops_nll, "t", 1, 1, 31, 1), OPS_TYPES("nll 1x3 V 33", ops_nll, "t", 1, 3, 33, 31), OPS_TYPES("nll 3x2 V 1000", ops_nll, "t", 3, 2, 1000, 127),

    OPS_TYPES("linear 4096x1536x576", ops_linear, "p", 4096, 1536, 576, 0, 0), {"gram 4096x1536", ops_gram, {4096, 1536}, BESA_F32, "p"},
    {"convert bf16 to f32 10M", ops_convert, {10000000}, BESA_F32, "p"}, {"rmsnorm forward 8192x576", ops_rmsnorm, {8192, 576, 0}, BESA_F32, "p"},
    {"rmsnorm backward 8192x576", ops_rmsnorm, {8192, 576, 1}, BESA_F32, "p"}, {"rope 8192x576", ops_rope, {8192, 512, 9, 64}, BESA_F32, "p"},
    {"attention forward 8x512 9/3 dh 64", ops_attention, {8, 512, 9, 3, 64, 0}, BESA_F32, "p"}, {"attention backward 8x512 9/3 dh 64", ops_attention, {8, 512, 9, 3, 64, 0}, BESA_BF16, "p"},
    {"attention forward 2x2048 9/3 dh 64", ops_attention, {2, 2048, 9, 3, 64, 0}, BESA_F32, "p"},
    {"swiglu forward 4096x1536", ops_swiglu, {4096 * 1536, 0}, BESA_F32, "p"}, {"swiglu backward 4096x1536", ops_swiglu, {4096 * 1536, 1}, BESA_F32, "p"},
    {"column_sumsq 8192x1536", ops_sumsq, {8192, 1536}, BESA_F32, "p"}, {"block_loss 8192x576", ops_loss, {8192, 576}, BESA_F32, "p"},
    {"score 4096x4096 bf16", ops_score, {4096, 4096, 1, 1, 0}, BESA_BF16, "p"}, {"count_zeros 4096x4096 bf16", ops_score, {4096, 4096, 1, 1, 1}, BESA_BF16, "p"},
    {"rank 2048x1536", ops_rank, {2048, 1536}, BESA_F32, "p"}, {"rank 400x11008", ops_rank, {400, 11008}, BESA_F32, "p"},
    OPS_TYPES("mask_apply 2048x4096", ops_mask, "p", 2048, 4096, 0), {"mask_apply 1536x576 bf16", ops_mask, {1536, 576, 0}, BESA_BF16, "p"},
    {"mask_smallest 2048x4096 bf16", ops_mask, {2048, 4096, 1}, BESA_BF16, "p"},
    {"mask_pattern 2048x4096 bf16", ops_mask, {2048, 4096, 2}, BESA_BF16, "p"},
    OPS_TYPES("bucket 2048x4096", ops_bucket, "p", 2048, 4096, 100), {"bucket 1536x576 bf16", ops_bucket, {1536, 576, 100}, BESA_BF16, "p"},
    {"rate_forward 5000 groups", ops_rates, {5000, 576, 100, 1, 0, 0}, BESA_F32, "p"}, {"rate_backward 5000 groups", ops_rates, {5000, 576, 100, 1, 0, 0}, BESA_BF16, "p"},
    {"project_counts 84k", ops_project, {83968, 8192, 500, 0}, BESA_F32, "p"},
    {"prodigy 500k", ops_optimizer, {500000, 0, 0}, BESA_F32, "p"}, {"adamw 500k", ops_optimizer, {500000, 1, 0}, BESA_F32, "p"},
    {"factor 576", ops_factor, {576}, BESA_F32, "p"}, {"factor 1536", ops_factor, {1536}, BESA_F32, "p"}, {"factor 4096", ops_factor, {4096}, BESA_F32, "p"},
    {"slab 1536x576", ops_slab, {1536, 576, 128, 128, 0, 0}, BESA_F32, "p"}, {"slab 2:4 1536x576", ops_slab, {1536, 576, 128, 128, 2, 4}, BESA_F32, "p"},
    {"push 1536x576", ops_slab, {1536, 576, 0, 128, 0, -1}, BESA_F32, "p"}, {"nll 512x49152", ops_nll, {1, 512, 49152, 64}, BESA_BF16, "p"},
    {"weight step 1", ops_weight_step, {1}, BESA_F32, "t"}, {"weight step 20001", ops_weight_step, {20001}, BESA_F32, "t"},
    {"weight step f16 20003", ops_weight_step, {20003}, BESA_F16, "t"}, {"weight step bf16 20002", ops_weight_step, {20002}, BESA_BF16, "t"},
    {"weight step near 0", ops_weight_step, {1000, 1}, BESA_F32, "t"}, {"weight step f16 near 0", ops_weight_step, {1000, 1}, BESA_F16, "t"},
    {"weight step bf16 near 0", ops_weight_step, {1000, 1}, BESA_BF16, "t"},
    {"mask zeros 1", ops_mask_zeros, {1}, BESA_F32, "t"}, {"mask zeros 20001", ops_mask_zeros, {20001}, BESA_F32, "t"},
    {"mask zeros f16 33", ops_mask_zeros, {33}, BESA_F16, "t"}, {"mask zeros bf16 20003", ops_mask_zeros, {20003}, BESA_BF16, "t"},
    {"rms 1", ops_rms, {1}, BESA_F32, "t"}, {"rms 70001", ops_rms, {70001}, BESA_F32, "t"}, {"rms 3000003", ops_rms, {3000003}, BESA_F32, "t"},
    {"mix 1", ops_mix, {1}, BESA_F32, "t"}, {"mix 20003", ops_mix, {20003}, BESA_F32, "t"},
    {"squares 1", ops_squares, {1}, BESA_F32, "t"}, {"squares 20003", ops_squares, {20003}, BESA_F32, "t"},
    {"score factors 1", ops_score_scale, {1}, BESA_F32, "t"}, {"score factors 20003", ops_score_scale, {20003}, BESA_F32, "t"},
    {"weight step 4M", ops_weight_step, {4000000}, BESA_F32, "p"}, {"weight step bf16 4M", ops_weight_step, {4000000}, BESA_BF16, "p"},
    OPS_TYPES("score rows 1x1", ops_score_rows, "t", 1, 1), OPS_TYPES("score rows 3x31", ops_score_rows, "t", 3, 31),
    OPS_TYPES("score rows 70x1000", ops_score_rows, "t", 70, 1000), OPS_TYPES("score rows 1x33", ops_score_rows, "t", 1, 33),
    {"score rows 2x70000", ops_score_rows, {2, 70000}, BESA_BF16, "t"}, {"score rows 4096x4096 bf16", ops_score_rows, {4096, 4096}, BESA_BF16, "p"},
    {"given slab 1x1", ops_given, {1, 1, 0, 1}, BESA_F32, "t"}, {"given slab 5x40", ops_given, {5, 40, 3, 29}, BESA_F32, "t"},
    {"given slab 37x200", ops_given, {37, 200, 64, 128}, BESA_F32, "t"}, {"given slab 1536x576", ops_given, {1536, 576, 128, 128}, BESA_F32, "p"},
    {"whole Hessian 1", ops_whole, {1, 1}, BESA_F32, "t"}, {"whole Hessian 31", ops_whole, {3, 31}, BESA_F32, "t"},
    {"whole Hessian 135, undamped", ops_whole, {70, 135, 1}, BESA_F32, "t"}, {"whole Hessian 64", ops_whole, {5, 64}, BESA_F32, "t"},
    {"Hessian product 512x576", ops_whole, {512, 576}, BESA_F32, "p"},
    {"refit step 1x1", ops_refit_step, {1, 1}, BESA_F32, "t"}, {"refit step 7x19", ops_refit_step, {7, 19}, BESA_F32, "t"},
    {"refit step 65x320", ops_refit_step, {65, 320}, BESA_F32, "t"}, {"refit step 6x2500", ops_refit_step, {6, 2500}, BESA_F32, "t"},
    {"refit step 512x576", ops_refit_step, {512, 576}, BESA_F32, "p"},
    {"refit ends 1", ops_refit_ends, {1}, BESA_F32, "t"}, {"refit ends 40003", ops_refit_ends, {40003}, BESA_F32, "t"},
    {"refit ends f16 40001", ops_refit_ends, {40001}, BESA_F16, "t"}, {"refit ends bf16 40002", ops_refit_ends, {40002}, BESA_BF16, "t"},
    {"refit ends near 0", ops_refit_ends, {1000, 1}, BESA_F32, "t"}, {"refit ends f16 near 0", ops_refit_ends, {1000, 1}, BESA_F16, "t"},
    {"refit ends bf16 near 0", ops_refit_ends, {1000, 1}, BESA_BF16, "t"},
    {"vector step 1", ops_weight_step, {1, 0, 1}, BESA_F32, "t"}, {"vector step 20003", ops_weight_step, {20003, 0, 1}, BESA_BF16, "t"},
    {"column_sum 1x1", ops_column_sum, {1, 1, 0}, BESA_F32, "t"}, {"column_sum norm 1x1", ops_column_sum, {1, 1, 1}, BESA_F32, "t"},
    {"column_sum 33x127", ops_column_sum, {33, 127, 0}, BESA_F32, "t"}, {"column_sum norm 33x127", ops_column_sum, {33, 127, 1}, BESA_F32, "t"},
    {"column_sum 3x33", ops_column_sum, {3, 33, 0}, BESA_F32, "t"}, {"column_sum norm 1000x1000", ops_column_sum, {1000, 1000, 1}, BESA_F32, "t"},
    {"column_sum 1000x1000", ops_column_sum, {1000, 1000, 0}, BESA_F32, "t"}, {"column_sum norm 5000x64", ops_column_sum, {5000, 64, 1}, BESA_F32, "t"},
    {"column_sum 8192x1536", ops_column_sum, {8192, 1536, 0}, BESA_F32, "p"}, {"column_sum norm 8192x576", ops_column_sum, {8192, 576, 1}, BESA_F32, "p"},
    OPS_TYPES("quantize 1x1", ops_quantize, "t", 1, 1, 1, 3), OPS_TYPES("quantize 9x127", ops_quantize, "tg", 9, 127, 127, 4),
    OPS_TYPES("quantize 33x1000 groups of 64", ops_quantize, "tg", 33, 1000, 64, 3), OPS_TYPES("quantize 5x70 groups of 33, 8 bits", ops_quantize, "tg", 5, 70, 33, 8),
    OPS_TYPES("quantize 70x1000 nearest", ops_quantize, "t", 70, 1000, 1000, 2, 1), OPS_TYPES("quantize 5x33 zeros", ops_quantize, "t", 5, 33, 7, 4, 2),
    {"slab 5x96 on levels", ops_slab_levels, {5, 96, 0, 32, 96, 0}, BESA_F32, "t"}, {"slab 40x150 on levels", ops_slab_levels, {40, 150, 22, 128, 33, 0}, BESA_F32, "t"},
    {"slab 33x128 2:4 on levels", ops_slab_levels, {33, 128, 32, 64, 16, 4}, BESA_F32, "t"},
    {"quantize 3x2000", ops_quantize, {3, 2000, 2000, 5}, BESA_BF16, "tg"},
    {"quantize 2048x4096 bf16", ops_quantize, {2048, 4096, 4096, 4}, BESA_BF16, "p"}, {"quantize 2048x4096 f32", ops_quantize, {2048, 4096, 4096, 4}, BESA_F32, "p"},
    {"quantize 2048x4096 groups of 128", ops_quantize, {2048, 4096, 128, 4}, BESA_BF16, "p"}, {"quantize gradient 2048x4096", ops_quantize, {2048, 4096, 4096, 4, 3}, BESA_BF16, "p"},
    OPS_TYPES("relative scores 7x9", ops_score_relative, "t", 7, 9, 0), OPS_TYPES("relative scores 300x1000", ops_score_relative, "t", 300, 1000, 0),
    {"relative scores, rows from 3", ops_score_relative, {40, 64, 3}, BESA_BF16, "t"},
    {"rope 40/20 3 heads, 24 of 32", ops_rope, {40, 20, 3, 32, 24}, BESA_F32, "t"}, {"rope 100/50 5 heads, 6 of 18", ops_rope, {100, 50, 5, 18, 6}, BESA_F32, "t"},
    {"rope 64/64 2 heads, 96 of 128", ops_rope, {64, 64, 2, 128, 96}, BESA_F32, "t"},
    {"attention 2x33 scale", ops_attention, {2, 33, 3, 3, 20, 0, 5, 0}, BESA_F32, "tg"}, {"attention 1x70 gqa 4/2 cap", ops_attention, {1, 70, 4, 2, 16, 0, 0, 15}, BESA_F32, "tg"},
    {"attention 2x193 gqa 4/1 cap, scale", ops_attention, {2, 193, 4, 1, 31, 0, 30, 20}, BESA_F32, "tg"},
    {"attention 1x300 window 40 cap", ops_attention, {1, 300, 4, 2, 32, 40, 25, 500}, BESA_F32, "tg"}, {"attention one token cap", ops_attention, {2, 1, 4, 2, 16, 0, 0, 10}, BESA_F32, "t"},
    {"geglu 1", ops_geglu, {1}, BESA_F32, "tg"}, {"geglu 127", ops_geglu, {127}, BESA_F32, "tg"}, {"geglu 70001", ops_geglu, {70001}, BESA_F32, "t"},
    {"residual 1", ops_residual, {1, 0}, BESA_F32, "t"}, {"residual 20003", ops_residual, {20003, 0}, BESA_F32, "t"}, {"residual 20003 of none", ops_residual, {20003, 1}, BESA_F32, "t"},
    {"residual 40001 added", ops_residual, {40001, 2}, BESA_F32, "t"}, {"residual 333 over z", ops_residual, {333, 3}, BESA_F32, "t"},
    {"shift 1", ops_shift, {1}, BESA_F32, "t"}, {"shift 20003", ops_shift, {20003}, BESA_F32, "t"},
    {"softcap 1", ops_softcap, {1, 30}, BESA_F32, "t"}, {"softcap 70001", ops_softcap, {70001, 30}, BESA_F32, "t"}, {"softcap 5003 scale alone", ops_softcap, {5003, 0}, BESA_F32, "t"},
    {"divergence 1 of 1", ops_divergence, {1, 1, 1}, BESA_F32, "t"}, {"divergence 5 of 33", ops_divergence, {5, 33, 40}, BESA_F32, "t"},
    {"divergence 9 of 1000 by 333", ops_divergence, {9, 1000, 333}, BESA_F32, "t"}, {"divergence 3 of 9000 by 8999", ops_divergence, {3, 9000, 8999}, BESA_F32, "t"},
    {"divergence 7 of 500, the same", ops_divergence, {7, 500, 97, 1}, BESA_F32, "t"},
};
enum { OPS_CASES = sizeof ops_cases / sizeof *ops_cases };

/* GB/s of a copy, reads and writes counted; all threads where the host's memory is the device's */
static double ops_copy_bandwidth(besa_backend *be, int threads)
{
    size_t bytes = (size_t)256 << 20, part = bytes / 64;
    double best = 1e30;
    void *a, *b;
    if (be->alloc(be, &a, bytes) != BESA_OK || be->alloc(be, &b, bytes) != BESA_OK) return 0;
    (void)be->zero(be, BESA_QUEUE_COMPUTE, a, bytes);
    (void)be->zero(be, BESA_QUEUE_COMPUTE, b, bytes);
    for (int i = 0; i < 6; i++) {
        double t0, t1;
        (void)be->synchronize(be, BESA_QUEUE_COMPUTE);
        t0 = ops_now();
        if (be->unified_memory) {
            BESA__PARALLEL_FOR(threads)
            for (int64_t k = 0; k < 64; k++) memcpy((char *)b + (size_t)k * part, (char *)a + (size_t)k * part, part);
        } else (void)be->copy(be, BESA_QUEUE_COMPUTE, b, a, bytes);
        (void)be->synchronize(be, BESA_QUEUE_COMPUTE);
        t1 = ops_now();
        best = t1 - t0 < best ? t1 - t0 : best;
    }
    be->free(be, a), be->free(be, b);
    return 2.0 * (double)bytes / best * 1e-9;
}

/* One case; its hash is of all bytes that the backend gave. */
static void ops_run_case(ops *t, int index)
{
    const ops_case *c = &ops_cases[index];
    t->random = 88172645463325252u + (uint64_t)index;
    t->hash = 14695981039346656037u;
    t->buffers = t->hosts = t->failed = 0;
    t->workspace = NULL;
    t->be->workspace = NULL, t->be->workspace_bytes = 0;
    c->run(t, c);
    ops_guard(t);
    for (int i = 0; i < t->buffers; i++) t->be->free(t->be, t->buffer[i]);
    for (int i = 0; i < t->hosts; i++) free(t->host[i]);
}

static void ops_print_speed(const ops *t, const char *name, double bandwidth)
{
    double rate = 1e-9 * t->work / t->seconds;
    printf("PASS %-38s %9.3f ms %8.1f %s", name, 1e3 * t->seconds, rate, t->unit);
    if (t->unit[1] == 'B') printf(" (%.0f %% of a copy)", 100 * rate / bandwidth);
    printf("\n");
}

/* hashes (OPS_CASES) may be NULL; counts (3) = passed, failed, skipped are added to */
static void ops_run(ops *t, const char *filter, double bandwidth, uint64_t *hashes, int counts[3])
{
    for (int i = 0; i < OPS_CASES; i++) {
        const ops_case *c = &ops_cases[i];
        if (!strchr(c->modes, t->mode[0]) || (filter && !strstr(c->name, filter))) continue;
        ops_run_case(t, i);
        counts[t->failed ? 1 : 0]++;
        if (hashes) hashes[i] = t->hash;
        if (t->failed) printf("FAIL %s %s\n", c->name, t->detail);
        else if (ops_is(t, "perf"))
            ops_print_speed(t, c->name, bandwidth);
        else if (!t->quiet) printf("PASS %s\n", c->name);
    }
}

BESA__UNUSED static int besa_test_backend(besa_backend *be, const char *mode)
{
    ops t;
    int counts[3] = {0, 0, 0};
    double bandwidth = 0;
    memset(&t, 0, sizeof t);
    t.be = be, t.mode = mode;
    if (ops_is(&t, "perf")) {
        bandwidth = ops_copy_bandwidth(be, 64);
        printf("copy bandwidth %.1f GB/s, reads and writes\n", bandwidth);
    }
    ops_run(&t, NULL, bandwidth, NULL, counts);
    printf("%d passed, %d failed, %d skipped\n", counts[0], counts[1], counts[2]);
    return counts[1];
}
#endif
