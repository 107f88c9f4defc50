/* test_pruner - one block through besa_pruner_run, its numbers against plain double-precision code.
 *
 *     test_pruner REFERENCE_DIRECTORY [part of a test's name]
 *
 * The block's own forward and backward pass are the library's, on all sequences of a batch at once: test_reference holds
 * them against PyTorch. What is done with them is written out here from its formulas: statistics, scores, ranks, masks,
 * rates, the gradient of theta, losses, counts, SparseGPT. */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "backend_ops.h"
#include "test.h"

enum { SEQUENCES = 11, SEQLEN = 16, TOKENS = SEQUENCES * SEQLEN, WIDTH = 132, KV_WIDTH = 44, INNER = 141, DEAD = 5,
       CANDIDATES = 9, ROWS = 3 * WIDTH + 2 * KV_WIDTH + 2 * INNER, MOST_STEPS = 4 * SEQUENCES };

static const char *g_reference;
static besa_backend g_be;
static besa_error g_error;
static ops g_ops;                               /* memory of backend_ops.h's references */

static double *widened(const float *x, int64_t n)
{
    double *d = (double *)take((size_t)n * sizeof *d);
    for (int64_t i = 0; i < n; i++) d[i] = (double)x[i];
    return d;
}

static void *copy_of(const void *data, size_t bytes) { return memcpy(take(bytes), data, bytes); }

static float *random_floats(int64_t n, double scale)
{
    float *x = take_floats(n);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(scale * ops_uniform(&g_ops));
    return x;
}

/* ---- a block and its inputs ------------------------------------------------------------------ */

typedef struct model {
    besa_block block;
    int64_t rows[BESA_LAYERS], columns[BESA_LAYERS];
    float *x, *dense_x, *yref;                  /* (SEQUENCES, SEQLEN, WIDTH) */
    float *input[BESA_LAYERS];                  /* (TOKENS, columns) of the dense block */
    float *y_dense;                             /* the dense stream's outputs */
    besa_activations acts;                      /* room for all tokens */
} model;

static const float *weight_of(const model *m, int layer) { return (const float *)m->block.weight[layer]; }

/* Y = F(block, X) of `count` sequences; what it leaves for the backward pass is in acts. */
static void forward(const besa_block *block, besa_activations *acts, const float *x, float *y, int64_t count)
{
    besa_workload work = besa_block_workload(&block->shape, SEQUENCES, SEQLEN);
    static void *memory;
    g_be.workspace_bytes = g_be.workspace_size(&g_be, &work);
    if (!memory) memory = take(g_be.workspace_bytes);
    g_be.workspace = memory;
    CHECK_OK(besa_block_forward(&g_be, block, acts, x, y, count, SEQLEN, &g_error), g_error);
}

/* Weights with zeros of both signs, a column of inputs that is always zero, channels of unequal size; q, k and v have inputs
 * of about `size`. */
static model new_model(float size)
{
    model m;
    besa_block_shape *s = &m.block.shape;
    float *norm, *cosine = take_floats(SEQLEN * KV_WIDTH / 2), *sine = take_floats(SEQLEN * KV_WIDTH / 2);
    memset(&m, 0, sizeof m);
    g_ops.random = 5;
    s->hidden_size = WIDTH, s->intermediate_size = INNER, s->head_dim = KV_WIDTH;
    s->num_attention_heads = WIDTH / KV_WIDTH, s->num_key_value_heads = 1, s->rms_norm_eps = 1e-5, s->rope.theta = 10000;
    for (int l = 0; l < BESA_LAYERS; l++) {
        float *w;
        besa_block_layer(s, l, &m.rows[l], &m.columns[l]);
        w = random_floats(m.rows[l] * m.columns[l], 1.5 / sqrt((double)m.columns[l]));
        for (int64_t i = l; i < m.rows[l] * m.columns[l]; i += 37) w[i] = i % 2 ? 0.0f : -0.0f;
        m.block.weight[l] = w;
    }
    m.block.bias[BESA_Q] = random_floats(WIDTH, 0.1);
    m.block.norm2 = norm = random_floats(WIDTH, 0.5);
    for (int j = 0; j < WIDTH; j++) norm[j] += 1;
    m.block.norm1 = norm = (float *)copy_of(norm, WIDTH * sizeof *norm);
    for (int j = 0; j < WIDTH; j++) norm[j] *= size;
    norm[DEAD] = 0;
    besa_rope_table(s, SEQLEN, cosine, sine);
    m.block.rope_cos = cosine, m.block.rope_sin = sine;
    m.x = random_floats(TOKENS * WIDTH, 1), m.dense_x = random_floats(TOKENS * WIDTH, 1);
    for (int i = 0; i < TOKENS * WIDTH; i++) m.x[i] *= (float)(1 + i % 5), m.dense_x[i] *= (float)(1 + i % 7);
    besa_activations_init(&m.acts, take(besa_activations_size(&g_be, s, 0, TOKENS, 1)), &g_be, s, 0, TOKENS, 1);
    m.yref = take_floats(TOKENS * WIDTH), m.y_dense = take_floats(TOKENS * WIDTH);
    forward(&m.block, &m.acts, m.dense_x, m.y_dense, SEQUENCES);
    forward(&m.block, &m.acts, m.x, m.yref, SEQUENCES);
    for (int l = 0; l < BESA_LAYERS; l++) {
        const void *a = l <= BESA_V ? m.acts.a : l == BESA_O ? m.acts.attn : l == BESA_DOWN ? m.acts.z : m.acts.m;
        m.input[l] = (float *)copy_of(a, (size_t)(TOKENS * m.columns[l]) * sizeof(float));
    }
    return m;
}

/* The damped Hessian 2/N X'X of a layer's inputs; where dead is not NULL, which columns are, and these have a 1. */
static double *hessian_of(const model *m, int layer, int64_t tokens, int32_t *dead)
{
    int64_t C = m->columns[layer];
    const float *x = m->input[layer];
    double *h = ops_doubles(&g_ops, C * C), mean = 0;
    for (int64_t i = 0; i < C; i++)
        for (int64_t j = 0; j < C; j++)
            for (int64_t t = 0; t < tokens; t++)
                h[i * C + j] += 2.0 / (double)tokens * (double)x[t * C + i] * (double)x[t * C + j];
    for (int64_t j = 0; j < C; j++) {
        if (dead) dead[j] = h[j * C + j] == 0;
        if (dead && dead[j]) h[j * C + j] = 1;
        mean += h[j * C + j] / (double)C;
    }
    for (int64_t j = 0; j < C; j++) h[j * C + j] += 0.01 * mean;
    return h;
}

/* As the upper factor U of its inverse. */
static double *factor_of(const model *m, int layer, int64_t tokens, int32_t *dead)
{
    int64_t C = m->columns[layer];
    double *h = hessian_of(m, layer, tokens, dead), *u = ops_doubles(&g_ops, C * C);
    ref_factor(&g_ops, u, h, C);
    return u;
}

static void forget_references(void)
{
    while (g_ops.hosts > 0) free(g_ops.host[--g_ops.hosts]);
}

/* rank (R,C) of every weight w of a layer in its row by the importance's score, zeros first, ties by column. squares (R,C) of
 * gradients: NULL, where there are none yet. */
static int32_t *ranks_with(const model *m, int layer, int64_t tokens, besa_importance importance, const float *weights,
                           const double *squares)
{
    int64_t R = m->rows[layer], C = m->columns[layer];
    int32_t *rank = (int32_t *)take((size_t)(R * C) * sizeof *rank), *dead = (int32_t *)take((size_t)C * sizeof *dead);
    int64_t *order = (int64_t *)take((size_t)C * sizeof *order);
    float *score = take_floats(C);
    double *u = NULL, *sumsq = (double *)take((size_t)C * sizeof *sumsq), *column = (double *)take((size_t)C * sizeof *column);
    if (importance == BESA_IMPORTANCE_SPARSEGPT || importance == BESA_IMPORTANCE_SPARSEGPT_SQUARED)
        u = factor_of(m, layer, tokens, dead);
    for (int64_t i = 0; i < tokens * C; i++) sumsq[i % C] += (double)m->input[layer][i] * (double)m->input[layer][i];
    for (int64_t i = 0; i < R * C; i++) column[i % C] += fabs((double)weights[i]);
    for (int64_t r = 0; r < R; r++) {
        double row = 0;
        for (int64_t j = 0; j < C; j++) row += fabs((double)weights[r * C + j]);
        for (int64_t j = 0; j < C; j++) {
            double w = (double)weights[r * C + j], diagonal = u ? u[j * C + j] : 1;
            double s = importance == BESA_IMPORTANCE_WANDA ? fabs(w) * sqrt(sumsq[j]) : fabs(w);
            if (importance == BESA_IMPORTANCE_GRADIENT) s = fabs(w) * pow(sumsq[j], 0.3) * (squares ? pow(squares[r * C + j], 0.2) : 1);
            if (importance == BESA_IMPORTANCE_RELATIVE) s = fabs(w) * pow(sumsq[j], 0.25) * (1 / row + 1 / column[j]);
            if (u) s = dead[j] ? 0 : w * w / (importance == BESA_IMPORTANCE_SPARSEGPT ? diagonal : diagonal * diagonal);
            score[j] = w == 0 ? -1 : (float)s;
        }
        ref_sort(score, C, order);
        for (int64_t j = 0; j < C; j++) rank[r * C + order[j]] = (int32_t)j;
    }
    forget_references();
    return rank;
}

static int32_t *ranks_of(const model *m, int layer, int64_t tokens, besa_importance importance)
{
    return ranks_with(m, layer, tokens, importance, weight_of(m, layer), NULL);
}

/* ---- a run, recorded ------------------------------------------------------------------------- */

typedef struct recorded {                       /* of one learning step */
    float *theta, *grad, *what[BESA_LAYERS], *vector[BESA_VECTORS], loss, alpha[ROWS]; /* vector NULL: as the dense block's */
    float *clip, *clip_grad;                    /* logits after the step, and the gradient that it followed */
    float *kept[BESA_LAYERS];                   /* with bits: masked weights, not yet on their grids */
    int32_t n[ROWS];
} recorded;

static const besa_pruner *g_pruner;             /* that which runs */

typedef struct run {
    const model *m;
    besa_pruner *pruner;                        /* while it runs */
    besa_prune_options options;
    int64_t sequences;
    recorded step[MOST_STEPS + 1];              /* of the last one theta alone: what learning ended with */
    int64_t steps, parameters;
    float alpha[ROWS];                          /* that the projection started from */
    void *pruned[BESA_LAYERS];
    float *x, *dense_x;                         /* in and out */
    besa_block_report report;
    int64_t chunk;
    size_t bytes;
} run;

/* Norms and biases as the pruner has them now; they are where besa_pruner_block says. */
static void record_vectors(const run *r, float *vector[BESA_VECTORS])
{
    besa_block now = *besa_pruner_block(r->pruner), dense = r->m->block;
    for (int i = 0; i < BESA_VECTORS; i++) {
        const float *from = *besa__block_vector(&now, i), *was = *besa__block_vector(&dense, i);
        CHECK(!from == !was && (!from || (from == was) == !r->options.learn_vectors), "vector %d is the caller's, or there is none", i);
        vector[i] = from ? (float *)copy_of(from, (size_t)besa__vector_count(&now.shape, i) * sizeof(float)) : NULL;
    }
}

/* Keep what a step came to, and give the next one a theta of our own. */
static besa_result record_step(void *user, const besa_step *step)
{
    run *r = (run *)user;
    recorded *now = &r->step[step->step - 1], *next = now + 1;
    float *theta, *grad;
    r->steps = step->step;
    now->loss = *step->loss;
    for (int l = 0; l < BESA_LAYERS; l++)
        now->what[l] = (float *)copy_of(g_pruner->masked.weight[l], (size_t)(r->m->rows[l] * r->m->columns[l]) * sizeof(float));
    if (r->options.learn != BESA_LEARN_RATES) record_vectors(r, now->vector);
    for (int l = 0; l < BESA_LAYERS && r->options.bits; l++)
        now->kept[l] = (float *)copy_of(g_pruner->quantization.masked[l], (size_t)(r->m->rows[l] * r->m->columns[l]) * sizeof(float));
    if (g_pruner->quantization.learns) {
        const besa_optimizer_step *clips = &g_pruner->quantization.clips.step;
        now->clip = (float *)copy_of(clips->theta, (size_t)clips->n * sizeof(float));
        now->clip_grad = (float *)copy_of(clips->grad, (size_t)clips->n * sizeof(float));
    }
    CHECK((step->rates != NULL) == (r->options.method == BESA_METHOD_BESA && !r->options.pattern_m), "rates of a method without them, or none");
    if (!step->rates) return BESA_OK;
    r->parameters = besa_rates_parameters(step->rates, &theta, &grad);
    if (step->step == 1) now->theta = take_floats(r->parameters);
    now->grad = (float *)copy_of(grad, (size_t)r->parameters * sizeof *grad);
    for (int l = 0, row = 0; l < BESA_LAYERS; row += (int)r->m->rows[l++]) {
        if (besa_rates_read(step->rates, l, now->alpha + row, now->n + row, &g_error) != BESA_OK) return g_error.code;
    }
    next->theta = random_floats(r->parameters, 2);
    memcpy(theta, next->theta, (size_t)r->parameters * sizeof *theta);
    return BESA_OK;
}

/* Bytes that a pruner has on the device; counted on a copy, as counting places its arrays nowhere. */
static size_t size_of(const besa_pruner *pruner)
{
    besa_pruner counted = *pruner;
    counted.rates.masks = &counted.masks;
    counted.rates.parameters = &counted.parameters;
    counted.rates.options = &counted.options.rates;
    return besa__pruner_size(&counted, 0);
}

static int learns(const besa_prune_options *o)
{
    return o->method == BESA_METHOD_BESA || o->learn != BESA_LEARN_RATES || o->clipping == BESA_CLIPPING_LEARNED;
}

/* Run the pruner within `budget` bytes, 0 for all there are; returns whether that was enough. */
static int run_pruner(run *r, const model *m, const besa_prune_options *o, int64_t sequences, size_t budget)
{
    besa_pruner *pruner = NULL;
    besa_result result;
    size_t bytes = (size_t)(TOKENS * WIDTH) * sizeof(float);
    memset(r, 0, sizeof *r);
    g_ops.random = 11;
    r->m = m, r->options = *o, r->sequences = sequences;
    r->options.device_memory = budget, r->options.user = r;
    if (learns(o)) r->options.step = record_step;
    r->x = (float *)copy_of(m->x, bytes), r->dense_x = (float *)copy_of(m->dense_x, bytes);
    for (int l = 0; l < BESA_LAYERS; l++) r->pruned[l] = take((size_t)(m->rows[l] * m->columns[l]) * sizeof(float));
    result = besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &r->options, sequences, SEQLEN, &g_error);
    if (budget && result == BESA_ERROR_MEMORY) return 0;
    CHECK_OK(result, g_error);
    if (!pruner) return 0;
    g_pruner = pruner;
    r->chunk = pruner->micro_batch, r->bytes = size_of(pruner), r->pruner = pruner;
    CHECK_OK(besa_pruner_run(pruner, &m->block, "block.", r->x, o->dense_stream || o->dense_share > 0 ? r->dense_x : NULL,
                             r->pruned, &r->report, &g_error), g_error);
    if (pruner->rates.alpha) memcpy(r->alpha, pruner->rates.alpha, sizeof r->alpha);
    besa_pruner_destroy(pruner);
    return 1;
}

/* ---- what it must be ------------------------------------------------------------------------- */

static int32_t zeros_of(const float *w, int64_t n)
{
    int32_t zeros = 0;
    for (int64_t i = 0; i < n; i++) zeros += w[i] == 0;
    return zeros;
}

static double fixed_rate(const besa_prune_options *o, int layer)
{
    for (int64_t i = 0; i < o->num_fixed; i++)
        if (!strcmp(o->fixed[i].pattern, besa_layer_name(layer))) return o->fixed[i].sparsity;
    return -1;
}

/* The part whose target a layer's rates have. */
static int part_of(const run *r, int layer)
{
    if (r->options.whole_target) return 0;
    return r->options.granularity == BESA_GRANULARITY_LAYER ? layer : r->options.granularity == BESA_GRANULARITY_ATTN_MLP ? layer > 3 : 0;
}

/* Of a part, or (negative) of all. */
static double learned_weights(const run *r, int part)
{
    double weights = 0;
    for (int l = 0; l < BESA_LAYERS; l++)
        if (fixed_rate(&r->options, l) < 0 && (part < 0 || part_of(r, l) == part)) weights += (double)(r->m->rows[l] * r->m->columns[l]);
    return weights;
}

/* c of softmax(c p): at theta = 0 the mean rate is the target. */
static double tilt_of(const besa_rate_options *o)
{
    double low = -1e4, high = 1e4;
    if (o->zero_start) return 0;
    for (int i = 0; i < 70; i++) {
        double c = 0.5 * (low + high), sum = 0, rate = 0;
        for (int d = 0; d < CANDIDATES; d++) {
            double p = 1 - (double)d / (CANDIDATES - 1), e = exp(c * (p - (c > 0)));
            sum += e, rate += e * p;
        }
        *(rate / sum < o->target ? &low : &high) = c;
    }
    return low;
}

