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
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Every system call that besa.h makes on files, and every allocation, is counted; the chosen one fails or is the last. */
enum { FAULT_NONE, FAULT_KILL, FAULT_ERROR, FAULT_MEMORY };
static int fault_kind, fault_at, fault_calls, short_writes, no_renameat2;

static int fault(int kind)
{
    if (fault_kind == FAULT_NONE || (kind == FAULT_MEMORY) != (fault_kind == FAULT_MEMORY) || ++fault_calls != fault_at) return 0;
    if (fault_kind == FAULT_KILL) raise(SIGKILL);
    errno = EIO;
    return 1;
}

/* What is written but not yet synced, while `watching`: paths of files whose bytes, and of directories whose names, changed.
 * A violation is what a loss of power at that moment would turn into a wrong output. */
static struct ledger {
    int watching, lines, syncs, renames, violations;
    char dirty[16][640];
    char first[900];                            /* violation, in words */
} ledger;

static void ledger_path(int fd, const char *name, char path[640])
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 500);
    if (n < 0) n = 0;
    path[n] = 0;
    if (name && strcmp(name, ".")) snprintf(path + n, 640 - (size_t)n, "/%.100s", name);
}

static void ledger_mark(const char *path, int dirty)
{
    int at = -1;
    for (int i = 0; i < 16; i++) {
        if (!strcmp(ledger.dirty[i], path)) at = i;
        if (at < 0 && !ledger.dirty[i][0]) at = i;
    }
    if (at >= 0) snprintf(ledger.dirty[at], 640, "%s", dirty ? path : "");
}

/* Nothing but `except` may wait for its sync now; with `files` directories may. */
static void ledger_expect_clean(const char *what, const char *except, int files)
{
    for (int i = 0; i < 16; i++) {
        struct stat st;
        const char *path = ledger.dirty[i];
        if (!*path || !strcmp(path, except) || (files && !stat(path, &st) && S_ISDIR(st.st_mode))) continue;
        if (!ledger.violations++) snprintf(ledger.first, sizeof ledger.first, "%.200s before %s is synced", what, path);
    }
}

static void ledger_write(int fd, const void *bytes, size_t n)
{
    char path[640];
    if (!ledger.watching) return;
    ledger_path(fd, NULL, path);
    const char *name = strrchr(path, '/');
    int journal = name && !strcmp(name, "/besa-journal"), begins = n > 3 && (!memcmp(bytes, "run", 3) || !memcmp(bytes, "besa", 4));
    if (journal) ledger_expect_clean("a line of the journal", path, begins);
    else for (int i = 0; i < 16; i++)
        if (strstr(ledger.dirty[i], "/besa-journal")) ledger_expect_clean("a file's bytes", path, 1);
    ledger.lines += journal;
    ledger_mark(path, 1);
}

/* A name appears in, or goes from, a directory. */
static void ledger_name(int fd, const char *name, int gone)
{
    char path[640];
    if (!ledger.watching) return;
    ledger_path(fd, name, path);
    if (gone) ledger_mark(path, 0);
    ledger_path(fd, NULL, path);
    ledger_mark(path, 1);
}

static void ledger_rename(int fd, const char *to)
{
    if (!ledger.watching) return;
    ledger_expect_clean("a rename", "", 0);
    ledger.renames++;
    ledger_name(fd, to, 0);
}

static void ledger_sync(int fd)
{
    char path[640];
    if (!ledger.watching) return;
    ledger_path(fd, NULL, path);
    ledger_mark(path, 0);
    ledger.syncs++;
}

