/* test_pipeline - whole runs: a checkpoint in, a pruned one out, and everything that can go wrong on the way.
 *
 *     test_pipeline STORIES260K_DIRECTORY REFERENCE_DIRECTORY [part of a test's name]
 *     test_pipeline --child SOURCE OUTPUT TOKENS CALL      one small run that ends itself at a call of its progress callback */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Host memory of the library, counted; allocation number g_fail_at fails. */
static int64_t g_allocations, g_fail_at, g_live;

static int fail_now(void)
{
    return __atomic_add_fetch(&g_allocations, 1, __ATOMIC_RELAXED) == __atomic_load_n(&g_fail_at, __ATOMIC_RELAXED);
}

static void *counted_malloc(size_t bytes)
{
    void *p = fail_now() ? NULL : malloc(bytes);
    if (p) __atomic_add_fetch(&g_live, 1, __ATOMIC_RELAXED);
    return p;
}

static void *counted_realloc(void *old, size_t bytes)
{
    void *p = fail_now() ? NULL : realloc(old, bytes);
    if (p && !old) __atomic_add_fetch(&g_live, 1, __ATOMIC_RELAXED);
    return p;
}

static void counted_free(void *p)
{
    if (p) __atomic_sub_fetch(&g_live, 1, __ATOMIC_RELAXED);
    free(p);
}

#define BESA_MALLOC(bytes) counted_malloc(bytes)
#define BESA_REALLOC(pointer, bytes) counted_realloc(pointer, bytes)
#define BESA_FREE(pointer) counted_free(pointer)
#define BESA__CHUNK ((size_t)1024)              /* most tensors come and go in pieces */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "test.h"
#include "fixture.h"

static const char *g_stories, *g_reference;
static char g_tokens[600];                      /* the calibration text's file */
static besa_tokens g_calibration, g_test;       /* of stories260K */

/* One call of besa_prune and all that it needs. */
typedef struct setup {
    const char *source, *output;
    int64_t nsamples, seqlen, skip_tokens;
    int32_t last_id;                            /* added to the last calibration id */
    int64_t windows;                            /* of 64 test tokens; 0: no perplexity */
    const besa_reference *against;
    int threads;
    besa_backend *be;                           /* NULL: a CPU backend of `threads` threads */
    besa_prune_options options;
    besa_calibration about;                     /* of its input, for besa.json */
    besa_report report;
    besa_error error;
} setup;

static setup new_setup(const char *output, besa_method method, double target)
{
    setup s;
    memset(&s, 0, sizeof s);
    s.source = g_stories;
    s.output = output;
    s.nsamples = TEST_SANITIZED ? 16 : 32;      /* steps enough for rates to move */
    s.seqlen = 16;
    s.threads = 2;
    s.options.method = method;
    s.options.rates.target = target;
    return s;
}

/* Open the source, cut tokens, prune. The report is the caller's to free. */
static besa_result run(setup *s)
{
    besa_checkpoint *checkpoint = NULL;
    besa_backend own, *be = s->be;
    besa_cpu_options cpu;
    besa_calibration c;
    besa_result r = besa_checkpoint_open(&checkpoint, s->source, &s->error);
    int64_t vocab = 0, n = s->nsamples * s->seqlen;
    int32_t *ids = (int32_t *)calloc((size_t)n, sizeof *ids), *test_ids = NULL;
    c = s->about;
    memset(&cpu, 0, sizeof cpu);
    memset(&s->report, 0, sizeof s->report);
    cpu.threads = s->threads;
    if (r == BESA_OK) {                         /* the reference checkpoints have fewer words */
        vocab = besa_checkpoint_config(checkpoint)->vocab_size;
        for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)(g_calibration.ids[s->skip_tokens + i] % vocab);
        ids[n - 1] = (int32_t)((ids[n - 1] + s->last_id) % vocab);
    }
    if (s->windows) {
        test_ids = (int32_t *)calloc((size_t)s->windows * 64, sizeof *test_ids);
        for (int64_t i = 0; vocab && i < s->windows * 64; i++) test_ids[i] = (int32_t)(g_test.ids[i] % vocab);
        c.test_windows = s->windows, c.test_seqlen = 64;
    }
    c.ids = ids, c.nsamples = s->nsamples, c.seqlen = s->seqlen, c.test_ids = test_ids, c.against = s->against;
    if (r == BESA_OK && !be) {
        r = besa_cpu_backend(&own, &cpu, &s->error);
        be = r == BESA_OK ? &own : NULL;
    }
    if (r == BESA_OK) r = besa_prune(checkpoint, s->output, be, &c, &s->options, &s->report, &s->error);
    if (be == &own) own.destroy(&own);
    besa_checkpoint_close(checkpoint);
    free(ids);
    free(test_ids);
    return r;
}

#define CHECK_RUN(s) CHECK_OK(run(s), (s)->error)

static void expect(setup *s, besa_result want, const char *word)
{
    besa_result got = run(s);
    CHECK(got == want, "got %s (%s), expected %s", besa_result_string(got), got ? s->error.message : "",
          besa_result_string(want));
    CHECK(got == BESA_OK || s->error.code == got, "the error's code is not the result");
    CHECK(*word && strstr(s->error.message, word), "\"%s\" does not name %s", s->error.message, word);
    CHECK(!s->output || !exists(s->output) || want == BESA_ERROR_EXISTS, "an output was left");
    besa_report_free(&s->report);
}

static const char *partial_of(const char *output)
{
    static char path[600];
    snprintf(path, sizeof path, "%s.partial", output);
    return path;
}

static void discard(const char *output)
{
    remove_tree(output);
    remove_tree(partial_of(output));
}

static double directory_perplexity(const char *directory, int64_t windows, int64_t seqlen, int threads)
{
    besa_checkpoint *checkpoint = NULL;
    besa_backend be;
    besa_error error;
    besa_cpu_options cpu;
    double ppl = 0;
    int32_t *ids;
    memset(&cpu, 0, sizeof cpu);
    cpu.threads = threads;
    CHECK_OK(besa_checkpoint_open(&checkpoint, directory, &error), error);
    if (!checkpoint) return 0;
    ids = (int32_t *)calloc((size_t)(windows * seqlen), sizeof *ids);
    for (int64_t i = 0; i < windows * seqlen; i++)
        ids[i] = (int32_t)(g_test.ids[i] % besa_checkpoint_config(checkpoint)->vocab_size);
    CHECK_OK(besa_cpu_backend(&be, &cpu, &error), error);
    CHECK_OK(besa_perplexity(checkpoint, &be, ids, windows, seqlen, &ppl, NULL, NULL, NULL, &error), error);
    be.destroy(&be);
    free(ids);
    besa_checkpoint_close(checkpoint);
    return ppl;
}

/* ---- what an output directory must be -------------------------------------------------------- */

static const char *const g_part[BESA_LAYERS] = { "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                 "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj" };

/* A file of JSON by the library's own reader, which takes nothing else; 0 where it is none. */
static int read_json(besa__json *json, const char *directory, const char *name)
{
    char path[1024];
    besa_error error;
    size_t n = 0;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    unsigned char *bytes = read_bytes(path, &n);
    memset(json, 0, sizeof *json);
    if (!bytes) return CHECK(0, "no %s", path), 0;
    char *text = (char *)counted_malloc(n + 1);
    memcpy(text, bytes, n), text[n] = 0;
    free(bytes);
    besa_result result = besa__json_parse(json, text, n, name, &error);
    CHECK_OK(result, error);
    if (result != BESA_OK) besa__json_free(json);
    return result == BESA_OK;
}

/* What lies at keys one below the other, "a.b.c". */
static const besa__json_value *json_at(const besa__json *json, const char *keys)
{
    const besa__json_value *value = json->values;
    while (value && *keys) {
        char key[64];
        size_t n = strcspn(keys, ".");
        snprintf(key, sizeof key, "%.*s", (int)n, keys);
        value = besa__json_get(json, value, key);
        keys += n + (keys[n] == '.');
    }
    return value;
}

static double number_at(const besa__json *json, const char *keys) { return besa__json_number_of(json, json_at(json, keys)).value; }

static const char *string_at(const besa__json *json, const char *keys)
{
    const char *string = besa__json_string(json, json_at(json, keys));
    return string ? string : "";
}

/* besa.json says what the report does, and no more of blocks than is the same in every run. */
static void verify_record(const setup *s)
{
    besa__json json;
    const besa_report *r = &s->report;
    if (!read_json(&json, s->output, "besa.json")) return;
    CHECK(!strcmp(string_at(&json, "method"), besa_method_name(s->options.method)) && !strcmp(string_at(&json, "besa"), "0.1"),
          "besa.json: method %s, version %s", string_at(&json, "method"), string_at(&json, "besa"));
    CHECK(number_at(&json, "pruned") == (double)r->pruned && number_at(&json, "weights") == (double)r->weights &&
          fabs(number_at(&json, "sparsity") - r->sparsity) < 1e-8 && number_at(&json, "calibration.nsamples") == (double)s->nsamples &&
          number_at(&json, "calibration.seqlen") == (double)s->seqlen, "besa.json: other figures");
    CHECK(strlen(string_at(&json, "source.config_sha256")) == 64 && strlen(string_at(&json, "calibration.ids_sha256")) == 64 &&
          *string_at(&json, "source.name") && *string_at(&json, "device"), "besa.json: source, tokens or device");
    CHECK((s->windows > 0) == (json_at(&json, "perplexity") != NULL) && (!s->windows || fabs(number_at(&json, "perplexity") / r->perplexity - 1) < 1e-8),
          "besa.json: perplexity %g", number_at(&json, "perplexity"));
    CHECK(!json_at(&json, "seconds") && !json_at(&json, "notes") && !json_at(&json, "resumed_blocks"), "besa.json: what differs from run to run");
    for (const besa_option *o = besa_option_table(); o->name; o++) {
        char key[64];
        snprintf(key, sizeof key, "options.%s", o->name);
        CHECK(json_at(&json, key) || !besa__option_used(o, &r->options), "besa.json has no %s", key);
    }
    const besa__json_value *blocks = json_at(&json, "blocks"), *block = besa__json_first(&json, blocks);
    for (int64_t b = 0; b < r->num_blocks && block; b++, block = besa__json_next(&json, blocks, block)) {
        const besa__json_value *layers = besa__json_get(&json, block, "layers"), *layer = besa__json_first(&json, layers);
        CHECK(besa__json_count(&json, block) == 4 && besa__json_number_of(&json, besa__json_get(&json, block, "block")).integer == b &&
              fabs(besa__json_number_of(&json, besa__json_get(&json, block, "target")).value - r->block[b].target) < 1e-8, "besa.json: block %d", (int)b);
        for (int i = 0; i < BESA_LAYERS && layer; i++, layer = besa__json_next(&json, layers, layer))
            CHECK(besa__json_number_of(&json, besa__json_get(&json, layer, "pruned")).integer == r->block[b].layer[i].pruned &&
                  !strcmp(besa__json_string(&json, besa__json_get(&json, layer, "name")), g_part[i]), "besa.json: block %d, layer %d", (int)b, i);
        CHECK(besa__json_count(&json, layers) == BESA_LAYERS, "besa.json: block %d has %d layers", (int)b, (int)besa__json_count(&json, layers));
    }
    CHECK(besa__json_count(&json, blocks) == (uint32_t)r->num_blocks, "besa.json: %d blocks", (int)besa__json_count(&json, blocks));
    besa__json_free(&json);
}

/* All bytes but the weights: other files equal, safetensors equal in size and header; the source's card has another name. */
static void verify_files(const char *source, const char *output)
{
    DIR *d = opendir(output);
    struct dirent *e;
    int files = 0;
    while (d && (e = readdir(d)) != NULL) {
        char a[1024], b[1024];
        size_t length = strlen(e->d_name), na, nb;
        if (e->d_name[0] == '.') continue;
        files++;
        if (!strcmp(e->d_name, "besa.json")) continue;
        CHECK(strcmp(e->d_name, "README.md"), "a card of another model");
        snprintf(a, sizeof a, "%s/%s", source, strcmp(e->d_name, "README.dense.md") ? e->d_name : "README.md");
        snprintf(b, sizeof b, "%s/%s", output, e->d_name);
        if (length > 12 && !strcmp(e->d_name + length - 12, ".safetensors")) {
            unsigned char *pa = read_bytes(a, &na), *pb = read_bytes(b, &nb);
            uint64_t header = 8;
            for (int i = 0; pa && i < 8; i++) header += (uint64_t)pa[i] << 8 * i;
            CHECK(pa && pb && na == nb && header <= na && !memcmp(pa, pb, header), "%s: header or size changed", e->d_name);
            free(pa);
            free(pb);
        } else CHECK(same_file(a, b), "%s is not the source's", e->d_name);
    }
    if (d) closedir(d);
    CHECK(files > 1, "%s holds %d files", output, files);
}

static int64_t published_slab_count(int64_t rows, int64_t columns, double target)
{
    int64_t count = 0;
    for (int64_t first = 0; first < columns; first += 128) {
        int64_t width = columns - first < 128 ? columns - first : 128;
        count += (int64_t)floor((double)(width * rows) * target) + 1;
    }
    return count;
}

/* One layer: every weight kept bit for bit or +0, the method's count, the pattern. Returns the number of zeros. */
static int64_t verify_layer(const besa_tensor *in, const besa_tensor *out, const besa_prune_options *o, double target,
                            int fixed)
{
    int64_t R = in->shape[0], C = in->shape[1], zeros = 0, changed = 0, minus = 0, group_low = 0, group_high = 0, all_source = 0;
    int64_t group = o->rates.group_rows > 0 ? o->rates.group_rows : o->rates.group_rows == BESA_ALL_ROWS ? R : 1;
    size_t size = besa_dtype_size(in->dtype);
    int updates = o->method == BESA_METHOD_SPARSEGPT || o->learn != BESA_LEARN_RATES;
    const unsigned char *a = (const unsigned char *)in->data, *b = (const unsigned char *)out->data;
    for (int64_t r = 0; r < R; r++) {
        int64_t row = 0, in_group = 0, source = 0;
        for (int64_t j = 0; j < C; j++) {
            const unsigned char *pa = a + (size_t)(r * C + j) * size, *pb = b + (size_t)(r * C + j) * size;
            int zero = !memcmp(pb, "\0\0\0", size), top = pb[size - 1];
            source += !memcmp(pa, "\0\0\0", size) || (pa[size - 1] == 0x80 && !memcmp(pa, "\0\0\0", size - 1));
            minus += top == 0x80 && !memcmp(pb, "\0\0\0", size - 1);
            changed += !zero && !updates && memcmp(pa, pb, size) != 0;
            row += zero;
            in_group += zero;
            if (o->pattern_m && !fixed && (j + 1) % o->pattern_m == 0) {
                CHECK(o->method == BESA_METHOD_SPARSEGPT || source > 0 ? in_group >= o->pattern_n : in_group == o->pattern_n,
                      "%s: %d zeros in a group of row %d", in->name, (int)in_group, (int)r);
                in_group = 0;
            }
        }
        zeros += row;
        all_source += source;
        if (o->pattern_m || fixed) continue;
        if (o->method == BESA_METHOD_WANDA || (o->method == BESA_METHOD_MAGNITUDE && o->magnitude_per_row)) {
            int64_t want = (int64_t)floor((double)C * target);
            CHECK(row == (want > source ? want : source), "%s row %d: %d zeros, expected %d", in->name, (int)r, (int)row,
                  (int)want);
        }
        if (o->method == BESA_METHOD_BESA && source == 0 && !o->no_projection) { /* rows of a group differ by one at most */
            if (r % group == 0) group_low = group_high = row;
            if (row < group_low) group_low = row;
            if (row > group_high) group_high = row;
            CHECK(group_high - group_low <= 1, "%s: rows of one group prune %d to %d", in->name, (int)group_low,
                  (int)group_high);
        }
    }
    CHECK(changed == 0, "%s: %d kept weights changed", in->name, (int)changed);
    CHECK(minus == 0 || fixed, "%s: %d weights are -0", in->name, (int)minus);
    if (o->method == BESA_METHOD_SPARSEGPT && !o->pattern_m && !fixed) {
        int64_t want = published_slab_count(R, C, target), ties = in->dtype == BESA_F32 ? 0 : 3; /* equal scores go too */
        CHECK(zeros >= want && zeros <= want + ties, "%s: %d zeros, expected %d", in->name, (int)zeros, (int)want);
    }
    if (o->method == BESA_METHOD_MAGNITUDE && !o->magnitude_per_row && !o->pattern_m && !fixed)
        CHECK(zeros == (int64_t)fmax(floor(target * (double)(R * C)), (double)all_source), "%s: %d zeros of %d", in->name,
              (int)zeros, (int)(R * C));
    return zeros;
}

/* The sparsity that a block is to have by these options; 0: it stays dense. */
static double block_target(const besa_prune_options *o, int64_t index, int64_t blocks)
{
    int64_t at = index - o->first_block, count = o->num_blocks ? o->num_blocks : blocks - o->first_block;
    if (at < 0 || at >= count) return 0;
    if (o->num_block_targets) return o->block_targets[at];
    return o->rates.target + (count > 1 ? o->depth_slope * ((double)at / (double)(count - 1) - 0.5) : 0);
}

/* The whole directory and the report that came with it. */
static void verify(const setup *s)
{
    besa_checkpoint *in = NULL, *out = NULL;
    const besa_prune_options *o = &s->options;
    const besa_report *report = &s->report;
    besa_error error;
    int64_t blocks, all = 0, pruned = 0;
    verify_files(s->source, s->output);
    verify_record(s);
    CHECK(!exists(partial_of(s->output)), "%s.partial was left", s->output);
    CHECK_OK(besa_checkpoint_open(&in, s->source, &error), error);
    CHECK_OK(besa_checkpoint_open(&out, s->output, &error), error);
    if (!in || !out) return;
    CHECK(besa_checkpoint_tensor_count(in) == besa_checkpoint_tensor_count(out), "tensor counts differ");
    for (int64_t i = 0; i < besa_checkpoint_tensor_count(in); i++) {
        const besa_tensor *a = besa_checkpoint_tensor(in, i), *b = besa_checkpoint_tensor(out, i);
        int prunable = 0, block = 0, vector = sscanf(a->name, "model.layers.%d.", &block) == 1;
        for (int l = 0; l < BESA_LAYERS; l++) {
            const char *p = strstr(a->name, g_part[l]);
            prunable |= p && !strcmp(p + strlen(g_part[l]), ".weight");
        }
        vector &= !prunable && o->learn_vectors && o->learn != BESA_LEARN_RATES && report->block[block].target > 0;
        CHECK(!strcmp(a->name, b->name) && a->bytes == b->bytes, "tensor %d is another one", (int)i);
        CHECK(!vector || memcmp(a->data, b->data, a->bytes), "%s did not learn", a->name);
        CHECK(prunable || vector || !memcmp(a->data, b->data, a->bytes), "%s changed", a->name);
    }
    blocks = besa_checkpoint_config(in)->num_hidden_layers;
    CHECK(report->num_blocks == blocks && report->block, "the report has %d blocks", (int)report->num_blocks);
    for (int64_t n = 0; n < blocks; n++) {
        int64_t weights = 0, zeros = 0;         /* of the layers whose rates have a target together */
        double target = block_target(o, n, blocks);
        CHECK(report->block[n].target == target, "block %d: target %g in the report, expected %g", (int)n, report->block[n].target,
              target);
        for (int l = 0; l < BESA_LAYERS; l++) {
            const besa_layer_report *lr = &report->block[n].layer[l];
            const besa_tensor *a, *b;
            const besa_fixed_rate *f = NULL;
            char name[128];
            int64_t z;
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", (int)n, g_part[l]);
            a = besa_checkpoint_find(in, name);
            b = besa_checkpoint_find(out, name);
            for (int64_t i = 0; i < o->num_fixed && !f; i++) if (strstr(name, o->fixed[i].pattern)) f = &o->fixed[i];
            z = target > 0 ? verify_layer(a, b, o, f ? f->sparsity : target, f != NULL) : lr->source_zeros;
            if (target == 0 || (f && f->sparsity == 0)) CHECK(!memcmp(a->data, b->data, a->bytes), "%s changed", name);
            else if (f) CHECK(fabs((double)z - f->sparsity * (double)(a->shape[0] * a->shape[1])) <= (double)a->shape[0],
                              "%s: %d zeros at a fixed %g", name, (int)z, f->sparsity);
            if (!f) weights += a->shape[0] * a->shape[1], zeros += z;
            if (l == BESA_LAYERS - 1 || (o->granularity == BESA_GRANULARITY_LAYER && !o->whole_target) ||
                (o->granularity == BESA_GRANULARITY_ATTN_MLP && !o->whole_target && l == BESA_O)) {
                if (o->method == BESA_METHOD_BESA && !o->no_projection && target > 0)
                    CHECK(zeros == (int64_t)floor(target * (double)weights + 0.5), "block %d, up to layer %d: %d zeros of %d at %g",
                          (int)n, l, (int)zeros, (int)weights, target);
                weights = zeros = 0;
            }
            all += a->shape[0] * a->shape[1];
            pruned += z;
            CHECK(lr->weights == a->shape[0] * a->shape[1] && lr->pruned == z, "%s: report says %d of %d, file has %d", name,
                  (int)lr->pruned, (int)lr->weights, (int)z);
            CHECK(lr->rate_min <= lr->rate_mean + 1e-9 && lr->rate_mean <= lr->rate_max + 1e-9 && lr->rate_std >= 0 &&
                  fabs(lr->rate_mean - (double)z / (double)lr->weights) < 1e-6, "%s: rates %g %g %g", name, lr->rate_min,
                  lr->rate_mean, lr->rate_max);
        }
    }
    int64_t count = o->num_blocks ? o->num_blocks : blocks - o->first_block;
    double wanted = count == blocks ? o->rates.target : o->rates.target * (double)count / (double)blocks;
    CHECK(report->weights == all && report->pruned == pruned &&
          fabs(report->sparsity - (double)pruned / (double)all) < 1e-9 && report->target == wanted,
          "report: %d of %d, files: %d of %d", (int)report->pruned, (int)report->weights, (int)pruned, (int)all);
    besa_checkpoint_close(in);
    besa_checkpoint_close(out);
    if (s->windows) {
        double ppl = directory_perplexity(s->output, s->windows, 64, s->threads);
        CHECK(ppl == report->perplexity, "perplexity %.17g on the way, %.17g from the files", report->perplexity, ppl);
    }
}

/* Run, verify, forget; the perplexity. */
static double run_and_verify(setup *s)
{
    double ppl;
    besa_result r = run(s);
    CHECK(r == BESA_OK, "%s: %s", besa_result_string(r), s->error.message);
    if (r == BESA_OK) verify(s);
    ppl = s->report.perplexity;
    besa_report_free(&s->report);
    return ppl;
}

/* ---- outputs --------------------------------------------------------------------------------- */

static void test_dense_perplexity(void)
{
    int64_t windows = TEST_SANITIZED ? 40 : 254;
    double one, two;
    CHECK(g_test.count / 256 == 254, "%d windows", (int)(g_test.count / 256));
    two = directory_perplexity(g_stories, windows, 256, 2);
    one = directory_perplexity(g_stories, windows, 256, 1);
    CHECK(TEST_SANITIZED || fabs(two - 4.986) < 0.001, "perplexity %.5f", two);
    CHECK(one == two, "perplexity %.17g with one thread, %.17g with two", one, two);
}

static void test_methods(void)
{
    static const double target[] = { 0.02, 0.3, 0.5, 0.7, 0.97 };
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT, BESA_METHOD_MAGNITUDE };
    int first = TEST_SANITIZED ? 2 : 0, end = TEST_SANITIZED ? 4 : 5;
    double ppl[4][5];
    for (int m = 0; m < 4; m++)
        for (int t = first; t < end; t++) {
            setup s = new_setup(temp_path("out"), method[m], target[t]);
            s.nsamples = 32, s.seqlen = 64, s.windows = 60;
            ppl[m][t] = run_and_verify(&s);
            discard(s.output);
        }
    for (int t = 2; t < 4; t++)                 /* what the method is for */
        CHECK(ppl[0][t] < ppl[1][t], "at %g: besa %.3f, wanda %.3f", target[t], ppl[0][t], ppl[1][t]);
    for (int m = 0; m < 4; m++)
        for (int t = first + 1; t < end; t++) CHECK(ppl[m][t] > ppl[m][t - 1], "method %d: %g at %g", m, ppl[m][t], target[t]);
    {
        setup s = new_setup(temp_path("out"), BESA_METHOD_MAGNITUDE, 0.5);
        s.options.magnitude_per_row = 1;
        run_and_verify(&s);
        discard(s.output);
    }
}

/* Targets that divide nothing: verify() knows the count of every method to the weight. */
static void test_odd_targets(void)
{
    static const double target[] = { 1.0 / 3, 0.5001, 0.777, 0.0123 };
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT, BESA_METHOD_MAGNITUDE,
                                          BESA_METHOD_MAGNITUDE };
    const char *model = temp_path("odd");
    fixture_random_llama(model, 2, 24, 37, 4, 2, 64, BESA_F32);
    for (int m = 0; m < 5; m++)
        for (int t = 0; t < 4; t++) {
            setup s = new_setup(temp_path("out"), method[m], target[t]);
            s.source = model;
            s.nsamples = 2;
            s.options.magnitude_per_row = m == 4;
            run_and_verify(&s);
            discard(s.output);
        }
}

static void test_patterns(void)
{
    static const besa_method method[] = { BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT, BESA_METHOD_MAGNITUDE };
    const char *model = temp_path("model48");
    setup s;
    fixture_random_llama(model, 2, 48, 96, 4, 2, 64, BESA_BF16);
    for (int m = 0; m < 3; m++)
        for (int form = 0; form < 3; form++) {  /* 2:4, 4:8, 1:4 */
            s = new_setup(temp_path("out"), method[m], form < 2 ? 0.5 : 0.25);
            s.source = model;
            s.options.pattern_n = form == 0 ? 2 : form == 1 ? 4 : 1;
            s.options.pattern_m = form == 1 ? 8 : 4;
            run_and_verify(&s);
            discard(s.output);
        }
    fixture_random_llama(temp_path("model144"), 1, 144, 288, 4, 2, 64, BESA_F32);
    s = new_setup(temp_path("out"), BESA_METHOD_SPARSEGPT, 0.25);
    s.source = temp_path("model144");
    s.options.pattern_n = 3, s.options.pattern_m = 12; /* 128 columns of a slab are no multiple */
    run_and_verify(&s);
    discard(s.output);
    s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
    s.options.pattern_n = 2, s.options.pattern_m = 4;
    expect(&s, BESA_ERROR_OPTION, "pattern 2:4 with method besa leaves no rates to learn");
    s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5);
    s.options.pattern_n = 4, s.options.pattern_m = 8; /* down_proj has 172 columns */
    expect(&s, BESA_ERROR_OPTION, "172");
    s.options.pattern_n = 4, s.options.pattern_m = 4;
    expect(&s, BESA_ERROR_OPTION, "attern");
}

/* Losses within the block: every part has the target for itself, and learns otherwise than the block. */
static void test_granularity(void)
{
    static const besa_fixed_rate fixed[] = { { "k_proj", 0.3 }, { "gate_proj", 0 }, { "up_proj", 0 }, { "down_proj", 0.2 } };
    char first[256];
    setup s = new_setup(temp_path("block"), BESA_METHOD_BESA, 0.47);
    s.options.rates.d_coef = 1000;
    run_and_verify(&s);
    for (int i = 1; i < BESA_GRANULARITY_COUNT; i++) {
        s.output = temp_path("out"), s.options.granularity = (besa_granularity)i, s.options.num_fixed = 0;
        run_and_verify(&s);
        CHECK(compare_directories(temp_path("block"), s.output, "besa.json", first) > 0, "granularity %d changes nothing", i);
        s.output = temp_path("whole"), s.options.whole_target = 1;
        run_and_verify(&s);
        CHECK(compare_directories(temp_path("out"), s.output, "besa.json", first) > 0, "granularity %d: every part has the target", i);
        discard(s.output);
        discard(temp_path("out"));
        s.output = temp_path("out"), s.options.whole_target = 0;
        s.options.fixed = fixed, s.options.num_fixed = 4; /* no layer of the MLP has rates */
        run_and_verify(&s);
        discard(s.output);
    }
    discard(temp_path("block"));
    s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
    s.options.granularity = BESA_GRANULARITY_ATTN_MLP, s.options.dense_share = 0.5;
    expect(&s, BESA_ERROR_OPTION, "granularity is not block, but dense_share");
    s.options.dense_share = 0, s.options.dense_stream = 1;
    expect(&s, BESA_ERROR_OPTION, "granularity is not block, but dense_stream");
    s.options.dense_stream = 0, s.options.learn = BESA_LEARN_BOTH, s.options.learn_vectors = 1;
    s.options.granularity = BESA_GRANULARITY_LAYER;
    expect(&s, BESA_ERROR_OPTION, "granularity is layer, but learn_vectors");
}

/* Every way to parametrise and learn the rates: exact counts still, and an effect on the weights. */
static void test_besa_options(void)
{
    enum { COUNT = 26 };
    const char *plain = temp_path("plain");
    setup base = new_setup(plain, BESA_METHOD_BESA, 0.5);
    run_and_verify(&base);
    for (int i = 0; i < COUNT; i += TEST_SANITIZED ? 3 : 1) {
        char first[256];
        setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
        besa_prune_options *o = &s.options;
        switch (i) {
        case 0: o->rates.group_rows = BESA_ALL_ROWS; break;
        case 1: o->rates.group_rows = 5; break;  /* divides no layer */
        case 2: o->rates.form = BESA_RATES_ROW; break;
        case 3: o->rates.form = BESA_RATES_LAYER; break;
        case 4: o->rates.layer_scale = 3, o->rates.row_scale = 0.5; break;
        case 5: o->rates.plain_softmax = 1; break;
        case 6: o->rates.optimizer = BESA_ADAMW; break;
        case 7: o->epochs = 2; break;
        case 8: o->batch_size = 3; break;        /* ten steps of 3 sequences, one of 2 */
        case 9: o->dense_stream = 1; break;
        case 10: o->norm_all = 1; break;
        case 11: o->importance = BESA_IMPORTANCE_MAGNITUDE; break;
        case 12: o->importance = BESA_IMPORTANCE_SPARSEGPT; break;
        case 13: o->importance = BESA_IMPORTANCE_SPARSEGPT_SQUARED; break;
        case 14: o->rates.candidates = 16; break;
        case 15: o->rates.zero_start = 1, o->rates.penalty = 8; break;
        case 16: o->rates.d_coef = 50, o->rates.penalty = BESA_NONE; break;
        case 17: o->learn = BESA_LEARN_BOTH, o->weight_epochs = 1; break;
        case 18: o->learn = BESA_LEARN_WEIGHTS, o->weight_epochs = 1, o->weight_warmup = 0.25; break;
        case 19: o->learn = BESA_LEARN_BOTH, o->batch_size = 3, o->dense_share = 0.5, o->weight_lr = 0.1; break;
        case 20: o->learn = BESA_LEARN_BOTH, o->no_projection = 1, o->dense_stream = 1; break;
        case 21: o->dense_share = 0.75; break;
        case 22: o->importance = BESA_IMPORTANCE_GRADIENT, o->batch_size = 3; break;
        case 23: o->importance = BESA_IMPORTANCE_GRADIENT, o->learn = BESA_LEARN_BOTH, o->batch_size = 2; break;
        case 24: o->learn = BESA_LEARN_BOTH, o->batch_size = 3, o->learn_vectors = 1; break;
        case 25: o->importance = BESA_IMPORTANCE_RELATIVE, o->learn = BESA_LEARN_BOTH; break;
        }
        CHECK(run(&s) == BESA_OK, "case %d: %s", i, s.error.message);
        verify(&s);
        for (int64_t b = 0; b < s.report.num_blocks; b++) {
            const besa_block_report *r = &s.report.block[b];
            CHECK(isfinite(r->loss_uniform) && isfinite(r->loss_before) && isfinite(r->loss_after) && r->loss_after > 0 &&
                  r->loss_uniform > 0, "case %d block %d: losses %g %g %g", i, (int)b, r->loss_uniform, r->loss_before,
                  r->loss_after);
            CHECK(o->learn ? r->loss_after < r->loss_masks : r->loss_after == r->loss_masks, "case %d block %d: losses %g, %g",
                  i, (int)b, r->loss_masks, r->loss_after);
        }
        CHECK(compare_directories(plain, s.output, "besa.json", first) == 1, "case %d changes nothing", i);
        besa_report_free(&s.report);
        discard(s.output);
    }
    discard(plain);
}

static void test_fixed_layers(void)
{
    static const besa_fixed_rate fixed[] = { { "layers.0", 0 }, { "v_proj", 0.3 }, { "mlp.gate_proj", 0 } };
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT, BESA_METHOD_MAGNITUDE };
    for (int m = 0; m < 4; m++) {
        setup s = new_setup(temp_path("out"), method[m], 0.6);
        s.options.fixed = fixed;
        s.options.num_fixed = 3;
        run_and_verify(&s);
        discard(s.output);
    }
}

/* Rows of 64 or 172 weights cannot have any sparsity, nor can a source that has zeros: the report names the layer that is
 * farthest from what was asked, where that is more than a thousandth. A dense layer is as asked, whatever zeros it has. */
