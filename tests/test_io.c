/* test_io - checkpoints, configs, token files and the output directory, in calls of the library's own readers and writer.
 *
 *     test_io CHECKPOINTS SCRATCH [part of a test's name]
 *
 * CHECKPOINTS: the folder of the five reference checkpoints. SCRATCH: an existing directory to work in, best one in memory.
 * What is slow or fails in the real world is played: system calls and allocations that fail, a kill at any of them, a loss
 * of power, short writes, a disk that is full. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include "test.h"

/* Every system call that besa.h makes on files, and every allocation, is counted; the chosen one fails or is the last. With
 * fault_stays all that follow it fail too. */
enum { FAULT_NONE, FAULT_KILL, FAULT_ERROR, FAULT_MEMORY };
static int fault_kind, fault_at, fault_calls, fault_stays, short_writes, no_renameat2, no_fallocate, posix_allocations;

static int fault(int kind)
{
    if (fault_kind == FAULT_NONE || (kind == FAULT_MEMORY) != (fault_kind == FAULT_MEMORY)) return 0;
    if (++fault_calls != fault_at && !(fault_stays && fault_calls > fault_at)) return 0;
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
static int no_fsync;                            /* why fsync fails each time; 0: it does not */
static int io_fsync(int fd)
{
    if (fault(FAULT_ERROR)) return -1;
    if (no_fsync) return errno = no_fsync, -1;
    ledger_sync(fd);
    return fsync(fd);
}
static int io_ftruncate(int fd, off_t n) { return fault(FAULT_ERROR) ? -1 : ftruncate(fd, n); }
__attribute__((unused)) static int io_fallocate(int fd, off_t at, off_t n)
{
    posix_allocations++;
    return fault(FAULT_ERROR) ? EIO : no_fallocate ? no_fallocate : posix_fallocate(fd, at, n);
}
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
/* what another process does just before the lock is taken: up to two renames, from and to */
static const char *before_lock[4];
static int io_flock(int fd, int how)
{
    if (fault(FAULT_ERROR)) return -1;
    for (int i = 0; i < 4 && before_lock[i]; i += 2)
        if (rename(before_lock[i], before_lock[i + 1])) return -1;
    memset(before_lock, 0, sizeof before_lock);
    return flock(fd, how);
}
static DIR *io_fdopendir(int fd) { return fault(FAULT_ERROR) ? NULL : fdopendir(fd); }
static struct dirent *io_readdir(DIR *list) { return fault(FAULT_ERROR) ? NULL : readdir(list); }
static int io_fstatat(int fd, const char *path, struct stat *st, int how) { return fault(FAULT_ERROR) ? -1 : fstatat(fd, path, st, how); }
static int io_fchmod(int fd, mode_t mode) { return fault(FAULT_ERROR) ? -1 : fchmod(fd, mode); }
static int io_fchmodat(int fd, const char *path, mode_t mode, int how) { return fault(FAULT_ERROR) ? -1 : fchmodat(fd, path, mode, how); }
/* The two system calls that are made without libc's function: renameat2 and, on 64 bits, fallocate. A kernel or file system that
 * lacks one is played by no_renameat2 and no_fallocate. */
static long io_syscall(long number, ...)
{
    va_list args;
    va_start(args, number);
#ifdef SYS_fallocate
    if (number == SYS_fallocate) {
        int fd = va_arg(args, int), mode = va_arg(args, int);
        off_t at = va_arg(args, off_t), n = va_arg(args, off_t);
        va_end(args);
        if (no_fallocate) return errno = no_fallocate, -1;
        return fault(FAULT_ERROR) ? -1 : syscall(number, fd, mode, at, n);
    }
#endif
    int a = va_arg(args, int);
    const char *from = va_arg(args, const char *);
    int c = va_arg(args, int);
    const char *to = va_arg(args, const char *);
    unsigned how = va_arg(args, unsigned);
    va_end(args);
    if (no_renameat2) return errno = no_renameat2, -1;
    if (fault(FAULT_ERROR)) return -1;
    ledger_rename(c, to);
    return syscall(number, a, from, c, to, how);
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
#define fdopendir io_fdopendir
#define readdir io_readdir
#define mmap io_mmap
#define BESA_MALLOC io_malloc
#define BESA_REALLOC io_realloc
#define BESA_FREE io_free
#define BESA_API static inline          /* what is not called is not compiled */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "fixture.h"
#include "fuzz_io.c"

static besa_error err;

/* ---- checks ------------------------------------------------------------------------------ */

/* The library said `got`: it must be `want`, and the message of an error must have the words. */
static void expect(int line, const char *what, besa_result got, besa_result want, const char *words)
{
    int same = got == want && (got == BESA_OK || (err.code == got && (!words || strstr(err.message, words))));
    test_check(same, __FILE__, line, "%s: got %s (%s), expected %s (%s)", what, besa_result_string(got),
               got ? err.message : "", besa_result_string(want), words ? words : "");
}

/* A call that must end so; of a table's case, which a name tells. */
#define CHECK_ERROR(call, want, words)      expect(__LINE__, #call, call, want, words)
#define CHECK_CASE(name, call, want, words) expect(__LINE__, name, call, want, words)

/* What the library takes in a test it gives back. */
static void check_freed(size_t blocks, size_t bytes)
{
    CHECK(live_blocks == blocks && live_bytes == bytes, "%d blocks, %d bytes are not freed", (int)(live_blocks - blocks),
          (int)(live_bytes - bytes));
}

static void run(void (*body)(void))
{
    size_t blocks = live_blocks, bytes = live_bytes;
    body();
    check_freed(blocks, bytes);
}

/* The same with a model of one file (0), then of shards (1). */
static void run_both(void (*body)(int sharded))
{
    size_t blocks = live_blocks, bytes = live_bytes;
    for (int sharded = 0; sharded < 2; sharded++) {
        int failed = test.checks_failed;
        body(sharded);
        if (failed < test.checks_failed) printf("    with a model of %s\n", sharded ? "shards" : "one file");
    }
    check_freed(blocks, bytes);
}

/* ---- files ------------------------------------------------------------------------------- */

/* directory/name, kept until test_finish */
static const char *in(const char *directory, const char *name)
{
    char *path = (char *)take(640);
    snprintf(path, 640, "%s/%s", directory, name);
    return path;
}

static void put_text(const char *directory, const char *name, const char *text)
{
    write_bytes(in(directory, name), text, strlen(text));
}

__attribute__((format(printf, 1, 2))) static void shell(const char *format, ...)
{
    char command[2400];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    CHECK(system(command) == 0, "failed: %s", command);
}

/* The first line that a command prints. */
__attribute__((format(printf, 3, 4))) static void shell_line(char *line, int size, const char *format, ...)
{
    char command[2400];
    va_list args;
    FILE *f;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    *line = 0;
    f = popen(command, "r");
    if (f && !fgets(line, size, f)) *line = 0;
    if (f) pclose(f);
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

/* ---- a small checkpoint ------------------------------------------------------------------ */

/* a tensor as a header has it */
#define TENSOR(dtype, shape, offsets) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

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
    write_bytes(path, file, 8 + n + data);
    free(file);
}

static const char small_config[] =
    "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":8,\"intermediate_size\":12,"
    "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"num_hidden_layers\":3,\"vocab_size\":10,"
    "\"tie_word_embeddings\":true,\"rope_theta\":10000.0}";

/* A block's tensors without the first `skip`; where `half` is 1 the first HALF of them. */
enum { HALF = 5 };

static void block_tensors(shard_text *s, int b, int skip, int half)
{
    static const struct {
        const char *name;
        int rows, columns;
    } t[] = {
        { "self_attn.q_proj", 8, 8 },
        { "self_attn.k_proj", 4, 8 },
        { "self_attn.v_proj", 4, 8 },
        { "self_attn.o_proj", 8, 8 },
        { "mlp.gate_proj", 12, 8 },
        { "mlp.up_proj", 12, 8 },
        { "mlp.down_proj", 8, 12 },
        { "input_layernorm", 8, 0 },
        { "post_attention_layernorm", 8, 0 } };
    char name[128];
    for (int i = skip; i < (half ? HALF : (int)(sizeof t / sizeof *t)); i++) {
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", b, t[i].name);
        add_tensor(s, name, "BF16", 2, t[i].rows, t[i].columns);
    }
    if (half) return;
    snprintf(name, sizeof name, "model.layers.%d.self_attn.rotary_emb.inv_freq", b);
    add_tensor(s, name, "I64", 8, 2, 0);
}

/* Blocks first .. last-1; of a model's `part` 1 and 2 block 1 has its first half in the one, the rest in the other. */
static void put_shard(const char *dir, const char *name, int first, int last, int part)
{
    static shard_text s;
    memset(&s, 0, sizeof s);
    if (part != 1) add_tensor(&s, "model.embed_tokens.weight", "BF16", 2, 10, 8);
    for (int b = first; b < last; b++) block_tensors(&s, b, part == 2 && b == 1 ? HALF : 0, part == 1 && b == 1);
    if (part != 1) add_tensor(&s, "model.norm.weight", "BF16", 2, 8, 0);
    s.n += (size_t)snprintf(s.header + s.n, sizeof s.header - s.n, ",\"__metadata__\":{\"format\":\"pt\"}}   ");
    put_raw(in(dir, name), s.header, s.data, (unsigned)(first + 1));
}

#define INDEX "model.safetensors.index.json"
#define SHARD_1 "model-00001-of-00002.safetensors"
#define SHARD_2 "model-00002-of-00002.safetensors"

/* A model of three blocks: in one file, or in two shards (block 0 and half of block 1, the rest). */
static const char *make_model(const char *name, int sharded)
{
    const char *dir = temp_path("%s", name);
    remove_tree(dir);
    mkdir(dir, 0777);
    put_text(dir, "config.json", small_config);
    if (!sharded) {
        put_shard(dir, "model.safetensors", 0, 3, 0);
        return dir;
    }
    put_shard(dir, SHARD_1, 0, 2, 1);
    put_shard(dir, SHARD_2, 1, 3, 2);
    put_text(dir, INDEX, "{\"metadata\":{\"total_size\":1},\"weight_map\":{\"model.norm.weight\":\"" SHARD_2 "\","
                         "\"model.layers.0.mlp.up_proj.weight\":\"" SHARD_1 "\"}}");
    return dir;
}

/* The small model with a head beside the tied embedding. */
enum { HEAD_SAME, HEAD_OTHER_BIT, HEAD_OTHER_TYPE, HEAD_OTHER_SHAPE, HEAD_NO_WEIGHTS };

static const char *make_headed(const char *name, int kind)
{
    static shard_text s;
    const char *dir = make_model(name, 0), *path = in(dir, "model.safetensors");
    const char *dtype = kind == HEAD_OTHER_TYPE ? "F16" : kind == HEAD_NO_WEIGHTS ? "I16" : "BF16";
    size_t n;
    memset(&s, 0, sizeof s);
    add_tensor(&s, "model.embed_tokens.weight", "BF16", 2, 10, 8);
    add_tensor(&s, "lm_head.weight", dtype, 2, kind == HEAD_OTHER_SHAPE ? 11 : 10, 8);
    for (int b = 0; b < 3; b++) block_tensors(&s, b, 0, 0);
    add_tensor(&s, "model.norm.weight", "BF16", 2, 8, 0);
    s.n += (size_t)snprintf(s.header + s.n, sizeof s.header - s.n, "}");
    put_raw(path, s.header, s.data, 5);
    unsigned char *file = read_bytes(path, &n), *data = file + 8 + s.n;
    memcpy(data + 160, data, 160);              /* the embedding again, and its last byte */
    data[319] ^= kind == HEAD_OTHER_BIT;
    write_bytes(path, file, n);
    free(file);
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

/* The checkpoint, which must open; NULL if it does not. */
static besa_checkpoint *open_model(const char *dir)
{
    besa_checkpoint *c = NULL;
    CHECK_OK(besa_checkpoint_open(&c, dir, &err), err);
    return c;
}

/* ---- reference checkpoints ----------------------------------------------------------------- */

static const char *g_checkpoints;               /* the directory of the five */

typedef struct reference_case {
    const char *name;
    int64_t tensors, heads, kv_heads, head_dim;
    int tied, qk_norm;
    double theta;
} reference_case;

static void check_reference_config(const reference_case *t, const besa_config *g)
{
    const besa_block_shape *b = &g->block;
    CHECK(g->vocab_size == 199 && g->num_hidden_layers == 3 && b->hidden_size == 48 && b->intermediate_size == 104,
          "%s: vocabulary %d, %d layers of %d and %d", t->name, (int)g->vocab_size, (int)g->num_hidden_layers,
          (int)b->hidden_size, (int)b->intermediate_size);
    CHECK(b->num_attention_heads == t->heads && b->num_key_value_heads == t->kv_heads && b->head_dim == t->head_dim,
          "%s: %d and %d heads of %d", t->name, (int)b->num_attention_heads, (int)b->num_key_value_heads, (int)b->head_dim);
    CHECK(g->qk_norm == t->qk_norm && g->tie_word_embeddings == t->tied, "%s: qk_norm %d, tied %d", t->name, g->qk_norm,
          g->tie_word_embeddings);
    CHECK(fabs(b->rope.theta - t->theta) < 1e-9, "%s: rope_theta %g", t->name, b->rope.theta);
}

static void check_reference_tensors(const reference_case *t, besa_checkpoint *c)
{
    const besa_tensor *down = besa_checkpoint_find(c, "model.layers.2.mlp.down_proj.weight");
    besa__model model;
    CHECK(besa_checkpoint_tensor_count(c) == t->tensors, "%s: %d tensors", t->name, (int)besa_checkpoint_tensor_count(c));
    CHECK(!besa_checkpoint_find(c, "no such") && !besa_checkpoint_tensor(c, t->tensors), "%s: a tensor too many", t->name);
    CHECK_OK(besa__model_bind(&model, c, &err), err);
    CHECK((model.head == model.embedding) == t->tied, "%s: tied %d", t->name, model.head == model.embedding);
    if (!CHECK(down != NULL, "%s: no down_proj", t->name)) return;
    CHECK(down->shape[0] == 48 && down->shape[1] == 104, "%s: down_proj has shape [%d, %d]", t->name, (int)down->shape[0],
          (int)down->shape[1]);
    besa__release_pages(c, down);
}

static void test_reference_checkpoints(void)
{
    static const reference_case t[] = {
        { "llama_mha_f16", 30, 4, 4, 12, 0, 0, 1e4 },
        { "llama3_gqa_tied_bf16", 29, 6, 2, 16, 1, 0, 5e5 },
        { "mistral_gqa_bf16", 30, 4, 2, 8, 0, 0, 1e6 },
        { "qwen2_bias_tied_bf16", 38, 4, 2, 12, 1, 0, 1e6 },
        { "qwen3_qknorm_f32", 36, 4, 2, 20, 0, 1, 1e6 } };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        besa_checkpoint *c = open_model(in(g_checkpoints, t[i].name));
        if (!c) continue;
        check_reference_config(&t[i], besa_checkpoint_config(c));
        check_reference_tensors(&t[i], c);
        besa_checkpoint_close(c);
    }
}

/* What only one of the families has. */
static void test_reference_families(void)
{
    besa_checkpoint *c = open_model(in(g_checkpoints, "llama3_gqa_tied_bf16"));
    if (!c) return;
    const besa_config *g = besa_checkpoint_config(c);
    CHECK(g->block.rope.type == BESA_ROPE_LLAMA3 && fabs(g->block.rope.factor - 8) < 1e-12 &&
          fabs(g->block.rope.original_max_position_embeddings - 64) < 1e-12, "llama3: rope %d, factor %g, positions %g",
          (int)g->block.rope.type, g->block.rope.factor, g->block.rope.original_max_position_embeddings);
    CHECK(fabs(g->block.rms_norm_eps - 1e-5) < 1e-18, "llama3: rms_norm_eps %g", g->block.rms_norm_eps);
    besa_checkpoint_close(c);
    if ((c = open_model(in(g_checkpoints, "mistral_gqa_bf16"))) == NULL) return;
    g = besa_checkpoint_config(c);
    CHECK(g->sliding_window == 16 && g->window[0] && g->window[2], "mistral: window %d of layers %d, %d",
          (int)g->sliding_window, g->window[0], g->window[2]);
    besa_checkpoint_close(c);
    if ((c = open_model(in(g_checkpoints, "qwen3_qknorm_f32"))) == NULL) return;
    g = besa_checkpoint_config(c);
    CHECK(g->sliding_window == 0 && !g->window[0], "qwen3: window %d, of layer 0: %d", (int)g->sliding_window,
          g->window[0]);
    besa_checkpoint_close(c);
}

/* ---- JSON ---------------------------------------------------------------------------------- */

static besa_result parse(besa__json *json, const char *text, size_t n)
{
    char *copy = (char *)io_malloc(n + 1);
    memcpy(copy, text, n);
    copy[n] = 0;
    return besa__json_parse(json, copy, n, "text", &err);
}

static void test_json_malformed(void)
{
    static const char *const bad[] = {
        "", " ", "{", "}", "[1,]", "[,1]", "{\"a\":1,}", "{a:1}", "{\"a\" 1}", "[1 2]", "01", "-", "1.", ".5", "1e", "+1", "1e999",
        "nul", "True", "NaN", "Infinity", "\"", "\"\\x\"", "\"\\u12\"", "\"\\ud800\"", "\"\\udc00\"", "\"\\u0000\"", "\"\t\"",
        "\"\\ud800\\ue000\"", "\"\\udbff\\udbff\"", "\"\\u000g\"", "\"\\u000/\"", "\"\\u000:\"", "\"\\u000@\"", "\"\x1F\"",
        "\"\xC1\xBF\"", "\"\xE0\x9F\xBF\"", "\"\xF0\x8F\xBF\xBF\"", "\"\xF4\x90\x80\x80\"", "\"\xC2\"", "\"\xF1\x80\x80\"",
        "\"\xC2\x7F\"", "\"\xC2\xC0\"", "\"\xE1\x80\x7F\"", "\"\xE1\x80\xC0\"", "\"\xC0\x80\"", "\"\xED\xA0\x80\"", "\"\xF5\x80\x80\x80\"", "\"\xE2\x82\"", "\"\x80\"", "1 1", "[1]]", "{\"a\":1,\"a\":2}",
        "{\"a\":1,\"\\u0061\":2}", "{\"1\":1,\"2\":1,\"3\":1,\"4\":1,\"5\":1,\"6\":1,\"7\":1,\"8\":1,\"9\":1,\"3\":1}", "\xEF\xBB\xBF{}" };
    besa__json json;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        err.code = BESA_OK;
        CHECK_CASE(bad[i], parse(&json, bad[i], strlen(bad[i])), BESA_ERROR_JSON, "byte ");
        besa__json_free(&json);
    }
}

static void test_json_numbers(void)
{
    static const char text[] = "[9223372036854775807, -9223372036854775808, 9223372036854775808, -0, 1e-05, 0.1, "
                               "123456789012345678901234567890, 1.7976931348623157e308, 5e-324]";
    static const struct {
        double least, most;
        int is_integer;
        int64_t integer;
    } t[] = {
        { 9223372036854775807.0, 9223372036854775807.0, 1, INT64_MAX },
        { -9223372036854775808.0, -9223372036854775808.0, 1, INT64_MIN },
        { 9223372036854775808.0, 9223372036854775808.0, 0, 0 },
        { 0, 0, 1, 0 },
        { 1e-05, 1e-05, 0, 0 },
        { 0.1, 0.1, 0, 0 },
        { 1.2e29, 1.3e29, 0, 0 },
        { 1.79e308, INFINITY, 0, 0 },
        { 5e-324, 5e-324, 0, 0 } };
    besa__json json;
    CHECK_ERROR(parse(&json, text, strlen(text)), BESA_OK, NULL);
    const besa__json_value *list = json.values, *v = besa__json_first(&json, list);
    CHECK(besa__json_count(&json, list) == 9, "%d numbers of 9", (int)besa__json_count(&json, list));
    for (int i = 0; v && i < 9; v = besa__json_next(&json, list, v), i++) {
        besa__json_number number = besa__json_number_of(&json, v);
        CHECK(number.value >= t[i].least && number.value <= t[i].most, "number %d is %.17g", i, number.value);
        CHECK(number.is_integer == t[i].is_integer && (!number.is_integer || number.integer == t[i].integer),
              "number %d: integer %d, %lld", i, number.is_integer, (long long)number.integer);
    }
    besa__json_free(&json);
}

static void test_json_strings(void)
{
    static const char text[] = " { \"k\\u00e9\\n\" : [ ], \"s\":\"\\ud83d\\ude00\\\"\\/\", \"e\":{}, \"n\":null } ";
    besa__json json;
    CHECK_ERROR(parse(&json, text, strlen(text)), BESA_OK, NULL);
    const besa__json_value *v = besa__json_get(&json, json.values, "s");
    CHECK(besa__json_get(&json, json.values, "k\xC3\xA9\n") != NULL, "a key with escapes is not found");
    const char *s = v ? besa__json_string(&json, v) : "missing";
    CHECK(!strcmp(s, "\xF0\x9F\x98\x80\"/"), "\"s\" is %s", s);
    besa__json_free(&json);
}

/* The first and the last character of each length, as they are and as escapes. */
static void test_json_characters(void)
{
    static const struct { const char *escape, *bytes; } t[] = {
        { "\\u0020", " " },                    { "\\u007f", "\x7F" },
        { "\\u0080", "\xC2\x80" },             { "\\u07ff", "\xDF\xBF" },
        { "\\u0800", "\xE0\xA0\x80" },         { "\\uD7fF", "\xED\x9F\xBF" },
        { "\\ue000", "\xEE\x80\x80" },         { "\\uffff", "\xEF\xBF\xBF" },
        { "\\ud800\\udc00", "\xF0\x90\x80\x80" }, { "\\udbff\\udfff", "\xF4\x8F\xBF\xBF" },
        { "\\uaBc9", "\xEA\xAF\x89" } };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        char text[64];
        besa__json json;
        snprintf(text, sizeof text, "[\"%s\",\"%s\"]", t[i].escape, t[i].bytes);
        CHECK_CASE(t[i].escape, parse(&json, text, strlen(text)), BESA_OK, NULL);
        const besa__json_value *v = json.values ? besa__json_first(&json, json.values) : NULL;
        for (int k = 0; k < 2 && v; k++, v = besa__json_next(&json, json.values, v))
            CHECK(!strcmp(besa__json_string(&json, v), t[i].bytes), "%s: %s", t[i].escape, k ? "its bytes" : "the escape");
        besa__json_free(&json);
    }
}

