/* Measuring models: perplexity, and how far one model is from another; the commands eval and compare.
 * Part of besa.c, which has what all commands share: jobs, progress, numbers as text. */

/* ---- tests --------------------------------------------------------------------------------- */

/* All test files into one array of windows, test i from window first[i] on; sizes as load_windows has them, of each file. */
static besa_result load_tests(job *j, int64_t windows, int64_t *seqlen, const char *seqlen_option)
{
    const settings *s = j->s;
    for (int i = 0; i < s->num_tests; i++) {
        int64_t count = windows;
        int32_t *ids = NULL;
        besa_result result = load_windows(j, s->tests[i].path, INT64_MAX, 0, "windows", seqlen_option, &count, seqlen, &ids);
        const size_t bytes = (size_t)*seqlen * sizeof *ids, before = (size_t)j->first[i] * bytes;
        void *all = result ? NULL : realloc(j->test_ids, before + (size_t)count * bytes);
        if (!result && !all) result = out_of_memory(j);
        if (!result) {
            j->test_ids = (int32_t *)all;
            memcpy((char *)all + before, ids, (size_t)count * bytes);
            j->first[i + 1] = j->first[i] + count;
        }
        free(ids);
        TRY(result);
    }
    return BESA_OK;
}

static int64_t all_windows(const job *j) { return j->first[j->s->num_tests]; }

/* What is measured of one model: windows, and divergences of their positions where there is a reference. */
typedef struct measurement {
    besa_window *window;
    float *kl;
} measurement;

static void free_measurement(measurement *m)
{
    free(m->window);
    free(m->kl);
    memset(m, 0, sizeof *m);
}

/* The windows of test i in figures. */
static besa_divergence summary_of(const job *j, const besa_window *window, float *kl, int i)
{
    const int64_t first = j->first[i], count = j->first[i + 1] - first, positions = j->seqlen - 1;
    besa_divergence d;
    besa_summarize(&d, window + first, count, kl ? kl + first * positions : NULL, count * positions);
    return d;
}

/* Fill in the reference: what others are held against. */
static besa_result make_reference(job *j, const besa_checkpoint *checkpoint, const char *label)
{
    progress_view view = begin_progress(j->s, label);
    besa_result result = besa_reference_create(&j->reference, checkpoint, &j->backend, j->test_ids, all_windows(j), j->seqlen,
                                               show_progress, &view, &j->error);
    end_progress(&view);
    return result;
}

/* Measure the model of the job, against the reference where there is one. */
static besa_result measure(job *j, const char *label, measurement *m)
{
    const int64_t windows = all_windows(j), positions = windows * (j->seqlen - 1);
    const int has_reference = j->reference.hidden != NULL;
    double perplexity, *nll = (double *)calloc((size_t)windows, sizeof *nll);
    m->window = (besa_window *)calloc((size_t)windows, sizeof *m->window);
    m->kl = has_reference ? (float *)calloc((size_t)positions + 1, sizeof *m->kl) : NULL;
    progress_view view = begin_progress(j->s, label);
    besa_result result = !nll || !m->window || (has_reference && !m->kl) ? out_of_memory(j) : BESA_OK;
    if (!result && has_reference)
        result = besa_compare_models(j->checkpoint, &j->backend, &j->reference, m->window, m->kl, show_progress, &view,
                                     &j->error);
    else if (!result)
        result = besa_perplexity(j->checkpoint, &j->backend, j->test_ids, windows, j->seqlen, &perplexity, nll, show_progress,
                                 &view, &j->error);
    for (int64_t i = 0; i < windows && !result && !has_reference; i++) m->window[i].nll = nll[i];
    end_progress(&view);
    free(nll);
    return result;
}

/* ---- eval ---------------------------------------------------------------------------------- */

/* Of one window there is no error. */
static void print_error(const char *format, double error, const char *unit, int64_t windows)
{
    if (windows > 1) printf(format, error);
    printf("%s", unit);
}

static void print_eval(const job *j, int i, const besa_divergence *d)
{
    const char *against = j->s->against;
    if (j->s->num_tests > 1) {
        print_text(stdout, j->s->tests[i].name);
        printf(": ");
    }
    printf("perplexity %.4f", d->perplexity);
    print_error(" +/- %.4f", d->perplexity_error, "", d->windows);
    printf(" over %lld windows of %lld tokens\n", (long long)d->windows, (long long)j->seqlen);
    if (!against) return;
    printf("  against ");
    print_text(stdout, against);
    printf(", perplexity %.4f", d->reference_perplexity);
    print_error(" +/- %.4f", d->reference_perplexity_error, "\n", d->windows);
    printf("  KL divergence        %.5f", d->kl);
    print_error(" +/- %.5f", d->kl_error, "", d->windows);
    printf(", 99th percentile %.4f, largest %.4f\n", d->kl_99, d->kl_most);
    printf("  most likely token    the same in %.2f %%", 100 * d->same);
    print_error(" +/- %.2f %%", 100 * d->same_error, "\n", d->windows);
    printf("  log-likelihood       %.5f", -d->difference);
    print_error(" +/- %.5f", d->difference_error, " per token: the mean difference of a window\n", d->windows);
}

/* An error, or null where one window, or seed, has none. */
static void put_error(FILE *file, const char *name, double error, int64_t windows)
{
    if (windows > 1) fprintf(file, ", \"%s\": %.9g", name, error);
    else fprintf(file, ", \"%s\": null", name);
}

/* The figures of a test as members; those about the reference too, if it has any. */
static void put_figures(FILE *file, const besa_divergence *d)
{
    fprintf(file, "\"perplexity\": %.9g", d->perplexity);
    put_error(file, "perplexity_error", d->perplexity_error, d->windows);
    if (!d->positions) return;
    fprintf(file, ", \"kl\": %.9g", d->kl);
    put_error(file, "kl_error", d->kl_error, d->windows);
    fprintf(file, ", \"kl_99\": %.9g, \"kl_most\": %.9g, \"same_top\": %.9g", d->kl_99, d->kl_most, d->same);
    put_error(file, "same_top_error", d->same_error, d->windows);
    fprintf(file, ", \"nll_difference\": %.9g", d->difference);
    put_error(file, "nll_difference_error", d->difference_error, d->windows);
}

