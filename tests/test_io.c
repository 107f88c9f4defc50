/* Checkpoints, configs, token files and the output directory. usage: test_io CHECKPOINTS SCRATCH
 *   CHECKPOINTS  folder of the five reference checkpoints
 *   SCRATCH      an existing directory to work in */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Every system call that besa.h makes on files, and every allocation, is counted; the chosen one fails or is the last. */
enum { FAULT_NONE, FAULT_KILL, FAULT_ERROR, FAULT_MEMORY };
static int fault_kind, fault_at, fault_calls, short_writes;

static int fault(int kind)
{
    if (fault_kind == FAULT_NONE || (kind == FAULT_MEMORY) != (fault_kind == FAULT_MEMORY) || ++fault_calls != fault_at) return 0;
    if (fault_kind == FAULT_KILL) raise(SIGKILL);
    errno = EIO;
    return 1;
}

static ssize_t io_pwrite(int fd, const void *p, size_t n, off_t at)
{
    if (fault(FAULT_ERROR)) return -1;
    static int turn;
    if (short_writes && ++turn % 3 == 0) return errno = EINTR, -1;
    return pwrite(fd, p, short_writes && n > 1 ? n / 2 : n, at);
}
static ssize_t io_pread(int fd, void *p, size_t n, off_t at)
{
    if (fault(FAULT_ERROR)) return -1;
    return pread(fd, p, short_writes && n > 1 ? n / 2 : n, at);
}
static int io_open(const char *path, int flags) { return fault(FAULT_ERROR) ? -1 : open(path, flags); }
static int io_openat4(int fd, const char *path, int flags, mode_t mode) { return fault(FAULT_ERROR) ? -1 : openat(fd, path, flags, mode); }
static int io_fsync(int fd) { return fault(FAULT_ERROR) ? -1 : fsync(fd); }
static int io_ftruncate(int fd, off_t n) { return fault(FAULT_ERROR) ? -1 : ftruncate(fd, n); }
static int io_fallocate(int fd, off_t at, off_t n) { return fault(FAULT_ERROR) ? EIO : posix_fallocate(fd, at, n); }
static int io_renameat(int a, const char *b, int c, const char *d) { return fault(FAULT_ERROR) ? -1 : renameat(a, b, c, d); }
static int io_unlinkat(int a, const char *b, int c) { return fault(FAULT_ERROR) ? -1 : unlinkat(a, b, c); }
static int io_mkdirat(int a, const char *b, mode_t c) { return fault(FAULT_ERROR) ? -1 : mkdirat(a, b, c); }
static int io_fstat(int fd, struct stat *st) { return fault(FAULT_ERROR) ? -1 : fstat(fd, st); }
static int io_flock(int fd, int how) { return fault(FAULT_ERROR) ? -1 : flock(fd, how); }
static void *io_mmap(void *p, size_t n, int a, int b, int c, off_t d) { return fault(FAULT_ERROR) ? MAP_FAILED : mmap(p, n, a, b, c, d); }
static void *io_malloc(size_t n) { return fault(FAULT_MEMORY) ? NULL : malloc(n); }
static void *io_realloc(void *p, size_t n) { return fault(FAULT_MEMORY) ? NULL : realloc(p, n); }

#define IO_OPENAT(fd, path, flags, mode, ...) io_openat4(fd, path, flags, mode)
#define pwrite io_pwrite
#define pread io_pread
#define open io_open
#define openat(...) IO_OPENAT(__VA_ARGS__, 0, 0)
#define fsync io_fsync
#define ftruncate io_ftruncate
#define posix_fallocate io_fallocate
#define renameat io_renameat
#define unlinkat io_unlinkat
#define mkdirat io_mkdirat
#define fstat io_fstat
#define flock(fd, how) io_flock(fd, how)
#define mmap io_mmap
#define BESA_MALLOC io_malloc
#define BESA_REALLOC io_realloc
#define BESA_FREE free
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "fuzz_io.c"

static int passed, failed, skipped;
static besa_error err;
static char root[512]; /* a directory of this run's own */

static void check(const char *name, int ok)
{
    printf("%s %s\n", ok ? "PASS" : "FAIL", name);
    if (ok) passed++;
    else failed++;
}

/* result is as expected, and the message has the words. */
static void check_error(const char *name, besa_result result, besa_result expected, const char *words)
{
    int ok = result == expected && (result == BESA_OK || (err.code == result && (!words || strstr(err.message, words))));
    check(name, ok);
    if (!ok) printf("  expected %s (%s), got %s: %s\n", besa_result_string(expected), words ? words : "", besa_result_string(result),
                    result ? err.message : "");
}

/* ---- files ------------------------------------------------------------------------------- */

/* root/name; each name's path stays valid */
static const char *at(const char *name)
{
    static char paths[64][640];
    int i = 0;
    char path[640];
    snprintf(path, sizeof path, "%s/%s", root, name);
    while (i < 63 && paths[i][0] && strcmp(paths[i], path)) i++;
    memcpy(paths[i], path, sizeof path);
    return paths[i];
}

static void put(const char *path, const void *bytes, size_t n)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n) printf("FAIL cannot write %s\n", path), failed++;
    if (f) fclose(f);
}

static char *get(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    char *bytes = NULL;
    *n = 0;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    bytes = (char *)malloc(*n + 1);
    if (bytes && fread(bytes, 1, *n, f) != *n) *n = 0;
    if (bytes) bytes[*n] = 0;
    fclose(f);
    return bytes;
}

static int exists(const char *path)
{
    struct stat st;
    return !lstat(path, &st);
}

static void shell(const char *format, const char *a, const char *b)
{
    char command[2400];
    snprintf(command, sizeof command, format, a, b);
    if (system(command)) printf("  (failed: %s)\n", command);
}

static void clean(const char *path) { shell("rm -rf '%s'%s", path, ""); }

static int same_file(const char *a, const char *b)
{
    size_t n, m;
    char *x = get(a, &n), *y = get(b, &m);
    int same = x && y && n == m && !memcmp(x, y, n);
    free(x);
    free(y);
    return same;
}

/* ---- a small checkpoint ------------------------------------------------------------------ */

typedef struct shard_text {
    char header[32768];
    size_t n, data;
} shard_text;

static void add_tensor(shard_text *s, const char *name, const char *dtype, int width, int rows, int columns)
{
    size_t bytes = (size_t)(rows * (columns ? columns : 1) * width);
    char shape[32];
    if (columns) snprintf(shape, sizeof shape, "%d,%d", rows, columns);
    else snprintf(shape, sizeof shape, "%d", rows);
    s->n += (size_t)snprintf(s->header + s->n, sizeof s->header - s->n,
                             "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", s->n ? "," : "{",
                             name, dtype, shape, s->data, s->data + bytes);
    s->data += bytes;
}

static void put_raw(const char *path, const char *header, size_t data, unsigned seed)
{
    size_t n = strlen(header);
    unsigned char *file = (unsigned char *)malloc(8 + n + data + 1);
    for (size_t i = 0; i < 8; i++) file[i] = (unsigned char)((uint64_t)n >> (8 * i));
    memcpy(file + 8, header, n);
    for (size_t i = 0; i < data; i++) file[8 + n + i] = (unsigned char)((seed += 0x9E3779B9u) >> 24);
    put(path, file, 8 + n + data);
    free(file);
}

static const char small_config[] =
    "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":8,\"intermediate_size\":12,"
    "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"num_hidden_layers\":3,\"vocab_size\":10,"
    "\"tie_word_embeddings\":true,\"rope_theta\":10000.0}";

static void block_tensors(shard_text *s, int b)
{
    static const struct { const char *name; int rows, columns; } t[] = {
        { "self_attn.q_proj", 8, 8 }, { "self_attn.k_proj", 4, 8 }, { "self_attn.v_proj", 4, 8 }, { "self_attn.o_proj", 8, 8 },
        { "mlp.gate_proj", 12, 8 }, { "mlp.up_proj", 12, 8 }, { "mlp.down_proj", 8, 12 }, { "input_layernorm", 8, 0 },
        { "post_attention_layernorm", 8, 0 } };
    char name[128];
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", b, t[i].name);
        add_tensor(s, name, "BF16", 2, t[i].rows, t[i].columns);
    }
    snprintf(name, sizeof name, "model.layers.%d.self_attn.rotary_emb.inv_freq", b);
    add_tensor(s, name, "I64", 8, 2, 0);
}

static void put_shard(const char *dir, const char *name, int first, int last, int others)
{
    static shard_text s;
    char path[1100];
    memset(&s, 0, sizeof s);
    if (others) add_tensor(&s, "model.embed_tokens.weight", "BF16", 2, 10, 8);
    for (int b = first; b < last; b++) block_tensors(&s, b);
    if (others) add_tensor(&s, "model.norm.weight", "BF16", 2, 8, 0);
    s.n += (size_t)snprintf(s.header + s.n, sizeof s.header - s.n, ",\"__metadata__\":{\"format\":\"pt\"}}   ");
    snprintf(path, sizeof path, "%s/%s", dir, name);
    put_raw(path, s.header, s.data, (unsigned)(first + 1));
}

static void put_text(const char *dir, const char *name, const char *text)
{
    char path[1100];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    put(path, text, strlen(text));
}

#define INDEX "model.safetensors.index.json"