static void test_fixed_notes(void)
{
    static const struct { besa_fixed_rate fixed[2]; const char *note; int has_zeros; } t[] = {
        { { { "down_proj", 0.99 }, { "v_proj", 0.5 } }, "model.layers.0.mlp.down_proj has sparsity 0.9884, not the 0.99 ", 0 },
        { { { "*.2.*.v_proj", 0.9 }, { "down_proj", 0.99 } }, "model.layers.2.self_attn.v_proj has sparsity 0.8906, not the 0.9 ", 0 },
        { { { "down_proj", 0.99 }, { "*.2.*.v_proj", 0.9 } }, "model.layers.2.self_attn.v_proj has sparsity 0.8906, not the 0.9 ", 0 },
        { { { "v_proj", 0.5 }, { "q_proj", 0.46876 } }, NULL, 0 },
        { { { "v_proj", 0 }, { "q_proj", 0.5 } }, NULL, 1 },
        { { { "layers.1", 0 }, { "q_proj", 0.25 } }, "model.layers.0.self_attn.q_proj has sparsity 0.5000, not the 0.25 ", 1 },
    };
    setup half = new_setup(temp_path("half"), BESA_METHOD_WANDA, 0.5);
    CHECK(run(&half) == BESA_OK, "%s", half.error.message);
    besa_report_free(&half.report);
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        setup s = new_setup(NULL, BESA_METHOD_WANDA, 0.5);
        if (t[i].has_zeros) s.source = half.output;
        s.options.fixed = t[i].fixed;
        s.options.num_fixed = 2;
        CHECK(run(&s) == BESA_OK, "case %d: %s", (int)i, s.error.message);
        const char *notes = s.report.notes ? s.report.notes : "";
        CHECK(t[i].note ? strstr(notes, t[i].note) != NULL : !strstr(notes, "fixed at"), "case %d: %s", (int)i, notes);
        besa_report_free(&s.report);
    }
    discard(half.output);
}

/* Which layers a pattern names: whole dotted parts of the name, or a glob over all of it. */
static void test_fixed_patterns(void)
{
    static const struct { const char *pattern, *name; int matches; } t[] = {
        { "layers.1", "model.layers.1.mlp.up_proj", 1 },   { "layers.1", "model.layers.11.mlp.up_proj", 0 },
        { "layers.1", "model.layers.21.mlp.up_proj", 0 },  { "1", "model.layers.11.mlp.up_proj", 0 },
        { "1", "model.layers.1.mlp.up_proj", 1 },          { "up_proj", "model.layers.1.mlp.up_proj", 1 },
        { "proj", "model.layers.1.mlp.up_proj", 0 },       { "up", "model.layers.1.mlp.up_proj", 0 },
        { "mlp.up_proj", "model.layers.1.mlp.up_proj", 1 }, { "lp.up_proj", "model.layers.1.mlp.up_proj", 0 },
        { "model", "model.layers.1.mlp.up_proj", 1 },      { "odel", "model.layers.1.mlp.up_proj", 0 },
        { "", "model.layers.1.mlp.up_proj", 0 },           { "a.b", "x.aa.b.a.b", 1 },
        { "*proj", "model.layers.1.mlp.up_proj", 1 },      { "*pro", "model.layers.1.mlp.up_proj", 0 },
        { "model.layers.?.*", "model.layers.1.mlp.up_proj", 1 }, { "model.layers.?.*", "model.layers.11.mlp.up_proj", 0 },
        { "*.1.*.up*j", "model.layers.1.mlp.up_proj", 1 }, { "?", "model.layers.1.mlp.up_proj", 0 },
        { "*", "model.layers.1.mlp.up_proj", 1 },          { "*ab", "aab", 1 } };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++)
        CHECK(besa__match(t[i].pattern, t[i].name) == t[i].matches, "\"%s\" and %s", t[i].pattern, t[i].name);
}

static int count_progress(void *user, const besa_progress *p);

static void test_presets(void)
{
    static const char *const preset[] = { "default", "published-row", "published-layer" };
    static const double target[] = { 0.5, 0.7, 0.3 };
    besa_error error;
    besa_prune_options o;
    for (int p = 0; p < 3; p++)
        for (int t = 0; t < 3; t++) {
            setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, target[t]);
            int warned;
            CHECK_OK(besa_preset(&s.options, preset[p], &error), error);
            CHECK(s.options.rates.target == target[t], "the preset changed the target");
            CHECK(run(&s) == BESA_OK, "%s: %s", preset[p], s.error.message);
            verify(&s);
            warned = s.report.notes && strstr(s.report.notes, "0.376") && strstr(s.report.notes, "0.624");
            CHECK(warned == (p > 0 && t > 0), "%s at %g: notes \"%s\"", preset[p], target[t], s.report.notes);
            if (p > 0) CHECK(s.report.sparsity > 0.37 && s.report.sparsity < 0.63, "%s at %g reaches %g", preset[p],
                             target[t], s.report.sparsity);
            besa_report_free(&s.report);
            discard(s.output);
        }
    memset(&o, 0, sizeof o);
    CHECK(besa_preset(&o, "nonsense", &error) == BESA_ERROR_OPTION && strstr(error.message, "nonsense"), "%s", error.message);
}

/* Every number of every preset: what is named here, and 0, the default, for the rest. */
static void test_preset_fields(void)
{
    static const struct { const char *preset, *field; double value; } set[] = {
        { "published-row", "form", BESA_RATES_ROW }, { "published-row", "zero_start", 1 }, { "published-row", "penalty", 5 },
        { "published-row", "d_coef", 5 }, { "published-row", "no_projection", 1 },
        { "published-layer", "form", BESA_RATES_LAYER }, { "published-layer", "zero_start", 1 },
        { "published-layer", "penalty", 5 }, { "published-layer", "d_coef", 50 }, { "published-layer", "dense_stream", 1 },
        { "published-layer", "no_projection", 1 }, { "best", "learn", BESA_LEARN_BOTH }, { "best", "dense_share", 0.5 },
        { "best", "epochs", 2 }, { "best", "weight_epochs", 2 }, { "best", "weight_lr", 0.3 },
        { "weights", "learn", BESA_LEARN_WEIGHTS }, { "weights", "dense_share", 0.5 } };
    static const char *const preset[] = { "default", "published-row", "published-layer", "best", "weights" };
    static const besa_fixed_rate fixed = { "v_proj", 0.25 };
    besa_error error;
    for (int p = 0; p < 5; p++) {
        besa_prune_options o;
        memset(&o, 0x55, sizeof o);
        o.rates.target = 0.625, o.fixed = &fixed, o.num_fixed = 1, o.device_memory = 12345;
        o.first_block = o.num_blocks = o.num_block_targets = 1, o.depth_slope = 0.625;
        o.progress = NULL, o.step = NULL, o.user = &error;
        CHECK_OK(besa_preset(&o, preset[p], &error), error);
        CHECK(o.fixed == &fixed && o.device_memory == 12345 && !o.progress && !o.step && o.user == &error,
              "%s changes what it should keep", preset[p]);
        for (const besa_option *row = besa_option_table(); row->name; row++) {
            double want = !strcmp(row->name, "target") || !strcmp(row->name, "depth_slope") ? 0.625
                          : row->flags & BESA_OPTION_WHERE ? 1 : 0;
            double got = besa__option_get(row, (const char *)&o + row->offset);
            for (size_t i = 0; i < sizeof set / sizeof set[0]; i++)
                if (!strcmp(set[i].preset, preset[p]) && !strcmp(set[i].field, row->name)) want = set[i].value;
            CHECK(got == want, "%s: %s is %g, expected %g", preset[p], row->name, got, want);
        }
    }
}

/* All architectures, element types and file layouts: sharded outputs with the source's index. */
static void test_reference_checkpoints(void)
{
    static const char *const model[] = { "llama_mha_f16", "llama3_gqa_tied_bf16", "mistral_gqa_bf16",
                                         "qwen2_bias_tied_bf16", "qwen3_qknorm_f32" };
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_SPARSEGPT };
    for (int i = 0; i < 5; i++)
        for (int m = 0; m < 2; m++) {
            char source[512];
            setup s = new_setup(temp_path("out"), method[m], 0.5);
            snprintf(source, sizeof source, "%s/checkpoints/%s", g_reference, model[i]);
            s.source = source;
            s.windows = 4;
            run_and_verify(&s);
            discard(s.output);
        }
}

/* The report as JSON, and what besa_prune says about files that it leaves out. */
/* The library's own reader, which takes nothing but JSON, takes it. */
static void check_json(const char *text)
{
    besa__json json;
    besa_error error;
    size_t n = text ? strlen(text) : 0;
    char *copy = (char *)counted_malloc(n + 1);
    memcpy(copy, text ? text : "", n + 1);
    memset(&json, 0, sizeof json);
    CHECK_OK(besa__json_parse(&json, copy, n, "the report", &error), error);
    besa__json_free(&json);
}

static int go_on(void *user, const besa_progress *progress) { return (void)user, (void)progress, 0; }
static besa_result next_step(void *user, const besa_step *step) { return (void)user, (void)step, BESA_OK; }

static void test_report_and_files(void)
{
    const char *model = temp_path("files"), *links = temp_path("links");
    setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
    static const char *const small[] = { "tokenizer.json", "merges.txt", "README.md" };
    static const char *const left[] = { "pytorch_model.bin", "consolidated.00.pth", "pytorch_model-00001-of-00002.bin" };
    char *json, path[600], to[600];
    besa_report empty;
    fixture_random_llama(model, 2, 32, 64, 4, 2, 64, BESA_F32);
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", model, small[i]);
        write_bytes(path, small[i], strlen(small[i]));
        snprintf(path, sizeof path, "%s/%s", model, left[i]);
        write_bytes(path, "weights", 7);
    }
    snprintf(path, sizeof path, "%s/original", model);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/original/consolidated.00.pth", model);
    write_bytes(path, "weights", 7);
    s.source = model;
    s.windows = 4;
    s.options.progress = go_on, s.options.step = next_step, s.options.user = &s;
    CHECK_RUN(&s);
    verify(&s);
    CHECK(!s.report.options.progress && !s.report.options.step && !s.report.options.user, "the report has pointers to the caller's own");
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", s.output, i == 2 ? "README.dense.md" : small[i]);
        CHECK(exists(path), "%s was not copied", small[i]);
        snprintf(path, sizeof path, "%s/%s", s.output, left[i]);
        CHECK(!exists(path), "%s was copied", left[i]);
        CHECK(s.report.notes && strstr(s.report.notes ? s.report.notes : "", left[i]), "notes \"%s\" do not name %s", s.report.notes ? s.report.notes : "", left[i]);
    }
    snprintf(path, sizeof path, "%s/original", s.output);
    CHECK(!exists(path), "original/ was copied");
    json = besa_report_json(&s.report);
    CHECK(json && strstr(json, "\"perplexity\"") && strstr(json, "\"sparsity\"") && strstr(json, "q_proj") &&
          json[0] == '{', "report: %.200s", json ? json : "NULL");
    check_json(json);
    if (json) counted_free(json);
    besa_report_free(&s.report);
    memset(&empty, 0, sizeof empty);
    besa_report_free(&empty);

    mkdir(links, 0777);                         /* as a cache of downloads lays it out */
    snprintf(to, sizeof to, "%s/config.json", links);
    snprintf(path, sizeof path, "../files/config.json");
    CHECK(symlink(path, to) == 0, "symlink");
    snprintf(to, sizeof to, "%s/model.safetensors", links);
    snprintf(path, sizeof path, "../files/model.safetensors");
    CHECK(symlink(path, to) == 0, "symlink");
    {
        setup l = new_setup(temp_path("out2"), BESA_METHOD_BESA, 0.5);
        struct stat st;
        l.source = links;
        l.windows = 4;
        CHECK_RUN(&l);
        verify(&l);
        snprintf(path, sizeof path, "%s/model.safetensors", l.output);
        CHECK(lstat(path, &st) == 0 && S_ISREG(st.st_mode), "the output is a link");
        snprintf(to, sizeof to, "%s/model.safetensors", s.output);
        CHECK(same_file(path, to), "links change the result");
        besa_report_free(&l.report);
        discard(l.output);
    }
    discard(s.output);
}

/* Sliding windows in no layer, in the middle one, in all: three different models. */
static void test_some_windows(void)
{
    static const char *const slides[] = { "full", "full", "full", "full", "sliding", "full", "sliding", "sliding", "sliding" };
    double ppl[3];
    for (int i = 0; i < 3; i++) {
        const char *directory = temp_path("windows%d", i);
        char text[1024], path[600], to[600];
        snprintf(text, sizeof text, "{\"model_type\":\"qwen2\",\"hidden_size\":48,\"intermediate_size\":104,\"num_attention_heads\":4,"
                 "\"num_key_value_heads\":2,\"num_hidden_layers\":3,\"vocab_size\":199,\"rms_norm_eps\":1e-6,\"rope_theta\":1e6,"
                 "\"tie_word_embeddings\":true,\"use_sliding_window\":true,\"sliding_window\":4,\"layer_types\":[\"%s_attention\","
                 "\"%s_attention\",\"%s_attention\"]}", slides[3 * i], slides[3 * i + 1], slides[3 * i + 2]);
        mkdir(directory, 0777);
        snprintf(path, sizeof path, "%s/config.json", directory);
        write_bytes(path, text, strlen(text));
        snprintf(path, sizeof path, "%s/checkpoints/qwen2_bias_tied_bf16/model.safetensors", g_reference);
        snprintf(to, sizeof to, "%s/model.safetensors", directory);
        char *real = realpath(path, NULL);
        CHECK(real && symlink(real, to) == 0, "symlink");
        free(real);
        ppl[i] = directory_perplexity(directory, 4, 64, 2);
    }
    CHECK(fabs(ppl[0] - ppl[1]) > 1e-4 && fabs(ppl[1] - ppl[2]) > 1e-4 && fabs(ppl[0] - ppl[2]) > 1e-4,
          "perplexity %.6f without windows, %.6f with one, %.6f with three", ppl[0], ppl[1], ppl[2]);
}

static const char *card_text(void *user, const besa_report *report)
{
    static char text[200];
    snprintf(text, sizeof text, "%s %lld of %lld in %d blocks, perplexity %.3f of %.3f\n", (const char *)user, (long long)report->pruned,
             (long long)report->weights, (int)report->num_blocks, report->perplexity, report->dense_perplexity);
    return text;
}

/* What besa.json says of where a run's input came from, whoever runs it where; a card; and both of a source that was pruned
 * itself. */
static void test_record(void)
{
    static const besa_fixed_rate fixed[] = { { "v_proj", 0.25 } };
    const char *model = temp_path("model"), *once = temp_path("once"), *twice = temp_path("twice");
    char path[700], *text;
    besa__json json;
    size_t n;
    fixture_random_llama(model, 2, 32, 64, 4, 2, 64, BESA_F32);
    snprintf(path, sizeof path, "%s/README.md", model);
    write_bytes(path, "dense", 5);
    setup s = new_setup(once, BESA_METHOD_WANDA, 0.5);
    s.source = model, s.windows = 2;
    CHECK_OK(besa_preset(&s.options, "weights", &s.error), s.error);
    s.options.rates.target = 0.5, s.options.method = BESA_METHOD_WANDA, s.options.weight_epochs = 1;
    s.options.fixed = fixed, s.options.num_fixed = 1;
    s.options.card = card_text, s.options.user = (void *)(uintptr_t)"card:";
    s.about.file = "/some/where/else/c4.npy", s.about.sha256 = "00ff", s.about.seed = 7, s.about.dense_perplexity = 12.5;
    CHECK_RUN(&s);
    CHECK(!s.report.options.card && !s.report.options.preset, "the report has pointers to the caller's own");
    snprintf(path, sizeof path, "%s/README.md", once);
    text = (char *)read_bytes(path, &n);
    CHECK(text && n == strlen(card_text(s.options.user, &s.report)) && !memcmp(text, card_text(s.options.user, &s.report), n), "another card");
    free(text);
    if (!read_json(&json, once, "besa.json")) return;
    CHECK(!strcmp(string_at(&json, "preset"), "weights") && !strcmp(string_at(&json, "source.name"), "model") &&
          !strcmp(string_at(&json, "calibration.file"), "c4.npy") && !strcmp(string_at(&json, "calibration.sha256"), "00ff") &&
          number_at(&json, "calibration.seed") == 7 && number_at(&json, "dense_perplexity") == 12.5 &&
          !strcmp(string_at(&json, "device"), "cpu") && !strcmp(string_at(&json, "activations"), "f32") && !json_at(&json, "source.besa"),
          "besa.json does not say where the input is from");
    const besa__json_value *list = json_at(&json, "fixed");
    CHECK(list && besa__json_count(&json, list) == 1 && besa__json_number_of(&json, besa__json_get(&json, besa__json_first(&json, list),
          "sparsity")).value == 0.25, "besa.json: fixed layers");
    besa__json_free(&json);
    besa_report_free(&s.report);

    for (int damaged = 0; damaged < 2; damaged++) {
        setup t = new_setup(twice, BESA_METHOD_MAGNITUDE, 0.6);
        t.source = once;
        snprintf(path, sizeof path, "%s/besa.json", once);
        if (damaged) write_bytes(path, "{\"besa\": ", 9);
        CHECK_RUN(&t);
        snprintf(path, sizeof path, "%s/README.md", twice);
        CHECK(!exists(path) && strstr(t.report.notes ? t.report.notes : "", "not copied: README.md"), "the card of the source: %s", t.report.notes ? t.report.notes : "");
        snprintf(path, sizeof path, "%s/README.dense.md", twice);
        text = (char *)read_bytes(path, &n);
        CHECK(text && n == 5 && !memcmp(text, "dense", 5), "the dense model's card is another");
        free(text);
        if (!read_json(&json, twice, "besa.json")) return;
        CHECK(!strcmp(string_at(&json, "method"), "magnitude") && !json_at(&json, "preset.x") && !json_at(&json, "perplexity"), "the source's record");
        CHECK(!damaged == !strcmp(string_at(&json, "source.besa.method"), "wanda"), "damaged %d: the record within is by %s", damaged,
              string_at(&json, "source.besa.method"));
        CHECK(!damaged == !strstr(t.report.notes ? t.report.notes : "", "not kept: the source's besa.json"), "notes: %s", t.report.notes ? t.report.notes : "");
        besa__json_free(&json);
        besa_report_free(&t.report);
        discard(twice);
    }
    discard(once), discard(model);
}

/* A model's name: of the Hub, where config.json has such a one that the directory is called by, else the directory's. */
static void test_model_names(void)
{
    static const struct { const char *path, *name; } t[] = { { "org/named", "org/named" }, { "./named", "named" }, { "/a/b", "named" },
        { "~/model", "named" }, { "a/b/c", "named" }, { "model", "named" }, { "/model", "named" }, { "model/", "named" }, { "org/base-7B", "named" } };
    const char *model = temp_path("named");
    char path[700];
    size_t n;
    fixture_random_llama(model, 1, 32, 64, 4, 2, 64, BESA_F32);
    snprintf(path, sizeof path, "%s/config.json", model);
    char *config = (char *)read_bytes(path, &n);
    for (int i = 0; i < 9; i++) {
        char text[4096], from[700];
        besa_checkpoint *checkpoint = NULL;
        besa_error error;
        int length = snprintf(text, sizeof text, "{\"_name_or_path\": \"%s\",%.*s", t[i].path, (int)n - 1, config + 1);
        write_bytes(path, text, (size_t)length);
        snprintf(from, sizeof from, "%s%s", model, i % 2 ? "/" : i == 4 ? "/../named/." : "");
        CHECK_OK(besa_checkpoint_open(&checkpoint, from, &error), error);
        if (checkpoint) CHECK(!strcmp(besa_checkpoint_name(checkpoint), t[i].name), "\"%s\": %s", t[i].path, besa_checkpoint_name(checkpoint));
        besa_checkpoint_close(checkpoint);
    }
    free(config);
    discard(model);
}

/* What the steps of a run say of themselves. */
typedef struct traced {
    double target, lambda;
    int granularity, rates, weights, steps, dense; /* dense: a layer that stays so, -1: none */
} traced;

static besa_result trace_step(void *user, const besa_step *step)
{
    traced *t = (traced *)user;
    besa_trace trace = { 0, 0, 0, 0 };
    double penalty = 0, sum = 0, weights = 0;
    int first = 0, parts = 0, ends[] = { BESA_O, BESA_DOWN };
    CHECK(besa_step_trace(step, &trace, NULL) == BESA_OK && trace.loss == (double)step->loss[0], "step %d: loss %g", (int)step->step, trace.loss);
    t->rates += step->lr > 0, t->weights += step->weight_lr > 0, t->steps++;
    if (!step->rates) {
        CHECK(isnan(trace.penalty) && isnan(trace.mean_rate) && isnan(trace.d) && step->lr == 0, "rates where there are none");
        return BESA_OK;
    }
    for (int i = 0; i < BESA_LAYERS; i++) {     /* every part's mean rate, from the rows of its layers; of none that all stay dense */
        float alpha[512];
        int64_t rows = step->rates->layer[i].shape.rows, columns = step->rates->layer[i].shape.units;
        if (i == first) sum = weights = 0;
        CHECK(besa_rates_read(step->rates, i, alpha, NULL, NULL) == BESA_OK, "rates");
        int learns = i != t->dense;
        for (int64_t r = 0; r < rows && learns; r++) sum += (double)alpha[r] * (double)columns;
        weights += learns ? (double)(rows * columns) : 0;
        if (i != (t->granularity == BESA_GRANULARITY_LAYER ? i : t->granularity == BESA_GRANULARITY_BLOCK ? BESA_DOWN : ends[parts])) continue;
        if (weights > 0) penalty += t->lambda * pow((sum / weights - t->target) / t->target, 2);
        first = i + 1, parts++;
    }
    CHECK(fabs(trace.penalty - penalty) <= 1e-6 * sqrt(t->lambda * penalty) + 1e-12 && /* S is a float */
          trace.d > 0 && fabs(trace.mean_rate - t->target) < 0.2, "step %d, %d parts: penalty %g, expected %g",
          (int)step->step, parts, trace.penalty, penalty);
    return BESA_OK;
}

static void test_trace(void)
{
    static const besa_fixed_rate fixed = { "v_proj", 0 };
    for (int i = 0; i < 7; i++) {
        traced t = { 0.4, 3, i < 3 ? i : i == 6 ? BESA_GRANULARITY_LAYER : 0, 0, 0, 0, i == 6 ? BESA_V : -1 };
        setup s = new_setup(NULL, i == 4 ? BESA_METHOD_WANDA : BESA_METHOD_BESA, t.target);
        s.options.granularity = (besa_granularity)t.granularity, s.options.rates.penalty = t.lambda;
        s.options.learn = i == 3 ? BESA_LEARN_BOTH : i == 4 || i == 5 ? BESA_LEARN_WEIGHTS : BESA_LEARN_RATES, s.options.weight_epochs = 1;
        s.options.fixed = &fixed, s.options.num_fixed = i == 6;
        s.options.step = trace_step, s.options.user = &t;
        CHECK_RUN(&s);
        besa_report_free(&s.report);
        const int steps = (int)(5 * s.nsamples); /* of an epoch, in five blocks */
        CHECK(t.steps == steps * (i == 3 || i == 5 ? 2 : 1) && t.rates == (i == 4 ? 0 : steps) &&
              t.weights == (i == 3 ? 2 * steps : i == 4 || i == 5 ? steps : 0),
              "run %d: %d steps, of rates %d, of weights %d", i, t.steps, t.rates, t.weights);
    }
}

/* A report of a perplexity, in the form of the others. */
static void test_measured(void)
{
    static const double nll[] = { 1, 2 };
    besa_report report;
    besa_checkpoint *checkpoint = NULL;
    besa_backend be;
    besa_error error;
    besa_calibration c;
    besa__json json;
    CHECK_OK(besa_cpu_backend(&be, NULL, &error), error);
    memset(&c, 0, sizeof c);
    c.test_ids = g_test.ids, c.test_windows = 2, c.test_seqlen = 16, c.test_file = "x/t.npy", c.test_sha256 = g_test.sha256;
    CHECK_OK(besa_checkpoint_open(&checkpoint, g_stories, &error), error);
    if (!checkpoint) return;
    CHECK_OK(besa_report_measured(&report, checkpoint, &be, &c, 4.5, nll, &error), error);
    report.command = "besa eval", report.threads = 3;
    char *text = besa_report_json(&report);
    size_t n = text ? strlen(text) : 0;
    CHECK_OK(besa__json_parse(&json, text, n, "the report", &error), error);
    CHECK(number_at(&json, "perplexity") == 4.5 && number_at(&json, "threads") == 3 && !strcmp(string_at(&json, "command"), "besa eval") &&
          !strcmp(string_at(&json, "test.file"), "t.npy") && !strcmp(string_at(&json, "test.sha256"), g_test.sha256) && strlen(g_test.sha256) == 64 &&
          besa__json_count(&json, json_at(&json, "nll")) == 2 && besa__json_count(&json, json_at(&json, "blocks")) == 0 &&
          !json_at(&json, "options") && !json_at(&json, "weights") && !json_at(&json, "passes"), "another report");
    besa__json_free(&json);
    besa_report_free(&report);
    besa_checkpoint_close(checkpoint);
    be.destroy(&be);
}

static void limit_files(rlim_t bytes)
{
    struct rlimit limit;
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = bytes < limit.rlim_max ? bytes : limit.rlim_max;
    setrlimit(RLIMIT_FSIZE, &limit);
}

/* Rows' counts, shares and masks of a file against the weights that it was made of. */
static void check_mask_file(const char *file, const besa_checkpoint *weights)
{
    besa_checkpoint *masks = NULL;
    besa_error error;
    CHECK_OK(besa_masks_open(&masks, file, weights, &error), error);
    for (int64_t b = 0; masks && b < besa_checkpoint_config(weights)->num_hidden_layers; b++)
        for (int i = 0; i < BESA_LAYERS; i++) {
            const besa_tensor *w = besa_checkpoint_layer(weights, b, i), *t[3];
            static const char *const kind[] = { "alpha", "n", "mask" };
            int64_t rows = w->shape[0], columns = w->shape[1], wrong = 0;
            size_t size = besa_dtype_size(w->dtype);
            for (int k = 0; k < 3; k++) {
                char name[128];
                snprintf(name, sizeof name, "model.layers.%d.%s.%s", (int)b, g_part[i], kind[k]);
                t[k] = besa_checkpoint_find(masks, name);
                CHECK(t[k] && t[k]->shape[0] == rows && (k == 2 || (t[k]->ndim == 1 && (uintptr_t)t[k]->data % 4 == 0)), "%s: no %s", file, name);
                if (!t[k]) return besa_checkpoint_close(masks);
            }
            for (int64_t r = 0; r < rows; r++) {
                int32_t zeros = 0;
                for (int64_t j = 0; j < columns; j++) {
                    const unsigned char *at = (const unsigned char *)w->data + (size_t)(r * columns + j) * size;
                    int zero = 1, bit = ((const unsigned char *)t[2]->data)[r * t[2]->shape[1] + j / 8] >> (j % 8) & 1;
                    for (size_t k = 0; k < size; k++) zero = zero && !(at[k] & (k + 1 == size ? 0x7F : 0xFF));
                    zeros += zero;
                    wrong += bit == zero;
                }
                wrong += ((const int32_t *)t[1]->data)[r] != zeros;
                wrong += ((const float *)t[0]->data)[r] != (float)((double)zeros / (double)columns);
                if (columns % 8) wrong += ((const unsigned char *)t[2]->data)[r * t[2]->shape[1] + columns / 8] >> (columns % 8) != 0;
            }
            CHECK(wrong == 0, "%s: block %d, %s: %d wrong", file, (int)b, g_part[i], (int)wrong);
        }
    besa_checkpoint_close(masks);
}

/* Masks and rates in a file of their own: those of the weights, and masks from there prune as those of the checkpoint do, in
 * every element type, on a device with memory of its own too; what is no such file is refused. */
static void test_mask_files(void)
{
    const char *model = temp_path("model"), *pruned = temp_path("pruned"), *file = temp_path("masks.safetensors");
    char first[256], path[700];
    besa_checkpoint *weights = NULL, *masks = NULL;
    besa_error error;
    size_t n;
    for (int i = 0; i < 3; i++) {
        fixture_random_llama(model, 2, 36, 76, 2, 1, 64, (besa_dtype)i);
        setup s = new_setup(pruned, BESA_METHOD_WANDA, 0.37);
        s.source = model;
        run_and_verify(&s);
        CHECK_OK(besa_checkpoint_open(&weights, pruned, &error), error);
        if (!weights) return;
        CHECK_OK(besa_masks_save(weights, file, BESA_FILE_RATES | BESA_FILE_MASKS, &error), error);
        CHECK(!exists(partial_of(file)), "something is left beside %s", file);
        check_mask_file(file, weights);
        CHECK_OK(besa_masks_open(&masks, file, weights, &error), error);
        s = new_setup(temp_path("out"), BESA_METHOD_KEEP, 0);
        besa_backend be;
        CHECK_OK(besa_cpu_backend(&be, NULL, &error), error);
        be.unified_memory = i % 2;
        s.source = model, s.options.masks = masks, s.be = &be;
        CHECK_RUN(&s);
        besa_report_free(&s.report);
        CHECK(compare_directories(pruned, s.output, "besa.json", first) == 0, "dtype %d: %s differs", i, first);
        besa__json json;
        if (read_json(&json, s.output, "besa.json")) {
            CHECK(!strcmp(string_at(&json, "masks.name"), "masks.safetensors") && strlen(string_at(&json, "masks.sha256")) == 64, "besa.json: masks");
            besa__json_free(&json);
        }
        be.destroy(&be);
        besa_checkpoint_close(masks);
        besa_checkpoint_close(weights);
        discard(s.output), discard(pruned);
        if (i < 2) discard(model);
    }
    CHECK_OK(besa_checkpoint_open(&weights, model, &error), error);
    if (!weights) return;
    CHECK_OK(besa_masks_save(weights, file, BESA_FILE_RATES, &error), error);
    CHECK(besa_masks_open(&masks, file, weights, &error) == BESA_ERROR_TENSOR && strstr(error.message, "masks.safetensors: model.layers.0.self_attn.q_proj.mask is missing"), "%s", error.message);
    CHECK(besa_masks_open(&masks, temp_path("none"), weights, &error) == BESA_ERROR_NOT_FOUND && strstr(error.message, "none"), "%s", error.message);
    CHECK_OK(besa_masks_save(weights, file, BESA_FILE_MASKS, &error), error);
    besa_checkpoint *other = NULL;
    CHECK_OK(besa_checkpoint_open(&other, g_stories, &error), error);
    CHECK(other && besa_masks_open(&masks, file, other, &error) == BESA_ERROR_TENSOR && strstr(error.message, "expected U8 of 64 x 8"), "%s", error.message);
    besa_checkpoint_close(other);
    unsigned char *bytes = read_bytes(file, &n);
    write_bytes(file, bytes, n - 1);
    CHECK(besa_masks_open(&masks, file, weights, &error) == BESA_ERROR_FORMAT && strstr(error.message, "masks.safetensors"), "%s", error.message);
    free(bytes);
    snprintf(path, sizeof path, "%s/none/masks", model);
    CHECK(besa_masks_save(weights, path, BESA_FILE_MASKS, &error) == BESA_ERROR_WRITE && strstr(error.message, "none/masks"), "%s", error.message);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    fflush(stdout);
    limit_files(100);
    CHECK(besa_masks_save(weights, temp_path("full"), BESA_FILE_MASKS, &error) == BESA_ERROR_WRITE && !exists(temp_path("full")) &&
          !exists(partial_of(temp_path("full"))), "a full disk: %s", error.message);
    limit_files(RLIM_INFINITY);
    signal(SIGXFSZ, handler);
    besa_checkpoint_close(weights);
    unlink(file);
    discard(model);
}

/* FIPS 180-4's examples, and every length around a block's. */
static void test_sha256(void)
{
    static const struct { const char *text, *digits; } t[] = {
        { "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" },
        { "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" },
        { "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1" } };
    unsigned char bytes[130];
    char digits[65], all[131 * 64 + 1] = "";
    for (int i = 0; i < 3; i++) {
        besa__sha256(digits, t[i].text, strlen(t[i].text));
        CHECK(!strcmp(digits, t[i].digits), "\"%s\": %s", t[i].text, digits);
    }
    for (size_t n = 0; n <= 130; n++) {
        if (n) bytes[n - 1] = (unsigned char)(37 * n);
        besa__sha256(digits, bytes, n);
        memcpy(all + 64 * n, digits, 65);
    }
    besa__sha256(digits, all, 131 * 64);
    CHECK(!strcmp(digits, "efb98b0e8c94811b341197121c5059e006b959fdd296bef427ba2e5b13207758"), "lengths 0 to 130: %s", digits);
}

/* Notes as a string of JSON. */
static void test_report_strings(void)
{
    besa_report report;
    char *json, notes[] = "a \"b\" \\ c\n\t\x01 \xC3\xA9 \xFF end";
    memset(&report, 0, sizeof report);
    report.notes = notes;
    report.target = NAN, report.sparsity = INFINITY, report.seconds = -INFINITY;
    json = besa_report_json(&report);
    CHECK(json && strstr(json, "\"notes\": \"a \\\"b\\\" \\\\ c\\n\\u0009\\u0001 \xC3\xA9 \\ufffd end\","), "%s", json ? json : "NULL");
    CHECK(json && strstr(json, "\"target\": null") && strstr(json, "\"sparsity\": null") && strstr(json, "\"seconds\": null"), "%s",
          json ? json : "NULL");
    if (json) counted_free(json);
}

/* ---- sources with zeros, other types and bad weights ----------------------------------------- */

static int prunable(const char *name) { return strstr(name, "_proj.weight") != NULL; }