static void print_eval_json(const job *j, int i, const besa_divergence *d, const besa_window *window)
{
    const int several = j->s->num_tests > 1;
    printf(!several ? "{" : i ? ",\n {\"name\": " : "{\"tests\": [\n {\"name\": ");
    if (several) put_string(stdout, j->s->tests[i].name);
    if (several) printf(", ");
    put_figures(stdout, d);
    if (j->s->against) {
        printf(", \"against\": ");
        put_string(stdout, j->s->against);
        printf(", \"against_perplexity\": %.9g", d->reference_perplexity);
        put_error(stdout, "against_perplexity_error", d->reference_perplexity_error, d->windows);
    }
    printf(", \"windows\": %lld, \"seqlen\": %lld, \"nll\": [", (long long)d->windows, (long long)j->seqlen);
    for (int64_t k = j->first[i]; k < j->first[i + 1]; k++) printf("%s%.9g", k > j->first[i] ? ", " : "", window[k].nll);
    printf("]}%s", !several ? "\n" : i + 1 == j->s->num_tests ? "]}\n" : "");
}

/* The model that others are held against: --against, or the job's own. */
static besa_result open_against(job *j)
{
    if (j->s->against) TRY(besa_checkpoint_open(&j->against, j->s->against, &j->error));
    j->reference.checkpoint = j->against ? j->against : j->checkpoint;
    j->reference.windows = all_windows(j);
    j->reference.seqlen = j->seqlen;
    const int64_t vocab = besa_checkpoint_config(j->checkpoint)->vocab_size;
    const int64_t other = besa_checkpoint_config(j->reference.checkpoint)->vocab_size;
    if (vocab == other) return BESA_OK;
    return fail(j, BESA_ERROR_OPTION, "--against %s has a vocabulary of %lld tokens, and %s one of %lld: what they predict cannot be "
                "compared", j->s->against, (long long)other, j->s->path[0], (long long)vocab);
}

static besa_result run_eval(job *j)
{
    const settings *s = j->s;
    measurement m = {NULL, NULL};
    const double begun = seconds_now();
    j->seqlen = s->seqlen;
    TRY(load_tests(j, s->windows, &j->seqlen, "seqlen"));
    if (s->against) {
        TRY(open_against(j));
        TRY(make_reference(j, j->against, "against"));
    }
    besa_result result = measure(j, "eval", &m);
    for (int i = 0; i < s->num_tests && !result; i++) {
        const besa_divergence d = summary_of(j, m.window, m.kl, i);
        if (s->json) print_eval_json(j, i, &d, m.window);
        else print_eval(j, i, &d);
        if (s->report) result = report_eval(j, d.perplexity, m.window, begun);
    }
    free_measurement(&m);
    return result;
}

/* ---- the runs of a comparison -------------------------------------------------------------- */

/* One run on one test; of the dense model nsamples is 0. */
typedef struct result_row {
    char method[MAX_NAME];
    double sparsity;
    int64_t nsamples, seed;
    int test, is_reference; /* 1: what others are held against */
    double reached, seconds, flop;
    besa_divergence d;
    char *line; /* of the file of results, without what is between lines */
} result_row;

typedef struct comparison {
    job *j;
    result_row *row;
    int num_rows, room;
    const char *results;       /* the file of results; or NULL */
    int lock;                  /* a descriptor that holds its lock, or -1 */
    char *made;                /* its place, where it is here for the lock alone; or NULL */
    int begins;                /* 1: the file of --resume is not there yet */
    char *head;                /* what it begins with, as it was when the comparison began */
    char *kept;                /* the file of --resume, or NULL; lines that are taken over begin with - */
    int printed_axes[3];       /* 1: the table has a column for calibration sizes, seeds, tests */
    int name_width, test_width;
    work_left work;
} comparison;

static void free_comparison(comparison *c)
{
    for (int i = 0; i < c->num_rows; i++) free(c->row[i].line);
    if (c->made) unlink(c->made);
    if (c->lock >= 0) close(c->lock);
    free(c->row);
    free(c->made);
    free(c->head);
    free(c->kept);
}

/* A row more, as what is written of it is known. */
static besa_result add_row(comparison *c, const result_row *r)
{
    if (c->num_rows == c->room) {
        const int room = 2 * c->room + 64;
        result_row *rows = (result_row *)realloc(c->row, (size_t)room * sizeof *rows);
        if (!rows) return out_of_memory(c->j);
        c->row = rows;
        c->room = room;
    }
    c->row[c->num_rows++] = *r;
    return BESA_OK;
}

/* ---- the file of results ------------------------------------------------------------------- */

/* FNV-1a */
static const uint64_t empty_hash = 14695981039346656037u;
static uint64_t hash_with(uint64_t hash, uint64_t x) { return (hash ^ x) * 1099511628211u; }

/* What makes two files of tokens the same: a hash of their ids, and of the columns of a 2-D file, whose rows are sequences. */
static besa_result hash_tokens(job *j, const char *path, uint64_t *hash)
{
    besa_tokens file;
    TRY(besa_tokens_load(&file, path, &j->error));
    *hash = file.rows ? hash_with(empty_hash, (uint64_t)file.columns) : empty_hash;
    for (int64_t i = 0; i < file.count; i++) *hash = hash_with(*hash, (uint32_t)file.ids[i]);
    besa_tokens_free(&file);
    return BESA_OK;
}

/* What makes two checkpoints the same masks: a hash of where their layers are 0, 8 weights at a time. */
static uint64_t hash_zeros(const besa_checkpoint *masks)
{
    uint64_t hash = empty_hash, bits = 1; /* behind its first 1 are those that are not in the hash yet */
    for (int64_t b = 0; b < besa_checkpoint_config(masks)->num_hidden_layers; b++)
        for (int i = 0; i < BESA_LAYERS; i++) {
            const besa_tensor *t = besa_checkpoint_layer(masks, b, i);
            const unsigned char *data = (const unsigned char *)t->data;
            const size_t size = besa_dtype_size(t->dtype);
            for (size_t k = 0; k < t->bytes; k += size) {
                bits = bits << 1 | (uint64_t)is_zero(data + k, size);
                if (bits < 0x100) continue;
                hash = hash_with(hash, bits);
                bits = 1;
            }
        }
    return hash_with(hash, bits);
}

/* Whether an option is not one that all rows have and that results depend on. */
static int is_aside(const char *name)
{
    static const char *const aside[] = {"tokens", "test", "method", "sparsity", "nsamples", "seed", "seeds", "seqlen",
                                        "test-seqlen", "windows", "against", "json", "markdown", "resume", "quiet",
                                        "no-quiet", "threads", "memory"};
    for (size_t i = 0; i < sizeof aside / sizeof *aside; i++)
        if (!strcmp(aside[i], name)) return 1;
    return 0;
}

/* A word with a number at its end, behind the last "=" or alone, in the one form of that number: 0.50 and 5e-1 are 0.5. */
static void put_plain(char *to, size_t size, const char *word)
{
    const char *equals = strrchr(word, '='), *number = equals ? equals + 1 : word;
    const size_t n = number_length(number, 0);
    char plain[40];
    snprintf(to, size, "%s", word);
    if (!n || number[n]) return;
    snprintf(plain, sizeof plain, "%.15g", strtod(number, NULL));
    if (strtod(plain, NULL) != strtod(number, NULL)) snprintf(plain, sizeof plain, "%.17g", strtod(number, NULL));
    snprintf(to, size, "%.*s%s", (int)(number - word), word, plain);
}

