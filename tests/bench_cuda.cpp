/* bench_cuda.cpp - speed of the CUDA backend: measured on a GPU, or projected without one.
 *
 *   bench_cuda [--models 7B,70B] [--nsamples 128] [--seqlen 2048] [--runs 3] [--output FILE]
 *       built by nvcc: bandwidth of a copy and speed of a large product; each operation beside them at the shapes of
 *       large models; whole blocks with random weights, no disk. The text goes to FILE too.
 *   bench_cuda --model [--tflops 700] [--gbs 2700] [--score-gbs 2350] [--launch-us 3] [--host-gbs 50] [--start 2.5] ...
 *       built on the stand-in runtime: one block's list of launches, and the time that a device with these numbers takes for
 *       it. A projection; the numbers are an H100's (80 GB HBM3), as bench_cuda measured them on 2026-11-26: products of bf16
 *       matrices reach 0.83 to 0.99 of 730 TFLOP/s, those with float results 0.80 to 0.86; kernels 0.8 to 0.97 of a copy's
 *       3,010 GB/s, rates 1.7 ns a row forward and 5.3 ns back, attention's products and softmax 2,350 GB/s; a kernel that does nothing takes 2.8 to 3.6 us; a run has 2.4 s
 *       before its first block and after its last. Files are read at 2 GB/s and written at 0.5, beside the blocks (--read-gbs,
 *       --write-gbs, --hash-gbs); --dtype f16 and f32 are checkpoints of these: F16 becomes bf16 on its way in.
 *       Then the same on 2 to 64 GPUs, whose sums and their order are the library's: section "several GPUs".
 *   bench_cuda --check [--only NAME]
 *       the same as tests: a small run for real, then the projection's targets. PASS and FAIL lines.
 *
 * The backend's table is wrapped: every operation knows what it must read and write once (cost functions below). Sizes
 * are those of LLaMA models with one sequence of --seqlen tokens at a time; the targets are meant for 128 x 2048 tokens. */
#define BESA_IMPLEMENTATION
#ifndef BESA_CUDA
#define BESA_CUDA
#endif
#include "besa.h"
#include "besa_cuda.cuh"
#include "test.h"
#ifdef CUDA_STANDIN
#include "standin.h"
#endif
#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

typedef struct model {
    const char *name;
    int64_t hidden, inner, heads, kv_heads, head_dim, blocks;
    int operations;                    /* its shapes are used for single operations too */
    double seconds, most;              /* goal for 128 x 2048 tokens on an H100, 0: none; what the projection may come to in tests */
} model;

static const model g_models[] = {
    {"7B", 4096, 11008, 32, 32, 128, 32, 1, 45, 46},
    {"13B", 5120, 13824, 40, 40, 128, 40, 0, 0, 0},
    {"34B", 8192, 22016, 64, 8, 128, 48, 0, 0, 0},
    {"70B", 8192, 28672, 64, 8, 128, 80, 1, 480, 420},
    {"tiny", 64, 160, 4, 2, 16, 2, 1, 0, 0},
};

static struct {
    const char *models, *output, *only;
    int64_t nsamples, seqlen, runs;
    double tflops, gbs, score_gbs, launch_us, host_gbs, start; /* the projection's device; seconds around the blocks */
    double read_gbs, write_gbs, hash_gbs;      /* its disk, and the host's thread that reads, writes and hashes */
    double link_gbs, net_gbs;                  /* sums over GPUs of one machine; between machines, each way */
    int processors;
    besa_dtype dtype;                          /* of the weights */
    int project, check, quick;
} g_options = {NULL, NULL, NULL, 128, 2048, 3, 700, 2700, 2350, 3, 50, 2.5, 2, 0.5, 4, 360, 25, 132, BESA_BF16, 0, 0, 0};

static FILE *g_file;
static int g_quiet; /* tests print their verdicts alone, unless TEST_VERBOSE is set */

/* printf, to the file too */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    FILE *to[2] = {stdout, g_file};
    for (int i = 0; i < 2; i++) {
        va_list args;
        if (!to[i] || g_quiet) continue;
        va_start(args, format);
        vfprintf(to[i], format, args);
        va_end(args);
        fflush(to[i]);
    }
}

/* Whether --models names it; without --models all but "tiny" are meant. */
static int chosen(const model &m, const char *otherwise)
{
    std::string list = std::string(",") + (g_options.models ? g_options.models : otherwise) + ",";
    return list.find(std::string(",") + m.name + ",") != std::string::npos;
}

/* ---- what operations cost -------------------------------------------------------------------- */

typedef struct op_cost {
    double bytes, flop;                /* read and written once; of its products */
    double kernels;                    /* bytes that its kernels move, beside its products */
    double per_score;                  /* the same per element of attention's scores, whose number its products tell */
    double seconds = 0;                /* at least, where neither bytes nor FLOP take the time */
} op_cost;

typedef struct row {                   /* of the list of launches: one operation's products or kernels */
    double launches, bytes, flop, seconds;
} row;

typedef struct line {
    row pass[BESA_PASS_COUNT + 1];     /* the last: not yet attributed to a pass */
    int product, sparsity, known;
    std::set<std::string> kernels;
} line;

static struct {
    besa_backend inner;                /* the table that the wrapped one calls */
    const char *op;                    /* running, or NULL */
    op_cost call, all;                 /* of op; of all since they were last set to nothing */
    double scores, flop[BESA_PASS_COUNT + 1];
    int64_t head_dim;
    std::map<std::string, line> lines;
    std::map<void *, size_t> blocks;
    size_t live, peak;
} g;

typedef struct sums {                  /* over ranks, in one pass */
    double calls, bytes, seconds, waited; /* waited: computing stood still for them */
} sums;

static struct {
    int64_t ranks;
    double compute, reduce;            /* seconds at which what the queues hold so far is done */
    sums pass[BESA_PASS_COUNT + 1];    /* the last: not yet attributed to a pass */
} g_comm;

static void add_kernel_bytes(void);

static void enter(const char *op, const op_cost &cost)
{
    g.op = op;
    g.call = cost;
    g.scores = 0;
    g.flop[BESA_PASS_COUNT] += cost.flop;
    g.all.bytes += cost.bytes, g.all.flop += cost.flop;
}

static void leave(void)
{
    add_kernel_bytes();
    g.op = NULL;
}

/* One entry of the table, wrapped: its arguments are found from its type. */
template <auto Slot, typename Type = decltype(Slot)> struct watched;
template <auto Slot, typename... A> struct watched<Slot, besa_result (*besa_backend::*)(besa_backend *, A...)> {
    static inline const char *name;
    static inline std::function<op_cost(A...)> cost;
    static besa_result call(besa_backend *be, A... a)
    {
        enter(name, cost(a...));
        besa_result result = (g.inner.*Slot)(be, a...);
        leave();
        return result;
    }
};

template <auto Slot, typename Cost> static void watch(besa_backend *be, const char *name, Cost cost)
{
    watched<Slot>::name = name;
    watched<Slot>::cost = cost;
    be->*Slot = watched<Slot>::call;
}
#define WATCH(slot, ...) watch<&besa_backend::slot>(be, #slot, __VA_ARGS__)

static double times(int64_t a, int64_t b) { return static_cast<double>(a) * static_cast<double>(b); }
static double size_of(besa_dtype dtype) { return static_cast<double>(besa_dtype_size(dtype)); }
static double rank_size(int64_t columns) { return columns > 65536 ? 4 : 2; }
static op_cost kernels(double bytes, double seconds = 0) { return {bytes, 0, bytes, 0, seconds}; }

static void watch_products(besa_backend *be)
{
    double a = size_of(be->activation_dtype);
    besa_dtype act = be->activation_dtype;
    auto linear = [=](besa_dtype t, int64_t T, int64_t R, int64_t C, int more_reads, double bias) {
        double convert = t == act ? 0 : times(R, C) * (size_of(t) + a);
        return op_cost{a * (times(T, C) + times(T, R) + more_reads * times(T, R)) + size_of(t) * times(R, C),
                    2 * times(T, R) * static_cast<double>(C), convert + bias, 0};
    };
    WATCH(linear_forward, [=](void *, const void *, const void *, besa_dtype t, const float *b, int64_t T, int64_t R,
                              int64_t C, int add) { return linear(t, T, R, C, add, b ? 2 * a * times(T, R) : 0); });
    WATCH(linear_backward_input, [=](void *, const void *, const void *, besa_dtype t, int64_t T, int64_t R, int64_t C,
                                     int add) {
        op_cost w = linear(t, T, R, C, 0, 0);
        w.bytes += add * a * times(T, C);
        return w;
    });
    WATCH(linear_backward_weight, [=](void *, besa_dtype t, const void *, const void *, int64_t T, int64_t, int64_t C,
                                      int64_t, int64_t R, int add) {
        return op_cost{a * times(T, R + C) + (add ? 2 : 1) * size_of(t) * times(R, C), 2 * times(T, R) * static_cast<double>(C), 0, 0};
    });
    WATCH(gram, [=](float *, const void *, float, int64_t T, int64_t C) { /* the lower half, read and written */
        return op_cost{a * times(T, C) + 4 * times(C, C), times(T, C) * static_cast<double>(C), 0, 0};
    });
    WATCH(logits, [=](float *, const void *, const void *, besa_dtype t, int64_t T, int64_t V, int64_t d) {
        double flop = 2 * times(T, V) * static_cast<double>(d);
        double convert = t == act ? 0 : times(V, d) * (size_of(t) + a);
        return op_cost{a * times(T, d) + size_of(t) * times(V, d) + 4 * times(T, V), flop, convert, 0};
    });
}

/* The visible half of the scores */
static double attention_seen(const besa_attention_shape *s)
{
    return times(s->seqlen, s->seqlen + 1) / 2 * times(s->batch, s->num_attention_heads);
}

