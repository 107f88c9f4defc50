/* test_cuda.cpp - besa_cuda.cuh on the stand-in runtime of cuda_standin/, against the CPU backend.
 *
 *   test_cuda STORIES [part of a test's name]
 *
 * Kernels run on the CPU here: results, bounds, barriers and the order of streams are tested, speed is not. */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "backend_ops.h"
#include "test.h"
#include "fixture.h"
#include "besa_cuda.cuh"
#include "standin.h"
#include <string>
#include <vector>

static const char *g_stories;

/* A backend or the end of the program. */
static besa_backend cuda_backend(int fp32)
{
    besa_backend be;
    besa_error error;
    besa_cuda_options options = {0, fp32};
    if (besa_cuda_backend(&be, &options, &error) == BESA_OK) return be;
    printf("FAIL no backend: %s\n", error.message);
    exit(1);
}

/* ---- operations ------------------------------------------------------------------------------ */

/* The device finds a bad pivot; a wait reports it. The cases ask for it at once. */
static besa_result factor_and_wait(besa_backend *be, float *h, int32_t *dead, float damping, int64_t columns)
{
    besa_result result = besa__cuda_hessian_factor(be, h, dead, damping, columns);
    return result == BESA_OK ? be->synchronize(be, BESA_QUEUE_COMPUTE) : result;
}

/* All cases whose name contains filter; the hashes of what they gave. */
static std::vector<uint64_t> run_operations(int fp32, const char *filter, int pieces = 0)
{
    besa_backend be = cuda_backend(fp32);
    std::vector<uint64_t> hashes(OPS_CASES);
    int counts[3] = {0, 0, 0};
    ops t;
    be.hessian_factor = factor_and_wait;
    if (pieces) besa__cuda_of(&be)->panel = 300, besa__cuda_of(&be)->queries = 21, besa__cuda_of(&be)->score_bytes = 4096;
    memset(&t, 0, sizeof t);
    t.be = &be, t.mode = "test", t.quiet = 1, t.product_tolerance = be.activation_dtype == BESA_F32 ? 0 : 1e-2;
    ops_run(&t, filter, 0, hashes.data(), counts);
    CHECK(counts[0] > 0 && counts[1] == 0, "%d cases passed, %d failed", counts[0], counts[1]);
    be.destroy(&be);
    CHECK(standin_reports() == 0, "%s", standin_last_report());
    CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0, "%zu allocations, %zu objects alive",
          standin_live_allocations(), standin_live_objects());
    return hashes;
}

/* Cases that gave other bytes than before. */
static void check_same(const std::vector<uint64_t> &a, const std::vector<uint64_t> &b, const char *what)
{
    for (int i = 0; i < OPS_CASES; i++) CHECK(a[i] == b[i], "%s: other bytes %s", ops_cases[i].name, what);
}

static void test_operations(void)
{
    static const char *const names[2][3] = {
        {"operations, bf16", "operations, bf16, threads in reverse", "operations, bf16, threads shuffled"},
        {"operations, fp32", "operations, fp32, threads in reverse", "operations, fp32, threads shuffled"}};
    for (int fp32 = 1; fp32 >= 0; fp32--) {
        std::vector<uint64_t> forward;
        TEST(names[fp32][0]) forward = run_operations(fp32, NULL);
        if (forward.empty()) continue;
        TEST(names[fp32][1]) {
            standin_set_order(STANDIN_REVERSE, 0);
            check_same(forward, run_operations(fp32, NULL), "in reverse");
        }
        TEST(names[fp32][2]) {
            standin_set_order(STANDIN_SHUFFLE, 7);
            check_same(forward, run_operations(fp32, NULL), "shuffled");
        }
        standin_set_order(STANDIN_FORWARD, 0);
    }
}

