/* test_portable - what the library takes for granted of compiler, C library and machine. Built by the default tests, and
 * by portable.mk in every other way that besa.h can be built in: 32 bits, other libcs, strict -std=c99, fast math.
 *
 *     test_portable [STORIES [part of a test's name]]        examples/stories260K, with BESA_NO_STDIO unused
 *
 * A locale whose decimal point is a comma is put on by replacing the C library's functions: few machines have one. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64                    /* besa.h is not the first header here */
#endif
#include <limits.h>
#include <locale.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#include "test.h"

static const char *decimal_point = ".";         /* as the locale of the test has it */

/* vsnprintf, with every point between digits replaced */
__attribute__((format(printf, 3, 0)))
static int local_vsnprintf(char *text, size_t size, const char *format, va_list args)
{
    char plain[4096], *to = text, *end = text + (size ? size - 1 : 0);
    int n = vsnprintf(plain, sizeof plain, format, args), grown = 0;
    for (int i = 0; i < n && i < (int)sizeof plain - 1; i++) {
        int is_point = plain[i] == '.' && i && strchr("0123456789", plain[i - 1]);
        const char *from = is_point ? decimal_point : NULL;
        if (!from && to < end) *to++ = plain[i];
        for (int j = 0; from && from[j]; j++, grown += j > 1)
            if (to < end) *to++ = from[j];
    }
    if (size) *to = 0;
    return n + grown;
}

__attribute__((format(printf, 3, 4))) static int local_snprintf(char *text, size_t size, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = local_vsnprintf(text, size, format, args);
    va_end(args);
    return n;
}

/* strtod, which knows no other point than the locale's */
__attribute__((unused)) static double local_strtod(const char *text, char **end)
{
    char plain[4096];
    size_t n = strlen(text), stop = strcspn(text, ".");
    if (*decimal_point == '.' || stop == n) return strtod(text, end);
    snprintf(plain, sizeof plain, "%.*s", (int)stop, text);
    double value = strtod(plain, NULL);
    if (end) *end = (char *)(uintptr_t)(text + stop);
    return value;
}

#define vsnprintf local_vsnprintf
#define snprintf local_snprintf
#define strtod local_strtod
#define BESA_API static inline /* what is not called is not compiled */
#define BESA_IMPLEMENTATION
#include "besa.h"
#undef vsnprintf
#undef snprintf
#undef strtod

/* ---- sizes --------------------------------------------------------------------------------- */

/* Sizes that are right, whatever size_t is: `want` as long as it can be addressed, SIZE_MAX beyond. */
static int is_size(size_t got, double want)
{
    return want < (double)SIZE_MAX ? fabs((double)got - want) <= want / 1e6 + 65536 : got == SIZE_MAX;
}

static void test_arithmetic_of_sizes(void)
{
    besa__arena arena = {NULL, 0};
    volatile uint64_t beyond = (uint64_t)SIZE_MAX + (SIZE_MAX < UINT64_MAX);
    void *memory;
    besa_error error;
    CHECK(besa__add_sizes(UINT64_MAX - 5, 5) == UINT64_MAX && besa__add_sizes(UINT64_MAX - 5, 6) == UINT64_MAX, "sum");
    CHECK(besa__multiply_sizes(UINT64_C(1) << 32, UINT64_C(1) << 31) == UINT64_C(1) << 63, "product");
    CHECK(besa__multiply_sizes(UINT64_C(1) << 32, UINT64_C(1) << 32) == UINT64_MAX, "product beyond 64 bits");
    CHECK(besa__multiply_sizes(7, 0) == 0 && besa__multiply_sizes(0, UINT64_MAX) == 0, "product with 0");
    CHECK(besa__product(INT64_MAX / 3, 3) == INT64_MAX / 3 * 3 && besa__product(INT64_MAX / 3, 4) == INT64_MAX, "counts");
    CHECK(besa__sum(INT64_MAX - 1, 1) == INT64_MAX && besa__sum(INT64_MAX, 1) == INT64_MAX, "sum of counts");
    CHECK(besa__parts(INT64_MAX, 2) == INT64_MAX / 2 + 1 && besa__parts(0, 3) == 0 && besa__parts(4, 3) == 2, "parts");
    besa__take(&arena, UINT64_MAX - 100);
    CHECK(arena.used == UINT64_MAX, "an arena's size wraps: %llu", (unsigned long long)arena.used);
    besa__take_floats(&arena, 1);
    CHECK(arena.used == UINT64_MAX, "an arena's size wraps: %llu", (unsigned long long)arena.used);
    CHECK(besa__malloc(&memory, beyond, "a test", &error) == BESA_ERROR_MEMORY &&
          strstr(error.message, "a test") && !memory, "%s", error.message);
    CHECK(besa__check_size(SIZE_MAX - 1, "a test", &error) == BESA_OK, "the largest size is refused");
    CHECK(besa__check_size(beyond, "a test", &error) == BESA_ERROR_MEMORY && strstr(error.message, "can address"), "%s", error.message);
}