static void watch_attention(besa_backend *be)
{
    double a = size_of(be->activation_dtype);
    auto sizes = [](const besa_attention_shape *s, double *q, double *kv) {
        *q = times(s->batch * s->seqlen, s->num_attention_heads * s->head_dim);
        *kv = times(s->batch * s->seqlen, s->num_key_value_heads * s->head_dim);
    };
    WATCH(attention_forward, [=](void *, const void *, const void *, const void *, const besa_attention_shape *s) {
        double q, kv;
        sizes(s, &q, &kv);
        g.head_dim = s->head_dim;
        double seen = attention_seen(s); /* the softmax reads what is seen of S and writes all of P */
        return op_cost{a * (2 * q + 2 * kv), 4 * seen * static_cast<double>(s->head_dim), 4 * seen, a};
    });
    /* P again, then dS from P and dP, over two products' scores; dK and dV from float sums */
    WATCH(attention_backward, [=](void *, void *, void *, const void *, const void *, const void *, const void *,
                                  const besa_attention_shape *s) {
        double q, kv;
        sizes(s, &q, &kv);
        g.head_dim = s->head_dim;
        double seen = attention_seen(s), flop = 10 * seen * static_cast<double>(s->head_dim);
        return op_cost{a * (3 * q + 4 * kv), flop, (8 + a) * seen + 2 * (4 + a) * kv, a};
    });
}

static void watch_pieces(besa_backend *be)
{
    double a = size_of(be->activation_dtype);
    WATCH(convert, [](void *, besa_dtype to, const void *, besa_dtype from, int64_t n) {
        return kernels((size_of(to) + size_of(from)) * static_cast<double>(n));
    });
    WATCH(rmsnorm_forward, [=](void *, float *, const void *, const float *, int64_t n, int64_t d, float) {
        return kernels(2 * a * times(n, d) + 4 * static_cast<double>(n + d));
    });
    WATCH(rmsnorm_backward, [=](void *, const void *, const void *, const float *, const float *, int64_t n, int64_t d,
                                int add) { return kernels((3 + add) * a * times(n, d) + 4 * static_cast<double>(n + d)); });
    WATCH(rope, [=](void *, const float *, const float *, int64_t T, int64_t seqlen, int64_t heads, int64_t dh, int64_t, int) {
        return kernels(2 * a * times(T, heads * dh) + 4 * times(seqlen, dh));
    });
    WATCH(swiglu_forward, [=](void *, const void *, const void *, int64_t n) {
        return kernels(3 * a * static_cast<double>(n));
    });
    WATCH(swiglu_backward, [=](void *, void *, const void *, const void *, const void *, int64_t n) {
        return kernels(5 * a * static_cast<double>(n));
    });
    WATCH(column_sumsq, [=](float *, const void *, int64_t T, int64_t d) {
        return kernels(a * times(T, d) + 8 * static_cast<double>(d));
    });
    WATCH(column_sum, [=](float *, const void *, const void *x, const float *, int64_t n, int64_t d) {
        return kernels((x ? 2 : 1) * a * times(n, d) + 8 * static_cast<double>(d));
    });
    WATCH(block_loss, [=](float *, void *dy, const void *, const void *, const float *, float, int64_t T, int64_t d,
                           int add) {
        return kernels((dy ? 3 + add : 2) * a * times(T, d) + 4 * static_cast<double>(d));
    });
    WATCH(power, [](float *, const float *, float, int64_t n) { return kernels(8 * static_cast<double>(n)); });
    WATCH(fill, [](int32_t *, int32_t, int64_t n) { return kernels(4 * static_cast<double>(n)); });
    WATCH(nll_update, [](float *, const float *, const int32_t *, int64_t, int64_t count, int64_t T, int) {
        return kernels(4 * times(T, count) + 28 * static_cast<double>(T));
    });
    WATCH(divergence_update, [](float *, int32_t *, const float *, const float *, int64_t, int64_t count, int64_t T, int) {
        return kernels(8 * times(T, count) + 40 * static_cast<double>(T));
    });
    WATCH(nll_sum, [](double *, const float *, const int32_t *, int64_t windows, int64_t seqlen) {
        return kernels(16 * times(windows, seqlen));
    });
}

static void watch_masks(besa_backend *be)
{
    WATCH(score, [](float *, const void *, besa_dtype t, const float *, int, int64_t R, int64_t C) {
        return kernels((size_of(t) + 4) * times(R, C) + 4 * static_cast<double>(C));
    });
    WATCH(score_rows, [](double *, int32_t *, const void *, besa_dtype t, const float *, float, int64_t R, int64_t C) {
        return kernels(size_of(t) * times(R, C) + 4 * static_cast<double>(C) + 8 * static_cast<double>(R));
    });
    WATCH(count_zeros, [](int32_t *, int32_t *, const void *, besa_dtype t, int64_t R, int64_t C) {
        return kernels(size_of(t) * times(R, C) + 4 * static_cast<double>(R));
    });
    WATCH(rank_rows, [](void *, const float *, int64_t R, int64_t C) { return kernels((4 + rank_size(C)) * times(R, C)); });
    WATCH(mask_apply, [](void *, const void *, besa_dtype t, const void *, const int32_t *, int64_t R, int64_t C) {
        return kernels((2 * size_of(t) + rank_size(C)) * times(R, C) + 4 * static_cast<double>(R));
    });
    /* Taken as: every row has changed, by a thousandth of its weights, each in a sector of 32 bytes of its own */
    WATCH(mask_update, [](void *, const void *, besa_dtype, const void *, const int32_t *, int32_t *, int64_t R, int64_t C) {
        return kernels((rank_size(C) + 0.064) * times(R, C) + 12 * static_cast<double>(R));
    });
    WATCH(mask_smallest, [](void *, const void *, besa_dtype t, const float *, int64_t, int64_t R, int64_t C) {
        return kernels((2 * size_of(t) + 4) * times(R, C));
    });
    WATCH(mask_pattern, [](void *, const void *, besa_dtype t, const float *, int, int, int64_t R, int64_t C) {
        return kernels((2 * size_of(t) + 4) * times(R, C));
    });
    WATCH(bucket_gradient, [](float *, const void *, besa_dtype dw, const void *, besa_dtype t, const void *, const uint16_t *,
                              int64_t R, int64_t C, int64_t D) {
        return kernels((size_of(dw) + size_of(t) + rank_size(C)) * times(R, C) + 8 * times(R, D) + 2 * static_cast<double>(C));
    });
}

/* The rate shape among an operation's arguments, and bytes of the row groups' thetas */
template <typename... A> static const besa_rate_shape *shape_of(A... a)
{
    return std::get<const besa_rate_shape *>(std::make_tuple(a...));
}

static double theta_bytes(const besa_rate_shape *s)
{
    int64_t groups = (s->rows + s->group_rows - 1) / s->group_rows;
    return 4 * times(s->logits, (s->row_scale != 0.0f ? groups : 0) + (s->layer_scale != 0.0f ? 1 : 0));
}

static void watch_rates(besa_backend *be)
{
    WATCH(rate_forward, [](auto... a) { /* alpha, n, zeros beside theta */
        const besa_rate_shape *s = shape_of(a...);
        return kernels(theta_bytes(s) + 12 * static_cast<double>(s->rows), 1.7e-9 * static_cast<double>(s->rows));
    });
    WATCH(rate_mean, [](float *, const float *, float, int, int64_t R) { return kernels(4 * static_cast<double>(R)); });
    WATCH(project_counts, [](int32_t *, int64_t *, const float *, const int32_t *, const int32_t *, int64_t, int64_t R) {
        return kernels((16 + 145 * 16) * static_cast<double>(R)); /* 80 halvings of the shift, 64 of the rest */
    });
    WATCH(rate_backward, [](auto... a) {
        const besa_rate_shape *s = shape_of(a...);
        return kernels(2 * theta_bytes(s) + 4 * times(s->rows, s->logits - 1), 5.3e-9 * static_cast<double>(s->rows));
    });
    WATCH(optimizer_step, [](const besa_optimizer_step *o) { /* Prodigy's d comes between: m, v, theta are read again */
        double n = static_cast<double>(o->n), once = o->kind == BESA_PRODIGY ? 40 : 28;
        return op_cost{once * n, 0, (o->kind == BESA_PRODIGY ? 52 : 28) * n, 0};
    });
}

static void watch_weights(besa_backend *be)
{
    WATCH(rms, [](float *, const float *, int64_t n) { return kernels(4 * static_cast<double>(n)); });
    WATCH(weight_step, [](const besa_weight_step *o) { /* gradient, w, m and v in, w, m and v out; masked and source both ways */
        double n = static_cast<double>(o->n), dtype = static_cast<double>(besa_dtype_size(o->dtype));
        return kernels(n * (28 + (!o->masked ? 0 : o->dtype == BESA_F32 ? 2 : 4) * dtype));
    });
    WATCH(mask_zeros, [](void *, const void *, besa_dtype dtype, int64_t n) {
        return kernels(3 * static_cast<double>(n) * static_cast<double>(besa_dtype_size(dtype)));
    });
    WATCH(accumulate_squares, [](float *, const float *, int64_t n) { return kernels(12 * static_cast<double>(n)); });
    WATCH(absolute_sums, [](float *, const void *, besa_dtype t, int64_t R, int64_t C) { return kernels(size_of(t) * times(R, C)); });
    WATCH(score_relative, [](float *, const void *, besa_dtype t, const float *, int64_t R, int64_t C) {
        return kernels((size_of(t) + 8) * times(R, C));
    });
    WATCH(score_scale, [](float *, const float *, int64_t n) { return kernels(12 * static_cast<double>(n)); });
    WATCH(mix, [be](void *, const void *, float, int64_t n) {
        return kernels(3 * static_cast<double>(n) * static_cast<double>(besa_dtype_size(be->activation_dtype)));
    });
}

