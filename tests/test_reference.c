/* test_reference - the library against arrays computed by independent PyTorch code (data/reference/README.md).
 *
 *     test_reference REFERENCE_DIRECTORY [part of a test's name]
 *
 * Tolerances are about ten times the error measured with gcc and clang on x86-64, as a fraction of the largest
 * element; TEST_VERBOSE=1 prints what is measured. The CPU backend is the one under test: device pointers are host
 * pointers here. */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "test.h"

static const char *g_cases, *g_reference;                 /* the directory */
static besa_backend g_be;
static besa_error g_error;

static const char *folder(const char *name)
{
    static char path[4][512];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", g_reference, name);
    return path[turn];
}

/* The workspace for what follows; it only grows. A pruner or besa_logits set their own, hence the assignment. */
static void set_workspace(besa_workload w)
{
    static void *memory;
    static size_t bytes;
    size_t wanted = g_be.workspace_size(&g_be, &w);
    if (wanted > bytes) memory = take((bytes = wanted) + 256);
    g_be.workspace = (void *)(((uintptr_t)memory + 255) & ~(uintptr_t)255);
    g_be.workspace_bytes = bytes;
}

#define OP(call) CHECK((call) == BESA_OK, "%s: %s", #call, g_be.error.message)

/* ---- blocks ---------------------------------------------------------------------------------- */

static const char *const g_layer[BESA_LAYERS] = { "q", "k", "v", "o", "gate", "up", "down" };

/* The block of one folder: weights as floats, sizes from its shape.json. */
static besa_block read_block(const char *directory, int64_t seqlen)
{
    besa_block b;
    besa_block_shape *s = &b.shape;
    char name[32];
    float *cosine, *sine;
    array a;
    memset(&b, 0, sizeof b);
    s->hidden_size = (int64_t)json_number(directory, "shape.json", "hidden_size");
    s->intermediate_size = (int64_t)json_number(directory, "shape.json", "intermediate_size");
    s->num_attention_heads = (int64_t)json_number(directory, "shape.json", "num_attention_heads");
    s->num_key_value_heads = (int64_t)json_number(directory, "shape.json", "num_key_value_heads");
    s->head_dim = (int64_t)json_number(directory, "shape.json", "head_dim");
    s->rms_norm_eps = json_number(directory, "shape.json", "rms_norm_eps");
    s->rope.theta = json_number(directory, "shape.json", "rope_theta");
    if (strstr(directory, "block_"))
        s->sliding_window = (int64_t)json_number(directory, "shape.json", "sliding_window");
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t rows, columns;
        besa_block_layer(s, l, &rows, &columns);
        snprintf(name, sizeof name, "w_%s", g_layer[l]);
        b.weight[l] = npy_load(directory, name, rows, columns, 0).f;
        snprintf(name, sizeof name, "bias_%s", g_layer[l]);
        a = npy_read(directory, name);
        b.bias[l] = a.f;
    }
    b.norm1 = npy_load(directory, "norm1", s->hidden_size, 0, 0).f;
    b.norm2 = npy_load(directory, "norm2", s->hidden_size, 0, 0).f;
    b.q_norm = npy_read(directory, "q_norm").f;
    b.k_norm = npy_read(directory, "k_norm").f;
    cosine = take_floats(seqlen * s->head_dim / 2);
    sine = take_floats(seqlen * s->head_dim / 2);
    besa_rope_table(s, seqlen, cosine, sine);
    b.rope_cos = cosine;
    b.rope_sin = sine;
    return b;
}

static besa_activations new_activations(const besa_block *b, int64_t tokens)
{
    besa_activations acts;
    size_t bytes = besa_activations_size(&g_be, &b->shape, b->q_norm != NULL, tokens, 1);
    besa_activations_init(&acts, take(bytes + 256), &g_be, &b->shape, b->q_norm != NULL, tokens, 1);
    return acts;
}

struct gradients { const char *directory; const besa_block *block; int seen; };

/* Compare each layer's gradient with grad_<layer>, as the backward pass hands it out. */
static besa_result compare_gradient(void *user, int layer, int64_t first, int64_t count, const void *gradient)
{
    const float *dw = (const float *)gradient;
    struct gradients *g = (struct gradients *)user;
    int64_t rows, columns;
    char name[32];
    array want;
    besa_block_layer(&g->block->shape, layer, &rows, &columns);
    snprintf(name, sizeof name, "grad_%s", g_layer[layer]);
    want = npy_load(g->directory, name, rows, columns, 0);
    CHECK(first == 0 && count == rows, "layer %d comes in pieces", layer);
    CHECK_CLOSE(name, dw, want.v, want.count, 1e-5);
    g->seen |= 1 << layer;
    return BESA_OK;
}

/* Forward pass, every activation, the loss, its gradient at every weight and at the input. */
static void test_block(const char *name)
{
    const char *dir = folder(name);
    int64_t batch = (int64_t)json_number(dir, "shape.json", "batch");
    int64_t seqlen = (int64_t)json_number(dir, "shape.json", "seqlen"), tokens = batch * seqlen;
    besa_block b = read_block(dir, seqlen);
    int64_t d = b.shape.hidden_size, attention = b.shape.num_attention_heads * b.shape.head_dim;
    besa_activations acts = new_activations(&b, tokens);
    array h = npy_load(dir, "h", batch, seqlen, d), yref = npy_load(dir, "yref", batch, seqlen, d);
    array loss = npy_load(dir, "loss", 1, 0, 0);
    float *y = take_floats(tokens * d), *dy = take_floats(tokens * d), *dx = take_floats(tokens * d);
    float *norm2 = take_floats(d), *got_loss = take_floats(1);
    struct { const char *name; const void *got; int64_t width; } act[5];
    struct gradients g;
    act[0].name = "act_a", act[0].got = acts.a, act[0].width = d;
    act[1].name = "act_attn", act[1].got = acts.attn, act[1].width = attention;
    act[2].name = "act_h1", act[2].got = acts.h1, act[2].width = d;
    act[3].name = "act_m", act[3].got = acts.m, act[3].width = d;
    act[4].name = "act_z", act[4].got = acts.z, act[4].width = b.shape.intermediate_size;
    g.directory = dir, g.block = &b, g.seen = 0;

    set_workspace(besa_block_workload(&b.shape, batch, seqlen));
    CHECK_OK(besa_block_forward(&g_be, &b, &acts, h.f, y, batch, seqlen, &g_error), g_error);
    CHECK_CLOSE("y", y, npy_load(dir, "y", batch, seqlen, d).v, tokens * d, 1e-5);
    for (int i = 0; i < 5; i++)
        CHECK_CLOSE(act[i].name, (const float *)act[i].got, npy_load(dir, act[i].name, batch, seqlen, act[i].width).v,
                    tokens * act[i].width, 1e-5);

    OP(g_be.column_sumsq(&g_be, norm2, yref.f, tokens, d));
    OP(g_be.block_loss(&g_be, got_loss, dy, y, yref.f, norm2, 1.0f, tokens, d, 0));
    CHECK_CLOSE("loss", got_loss, loss.v, 1, 1e-5);
    CHECK_OK(besa_block_backward(&g_be, &b, &acts, h.f, dy, dx, batch, seqlen, compare_gradient, &g, &g_error), g_error);
    CHECK(g.seen == 127, "gradients of layers %x only", (unsigned)g.seen);
    CHECK_CLOSE("grad_h", dx, npy_load(dir, "grad_h", batch, seqlen, d).v, tokens * d, 1e-5);
}

static double *random_numbers(int64_t n)
{
    static uint32_t state = 12345;
    double *x = (double *)take((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (double)(state >> 8) / 8388608.0 - 1;
    }
    return x;
}

/* A loss of its own at h1: <c, h1> + half the squares of h1 over batch. Adds its derivative. */
typedef struct h1_loss {
    const float *c;
    const besa_activations *acts;
    int64_t count;
    int calls;
} h1_loss;

static besa_result add_h1_loss(void *user, void *dh1)
{
    h1_loss *loss = (h1_loss *)user;
    const float *h1 = (const float *)loss->acts->h1;
    for (int64_t i = 0; i < loss->count; i++) ((float *)dh1)[i] += loss->c[i] + h1[i];
    loss->calls++;
    return BESA_OK;
}

static double value_of_h1_loss(const h1_loss *loss)
{
    const float *h1 = (const float *)loss->acts->h1;
    double sum = 0;
    for (int64_t i = 0; i < loss->count; i++) sum += (double)loss->c[i] * (double)h1[i] + 0.5 * (double)h1[i] * (double)h1[i];
    return sum;
}

/* Gradients that are added up over two batches by the caller's arrays, and a second loss at h1: against finite differences
 * of it along one random direction of every weight. */
static void test_second_loss(const char *name)
{
    const char *dir = folder(name);
    int64_t batch = (int64_t)json_number(dir, "shape.json", "batch"), seqlen = (int64_t)json_number(dir, "shape.json", "seqlen");
    besa_block b = read_block(dir, seqlen);
    int64_t tokens = batch * seqlen, d = b.shape.hidden_size;
    besa_activations acts = new_activations(&b, tokens);
    array h = npy_load(dir, "h", batch, seqlen, d);
    float *y = take_floats(tokens * d), *dy = take_floats(tokens * d);
    double *c = random_numbers(tokens * d);
    float *cf = take_floats(tokens * d);
    h1_loss loss = {cf, &acts, tokens * d, 0};
    for (int64_t i = 0; i < tokens * d; i++) cf[i] = (float)c[i];
    set_workspace(besa_block_workload(&b.shape, batch, seqlen));
    besa__backward p = besa__backward_of(&g_be, &b, &acts, seqlen);
    besa__backward_batch(&p, batch);
    p.at_h1 = add_h1_loss;
    p.user = &loss;
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t rows, columns;
        besa_block_layer(&b.shape, l, &rows, &columns);
        acts.dw_sum[l] = take_floats(rows * columns);
    }
    for (int twice = 0; twice < 2; twice++) {
        CHECK_OK(besa_block_forward(&g_be, &b, &acts, h.f, y, batch, seqlen, &g_error), g_error);
        memset(dy, 0, (size_t)(tokens * d) * sizeof *dy); /* no loss at the block's output */
        OP(besa__block_backward(&p, h.f, dy, NULL));
    }
    CHECK(loss.calls == 2, "%d calls", loss.calls);
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t rows, columns;
        const void *weight = b.weight[l];
        double want = 0, value[2];
        besa_block_layer(&b.shape, l, &rows, &columns);
        double *direction = random_numbers(rows * columns);
        for (int64_t i = 0; i < rows * columns; i++) want += 0.5 * (double)acts.dw_sum[l][i] * direction[i];
        for (int side = 0; side < 2; side++) {
            float *moved = take_floats(rows * columns);
            for (int64_t i = 0; i < rows * columns; i++)
                moved[i] = ((const float *)weight)[i] + (float)((side ? 1e-3 : -1e-3) * direction[i]);
            b.weight[l] = moved;
            CHECK_OK(besa_block_forward(&g_be, &b, &acts, h.f, y, batch, seqlen, &g_error), g_error);
            value[side] = value_of_h1_loss(&loss);
        }
        b.weight[l] = weight;
        double found = (value[1] - value[0]) / 2e-3;
        if (l >= BESA_GATE) CHECK(want == 0 && found == 0, "%s: a loss at h1 has no gradient behind it", g_layer[l]);
        else CHECK(fabs(want - found) <= 2e-3 * fabs(found) + 1e-3, "%s: %g, differences say %g", g_layer[l], want, found);
    }
}

/* Gradients of norms and biases, added up over two batches: against finite differences of a loss at the block's output along
 * one random direction of each; and the same where no weight's gradient is wanted. */
static void test_vector_gradients(const char *name)
{
    const char *dir = folder(name);
    int64_t batch = (int64_t)json_number(dir, "shape.json", "batch"), seqlen = (int64_t)json_number(dir, "shape.json", "seqlen");
    besa_block b = read_block(dir, seqlen);
    int64_t tokens = batch * seqlen, d = b.shape.hidden_size;
    besa_activations acts = new_activations(&b, tokens);
    array h = npy_load(dir, "h", batch, seqlen, d);
    float *y = take_floats(tokens * d), *sums[2][BESA_VECTORS];
    double *c = random_numbers(tokens * d);
    int seen = 0;
    set_workspace(besa_block_workload(&b.shape, batch, seqlen));
    besa__backward p = besa__backward_of(&g_be, &b, &acts, seqlen);
    besa__backward_batch(&p, batch);
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t rows, columns;
        besa_block_layer(&b.shape, l, &rows, &columns);
        acts.dw_sum[l] = take_floats(rows * columns);
    }
    for (int alone = 0; alone < 2; alone++) {
        p.layers = alone ? 0 : p.layers;
        for (int i = 0; i < BESA_VECTORS; i++) acts.dvector[i] = sums[alone][i] = take_floats(besa__vector_count(&b.shape, i));
        for (int twice = 0; twice < 2; twice++) {
            CHECK_OK(besa_block_forward(&g_be, &b, &acts, h.f, y, batch, seqlen, &g_error), g_error);
            for (int64_t i = 0; i < tokens * d; i++) y[i] += (float)c[i]; /* dL/dy of L = sum c y + y^2 / 2 */
            OP(besa__block_backward(&p, h.f, y, NULL));
        }
    }
    for (int i = 0; i < BESA_VECTORS; i++) {
        const float **vector = besa__block_vector(&b, i), *was = *vector;
        int64_t n = besa__vector_count(&b.shape, i);
        double *direction = random_numbers(n), want = 0, value[2] = { 0, 0 };
        float *moved = take_floats(n);
        if (was && i >= BESA_LAYERS)
            CHECK(!memcmp(sums[0][i], sums[1][i], (size_t)n * sizeof(float)), "vector %d: another gradient without weights", i);
        for (int64_t k = 0; k < n; k++) want += 0.5 * (double)sums[0][i][k] * direction[k];
        if (!was) CHECK(want == 0, "vector %d: a gradient of what is not there", i);
        if (!was) continue;
        seen++;
        for (int side = 0; side < 2; side++) {
            for (int64_t k = 0; k < n; k++) moved[k] = was[k] + (float)((side ? 1e-2 : -1e-2) * direction[k]);
            *vector = moved;
            CHECK_OK(besa_block_forward(&g_be, &b, &acts, h.f, y, batch, seqlen, &g_error), g_error);
            for (int64_t k = 0; k < tokens * d; k++) value[side] += (c[k] + 0.5 * (double)y[k]) * (double)y[k];
        }
        *vector = was;
        double found = (value[1] - value[0]) / 2e-2;
        CHECK(fabs(want - found) <= 2e-3 * fabs(found) + 3e-3, "vector %d: %g, differences say %g", i, want, found);
    }
    CHECK(seen >= 2, "%d norms and biases", seen);
}

/* ---- the sparse layer ------------------------------------------------------------------------ */

/* bucket[rank] = the largest d with rank < k_d: from the definition, one candidate after the other. */
static uint16_t *bucket_table(int64_t columns, int64_t buckets)
{
    uint16_t *bucket = (uint16_t *)take((size_t)columns * sizeof *bucket);
    for (int64_t rank = 0; rank < columns; rank++)
        for (int64_t c = 0; c < buckets; c++)
            if (rank < (buckets - c) * columns / buckets) bucket[rank] = (uint16_t)c;
    return bucket;
}