static ssize_t io_pwrite(int fd, const void *p, size_t n, off_t at)
{
    if (fault(FAULT_ERROR)) return -1;
    ledger_write(fd, p, n);
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
static int io_openat4(int fd, const char *path, int flags, mode_t mode)
{
    if (fault(FAULT_ERROR)) return -1;
    int opened = openat(fd, path, flags, mode);
    if (opened >= 0 && flags & O_CREAT) ledger_name(fd, path, 0);
    return opened;
}
static int io_fsync(int fd)
{
    if (fault(FAULT_ERROR)) return -1;
    ledger_sync(fd);
    return fsync(fd);
}
static int io_ftruncate(int fd, off_t n) { return fault(FAULT_ERROR) ? -1 : ftruncate(fd, n); }
static int io_fallocate(int fd, off_t at, off_t n) { return fault(FAULT_ERROR) ? EIO : posix_fallocate(fd, at, n); }
static int io_renameat(int a, const char *b, int c, const char *d)
{
    if (fault(FAULT_ERROR)) return -1;
    ledger_rename(c, d);
    return renameat(a, b, c, d);
}
static int io_unlinkat(int a, const char *b, int c)
{
    if (fault(FAULT_ERROR)) return -1;
    if (ledger.watching && !strcmp(b, "besa-journal")) ledger_expect_clean("the end of the journal", "", 0);
    ledger_name(a, b, 1);
    return unlinkat(a, b, c);
}
static int io_mkdirat(int a, const char *b, mode_t c)
{
    if (fault(FAULT_ERROR)) return -1;
    int failed = mkdirat(a, b, c);
    if (!failed) ledger_name(a, b, 0);
    return failed;
}
static int io_fstat(int fd, struct stat *st) { return fault(FAULT_ERROR) ? -1 : fstat(fd, st); }
static int io_flock(int fd, int how) { return fault(FAULT_ERROR) ? -1 : flock(fd, how); }
static int io_fstatat(int fd, const char *path, struct stat *st, int how) { return fault(FAULT_ERROR) ? -1 : fstatat(fd, path, st, how); }
static int io_fchmod(int fd, mode_t mode) { return fault(FAULT_ERROR) ? -1 : fchmod(fd, mode); }
static int io_fchmodat(int fd, const char *path, mode_t mode, int how) { return fault(FAULT_ERROR) ? -1 : fchmodat(fd, path, mode, how); }
/* the only system call without a function of libc's: renameat2; a kernel or file system that lacks it is played by no_renameat2 */
static long io_syscall(long number, int a, const char *b, int c, const char *d, unsigned how)
{
    if (no_renameat2) return errno = no_renameat2, -1;
    if (fault(FAULT_ERROR)) return -1;
    ledger_rename(c, d);
    return syscall(number, a, b, c, d, how);
}
static void *io_mmap(void *p, size_t n, int a, int b, int c, off_t d) { return fault(FAULT_ERROR) ? MAP_FAILED : mmap(p, n, a, b, c, d); }

/* The library's memory is counted: blocks and bytes that are held, and the most bytes that were. */
enum { IN_FRONT = 16 };                       /* in front of each block; keeps its alignment */
static size_t live_blocks, live_bytes, peak_bytes;

static void *io_block(void *old, size_t before, size_t n)
{
    char *p = fault(FAULT_MEMORY) ? NULL : (char *)realloc(old ? (char *)old - IN_FRONT : NULL, n + IN_FRONT);
    if (!p) return NULL;
    memcpy(p, &n, sizeof n);
    live_blocks += !old;
    live_bytes += n;
    if (live_bytes > peak_bytes) peak_bytes = live_bytes; /* a block that moves is there twice */
    live_bytes -= before;
    return p + IN_FRONT;
}
static size_t io_size(const void *p)
{
    size_t n = 0;
    if (p) memcpy(&n, (const char *)p - IN_FRONT, sizeof n);
    return n;
}
static void *io_malloc(size_t n) { return io_block(NULL, 0, n); }
static void *io_realloc(void *p, size_t n) { return io_block(p, io_size(p), n); }
static void io_free(void *p)
{
    if (!p) return;
    live_blocks--;
    live_bytes -= io_size(p);
    free((char *)p - IN_FRONT);
}

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
#define fstatat io_fstatat
#define fchmod io_fchmod
#define fchmodat io_fchmodat
#define syscall io_syscall
#define flock(fd, how) io_flock(fd, how)
#define mmap io_mmap
#define BESA_MALLOC io_malloc
#define BESA_REALLOC io_realloc
#define BESA_FREE io_free
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
    static char paths[256][640];
    int i = 0;
    char path[640];
    snprintf(path, sizeof path, "%s/%s", root, name);
    while (i < 255 && paths[i][0] && strcmp(paths[i], path)) i++;
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
    char *copy = (char *)io_malloc(n + 1);
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
    const besa__json_value *list = ok ? besa__json_get(&json, json.values, "k\xC3\xA9\n") : NULL, *v = list ? besa__json_first(&json, list) : NULL;
    double numbers[9];
    int64_t integers[9];
    for (int i = 0; v && i < 9; v = besa__json_next(&json, list, v), i++) {
        besa__json_number number = besa__json_number_of(&json, v);
        numbers[i] = number.value, integers[i] = number.is_integer ? number.integer : 77;
    }
    check("json numbers are exact", list && besa__json_count(&json, list) == 9 && integers[0] == INT64_MAX && integers[1] == INT64_MIN &&
          integers[2] == 77 && integers[3] == 0 && !memcmp(&numbers[4], &(const double){ 1e-05 }, 8) && !memcmp(&numbers[5], &(const double){ 0.1 }, 8) &&
          numbers[6] > 1.2e29 && numbers[7] > 1.79e308 && numbers[8] > 0);
    v = ok ? besa__json_get(&json, json.values, "s") : NULL;
    check("json strings are decoded", v && !strcmp(besa__json_string(&json, v), "\xF0\x9F\x98\x80\"/"));
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

/* Repeat `unit` to a text of n bytes between `begin` and `end`; %d in it is a number of four digits or more. */
static char *repeated(const char *begin, const char *unit, const char *end, size_t n, size_t *size)
{
    char *text = (char *)malloc(n + 256);
    size_t m = (size_t)sprintf(text, "%s", begin);
    for (int i = 1000; m < n; i++) m += (size_t)sprintf(text + m, unit, i);
    m += (size_t)sprintf(text + m, "%s", end);
    *size = m;
    return text;
}

/* A text costs its own size and at most three times that, whatever it holds. */
static void test_json_memory(void)
{
    static const struct { const char *name, *begin, *unit, *end; } t[] = {
        { "numbers", "[", "0,", "0]" }, { "lists", "[", "[],", "0]" }, { "objects", "[", "{},", "0]" },
        { "lists of one", "[", "[0],", "0]" }, { "objects of one", "[", "{\"\":0},", "0]" },
        { "members", "{", "\"%d\":0,", "\"\":0}" }, { "strings", "[", "\"\",", "0]" }, { "one string", "[\"", ",[{:\\\"", "\"]" },
        { "weight_map", "{\"weight_map\":{", "\"model.layers.%d.mlp.up_proj.weight\":\"model-00001-of-00002.safetensors\",", "\"a\":\"b\"}}" } };
    char label[128];
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        besa__json json;
        size_t n, before = live_bytes;
        char *text = repeated(t[i].begin, t[i].unit, t[i].end, 1 << 20, &n);
        peak_bytes = 0;
        snprintf(label, sizeof label, "json memory: %s", t[i].name);
        check_error(label, parse(&json, text, n), BESA_OK, NULL);
        check(label, peak_bytes - before <= 4 * n + 4096);
        if (getenv("TEST_VERBOSE")) printf("  %.2f times the text\n", (double)(peak_bytes - before) / (double)n);
        besa__json_free(&json);
        check(label, live_bytes == before);
        free(text);
    }
}

