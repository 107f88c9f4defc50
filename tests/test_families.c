/* test_families - models of every family: transformers' answers, gradients by differences, and every method.
 *
 *     test_families FAMILIES_DIRECTORY [part of a test's name]
 *
 * FAMILIES_DIRECTORY has a folder for each: config.json, model.safetensors, ids_32.npy and ids_96.npy, and in expected.json the
 * mean negative log-likelihood of each window of 32 and of 96 tokens, by transformers in float32. */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "test.h"
#include "fixture.h"

static const char *g_families;
static besa_error g_error;

/* A model of a family, open, with both of its files of ids. */
typedef struct model {
    besa_checkpoint *checkpoint;
    char directory[512];
    int32_t ids[2][384];
    int64_t windows[2];                         /* of 32 and of 96 tokens */
} model;

static const int64_t g_length[2] = { 32, 96 };

static model open_model(const char *name)
{
    model m;
    memset(&m, 0, sizeof m);
    snprintf(m.directory, sizeof m.directory, "%s/%s", g_families, name);
    CHECK_OK(besa_checkpoint_open(&m.checkpoint, m.directory, &g_error), g_error);
    if (!m.checkpoint) exit(1);
    for (int i = 0; i < 2; i++) {
        char path[600];
        besa_tokens tokens;
        snprintf(path, sizeof path, "%s/ids_%d.npy", m.directory, (int)g_length[i]);
        CHECK_OK(besa_tokens_load(&tokens, path, &g_error), g_error);
        m.windows[i] = tokens.count / g_length[i];
        CHECK_OK(besa_tokens_sample(&tokens, m.windows[i], g_length[i], 0, besa_checkpoint_config(m.checkpoint)->vocab_size,
                                    m.ids[i], &g_error), g_error);
        besa_tokens_free(&tokens);
    }
    return m;
}

static besa_backend new_backend(int threads)
{
    besa_backend be;
    besa_cpu_options options;
    memset(&options, 0, sizeof options);
    options.threads = threads;
    CHECK_OK(besa_cpu_backend(&be, &options, &g_error), g_error);
    return be;
}

/* ---- answers --------------------------------------------------------------------------------- */

/* Held against itself a model is at no distance: its logits go the same way as the reference's. */
static void check_itself(const model *m, besa_backend *be, const int32_t *ids, int64_t windows, int64_t seqlen)
{
    besa_reference reference;
    besa_window window[16];
    CHECK_OK(besa_reference_create(&reference, m->checkpoint, be, ids, windows, seqlen, NULL, NULL, &g_error), g_error);
    CHECK_OK(besa_compare_models(m->checkpoint, be, &reference, window, NULL, NULL, NULL, &g_error), g_error);
    for (int64_t w = 0; w < windows; w++)
        CHECK(window[w].kl == 0 && window[w].same == 1, "window %d is %g from itself", (int)w, window[w].kl);
    besa_reference_free(&reference);
}

static void test_answers(const char *name)
{
    model m = open_model(name);
    besa_backend be = new_backend(2);
    for (int i = 0; i < 2; i++) {
        double perplexity, nll[16], want[16];
        char key[16];
        snprintf(key, sizeof key, "nll_%d", (int)g_length[i]);
        json_numbers(m.directory, "expected.json", key, want, (int)m.windows[i]);
        CHECK_OK(besa_perplexity(m.checkpoint, &be, m.ids[i], m.windows[i], g_length[i], &perplexity, nll, NULL, NULL, &g_error),
                 g_error);
        for (int64_t w = 0; w < m.windows[i]; w++)
            CHECK(fabs(nll[w] - want[w]) < 5e-6, "window %d of %d tokens: %.9g, transformers has %.9g", (int)w,
                  (int)g_length[i], nll[w], want[w]);
        if (i == 0) check_itself(&m, &be, m.ids[i], m.windows[i], g_length[i]);
    }
    be.destroy(&be);
    besa_checkpoint_close(m.checkpoint);
}

/* ---- gradients ------------------------------------------------------------------------------- */

