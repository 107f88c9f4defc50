/* test_comm - one run in several ranks, which are threads here: shares, sums, failures, and what is written.
 *
 *     test_comm STORIES260K_DIRECTORY [part of a test's name] */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <time.h>

#define BESA__CHUNK_TOKENS 64                   /* two sequences at a time: batches come in pieces */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "test.h"
#include "fixture.h"

enum { MOST_RANKS = 4, SEQLEN = 32 };

static const char *g_stories;
static char g_small[512];                       /* a checkpoint of two tiny blocks */
static besa_tokens g_calibration, g_test;

/* ---- a comm of threads ----------------------------------------------------------------------- */

enum call { REDUCE, BROADCAST, BARRIER };

/* Where the ranks of a run meet. */
typedef struct room {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    int size, arrived;
    int64_t turn;                               /* meetings so far */
    int failed, hung, differ;                   /* a rank has failed; one waited in vain; calls did not fit together */
    besa_error error;                           /* of the first that failed */
    enum call call;
    size_t bytes;
    int root;
    void *data[MOST_RANKS];
    int64_t fault_call;                         /* the call with this number, from 1, ... */
    int fault_rank;                             /* ... fails on this rank; 0: none */
    size_t corrupt;                             /* sums of so many floats and more that rank 1 gets are others than the rest's; 0: none */
    double reduced;                             /* bytes */
} room;

/* What the last to arrive does for all. */
static void room_exchange(room *r)
{
    float *sum = (float *)malloc(r->bytes ? r->bytes : 1);
    size_t count = r->bytes / sizeof(float);
    for (size_t i = 0; r->call == REDUCE && i < count; i++) {
        sum[i] = 0;
        for (int k = 0; k < r->size; k++) sum[i] += ((const float *)r->data[k])[i];
    }
    for (int k = 0; k < r->size; k++) {
        if (r->call == REDUCE) memcpy(r->data[k], sum, r->bytes);
        if (r->call == BROADCAST && k != r->root) memcpy(r->data[k], r->data[r->root], r->bytes);
        if (r->call == REDUCE && r->corrupt && count >= r->corrupt && k == 1)
            for (size_t i = 0; i < count; i++) ((float *)r->data[k])[i] *= 1 + 0.01f * (float)((i + (size_t)r->turn) % 7);
    }
    if (r->call == REDUCE) r->reduced += (double)r->bytes;
    free(sum);
}

typedef struct seat {
    room *room;
    int rank;
    int64_t calls;
} seat;

static besa_result meet(seat *s, enum call call, void *data, size_t bytes, int root, besa_error *error)
{
    room *r = s->room;
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += 60;
    if (++s->calls == r->fault_call && s->rank == r->fault_rank) return besa__fail(error, BESA_ERROR_COMM, "the line is dead");
    pthread_mutex_lock(&r->lock);
    int64_t turn = r->turn;
    if (r->arrived && (r->call != call || r->bytes != bytes || r->root != root)) r->differ = r->failed = 1;
    r->call = call, r->bytes = bytes, r->root = root;
    r->data[s->rank] = data;
    if (!r->failed && ++r->arrived == r->size) {
        room_exchange(r);
        r->arrived = 0;
        r->turn++;
        pthread_cond_broadcast(&r->moved);
    }
    while (r->turn == turn && !r->failed)
        if (pthread_cond_timedwait(&r->moved, &r->lock, &end)) r->hung = r->failed = 1;
    int ok = r->turn != turn;
    if (r->differ || r->hung) pthread_cond_broadcast(&r->moved);
    if (!ok && error) *error = r->error, error->code = BESA_ERROR_COMM;
    pthread_mutex_unlock(&r->lock);
    return ok ? BESA_OK : BESA_ERROR_COMM;
}

static besa_result room_reduce(void *user, besa_backend *be, besa_queue q, float *data, int64_t count, besa_error *error)
{
    CHECK(q == BESA_QUEUE_REDUCE && be && count > 0, "a reduction of %lld floats on queue %d", (long long)count, (int)q);
    return meet((seat *)user, REDUCE, data, (size_t)count * sizeof *data, 0, error);
}

static besa_result room_broadcast(void *user, void *data, size_t bytes, int root, besa_error *error)
{
    return meet((seat *)user, BROADCAST, data, bytes, root, error);
}

static besa_result room_barrier(void *user, besa_error *error) { return meet((seat *)user, BARRIER, NULL, 0, 0, error); }

static void room_fail(void *user, const besa_error *error)
{
    room *r = ((seat *)user)->room;
    pthread_mutex_lock(&r->lock);
    if (!r->failed) r->error = *error;
    r->failed = 1;
    pthread_cond_broadcast(&r->moved);
    pthread_mutex_unlock(&r->lock);
}