/* The published layer: ranks, rates, hard mask, output and the gradient that reaches theta. `layer_theta` moves the
 * one group of the layer-wise case from the row logits to the layer's: both must give the same. */
static void test_sparse_layer(const char *name, int plain, int64_t groups, int layer_theta)
{
    enum { R = 12, C = 203, T = 30, D = 100 };
    const char *dir = folder(name);
    array w = npy_load(dir, "weight", R, C, 0), norm = npy_load(dir, "colnorm", C, 0, 0);
    array x = npy_load(dir, "x", T, C, 0), dy = npy_load(dir, "dy", T, R, 0);
    array theta = npy_load(dir, "theta", groups > 1 ? groups : D + 1, groups > 1 ? D + 1 : 0, 0);
    array rank = npy_read(dir, "rank"), mask = npy_load(dir, "mask", R, C, 0);
    float *score = take_floats(R * C), *alpha = take_floats(groups), *what = take_floats(R * C), *y = take_floats(T * R);
    float *dw = take_floats(R * C), *sums = take_floats(R * D), *dtheta = take_floats(groups * (D + 1)), mean = 0;
    uint16_t *got_rank = (uint16_t *)take(R * C * 2), *bucket = bucket_table(C, D);
    int32_t n[R], zeros[R];
    int wrong = 0;
    besa_rate_shape s;
    besa_penalty penalty;
    besa_workload load;
    memset(&s, 0, sizeof s);
    memset(&load, 0, sizeof load);
    memset(zeros, 0, sizeof zeros);
    memset(&penalty, 0, sizeof penalty);
    s.rows = R, s.units = C, s.group_rows = R / groups, s.logits = D + 1, s.plain = plain;
    s.layer_scale = layer_theta ? 1.0f : 0.0f, s.row_scale = layer_theta ? 0.0f : 1.0f;
    penalty.mean = &mean, penalty.target = 0.5f;
    load.rows = R, load.columns = C, load.tokens = T, load.seqlen = T;
    set_workspace(load);

    OP(g_be.score(&g_be, score, w.f, BESA_F32, norm.f, 1, R, C));
    OP(g_be.rank_rows(&g_be, got_rank, score, R, C));
    if (rank.v) {                               /* row 3 has equal scores: the order must be stable */
        for (int i = 0; i < R * C; i++) wrong += got_rank[i] != rank.v[i];
        CHECK(wrong == 0, "%d ranks differ", wrong);
    }
    OP(g_be.rate_forward(&g_be, alpha, n, layer_theta ? theta.f : NULL, layer_theta ? NULL : theta.f, zeros, &s));
    CHECK_CLOSE("alpha", alpha, npy_load(dir, "alpha", groups, 0, 0).v, groups, 1e-6);
    OP(g_be.mask_apply(&g_be, what, w.f, BESA_F32, got_rank, n, R, C));
    for (int i = 0, kept; i < R * C; i++) {
        kept = memcmp(&what[i], &w.f[i], 4) == 0;
        wrong += kept != (mask.v[i] != 0) || (!kept && memcmp(&what[i], "\0\0\0", 4));
    }
    CHECK(wrong == 0, "%d weights of the masked layer differ", wrong);
    OP(g_be.linear_forward(&g_be, y, x.f, what, BESA_F32, NULL, T, R, C, 0));
    CHECK_CLOSE("y", y, npy_load(dir, "y", T, R, 0).v, T * R, 2e-6);
    OP(g_be.linear_backward_weight(&g_be, dw, BESA_F32, dy.f, x.f, T, R, C, 0, R, 0));
    OP(g_be.bucket_gradient(&g_be, sums, dw, BESA_F32, w.f, BESA_F32, got_rank, bucket, R, C, D));
    OP(g_be.rate_backward(&g_be, layer_theta ? dtheta : NULL, layer_theta ? NULL : dtheta, sums,
                          layer_theta ? theta.f : NULL, layer_theta ? NULL : theta.f, &penalty, &s));
    CHECK_CLOSE("grad_theta", dtheta, npy_load(dir, "grad_theta", theta.shape[0], theta.shape[1], 0).v, theta.count, 1e-5);
}

/* The same layer through besa_rates: a start at the target, masks as deep as n says, an exact projection, and a step
 * that follows the gradient down. */
static void test_rates_api(void)
{
    enum { R = 12, C = 203 };
    const char *dir = folder("sparse_row_sigmoid");
    array w = npy_load(dir, "weight", R, C, 0), norm = npy_load(dir, "colnorm", C, 0, 0), rank = npy_read(dir, "rank");
    float *what = take_floats(R * C), *dw = take_floats(R * C), *scratch = take_floats((R + 1) * C), alpha[R], sumsq[C];
    static const double target[] = { 0.003, 0.02, 0.3, 0.5, 0.7, 0.97, 0.999 };
    besa_layer_shape shape;
    besa_workload load;
    memset(&load, 0, sizeof load);
    shape.rows = R, shape.columns = C, shape.dtype = BESA_F32;
    load.rows = R, load.columns = C;
    set_workspace(load);
    for (int j = 0; j < C; j++) sumsq[j] = norm.f[j] * norm.f[j];
    for (int i = 0; i < R * C; i++) dw[i] = w.f[i]; /* dL/dW W > 0: pruning lowers the loss, so rates want to rise */
    for (size_t t = 0; t < sizeof target / sizeof *target; t++) {
        besa_rates *rates = NULL;
        besa_rate_options o;
        double d = 0, start = 0, mean = 0;
        int32_t n[R];
        int64_t count = 0, zeros = 0, wrong = 0;
        memset(&o, 0, sizeof o);
        o.target = target[t];
        o.form = BESA_RATES_ROW;
        o.penalty = BESA_NONE;
        CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error), g_error);
        if (!rates) return;
        CHECK_OK(besa_rates_rank(rates, 0, w.f, BESA_IMPORTANCE_WANDA, sumsq, scratch, &g_error), g_error);
        CHECK_OK(besa_rates_forward(rates, &g_error), g_error);
        CHECK_OK(besa_rates_status(rates, &d, &start, &g_error), g_error);
        CHECK(fabs(start - target[t]) < 1e-5 && d == 1e-6, "target %g starts at %g, d %g", target[t], start, d);
        for (int step = 0; step < 12; step++) {
            CHECK_OK(besa_rates_gradient(rates, 0, w.f, dw, &g_error), g_error);
            CHECK_OK(besa_rates_step(rates, &g_error), g_error);
            CHECK_OK(besa_rates_forward(rates, &g_error), g_error);
        }
        CHECK_OK(besa_rates_status(rates, &d, &mean, &g_error), g_error);
        CHECK(mean > start && d > 1e-6, "target %g: mean rate %.9g from %.9g, d %g", target[t], mean, start, d);
        CHECK_OK(besa_rates_read(rates, 0, alpha, n, &g_error), g_error);
        for (int r = 0; r < R; r++) {
            double exact = (double)alpha[r] * C;
            CHECK(n[r] == (int)floor(exact) || fabs(exact - rint(exact)) < 1e-4, "n %d at alpha C %g", n[r], exact);
        }
        CHECK_OK(besa_rates_project(rates, &g_error), g_error);
        CHECK_OK(besa_rates_read(rates, 0, NULL, n, &g_error), g_error);
        CHECK_OK(besa_rates_mask(rates, 0, w.f, what, &g_error), g_error);
        for (int i = 0; i < R * C; i++) {
            zeros += what[i] == 0;
            wrong += what[i] != (rank.v[i] >= n[i / C] ? w.f[i] : 0);
        }
        for (int r = 0; r < R; r++) {
            count += n[r];
            for (int q = 0; q < R; q++) CHECK(alpha[r] <= alpha[q] || n[r] >= n[q], "the higher rate prunes less");
        }
        CHECK(zeros == (int64_t)floor(target[t] * R * C + 0.5) && count == zeros && wrong == 0,
              "target %g: %d pruned, n adds up to %d, %d weights wrong", target[t], (int)zeros, (int)count, (int)wrong);
        besa_rates_destroy(rates);
    }
}

/* Ranks, beta and bucket sums as they are read out, by their formulas: weights whose scores are known, logits by chance. */
static void test_rates_readers(besa_rate_form form, int plain, int64_t group)
{
    enum { R = 7, C = 33, D = 5, L = D + 1 };
    float w[R * C], dw[R * C], alpha[R], beta[R * L], sums[R * D], *scratch = take_floats((R + 1) * C), *theta;
    int32_t ranks[R * C];
    besa_layer_shape shape[2] = { { 3, 4, BESA_F32 }, { R, C, BESA_F32 } };
    besa_rate_options o;
    besa_rates *rates = NULL;
    memset(&o, 0, sizeof o);
    o.target = 0.4, o.form = form, o.plain_softmax = plain, o.group_rows = group, o.candidates = D, o.layer_scale = 1.5, o.row_scale = 2;
    CHECK_OK(besa_rates_create(&rates, &g_be, shape, 2, &o, &g_error), g_error);
    if (!rates) return;
    for (int i = 0; i < R * C; i++) w[i] = (float)(1 + (i % C * 10 + i / C) % C), dw[i] = (float)sin(i);
    CHECK(besa_rates_ranks(rates, 1, ranks, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "no ranks"), "%s", g_error.message);
    CHECK_OK(besa_rates_rank(rates, 1, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error);
    int64_t parameters = besa_rates_parameters(rates, &theta, NULL);
    for (int64_t i = 0; i < parameters; i++) theta[i] = (float)cos(3.0 * (double)i);
    CHECK_OK(besa_rates_forward(rates, &g_error), g_error);
    CHECK_OK(besa_rates_gradient(rates, 1, w, dw, &g_error), g_error);
    CHECK_OK(besa_rates_ranks(rates, 1, ranks, &g_error), g_error);
    CHECK_OK(besa_rates_beta(rates, 1, beta, &g_error), g_error);
    CHECK_OK(besa_rates_sums(rates, 1, sums, &g_error), g_error);
    CHECK_OK(besa_rates_read(rates, 1, alpha, NULL, &g_error), g_error);
    const int has_layer = form != BESA_RATES_ROW, has_rows = form != BESA_RATES_LAYER;
    const int64_t groups = group < 0 ? 1 : (R + group - 1) / group, own = (has_layer + has_rows * groups) * L;
    const float *at = theta + parameters - own, *rows = at + (has_layer ? L : 0);
    for (int r = 0; r < R; r++) {
        double mean = 0, all = 0, z[L];
        for (int d = 0; d < L; d++) {
            const double a = has_layer ? (double)at[d] : 0, b = has_rows ? (double)rows[(group < 0 ? 0 : r / group) * L + d] : 0;
            z[d] = (double)besa__solve_tilt(0.4, D) * (1 - (double)d / D);
            z[d] += has_layer ? 1.5 * (plain ? a : 1 / (1 + exp(-a)) - 0.5) : 0;
            z[d] += has_rows ? 2 * (plain ? b : 1 / (1 + exp(-b)) - 0.5) : 0;
            all += exp(z[d]);
        }
        for (int d = 0; d < L; d++) {
            CHECK(fabs((double)beta[r * L + d] - exp(z[d]) / all) < 1e-6, "row %d: beta[%d] is %g, expected %g", r, d,
                  (double)beta[r * L + d], exp(z[d]) / all);
            mean += (double)beta[r * L + d] * (1 - (double)d / D);
        }
        CHECK(fabs(mean - (double)alpha[r]) < 1e-5, "row %d: alpha is %g, the mean by beta %g", r, (double)alpha[r], mean);
        for (int b = 0; b < D; b++) {
            double sum = 0;
            for (int j = 0; j < C; j++) {
                const int rank = ranks[r * C + j];
                if (rank < ((D - b) * C) / D && rank >= ((D - b - 1) * C) / D) sum += (double)dw[r * C + j] * (double)w[r * C + j];
            }
            CHECK(fabs(sum - (double)sums[r * D + b]) < 1e-3, "row %d: sum %d is %g, expected %g", r, b, (double)sums[r * D + b], sum);
        }
        for (int j = 0; j < C; j++) CHECK(ranks[r * C + j] == (int)w[r * C + j] - 1, "row %d: rank of %g is %d", r, (double)w[r * C + j], ranks[r * C + j]);
    }
    CHECK_OK(besa_rates_backward(rates, &g_error), g_error);
    CHECK_OK(besa_rates_sums(rates, 1, sums, &g_error), g_error);
    for (int i = 0; i < R * D; i++) CHECK(sums[i] == 0, "sum %d is %g after the backward pass", i, (double)sums[i]);
    CHECK_OK(besa_rates_fix(rates, 1, 0.5, &g_error), g_error);
    CHECK(besa_rates_beta(rates, 1, beta, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "fixed"), "%s", g_error.message);
    CHECK(besa_rates_ranks(rates, 1, NULL, &g_error) == BESA_ERROR_OPTION && besa_rates_beta(rates, 0, NULL, &g_error) == BESA_ERROR_OPTION &&
          besa_rates_sums(rates, 2, sums, &g_error) == BESA_ERROR_OPTION, "arguments");
    besa_rates_destroy(rates);
}

/* Rows that are wider than 16 bits count. */
static void test_wide_ranks(void)
{
    enum { C = 65537 };
    besa_layer_shape shape = { 1, C, BESA_F32 };
    besa_rate_options o;
    besa_rates *rates = NULL;
    float *w = take_floats(C), *scratch = take_floats(2 * C);
    int32_t *ranks = (int32_t *)take(C * sizeof *ranks);
    int wrong = 0;
    memset(&o, 0, sizeof o);
    o.target = 0.5;
    CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error), g_error);
    if (!rates) return;
    for (int i = 0; i < C; i++) w[i] = (float)(C - i);
    CHECK_OK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error);
    CHECK_OK(besa_rates_ranks(rates, 0, ranks, &g_error), g_error);
    for (int i = 0; i < C; i++) wrong += ranks[i] != C - 1 - i;
    CHECK(wrong == 0, "%d ranks are wrong", wrong);
    besa_rates_destroy(rates);
}

/* ---- scores, factors and baselines ----------------------------------------------------------- */

static besa_workload hessian_workload(int64_t rows, int64_t columns, int64_t tokens)
{
    besa_workload w;
    memset(&w, 0, sizeof w);
    w.rows = rows, w.columns = w.hessian_columns = columns, w.tokens = w.seqlen = tokens;
    return w;
}

/* w^2 / U_jj and w^2 / U_jj^2 of the published code; the dead column's scores mean nothing there. */
static void test_sparsegpt_score(const char *name, int squared)
{
    enum { R = 8, C = 40, B = 3, T = 50, DEAD = 7 };
    const char *dir = folder(name);
    array w = npy_load(dir, "weight", R, C, 0), x = npy_load(dir, "x", B, T, C);
    array want_h = npy_load(dir, "hessian", C, C, 0), want = npy_load(dir, "score", R, C, 0);
    float *h = take_floats(C * C), *scale = take_floats(C), *score = take_floats(R * C);
    double lower[C * C];
    int32_t dead[C];
    set_workspace(hessian_workload(R, C, T));
    for (int b = 0; b < B; b++) OP(g_be.gram(&g_be, h, x.f + b * T * C, 2.0f / B, T, C));
    for (int i = 0; i < C; i++)                 /* only the lower triangle needs to be there */
        for (int j = 0; j < C; j++) {
            lower[i * C + j] = j <= i ? want_h.v[i * C + j] : 0;
            if (j > i) h[i * C + j] = 0;
        }
    CHECK_CLOSE("hessian", h, lower, C * C, 2e-6);
    OP(g_be.hessian_factor(&g_be, h, dead, 0.01f, C));
    for (int j = 0; j < C; j++) CHECK(dead[j] == (j == DEAD), "dead[%d] = %d", j, dead[j]);
    OP(g_be.diagonal(&g_be, scale, h, dead, C));
    for (int j = 0; j < C; j++) scale[j] = squared ? 1 / (scale[j] * scale[j]) : 1 / scale[j];
    OP(g_be.score(&g_be, score, w.f, BESA_F32, scale, 2, R, C));
    for (int r = 0; r < R; r++) score[r * C + DEAD] = (float)want.v[r * C + DEAD];
    CHECK_CLOSE("score", score, want.v, R * C, 1e-5);
}