/* Weights are converted a few lines at a time, attention goes by few queries and one head. */
static void test_pieces(void)
{
    TEST("operations in small pieces")
        for (int fp32 = 1; fp32 >= 0; fp32--) {
            run_operations(fp32, "attention", 1);
            run_operations(fp32, "linear", 1);
            run_operations(fp32, "nll", 1);
        }
}

/* Rows and histograms that fit shared memory and that do not: the same results. */
static void test_shared_memory(void)
{
    static const size_t sizes[] = {48 << 10, 64 << 10, 99 << 10, 227 << 10};
    TEST("operations with 48 to 227 KB of shared memory") {
        for (int i = 0; i < 4; i++) {
            standin_set_shared(sizes[i]);
            run_operations(1, "rank");
            run_operations(1, "bucket");
        }
        standin_set_shared(99 << 10);
    }
}

/* ---- one row of ranks at every size of shared memory ----------------------------------------- */

static void test_long_rows(void)
{
    TEST("ranks of rows of 28672 and 70000 columns") {
        const int64_t columns[2] = {28672, 70000}, rows = 3;
        for (int c = 0; c < 2; c++)
            for (size_t shared = 48 << 10; shared <= 227 << 10; shared += 179 << 10) {
                standin_set_shared(shared);
                besa_backend cuda = cuda_backend(1), cpu;
                besa_error error;
                CHECK_OK(besa_cpu_backend(&cpu, NULL, &error), error);
                besa_backend *side[2] = {&cpu, &cuda};
                int64_t n = rows * columns[c];
                size_t bytes = static_cast<size_t>(n) * (columns[c] > 65536 ? 4 : 2);
                std::vector<unsigned char> rank[2];
                std::vector<float> s(static_cast<size_t>(n));
                for (int64_t i = 0; i < n; i++) s[static_cast<size_t>(i)] = static_cast<float>(i * 2654435761u % 5003) - 40;
                for (int b = 0; b < 2; b++) {
                    besa_backend *be = side[b];
                    besa_workload work;
                    void *s_, *rank_, *workspace;
                    memset(&work, 0, sizeof work);
                    work.rows = rows, work.columns = columns[c];
                    be->workspace_bytes = be->workspace_size(be, &work);
                    CHECK_OK(be->alloc(be, &workspace, be->workspace_bytes), be->error);
                    CHECK_OK(be->alloc(be, &s_, static_cast<size_t>(n) * 4), be->error);
                    CHECK_OK(be->alloc(be, &rank_, bytes), be->error);
                    be->workspace = workspace;
                    rank[b].resize(bytes);
                    CHECK_OK(be->upload(be, BESA_QUEUE_COMPUTE, s_, s.data(), static_cast<size_t>(n) * 4), be->error);
                    CHECK_OK(be->rank_rows(be, rank_, static_cast<float *>(s_), rows, columns[c]), be->error);
                    CHECK_OK(be->download(be, BESA_QUEUE_COMPUTE, rank[b].data(), rank_, bytes), be->error);
                    CHECK_OK(be->synchronize(be, BESA_QUEUE_COMPUTE), be->error);
                    be->free(be, s_), be->free(be, rank_), be->free(be, workspace);
                    be->destroy(be);
                }
                CHECK(rank[0] == rank[1], "%lld columns, %zu bytes of shared memory", static_cast<long long>(columns[c]), shared);
            }
        standin_set_shared(99 << 10);
    }
}