/* ---- a run in ranks -------------------------------------------------------------------------- */

typedef struct run {
    const char *source, *output;
    int64_t nsamples, seqlen, windows;
    besa_prune_options options;
    const char *masks;                          /* a checkpoint, with method keep */
    int outliers;                               /* block targets come from them */
    int ranks;
    room room;                                  /* faults may be set beforehand */
    int cancel_rank, other_rank, tight_rank;    /* 1 ..: this one stops in the middle; has another token; less memory */
    int64_t calls[MOST_RANKS];                  /* of the comm */
    double planned;                             /* bytes of sums, by rank 0's plan */
    besa_result result[MOST_RANKS];
    besa_error error[MOST_RANKS];
    besa_report report[MOST_RANKS];
    float *sums;                                /* bucket sums of rank 0 in its first step, layer after layer, if wanted */
    int64_t sums_count, sums_room;
} run;

typedef struct rank_run {
    run *run;
    seat seat;
    besa_backend be;                            /* with rate_backward of its own */
    besa_result (*rate_backward)(besa_backend *be, float *dtheta_layer, float *dtheta_row, const float *sums,
                                 const float *theta_layer, const float *theta_row, const besa_penalty *penalty,
                                 const besa_rate_shape *s);
    int layers;
} rank_run;

static __thread rank_run *g_rank;

static besa_result keep_sums(besa_backend *be, float *dtheta_layer, float *dtheta_row, const float *sums,
                             const float *theta_layer, const float *theta_row, const besa_penalty *penalty,
                             const besa_rate_shape *s)
{
    run *r = g_rank->run;
    int64_t count = s->rows * (s->logits - 1);
    if (g_rank->seat.rank == 0 && g_rank->layers++ < BESA_LAYERS && r->sums_count + count <= r->sums_room) {
        memcpy(r->sums + r->sums_count, sums, (size_t)count * sizeof *sums);
        r->sums_count += count;
    }
    return g_rank->rate_backward(be, dtheta_layer, dtheta_row, sums, theta_layer, theta_row, penalty, s);
}

static int stop_half_way(void *user, const besa_progress *p)
{
    return ((rank_run *)user)->run->cancel_rank == ((rank_run *)user)->seat.rank && p->fraction > 0.6;
}

static besa_result prune_as(rank_run *k, besa_checkpoint *checkpoint, besa_checkpoint *masks, const besa_comm *comm)
{
    run *r = k->run;
    int rank = k->seat.rank;
    besa_error *error = &r->error[rank];
    const besa_config *config = besa_checkpoint_config(checkpoint);
    int64_t n = r->nsamples * r->seqlen, tests = r->windows * 64;
    int32_t *ids = (int32_t *)calloc((size_t)(n + tests), sizeof *ids);
    besa_prune_options o = r->options;
    besa_calibration c;
    double targets[64];
    besa_result result = BESA_OK;
    memset(&c, 0, sizeof c);
    for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)(g_calibration.ids[i] % config->vocab_size);
    for (int64_t i = 0; i < tests; i++) ids[n + i] = (int32_t)(g_test.ids[i] % config->vocab_size);
    if (r->other_rank && r->other_rank == rank) ids[3] = (ids[3] + 1) % (int32_t)config->vocab_size;
    c.ids = ids, c.nsamples = r->nsamples, c.seqlen = r->seqlen;
    c.test_ids = ids + n, c.test_windows = r->windows, c.test_seqlen = 64;
    o.comm = comm;
    o.masks = masks;
    if (r->cancel_rank) o.progress = stop_half_way, o.user = k;
    if (r->outliers) {
        result = besa_outliers(checkpoint, &k->be, &c, &o, 0, targets, error);
        if (!result) result = besa_outlier_targets(targets, targets, config->num_hidden_layers, o.rates.target, 0, error);
        o.block_targets = targets, o.num_block_targets = config->num_hidden_layers;
    }
    besa_plan_result plan;
    if (!result && rank == 0 && !besa_plan(checkpoint, &k->be, &c, &o, &plan, error)) r->planned = plan.reduced_bytes;
    if (!result && r->tight_rank == rank && rank && !besa_plan(checkpoint, &k->be, &c, &o, &plan, error))
        o.device_memory = plan.device_bytes - 1; /* so many sequences at a time do not fit */
    if (!result) result = besa_prune(checkpoint, r->output, &k->be, &c, &o, &r->report[rank], error);
    free(ids);
    return result;
}

