/* The model card of an output, README.md: what the Hub reads of it, and how the model came about. Part of besa.c.
 *
 * The same run gives the same card, however often it was interrupted, in whatever directory and by however many threads: of
 * paths it has the last part alone, and no option that says only how to run or what else to write. */

/* Text of a line of its own: what would end it becomes a blank. */
static void write_part(FILE *file, const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++) putc((unsigned char)text[i] < 0x20 || text[i] == 0x7F ? ' ' : text[i], file);
}

static void write_words(FILE *file, const char *text) { write_part(file, text, strlen(text)); }

/* A word of a command line, in quotes where the shell would take it for something else. */
static void write_argument(FILE *file, const char *word)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+=:,/@%";
    const int is_plain = *word && strspn(word, plain) == strlen(word);
    putc(' ', file);
    if (!is_plain) putc('\'', file);
    for (; *word; word++) {
        if (*word == '\'') fprintf(file, "'\\''");
        else putc((unsigned char)*word < 0x20 || *word == 0x7F ? '?' : *word, file);
    }
    if (!is_plain) putc('\'', file);
}

/* A text of YAML, in the quotes that it shares with JSON. */
static void write_quoted(FILE *file, const char *text)
{
    putc('"', file);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') putc('\\', file);
        putc((unsigned char)*text < 0x20 || *text == 0x7F ? ' ' : *text, file);
    }
    putc('"', file);
}