/* 30 % zeros, a quarter of them -0; input column 5 of block 1's q, k, v is dead. */
static void many_zeros(const char *name, float *v, int64_t rows, int64_t columns)
{
    uint64_t state = (uint64_t)(rows * 977 + columns) + strlen(name);
    for (int64_t i = 0; prunable(name) && i < rows * columns; i++) {
        float u = fixture_random(&state);
        if (u < -0.4f) v[i] = u < -0.85f ? -0.0f : 0.0f;
    }
    if (strstr(name, "layers.1.input_layernorm")) v[5] = 0;
}

/* 70 % of block 2's up are 0. */
static void zeros_of_up(const char *name, float *v, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; strstr(name, "layers.2.mlp.up_proj") && i < rows * columns; i++)
        if (i % 10 < 7) v[i] = 0;
}

static void dead_column(const char *name, float *v, int64_t rows, int64_t columns)
{
    (void)rows, (void)columns;
    if (strstr(name, "layers.1.input_layernorm")) v[5] = 0;
}

static void one_nan(const char *name, float *v, int64_t rows, int64_t columns)
{
    if (strstr(name, "layers.2.mlp.up_proj")) v[rows * columns / 2] = NAN;
}

static void one_infinity(const char *name, float *v, int64_t rows, int64_t columns)
{
    if (strstr(name, "layers.4.self_attn.k_proj")) v[rows * columns - 1] = -INFINITY;
}

static besa_checkpoint *open_stories(void)
{
    besa_checkpoint *checkpoint = NULL;
    besa_error error;
    if (besa_checkpoint_open(&checkpoint, g_stories, &error) != BESA_OK) {
        printf("FAIL %s\n", error.message);
        exit(1);
    }
    return checkpoint;
}

/* Number of weights of a column that are not zero in the output. */
static int64_t column_kept(const char *directory, const char *name, int64_t column)
{
    besa_checkpoint *checkpoint = NULL;
    const besa_tensor *t;
    int64_t kept = -1;
    if (besa_checkpoint_open(&checkpoint, directory, NULL) == BESA_OK && (t = besa_checkpoint_find(checkpoint, name))) {
        size_t size = besa_dtype_size(t->dtype);
        kept = 0;
        for (int64_t r = 0; r < t->shape[0]; r++)
            kept += memcmp((const char *)t->data + (size_t)(r * t->shape[1] + column) * size, "\0\0\0", size) != 0;
    }
    besa_checkpoint_close(checkpoint);
    return kept;
}

static void test_element_types(void)
{
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT, BESA_METHOD_MAGNITUDE };
    besa_checkpoint *stories = open_stories();
    for (int type = 1; type <= 2; type++) {
        const char *model = temp_path(type == 1 ? "f16" : "bf16");
        fixture_variant(model, stories, g_stories, (besa_dtype)type, NULL);
        for (int m = 0; m < 4; m++) {
            setup s = new_setup(temp_path("out"), method[m], 0.5);
            s.source = model;
            s.windows = 8;
            run_and_verify(&s);
            discard(s.output);
        }
    }
    besa_checkpoint_close(stories);
}

static void test_source_zeros(void)
{
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_WANDA, BESA_METHOD_MAGNITUDE };
    besa_checkpoint *stories = open_stories();
    for (int type = 0; type <= 2; type++) {
        const char *model = temp_path("zeros%d", type);
        fixture_variant(model, stories, g_stories, (besa_dtype)type, many_zeros);
        for (int m = 0; m < 3; m++) {
            setup s = new_setup(temp_path("out"), method[m], 0.6);
            s.source = model;
            CHECK_RUN(&s);
            verify(&s);
            for (int64_t b = 0; b < s.report.num_blocks; b++)
                for (int l = 0; l < BESA_LAYERS; l++) {
                    const besa_layer_report *r = &s.report.block[b].layer[l];
                    double share = (double)r->source_zeros / (double)r->weights;
                    CHECK(share > 0.25 && share < 0.35, "%d source zeros of %d", (int)r->source_zeros, (int)r->weights);
                }
            besa_report_free(&s.report);
            discard(s.output);
        }
        {                                       /* of a part, which layers of the block had room for */
            setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.6);
            fixture_variant(temp_path("lopsided"), stories, g_stories, (besa_dtype)type, zeros_of_up);
            s.source = temp_path("lopsided");
            CHECK_RUN(&s);
            besa_report_free(&s.report);
            discard(s.output);
            s.options.granularity = BESA_GRANULARITY_LAYER;
            expect(&s, BESA_ERROR_TARGET, "of the part that begins with mlp.up_proj");
            discard(s.output), discard(s.source);
        }
        {                                       /* fewer than there are zeros: no mask can do that */
            setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.1);
            s.source = model;
            expect(&s, BESA_ERROR_TARGET, "weights are zero already");
            discard(s.output);
        }
    }
    besa_checkpoint_close(stories);
}

/* A dead input column scores 0: it goes first, but not beyond the count. */
static void test_dead_column(void)
{
    static const besa_importance importance[] = { BESA_IMPORTANCE_WANDA, BESA_IMPORTANCE_SPARSEGPT,
                                                  BESA_IMPORTANCE_SPARSEGPT_SQUARED };
    besa_checkpoint *stories = open_stories();
    const char *model = temp_path("dead");
    fixture_variant(model, stories, g_stories, BESA_F32, dead_column);
    besa_checkpoint_close(stories);
    for (int i = 0; i < 5; i++) {
        setup s = new_setup(temp_path("out"), i < 3 ? BESA_METHOD_BESA : i == 3 ? BESA_METHOD_WANDA : BESA_METHOD_SPARSEGPT,
                            i < 3 ? 0.3 : 0.02);
        s.source = model;
        if (i < 3) s.options.importance = importance[i];
        CHECK(run(&s) == BESA_OK, "case %d: %s", i, s.error.message);
        if (i < 4) verify(&s);
        for (int l = 0; l < 3; l++) {
            char name[128];
            snprintf(name, sizeof name, "model.layers.1.%s.weight", g_part[l]);
            CHECK(column_kept(s.output, name, 5) == 0, "case %d: %s keeps weights of a dead column", i, name);
        }
        besa_report_free(&s.report);
        discard(s.output);
    }
}

static void test_not_finite(void)
{
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT, BESA_METHOD_MAGNITUDE };
    besa_checkpoint *stories = open_stories();
    fixture_variant(temp_path("nan"), stories, g_stories, BESA_F32, one_nan);
    fixture_variant(temp_path("inf"), stories, g_stories, BESA_BF16, one_infinity);
    besa_checkpoint_close(stories);
    for (int m = 0; m < 4; m++) {
        setup s = new_setup(temp_path("out"), method[m], 0.5);
        s.source = temp_path("nan");
        expect(&s, BESA_ERROR_NOT_FINITE, "model.layers.2.mlp.up_proj.weight");
        discard(s.output);
        s.source = temp_path("inf");
        expect(&s, BESA_ERROR_NOT_FINITE, "model.layers.4.self_attn.k_proj.weight");
        discard(s.output);
    }
}

static const char *g_changed;                   /* the tensor that the next two change */

static void last_infinite(const char *name, float *v, int64_t rows, int64_t columns)
{
    if (!strcmp(name, g_changed)) v[rows * columns - 1] = INFINITY;
}

static void all_huge(const char *name, float *v, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; !strcmp(name, g_changed) && i < rows * columns; i++) v[i] = 3e38f;
}

/* Tensors that are only copied: an embedding that no token asks for, the final norm. And logits that overflow. */
static void test_copied_not_finite(void)
{
    static const char *const names[] = { "model.embed_tokens.weight", "model.norm.weight" };
    besa_checkpoint *stories = open_stories(), *huge = NULL;
    besa_error error;
    double ppl;
    for (int i = 0; i < 2; i++) {
        setup s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5);
        g_changed = names[i];
        fixture_variant(temp_path("copied%d", i), stories, g_stories, BESA_F32, last_infinite);
        s.source = temp_path("copied%d", i);
        s.nsamples = 1, s.seqlen = 4;
        for (int t = 0; t < 4; t++) CHECK(g_calibration.ids[t] != 511, "token %d is the changed one", t);
        expect(&s, BESA_ERROR_NOT_FINITE, names[i]);
        discard(s.output);
    }
    g_changed = names[1];
    fixture_variant(temp_path("huge"), stories, g_stories, BESA_F32, all_huge);
    besa_checkpoint_close(stories);
    CHECK_OK(besa_checkpoint_open(&huge, temp_path("huge"), &error), error);
    CHECK(besa_perplexity(huge, NULL, g_test.ids, 2, 16, &ppl, NULL, NULL, NULL, &error) == BESA_ERROR_NOT_FINITE &&
          strstr(error.message, "window 0"), "%s", error.message);
    besa_checkpoint_close(huge);
}

/* ---- refusals -------------------------------------------------------------------------------- */

/* Every option that is a number: both ends of its range are taken, what lies just beyond is refused by a message that names
 * the option, what was found and the range. Open: the ends themselves are outside. */
static const struct bounds {
    const char *name;
    char kind;                                  /* 'i' int, 'l' int64_t, 'd' double */
    double least, most;                         /* most 0: no limit */
    int open_least, open_most, none;            /* none: -1 is taken */
    const char *range;
} g_bounds[] = {
    { "target", 'd', 0, 1, 1, 1, 0, "above 0 and below 1" }, { "form", 'i', 0, 2, 0, 0, 0, "besa_rate_form" },
    { "layer_scale", 'd', 0, 1e4, 0, 0, 1, "0 to 10000" }, { "row_scale", 'd', 0, 1e4, 0, 0, 1, "0 to 10000" },
    { "plain_softmax", 'i', 0, 1, 0, 0, 0, "0 or 1" }, { "zero_start", 'i', 0, 1, 0, 0, 0, "0 or 1" },
    { "candidates", 'i', 1, 65535, 0, 0, 0, "1 to 65535" }, { "group_rows", 'l', 1, 0, 0, 0, 1, "1 or more" },
    { "penalty", 'd', 0, 1e30, 0, 1, 1, "0 or more and below 1e30" }, { "optimizer", 'i', 0, 1, 0, 0, 0, "besa_optimizer_kind" },
    { "lr", 'd', 0, 1e30, 1, 1, 0, "above 0 and below 1e30" }, { "beta1", 'd', 0, 1, 0, 1, 1, "0 or more and below 1" },
    { "beta2", 'd', 0, 1, 0, 1, 1, "0 or more and below 1" }, { "weight_decay", 'd', 0, 1e30, 0, 1, 1, "0 or more and below 1e30" },
    { "d0", 'd', 0, 1e30, 1, 1, 0, "above 0 and below 1e30" }, { "d_coef", 'd', 0, 1e30, 1, 1, 0, "above 0 and below 1e30" },
    { "method", 'i', 0, 4, 0, 0, 0, "besa_method" }, { "pattern_n", 'i', 0, 63, 0, 0, 0, "0 to 63" },
    { "pattern_m", 'i', 0, 64, 0, 0, 0, "0 to 64" }, { "magnitude_per_row", 'i', 0, 1, 0, 0, 0, "0 or 1" },
    { "importance", 'i', 0, 5, 0, 0, 0, "besa_importance" }, { "damping", 'd', 0, 1e30, 1, 1, 0, "above 0 and below 1e30" },
    { "epochs", 'l', 1, 1000000, 0, 0, 0, "1 to 1000000" }, { "batch_size", 'l', 1, 0, 0, 0, 0, "1 or more" },
    { "granularity", 'i', 0, 2, 0, 0, 0, "besa_granularity" }, { "whole_target", 'i', 0, 1, 0, 0, 0, "0 or 1" },
    { "norm_all", 'i', 0, 1, 0, 0, 0, "0 or 1" }, { "dense_stream", 'i', 0, 1, 0, 0, 0, "0 or 1" },
    { "dense_share", 'd', 0, 1, 0, 1, 0, "0 or more and below 1" }, { "learn", 'i', 0, 2, 0, 0, 0, "besa_learn" },
    { "weight_epochs", 'l', 1, 1000000, 0, 0, 0, "1 to 1000000" }, { "weight_lr", 'd', 0, 1e30, 1, 1, 0, "above 0 and below 1e30" },
    { "weight_warmup", 'd', 0, 1, 0, 1, 1, "0 or more and below 1" }, { "rank_interval", 'l', 0, 0, 0, 0, 1, "0 or more" },
    { "learn_vectors", 'i', 0, 1, 0, 0, 0, "0 or 1" },
    { "refit", 'i', 0, 2, 0, 0, 0, "besa_refit" }, { "refit_steps", 'l', 1, 1000000, 0, 0, 0, "1 to 1000000" },
    { "schedule", 'i', 0, 1, 0, 0, 0, "besa_schedule" }, { "warmup", 'd', 0, 1, 0, 1, 1, "0 or more and below 1" },
    { "steps", 'l', 1, 0, 0, 0, 0, "1 or more" },
    { "no_projection", 'i', 0, 1, 0, 0, 0, "0 or 1" }, { "num_fixed", 'l', 0, 0, 0, 0, 0, "0 or more" },
    { "first_block", 'l', 0, 0, 0, 0, 0, "0 or more" }, { "num_blocks", 'l', 0, 0, 0, 0, 0, "0 or more" },
    { "bits", 'i', 2, 8, 0, 0, 0, "0 or 2 to 8" }, { "group_size", 'l', 0, 0, 0, 0, 0, "0 or more" },
    { "clipping", 'i', 0, 2, 0, 0, 0, "besa_clipping" }, { "clip_lr", 'd', 0, 1e30, 1, 1, 0, "above 0 and below 1e30" },
    { "quantize_first", 'i', 0, 1, 0, 0, 0, "0 or 1" },
    { "num_block_targets", 'l', 0, 0, 0, 0, 0, "0 or more" }, { "depth_slope", 'd', -1, 1, 1, 1, 0, "above -1 and below 1" },
};

/* A plan with one option set to x. */
static void try_option(const besa_option *row, const struct bounds *b, besa_backend *be, const besa_checkpoint *checkpoint,
                       double x, int taken)
{
    besa_prune_options o;
    besa_calibration c;
    besa_plan_result plan;
    besa_error error = { BESA_OK, "" };
    int i = b->kind == 'i' ? (int)x : 0;
    int64_t l = b->kind == 'l' && x < 9e18 ? (int64_t)x : INT64_MAX;
    char value[64];
    memset(&o, 0, sizeof o);
    memset(&c, 0, sizeof c);
    c.nsamples = 4, c.seqlen = 8, o.rates.target = 0.5;
    memcpy((char *)&o + row->offset, b->kind == 'i' ? (void *)&i : b->kind == 'l' ? (void *)&l : (void *)&x,
           b->kind == 'i' ? sizeof i : sizeof x);
    besa_result r = besa_plan(checkpoint, be, &c, &o, &plan, &error);
    snprintf(value, sizeof value, isnan(x) ? "%s is NaN" : "%s is %.15g", b->name, x);
    if (taken) {                                /* options that contradict others may still be refused, for that */
        CHECK(r == BESA_OK || !strstr(error.message, b->range), "%s %.17g: %s", b->name, x, error.message);
        return;
    }
    CHECK(r == BESA_ERROR_OPTION && strstr(error.message, value) == error.message && strstr(error.message, b->range) &&
          !strchr(error.message + strlen(value), ':'), "%s %.17g: %s", b->name, x, r ? error.message : "taken");
}

static void test_option_ranges(void)
{
    besa_checkpoint *checkpoint = NULL;
    besa_backend be;
    besa_error error;
    const char *model = temp_path("ranges");
    size_t rows = 0;
    const size_t count = sizeof g_bounds / sizeof g_bounds[0];
    fixture_random_llama(model, 1, 16, 32, 2, 1, 32, BESA_F32);
    CHECK_OK(besa_checkpoint_open(&checkpoint, model, &error), error);
    CHECK_OK(besa_cpu_backend(&be, NULL, &error), error);
    for (const besa_option *row = besa_option_table(); checkpoint && row->name; row++, rows++) {
        const struct bounds *b = g_bounds;
        while (b < g_bounds + count && strcmp(b->name, row->name)) b++;
        if (!CHECK(b < g_bounds + count, "%s has no range in this test", row->name)) break;
        int whole = b->kind != 'd', required = !strcmp(b->name, "target");
        double least = b->open_least ? nextafter(b->least, 1) : b->least, most = b->open_most ? nextafter(b->most, 0) : b->most;
        double below = whole ? b->least - 1 : b->open_least ? b->least - 1e-9 : nextafter(b->least, -1);
        double above = whole ? b->most + 1 : b->open_most ? b->most : nextafter(b->most, INFINITY);
        if (b->most > 0 && !(b->kind == 'i' && b->most == 65535)) try_option(row, b, &be, checkpoint, most, 1);
        if (b->most > 0) try_option(row, b, &be, checkpoint, above, 0);
        else try_option(row, b, &be, checkpoint, 9.3e18, 1);
        try_option(row, b, &be, checkpoint, least, 1);
        if (below == 0) try_option(row, b, &be, checkpoint, 0, 1); /* the default */
        else if (!(whole && b->none && below == -1)) try_option(row, b, &be, checkpoint, below, 0);
        try_option(row, b, &be, checkpoint, 0, !required);
        try_option(row, b, &be, checkpoint, -1, b->none);
        try_option(row, b, &be, checkpoint, -2, 0);
        if (whole) continue;
        try_option(row, b, &be, checkpoint, NAN, 0);
        try_option(row, b, &be, checkpoint, INFINITY, 0);
        try_option(row, b, &be, checkpoint, -INFINITY, 0);
    }
    CHECK(rows == count, "%d options, expected %d", (int)rows, (int)count);
    be.destroy(&be);
    besa_checkpoint_close(checkpoint);
}

/* The same table behind the layer API, and the defaults that it fills in. */
static void test_option_defaults(void)
{
    besa_rate_options o;
    besa_error error;
    memset(&o, 0, sizeof o);
    o.target = 0.5;
    CHECK_OK(besa__rate_defaults(&o, &error), error);
    CHECK(o.layer_scale == 1 && o.row_scale == 1 && o.candidates == 100 && o.group_rows == 1 && o.penalty == 1 && o.lr == 1 &&
          o.beta1 == 0.9 && o.beta2 == 0.999 && o.weight_decay == 0 && o.d0 == 1e-6 && o.d_coef == 5, "defaults of the rates");
    memset(&o, 0, sizeof o);
    o.target = 0.5, o.optimizer = BESA_ADAMW, o.form = BESA_RATES_ROW;
    o.penalty = o.beta1 = o.beta2 = o.weight_decay = BESA_NONE, o.group_rows = BESA_ALL_ROWS;
    CHECK_OK(besa__rate_defaults(&o, &error), error);
    CHECK(o.lr == 0.01 && o.layer_scale == 0 && o.row_scale == 1 && o.penalty == 0 && o.beta1 == 0 && o.beta2 == 0 &&
          o.weight_decay == 0 && o.group_rows == BESA_ALL_ROWS, "AdamW, by rows, BESA_NONE");
    memset(&o, 0, sizeof o);
    o.target = 0.5, o.form = BESA_RATES_LAYER, o.layer_scale = BESA_NONE;
    CHECK(besa__rate_defaults(&o, &error) == BESA_ERROR_OPTION && strstr(error.message, "layer_scale"), "%s", error.message);
    memset(&o, 0, sizeof o);
    o.target = 0.5, o.form = BESA_RATES_ROW, o.layer_scale = NAN; /* refused where it is not used, too */
    CHECK(besa__rate_defaults(&o, &error) == BESA_ERROR_OPTION && strstr(error.message, "layer_scale is NaN"), "%s", error.message);
    setup s = new_setup(temp_path("out"), BESA_METHOD_WANDA, NAN);
    s.options.pattern_n = 1, s.options.pattern_m = 4;
    expect(&s, BESA_ERROR_OPTION, "target");
}

static void test_bad_options(void)
{
    static const double target[] = { 0, 1, -0.5, 1.5, NAN, INFINITY };
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_WANDA };
    setup s;
    for (int t = 0; t < 6; t++)
        for (int m = 0; m < 2; m++) {
            s = new_setup(temp_path("out"), method[m], target[t]);
            expect(&s, BESA_ERROR_OPTION, "target");
        }
    for (int i = 0; i < 9; i++) {
        static const besa_fixed_rate bad = { "v_proj", 1.0 };
        s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
        switch (i) {
        case 0: s.options.rates.candidates = 70000; break;
        case 1: s.options.rates.candidates = -3; break;
        case 2: s.options.epochs = -1; break;
        case 3: s.options.batch_size = -1; break;
        case 4: s.options.fixed = &bad, s.options.num_fixed = 1; break;
        case 5: s.options.rates.penalty = -2; break;
        case 6: s.options.rates.beta1 = 1.5; break;
        case 7: s.options.method = (besa_method)77; break;
        case 8: s.options.rates.group_rows = -7; break;
        }
        CHECK(run(&s) == BESA_ERROR_OPTION, "bad option %d: %s", i, s.error.message);
        CHECK(!exists(s.output) && !exists(partial_of(s.output)), "bad option %d leaves files", i);
        besa_report_free(&s.report);
        discard(s.output);
    }
}

/* A fixed rate that names no layer of the model. */
static void test_fixed_nothing(void)
{
    static const besa_fixed_rate fixed[] = { { "v_proj", 0.3 }, { "layers.7", 0.3 } };
    for (int m = 0; m < 2; m++) {
        setup s = new_setup(temp_path("out"), m ? BESA_METHOD_WANDA : BESA_METHOD_BESA, 0.5);
        s.options.fixed = fixed, s.options.num_fixed = 2;
        expect(&s, BESA_ERROR_OPTION, "\"layers.7\" matches none; layers have names such as model.layers.0.self_attn.q_proj");
    }
}

static void test_bad_tokens(void)
{
    besa_checkpoint *checkpoint = open_stories();
    besa_calibration c;
    besa_prune_options o;
    besa_error error;
    int32_t ids[64];
    double ppl;
    memset(&c, 0, sizeof c);
    memset(&o, 0, sizeof o);
    memset(ids, 0, sizeof ids);
    o.rates.target = 0.5;
    c.ids = ids, c.nsamples = 2, c.seqlen = 32;
    for (int i = 0; i < 2; i++) {
        ids[37] = i ? -1 : 512;
        CHECK(besa_prune(checkpoint, temp_path("out"), NULL, &c, &o, NULL, &error) == BESA_ERROR_TOKEN &&
              strstr(error.message, i ? "-1" : "512") && !exists(temp_path("out")), "%s", error.message);
        discard(temp_path("out"));
    }
    CHECK(besa_tokens_sample(&g_calibration, 1000, 1000, 0, 512, ids, &error) == BESA_ERROR_TOKENS, "%s", error.message);
    CHECK(besa_tokens_sample(&g_calibration, 1, 32, 0, 3, ids, &error) == BESA_ERROR_TOKEN, "%s", error.message);
    c.nsamples = 0;
    CHECK(besa_prune(checkpoint, temp_path("out"), NULL, &c, &o, NULL, &error) != BESA_OK, "no sequences");
    c.nsamples = 2, c.test_ids = ids, c.test_seqlen = 16, c.test_windows = -1;
    CHECK(besa_prune(checkpoint, temp_path("out"), NULL, &c, &o, NULL, &error) == BESA_ERROR_TOKENS && strstr(error.message, "-1 windows"),
          "%s", error.message);
    c.test_windows = 0, c.seqlen = 0;
    CHECK(besa_prune(checkpoint, temp_path("out"), NULL, &c, &o, NULL, &error) != BESA_OK, "no tokens");
    memset(ids, 0, sizeof ids);
    CHECK_OK(besa_perplexity(checkpoint, NULL, ids, 1, 2, &ppl, NULL, NULL, NULL, &error), error); /* one prediction */
    CHECK(besa_perplexity(checkpoint, NULL, ids, 2, 1, &ppl, NULL, NULL, NULL, &error) == BESA_ERROR_TOKENS, "no prediction");
    CHECK(besa_perplexity(checkpoint, NULL, ids, 0, 2, &ppl, NULL, NULL, NULL, &error) == BESA_ERROR_TOKENS, "no windows");
    besa_checkpoint_close(checkpoint);
}

static void test_output_place(void)
{
    const char *model = temp_path("place");
    char path[600];
    setup s;
    fixture_random_llama(model, 1, 32, 64, 4, 2, 64, BESA_F32);
    s = new_setup(model, BESA_METHOD_WANDA, 0.5);
    s.source = model;
    expect(&s, BESA_ERROR_EXISTS, "place");
    snprintf(path, sizeof path, "%s/", model);
    s.output = path;
    expect(&s, BESA_ERROR_EXISTS, "place");
    snprintf(path, sizeof path, "%s/../place/.", model);
    expect(&s, BESA_ERROR_EXISTS, "place");
    mkdir(temp_path("empty"), 0777);
    s.output = temp_path("empty");
    expect(&s, BESA_ERROR_EXISTS, "empty");
    write_bytes(temp_path("file"), "x", 1);
    s.output = temp_path("file");
    expect(&s, BESA_ERROR_EXISTS, "file");
    s.output = temp_path("no/such/place");
    CHECK(run(&s) != BESA_OK && strstr(s.error.message, "no/such"), "%s", s.error.message);
    besa_report_free(&s.report);
    s.output = NULL;                            /* measure only */
    s.windows = 2;
    CHECK_RUN(&s);
    CHECK(s.report.perplexity > 1 && s.report.sparsity > 0.4, "perplexity %g", s.report.perplexity);
    besa_report_free(&s.report);
}

static int limit_in_last_block(void *user, const besa_progress *p)
{
    (void)user;
    if (p->block == p->blocks - 1) limit_files(1000);
    return 0;
}

/* A disk that is full, where files may not grow past a limit: from the start, which leaves nothing, and after some blocks,
 * which are gone on from when there is room again. */
static void test_full_disk(void)
{
    setup s = new_setup(temp_path("whole"), BESA_METHOD_WANDA, 0.5);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    char first[256];
    besa_result r;
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    fflush(stdout);
    for (int late = 0; late < 2; late++) {
        s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5);
        if (late) s.options.progress = limit_in_last_block;
        else limit_files(400 * 1000);
        r = run(&s);
        limit_files(RLIM_INFINITY);
        CHECK(r == BESA_ERROR_WRITE && strstr(s.error.message, partial_of(s.output)), "%s: %s", besa_result_string(r),
              s.error.message);
        CHECK(!exists(s.output), "an output was left");
        CHECK(exists(partial_of(s.output)) == late, "late %d: %s", late, late ? "blocks were thrown away" : "files were left");
        besa_report_free(&s.report);
        s.options.progress = NULL;
        CHECK_RUN(&s);
        CHECK(s.report.resumed_blocks == (late ? s.report.num_blocks - 1 : 0), "late %d: %d blocks taken over", late,
              (int)s.report.resumed_blocks);
        verify(&s);
        besa_report_free(&s.report);
        CHECK(compare_directories(temp_path("whole"), s.output, NULL, first) == 0, "late %d: %s differs", late, first);
        discard(s.output);
    }
    signal(SIGXFSZ, handler);
    discard(temp_path("whole"));
}

/* ---- sparsity over depth ----------------------------------------------------------------------- */

/* Make one weight of a tensor NaN. */
static void spoil_weight(const char *directory, const char *name)
{
    static const float bad = NAN;
    besa_checkpoint *checkpoint = NULL;
    besa_error error;
    char file[600];
    CHECK_OK(besa_checkpoint_open(&checkpoint, directory, &error), error);
    if (!checkpoint) return;
    int64_t at = (int64_t)besa_checkpoint_find(checkpoint, name)->offset;
    besa_checkpoint_close(checkpoint);
    snprintf(file, sizeof file, "%s/model.safetensors", directory);
    int fd = open(file, O_RDWR);
    CHECK(fd >= 0 && pwrite(fd, &bad, sizeof bad, at + 40) == sizeof bad, "%s", file);
    close(fd);
}

/* Some blocks alone, and a sparsity for each, by every method: the others stay as they are, byte for byte, and all the rest is
 * as it would be for a model of that target. */
static void test_depth(void)
{
    static const double list[] = { 0.25, 0.75, 0.5, 0.375, 0.625 };
    char first[256];
    setup s = new_setup(temp_path("all"), BESA_METHOD_BESA, 0.5);
    run_and_verify(&s);
    s.output = temp_path("out"), s.options.first_block = 0, s.options.num_blocks = 5;
    run_and_verify(&s);
    CHECK(compare_directories(temp_path("all"), s.output, "besa.json", first) == 0, "blocks 0 to 4 are all: %s differs", first);
    discard(s.output);
    discard(temp_path("all"));
    for (int method = 0; method < 4; method++)
        for (int i = 0; i < 5; i++) {
            s = new_setup(temp_path("out"), (besa_method)method, 0.5);
            s.windows = 3;
            if (i == 0) s.options.first_block = 1, s.options.num_blocks = 2;
            if (i == 1) s.options.first_block = 4, s.options.depth_slope = 0.5; /* of one block: nothing */
            if (i == 2) s.options.depth_slope = 0.3, s.options.learn = BESA_LEARN_WEIGHTS, s.options.weight_epochs = 1;
            if (i == 3) s.options.block_targets = list, s.options.num_block_targets = 5;
            if (i == 4) s.options.first_block = 2, s.options.depth_slope = -0.25, s.options.dense_share = 0.5;
            run_and_verify(&s);
            discard(s.output);
        }
    s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5);
    s.options.first_block = 5;
    expect(&s, BESA_ERROR_OPTION, "the model has blocks 0 to 4");
    s.options.first_block = 3, s.options.num_blocks = 3;
    expect(&s, BESA_ERROR_OPTION, "3 blocks from number 3 on");
    s.options.num_blocks = INT64_MAX;
    expect(&s, BESA_ERROR_OPTION, "the model has blocks 0 to 4");
    s.options.first_block = s.options.num_blocks = 0, s.options.depth_slope = 0.99, s.options.rates.target = 0.25;
    expect(&s, BESA_ERROR_OPTION, "block 0 would have a sparsity of -0.245");
    s.options.rates.target = 0.5, s.options.block_targets = list, s.options.num_block_targets = 5;
    expect(&s, BESA_ERROR_OPTION, "depth_slope");
    s.options.depth_slope = 0, s.options.num_block_targets = 4;
    expect(&s, BESA_ERROR_OPTION, "another length");
    s.options.block_targets = NULL;
    expect(&s, BESA_ERROR_OPTION, "block_targets is NULL");
    s.options.block_targets = list, s.options.num_block_targets = 5, s.options.rates.target = 0.6;
    expect(&s, BESA_ERROR_OPTION, "a mean of 0.5");
    s.options.rates.target = 0.5, s.options.pattern_n = 2, s.options.pattern_m = 4;
    expect(&s, BESA_ERROR_OPTION, "pattern of 2:4");
    s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
    s.options.depth_slope = 0.5, s.options.rates.penalty = 0.9 * 1e37 * 0.25; /* that a target of 0.25 cannot have */
    expect(&s, BESA_ERROR_OPTION, "penalty");
    /* a dense block that is not finite is found as any other */
    fixture_random_llama(temp_path("bad"), 3, 64, 144, 4, 2, 64, BESA_F32);
    spoil_weight(temp_path("bad"), "model.layers.2.mlp.up_proj.weight");
    s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5);
    s.source = temp_path("bad"), s.options.num_blocks = 2;
    expect(&s, BESA_ERROR_NOT_FINITE, "model.layers.2.mlp.up_proj");
    discard(s.output);
}

/* ---- weights that learn ----------------------------------------------------------------------- */

/* How many weights of the first block are 0 in one output and not in the other; most of those that are in none have moved.
 * (Later blocks are masked by what the first one puts out.) */
static int64_t other_zeros(const char *directory, const char *like)
{
    besa_checkpoint *a = NULL, *b = NULL;
    besa_error error;
    int64_t others = 0, kept = 0, moved = 0;
    CHECK_OK(besa_checkpoint_open(&a, directory, &error), error);
    CHECK_OK(besa_checkpoint_open(&b, like, &error), error);
    for (int64_t i = 0; a && b && i < besa_checkpoint_tensor_count(a); i++) {
        const besa_tensor *x = besa_checkpoint_tensor(a, i), *y = besa_checkpoint_tensor(b, i);
        size_t size = besa_dtype_size(x->dtype);
        for (size_t k = 0; strstr(x->name, "layers.0.") && strstr(x->name, "_proj.weight") && k < x->bytes; k += size) {
            int zero = !memcmp((const char *)x->data + k, "\0\0\0", size), zero_too = !memcmp((const char *)y->data + k, "\0\0\0", size);
            others += zero != zero_too;
            kept += !zero;
            moved += !zero && memcmp((const char *)x->data + k, (const char *)y->data + k, size) != 0;
        }
    }
    CHECK(moved > kept / 2, "%d of %d kept weights moved", (int)moved, (int)kept);
    besa_checkpoint_close(a);
    besa_checkpoint_close(b);
    return others;
}

/* Masks stay as they are while weights learn, by every method and in every element type; and with steps too small for a
 * float the output is that of the masks alone, whether weights learn after the rates or with them. */