static void watch_quantization(besa_backend *be)
{
    WATCH(quantize_range, [](float *, const void *, besa_dtype t, int64_t, int64_t R, int64_t C) {
        return kernels(size_of(t) * times(R, C));
    });
    WATCH(quantize_grid, [](const besa_quantizer *q) {
        return kernels(24 * times(q->rows, (q->columns + q->group - 1) / q->group));
    });
    WATCH(quantize, [](void *, const void *, besa_dtype t, const besa_quantizer *q) {
        return kernels(2 * size_of(t) * times(q->rows, q->columns));
    });
    WATCH(quantize_gradient, [](float *, const float *, const void *, besa_dtype t, const besa_quantizer *q) {
        return kernels((4 + size_of(t)) * times(q->rows, q->columns));
    });
}

static void watch_sparsegpt(besa_backend *be)
{
    WATCH(hessian_factor, [](float *, int32_t *, float, int64_t C) { /* two factors, an inverse, a product */
        return op_cost{8 * times(C, C), 4.0 / 3 * times(C, C) * static_cast<double>(C), 0, 0};
    });
    WATCH(diagonal, [](float *, const float *, const int32_t *, int64_t C) { return kernels(12 * static_cast<double>(C)); });
    WATCH(sparsegpt_slab, [](float *, float *, const float *, const int32_t *, int64_t, int64_t width, double, int, int,
                             const besa_quantizer *, int64_t R, int64_t) { return kernels(12 * times(R, width)); });
    WATCH(sparsegpt_push, [](float *, const float *, const float *, int64_t first, int64_t width, int64_t R, int64_t C) {
        int64_t right = C - first - width;
        double flop = 2 * times(R, right) * static_cast<double>(width);
        return op_cost{8 * times(R, right) + 4 * times(R + right, width), flop, 0, 0};
    });
}

static void watch_refit(besa_backend *be)
{
    WATCH(sparsegpt_given, [](float *, float *, const float *, const float *, int64_t, int64_t width, int64_t R, int64_t) {
        return kernels(16 * times(R, width));
    });
    WATCH(hessian_whole, [](float *, float *, float, int64_t C) { return kernels(6 * times(C, C)); }); /* half of it read */
    WATCH(hessian_product, [](float *, const float *, const float *, int64_t R, int64_t C) {
        return op_cost{8 * times(R, C) + 4 * times(C, C), 2 * times(R, C) * static_cast<double>(C), 0, 0};
    });
    WATCH(refit_begin, [](float *, float *, const void *, const void *, besa_dtype dtype, int64_t n) {
        return kernels(static_cast<double>(n) * (8 + 2 * static_cast<double>(besa_dtype_size(dtype))));
    });
    WATCH(refit_step, [](const besa_refit_step *o) { /* r and p are read again */
        double once = (o->first ? 20 : 32) * times(o->rows, o->columns);
        return op_cost{once, 0, once + (o->first ? 4 : 16) * times(o->rows, o->columns), 0};
    });
    WATCH(refit_end, [](void *, const float *, besa_dtype dtype, int64_t n) {
        return kernels(static_cast<double>(n) * (4 + 2 * static_cast<double>(besa_dtype_size(dtype))));
    });
}

static besa_result watched_alloc(besa_backend *be, void **p, size_t bytes)
{
    besa_result result = g.inner.alloc(be, p, bytes);
    if (result != BESA_OK) return result;
    g.blocks[*p] = bytes;
    g.live += bytes;
    g.peak = std::max(g.peak, g.live);
    return BESA_OK;
}

static void watched_free(besa_backend *be, void *p)
{
    if (p && g.blocks.count(p)) g.live -= g.blocks[p], g.blocks.erase(p);
    g.inner.free(be, p);
}

/* A backend whose operations are counted, with none counted yet. Not BESA_OK: *error says why. */
static besa_result open_watched(besa_backend *be, besa_error *error)
{
    besa_result result = besa_cuda_backend(be, NULL, error);
    if (result != BESA_OK) return result;
    g.inner = *be;
    g.op = NULL;
    for (double &flop : g.flop) flop = 0;
    g.lines.clear();
    g.blocks.clear();
    g.live = g.peak = 0;
    be->alloc = watched_alloc;
    be->free = watched_free;
    watch_products(be);
    watch_attention(be);
    watch_pieces(be);
    watch_masks(be);
    watch_rates(be);
    watch_weights(be);
    watch_quantization(be);
    watch_sparsegpt(be);
    watch_refit(be);
    return BESA_OK;
}

/* Progress of a block: what was counted since the last report belongs to this pass. */
static int on_progress(void *, const besa_progress *progress)
{
    g.flop[progress->pass] += g.flop[BESA_PASS_COUNT];
    g.flop[BESA_PASS_COUNT] = 0;
    for (auto &entry : g.lines) {
        row &from = entry.second.pass[BESA_PASS_COUNT], &to = entry.second.pass[progress->pass];
        to.launches += from.launches, to.bytes += from.bytes, to.flop += from.flop, to.seconds += from.seconds;
        from = row();
    }
    sums &from = g_comm.pass[BESA_PASS_COUNT], &to = g_comm.pass[progress->pass];
    to.calls += from.calls, to.bytes += from.bytes, to.seconds += from.seconds, to.waited += from.waited;
    from = sums();
    return 0;
}

/* ---- a block of random weights --------------------------------------------------------------- */

typedef struct test_block {
    besa_block block;
    void *pruned[BESA_LAYERS];
    void *x;
    std::vector<void *> memory;
} test_block;

/* n elements of about a normal distribution, the same few million over and over */
static besa_result fill_noise(besa_backend *be, void *device, besa_dtype dtype, int64_t n, float deviation)
{
    const int64_t most = g_options.quick ? 1 << 12 : (1 << 22) - 3;
    int64_t count = std::min(n, most);
    size_t size = besa_dtype_size(dtype);
    std::vector<unsigned char> tile(static_cast<size_t>(count) * size);
    uint64_t u = 88172645463325252u;
    for (int64_t i = 0; i < count; i++) {
        float sum = 0;
        for (int k = 0; k < 4; k++) {
            u = u * 6364136223846793005u + 1442695040888963407u;
            sum += static_cast<float>(u >> 40) / 16777216.0f - 0.5f;
        }
        float f = sum * 1.7320508f * deviation; /* a sum of four has variance 1/3 */
        uint16_t h = dtype == BESA_BF16 ? besa__f32_to_bf16(f) : besa__f32_to_f16(f);
        memcpy(tile.data() + static_cast<size_t>(i) * size, dtype == BESA_F32 ? static_cast<void *>(&f) : &h, size);
    }
    for (int64_t at = 0; at < n; at += count)
        BESA__TRY(be->upload(be, BESA_QUEUE_COMPUTE, static_cast<char *>(device) + static_cast<size_t>(at) * size,
                             tile.data(), static_cast<size_t>(std::min(count, n - at)) * size));
    return be->synchronize(be, BESA_QUEUE_COMPUTE);
}

static besa_result take_device(besa_backend *be, std::vector<void *> *memory, void **p, size_t bytes)
{
    BESA__TRY(be->alloc(be, p, bytes));
    memory->push_back(*p);
    return BESA_OK;
}

static besa_result send_floats(besa_backend *be, test_block *b, const float **device, const std::vector<float> &values)
{
    void *p;
    BESA__TRY(take_device(be, &b->memory, &p, values.size() * sizeof(float)));
    *device = static_cast<float *>(p);
    BESA__TRY(be->upload(be, BESA_QUEUE_COMPUTE, p, values.data(), values.size() * sizeof(float)));
    return be->synchronize(be, BESA_QUEUE_COMPUTE);
}

static besa_block_shape shape_of_model(const model &m)
{
    besa_block_shape s;
    memset(&s, 0, sizeof s);
    s.hidden_size = m.hidden, s.intermediate_size = m.inner;
    s.num_attention_heads = m.heads, s.num_key_value_heads = m.kv_heads, s.head_dim = m.head_dim;
    s.rms_norm_eps = 1e-5;
    s.rope.theta = 10000;
    return s;
}

static besa_result make_block(besa_backend *be, test_block *b, const model &m)
{
    memset(&b->block, 0, sizeof b->block);
    b->block.shape = shape_of_model(m);
    b->block.dtype = g_options.dtype;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        void *w;
        besa_block_layer(&b->block.shape, i, &rows, &columns);
        size_t bytes = static_cast<size_t>(rows * columns) * besa_dtype_size(g_options.dtype);
        BESA__TRY(take_device(be, &b->memory, &w, bytes));
        BESA__TRY(take_device(be, &b->memory, &b->pruned[i], bytes));
        BESA__TRY(fill_noise(be, w, g_options.dtype, rows * columns, 0.02f));
        b->block.weight[i] = w;
    }
    size_t angles = static_cast<size_t>(g_options.seqlen * m.head_dim / 2);
    std::vector<float> ones(static_cast<size_t>(m.hidden), 1.0f), cosine(angles), sine(angles);
    besa_rope_table(&b->block.shape, g_options.seqlen, cosine.data(), sine.data());
    BESA__TRY(send_floats(be, b, &b->block.norm1, ones));
    BESA__TRY(send_floats(be, b, &b->block.norm2, ones));
    BESA__TRY(send_floats(be, b, &b->block.rope_cos, cosine));
    BESA__TRY(send_floats(be, b, &b->block.rope_sin, sine));
    size_t x = static_cast<size_t>(g_options.nsamples * g_options.seqlen * m.hidden) * besa_dtype_size(be->activation_dtype);
    return take_device(be, &b->memory, &b->x, x);
}

static besa_prune_options options_of(besa_method method)
{
    besa_prune_options o;
    memset(&o, 0, sizeof o);
    o.method = method;
    o.rates.target = 0.5;
    o.progress = on_progress;
    return o;
}

