/* Level 2: one decoder block whose weights are in your memory, pruned by BESA, with progress, cancelling and errors.
 *   ./block              prunes a block of random weights to 60 %
 *   ./block cancel       stops when half of the work is done
 *   ./block error        asks for what there is not
 * No file is read or written. Whole models are level 1: quickstart.c. */
#define BESA_IMPLEMENTATION
#define BESA_NO_STDIO
#include "besa.h"

#include <stdio.h>

enum { SEQUENCES = 32, SEQLEN = 64, HIDDEN = 64, INTERMEDIATE = 160, HEADS = 4, KEY_VALUE_HEADS = 2, HEAD_DIM = 16,
       MOST = INTERMEDIATE * HIDDEN }; /* weights of the largest layer */
static float x[SEQUENCES * SEQLEN * HIDDEN];                           /* the block's inputs, (tokens, hidden size) */
static float w[BESA_LAYERS][MOST], what[BESA_LAYERS][MOST];            /* its weights, and the pruned ones */
static float norm[HIDDEN], cosine[SEQLEN * HEAD_DIM / 2], sine[SEQLEN * HEAD_DIM / 2];

static float uniform(void) /* in [-1, 1) */
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1;
}

/* Yours would come from a model. Rows of different sizes, so that there is something to learn. */
static besa_block make_block(void)
{
    besa_block block;
    memset(&block, 0, sizeof block); /* no biases, no q/k norms, no sliding window */
    block.shape.hidden_size = HIDDEN, block.shape.intermediate_size = INTERMEDIATE;
    block.shape.num_attention_heads = HEADS, block.shape.num_key_value_heads = KEY_VALUE_HEADS;
    block.shape.head_dim = HEAD_DIM;
    block.shape.rms_norm_eps = 1e-5, block.shape.rope.theta = 10000;
    block.dtype = BESA_F32;
    for (int layer = 0; layer < BESA_LAYERS; layer++) {
        int64_t rows, columns;
        besa_block_layer(&block.shape, layer, &rows, &columns);
        for (int64_t i = 0; i < rows * columns; i++)
            w[layer][i] = uniform() * (0.1f + 0.4f * (float)(i / columns % 3)) / sqrtf((float)columns);
        block.weight[layer] = w[layer];
    }
    for (int i = 0; i < HIDDEN; i++) norm[i] = 1;
    for (int i = 0; i < SEQUENCES * SEQLEN * HIDDEN; i++) x[i] = uniform() * (0.2f + (float)(i % HIDDEN % 5));
    besa_rope_table(&block.shape, SEQLEN, cosine, sine);
    block.norm1 = block.norm2 = norm, block.rope_cos = cosine, block.rope_sin = sine;
    return block;
}

/* Called after each unit of work. What it returns stops the run, where that is not 0. */
static int show(void *user, const besa_progress *p)
{
    const int *cancel = (const int *)user;
    fprintf(stderr, "\r%3.0f %% %-7s", 100 * p->fraction, besa_pass_name(p->pass));
    return *cancel && p->fraction > 0.5;
}

static void print_report(const besa_block_report *report)
{
    printf("\nsparsity %.4f of the block\n", report->sparsity);
    for (int layer = 0; layer < BESA_LAYERS; layer++) {
        const besa_layer_report *l = &report->layer[layer];
        printf("  %-10s %.4f, rows %.3f .. %.3f\n", besa_layer_name(layer), (double)l->pruned / (double)l->weights, l->rate_min,
               l->rate_max);
    }
    printf("loss %.4f with the same rate in every row, %.4f as it was learned\n", report->loss_uniform, report->loss_after);
}

int main(int argc, char **argv)
{
    besa_error error;
    besa_backend be;
    besa_pruner *pruner = NULL;
    besa_block_report report;
    besa_prune_options options = {0}; /* 0 means the documented default */
    int cancel = argc > 1 && !strcmp(argv[1], "cancel");
    const besa_block block = make_block();
    void *pruned[BESA_LAYERS];
    for (int layer = 0; layer < BESA_LAYERS; layer++) pruned[layer] = what[layer];
    options.rates.target = argc > 1 && !strcmp(argv[1], "error") ? 1.6 : 0.6;
    options.epochs = 4;
    options.progress = show, options.user = &cancel;

    besa_result result = besa_cpu_backend(&be, NULL, &error);
    if (result) return fprintf(stderr, "%s\n", error.message), 1;
    result = besa_pruner_create(&pruner, &be, &block.shape, block.dtype, 0, &options, SEQUENCES, SEQLEN, &error);
    if (!result) printf("%s", besa_pruner_notes(pruner)); /* such as too few learning steps; none here */
    if (!result) result = besa_pruner_run(pruner, &block, "model.layers.0.", x, NULL, pruned, &report, &error);
    if (!result) print_report(&report); /* x is now what the pruned block puts out: the next block's inputs */
    else fprintf(stderr, "\n%s: %s\n", besa_result_string(result), error.message);
    besa_pruner_destroy(pruner); /* one pruner serves any number of blocks of the shape */
    be.destroy(&be);
    return result == BESA_OK ? 0 : result == BESA_ERROR_CANCELLED ? 130 : 1;
}
