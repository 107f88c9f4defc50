/* fixture.h - directories and checkpoints for tests that run the whole pipeline. Include after besa.h and test.h. */
#ifndef FIXTURE_H
#define FIXTURE_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

/* ---- files and directories ------------------------------------------------------------------- */

static char g_temp[256];                        /* this program's own temporary directory */

/* g_temp/name, kept until test_finish. */
__attribute__((format(printf, 1, 2))) static const char *temp_path(const char *format, ...)
{
    char *path = (char *)take(512);
    va_list args;
    int n = snprintf(path, 512, "%s/", g_temp);
    va_start(args, format);
    vsnprintf(path + n, 512 - (size_t)n, format, args);
    va_end(args);
    return path;
}

__attribute__((unused)) static int exists(const char *path) { struct stat s; return lstat(path, &s) == 0; }

static void remove_tree(const char *path)
{
    struct stat s;
    struct dirent *e;
    DIR *d;
    if (lstat(path, &s)) return;
    if (S_ISDIR(s.st_mode) && (d = opendir(path)) != NULL) {
        while ((e = readdir(d)) != NULL) {
            char child[1024];
            if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
            snprintf(child, sizeof child, "%s/%s", path, e->d_name);
            remove_tree(child);
        }
        closedir(d);
        rmdir(path);
    } else unlink(path);
}

static void temp_remove(void) { remove_tree(g_temp); }

/* Make g_temp; it goes when the program ends. */
static void temp_create(void)
{
    const char *base = getenv("TMPDIR");
    snprintf(g_temp, sizeof g_temp, "%s/besa-test-XXXXXX", base && *base ? base : "/tmp");
    if (!mkdtemp(g_temp)) exit(1);
    atexit(temp_remove);
}

/* The whole file, or NULL; free() it. */
static unsigned char *read_bytes(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    unsigned char *p = NULL;
    struct stat s;
    *size = 0;
    if (f && fstat(fileno(f), &s) == 0 && S_ISREG(s.st_mode) && (p = (unsigned char *)malloc((size_t)s.st_size + 1)) != NULL) {
        *size = fread(p, 1, (size_t)s.st_size, f);
        p[*size] = 0;
    }
    if (f) fclose(f);
    return p;
}

/* How many files this process has open. */
__attribute__((unused)) static int open_files(void)
{
    DIR *d = opendir("/proc/self/fd");
    int n = 0;
    while (d && readdir(d)) n++;
    if (d) closedir(d);
    return n;
}

static void write_bytes(const char *path, const void *bytes, size_t size)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, size, f) != size || fclose(f)) {
        printf("FAIL cannot write %s\n", path);
        exit(1);
    }
}

__attribute__((unused)) static int same_file(const char *a, const char *b)
{
    size_t na, nb;
    unsigned char *pa = read_bytes(a, &na), *pb = read_bytes(b, &nb);
    int same = pa && pb && na == nb && memcmp(pa, pb, na) == 0;
    free(pa);
    free(pb);
    return same;
}

/* 0 where both directories hold the same names with the same bytes, apart from names that contain `except`;
 * else the number of differences, the first of them in `first`. */
__attribute__((unused))
static int compare_directories(const char *a, const char *b, const char *except, char first[256])
{
    int differences = 0;
    snprintf(first, 256, "nothing");
    for (int turn = 0; turn < 2; turn++) {
        DIR *d = opendir(turn ? b : a);
        struct dirent *e;
        if (!d) return snprintf(first, 256, "%.200s does not open", turn ? b : a), 1;
        while ((e = readdir(d)) != NULL) {
            char pa[1024], pb[1024];
            if (e->d_name[0] == '.' || (except && strstr(e->d_name, except))) continue;
            snprintf(pa, sizeof pa, "%s/%s", a, e->d_name);
            snprintf(pb, sizeof pb, "%s/%s", b, e->d_name);
            if ((turn && !exists(pa)) || (!turn && !same_file(pa, pb)))
                if (!differences++) snprintf(first, 256, "%.250s", e->d_name);
        }
        closedir(d);
    }
    return differences;
}

/* ---- checkpoints ----------------------------------------------------------------------------- */

/* A checkpoint being written: a header, then the tensors in the order of fixture_tensor's calls. */
typedef struct fixture {
    char *header;
    size_t header_size, header_room, data_size;
    FILE *data;
    char directory[512];
} fixture;