static void *run_rank(void *user)
{
    rank_run *k = (rank_run *)user;
    run *r = k->run;
    besa_comm comm = {k->seat.rank, r->ranks, &k->seat, room_reduce, room_broadcast, room_barrier, room_fail};
    besa_cpu_options one = {1, 0};
    besa_checkpoint *checkpoint = NULL, *masks = NULL;
    besa_error *error = &r->error[k->seat.rank];
    g_rank = k;
    besa_result result = besa_checkpoint_open(&checkpoint, r->source, error);
    if (!result && r->masks) result = besa_checkpoint_open(&masks, r->masks, error);
    if (!result) result = besa_cpu_backend(&k->be, &one, error);
    k->rate_backward = k->be.rate_backward;
    k->be.rate_backward = keep_sums;
    if (!result) result = prune_as(k, checkpoint, masks, r->ranks > 0 ? &comm : NULL);
    if (k->be.destroy) k->be.destroy(&k->be);
    besa_checkpoint_close(checkpoint);
    besa_checkpoint_close(masks);
    r->result[k->seat.rank] = result;
    r->calls[k->seat.rank] = k->seat.calls;
    return NULL;
}

/* ranks 0: one process without a comm. Reports are freed, but for their numbers. */
static void run_ranks(run *r)
{
    pthread_t thread[MOST_RANKS];
    rank_run rank[MOST_RANKS];
    int count = r->ranks > 0 ? r->ranks : 1;
    memset(rank, 0, sizeof rank);
    pthread_mutex_init(&r->room.lock, NULL);
    pthread_cond_init(&r->room.moved, NULL);
    r->room.size = count;
    for (int k = 0; k < count; k++) {
        rank[k].run = r;
        rank[k].seat.room = &r->room;
        rank[k].seat.rank = k;
        pthread_create(&thread[k], NULL, run_rank, &rank[k]);
    }
    for (int k = 0; k < count; k++) pthread_join(thread[k], NULL);
    for (int k = 0; k < count; k++) {
        besa_report kept = r->report[k];
        besa_report_free(&r->report[k]);
        r->report[k].perplexity = kept.perplexity, r->report[k].pruned = kept.pruned;
        r->report[k].resumed_blocks = kept.resumed_blocks;
    }
    CHECK(!r->room.hung && !r->room.differ, "%s", r->room.hung ? "a rank waited for the others in vain" : "ranks made different calls");
}

static run new_run(const char *source, const char *output, besa_method method, int ranks)
{
    run r;
    memset(&r, 0, sizeof r);
    r.source = source;
    r.output = output;
    r.nsamples = 24;
    r.seqlen = SEQLEN;
    r.options.method = method;
    r.options.rates.target = 0.5;
    r.options.batch_size = 4;
    r.ranks = ranks;
    return r;
}

static void check_all(const run *r, besa_result want, const char *word)
{
    for (int k = 0; k < (r->ranks ? r->ranks : 1); k++)
        CHECK(r->result[k] == want && (want == BESA_OK || strstr(r->error[k].message, word)), "rank %d of %d: %s: %s", k, r->ranks,
              besa_result_string(r->result[k]), r->error[k].message);
}

/* The share of all prunable weights that are 0 in one of two checkpoints alone. */
static double masks_differ(const char *a, const char *b)
{
    besa_checkpoint *one, *other;
    besa_error error;
    int64_t differ = 0, all = 0;
    if (besa_checkpoint_open(&one, a, &error) || besa_checkpoint_open(&other, b, &error)) return 1;
    for (int64_t i = 0; i < besa_checkpoint_config(one)->num_hidden_layers; i++)
        for (int l = 0; l < BESA_LAYERS; l++) {
            const besa_tensor *t = besa_checkpoint_layer(one, i, l), *u = besa_checkpoint_layer(other, i, l);
            size_t size = besa_dtype_size(t->dtype);
            for (size_t at = 0; at < t->bytes; at += size, all++) {
                uint32_t x = 0, y = 0;
                memcpy(&x, (const char *)t->data + at, size);
                memcpy(&y, (const char *)u->data + at, size);
                differ += (x << (33 - 8 * size) == 0) != (y << (33 - 8 * size) == 0);
            }
        }
    besa_checkpoint_close(one);
    besa_checkpoint_close(other);
    return (double)differ / (double)all;
}

/* ---- the cases ------------------------------------------------------------------------------- */

typedef struct run_case {
    const char *name;
    besa_method method;
    void (*set)(run *r);
} run_case;

static void set_nothing(run *r) { (void)r; }

/* Few steps of few blocks: as rates and weights learn together, rounding soon changes a mask, in one process with another
 * micro-batch, too, and perplexity by some per cent in a model as small as this. */
static void set_best(run *r)
{
    besa_preset(&r->options, "best", NULL);
    r->options.batch_size = 4;
    r->nsamples = 8;
}