/* A larger workload never takes less; but as many key/value heads as heads do. */
static void test_workspace(besa_backend *be)
{
    for (int field = 0; field < 10; field++) {
        size_t before = 0;
        for (int bit = 0; bit < 63; bit++) {
            besa_workload w;
            int64_t *size[10] = {&w.rows, &w.columns, &w.tokens, &w.seqlen, &w.num_attention_heads, &w.num_key_value_heads,
                                 &w.head_dim, &w.hessian_columns, &w.rate_logits, &w.projected_rows};
            w.rows = w.columns = w.tokens = w.seqlen = w.num_attention_heads = w.head_dim = 64;
            w.num_key_value_heads = 1;
            w.hessian_columns = w.projected_rows = 64, w.rate_logits = 101;
            if (field == 5 ? bit > 5 : field == 8 && bit > 16) continue; /* candidates are 65536 at most */
            *size[field] = (int64_t)1 << bit;
            size_t now = be->workspace_size(be, &w);
            CHECK(now >= before, "field %d, 2^%d: %.0f bytes after %.0f", field, bit, (double)now, (double)before);
            before = now;
        }
        if (field == 0 || field == 1 || field == 3 || field == 6 || field == 7 || field == 9)
            CHECK(before == SIZE_MAX, "field %d: 2^62 take %.0f bytes", field, (double)before);
    }
}

static void test_public_sizes(besa_backend *be)
{
    besa_block_shape shape;
    besa_layer_shape layers[2] = {{1 << 20, 1 << 12, BESA_F32}, {1 << 20, 1 << 12, BESA_F32}};
    besa_rate_options options;
    besa_rates *rates;
    besa_error error;
    memset(&shape, 0, sizeof shape);
    memset(&options, 0, sizeof options);
    shape.hidden_size = 4096, shape.intermediate_size = 8192, shape.num_attention_heads = 32;
    shape.num_key_value_heads = 32, shape.head_dim = 128;
    for (int64_t tokens = 1024; tokens <= (int64_t)1 << 60; tokens *= 8) {
        double want = 4.0 * (double)tokens * (4096.0 * 8 + 8192.0 * 3);
        size_t got = besa_activations_size(be, &shape, 0, tokens, 0);
        CHECK(fabs((double)got - want) < 0.2 * want || is_size(got, want), "%.0f tokens: %.0f bytes", (double)tokens, (double)got);
        if (want > 1.3 * (double)SIZE_MAX) CHECK(got == SIZE_MAX, "%.0f tokens: %.0f bytes", (double)tokens, (double)got);
    }
    options.target = 0.5;
    size_t size = besa_rates_size(be, layers, 2, &options);
    double want = 2 * 2.0 * 4294967296.0;       /* of ranks alone */
    CHECK(size >= (want < (double)SIZE_MAX ? want : (double)SIZE_MAX), "rates of two large layers: %.0f bytes", (double)size);
    if (SIZE_MAX > UINT32_MAX) return;          /* there the machine may well have so much */
    CHECK(size == SIZE_MAX, "rates of two large layers: %.0f bytes", (double)size);
    CHECK(besa_rates_create(&rates, be, layers, 2, &options, &error) == BESA_ERROR_MEMORY &&
          strstr(error.message, "4294967295"), "%s", error.message);
}