static void test_json_depth(void)
{
    besa__json json;
    char deep[200];
    memset(deep, '[', 100);
    memset(deep + 100, ']', 100);
    CHECK_ERROR(parse(&json, deep, 200), BESA_ERROR_JSON, "deeply");
    besa__json_free(&json);
}

static void test_json_time(void)
{
    besa__json json;
    size_t n = 0, room = 12u << 20;
    char *big = (char *)malloc(room);
    big[n++] = '{';
    for (int i = 0; n < (10u << 20); i++)
        n += (size_t)snprintf(big + n, 100, "%s\"model.layers.%d.some_long_common_name.weight\":\"model-1-of-2.safetensors\"",
                              i ? "," : "", i);
    big[n++] = '}';
    clock_t start = clock();
    CHECK_ERROR(parse(&json, big, n), BESA_OK, NULL);
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    CHECK(seconds < 5, "%.1f s", seconds);
    besa__json_free(&json);
    free(big);
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

/* The most bytes held since peak_bytes was set to 0, beyond those held `before`, are no more than that. */
static void check_peak(const char *name, size_t before, size_t allowed)
{
    CHECK(peak_bytes - before <= allowed, "%s: %zu bytes, allowed are %zu", name, peak_bytes - before, allowed);
    if (getenv("TEST_VERBOSE")) printf("    %s: %.2f MB\n", name, (double)(peak_bytes - before) / 1e6);
}

/* A text costs its own size and at most three times that, whatever it holds. */
static void test_json_memory(void)
{
    static const struct {
        const char *name, *begin, *unit, *end;
    } t[] = {
        { "numbers", "[", "0,", "0]" },
        { "lists", "[", "[],", "0]" },
        { "objects", "[", "{},", "0]" },
        { "lists of one", "[", "[0],", "0]" },
        { "objects of one", "[", "{\"\":0},", "0]" },
        { "members", "{", "\"%d\":0,", "\"\":0}" },
        { "strings", "[", "\"\",", "0]" },
        { "one string", "[\"", ",[{:\\\"", "\"]" },
        { "weight_map", "{\"weight_map\":{", "\"model.layers.%d.mlp.up_proj.weight\":\"" SHARD_1 "\",", "\"a\":\"b\"}}" } };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        besa__json json;
        size_t n, before = live_bytes;
        char *text = repeated(t[i].begin, t[i].unit, t[i].end, 1 << 20, &n);
        peak_bytes = 0;
        CHECK_CASE(t[i].name, parse(&json, text, n), BESA_OK, NULL);
        check_peak(t[i].name, before, 4 * n + 4096);
        besa__json_free(&json);
        CHECK(live_bytes == before, "%s: %d bytes are not freed", t[i].name, (int)(live_bytes - before));
        free(text);
    }
}

/* The same of files: a config.json with long lists, and a header of many small tensors with the table made of it. */
static void test_file_memory(void)
{
    const char *dir = make_model("large", 0);
    char begin[sizeof small_config];
    size_t n, before = live_bytes;
    memcpy(begin, small_config, sizeof begin);
    begin[strlen(begin) - 1] = 0;               /* without its brace */
    char *text = repeated(begin, ",\"%d\":[[0],0]", "}", 1 << 20, &n);
    put_text(dir, "config.json", text);
    free(text);
    peak_bytes = 0;
    CHECK_ERROR(open_close(dir), BESA_OK, NULL);
    check_peak("config.json", before, 5 * n + (64 << 10));
    text = repeated("{", "\"%d\":" TENSOR("U8", "[0]", "[0,0]") ",", "\"\":" TENSOR("U8", "[0]", "[0,0]") "}", 1 << 20, &n);
    put_raw(in(dir, "model.safetensors"), text, 0, 1);
    free(text);
    peak_bytes = 0;
    CHECK_ERROR(open_close(dir), BESA_ERROR_TENSOR, "embed_tokens");
    check_peak("a header and its tensors", before, 6 * n + (64 << 10));
}

/* ---- safetensors --------------------------------------------------------------------------- */

#define ONE(dtype, shape, offsets) "{\"a\":" TENSOR(dtype, shape, offsets) "}"

static void test_headers(void)
{
    static const struct {
        const char *name, *header;
        size_t data;                            /* bytes that follow it */
        besa_result code;
        const char *words;
    } t[] = {
        { "a hole", ONE("U8", "[2]", "[2,4]"), 4, BESA_ERROR_FORMAT, "a hole" },
        { "an overlap", "{\"a\":" TENSOR("U8", "[4]", "[0,4]") ",\"b\":" TENSOR("U8", "[2]", "[3,5]") "}", 5, BESA_ERROR_FORMAT, "overlap" },
        { "out of range", ONE("U8", "[9]", "[0,9]"), 4, BESA_ERROR_FORMAT, "truncated" },
        { "trailing bytes", ONE("U8", "[2]", "[0,2]"), 4, BESA_ERROR_FORMAT, "after the last" },
        { "a wrong size", ONE("F32", "[2]", "[0,4]"), 4, BESA_ERROR_FORMAT, "by its shape" },
        { "an overflow", ONE("F32", "[4611686018427387904,4]", "[0,0]"), 0, BESA_ERROR_FORMAT, "overflows" },
        { "an overflow of bits", ONE("U8", "[2305843009213693952]", "[0,0]"), 0, BESA_ERROR_FORMAT, "overflows" },
        { "offsets reversed", ONE("U8", "[2]", "[2,0]"), 2, BESA_ERROR_FORMAT, "[begin, end]" },
        { "offsets negative", ONE("U8", "[2]", "[-2,0]"), 2, BESA_ERROR_FORMAT, "[begin, end]" },
        { "offsets missing", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2]}}", 2, BESA_ERROR_FORMAT, "data_offsets" },
        { "offsets of three", ONE("U8", "[2]", "[0,1,2]"), 2, BESA_ERROR_FORMAT, "[begin, end]" },
        { "a fractional offset", ONE("U8", "[2]", "[0,2.0]"), 2, BESA_ERROR_FORMAT, "[begin, end]" },
        { "shape negative", ONE("U8", "[-2]", "[0,2]"), 2, BESA_ERROR_FORMAT, "no count" },
        { "dtype missing", "{\"a\":{\"shape\":[2],\"data_offsets\":[0,2]}}", 2, BESA_ERROR_FORMAT, "no dtype" },
        { "dtype unknown", ONE("X7", "[2]", "[0,2]"), 2, BESA_ERROR_UNSUPPORTED, "X7" },
        { "half a byte", ONE("F4", "[3]", "[0,1]"), 1, BESA_ERROR_FORMAT, "whole bytes" },
        { "nine dimensions", ONE("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]"), 1, BESA_ERROR_UNSUPPORTED, "dimensions" },
        { "a name twice", "{\"a\":" TENSOR("U8", "[1]", "[0,1]") ",\"a\":" TENSOR("U8", "[1]", "[1,2]") "}", 2, BESA_ERROR_JSON, "twice" },
        { "no object", "{\"a\":3}", 0, BESA_ERROR_FORMAT, "not an object" },
        { "metadata that is no object", "{\"__metadata__\":\"pt\"}", 0, BESA_ERROR_FORMAT, "__metadata__ is not an object" },
        { "metadata that is no string", "{\"__metadata__\":{\"format\":\"pt\",\"step\":3}}", 0, BESA_ERROR_FORMAT,
          "__metadata__: step is not a string" },
        { "a name with control characters", "{\"a\\u001b[2Jb\\u009bc\\u007f\":3}", 0, BESA_ERROR_FORMAT, "a?[2Jb??c? is" },
        { "a list", "[1]", 0, BESA_ERROR_FORMAT, "no JSON object" },
        { "dtypes of other widths", "{\"a\":" TENSOR("F8_E4M3", "[1]", "[0,1]") ",\"b\":" TENSOR("BOOL", "[]", "[1,2]")
          ",\"c\":" TENSOR("F64", "[0,5]", "[2,2]") ",\"d\":" TENSOR("F4", "[2]", "[2,3]") "}", 3, BESA_ERROR_TENSOR, "embed_tokens" } };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        const char *dir = make_model("hostile", 0);
        put_raw(in(dir, "model.safetensors"), t[i].header, t[i].data, 1);
        CHECK_CASE(t[i].name, open_close(dir), t[i].code, t[i].words);
    }
}

static void test_truncated(void)
{
    const char *dir = make_model("truncated", 0), *path = in(dir, "model.safetensors");
    size_t n;
    CHECK_ERROR(open_close(dir), BESA_OK, NULL);
    unsigned char *file = read_bytes(path, &n);
    for (size_t cut = 0; cut < n; cut += cut < 800 || cut + 16 > n ? 1 : 131) { /* every byte at both ends */
        write_bytes(path, file, cut);
        besa_result result = open_close(dir);
        CHECK(result == BESA_ERROR_FORMAT && strstr(err.message, "model.safetensors"), "cut at %zu: %s (%s)", cut,
              besa_result_string(result), result ? err.message : "");
    }
    free(file);
}

static void test_header_length(void)
{
    const char *dir = make_model("length", 0), *path = in(dir, "model.safetensors");
    size_t n;
    unsigned char *file = read_bytes(path, &n);
    memset(file, 0xFF, 8);
    write_bytes(path, file, n);
    CHECK_CASE("2^64 - 1", open_close(dir), BESA_ERROR_FORMAT, "truncated");
    for (size_t over = 1; over <= 16; over++) { /* in the mapped page, but not in the file */
        for (int i = 0; i < 8; i++) file[i] = (unsigned char)((uint64_t)(n - 8 + over) >> (8 * i));
        write_bytes(path, file, n);
        besa_result result = open_close(dir);
        CHECK(result == BESA_ERROR_FORMAT && strstr(err.message, "truncated"), "%zu bytes beyond the file: %s (%s)", over,
              besa_result_string(result), result ? err.message : "");
    }
    free(file);
}

static void test_no_model(void)
{
    const char *dir = make_model("no_model", 0), *path = in(dir, "model.safetensors");
    write_bytes(path, "GIF89a..........", 16);
    CHECK_CASE("another format", open_close(dir), BESA_ERROR_FORMAT, "model.safetensors");
    unlink(path);
    CHECK_CASE("no file", open_close(dir), BESA_ERROR_NOT_FOUND, "neither");
    int files = open_files();
    mkdir(path, 0777);
    CHECK_CASE("a directory of that name", open_close(dir), BESA_ERROR_READ, "regular");
    rmdir(path);
    mkfifo(path, 0666);
    CHECK_CASE("a FIFO of that name", open_close(dir), BESA_ERROR_READ, "regular");
    CHECK(open_files() == files, "%d files are open, before %d", open_files(), files);
    CHECK_CASE("no directory", open_close(temp_path("nowhere")), BESA_ERROR_NOT_FOUND, "nowhere");
    mkdir(temp_path("empty"), 0777);
    CHECK_CASE("no config.json", open_close(temp_path("empty")), BESA_ERROR_NOT_FOUND, "config.json");
}

/* ---- the index of shards ------------------------------------------------------------------- */

#define MAP(members) "{\"weight_map\":{" members "}}"

static void test_index(void)
{
    static const struct {
        const char *name, *map;
        besa_result code;
        const char *words;
    } t[] = {
        { "parent directory", MAP("\"a\":\"../x.safetensors\""), BESA_ERROR_FORMAT, "same directory" },
        { "absolute", MAP("\"a\":\"/tmp/x.safetensors\""), BESA_ERROR_FORMAT, "same directory" },
        { "subdirectory", MAP("\"a\":\"sub/x.safetensors\""), BESA_ERROR_FORMAT, "same directory" },
        { "backslash", MAP("\"a\":\"..\\\\x.safetensors\""), BESA_ERROR_FORMAT, "same directory" },
        { "another kind of file", MAP("\"a\":\"config.json\""), BESA_ERROR_FORMAT, "same directory" },
        { "two dots", MAP("\"a\":\"..\""), BESA_ERROR_FORMAT, "same directory" },
        { "no string", MAP("\"a\":1"), BESA_ERROR_FORMAT, "names no file" },
        { "empty map", MAP(""), BESA_ERROR_FORMAT, "weight_map" },
        { "no map", "{}", BESA_ERROR_FORMAT, "weight_map" },
        { "a list", "[]", BESA_ERROR_FORMAT, "weight_map" },
        { "broken JSON", "{\"weight_map\":", BESA_ERROR_JSON, "byte 14" },
        { "missing shard", MAP("\"a\":\"gone.safetensors\""), BESA_ERROR_NOT_FOUND, "shard is missing" },
        { "tensor not in its shard", MAP("\"model.norm.weight\":\"" SHARD_1 "\""), BESA_ERROR_FORMAT, "missing there" },
        { "tensor in the other shard", MAP("\"model.norm.weight\":\"" SHARD_1 "\",\"model.layers.1.mlp.up_proj.weight\":\"" SHARD_2 "\""),
          BESA_ERROR_FORMAT, "is in model-00002" } };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        const char *dir = make_model("indexed", 1);
        put_text(dir, INDEX, t[i].map);
        CHECK_CASE(t[i].name, open_close(dir), t[i].code, t[i].words);
    }
}

static void test_shards(void)
{
    const char *dir = make_model("shards", 1);
    CHECK_ERROR(open_close(dir), BESA_OK, NULL);
    put_shard(dir, SHARD_1, 0, 3, 1);
    CHECK_CASE("a tensor in two shards", open_close(dir), BESA_ERROR_FORMAT, "two shards");
}

/* As the cache of Hugging Face keeps them. */
static void test_snapshot(void)
{
    const char *dir = make_model("linked", 1), *snapshot = temp_path("snapshot");
    mkdir(snapshot, 0777);
    shell("for f in '%s'/*; do ln -s \"$f\" '%s'/; done", dir, snapshot);
    CHECK_CASE("links", open_close(snapshot), BESA_OK, NULL);
    remove_tree(dir);
    CHECK_CASE("dangling links", open_close(snapshot), BESA_ERROR_NOT_FOUND, "config.json");
}

/* ---- config.json --------------------------------------------------------------------------- */

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

#define YARN "\"type\":\"yarn\",\"factor\":4"
#define LONGROPE "\"type\":\"longrope\",\"short_factor\":[1,2],\"long_factor\":[3,4]"
#define LLAMA3 "\"rope_type\":\"llama3\","
#define LLAMA3_OF(low, high) LLAMA3 "\"factor\":8,\"low_freq_factor\":" low ",\"high_freq_factor\":" high
#define LLAMA3_POSITIONS "\"original_max_position_embeddings\":64"

static void test_config(void)
{
    static const struct {
        const char *name, *change;              /* of the small model's config; "key=" leaves the key out */
        besa_result code;
        const char *words;
    } t[] = {
        { "model_type", "model_type=\"gpt2\"", BESA_ERROR_UNSUPPORTED, "model_type = \"gpt2\"" },
        { "model_type absent", "model_type=", BESA_ERROR_UNSUPPORTED, "model_type = (absent)" },
        { "architectures", "architectures=[\"LlamaForSequenceClassification\"]", BESA_ERROR_UNSUPPORTED, "LlamaForSequence" },
        { "architectures of old", "architectures=[\"LLaMAForCausalLM\"]", BESA_OK, NULL },
        { "architectures of another model_type", "architectures=[\"MistralForCausalLM\"]", BESA_ERROR_UNSUPPORTED, "Mistral" },
        { "architectures absent", "architectures=", BESA_OK, NULL },
        { "hidden_act", "hidden_act=\"gelu\"", BESA_ERROR_UNSUPPORTED, "hidden_act" },
        { "quantization_config", "quantization_config={\"bits\":4}", BESA_ERROR_UNSUPPORTED, "quantization_config" },
        { "num_local_experts", "num_local_experts=8", BESA_ERROR_UNSUPPORTED, "num_local_experts = 8" },
        { "partial_rotary_factor", "partial_rotary_factor=0.5", BESA_ERROR_UNSUPPORTED, "partial_rotary_factor" },
        { "partial_rotary_factor 1", "partial_rotary_factor=1.0", BESA_OK, NULL },
        { "pretraining_tp", "pretraining_tp=4", BESA_OK, NULL },
        { "rope of another type", "rope_scaling={\"type\":\"3d\",\"factor\":4}", BESA_ERROR_UNSUPPORTED, "rope_scaling.type = \"3d\"" },
        { "rope of another type, anew", "rope_parameters={\"rope_type\":\"3d\"}", BESA_ERROR_UNSUPPORTED, "rope_parameters.rope_type" },
        { "rope yarn", "rope_scaling={" YARN "}", BESA_OK, NULL },
        { "rope yarn without factor", "rope_scaling={\"type\":\"yarn\"}", BESA_OK, NULL },
        { "rope yarn without attention", "rope_scaling={" YARN ",\"attention_factor\":0}", BESA_ERROR_UNSUPPORTED, "attention_factor = 0" },
        { "rope yarn truncated by a number", "rope_scaling={" YARN ",\"truncate\":0}", BESA_ERROR_UNSUPPORTED, "truncate = 0" },
        { "rope yarn without a base", "rope_parameters={" YARN ",\"rope_theta\":1}", BESA_ERROR_UNSUPPORTED, "above 1 with a yarn rope" },
        { "rope yarn, a root that is no length", "original_max_position_embeddings=\"4\"", BESA_OK, NULL }, /* nobody needs it */
        { "rope dynamic", "rope_parameters={\"rope_type\":\"dynamic\",\"factor\":4}", BESA_OK, NULL },
        { "rope dynamic without factor", "rope_scaling={\"type\":\"dynamic\"}", BESA_ERROR_UNSUPPORTED, "rope_scaling.factor" },
        { "rope linear", "rope_scaling={\"type\":\"linear\",\"factor\":4}", BESA_OK, NULL },
        { "rope linear without factor", "rope_scaling={\"type\":\"linear\"}", BESA_ERROR_UNSUPPORTED, "rope_scaling.factor" },
        { "rope null", "rope_scaling=null", BESA_OK, NULL },
        { "rope string", "rope_scaling=\"linear\"", BESA_ERROR_UNSUPPORTED, "rope_scaling" },
        { "rope per layer kind", "rope_parameters={\"full_attention\":{\"rope_type\":\"default\"}}", BESA_ERROR_UNSUPPORTED, "full_attention" },
        { "rope llama3", "rope_scaling={" LLAMA3_OF("1", "4") "," LLAMA3_POSITIONS "}", BESA_OK, NULL },
        { "rope llama3 incomplete", "rope_scaling={" LLAMA3_OF("1", "4") "}", BESA_ERROR_UNSUPPORTED, "original_max_position_embeddings" },
        { "rope llama3 degenerate", "rope_scaling={" LLAMA3_OF("4", "4") "," LLAMA3_POSITIONS "}", BESA_ERROR_UNSUPPORTED, "high_freq_factor" },
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
        { "hidden_size, not written as an integer", "hidden_size=8.0", BESA_ERROR_UNSUPPORTED, "hidden_size = 8.0 is" },
        { "vocab_size, not written as an integer", "vocab_size=1e1", BESA_ERROR_UNSUPPORTED, "vocab_size = 1e1 is" },
        { "sliding_window of llama", "sliding_window=4", BESA_ERROR_UNSUPPORTED, "sliding_window" },
        { "layer_types", "layer_types=[\"full_attention\",\"full_attention\",\"chunked_attention\"]", BESA_ERROR_UNSUPPORTED, "layer_types[2]" },
        { "layer_types too few", "layer_types=[\"full_attention\"]", BESA_ERROR_UNSUPPORTED, "layer_types" } };
    char text[2048], key[64];
    const char *dir = make_model("config", 0);
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        const char *equals = strchr(t[i].change, '=');
        snprintf(text, sizeof text, "%s", small_config);
        snprintf(key, sizeof key, "%.*s", (int)(equals - t[i].change), t[i].change);
        config_set(text, sizeof text, key, equals + 1);
        put_text(dir, "config.json", text);
        CHECK_CASE(t[i].name, open_close(dir), t[i].code, t[i].words);
    }
    put_text(dir, "config.json", "[]");
    CHECK_CASE("not an object", open_close(dir), BESA_ERROR_JSON, "no JSON object");
}