/* One layer's rates from theta, and from dL/dbeta (groups, CANDIDATES) the gradient of theta; both as flat as theta is. */
typedef struct layer_rates {
    const besa_rate_options *o;
    int64_t groups, at;                         /* at: theta's first of this layer, advanced beyond it */
    double layer_scale, row_scale, tilt;
    double alpha[INNER], beta[INNER][CANDIDATES];
} layer_rates;

static layer_rates rates_of(const besa_prune_options *o, const float *theta, int64_t *at, int64_t rows,
                            int64_t *group_rows)
{
    layer_rates r;
    const float *theta_layer = theta + *at, *theta_row;
    memset(&r, 0, sizeof r);
    *group_rows = o->rates.group_rows == BESA_ALL_ROWS ? rows : o->rates.group_rows ? o->rates.group_rows : 1;
    r.o = &o->rates, r.at = *at, r.tilt = tilt_of(&o->rates);
    r.groups = (rows + *group_rows - 1) / *group_rows;
    r.layer_scale = o->rates.form == BESA_RATES_ROW ? 0 : o->rates.layer_scale ? o->rates.layer_scale : 1;
    r.row_scale = o->rates.form == BESA_RATES_LAYER ? 0 : o->rates.row_scale ? o->rates.row_scale : 1;
    theta_row = theta_layer + (r.layer_scale > 0 ? CANDIDATES : 0);
    *at += (r.layer_scale > 0 ? CANDIDATES : 0) + (r.row_scale > 0 ? r.groups * CANDIDATES : 0);
    for (int64_t g = 0; g < r.groups; g++) {
        double sum = 0;
        for (int d = 0; d < CANDIDATES; d++) {
            double p = 1 - (double)d / (CANDIDATES - 1), a = r.layer_scale > 0 ? (double)theta_layer[d] : 0;
            double b = r.row_scale > 0 ? (double)theta_row[g * CANDIDATES + d] : 0;
            if (!o->rates.plain_softmax) a = 1 / (1 + exp(-a)) - 0.5, b = 1 / (1 + exp(-b)) - 0.5;
            sum += r.beta[g][d] = exp(r.tilt * p + r.layer_scale * a + r.row_scale * b);
        }
        for (int d = 0; d < CANDIDATES; d++) {
            r.beta[g][d] /= sum;
            r.alpha[g] += r.beta[g][d] * (1 - (double)d / (CANDIDATES - 1));
        }
    }
    return r;
}

static void theta_gradient(const layer_rates *r, const float *theta, double (*dbeta)[CANDIDATES], double *grad)
{
    int64_t row = r->at + (r->layer_scale > 0 ? CANDIDATES : 0);
    for (int64_t g = 0; g < r->groups; g++) {
        double mean = 0;
        for (int d = 0; d < CANDIDATES; d++) mean += r->beta[g][d] * dbeta[g][d];
        for (int d = 0; d < CANDIDATES; d++) {
            double dz = r->beta[g][d] * (dbeta[g][d] - mean);
            int64_t place[2] = { r->at + d, row + g * CANDIDATES + d };
            double scale[2] = { r->layer_scale, r->row_scale };
            for (int k = 0; k < 2; k++) {
                double s;
                if (scale[k] == 0) continue;
                s = 1 / (1 + exp(-(double)theta[place[k]]));
                grad[place[k]] += dz * scale[k] * (r->o->plain_softmax ? 1 : s * (1 - s));
            }
        }
    }
}

/* Sums of squares of the reference's channels, over sequences first .. first + count - 1 */
static void norms_of(const float *yref, int64_t first, int64_t count, double *norm2)
{
    memset(norm2, 0, WIDTH * sizeof *norm2);
    for (int64_t i = first * SEQLEN * WIDTH; i < (first + count) * SEQLEN * WIDTH; i++)
        norm2[i % WIDTH] += (double)yref[i] * (double)yref[i];
}

/* Those that sequence s is normalised by; returns over how many sequences they are. */
static int64_t batch_norms(const run *r, const float *yref, int64_t reference, int64_t s, double *norm2)
{
    int64_t batch = r->options.batch_size && learns(&r->options) ? r->options.batch_size : 1;
    int64_t first = r->options.norm_all ? 0 : s / batch * batch, count = r->options.norm_all ? reference : batch;
    if (first + count > reference) count = reference - first;
    norms_of(yref, first, count, norm2);
    return count;
}

/* What is aimed at; good until the next call. */
static const float *reference_of(const run *r)
{
    static float mixed[TOKENS * WIDTH];
    double share = r->options.dense_stream ? 1 : r->options.dense_share;
    for (int i = 0; i < TOKENS * WIDTH; i++)
        mixed[i] = (float)((1 - share) * (double)r->m->yref[i] + share * (double)r->m->y_dense[i]);
    return mixed;
}

/* (1/d) sum ((Yref - Y) / norm)^2 of the first `shown` sequences, batches weighted by their size. */
static double report_loss(const run *r, const float *y, int64_t shown, int64_t reference)
{
    const float *yref = reference_of(r);
    double loss = 0, norm2[WIDTH];
    for (int64_t s = 0; s < shown; s++) {
        int64_t of = batch_norms(r, yref, reference, s, norm2);
        for (int64_t i = s * SEQLEN * WIDTH; i < (s + 1) * SEQLEN * WIDTH; i++) {
            double e = (double)yref[i] - (double)y[i];
            loss += e * e / norm2[i % WIDTH] / WIDTH * (double)of / (double)shown;
        }
    }
    return loss;
}

/* Does weight i of a layer go, of whose row n go? With a pattern n counts in layers that are held at a sparsity only. */
static int is_gone(const run *r, int layer, const int32_t *rank, int64_t i, int64_t n)
{
    int64_t m = fixed_rate(&r->options, layer) < 0 ? r->options.pattern_m : 0, below = 0;
    if (!m) return rank[i] < n;
    for (int64_t k = i / m * m; k < i / m * m + m; k++) below += rank[k] < rank[i]; /* those of the group with a smaller score */
    return below < r->options.pattern_n;
}

/* The dense block, but with `rank` below each row's count gone. */
static besa_block masked_block(const run *r, int32_t *const rank[BESA_LAYERS], const int32_t *n)
{
    besa_block b = r->m->block;
    for (int l = 0; l < BESA_LAYERS; n += r->m->rows[l++]) {
        int64_t C = r->m->columns[l];
        float *w = (float *)copy_of(b.weight[l], (size_t)(r->m->rows[l] * C) * sizeof(float));
        for (int64_t i = 0; i < r->m->rows[l] * C; i++)
            if (is_gone(r, l, rank[l], i, n[i / C])) w[i] = 0;
        b.weight[l] = w;
    }
    return b;
}

static void check_number(const char *what, double got, double want, double tolerance)
{
    CHECK(fabs(got - want) <= tolerance * fabs(want), "%s: %.9g, expected %.9g", what, got, want);
}

/* ---- BESA: each step of learning, and what comes of it --------------------------------------- */

typedef struct gradients { float *dw[BESA_LAYERS], *dvector[BESA_VECTORS]; int64_t columns[BESA_LAYERS]; } gradients;

static besa_result keep_gradient(void *user, int layer, int64_t first, int64_t rows, const void *gradient)
{
    const float *dw = (const float *)gradient;
    gradients *g = (gradients *)user;
    int64_t C = g->columns[layer];
    memcpy(g->dw[layer] + first * C, dw, (size_t)(rows * C) * sizeof *dw);
    return BESA_OK;
}

/* The block with the norms and biases of a step, where it has some of its own. */
static void use_vectors(besa_block *b, float *const vector[BESA_VECTORS])
{
    for (int i = 0; i < BESA_VECTORS; i++)
        if (vector[i]) *besa__block_vector(b, i) = vector[i];
}

/* The layers' inputs as a forward pass has left them. */
static const float *input_of(const besa_activations *acts, int layer)
{
    return (const float *)(layer < 3 ? acts->a : layer == 3 ? acts->attn : layer < 6 ? acts->m : acts->z);
}

/* Sums of squares of what the dense layer puts out, over sequences first .. first + count - 1 */
TEST_UNWATCHED static double *layer_norms(const run *r, int layer, int64_t first, int64_t count)
{
    int64_t R = r->m->rows[layer], C = r->m->columns[layer];
    double *norm2 = (double *)take((size_t)R * sizeof *norm2);
    besa_activations acts = r->m->acts;
    forward(&r->m->block, &acts, r->m->x + first * SEQLEN * WIDTH, take_floats(count * SEQLEN * WIDTH), count);
    const float *x = input_of(&acts, layer), *w = weight_of(r->m, layer), *bias = r->m->block.bias[layer];
    for (int64_t t = 0; t < count * SEQLEN; t++)
        for (int64_t q = 0; q < R; q++) {
            double y = bias ? (double)bias[q] : 0;
            for (int64_t j = 0; j < C; j++) y += (double)x[t * C + j] * (double)w[q * C + j];
            norm2[q] += y * y;
        }
    return norm2;
}

/* Granularity layer: each layer by itself, on its inputs in the masked block b; in double. */
TEST_UNWATCHED static double layer_losses(const run *r, const besa_block *b, int64_t first, int64_t count, gradients *g)
{
    double loss = 0;
    int64_t of = r->options.norm_all ? r->sequences : count;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t R = r->m->rows[l], C = r->m->columns[l];
        double *norm2 = layer_norms(r, l, r->options.norm_all ? 0 : first, of);
        besa_activations acts = r->m->acts;
        forward(b, &acts, r->m->x + first * SEQLEN * WIDTH, take_floats(count * SEQLEN * WIDTH), count);
        const float *x = input_of(&acts, l), *w = weight_of(r->m, l), *what = (const float *)b->weight[l];
        double *dw = (double *)take((size_t)(R * C) * sizeof *dw), one = 0;
        for (int64_t t = 0; t < count * SEQLEN; t++)
            for (int64_t q = 0; q < R; q++) {
                double e = 0;
                for (int64_t j = 0; j < C; j++) e += (double)x[t * C + j] * ((double)what[q * C + j] - (double)w[q * C + j]);
                one += e * e / norm2[q] / (double)R;
                for (int64_t j = 0; j < C; j++) dw[q * C + j] += 2 * e / norm2[q] / (double)R * (double)x[t * C + j];
            }
        int learns = r->options.learn != BESA_LEARN_RATES ? fixed_rate(&r->options, l) != 0 : fixed_rate(&r->options, l) < 0;
        if (learns) loss += one;
        for (int64_t i = 0; i < R * C; i++) g->dw[l][i] = (float)dw[i];
    }
    return loss;
}

/* Granularity attn-mlp: the loss at h1, and what it gives the four layers of attention in the place of what the block's loss
 * gave them: h1 is the output of the block b without its last layer. */
static double attention_loss(const run *r, const besa_block *b, int64_t first, int64_t count, gradients *g)
{
    float *y = take_floats(count * SEQLEN * WIDTH), *yref = take_floats(r->sequences * SEQLEN * WIDTH);
    float *none = take_floats(r->m->rows[6] * r->m->columns[6]);
    const float *x = r->m->x + first * SEQLEN * WIDTH;
    besa_activations acts = r->m->acts;
    besa_block dense = r->m->block, masked = *b;
    gradients half = *g;
    double norm2[WIDTH], loss = 0;
    for (int64_t i = 0; i < r->m->rows[6] * r->m->columns[6]; i++) none[i] = 0;
    for (int l = 0; l < BESA_LAYERS; l++) half.dw[l] = take_floats(r->m->rows[l] * r->m->columns[l]);
    dense.weight[BESA_DOWN] = masked.weight[BESA_DOWN] = none;
    dense.bias[BESA_DOWN] = masked.bias[BESA_DOWN] = NULL;
    forward(&dense, &acts, r->m->x, yref, r->sequences);
    batch_norms(r, yref, r->sequences, first, norm2);
    for (int i = 0; i < BESA_VECTORS; i++) half.dvector[i] = acts.dvector[i] = take_floats(besa__vector_count(&b->shape, i));
    forward(&masked, &acts, x, y, count);
    for (int64_t i = 0; i < count * SEQLEN * WIDTH; i++) {
        double e = (double)y[i] - (double)yref[first * SEQLEN * WIDTH + i];
        loss += e * e / norm2[i % WIDTH] / WIDTH;
        y[i] = (float)(2 * e / norm2[i % WIDTH] / WIDTH);
    }
    CHECK_OK(besa_block_backward(&g_be, &masked, &acts, x, y, NULL, count, SEQLEN, keep_gradient, &half, &g_error), g_error);
    for (int l = 0; l < 4; l++) g->dw[l] = half.dw[l];
    for (int i = 0; i < BESA_VECTORS; i++)
        if (i < 4 || i == BESA_NORM1 || i == BESA_Q_NORM || i == BESA_K_NORM) g->dvector[i] = half.dvector[i];
    return loss;
}

/* The loss of a step's batch by its masks and dL/dW, the whole batch at once. */
static double batch_loss(const run *r, const recorded *step, int64_t first, int64_t count, gradients *g)
{
    const float *x = r->m->x + first * SEQLEN * WIDTH, *yref = reference_of(r) + first * SEQLEN * WIDTH;
    float *y = take_floats(count * SEQLEN * WIDTH);
    besa_activations acts = r->m->acts;
    besa_block b = r->m->block;
    double norm2[WIDTH], loss = 0;
    for (int l = 0; l < BESA_LAYERS; l++) {
        b.weight[l] = step->what[l];
        g->columns[l] = r->m->columns[l];
        g->dw[l] = take_floats(r->m->rows[l] * r->m->columns[l]);
    }
    use_vectors(&b, step->vector);
    if (r->options.granularity == BESA_GRANULARITY_LAYER) return layer_losses(r, &b, first, count, g);
    for (int i = 0; i < BESA_VECTORS; i++) g->dvector[i] = acts.dvector[i] = take_floats(besa__vector_count(&b.shape, i));
    forward(&b, &acts, x, y, count);
    batch_norms(r, reference_of(r), r->sequences, first, norm2);
    for (int64_t i = 0; i < count * SEQLEN * WIDTH; i++) {
        double e = (double)y[i] - (double)yref[i];
        loss += e * e / norm2[i % WIDTH] / WIDTH;
        y[i] = (float)(2 * e / norm2[i % WIDTH] / WIDTH);
    }
    CHECK_OK(besa_block_backward(&g_be, &b, &acts, x, y, NULL, count, SEQLEN, keep_gradient, g, &g_error), g_error);
    return r->options.granularity == BESA_GRANULARITY_ATTN_MLP ? loss + attention_loss(r, &b, first, count, g) : loss;
}

/* dL/dbeta of one layer: candidate d prunes the ranks below k_d = (D - d) C / D, of every row of the group. */
static void beta_gradient(const run *r, int layer, const int32_t *rank, const float *w, const float *dw, int64_t group_rows,
                          double (*dbeta)[CANDIDATES])
{
    int64_t C = r->m->columns[layer];
    for (int64_t i = 0; i < r->m->rows[layer] * C; i++)
        for (int d = 0; d < CANDIDATES - 1 && rank[i] < (CANDIDATES - 1 - d) * C / (CANDIDATES - 1); d++)
            dbeta[i / C / group_rows][d] -= (double)dw[i] * (double)w[i];
}

/* alpha and n of one step's rows against theta; mean: the mean rate of each part's learned layers */
static void check_rates(const run *r, const recorded *step, double mean[BESA_LAYERS])
{
    memset(mean, 0, BESA_LAYERS * sizeof *mean);
    int64_t at = 0, group_rows, wrong = 0;
    for (int l = 0, row = 0; l < BESA_LAYERS; row += (int)r->m->rows[l++]) {
        layer_rates rates = rates_of(&r->options, step->theta, &at, r->m->rows[l], &group_rows);
        int64_t C = r->m->columns[l];
        double want[INNER], fixed = fixed_rate(&r->options, l);
        for (int64_t q = 0; q < r->m->rows[l]; q++) {
            double exact = (double)C * (fixed < 0 ? rates.alpha[q / group_rows] : fixed);
            int32_t zeros = fixed < 0 ? zeros_of(weight_of(r->m, l) + q * C, C) : 0, n = (int32_t)floor(exact);
            want[q] = rates.alpha[q / group_rows];
            if (fixed < 0) mean[part_of(r, l)] += want[q] * (double)C / learned_weights(r, part_of(r, l));
            wrong += fabs(exact - rint(exact)) > 1e-4 && step->n[row + q] != (n > zeros ? n : zeros);
        }
        if (fixed < 0) CHECK_CLOSE("alpha", step->alpha + row, want, r->m->rows[l], 1e-6);
    }
    CHECK(wrong == 0, "%d rows prune another number than their rate says", (int)wrong);
}

/* ---- grids and their clips ------------------------------------------------------------------- */

