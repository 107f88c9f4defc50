/* test.h - checks, counts and reference arrays for the test programs.
 *
 *     TEST("name") { CHECK(x == 1, "x is %d", x); }
 *     return test_finish();
 *
 * A test prints "PASS name" or, after a line for each failed check, "FAIL name"; tests/run.sh adds these lines up. */
#ifndef TEST_H
#define TEST_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* 1 under AddressSanitizer: the longest tests take fewer turns then. */
#ifndef __has_feature
#define __has_feature(feature) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
enum { TEST_SANITIZED = 1 };
#else
enum { TEST_SANITIZED = 0 };
#endif

/* For a test's own sums, which would be most of its time there. */
#if defined(__GNUC__)
#define TEST_UNWATCHED __attribute__((no_sanitize("address", "undefined")))
#else
#define TEST_UNWATCHED
#endif

static struct {
    const char *name;                           /* of the running test, NULL between tests */
    const char *only;                           /* run only tests whose name contains this */
    int checks_failed, passed, failed, skipped;
    clock_t start;                              /* processor time */
    void *taken;                                /* list of take()'s memory */
} test;

static void test_end(void)
{
    if (!test.name) return;
    if (getenv("TEST_VERBOSE")) printf("    %.2f s of processor time\n", (double)(clock() - test.start) / CLOCKS_PER_SEC);
    if (test.checks_failed) test.failed++;
    else test.passed++;
    printf("%s %s\n", test.checks_failed ? "FAIL" : "PASS", test.name);
    fflush(stdout);
    test.name = NULL;
}

__attribute__((unused)) static int test_begin(const char *name)
{
    test_end();
    if (test.only && !strstr(name, test.only)) return 0;
    test.name = name;
    test.checks_failed = 0;
    test.start = clock();
    return 1;
}

/* The body that follows runs unless the command line named other tests. */
#define TEST(name) if (test_begin(name))

__attribute__((format(printf, 4, 5), unused))
static int test_check(int ok, const char *file, int line, const char *format, ...)
{
    va_list args;
    if (ok) return 1;
    if (++test.checks_failed > 12) return 0;    /* the first few tell enough */
    printf("    %s:%d: ", strrchr(file, '/') ? strrchr(file, '/') + 1 : file, line);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
    return 0;
}

/* CHECK(condition, printf arguments); its value is the condition. */
#define CHECK(condition, ...) test_check(!!(condition), __FILE__, __LINE__, __VA_ARGS__)

