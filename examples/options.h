/* The options of the command line: their table, how it is read, and the help that is printed from it.
 * Part of besa.c; it knows the library only by the fields that options set. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- options ------------------------------------------------------------------------------- */

enum { MAX_FIXED = 256, MAX_BLOCKS = 1024, MAX_LIST = 32, MAX_NAME = 128, MAX_OPTIONS = 128, MAX_TESTS = 8, MAX_SETTINGS = 8 };

/* The commands, as bits: which of them has an option. */
enum {
    PRUNE = 1, PLAN = 2, COMPARE = 4, EVAL = 8, INFO = 16,
    ONE = PRUNE | PLAN, RUN = ONE | COMPARE, ALL = RUN | EVAL | INFO
};

typedef struct row { /* of a comparison: "wanda", "besa", "besa:best", "besa:best:epochs=2,lr=3" */
    char label[MAX_NAME];
    besa_method method;
    char preset[MAX_NAME];                     /* "": none of its own */
    char setting[MAX_SETTINGS][MAX_NAME];      /* "epochs=2": options of its own */
    int num_settings;
} row;

typedef struct test_file { /* "FILE", or "NAME=FILE" */
    char name[MAX_NAME];
    const char *path;
} test_file;

typedef enum kind {
    HEADING, LIBRARY, FLAG, TEXT, CHOICE, PATTERN, SKIP, METHODS, BLOCKS, TARGETS, TESTS, /* these are not numbers */
    NUMBER, ROWS, SHARES, /* numbers of besa_prune_options: the library's table has their ranges */
    THREADS, COUNT, SEED, FIX, BYTES, DEVICE, PROCESSORS, CAPABILITY, COUNTS, SEEDS /* the last two: lists */
} kind;

typedef struct option {
    const char *name;  /* without "--" */
    kind kind;
    size_t offset;     /* of the field in settings, where one field is all; of LIBRARY the flags of its rows */
    int commands;
    const char *value; /* what follows; the names of a CHOICE in the order of its enum */
    const char *help;
} option;

typedef struct settings {
    option options[MAX_OPTIONS]; /* all of them, with headings */
    int num_options;
    const struct command *commands, *command; /* all of them, ended by one without a name; the one that was given */
    char **arguments; /* after the command's name, ended by NULL */
    const char *path[2];
    int num_paths;
    const char *tokens, *test, *report, *trace, *rates, *save_masks, *preset, *masks;
    const char *against, *json_file, *markdown, *resume; /* of a comparison */
    test_file tests[MAX_TESTS];        /* what compare and eval measure on */
    int num_tests;
    int64_t counts[MAX_LIST], seeds[MAX_LIST]; /* calibration sizes and seeds of a comparison; none: nsamples, seed */
    int num_counts, num_seeds;
    int64_t nsamples, seqlen, test_seqlen, windows; /* 0: the default */
    int64_t seed;
    int cuda; /* 1: on the GPU that gpu says; 0: on the CPU, with threads and bf16 */
    besa_cuda_options gpu;
    besa_absent_device absent; /* a plan's, where its memory is not 0 */
    int threads, bf16, json, quiet, help, has_sparsity, test_dense;
    besa_prune_options prune;
    besa_fixed_rate fixed[MAX_FIXED];
    char pattern[MAX_FIXED][MAX_NAME]; /* of fixed[] */
    double block_targets[MAX_BLOCKS], block_mean;
    int64_t num_targets;
    const char *targets_path;          /* that they were read from, or NULL */
    int owl;                           /* 1: block_targets are to come from outliers, by these two; 0 of them: the defaults */
    double owl_lambda, owl_threshold;
    double sparsity[MAX_LIST];         /* of a comparison, as are rows */
    row rows[MAX_LIST];
    int num_sparsities, num_rows, left_out; /* 1: besa is not among the rows: a pattern leaves it no rates to learn */
    const char *besa_option, *rates_option, *learning_option, *weight_option, *bits_option; /* the last given under these headings, or NULL */
} settings;

/* What each other kind of number admits. */
static const struct { double least, most; int whole; const char *words; } ranges[] = {
    [THREADS] = {1, 1024, 1, "a whole number from 1 to 1024"},
    [COUNT] = {1, 1e9, 1, "a whole number from 1 to 1000000000"},
    [SEED] = {0, 9e15, 1, "a whole number from 0 to 9000000000000000"},
    [FIX] = {0, 1 - DBL_EPSILON / 2, 0, "a number from 0 and below 1"},
    [BYTES] = {1, 1e18, 0, "a number of bytes, as 500M or 24G"},
    [DEVICE] = {0, 65535, 1, "a GPU's number, from 0"},
    [PROCESSORS] = {1, 4096, 1, "a whole number from 1 to 4096"},
    [CAPABILITY] = {7, 99, 0, "a compute capability, from 7.0 on"},
    [COUNTS] = {1, 1e9, 1, "a whole number from 1 to 1000000000"},
    [SEEDS] = {0, 9e15, 1, "a whole number from 0 to 9000000000000000"},
};

#define AT(field) offsetof(settings, field)