static besa_result read_config(const char *text, besa_config *config)
{
    besa__json json;
    memset(config, 0, sizeof *config);
    err.code = BESA_OK;
    besa_result result = parse(&json, text, strlen(text));
    besa__config_reader reader = { &json, json.values, "config.json", &err };
    if (result == BESA_OK) result = besa__config_read(&reader, config);
    besa__json_free(&json);
    return result;
}

/* A number of a config, and the range that it must lie in. */
typedef struct range_case {
    const char *key;
    const char *also[3][2];                     /* what its largest value asks of other members */
    const char *rope;                           /* the rope_scaling that it is a member of, or NULL */
    double least, most;
} range_case;

static const range_case range_cases[] = {
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
    { "factor", { { NULL } }, LLAMA3 "\"low_freq_factor\":1,\"high_freq_factor\":4," LLAMA3_POSITIONS ",", 1e-6, 1e15 },
    { "low_freq_factor", { { NULL } }, LLAMA3 "\"factor\":8,\"high_freq_factor\":1e15," LLAMA3_POSITIONS ",", 1e-6, 9.9e14 },
    { "high_freq_factor", { { NULL } }, LLAMA3 "\"factor\":8,\"low_freq_factor\":1e-6," LLAMA3_POSITIONS ",", 1.1e-6, 1e15 },
    { "original_max_position_embeddings", { { NULL } }, LLAMA3 "\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,", 1e-6, 1e15 },
    { "original_max_position_embeddings", { { NULL } }, YARN ",", 1e-6, 1e15 },
    { "factor", { { NULL } }, "\"type\":\"yarn\",", 1e-6, 1e15 },
    { "factor", { { NULL } }, "\"type\":\"dynamic\",", 1e-6, 1e15 },
    { "attention_factor", { { NULL } }, YARN ",", 1e-6, 1e15 },
    { "beta_fast", { { NULL } }, YARN ",", 1e-6, 1e15 },
    { "beta_slow", { { NULL } }, YARN ",", 1e-6, 1e15 },
    { "mscale", { { NULL } }, YARN ",\"mscale_all_dim\":1,", 1e-6, 1e15 },
    { "mscale_all_dim", { { NULL } }, YARN ",\"mscale\":1,", 1e-6, 1e15 },
    { "no_rope_layer_interval", { { "model_type", "\"smollm3\"" }, { "architectures", NULL } }, NULL, 1, 1099511627776.0 },
    { "embedding_multiplier", { { "model_type", "\"granite\"" }, { "architectures", NULL } }, NULL, 1e-6, 1e15 },
    { "attention_multiplier", { { "model_type", "\"granite\"" }, { "architectures", NULL } }, NULL, 1e-6, 1e15 },
    { "residual_multiplier", { { "model_type", "\"granite\"" }, { "architectures", NULL } }, NULL, 1e-6, 1e15 },
    { "logits_scaling", { { "model_type", "\"granite\"" }, { "architectures", NULL } }, NULL, 1e-6, 1e15 },
    { "query_pre_attn_scalar", { { "model_type", "\"gemma2\"" }, { "architectures", NULL } }, NULL, 1e-6, 1e15 },
    { "attn_logit_softcapping", { { "model_type", "\"gemma2\"" }, { "architectures", NULL } }, NULL, 1e-6, 1e15 },
    { "final_logit_softcapping", { { "model_type", "\"gemma3_text\"" }, { "architectures", NULL } }, NULL, 1e-6, 1e15 },
    { "sliding_window_pattern", { { "model_type", "\"gemma3_text\"" }, { "architectures", NULL } }, NULL, 1, 1099511627776.0 },
    { "rope_local_base_freq", { { "model_type", "\"gemma3_text\"" }, { "architectures", NULL } }, NULL, 1e-6, 1e15 },
    { "rope_theta", { { "model_type", "\"gemma3_text\"" }, { "architectures", NULL } }, NULL, 1e-6, 1e15 },
    { "attention_factor", { { "model_type", "\"phi3\"" }, { "architectures", NULL } }, LONGROPE ",", 1e-6, 1e15 },
    { "partial_rotary_factor", { { NULL } }, NULL, 1, 1 },
    { "partial_rotary_factor", { { NULL } }, "", 1, 1 } };

/* A config with one number. */
static besa_result read_number(const range_case *t, const char *number)
{
    besa_config config;
    char text[2048], object[512];
    snprintf(text, sizeof text, "%s", small_config);
    for (int i = 0; i < 3 && t->also[i][0]; i++) config_set(text, sizeof text, t->also[i][0], t->also[i][1]);
    snprintf(object, sizeof object, "{%s\"%s\":%s}", t->rope ? t->rope : "", t->key, number);
    config_set(text, sizeof text, t->rope ? "rope_scaling" : t->key, t->rope ? object : number);
    return read_config(text, &config);
}

/* At both ends of its range, beyond them, and as what is no number. */
static void check_range(const range_case *t)
{
    static const char *const wrong[] = { "-1", "-1e300", "1e300", "\"1\"", "true", "[]" };
    const besa__range *range = besa__find_range(t->key);
    int whole = t->least == floor(t->least) && t->most > 1; /* a count */
    const double beyond[2] = { whole ? t->least - 1 : t->least * 0.9, whole ? t->most + 1 : t->most * 1.1 };
    char name[128], number[64], said[96], expected[96];
    snprintf(said, sizeof said, "%s = ", t->key);
    besa__range_text(range, expected, sizeof expected);
    for (int end = 0; end < 2; end++) {
        snprintf(number, sizeof number, "%.17g", end ? t->most : t->least);
        snprintf(name, sizeof name, "%s%s = %s", t->rope ? "rope_scaling." : "", t->key, number);
        CHECK_CASE(name, read_number(t, number), BESA_OK, NULL);
        snprintf(number, sizeof number, "%.17g", beyond[end]);
        snprintf(name, sizeof name, "%s%s = %s", t->rope ? "rope_scaling." : "", t->key, number);
        CHECK_CASE(name, read_number(t, number), BESA_ERROR_UNSUPPORTED, said);
        if (range->least == t->least && range->most == t->most) /* elsewhere another member's value is a bound */
            CHECK(strstr(err.message, expected) != NULL, "%s: \"%s\" does not say \"%s\"", name, err.message, expected);
    }
    for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
        snprintf(name, sizeof name, "%s%s = %s", t->rope ? "rope_scaling." : "", t->key, wrong[k]);
        CHECK_CASE(name, read_number(t, wrong[k]), BESA_ERROR_UNSUPPORTED, said);
    }
    if (whole) CHECK_CASE(t->key, read_number(t, "1.5"), BESA_ERROR_UNSUPPORTED, said);
}

static void test_config_ranges(void)
{
    for (size_t i = 0; i < sizeof range_cases / sizeof *range_cases; i++) check_range(&range_cases[i]);
    for (size_t i = 0; i < sizeof besa__ranges / sizeof *besa__ranges; i++) {
        int found = 0;
        for (size_t k = 0; k < sizeof range_cases / sizeof *range_cases; k++)
            found = found || !strcmp(range_cases[k].key, besa__ranges[i].key);
        CHECK(found, "the range of %s is not tested", besa__ranges[i].key);
    }
}

/* What public models have in these keys. */
static void test_config_public(void)
{
    static const char *const taken[][2] = {
        { "rope_theta", "10000" }, { "rope_theta", "500000.0" }, { "rope_theta", "1000000000.0" },
        { "rope_theta", "null" }, { "rms_norm_eps", "1e-05" }, { "rms_norm_eps", "1e-6" }, { "rms_norm_eps", "1e-12" },
        { "rms_norm_eps", "0.001" }, { "rms_norm_eps", "null" }, { "head_dim", "null" },
        { "num_key_value_heads", "null" }, { "vocab_size", "256000" }, { "max_position_embeddings", "10485760" },
        { "max_position_embeddings", "null" }, { "sliding_window", "null" }, { "sliding_window", "0" },
        { "attention_bias", "null" }, { "mlp_bias", "false" }, { "rope_scaling", "null" }, { "rope_scaling", "{}" },
        { "rope_scaling", "{\"type\":\"linear\",\"factor\":2.5}" },
        { "rope_scaling", "{\"rope_type\":\"default\",\"factor\":null}" }, { "partial_rotary_factor", "null" },
        { "quantization_config", "null" }, { "num_experts", "null" }, { "use_qk_norm", "false" },
        { "pretraining_tp", "2" }, { "tie_word_embeddings", "null" } };
    char text[2048], name[128];
    besa_config config;
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) {
        snprintf(text, sizeof text, "%s", small_config);
        config_set(text, sizeof text, taken[i][0], taken[i][1]);
        snprintf(name, sizeof name, "%s = %s", taken[i][0], taken[i][1]);
        CHECK_CASE(name, read_config(text, &config), BESA_OK, NULL);
    }
}

#define SLIDING(members)                                                                                            \
    "{\"hidden_size\":8,\"intermediate_size\":12,\"num_attention_heads\":8,\"num_hidden_layers\":3,\"vocab_size\":10,"  \
    "\"num_key_value_heads\":null,\"head_dim\":2,\"model_type\":" members "}"
#define QWEN2_ON "\"qwen2\",\"use_sliding_window\":true,"
#define SLIDES "\"sliding_attention\""
#define FULL "\"full_attention\""

static void test_windows(void)
{
    static const struct {
        const char *name, *text;
        const char *slide;                      /* 1 of each layer that slides, 0 of each that does not; NULL: refused */
        int64_t window;
    } t[] = {
        { "mistral by default", SLIDING("\"mistral\""), "111", 4096 },
        { "mistral, null", SLIDING("\"mistral\",\"sliding_window\":null"), "000", 0 },
        { "mistral, 7", SLIDING("\"mistral\",\"sliding_window\":7"), "111", 7 },
        { "mistral, 0", SLIDING("\"mistral\",\"sliding_window\":0"), NULL, 0 },
        { "qwen2, off", SLIDING("\"qwen2\",\"sliding_window\":7,\"max_window_layers\":1"), "000", 0 },
        { "qwen2, on", SLIDING(QWEN2_ON "\"sliding_window\":7,\"max_window_layers\":1"), "011", 7 },
        { "qwen2, beyond the last layer", SLIDING(QWEN2_ON "\"sliding_window\":7"), "000", 0 },
        { "qwen2, null", SLIDING(QWEN2_ON "\"sliding_window\":null,\"max_window_layers\":0"), "000", 0 },
        { "qwen3, layer_types", SLIDING("\"qwen3\",\"use_sliding_window\":true,\"sliding_window\":7,"
                                        "\"layer_types\":[" SLIDES "," FULL "," SLIDES "]"), "101", 7 },
        { "phi3 by default", SLIDING("\"phi3\""), "000", 0 },
        { "phi3, 7", SLIDING("\"phi3\",\"sliding_window\":7"), "111", 7 },
        { "smollm3, off", SLIDING("\"smollm3\",\"no_rope_layers\":[1,0,0],\"sliding_window\":7"), "000", 0 },
        { "smollm3, on", SLIDING("\"smollm3\",\"no_rope_layers\":[1,0,0],\"sliding_window\":7,\"use_sliding_window\":true"), "011", 7 },
        { "smollm3, every other", SLIDING("\"smollm3\",\"no_rope_layer_interval\":2,\"sliding_window\":7,\"use_sliding_window\":true"), "010", 7 },
        { "smollm3, layer_types", SLIDING("\"smollm3\",\"sliding_window\":7,\"use_sliding_window\":true,"
                                          "\"layer_types\":[" SLIDES "," FULL "," FULL "]"), "100", 7 },
        { "gemma2 by default", SLIDING("\"gemma2\""), "101", 4096 },
        { "gemma2, another pattern is not looked at", SLIDING("\"gemma2\",\"sliding_window_pattern\":3"), "101", 4096 },
        { "gemma2, layer_types", SLIDING("\"gemma2\",\"sliding_window\":7,\"layer_types\":[" FULL "," FULL "," SLIDES "]"), "001", 7 },
        { "gemma3_text by default", SLIDING("\"gemma3_text\""), "111", 4096 },
        { "gemma3_text, every third is full", SLIDING("\"gemma3_text\",\"sliding_window_pattern\":3,\"sliding_window\":7"), "110", 7 },
        { "qwen3, layer_types without a window", SLIDING("\"qwen3\",\"layer_types\":[" SLIDES "," FULL "," FULL "]"), NULL, 0 } };
    besa_config config;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        CHECK_CASE(t[i].name, read_config(t[i].text, &config), t[i].slide ? BESA_OK : BESA_ERROR_UNSUPPORTED, NULL);
        for (int l = 0; l < 3 && t[i].slide; l++)
            CHECK(config.window[l] == (t[i].slide[l] == '1'), "%s: layer %d slides: %d", t[i].name, l, config.window[l]);
        if (t[i].slide)
            CHECK(config.sliding_window == t[i].window, "%s: a window of %d", t[i].name, (int)config.sliding_window);
    }
}

/* Settings that change the forward pass: refused by name, unless null or false. */
static void test_unknown_settings(void)
{
    static const char *const keys[] = {
        "quantization_config", "compression_config", "num_local_experts", "num_experts", "n_routed_experts",
        "attn_logit_softcapping", "final_logit_softcapping", "no_rope_layers", "attention_chunk_size", "use_qk_norm",
        "use_mrope", "is_encoder_decoder", "alibi", "use_bidirectional_attention" };
    static const char *const values[] = { "null", "false", "2", "true", "{}" };
    besa_config config;
    char text[1024], name[128];
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        for (int v = 0; v < 5; v++) {
            snprintf(text, sizeof text, "{\"%s\":%s,%s", keys[i], values[v], small_config + 1);
            snprintf(name, sizeof name, "%s = %s", keys[i], values[v]);
            CHECK_CASE(name, read_config(text, &config), v < 2 ? BESA_OK : BESA_ERROR_UNSUPPORTED, keys[i]);
        }
}

/* Models that are known and not supported: what they are. */
static void test_known_models(void)
{
    static const struct { const char *members, *words; } t[] = {
        { "\"mixtral\",\"num_local_experts\":8", "\"mixtral\", a mixture of experts (num_local_experts), is not supported" },
        { "\"qwen3_moe\",\"num_experts\":128", "a mixture of experts (num_experts)" },
        { "\"deepseek_v3\",\"n_routed_experts\":256", "a mixture of experts (n_routed_experts)" },
        { "\"gemma3n\",\"text_config\":{\"model_type\":\"gemma3n_text\"}", "among parts that read images or sound (text_config)" },
        { "\"llama4\",\"text_config\":{\"model_type\":\"llama4_text\"}", "(text_config)" },
        { "\"qwen2_vl\",\"vision_config\":{}", "(vision_config)" }, { "\"gpt2\"", "model_type = \"gpt2\" is not supported" } };
    besa_config config;
    char text[512];
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        snprintf(text, sizeof text, "{\"model_type\":%s}", t[i].members);
        CHECK_CASE(t[i].members, read_config(text, &config), BESA_ERROR_UNSUPPORTED, t[i].words);
        CHECK(strstr(err.message, "\"olmo2\", \"phi3\", \"gemma2\", \"gemma3_text\", \"gemma3\", \"mistral3\""),
              "%s does not list what is", err.message);
    }
}

/* Models of several parts: their language model's type, and by which key the embedding is the head; the note of a contradiction. */
static void test_wrappers(void)
{
    static const char *const refused[][2] = {
        { "\"gemma3\",\"text_config\":{\"model_type\":\"gemma3n_text\"}",
          "text_config.model_type = \"gemma3n_text\" is not supported; supported: \"gemma3_text\", for gemma3" },
        { "\"mistral3\",\"text_config\":{}", "text_config.model_type = (absent) is not supported; supported: \"mistral\"" },
        { "\"qwen2_5_vl\",\"text_config\":{\"model_type\":\"qwen2\"}", "text_config.model_type = \"qwen2\"" } };
    static const char *const types[][2] = { { "gemma3", "gemma3_text" }, { "mistral3", "mistral" }, { "qwen2_5_vl", "qwen2_5_vl_text" } };
    static const char *const keys[] = { "", ",\"tie_word_embeddings\":true", ",\"tie_word_embeddings\":false" };
    /* by model, the root's key and text_config's: absent, true, false */
    static const int tied[3][3][3] = { { { 1, 1, 1 }, { 1, 1, 1 }, { 0, 0, 0 } }, { { 1, 1, 1 }, { 1, 1, 1 }, { 0, 0, 0 } },
                                       { { 0, 1, 0 }, { 1, 1, 1 }, { 0, 1, 0 } } };
    besa_config config;
    char text[512];
    for (int i = 0; i < 3; i++) {
        snprintf(text, sizeof text, "{\"model_type\":%s}", refused[i][0]);
        CHECK_CASE(refused[i][0], read_config(text, &config), BESA_ERROR_UNSUPPORTED, refused[i][1]);
    }
    for (int i = 0; i < 27; i++) {
        int model = i / 9, root = i / 3 % 3, own = i % 3;
        snprintf(text, sizeof text, "{\"model_type\":\"%s\"%s,\"text_config\":{\"model_type\":\"%s\"%s,\"hidden_size\":8,"
                 "\"intermediate_size\":12,\"num_attention_heads\":8,\"num_hidden_layers\":3,\"vocab_size\":10,\"head_dim\":2}}",
                 types[model][0], keys[root], types[model][1], keys[own]);
        CHECK_CASE(text, read_config(text, &config), BESA_OK, NULL);
        CHECK(config.tie_word_embeddings == tied[model][root][own], "%s: tied %d", text, config.tie_word_embeddings);
        CHECK(config.tie_contradicted == (root && own && root != own), "%s: contradicted %d", text, config.tie_contradicted);
    }
    for (int vl = 0; vl < 2; vl++) {            /* which layers slide by default */
        snprintf(text, sizeof text, "{\"model_type\":\"%s\",\"hidden_size\":8,\"intermediate_size\":12,\"num_attention_heads\":8,"
                 "\"num_key_value_heads\":8,\"head_dim\":2,\"num_hidden_layers\":82,\"vocab_size\":10,\"use_sliding_window\":true}",
                 vl ? "qwen2_5_vl" : "qwen2");
        CHECK_CASE(text, read_config(text, &config), BESA_OK, NULL);
        int first = vl ? 80 : 28;
        CHECK(!config.window[first - 1] && config.window[first], "%s: layer %d is not the first that slides", text, first);
    }
}