/* A model of three blocks: in one file, or in two shards (block 0, the rest). */
static const char *make_model(const char *name, int sharded)
{
    const char *dir = at(name);
    clean(dir);
    mkdir(dir, 0777);
    put_text(dir, "config.json", small_config);
    if (!sharded) {
        put_shard(dir, "model.safetensors", 0, 3, 1);
        return dir;
    }
    put_shard(dir, "model-00001-of-00002.safetensors", 0, 1, 0);
    put_shard(dir, "model-00002-of-00002.safetensors", 1, 3, 1);
    put_text(dir, INDEX, "{\"metadata\":{\"total_size\":1},\"weight_map\":{\"model.norm.weight\":\"model-00002-of-00002.safetensors\","
                         "\"model.layers.0.mlp.up_proj.weight\":\"model-00001-of-00002.safetensors\"}}");
    return dir;
}

static besa_result open_close(const char *dir)
{
    besa_checkpoint *c;
    err.code = BESA_OK;
    besa_result result = besa_checkpoint_open(&c, dir, &err);
    besa_checkpoint_close(c);
    return result;
}

/* ---- tests ------------------------------------------------------------------------------- */

static void test_references(const char *folder)
{
    static const struct { const char *name; int64_t tensors, heads, kv, dim; int tied, qk; double theta; } t[] = {
        { "llama_mha_f16", 30, 4, 4, 12, 0, 0, 1e4 }, { "llama3_gqa_tied_bf16", 29, 6, 2, 16, 1, 0, 5e5 },
        { "mistral_gqa_bf16", 30, 4, 2, 8, 0, 0, 1e6 }, { "qwen2_bias_tied_bf16", 38, 4, 2, 12, 1, 0, 1e6 },
        { "qwen3_qknorm_f32", 36, 4, 2, 20, 0, 1, 1e6 } };
    char path[1024], label[128];
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        besa_checkpoint *c;
        besa__model model;
        snprintf(path, sizeof path, "%s/%s", folder, t[i].name);
        if (!exists(path)) {
            printf("SKIP reference %s: not there\n", t[i].name);
            skipped++;
            continue;
        }
        snprintf(label, sizeof label, "reference %s opens", t[i].name);
        besa_result result = besa_checkpoint_open(&c, path, &err);
        check_error(label, result, BESA_OK, NULL);
        if (result != BESA_OK) continue;
        const besa_config *g = besa_checkpoint_config(c);
        const besa_tensor *down = besa_checkpoint_find(c, "model.layers.2.mlp.down_proj.weight");
        snprintf(label, sizeof label, "reference %s config", t[i].name);
        check(label, g->vocab_size == 199 && g->num_hidden_layers == 3 && g->block.hidden_size == 48 &&
                     g->block.intermediate_size == 104 && g->block.num_attention_heads == t[i].heads &&
                     g->block.num_key_value_heads == t[i].kv && g->block.head_dim == t[i].dim && g->qk_norm == t[i].qk &&
                     g->tie_word_embeddings == t[i].tied && fabs(g->block.rope.theta - t[i].theta) < 1e-9);
        snprintf(label, sizeof label, "reference %s tensors", t[i].name);
        check(label, besa_checkpoint_tensor_count(c) == t[i].tensors && down && down->shape[0] == 48 && down->shape[1] == 104 &&
                     besa__model_bind(&model, c, &err) == BESA_OK && (model.head == model.embedding) == t[i].tied &&
                     !besa_checkpoint_find(c, "no such") && !besa_checkpoint_tensor(c, t[i].tensors));
        if (!strcmp(t[i].name, "llama3_gqa_tied_bf16"))
            check("reference llama3 rope", g->block.rope.type == BESA_ROPE_LLAMA3 && fabs(g->block.rope.factor - 8) < 1e-12 &&
                  fabs(g->block.rope.original_max_position_embeddings - 64) < 1e-12 && fabs(g->block.rms_norm_eps - 1e-5) < 1e-18);
        if (!strcmp(t[i].name, "mistral_gqa_bf16"))
            check("reference mistral window", g->sliding_window == 16 && g->window[0] && g->window[2]);
        if (!strcmp(t[i].name, "qwen3_qknorm_f32")) check("reference qwen3 window", g->sliding_window == 0 && !g->window[0]);
        if (down) besa__release_pages(c, down);
        besa_checkpoint_close(c);
    }
}

static besa_result parse(besa__json *json, const char *text, size_t n)
{
    char *copy = (char *)malloc(n + 1);
    memcpy(copy, text, n);
    copy[n] = 0;
    return besa__json_parse(json, copy, n, "text", &err);
}

static void test_json(void)
{
    static const char *const bad[] = {
        "", " ", "{", "}", "[1,]", "[,1]", "{\"a\":1,}", "{a:1}", "{\"a\" 1}", "[1 2]", "01", "-", "1.", ".5", "1e", "+1", "1e999",
        "nul", "True", "NaN", "Infinity", "\"", "\"\\x\"", "\"\\u12\"", "\"\\ud800\"", "\"\\udc00\"", "\"\\u0000\"", "\"\t\"",
        "\"\xC0\x80\"", "\"\xED\xA0\x80\"", "\"\xF5\x80\x80\x80\"", "\"\xE2\x82\"", "\"\x80\"", "1 1", "[1]]", "{\"a\":1,\"a\":2}",
        "{\"a\":1,\"\\u0061\":2}", "{\"1\":1,\"2\":1,\"3\":1,\"4\":1,\"5\":1,\"6\":1,\"7\":1,\"8\":1,\"9\":1,\"3\":1}", "\xEF\xBB\xBF{}" };
    besa__json json;
    int all = 1;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        err.code = BESA_OK;
        int ok = parse(&json, bad[i], strlen(bad[i])) == BESA_ERROR_JSON && strstr(err.message, "byte ");
        if (!ok) printf("  accepted: %s\n", bad[i]), all = 0;
        besa__json_free(&json);
    }
    check("json refuses what is malformed", all);
    const char *good = " { \"k\\u00e9\\n\" : [ 9223372036854775807, -9223372036854775808, 9223372036854775808, -0, 1e-05,"
                       " 0.1, 123456789012345678901234567890, 1.7976931348623157e308, 5e-324 ], \"s\":\"\\ud83d\\ude00\\\"\\/\", \"e\":{}, \"n\":null } ";
    int ok = parse(&json, good, strlen(good)) == BESA_OK;
    const besa__json_value *list = ok ? besa__json_get(&json, json.values, "k\xC3\xA9\n") : NULL, *v = list ? besa__json_first(list) : NULL;
    double numbers[9];
    int64_t integers[9];
    for (int i = 0; v && i < 9; v = besa__json_next(&json, v), i++) numbers[i] = v->number, integers[i] = v->is_integer ? v->integer : 77;
    check("json numbers are exact", list && list->count == 9 && integers[0] == INT64_MAX && integers[1] == INT64_MIN &&
          integers[2] == 77 && integers[3] == 0 && !memcmp(&numbers[4], &(const double){ 1e-05 }, 8) && !memcmp(&numbers[5], &(const double){ 0.1 }, 8) &&
          numbers[6] > 1.2e29 && numbers[7] > 1.79e308 && numbers[8] > 0);
    v = ok ? besa__json_get(&json, json.values, "s") : NULL;
    check("json strings are decoded", v && !strcmp(v->string, "\xF0\x9F\x98\x80\"/"));
    besa__json_free(&json);
    char deep[200];
    memset(deep, '[', 100);
    memset(deep + 100, ']', 100);
    check_error("json depth is limited", parse(&json, deep, 200), BESA_ERROR_JSON, "deeply");
    besa__json_free(&json);
    size_t n = 0, room = 12u << 20;
    char *big = (char *)malloc(room);
    big[n++] = '{';
    for (int i = 0; n < (10u << 20); i++)
        n += (size_t)snprintf(big + n, 100, "%s\"model.layers.%d.some_long_common_name.weight\":\"model-1-of-2.safetensors\"", i ? "," : "", i);
    big[n++] = '}';
    clock_t start = clock();
    check_error("json of 10 MB", parse(&json, big, n), BESA_OK, NULL);
    check("json of 10 MB within 5 s", (double)(clock() - start) / CLOCKS_PER_SEC < 5);
    besa__json_free(&json);
    free(big);
}

static int open_files(void)
{
    DIR *d = opendir("/proc/self/fd");
    int n = 0;
    while (d && readdir(d)) n++;
    if (d) closedir(d);
    return n;
}