static const option own_options[] = {
    {"Data", HEADING, 0, RUN | EVAL, "", ""},
    {"tokens", TEXT, AT(tokens), PRUNE | COMPARE, "FILE",
     "calibration text as token ids: .npy, .u16, .i32 or .bin; required"},
    {"tokens", TEXT, AT(tokens), PLAN, "FILE",
     "calibration text as token ids, only for --nsamples and --seqlen [none]"},
    {"tokens", TESTS, 0, EVAL, "[NAME=]FILE",
     "the text to measure, as token ids: .npy, .u16, .i32 or .bin; required; repeatable"},
    {"against", TEXT, AT(against), EVAL, "DIR",
     "say how far this model is from the one in DIR too: KL divergence and the like"},
    {"nsamples", COUNT, AT(nsamples), ONE, "N",
     "how many calibration sequences [a 2-D file's rows; else 128, or all that the file has]"},
    {"nsamples", COUNTS, 0, COMPARE, "N,N,...",
     "how many calibration sequences, a run for each [a 2-D file's rows; else 128, or all that the file has]"},
    {"seqlen", COUNT, AT(seqlen), RUN, "T",
     "tokens in each of them [a 2-D file's columns; else 2048, or what model and file allow]"},
    {"seqlen", COUNT, AT(seqlen), EVAL, "T",
     "tokens in a window [a 2-D file's columns; else 2048, or what model and file allow]"},
    {"seed", SEED, AT(seed), RUN, "K",
     "0: sequences follow one another from the file's start; else drawn by this seed [0]"},
    {"test", TEXT, AT(test), ONE, "FILE", "text to measure the pruned model's perplexity on, as token ids [none]"},
    {"seeds", SEEDS, 0, COMPARE, "K,K,...", "a run for each seed, as --seed takes it; their mean and standard deviation at the end"},
    {"test", TESTS, 0, COMPARE, "[NAME=]FILE", "text to measure perplexity on, as token ids; required; repeatable"},
    {"against", TEXT, AT(against), COMPARE, "DIR", "the model that results are held against [SRC]"},
    {"test-dense", FLAG, AT(test_dense), PRUNE, "", "measure the dense model's perplexity on the same text first, for the model's card"},
    {"test-seqlen", COUNT, AT(test_seqlen), RUN, "T", "tokens in a test window [as --seqlen]"},
    {"windows", COUNT, AT(windows), RUN, "K", "how many test windows, from the start of the test file [all]"},
    {"windows", COUNT, AT(windows), EVAL, "K", "how many windows, from the file's start [all]"},

    {"Method", HEADING, 0, RUN, "", ""},
    {NULL, LIBRARY, 0, 0, "", ""}, /* here the library's options for every method */
    {"method", METHODS, 0, COMPARE, "A,B,...",
     "of besa, wanda, sparsegpt, magnitude, besa:PRESET, and others with :weights [the first four; besa with --pattern only "
     "where weights learn]; options of a row: besa:epochs=2,lr=3 or besa:best:projection=no"},
    {"preset", TEXT, AT(preset), RUN, "default|best|weights|published-row|published-layer",
     "what the options below start from; all but weights for besa; published: as the paper's code, for LLaMA-1-7B"},
    {"sparsity", SHARES, AT(prune.rates.target), COMPARE, "S,S,...",
     "shares of the weights that become zero [0.5, or the pattern's]"},
    {"pattern", PATTERN, 0, RUN, "N:M", "prune N of every M consecutive weights and keep M - N: 2:4, 4:8; 6:8 keeps 2. besa: --preset best, or --learn weights or both"},
    {"masks", TEXT, AT(masks), RUN, "DIR|FILE", "keep: the checkpoint whose zeros are the masks, pruned by whatever program, or a file of --save-masks"},
    {"skip", SKIP, 0, RUN, "PATTERN", "keep layers dense: v_proj, layers.0, '*.mlp.*'; repeatable"},
    {"blocks", BLOCKS, 0, RUN, "A-B", "prune blocks A to B, counted from 0, and leave the others dense: for studies [all]"},
    {"block-targets", TARGETS, 0, RUN, "FILE|owl[:L[:M]]",
     "a text of numbers, the sparsity of each block; --sparsity is their mean. owl: found from the dense model's outliers, "
     "2 L apart [0.08], scores above M times the mean [5]"},
    {"fix", FIX, 0, RUN, "PATTERN=S", "hold layers at a sparsity of their own; the others reach --sparsity; repeatable"},

    {"BESA", HEADING, 0, RUN, "", ""},
    {NULL, LIBRARY, BESA_OPTION_BESA, 0, "", ""}, /* here those for besa alone */
    {"Learning, of rates or weights", HEADING, 0, RUN, "", ""},
    {NULL, LIBRARY, BESA_OPTION_BESA | BESA_OPTION_WEIGHTS, 0, "", ""},
    {"Weights that learn", HEADING, 0, RUN, "", ""},
    {NULL, LIBRARY, BESA_OPTION_WEIGHTS, 0, "", ""},
    {"Quantisation, with --bits", HEADING, 0, RUN, "", ""},
    {NULL, LIBRARY, BESA_OPTION_BITS, 0, "", ""},

    {"Run", HEADING, 0, ALL, "", ""},
    {"device", DEVICE, 0, RUN | EVAL, "cpu|cuda[:N]", "compute on the CPU or on NVIDIA GPU number N [cpu]; "
     "`make -C examples cuda` builds for both"},
    {"threads", THREADS, AT(threads), RUN | EVAL, "K",
     "cpu: how many threads [OMP_NUM_THREADS, else all cores; 1 where built without OpenMP]"},
    {"bf16", FLAG, AT(bf16), RUN | EVAL, "", "cpu: products in bfloat16, faster where the processor has them"},
    {"fp32", FLAG, AT(gpu.fp32), RUN | EVAL, "", "cuda: float throughout; without it bfloat16, where the GPU has it"},
    {"memory", BYTES, AT(prune.device_memory), RUN, "N[K|M|G|T]",
     "bytes that the run's arrays stay within [cpu: no limit; cuda: 31/32 of what is free]"},
    {"device-memory", BYTES, AT(absent.memory), PLAN, "N[K|M|G|T]",
     "--device cuda: a GPU that need not be here, with so many bytes free [the one that is here]"},
    {"processors", PROCESSORS, AT(absent.processors), PLAN, "K",
     "with --device-memory: its multiprocessors, A100 108, RTX 4090 128, RTX 3090 82 [132: H100]"},
    {"capability", CAPABILITY, AT(absent.capability), PLAN, "X.Y",
     "with --device-memory: its compute capability, A100 8.0, RTX 4090 8.9, RTX 3090 8.6 [9.0: H100]"},
    {"report", TEXT, AT(report), PRUNE | EVAL, "FILE", "what was done and how it came out, as JSON: of prune every layer; losses of dense blocks are null; of eval the perplexity"},
    {"trace", TEXT, AT(trace), PRUNE, "FILE", "a line of JSON for each learning step: loss, penalty, rates, learning rates. A run that goes on goes on in it"},
    {"save-rates", TEXT, AT(rates), PRUNE, "FILE",
     "of every layer and row, how many weights are 0 and the rate that was learned, or else their share, as safetensors"},
    {"save-rates", TEXT, AT(rates), INFO, "FILE",
     "of every layer and row, how many weights are 0 and their share, or the rate that a run has left in DIR, as safetensors"},
    {"save-masks", TEXT, AT(save_masks), PRUNE | INFO, "FILE", "of every layer which weights are not 0, a bit each, as safetensors; --masks takes it"},
    {"json", FLAG, AT(json), EVAL | INFO, "", "print JSON"},
    {"json", TEXT, AT(json_file), COMPARE, "FILE", "all figures as JSON, written after every run"},
    {"markdown", TEXT, AT(markdown), COMPARE, "FILE", "the table as Markdown"},
    {"resume", TEXT, AT(resume), COMPARE, "FILE", "take over the runs of this file of --json, and go on with it"},
    {"quiet", FLAG, AT(quiet), PRUNE | COMPARE | EVAL, "", "no progress"},
    {"help", FLAG, AT(help), ALL, "", "print this"},
};

/* The library's options that these (of BESA_OPTION_BESA, _WEIGHTS, _BITS; 0: every method) look at, as rows of ours. A
 * comparison has lists of its own for method and sparsity. */
static void add_library_options(settings *s, size_t lookers)
{
    static const kind kinds[] = {FLAG, CHOICE, NUMBER, NUMBER, NUMBER}; /* by besa_option_kind */
    for (const besa_option *o = besa_option_table(); o->name; o++) {
        const size_t offset = AT(prune) + o->offset;
        const int listed = offset == AT(prune.method) || offset == AT(prune.rates.target);
        const int flags = o->flags & (BESA_OPTION_BESA | BESA_OPTION_WEIGHTS | BESA_OPTION_BITS);
        if (!o->flag || (size_t)flags != lookers) continue;
        option *made = &s->options[s->num_options++];
        made->name = o->flag;
        made->kind = o->flags & BESA_OPTION_ALL ? ROWS : kinds[o->kind];
        made->offset = offset;
        made->commands = listed ? ONE : RUN;
        made->value = o->value;
        made->help = o->help;
    }
}

/* Our own and the library's, each under its heading. */
static void make_options(settings *s)
{
    for (size_t i = 0; i < sizeof own_options / sizeof own_options[0]; i++)
        if (own_options[i].name) s->options[s->num_options++] = own_options[i];
        else add_library_options(s, own_options[i].offset);
}

typedef struct job job;

typedef struct command {
    const char *name;
    int bit, min_paths, max_paths;
    besa_result (*run)(job *j);
    const char *paths, *summary, *text;
} command;

/* ---- text from elsewhere ------------------------------------------------------------------- */