/* The option at arguments[i] by its name, a flag also where --no-NAME takes it back, and its value, "yes" or "no" of a flag.
 * Returns how many arguments it takes. */
static int read_given(const settings *s, int i, char name[MAX_NAME], const char **value)
{
    const int more = argument_length(s, i, name);
    const char *equals = strchr(s->arguments[i], '=');
    *value = equals ? equals + 1 : more > 1 ? s->arguments[i + 1] : "yes";
    for (int k = 0; k < s->num_options && !equals && more == 1; k++) {
        const option *o = &s->options[k];
        if (!(o->commands & s->command->bit) || !is_flag(o, name)) continue;
        *value = strcmp(o->name, name) ? "no" : "yes";
        snprintf(name, MAX_NAME, "%s", o->name);
        break;
    }
    return more;
}

/* A skip is a fix at 0: of both the first that matches a layer counts. */
static void call_fix(char name[MAX_NAME]) { if (!strcmp(name, "skip")) snprintf(name, MAX_NAME, "fix"); }

/* The first option in the alphabet behind `last` that rows have in common; 0: there is none. */
static int next_given(const settings *s, const char *last, char next[MAX_NAME])
{
    char name[MAX_NAME];
    const char *value;
    next[0] = 0;
    for (int i = 0; s->arguments[i];) {
        if (s->arguments[i][0] != '-') {
            i++;
            continue;
        }
        i += read_given(s, i, name, &value);
        call_fix(name);
        if (!is_aside(name) && strcmp(name, last) > 0 && (!next[0] || strcmp(name, next) < 0)) snprintf(next, MAX_NAME, "%s", name);
    }
    return next[0] != 0;
}

/* An option as the file of results has it; of files what they hold, not where they lie. */
static void put_option(FILE *file, const job *j, const char *name, const char *value, const char *before)
{
    const settings *s = j->s;
    char line[MAX_BLOCKS * 18], digits[65];
    size_t n = (size_t)snprintf(line, sizeof line, "%s=", name);
    if (!strcmp(name, "block-targets") && s->targets_path)
        for (int64_t i = 0; i < s->num_targets && n < sizeof line; i++)
            n += (size_t)snprintf(line + n, sizeof line - n, "%s%.9g", i ? " " : "", s->block_targets[i]);
    else if (!strcmp(name, "masks") && j->masks) {
        if (is_masks_file(s)) besa_checkpoint_sha256(j->masks, digits);
        else snprintf(digits, sizeof digits, "%016llx", (unsigned long long)hash_zeros(j->masks));
        snprintf(line + n, sizeof line - n, "%s %s", besa_checkpoint_name(j->masks), digits);
    } else if (!strcmp(name, "skip")) snprintf(line, sizeof line, "fix=%s=0", value);
    else put_plain(line + n, sizeof line - n, value);
    fprintf(file, "%s\n  ", before);
    put_string(file, line);
}

/* The other options by name and value, in the order of their names, a line for each; of --fix and --skip one for each time, in
 * the order that they are given in. Of another that is given twice the last counts. */
static void put_options(FILE *file, const job *j)
{
    const settings *s = j->s;
    char last[MAX_NAME] = "", next[MAX_NAME], name[MAX_NAME] = "", own[MAX_NAME];
    const char *before = "", *value, *found = NULL;
    fprintf(file, " \"options\": [");
    for (; next_given(s, last, next); memcpy(last, next, sizeof last)) {
        const int repeats = !strcmp(next, "fix");
        for (int i = 0; s->arguments[i];) {
            const int is_option = s->arguments[i][0] == '-';
            i += is_option ? read_given(s, i, name, &value) : 1;
            snprintf(own, sizeof own, "%s", name);
            call_fix(name);
            if (!is_option || strcmp(name, next)) continue;
            found = value;
            if (repeats) put_option(file, j, own, found, before), before = ",";
        }
        if (!repeats) put_option(file, j, next, found, before);
        before = ",";
    }
    fprintf(file, "\n ],\n");
}

/* A model as besa.json knows it: by its name and its config.json. */
static void put_model(FILE *file, const char *key, const besa_checkpoint *checkpoint)
{
    char digits[65];
    besa_checkpoint_sha256(checkpoint, digits);
    fprintf(file, " \"%s\": {\"name\": ", key);
    put_string(file, besa_checkpoint_name(checkpoint));
    fprintf(file, ", \"config_sha256\": \"%s\"},\n", digits);
}

/* All that must be the same where runs are taken over, but for the names of files of tokens. */
static besa_result put_head(FILE *file, job *j)
{
    const settings *s = j->s;
    uint64_t hash;
    fprintf(file, "{\"program\": \"besa %d.%d\",\n", BESA_VERSION_MAJOR, BESA_VERSION_MINOR);
    put_model(file, "model", j->checkpoint);
    put_model(file, "against", j->reference.checkpoint);
    TRY(hash_tokens(j, s->tokens, &hash));
    fprintf(file, " \"tokens\": {\"file\": ");
    put_string(file, last_part(s->tokens));
    fprintf(file, ", \"hash\": \"%016llx\"},\n \"seqlen\": %lld,\n \"tests\": [\n", (unsigned long long)hash,
            (long long)j->calibration.seqlen);
    for (int i = 0; i < s->num_tests; i++) {
        TRY(hash_tokens(j, s->tests[i].path, &hash));
        fprintf(file, "  {\"name\": ");
        put_string(file, s->tests[i].name);
        fprintf(file, ", \"file\": ");
        put_string(file, last_part(s->tests[i].path));
        fprintf(file, ", \"hash\": \"%016llx\", \"windows\": %lld, \"seqlen\": %lld}%s\n", (unsigned long long)hash,
                (long long)(j->first[i + 1] - j->first[i]), (long long)j->seqlen, i + 1 < s->num_tests ? "," : "");
    }
    fprintf(file, " ],\n");
    put_options(file, j);
    fprintf(file, " \"rows\": [\n");
    return BESA_OK;
}