/* One grid's steps in double: h, z, and max and min of the dense weights with 0 among them. */
typedef struct grid {
    double g[2], range[2], h, z, most;
} grid;

/* Columns that share a grid, and grids of a row. */
static int64_t grid_columns(const run *r, int layer)
{
    int64_t C = r->m->columns[layer], group = r->options.group_size;
    return group && group < C ? group : C;
}

static int64_t grids_of(const run *r, int layer)
{
    return (r->m->columns[layer] + grid_columns(r, layer) - 1) / grid_columns(r, layer);
}

/* The grid of a weight; logit: the layer's clips, NULL where they are 1. */
static grid grid_of(const run *r, int layer, const float *logit, int64_t row, int64_t column)
{
    int64_t C = r->m->columns[layer], group = grid_columns(r, layer), first = column / group * group;
    int64_t at = 2 * (row * grids_of(r, layer) + column / group);
    const float *w = weight_of(r->m, layer) + row * C;
    grid g = { { 1, 1 }, { 0, 0 }, 0, 0, (double)((1 << r->options.bits) - 1) };
    for (int64_t j = first; j < C && j < first + group; j++)
        g.range[0] = fmax(g.range[0], (double)w[j]), g.range[1] = fmin(g.range[1], (double)w[j]);
    for (int k = 0; k < 2 && logit; k++) g.g[k] = 1 / (1 + exp(-(double)logit[at + k]));
    g.h = (g.g[0] * g.range[0] - g.g[1] * g.range[1]) / g.most;
    g.z = g.h > 0 ? -nearbyint(g.g[1] * g.range[1] / g.h) : 0;
    return g;
}

static double level_of(const grid *g, double w)
{
    return g->h > 0 ? g->h * (fmin(fmax(nearbyint(w / g->h) + g->z, 0), g->most) - g->z) : 0;
}

/* dQ/dh of a weight that lies on `level`. */
static double slope_of(const grid *g, double w, double level)
{
    double u = g->h > 0 ? nearbyint(level / g->h) + g->z : 0;
    return u > 0 && u < g->most ? level / g->h - w / g->h : u - g->z;
}

/* What a step is to read: weights on their grids, which of them are gone, and what is left. */
typedef struct levels {
    const float *from[BESA_LAYERS];             /* the weights */
    float *w[BESA_LAYERS], *masked[BESA_LAYERS];
    char *gone[BESA_LAYERS];
    const float *clip;                          /* all logits before it, NULL: there are none */
} levels;

/* Weights of one layer that are not as they are to be, a hundred-thousandth of a level allowed. */
static int off_levels(const run *r, int layer, const float *clip, const float *want, const float *got)
{
    int64_t C = r->m->columns[layer], group = grid_columns(r, layer);
    grid g = grid_of(r, layer, clip, 0, 0);
    int wrong = 0;
    for (int64_t i = 0; i < r->m->rows[layer] * C; i++) {
        if (i % C % group == 0) g = grid_of(r, layer, clip, i / C, i % C);
        wrong += got[i] != want[i] && !(fabs((double)got[i] - (double)want[i]) <= 1e-5 * fabs(g.h * g.most));
    }
    return wrong;
}

/* The levels of v.from, of which v.gone go. */
static void fill_levels(const run *r, levels *v, const float *clip)
{
    v->clip = clip;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t C = r->m->columns[l], count = r->m->rows[l] * C, group = grid_columns(r, l);
        v->w[l] = take_floats(count), v->masked[l] = take_floats(count);
        grid g = grid_of(r, l, clip, 0, 0);
        for (int64_t i = 0; i < count; i++) {
            if (i % C % group == 0) g = grid_of(r, l, clip, i / C, i % C);
            v->w[l][i] = (float)level_of(&g, (double)v->from[l][i]);
            v->masked[l][i] = v->gone[l][i] ? 0 : v->w[l][i];
        }
        if (clip) clip += 2 * r->m->rows[l] * grids_of(r, l);
    }
}

/* Of the dense weights. n: weights of each row that go, of all layers */
static levels expect_levels(const run *r, const float *clip, int32_t *const rank[BESA_LAYERS], const int32_t *n)
{
    levels v;
    for (int l = 0; l < BESA_LAYERS; n += r->m->rows[l++]) {
        int64_t C = r->m->columns[l], count = r->m->rows[l] * C;
        v.from[l] = weight_of(r->m, l), v.gone[l] = (char *)take((size_t)count);
        for (int64_t i = 0; i < count; i++) v.gone[l][i] = v.from[l][i] == 0 || rank[l][i] < n[i / C];
    }
    fill_levels(r, &v, clip);
    return v;
}

/* The step with which weights come onto their grids; rate_steps: those before masks are final. */
static int64_t first_on_grids(const besa_prune_options *o, int64_t rate_steps)
{
    return !o->bits ? MOST_STEPS + 1 : o->learn == BESA_LEARN_BOTH && !o->quantize_first ? rate_steps : 0;
}

/* Logits before step s, which is `steps` for those that remain. */
static const float *clips_before(const run *r, int64_t s)
{
    int64_t n = 0;
    if (!r->step[0].clip) return NULL;
    if (s > 0) return r->step[s - 1].clip;
    for (int l = 0; l < BESA_LAYERS; l++) n += 2 * r->m->rows[l] * grids_of(r, l);
    float *start = take_floats(n);
    for (int64_t i = 0; i < n; i++) start[i] = 4;
    return start;
}

/* The levels of step s; layers with learned rates have left the unmasked ones behind, others what they read. What goes on with
 * are the step's own masks and levels: scores may be a rounding apart, or weights half-way. */
static levels check_levels(const run *r, int64_t s, int32_t *const rank[BESA_LAYERS], const int32_t *n)
{
    levels v = expect_levels(r, clips_before(r, s), rank, n);
    const float *clip = v.clip;
    int wrong = 0;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int unmasked = r->options.method == BESA_METHOD_BESA && fixed_rate(&r->options, l) < 0;
        wrong += off_levels(r, l, clip, unmasked ? v.w[l] : v.masked[l], r->step[s].what[l]);
        if (clip) clip += 2 * r->m->rows[l] * grids_of(r, l);
    }
    CHECK(wrong <= 8, "step %d: %d weights are not on their level", (int)s + 1, wrong);
    for (int l = wrong = 0; l < BESA_LAYERS; l++)
        for (int64_t i = 0; i < r->m->rows[l] * r->m->columns[l]; i++) {
            int gone = r->step[s].kept[l][i] == 0;
            wrong += gone != v.gone[l][i];
            v.gone[l][i] = (char)gone;
            if (r->options.method == BESA_METHOD_BESA && fixed_rate(&r->options, l) < 0) v.w[l][i] = r->step[s].what[l][i];
            else if (!gone) v.w[l][i] = r->step[s].what[l][i];
            v.masked[l][i] = gone ? 0 : v.w[l][i];
        }
    CHECK(wrong <= 4, "step %d: %d weights are masked otherwise", (int)s + 1, wrong);
    return v;
}

/* The clips' gradient of one layer, whose logits are clip, from its weights' dw. */
static void clip_gradient(const run *r, int layer, const levels *v, const float *clip, const float *dw, double *want)
{
    int64_t C = r->m->columns[layer], G = grids_of(r, layer), group = grid_columns(r, layer);
    for (int64_t i = 0; i < r->m->rows[layer] * G; i++) {
        int64_t row = i / G, first = i % G * group;
        grid g = grid_of(r, layer, clip, row, first);
        double sum = 0;
        for (int64_t j = row * C + first; j < row * C + C && j < row * C + first + group; j++)
            if (!v->gone[layer][j] && g.h > 0)
                sum += slope_of(&g, (double)v->from[layer][j], (double)v->w[layer][j]) * (double)dw[j];
        want[2 * i] = sum * g.range[0] * g.g[0] * (1 - g.g[0]) / g.most;
        want[2 * i + 1] = -sum * g.range[1] * g.g[1] * (1 - g.g[1]) / g.most;
    }
}

/* The clips' gradient in step s, and where AdamW takes them, whose first is step `first`; m, v: its moments. */
static void check_clips(const run *r, int64_t s, int64_t first, const levels *levels, const gradients *dw, double *m, double *v)
{
    const recorded *step = &r->step[s];
    const float *clip = levels->clip;
    double done = (double)(s - first), apart = 0;
    double lr = r->options.clip_lr * 0.5 * (1 + cos(3.14159265358979 * done / (double)r->steps));
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t n = 2 * r->m->rows[l] * grids_of(r, l), at = clip - levels->clip;
        double *want = (double *)take((size_t)n * sizeof *want);
        clip_gradient(r, l, levels, clip, dw->dw[l], want);
        CHECK_CLOSE(besa_layer_name(l), step->clip_grad + at, want, n, 1e-3);
        for (int64_t i = at; i < at + n; i++) {
            double g = (double)step->clip_grad[i], to;
            m[i] = 0.9 * m[i] + 0.1 * g, v[i] = 0.999 * v[i] + 0.001 * g * g;
            to = (double)levels->clip[i] - lr * m[i] / (1 - pow(0.9, done + 1)) / (sqrt(v[i] / (1 - pow(0.999, done + 1))) + 1e-16);
            apart = fmax(apart, fabs(to - (double)step->clip[i]));
        }
        clip += n;
    }
    CHECK(apart <= 1e-4, "step %d: clips end %g beside where AdamW takes them", (int)s + 1, apart);
}

/* ---- steps ----------------------------------------------------------------------------------- */

/* The gradient of theta from the gradients of the weights, which w are without masks. mean: of each part's rates */
static void check_theta(const run *r, const recorded *step, int32_t *const rank[BESA_LAYERS], const float *const w[BESA_LAYERS],
                        const gradients *g, const double mean[BESA_LAYERS])
{
    const besa_rate_options *o = &r->options.rates;
    double lambda = o->penalty == BESA_NONE ? 0 : o->penalty ? o->penalty : 1, *grad;
    int64_t at = 0;
    grad = (double *)take((size_t)r->parameters * sizeof *grad);
    for (int l = 0; l < BESA_LAYERS; l++) {
        double dbeta[INNER][CANDIDATES] = { { 0 } };
        int64_t R = r->m->rows[l], C = r->m->columns[l], group_rows;
        layer_rates rates = rates_of(&r->options, step->theta, &at, R, &group_rows);
        int part = part_of(r, l);
        double pull = 2 * lambda * (mean[part] - o->target) / (o->target * o->target);
        if (fixed_rate(&r->options, l) < 0) {
            beta_gradient(r, l, rank[l], w[l], g->dw[l], group_rows, dbeta);
            for (int64_t q = 0; q < R; q++)
                for (int d = 0; d < CANDIDATES; d++)
                    dbeta[q / group_rows][d] += pull * (double)C / learned_weights(r, part) * (1 - (double)d / (CANDIDATES - 1));
            theta_gradient(&rates, step->theta, dbeta, grad);
        }
        /* where weights move, those next to each other in a row may swap their ranks by a rounding, and so their buckets */
        CHECK_CLOSE(besa_layer_name(l), step->grad + rates.at, grad + rates.at, at - rates.at,
                    r->options.learn == BESA_LEARN_BOTH ? 2e-3 : 1e-4);
    }
    CHECK(at == r->parameters, "%d parameters, expected %d", (int)r->parameters, (int)at);
}

/* m, v: the clips' moments, where there are any */
static void check_step(const run *r, int64_t s, int32_t *const rank[BESA_LAYERS], double *m, double *v)
{
    const recorded *step = &r->step[s];
    int64_t batch = r->options.batch_size ? r->options.batch_size : 1, batches = (r->sequences + batch - 1) / batch;
    int64_t first = s % batches * batch, count = first + batch > r->sequences ? r->sequences - first : batch;
    double mean[BESA_LAYERS];
    check_rates(r, step, mean);
    gradients g;
    int wrong = 0, bits = r->options.bits;
    recorded read = *step;
    levels on;
    const float *w[BESA_LAYERS];
    if (bits) on = check_levels(r, s, rank, step->n);
    for (int l = 0; l < BESA_LAYERS && bits; l++) read.what[l] = on.masked[l];
    check_number("a step's loss", (double)step->loss, batch_loss(r, &read, first, count, &g), 2e-5);
    if (step->clip) check_clips(r, s, 0, &on, &g, m, v);
    for (int l = 0, row = 0; l < BESA_LAYERS; row += (int)r->m->rows[l++]) {
        w[l] = bits ? on.w[l] : weight_of(r->m, l);
        for (int64_t i = 0; i < r->m->rows[l] * r->m->columns[l] && !bits; i++)
            wrong += step->what[l][i] != (rank[l][i] < step->n[row + i / r->m->columns[l]] ? 0 : weight_of(r->m, l)[i]);
    }
    check_theta(r, step, rank, w, &g, mean);
    CHECK(wrong <= 4, "step %d: %d weights are masked otherwise", (int)s + 1, wrong); /* scores a rounding apart */
}

/* The exact count from the rates that learning ended with, and floor(rate C) of every row of a fixed layer. */
static double final_counts(run *r, int32_t *n)
{
    int32_t least[ROWS], columns[ROWS], projected[ROWS];
    double mean = 0, want[ROWS];
    int64_t at = 0, group_rows;
    for (int l = 0, row = 0; l < BESA_LAYERS; row += (int)r->m->rows[l++]) {
        layer_rates rates = rates_of(&r->options, r->step[r->steps].theta, &at, r->m->rows[l], &group_rows);
        int64_t C = r->m->columns[l];
        double fixed = fixed_rate(&r->options, l);
        for (int64_t q = 0; q < r->m->rows[l]; q++) {
            double rate = rates.alpha[q / group_rows];
            least[row + q] = zeros_of(weight_of(r->m, l) + q * C, C);
            columns[row + q] = fixed < 0 ? (int32_t)C : 0;
            want[row + q] = fixed < 0 ? rate : (double)r->alpha[row + q];
            n[row + q] = (int32_t)floor((fixed < 0 ? rate : fixed) * (double)C);
            if (fixed < 0) mean += rate * (double)C / learned_weights(r, -1);
            if (fixed < 0 && n[row + q] < least[row + q]) n[row + q] = least[row + q];
        }
    }
    CHECK_CLOSE("alpha at the end", r->alpha, want, ROWS, 1e-6);
    if (r->options.no_projection) return mean;
    for (int l = 0, first = 0, rows = 0; l < BESA_LAYERS; first += rows, rows = 0) { /* part after part */
        int part = part_of(r, l);
        while (l < BESA_LAYERS && part_of(r, l) == part) rows += (int)r->m->rows[l++];
        ref_project(&g_ops, projected + first, r->alpha + first, least + first, columns + first,
                    (int64_t)floor(r->options.rates.target * learned_weights(r, part) + 0.5), rows);
    }
    for (int i = 0; i < ROWS; i++)
        if (columns[i]) n[i] = projected[i];
    forget_references();
    return mean;
}

/* Rows whose counts differ, and weights that are not as dense or +0. */
static void check_pruned(const run *r, const int32_t *n)
{
    int rows = 0, wrong = 0, off = 0;
    for (int l = 0; l < BESA_LAYERS; n += r->m->rows[l++]) {
        int64_t C = r->m->columns[l];
        const float *w = (const float *)r->pruned[l], *dense = weight_of(r->m, l);
        for (int64_t q = 0; q < r->m->rows[l]; q++) {
            int32_t zeros = zeros_of(w + q * C, C), least = zeros_of(dense + q * C, C);
            int32_t want = n[q] > least ? n[q] : least;
            rows += zeros != want, off += zeros - want;
        }
        for (int64_t i = 0; i < r->m->rows[l] * C; i++)
            wrong += w[i] != 0 ? w[i] != dense[i] : signbit(w[i]) && fixed_rate(&r->options, l) < 0;
    }
    CHECK(rows <= 2 && off == 0, "%d rows have other counts, %d weights too many", rows, off); /* two rests a rounding apart */
    CHECK(wrong == 0, "%d weights changed", wrong);
}

/* Sequences that the report's losses are of: an eighth, one to eight, or eight where something learns with final masks. */
static int64_t shown_of(int64_t sequences, const besa_prune_options *o)
{
    int clips = o->bits && o->clipping == BESA_CLIPPING_LEARNED && o->method != BESA_METHOD_BESA;
    int64_t n = o->learn != BESA_LEARN_RATES || clips || sequences > 64 ? 8 : sequences < 8 ? 1 : sequences / 8;
    return n < sequences ? n : sequences;
}