/* Print text that may hold parts of arguments: control characters, which a terminal would obey, become '?', C1 in UTF-8
 * too. The library does the same with what it takes from files. */
static void print_text(FILE *file, const char *text)
{
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        const int c1 = c[0] == 0xC2 && c[1] >= 0x80 && c[1] < 0xA0;
        putc(c1 || *c < 0x20 || *c == 0x7F ? '?' : *c, file);
        c += c1;
    }
}

/* Bytes of the UTF-8 character at s, 0 where there is none. */
static int utf8_length(const unsigned char *s)
{
    const int n = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xC0) != 0x80) return 0; /* the text's end too */
    const int overlong = (s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xF0 && s[1] < 0x90);
    const int no_character = (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF4 && s[1] > 0x8F); /* surrogates, above U+10FFFF */
    return overlong || no_character ? 0 : n;
}

/* A text that is written piece by piece; file is NULL where there is no memory. */
typedef struct text_file {
    FILE *file;
    char *text;
    size_t size;
} text_file;

static FILE *begin_text(text_file *t)
{
    memset(t, 0, sizeof *t);
    return t->file = open_memstream(&t->text, &t->size);
}

/* The text, for free; NULL without memory. */
static char *end_text(text_file *t)
{
    if (t->file && fclose(t->file) == 0) return t->text;
    free(t->text);
    return NULL;
}

/* ---- reading the command line -------------------------------------------------------------- */

