/* test_forms - checkpoints in the forms that people have, and what is refused with a remedy.
 *
 *     test_forms CASES_DIRECTORY [part of a test's name]
 *
 * A case is a folder with model/, tokens.npy and expected.json, the mean negative log-likelihoods of its windows by
 * transformers 5.24 in float32. */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "test.h"
#include "fixture.h"

static const char *g_cases;
static besa_backend g_be;
static besa_error g_error;

enum { TOKENS = 256 };                          /* of every case */

/* The path of a case's file. */
static const char *in_case(const char *name, const char *file)
{
    char *path = (char *)take(600);
    snprintf(path, 600, "%s/%s%s%s", g_cases, name, *file ? "/" : "", file);
    return path;
}

/* The tokens of a case, as they are in the file. */
static void read_tokens(const char *name, int32_t ids[TOKENS])
{
    besa_tokens tokens;
    CHECK_OK(besa_tokens_load(&tokens, in_case(name, "tokens.npy"), &g_error), g_error);
    CHECK_OK(besa_tokens_sample(&tokens, 1, TOKENS, 0, INT32_MAX, ids, &g_error), g_error);
    besa_tokens_free(&tokens);
}

static besa_checkpoint *open_model(const char *directory)
{
    besa_checkpoint *checkpoint = NULL;
    CHECK_OK(besa_checkpoint_open(&checkpoint, directory, &g_error), g_error);
    return checkpoint;
}

/* ---- forms that load --------------------------------------------------------------------------- */

/* A directory's windows have the log-likelihoods that transformers says. */
static void check_nll(const char *directory, const int32_t *ids, int64_t seqlen, const double *want)
{
    double ppl, nll[TOKENS / 2];
    besa_checkpoint *checkpoint = open_model(directory);
    if (!checkpoint) return;
    CHECK_OK(besa_perplexity(checkpoint, &g_be, ids, TOKENS / seqlen, seqlen, &ppl, nll, NULL, NULL, &g_error), g_error);
    for (int64_t i = 0; i < TOKENS / seqlen; i++)
        CHECK(fabs(nll[i] - want[i]) < 2e-6, "window %d of %d: nll %.9g, expected %.9g", (int)i, (int)seqlen, nll[i], want[i]);
    besa_checkpoint_close(checkpoint);
}

/* Pruned in windows of 64 and measured on the way in those of seqlen, it is what its output is when that is loaded, and has
 * the source's tensors by the same names. */
static void check_output(const char *directory, const int32_t *ids, int64_t seqlen)
{
    const char *output = temp_path("out");
    double ppl;
    besa_calibration data;
    besa_prune_options options;
    besa_plan_result plan;
    besa_report report;
    besa_checkpoint *source = open_model(directory), *pruned;
    if (!source) return;
    memset(&data, 0, sizeof data);
    memset(&options, 0, sizeof options);
    data.ids = data.test_ids = ids, data.nsamples = TOKENS / 64, data.seqlen = 64;
    data.test_windows = TOKENS / seqlen, data.test_seqlen = seqlen;
    options.method = BESA_METHOD_WANDA, options.rates.target = 0.5;
    remove_tree(output);
    CHECK_OK(besa_plan(source, &g_be, &data, &options, &plan, &g_error), g_error);
    CHECK_OK(besa_prune(source, output, &g_be, &data, &options, &report, &g_error), g_error);
    if ((pruned = open_model(output)) != NULL) {
        CHECK_OK(besa_perplexity(pruned, &g_be, ids, TOKENS / seqlen, seqlen, &ppl, NULL, NULL, NULL, &g_error), g_error);
        CHECK(fabs(ppl / report.perplexity - 1) < 1e-6, "pruned it has %.9g, and loaded %.9g", report.perplexity, ppl);
        CHECK(besa_checkpoint_tensor_count(pruned) == besa_checkpoint_tensor_count(source), "%d tensors",
              (int)besa_checkpoint_tensor_count(pruned));
        for (int64_t i = 0; i < besa_checkpoint_tensor_count(pruned); i++)
            CHECK(!strcmp(besa_checkpoint_tensor(pruned, i)->name, besa_checkpoint_tensor(source, i)->name), "tensor %d is %s", (int)i,
                  besa_checkpoint_tensor(pruned, i)->name);
    }
    besa_report_free(&report);
    besa_checkpoint_close(pruned);
    besa_checkpoint_close(source);
}

/* A case: key is that of its answers for windows of seqlen. */
static void test_case(const char *name, int64_t seqlen, const char *key)
{
    double want[TOKENS / 2];
    int32_t ids[TOKENS];
    read_tokens(name, ids);
    json_numbers(in_case(name, ""), "expected.json", key, want, (int)(TOKENS / seqlen));
    check_nll(in_case(name, "model"), ids, seqlen, want);
    check_output(in_case(name, "model"), ids, seqlen);
}

/* A directory with the weights of rope_dynamic and a config.json with these members. */
static const char *make_config(const char *members)
{
    static const char base[] = "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":16,"
                               "\"intermediate_size\":40,\"num_hidden_layers\":2,\"rms_norm_eps\":1e-6,\"vocab_size\":128";
    static const char heads[] = "\"head_dim\":8,\"num_attention_heads\":2,\"num_key_value_heads\":1,";
    char text[2048];
    size_t n;
    unsigned char *weights = read_bytes(in_case("rope_dynamic", "model/model.safetensors"), &n);
    remove_tree(temp_path("config"));
    mkdir(temp_path("config"), 0777);
    snprintf(text, sizeof text, "%s,%s%s}", base, strstr(members, "head_dim") ? "" : heads, members);
    write_bytes(temp_path("config/config.json"), text, strlen(text));
    write_bytes(temp_path("config/model.safetensors"), weights, n);
    free(weights);
    return temp_path("config");
}