/* The report's losses, the rate, and what the block leaves in x and dense_x. */
static void check_report(const run *r, int32_t *const rank[BESA_LAYERS], double mean)
{
    int64_t N = r->sequences, count = N * SEQLEN * WIDTH;
    int64_t shown = shown_of(N, &r->options), reference = learns(&r->options) ? N : shown;
    float *y = take_floats(TOKENS * WIDTH);
    besa_activations acts = r->m->acts;
    besa_block b = r->m->block;
    int32_t n[ROWS];
    double rest;
    for (int l = 0; l < BESA_LAYERS; l++) b.weight[l] = r->pruned[l];
    if (r->steps > 0) use_vectors(&b, r->step[r->steps - 1].vector);
    forward(&b, &acts, r->m->x, y, N);
    CHECK(relative_error(r->x, widened(y, count), count) < 1e-6, "x is not the pruned block's output");
    check_number("loss_after", r->report.loss_after, report_loss(r, y, shown, reference), 2e-5);
    rest = report_loss(r, y, reference, reference);
    check_number("loss_all", r->report.loss_all, rest, 2e-5);
    if (r->options.learn != BESA_LEARN_RATES || r->options.bits) return;
    check_number("loss_masks", r->report.loss_masks, r->report.loss_after, 0);
    if (!learns(&r->options)) return;
    check_number("mean_rate", r->report.mean_rate, mean, 1e-6);
    for (int l = 0, row = 0; l < BESA_LAYERS; l++)
        for (int64_t q = 0; q < r->m->rows[l]; q++) {
            double rate = fixed_rate(&r->options, l);
            n[row++] = (int32_t)floor((rate < 0 ? r->options.rates.target : rate) * (double)r->m->columns[l]);
        }
    b = masked_block(r, rank, n);
    forward(&b, &acts, r->m->x, y, N);
    check_number("loss_uniform", r->report.loss_uniform, report_loss(r, y, shown, reference), 1e-3); /* a tie */
    for (int l = 0; l < BESA_LAYERS; l++) b.weight[l] = r->step[0].what[l];
    forward(&b, &acts, r->m->x, y, N);
    rest = r->options.rates.zero_start ? report_loss(r, y, shown, reference) : r->report.loss_uniform;
    check_number("loss_before", r->report.loss_before, rest, 2e-5);
    if (!r->options.dense_stream) return;
    CHECK(relative_error(r->dense_x, widened(r->m->y_dense, count), count) < 1e-6, "the dense stream stands still");
}

/* With uniform masks by `rank`, the gradients of single sequences: their squares change the ranks of what learns. */
static void rank_by_gradients(const run *r, int32_t *rank[BESA_LAYERS])
{
    int32_t n[ROWS];
    double *squares[BESA_LAYERS];
    recorded uniform;
    gradients g;
    memset(&uniform, 0, sizeof uniform);
    for (int l = 0, row = 0; l < BESA_LAYERS; l++) {
        squares[l] = (double *)take((size_t)(r->m->rows[l] * r->m->columns[l]) * sizeof(double));
        for (int64_t q = 0; q < r->m->rows[l]; q++) {
            double rate = fixed_rate(&r->options, l);
            n[row++] = (int32_t)floor((rate < 0 ? r->options.rates.target : rate) * (double)r->m->columns[l]);
        }
    }
    besa_block b = masked_block(r, rank, n);
    for (int l = 0; l < BESA_LAYERS; l++) uniform.what[l] = copy_of(b.weight[l], (size_t)(r->m->rows[l] * r->m->columns[l]) * sizeof(float));
    for (int64_t s = 0; s < r->sequences; s++) {
        batch_loss(r, &uniform, s, 1, &g);
        for (int l = 0; l < BESA_LAYERS; l++)
            for (int64_t i = 0; i < r->m->rows[l] * r->m->columns[l]; i++) squares[l][i] += (double)g.dw[l][i] * (double)g.dw[l][i];
    }
    for (int l = 0; l < BESA_LAYERS; l++)
        if (fixed_rate(&r->options, l) < 0)
            rank[l] = ranks_with(r->m, l, r->sequences * SEQLEN, r->options.importance, weight_of(r->m, l), squares[l]);
}

/* The same, whatever memory there is: as one piece, in pieces of 6, 3, 2 and 1 sequences, and gradients and ranks of 128 rows
 * at a time. */
static void test_learning(const model *m, const besa_prune_options *o, int64_t sequences)
{
    static run r;
    int32_t *rank[BESA_LAYERS], n[ROWS];
    int levels = 0;
    size_t budget = 0;
    int64_t chunk = sequences + 1;
    for (int l = 0; l < BESA_LAYERS; l++) rank[l] = ranks_of(m, l, sequences * SEQLEN, o->importance);
    for (; run_pruner(&r, m, o, sequences, budget); budget = r.bytes - 1, levels++) {
        double mean;
        CHECK(r.chunk < chunk || levels == 1, "pieces of %d sequences, and with less memory %d", (int)chunk, (int)r.chunk);
        chunk = r.chunk;
        CHECK(r.steps == r.options.epochs * ((sequences + o->batch_size - 1) / o->batch_size), "%d steps", (int)r.steps);
        if (levels == 0 && o->importance == BESA_IMPORTANCE_GRADIENT) rank_by_gradients(&r, rank);
        for (int64_t s = 0; s < r.steps; s++) check_step(&r, s, rank, NULL, NULL);
        mean = final_counts(&r, n);
        check_pruned(&r, n);
        check_report(&r, rank, mean);
        g_be.gradient_bytes = 129 * INNER * sizeof(float);
    }
    g_be.gradient_bytes = 0;
    CHECK(levels > 3 && chunk == 1, "the smallest pieces are of %d sequences", (int)chunk);
}

/* Rates with clips, or clips alone, step by step and whatever memory there is: the levels that are read, the gradients of
 * rates and clips, where the clips go; and the result. */
static void test_quantized(const model *m, const besa_prune_options *o, int64_t sequences)
{
    static run r;
    int32_t *rank[BESA_LAYERS], n[ROWS];
    size_t budget = 0;
    int levels_of_memory = 0, besa = o->method == BESA_METHOD_BESA;
    for (int l = 0; l < BESA_LAYERS; l++) rank[l] = ranks_of(m, l, sequences * SEQLEN, o->importance);
    for (; run_pruner(&r, m, o, sequences, budget); budget = r.bytes - 1, levels_of_memory++) {
        int64_t batch = o->batch_size, batches = (sequences + batch - 1) / batch, clips = 0;
        int wrong = 0;
        for (int l = 0, row = 0; l < BESA_LAYERS; l++) {
            double rate = fixed_rate(o, l);
            clips += 2 * m->rows[l] * grids_of(&r, l);
            for (int64_t q = 0; q < m->rows[l]; q++)
                n[row++] = (int32_t)floor((rate < 0 ? o->rates.target : rate) * (double)m->columns[l]);
        }
        double *moments[2] = { (double *)take((size_t)clips * sizeof(double)), (double *)take((size_t)clips * sizeof(double)) };
        CHECK(r.steps == batches * (besa ? o->epochs : o->clipping == BESA_CLIPPING_LEARNED ? 3 : 0), "%d steps", (int)r.steps);
        CHECK((r.step[0].clip != NULL) == (o->clipping == BESA_CLIPPING_LEARNED), "clips where there are to be none, or none");
        for (int64_t s = 0; s < r.steps; s++)
            if (besa) check_step(&r, s, rank, moments[0], moments[1]);
            else {
                int64_t first = s % batches * batch, count = first + batch > sequences ? sequences - first : batch;
                recorded read = r.step[s];
                gradients g;
                levels on = check_levels(&r, s, rank, n);
                for (int l = 0; l < BESA_LAYERS; l++) read.what[l] = on.masked[l];
                check_number("a step's loss", (double)r.step[s].loss, batch_loss(&r, &read, first, count, &g), 2e-5);
                check_clips(&r, s, 0, &on, &g, moments[0], moments[1]);
            }
        if (besa) final_counts(&r, n);
        levels end = expect_levels(&r, clips_before(&r, r.steps), rank, n);
        for (int l = 0; l < BESA_LAYERS; l++) {
            wrong += off_levels(&r, l, end.clip, end.masked[l], (const float *)r.pruned[l]);
            for (int64_t i = 0; i < m->rows[l] * m->columns[l]; i++)
                wrong += ((const float *)r.pruned[l])[i] == 0 && signbit(((const float *)r.pruned[l])[i]);
            if (end.clip) end.clip += 2 * m->rows[l] * grids_of(&r, l);
        }
        CHECK(wrong <= 12, "%d weights of the result are not on their level", wrong);
        check_report(&r, rank, 0);
        g_be.gradient_bytes = 129 * INNER * sizeof(float);
    }
    g_be.gradient_bytes = 0;
    CHECK(levels_of_memory > 1, "%d amounts of memory", levels_of_memory);
}

/* ---- kept weights that learn ------------------------------------------------------------------ */

typedef struct moving {                         /* a layer's weights, or a norm or bias, and Adam's moments */
    double *w, *m, *v, rms;
} moving;

static moving moving_from(const float *w, int64_t n)
{
    moving made = { widened(w, n), (double *)take((size_t)n * sizeof(double)), (double *)take((size_t)n * sizeof(double)), 0 };
    double squares = 0;
    for (int64_t i = 0; i < n; i++) squares += made.w[i] * made.w[i];
    made.rms = sqrt(squares / (double)n);
    return made;
}

/* The learning rate of step s (from 0) of `steps`, on grids a sixth: up in the warm-up's steps, then down a half cosine. */
static double weight_rate(const besa_prune_options *o, int64_t s, int64_t steps, int on_grids)
{
    double lr = (o->weight_lr ? o->weight_lr : 0.2) / (on_grids ? 6 : 1), rise = floor(o->weight_warmup * (double)steps);
    if ((double)s < rise) return lr * (double)(s + 1) / (rise + 1);
    return lr * 0.5 * (1 + cos(3.14159265358979 * ((double)s - rise) / ((double)steps - rise)));
}

/* Adam's step number `step` (from 1) of a layer's weights that `what` has not at 0, or of all; what becomes what it must be
 * after it. */
static void move_weights(moving *layer, float *what, const float *grad, int64_t n, double lr, int64_t step, int all)
{
    for (int64_t i = 0; i < n; i++) {
        double g = (double)grad[i];
        if (what[i] == 0 && !all) continue;
        layer->m[i] = 0.9 * layer->m[i] + 0.1 * g;
        layer->v[i] = 0.999 * layer->v[i] + 0.001 * g * g;
        layer->w[i] -= lr * layer->rms * layer->m[i] / (1 - pow(0.9, (double)step)) /
                       (sqrt(layer->v[i] / (1 - pow(0.999, (double)step))) + 1e-12);
        what[i] = (float)layer->w[i];
    }
}

/* How far a norm or bias has come in one step of lr; where lr is 0, where vectors do not learn, and of a layer that stays dense
 * it stands still. It goes on from what was recorded. */
static void check_vector_step(const run *r, const recorded *step, int i, moving *vector, const moving *layer, const gradients *g,
                              double lr, int64_t number)
{
    int64_t n = besa__vector_count(&r->m->block.shape, i), wrong = 0;
    double *way = (double *)take((size_t)n * sizeof *way), columns = i < BESA_LAYERS ? (double)r->m->columns[i] : (double)n;
    float *went = take_floats(n), *now = take_floats(n);
    int moves = lr > 0 && r->options.learn_vectors && (i >= BESA_LAYERS || fixed_rate(&r->options, i) != 0);
    if (i < BESA_LAYERS) vector->rms = layer[i].rms;
    for (int64_t k = 0; k < n; k++) now[k] = (float)vector->w[k];
    for (int64_t k = 0; k < n; k++) way[k] = -(double)now[k], went[k] = step->vector[i][k] - now[k];
    if (moves) move_weights(vector, now, g->dvector[i], n, lr / sqrt(columns), number, 1);
    for (int64_t k = 0; k < n; k++) way[k] += (double)now[k], wrong += went[k] != 0;
    if (moves) CHECK_CLOSE("a norm or bias", went, way, n, 1e-2);
    else CHECK(wrong == 0, "%d elements of vector %d moved", (int)wrong, i);
    for (int64_t k = 0; k < n; k++) vector->w[k] = (double)step->vector[i][k];
}

/* The weights that step s (or the last one) has left masked, with bits not yet on their grids. */
static float *masked_after(const run *r, int64_t s, int layer)
{
    return r->options.bits ? r->step[s].kept[layer] : r->step[s].what[layer];
}

/* The levels that step s reads: of the weights before it, of which those go that it has left at 0. What goes on with are the
 * recorded ones, as in check_levels; layers with learned rates have left the unmasked ones behind. */
static levels check_moving_levels(const run *r, int64_t s, const moving layer[BESA_LAYERS], int64_t rate_steps)
{
    levels v;
    int wrong = 0;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t n = r->m->rows[l] * r->m->columns[l];
        float *from = take_floats(n);
        v.from[l] = from, v.gone[l] = (char *)take((size_t)n);
        for (int64_t i = 0; i < n; i++) from[i] = (float)layer[l].w[i], v.gone[l][i] = r->step[s].kept[l][i] == 0;
    }
    fill_levels(r, &v, clips_before(r, s));
    const float *clip = v.clip;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int unmasked = s < rate_steps && r->step[s].grad && fixed_rate(&r->options, l) < 0;
        wrong += off_levels(r, l, clip, unmasked ? v.w[l] : v.masked[l], r->step[s].what[l]);
        for (int64_t i = 0; i < r->m->rows[l] * r->m->columns[l]; i++) {
            if (unmasked || !v.gone[l][i]) v.w[l][i] = r->step[s].what[l][i];
            v.masked[l][i] = v.gone[l][i] ? 0 : v.w[l][i];
        }
        if (clip) clip += 2 * r->m->rows[l] * grids_of(r, l);
    }
    CHECK(wrong <= 8, "step %d: %d weights are not on their level", (int)s + 1, wrong);
    return v;
}

/* One step: the masks of its weights, its loss, how far the kept weights have come, and what rates and clips follow; m, v: the
 * clips' moments. Masks are those of the rates, or in the weights' pass those of the result. The layers go on from what was
 * recorded. */
static void check_weight_step(const run *r, moving layer[BESA_LAYERS], moving vector[BESA_VECTORS], int64_t s, int64_t rate_steps,
                              int32_t *const rank[], double *m, double *v)
{
    const besa_prune_options *o = &r->options;
    const recorded *step = &r->step[s];
    const float *unmasked[BESA_LAYERS];
    recorded before = *step, read;
    levels on;
    int64_t batch = o->batch_size ? o->batch_size : 1, batches = (r->sequences + batch - 1) / batch, pass = s % batches;
    int64_t first = pass * batch, count = first + batch > r->sequences ? r->sequences - first : batch;
    int64_t started = o->learn == BESA_LEARN_BOTH ? 0 : rate_steps;
    int moves = s >= started, wrong = 0, masks = 0, on_grids = s >= first_on_grids(o, rate_steps);
    double lr = weight_rate(o, s - started, r->steps - started, on_grids);
    gradients g;
    for (int l = 0, row = 0; l < BESA_LAYERS; row += (int)r->m->rows[l++]) {
        int64_t C = r->m->columns[l], n = r->m->rows[l] * C;
        const float *masked = masked_after(r, s, l), *pruned = masked_after(r, r->steps - 1, l);
        float *w = take_floats(n);
        int64_t held = (int64_t)floor(fixed_rate(o, l) * (double)C);
        before.what[l] = take_floats(n);
        for (int64_t i = 0; i < n; i++) {
            int64_t goes = o->pattern_m ? held : step->n[row + i / C];
            int gone = weight_of(r->m, l)[i] == 0 || (s < rate_steps ? is_gone(r, l, rank[l], i, goes) : pruned[i] == 0);
            w[i] = (float)layer[l].w[i];
            before.what[l][i] = masked[i] == 0 ? 0 : w[i];
            masks += gone != (masked[i] == 0);  /* scores a rounding apart */
        }
        unmasked[l] = w;
    }
    for (int i = 0; i < BESA_VECTORS; i++) {
        int64_t n = besa__vector_count(&r->m->block.shape, i);
        if (step->vector[i]) before.vector[i] = take_floats(n);
        for (int64_t k = 0; k < n && step->vector[i]; k++) before.vector[i][k] = (float)vector[i].w[k];
    }
    read = before;
    if (on_grids) on = check_moving_levels(r, s, layer, rate_steps);
    for (int l = 0; l < BESA_LAYERS && on_grids; l++) read.what[l] = on.masked[l], unmasked[l] = on.w[l];
    check_number("a step's loss", (double)step->loss, batch_loss(r, &read, first, count, &g), 5e-5);
    if (step->clip && on_grids) check_clips(r, s, first_on_grids(o, rate_steps), &on, &g, m, v);
    if (s < rate_steps && step->grad) {
        double mean[BESA_LAYERS];
        check_rates(r, step, mean);
        check_theta(r, step, rank, unmasked, &g, mean);
    }
    for (int i = 0; i < BESA_VECTORS; i++)
        if (step->vector[i]) check_vector_step(r, step, i, &vector[i], layer, &g, moves ? lr : 0, s - started + 1);
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t n = r->m->rows[l] * r->m->columns[l];
        double *way = (double *)take((size_t)n * sizeof *way);
        float *went = take_floats(n), *masked = masked_after(r, s, l);
        if (moves && fixed_rate(o, l) != 0) {
            for (int64_t i = 0; i < n; i++) way[i] = -(double)before.what[l][i];
            for (int64_t i = 0; i < n; i++) went[i] = masked[i] - before.what[l][i];
            move_weights(&layer[l], before.what[l], g.dw[l], n, lr / sqrt((double)r->m->columns[l]), s - started + 1, 0);
            for (int64_t i = 0; i < n; i++) way[i] += (double)before.what[l][i];
            CHECK_CLOSE(besa_layer_name(l), went, way, n, 1e-2); /* of a gradient near 0 the sign is rounding, and a step its sign */
        } else
            for (int64_t i = 0; i < n; i++) wrong += masked[i] != before.what[l][i];
        for (int64_t i = 0; i < n; i++)
            if (masked[i] != 0) layer[l].w[i] = (double)masked[i];
    }
    CHECK(wrong <= 4 && masks <= 4, "step %d: %d weights moved, %d are masked otherwise", (int)s + 1, wrong, masks);
}