static void test_learned_weights(void)
{
    static const char *const model[] = { "llama_mha_f16", "llama3_gqa_tied_bf16", "qwen3_qknorm_f32" };
    for (int i = 0; i < 12; i++) {
        char source[512], first[256];
        setup s = new_setup(temp_path("masks"), (besa_method)(i / 3), 0.5);
        snprintf(source, sizeof source, "%s/checkpoints/%s", g_reference, model[i % 3]);
        s.source = source;
        if (i / 3 == BESA_METHOD_WANDA) s.options.pattern_n = 2, s.options.pattern_m = 4, s.options.rates.target = 0;
        s.options.dense_share = 0.5;
        CHECK_RUN(&s);
        besa_report_free(&s.report);
        s.output = temp_path("out");
        s.options.learn = BESA_LEARN_WEIGHTS, s.options.weight_epochs = 2;
        CHECK_RUN(&s);
        verify_files(source, s.output);
        besa_report_free(&s.report);
        CHECK(other_zeros(s.output, temp_path("masks")) == 0, "case %d: weights that learned are pruned otherwise", i);
        discard(s.output);
        s.options.weight_lr = 1e-30;
        for (int both = 0; both < (i / 3 == BESA_METHOD_BESA ? 2 : 1); both++) {
            if (both) s.options.learn = BESA_LEARN_BOTH;
            CHECK_RUN(&s);
            besa_report_free(&s.report);
            CHECK(compare_directories(temp_path("masks"), s.output, "besa.json", first) == 0, "case %d: %s differs", i, first);
            discard(s.output);
        }
        discard(temp_path("masks"));
    }
    setup s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5);
    s.options.learn = BESA_LEARN_WEIGHTS, s.options.weight_lr = 100; /* what diverges is said, and what overflows refused */
    CHECK_RUN(&s);
    CHECK(s.report.notes && strstr(s.report.notes, "learning made the loss of"), "no note: %s", s.report.notes ? s.report.notes : "");
    besa_report_free(&s.report);
    discard(s.output);
    s.options.weight_lr = 1e29;
    expect(&s, BESA_ERROR_NOT_FINITE, "weight_lr may be too large");
    discard(s.output);
    s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5);
    s.options.learn = BESA_LEARN_BOTH;
    expect(&s, BESA_ERROR_OPTION, "wanda has no rates");
    s.options.learn = BESA_LEARN_WEIGHTS, s.options.dense_share = 0.5, s.options.dense_stream = 1;
    expect(&s, BESA_ERROR_OPTION, "dense_share");
}

/* BESA by a pattern: n of every m are 0 in the files, in every element type. Where weights alone learn they do so by Wanda's
 * masks; where their masks follow them others are found, unless nothing moves; fitting kept weights anew leaves masks. */
static void test_learned_patterns(void)
{
    static const int pattern[][2] = { { 2, 4 }, { 4, 8 }, { 6, 8 }, { 8, 16 }, { 1, 4 } };
    const char *model = temp_path("model48"), *masks = temp_path("masks");
    char first[256];
    for (int i = 0; i < 5; i++) {
        fixture_random_llama(model, 2, 48, 96, 4, 2, 64, i % 3 == 0 ? BESA_BF16 : i % 3 == 1 ? BESA_F16 : BESA_F32);
        setup s = new_setup(masks, BESA_METHOD_WANDA, 0), wanda;
        s.source = model, s.nsamples = 12;
        s.options.pattern_n = pattern[i][0], s.options.pattern_m = pattern[i][1];
        s.options.rates.target = (double)pattern[i][0] / pattern[i][1];
        s.options.dense_share = 0.5, s.options.weight_epochs = 1;
        run_and_verify(&s);
        wanda = s;
        wanda.output = temp_path("wanda"), wanda.options.learn = BESA_LEARN_WEIGHTS;
        run_and_verify(&wanda);
        s.output = temp_path("out"), s.options.method = BESA_METHOD_BESA, s.options.learn = BESA_LEARN_WEIGHTS;
        run_and_verify(&s);
        CHECK(compare_directories(wanda.output, s.output, "besa.json", first) == 0, "%d:%d: %s is not as by wanda's masks", pattern[i][0],
              pattern[i][1], first);
        discard(s.output);
        s.options.learn = BESA_LEARN_BOTH, s.options.weight_lr = 0.05;
        CHECK_RUN(&s);
        verify(&s);
        for (int b = 0; b < 2; b++)
            CHECK(s.report.block[b].loss_after < s.report.block[b].loss_masks && s.report.block[b].loss_masks < s.report.block[b].loss_uniform &&
                  s.report.block[b].loss_before == s.report.block[b].loss_uniform, "losses %g, %g, %g, %g", s.report.block[b].loss_uniform,
                  s.report.block[b].loss_before, s.report.block[b].loss_masks, s.report.block[b].loss_after);
        char *json = besa_report_json(&s.report);
        CHECK(json && strstr(json, "\"epochs\": 1") && strstr(json, "\"importance\"") && !strstr(json, "\"lr\"") &&
              !strstr(json, "\"no_projection\""), "the report has options of rates, or lacks others: %s", json ? json : "");
        free(json);
        besa_report_free(&s.report);
        CHECK(other_zeros(s.output, masks) > 0, "%d:%d: no mask followed the weights", pattern[i][0], pattern[i][1]);
        discard(s.output);
        s.options.weight_lr = 1e-30;
        run_and_verify(&s);
        CHECK(compare_directories(masks, s.output, "besa.json", first) == 0, "%d:%d: %s differs", pattern[i][0], pattern[i][1], first);
        discard(s.output);
        s.options.learn = BESA_LEARN_WEIGHTS, s.options.importance = BESA_IMPORTANCE_GRADIENT, s.options.weight_lr = 0.3;
        run_and_verify(&s);
        CHECK(other_zeros(s.output, masks) > 0, "%d:%d: gradients choose what wanda does", pattern[i][0], pattern[i][1]);
        setup fitted = s;
        fitted.output = temp_path("fitted"), fitted.options.refit = BESA_REFIT_CG;
        run_and_verify(&fitted);
        CHECK(other_zeros(fitted.output, s.output) == 0, "%d:%d: fitted weights have other masks", pattern[i][0], pattern[i][1]);
        discard(fitted.output), discard(s.output), discard(wanda.output), discard(masks), discard(model);
    }
}

/* Norms and biases that learn with the weights, in every element type: masks stay, all of them move where their block is
 * pruned, the output is the very model that was measured on the way, and steps too small for a float leave every byte. */
static void test_learned_vectors(void)
{
    static const char *const model[] = { "llama_mha_f16", "qwen2_bias_tied_bf16", "qwen3_qknorm_f32" };
    for (int i = 0; i < 6; i++) {
        char source[512], first[256];
        double ppl = 0;
        besa_error error = { BESA_OK, "" };
        besa_checkpoint *out = NULL;
        setup s = new_setup(temp_path("masks"), i < 3 ? BESA_METHOD_BESA : BESA_METHOD_WANDA, 0.5);
        snprintf(source, sizeof source, "%s/checkpoints/%s", g_reference, model[i % 3]);
        s.source = source, s.windows = 2;
        CHECK_RUN(&s);
        besa_report_free(&s.report);
        s.output = temp_path("out");
        s.options.learn = i < 3 ? BESA_LEARN_BOTH : BESA_LEARN_WEIGHTS, s.options.weight_epochs = 2, s.options.learn_vectors = 1;
        CHECK_RUN(&s);
        verify(&s);
        if (i >= 3) CHECK(other_zeros(s.output, temp_path("masks")) == 0, "case %d: pruned otherwise", i);
        CHECK_OK(besa_checkpoint_open(&out, s.output, &error), error);
        int32_t ids[2 * 64];
        for (int k = 0; out && k < 2 * 64; k++) ids[k] = (int32_t)(g_test.ids[k] % besa_checkpoint_config(out)->vocab_size);
        if (out) CHECK_OK(besa_perplexity(out, NULL, ids, 2, 64, &ppl, NULL, NULL, NULL, &error), error);
        CHECK(ppl == s.report.perplexity, "case %d: perplexity %.17g on the way, %.17g of the output", i, s.report.perplexity, ppl);
        besa_checkpoint_close(out);
        besa_report_free(&s.report);
        discard(s.output);
        s.options.weight_lr = 1e-30;
        CHECK_RUN(&s);
        besa_report_free(&s.report);
        CHECK(compare_directories(temp_path("masks"), s.output, "besa.json", first) == 0, "case %d: %s differs", i, first);
        discard(s.output);
        discard(temp_path("masks"));
    }
}

/* ---- kept weights fitted anew ----------------------------------------------------------------- */

/* Masks stay as they are, by every method and in every element type, and blocks come nearer to their dense outputs; the same
 * where the masks come from another checkpoint, and weights that learn then begin with what was fitted. */
static void test_refits(void)
{
    static const char *const model[] = { "llama_mha_f16", "llama3_gqa_tied_bf16", "qwen3_qknorm_f32" };
    for (int i = 0; i < 12; i++) {
        besa_method method = (besa_method)(i / 3);
        besa_refit refit = (i + i / 3) % 2 && method != BESA_METHOD_SPARSEGPT ? BESA_REFIT_OBS : BESA_REFIT_CG;
        char source[512], first[256];
        besa_checkpoint *masks = NULL;
        besa_error error;
        double loss;
        setup s = new_setup(temp_path("masks"), method, 0.5);
        snprintf(source, sizeof source, "%s/checkpoints/%s", g_reference, model[i / 2 % 3]);
        s.source = source;
        if (method == BESA_METHOD_MAGNITUDE) s.options.pattern_n = 2, s.options.pattern_m = 4, s.options.rates.target = 0;
        CHECK_RUN(&s);
        loss = s.report.block[0].loss_all;
        besa_report_free(&s.report);
        s.output = temp_path("out"), s.options.refit = refit;
        CHECK_RUN(&s);
        verify_files(source, s.output);
        CHECK(s.report.block[0].loss_all < loss, "case %d: a loss of %g, %g without", i, s.report.block[0].loss_all, loss);
        besa_report_free(&s.report);
        CHECK(other_zeros(s.output, temp_path("masks")) == 0, "case %d: weights that were fitted are pruned otherwise", i);
        if (method == BESA_METHOD_WANDA || method == BESA_METHOD_MAGNITUDE) { /* their own masks, from that output */
            setup k = s;
            CHECK_OK(besa_checkpoint_open(&masks, s.output, &error), error);
            k.output = temp_path("kept"), k.options.method = BESA_METHOD_KEEP, k.options.masks = masks;
            k.options.pattern_n = k.options.pattern_m = 0;
            CHECK_RUN(&k);
            besa_report_free(&k.report);
            CHECK(compare_directories(s.output, k.output, "besa.json", first) == 0, "case %d: %s differs where the masks are kept", i, first);
            besa_checkpoint_close(masks);
            discard(k.output);
        }
        setup l = s;
        l.output = temp_path("learned"), l.options.learn = BESA_LEARN_WEIGHTS, l.options.weight_lr = 1e-30;
        CHECK_RUN(&l);
        CHECK(l.report.block[0].loss_masks == l.report.block[0].loss_after, "case %d: weights begin at a loss of %g and end at %g", i,
              l.report.block[0].loss_masks, l.report.block[0].loss_after);
        besa_report_free(&l.report);
        CHECK(compare_directories(s.output, l.output, "besa.json", first) == 0, "case %d: %s differs though nothing moved", i, first);
        discard(l.output);
        discard(s.output);
        discard(temp_path("masks"));
    }
    setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
    s.options.refit = BESA_REFIT_CG, s.options.learn = BESA_LEARN_BOTH;
    expect(&s, BESA_ERROR_OPTION, "learn both");
}

/* ---- quantised weights ------------------------------------------------------------------------ */

/* The value of w in its group's grid, by the paper's formula in float with clips of 1; w0 (columns) the group's dense weights. */
static float on_grid(float w, const float *w0, int64_t columns, int bits)
{
    float high = 0, low = 0, most = (float)((1 << bits) - 1), h, z, u;
    for (int64_t j = 0; j < columns; j++) high = fmaxf(high, w0[j]), low = fminf(low, w0[j]);
    h = (high - low) / most;
    if (!(h > 0)) return 0;
    z = -nearbyintf(low / h);
    u = nearbyintf(w / h) + z;
    return h * ((u < 0 ? 0 : u > most ? most : u) - z);
}

static float element(const besa_tensor *t, int64_t i)
{
    float f;
    uint16_t half;
    memcpy(&f, (const char *)t->data + 4 * (t->dtype == BESA_F32 ? i : 0), 4);
    memcpy(&half, (const char *)t->data + 2 * i, 2);
    return t->dtype == BESA_F32 ? f : t->dtype == BESA_F16 ? besa__f16_to_f32(half) : besa__bf16_to_f32(half);
}

static float rounded(besa_dtype dtype, float x)
{
    return dtype == BESA_F32 ? x : dtype == BESA_F16 ? besa__f16_to_f32(besa__f32_to_f16(x)) : besa__bf16_to_f32(besa__f32_to_bf16(x));
}

/* One layer: no more values in a group than there are levels, none of them -0; with `masks` (or NULL) they are those of its
 * weights on the dense ones' grid. Returns the zeros. */
static int64_t verify_levels(const besa_tensor *dense, const besa_tensor *out, const besa_tensor *masks, const besa_prune_options *o)
{
    int64_t C = out->shape[1], group = o->group_size && o->group_size < C ? o->group_size : C, zeros = 0, wrong = 0, many = 0;
    float *w0 = (float *)malloc((size_t)C * sizeof *w0), levels[256];
    for (int64_t r = 0; r < out->shape[0]; r++)
        for (int64_t first = 0; first < C; first += group) {
            int64_t n = C - first < group ? C - first : group;
            int count = 0;
            for (int64_t j = 0; j < n; j++) w0[j] = element(dense, r * C + first + j);
            for (int64_t j = 0; j < n; j++) {
                float x = element(out, r * C + first + j);
                int k = 0;
                if (masks) wrong += x != rounded(out->dtype, on_grid(element(masks, r * C + first + j), w0, n, o->bits));
                wrong += x == 0 && signbit(x);
                zeros += x == 0;
                while (k < count && levels[k] != x) k++;
                if (k == count && count < 256) levels[count++] = x;
            }
            many += count > 1 << o->bits;
        }
    free(w0);
    CHECK(wrong == 0 && many == 0, "%s: %d weights are not on their level, %d groups have too many", out->name, (int)wrong, (int)many);
    return zeros;
}

/* Where a tensor's bytes lie in besa_quantization.safetensors, whose header begins 8 bytes from its start; NULL: there is none. */
static const unsigned char *find_code(const unsigned char *file, size_t size, const char *tensor, const char *kind, int64_t rows,
                                      int64_t columns)
{
    char key[256], *at;
    uint64_t header = 0, begin, end;
    for (int i = 0; i < 8; i++) header |= (uint64_t)file[i] << (8 * i);
    snprintf(key, sizeof key, "\"%.*s.%s\":{\"dtype\":\"%s\",\"shape\":[%d,%d],\"data_offsets\":[", (int)strlen(tensor) - 7, tensor, kind,
             !strcmp(kind, "scale") ? "F32" : "U8", (int)rows, (int)columns);
    if (header % 8 || header + 8 > size || !(at = strstr((char *)(uintptr_t)file + 8, key))) return NULL;
    begin = strtoull(at + strlen(key), &at, 10), end = strtoull(at + 1, NULL, 10);
    return end - begin == (uint64_t)(rows * columns) * (strcmp(kind, "scale") ? 1 : 4) && 8 + header + end <= size ? file + 8 + header + begin
           : NULL;
}

/* The weights of one layer are what its codes say, to the bit. */
static void verify_codes(const unsigned char *file, size_t size, const besa_tensor *out, const besa_prune_options *o)
{
    int64_t R = out->shape[0], C = out->shape[1], group = o->group_size && o->group_size < C ? o->group_size : C, wrong = 0;
    int64_t G = (C + group - 1) / group;
    const unsigned char *scale = find_code(file, size, out->name, "scale", R, G), *zero = find_code(file, size, out->name, "zero", R, G);
    const unsigned char *code = find_code(file, size, out->name, "codes", R, C);
    if (!CHECK(scale && zero && code, "%s has no codes", out->name)) return;
    for (int64_t i = 0; i < R * C; i++) {
        int64_t g = i / C * G + i % C / group;
        float h, x;
        memcpy(&h, scale + 4 * g, 4);
        x = rounded(out->dtype, h * ((float)code[i] - (float)zero[g]));
        wrong += x != element(out, i) || signbit(x) != signbit(element(out, i)) || code[i] >> o->bits || zero[g] >> o->bits;
    }
    CHECK(wrong == 0, "%s: %d codes are of other weights", out->name, (int)wrong);
}

/* All layers; the first block's with `masks`, an output without bits, as later ones are masked by what the first puts out.
 * Returns the zeros of all. */
static int64_t verify_quantized(const setup *s, const char *masks)
{
    besa_checkpoint *dense = NULL, *out = NULL, *other = NULL;
    besa_error error;
    int64_t zeros = 0;
    size_t size;
    char path[600];
    snprintf(path, sizeof path, "%s/besa_quantization.safetensors", s->output);
    unsigned char *codes = read_bytes(path, &size);
    CHECK_OK(besa_checkpoint_open(&dense, s->source, &error), error);
    CHECK_OK(besa_checkpoint_open(&out, s->output, &error), error);
    if (masks) CHECK_OK(besa_checkpoint_open(&other, masks, &error), error);
    for (int64_t b = 0; dense && out && b < besa_checkpoint_config(out)->num_hidden_layers; b++)
        for (int i = 0; i < BESA_LAYERS; i++) {
            zeros += verify_levels(besa_checkpoint_layer(dense, b, i), besa_checkpoint_layer(out, b, i),
                                   masks && b == 0 ? besa_checkpoint_layer(other, b, i) : NULL, &s->options);
            if (CHECK(codes && size > 8, "%s is not there", path)) verify_codes(codes, size, besa_checkpoint_layer(out, b, i), &s->options);
        }
    free(codes);
    besa_checkpoint_close(dense);
    besa_checkpoint_close(out);
    besa_checkpoint_close(other);
    return zeros;
}

/* Every method and element type: masks as without bits, then the nearest level, or what learned clips make of them. */
static void test_bits(void)
{
    static const char *const model[] = { "llama_mha_f16", "llama3_gqa_tied_bf16", "qwen3_qknorm_f32" };
    static const int bits[] = { 4, 3, 8 }, group[] = { 0, 5, 1000 };
    for (int i = 0; i < 12; i++) {
        char source[512];
        besa_method method = (besa_method)(i / 3);
        setup s = new_setup(temp_path("masks"), method, 0.5);
        snprintf(source, sizeof source, "%s/checkpoints/%s", g_reference, model[i % 3]);
        s.source = source;
        if (method == BESA_METHOD_MAGNITUDE) s.options.pattern_n = 2, s.options.pattern_m = 4, s.options.rates.target = 0;
        s.options.rates.d_coef = 1000, s.nsamples = 16;
        CHECK_RUN(&s);
        besa_report_free(&s.report);
        s.output = temp_path("out");
        s.options.bits = bits[i % 3], s.options.group_size = group[i % 3];
        for (int learned = 0; learned < 3; learned++) {
            s.options.clipping = learned ? BESA_CLIPPING_LEARNED : BESA_CLIPPING_NONE;
            if (learned == 2) {
                s.options.learn = method == BESA_METHOD_BESA ? BESA_LEARN_BOTH : BESA_LEARN_WEIGHTS;
                s.options.weight_epochs = 1, s.options.weight_lr = 0.05; /* small steps: what SparseGPT leaves is near its best */
            }
            CHECK_RUN(&s);
            int exact = !learned && method != BESA_METHOD_BESA && method != BESA_METHOD_SPARSEGPT;
            CHECK(verify_quantized(&s, exact ? temp_path("masks") : NULL) == s.report.pruned, "case %d: the report has %d zeros", i,
                  (int)s.report.pruned);
            CHECK(s.report.sparsity > (method == BESA_METHOD_BESA ? 0.5 - 1e-9 : 0.47) && s.report.sparsity < 0.8, "case %d: sparsity %g", i,
                  s.report.sparsity);
            for (int64_t b = 0; b < s.report.num_blocks; b++) {
                const besa_block_report *r = &s.report.block[b];
                int last = learned == 2 || (learned && method != BESA_METHOD_BESA); /* something learns with final masks */
                CHECK(last ? r->loss_after < r->loss_masks : r->loss_after == r->loss_masks, "case %d learned %d block %d: losses %g, %g",
                      i, learned, (int)b, r->loss_masks, r->loss_after);
            }
            besa_report_free(&s.report);
            discard(s.output);
        }
        discard(temp_path("masks"));
    }
    setup s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5); /* masks of quantised weights are others */
    char first[256];
    s.options.bits = 3;
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    s.output = temp_path("first"), s.options.quantize_first = 1;
    CHECK_RUN(&s);
    verify_quantized(&s, NULL);
    besa_report_free(&s.report);
    CHECK(compare_directories(temp_path("out"), s.output, "besa.json", first) > 0, "quantize_first changes nothing");
    discard(s.output);
    s.options.method = BESA_METHOD_BESA, s.options.bits = 2; /* where more than half of the levels are 0 */
    CHECK_RUN(&s);
    CHECK(verify_quantized(&s, NULL) == s.report.pruned && s.report.sparsity > 0.55, "sparsity %g", s.report.sparsity);
    besa_report_free(&s.report);
    discard(s.output);
    s = new_setup(temp_path("masks"), BESA_METHOD_WANDA, 0.5); /* masks of another program, then levels */
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    besa_checkpoint *masks = NULL;
    CHECK_OK(besa_checkpoint_open(&masks, temp_path("masks"), &s.error), s.error);
    s = new_setup(temp_path("first"), BESA_METHOD_KEEP, 0);
    s.options.masks = masks, s.options.bits = 5, s.options.group_size = 20;
    CHECK_RUN(&s);
    verify_quantized(&s, temp_path("masks"));
    besa_report_free(&s.report);
    besa_checkpoint_close(masks);
    discard(temp_path("masks"));
    discard(s.output);
    discard(temp_path("out"));
    s = new_setup(temp_path("first"), BESA_METHOD_WANDA, 0.5);
    s.options.bits = 3;
    s.options.clipping = BESA_CLIPPING_LEARNED, s.options.clip_lr = 30; /* what diverges is said */
    CHECK_RUN(&s);
    CHECK(s.report.notes && strstr(s.report.notes, "a clip_lr below 30 may help"), "no note: %s", s.report.notes ? s.report.notes : "");
    besa_report_free(&s.report);
    discard(s.output);
    s.options.clip_lr = 0, s.options.learn = BESA_LEARN_WEIGHTS, s.options.weight_lr = 1e8; /* weights of 16 bits become infinite */
    char source[512];
    snprintf(source, sizeof source, "%s/checkpoints/llama_mha_f16", g_reference);
    s.source = source;
    expect(&s, BESA_ERROR_NOT_FINITE, "pruned weights are NaN or infinite: weight_lr may be too large");
    discard(s.output);
}

/* ---- determinism and memory ------------------------------------------------------------------ */

static void test_threads(void)
{
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_SPARSEGPT, BESA_METHOD_WANDA, BESA_METHOD_BESA,
                                          BESA_METHOD_WANDA, BESA_METHOD_BESA, BESA_METHOD_SPARSEGPT, BESA_METHOD_WANDA,
                                          BESA_METHOD_BESA, BESA_METHOD_BESA, BESA_METHOD_BESA, BESA_METHOD_BESA };
    static const int threads[] = { 1, 2, 3, 8 };
    for (int m = 0; m < 12; m += TEST_SANITIZED ? 3 : 1) {
        double ppl[4];
        for (int t = 0; t < 4; t += TEST_SANITIZED ? 2 : 1) {
            setup s = new_setup(temp_path("threads%d", threads[t]), method[m], 0.5);
            char first[256];
            s.threads = threads[t];
            s.windows = 8;
            if (m == 3 || m == 8) s.options.learn = BESA_LEARN_BOTH, s.options.dense_share = 0.5, s.options.batch_size = 2;
            if (m > 3 && m < 7) s.options.refit = m == 5 ? BESA_REFIT_OBS : BESA_REFIT_CG;
            if (m == 7) s.options.learn = BESA_LEARN_WEIGHTS, s.options.learn_vectors = 1, s.options.weight_epochs = 1;
            if (m == 8) s.options.bits = 4, s.options.group_size = 24;
            if (m > 9) s.options.granularity = m == 10 ? BESA_GRANULARITY_ATTN_MLP : BESA_GRANULARITY_LAYER, s.options.batch_size = 3;
            if (m == 9) s.options.learn = BESA_LEARN_BOTH, s.options.pattern_n = 2, s.options.pattern_m = 4;
            CHECK_RUN(&s);
            ppl[t] = s.report.perplexity;
            CHECK(ppl[t] == ppl[0], "%d threads: perplexity %.17g, one thread %.17g", threads[t], ppl[t], ppl[0]);
            CHECK(compare_directories(temp_path("threads1"), s.output, NULL, first) == 0,
                  "method %d, %d threads: %s differs", (int)method[m], threads[t], first);
            besa_report_free(&s.report);
        }
        for (int t = 0; t < 4; t += TEST_SANITIZED ? 2 : 1) discard(temp_path("threads%d", threads[t]));
    }
}

/* A CPU backend that counts what is allocated from it. */
static struct counted {
    besa_result (*alloc)(besa_backend *be, void **device, size_t bytes);
    void (*release)(besa_backend *be, void *device);
    besa_result (*host_alloc)(besa_backend *be, void **host, size_t bytes);
    void (*host_release)(besa_backend *be, void *host);
    struct { void *p; size_t bytes; int host; } block[256];
    size_t live[2], peak[2];
    int fail_at, calls;
} g_counted;

static besa_result counted_take(besa_backend *be, void **p, size_t bytes, int host)
{
    besa_result r;
    if (++g_counted.calls == g_counted.fail_at) return BESA_ERROR_MEMORY;
    r = host ? g_counted.host_alloc(be, p, bytes) : g_counted.alloc(be, p, bytes);
    for (int i = 0; r == BESA_OK && i < 256; i++)
        if (!g_counted.block[i].p) {
            g_counted.block[i].p = *p, g_counted.block[i].bytes = bytes, g_counted.block[i].host = host;
            g_counted.live[host] += bytes;
            if (g_counted.live[host] > g_counted.peak[host]) g_counted.peak[host] = g_counted.live[host];
            break;
        }
    return r;
}

static void counted_give(besa_backend *be, void *p, int host)
{
    for (int i = 0; p && i < 256; i++)
        if (g_counted.block[i].p == p) {
            g_counted.live[host] -= g_counted.block[i].bytes;
            g_counted.block[i].p = NULL;
            break;
        }
    if (host) g_counted.host_release(be, p);
    else g_counted.release(be, p);
}

static besa_result counted_alloc(besa_backend *be, void **p, size_t bytes) { return counted_take(be, p, bytes, 0); }
static besa_result counted_host_alloc(besa_backend *be, void **p, size_t bytes) { return counted_take(be, p, bytes, 1); }
static void counted_release(besa_backend *be, void *p) { counted_give(be, p, 0); }
static void counted_host_release(besa_backend *be, void *p) { counted_give(be, p, 1); }

static besa_backend counted_backend(int fail_at)
{
    besa_backend be;
    besa_cpu_options cpu;
    besa_error error;
    memset(&cpu, 0, sizeof cpu);
    memset(&g_counted, 0, sizeof g_counted);
    cpu.threads = 2;
    CHECK_OK(besa_cpu_backend(&be, &cpu, &error), error);
    g_counted.alloc = be.alloc, g_counted.release = be.free;
    g_counted.host_alloc = be.host_alloc, g_counted.host_release = be.host_free;
    g_counted.fail_at = fail_at;
    be.alloc = counted_alloc, be.free = counted_release;
    be.host_alloc = counted_host_alloc, be.host_free = counted_host_release;
    return be;
}

static int64_t g_forward_calls;
static besa_result (*g_attention_forward)(besa_backend *, void *, const void *, const void *, const void *,
                                          const besa_attention_shape *);

static besa_result counted_attention(besa_backend *be, void *o, const void *q, const void *k, const void *v,
                                     const besa_attention_shape *s)
{
    g_forward_calls++;
    return g_attention_forward(be, o, q, k, v, s);
}

/* The calibration sequences go through a block once before those that are pruned, twice through those, and through none behind
 * the last. */
static void test_blocks_behind(void)
{
    static const struct { int64_t first, count; } range[] = { { 0, 1 }, { 0, 2 }, { 1, 1 } };
    int64_t calls[3];
    for (int i = 0; i < 3; i++) {
        setup s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5);
        besa_backend be = counted_backend(0);
        g_attention_forward = be.attention_forward, be.attention_forward = counted_attention;
        g_forward_calls = 0;
        s.be = &be, s.options.first_block = range[i].first, s.options.num_blocks = range[i].count;
        run_and_verify(&s);
        calls[i] = g_forward_calls;
        discard(s.output);
        be.destroy(&be);
        CHECK(calls[i] > 0 && 2 * calls[i] == calls[0] * (range[i].first + 2 * range[i].count), "blocks from %d on, %d: %d calls, %d for the first",
              (int)range[i].first, (int)range[i].count, (int)calls[i], (int)calls[0]);
    }
}

static besa_result plan_with(const setup *s, besa_backend *be, besa_plan_result *plan)
{
    besa_checkpoint *checkpoint = NULL;
    besa_calibration c;
    besa_error error;
    besa_result result;
    static int32_t test_ids[64];
    memset(&c, 0, sizeof c);
    c.nsamples = s->nsamples, c.seqlen = s->seqlen;
    c.test_windows = s->windows, c.test_seqlen = s->windows ? 64 : 0, c.test_ids = s->windows ? test_ids : NULL;
    c.against = s->against;
    CHECK_OK(besa_checkpoint_open(&checkpoint, s->source, &error), error);
    result = checkpoint ? besa_plan(checkpoint, be, &c, &s->options, plan, &error) : BESA_ERROR_READ;
    besa_checkpoint_close(checkpoint);
    return result;
}

static besa_plan_result plan_of(const setup *s, besa_result *result)
{
    besa_plan_result plan;
    besa_backend be;
    besa_error error;
    besa_cpu_options cpu;
    memset(&plan, 0, sizeof plan);
    memset(&cpu, 0, sizeof cpu);
    cpu.threads = 2;
    CHECK_OK(besa_cpu_backend(&be, &cpu, &error), error);
    *result = plan_with(s, &be, &plan);
    be.destroy(&be);
    return plan;
}

/* The warning about few steps is there where rates do not move, and only there; it says what helps. */
static void test_few_steps(void)
{
    static const struct { int steps, adamw; double d_coef; int warned; } plan[] = {
        { 1, 0, 0, 1 }, { 8, 0, 0, 1 }, { 9, 0, 0, 1 }, { 12, 0, 0, 0 }, { 16, 0, 0, 0 }, { 31, 0, 0, 0 }, { 128, 0, 0, 0 },
        { 6, 0, 50, 1 }, { 8, 0, 50, 0 }, { 12, 0, 0.5, 1 }, { 32, 0, 0.5, 0 }, { 16, 1, 0, 1 }, { 64, 1, 0, 0 } };
    for (size_t i = 0; i < sizeof plan / sizeof plan[0]; i++) {
        setup s = new_setup(NULL, BESA_METHOD_BESA, 0.5);
        besa_result r;
        s.nsamples = plan[i].steps;
        s.options.rates.d_coef = plan[i].d_coef;
        s.options.rates.optimizer = plan[i].adamw ? BESA_ADAMW : BESA_PRODIGY;
        besa_plan_result p = plan_of(&s, &r);
        CHECK(r == BESA_OK && !!strstr(p.notes, "learning step") == plan[i].warned, "%d steps, d_coef %g: \"%s\"", plan[i].steps,
              plan[i].d_coef, p.notes);
        if (plan[i].warned)
            CHECK(strstr(p.notes, "epochs") && strstr(p.notes, "smaller batch") && strstr(p.notes, plan[i].adamw ? "larger lr" :
                  "larger d_coef") && strstr(p.notes, "importance wanda"), "no remedy in \"%s\"", p.notes);
    }
    for (int steps = 8; steps <= 16; steps += 4) { /* and it is so */
        setup s = new_setup(NULL, BESA_METHOD_BESA, 0.5);
        double ratio = 0;
        s.nsamples = steps, s.seqlen = 64;
        CHECK_RUN(&s);
        for (int64_t b = 0; b < s.report.num_blocks; b++)
            ratio += s.report.block[b].loss_after / s.report.block[b].loss_uniform / (double)s.report.num_blocks;
        int warned = s.report.notes && strstr(s.report.notes, "hardly move");
        CHECK(warned == (steps == 8) && (warned ? fabs(ratio - 1) < 0.03 : ratio < 0.95), "%d steps: %g of the uniform masks' loss",
              steps, ratio);
        besa_report_free(&s.report);
    }
}

/* FLOP of the products, per token and block: 2 for each weight forward; 4 backward, but 2 for q, k and v, whose inputs need
 * no gradient. Each query meets half of its sequence's keys: scores and values forward, five such products backward. */