/* The factor of the inverse and the three ways of choosing: masks must agree but for ties within rounding, the
 * updated weights to rounding in rows whose masks agree. */
static void test_sparsegpt(void)
{
    enum { R = 24, C = 256, T = 600, SLAB = 128 };
    static const struct { const char *file; int n, m; } form[] = { { "pruned_50", 0, 0 }, { "pruned_2of4", 2, 4 },
                                                                   { "pruned_4of8", 4, 8 } };
    const char *dir = folder("sparsegpt");
    array w = npy_load(dir, "weight", R, C, 0), x = npy_load(dir, "x", T, C, 0);
    float *u = take_floats(C * C), *wf = take_floats(R * C), *err = take_floats(R * SLAB);
    int32_t dead[C];
    set_workspace(hessian_workload(R, C, T));
    OP(g_be.gram(&g_be, u, x.f, 2.0f / T, T, C));
    OP(g_be.hessian_factor(&g_be, u, dead, 0.01f, C));
    CHECK_CLOSE("chol_upper_of_inverse", u, npy_load(dir, "chol_upper_of_inverse", C, C, 0).v, C * C, 1e-5);
    for (int f = 0; f < 3; f++) {
        array want = npy_load(dir, form[f].file, R, C, 0);
        int differ = 0;
        memcpy(wf, w.f, R * C * sizeof *wf);
        for (int64_t first = 0; first < C; first += SLAB) {
            OP(g_be.sparsegpt_slab(&g_be, wf, err, u, dead, first, SLAB, 0.5, form[f].n, form[f].m, NULL, R, C));
            if (first + SLAB < C) OP(g_be.sparsegpt_push(&g_be, wf, err, u, first, SLAB, R, C));
        }
        for (int i = 0; i < R * C; i++) differ += (wf[i] == 0) != (want.v[i] == 0);
        CHECK(differ == 0, "%s: %d weights are pruned in one and kept in the other", form[f].file, differ);
        CHECK_CLOSE(form[f].file, wf, want.v, R * C, 1e-5);
    }
}

static void test_wanda(void)
{
    enum { R = 24, C = 256 };
    static const struct { const char *file; int n, m; } form[] = { { "keep_50", 0, 0 }, { "keep_2of4", 2, 4 },
                                                                   { "keep_4of8", 4, 8 } };
    const char *dir = folder("wanda");
    array w = npy_load(dir, "weight", R, C, 0), norm = npy_load(dir, "colnorm", C, 0, 0);
    float *score = take_floats(R * C), *what = take_floats(R * C);
    void *rank = take(R * C * 2);
    int32_t n[R];
    besa_workload load;
    memset(&load, 0, sizeof load);
    load.rows = R, load.columns = C;
    set_workspace(load);
    for (int r = 0; r < R; r++) n[r] = C / 2;
    OP(g_be.score(&g_be, score, w.f, BESA_F32, norm.f, 1, R, C));
    OP(g_be.rank_rows(&g_be, rank, score, R, C));
    for (int f = 0; f < 3; f++) {
        array keep = npy_load(dir, form[f].file, R, C, 0);
        int wrong = 0;
        if (form[f].m) OP(g_be.mask_pattern(&g_be, what, w.f, BESA_F32, score, form[f].n, form[f].m, R, C));
        else OP(g_be.mask_apply(&g_be, what, w.f, BESA_F32, rank, n, R, C));
        for (int i = 0; i < R * C; i++) wrong += what[i] != (keep.v[i] != 0 ? w.f[i] : 0);
        CHECK(wrong == 0, "%s: %d weights differ", form[f].file, wrong);
    }
}

/* Clips, grid, levels and the clips' gradient of one folder. The first row's weights are all above 0, and the folder's range is
 * theirs; the library's has 0 too. In fp64 a weight may be half-way between two levels where in float it is not. */
static void test_quantization(const char *name, int bits)
{
    enum { R = 10, C = 64 };
    const char *dir = folder(name);
    array w = npy_load(dir, "weight", R, C, 0), high = npy_load(dir, "logit_max", R, 1, 0), low = npy_load(dir, "logit_min", R, 1, 0);
    array scale = npy_load(dir, "scale", R, 1, 0), zero = npy_load(dir, "zero", R, 1, 0), level = npy_load(dir, "quantised", R, C, 0);
    array dq = npy_load(dir, "dq", R, C, 0), dhigh = npy_load(dir, "grad_logit_max", R, 1, 0);
    array dlow = npy_load(dir, "grad_logit_min", R, 1, 0);
    float range[2 * R], logit[2 * R], dlogit[2 * R] = { 0 }, h[R], z[R], what[R * C];
    double want[2 * R];
    besa_quantizer q = { bits, R, C, C, range, logit, h, z };
    OP(g_be.quantize_range(&g_be, range, w.f, BESA_F32, C, R, C));
    for (int r = 0; r < R; r++) {
        float most = w.f[r * C], least = most;
        for (int j = 0; j < C; j++) most = fmaxf(most, w.f[r * C + j]), least = fminf(least, w.f[r * C + j]);
        CHECK(range[2 * r] == fmaxf(most, 0) && range[2 * r + 1] == fminf(least, 0), "row %d: %g, %g", r, range[2 * r], range[2 * r + 1]);
        CHECK((least > 0) == (r == 0), "row %d begins at %g", r, least);
        range[2 * r + 1] = least;
        logit[2 * r] = high.f[r], logit[2 * r + 1] = low.f[r];
        want[2 * r] = dhigh.v[r], want[2 * r + 1] = dlow.v[r];
    }
    OP(g_be.quantize_grid(&g_be, &q));
    CHECK_CLOSE("scale", h, scale.v, R, 1e-6);
    CHECK_CLOSE("zero", z, zero.v, R, 0);
    OP(g_be.quantize(&g_be, what, w.f, BESA_F32, &q));
    CHECK_CLOSE("quantised", what, level.v, R * C, 2e-6);
    OP(g_be.quantize_gradient(&g_be, dlogit, dq.f, w.f, BESA_F32, &q));
    CHECK_CLOSE("gradient of the clips", dlogit, want, 2 * R, 1e-4);
}

/* ---- optimisers ------------------------------------------------------------------------------ */

/* Prodigy's 40 steps. The method sees only theta0 - theta, which floats near 1 cannot hold while d is 1e-6; so the
 * problem is moved to start at 0, as rates do, and x - x0 compared: with the stored gradients and with the gradients
 * where our own steps lead. Started at x0 itself the rounding of theta is most of the error. */
static void test_prodigy(void)
{
    enum { N = 20, STEPS = 40, STORED = 0, OWN = 1, IN_PLACE = 2 };
    const char *dir = folder("prodigy");
    array a = npy_load(dir, "A", N, N, 0), b = npy_load(dir, "b", N, 0, 0), x0 = npy_load(dir, "x0", N, 0, 0);
    array grads = npy_load(dir, "grads", STEPS, N, 0), x = npy_load(dir, "x", STEPS, N, 0);
    array d = npy_load(dir, "d", STEPS, 0, 0);
    set_workspace(hessian_workload(N, N, N));
    for (int mode = STORED; mode <= IN_PLACE; mode++) {
        float theta[N] = { 0 }, theta0[N] = { 0 }, grad[N], m[N] = { 0 }, v[N] = { 0 }, s[N] = { 0 };
        double scalars[BESA_OPTIMIZER_SCALARS] = { 1e-6, 0 }, tolerance = mode == STORED ? 1e-4 : 1e-2;
        besa_optimizer_step o;
        memset(&o, 0, sizeof o);
        o.kind = BESA_PRODIGY, o.lr = 1, o.beta1 = 0.9f, o.beta2 = 0.999f, o.beta3 = sqrtf(0.999f), o.eps = 1e-8f;
        o.d0 = 1e-6, o.d_coef = 5;
        o.n = N, o.theta = theta, o.theta0 = theta0, o.grad = grad, o.m = m, o.v = v, o.s = s, o.scalars = scalars;
        if (mode == IN_PLACE) memcpy(theta, x0.f, sizeof theta), memcpy(theta0, x0.f, sizeof theta);
        for (o.step = 1; o.step <= STEPS; o.step++) {
            int64_t t = o.step - 1;
            double want[N];
            float got_d;
            for (int i = 0; i < N; i++) {
                double g = -b.v[i];
                for (int j = 0; j < N; j++) g += a.v[i * N + j] * (x0.v[j] + (double)theta[j]);
                grad[i] = mode == OWN ? (float)g : grads.f[t * N + i];
                want[i] = x.v[t * N + i] - (mode == IN_PLACE ? 0 : x0.v[i]);
            }
            OP(g_be.optimizer_step(&g_be, &o));
            got_d = (float)scalars[0];
            CHECK_CLOSE("d", &got_d, d.v + t, 1, tolerance);
            CHECK_CLOSE("x", theta, want, N, tolerance);
        }
    }
}

/* AdamW with decoupled weight decay against its formula in double. */
static void test_adamw(void)
{
    enum { N = 1000, STEPS = 30 };
    static float theta[N], grad[N], m[N], v[N], s[N];
    static double want[N], wm[N], wv[N];
    double scalars[BESA_OPTIMIZER_SCALARS] = { 0, 0 };
    besa_optimizer_step o;
    memset(&o, 0, sizeof o);
    o.kind = BESA_ADAMW, o.lr = 0.01f, o.beta1 = 0.9f, o.beta2 = 0.999f, o.beta3 = sqrtf(0.999f), o.eps = 1e-8f;
    o.weight_decay = 0.05f;
    o.n = N, o.theta = theta, o.theta0 = theta, o.grad = grad, o.m = m, o.v = v, o.s = s, o.scalars = scalars;
    set_workspace(hessian_workload(N, 1, 1));
    for (int i = 0; i < N; i++) want[i] = theta[i] = sinf((float)i);
    for (o.step = 1; o.step <= STEPS; o.step++) {
        for (int i = 0; i < N; i++) {           /* gradients from 1 down to 1e-9: eps matters for the last */
            double g = grad[i] = cosf((float)(i * 7 + o.step)) * powf(10.0f, (float)(-i % 10)), lr = o.lr, mh, vh;
            wm[i] = o.beta1 * wm[i] + (1 - (double)o.beta1) * g;
            wv[i] = o.beta2 * wv[i] + (1 - (double)o.beta2) * g * g;
            mh = wm[i] / (1 - pow(o.beta1, (double)o.step));
            vh = wv[i] / (1 - pow(o.beta2, (double)o.step));
            want[i] -= lr * o.weight_decay * want[i] + lr * mh / (sqrt(vh) + o.eps);
        }
        OP(g_be.optimizer_step(&g_be, &o));
    }
    CHECK_CLOSE("theta", theta, want, N, 1e-5);
}

/* ---- the published loop ---------------------------------------------------------------------- */

enum { STEPS = 16, CANDIDATES = 101 };

typedef struct trace {
    const char *dir;
    besa_block block;
    int64_t seqlen, hidden, rows[BESA_LAYERS], columns[BESA_LAYERS], first_row[BESA_LAYERS + 1], weights;
    double penalty, target, d_coef;
    array h, yref, l2, loss, d, sparsity, alpha;
    int step;                                   /* steps seen by the callback */
    double loss_error[STEPS], d_error[STEPS], alpha_error[STEPS], alpha_spread[STEPS];
} trace;

static void read_trace(trace *t, const char *name)
{
    memset(t, 0, sizeof *t);
    t->dir = folder(name);
    t->seqlen = (int64_t)json_number(t->dir, "shape.json", "seqlen");
    t->penalty = json_number(t->dir, "shape.json", "penalty");
    t->target = json_number(t->dir, "shape.json", "target");
    t->d_coef = json_number(t->dir, "shape.json", "d_coef");
    t->block = read_block(t->dir, t->seqlen);
    t->hidden = t->block.shape.hidden_size;
    for (int l = 0; l < BESA_LAYERS; l++) {
        besa_block_layer(&t->block.shape, l, &t->rows[l], &t->columns[l]);
        t->first_row[l + 1] = t->first_row[l] + t->rows[l];
        t->weights += t->rows[l] * t->columns[l];
    }
    t->h = npy_load(t->dir, "h", STEPS, t->seqlen, t->hidden);
    t->yref = npy_load(t->dir, "yref", STEPS, t->seqlen, t->hidden);
    t->l2 = npy_load(t->dir, "l2", STEPS, 0, 0);
    t->loss = npy_load(t->dir, "loss", STEPS, 0, 0);
    t->d = npy_load(t->dir, "d", STEPS, 0, 0);
    t->sparsity = npy_load(t->dir, "sparsity", STEPS, 0, 0);
    t->alpha = npy_load(t->dir, "alpha", STEPS, t->first_row[BESA_LAYERS], 0);
}

/* One layer of the pinned loop below. */
typedef struct pinned_layer {
    float *what, *sums, *theta, *theta0, *grad, *alpha;
    void *rank;
    uint16_t *bucket;
    int32_t *n, *zeros;
    besa_rate_shape shape;
} pinned_layer;

typedef struct pinned {
    trace *t;
    pinned_layer layer[BESA_LAYERS];
} pinned;

static besa_result pinned_gradient(void *user, int l, int64_t first, int64_t rows, const void *gradient)
{
    const float *dw = (const float *)gradient;
    pinned *p = (pinned *)user;
    pinned_layer *a = &p->layer[l];
    CHECK(first == 0 && rows == p->t->rows[l], "layer %d comes in pieces", l);
    memset(a->sums, 0, (size_t)(p->t->rows[l] * (CANDIDATES - 1)) * sizeof(float));
    return g_be.bucket_gradient(&g_be, a->sums, dw, BESA_F32, p->t->block.weight[l], BESA_F32, a->rank, a->bucket, p->t->rows[l],
                                p->t->columns[l], CANDIDATES - 1);
}