/* The largest that a pruner is defined for: more than 64 bits of bytes. */
static void test_pruner_sizes(besa_backend *be)
{
    besa_block_shape shape;
    besa_prune_options options;
    besa_pruner *pruner;
    besa_error error;
    char limit[32];
    memset(&shape, 0, sizeof shape);
    memset(&options, 0, sizeof options);
    shape.hidden_size = shape.intermediate_size = 1 << 24, shape.num_attention_heads = 256;
    shape.num_key_value_heads = 256, shape.head_dim = 65536;
    shape.rms_norm_eps = 1e-5f, shape.rope.theta = 1e4;
    options.rates.target = 0.5;
    snprintf(limit, sizeof limit, "%llu", (unsigned long long)SIZE_MAX);
    besa_result result = besa_pruner_create(&pruner, be, &shape, BESA_BF16, 0, &options, 1, (int64_t)1 << 36, &error);
    CHECK(result == BESA_ERROR_MEMORY && strstr(error.message, "18446744073709551615") && strstr(error.message, limit),
          "%d: %s", (int)result, error.message);
    options.device_memory = 1 << 20;
    result = besa_pruner_create(&pruner, be, &shape, BESA_BF16, 0, &options, 1, (int64_t)1 << 36, &error);
    CHECK(result == BESA_ERROR_MEMORY && strstr(error.message, "1048576 bytes"), "%d: %s", (int)result, error.message);
}

/* ---- float arithmetic ---------------------------------------------------------------------- */

static void test_finite(void)
{
    volatile double big = 1e300, small = 5e-324, zero = 0;
    CHECK(besa__is_finite(big) && besa__is_finite(-big) && besa__is_finite(small) && besa__is_finite(zero), "finite numbers");
    CHECK(!besa__is_finite(big * big) && !besa__is_finite(-big * big), "infinities");
    CHECK(!besa__is_finite(big * big - big * big) && !besa__is_finite(-(big * big - big * big)), "NaN");
}

/* silu(g) u of the backend against libm */
static void test_exponential(besa_backend *be)
{
    enum { N = 301 };
    float gate[N], up[N], z[N];
    double worst = 0;
    for (int i = 0; i < N; i++) gate[i] = (float)(i - N / 2) * 0.59f, up[i] = 1.0f;
    besa_result result = be->swiglu_forward(be, z, gate, up, N);
    for (int i = 0; i < N; i++) {
        double want = (double)gate[i] / (1 + exp(-(double)gate[i]));
        worst = fmax(worst, fabs((double)z[i] - want) / (fabs(want) + 1e-37));
    }
    CHECK(result == BESA_OK && worst < 1e-5, "relative error %g", worst);
}

#if defined(__SSE__)
/* The processor's own switch for what a program linked with -ffast-math does to numbers. */
static void test_flushed(void)
{
    unsigned before = _mm_getcsr();
    static const unsigned flags[2] = {0x8000, 0x0040}; /* results flushed to zero; operands taken for zero */
    for (int i = 0; i < 2; i++) {
        besa_backend be;
        besa_error error;
        error.message[0] = 0;
        _mm_setcsr(before | flags[i]);
        besa_result result = besa_cpu_backend(&be, NULL, &error);
        _mm_setcsr(before);
        CHECK(result == BESA_ERROR_UNSUPPORTED && strstr(error.message, "subnormal"), "%d: %s", (int)result, error.message);
        if (result == BESA_OK) be.destroy(&be);
    }
}
#endif

/* ---- text ---------------------------------------------------------------------------------- */

#define FORMAT(...)                                                                                \
    do {                                                                                           \
        char got[512], want[512];                                                                  \
        besa__write_text(got, sizeof got, __VA_ARGS__);                                            \
        snprintf(want, sizeof want, __VA_ARGS__);                                                  \
        CHECK(!strcmp(got, want), "\"%s\", expected \"%s\"", got, want);                           \
    } while (0)

/* Every conversion as the C library's printf writes it in the locale of a C program. */
static void test_format(void)
{
    static const double numbers[] = {0, -0.0, 1, -1.5, 0.1, 1e-5, 123456789.125, 1e100, 1.7976931348623157e308, 5e-324, 1.0 / 3};
    char small[6];
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        FORMAT("%g|%.9g|%.17g|%.3f|%f", numbers[i], numbers[i], numbers[i], numbers[i], numbers[i]);
        FORMAT("1.5 %.0f%% 2,5", numbers[i]);
    }
    FORMAT("%d %d %d %u", 0, INT32_MAX, INT32_MIN, UINT32_MAX);
    FORMAT("%ld %lu", LONG_MIN, ULONG_MAX);
    FORMAT("%lld %lld %llu", (long long)INT64_MIN, (long long)INT64_MAX, (unsigned long long)UINT64_MAX);
    FORMAT("%016llx %04x %x", (unsigned long long)0x1234ABCD, 0xBu, 255u);
    FORMAT("%s|%.3s|%.*s|%.200s|%c|%%", "one", "three", 2, "two", "x", 'c');
    FORMAT("%s", "");
    besa__write_text(small, sizeof small, "%zu", SIZE_MAX);
    CHECK(strlen(small) == 5 && !memcmp(small, SIZE_MAX == UINT32_MAX ? "42949" : "18446", 5), "cut text: %s", small);
    besa__write_text(small, sizeof small, "%g and %g", (double)INFINITY, (double)NAN);
    CHECK(!memcmp(small, "inf a", 6), "infinity: %s", small);
}