/* One rate for all rows of a layer: their bucket sums are added up in parts first. */
static void test_layer_rates(void)
{
    TEST("rates of groups of 300 and 1000 rows") {
        const int64_t rows = 1000, buckets = 100;
        std::vector<float> sums(static_cast<size_t>(rows * buckets)), theta(static_cast<size_t>(buckets + 1), 0.3f);
        for (size_t i = 0; i < sums.size(); i++) sums[i] = static_cast<float>(i * 2654435761u % 2003) * 1e-3f - 0.9f;
        for (int64_t group = 300; group <= rows; group += 700) {
            std::vector<float> got[2];
            for (int b = 0; b < 2; b++) {
                besa_backend be = b ? cuda_backend(1) : besa_backend();
                besa_error error;
                besa_rate_shape s = {rows, 512, group, buckets + 1, 0.1f, 1.0f, 0.0f, 0};
                besa_workload work;
                void *workspace, *sums_, *theta_, *grad_;
                if (!b) CHECK_OK(besa_cpu_backend(&be, NULL, &error), error);
                memset(&work, 0, sizeof work);
                work.rows = rows, work.columns = 512, work.candidates = buckets + 1;
                be.workspace_bytes = be.workspace_size(&be, &work);
                CHECK_OK(be.alloc(&be, &workspace, be.workspace_bytes), be.error);
                CHECK_OK(be.alloc(&be, &sums_, sums.size() * 4), be.error);
                CHECK_OK(be.alloc(&be, &theta_, theta.size() * 4), be.error);
                CHECK_OK(be.alloc(&be, &grad_, theta.size() * 4), be.error);
                be.workspace = workspace;
                got[b].resize(theta.size());
                CHECK_OK(be.upload(&be, BESA_QUEUE_COMPUTE, sums_, sums.data(), sums.size() * 4), be.error);
                CHECK_OK(be.upload(&be, BESA_QUEUE_COMPUTE, theta_, theta.data(), theta.size() * 4), be.error);
                CHECK_OK(be.rate_backward(&be, static_cast<float *>(grad_), NULL, static_cast<float *>(sums_),
                                          static_cast<float *>(theta_), NULL, NULL, &s), be.error);
                CHECK_OK(be.download(&be, BESA_QUEUE_COMPUTE, got[b].data(), grad_, theta.size() * 4), be.error);
                CHECK_OK(be.synchronize(&be, BESA_QUEUE_COMPUTE), be.error);
                be.free(&be, workspace), be.free(&be, sums_), be.free(&be, theta_), be.free(&be, grad_);
                be.destroy(&be);
            }
            for (size_t d = 0; d < theta.size(); d++)
                CHECK(fabsf(got[0][d] - got[1][d]) <= 1e-4f * fabsf(got[0][d]) + 1e-5f, "groups of %lld, candidate %zu: %g, CPU %g",
                      static_cast<long long>(group), d, static_cast<double>(got[1][d]), static_cast<double>(got[0][d]));
        }
    }
}