static void set_vectors(run *r) { set_best(r), r->options.learn_vectors = 1, r->options.rates.optimizer = BESA_ADAMW; }
static void set_pattern(run *r) { set_best(r), r->options.pattern_n = 2, r->options.pattern_m = 4; }
static void set_weights(run *r) { r->options.learn = BESA_LEARN_WEIGHTS, r->options.weight_epochs = 1; }
static void set_rates(run *r) { r->options.rates.optimizer = BESA_ADAMW, r->options.rates.lr = 0.1; } /* moves at once */
static void set_layer(run *r) { set_rates(r), r->options.granularity = BESA_GRANULARITY_LAYER; }
static void set_attn(run *r) { set_rates(r), r->options.granularity = BESA_GRANULARITY_ATTN_MLP; }
static void set_bits(run *r) { r->options.bits = 4, r->options.group_size = 16; }
static void set_gradient(run *r) { r->options.importance = BESA_IMPORTANCE_GRADIENT, r->options.norm_all = 1; }
static void set_scored(run *r) { set_weights(r), set_gradient(r), r->options.pattern_n = 2, r->options.pattern_m = 4, r->options.batch_size = r->nsamples = 70; }
static void set_cg(run *r) { r->options.refit = BESA_REFIT_CG, r->nsamples = 48; }   /* fewer do not determine weights: rounding grows */
static void set_obs(run *r) { r->options.refit = BESA_REFIT_OBS; }
static void set_dense(run *r) { r->options.dense_stream = 1, r->nsamples = 11; }
static void set_outliers(run *r) { r->outliers = 1, r->options.num_blocks = 0; }
static void set_pieces(run *r) { set_best(r), r->options.batch_size = 8; }
static void set_rate_pieces(run *r) { set_rates(r), r->options.batch_size = 8, r->nsamples = 16; }
static void set_weight_pieces(run *r) { set_rate_pieces(r), r->options.learn = BESA_LEARN_WEIGHTS, r->options.weight_epochs = 1; }
static void set_masks(run *r) { r->masks = temp_path("wanda-0"); }

static const run_case g_cases[] = {
    {"wanda", BESA_METHOD_WANDA, set_nothing},      {"magnitude", BESA_METHOD_MAGNITUDE, set_nothing},
    {"sparsegpt", BESA_METHOD_SPARSEGPT, set_nothing}, {"besa", BESA_METHOD_BESA, set_rates},
    {"best", BESA_METHOD_BESA, set_best},           {"vectors", BESA_METHOD_BESA, set_vectors},
    {"pattern", BESA_METHOD_BESA, set_pattern},     {"besa, weights", BESA_METHOD_BESA, set_weights},
    {"wanda, weights", BESA_METHOD_WANDA, set_weights}, {"layer", BESA_METHOD_BESA, set_layer},
    {"attn-mlp", BESA_METHOD_BESA, set_attn},       {"bits", BESA_METHOD_BESA, set_bits},
    {"gradient", BESA_METHOD_BESA, set_gradient},   {"gradient, of few ranks", BESA_METHOD_BESA, set_scored}, {"cg", BESA_METHOD_WANDA, set_cg},
    {"obs", BESA_METHOD_BESA, set_obs},             {"dense stream", BESA_METHOD_BESA, set_dense},
    {"outliers", BESA_METHOD_WANDA, set_outliers},  {"pieces", BESA_METHOD_BESA, set_pieces},
    {"rates in pieces", BESA_METHOD_BESA, set_rate_pieces}, {"rates, then weights, in pieces", BESA_METHOD_BESA, set_weight_pieces},
    {"keep", BESA_METHOD_KEEP, set_masks},
};

static run case_run(const run_case *c, int ranks)
{
    run r = new_run(g_stories, temp_path("%s-%d", c->name, ranks), c->method, ranks);
    r.windows = 5;
    r.nsamples = 12;
    r.options.num_blocks = 2;
    c->set(&r);
    return r;
}