static void test_headers(void)
{
    static const struct { const char *name, *header; size_t data; besa_result code; const char *words; } t[] = {
        { "a hole", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[2,4]}}", 4, BESA_ERROR_FORMAT, "a hole" },
        { "an overlap", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[3,5]}}", 5, BESA_ERROR_FORMAT, "overlap" },
        { "out of range", "{\"a\":{\"dtype\":\"U8\",\"shape\":[9],\"data_offsets\":[0,9]}}", 4, BESA_ERROR_FORMAT, "truncated" },
        { "trailing bytes", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 4, BESA_ERROR_FORMAT, "after the last" },
        { "a wrong size", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, BESA_ERROR_FORMAT, "by its shape" },
        { "an overflow", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", 0, BESA_ERROR_FORMAT, "overflows" },
        { "an overflow of bits", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2305843009213693952],\"data_offsets\":[0,0]}}", 0, BESA_ERROR_FORMAT, "overflows" },
        { "offsets reversed", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[2,0]}}", 2, BESA_ERROR_FORMAT, "[begin, end]" },
        { "offsets negative", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[-2,0]}}", 2, BESA_ERROR_FORMAT, "[begin, end]" },
        { "offsets missing", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2]}}", 2, BESA_ERROR_FORMAT, "data_offsets" },
        { "offsets of three", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,1,2]}}", 2, BESA_ERROR_FORMAT, "[begin, end]" },
        { "a fractional offset", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2.0]}}", 2, BESA_ERROR_FORMAT, "[begin, end]" },
        { "shape negative", "{\"a\":{\"dtype\":\"U8\",\"shape\":[-2],\"data_offsets\":[0,2]}}", 2, BESA_ERROR_FORMAT, "no count" },
        { "dtype missing", "{\"a\":{\"shape\":[2],\"data_offsets\":[0,2]}}", 2, BESA_ERROR_FORMAT, "no dtype" },
        { "dtype unknown", "{\"a\":{\"dtype\":\"X7\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2, BESA_ERROR_UNSUPPORTED, "X7" },
        { "half a byte", "{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", 1, BESA_ERROR_FORMAT, "whole bytes" },
        { "nine dimensions", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1, BESA_ERROR_UNSUPPORTED, "dimensions" },
        { "a name twice", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}", 2, BESA_ERROR_JSON, "twice" },
        { "no object", "{\"a\":3}", 0, BESA_ERROR_FORMAT, "not an object" },
        { "a list", "[1]", 0, BESA_ERROR_FORMAT, "no JSON object" },
        { "all dtypes", "{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[1],\"data_offsets\":[0,1]},\"b\":{\"dtype\":\"BOOL\",\"shape\":[],\"data_offsets\":[1,2]},"
          "\"c\":{\"dtype\":\"F64\",\"shape\":[0,5],\"data_offsets\":[2,2]},\"d\":{\"dtype\":\"F4\",\"shape\":[2],\"data_offsets\":[2,3]}}", 3, BESA_ERROR_TENSOR, "embed_tokens" } };
    char label[128];
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        const char *dir = make_model("hostile", 0);
        char path[1100];
        snprintf(path, sizeof path, "%s/model.safetensors", dir);
        put_raw(path, t[i].header, t[i].data, 1);
        snprintf(label, sizeof label, "safetensors: %s", t[i].name);
        check_error(label, open_close(dir), t[i].code, t[i].words);
    }
    const char *dir = make_model("hostile", 0);
    char path[1100];
    size_t n;
    int refused = 1;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    check_error("small model opens", open_close(dir), BESA_OK, NULL);
    char *file = get(path, &n);
    for (size_t cut = 0; cut < n; cut += cut < 800 || cut + 16 > n ? 1 : 131) { /* every byte at both ends */
        put(path, file, cut);
        besa_result result = open_close(dir);
        if (result != BESA_ERROR_FORMAT || !strstr(err.message, "model.safetensors")) refused = 0, printf("  cut at %zu: %s\n", cut, err.message);
    }
    check("safetensors: truncated anywhere", refused);
    memset(file, 0xFF, 8);
    put(path, file, n);
    check_error("safetensors: header length of 2^64 - 1", open_close(dir), BESA_ERROR_FORMAT, "truncated");
    refused = 1;
    for (size_t over = 1; over <= 16; over++) { /* in the mapped page, but not in the file */
        for (int i = 0; i < 8; i++) file[i] = (char)((n - 8 + over) >> (8 * i));
        put(path, file, n);
        refused = refused && open_close(dir) == BESA_ERROR_FORMAT && strstr(err.message, "truncated") != NULL;
    }
    check("safetensors: header length beyond the file", refused);
    put(path, "GIF89a..........", 16);
    check_error("safetensors: another format", open_close(dir), BESA_ERROR_FORMAT, "model.safetensors");
    unlink(path);
    check_error("safetensors: none", open_close(dir), BESA_ERROR_NOT_FOUND, "neither");
    int files = open_files();
    mkdir(path, 0777);
    check_error("safetensors: a directory of that name", open_close(dir), BESA_ERROR_READ, "regular");
    rmdir(path);
    mkfifo(path, 0666);
    check_error("safetensors: a FIFO of that name", open_close(dir), BESA_ERROR_READ, "regular");
    check("safetensors: what was refused is closed", open_files() == files);
    free(file);
    check_error("directory missing", open_close(at("nowhere")), BESA_ERROR_NOT_FOUND, "nowhere");
    mkdir(at("empty"), 0777);
    check_error("config.json missing", open_close(at("empty")), BESA_ERROR_NOT_FOUND, "config.json");
}

static void test_index(void)
{
    static const struct { const char *name, *map; besa_result code; const char *words; } t[] = {
        { "parent directory", "{\"weight_map\":{\"a\":\"../x.safetensors\"}}", BESA_ERROR_FORMAT, "same directory" },
        { "absolute", "{\"weight_map\":{\"a\":\"/tmp/x.safetensors\"}}", BESA_ERROR_FORMAT, "same directory" },
        { "subdirectory", "{\"weight_map\":{\"a\":\"sub/x.safetensors\"}}", BESA_ERROR_FORMAT, "same directory" },
        { "backslash", "{\"weight_map\":{\"a\":\"..\\\\x.safetensors\"}}", BESA_ERROR_FORMAT, "same directory" },
        { "another kind of file", "{\"weight_map\":{\"a\":\"config.json\"}}", BESA_ERROR_FORMAT, "same directory" },
        { "two dots", "{\"weight_map\":{\"a\":\"..\"}}", BESA_ERROR_FORMAT, "same directory" },
        { "no string", "{\"weight_map\":{\"a\":1}}", BESA_ERROR_FORMAT, "names no file" },
        { "empty map", "{\"weight_map\":{}}", BESA_ERROR_FORMAT, "weight_map" },
        { "no map", "{}", BESA_ERROR_FORMAT, "weight_map" },
        { "a list", "[]", BESA_ERROR_FORMAT, "weight_map" },
        { "broken JSON", "{\"weight_map\":", BESA_ERROR_JSON, "byte 14" },
        { "missing shard", "{\"weight_map\":{\"a\":\"gone.safetensors\"}}", BESA_ERROR_NOT_FOUND, "shard is missing" },
        { "tensor not in its shard", "{\"weight_map\":{\"model.norm.weight\":\"model-00001-of-00002.safetensors\"}}", BESA_ERROR_FORMAT, "missing there" },
        { "tensor in the other shard", "{\"weight_map\":{\"model.norm.weight\":\"model-00001-of-00002.safetensors\",\"model.layers.1.mlp.up_proj.weight\":\"model-00002-of-00002.safetensors\"}}", BESA_ERROR_FORMAT, "is in model-00002" } };
    char label[128];
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        const char *dir = make_model("indexed", 1);
        put_text(dir, INDEX, t[i].map);
        snprintf(label, sizeof label, "index: %s", t[i].name);
        check_error(label, open_close(dir), t[i].code, t[i].words);
    }
    const char *dir = make_model("indexed", 1);
    check_error("sharded model opens", open_close(dir), BESA_OK, NULL);
    put_shard(dir, "model-00001-of-00002.safetensors", 0, 2, 0);
    check_error("index: a tensor in two shards", open_close(dir), BESA_ERROR_FORMAT, "two shards");
    dir = make_model("indexed", 1);
    clean(at("snapshot"));
    mkdir(at("snapshot"), 0777);
    shell("for f in '%s'/*; do ln -s \"$f\" '%s'/; done", dir, at("snapshot"));
    check_error("a snapshot of links opens", open_close(at("snapshot")), BESA_OK, NULL);
    clean(dir);
    check_error("a snapshot of dangling links", open_close(at("snapshot")), BESA_ERROR_NOT_FOUND, "config.json");
}