/* Ranks from the dense block's inputs over all sequences; theta of all layers lies in one array for the optimiser. */
static void pinned_setup(pinned *p, trace *t, float *theta, float *theta0, float *grad)
{
    int64_t tokens = STEPS * t->seqlen;
    besa_activations acts = new_activations(&t->block, tokens);
    float *y = take_floats(tokens * t->hidden);
    memset(p, 0, sizeof *p);
    p->t = t;
    CHECK_OK(besa_block_forward(&g_be, &t->block, &acts, t->h.f, y, STEPS, t->seqlen, &g_error), g_error);
    CHECK_CLOSE("yref", y, t->yref.v, t->yref.count, 2e-6);
    for (int l = 0; l < BESA_LAYERS; l++) {
        pinned_layer *a = &p->layer[l];
        int64_t R = t->rows[l], C = t->columns[l];
        const void *input = l <= BESA_V ? acts.a : l == BESA_O ? acts.attn : l == BESA_DOWN ? acts.z : acts.m;
        float *norm = take_floats(C), *score = take_floats(R * C);
        a->what = take_floats(R * C), a->sums = take_floats(R * (CANDIDATES - 1)), a->alpha = take_floats(R);
        a->rank = take((size_t)(R * C) * 2), a->bucket = bucket_table(C, CANDIDATES - 1);
        a->n = (int32_t *)take((size_t)R * 4), a->zeros = (int32_t *)take((size_t)R * 4);
        a->theta = theta + t->first_row[l] * CANDIDATES, a->theta0 = theta0 + t->first_row[l] * CANDIDATES;
        a->grad = grad + t->first_row[l] * CANDIDATES;
        a->shape.rows = R, a->shape.units = C, a->shape.group_rows = 1, a->shape.logits = CANDIDATES;
        a->shape.row_scale = 1;
        OP(g_be.column_sumsq(&g_be, norm, input, tokens, C));
        for (int64_t j = 0; j < C; j++) norm[j] = sqrtf(norm[j]);
        OP(g_be.score(&g_be, score, t->block.weight[l], BESA_F32, norm, 1, R, C));
        OP(g_be.rank_rows(&g_be, a->rank, score, R, C));
    }
}

/* The masks that the reference had at a step, from the rates it stored after the step before. At step 0 its fp32 sum
 * of equal candidates is just below 1/2, so that rows lose C/2 - 1 weights. */
static void pinned_masks(pinned *p, int step)
{
    trace *t = p->t;
    for (int l = 0; l < BESA_LAYERS; l++) {
        pinned_layer *a = &p->layer[l];
        for (int64_t r = 0; r < t->rows[l]; r++) {
            float alpha = step ? t->alpha.f[(step - 1) * t->first_row[BESA_LAYERS] + t->first_row[l] + r] : 0.4999999f;
            a->n[r] = (int32_t)(alpha * (float)t->columns[l]);
        }
        OP(g_be.mask_apply(&g_be, a->what, t->block.weight[l], BESA_F32, a->rank, a->n, t->rows[l], t->columns[l]));
    }
}

/* The loop written out over the backend, with the reference's masks at every step: the only jumps are taken as it took
 * them, so what is left is rounding. Losses and final weights agree with the fp32 trace; d and rates agree closely with
 * the same loop in fp64 and, as that one does, to about 1 % with the fp32 trace, whose own rounding that is. */
static void test_trace_pinned(const char *name)
{
    trace t;
    pinned p;
    read_trace(&t, name);
    {
        int64_t d = t.hidden, rows = t.first_row[BESA_LAYERS], n = rows * CANDIDATES, wrong = 0;
        float *theta = take_floats(n), *theta0 = take_floats(n), *grad = take_floats(n), *norm2 = take_floats(d);
        float *alpha = take_floats(rows), *y = take_floats(t.seqlen * d), *dy = take_floats(t.seqlen * d), mean = 0;
        double scalars[BESA_OPTIMIZER_SCALARS] = { 1e-6, 0 };
        besa_activations acts = new_activations(&t.block, t.seqlen);
        besa_block sparse = t.block;
        besa_optimizer_step o;
        array d64 = npy_load(t.dir, "d_fp64", STEPS, 0, 0), alpha64 = npy_load(t.dir, "alpha_fp64", STEPS, rows, 0);
        set_workspace(besa_block_workload(&t.block.shape, STEPS, t.seqlen));
        pinned_setup(&p, &t, theta, theta0, grad);
        memset(&o, 0, sizeof o);
        o.kind = BESA_PRODIGY, o.lr = 1, o.beta1 = 0.9f, o.beta2 = 0.999f, o.beta3 = sqrtf(0.999f), o.eps = 1e-8f;
        o.d0 = 1e-6, o.d_coef = t.d_coef, o.n = n;
        o.theta = theta, o.theta0 = theta0, o.grad = grad, o.scalars = scalars;
        o.m = take_floats(n), o.v = take_floats(n), o.s = take_floats(n);
        for (int l = 0; l < BESA_LAYERS; l++) sparse.weight[l] = p.layer[l].what;
        for (int step = 0; step <= STEPS; step++) {
            const float *x = t.h.f + step * t.seqlen * d, *yref = t.yref.f + step * t.seqlen * d;
            float l2 = 0, total, got_d;
            for (int l = 0; l < BESA_LAYERS; l++) {
                pinned_layer *a = &p.layer[l];
                float share = (float)((double)(t.rows[l] * t.columns[l]) / (double)t.weights);
                OP(g_be.rate_forward(&g_be, a->alpha, a->n, NULL, a->theta, a->zeros, &a->shape));
                OP(g_be.rate_mean(&g_be, &mean, a->alpha, share, l > 0, t.rows[l]));
                memcpy(alpha + t.first_row[l], a->alpha, (size_t)t.rows[l] * sizeof(float));
            }
            pinned_masks(&p, step);
            if (step) {
                CHECK_CLOSE("alpha_fp64", alpha, alpha64.v + (step - 1) * rows, rows, 1e-3);
                CHECK_CLOSE("alpha", alpha, t.alpha.v + (step - 1) * rows, rows,
                            fmin(0.06, 2e-6 * pow(2.5, step)));
            }
            if (step == STEPS) break;
            CHECK_CLOSE("sparsity", &mean, t.sparsity.v + step, 1, 2e-3);
            memset(norm2, 0, (size_t)d * sizeof *norm2);
            OP(g_be.column_sumsq(&g_be, norm2, yref, t.seqlen, d));
            CHECK_OK(besa_block_forward(&g_be, &sparse, &acts, x, y, 1, t.seqlen, &g_error), g_error);
            OP(g_be.block_loss(&g_be, &l2, dy, y, yref, norm2, 1.0f, t.seqlen, d, 0));
            CHECK_CLOSE("l2", &l2, t.l2.v + step, 1, 1e-5);
            total = l2 + (float)(t.penalty * pow(((double)mean - t.target) / t.target, 2));
            CHECK_CLOSE("loss", &total, t.loss.v + step, 1, 1e-4);
            CHECK_OK(besa_block_backward(&g_be, &sparse, &acts, x, dy, NULL, 1, t.seqlen, pinned_gradient, &p, &g_error),
                     g_error);
            for (int l = 0; l < BESA_LAYERS; l++) {
                pinned_layer *a = &p.layer[l];
                besa_penalty penalty;
                penalty.mean = &mean;
                penalty.target = (float)t.target;
                penalty.coefficient = (float)(2 * t.penalty / (t.target * t.target) *
                                              (double)(t.rows[l] * t.columns[l]) / (double)t.weights);
                OP(g_be.rate_backward(&g_be, NULL, a->grad, a->sums, NULL, a->theta, &penalty, &a->shape));
            }
            o.step = step + 1;
            OP(g_be.optimizer_step(&g_be, &o));
            got_d = (float)scalars[0];
            CHECK_CLOSE("d_fp64", &got_d, d64.v + step, 1, 2e-4);
            CHECK_CLOSE("d", &got_d, t.d.v + step, 1, 1.5e-2);
        }
        for (int l = 0; l < BESA_LAYERS; l++) {
            char file[32];
            array want;
            snprintf(file, sizeof file, "pruned_%s", g_layer[l]);
            want = npy_load(t.dir, file, t.rows[l], t.columns[l], 0);
            for (int64_t i = 0; i < want.count; i++) wrong += p.layer[l].what[i] != want.f[i];
        }
        CHECK(wrong == 0, "%d final weights differ", (int)wrong);
    }
}

static besa_result trace_step(void *user, const besa_step *step)
{
    trace *t = (trace *)user;
    double d = 0;
    int64_t i = step->step - 1, rows = t->first_row[BESA_LAYERS];
    if (i >= STEPS) return BESA_ERROR_OPTION;
    besa_rates_forward(step->rates, NULL);
    besa_rates_status(step->rates, &d, NULL, NULL);
    t->loss_error[i] = fabs((double)*step->loss - t->l2.v[i]) / t->l2.v[i];
    t->d_error[i] = fabs(d - t->d.v[i]) / t->d.v[i];
    for (int l = 0; l < BESA_LAYERS; l++) {
        float *alpha = take_floats(t->rows[l]);
        besa_rates_read(step->rates, l, alpha, NULL, NULL);
        for (int64_t r = 0; r < t->rows[l]; r++) {
            double want = t->alpha.v[i * rows + t->first_row[l] + r];
            t->alpha_error[i] += ((double)alpha[r] - want) * ((double)alpha[r] - want) / (double)rows;
            t->alpha_spread[i] += (want - 0.5) * (want - 0.5) / (double)rows;
        }
    }
    t->alpha_error[i] = sqrt(t->alpha_error[i]);
    t->alpha_spread[i] = sqrt(t->alpha_spread[i]);
    if (getenv("TEST_VERBOSE"))
        printf("    step %2d: loss off by %.2e, d by %.2e, alpha by %.2e of %.2e\n", (int)step->step, t->loss_error[i],
               t->d_error[i], t->alpha_error[i], t->alpha_spread[i]);
    t->step = (int)step->step;
    return BESA_OK;
}

static besa_result (*g_rate_forward)(besa_backend *, float *, int32_t *, const float *, const float *, const int32_t *,
                                     const besa_rate_shape *);

/* rate_forward with the reference's rounding: its fp32 sum over equal candidates is 1.5e-7 below 1/2, so that every row
 * starts with one weight more than an exact 1/2 would keep. */
static besa_result rounded_rate_forward(besa_backend *be, float *alpha, int32_t *n, const float *theta_layer,
                                        const float *theta_row, const int32_t *zeros, const besa_rate_shape *s)
{
    besa_result r = g_rate_forward(be, alpha, n, theta_layer, theta_row, zeros, s);
    for (int64_t g = 0; r == BESA_OK && g < s->rows; g++) { /* groups of one row */
        alpha[g] -= 1.5e-7f;
        n[g] = (int32_t)(alpha[g] * (float)s->units);
    }
    return r;
}

/* Arguments of the layer API that are not what they should be: a result, and what it was. */
static void test_rates_arguments(void)
{
    besa_layer_shape shape = { 3, 8, BESA_F32 }, wrong = { 3, 8, (besa_dtype)7 }, large = { INT32_MAX, INT32_MAX, BESA_F32 };
    besa_rate_options o;
    besa_rates *rates = NULL;
    float w[24] = { 1, 2, 3, 4, 5, 6, 7, 8 }, scratch[32], statistic[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };
    memset(&o, 0, sizeof o);
    o.target = 0.5;
    CHECK(besa_rates_create(&rates, &g_be, &wrong, 1, &o, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "dtype 7"), "%s",
          g_error.message);
    CHECK(besa_rates_create(&rates, &g_be, &large, 1, &o, &g_error) == BESA_ERROR_OPTION && besa_rates_size(&g_be, &large, 1, &o) == 0,
          "%s", g_error.message);
    for (int count = -1; count < 1; count++)
        CHECK(besa_rates_create(&rates, &g_be, &shape, count, &o, &g_error) == BESA_ERROR_OPTION &&
              strstr(g_error.message, "count of layers is"), "%d layers: %s", count, g_error.message);
    CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error), g_error);
    CHECK(besa_rates_mask(rates, 0, w, w, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "no ranks"), "%s", g_error.message);
    CHECK(besa_rates_project(rates, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "no ranks"), "%s", g_error.message);
    CHECK(besa_rates_rank(rates, 0, w, (besa_importance)9, statistic, scratch, &g_error) == BESA_ERROR_OPTION &&
          strstr(g_error.message, "importance is 9"), "%s", g_error.message);
    CHECK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_COUNT, statistic, scratch, &g_error) == BESA_ERROR_OPTION, "importance 4");
    CHECK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_WANDA, NULL, scratch, &g_error) == BESA_ERROR_OPTION &&
          strstr(g_error.message, "statistic is NULL") && strstr(g_error.message, "wanda"), "%s", g_error.message);
    CHECK(besa_rates_rank(rates, 1, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error) == BESA_ERROR_OPTION, "layer 1");
    CHECK(besa_rates_rank(rates, 0, NULL, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error) == BESA_ERROR_OPTION &&
          strstr(g_error.message, "w is NULL"), "%s", g_error.message);
    CHECK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, NULL, &g_error) == BESA_ERROR_OPTION &&
          strstr(g_error.message, "scratch is NULL"), "%s", g_error.message);
    CHECK_OK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error);
    CHECK(besa_rates_project(rates, &g_error) == BESA_ERROR_TARGET && strstr(g_error.message, "16 weights are zero"), "%s",
          g_error.message);
    CHECK(besa_rates_mask(rates, 0, NULL, w, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "w is NULL") &&
          besa_rates_mask(rates, 0, w, NULL, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "pruned is NULL") &&
          besa_rates_gradient(rates, 0, NULL, w, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "w is NULL") &&
          besa_rates_gradient(rates, 0, w, NULL, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "dw is NULL"), "%s",
          g_error.message);
    CHECK_OK(besa_rates_forward(rates, &g_error), g_error);
    CHECK_OK(besa_rates_step(rates, &g_error), g_error);
    CHECK(besa_rates_fix(rates, 0, 0.25, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "after 1 steps"), "%s", g_error.message);
    CHECK_OK(besa_rates_reset(rates, &g_error), g_error);
    CHECK_OK(besa_rates_fix(rates, 0, 0.25, &g_error), g_error);
    besa_rates_destroy(rates);
}

/* The largest penalty that a target allows is learned with; one beyond it is refused, with the remedy. */
static void test_largest_penalty(void)
{
    static const double targets[] = { 0.5, 1e-4, 1e-18, 1e-25, 1e-160 };
    besa_layer_shape shape = { 3, 8, BESA_F32 };
    besa_rate_options o;
    besa_rates *rates = NULL;
    float w[24], scratch[32];
    double d, mean;
    for (int i = 0; i < 24; i++) w[i] = (float)(i % 7 + 1);
    memset(&o, 0, sizeof o);
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
        o.target = targets[i];
        o.penalty = 1.01e37 * o.target * o.target;
        if (o.penalty > 0)
            CHECK(o.penalty > 1e30 || besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error) == BESA_ERROR_OPTION, "%g", o.target);
        o.penalty = 1e37 * o.target * o.target;
        if (o.penalty > 9e29) o.penalty = 9e29;
        if (o.penalty == 0) o.penalty = BESA_NONE;
        CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error), g_error);
        CHECK_OK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error);
        for (int step = 0; step < 3; step++) {
            CHECK_OK(besa_rates_forward(rates, &g_error), g_error);
            CHECK_OK(besa_rates_gradient(rates, 0, w, w, &g_error), g_error);
            CHECK_OK(besa_rates_step(rates, &g_error), g_error);
        }
        CHECK_OK(besa_rates_status(rates, &d, &mean, &g_error), g_error);
        CHECK_OK(besa_rates_project(rates, &g_error), g_error);
        besa_rates_destroy(rates);
    }
    o.target = 1e-20, o.penalty = 0;            /* the default, 1 */
    CHECK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error) == BESA_ERROR_OPTION && strstr(g_error.message, "penalty is 1, ")
          && strstr(g_error.message, "BESA_NONE"), "%s", g_error.message);
}