/* A row's name by value: options in the order of their names, numbers in one form, a skip as a fix at 0. */
static void plain_label(char *to, size_t size, const char *label)
{
    char part[MAX_SETTINGS + 2][MAX_NAME] = {""};
    int count = 0, fixed = 0; /* parts, and those that come first: method and preset */
    for (const char *at = label, *end; at; at = *end ? end + 1 : NULL) {
        end = at + strcspn(at, ":,");
        const int is_setting = memchr(at, '=', (size_t)(end - at)) != NULL;
        char *last = count ? part[count - 1] : NULL;
        if (!is_setting && last && strchr(last, '=')) /* "2:4" */
            snprintf(last + strlen(last), MAX_NAME - strlen(last), ":%.*s", (int)(end - at), at);
        else if (count < MAX_SETTINGS + 2) {
            const int is_skip = is_setting && !strncmp(at, "skip=", 5);
            snprintf(part[count++], MAX_NAME, is_skip ? "fix=%.*s=0" : "%.*s", (int)(end - at) - 5 * is_skip, at + 5 * is_skip);
            if (!is_setting) fixed = count;
        }
    }
    size_t n = 0;
    for (int i = 0; i < count && n < size; i++) {
        char plain[MAX_NAME], taken[MAX_NAME];
        int least = i;
        for (int k = i + 1; k < count && i >= fixed; k++)
            if (strncmp(part[k], part[least], strcspn(part[k], "=") + 1) < 0) least = k;
        memcpy(taken, part[least], sizeof taken);
        memmove(part[i + 1], part[i], (size_t)(least - i) * sizeof part[0]);
        put_plain(plain, sizeof plain, taken);
        n += (size_t)snprintf(to + n, size - n, "%s%s", !i ? "" : i <= fixed ? ":" : ",", plain);
    }
}

/* What says which run on which test a line is of: it begins so, with the row's name as it is given or by value. */
static void put_key(FILE *file, const job *j, const result_row *r, int by_value)
{
    char plain[2 * MAX_NAME];
    plain_label(plain, sizeof plain, r->method);
    fprintf(file, "  {\"method\": ");
    put_string(file, by_value ? plain : r->method);
    if (r->nsamples)
        fprintf(file, ", \"sparsity\": %.9g, \"nsamples\": %lld, \"seed\": %lld", r->sparsity, (long long)r->nsamples,
                (long long)r->seed);
    else fprintf(file, ", \"sparsity\": 0, \"nsamples\": null, \"seed\": null");
    fprintf(file, ", \"test\": ");
    put_string(file, j->s->tests[r->test].name);
}

/* The line of a row; options: of the report, as JSON, or NULL. */
static char *row_line(const job *j, const result_row *r, const char *options)
{
    text_file line;
    FILE *file = begin_text(&line);
    if (!file) return NULL;
    put_key(file, j, r, 0);
    fprintf(file, ", \"reached\": %.9g, ", r->reached);
    put_figures(file, &r->d);
    if (r->nsamples) fprintf(file, ", \"seconds\": %.4g, \"flop\": %.9g", r->seconds, r->flop);
    if (options) fprintf(file, ", \"options\": %s", options);
    fprintf(file, "}");
    return end_text(&line);
}

/* The number of a member of a line; 0 where it is null or not there. */
static double number_in(const char *line, const char *name)
{
    char member[64];
    snprintf(member, sizeof member, ", \"%s\": ", name);
    const char *at = strstr(line, member);
    return at ? strtod(at + strlen(member), NULL) : 0; /* of "null" 0 */
}

static void read_figures(result_row *r, const char *line, int64_t windows)
{
    besa_divergence *d = &r->d;
    r->reached = number_in(line, "reached");
    r->seconds = number_in(line, "seconds");
    r->flop = number_in(line, "flop");
    d->windows = windows;
    d->positions = 1;
    d->perplexity = number_in(line, "perplexity");
    d->perplexity_error = number_in(line, "perplexity_error");
    d->kl = number_in(line, "kl");
    d->kl_error = number_in(line, "kl_error");
    d->kl_99 = number_in(line, "kl_99");
    d->kl_most = number_in(line, "kl_most");
    d->same = number_in(line, "same_top");
    d->same_error = number_in(line, "same_top_error");
    d->difference = number_in(line, "nll_difference");
    d->difference_error = number_in(line, "nll_difference_error");
}

static int same_but_seed(const result_row *a, const result_row *b)
{
    return a->nsamples && b->nsamples && !strcmp(a->method, b->method) && a->sparsity == b->sparsity &&
           a->nsamples == b->nsamples && a->test == b->test;
}

/* The figures of a row that have a mean over seeds, and where their deviation goes; 0: nowhere. */
#define FIGURE(field) offsetof(result_row, field)
static const struct { size_t mean, deviation; } figures[] = {
    {FIGURE(reached), 0}, {FIGURE(seconds), 0}, {FIGURE(d.perplexity), FIGURE(d.perplexity_error)},
    {FIGURE(d.kl), FIGURE(d.kl_error)}, {FIGURE(d.kl_99), 0}, {FIGURE(d.kl_most), 0},
    {FIGURE(d.same), FIGURE(d.same_error)}, {FIGURE(d.difference), FIGURE(d.difference_error)}};

static double *figure_of(result_row *r, size_t offset) { return (double *)(void *)((char *)r + offset); }

/* If row i is the first of those that differ in their seed alone: their number, and a row of their means, in which errors are
 * deviations over the seeds, sqrt(sum (x - mean)^2 / (n - 1)), and there are as many windows as seeds; else 0. */
static int mean_row(const comparison *c, int i, result_row *mean)
{
    int n = 0;
    for (int k = 0; k < i; k++)
        if (same_but_seed(&c->row[k], &c->row[i])) return 0;
    *mean = c->row[i];
    for (int k = i; k < c->num_rows; k++) n += same_but_seed(&c->row[k], &c->row[i]);
    for (size_t f = 0; f < sizeof figures / sizeof figures[0]; f++) {
        double sum = 0, squares = 0;
        for (int k = i; k < c->num_rows; k++)
            if (same_but_seed(&c->row[k], &c->row[i])) sum += *figure_of(&c->row[k], figures[f].mean);
        for (int k = i; k < c->num_rows; k++)
            if (same_but_seed(&c->row[k], &c->row[i])) squares += pow(*figure_of(&c->row[k], figures[f].mean) - sum / n, 2);
        *figure_of(mean, figures[f].mean) = n ? sum / n : 0;
        if (figures[f].deviation) *figure_of(mean, figures[f].deviation) = n > 1 ? sqrt(squares / (n - 1)) : 0;
    }
    mean->d.windows = n;
    return n;
}

static void put_mean(FILE *file, const job *j, const result_row *r, int seeds)
{
    fprintf(file, "  {\"method\": ");
    put_string(file, r->method);
    fprintf(file, ", \"sparsity\": %.9g, \"nsamples\": %lld, \"test\": ", r->sparsity, (long long)r->nsamples);
    put_string(file, j->s->tests[r->test].name);
    fprintf(file, ", \"seeds\": %d, \"reached_mean\": %.9g", seeds, r->reached);
    fprintf(file, ", \"perplexity_mean\": %.9g", r->d.perplexity);
    put_error(file, "perplexity_sd", r->d.perplexity_error, seeds);
    fprintf(file, ", \"kl_mean\": %.9g", r->d.kl);
    put_error(file, "kl_sd", r->d.kl_error, seeds);
    fprintf(file, ", \"kl_99_mean\": %.9g, \"same_top_mean\": %.9g", r->d.kl_99, r->d.same);
    put_error(file, "same_top_sd", r->d.same_error, seeds);
    fprintf(file, ", \"nll_difference_mean\": %.9g", r->d.difference);
    put_error(file, "nll_difference_sd", r->d.difference_error, seeds);
    fprintf(file, "}");
}