/* The levels of a layer's weights w, in their place; clip: all logits. */
static void put_on_grids(const run *r, int layer, const float *clip, float *w)
{
    int64_t C = r->m->columns[layer], group = grid_columns(r, layer);
    grid g = { { 0, 0 }, { 0, 0 }, 0, 0, 0 };
    for (int l = 0; l < layer && clip; l++) clip += 2 * r->m->rows[l] * grids_of(r, l);
    for (int64_t i = 0; i < r->m->rows[layer] * C; i++) {
        if (i % C % group == 0) g = grid_of(r, layer, clip, i / C, i % C);
        w[i] = (float)level_of(&g, (double)w[i]);
    }
}

/* The ranks that a step, or the final masks, go by: those of the weights as they now are, where it is time for that. */
static void rank_moving(const run *r, const moving layer[BESA_LAYERS], int64_t s, int64_t rate_steps, int32_t *rank[])
{
    const besa_prune_options *o = &r->options;
    int64_t interval = o->rank_interval == BESA_NONE ? 0 : o->rank_interval ? o->rank_interval : 1;
    if (o->learn != BESA_LEARN_BOTH || s == 0 || s > rate_steps || !interval || (s < rate_steps && s % interval)) return;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t n = r->m->rows[l] * r->m->columns[l];
        float *w = take_floats(n);
        if (fixed_rate(o, l) >= 0) continue;    /* its mask stays */
        for (int64_t i = 0; i < n; i++) w[i] = (float)layer[l].w[i];
        if (o->quantize_first) put_on_grids(r, l, clips_before(r, s), w);
        rank[l] = ranks_with(r->m, l, r->sequences * SEQLEN, o->importance, w, NULL);
    }
}

/* Final masks keep in every row what ranks last: a score or two may be a rounding apart. */
static void check_final_masks(const run *r, int32_t *const rank[])
{
    int wrong = 0;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t C = r->m->columns[l];
        for (int64_t row = 0; row < r->m->rows[l]; row++) {
            const float *w = masked_after(r, r->steps - 1, l) + row * C;
            int64_t n = 0;
            for (int64_t j = 0; j < C; j++) n += w[j] == 0;
            for (int64_t j = 0; j < C; j++) {
                int zero = weight_of(r->m, l)[row * C + j] == 0, dense = fixed_rate(&r->options, l) == 0;
                wrong += (dense ? zero : is_gone(r, l, rank[l], row * C + j, n)) != (w[j] == 0);
            }
        }
    }
    CHECK(wrong <= 4, "%d weights are masked otherwise in the end", wrong);
}

/* With bits: the result is what the last step left of the weights, on the grids that it left. */
static void check_last_levels(const run *r, const moving layer[BESA_LAYERS])
{
    levels v;
    int wrong = 0;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t n = r->m->rows[l] * r->m->columns[l];
        float *from = take_floats(n);
        v.from[l] = from, v.gone[l] = (char *)take((size_t)n);
        for (int64_t i = 0; i < n; i++) from[i] = (float)layer[l].w[i], v.gone[l][i] = r->step[r->steps - 1].kept[l][i] == 0;
    }
    fill_levels(r, &v, clips_before(r, r->steps));
    const float *clip = v.clip;
    for (int l = 0; l < BESA_LAYERS; l++) {
        wrong += off_levels(r, l, clip, v.masked[l], (const float *)r->pruned[l]);
        if (clip) clip += 2 * r->m->rows[l] * grids_of(r, l);
    }
    CHECK(wrong <= 8, "%d weights of the result are not on their level", wrong);
}

/* Rates and weights, or weights alone, step by step, whatever memory there is. */
static void test_weights(const model *m, const besa_prune_options *o, int64_t sequences)
{
    static run r;
    int32_t *rank[BESA_LAYERS], *dense[BESA_LAYERS];
    int64_t batch = o->batch_size ? o->batch_size : 1, batches = (sequences + batch - 1) / batch;
    int64_t rate_steps = batches * (o->epochs ? o->epochs : 1);
    size_t budget = 0;
    int levels = 0;
    if (o->method != BESA_METHOD_BESA || (o->pattern_m && o->learn != BESA_LEARN_BOTH)) rate_steps = 0;
    for (int l = 0; l < BESA_LAYERS; l++) dense[l] = ranks_of(m, l, sequences * SEQLEN, o->importance);
    for (; run_pruner(&r, m, o, sequences, budget); budget = r.bytes - 1, levels++) {
        if (levels == 0 && o->importance == BESA_IMPORTANCE_GRADIENT) rank_by_gradients(&r, dense);
        for (int l = 0; l < BESA_LAYERS && levels == 0 && o->quantize_first; l++) {
            float *w = (float *)copy_of(weight_of(m, l), (size_t)(m->rows[l] * m->columns[l]) * sizeof(float));
            put_on_grids(&r, l, clips_before(&r, 0), w);
            dense[l] = ranks_with(m, l, sequences * SEQLEN, o->importance, w, NULL);
        }
        memcpy(rank, dense, sizeof rank);
        moving layer[BESA_LAYERS], vector[BESA_VECTORS];
        besa_block b = m->block;
        float *y = take_floats(TOKENS * WIDTH);
        besa_activations acts = m->acts;
        int64_t shown = shown_of(sequences, o), clips = 0;
        struct levels on;
        for (int l = 0; l < BESA_LAYERS; l++) clips += 2 * m->rows[l] * grids_of(&r, l);
        double *moments[2] = { (double *)take((size_t)clips * sizeof(double)), (double *)take((size_t)clips * sizeof(double)) };
        CHECK(r.steps == rate_steps + batches * (o->weight_epochs ? o->weight_epochs : 3), "%d steps", (int)r.steps);
        for (int l = 0; l < BESA_LAYERS; l++) layer[l] = moving_from(weight_of(m, l), m->rows[l] * m->columns[l]);
        for (int i = 0; i < BESA_VECTORS; i++) {
            const float *dense = *besa__block_vector(&b, i);
            if (dense) vector[i] = moving_from(dense, besa__vector_count(&b.shape, i));
        }
        for (int64_t s = 0; s < r.steps; s++) {
            rank_moving(&r, layer, s, rate_steps, rank);
            if (s == rate_steps && o->method == BESA_METHOD_BESA) check_final_masks(&r, rank);
            if (s == rate_steps) {              /* masks are final */
                for (int l = 0; l < BESA_LAYERS; l++) {
                    int64_t n = m->rows[l] * m->columns[l];
                    float *w = take_floats(n);
                    for (int64_t i = 0; i < n; i++)
                        w[i] = masked_after(&r, r.steps - 1, l)[i] != 0 ? (float)layer[l].w[i] : 0;
                    b.weight[l] = w;
                }
                if (o->bits) on = check_moving_levels(&r, s, layer, rate_steps);
                for (int l = 0; l < BESA_LAYERS && o->bits; l++) b.weight[l] = on.masked[l];
                if (s > 0) use_vectors(&b, r.step[s - 1].vector);
                forward(&b, &acts, m->x, y, sequences);
                check_number("loss_masks", r.report.loss_masks, report_loss(&r, y, shown, sequences), 5e-5);
            }
            check_weight_step(&r, layer, vector, s, rate_steps, rank, moments[0], moments[1]);
        }
        if (o->bits) check_last_levels(&r, layer);
        for (int l = 0; l < BESA_LAYERS && !o->bits; l++)
            CHECK(!memcmp(r.pruned[l], r.step[r.steps - 1].what[l], (size_t)(m->rows[l] * m->columns[l]) * sizeof(float)),
                  "%s is not as the last step left it", besa_layer_name(l));
        check_report(&r, rank, 0);
        g_be.gradient_bytes = 129 * INNER * sizeof(float);
    }
    g_be.gradient_bytes = 0;
    CHECK(levels > 1, "%d amounts of memory", levels);
}

/* ---- what the optimiser is asked for ---------------------------------------------------------- */

static besa_optimizer_step g_asked;
static besa_result (*g_optimizer_step)(besa_backend *, const besa_optimizer_step *);

static besa_result ask_optimizer(besa_backend *be, const besa_optimizer_step *step)
{
    CHECK(step->step == g_asked.step + 1, "step %d follows step %d", (int)step->step, (int)g_asked.step);
    g_asked = *step;
    return g_optimizer_step(be, step);
}

static void test_optimizer(const besa_rate_options *given, const besa_optimizer_step *want)
{
    besa_layer_shape shape = { 3, 8, BESA_F32 };
    besa_rates *rates = NULL;
    float *w = random_floats(24, 1), *scratch = take_floats(32), *theta, *grad;
    int64_t n;
    memset(&g_asked, 0, sizeof g_asked);
    g_optimizer_step = g_be.optimizer_step;
    g_be.optimizer_step = ask_optimizer;
    CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, given, &g_error), g_error);
    CHECK_OK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error);
    for (int i = 0; i < 3; i++) {
        CHECK_OK(besa_rates_forward(rates, &g_error), g_error);
        CHECK_OK(besa_rates_gradient(rates, 0, w, w, &g_error), g_error);
        CHECK_OK(besa_rates_step(rates, &g_error), g_error);
    }
    n = besa_rates_parameters(rates, &theta, &grad);
    CHECK(g_asked.step == 3 && g_asked.kind == want->kind && g_asked.lr == want->lr && g_asked.beta1 == want->beta1 &&
          g_asked.beta2 == want->beta2 && g_asked.beta3 == sqrt(want->beta2) && g_asked.eps == 1e-8 &&
          g_asked.weight_decay == want->weight_decay && g_asked.d0 == want->d0 && g_asked.d_coef == want->d_coef,
          "step %d of kind %d: lr %g, betas %g %g %g, eps %g, decay %g, d0 %g, d_coef %g",
          (int)g_asked.step, (int)g_asked.kind, g_asked.lr, g_asked.beta1, g_asked.beta2, g_asked.beta3, g_asked.eps,
          g_asked.weight_decay, g_asked.d0, g_asked.d_coef);
    CHECK(g_asked.n == n && g_asked.theta == theta && g_asked.grad == grad, "%d parameters, expected %d", (int)g_asked.n, (int)n);
    CHECK_OK(besa_rates_reset(rates, &g_error), g_error);
    g_asked.step = 0;                           /* it begins again */
    CHECK_OK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error);
    CHECK_OK(besa_rates_forward(rates, &g_error), g_error);
    CHECK_OK(besa_rates_step(rates, &g_error), g_error);
    besa_rates_destroy(rates);
    g_be.optimizer_step = g_optimizer_step;
}

/* The learning rate of every step: up in equal parts over the first warmup * steps, then as the schedule has it. */
static void test_schedule(besa_schedule schedule, double warmup, int64_t steps)
{
    besa_layer_shape shape = { 2, 4, BESA_F32 };
    besa_rate_options o;
    besa_rates *rates = NULL;
    float w[8] = { 1, 2, 3, 4, 5, 6, 7, 8 }, scratch[12];
    int64_t rise = (int64_t)(warmup * (double)steps);
    memset(&o, 0, sizeof o);
    o.target = 0.5, o.lr = 0.5, o.optimizer = BESA_ADAMW, o.schedule = schedule, o.warmup = warmup, o.steps = steps;
    g_asked.step = 0, g_optimizer_step = g_be.optimizer_step, g_be.optimizer_step = ask_optimizer;
    CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error), g_error);
    CHECK_OK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error);
    for (int64_t s = 1; s <= steps + 2; s++) { /* beyond the last step it stays what it was in that */
        int64_t at = s < steps ? s : steps;
        double angle = 3.14159265358979 * (double)(at - 1 - rise) / (double)(steps - rise), want = 0.5;
        if (at <= rise) want *= (double)at / (double)(rise + 1);
        else if (schedule == BESA_SCHEDULE_COSINE) want *= 0.5 + 0.5 * cos(angle);
        CHECK_OK(besa_rates_forward(rates, &g_error), g_error);
        CHECK_OK(besa_rates_step(rates, &g_error), g_error);
        CHECK(fabs(g_asked.lr - want) < 1e-12, "step %d of %d: lr %.15g, expected %.15g", (int)s, (int)steps, g_asked.lr, want);
    }
    besa_rates_destroy(rates);
    g_be.optimizer_step = g_optimizer_step;
}

static void test_optimizers(void)
{
    besa_rate_options o;
    besa_optimizer_step want;
    memset(&o, 0, sizeof o);
    memset(&want, 0, sizeof want);
    o.target = 0.5;
    want.kind = BESA_PRODIGY, want.lr = 1, want.beta1 = 0.9, want.beta2 = 0.999, want.d0 = 1e-6, want.d_coef = 5;
    TEST("what Prodigy is asked for") test_optimizer(&o, &want);
    o.optimizer = want.kind = BESA_ADAMW, want.lr = 0.01;
    TEST("what AdamW is asked for") test_optimizer(&o, &want);
    o.lr = want.lr = 0.3, o.beta1 = want.beta1 = 0.7, o.beta2 = want.beta2 = 0.8, o.weight_decay = want.weight_decay = 0.02;
    o.d0 = want.d0 = 1e-4, o.d_coef = want.d_coef = 2;
    TEST("what an optimiser is asked for with options") test_optimizer(&o, &want);
    o.beta1 = o.beta2 = BESA_NONE, want.beta1 = want.beta2 = 0;
    TEST("what an optimiser is asked for without momentum") test_optimizer(&o, &want);
    TEST("learning rates of a schedule") {
        test_schedule(BESA_SCHEDULE_CONSTANT, 0, 5);
        test_schedule(BESA_SCHEDULE_CONSTANT, 0.3, 10);
        test_schedule(BESA_SCHEDULE_COSINE, 0, 7);
        test_schedule(BESA_SCHEDULE_COSINE, 0.25, 16);
        test_schedule(BESA_SCHEDULE_COSINE, 0.9, 1);
    }
    TEST("a table without an operation") {
        besa_backend be = g_be;
        besa_layer_shape shape = { 2, 4, BESA_F32 };
        besa_rates *rates = NULL;
        be.rate_mean = NULL;
        CHECK(besa_rates_create(&rates, &be, &shape, 1, &o, &g_error) == BESA_ERROR_OPTION && !rates &&
              strstr(g_error.message, "rate_mean"), "%s", g_error.message);
    }
}

/* ---- methods that do not learn --------------------------------------------------------------- */

static int32_t *zeroed(int64_t n) { return (int32_t *)take((size_t)n * sizeof(int32_t)); }

/* keep (R,C): 0 where a weight goes. */
static int32_t *kept_by(const run *r, int layer, const int32_t *rank, double target)
{
    int64_t R = r->m->rows[layer], C = r->m->columns[layer], n = r->options.pattern_n, m = r->options.pattern_m;
    int32_t *keep = zeroed(R * C);
    const float *w = weight_of(r->m, layer);
    if (fixed_rate(&r->options, layer) >= 0) n = m = 0;
    for (int64_t i = 0; i < R * C; i++) {
        int64_t below = 0;
        if (m > 0)                              /* those of the group with a smaller score */
            for (int64_t k = i / m * m; k < i / m * m + m; k++) below += rank[k] < rank[i];
        keep[i] = m > 0 ? below >= n : rank[i] >= (int64_t)floor(target * (double)C);
    }
    if (m == 0 && r->options.method == BESA_METHOD_MAGNITUDE && !r->options.magnitude_per_row) {
        int64_t *order = (int64_t *)take((size_t)(R * C) * sizeof *order), count = (int64_t)floor(target * (double)(R * C));
        float *score = take_floats(R * C);
        for (int64_t i = 0; i < R * C; i++) score[i] = w[i] == 0 ? -1 : fabsf(w[i]);
        ref_sort(score, R * C, order);
        for (int64_t i = 0; i < R * C; i++) keep[order[i]] = i >= count;
    }
    return keep;
}