/* A case in one process, and then in 2 and 3 ranks. */
static void check_case(const run_case *c)
{
    run one = case_run(c, 0);
    run_ranks(&one);
    check_all(&one, BESA_OK, "");
    for (int ranks = 2; ranks <= 3; ranks++) {
        run r = case_run(c, ranks);
        run_ranks(&r);
        check_all(&r, BESA_OK, "");
        double apart = r.report[0].perplexity / one.report[0].perplexity - 1, differ = masks_differ(one.output, r.output);
        if (getenv("TEST_VERBOSE"))
            printf("    %-15s %d ranks: perplexity %.4f, %+.4f %%, %.4f %% of the masks differ, %.2f MB summed\n", c->name, ranks,
                   r.report[0].perplexity, 100 * apart, 100 * differ, r.room.reduced / 1e6);
        CHECK(fabs(apart) < 3e-3, "%s: perplexity %g with %d ranks, %g in one process", c->name, r.report[0].perplexity, ranks,
              one.report[0].perplexity);
        CHECK(differ < 0.02, "%s: %g of the masks differ with %d ranks", c->name, differ, ranks);
        CHECK(r.outliers || (r.planned <= r.room.reduced && r.planned >= (r.options.bits ? 0.9 : 0.99) * r.room.reduced - 4096), "%s: %g bytes summed, %g planned",
              c->name, r.room.reduced, r.planned);
        for (int k = 1; k < ranks; k++)
            CHECK(r.report[k].perplexity == r.report[0].perplexity && r.report[k].pruned == r.report[0].pruned,
                  "%s: rank %d reports another perplexity or count than rank 0", c->name, k);
        CHECK(r.report[0].pruned == one.report[0].pruned || c->method != BESA_METHOD_BESA || r.options.bits,
              "%s: %lld weights pruned, not %lld", c->name, (long long)r.report[0].pruned, (long long)one.report[0].pruned);
    }
}

/* ---- shares ---------------------------------------------------------------------------------- */

static void check_shares(int64_t all, int64_t batch, int ranks)
{
    static int seen[64];
    besa_comm comm = {0, ranks, NULL, room_reduce, room_broadcast, room_barrier, room_fail};
    besa__shares s;
    int64_t most = 0;
    memset(seen, 0, sizeof seen);
    for (comm.rank = 0; comm.rank < ranks; comm.rank++) {
        besa_error error;
        CHECK_OK(besa__shares_init(&s, &comm, all, batch, &error), error);
        int64_t count = besa__local_count(&s, all), before = 0;
        most = count > most ? count : most;
        for (int64_t i = 0; i < count; i++) {
            int64_t g = besa__global_sequence(&s, i);
            CHECK(g >= 0 && g < all && !seen[g]++, "sequence %lld of %lld in batches of %lld, rank %d of %d: %lld", (long long)i,
                  (long long)all, (long long)batch, comm.rank, ranks, (long long)g);
            CHECK(besa__local_count(&s, g) == i && besa__local_count(&s, g + 1) == i + 1, "the sequences before %lld", (long long)g);
            if (i && besa__following(&s, i - 1) > 1)
                CHECK(g == besa__global_sequence(&s, i - 1) + 1, "%lld does not follow", (long long)g);
        }
        for (int64_t b = 0; batch && b < all; b += batch) { /* a share of every batch, and the first is no smaller */
            int64_t share = besa__local_count(&s, b + batch < all ? b + batch : all) - before;
            CHECK(share >= 1 && share <= besa__share_of(s.comm, batch), "%lld of a batch of %lld", (long long)share, (long long)batch);
            before += share;
        }
    }
    for (int64_t i = 0; i < all; i++) CHECK(seen[i] == 1, "sequence %lld is nobody's", (long long)i);
    CHECK(most == besa__largest_share(&s), "the largest share is %lld, not %lld", (long long)most, (long long)besa__largest_share(&s));
}

/* ---- failures -------------------------------------------------------------------------------- */

static run small_run(const char *output, int ranks)
{
    run r = new_run(g_small, output, BESA_METHOD_BESA, ranks);
    r.nsamples = 8;
    r.seqlen = 8;
    r.windows = 3;
    return r;
}

/* Call number n fails on one rank: every rank ends with an error; what is finished is gone on from. */
static void check_faults(const char *whole)
{
    run counted = small_run(temp_path("counted"), 3);
    run_ranks(&counted);
    check_all(&counted, BESA_OK, "");
    CHECK(counted.calls[0] > 40, "only %lld calls", (long long)counted.calls[0]);
    for (int64_t n = 1; n <= counted.calls[0]; n += TEST_SANITIZED ? 5 : 1) {
        char first[256];
        run r = small_run(temp_path("fault"), 3);
        r.room.fault_call = n;
        r.room.fault_rank = (int)(n % 3);
        run_ranks(&r);
        int late = n == counted.calls[0];       /* the output is complete, which the others are to be told */
        for (int k = 0; k < 3; k++)
            CHECK(r.result[k] == BESA_ERROR_COMM && strstr(r.error[k].message, "the line is dead"), "call %lld, rank %d: %s: %s",
                  (long long)n, k, besa_result_string(r.result[k]), r.error[k].message);
        CHECK(exists(r.output) == late, "call %lld: an output was left", (long long)n);
        run again = small_run(r.output, 3);
        if (!late) run_ranks(&again);
        if (!late) check_all(&again, BESA_OK, "");
        CHECK(!compare_directories(whole, r.output, NULL, first), "call %lld: %s differs", (long long)n, first);
        remove_tree(r.output);
    }
}