/* The step over given gradients against Prodigy and AdamW in plain double, every option other than its default. */
static void test_optimizer_options(int adamw)
{
    enum { N = 8 * 5, STEPS_ = 40 };
    besa_layer_shape shape = { 8, 8, BESA_F32 };
    besa_rate_options o;
    besa_rates *rates = NULL;
    float *theta, *grad;
    double x[N], m[N], v[N], s[N], d = 0.02, dmax = 0.02, num = 0, lr = 0.7, b1 = 0.8, b2 = 0.95, decay = 0.3, error = 0, got;
    memset(&o, 0, sizeof o);
    memset(x, 0, sizeof x), memset(m, 0, sizeof m), memset(v, 0, sizeof v), memset(s, 0, sizeof s);
    o.target = 0.5, o.form = BESA_RATES_ROW, o.candidates = 4, o.optimizer = adamw ? BESA_ADAMW : BESA_PRODIGY;
    o.lr = lr, o.beta1 = b1, o.beta2 = b2, o.weight_decay = decay, o.d0 = d, o.d_coef = 3;
    CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error), g_error);
    if (!rates || !CHECK(besa_rates_parameters(rates, &theta, &grad) == N, "parameters")) return;
    for (int step = 1; step <= STEPS_; step++) {
        double sum = 0, inner = 0, dlr = adamw ? lr : d * lr, gain = d / o.d0 * dlr, estimate;
        double c1 = 1 - pow(b1, step), c2 = 1 - pow(b2, step);
        for (int i = 0; i < N; i++) {
            double g = x[i] - (1 + 0.1 * i), scale = adamw ? 1 : d;
            grad[i] = (float)g;
            g = (double)grad[i];
            m[i] = b1 * m[i] + (1 - b1) * scale * g;
            v[i] = b2 * v[i] + (1 - b2) * scale * scale * g * g;
            s[i] = sqrt(b2) * s[i] + gain * g;
            inner += g * (0 - x[i]), sum += fabs(s[i]);
        }
        num = sqrt(b2) * num + gain * inner;
        estimate = o.d_coef * num / sum;
        if (estimate > dmax) dmax = estimate;
        if (!adamw) d = dmax, c1 = c2 = 1;
        for (int i = 0; i < N; i++) x[i] = x[i] * (1 - dlr * decay) - dlr / c1 * m[i] / (sqrt(v[i] / c2) + (adamw ? 1 : d) * 1e-8);
        CHECK_OK(besa_rates_optimize(rates, &g_error), g_error);
    }
    for (int i = 0; i < N; i++) error = fmax(error, fabs((double)theta[i] - x[i]) / (1 + fabs(x[i])));
    CHECK(error < 1e-3, "theta is off by %g", error);
    CHECK_OK(besa_rates_status(rates, &got, NULL, &g_error), g_error);
    if (!adamw) CHECK(fabs(got / d - 1) < 1e-4 && d > 0.1, "d is %g, expected %g", got, d);
    besa_rates_destroy(rates);
}

/* Many rows of few columns: the projection's scratch is the largest. */
static void test_rates_of_many_rows(void)
{
    enum { ROWS = 40000 };
    besa_layer_shape shape = { ROWS, 2, BESA_F32 };
    besa_rate_options o;
    besa_rates *rates = NULL;
    float *w = take_floats(2 * ROWS), *scratch = take_floats(2 * ROWS + 2);
    int32_t *n = (int32_t *)take(ROWS * sizeof *n);
    int64_t sum = 0;
    memset(&o, 0, sizeof o);
    o.target = 0.3, o.candidates = 4, o.group_rows = BESA_ALL_ROWS;
    for (int i = 0; i < 2 * ROWS; i++) w[i] = (float)(i % 17 + 1);
    CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error), g_error);
    CHECK_OK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error);
    CHECK_OK(besa_rates_project(rates, &g_error), g_error);
    CHECK_OK(besa_rates_read(rates, 0, NULL, n, &g_error), g_error);
    for (int r = 0; r < ROWS; r++) sum += n[r];
    CHECK(sum == (int64_t)floor(0.3 * 2 * ROWS + 0.5), "%d weights", (int)sum);
    besa_rates_destroy(rates);
}

static void test_thread_counts(void)
{
    static const int threads[] = { -1, 0, 1, 1024, 1025 };
    for (int i = 0; i < 5; i++) {
        besa_cpu_options cpu;
        besa_backend be;
        memset(&cpu, 0, sizeof cpu);
        cpu.threads = threads[i];
        memset(&be, 0x5A, sizeof be);
        besa_result result = besa_cpu_backend(&be, &cpu, &g_error);
        CHECK(!be.workspace && !be.workspace_bytes && !be.error.code && !be.error.message[0], "%d threads: not set up", threads[i]);
        CHECK(result == BESA_OK || !be.destroy, "%d threads: no backend, but it can be destroyed", threads[i]);
        CHECK(result == (i % 4 == 0 ? BESA_ERROR_OPTION : BESA_OK), "%d threads: %s", threads[i], besa_result_string(result));
        if (result == BESA_OK) be.destroy(&be);
    }
}

/* To the nearest bf16, ties to even, by arithmetic. */
static float nearest_bf16(float x)
{
    int exponent;
    double mantissa = frexp((double)x, &exponent) * 256, whole = floor(mantissa), rest = mantissa - whole;
    if (rest > 0.5 || (rest >= 0.5 && fmod(whole, 2) != 0)) whole++;
    return (float)ldexp(whole, exponent - 8);
}

/* Products in bf16 are those of operands rounded beforehand, to the byte: ties, and each way an operand can lie. */
static void test_bf16_products(void)
{
    enum { T = 19, R = 37, C = 70 };
    float *x = take_floats(T * C), *w = take_floats(R * C), *x16 = take_floats(T * C), *w16 = take_floats(R * C);
    float *got = take_floats(R * C), *want = take_floats(R * C);
    besa_cpu_options cpu;
    besa_backend be;
    uint64_t state = 5;
    memset(&cpu, 0, sizeof cpu);
    cpu.threads = 1, cpu.bf16 = 1;
    CHECK_OK(besa_cpu_backend(&be, &cpu, &g_error), g_error);
    for (int i = 0; i < T * C + R * C; i++) {
        float *v = i < T * C ? &x[i] : &w[i - T * C];
        state = state * 6364136223846793005u + 1442695040888963407u;
        *v = (float)((int)(state >> 48) - 32768) / 65536.0f;    /* half of them, and more, are ties or lie beside one */
        if (i % 2) *v = ldexpf(roundf(*v * 1024) + 0.5f, -2 - i % 5);
    }
    for (int i = 0; i < T * C; i++) x16[i] = nearest_bf16(x[i]);
    for (int i = 0; i < R * C; i++) w16[i] = nearest_bf16(w[i]);
    besa_workload work;
    memset(&work, 0, sizeof work);
    work.rows = work.columns = C, work.tokens = T;
    set_workspace(work);
    be.workspace = g_be.workspace, be.workspace_bytes = g_be.workspace_bytes;
    be.linear_forward(&be, got, x, w, BESA_F32, NULL, T, R, C, 0);
    be.linear_forward(&be, want, x16, w16, BESA_F32, NULL, T, R, C, 0);
    CHECK(!memcmp(got, want, T * R * sizeof(float)), "forward");
    be.linear_backward_input(&be, got, x, w, BESA_F32, T, C, R, 0);     /* the same arrays as dY (T, C) and W (C, R) */
    be.linear_backward_input(&be, want, x16, w16, BESA_F32, T, C, R, 0);
    CHECK(!memcmp(got, want, T * R * sizeof(float)), "backward, input");
    be.linear_backward_weight(&be, got, BESA_F32, x, w, T, C, R, 0, C, 0);          /* dY (T, C), X (T, R) */
    be.linear_backward_weight(&be, want, BESA_F32, x16, w16, T, C, R, 0, C, 0);
    CHECK(!memcmp(got, want, C * R * sizeof(float)), "backward, weight");
    be.destroy(&be);
}

/* Hessians whose pivot is 0 or NaN have no factor. */
static void test_singular(void)
{
    for (int kind = 0; kind < 3; kind++) {
        float h[9] = { 1, 1, 0, 1, 1, 0, 0, 0, 2 };
        int32_t dead[3];
        if (kind == 1) h[4] = NAN;              /* the mean of the diagonal is NaN too, and the last column comes first */
        if (kind == 2) h[0] = -1;
        besa_workload w;
        memset(&w, 0, sizeof w);
        w.rows = w.columns = w.hessian_columns = 3, w.tokens = 1;
        set_workspace(w);
        CHECK(g_be.hessian_factor(&g_be, h, dead, 0, 3) == BESA_ERROR_NUMERIC, "kind %d has a factor", kind);
        CHECK(strstr(g_be.error.message, kind == 1 ? "column 2" : "column 0"), "%s", g_be.error.message);
    }
}

/* Public functions use a workspace of their own: the caller's is the backend's again afterwards, whatever came of it. */
static void test_rates_workspace(void)
{
    besa_layer_shape shape = { 3, 8, BESA_F32 };
    besa_rate_options o;
    besa_rates *rates = NULL;
    float w[24], pruned[24], scratch[32];
    char mine[256];
    void *before = g_be.workspace;
    size_t bytes = g_be.workspace_bytes;
    memset(&o, 0, sizeof o);
    o.target = 0.5;
    for (int i = 0; i < 24; i++) w[i] = (float)(i % 7 - 3) + 0.5f;
    g_be.workspace = mine, g_be.workspace_bytes = 17;
#define KEEPS(call)                                                                                \
    do {                                                                                           \
        call;                                                                                      \
        CHECK(g_be.workspace == mine && g_be.workspace_bytes == 17, "%s: another workspace", #call); \
        g_be.workspace = mine, g_be.workspace_bytes = 17;                                          \
    } while (0)
    KEEPS(CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_forward(rates, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_mask(rates, 0, w, pruned, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_gradient(rates, 0, w, w, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_backward(rates, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_optimize(rates, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_project(rates, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_reset(rates, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_fix(rates, 0, 0.25, &g_error), g_error));
    KEEPS(CHECK_OK(besa_rates_reset(rates, &g_error), g_error));
    memset(w, 0, sizeof w);
    KEEPS(CHECK_OK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_MAGNITUDE, NULL, scratch, &g_error), g_error));
    KEEPS(CHECK(besa_rates_project(rates, &g_error) == BESA_ERROR_TARGET, "a target below what is zero"));
    KEEPS(besa_rates_destroy(rates));
#undef KEEPS
    g_be.workspace = before, g_be.workspace_bytes = bytes;
}

/* A trace, a copy of its inputs to prune on, and room for the pruned weights. */
static float *prune_inputs(trace *t, const char *name, void *pruned[BESA_LAYERS])
{
    float *x;
    read_trace(t, name);
    x = take_floats(t->h.count);
    memcpy(x, t->h.f, (size_t)t->h.count * sizeof *x);
    for (int l = 0; l < BESA_LAYERS; l++) pruned[l] = take_floats(t->rows[l] * t->columns[l]);
    return x;
}

/* ---- every importance against its formula, in double -------------------------------------------- */

/* diag(C): U_jj, U'U = inv(H + damping mean(diag H) I), U upper triangular. With H = V V', V upper too, U = inv(V) and
 * U_jj = 1 / V_jj. V takes the place of h (C,C), from the last column to the first. */
static void plain_factor_diagonal(double *diag, double *h, int64_t C, double damping)
{
    double mean = 0;
    for (int64_t j = 0; j < C; j++) mean += h[j * C + j] / (double)C;
    for (int64_t j = 0; j < C; j++) h[j * C + j] += damping * mean;
    for (int64_t j = C - 1; j >= 0; j--) {
        for (int64_t k = j + 1; k < C; k++) h[j * C + j] -= h[j * C + k] * h[j * C + k];
        h[j * C + j] = sqrt(h[j * C + j]);
        for (int64_t i = 0; i < j; i++) {
            for (int64_t k = j + 1; k < C; k++) h[i * C + j] -= h[i * C + k] * h[j * C + k];
            h[i * C + j] /= h[j * C + j];
        }
        diag[j] = 1 / h[j * C + j];
    }
}

/* The factor of |w|^power per column, by the importance's name; returns the power. x (T,C). */
static int plain_scale(const char *name, double *scale, const float *x, int64_t T, int64_t C, double damping)
{
    double *h = (double *)take((size_t)(C * C) * sizeof *h);
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < C; i++)
            for (int64_t j = 0; j < C; j++) h[i * C + j] += 2.0 / (double)T * (double)x[t * C + i] * (double)x[t * C + j];
    for (int64_t j = 0; j < C; j++) scale[j] = sqrt(h[j * C + j]); /* norm2 but for a factor of all */
    if (!strcmp(name, "wanda")) return 1;
    if (!strcmp(name, "relative")) { /* and by shares of row and column, which the score has besides */
        for (int64_t j = 0; j < C; j++) scale[j] = sqrt(scale[j]);
        return 1;
    }
    for (int64_t j = 0; j < C; j++) scale[j] = pow(scale[j], 0.6);
    if (!strcmp(name, "gradient")) return 1;    /* of a fixed layer no gradients are asked for */
    for (int64_t j = 0; j < C; j++) scale[j] = 1;
    if (!strcmp(name, "magnitude")) return 1;
    plain_factor_diagonal(scale, h, C, damping);
    if (!strcmp(name, "sparsegpt")) for (int64_t j = 0; j < C; j++) scale[j] = 1 / scale[j];
    else if (!strcmp(name, "sparsegpt-squared")) for (int64_t j = 0; j < C; j++) scale[j] = 1 / (scale[j] * scale[j]);
    else CHECK(0, "this test has no formula for the importance %s", name);
    return 2;
}

/* Rows of what: half of the columns are gone, and none of those scores above one that stays. */
static void check_lowest_gone(const char *what, const float *w, const float *pruned, const double *scale, int power, int relative,
                              int64_t R, int64_t C)
{
    double *columns = (double *)take((size_t)C * sizeof *columns);
    for (int64_t i = 0; i < R * C; i++) columns[i % C] += fabs((double)w[i]);
    for (int64_t r = 0; r < R; r++) {
        double gone = 0, kept = INFINITY, row = 0;
        for (int64_t j = 0; j < C; j++) row += fabs((double)w[r * C + j]);
        int64_t zeros = 0;
        for (int64_t j = 0; j < C; j++) {
            double score = pow(fabs((double)w[r * C + j]), power) * scale[j] * (relative ? 1 / row + 1 / columns[j] : 1);
            if (pruned[r * C + j] == 0) zeros++, gone = fmax(gone, score);
            else kept = fmin(kept, score);
        }
        CHECK(zeros == C / 2 && gone <= kept * (1 + 1e-4), "%s row %d: %d of %d gone, the highest of score %.9g; %.9g stays",
              what, (int)r, (int)zeros, (int)C, gone, kept);
    }
}

static const char *const g_importance[] = {
#define NAME(value, name, statistic, power, exponent, gradient, relative) name,
    BESA_IMPORTANCES(NAME)
#undef NAME
};

/* The whole way: statistics of the block's inputs, scores, ranks, masks at half of every row. */
static void test_importance(int importance, double damping)
{
    static const besa_fixed_rate half = { "*", 0.5 };
    trace t;
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    void *pruned[BESA_LAYERS];
    float *x = prune_inputs(&t, "trace_published_penalty", pruned), *y = take_floats(t.h.count);
    int64_t T = STEPS * t.seqlen;
    besa_activations acts = new_activations(&t.block, T);
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5, o.importance = (besa_importance)importance, o.damping = damping;
    o.fixed = &half, o.num_fixed = 1;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &t.block.shape, BESA_F32, 0, &o, STEPS, t.seqlen, &g_error), g_error);
    if (!pruner) return;
    CHECK_OK(besa_pruner_run(pruner, &t.block, NULL, x, NULL, pruned, NULL, &g_error), g_error);
    besa_pruner_destroy(pruner);
    set_workspace(besa_block_workload(&t.block.shape, STEPS, t.seqlen));
    CHECK_OK(besa_block_forward(&g_be, &t.block, &acts, t.h.f, y, STEPS, t.seqlen, &g_error), g_error);
    for (int l = 0; l < BESA_LAYERS; l++) {
        const void *input = l <= BESA_V ? acts.a : l == BESA_O ? acts.attn : l == BESA_DOWN ? acts.z : acts.m;
        double *scale = (double *)take((size_t)t.columns[l] * sizeof *scale);
        int power = plain_scale(g_importance[importance], scale, (const float *)input, T, t.columns[l], damping ? damping : 0.01);
        check_lowest_gone(g_layer[l], (const float *)t.block.weight[l], (const float *)pruned[l], scale, power,
                          importance == BESA_IMPORTANCE_RELATIVE, t.rows[l], t.columns[l]);
    }
}

/* The same by the layer API, with statistics from the formula. */
static void test_importance_of_layer(int importance)
{
    enum { R = 9, C = 40, T = 300 };
    float w[R * C], pruned[R * C], statistic[C], *x = take_floats(T * C), *scratch = take_floats((R + 2) * C);
    double scale[C], diag[C], *h = (double *)take(C * C * sizeof *h);
    besa_layer_shape shape = { R, C, BESA_F32 };
    besa_rate_options o;
    besa_rates *rates = NULL;
    for (int i = 0; i < T * C; i++) x[i] = (float)(sin(0.37 * i * i) * (1 + 9.0 * (i % C) / C));
    for (int i = 0; i < R * C; i++) w[i] = (float)sin(1.7 * i * i + 1);
    int power = plain_scale(g_importance[importance], scale, x, T, C, 0.01);
    for (int i = 0; i < C; i++)
        for (int j = 0; j < C; j++)
            for (int t = 0; t < T; t++) h[i * C + j] += 2.0 / T * (double)x[t * C + i] * (double)x[t * C + j];
    for (int j = 0; j < C; j++) statistic[j] = (float)(h[j * C + j] * T / 2);
    plain_factor_diagonal(diag, h, C, 0.01);
    for (int j = 0; j < C && power == 2; j++) statistic[j] = (float)diag[j];
    memset(&o, 0, sizeof o);
    o.target = 0.5;
    CHECK_OK(besa_rates_create(&rates, &g_be, &shape, 1, &o, &g_error), g_error);
    if (!rates) return;
    if (importance == BESA_IMPORTANCE_GRADIENT) {
        CHECK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_GRADIENT, statistic, scratch, &g_error) == BESA_ERROR_OPTION &&
              strstr(g_error.message, "besa_pruner_run"), "%s", g_error.message);
        besa_rates_destroy(rates);
        return;
    }
    CHECK_OK(besa_rates_rank(rates, 0, w, (besa_importance)importance,
                             !strcmp(g_importance[importance], "magnitude") ? NULL : statistic, scratch, &g_error), g_error);
    CHECK_OK(besa_rates_fix(rates, 0, 0.5, &g_error), g_error);
    CHECK_OK(besa_rates_mask(rates, 0, w, pruned, &g_error), g_error);
    check_lowest_gone(g_importance[importance], w, pruned, scale, power, importance == BESA_IMPORTANCE_RELATIVE, R, C);
    CHECK_OK(besa_rates_fix(rates, 0, 0, &g_error), g_error);
    CHECK_OK(besa_rates_mask(rates, 0, w, pruned, &g_error), g_error);
    CHECK(!memcmp(w, pruned, sizeof w), "%s: something goes at a sparsity of 0", g_importance[importance]);
    besa_rates_destroy(rates);
}