/* The same of files: a config.json with long lists, and a header of many small tensors with the table made of it. */
static void test_file_memory(void)
{
    const char *dir = make_model("large", 0);
    char path[1100], begin[sizeof small_config];
    size_t n, before = live_bytes;
    memcpy(begin, small_config, sizeof begin);
    begin[strlen(begin) - 1] = 0;               /* without its brace */
    char *text = repeated(begin, ",\"%d\":[[0],0]", "}", 1 << 20, &n);
    put_text(dir, "config.json", text);
    free(text);
    peak_bytes = 0;
    check_error("memory: config.json of 1 MB", open_close(dir), BESA_OK, NULL);
    check("memory: of config.json", peak_bytes - before <= 5 * n + (64 << 10));
    text = repeated("{", "\"%d\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},",
                    "\"\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 1 << 20, &n);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    put_raw(path, text, 0, 1);
    free(text);
    peak_bytes = 0;
    check_error("memory: a header of 1 MB", open_close(dir), BESA_ERROR_TENSOR, "embed_tokens");
    check("memory: of a header and its tensors", peak_bytes - before <= 6 * n + (64 << 10));
    if (getenv("TEST_VERBOSE")) printf("  %.2f times the header\n", (double)(peak_bytes - before) / (double)n);
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

#define LLAMA3 "\"rope_type\":\"llama3\","

/* Set a member of a JSON object of plain members, or take it out where the value is empty or NULL. */
static void config_set(char *text, size_t size, const char *key, const char *value)
{
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    char *old = strstr(text, quoted), *next = old ? strstr(old + 1, ",\"") : NULL;
    if (old && next) memmove(old, next + 1, strlen(next));
    else if (old) memcpy(old - 1, "}", 2);      /* the last: its comma goes too */
    size_t n = strlen(text) - 1;
    if (value && *value) snprintf(text + n, size - n, ",%s%s}", quoted, value);
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
        const char *equals = strchr(t[i].change, '=');
        snprintf(text, sizeof text, "%s", equals ? small_config : "[]");
        snprintf(key, sizeof key, "%.*s", equals ? (int)(equals - t[i].change) : 0, t[i].change);
        if (equals) config_set(text, sizeof text, key, equals + 1);
        put_text(dir, "config.json", text);
        snprintf(label, sizeof label, "config: %s", t[i].name);
        check_error(label, open_close(dir), t[i].code, t[i].words);
        if (err.code == BESA_ERROR_JSON && equals) printf("  %s\n", text);
    }
}

static besa_result read_config(const char *text, besa_config *config)
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

/* A config with one number; `also` sets what its value asks for, `rope` is the rope_scaling that it is a member of. */
static besa_result read_number(const char *key, const char *number, const char *const also[3][2], const char *rope)
{
    besa_config config;
    char text[2048], object[512];
    snprintf(text, sizeof text, "%s", small_config);
    for (int i = 0; i < 3 && also[i][0]; i++) config_set(text, sizeof text, also[i][0], also[i][1]);
    snprintf(object, sizeof object, "{%s\"%s\":%s}", rope ? rope : "", key, number);
    config_set(text, sizeof text, rope ? "rope_scaling" : key, rope ? object : number);
    return read_config(text, &config);
}

/* Every number of a config at both ends of its range, beyond them, and as what is no number. */
static void test_config_ranges(void)
{
    static const struct { const char *key, *also[3][2], *rope; double least, most; } t[] = {
        { "vocab_size", { { NULL } }, NULL, 1, 16777216 },
        { "hidden_size", { { "head_dim", "2" } }, NULL, 1, 16777216 },
        { "intermediate_size", { { NULL } }, NULL, 1, 16777216 },
        { "num_hidden_layers", { { NULL } }, NULL, 1, 1024 },
        { "num_attention_heads", { { "head_dim", "2" } }, NULL, 1, 65536 },
        { "num_key_value_heads", { { "head_dim", "2" }, { "num_attention_heads", "65536" } }, NULL, 1, 65536 },
        { "head_dim", { { NULL } }, NULL, 2, 65536 },
        { "max_position_embeddings", { { NULL } }, NULL, 1, 1099511627776.0 },
        { "sliding_window", { { "model_type", "\"mistral\"" }, { "architectures", NULL } }, NULL, 1, 1099511627776.0 },
        { "max_window_layers", { { "model_type", "\"qwen2\"" }, { "architectures", NULL } }, NULL, 0, 1099511627776.0 },
        { "rms_norm_eps", { { NULL } }, NULL, 1e-30, 1 },
        { "rope_theta", { { NULL } }, NULL, 1e-6, 1e15 },
        { "rope_theta", { { NULL } }, "", 1e-6, 1e15 },
        { "factor", { { NULL } }, "\"type\":\"linear\",", 1e-6, 1e15 },
        { "factor", { { NULL } }, LLAMA3 "\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":64,", 1e-6, 1e15 },
        { "low_freq_factor", { { NULL } }, LLAMA3 "\"factor\":8,\"high_freq_factor\":1e15,\"original_max_position_embeddings\":64,", 1e-6, 9.9e14 },
        { "high_freq_factor", { { NULL } }, LLAMA3 "\"factor\":8,\"low_freq_factor\":1e-6,\"original_max_position_embeddings\":64,", 1.1e-6, 1e15 },
        { "original_max_position_embeddings", { { NULL } }, LLAMA3 "\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,", 1e-6, 1e15 },
        { "partial_rotary_factor", { { NULL } }, NULL, 1, 1 }, { "partial_rotary_factor", { { NULL } }, "", 1, 1 } };
    static const char *const wrong[] = { "-1", "-1e300", "1e300", "\"1\"", "true", "[]" };
    char label[128], number[64], said[96], expected[96];
    int listed = 1;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        const besa__range *range = besa__find_range(t[i].key);
        int whole = t[i].least == floor(t[i].least) && t[i].most > 1; /* a count */
        const double beyond[2] = { whole ? t[i].least - 1 : t[i].least * 0.9, whole ? t[i].most + 1 : t[i].most * 1.1 };
        snprintf(said, sizeof said, "%s = ", t[i].key);
        besa__range_text(range, expected, sizeof expected);
        snprintf(label, sizeof label, "range of %s%s", t[i].rope ? "rope_scaling." : "", t[i].key);
        for (int end = 0; end < 2; end++) {
            snprintf(number, sizeof number, "%.17g", end ? t[i].most : t[i].least);
            check_error(label, read_number(t[i].key, number, t[i].also, t[i].rope), BESA_OK, NULL);
            snprintf(number, sizeof number, "%.17g", beyond[end]);
            check_error(label, read_number(t[i].key, number, t[i].also, t[i].rope), BESA_ERROR_UNSUPPORTED, said);
            if (range->least == t[i].least && range->most == t[i].most) check(label, strstr(err.message, expected) != NULL);
        }
        for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
            besa_result result = read_number(t[i].key, wrong[k], t[i].also, t[i].rope);
            if (result != BESA_ERROR_UNSUPPORTED || !strstr(err.message, said)) check_error(label, result, BESA_ERROR_UNSUPPORTED, said);
        }
        if (whole) check_error(label, read_number(t[i].key, "1.5", t[i].also, t[i].rope), BESA_ERROR_UNSUPPORTED, said);
    }
    for (size_t i = 0; i < sizeof besa__ranges / sizeof *besa__ranges; i++) {
        int found = 0;
        for (size_t k = 0; k < sizeof t / sizeof *t; k++) found = found || !strcmp(t[k].key, besa__ranges[i].key);
        listed = listed && found;
    }
    check("every range is tested", listed);
}

/* What public models have in these keys. */
static void test_config_public(void)
{
    static const char *const taken[][2] = {
        { "rope_theta", "10000" }, { "rope_theta", "500000.0" }, { "rope_theta", "1000000000.0" }, { "rope_theta", "null" },
        { "rms_norm_eps", "1e-05" }, { "rms_norm_eps", "1e-6" }, { "rms_norm_eps", "1e-12" }, { "rms_norm_eps", "0.001" }, { "rms_norm_eps", "null" },
        { "head_dim", "null" }, { "num_key_value_heads", "null" }, { "vocab_size", "256000" }, { "max_position_embeddings", "10485760" },
        { "max_position_embeddings", "null" }, { "sliding_window", "null" }, { "sliding_window", "0" }, { "attention_bias", "null" }, { "mlp_bias", "false" },
        { "rope_scaling", "null" }, { "rope_scaling", "{}" }, { "rope_scaling", "{\"type\":\"linear\",\"factor\":2.5}" },
        { "rope_scaling", "{\"rope_type\":\"default\",\"factor\":null}" }, { "partial_rotary_factor", "null" }, { "quantization_config", "null" },
        { "num_experts", "null" }, { "use_qk_norm", "false" }, { "pretraining_tp", "2" }, { "tie_word_embeddings", "null" } };
    char label[128], text[2048];
    besa_config config;
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) {
        snprintf(text, sizeof text, "%s", small_config);
        config_set(text, sizeof text, taken[i][0], taken[i][1]);
        snprintf(label, sizeof label, "config: %s = %s", taken[i][0], taken[i][1]);
        check_error(label, read_config(text, &config), BESA_OK, NULL);
    }
}