static void fixture_begin(fixture *f, const char *directory, const char *config)
{
    char path[600];
    memset(f, 0, sizeof *f);
    snprintf(f->directory, sizeof f->directory, "%s", directory);
    mkdir(directory, 0777);
    snprintf(path, sizeof path, "%s/config.json", directory);
    write_bytes(path, config, strlen(config));
    snprintf(path, sizeof path, "%s/data.tmp", directory);
    f->data = fopen(path, "wb");
    f->header_room = 1 << 20;
    f->header = (char *)calloc(1, f->header_room);
    if (!f->data || !f->header) exit(1);
    f->header_size = (size_t)sprintf(f->header, "{\"__metadata__\":{\"format\":\"pt\"}");
}

static void fixture_tensor(fixture *f, const char *name, besa_dtype dtype, const float *v, int64_t rows, int64_t columns)
{
    static const char *const dtype_name[] = { "F32", "F16", "BF16" };
    size_t n = (size_t)(rows * (columns ? columns : 1)), bytes = n * besa_dtype_size(dtype);
    char shape[64];
    if (columns) snprintf(shape, sizeof shape, "%d,%d", (int)rows, (int)columns);
    else snprintf(shape, sizeof shape, "%d", (int)rows);
    f->header_size += (size_t)sprintf(f->header + f->header_size,
                                      ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", name,
                                      dtype_name[dtype], shape, f->data_size, f->data_size + bytes);
    f->data_size += bytes;
    for (size_t i = 0; i < n; i++) {
        uint16_t h = dtype == BESA_F16 ? besa__f32_to_f16(v[i]) : besa__f32_to_bf16(v[i]);
        if (dtype == BESA_F32) fwrite(&v[i], 4, 1, f->data);
        else fwrite(&h, 2, 1, f->data);
    }
}

static void fixture_end(fixture *f)
{
    char path[600];
    unsigned char *data, size[8];
    size_t n;
    FILE *out;
    f->header[f->header_size++] = '}';
    while (f->header_size % 8) f->header[f->header_size++] = ' ';
    fclose(f->data);
    snprintf(path, sizeof path, "%s/data.tmp", f->directory);
    data = read_bytes(path, &n);
    unlink(path);
    snprintf(path, sizeof path, "%s/model.safetensors", f->directory);
    for (int i = 0; i < 8; i++) size[i] = (unsigned char)((uint64_t)f->header_size >> 8 * i);
    out = fopen(path, "wb");
    if (!out || !data) exit(1);
    fwrite(size, 1, 8, out);
    fwrite(f->header, 1, f->header_size, out);
    fwrite(data, 1, n, out);
    fclose(out);
    free(data);
    free(f->header);
}

/* A reproducible number in [-1, 1). */
static float fixture_random(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (float)((double)((z ^ (z >> 31)) >> 11) / 4503599627370496.0 - 1);
}