/* A block of the model with its weights as floats. */
static besa_block float_block(const model *m, int64_t index, int64_t seqlen)
{
    const besa_config *c = besa_checkpoint_config(m->checkpoint);
    besa__block_tensors t;
    besa_block b;
    memset(&b, 0, sizeof b);
    b.shape = c->block;
    b.shape.sliding_window = c->window[index] ? c->sliding_window : 0;
    b.shape.no_rope = c->no_rope[index];
    if (c->has_local_rope && c->window[index]) b.shape.rope = c->local_rope;
    CHECK_OK(besa__block_bind(&t, m->checkpoint, index, &g_error), g_error);
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t rows, columns;
        besa_block_layer(&b.shape, l, &rows, &columns);
        float *w = take_floats(rows * columns);
        CHECK_OK(besa__tensor_floats(w, t.weight[l], 0, rows * columns, &g_error), g_error);
        b.weight[l] = w;
    }
    for (int i = 0; i < BESA_VECTORS; i++) {
        int64_t n = besa__vector_count(&b.shape, i);
        float *v = t.vector[i] ? take_floats(n) : NULL;
        if (v) CHECK_OK(besa__tensor_floats(v, t.vector[i], 0, n, &g_error), g_error);
        for (int64_t k = 0; v && k < n && i >= BESA_LAYERS && c->unit_norms; k++) v[k] += 1;
        *besa__block_vector(&b, i) = v;
    }
    int64_t turned = b.shape.rotary_dim ? b.shape.rotary_dim : b.shape.head_dim;
    float *cosine = take_floats(seqlen * turned / 2), *sine = take_floats(seqlen * turned / 2);
    besa_rope_table(&b.shape, seqlen, cosine, sine);
    b.rope_cos = b.shape.no_rope ? NULL : cosine;
    b.rope_sin = b.shape.no_rope ? NULL : sine;
    return b;
}

/* One block with what its passes need. */
typedef struct bench {
    besa_backend be;
    besa_block block;
    besa_activations acts;
    int64_t batch, seqlen, count;               /* count: elements of x */
    float *x, *y;
    double *c;                                  /* the loss is sum c y + y^2 / 2 */
} bench;

static double loss_of(bench *s)
{
    double sum = 0;
    CHECK_OK(besa_block_forward(&s->be, &s->block, &s->acts, s->x, s->y, s->batch, s->seqlen, &g_error), g_error);
    for (int64_t i = 0; i < s->count; i++) sum += (s->c[i] + 0.5 * (double)s->y[i]) * (double)s->y[i];
    return sum;
}

/* The gradient of one array of n floats at *at against differences along a random direction. */
static void check_gradient(bench *s, const char *what, const float **at, const float *gradient, int64_t n, uint64_t *random)
{
    const float *was = *at;
    double scale = 0, want = 0, value[2], step;
    float *moved = take_floats(n), *direction = take_floats(n);
    for (int64_t i = 0; i < n; i++) scale += (double)was[i] * (double)was[i] / (double)n;
    step = 2e-3 * sqrt(scale) + 1e-6;
    for (int64_t i = 0; i < n; i++) direction[i] = fixture_random(random);
    for (int64_t i = 0; i < n; i++) want += (double)gradient[i] * (double)direction[i];
    for (int side = 0; side < 2; side++) {
        for (int64_t i = 0; i < n; i++) moved[i] = was[i] + (float)((side ? step : -step) * (double)direction[i]);
        *at = moved;
        value[side] = loss_of(s);
    }
    *at = was;
    double found = (value[1] - value[0]) / (2 * step), size = 0;
    for (int64_t i = 0; i < n; i++) size += (double)gradient[i] * (double)gradient[i] / 3; /* of the direction's elements */
    CHECK(fabs(want - found) <= 5e-3 * sqrt(size) + 1e-4, "%s: %.6g, differences say %.6g, of %.6g", what, want, found, sqrt(size));
}