/* The layers that slide, as a string of 0 and 1, or the error's name. */
static void check_windows(const char *name, const char *text, const char *expected, int64_t window)
{
    besa_config config;
    int ok = 1;
    char label[128];
    besa_result result = read_config(text, &config);
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
            besa_result result = read_config(text, &config);
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
        besa_result result = read_config(text, &config);
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
            snprintf(name, sizeof name, "\"model.layers.%d.%s.weight\":{\"dtype\":", b, besa__layers[l].path);
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

/* Little-endian numbers of `width` bytes. */
static size_t numbers(unsigned char *out, size_t width, const int64_t *v, size_t count)
{
    for (size_t i = 0; i < count; i++)
        for (size_t b = 0; b < width; b++) *out++ = (unsigned char)((uint64_t)v[i] >> (8 * b));
    return count * width;
}

/* Raw files by what is in them: llm.c's header, 32-bit ids under a name of 16-bit ones, vocabularies too large for 16. */
static void test_token_widths(void)
{
    static const struct { const char *name, *file; int64_t header[3]; size_t header_bytes, width; int spread; int64_t count, vocab; besa_result code; const char *words; } t[] = {
        { "llm.c of GPT-2", "l.bin", { 20240520, 1, 40 }, 1024, 2, 7, 40, 50257, BESA_OK, NULL },
        { "llm.c of Llama 3", "l.bin", { 20240801, 7, 40 }, 1024, 4, 3000, 40, 128256, BESA_OK, NULL },
        { "llm.c, another name", "l.u16", { 20240801, 7, 40 }, 1024, 4, 3000, 40, 128256, BESA_OK, NULL },
        { "llm.c, a vocabulary beyond 16 bits", "l.bin", { 20240520, 1, 40 }, 1024, 2, 7, 40, 65537, BESA_ERROR_TOKEN, "l.bin: its ids have 16 bits" },
        { "llm.c, version", "l.bin", { 20240520, 2, 40 }, 1024, 2, 7, 40, 50257, BESA_ERROR_UNSUPPORTED, "version 2" },
        { "llm.c, version of the other", "l.bin", { 20240801, 1, 40 }, 1024, 4, 7, 40, 50257, BESA_ERROR_UNSUPPORTED, "20240801" },
        { "llm.c, another kind", "l.bin", { 20240522, 1, 40 }, 1024, 2, 7, 40, 50257, BESA_ERROR_UNSUPPORTED, "20240522" },
        { "llm.c, one token short", "l.bin", { 20240520, 1, 41 }, 1024, 2, 7, 40, 50257, BESA_ERROR_FORMAT, "41 tokens" },
        { "llm.c, one token long", "l.bin", { 20240801, 7, 39 }, 1024, 4, 7, 40, 50257, BESA_ERROR_FORMAT, "39 tokens" },
        { "llm.c, half the width", "l.bin", { 20240801, 7, 40 }, 1024, 2, 7, 40, 50257, BESA_ERROR_FORMAT, "truncated" },
        { "llm.c, a negative count", "l.bin", { 20240520, 1, -1 }, 1024, 2, 7, 40, 50257, BESA_ERROR_FORMAT, "-1 tokens" },
        { "llm.c, a cut header", "l.bin", { 20240520, 1, 0 }, 1020, 2, 0, 0, 50257, BESA_ERROR_FORMAT, "1020 bytes" },
        { "llm.c, empty", "l.bin", { 20240520, 1, 0 }, 1024, 2, 0, 0, 50257, BESA_ERROR_TOKENS, "no tokens" },
        { "raw uint16", "l.bin", { 0 }, 0, 2, 7, 40, 65536, BESA_OK, NULL },
        { "raw uint16 for 65537 ids", "l.bin", { 0 }, 0, 2, 7, 40, 65537, BESA_ERROR_TOKEN, ".npy of uint32" },
        { "raw .u16 for 65537 ids", "l.u16", { 0 }, 0, 2, 7, 40, 65537, BESA_ERROR_TOKEN, "16 bits" },
        { "raw .i32 for 65537 ids", "l.i32", { 0 }, 0, 4, 1600, 40, 65537, BESA_OK, NULL },
        { "uint32 as .bin", "l.bin", { 0 }, 0, 4, 7, 40, 50257, BESA_ERROR_FORMAT, "name it .i32" },
        { "uint32 as .bin, two tokens", "l.bin", { 0 }, 0, 4, 7, 2, 50257, BESA_ERROR_FORMAT, "name it .i32" },
        { "uint32 of 130000 as .bin", "l.bin", { 0 }, 0, 4, 3333, 40, 128256, BESA_ERROR_FORMAT, "name it .i32" },
        { "uint32 of 130000 as .bin, few tokens", "l.bin", { 0 }, 0, 4, 30000, 5, 128256, BESA_ERROR_TOKEN, "name a raw file .i32" },
        { "uint16 of a small vocabulary", "l.bin", { 0 }, 0, 2, 0, 80, 16, BESA_OK, NULL } };
    unsigned char file[2048];
    char label[128];
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        int64_t v[100];
        int32_t ids[100];
        besa_tokens tokens;
        size_t n = t[i].header_bytes, blocks = live_blocks;
        memset(file, 0, sizeof file);
        numbers(file, 4, t[i].header, n ? 3 : 0);
        for (int64_t k = 0; k < t[i].count; k++) v[k] = t[i].spread ? 1 + k * t[i].spread : k % 10 + 1;
        n += numbers(file + n, t[i].width, v, (size_t)t[i].count);
        put(at(t[i].file), file, n);
        err.code = BESA_OK;
        besa_result result = besa_tokens_load(&tokens, at(t[i].file), &err);
        int64_t count = tokens.count;
        if (result == BESA_OK) result = besa_tokens_sample(&tokens, 1, count, 0, t[i].vocab, ids, &err);
        besa_tokens_free(&tokens);
        snprintf(label, sizeof label, "tokens: %s", t[i].name);
        check_error(label, result, t[i].code, t[i].words);
        int same = result != BESA_OK || count == t[i].count;
        for (int64_t k = 0; k < count && result == BESA_OK; k++) same = same && ids[k] == v[k];
        check(label, same && live_blocks == blocks);
    }
    static const unsigned char data[8] = { 1, 0, 2, 0, 3, 0, 4, 0 };
    besa_tokens tokens;
    int32_t ids[4];
    size_t n = npy(file, 1, "{'descr': '<u2', 'fortran_order': False, 'shape': (4,), }", data, 8);
    put(at("t.npy"), file, n);
    check_error("tokens: .npy of uint16", besa_tokens_load(&tokens, at("t.npy"), &err), BESA_OK, NULL);
    check_error("tokens: .npy of uint16, 65536 ids", besa_tokens_sample(&tokens, 1, 4, 0, 65536, ids, &err), BESA_OK, NULL);
    check_error("tokens: .npy of uint16, 65537 ids", besa_tokens_sample(&tokens, 1, 4, 0, 65537, ids, &err), BESA_ERROR_TOKEN, "t.npy");
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
    BESA_FREE(notes);
    for (int64_t b = *done; b < stop && result == BESA_OK; b++) result = write_block(w, c, b);
    if (result == BESA_OK && stop == 3) return besa__writer_finish(w, &err);
    besa__writer_abandon(w, 0, &err);
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
    put_text(src, "adapter_config.json", "{}");
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
                                            "model.gguf", "pytorch_model.bin.index.json", "adapter_config.json (an adapter", ".gitattributes (hidden)", "dangling (a dangling link)", "pipe (not" };
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
    BESA_FREE(notes);
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

    free(journal);

    /* giving up */
    clean(out);
    besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
    check_error("writer: finish too early", besa__writer_finish(w, &err), BESA_ERROR_OPTION, "0 of 3");
    besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
    besa__writer_abandon(w, 1, &err);
    check("writer: abandoned without a block", !exists(partial(out, "")));
    run_writer(c, out, "fp 1", 1, &done);
    besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
    besa__writer_abandon(w, 1, &err);
    check("writer: abandoned with a block", done == 1 && exists(partial(out, "")));
    besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
    for (int64_t b = 1; b < 3; b++) write_block(w, c, b);
    mkdir(out, 0777);
    check_error("writer: the output has come to exist", besa__writer_finish(w, &err), BESA_ERROR_EXISTS, "come to exist");
    rmdir(out);
    check("writer: and is finished later", run_writer(c, out, "fp 1", 3, &done) == BESA_OK && done == 3 && same_output(out, ref));
    besa_checkpoint_close(c);
}