/* A call of the library that must succeed. */
#define CHECK_OK(call, error)                                                                      \
    do {                                                                                           \
        besa_result check_result = (call);                                                         \
        CHECK(check_result == BESA_OK, "%s: %s (%s)", #call, besa_result_string(check_result), (error).message); \
    } while (0)

__attribute__((unused)) static void test_skip(const char *name, const char *why)
{
    test_end();
    if (test.only && !strstr(name, test.only)) return;
    test.skipped++;
    printf("SKIP %s: %s\n", name, why);
}

/* Zeroed memory, 64-byte aligned, that lives until test_finish. */
static void *take(size_t bytes)
{
    void **p = (void **)calloc(1, bytes + 128);
    if (!p) exit(1);
    *p = test.taken;
    test.taken = p;
    return (void *)(((uintptr_t)p + sizeof *p + 63) & ~(uintptr_t)63);
}

__attribute__((unused)) static float *take_floats(int64_t n) { return (float *)take((size_t)n * sizeof(float)); }

/* Ends the last test and frees what was taken; main's value. */
__attribute__((unused)) static int test_finish(void)
{
    test_end();
    while (test.taken) {
        void **p = (void **)test.taken;
        test.taken = *p;
        free(p);
    }
    return test.failed != 0;
}

/* ---- .npy ------------------------------------------------------------------------------------ */

typedef struct array {
    double *v;                                  /* (count), whatever the file's type */
    float *f;                                   /* the same rounded to float */
    int64_t count, shape[4];
    int ndim;
} array;

/* Read directory/name.npy (f4, f8, u1, i4, i8; C order); v is NULL where there is no such file. Ends the program on
 * anything else unexpected: the arrays are part of the repository. */
static array npy_read(const char *directory, const char *name)
{
    array a;
    char path[1024], header[4096], *p;
    unsigned char start[10];
    size_t length, size;
    char kind;
    FILE *file;
    memset(&a, 0, sizeof a);
    snprintf(path, sizeof path, "%s/%s.npy", directory, name);
    file = fopen(path, "rb");
    if (!file) return a;
    if (fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY\x01", 7)) goto bad;
    length = (size_t)start[8] | (size_t)start[9] << 8;
    if (length >= sizeof header || fread(header, 1, length, file) != length) goto bad;
    header[length] = 0;
    if (!strstr(header, "'fortran_order': False") || !(p = strstr(header, "'descr': '"))) goto bad;
    kind = p[11];
    size = (size_t)(p[12] - '0');
    if (!(p = strstr(header, "'shape': ("))) goto bad;
    for (a.count = 1, p += 10; *p >= '0' && *p <= '9' && a.ndim < 4; p += *p == ',', p += *p == ' ')
        a.count *= a.shape[a.ndim++] = strtoll(p, &p, 10);
    a.v = (double *)take((size_t)a.count * sizeof *a.v);
    a.f = take_floats(a.count);
    for (int64_t i = 0; i < a.count; i++) {
        union { float f; double d; unsigned char u1; int32_t i4; int64_t i8; } e;
        if (size > 8 || fread(&e, 1, size, file) != size) goto bad;
        a.v[i] = kind == 'f' ? (size == 4 ? (double)e.f : e.d) : size == 1 ? e.u1 : size == 4 ? e.i4 : (double)e.i8;
        a.f[i] = (float)a.v[i];
    }
    fclose(file);
    return a;
bad:
    printf("FAIL %s is not an array that these tests can read\n", path);
    exit(1);
}

/* npy_read with the shape that it must have; further sizes are 0. */
__attribute__((unused))
static array npy_load(const char *directory, const char *name, int64_t n0, int64_t n1, int64_t n2)
{
    array a = npy_read(directory, name);
    int64_t want[3];
    int same = a.v != NULL;
    want[0] = n0, want[1] = n1, want[2] = n2;
    for (int i = 0; i < 3; i++) same = same && (i < a.ndim ? a.shape[i] : 0) == want[i];
    if (!same) {
        printf("FAIL %s/%s.npy is missing or has an unexpected shape\n", directory, name);
        exit(1);
    }
    return a;
}

/* Largest |got - want| as a fraction of the largest |want|; NaN counts as infinite. */
__attribute__((unused)) static double relative_error(const float *got, const double *want, int64_t n)
{
    double worst = 0, scale = 0;
    for (int64_t i = 0; i < n; i++) {
        double difference = fabs((double)got[i] - want[i]);
        if (!(difference <= worst)) worst = isnan(difference) ? INFINITY : difference;
        if (fabs(want[i]) > scale) scale = fabs(want[i]);
    }
    return worst / (scale > 0 ? scale : 1);
}

__attribute__((unused))
static void check_close_at(const char *file, int line, const char *what, const float *got, const double *want,
                           int64_t n, double tolerance)
{
    double error = relative_error(got, want, n);
    if (getenv("TEST_VERBOSE")) printf("    %-28s error %.2e of %.0e\n", what, error, tolerance);
    test_check(error <= tolerance, file, line, "%s: error %.3g, allowed %.3g", what, error, tolerance);
}

/* n floats against doubles, as a fraction of the largest; TEST_VERBOSE=1 prints what was measured. */
#define CHECK_CLOSE(what, got, want, n, tolerance)                                                 \
    check_close_at(__FILE__, __LINE__, what, got, want, n, tolerance)

/* What follows a key in a small JSON file, until the next call; the file must have it. */
static const char *json_text(const char *directory, const char *file, const char *key)
{
    static char text[8192];
    char path[1024], quoted[64], *p;
    size_t length = 0;
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", directory, file);
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    if ((f = fopen(path, "rb")) != NULL) {
        length = fread(text, 1, sizeof text - 1, f);
        fclose(f);
    }
    text[length] = 0;
    if (!(p = strstr(text, quoted))) {
        printf("FAIL %s has no \"%s\"\n", path, key);
        exit(1);
    }
    return p + strlen(quoted);
}

/* A number out of a small JSON file. */
__attribute__((unused)) static double json_number(const char *directory, const char *file, const char *key)
{
    return strtod(json_text(directory, file, key), NULL);
}

/* The first n numbers of a list out of a small JSON file. */
__attribute__((unused))
static void json_numbers(const char *directory, const char *file, const char *key, double *out, int n)
{
    const char *p = json_text(directory, file, key);
    int is_list = strncmp(p, " [", 2) == 0;
    p += is_list ? 2 : 0;
    for (int i = 0; i < n; i++) {
        char *end = NULL;
        if (is_list) out[i] = strtod(p, &end);
        if (!is_list || end == p) {
            printf("FAIL %s/%s has no list \"%s\" of %d numbers\n", directory, file, key, n);
            exit(1);
        }
        p = end + (*end == ',');
    }
}

#endif
