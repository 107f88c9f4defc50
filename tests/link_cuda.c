/* link_cuda.c - a C program that includes besa.h with neither macro and links the object that nvcc made of a .cu file.
 *
 *   link_cuda STORIES WORK
 *
 * Without a GPU the backend must say so in words; with one the model is pruned on it. Outputs go into directory WORK. */
#include "besa.h"
#include "test.h"

enum { SAMPLES = 2, SEQLEN = 32 };

/* Prune half of the model on the backend, NULL: the CPU's default, and measure what was written on the CPU. */
static void prune(besa_backend *be, const char *stories, const char *work)
{
    char path[1024], output[1024];
    int32_t ids[SAMPLES * SEQLEN];
    besa_error error = {BESA_OK, ""};
    besa_checkpoint *model = NULL, *pruned = NULL;
    besa_tokens tokens;
    besa_prune_options options;
    besa_calibration data;
    besa_report report;
    double perplexity = 0;
    memset(&tokens, 0, sizeof tokens);
    memset(&options, 0, sizeof options);
    memset(&data, 0, sizeof data);
    memset(&report, 0, sizeof report);
    options.rates.target = 0.5;
    data.ids = ids, data.nsamples = SAMPLES, data.seqlen = SEQLEN;
    snprintf(output, sizeof output, "%s/%s", work, be ? be->name : "default");
    snprintf(path, sizeof path, "%s/calibration_tokens.npy", stories);
    CHECK_OK(besa_checkpoint_open(&model, stories, &error), error);
    CHECK_OK(besa_tokens_load(&tokens, path, &error), error);
    CHECK_OK(besa_tokens_sample(&tokens, SAMPLES, SEQLEN, 0, 512, ids, &error), error);
    CHECK_OK(besa_prune(model, output, be, &data, &options, &report, &error), error);
    CHECK(report.weights > 0 && 2 * report.pruned == report.weights, "%lld of %lld weights", (long long)report.pruned,
          (long long)report.weights);
    CHECK_OK(besa_checkpoint_open(&pruned, output, &error), error);
    CHECK_OK(besa_perplexity(pruned, NULL, ids, SAMPLES, SEQLEN, &perplexity, NULL, NULL, NULL, &error), error);
    CHECK(perplexity > 1 && perplexity < 1000, "perplexity %g", perplexity);
    besa_checkpoint_close(pruned);
    besa_checkpoint_close(model);
    besa_tokens_free(&tokens);
    besa_report_free(&report);
}

int main(int argc, char **argv)
{
    besa_error error = {BESA_OK, ""};
    besa_backend be;
    besa_result result;
    if (argc < 3) return printf("FAIL usage: link_cuda STORIES WORK\n"), 1;
    TEST("a C program prunes on the CPU by the .cu file's object") prune(NULL, argv[1], argv[2]);
    result = besa_cuda_backend(&be, NULL, &error);
    if (result == BESA_OK) {
        TEST("a C program prunes on the GPU by the .cu file's object") prune(&be, argv[1], argv[2]);
        be.destroy(&be);
    } else {
        TEST("a C program is told that there is no GPU")
            CHECK(result == BESA_ERROR_DEVICE && error.code == result && strstr(error.message, "no CUDA device: "),
                  "%s: %s", besa_result_string(result), error.message);
        test_skip("a C program prunes on the GPU by the .cu file's object", error.message);
    }
    return test_finish();
}