/* ---- what lies beside ---------------------------------------------------------------------- */

/* The small model with a head: 0 as the embedding, 1 another in its last byte, 2 of another type, 3 of another shape, 4 of a
 * type that is no weight's. */
static const char *make_headed(const char *name, int kind)
{
    static shard_text s;
    const char *dir = make_model(name, 0);
    char path[1100];
    size_t n;
    memset(&s, 0, sizeof s);
    add_tensor(&s, "model.embed_tokens.weight", "BF16", 2, 10, 8);
    add_tensor(&s, "lm_head.weight", kind == 2 ? "F16" : kind == 4 ? "I16" : "BF16", 2, kind == 3 ? 11 : 10, 8);
    for (int b = 0; b < 3; b++) block_tensors(&s, b);
    add_tensor(&s, "model.norm.weight", "BF16", 2, 8, 0);
    s.n += (size_t)snprintf(s.header + s.n, sizeof s.header - s.n, "}");
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    put_raw(path, s.header, s.data, 5);
    unsigned char *file = (unsigned char *)get(path, &n), *data = file + 8 + s.n;
    memcpy(data + 160, data, 160);
    data[319] ^= kind == 1;
    put(path, file, n);
    free(file);
    return dir;
}

static void test_tied_head(void)
{
    static const struct { const char *name; int kind; besa_result code; const char *words; int tied; } t[] = {
        { "the embedding again", 0, BESA_OK, NULL, 1 }, { "another in one bit", 1, BESA_OK, NULL, 0 },
        { "another type", 2, BESA_OK, NULL, 0 }, { "another shape", 3, BESA_ERROR_TENSOR, "lm_head.weight has shape [11, 8]", 0 },
        { "no weights", 4, BESA_ERROR_UNSUPPORTED, "lm_head.weight has dtype I16", 0 } };
    char label[128];
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        besa_checkpoint *c;
        besa__model model;
        err.code = BESA_OK;
        besa_result result = besa_checkpoint_open(&c, make_headed("headed", t[i].kind), &err);
        snprintf(label, sizeof label, "tied head: %s", t[i].name);
        check_error(label, result, t[i].code, t[i].words);
        if (!c) continue;
        const char *note = strstr(besa_checkpoint_notes(c), "lm_head.weight differs");
        check(label, besa__model_bind(&model, c, &err) == BESA_OK && c->config.tie_word_embeddings == t[i].tied &&
                     (model.head == besa_checkpoint_find(c, t[i].tied ? "model.embed_tokens.weight" : "lm_head.weight")) && (note == NULL) == t[i].tied);
        besa_checkpoint_close(c);
    }
    int64_t done;
    besa_checkpoint *c;
    besa_checkpoint_open(&c, make_headed("headed", 1), &err);
    put_text(at("headed"), "adapter_config.json", "{}");
    check_error("tied head: written", run_writer(c, at("headed_out"), "fp 1", 3, &done), BESA_OK, NULL);
    besa_checkpoint_close(c);
    check_error("tied head: the output opens", besa_checkpoint_open(&c, at("headed_out"), &err), BESA_OK, NULL);
    check("tied head: the output has it too, and no adapter", c && !c->config.tie_word_embeddings && strstr(besa_checkpoint_notes(c), "lm_head.weight differs") &&
          !strstr(besa_checkpoint_notes(c), "adapter"));
    besa_checkpoint_close(c);
}

static void test_adapters(void)
{
    static const char *const names[] = { "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin" };
    besa_checkpoint *c;
    check_error("no adapter", besa_checkpoint_open(&c, make_model("adapted", 0), &err), BESA_OK, NULL);
    check("no adapter: no note", c && !*besa_checkpoint_notes(c));
    besa_checkpoint_close(c);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *dir = make_model("adapted", 0);
        put_text(dir, names[i], "{}");
        check_error(names[i], besa_checkpoint_open(&c, dir, &err), BESA_OK, NULL);
        check(names[i], c && strstr(besa_checkpoint_notes(c), names[i]) && strstr(besa_checkpoint_notes(c), "not applied"));
        besa_checkpoint_close(c);
    }
    besa_checkpoint_open(&c, make_headed("adapted", 1), &err);
    put_text(at("adapted"), names[0], "{}");
    besa_checkpoint_close(c);
    besa_checkpoint_open(&c, at("adapted"), &err);
    const char *notes = c ? besa_checkpoint_notes(c) : "", *second = strchr(notes, '\n');
    check("notes are lines", second && strstr(second, "adapter") && !strchr(second + 1, '\n')[1]);
    besa_checkpoint_close(c);
}

/* Which files become part of an output. */
static void test_left_out(void)
{
    static const char *const copied[] = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "tekken.json", "qwen.tiktoken",
        "modeling_custom.py", "README.md", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "preprocessor_config.json", "model.index.md" };
    static const char *const left_out[] = {
        "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapter_model.safetensors.index.json", "model.fp16.safetensors",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.bin.index.fp16.json", "model.safetensors.index.json",
        "model.safetensors.index.fp16.json", "tf_model.h5", "tf_model.h5.index.json", "flax_model.msgpack", "flax_model.msgpack.index.json",
        "rust_model.ot", "model.onnx", "model.onnx_data", "model-Q4_K_M.gguf", "MODEL.GGUF", "ggml-model.ggml", "weights.npz", "consolidated.00.pth",
        "consolidated.safetensors", "params.json", "checklist.chk", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth",
        "trainer_state.json", "trainer_log.jsonl", "training_args.bin", "training_args.json", "all_results.json", "eval_results.json",
        "train_results.json", "events.out.tfevents.1700000000.host", "latest", "zero_to_fp32.py", "quantize_config.json", "quant_config.json",
        "quantization_config.json", "hf_quant_config.json", "kv_cache_scales.json", "measurement.json", "imatrix.dat", "model.imatrix",
        "openvino_model.xml", "openvino_model.bin", "genai_config.json", "ndarray-cache.json", "tensor-cache-b16.json", "SHA256SUMS",
        "md5sums.txt", "model.safetensors.sha256", "model.sig", "tokens.npy", "tokens.u16", ".gitattributes" };
    besa_checkpoint c;
    struct stat st;
    memset(&c, 0, sizeof c);
    memset(&st, 0, sizeof st);
    st.st_mode = S_IFREG;
    for (size_t i = 0; i < sizeof copied / sizeof *copied; i++) {
        const char *why = besa__why_left_out(&c, copied[i], &st);
        if (why) printf("  %s: %s\n", copied[i], why), check("files: copied", 0);
    }
    for (size_t i = 0; i < sizeof left_out / sizeof *left_out; i++)
        if (!besa__why_left_out(&c, left_out[i], &st)) printf("  %s\n", left_out[i]), check("files: left out", 0);
    check("files: another model's adapter", !strcmp(besa__why_left_out(&c, "adapter_config.json", &st), "an adapter, which is not applied"));
    c.index = INDEX;
    check("files: the index of the shards", !besa__why_left_out(&c, INDEX, &st));
}