/* The shapes of a 70B model, 128 x 2048 tokens at once: addresses alone, nothing runs. X has 2^31 elements. */
static void test_addresses(void)
{
    TEST("70B shapes, 128 x 2048 tokens, addresses") {
        standin_set_dry(1);
        standin_set_memory(static_cast<size_t>(1) << 42);
        besa_backend be = cuda_backend(0);
        const int64_t d = 8192, inner = 28672, tokens = 128 * 2048;
        besa_attention_shape s = {128, 2048, 64, 8, 128, 0};
        besa_workload work;
        void *workspace, *x, *z, *w, *dw, *h;
        memset(&work, 0, sizeof work);
        work.rows = work.columns = inner, work.tokens = tokens, work.seqlen = 2048;
        work.num_attention_heads = 64, work.num_key_value_heads = 8, work.head_dim = 128, work.hessian_columns = inner;
        be.workspace_bytes = be.workspace_size(&be, &work);
        CHECK(be.workspace_bytes < static_cast<size_t>(600) << 20, "workspace of %zu bytes", be.workspace_bytes);
        CHECK_OK(be.alloc(&be, &workspace, be.workspace_bytes), be.error);
        CHECK_OK(be.alloc(&be, &x, static_cast<size_t>(tokens * d) * 2), be.error);
        CHECK_OK(be.alloc(&be, &z, static_cast<size_t>(tokens * inner) * 2), be.error);
        CHECK_OK(be.alloc(&be, &w, static_cast<size_t>(d * inner) * 4), be.error);
        CHECK_OK(be.alloc(&be, &dw, static_cast<size_t>(d * inner) * 4), be.error);
        CHECK_OK(be.alloc(&be, &h, static_cast<size_t>(inner * inner) * 4), be.error);
        be.workspace = workspace;
        for (int type = BESA_F32; type <= BESA_BF16; type++) {
            besa_dtype dtype = static_cast<besa_dtype>(type);
            CHECK_OK(be.linear_forward(&be, z, x, w, dtype, NULL, tokens, inner, d, 0), be.error);
            CHECK_OK(be.linear_backward_input(&be, x, z, w, dtype, tokens, inner, d, 1), be.error);
        }
        CHECK_OK(be.linear_backward_weight(&be, static_cast<float *>(dw), z, x, tokens, inner, d, 0, inner), be.error);
        CHECK_OK(be.gram(&be, static_cast<float *>(h), z, 1.0f, tokens, inner), be.error);
        CHECK_OK(be.attention_forward(&be, x, x, z, z, &s), be.error);
        CHECK_OK(be.attention_backward(&be, x, z, z, x, x, z, z, &s), be.error);
        CHECK_OK(be.hessian_factor(&be, static_cast<float *>(h), static_cast<int32_t *>(w), 0.01f, inner), be.error);
        CHECK_OK(be.rmsnorm_forward(&be, x, static_cast<float *>(w), x, static_cast<float *>(dw), tokens, d, 1e-5f), be.error);
        CHECK_OK(be.swiglu_forward(&be, z, z, z, tokens * inner), be.error);
        CHECK(standin_reports() == 0, "%s", standin_last_report());
        be.free(&be, workspace), be.free(&be, x), be.free(&be, z), be.free(&be, w), be.free(&be, dw), be.free(&be, h);
        be.destroy(&be);
        standin_set_dry(0);
    }
}

/* ---- the plan at real shapes ----------------------------------------------------------------- */

/* A checkpoint of one block whose weights are a hole in a file: enough to plan. */
static void hollow_llama(const char *directory, int64_t hidden, int64_t inner, int64_t heads, int64_t kv_heads)
{
    static const char *const part[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                       "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"};
    int64_t kv = hidden / heads * kv_heads, rows[] = {hidden, kv, kv, hidden, inner, inner, hidden}, at = 0;
    std::string header = "{";
    auto add = [&](const std::string &name, int64_t r, int64_t c) {
        char text[256], shape[64];
        int64_t end = at + r * (c > 0 ? c : 1) * 2;
        if (c > 0) snprintf(shape, sizeof shape, "%lld,%lld", static_cast<long long>(r), static_cast<long long>(c));
        else snprintf(shape, sizeof shape, "%lld", static_cast<long long>(r));
        snprintf(text, sizeof text, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%lld,%lld]}", at ? "," : "",
                 name.c_str(), shape, static_cast<long long>(at), static_cast<long long>(end));
        header += text;
        at = end;
    };
    add("model.embed_tokens.weight", 1000, hidden);
    for (int l = 0; l < 7; l++)
        add(std::string("model.layers.0.") + part[l] + ".weight", rows[l], l == 6 ? inner : hidden);
    add("model.layers.0.input_layernorm.weight", hidden, 0);
    add("model.layers.0.post_attention_layernorm.weight", hidden, 0);
    add("model.norm.weight", hidden, 0);
    header += "}";
    while (header.size() % 8) header += " ";
    char config[512];
    snprintf(config, sizeof config, "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_act\":\"silu\","
             "\"hidden_size\":%lld,\"intermediate_size\":%lld,\"num_hidden_layers\":1,\"num_attention_heads\":%lld,"
             "\"num_key_value_heads\":%lld,\"vocab_size\":1000,\"rms_norm_eps\":1e-5,\"tie_word_embeddings\":true,"
             "\"max_position_embeddings\":2048}", static_cast<long long>(hidden), static_cast<long long>(inner),
             static_cast<long long>(heads), static_cast<long long>(kv_heads));
    uint64_t length = header.size();
    std::string begin(reinterpret_cast<const char *>(&length), 8), path = std::string(directory) + "/model.safetensors";
    begin += header;
    CHECK(mkdir(directory, 0777) == 0, "%s", directory);
    write_bytes((std::string(directory) + "/config.json").c_str(), config, strlen(config));
    write_bytes(path.c_str(), begin.data(), begin.size());
    CHECK(truncate(path.c_str(), static_cast<off_t>(begin.size()) + at) == 0, "%s", path.c_str());
}

