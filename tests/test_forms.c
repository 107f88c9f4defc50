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

static besa_result open_close(const char *directory)
{
    besa_checkpoint *checkpoint;
    besa_result result = besa_checkpoint_open(&checkpoint, directory, &g_error);
    besa_checkpoint_close(checkpoint);
    return result;
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

/* Without a head an untied model can be pruned, where its other names have no prefix, but not be measured. */
static void test_headless(void)
{
    static const char config[] = "{\"model_type\":\"llama\",\"hidden_size\":16,\"intermediate_size\":24,\"num_hidden_layers\":2,"
                                 "\"num_attention_heads\":2,\"vocab_size\":128}";
    int32_t ids[TOKENS];
    double ppl;
    size_t n;
    besa_calibration data;
    besa_prune_options options;
    fixture f;
    memset(&data, 0, sizeof data);
    memset(&options, 0, sizeof options);
    fixture_random_llama(temp_path("headed"), 2, 16, 24, 2, 2, 128, BESA_F32);
    besa_checkpoint *headed = open_model(temp_path("headed"));
    fixture_begin(&f, temp_path("headless"), config);
    for (int64_t i = 0; i < besa_checkpoint_tensor_count(headed); i++) {
        const besa_tensor *t = besa_checkpoint_tensor(headed, i);
        float *v = take_floats((int64_t)(t->bytes / 4));
        memcpy(v, t->data, t->bytes);
        fixture_tensor(&f, t->name + strlen("model."), BESA_F32, v, t->shape[0], t->ndim > 1 ? t->shape[1] : 0);
    }
    fixture_end(&f);
    besa_checkpoint_close(headed);
    read_tokens("rope_dynamic", ids);
    data.ids = ids, data.nsamples = 4, data.seqlen = 64;
    options.method = BESA_METHOD_WANDA, options.rates.target = 0.5;
    besa_checkpoint *headless = open_model(temp_path("headless"));
    if (!headless) return;
    CHECK_OK(besa_prune(headless, temp_path("headless.out"), &g_be, &data, &options, NULL, &g_error), g_error);
    besa_checkpoint *pruned = open_model(temp_path("headless.out"));
    besa_checkpoint_close(pruned);
    for (int i = 0; i < 2; i++) {
        data.test_ids = ids, data.test_windows = 4, data.test_seqlen = 64;
        besa_result result = i ? besa_prune(headless, NULL, &g_be, &data, &options, NULL, &g_error)
                               : besa_perplexity(headless, &g_be, ids, 4, 64, &ppl, NULL, NULL, NULL, &g_error);
        CHECK(result == BESA_ERROR_TENSOR && strstr(g_error.message, "there is no lm_head.weight"), "%s: %s", besa_result_string(result),
              result ? g_error.message : "");
    }
    besa_checkpoint_close(headless);
    char *untied = (char *)read_bytes(temp_path("headed/config.json"), &n), *at = strstr(untied, "true");
    memcpy(at, "null", 4);
    write_bytes(temp_path("headed/config.json"), untied, n);
    free(untied);
    CHECK(besa_checkpoint_open(&headless, temp_path("headed"), &g_error) == BESA_ERROR_TENSOR, "with the prefix a head is needed");
}

/* Tensors beside a layer's weight that nothing applies are noted; of other modules they are not. */
static void test_companions(void)
{
    static const char *const names[] = { "model.layers.0.mlp.up_proj.weight_scale", "model.layers.1.self_attn.q_proj.weight_scale_inv",
                                         "model.layers.0.mlp.down_proj.lora_A.weight", "model.layers.1.mlp.down_proj.lora_B.default.weight",
                                         "vision.layers.0.mlp.up_proj.weight_scale", "model.layers.1.mlp.scale" };
    static const float one[1] = { 1 };
    char config[2048];
    size_t n;
    fixture_random_llama(temp_path("alone"), 2, 16, 24, 2, 2, 128, BESA_F32);
    unsigned char *text = read_bytes(temp_path("alone/config.json"), &n);
    snprintf(config, sizeof config, "%.*s", (int)n, (const char *)text);
    free(text);
    besa_checkpoint *alone = open_model(temp_path("alone"));
    for (int i = 0; i < 6; i++) {
        fixture f;
        fixture_begin(&f, temp_path("beside"), config);
        for (int64_t k = 0; k < besa_checkpoint_tensor_count(alone); k++) {
            const besa_tensor *t = besa_checkpoint_tensor(alone, k);
            float *v = take_floats((int64_t)(t->bytes / 4));
            memcpy(v, t->data, t->bytes);
            fixture_tensor(&f, t->name, BESA_F32, v, t->shape[0], t->ndim > 1 ? t->shape[1] : 0);
        }
        fixture_tensor(&f, names[i], BESA_F32, one, 1, 0);
        fixture_end(&f);
        besa_checkpoint *beside = open_model(temp_path("beside"));
        if (!beside) continue;
        const char *notes = besa_checkpoint_notes(beside);
        CHECK(i < 4 ? strstr(notes, names[i]) && strstr(notes, "not applied") : !*notes, "%s: notes: %s", names[i], notes);
        besa_checkpoint_close(beside);
        remove_tree(temp_path("beside"));
    }
    besa_checkpoint_close(alone);
}

/* A file of one of the cases, under another name. */
static void copy_of_case(const char *name, const char *file, const char *to)
{
    size_t n;
    unsigned char *bytes = read_bytes(in_case(name, file), &n);
    write_bytes(to, bytes, n);
    free(bytes);
}

/* Of a sharded model whose layers are rows of tensors, a missing tensor is named, and none that is there. */
static void test_fused_index(void)
{
    static const char missing[] = "model.layers.1.input_layernorm.weight";
    size_t n;
    mkdir(temp_path("fused"), 0777);
    copy_of_case("families/phi3", "config.json", temp_path("fused/config.json"));
    unsigned char *file = read_bytes(in_case("families/phi3", "model.safetensors"), &n);
    char *index = (char *)take(65536);
    size_t at = (size_t)snprintf(index, 65536, "{\"weight_map\":{");
    for (int64_t b = 0; b < 4; b++)
        at += (size_t)snprintf(index + at, 65536 - at, "%s\"model.layers.%d.self_attn.qkv_proj.weight\":\"model-1.safetensors\"",
                               b ? "," : "", (int)b);
    snprintf(index + at, 65536 - at, ",\"%s\":\"model-1.safetensors\"}}", missing);
    write_bytes(temp_path("fused/model.safetensors.index.json"), index, strlen(index));
    write_bytes(temp_path("fused/model-1.safetensors"), file, n);
    CHECK_OK(open_close(temp_path("fused")), g_error);
    for (at = 8; memcmp(file + at, missing, strlen(missing)); ) at++;
    file[at + strlen("model.layers.1.")] = 'I';
    write_bytes(temp_path("fused/model-1.safetensors"), file, n);
    CHECK(open_close(temp_path("fused")) == BESA_ERROR_TENSOR && strstr(g_error.message, missing), "%s", g_error.message);
    CHECK(!strstr(g_error.message, "qkv_proj"), "%s", g_error.message);
    free(file);
}

/* Where config.json and its text_config contradict each other, a note says what holds; then the file's head is another. */
static void test_contradiction(void)
{
    static const char key[] = "\"tie_word_embeddings\": false";
    size_t n;
    mkdir(temp_path("part"), 0777);
    copy_of_case("families/qwen2_5_vl", "model.safetensors", temp_path("part/model.safetensors"));
    unsigned char *file = read_bytes(in_case("families/qwen2_5_vl", "config.json"), &n);
    for (size_t at = 0; at + strlen(key) < n; at++) {
        if (memcmp(file + at, key, strlen(key))) continue;
        memcpy(file + at + strlen(key) - 5, "true ", 5);
        break;                                  /* text_config's, the first */
    }
    write_bytes(temp_path("part/config.json"), file, n);
    free(file);
    besa_checkpoint *part = open_model(temp_path("part"));
    if (!part) return;
    const char *notes = besa_checkpoint_notes(part);
    CHECK(strstr(notes, "contradict each other in tie_word_embeddings: true") && strstr(notes, "lm_head.weight differs"), "%s", notes);
    besa_checkpoint_close(part);
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
          "\"factor\":4.0,\"beta_fast\":8,\"mscale\":2.0,\"mscale_all_dim\":0,\"truncate\":null,"
          "\"original_max_position_embeddings\":32},\"max_position_embeddings\":32",
          { 5.44167028, 5.61196596, 5.56480896, 5.69615462 } },
        { "\"rope_parameters\":{\"rope_type\":\"dynamic\",\"rope_theta\":500000.0,\"factor\":4.0},"
          "\"max_position_embeddings\":80", /* not longer than that: as the first two */
          { 5.44361543, 5.60821385, 5.45624445, 5.78677326 } },
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

/* ---- what is refused, and the remedy ----------------------------------------------------------- */

/* A directory to be opened: config.json with `members` beside the small model's (NULL: none), its weights if `weights`, and
 * two more files. */
typedef struct refusal {
    const char *members;
    int weights;
    const char *file[2][2];                     /* name, text */
    const char *path;                           /* what is opened, in the directory */
    besa_result code;
    const char *words;                          /* that the message has; %s: the directory */
    const char *remedy;                         /* its end; %s likewise */
} refusal;

#define QUANTIZED(members) "\"quantization_config\":{" members "}", 1, { { NULL, NULL }, { NULL, NULL } }, "", BESA_ERROR_UNSUPPORTED
#define OTHERS(name_1, text_1, name_2, text_2) { { name_1, text_1 }, { name_2, text_2 } }
#define CONVERT ", python3 examples/convert.py %s NEW"
#define DEQUANTISE ": weights that are quantised or compressed are not supported: dequantise first" CONVERT

static const refusal refusals[] = {
    { "", 0, OTHERS("pytorch_model.bin", "PK", NULL, NULL), "", BESA_ERROR_UNSUPPORTED,
      "%s: its weights are in pytorch_model.bin, not in safetensors", ": convert them" CONVERT },
    { "", 0, OTHERS("pytorch_model-00002-of-00002.bin", "PK", "pytorch_model-00001-of-00002.bin", "PK"), "", BESA_ERROR_UNSUPPORTED,
      "%s: its weights are in pytorch_model-00001-of-00002.bin", ": convert them" CONVERT },
    { "", 0, OTHERS("weights.pdf", "", NULL, NULL), "", BESA_ERROR_NOT_FOUND,
      "%s: neither model.safetensors nor model.safetensors.index.json in it", ": download them, hf download NAME --local-dir %s" },
    { NULL, 0, OTHERS("m-Q4_K.gguf", "GGUF", "README.md", ""), "", BESA_ERROR_UNSUPPORTED,
      "%s: its weights are in a GGUF file", ": convert it, python3 examples/convert.py %s/m-Q4_K.gguf NEW" },
    { NULL, 0, OTHERS("m.bin", "GGUF\3", NULL, NULL), "/m.bin", BESA_ERROR_NOT_FOUND,
      "%s/m.bin: a GGUF file, not a directory", ": convert it, python3 examples/convert.py %s/m.bin NEW" },
    { "", 1, OTHERS(NULL, NULL, NULL, NULL), "/model.safetensors", BESA_ERROR_NOT_FOUND,
      "%s/model.safetensors: not a directory", ": name the one that it lies in, with config.json" },
    { NULL, 0, OTHERS("adapter_model.safetensors", "", "adapter_config.json", "{}"), "", BESA_ERROR_UNSUPPORTED,
      "%s: an adapter (adapter_model.safetensors) without its model", ": merge it into the model, peft's merge_and_unload()" },
    { NULL, 0, OTHERS(NULL, NULL, NULL, NULL), "", BESA_ERROR_NOT_FOUND, "%s/config.json", ": No such file or directory" },
    { "", 0, OTHERS("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 21216\n", NULL, NULL), "",
      BESA_ERROR_FORMAT, "%s/model.safetensors: a git-lfs pointer instead of the weights", ": fetch them, git -C %s lfs pull" },
    { NULL, 0, OTHERS("snapshots/0a1b/config.json", "{}", "snapshots/9f/config.json", "{}"), "", BESA_ERROR_NOT_FOUND,
      "%s: a folder of the Hub's cache", ": name its snapshot, %s/snapshots/0a1b" },
    { NULL, 0, OTHERS("snapshots/0a1b/config.json", "{}", "refs/main", "9f8e\n"), "", BESA_ERROR_NOT_FOUND,
      "%s: a folder of the Hub's cache", ": name its snapshot, %s/snapshots/9f8e" },
    { QUANTIZED("\"quant_method\":\"gptq\",\"bits\":4"), "%s/config.json: quantization_config has quant_method = \"gptq\", bits = 4",
      DEQUANTISE },
    { QUANTIZED("\"quant_method\":\"awq\",\"version\":\"gemm\""), "quantization_config has quant_method = \"awq\"", DEQUANTISE },
    { QUANTIZED("\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true"), "quant_method = \"bitsandbytes\", load_in_4bit = true",
      DEQUANTISE },
    { QUANTIZED("\"quant_method\":\"fp8\",\"fmt\":\"e4m3\",\"weight_block_size\":[128,128]"), "quant_method = \"fp8\"", DEQUANTISE },
    { QUANTIZED("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":{}}"),
      "quant_method = \"compressed-tensors\", format = \"pack-quantized\"", DEQUANTISE },
    { QUANTIZED("\"quant_method\":\"compressed-tensors\",\"format\":\"dense\",\"config_groups\":{\"group_0\":{}}"),
      "format = \"dense\"", DEQUANTISE },
    { QUANTIZED("\"quant_method\":\"compressed-tensors\",\"format\":\"dense\",\"kv_cache_scheme\":{\"num_bits\":8}"),
      "format = \"dense\"", DEQUANTISE },
    { QUANTIZED("\"quant_method\":\"fp8\",\"format\":\"dense\""), "quant_method = \"fp8\"", DEQUANTISE },
    { QUANTIZED("\"quant_method\":\"compressed-tensors\",\"sparsity_config\":{\"format\":\"sparse-24-bitmask\"}"),
      "quant_method = \"compressed-tensors\"", DEQUANTISE },
    { QUANTIZED("\"quant_method\":\"compressed-tensors\",\"format\":\"dense\",\"sparsity_config\":{\"format\":\"sparse-bitmask\"}"),
      "format = \"dense\"", DEQUANTISE },
    { "\"compression_config\":{\"quant_method\":\"compressed-tensors\"}", 1, OTHERS(NULL, NULL, NULL, NULL), "", BESA_ERROR_UNSUPPORTED,
      "compression_config has quant_method", DEQUANTISE },
    { "\"quantization_config\":{}", 1, OTHERS(NULL, NULL, NULL, NULL), "", BESA_ERROR_UNSUPPORTED, "quantization_config", DEQUANTISE },
    { "\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"dense\",\"config_groups\":{},\"kv_cache_scheme\":null,"
      "\"sparsity_config\":{\"format\":\"dense\",\"sparsity_structure\":\"2:4\"}}", 1, OTHERS(NULL, NULL, NULL, NULL), "", BESA_OK, "", "" },
    { "\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"dense\"}", 1, OTHERS(NULL, NULL, NULL, NULL), "",
      BESA_OK, "", "" },
};

/* Make its directory. */
static const char *make_refused(const refusal *t)
{
    const char *directory = temp_path("refused");
    char rope[1024];
    snprintf(rope, sizeof rope, "\"rope_theta\":10000.0%s%s", t->members && *t->members ? "," : "", t->members ? t->members : "");
    remove_tree(directory);
    if (rename(make_config(rope), directory)) exit(1);
    if (!t->weights) unlink(temp_path("refused/model.safetensors"));
    if (!t->members) unlink(temp_path("refused/config.json"));
    for (int i = 0; i < 2 && t->file[i][0]; i++) {
        const char *path = temp_path("refused/%s", t->file[i][0]);
        for (char *slash = (char *)strchr(path + strlen(directory) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
            *slash = 0;
            mkdir(path, 0777);
            *slash = '/';
        }
        write_bytes(path, t->file[i][1], strlen(t->file[i][1]));
    }
    return directory;
}

/* text with the directory for each %s of it. */
static const char *with_directory(const char *text, const char *directory)
{
    char *out = (char *)take(2048);
    size_t n = 0;
    for (; *text; text++) {
        if (strncmp(text, "%s", 2)) { out[n++] = *text; continue; }
        n += (size_t)snprintf(out + n, 2048 - n, "%s", directory);
        text++;
    }
    return out;
}

/* One line, with the words, the remedy last. */
static void check_message(const char *what, besa_result got, besa_result code, const char *words, const char *remedy)
{
    const char *message = got == BESA_OK ? "" : g_error.message;
    size_t n = strlen(message), m = strlen(remedy);
    CHECK(got == code, "%s: %s (%s), expected %s", what, besa_result_string(got), message, besa_result_string(code));
    CHECK(strstr(message, words) && !strchr(message, '\n'), "%s: \"%s\" does not say \"%s\"", what, message, words);
    CHECK(n >= m && !strcmp(message + n - m, remedy), "%s: \"%s\" does not end in \"%s\"", what, message, remedy);
}

static void test_refusals(void)
{
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        const refusal *t = &refusals[i];
        const char *directory = make_refused(t), *words = with_directory(t->words, directory);
        check_message(words, open_close(with_directory("%s", temp_path("refused%s", t->path))), t->code, words,
                      with_directory(t->remedy, directory));
    }
    check_message("a name of the Hub", open_close("HuggingFaceTB/SmolLM2-135M"), BESA_ERROR_NOT_FOUND, "HuggingFaceTB/SmolLM2-135M: no such "
                  "directory", " hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M");
    for (int i = 0; i < 5; i++) {
        static const char *const paths[] = { "nowhere", "./no/where", "/nowhere", "nowhere/no/where", "no/where/" };
        CHECK(open_close(paths[i]) == BESA_ERROR_NOT_FOUND && (strstr(g_error.message, "hf download") != NULL) == (i == 4), "%s: %s",
              paths[i], g_error.message);
    }
}

/* The weights' file changed: a name in its header, or bytes of its data; n bytes after the first of `find` in it. */
static const char *make_changed(const char *find, const char *with)
{
    const char *directory = make_config("\"rope_theta\":10000.0"), *path = temp_path("config/model.safetensors");
    size_t n, m = strlen(find), more = strlen(with) - m;
    unsigned char *file = read_bytes(path, &n), *changed = (unsigned char *)calloc(1, n + more);
    size_t at = 8;
    while (at < n && memcmp(file + at, find, m)) at++;
    memcpy(changed, file, at);
    memcpy(changed + at, with, m + more);
    memcpy(changed + at + m + more, file + at + m, n - at - m);
    for (size_t carry = more, i = 0; carry && i < 8; i++) { /* the header's length */
        carry += changed[i];
        changed[i] = (unsigned char)carry;
        carry >>= 8;
    }
    write_bytes(path, changed, n + more);
    free(file);
    free(changed);
    return directory;
}

static void test_refused_weights(void)
{
    static const struct { const char *name; size_t element; } nan[] = {
        { "model.layers.1.mlp.up_proj.weight", 17 }, { "model.layers.0.self_attn.o_proj.weight", 0 }, { "lm_head.weight", 2047 },
        { "model.embed_tokens.weight", 0 }, { "model.layers.1.input_layernorm.weight", 3 }, { "model.norm.weight", 15 } };
    const char *directory = make_changed("k_proj.weight", "k_proj.qweight");
    int32_t ids[TOKENS];
    besa_tokens tokens;
    double ppl;
    check_message("qweight", open_close(directory), BESA_ERROR_UNSUPPORTED, "its layers are quantised (model.layers.0.self_attn.k_proj.qweight)",
                  with_directory(": dequantise first" CONVERT, directory));
    read_tokens("rope_dynamic", ids);
    for (int i = 0; i < 6; i++) {
        char words[128];
        besa_checkpoint *checkpoint = open_model(make_config("\"rope_theta\":10000.0"));
        if (!checkpoint) continue;
        const besa_tensor *t = besa_checkpoint_find(checkpoint, nan[i].name);
        size_t n, at = (i == 3 ? (size_t)ids[0] * 16 : nan[i].element) * 2;
        unsigned char *file = read_bytes(temp_path("config/model.safetensors"), &n);
        file[t->offset + at] = 0xC0, file[t->offset + at + 1] = 0x7F;
        snprintf(words, sizeof words, "%s: element %d is nan", nan[i].name, (int)(at / 2));
        besa_checkpoint_close(checkpoint);
        write_bytes(temp_path("config/model.safetensors"), file, n);
        free(file);
        if ((checkpoint = open_model(temp_path("config"))) == NULL) continue;
        check_message("NaN", besa_perplexity(checkpoint, &g_be, ids, 4, 64, &ppl, NULL, NULL, NULL, &g_error), BESA_ERROR_NOT_FINITE, words,
                      ": the file is damaged, download it again");
        besa_checkpoint_close(checkpoint);
    }
    CHECK_OK(besa_tokens_load(&tokens, in_case("rope_dynamic", "tokens.npy"), &g_error), g_error);
    check_message("of another tokenizer", besa_tokens_sample(&tokens, 1, 64, 0, 20, ids, &g_error), BESA_ERROR_TOKEN, "tokens.npy: token ",
                  ", the vocabulary has 20: the file was made with another tokenizer, make it again with the model's own");
    check_message("too few", besa_tokens_sample(&tokens, 9, 64, 0, 128, ids, &g_error), BESA_ERROR_TOKENS, "tokens.npy: 9 sequences of 64",
                  tokens.rows ? ": these are the most" : ": the most is nsamples 4");
    besa_tokens_free(&tokens);
    write_bytes(temp_path("text.txt"), "Once upon a time", 16);
    write_bytes(temp_path("lfs.npy"), "version https://git-lfs.github.com/spec/v1\n", 43);
    check_message("a text", besa_tokens_load(&tokens, temp_path("text.txt"), &g_error), BESA_ERROR_UNSUPPORTED, "no known kind of token file",
                  with_directory(": make one of a text, python3 examples/tokenize.py %s tokens.npy --tokenizer MODEL", temp_path("text.txt")));
    check_message("a pointer", besa_tokens_load(&tokens, temp_path("lfs.npy"), &g_error), BESA_ERROR_FORMAT, "lfs.npy: a git-lfs pointer",
                  ": git lfs pull");
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
    TEST("no head") test_headless();
    TEST("tie_word_embeddings that contradict") test_contradiction();
    TEST("tensors beside a weight") test_companions();
    TEST("an index of layers that are rows of one tensor") test_fused_index();
    TEST("ropes and generations of config.json") test_ropes();
    TEST("refused with the remedy: directories") test_refusals();
    TEST("refused with the remedy: weights and tokens") test_refused_weights();
    g_be.destroy(&g_be);
    return test_finish();
}