/* Configs of both generations, and what ropes may have. */
static void test_ropes(void)
{
    static const struct { const char *members; double nll[4]; } t[] = {
        { "\"rope_theta\":500000.0,\"torch_dtype\":\"bfloat16\",\"max_position_embeddings\":64",
          { 5.44361543, 5.60821385, 5.45624445, 5.78677326 } },
        { "\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":500000.0},\"dtype\":\"bfloat16\","
          "\"max_position_embeddings\":64",
          { 5.44361543, 5.60821385, 5.45624445, 5.78677326 } },
        { "\"rope_theta\":10000.0,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4.0,"
          "\"original_max_position_embeddings\":16},\"max_position_embeddings\":64",
          { 5.47639562, 5.56222520, 5.38412985, 5.69638581 } },
        { "\"rope_parameters\":{\"rope_type\":\"yarn\",\"rope_theta\":10000.0,\"factor\":8.0,"
          "\"original_max_position_embeddings\":16,\"beta_fast\":4,\"beta_slow\":0.5,\"truncate\":false},"
          "\"max_position_embeddings\":128",
          { 5.43586611, 5.49343956, 5.38695713, 5.66904042 } },
        { "\"rope_theta\":1000000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":8.0,\"beta_fast\":3.0,"
          "\"beta_slow\":null,\"mscale\":0.7,\"mscale_all_dim\":1.1},\"max_position_embeddings\":32",
          { 5.44189656, 5.58789021, 5.42358235, 5.76267605 } },
        { "\"rope_parameters\":{\"rope_type\":\"yarn\",\"rope_theta\":10000.0,\"factor\":2.0,"
          "\"attention_factor\":1.3,\"original_max_position_embeddings\":32},\"max_position_embeddings\":64",
          { 5.34218409, 5.59083158, 5.45647682, 5.74028839 } },
        { "\"rope_parameters\":{\"rope_type\":\"yarn\",\"rope_theta\":10000.0,\"factor\":null,"
          "\"original_max_position_embeddings\":16},\"max_position_embeddings\":64",
          { 5.47639562, 5.56222520, 5.38412985, 5.69638581 } },
        { "\"rope_theta\":100.0,\"original_max_position_embeddings\":200,\"rope_scaling\":{\"rope_type\":\"yarn\","
          "\"factor\":4.0,\"beta_fast\":8,\"mscale\":1.0,\"mscale_all_dim\":0,\"truncate\":null,"
          "\"original_max_position_embeddings\":32},\"max_position_embeddings\":32",
          { 5.44167028, 5.61196596, 5.56480896, 5.69615462 } },
        { "\"rope_parameters\":{\"rope_type\":\"dynamic\",\"rope_theta\":500000.0,\"factor\":4.0},"
          "\"max_position_embeddings\":48",
          { 5.48463025, 5.63218742, 5.41839296, 5.75851267 } },
        { "\"rope_theta\":10000.0,\"rope_scaling\":{\"type\":\"dynamic\",\"factor\":1.0},"
          "\"max_position_embeddings\":16",
          { 5.39682079, 5.56382202, 5.56866377, 5.80066849 } },
        { "\"rope_theta\":10000.0,\"head_dim\":4,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
          "\"rope_scaling\":{\"type\":\"dynamic\",\"factor\":8.0},\"max_position_embeddings\":20",
          { 5.30472448, 6.25391874, 5.56355238, 6.10587539 } },
        { "\"rope_theta\":10000.0,\"head_dim\":4,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
          "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":8.0,\"beta_fast\":1.5},\"max_position_embeddings\":20",
          { 5.23544846, 6.23056126, 5.39810409, 6.11445320 } },
        { "\"rope_theta\":10000.0,\"original_max_position_embeddings\":32,"
          "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
          "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":64},\"max_position_embeddings\":64",
          { 5.45623216, 5.61210531, 5.39896216, 5.72446358 } },
    };
    int32_t ids[TOKENS];
    read_tokens("rope_dynamic", ids);
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        int before = test.checks_failed;
        check_nll(make_config(t[i].members), ids, 64, t[i].nll);
        if (test.checks_failed > before) printf("    with %s\n", t[i].members);
    }
}

int main(int argc, char **argv)
{
    static const char *const cases[] = { "no_model_prefix", "rope_dynamic", "rope_yarn", "index_stale_entry", "sparse_dense_format",
                                         "tied_only_head" };
    if (argc < 2) return fprintf(stderr, "usage: %s CASES_DIRECTORY [part of a test's name]\n", argv[0]), 2;
    g_cases = argv[1];
    test.only = argc > 2 ? argv[2] : NULL;
    if (besa_cpu_backend(&g_be, NULL, &g_error) != BESA_OK) return fprintf(stderr, "%s\n", g_error.message), 1;
    temp_create();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) TEST(cases[i]) test_case(cases[i], 64, "transformers_nll");
    TEST("rope_dynamic_long") {
        test_case("rope_dynamic_long", 64, "transformers_nll");
        test_case("rope_dynamic_long", 48, "transformers_nll_48");
        test_case("rope_dynamic_long", 32, "transformers_nll_32");
    }
    TEST("ropes and generations of config.json") test_ropes();
    g_be.destroy(&g_be);
    return test_finish();
}