/* 128 x 2048 tokens within a budget: what stays on the device, and how much of it. */
static void check_plan(const char *model, besa_method method, size_t budget, int on_host)
{
    besa_backend be = cuda_backend(0);
    besa_checkpoint *checkpoint = NULL;
    besa_error error;
    besa_plan_result plan;
    besa_calibration c;
    besa_prune_options o;
    memset(&c, 0, sizeof c);
    memset(&o, 0, sizeof o);
    memset(&plan, 0, sizeof plan);
    c.nsamples = 128, c.seqlen = 2048;
    o.method = method, o.rates.target = 0.5, o.device_memory = budget;
    CHECK_OK(besa_checkpoint_open(&checkpoint, model, &error), error);
    CHECK_OK(besa_plan(checkpoint, &be, &c, &o, &plan, &error), error);
    CHECK(plan.device_bytes <= budget && plan.micro_batch == 1, "%zu bytes, %lld sequences at a time", plan.device_bytes,
          static_cast<long long>(plan.micro_batch));
    CHECK(plan.x_on_host + plan.yref_on_host == on_host, "X on the host: %d, Yref: %d", plan.x_on_host, plan.yref_on_host);
    if (getenv("TEST_VERBOSE"))
        printf("    method %d: %.2f GB of %.0f on the device, %.2f GB on the host, X there: %d, Yref: %d\n", static_cast<int>(method),
               1e-9 * static_cast<double>(plan.device_bytes), 1e-9 * static_cast<double>(budget),
               1e-9 * static_cast<double>(plan.host_bytes), plan.x_on_host, plan.yref_on_host);
    besa_checkpoint_close(checkpoint);
    be.destroy(&be);
}

static void test_plans(void)
{
    TEST("70B within 24 GB, 7B within 8 GB, and with less") {
        const size_t GB = 1000000000;
        const char *large = temp_path("70B"), *small = temp_path("7B");
        hollow_llama(large, 8192, 28672, 64, 8);
        hollow_llama(small, 4096, 11008, 32, 32);
        check_plan(large, BESA_METHOD_BESA, 24 * GB, 0);
        check_plan(large, BESA_METHOD_SPARSEGPT, 24 * GB, 0);
        check_plan(large, BESA_METHOD_BESA, 15 * GB, 1);
        check_plan(large, BESA_METHOD_BESA, 12 * GB, 2);
        check_plan(small, BESA_METHOD_BESA, 8 * GB, 0);
        check_plan(small, BESA_METHOD_BESA, 4 * GB, 2);
    }
}

/* ---- creation, errors, faults ---------------------------------------------------------------- */