static double expected_flop(const setup *s)
{
    const besa_prune_options *o = &s->options;
    besa_checkpoint *checkpoint = NULL;
    besa_error error;
    double d, q, kv, inner, linear, keys, learn, passes = 2, test, refit, tokens = (double)(s->nsamples * s->seqlen), flop;
    const besa_config *c;
    CHECK_OK(besa_checkpoint_open(&checkpoint, s->source, &error), error);
    if (!checkpoint) return 0;
    c = besa_checkpoint_config(checkpoint);
    d = (double)c->block.hidden_size, inner = (double)c->block.intermediate_size;
    q = (double)(c->block.num_attention_heads * c->block.head_dim), kv = (double)(c->block.num_key_value_heads * c->block.head_dim);
    linear = d * (q + kv + kv) + q * d + 3 * d * inner;
    keys = 0.5 * (double)s->seqlen * q;         /* multiplications of one of the products of attention */
    learn = 2 * linear + 2 * 2 * keys + 4 * linear - 2 * d * (q + kv + kv) + 5 * 2 * keys;
    if (o->granularity == BESA_GRANULARITY_ATTN_MLP) learn += 2 * d * (q + kv + kv) + 2 * q * d + 2 * 2 * keys; /* dense attention */
    if (o->granularity == BESA_GRANULARITY_LAYER)  /* forward but for down, outputs by both weights, their gradients */
        learn = 2 * (linear - d * inner) + 2 * 2 * keys + 2 * 2 * linear + 2 * linear;
    int last = o->learn != BESA_LEARN_RATES || (o->clipping == BESA_CLIPPING_LEARNED && o->method != BESA_METHOD_BESA);
    if (o->method == BESA_METHOD_MAGNITUDE && !o->refit) passes = 1 + (s->nsamples < 2 ? 1 : s->nsamples < 16 ? 2 / (double)s->nsamples : s->nsamples > 64 ? 8 / (double)s->nsamples : 0.125);
    /* dense: as reported */
    if (last) passes = 2;
    flop = (passes - 1) * (2 * linear + 4 * keys); /* of a block that is pruned; of all the pass to the next one, of both streams */
    if (o->granularity == BESA_GRANULARITY_LAYER && o->method == BESA_METHOD_BESA) flop += 2 * linear;
    if (last) flop += (double)(o->weight_epochs ? o->weight_epochs : 3) * learn;
    if (o->method == BESA_METHOD_BESA && (!o->pattern_m || o->learn == BESA_LEARN_BOTH)) flop += (double)(o->epochs ? o->epochs : 1) * learn;
    if (o->importance == BESA_IMPORTANCE_GRADIENT) flop += (s->nsamples < 32 ? 1 : 32 / (double)s->nsamples) * learn;
    if (o->learn_vectors) /* then q, k and v have one, in what passes weights learn */
        flop += 2 * d * (q + kv + kv) * (double)((o->weight_epochs ? o->weight_epochs : 3) + (o->learn == BESA_LEARN_BOTH ? 1 : 0));
    if (o->method == BESA_METHOD_SPARSEGPT || o->importance == BESA_IMPORTANCE_SPARSEGPT ||
        o->importance == BESA_IMPORTANCE_SPARSEGPT_SQUARED || o->refit)
        flop += d * d + q * q + d * d + inner * inner; /* half of a Gram matrix */
    refit = d * d * (q + kv + kv) + q * q * d + 2 * d * d * inner + inner * inner * d; /* a row times H, or half of that */
    flop += refit * (o->refit == BESA_REFIT_CG ? 2.0 * (double)(1 + (o->refit_steps ? o->refit_steps : 10)) : o->refit ? 1 : 0) / tokens;
    test = (2 * linear + 4 * 0.5 * 64 * q) * (double)c->num_hidden_layers + 2 * d * (double)c->vocab_size;
    flop *= (double)(o->num_blocks ? o->num_blocks : c->num_hidden_layers);
    flop += (1 + (o->dense_stream || o->dense_share > 0)) * (2 * linear + 4 * keys) * /* blocks behind the last pruned one: none */
            (double)(o->num_blocks ? o->first_block + o->num_blocks : c->num_hidden_layers);
    flop = flop * tokens + (double)(s->windows * 64) * test;
    besa_checkpoint_close(checkpoint);
    return flop;
}

/* What is allocated at the peak is what besa_plan said, to the byte, and all of it is given back. */
static void test_plan(void)
{
    for (int i = 0; i < 32; i += TEST_SANITIZED ? 3 : 1) {
        setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
        static const besa_fixed_rate query = { "q_proj", 0.3 };
        double flop;
        besa_plan_result plan;
        besa_result r;
        besa_backend be;
        char model[512];
        switch (i) {
        case 1: s.options.method = BESA_METHOD_WANDA; break;
        case 2: s.options.method = BESA_METHOD_SPARSEGPT; break;
        case 3: s.options.method = BESA_METHOD_MAGNITUDE, s.windows = 5; break;
        case 4: s.options.dense_stream = 1, s.options.norm_all = 1; break;
        case 5: s.options.importance = BESA_IMPORTANCE_SPARSEGPT, s.options.batch_size = 3; break;
        case 6: s.options.rates.optimizer = BESA_ADAMW, s.options.rates.group_rows = 5, s.nsamples = 3; break;
        case 7: snprintf(model, sizeof model, "%s/checkpoints/qwen3_qknorm_f32", g_reference), s.source = model; break;
        case 8: s.windows = 40, s.options.epochs = 3; break;
        case 9: s.options.learn = BESA_LEARN_BOTH, s.options.dense_share = 0.5, s.options.keep_rates = 1; break;
        case 19: s.options.importance = BESA_IMPORTANCE_GRADIENT; break;
        case 20: s.options.importance = BESA_IMPORTANCE_GRADIENT, s.nsamples = 50, s.options.learn = BESA_LEARN_BOTH; break;
        case 23: s.options.bits = 3, s.options.group_size = 7; break;
        case 24: s.options.bits = 8, s.options.method = BESA_METHOD_WANDA, s.options.clipping = BESA_CLIPPING_LEARNED; break;
        case 25: s.options.bits = 2, s.options.method = BESA_METHOD_SPARSEGPT; break;
        case 26: s.options.learn = BESA_LEARN_BOTH, s.options.importance = BESA_IMPORTANCE_GRADIENT; break;
        case 27: s.options.learn = BESA_LEARN_WEIGHTS, s.options.fixed = &query, s.options.num_fixed = 1; break;
        case 28: s.options.method = BESA_METHOD_WANDA; break;
        case 29: s.options.granularity = BESA_GRANULARITY_ATTN_MLP, s.options.batch_size = 3; break;
        case 30: s.options.granularity = BESA_GRANULARITY_LAYER, s.options.norm_all = 1, s.options.learn = BESA_LEARN_BOTH; break;
        case 31: s.options.granularity = BESA_GRANULARITY_LAYER, s.options.method = BESA_METHOD_WANDA; break; /* nothing learns */
        case 13: s.options.first_block = 1, s.options.num_blocks = 2, s.options.dense_share = 0.5; break;
        case 14: s.options.refit = BESA_REFIT_CG; break;
        case 15: s.options.refit = BESA_REFIT_CG, s.options.method = BESA_METHOD_SPARSEGPT, s.options.refit_steps = 3; break;
        case 16: s.options.refit = BESA_REFIT_OBS, s.options.method = BESA_METHOD_MAGNITUDE; break;
        case 17: s.options.refit = BESA_REFIT_CG, s.options.method = BESA_METHOD_MAGNITUDE, s.options.learn = BESA_LEARN_WEIGHTS; break;
        case 18: s.options.refit = BESA_REFIT_OBS, s.options.importance = BESA_IMPORTANCE_SPARSEGPT, s.options.num_blocks = 3; break;
        case 10: s.options.learn = BESA_LEARN_WEIGHTS, s.options.method = BESA_METHOD_MAGNITUDE, s.options.weight_epochs = 1; break;
        case 11: s.options.learn = BESA_LEARN_WEIGHTS, s.options.method = BESA_METHOD_SPARSEGPT, s.options.dense_stream = 1; break;
        case 12: snprintf(model, sizeof model, "%s/checkpoints/qwen2_bias_tied_bf16", g_reference), s.source = model;
                 s.options.learn = BESA_LEARN_BOTH, s.nsamples = 300, s.options.batch_size = 150; break;
        case 21: case 22: snprintf(model, sizeof model, "%s/checkpoints/qwen2_bias_tied_bf16", g_reference), s.source = model;
                 s.options.learn = i == 21 ? BESA_LEARN_BOTH : BESA_LEARN_WEIGHTS, s.options.learn_vectors = 1; break;
        }
        if (i > 25 && i < 29) s.options.pattern_n = 2, s.options.pattern_m = 4;
        plan = plan_of(&s, &r);
        CHECK(r == BESA_OK, "case %d: %s", i, besa_result_string(r));
        be = counted_backend(0);
        s.be = &be;
        CHECK(run(&s) == BESA_OK, "case %d: %s", i, s.error.message);
        CHECK(g_counted.peak[0] == plan.device_bytes, "case %d: %zu bytes at the peak, plan %zu", i, g_counted.peak[0],
              plan.device_bytes);
        CHECK(g_counted.peak[1] == plan.host_bytes, "case %d: %zu host bytes at the peak, plan %zu", i, g_counted.peak[1],
              plan.host_bytes);
        CHECK(g_counted.live[0] == 0 && g_counted.live[1] == 0, "case %d: %zu bytes not given back", i,
              g_counted.live[0] + g_counted.live[1]);
        flop = expected_flop(&s);
        CHECK(fabs(plan.flop / flop - 1) < 1e-12, "case %d: plan of %.17g FLOP, expected %.17g", i, plan.flop, flop);
        flop = plan.test_flop;
        for (int p = 0; p < BESA_PASS_COUNT; p++) flop += plan.pass_flop[p];
        CHECK(fabs(plan.flop / flop - 1) < 1e-12 && (s.windows > 0) == (plan.test_flop > 0) && (s.options.learn != BESA_LEARN_RATES ||
              s.options.clipping == BESA_CLIPPING_LEARNED) == (plan.pass_flop[BESA_PASS_WEIGHTS] > 0), "case %d: %.17g FLOP in parts", i, flop);
        CHECK(plan.micro_batch >= 1 && plan.mapped_block_bytes > 0, "case %d: plan is not filled in", i);
        {
            struct stat st;
            char path[600];
            snprintf(path, sizeof path, "%s/model.safetensors", s.output);
            if (stat(path, &st) == 0)
                CHECK(plan.disk_bytes >= (uint64_t)st.st_size && plan.disk_bytes < (uint64_t)st.st_size + 4000000,
                      "case %d: plan says %.0f bytes of disk for a file of %.0f", i, (double)plan.disk_bytes,
                      (double)st.st_size);
        }
        besa_report_free(&s.report);
        be.destroy(&be);
        discard(s.output);
    }
}

/* Without a budget it is what the device has free, but for a 32nd: to the byte where less goes to the host. */
static size_t g_free;
static besa_result given_memory_info(besa_backend *be, size_t *free_bytes, size_t *total_bytes)
{
    (void)be;
    *free_bytes = g_free, *total_bytes = 2 * g_free;
    return BESA_OK;
}

static void test_free_memory(void)
{
    setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
    besa_plan_result given, whole, plan;
    besa_backend be = counted_backend(0);
    char word[160];
    int levels = 0;
    be.unified_memory = 0;
    be.memory_info = given_memory_info;
    s.be = &be, s.nsamples = 130, s.seqlen = 48;
    g_free = (size_t)1 << 40;
    CHECK(plan_with(&s, &be, &whole) == BESA_OK, "no plan with a terabyte");
    for (given = whole;; given = plan, levels++) {
        g_free = given.device_bytes + given.device_bytes / 31;
        while (g_free - g_free / 32 < given.device_bytes) g_free++;
        s.options.device_memory = 0;
        CHECK(plan_with(&s, &be, &plan) == BESA_OK && plan.device_bytes == given.device_bytes, "%zu bytes of %zu free, expected %zu",
              plan.device_bytes, g_free, given.device_bytes);
        while (g_free - g_free / 32 >= given.device_bytes) g_free--;
        if (plan_with(&s, &be, &plan) != BESA_OK) break;
        CHECK(plan.device_bytes < given.device_bytes, "%zu bytes of %zu free", plan.device_bytes, g_free);
    }
    CHECK(levels > 3, "%d levels", levels);
    snprintf(word, sizeof word, "the device has %zu bytes free, of which a run takes 31/32: the smallest that works here is %zu free", g_free,
             g_free + 1);
    expect(&s, BESA_ERROR_MEMORY, word);
    be.destroy(&be);
}

/* The disk that is needed is that of all shards; a run whose report is not asked for keeps nothing of it. */
static void test_shards(void)
{
    char source[512];
    setup s = new_setup(temp_path("out"), BESA_METHOD_WANDA, 0.5);
    besa_result result;
    besa_checkpoint *c = NULL;
    besa_calibration calibration;
    besa_error error;
    uint64_t bytes = 0;
    int64_t live = g_live;
    DIR *d;
    struct dirent *e;
    snprintf(source, sizeof source, "%s/checkpoints/qwen3_qknorm_f32", g_reference);
    s.source = source;
    d = opendir(source);
    while (d && (e = readdir(d)) != NULL) {
        char path[900];
        struct stat st;
        snprintf(path, sizeof path, "%s/%s", source, e->d_name);
        if (strstr(e->d_name, ".safetensors") && !strstr(e->d_name, ".json") && stat(path, &st) == 0) bytes += (uint64_t)st.st_size;
    }
    if (d) closedir(d);
    CHECK(bytes > 0 && plan_of(&s, &result).disk_bytes == bytes, "not %.0f bytes", (double)bytes);
    memset(&calibration, 0, sizeof calibration);
    int32_t *ids = (int32_t *)calloc(16, sizeof *ids);
    calibration.ids = ids, calibration.nsamples = 1, calibration.seqlen = 16;
    CHECK_OK(besa_checkpoint_open(&c, source, &error), error);
    CHECK_OK(besa_prune(c, s.output, NULL, &calibration, &s.options, NULL, &error), error);
    besa_checkpoint_close(c);
    free(ids);
    CHECK(g_live == live, "%d blocks leaked", (int)(g_live - live));
    discard(s.output);
}

/* Weight gradients in pieces of 128 rows: the same bytes. */
static void test_gradient_pieces(void)
{
    setup s = new_setup(temp_path("whole"), BESA_METHOD_BESA, 0.5);
    char first[512];
    besa_backend be = counted_backend(0);
    besa_plan_result whole, pieces;
    besa_result result;
    s.be = &be;
    s.source = temp_path("model256");
    s.nsamples = 6, s.seqlen = 8;
    s.options.rates.d_coef = 1000;              /* so that few steps move the rates */
    fixture_random_llama(s.source, 1, 256, 256, 4, 4, 64, BESA_F32);
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    memset(&pieces, 0, sizeof pieces);
    CHECK(plan_with(&s, &be, &whole) == BESA_OK, "no plan");
    be.gradient_bytes = 128 * 256 * sizeof(float);
    result = plan_with(&s, &be, &pieces);
    CHECK(result == BESA_OK && pieces.device_bytes < whole.device_bytes, "%zu bytes in pieces, %zu whole", pieces.device_bytes,
          whole.device_bytes);
    s.output = temp_path("out");
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    CHECK(compare_directories(temp_path("whole"), s.output, NULL, first) == 0, "%s differs", first);
    be.destroy(&be);
    discard(s.output);
    discard(temp_path("whole"));
}

static int64_t cut_of_three(const void *cutter, int64_t first)
{
    (void)cutter, (void)first;
    return 3;
}

/* One chunk of a stream, `next` of it to be sent for. */
static besa__walk chunk_of(int64_t first, int64_t count, int64_t next_first, int64_t next)
{
    besa__walk w = besa__walk_over(cut_of_three, NULL, first, first + count, -1);
    w.first = first, w.count = count, w.next_first = next_first, w.next_count = next;
    return w;
}

/* The slots of a stream that lives on the host: a chunk is sent for again once a part of it was changed in the other. */
static void test_stream_slots(void)
{
    besa_backend be = counted_backend(0);
    besa__stream s;
    float host[6] = { 0, 1, 2, 3, 4, 5 }, slots[2][3];
    besa__walk first = chunk_of(0, 3, 3, 3), overlapping = chunk_of(2, 2, 0, 0), again = chunk_of(0, 3, 0, 0);
    void *x;
    besa__stream_init(&s, &be, BESA__EVENT_X, 6, 1, 1);
    s.streamed = 1, s.x = host, s.slot[0] = slots[0], s.slot[1] = slots[1];
    CHECK(besa__stream_open(&s, &first, &x) == BESA_OK && ((float *)x)[2] == 2, "the first chunk");
    CHECK(besa__stream_close(&s, 0) == BESA_OK, "close");
    CHECK(besa__stream_open(&s, &overlapping, &x) == BESA_OK && ((float *)x)[0] == 2, "one that overlaps it");
    ((float *)x)[0] = 7;
    CHECK(besa__stream_close(&s, 1) == BESA_OK && host[2] == 7, "it did not come home");
    CHECK(besa__stream_open(&s, &again, &x) == BESA_OK && ((float *)x)[2] == 7, "the first chunk is out of date");
    be.destroy(&be);
}

/* A walk: every sequence once, in chunks no larger than the cut; the next chunk is what will come next. */
static void test_walk(void)
{
    for (int64_t end = 1; end < 9; end++)
        for (int again = -1; again < 1; again++) {
            besa__walk w = besa__walk_over(cut_of_three, NULL, 1, 1 + end, again);
            int64_t at = 1, promised = -2, count = 0;
            while (besa__walk_next(&w)) {
                CHECK(w.first == at && w.count == (1 + end - at < 3 ? 1 + end - at : 3), "%d from %d", (int)w.count, (int)w.first);
                CHECK(promised == -2 || (w.first == promised && w.count <= count), "%d was promised", (int)promised);
                at += w.count;
                promised = w.next_first, count = w.next_count;
            }
            CHECK(at == 1 + end && promised == again && (count > 0) == (again >= 0), "it ends at %d, then %d", (int)at, (int)promised);
        }
}

/* A smaller budget means smaller micro-batches and the same result but for rounding; one too small names the bytes. */
static void test_budget(void)
{
    setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
    besa_plan_result full, less;
    besa_result result;
    double ppl;
    s.nsamples = 16, s.seqlen = 64, s.windows = 16;
    s.options.batch_size = 8;
    full = plan_of(&s, &result);
    CHECK(result == BESA_OK, "%s", besa_result_string(result));
    ppl = run_and_verify(&s);
    discard(s.output);
    CHECK(full.micro_batch > 1, "micro-batch %d without a budget", (int)full.micro_batch);
    for (int percent = 90; percent >= 30; percent -= 20) {
        besa_result r;
        double with;
        s.options.device_memory = full.device_bytes / 100 * (size_t)percent;
        less = plan_of(&s, &r);
        if (r == BESA_ERROR_MEMORY && percent < 90) break; /* too little for a micro-batch of one */
        CHECK(r == BESA_OK, "%d %%: %s", percent, besa_result_string(r));
        CHECK(less.micro_batch < full.micro_batch && less.device_bytes <= s.options.device_memory,
              "budget %zu: micro-batch %d, %zu bytes", s.options.device_memory, (int)less.micro_batch, less.device_bytes);
        with = run_and_verify(&s);
        CHECK(fabs(log(with / ppl)) < 0.02, "perplexity %g with %d %% of the memory, %g with all", with, percent, ppl);
        discard(s.output);
    }
    s.options.device_memory = 10000;
    expect(&s, BESA_ERROR_MEMORY, "10000");
    discard(s.output);
    {                                           /* the least that the message names works, and not a byte less */
        const char *words = "the smallest that works here is ", *at = strstr(s.error.message, words);
        size_t least = at ? (size_t)strtoull(at + strlen(words), NULL, 10) : 0;
        s.options.device_memory = least;
        less = plan_of(&s, &result);
        CHECK(result == BESA_OK && less.device_bytes <= least && least > 10000, "%zu bytes: %s", least, besa_result_string(result));
        s.options.device_memory = least - 1;
        less = plan_of(&s, &result);
        CHECK(result == BESA_ERROR_MEMORY, "%zu bytes: %s", least - 1, besa_result_string(result));
    }
}

/* A backend with memory of its own: blocks come and go while others compute, and as the budget shrinks the activations
 * of the test, the reference and the inputs move to the host. The plan says so, the run keeps to it to the byte, and the output
 * has the same bytes each time. */
static void test_separate_memory(void)
{
    for (int i = 0; i < (TEST_SANITIZED ? 1 : 6); i++) {
        setup s = new_setup(temp_path("whole"), i == 3 ? BESA_METHOD_SPARSEGPT : i == 4 ? BESA_METHOD_WANDA : BESA_METHOD_BESA, 0.5);
        besa_backend be;
        besa_plan_result plan;
        char first[512] = "";
        int on_host = 0, levels = 0;
        size_t budget = 0;
        s.nsamples = 90, s.seqlen = 48, s.windows = 100;
        s.options.batch_size = i == 1 ? 3 : 1, s.options.norm_all = i == 1, s.options.dense_stream = i == 2;
        if (i == 5) s.options.learn = BESA_LEARN_BOTH, s.options.weight_epochs = 1, s.options.dense_share = 0.5;
        run_and_verify(&s);
        s.output = temp_path("out");
        for (;; budget = plan.device_bytes - 1) {
            besa_result r;
            be = counted_backend(0);
            be.unified_memory = 0;
            s.be = &be;
            s.options.device_memory = budget;
            r = plan_with(&s, &be, &plan);
            if (r != BESA_OK || plan.micro_batch < 42) break;
            CHECK(plan.x_on_host + plan.yref_on_host + plan.test_on_host >= on_host, "options %d: less on the host", i);
            on_host = plan.x_on_host + plan.yref_on_host + plan.test_on_host;
            levels++;
            run_and_verify(&s);
            CHECK(g_counted.peak[0] == plan.device_bytes && g_counted.peak[1] == plan.host_bytes,
                  "options %d: %zu and %zu bytes, planned %zu and %zu", i, g_counted.peak[0], g_counted.peak[1],
                  plan.device_bytes, plan.host_bytes);
            CHECK(compare_directories(temp_path("whole"), s.output, NULL, first) == 0, "options %d, budget %zu: %s differs", i,
                  budget, first);
            discard(s.output);
            be.destroy(&be);
        }
        int learns = i < 3 || i == 5;
        CHECK(levels == (learns ? 4 : 3) && on_host == (learns ? 3 : 2), "options %d: %d levels, %d on the host", i, levels, on_host);
        be.destroy(&be);
        discard(temp_path("whole"));
    }
}

/* ---- masks that are kept ----------------------------------------------------------------------- */

/* Zeros are where `masks` or `source` have them; where same, all else is the source's. */
static void check_kept(const char *output, const char *source, const char *masks, int same)
{
    besa_checkpoint *at[3] = { NULL, NULL, NULL };
    const char *const directory[3] = { output, source, masks };
    besa_error error;
    int64_t wrong = 0, other = 0;
    for (int i = 0; i < 3; i++) CHECK_OK(besa_checkpoint_open(&at[i], directory[i], &error), error);
    for (int64_t i = 0; at[0] && at[1] && at[2] && i < besa_checkpoint_tensor_count(at[0]); i++) {
        const besa_tensor *x = besa_checkpoint_tensor(at[0], i), *w = besa_checkpoint_find(at[1], x->name);
        const besa_tensor *m = besa_checkpoint_find(at[2], x->name);
        size_t size = besa_dtype_size(x->dtype), mask_size = besa_dtype_size(m->dtype), n = x->bytes / size;
        for (size_t k = 0; strstr(x->name, "_proj.weight") && k < n; k++) {
            const char *xk = (const char *)x->data + k * size, *wk = (const char *)w->data + k * size;
            int gone = !memcmp((const char *)m->data + k * mask_size, "\0\0\0", mask_size) || !memcmp(wk, "\0\0\0", size);
            wrong += gone != !memcmp(xk, "\0\0\0", size);
            other += same && !gone && memcmp(xk, wk, size) != 0;
        }
    }
    CHECK(wrong == 0 && other == 0, "%d weights masked otherwise, %d not the source's", (int)wrong, (int)other);
    for (int i = 0; i < 3; i++) besa_checkpoint_close(at[i]);
}

/* What another run pruned is pruned again, weights between are the dense ones: of the same or another element type, by every
 * method that made the masks, on a device of its own memory too; and kept weights that learn leave the zeros where they are. */
static void test_keep(void)
{
    static const besa_dtype dtype[] = { BESA_F32, BESA_F16, BESA_BF16 };
    besa_error error;
    setup s;
    for (int i = 0; i < 9; i++) {
        besa_checkpoint *masks = NULL;
        besa_backend be = counted_backend(0);
        char first[256];
        const char *source = temp_path("dense"), *pruned = temp_path("masks");
        fixture_random_llama(temp_path("other"), 2, 64, 144, 4, 2, 64, dtype[i % 3]);
        fixture_random_llama(source, 2, 64, 144, 4, 2, 64, dtype[i / 3]);
        be.unified_memory = i % 2;
        s = new_setup(pruned, i % 3 == 2 ? BESA_METHOD_SPARSEGPT : BESA_METHOD_WANDA, 0.5);
        s.source = temp_path("other");
        s.options.depth_slope = 0.2;
        run_and_verify(&s);
        CHECK_OK(besa_checkpoint_open(&masks, pruned, &error), error);
        if (!masks) return;
        s = new_setup(temp_path("out"), BESA_METHOD_KEEP, 0);
        s.source = source, s.be = &be, s.options.masks = masks;
        CHECK_RUN(&s);
        CHECK(s.report.target == s.report.sparsity && s.report.sparsity > 0.45 && s.report.block[0].target == s.report.block[0].sparsity,
              "target %g, sparsity %g", s.report.target, s.report.sparsity);
        besa_report_free(&s.report);
        check_kept(s.output, source, pruned, 1);
        if (dtype[i % 3] == dtype[i / 3] && i % 3 != 2) /* wanda's own output: its weights were the dense ones */
            CHECK(compare_directories(pruned, s.output, "besa.json", first) == 0, "case %d: %s differs", i, first);
        discard(s.output);
        s.options.learn = BESA_LEARN_WEIGHTS, s.options.weight_epochs = 1, s.options.dense_share = 0.5;
        CHECK_RUN(&s);
        besa_report_free(&s.report);
        check_kept(s.output, source, pruned, 0);
        discard(s.output);
        besa_checkpoint_close(masks);
        be.destroy(&be);
        discard(pruned);
        discard(source);
        discard(temp_path("other"));
    }
    s = new_setup(temp_path("out"), BESA_METHOD_KEEP, 0.5);
    expect(&s, BESA_ERROR_OPTION, "masks is NULL");
    besa_checkpoint *stories = NULL;
    CHECK_OK(besa_checkpoint_open(&stories, g_stories, &error), error);
    s.options.masks = stories, s.options.method = BESA_METHOD_WANDA;
    expect(&s, BESA_ERROR_OPTION, "makes its own");
    s.options.method = BESA_METHOD_KEEP, s.options.pattern_n = 2, s.options.pattern_m = 4;
    expect(&s, BESA_ERROR_OPTION, "a pattern is given");
    s.options.pattern_n = s.options.pattern_m = 0, s.options.depth_slope = 0.1;
    expect(&s, BESA_ERROR_OPTION, "depth_slope is given");
    s.options.depth_slope = 0;
    fixture_random_llama(temp_path("dense"), 5, 64, 144, 4, 2, 64, BESA_F32);
    s.source = temp_path("dense");
    expect(&s, BESA_ERROR_OPTION, "of the masks' checkpoint is");
    fixture_random_llama(temp_path("other"), 1, 64, 144, 4, 2, 64, BESA_F32);
    s.source = temp_path("other");
    expect(&s, BESA_ERROR_OPTION, "has 5 blocks, the model 1");
    besa_checkpoint_close(stories);
}

/* ---- seconds --------------------------------------------------------------------------------- */

static besa_result (*g_copy)(besa_backend *, besa_queue, void *, const void *, size_t);
static double g_in, g_out, g_paused;            /* seconds of the pauses */