static void test_importances(void)
{
    for (int i = 0; i < BESA_IMPORTANCE_COUNT; i++) {
        test_importance_of_layer(i);
        test_importance(i, 0);
        test_importance(i, 0.5);
    }
}

/* ---- what is not finite is named ----------------------------------------------------------------- */

enum { BAD_LOSS = 1, BAD_GRADIENT };

static struct { int what, calls, at; } g_spoil;

static besa_result (*g_block_loss)(besa_backend *, float *, void *, const void *, const void *, const float *, float, int64_t,
                                   int64_t, int);
static besa_result (*g_bucket_gradient)(besa_backend *, float *, const void *, besa_dtype, const void *, besa_dtype, const void *,
                                        const uint16_t *, int64_t, int64_t, int64_t);

static besa_result spoiled_loss(besa_backend *be, float *loss, void *dy, const void *y, const void *yref, const float *sumsq,
                                float scale, int64_t tokens, int64_t d, int accumulate)
{
    besa_result r = g_block_loss(be, loss, dy, y, yref, sumsq, scale, tokens, d, accumulate);
    if (g_spoil.what == BAD_LOSS && g_spoil.calls++ == g_spoil.at) *loss = INFINITY;
    return r;
}

static besa_result spoiled_gradient(besa_backend *be, float *sums, const void *dw, besa_dtype dw_dtype, const void *w,
                                    besa_dtype dtype, const void *rank, const uint16_t *bucket, int64_t rows, int64_t columns,
                                    int64_t buckets)
{
    besa_result r = g_bucket_gradient(be, sums, dw, dw_dtype, w, dtype, rank, bucket, rows, columns, buckets);
    if (g_spoil.what == BAD_GRADIENT && g_spoil.calls++ == g_spoil.at) sums[0] = NAN;
    return r;
}

/* Prune the block with call number `at` spoiled, or its inputs as the caller left them in t; the error names `words`. */
static void expect_not_finite(trace *t, const float *inputs, const besa_prune_options *o, int what, int at, const char *words)
{
    besa_pruner *pruner = NULL;
    besa_block_report report;
    void *pruned[BESA_LAYERS];
    float *x = (float *)malloc((size_t)t->h.count * sizeof *x);
    memcpy(x, inputs, (size_t)t->h.count * sizeof *x);
    for (int l = 0; l < BESA_LAYERS; l++) pruned[l] = malloc((size_t)(t->rows[l] * t->columns[l]) * sizeof(float));
    g_spoil.what = what, g_spoil.calls = 0, g_spoil.at = at;
    g_block_loss = g_be.block_loss, g_bucket_gradient = g_be.bucket_gradient;
    g_be.block_loss = spoiled_loss, g_be.bucket_gradient = spoiled_gradient;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &t->block.shape, BESA_F32, 0, o, STEPS, t->seqlen, &g_error), g_error);
    besa_result result = besa_pruner_run(pruner, &t->block, "model.layers.3.", x, NULL, pruned, &report, &g_error);
    CHECK(result == BESA_ERROR_NOT_FINITE && strstr(g_error.message, words) && !strstr(g_error.message, "nan"),
          "method %d, call %d: %s, expected %s", (int)o->method, at, result ? g_error.message : "success", words);
    besa_pruner_destroy(pruner);
    g_be.block_loss = g_block_loss, g_be.bucket_gradient = g_bucket_gradient;
    for (int l = 0; l < BESA_LAYERS; l++) free(pruned[l]);
    free(x);
}

/* A loss that overflows, in every pass of every method: the message names block, pass and sequences. */
static void test_loss_overflow(void)
{
    static const besa_method method[] = { BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT, BESA_METHOD_MAGNITUDE };
    trace t;
    besa_prune_options o;
    char words[160];
    read_trace(&t, "trace_published_penalty");
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5, o.rates.zero_start = 1;
    /* a loss a sequence: 2 of uniform masks, 2 of the first masks, 16 of steps, 16 of the commit pass */
    static const int call[] = { 0, 1, 2, 3, 4, 6, 19, 20, 21, 22, 35 };
    for (int i = 0; i < 11; i++) {
        int at = call[i], step = at - 4, commit = step - STEPS;
        if (at < 4) snprintf(words, sizeof words, "model.layers.3.*: the reconstruction loss of sequences 0 .. 1 is not finite "
                             "before learning, with %s masks", at < 2 ? "uniform" : "the first");
        else if (commit < 0) snprintf(words, sizeof words, "sequences %d .. %d is not finite in learning step %d:", step, step, step + 1);
        else snprintf(words, sizeof words, "sequences %s is not finite in the commit pass", commit < 2 ? "0 .. 1" : "2 .. 15");
        expect_not_finite(&t, t.h.f, &o, BAD_LOSS, at, words);
    }
    o.rates.zero_start = 0, o.batch_size = 5, o.epochs = 2; /* one a batch: 1 of the first 2 sequences, 4 an epoch */
    expect_not_finite(&t, t.h.f, &o, BAD_LOSS, 1 + 4 + 2, "sequences 10 .. 14 is not finite in learning step 7:");
    o.batch_size = o.epochs = 0;
    for (int m = 0; m < 3; m++)
        for (int at = 0; at < 2; at++) {        /* baselines have a reference of 2 sequences */
            o.method = method[m];
            expect_not_finite(&t, t.h.f, &o, BAD_LOSS, at, "model.layers.3.*: the reconstruction loss of sequences 0 .. 1 is not "
                              "finite in the commit pass");
            CHECK(g_spoil.calls == 2, "method %d: %d losses", m, g_spoil.calls);
        }
}

/* Activations that overflow in the dense pass, and rates that do while losses are finite. */
static void test_overflow_named(void)
{
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT, BESA_METHOD_MAGNITUDE };
    static const besa_fixed_rate fixed[] = { { "self_attn", 0.5 }, { "gate_proj", 0.5 }, { "down_proj", 0.5 } };
    trace t;
    besa_prune_options o;
    read_trace(&t, "trace_published_penalty");
    int64_t sequence = t.seqlen * t.hidden, up = t.rows[BESA_UP] * t.columns[BESA_UP];
    float *x = take_floats(t.h.count), *w = take_floats(up);
    const void *kept = t.block.weight[BESA_UP];
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5;
    memcpy(x, t.h.f, (size_t)t.h.count * sizeof *x);
    for (int64_t i = sequence; i < 2 * sequence; i++) x[i] *= 1e22f;
    memcpy(w, kept, (size_t)up * sizeof *w);
    for (int64_t i = 0; i < up; i++) w[i] *= 1e25f;
    for (int m = 0; m < 4; m++) {
        o.method = method[m];
        expect_not_finite(&t, x, &o, 0, 0, "model.layers.3.*: the channel norms of the reference for sequences 1 .. 1 are not finite "
                          "in the dense pass");
        t.block.weight[BESA_UP] = w;
        expect_not_finite(&t, t.h.f, &o, 0, 0, o.method == BESA_METHOD_MAGNITUDE ? "sequences 0 .. 0 are not finite in the dense pass"
                          : "model.layers.3.mlp.down_proj: the sums of squares of its inputs are not finite in the dense pass");
        t.block.weight[BESA_UP] = kept;
    }
    o.method = BESA_METHOD_BESA;
    expect_not_finite(&t, t.h.f, &o, BAD_GRADIENT, 7 * (STEPS - 1) + 2, "not finite: the gradient of mlp.up_proj is not");
    expect_not_finite(&t, t.h.f, &o, BAD_GRADIENT, 7 * (STEPS - 1) - 1, "not finite: the gradient of every layer is not");
    o.fixed = fixed, o.num_fixed = 3;           /* the only one that learns has its name */
    expect_not_finite(&t, t.h.f, &o, BAD_GRADIENT, STEPS - 1, "not finite: the gradient of mlp.up_proj is not");
    o.num_fixed = 0;
    o.rates.lr = 9e29, o.rates.weight_decay = 9e29, o.rates.optimizer = BESA_ADAMW;
    expect_not_finite(&t, t.h.f, &o, 0, 0, "the mean rate is not finite: ");
}

static int g_waits[BESA_QUEUE_COUNT];
static besa_result (*g_synchronize)(besa_backend *, besa_queue);

static besa_result counted_synchronize(besa_backend *be, besa_queue q)
{
    g_waits[q]++;
    return g_synchronize(be, q);
}

/* Nothing in a block waits for the device: once, at its end, the results come home. */
static void test_waits(besa_method method)
{
    trace t;
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    besa_block_report report;
    void *pruned[BESA_LAYERS];
    float *x = prune_inputs(&t, "trace_published_penalty", pruned);
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5, o.method = method;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &t.block.shape, BESA_F32, 0, &o, STEPS, t.seqlen, &g_error), g_error);
    if (!pruner) return;
    memset(g_waits, 0, sizeof g_waits);
    g_synchronize = g_be.synchronize;
    g_be.synchronize = counted_synchronize;
    CHECK_OK(besa_pruner_run(pruner, &t.block, NULL, x, NULL, pruned, &report, &g_error), g_error);
    g_be.synchronize = g_synchronize;
    CHECK(g_waits[BESA_QUEUE_COMPUTE] == 1 && g_waits[BESA_QUEUE_STAGE] == 0, "%d waits for the compute queue",
          g_waits[BESA_QUEUE_COMPUTE]);
    CHECK(report.seconds[BESA_PASS_DENSE] > 0 && report.seconds[BESA_PASS_COMMIT] > 0, "passes are not timed");
    besa_pruner_destroy(pruner);
}

/* As a device does: a Hessian that has no factor is told of when the queue is waited for, and then the results are there. */
static besa_result (*g_hessian_factor)(besa_backend *, float *, int32_t *, float, int64_t);
static besa_result g_later;

static besa_result late_factor(besa_backend *be, float *h, int32_t *dead, float damping, int64_t columns)
{
    besa_result result = g_hessian_factor(be, h, dead, damping, columns);
    if (result != BESA_OK) g_later = result;
    return BESA_OK;
}

static besa_result late_synchronize(besa_backend *be, besa_queue q)
{
    besa_result result = g_later;
    if (q != BESA_QUEUE_COMPUTE) return g_synchronize(be, q);
    g_later = BESA_OK;
    return result;
}

/* A weight that is NaN is named, whenever the backend says that a Hessian has no factor. */
static void test_late_factor(void)
{
    trace t;
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    besa_backend be = g_be;
    besa_block block;
    void *pruned[BESA_LAYERS];
    float *x = prune_inputs(&t, "trace_published_penalty", pruned), *w;
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5, o.method = BESA_METHOD_SPARSEGPT;
    block = t.block;
    size_t bytes = (size_t)(t.rows[BESA_V] * t.columns[BESA_V]) * sizeof *w;
    w = (float *)memcpy(take(bytes), t.block.weight[BESA_V], bytes);
    block.weight[BESA_V] = w;
    w[5] = NAN;
    for (int late = 0; late < 2; late++) {
        if (late) {
            g_hessian_factor = be.hessian_factor, g_synchronize = be.synchronize;
            be.hessian_factor = late_factor, be.synchronize = late_synchronize;
        }
        CHECK_OK(besa_pruner_create(&pruner, &be, &t.block.shape, BESA_F32, 0, &o, STEPS, t.seqlen, &g_error), g_error);
        if (!pruner) return;
        CHECK(besa_pruner_run(pruner, &block, NULL, x, NULL, pruned, NULL, &g_error) == BESA_ERROR_NOT_FINITE &&
              strstr(g_error.message, "v_proj.weight: 1 weights are NaN"), "%s: %s", late ? "late" : "at once", g_error.message);
        besa_pruner_destroy(pruner);
    }
}

