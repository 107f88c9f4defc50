/* test_memory - the memory that a run takes does not grow with depth, and is what besa_plan says.
 *
 *     test_memory [part of a test's name]
 *     test_memory --child plan|prune SOURCE OUTPUT METHOD  in a process of its own: its peak is what is measured */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <sys/resource.h>
#include <sys/wait.h>

#define BESA_IMPLEMENTATION
#include "besa.h"
#include "test.h"
#include "fixture.h"

enum { NSAMPLES = 6, SEQLEN = 256, VOCAB = 256 };

/* Open, plan and, where asked, prune. */
static int child(char **argv)
{
    besa_checkpoint *checkpoint = NULL;
    besa_backend be;
    besa_cpu_options cpu;
    besa_calibration c;
    besa_prune_options o;
    besa_plan_result plan;
    besa_error error;
    static int32_t ids[NSAMPLES * SEQLEN];
    int failed;
    memset(&c, 0, sizeof c);
    memset(&o, 0, sizeof o);
    memset(&cpu, 0, sizeof cpu);
    for (int i = 0; i < NSAMPLES * SEQLEN; i++) ids[i] = (i * 31 + i / 7) % VOCAB;
    cpu.threads = 2;
    c.ids = ids, c.nsamples = NSAMPLES, c.seqlen = SEQLEN;
    o.rates.target = 0.5;
    o.method = (besa_method)atoi(argv[3]);
    failed = besa_checkpoint_open(&checkpoint, argv[1], &error) != BESA_OK ||
             besa_cpu_backend(&be, &cpu, &error) != BESA_OK || besa_plan(checkpoint, &be, &c, &o, &plan, &error) != BESA_OK ||
             (!strcmp(argv[0], "prune") && besa_prune(checkpoint, argv[2], &be, &c, &o, NULL, &error) != BESA_OK);
    if (failed) return printf("    %s\n", error.message), 1;
    printf("%.0f %.0f\n", (double)(plan.device_bytes + plan.host_bytes), (double)plan.mapped_block_bytes);
    be.destroy(&be);
    besa_checkpoint_close(checkpoint);
    return 0;
}

/* Peak resident bytes of a child; what it printed goes to plan. */
static double peak_of(const char *what, const char *source, besa_method method, double plan[2])
{
    char number[16], text[256] = "";
    int status = 0, end[2];
    struct rusage usage;
    pid_t pid;
    ssize_t n;
    snprintf(number, sizeof number, "%d", (int)method);
    if (pipe(end)) return 0;
    fflush(stdout);
    if ((pid = fork()) == 0) {
        dup2(end[1], 1);
        execl("/proc/self/exe", "test_memory", "--child", what, source, temp_path("out"), number, (char *)NULL);
        _exit(127);
    }
    close(end[1]);
    n = read(end[0], text, sizeof text - 1);
    text[n > 0 ? n : 0] = 0;
    close(end[0]);
    wait4(pid, &status, 0, &usage);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0 && sscanf(text, "%lf %lf", &plan[0], &plan[1]) == 2, "child: %s", text);
    remove_tree(temp_path("out"));
    return (double)usage.ru_maxrss * 1024;
}

/* The baseline is what a process takes that opens the checkpoint and plans, but prunes nothing: the program, libc,
 * the thread runtime, the file's header. */
__attribute__((unused)) static void test_depth(besa_method method)
{
    static const int blocks[] = { 4, 32 };
    double peak[2], plan[2][2], baseline;
    for (int i = 0; i < 2; i++) {
        double unused[2];
        const char *model = temp_path("blocks%d", blocks[i]);
        if (!exists(model)) fixture_random_llama(model, blocks[i], 256, 704, 8, 4, VOCAB, BESA_BF16);
        baseline = peak_of("plan", model, method, unused);
        peak[i] = peak_of("prune", model, method, plan[i]);
        printf("    %2d blocks: peak %.1f MB; plan %.1f, mapped block %.1f, baseline %.1f\n", blocks[i], peak[i] / 1e6,
               plan[i][0] / 1e6, plan[i][1] / 1e6, baseline / 1e6);
        CHECK(peak[i] <= 1.1 * (plan[i][0] + plan[i][1] + baseline), "%d blocks: %.1f MB at the peak", blocks[i], peak[i] / 1e6);
        CHECK(peak[i] >= 0.5 * plan[i][0], "%d blocks: %.1f MB at the peak is less than was planned", blocks[i], peak[i] / 1e6);
    }
    CHECK(plan[0][0] == plan[1][0], "the plan grows with depth: %.0f and %.0f", plan[0][0], plan[1][0]);
    CHECK(fabs(peak[1] / peak[0] - 1) < 0.05, "%.1f MB with 4 blocks, %.1f with 32", peak[0] / 1e6, peak[1] / 1e6);
}