static void test_baseline(const model *m, const besa_prune_options *o, int64_t sequences)
{
    static run r;
    int32_t *rank[BESA_LAYERS];
    int64_t chunk = 0;
    size_t budget = 0;
    besa_importance importance = o->method == BESA_METHOD_WANDA ? BESA_IMPORTANCE_WANDA : BESA_IMPORTANCE_MAGNITUDE;
    for (int l = 0; l < BESA_LAYERS; l++) rank[l] = ranks_of(m, l, sequences * SEQLEN, importance);
    for (; run_pruner(&r, m, o, sequences, budget); budget = r.bytes - 1) {
        int wrong = 0;
        chunk = r.chunk;
        for (int l = 0; l < BESA_LAYERS; l++) {
            double fixed = fixed_rate(o, l);
            double target = fixed >= 0 ? fixed : o->pattern_m ? (double)o->pattern_n / o->pattern_m : o->rates.target;
            const int32_t *keep = kept_by(&r, l, rank[l], target);
            for (int64_t i = 0; i < m->rows[l] * m->columns[l]; i++)
                wrong += ((const float *)r.pruned[l])[i] != (keep[i] ? weight_of(m, l)[i] : 0);
        }
        CHECK(wrong <= (o->method == BESA_METHOD_MAGNITUDE ? 0 : 4), "%d weights are masked otherwise", wrong);
        check_report(&r, NULL, 0);
    }
    CHECK(chunk == 1, "the smallest pieces are of %d sequences", (int)chunk);
}

/* Every layer by itself, from its inputs in the pruner's own pieces, is pruned to the same bytes. */
static void test_layers_alone(const model *m, const besa_prune_options *o)
{
    enum { COUNT = 2 };                         /* the first by itself: the report's losses are of it */
    static run r;
    run_pruner(&r, m, o, COUNT, 0);
    for (int l = 0; l < BESA_LAYERS; l++) {
        besa_layer_shape shape = { m->rows[l], m->columns[l], BESA_F32 };
        const size_t bytes = (size_t)(shape.rows * shape.columns) * sizeof(float);
        float *statistic = take_floats(shape.columns * shape.columns), *pruned = take_floats(shape.rows * shape.columns);
        memset(statistic, 0, (size_t)(shape.columns * shape.columns) * sizeof *statistic);
        void *workspace = g_be.workspace;
        for (int64_t s = 0; s < COUNT; s++)
            CHECK_OK(besa_layer_inputs(&g_be, o, statistic, m->input[l] + s * SEQLEN * shape.columns, SEQLEN, COUNT * SEQLEN,
                                       shape.columns, &g_error), g_error);
        CHECK_OK(besa_layer_prune(&g_be, &shape, o, m->block.weight[l], o->method == BESA_METHOD_MAGNITUDE ? NULL : statistic, pruned,
                                  &g_error), g_error);
        CHECK(!memcmp(pruned, r.pruned[l], bytes), "%s is another than the pruner's", besa_layer_name(l));
        CHECK(g_be.workspace == workspace, "the workspace is another");
    }
}

static void test_layer_methods(const model *m)
{
    besa_prune_options o;
    memset(&o, 0, sizeof o);
    o.rates.target = 0.37;
    for (int k = BESA_METHOD_WANDA; k <= BESA_METHOD_MAGNITUDE; k++) {
        o.method = (besa_method)k;
        test_layers_alone(m, &o);
        o.rates.target = 0, o.pattern_n = 1, o.pattern_m = 3;
        test_layers_alone(m, &o);
        o.rates.target = 0.6, o.pattern_n = o.pattern_m = 0;
    }
    o.magnitude_per_row = 1;
    test_layers_alone(m, &o);
    o.method = BESA_METHOD_SPARSEGPT, o.damping = 0.3;
    test_layers_alone(m, &o);
}

/* Inputs in two pieces count as one; what cannot be is refused by name. */
static void test_layer_arguments(const model *m)
{
    besa_layer_shape shape = { 3, 8, BESA_F32 };
    besa_prune_options o;
    float w[24], other[24], statistic[64] = { 0 }, whole[64] = { 0 };
    const float *x = m->input[BESA_Q];
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5, o.method = BESA_METHOD_SPARSEGPT;
    for (int i = 0; i < 24; i++) w[i] = (float)cos(i);
    CHECK_OK(besa_layer_inputs(&g_be, &o, whole, x, 20, 20, 8, &g_error), g_error);
    CHECK_OK(besa_layer_inputs(&g_be, &o, statistic, x, 11, 20, 8, &g_error), g_error);
    CHECK_OK(besa_layer_inputs(&g_be, &o, statistic, x + 11 * 8, 9, 20, 8, &g_error), g_error);
    for (int i = 0; i < 64; i++)
        CHECK(i % 8 > i / 8 || fabs((double)whole[i] - (double)statistic[i]) <= 1e-5 * (1 + fabs((double)whole[i])), "H[%d] is %g in pieces, %g", i,
              (double)statistic[i], (double)whole[i]);
#define REFUSED(call, code, words) \
    CHECK((call) == (code) && strstr(g_error.message, words), "%s", g_error.message)
    REFUSED(besa_layer_inputs(&g_be, &o, statistic, x, 21, 20, 8, &g_error), BESA_ERROR_OPTION, "21 tokens of 20");
    REFUSED(besa_layer_inputs(&g_be, &o, NULL, x, 20, 20, 8, &g_error), BESA_ERROR_OPTION, "statistic is NULL");
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, NULL, other, &g_error), BESA_ERROR_OPTION, "which method sparsegpt needs");
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, statistic, w, &g_error), BESA_ERROR_OPTION, "memory of its own");
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, statistic, NULL, &g_error), BESA_ERROR_OPTION, "pruned is NULL");
    o.damping = -3;
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, statistic, other, &g_error), BESA_ERROR_OPTION, "damping is -3");
    o.damping = 0, o.rates.target = 1;
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, statistic, other, &g_error), BESA_ERROR_OPTION, "target is 1");
    o.rates.target = 0, o.pattern_n = 1, o.pattern_m = 3;
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, statistic, other, &g_error), BESA_ERROR_OPTION, "8 input columns");
    o.pattern_n = o.pattern_m = 0, o.rates.target = 0.5, o.method = BESA_METHOD_BESA;
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, statistic, other, &g_error), BESA_ERROR_OPTION, "method is besa");
    o.method = BESA_METHOD_SPARSEGPT, o.damping = 1e-6;
    memset(statistic, 0, sizeof statistic);
    statistic[0] = statistic[9] = 1, statistic[8] = 2; /* 1 2 2 1: not positive definite */
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, statistic, other, &g_error), BESA_ERROR_NUMERIC, "Hessian");
    statistic[0] = NAN;
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, statistic, other, &g_error), BESA_ERROR_NOT_FINITE, "statistic of its inputs");
    o.method = BESA_METHOD_MAGNITUDE, w[5] = INFINITY;
    REFUSED(besa_layer_prune(&g_be, &shape, &o, w, NULL, other, &g_error), BESA_ERROR_NOT_FINITE, "1 weights of the layer");
#undef REFUSED
}

/* What the options lack is told to who makes a pruner, and what a run made worse when it has ended. */
static void test_pruner_notes(const model *m)
{
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &o, 5, SEQLEN, &g_error), g_error);
    if (pruner) CHECK(strstr(besa_pruner_notes(pruner), "5 learning steps a block"), "'%s'", besa_pruner_notes(pruner));
    besa_pruner_destroy(pruner);
    o.no_projection = 1, o.rates.target = 0.9, o.rates.zero_start = 1;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &o, 5, SEQLEN, &g_error), g_error);
    if (pruner) CHECK(strstr(besa_pruner_notes(pruner), "target 0.9 is outside the rates"), "'%s'", besa_pruner_notes(pruner));
    besa_pruner_destroy(pruner);
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5, o.method = BESA_METHOD_WANDA;
    for (int learn = 0; learn < 3; learn++) { /* nothing learns, nothing good, something good */
        static float x[TOKENS * WIDTH];
        void *pruned[BESA_LAYERS];
        for (int l = 0; l < BESA_LAYERS; l++) pruned[l] = take_floats(m->rows[l] * m->columns[l]);
        memcpy(x, m->x, sizeof x);
        o.learn = learn ? BESA_LEARN_WEIGHTS : BESA_LEARN_RATES, o.weight_lr = learn == 1 ? 1000 : 0;
        CHECK_OK(besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &o, 5, SEQLEN, &g_error), g_error);
        if (!pruner) return;
        CHECK(!*besa_pruner_notes(pruner), "'%s'", besa_pruner_notes(pruner));
        for (int i = 0; i < 2; i++) {
            memcpy(x, m->x, sizeof x);
            CHECK_OK(besa_pruner_run(pruner, &m->block, "block.", x, NULL, pruned, NULL, &g_error), g_error);
            const char *note = besa_pruner_notes(pruner), *end = strchr(note, '\n');
            CHECK(learn == 1 ? strstr(note, "learning made the block's loss larger") && strstr(note, "a weight_lr below 1000 may help\n") &&
                  end && !end[1] : !*note, "'%s'", note);
        }
        besa_pruner_destroy(pruner);
    }
}

/* SparseGPT over the whole layer in double: w (R,C) becomes what is left of it. */
static void sparsegpt_reference(double *w, const double *u, const int32_t *dead, double target, int n, int m, int64_t R,
                                int64_t C)
{
    int64_t slab = m ? 128 / m * m : 128;
    double *err = (double *)take((size_t)(R * slab) * sizeof *err);
    for (int64_t first = 0, width; first < C; first += width) {
        width = C - first < slab ? C - first : slab;
        ref_slab(&g_ops, w, err, u, dead, first, width, target, n, m, R, C);
        for (int64_t r = 0; r < R; r++)
            for (int64_t i = 0; i < width; i++)
                for (int64_t j = first + width; j < C; j++) w[r * C + j] -= err[r * width + i] * u[(first + i) * C + j];
    }
}

/* Rows whose zeros lie elsewhere, by scores a rounding apart; the others must agree. */
static void check_sparsegpt(const float *got, const double *want, int64_t R, int64_t C, const char *what)
{
    int other = 0;
    for (int64_t r = 0; r < R; r++) {
        int differ = 0;
        for (int64_t j = 0; j < C; j++) differ |= (got[r * C + j] == 0) != (want[r * C + j] == 0);
        other += differ;
        if (!differ) CHECK_CLOSE(what, got + r * C, want + r * C, C, 2e-4);
    }
    CHECK(other <= 2, "%s: %d of %d rows lose other weights", what, other, (int)R);
}

static void test_sparsegpt(const model *m, const besa_prune_options *o)
{
    static run r;
    double *want[BESA_LAYERS];
    int64_t chunk = 0;
    size_t budget = 0;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t R = m->rows[l], C = m->columns[l];
        double fixed = fixed_rate(o, l), target = fixed < 0 ? o->rates.target : fixed;
        int32_t *dead = zeroed(C);
        want[l] = widened(weight_of(m, l), R * C);
        if (fixed != 0)
            sparsegpt_reference(want[l], factor_of(m, l, TOKENS, dead), dead, target, fixed < 0 ? o->pattern_n : 0,
                                fixed < 0 ? o->pattern_m : 0, R, C);
        forget_references();
    }
    for (; run_pruner(&r, m, o, SEQUENCES, budget); budget = r.bytes - 1) {
        chunk = r.chunk;
        for (int l = 0; l < BESA_LAYERS; l++)
            check_sparsegpt((const float *)r.pruned[l], want[l], m->rows[l], m->columns[l], besa_layer_name(l));
        check_report(&r, NULL, 0);
    }
    CHECK(chunk == 1, "the smallest pieces are of %d sequences", (int)chunk);
}

/* reference/sparsegpt through the pruner: a block whose layers q, k, v, gate and up have the reference's weight and, as their
 * input, its x. For that x is small beside the norm's epsilon, which then is all that it is divided by, and o is zero. */
static besa_block reference_block(const char *dir, float **x, int64_t *tokens)
{
    enum { R = 24, C = 256, T = 600 };
    besa_block b;
    float *w = npy_load(dir, "weight", R, C, 0).f, *norm = take_floats(C), *turn = take_floats(T * R);
    const double small = 1e-5, epsilon = 0.25;
    memset(&b, 0, sizeof b);
    g_ops.random = 3;
    b.shape.hidden_size = C, b.shape.intermediate_size = b.shape.head_dim = R, b.shape.rms_norm_eps = epsilon;
    b.shape.num_attention_heads = b.shape.num_key_value_heads = 1, b.shape.rope.theta = 10000;
    for (int j = 0; j < C; j++) norm[j] = (float)(sqrt(epsilon) / small);
    for (int l = 0; l < BESA_LAYERS; l++) b.weight[l] = w;
    b.weight[BESA_O] = take_floats(C * R), b.weight[BESA_DOWN] = random_floats(C * R, 1);
    besa_rope_table(&b.shape, T, turn, turn + T * R / 2);
    b.norm1 = b.norm2 = norm, b.rope_cos = turn, b.rope_sin = turn + T * R / 2;
    *x = (float *)copy_of(npy_load(dir, "x", T, C, 0).f, T * C * sizeof **x);
    for (int i = 0; i < T * C; i++) (*x)[i] *= (float)small;
    *tokens = T;
    return b;
}

static void test_sparsegpt_stored(const char *file, int n, int m, int64_t seqlen)
{
    char dir[512];
    float *x, *out[BESA_LAYERS];
    int64_t tokens, chunk = 0;
    besa_prune_options o;
    besa_block b;
    array want;
    snprintf(dir, sizeof dir, "%s/sparsegpt", g_reference);
    b = reference_block(dir, &x, &tokens);
    want = npy_load(dir, file, 24, 256, 0);
    memset(&o, 0, sizeof o);
    o.method = BESA_METHOD_SPARSEGPT, o.rates.target = 0.5, o.pattern_n = n, o.pattern_m = m;
    for (int l = 0; l < BESA_LAYERS; l++) out[l] = take_floats(256 * 24);
    while (chunk != 1) {
        besa_pruner *pruner = NULL;
        float *inputs = (float *)copy_of(x, (size_t)(tokens * 256) * sizeof *x);
        CHECK_OK(besa_pruner_create(&pruner, &g_be, &b.shape, BESA_F32, 0, &o, tokens / seqlen, seqlen, &g_error), g_error);
        if (!pruner) return;
        chunk = pruner->micro_batch;
        o.device_memory = size_of(pruner) - 1; /* less the next time */
        CHECK_OK(besa_pruner_run(pruner, &b, NULL, inputs, NULL, (void **)out, NULL, &g_error), g_error);
        besa_pruner_destroy(pruner);
        for (int l = 0; l < BESA_LAYERS; l++) {
            int differ = 0;
            if (l == BESA_O || l == BESA_DOWN) continue;
            for (int i = 0; i < 24 * 256; i++) differ += (out[l][i] == 0) != (want.v[i] == 0);
            CHECK(differ == 0, "%s, %s: %d weights are pruned in one and kept in the other", file, besa_layer_name(l), differ);
            CHECK_CLOSE(besa_layer_name(l), out[l], want.v, want.count, 1e-5);
        }
    }
}

/* ---- kept weights fitted anew ------------------------------------------------------------------ */

/* (w - x) H (w - x)' of a row */
static double row_error(const double *h, const float *w, const double *x, int64_t C)
{
    double sum = 0;
    for (int64_t i = 0; i < C; i++) {
        double part = 0;
        for (int64_t j = 0; j < C; j++) part += h[i * C + j] * ((double)w[j] - x[j]);
        sum += part * ((double)w[i] - x[i]);
    }
    return sum;
}

/* The least of it over the kept weights of x: H_KK x_K = (H_KK w_K + what pruned weights leave), by Cholesky's factor. */
static void solve_row(const double *h, const float *w, double *x, int64_t C)
{
    static int64_t at[INNER];
    static double a[INNER][INNER], b[INNER];
    int64_t n = 0;
    for (int64_t j = 0; j < C; j++)
        if (x[j] != 0) at[n++] = j;
    for (int64_t i = 0; i < n; i++) {
        b[i] = 0;
        for (int64_t j = 0; j < C; j++) b[i] += h[at[i] * C + j] * (double)w[j];
        for (int64_t j = 0; j <= i; j++) {
            a[i][j] = h[at[i] * C + at[j]];
            for (int64_t k = 0; k < j; k++) a[i][j] -= a[i][k] * a[j][k];
            a[i][j] = i == j ? sqrt(a[i][i]) : a[i][j] / a[j][j];
        }
        for (int64_t k = 0; k < i; k++) b[i] -= a[i][k] * b[k];
        b[i] /= a[i][i];
    }
    for (int64_t i = n - 1; i >= 0; i--) {
        for (int64_t k = i + 1; k < n; k++) b[i] -= a[k][i] * b[k];
        b[i] /= a[i][i];
        x[at[i]] = b[i];
    }
}

/* `steps` of conjugate gradients of a row, from x, preconditioned by H's diagonal. */
static void cg_row(const double *h, const float *w, double *x, int64_t C, int64_t steps)
{
    double r[INNER], p[INNER], q[INNER], rho = 0;
    for (int64_t i = 0; i < C; i++) {
        r[i] = 0;
        for (int64_t j = 0; j < C; j++) r[i] += h[i * C + j] * ((double)w[j] - x[j]);
        if (x[i] == 0) r[i] = 0;
        p[i] = r[i] / h[i * C + i], rho += r[i] * p[i];
    }
    for (int64_t s = 0; s < steps && rho > 0; s++) {
        double curved = 0, now = 0;
        for (int64_t i = 0; i < C; i++) {
            q[i] = 0;
            for (int64_t j = 0; j < C; j++) q[i] += h[i * C + j] * p[j];
            curved += p[i] * q[i];
        }
        for (int64_t i = 0; i < C; i++) {
            if (x[i] == 0) continue;
            x[i] += rho / curved * p[i], r[i] -= rho / curved * q[i];
            now += r[i] * r[i] / h[i * C + i];
        }
        for (int64_t i = 0; i < C; i++) p[i] = r[i] / h[i * C + i] + now / rho * p[i];
        rho = now;
    }
}