/* Each allocation fails in turn, and every input check: nothing is kept. */
static void check_frees(const char *name, const char *dir, const char *tokens)
{
    size_t blocks = live_blocks;
    int ok = 1, finished = 0, calls = 1;
    for (; !finished && ok && calls < 1000; calls++) {
        besa_checkpoint *c = NULL;
        besa_tokens t;
        memset(&t, 0, sizeof t);
        fault_kind = FAULT_MEMORY, fault_at = calls, fault_calls = 0;
        besa_result result = dir ? besa_checkpoint_open(&c, dir, &err) : besa_tokens_load(&t, tokens, &err);
        finished = fault_calls < calls;
        fault_kind = FAULT_NONE;
        ok = (finished || (result == BESA_ERROR_MEMORY && err.code == result)) && (result == BESA_OK || live_blocks == blocks);
        besa_checkpoint_close(c);
        besa_tokens_free(&t);
        ok = ok && live_blocks == blocks;
        if (!ok) printf("  call %d: %s, %d blocks kept\n", calls, result ? err.message : "", (int)(live_blocks - blocks));
    }
    check(name, ok && finished && calls > 2);
}

static void test_frees(void)
{
    static const unsigned char bad[16] = { 1, 0, 0, 0, 255, 255, 255, 255 };
    unsigned char file[256];
    check_frees("frees: one file", make_model("frees", 0), NULL);
    check_frees("frees: shards", make_model("frees", 1), NULL);
    check_frees("frees: a head that differs", make_headed("frees", 1), NULL);
    check_frees("frees: a head of another shape", make_headed("frees", 3), NULL);
    put_text(at("frees"), "adapter_config.json", "{}");
    check_frees("frees: and an adapter", at("frees"), NULL);
    put_text(at("frees"), "config.json", "{\"model_type\":\"llama\",\"hidden_size\":-1}");
    check_frees("frees: a bad config", at("frees"), NULL);
    put(at("f.npy"), file, npy(file, 1, "{'descr': '<i4', 'fortran_order': False, 'shape': (1,), }", bad, 4));
    check_frees("frees: .npy", NULL, at("f.npy"));
    put(at("f.npy"), file, npy(file, 1, "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }", bad, 8));
    check_frees("frees: .npy with a bad id", NULL, at("f.npy"));
    put(at("f.npy"), file, npy(file, 1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bad, 8));
    check_frees("frees: .npy of floats", NULL, at("f.npy"));
    put(at("f.i32"), bad, 8);
    check_frees("frees: raw with a bad id", NULL, at("f.i32"));
}

/* Whether a child that makes this many system calls before it is killed has finished instead; -1: it failed. */
static int finished_before(const besa_checkpoint *c, const char *out, int calls)
{
    int status;
    int64_t done;
    pid_t child = fork();
    if (child == 0) {
        fault_kind = FAULT_KILL;
        fault_at = calls, fault_calls = 0;
        _exit(run_writer(c, out, "fp 1", 3, &done) == BESA_OK ? 0 : 1);
    }
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? 0 : WEXITSTATUS(status) ? -1 : 1;
}

/* Names in a directory that begin so. */
static int names_like(const char *directory, const char *start)
{
    DIR *d = opendir(directory);
    struct dirent *e;
    int n = 0;
    while (d && (e = readdir(d)) != NULL) n += !strncmp(e->d_name, start, strlen(start));
    if (d) closedir(d);
    return n;
}

/* Killed again and again, each time a call later, without cleaning up in between. */
static void test_kill(void)
{
    const char *out = at("killed");
    besa_checkpoint *c;
    int calls = 1, finished = 0;
    if (besa_checkpoint_open(&c, at("src2"), &err) != BESA_OK) return;
    for (; !finished && calls < 1000; calls++) finished = exists(out) ? 1 : finished_before(c, out, calls);
    check("killed a call later each time, ends the same", finished == 1 && same_output(out, at("ref2")));
    check("and leaves nothing beside it", names_like(root, "killed") == 1);
    besa_checkpoint_close(c);
}

/* Killed at each system call in turn, each time from the start: what is left is the output and nothing beside it, or is
 * gone on from. */
static void test_kill_points(void)
{
    const char *out = at("killpoint");
    besa_checkpoint *c;
    int64_t done;
    int ok = 1, finished = 0, calls = 1;
    if (besa_checkpoint_open(&c, at("src2"), &err) != BESA_OK) return;
    for (; !finished && ok && calls < 1000; calls++) {
        finished = finished_before(c, out, calls);
        if (!finished && !exists(out)) ok = run_writer(c, out, "fp 1", 3, &done) == BESA_OK;
        ok = ok && finished >= 0 && same_output(out, at("ref2")) && names_like(root, "killpoint") == 1;
        if (!ok) printf("  call %d: %s\n", calls, err.message);
        clean(out);
        clean(partial(out, ""));
    }
    printf("  %d calls\n", calls - 2);
    check("killed at each system call, resumed: the same bytes", ok && finished);
    besa_checkpoint_close(c);
}

/* What a loss of power leaves is as good as what a kill leaves: bytes are on disk before the line that says so, all of it
 * before a name says so; whether the run is a new one or goes on. */
static void test_sync_order(const char *source, const char *reference)
{
    besa_checkpoint *c;
    int64_t done;
    if (besa_checkpoint_open(&c, source, &err) != BESA_OK) return;
    for (int resumed = 0; resumed < 2; resumed++) {
        const char *out = at("ordered");
        if (resumed) run_writer(c, out, "fp 1", 1, &done);
        memset(&ledger, 0, sizeof ledger);
        ledger.watching = 1;
        besa_result result = run_writer(c, out, "fp 1", 3, &done);
        ledger_expect_clean("the end", "", 0);
        ledger.watching = 0;
        check_error("order of writes", result, BESA_OK, NULL);
        check(resumed ? "order of writes, resumed: synced before it is said" : "order of writes: synced before it is said",
              !ledger.violations && done == resumed && same_output(out, reference));
        if (ledger.violations) printf("  %s\n", ledger.first);
        check("order of writes: lines and renames", ledger.lines == (resumed ? 2 : 6) && ledger.renames == 2);
        clean(out);
    }
    besa_checkpoint_close(c);
}