static void test_config(void)
{
    /* text is put in front of the small config's other keys, which it may replace */
    static const struct { const char *name, *change; besa_result code; const char *words; } t[] = {
        { "model_type", "model_type=\"gpt2\"", BESA_ERROR_UNSUPPORTED, "model_type = \"gpt2\"" },
        { "model_type absent", "model_type=", BESA_ERROR_UNSUPPORTED, "model_type = (absent)" },
        { "architectures", "architectures=[\"LlamaForSequenceClassification\"]", BESA_ERROR_UNSUPPORTED, "LlamaForSequence" },
        { "architectures absent", "architectures=", BESA_OK, NULL },
        { "hidden_act", "hidden_act=\"gelu\"", BESA_ERROR_UNSUPPORTED, "hidden_act" },
        { "quantization_config", "quantization_config={\"bits\":4}", BESA_ERROR_UNSUPPORTED, "quantization_config" },
        { "num_local_experts", "num_local_experts=8", BESA_ERROR_UNSUPPORTED, "num_local_experts = 8" },
        { "partial_rotary_factor", "partial_rotary_factor=0.5", BESA_ERROR_UNSUPPORTED, "partial_rotary_factor" },
        { "partial_rotary_factor 1", "partial_rotary_factor=1.0", BESA_OK, NULL },
        { "pretraining_tp", "pretraining_tp=4", BESA_OK, NULL },
        { "rope yarn", "rope_scaling={\"type\":\"yarn\",\"factor\":4}", BESA_ERROR_UNSUPPORTED, "rope_scaling.type = \"yarn\"" },
        { "rope dynamic", "rope_parameters={\"rope_type\":\"dynamic\",\"factor\":4}", BESA_ERROR_UNSUPPORTED, "rope_parameters.rope_type" },
        { "rope linear", "rope_scaling={\"type\":\"linear\",\"factor\":4}", BESA_OK, NULL },
        { "rope linear without factor", "rope_scaling={\"type\":\"linear\"}", BESA_ERROR_UNSUPPORTED, "rope_scaling.factor" },
        { "rope null", "rope_scaling=null", BESA_OK, NULL },
        { "rope string", "rope_scaling=\"linear\"", BESA_ERROR_UNSUPPORTED, "rope_scaling" },
        { "rope per layer kind", "rope_parameters={\"full_attention\":{\"rope_type\":\"default\"}}", BESA_ERROR_UNSUPPORTED, "full_attention" },
        { "rope llama3", "rope_scaling={\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":64}", BESA_OK, NULL },
        { "rope llama3 incomplete", "rope_scaling={\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4}", BESA_ERROR_UNSUPPORTED, "original_max_position_embeddings" },
        { "rope llama3 degenerate", "rope_scaling={\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4,\"original_max_position_embeddings\":64}", BESA_ERROR_UNSUPPORTED, "high_freq_factor" },
        { "rope_theta", "rope_theta=-1", BESA_ERROR_UNSUPPORTED, "rope_theta = -1" },
        { "hidden_size 0", "hidden_size=0", BESA_ERROR_UNSUPPORTED, "hidden_size = 0" },
        { "hidden_size absurd", "hidden_size=1099511627776", BESA_ERROR_UNSUPPORTED, "hidden_size" },
        { "hidden_size string", "hidden_size=\"8\"", BESA_ERROR_UNSUPPORTED, "hidden_size = \"8\"" },
        { "hidden_size other", "hidden_size=16", BESA_ERROR_TENSOR, "config.json asks for [10, 16]" },
        { "heads and kv heads", "num_key_value_heads=3", BESA_ERROR_UNSUPPORTED, "num_key_value_heads" },
        { "kv heads absent", "num_key_value_heads=", BESA_ERROR_TENSOR, "k_proj" },
        { "head_dim odd", "head_dim=3", BESA_ERROR_UNSUPPORTED, "head_dim = 3" },
        { "head_dim null", "head_dim=null", BESA_OK, NULL },
        { "head_dim given", "head_dim=4", BESA_OK, NULL },
        { "layers 1025", "num_hidden_layers=1025", BESA_ERROR_UNSUPPORTED, "num_hidden_layers = 1025" },
        { "layers 4", "num_hidden_layers=4", BESA_ERROR_TENSOR, "model.layers.3" },
        { "layers 2", "num_hidden_layers=2", BESA_ERROR_TENSOR, "num_hidden_layers = 2" },
        { "untied without head", "tie_word_embeddings=false", BESA_ERROR_TENSOR, "lm_head.weight is missing" },
        { "tied absent", "tie_word_embeddings=", BESA_ERROR_TENSOR, "lm_head" },
        { "attention_bias", "attention_bias=true", BESA_ERROR_TENSOR, "q_proj.bias is missing" },
        { "attention_bias string", "attention_bias=\"yes\"", BESA_ERROR_UNSUPPORTED, "attention_bias" },
        { "mlp_bias", "mlp_bias=true", BESA_ERROR_TENSOR, "gate_proj.bias is missing" },
        { "rms_norm_eps", "rms_norm_eps=0", BESA_ERROR_UNSUPPORTED, "rms_norm_eps" },
        { "sliding_window of llama", "sliding_window=4", BESA_ERROR_UNSUPPORTED, "sliding_window" },
        { "layer_types", "layer_types=[\"full_attention\",\"full_attention\",\"chunked_attention\"]", BESA_ERROR_UNSUPPORTED, "layer_types[2]" },
        { "layer_types too few", "layer_types=[\"full_attention\"]", BESA_ERROR_UNSUPPORTED, "layer_types" },
        { "not an object", "!", BESA_ERROR_JSON, "no JSON object" } };
    char label[128], text[2048], key[64];
    const char *dir = make_model("config", 0);
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        const char *equals = strchr(t[i].change, '='), *old = NULL;
        size_t n = equals ? (size_t)(equals - t[i].change) : 0;
        snprintf(key, sizeof key, "\"%.*s\":", (int)n, t[i].change);
        old = strstr(small_config, key);
        snprintf(text, sizeof text, "%s", n ? small_config : "[]");
        if (n && old) { /* take the old member out: up to the comma before the next key, or the end */
            const char *next = strstr(old + 1, ",\"");
            snprintf(text, sizeof text, "%.*s%s", (int)(old - small_config) - (next ? 0 : 1), small_config, next ? next + 1 : "}");
        }
        if (n && equals[1]) {
            size_t m = strlen(text) - 1;
            snprintf(text + m, sizeof text - m, ",%s%s}", key, equals + 1);
        }
        put_text(dir, "config.json", text);
        snprintf(label, sizeof label, "config: %s", t[i].name);
        check_error(label, open_close(dir), t[i].code, t[i].words);
        if (err.code == BESA_ERROR_JSON && n) printf("  %s\n", text);
    }
}

/* The layers that slide, as a string of 0 and 1, or the error's name. */
static void check_windows(const char *name, const char *text, const char *expected, int64_t window)
{
    besa__json json;
    besa_config config;
    int bias[BESA_LAYERS], ok = 1;
    char label[128];
    memset(&config, 0, sizeof config);
    besa_result result = parse(&json, text, strlen(text));
    besa__config_reader reader = { &json, json.values, "config.json", &err };
    if (result == BESA_OK) result = besa__config_read(&reader, &config, bias);
    besa__json_free(&json);
    snprintf(label, sizeof label, "config: %s", name);
    if (!expected) {
        check(label, result == BESA_ERROR_UNSUPPORTED);
        return;
    }
    for (int i = 0; i < 3; i++) ok = ok && config.window[i] == (expected[i] == '1');
    check_error(label, result, BESA_OK, NULL);
    check(label, ok && config.sliding_window == window);
}

static void test_windows(void)
{
#define SIZES "\"hidden_size\":8,\"intermediate_size\":12,\"num_attention_heads\":8,\"num_hidden_layers\":3,\"vocab_size\":10,\"num_key_value_heads\":null,\"head_dim\":2,"
    check_windows("mistral default window", "{" SIZES "\"model_type\":\"mistral\"}", "111", 4096);
    check_windows("mistral window null", "{" SIZES "\"model_type\":\"mistral\",\"sliding_window\":null}", "000", 0);
    check_windows("mistral window", "{" SIZES "\"model_type\":\"mistral\",\"sliding_window\":7}", "111", 7);
    check_windows("mistral window 0", "{" SIZES "\"model_type\":\"mistral\",\"sliding_window\":0}", NULL, 0);
    check_windows("qwen2 window off", "{" SIZES "\"model_type\":\"qwen2\",\"sliding_window\":7,\"max_window_layers\":1}", "000", 0);
    check_windows("qwen2 window on", "{" SIZES "\"model_type\":\"qwen2\",\"use_sliding_window\":true,\"sliding_window\":7,\"max_window_layers\":1}", "011", 7);
    check_windows("qwen2 window beyond", "{" SIZES "\"model_type\":\"qwen2\",\"use_sliding_window\":true,\"sliding_window\":7}", "000", 0);
    check_windows("qwen2 window null", "{" SIZES "\"model_type\":\"qwen2\",\"use_sliding_window\":true,\"sliding_window\":null,\"max_window_layers\":0}", "000", 0);
    check_windows("qwen3 layer_types", "{" SIZES "\"model_type\":\"qwen3\",\"use_sliding_window\":true,\"sliding_window\":7,\"layer_types\":[\"sliding_attention\",\"full_attention\",\"sliding_attention\"]}", "101", 7);
    check_windows("qwen3 layer_types without window", "{" SIZES "\"model_type\":\"qwen3\",\"layer_types\":[\"sliding_attention\",\"full_attention\",\"full_attention\"]}", NULL, 0);
}

static besa_result read_config(besa_config *config, const char *text)
{
    besa__json json;
    int bias[BESA_LAYERS];
    memset(config, 0, sizeof *config);
    err.code = BESA_OK;
    besa_result result = parse(&json, text, strlen(text));
    besa__config_reader reader = { &json, json.values, "config.json", &err };
    if (result == BESA_OK) result = besa__config_read(&reader, config, bias);
    besa__json_free(&json);
    return result;
}

/* Settings that change the forward pass: refused by name, unless null or false. */
static void test_unknown_settings(void)
{
    static const char *const keys[] = {
        "quantization_config", "compression_config", "num_local_experts", "num_experts", "n_routed_experts",
        "attn_logit_softcapping", "final_logit_softcapping", "no_rope_layers", "attention_chunk_size", "use_qk_norm", "use_mrope",
        "is_encoder_decoder", "alibi" };
    static const char *const values[] = { "null", "false", "2", "true", "{}" };
    besa_config config;
    char text[1024];
    int all = 1;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        for (int v = 0; v < 5; v++) {
            snprintf(text, sizeof text, "{\"%s\":%s,%s", keys[i], values[v], small_config + 1);
            besa_result result = read_config(&config, text);
            int ok = v < 2 ? result == BESA_OK : result == BESA_ERROR_UNSUPPORTED && strstr(err.message, keys[i]);
            if (!ok) printf("  %s = %s: %s\n", keys[i], values[v], besa_result_string(result)), all = 0;
        }
    check("config: settings that are not known", all);
}

/* What transformers takes where key/value heads and head_dim are not given. */
static void test_head_defaults(void)
{
    static const struct { const char *type; int heads; int64_t kv, dim; } t[] = {
        { "llama", 16, 16, 8 }, { "mistral", 16, 8, 8 }, { "qwen2", 64, 32, 2 }, { "qwen3", 64, 32, 128 } };
    besa_config config;
    char text[512], label[64];
    for (int i = 0; i < 4; i++) {
        snprintf(text, sizeof text, "{\"model_type\":\"%s\",\"hidden_size\":128,\"intermediate_size\":12,\"num_attention_heads\":%d,"
                 "\"num_hidden_layers\":1,\"vocab_size\":10}", t[i].type, t[i].heads);
        besa_result result = read_config(&config, text);
        snprintf(label, sizeof label, "config: heads of %s by default", t[i].type);
        check(label, result == BESA_OK && config.block.num_key_value_heads == t[i].kv && config.block.head_dim == t[i].dim);
    }
}