static void test_creation(void)
{
    besa_backend be;
    besa_error error;
    besa_cuda_options second = {1, 0};
    TEST("no device") {
        standin_set_devices(0);
        CHECK(besa_cuda_backend(&be, NULL, &error) == BESA_ERROR_DEVICE, "%s", error.message);
        CHECK(strstr(error.message, "no CUDA device"), "%s", error.message);
        standin_set_devices(1);
        CHECK(besa_cuda_backend(&be, &second, &error) == BESA_ERROR_DEVICE, "%s", error.message);
        CHECK(besa_cuda_backend(&be, &second, NULL) == BESA_ERROR_DEVICE, "error may be NULL");
    }
    TEST("sm_75 computes in float") {
        standin_set_arch(7, 5);
        be = cuda_backend(0);
        CHECK(be.activation_dtype == BESA_F32, "dtype %d", static_cast<int>(be.activation_dtype));
        be.destroy(&be);
        standin_set_arch(8, 0);
    }
    TEST("every call of the creation fails once") {
        besa_result result = BESA_ERROR_DEVICE;
        standin_quiet(1);
        for (size_t n = 1; result != BESA_OK && n < 200; n++) {
            standin_fail_call(n);
            result = besa_cuda_backend(&be, NULL, &error);
            if (result != BESA_OK) CHECK(error.code == result && error.message[0], "call %zu: no message", n);
            if (result == BESA_OK) be.destroy(&be);
            standin_reset();
            CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0, "call %zu: something is left", n);
        }
        CHECK(result == BESA_OK, "%s", error.message);
        standin_fail_call(0);
        standin_quiet(0);
    }
}

/* ---- the pipeline ---------------------------------------------------------------------------- */

typedef struct run {
    int on_host, tightest; /* activations that live on the host; 1: ask for the least memory that works */
    besa_prune_options options;
    besa_report report;
    besa_error error;
    const char *output;
    int64_t nsamples, seqlen;
} run;

static run run_of(besa_method method, int64_t nsamples, const char *output)
{
    run r;
    memset(&r, 0, sizeof r);
    r.options.method = method;
    r.options.rates.target = 0.5;
    r.options.epochs = 3;
    r.options.rates.d0 = 3e-3;                  /* few steps: large ones */
    r.nsamples = nsamples, r.seqlen = 64;
    r.output = output;
    return r;
}

static besa_result run_prune(run *r, besa_backend *be)
{
    besa_checkpoint *checkpoint = NULL;
    besa_tokens tokens = {NULL, 0, 0, 0};
    besa_calibration c;
    char path[512];
    memset(&c, 0, sizeof c);
    c.nsamples = r->nsamples, c.seqlen = r->seqlen;
    c.test_windows = 2, c.test_seqlen = r->seqlen;
    std::vector<int32_t> ids(static_cast<size_t>((c.nsamples + c.test_windows) * c.seqlen));
    snprintf(path, sizeof path, "%s/calibration_tokens.npy", g_stories);
    besa_result result = besa_checkpoint_open(&checkpoint, g_stories, &r->error);
    if (result == BESA_OK) result = besa_tokens_load(&tokens, path, &r->error);
    if (result == BESA_OK)
        result = besa_tokens_sample(&tokens, c.nsamples + c.test_windows, c.seqlen, 3,
                                    besa_checkpoint_config(checkpoint)->vocab_size, ids.data(), &r->error);
    c.ids = ids.data();
    c.test_ids = ids.data() + c.nsamples * c.seqlen;
    besa_plan_result plan;
    size_t least = 0;
    while (r->tightest && result == BESA_OK && besa_plan(checkpoint, be, &c, &r->options, &plan, NULL) == BESA_OK) {
        least = plan.device_bytes;
        r->on_host = plan.x_on_host + plan.yref_on_host + plan.test_on_host;
        r->options.device_memory = least - 1;
    }
    if (r->tightest) r->options.device_memory = least;
    if (result == BESA_OK) result = besa_prune(checkpoint, r->output, be, &c, &r->options, &r->report, &r->error);
    besa_tokens_free(&tokens);
    besa_checkpoint_close(checkpoint);
    return result;
}

