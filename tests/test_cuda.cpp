/* test_cuda.cpp - besa_cuda.cuh on the stand-in runtime of cuda_standin/ or on a GPU, against the CPU backend.
 *
 *   test_cuda STORIES [part of a test's name]
 *
 * On the stand-in kernels run on the CPU: results, bounds, barriers and the order of streams are tested, speed is not. Built
 * by nvcc for a GPU it runs what needs nothing of the stand-in: operations, queues, plans and the pipeline. With TEST_OPERATIONS
 * it has the operations alone, and compiles in a fraction of the time. */
#ifdef TEST_OPERATIONS
enum { TEST_ALL = 0 };
#define BESA_API static inline /* what is not called is not compiled */
#else
enum { TEST_ALL = 1 };
#endif
#define BESA_IMPLEMENTATION
#define BESA_CUDA /* files are read and written by a thread */
#include "besa.h"
#include "backend_ops.h"
#include "test.h"
#include "fixture.h"
#include "besa_cuda.cuh"
#ifdef CUDA_STANDIN
#include "standin.h"
#else
#include "gpu.h"
#endif
#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

/* All is tested in the plain build. Under sanitizers every kernel and every pipeline runs, on fewer steps and with threads
 * in one order; under ThreadSanitizer on fewer tokens too. */
#ifndef __has_feature
#define __has_feature(feature) 0
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
static const int g_race = 1, g_sanitized = 1;
#elif defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
static const int g_race = 0, g_sanitized = 1;
#else
static const int g_race = 0, g_sanitized = 0;
#endif

static const char *g_stories, *g_source;        /* the bundled model's directory, and that of what pipelines prune: */
#ifdef CUDA_STANDIN
enum { BLOCKS = 3 };                            /* not all five, for time */
#else
enum { BLOCKS = 5 };
#endif

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
    if (pieces) besa__cuda_of(&be)->panel = 300, besa__cuda_of(&be)->queries = 21, besa__cuda_of(&be)->query_rows = 0, besa__cuda_of(&be)->score_bytes = 4096;
    memset(&t, 0, sizeof t);
    t.be = &be, t.mode = "test", t.quiet = 1, t.product_tolerance = be.activation_dtype == BESA_F32 ? 0 : 1e-2;
    ops_run(&t, filter, 0, hashes.data(), counts);
    CHECK(counts[0] > 0 && counts[1] == 0, "%d cases passed, %d failed", counts[0], counts[1]);
    CHECK(standin_own_scratch() == 0, "%zu products took memory of cuBLAS's own", standin_own_scratch());
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
    std::vector<uint64_t> forward;
    TEST("operations, bf16") run_operations(0, NULL);       /* the same kernels: one order */
    TEST("operations, fp32") forward = run_operations(1, NULL);
    if (forward.empty() || g_sanitized) return;
    TEST("operations, fp32, threads in reverse") {
        standin_set_order(STANDIN_REVERSE, 0);
        check_same(forward, run_operations(1, NULL), "in reverse");
    }
    TEST("operations, fp32, threads shuffled") {
        standin_set_order(STANDIN_SHUFFLE, 7);
        check_same(forward, run_operations(1, NULL), "shuffled");
    }
    standin_set_order(STANDIN_FORWARD, 0);
}

/* Weights are converted a few lines at a time, attention goes by few queries and one head. */
static void test_pieces(void)
{
    TEST("operations in small pieces")
        for (int fp32 = !g_sanitized; fp32 >= 0; fp32--) {
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
        for (int i = 0; i < 4; i += g_sanitized ? 3 : 1) {
            standin_set_shared(sizes[i]);
            run_operations(1, "rank");
            run_operations(1, "bucket");
        }
        standin_set_shared(99 << 10);
    }
}

/* ---- queues ---------------------------------------------------------------------------------- */

/* Three numbers through one buffer of host memory each way: copies in and out run beside the kernels, ordered by events. */
static void test_queues(void)
{
    TEST("queues and events") {
        besa_backend be = cuda_backend(1);
        const int64_t n = 1000, turns = 3;
        const size_t bytes = static_cast<size_t>(n) * sizeof(float);
        void *in, *out, *x, *y;
        enum { ARRIVED, READ, DONE, LEFT };
        CHECK_OK(be.host_alloc(&be, &in, 3 * bytes), be.error);
        CHECK_OK(be.host_alloc(&be, &out, 3 * bytes), be.error);
        CHECK_OK(be.alloc(&be, &x, bytes), be.error);
        CHECK_OK(be.alloc(&be, &y, bytes), be.error);
        float *from = static_cast<float *>(in), *to = static_cast<float *>(out);
        for (int64_t i = 0; i < turns * n; i++) from[i] = static_cast<float>(i % 7 + i / n + 1);
        for (int64_t t = 0; t < turns; t++) {
            if (t > 0) CHECK_OK(be.wait(&be, BESA_QUEUE_UPLOAD, READ), be.error);
            CHECK_OK(be.upload(&be, BESA_QUEUE_UPLOAD, x, from + t * n, bytes), be.error);
            CHECK_OK(be.record(&be, BESA_QUEUE_UPLOAD, ARRIVED), be.error);
            CHECK_OK(be.wait(&be, BESA_QUEUE_COMPUTE, ARRIVED), be.error);
            if (t > 0) CHECK_OK(be.wait(&be, BESA_QUEUE_COMPUTE, LEFT), be.error);
            CHECK_OK(be.power(&be, static_cast<float *>(y), static_cast<float *>(x), -1.0f, n), be.error);
            CHECK_OK(be.record(&be, BESA_QUEUE_COMPUTE, READ), be.error);
            CHECK_OK(be.record(&be, BESA_QUEUE_COMPUTE, DONE), be.error);
            CHECK_OK(be.wait(&be, BESA_QUEUE_DOWNLOAD, DONE), be.error);
            CHECK_OK(be.download(&be, BESA_QUEUE_DOWNLOAD, to + t * n, y, bytes), be.error);
            CHECK_OK(be.record(&be, BESA_QUEUE_DOWNLOAD, LEFT), be.error);
        }
        CHECK_OK(be.synchronize(&be, BESA_QUEUE_DOWNLOAD), be.error);
        for (int64_t i = 0; i < turns * n; i++)
            if (!CHECK(fabsf(to[i] * from[i] - 1) < 1e-6f, "element %lld", static_cast<long long>(i))) break;
        be.host_free(&be, in), be.host_free(&be, out), be.free(&be, x), be.free(&be, y);
        be.destroy(&be);
        CHECK(standin_reports() == 0 && standin_live_allocations() == 0 && standin_live_objects() == 0, "%s", standin_last_report());
    }
}

#ifdef CUDA_STANDIN
/* The seconds between two events are those of the work between them, which runs within the wait. */
static void test_elapsed(void)
{
    TEST("seconds between events") {
        besa_backend be = cuda_backend(1);
        const int64_t n = g_sanitized ? 1 << 16 : 1 << 20;
        double seconds = -1, none = -1, wall;
        void *x;
        CHECK_OK(be.alloc(&be, &x, static_cast<size_t>(n) * sizeof(float)), be.error);
        CHECK_OK(be.zero(&be, BESA_QUEUE_COMPUTE, x, static_cast<size_t>(n) * sizeof(float)), be.error);
        CHECK_OK(be.synchronize(&be, BESA_QUEUE_COMPUTE), be.error);
        CHECK_OK(be.record(&be, BESA_QUEUE_COMPUTE, 0), be.error);
        CHECK_OK(be.power(&be, static_cast<float *>(x), static_cast<float *>(x), 2.0f, n), be.error);
        CHECK_OK(be.record(&be, BESA_QUEUE_COMPUTE, 1), be.error);
        CHECK_OK(be.record(&be, BESA_QUEUE_COMPUTE, 2), be.error);
        wall = ops_now();
        CHECK_OK(be.synchronize(&be, BESA_QUEUE_COMPUTE), be.error);
        wall = ops_now() - wall;
        CHECK_OK(be.elapsed(&be, 0, 1, &seconds), be.error);
        CHECK_OK(be.elapsed(&be, 1, 2, &none), be.error);
        CHECK(seconds <= wall && seconds > 0.5 * wall, "%g s between events in a wait of %g", seconds, wall);
        CHECK(none >= 0 && none < 0.5 * seconds, "%g s between events with nothing between them", none);
        be.free(&be, x);
        be.destroy(&be);
    }
}
#endif

/* ---- one row of ranks at every size of shared memory ----------------------------------------- */