static besa_result put_json(FILE *file, void *what)
{
    const comparison *c = (const comparison *)what;
    const char *between = "";
    fputs(c->head, file);
    for (int i = 0; i < c->num_rows; i++, between = ",\n") fprintf(file, "%s%s", between, c->row[i].line);
    for (const char *line = c->kept, *next; line; line = next) { /* those of other runs */
        const size_t n = strcspn(line, "\n");
        next = line[n] ? line + n + 1 : NULL;
        if (strncmp(line, "  {\"method\": \"", 14)) continue;
        fprintf(file, "%s%.*s", between, (int)(n && line[n - 1] == ',' ? n - 1 : n), line);
        between = ",\n";
    }
    fprintf(file, "\n ],\n \"means\": [");
    between = "\n";
    for (int i = 0; i < c->num_rows && c->j->s->num_seeds > 1; i++) {
        result_row mean;
        const int seeds = mean_row(c, i, &mean);
        if (!seeds) continue;
        fprintf(file, "%s", between);
        put_mean(file, c->j, &mean, seeds);
        between = ",\n";
    }
    fprintf(file, "]}\n");
    return BESA_OK;
}

/* ---- the table ----------------------------------------------------------------------------- */

/* The text of a cell of one line of Markdown: a bar would end it. */
static void put_cell(FILE *file, const char *word)
{
    for (; *word; word++) fprintf(file, *word == '|' ? "\\|" : "%c", *word);
}

static void put_markdown_row(FILE *file, const comparison *c, const result_row *r, const char *seed)
{
    const besa_divergence *d = &r->d;
    const int error = d->windows > 1;
    fprintf(file, "| ");
    put_cell(file, r->method);
    if (r->nsamples) fprintf(file, " | %.4g %% | ", 100 * r->sparsity);
    else fprintf(file, " | | ");
    if (c->printed_axes[0] && r->nsamples) fprintf(file, "%lld | ", (long long)r->nsamples);
    else if (c->printed_axes[0]) fprintf(file, "| ");
    if (c->printed_axes[1]) fprintf(file, "%s | ", seed);
    if (c->printed_axes[2]) put_cell(file, c->j->s->tests[r->test].name), fprintf(file, " | ");
    fprintf(file, "%.4f | %.3f", r->reached, d->perplexity);
    if (error) fprintf(file, " ± %.3f", d->perplexity_error);
    if (!r->is_reference) fprintf(file, " | %.4f", d->kl);
    if (!r->is_reference && error) fprintf(file, " ± %.4f", d->kl_error);
    if (!r->is_reference) fprintf(file, " | %.3f | %.1f %% |", d->kl_99, 100 * d->same);
    else fprintf(file, " | | | |");
    if (r->nsamples) fprintf(file, " %.1f |\n", r->seconds);
    else fprintf(file, " |\n");
}

/* A row's seed in words. */
static text seed_of(const result_row *r)
{
    text t = {""};
    if (r->nsamples) snprintf(t.s, sizeof t.s, "%lld", (long long)r->seed);
    return t;
}

/* What the table's +/- is, as a line; nothing where it has none. */
static void put_legend(FILE *file, const comparison *c, const char *sign)
{
    const job *j = c->j;
    int has_errors = 0;
    for (int i = 0; i < j->s->num_tests; i++) has_errors |= j->first[i + 1] - j->first[i] > 1;
    if (!has_errors && j->s->num_seeds < 2) return;
    fprintf(file, "%s:", sign);
    if (has_errors) fprintf(file, " standard error over the windows%s", j->s->num_seeds > 1 ? "; of a mean:" : "");
    if (j->s->num_seeds > 1) fprintf(file, " standard deviation of %d seeds", j->s->num_seeds);
    fprintf(file, "\n");
}

static besa_result put_markdown(FILE *file, void *what)
{
    const comparison *c = (const comparison *)what;
    static const char *const axis[] = {" sequences |", " seed |", " text |"};
    fprintf(file, "| method | sparsity |");
    for (int i = 0; i < 3; i++) fprintf(file, "%s", c->printed_axes[i] ? axis[i] : "");
    fprintf(file, " reached | perplexity | KL | KL, 99 %% | same token | seconds |\n|---|---|");
    for (int i = 0; i < 3; i++) fprintf(file, "%s", c->printed_axes[i] ? "---|" : "");
    fprintf(file, "---|---|---|---|---|---|\n");
    for (int i = 0; i < c->num_rows; i++) put_markdown_row(file, c, &c->row[i], seed_of(&c->row[i]).s);
    for (int i = 0; i < c->num_rows && c->j->s->num_seeds > 1; i++) {
        result_row mean;
        if (mean_row(c, i, &mean)) put_markdown_row(file, c, &mean, "mean");
    }
    put_legend(file, c, "\n±");
    return BESA_OK;
}

static besa_result save(comparison *c)
{
    const settings *s = c->j->s;
    if (c->results) TRY(replace_file(c->j, c->results, put_json, c, &c->lock));
    free(c->made);
    c->made = NULL;
    return s->markdown ? replace_file(c->j, s->markdown, put_markdown, c, NULL) : BESA_OK;
}

/* Lock the file of results for the whole command, made empty where it is not there: of two comparisons that write it each would
 * put its own rows in the place of the other's. A device has no lock, nor have file systems without them. */
