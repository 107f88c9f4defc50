/* Prune a checkpoint to 50 % and measure its perplexity before and after, for instance:
 *   ./quickstart stories260K stories260K/calibration_tokens.npy stories260K/test_tokens.npy quickstart-pruned
 * It takes a few seconds; the output must not exist. */
#define BESA_IMPLEMENTATION
#include "besa.h"

enum { SAMPLES = 64, WINDOWS = 128, SEQLEN = 256 };
static int32_t calibration_ids[SAMPLES * SEQLEN], test_ids[WINDOWS * SEQLEN];

#define CHECK(call)                                                                                \
    do {                                                                                           \
        if (call) return fprintf(stderr, "%s\n", error.message), 1;                                \
    } while (0)

int main(int argc, char **argv)
{
    if (argc != 5) return fprintf(stderr, "usage: quickstart CHECKPOINT CALIBRATION_TOKENS TEST_TOKENS OUTPUT\n"), 2;
    besa_error error;
    besa_checkpoint *model;
    CHECK(besa_checkpoint_open(&model, argv[1], &error));
    const int64_t vocab_size = besa_checkpoint_config(model)->vocab_size;

    besa_tokens calibration, test;
    CHECK(besa_tokens_load(&calibration, argv[2], &error));
    CHECK(besa_tokens_load(&test, argv[3], &error));
    CHECK(besa_tokens_sample(&calibration, SAMPLES, SEQLEN, 0, vocab_size, calibration_ids, &error));
    CHECK(besa_tokens_sample(&test, WINDOWS, SEQLEN, 0, vocab_size, test_ids, &error));

    double dense;
    CHECK(besa_perplexity(model, NULL, test_ids, WINDOWS, SEQLEN, &dense, NULL, NULL, NULL, &error));
    besa_prune_options options = {0};
    options.rates.target = 0.5;
    besa_calibration data = {0};
    data.ids = calibration_ids, data.nsamples = SAMPLES, data.seqlen = SEQLEN;
    data.test_ids = test_ids, data.test_windows = WINDOWS, data.test_seqlen = SEQLEN;
    besa_report report;
    CHECK(besa_prune(model, argv[4], NULL, &data, &options, &report, &error));
    printf("sparsity %.4f, perplexity %.3f before and %.3f after\n", report.sparsity, dense, report.perplexity);

    besa_report_free(&report);
    besa_tokens_free(&calibration);
    besa_tokens_free(&test);
    besa_checkpoint_close(model);
    return 0;
}