/* Weights that differ between two pruned checkpoints, of how many; with masks, those that are zero in one alone. */
static void compare_weights(const char *a, const char *b, int masks, int64_t *differ, int64_t *total)
{
    static const char zero[4] = {0, 0, 0, 0};
    besa_checkpoint *one = NULL, *two = NULL;
    besa_error error;
    *differ = *total = 0;
    CHECK_OK(besa_checkpoint_open(&one, a, &error), error);
    CHECK_OK(besa_checkpoint_open(&two, b, &error), error);
    for (int64_t i = 0; one && two && i < besa_checkpoint_tensor_count(one); i++) {
        const besa_tensor *x = besa_checkpoint_tensor(one, i), *y = besa_checkpoint_find(two, x->name);
        if (!y || x->bytes != y->bytes || !strstr(x->name, "_proj.weight")) continue;
        size_t size = besa_dtype_size(x->dtype);
        for (size_t at = 0; at < x->bytes; at += size, ++*total) {
            const char *u = static_cast<const char *>(x->data) + at, *v = static_cast<const char *>(y->data) + at;
            *differ += masks ? (memcmp(u, zero, size) == 0) != (memcmp(v, zero, size) == 0) : memcmp(u, v, size) != 0;
        }
    }
    besa_checkpoint_close(one);
    besa_checkpoint_close(two);
}

static void check_close(double got, double want, double limit, const char *what, int64_t block)
{
    CHECK(fabs(got - want) <= limit * fabs(want), "%s of block %lld: %g, on the CPU %g", what,
          static_cast<long long>(block), got, want);
}

/* The whole run on both backends: masks and losses */
static void compare_pipelines(const char *name, besa_method method, int fp32, double masks, double losses)
{
    besa_backend cpu, cuda = cuda_backend(fp32);
    besa_error error;
    CHECK_OK(besa_cpu_backend(&cpu, NULL, &error), error);
    run a = run_of(method, 4, temp_path("%s-cpu", name)), b = run_of(method, 4, temp_path("%s-cuda", name));
    CHECK_OK(run_prune(&a, &cpu), a.error);
    CHECK_OK(run_prune(&b, &cuda), b.error);
    int64_t differ, total;
    compare_weights(a.output, b.output, method == BESA_METHOD_SPARSEGPT, &differ, &total); /* it changes what it keeps */
    CHECK(total > 0 && static_cast<double>(differ) < masks * static_cast<double>(total), "%lld of %lld weights differ",
          static_cast<long long>(differ), static_cast<long long>(total));
    for (int64_t i = 0; i < a.report.num_blocks && i < b.report.num_blocks; i++) {
        check_close(b.report.block[i].loss_all, a.report.block[i].loss_all, losses, "loss_all", i);
        check_close(b.report.block[i].loss_uniform, a.report.block[i].loss_uniform, losses, "loss_uniform", i);
        check_close(b.report.block[i].sparsity, a.report.block[i].sparsity, 1e-3, "sparsity", i);
    }
    if (method == BESA_METHOD_BESA && a.report.num_blocks > 0)
        CHECK(fabs(a.report.block[0].loss_all / a.report.block[0].loss_uniform - 1) > 0.01, "nothing was learned: %g, uniform %g",
              a.report.block[0].loss_all, a.report.block[0].loss_uniform);
    if (getenv("TEST_VERBOSE"))
        printf("    %lld of %lld weights differ\n", static_cast<long long>(differ), static_cast<long long>(total));
    check_close(b.report.perplexity, a.report.perplexity, losses, "perplexity", -1);
    besa_report_free(&a.report);
    besa_report_free(&b.report);
    cpu.destroy(&cpu);
    cuda.destroy(&cuda);
    CHECK(standin_reports() == 0, "%s", standin_last_report());
    CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0, "something is alive");
}