static const char *last_part(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

/* The command line as far as it decides the output. */
static void write_command(FILE *file, const settings *s)
{
    static const char *const silent[] = {"threads", "quiet", "no-quiet", "report", "trace", "save-rates", "save-masks", "memory"};
    static const char *const files[] = {"tokens", "test", "masks", "block-targets"};
    fprintf(file, "    besa %s", s->command->name);
    for (int i = 0; s->arguments[i]; i++) {
        const char *argument = s->arguments[i], *equals = strchr(argument, '=');
        char name[MAX_NAME];
        if (argument[0] != '-') {
            write_argument(file, last_part(argument));
            continue;
        }
        snprintf(name, sizeof name, "%.*s", (int)strcspn(argument + 2, "="), argument + 2);
        const option *o = find_option(s, name);
        const int has_value = o && o->kind != FLAG;
        const char *value = !has_value ? NULL : equals ? equals + 1 : s->arguments[++i];
        int is_silent = 0, is_file = 0;
        for (size_t k = 0; k < sizeof silent / sizeof *silent; k++) is_silent |= !strcmp(name, silent[k]);
        for (size_t k = 0; k < sizeof files / sizeof *files; k++) is_file |= !strcmp(name, files[k]);
        if (is_silent) continue;
        fprintf(file, " --%s", name);
        if (value) write_argument(file, is_file ? last_part(value) : value);
    }
    fprintf(file, "\n");
}

/* The command line as it was given, for free; NULL without memory. */
static char *whole_command(const settings *s)
{
    text_file line;
    FILE *file = begin_text(&line);
    if (!file) return NULL;
    fprintf(file, "besa %s", s->command->name);
    for (int i = 0; s->arguments[i]; i++) write_argument(file, s->arguments[i]);
    return end_text(&line);
}

/* Whether a line ends here, but for blanks and a comment. */
static int ends(const char *at)
{
    const size_t blanks = strspn(at, " \t");
    return strchr("\r\n", at[blanks]) || (blanks && at[blanks] == '#');
}

/* Whether a line belongs to the value before it. */
static int goes_on(const char *line) { return (*line == ' ' || *line == '\t') && !ends(line); }

static const char *next_line(const char *line)
{
    line += strcspn(line, "\n");
    return *line ? line + 1 : line;
}

/* How many characters of a line, from here on, are a YAML value: a plain word or words, or a quoted text, with no more than a
 * comment behind it. 0: there is none, or one of another kind. */
static size_t scalar_length(const char *value)
{
    size_t n = strcspn(value, "\r\n");
    if (*value == '"' || *value == '\'') {
        n = 1 + strcspn(value + 1, *value == '"' ? "\"\\\r\n" : "'\\\r\n");
        return value[n] == *value && ends(value + n + 1) ? n + 1 : 0;
    }
    if (!n || strchr("|>&*!%@`[{-?,#", *value)) return 0;
    for (size_t i = 1; i < n; i++)
        if (ends(value + i)) n = i;
    const size_t at = strcspn(value, ":#");
    return at + 1 >= n || !strncmp(value + at, ":/", 2) ? n : 0; /* the address of a page */
}

/* The value of a list's item in this line, or NULL. */
static const char *item_of(const char *line)
{
    line += strspn(line, " ");
    return line[0] == '-' && line[1] == ' ' ? line + 1 + strspn(line + 1, " ") : NULL;
}

/* A member of the card's front matter from behind its colon: of a value on its line, or a list of such below it. 0: it has another,
 * of which nothing is written. */
static int write_member(FILE *file, const char *key, const char *rest)
{
    const char *value = rest + strspn(rest, " \t"), *below = next_line(rest);
    const size_t n = scalar_length(value);
    if (n && !goes_on(below)) {
        fprintf(file, "%s: ", key);
        write_part(file, value, n);
        fprintf(file, "\n");
        return 1;
    }
    if (n || !ends(rest) || !item_of(below)) return 0;
    for (int writes = 0; writes < 2; writes++) {
        if (writes) fprintf(file, "%s:\n", key);
        const char *line = below;
        for (const char *item; (item = item_of(line)) != NULL; line = next_line(line)) {
            if (!scalar_length(item)) return 0;
            if (writes) fprintf(file, "- ");
            if (writes) write_part(file, item, scalar_length(item));
            if (writes) fprintf(file, "\n");
        }
        if (goes_on(line)) return 0;
    }
    return 1;
}

/* The start of a file as text, for free; NULL where it is no file, or there is no memory. */
static char *read_front(const char *path)
{
    const size_t most = 1 << 20;
    struct stat there;
    FILE *file = !stat(path, &there) && S_ISREG(there.st_mode) ? fopen(path, "r") : NULL;
    char *front = file ? (char *)calloc(most + 1, 1) : NULL;
    if (front) front[fread(front, 1, most, file)] = 0;
    if (file) fclose(file);
    return front;
}

/* What the card of the model that was pruned says of its licence, as far as it stands by itself; what does not is said. */
static void write_license(FILE *file, const char *source)
{
    static const char *const keys[] = {"license", "license_name", "license_link"};
    char path[4096];
    snprintf(path, sizeof path, "%s/README.md", source);
    char *front = read_front(path);
    const char *line = front && !strncmp(front, "\xEF\xBB\xBF", 3) ? front + 3 : front; /* a byte order mark */
    int inside = line && !strncmp(line, "---", 3);
    while (inside && *(line = next_line(line)) && strncmp(line, "---", 3))
        for (int i = 0; i < 3; i++) {
            const size_t n = strlen(keys[i]);
            if (strncmp(line, keys[i], n) || line[n] != ':' || !strchr(" \t\r\n", line[n + 1])) continue;
            if (!write_member(file, keys[i], line + n + 1))
                fprintf(stderr, "not kept: %s of the source's README.md (its value is not a word on its line, nor a list of words below it)\n",
                        keys[i]);
        }
    free(front);
}

static void write_front_matter(FILE *file, const settings *s, const char *base)
{
    const int bits = s->prune.bits, m = s->prune.pattern_m;
    fprintf(file, "---\nbase_model: ");
    write_quoted(file, base);
    fprintf(file, "\nbase_model_relation: %s\n", bits ? "quantized" : "finetune"); /* of the Hub's words the nearest */
    write_license(file, s->path[0]);
    fprintf(file, "library_name: transformers\npipeline_tag: text-generation\ntags:\n- besa\n- pruned\n- sparse\n");
    if (s->prune.method != BESA_METHOD_BESA) fprintf(file, "- %s\n", besa_method_name(s->prune.method));
    if (m) fprintf(file, "- \"%d:%d\"\n", s->prune.pattern_n, m);
    if (bits) fprintf(file, "- %d-bit\n", bits);
    fprintf(file, "---\n\n");
}

static void write_table(FILE *file, const settings *s, const besa_calibration *c, const besa_report *r)
{
    fprintf(file, "| | |\n|---|---|\n| method | %s", besa_method_name(s->prune.method));
    if (s->prune.preset) fprintf(file, ", preset %s", s->prune.preset);
    fprintf(file, " |\n| sparsity | %.4f: %lld of %lld weights are 0 |\n", r->sparsity, (long long)r->pruned, (long long)r->weights);
    if (s->prune.pattern_m)
        fprintf(file, "| pattern | %d of every %d consecutive weights are 0 |\n", s->prune.pattern_n, s->prune.pattern_m);
    if (s->prune.bits) fprintf(file, "| bits | %d; codes and scales are in besa_quantization.safetensors too |\n", s->prune.bits);
    fprintf(file, "| calibration | %lld sequences of %lld tokens of ", (long long)c->nsamples, (long long)c->seqlen);
    write_words(file, last_part(c->file));
    fprintf(file, " |\n");
    if (!(r->perplexity > 0)) return;
    fprintf(file, "| perplexity | %.4f", r->perplexity);
    if (r->dense_perplexity > 0) fprintf(file, ", of the dense model %.4f;", r->dense_perplexity);
    fprintf(file, " on %lld windows of %lld tokens of ", (long long)c->test_windows, (long long)c->test_seqlen);
    write_words(file, last_part(c->test_file));
    fprintf(file, " |\n");
}

/* The card, for free; NULL without memory. */
static char *make_card(const settings *s, const char *base, const besa_calibration *c, const besa_report *r)
{
    text_file card;
    FILE *file = begin_text(&card);
    if (!file) return NULL;
    write_front_matter(file, s, base);
    fprintf(file, "# ");
    write_words(file, base);
    const besa_prune_options *o = &r->options;
    int fitted = o->learn != BESA_LEARN_RATES || o->refit || o->method == BESA_METHOD_SPARSEGPT;
    fprintf(file, ", pruned\n\nWeights of the linear layers in the decoder's blocks were set to 0%s%s%s, by besa %d.%d; all else is as "
            "it was.\n\n", fitted ? ", and the others fitted to that" : "", o->bits ? ", and rounded to grids" : "",
            o->learn != BESA_LEARN_RATES && o->learn_vectors ? "; norms and biases were fitted too" : "", BESA_VERSION_MAJOR, BESA_VERSION_MINOR);
    write_table(file, s, c, r);
    fprintf(file, "\nThe command was\n\n");
    write_command(file, s);
    fprintf(file, "\n`besa.json` has every option, hashes of the text and of the source's config.json, and the sparsity of each layer.\n");
    return end_text(&card);
}