/* What is special to a family: one number of its config, or a refusal by words. */
static void test_families(void)
{
    static const struct { const char *text; size_t at; double value; const char *words; } t[] = {
#define NUMBER(member) offsetof(besa_config, member)
        { SLIDING("\"granite\""), NUMBER(block.attention_scale), 1, NULL },
        { SLIDING("\"granite\""), NUMBER(logits_scale), 1, NULL },
        { SLIDING("\"granite\",\"logits_scaling\":8"), NUMBER(logits_scale), 0.125, NULL },
        { SLIDING("\"granite\",\"residual_multiplier\":0.25"), NUMBER(block.residual_scale), 0.25, NULL },
        { SLIDING("\"granite\",\"embedding_multiplier\":12"), NUMBER(embedding_scale), 12, NULL },
        { SLIDING("\"llama\",\"embedding_multiplier\":12"), NUMBER(embedding_scale), 0, NULL },
        { SLIDING("\"smollm3\""), NUMBER(block.rope.theta), 2e6, NULL },
        { SLIDING("\"olmo2\""), NUMBER(block.rms_norm_eps), 1e-5, NULL },
        { SLIDING("\"phi3\""), NUMBER(block.rms_norm_eps), 1e-5, NULL },
        { SLIDING("\"gemma2\""), NUMBER(block.attention_softcap), 50, NULL },
        { SLIDING("\"gemma2\",\"attn_logit_softcapping\":null"), NUMBER(block.attention_softcap), 0, NULL },
        { SLIDING("\"gemma2\""), NUMBER(logits_softcap), 30, NULL },
        { SLIDING("\"gemma2\",\"final_logit_softcapping\":null"), NUMBER(logits_softcap), 0, NULL },
        { SLIDING("\"gemma2\",\"query_pre_attn_scalar\":16"), NUMBER(block.attention_scale), 0.25, NULL },
        { SLIDING("\"gemma2\""), NUMBER(block.attention_scale), 0.0625, NULL },
        { SLIDING("\"gemma3_text\",\"attn_logit_softcapping\":20"), NUMBER(block.attention_softcap), 0, NULL },
        { SLIDING("\"gemma3_text\",\"final_logit_softcapping\":20"), NUMBER(logits_softcap), 20, NULL },
        { SLIDING("\"gemma3_text\""), NUMBER(block.rope.theta), 1e6, NULL },
        { SLIDING("\"gemma3_text\""), NUMBER(local_rope.theta), 1e4, NULL },
        { SLIDING("\"gemma3_text\",\"rope_theta\":7,\"rope_local_base_freq\":9"), NUMBER(local_rope.theta), 9, NULL },
        { SLIDING("\"gemma3_text\",\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":8}"), NUMBER(block.rope.factor), 8, NULL },
        { SLIDING("\"gemma3_text\",\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":8}"), NUMBER(local_rope.factor), 0, NULL },
#define PARAMETERS(members) SLIDING("\"gemma3_text\",\"rope_parameters\":{" members "},\"rope_theta\":7,\"rope_local_base_freq\":9")
        { PARAMETERS("\"full_attention\":{\"rope_theta\":3}"), NUMBER(block.rope.theta), 3, NULL },
        { PARAMETERS("\"full_attention\":{\"rope_theta\":3}"), NUMBER(local_rope.theta), 9, NULL },
        { PARAMETERS("\"sliding_attention\":{\"rope_type\":\"linear\",\"factor\":2}"), NUMBER(block.rope.theta), 7, NULL },
        { PARAMETERS("\"sliding_attention\":{\"rope_type\":\"linear\",\"factor\":2}"), NUMBER(local_rope.factor), 2, NULL },
        { PARAMETERS("\"sliding_attention\":{\"rope_theta\":2},\"full_attention\":null"), NUMBER(local_rope.theta), 2, NULL },
        { PARAMETERS("\"rope_theta\":3,\"full_attention\":{}"), NUMBER(block.rope.theta), 7, NULL },
        { PARAMETERS(""), NUMBER(local_rope.theta), 9, NULL },
        { PARAMETERS("\"rope_type\":\"default\",\"rope_theta\":5"), 0, 0, "an object with full_attention and sliding_attention" },
        { PARAMETERS("\"full_attention\":3"), 0, 0, "rope_parameters.full_attention = 3" },
        { PARAMETERS("\"full_attention\":{\"rope_type\":\"3d\"}"), 0, 0, "rope_parameters.full_attention.rope_type" },
        { SLIDING("\"gemma3_text\",\"rope_parameters\":{\"full_attention\":{}},\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":8}"),
          0, 0, "beside rope_parameters.full_attention" },
        { SLIDING("\"phi3\",\"max_position_embeddings\":131072,\"rope_scaling\":{\"type\":\"su\",\"short_factor\":[2],\"long_factor\":[3]}"),
          NUMBER(block.rope.attention_factor), 1.1902380714238083, NULL },
        { SLIDING("\"phi3\",\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":[2],\"long_factor\":[3]}"),
          NUMBER(block.rope.attention_factor), 1, NULL },
        { SLIDING("\"phi3\",\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":[2,2],\"long_factor\":[3]}"), 0, 0, "short_factor" },
        { SLIDING("\"phi3\",\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":[2],\"long_factor\":[]}"), 0, 0, "long_factor" },
        { SLIDING("\"phi3\",\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":[2],\"long_factor\":[0]}"), 0, 0,
          "rope_scaling.long_factor[0] = 0 is not supported" },
        { SLIDING("\"phi3\",\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":[2]}"), 0, 0, "long_factor = (absent)" },
        { SLIDING("\"phi3\",\"partial_rotary_factor\":0.5"), 0, 0, "partial_rotary_factor" },   /* of 2 elements 1 */
        { SLIDING("\"phi3\",\"partial_rotary_factor\":1.5"), 0, 0, "partial_rotary_factor" },
        { SLIDING("\"phi3\",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}"), 0, 0, "\"default\", \"longrope\"" },
        { SLIDING("\"llama\",\"rope_scaling\":{\"type\":\"longrope\"}"), 0, 0, "rope_scaling.type = \"longrope\"" },
        { SLIDING("\"smollm3\",\"no_rope_layers\":[1,0]"), 0, 0, "no_rope_layers" },
        { "{\"model_type\":\"gemma3\",\"text_config\":{\"model_type\":\"gemma3_text\",\"hidden_size\":2560,\"intermediate_size\":10240,"
          "\"num_hidden_layers\":34,\"rope_scaling\":{\"factor\":8.0,\"rope_type\":\"linear\"},\"sliding_window\":1024},"
          "\"vision_config\":{}}", NUMBER(block.rope.factor), 8, NULL },
        { "{\"model_type\":\"gemma3\",\"text_config\":{\"model_type\":\"gemma3_text\",\"hidden_size\":8,\"intermediate_size\":12,"
          "\"num_hidden_layers\":3,\"final_logit_softcapping\":20}}", NUMBER(logits_softcap), 0, NULL }, /* the text model alone caps */
        { "{\"model_type\":\"gemma3\",\"text_config\":{\"model_type\":\"gemma3_text\"}}", 0, 0, "hidden_size" },
        { SLIDING("\"qwen2_5_vl\",\"vision_config\":{},\"rope_scaling\":{\"type\":\"mrope\",\"mrope_section\":[16,24,24]}"),
          NUMBER(block.rope.theta), 1e6, NULL },
        { SLIDING("\"qwen2\",\"rope_scaling\":{\"type\":\"mrope\",\"mrope_section\":[16,24,24]}"), 0, 0, "mrope" },
        { SLIDING("\"smollm3\",\"no_rope_layers\":[1,0,2]"), 0, 0, "no_rope_layers" },
        { SLIDING("\"smollm3\",\"no_rope_layers\":3"), 0, 0, "no_rope_layers" },
        { SLIDING("\"gemma2\",\"hidden_activation\":\"gelu\""), 0, 0, "hidden_activation" },
        { SLIDING("\"gemma2\",\"use_bidirectional_attention\":true"), 0, 0, "use_bidirectional_attention" } };
#undef NUMBER
    besa_config config;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        CHECK_CASE(t[i].text, read_config(t[i].text, &config), t[i].words ? BESA_ERROR_UNSUPPORTED : BESA_OK, t[i].words);
        double got = 0;
        memcpy(&got, (const char *)&config + t[i].at, sizeof got);
        if (!t[i].words) CHECK(fabs(got - t[i].value) < 1e-12 * fabs(t[i].value) + 1e-300, "%s: %.17g", t[i].text, got);
    }
}

/* What transformers takes where key/value heads, head_dim and positions are not given. */
static void test_family_defaults(void)
{
    static const struct {
        const char *type;
        int heads;
        int64_t kv_heads, head_dim, positions;
    } t[] = {
        { "llama", 16, 16, 8, 2048 },
        { "mistral", 16, 8, 8, 131072 },
        { "qwen2", 64, 32, 2, 32768 },
        { "qwen3", 64, 32, 128, 32768 },
        { "smollm3", 16, 4, 8, 32768 },
        { "granite", 16, 16, 8, 2048 },
        { "olmo2", 16, 16, 8, 2048 },
        { "phi3", 16, 16, 8, 4096 },
        { "gemma2", 16, 4, 256, 8192 },
        { "gemma3_text", 16, 4, 256, 131072 } };
    besa_config config;
    char text[512];
    for (int i = 0; i < (int)(sizeof t / sizeof *t); i++) {
        snprintf(text, sizeof text, "{\"model_type\":\"%s\",\"hidden_size\":128,\"intermediate_size\":12,"
                 "\"num_attention_heads\":%d,\"num_hidden_layers\":1,\"vocab_size\":10}", t[i].type, t[i].heads);
        CHECK_CASE(t[i].type, read_config(text, &config), BESA_OK, NULL);
        CHECK(config.block.num_key_value_heads == t[i].kv_heads && config.block.head_dim == t[i].head_dim,
              "%s: %d key/value heads of %d", t[i].type, (int)config.block.num_key_value_heads, (int)config.block.head_dim);
        CHECK(config.max_position_embeddings == t[i].positions && !strcmp(config.model_type, t[i].type),
              "%s: %s of %d positions", t[i].type, config.model_type, (int)config.max_position_embeddings);
    }
}

/* The layers by number are those by name. */
static void test_layer_tensors(void)
{
    besa_checkpoint *c = NULL;
    char name[96];
    CHECK_OK(besa_checkpoint_open(&c, make_model("layers", 0), &err), err);
    for (int b = 0; b < 3; b++)
        for (int l = 0; l < BESA_LAYERS; l++) {
            snprintf(name, sizeof name, "model.layers.%d.%s.%s.weight", b, l < BESA_GATE ? "self_attn" : "mlp", besa_layer_name(l));
            CHECK(besa_checkpoint_find(c, name) && besa_checkpoint_layer(c, b, l) == besa_checkpoint_find(c, name), "%s", name);
        }
    CHECK(!besa_checkpoint_layer(c, 3, 0) && !besa_checkpoint_layer(c, -1, 0) && !besa_checkpoint_layer(c, 0, -1) &&
          !besa_checkpoint_layer(c, 0, BESA_LAYERS), "there are 3 blocks of 7 layers");
    besa_checkpoint_close(c);
}

/* One prunable weight of another type than the rest, each in turn. */
static void test_mixed_types(void)
{
    const char *path = in(make_model("mixed", 0), "model.safetensors");
    char name[160];
    size_t n;
    unsigned char *file = read_bytes(path, &n);
    for (int b = 0; b < 3; b++)
        for (int l = 0; l < BESA_LAYERS; l++) {
            snprintf(name, sizeof name, "\"model.layers.%d.%s.weight\":{\"dtype\":", b, besa__layers[l].path);
            char *dtype = (char *)memmem(file, n, name, strlen(name));
            if (!CHECK(dtype != NULL, "the header has no %s", name)) continue;
            memcpy(dtype + strlen(name), "\"F16\" ", 6);
            write_bytes(path, file, n);
            CHECK_CASE(name, open_close(temp_path("mixed")), BESA_ERROR_UNSUPPORTED, "one dtype");
            memcpy(dtype + strlen(name), "\"BF16\"", 6);
        }
    free(file);
}

/* ---- tokens ------------------------------------------------------------------------------ */

static size_t npy(unsigned char *file, int version, const char *dict, const void *data, size_t bytes)
{
    size_t n = strlen(dict), at = version == 1 ? 10 : 12;
    memcpy(file, "\x93NUMPY", 6);
    file[6] = (unsigned char)version;
    file[7] = 0;
    for (size_t i = 8; i < at; i++) file[i] = (unsigned char)(n >> (8 * (i - 8)));
    memcpy(file + at, dict, n);
    if (bytes) memcpy(file + at + n, data, bytes);
    return at + n + bytes;
}

#define NPY(descr, shape) "{'descr': " descr ", 'fortran_order': False, 'shape': " shape ", }"

/* uint16 1 .. 8, a -1 of 64 bits, zeros */
static const unsigned char token_data[64] = { 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0,
                                              0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF };

/* Write a token file, and open it. */
static besa_result load_tokens(besa_tokens *tokens, const char *name, const void *bytes, size_t size)
{
    write_bytes(temp_path("%s", name), bytes, size);
    err.code = BESA_OK;
    return besa_tokens_load(tokens, temp_path("%s", name), &err);
}

static void test_npy(void)
{
    static const struct {
        const char *name, *dict;
        int version;
        size_t first, bytes;                    /* of token_data */
        besa_result code;
        const char *words;
        int64_t count, rows;                    /* that come of it */
    } t[] = {
        { "uint16 stream", NPY("'<u2'", "(6,)") "   \n", 1, 0, 12, BESA_OK, NULL, 6, 0 },
        { "uint16 sequences", NPY("'<u2'", "(2, 3)") "\n", 1, 0, 12, BESA_OK, NULL, 6, 2 },
        { "version 2", "{'descr': '<u2', 'fortran_order': False, 'shape': (2, 3)}\n", 2, 0, 12, BESA_OK, NULL, 6, 2 },
        { "version 3, keys turned round", "{\"shape\": (3,), \"fortran_order\": False, \"descr\": \"<i4\"}", 3, 0, 12, BESA_OK, NULL, 3, 0 },
        { "uint32", NPY("'<u4'", "(2,)"), 1, 0, 8, BESA_OK, NULL, 2, 0 },
        { "int64 out of range", NPY("'<i8'", "(1,)"), 1, 0, 8, BESA_ERROR_TOKEN, "token 0 is", 0, 0 },
        { "int64 zero", NPY("'<i8'", "(2,)"), 1, 32, 16, BESA_OK, NULL, 2, 0 },
        { "int64 negative", NPY("'<i8'", "(1,)"), 1, 16, 8, BESA_ERROR_TOKEN, "is -1", 0, 0 },
        { "int32 negative", NPY("'<i4'", "(1,)"), 1, 16, 4, BESA_ERROR_TOKEN, "is -1", 0, 0 },
        { "uint32 too large", NPY("'<u4'", "(1,)"), 1, 16, 4, BESA_ERROR_TOKEN, "4294967295", 0, 0 },
        { "big endian", NPY("'>u2'", "(6,)"), 1, 0, 12, BESA_ERROR_UNSUPPORTED, "'>u2'", 0, 0 },
        { "bytes", NPY("'|u1'", "(12,)"), 1, 0, 12, BESA_ERROR_UNSUPPORTED, "'|u1'", 0, 0 },
        { "floats", NPY("'<f4'", "(3,)"), 1, 0, 12, BESA_ERROR_UNSUPPORTED, "'<f4'", 0, 0 },
        { "objects", NPY("'|O'", "(3,)"), 1, 0, 12, BESA_ERROR_UNSUPPORTED, "'|O'", 0, 0 },
        { "fields", NPY("[('a', '<u2')]", "(3,)"), 1, 0, 12, BESA_ERROR_FORMAT, "expected a string", 0, 0 },
        { "Fortran order", "{'descr': '<u2', 'fortran_order': True, 'shape': (2, 3), }", 1, 0, 12, BESA_ERROR_UNSUPPORTED, "fortran_order", 0, 0 },
        { "version 4", NPY("'<u2'", "(6,)"), 4, 0, 12, BESA_ERROR_UNSUPPORTED, "version 4.0", 0, 0 },
        { "three dimensions", NPY("'<u2'", "(1,2,3)"), 1, 0, 12, BESA_ERROR_UNSUPPORTED, "dimensions", 0, 0 },
        { "a scalar", NPY("'<u2'", "()"), 1, 0, 2, BESA_ERROR_FORMAT, "scalar", 0, 0 },
        { "no tuple", NPY("'<u2'", "(6)"), 1, 0, 12, BESA_ERROR_FORMAT, "tuple", 0, 0 },
        { "negative size", NPY("'<u2'", "(-6,)"), 1, 0, 12, BESA_ERROR_FORMAT, "no number", 0, 0 },
        { "overflowing size", NPY("'<u2'", "(99999999999999999999,)"), 1, 0, 12, BESA_ERROR_FORMAT, "overflows", 0, 0 },
        { "overflowing product", NPY("'<u2'", "(4294967296,4294967296)"), 1, 0, 12, BESA_ERROR_FORMAT, "truncated", 0, 0 },
        { "too short", NPY("'<u2'", "(7,)"), 1, 0, 12, BESA_ERROR_FORMAT, "truncated", 0, 0 },
        { "too long", NPY("'<u2'", "(5,)"), 1, 0, 12, BESA_ERROR_FORMAT, "12 bytes", 0, 0 },
        { "empty", NPY("'<u2'", "(0,)"), 1, 0, 0, BESA_ERROR_TOKENS, "no tokens", 0, 0 },
        { "key missing", "{'descr': '<u2', 'shape': (6,), }", 1, 0, 12, BESA_ERROR_FORMAT, "missing", 0, 0 },
        { "key twice", "{'descr': '<u2', 'descr': '<u2', 'fortran_order': False, 'shape': (6,), }", 1, 0, 12, BESA_ERROR_FORMAT, "twice", 0, 0 },
        { "text after", NPY("'<u2'", "(6,)") " x", 1, 0, 12, BESA_ERROR_FORMAT, "follows", 0, 0 } };
    unsigned char file[512];
    besa_tokens tokens;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        size_t n = npy(file, t[i].version, t[i].dict, token_data + t[i].first, t[i].bytes);
        besa_result result = load_tokens(&tokens, "t.npy", file, n);
        CHECK_CASE(t[i].name, result, t[i].code, t[i].words);
        if (result == BESA_OK)
            CHECK(tokens.count == t[i].count && tokens.rows == t[i].rows, "%s: %d tokens, %d rows", t[i].name,
                  (int)tokens.count, (int)tokens.rows);
        besa_tokens_free(&tokens);
    }
}

static void test_npy_truncated(void)
{
    unsigned char file[512];
    besa_tokens tokens;
    size_t n = npy(file, 1, NPY("'<u2'", "(6,)") "   \n", token_data, 12);
    for (size_t cut = 0; cut < n; cut++) {
        besa_result result = load_tokens(&tokens, "t.npy", file, cut);
        CHECK(result == BESA_ERROR_FORMAT, "cut at %zu: %s", cut, besa_result_string(result));
        besa_tokens_free(&tokens);
    }
}

static void test_raw_tokens(void)
{
    besa_tokens tokens;
    CHECK_ERROR(load_tokens(&tokens, "t.u16", token_data, 16), BESA_OK, NULL);
    CHECK(tokens.count == 8 && tokens.ids[7] == 8, ".u16: %d tokens, the last %d", (int)tokens.count, (int)tokens.ids[7]);
    besa_tokens_free(&tokens);
    CHECK_ERROR(load_tokens(&tokens, "t.bin", token_data, 16), BESA_OK, NULL);
    CHECK(tokens.count == 8, ".bin: %d tokens", (int)tokens.count);
    besa_tokens_free(&tokens);
    CHECK_ERROR(load_tokens(&tokens, "t.i32", token_data + 32, 16), BESA_OK, NULL);
    CHECK(tokens.count == 4, ".i32: %d tokens", (int)tokens.count);
    besa_tokens_free(&tokens);
    CHECK_ERROR(load_tokens(&tokens, "t.u16", token_data, 15), BESA_ERROR_FORMAT, "15 bytes");
    CHECK_ERROR(load_tokens(&tokens, "t.u16", token_data, 0), BESA_ERROR_TOKENS, "no tokens");
    CHECK_ERROR(load_tokens(&tokens, "t.txt", token_data, 16), BESA_ERROR_UNSUPPORTED, ".npy");
    CHECK_ERROR(besa_tokens_load(&tokens, temp_path("t.none.npy"), &err), BESA_ERROR_NOT_FOUND, "t.none.npy");
}

/* Of a stream: windows from its start where the seed is 0, else from where splitmix64 says. */
static void test_sample_stream(void)
{
    besa_tokens tokens;
    int32_t ids[16];
    if (!CHECK(load_tokens(&tokens, "t.u16", token_data, 16) == BESA_OK, "%s", err.message)) return;
    CHECK_ERROR(besa_tokens_sample(&tokens, 2, 4, 0, 9, ids, &err), BESA_OK, NULL);
    CHECK(ids[0] == 1 && ids[4] == 5 && ids[7] == 8, "ids %d, %d, %d", (int)ids[0], (int)ids[4], (int)ids[7]);
    CHECK_ERROR(besa_tokens_sample(&tokens, 2, 4, 0, 8, ids, &err), BESA_ERROR_TOKEN, "token 7 is 8");
    CHECK_ERROR(besa_tokens_sample(&tokens, 3, 4, 0, 9, ids, &err), BESA_ERROR_TOKENS, "has 8 tokens");
    CHECK_ERROR(besa_tokens_sample(&tokens, 1, 9, 5, 9, ids, &err), BESA_ERROR_TOKENS, "has 8 tokens");
    CHECK_ERROR(besa_tokens_sample(&tokens, 0, 4, 0, 9, ids, &err), BESA_ERROR_OPTION, "nsamples = 0");
    CHECK_ERROR(besa_tokens_sample(&tokens, 4, 4, 7, 9, ids, &err), BESA_OK, NULL); /* they may overlap */
    for (int i = 0; i < 4; i++) {
        int32_t first = 1 + (int32_t)(besa__splitmix64(7, (uint64_t)i) % 5);
        CHECK(ids[4 * i] == first && ids[4 * i + 3] == first + 3, "window %d: %d .. %d, expected from %d", i,
              (int)ids[4 * i], (int)ids[4 * i + 3], (int)first);
    }
    besa_tokens_free(&tokens);
}

static void test_splitmix(void)
{
    static const uint64_t published[2] = { 6457827717110365317u, 3203168211198807973u };
    for (uint64_t i = 0; i < 2; i++)
        CHECK(besa__splitmix64(1234567, i) == published[i], "number %d is %llu", (int)i,
              (unsigned long long)besa__splitmix64(1234567, i));
}

static void test_sample_rows(void)
{
    unsigned char file[512];
    besa_tokens tokens;
    int32_t ids[16];
    size_t n = npy(file, 1, NPY("'<u2'", "(2, 3)") "\n", token_data, 12);
    if (!CHECK(load_tokens(&tokens, "t.npy", file, n) == BESA_OK, "%s", err.message)) return;
    CHECK_ERROR(besa_tokens_sample(&tokens, 2, 2, 99, 9, ids, &err), BESA_ERROR_OPTION, "seed 99 draws from a stream");
    CHECK_ERROR(besa_tokens_sample(&tokens, 2, 2, 0, 9, ids, &err), BESA_OK, NULL);
    CHECK(ids[0] == 1 && ids[1] == 2 && ids[2] == 4 && ids[3] == 5, "ids %d, %d, %d, %d", (int)ids[0], (int)ids[1],
          (int)ids[2], (int)ids[3]);
    CHECK_ERROR(besa_tokens_sample(&tokens, 3, 2, 0, 9, ids, &err), BESA_ERROR_TOKENS, "2 of 3");
    CHECK_ERROR(besa_tokens_sample(&tokens, 1, 4, 0, 9, ids, &err), BESA_ERROR_TOKENS, "2 of 3");
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
typedef struct raw_case {
    const char *name, *file;
    int64_t header[3];                          /* magic, version, count of llm.c */
    size_t header_bytes, width;
    int spread;                                 /* from one id to the next; 0: ids 1 .. 10 again and again */
    int64_t count, vocab;
    besa_result code;
    const char *words;
} raw_case;

static void check_raw(const raw_case *t)
{
    unsigned char file[2048];
    int64_t v[100];
    int32_t ids[100];
    besa_tokens tokens;
    size_t n = t->header_bytes;
    memset(file, 0, sizeof file);
    numbers(file, 4, t->header, n ? 3 : 0);
    for (int64_t k = 0; k < t->count; k++) v[k] = t->spread ? 1 + k * t->spread : k % 10 + 1;
    n += numbers(file + n, t->width, v, (size_t)t->count);
    besa_result result = load_tokens(&tokens, t->file, file, n);
    int64_t count = tokens.count;
    if (result == BESA_OK) result = besa_tokens_sample(&tokens, 1, count, 0, t->vocab, ids, &err);
    besa_tokens_free(&tokens);
    CHECK_CASE(t->name, result, t->code, t->words);
    if (result != BESA_OK || !CHECK(count == t->count, "%s: %d tokens of %d", t->name, (int)count, (int)t->count)) return;
    for (int64_t k = 0; k < count; k++)
        CHECK(ids[k] == v[k], "%s: token %d is %d, expected %d", t->name, (int)k, (int)ids[k], (int)v[k]);
}

static void test_token_widths(void)
{
    static const raw_case t[] = {
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
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        size_t blocks = live_blocks;
        check_raw(&t[i]);
        CHECK(live_blocks == blocks, "%s: %d blocks are not freed", t[i].name, (int)(live_blocks - blocks));
    }
}

static void test_npy_widths(void)
{
    unsigned char file[512];
    besa_tokens tokens;
    int32_t ids[4];
    size_t n = npy(file, 1, NPY("'<u2'", "(4,)"), token_data, 8);
    if (!CHECK(load_tokens(&tokens, "t.npy", file, n) == BESA_OK, "%s", err.message)) return;
    CHECK_ERROR(besa_tokens_sample(&tokens, 1, 4, 0, 65536, ids, &err), BESA_OK, NULL);
    CHECK_ERROR(besa_tokens_sample(&tokens, 1, 4, 0, 65537, ids, &err), BESA_ERROR_TOKEN, "t.npy");
    besa_tokens_free(&tokens);
}

/* ---- what lies beside ---------------------------------------------------------------------- */

static void test_tied_head(void)
{
    static const struct {
        const char *name;
        int kind;
        besa_result code;
        const char *words;
        int tied;                               /* it is the embedding after all */
    } t[] = {
        { "the embedding again", HEAD_SAME, BESA_OK, NULL, 1 },
        { "another in one bit", HEAD_OTHER_BIT, BESA_OK, NULL, 0 },
        { "another type", HEAD_OTHER_TYPE, BESA_OK, NULL, 0 },
        { "another shape", HEAD_OTHER_SHAPE, BESA_ERROR_TENSOR, "lm_head.weight has shape [11, 8]", 0 },
        { "no weights", HEAD_NO_WEIGHTS, BESA_ERROR_UNSUPPORTED, "lm_head.weight has dtype I16", 0 } };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        besa_checkpoint *c;
        besa__model model;
        err.code = BESA_OK;
        CHECK_CASE(t[i].name, besa_checkpoint_open(&c, make_headed("headed", t[i].kind), &err), t[i].code, t[i].words);
        if (!c) continue;
        const char *notes = besa_checkpoint_notes(c), *head = t[i].tied ? "model.embed_tokens.weight" : "lm_head.weight";
        CHECK_OK(besa__model_bind(&model, c, &err), err);
        CHECK(c->config.tie_word_embeddings == t[i].tied, "%s: tied %d", t[i].name, c->config.tie_word_embeddings);
        CHECK(model.head == besa_checkpoint_find(c, head), "%s: the head is %s", t[i].name, model.head->name);
        CHECK((strstr(notes, "lm_head.weight differs") == NULL) == t[i].tied, "%s: notes: %s", t[i].name, notes);
        besa_checkpoint_close(c);
    }
}

static void test_adapters(void)
{
    static const char *const names[] = { "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin" };
    besa_checkpoint *c = open_model(make_model("adapted", 0));
    if (!c) return;
    CHECK(!*besa_checkpoint_notes(c), "without an adapter: %s", besa_checkpoint_notes(c));
    besa_checkpoint_close(c);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *dir = make_model("adapted", 0);
        put_text(dir, names[i], "{}");
        if ((c = open_model(dir)) == NULL) return;
        const char *notes = besa_checkpoint_notes(c);
        CHECK(strstr(notes, names[i]) && strstr(notes, "not applied"), "%s: notes: %s", names[i], notes);
        besa_checkpoint_close(c);
    }
}

