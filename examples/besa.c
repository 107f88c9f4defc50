/* besa - prune LLaMA-family checkpoints from the command line. `besa --help` explains it.
 *
 * options.h reads the command line, compare.h has eval and compare, card.h writes the model's card; here are progress, the other
 * commands, and main. */
#ifdef BESA_WITH_CUDA /* `make cuda`: the implementation is in besa_cuda.cu, which nvcc compiles */
#define _DEFAULT_SOURCE 1
#else
#define BESA_IMPLEMENTATION
#endif
#include "../besa.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "options.h"
#include "card.h"
#ifdef BESA_WITH_PROCESSES /* `make mpi`, `make nccl`: several processes work on one run */
#include "processes.h"
#else
static const besa_comm *besa_processes_begin(int *device) { return *device = 0, NULL; }
static int besa_processes_end(int status) { return status; }
#endif

#define TRY(call)                                                                                  \
    do {                                                                                           \
        besa_result try_result = (call);                                                           \
        if (try_result != BESA_OK) return try_result;                                              \
    } while (0)

/* ---- numbers and progress ------------------------------------------------------------------ */

typedef struct text { char s[32]; } text;

/* 1234567 as "1.23 M" */
static text with_unit(double x, const char *unit)
{
    static const char *const prefix[] = {"", "k", "M", "G", "T", "P", "E"};
    text t;
    int i = 0;
    for (; x >= 999.5 && i < 6; i++) x /= 1000;
    snprintf(t.s, sizeof t.s, "%.3g %s%s", x, prefix[i], unit);
    return t;
}

/* Seconds as 0:07 or 1:02:03 */
static text as_clock(double seconds)
{
    text t;
    long long n = seconds > 0 && seconds < 1e12 ? (long long)(seconds + 0.5) : 0;
    if (n < 3600) snprintf(t.s, sizeof t.s, "%lld:%02lld", n / 60, n % 60);
    else snprintf(t.s, sizeof t.s, "%lld:%02lld:%02lld", n / 3600, n / 60 % 60, n % 60);
    return t;
}

/* Seconds as "under 1 min", "12 min" or "2 h 05 min": what is left need not be told to the second. */
static text in_minutes(double seconds)
{
    text t;
    const long long n = seconds > 0 && seconds < 1e12 ? (long long)(seconds / 60 + 0.5) : 0;
    if (n < 1) snprintf(t.s, sizeof t.s, "under 1 min");
    else if (n < 60) snprintf(t.s, sizeof t.s, "%lld min", n);
    else snprintf(t.s, sizeof t.s, "%lld h %02lld min", n / 60, n % 60);
    return t;
}