static void test_gradients(const char *name, int64_t index)
{
    enum { BATCH = 2, SEQLEN = 40 };
    static const char *const vector_name[] = { "norm1", "norm2", "q_norm", "k_norm", "norm1_out", "norm2_out" };
    model m = open_model(name);
    uint64_t random = 7 + (uint64_t)index;
    bench s;
    memset(&s, 0, sizeof s);
    s.be = new_backend(2);
    s.batch = BATCH, s.seqlen = SEQLEN;
    s.block = float_block(&m, index, SEQLEN);
    s.count = BATCH * SEQLEN * s.block.shape.hidden_size;
    s.x = take_floats(s.count), s.y = take_floats(s.count);
    s.c = (double *)take((size_t)s.count * sizeof(double));
    for (int64_t i = 0; i < s.count; i++) s.x[i] = fixture_random(&random), s.c[i] = (double)fixture_random(&random);
    int qk_norm = s.block.q_norm != NULL;
    size_t bytes = besa_activations_size(&s.be, &s.block.shape, qk_norm, BATCH * SEQLEN, 1);
    besa_activations_init(&s.acts, take(bytes), &s.be, &s.block.shape, qk_norm, BATCH * SEQLEN, 1);
    besa_workload work = besa_block_workload(&s.block.shape, BATCH, SEQLEN);
    s.be.workspace_bytes = s.be.workspace_size(&s.be, &work);
    s.be.workspace = take(s.be.workspace_bytes);
    float *gradient[BESA_VECTORS], *dx = take_floats(s.count), *dy = take_floats(s.count);
    besa__backward p = besa__backward_of(&s.be, &s.block, &s.acts, SEQLEN);
    besa__backward_batch(&p, BATCH);
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t rows, columns;
        besa_block_layer(&s.block.shape, l, &rows, &columns);
        s.acts.dw_sum[l] = take_floats(rows * columns);
    }
    for (int i = 0; i < BESA_VECTORS; i++) s.acts.dvector[i] = gradient[i] = take_floats(besa__vector_count(&s.block.shape, i) + 1);
    loss_of(&s);
    for (int64_t i = 0; i < s.count; i++) dy[i] = s.y[i] + (float)s.c[i];
    CHECK(besa__block_backward(&p, s.x, dy, dx) == BESA_OK, "%s", s.be.error.message);
    for (int l = 0; l < BESA_LAYERS; l++) {
        int64_t rows, columns;
        const float *w = (const float *)s.block.weight[l];
        besa_block_layer(&s.block.shape, l, &rows, &columns);
        check_gradient(&s, besa_layer_name(l), (const float **)&s.block.weight[l], s.acts.dw_sum[l], rows * columns, &random);
        CHECK(s.block.weight[l] == w, "a weight has moved");
    }
    for (int i = 0; i < BESA_VECTORS; i++)
        if (*besa__block_vector(&s.block, i))
            check_gradient(&s, i < BESA_LAYERS ? "bias" : vector_name[i - BESA_LAYERS], besa__block_vector(&s.block, i), gradient[i],
                           besa__vector_count(&s.block.shape, i), &random);
    check_gradient(&s, "x", (const float **)&s.x, dx, s.count, &random);
    s.be.destroy(&s.be);
    besa_checkpoint_close(m.checkpoint);
}

/* ---- pruning --------------------------------------------------------------------------------- */

/* What is allocated from a backend, on the device and on the host. */
static struct { size_t bytes[2]; besa_result (*alloc[2])(besa_backend *be, void **p, size_t bytes); int stop; } g_counted;

static besa_result counted_alloc(besa_backend *be, void **p, size_t bytes)
{
    g_counted.bytes[0] += bytes;
    return g_counted.alloc[0](be, p, bytes);
}

static besa_result counted_host_alloc(besa_backend *be, void **p, size_t bytes)
{
    g_counted.bytes[1] += bytes;
    return g_counted.alloc[1](be, p, bytes);
}

static int stop_in_block(void *user, const besa_progress *p)
{
    (void)user;
    return p->block == g_counted.stop && p->pass == BESA_PASS_COMMIT;
}

static int is_of_block(const besa_checkpoint *checkpoint, const char *name)
{
    const char *prefix = besa_checkpoint_config(checkpoint)->prefix;
    return !strncmp(name, prefix, strlen(prefix)) && !strncmp(name + strlen(prefix), "layers.", 7);
}

/* Against the source: zeros of every layer, and what else has changed. kept 1: weights that are left are as they were; vectors 1:
 * norms and biases of blocks may have moved. */