/* The message of a refused option, and a report: both hold numbers. */
static void make_texts(besa_backend *be, char *message, char **json)
{
    besa_layer_shape layer = {8, 8, BESA_F32};
    besa_rate_options options;
    besa_rates *rates;
    besa_error error;
    memset(&options, 0, sizeof options);
    options.target = 1.25;
    error.message[0] = 0;
    besa_rates_create(&rates, be, &layer, 1, &options, &error);
    strcpy(message, error.message);
    *json = NULL;
#if !defined(BESA_NO_STDIO)
    besa_block_report block;
    besa_report report;
    memset(&block, 0, sizeof block);
    memset(&report, 0, sizeof report);
    report.block = &block, report.num_blocks = 1, report.target = 0.5, report.sparsity = 1.0 / 3, report.seconds = 12345678.5;
    block.sparsity = 1e-7, block.loss_after = 0.0625, block.loss_before = (double)NAN, block.d = (double)INFINITY;
    *json = besa_report_json(&report);
#endif
}

static void test_locale(besa_backend *be)
{
    static const char *const points[2] = {",", "\xd9\xab"};
    char want[1024], got[1024], *want_json, *json;
    make_texts(be, want, &want_json);
    CHECK(strstr(want, "1.25"), "%s", want);
#if !defined(BESA_NO_STDIO)
    CHECK(want_json && strstr(want_json, "\"target\": 0.5,") && strstr(want_json, "0.333333333") &&
          strstr(want_json, "\"seconds\": 12345678.5") && strstr(want_json, "1e-07") && strstr(want_json, "\"prodigy_d\": null"),
          "%s", want_json ? want_json : "no report");
#endif
    for (int i = 0; i < 2; i++) {
        decimal_point = points[i];
        make_texts(be, got, &json);
        decimal_point = ".";
        CHECK(!strcmp(got, want), "with the point \"%s\": %s", points[i], got);
        CHECK(!json || !strcmp(json, want_json), "with the point \"%s\": %s", points[i], json ? json : "");
        BESA_FREE(json);
    }
    BESA_FREE(want_json);
}

#if !defined(BESA_NO_STDIO)

/* Numbers of JSON are read the same in any locale. */
static void test_reading(void)
{
    static const struct { const char *text; double value; } cases[] = {
        {"0.5", 0.5}, {"-12.25e-1", -1.225}, {"1e-05", 1e-5}, {"500000.0", 500000}, {"3.14159265358979", 3.14159265358979},
        {"0.1", 0.1}, {"1.7976931348623157e308", 1.7976931348623157e308}, {"4.9e-324", 4.9e-324}, {"12345678901234567890", 12345678901234567890.0}};
    for (size_t i = 0; i < 2 * sizeof cases / sizeof *cases; i++) {
        besa__json json;
        besa_error error;
        char *text = (char *)BESA_MALLOC(64), shown[64];
        snprintf(text, 64, "{\"x\": %s}", cases[i / 2].text);
        decimal_point = i % 2 ? "," : ".";
        besa_result result = besa__json_parse(&json, text, strlen(text), "text", &error);
        const besa__json_value *x = result == BESA_OK ? besa__json_get(&json, json.values, "x") : NULL;
        double value = x ? besa__json_number_of(&json, x).value : 0;
        CHECK(x && value == cases[i / 2].value, "%s: %.17g", cases[i / 2].text, value);
        if (x) besa__json_show(&json, x, shown, sizeof shown);
        decimal_point = ".";
        CHECK(x && !strchr(shown, ','), "%s is shown as %s", cases[i / 2].text, shown);
        besa__json_free(&json);
    }
}

/* Put on a locale of the machine's with another point, where there is one. */
static int find_locale(void)
{
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "de_DE", "fr_FR.UTF-8", "es_ES.UTF-8", "it_IT.UTF-8",
                                        "pt_BR.UTF-8", "ru_RU.UTF-8", "pl_PL.UTF-8", "nl_NL.UTF-8", "sv_SE.UTF-8"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (setlocale(LC_ALL, names[i]) && *localeconv()->decimal_point != '.') return 1;
    return 0;
}