static void test_notes(void)
{
    const char *dir = make_headed("noted", HEAD_OTHER_BIT);
    put_text(dir, "adapter_config.json", "{}");
    besa_checkpoint *c = open_model(dir);
    if (!c) return;
    const char *notes = besa_checkpoint_notes(c), *second = strchr(notes, '\n');
    const char *end = second ? strchr(second + 1, '\n') : NULL;
    CHECK(second && strstr(second, "adapter") && end && !end[1], "not two lines, the second of an adapter: %s", notes);
    besa_checkpoint_close(c);
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

static besa_result open_writer(besa__writer **w, const besa_checkpoint *c, const char *out, int64_t *done)
{
    err.code = BESA_OK;
    return besa__writer_open(w, c, out, "fp 1", 3, 0, NULL, 0, done, NULL, &err);
}

/* Open (expecting `done` blocks), write up to block `stop`, and finish if that is all of them. */
static besa_result run_as(const char *fingerprint, const besa_checkpoint *c, const char *out, int64_t stop, int64_t *done)
{
    besa__writer *w;
    char *notes = NULL;
    err.code = BESA_OK;
    besa_result result = besa__writer_open(&w, c, out, fingerprint, 3, 0, NULL, 0, done, &notes, &err);
    BESA_FREE(notes);
    for (int64_t b = *done; b < stop && result == BESA_OK; b++) result = write_block(w, c, b);
    if (result == BESA_OK && stop == 3) return besa__writer_finish(w, &err);
    if (w) besa__writer_close(w);
    return result;
}

static besa_result run_writer(const besa_checkpoint *c, const char *out, int64_t stop, int64_t *done)
{
    return run_as("fp 1", c, out, stop, done);
}

/* OUT.partial and the rest of a path */
static const char *partial(const char *out, const char *rest)
{
    char *path = (char *)take(640);
    snprintf(path, 640, "%s.partial%s", out, rest);
    return path;
}

/* The complete output that waits for its last rename, OUT.partial.RUN.HASH; NULL where there is none. */
static const char *ready(const char *out)
{
    const char *name = strrchr(out, '/') + 1, *found = NULL;
    size_t n = strlen(name);
    DIR *d = opendir(g_temp);
    struct dirent *e;
    while (d && (e = readdir(d)) != NULL)
        if (!strncmp(e->d_name, name, n) && !strncmp(e->d_name + n, ".partial.", 9)) found = in(g_temp, e->d_name);
    if (d) closedir(d);
    return found;
}

static void remove_output(const char *out)
{
    remove_tree(out);
    remove_tree(partial(out, ""));
    if (ready(out)) remove_tree(ready(out));
}

/* A begun output of one block. */
static void begin_output(const besa_checkpoint *c, const char *out)
{
    int64_t done;
    remove_output(out);
    CHECK_ERROR(run_writer(c, out, 1, &done), BESA_OK, NULL);
}

/* A run that was killed while it copied: of its journal there is the first line. */
static void begin_copying(const besa_checkpoint *c, const char *out)
{
    static const char first[] = "besa-journal 2 d32a35601646f1b7\n"; /* and the hash of these words */
    begin_output(c, out);
    write_bytes(partial(out, "/besa-journal"), first, sizeof first - 1);
}

/* All is done but the last rename: OUT was there at that moment. */
static void begin_ready(const besa_checkpoint *c, const char *out)
{
    besa__writer *w;
    int64_t done;
    remove_output(out);
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    for (int64_t b = 0; b < 3; b++) CHECK_ERROR(write_block(w, c, b), BESA_OK, NULL);
    mkdir(out, 0777);
    CHECK_ERROR(besa__writer_finish(w, &err), BESA_ERROR_EXISTS, "come to exist");
    CHECK(rmdir(out) == 0 && ready(out), "%s is there, or no complete output", out);
}

/* What a run finds: nothing, an output of one block, a complete one without its name. */
enum { FROM_NOTHING, FROM_BLOCK, FROM_READY, FROM_STATES };
static const int64_t done_from[] = { 0, 1, 3 };

static void begin_from(const besa_checkpoint *c, const char *out, int state)
{
    if (state == FROM_NOTHING) remove_output(out);
    else if (state == FROM_BLOCK) begin_output(c, out);
    else begin_ready(c, out);
}

static char difference[400];                    /* that same_output has found, in diff's words */

static int same_output(const char *a, const char *b)
{
    shell_line(difference, sizeof difference, "diff -r '%s' '%s' 2>&1 || echo differs", a, b);
    difference[strcspn(difference, "\n")] = 0;
    return !*difference;
}

#define CHECK_OUTPUT(out, wanted) CHECK(same_output(out, wanted), "%s: %s", out, difference)

/* A run that must go on with `blocks` of them done, and give the output. */
static void check_resumed(const char *what, const besa_checkpoint *c, const char *out, int64_t blocks, const char *wanted)
{
    int64_t done = -1;
    CHECK_CASE(what, run_writer(c, out, 3, &done), BESA_OK, NULL);
    CHECK(done == blocks, "%s: %d blocks were done, expected %d", what, (int)done, (int)blocks);
    CHECK(same_output(out, wanted), "%s: %s", what, difference);
}

/* A model with all that may lie beside it, made when it is first asked for. */
static const char *source_model(int sharded)
{
    static const char *const others[] = { "pytorch_model.bin", "consolidated.00.pth", "extra.safetensors", "model.gguf",
                                          "pytorch_model.bin.index.json", "adapter_config.json", ".gitattributes" };
    const char *dir = temp_path(sharded ? "src2" : "src1");
    if (exists(dir)) return dir;
    make_model(sharded ? "src2" : "src1", sharded);
    put_text(dir, "tokenizer.json", "{\"x\":1}\n");
    put_text(dir, "empty.txt", "");
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        put_text(dir, others[i], strstr(others[i], "json") ? "{}" : "x");
    mkdir(in(dir, "original"), 0777);
    mkfifo(in(dir, "pipe"), 0666);
    CHECK(!symlink("/nonexistent", in(dir, "dangling")) && !symlink("config.json", in(dir, "generation_config.json")),
          "no links in %s", dir);
    return dir;
}

/* What a run gives that nothing interrupts: made when it is first asked for. */
static const char *wanted_output(int sharded)
{
    const char *out = temp_path(sharded ? "ref2" : "ref1");
    if (exists(out)) return out;
    besa_checkpoint *c = open_model(source_model(sharded));
    int64_t done;
    if (c) CHECK_ERROR(run_writer(c, out, 3, &done), BESA_OK, NULL);
    besa_checkpoint_close(c);
    return out;
}

/* Nothing lies under the output's name before all of it is there, nor anything that opens as a checkpoint; then nothing
 * lies beside it. */
static void test_writer_appears(int sharded)
{
    const char *out = temp_path("appears%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w;
    int64_t done;
    if (!c) return;
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    CHECK(done == 0, "%d blocks are done", (int)done);
    for (int64_t b = 0; b < 3; b++) {
        CHECK(!exists(out), "it exists before block %d", (int)b);
        CHECK(exists(partial(out, "/besa-journal")), "no journal before block %d", (int)b);
        CHECK(!exists(partial(out, "/config.json")), "config.json exists before block %d", (int)b);
        CHECK_ERROR(write_block(w, c, b), BESA_OK, NULL);
    }
    CHECK_ERROR(besa__writer_finish(w, &err), BESA_OK, NULL);
    CHECK(exists(out), "no output");
    CHECK(!exists(partial(out, "")), ".partial is left over");
    CHECK(!exists(partial(out, ".besa-journal")), "the journal is left over");
    besa_checkpoint_close(c);
}

static void test_writer_notes(int sharded)
{
    static const char *const left_out[] = {
        "original (a subdirectory)", "pytorch_model.bin (", "consolidated.00.pth", "extra.safetensors", "model.gguf",
        "pytorch_model.bin.index.json", "adapter_config.json (an adapter", ".gitattributes (hidden)",
        "dangling (a dangling link)", "pipe (not" };
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w;
    char *notes = NULL;
    int64_t done;
    if (!c) return;
    CHECK_ERROR(besa__writer_open(&w, c, temp_path("notes%d", sharded), "fp 1", 3, 0, NULL, 0, &done, &notes, &err), BESA_OK, NULL);
    for (size_t i = 0; i < sizeof left_out / sizeof *left_out; i++)
        CHECK(notes && strstr(notes, left_out[i]), "no note of %s: %s", left_out[i], notes ? notes : "no notes");
    besa__writer_abandon(w, NULL);
    BESA_FREE(notes);
    besa_checkpoint_close(c);
}

/* A writer that was refused something still makes the output. */
static void check_goes_on(besa__writer *w, const besa_checkpoint *c, const char *out, const char *wanted)
{
    for (int64_t b = 0; b < 3; b++) CHECK_ERROR(write_block(w, c, b), BESA_OK, NULL);
    CHECK_ERROR(besa__writer_finish(w, &err), BESA_OK, NULL);
    CHECK_OUTPUT(out, wanted);
}

static void test_writer_lock(int sharded)
{
    const char *out = temp_path("locked%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w, *second;
    int64_t done;
    if (!c) return;
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    CHECK_ERROR(open_writer(&second, c, out, &done), BESA_ERROR_RESUME, "another process");
    check_goes_on(w, c, out, wanted_output(sharded));
    besa_checkpoint_close(c);
}

/* Only weights of the block that is to come. */
static void test_writer_order(int sharded)
{
    const char *out = temp_path("order%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__block_tensors t;
    besa__writer *w;
    int64_t done;
    if (!c) return;
    const besa_tensor *norm = besa_checkpoint_find(c, "model.norm.weight");
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    CHECK_OK(besa__block_bind(&t, c, 1, &err), err);
    CHECK_CASE("a weight of block 1", besa__writer_write(w, t.weight[0], t.weight[0]->data, t.weight[0]->bytes, &err),
               BESA_ERROR_OPTION, "block 0");
    CHECK_CASE("a norm", besa__writer_write(w, norm, norm->data, 8, &err), BESA_ERROR_OPTION, "block 0");
    CHECK_CASE("block 1 done", besa__writer_block_done(w, 1, &err), BESA_ERROR_OPTION, "block 1");
    check_goes_on(w, c, out, wanted_output(sharded));
    besa_checkpoint_close(c);
}

/* What was written, or the source's bytes where nothing was. */
static void test_writer_reads(int sharded)
{
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__block_tensors t;
    besa__writer *w;
    unsigned char back[4096];
    int64_t done;
    if (!c) return;
    CHECK_ERROR(open_writer(&w, c, temp_path("reads%d", sharded), &done), BESA_OK, NULL);
    for (int64_t b = 0; b < 3; b++) CHECK_ERROR(write_block(w, c, b), BESA_OK, NULL);
    CHECK_OK(besa__block_bind(&t, c, 2, &err), err);
    const besa_tensor *down = t.weight[BESA_DOWN], *o = t.weight[BESA_O];
    CHECK_OK(besa__writer_read(w, down, back, 0, down->bytes, &err), err);
    CHECK(back[0] == 2 && back[1] == ((const unsigned char *)down->data)[1], "down_proj begins with %d, %d", back[0],
          back[1]);
    CHECK_OK(besa__writer_read(w, o, back, 0, o->bytes, &err), err);
    CHECK(!memcmp(back, o->data, o->bytes), "o_proj is not the source's");
    besa__writer_abandon(w, NULL);
    remove_output(temp_path("reads%d", sharded));
    besa_checkpoint_close(c);
}

static void test_writer_files(int sharded)
{
    const char *out = wanted_output(sharded);
    static const char *const expected[2] = {
        "config.json empty.txt generation_config.json model.safetensors tokenizer.json ",
        "config.json empty.txt generation_config.json " SHARD_1 " " SHARD_2 " " INDEX " tokenizer.json " };
    char list[512];
    struct stat st;
    shell_line(list, sizeof list, "cd '%s' && ls -A | LC_ALL=C sort | tr '\\n' ' '", out);
    CHECK(!strcmp(list, expected[sharded]), "files: %s", list);
    CHECK(!lstat(in(out, "generation_config.json"), &st) && S_ISREG(st.st_mode), "a link is still a link");
    CHECK(same_file(in(out, "generation_config.json"), in(source_model(sharded), "config.json")),
          "what a link led to differs");
}

static void test_writer_bytes(int sharded)
{
    besa_checkpoint *c = open_model(source_model(sharded)), *o = open_model(wanted_output(sharded));
    int changed = 0;
    for (int64_t i = 0; c && o && i < c->num_tensors; i++) {
        const besa_tensor *x = c->tensors + i, *y = o->tensors + i;
        int same = x->offset == y->offset && !memcmp(x->data, y->data, x->bytes);
        if (strstr(x->name, "_proj") && !strstr(x->name, "o_proj")) changed += !same;
        else CHECK(same, "%s is not the source's", x->name);
    }
    CHECK(changed == 18, "%d weights of 18 are not the source's", changed);
    besa_checkpoint_close(o);
    besa_checkpoint_close(c);
}

/* Where standard input is closed, what is opened first is descriptor 0. */
static void test_writer_descriptor_0(int sharded)
{
    const char *out = temp_path("descriptor-0-%d", sharded), *wanted = wanted_output(sharded);
    int input = dup(0);
    if (input >= 0) close(0);
    besa_checkpoint *c = open_model(source_model(sharded));
    if (c) begin_output(c, out);
    if (c) check_resumed("descriptor 0", c, out, 1, wanted);
    besa_checkpoint_close(c);
    CHECK(fcntl(0, F_GETFD) < 0, "descriptor 0 stays open");
    if (input >= 0) dup2(input, 0), close(input);
}

/* What a program prints goes to descriptors 1 and 2, whatever they are: no file that is written may be one of them. */
static void test_writer_standard(int sharded)
{
    const char *out = temp_path("standard-%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w = NULL;
    int saved[3], low = 0;
    int64_t done;
    if (!c) return;
    fflush(stdout);
    for (int fd = 0; fd < 3; fd++) saved[fd] = fcntl(fd, F_DUPFD, 20), close(fd);
    besa_result result = open_writer(&w, c, out, &done);
    if (w) low = w->journal < 3;
    for (int64_t i = 0; w && i < c->num_shards; i++) low = low || w->files[i] < 3;
    if (w) besa__writer_close(w);
    for (int fd = 0; fd < 3; fd++) dup2(saved[fd], fd), close(saved[fd]);
    CHECK(result == BESA_OK && !low, "a file of the output is a standard descriptor (%s)", besa_result_string(result));
    remove_output(out);
    besa_checkpoint_close(c);
}

/* A small tensor that is changed after it was copied, and a file that is changed at all. */
static void test_writer_copies(int sharded)
{
    const char *out = temp_path("copies-%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w = NULL;
    struct stat then, now;
    int64_t done;
    if (!c) return;
    const besa_tensor *norm = besa_checkpoint_find(c, "model.layers.1.input_layernorm.weight");
    besa_tensor other = *norm;
    unsigned char bytes[64];
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    if (w) {
        uint64_t *hash = &w->sources[norm - c->tensors].hash;
        CHECK_ERROR(besa__check_copy(w, norm, &err), BESA_OK, NULL);
        memcpy(bytes, norm->data, norm->bytes);
        bytes[3] ^= 1, other.data = bytes;
        CHECK(*hash == besa__hash(BESA__HASH_START, norm->data, norm->bytes) &&
              *hash != besa__hash(BESA__HASH_START, other.data, other.bytes), "the hash of the copy");
        *hash ^= 1;
        CHECK_ERROR(besa__check_copy(w, norm, &err), BESA_ERROR_READ, "has changed since this run read it");
        besa__writer_abandon(w, NULL);
    }
    CHECK(stat(source_model(sharded), &then) == 0, "stat");
    for (int i = 0; i < 7; i++) {
        now = then;
        switch (i) {
        case 1: now.st_size++; break;
        case 2: now.st_mtim.tv_sec++; break;
        case 3: now.st_mtim.tv_nsec ^= 1; break;
        case 4: now.st_ctim.tv_sec++; break;
        case 5: now.st_ctim.tv_nsec ^= 1; break;
        case 6: now.st_ino++; break;
        }
        CHECK(besa__has_moved(&then, &now) == (i > 0), "case %d", i);
    }
    remove_output(out);
    besa_checkpoint_close(c);
}

static void test_writer_places(int sharded)
{
    besa_checkpoint *c = open_model(source_model(sharded));
    const char *src = source_model(sharded), *fresh = temp_path("fresh%d", sharded);
    char line[BESA__LINE] = "", name[256];
    int64_t done;
    if (!c) return;
    write_bytes(temp_path("plain"), "x", 1);
    CHECK_ERROR(run_writer(c, wanted_output(sharded), 3, &done), BESA_ERROR_EXISTS, "exists already");
    CHECK_ERROR(run_writer(c, src, 3, &done), BESA_ERROR_EXISTS, "is the input");
    CHECK_ERROR(run_writer(c, in(src, "inside"), 3, &done), BESA_ERROR_EXISTS, "inside the input");
    CHECK_ERROR(run_writer(c, "/", 3, &done), BESA_ERROR_EXISTS, NULL);
    CHECK_ERROR(run_writer(c, "", 3, &done), BESA_ERROR_OPTION, NULL);
    CHECK_ERROR(run_writer(c, temp_path("no/such/out"), 3, &done), BESA_ERROR_NOT_FOUND, "parent");
    CHECK_ERROR(run_writer(c, temp_path("plain/out"), 3, &done), BESA_ERROR_NOT_FOUND, "parent");
    CHECK_ERROR(run_as("a\nb", c, fresh, 3, &done), BESA_ERROR_OPTION, "fingerprint");
    memset(name, 'n', sizeof name);
    name[213] = 0;
    CHECK_ERROR(run_writer(c, in(g_temp, name), 3, &done), BESA_OK, NULL);
    remove_output(in(g_temp, name));
    name[213] = 'n', name[214] = 0;
    CHECK_ERROR(run_writer(c, in(g_temp, name), 3, &done), BESA_ERROR_OPTION, "214 characters, expected up to 213");
    memset(line, 'x', BESA__LINE - 63);
    CHECK_ERROR(run_as(line, c, fresh, 3, &done), BESA_ERROR_OPTION, "fingerprint");
    CHECK(!exists(fresh) && !exists(partial(fresh, "")), "a failed begin leaves something");
    line[BESA__LINE - 64] = 0;
    CHECK_ERROR(run_as(line, c, fresh, 1, &done), BESA_OK, NULL);
    CHECK_ERROR(run_as(line, c, fresh, 3, &done), BESA_OK, NULL);
    CHECK(done == 1, "the longest line is not found again");
    besa_checkpoint_close(c);
}

static void test_writer_foreign(int sharded)
{
    static const char other[] = "besa-journal 1 d32a36601646f36a\n"; /* with its hash: one that is whole */
    char damaged[128];
    const char *out = temp_path("foreign%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    int64_t done;
    if (!c) return;
    mkdir(partial(out, ""), 0777);
    write_bytes(partial(out, "/mine"), "x", 1);
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_EXISTS, "no unfinished output");
    for (int finished = 0, calls = 1; !finished && calls < 1000; calls++) { /* nor where a call fails, as to list it */
        char left[64];
        fault_kind = FAULT_ERROR, fault_at = calls, fault_calls = 0;
        besa_result result = run_writer(c, out, 3, &done);
        finished = fault_calls < calls;
        fault_kind = FAULT_NONE;
        shell_line(left, sizeof left, "ls -A '%s' | tr '\n' ' '", partial(out, ""));
        CHECK(result != BESA_OK && !strcmp(left, "mine "), "call %d: left are: %s", calls, left);
    }
    write_bytes(partial(out, "/besa-journal"), "hello\n", 6);
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_EXISTS, "besa-journal");
    CHECK(exists(partial(out, "/mine")), "a foreign file is gone");
    write_bytes(partial(out, "/besa-journal"), other, sizeof other - 1);
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_RESUME, "another version");
    snprintf(damaged, sizeof damaged, "copied %016llx\n", (unsigned long long)besa__hash(BESA__HASH_START, "copied", 6));
    write_bytes(partial(out, "/besa-journal"), damaged, strlen(damaged));
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_EXISTS, "besa-journal");
    snprintf(damaged, sizeof damaged, "besa-journal 2 %016llx\ncopied %016llx\n",
             (unsigned long long)besa__hash(BESA__HASH_START, "besa-journal 2", 14),
             (unsigned long long)besa__hash(BESA__HASH_START, "copied", 6));
    write_bytes(partial(out, "/besa-journal"), damaged, strlen(damaged));
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_RESUME, "its journal is damaged");
    remove_output(out);
    besa_checkpoint_close(c);
}

/* Interrupted after each block; other options are refused meanwhile. */
static void test_writer_stopped(int sharded)
{
    const char *out = temp_path("stopped%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    char name[64];
    int64_t done;
    for (int64_t stop = 0; c && stop < 3; stop++) {
        snprintf(name, sizeof name, "stopped after %d blocks", (int)stop);
        remove_output(out);
        CHECK_CASE(name, run_writer(c, out, stop, &done), BESA_OK, NULL);
        CHECK_CASE(name, run_as("fp 2", c, out, 3, &done), BESA_ERROR_RESUME, ".partial");
        check_resumed(name, c, out, stop, wanted_output(sharded));
    }
    besa_checkpoint_close(c);
}

/* What differs from the unfinished run is named, and nothing else; a list too long ends in dots. */
static void test_writer_other_run(int sharded)
{
    const char *out = temp_path("other%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    char many[2][1500];
    int64_t done;
    if (!c) return;
    CHECK_ERROR(run_as("a=1 bc=2 d=3", c, out, 1, &done), BESA_OK, NULL);
    CHECK_ERROR(run_as("a=1 bc=20 d=3", c, out, 3, &done), BESA_ERROR_RESUME, ": bc=2 (this run: bc=20). Finish");
    CHECK_ERROR(run_as("a=2 bc=2 d=", c, out, 3, &done), BESA_ERROR_RESUME, ": a=1 (this run: a=2), d=3 (this run: d=). F");
    CHECK_ERROR(run_as("a=1 bc=2", c, out, 3, &done), BESA_ERROR_RESUME, ": d=3 (this run: ). Finish");
    CHECK_ERROR(run_as("a=1 bc=2 d=3 e=4", c, out, 3, &done), BESA_ERROR_RESUME, ":  (this run: e=4). Finish");
    CHECK_ERROR(run_as("a=1 bc=2 d=3", c, out, 3, &done), BESA_OK, NULL);
    CHECK(done == 1, "%d blocks were done", (int)done);
    remove_output(out);
    for (int i = 0; i < 1500; i++) many[0][i] = many[1][i] = i == 1499 ? 0 : i % 3 == 2 ? ' ' : 'a';
    for (int i = 0; i < 1499; i += 3) many[1][i] = 'b';
    CHECK_ERROR(run_as(many[0], c, out, 1, &done), BESA_OK, NULL);
    CHECK_ERROR(run_as(many[1], c, out, 3, &done), BESA_ERROR_RESUME, ": aa (this run: ba), aa (this run: ba)");
    CHECK(strstr(err.message, "... Finish it") && strstr(err.message, "start again"), "message: %s", err.message);
    remove_output(out);
    besa_checkpoint_close(c);
}

/* OUT.partial after two blocks, and its journal. */
typedef struct stopped {
    besa_checkpoint *c;
    const char *out, *saved;
    unsigned char *journal;
    size_t size;
} stopped;

static int stopped_begin(stopped *s, int sharded, const char *name)
{
    int64_t done;
    s->c = open_model(source_model(sharded));
    s->out = temp_path("%s%d", name, sharded);
    s->saved = temp_path("%s%d.saved", name, sharded);
    if (!s->c) return 0;
    CHECK_ERROR(run_writer(s->c, s->out, 2, &done), BESA_OK, NULL);
    shell("cp -r '%s' '%s'", partial(s->out, ""), s->saved);
    s->journal = read_bytes(partial(s->out, "/besa-journal"), &s->size);
    return 1;
}

/* OUT.partial as it was, with other bytes for a journal. */
static void stopped_again(const stopped *s, size_t size)
{
    remove_output(s->out);
    shell("cp -r '%s' '%s'", s->saved, partial(s->out, ""));
    write_bytes(partial(s->out, "/besa-journal"), s->journal, size);
}

static void stopped_end(stopped *s)
{
    free(s->journal);
    remove_output(s->out);
    remove_tree(s->saved);
    besa_checkpoint_close(s->c);
}

/* The same output, and never more blocks than whole lines; a block's line is 161 bytes. */
static void test_writer_torn(int sharded)
{
    const char *wanted = wanted_output(sharded);
    char name[64];
    int64_t one = 0;
    stopped s;
    if (!stopped_begin(&s, sharded, "torn")) return;
    for (size_t cut = 0; cut <= s.size; cut++) {
        int64_t blocks = cut == s.size ? 2 : cut + 161 >= s.size ? 1 : 0;
        stopped_again(&s, cut);
        snprintf(name, sizeof name, "cut at %zu of %zu", cut, s.size);
        check_resumed(name, s.c, s.out, blocks, wanted);
        one += blocks == 1;
    }
    CHECK(one > 0, "no cut leaves one block");
    stopped_end(&s);
}

/* Fewer blocks, or, in its first word, no journal. */
static void test_writer_flipped(int sharded)
{
    const char *wanted = wanted_output(sharded);
    int64_t done;
    stopped s;
    if (!stopped_begin(&s, sharded, "flipped")) return;
    for (size_t k = 0; k < s.size; k += 3) {
        s.journal[k] ^= 1;
        stopped_again(&s, s.size);
        s.journal[k] ^= 1;
        besa_result result = run_writer(s.c, s.out, 3, &done);
        if (result == BESA_OK) {
            CHECK(done < 2, "flip at %zu: %d blocks are done", k, (int)done);
            CHECK(same_output(s.out, wanted), "flip at %zu: %s", k, difference);
        } else CHECK(k < 12 && result == BESA_ERROR_EXISTS, "flip at %zu: %s (%s)", k, besa_result_string(result),
                     err.message);
    }
    stopped_end(&s);
}

/* A block's bytes damaged, a shard short or gone, a small file gone: made good, from the first block that is not whole. */
static void test_writer_damage(int sharded)
{
    const char *wanted = wanted_output(sharded);
    stopped s;
    if (!stopped_begin(&s, sharded, "damaged")) return;
    const besa_tensor *victim = besa_checkpoint_find(s.c, "model.layers.1.mlp.up_proj.weight");
    const char *shard = in(partial(s.out, ""), s.c->shards[victim->file].name);
    size_t n;
    stopped_again(&s, s.size);
    unsigned char *bytes = read_bytes(shard, &n);
    bytes[victim->offset + 5] ^= 16;
    write_bytes(shard, bytes, n);
    free(bytes);
    check_resumed("a bit of block 1", s.c, s.out, 1, wanted);
    stopped_again(&s, s.size);
    write_bytes(shard, "x", 1);
    check_resumed("a short shard", s.c, s.out, 0, wanted);
    stopped_again(&s, s.size);
    unlink(shard);
    check_resumed("a missing shard", s.c, s.out, 0, wanted);
    stopped_again(&s, s.size);
    unlink(partial(s.out, "/config.json"));
    check_resumed("a missing config.json", s.c, s.out, 2, wanted);
    stopped_end(&s);
}

/* Giving up keeps finished blocks, and nothing where there is none. */
static void test_writer_abandoned(int sharded)
{
    const char *out = temp_path("abandoned%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w;
    int64_t done;
    if (!c) return;
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    CHECK_ERROR(besa__writer_finish(w, &err), BESA_ERROR_OPTION, "0 of 3");
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    besa__writer_abandon(w, &err);
    CHECK(!exists(partial(out, "")), "something is left where no block was done");
    CHECK_ERROR(run_writer(c, out, 1, &done), BESA_OK, NULL);
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    besa__writer_abandon(w, &err);
    CHECK(done == 1, "%d blocks were done", (int)done);
    CHECK(exists(partial(out, "")), "the block is not kept");
    remove_output(out);
    besa_checkpoint_close(c);
}

/* The last rename replaces nothing, not even an empty directory; with and without renameat2. */
static void test_writer_replaces_nothing(int sharded)
{
    static const int lacking[] = { 0, ENOSYS, EINVAL };
    const char *out = temp_path("appeared%d", sharded), *wanted = wanted_output(sharded);
    char beside[64];
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w;
    int64_t done;
    snprintf(beside, sizeof beside, "appeared%d.partial", sharded);
    for (int i = 0; c && i < 3; i++) {
        no_renameat2 = lacking[i];
        begin_output(c, out);
        CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
        for (int64_t b = 1; b < 3; b++) CHECK_ERROR(write_block(w, c, b), BESA_OK, NULL);
        mkdir(out, 0777);
        CHECK_ERROR(besa__writer_finish(w, &err), BESA_ERROR_EXISTS, "come to exist");
        CHECK(rmdir(out) == 0, "%s is no empty directory any more", out);
        CHECK(ready(out) && strstr(err.message, ready(out)), "the message names no complete output: %s", err.message);
        CHECK(names_like(g_temp, beside) == 1, "%d names begin with %s", names_like(g_temp, beside), beside);
        check_resumed("finished later", c, out, 3, wanted);
    }
    no_renameat2 = 0;
    remove_output(out);
    besa_checkpoint_close(c);
}

/* ---- a complete output that a kill has kept from its name ------------------------------------ */

/* All but pruned weights is made good, whatever it holds; what is wrong in those is an error, which names the directory. */
static void test_ready_damage(int sharded)
{
    static const char *const small[] = { "config.json", "tokenizer.json", "empty.txt", INDEX };
    const char *out = temp_path("ready%d", sharded), *wanted = wanted_output(sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    char what[64];
    for (int i = 0; c && i < 3 + sharded; i++)
        for (int gone = 0; gone < 2; gone++) {
            begin_ready(c, out);
            if (gone) unlink(in(ready(out), small[i]));
            else write_bytes(in(ready(out), small[i]), "other", 5);
            snprintf(what, sizeof what, "%s %s", small[i], gone ? "gone" : "overwritten");
            check_resumed(what, c, out, 3, wanted);
            remove_output(out);
        }
    besa_checkpoint_close(c);
}

/* A bit of a shard, wherever it is; its size; the shard itself. */
static void test_ready_weights(int sharded)
{
    const char *out = temp_path("rotten%d", sharded), *wanted = wanted_output(sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    int64_t done, good = 0, bad = 0;
    size_t n;
    if (!c) return;
    begin_ready(c, out);
    const char *directory = ready(out), *shard = in(directory, c->shards[c->num_shards - 1].name);
    unsigned char *bytes = read_bytes(shard, &n);
    for (size_t at = 0; at < n + 2; at += at < n ? n / 40 : 1) {
        if (!exists(directory)) begin_ready(c, out);
        if (at < n) bytes[at] ^= 4;
        write_bytes(shard, bytes, at < n ? n : n - 1);
        if (at < n) bytes[at] ^= 4;
        if (at == n + 1) unlink(shard);
        besa_result result = run_writer(c, out, 3, &done);
        good += result == BESA_OK;
        bad += result != BESA_OK;
        if (result == BESA_OK) CHECK(same_output(out, wanted), "byte %zu: %s", at, difference);
        else CHECK(result == BESA_ERROR_EXISTS && strstr(err.message, directory) && !exists(out), "byte %zu: %s", at, err.message);
        CHECK(names_like(g_temp, strrchr(out, '/') + 1) == 1, "byte %zu: two directories", at);
        remove_tree(out);
    }
    CHECK(good > 2 && bad > 10, "%d were made good, %d refused", (int)good, (int)bad);
    free(bytes);
    remove_output(out);
    besa_checkpoint_close(c);
}

/* Another run has no use for it, and leaves it alone; messages say where files lie; a foreign one is noted. */
static void test_ready_messages(int sharded)
{
    const char *out = temp_path("waits%d", sharded), *wanted = wanted_output(sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w;
    char *notes = NULL;
    int64_t done;
    if (!c) return;
    begin_ready(c, out);
    const char *directory = ready(out), *fifo = in(directory, "tokenizer.json");
    CHECK_ERROR(run_as("fp 2", c, out, 3, &done), BESA_ERROR_RESUME, directory);
    CHECK(!exists(partial(out, "")) && !exists(out), "the other run leaves something");
    unlink(fifo);
    mkfifo(fifo, 0666);
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_EXISTS, fifo);
    unlink(fifo);
    write_bytes(in(directory, "notes.txt"), "mine", 4);
    CHECK_ERROR(besa__writer_open(&w, c, out, "fp 1", 3, 0, NULL, 0, &done, &notes, &err), BESA_OK, NULL);
    CHECK(notes && strstr(notes, "notes.txt lay in") && strstr(notes, directory), "notes: %s", notes ? notes : "none");
    BESA_FREE(notes);
    besa__writer_abandon(w, NULL);
    unlink(in(directory, "notes.txt"));
    check_resumed("in the end", c, out, 3, wanted);
    remove_output(out);
    besa_checkpoint_close(c);
}

/* Of two processes the second is refused, whatever the first has come to; nothing is written into a finished output. */
static void test_ready_lock(int sharded)
{
    const char *out = temp_path("raced%d", sharded), *wanted = wanted_output(sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w, *second;
    int64_t done;
    if (!c) return;
    begin_ready(c, out);
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    CHECK_ERROR(open_writer(&second, c, out, &done), BESA_ERROR_RESUME, "another process is writing it");
    CHECK_ERROR(besa__writer_finish(w, &err), BESA_OK, NULL);
    CHECK_OUTPUT(out, wanted);
    for (int state = FROM_BLOCK; state < FROM_STATES; state++) { /* finished between opening the directory and its lock */
        begin_ready(c, out);
        if (state == FROM_BLOCK) rename(ready(out), partial(out, ""));
        before_lock[0] = state == FROM_BLOCK ? partial(out, "") : ready(out);
        before_lock[1] = out;
        CHECK_ERROR(open_writer(&second, c, out, &done), BESA_ERROR_RESUME, "just finished it");
        CHECK_OUTPUT(out, wanted);
        CHECK(names_like(g_temp, strrchr(out, '/') + 1) == 1, "state %d: something lies beside the output", state);
    }
    remove_output(out);
    besa_checkpoint_close(c);
}

/* Another directory has the name by the time that the lock is there. */
static void test_writer_moved(int sharded)
{
    const char *out = temp_path("moved%d", sharded), *aside = temp_path("moved-aside%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    int64_t done;
    if (!c) return;
    begin_output(c, out);
    shell("cp -r '%s' '%s.twin'", partial(out, ""), out);
    before_lock[0] = partial(out, "");
    before_lock[1] = aside;
    before_lock[2] = temp_path("moved%d.twin", sharded);
    before_lock[3] = partial(out, "");
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_RESUME, "another process");
    check_resumed("by its name", c, out, 1, wanted_output(sharded));
    remove_tree(aside);
    remove_output(out);
    besa_checkpoint_close(c);
}

/* OUT, or the complete output, comes to exist just before a run that has found neither locks the directory it made. */
static void test_ready_appears(int sharded)
{
    const char *out = temp_path("late%d", sharded), *aside = temp_path("late-aside%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    besa__writer *w;
    int64_t done;
    for (int state = 0; c && state < 2; state++) {
        begin_ready(c, out);
        const char *directory = ready(out);
        rename(directory, aside);
        before_lock[0] = aside;
        before_lock[1] = state ? out : directory;
        CHECK_ERROR(open_writer(&w, c, out, &done), BESA_ERROR_RESUME, state ? "just finished it" : "is finishing it");
        CHECK(exists(state ? out : directory) && !exists(partial(out, "")), "state %d: something is left", state);
        remove_output(out);
    }
    besa_checkpoint_close(c);
}

/* The journal's lock alone, which is all that other machines may see. */
static void test_journal_lock(int sharded)
{
    const char *out = temp_path("remote%d", sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    int64_t done;
    if (!c) return;
    begin_output(c, out);
    int fd = open(partial(out, "/besa-journal"), O_RDWR);
    CHECK(flock(fd, LOCK_EX | LOCK_NB) == 0, "no lock");
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_RESUME, "another process is writing it");
    close(fd);
    check_resumed("unlocked", c, out, 1, wanted_output(sharded));
    remove_output(out);
    besa_checkpoint_close(c);
}

/* ---- what the output has of the source ------------------------------------------------------- */

static void test_written_head(void)
{
    const char *dir = make_headed("headed", HEAD_OTHER_BIT), *out = temp_path("headed_out");
    put_text(dir, "adapter_config.json", "{}");
    besa_checkpoint *c = open_model(dir);
    int64_t done;
    if (!c) return;
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_OK, NULL);
    besa_checkpoint_close(c);
    if ((c = open_model(out)) == NULL) return;
    const char *notes = besa_checkpoint_notes(c);
    CHECK(!c->config.tie_word_embeddings && strstr(notes, "lm_head.weight differs"), "tied %d, notes: %s",
          c->config.tie_word_embeddings, notes);
    CHECK(!strstr(notes, "adapter"), "notes: %s", notes);
    besa_checkpoint_close(c);
    remove_output(out);
}

/* Which files become part of an output. */
static void test_left_out(void)
{
    static const char *const copied[] = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
        "chat_template.json", "tekken.json", "qwen.tiktoken", "modeling_custom.py", "README.md", "LICENSE",
        "LICENSE.txt", "NOTICE", "USE_POLICY.md", "preprocessor_config.json", "model.index.md" };
    static const char *const left_out[] = {
        "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin",
        "adapter_model.safetensors.index.json", "model.fp16.safetensors", "pytorch_model.bin",
        "pytorch_model.bin.index.json", "pytorch_model.bin.index.fp16.json", "model.safetensors.index.json",
        "model.safetensors.index.fp16.json", "tf_model.h5", "tf_model.h5.index.json", "flax_model.msgpack",
        "flax_model.msgpack.index.json", "rust_model.ot", "model.onnx", "model.onnx_data", "model-Q4_K_M.gguf",
        "MODEL.GGUF", "ggml-model.ggml", "weights.npz", "consolidated.00.pth", "consolidated.safetensors",
        "params.json", "checklist.chk", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth",
        "trainer_state.json", "trainer_log.jsonl", "training_args.bin", "training_args.json", "all_results.json",
        "eval_results.json", "train_results.json", "events.out.tfevents.1700000000.host", "latest", "zero_to_fp32.py",
        "quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json",
        "kv_cache_scales.json", "measurement.json", "imatrix.dat", "model.imatrix", "openvino_model.xml",
        "openvino_model.bin", "genai_config.json", "ndarray-cache.json", "tensor-cache-b16.json", "SHA256SUMS",
        "md5sums.txt", "model.safetensors.sha256", "model.sig", "tokens.npy", "tokens.u16", ".gitattributes" };
    besa_checkpoint c;
    struct stat st;
    memset(&c, 0, sizeof c);
    memset(&st, 0, sizeof st);
    st.st_mode = S_IFREG;
    for (size_t i = 0; i < sizeof copied / sizeof *copied; i++) {
        const char *why = besa__why_left_out(&c, copied[i], &st);
        CHECK(!why, "%s is left out: %s", copied[i], why);
    }
    for (size_t i = 0; i < sizeof left_out / sizeof *left_out; i++)
        CHECK(besa__why_left_out(&c, left_out[i], &st), "%s is copied", left_out[i]);
    const char *adapter = besa__why_left_out(&c, "adapter_config.json", &st);
    CHECK(adapter && !strcmp(adapter, "an adapter, which is not applied"), "of an adapter: %s", adapter ? adapter : "copied");
    c.index = INDEX;
    CHECK(!besa__why_left_out(&c, INDEX, &st), "the index of the shards is left out");
}

static int mode_of(const char *path)
{
    struct stat st;
    return stat(path, &st) ? -1 : (int)(st.st_mode & 0777);
}

/* Four files with each of four modes in turn, under a umask; the run goes on where it may only read what it made. */
static void check_modes(const char *src, const char *out, int shift, mode_t mask)
{
    static const char *const names[] = { "config.json", "model.safetensors", "tokenizer.json", "empty.txt" };
    static const mode_t modes[] = { 0600, 0640, 0444, 0666 };
    mode_t old = umask(mask);
    int64_t done;
    for (int i = 0; i < 4; i++) chmod(in(src, names[i]), modes[(i + shift) % 4]);
    besa_checkpoint *c = open_model(src);
    if (c) {
        CHECK_ERROR(run_writer(c, out, 1, &done), BESA_OK, NULL);
        int found = mode_of(partial(out, "/besa-journal"));
        CHECK(found == (int)(0666 & ~mask), "umask %03o: the journal has mode %03o", (unsigned)mask, (unsigned)found);
        CHECK_ERROR(run_writer(c, out, 3, &done), BESA_OK, NULL);
        CHECK(done == 1, "umask %03o: %d blocks were done", (unsigned)mask, (int)done);
    }
    umask(old);
    for (int i = 0; c && i < 4; i++) {
        int expected = (int)(modes[(i + shift) % 4] & ~mask);
        int found = mode_of(in(out, names[i]));
        CHECK(found == expected, "umask %03o: %s has mode %03o, expected %03o", (unsigned)mask, names[i], (unsigned)found,
              (unsigned)expected);
    }
    besa_checkpoint_close(c);
    remove_output(out);
}

/* Files are as private as the source's; a umask takes away more. Reading only does not keep a run from going on. */
static void test_permissions(void)
{
    static const mode_t masks[] = { 022, 077, 0 };
    const char *src = temp_path("modes"), *out = temp_path("modes-out");
    int64_t done;
    shell("cp -r '%s' '%s'", source_model(0), src);
    for (int m = 0; m < 3; m++)
        for (int shift = 0; shift < 4; shift++) check_modes(src, out, shift, masks[m]);
    chmod(src, 0700);
    besa_checkpoint *c = open_model(src);
    if (!c) return;
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_OK, NULL);
    CHECK(mode_of(out) == 0700, "the directory has mode %03o", (unsigned)mode_of(out));
    besa_checkpoint_close(c);
    remove_output(out);
    remove_tree(src);
}

/* A source file is replaced while the run goes on: by the same contents, by others, by nothing; then it is put back. */
enum { CHANGE_SAME, CHANGE_FIRST, CHANGE_HEAD, CHANGE_LAST, CHANGE_SHORTER, CHANGE_GONE, CHANGE_BEFORE, CHANGES };

/* A run with a change of the file: CHANGE_BEFORE it begins, and put back during it; else before it ends. kept: the
 * checkpoint holds the file's bytes, so that others may be there in between. */
static besa_result run_changed(const besa_checkpoint *c, const char *path, int kept, int change, const char *out)
{
    besa__writer *w;
    besa__block_tensors t;
    int64_t done;
    size_t n;
    unsigned char *bytes = read_bytes(path, &n);
    if (change == CHANGE_BEFORE) {
        write_bytes(path, "x", 1);
        if (!kept) write_bytes(path, bytes, n);
    }
    besa_result result = open_writer(&w, c, out, &done);
    for (int64_t b = 0; b < 3 && result == BESA_OK; b++) {
        if (besa__block_bind(&t, c, b, &err) == BESA_OK)
            for (int l = 0; l < BESA_LAYERS; l++)
                besa__writer_saw(w, t.weight[l], 0, t.weight[l]->data, t.weight[l]->bytes);
        result = write_block(w, c, b);
    }
    CHECK_CASE("blocks", result, BESA_OK, NULL);
    if (change != CHANGE_BEFORE) rename(path, temp_path("aside"));
    if (change == CHANGE_FIRST) bytes[0] ^= 1;  /* of shards it is the header's, */
    if (change == CHANGE_HEAD) bytes[n > 8 ? 8 : 0] ^= 1; /* and the ninth of the header */
    if (change == CHANGE_LAST) bytes[n - 1] ^= 1; /* and the last one a weight's */
    if (change != CHANGE_GONE) write_bytes(path, bytes, change == CHANGE_SHORTER ? n - 1 : n);
    free(bytes);
    return besa__writer_finish(w, &err);
}

/* The output is of what was read, or the error names the file and the blocks are kept. */
static void check_source_change(const char *src, const char *name, int change, const char *out)
{
    static const char *const how[] = { "the same", "another first byte", "another ninth byte", "another last byte", "shorter", "gone",
                                       "another before" };
    int kept = !strcmp(name, "config.json") || !strcmp(name, INDEX);
    int refused = change != CHANGE_SAME && change != CHANGE_BEFORE;
    besa_checkpoint *c = open_model(src);
    char label[128];
    if (!c) return;
    snprintf(label, sizeof label, "%s: %s", name, how[change]);
    besa_result result = run_changed(c, in(src, name), kept, change, out);
    CHECK_CASE(label, result, refused ? BESA_ERROR_READ : BESA_OK, name);
    if (result != BESA_OK) {
        CHECK(!exists(out) && exists(partial(out, "/besa-journal")), "%s: the blocks are not kept", label);
        rename(temp_path("aside"), in(src, name));
        check_resumed(label, c, out, 3, wanted_output(1));
    } else CHECK(same_output(out, wanted_output(1)), "%s: %s", label, difference);
    unlink(temp_path("aside"));
    besa_checkpoint_close(c);
    remove_output(out);
}

static void test_source_changes(void)
{
    static const char *const names[] = { "config.json", INDEX, SHARD_1, SHARD_2, "tokenizer.json" };
    const char *src = temp_path("changes"), *out = temp_path("changes-out");
    shell("cp -r '%s' '%s'", source_model(1), src);
    unlink(in(src, "generation_config.json"));  /* no link to a file that changes */
    shell("cd '%s' && cp config.json generation_config.json", src);
    for (int i = 0; i < 5; i++)
        for (int change = 0; change < CHANGES; change++) check_source_change(src, names[i], change, out);
    remove_tree(src);
}

/* The header of a shard that is mapped, changed in place after it was read. */
static void test_header_changes(void)
{
    const char *src = make_model("overwritten", 0), *out = temp_path("overwritten-out");
    besa_checkpoint *c = open_model(src);
    besa__writer *w;
    int64_t done;
    FILE *f = fopen(in(src, "model.safetensors"), "r+b");
    if (c && f) {
        fseek(f, 8, SEEK_SET);
        fputc(' ', f);                          /* was the first brace */
        fflush(f);
        besa_result result = open_writer(&w, c, out, &done);
        CHECK_CASE("overwritten header", result, BESA_ERROR_READ, "model.safetensors: has changed");
        CHECK(!exists(out), "there is an output");
        if (result == BESA_OK) besa__writer_abandon(w, NULL);
    }
    if (f) fclose(f);
    besa_checkpoint_close(c);
    remove_output(out);
}

/* ---- kills, loss of power -------------------------------------------------------------------- */

/* Whether a child that makes this many system calls before it is killed has finished instead; -1: it failed. */
static int finished_before(const besa_checkpoint *c, const char *out, int calls)
{
    int status;
    int64_t done;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        fault_kind = FAULT_KILL;
        fault_at = calls, fault_calls = 0;
        _exit(run_writer(c, out, 3, &done) == BESA_OK ? 0 : 1);
    }
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? 0 : WEXITSTATUS(status) ? -1 : 1;
}

/* Killed again and again, each time a call later, without cleaning up in between. */
static void test_kill(void)
{
    const char *out = temp_path("killed"), *wanted = wanted_output(1);
    besa_checkpoint *c = open_model(source_model(1));
    int calls = 1, finished = 0;
    if (!c) return;
    for (; !finished && calls < 1000; calls++) finished = exists(out) ? 1 : finished_before(c, out, calls);
    CHECK(finished == 1, "after %d calls the run has %s", calls - 1, finished ? "failed" : "not ended");
    CHECK_OUTPUT(out, wanted);
    CHECK(names_like(g_temp, "killed") == 1, "%d names begin with killed", names_like(g_temp, "killed"));
    besa_checkpoint_close(c);
}

/* Killed at each system call in turn, each time from the same state: what is left is the output and nothing beside it, or is
 * gone on from. */
static void check_kill_points(const besa_checkpoint *c, int state)
{
    const char *out = temp_path("killpoint"), *wanted = wanted_output(1);
    int64_t done;
    int ok = 1, finished = 0, calls = 1;
    for (; !finished && ok && calls < 1000; calls++) {
        begin_from(c, out, state);
        finished = finished_before(c, out, calls);
        ok = CHECK(finished >= 0, "call %d: the run fails", calls);
        if (!finished && !exists(out)) {
            ok = CHECK(run_writer(c, out, 3, &done) == BESA_OK, "call %d: %s", calls, err.message) && ok;
            ok = CHECK(done >= done_from[state], "call %d: %d blocks were done", calls, (int)done) && ok;
        }
        ok = CHECK(compare_directories(out, wanted, NULL, difference) == 0, "call %d: %s differs", calls, difference) && ok;
        ok = CHECK(names_like(g_temp, "killpoint") == 1, "call %d: %d names begin with killpoint", calls,
                   names_like(g_temp, "killpoint")) && ok;
    }
    CHECK(finished, "after %d calls the run has not ended", calls - 1);
    if (getenv("TEST_VERBOSE")) printf("    %d calls\n", calls - 2);
    remove_output(out);
}

static void test_kill_points(void)
{
    besa_checkpoint *c = open_model(source_model(1));
    if (c) check_kill_points(c, FROM_NOTHING); /* which comes by all that a run from one block does */
    if (c) check_kill_points(c, FROM_READY);
    besa_checkpoint_close(c);
}

/* What a loss of power leaves is as good as what a kill leaves: bytes are on disk before the line that says so, all of it
 * before a name says so; whether the run is a new one or goes on. */
static void test_sync_order(int sharded)
{
    const char *out = temp_path("ordered"), *wanted = wanted_output(sharded);
    besa_checkpoint *c = open_model(source_model(sharded));
    int64_t done;
    for (int state = 0; c && state < FROM_STATES; state++) {
        static const char *const how[] = { "new", "resumed", "complete" };
        static const int lines[] = { 6, 2, 0 }, renames[] = { 2, 2, 1 };
        begin_from(c, out, state);
        memset(&ledger, 0, sizeof ledger);
        ledger.watching = 1;
        besa_result result = run_writer(c, out, 3, &done);
        ledger_expect_clean("the end", "", 0);
        ledger.watching = 0;
        CHECK_CASE(how[state], result, BESA_OK, NULL);
        CHECK(done == done_from[state], "%s: %d blocks were done", how[state], (int)done);
        CHECK(!ledger.violations, "%s: %s", how[state], ledger.first);
        CHECK(ledger.lines == lines[state] && ledger.renames == renames[state], "%s: %d lines, %d renames", how[state],
              ledger.lines, ledger.renames);
        CHECK(same_output(out, wanted), "%s: %s", how[state], difference);
        remove_output(out);
    }
    besa_checkpoint_close(c);
}

/* Learned rates too are on disk before the line of their block. */
static void test_sync_rates(void)
{
    const char *out = temp_path("ordered-rates");
    const float alpha[2] = {0.25f, 0.5f};
    besa_checkpoint *c = open_model(source_model(1));
    besa__writer *w = NULL;
    int64_t done;
    memset(&ledger, 0, sizeof ledger);
    ledger.watching = 1;
    if (c) CHECK_ERROR(besa__writer_open(&w, c, out, "fp 1", 3, 0, NULL, 2, &done, NULL, &err), BESA_OK, NULL);
    for (int64_t b = 0; w && b < 3; b++) {
        CHECK_ERROR(besa__learned_put(w, alpha, &err), BESA_OK, NULL);
        CHECK_ERROR(write_block(w, c, b), BESA_OK, NULL);
    }
    ledger.watching = 0;
    CHECK(ledger.lines >= 3 && !ledger.violations, "%d lines, %s", ledger.lines, ledger.first);
    if (w) besa__writer_close(w);
    remove_output(out);
    besa_checkpoint_close(c);
}

/* A file system that does not sync such a file at all is no error; one that could not is. */
static void test_no_sync(void)
{
    static const int reasons[] = { EINVAL, ENOTSUP, EIO, ENOSPC };
    const char *out = temp_path("unsynced"), *wanted = wanted_output(1);
    besa_checkpoint *c = open_model(source_model(1));
    int64_t done;
    for (int i = 0; c && i < 4; i++) {
        no_fsync = reasons[i];
        CHECK_CASE(strerror(reasons[i]), run_writer(c, out, 3, &done), i < 2 ? BESA_OK : BESA_ERROR_WRITE, NULL);
        no_fsync = 0;
        CHECK(i < 2 ? same_output(out, wanted) : !exists(out), "%s: %s", strerror(reasons[i]), difference);
        remove_output(out);
    }
    besa_checkpoint_close(c);
}

/* A file system that cannot promise room is no error, and posix_fallocate, which would write to every page there, is not asked;
 * one that has no room is. */
static void test_no_allocation(void)
{
    static const int reasons[] = { EOPNOTSUPP, ENOSYS, ENOSPC, EIO };
    const char *out = temp_path("unallocated"), *wanted = wanted_output(1);
    besa_checkpoint *c = open_model(source_model(1));
    int64_t done;
    for (int i = 0; c && i < 4; i++) {
        no_fallocate = reasons[i];
        posix_allocations = 0;
        CHECK_CASE(strerror(reasons[i]), run_writer(c, out, 3, &done), i < 2 ? BESA_OK : BESA_ERROR_WRITE, NULL);
        no_fallocate = 0;
        CHECK(i < 2 ? same_output(out, wanted) : !exists(out), "%s: %s", strerror(reasons[i]), difference);
#if defined(SYS_fallocate) && LONG_MAX > 2147483647
        CHECK(posix_allocations == 0, "%s: posix_fallocate was called", strerror(reasons[i]));
#endif
        remove_output(out);
    }
    besa_checkpoint_close(c);
}

/* ---- what others have put into OUT.partial: not read as a file, nor written through, nor deleted ---- */

static const char *const run_files[] = { "besa-journal", SHARD_2, "tokenizer.json", "config.json", INDEX };

/* A FIFO, a socket, a directory where a file should be. */
static void test_places_kinds(void)
{
    static const char *const kinds[] = { "a FIFO", "a socket", "a directory" };
    static const mode_t types[] = { S_IFIFO, S_IFSOCK, S_IFDIR };
    const char *out = temp_path("kinds");
    besa_checkpoint *c = open_model(source_model(1));
    int64_t done;
    for (int kind = 0; c && kind < 3; kind++)
        for (int i = 0; i < 5; i++) {
            const char *path = in(partial(out, ""), run_files[i]);
            begin_output(c, out);
            unlink(path);
            if (types[kind] == S_IFDIR) mkdir(path, 0777);
            else mknod(path, types[kind] | 0666, 0);
            alarm(20);                          /* instead of waiting for a writer */
            besa_result result = run_writer(c, out, 3, &done);
            alarm(0);
            CHECK_CASE(kinds[kind], result, BESA_ERROR_EXISTS, run_files[i]);
            CHECK(exists(path), "%s in place of %s is gone", kinds[kind], run_files[i]);
            CHECK(!exists(out), "%s in place of %s: there is an output", kinds[kind], run_files[i]);
        }
    remove_output(out);
    besa_checkpoint_close(c);
}

/* Another name of the same file, as in a backup made by cp -al, keeps its contents; i: of run_files, 1 is a shard. */
static void check_hard_link(const besa_checkpoint *c, const char *out, int i)
{
    const char *name = run_files[i], *path = in(partial(out, ""), name), *mine = temp_path("links-mine");
    const char *wanted = wanted_output(1);
    int64_t done;
    size_t n, m;
    begin_output(c, out);
    if (!exists(path)) write_bytes(path, "other", 5);
    CHECK(link(path, mine) == 0, "%s: no link", name);
    unsigned char *before = read_bytes(mine, &n), *after;
    besa_result result = run_writer(c, out, 3, &done);
    CHECK_CASE(name, result, i == 1 ? BESA_ERROR_EXISTS : BESA_OK, "hard links");
    after = read_bytes(mine, &m);
    CHECK(before && after && n == m && !memcmp(before, after, n), "%s: its other name has other contents", name);
    free(before);
    free(after);
    unlink(mine);
    if (result != BESA_OK) CHECK_CASE(name, run_writer(c, out, 3, &done), BESA_OK, NULL);
    CHECK(same_output(out, wanted), "%s: %s", name, difference);
}

static void test_places_links(void)
{
    besa_checkpoint *c = open_model(source_model(1));
    for (int i = 1; c && i < 5; i++) check_hard_link(c, temp_path("links"), i);
    remove_output(temp_path("links"));
    besa_checkpoint_close(c);
}

/* Giving up leaves a foreign file alone, and says so after what the run ended with. */
static void test_places_discarded(void)
{
    const char *out = temp_path("discarded");
    besa_checkpoint *c = open_model(source_model(1));
    besa__writer *w;
    char left[256];
    int64_t done;
    if (!c) return;
    CHECK_ERROR(run_writer(c, out, 0, &done), BESA_OK, NULL);
    write_bytes(partial(out, "/notes.txt"), "mine", 4);
    CHECK_ERROR(open_writer(&w, c, out, &done), BESA_OK, NULL);
    err.code = BESA_ERROR_CANCELLED;
    snprintf(err.message, sizeof err.message, "stopped");
    besa__writer_abandon(w, &err);
    CHECK_CASE("discarded", err.code, BESA_ERROR_CANCELLED, "stopped; ");
    CHECK(strstr(err.message, "notes.txt") && strstr(err.message, ".partial stays"), "message: %s", err.message);
    shell_line(left, sizeof left, "ls -A '%s' | tr '\\n' ' '", partial(out, ""));
    CHECK(!strcmp(left, "notes.txt "), "left are: %s", left);
    remove_output(out);
    besa_checkpoint_close(c);
}

/* A start that fails, of a run that was killed while it copied, takes back what is its own, and no more. */
static void test_places_failed_start(void)
{
    const char *out = temp_path("unstarted");
    besa_checkpoint *c = open_model(source_model(1));
    int64_t done;
    if (!c) return;
    begin_copying(c, out);
    write_bytes(partial(out, "/notes.txt"), "mine", 4);
    unlink(partial(out, "/tokenizer.json"));
    mkfifo(partial(out, "/tokenizer.json"), 0666);
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_EXISTS, "tokenizer.json");
    CHECK(strstr(err.message, ".partial stays"), "message: %s", err.message);
    CHECK(exists(partial(out, "/notes.txt")), "notes.txt is gone");
    CHECK(exists(partial(out, "/tokenizer.json")), "the FIFO is gone");
    CHECK(!exists(partial(out, "/besa-journal")), "the journal is left");
    CHECK(!exists(partial(out, "/empty.txt")), "empty.txt is left");
    CHECK(!exists(partial(out, "/" SHARD_1)), "a shard is left");
    remove_output(out);
    besa_checkpoint_close(c);
}

/* The same, with any call of it failing too, as one that deletes: what is left is gone on from. */
static void test_places_failed_discard(void)
{
    const char *out = temp_path("undeleted"), *fifo = partial(out, "/tokenizer.json");
    besa_checkpoint *c = open_model(source_model(1));
    int64_t done;
    int ok = 1;
    for (int finished = 0, calls = 1; c && !finished && ok && calls < 1000; calls++) {
        begin_copying(c, out);
        unlink(fifo);
        mkfifo(fifo, 0666);
        fault_kind = FAULT_ERROR, fault_at = calls, fault_calls = 0;
        ok = CHECK(run_writer(c, out, 3, &done) != BESA_OK, "call %d: a FIFO is taken for a file", calls);
        finished = fault_calls < calls;
        fault_kind = FAULT_NONE;
        unlink(fifo);
        ok = CHECK(run_writer(c, out, 3, &done) == BESA_OK, "call %d: %s", calls, err.message) && ok;
        ok = CHECK(names_like(g_temp, "undeleted") == 1, "call %d: something lies beside the output", calls) && ok;
    }
    remove_output(out);
    besa_checkpoint_close(c);
}

/* A run that ends well says what else becomes part of the output. */
static void test_places_noted(void)
{
    const char *out = temp_path("noted-out");
    besa_checkpoint *c = open_model(source_model(1));
    besa__writer *w;
    char *notes = NULL;
    int64_t done;
    if (!c) return;
    begin_output(c, out);
    write_bytes(partial(out, "/notes.txt"), "mine", 4);
    CHECK_ERROR(besa__writer_open(&w, c, out, "fp 1", 3, 0, NULL, 0, &done, &notes, &err), BESA_OK, NULL);
    CHECK(notes && strstr(notes, "notes.txt"), "notes: %s", notes ? notes : "none");
    BESA_FREE(notes);
    besa__writer_abandon(w, NULL);
    remove_output(out);
    besa_checkpoint_close(c);
}

/* ---- failing calls --------------------------------------------------------------------------- */

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
        ok = CHECK(finished || (result == BESA_ERROR_MEMORY && err.code == result), "%s, allocation %d: %s (%s)", name,
                   calls, besa_result_string(result), result ? err.message : "");
        ok = CHECK(result == BESA_OK || live_blocks == blocks, "%s, allocation %d: %d blocks are kept", name, calls,
                   (int)(live_blocks - blocks)) && ok;
        besa_checkpoint_close(c);
        besa_tokens_free(&t);
        ok = CHECK(live_blocks == blocks, "%s, allocation %d: %d blocks are kept after closing", name, calls,
                   (int)(live_blocks - blocks)) && ok;
    }
    CHECK(finished && calls > 2, "%s: not all of %d allocations were tried", name, calls - 1);
}

static void test_frees_checkpoints(void)
{
    const char *dir = temp_path("frees");
    check_frees("one file", make_model("frees", 0), NULL);
    check_frees("shards", make_model("frees", 1), NULL);
    check_frees("a head that differs", make_headed("frees", HEAD_OTHER_BIT), NULL);
    check_frees("a head of another shape", make_headed("frees", HEAD_OTHER_SHAPE), NULL);
    put_text(dir, "adapter_config.json", "{}");
    check_frees("and an adapter", dir, NULL);
    put_text(dir, "config.json", "{\"model_type\":\"llama\",\"hidden_size\":-1}");
    check_frees("a bad config", dir, NULL);
}

static void test_frees_tokens(void)
{
    static const unsigned char bad[16] = { 1, 0, 0, 0, 255, 255, 255, 255 };
    const char *path = temp_path("f.npy");
    unsigned char file[256];
    write_bytes(path, file, npy(file, 1, NPY("'<i4'", "(1,)"), bad, 4));
    check_frees(".npy", NULL, path);
    write_bytes(path, file, npy(file, 1, NPY("'<i4'", "(2,)"), bad, 8));
    check_frees(".npy with a bad id", NULL, path);
    write_bytes(path, file, npy(file, 1, NPY("'<f4'", "(2,)"), bad, 8));
    check_frees(".npy of floats", NULL, path);
    write_bytes(temp_path("f.i32"), bad, 8);
    check_frees("raw with a bad id", NULL, temp_path("f.i32"));
}

/* Each call of the kind fails while a model opens: an error. */
static void check_failing_open(int kind)
{
    int ok = 1, calls = 1;
    const char *dir = source_model(1);
    for (int opened = 0; !opened && ok && calls < 1000; calls++) {
        besa_checkpoint *c;
        fault_kind = kind, fault_at = calls, fault_calls = 0;
        besa_result result = besa_checkpoint_open(&c, dir, &err);
        fault_kind = FAULT_NONE;
        besa_checkpoint_close(c);
        opened = result == BESA_OK;
        ok = CHECK(opened || (err.code == result && result == (kind == FAULT_MEMORY ? BESA_ERROR_MEMORY : BESA_ERROR_READ)),
                   "call %d: %s (%s)", calls, besa_result_string(result), err.message);
    }
    CHECK(calls > 5 && calls < 1000, "%d calls were tried", calls - 1);
}

/* Each call of the kind fails while a run goes on, and with `stays` all after it: an error that says so, blocks that are kept,
 * and the same bytes when it is run again. */
static void check_failing_run(const besa_checkpoint *c, int kind, int state, int stays)
{
    const char *out = temp_path("faulty"), *wanted = wanted_output(1);
    char label[64];
    int64_t done = 0;
    int ok = 1, finished = 0, calls = 1;
    for (; !finished && ok && calls < 1000; calls += stays ? 3 : 1) {
        snprintf(label, sizeof label, "from state %d, call %d%s", state, calls, stays ? " and all after it" : "");
        begin_from(c, out, state);
        fault_kind = kind, fault_at = calls, fault_calls = 0, fault_stays = stays;
        besa_result result = run_writer(c, out, 3, &done);
        finished = fault_calls < calls;
        fault_kind = fault_stays = 0;
        if (result == BESA_ERROR_WRITE && exists(out)) { /* only its parent's sync */
            ok = CHECK(strstr(err.message, "complete"), "%s: %s", label, err.message) && ok;
        } else if (result != BESA_OK) {
            ok = CHECK(!exists(out) && names_like(g_temp, "faulty") <= 1, "%s: more than an unfinished output", label) && ok;
            ok = CHECK(err.code == result, "%s: %s, but %s", label, besa_result_string(result), besa_result_string(err.code)) && ok;
            ok = CHECK(run_writer(c, out, 3, &done) == BESA_OK, "%s: not resumed: %s", label, err.message) && ok;
            ok = CHECK(done >= done_from[state], "%s: %d blocks were done", label, (int)done) && ok;
        }
        ok = CHECK(compare_directories(out, wanted, NULL, difference) == 0, "%s: %s differs", label, difference) && ok;
        ok = CHECK(names_like(g_temp, "faulty") == 1, "%s: something lies beside the output", label) && ok;
    }
    CHECK(finished, "after %d calls the run has not ended", calls - 1);
    if (getenv("TEST_VERBOSE")) printf("    %d calls\n", calls - 2);
    remove_output(out);
}

static void check_failing_runs(int kind)
{
    besa_checkpoint *c = open_model(source_model(1));
    for (int i = 0; c && i < 2 * FROM_STATES; i++) check_failing_run(c, kind, i / 2, i % 2);
    besa_checkpoint_close(c);
}

static void test_system_calls(void)
{
    check_failing_open(FAULT_ERROR);
    check_failing_runs(FAULT_ERROR);
}

static void test_allocations(void)
{
    check_failing_open(FAULT_MEMORY);
    check_failing_runs(FAULT_MEMORY);
}

/* Too few descriptors, for a new run and for one that was killed while it copied: what is left is gone on from. */
static void test_few_descriptors(void)
{
    const char *out = temp_path("few");
    besa_checkpoint *c = open_model(source_model(1));
    struct rlimit old, low;
    int64_t done;
    int finished = 0, refused = 0;
    if (!c) return;
    getrlimit(RLIMIT_NOFILE, &old);
    low = old;
    for (int killed = 0; killed < 2; killed++, finished = 0)
        for (low.rlim_cur = 1; !finished && low.rlim_cur < 64; low.rlim_cur++) {
            remove_output(out);
            if (killed) begin_copying(c, out);
            setrlimit(RLIMIT_NOFILE, &low);
            besa_result result = run_writer(c, out, 3, &done);
            setrlimit(RLIMIT_NOFILE, &old);
            finished = result == BESA_OK;
            refused += !finished;
            if (!finished) CHECK_ERROR(run_writer(c, out, 3, &done), BESA_OK, NULL);
            CHECK_OUTPUT(out, wanted_output(1));
            CHECK(names_like(g_temp, "few") == 1, "something lies beside the output");
        }
    CHECK(refused > 6, "only %d runs had too few", refused);
    remove_output(out);
    besa_checkpoint_close(c);
}

static void test_short_writes(void)
{
    const char *out = temp_path("short"), *wanted = wanted_output(1);
    besa_checkpoint *c = open_model(source_model(1));
    int64_t done;
    if (!c) return;
    short_writes = 1;
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_OK, NULL);
    short_writes = 0;
    CHECK_OUTPUT(out, wanted);
    besa_checkpoint_close(c);
}

static void test_file_size_limit(void)
{
    const char *out = temp_path("full");
    besa_checkpoint *c = open_model(source_model(0));
    int64_t done;
    int refused = 0;
    struct rlimit old, low;
    if (!c) return;
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    low = old;
    for (rlim_t limit = 0; limit < 8000; limit += 500) {
        low.rlim_cur = limit;
        fflush(stdout);
        setrlimit(RLIMIT_FSIZE, &low);
        err.code = BESA_OK;
        besa_result result = run_writer(c, out, 3, &done);
        setrlimit(RLIMIT_FSIZE, &old);
        if (result != BESA_OK) {
            CHECK_CASE("a limit", result, BESA_ERROR_WRITE, NULL);
            CHECK(!exists(out) && !exists(partial(out, "")), "a limit of %d bytes leaves something", (int)limit);
            refused++;
        }
        remove_output(out);
    }
    CHECK(refused > 0, "no limit was too low");
    besa_checkpoint_close(c);
}

/* In a tmpfs of 8 kB. */
static void test_full_disk(void)
{
    const char *out = temp_path("tmpfs/out");
    besa_checkpoint *c = open_model(source_model(0));
    int64_t done;
    if (!c) return;
    CHECK_ERROR(run_writer(c, out, 3, &done), BESA_ERROR_WRITE, "No space");
    CHECK(!exists(out) && !exists(partial(out, "")), "something is left");
    besa_checkpoint_close(c);
}

/* ---- mutated inputs -------------------------------------------------------------------------- */

/* One input of every kind that fuzz_io.c knows, the kind in front. */
static void fuzz_seeds(unsigned char input[5][512], size_t size[5])
{
    static const char json[] = "0{\"a\":[1,2.5e3,null,true],\"b\":{\"c\":\"\\u00e9\\ud83d\\ude00\"}}";
    static const char header[] = "{\"a\":" TENSOR("U8", "[4]", "[0,4]") ",\"b\":" TENSOR("F16", "[2,1]", "[4,8]") "}";
    static const char config[] =
        "3{\"model_type\":\"qwen2\",\"hidden_size\":8,\"intermediate_size\":12,\"num_attention_heads\":2,"
        "\"num_key_value_heads\":1,\"num_hidden_layers\":3,\"vocab_size\":10,\"use_sliding_window\":true,\"max_window_layers\":1,"
        "\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}}";
    static const char index[] = "4{\"metadata\":{\"total_size\":8},\"weight_map\":{\"a\":\"x.safetensors\","
                                "\"b\":\"x.safetensors\",\"c\":\"y.safetensors\"}}";
    memcpy(input[0], json, size[0] = sizeof json - 1);
    memset(input[1], 0, 512);
    input[1][0] = '1';
    input[1][1] = sizeof header - 1;
    memcpy(input[1] + 9, header, sizeof header - 1);
    size[1] = 9 + sizeof header - 1 + 8;
    input[2][0] = '2';
    size[2] = 1 + npy(input[2] + 1, 1, NPY("'<u2'", "(2, 3)") "\n", header, 12);
    memcpy(input[3], config, size[3] = sizeof config - 1);
    memcpy(input[4], index, size[4] = sizeof index - 1);
}

/* One to four edits of the n bytes in work (600); the new size. */
static size_t fuzz_edit(unsigned char *work, size_t n, uint64_t *turn)
{
    static const char likely[] = "{}[]\",:\\0123456789-.eu'()<\xC3\xFF";
    for (uint64_t edits = 1 + besa__splitmix64(1, (*turn)++) % 4; edits; edits--) {
        uint64_t x = besa__splitmix64(2, (*turn)++), p = 1 + (x >> 8) % (n - 1);
        if (x % 5 == 0) work[p] = (unsigned char)(x >> 40);
        else if (x % 5 == 1) work[p] = (unsigned char)likely[(x >> 40) % (sizeof likely - 1)];
        else if (x % 5 == 2) work[p] ^= (unsigned char)(1u << (x >> 40 & 7));
        else if (x % 5 == 3 && n > 2) memmove(work + p, work + p + 1, --n - p);
        else if (n < 590) memmove(work + p + 1, work + p, n++ - p);
    }
    return n;
}

/* No crash, an error that says something, and each reader takes some and refuses some. */
static void test_fuzz(void)
{
    static const char *const kinds[5] = { "JSON", "safetensors", ".npy", "config", "index" };
    unsigned char input[5][512], work[600];
    size_t size[5];
    uint64_t turn = 0;
    fuzz_seeds(input, size);
    for (int round = 0; round < 20000; round++)
        for (int kind = 0; kind < 5; kind++) {
            memcpy(work, input[kind], size[kind]);
            LLVMFuzzerTestOneInput(work, fuzz_edit(work, size[kind], &turn));
        }
    for (int kind = 0; kind < 5; kind++)
        CHECK(fuzz_taken[kind] && fuzz_refused[kind], "%s: %d inputs were taken, %d refused", kinds[kind], fuzz_taken[kind],
              fuzz_refused[kind]);
}

/* ---- main ------------------------------------------------------------------------------------ */

static void readers(void)
{
    TEST("the reference checkpoints: config and tensors") run(test_reference_checkpoints);
    TEST("the reference checkpoints: what one family has") run(test_reference_families);
    TEST("json: what is malformed is refused") run(test_json_malformed);
    TEST("json: numbers are exact") run(test_json_numbers);
    TEST("json: strings are decoded") run(test_json_strings);
    TEST("json: characters of each length") run(test_json_characters);
    TEST("json: depth is limited") run(test_json_depth);
    TEST("json: 10 MB within 5 s") run(test_json_time);
    TEST("json: memory is in proportion to the text") run(test_json_memory);
    TEST("safetensors and config.json: memory is in proportion to the file") run(test_file_memory);
    TEST("safetensors: headers that are wrong") run(test_headers);
    TEST("safetensors: truncated anywhere") run(test_truncated);
    TEST("safetensors: a header longer than the file") run(test_header_length);
    TEST("safetensors: something else in its place") run(test_no_model);
    TEST("index: what is wrong is refused") run(test_index);
    TEST("index: tensors of two shards") run(test_shards);
    TEST("index: a snapshot of links") run(test_snapshot);
    TEST("config: one setting changed") run(test_config);
    TEST("config: ranges") run(test_config_ranges);
    TEST("config: what public models have") run(test_config_public);
    TEST("config: sliding windows") run(test_windows);
    TEST("config: settings that are not known") run(test_unknown_settings);
    TEST("config: models that are known and not supported") run(test_known_models);
    TEST("config: models of several parts") run(test_wrappers);
    TEST("config: families") run(test_families);
    TEST("config: heads by default") run(test_family_defaults);
    TEST("config: a weight of another type than the others") run(test_mixed_types);
    TEST("config: the layers by number") run(test_layer_tensors);
    TEST("tokens: headers of .npy") run(test_npy);
    TEST("tokens: .npy truncated anywhere") run(test_npy_truncated);
    TEST("tokens: raw files") run(test_raw_tokens);
    TEST("tokens: windows of a stream") run(test_sample_stream);
    TEST("tokens: splitmix64 is the published one") run(test_splitmix);
    TEST("tokens: sequences of a 2-D file") run(test_sample_rows);
    TEST("tokens: raw files by their contents") run(test_token_widths);
    TEST("tokens: .npy of 16 bits and the vocabulary") run(test_npy_widths);
}

static void writer(void)
{
    TEST("a head beside the tied embedding: read") run(test_tied_head);
    TEST("a head beside the tied embedding: written") run(test_written_head);
    TEST("adapters are noted") run(test_adapters);
    TEST("notes are lines") run(test_notes);
    TEST("files: what becomes part of an output") run(test_left_out);
    TEST("writer: nothing under the output's name before its end") run_both(test_writer_appears);
    TEST("writer: a note of every file that is left out") run_both(test_writer_notes);
    TEST("writer: a second one is locked out") run_both(test_writer_lock);
    TEST("writer: takes weights of the next block only") run_both(test_writer_order);
    TEST("writer: reads back what it wrote") run_both(test_writer_reads);
    TEST("writer: an output has a checkpoint's files, none of them a link") run_both(test_writer_files);
    TEST("writer: an output has the source's bytes but for what was written") run_both(test_writer_bytes);
    TEST("writer: places where no output can be") run_both(test_writer_places);
    TEST("writer: standard input is closed") run_both(test_writer_descriptor_0);
    TEST("writer: none of its files is a standard descriptor") run_both(test_writer_standard);
    TEST("writer: what is used is what was copied") run_both(test_writer_copies);
    TEST("writer: somebody else's .partial") run_both(test_writer_foreign);
    TEST("writer: stopped after each block, resumed, the same bytes") run_both(test_writer_stopped);
    TEST("writer: names what another run has otherwise") run_both(test_writer_other_run);
    TEST("writer: a journal torn at every byte") run_both(test_writer_torn);
    TEST("writer: a bit of the journal flipped") run_both(test_writer_flipped);
    TEST("writer: damaged files are made good") run_both(test_writer_damage);
    TEST("writer: abandoned with and without a block") run_both(test_writer_abandoned);
    TEST("writer: replaces nothing that has come to exist") run_both(test_writer_replaces_nothing);
    TEST("complete: what is not pruned is made good") run_both(test_ready_damage);
    TEST("complete: pruned weights are read back") run_both(test_ready_weights);
    TEST("complete: messages") run_both(test_ready_messages);
    TEST("complete: locked as any other") run_both(test_ready_lock);
    TEST("complete: appears while another run begins") run_both(test_ready_appears);
    TEST("writer: the directory is another by now") run_both(test_writer_moved);
    TEST("writer: locked by another machine") run_both(test_journal_lock);
}

static void accidents(void)
{
    TEST("permissions are the source's") run(test_permissions);
    TEST("source files that change during a run") run(test_source_changes);
    TEST("a header that changes after it was read") run(test_header_changes);
    TEST("killed a call later each time") run(test_kill);
    TEST("killed at each system call") run(test_kill_points);
    if (access("/proc/self/fd", R_OK)) test_skip("synced before it is said", "no /proc, which has the files' names");
    else TEST("synced before it is said") run_both(test_sync_order), test_sync_rates();
    TEST("a file system that does not sync, or cannot") run(test_no_sync);
    TEST("file systems without fallocate") run(test_no_allocation);
    TEST("places: no regular file") run(test_places_kinds);
    TEST("places: a file with a second name") run(test_places_links);
    TEST("places: discarded beside a foreign file") run(test_places_discarded);
    TEST("places: a failed start beside a foreign file") run(test_places_failed_start);
    TEST("places: a failed start that cannot delete") run(test_places_failed_discard);
    TEST("places: a foreign file is noted") run(test_places_noted);
    TEST("frees: checkpoints") run(test_frees_checkpoints);
    TEST("frees: tokens") run(test_frees_tokens);
    TEST("each system call fails") run(test_system_calls);
    TEST("each allocation fails") run(test_allocations);
    TEST("too few descriptors") run(test_few_descriptors);
    TEST("short reads, short writes and EINTR") run(test_short_writes);
    TEST("a limit of file sizes") run(test_file_size_limit);
}

static void full_disk(void)
{
    mkdir(temp_path("tmpfs"), 0777);
    if (mount("tmpfs", temp_path("tmpfs"), "tmpfs", 0, "size=8k")) test_skip("a full disk", "cannot mount a tmpfs");
    else {
        TEST("a full disk") run(test_full_disk);
        umount(temp_path("tmpfs"));
    }
}

int main(int argc, char **argv)
{
    if (argc < 3) return printf("usage: test_io CHECKPOINTS SCRATCH [part of a test's name]\n"), 2;
    g_checkpoints = argv[1];
    test.only = argc > 3 ? argv[3] : NULL;
    setenv("TMPDIR", argv[2], 1);
    temp_create();
    readers();
    writer();
    accidents();
    full_disk();
    TEST("mutated inputs of every reader") run(test_fuzz);
    return test_finish();
}