static double pause_of(double wanted)
{
    struct timespec a, b, t = { 0, (long)(1e9 * wanted) };
    clock_gettime(CLOCK_MONOTONIC, &a);
    nanosleep(&t, NULL);
    clock_gettime(CLOCK_MONOTONIC, &b);
    return (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
}

/* Copies of weights take their time; norms, which are small, are not counted. */
static besa_result slow_upload(besa_backend *be, besa_queue q, void *to, const void *from, size_t bytes)
{
    if (q == BESA_QUEUE_STAGE && bytes >= 1024) g_in += pause_of(5e-5);
    return g_copy(be, q, to, from, bytes);
}

static besa_result slow_download(besa_backend *be, besa_queue q, void *to, const void *from, size_t bytes)
{
    if (q == BESA_QUEUE_STAGE && bytes >= 1024) g_out += pause_of(5e-5);
    return g_copy(be, q, to, from, bytes);
}

static int slow_commit(void *user, const besa_progress *now)
{
    (void)user;
    if (now->pass == BESA_PASS_COMMIT) g_paused += pause_of(2e-3);
    return 0;
}

/* The seconds of reading, writing and committing hold what these were made to take, and no pass takes more than all of
 * the run; with the device's memory the host's, nothing overlaps, and all passes together do not. */
static void test_seconds(int unified)
{
    setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
    besa_backend be = counted_backend(0);
    double sum[BESA_PASS_COUNT] = { 0 }, all = 0, wall;
    struct timespec a, b;
    be.unified_memory = unified;
    g_copy = be.upload, be.upload = slow_upload, be.download = slow_download;
    g_in = g_out = g_paused = 0;
    s.be = &be, s.options.progress = slow_commit;
    clock_gettime(CLOCK_MONOTONIC, &a);
    CHECK_RUN(&s);
    clock_gettime(CLOCK_MONOTONIC, &b);
    wall = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
    for (int64_t n = 0; n < s.report.num_blocks; n++)
        for (int i = 0; i < BESA_PASS_COUNT; i++) {
            double seconds = s.report.block[n].seconds[i];
            CHECK(seconds > 0 && seconds < s.report.seconds, "block %d, pass %d: %g s of %g", (int)n, i, seconds, s.report.seconds);
            sum[i] += seconds, all += seconds;
        }
    CHECK(sum[BESA_PASS_READ] >= g_in && sum[BESA_PASS_WRITE] >= g_out && sum[BESA_PASS_COMMIT] >= g_paused && g_paused > 0,
          "read %g s, write %g, commit %g; they took %g, %g and %g at least", sum[BESA_PASS_READ], sum[BESA_PASS_WRITE],
          sum[BESA_PASS_COMMIT], g_in, g_out, g_paused);
    CHECK(unified || (g_in > 0 && g_out > 0), "weights did not go by the queue for them");
    CHECK(s.report.seconds <= wall && s.report.seconds > 0.5 * wall && (!unified || all <= s.report.seconds),
          "passes of %g s, a report of %g, a call of %g", all, s.report.seconds, wall);
    besa_report_free(&s.report);
    be.destroy(&be);
    discard(s.output);
}

static int mapped_files(void)                   /* mappings of files below g_temp or the source */
{
    FILE *f = fopen("/proc/self/maps", "r");
    char line[2048];
    int n = 0;
    while (f && fgets(line, sizeof line, f)) n += strstr(line, ".safetensors") != NULL || strstr(line, g_temp) != NULL;
    if (f) fclose(f);
    return n;
}

/* The n-th allocation fails, for every n: each time a result, nothing leaked, nothing that looks like an output. */
static void test_allocation_failures(void)
{
    const char *model = temp_path("tiny");
    static const besa_method method[] = { BESA_METHOD_BESA, BESA_METHOD_SPARSEGPT };
    fixture_random_llama(model, 2, 16, 24, 2, 1, 32, BESA_F32);
    for (int m = 0; m < 2; m++) {
        int64_t n = 1;
        int done = 0, fds = open_files(), maps = mapped_files();
        for (; !done && n < 20000; n += n < 1500 ? 1 : 37) {
            setup s = new_setup(temp_path("out"), method[m], 0.5);
            int64_t live = g_live;
            besa_result r;
            s.source = model;
            s.nsamples = 2, s.seqlen = 8, s.windows = 1, s.threads = 1;
            g_allocations = 0, g_fail_at = n;
            r = run(&s);
            done = g_allocations < n;
            g_fail_at = 0;
            CHECK(r == BESA_ERROR_MEMORY || r == BESA_OK, "allocation %d: %s (%s)", (int)n, besa_result_string(r),
                  s.error.message);
            CHECK(!done || r == BESA_OK, "no allocation failed, but %s", s.error.message);
            CHECK(r == BESA_OK || !exists(s.output), "allocation %d leaves an output", (int)n);
            if (r == BESA_OK) verify(&s);
            besa_report_free(&s.report);
            CHECK(g_live == live, "allocation %d: %d blocks leaked", (int)n, (int)(g_live - live));
            discard(s.output);
        }
        CHECK(done, "a small run makes more than %d allocations", (int)n);
        if (getenv("TEST_VERBOSE")) printf("    %d allocations\n", (int)n - 2);
        CHECK(open_files() == fds && mapped_files() == maps, "%d files and %d mappings left open", open_files() - fds,
              mapped_files() - maps);
    }
    for (int n = 1, done = 0; !done && n < 200; n++) { /* the device runs out */
        setup s = new_setup(temp_path("out"), BESA_METHOD_BESA, 0.5);
        besa_backend be = counted_backend(n);
        besa_result r;
        s.source = model;
        s.nsamples = 2, s.seqlen = 8, s.windows = 1;
        s.be = &be;
        r = run(&s);
        done = g_counted.calls < n;
        CHECK(r == (done ? BESA_OK : BESA_ERROR_MEMORY), "device allocation %d: %s", n, besa_result_string(r));
        CHECK(g_counted.live[0] == 0 && g_counted.live[1] == 0, "device allocation %d: memory not given back", n);
        besa_report_free(&s.report);
        be.destroy(&be);
        discard(s.output);
    }
}

/* The same for rates and pruners, whose memory is the caller's backend's. */
static besa_result create_both(besa_backend *be, const besa_rate_options *rate_options, const besa_prune_options *prune_options)
{
    static const besa_layer_shape shape[2] = { { 5, 12, BESA_F32 }, { 7, 9, BESA_BF16 } };
    besa_block_shape block;
    besa_rates *rates = NULL;
    besa_pruner *pruner = NULL;
    besa_error error;
    memset(&block, 0, sizeof block);
    block.hidden_size = 8, block.intermediate_size = 12, block.num_attention_heads = 2, block.num_key_value_heads = 1;
    block.head_dim = 4, block.rms_norm_eps = 1e-5, block.rope.theta = 1e4;
    besa_result r = besa_rates_create(&rates, be, shape, 2, rate_options, &error);
    if (r == BESA_OK) r = besa_pruner_create(&pruner, be, &block, BESA_F32, 0, prune_options, 3, 4, &error);
    CHECK(r == BESA_OK || !pruner, "a pruner in spite of %s", besa_result_string(r));
    besa_pruner_destroy(pruner);
    besa_rates_destroy(rates);
    return r;
}

static void test_api_allocation_failures(void)
{
    besa_rate_options rates;
    besa_prune_options prune;
    int64_t live = g_live;
    memset(&rates, 0, sizeof rates);
    memset(&prune, 0, sizeof prune);
    rates.target = prune.rates.target = 0.5;
    for (int n = 1, done = 0; !done && CHECK(n < 100, "no end of allocations"); n++) {
        besa_backend be = counted_backend(0);
        g_allocations = 0, g_fail_at = n;
        besa_result r = create_both(&be, &rates, &prune);
        done = g_allocations < n;
        g_fail_at = 0;
        CHECK(r == (done ? BESA_OK : BESA_ERROR_MEMORY), "host allocation %d: %s", n, besa_result_string(r));
        CHECK(g_counted.live[0] == 0 && g_counted.live[1] == 0, "host allocation %d: device memory not given back", n);
        be.destroy(&be);
        CHECK(g_live == live, "host allocation %d: %d blocks leaked", n, (int)(g_live - live));
    }
    for (int n = 1, done = 0; !done && CHECK(n < 100, "no end of device allocations"); n++) {
        besa_backend be = counted_backend(n);
        besa_result r = create_both(&be, &rates, &prune);
        done = g_counted.calls < n;
        CHECK(r == (done ? BESA_OK : BESA_ERROR_MEMORY), "device allocation %d: %s", n, besa_result_string(r));
        CHECK(g_counted.live[0] == 0 && g_counted.live[1] == 0, "device allocation %d: memory not given back", n);
        be.destroy(&be);
        CHECK(g_live == live, "device allocation %d: %d blocks leaked", n, (int)(g_live - live));
    }
    for (int i = 0; i < 3; i++) {               /* refused, not failed */
        besa_backend be = counted_backend(0);
        rates.candidates = i == 0 ? -1 : 0, prune.epochs = i == 1 ? -1 : 0, prune.rates.lr = i == 2 ? -1 : 0;
        CHECK(create_both(&be, &rates, &prune) == BESA_ERROR_OPTION, "case %d is taken", i);
        CHECK(g_counted.live[0] == 0 && g_counted.live[1] == 0, "case %d: memory not given back", i);
        be.destroy(&be);
        CHECK(g_live == live, "case %d: %d blocks leaked", i, (int)(g_live - live));
    }
}

/* A token file that is refused at any of its checks leaves nothing behind; neither does a checkpoint. */
static void test_refusals_leak(void)
{
    static const char *const header[] = { "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }",
                                          "{'descr': '<i4', 'fortran_order': False, 'shape': (0,), }",
                                          "{'descr': '<i4', 'fortran_order': True, 'shape': (1,2), }",
                                          "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }",
                                          "{'descr': '<i4', 'fortran_order': False, 'shape': (9,), }" };
    const char *path = temp_path("refused.npy"), *model = temp_path("refused");
    int64_t live = g_live;
    int fds = open_files(), maps = mapped_files();
    for (int i = 0; i < 6; i++) {
        unsigned char file[256];
        int32_t ids[2] = { 1, -5 };             /* the second of the first file is no id */
        besa_tokens tokens;
        besa_error error;
        size_t n = (size_t)snprintf((char *)file + 10, 200, "%-117s\n", header[i < 5 ? i : 0]);
        memcpy(file, i < 5 ? "\x93NUMPY\x01\x00" : "\x93NUMPX\x01\x00", 8);
        file[8] = (unsigned char)n, file[9] = 0;
        memcpy(file + 10 + n, ids, sizeof ids);
        write_bytes(path, file, 10 + n + sizeof ids);
        besa_result r = besa_tokens_load(&tokens, path, &error);
        CHECK(r != BESA_OK && g_live == live && open_files() == fds, "file %d: %s, %d blocks and %d files left", i,
              besa_result_string(r), (int)(g_live - live), open_files() - fds);
        g_live = live;
    }
    for (int i = 0; i < 4; i++) {
        besa_checkpoint *checkpoint = NULL;
        besa_error error;
        char file[600];
        fixture_random_llama(model, 2, 16, 24, 2, 1, 32, BESA_F32);
        snprintf(file, sizeof file, "%s/%s", model, i < 2 ? "config.json" : "model.safetensors");
        if (i == 0) write_bytes(file, "{\"model_type\": \"llama\", ", 25);
        if (i == 1) write_bytes(file, "{\"model_type\": \"llama\"}", 23);
        if (i == 2) CHECK(truncate(file, 5000) == 0, "truncate");
        if (i == 3) unlink(file);
        besa_result r = besa_checkpoint_open(&checkpoint, model, &error);
        CHECK(r != BESA_OK && g_live == live && open_files() == fds && mapped_files() == maps, "checkpoint %d: %s, %d blocks left",
              i, besa_result_string(r), (int)(g_live - live));
    }
}

/* ---- interrupted runs ------------------------------------------------------------------------ */

static struct { int64_t calls, stop_at; double last; } g_progress; /* stop_at -1: never, -2: in block 3 */

static int count_progress(void *user, const besa_progress *p)
{
    (void)user;
    g_progress.calls++;
    CHECK(p->fraction >= g_progress.last - 1e-9 && p->fraction <= 1 + 1e-9 && p->block >= 0 && p->block <= p->blocks &&
          p->pass >= 0 && p->pass < BESA_PASS_COUNT && isfinite(p->seconds_left) && p->seconds >= 0,
          "progress: block %d, fraction %g after %g", (int)p->block, p->fraction, g_progress.last);
    g_progress.last = p->fraction;
    if (g_progress.stop_at == -2) return p->block == 3;
    return g_progress.calls == g_progress.stop_at;
}

static setup interrupted_setup(const char *output, int64_t stop_at)
{
    setup s = new_setup(output, BESA_METHOD_BESA, 0.5);
    s.nsamples = 6, s.seqlen = 16, s.windows = 2;
    s.options.rates.d_coef = 1000;              /* so that few steps move the rates */
    s.options.progress = count_progress;
    g_progress.calls = 0, g_progress.stop_at = stop_at, g_progress.last = 0;
    return s;
}

/* Stop at every single call of the progress callback; what was begun goes on and ends with the same bytes. */
static void test_cancel(void)
{
    const char *whole = temp_path("whole");
    setup s = interrupted_setup(whole, -1);
    int64_t calls, runs = 0, resumed = 0, live = g_live;
    double ppl;
    CHECK_RUN(&s);
    ppl = s.report.perplexity;
    besa_report uninterrupted = s.report;
    calls = g_progress.calls;
    CHECK(calls >= 5 && g_progress.last > 0.9, "%d calls, the last at %g", (int)calls, g_progress.last);
    for (int64_t stop = 1; stop <= calls; stop += (TEST_SANITIZED ? 3 : 1) + calls / 300, runs++) {
        char first[256];
        besa_result r;
        s = interrupted_setup(temp_path("out"), stop);
        r = run(&s);
        besa_report_free(&s.report);
        CHECK(r == BESA_ERROR_CANCELLED, "stop %d: %s", (int)stop, besa_result_string(r));
        CHECK(!exists(s.output), "stop %d leaves an output", (int)stop);
        s = interrupted_setup(s.output, -1);
        s.threads = stop % 2 ? 3 : 1;           /* which must not matter */
        CHECK_RUN(&s);
        resumed += s.report.resumed_blocks;
        CHECK(s.report.perplexity == ppl, "stop %d: perplexity %.17g, uninterrupted %.17g", (int)stop, s.report.perplexity, ppl);
        for (int64_t b = 0; b < s.report.num_blocks; b++) {
            const besa_block_report *one = &uninterrupted.block[b], *other = &s.report.block[b];
            CHECK(!memcmp(&one->loss_uniform, &other->loss_uniform, 7 * sizeof(double)) && one->loss_after > 0 && one->d > 0 &&
                  one->mean_rate > 0, "stop %d, block %d: losses %g %g, uninterrupted %g %g", (int)stop, (int)b, other->loss_before,
                  other->loss_after, one->loss_before, one->loss_after);
        }
        if (stop % 5 == 0) verify(&s);
        besa_report_free(&s.report);
        CHECK(compare_directories(whole, s.output, NULL, first) == 0, "stop %d: %s differs", (int)stop, first);
        CHECK(!exists(partial_of(s.output)), "stop %d: the partial output is still there", (int)stop);
        discard(s.output);
    }
    besa_report_free(&uninterrupted);
    CHECK(resumed > runs / 4, "%d blocks taken over in %d runs", (int)resumed, (int)runs);
    CHECK(g_live == live, "%d blocks leaked", (int)(g_live - live));
    discard(whole);
}

/* A small model of five blocks, for what is run many times. */
static setup small_setup(const char *output)
{
    const char *model = temp_path("five");
    setup s = interrupted_setup(output, -1);
    if (!exists(model)) fixture_random_llama(model, 5, 16, 24, 2, 1, 32, BESA_F32);
    s.source = model;
    s.nsamples = 3, s.seqlen = 8, s.windows = 0, s.threads = 1;
    return s;
}

/* Kinds of run that keep more than the pruned stream, or keep it elsewhere. */
static setup kind_setup(const char *output, int kind)
{
    setup s = small_setup(output);
    s.nsamples = 12, s.seqlen = 16;             /* steps enough for the reference to matter */
    s.options.rates.d_coef = 1e5;
    s.options.dense_stream = kind < 3, s.options.norm_all = kind == 2, s.options.batch_size = kind == 2 ? 2 : 1;
    if (kind == 3) s.options.method = BESA_METHOD_SPARSEGPT;
    if (kind == 4) s.options.method = BESA_METHOD_WANDA;
    if (kind == 5) s.options.importance = BESA_IMPORTANCE_SPARSEGPT_SQUARED;
    if (kind == 6) s.options.learn = BESA_LEARN_BOTH, s.options.dense_share = 0.5;
    if (kind == 7) s.options.method = BESA_METHOD_WANDA, s.options.learn = BESA_LEARN_WEIGHTS, s.options.batch_size = 5;
    if (kind == 9) s.options.method = BESA_METHOD_SPARSEGPT, s.options.refit = BESA_REFIT_CG;
    if (kind == 10) s.options.learn = BESA_LEARN_WEIGHTS, s.options.refit = BESA_REFIT_OBS;
    if (kind == 13) s.options.bits = 4, s.options.dense_share = 0.5;
    if (kind == 14) s.options.method = BESA_METHOD_SPARSEGPT, s.options.bits = 3, s.options.group_size = 16, s.options.first_block = 1;
    if (kind == 8 || kind > 16) s.options.keep_rates = 1;
    if (kind == 18) s.options.bits = 3, s.options.learn = BESA_LEARN_BOTH;
    if (kind == 16) s.options.granularity = BESA_GRANULARITY_LAYER;
    if (kind == 17) s.options.granularity = BESA_GRANULARITY_ATTN_MLP, s.options.learn = BESA_LEARN_BOTH, s.options.learn_vectors = 1;
    if (kind == 15) s.options.learn = BESA_LEARN_BOTH, s.options.pattern_n = 4, s.options.pattern_m = 8, s.options.dense_share = 0.5;
    if (kind == 8) s.options.first_block = 1, s.options.num_blocks = 2, s.options.depth_slope = 0.25, s.options.dense_share = 0.5;
    if (kind == 11 || kind == 12) {                         /* norms and biases that learn */
        static char model[2][512];
        snprintf(model[kind - 11], sizeof model[0], "%s/checkpoints/%s", g_reference, kind == 11 ? "qwen2_bias_tied_bf16" : "qwen3_qknorm_f32");
        s.source = model[kind - 11], s.nsamples = 8;
        s.options.learn_vectors = 1, s.options.learn = BESA_LEARN_BOTH, s.options.weight_epochs = 1, s.options.dense_share = 0.5;
        if (kind == 12) s.options.method = BESA_METHOD_WANDA, s.options.learn = BESA_LEARN_WEIGHTS, s.options.first_block = 1;
    }
    return s;
}

/* Another first byte of the first block's first norm, in the unfinished output. */
static void damage_norm(const setup *s)
{
    char path[1024];
    besa_checkpoint *source = NULL;
    besa_error error = { BESA_OK, "" };
    CHECK_OK(besa_checkpoint_open(&source, s->source, &error), error);
    const besa_tensor *norm = source ? besa_checkpoint_find(source, "model.layers.0.input_layernorm.weight") : NULL;
    snprintf(path, sizeof path, "%s/model.safetensors", partial_of(s->output));
    FILE *f = norm ? fopen(path, "r+b") : NULL;
    CHECK(!norm || f, "%s is not there", path);
    if (f) {
        fseek(f, (long)norm->offset, SEEK_SET);
        int byte = getc(f);
        fseek(f, (long)norm->offset, SEEK_SET);
        putc(byte ^ 1, f);
        fclose(f);
    }
    besa_checkpoint_close(source);
}

/* The dense model's own stream goes on where it was too: every kind of run, stopped twice in every block. */
static void test_cancel_kinds(void)
{
    for (int kind = TEST_SANITIZED; kind < 19; kind += 1 + TEST_SANITIZED) {
        const char *whole = temp_path("whole");
        int64_t calls, blocks = 0;
        char first[256];
        besa_backend be = counted_backend(0);
        besa_backend *own = kind == 1 || kind == 11 || kind == 17 ? &be : NULL; /* a device with memory of its own */
        setup s = kind_setup(whole, kind);
        be.unified_memory = 0;
        s.be = own;
        CHECK_RUN(&s);
        besa_report_free(&s.report);
        calls = g_progress.calls;
        if (s.options.dense_stream) {           /* or else this tests nothing */
            s = kind_setup(temp_path("out"), kind);
            s.options.dense_stream = 0;
            CHECK_RUN(&s);
            besa_report_free(&s.report);
            CHECK(compare_directories(whole, s.output, "besa.json", first) == 1, "kind %d: the dense stream changes nothing", kind);
            discard(s.output);
        }
        for (int64_t i = 0; i < 10; i++) {
            int64_t stop = 1 + i * (calls - 1) / 9;
            if (TEST_SANITIZED && i % 3 == 1) continue;
            s = kind_setup(temp_path("out"), kind);
            s.be = own;
            g_progress.stop_at = stop;
            CHECK(run(&s) == BESA_ERROR_CANCELLED && !exists(s.output), "kind %d, stop %d: %s", kind, (int)stop, s.error.message);
            besa_report_free(&s.report);
            if (kind == 11 && i == 9) {          /* a norm that is not what was written: its block is none, and 0 is the first */
                damage_norm(&s);
                g_progress.stop_at = -1, g_progress.last = 0;
                CHECK(run(&s) == BESA_OK && s.report.resumed_blocks == 0, "%d blocks beside a damaged norm: %s",
                      (int)s.report.resumed_blocks, s.error.message);
                besa_report_free(&s.report);
                CHECK(compare_directories(whole, s.output, NULL, first) == 0, "%s differs beside a damaged norm", first);
                discard(s.output);
                continue;
            }
            g_progress.stop_at = -1, g_progress.last = 0;
            CHECK(run(&s) == BESA_OK, "kind %d, stop %d: %s", kind, (int)stop, s.error.message);
            blocks += s.report.resumed_blocks > blocks;
            besa_report_free(&s.report);
            CHECK(compare_directories(whole, s.output, NULL, first) == 0, "kind %d, stop %d: %s differs", kind, (int)stop, first);
            discard(s.output);
        }
        CHECK(blocks >= (kind == 11 || kind == 12 ? 1 : own || kind == 8 || kind == 14 ? 3 : 4), "kind %d was stopped after %d blocks at most", kind, (int)blocks);
        be.destroy(&be);
        discard(whole);
    }
}

/* Every option: those that decide bytes refuse to go on when they are changed, the others do not; in both directions, as far
 * as the method has them. `size` says how the field is set; a field of besa_prune_options that is missing here is noticed. */
static const struct option_case {
    size_t offset, size;
    int is_double;
    double value;                               /* a valid one other than the default */
    unsigned decides;                           /* for which methods: 1 << method */
} g_options[] = {
#define FIELD(name, value, decides) \
    { offsetof(besa_prune_options, name), sizeof(((besa_prune_options *)0)->name), IS_DOUBLE(name), value, decides }
#define IS_DOUBLE(name) _Generic(((besa_prune_options *)0)->name, double: 1, default: 0)
#define ALL 15u
#define LEARNED (1u << BESA_METHOD_BESA)
    FIELD(rates.target, 0.6, ALL), FIELD(rates.form, BESA_RATES_ROW, LEARNED), FIELD(rates.layer_scale, 2, LEARNED),
    FIELD(rates.row_scale, 2, LEARNED), FIELD(rates.plain_softmax, 1, LEARNED), FIELD(rates.zero_start, 1, LEARNED),
    FIELD(rates.candidates, 50, LEARNED), FIELD(rates.group_rows, 2, LEARNED), FIELD(rates.penalty, 2, LEARNED),
    FIELD(rates.optimizer, BESA_ADAMW, LEARNED), FIELD(rates.lr, 0.5, LEARNED), FIELD(rates.beta1, 0.8, LEARNED),
    FIELD(rates.beta2, 0.99, LEARNED), FIELD(rates.weight_decay, 0.125, LEARNED), FIELD(rates.d0, 1e-5, LEARNED),
    FIELD(rates.d_coef, 4, LEARNED), FIELD(rates.schedule, BESA_SCHEDULE_COSINE, LEARNED),
    FIELD(rates.warmup, 0.25, LEARNED), FIELD(rates.steps, 7, 0), FIELD(importance, BESA_IMPORTANCE_MAGNITUDE, LEARNED), FIELD(epochs, 2, LEARNED),
    FIELD(batch_size, 2, LEARNED), FIELD(granularity, BESA_GRANULARITY_LAYER, LEARNED), FIELD(whole_target, 1, 0),
    FIELD(norm_all, 1, LEARNED), FIELD(dense_stream, 1, LEARNED), FIELD(no_projection, 1, LEARNED),
    FIELD(dense_share, 0.25, LEARNED), FIELD(learn, BESA_LEARN_WEIGHTS, ALL), FIELD(weight_epochs, 2, 0), FIELD(weight_lr, 0.1, 0),
    FIELD(weight_warmup, 0.5, 0), FIELD(rank_interval, 2, 0), FIELD(learn_vectors, 1, 0), FIELD(refit, BESA_REFIT_CG, ALL),
    FIELD(refit_steps, 5, 0), FIELD(first_block, 1, ALL), FIELD(num_blocks, 2, ALL), FIELD(depth_slope, 0.25, ALL),
    FIELD(bits, 4, ALL), FIELD(group_size, 8, 0), FIELD(clipping, BESA_CLIPPING_LEARNED, 0), FIELD(clip_lr, 0.1, 0),
    FIELD(quantize_first, 1, 0), FIELD(keep_rates, 1, LEARNED),
    FIELD(magnitude_per_row, 1, 1u << BESA_METHOD_MAGNITUDE), FIELD(damping, 0.02, 1u << BESA_METHOD_SPARSEGPT), FIELD(device_memory, 1e9, 0),
    /* not by a number: the test has cases of their own for these, and callbacks decide nothing */
    FIELD(method, -1, 0), FIELD(pattern_n, -1, 0), FIELD(pattern_m, -1, 0), FIELD(fixed, -1, 0), FIELD(num_fixed, -1, 0),
    FIELD(block_targets, -1, 0), FIELD(num_block_targets, -1, 0), FIELD(masks, -1, 0),
    FIELD(comm, -1, 0), FIELD(progress, -1, 0), FIELD(step, -1, 0), FIELD(card, -1, 0), FIELD(user, -1, 0), FIELD(preset, -1, 0)
};

static void set_option(besa_prune_options *options, const struct option_case *c)
{
    void *field = (char *)options + c->offset;
    int as_int = (int)c->value;
    int64_t as_int64 = (int64_t)c->value;
    if (c->is_double) memcpy(field, &c->value, sizeof c->value);
    else if (c->size == sizeof as_int) memcpy(field, &as_int, sizeof as_int);
    else memcpy(field, &as_int64, sizeof as_int64);
}

/* A partial output of `base` is there: is it refused to s? If not, it is finished by s, and begun again for the next case. */
static int refused(setup *s, setup base)
{
    besa_result r;
    int64_t resumed;
    g_progress.calls = 0, g_progress.stop_at = -1, g_progress.last = 0;
    r = run(s);
    resumed = s->report.resumed_blocks;
    besa_report_free(&s->report);
    if (r == BESA_ERROR_RESUME) return 1;
    CHECK(r == BESA_OK && resumed >= 1, "neither refused nor taken over: %s", s->error.message);
    discard(s->output);
    g_progress.stop_at = g_progress.calls = 0, g_progress.last = 0;
    g_progress.stop_at = -2;                    /* stop in block 3 */
    CHECK(run(&base) == BESA_ERROR_CANCELLED, "%s", base.error.message);
    besa_report_free(&base.report);
    return 0;
}

/* A refusal names what differs, with both values, and not what agrees. */
static void check_named(const setup *s, const char *name)
{
    char word[64], *list = strstr(s->error.message, "): "), *at;
    snprintf(word, sizeof word, " %s=", name);
    at = list ? strstr(list, word) : NULL;
    CHECK(at && strstr(at, "(this run: ") && !strstr(list, " version=") && !strstr(list, " checkpoint="), "no %s in: %s", name,
          s->error.message);
}

static void test_resume_options(void)
{
    static const besa_fixed_rate fixed[] = { { "layers.3", 0.25 }, { "layers.3", 0.26 }, { "layers.4", 0.25 }, { "v_proj", 0 },
                                             { "v_proj", -0.0 } };
    static const char *const named[] = { "method", "fixed", "fixed", "fixed", "fixed", "fixed", "tokens", "sequences", "tokens",
                                         "backend" };
    static const double targets[] = { 0.6, 0.4, 0.5, 0.4, 0.6, 0.6 };
    unsigned char covered[sizeof(besa_prune_options)] = { 0 };
    size_t run_length = 0, longest = 0, count = sizeof g_options / sizeof *g_options;
    for (size_t i = 0; i < count; i++) memset(covered + g_options[i].offset, 1, g_options[i].size);
    for (size_t i = 0; i < sizeof covered; i++) {
        run_length = covered[i] ? 0 : run_length + 1;
        if (run_length > longest) longest = run_length;
    }
    CHECK(longest <= 4, "%d bytes of besa_prune_options belong to no option of this test", (int)longest);
    for (int method = 0; method < 4; method++) {
        setup base = small_setup(temp_path("out"));
        base.options.method = (besa_method)method;
        g_progress.stop_at = -2;
        CHECK(run(&base) == BESA_ERROR_CANCELLED, "%s", base.error.message);
        besa_report_free(&base.report);
        for (size_t i = 0; i < count; i++) {
            setup s = base;
            int expected = (int)(g_options[i].decides >> method & 1u);
            if (g_options[i].value < 0) continue;
            set_option(&s.options, &g_options[i]);
            CHECK(refused(&s, base) == expected, "method %d, option at byte %d: %s", method, (int)g_options[i].offset,
                  expected ? "not refused" : "refused");
            for (const besa_option *o = besa_option_table(); expected && o->name; o++)
                if (o->offset == g_options[i].offset) check_named(&s, o->flag ? o->flag : o->name);
        }
        for (int i = 0; i < 10; i++) {
            besa_backend other = counted_backend(0);
            setup s = base;
            other.name = "another device";
            switch (i) {
            case 0: s.options.method = (besa_method)((method + 1) % 4); break;
            case 1: case 2: case 3: case 4: s.options.fixed = fixed + i - 1, s.options.num_fixed = 1; break;
            case 5: s.options.fixed = fixed, s.options.num_fixed = 2; break;
            case 6: s.skip_tokens = 1; break;
            case 7: s.nsamples = 2; break;
            case 8: s.last_id = 1; break;
            case 9: s.be = &other; break;
            }
            CHECK(refused(&s, base), "method %d, case %d: not refused", method, i);
            check_named(&s, named[i]);
            other.destroy(&other);
        }
        for (int i = 0; i < 4; i++) {           /* of no effect: who looks on, the machine, a perplexity besides */
            setup s = base;
            switch (i) {
            case 0: s.options.user = &s; break;
            case 1: s.threads = 2; break;
            case 2: s.windows = 1; break;
            case 3: s.options.rates.layer_scale = 1; break; /* the default, spelled out */
            }
            CHECK(!refused(&s, base), "method %d, harmless case %d: refused", method, i);
        }
        discard(base.output);
    }
    for (int i = 0; i < 10; i++) {              /* what a run of wanda looks at where its weights learn */
        setup base = small_setup(temp_path("out")), s;
        base.options.method = BESA_METHOD_WANDA, base.options.learn = BESA_LEARN_WEIGHTS;
        g_progress.stop_at = -2;
        CHECK(run(&base) == BESA_ERROR_CANCELLED, "%s", base.error.message);
        besa_report_free(&base.report);
        s = base;
        switch (i) {
        case 0: s.options.weight_epochs = 2; break;
        case 1: s.options.weight_lr = 0.1; break;
        case 2: s.options.weight_warmup = 0.5; break;
        case 3: s.options.batch_size = 2; break;
        case 4: s.options.norm_all = 1; break;
        case 5: s.options.dense_stream = 1; break;
        case 6: s.options.dense_share = 0.5; break;
        case 7: s.options.learn_vectors = 1; break;
        case 8: s.options.epochs = 2; break;    /* of the rates */
        case 9: s.options.rank_interval = 4; break; /* ranks of weights that learn with them */
        }
        CHECK(refused(&s, base) == (i < 8), "learning weights, changed setting %d", i);
        discard(base.output);
    }
    for (int i = 0; i < 8; i++) {               /* by a pattern there are no rates; masks follow the weights from i = 4 on */
        setup base = small_setup(temp_path("out")), s;
        base.options.learn = i < 4 ? BESA_LEARN_WEIGHTS : BESA_LEARN_BOTH, base.options.pattern_n = 2, base.options.pattern_m = 4;
        g_progress.stop_at = -2;
        CHECK(run(&base) == BESA_ERROR_CANCELLED, "%s", base.error.message);
        besa_report_free(&base.report);
        s = base;
        switch (i % 4) {
        case 0: s.options.epochs = 2; break;
        case 1: s.options.rank_interval = 2; break;
        case 2: s.options.rates.lr = 0.5, s.options.rates.penalty = 2, s.options.no_projection = 1; break;
        case 3: s.options.importance = BESA_IMPORTANCE_MAGNITUDE; break;
        }
        CHECK(refused(&s, base) == (i == 3 || i == 4 || i == 5 || i == 7), "a pattern, changed setting %d", i);
        discard(base.output);
    }
    for (int i = 0; i < 8; i++) {               /* what refits look at */
        setup base = small_setup(temp_path("out")), s;
        base.options.method = BESA_METHOD_WANDA, base.options.refit = i % 2 ? BESA_REFIT_OBS : BESA_REFIT_CG;
        g_progress.stop_at = -2;
        CHECK(run(&base) == BESA_ERROR_CANCELLED, "%s", base.error.message);
        besa_report_free(&base.report);
        s = base;
        switch (i / 2) {
        case 0: s.options.refit_steps = 5; break; /* of conjugate gradients */
        case 1: s.options.damping = 0.02; break;
        case 2: s.options.refit = i % 2 ? BESA_REFIT_CG : BESA_REFIT_OBS; break;
        case 3: s.options.refit_steps = 10; break; /* the default */
        }
        CHECK(refused(&s, base) == (i != 1 && i < 6), "refits, changed setting %d", i);
        discard(base.output);
    }
    for (int i = 0; i < 9; i++) {               /* and where there are bits, whose clips learn from i = 3 on */
        setup base = small_setup(temp_path("out")), s;
        base.options.method = BESA_METHOD_WANDA, base.options.bits = 4;
        if (i > 2) base.options.clipping = BESA_CLIPPING_LEARNED;
        g_progress.stop_at = -2;
        CHECK(run(&base) == BESA_ERROR_CANCELLED, "%s", base.error.message);
        besa_report_free(&base.report);
        s = base;
        switch (i) {
        case 0: s.options.group_size = 8; break;
        case 1: s.options.quantize_first = 1; break;
        case 2: s.options.clip_lr = 0.1; break; /* of clips that do not learn */
        case 3: s.options.clip_lr = 0.1; break;
        case 4: s.options.weight_epochs = 2; break;
        case 5: s.options.batch_size = 2; break;
        case 6: s.options.clipping = BESA_CLIPPING_NONE; break;
        case 7: s.options.weight_lr = 0.1; break; /* of weights that do not learn */
        case 8: s.options.bits = 3; break;
        }
        CHECK(refused(&s, base) == (i != 2 && i != 7), "bits, changed setting %d", i);
        discard(base.output);
    }
    for (int i = 0; i < 9; i++) {               /* changes between two settings other than the default */
        setup base = small_setup(temp_path("out")), s;
        if (i < 2) base.options.fixed = fixed, base.options.num_fixed = 1;
        if (i == 2 || i == 3 || i == 6) base.options.importance = BESA_IMPORTANCE_SPARSEGPT;
        if (i == 4) base.options.method = BESA_METHOD_WANDA, base.options.pattern_n = 2, base.options.pattern_m = 4;
        if (i == 5) base.options.rates.optimizer = BESA_ADAMW;
        if (i == 7) base.options.fixed = fixed + 3, base.options.num_fixed = 1;
        if (i == 8) base.options.block_targets = targets, base.options.num_block_targets = 5;
        g_progress.stop_at = -2;
        CHECK(run(&base) == BESA_ERROR_CANCELLED, "%s", base.error.message);
        besa_report_free(&base.report);
        s = base;
        switch (i) {
        case 0: s.options.fixed = fixed + 1; break;
        case 1: s.options.num_fixed = 0; break;
        case 2: s.options.importance = BESA_IMPORTANCE_SPARSEGPT_SQUARED; break;
        case 3: s.options.importance = BESA_IMPORTANCE_WANDA; break;
        case 4: s.options.pattern_n = 4, s.options.pattern_m = 8; break;
        case 5: s.options.rates.d_coef = 3, s.options.rates.d0 = 1e-3; break; /* which AdamW does not have */
        case 6: s.options.damping = 0.02; break;
        case 7: s.options.fixed = fixed + 4; break; /* -0, which is 0 */
        case 8: s.options.block_targets = targets + 1; break;
        }
        CHECK(refused(&s, base) == (i != 5 && i != 7), "changed setting %d", i);
        discard(base.output);
    }
}

/* Overwrite bytes of a file in its place, and set the time of its last change. */
static void patch_file(const char *path, int64_t at, unsigned char bits, struct timespec changed)
{
    int fd = open(path, O_RDWR);
    unsigned char byte = 0;
    struct timespec times[2];
    times[0] = times[1] = changed;
    CHECK(fd >= 0 && pread(fd, &byte, 1, at) == 1, "%s", path);
    byte ^= bits;
    CHECK(pwrite(fd, &byte, 1, at) == 1 && futimens(fd, times) == 0, "%s", path);
    close(fd);
}

/* The source is another one though its files have the size they had, and were changed within the same second; and it is the
 * same one though its config was written anew. */
static void test_resume_source(void)
{
    setup s = small_setup(temp_path("out"));
    char config[600], shard[600], *text;
    struct stat st[2];
    struct timespec later;
    size_t n;
    int64_t digit;
    snprintf(config, sizeof config, "%s/config.json", s.source);
    snprintf(shard, sizeof shard, "%s/model.safetensors", s.source);
    g_progress.stop_at = -2;
    CHECK(run(&s) == BESA_ERROR_CANCELLED, "%s", s.error.message);
    besa_report_free(&s.report);
    g_progress.stop_at = -1;
    CHECK(stat(config, &st[0]) == 0 && stat(shard, &st[1]) == 0, "the source is gone");
    later = st[1].st_mtim;
    later.tv_nsec = later.tv_nsec < 500000000 ? later.tv_nsec + 1 : later.tv_nsec - 1;
    text = (char *)read_bytes(config, &n);
    digit = text && strstr(text, "10000.0") ? strstr(text, "10000.0") - text : 0; /* rope_theta */
    free(text);
    text = (char *)read_bytes(shard, &n);       /* behind the first eight bytes it has the header */
    int64_t format = text && strstr(text + 8, "\"pt\"") ? strstr(text + 8, "\"pt\"") + 1 - text : 0;
    free(text);
    CHECK(digit > 0 && format > 0, "rope_theta at %d, the header's format at %d", (int)digit, (int)format);
    for (int i = 0; i < 4; i++) {
        int64_t at = i < 2 ? digit : i == 2 ? st[1].st_size - 1 : format;
        const char *path = i < 2 ? config : shard;
        struct timespec when = i < 2 ? st[0].st_mtim : i == 2 ? later : st[1].st_mtim; /* case 3: a header alone tells */
        patch_file(path, at, i == 1 ? 0 : 2, when); /* 30000.0; case 1: the same bytes */
        if (i != 1) {
            CHECK(run(&s) == BESA_ERROR_RESUME && strstr(s.error.message, "): checkpoint="), "case %d: %s", i, s.error.message);
            besa_report_free(&s.report);
        }
        patch_file(path, at, i == 1 ? 0 : 2, i < 2 ? later : st[1].st_mtim);
    }
    g_progress.calls = 0, g_progress.last = 0;
    CHECK_RUN(&s);                              /* all is as it was, but for the time of config.json */
    CHECK(s.report.resumed_blocks >= 1, "nothing was taken over");
    besa_report_free(&s.report);
    discard(s.output);
}

/* While a run goes on its source is replaced: by the same bytes, or by others. */
static struct { const char *path; unsigned char bits; int64_t at; } g_replaced;

static int replace_source(void *user, const besa_progress *p)
{
    (void)user;
    if (p->block == 3 && g_replaced.path) {
        char aside[700];
        size_t n;
        unsigned char *bytes = read_bytes(g_replaced.path, &n);
        snprintf(aside, sizeof aside, "%s.old", g_replaced.path);
        bytes[g_replaced.at] ^= g_replaced.bits;
        if (rename(g_replaced.path, aside) == 0) write_bytes(g_replaced.path, bytes, n);
        free(bytes);
        g_replaced.path = NULL;
    }
    return 0;
}

static void test_source_replaced(void)
{
    static const char *const names[] = { "config.json", "model.safetensors", "model.safetensors", "model.safetensors" };
    setup s = small_setup(temp_path("whole"));
    char first[256];
    besa_checkpoint *checkpoint = NULL;
    int64_t at[4] = { 0, 0, 0, 0 };
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    CHECK_OK(besa_checkpoint_open(&checkpoint, s.source, &s.error), s.error);
    if (!checkpoint) return;
    at[1] = (int64_t)besa_checkpoint_find(checkpoint, "model.embed_tokens.weight")->offset;
    at[2] = (int64_t)besa_checkpoint_find(checkpoint, "model.layers.0.self_attn.q_proj.weight")->offset;
    at[3] = (int64_t)besa_checkpoint_find(checkpoint, "model.layers.4.mlp.down_proj.weight")->offset;
    besa_checkpoint_close(checkpoint);
    for (int own = 0; own < 2; own++)           /* a device with memory of its own: weights come in pieces */
        for (int i = 0; i < 8; i++) {
            besa_backend be = counted_backend(0);
            char path[600], aside[700];
            besa_result r;
            be.unified_memory = !own;
            s = small_setup(temp_path("out"));
            s.be = &be;
            s.options.progress = replace_source;
            snprintf(path, sizeof path, "%s/%s", s.source, names[i % 4]);
            snprintf(aside, sizeof aside, "%s.old", path);
            g_replaced.path = path, g_replaced.bits = i < 4 ? 0 : 1, g_replaced.at = at[i % 4];
            r = run(&s);
            besa_report_free(&s.report);
            CHECK(r == (i < 4 ? BESA_OK : BESA_ERROR_READ), "replaced %d: %s", i, r ? s.error.message : "not noticed");
            CHECK(rename(aside, path) == 0, "it was not replaced");
            if (i >= 4) {
                CHECK(strstr(s.error.message, names[i % 4]) && !exists(s.output), "replaced %d: %s", i, s.error.message);
                CHECK_RUN(&s);
                CHECK(s.report.resumed_blocks == 5, "replaced %d: %d blocks kept", i, (int)s.report.resumed_blocks);
                besa_report_free(&s.report);
            }
            CHECK(compare_directories(temp_path("whole"), s.output, NULL, first) == 0, "replaced %d: %s differs", i, first);
            discard(s.output);
            be.destroy(&be);
        }
    discard(temp_path("whole"));
}

/* Every allocation of a run that goes on fails in turn: it is an error of memory, and never another run's output. */
static void test_resume_allocations(void)
{
    setup s = small_setup(temp_path("out"));
    int done = 0;
    int64_t n = 1, live = g_live;
    s.options.keep_rates = 1;
    g_progress.stop_at = -2;
    CHECK(run(&s) == BESA_ERROR_CANCELLED, "%s", s.error.message);
    besa_report_free(&s.report);
    for (; !done && n < 2000; n++) {
        besa_result r;
        g_progress.calls = 0, g_progress.stop_at = -1, g_progress.last = 0;
        g_allocations = 0, g_fail_at = n;
        r = run(&s);
        g_fail_at = 0;
        done = r == BESA_OK;
        CHECK(r == BESA_OK || r == BESA_ERROR_MEMORY, "allocation %d: %s", (int)n, s.error.message);
        CHECK(!done || s.report.resumed_blocks >= 3, "allocation %d: the blocks are lost", (int)n);
        besa_report_free(&s.report);
    }
    CHECK(done && n > 20 && g_live == live, "%d allocations, %d blocks leaked", (int)n, (int)(g_live - live));
    discard(s.output);
}

/* A partial output belongs to the run that began it, and survives the attempts of others. */
static void test_resume_refused(void)
{
    setup s = interrupted_setup(temp_path("whole"), -1);
    const char *other = temp_path("other");
    besa_checkpoint *stories = open_stories();
    char first[256];
    int64_t calls;
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    calls = g_progress.calls;
    fixture_variant(other, stories, g_stories, BESA_F32, dead_column);
    besa_checkpoint_close(stories);
    s = interrupted_setup(temp_path("out"), calls * 3 / 4);
    CHECK(run(&s) == BESA_ERROR_CANCELLED, "%s", s.error.message);
    besa_report_free(&s.report);
    for (int i = 0; i < 10; i++) {
        s = interrupted_setup(temp_path("out"), -1);
        switch (i) {
        case 0: s.options.rates.target = 0.6; break;
        case 1: s.options.method = BESA_METHOD_WANDA; break;
        case 2: s.skip_tokens = 1; break;
        case 3: s.source = other; break;
        case 4: s.options.rates.d_coef = 999; break;
        case 5: s.nsamples = 5; break;
        case 6: s.options.norm_all = 1; break;
        case 7: s.options.rates.form = BESA_RATES_ROW; break;
        case 8: s.options.epochs = 2; break;
        case 9: s.options.importance = BESA_IMPORTANCE_MAGNITUDE; break;
        }
        CHECK(run(&s) == BESA_ERROR_RESUME, "case %d: %s", i, s.error.message);
        CHECK(!exists(s.output), "case %d leaves an output", i);
        besa_report_free(&s.report);
    }
    s = interrupted_setup(temp_path("out"), -1);
    CHECK_RUN(&s);
    CHECK(s.report.resumed_blocks >= 1, "nothing was taken over");
    besa_report_free(&s.report);
    CHECK(compare_directories(temp_path("whole"), s.output, NULL, first) == 0, "%s differs", first);
    discard(s.output);
    discard(temp_path("whole"));
}

static int kill_at_call(void *user, const besa_progress *p)
{
    (void)p;
    if (++g_progress.calls == *(const int64_t *)user) raise(SIGKILL);
    return 0;
}

/* The run of --child: the same in this process and in one that kills itself. */
static setup child_setup(const char *source, const char *output)
{
    setup s = new_setup(output, BESA_METHOD_BESA, 0.5);
    s.source = source;
    s.nsamples = 8;
    s.options.progress = kill_at_call;
    g_progress.calls = 0;
    return s;
}

/* Whether a process that kills itself at this call of its progress callback ran to its end instead; 0: never. */
static int child_ends(const char *source, const char *output, int64_t call)
{
    char number[32];
    int status = 0;
    pid_t pid;
    snprintf(number, sizeof number, "%lld", (long long)call);
    fflush(stdout);
    pid = fork();
    if (pid == 0) {
        execl("/proc/self/exe", "test_pipeline", "--child", source, output, g_tokens, number, (char *)NULL);
        _exit(127);
    }
    CHECK(waitpid(pid, &status, 0) == pid && (WIFEXITED(status) ? WEXITSTATUS(status) == 0 : WTERMSIG(status) == SIGKILL),
          "the child ended with status %d", status);
    return WIFEXITED(status);
}

/* kill -9 at calls of the progress callback spread over the run, twice before it may end; the output is absent or whole, and
 * the same in the end. */
static void test_kill(void)
{
    const char *whole = temp_path("whole"), *out = temp_path("out");
    const int64_t rounds = 6;
    char first[256];
    int64_t never = 0, calls, resumed = 0;
    setup s = child_setup(g_stories, whole);
    s.options.user = &never;
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    calls = g_progress.calls;
    CHECK(child_ends(g_stories, out, 0), "the child was killed");
    CHECK(compare_directories(whole, out, NULL, first) == 0, "another process: %s differs", first);
    for (int64_t round = 0; round < rounds; round++) {
        int64_t call = 1 + round * (calls - 1) / (rounds - 1), left;
        discard(out);
        CHECK(!child_ends(g_stories, out, call), "round %d: not killed at call %d of %d", (int)round, (int)call, (int)calls);
        CHECK(!exists(out) && exists(partial_of(out)), "round %d: what is left is no unfinished output", (int)round);
        left = (calls - call) / 2;              /* a run that goes on has a call for each block that is taken over */
        if (left > 0) child_ends(g_stories, out, left);
        CHECK(!exists(out) || compare_directories(whole, out, NULL, first) == 0, "round %d: %s is not whole", (int)round, first);
        if (!exists(out)) {
            s = child_setup(g_stories, out);
            s.options.user = &never;
            CHECK_RUN(&s);
            resumed += s.report.resumed_blocks;
            besa_report_free(&s.report);
        }
        CHECK(compare_directories(whole, out, NULL, first) == 0, "round %d: %s differs", (int)round, first);
        CHECK(!exists(partial_of(out)), "round %d: the partial output is still there", (int)round);
    }
    CHECK(resumed >= rounds, "%d blocks taken over", (int)resumed);
    discard(out);
    discard(whole);
}

/* A damaged partial output is noticed: by the block's checksum in the journal, and what has none is written again. The run goes
 * on from before the damage and ends with the right bytes. */
static void test_damaged_partial(void)
{
    static const struct { const char *tensor; int64_t blocks; } damage[] = {
        { "model.layers.0.self_attn.q_proj.weight", 0 }, { "model.layers.0.mlp.down_proj.weight", 0 },
        { "model.layers.1.mlp.up_proj.weight", 1 },      { "model.layers.2.self_attn.o_proj.weight", 2 },
        { "model.layers.3.mlp.gate_proj.weight", 3 },    { "model.embed_tokens.weight", 3 },
        { "model.layers.1.input_layernorm.weight", 3 },  { NULL, 3 } };
    setup s = small_setup(temp_path("whole"));
    besa_checkpoint *source = NULL;
    char first[256];
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    CHECK_OK(besa_checkpoint_open(&source, s.source, &s.error), s.error);
    for (size_t i = 0; source && i < sizeof damage / sizeof *damage; i++)
        for (int end = 0; end < 2; end++) {     /* the first byte of a tensor, or of the header, and the last */
            const besa_tensor *t = damage[i].tensor ? besa_checkpoint_find(source, damage[i].tensor) : NULL;
            char path[700];
            unsigned char *p;
            size_t n;
            s = small_setup(temp_path("out"));
            g_progress.stop_at = -2;
            CHECK(run(&s) == BESA_ERROR_CANCELLED, "%s", s.error.message);
            besa_report_free(&s.report);
            snprintf(path, sizeof path, "%s/model.safetensors", partial_of(s.output));
            p = read_bytes(path, &n);
            if (CHECK(p && n > 1000, "%s is not there", path)) {
                p[t ? t->offset + (end ? t->bytes - 1 : 0) : end ? 100u : 0] ^= 1;
                write_bytes(path, p, n);
            }
            free(p);
            g_progress.calls = 0, g_progress.stop_at = -1, g_progress.last = 0;
            CHECK(run(&s) == BESA_OK, "damage %d: %s", (int)i, s.error.message);
            CHECK(s.report.resumed_blocks == damage[i].blocks, "damage %d: %d blocks taken over", (int)i,
                  (int)s.report.resumed_blocks);
            besa_report_free(&s.report);
            CHECK(compare_directories(temp_path("whole"), s.output, NULL, first) == 0, "damage %d was passed on: %s", (int)i,
                  first);
            discard(s.output);
        }
    besa_checkpoint_close(source);
    discard(temp_path("whole"));
}

static int make_output(void *user, const besa_progress *p)
{
    if (p->block == p->blocks - 1) mkdir((const char *)user, 0777);
    return 0;
}

/* Codes, or learned rates, that are not those of the weights beside them, or not there in full, are not passed on. */
static void check_damaged(const char *name, int bits)
{
    setup s = small_setup(temp_path("whole"));
    char first[256], path[700];
    s.options.bits = bits, s.options.keep_rates = !bits;
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    for (int i = 0; i < 6; i++) {
        const int64_t taken[] = { 0, 0, 1, bits ? 3 : 0, 0, 0 }; /* blocks; learned rates have no header */
        unsigned char *p;
        size_t n, header = bits ? 8 : 0, block;
        s = small_setup(temp_path("out"));
        s.options.bits = bits, s.options.keep_rates = !bits;
        g_progress.stop_at = -2;
        CHECK(run(&s) == BESA_ERROR_CANCELLED, "%s", s.error.message);
        besa_report_free(&s.report);
        snprintf(path, sizeof path, "%s/%s", partial_of(s.output), name);
        p = read_bytes(path, &n);
        if (CHECK(p && n > 1000, "%s is not there", path)) {
            for (int k = 0; k < 8 && bits; k++) header += (size_t)p[k] << (8 * k);
            block = (n - header) / 5;
            if (i < 2) p[header + (i ? block - 1 : 0)] ^= 1; /* the first block's first and last byte, the second's, the header */
            if (i == 2) p[header + block] ^= 1;
            if (i == 3) p[100] ^= 1;
            write_bytes(path, p, i == 4 ? n - 1 : n);
            if (i == 5) unlink(path);
        }
        free(p);
        g_progress.calls = 0, g_progress.stop_at = -1, g_progress.last = 0;
        CHECK(run(&s) == BESA_OK, "damage %d: %s", i, s.error.message);
        CHECK(s.report.resumed_blocks == taken[i], "damage %d: %d blocks taken over", i, (int)s.report.resumed_blocks);
        besa_report_free(&s.report);
        CHECK(compare_directories(temp_path("whole"), s.output, NULL, first) == 0, "damage %d was passed on: %s", i, first);
        discard(s.output);
    }
    discard(temp_path("whole"));
}

static void test_damaged_codes(void)
{
    check_damaged("besa_quantization.safetensors", 4);
    check_damaged("besa-rates", 0);
}

/* All is done, but the output's name was taken: the next run reads the complete output back and ends from there, even if
 * files of it are gone; one whose weights have changed is refused. */
static void test_complete(void)
{
    setup s = small_setup(temp_path("whole"));
    char first[256], ready[600], shard[700];
    size_t n;
    s.options.keep_rates = 1;
    CHECK_RUN(&s);
    besa_report_free(&s.report);
    for (int damage = 0; damage < 3; damage++) {
        s = small_setup(temp_path("out"));
        s.options.keep_rates = 1;
        s.options.progress = make_output;
        s.options.user = (void *)(uintptr_t)s.output;
        expect(&s, BESA_ERROR_EXISTS, "the complete output is ");
        snprintf(ready, sizeof ready, "%s", strstr(s.error.message, "complete output is ") + 19);
        CHECK(rmdir(s.output) == 0 && !strncmp(ready, partial_of(s.output), strlen(partial_of(s.output))) && exists(ready),
              "no complete output %s", ready);
        snprintf(shard, sizeof shard, "%s/config.json", ready);
        unlink(shard);
        s = small_setup(s.output);
        expect(&s, BESA_ERROR_RESUME, ready);   /* without keep_rates */
        s.options.keep_rates = 1, s.options.epochs = 3;
        expect(&s, BESA_ERROR_RESUME, ready);
        s = small_setup(s.output);
        s.options.keep_rates = 1;
        if (damage == 2) {
            snprintf(shard, sizeof shard, "%s/besa-rates", ready);
            unlink(shard);
            expect(&s, BESA_ERROR_EXISTS, "without the learned rates, besa-rates; the model is whole: rename the directory to out, ");
            remove_tree(ready);
        } else if (damage) {
            snprintf(shard, sizeof shard, "%s/model.safetensors", ready);
            unsigned char *bytes = read_bytes(shard, &n);
            besa_checkpoint *source = NULL;
            CHECK_OK(besa_checkpoint_open(&source, s.source, &s.error), s.error);
            bytes[besa_checkpoint_find(source, "model.layers.4.self_attn.k_proj.weight")->offset] ^= 1;
            write_bytes(shard, bytes, n);
            besa_checkpoint_close(source);
            free(bytes);
            expect(&s, BESA_ERROR_EXISTS, ready);
            remove_tree(ready);
        } else {
            CHECK_RUN(&s);
            CHECK(s.report.resumed_blocks == s.report.num_blocks, "%d blocks taken over", (int)s.report.resumed_blocks);
            besa_report_free(&s.report);
            CHECK(compare_directories(temp_path("whole"), s.output, NULL, first) == 0, "%s differs", first);
            CHECK(!exists(ready), "it lies beside the output");
        }
        discard(s.output);
    }
    discard(temp_path("whole"));
}

/* Learned rates of all rows (count): the file that a run with keep_rates leaves, for free. */
static float *learned_rates(const setup *s, int64_t count)
{
    char path[700];
    size_t n = 0;
    snprintf(path, sizeof path, "%s/besa-rates", s->output);
    float *alpha = (float *)(void *)read_bytes(path, &n);
    if (CHECK(alpha && n == (size_t)count * sizeof *alpha, "%s: %zu bytes, expected %zu", path, n, (size_t)count * sizeof *alpha)) return alpha;
    free(alpha);
    return NULL;
}

/* A run leaves its learned rates where it is asked to: of the first block the same with a projection and without one, and there
 * counts follow from them; their mean is the report's; a file of rates has them, or shares where none was learned. */
static void test_keep_rates(void)
{
    static const besa_fixed_rate fixed = { "layers.1.self_attn.v_proj", 0.25 };
    const char *file = temp_path("rates.safetensors");
    float *alpha[2] = { NULL, NULL };
    int64_t rows = 0, total = 0;
    for (int i = 0; i < 2; i++) {
        setup s = kind_setup(temp_path("out"), 0);
        besa_checkpoint *weights = NULL, *rates = NULL;
        g_progress.calls = 0, g_progress.stop_at = -1, g_progress.last = 0;
        s.options.keep_rates = 1, s.options.no_projection = i, s.options.fixed = &fixed, s.options.num_fixed = 1;
        s.options.first_block = 0, s.options.num_blocks = 4;
        CHECK_RUN(&s);
        CHECK_OK(besa_checkpoint_open(&weights, s.output, &s.error), s.error);
        if (!weights) return;
        for (int k = 0; k < BESA_LAYERS; k++) rows += i ? 0 : besa_checkpoint_layer(weights, 0, k)->shape[0];
        total = 5 * rows;
        alpha[i] = learned_rates(&s, total);
        CHECK_OK(besa_masks_save(weights, file, BESA_FILE_RATES | BESA_FILE_MASKS, &s.error), s.error);
        CHECK_OK(besa_masks_open(&rates, file, weights, &s.error), s.error);
        const float *at = alpha[i];
        for (int64_t b = 0; b < 5 && at && rates; b++) {
            double sum = 0, learned = 0;
            for (int k = 0; k < BESA_LAYERS; k++) {
                char name[128];
                const int64_t R = besa_checkpoint_layer(weights, b, k)->shape[0], C = besa_checkpoint_layer(weights, b, k)->shape[1];
                const int none = b == 4 || (b == 1 && k == BESA_V);
                int64_t wrong = 0, off = 0;
                snprintf(name, sizeof name, "model.layers.%d.%s.alpha", (int)b, g_part[k]);
                const besa_tensor *a = besa_checkpoint_find(rates, name);
                snprintf(name, sizeof name, "model.layers.%d.%s.n", (int)b, g_part[k]);
                const besa_tensor *n = besa_checkpoint_find(rates, name);
                for (int64_t r = 0; r < R && a && n; r++, at++) {
                    const float saved = ((const float *)a->data)[r], share = (float)((double)((const int32_t *)n->data)[r] / (double)C);
                    wrong += none ? !isnan(*at) || saved != share : !(*at > 0 && *at < 1) || saved != *at;
                    off += fabs((double)share - (double)saved) > 1.0001 / (double)C;
                    if (!none) sum += (double)*at * (double)C, learned += (double)C;
                }
                CHECK(wrong == 0 && (!i || !off), "run %d, block %d, %s: %d wrong, %d counts from other rates", i, (int)b, g_part[k], (int)wrong,
                      (int)off);
            }
            CHECK(b == 4 || fabs(sum / learned - s.report.block[b].mean_rate) < 1e-6, "run %d, block %d: mean rate %g, reported %g", i, (int)b,
                  sum / learned, s.report.block[b].mean_rate);
        }
        besa_checkpoint_close(rates);
        char path[700];
        snprintf(path, sizeof path, "%s/besa-rates", s.output);
        CHECK(truncate(path, 100) == 0, "truncate");
        CHECK(besa_masks_save(weights, file, BESA_FILE_RATES, &s.error) == BESA_ERROR_FORMAT && strstr(s.error.message, "besa-rates: 100 bytes, expected "),
              "%s", s.error.message);
        CHECK_OK(besa_masks_save(weights, file, BESA_FILE_MASKS, &s.error), s.error);
        besa_checkpoint_close(weights);
        setup again = kind_setup(temp_path("again"), 4); /* wanda: without rates there is no such file, and none is copied */
        again.source = s.output, again.options.keep_rates = 1;
        CHECK_RUN(&again);
        snprintf(path, sizeof path, "%s/besa-rates", again.output);
        CHECK(!exists(path) && again.report.notes && strstr(again.report.notes, "not copied: besa-rates ("), "rates that nothing has learned");
        besa_report_free(&again.report);
        besa_report_free(&s.report);
        discard(again.output), discard(s.output);
    }
    CHECK(alpha[0] && alpha[1] && !memcmp(alpha[0], alpha[1], (size_t)rows * sizeof *alpha[0]), "the projection changes what was learned before it");
    free(alpha[0]);
    free(alpha[1]);
    unlink(file);
}

/* FLOP of a report's passes are of the blocks that its seconds are of: those that this run has pruned. */
static void test_resumed_flop(void)
{
    for (int i = 0; i < 2; i++)
        for (int resumed = 0; resumed < 2; resumed++) {
            setup s = kind_setup(temp_path("out"), i ? 8 : 6); /* 8: blocks 1 and 2 of five */
            const double blocks = i ? 2 : 5, here = !resumed ? blocks : i ? 0 : 2;
            g_progress.calls = 0, g_progress.last = 0, g_progress.stop_at = -2;
            if (resumed) CHECK(run(&s) == BESA_ERROR_CANCELLED, "%s", s.error.message);
            besa_report_free(&s.report);
            g_progress.calls = 0, g_progress.last = 0, g_progress.stop_at = -1;
            CHECK_RUN(&s);
            CHECK(s.report.resumed_blocks == 3 * resumed, "%d blocks taken over", (int)s.report.resumed_blocks);
            besa_result r;
            besa_plan_result plan = plan_of(&s, &r);
            besa__json json;
            s.report.plan = &plan;
            char *text = besa_report_json(&s.report);
            CHECK_OK(besa__json_parse(&json, text, text ? strlen(text) : 0, "the report", &s.error), s.error);
            CHECK(number_at(&json, "flop") == plan.flop, "all: %g, plan %g", number_at(&json, "flop"), plan.flop);
            for (int p = BESA_PASS_DENSE; p < BESA_PASS_WRITE; p++) {
                char key[64];
                const double all = p == BESA_PASS_DENSE || p == BESA_PASS_COMMIT ? plan.block_flop[p] * blocks : plan.pass_flop[p];
                snprintf(key, sizeof key, "passes.%s.flop", besa_pass_name((besa_pass)p));
                const double flop = number_at(&json, key), part = all * here / blocks;
                CHECK(fabs(flop - part) <= 1e-8 * part && all <= plan.pass_flop[p] * (1 + 1e-12), "%s: %g, expected %g of %g", key, flop,
                      part, all);
            }
            CHECK((number_at(&json, "passes.learn.seconds") > 0) == (here > 0), "seconds of other blocks than the FLOP");
            if (!i) CHECK(plan.block_flop[BESA_PASS_DENSE] * 5 == plan.pass_flop[BESA_PASS_DENSE] &&
                          plan.block_flop[BESA_PASS_COMMIT] * 5 == plan.pass_flop[BESA_PASS_COMMIT], "five blocks are not the model");
            besa__json_free(&json);
            besa_report_free(&s.report);
            discard(s.output);
        }
}

/* ---- outliers ---------------------------------------------------------------------------------- */

/* Y(T,R) = X(T,C) W(R,C)', and with `score` the scores |W| l2(X_j), one after another, at *score, which moves on. */
static void plain_linear(const besa_tensor *t, const double *x, double *y, int T, double **score)
{
    int R = (int)t->shape[0], C = (int)t->shape[1];
    double *w = (double *)malloc((size_t)(R * C) * sizeof *w);
    for (int i = 0; i < R * C; i++) {
        const unsigned char *at = (const unsigned char *)t->data + (size_t)i * besa_dtype_size(t->dtype);
        uint16_t half;
        float f;
        memcpy(&half, at, 2);
        if (t->dtype == BESA_F32) memcpy(&f, at, 4);
        else f = t->dtype == BESA_F16 ? besa__f16_to_f32(half) : besa__bf16_to_f32(half);
        w[i] = (double)f;
    }
    for (int j = 0; j < C && score; j++) {
        double sum = 0;
        for (int n = 0; n < T; n++) sum += x[n * C + j] * x[n * C + j];
        for (int r = 0; r < R; r++) (*score)[r * C + j] = fabs(w[r * C + j]) * sqrt(sum);
    }
    if (score) *score += R * C;
    for (int n = 0; n < T; n++)
        for (int r = 0; r < R; r++) {
            y[n * R + r] = 0;
            for (int j = 0; j < C; j++) y[n * R + r] += x[n * C + j] * w[r * C + j];
        }
    free(w);
}

static void plain_norm(double *y, const double *x, int T, int d)
{
    for (int n = 0; n < T; n++) {
        double sum = 0;
        for (int j = 0; j < d; j++) sum += x[n * d + j] * x[n * d + j];
        for (int j = 0; j < d; j++) y[n * d + j] = x[n * d + j] / sqrt(sum / d + 1e-5);
    }
}

static void plain_rope(double *x, int T, int seqlen, int heads, int dim)
{
    for (int n = 0; n < T; n++)
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < dim / 2; i++) {
                double angle = n % seqlen * pow(10000, -2.0 * i / dim), c = cos(angle), s = sin(angle);
                double *a = x + (n * heads + h) * dim + i, *b = a + dim / 2, was = *a;
                *a = was * c - *b * s;
                *b = *b * c + was * s;
            }
}