/* One prunable weight of another type than the rest, each in turn. */
static void test_mixed_types(void)
{
    const char *dir = make_model("mixed", 0);
    char path[1100], name[160];
    size_t n;
    int all = 1;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    char *file = get(path, &n);
    for (int b = 0; b < 3; b++)
        for (int l = 0; l < BESA_LAYERS; l++) {
            snprintf(name, sizeof name, "\"model.layers.%d.%s.weight\":{\"dtype\":", b, besa__layer_paths[l]);
            char *dtype = (char *)memmem(file, n, name, strlen(name));
            if (dtype) memcpy(dtype + strlen(name), "\"F16\" ", 6);
            put(path, file, n);
            if (!dtype || open_close(dir) != BESA_ERROR_UNSUPPORTED || !strstr(err.message, "one dtype")) all = 0;
            if (dtype) memcpy(dtype + strlen(name), "\"BF16\"", 6);
        }
    check("a weight of another type than the others", all);
    free(file);
}

/* ---- tokens ------------------------------------------------------------------------------ */

static size_t npy(unsigned char *file, int version, const char *dict, const void *data, size_t bytes)
{
    size_t n = strlen(dict), at_ = version == 1 ? 10 : 12;
    memcpy(file, "\x93NUMPY", 6);
    file[6] = (unsigned char)version;
    file[7] = 0;
    for (size_t i = 8; i < at_; i++) file[i] = (unsigned char)(n >> (8 * (i - 8)));
    memcpy(file + at_, dict, n);
    if (bytes) memcpy(file + at_ + n, data, bytes);
    return at_ + n + bytes;
}

static void test_tokens(void)
{
    static const unsigned char data[64] = { 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF };
    static const struct { const char *name, *dict; int version; size_t first, bytes; besa_result code; const char *words; int64_t count, rows; } t[] = {
        { "uint16 stream", "{'descr': '<u2', 'fortran_order': False, 'shape': (6,), }   \n", 1, 0, 12, BESA_OK, NULL, 6, 0 },
        { "uint16 sequences", "{'descr': '<u2', 'fortran_order': False, 'shape': (2, 3), }\n", 1, 0, 12, BESA_OK, NULL, 6, 2 },
        { "version 2", "{'descr': '<u2', 'fortran_order': False, 'shape': (2, 3)}\n", 2, 0, 12, BESA_OK, NULL, 6, 2 },
        { "version 3, keys turned round", "{\"shape\": (3,), \"fortran_order\": False, \"descr\": \"<i4\"}", 3, 0, 12, BESA_OK, NULL, 3, 0 },
        { "uint32", "{'descr': '<u4', 'fortran_order': False, 'shape': (2,), }", 1, 0, 8, BESA_OK, NULL, 2, 0 },
        { "int64 out of range", "{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }", 1, 0, 8, BESA_ERROR_TOKEN, "token 0 is", 0, 0 },
        { "int64 zero", "{'descr': '<i8', 'fortran_order': False, 'shape': (2,), }", 1, 32, 16, BESA_OK, NULL, 2, 0 },
        { "int64 negative", "{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }", 1, 16, 8, BESA_ERROR_TOKEN, "is -1", 0, 0 },
        { "int32 negative", "{'descr': '<i4', 'fortran_order': False, 'shape': (1,), }", 1, 16, 4, BESA_ERROR_TOKEN, "is -1", 0, 0 },
        { "uint32 too large", "{'descr': '<u4', 'fortran_order': False, 'shape': (1,), }", 1, 16, 4, BESA_ERROR_TOKEN, "4294967295", 0, 0 },
        { "big endian", "{'descr': '>u2', 'fortran_order': False, 'shape': (6,), }", 1, 0, 12, BESA_ERROR_UNSUPPORTED, "'>u2'", 0, 0 },
        { "bytes", "{'descr': '|u1', 'fortran_order': False, 'shape': (12,), }", 1, 0, 12, BESA_ERROR_UNSUPPORTED, "'|u1'", 0, 0 },
        { "floats", "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", 1, 0, 12, BESA_ERROR_UNSUPPORTED, "'<f4'", 0, 0 },
        { "objects", "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", 1, 0, 12, BESA_ERROR_UNSUPPORTED, "'|O'", 0, 0 },
        { "fields", "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (3,), }", 1, 0, 12, BESA_ERROR_FORMAT, "expected a string", 0, 0 },
        { "Fortran order", "{'descr': '<u2', 'fortran_order': True, 'shape': (2, 3), }", 1, 0, 12, BESA_ERROR_UNSUPPORTED, "fortran_order", 0, 0 },
        { "version 4", "{'descr': '<u2', 'fortran_order': False, 'shape': (6,), }", 4, 0, 12, BESA_ERROR_UNSUPPORTED, "version 4.0", 0, 0 },
        { "three dimensions", "{'descr': '<u2', 'fortran_order': False, 'shape': (1,2,3), }", 1, 0, 12, BESA_ERROR_UNSUPPORTED, "dimensions", 0, 0 },
        { "a scalar", "{'descr': '<u2', 'fortran_order': False, 'shape': (), }", 1, 0, 2, BESA_ERROR_FORMAT, "scalar", 0, 0 },
        { "no tuple", "{'descr': '<u2', 'fortran_order': False, 'shape': (6), }", 1, 0, 12, BESA_ERROR_FORMAT, "tuple", 0, 0 },
        { "negative size", "{'descr': '<u2', 'fortran_order': False, 'shape': (-6,), }", 1, 0, 12, BESA_ERROR_FORMAT, "no number", 0, 0 },
        { "overflowing size", "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,), }", 1, 0, 12, BESA_ERROR_FORMAT, "overflows", 0, 0 },
        { "overflowing product", "{'descr': '<u2', 'fortran_order': False, 'shape': (4294967296,4294967296), }", 1, 0, 12, BESA_ERROR_FORMAT, "truncated", 0, 0 },
        { "too short", "{'descr': '<u2', 'fortran_order': False, 'shape': (7,), }", 1, 0, 12, BESA_ERROR_FORMAT, "truncated", 0, 0 },
        { "too long", "{'descr': '<u2', 'fortran_order': False, 'shape': (5,), }", 1, 0, 12, BESA_ERROR_FORMAT, "12 bytes", 0, 0 },
        { "empty", "{'descr': '<u2', 'fortran_order': False, 'shape': (0,), }", 1, 0, 0, BESA_ERROR_TOKENS, "no tokens", 0, 0 },
        { "key missing", "{'descr': '<u2', 'shape': (6,), }", 1, 0, 12, BESA_ERROR_FORMAT, "missing", 0, 0 },
        { "key twice", "{'descr': '<u2', 'descr': '<u2', 'fortran_order': False, 'shape': (6,), }", 1, 0, 12, BESA_ERROR_FORMAT, "twice", 0, 0 },
        { "text after", "{'descr': '<u2', 'fortran_order': False, 'shape': (6,), } x", 1, 0, 12, BESA_ERROR_FORMAT, "follows", 0, 0 } };
    unsigned char file[512];
    char label[128];
    besa_tokens tokens;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        size_t n = npy(file, t[i].version, t[i].dict, data + t[i].first, t[i].bytes);
        put(at("t.npy"), file, n);
        snprintf(label, sizeof label, "npy: %s", t[i].name);
        err.code = BESA_OK;
        besa_result result = besa_tokens_load(&tokens, at("t.npy"), &err);
        check_error(label, result, t[i].code, t[i].words);
        if (result == BESA_OK && (tokens.count != t[i].count || tokens.rows != t[i].rows)) check(label, 0);
        besa_tokens_free(&tokens);
    }
    size_t n = npy(file, 1, t[0].dict, data, 12);
    int refused = 1;
    for (size_t cut = 0; cut < n; cut++) {
        put(at("t.npy"), file, cut);
        refused = refused && besa_tokens_load(&tokens, at("t.npy"), &err) == BESA_ERROR_FORMAT;
    }
    check("npy: truncated anywhere", refused);
    put(at("t.u16"), data, 16);
    check("raw uint16", besa_tokens_load(&tokens, at("t.u16"), &err) == BESA_OK && tokens.count == 8 && tokens.ids[7] == 8);
    int32_t ids[16];
    check("stream from its start", besa_tokens_sample(&tokens, 2, 4, 0, 9, ids, &err) == BESA_OK && ids[0] == 1 && ids[4] == 5 && ids[7] == 8);
    check_error("id outside the vocabulary", besa_tokens_sample(&tokens, 2, 4, 0, 8, ids, &err), BESA_ERROR_TOKEN, "token 7 is 8");
    check_error("too few tokens", besa_tokens_sample(&tokens, 3, 4, 0, 9, ids, &err), BESA_ERROR_TOKENS, "has 8 tokens");
    check_error("too few for one window", besa_tokens_sample(&tokens, 1, 9, 5, 9, ids, &err), BESA_ERROR_TOKENS, "has 8 tokens");
    check_error("no samples", besa_tokens_sample(&tokens, 0, 4, 0, 9, ids, &err), BESA_ERROR_OPTION, "nsamples = 0");
    check_error("windows may overlap", besa_tokens_sample(&tokens, 4, 4, 7, 9, ids, &err), BESA_OK, NULL);
    int windows = 1;
    for (int i = 0; i < 4; i++) windows = windows && ids[4 * i] == 1 + (int32_t)(besa__splitmix64(7, (uint64_t)i) % 5) && ids[4 * i + 3] == ids[4 * i] + 3;
    check("windows by splitmix64", windows);
    check("splitmix64 as published", besa__splitmix64(1234567, 0) == 6457827717110365317u && besa__splitmix64(1234567, 1) == 3203168211198807973u);
    besa_tokens_free(&tokens);
    put(at("t.u16"), data, 15);
    check_error("raw uint16 of 15 bytes", besa_tokens_load(&tokens, at("t.u16"), &err), BESA_ERROR_FORMAT, "15 bytes");
    put(at("t.bin"), data, 16);
    check("raw .bin", besa_tokens_load(&tokens, at("t.bin"), &err) == BESA_OK && tokens.count == 8);
    besa_tokens_free(&tokens);
    put(at("t.i32"), data + 32, 16);
    check("raw int32", besa_tokens_load(&tokens, at("t.i32"), &err) == BESA_OK && tokens.count == 4);
    besa_tokens_free(&tokens);
    put(at("t.txt"), data, 16);
    check_error("another ending", besa_tokens_load(&tokens, at("t.txt"), &err), BESA_ERROR_UNSUPPORTED, ".npy");
    put(at("t.u16"), data, 0);
    check_error("empty file", besa_tokens_load(&tokens, at("t.u16"), &err), BESA_ERROR_TOKENS, "no tokens");
    check_error("missing file", besa_tokens_load(&tokens, at("t.none.npy"), &err), BESA_ERROR_NOT_FOUND, "t.none.npy");
    n = npy(file, 1, t[1].dict, data, 12);
    put(at("t.npy"), file, n);
    check_error("2-D file", besa_tokens_load(&tokens, at("t.npy"), &err), BESA_OK, NULL);
    check("2-D rows", besa_tokens_sample(&tokens, 2, 2, 99, 9, ids, &err) == BESA_OK && ids[0] == 1 && ids[1] == 2 && ids[2] == 4 && ids[3] == 5);
    check_error("2-D too few rows", besa_tokens_sample(&tokens, 3, 2, 0, 9, ids, &err), BESA_ERROR_TOKENS, "2 of 3");
    check_error("2-D too short", besa_tokens_sample(&tokens, 1, 4, 0, 9, ids, &err), BESA_ERROR_TOKENS, "2 of 3");
    besa_tokens_free(&tokens);
}