static void check_output(const model *m, const char *output, const besa_report *report, int kept, int vectors)
{
    besa_checkpoint *pruned = NULL;
    int64_t moved = 0;
    CHECK_OK(besa_checkpoint_open(&pruned, output, &g_error), g_error);
    if (!pruned) return;
    for (int64_t b = 0; b < report->num_blocks; b++)
        for (int l = 0; l < BESA_LAYERS; l++) {
            const besa_tensor *in = besa_checkpoint_layer(m->checkpoint, b, l), *out = besa_checkpoint_layer(pruned, b, l);
            int64_t n = in->shape[0] * in->shape[1], zeros = 0, other = 0;
            float *a = take_floats(n), *w = take_floats(n);
            CHECK_OK(besa__tensor_floats(a, in, 0, n, &g_error), g_error);
            CHECK_OK(besa__tensor_floats(w, out, 0, n, &g_error), g_error);
            for (int64_t i = 0; i < n; i++) zeros += w[i] == 0, other += w[i] != 0 && w[i] != a[i];
            CHECK(zeros == report->block[b].layer[l].pruned && n == report->block[b].layer[l].weights, "%s: %d zeros, reported %d",
                  in->name, (int)zeros, (int)report->block[b].layer[l].pruned);
            CHECK(!kept || !other, "%s: %d other weights", in->name, (int)other);
        }
    for (int64_t i = 0; i < besa_checkpoint_tensor_count(pruned); i++) {
        const besa_tensor *in = besa_checkpoint_tensor(m->checkpoint, i), *out = besa_checkpoint_tensor(pruned, i);
        CHECK(!strcmp(in->name, out->name), "tensor %d is %s, was %s", (int)i, out->name, in->name);
        int same = in->bytes == out->bytes && !memcmp(in->data, out->data, in->bytes);
        int block = is_of_block(pruned, in->name);
        if (strstr(in->name, "norm.weight") && block) moved += !same;
        CHECK(same || (block && (vectors || strstr(in->name, "_proj.weight"))), "%s has changed", in->name);
    }
    CHECK(!vectors || moved > 0, "no norm has moved");
    besa_checkpoint_close(pruned);
}

/* One run with options; be may be NULL. */
static besa_result prune(model *m, const char *output, besa_backend *be, const besa_prune_options *options, besa_report *report)
{
    besa_calibration data;
    memset(&data, 0, sizeof data);
    memset(report, 0, sizeof *report);
    data.ids = m->ids[1], data.nsamples = m->windows[1], data.seqlen = g_length[1];
    data.test_ids = m->ids[0], data.test_windows = m->windows[0], data.test_seqlen = g_length[0];
    return besa_prune(m->checkpoint, output, be, &data, options, report, &g_error);
}

/* A run: to the byte as planned, with the perplexity that its output has, and the same bytes in one thread, and where it was
 * stopped in the third block. separate 1: the device has memory of its own. */
static void check_run(model *m, const char *what, const besa_prune_options *options, int kept, int separate)
{
    besa_report report;
    besa_plan_result plan;
    besa_calibration data;
    besa_prune_options o = *options;
    besa_backend be = new_backend(2);
    const char *output[3];
    char first[256];
    double perplexity = 0;
    be.unified_memory = !separate;
    for (int i = 0; i < 3; i++) output[i] = temp_path("%s-%d-%d", what, separate, i);
    memset(&data, 0, sizeof data);
    data.nsamples = m->windows[1], data.seqlen = g_length[1], data.ids = m->ids[1];
    data.test_windows = m->windows[0], data.test_seqlen = g_length[0], data.test_ids = m->ids[0];
    CHECK_OK(besa_plan(m->checkpoint, &be, &data, &o, &plan, &g_error), g_error);
    g_counted.bytes[0] = g_counted.bytes[1] = 0;
    g_counted.alloc[0] = be.alloc, g_counted.alloc[1] = be.host_alloc;
    be.alloc = counted_alloc, be.host_alloc = counted_host_alloc;
    CHECK_OK(prune(m, output[0], &be, &o, &report), g_error);
    CHECK(g_counted.bytes[0] == plan.device_bytes && g_counted.bytes[1] == plan.host_bytes,
          "%s: %zu and %zu bytes, planned were %zu and %zu", what, g_counted.bytes[0], g_counted.bytes[1], plan.device_bytes,
          plan.host_bytes);
    if (report.num_blocks) check_output(m, output[0], &report, kept, o.learn_vectors);
    besa_checkpoint *pruned = NULL;
    CHECK_OK(besa_checkpoint_open(&pruned, output[0], &g_error), g_error);
    CHECK_OK(besa_perplexity(pruned, &be, m->ids[0], m->windows[0], g_length[0], &perplexity, NULL, NULL, NULL, &g_error), g_error);
    CHECK(fabs(perplexity / report.perplexity - 1) < 1e-9, "%s: a perplexity of %.12g, reported %.12g", what, perplexity,
          report.perplexity);
    besa_checkpoint_close(pruned);
    besa_report_free(&report);
    for (int i = 1; i < 3; i++) {
        besa_backend other = new_backend(i == 1 ? 1 : 2);
        other.unified_memory = !separate;
        g_counted.stop = 2;
        o.progress = i == 2 ? stop_in_block : NULL;
        besa_result result = prune(m, output[i], &other, &o, &report);
        besa_report_free(&report);
        if (i == 2) {
            CHECK(result == BESA_ERROR_CANCELLED, "%s: not stopped: %s", what, besa_result_string(result));
            o.progress = NULL;
            result = prune(m, output[i], &other, &o, &report);
            CHECK(report.resumed_blocks > 0, "%s: not resumed", what);
            CHECK(fabs(report.perplexity / perplexity - 1) < 1e-9, "%s: resumed, a perplexity of %.12g", what, report.perplexity);
            besa_report_free(&report);
        }
        CHECK_OK(result, g_error);
        other.destroy(&other);
        CHECK(compare_directories(output[0], output[i], NULL, first) == 0, "%s: %s differs %s", what, first,
              i == 1 ? "in one thread" : "when resumed");
    }
    be.destroy(&be);
    for (int i = 0; i < 3; i++) remove_tree(output[i]);
}