/* ---- the projection -------------------------------------------------------------------------- */

#ifdef CUDA_STANDIN

/* "besa__mask_apply_kernel<W, K>" -> "mask_apply" */
static std::string short_name(const char *name)
{
    std::string s = name;
    size_t begin = s.find("besa__"), end = s.find("_kernel");
    return begin == std::string::npos || end == std::string::npos ? s : s.substr(begin + 6, end - begin - 6);
}

static line &line_of(const std::string &name)
{
    auto found = g.lines.find(name);
    if (found != g.lines.end()) return found->second;
    line &made = g.lines[name];
    made = line();
    made.known = 1;
    return made;
}

static void add_to(line &to, double launches, double bytes, double flop, double bytes_per_second, double flop_per_second = 1)
{
    row &r = to.pass[BESA_PASS_COUNT];
    double seconds = std::max(bytes / bytes_per_second, flop / flop_per_second);
    r.launches += launches, r.bytes += bytes, r.flop += flop;
    seconds = std::max(seconds, launches * g_options.launch_us * 1e-6);
    r.seconds += seconds;
    g_comm.compute += seconds;
}

static void record_product(const standin_record *r)
{
    char sizes[96] = "";
    int attention = g.op && strncmp(g.op, "attention", 9) == 0;
    if (attention && r->k == g.head_dim) g.scores += static_cast<double>(r->m * r->n) * static_cast<double>(r->batch);
    if (!attention) snprintf(sizes, sizeof sizes, ", %lld x %lld x %lld", r->n, r->m, r->k);
    line &to = line_of(std::string(g.op ? g.op : "no operation") + ": product" + sizes);
    to.product = 1;
    double mn = static_cast<double>(r->m) * static_cast<double>(r->n), mk = static_cast<double>(r->m) * static_cast<double>(r->k);
    double nk = static_cast<double>(r->n) * static_cast<double>(r->k);
    int weight_gradient = g.op && strcmp(g.op, "linear_backward_weight") == 0;
    int float_result = weight_gradient && static_cast<double>(r->bytes) > 2 * (mk + nk) + 3 * mn; /* slower than bf16 */
    add_to(to, 1, static_cast<double>(r->bytes), r->flops, (attention ? g_options.score_gbs : g_options.gbs) * 1e9,
           g_options.tflops * (float_result ? 0.87 : 1) * 1e12);
}

/* A kernel's bytes are those of its operation: added when that ends. Sets and copies know theirs. */
static void on_record(const standin_record *r, void *)
{
    if (strcmp(r->kind, "product") == 0) return record_product(r);
    if (strcmp(r->kind, "kernel") == 0) {
        line &to = line_of(g.op ? std::string(g.op) : "bytes not known: " + short_name(r->name));
        if (g.op) to.kernels.insert(short_name(r->name));
        else to.known = 0;
        return add_to(to, 1, 0, 0, 1);
    }
    int host = strcmp(r->name, "d2d") != 0 && strcmp(r->kind, "copy") == 0;
    double bytes = static_cast<double>(r->bytes) * (strcmp(r->name, "d2d") == 0 ? 2 : 1);
    line &to = line_of(std::string(r->kind) + " " + (strcmp(r->kind, "copy") == 0 ? r->name : "") + (g.op ? " in " : "") +
                       (g.op ? g.op : ""));
    to.sparsity = strcmp(r->kind, "set") == 0 && !g.op; /* the bucket sums */
    add_to(to, 1, bytes, 0, (host ? g_options.host_gbs : g_options.gbs) * 1e9);
}

/* Target 2 counts these. */
static int is_sparsity(const std::string &op)
{
    return op == "mask_apply" || op == "mask_update" || op == "bucket_gradient" || op == "optimizer_step" || op.compare(0, 5, "rate_") == 0;
}

static void add_kernel_bytes(void)
{
    double bytes = g.call.kernels + g.call.per_score * g.scores;
    if (!g.op || bytes == 0) return;
    bytes = std::max(bytes, g.call.seconds * g_options.gbs * 1e9); /* as many as would take that long */
    line &to = line_of(g.op);
    int attention = strncmp(g.op, "attention", 9) == 0;
    to.sparsity = is_sparsity(g.op);
    add_to(to, 0, bytes, 0, (attention ? g_options.score_gbs : g_options.gbs) * 1e9);
}

/* Nothing comes down in a dry run. */
static besa_result dry_download(besa_backend *, besa_queue, void *host, const void *, size_t bytes)
{
    memset(host, 0, bytes);
    return BESA_OK;
}

static row sum_of(const line &l)
{
    row sum = row();
    for (const row &r : l.pass) {
        sum.launches += r.launches, sum.bytes += r.bytes, sum.flop += r.flop, sum.seconds += r.seconds;
    }
    return sum;
}

static double weights_of(const model &m)
{
    double d = static_cast<double>(m.hidden), q = static_cast<double>(m.heads * m.head_dim);
    double kv = static_cast<double>(m.kv_heads * m.head_dim), inner = static_cast<double>(m.inner);
    return 2 * d * q + 2 * d * kv + 3 * d * inner;
}

/* ---- several GPUs ----
 *
 * The library makes its calls of a besa_comm as rank 0 of several, which has the largest share, and their bytes are added up
 * here. Sums follow one another on a queue of their own: each begins when computing has come to it, and computing waits where
 * the library waits. So what is hidden behind the backward pass is what the library's own order hides.
 *
 * A sum of n bytes over N GPUs takes 2 (N - 1) / N n / bandwidth, and a latency. Within a machine of 8 by NVLink (450 GB/s each
 * way by H100's data sheet) 360 GB/s: 370 is what NCCL reaches there with a ring, by its authors' word
 * (github.com/NVIDIA/nccl-tests/issues/212; --link-gbs); between machines 200 Gbit/s = 25 GB/s for each machine, of which all is
 * used (--net-gbs). Latencies are those by which NCCL chooses its algorithms (src/graph/tuning.cc, protocol Simple; the better
 * of ring and tree). */

enum { MACHINE = 8 };                  /* GPUs */

static double seconds_of_sum(double bytes)
{
    double ranks = static_cast<double>(g_comm.ranks), machines = ceil(ranks / MACHINE), local = ranks / machines;
    double between = 2 * (machines - 1), ring = 8.4 + (2 * (ranks - 1) - between) * 3.4 + between * 14;
    double tree = 8.4 + 2 * ((local - 1) * 4.0 + ceil(log2(machines)) * 14);
    double gbs = machines > 1 ? g_options.net_gbs : g_options.link_gbs;
    return std::min(ring, tree) * 1e-6 + 2 * (ranks - 1) / ranks * bytes / (gbs * 1e9);
}

static besa_result count_sum(void *, besa_backend *, besa_queue, float *, int64_t count, besa_error *)
{
    sums &s = g_comm.pass[BESA_PASS_COUNT];
    double bytes = 4 * static_cast<double>(count), seconds = seconds_of_sum(bytes);
    s.calls++, s.bytes += bytes, s.seconds += seconds;
    g_comm.reduce = std::max(g_comm.reduce, g_comm.compute) + seconds;
    return BESA_OK;
}

static besa_result watched_wait(besa_backend *be, besa_queue q, int event)
{
    if (q == BESA_QUEUE_COMPUTE && event == BESA__EVENT_REDUCED && g_comm.reduce > g_comm.compute) {
        g_comm.pass[BESA_PASS_COUNT].waited += g_comm.reduce - g_comm.compute;
        g_comm.compute = g_comm.reduce;
    }
    return g.inner.wait(be, q, event);
}

static besa_result no_broadcast(void *, void *, size_t, int, besa_error *) { return BESA_OK; }
static besa_result no_barrier(void *, besa_error *) { return BESA_OK; }
static void no_failure(void *, const besa_error *) {}

/* One block, recorded, on the first of so many GPUs */
static besa_result record_block(const model &m, besa_prune_options o, int64_t ranks, besa_error *error)
{
    besa_backend be;
    test_block b;
    besa_pruner *pruner = NULL;
    besa_comm comm = {0, static_cast<int>(ranks), NULL, count_sum, no_broadcast, no_barrier, no_failure};
    if (ranks > 1) o.comm = &comm, o.batch_size = ranks;
    standin_set_arch(9, 0);
    standin_set_processors(g_options.processors);
    standin_set_shared(227 << 10);
    standin_set_memory(static_cast<size_t>(1) << 44);
    standin_set_dry(1);
    BESA__TRY(open_watched(&be, error));
    be.download = dry_download;
    be.wait = watched_wait;
    memset(&g_comm, 0, sizeof g_comm);
    g_comm.ranks = ranks;
    BESA__TRY(besa__pass_error(&be, make_block(&be, &b, m), error));
    BESA__TRY(besa_pruner_create(&pruner, &be, &b.block.shape, b.block.dtype, 0, &o, g_options.nsamples, g_options.seqlen,
                                 error));
    standin_set_recorder(on_record, NULL);
    besa_result result = besa_pruner_run(pruner, &b.block, NULL, b.x, NULL, b.pruned, NULL, error);
    standin_set_recorder(NULL, NULL);
    besa_pruner_destroy(pruner);
    for (void *p : b.memory) be.free(&be, p);
    be.destroy(&be);
    return result;
}

static void print_lines(double total)
{
    std::vector<std::pair<double, std::string>> order;
    for (auto &entry : g.lines) order.push_back({-sum_of(entry.second).seconds, entry.first});
    std::sort(order.begin(), order.end());
    say("  %-52s %8s %9s %9s %9s %6s\n", "", "launches", "GB", "TFLOP", "ms", "share");
    for (auto &entry : order) {
        const line &l = g.lines[entry.second];
        row r = sum_of(l);
        std::string name = entry.second, list;
        for (const std::string &kernel : l.kernels)
            if (kernel != name) list += (list.empty() ? "" : ", ") + kernel;
        if (!list.empty()) name += " (" + list + ")";
        if (name.size() > 52) name = name.substr(0, 49) + "...";
        say("  %-52s %8.0f %9.2f %9.2f %9.2f %5.1f%%\n", name.c_str(), r.launches, r.bytes * 1e-9, r.flop * 1e-12,
            r.seconds * 1e3, 100 * r.seconds / total);
    }
}