/* ---- level 2 --------------------------------------------------------------------------------- */

enum { BLOCK_SEQUENCES = 10, BLOCK_SEQLEN = 8, BLOCK_WIDTH = 16 };

typedef struct block_run {
    seat seat;
    int ranks;
    float x[BLOCK_SEQUENCES * BLOCK_SEQLEN * BLOCK_WIDTH];
    void *pruned[BESA_LAYERS];
    besa_block_report report;
    besa_result result;
    besa_error error;
} block_run;

static const float *small_vector(const besa_checkpoint *c, const char *name)
{
    const besa_tensor *t = besa_checkpoint_find(c, name);
    return (const float *)memcpy(malloc(t->bytes), t->data, t->bytes);
}

/* The first block of the small checkpoint by a pruner of its own, on the sequences that are the rank's. */
static void prune_block(block_run *b, const besa_checkpoint *c, besa_backend *be, const besa_prune_options *o)
{
    besa_pruner *p = NULL;
    besa_block block;
    float cosine[BLOCK_SEQLEN * 4], sine[BLOCK_SEQLEN * 4];
    memset(&block, 0, sizeof block);
    block.shape = besa_checkpoint_config(c)->block;
    for (int i = 0; i < BESA_LAYERS; i++) {
        const besa_tensor *t = besa_checkpoint_layer(c, 0, i);
        block.weight[i] = memcpy(malloc(t->bytes), t->data, t->bytes);
        b->pruned[i] = malloc(t->bytes);
    }
    besa_rope_table(&block.shape, BLOCK_SEQLEN, cosine, sine);
    block.rope_cos = cosine, block.rope_sin = sine;
    block.norm1 = small_vector(c, "model.layers.0.input_layernorm.weight");
    block.norm2 = small_vector(c, "model.layers.0.post_attention_layernorm.weight");
    b->result = besa_pruner_create(&p, be, &block.shape, BESA_F32, 0, o, BLOCK_SEQUENCES, BLOCK_SEQLEN, &b->error);
    int64_t size = BLOCK_SEQLEN * BLOCK_WIDTH, count = p ? besa_pruner_sequences(p) : 0;
    for (int64_t i = 0; i < count; i++) {
        uint64_t state = 1000 + (uint64_t)besa_pruner_sequence(p, i);
        for (int64_t k = 0; k < size; k++) b->x[i * size + k] = fixture_random(&state);
    }
    if (p) b->result = besa_pruner_run(p, &block, NULL, b->x, NULL, b->pruned, &b->report, &b->error);
    besa_pruner_destroy(p);
    for (int i = 0; i < BESA_LAYERS; i++) free((void *)(uintptr_t)block.weight[i]);
    free((void *)(uintptr_t)block.norm1);
    free((void *)(uintptr_t)block.norm2);
}

static void *run_block(void *user)
{
    block_run *b = (block_run *)user;
    besa_comm comm = {b->seat.rank, b->ranks, &b->seat, room_reduce, room_broadcast, room_barrier, room_fail};
    besa_cpu_options one = {1, 0};
    besa_checkpoint *c;
    besa_backend be;
    besa_prune_options o;
    memset(&o, 0, sizeof o);
    o.rates.target = 0.5;
    o.rates.optimizer = BESA_ADAMW;
    o.rates.lr = 0.1;
    o.batch_size = 5;
    o.comm = b->ranks ? &comm : NULL;
    if (besa_checkpoint_open(&c, g_small, &b->error) || besa_cpu_backend(&be, &one, &b->error)) exit(1);
    prune_block(b, c, &be, &o);
    be.destroy(&be);
    besa_checkpoint_close(c);
    return NULL;
}