/* A text as a JSON string; \ufffd stands for a byte that is of no character, as a file's name may have. */
static void put_string(FILE *file, const char *string)
{
    putc('"', file);
    for (const unsigned char *c = (const unsigned char *)string; *c; c++) {
        const int length = utf8_length(c);
        if (length != 1) fprintf(file, length ? "%.*s" : "%.*s\\ufffd", length, (const char *)c);
        else if (*c == '\n') fprintf(file, "\\n");
        else if (*c < 0x20 || *c == 0x7F) fprintf(file, "\\u%04x", *c);
        else fprintf(file, *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
        c += length > 1 ? length - 1 : 0;
    }
    putc('"', file);
}

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* As many as besa_cpu_backend takes where none are asked for. */
static int default_threads(void)
{
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static volatile sig_atomic_t interrupted; /* Ctrl-C was pressed, or SIGTERM came */

static void on_interrupt(int number)
{
    interrupted = 1;
    signal(number, SIG_DFL); /* pressed again, it ends the program at once */
}

/* Several runs: FLOP of all, of those that are done, of the one that goes on, and the seconds of those that are done. */
typedef struct work_left { double all, done, now, seconds; } work_left;

/* What they may take from here on, `fraction` and `seconds` into a run; 0: nothing is known yet. */
static double seconds_left(const work_left *w, double fraction, double seconds)
{
    const double done = w->done + fraction * w->now;
    return done > 0 ? (w->all - done) / done * (w->seconds + seconds) : 0;
}

typedef struct progress_view {
    const char *label;
    int quiet, terminal;
    int64_t block;
    double drawn;          /* when, in the run's seconds */
    const work_left *work; /* of the runs that this is one of; or NULL */
    int resumed;           /* 1: it is said where a run goes on */
    int64_t taken_over;    /* blocks of a run before */
} progress_view;

/* How wide the terminal is now: it may have been resized since the last line. */
static int terminal_columns(void)
{
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

/* A line that is no wider than the terminal, whose last column stays free: label, bar, figures. Where there is less room the
 * bar becomes shorter, then figures go, and then the label's end. */
static void draw_bar(progress_view *view, const besa_progress *p)
{
    static const char full[] = "####################", empty[] = "....................";
    char line[512], left[96], block[64];
    const int columns = terminal_columns() - 1;
    int label = (int)strlen(view->label), n = snprintf(left, sizeof left, ", %s left", in_minutes(p->seconds_left).s);
    const text all = in_minutes(view->work ? seconds_left(view->work, p->fraction, p->seconds) : 0);
    if (view->work && label + n + 6 + 10 + (int)strlen(all.s) > columns) n = 0;
    if (view->work) snprintf(left + n, sizeof left - (size_t)n, ", %s in all", all.s);
    n = snprintf(block, sizeof block, ", block %lld/%lld %s", (long long)p->block + 1, (long long)p->blocks,
                 besa_pass_name(p->pass));
    if (label + 6 + n + (int)strlen(left) > columns) block[0] = 0;
    const int most = columns - 6 - (int)strlen(left);
    if (label > most) label = most > 0 ? most : 0;
    const int room = columns - label - 9 - (int)strlen(block) - (int)strlen(left);
    const int width = room < 5 ? 0 : room < 20 ? room : 20;
    const int done = (int)(p->fraction * width);
    n = snprintf(line, sizeof line, "%.*s ", label, view->label);
    if (width) n += snprintf(line + n, sizeof line - (size_t)n, "[%.*s%.*s] ", done, full, width - done, empty);
    snprintf(line + n, sizeof line - (size_t)n, "%3.0f %%%s%s", p->fraction * 100, block, left);
    if (columns < (int)strlen(line)) line[columns > 0 ? columns : 0] = 0;
    fprintf(stderr, "\r");
    print_text(stderr, line);
    fprintf(stderr, "\033[K");
    view->drawn = p->seconds;
}

static void end_progress(const progress_view *view)
{
    if (view->drawn >= 0) fprintf(stderr, "\r\033[K");
}

/* Blocks are counted from 1, as in the bar. */
static void say_resumed(progress_view *view, const besa_progress *p)
{
    if (view->resumed || !p->resumed_blocks) return;
    view->resumed = 1;
    end_progress(view);
    if (p->resumed_blocks == p->blocks) fprintf(stderr, "resuming: all %lld blocks are done\n", (long long)p->blocks);
    else fprintf(stderr, "resuming at block %lld of %lld\n", (long long)p->resumed_blocks + 1, (long long)p->blocks);
}

static int show_progress(void *user, const besa_progress *p)
{
    progress_view *view = (progress_view *)user;
    view->taken_over = p->resumed_blocks;
    if (view->quiet) return interrupted;
    say_resumed(view, p);
    if (view->terminal && (view->drawn < 0 || p->seconds - view->drawn > 0.1)) draw_bar(view, p);
    if (!view->terminal && p->block > view->block)
        fprintf(stderr, "%s: %lld of %lld blocks in %s, %s left\n", view->label, (long long)p->block,
                (long long)p->blocks, as_clock(p->seconds).s, as_clock(p->seconds_left).s);
    view->block = p->block;
    return interrupted;
}

static progress_view begin_progress(const settings *s, const char *label)
{
    progress_view view = {label, s->quiet, isatty(STDERR_FILENO), 0, -1, NULL, 0, 0};
    if (s->command->bit == COMPARE && !view.terminal) view.quiet = 1; /* the growing table shows it */
    return view;
}

/* ---- what the commands share --------------------------------------------------------------- */

struct job {
    settings *s;
    besa_checkpoint *checkpoint, *masks; /* masks: NULL without --masks */
    besa_backend backend;
    const besa_comm *comm; /* NULL: one process */
    besa_calibration calibration;
    int32_t *ids, *test_ids;
    int64_t ids_seed;            /* that ids were drawn by */
    int64_t first[MAX_TESTS + 1];         /* of eval and compare: the windows of test i are first[i] .. first[i + 1] - 1 */
    int64_t seqlen;                       /* their tokens */
    besa_checkpoint *against;    /* NULL without --against */
    besa_reference reference;    /* what others are held against: filled in or its sizes alone */
    int has_outliers;
    char sha256[2][65];          /* of the files that these are from */
    char text_sha256[65];        /* of a comparison's calibration text when it began: its tests come to sha256 too */
    char *card;                  /* the output's README.md */
    double outliers[MAX_BLOCKS]; /* shares of the blocks that are pruned, once they are known */
    besa_error error;
};

static besa_result fail(job *j, besa_result result, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(j->error.message, sizeof j->error.message, format, args);
    va_end(args);
    return result;
}

static besa_result out_of_memory(job *j) { return fail(j, BESA_ERROR_MEMORY, "out of memory"); }

/* Put a file in the place of the last one once it is complete: that is whole at any time. A device is written directly, as is a
 * file beside which nothing can be made, and a link stays one. *lock: a descriptor that holds the file's lock, and then that of the
 * new one; or lock is NULL. */
static besa_result replace_file(job *j, const char *path, besa_result (*put)(FILE *file, void *what), void *what, int *lock)
{
    char part[4096];
    struct stat st, out;
    char *place = realpath(path, NULL); /* NULL where nothing is yet */
    int direct = place ? !stat(place, &st) && !S_ISREG(st.st_mode) : !lstat(path, &st) /* a link to nothing */, held = -1;
    const int is_output = place && !fstat(1, &out) && is_file(&out, AT_FDCWD, place); /* /dev/stdout >FILE */
    direct |= is_output;
    fflush(stdout);
    const int n = snprintf(part, sizeof part, "%s%s", place ? place : path, direct ? "" : ".partial");
    FILE *file = is_output ? fdopen(dup(1), "w") : n > 0 && (size_t)n < sizeof part ? fopen(part, "w") : NULL;
    if (!file && place && !direct) direct = 1, file = fopen(place, "w");
    if (file && place && !direct) fchmod(fileno(file), st.st_mode & 0777);
    besa_result result = file ? put(file, what) : BESA_OK;
    int good = file && !fflush(file) && !ferror(file) && (direct || !fsync(fileno(file))), why = errno;
    if (good && lock && !direct) held = dup(fileno(file)); /* what holds a lock is the open file, by whatever descriptor */
    if (held >= 0) flock(held, LOCK_EX | LOCK_NB);
    if (file && fclose(file) && good) good = 0, why = errno;
    if (good && !result && !direct && rename(part, place ? place : path)) good = 0, why = errno;
    if (file && !direct && (!good || result)) unlink(part);
    free(place);
    if (held >= 0 && good && !result) {
        close(*lock);
        *lock = held;
    } else if (held >= 0) close(held);
    return result || good ? result : fail(j, BESA_ERROR_WRITE, "%s could not be written: %s", path, strerror(why));
}

/* Refuse more windows than a file has, or longer ones, by the names of the two options. */
static besa_result check_windows(job *j, const char *path, const besa_tokens *file, const char *count_option,
                                 const char *seqlen_option, int64_t count, int64_t seqlen, int one_after_the_other)
{
    char *message = j->error.message;
    const size_t size = sizeof j->error.message;
    const int64_t longest = file->rows ? file->columns : file->count;
    const int64_t most = file->rows ? file->rows : one_after_the_other && seqlen ? file->count / seqlen : INT64_MAX;
    if (seqlen > longest)
        snprintf(message, size, "%s: sequences of %lld tokens asked for, it has %lld%s: the most is --%s %lld", path,
                 (long long)seqlen, (long long)longest, file->rows ? " in a row" : "", seqlen_option, (long long)longest);
    else if (count > most)
        snprintf(message, size, "%s: %lld sequences of %lld tokens asked for, it has %lld of them: the most is --%s %lld", path,
                 (long long)count, (long long)seqlen, (long long)most, count_option, (long long)most);
    return seqlen > longest || count > most ? BESA_ERROR_TOKENS : BESA_OK;
}

/* Cut ids(count, seqlen) out of a token file. Sizes of 0 become the file's own: those of a 2-D file, and of a stream
 * windows of 2048 or what the model takes, at most `most` of them. */
static besa_result load_windows(job *j, const char *path, int64_t most, uint64_t seed, const char *count_option,
                                const char *seqlen_option, int64_t *count, int64_t *seqlen, int32_t **ids)
{
    const besa_config *config = besa_checkpoint_config(j->checkpoint);
    const int64_t longest = config->max_position_embeddings < 2048 ? config->max_position_embeddings : 2048;
    besa_tokens file;
    TRY(besa_tokens_load(&file, path, &j->error));
    if (!*seqlen) *seqlen = file.rows ? file.columns : file.count < longest ? file.count + !file.count : longest;
    if (!*count) *count = file.rows ? file.rows : file.count / *seqlen < most && !seed ? file.count / *seqlen : most;
    if (!*count) *count = 1;
    besa_result result = check_windows(j, path, &file, count_option, seqlen_option, *count, *seqlen, !seed);
    if (!result) *ids = (int32_t *)calloc((size_t)*count, (size_t)*seqlen * sizeof **ids);
    if (!result && !*ids) {
        snprintf(j->error.message, sizeof j->error.message, "%s: out of memory for %lld x %lld tokens", path, (long long)*count,
                 (long long)*seqlen);
        result = BESA_ERROR_MEMORY;
    }
    memcpy(j->sha256[path == j->s->test], file.sha256, sizeof file.sha256);
    if (!result) result = besa_tokens_sample(&file, *count, *seqlen, seed, config->vocab_size, *ids, &j->error);
    besa_tokens_free(&file);
    return result;
}

static besa_result open_backend(job *j)
{
    settings *s = j->s;
    const besa_cpu_options cpu = {s->threads, s->bf16};
    s->absent.fp32 = s->gpu.fp32;
    if (s->absent.memory) return besa_absent_backend(&j->backend, &s->absent, &j->error);
    if (!s->cuda) return besa_cpu_backend(&j->backend, &cpu, &j->error);
#ifdef BESA_WITH_CUDA
    return besa_cuda_backend(&j->backend, &s->gpu, &j->error);
#else
    snprintf(j->error.message, sizeof j->error.message,
             "--device cuda: this program was built without CUDA; build it with `make -C examples cuda`%s",
             s->command->bit == PLAN ? ", or plan for a GPU that is not here: --device-memory 24G" : "");
    return BESA_ERROR_DEVICE;
#endif
}

/* Whether masks are a file of them; else they are a checkpoint. */
static int is_masks_file(const settings *s)
{
    struct stat st;
    return !stat(s->masks, &st) && !S_ISDIR(st.st_mode);
}

static besa_result open_masks(job *j)
{
    if (!is_masks_file(j->s)) return besa_checkpoint_open(&j->masks, j->s->masks, &j->error);
    return besa_masks_open(&j->masks, j->s->masks, j->checkpoint, &j->error);
}

/* The files of rates and masks that are asked for, from the zeros of a checkpoint. */
static besa_result save_masks(const settings *s, const besa_checkpoint *checkpoint, besa_error *error)
{
    const int both = s->rates && s->save_masks && !strcmp(s->rates, s->save_masks);
    if (s->rates) TRY(besa_masks_save(checkpoint, s->rates, both ? BESA_FILE_RATES | BESA_FILE_MASKS : BESA_FILE_RATES, error));
    return s->save_masks && !both ? besa_masks_save(checkpoint, s->save_masks, BESA_FILE_MASKS, error) : BESA_OK;
}

static besa_result load_tests(job *j, int64_t windows, int64_t *seqlen, const char *seqlen_option); /* in compare.h */

/* Open the checkpoint, the backend and the tokens, as far as the command has them. */
static besa_result open_job(job *j)
{
    const settings *s = j->s;
    besa_calibration *c = &j->calibration;
    TRY(besa_checkpoint_open(&j->checkpoint, s->path[0], &j->error));
    if (s->masks) TRY(open_masks(j));
    if (s->command->bit & EVAL) fprintf(stderr, "%s", besa_checkpoint_notes(j->checkpoint));
    TRY(open_backend(j));
    c->nsamples = s->num_counts ? s->counts[0] : s->nsamples;
    c->seqlen = s->seqlen;
    j->ids_seed = s->num_seeds ? s->seeds[0] : s->seed;
    if (s->command->bit & RUN && s->tokens)
        TRY(load_windows(j, s->tokens, 128, (uint64_t)j->ids_seed, "nsamples", "seqlen", &c->nsamples, &c->seqlen, &j->ids));
    memcpy(j->text_sha256, j->sha256[0], sizeof j->text_sha256);
    if (!c->nsamples) c->nsamples = 128; /* a plan needs no tokens */
    const int64_t longest = besa_checkpoint_config(j->checkpoint)->max_position_embeddings;
    if (!c->seqlen) c->seqlen = longest < 2048 ? longest : 2048;
    c->test_windows = s->windows;
    c->test_seqlen = s->test_seqlen ? s->test_seqlen : c->seqlen;
    if (s->test)
        TRY(load_windows(j, s->test, INT64_MAX, 0, "windows", "test-seqlen", &c->test_windows, &c->test_seqlen, &j->test_ids));
    if (s->command->bit == COMPARE) {
        TRY(load_tests(j, s->windows, &c->test_seqlen, "test-seqlen"));
        j->seqlen = c->test_seqlen;
        c->test_windows = j->first[s->num_tests];
        c->against = &j->reference;
    }
    c->ids = j->ids;
    c->test_ids = j->test_ids;
    c->file = s->tokens;
    c->sha256 = j->sha256[0];
    c->seed = (uint64_t)s->seed;
    c->test_file = s->test;
    c->test_sha256 = j->sha256[1];
    return BESA_OK;
}

static void close_job(job *j)
{
    if (j->backend.destroy) j->backend.destroy(&j->backend);
    besa_checkpoint_close(j->checkpoint);
    besa_checkpoint_close(j->masks);
    besa_reference_free(&j->reference);
    besa_checkpoint_close(j->against);
    free(j->ids);
    free(j->test_ids);
    free(j->card);
}

/* One process, or rank 0 of several: it alone prints and writes. */
static int is_first(const job *j) { return !j->comm || j->comm->rank == 0; }

/* Masks are for the method that keeps them alone: a comparison may have others beside it. */
static void take_masks(job *j)
{
    j->s->prune.comm = j->comm;
    j->s->prune.masks = j->s->prune.method == BESA_METHOD_KEEP ? j->masks : NULL;
}

static besa_result prune(job *j, const char *output, progress_view *view, besa_report *report)
{
    take_masks(j);
    j->s->prune.progress = show_progress;
    j->s->prune.user = view;
    besa_result result = besa_prune(j->checkpoint, output, &j->backend, &j->calibration, &j->s->prune, report,
                                    &j->error);
    end_progress(view);
    return result;
}

/* With --block-targets owl: the outliers, once for all methods and sparsities. */
static besa_result find_outliers(job *j)
{
    settings *s = j->s;
    progress_view view = begin_progress(s, "outliers");
    if (!s->owl) return BESA_OK;
    s->prune.comm = j->comm;
    s->prune.progress = show_progress;
    s->prune.user = &view;
    besa_result result = besa_outliers(j->checkpoint, &j->backend, &j->calibration, &s->prune, s->owl_threshold, j->outliers,
                                       &j->error);
    end_progress(&view);
    return result;
}

/* And from them the sparsity of every block. */
static besa_result take_targets(job *j)
{
    settings *s = j->s;
    const int64_t blocks = besa_checkpoint_config(j->checkpoint)->num_hidden_layers;
    const int64_t count = s->prune.num_blocks ? s->prune.num_blocks : blocks - s->prune.first_block;
    if (!s->owl) return BESA_OK;
    s->prune.block_targets = s->block_targets;
    s->prune.num_block_targets = count;
    return besa_outlier_targets(s->block_targets, j->outliers, count, s->prune.rates.target, s->owl_lambda, &j->error);
}

static void print_targets(const settings *s)
{
    if (!s->owl) return;
    printf("sparsities of the blocks by their outliers:");
    for (int64_t i = 0; i < s->prune.num_block_targets; i++) printf(" %.4f", s->block_targets[i]);
    printf("\n");
}

/* ---- prune, plan --------------------------------------------------------------------------- */

static besa_result put_text(FILE *file, void *words)
{
    fputs((const char *)words, file);
    return BESA_OK;
}

/* With the command line and how many threads there were. */
static besa_result write_report(job *j, besa_report *r)
{
    const settings *s = j->s;
    char *line = whole_command(s);
    r->command = line;
    r->threads = s->cuda ? 0 : s->threads ? s->threads : default_threads();
    char *json = line ? besa_report_json(r) : NULL;
    besa_result result = json ? replace_file(j, s->report, put_text, json, NULL) : out_of_memory(j);
    free(json);
    free(line);
    r->command = NULL;
    return result;
}

static besa_result make_plan(job *j, besa_plan_result *p)
{
    take_masks(j);
    return besa_plan(j->checkpoint, &j->backend, &j->calibration, &j->s->prune, p, &j->error);
}

/* What can be said of a run beforehand, but for what has been `said`. */
static besa_result print_notes(job *j, const char *label, const char *said, besa_plan_result *p)
{
    TRY(make_plan(j, p));
    if (p->notes[0] && strcmp(p->notes, said) && is_first(j)) fprintf(stderr, "%s: %s", label, p->notes);
    return BESA_OK;
}

/* said: what has been printed before the run */
static void print_summary(const settings *s, const besa_report *r, const char *said)
{
    size_t length = strlen(said);
    const int n = s->prune.pattern_n, m = s->prune.pattern_m;
    print_text(stdout, s->path[1]);
    printf(": sparsity %.6f of %s weights, target %g, ", r->sparsity, with_unit((double)r->weights, "").s, r->target);
    if (m) printf("%d:%d (%d of %d pruned, %d kept), ", n, m, n, m, m - n);
    printf("by %s in %s\n", besa_method_name(s->prune.method), as_clock(r->seconds).s);
    print_targets(s);
    if (r->resumed_blocks) printf("blocks taken over from the run before: %lld\n", (long long)r->resumed_blocks);
    if (r->perplexity > 0) {
        besa_divergence d;
        besa_summarize(&d, r->window, r->test_windows, NULL, 0);
        printf("perplexity %.4f", r->perplexity);
        if (d.perplexity_error > 0) printf(" +/- %.4f", d.perplexity_error);
        if (r->dense_perplexity > 0) printf(", of the dense model %.4f", r->dense_perplexity);
        printf("\n");
    }
    if (r->notes) printf("%s", r->notes + (strncmp(r->notes, said, length) ? 0 : length));
}

/* What prune's callbacks get. */
typedef struct prune_view {
    progress_view progress;      /* first: show_progress takes it for all */
    job *job;
    FILE *trace;                 /* NULL: none is asked for */
    int is_new, traced;          /* it was not there before; a step of this run is in it */
    besa_error error;            /* why trace_step stopped the run; the library knows the result alone */
} prune_view;

/* Of a trace that this run has begun before it was stopped keep the blocks before this one, which are finished, and write on from
 * there. */
static void begin_trace(FILE *trace, int64_t block)
{
    char line[512];
    long end = 0;
    long long of;
    rewind(trace);
    while (fgets(line, sizeof line, trace) && sscanf(line, "{\"block\": %lld,", &of) == 1 && of < block && strchr(line, '\n'))
        end = ftell(trace);
    fseek(trace, end, SEEK_SET);
    if (ftruncate(fileno(trace), end)) { /* then what follows overwrites it: a device, say */ }
}

static void trace_number(FILE *trace, const char *key, double value, int is_known)
{
    if (is_known && isfinite(value)) fprintf(trace, ", \"%s\": %.9g", key, value);
    else fprintf(trace, ", \"%s\": null", key);
}

/* A line of the trace. */
static besa_result trace_step(void *user, const besa_step *step)
{
    prune_view *view = (prune_view *)user;
    FILE *trace = view->trace;
    besa_trace t;
    TRY(besa_step_trace(step, &t, &view->error));
    if (!view->traced) begin_trace(trace, view->progress.taken_over);
    view->traced = 1;
    fprintf(trace, "{\"block\": %lld, \"step\": %lld, \"steps\": %lld", (long long)step->block, (long long)step->step,
            (long long)step->steps);
    trace_number(trace, "loss", t.loss, 1);
    trace_number(trace, "penalty", t.penalty, 1);
    trace_number(trace, "mean_rate", t.mean_rate, 1);
    trace_number(trace, "d", t.d, 1);
    trace_number(trace, "lr", step->lr, step->lr > 0);
    trace_number(trace, "weight_lr", step->weight_lr, step->weight_lr > 0);
    fprintf(trace, "}\n");
    if (!ferror(trace) && (step->step < step->steps || !fflush(trace))) return BESA_OK;
    snprintf(view->error.message, sizeof view->error.message, "%s: %s", view->job->s->trace, strerror(errno));
    return BESA_ERROR_WRITE;
}

/* Open the trace, which need not exist, without changing it yet. */
static besa_result open_trace(job *j, prune_view *view)
{
    const char *path = j->s->trace;
    if (!path) return BESA_OK;
    view->is_new = access(path, F_OK) != 0;
    int fd = open(path, O_RDWR | O_CREAT, 0666);
    view->trace = fd < 0 ? NULL : fdopen(fd, "r+");
    if (view->trace) return BESA_OK;
    snprintf(j->error.message, sizeof j->error.message, "%s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return BESA_ERROR_WRITE;
}

static besa_result close_trace(job *j, prune_view *view, besa_result result)
{
    if (!view->trace) return result;
    const int failed = fclose(view->trace) != 0;
    if (result && view->is_new && !view->traced) unlink(j->s->trace);
    if (!failed || result) return result;
    snprintf(j->error.message, sizeof j->error.message, "%s could not be written", j->s->trace);
    return BESA_ERROR_WRITE;
}

/* The output's README.md. */
static const char *card_of(void *user, const besa_report *report)
{
    job *j = ((prune_view *)user)->job;
    end_progress((progress_view *)user); /* the card may have something to say */
    free(j->card);
    j->card = make_card(j->s, besa_checkpoint_name(j->checkpoint), &j->calibration, report);
    return j->card;
}

/* The dense model's perplexity on the test, for the card. */
static besa_result measure_source(job *j)
{
    besa_calibration *c = &j->calibration;
    progress_view view = begin_progress(j->s, "dense");
    besa_result result = besa_perplexity(j->checkpoint, &j->backend, c->test_ids, c->test_windows, c->test_seqlen, &c->dense_perplexity,
                                         NULL, show_progress, &view, &j->error);
    end_progress(&view);
    return result;
}

/* Of what has just been written: `besa info` makes the same files of it. The learned rates that the run left there are in the
 * file then, and go. */
static besa_result save_output_masks(job *j)
{
    besa_checkpoint *output;
    char learned[4096];
    TRY(besa_checkpoint_open(&output, j->s->path[1], &j->error));
    besa_result result = save_masks(j->s, output, &j->error);
    besa_checkpoint_close(output);
    snprintf(learned, sizeof learned, "%s/" BESA_RATES_FILE, j->s->path[1]);
    if (result || !j->s->rates || !unlink(learned) || errno == ENOENT) return result;
    return fail(j, BESA_ERROR_WRITE, "%.400s: %s", learned, strerror(errno));
}

/* Whether a file that comes at the end can lie there: the work before it may take hours. */
static besa_result check_place(job *j, const char *path)
{
    char directory[4096];
    const char *slash = path ? strrchr(path, '/') : NULL;
    if (!path) return BESA_OK;
    snprintf(directory, sizeof directory, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    if (!access(directory, W_OK | X_OK)) return BESA_OK;
    snprintf(j->error.message, sizeof j->error.message, "%.400s: %.400s: %s", path, directory, strerror(errno));
    return BESA_ERROR_WRITE;
}

static besa_result run_prune(job *j)
{
    const settings *s = j->s;
    besa_report report;
    besa_plan_result plan;
    TRY(print_notes(j, besa_method_name(s->prune.method), "", &plan));
    int is_new = s->report && access(s->report, F_OK) != 0;
    FILE *file = s->report ? fopen(s->report, "a") : NULL; /* can it be written? The work may take hours */
    if (s->report && !file) {
        snprintf(j->error.message, sizeof j->error.message, "%s: %s", s->report, strerror(errno));
        return BESA_ERROR_WRITE;
    }
    if (file) fclose(file);
    TRY(check_place(j, s->rates));
    TRY(check_place(j, s->save_masks));
    besa_result result = find_outliers(j);
    if (!result) result = take_targets(j);
    if (!result && s->test_dense)
        result = measure_source(j);
    prune_view view = {begin_progress(s, besa_method_name(s->prune.method)), j, NULL, 0, 0, {0}};
    j->s->prune.card = card_of;
    if (!result) result = open_trace(j, &view);
    if (view.trace) j->s->prune.step = trace_step;
    if (!result) result = prune(j, s->path[1], &view.progress, &report);
    if (!result && view.trace && !view.traced && !report.resumed_blocks) begin_trace(view.trace, 0); /* nothing learns */
    if (result && view.error.message[0]) j->error = view.error;
    result = close_trace(j, &view, result);
    if (result && is_new) unlink(s->report);
    TRY(result);
    print_summary(s, &report, plan.notes);
    report.plan = &plan;
    if (s->report) result = write_report(j, &report);
    besa_result saved = s->rates || s->save_masks ? save_output_masks(j) : BESA_OK;
    besa_report_free(&report);
    return result ? result : saved;
}

static besa_result run_plan(job *j)
{
    const besa_calibration *c = &j->calibration;
    besa_plan_result p;
    TRY(make_plan(j, &p));
    printf("%s on %lld sequences of %lld tokens, %lld at a time\n", besa_method_name(j->s->prune.method),
           (long long)c->nsamples, (long long)c->seqlen, (long long)p.micro_batch);
    if (j->backend.unified_memory)
        printf("memory  %10s  for the run's arrays\n", with_unit((double)p.device_bytes + (double)p.host_bytes, "B").s);
    else {
        printf("device  %10s  for the run's arrays\n", with_unit((double)p.device_bytes, "B").s);
        printf("host    %10s  pinned%s%s%s\n", with_unit((double)p.host_bytes, "B").s,
               p.test_on_host ? ", the test's activations" : "", p.yref_on_host ? ", the reference's" : "", p.x_on_host ? ", the inputs'" : "");
    }
    printf("        %10s  of the mapped checkpoint at a time\n", with_unit((double)p.mapped_block_bytes, "B").s);
    printf("disk    %10s  for the pruned checkpoint\n", with_unit((double)p.disk_bytes, "B").s);
    printf("work    %10s  in matrix products\n", with_unit(p.flop, "FLOP").s);
    if (j->comm && j->comm->size > 1)
        printf("sums    %10s  over %d processes; all this is the first one's\n", with_unit(p.reduced_bytes, "B").s, j->comm->size);
    printf("%s", p.notes);
    return BESA_OK;
}

/* The report of what eval has measured on its one text since `begun`, in prune's form. */
static besa_result report_eval(job *j, double perplexity, const besa_window *window, double begun)
{
    besa_report report;
    besa_calibration c = {0};
    c.test_ids = j->test_ids;
    c.test_windows = j->first[1];
    c.test_seqlen = j->seqlen;
    c.test_file = j->s->tests[0].path;
    c.test_sha256 = j->sha256[0];
    double *nll = (double *)malloc((size_t)c.test_windows * sizeof *nll);
    if (!nll) return BESA_ERROR_MEMORY;
    for (int64_t i = 0; i < c.test_windows; i++) nll[i] = window[i].nll;
    besa_result result = besa_report_measured(&report, j->checkpoint, &j->backend, &c, perplexity, nll, &j->error);
    free(nll);
    TRY(result);
    report.seconds = seconds_now() - begun;
    result = write_report(j, &report);
    besa_report_free(&report);
    return result;
}

/* Whether the weight of so many bytes is 0, of either sign; it may lie at any address. */
static int is_zero(const unsigned char *weight, size_t size)
{
    uint32_t bits = 0;
    memcpy(&bits, weight, size);
    return (bits & (size == 4 ? 0x7FFFFFFFu : 0x7FFFu)) == 0;
}

#include "compare.h"

/* ---- info ---------------------------------------------------------------------------------- */

static int64_t count_zeros(const besa_tensor *t)
{
    const size_t size = besa_dtype_size(t->dtype);
    const unsigned char *data = (const unsigned char *)t->data;
    int64_t zeros = 0;
    for (size_t i = 0; i < t->bytes; i += size) zeros += is_zero(data + i, size);
    return zeros;
}

static void print_shape(const besa_config *c, int json)
{
    const struct { const char *name; int64_t value; } size[] = {
        {"num_hidden_layers", c->num_hidden_layers}, {"hidden_size", c->block.hidden_size},
        {"intermediate_size", c->block.intermediate_size}, {"num_attention_heads", c->block.num_attention_heads},
        {"num_key_value_heads", c->block.num_key_value_heads}, {"head_dim", c->block.head_dim},
        {"vocab_size", c->vocab_size}};
    printf(json ? "{\"%s\": \"%s\"" : "%-20s %s\n", "model_type", c->model_type);
    for (size_t i = 0; i < sizeof size / sizeof size[0]; i++)
        printf(json ? ", \"%s\": %lld" : "%-20s %lld\n", size[i].name, (long long)size[i].value);
}

static void print_info_notes(const char *notes, int json)
{
    if (!json) {
        printf("%s%s", *notes ? "\n" : "", notes);
        return;
    }
    printf(",\n \"notes\": ");
    put_string(stdout, notes);
}

static besa_result run_info(job *j)
{
    const besa_config *config = besa_checkpoint_config(j->checkpoint);
    const int json = j->s->json;
    double weights = 0, zeros = 0;
    TRY(save_masks(j->s, j->checkpoint, &j->error));
    print_shape(config, json);
    print_info_notes(besa_checkpoint_notes(j->checkpoint), json);
    printf(json ? ",\n \"layers\": [" : "\nsparsity");
    for (int i = 0; i < BESA_LAYERS && !json; i++) printf(" %9s", besa_layer_name(i));
    for (int64_t b = 0; b < config->num_hidden_layers; b++) {
        if (!json) printf("\n%8lld", (long long)b);
        for (int i = 0; i < BESA_LAYERS; i++) {
            const besa_tensor *t = besa_checkpoint_layer(j->checkpoint, b, i);
            double n = (double)t->shape[0] * (double)t->shape[1], z = (double)count_zeros(t);
            weights += n;
            zeros += z;
            if (!json) printf(" %9.4f", z / n);
            else printf("%s\n  {\"name\": \"%s\", \"dtype\": \"%s\", \"shape\": [%lld, %lld], \"sparsity\": %.6f}",
                        b + i ? "," : "", t->name, t->dtype_name, (long long)t->shape[0], (long long)t->shape[1],
                        z / n);
        }
    }
    printf(json ? "],\n \"weights\": %.0f, \"zeros\": %.0f, \"sparsity\": %.6f}\n"
                : "\n\n%.0f weights, %.0f of them zero: %.4f\n", weights, zeros, zeros / weights);
    return BESA_OK;
}

/* ---- main ---------------------------------------------------------------------------------- */

static const command commands[] = {
    {"prune", PRUNE, 2, 2, run_prune, "SRC DST", "prune the checkpoint in one directory into another",
     "Prunes the checkpoint in directory SRC into the new directory DST, which appears when it is complete.\n"
     "A run that was stopped goes on where it was when the same command is given again, and says at which block. Its\n"
     "--trace FILE keeps the lines of the blocks that are done; those of the block that is done again are written anew.\n\n"
     "  besa prune llama pruned --tokens c4.npy --sparsity 0.5\n"
     "  besa prune llama pruned --tokens c4.npy --method sparsegpt --pattern 2:4 --report pruned.json\n"
     "  besa prune llama pruned --tokens c4.npy --skip layers.0 --fix v_proj=0.3 --test wikitext2.npy\n"
     "  besa prune llama pruned --tokens c4.npy --device cuda\n"},
    {"plan", PLAN, 1, 2, run_plan, "SRC [DST]", "say what prune would take, of memory, disk and work",
     "Says what `besa prune` with the same options, but --test-dense, --quiet and those of files that it writes, would\n"
     "take. It works from the shapes, and reads no weights.\n\n"
     "  besa plan llama --nsamples 128 --seqlen 2048 --memory 8G\n"
     "  besa plan llama --device cuda --device-memory 24G\n"},
    {"compare", COMPARE, 1, 1, run_compare, "SRC", "try methods and sparsities, writing nothing to disk",
     "Prunes SRC in memory by every method at every sparsity and prints, a line for each run: the share of zeros that was\n"
     "reached; perplexity and its standard error over the windows; how far the predictions are from the dense model's, as\n"
     "the mean and the 99th percentile of KL(dense || pruned), and the share of tokens for which both have the same most\n"
     "likely one; seconds.\n\n"
     "  besa compare llama --tokens c4.npy --test wikitext2.npy --sparsity .5,.6,.7 --method wanda,besa\n"
     "  besa compare llama --tokens c4.npy --test wiki=wikitext2.npy --test c4=c4-validation.npy --seeds 1,2,3 \\\n"
     "      --method wanda,besa,besa:best --json results.json --markdown table.md\n"
     "  besa compare llama --tokens c4.npy --test wikitext2.npy --method besa,besa:epochs=2,besa:best:epochs=2,lr=2 \\\n"
     "      --nsamples 16,64,128 --resume results.json\n\n"
     "A row is METHOD[:PRESET][:KEY=VALUE[,KEY=VALUE ...]], KEY an option below of the method, without its --, but masks and\n"
     "block-targets, and with owl's targets none of pattern, skip, blocks, fix and depth-slope; flags are yes or no. Other\n"
     "options under BESA apply to besa's rows, and of --learn both and --preset best the others take the weights.\n"
     "--resume FILE goes on with the runs that a stopped comparison has not come to, or with those of more methods,\n"
     "sparsities, seeds or sizes; where models, texts or other options are not those of the file, it is refused: models are\n"
     "known by name and config.json, masks by their zeros, texts by their tokens, options and rows by their values, in any\n"
     "order but that of --skip and --fix.\n"},
    {"eval", EVAL, 1, 1, run_eval, "DIR", "measure perplexity",
     "Measures how well the model in directory DIR predicts a text: its perplexity. The text is cut into windows of\n"
     "T tokens that follow one another; the result is exp of the mean negative log-likelihood of tokens 2 .. T of\n"
     "all windows, each token given those before it in its window; its standard error is that over the windows.\n"
     "With --against it says too how far the model's predictions are from another's: KL(other || DIR) in nats, how often\n"
     "both have the same most likely token, and by how much the mean log-likelihood of a token differs.\n\n"
     "  besa eval pruned --tokens wikitext2.npy --seqlen 2048\n"
     "  besa eval pruned --tokens wikitext2.npy --seqlen 2048 --against llama\n"},
    {"info", INFO, 1, 1, run_info, "DIR", "show the shape and the sparsity of every layer",
     "Shows the shape of the checkpoint in DIR and the share of zeros in every layer that can be pruned.\n"},
    {NULL, 0, 0, 0, NULL, NULL, NULL, NULL},
};

/* Where several processes run one command: what each has for itself. */
static void begin_processes(job *j)
{
    int device;
    j->comm = besa_processes_begin(&device);
    j->s->prune.keep_rates = j->s->command->bit == PRUNE && j->s->rates; /* of all: the first writes them */
    if (j->s->cuda) j->s->gpu.device += device;
    if (is_first(j)) return;
    j->s->quiet = 1;
    j->s->report = j->s->trace = j->s->rates = j->s->save_masks = NULL;
    j->s->test_dense = 0;
    if (!freopen("/dev/null", "w", stdout)) fclose(stdout);
}

/* What ends all is told once: by the rank where it happened, and by the first. */
static int is_told(const job *j, besa_result result)
{
    return !is_first(j) && (result == BESA_ERROR_COMM || result == BESA_ERROR_OPTION || result == BESA_ERROR_CANCELLED);
}

static besa_result check_processes(job *j)
{
    int first = j->s->command->bit;
    if (j->comm) TRY(j->comm->broadcast(j->comm->user, &first, sizeof first, 0, &j->error));
    if (first != j->s->command->bit) {
        snprintf(j->error.message, sizeof j->error.message, "rank 0 was given another command than %s: expected the same arguments in all "
                 "processes", j->s->command->name);
        return BESA_ERROR_OPTION;
    }
    if (j->comm) TRY(j->comm->barrier(j->comm->user, &j->error)); /* that the first, too, hears of others' commands */
    if (!j->comm || j->comm->size == 1 || j->s->command->bit != COMPARE) return BESA_OK;
    snprintf(j->error.message, sizeof j->error.message, "compare runs in one process; several can prune, one method at a time");
    return BESA_ERROR_OPTION;
}

static int run_command(settings *s)
{
    job j;
    memset(&j, 0, sizeof j);
    j.s = s;
    begin_processes(&j);
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
    besa_result result = check_processes(&j);
    if (!result && (is_first(&j) || s->command->bit & ONE)) result = open_job(&j); /* eval and info are the first one's */
    if (!result && j.checkpoint) result = s->command->run(&j);
    if (result && j.comm) j.comm->fail(j.comm->user, &j.error);
    close_job(&j);
    if (result == BESA_OK) return besa_processes_end(0);
    if (is_told(&j, result)) return besa_processes_end(1);
    if (result == BESA_ERROR_CANCELLED) {
        fprintf(stderr, "besa %s: stopped%s\n", s->command->name,
                s->command->bit == PRUNE ? "; the same command goes on after the blocks that are done" :
                s->resume || s->json_file ? "; --resume with this FILE goes on after the runs that are done" : "");
        return besa_processes_end(130);
    }
    fprintf(stderr, "besa %s: ", s->command->name);
    print_text(stderr, j.error.message[0] ? j.error.message : besa_result_string(result));
    if (j.comm && result != BESA_ERROR_COMM) fprintf(stderr, " (rank %d)", j.comm->rank);
    fprintf(stderr, "\n");
    return besa_processes_end(1);
}

/* The command, or help; the exit status. */
static int run_program(settings *s)
{
    make_options(s);
    read_arguments(s, NULL);
    if (s->help) return print_help(s), 0;
    check_arguments(s);
    return run_command(s);
}

/* Without a command: help, the version, or a complaint; the exit status. */
static int run_nothing(const char *name)
{
    const int asked = !strcmp(name, "--help") || !strcmp(name, "-h") || !strcmp(name, "help");
    const char *nearest = NULL;
    size_t least = MAX_NAME;
    if (!strcmp(name, "--version")) return printf("besa %d.%d\n", BESA_VERSION_MAJOR, BESA_VERSION_MINOR), 0;
    if (asked || !*name) return print_general_help(asked ? stdout : stderr, commands), asked ? 0 : 2;
    fprintf(stderr, "besa: unknown command '");
    print_text(stderr, name);
    for (const command *c = commands; c->name; c++) take_nearest(name, c->name, &nearest, &least);
    if (nearest) fprintf(stderr, "': did you mean %s?\n", nearest);
    else fprintf(stderr, "'; besa --help lists them\n");
    return 2;
}

/* Threads that spin while they wait take the processor from those that work, where others use it too; to wake one that sleeps
 * takes as long as some hundred turns. Thus they spin for about 0.1 ms (libgomp; libomp's sleep at once). Both read their settings
 * when they are loaded, so that the program starts again with these where none are given. */
static void wait_asleep(char **argv)
{
#if defined(_OPENMP) && defined(__linux__)
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || setenv("OMP_WAIT_POLICY", "passive", 1) ||
        setenv("GOMP_SPINCOUNT", "5000", 1)) return;
    execv("/proc/self/exe", argv); /* goes on here where that fails */
#else
    (void)argv;
#endif
}

/* What was closed when the program began reads and writes nothing: else the next files to be opened would be these. */
static void open_standard(void)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd) exit(1);
}

int main(int argc, char **argv)
{
    static settings s;
    open_standard();
    wait_asleep(argv);
    signal(SIGXFSZ, SIG_IGN); /* a file limit is an error to report, not a death */
    s.commands = commands;
    const int explain = argc == 3 && !strcmp(argv[1], "help"); /* as COMMAND --help */
    const char *name = argc > 1 ? argv[explain ? 2 : 1] : "";
    static char help[] = "--help", *asked[] = {help, NULL};
    for (s.command = commands; s.command->name && strcmp(s.command->name, name); s.command++) { }
    s.arguments = explain ? asked : argv + 2;
    int status = s.command->name ? run_program(&s) : run_nothing(name);
    errno = 0;
    if (fflush(stdout) == 0 && !ferror(stdout)) return status;
    fprintf(stderr, "besa: standard output: %s\n", errno ? strerror(errno) : "not everything could be written");
    return status ? status : 1;
}