static void print_passes(void)
{
    for (int p = 0; p <= BESA_PASS_COUNT; p++) {
        double launches = 0, seconds = 0, products = 0, flop = 0;
        for (auto &entry : g.lines) {
            const row &r = entry.second.pass[p];
            launches += r.launches, seconds += r.seconds, flop += r.flop;
            if (entry.second.product) products += r.seconds;
        }
        if (launches > 0)
            say("  pass %-8s %8.0f launches  %9.2f ms, products %5.1f %% of it, %6.1f TFLOP/s over all\n",
                p < BESA_PASS_COUNT ? besa_pass_name(static_cast<besa_pass>(p)) : "after", launches, seconds * 1e3,
                100 * products / seconds, flop / seconds * 1e-12);
    }
}

typedef struct projection {
    double flop_per_weight, bytes_per_weight, products; /* of the whole block; of a learning step; a share */
    double seconds, unknown;                            /* of a block; launches of kernels whose bytes are not known */
    double disk, model_seconds;                         /* of a block's files; of the model, where both run side by side */
} projection;

static projection project(const model &m)
{
    projection p = projection();
    double flop = 0, products = 0, sparsity = 0, tokens = times(g_options.nsamples, g_options.seqlen);
    for (auto &entry : g.lines) {
        row r = sum_of(entry.second);
        p.seconds += r.seconds;
        if (entry.second.product) products += r.seconds, flop += r.flop;
        if (entry.second.sparsity) sparsity += entry.second.pass[BESA_PASS_LEARN].bytes;
        if (!entry.second.known) p.unknown += r.launches;
    }
    p.flop_per_weight = flop / (weights_of(m) * tokens);
    p.bytes_per_weight = sparsity / (weights_of(m) * static_cast<double>(g_options.nsamples));
    p.products = products / p.seconds;
    p.disk = 1e-9 * weights_of(m) * size_of(g_options.dtype) * (1 / g_options.read_gbs + 1 / g_options.write_gbs + 2 / g_options.hash_gbs);
    p.model_seconds = std::max(p.seconds, p.disk) * static_cast<double>(m.blocks) + g_options.start;
    return p;
}

enum { TARGETS = 3 };
static const struct { const char *name; double limit; } g_targets[TARGETS] = {
    {"FLOP per weight and token", 11},
    {"sparsity bytes per weight and learning step", 16},
    {"seconds of the model", 0}, /* the model's own */
};

static double limit_of(const model &m, int target) { return target == 2 ? m.seconds : g_targets[target].limit; }

static double value_of(const projection &p, int target)
{
    return target == 0 ? p.flop_per_weight : target == 1 ? p.bytes_per_weight : p.model_seconds;
}

static int project_model(const model &m, projection *p)
{
    besa_error error;
    besa_result result = record_block(m, options_of(BESA_METHOD_BESA), 1, &error);
    *p = project(m);
    say("\n%s: one block, besa with wanda importance, %lld x %lld tokens, batch 1\n", m.name,
        static_cast<long long>(g_options.nsamples), static_cast<long long>(g_options.seqlen));
    say("PROJECTION, not a measurement: every launch takes the most of bytes / %.0f GB/s (attention's %.0f), FLOP / %.0f TFLOP/s and "
        "%.1f us, copies to and from the host %.0f GB/s\n", g_options.gbs, g_options.score_gbs, g_options.tflops,
        g_options.launch_us, g_options.host_gbs);
    if (result != BESA_OK) say("  the dry run ended with: %s\n", error.message);
    print_lines(p->seconds);
    print_passes();
    say("  one block %.2f s, its files beside that %.2f s (disk %.1f and %.1f GB/s, hashes %.0f); %lld blocks and %.1f s around them "
        "%.0f s; products are %.0f %% of a block; %.0f launches of kernels whose bytes are not known\n", p->seconds, p->disk,
        g_options.read_gbs, g_options.write_gbs, g_options.hash_gbs, static_cast<long long>(m.blocks), g_options.start,
        p->model_seconds, 100 * p->products, p->unknown);
    for (int t = 0; t < TARGETS; t++)
        if (limit_of(m, t) > 0)
            say("  target %s: %.2f, at most %.0f: %s\n", g_targets[t].name, value_of(*p, t), limit_of(m, t),
                value_of(*p, t) <= limit_of(m, t) ? "met" : "MISSED");
    return result == BESA_OK;
}

static double pass_seconds(besa_pass pass)
{
    double seconds = 0;
    for (auto &entry : g.lines) seconds += entry.second.pass[pass].seconds;
    return seconds;
}

typedef struct scaling {               /* a block on so many GPUs */
    projection p;                      /* of what one computes; seconds with what it waits for */
    double steps, step_bytes, step_ms, open_ms, other_bytes; /* sums of a learning step, those not hidden; the other passes' */
} scaling;

static int project_ranks(const model &m, const besa_prune_options &o, int64_t ranks, scaling *s)
{
    besa_error error;
    besa_result result = record_block(m, o, ranks, &error);
    const sums &learn = g_comm.pass[BESA_PASS_LEARN];
    *s = scaling();
    s->p = project(m);
    s->steps = static_cast<double>(g_options.nsamples / ranks);
    s->step_bytes = learn.bytes / s->steps;
    s->step_ms = 1e3 * learn.seconds / s->steps, s->open_ms = 1e3 * learn.waited / s->steps;
    for (const sums &pass : g_comm.pass) s->p.seconds += pass.waited, s->other_bytes += pass.bytes;
    s->other_bytes -= learn.bytes;
    if (result != BESA_OK) say("  the dry run on %lld GPUs ended with: %s\n", static_cast<long long>(ranks), error.message);
    return result == BESA_OK;
}

static int project_scaling(const model &m)
{
    static const int64_t counts[] = {1, 2, 4, 8, 16, 64};
    besa_prune_options o = options_of(BESA_METHOD_BESA), both = o;
    scaling s;
    double blocks = static_cast<double>(m.blocks);
    say("\n%s on several GPUs: PROJECTION, not a measurement; up to %d in a machine (%.0f GB/s), %.0f GB/s between machines; a batch of "
        "as many sequences as GPUs\n", m.name, MACHINE, g_options.link_gbs, g_options.net_gbs);
    say("  %4s %6s %9s %9s %9s %9s %9s %9s %9s %9s %9s\n", "GPUs", "steps", "MB/step", "ms/step", "not hid.", "dense", "learn", "others",
        "block s", "run s", "+ disk s");
    for (int64_t ranks : counts) {
        if (ranks > g_options.nsamples) continue;
        if (!project_ranks(m, o, ranks, &s)) return 0;
        double dense = pass_seconds(BESA_PASS_DENSE) + pass_seconds(BESA_PASS_COMMIT), learn = pass_seconds(BESA_PASS_LEARN);
        double run = s.p.seconds * blocks + g_options.start, disk = std::max(s.p.seconds, s.p.disk) * blocks + g_options.start;
        say("  %4lld %6.0f %9.1f %9.2f %9.2f %9.3f %9.3f %9.3f %9.3f %9.1f %9.1f\n", static_cast<long long>(ranks), s.steps,
            s.step_bytes * 1e-6, s.step_ms, s.open_ms, dense, learn, s.p.seconds - dense - learn, s.p.seconds, run, disk);
    }
    say("  dense: dense and commit pass; others: ranks, masks and what is waited for; run: all blocks and the %.1f s around them; + disk: "
        "where rank 0 reads at %.1f GB/s and writes at %.1f\n", g_options.start, g_options.read_gbs, g_options.write_gbs);
    both.learn = BESA_LEARN_BOTH;
    if (g_options.nsamples >= MACHINE && !project_ranks(m, both, MACHINE, &s)) return 0;
    say("  where weights learn too, %d GPUs: %.0f MB/step, %.2f ms/step, not hidden %.2f\n", MACHINE, s.step_bytes * 1e-6, s.step_ms,
        s.open_ms);
    if (g_options.nsamples >= MACHINE && !project_ranks(m, options_of(BESA_METHOD_SPARSEGPT), MACHINE, &s)) return 0;
    say("  Gram matrices of method sparsegpt: %.0f MB a block\n", s.other_bytes * 1e-6);
    return 1;
}

static int project_all(void)
{
    for (const model &m : g_models) {
        projection p;
        if (chosen(m, "7B,70B") && (!project_model(m, &p) || !project_scaling(m))) return 1;
    }
    return 0;
}

#else
static void add_kernel_bytes(void) {}
#endif

/* ---- what the device can do ------------------------------------------------------------------ */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/* Seconds of one call: the fastest of five runs of many calls, each waited for at its end. Negative: it failed. */
static double time_call(besa_backend *be, const std::function<besa_result()> &call)
{
    double best = 1e30, least = g_options.quick ? 0 : 0.05;
    if (call() != BESA_OK || be->synchronize(be, BESA_QUEUE_COMPUTE) != BESA_OK) return -1;
    int calls = 1;
    for (int run = 0; run < (g_options.quick ? 1 : 5);) {
        double start = now();
        for (int i = 0; i < calls; i++)
            if (call() != BESA_OK) return -1;
        if (be->synchronize(be, BESA_QUEUE_COMPUTE) != BESA_OK) return -1;
        double seconds = now() - start;
        if (seconds < least) {
            calls = seconds < least / 20 ? calls * 10 : calls * 2;
            continue;
        }
        best = std::min(best, seconds / calls);
        run++;
    }
    return best;
}

static double g_copy_gbs, g_peak_tflops; /* measured */