static void test_pipeline(void)
{
    TEST("pipeline, besa, fp32") compare_pipelines("besa32", BESA_METHOD_BESA, 1, 1e-3, 0.01);
    TEST("pipeline, besa, bf16") compare_pipelines("besa16", BESA_METHOD_BESA, 0, 0.1, 0.15);
    TEST("pipeline, wanda, fp32") compare_pipelines("wanda32", BESA_METHOD_WANDA, 1, 1e-3, 0.01);
    TEST("pipeline, magnitude, fp32") compare_pipelines("magnitude32", BESA_METHOD_MAGNITUDE, 1, 1e-3, 0.01);
    TEST("pipeline, sparsegpt, fp32") compare_pipelines("sparsegpt32", BESA_METHOD_SPARSEGPT, 1, 1e-2, 0.02);
    TEST("pipeline, activations on the host, streams in any order") {
        static const int schedules[] = {STANDIN_EAGER, STANDIN_LATE, STANDIN_OTHERS};
        int64_t differ, total;
        for (int i = 0; i < 4; i++) { /* first the CPU */
            besa_backend be;
            besa_error error;
            run r = run_of(BESA_METHOD_BESA, 6, temp_path("host-%d", i));
            r.seqlen = 24, r.options.epochs = 2, r.tightest = i > 0;
            if (i > 0) be = cuda_backend(1);
            else CHECK_OK(besa_cpu_backend(&be, NULL, &error), error);
            if (i > 0) standin_set_streams(schedules[i - 1]);
            CHECK_OK(run_prune(&r, &be), r.error);
            CHECK(r.on_host == (i > 0 ? 3 : 0), "%d of the activations are on the host", r.on_host);
            besa_report_free(&r.report);
            be.destroy(&be);
            if (i == 0) continue;
            compare_weights(temp_path("host-%d", i > 1), r.output, 0, &differ, &total);
            CHECK(total > 0 && differ <= (i == 1 ? total / 1000 : 0), "schedule %d: %lld of %lld weights differ", i - 1,
                  static_cast<long long>(differ), static_cast<long long>(total));
        }
        standin_set_streams(STANDIN_LATE);
        CHECK(standin_reports() == 0, "%s", standin_last_report());
    }
    TEST("pipeline, twice the same bytes, whatever the order of threads") {
        const char *output[2] = {temp_path("first"), temp_path("second")};
        int64_t differ, total;
        for (int i = 0; i < 2; i++) {
            besa_backend be = cuda_backend(0);
            run r = run_of(BESA_METHOD_BESA, 2, output[i]);
            standin_set_order(i ? STANDIN_SHUFFLE : STANDIN_FORWARD, 11);
            CHECK_OK(run_prune(&r, &be), r.error);
            besa_report_free(&r.report);
            be.destroy(&be);
        }
        standin_set_order(STANDIN_FORWARD, 0);
        compare_weights(output[0], output[1], 0, &differ, &total);
        CHECK(differ == 0 && total > 0, "%lld of %lld weights differ", static_cast<long long>(differ),
              static_cast<long long>(total));
    }
}

/* One call after another fails, in steps that grow: a result with a message, nothing left. */
static void test_faults(void)
{
    TEST("pipeline, calls fail") {
        size_t step = 1, n = 1;
        standin_quiet(1);
        for (;; n += step, step += step / 3 + 1) {
            besa_backend be = cuda_backend(1);
            run r = run_of(BESA_METHOD_BESA, 1, temp_path("fault-%zu", n));
            r.seqlen = 8;
            standin_fail_call(n);
            besa_result result = run_prune(&r, &be);
            int reached = standin_calls() >= n;
            be.destroy(&be);
            standin_reset();
            besa_report_free(&r.report);
            CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0, "call %zu: something is left", n);
            if (!reached) break;
            CHECK(result != BESA_OK && r.error.message[0], "call %zu: %s", n, besa_result_string(result));
            CHECK(!exists(r.output), "call %zu: output looks finished", n);
        }
        standin_fail_call(0);
        standin_quiet(0);
    }
}

int main(int argc, char **argv)
{
    if (argc < 2) return printf("FAIL usage: test_cuda STORIES [NAME]\n"), 1;
    g_stories = argv[1];
    test.only = argc > 2 ? argv[2] : NULL;
    temp_create();
    test_creation();
    test_operations();
    test_pieces();
    test_shared_memory();
    test_long_rows();
    test_layer_rates();
    test_plans();
    test_pipeline();
    test_faults();
    test_addresses(); /* last: memory is not backed from here on */
    return test_finish();
}
