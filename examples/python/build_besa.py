"""Compiles besa.h into the extension module _besa, for besa.py. `pip install .` runs it.

In cffi's API mode the C compiler, which sees besa.h, fixes every size, offset and value of an enum: where the text below
says "...", it asks. What it does not say does not exist in Python; what it says wrongly does not compile.
"""
import os
import pathlib
import subprocess
import tempfile

import cffi

HERE = pathlib.Path(__file__).resolve().parent
BESA = HERE.parent.parent                   # where besa.h lies

DECLARATIONS = """
typedef enum { BESA_OK, BESA_ERROR_CANCELLED, BESA_ERROR_COMM, BESA_RESULT_COUNT, ... } besa_result;
typedef enum { BESA_F32, BESA_F16, BESA_BF16, ... } besa_dtype;
typedef enum { BESA_OPTION_FLAG, BESA_OPTION_ENUM, BESA_OPTION_INT, BESA_OPTION_INT64, BESA_OPTION_DOUBLE, ...
} besa_option_kind;
#define BESA_NONE ...
#define BESA_ALL_ROWS ...
#define BESA_LAYERS ...
#define BESA_OPTION_NONE ...
#define BESA_OPTION_ALL ...
#define BESA_VERSION_MAJOR ...
#define BESA_VERSION_MINOR ...
typedef struct { besa_result code; char message[...]; ...; } besa_error;
const char *besa_result_string(besa_result code);

/* backend */
typedef struct besa_backend besa_backend;
typedef enum { BESA_QUEUE_COMPUTE, ... } besa_queue;
struct besa_backend { void (*destroy)(besa_backend *be); ...; };
typedef struct { int threads, bf16; ...; } besa_cpu_options;
besa_result besa_cpu_backend(besa_backend *be, const besa_cpu_options *options, besa_error *error);

/* level 3 */
typedef struct { ...; } besa_rate_options;
typedef struct { int64_t rows, columns; besa_dtype dtype; ...; } besa_layer_shape;
typedef struct besa_rates besa_rates;
besa_result besa_rates_create(besa_rates **rates, besa_backend *be, const besa_layer_shape *layers, int count,
                              const besa_rate_options *options, besa_error *error);
void besa_rates_destroy(besa_rates *rates);
besa_result besa_rates_rank(besa_rates *rates, int layer, const void *w, int importance, const float *statistic,
                            float *scratch, besa_error *error);
besa_result besa_rates_fix(besa_rates *rates, int layer, double sparsity, besa_error *error);
besa_result besa_rates_reset(besa_rates *rates, besa_error *error);
besa_result besa_rates_forward(besa_rates *rates, besa_error *error);
besa_result besa_rates_mask(besa_rates *rates, int layer, const void *w, void *pruned, besa_error *error);
besa_result besa_rates_gradient(besa_rates *rates, int layer, const void *w, const float *dw, besa_error *error);
besa_result besa_rates_step(besa_rates *rates, besa_error *error);
besa_result besa_rates_backward(besa_rates *rates, besa_error *error);
besa_result besa_rates_optimize(besa_rates *rates, besa_error *error);
int64_t besa_rates_parameters(besa_rates *rates, float **theta, float **grad);
besa_result besa_rates_project(besa_rates *rates, besa_error *error);
besa_result besa_rates_read(besa_rates *rates, int layer, float *alpha, int32_t *n, besa_error *error);
besa_result besa_rates_status(besa_rates *rates, double *d, double *mean_rate, besa_error *error);

/* level 1 */
typedef struct besa_checkpoint besa_checkpoint;
typedef struct { int64_t hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim; ...;
} besa_block_shape;
typedef struct { const char *model_type; int64_t vocab_size, num_hidden_layers, max_position_embeddings;
                 besa_block_shape block; ...; } besa_config;
typedef struct { const char *name, *dtype_name; int supported; besa_dtype dtype; int ndim; int64_t shape[...];
                 const void *data; size_t bytes; ...; } besa_tensor;
besa_result besa_checkpoint_open(besa_checkpoint **checkpoint, const char *directory, besa_error *error);
void besa_checkpoint_close(besa_checkpoint *checkpoint);
const char *besa_checkpoint_notes(const besa_checkpoint *checkpoint);
const besa_config *besa_checkpoint_config(const besa_checkpoint *checkpoint);
const besa_tensor *besa_checkpoint_layer(const besa_checkpoint *checkpoint, int64_t block, int layer);

typedef struct { int32_t *ids; int64_t count, rows, columns; char sha256[...]; ...; } besa_tokens;
besa_result besa_tokens_load(besa_tokens *tokens, const char *path, besa_error *error);
void besa_tokens_free(besa_tokens *tokens);
besa_result besa_tokens_sample(const besa_tokens *tokens, int64_t nsamples, int64_t seqlen, uint64_t seed,
                               int64_t vocab_size, int32_t *ids, besa_error *error);

typedef struct { int64_t block, blocks; int pass; double fraction, seconds, seconds_left;
                 int64_t resumed_blocks; ...; } besa_progress;
typedef int (*besa_progress_callback)(void *user, const besa_progress *progress);
typedef struct { int64_t block, step, steps; besa_rates *rates; double lr, weight_lr; ...; } besa_step;
typedef struct { double loss, penalty, mean_rate, d; ...; } besa_trace;
besa_result besa_step_trace(const besa_step *step, besa_trace *trace, besa_error *error);
typedef besa_result (*besa_step_callback)(void *user, const besa_step *step);
const char *besa_pass_name(int pass);
typedef struct { const char *pattern; double sparsity; ...; } besa_fixed_rate;
typedef struct {
    int rank, size;
    void *user;
    besa_result (*reduce)(void *user, besa_backend *be, besa_queue q, float *data, int64_t count, besa_error *error);
    besa_result (*broadcast)(void *user, void *data, size_t bytes, int root, besa_error *error);
    besa_result (*barrier)(void *user, besa_error *error);
    void (*fail)(void *user, const besa_error *error);
    ...;
} besa_comm;
typedef struct { besa_rate_options rates; const besa_comm *comm; const besa_checkpoint *masks; const double *block_targets;
                 int64_t num_block_targets; const besa_fixed_rate *fixed; int64_t num_fixed; int keep_rates; size_t device_memory;
                 besa_progress_callback progress; besa_step_callback step; void *user; ...; } besa_prune_options;
typedef struct { const char *name; besa_option_kind kind; size_t offset; double standard, least, most; int flags;
                 const char *range, *value, *help; ...; } besa_option;
const besa_option *besa_option_table(void);
typedef struct { double nll, reference_nll, kl, same; } besa_window;
typedef struct { int64_t windows, seqlen; double *nll, perplexity; ...; } besa_reference;
typedef struct { int64_t windows, positions; double perplexity, perplexity_error, reference_perplexity, reference_perplexity_error,
                 difference, difference_error, kl, kl_error, kl_99, kl_most, same, same_error; } besa_divergence;
typedef struct { const int32_t *ids; int64_t nsamples, seqlen; const int32_t *test_ids;
                 int64_t test_windows, test_seqlen; const besa_reference *against; const char *file, *sha256; uint64_t seed;
                 const char *test_file, *test_sha256; ...; } besa_calibration;
typedef struct { double sparsity; int64_t test_windows; besa_window *window; float *kl; ...; } besa_report;
typedef struct { size_t device_bytes, host_bytes, mapped_block_bytes; uint64_t disk_bytes; int64_t micro_batch;
                 double flop; char notes[...]; ...; } besa_plan_result;
besa_result besa_preset(besa_prune_options *options, const char *name, besa_error *error);
besa_result besa_prune(const besa_checkpoint *checkpoint, const char *output, besa_backend *be,
                       const besa_calibration *calibration, const besa_prune_options *options, besa_report *report,
                       besa_error *error);
besa_result besa_plan(const besa_checkpoint *checkpoint, besa_backend *be, const besa_calibration *calibration,
                      const besa_prune_options *options, besa_plan_result *plan, besa_error *error);
besa_result besa_perplexity(const besa_checkpoint *checkpoint, besa_backend *be, const int32_t *ids, int64_t windows,
                            int64_t seqlen, double *perplexity, double *nll, besa_progress_callback progress, void *user,
                            besa_error *error);
besa_result besa_reference_create(besa_reference *reference, const besa_checkpoint *checkpoint, besa_backend *be,
                                  const int32_t *ids, int64_t windows, int64_t seqlen, besa_progress_callback progress,
                                  void *user, besa_error *error);
void besa_reference_free(besa_reference *reference);
besa_result besa_compare_models(const besa_checkpoint *checkpoint, besa_backend *be, const besa_reference *reference,
                                besa_window *window, float *kl, besa_progress_callback progress, void *user, besa_error *error);
void besa_summarize(besa_divergence *divergence, const besa_window *window, int64_t windows, float *kl, int64_t positions);
besa_result besa_logits(const besa_checkpoint *checkpoint, besa_backend *be, const int32_t *ids, int64_t count,
                        int64_t seqlen, float *logits, besa_error *error);
#define BESA_FILE_RATES ...
#define BESA_FILE_MASKS ...
besa_result besa_masks_save(const besa_checkpoint *checkpoint, const char *file, int what, besa_error *error);
besa_result besa_masks_open(besa_checkpoint **masks, const char *file, const besa_checkpoint *model, besa_error *error);
char *besa_report_json(const besa_report *report);
void besa_report_free(besa_report *report);
void free(void *pointer);

extern "Python" int besa_python_progress(void *user, const besa_progress *progress);
extern "Python" besa_result besa_python_step(void *user, const besa_step *step);
extern "Python" besa_result besa_python_reduce(void *user, besa_backend *be, besa_queue q, float *data, int64_t count, besa_error *error);
extern "Python" besa_result besa_python_broadcast(void *user, void *data, size_t bytes, int root, besa_error *error);
extern "Python" besa_result besa_python_barrier(void *user, besa_error *error);
extern "Python" void besa_python_fail(void *user, const besa_error *error);
"""


def openmp():
    """The flag for threads, where the compiler has OpenMP; BESA_OPENMP says another, or none."""
    if "BESA_OPENMP" in os.environ:
        return os.environ["BESA_OPENMP"].split()
    with tempfile.TemporaryDirectory() as work:
        source = pathlib.Path(work) / "probe.c"
        source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
        command = [*os.environ.get("CC", "cc").split(), "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        try:
            return ["-fopenmp"] * (subprocess.run(command, capture_output=True).returncode == 0)
        except OSError:
            return []


ffibuilder = cffi.FFI()
ffibuilder.cdef(DECLARATIONS)
# -ffp-contract=off: the same bytes as examples/besa writes
ffibuilder.set_source("_besa", '#define BESA_IMPLEMENTATION\n#include "besa.h"\n', include_dirs=[str(BESA)],
                      depends=[str(BESA / "besa.h")], libraries=["m"], extra_link_args=openmp(),
                      extra_compile_args=["-O3", "-ffp-contract=off", *openmp()])

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