/* ---- writer ------------------------------------------------------------------------------ */

/* A block's "pruned" weights: source bytes with every second byte 0 - and of some layers nothing at all. */
static besa_result write_block(besa__writer *w, const besa_checkpoint *c, int64_t b)
{
    besa__block_tensors t;
    BESA__TRY(besa__block_bind(&t, c, b, &err));
    for (int i = BESA_LAYERS - 1; i >= 0; i--) {
        if (i == BESA_O) continue; /* stays as it is */
        unsigned char *bytes = (unsigned char *)malloc(t.weight[i]->bytes);
        memcpy(bytes, t.weight[i]->data, t.weight[i]->bytes);
        for (size_t k = 0; k < t.weight[i]->bytes; k += 2) bytes[k] = (unsigned char)b;
        besa_result result = besa__writer_write(w, t.weight[i], bytes, t.weight[i]->bytes, &err);
        free(bytes);
        BESA__TRY(result);
    }
    return besa__writer_block_done(w, b, &err);
}

/* Open (expecting `done` blocks), write up to block `stop`, and finish if that is all of them. */
static besa_result run_writer(const besa_checkpoint *c, const char *out, const char *fingerprint, int64_t stop, int64_t *done)
{
    besa__writer *w;
    char *notes = NULL;
    err.code = BESA_OK;
    besa_result result = besa__writer_open(&w, c, out, fingerprint, 3, done, &notes, &err);
    free(notes);
    for (int64_t b = *done; b < stop && result == BESA_OK; b++) result = write_block(w, c, b);
    if (result == BESA_OK && stop == 3) return besa__writer_finish(w, &err);
    besa__writer_abandon(w, 0);
    return result;
}

static int same_output(const char *a, const char *b)
{
    char command[2400];
    snprintf(command, sizeof command, "diff -r '%s' '%s' >/dev/null 2>&1", a, b);
    return system(command) == 0;
}

static const char *partial(const char *out, const char *rest)
{
    static char path[1100];
    snprintf(path, sizeof path, "%s.partial%s", out, rest);
    return path;
}