/* GB/s of a copy on the device, reads and writes counted */
static besa_result measure_copy(besa_backend *be)
{
    size_t bytes = static_cast<size_t>(1) << (g_options.quick ? 16 : 30);
    std::vector<void *> memory;
    void *from, *to;
    BESA__TRY(take_device(be, &memory, &from, bytes));
    besa_result result = take_device(be, &memory, &to, bytes);
    if (result == BESA_OK) result = be->zero(be, BESA_QUEUE_COMPUTE, from, bytes);
    if (result == BESA_OK) {
        double seconds = time_call(be, [&] { return be->copy(be, BESA_QUEUE_COMPUTE, to, from, bytes); });
        g_copy_gbs = 2e-9 * static_cast<double>(bytes) / seconds;
        if (seconds < 0) result = be->error.code;
    }
    for (void *p : memory) be->free(be, p);
    return result;
}

/* TFLOP/s of one large square product in the backend's type, through a cuBLAS handle of our own */
static besa_result measure_peak(besa_backend *be)
{
    const int n = g_options.quick ? 32 : 8192;
    int64_t count = static_cast<int64_t>(n) * n;
    cudaDataType type = be->activation_dtype == BESA_F32 ? CUDA_R_32F : CUDA_R_16BF;
    std::vector<void *> memory;
    void *matrix[3];
    cublasHandle_t blas;
    for (void *&m : matrix) {
        BESA__TRY(take_device(be, &memory, &m, static_cast<size_t>(count) * besa_dtype_size(be->activation_dtype)));
        BESA__TRY(fill_noise(be, m, be->activation_dtype, count, 1.0f));
    }
    BESA__CUBLAS(cublasCreate(&blas));
    BESA__CUBLAS(cublasSetStream(blas, besa__cuda_of(be)->stream[BESA_QUEUE_COMPUTE]));
    float one = 1, zero = 0;
    double seconds = time_call(be, [&] {
        return besa__cublas_check(be, cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, n, n, n, &one, matrix[0], type, n, matrix[1],
                                                   type, n, &zero, matrix[2], type, n, CUBLAS_COMPUTE_32F,
                                                   CUBLAS_GEMM_DEFAULT), "cublasGemmEx");
    });
    g_peak_tflops = 2e-12 * static_cast<double>(count) * n / seconds;
    cublasDestroy(blas);
    for (void *p : memory) be->free(be, p);
    return seconds < 0 ? be->error.code : BESA_OK;
}

static besa_result print_device(besa_backend *be)
{
    cudaDeviceProp properties;
    int driver = 0, runtime = 0;
    char date[64];
    time_t t = time(NULL);
    strftime(date, sizeof date, "%Y-%m-%d %H:%M:%S UTC", gmtime(&t));
    BESA__CUDA(cudaGetDeviceProperties(&properties, 0));
    BESA__CUDA(cudaDriverGetVersion(&driver));
    BESA__CUDA(cudaRuntimeGetVersion(&runtime));
    say("bench_cuda on %s, %.1f GB, %d multiprocessors; driver for CUDA %d.%d, runtime %d.%d; %s\n", properties.name,
        static_cast<double>(properties.totalGlobalMem) * 1e-9, properties.multiProcessorCount, driver / 1000,
        driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10, date);
    BESA__TRY(measure_copy(be));
    BESA__TRY(measure_peak(be));
    say("copy on the device %.0f GB/s (reads and writes); product of 8192 x 8192 %s matrices %.1f TFLOP/s\n", g_copy_gbs,
        be->activation_dtype == BESA_F32 ? "float" : "bf16", g_peak_tflops);
    return BESA_OK;
}

/* ---- single operations ----------------------------------------------------------------------- */

/* Arrays for every operation at one model's shapes, all of them filled */
typedef struct arrays {
    std::vector<void *> memory;
    int64_t tokens, d, inner, q, kv, most; /* q, kv: heads * head_dim; most: weights of the largest layer */
    void *w, *what, *rank, *x, *x2, *x3, *x4, *y, *y2, *y3; /* x (T, max(d, q)) act, y (T, inner) act */
    float *f, *sums, *small, *theta, *hessian;      /* f (most); small (8, inner) */
    int32_t *counts;
    uint16_t *bucket;
    double *scalars;
    besa_rate_shape rates;
    besa_optimizer_step step;
} arrays;

static besa_result filled(besa_backend *be, arrays *a, void **p, besa_dtype dtype, int64_t n, float deviation)
{
    BESA__TRY(take_device(be, &a->memory, p, static_cast<size_t>(n) * besa_dtype_size(dtype)));
    return fill_noise(be, *p, dtype, n, deviation);
}

static besa_result filled_floats(besa_backend *be, arrays *a, float **p, int64_t n, float deviation)
{
    void *memory;
    BESA__TRY(filled(be, a, &memory, BESA_F32, n, deviation));
    *p = static_cast<float *>(memory);
    return BESA_OK;
}

/* n of half the columns; the table from rank to bucket; Prodigy's scalars */
static besa_result make_integers(besa_backend *be, arrays *a)
{
    std::vector<int32_t> counts(static_cast<size_t>(std::max(a->inner, a->tokens)), static_cast<int32_t>(a->d / 2));
    std::vector<uint16_t> bucket(static_cast<size_t>(a->inner));
    double scalars[BESA_OPTIMIZER_SCALARS] = {1e-6, 0};
    void *p;
    for (size_t j = 0; j < bucket.size(); j++)
        bucket[j] = static_cast<uint16_t>((bucket.size() - 1 - j) * 100 / bucket.size());
    BESA__TRY(take_device(be, &a->memory, &p, counts.size() * 4));
    a->counts = static_cast<int32_t *>(p);
    BESA__TRY(be->upload(be, BESA_QUEUE_COMPUTE, p, counts.data(), counts.size() * 4));
    BESA__TRY(take_device(be, &a->memory, &p, bucket.size() * 2));
    a->bucket = static_cast<uint16_t *>(p);
    BESA__TRY(be->upload(be, BESA_QUEUE_COMPUTE, p, bucket.data(), bucket.size() * 2));
    BESA__TRY(take_device(be, &a->memory, &p, sizeof scalars));
    a->scalars = static_cast<double *>(p);
    BESA__TRY(be->upload(be, BESA_QUEUE_COMPUTE, p, scalars, sizeof scalars));
    return be->synchronize(be, BESA_QUEUE_COMPUTE);
}

/* The optimiser's step over the rates of all rows of the block */
static besa_result make_step(besa_backend *be, arrays *a)
{
    besa_optimizer_step *o = &a->step;
    memset(o, 0, sizeof *o);
    o->kind = BESA_PRODIGY;
    o->lr = 1, o->beta1 = 0.9, o->beta2 = 0.999, o->beta3 = sqrt(0.999), o->eps = 1e-8, o->d0 = 1e-6, o->d_coef = 5;
    o->step = 1;
    o->n = (2 * a->d + a->q + 2 * a->kv + 2 * a->inner) * 101;
    float **states[] = {&o->theta, &o->m, &o->v, &o->s};
    for (float **state : states) {
        BESA__TRY(filled_floats(be, a, state, o->n, 0.0f));
    }
    float *start, *grad;
    BESA__TRY(filled_floats(be, a, &start, o->n, 0.0f));
    BESA__TRY(filled_floats(be, a, &grad, o->n, 1e-8f));
    o->theta0 = start, o->grad = grad, o->scalars = a->scalars;
    return BESA_OK;
}

static besa_result make_arrays(besa_backend *be, arrays *a, const model &m)
{
    besa_dtype act = be->activation_dtype;
    a->tokens = g_options.seqlen, a->d = m.hidden, a->inner = m.inner;
    a->q = m.heads * m.head_dim, a->kv = m.kv_heads * m.head_dim, a->most = m.hidden * m.inner;
    BESA__TRY(filled(be, a, &a->w, BESA_BF16, a->most, 0.02f));
    BESA__TRY(filled(be, a, &a->what, BESA_BF16, a->most, 0.02f));
    BESA__TRY(filled(be, a, &a->rank, BESA_BF16, a->most, 0.02f)); /* rank_rows comes before it is read */
    void **wide[] = {&a->y, &a->y2, &a->y3}, **narrow[] = {&a->x, &a->x2, &a->x3, &a->x4};
    for (void **p : wide) BESA__TRY(filled(be, a, p, act, a->tokens * a->inner, 1.0f));
    for (void **p : narrow) BESA__TRY(filled(be, a, p, act, a->tokens * std::max(a->d, a->q), 1.0f));
    BESA__TRY(filled_floats(be, a, &a->f, a->most, 1.0f));
    BESA__TRY(filled_floats(be, a, &a->sums, a->inner * 100, 1.0f));
    BESA__TRY(filled_floats(be, a, &a->small, 8 * std::max(a->inner, a->tokens * m.head_dim), 1.0f));
    BESA__TRY(filled_floats(be, a, &a->theta, 2 * (a->inner + 1) * 101, 0.1f));
    BESA__TRY(filled_floats(be, a, &a->hessian, a->d * a->d, 1.0f));
    BESA__TRY(make_integers(be, a));
    a->rates = {a->inner, a->d, 1, 101, 0.1f, 1.0f, 1.0f, 0};
    BESA__TRY(make_step(be, a));
    besa_block_shape shape = shape_of_model(m);
    besa_workload work = besa_block_workload(&shape, 1, a->tokens);
    work.hessian_columns = a->d, work.rate_logits = 101;
    be->workspace_bytes = be->workspace_size(be, &work);
    return take_device(be, &a->memory, &be->workspace, be->workspace_bytes);
}