static void (*g_free)(besa_backend *, void *);
static int g_freed;

static void counted_free(besa_backend *be, void *memory)
{
    g_freed += memory != NULL;
    for (int q = 0; q < BESA_QUEUE_COUNT; q++)
        CHECK(!memory || g_waits[q] > 0, "memory is freed before queue %d is done with it", q);
    g_free(be, memory);
}

/* What waits from here on and what is freed is counted, or is so no more; returns what was freed. */
static int count_frees(int on)
{
    memset(g_waits, 0, sizeof g_waits);
    if (on) {
        g_synchronize = g_be.synchronize, g_free = g_be.free;
        g_be.synchronize = counted_synchronize, g_be.free = counted_free;
        return g_freed = 0;
    }
    g_be.synchronize = g_synchronize, g_be.free = g_free;
    return g_freed;
}

/* Device memory is freed when every queue is done: of a pruner, of rates, of a run. */
static void test_frees(void)
{
    trace t;
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    besa_rates *rates = NULL;
    besa_layer_shape layer = { 8, 8, BESA_F32 };
    besa_checkpoint *checkpoint = NULL;
    void *pruned[BESA_LAYERS];
    char path[600];
    int32_t ids[4] = { 1, 2, 3, 4 };
    double perplexity;
    prune_inputs(&t, "trace_published_penalty", pruned);
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &t.block.shape, BESA_F32, 0, &o, STEPS, t.seqlen, &g_error), g_error);
    count_frees(1);
    besa_pruner_destroy(pruner);
    CHECK(count_frees(0) == 1, "%d blocks of memory for a pruner", g_freed);
    CHECK_OK(besa_rates_create(&rates, &g_be, &layer, 1, &o.rates, &g_error), g_error);
    count_frees(1);
    besa_rates_destroy(rates);
    CHECK(count_frees(0) == 1, "%d blocks of memory for rates", g_freed);
    snprintf(path, sizeof path, "%s/checkpoints/llama_mha_f16", g_reference);
    CHECK_OK(besa_checkpoint_open(&checkpoint, path, &g_error), g_error);
    if (!checkpoint) return;
    count_frees(1);
    CHECK_OK(besa_perplexity(checkpoint, &g_be, ids, 1, 4, &perplexity, NULL, NULL, NULL, &g_error), g_error);
    CHECK(count_frees(0) == 1, "%d blocks of memory for a run", g_freed);
    besa_checkpoint_close(checkpoint);
}

/* A pruner runs only on blocks of the shape, type and norms that it was made for. */
static void test_other_blocks(void)
{
    trace t;
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    void *pruned[BESA_LAYERS];
    float *x = prune_inputs(&t, "trace_published_penalty", pruned);
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5, o.method = BESA_METHOD_WANDA;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &t.block.shape, BESA_F32, 0, &o, STEPS, t.seqlen, &g_error), g_error);
    if (!pruner) return;
    for (int i = 0; i < 8; i++) {
        besa_block other = t.block;
        switch (i) {
        case 0: other.shape.hidden_size += 2; break;
        case 1: other.shape.intermediate_size++; break;
        case 2: other.shape.num_attention_heads *= 2; break;
        case 3: other.shape.num_key_value_heads *= 2; break;
        case 4: other.shape.head_dim += 2; break;
        case 5: other.dtype = BESA_BF16; break;
        case 6: other.q_norm = other.norm1; break;
        case 7: other.k_norm = other.norm1; break;
        }
        g_error.message[0] = 0;
        CHECK(besa_pruner_run(pruner, &other, NULL, x, NULL, pruned, NULL, &g_error) == BESA_ERROR_OPTION &&
              strstr(g_error.message, "not those of the pruner"), "case %d: \"%s\"", i, g_error.message);
    }
    static const char *const missing[] = { "norm1 is NULL", "norm2 is NULL", "rope_cos is NULL", "rope_sin is NULL", "weight of k_proj is NULL",
                                           "pruned of up_proj is NULL", "pruned of o_proj is the weight itself", "x is NULL", "201 characters" };
    char name[202];
    memset(name, 'a', 201), name[201] = 0;
    for (int i = 0; i < 9; i++) {
        besa_block other = t.block;
        void *to[BESA_LAYERS];
        memcpy(to, pruned, sizeof to);
        switch (i) {
        case 0: other.norm1 = NULL; break;
        case 1: other.norm2 = NULL; break;
        case 2: other.rope_cos = NULL; break;
        case 3: other.rope_sin = NULL; break;
        case 4: other.weight[BESA_K] = NULL; break;
        case 5: to[BESA_UP] = NULL; break;
        case 6: other.weight[BESA_O] = to[BESA_O]; break;
        }
        g_error.message[0] = 0;
        CHECK(besa_pruner_run(pruner, &other, i == 8 ? name : NULL, i == 7 ? NULL : x, NULL, to, NULL, &g_error) == BESA_ERROR_OPTION &&
              strstr(g_error.message, missing[i]), "%s: \"%s\"", missing[i], g_error.message);
    }
    CHECK_OK(besa_pruner_run(pruner, &t.block, NULL, x, NULL, pruned, NULL, &g_error), g_error);
    besa_pruner_destroy(pruner);
}

/* ---- kept weights that learn, as trace_weights.py has them ------------------------------------- */

typedef struct learned { double loss[STEPS]; int64_t steps; } learned;

static besa_result learned_step(void *user, const besa_step *step)
{
    learned *l = (learned *)user;
    l->steps = step->step;
    if (step->step <= STEPS) l->loss[step->step - 1] = (double)*step->loss;
    return BESA_OK;
}

/* Two blocks, the second with every layer's rows turned by one. What is learned of the weights, beside what they were, is
 * PyTorch's; both's rates move weights across the masks' edges, where float and double now and then differ by one. */
static void test_trace_weights(const char *name, int both, int64_t rank_interval)
{
    enum { SEQUENCES = 8 };
    const char *stored = folder("../trace_weights");
    trace t;
    void *pruned[BESA_LAYERS];
    float *x = prune_inputs(&t, "trace_published_penalty", pruned), *dense = take_floats(t.h.count);
    int64_t steps = both ? 2 * SEQUENCES : SEQUENCES;
    char file[64];
    array losses;
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    learned l;
    memset(&o, 0, sizeof o);
    memset(&l, 0, sizeof l);
    memcpy(dense, x, (size_t)t.h.count * sizeof *x);
    snprintf(file, sizeof file, "loss_%s", name);
    losses = npy_load(stored, file, 2, steps, 0);
    o.method = both ? BESA_METHOD_BESA : BESA_METHOD_WANDA, o.rates.target = both ? 0.47 : 0.5;
    o.rates.optimizer = BESA_ADAMW, o.rates.lr = 0.05, o.learn = both ? BESA_LEARN_BOTH : BESA_LEARN_WEIGHTS;
    o.weight_epochs = 1, o.dense_share = 0.25, o.rank_interval = rank_interval, o.step = learned_step, o.user = &l;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &t.block.shape, BESA_F32, 0, &o, SEQUENCES, t.seqlen, &g_error), g_error);
    for (int b = 0; b < 2 && pruner; b++) {
        besa_block block = t.block;
        for (int i = 0; i < BESA_LAYERS && b == 1; i++) {
            const float *from = (const float *)t.block.weight[i];
            int64_t R = t.rows[i], C = t.columns[i];
            float *turned = take_floats(R * C);
            for (int64_t r = 0; r < R; r++) memcpy(turned + (r + 1) % R * C, from + r * C, (size_t)C * sizeof *turned);
            block.weight[i] = turned;
        }
        CHECK_OK(besa_pruner_run(pruner, &block, NULL, x, dense, pruned, NULL, &g_error), g_error);
        CHECK(l.steps == steps, "%d steps, expected %d", (int)l.steps, (int)steps);
        for (int64_t s = 0; s < steps; s++) {
            double want = losses.v[b * steps + s];
            CHECK(fabs(l.loss[s] - want) <= (both ? 5e-3 : 2e-4) * want, "block %d, step %d: loss %.9g, PyTorch has %.9g", b,
                  (int)s + 1, l.loss[s], want);
        }
        for (int i = 0; i < BESA_LAYERS; i++) {
            int64_t n = t.rows[i] * t.columns[i];
            const float *got = (const float *)pruned[i], *from = (const float *)block.weight[i];
            double error = 0, moved = 0, masks = 0;
            array want;
            snprintf(file, sizeof file, "%s_%d_%s", name, b, g_layer[i]);
            want = npy_load(stored, file, t.rows[i], t.columns[i], 0);
            for (int64_t k = 0; k < n; k++) {
                masks += (got[k] == 0) != (want.v[k] == 0);
                if (got[k] == 0 || want.v[k] == 0) continue;
                error += ((double)got[k] - want.v[k]) * ((double)got[k] - want.v[k]);
                moved += (want.v[k] - (double)from[k]) * (want.v[k] - (double)from[k]);
            }
            if (getenv("TEST_VERBOSE"))
                printf("    block %d %s: %.0f other masks, weights off by %.2e of their way\n", b, g_layer[i], masks, sqrt(error / moved));
            CHECK(masks <= (both ? 0.01 * (double)n : 0), "block %d, %s: %.0f weights are masked otherwise", b, g_layer[i], masks);
            CHECK(sqrt(error) <= (both ? 0.1 : 0.01) * sqrt(moved), "block %d, %s: weights off by %g of their way", b, g_layer[i],
                  sqrt(error / moved));
        }
    }
    besa_pruner_destroy(pruner);
}

/* The same run by besa_pruner_run, which takes its own jumps: a row at rate 1/2 is a hair from losing one weight more,
 * so runs part within rounding's reach from the first steps on and the bounds widen with the steps. */
static void test_trace(const char *name, double alpha_bound, double mask_bound)
{
    trace t;
    besa_prune_options o;
    besa_pruner *pruner = NULL;
    besa_block_report report;
    void *pruned[BESA_LAYERS];
    float *x = prune_inputs(&t, name, pruned);
    int64_t differ = 0;
    memset(&o, 0, sizeof o);
    memset(&report, 0, sizeof report);
    o.rates.target = t.target;
    CHECK_OK(besa_preset(&o, "published-row", &g_error), g_error);
    o.rates.d_coef = t.d_coef;
    o.rates.penalty = t.penalty > 0 ? t.penalty : BESA_NONE;
    o.step = trace_step;
    o.user = &t;
    g_rate_forward = g_be.rate_forward;
    g_be.rate_forward = rounded_rate_forward;
    CHECK_OK(besa_pruner_create(&pruner, &g_be, &t.block.shape, BESA_F32, 0, &o, STEPS, t.seqlen, &g_error), g_error);
    if (!pruner) return;
    CHECK_OK(besa_pruner_run(pruner, &t.block, NULL, x, NULL, pruned, &report, &g_error), g_error);
    besa_pruner_destroy(pruner);
    g_be.rate_forward = g_rate_forward;
    CHECK(t.step == STEPS, "%d steps", t.step);
    for (int i = 0; i < STEPS; i++) {           /* step 1 is the same masks; then the coins fall differently */
        CHECK(t.loss_error[i] <= (i ? 0.15 : 1e-5), "step %d: loss off by %.3g", i + 1, t.loss_error[i]);
        CHECK(t.d_error[i] <= 0.2, "step %d: d off by %.3g", i + 1, t.d_error[i]);
        CHECK(t.alpha_error[i] <= 3e-7 + alpha_bound * t.alpha_spread[i], "step %d: rates off by %.3g of %.3g", i + 1,
              t.alpha_error[i], t.alpha_spread[i]);
    }
    for (int l = 0; l < BESA_LAYERS; l++) {
        char file[32];
        array want;
        snprintf(file, sizeof file, "pruned_%s", g_layer[l]);
        want = npy_load(t.dir, file, t.rows[l], t.columns[l], 0);
        for (int64_t i = 0; i < want.count; i++) differ += ((float *)pruned[l])[i] != want.f[i];
    }
    if (getenv("TEST_VERBOSE")) printf("    %d of %d final weights differ\n", (int)differ, (int)t.weights);
    CHECK((double)differ <= mask_bound * (double)t.weights, "%d of %d final weights differ", (int)differ, (int)t.weights);
    CHECK(fabs(report.sparsity - t.sparsity.v[STEPS - 1]) < 0.02, "sparsity %g", report.sparsity);
}

/* A block's shape given at level 2 has the ranges of a config's. */
static void test_shapes(void)
{
    static const struct { const char *name; int64_t hidden, intermediate, heads, kv, dim, window; double eps; } t[] = {
        { NULL, 32, 64, 4, 2, 8, 0, 1e-5 }, { NULL, 32, 64, 4, 2, 8, 5, 1e-12 }, { "rms_norm_eps is -1", 32, 64, 4, 2, 8, 0, -1 },
        { "rms_norm_eps", 32, 64, 4, 2, 8, 0, NAN }, { "rms_norm_eps", 32, 64, 4, 2, 8, 0, 1.5 }, { "hidden_size", 0, 64, 4, 2, 8, 0, 1e-5 },
        { "hidden_size is 16777217", 16777217, 64, 4, 2, 8, 0, 1e-5 }, { "intermediate_size", 32, -1, 4, 2, 8, 0, 1e-5 },
        { "num_attention_heads", 32, 64, 65537, 1, 8, 0, 1e-5 }, { "num_key_value_heads", 32, 64, 4, 0, 8, 0, 1e-5 },
        { "multiple", 32, 64, 4, 3, 8, 0, 1e-5 }, { "head_dim is 0", 32, 64, 4, 2, 0, 0, 1e-5 }, { "even", 32, 64, 4, 2, 7, 0, 1e-5 },
        { "sliding_window is -1", 32, 64, 4, 2, 8, -1, 1e-5 } };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        besa_block_shape s;
        besa_prune_options o;
        besa_pruner *pruner = NULL;
        memset(&s, 0, sizeof s);
        memset(&o, 0, sizeof o);
        o.rates.target = 0.5;
        s.hidden_size = t[i].hidden, s.intermediate_size = t[i].intermediate, s.num_attention_heads = t[i].heads;
        s.num_key_value_heads = t[i].kv, s.head_dim = t[i].dim, s.sliding_window = t[i].window, s.rms_norm_eps = t[i].eps;
        besa_result result = besa_pruner_create(&pruner, &g_be, &s, BESA_F32, 0, &o, 2, 8, &g_error);
        CHECK(result == (t[i].name ? BESA_ERROR_OPTION : BESA_OK) && (!t[i].name || strstr(g_error.message, t[i].name)), "case %d: %s",
              (int)i, result ? g_error.message : "taken");
        besa_pruner_destroy(pruner);
    }
    CHECK(!strcmp(besa_layer_name(BESA_Q), "q_proj") && !strcmp(besa_layer_name(BESA_DOWN), "down_proj"), "names of layers");
    CHECK(!strcmp(besa_layer_name(-1), "?") && !strcmp(besa_layer_name(BESA_LAYERS), "?"), "names of no layers");
}

/* ---- checkpoints ----------------------------------------------------------------------------- */