static void check_block(void)
{
    static block_run one, rank[3];
    static room r;
    pthread_t thread[3];
    pthread_mutex_init(&r.lock, NULL);
    pthread_cond_init(&r.moved, NULL);
    r.size = 3;
    run_block(&one);
    for (int k = 0; k < 3; k++) {
        rank[k].ranks = 3, rank[k].seat.rank = k, rank[k].seat.room = &r;
        pthread_create(&thread[k], NULL, run_block, &rank[k]);
    }
    for (int k = 0; k < 3; k++) pthread_join(thread[k], NULL);
    CHECK(one.result == BESA_OK, "%s", one.error.message);
    for (int k = 0; k < 3; k++) {
        CHECK(rank[k].result == BESA_OK, "rank %d: %s", k, rank[k].error.message);
        CHECK(fabs(rank[k].report.loss_all / one.report.loss_all - 1) < 1e-4 && rank[k].report.sparsity == one.report.sparsity,
              "rank %d: loss %g, %g in one process", k, rank[k].report.loss_all, one.report.loss_all);
        int64_t rows, columns;
        for (int i = 0; i < BESA_LAYERS; i++) {
            besa_block_layer(&(besa_block_shape){.hidden_size = 16, .intermediate_size = 24, .num_attention_heads = 2,
                             .num_key_value_heads = 1, .head_dim = 8}, i, &rows, &columns);
            CHECK(!memcmp(rank[k].pruned[i], rank[0].pruned[i], (size_t)(rows * columns) * sizeof(float)), "rank %d has other %s", k,
                  besa_layer_name(i));
            CHECK(!memcmp(one.pruned[i], rank[k].pruned[i], (size_t)(rows * columns) * sizeof(float)), "rank %d prunes other %s", k,
                  besa_layer_name(i));
        }
    }
    for (int i = 0; i < BESA_LAYERS; i++) free(one.pruned[i]), free(rank[0].pruned[i]), free(rank[1].pruned[i]), free(rank[2].pruned[i]);
}