/* What besa_plan says, and its error where that cannot be addressed. */
static void test_plan(const char *stories)
{
    besa_checkpoint *model;
    besa_calibration data;
    besa_prune_options options;
    besa_plan_result plan;
    besa_error error;
    memset(&data, 0, sizeof data);
    memset(&options, 0, sizeof options);
    options.rates.target = 0.5;
    besa_result result = besa_checkpoint_open(&model, stories, &error);
    if (!besa__is_little_endian()) {
        CHECK(result == BESA_ERROR_UNSUPPORTED && strstr(error.message, "big-endian") && strstr(error.message, stories), "%d: %s",
              (int)result, error.message);
        return;
    }
    CHECK_OK(result, error);
    if (result != BESA_OK) return;
    for (int64_t nsamples = 128; nsamples <= 8192; nsamples *= 8) {
        double streams;                         /* X and Yref */
        data.nsamples = nsamples, data.seqlen = 2048;
        streams = 2 * 4.0 * (double)(data.nsamples * data.seqlen * besa_checkpoint_config(model)->block.hidden_size);
        result = besa_plan(model, NULL, &data, &options, &plan, &error);
        if (streams > (double)SIZE_MAX)
            CHECK(result == BESA_ERROR_MEMORY && strstr(error.message, "4294967295") && atof(error.message) > streams &&
                  atof(error.message) < 1.1 * streams, "%d: %s", (int)result, error.message);
        else {
            CHECK_OK(result, error);
            CHECK((double)plan.device_bytes > streams && (double)plan.device_bytes < streams + 150e6, "%.0f bytes of streams, a plan "
                  "of %.0f", streams, (double)plan.device_bytes);
        }
    }
    besa_checkpoint_close(model);
}
#endif

static void test_clock(void)
{
    double first = besa__seconds(), last = first;
    int back = 0;
    for (int i = 0; i < 1000; i++) {
        double now = besa__seconds();
        back += now < last;
        last = now;
    }
    CHECK(back == 0 && last - first < 60, "%d steps back, %g s", back, last - first);
#if defined(CLOCK_MONOTONIC) && !defined(_WIN32)
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    CHECK(fabs(besa__seconds() - (double)now.tv_sec) < 5, "%.0f, the monotonic clock says %.0f", last, (double)now.tv_sec);
#endif
}

static void test_backend(besa_backend *be)
{
    TEST("the exponential is right") test_exponential(be);
#if defined(__SSE__)
    TEST("no backend where subnormal numbers are flushed to zero") test_flushed();
#endif
    TEST("a larger workload never takes less") test_workspace(be);
    TEST("sizes that public functions return") test_public_sizes(be);
    TEST("a pruner of more bytes than can be addressed") test_pruner_sizes(be);
    TEST("numbers are written the same in any locale") test_locale(be);
    be->destroy(be);
}

int main(int argc, char **argv)
{
    besa_backend be;
    besa_error error;
    test.only = argc > 2 ? argv[2] : NULL;
    besa_result result = besa_cpu_backend(&be, NULL, &error);
    TEST("a backend that is right, or none") {
        CHECK(result == BESA_OK || (result == BESA_ERROR_UNSUPPORTED && strstr(error.message, "-funsafe-math-optimizations")),
              "%s", error.message);
        if (result != BESA_OK) printf("    refused: %s\n", error.message);
    }
    TEST("sizes stay at the largest number") test_arithmetic_of_sizes();
    TEST("finite by bits") test_finite();
    TEST("text as printf writes it") test_format();
    TEST("the clock never goes back") test_clock();
    if (result == BESA_OK) test_backend(&be);
#if !defined(BESA_NO_STDIO)
    TEST("numbers are read the same in any locale") test_reading();
    if (result == BESA_OK) TEST("plans in 64 bits; a big-endian machine is told") test_plan(argc > 1 ? argv[1] : "../examples/stories260K");
    if (find_locale()) {
        TEST("a locale of the machine's") {
            test_reading();
            if (result == BESA_OK && besa_cpu_backend(&be, NULL, &error) == BESA_OK) {
                test_locale(&be);
                be.destroy(&be);
            }
            setlocale(LC_ALL, "C");
        }
    } else test_skip("a locale of the machine's", "none with a decimal comma is installed");
#endif
    return test_finish();
}