static void plain_attention(double *o, const double *q, const double *k, const double *v, int T, int seqlen, int heads, int kv,
                            int dim)
{
    double p[64];
    for (int n = 0; n < T; n++)
        for (int h = 0; h < heads; h++) {
            int first = n / seqlen * seqlen, g = h / (heads / kv);
            double sum = 0;
            for (int m = first; m <= n; m++) {
                double dot = 0;
                for (int i = 0; i < dim; i++) dot += q[(n * heads + h) * dim + i] * k[(m * kv + g) * dim + i];
                sum += p[m - first] = exp(dot / sqrt(dim));
            }
            for (int i = 0; i < dim; i++) {
                double *to = o + (n * heads + h) * dim + i;
                *to = 0;
                for (int m = first; m <= n; m++) *to += p[m - first] / sum * v[(m * kv + g) * dim + i];
            }
        }
}

/* x (T,d) through a block of a fixture's Llama, whose norms are 1, in double and plain loops; the scores of its layers in the order
 * of BESA_LAYERS, layer after layer. */
static void plain_block(const besa_checkpoint *c, int block, double *x, int T, int seqlen, double *score)
{
    const besa_block_shape *s = &besa_checkpoint_config(c)->block;
    int d = (int)s->hidden_size, inner = (int)s->intermediate_size, heads = (int)s->num_attention_heads;
    int kv = (int)s->num_key_value_heads, dim = (int)s->head_dim, widest = inner > d ? inner : d;
    double *at[6];
    for (int i = 0; i < 6; i++) at[i] = (double *)calloc((size_t)(T * widest), sizeof **at);
#define LAYER(l) besa_checkpoint_layer(c, block, l)
    plain_norm(at[0], x, T, d);
    plain_linear(LAYER(BESA_Q), at[0], at[1], T, &score);
    plain_linear(LAYER(BESA_K), at[0], at[2], T, &score);
    plain_linear(LAYER(BESA_V), at[0], at[3], T, &score);
    plain_rope(at[1], T, seqlen, heads, dim);
    plain_rope(at[2], T, seqlen, kv, dim);
    plain_attention(at[4], at[1], at[2], at[3], T, seqlen, heads, kv, dim);
    plain_linear(LAYER(BESA_O), at[4], at[5], T, &score);
    for (int i = 0; i < T * d; i++) x[i] += at[5][i];
    plain_norm(at[0], x, T, d);
    plain_linear(LAYER(BESA_GATE), at[0], at[1], T, &score);
    plain_linear(LAYER(BESA_UP), at[0], at[2], T, &score);
    for (int i = 0; i < T * inner; i++) at[3][i] = at[1][i] / (1 + exp(-at[1][i])) * at[2][i];
    plain_linear(LAYER(BESA_DOWN), at[3], at[5], T, &score);
    for (int i = 0; i < T * d; i++) x[i] += at[5][i];
#undef LAYER
    for (int i = 0; i < 6; i++) free(at[i]);
}

/* The share of outliers among the scores of layers that are not of `fixed` (bits), and the share that lies so near the limit
 * that rounding decides it. */
static double plain_share(const besa_checkpoint *c, const double *score, unsigned fixed, double threshold, double *unsure)
{
    double mean = 0, count = 0, above = 0;
    *unsure = 0;
    for (int pass = 0; pass < 2; pass++) {
        const double *at = score;
        for (int l = 0; l < BESA_LAYERS; l++) {
            const besa_tensor *t = besa_checkpoint_layer(c, 0, l);
            int64_t n = t->shape[0] * t->shape[1];
            for (int64_t i = 0; i < n && !(fixed >> l & 1u); i++) {
                if (pass == 0) mean += at[i], count++;
                else above += at[i] > threshold * mean, *unsure += fabs(at[i] / (threshold * mean) - 1) < 1e-5;
            }
            at += n;
        }
        if (pass == 0) mean /= count;
    }
    *unsure /= count;
    return above / count;
}

/* besa_outliers as a setup has it. */
static besa_result outliers_of(setup *s, double threshold, double *shares)
{
    besa_checkpoint *checkpoint = NULL;
    besa_backend own, *be = s->be;
    besa_cpu_options cpu;
    besa_calibration c;
    besa_result r = besa_checkpoint_open(&checkpoint, s->source, &s->error);
    int64_t n = s->nsamples * s->seqlen;
    int32_t *ids = (int32_t *)calloc((size_t)n, sizeof *ids);
    memset(&c, 0, sizeof c);
    memset(&cpu, 0, sizeof cpu);
    cpu.threads = s->threads;
    for (int64_t i = 0; r == BESA_OK && i < n; i++)
        ids[i] = (int32_t)(g_calibration.ids[i] % besa_checkpoint_config(checkpoint)->vocab_size) + (i + 1 == n ? s->last_id : 0);
    c.ids = ids, c.nsamples = s->nsamples, c.seqlen = s->seqlen;
    if (r == BESA_OK && !be) {
        r = besa_cpu_backend(&own, &cpu, &s->error);
        be = r == BESA_OK ? &own : NULL;
    }
    if (r == BESA_OK) r = besa_outliers(checkpoint, be, &c, &s->options, threshold, shares, &s->error);
    if (be == &own) own.destroy(&own);
    besa_checkpoint_close(checkpoint);
    free(ids);
    return r;
}

/* The shares of a Llama of random weights, against plain loops in double: all element types, fixed layers, some blocks; the same
 * bytes for any number of threads, and where the device has memory of its own; within a budget, which is what wanda's plan says. */