/* Every architecture, element type and file layout: logits as transformers has them after loading the directory in
 * fp32, and the negative log-likelihood that follows. The first set of logits was made with rope frequencies rounded to
 * the checkpoint's type, which transformers itself does not repeat: that rounding is the tolerance. */
static void test_checkpoint(const char *name, double rounding)
{
    enum { COUNT = 2, SEQLEN = 40, VOCAB = 199 };
    char dir[512];
    besa_checkpoint *checkpoint = NULL;
    array ids, logits, exact;
    int32_t id[COUNT * SEQLEN];
    float *got = take_floats(COUNT * SEQLEN * VOCAB);
    double ppl = 0, nll[COUNT] = { 0, 0 }, want = 0, rounded;
    snprintf(dir, sizeof dir, "%s/%s", folder("checkpoints"), name);
    ids = npy_load(dir, "ids", COUNT, SEQLEN, 0);
    logits = npy_load(dir, "logits", COUNT, SEQLEN, VOCAB);
    exact = npy_load(dir, "logits_loaded", COUNT, SEQLEN, VOCAB);
    rounded = json_number(dir, "expected.json", "nll_per_token");
    for (int i = 0; i < COUNT * SEQLEN; i++) id[i] = (int32_t)ids.v[i];
    for (int i = 0; i < COUNT * SEQLEN; i++) {
        double sum = 0;
        for (int v = 0; v < VOCAB; v++) sum += exp(exact.v[i * VOCAB + v]);
        if ((i + 1) % SEQLEN) want += (log(sum) - exact.v[i * VOCAB + id[i + 1]]) / (COUNT * (SEQLEN - 1));
    }
    CHECK_OK(besa_checkpoint_open(&checkpoint, dir, &g_error), g_error);
    if (!checkpoint) return;
    CHECK_OK(besa_logits(checkpoint, &g_be, id, COUNT, SEQLEN, got, &g_error), g_error);
    CHECK_CLOSE("logits", got, exact.v, exact.count, 1e-5);
    CHECK_CLOSE("logits with rounded rope", got, logits.v, logits.count, rounding);
    CHECK_OK(besa_perplexity(checkpoint, &g_be, id, COUNT, SEQLEN, &ppl, nll, NULL, NULL, &g_error), g_error);
    CHECK(fabs((nll[0] + nll[1]) / 2 - want) < 1e-6 && fabs(log(ppl) - want) < 1e-6, "nll %.9g and %.9g, expected %.9g",
          (nll[0] + nll[1]) / 2, log(ppl), want);
    CHECK(fabs(log(ppl) - rounded) < 0.1 * rounding, "nll %.9g, with rounded rope %.9g", log(ppl), rounded);
    besa_checkpoint_close(checkpoint);
}

/* Forms of checkpoints that people have: what is said on opening, by a plan and when pruning, and the mean negative log-likelihood of each window as
 * transformers 5 has it for `expected`, a case of the same tensors. */
static void test_case(const char *name, const char *expected, const char *note)
{
    enum { WINDOWS = 4, SEQLEN = 64 };
    char dir[512], model[600], path[600];
    besa_checkpoint *checkpoint = NULL;
    besa_tokens tokens;
    int32_t ids[WINDOWS * SEQLEN];
    double ppl, nll[WINDOWS], want[WINDOWS];
    snprintf(dir, sizeof dir, "%s/%s", g_cases, name);
    snprintf(model, sizeof model, "%s/model", dir);
    snprintf(path, sizeof path, "%s/tokens.npy", dir);
    snprintf(dir, sizeof dir, "%s/%s", g_cases, expected);
    json_numbers(dir, "expected.json", "transformers_nll", want, WINDOWS);
    CHECK_OK(besa_checkpoint_open(&checkpoint, model, &g_error), g_error);
    if (!checkpoint) return;
    CHECK(strstr(besa_checkpoint_notes(checkpoint), note), "notes: \"%s\"", besa_checkpoint_notes(checkpoint));
    CHECK_OK(besa_tokens_load(&tokens, path, &g_error), g_error);
    CHECK_OK(besa_tokens_sample(&tokens, WINDOWS, SEQLEN, 0, besa_checkpoint_config(checkpoint)->vocab_size, ids, &g_error), g_error);
    CHECK_OK(besa_perplexity(checkpoint, &g_be, ids, WINDOWS, SEQLEN, &ppl, nll, NULL, NULL, &g_error), g_error);
    for (int i = 0; i < WINDOWS; i++) CHECK(fabs(nll[i] - want[i]) < 2e-6, "window %d: nll %.9g, expected %.9g", i, nll[i], want[i]);
    besa_calibration data;
    besa_prune_options options;
    besa_plan_result plan;
    besa_report report;
    memset(&data, 0, sizeof data);
    memset(&options, 0, sizeof options);
    data.ids = ids, data.nsamples = WINDOWS, data.seqlen = SEQLEN;
    options.method = BESA_METHOD_WANDA, options.rates.target = 0.5;
    CHECK_OK(besa_plan(checkpoint, &g_be, &data, &options, &plan, &g_error), g_error);
    CHECK(strstr(plan.notes, note), "notes of the plan: \"%s\"", plan.notes);
    CHECK_OK(besa_prune(checkpoint, NULL, &g_be, &data, &options, &report, &g_error), g_error);
    CHECK(report.notes && strstr(report.notes, note), "notes of the report: \"%s\"", report.notes ? report.notes : "");
    besa_report_free(&report);
    besa_tokens_free(&tokens);
    besa_checkpoint_close(checkpoint);
}

/* The same ids as .npy, as llm.c's file and as a raw .bin of uint32, for a vocabulary of 66,000. */
static void test_token_case(void)
{
    static const char *const names[] = { "tokens.npy", "llmc.bin" };
    enum { COUNT = 512 };
    besa_tokens t[2], raw;
    int32_t ids[2][COUNT];
    char path[600];
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/tokens_bin_uint32/%s", g_cases, names[i]);
        CHECK_OK(besa_tokens_load(&t[i], path, &g_error), g_error);
        CHECK(t[i].count == COUNT, "%s: %d ids", names[i], (int)t[i].count);
        CHECK_OK(besa_tokens_sample(&t[i], 1, COUNT, 0, 66000, ids[i], &g_error), g_error);
        besa_tokens_free(&t[i]);
    }
    CHECK(!memcmp(ids[0], ids[1], sizeof ids[0]), "llm.c's ids are others");
    snprintf(path, sizeof path, "%s/tokens_bin_uint32/tokens.bin", g_cases);
    besa_result result = besa_tokens_load(&raw, path, &g_error);
    CHECK(result == BESA_ERROR_FORMAT && strstr(g_error.message, "tokens.bin") && strstr(g_error.message, ".i32"), "%s: %s",
          besa_result_string(result), result ? g_error.message : "");
    besa_tokens_free(&raw);
}

/* ---- rope ------------------------------------------------------------------------------------ */

/* The angle of position t for pair i of a head, by the published formulas. The wavelength of a pair is 2 pi / f. */
static double rope_angle(const besa_rope *rope, int64_t t, int64_t i, int64_t head_dim)
{
    double f = 1 / pow(rope->theta, (double)(2 * i) / (double)head_dim), wavelength = 2 * acos(-1) / f;
    double longest = rope->original_max_position_embeddings / rope->low_freq_factor;
    double shortest = rope->original_max_position_embeddings / rope->high_freq_factor;
    if (rope->type == BESA_ROPE_LINEAR) return (double)t / rope->factor * f; /* positions are interpolated */
    if (rope->type == BESA_ROPE_DEFAULT || wavelength < shortest) return (double)t * f;
    if (wavelength > longest) return (double)t * f / rope->factor;
    double part = (rope->original_max_position_embeddings / wavelength - rope->low_freq_factor) /
                  (rope->high_freq_factor - rope->low_freq_factor);
    return (double)t * (part * f + (1 - part) * f / rope->factor);
}

static void test_rope(void)
{
#define LLAMA3(base, stretch, low, high, length)                                                                                   \
    { .type = BESA_ROPE_LLAMA3, .theta = base, .factor = stretch, .low_freq_factor = low, .high_freq_factor = high,                \
      .original_max_position_embeddings = length }
    static const struct { const char *name; besa_rope rope; int64_t head_dim; } t[] = {
        { "default", { .theta = 10000 }, 64 }, { "default, theta 1e6", { .theta = 1e6 }, 128 },
        { "linear", { .type = BESA_ROPE_LINEAR, .theta = 10000, .factor = 4 }, 64 }, { "linear by a fraction", { .type = BESA_ROPE_LINEAR, .theta = 5e5, .factor = 2.5 }, 18 },
        { "llama3", LLAMA3(5e5, 8, 1, 4, 8192), 128 }, { "llama3, factor 32", LLAMA3(5e5, 32, 1, 4, 8192), 64 },
        { "llama3, other bounds", LLAMA3(1e4, 3, 2, 16, 512), 32 } };
#undef LLAMA3
    enum { SEQLEN = 300 };
    for (size_t k = 0; k < sizeof t / sizeof *t; k++) {
        int64_t half = t[k].head_dim / 2;
        float *cosine = take_floats(SEQLEN * half), *sine = take_floats(SEQLEN * half);
        double worst = 0;
        besa_block_shape shape;
        memset(&shape, 0, sizeof shape);
        shape.head_dim = t[k].head_dim;
        shape.rope = t[k].rope;
        besa_rope_table(&shape, SEQLEN, cosine, sine);
        for (int64_t p = 0; p < SEQLEN; p++)
            for (int64_t i = 0; i < half; i++) {
                double angle = rope_angle(&t[k].rope, p, i, t[k].head_dim);
                double c = fabs((double)cosine[p * half + i] - cos(angle)), s = fabs((double)sine[p * half + i] - sin(angle));
                if (c > worst) worst = c;
                if (s > worst) worst = s;
            }
        CHECK(worst < 1e-7 * SEQLEN, "%s: error %g", t[k].name, worst); /* the angle is rounded to float: 2^-24 of 300 */
    }
}

int main(int argc, char **argv)
{
    static const char *const block[] = { "block_mha", "block_gqa", "block_qkv_bias", "block_sliding_window", "block_qk_norm" };
    static const struct { const char *name; double rounding; } model[] = {
        { "llama_mha_f16", 5e-4 }, { "llama3_gqa_tied_bf16", 5e-3 }, { "mistral_gqa_bf16", 5e-3 },
        { "qwen2_bias_tied_bf16", 5e-3 }, { "qwen3_qknorm_f32", 1e-4 } };
    static const struct { const char *name, *expected, *note; } cases[] = {
        { "tied_other_head", "tied_other_head", "lm_head.weight differs" },
        { "adapter_config", "tied_other_head", "adapter_config.json" } }; /* its adapter is not applied */
    if (argc < 3) return fprintf(stderr, "usage: %s REFERENCE_DIRECTORY CASES_DIRECTORY [part of a test's name]\n", argv[0]), 2;
    g_reference = argv[1];
    g_cases = argv[2];
    test.only = argc > 3 ? argv[3] : NULL;
    if (besa_cpu_backend(&g_be, NULL, &g_error) != BESA_OK) return fprintf(stderr, "%s\n", g_error.message), 1;
    for (int i = 0; i < 5; i++) TEST(block[i]) test_block(block[i]);
    TEST("a second loss at h1, gradients added up") test_second_loss("block_gqa");
    TEST("gradients of norms") test_vector_gradients("block_gqa");
    TEST("gradients of norms of q and k") test_vector_gradients("block_qk_norm");
    TEST("gradients of norms and biases") test_vector_gradients("block_qkv_bias");
    TEST("sparse_row_sigmoid") test_sparse_layer("sparse_row_sigmoid", 0, 12, 0);
    TEST("sparse_row_softmax") test_sparse_layer("sparse_row_softmax", 1, 12, 0);
    TEST("sparse_layer_sigmoid as one row group") test_sparse_layer("sparse_layer_sigmoid", 0, 1, 0);
    TEST("sparse_layer_sigmoid as layer logits") test_sparse_layer("sparse_layer_sigmoid", 0, 1, 1);
    TEST("rates by the layer API") test_rates_api();
    TEST("ranks, beta and bucket sums") {
        test_rates_readers(BESA_RATES_HIERARCHICAL, 0, 1);
        test_rates_readers(BESA_RATES_HIERARCHICAL, 1, 3);
        test_rates_readers(BESA_RATES_ROW, 0, BESA_ALL_ROWS);
        test_rates_readers(BESA_RATES_LAYER, 0, 2);
    }
    TEST("ranks of wide rows") test_wide_ranks();
    TEST("score_sparsegpt") test_sparsegpt_score("score_sparsegpt", 0);
    TEST("score_sparsegpt_git") test_sparsegpt_score("score_sparsegpt_git", 1);
    TEST("memory is freed when all queues are done with it") test_frees();
    TEST("sparsegpt") test_sparsegpt();
    TEST("wanda") test_wanda();
    TEST("quant_3bit") test_quantization("quant_3bit", 3);
    TEST("quant_4bit") test_quantization("quant_4bit", 4);
    TEST("quant_8bit") test_quantization("quant_8bit", 8);
    TEST("prodigy") test_prodigy();
    TEST("adamw") test_adamw();
    TEST("trace_published_penalty with its masks") test_trace_pinned("trace_published_penalty");
    TEST("trace_published_no_penalty with its masks") test_trace_pinned("trace_published_no_penalty");
    TEST("weights by Wanda's masks that learn, PyTorch's trace") test_trace_weights("wanda", 0, 0);
    TEST("rates and weights that learn together, PyTorch's trace") test_trace_weights("both", 1, BESA_NONE);
    TEST("rates and weights, ranked anew after every step, PyTorch's trace") test_trace_weights("moving", 1, 1);
    TEST("trace_published_penalty") test_trace("trace_published_penalty", 0.3, 0.02);
    TEST("trace_published_no_penalty") test_trace("trace_published_no_penalty", 0.5, 0.1);
    TEST("importances by their formulas") test_importances();
    TEST("losses that overflow") test_loss_overflow();
    TEST("overflow is named") test_overflow_named();
    TEST("arguments of the layer API") test_rates_arguments();
    TEST("the largest penalty of a target") test_largest_penalty();
    TEST("shapes of a block") test_shapes();
    TEST("the caller's workspace") test_rates_workspace();
    TEST("Prodigy with other options") test_optimizer_options(0);
    TEST("AdamW with other options") test_optimizer_options(1);
    TEST("rates of many rows") test_rates_of_many_rows();
    TEST("how many threads") test_thread_counts();
    TEST("bf16 products") test_bf16_products();
    TEST("Hessians without a factor") test_singular();
    TEST("a pruner and other blocks") test_other_blocks();
    TEST("a Hessian without a factor, told of late") test_late_factor();
    TEST("one wait a block, besa") test_waits(BESA_METHOD_BESA);
    TEST("one wait a block, wanda") test_waits(BESA_METHOD_WANDA);
    TEST("one wait a block, sparsegpt") test_waits(BESA_METHOD_SPARSEGPT);
    for (int i = 0; i < 5; i++) TEST(model[i].name) test_checkpoint(model[i].name, model[i].rounding);
    TEST("rope of every type") test_rope();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) TEST(cases[i].name) test_case(cases[i].name, cases[i].expected, cases[i].note);
    TEST("tokens_bin_uint32") test_token_case();
    g_be.destroy(&g_be);
    return test_finish();
}