/* A begun output of one block, and a second file of the run's. */
static void begin_output(const besa_checkpoint *c, const char *out)
{
    int64_t done;
    clean(out);
    clean(partial(out, ""));
    run_writer(c, out, "fp 1", 1, &done);
}

/* What others have put into OUT.partial: neither read as a file, nor written through, nor deleted. */
static void test_places(void)
{
    static const char *const names[] = { "besa-journal", "model-00002-of-00002.safetensors", "tokenizer.json", "config.json",
                                         "model.safetensors.index.json" };
    const char *out = at("places"), *mine = at("places-mine");
    besa_checkpoint *c;
    besa__writer *w;
    int64_t done;
    char path[1200], label[200], journal[64];
    size_t n;
    if (besa_checkpoint_open(&c, at("src2"), &err) != BESA_OK) return;
    for (int kind = 0; kind < 3; kind++)        /* a FIFO, a socket, a directory where a file should be */
        for (int i = 0; i < 5; i++) {
            begin_output(c, out);
            snprintf(path, sizeof path, "%s.partial/%s", out, names[i]);
            unlink(path);
            if (kind == 2) mkdir(path, 0777);
            else mknod(path, (kind ? S_IFSOCK : S_IFIFO) | 0666, 0);
            alarm(20);                          /* instead of waiting for a writer */
            snprintf(label, sizeof label, "places: kind %d in place of %s", kind, names[i]);
            check_error(label, run_writer(c, out, "fp 1", 3, &done), BESA_ERROR_EXISTS, names[i]);
            alarm(0);
            check("places: it is still there", exists(path) && !exists(out));
            clean(path);
        }
    for (int i = 1; i < 5; i++) {               /* another name of the same file: a backup made by cp -al */
        begin_output(c, out);
        snprintf(path, sizeof path, "%s.partial/%s", out, names[i]);
        if (!exists(path)) put(path, "other", 5);
        clean(mine);
        if (link(path, mine)) check("places: link", 0);
        char *before = get(mine, &n), *after;
        size_t m;
        besa_result result = run_writer(c, out, "fp 1", 3, &done);
        snprintf(label, sizeof label, "places: %s has a second name", names[i]);
        check_error(label, result, i == 1 ? BESA_ERROR_EXISTS : BESA_OK, "hard links");
        after = get(mine, &m);
        check("places: which keeps its contents", before && after && n == m && !memcmp(before, after, n));
        free(before);
        free(after);
        unlink(mine);
        if (result != BESA_OK) result = run_writer(c, out, "fp 1", 3, &done);
        check("places: and the output is right", result == BESA_OK && same_output(out, at("ref2")));
    }
    /* giving up, and failing to begin, leave a foreign file and say so */
    begin_output(c, out);
    put(partial(out, "/notes.txt"), "mine", 4);
    besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
    err.code = BESA_ERROR_CANCELLED;
    snprintf(err.message, sizeof err.message, "stopped");
    besa__writer_abandon(w, 2, &err);
    check_error("places: discarded", err.code, BESA_ERROR_CANCELLED, "stopped; ");
    check("places: the message names the foreign file", strstr(err.message, "notes.txt") && strstr(err.message, ".partial stays"));
    shell("ls -A '%s' > '%s'", partial(out, ""), mine);
    char *left = get(mine, &n);
    check("places: which alone is left", left && !strcmp(left, "notes.txt\n"));
    free(left);
    clean(partial(out, ""));
    begin_output(c, out);
    snprintf(journal, sizeof journal, "besa-journal 1");
    snprintf(path, sizeof path, "%s %016llx\n", journal, (unsigned long long)besa__hash(BESA__HASH_START, journal, strlen(journal)));
    put(partial(out, "/besa-journal"), path, strlen(path)); /* killed while it was copied */
    put(partial(out, "/notes.txt"), "mine", 4);
    unlink(partial(out, "/tokenizer.json"));
    mkfifo(partial(out, "/tokenizer.json"), 0666);
    check_error("places: a failed start", run_writer(c, out, "fp 1", 3, &done), BESA_ERROR_EXISTS, "tokenizer.json");
    check("places: leaves both", exists(partial(out, "/notes.txt")) && exists(partial(out, "/tokenizer.json")));
    check("places: and none of its own", !exists(partial(out, "/besa-journal")) && !exists(partial(out, "/empty.txt")) &&
          !exists(partial(out, "/model-00001-of-00002.safetensors")) && strstr(err.message, ".partial stays"));
    clean(partial(out, ""));
    begin_output(c, out);                       /* a run that ends well says what else becomes part of the output */
    put(partial(out, "/notes.txt"), "mine", 4);
    char *notes = NULL;
    check_error("places: resumed beside a foreign file", besa__writer_open(&w, c, out, "fp 1", 3, &done, &notes, &err), BESA_OK, NULL);
    check("places: is noted", notes && strstr(notes, "notes.txt"));
    BESA_FREE(notes);
    besa__writer_abandon(w, 0, NULL);
    clean(partial(out, ""));
    /* the last rename replaces nothing, not even an empty directory; with and without renameat2 */
    static const int lacking[] = { 0, ENOSYS, EINVAL };
    for (int i = 0; i < 3; i++) {
        no_renameat2 = lacking[i];
        begin_output(c, out);
        besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
        for (int64_t b = 1; b < 3; b++) write_block(w, c, b);
        mkdir(out, 0777);
        check_error("places: OUT has come to exist", besa__writer_finish(w, &err), BESA_ERROR_EXISTS, "come to exist");
        check("places: and is not replaced", rmdir(out) == 0 && exists(partial(out, "")) && names_like(root, "places.partial") == 1);
        check("places: finished later", run_writer(c, out, "fp 1", 3, &done) == BESA_OK && done == 3 && same_output(out, at("ref2")));
    }
    no_renameat2 = 0;
    clean(out);
    besa_checkpoint_close(c);
}

static int mode_of(const char *directory, const char *name)
{
    char path[1200];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return stat(path, &st) ? -1 : (int)(st.st_mode & 0777);
}