static void test_outliers(void)
{
    enum { BLOCKS = 4, SAMPLES = 10, SEQLEN = 24, TOKENS = SAMPLES * SEQLEN };
    static const besa_fixed_rate fixed[] = { { "up_proj", 0.25 }, { "layers.2", 0 } };
    static double score[BLOCKS][32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48], x[TOKENS * 32];
    const char *model = temp_path("model");
    for (int type = 0; type < 3; type++) {
        besa_checkpoint *checkpoint = NULL;
        besa_error error;
        fixture_random_llama(model, BLOCKS, 32, 48, 4, 2, 64, (besa_dtype)type);
        CHECK_OK(besa_checkpoint_open(&checkpoint, model, &error), error);
        if (!checkpoint) return;
        const besa_tensor *table = besa_checkpoint_find(checkpoint, "model.embed_tokens.weight");
        for (int i = 0; i < TOKENS * 32; i++) {
            size_t at = (size_t)(g_calibration.ids[i / 32] % 64 * 32 + i % 32);
            float f = 0;
            if (type == BESA_F32) memcpy(&f, (const unsigned char *)table->data + 4 * at, 4);
            else {
                uint16_t half;
                memcpy(&half, (const unsigned char *)table->data + 2 * at, 2);
                f = type == BESA_F16 ? besa__f16_to_f32(half) : besa__bf16_to_f32(half);
            }
            x[i] = (double)f;
        }
        for (int b = 0; b < BLOCKS; b++) plain_block(checkpoint, b, x, TOKENS, SEQLEN, score[b]);
        for (int i = 0; i < 8; i++) {
            double shares[3][BLOCKS], threshold = i == 1 ? 2.5 : 1.75;
            int64_t first = i == 2 || i == 3 ? 1 : 0, count = i == 2 ? 2 : BLOCKS - first;
            besa_backend be = counted_backend(0);
            besa_plan_result plan;
            setup s = new_setup(NULL, BESA_METHOD_BESA, 0);
            s.source = model, s.nsamples = SAMPLES, s.seqlen = SEQLEN;
            s.options.first_block = first, s.options.num_blocks = i == 2 ? 2 : 0;
            if (i >= 4) s.options.fixed = fixed, s.options.num_fixed = i == 4 ? 1 : 2;
            if (i >= 6) be.unified_memory = 0;
            s.options.learn = BESA_LEARN_BOTH;  /* which is not looked at, nor is batch_size */
            s.options.batch_size = 1000;
            if (i == 7) s.options.device_memory = 1;
            setup wanda = s;
            wanda.options.method = BESA_METHOD_WANDA, wanda.options.learn = BESA_LEARN_RATES, wanda.options.rates.target = 0.5;
            if (i == 7) {                       /* the least that works, which the refusal says */
                s.be = &be;
                besa_result refused = outliers_of(&s, threshold, shares[0]);
                if (!CHECK(refused == BESA_ERROR_MEMORY && strstr(s.error.message, "works here is "), "%s", besa_result_string(refused)))
                    return;
                s.options.device_memory = (size_t)atoll(strstr(s.error.message, "works here is ") + 14);
                wanda.options.device_memory = s.options.device_memory;
            }
            CHECK(plan_with(&wanda, &be, &plan) == BESA_OK, "no plan");
            for (int t = 0; t < 3; t++) {
                s.threads = t + 1;
                s.be = t == 1 || i == 7 ? &be : NULL; /* of two threads */
                memset(shares[t], 0, sizeof shares[t]);
                CHECK_OK(outliers_of(&s, threshold, shares[t]), s.error);
                CHECK(!memcmp(shares[t], shares[0], sizeof shares[0]), "%d threads: other shares", t + 1);
                for (int64_t b = count; b < BLOCKS; b++) CHECK(shares[t][b] == 0, "a share of block %d", (int)(first + b));
            }
            CHECK(g_counted.peak[0] == plan.device_bytes && g_counted.peak[1] == plan.host_bytes, "case %d: %zu and %zu bytes, plan %zu "
                  "and %zu", i, g_counted.peak[0], g_counted.peak[1], plan.device_bytes, plan.host_bytes);
            CHECK(g_counted.live[0] + g_counted.live[1] == 0, "memory is not given back");
            for (int64_t b = 0; b < count; b++) {
                double unsure = 0, want = -1;
                if (i < 5 || b != 2) want = plain_share(checkpoint, score[first + b], i >= 4 ? 1u << BESA_UP : 0, threshold, &unsure);
                CHECK(fabs(shares[0][b] - want) <= unsure + 1e-15 && (want < 0 || want > 0.01) && unsure < 1e-3,
                      "type %d, case %d, block %d: %.9g of outliers, expected %.9g", type, i, (int)b, shares[0][b], want);
            }
            be.destroy(&be);
        }
        besa_checkpoint_close(checkpoint);
        discard(model);
    }
}

/* Sparsities from shares: the rule, its mean, what stays at the target, and what is refused. */
static void test_outlier_targets(void)
{
    double targets[6], sum = 0;
    const double shares[6] = { 0.02, -1, 0.05, 0.01, 0.03, 0.015 };
    besa_error error = { BESA_OK, "" };
    CHECK_OK(besa_outlier_targets(targets, shares, 6, 0.7, 0.1, &error), error);
    for (int i = 0; i < 6; i++) {
        double want = shares[i] < 0 ? 0.7 : 0.7 + 0.2 * (0.025 - shares[i]) / 0.04;
        CHECK(fabs(targets[i] - want) < 1e-15, "block %d: %.17g, expected %.17g", i, targets[i], want);
        sum += targets[i];
    }
    CHECK(fabs(sum / 6 - 0.7) < 1e-15, "a mean of %.17g", sum / 6);
    memcpy(targets, shares, sizeof targets);
    CHECK_OK(besa_outlier_targets(targets, targets, 6, 0.5, 0, &error), error); /* in place */
    CHECK(fabs(targets[3] - targets[2] - 0.16) < 1e-15, "lambda's default: %g", targets[3] - targets[2]);
    for (int i = 0; i < 3; i++) targets[i] = i == 1 ? -1 : 0.25;
    CHECK_OK(besa_outlier_targets(targets, targets, 3, 0.625, 0.5, &error), error);
    CHECK(targets[0] == 0.625 && targets[1] == 0.625 && targets[2] == 0.625, "equal shares: %g", targets[0]);
    targets[0] = -1;
    CHECK_OK(besa_outlier_targets(targets, targets, 1, 0.625, 0, &error), error);
    CHECK(targets[0] == 0.625, "no shares: %g", targets[0]);
    static const struct { double share, target, lambda; const char *word; } wrong[] = {
        { 0.1, 0, 0.1, "target of 0" }, { 0.1, 1, 0.1, "target of 1" }, { 0.1, NAN, 0.1, "target" }, { 0.1, 0.5, -0.1, "lambda -0.1" },
        { 0.1, 0.5, 1, "lambda 1" }, { 0.1, 0.5, NAN, "lambda" }, { NAN, 0.5, 0.1, "share" }, { 1.5, 0.5, 0.1, "number 1 is 1.5" },
        { -0.5, 0.5, 0.1, "share" }, { 0.1, 0.98, 0.08, "block 0 of those that are pruned would have a sparsity of 1.06" },
        { 0.1, 0.0625, 0.0625, "block 1 of those that are pruned would have a sparsity of 0 " } };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        targets[0] = 0, targets[1] = wrong[i].share;
        besa_result r = besa_outlier_targets(targets, targets, 2, wrong[i].target, wrong[i].lambda, &error);
        CHECK(r == BESA_ERROR_OPTION && strstr(error.message, wrong[i].word), "case %d: %s", (int)i, r ? error.message : "taken");
    }
}

/* ---- one model against another ------------------------------------------------------------- */

enum { AGAINST_VOCAB = 5000, AGAINST_WINDOWS = 5, AGAINST_SEQLEN = 12 };

/* log p(vocab) of logits(vocab), in double; returns the largest's place */
static int log_softmax(double *p, const float *logits)
{
    double sum = 0;
    int best = 0;
    for (int i = 1; i < AGAINST_VOCAB; i++) if (logits[i] > logits[best]) best = i;
    for (int i = 0; i < AGAINST_VOCAB; i++) sum += exp((double)logits[i] - (double)logits[best]);
    for (int i = 0; i < AGAINST_VOCAB; i++) p[i] = (double)logits[i] - (double)logits[best] - log(sum);
    return best;
}

/* A window and its positions' divergences from both models' logits, as they are defined. */
static void plain_window(besa_window *want, double *kl, const float *p, const float *q, const int32_t *ids)
{
    static double lp[AGAINST_VOCAB], lq[AGAINST_VOCAB];
    memset(want, 0, sizeof *want);
    for (int t = 0; t + 1 < AGAINST_SEQLEN; t++) {
        int best = log_softmax(lp, p + (size_t)t * AGAINST_VOCAB), other = log_softmax(lq, q + (size_t)t * AGAINST_VOCAB);
        kl[t] = 0;
        for (int i = 0; i < AGAINST_VOCAB; i++) kl[t] += exp(lp[i]) * (lp[i] - lq[i]);
        want->kl += kl[t] / (AGAINST_SEQLEN - 1);
        want->same += (best == other) / (AGAINST_SEQLEN - 1.0);
        want->reference_nll -= lp[ids[t + 1]] / (AGAINST_SEQLEN - 1);
        want->nll -= lq[ids[t + 1]] / (AGAINST_SEQLEN - 1);
    }
}

/* Halve what one layer does, so that models differ and mostly agree. */
static void change_down(const char *name, float *v, int64_t rows, int64_t columns)
{
    if (!strcmp(name, "model.layers.1.mlp.down_proj.weight"))
        for (int64_t i = 0; i < rows * columns; i++) v[i] *= 0.5f;
}

static void check_against(const besa_checkpoint *model, const besa_checkpoint *dense, const int32_t *ids, int unified)
{
    enum { T = AGAINST_WINDOWS * AGAINST_SEQLEN, POSITIONS = AGAINST_WINDOWS * (AGAINST_SEQLEN - 1) };
    besa_window window[2][AGAINST_WINDOWS], want[AGAINST_WINDOWS];
    float kl[2][POSITIONS], *p = (float *)malloc(sizeof(float) * T * AGAINST_VOCAB), *q = (float *)malloc(sizeof(float) * T * AGAINST_VOCAB);
    double plain[POSITIONS], nll[AGAINST_WINDOWS], ppl, own_kl = 0, own_same = 0;
    besa_reference reference;
    besa_error error;
    CHECK_OK(besa_logits(dense, NULL, ids, AGAINST_WINDOWS, AGAINST_SEQLEN, p, &error), error);
    CHECK_OK(besa_logits(model, NULL, ids, AGAINST_WINDOWS, AGAINST_SEQLEN, q, &error), error);
    for (int k = 0; k < 2; k++) {
        besa_backend be = counted_backend(0);
        be.unified_memory = k == 0 || unified;
        CHECK_OK(besa_reference_create(&reference, dense, &be, ids, AGAINST_WINDOWS, AGAINST_SEQLEN, NULL, NULL, &error), error);
        CHECK_OK(besa_compare_models(model, k ? &be : NULL, &reference, window[k], kl[k], NULL, NULL, &error), error);
        CHECK_OK(besa_perplexity(dense, NULL, ids, AGAINST_WINDOWS, AGAINST_SEQLEN, &ppl, nll, NULL, NULL, &error), error);
        CHECK(ppl == reference.perplexity && !memcmp(nll, reference.nll, sizeof nll), "the reference's perplexity is %.9g, not %.9g",
              reference.perplexity, ppl);
        besa_reference_free(&reference);
        CHECK(g_counted.live[0] + g_counted.live[1] == 0, "memory is not given back");
        be.destroy(&be);
    }
    CHECK(!memcmp(window[0], window[1], sizeof window[0]) && !memcmp(kl[0], kl[1], sizeof kl[0]), "other figures on another backend");
    CHECK_OK(besa_perplexity(model, NULL, ids, AGAINST_WINDOWS, AGAINST_SEQLEN, &ppl, nll, NULL, NULL, &error), error);
    for (int w = 0; w < AGAINST_WINDOWS; w++) {
        const besa_window *got = &window[0][w];
        size_t at = (size_t)w * AGAINST_SEQLEN * AGAINST_VOCAB;
        plain_window(&want[w], plain + w * (AGAINST_SEQLEN - 1), p + at, q + at, ids + w * AGAINST_SEQLEN);
        CHECK(fabs(got->kl - want[w].kl) < 2e-6 && fabs(got->same - want[w].same) < 1e-12 && got->nll == nll[w] &&
              fabs(got->nll - want[w].nll) < 2e-6 && fabs(got->reference_nll - want[w].reference_nll) < 2e-6,
              "window %d: %.9g, %.9g, %.9g, %.9g; expected %.9g, %.9g, %.9g, %.9g", w, got->kl, got->same, got->nll, got->reference_nll,
              want[w].kl, want[w].same, want[w].nll, want[w].reference_nll);
        own_kl += want[w].kl / AGAINST_WINDOWS, own_same += want[w].same / AGAINST_WINDOWS;
    }
    for (int i = 0; i < POSITIONS; i++) CHECK(fabs((double)kl[0][i] - plain[i]) < 3e-6, "position %d: %.9g, expected %.9g", i, (double)kl[0][i], plain[i]);
    CHECK(own_kl > 0.01 && own_same > 0.02, "models that are too far apart to tell: %g, %g", own_kl, own_same);
    free(p);
    free(q);
}

/* KL divergence, likeliest tokens and log-likelihoods of two models, another head and width too, against plain sums in double
 * over their logits; the same model is at no distance from itself. */
static void test_against(void)
{
    const char *dense = temp_path("dense"), *other = temp_path("other"), *wide = temp_path("wide"), *words = temp_path("words");
    besa_checkpoint *c[4] = { NULL, NULL, NULL, NULL };
    int32_t ids[AGAINST_WINDOWS * AGAINST_SEQLEN];
    besa_window window[AGAINST_WINDOWS];
    float kl[AGAINST_WINDOWS * (AGAINST_SEQLEN - 1)];
    besa_reference reference;
    besa_error error;
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) ids[i] = (int32_t)(i * 7919 % AGAINST_VOCAB);
    fixture_random_llama(dense, 2, 32, 48, 4, 2, AGAINST_VOCAB, BESA_F32);
    fixture_random_llama(wide, 1, 48, 32, 4, 4, AGAINST_VOCAB, BESA_BF16);
    fixture_random_llama(words, 1, 32, 32, 4, 4, 64, BESA_F32);
    CHECK_OK(besa_checkpoint_open(&c[0], dense, &error), error);
    fixture_variant(other, c[0], dense, BESA_F32, change_down);
    CHECK_OK(besa_checkpoint_open(&c[1], other, &error), error);
    CHECK_OK(besa_checkpoint_open(&c[2], wide, &error), error);
    CHECK_OK(besa_checkpoint_open(&c[3], words, &error), error);
    check_against(c[1], c[0], ids, 0);
    check_against(c[0], c[1], ids, 1);
    CHECK_OK(besa_reference_create(&reference, c[2], NULL, ids, AGAINST_WINDOWS, AGAINST_SEQLEN, NULL, NULL, &error), error);
    CHECK_OK(besa_compare_models(c[2], NULL, &reference, window, kl, NULL, NULL, &error), error);
    for (int w = 0; w < AGAINST_WINDOWS; w++)
        CHECK(window[w].kl == 0 && window[w].same == 1 && window[w].nll == window[w].reference_nll, "window %d of the same model: %g, %g", w,
              window[w].kl, window[w].same);
    CHECK_OK(besa_compare_models(c[0], NULL, &reference, window, NULL, NULL, NULL, &error), error); /* of another width */
    CHECK(window[0].kl > 0.1, "a divergence of %g", window[0].kl);
    CHECK(besa_compare_models(c[3], NULL, &reference, window, kl, NULL, NULL, &error) == BESA_ERROR_OPTION &&
          strstr(error.message, "words has a vocabulary of 64 tokens, and ") && strstr(error.message, "one of 5000"), "%s", error.message);
    besa_reference_free(&reference);
    besa_reference_free(NULL);
    CHECK(besa_compare_models(c[0], NULL, &reference, window, kl, NULL, NULL, &error) == BESA_ERROR_OPTION &&
          strstr(error.message, "besa_reference_create"), "%s", error.message);
    for (int i = 0; i < 4; i++) besa_checkpoint_close(c[i]);
}

/* A reference and what is held against it, with an allocation that fails: of the library's, or the backend's. */
static void test_against_allocations(void)
{
    const char *model = temp_path("alone");
    besa_checkpoint *c = NULL;
    besa_error error;
    int32_t ids[2 * 8] = { 1, 2, 3, 4, 5 };
    fixture_random_llama(model, 1, 16, 16, 2, 1, 32, BESA_F32);
    CHECK_OK(besa_checkpoint_open(&c, model, &error), error);
    for (int of_backend = 0; of_backend < 2; of_backend++)
        for (int n = 1, done = 0; !done && CHECK(n < 100, "no end of allocations"); n++) {
            besa_backend be = counted_backend(of_backend ? n : 0);
            besa_reference reference;
            besa_window window[2];
            int64_t live = g_live;
            g_allocations = 0, g_fail_at = of_backend ? 0 : n;
            besa_result r = besa_reference_create(&reference, c, &be, ids, 2, 8, NULL, NULL, &error);
            if (r != BESA_OK) CHECK(!reference.ids && !reference.hidden && !reference.nll, "allocation %d: something is left", n);
            if (r == BESA_OK) r = besa_compare_models(c, &be, &reference, window, NULL, NULL, NULL, &error);
            done = (of_backend ? g_counted.calls : (int)g_allocations) < n;
            g_fail_at = 0;
            CHECK(r == (done ? BESA_OK : BESA_ERROR_MEMORY), "allocation %d: %s", n, besa_result_string(r));
            besa_reference_free(&reference);
            CHECK(g_live == live && g_counted.live[0] + g_counted.live[1] == 0, "allocation %d: memory is not given back", n);
            be.destroy(&be);
        }
    besa_checkpoint_close(c);
}

/* A run says of its own result what is measured on the output; a plan knows its memory. */
static void test_against_run(void)
{
    besa_window window[8];
    float kl[8 * 63];
    besa_plan_result plan;
    besa_checkpoint *dense = NULL, *pruned = NULL;
    besa_error error;
    besa_reference reference, shape;
    int32_t ids[8 * 64];
    int64_t live = g_live;
    setup s = small_setup(temp_path("against"));
    CHECK_OK(besa_checkpoint_open(&dense, s.source, &error), error);
    s.options.method = BESA_METHOD_WANDA, s.options.progress = NULL, s.windows = 8;
    for (int i = 0; i < 8 * 64; i++) ids[i] = (int32_t)(g_test.ids[i] % besa_checkpoint_config(dense)->vocab_size);
    memset(&shape, 0, sizeof shape);
    shape.checkpoint = dense, shape.windows = 8, shape.seqlen = 64;
    for (int unified = 0; unified < 2; unified++) {
        besa_backend be = counted_backend(0);
        be.unified_memory = unified;
        CHECK_OK(besa_reference_create(&reference, dense, &be, ids, 8, 64, NULL, NULL, &error), error);
        CHECK(g_counted.live[0] + g_counted.live[1] == 0, "memory is not given back");
        s.be = &be;
        s.against = &shape;
        CHECK(plan_with(&s, &be, &plan) == BESA_OK, "no plan");
        memset(g_counted.peak, 0, sizeof g_counted.peak);
        s.against = &reference;
        CHECK_RUN(&s);
        CHECK(g_counted.peak[0] == plan.device_bytes && g_counted.peak[1] == plan.host_bytes, "%zu and %zu bytes, plan %zu and %zu",
              g_counted.peak[0], g_counted.peak[1], plan.device_bytes, plan.host_bytes);
        CHECK(plan.reference_bytes == 8 * 64 * ((size_t)besa_checkpoint_config(dense)->block.hidden_size * 4 + 4) + 64, "a reference of %zu bytes",
              plan.reference_bytes);
        CHECK_OK(besa_checkpoint_open(&pruned, s.output, &error), error);
        if (!pruned) return;
        CHECK_OK(besa_compare_models(pruned, NULL, &reference, window, kl, NULL, NULL, &error), error);
        CHECK(s.report.test_windows == 8 && !memcmp(window, s.report.window, sizeof window) && !memcmp(kl, s.report.kl, sizeof kl),
              "the report has %g, the output %g", s.report.window[0].kl, window[0].kl);
        besa_divergence d;
        besa_summarize(&d, s.report.window, 8, s.report.kl, 8 * 63);
        CHECK(fabs(d.perplexity / s.report.perplexity - 1) < 1e-14 && fabs(d.reference_perplexity / reference.perplexity - 1) < 1e-14 &&
              d.kl > 0.001, "perplexities of %.17g and %.17g", d.perplexity, d.reference_perplexity);
        besa_report_free(&s.report);
        besa_checkpoint_close(pruned);
        pruned = NULL;
        shape.windows = 7;
        s.against = &shape;
        CHECK(plan_with(&s, &be, &plan) == BESA_ERROR_OPTION, "seven windows");
        discard(s.output);
        expect(&s, BESA_ERROR_OPTION, "the test is 8 windows of 64 tokens, and what it is to be held against 7 of 64");
        shape.windows = 8;
        discard(s.output);
        expect(&s, BESA_ERROR_OPTION, "the reference is empty");
        reference.ids[3]++;
        s.against = &reference;
        expect(&s, BESA_ERROR_OPTION, "not those of the reference");
        reference.ids[3]--;
        reference.dtype = BESA_BF16;
        expect(&s, BESA_ERROR_OPTION, "other activations");
        besa_reference_free(&reference);
        be.destroy(&be);
    }
    besa_checkpoint_close(dense);
    CHECK(g_live == live, "%d blocks leaked", (int)(g_live - live));
}

/* Means, standard errors and percentiles, of numbers that are counted by hand. */
static void test_summarize(void)
{
    const besa_window window[3] = { { 1, 2, 0.5, 0.25 }, { 2, 2.5, 1, 0.5 }, { 6, 4.5, 0, 0.75 } };
    float kl[5] = { 3, 0, 1, 4, 2 };
    besa_divergence d;
    besa_summarize(&d, window, 3, kl, 5);
    CHECK(d.windows == 3 && d.positions == 5, "%d windows", (int)d.windows);
    CHECK(fabs(d.perplexity - exp(3)) < 1e-12 && fabs(d.perplexity_error - exp(3) * sqrt(14.0 / 6)) < 1e-12, "%.17g", d.perplexity_error);
    CHECK(fabs(d.reference_perplexity - exp(3)) < 1e-12 && fabs(d.reference_perplexity_error - exp(3) * sqrt(3.5 / 6)) < 1e-12, "%.17g",
          d.reference_perplexity_error);
    CHECK(fabs(d.difference) < 1e-15 && fabs(d.difference_error - sqrt(3.5 / 6)) < 1e-15, "%.17g, %.17g", d.difference, d.difference_error);
    CHECK(fabs(d.kl - 0.5) < 1e-15 && fabs(d.kl_error - sqrt(0.5 / 6)) < 1e-15 && fabs(d.same - 0.5) < 1e-15, "%.17g", d.kl_error);
    CHECK(fabs(d.kl_99 - 3.96) < 1e-12 && d.kl_most == 4, "%.17g", d.kl_99);
    besa_summarize(&d, window, 1, kl, 1);
    CHECK(d.perplexity_error == 0 && d.difference == -1 && d.difference_error == 0 && d.kl_99 == 0, "%g", d.kl_99);
    besa_summarize(&d, window, 2, NULL, 5);
    CHECK(d.perplexity == exp(1.5) && d.kl == 0 && d.reference_perplexity == 0 && d.positions == 0, "%g", d.kl);
}

static void expect_outliers(setup *s, double threshold, besa_result want, const char *word)
{
    double shares[BESA_MAX_LAYERS];
    int64_t live = g_live;
    besa_result got = outliers_of(s, threshold, shares);
    CHECK(got == want && strstr(s->error.message, word), "%s: %s, expected %s and %s", besa_result_string(got),
          got ? s->error.message : "", besa_result_string(want), word);
    CHECK(g_live == live, "%d blocks leaked", (int)(g_live - live));
}

static void test_outlier_errors(void)
{
    static const besa_fixed_rate none[] = { { "no_proj", 0 } };
    double shares[5];
    setup s = small_setup(NULL), fresh = s;
    expect_outliers(&s, -1, BESA_ERROR_OPTION, "the threshold of outliers is -1");
    expect_outliers(&s, NAN, BESA_ERROR_OPTION, "threshold");
    expect_outliers(&s, INFINITY, BESA_ERROR_OPTION, "threshold");
    s.options.depth_slope = 0.1;
    expect_outliers(&s, 0, BESA_ERROR_OPTION, "a depth_slope is given");
    s = fresh, s.options.pattern_n = 2, s.options.pattern_m = 4;
    expect_outliers(&s, 0, BESA_ERROR_OPTION, "a pattern is given");
    s = fresh, s.options.method = BESA_METHOD_KEEP;
    expect_outliers(&s, 0, BESA_ERROR_OPTION, "method keep is given");
    s = fresh, s.options.first_block = 5;
    expect_outliers(&s, 0, BESA_ERROR_OPTION, "the model has blocks 0 to 4");
    s = fresh, s.options.fixed = none, s.options.num_fixed = 1;
    expect_outliers(&s, 0, BESA_ERROR_OPTION, "no_proj");
    s = fresh, s.last_id = 1000;
    expect_outliers(&s, 0, BESA_ERROR_TOKEN, "calibration token 23");
    s = fresh, s.nsamples = 0;
    expect_outliers(&s, 0, BESA_ERROR_OPTION, "calibration sequences");
    s = fresh, s.options.num_blocks = 2;        /* the end is that of the range */
    g_progress.calls = 0, g_progress.stop_at = -1, g_progress.last = 0;
    CHECK_OK(outliers_of(&s, 0, shares), s.error);
    CHECK(fabs(g_progress.last - 1) < 1e-9, "two of five blocks: %g", g_progress.last);
    s = fresh;                                  /* stopped at every call, the last of which is the end */
    g_progress.calls = 0, g_progress.stop_at = -1, g_progress.last = 0;
    CHECK_OK(outliers_of(&s, 0, shares), s.error);
    int64_t calls = g_progress.calls;
    CHECK(calls >= 5 && fabs(g_progress.last - 1) < 1e-9, "%d calls, the last at %g", (int)calls, g_progress.last);
    for (int64_t stop = 1; stop <= calls; stop++) {
        g_progress.calls = 0, g_progress.stop_at = stop, g_progress.last = 0;
        expect_outliers(&s, 0, BESA_ERROR_CANCELLED, "stopped by the progress callback");
    }
    g_progress.stop_at = -1;
    for (int64_t i = 1, failed = 1; failed; i++) { /* every allocation */
        besa_backend be = counted_backend((int)i);
        s = fresh, s.be = &be;
        g_progress.last = 0;
        failed = outliers_of(&s, 0, shares) != BESA_OK;
        CHECK(!failed || s.error.code == BESA_ERROR_MEMORY, "allocation %d: %s", (int)i, s.error.message);
        CHECK(g_counted.live[0] + g_counted.live[1] == 0 && i < 9, "allocation %d: memory is not given back", (int)i);
        be.destroy(&be);
    }
    fixture_random_llama(temp_path("bad"), 3, 64, 144, 4, 2, 64, BESA_F32);
    spoil_weight(temp_path("bad"), "model.layers.1.mlp.up_proj.weight");
    s = fresh, s.source = temp_path("bad"), g_progress.last = 0;
    expect_outliers(&s, 0, BESA_ERROR_NOT_FINITE, "[model.layers.1]");
    discard(temp_path("bad"));
}

/* Runs by these sparsities, of every method: every block has its own, the model its target; stopped, they go on with sparsities that
 * are found anew, by other threads, and end with the same bytes. */
static void test_outlier_runs(void)
{
    for (int method = 0; method < 4; method++) {
        double shares[5], targets[2][5];
        char first[256];
        setup s = interrupted_setup(temp_path("whole"), -1);
        s.options.method = (besa_method)method, s.options.rates.target = 0.6;
        if (method == 3) s.options.first_block = 1, s.options.num_blocks = 3;
        int64_t count = method == 3 ? 3 : 5;
        for (int i = 0; i < 2; i++) {
            s.threads = 1 + 2 * i;
            g_progress.last = 0;
            CHECK_OK(outliers_of(&s, 0, shares), s.error);
            CHECK_OK(besa_outlier_targets(targets[i], shares, count, s.options.rates.target, 0, &s.error), s.error);
            s.output = temp_path(i ? "out" : "whole");
            s.options.block_targets = targets[i], s.options.num_block_targets = count;
            if (i) {
                g_progress.stop_at = -2, g_progress.last = 0;
                CHECK(run(&s) == BESA_ERROR_CANCELLED && !exists(s.output), "%s", s.error.message);
                besa_report_free(&s.report);
            }
            g_progress.stop_at = -1, g_progress.last = 0;
            run_and_verify(&s);
        }
        CHECK(targets[0][0] != targets[0][1] && !memcmp(targets[0], targets[1], (size_t)count * sizeof **targets), "other targets");
        CHECK(compare_directories(temp_path("whole"), s.output, NULL, first) == 0, "method %d: %s differs", method, first);
        discard(s.output);
        discard(temp_path("whole"));
    }
}

/* ---------------------------------------------------------------------------------------------- */

static int child(char **argv)
{
    besa_error error;
    setup s = child_setup(argv[0], argv[1]);
    int64_t call = strtoll(argv[3], NULL, 10);
    s.options.user = &call;
    int failed = besa_tokens_load(&g_calibration, argv[2], &error) != BESA_OK || run(&s) != BESA_OK;
    besa_report_free(&s.report);
    besa_tokens_free(&g_calibration);
    return failed;
}

int main(int argc, char **argv)
{
    char path[600];
    besa_error error;
    if (argc == 6 && !strcmp(argv[1], "--child")) return child(argv + 2);
    if (argc < 3) return fprintf(stderr, "usage: %s STORIES260K REFERENCE [part of a test's name]\n", argv[0]), 2;
    g_stories = argv[1];
    g_reference = argv[2];
    test.only = argc > 3 ? argv[3] : NULL;
    temp_create();
    snprintf(g_tokens, sizeof g_tokens, "%s/calibration_tokens.npy", g_stories);
    if (besa_tokens_load(&g_calibration, g_tokens, &error) != BESA_OK) return printf("FAIL %s\n", error.message), 1;
    snprintf(path, sizeof path, "%s/test_tokens.npy", g_stories);
    if (besa_tokens_load(&g_test, path, &error) != BESA_OK) return printf("FAIL %s\n", error.message), 1;
    TEST("dense perplexity") test_dense_perplexity();
    TEST("methods and targets") test_methods();
    TEST("trace of learning steps") test_trace();
    TEST("weights that are not finite") test_not_finite();
    TEST("sparsity over depth") test_depth();
    TEST("blocks behind the last pruned one") test_blocks_behind();
    TEST("masks that are kept") test_keep();
    TEST("outliers: runs by their sparsities") test_outlier_runs();
    if (TEST_SANITIZED) g_stories = fixture_first_blocks(temp_path("three"), g_stories, 3); /* enough for what follows */
    TEST("fixed layers that rows cannot have") test_fixed_notes();
    TEST("source zeros") test_source_zeros();
    TEST("plan") test_plan();
    if (access("/proc/self/exe", X_OK)) test_skip("kill and resume", "no /proc, by which this program starts itself");
    else TEST("kill and resume") test_kill();
    if (TEST_SANITIZED) g_stories = fixture_first_blocks(temp_path("two"), g_stories, 2);
    TEST("odd targets") test_odd_targets();
    TEST("N:M patterns") test_patterns();
    TEST("BESA's options") test_besa_options();
    TEST("parts of the block") test_granularity();
    TEST("fixed layers") test_fixed_layers();
    TEST("patterns of fixed layers") test_fixed_patterns();
    TEST("presets") test_presets();
    TEST("fields of presets") test_preset_fields();
    TEST("reference checkpoints pruned") test_reference_checkpoints();
    TEST("report, small files, links") test_report_and_files();
    TEST("besa.json and cards") test_record();
    TEST("names of models") test_model_names();
    TEST("report of a perplexity") test_measured();
    TEST("files of masks and rates") test_mask_files();
    TEST("SHA-256") test_sha256();
    TEST("strings and numbers of the report") test_report_strings();
    TEST("windows of some layers") test_some_windows();
    TEST("f16 and bf16") test_element_types();
    TEST("dead input column") test_dead_column();
    TEST("copied tensors and logits that are not finite") test_copied_not_finite();
    TEST("a walk") test_walk();
    TEST("ranges of options") test_option_ranges();
    TEST("defaults of options") test_option_defaults();
    TEST("few learning steps") test_few_steps();
    TEST("bad options") test_bad_options();
    TEST("a fixed rate that names nothing") test_fixed_nothing();
    TEST("bad tokens") test_bad_tokens();
    TEST("output place") test_output_place();
    TEST("full disk") test_full_disk();
    TEST("weights that learn") test_learned_weights();
    TEST("N:M patterns of weights that learn") test_learned_patterns();
    TEST("kept weights fitted anew") test_refits();
    TEST("norms and biases that learn") test_learned_vectors();
    TEST("quantised weights") test_bits();
    TEST("threads") test_threads();
    TEST("shards, and no report") test_shards();
    TEST("weight gradients in pieces") test_gradient_pieces();
    TEST("slots of a stream") test_stream_slots();
    TEST("memory budget") test_budget();
    TEST("memory that is free") test_free_memory();
    TEST("seconds of a run") test_seconds(1);
    TEST("seconds of a run beside copies") test_seconds(0);
    TEST("memory of the device's own") test_separate_memory();
    TEST("allocation failures of the layer and block API") test_api_allocation_failures();
    TEST("nothing lost by a refusal") test_refusals_leak();
    TEST("allocation failures") test_allocation_failures();
    TEST("cancel and resume") test_cancel();
    TEST("cancel and resume, every kind of run") test_cancel_kinds();
    TEST("resume refused") test_resume_refused();
    TEST("resume and every option") test_resume_options();
    TEST("resume and the source") test_resume_source();
    TEST("resume and allocation failures") test_resume_allocations();
    TEST("source replaced during the run") test_source_replaced();
    TEST("damaged partial output") test_damaged_partial();
    TEST("damaged codes") test_damaged_codes();
    TEST("complete output without its name") test_complete();
    TEST("learned rates that are kept") test_keep_rates();
    TEST("FLOP of a resumed run") test_resumed_flop();
    TEST("one model against another") test_against();
    TEST("one model against another, and allocation failures") test_against_allocations();
    TEST("a run against its dense model") test_against_run();
    TEST("means, errors and percentiles") test_summarize();
    TEST("outliers of the blocks") test_outliers();
    TEST("outliers: sparsities from shares") test_outlier_targets();
    TEST("outliers: what goes wrong") test_outlier_errors();
    besa_tokens_free(&g_calibration);
    besa_tokens_free(&g_test);
    return test_finish();
}