static void run_tests(void)
{
    TEST("every sequence is one rank's, and every rank has a share of every batch") {
        check_shares(24, 4, 2), check_shares(24, 4, 3), check_shares(24, 4, 4), check_shares(23, 5, 3), check_shares(17, 7, 3);
        check_shares(10, 0, 4), check_shares(9, 9, 4), check_shares(64, 64, 5), check_shares(5, 0, 5);
    }
    for (size_t i = 0; i < sizeof g_cases / sizeof *g_cases; i++) {
        char *name = (char *)take(96);          /* the harness keeps it */
        snprintf(name, 96, "2 and 3 ranks do what one process does: %s", g_cases[i].name);
        TEST(name) check_case(&g_cases[i]);
    }
    TEST("the first step's bucket sums are those of one process, to rounding") {
        run r[MOST_RANKS + 1];
        for (int ranks = 0; ranks <= MOST_RANKS; ranks++) {
            r[ranks] = new_run(g_stories, temp_path("sums-%d", ranks), BESA_METHOD_BESA, ranks);
            r[ranks].options.importance = BESA_IMPORTANCE_MAGNITUDE; /* ranks that no sum rounds otherwise */
            r[ranks].options.num_blocks = 1;
            r[ranks].sums_room = 1 << 20;
            r[ranks].sums = take_floats(r[ranks].sums_room);
            run_ranks(&r[ranks]);
            check_all(&r[ranks], BESA_OK, "");
            double worst = 0, largest = 0;
            for (int64_t i = 0; i < r[0].sums_count; i++) {
                worst = fmax(worst, fabs((double)r[ranks].sums[i] - (double)r[0].sums[i]));
                largest = fmax(largest, fabs((double)r[0].sums[i]));
            }
            if (getenv("TEST_VERBOSE")) printf("    %d ranks: %.2g of the largest sum apart\n", ranks, worst / largest);
            CHECK(r[ranks].sums_count == r[0].sums_count && largest > 0, "%lld sums", (long long)r[ranks].sums_count);
            CHECK(worst <= (ranks < 2 ? 0 : 2e-6) * largest, "%d ranks: sums are %g of the largest apart", ranks, worst / largest);
        }
        CHECK(masks_differ(r[0].output, r[1].output) == 0, "one rank prunes other weights than one process");
    }
    TEST("as many ranks give the same bytes again") {
        char first[256];
        run a = new_run(g_stories, temp_path("again-a"), BESA_METHOD_BESA, 3), b = a;
        set_best(&a), set_best(&b);
        b.output = temp_path("again-b");
        run_ranks(&a), run_ranks(&b);
        check_all(&a, BESA_OK, ""), check_all(&b, BESA_OK, "");
        CHECK(!compare_directories(a.output, b.output, NULL, first), "%s differs", first);
    }
    TEST("any call that fails on one rank ends all, and the run goes on from there") {
        run whole = small_run(temp_path("whole"), 3);
        run_ranks(&whole);
        check_all(&whole, BESA_OK, "");
        check_faults(whole.output);
    }
    TEST("a rank that stops ends all; finished blocks are gone on from by as many ranks alone") {
        char first[256];
        run whole = small_run(temp_path("stop-whole"), 3), r = small_run(temp_path("stop"), 3);
        run_ranks(&whole);
        r.cancel_rank = 2;
        run_ranks(&r);
        CHECK(r.result[2] == BESA_ERROR_CANCELLED, "rank 2: %s", besa_result_string(r.result[2]));
        for (int k = 0; k < 2; k++)
            CHECK(r.result[k] == BESA_ERROR_COMM && strstr(r.error[k].message, "progress callback"), "rank %d: %s", k, r.error[k].message);
        run other = small_run(r.output, 2);
        run_ranks(&other);
        CHECK(other.result[0] == BESA_ERROR_RESUME && strstr(other.error[0].message, "processes=3 (this run: processes=2)"), "%s",
              other.error[0].message);
        CHECK(other.result[1] == BESA_ERROR_COMM, "rank 1: %s", besa_result_string(other.result[1]));
        r.cancel_rank = 0;
        memset(&r.room, 0, sizeof r.room);
        run_ranks(&r);
        check_all(&r, BESA_OK, "");
        CHECK(r.report[0].resumed_blocks == 1 && r.report[2].resumed_blocks == 1, "%lld blocks taken over",
              (long long)r.report[2].resumed_blocks);
        CHECK(!compare_directories(whole.output, r.output, NULL, first), "%s differs", first);
    }
    TEST("ranks that differ are told so") {
        run r = small_run(temp_path("differ"), 3);
        r.other_rank = 1;
        run_ranks(&r);
        check_all(&r, BESA_ERROR_COMM, "rank 1 has other arguments, tokens or files than rank 0: tokens=");
        run s = small_run(temp_path("differ"), 2);
        s.room.corrupt = 1;
        run_ranks(&s);
        check_all(&s, BESA_ERROR_COMM, "model.layers.0.*: rank 1 has other masks or losses than rank 0");
        run w = small_run(temp_path("drift"), 2); /* gradients of weights alone: masks are the same */
        w.options.method = BESA_METHOD_WANDA;
        w.options.learn = BESA_LEARN_WEIGHTS;
        w.room.corrupt = 16 * 16;
        run_ranks(&w);
        check_all(&w, BESA_ERROR_COMM, "model.layers.0.self_attn.q_proj: rank 1 has other values of kept weights than rank 0");
        CHECK(!exists(r.output), "an output was left");
    }
    TEST("ranks compute as many sequences at a time as the one with the least memory") {
        char first[256];
        run r = small_run(temp_path("tight"), 3), same = small_run(temp_path("tight-same"), 3);
        r.tight_rank = 1, same.tight_rank = 2;
        run_ranks(&r), run_ranks(&same);
        check_all(&r, BESA_OK, ""), check_all(&same, BESA_OK, "");
        CHECK(!compare_directories(r.output, same.output, NULL, first), "%s differs", first);
    }
    TEST("what cannot be shared is refused") {
        run r = small_run(temp_path("refused"), 3);
        r.options.batch_size = 2;
        run_ranks(&r);
        check_all(&r, BESA_ERROR_OPTION, "batch_size is 2, but 3 processes");
        r = small_run(temp_path("refused"), 3);
        r.options.batch_size = 3;
        run_ranks(&r);
        check_all(&r, BESA_ERROR_OPTION, "the last batch of 8 sequences has 2, for 3");
        r = small_run(temp_path("refused"), 4);
        r.options.method = BESA_METHOD_WANDA;
        r.nsamples = 3;
        run_ranks(&r);
        check_all(&r, BESA_ERROR_OPTION, "3 calibration sequences for 4 processes");
        besa__shares s;
        besa_comm comm = {2, 2, NULL, room_reduce, room_broadcast, room_barrier, room_fail};
        CHECK(besa__shares_init(&s, &comm, 8, 8, NULL) == BESA_ERROR_OPTION, "rank 2 of 2");
        comm.rank = 1, comm.barrier = NULL;
        CHECK(besa__shares_init(&s, &comm, 8, 8, NULL) == BESA_ERROR_OPTION, "no barrier");
    }
    TEST("a pruner of level 2 has its rank's sequences, and prunes as one process does") check_block();
}

int main(int argc, char **argv)
{
    besa_error error;
    char path[1024];
    if (argc < 2) return 1;
    g_stories = argv[1];
    test.only = argc > 2 ? argv[2] : NULL;
    temp_create();
    snprintf(path, sizeof path, "%s/calibration_tokens.npy", g_stories);
    if (besa_tokens_load(&g_calibration, path, &error)) return 1;
    snprintf(path, sizeof path, "%s/test_tokens.npy", g_stories);
    if (besa_tokens_load(&g_test, path, &error)) return 1;
    snprintf(g_small, sizeof g_small, "%s", temp_path("small"));
    fixture_random_llama(g_small, 2, 16, 24, 2, 1, 32, BESA_F32);
    run_tests();
    besa_tokens_free(&g_calibration);
    besa_tokens_free(&g_test);
    return test_finish();
}