/* A Llama of random weights. */
__attribute__((unused))
static void fixture_random_llama(const char *directory, int blocks, int hidden, int intermediate, int heads, int kv_heads,
                                 int vocab, besa_dtype dtype)
{
    static const char *const dtype_name[] = { "float32", "float16", "bfloat16" };
    static const char *const part[] = { "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj" };
    int kv = hidden / heads * kv_heads, widest = vocab > intermediate ? vocab : intermediate;
    int largest = (widest > hidden ? widest : hidden) * hidden;
    int rows[7], columns[7];
    float *v = (float *)malloc((size_t)largest * sizeof *v);
    uint64_t state = 1;
    char text[1024];
    fixture f;
    rows[0] = hidden, rows[1] = rows[2] = kv, rows[3] = hidden, rows[4] = rows[5] = intermediate, rows[6] = hidden;
    for (int l = 0; l < 7; l++) columns[l] = l == 6 ? intermediate : hidden;
    snprintf(text, sizeof text, "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_act\":\"silu\","
             "\"hidden_size\":%d,\"intermediate_size\":%d,\"num_hidden_layers\":%d,\"num_attention_heads\":%d,"
             "\"num_key_value_heads\":%d,\"vocab_size\":%d,\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,"
             "\"tie_word_embeddings\":true,\"torch_dtype\":\"%s\",\"max_position_embeddings\":2048}", hidden, intermediate,
             blocks, heads, kv_heads, vocab, dtype_name[dtype]);
    fixture_begin(&f, directory, text);
    for (int i = 0; i < vocab * hidden; i++) v[i] = fixture_random(&state);
    fixture_tensor(&f, "model.embed_tokens.weight", dtype, v, vocab, hidden);
    for (int b = 0; b < blocks; b++) {
        for (int l = 0; l < 7; l++) {
            float scale = 1.5f / sqrtf((float)columns[l]);
            for (int i = 0; i < rows[l] * columns[l]; i++) v[i] = scale * fixture_random(&state);
            snprintf(text, sizeof text, "model.layers.%d.%s.weight", b, part[l]);
            fixture_tensor(&f, text, dtype, v, rows[l], columns[l]);
        }
        for (int i = 0; i < hidden; i++) v[i] = 1;
        snprintf(text, sizeof text, "model.layers.%d.input_layernorm.weight", b);
        fixture_tensor(&f, text, dtype, v, hidden, 0);
        snprintf(text, sizeof text, "model.layers.%d.post_attention_layernorm.weight", b);
        fixture_tensor(&f, text, dtype, v, hidden, 0);
    }
    for (int i = 0; i < hidden; i++) v[i] = 1;
    fixture_tensor(&f, "model.norm.weight", dtype, v, hidden, 0);
    fixture_end(&f);
    free(v);
}

/* Changes one tensor on its way into a variant of a checkpoint; NULL: none. */
typedef void (*fixture_change)(const char *name, float *v, int64_t rows, int64_t columns);

/* Copy a checkpoint of floats as another element type, tensors changed, or (blocks above 0) only its first blocks. */
static void fixture_copy(const char *directory, const besa_checkpoint *source, const char *source_directory, besa_dtype dtype,
                         fixture_change change, int blocks)
{
    static const char *const dtype_name[] = { "float32", "float16", "bfloat16" };
    char path[600], *config, *p;
    size_t n;
    fixture f;
    snprintf(path, sizeof path, "%s/config.json", source_directory);
    config = (char *)read_bytes(path, &n);
    if (!config) exit(1);
    config = (char *)realloc(config, n + 64);
    p = strstr(config, "float32");
    if (p) {                                    /* "torch_dtype": the tail moves to make room */
        memmove(p + strlen(dtype_name[dtype]), p + 7, strlen(p + 7) + 1);
        memcpy(p, dtype_name[dtype], strlen(dtype_name[dtype]));
    }
    p = blocks ? strstr(config, "\"num_hidden_layers\": ") : NULL;
    if (p) p[strlen("\"num_hidden_layers\": ")] = (char)('0' + blocks);
    fixture_begin(&f, directory, config);
    free(config);
    for (int64_t i = 0; i < besa_checkpoint_tensor_count(source); i++) {
        const besa_tensor *t = besa_checkpoint_tensor(source, i);
        int block = -1;
        if (blocks && sscanf(t->name, "model.layers.%d.", &block) == 1 && block >= blocks) continue;
        float *v = (float *)malloc(t->bytes);
        memcpy(v, t->data, t->bytes);
        if (change) change(t->name, v, t->shape[0], t->ndim > 1 ? t->shape[1] : 1);
        fixture_tensor(&f, t->name, dtype, v, t->shape[0], t->ndim > 1 ? t->shape[1] : 0);
        free(v);
    }
    fixture_end(&f);
}

__attribute__((unused))
static void fixture_variant(const char *directory, const besa_checkpoint *source, const char *source_directory,
                            besa_dtype dtype, fixture_change change)
{
    fixture_copy(directory, source, source_directory, dtype, change, 0);
}

/* The first blocks of a checkpoint of floats: a model whose runs are shorter. Returns the directory. */
__attribute__((unused)) static const char *fixture_first_blocks(const char *directory, const char *source_directory, int blocks)
{
    besa_checkpoint *source = NULL;
    besa_error error;
    if (besa_checkpoint_open(&source, source_directory, &error) != BESA_OK) {
        printf("FAIL %s\n", error.message);
        exit(1);
    }
    fixture_copy(directory, source, source_directory, BESA_F32, NULL, blocks);
    besa_checkpoint_close(source);
    return directory;
}

#endif