/* Time one operation; its cost is what wrappers work out. */
static void bench_call(besa_backend *be, const char *name, const std::function<besa_result()> &call)
{
    g.all = op_cost();
    besa_result result = call();
    op_cost cost = g.all;
    double seconds = result == BESA_OK ? time_call(be, call) : -1;
    if (seconds < 0) {
        say("  %-44s failed: %s\n", name, be->error.message);
        return;
    }
    say("  %-44s %10.1f us", name, 1e6 * seconds);
    if (cost.flop > 0) {
        double rate = 1e-12 * cost.flop / seconds;
        say(" %8.1f TFLOP/s %6.2f of the peak\n", rate, rate / g_peak_tflops);
    } else {
        double rate = 1e-9 * cost.bytes / seconds;
        say(" %8.1f GB/s    %6.2f of a copy\n", rate, rate / g_copy_gbs);
    }
}
#define BENCH(name, ...) bench_call(be, name, [&] { return __VA_ARGS__; })

static void bench_linear(besa_backend *be, const arrays &a, const char *name, void *y, void *x, int64_t rows,
                         int64_t columns)
{
    char label[64];
    auto titled = [&](const char *what) {
        snprintf(label, sizeof label, "%s, %s %lld x %lld", what, name, static_cast<long long>(rows),
                 static_cast<long long>(columns));
        return label;
    };
    BENCH(titled("linear_forward"), be->linear_forward(be, y, x, a.w, BESA_BF16, NULL, a.tokens, rows, columns, 0));
    BENCH(titled("linear_backward_input"), be->linear_backward_input(be, x, y, a.w, BESA_BF16, a.tokens, rows, columns, 0));
    BENCH(titled("linear_backward_weight"), be->linear_backward_weight(be, a.f, be->gradient_dtype, y, x, a.tokens, rows, columns, 0, rows, 0));
}

static void bench_pieces(besa_backend *be, const arrays &a, const model &m)
{
    int64_t T = a.tokens, d = a.d, n = T * a.inner;
    float *inv = a.small, *angles = a.small + T, *gain = a.theta;
    besa_attention_shape s = {1, T, m.heads, m.kv_heads, m.head_dim, 0, 0, 0};
    bench_linear(be, a, "q", a.x2, a.x, a.q, d);
    if (a.kv != a.q) bench_linear(be, a, "k", a.x2, a.x, a.kv, d);
    bench_linear(be, a, "gate", a.y, a.x, a.inner, d);
    bench_linear(be, a, "down", a.x, a.y, d, a.inner);
    (void)fill_noise(be, a.x, be->activation_dtype, T * std::max(d, a.q), 1.0f); /* products grew what they wrote */
    (void)fill_noise(be, a.x2, be->activation_dtype, T * std::max(d, a.q), 1.0f);
    (void)fill_noise(be, a.y, be->activation_dtype, n, 1.0f);
    BENCH("gram, d columns", be->gram(be, a.hessian, a.x, 1e-3f, T, d));
    BENCH("attention_forward", be->attention_forward(be, a.x4, a.x, a.x2, a.x3, &s));
    BENCH("attention_backward", be->attention_backward(be, a.y, a.y2, a.y3, a.x4, a.x, a.x2, a.x3, &s));
    BENCH("rmsnorm_forward", be->rmsnorm_forward(be, a.x2, inv, a.x, gain, T, d, 1e-5f));
    BENCH("rmsnorm_backward", be->rmsnorm_backward(be, a.x3, a.x2, a.x, gain, inv, T, d, 1));
    BENCH("rope, all heads", be->rope(be, a.x4, angles, angles + T * m.head_dim / 2, T, T, m.heads, m.head_dim, m.head_dim, 1));
    BENCH("swiglu_forward", be->swiglu_forward(be, a.y3, a.y, a.y2, n));
    BENCH("swiglu_backward", be->swiglu_backward(be, a.y, a.y2, a.y3, a.y, a.y2, n));
    BENCH("convert bf16 to f32, a layer", be->convert(be, a.f, BESA_F32, a.w, BESA_BF16, a.most));
    BENCH("column_sumsq, d columns", be->column_sumsq(be, a.small, a.x, T, d));
    BENCH("column_sumsq, intermediate_size columns", be->column_sumsq(be, a.small, a.y3, T, a.inner));
    BENCH("block_loss", be->block_loss(be, a.theta, a.x2, a.x, a.x3, a.small, 1, T, d, 0));
}

/* A layer's passes over its weights */
static void bench_layer(besa_backend *be, const arrays &a, int64_t rows, int64_t columns)
{
    besa_dtype t = BESA_BF16;
    say("  layer of %lld x %lld\n", static_cast<long long>(rows), static_cast<long long>(columns));
    BENCH("count_zeros", be->count_zeros(be, a.counts, a.counts, a.w, t, rows, columns));
    BENCH("fill", be->fill(be, a.counts, static_cast<int32_t>(columns / 2), rows));
    BENCH("score", be->score(be, a.f, a.w, t, a.small, 1, rows, columns));
    BENCH("score_rows", be->score_rows(be, NULL, a.counts, a.w, t, a.small, 1, rows, columns));
    BENCH("rank_rows", be->rank_rows(be, a.rank, a.f, rows, columns));
    BENCH("mask_apply", be->mask_apply(be, a.what, a.w, t, a.rank, a.counts, rows, columns));
    BENCH("mask_smallest", be->mask_smallest(be, a.what, a.w, t, a.f, rows * columns / 2, rows, columns));
    BENCH("mask_pattern 2:4", be->mask_pattern(be, a.what, a.w, t, a.f, 2, 4, rows, columns));
    BENCH("bucket_gradient", be->bucket_gradient(be, a.sums, a.f, be->gradient_dtype, a.w, t, a.rank, a.bucket, rows, columns, 100));
}

static void bench_rates(besa_backend *be, arrays &a)
{
    int64_t d = a.d, T = a.tokens, vocab = std::min<int64_t>(32000, a.inner); /* w has (inner, d) */
    float *alpha = a.small, *layer = a.theta, *row_theta = a.theta + 101, *grad = a.step.m;
    besa_penalty penalty = {a.small + a.inner, 1.0f, 0.5f};
    BENCH("power, d", be->power(be, a.small, a.small, 0.5f, d));
    BENCH("rate_forward, a layer's rows", be->rate_forward(be, alpha, a.counts, layer, row_theta, NULL, &a.rates));
    BENCH("rate_mean", be->rate_mean(be, a.small + a.inner, alpha, 1, 0, a.rates.rows));
    BENCH("rate_backward", be->rate_backward(be, grad, grad + 101, a.sums, layer, row_theta, &penalty, &a.rates));
    BENCH("optimizer_step, Prodigy, a block's rows", be->optimizer_step(be, &a.step));
    a.step.kind = BESA_ADAMW, a.step.lr = 1e-2;
    BENCH("optimizer_step, AdamW", be->optimizer_step(be, &a.step));
    int64_t slab = std::min<int64_t>(128, d / 2);
    BENCH("logits, T x vocabulary", be->logits(be, a.f, a.x, a.w, BESA_BF16, std::min(T, d), vocab, d));
    BENCH("nll_update", be->nll_update(be, a.sums, a.f, a.counts, 0, vocab, std::min(T, d), 1));
    BENCH("nll_sum", be->nll_sum(be, a.scalars, a.sums, a.counts, 1, std::min(T, d)));
    BENCH("divergence_update", be->divergence_update(be, a.sums, a.counts, a.f, a.f, 0, vocab, std::min(T, d) / 2, 1));
    (void)be->zero(be, BESA_QUEUE_COMPUTE, a.counts, static_cast<size_t>(a.inner) * 4); /* no dead columns */
    (void)be->zero(be, BESA_QUEUE_COMPUTE, a.hessian, static_cast<size_t>(d * d) * 4);
    bench_call(be, "hessian_factor, d columns, and a Gram matrix", [&] {
        BESA__TRY(be->gram(be, a.hessian, a.x, 1, T, d));
        return be->hessian_factor(be, a.hessian, a.counts, 0.01f, d);
    });
    BENCH("diagonal", be->diagonal(be, a.small, a.hessian, a.counts, d));
    BENCH("sparsegpt_slab, 128 columns", be->sparsegpt_slab(be, a.f, a.sums, a.hessian, a.counts, 0, slab, 0.5, 0, 0, NULL,
                                                            a.inner / 2, d));
    BENCH("sparsegpt_push", be->sparsegpt_push(be, a.f, a.sums, a.hessian, 0, slab, a.inner / 2, d));
}

/* Every operation at the shapes of one model. 0: it stopped. */
static int bench_operations(const model &m)
{
    besa_backend be;
    besa_error error;
    arrays a;
    if (open_watched(&be, &error) != BESA_OK) return say("FAIL %s\n", error.message), 0;
    say("\noperations, shapes of %s, %lld tokens\n", m.name, static_cast<long long>(g_options.seqlen));
    besa_result result = make_arrays(&be, &a, m);
    if (result == BESA_OK) {
        bench_pieces(&be, a, m);
        bench_layer(&be, a, m.inner, m.hidden);
        bench_layer(&be, a, m.hidden, m.inner);
        bench_rates(&be, a);
        result = be.synchronize(&be, BESA_QUEUE_COMPUTE);
    }
    if (result != BESA_OK) say("  stopped: %s\n", be.error.message);
    for (void *p : a.memory) be.free(&be, p);
    be.destroy(&be);
    return result == BESA_OK || result == BESA_ERROR_MEMORY;
}

/* ---- whole blocks ---------------------------------------------------------------------------- */

static double total_of(const besa_block_report &r)
{
    double total = 0;
    for (double s : r.seconds) total += s;
    return total;
}