static void test_writer(int sharded)
{
    char src[600], out[600], ref[600], label[160];
    besa_checkpoint *c;
    besa__writer *w, *second;
    char *notes = NULL;
    int64_t done;
    snprintf(src, sizeof src, "%s", make_model(sharded ? "src2" : "src1", sharded));
    snprintf(out, sizeof out, "%s", at(sharded ? "out2" : "out1"));
    snprintf(ref, sizeof ref, "%s", at(sharded ? "ref2" : "ref1"));
    put_text(src, "tokenizer.json", "{\"x\":1}\n");
    put_text(src, "empty.txt", "");
    put_text(src, "pytorch_model.bin", "x");
    put_text(src, "consolidated.00.pth", "x");
    put_text(src, "extra.safetensors", "x");
    put_text(src, "model.gguf", "x");
    put_text(src, "pytorch_model.bin.index.json", "{}");
    put_text(src, ".gitattributes", "x");
    shell("mkdir -p '%s'/original; ln -s /nonexistent '%s'/dangling", src, src);
    shell("ln -s config.json '%s'/generation_config.json; mkfifo '%s'/pipe", src, src);
    if (besa_checkpoint_open(&c, src, &err) != BESA_OK) {
        check("writer: source opens", 0);
        return;
    }

    /* an uninterrupted run is the reference of the others */
    check_error("writer: begins", besa__writer_open(&w, c, ref, "fp 1", 3, &done, &notes, &err), BESA_OK, NULL);
    check("writer: nothing under the final name yet", done == 0 && !exists(ref) && exists(partial(ref, "/besa-journal")));
    check("writer: nothing that opens as a checkpoint", !exists(partial(ref, "/config.json")));
    static const char *const left_out[] = { "original (a subdirectory)", "pytorch_model.bin (", "consolidated.00.pth", "extra.safetensors",
                                            "model.gguf", "pytorch_model.bin.index.json", ".gitattributes (hidden)", "dangling (a dangling link)", "pipe (not" };
    for (size_t i = 0; i < sizeof left_out / sizeof *left_out; i++)
        if (!notes || !strstr(notes, left_out[i])) printf("  no note of %s\n", left_out[i]), check("writer: notes", 0);
    check_error("writer: a second one is locked out", besa__writer_open(&second, c, ref, "fp 1", 3, &done, NULL, &err), BESA_ERROR_RESUME, "another process");
    besa__block_tensors t;
    besa__block_bind(&t, c, 1, &err);
    check_error("writer: a tensor of another block", besa__writer_write(w, t.weight[0], t.weight[0]->data, t.weight[0]->bytes, &err), BESA_ERROR_OPTION, "block 0");
    check_error("writer: a tensor that is not prunable", besa__writer_write(w, besa_checkpoint_find(c, "model.norm.weight"), src, 8, &err), BESA_ERROR_OPTION, "block 0");
    check_error("writer: another block done", besa__writer_block_done(w, 1, &err), BESA_ERROR_OPTION, "block 1");
    for (int64_t b = 0; b < 3; b++) check_error("writer: a block", write_block(w, c, b), BESA_OK, NULL);
    unsigned char back[4096];
    besa__block_bind(&t, c, 2, &err);
    check("writer: reads back", besa__writer_read(w, t.weight[BESA_DOWN], back, 0, t.weight[BESA_DOWN]->bytes, &err) == BESA_OK && back[0] == 2 &&
          back[1] == ((const unsigned char *)t.weight[BESA_DOWN]->data)[1] &&
          besa__writer_read(w, t.weight[BESA_O], back, 0, t.weight[BESA_O]->bytes, &err) == BESA_OK && !memcmp(back, t.weight[BESA_O]->data, t.weight[BESA_O]->bytes));
    check_error("writer: finishes", besa__writer_finish(w, &err), BESA_OK, NULL);
    free(notes);
    check("writer: nothing is left over", exists(ref) && !exists(partial(ref, "")) && !exists(partial(ref, "." "besa-journal")));
    char list[512] = "";
    FILE *ls = NULL;
    char command[1400];
    snprintf(command, sizeof command, "cd '%s' && ls -A | tr '\\n' ' '", ref);
    ls = popen(command, "r");
    if (ls && !fgets(list, sizeof list, ls)) list[0] = 0;
    if (ls) pclose(ls);
    const char *expected = sharded ? "config.json empty.txt generation_config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json tokenizer.json "
                                   : "config.json empty.txt generation_config.json model.safetensors tokenizer.json ";
    check("writer: only what a checkpoint has", !strcmp(list, expected));
    snprintf(command, sizeof command, "%s/generation_config.json", ref);
    check("writer: links become files", same_file(command, at(sharded ? "src2/config.json" : "src1/config.json")));
    besa_checkpoint *o;
    if (besa_checkpoint_open(&o, ref, &err) == BESA_OK) {
        int same = 1, changed = 0;
        for (int64_t i = 0; i < c->num_tensors; i++) {
            const besa_tensor *x = c->tensors + i, *y = o->tensors + i;
            int eq = x->offset == y->offset && !memcmp(x->data, y->data, x->bytes);
            if (strstr(x->name, "_proj") && !strstr(x->name, "o_proj")) changed += !eq;
            else same = same && eq;
        }
        check("writer: all but the written weights is the source's", same && changed == 18);
        besa_checkpoint_close(o);
    } else check("writer: output opens", 0);

    /* refusals */
    check_error("writer: output exists", run_writer(c, ref, "fp 1", 3, &done), BESA_ERROR_EXISTS, "exists already");
    check_error("writer: output is the input", run_writer(c, src, "fp 1", 3, &done), BESA_ERROR_EXISTS, "is the input");
    snprintf(command, sizeof command, "%s/inside", src);
    check_error("writer: output inside the input", run_writer(c, command, "fp 1", 3, &done), BESA_ERROR_EXISTS, "inside the input");
    check_error("writer: output is /", run_writer(c, "/", "fp 1", 3, &done), BESA_ERROR_EXISTS, NULL);
    check_error("writer: no output", run_writer(c, "", "fp 1", 3, &done), BESA_ERROR_OPTION, NULL);
    check_error("writer: parent missing", run_writer(c, at("no/such/out"), "fp 1", 3, &done), BESA_ERROR_NOT_FOUND, "parent");
    put_text(root, "plain", "x");
    check_error("writer: parent is a file", run_writer(c, at("plain/out"), "fp 1", 3, &done), BESA_ERROR_NOT_FOUND, "parent");
    mkdir(partial(out, ""), 0777);
    put(partial(out, "/mine"), "x", 1);
    check_error("writer: a foreign .partial", run_writer(c, out, "fp 1", 3, &done), BESA_ERROR_EXISTS, "no unfinished output");
    put(partial(out, "/besa-journal"), "hello\n", 6);
    check_error("writer: a foreign journal", run_writer(c, out, "fp 1", 3, &done), BESA_ERROR_EXISTS, "besa-journal");
    check("writer: foreign files are untouched", exists(partial(out, "/mine")));
    clean(partial(out, ""));

    /* interrupted after each block */
    for (int64_t stop = 0; stop < 3; stop++) {
        clean(out);
        clean(partial(out, ""));
        besa_result first = run_writer(c, out, "fp 1", stop, &done);
        snprintf(label, sizeof label, "writer: stopped after %d blocks, then other options", (int)stop);
        check_error(label, run_writer(c, out, "fp 2", 3, &done), BESA_ERROR_RESUME, ".partial");
        besa_result then = run_writer(c, out, "fp 1", 3, &done);
        snprintf(label, sizeof label, "writer: stopped after %d blocks, resumed", (int)stop);
        check(label, first == BESA_OK && then == BESA_OK && done == stop && same_output(out, ref));
    }
    check_error("writer: a fingerprint of two lines", run_writer(c, at("fp"), "a\nb", 3, &done), BESA_ERROR_OPTION, "fingerprint");
    check("writer: a failed begin leaves nothing", !exists(at("fp")) && !exists(at("fp.partial")));

    /* the journal torn at every byte, or overwritten there: the same output, and never more blocks than lines */
    clean(out);
    run_writer(c, out, "fp 1", 2, &done);
    char saved[1100];
    snprintf(saved, sizeof saved, "%s.saved", out);
    clean(saved);
    shell("cp -r '%s' '%s'", partial(out, ""), saved);
    size_t n;
    char *journal = get(partial(out, "/besa-journal"), &n);
    int torn = 1, flipped = 1, counts[4] = { 0, 0, 0, 0 };
    for (size_t cut = 0; cut <= n; cut++) {
        clean(out);
        clean(partial(out, ""));
        shell("cp -r '%s' '%s'", saved, partial(out, ""));
        put(partial(out, "/besa-journal"), journal, cut);
        besa_result result = run_writer(c, out, "fp 1", 3, &done);
        torn = torn && result == BESA_OK && done == (cut == n ? 2 : cut >= n - 42 ? 1 : 0) && same_output(out, ref);
        counts[done]++;
        if (!torn) { printf("  cut at %zu of %zu: %d done, %s\n", cut, n, (int)done, result ? err.message : ""); break; }
    }
    check("writer: journal torn at every byte", torn && counts[2] == 1 && counts[1] > 0);
    for (size_t k = 0; k < n; k += 3) {
        char keep = journal[k];
        clean(out);
        clean(partial(out, ""));
        shell("cp -r '%s' '%s'", saved, partial(out, ""));
        journal[k] = (char)(keep ^ 1);
        put(partial(out, "/besa-journal"), journal, n);
        journal[k] = keep;
        besa_result result = run_writer(c, out, "fp 1", 3, &done);
        int fine = result == BESA_OK ? done < 2 && same_output(out, ref) : k < 12 && result == BESA_ERROR_EXISTS;
        if (!fine) printf("  flip at %zu: %d done, %s\n", k, (int)done, result ? err.message : "");
        flipped = flipped && fine;
    }
    check("writer: a bit of the journal flipped", flipped);

    /* a block's bytes damaged, a shard short or gone, a small file gone */
    const besa_tensor *victim = besa_checkpoint_find(c, "model.layers.1.mlp.up_proj.weight");
    const char *shard = c->shards[victim->file].name;
    for (int damage = 0; damage < 4; damage++) {
        char path[1300];
        clean(out);
        clean(partial(out, ""));
        shell("cp -r '%s' '%s'", saved, partial(out, ""));
        snprintf(path, sizeof path, "%s.partial/%s", out, damage == 3 ? "config.json" : shard);
        if (damage == 0) {
            size_t m;
            char *bytes = get(path, &m);
            bytes[victim->offset + 5] ^= 16;
            put(path, bytes, m);
            free(bytes);
        } else if (damage == 1) put(path, "x", 1);
        else unlink(path);
        besa_result result = run_writer(c, out, "fp 1", 3, &done);
        static const int expected_done[] = { 1, 0, 0, 2 };
        snprintf(label, sizeof label, "writer: damage %d is repaired", damage);
        check(label, result == BESA_OK && done == expected_done[damage] && same_output(out, ref));
    }

    /* killed while finishing: the journal is beside the directory */
    clean(out);
    clean(partial(out, ""));
    run_writer(c, out, "fp 1", 2, &done);
    char aside[1200];
    snprintf(aside, sizeof aside, "%s.partial.besa-journal", out);
    rename(partial(out, "/besa-journal"), aside);
    check_error("writer: killed between the two renames", run_writer(c, out, "fp 1", 3, &done), BESA_OK, NULL);
    check("writer: and goes on", done == 2 && same_output(out, ref) && !exists(aside));
    clean(out);
    put(aside, "besa-journal 1", 14);
    check("writer: a journal without its directory", run_writer(c, out, "fp 1", 3, &done) == BESA_OK && done == 0 && same_output(out, ref) && !exists(aside));
    free(journal);

    /* giving up */
    clean(out);
    besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
    check_error("writer: finish too early", besa__writer_finish(w, &err), BESA_ERROR_OPTION, "0 of 3");
    besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
    besa__writer_abandon(w, 1);
    check("writer: abandoned without a block", !exists(partial(out, "")));
    run_writer(c, out, "fp 1", 1, &done);
    besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
    besa__writer_abandon(w, 1);
    check("writer: abandoned with a block", done == 1 && exists(partial(out, "")));
    besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
    for (int64_t b = 1; b < 3; b++) write_block(w, c, b);
    mkdir(out, 0777);
    check_error("writer: the output has come to exist", besa__writer_finish(w, &err), BESA_ERROR_EXISTS, "come to exist");
    rmdir(out);
    check("writer: and is finished later", run_writer(c, out, "fp 1", 3, &done) == BESA_OK && done == 3 && same_output(out, ref));
    besa_checkpoint_close(c);
}

/* Weights in other formats, by every ending and name that says so, are left out; the like that is none comes along. */
static void test_left_out(void)
{
    static const char *const out[] = { "a.safetensors", "a.bin", "a.pth", "a.pt", "a.ckpt", "a.h5", "a.msgpack", "a.ot", "a.onnx", "a.gguf",
                                       "a.index.json", "a.npy", "a.u16", "a.i32", "pytorch_model-1", "consolidated.0", ".hidden" };
    static const char *const in[] = { "bin", "a.ptx", "a.json", "tokenizer.model", "apth" };
    char path[1300];
    const char *dir = make_model("mixture", 0);
    besa_checkpoint *c;
    besa__writer *w;
    char *notes = NULL;
    int64_t done;
    int all = 1;
    for (size_t i = 0; i < sizeof out / sizeof *out; i++) put_text(dir, out[i], "x");
    for (size_t i = 0; i < sizeof in / sizeof *in; i++) put_text(dir, in[i], "x");
    if (besa_checkpoint_open(&c, dir, &err) != BESA_OK || besa__writer_open(&w, c, at("mixed-out"), "fp", 3, &done, &notes, &err) != BESA_OK) {
        check("files beside the weights", 0);
        return;
    }
    for (size_t i = 0; i < sizeof out / sizeof *out; i++) {
        snprintf(path, sizeof path, "/%s", out[i]);
        int ok = !exists(partial(at("mixed-out"), path)) && notes && strstr(notes, out[i]);
        if (!ok) printf("  %s\n", out[i]), all = 0;
    }
    check("weights in other formats are left out, and noted", all);
    all = 1;
    for (size_t i = 0; i < sizeof in / sizeof *in; i++) {
        snprintf(path, sizeof path, "/%s", in[i]);
        if (!exists(partial(at("mixed-out"), path))) printf("  %s\n", in[i]), all = 0;
    }
    check("other files come along", all);
    free(notes);
    besa__writer_abandon(w, 2);
    besa_checkpoint_close(c);
}