static const struct { const char *name; besa_method method; besa_refit refit; besa_learn learn; int bits, pattern, vectors, kept; } g_runs[] = {
    { "magnitude", BESA_METHOD_MAGNITUDE, BESA_REFIT_NONE, BESA_LEARN_RATES, 0, 0, 0, 1 },
    { "wanda", BESA_METHOD_WANDA, BESA_REFIT_CG, BESA_LEARN_RATES, 0, 4, 0, 0 },
    { "sparsegpt", BESA_METHOD_SPARSEGPT, BESA_REFIT_NONE, BESA_LEARN_RATES, 4, 0, 0, 0 },
    { "besa", BESA_METHOD_BESA, BESA_REFIT_NONE, BESA_LEARN_RATES, 0, 0, 0, 1 },
    { "obs", BESA_METHOD_BESA, BESA_REFIT_OBS, BESA_LEARN_WEIGHTS, 0, 0, 1, 0 },
    { "both", BESA_METHOD_BESA, BESA_REFIT_NONE, BESA_LEARN_BOTH, 3, 0, 1, 0 },
    { "halves", BESA_METHOD_BESA, BESA_REFIT_NONE, BESA_LEARN_RATES, 0, 0, 0, 1 },
    { "layers", BESA_METHOD_BESA, BESA_REFIT_NONE, BESA_LEARN_RATES, 0, 0, 0, 1 } };

static besa_prune_options run_options(int i)
{
    besa_prune_options o;
    memset(&o, 0, sizeof o);
    o.method = g_runs[i].method, o.refit = g_runs[i].refit, o.learn = g_runs[i].learn, o.bits = g_runs[i].bits;
    o.pattern_m = g_runs[i].pattern, o.pattern_n = o.pattern_m / 2, o.learn_vectors = g_runs[i].vectors;
    o.rates.target = 0.5, o.weight_epochs = 2, o.importance = i == 4 ? BESA_IMPORTANCE_GRADIENT : BESA_IMPORTANCE_WANDA;
    o.dense_share = i == 5 ? 0.5 : 0;
    o.granularity = i == 6 ? BESA_GRANULARITY_ATTN_MLP : i == 7 ? BESA_GRANULARITY_LAYER : BESA_GRANULARITY_BLOCK;
    return o;
}

static void test_runs(const char *name)
{
    model m = open_model(name);
    for (int i = 0; i < (int)(sizeof g_runs / sizeof *g_runs); i++) {
        besa_prune_options o = run_options(i);
        check_run(&m, g_runs[i].name, &o, g_runs[i].kept, i == 5);
    }
    besa_checkpoint_close(m.checkpoint);
}