static void print_runs(const model &m, besa_method method, std::vector<besa_block_report> &runs, double learn_flop,
                       size_t arena, size_t peak)
{
    double first = total_of(runs.front()), last = total_of(runs.back());
    std::sort(runs.begin(), runs.end(), [](auto &x, auto &y) { return total_of(x) < total_of(y); });
    const besa_block_report &median = runs[runs.size() / 2];
    double seconds = total_of(median);
    say("  %-5s %-5s", m.name, method == BESA_METHOD_BESA ? "besa" : "wanda");
    for (int p = 0; p < BESA_PASS_COUNT; p++)
        if (median.seconds[p] > 0) say(" %s %.3f s,", besa_pass_name(static_cast<besa_pass>(p)), median.seconds[p]);
    say(" block %.3f s (median of %zu; first %.3f, last %.3f), %lld blocks %.0f s\n", seconds, runs.size(), first, last,
        static_cast<long long>(m.blocks), seconds * static_cast<double>(m.blocks));
    if (learn_flop > 0) {
        double rate = 1e-12 * learn_flop / median.seconds[BESA_PASS_LEARN];
        say("              learning: %.1f TFLOP of products, %.1f TFLOP/s, %.2f of the measured peak\n", 1e-12 * learn_flop,
            rate, rate / g_peak_tflops);
    }
    say("              arena %zu bytes, with weights and X %zu; sparsity %.6f, loss %.4g, uniform %.4g\n", arena, peak,
        median.sparsity, median.loss_all, median.loss_uniform);
}

static besa_result bench_method(besa_backend *be, test_block *b, const model &m, besa_method method, besa_error *error)
{
    besa_prune_options o = options_of(method);
    besa_pruner *pruner;
    std::vector<besa_block_report> runs;
    double flop = 0;
    size_t before = g.live;
    int64_t elements = g_options.nsamples * g_options.seqlen * m.hidden;
    g.peak = g.live;
    BESA__TRY(besa_pruner_create(&pruner, be, &b->block.shape, b->block.dtype, 0, &o, g_options.nsamples, g_options.seqlen,
                                 error));
    besa_result result = BESA_OK;
    for (int64_t i = 0; i < g_options.runs && result == BESA_OK; i++) {
        besa_block_report report;
        for (double &f : g.flop) f = 0;
        result = besa__pass_error(be, fill_noise(be, b->x, be->activation_dtype, elements, 1.0f), error);
        if (result == BESA_OK)
            result = besa_pruner_run(pruner, &b->block, NULL, b->x, NULL, b->pruned, &report, error);
        flop = g.flop[BESA_PASS_LEARN];
        runs.push_back(report);
    }
    if (result == BESA_OK) print_runs(m, method, runs, flop, g.peak - before, g.peak);
    besa_pruner_destroy(pruner);
    return result;
}

/* Both methods on one block. 0: something else than memory was wrong. */
static int bench_block(const model &m)
{
    besa_backend be;
    besa_error error;
    test_block b;
    if (open_watched(&be, &error) != BESA_OK) return say("FAIL %s\n", error.message), 0;
    besa_result result = besa__pass_error(&be, make_block(&be, &b, m), &error);
    if (result == BESA_OK) result = bench_method(&be, &b, m, BESA_METHOD_BESA, &error);
    if (result == BESA_OK) result = bench_method(&be, &b, m, BESA_METHOD_WANDA, &error);
    if (result != BESA_OK) say("  %-5s stopped: %s\n", m.name, error.message);
    for (void *p : b.memory) be.free(&be, p);
    be.destroy(&be);
    return result == BESA_OK || result == BESA_ERROR_MEMORY;
}

static int bench_all(void)
{
    besa_backend be;
    besa_error error;
    int good = 1;
    besa_result result = open_watched(&be, &error);
    if (result != BESA_OK) return printf("SKIP bench-cuda: %s\n", error.message), 0;
    result = print_device(&be);
    if (result != BESA_OK) say("FAIL %s\n", be.error.message);
    be.destroy(&be);
    for (const model &m : g_models)
        if (result == BESA_OK && m.operations && chosen(m, "7B,70B")) good = bench_operations(m) && good;
    say("\nblocks with random weights, %lld x %lld tokens\n", static_cast<long long>(g_options.nsamples),
        static_cast<long long>(g_options.seqlen));
    for (const model &m : g_models)
        if (result == BESA_OK && chosen(m, "7B,13B,34B,70B")) good = bench_block(m) && good;
    return result != BESA_OK || !good;
}

/* ---- tests and the command line -------------------------------------------------------------- */

#ifdef CUDA_STANDIN
static int check_all(void)
{
    g_quiet = getenv("TEST_VERBOSE") == NULL;
    TEST("bench_cuda, a small run") {
        g_options.models = "tiny", g_options.nsamples = 2, g_options.seqlen = 16, g_options.runs = 1, g_options.quick = 1;
        CHECK(bench_all() == 0, "it failed");
        CHECK(standin_reports() == 0, "%s", standin_last_report());
        CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0, "something is alive");
        g_options.models = NULL, g_options.nsamples = 128, g_options.seqlen = 2048, g_options.quick = 0;
    }
    for (const model &m : g_models) { /* from here on memory is not backed */
        if (m.seconds <= 0) continue;
        projection p = projection();
        std::string begin = std::string("projection, ") + m.name + " on an H100: ", name = begin + "the list of launches";
        int good = project_model(m, &p);
        TEST(name.c_str()) {
            CHECK(good, "the dry run failed");
            CHECK(p.unknown == 0, "%.0f launches of kernels whose bytes are not known", p.unknown);
            test_end();
        }
        for (int t = 0; t < TARGETS; t++) {
            name = begin + g_targets[t].name;
            TEST(name.c_str()) {
                double most = t == 2 ? m.most : limit_of(m, t);
                CHECK(value_of(p, t) > 0 && value_of(p, t) <= most,
                      "%.3f, expected at most %g; make bench-cuda-model prints what takes it", value_of(p, t), most);
                test_end();
            }
        }
        scaling eight;
        name = begin + "8 of them";
        int done = project_ranks(m, options_of(BESA_METHOD_BESA), 8, &eight);
        TEST(name.c_str()) {
            CHECK(done, "the dry run failed");
            CHECK(eight.step_bytes > 1e6 && eight.p.seconds < p.seconds / 7, "a block takes %.3f s, on one %.3f; %.0f bytes a step",
                  eight.p.seconds, p.seconds, eight.step_bytes);
            CHECK(eight.open_ms < eight.step_ms / 3, "%.3f of a step's %.3f ms of sums are not hidden", eight.open_ms, eight.step_ms);
            test_end();
        }
    }
    return test_finish();
}
#else
static int project_all(void) { return printf("SKIP bench-cuda-model: built for a GPU, not on the stand-in\n"), 0; }
static int check_all(void) { return project_all(); }
#endif

static int usage(const char *program)
{
    fprintf(stderr, "usage: %s [--model | --check] [--models 7B,13B,34B,70B] [--nsamples N] [--seqlen N] [--runs N]\n"
            "    [--tflops N] [--gbs N] [--score-gbs N] [--launch-us N] [--host-gbs N] [--start S]\n"
            "    [--read-gbs N] [--write-gbs N] [--hash-gbs N] [--link-gbs N] [--net-gbs N] [--dtype bf16|f16|f32] [--output FILE] [--only NAME]\n", program);
    return 2;
}

static int parse(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        std::string s = argv[i];
        if (s == "--model") g_options.project = 1;
        else if (s == "--check") g_options.check = 1;
        else if (i + 1 == argc) return 0;
        else if (s == "--models") g_options.models = argv[++i];
        else if (s == "--output") g_options.output = argv[++i];
        else if (s == "--only") g_options.only = argv[++i];
        else if (s == "--nsamples") g_options.nsamples = atoll(argv[++i]);
        else if (s == "--seqlen") g_options.seqlen = atoll(argv[++i]);
        else if (s == "--runs") g_options.runs = atoll(argv[++i]);
        else if (s == "--tflops") g_options.tflops = atof(argv[++i]);
        else if (s == "--gbs") g_options.gbs = atof(argv[++i]);
        else if (s == "--score-gbs") g_options.score_gbs = atof(argv[++i]);
        else if (s == "--launch-us") g_options.launch_us = atof(argv[++i]);
        else if (s == "--start") g_options.start = atof(argv[++i]);
        else if (s == "--read-gbs") g_options.read_gbs = atof(argv[++i]);
        else if (s == "--write-gbs") g_options.write_gbs = atof(argv[++i]);
        else if (s == "--hash-gbs") g_options.hash_gbs = atof(argv[++i]);
        else if (s == "--link-gbs") g_options.link_gbs = atof(argv[++i]);
        else if (s == "--net-gbs") g_options.net_gbs = atof(argv[++i]);
        else if (s == "--dtype") {
            std::string name = argv[++i];
            g_options.dtype = name == "f32" ? BESA_F32 : name == "f16" ? BESA_F16 : BESA_BF16;
            if (name != "f32" && name != "f16" && name != "bf16") return 0;
        }
        else if (s == "--host-gbs") g_options.host_gbs = atof(argv[++i]);
        else return 0;
    }
    return g_options.nsamples > 0 && g_options.seqlen > 0 && g_options.runs > 0 && g_options.tflops > 0 &&
           g_options.gbs > 0 && g_options.score_gbs > 0 && g_options.host_gbs > 0 &&
           g_options.read_gbs > 0 && g_options.write_gbs > 0 && g_options.hash_gbs > 0 &&
           g_options.link_gbs > 0 && g_options.net_gbs > 0;
}

int main(int argc, char **argv)
{
    if (!parse(argc, argv)) return usage(argv[0]);
    test.only = g_options.only;
    if (g_options.output && !(g_file = fopen(g_options.output, "w")))
        return fprintf(stderr, "cannot write %s\n", g_options.output), 1;
    if (g_options.project && g_options.dtype == BESA_F16) g_options.dtype = BESA_BF16;
    int status = g_options.check ? check_all() : g_options.project ? project_all() : bench_all();
    if (g_file) fclose(g_file), printf("written to %s\n", g_options.output);
    return status;
}