/* A child is killed at a random moment, again and again, until it has finished. */
static void test_kill(void)
{
    const char *src = at("src2"), *out = at("killed");
    besa_checkpoint *c;
    int64_t done;
    int rounds = 0, ok = 1;
    if (besa_checkpoint_open(&c, src, &err) != BESA_OK) return;
    double pause = 1e4;
    for (; rounds < 300 && !exists(out) && ok; rounds++, pause *= 1.05) {
        pid_t child = fork();
        if (child == 0) _exit(run_writer(c, out, "fp 1", 3, &done) == BESA_OK ? 0 : 1);
        struct timespec wait = { (time_t)(pause / 1e9), (long)fmod(pause, 1e9) };
        int status;
        nanosleep(&wait, NULL);
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        ok = WIFSIGNALED(status) || WEXITSTATUS(status) == 0 || exists(out);
    }
    check("killed at any moment, ends the same", ok && same_output(out, at("ref2")) && rounds < 300);
    printf("  %d rounds\n", rounds);
    besa_checkpoint_close(c);
}

/* Killed at each system call in turn, each time from the start and again from where the last left off. */
static void test_kill_points(void)
{
    const char *out = at("killpoint");
    besa_checkpoint *c;
    int64_t done;
    int ok = 1, finished = 0, calls = 1;
    if (besa_checkpoint_open(&c, at("src2"), &err) != BESA_OK) return;
    for (; !finished && ok && calls < 1000; calls++) {
        int status;
        pid_t child = fork();
        if (child == 0) {
            fault_kind = FAULT_KILL;
            fault_at = calls;
            _exit(run_writer(c, out, "fp 1", 3, &done) == BESA_OK ? 0 : 1);
        }
        waitpid(child, &status, 0);
        finished = WIFEXITED(status) && WEXITSTATUS(status) == 0;
        ok = finished || WIFSIGNALED(status);
        if (ok && !finished && exists(out)) ok = same_output(out, at("ref2"));
        else if (ok) ok = (finished || run_writer(c, out, "fp 1", 3, &done) == BESA_OK) && same_output(out, at("ref2"));
        ok = ok && !exists(partial(out, ""));
        if (!ok) printf("  call %d: %s\n", calls, err.message);
        clean(out);
        clean(partial(out, ""));
    }
    printf("  %d calls\n", calls - 2);
    check("killed at each system call, resumed: the same bytes", ok && finished);
    besa_checkpoint_close(c);
}

/* Each system call, or each allocation, fails in turn: an error, no leak, nothing lost. */
static void test_faults(int kind)
{
    const char *out = at("faulty"), *dir = at("src2");
    besa_checkpoint *c;
    int64_t done, before;
    int ok = 1, finished = 0, calls = 1;
    for (int opened = 0; !opened && ok && calls < 1000; calls++) {
        fault_kind = kind, fault_at = calls, fault_calls = 0;
        besa_result result = besa_checkpoint_open(&c, dir, &err);
        fault_kind = FAULT_NONE;
        besa_checkpoint_close(c);
        opened = result == BESA_OK;
        ok = opened || (err.code == result && (kind == FAULT_MEMORY ? result == BESA_ERROR_MEMORY : result == BESA_ERROR_READ));
        if (!ok) printf("  open, call %d: %s\n", calls, err.message);
    }
    check(kind == FAULT_MEMORY ? "opening with each allocation failing" : "opening with each system call failing", ok && calls > 5);
    if (besa_checkpoint_open(&c, dir, &err) != BESA_OK) return;
    for (calls = 1; !finished && ok && calls < 1000; calls++) {
        run_writer(c, out, "fp 1", 1, &before);
        fault_kind = kind, fault_at = calls, fault_calls = 0;
        besa_result result = run_writer(c, out, "fp 1", 3, &done);
        finished = fault_calls < calls;
        fault_kind = FAULT_NONE;
        if (result == BESA_ERROR_WRITE && exists(out)) ok = strstr(err.message, "complete") != NULL; /* only its parent's sync */
        else if (result != BESA_OK) ok = !exists(out) && exists(partial(out, "")) && err.code == result && run_writer(c, out, "fp 1", 3, &done) == BESA_OK && done >= 1;
        ok = ok && same_output(out, at("ref2")) && !exists(partial(out, ""));
        if (!ok) printf("  call %d: %s; %d done\n", calls, err.message, (int)done);
        clean(out);
        clean(partial(out, ""));
    }
    printf("  %d calls\n", calls - 2);
    check(kind == FAULT_MEMORY ? "writing with each allocation failing" : "writing with each system call failing", ok && finished);
    short_writes = 1;
    check_error("short reads, short writes and EINTR", run_writer(c, out, "fp 1", 3, &done), BESA_OK, NULL);
    short_writes = 0;
    check("give the same bytes", same_output(out, at("ref2")));
    clean(out);
    besa_checkpoint_close(c);
}

/* No room: a limit on file sizes, then a small tmpfs. */
static void test_full_disk(void)
{
    besa_checkpoint *c;
    int64_t done;
    struct rlimit old, low;
    if (besa_checkpoint_open(&c, at("src1"), &err) != BESA_OK) return;
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    low = old;
    for (rlim_t limit = 0; limit < 8000; limit += 500) {
        low.rlim_cur = limit;
        setrlimit(RLIMIT_FSIZE, &low);
        err.code = BESA_OK;
        besa_result result = run_writer(c, at("full"), "fp 1", 3, &done);
        setrlimit(RLIMIT_FSIZE, &old);
        int clean_ = !exists(at("full")) && !exists(at("full.partial"));
        if (result == BESA_OK) {
            clean(at("full"));
            continue;
        }
        if (result != BESA_ERROR_WRITE || !clean_) {
            check_error("file size limit", result, BESA_ERROR_WRITE, NULL);
            check("file size limit leaves nothing", clean_);
        }
    }
    check("file size limits are reported", !exists(at("full.partial")));
    mkdir(at("tmpfs"), 0777);
    if (mount("tmpfs", at("tmpfs"), "tmpfs", 0, "size=8k")) {
        printf("SKIP a full tmpfs: cannot mount\n");
        skipped++;
    } else {
        besa_result result = run_writer(c, at("tmpfs/out"), "fp 1", 3, &done);
        check_error("full disk", result, BESA_ERROR_WRITE, "No space");
        check("full disk leaves nothing", !exists(at("tmpfs/out")) && !exists(at("tmpfs/out.partial")));
        umount(at("tmpfs"));
    }
    besa_checkpoint_close(c);
}

/* Inputs of every reader, mutated; anything goes but a crash. */
static void test_fuzz(int rounds)
{
    static const char *const seeds[] = {
        "0{\"a\":[1,2.5e3,null,true],\"b\":{\"c\":\"\\u00e9\\ud83d\\ude00\"}}",
        "3{\"model_type\":\"qwen2\",\"hidden_size\":8,\"intermediate_size\":12,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"num_hidden_layers\":3,\"vocab_size\":10,"
        "\"use_sliding_window\":true,\"max_window_layers\":1,\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}}" };
    static const char header[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F16\",\"shape\":[2,1],\"data_offsets\":[4,8]}}";
    unsigned char input[4][512], work[600];
    size_t size[4];
    uint64_t n = 0;
    for (int i = 0; i < 2; i++) memcpy(input[i], seeds[i], size[i] = strlen(seeds[i]));
    memset(input[2], 0, 512);
    input[2][0] = '1';
    input[2][1] = sizeof header - 1;
    memcpy(input[2] + 9, header, sizeof header - 1);
    size[2] = 9 + sizeof header - 1 + 8;
    input[3][0] = '2';
    size[3] = 1 + npy(input[3] + 1, 1, "{'descr': '<u2', 'fortran_order': False, 'shape': (2, 3), }\n", header, 12);
    for (int r = 0; r < rounds; r++)
        for (int i = 0; i < 4; i++) {
            size_t m = size[i];
            memcpy(work, input[i], m);
            for (uint64_t edits = 1 + besa__splitmix64(1, n++) % 4; edits; edits--) {
                uint64_t x = besa__splitmix64(2, n++), p = 1 + (x >> 8) % (m - 1);
                static const char likely[] = "{}[]\",:\\0123456789-.eu'()<\xC3\xFF";
                if (x % 5 == 0) work[p] = (unsigned char)(x >> 40);
                else if (x % 5 == 1) work[p] = (unsigned char)likely[(x >> 40) % (sizeof likely - 1)];
                else if (x % 5 == 2) work[p] ^= (unsigned char)(1u << (x >> 40 & 7));
                else if (x % 5 == 3 && m > 2) memmove(work + p, work + p + 1, --m - p);
                else if (m < 590) memmove(work + p + 1, work + p, m++ - p);
            }
            LLVMFuzzerTestOneInput(work, m);
        }
    check("mutated inputs", 1);
}

int main(int argc, char **argv)
{
    if (argc < 3) return printf("usage: test_io CHECKPOINTS SCRATCH\n"), 2;
    snprintf(root, sizeof root, "%s/besa_io_XXXXXX", argv[2]);
    if (!mkdtemp(root)) return printf("cannot work in %s\n", argv[2]), 2;
    test_references(argv[1]);
    test_json();
    test_headers();
    test_index();
    test_config();
    test_windows();
    test_unknown_settings();
    test_head_defaults();
    test_mixed_types();
    test_tokens();
    test_writer(0);
    test_writer(1);
    test_left_out();
    test_kill();
    test_kill_points();
    test_faults(FAULT_ERROR);
    test_faults(FAULT_MEMORY);
    test_full_disk();
    test_fuzz(argc > 3 ? atoi(argv[3]) : 20000);
    clean(root);
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed != 0;
}