/* Files are as private as the source's; a umask takes away more. Reading only does not keep a run from going on. */
static void test_permissions(void)
{
    static const char *const names[] = { "config.json", "model.safetensors", "tokenizer.json", "empty.txt" };
    static const mode_t modes[] = { 0600, 0640, 0444, 0666 }, masks[] = { 022, 077, 0 };
    const char *src = at("modes"), *out = at("modes-out");
    besa_checkpoint *c;
    int64_t done;
    clean(src);
    shell("cp -r '%s' '%s'", at("src1"), src);
    for (int m = 0; m < 3; m++)
        for (int shift = 0; shift < 4; shift++) {
            mode_t old = umask(masks[m]);
            int same = 1;
            for (int i = 0; i < 4; i++) {
                char path[1200];
                snprintf(path, sizeof path, "%s/%s", src, names[i]);
                chmod(path, modes[(i + shift) % 4]);
            }
            if (besa_checkpoint_open(&c, src, &err) != BESA_OK) break;
            run_writer(c, out, "fp 1", 1, &done);
            besa_result result = run_writer(c, out, "fp 1", 3, &done);
            umask(old);
            for (int i = 0; i < 4; i++) same = same && mode_of(out, names[i]) == (int)(modes[(i + shift) % 4] & ~masks[m]);
            check_error("permissions: resumed", result, BESA_OK, NULL);
            check("permissions are the source's", same && done == 1);
            besa_checkpoint_close(c);
            clean(out);
            clean(partial(out, ""));
        }
    chmod(src, 0700);
    if (besa_checkpoint_open(&c, src, &err) != BESA_OK) return;
    run_writer(c, out, "fp 1", 3, &done);
    check("permissions of the directory", mode_of(out, ".") == 0700);
    besa_checkpoint_close(c);
    clean(out);
    clean(src);
}

/* A source file is replaced while the run goes on: by the same contents, by others, by nothing; then it is put back. The output
 * is of what was read, or the error names the file and the blocks are kept. */
static void test_source_changes(void)
{
    static const char *const names[] = { "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
                                         "model-00002-of-00002.safetensors", "tokenizer.json" };
    const char *src = at("changes"), *out = at("changes-out");
    char path[1200], aside[1300], label[200];
    int64_t done;
    clean(src);
    shell("cp -r '%s' '%s'", at("src2"), src);
    shell("cd '%s' && rm generation_config.json && cp config.json generation_config.json%s", src, ""); /* no link to a file that changes */
    for (int i = 0; i < 5; i++)
        for (int change = 0; change < 5; change++) {
            besa_checkpoint *c;
            besa__writer *w;
            size_t n;
            if (besa_checkpoint_open(&c, src, &err) != BESA_OK) return check("changes: source opens", 0);
            snprintf(path, sizeof path, "%s/%s", src, names[i]);
            snprintf(aside, sizeof aside, "%s.old", path);
            char *bytes = get(path, &n);
            if (change == 4) put(path, "x", i < 2 ? 1 : 0);  /* before the run begins, and put back during it: only small files */
            if (change == 4 && i > 1) put(path, bytes, n);
            besa_result result = besa__writer_open(&w, c, out, "fp 1", 3, &done, NULL, &err);
            for (int64_t b = 0; b < 3 && result == BESA_OK; b++) {
                besa__block_tensors t;
                if (besa__block_bind(&t, c, b, &err) == BESA_OK)
                    for (int l = 0; l < BESA_LAYERS; l++) besa__writer_saw(w, t.weight[l], 0, t.weight[l]->data, t.weight[l]->bytes);
                result = write_block(w, c, b);
            }
            check_error("changes: blocks", result, BESA_OK, NULL);
            if (change < 4) rename(path, aside);
            if (change == 0 || change == 4) put(path, bytes, n);
            if (change == 1) {                  /* the last byte: of shards a weight */
                bytes[n - 1] ^= 1;
                put(path, bytes, n);
                bytes[n - 1] ^= 1;
            }
            if (change == 2) put(path, bytes, n - 1);
            result = besa__writer_finish(w, &err);
            snprintf(label, sizeof label, "changes: %s, change %d", names[i], change);
            check_error(label, result, change > 0 && change < 4 ? BESA_ERROR_READ : BESA_OK, names[i]);
            if (result != BESA_OK) {
                check("changes: the blocks are kept", !exists(out) && exists(partial(out, "/besa-journal")));
                rename(aside, path);
                check("changes: put back, it goes on", run_writer(c, out, "fp 1", 3, &done) == BESA_OK && done == 3);
            }
            check("changes: the output is of what was read", same_output(out, at("ref2")));
            unlink(aside);
            free(bytes);
            besa_checkpoint_close(c);
            clean(out);
            clean(partial(out, ""));
        }
    clean(src);
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

/* Inputs of every reader, mutated: no crash, an error that says something, and each reader takes some and refuses some. */
static void test_fuzz(int rounds)
{
    static const char *const seeds[] = {
        "0{\"a\":[1,2.5e3,null,true],\"b\":{\"c\":\"\\u00e9\\ud83d\\ude00\"}}",
        "3{\"model_type\":\"qwen2\",\"hidden_size\":8,\"intermediate_size\":12,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"num_hidden_layers\":3,\"vocab_size\":10,"
        "\"use_sliding_window\":true,\"max_window_layers\":1,\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}}" };
    static const char header[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F16\",\"shape\":[2,1],\"data_offsets\":[4,8]}}";
    static const char index[] = "4{\"metadata\":{\"total_size\":8},\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"x.safetensors\",\"c\":\"y.safetensors\"}}";
    unsigned char input[5][512], work[600];
    size_t size[5];
    uint64_t n = 0;
    for (int i = 0; i < 2; i++) memcpy(input[i], seeds[i], size[i] = strlen(seeds[i]));
    memset(input[2], 0, 512);
    input[2][0] = '1';
    input[2][1] = sizeof header - 1;
    memcpy(input[2] + 9, header, sizeof header - 1);
    size[2] = 9 + sizeof header - 1 + 8;
    input[3][0] = '2';
    size[3] = 1 + npy(input[3] + 1, 1, "{'descr': '<u2', 'fortran_order': False, 'shape': (2, 3), }\n", header, 12);
    memcpy(input[4], index, size[4] = strlen(index));
    for (int r = 0; r < rounds; r++)
        for (int i = 0; i < 5; i++) {
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
    int kinds = 0;
    for (int i = 0; i < 5; i++) kinds += fuzz_taken[i] && fuzz_refused[i];
    check("mutated inputs: of every kind some are taken and some refused", kinds == 5);
}

int main(int argc, char **argv)
{
    if (argc < 3) return printf("usage: test_io CHECKPOINTS SCRATCH\n"), 2;
    snprintf(root, sizeof root, "%s/besa_io_XXXXXX", argv[2]);
    if (!mkdtemp(root)) return printf("cannot work in %s\n", argv[2]), 2;
    test_references(argv[1]);
    test_json();
    test_json_memory();
    test_file_memory();
    test_headers();
    test_index();
    test_config();
    test_config_ranges();
    test_config_public();
    test_windows();
    test_unknown_settings();
    test_head_defaults();
    test_mixed_types();
    test_tokens();
    test_token_widths();
    test_tied_head();
    test_adapters();
    test_left_out();
    test_frees();
    check("every error of the readers frees what it took", !live_blocks);
    test_writer(0);
    test_writer(1);
    test_left_out();
    test_kill();
    test_kill_points();
    test_sync_order(at("src1"), at("ref1"));
    test_sync_order(at("src2"), at("ref2"));
    test_places();
    test_permissions();
    test_source_changes();
    test_faults(FAULT_ERROR);
    test_faults(FAULT_MEMORY);
    test_full_disk();
    test_fuzz(argc > 3 ? atoi(argv[3]) : 20000);
    check("everything is freed", !live_blocks && !live_bytes);
    clean(root);
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed != 0;
}