static besa_result lock_results(comparison *c)
{
    job *j = c->j;
    struct stat here;
    const char *path = c->results;
    const int is_new = path && stat(path, &here);
    c->begins = j->s->resume && access(j->s->resume, F_OK) && errno == ENOENT;
    if (!path || (!is_new && !S_ISREG(here.st_mode))) return BESA_OK;
    c->lock = open(path, O_RDONLY | O_CREAT | O_CLOEXEC, 0666);
    if (c->lock < 0) return fail(j, BESA_ERROR_WRITE, "%s could not be written: %s", path, strerror(errno));
    if ((flock(c->lock, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) || fstat(c->lock, &here) ||
        !is_file(&here, AT_FDCWD, path)) /* the last: it has just been replaced */
        return fail(j, BESA_ERROR_RESUME, "%s: another comparison is writing it: expected one at a time", path);
    if (is_new) c->made = realpath(path, NULL);
    return BESA_OK;
}

/* The first columns, as wide as what is in them. */
static void print_axes(const comparison *c, const char *name, const char *sparsity, const char *nsamples, const char *seed,
                       const char *test)
{
    print_text(stdout, name);
    printf("%*s %7s", c->name_width - (int)strlen(name), "", sparsity);
    if (c->printed_axes[0]) printf(" %6s", nsamples);
    if (c->printed_axes[1]) printf(" %6s", seed);
    if (!c->printed_axes[2]) return;
    printf(" ");
    print_text(stdout, test);
    printf("%*s", c->test_width - (int)strlen(test), "");
}

/* A line of the table: as soon as it is known. */
static void print_row(const comparison *c, const result_row *r, const char *seed)
{
    const besa_divergence *d = &r->d;
    text sparsity = {""}, nsamples = {""};
    if (r->nsamples) snprintf(sparsity.s, sizeof sparsity.s, "%.4g %%", 100 * r->sparsity);
    if (r->nsamples) snprintf(nsamples.s, sizeof nsamples.s, "%lld", (long long)r->nsamples);
    print_axes(c, r->method, sparsity.s, nsamples.s, seed, c->j->s->tests[r->test].name);
    if (r->nsamples) printf(" %7.4f", r->reached);
    else printf(" %7s", "");
    printf(" %9.3f", d->perplexity);
    if (d->windows > 1) printf(" %6.2f", d->perplexity_error);
    else printf(" %6s", "");
    if (!r->is_reference) printf(" %6.3f %6.2f %5.1f", d->kl, d->kl_99, 100 * d->same);
    if (r->nsamples) printf(" %6.1f", r->seconds);
    printf("\n");
    fflush(stdout);
}

static void print_head(comparison *c)
{
    const settings *s = c->j->s;
    const besa_calibration *k = &c->j->calibration;
    c->printed_axes[0] = s->num_counts > 1;
    c->printed_axes[1] = s->num_seeds > 1;
    c->printed_axes[2] = s->num_tests > 1;
    c->name_width = 9; /* as wide as their headings */
    c->test_width = 4;
    for (int i = 0; i < s->num_rows; i++)
        if ((int)strlen(s->rows[i].label) > c->name_width) c->name_width = (int)strlen(s->rows[i].label);
    for (int i = 0; i < s->num_tests; i++)
        if ((int)strlen(s->tests[i].name) > c->test_width) c->test_width = (int)strlen(s->tests[i].name);
    printf("calibrated on ");
    for (int i = 0; i < s->num_counts || i < 1; i++)
        printf("%s%lld", i ? ", " : "", (long long)(s->num_counts ? s->counts[i] : k->nsamples));
    printf(" x %lld tokens, perplexity on ", (long long)k->seqlen);
    for (int i = 0; i < s->num_tests; i++)
        printf("%s%lld", i ? ", " : "", (long long)(c->j->first[i + 1] - c->j->first[i]));
    printf(" x %lld\n", (long long)c->j->seqlen);
    put_legend(stdout, c, "+/-");
}

static void print_columns(const comparison *c)
{
    printf("\n");
    print_axes(c, "method", "target", "calib.", "seed", "text");
    printf(" %7s %9s %6s %6s %6s %5s %6s\n", "reached", "perplex.", "+/-", "KL", "KL 99%", "same%", "sec");
}

/* ---- resuming ------------------------------------------------------------------------------ */

/* Past what two files of one comparison may have otherwise: the name of a file of tokens, and the comma behind a line. */
static const char *past_free(const char *at)
{
    static const char member[] = "\"file\": \"";
    if (!strncmp(at, member, sizeof member - 1)) {
        at += sizeof member - 1;
        while (*at && *at != '"') at += at[0] == '\\' && at[1] ? 2 : 1;
    }
    return at[0] == ',' && at[1] == '\n' ? at + 1 : at;
}

/* A line of a head, for a message: without its comma, and none where a list has ended. */
static const char *line_of(const char *head, const char *at, int *length)
{
    while (at > head && at[-1] != '\n') at--;
    at += strspn(at, " ");
    *length = (int)strcspn(at, "\n");
    if (*length && at[*length - 1] == ',') --*length;
    if (*at != ']') return at;
    *length = 4;
    return "none";
}

/* Whether what was kept begins as this comparison's file does. */
static besa_result check_kept(comparison *c, const char *end)
{
    const char *path = c->j->s->resume, *here = c->head, *there = c->kept;
    int length[2];
    if (strncmp(there, "{\"program\": \"besa ", 18))
        return fail(c->j, BESA_ERROR_RESUME, "--resume %s is %s, expected a file of this command's --json: remove it, and it is begun anew",
                    path, *there ? "of something else" : "empty");
    for (; *here; here++, there++) {
        here = past_free(here), there = past_free(there);
        if (!*there) break;
        if (*here == *there) continue;
        here = line_of(c->head, here, &length[0]), there = line_of(c->kept, there, &length[1]);
        return fail(c->j, BESA_ERROR_RESUME, "--resume %s is of another comparison: it has %.*s and this one %.*s", path, length[1],
                    there, length[0], here);
    }
    if (end) return BESA_OK;
    return fail(c->j, BESA_ERROR_RESUME, "--resume %s has no end: it was cut off, or is no file of --json", path);
}

/* All of a file, for free. */
static besa_result read_text(job *j, const char *path, FILE *file, char **whole)
{
    char piece[4096];
    size_t n;
    text_file all;
    if (!begin_text(&all)) return out_of_memory(j);
    errno = 0;
    while ((n = fread(piece, 1, sizeof piece, file)) > 0) fwrite(piece, 1, n, all.file);
    const int why = errno;
    *whole = end_text(&all);
    if (ferror(file)) return fail(j, BESA_ERROR_READ, "%s: %s", path, strerror(why));
    return *whole ? BESA_OK : out_of_memory(j);
}

/* The head of the file of results, and the file of --resume, which is to begin so. One that is not there yet is begun. */
static besa_result read_kept(comparison *c)
{
    job *j = c->j;
    const char *path = j->s->resume;
    text_file own;
    FILE *file = path && !c->begins ? fopen(path, "r") : NULL;
    if (path && !c->begins && !file) return fail(j, BESA_ERROR_READ, "%s: %s", path, strerror(errno));
    besa_result result = file ? read_text(j, path, file, &c->kept) : BESA_OK;
    if (file) fclose(file);
    TRY(result);
    if (!c->results) return BESA_OK;
    result = begin_text(&own) ? put_head(own.file, j) : out_of_memory(j);
    c->head = end_text(&own);
    char *end = c->kept ? strstr(c->kept, "\n ],\n \"means\": [") : NULL;
    if (!result && !c->head) result = out_of_memory(j);
    if (!result && c->kept) result = check_kept(c, end);
    if (end) end[1] = 0;
    return result;
}

static const char figures_begin[] = ", \"reached\": "; /* behind a line's key */

/* Whether a line has this key, in which the row's name is by value. */
static int has_key(const char *line, const char *key)
{
    static const char begin[] = "  {\"method\": \"";
    char name[MAX_NAME], plain[2 * MAX_NAME];
    if (strncmp(line, begin, sizeof begin - 1)) return 0;
    line += sizeof begin - 1, key += sizeof begin - 1;
    const size_t n = strcspn(line, "\"\n");
    snprintf(name, sizeof name, "%.*s", (int)n, line);
    plain_label(plain, sizeof plain, name);
    const size_t m = strlen(plain), rest = m <= strlen(key) ? strlen(key + m) : 0;
    return rest && !strncmp(key, plain, m) && !strncmp(line + n, key + m, rest) &&
           !strncmp(line + n + rest, figures_begin, sizeof figures_begin - 1);
}

/* The line of the file of --resume with this row's key, or NULL. */
static char *find_kept(const comparison *c, const result_row *r)
{
    text_file made;
    FILE *file = c->kept ? begin_text(&made) : NULL;
    if (!file) return NULL;
    put_key(file, c->j, r, 1);
    char *key = end_text(&made), *line = key ? c->kept : NULL;
    while (line && !has_key(line, key)) {
        line = strchr(line, '\n');
        if (line) line++;
    }
    free(key);
    return line;
}

/* Take over a line, under the name that the row has now; it is found no more. */
static besa_result take_kept(comparison *c, result_row *r, char *line)
{
    text_file taken;
    FILE *file = line ? begin_text(&taken) : NULL;
    if (!file) return out_of_memory(c->j);
    const char *rest = strstr(line, figures_begin);
    size_t n = strcspn(rest, "\n");
    if (n && rest[n - 1] == ',') n--;
    put_key(file, c->j, r, 0);
    fprintf(file, "%.*s", (int)n, rest);
    r->line = end_text(&taken);
    if (!r->line) return out_of_memory(c->j);
    line[0] = '-';
    read_figures(r, r->line, c->j->first[r->test + 1] - c->j->first[r->test]);
    return add_row(c, r);
}

/* ---- compare ------------------------------------------------------------------------------- */

/* A run of the comparison. */
typedef struct cell {
    int row, sparsity;
    int64_t nsamples, seed;
} cell;

static cell cell_of(const comparison *c, int i)
{
    const settings *s = c->j->s;
    const int seeds = s->num_seeds ? s->num_seeds : 1;
    cell at;
    at.sparsity = i % s->num_sparsities;
    at.row = i / s->num_sparsities % s->num_rows;
    i /= s->num_sparsities * s->num_rows;
    at.seed = s->num_seeds ? s->seeds[i % seeds] : s->seed;
    at.nsamples = s->num_counts ? s->counts[i / seeds] : 0;
    return at;
}

static int count_cells(const settings *s)
{
    return s->num_sparsities * s->num_rows * (s->num_seeds ? s->num_seeds : 1) * (s->num_counts ? s->num_counts : 1);
}

/* The calibration that the cell has, where it is not there already. */
static besa_result take_calibration(job *j, const cell *at)
{
    besa_calibration *k = &j->calibration;
    if (j->ids && j->ids_seed == at->seed && (!at->nsamples || k->nsamples == at->nsamples)) return BESA_OK;
    free(j->ids);
    j->ids = NULL;
    k->nsamples = at->nsamples ? at->nsamples : 0;
    j->ids_seed = at->seed;
    j->has_outliers = 0;
    besa_result result = load_windows(j, j->s->tokens, 128, (uint64_t)at->seed, "nsamples", "seqlen", &k->nsamples,
                                      &k->seqlen, &j->ids);
    k->ids = j->ids;
    if (result || !strcmp(j->sha256[0], j->text_sha256)) return result;
    return fail(j, BESA_ERROR_TOKENS, "%s has changed since this comparison began: expected the same text in all runs", j->s->tokens);
}

/* Set the options and the data of a cell. */
static besa_result take_cell(comparison *c, const cell *at, row *r)
{
    settings *s = c->j->s;
    *r = begin_row(s, at->row);
    s->prune.rates.target = s->sparsity[at->sparsity];
    return take_calibration(c->j, at);
}

/* The rows of a cell, one for each test, from the file of --resume; 1 where all are there. */
static int has_kept(const comparison *c, const result_row *r)
{
    int all = 1;
    for (int i = 0; i < c->j->s->num_tests; i++) {
        result_row one = *r;
        one.test = i;
        all = all && find_kept(c, &one);
    }
    return all;
}

static result_row row_of(const comparison *c, const row *r, const cell *at)
{
    result_row made;
    memset(&made, 0, sizeof made);
    snprintf(made.method, sizeof made.method, "%s", r->label);
    made.sparsity = c->j->s->sparsity[at->sparsity];
    made.nsamples = c->j->calibration.nsamples;
    made.seed = at->seed;
    return made;
}

/* Before the first run: a run that would be refused ends the command here, what is known of each is said, and how much work
 * there is. */
static besa_result check_runs(comparison *c)
{
    job *j = c->j;
    const settings *s = j->s;
    int runs = 0;
    besa_plan_result plan[2];
    plan[1].notes[0] = 0;
    if (s->left_out)
        fprintf(stderr, "besa is left out: with a pattern it has no rates to learn; --preset best: its weights\n");
    for (int i = 0; i < count_cells(s); i++) {
        const cell at = cell_of(c, i);
        row r;
        TRY(take_cell(c, &at, &r));
        if (at.sparsity == 0) plan[1].notes[0] = 0;
        if (at.seed != cell_of(c, 0).seed) TRY(make_plan(j, &plan[0])); /* another seed changes nothing of what is said */
        else TRY(print_notes(j, r.label, plan[1].notes, &plan[0]));
        plan[1] = plan[0];
        const result_row made = row_of(c, &r, &at);
        if (has_kept(c, &made)) continue;
        runs++;
        c->work.all += plan[0].flop;
    }
    if (s->quiet) return BESA_OK;
    if (c->kept) {
        print_text(stderr, s->resume);
        fprintf(stderr, ": %d of %d runs are there\n", count_cells(s) - runs, count_cells(s));
    }
    fprintf(stderr, "%d runs, %s in matrix products\n", runs, with_unit(c->work.all, "FLOP").s);
    return BESA_OK;
}

/* With --block-targets owl: the outliers of this calibration, once for all methods and sparsities. */
static besa_result take_outliers(job *j)
{
    if (!j->s->owl || j->has_outliers) return BESA_OK;
    j->has_outliers = 1;
    return find_outliers(j);
}

/* The options of a report as JSON, owned by the caller; NULL where there is no memory. */
static char *options_of(const besa_report *report)
{
    char *json = besa_report_json(report), *at = json ? strstr(json, "\"options\": {") : NULL, *options = NULL;
    if (at) {
        at += strlen("\"options\": ");
        const size_t n = strcspn(at, "}") + 1;
        options = (char *)calloc(n + 1, 1);
        if (options) memcpy(options, at, n);
    }
    free(json);
    return options;
}

/* Rows of a report, one for each test. */
static besa_result add_report(comparison *c, result_row *made, besa_report *report)
{
    char *options = options_of(report);
    besa_result result = BESA_OK;
    made->reached = report->sparsity;
    made->seconds = report->seconds;
    for (int i = 0; i < c->j->s->num_tests && !result; i++) {
        made->test = i;
        made->d = summary_of(c->j, report->window, report->kl, i);
        made->line = row_line(c->j, made, options);
        if (made->line) read_figures(made, made->line, made->d.windows); /* the digits that a run which takes it over has */
        result = made->line ? add_row(c, made) : out_of_memory(c->j);
        if (!result) print_row(c, made, seed_of(made).s);
    }
    free(options);
    return result;
}

/* How long the rest may take, where no line on a terminal says so. */
static void say_rest(const comparison *c, int done)
{
    const double left = seconds_left(&c->work, 0, 0);
    if (done == 1 && left > 0 && !c->j->s->quiet && !isatty(STDERR_FILENO))
        fprintf(stderr, "the other runs: %s\n", in_minutes(left).s);
}

/* Prune and measure once, or take over what is known. */
static besa_result compare_one(comparison *c, int i, int *done)
{
    job *j = c->j;
    besa_report report;
    besa_plan_result plan;
    const cell at = cell_of(c, i);
    row r;
    char label[MAX_NAME + 32];
    TRY(take_cell(c, &at, &r));
    result_row made = row_of(c, &r, &at);
    if (has_kept(c, &made)) {
        for (made.test = 0; made.test < j->s->num_tests; made.test++) {
            result_row one = made;
            TRY(take_kept(c, &one, find_kept(c, &one)));
            print_row(c, &one, seed_of(&one).s);
        }
        return BESA_OK;
    }
    TRY(take_outliers(j));
    TRY(take_targets(j));
    TRY(make_plan(j, &plan));
    snprintf(label, sizeof label, "%s %g %%", r.label, 100 * j->s->prune.rates.target);
    progress_view view = begin_progress(j->s, label);
    view.work = &c->work;
    made.flop = c->work.now = plan.flop;
    TRY(prune(j, NULL, &view, &report));
    c->work.done += plan.flop;
    c->work.seconds += report.seconds;
    besa_result result = add_report(c, &made, &report);
    besa_report_free(&report);
    say_rest(c, ++*done);
    return result ? result : save(c);
}

/* The rows of a model that is not pruned: the reference itself, or SRC beside it. */
static besa_result add_dense(comparison *c, const char *name, measurement *m, int is_reference)
{
    const job *j = c->j;
    for (int i = 0; i < j->s->num_tests; i++) {
        result_row made, known;
        memset(&made, 0, sizeof made);
        snprintf(made.method, sizeof made.method, "%s", name);
        made.test = i;
        made.is_reference = is_reference;
        made.d = summary_of(j, m->window, m->kl, i);
        made.line = row_line(j, &made, NULL);
        if (!made.line) return out_of_memory(c->j);
        char *line = find_kept(c, &made);
        memset(&known, 0, sizeof known);
        if (line) read_figures(&known, line, 0);
        if (line && fabs(known.d.perplexity / made.d.perplexity - 1) > 1e-8) {
            free(made.line);
            return fail(c->j, BESA_ERROR_RESUME, "--resume %s is of another model or machine: perplexity of %s on %s is %.9g there and "
                        "%.9g here", j->s->resume, name, j->s->tests[i].name, known.d.perplexity, made.d.perplexity);
        }
        if (line) line[0] = '-';
        TRY(add_row(c, &made));
        print_row(c, &made, "");
    }
    return BESA_OK;
}

/* The reference as a measurement of itself. */
static besa_result measure_reference(job *j, measurement *m)
{
    const int64_t windows = all_windows(j);
    m->window = (besa_window *)calloc((size_t)windows, sizeof *m->window);
    m->kl = (float *)calloc((size_t)(windows * (j->seqlen - 1)) + 1, sizeof *m->kl);
    if (!m->window || !m->kl) return out_of_memory(j);
    for (int64_t i = 0; i < windows; i++) {
        m->window[i].nll = m->window[i].reference_nll = j->reference.nll[i];
        m->window[i].same = 1;
    }
    return BESA_OK;
}

static besa_result measure_dense(comparison *c)
{
    job *j = c->j;
    measurement m = {NULL, NULL};
    TRY(make_reference(j, j->reference.checkpoint, j->against ? "against" : "dense"));
    print_head(c);
    if (j->s->owl) {
        const cell at = cell_of(c, 0);
        row r;
        TRY(take_cell(c, &at, &r));
        TRY(take_outliers(j));
        for (int k = 0; k < j->s->num_sparsities; k++) {
            j->s->prune.rates.target = j->s->sparsity[k];
            TRY(take_targets(j));
            print_targets(j->s);
        }
    }
    print_columns(c);
    besa_result result = measure_reference(j, &m);
    if (!result) result = add_dense(c, j->against ? "against" : "dense", &m, 1);
    free_measurement(&m);
    if (!j->against || result) return result;
    result = measure(j, "dense", &m);
    if (!result) result = add_dense(c, "dense", &m, 0);
    free_measurement(&m);
    return result;
}

static void print_means(const comparison *c)
{
    const settings *s = c->j->s;
    if (s->num_seeds < 2) return;
    printf("\nmean and standard deviation of %d seeds\n", s->num_seeds);
    for (int i = 0; i < c->num_rows; i++) {
        result_row mean;
        if (mean_row(c, i, &mean)) print_row(c, &mean, "mean");
    }
}

static besa_result compare_all(comparison *c)
{
    int done = 0;
    TRY(open_against(c->j));
    TRY(lock_results(c));
    TRY(read_kept(c));
    TRY(check_runs(c));
    TRY(save(c)); /* can it be written? The work may take hours */
    TRY(measure_dense(c));
    TRY(save(c));
    for (int i = 0; i < count_cells(c->j->s); i++) TRY(compare_one(c, i, &done));
    print_means(c);
    return save(c);
}

static besa_result run_compare(job *j)
{
    comparison c;
    memset(&c, 0, sizeof c);
    c.j = j;
    c.results = j->s->json_file ? j->s->json_file : j->s->resume;
    c.lock = -1;
    besa_result result = compare_all(&c);
    free_comparison(&c);
    return result;
}