/* Where a file has layers as rows of one tensor, rates and masks are theirs, and the output's file has the tensor. */
static void test_fused(void)
{
    static const char *const whole[] = { "model.layers.1.self_attn.qkv_proj.weight", "model.layers.3.mlp.gate_up_proj.weight" };
    model m = open_model("phi3");
    besa_fixed_rate fixed[2] = { { "v_proj", 0 }, { "gate_proj", 0.25 } };
    besa_prune_options o = run_options(3);
    besa_report report;
    char path[600];
    size_t n, header;
    o.fixed = fixed, o.num_fixed = 2;
    CHECK_OK(prune(&m, temp_path("fused"), NULL, &o, &report), g_error);
    check_output(&m, temp_path("fused"), &report, 1, 0);
    for (int64_t b = 0; b < report.num_blocks; b++) {
        const besa_layer_report *layer = report.block[b].layer;
        CHECK(layer[BESA_V].pruned == 0 && layer[BESA_GATE].pruned == layer[BESA_GATE].weights / 4, "block %d: fixed rates", (int)b);
        CHECK(layer[BESA_Q].pruned > 0 && layer[BESA_UP].pruned > layer[BESA_UP].weights / 3, "block %d: learned rates", (int)b);
    }
    besa_report_free(&report);
    snprintf(path, sizeof path, "%s/model.safetensors", temp_path("fused"));
    unsigned char *file = read_bytes(path, &n);
    header = file ? (size_t)file[0] | (size_t)file[1] << 8 : 0;
    for (int i = 0; i < 2 && header && header < n; i++) {
        file[8 + header - 1] = 0;
        CHECK(strstr((char *)file + 8, whole[i]) != NULL, "%s is not in the output", whole[i]);
    }
    CHECK(header && !strstr((char *)file + 8, "q_proj"), "a part is in the output's file");
    free(file);
    besa_checkpoint_close(m.checkpoint);
}

/* Where the layers that slide alone have a rope that goes by the length of sequences, tests on the way have their own too. */
static void test_local_length(void)
{
    static const char theta[] = "\"rope_theta\": 5000.0,", positions[] = "\"max_position_embeddings\": 256";
    const char *directory = temp_path("local"), *config = temp_path("local/config.json"), *weights = temp_path("local/model.safetensors");
    char from[600], text[4096];
    besa_prune_options o = run_options(0);
    size_t n;
    mkdir(directory, 0777);
    snprintf(from, sizeof from, "%s/gemma3_text/model.safetensors", g_families);
    unsigned char *file = read_bytes(from, &n);
    write_bytes(weights, file, n);
    free(file);
    snprintf(from, sizeof from, "%s/gemma3_text/config.json", g_families);
    file = read_bytes(from, &n);
    snprintf(text, sizeof text, "%.*s", (int)n, (const char *)file);
    free(file);
    char *at = strstr(text, theta), *type = at ? strstr(at, "\"default\"") : NULL, *longest = strstr(text, positions);
    if (!CHECK(type && longest, "the config has changed")) return;
    memcpy(longest + strlen(positions) - 3, " 48", 3);
    memcpy(type, "\"dynamic\"", 9);
    memcpy(at, "\"factor\":   4.0,     ", strlen(theta)); /* theta is 10000 */
    write_bytes(config, text, strlen(text));
    model m = open_model("gemma3_text");
    besa_checkpoint_close(m.checkpoint);
    CHECK_OK(besa_checkpoint_open(&m.checkpoint, directory, &g_error), g_error);
    if (!m.checkpoint) return;
    const besa_config *c = besa_checkpoint_config(m.checkpoint);
    CHECK(c->local_rope.type == BESA_ROPE_DYNAMIC && c->block.rope.type == BESA_ROPE_DEFAULT, "the ropes are others");
    check_run(&m, "local", &o, 1, 0);
    besa_checkpoint_close(m.checkpoint);
}

int main(int argc, char **argv)
{
    static const char *const family[] = { "smollm3", "smollm3_sliding", "granite", "olmo2", "phi3", "phi3_longrope", "phi3_partial", "gemma2",
                                          "gemma3_text", "gemma3", "mistral3", "qwen2_5_vl" };
    enum { FAMILIES = (int)(sizeof family / sizeof *family) };
    if (argc < 2) return fprintf(stderr, "usage: %s FAMILIES_DIRECTORY [part of a test's name]\n", argv[0]), 2;
    g_families = argv[1];
    test.only = argc > 2 ? argv[2] : NULL;
    temp_create();
    for (int i = 0; i < FAMILIES; i++) {
        static char name[FAMILIES][3][64];      /* a test's name is read when it has ended */
        snprintf(name[i][0], 64, "%s, transformers' answers", family[i]);
        TEST(name[i][0]) test_answers(family[i]);
        snprintf(name[i][1], 64, "%s, gradients", family[i]);
        TEST(name[i][1]) for (int64_t b = 0; b < 3; b++) test_gradients(family[i], b);
        snprintf(name[i][2], 64, "%s, every method", family[i]);
        TEST(name[i][2]) test_runs(family[i]);
    }
    TEST("phi3, layers that are rows of one tensor") test_fused();
    TEST("gemma3_text, a local rope by length") test_local_length();
    return test_finish();
}