/* SparseGPT's update of a row for a mask that is there, column by column over the whole row. */
static void obs_row(const double *u, const float *w, double *x, int64_t C)
{
    double left[INNER];
    for (int64_t j = 0; j < C; j++) left[j] = (double)w[j];
    for (int64_t i = 0; i < C; i++) {
        double e = x[i] == 0 ? left[i] / u[i * C + i] : 0;
        if (x[i] != 0) x[i] = left[i];
        for (int64_t j = i; j < C; j++) left[j] -= e * u[i * C + j];
    }
}

enum { SOLVED = 400 };                          /* steps after which nothing moves any more */

static void check_refit(const run *r, int layer, const float *before, int64_t tokens)
{
    const model *m = r->m;
    const besa_prune_options *o = &r->options;
    int64_t R = m->rows[layer], C = m->columns[layer], steps = o->refit_steps ? o->refit_steps : 10, wrong = 0, worse = 0;
    const float *w = weight_of(m, layer), *got = (const float *)r->pruned[layer];
    double *want = widened(before, R * C), *x = widened(got, R * C), all[3] = { 0, 0, 0 };
    int32_t *dead = zeroed(C);
    double *h = hessian_of(m, layer, tokens, NULL), *u = o->refit == BESA_REFIT_OBS ? factor_of(m, layer, tokens, dead) : NULL;
    for (int64_t i = 0; i < R; i++) {
        double was = row_error(h, w + i * C, want + i * C, C), is = row_error(h, w + i * C, x + i * C, C);
        if (u) obs_row(u, w + i * C, want + i * C, C);
        else if (steps < SOLVED) cg_row(h, w + i * C, want + i * C, C, steps);
        else solve_row(h, w + i * C, want + i * C, C);
        all[0] += was, all[1] += is, all[2] += row_error(h, w + i * C, want + i * C, C);
        worse += !(is <= was * (1 + 1e-6));
    }
    for (int64_t i = 0; i < R * C; i++) wrong += (got[i] == 0) != (before[i] == 0) || (got[i] == 0 && signbit(got[i]));
    CHECK(wrong == 0, "%s: %d weights are masked otherwise", besa_layer_name(layer), (int)wrong);
    CHECK(u || worse == 0, "%s: %d rows are farther from the dense outputs", besa_layer_name(layer), (int)worse);
    CHECK(all[1] < 0.999 * all[0], "%s: the error was %g and is %g", besa_layer_name(layer), all[0], all[1]);
    CHECK(fabs(all[1] - all[2]) <= 1e-5 * all[2], "%s: the error is %.9g, expected %.9g", besa_layer_name(layer), all[1], all[2]);
    CHECK_CLOSE(besa_layer_name(layer), got, want, R * C, steps < SOLVED || u ? 5e-4 : 3e-3);
    forget_references();
}

/* Against the same run without: masks stay, and the kept weights are what plain code makes of them; with all memory there is
 * and with less. */
static void test_refit(const model *m, const besa_prune_options *o, int64_t sequences)
{
    static run plain, r;
    besa_prune_options none = *o;
    size_t budget = 0, bytes;
    none.refit = BESA_REFIT_NONE;
    for (int i = 0; i < 2; i++, budget = bytes - 1) {
        if (!run_pruner(&r, m, o, sequences, budget)) return;
        bytes = r.bytes;
        run_pruner(&plain, m, &none, sequences, 0);
        CHECK(i == 1 || r.bytes > plain.bytes, "a refit takes no memory");
        for (int l = 0; l < BESA_LAYERS; l++) {
            size_t size = (size_t)(m->rows[l] * m->columns[l]) * sizeof(float);
            if (fixed_rate(o, l) == 0) CHECK(!memcmp(r.pruned[l], weight_of(m, l), size), "%s moved", besa_layer_name(l));
            else check_refit(&r, l, (const float *)plain.pruned[l], sequences * SEQLEN);
        }
        if (!learns(o)) check_report(&r, NULL, 0);
        CHECK(r.report.loss_all < plain.report.loss_all, "a loss of %g, without %g", r.report.loss_all, plain.report.loss_all);
    }
}

/* A block whose layers gate and up have 1100 rows, in runs of 512 that are alike: so are their refits. */
static void test_refit_pieces(besa_refit refit)
{
    enum { C = 8, R = 1100, T = 16, N = 4 };
    besa_block b;
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    float *norm = take_floats(C), *turn = take_floats(T * C), *x = random_floats(N * T * C, 2), *w[BESA_LAYERS];
    void *pruned[BESA_LAYERS];
    memset(&b, 0, sizeof b);
    memset(&o, 0, sizeof o);
    b.shape.hidden_size = b.shape.head_dim = C, b.shape.intermediate_size = R, b.shape.rms_norm_eps = 1e-5;
    b.shape.num_attention_heads = b.shape.num_key_value_heads = 1, b.shape.rope.theta = 10000;
    for (int j = 0; j < C; j++) norm[j] = 1;
    besa_rope_table(&b.shape, T, turn, turn + T * C / 2);
    b.norm1 = b.norm2 = norm, b.rope_cos = turn, b.rope_sin = turn + T * C / 2;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t rows, columns;
        besa_block_layer(&b.shape, l, &rows, &columns);
        w[l] = random_floats(rows * columns, 1);
        for (int64_t i = 512 * columns; rows == R && i < rows * columns; i++) w[l][i] = w[l][i - 512 * columns];
        b.weight[l] = w[l], pruned[l] = take_floats(rows * columns);
    }
    o.method = BESA_METHOD_WANDA, o.rates.target = 0.5, o.refit = refit;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &b.shape, BESA_F32, 0, &o, N, T, &g_error), g_error);
    if (!pruner) return;
    CHECK_OK(besa_pruner_run(pruner, &b, NULL, x, NULL, pruned, NULL, &g_error), g_error);
    besa_pruner_destroy(pruner);
    for (int l = BESA_GATE; l <= BESA_UP; l++) {
        const float *p = (const float *)pruned[l];
        int moved = 0;
        for (int i = 0; i < R * C; i++) moved += p[i] != 0 && p[i] != w[l][i];
        CHECK(moved > R * C / 4, "%d weights of %s moved", moved, besa_layer_name(l));
        CHECK(!memcmp(p, p + 512 * C, (R - 512) * C * sizeof *p), "like rows of %s differ", besa_layer_name(l));
    }
}

static besa_prune_options learning_options(int64_t batch_size)
{
    besa_prune_options o;
    memset(&o, 0, sizeof o);
    o.rates.target = 0.47, o.rates.candidates = CANDIDATES - 1, o.epochs = 1, o.batch_size = batch_size;
    return o;
}

static void test_refits(const model *m)
{
    static const besa_fixed_rate fixed[] = { { "k_proj", 0.23 }, { "v_proj", 0 }, { "gate_proj", 0.6 } };
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    memset(&o, 0, sizeof o);
    o.method = BESA_METHOD_WANDA, o.rates.target = 0.5, o.refit = BESA_REFIT_OBS;
    TEST("refit obs by wanda's mask") test_refit(m, &o, SEQUENCES);
    o.refit = BESA_REFIT_CG;
    TEST("refit cg by wanda's mask") test_refit(m, &o, SEQUENCES);
    o.refit_steps = SOLVED;
    TEST("refit cg to the end: the least squares' solution") test_refit(m, &o, SEQUENCES);
    o.refit_steps = 3, o.method = BESA_METHOD_MAGNITUDE, o.fixed = fixed, o.num_fixed = 3;
    TEST("refit cg by magnitude's mask, three steps, fixed layers") test_refit(m, &o, 7);
    o.refit = BESA_REFIT_OBS, o.rates.target = 0, o.pattern_n = 1, o.pattern_m = 3;
    TEST("refit obs by magnitude's mask, 1:3, fixed layers") test_refit(m, &o, 7);
    o.refit = BESA_REFIT_CG, o.method = BESA_METHOD_SPARSEGPT;
    TEST("refit cg of sparsegpt's weights, 1:3, fixed layers") test_refit(m, &o, SEQUENCES);
    for (int refit = BESA_REFIT_OBS; refit <= BESA_REFIT_CG; refit++) {
        o = learning_options(4);
        o.rates.penalty = 0.02, o.refit = (besa_refit)refit, o.fixed = fixed, o.num_fixed = 3;
        TEST(refit == BESA_REFIT_CG ? "refit cg by learned masks" : "refit obs by learned masks") test_refit(m, &o, SEQUENCES);
        o.importance = BESA_IMPORTANCE_SPARSEGPT;
        TEST(refit == BESA_REFIT_CG ? "refit cg by learned masks, sparsegpt's scores" : "refit obs by learned masks, sparsegpt's scores")
            test_refit(m, &o, SEQUENCES);
        TEST(refit == BESA_REFIT_CG ? "refit cg in pieces" : "refit obs in pieces") test_refit_pieces((besa_refit)refit);
    }
    TEST("refits that are refused") {
        o = learning_options(1);
        o.refit = BESA_REFIT_CG, o.learn = BESA_LEARN_BOTH;
        CHECK(besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &o, SEQUENCES, SEQLEN, &g_error) == BESA_ERROR_OPTION &&
              !pruner && strstr(g_error.message, "learn both"), "%s", g_error.message);
        o.refit = BESA_REFIT_OBS, o.learn = BESA_LEARN_RATES, o.method = BESA_METHOD_SPARSEGPT;
        CHECK(besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &o, SEQUENCES, SEQLEN, &g_error) == BESA_ERROR_OPTION &&
              !pruner && strstr(g_error.message, "sparsegpt does by itself"), "%s", g_error.message);
    }
}

/* ---- seconds --------------------------------------------------------------------------------- */

static const long g_pause[BESA_PASS_COUNT] = { 0, 25, 10, 20, 30, 15, 0 }; /* milliseconds, of each pass another number */
static int g_paused[BESA_PASS_COUNT];

static int pause_once(void *user, const besa_progress *now)
{
    struct timespec t = { 0, 1000000 * g_pause[now->pass] };
    (void)user;
    if (!g_paused[now->pass]++) nanosleep(&t, NULL);
    return 0;
}

/* A pass takes no less than the pause in it, all passes together no more than the call and most of it. */
static void test_seconds(const model *m, besa_method method)
{
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    besa_block_report report;
    float *x = (float *)copy_of(m->x, (size_t)(TOKENS * WIDTH) * sizeof(float));
    void *pruned[BESA_LAYERS];
    double wall, sum = 0;
    memset(&o, 0, sizeof o);
    memset(g_paused, 0, sizeof g_paused);
    o.rates.target = 0.5, o.method = method, o.progress = pause_once, o.weight_epochs = 1;
    o.learn = method == BESA_METHOD_WANDA ? BESA_LEARN_WEIGHTS : BESA_LEARN_RATES;
    for (int l = 0; l < BESA_LAYERS; l++) pruned[l] = take_floats(m->rows[l] * m->columns[l]);
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &o, SEQUENCES, SEQLEN, &g_error), g_error);
    if (!pruner) return;
    wall = ops_now();
    CHECK_OK(besa_pruner_run(pruner, &m->block, NULL, x, NULL, pruned, &report, &g_error), g_error);
    wall = ops_now() - wall;
    besa_pruner_destroy(pruner);
    for (int i = 0; i < BESA_PASS_COUNT; i++) {
        double least = g_paused[i] ? 1e-3 * (double)g_pause[i] : 0;
        sum += report.seconds[i];
        CHECK(report.seconds[i] >= least, "pass %d took %g s, with a pause of %g", i, report.seconds[i], least);
        CHECK(i != BESA_PASS_WEIGHTS || (g_paused[i] > 0) == (o.learn == BESA_LEARN_WEIGHTS), "method %d learns weights", (int)method);
        CHECK(i != BESA_PASS_LEARN || (g_paused[i] > 0) == (method == BESA_METHOD_BESA), "method %d learns", (int)method);
    }
    CHECK(report.seconds[BESA_PASS_READ] == 0 && report.seconds[BESA_PASS_WRITE] == 0, "the pruner reads no files");
    CHECK(sum <= wall && sum > 0.5 * wall, "passes of %g s in a call of %g", sum, wall);
}

/* ---- one block after another ----------------------------------------------------------------- */

/* A pruner's second block gives what its first did: nothing of that one is left. BESA learns nothing here, so that the
 * counts that the first block ended with are those that the second one's learning begins with. */
static void test_twice(const model *m, besa_method method, besa_learn learn, besa_refit refit, int vectors)
{
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    besa_block_report report[2];
    void *pruned[2][BESA_LAYERS];
    float *x[2];
    memset(&o, 0, sizeof o);
    o.method = method, o.rates.target = 0.4, o.rates.zero_start = 1, o.no_projection = 1, o.rates.d0 = 1e-12;
    o.learn = learn, o.weight_epochs = 1, o.refit = refit, o.learn_vectors = vectors;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &o, SEQUENCES, SEQLEN, &g_error), g_error);
    if (!pruner) return;
    for (int i = 0; i < 2; i++) {
        x[i] = (float *)copy_of(m->x, (size_t)(TOKENS * WIDTH) * sizeof(float));
        memset(&report[i], 0x5A + i, sizeof report[i]); /* whatever was there */
        for (int l = 0; l < BESA_LAYERS; l++) pruned[i][l] = take_floats(m->rows[l] * m->columns[l]);
        CHECK_OK(besa_pruner_run(pruner, &m->block, NULL, x[i], NULL, pruned[i], &report[i], &g_error), g_error);
        memset(report[i].seconds, 0, sizeof report[i].seconds);
    }
    besa_pruner_destroy(pruner);
    CHECK(!memcmp(x[0], x[1], (size_t)(TOKENS * WIDTH) * sizeof(float)), "other outputs the second time");
    CHECK(!memcmp(&report[0], &report[1], sizeof report[0]), "another report: losses %g %g %g, then %g %g %g",
          report[0].loss_uniform, report[0].loss_before, report[0].loss_after, report[1].loss_uniform,
          report[1].loss_before, report[1].loss_after);
    for (int l = 0; l < BESA_LAYERS; l++)
        CHECK(!memcmp(pruned[0][l], pruned[1][l], (size_t)(m->rows[l] * m->columns[l]) * sizeof(float)),
              "%s: other weights the second time", besa_layer_name(l));
}

/* A block is pruned as if it were the first, whatever learned in the one before it: there a bias that stays in this one. */
static void test_after_another(const model *m)
{
    static const besa_fixed_rate fixed[] = { { "layers.1.self_attn.q_proj", 0 } };
    besa_prune_options o;
    float *x[2];
    memset(&o, 0, sizeof o);
    o.rates.target = 0.4, o.learn = BESA_LEARN_WEIGHTS, o.weight_epochs = 1, o.learn_vectors = 1, o.fixed = fixed, o.num_fixed = 1;
    for (int i = 0; i < 2; i++) {
        besa_pruner *pruner = NULL;
        CHECK_OK(besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &o, SEQUENCES, SEQLEN, &g_error), g_error);
        for (int block = i; pruner && block < 2; block++) {
            void *pruned[BESA_LAYERS];
            for (int l = 0; l < BESA_LAYERS; l++) pruned[l] = take_floats(m->rows[l] * m->columns[l]);
            x[i] = (float *)copy_of(m->x, (size_t)(TOKENS * WIDTH) * sizeof(float));
            CHECK_OK(besa_pruner_run(pruner, &m->block, block ? "model.layers.1." : "model.layers.0.", x[i], NULL, pruned, NULL, &g_error),
                     g_error);
        }
        besa_pruner_destroy(pruner);
    }
    CHECK(!memcmp(x[0], x[1], (size_t)(TOKENS * WIDTH) * sizeof(float)), "other outputs after another block");
}

/* ---- the list -------------------------------------------------------------------------------- */