_Noreturn static void usage_error(const settings *s, const char *format, ...)
{
    char message[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    fprintf(stderr, "besa %s: ", s->command->name);
    print_text(stderr, message);
    fprintf(stderr, "\n`besa %s --help` lists the options.\n", s->command->name);
    exit(2);
}

/* The library's row of a NUMBER, ROWS or SHARES, by its field. */
static const besa_option *find_row(const option *o)
{
    const besa_option *limits = besa_option_table();
    while (AT(prune) + limits->offset != o->offset) limits++;
    return limits;
}

/* How many characters of text are a number: digits; of one that is not whole also a point and an exponent, as .5 or 1e-3.
 * strtod takes more: signs, spaces, "inf", hexadecimal digits. 0: it does not begin with one. */
static size_t number_length(const char *text, int whole)
{
    static const char digits[] = "0123456789";
    const size_t before = strspn(text, digits);
    if (whole) return before;
    const size_t after = text[before] == '.' ? strspn(text + before + 1, digits) : 0;
    if (before + after == 0) return 0;
    const size_t n = before + (text[before] == '.') + after;
    if (text[n] != 'e' && text[n] != 'E') return n;
    const size_t sign = text[n + 1] == '-' || text[n + 1] == '+', exponent = strspn(text + n + 1 + sign, digits);
    return exponent ? n + 1 + sign + exponent : n;
}

/* All of text as a number; BYTES may end in a unit. NaN where it is none. */
static double parse_number(const option *o, const char *text, int whole)
{
    static const char units[] = "KMGT";
    const size_t n = number_length(text, whole);
    const char *unit = o->kind == BYTES && text[n] ? strchr(units, text[n]) : NULL;
    if (n == 0 || text[n + (unit != NULL)]) return (double)NAN;
    return strtod(text, NULL) * (unit ? pow(1000, (double)(unit - units + 1)) : 1);
}

static double read_number(const settings *s, const option *o, const char *text)
{
    if (o->kind == NUMBER || o->kind == ROWS || o->kind == SHARES) {
        const besa_option *limits = find_row(o);
        const int whole = limits->kind != BESA_OPTION_DOUBLE, minus = limits->least < 0 && text[0] == '-';
        const double x = parse_number(o, text + minus, whole) * (minus ? -1 : 1);
        const int above = limits->flags & BESA_OPTION_ABOVE ? x > limits->least : x >= limits->least;
        const int below = limits->flags & BESA_OPTION_BELOW ? x < limits->most : x <= limits->most;
        if (!isfinite(x) || !above || !below)
            usage_error(s, "--%s is '%s', expected a %snumber, %s%s", o->name, text, whole ? "whole " : "", limits->range,
                        o->kind == ROWS ? ", or all" : "");
        return whole ? fmin(x, 9e15) : x; /* more is as good as all */
    }
    const double x = parse_number(o, text, ranges[o->kind].whole);
    if (!(x >= ranges[o->kind].least && x <= ranges[o->kind].most))
        usage_error(s, "--%s: '%s' is not %s", o->name, text, ranges[o->kind].words);
    return x;
}

/* Into the field of its row. Where the library takes 0 for another default, BESA_NONE stands for a true 0. */
static void write_number(const option *o, void *field, double x)
{
    const besa_option *limits = find_row(o);
    if (x == 0 && limits->flags & BESA_OPTION_NONE) x = BESA_NONE;
    if (limits->kind == BESA_OPTION_INT64) *(int64_t *)field = (int64_t)x;
    else if (limits->kind != BESA_OPTION_DOUBLE) *(int *)field = (int)x;
    else *(double *)field = x;
}

/* The position of a word in "a|b|c", or -1. */
static int find_choice(const char *list, const char *word, size_t length)
{
    for (int i = 0; *list; i++) {
        size_t n = strcspn(list, "|");
        if (n == length && memcmp(list, word, n) == 0) return i;
        list += n + (list[n] == '|');
    }
    return -1;
}

/* "2:4" */
static void read_pattern(settings *s, const option *o, const char *text)
{
    const size_t n = number_length(text, 1), m = text[n] == ':' ? number_length(text + n + 1, 1) : 0;
    const double pruned = strtod(text, NULL), of = m ? strtod(text + n + 1, NULL) : 0;
    if (!n || !m || text[n + 1 + m] || pruned < 1 || of <= pruned || of > 64)
        usage_error(s, "--%s: '%s' is not N:M with 0 < N < M <= 64, as 2:4", o->name, text);
    s->prune.pattern_n = (int)pruned;
    s->prune.pattern_m = (int)of;
}

/* "3-5", or "3" alone */
static void read_blocks(settings *s, const option *o, const char *text)
{
    const size_t a = number_length(text, 1), b = text[a] == '-' ? number_length(text + a + 1, 1) : 0;
    const double first = strtod(text, NULL), last = b ? strtod(text + a + 1, NULL) : first;
    if (!a || (text[a] && !b) || text[a + (b ? 1 + b : 0)] || last < first || last >= MAX_BLOCKS)
        usage_error(s, "--%s: '%s' is not A-B with 0 <= A <= B < %d, as 0-3", o->name, text, MAX_BLOCKS);
    s->prune.first_block = (int64_t)first;
    s->prune.num_blocks = (int64_t)(last - first) + 1;
}

/* "owl", "owl:0.1" or "owl:0.1:7" */
static void read_owl(settings *s, const option *o, const char *text)
{
    double *const number[] = {&s->owl_lambda, &s->owl_threshold};
    const char *at = text + 3;
    s->owl = 1;
    s->owl_lambda = s->owl_threshold = 0;
    for (int i = 0; i < 2 && *at == ':'; i++) {
        const size_t n = number_length(at + 1, 0);
        *number[i] = n ? strtod(at + 1, NULL) : 0;
        if (!(*number[i] > 0)) break;
        at += 1 + n;
    }
    if (*at) usage_error(s, "--%s: '%s' is not owl, owl:L or owl:L:M with L and M above 0, as owl:0.08:5", o->name, text);
    s->prune.block_targets = NULL;
    s->prune.num_block_targets = 0;
}

/* Numbers with blanks or lines between; once, as the command line is read again for every preset. */
static void read_targets(settings *s, const option *o, const char *path)
{
    char word[64];
    double sum = 0;
    s->owl = 0;
    FILE *file = s->targets_path == path ? NULL : fopen(path, "r");
    if (s->targets_path != path && !file) usage_error(s, "--%s: %s: %s", o->name, path, strerror(errno));
    if (file) s->num_targets = 0;
    while (file && fscanf(file, "%63s", word) == 1) {
        const double x = number_length(word, 0) == strlen(word) ? strtod(word, NULL) : 0;
        if (!(x > 0 && x < 1)) usage_error(s, "--%s: %s: '%s' is not a number above 0 and below 1", o->name, path, word);
        if (s->num_targets == MAX_BLOCKS) usage_error(s, "--%s: %s: more than %d numbers", o->name, path, MAX_BLOCKS);
        s->block_targets[s->num_targets++] = x;
    }
    if (file && ferror(file)) usage_error(s, "--%s: %s could not be read", o->name, path);
    if (file) fclose(file);
    if (!s->num_targets) usage_error(s, "--%s: %s: no numbers", o->name, path);
    for (int64_t i = 0; i < s->num_targets; i++) sum += s->block_targets[i];
    s->targets_path = path;
    s->prune.block_targets = s->block_targets;
    s->prune.num_block_targets = s->num_targets;
    s->block_mean = sum / (double)s->num_targets;
}

/* "PATTERN=S"; the PATTERN of a SKIP has S = 0. */
static void read_fixed(settings *s, const option *o, const char *text)
{
    const char *end = o->kind == FIX ? strrchr(text, '=') : text + strlen(text);
    int64_t i = s->prune.num_fixed;
    if (!end || end == text || end - text >= MAX_NAME) usage_error(s, "--%s: '%s' is not %s", o->name, text, o->value);
    if (i == MAX_FIXED) usage_error(s, "--%s: more than %d patterns", o->name, MAX_FIXED);
    snprintf(s->pattern[i], MAX_NAME, "%.*s", (int)(end - text), text);
    s->fixed[i].pattern = s->pattern[i];
    s->fixed[i].sparsity = o->kind == FIX ? read_number(s, o, end + 1) : 0;
    s->prune.fixed = s->fixed;
    s->prune.num_fixed++;
}

/* The next part of a row: a preset, "KEY=VALUE", or what a colon in a value has cut off it. */
static void read_row_part(const settings *s, const option *o, row *r, const char *part, size_t length)
{
    const int is_setting = memchr(part, '=', length) != NULL;
    char *last = r->num_settings ? r->setting[r->num_settings - 1] : NULL;
    if (is_setting && r->num_settings == MAX_SETTINGS)
        usage_error(s, "--%s: '%s': more than %d options", o->name, r->label, MAX_SETTINGS);
    if (is_setting) snprintf(r->setting[r->num_settings++], MAX_NAME, "%.*s", (int)length, part);
    else if (last) snprintf(last + strlen(last), MAX_NAME - strlen(last), ":%.*s", (int)length, part);
    else if (r->preset[0]) usage_error(s, "--%s: '%s': two presets", o->name, r->label);
    else snprintf(r->preset, MAX_NAME, "%.*s", (int)length, part);
    if (!is_setting && !last && !length)
        usage_error(s, "--%s: '%s': a preset or an option is missing behind a colon", o->name, r->label);
}

/* "besa", "besa:published-row", "wanda:weights", "besa:best:epochs=2,lr=3": METHOD[:PRESET][:KEY=VALUE[,KEY=VALUE ...]] */
static row read_row(const settings *s, const option *o, const char *word)
{
    row r;
    const char *names = besa_option_table()->value; /* its first row is the method */
    size_t at = strcspn(word, ":");
    int method = find_choice(names, word, at);
    memset(&r, 0, sizeof r);
    if (method < 0) usage_error(s, "--%s: '%s' is not one of %s", o->name, word, names);
    snprintf(r.label, sizeof r.label, "%s", word);
    r.method = (besa_method)method;
    while (word[at]) {
        const size_t n = strcspn(word + at + 1, ":,");
        read_row_part(s, o, &r, word + at + 1, n);
        at += 1 + n;
    }
    if (method != BESA_METHOD_BESA && r.preset[0] && strcmp(r.preset, "weights"))
        usage_error(s, "--%s: '%s': only besa has presets other than weights", o->name, word);
    return r;
}

/* How long the first word of a list is: "KEY=VALUE" behind a comma belongs to the method before it, as in
 * "besa:epochs=2,lr=3". */
static size_t word_length(const option *o, const char *text)
{
    size_t n = strcspn(text, ",");
    while (o->kind == METHODS && text[n] == ',') {
        const size_t key = strcspn(text + n + 1, ":=,");
        if (text[n + 1 + key] != '=') break;
        n += 1 + strcspn(text + n + 1, ",");
    }
    return n;
}

/* Whether value i of a list is there before: its runs would be the same, and count twice in means. */
static int is_repeated(const settings *s, const option *o, int i)
{
    const int64_t *whole = o->kind == COUNTS ? s->counts : s->seeds;
    for (int k = 0; k < i; k++) {
        if (o->kind == METHODS && !strcmp(s->rows[k].label, s->rows[i].label)) return 1;
        if (o->kind == SHARES && s->sparsity[k] == s->sparsity[i]) return 1;
        if (o->kind != METHODS && o->kind != SHARES && whole[k] == whole[i]) return 1;
    }
    return 0;
}

/* "a,b,c", each a sparsity, a method, a calibration size or a seed */
static void read_list(settings *s, const option *o, const char *text)
{
    int count = 0, more = 1;
    for (; more; count++) {
        char word[MAX_NAME];
        const size_t n = word_length(o, text);
        if (n >= sizeof word || count == MAX_LIST) usage_error(s, "--%s: the list is too long", o->name);
        snprintf(word, sizeof word, "%.*s", (int)n, text);
        if (o->kind == METHODS) s->rows[count] = read_row(s, o, word);
        else if (o->kind == SHARES) s->sparsity[count] = read_number(s, o, word);
        else (o->kind == COUNTS ? s->counts : s->seeds)[count] = (int64_t)read_number(s, o, word);
        if (is_repeated(s, o, count)) usage_error(s, "--%s: %s is there twice: expected different values", o->name, word);
        more = text[n] == ',';
        text += n + 1;
    }
    if (o->kind == METHODS) s->num_rows = count;
    else if (o->kind == SHARES) s->num_sparsities = count;
    else *(o->kind == COUNTS ? &s->num_counts : &s->num_seeds) = count;
}

/* "FILE" or "NAME=FILE"; the name of a FILE alone is its own without directories and ending. */
static void read_test(settings *s, const option *o, const char *text)
{
    const char *equals = strchr(text, '='), *slash;
    if (equals && (equals == text || memchr(text, '/', (size_t)(equals - text)) || !access(text, F_OK))) equals = NULL;
    if (s->num_tests == MAX_TESTS) usage_error(s, "--%s: more than %d files", o->name, MAX_TESTS);
    test_file *t = &s->tests[s->num_tests];
    t->path = equals ? equals + 1 : text;
    slash = strrchr(t->path, '/');
    const char *base = slash ? slash + 1 : t->path, *dot = strrchr(base, '.');
    const char *name = equals ? text : base;
    const size_t n = equals ? (size_t)(equals - text) : dot && dot > base ? (size_t)(dot - base) : strlen(base);
    if (!*t->path) usage_error(s, "--%s: '%s' has no file behind its name", o->name, text);
    snprintf(t->name, sizeof t->name, "%.*s", (int)n, name);
    for (int i = 0; i < s->num_tests; i++)
        if (!strcmp(s->tests[i].name, t->name))
            usage_error(s, "--%s: two files are called %s: --%s NAME=FILE gives another name", o->name, t->name, o->name);
    s->num_tests++;
}

/* "cpu", "cuda" or "cuda:1" */
static void read_device(settings *s, const option *o, const char *text)
{
    s->cuda = strncmp(text, "cuda", 4) == 0;
    s->gpu.device = 0;
    if (s->cuda && text[4] == ':') s->gpu.device = (int)read_number(s, o, text + 5);
    else if (strcmp(text, s->cuda ? "cuda" : "cpu"))
        usage_error(s, "--%s: '%s' is not cpu, cuda or cuda:N, as cuda:1", o->name, text);
}

static void read_value(settings *s, const option *o, const char *text)
{
    void *field = (char *)s + o->offset;
    int choice;
    switch (o->kind) {
    case HEADING: case LIBRARY: case FLAG: break;
    case TEXT: *(const char **)field = text; break;
    case CHOICE:
        choice = find_choice(o->value, text, strlen(text));
        if (choice < 0) usage_error(s, "--%s: '%s' is not one of %s", o->name, text, o->value);
        memcpy(field, &choice, sizeof choice); /* the field is an enum */
        break;
    case PATTERN: read_pattern(s, o, text); break;
    case SKIP: case FIX: read_fixed(s, o, text); break;
    case BLOCKS: read_blocks(s, o, text); break;
    case TARGETS: (!strcmp(text, "owl") || !strncmp(text, "owl:", 4) ? read_owl : read_targets)(s, o, text); break;
    case METHODS: case SHARES: case COUNTS: case SEEDS: read_list(s, o, text); break;
    case TESTS: read_test(s, o, text); break;
    case NUMBER: write_number(o, field, read_number(s, o, text)); break;
    case ROWS: *(int64_t *)field = strcmp(text, "all") ? (int64_t)read_number(s, o, text) : BESA_ALL_ROWS; break;
    case THREADS: *(int *)field = (int)read_number(s, o, text); break;
    case COUNT: case SEED: *(int64_t *)field = (int64_t)read_number(s, o, text); break;
    case BYTES: *(size_t *)field = (size_t)read_number(s, o, text); break;
    case DEVICE: read_device(s, o, text); break;
    case PROCESSORS: *(int *)field = (int)read_number(s, o, text); break;
    case CAPABILITY: *(int *)field = (int)(10 * read_number(s, o, text) + 0.5); break;
    }
}

/* Options of these headings mean nothing to runs that do not learn so. */
static void note_heading(settings *s, const option *o)
{
    const option *heading = o;
    while (heading->kind != HEADING) heading--;
    if (strncmp(heading->name, "BESA", 4) == 0) s->besa_option = o->name;
    if (s->besa_option == o->name && o->offset - AT(prune.rates) < sizeof(besa_rate_options)) s->rates_option = o->name;
    if (strncmp(heading->name, "Learning", 8) == 0) s->learning_option = o->name;
    if (strncmp(heading->name, "Weights", 7) == 0) s->weight_option = o->name;
    if (strncmp(heading->name, "Quantisation", 12) == 0) s->bits_option = o->name;
}

/* The command's option of that name, or NULL. */
static const option *find_option(const settings *s, const char *name)
{
    for (int i = 0; i < s->num_options; i++) {
        const option *o = &s->options[i];
        if (o->kind != HEADING && (o->commands & s->command->bit) && strcmp(o->name, name) == 0) return o;
    }
    return NULL;
}

/* Is a "no-" and then b? */
static int negates(const char *a, const char *b) { return strncmp(a, "no-", 3) == 0 && strcmp(a + 3, b) == 0; }

/* Whether a word is this flag, or its opposite. */
static int is_flag(const option *o, const char *word)
{
    return o->kind == FLAG && (!strcmp(o->name, word) || negates(o->name, word) || negates(word, o->name));
}

/* --flag sets; --no-flag, or --projection for --no-projection, takes back what a preset has set. */
static int read_flag(settings *s, const char *name)
{
    for (int i = 0; i < s->num_options; i++) {
        const option *o = &s->options[i];
        int same = strcmp(o->name, name) == 0;
        if (o->kind != FLAG || !(o->commands & s->command->bit)) continue;
        if (!same && !negates(o->name, name) && !negates(name, o->name)) continue;
        *(int *)(void *)((char *)s + o->offset) = same;
        note_heading(s, o);
        return 1;
    }
    return 0;
}

/* How many characters must be put in, left out, changed or swapped with the next to make one word of another. */
static size_t distance(const char *a, const char *b)
{
    size_t d[3][MAX_NAME + 1]; /* of prefixes of a with all prefixes of b: the one before the last, the last, the new one */
    const size_t n = strlen(a), m = strlen(b);
    if (n > MAX_NAME || m > MAX_NAME) return MAX_NAME;
    memset(d, 0, sizeof d);
    for (size_t j = 0; j <= m; j++) d[1][j] = j;
    for (size_t i = 1; i <= n; i++) {
        d[2][0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t least = d[1][j - 1] + (a[i - 1] != b[j - 1]);
            if (d[1][j] + 1 < least) least = d[1][j] + 1;
            if (d[2][j - 1] + 1 < least) least = d[2][j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && d[0][j - 2] + 1 < least) least = d[0][j - 2] + 1;
            d[2][j] = least;
        }
        memmove(d[0], d[1], 2 * sizeof d[0]);
    }
    return d[1][m];
}

/* Whether a word may be a slip of the pen for name, which is then the nearest so far. */
static void take_nearest(const char *word, const char *name, const char **nearest, size_t *least)
{
    const size_t d = distance(word, name);
    if (d >= *least || d > (strlen(word) + 2) / 4) return;
    *nearest = name;
    *least = d;
}

/* An option that the command does not have: of which commands is it one? */
_Noreturn static void refuse_option(const settings *s, const char *name)
{
    int takers = 0;
    size_t length = 0;
    char names[MAX_NAME] = "";
    for (int i = 0; i < s->num_options; i++) {
        const option *o = &s->options[i];
        const int same = !strcmp(o->name, name) || (o->kind == FLAG && (negates(o->name, name) || negates(name, o->name)));
        if (same && o->kind != HEADING) takers |= o->commands;
    }
    for (const command *c = s->commands; c->name; c++)
        if (takers & c->bit)
            length += (size_t)snprintf(names + length, sizeof names - length, "%s%s", length ? ", " : "", c->name);
    const char *nearest = NULL;
    size_t least = MAX_NAME;
    for (int i = 0; i < s->num_options; i++)
        if (s->options[i].kind != HEADING && s->options[i].commands & s->command->bit)
            take_nearest(name, s->options[i].name, &nearest, &least);
    if (!takers && nearest) usage_error(s, "unknown option --%s: did you mean --%s?", name, nearest);
    if (!takers) usage_error(s, "unknown option --%s", name);
    usage_error(s, "--%s is for %s", name, names);
}

/* Read "--flag", "--name value" or "--name=value" at arguments[i]; returns how many arguments that took. */
static int read_option(settings *s, int i)
{
    const char *argument = strcmp(s->arguments[i], "-h") ? s->arguments[i] : "--help";
    const char *equals = strchr(argument, '=');
    char name[MAX_NAME];
    if (strncmp(argument, "--", 2)) usage_error(s, "unknown option %s", argument);
    snprintf(name, sizeof name, "%.*s", (int)strcspn(argument + 2, "="), argument + 2);
    if (!equals && read_flag(s, name)) return 1;
    const option *o = find_option(s, name);
    if (!o) refuse_option(s, name);
    if (o->kind == FLAG) usage_error(s, "--%s takes no value", name);
    const char *value = equals ? equals + 1 : s->arguments[i + 1];
    if (!value || !*value) usage_error(s, "--%s needs a value: --%s %s", name, name, o->value);
    read_value(s, o, value);
    note_heading(s, o);
    return equals ? 1 : 2;
}

/* The name of the option at arguments[i], and how many arguments it takes. */
static int argument_length(const settings *s, int i, char name[MAX_NAME])
{
    const char *argument = s->arguments[i] + 2;
    snprintf(name, MAX_NAME, "%.*s", (int)strcspn(argument, "="), argument);
    if (strchr(argument, '=')) return 1;
    for (int k = 0; k < s->num_options; k++)
        if (s->options[k].commands & s->command->bit && is_flag(&s->options[k], name)) return 1;
    return 2;
}

/* What a comparison has where its lists are not given: with a pattern, besa only where it is to do more than learn rates. */
static void fill_lists(settings *s)
{
    const int has_pattern = s->prune.pattern_m != 0, without = has_pattern && !s->preset && s->prune.learn == BESA_LEARN_RATES;
    const char *methods = without ? "magnitude,wanda,sparsegpt" : "magnitude,wanda,sparsegpt,besa";
    s->left_out = without && s->num_rows == 0;
    if (s->num_rows == 0) read_list(s, find_option(s, "method"), methods);
    if (s->num_sparsities > 0) return;
    s->num_sparsities = 1;
    s->sparsity[0] = has_pattern ? (double)s->prune.pattern_n / s->prune.pattern_m : s->prune.block_targets ? s->block_mean : 0.5;
}

enum { UNSET = -1 };

/* A preset (or NULL) is where the method's options start from; the whole command line is then laid over it. */
static void read_arguments(settings *s, const char *preset)
{
    besa_error error = {BESA_OK, ""};
    memset(&s->prune, 0, sizeof s->prune);
    s->prune.rates.target = UNSET;
    if (preset && besa_preset(&s->prune, preset, &error)) usage_error(s, "--preset: %s", error.message);
    s->num_paths = s->num_sparsities = s->num_rows = s->num_tests = s->num_counts = s->num_seeds = 0;
    for (int i = 0; s->arguments[i];) {
        if (s->arguments[i][0] == '-') i += read_option(s, i);
        else if (s->num_paths < s->command->max_paths) s->path[s->num_paths++] = s->arguments[i++];
        else usage_error(s, "'%s' is one argument too many", s->arguments[i]);
    }
    if (s->command->bit == COMPARE) fill_lists(s);
    s->has_sparsity = s->prune.rates.target != UNSET;
    if (s->prune.rates.target == UNSET) /* 0: the pattern's */
        s->prune.rates.target = s->prune.pattern_m ? 0 : s->prune.block_targets ? s->block_mean : 0.5;
}

/* The preset of a row: its own, else --preset; of best, other methods than besa have what they can. */
static const char *row_preset(const settings *s, const row *r)
{
    if (r->preset[0] || !s->preset) return r->preset[0] ? r->preset : s->preset;
    return r->method != BESA_METHOD_BESA && !strcmp(s->preset, "best") ? "weights" : s->preset;
}

/* The option of a row's "KEY=VALUE": one of the method, not of the run or its data. */
static const option *find_row_option(const settings *s, const row *r, const char *setting)
{
    char key[MAX_NAME];
    const char *nearest = NULL;
    size_t least = MAX_NAME;
    snprintf(key, sizeof key, "%.*s", (int)strcspn(setting, "="), setting);
    for (int i = 0; i < s->num_options; i++) {
        const option *o = &s->options[i];
        const int is_field = o->offset >= AT(prune) && o->offset < AT(prune) + sizeof s->prune &&
                             (o->kind == FLAG || o->kind == CHOICE || o->kind == NUMBER || o->kind == ROWS);
        const int is_own = is_field || o->kind == PATTERN || o->kind == SKIP || o->kind == FIX || o->kind == BLOCKS;
        if (!(o->commands & COMPARE) || !is_own) continue;
        if (!strcmp(o->name, key) || is_flag(o, key)) return o;
        take_nearest(key, o->name, &nearest, &least);
    }
    if (nearest) usage_error(s, "--method: '%s': a row has no option %s: did you mean %s?", r->label, key, nearest);
    usage_error(s, "--method: '%s': a row has no option %s", r->label, key);
}

/* Lay a row's own options over those of the command line. */
static void read_settings(settings *s, const row *r)
{
    for (int i = 0; i < r->num_settings; i++) {
        const char *value = strchr(r->setting[i], '=') + 1;
        const option *o = find_row_option(s, r, r->setting[i]);
        const size_t n = strlen(o->name);
        const int yes = !strcmp(value, "yes"), same = !strncmp(r->setting[i], o->name, n) && r->setting[i][n] == '=';
        if (!*value)
            usage_error(s, "--method: '%s': %s needs a value: %s", r->label, o->name, o->kind == FLAG ? "yes or no" : o->value);
        if (o->kind != FLAG) read_value(s, o, value);
        else if (!yes && strcmp(value, "no")) usage_error(s, "--method: '%s': %s is yes or no", r->label, o->name);
        else *(int *)(void *)((char *)s + o->offset) = yes == same;
    }
}

/* Whether an option says which layers there are to prune, or how much of a block. */
static int chooses_layers(const option *o)
{
    return o->kind == PATTERN || o->kind == SKIP || o->kind == FIX || o->kind == BLOCKS || !strcmp(o->name, "depth-slope");
}

/* What a row sets must be of use to it. */
static void check_settings(const settings *s, const row *r)
{
    const int clips = s->prune.bits && s->prune.clipping == BESA_CLIPPING_LEARNED;
    const int learns = r->method == BESA_METHOD_BESA || s->prune.learn != BESA_LEARN_RATES || clips;
    for (int i = 0; i < r->num_settings; i++) {
        const option *o = find_row_option(s, r, r->setting[i]), *heading = o;
        while (heading->kind != HEADING) heading--;
        if (s->owl && chooses_layers(o))
            usage_error(s, "--method: '%s': --block-targets owl finds sparsities for all rows at once: expected no blocks, skip, fix, pattern "
                        "and depth-slope in a row", r->label);
        if (!strncmp(heading->name, "BESA", 4) && r->method != BESA_METHOD_BESA)
            usage_error(s, "--method: '%s': %s is for besa", r->label, o->name);
        if (!strncmp(heading->name, "Learning", 8) && !learns)
            usage_error(s, "--method: '%s': %s is for what learns: besa, or rows with learn=weights", r->label, o->name);
        if (!strncmp(heading->name, "Weights", 7) && (!learns || (s->prune.learn == BESA_LEARN_RATES && !s->prune.bits)))
            usage_error(s, "--method: '%s': %s is for weights that learn: with learn=weights or learn=both", r->label, o->name);
        if (!strncmp(heading->name, "Quantisation", 12) && !s->prune.bits)
            usage_error(s, "--method: '%s': %s is for bits=N", r->label, o->name);
    }
}

/* Set the options of row i. */
static row begin_row(settings *s, int i)
{
    const row r = s->rows[i];
    read_arguments(s, row_preset(s, &r));
    s->prune.method = r.method;
    if (r.method != BESA_METHOD_BESA && s->prune.learn == BESA_LEARN_BOTH) s->prune.learn = BESA_LEARN_WEIGHTS;
    read_settings(s, &r);
    check_settings(s, &r);
    return r;
}

/* Whether a row sets this option for itself, to another value than `but`. */
static int a_row_sets(const settings *s, const char *name, const char *but)
{
    for (int i = 0; i < s->num_rows; i++)
        for (int k = 0; k < s->rows[i].num_settings; k++) {
            const char *setting = s->rows[i].setting[k];
            const size_t n = strlen(name);
            if (!strncmp(setting, name, n) && setting[n] == '=' && strcmp(setting + n + 1, but)) return 1;
        }
    return 0;
}

/* Where a file that need not exist would be: its directory without links, and its name. NULL: no such directory. */
static char *place_of(const char *path)
{
    char *copy = (char *)malloc(strlen(path) + 2), *slash, *directory, *place = NULL;
    if (!copy) return NULL;
    strcpy(copy, path);
    while ((slash = strrchr(copy, '/')) != NULL && slash != copy && !slash[1]) *slash = 0; /* trailing ones */
    const char *name = slash ? slash + 1 : copy;
    size_t length = slash ? (size_t)(slash - copy) : 0;
    char *parent = (char *)malloc(length + 2);
    if (parent) {
        snprintf(parent, length + 2, "%.*s%s", (int)length, copy, length ? "" : slash ? "/" : ".");
        directory = realpath(parent, NULL);
        place = directory ? (char *)malloc(strlen(directory) + strlen(name) + 2) : NULL;
        if (place) sprintf(place, "%s/%s", directory, name);
        free(directory);
    }
    free(parent);
    free(copy);
    return place;
}

/* Whether a file that is there is this one, by whatever name. */
static int is_file(const struct stat *there, int directory, const char *name)
{
    struct stat st;
    return !fstatat(directory, name, &st, 0) && st.st_dev == there->st_dev && st.st_ino == there->st_ino;
}

/* Files that are written are different ones; rates and masks may be in one, and a comparison may go on with its own. */
static void check_outputs(const settings *s)
{
    const char *path[] = {s->rates, s->save_masks, s->report, s->trace, s->json_file, s->resume, s->markdown};
    static const char *const name[] = {"save-rates", "save-masks", "report", "trace", "json", "resume", "markdown"};
    for (int i = 0; i < 7; i++)
        for (int k = 0; k < i && path[i]; k++) {
            if (!path[k] || (i == 1 && !strcmp(path[0], path[1])) || (path[i] == s->resume && path[k] == s->json_file)) continue;
            struct stat there;
            char *one = place_of(path[i]), *two = place_of(path[k]);
            const int is_linked = !stat(path[i], &there) && S_ISREG(there.st_mode) && is_file(&there, AT_FDCWD, path[k]);
            const int is_same = one && two && !strcmp(one, two);
            free(one), free(two);
            if (is_same || is_linked) usage_error(s, "--%s and --%s are one file", name[k], name[i]);
        }
}

/* A report, or another file that is written, must not lie in the checkpoints, nor take the place of the output or of a file
 * that is read, by its name or through a link. */
static void check_report(const settings *s, const char *name, const char *path)
{
    const char *directories[] = {s->path[0], s->against, s->masks, s->num_paths > 1 ? s->path[1] : NULL}; /* the last need not exist */
    const char *files[MAX_TESTS + 4] = {s->targets_path, s->masks, s->tokens, s->test}, *endings[] = {"", ".partial"};
    char *report = place_of(path), *other;
    struct stat there;
    const int is_there = !stat(path, &there);
    for (int i = 0; i < s->num_tests; i++) files[4 + i] = s->tests[i].path;
    if (is_there && !S_ISREG(there.st_mode) && !S_ISCHR(there.st_mode)) usage_error(s, "--%s %s is no file", name, path);
    for (int i = 0; report && i < MAX_TESTS + 4; i++) {
        other = files[i] ? place_of(files[i]) : NULL;
        if (other && (!strcmp(report, other) || (is_there && is_file(&there, AT_FDCWD, files[i]))))
            usage_error(s, "--%s %s is %s", name, path,
                        i == 0 ? "the file of --block-targets" : i == 1 ? "the file of --masks" : "a file of tokens");
        free(other);
    }
    for (int i = 0; report && i < 4; i++) {
        other = !directories[i] ? NULL : i < 3 ? realpath(directories[i], NULL) : place_of(directories[i]);
        size_t length = other ? strlen(other) : 0;
        for (int k = 0; other && k < 2; k++) {
            size_t n = strlen(endings[k]);
            if (!strncmp(report, other, length) && !strncmp(report + length, endings[k], n) && strchr("/", report[length + n]))
                usage_error(s, "--%s %s lies in %s%s", name, path, directories[i], endings[k]);
        }
        free(other);
        DIR *list = is_there && i < 3 && directories[i] ? opendir(directories[i]) : NULL;
        for (struct dirent *e; list && (e = readdir(list)) != NULL;)
            if (is_file(&there, dirfd(list), e->d_name))
                usage_error(s, "--%s %s is %s in %s, by another name", name, path, e->d_name, directories[i]);
        if (list) closedir(list);
    }
    free(report);
}

static int uses_factor(besa_importance importance)
{
#define STATISTIC(value, name, statistic, power, exponent, gradient, relative) statistic,
    static const besa_statistic statistic_of[] = {BESA_IMPORTANCES(STATISTIC)};
#undef STATISTIC
    return statistic_of[importance] == BESA_STATISTIC_FACTOR;
}

/* Options that only some methods look at, where the run has none of these. */
static void check_methods(const settings *s)
{
    unsigned methods = s->command->bit & ONE ? 1u << s->prune.method : 0;
    int weights = s->prune.learn != BESA_LEARN_RATES || a_row_sets(s, "learn", "rates");
    if (s->command->bit & ONE && s->prune.method != BESA_METHOD_BESA && s->prune.learn == BESA_LEARN_BOTH)
        usage_error(s, "--learn both is for --method besa, which has rates: --learn weights is for all methods");
    for (int i = 0; i < s->num_rows; i++) methods |= 1u << s->rows[i].method;
    for (int i = -1; i < s->num_rows; i++) {
        besa_prune_options o;
        const char *preset = i < 0 ? s->preset : row_preset(s, &s->rows[i]);
        memset(&o, 0, sizeof o);
        weights |= preset && besa_preset(&o, preset, NULL) == BESA_OK && o.learn != BESA_LEARN_RATES;
        if (i < 0 && s->command->bit & ONE && s->prune.method != BESA_METHOD_BESA && o.learn == BESA_LEARN_BOTH)
            usage_error(s, "--preset %s is for --method besa: --preset weights is for all methods", preset);
    }
    const int besa = (methods & 1u << BESA_METHOD_BESA) != 0, sparsegpt = (methods & 1u << BESA_METHOD_SPARSEGPT) != 0;
    if (s->besa_option && !besa) usage_error(s, "--%s is for --method besa", s->besa_option);
    if (s->rates_option && s->prune.pattern_m) usage_error(s, "--%s is about rates, and --pattern leaves none to learn", s->rates_option);
    const int clips = s->prune.bits != 0 && s->prune.clipping == BESA_CLIPPING_LEARNED;
    if (s->learning_option && !besa && !weights && !clips)
        usage_error(s, "--%s is for what learns: --method besa or --learn weights", s->learning_option);
    if (s->weight_option && !weights && !clips) usage_error(s, "--%s is for --learn weights or both", s->weight_option);
    if (s->bits_option && !s->prune.bits && !a_row_sets(s, "bits", "")) usage_error(s, "--%s is for --bits N", s->bits_option);
    if (s->prune.magnitude_per_row && !(methods & 1u << BESA_METHOD_MAGNITUDE))
        usage_error(s, "--per-row is for --method magnitude");
    const int rows_may = a_row_sets(s, "refit", "none") || a_row_sets(s, "importance", "wanda");
    if (s->prune.damping > 0 && !sparsegpt && !(besa && uses_factor(s->prune.importance)) && !s->prune.refit && !rows_may)
        usage_error(s, "--damping is for --method sparsegpt, for --method besa with its importances, or for --refit");
    if (s->prune.refit_steps > 0 && s->prune.refit != BESA_REFIT_CG && !a_row_sets(s, "refit", "obs"))
        usage_error(s, "--refit-steps is for --refit cg");
}

static void check_arguments(settings *s)
{
    if (s->num_paths < s->command->min_paths) usage_error(s, "it wants %s", s->command->paths);
    if (!s->tokens && !s->num_tests && s->command->bit & (PRUNE | COMPARE | EVAL)) usage_error(s, "--tokens FILE is missing");
    if (!s->tokens && s->command->bit == COMPARE) usage_error(s, "--tokens FILE is missing");
    if (!s->num_tests && s->command->bit == COMPARE) usage_error(s, "--test FILE is missing");
    if (s->num_seeds && s->seed) usage_error(s, "--seed and --seeds are both given: expected one of them");
    if (!s->test && s->command->bit == PRUNE && (s->windows || s->test_seqlen))
        usage_error(s, "--windows and --test-seqlen are about --test FILE, which is missing");
    if (s->test_dense && !s->test) usage_error(s, "--test-dense is about --test FILE, which is missing");
    if (s->command->bit == PLAN && !s->test && !s->windows && s->test_seqlen)
        usage_error(s, "--test-seqlen is about --test FILE or --windows K, which are missing");
    if (s->command->bit == PLAN && !s->tokens && s->seed)
        usage_error(s, "--seed is about --tokens FILE, which is missing");
    if (s->cuda && (s->threads || s->bf16))
        usage_error(s, "--%s is for the CPU, not for --device cuda", s->threads ? "threads" : "bf16");
    if (!s->cuda && (s->gpu.fp32 || s->absent.memory))
        usage_error(s, "--%s is for --device cuda", s->gpu.fp32 ? "fp32" : "device-memory");
    if (!s->absent.memory && (s->absent.processors || s->absent.capability))
        usage_error(s, "--%s is of a GPU that is not here: it wants --device-memory", s->absent.processors ? "processors" : "capability");
    if (s->report) check_report(s, "report", s->report);
    if (s->json_file) check_report(s, "json", s->json_file);
    if (s->markdown) check_report(s, "markdown", s->markdown);
    if (s->resume) check_report(s, "resume", s->resume);
    if (s->trace) check_report(s, "trace", s->trace);
    if (s->rates) check_report(s, "save-rates", s->rates);
    if (s->save_masks) check_report(s, "save-masks", s->save_masks);
    check_outputs(s);
    if (s->absent.memory && s->prune.device_memory > s->absent.memory)
        usage_error(s, "--memory is more than --device-memory, what the GPU has");
    if (s->report && s->command->bit == EVAL && s->num_tests > 1) usage_error(s, "--report of eval is about one text");
    int keeps = s->command->bit & ONE && s->prune.method == BESA_METHOD_KEEP;
    for (int i = 0; i < s->num_rows; i++) keeps |= s->rows[i].method == BESA_METHOD_KEEP;
    if (keeps && !s->masks) usage_error(s, "--method keep wants --masks DIR or FILE, whose zeros it keeps");
    if (!keeps && s->masks) usage_error(s, "--masks is for --method keep");
    if (s->command->bit & ONE && keeps && s->has_sparsity)
        usage_error(s, "--sparsity is not for --method keep, whose masks have one");
    if (s->owl && (s->prune.depth_slope != 0 || s->prune.pattern_m || keeps))
        usage_error(s, "--block-targets owl finds a sparsity for every block, but %s has its own",
                    s->prune.depth_slope != 0 ? "--depth-slope" : s->prune.pattern_m ? "--pattern" : "--method keep");
    check_methods(s);
    for (int i = 0; i < s->num_rows; i++) begin_row(s, i);
    if (s->num_rows || s->preset) read_arguments(s, s->preset);
}

/* ---- help ---------------------------------------------------------------------------------- */

static void print_help(const settings *s)
{
    const command *c = s->command;
    printf("usage: besa %s %s [options]\n\n%s", c->name, c->paths, c->text);
    for (int i = 0; i < s->num_options; i++) {
        const option *o = &s->options[i];
        char left[MAX_NAME];
        if (!(o->commands & c->bit)) continue;
        int n = snprintf(left, sizeof left, "--%s %s", o->name, o->value);
        if (o->kind == HEADING) printf("\n%s\n", o->name);
        else printf("  %-22s%s%*s%s\n", left, n > 21 ? "\n" : "", n > 21 ? 24 : 0, "", o->help);
    }
    if (c->bit & RUN)
        printf("\nThe opposite of a flag takes back what a preset sets: --projection, --no-zero-start.\n"
               "published-row has --d-coef 5 and published-layer 50, as the paper for LLaMA-1-7B. Its other runs had\n"
               "by row 5 (1-13B, 2-7B, 2-13B), 10 (1-30B), 50 (1-65B, 2-70B), by layer 0.5 (1-13B, 1-65B, 2-70B),\n"
               "0.05 (1-30B, 2-7B, 2-13B).\n");
}

static void print_general_help(FILE *file, const command *c)
{
    fprintf(file, "besa %d.%d prunes Hugging Face checkpoints of Llama and its relatives; README lists them.\n\n",
            BESA_VERSION_MAJOR, BESA_VERSION_MINOR);
    for (; c->name; c++) fprintf(file, "  besa %-7s %-9s  %s\n", c->name, c->paths, c->summary);
    fprintf(file, "\n"
        "besa help COMMAND explains a command. Text goes in as files of token ids, which tokenize.py makes.\n"
        "To try it on the model that lies beside this program, in that directory:\n\n"
        "  ./besa prune stories260K stories260K-pruned --tokens stories260K/calibration_tokens.npy --seqlen 256\n"
        "  ./besa eval stories260K-pruned --tokens stories260K/test_tokens.npy --seqlen 256\n\n"
        "It runs on the CPU. For an NVIDIA GPU build it with `make -C examples cuda`, which wants the CUDA toolkit,\n"
        "and add --device cuda to prune, eval, compare or plan.\n\n"
        "Exit status: 0 where all went well; 1 where the work fails; 2 for a wrong command line; 130 after Ctrl-C.\n");
}