/* Give a model whose first tensor is its embedding (rows, columns) in bfloat16 a head that is a copy of it. */
__attribute__((unused)) static void copy_head(const char *model, int rows, int columns)
{
    char path[600];
    size_t size, length, bytes = (size_t)rows * (size_t)columns * 2;
    snprintf(path, sizeof path, "%s/model.safetensors", model);
    unsigned char *old = read_bytes(path, &size);
    memcpy(&length, old, 8);
    size_t data = size - 8 - length;
    unsigned char *file = (unsigned char *)malloc(size + 256 + bytes), *at = file + 8 + length;
    memcpy(file, old, 8 + length);
    while (at[-1] == ' ') at--;
    at += sprintf((char *)at - 1, ",\"lm_head.weight\":{\"dtype\":\"BF16\",\"shape\":[%d,%d],\"data_offsets\":[%zu,%zu]}}", rows,
                  columns, data, data + bytes) - 1;
    while ((at - file) % 8) *at++ = ' ';
    length = (size_t)(at - file) - 8;
    memcpy(file, &length, 8);
    memcpy(at, old + size - data, data);
    memcpy(at + data, old + size - data, bytes);
    write_bytes(path, file, (size_t)(at - file) + data + bytes);
    free(file);
    free(old);
}

/* Embedding and head are read a part at a time: to compare them where the config ties them, for their rows, to look for what
 * is not finite, to copy them. */
__attribute__((unused)) static void test_large_embedding(void)
{
    enum { ROWS = 131072, COLUMNS = 256 };
    static const char *const what[] = { "plan", "prune" };
    const double table = 2.0 * ROWS * COLUMNS, part = 16 << 20;
    const char *small = temp_path("small"), *large = temp_path("large");
    double plan[2], unused[2];
    fixture_random_llama(small, 1, COLUMNS, 704, 8, 4, VOCAB, BESA_BF16);
    fixture_random_llama(large, 1, COLUMNS, 704, 8, 4, ROWS, BESA_BF16);
    copy_head(large, ROWS, COLUMNS);
    for (int i = 0; i < 2; i++) {
        double usual = peak_of(what[i], small, BESA_METHOD_WANDA, unused);
        double peak = peak_of(what[i], large, BESA_METHOD_WANDA, plan);
        printf("    %s: peak %.1f MB, %.1f with a small embedding\n", what[i], peak / 1e6, usual / 1e6);
        CHECK(peak <= usual + (i ? 0 : part) + table / 8, "%s: %.1f MB at the peak, %.1f with a small embedding", what[i], peak / 1e6,
              usual / 1e6);
        CHECK(peak <= usual + plan[1], "%s: %.1f MB of mapped pages in the plan", what[i], plan[1] / 1e6);
    }
    CHECK(plan[1] > 0 && plan[1] <= table, "%.1f MB of mapped pages in the plan", plan[1] / 1e6);
}

int main(int argc, char **argv)
{
    if (argc == 6 && !strcmp(argv[1], "--child")) return child(argv + 2);
    test.only = argc > 1 ? argv[1] : NULL;
    temp_create();
#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifdef SANITIZED
    test_skip("memory", "a sanitizer's own memory would be measured");
#else
    if (access("/proc/self/exe", X_OK)) {
        test_skip("memory", "no /proc, by which this program starts itself");
        return test_finish();
    }
    TEST("memory of besa, 4 and 32 blocks") test_depth(BESA_METHOD_BESA);
    TEST("memory of sparsegpt, 4 and 32 blocks") test_depth(BESA_METHOD_SPARSEGPT);
    TEST("memory of a large embedding, and of a head that is its copy") test_large_embedding();
#endif
    return test_finish();
}