static void test_learn(const model *m)
{
    static const besa_fixed_rate fixed[] = { { "k_proj", 0.23 }, { "v_proj", 0 }, { "down_proj", 0.6 } };
    besa_prune_options o = learning_options(1);
    o.rates.penalty = 0.02;
    TEST("learning, a sequence a step") test_learning(m, &o, SEQUENCES);
    o = learning_options(4);
    o.rates.group_rows = 5, o.rates.penalty = 0.05, o.rates.zero_start = 1, o.epochs = 2, o.norm_all = 1;
    TEST("learning, batches of 4, groups of 5 rows, norms of all") test_learning(m, &o, SEQUENCES);
    o = learning_options(3);
    o.rates.zero_start = 1, o.rates.form = BESA_RATES_ROW, o.rates.plain_softmax = 1, o.rates.penalty = BESA_NONE;
    o.importance = BESA_IMPORTANCE_MAGNITUDE;
    TEST("learning, batches of 3, rows alone, plain softmax") test_learning(m, &o, SEQUENCES);
    o = learning_options(5);
    o.rates.zero_start = 1, o.rates.form = BESA_RATES_LAYER, o.rates.layer_scale = 3, o.dense_stream = 1;
    o.importance = BESA_IMPORTANCE_SPARSEGPT;
    TEST("learning, batches of 5, a rate a layer, the dense stream") test_learning(m, &o, SEQUENCES);
    o = learning_options(7);
    o.fixed = fixed, o.num_fixed = 3, o.rates.target = 0.71, o.no_projection = 1, o.rates.group_rows = BESA_ALL_ROWS;
    o.rates.row_scale = 0.5, o.importance = BESA_IMPORTANCE_SPARSEGPT_SQUARED;
    TEST("learning, one batch of 7, fixed layers, no projection") test_learning(m, &o, 7);
    o.batch_size = 3, o.num_fixed = 2, o.no_projection = 0, o.importance = BESA_IMPORTANCE_GRADIENT;
    TEST("learning, batches of 3, by scores that see the loss") test_learning(m, &o, SEQUENCES);
    o.importance = BESA_IMPORTANCE_RELATIVE;
    TEST("learning, batches of 3, by scores relative to row and column") test_learning(m, &o, SEQUENCES);
}

static void test_parts(const model *m)
{
    static const besa_fixed_rate fixed[] = { { "k_proj", 0.23 }, { "v_proj", 0 }, { "down_proj", 0.6 } };
    besa_prune_options o = learning_options(1);
    o.rates.penalty = 0.02, o.granularity = BESA_GRANULARITY_ATTN_MLP;
    TEST("learning of attention and MLP, a sequence a step") test_learning(m, &o, SEQUENCES);
    o.granularity = BESA_GRANULARITY_LAYER;
    TEST("learning of layers, a sequence a step") test_learning(m, &o, SEQUENCES);
    o.whole_target = 1;
    TEST("learning of layers, a target for all") test_learning(m, &o, SEQUENCES);
    o = learning_options(4);
    o.rates.penalty = 0.05, o.norm_all = 1, o.granularity = BESA_GRANULARITY_LAYER, o.fixed = fixed, o.num_fixed = 3;
    o.rates.target = 0.43;
    TEST("learning of layers, batches of 4, fixed layers, norms of all") test_learning(m, &o, SEQUENCES);
    o.granularity = BESA_GRANULARITY_ATTN_MLP, o.learn = BESA_LEARN_BOTH, o.weight_epochs = 1, o.learn_vectors = 1;
    TEST("rates and weights of attention and MLP, batches of 4, fixed layers") test_weights(m, &o, SEQUENCES);
    o.granularity = BESA_GRANULARITY_LAYER, o.norm_all = 0, o.num_fixed = 0, o.batch_size = 3, o.learn_vectors = 0;
    TEST("rates and weights of layers, batches of 3") test_weights(m, &o, 7);
}

/* What is for whole models is refused, not ignored. */
static void test_whole_models(const model *m)
{
    static const char *const word[] = { "first_block", "first_block", "depth_slope", "block_targets", "masks" };
    static const double targets[] = { 0.5 };
    for (int i = 0; i < 5; i++) {
        besa_prune_options o;
        besa_pruner *pruner = NULL;
        memset(&o, 0, sizeof o);
        o.rates.target = 0.5;
        if (i == 0) o.first_block = 1;
        if (i == 1) o.num_blocks = 1;
        if (i == 2) o.depth_slope = 0.1;
        if (i == 3) o.block_targets = targets, o.num_block_targets = 1;
        if (i == 4) o.masks = (const besa_checkpoint *)(const void *)m; /* which nobody looks at */
        g_error.message[0] = 0;
        CHECK(besa_pruner_create(&pruner, &g_be, &m->block.shape, BESA_F32, 0, &o, SEQUENCES, SEQLEN, &g_error) == BESA_ERROR_OPTION &&
              !pruner && strstr(g_error.message, word[i]), "%s: \"%s\"", word[i], g_error.message);
    }
}

static void test_moving(const model *m)
{
    static const besa_fixed_rate query[] = { { "q_proj", 0 } };
    static const besa_fixed_rate fixed[] = { { "k_proj", 0.23 }, { "v_proj", 0 }, { "down_proj", 0.6 } };
    besa_prune_options o = learning_options(1);
    o.learn = BESA_LEARN_BOTH, o.weight_epochs = 1;
    TEST("rates and weights, a sequence a step") test_weights(m, &o, SEQUENCES);
    o = learning_options(4);
    o.learn = BESA_LEARN_BOTH, o.weight_epochs = 2, o.weight_lr = 0.5, o.weight_warmup = 0.5, o.dense_share = 0.25;
    o.fixed = fixed, o.num_fixed = 3, o.norm_all = 1, o.rank_interval = 2;
    TEST("rates and weights, batches of 4, fixed layers, a mixed reference") test_weights(m, &o, SEQUENCES);
    o.learn = BESA_LEARN_BOTH, o.epochs = 2, o.weight_epochs = 1, o.rank_interval = BESA_NONE, o.importance = BESA_IMPORTANCE_SPARSEGPT;
    TEST("rates and weights, two epochs by the dense weights' ranks") test_weights(m, &o, SEQUENCES);
    o.rank_interval = 3;
    TEST("rates and weights, ranked anew by SparseGPT's scores") test_weights(m, &o, SEQUENCES);
    o.importance = BESA_IMPORTANCE_WANDA, o.epochs = 1, o.rank_interval = 0, o.weight_epochs = 2;
    o.learn = BESA_LEARN_WEIGHTS, o.batch_size = 3, o.dense_share = 0, o.dense_stream = 1;
    TEST("rates, then weights, batches of 3, the dense stream") test_weights(m, &o, SEQUENCES);
    memset(&o, 0, sizeof o);
    o.learn = BESA_LEARN_WEIGHTS, o.method = BESA_METHOD_WANDA, o.rates.target = 0.37, o.dense_share = 0.5;
    TEST("weights by wanda's mask") test_weights(m, &o, 5);
    o.method = BESA_METHOD_MAGNITUDE, o.batch_size = 2, o.weight_epochs = 1, o.rates.target = 0, o.pattern_n = 2, o.pattern_m = 3;
    TEST("weights by magnitude, 2:3, batches of 2") test_weights(m, &o, 5);
    o.learn_vectors = 1;
    TEST("norms and biases with weights by magnitude, 2:3, batches of 2") test_weights(m, &o, 5);
    o = learning_options(4);
    o.learn = BESA_LEARN_BOTH, o.weight_epochs = 1, o.weight_warmup = 0.5, o.dense_share = 0.25, o.learn_vectors = 1;
    o.fixed = fixed, o.num_fixed = 3;
    TEST("norms, biases, rates and weights, batches of 4, fixed layers") test_weights(m, &o, SEQUENCES);
    o.learn = BESA_LEARN_WEIGHTS, o.batch_size = 3, o.fixed = query, o.num_fixed = 1;
    TEST("rates, then norms and weights, a bias that stays") test_weights(m, &o, SEQUENCES);
}

static void test_moving_patterns(const model *m)
{
    static const besa_fixed_rate fixed[] = { { "k_proj", 0.23 }, { "v_proj", 0 }, { "down_proj", 0.6 } };
    besa_prune_options o;
    memset(&o, 0, sizeof o);
    o.learn = BESA_LEARN_BOTH, o.pattern_n = 1, o.pattern_m = 3, o.weight_epochs = 1;
    TEST("weights and their masks by a pattern, 1:3, a sequence a step") test_weights(m, &o, SEQUENCES);
    o.pattern_n = 2, o.batch_size = 4, o.epochs = 2, o.rank_interval = 2, o.dense_share = 0.5, o.learn_vectors = 1;
    o.fixed = fixed, o.num_fixed = 3, o.importance = BESA_IMPORTANCE_SPARSEGPT;
    TEST("weights and their masks by a pattern, 2:3, batches of 4, fixed layers") test_weights(m, &o, SEQUENCES);
    o.rank_interval = BESA_NONE, o.num_fixed = 0, o.epochs = 1, o.learn_vectors = 0;
    TEST("weights with the dense weights' masks by a pattern, 2:3") test_weights(m, &o, 6);
    o.learn = BESA_LEARN_WEIGHTS, o.epochs = 0, o.rank_interval = 0, o.importance = BESA_IMPORTANCE_GRADIENT;
    TEST("weights by a pattern of scores that see the loss") test_weights(m, &o, SEQUENCES);
}

static void test_grids(const model *m)
{
    static const besa_fixed_rate fixed[] = { { "k_proj", 0.23 }, { "v_proj", 0 }, { "down_proj", 0.6 } };
    besa_prune_options o = learning_options(1);
    o.bits = 4, o.clipping = BESA_CLIPPING_LEARNED, o.clip_lr = 0.3;
    TEST("rates and clips, a sequence a step") test_quantized(m, &o, SEQUENCES);
    o = learning_options(4);
    o.bits = 3, o.clipping = BESA_CLIPPING_LEARNED, o.clip_lr = 0.1, o.group_size = 33, o.fixed = fixed, o.num_fixed = 3, o.epochs = 2;
    TEST("rates and clips, batches of 4, groups, fixed layers") test_quantized(m, &o, SEQUENCES);
    o.clipping = BESA_CLIPPING_NONE;
    TEST("rates of quantised weights") test_quantized(m, &o, SEQUENCES);
    o = learning_options(2);
    o.method = BESA_METHOD_WANDA, o.bits = 5, o.clipping = BESA_CLIPPING_LEARNED, o.clip_lr = 0.2, o.num_fixed = 0;
    TEST("clips by wanda's mask") test_quantized(m, &o, 5);
    o.clipping = BESA_CLIPPING_NONE, o.fixed = fixed, o.num_fixed = 3, o.group_size = 10, o.bits = 2;
    TEST("wanda, then the nearest level") test_quantized(m, &o, SEQUENCES);
}

static void test_moving_grids(const model *m)
{
    static const besa_fixed_rate fixed[] = { { "k_proj", 0.23 }, { "v_proj", 0 }, { "down_proj", 0.6 } };
    besa_prune_options o = learning_options(1);
    o.learn = BESA_LEARN_BOTH, o.weight_epochs = 1, o.bits = 4, o.clip_lr = 0.3;
    TEST("rates, weights and clips, a sequence a step") test_weights(m, &o, SEQUENCES);
    o = learning_options(4);
    o.learn = BESA_LEARN_BOTH, o.weight_epochs = 1, o.bits = 3, o.clip_lr = 0.1, o.group_size = 33, o.rank_interval = 2;
    o.fixed = fixed, o.num_fixed = 3, o.dense_share = 0.5, o.learn_vectors = 1;
    TEST("rates, weights, norms and clips, batches of 4, groups, fixed layers") test_weights(m, &o, SEQUENCES);
    o.quantize_first = 1;
    TEST("the same on grids from the first step on") test_weights(m, &o, SEQUENCES);
    o.quantize_first = 0;
    o.clipping = BESA_CLIPPING_NONE, o.learn = BESA_LEARN_WEIGHTS, o.learn_vectors = 0;
    TEST("rates, then weights, on grids that stay") test_weights(m, &o, SEQUENCES);
    memset(&o, 0, sizeof o);
    o.method = BESA_METHOD_WANDA, o.rates.target = 0.37, o.learn = BESA_LEARN_WEIGHTS, o.batch_size = 2, o.bits = 5, o.clip_lr = 0.2;
    TEST("weights and clips by wanda's mask") test_weights(m, &o, 5);
    o.method = BESA_METHOD_BESA, o.rates.target = 0, o.pattern_n = 2, o.pattern_m = 3, o.learn = BESA_LEARN_BOTH, o.weight_epochs = 1;
    TEST("weights, their masks by a pattern and clips, 2:3") test_weights(m, &o, SEQUENCES);
}

static void test_others(const model *m)
{
    static const besa_fixed_rate fixed[] = { { "k_proj", 0.23 }, { "v_proj", 0 }, { "gate_proj", 0.6 } };
    besa_prune_options o;
    memset(&o, 0, sizeof o);
    o.method = BESA_METHOD_WANDA, o.rates.target = 0.37, o.norm_all = 1;
    TEST("wanda, 37 %") test_baseline(m, &o, SEQUENCES);
    o.fixed = fixed, o.num_fixed = 3, o.rates.target = 0, o.pattern_n = 1, o.pattern_m = 3, o.norm_all = 0;
    TEST("wanda, 1:3, fixed layers") test_baseline(m, &o, 6);
    o.method = BESA_METHOD_MAGNITUDE;
    TEST("magnitude, 1:3, fixed layers") test_baseline(m, &o, 3);
    o.pattern_n = o.pattern_m = 0, o.rates.target = 0.6181;
    TEST("magnitude, 61.81 % of a layer, fixed layers") test_baseline(m, &o, SEQUENCES);
    o.magnitude_per_row = 1;
    TEST("magnitude, 61.81 % of a row, fixed layers") test_baseline(m, &o, SEQUENCES);
    o.method = BESA_METHOD_SPARSEGPT;
    TEST("sparsegpt, 61.81 %, fixed layers, a dead column") test_sparsegpt(m, &o);
    o.num_fixed = 0, o.rates.target = 0, o.pattern_n = 1, o.pattern_m = 3;
    TEST("sparsegpt, 1:3, a dead column whose 1 decides the damping of small ones") {
        model small = new_model(0.05f);
        test_sparsegpt(&small, &o);
    }
    TEST("layers by themselves, every method") test_layer_methods(m);
    TEST("arguments of a layer by itself") test_layer_arguments(m);
    TEST("what a pruner has to say") test_pruner_notes(m);
}

int main(int argc, char **argv)
{
    static const char *const seconds[] = { "seconds of besa's passes", "seconds of wanda's passes", "seconds of sparsegpt's passes",
                                           "seconds of magnitude's passes" };
    static const char *const twice[] = { "the same block twice, besa", "the same block twice, wanda", "the same block twice, sparsegpt",
                                         "the same block twice, magnitude" };
    besa_cpu_options one = { 2, 0 };
    model m;
    if (argc < 2) return fprintf(stderr, "usage: %s REFERENCE_DIRECTORY [part of a test's name]\n", argv[0]), 2;
    g_reference = argv[1];
    test.only = argc > 2 ? argv[2] : NULL;
    if (besa_cpu_backend(&g_be, &one, &g_error) != BESA_OK) return fprintf(stderr, "%s\n", g_error.message), 1;
    g_ops.be = &g_be;
    m = new_model(1);
    test_learn(&m);
    test_parts(&m);
    test_moving(&m);
    test_moving_patterns(&m);
    test_grids(&m);
    test_moving_grids(&m);
    TEST("options of whole models") test_whole_models(&m);
    test_optimizers();
    test_others(&m);
    test_refits(&m);
    TEST("sparsegpt as stored, 50 %") test_sparsegpt_stored("pruned_50", 0, 0, 120);
    TEST("sparsegpt as stored, 2:4") test_sparsegpt_stored("pruned_2of4", 2, 4, 75);
    TEST("sparsegpt as stored, 4:8") test_sparsegpt_stored("pruned_4of8", 4, 8, 40);
    for (int i = BESA_METHOD_BESA; i <= BESA_METHOD_MAGNITUDE; i++) TEST(seconds[i]) test_seconds(&m, (besa_method)i);
    for (int i = BESA_METHOD_BESA; i <= BESA_METHOD_MAGNITUDE; i++) TEST(twice[i]) test_twice(&m, (besa_method)i, BESA_LEARN_RATES, BESA_REFIT_NONE, 0);
    TEST("the same block twice, rates and weights") test_twice(&m, BESA_METHOD_BESA, BESA_LEARN_BOTH, BESA_REFIT_NONE, 0);
    TEST("the same block twice, wanda's weights") test_twice(&m, BESA_METHOD_WANDA, BESA_LEARN_WEIGHTS, BESA_REFIT_NONE, 0);
    TEST("the same block twice, norms and biases too") test_twice(&m, BESA_METHOD_BESA, BESA_LEARN_BOTH, BESA_REFIT_NONE, 1);
    TEST("a block after another, where a bias learned that stays") test_after_another(&m);
    TEST("the same block twice, sparsegpt and cg") test_twice(&m, BESA_METHOD_SPARSEGPT, BESA_LEARN_RATES, BESA_REFIT_CG, 0);
    TEST("the same block twice, wanda, obs and weights") test_twice(&m, BESA_METHOD_WANDA, BESA_LEARN_WEIGHTS, BESA_REFIT_OBS, 0);
    TEST("the same block twice, besa, cg and weights") test_twice(&m, BESA_METHOD_BESA, BESA_LEARN_WEIGHTS, BESA_REFIT_CG, 0);
    g_be.destroy(&g_be);
    return test_finish();
}