static void test_long_rows(void)
{
    TEST("ranks of rows of 28672 and 70000 columns, and of so many that their scratch is the largest") {
        const int64_t columns[3] = {28672, 70000, 12500}, rows_of[3] = {3, 3, BESA__CUDA_SUM_PARTS + 2};
        for (int c = 0; c < 3; c++)
            for (size_t shared = 48 << 10; shared <= (c < 2 ? 227 << 10 : 48 << 10); shared += 179 << 10) {
                const int64_t rows = rows_of[c];
                standin_set_shared(shared);
                besa_backend cuda = cuda_backend(1), cpu;
                besa_error error;
                CHECK_OK(besa_cpu_backend(&cpu, NULL, &error), error);
                besa_backend *side[2] = {&cpu, &cuda};
                /* two blocks, one of which takes a second row; or a block for each row */
                besa__cuda_of(&cuda)->processors = c < 2 ? 1 : static_cast<int>(rows / 2);
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
                    work.rows = rows, work.columns = columns[c], work.rate_logits = 1;
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
                work.rows = rows, work.columns = 512, work.rate_logits = buckets + 1;
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

#ifdef CUDA_STANDIN
/* The shapes of a 70B model, 128 x 2048 tokens at once: addresses alone, nothing runs. X has 2^31 elements. */
static void test_addresses(void)
{
    TEST("70B shapes, 128 x 2048 tokens, addresses") {
        standin_set_dry(1);
        standin_set_memory(static_cast<size_t>(1) << 42);
        besa_backend be = cuda_backend(0);
        const int64_t d = 8192, inner = 28672, tokens = 128 * 2048;
        besa_attention_shape s = {128, 2048, 64, 8, 128, 0, 0, 0};
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
        CHECK_OK(be.linear_backward_weight(&be, dw, BESA_F32, z, x, tokens, inner, d, 0, inner, 0), be.error);
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
#endif

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
static void check_plan(const char *model, besa_prune_options o, size_t budget, int on_host)
{
    besa_backend be = cuda_backend(0);
    besa_checkpoint *checkpoint = NULL;
    besa_error error;
    besa_plan_result plan;
    besa_calibration c;
    memset(&c, 0, sizeof c);
    memset(&plan, 0, sizeof plan);
    c.nsamples = 128, c.seqlen = 2048;
    o.rates.target = 0.5, o.device_memory = budget;
    CHECK_OK(besa_checkpoint_open(&checkpoint, model, &error), error);
    CHECK_OK(besa_plan(checkpoint, &be, &c, &o, &plan, &error), error);
    CHECK(plan.device_bytes <= budget && plan.micro_batch == 1, "%zu bytes, %lld sequences at a time", plan.device_bytes,
          static_cast<long long>(plan.micro_batch));
    CHECK(plan.x_on_host + plan.yref_on_host == on_host, "X on the host: %d, Yref: %d", plan.x_on_host, plan.yref_on_host);
    if (getenv("TEST_VERBOSE"))
        printf("    method %d: %.2f GB of %.0f on the device, %.2f GB on the host, X there: %d, Yref: %d\n", static_cast<int>(o.method),
               1e-9 * static_cast<double>(plan.device_bytes), 1e-9 * static_cast<double>(budget),
               1e-9 * static_cast<double>(plan.host_bytes), plan.x_on_host, plan.yref_on_host);
    besa_checkpoint_close(checkpoint);
    be.destroy(&be);
}

/* Level 3 on either side: a layer's baselines, and what can be read of rates. */
struct layer_side { std::vector<float> pruned[4], beta, sums; std::vector<int32_t> ranks; };

static void run_layer(besa_backend *be, layer_side *out)
{
    enum { R = 24, C = 160, T = 96 };
    static const besa_method methods[] = {BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT, BESA_METHOD_MAGNITUDE, BESA_METHOD_WANDA};
    std::vector<float> x(T * C), w(R * C), none(C * C, 0.0f);
    besa_layer_shape shape = {R, C, BESA_F32};
    besa_error error;
    void *x_ = NULL, *w_ = NULL, *statistic = NULL, *pruned = NULL;
    for (int i = 0; i < T * C; i++) x[i] = sinf(1.3f * static_cast<float>(i * i % 1009)) * static_cast<float>(1 + i % 7);
    for (int i = 0; i < R * C; i++) w[i] = cosf(0.7f * static_cast<float>(i * i % 977));
    for (auto [memory, count] : {std::pair<void **, int>{&x_, T * C}, {&w_, R * C}, {&statistic, C * C}, {&pruned, (R + 1) * C}})
        CHECK_OK(be->alloc(be, memory, static_cast<size_t>(count) * 4), be->error);
    CHECK_OK(be->upload(be, BESA_QUEUE_COMPUTE, x_, x.data(), x.size() * 4), be->error);
    CHECK_OK(be->upload(be, BESA_QUEUE_COMPUTE, w_, w.data(), w.size() * 4), be->error);
    for (int i = 0; i < 4; i++) {
        besa_prune_options o = {};
        o.method = methods[i], o.rates.target = i == 3 ? 0 : 0.4, o.pattern_n = i == 3 ? 2 : 0, o.pattern_m = i == 3 ? 4 : 0;
        CHECK_OK(be->upload(be, BESA_QUEUE_COMPUTE, statistic, none.data(), none.size() * 4), be->error);
        CHECK_OK(besa_layer_inputs(be, &o, static_cast<float *>(statistic), x_, T, T, C, &error), error);
        CHECK_OK(besa_layer_prune(be, &shape, &o, w_, static_cast<float *>(statistic), pruned, &error), error);
        out->pruned[i].resize(R * C);
        CHECK_OK(be->download(be, BESA_QUEUE_COMPUTE, out->pruned[i].data(), pruned, R * C * 4), be->error);
        CHECK_OK(be->synchronize(be, BESA_QUEUE_COMPUTE), be->error);
    }
    besa_rates *rates = NULL;
    besa_rate_options o = {};
    o.target = 0.4, o.candidates = 20;
    out->ranks.resize(R * C), out->beta.resize(R * 21), out->sums.resize(R * 20);
    CHECK_OK(besa_rates_create(&rates, be, &shape, 1, &o, &error), error);
    CHECK_OK(besa_rates_rank(rates, 0, w_, BESA_IMPORTANCE_MAGNITUDE, NULL, static_cast<float *>(pruned), &error), error);
    for (int step = 0; step < 2; step++) {
        CHECK_OK(besa_rates_forward(rates, &error), error);
        CHECK_OK(besa_rates_gradient(rates, 0, w_, static_cast<float *>(w_), &error), error);
        if (step == 0) CHECK_OK(besa_rates_step(rates, &error), error);
    }
    CHECK_OK(besa_rates_ranks(rates, 0, out->ranks.data(), &error), error);
    CHECK_OK(besa_rates_beta(rates, 0, out->beta.data(), &error), error);
    CHECK_OK(besa_rates_sums(rates, 0, out->sums.data(), &error), error);
    besa_rates_destroy(rates);
    for (void *memory : {x_, w_, statistic, pruned}) be->free(be, memory);
}

static double farthest(const std::vector<float> &a, const std::vector<float> &b)
{
    double most = a.size() == b.size() ? 0 : 1e9;
    for (size_t i = 0; i < a.size() && i < b.size(); i++) most = fmax(most, fabs(static_cast<double>(a[i] - b[i])));
    return most;
}

static void test_one_layer(void)
{
    TEST("level 3: baselines of a layer, ranks, beta and sums, as on the CPU") {
        besa_backend cpu, cuda = cuda_backend(1);
        layer_side one, other;
        CHECK_OK(besa_cpu_backend(&cpu, NULL, NULL), besa_error());
        run_layer(&cpu, &one);
        run_layer(&cuda, &other);
        for (int i = 0; i < 4; i++)
            CHECK(farthest(one.pruned[i], other.pruned[i]) < 1e-4, "method %d: weights are %g apart", i, farthest(one.pruned[i], other.pruned[i]));
        CHECK(one.ranks == other.ranks, "other ranks");
        CHECK(farthest(one.beta, other.beta) < 1e-6 && farthest(one.sums, other.sums) < 1e-4, "beta %g, sums %g apart",
              farthest(one.beta, other.beta), farthest(one.sums, other.sums));
        cuda.destroy(&cuda), cpu.destroy(&cpu);
    }
}

/* The plan of a description with the device's numbers is the plan of the device. */
static void check_absent(const char *model, besa_prune_options o, int fp32, size_t budget)
{
    besa_backend be = cuda_backend(fp32), absent;
    besa_absent_device device = {};
    besa_checkpoint *checkpoint = NULL;
    besa_error error;
    besa_plan_result plan[2];
    besa_calibration c = {};
    size_t total;
    int major = 0, minor = 0;
    c.nsamples = 128, c.seqlen = 2048, c.test_windows = 4, c.test_seqlen = 2048;
    o.rates.target = 0.5, o.device_memory = budget;
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
          cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess, "no attributes");
    device.capability = 10 * major + minor, device.processors = besa__cuda_of(&be)->processors, device.fp32 = fp32;
    CHECK_OK(be.memory_info(&be, &device.memory, &total), be.error);
    CHECK_OK(besa_absent_backend(&absent, &device, &error), error);
    CHECK_OK(besa_checkpoint_open(&checkpoint, model, &error), error);
    for (int i = 0; i < 2; i++) {
        memset(&plan[i], 0, sizeof plan[i]);
        CHECK_OK(besa_plan(checkpoint, i ? &absent : &be, &c, &o, &plan[i], &error), error);
    }
    CHECK(!memcmp(&plan[0], &plan[1], sizeof plan[0]) && plan[0].device_bytes > 0, "capability %d, fp32 %d: %zu bytes, of the description %zu",
          device.capability, fp32, plan[0].device_bytes, plan[1].device_bytes);
    for (int64_t columns = 7000; columns < 60000; columns += 3000) { /* rows that fit into some devices' shared memory */
        besa_layer_shape layer = {600, columns, BESA_BF16};
        besa_rate_options rates = {};
        rates.target = 0.5;
        CHECK(besa_rates_size(&be, &layer, 1, &rates) == besa_rates_size(&absent, &layer, 1, &rates), "capability %d: other rates of %d "
              "columns", device.capability, static_cast<int>(columns));
    }
    void *memory = NULL;
    CHECK(absent.alloc(&absent, &memory, 256) == BESA_ERROR_DEVICE && !memory, "a description has memory");
    besa_checkpoint_close(checkpoint);
    be.destroy(&be);
    absent.destroy(&absent);
}

static void test_absent(void)
{
    const char *large = temp_path("70B-absent"), *wide = temp_path("wide-absent");
    besa_prune_options o = {}, sparsegpt = {}, best = {};
    hollow_llama(large, 8192, 28672, 64, 8);
    hollow_llama(wide, 512, 66048, 8, 8);
    sparsegpt.method = BESA_METHOD_SPARSEGPT;
    CHECK_OK(besa_preset(&best, "best", NULL), besa_error());
#ifdef CUDA_STANDIN
    const struct { int major, minor, kilobytes, processors; } devices[] = {{7, 5, 64, 40}, {8, 0, 163, 108}, {8, 6, 99, 82}, {9, 0, 227, 132}};
    for (const auto &d : devices) {
        standin_set_arch(d.major, d.minor);
        standin_set_shared(static_cast<size_t>(d.kilobytes) << 10);
        standin_set_processors(d.processors);
        standin_set_memory(static_cast<size_t>(80) << 30);
#else
    {
#endif
        check_absent(large, o, 0, 0);
        check_absent(large, o, 0, 20000000000);
        check_absent(large, sparsegpt, 1, 0);
        check_absent(large, best, 0, 0);
        check_absent(wide, o, 0, 0);
    }
#ifdef CUDA_STANDIN
    standin_set_arch(8, 0);
    standin_set_shared(99 << 10);
    standin_set_processors(4);
    standin_set_memory(static_cast<size_t>(16) << 30);
#endif
}

static void test_plans(void)
{
    TEST("plans for a GPU that is not here") test_absent();
    TEST("70B within 24 GB, 7B within 8 GB, and with less") {
        const size_t GB = 1000000000;
        const char *large = temp_path("70B"), *small = temp_path("7B");
        hollow_llama(large, 8192, 28672, 64, 8);
        hollow_llama(small, 4096, 11008, 32, 32);
        besa_prune_options o = {}, sparsegpt = {};
        sparsegpt.method = BESA_METHOD_SPARSEGPT;
        check_plan(large, o, 24 * GB, 0);
        check_plan(large, sparsegpt, 24 * GB, 0);
        check_plan(large, o, 15 * GB, 1);
        check_plan(large, o, 12 * GB, 2);
        check_plan(small, o, 8 * GB, 0);
        check_plan(small, o, 4 * GB, 2);
    }
    TEST("weights that learn on grids: 70B within 48 GB, 7B within 16 GB") {
        const size_t GB = 1000000000;
        const char *large = temp_path("70B-best"), *small = temp_path("7B-best");
        besa_prune_options o = {};
        besa_error error;
        hollow_llama(large, 8192, 28672, 64, 8);
        hollow_llama(small, 4096, 11008, 32, 32);
        CHECK_OK(besa_preset(&o, "best", &error), error);
        o.bits = 4, o.group_size = 128;
        check_plan(large, o, 48 * GB, 0);
        check_plan(small, o, 16 * GB, 0);
    }
}

#ifdef CUDA_STANDIN
/* ---- sizes beyond 2^32 elements, kernels run ------------------------------------------------- */

/* Arrays of rows, of which the first two and the last two hold numbers and the rest is zero and never touched. The CPU
 * backend has these four rows alone. Of each launch the first and last few blocks run: an index that wraps around reads or
 * writes elsewhere. */
enum { ENDS = 2 };

typedef struct twin {
    void *of[2];                                /* on the CPU, on the device */
    int64_t rows, width;                        /* rows 0: a single row, alike on both sides */
    size_t size;                                /* of an element */
    float *f(int side) const { return static_cast<float *>(of[side]); }
    int32_t *i(int side) const { return static_cast<int32_t *>(of[side]); }
} twin;

typedef struct vast {
    besa_backend be[2];                         /* CPU, CUDA in float */
    std::vector<void *> memory[2];
    uint32_t random;
} vast;

/* Runs of an array's rows that hold something: their places in it and in the CPU's. */
static int vast_parts(const twin &a, int side, size_t at[2], size_t *bytes)
{
    size_t row = static_cast<size_t>(a.width) * a.size;
    *bytes = row * static_cast<size_t>(a.rows ? +ENDS : 1);
    at[0] = 0, at[1] = row * static_cast<size_t>(side ? a.rows - ENDS : +ENDS);
    return a.rows > 0 ? 2 : 1;
}

/* Whole numbers low .. high, or fractions between them */
template <typename T> static twin vast_array(vast *h, int64_t rows, int64_t width, double low, double high)
{
    twin a = {{NULL, NULL}, rows, width, sizeof(T)};
    std::vector<T> data(static_cast<size_t>((rows ? +2 * ENDS : 1) * width));
    size_t at[2], bytes;
    for (T &x : data) {
        h->random = h->random * 1664525u + 1013904223u;
        x = static_cast<T>(low + (high - low) * (static_cast<double>(h->random >> 8) / 16777216.0));
    }
    for (int side = 0; side < 2; side++) {
        besa_backend *be = &h->be[side];
        int parts = vast_parts(a, side, at, &bytes);
        size_t all = static_cast<size_t>(rows == 0 ? 1 : side ? rows : 2 * ENDS) * static_cast<size_t>(width) * sizeof(T);
        CHECK_OK(be->alloc(be, &a.of[side], all), be->error);
        h->memory[side].push_back(a.of[side]);
        for (int p = 0; p < parts && a.of[side]; p++)
            CHECK_OK(be->upload(be, BESA_QUEUE_COMPUTE, static_cast<char *>(a.of[side]) + at[p],
                                reinterpret_cast<char *>(data.data()) + static_cast<size_t>(p) * bytes, bytes), be->error);
        CHECK_OK(be->synchronize(be, BESA_QUEUE_COMPUTE), be->error);
    }
    return a;
}

/* What both sides hold in those rows is the same, floats nearly so. */
template <typename T> static void vast_same(vast *h, const twin &a, const char *what)
{
    std::vector<T> got[2];
    size_t at[2], bytes;
    for (int side = 0; side < 2; side++) {
        besa_backend *be = &h->be[side];
        int parts = vast_parts(a, side, at, &bytes);
        got[side].resize(static_cast<size_t>(parts) * bytes / sizeof(T));
        for (int p = 0; p < parts; p++)
            CHECK_OK(be->download(be, BESA_QUEUE_COMPUTE, reinterpret_cast<char *>(got[side].data()) + static_cast<size_t>(p) * bytes,
                                  static_cast<char *>(a.of[side]) + at[p], bytes), be->error);
        CHECK_OK(be->synchronize(be, BESA_QUEUE_COMPUTE), be->error);
    }
    for (size_t i = 0; i < got[0].size(); i++) {
        double x = static_cast<double>(got[0][i]), y = static_cast<double>(got[1][i]);
        double limit = std::is_floating_point<T>::value ? 1e-4 * fabs(x) + 1e-6 : 0;
        if (!CHECK(fabs(x - y) <= limit, "%s: element %zu of those compared is %g, on the CPU %g", what, i, y, x)) break;
    }
}

/* The operation on both sides, with `blocks` at either end of each launch; rows: as each side has them. */
template <typename Operation> static void vast_run(vast *h, const char *what, size_t blocks, int64_t rows, Operation operation)
{
    standin_set_sparse(blocks);
    for (int side = 0; side < 2; side++) {
        besa_backend *be = &h->be[side];
        besa_result result = operation(be, side, side ? rows : 2 * ENDS);
        if (result == BESA_OK) result = be->synchronize(be, BESA_QUEUE_COMPUTE);
        CHECK(result == BESA_OK, "%s: %s", what, be->error.message);
    }
}

static void vast_begin(vast *h, int64_t rows, int64_t columns)
{
    besa_error error;
    CHECK_OK(besa_cpu_backend(&h->be[0], NULL, &error), error);
    h->be[1] = cuda_backend(1);
    besa__cuda_of(&h->be[1])->processors = 1 << 30;         /* as many blocks as there is work */
    h->random = 1;
    for (int side = 0; side < 2; side++) {
        besa_backend *be = &h->be[side];
        besa_workload work;
        memset(&work, 0, sizeof work);
        work.rows = side ? rows : 2 * ENDS, work.columns = columns, work.tokens = 2 * ENDS, work.rate_logits = 100;
        be->workspace_bytes = be->workspace_size(be, &work);
        CHECK_OK(be->alloc(be, &be->workspace, be->workspace_bytes), be->error);
    }
}

static void vast_free(vast *h)
{
    for (int side = 0; side < 2; side++) {
        for (void *p : h->memory[side]) h->be[side].free(&h->be[side], p);
        h->memory[side].clear();
    }
}

static void vast_end(vast *h)
{
    vast_free(h);
    for (besa_backend &be : h->be) be.free(&be, be.workspace), be.destroy(&be);
    CHECK(standin_reports() == 0, "%s", standin_last_report());
    CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0, "something is alive");
}

/* Blocks and rows go around every 1024: the last rows are the last blocks' */
static const int64_t g_rows = 513 * 1024, g_columns = 8200;

#define VAST(what, blocks, call) vast_run(&h, what, blocks, R, [&](besa_backend *be, int s, int64_t rows) { (void)rows; return call; })

static void test_vast_activations(void)
{
    const int64_t R = g_rows, C = g_columns, heads = 41;
    vast h;
    vast_begin(&h, R, C);
    twin x = vast_array<float>(&h, R, C, -1, 1), y = vast_array<float>(&h, R, C, -1, 1), z = vast_array<float>(&h, R, C, -1, 1);
    twin g = vast_array<float>(&h, 0, C, 0.5, 1), inv = vast_array<float>(&h, R, 1, 0, 0), one = vast_array<float>(&h, 0, 1, 1, 1);
    twin short_ = vast_array<uint16_t>(&h, R, C, 0, 0), turn = vast_array<float>(&h, 0, 4 * C / heads / 2, -1, 1);
    twin none = vast_array<float>(&h, R, 8, 0, 0), w = vast_array<float>(&h, 0, 8 * C, -1, 1);
    VAST("convert to f16", 8, be->convert(be, short_.of[s], BESA_F16, x.of[s], BESA_F32, rows * C));
    vast_same<uint16_t>(&h, short_, "convert to f16");
    VAST("convert from f16", 8, be->convert(be, y.of[s], BESA_F32, short_.of[s], BESA_F16, rows * C));
    vast_same<float>(&h, y, "convert from f16");
    VAST("rmsnorm_forward", 2, be->rmsnorm_forward(be, y.of[s], inv.f(s), x.of[s], g.f(s), rows, C, 1e-5f));
    vast_same<float>(&h, y, "rmsnorm_forward");
    VAST("rmsnorm_backward", 2, be->rmsnorm_backward(be, z.of[s], y.of[s], x.of[s], g.f(s), inv.f(s), rows, C, 1));
    vast_same<float>(&h, z, "rmsnorm_backward");
    VAST("rope", 2, be->rope(be, x.of[s], turn.f(s), turn.f(s), rows, 4, heads, C / heads, C / heads, 1));
    vast_same<float>(&h, x, "rope");
    VAST("bias", 2, be->linear_forward(be, x.of[s], none.of[s], w.of[s], BESA_F32, g.f(s), rows, C, 8, 1));
    vast_same<float>(&h, x, "bias");
    VAST("swiglu_forward", 16, be->swiglu_forward(be, z.of[s], x.of[s], y.of[s], rows * C));
    vast_same<float>(&h, z, "swiglu_forward");
    VAST("swiglu_backward", 16, be->swiglu_backward(be, x.of[s], y.of[s], z.of[s], x.of[s], y.of[s], rows * C));
    vast_same<float>(&h, x, "swiglu_backward, gate");
    vast_same<float>(&h, y, "swiglu_backward, up");
    VAST("power", 16, be->power(be, z.f(s), y.f(s), 2.0f, rows * C));
    vast_same<float>(&h, z, "power");
    VAST("column_sumsq", 17, be->column_sumsq(be, g.f(s), x.of[s], rows, C));
    vast_same<float>(&h, g, "column_sumsq");
    VAST("block_loss", 3, be->block_loss(be, one.f(s), z.of[s], x.of[s], y.of[s], g.f(s), 0.5f, rows, C, 0));
    vast_same<float>(&h, z, "block_loss, dY");
    vast_same<float>(&h, one, "block_loss");
    twin target = vast_array<int32_t>(&h, R, 1, 0, 8000), state = vast_array<float>(&h, R, 3, 0, 0);
    VAST("nll_update", 2, be->nll_update(be, state.f(s), x.f(s), target.i(s), 0, C, rows, 1));
    vast_same<float>(&h, state, "nll_update");
    twin parts = vast_array<float>(&h, R, 4, 0, 0), best = vast_array<int32_t>(&h, R, 2, 0, 0);
    VAST("divergence_update", 2, be->divergence_update(be, parts.f(s), best.i(s), x.f(s), y.f(s), 0, C, rows, 1));
    vast_same<float>(&h, parts, "divergence_update");
    vast_same<int32_t>(&h, best, "divergence_update, ids");
    VAST("fill", 16, be->fill(be, static_cast<int32_t *>(x.of[s]), 7, rows * C));
    vast_same<int32_t>(&h, x, "fill");
    vast_end(&h);
}

static void test_vast_weights(void)
{
    const int64_t R = g_rows, C = g_columns, D = 100;
    vast h;
    vast_begin(&h, R, C);
    twin w = vast_array<float>(&h, R, C, -1, 1), score = vast_array<float>(&h, R, C, -1, -0.1), out = vast_array<float>(&h, R, C, 0, 0);
    twin rank = vast_array<uint16_t>(&h, R, C, 0, 0), scale = vast_array<float>(&h, 0, C, 0.5, 1);
    twin n = vast_array<int32_t>(&h, R, 1, 0, 8000), zeros = vast_array<int32_t>(&h, R, 1, 1, 9);
    twin special = vast_array<int32_t>(&h, 0, 1, 3, 3), sums = vast_array<float>(&h, R, D, -1, 1);
    twin bucket = vast_array<uint16_t>(&h, 0, C, 0, 0);
    std::vector<uint16_t> table(static_cast<size_t>(C));
    for (int64_t d = 0; d < D; d++)
        for (int64_t j = 0; j < (D - d) * C / D; j++) table[static_cast<size_t>(j)] = static_cast<uint16_t>(d);
    for (int s = 0; s < 2; s++)
        CHECK_OK(h.be[s].upload(&h.be[s], BESA_QUEUE_COMPUTE, bucket.of[s], table.data(), table.size() * 2), h.be[s].error);
    VAST("mask_smallest", 2, be->mask_smallest(be, out.of[s], w.of[s], BESA_F32, score.f(s), C + 7, rows, C)); /* all below 0 */
    vast_same<float>(&h, out, "mask_smallest");
    VAST("mask_pattern", 2, be->mask_pattern(be, out.of[s], w.of[s], BESA_F32, score.f(s), 2, 4, rows, C));
    vast_same<float>(&h, out, "mask_pattern");
    VAST("count_zeros", 2, be->count_zeros(be, zeros.i(s), special.i(s), out.of[s], BESA_F32, rows, C));
    vast_same<int32_t>(&h, zeros, "count_zeros");
    vast_same<int32_t>(&h, special, "count_zeros, not finite");
    VAST("score", 2, be->score(be, score.f(s), w.of[s], BESA_F32, scale.f(s), 1, rows, C));
    vast_same<float>(&h, score, "score");
    VAST("score_rows", 2, be->score_rows(be, NULL, zeros.i(s), w.of[s], BESA_F32, scale.f(s), 0.5f, rows, C));
    vast_same<int32_t>(&h, zeros, "score_rows");
    VAST("rank_rows", 2, be->rank_rows(be, rank.of[s], score.f(s), rows, C));
    vast_same<uint16_t>(&h, rank, "rank_rows");
    VAST("mask_apply", 2, be->mask_apply(be, out.of[s], w.of[s], BESA_F32, rank.of[s], n.i(s), rows, C));
    vast_same<float>(&h, out, "mask_apply");
    VAST("bucket_gradient", 1, be->bucket_gradient(be, sums.f(s), score.f(s), BESA_F32, w.of[s], BESA_F32, rank.of[s],
                                                   static_cast<uint16_t *>(bucket.of[s]), rows, C, D));
    vast_same<float>(&h, sums, "bucket_gradient");
    twin alpha = vast_array<float>(&h, R, 1, 0, 0);
    vast_run(&h, "rate_forward", 1, R, [&](besa_backend *be, int s, int64_t rows) {
        besa_rate_shape shape = {rows, C, 1, C, 0.7f, 0, 1.5f, 0};
        return be->rate_forward(be, alpha.f(s), n.i(s), NULL, w.f(s), zeros.i(s), &shape);
    });
    vast_same<float>(&h, alpha, "rate_forward, alpha");
    vast_same<int32_t>(&h, n, "rate_forward, n");
    vast_end(&h);
}

static void test_vast_rest(void)
{
    const int64_t R = g_rows, C = g_columns, wide = 8 * R, narrow = C / 8 + 7, slab = 32, windows = R * 4, seqlen = 1024;
    vast h;
    vast_begin(&h, wide, narrow);
    twin x = vast_array<float>(&h, R, C, -1, 1), x0 = vast_array<float>(&h, R, C, -1, 1), g = vast_array<float>(&h, R, C, -1, 1);
    twin m = vast_array<float>(&h, R, C, 0, 0), v = vast_array<float>(&h, R, C, 0, 0), d = vast_array<float>(&h, R, C, 0, 0);
    besa_optimizer_step o;
    memset(&o, 0, sizeof o);
    o.lr = 1, o.beta1 = 0.9f, o.beta2 = o.beta3 = 0.999f, o.eps = 1e-8f, o.d0 = 1e-6, o.d_coef = 1, o.step = 1;
    for (int kind = 0; kind < 2; kind++) {
        o.kind = kind ? BESA_ADAMW : BESA_PRODIGY;
        twin state = vast_array<double>(&h, 0, BESA_OPTIMIZER_SCALARS, 1e-6, 1e-6);
        vast_run(&h, "optimizer_step", 1, R, [&](besa_backend *be, int s, int64_t rows) {
            o.n = rows * C, o.theta = x.f(s), o.theta0 = x0.f(s), o.grad = g.f(s), o.m = m.f(s), o.v = v.f(s), o.s = d.f(s);
            o.scalars = static_cast<double *>(state.of[s]);
            return be->optimizer_step(be, &o);
        });
        vast_same<float>(&h, x, kind ? "adamw" : "prodigy");
        vast_same<float>(&h, m, kind ? "adamw, m" : "prodigy, m");
        vast_same<float>(&h, d, "prodigy, s");
    }
    vast_free(&h);
    twin w = vast_array<float>(&h, wide, narrow, -1, 1), u = vast_array<float>(&h, 0, narrow * narrow, 0.5, 1);
    twin err = vast_array<float>(&h, wide, slab, 0, 0), dead = vast_array<int32_t>(&h, 0, narrow, 0, 0);
    vast_run(&h, "sparsegpt_slab", 1, wide, [&](besa_backend *be, int s, int64_t rows) {
        return be->sparsegpt_slab(be, w.f(s), err.f(s), u.f(s), dead.i(s), 992, slab, 0.5, 2, 4, NULL, rows, narrow);
    });
    vast_same<float>(&h, w, "sparsegpt_slab");
    vast_same<float>(&h, err, "sparsegpt_slab, err");
    twin state = vast_array<float>(&h, windows, 3 * seqlen, 1, 2), target = vast_array<int32_t>(&h, windows, seqlen, 0, 9);
    twin sum = vast_array<double>(&h, windows, 1, 0, 0);
    vast_run(&h, "nll_sum", 2, windows, [&](besa_backend *be, int s, int64_t rows) {
        return be->nll_sum(be, static_cast<double *>(sum.of[s]), state.f(s), target.i(s), rows, seqlen);
    });
    vast_same<double>(&h, sum, "nll_sum");
    vast_end(&h);
}

/* The last element of a diagonal beyond 2^32, and bytes that go into copies and sets, which do not run here */
static size_t g_bytes;
static void count_bytes(const standin_record *r, void *) { g_bytes = r->bytes; }

static void test_vast_bytes(void)
{
    const int64_t C = 65544;
    const size_t bytes = (static_cast<size_t>(1) << 32) + 12345;
    besa_backend be = cuda_backend(1);
    void *u, *diag, *dead;
    float corner = 3.5f, got = 0;
    standin_set_sparse(33);
    CHECK_OK(be.alloc(&be, &u, static_cast<size_t>(C * C) * 4), be.error);
    CHECK_OK(be.alloc(&be, &diag, static_cast<size_t>(C) * 4), be.error);
    CHECK_OK(be.alloc(&be, &dead, static_cast<size_t>(C) * 4), be.error);
    CHECK_OK(be.upload(&be, BESA_QUEUE_COMPUTE, static_cast<float *>(u) + C * C - 1, &corner, 4), be.error);
    CHECK_OK(be.diagonal(&be, static_cast<float *>(diag), static_cast<float *>(u), static_cast<int32_t *>(dead), C), be.error);
    CHECK_OK(be.download(&be, BESA_QUEUE_COMPUTE, &got, static_cast<float *>(diag) + C - 1, 4), be.error);
    CHECK_OK(be.synchronize(&be, BESA_QUEUE_COMPUTE), be.error);
    CHECK(got == corner, "the diagonal's last element is %g", static_cast<double>(got));
    standin_set_recorder(count_bytes, NULL);
    CHECK_OK(be.zero(&be, BESA_QUEUE_UPLOAD, u, bytes), be.error);
    CHECK(g_bytes == bytes, "zero of %zu bytes", g_bytes);
    CHECK_OK(be.copy(&be, BESA_QUEUE_DOWNLOAD, static_cast<char *>(u) + bytes, u, bytes + 1), be.error);
    CHECK(g_bytes == bytes + 1, "copy of %zu bytes", g_bytes);
    standin_set_recorder(NULL, NULL);
    be.free(&be, u), be.free(&be, diag), be.free(&be, dead);
    be.destroy(&be);
}

static void test_vast(void)
{
    static const struct { const char *name; void (*run)(void); } tests[] = {
        {"4.3e9 elements, activations", test_vast_activations}, {"4.3e9 elements, weights", test_vast_weights},
        {"4.3e9 elements, optimisers, slab, windows", test_vast_rest}, {"2^32 bytes and more", test_vast_bytes}};
    standin_set_sparse(1);
    standin_set_memory(static_cast<size_t>(1) << 42);
    for (const auto &t : tests) TEST(t.name) t.run();
    standin_set_sparse(0);
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
#endif

#ifdef CUDA_STANDIN
/* Two backends on two devices, called in turn, while the caller makes either device current: memory lies where it should, and
 * both give the same. */
static void test_two_devices(void)
{
    TEST("two devices in turn") {
        besa_backend be[2];
        besa_error error;
        float *x[2], got[2] = {0, 0}, from = 3.0f;
        void *memory;
        standin_set_devices(2);
        for (int d = 0; d < 2; d++) {
            besa_cuda_options options = {d, 1};
            CHECK_OK(besa_cuda_backend(&be[d], &options, &error), error);
        }
        for (int turn = 0; turn < 4; turn++) {
            cudaSetDevice(turn / 2);
            for (int d = 0; d < 2; d++) {
                besa_workload work;
                memset(&work, 0, sizeof work);
                work.rows = work.columns = work.tokens = 1;
                CHECK_OK(be[d].alloc(&be[d], &memory, 4), be[d].error);
                x[d] = static_cast<float *>(memory);
                CHECK(standin_device_of(memory) == d, "memory of device %d lies on %d", d, standin_device_of(memory));
                be[d].workspace_bytes = be[d].workspace_size(&be[d], &work);
                CHECK_OK(be[d].alloc(&be[d], &be[d].workspace, be[d].workspace_bytes), be[d].error);
            }
            for (int d = 0; d < 2; d++) CHECK_OK(be[d].zero(&be[d], BESA_QUEUE_COMPUTE, x[d], 4), be[d].error);
            for (int d = 0; d < 2; d++) CHECK_OK(be[d].upload(&be[d], BESA_QUEUE_COMPUTE, x[d], &from, 4), be[d].error);
            for (int d = 0; d < 2; d++) CHECK_OK(be[d].power(&be[d], x[d], x[d], 0.5f, 1), be[d].error);
            for (int d = 0; d < 2; d++)
                CHECK_OK(be[d].linear_forward(&be[d], x[d], x[d], x[d], BESA_F32, NULL, 1, 1, 1, 1), be[d].error);
            for (int d = 0; d < 2; d++) CHECK_OK(be[d].record(&be[d], BESA_QUEUE_COMPUTE, 0), be[d].error);
            for (int d = 0; d < 2; d++) CHECK_OK(be[d].download(&be[d], BESA_QUEUE_COMPUTE, &got[d], x[d], 4), be[d].error);
            for (int d = 0; d < 2; d++) {
                CHECK_OK(be[d].synchronize(&be[d], BESA_QUEUE_COMPUTE), be[d].error);
                CHECK(fabsf(got[d] - 3.0f - sqrtf(3.0f)) < 1e-5f, "device %d gave %g", d, static_cast<double>(got[d]));
                be[d].free(&be[d], x[d]), be[d].free(&be[d], be[d].workspace);
            }
        }
        for (int d = 0; d < 2; d++) be[d].destroy(&be[d]);
        cudaSetDevice(0);
        standin_set_devices(1);
        CHECK(standin_reports() == 0 && standin_live_allocations() == 0 && standin_live_objects() == 0, "%s", standin_last_report());
    }
}
#endif

/* ---- the pipeline ---------------------------------------------------------------------------- */

typedef struct run {
    int on_host, tightest; /* activations that live on the host; 1: ask for the least memory that works */
    besa_prune_options options;
    besa_report report;
    besa_error error;
    const char *source, *output;                /* source NULL: stories260K */
    int64_t nsamples, seqlen;
    double *outliers;                           /* not NULL: their shares instead of a pruned model */
    int against;                                /* 1: the report says how far the pruned model is from the dense one */
} run;

static run run_of(besa_method method, int64_t nsamples, const char *output)
{
    run r;
    memset(&r, 0, sizeof r);
    r.options.method = method;
    r.options.rates.target = 0.5;
    r.options.epochs = g_sanitized ? 1 : 3;
    r.options.rates.d0 = 3e-3;                  /* few steps: large ones */
    r.nsamples = g_race ? 2 : nsamples, r.seqlen = g_race ? 16 : 64;
    r.output = output;
    return r;
}

static besa_result run_prune(run *r, besa_backend *be)
{
    besa_checkpoint *checkpoint = NULL;
    besa_tokens tokens = {};
    besa_calibration c;
    char path[512];
    memset(&c, 0, sizeof c);
    c.nsamples = r->nsamples, c.seqlen = r->seqlen;
    c.test_windows = r->outliers ? 0 : r->tightest ? 3 : g_race ? 2 : 8, c.test_seqlen = r->seqlen;
    std::vector<int32_t> ids(static_cast<size_t>((c.nsamples + c.test_windows) * c.seqlen));
    snprintf(path, sizeof path, "%s/calibration_tokens.npy", g_stories);
    for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<int32_t>(i * i % 31);
    besa_result result = besa_checkpoint_open(&checkpoint, r->source ? r->source : g_source, &r->error);
    if (result == BESA_OK && !r->source) result = besa_tokens_load(&tokens, path, &r->error);
    if (result == BESA_OK && !r->source)
        result = besa_tokens_sample(&tokens, c.nsamples + c.test_windows, c.seqlen, 3,
                                    besa_checkpoint_config(checkpoint)->vocab_size, ids.data(), &r->error);
    c.ids = ids.data();
    c.test_ids = ids.data() + c.nsamples * c.seqlen;
    besa_plan_result plan;
    besa_reference reference;
    memset(&reference, 0, sizeof reference);
    if (result == BESA_OK && r->against)
        result = besa_reference_create(&reference, checkpoint, be, c.test_ids, c.test_windows, c.test_seqlen, NULL, NULL, &r->error);
    if (r->against) c.against = &reference;
    size_t least = 0;
    while (r->tightest && result == BESA_OK && besa_plan(checkpoint, be, &c, &r->options, &plan, NULL) == BESA_OK) {
        least = plan.device_bytes;
        r->on_host = plan.x_on_host + plan.yref_on_host + plan.test_on_host;
        r->options.device_memory = least - 1;
    }
    if (r->tightest) r->options.device_memory = least;
    if (result == BESA_OK && r->outliers)
        result = besa_outliers(checkpoint, be, &c, &r->options, 3, r->outliers, &r->error);
    else if (result == BESA_OK)
        result = besa_prune(checkpoint, r->output, be, &c, &r->options, &r->report, &r->error);
    besa_reference_free(&reference);
    besa_tokens_free(&tokens);
    besa_checkpoint_close(checkpoint);
    return result;
}

/* Weights and norms that differ between two pruned checkpoints, of how many; with masks, weights that are zero in one alone. */
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
        if (!y || x->bytes != y->bytes || (!strstr(x->name, "_proj.weight") && (masks || !strstr(x->name, "norm.weight")))) continue;
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
static void compare_pipelines(const char *name, besa_method method, int fp32, double masks, double losses,
                              besa_learn learn = BESA_LEARN_RATES, double share = 0, besa_refit refit = BESA_REFIT_NONE,
                              int bits = 0, int pattern = 0,
                              besa_granularity granularity = BESA_GRANULARITY_BLOCK, const char *source = NULL)
{
    besa_backend cpu, cuda = cuda_backend(fp32);
    besa_error error;
    CHECK_OK(besa_cpu_backend(&cpu, NULL, &error), error);
    int64_t nsamples = source && !fp32 ? 16 : 4; /* random models in bf16: losses are of two sequences then, not of one */
    run a = run_of(method, nsamples, temp_path("%s-cpu", name)), b = run_of(method, nsamples, temp_path("%s-cuda", name));
    for (run *r : {&a, &b}) {
        r->source = source;
        r->options.learn = learn;
        r->options.weight_epochs = 1;
        r->options.dense_share = share;
        r->options.refit = refit, r->options.damping = refit ? 0.5 : 0; /* fewer tokens than columns: else a rounding counts */
        r->options.learn_vectors = learn == BESA_LEARN_BOTH;
        r->options.bits = bits, r->options.group_size = bits ? 24 : 0;
        r->options.pattern_n = pattern ? 2 : 0, r->options.pattern_m = pattern;
        if (pattern) r->options.importance = BESA_IMPORTANCE_GRADIENT;
        if (learn != BESA_LEARN_RATES) r->options.dense_share = 0.5, r->options.batch_size = 2, r->options.epochs = 1;
        r->options.granularity = granularity;
        if (granularity != BESA_GRANULARITY_BLOCK) r->options.dense_share = 0;
        r->against = method == BESA_METHOD_WANDA && !bits;
    }
    CHECK_OK(run_prune(&a, &cpu), a.error);
    CHECK_OK(run_prune(&b, &cuda), b.error);
    int64_t differ, total;
    int changes = method == BESA_METHOD_SPARSEGPT || learn != BESA_LEARN_RATES || refit != BESA_REFIT_NONE || bits; /* what is kept */
    compare_weights(a.output, b.output, changes, &differ, &total);
    CHECK(total > 0 && static_cast<double>(differ) < masks * static_cast<double>(total), "%lld of %lld weights differ",
          static_cast<long long>(differ), static_cast<long long>(total));
    for (int64_t i = 0; i < a.report.num_blocks && i < b.report.num_blocks; i++) {
        check_close(b.report.block[i].loss_all, a.report.block[i].loss_all, losses, "loss_all", i);
        check_close(b.report.block[i].loss_masks, a.report.block[i].loss_masks, losses, "loss_masks", i);
        check_close(b.report.block[i].loss_uniform, a.report.block[i].loss_uniform, losses, "loss_uniform", i);
        check_close(b.report.block[i].sparsity, a.report.block[i].sparsity, 1e-3, "sparsity", i);
    }
    if (method == BESA_METHOD_BESA && learn == BESA_LEARN_RATES && a.report.num_blocks > 0 && !g_sanitized) {
        double range = 0; /* of a layer's rates, which begin equal */
        for (const besa_layer_report &l : a.report.block[0].layer) range = std::max(range, l.rate_max - l.rate_min);
        CHECK(range > 0.02, "nothing was learned: rates are within %g", range);
    }
    if (getenv("TEST_VERBOSE"))
        printf("    %lld of %lld weights differ\n", static_cast<long long>(differ), static_cast<long long>(total));
    check_close(b.report.perplexity, a.report.perplexity, losses, "perplexity", -1);
    double near = differ ? std::max(losses, 0.05) : losses, same = differ ? 0.1 : 0.04; /* one weight moves a window's figures */
    for (int64_t w = 0; w < a.report.test_windows && a.against && !source; w++) { /* those models' weights are random: ties */
        CHECK(a.report.window[w].kl > 0.01, "a divergence of %g", a.report.window[w].kl);
        check_close(b.report.window[w].kl, a.report.window[w].kl, near, "divergence", -1);
        check_close(b.report.window[w].reference_nll, a.report.window[w].reference_nll, losses, "reference", -1);
        CHECK(fabs(b.report.window[w].same - a.report.window[w].same) < same, "%g and %g the same", b.report.window[w].same,
              a.report.window[w].same);
    }
    besa_report_free(&a.report);
    besa_report_free(&b.report);
    cpu.destroy(&cpu);
    cuda.destroy(&cuda);
    CHECK(standin_reports() == 0, "%s", standin_last_report());
    CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0, "something is alive");
}

/* Stop when the second block is done. */
static int stop_late(void *, const besa_progress *progress) { return progress->block == 2; }

static float of_half(const void *data, size_t i)
{
    uint16_t bits;
    memcpy(&bits, static_cast<const char *>(data) + 2 * i, 2);
    return besa__f16_to_f32(bits);
}

/* Gates so small that F16 has fewer bits of them than bf16. */
static void small_gates(const char *name, float *v, int64_t rows, int64_t columns)
{
    float factor = strstr(name, "gate_proj") ? 1e-4f : strstr(name, "up_proj") ? 1e4f : 1;
    for (int64_t i = 0; i < rows * columns; i++) v[i] *= factor;
}

/* The weights of F16 checkpoints become bf16 once. Kept ones that do not learn are the source's own, whole layers too; the zeros
 * are as many as reported; and a run that goes on from what was written ends with the same bytes. */
static void compare_halves(const char *source, besa_learn learn, besa_refit refit = BESA_REFIT_NONE)
{
    static const besa_fixed_rate fixed[] = {{"v_proj", 0}};
    const char *output[2] = {temp_path("f16-%d-%d", learn, refit), temp_path("f16-resumed-%d-%d", learn, refit)};
    int64_t differ, total, zeros = 0, weights = 0, other = 0, dense = 0;
    double sparsity = 0;
    for (int i = 0; i < 2; i++) {
        besa_backend be = cuda_backend(0);
        run r = run_of(BESA_METHOD_BESA, 2, output[i]);
        r.source = source, r.options.learn = learn, r.options.refit = refit, r.options.damping = refit ? 0.5 : 0;
        r.options.epochs = r.options.weight_epochs = 1;
        r.options.fixed = fixed, r.options.num_fixed = 1, r.options.weight_lr = 2;
        r.options.progress = i ? stop_late : NULL;
        besa_result result = run_prune(&r, &be);
        CHECK(result == (i ? BESA_ERROR_CANCELLED : BESA_OK), "%s", r.error.message);
        r.options.progress = NULL;
        if (i) CHECK_OK(run_prune(&r, &be), r.error);
        sparsity = r.report.sparsity;
        besa_report_free(&r.report);
        be.destroy(&be);
    }
    compare_weights(output[0], output[1], 0, &differ, &total);
    CHECK(total > 0 && differ == 0, "%lld of %lld weights differ after a resume", static_cast<long long>(differ), static_cast<long long>(total));
    besa_checkpoint *in = NULL, *out = NULL;
    besa_error error;
    CHECK_OK(besa_checkpoint_open(&in, source, &error), error);
    CHECK_OK(besa_checkpoint_open(&out, output[0], &error), error);
    for (int64_t i = 0; in && out && i < besa_checkpoint_tensor_count(in); i++) {
        const besa_tensor *a = besa_checkpoint_tensor(in, i), *b = besa_checkpoint_find(out, a->name);
        if (!b || !strstr(a->name, "_proj.weight")) continue;
        for (size_t k = 0; k < a->bytes / 2; k++, weights++) {
            float x = of_half(a->data, k), y = of_half(b->data, k);
            zeros += y == 0;
            if (strstr(a->name, "v_proj")) dense += x != y;
            else other += y != 0 && x != y;
        }
    }
    CHECK(weights > 0 && fabs(static_cast<double>(zeros) / static_cast<double>(weights) - sparsity) < 1e-9, "%lld of %lld weights are 0, reported %g",
          static_cast<long long>(zeros), static_cast<long long>(weights), sparsity);
    CHECK(dense == 0, "%lld weights of layers that stay dense are others", static_cast<long long>(dense));
    CHECK((other > 0) == (learn != BESA_LEARN_RATES || refit != BESA_REFIT_NONE), "%lld kept weights are others", static_cast<long long>(other));
    besa_checkpoint_close(in);
    besa_checkpoint_close(out);
    CHECK(standin_reports() == 0, "%s", standin_last_report());
}

static void test_pipeline(void)
{
    TEST("pipeline, besa, fp32") compare_pipelines("besa32", BESA_METHOD_BESA, 1, 1e-3, 0.01);
    TEST("pipeline, besa, bf16") compare_pipelines("besa16", BESA_METHOD_BESA, 0, 0.1, 0.15);
    TEST("pipeline, wanda, fp32") compare_pipelines("wanda32", BESA_METHOD_WANDA, 1, 1e-3, 0.01);
    TEST("pipeline, magnitude, fp32") compare_pipelines("magnitude32", BESA_METHOD_MAGNITUDE, 1, 1e-3, 0.01);
    TEST("pipeline, sparsegpt, fp32") compare_pipelines("sparsegpt32", BESA_METHOD_SPARSEGPT, 1, 1e-2, 0.02);
    TEST("pipeline, bits, wanda, fp32") compare_pipelines("wanda4", BESA_METHOD_WANDA, 1, 1e-3, 0.01, BESA_LEARN_RATES, 0, BESA_REFIT_NONE, 4);
    TEST("pipeline, bits, besa and weights, fp32") compare_pipelines("both5", BESA_METHOD_BESA, 1, 2e-2, 0.03, BESA_LEARN_BOTH, 0, BESA_REFIT_NONE, 5);
    TEST("pipeline, besa and weights, fp32") compare_pipelines("both32", BESA_METHOD_BESA, 1, 1e-2, 0.02, BESA_LEARN_BOTH);
    TEST("pipeline, weights by a pattern, fp32")
        compare_pipelines("pattern32", BESA_METHOD_BESA, 1, 1e-2, 0.02, BESA_LEARN_BOTH, 0, BESA_REFIT_NONE, 0, 4);
    TEST("pipeline, attention, MLP and weights, fp32")
        compare_pipelines("halves32", BESA_METHOD_BESA, 1, 1e-2, 0.02, BESA_LEARN_BOTH, 0, BESA_REFIT_NONE, 0, 0, BESA_GRANULARITY_ATTN_MLP);
    TEST("pipeline, layers, fp32")
        compare_pipelines("layers32", BESA_METHOD_BESA, 1, 1e-2, 0.02, BESA_LEARN_RATES, 0, BESA_REFIT_NONE, 0, 0, BESA_GRANULARITY_LAYER);
    TEST("pipeline, F16 checkpoints, bf16") {
        besa_checkpoint *stories = NULL;
        besa_error error;
        CHECK_OK(besa_checkpoint_open(&stories, g_source, &error), error);
        if (stories) fixture_variant(temp_path("f16"), stories, g_source, BESA_F16, small_gates);
        besa_checkpoint_close(stories);
        compare_halves(temp_path("f16"), BESA_LEARN_RATES);
        if (!g_race) compare_halves(temp_path("f16"), BESA_LEARN_BOTH);
        if (!g_sanitized) compare_halves(temp_path("f16"), BESA_LEARN_RATES, BESA_REFIT_CG);
    }
    TEST("pipeline, wanda and cg, fp32") compare_pipelines("cg32", BESA_METHOD_WANDA, 1, 1e-2, 0.05, BESA_LEARN_RATES, 0, BESA_REFIT_CG);
    if (!g_sanitized) { /* the same kernels */
        TEST("pipeline, wanda and obs, fp32")
            compare_pipelines("obs32", BESA_METHOD_WANDA, 1, 1e-2, 0.02, BESA_LEARN_RATES, 0, BESA_REFIT_OBS);
        TEST("pipeline, sparsegpt and cg, bf16")
            compare_pipelines("cg16", BESA_METHOD_SPARSEGPT, 0, 0.1, 0.15, BESA_LEARN_RATES, 0, BESA_REFIT_CG);
        TEST("pipeline, bits, besa, bf16") compare_pipelines("besa4", BESA_METHOD_BESA, 0, 0.1, 0.15, BESA_LEARN_RATES, 0, BESA_REFIT_NONE, 4);
        TEST("pipeline, bits, sparsegpt, fp32") compare_pipelines("gpt3", BESA_METHOD_SPARSEGPT, 1, 5e-2, 0.05, BESA_LEARN_RATES, 0, BESA_REFIT_NONE, 3);
        TEST("pipeline, besa and weights, bf16") compare_pipelines("both16", BESA_METHOD_BESA, 0, 0.1, 0.15, BESA_LEARN_BOTH);
        TEST("pipeline, wanda's weights, fp32") compare_pipelines("learned32", BESA_METHOD_WANDA, 1, 1e-2, 0.02, BESA_LEARN_WEIGHTS);
        TEST("pipeline, mixed reference, fp32") compare_pipelines("mix32", BESA_METHOD_BESA, 1, 1e-3, 0.01, BESA_LEARN_RATES, 0.6);
    }
    for (const char *family : {"smollm3_sliding", "granite", "olmo2", "phi3_partial", "gemma2", "gemma3_text"}) {
        char *fp32 = static_cast<char *>(take(64)), *bf16 = static_cast<char *>(take(64)), source[600];
        if (g_race && strcmp(family, "gemma2")) continue; /* it has most of what is new */
        snprintf(source, sizeof source, "%s/../../tests/data/cases/families/%s", g_stories, family);
        snprintf(fp32, 64, "pipeline, %s, besa and weights, fp32", family);
        snprintf(bf16, 64, "pipeline, %s, wanda, bf16", family);
        TEST(fp32) compare_pipelines(family, BESA_METHOD_BESA, 1, 2e-2, 0.03, BESA_LEARN_BOTH, 0, BESA_REFIT_NONE, 0, 0, BESA_GRANULARITY_BLOCK,
                                         source);
        if (!g_sanitized)
            TEST(bf16) compare_pipelines(bf16, BESA_METHOD_WANDA, 0, 0.1, 0.15, BESA_LEARN_RATES, 0, BESA_REFIT_NONE, 0, 0, BESA_GRANULARITY_BLOCK,
                                         source);
    }
#ifdef CUDA_STANDIN
    TEST("a device that is too small") {
        run r = run_of(BESA_METHOD_BESA, 4, temp_path("small"));
        standin_set_memory(static_cast<size_t>(1) << 20);
        besa_backend be = cuda_backend(1);
        CHECK(run_prune(&r, &be) == BESA_ERROR_MEMORY, "it ran");
        size_t free_bytes, total_bytes;
        char given[64];
        CHECK_OK(be.memory_info(&be, &free_bytes, &total_bytes), be.error);
        snprintf(given, sizeof given, "the device has %zu bytes free", free_bytes);
        CHECK(strstr(r.error.message, given) && strstr(r.error.message, "the smallest that works"), "%s", r.error.message);
        be.destroy(&be);
        standin_set_memory(static_cast<size_t>(16) << 30);
    }
#endif
    TEST("outliers, with all memory and the least, streams in any order") {
        static const int schedules[] = {STANDIN_LATE, STANDIN_EAGER, STANDIN_OTHERS};
        double shares[2][BLOCKS];
        for (int i = 0; i < (g_sanitized ? 3 : 7); i++) { /* first the CPU */
            besa_backend be;
            besa_error error;
            run r = run_of(BESA_METHOD_WANDA, 6, NULL);
            /* 3 of the 24 are the reference: enough to live on the host */
            r.nsamples = 24, r.seqlen = g_race ? 6 : 24, r.tightest = i > 0 && i % 2 == 0, r.outliers = shares[i > 0];
            if (i > 0) be = cuda_backend(1);
            else CHECK_OK(besa_cpu_backend(&be, NULL, &error), error);
            if (i > 0) standin_set_streams(schedules[(i - 1) / 2]);
            CHECK_OK(run_prune(&r, &be), r.error);
            be.destroy(&be);
            CHECK(!r.tightest || r.on_host == 2, "%d of the activations are on the host", r.on_host);
            for (int b = 0; b < BLOCKS && i > 0; b++) /* of 45 k weights: some are near the limit */
                CHECK(shares[0][b] > 0.005 && fabs(shares[1][b] - shares[0][b]) < 2e-4, "run %d, block %d: %g, on the CPU %g", i, b,
                      shares[1][b], shares[0][b]);
            CHECK(standin_reports() == 0, "%s", standin_last_report());
        }
        standin_set_streams(STANDIN_LATE);
    }
    TEST("pipeline, activations on the host, streams in any order") {
        static const int schedules[] = {STANDIN_LATE, STANDIN_EAGER, STANDIN_OTHERS};
        int64_t differ, total;
        for (int i = 0; i < (g_sanitized ? 2 : 4); i++) { /* first the CPU */
            besa_backend be;
            besa_error error;
            run r = run_of(BESA_METHOD_BESA, 6, temp_path("host-%d", i));
            r.nsamples = 6, r.seqlen = g_race ? 6 : 24, r.options.epochs = g_race ? 1 : 2, r.tightest = i > 0;
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
    TEST("pipeline, a mixed reference and weights, activations on the host, streams late and eager") {
        int64_t differ, total;
        for (int i = 0; i < 2; i++) {
            besa_backend be = cuda_backend(1);
            run r = run_of(BESA_METHOD_BESA, 6, temp_path("mixed-%d", i));
            r.nsamples = 6, r.seqlen = g_race ? 6 : 24, r.options.epochs = 1, r.tightest = 1, r.options.dense_share = 0.5;
            r.options.learn = BESA_LEARN_BOTH, r.options.weight_epochs = 1, r.options.learn_vectors = 1;
            standin_set_streams(i ? STANDIN_EAGER : STANDIN_LATE);
            CHECK_OK(run_prune(&r, &be), r.error);
            CHECK(r.on_host == 3, "%d of the activations are on the host", r.on_host);
            besa_report_free(&r.report);
            be.destroy(&be);
        }
        compare_weights(temp_path("mixed-0"), temp_path("mixed-1"), 0, &differ, &total);
        CHECK(total > 0 && differ == 0, "%lld of %lld weights differ", static_cast<long long>(differ), static_cast<long long>(total));
        standin_set_streams(STANDIN_LATE);
        CHECK(standin_reports() == 0, "%s", standin_last_report());
    }
    if (g_sanitized) return;
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

#ifdef CUDA_STANDIN
typedef struct faults {
    besa_method method;
    int fp32;
    const char *source, *right, *output;        /* right: what comes out without a fault */
} faults;

static run fault_run(const faults *f, besa_backend *be, const char *output)
{
    run r = run_of(f->method, 1, output);
    besa__cuda *cuda = besa__cuda_of(be);
    r.source = f->source, r.seqlen = 4, r.options.epochs = 1, r.options.rates.candidates = 8;
    cuda->blas_bytes = cuda->score_bytes = 4096, cuda->panel = 300;
    return r;
}

/* Same weights as without the fault. */
static void check_right(const faults *f, size_t n, const char *when)
{
    int64_t differ, total;
    compare_weights(f->right, f->output, 0, &differ, &total);
    CHECK(differ == 0 && total > 0, "call %zu: %lld of %lld weights differ %s", n, static_cast<long long>(differ),
          static_cast<long long>(total), when);
}

/* A run whose n-th call fails, and with `on` all after it; then, with `again`, once more without a fault. Returns whether
 * the run had so many calls. */
static int fail_run(const faults *f, size_t n, int on, int again)
{
    for (int turn = 0; turn <= again; turn++) {
        besa_backend be = cuda_backend(f->fp32);
        run r = fault_run(f, &be, f->output);
        if (turn == 1) standin_fail_call(0);
        else if (on) standin_fail_from(n);
        else standin_fail_call(n);
        besa_result result = run_prune(&r, &be);
        int reached = turn == 0 && standin_calls() >= n;
        be.destroy(&be);
        standin_reset();
        besa_report_free(&r.report);
        CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0, "call %zu: something is left", n);
        if (!reached) {
            CHECK_OK(result, r.error);
        } else if (result != BESA_OK) {
            CHECK(r.error.code == result && r.error.message[0], "call %zu: no message", n);
            CHECK(!exists(f->output), "call %zu: output looks finished", n);
        } else CHECK(exists(f->output), "call %zu: success without an output", n);
        if (result == BESA_OK) {                /* the last calls free memory, and do so even when they fail */
            check_right(f, n, turn ? "after the second run" : "after a fault that was no harm");
            remove_tree(f->output);
            if (turn == 0) return reached;
        }
    }
    return 1;
}

/* The n-th call of the run fails: a result with a message, nothing left, no output. Each n of the first half, which has all of
 * the first block's calls, and of the end; every 9th of those between, where the second block makes the same calls. Every 16th
 * time the run is repeated without a fault, and ends as if there had been none; every 8th all calls from the n-th on fail.
 * Under AddressSanitizer every 15th n. */
static void test_faults(void)
{
    static const struct { const char *name; besa_method method; int fp32; } tests[2] = {
        {"pipeline, besa, calls fail, one at a time", BESA_METHOD_BESA, 0},
        {"pipeline, sparsegpt, calls fail, one at a time", BESA_METHOD_SPARSEGPT, 1}};
    faults f = {BESA_METHOD_BESA, 0, temp_path("tiny"), temp_path("right"), temp_path("fault")};
    const char *partial = temp_path("fault.partial");
    standin_set_guard(0);
    standin_quiet(1);
    fixture_random_llama(f.source, 2, 8, 16, 2, 1, 32, BESA_F32);
    for (int t = 0; t < 2; t++)
        TEST(tests[t].name) {
            f.method = tests[t].method, f.fp32 = tests[t].fp32;
            besa_backend be = cuda_backend(f.fp32);
            run r = fault_run(&f, &be, f.right);
            standin_fail_call(0);
            CHECK_OK(run_prune(&r, &be), r.error);
            size_t n = 1, calls = standin_calls();
            be.destroy(&be);
            besa_report_free(&r.report);
            while (fail_run(&f, n, n % 8 == 0, n % 16 == 0))
                n += g_sanitized ? 15 : n > calls / 2 && n + 50 < calls ? 9 : 1, remove_tree(partial);
            if (getenv("TEST_VERBOSE")) printf("    %zu calls\n", calls);
            CHECK(n > 200, "a run of %zu calls", n);
            remove_tree(f.right);
        }
    standin_fail_call(0);
    standin_quiet(0);
    standin_set_guard(1);
}
#endif

int main(int argc, char **argv)
{
    if (argc < 2) return printf("FAIL usage: test_cuda STORIES [NAME]\n"), 1;
    g_stories = g_source = argv[1];
    test.only = argc > 2 ? argv[2] : NULL;
    if (TEST_ALL) temp_create();
#ifdef CUDA_STANDIN
    if (TEST_ALL) g_source = fixture_first_blocks(temp_path("blocks"), g_stories, BLOCKS);
    if (TEST_ALL) {
        test_creation();
        test_elapsed();
        test_two_devices();
        if (!g_race) test_faults();
        if (!g_race) test_vast();
    }
#else
    besa_backend be;
    besa_error error;
    if (besa_cuda_backend(&be, NULL, &error) != BESA_OK) return test_skip("operations and pipelines on a GPU", error.message), 0;
    be.destroy(&be);
#endif
    test_operations();
    test_pieces();
    test_shared_memory();
    if (TEST_ALL) {
        test_queues();
        test_long_rows();
        test_layer_rates();
        test_one_layer();
        test_plans();
        test_pipeline();
#ifdef CUDA_STANDIN
        test_addresses(); /* last: memory is not backed from here on */
#endif
    }
    return test_finish();
}
