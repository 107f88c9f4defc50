/* besa.h - v0.1 - prune LLaMA-family language models by BESA - MIT or public domain, see LICENSE
 *
 * BESA (Blockwise Parameter-Efficient Sparsity Allocation, ICLR 2024, arXiv 2402.16880) prunes a decoder-only
 * transformer one block at a time. How much of each layer and of each weight row goes is learned, by gradient descent
 * on the block's output error through a differentiable sparsity rate. This file is the method, its baselines (Wanda,
 * SparseGPT, magnitude), checkpoint reading and writing, and a CPU backend. It needs a C11 or C++17 compiler, libc and libm.
 *
 * QUICK START
 *
 *     #define BESA_IMPLEMENTATION          // in exactly one .c, .cpp or .cu file
 *     #include "besa.h"
 *
 *     besa_error error;
 *     besa_checkpoint *model;
 *     besa_prune_options options = {0};    // zero means the documented default; in C++ write {}
 *     besa_calibration data = {0};
 *     options.rates.target = 0.5;
 *     data.ids = ids, data.nsamples = 128, data.seqlen = 2048;   // int32_t ids[128 * 2048], see besa_tokens_sample
 *     besa_result result = besa_checkpoint_open(&model, "SmolLM2-135M", &error);
 *     if (result == BESA_OK) {
 *         result = besa_prune(model, "SmolLM2-135M-50", NULL, &data, &options, NULL, &error);
 *         besa_checkpoint_close(model);
 *     }
 *     if (result != BESA_OK) puts(error.message);
 *
 * In the file with BESA_IMPLEMENTATION include besa.h first. Compile with -O3 -fopenmp and link -lm. Without OpenMP one
 * thread runs. examples/quickstart.c is the whole program.
 *
 * THE METHOD, pass by pass: what is read, computed and left, and the function that computes it
 *
 *     Blocks are pruned one after another. A block has seven weights W (R, C), inputs X (T, d) that come from the blocks
 *     pruned before it, and is Y = F(W, X) (besa__block_forward; section block has the formulas).
 *
 *     dense    reads W, X (besa__dense_pass). Computes
 *                  Yref = F(W, X), and its channel norms                  besa__dense_chunk, besa__add_norms
 *                  of every layer's inputs: sum_t X[t,j]^2, or            besa__add_statistics
 *                  H = 2/T X'X for SparseGPT and its scores
 *     rank     reads W and the statistics (besa__rank_pass). Computes
 *                  U, U'U = inv(H + damping), where there is an H, and    besa__finish_statistics
 *                  the factors of the scores per column
 *                  the score of each weight: |W| l2(X_j), or as           besa__masks_rank
 *                  BESA_IMPORTANCES has it; its rank in its row
 *                  of a baseline the mask, or What itself                 besa__rank_or_prune
 *                  with option refit the kept weights anew; with BESA     besa__refit_layer
 *                  at the end of the learn pass, when masks are final
 *     learn    BESA only (besa__learn_pass). For every batch of sequences, with logits theta that start at 0:
 *                  beta = softmax(z(theta)), alpha = sum_d beta_d p_d,    besa__rates_forward
 *                  p_d = 1 - d/D: n = floor(alpha C) weights of every
 *                  row go, or as many as are 0 in W, if that is more
 *                  What = W where rank >= n, else 0                       besa__masks_update
 *                  Y = F(What, X), and the loss                           besa__batch_gradient, besa__pruner_loss
 *                  L = 1/hidden_size sum ((Yref - Y) / norm)^2
 *                  dL/dWhat by the backward pass                          besa__block_backward
 *                  dL/dbeta_d = - sum of dL/dWhat W over rank < k_d,      besa__rates_gradient, besa__rates_backward
 *                  k_d = ((D - d) C) / D (as if keeping were
 *                  1 - sum_d beta_d [rank < k_d]), + that of the
 *                  penalty lambda ((S - t) / t)^2; dL/dtheta
 *                  theta by Prodigy or AdamW                              besa__parameters_step
 *              and then logit(alpha) of all rows, shifted together        besa__rates_project, besa__final_masks
 *              until the count is exact (but with no_projection), and
 *              What. Fixed layers take no part. With learn both the kept weights move along dL/dWhat too, as below, and are
 *              ranked anew before the next step             besa__rank_and_mask
 *              With granularity attn-mlp or layer the loss is that    besa__attention_loss, besa__layer_losses
 *              of parts of the block, which learn apart
 *              With a pattern n of m there are no rates: weights move as with learn both, and the n smallest scores
 *              of every m go              besa__mask_by_pattern
 *     weights  where kept weights learn (besa__weights_pass), with any method: masks stay. For every batch the loss and
 *              dL/dWhat as above; every weight that is not 0 by Adam      besa__weights_move
 *              With learn_vectors the block's norms and biases move       besa__vectors_move
 *              wherever its weights do, here and in learn both
 *     commit   X = F(What, X): the next block's inputs; the loss          besa__commit_pass
 *
 *     With bits, What is Q(W M): what is left of the weights on grids of few levels (besa__quantize, section quantization), in
 *     all passes but the dense one, and the bucket sums are of dL/dWhat Q(W). The grids' clips learn along dL/dWhat, in the
 *     same steps: besa__clips_gradient, besa__clips_step.
 *
 *     The paper's pseudo-code carries two streams, the dense model's and the pruned one's, and aims at the dense stream's
 *     outputs: option dense_stream. The published code's row-wise runs, and the default here, aim at the dense block
 *     applied to the pruned stream: Yref = F(W, X) as above. Its layer-wise runs (preset published-layer) have the dense
 *     stream. The published code's rates start at 1/2 (zero_start) and end where learning left them (no_projection).
 *
 *     The arithmetic is in operations of the backend: struct besa_backend defines them, the sections cpu-... have their loops.
 *     examples/besa_by_hand.c prints every number of it for one small layer.
 *         score            |W|^power scale(C)                   rate_forward     beta, alpha, n of every row, from theta
 *         rank_rows        rank[r,j] in row r                   rate_backward    dL/dbeta from bucket sums, dL/dtheta
 *         mask_update      What = W where rank >= n             optimizer_step   Prodigy, AdamW
 *         block_loss       L, dL/dY                             project_counts   n whose sum is the count
 *         bucket_gradient  sums of dL/dWhat W                   weight_step      Adam, of kept weights
 *         hessian_factor   U, U'U = inv(H + damping)            refit_step       conjugate gradients, of kept weights
 *         sparsegpt_slab   SparseGPT's sweep over columns       quantize_grid    h, z of Q(W)
 *
 * CONTENTS: search for the marker
 *
 *     >>api-common         results, errors, element types
 *     >>api-backend        the seam: arrays, not models
 *     >>api-layer          level 3: rates of any linear layers, in a training loop of your own
 *     >>api-block          level 2: one decoder block whose weights are in the caller's memory
 *     >>api-checkpoint     level 1: a Hugging Face directory in, a pruned one out
 *     >>base               results, errors, numbers as text, hashes
 *     >>memory             sizes, arenas, element types, the backend's workspace
 *     >>layers             the layers of a block, and the ranges of its sizes
 *     >>options            what every option may be, and what 0 stands for
 *     >>masks              importance, ranks, counts and masks
 *     >>parameters         what learns: values, gradient, optimiser, schedule
 *     >>rates              learnable rates: theta -> alpha -> n, and their gradient
 *     >>layer-functions    the public functions of level 3
 *     >>weights            kept weights that learn
 *     >>quantization       kept weights on grids of few levels
 *     >>block              one decoder block, forward and backward (level 2)
 *     >>streams            activations of all sequences, on the device or streamed from the host
 *     >>comm               several processes: whose sequences are which, what is summed over all
 *     >>pruner             what pruning one block keeps: options, arrays, progress (level 2)
 *     >>statistics         the dense pass: what layers read, and what the block is to put out
 *     >>refit              kept weights fitted anew to the layer's inputs, with masks as they are
 *     >>baselines          the rank pass: ranks for BESA, masks of the other methods
 *     >>learning           the learn pass: forward, loss, backward, step
 *     >>results            the commit pass, and what comes back of a block
 *     >>passes             the order of the passes; the public functions of level 2's pruner
 *     >>json               a strict reader of JSON texts
 *     >>safetensors        mapped checkpoint files and their tensor table
 *     >>tokens             token files and the sequences cut out of them
 *     >>config             config.json, and the tensors a model of its shape must have
 *     >>journal            files of the unfinished output, and its journal
 *     >>beside             what lies beside the weights: which files are copied
 *     >>codes              quantised weights as whole numbers, in a file of their own
 *     >>writer             blocks into the output, one after another
 *     >>finish             the sources once more, and the rename
 *     >>report             the report and besa.json
 *     >>mask-files         rates and masks of a pruned checkpoint, in a file of their own
 *     >>background         work that waits for files, in a thread of its own
 *     >>run                the whole model, block by block (level 1): layout, opening, closing
 *     >>transfers          a block's weights in, its pruned weights out
 *     >>head               embedding, final norm, output head, perplexity, divergence
 *     >>prune              resumed runs, the whole run
 *     >>plan               what a run would take
 *     >>outliers           sparsities of the blocks from their outliers
 *     >>cpu-tiles          tiles of the CPU's matrix product, per instruction set
 *     >>cpu-gemm           the CPU's matrix product: C = alpha A B [+ C] [+ bias]
 *     >>cpu-kernels        the CPU backend: loops for any instruction set, workspace, memory
 *     >>cpu-block          matrix products, norms and rope on the CPU
 *     >>cpu-attention      attention on the CPU: a block of queries at a time
 *     >>cpu-loss           SwiGLU, GeGLU, sums, residuals, loss and head on the CPU
 *     >>cpu-scores         scores, zeros and ranks on the CPU
 *     >>cpu-masks          masks and bucketed gradients on the CPU
 *     >>cpu-rates          rates, optimiser and exact count on the CPU
 *     >>cpu-quantization   weights on a grid of levels on the CPU
 *     >>cpu-sparsegpt      SparseGPT on the CPU: factor of the inverse Hessian, slabs of weights
 *     >>cpu-refit          kept weights fitted anew on the CPU: steps of conjugate gradients
 *     >>cpu-backend        the CPU's table of operations
 *
 * HOOKS, defined before the implementation is included
 *
 *     BESA_MALLOC(bytes), BESA_REALLOC(p, bytes), BESA_FREE(p)   all three or none; default: libc
 *     BESA_ASSERT(condition)      programmer's errors only; default: assert
 *     BESA_API                    linkage of the public functions; default: extern. `static inline` where one file has them
 *                                 all, without a warning but those of gcc with BESA_NO_STDIO
 *     BESA_NO_STDIO               leave out level 1: levels 2 and 3 need no file system
 *     BESA_NO_THREADS             with BESA_CUDA: no POSIX thread of level 1's own that reads and writes weights meanwhile
 *     BESA_CBLAS                  float products through cblas_sgemm of the CBLAS that you link
 *     BESA_NO_SIMD                plain C loops alone, instead of AVX2, AVX-512 or NEON as the processor has them
 *     BESA_SIMD_MAX               the highest instruction set that is used on x86: [2] AVX-512, 1 AVX2, 0 plain C
 *     BESA_SECONDS()              a clock in seconds, a double that never goes back; default: CLOCK_MONOTONIC, Windows's
 *                                 performance counter. With BESA_CUDA it is called from level 1's thread too
 *
 * OPTIONS (besa_prune_options, besa_rate_options; 0 means the value in brackets)
 *
 *     method                      [besa] wanda, sparsegpt, magnitude; keep: what is 0 in another checkpoint, `masks`
 *     rates.target                sparsity in (0, 1). BESA prunes floor(target N + 1/2) weights of every block, exactly;
 *                                 baselines count as published: by row, layer, or slab of 128 columns
 *     rates.form                  [hierarchical] a rate vector per layer and one per row group; row; layer
 *     rates.layer_scale           [1] s_L: how far a layer's rates may move
 *     rates.row_scale             [1] s_R: how far a row's rate may move from its layer's
 *     rates.group_rows            [1] rows that share a rate; BESA_ALL_ROWS: all of a layer
 *     rates.candidates            [100] D: rates 1, 1 - 1/D, ..., 0
 *     rates.penalty               [1] lambda of lambda ((sparsity - target) / target)^2
 *     rates.optimizer, lr, d_coef [Prodigy, 1, 5]; AdamW: lr [0.01]; also beta1, beta2, d0, and weight_decay of both
 *     rates.schedule, warmup      [constant, 0] cosine: lr falls to 0 over the steps; share of them in which it rises
 *     rates.steps                 [1] learning steps in all, for level 3; levels 1 and 2 count them themselves
 *     rates.plain_softmax         [0] softmax(theta) instead of softmax(sigmoid(theta))
 *     rates.zero_start            [0] start at rate 1/2, as the paper's code does, instead of at the target
 *     importance                  [wanda] magnitude, sparsegpt, sparsegpt squared, gradient: it sees the block's loss; relative
 *     damping                     [0.01] SparseGPT, its importances and refit: share of a Hessian's mean diagonal added to it
 *     refit                       [none] cg, obs: the kept weights of a layer fitted to its dense outputs, masks as they are, by
 *                                 conjugate gradients or by SparseGPT's update; not with bits or learn both, obs not with sparsegpt
 *     refit_steps                 [10] of conjugate gradients
 *     epochs, batch_size          [1, 1]
 *     granularity                 [block] attn-mlp, layer: whose outputs the loss is measured on, see besa_granularity: the
 *                                 paper's ablation. Each part has the target for itself. Not with dense_stream, dense_share
 *     whole_target                [0] with that the target is the block's: parts may differ
 *     norm_all, dense_stream      [0, 0] loss norms over all tokens: a batch's loss shrinks to its share of them, and the penalty
 *                                 weighs more; reference from the dense model's own stream. Where something learns
 *     dense_share                 [0] the reference is a mixture: this share from the dense model's own stream
 *     learn                       [rates] weights: the kept weights learn when masks are final, with any method; both: BESA's
 *                                 rates and the kept weights together, and then the weights
 *     weight_epochs               [3] over the sequences with final masks
 *     rank_interval               [1] learn both: steps from one ranking of the weights, as they have become, to the next
 *     weight_lr, weight_warmup    [0.2, 0] Adam's learning rate in units of rms(W) / sqrt(C) of a layer, on grids of a sixth of
 *                                 that; share of the steps in which it rises. Then it falls to 0 over the steps, as a half cosine
 *     learn_vectors               [0] the block's norms and biases learn wherever its kept weights do
 *     no_projection               [0] leave the sparsity where learning ended
 *     pattern_n, pattern_m        [none] n of every m; with besa no rates, but weights that learn: with learn both masks are
 *                                 chosen anew as these move
 *     magnitude_per_row           [0] magnitude: each row at the target instead of each layer
 *     bits, group_size            [none, 0] put kept weights on 2^bits levels, 2 to 8 bits, one grid for so many columns of a
 *                                 row, or for all of it. Every layer of a pruned block, dense ones too. What it takes to store
 *                                 them so goes into besa_quantization.safetensors, see section codes. Weights that are kept may
 *                                 become 0, on a level: then there are more zeros than the sparsity asks for
 *     clipping, clip_lr           [auto, 0.05] grids learn how far they reach: where something else learns; none: nearest levels
 *                                 of the whole range; learned: with any method, in weight_epochs if nothing else learns
 *     quantize_first              [0] choose masks by the quantised weights, as the paper has it; levels tie, and this gives
 *                                 worse masks. With learn both weights are on their grids from the first step on, instead of
 *                                 when masks are final. Not for sparsegpt
 *     fixed                       [none] layers that stay dense or have a rate of their own
 *     first_block, num_blocks     [0, all] prune these and leave the other blocks dense: for studies
 *     depth_slope                 [0] the last block's sparsity less the first one's, around the target
 *     block_targets               [none] a sparsity for every block; besa_outliers and besa_outlier_targets find some
 *     comm                        [none] several processes work on one run: each has its share of the sequences, see besa_comm
 *     progress, step, card, user  [none] callbacks: after each unit of work, which can stop the run; after each learning step;
 *                                 for the text of the output's README.md
 *     besa_preset                 [default] best: learn both, dense_share 1/2, 2 epochs and 2 weight_epochs, weight_lr 0.3.
 *                                 weights: learn weights, dense_share 1/2, for any method. published-row and
 *                                 published-layer: the paper's runs of LLaMA-1-7B, d_coef 5 and 50. For other models set the
 *                                 paper's d_coef: by row 5 (1-13B, 2-7B, 2-13B), 10 (1-30B),
 *                                 50 (1-65B, 2-70B); by layer 0.5 (1-13B, 1-65B, 2-70B), 0.05 (1-30B, 2-7B, 2-13B)
 *     device_memory               [CUDA: 31/32 of what is free; CPU: no limit] the most bytes that a run takes of the backend's
 *                                 memory. To stay below, a GPU's activations move to the host; then fewer sequences are
 *                                 computed at a time
 *
 * OPTIONS OF THE PUBLISHED CODE (OpenGVLab/LLMPrune-BESA, main.py), and what they are here
 *
 *     --metric-type importance; --blocksize group_rows; --sparsity-step 1 / candidates; --sparsity-beta penalty; --norm-all
 *     norm_all; --no-sigmoid-smooth plain_softmax; --prune-dense dense_stream; --fix-layers fixed; --normal-opt optimizer;
 *     --use-cos-sche schedule, by steps; --d-coef d_coef, by model as under besa_preset. Learned clipping of weights is in the
 *     paper, not in that code: bits, clipping. Left out are
 *     --lora-rank      low-rank terms beside the weights: both factors start at 0, where the gradient of each is 0, and never
 *                      move. What they are for, weights that make up for what is gone, is option learn
 *     --wise-dim       column: a share of every input's weights instead of every output's. Norms of the inputs then cancel out
 *                      of Wanda's scores, and what is left is magnitude
 *     --clip-grad      Prodigy's and Adam's steps do not grow with the gradients
 *     --l2-alpha       its ratio to --sparsity-beta is all that counts: penalty
 *     --no-decouple, --use-bias-correction, --safeguard-warmup   forms of Prodigy that the paper's runs do without
 *
 * MEMORY AND TIME
 *
 *     One device and one host allocation hold all that follows, and besa_plan says their sizes beforehand, to the byte. N weights
 *     and R rows in a block, T tokens in all, t at a time, hidden size d, intermediate size i, activations of a = 4 bytes
 *     (CUDA: 2), weights of w = 2 bytes (bf16, f16) or 4:
 *         weights and pruned weights   2 w N (CUDA: 4 w N, of two blocks)    ranks        2 N bytes
 *         one layer's gradient         4 x largest layer (CUDA: a piece)     rates        7 x 4 x 101 R bytes
 *         X and Yref                   2 a T d                               activations  about a t (13 d + 4 i), 3 d more
 *                                                                                            where outputs are normed
 *         Hessians: SparseGPT, refit   4 (3 d^2 + i^2) bytes, twice for      scores       4 x largest layer, baselines
 *                                      SparseGPT (or its scores) with cg     refit        8192 x widest layer's columns
 *         channel norms                4 d per batch                         workspace    some MB, more with more threads
 *         rows of embedding and head   16384 d bytes                         test stream  a d per token, 16384 t of logits,
 *                                                                                         activations of its own
 *         pinned host memory           32 MB of weights, 8192 d of rows
 *         weights that learn           12 N bytes, + 2 N where w = 2, + 4 N where a batch does not fit at once
 *         norms and biases that learn  20 bytes of each
 *         importance gradient          4 N bytes
 *         granularity                  a t d, layer 2 a t i; norms of d, layer R channels per batch
 *         bits                         w N, and 16 bytes per grid, 64 where clips learn; 8 of the host
 *         test against a model         24 bytes a token, a t d, and as much as its head takes with 16384 t of logits
 *     Where device_memory is not enough, the test's activations, Yref and X live in pinned host memory and come batch by
 *     batch while others compute. None of this grows with the number of blocks; beside it there are the tensor table, the
 *     list of finished blocks and the report, some hundred bytes per tensor and block. A weight and token cost about 10 FLOP for
 *     BESA, 4.2 for Wanda and 5 for SparseGPT in a 7B model at 2048 tokens; attention weighs more in small ones (SmolLM2-135M:
 *     13, 5.3 and 6.3).
 *
 * ERRORS
 *
 *     Every fallible function returns a besa_result and, where it takes a besa_error, says in words which file, tensor or
 *     option it was, what was expected and what was found. Nothing is printed, nothing exits, there is no global state.
 *     An output directory appears under its name when it is complete, and not before.
 *
 * THREADS AND DETERMINISM
 *
 *     One thread at a time may use an object, and one object at a time a backend: for work side by side, open the checkpoint
 *     and make a backend for each. One build on one processor gives the same bytes for any number of threads, but in two
 *     cases: with BESA_CBLAS; and where device_memory decides how many sequences are computed at a time, as every thread
 *     takes memory for itself.
 *     In several processes (option comm, section comm) each has its share of every batch's sequences, and T above is its share of
 *     tokens; weights are whole in each. The same number of processes gives the same bytes as far as the comm's sums do.
 *     Another number, as another micro-batch, adds up the same numbers in another order: the first step's sums agree to rounding,
 *     and learning may amplify that. An unfinished output is gone on from by as many processes as began it.
 *
 * LIMITS
 *
 *     Llama 1/2/3, Mistral, Qwen2, Qwen3, SmolLM3, Granite, OLMo-2, Phi-3/4, Gemma-2 and Gemma-3 text checkpoints in F32, F16
 *     or BF16 safetensors, and the language models of Gemma-3, Mistral-3 and Qwen2.5-VL. Level 1 needs POSIX (mmap, flock)
 *     and a little-endian machine: elsewhere checkpoints are refused. Levels 2 and 3 (BESA_NO_STDIO) need neither. Float
 *     arithmetic must be IEEE's: fast math and x87 (32-bit x86 without -msse2 -mfpmath=sse) do not compile, and a CPU backend
 *     is refused where exp or subnormal numbers come out wrong. Sizes are 64-bit: what a 32-bit process cannot address is
 *     BESA_ERROR_MEMORY. Files are mapped: a source that is truncated while it is read ends the process (SIGBUS).
 *     At most 1024 blocks; prunable weights of one dtype; widths up to 2^24; 2^36 tokens.
 *
 * REFERENCES
 *
 *     BESA arXiv 2402.16880; Wanda arXiv 2306.11695; SparseGPT arXiv 2301.00774; Prodigy arXiv 2306.06101; OWL arXiv
 *     2310.05175; ALPS arXiv 2406.07831; RIA: Zhang et al., Plug-and-Play, ICLR 2024.
 *
 * VERSIONS
 *
 *     BESA_VERSION is 100 major + minor, for #if. As long as the major number is 0 a new minor number may change anything
 *     here, and HISTORY says what; compile all files that share a besa.h again, as structs may have grown. From major number 1
 *     on a new minor number only adds: functions, fields at the end of structs, where 0 means what was before, values at the
 *     end of enums. Any version may round differently, and an unfinished output is gone on from by the version that began it.
 *
 * VERSIONS
 *
 *     BESA_VERSION is 100 major + minor, for #if. As long as the major number is 0 a new minor number may change anything
 *     here, and HISTORY says what; compile all files that share a besa.h again, as structs may have grown. From major number 1
 *     on a new minor number only adds: functions, fields at the end of structs, where 0 means what was before, values at the
 *     end of enums. Any version may round differently, and an unfinished output is gone on from by the version that began it.
 *
 * HISTORY
 *
 *     0.1   first release
 */

/* Files are mapped and locked, and time is taken, by POSIX calls that strict -std=c11 hides; libc fixes the choice at its
 * first header. */
#if defined(BESA_IMPLEMENTATION)
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#if defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#endif

#ifndef BESA_H
#define BESA_H

#include <stddef.h>
#include <stdint.h>

#define BESA_VERSION_MAJOR 0
#define BESA_VERSION_MINOR 1
#define BESA_VERSION (100 * BESA_VERSION_MAJOR + BESA_VERSION_MINOR)

#ifndef BESA_API
#define BESA_API extern
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ============================================================================================
 * // >>api-common            results, errors, element types
 * ============================================================================================ */

/* Every fallible function returns one of these; the text beside each is besa_result_string(). */
#define BESA_RESULTS(X)                                                                            \
    X(BESA_OK, "success")                                                                          \
    X(BESA_ERROR_OPTION, "an option is out of range or contradicts another")                       \
    X(BESA_ERROR_MEMORY, "out of memory, or the memory budget is too small")                       \
    X(BESA_ERROR_NOT_FOUND, "a file or directory does not exist")                                  \
    X(BESA_ERROR_EXISTS, "the output exists already, or is the input")                             \
    X(BESA_ERROR_READ, "a file could not be read")                                                 \
    X(BESA_ERROR_WRITE, "a file could not be written")                                             \
    X(BESA_ERROR_JSON, "a JSON file is malformed")                                                 \
    X(BESA_ERROR_FORMAT, "a file is truncated, or its header is malformed")                        \
    X(BESA_ERROR_UNSUPPORTED, "a model, dtype or setting outside what is supported")               \
    X(BESA_ERROR_TENSOR, "a tensor is missing, or its shape or dtype contradicts the config")      \
    X(BESA_ERROR_NOT_FINITE, "a weight, activation or loss is NaN or infinite")                    \
    X(BESA_ERROR_TOKEN, "a token id is outside the vocabulary")                                    \
    X(BESA_ERROR_TOKENS, "too few tokens")                                                         \
    X(BESA_ERROR_TARGET, "the target sparsity cannot be reached")                                  \
    X(BESA_ERROR_NUMERIC, "a Hessian is not positive definite")                                    \
    X(BESA_ERROR_CANCELLED, "the progress callback asked to stop")                                 \
    X(BESA_ERROR_DEVICE, "the device or its driver reported an error")                             \
    X(BESA_ERROR_RESUME, "an unfinished output belongs to another run")                            \
    X(BESA_ERROR_COMM, "another process of the run failed, or is another run")

typedef enum besa_result {
#define BESA__ENUM(name, text) name,
    BESA_RESULTS(BESA__ENUM)
#undef BESA__ENUM
    BESA_RESULT_COUNT
} besa_result;

/* What went wrong, in words: the file, tensor or option, what was expected and what was found.
 * A plain struct of the caller's; every parameter of this type may be NULL. */
typedef struct besa_error {
    besa_result code;
    char message[1024];
} besa_error;

/* Element types of checkpoints. Activations on the CPU are BESA_F32. */
typedef enum besa_dtype { BESA_F32 = 0, BESA_F16 = 1, BESA_BF16 = 2 } besa_dtype;

/* The constant text of a result; never NULL. */
BESA_API const char *besa_result_string(besa_result code);

/* Bytes of one element: 4 or 2. */
BESA_API size_t besa_dtype_size(besa_dtype dtype);

/* An option of 0 means its default. Where 0 itself would be a sensible value (marked NONE below), this asks for it. */
#define BESA_NONE (-1)
#define BESA_ALL_ROWS (-1)

/* ============================================================================================
 * // >>api-backend           the seam: arrays, not models
 * ============================================================================================
 *
 * The method is written once against this table. The CPU fills it in below, CUDA in besa_cuda.cuh, and a third
 * backend is a third filled-in table. A backend knows arrays; which pass runs when is not its affair.
 *
 * Pointers are device pointers unless a comment says host; byte offsets into an allocation are valid pointers.
 * "act" is an element of be->activation_dtype; weights have the dtype that the call names; all else is float.
 * Matrices are row-major, weights (R, C) as in Hugging Face checkpoints: y = x W'.
 * Compute operations run in order on the compute queue and may return before they are done; transfers name their
 * queue. A non-zero return is a failure, described in be->error, after which only synchronize, free, host_free and
 * destroy are called; after BESA_ERROR_NUMERIC downloads too.
 * Sums are cut by size alone: the same inputs give the same bytes on one device for any thread count. */

/* Operations run on the compute queue. Upload and download carry activations in step with it; stage carries the next
 * block's weights in and the last block's out, and never waits for the others: the host synchronises it before it
 * computes with such a block, and compute before such a block goes out. Reduce has the sums over processes. */
typedef enum besa_queue { BESA_QUEUE_COMPUTE, BESA_QUEUE_UPLOAD, BESA_QUEUE_DOWNLOAD, BESA_QUEUE_STAGE, BESA_QUEUE_REDUCE,
                          BESA_QUEUE_COUNT } besa_queue;
#define BESA_EVENT_COUNT 32 /* events are small numbers that order queues; sections pruner, run and comm use 0 .. 31 */

typedef struct besa_backend besa_backend;

/* The largest sizes that operations will be called with; zero where a group of operations is not used. */
typedef struct besa_workload {
    int64_t rows, columns;                      /* the largest of any layer */
    int64_t tokens, seqlen;                     /* of one micro-batch */
    int64_t num_attention_heads, num_key_value_heads, head_dim;
    int64_t hessian_columns;                    /* 0 without Hessians */
    int64_t rate_logits;                        /* D + 1 of a rate; 0: any number */
    int64_t projected_rows;                     /* rows of all layers together, for project_counts */
} besa_workload;

/* Sizes of one attention call: T = batch * seqlen tokens, query head i reads key/value head i / (heads / kv_heads). */
typedef struct besa_attention_shape {
    int64_t batch, seqlen;
    int64_t num_attention_heads, num_key_value_heads, head_dim;
    int64_t sliding_window;                     /* token t sees t - window + 1 .. t; 0: all before it */
    float scale;                                /* of q k'; 0: 1 / sqrt(head_dim) */
    float softcap;                              /* scores s become softcap tanh(s / softcap); 0: they stay */
} besa_attention_shape;

/* How a group of rows gets its rate from the logits theta_L of its layer and theta_g of its own, each (D+1):
 * z_d = c p_d + s_L u(theta_L[d]) + s_R u(theta_g[d]),
 * u(x) = sigmoid(x) - 1/2, or x itself where plain is set; beta = softmax(z), alpha = sum_d beta_d p_d. */
typedef struct besa_rate_shape {
    int64_t rows;                               /* R of the layer */
    int64_t units;                              /* of a row: what its rate is a share of and n counts, the C weights */
    int64_t group_rows;                         /* rows that share one rate; groups G = ceil(R / group_rows) */
    int64_t logits;                             /* D + 1: p_d = 1 - d/D, k_d = ((D - d) units) / D, d = 0 .. D. k_D = 0, so
                                                   bucket sums need only D buckets: a weight in bucket b is pruned
                                                   by candidates 0 .. b */
    float tilt;                                 /* c */
    float layer_scale, row_scale;               /* s_L, s_R */
    int plain;
} besa_rate_shape;

/* The sparsity penalty lambda ((S - t) / t)^2 as one layer sees it: dL/dalpha_g = coefficient (S - t) rows_g / R. */
typedef struct besa_penalty {
    const float *mean;                          /* device: S, the weighted mean rate of all layers */
    float coefficient;                          /* 2 lambda / t^2 * (weights of this layer / weights of all) */
    float target;                               /* t */
} besa_penalty;

typedef enum besa_optimizer_kind { BESA_PRODIGY, BESA_ADAMW } besa_optimizer_kind;

enum { BESA_OPTIMIZER_SCALARS = 2 };            /* d, numerator; d0 and 0 before the first step */

/* One optimiser step over n parameters (section "parameters"). Only theta0, s and scalars may be NULL, for AdamW. */
typedef struct besa_optimizer_step {
    besa_optimizer_kind kind;
    double lr, beta1, beta2, beta3, eps, weight_decay;
    double d0, d_coef;                          /* Prodigy */
    int64_t step;                               /* 1, 2, ...: AdamW's bias correction */
    int64_t n;
    float *theta;                               /* (n) updated */
    const float *theta0;                        /* (n) start values; Prodigy only */
    const float *grad;                          /* (n) */
    float *m, *v, *s;                           /* (n) state, zero before the first step; s is Prodigy's */
    double *scalars;                            /* (BESA_OPTIMIZER_SCALARS) */
} besa_optimizer_step;

/* One step of Adam over n weights of a layer (section "weights"). Where masked is not 0,
 *     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  t = step,
 *     w -= lr rms m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps),  masked = source = w in the dtype, rounded;
 * but where that would be 0 nothing changes, as where masked is 0: masks stay as they are. Norms and biases have no mask:
 * where masked is NULL every w moves, and source and dtype are not looked at. */
typedef struct besa_weight_step {
    double lr, beta1, beta2, eps;
    int64_t step;                               /* 1, 2, ... */
    int64_t n;
    float *w, *m, *v;                           /* (n) m and v zero before the first step */
    const float *grad;                          /* (n) */
    const float *rms;                           /* (1) device: the unit of lr */
    void *masked, *source;                      /* (n) dtype; source is w where the dtype is float */
    besa_dtype dtype;
} besa_weight_step;

/* One step of conjugate gradients (section "refit") for rows that are systems of their own. K: the weights that are not 0 in
 * X, z = scale r. At the first, where Q = (W - X) H,
 *     r = q in K, else 0;  p = z;  rho = rho0 = r'z.
 * At the others, where Q = P H: alpha = rho / p'q,
 *     x += alpha p in K, where a 0 becomes the smallest normal float: K stays;  r -= alpha q in K;
 *     beta = r'z / rho;  p = z + beta p;  then rho = r'z.
 * A row stops, rho is 0 and all else stays from then on, where there is nothing to gain or floats end: where rho is not above
 * 1e-14 rho0, p'q not above 1e-30, or alpha not above 0 and below 3e38. */
typedef struct besa_refit_step {
    int first;
    int64_t rows, columns;
    float *x, *r, *p;                           /* (rows, C) p need not hold anything at the first */
    const float *q;                             /* (rows, C) */
    const float *scale;                         /* (C) = 1 / H_jj */
    float *rho;                                 /* (2, rows) rho; rho0 */
} besa_refit_step;

/* A layer's weights on grids of 2^bits levels, one for every `group` consecutive columns of a row, G = ceil(C / group) of them in
 * a row (section "quantization"). */
typedef struct besa_quantizer {
    int bits;                                   /* 2 .. 8 */
    int64_t rows, columns, group;
    const float *range;                         /* (R,G,2) largest and smallest weight of the group */
    const float *logit;                         /* (R,G,2) of the clips g0, g1 = sigmoid(logit) of the two; NULL: both are 1 */
    float *scale, *zero;                        /* (R,G) h and z, a whole number: the levels are h (q - z), q = 0 .. 2^bits - 1 */
} besa_quantizer;

struct besa_backend {
    const char *name;
    void *context;                              /* the backend's own */
    besa_dtype activation_dtype;
    int unified_memory;                         /* device pointers are host pointers */
    size_t gradient_bytes;                      /* the pruner makes and uses weight gradients in pieces of 128 rows or more
                                                   of about this size: a whole one may be a gigabyte. 0: whole ones */
    besa_dtype gradient_dtype;                  /* theirs where rates alone learn from them: BESA_F32, or what rounding costs
                                                   their sums little in */
    void *workspace;                            /* scratch of all operations: set by whoever calls them to at least
                                                   workspace_size() bytes, 256-byte aligned, device memory */
    size_t workspace_bytes;
    besa_error error;                           /* of the last failed operation */

    /* ---- memory and order ------------------------------------------------------------------ */
    void (*destroy)(besa_backend *be);          /* frees what the backend itself holds */
    size_t (*workspace_size)(besa_backend *be, const besa_workload *w); /* SIZE_MAX: more than can be addressed */
    besa_result (*alloc)(besa_backend *be, void **device, size_t bytes); /* 256-byte aligned */
    void (*free)(besa_backend *be, void *device); /* the caller has synchronised what uses it */
    besa_result (*host_alloc)(besa_backend *be, void **host, size_t bytes); /* pinned where that means something */
    void (*host_free)(besa_backend *be, void *host);
    besa_result (*memory_info)(besa_backend *be, size_t *free_bytes, size_t *total_bytes);
    /* Host memory must stay as it is until the queue has been synchronised, or an event after it has passed. */
    besa_result (*upload)(besa_backend *be, besa_queue q, void *device, const void *host, size_t bytes);
    besa_result (*download)(besa_backend *be, besa_queue q, void *host, const void *device, size_t bytes);
    besa_result (*copy)(besa_backend *be, besa_queue q, void *dst, const void *src, size_t bytes);
    besa_result (*zero)(besa_backend *be, besa_queue q, void *dst, size_t bytes);
    besa_result (*record)(besa_backend *be, besa_queue q, int event); /* the event: all that q holds now */
    besa_result (*wait)(besa_backend *be, besa_queue q, int event);   /* q goes on after the event; at once where it was
                                                                         never recorded */
    /* seconds from one event to another: both were recorded, and their queue synchronised since */
    besa_result (*elapsed)(besa_backend *be, int first, int second, double *seconds);
    besa_result (*synchronize)(besa_backend *be, besa_queue q);       /* the host waits for all of q */

    /* ---- matrix products ------------------------------------------------------------------- */
    /* Y(T,R) = X(T,C) W(R,C)' [+ Y] [+ bias(R)]; all sums in float. accumulate adds to what Y holds. */
    besa_result (*linear_forward)(besa_backend *be, void *y, const void *x, const void *w, besa_dtype dtype,
                                  const float *bias, int64_t tokens, int64_t rows, int64_t columns, int accumulate);
    /* dX(T,C) = dY(T,R) W(R,C) [+ dX] */
    besa_result (*linear_backward_input)(besa_backend *be, void *dx, const void *dy, const void *w, besa_dtype dtype,
                                         int64_t tokens, int64_t rows, int64_t columns, int accumulate);
    /* dW(count,C) = rows first .. first+count-1 of dY(T,R)' X(T,C) [+ dW]; dw_dtype: BESA_F32 or be->gradient_dtype */
    besa_result (*linear_backward_weight)(besa_backend *be, void *dw, besa_dtype dw_dtype, const void *dy, const void *x,
                                          int64_t tokens, int64_t rows, int64_t columns, int64_t first, int64_t count,
                                          int accumulate);
    /* H(C,C) += scale X(T,C)' X(T,C), float; above the diagonal anything finite */
    besa_result (*gram)(besa_backend *be, float *h, const void *x, float scale, int64_t tokens, int64_t columns);

    /* ---- the block's pieces ---------------------------------------------------------------- */
    /* dst(n) = src(n) in another element type, rounded to nearest even */
    besa_result (*convert)(besa_backend *be, void *dst, besa_dtype dst_dtype, const void *src, besa_dtype src_dtype,
                           int64_t n);
    /* Y(N,d) = X / rms * g, rms = sqrt(mean(X^2) + eps); inv_rms(N) = 1 / rms is kept for the backward pass;
     * y may be x */
    besa_result (*rmsnorm_forward)(besa_backend *be, void *y, float *inv_rms, const void *x, const float *g,
                                   int64_t n, int64_t d, float eps);
    /* dX(N,d) = inv_rms (g dY - X inv_rms^2 mean(g dY X)) [+ dX]; dX may be dY */
    besa_result (*rmsnorm_backward)(besa_backend *be, void *dx, const void *dy, const void *x, const float *g,
                                    const float *inv_rms, int64_t n, int64_t d, int accumulate);
    /* In place on X(T, heads * dh): pairs (i, i + r/2) of the first r elements of each head turned by the angle of position
     * t % seqlen; cos, sin (seqlen, r/2). direction 1 forward, -1 backward (the transposed turn). */
    besa_result (*rope)(besa_backend *be, void *x, const float *cosine, const float *sine, int64_t tokens,
                        int64_t seqlen, int64_t heads, int64_t head_dim, int64_t rotary_dim, int direction);
    /* O(T, heads*dh) = softmax_causal(softcap(scale Q K')) V, per sequence and head */
    besa_result (*attention_forward)(besa_backend *be, void *o, const void *q, const void *k, const void *v,
                                     const besa_attention_shape *s);
    /* dQ, dK, dV assigned, from dO; the probabilities are computed again from Q and K */
    besa_result (*attention_backward)(besa_backend *be, void *dq, void *dk, void *dv, const void *d_o, const void *q,
                                      const void *k, const void *v, const besa_attention_shape *s);
    /* Z(n) = silu(G) U, silu(x) = x sigmoid(x) */
    besa_result (*swiglu_forward)(besa_backend *be, void *z, const void *gate, const void *up, int64_t n);
    /* dG = dZ U silu'(G), dU = dZ silu(G); dG may be G and dU may be U */
    besa_result (*swiglu_backward)(besa_backend *be, void *dgate, void *dup, const void *dz, const void *gate,
                                   const void *up, int64_t n);
    /* Z(n) = gelu(G) U, gelu(x) = x sigmoid(2 c (x + 0.044715 x^3)), c = sqrt(2 / pi): its form with tanh */
    besa_result (*geglu_forward)(besa_backend *be, void *z, const void *gate, const void *up, int64_t n);
    /* dG = dZ U gelu'(G), dU = dZ gelu(G); dG may be G and dU may be U */
    besa_result (*geglu_backward)(besa_backend *be, void *dgate, void *dup, const void *dz, const void *gate,
                                  const void *up, int64_t n);
    /* Y(n) = X + scale Z, act; X NULL: 0; y may be x or z */
    besa_result (*residual)(besa_backend *be, void *y, const void *x, const void *z, float scale, int64_t n);

    /* ---- statistics and loss --------------------------------------------------------------- */
    /* out(d) += column sums of X(T,d)^2; T may be larger than the workload's tokens */
    besa_result (*column_sumsq)(besa_backend *be, float *out, const void *x, int64_t tokens, int64_t d);
    /* out(d) += column sums of dY(N,d), the gradient of a bias; where x is not NULL, of dY X inv_rms(N), that of a norm's
     * weight. N may be larger than the workload's tokens */
    besa_result (*column_sum)(besa_backend *be, float *out, const void *dy, const void *x, const float *inv_rms, int64_t n,
                              int64_t d);
    /* loss(1) += scale / d * sum ((Yref - Y) / norm_c)^2 with norm_c^2 = sumsq(d), columns of norm 0 left out;
     * dY = its derivative [+ dY], or NULL; dY may be Y where it does not accumulate */
    besa_result (*block_loss)(besa_backend *be, float *loss, void *dy, const void *y, const void *yref,
                              const float *sumsq, float scale, int64_t tokens, int64_t d, int accumulate);

    /* ---- sparsity -------------------------------------------------------------------------- */
    /* S(R,C) = |W|^power * scale(C) (power 1 or 2; scale NULL: 1). A weight that is 0 scores -1: before all others */
    besa_result (*score)(besa_backend *be, float *s, const void *w, besa_dtype dtype, const float *scale, int power,
                         int64_t rows, int64_t columns);
    /* S(n) = S G where S is above 0: scores by a factor of each weight */
    besa_result (*score_scale)(besa_backend *be, float *s, const float *g, int64_t n);
    /* sums(C) = of the columns of |W|(R,C) */
    besa_result (*absolute_sums)(besa_backend *be, float *sums, const void *w, besa_dtype dtype, int64_t rows, int64_t columns);
    /* S(R,C) = S (1 / sum_j |W_rj| + 1 / sums_j) where S is above 0, sums(C) of columns that these are rows of */
    besa_result (*score_relative)(besa_backend *be, float *s, const void *w, besa_dtype dtype, const float *sums, int64_t rows,
                                  int64_t columns);
    /* y(n) += x(n)^2 */
    besa_result (*accumulate_squares)(besa_backend *be, float *y, const float *x, int64_t n);
    /* Of every row of S(R,C) = |W| scale(C), products in float: sums(R) = the sum, double; above(R) = how many exceed limit,
     * which is 0 or more. Either may be NULL */
    besa_result (*score_rows)(besa_backend *be, double *sums, int32_t *above, const void *w, besa_dtype dtype,
                              const float *scale, float limit, int64_t rows, int64_t columns);
    /* y(n) = x(n)^exponent; y may be x; 1 / infinity is 0 */
    besa_result (*power)(besa_backend *be, float *y, const float *x, float exponent, int64_t n);
    /* y(n) = value */
    besa_result (*fill)(besa_backend *be, int32_t *y, int32_t value, int64_t n);
    /* zeros(R) = number of weights of the row that are 0; not_finite(1) += number that are NaN or infinite */
    besa_result (*count_zeros)(besa_backend *be, int32_t *zeros, int32_t *not_finite, const void *w, besa_dtype dtype,
                               int64_t rows, int64_t columns);
    /* rank(R,C) = position of j in the stable ascending order of row r; 16 bits, 32 where C > 65536 */
    besa_result (*rank_rows)(besa_backend *be, void *rank, const float *s, int64_t rows, int64_t columns);
    /* What = rank >= n[r] ? W : +0; What may be W */
    besa_result (*mask_apply)(besa_backend *be, void *what, const void *w, besa_dtype dtype, const void *rank,
                              const int32_t *n, int64_t rows, int64_t columns);
    /* What holds mask_apply's result for before(R) and comes to hold that for n(R); before becomes n. Only weights
     * whose rank lies between the two need to be touched; what is not w */
    besa_result (*mask_update)(besa_backend *be, void *what, const void *w, besa_dtype dtype, const void *rank,
                               const int32_t *n, int32_t *before, int64_t rows, int64_t columns);
    /* What = W without its `count` smallest scores over the whole layer, ties by position; What may be W */
    besa_result (*mask_smallest)(besa_backend *be, void *what, const void *w, besa_dtype dtype, const float *s,
                                 int64_t count, int64_t rows, int64_t columns);
    /* What(n) = 0 in What ? +0 : W */
    besa_result (*mask_zeros)(besa_backend *be, void *what, const void *w, besa_dtype dtype, int64_t n);
    /* In every m consecutive columns the n smallest scores are pruned, ties by position; columns % m == 0 */
    besa_result (*mask_pattern)(besa_backend *be, void *what, const void *w, besa_dtype dtype, const float *s, int n,
                                int m, int64_t rows, int64_t columns);
    /* sums(R,D)[r, bucket[rank[r,j]]] += dW[r,j] W[r,j]; bucket(C) is the largest d with rank < k_d, 0 .. D-1; dw_dtype as
     * above */
    besa_result (*bucket_gradient)(besa_backend *be, float *sums, const void *dw, besa_dtype dw_dtype, const void *w,
                                   besa_dtype dtype, const void *rank, const uint16_t *bucket, int64_t rows,
                                   int64_t columns, int64_t buckets);
    /* alpha(R), the same for all rows of a group, and n(R) = floor(alpha units), not below zeros(R), from theta_layer(D+1)
     * and theta_row(G,D+1); a theta whose scale is 0 may be NULL. beta is recomputed in the backward pass. */
    besa_result (*rate_forward)(besa_backend *be, float *alpha, int32_t *n, const float *theta_layer,
                                const float *theta_row, const int32_t *zeros, const besa_rate_shape *s);
    /* mean(1) [+]= share * mean of alpha(R) */
    besa_result (*rate_mean)(besa_backend *be, float *mean, const float *alpha, float share, int accumulate, int64_t rows);
    /* dtheta assigned: dL/dbeta[g,d] = - sum over rows of g, buckets b >= d of sums[r,b] + coefficient (S - t) rows_g / R p_d,
     * then the softmax and sigmoid; dtheta_layer is the sum over groups. NULL where the scale is 0. */
    besa_result (*rate_backward)(besa_backend *be, float *dtheta_layer, float *dtheta_row, const float *sums,
                                 const float *theta_layer, const float *theta_row, const besa_penalty *penalty,
                                 const besa_rate_shape *s);
    /* One step of Prodigy or AdamW over all parameters together */
    besa_result (*optimizer_step)(besa_backend *be, const besa_optimizer_step *o);
    /* n(R) whose sum is count: with exact_r = columns_r sigmoid(logit(alpha_r) + shift), alpha kept within
     * 1e-7 .. 1 - 1e-7, n_r = floor(exact_r), but not below least_r nor above columns_r, for the largest shift in
     * -60 .. 60 whose sum does not exceed count; what is missing goes, one each, to the largest exact_r - n_r, ties by
     * row, again and again. least <= columns; a row with 0 columns is left out: its n stays. excess(1) = 0 where that
     * worked; where it cannot, n stays and excess is by how much the sum of least exceeds count, or -1: an alpha is not
     * finite. Where count exceeds the sum of columns all are pruned. */
    besa_result (*project_counts)(besa_backend *be, int32_t *n, int64_t *excess, const float *alpha, const int32_t *least,
                                  const int32_t *columns, int64_t count, int64_t rows);

    /* ---- weights that learn ---------------------------------------------------------------- */
    /* out(1) = sqrt(mean of w(n)^2) */
    besa_result (*rms)(besa_backend *be, float *out, const float *w, int64_t n);
    /* See besa_weight_step */
    besa_result (*weight_step)(besa_backend *be, const besa_weight_step *o);
    /* Y(n) = (1 - share) Y + share X, act */
    besa_result (*mix)(besa_backend *be, void *y, const void *x, float share, int64_t n);
    /* y(n) += value */
    besa_result (*shift)(besa_backend *be, float *y, float value, int64_t n);

    /* ---- quantisation ---------------------------------------------------------------------- */
    /* range(R,G,2) = the largest and the smallest of 0 and each `group` columns of W(R,C) */
    besa_result (*quantize_range)(besa_backend *be, float *range, const void *w, besa_dtype dtype, int64_t group, int64_t rows,
                                  int64_t columns);
    /* scale = h = (g0 max - g1 min) / (2^bits - 1), zero = z = -round(g1 min / h); both 0 where h is not above 0 */
    besa_result (*quantize_grid)(besa_backend *be, const besa_quantizer *q);
    /* What(R,C) = h (clamp(round(W / h) + z, 0, 2^bits - 1) - z), rounded to nearest even; +0 where h is 0. What may be W */
    besa_result (*quantize)(besa_backend *be, void *what, const void *w, besa_dtype dtype, const besa_quantizer *q);
    /* dlogit(R,G,2) += the derivative by the clips' logits, for dW = dL/dWhat: with u = round(W / h) + z, and rounding
     * passed straight through, dWhat/dh = round(W / h) - W / h where 0 < u < 2^bits - 1, clamp(u) - z elsewhere */
    besa_result (*quantize_gradient)(besa_backend *be, float *dlogit, const float *dw, const void *w, besa_dtype dtype,
                                     const besa_quantizer *q);

    /* ---- SparseGPT ------------------------------------------------------------------------- */
    /* H(C,C) in: a Gram matrix (lower triangle); out: the upper Cholesky factor U of inv(H + damping), zeros below,
     * dead(C) = 1 where the input column was zero: H_jj = 1 there, before damping * mean(diag) is added.
     * BESA_ERROR_NUMERIC, here or from the next synchronize, where H is not positive definite */
    besa_result (*hessian_factor)(besa_backend *be, float *h, int32_t *dead, float damping, int64_t columns);
    /* diag(C) = U_jj, +infinity where dead(C) */
    besa_result (*diagonal)(besa_backend *be, float *diag, const float *u, const int32_t *dead, int64_t columns);
    /* Slab of columns first .. first+width-1 of Wf(R,C), float, in place; first and width are multiples of m: dead
     * columns become 0; pruned are the
     * floor(width R target) + 1 smallest w^2 / U_jj^2 of the slab as it was, or n of every m (as updated) where
     * m > 0; err(R,width) = w / U_jj of each pruned weight, 0 of a kept one, taken off the slab's later columns. With a
     * quantizer (of all of Wf; NULL: none) a kept weight goes to its level, and err = (w - level) / U_jj */
    besa_result (*sparsegpt_slab)(besa_backend *be, float *wf, float *err, const float *u, const int32_t *dead,
                                  int64_t first, int64_t width, double target, int n, int m, const besa_quantizer *q,
                                  int64_t rows, int64_t columns);
    /* Wf[:, first+width:] -= err(R,width) U[first:first+width, first+width:] */
    besa_result (*sparsegpt_push)(besa_backend *be, float *wf, const float *err, const float *u, int64_t first,
                                  int64_t width, int64_t rows, int64_t columns);

    /* ---- kept weights fitted anew ---------------------------------------------------------- */
    /* Wf and err as sparsegpt_slab makes them, where pruned are the weights that are 0 in kept(R,C), and no column is dead */
    besa_result (*sparsegpt_given)(besa_backend *be, float *wf, float *err, const float *u, const float *kept,
                                   int64_t first, int64_t width, int64_t rows, int64_t columns);
    /* H(C,C) in: a Gram matrix (lower triangle); out: all of it, and damping * mean(diag) on its diagonal;
     * scale(C) = 1 / H_jj, or 0 where that is 0 */
    besa_result (*hessian_whole)(besa_backend *be, float *h, float *scale, float damping, int64_t columns);
    /* Y(R,C) = X(R,C) H(C,C), all float and never rounded to less */
    besa_result (*hessian_product)(besa_backend *be, float *y, const float *x, const float *h, int64_t rows,
                                   int64_t columns);
    /* x(n) = What, p(n) = W - What */
    besa_result (*refit_begin)(besa_backend *be, float *x, float *p, const void *w, const void *what, besa_dtype dtype,
                               int64_t n);
    /* See besa_refit_step */
    besa_result (*refit_step)(besa_backend *be, const besa_refit_step *o);
    /* What(n) = x, rounded, where What is not 0, but as it was where that would be 0; +0 elsewhere: masks stay */
    besa_result (*refit_end)(besa_backend *be, void *what, const float *x, besa_dtype dtype, int64_t n);

    /* ---- head ------------------------------------------------------------------------------ */
    /* logits(T,V) = H(T,d) W(V,d)', float */
    besa_result (*logits)(besa_backend *be, float *out, const void *h, const void *w, besa_dtype dtype, int64_t tokens,
                          int64_t vocab, int64_t d);
    /* y(n) = s y; where cap is not 0, cap tanh(s y / cap) */
    besa_result (*softcap)(besa_backend *be, float *y, float scale, float cap, int64_t n);
    /* Running log-sum-exp over chunks of the vocabulary: state(T,3) = max, sum of exp, logit of the target; first
     * starts it; logits(T,count) are those of ids first_id .. ; target(T), -1 for none */
    besa_result (*nll_update)(besa_backend *be, float *state, const float *logits, const int32_t *target,
                              int64_t first_id, int64_t count, int64_t tokens, int first);
    /* sum(windows), double: over the window's tokens with target >= 0 of max + log(sum) - logit of the target */
    besa_result (*nll_sum)(besa_backend *be, double *sum, const float *state, const int32_t *target, int64_t windows,
                           int64_t seqlen);
    /* Over the same chunks, of two models' logits P and Q(T,count): state(T,4) = max of P, sum of exp(P - max), sum of
     * exp(P - max) (P - Q), max of Q; best(T,2) = the first id of each maximum */
    besa_result (*divergence_update)(besa_backend *be, float *state, int32_t *best, const float *p, const float *q,
                                     int64_t first_id, int64_t count, int64_t tokens, int first);
};

/* Every operation of the table, for those who fill one in or wrap one. */
#define BESA_OPERATIONS(X)                                                                         \
    X(destroy) X(workspace_size) X(alloc) X(free) X(host_alloc) X(host_free) X(memory_info)        \
    X(upload) X(download) X(copy) X(zero) X(record) X(wait) X(elapsed) X(synchronize)              \
    X(linear_forward) X(linear_backward_input) X(linear_backward_weight) X(gram) X(convert)        \
    X(rmsnorm_forward) X(rmsnorm_backward) X(rope) X(attention_forward) X(attention_backward)      \
    X(swiglu_forward) X(swiglu_backward) X(column_sumsq) X(column_sum) X(block_loss) X(score)      \
    X(score_scale) X(absolute_sums) X(score_relative) X(accumulate_squares) X(power) X(fill)       \
    X(count_zeros) X(rank_rows) X(mask_apply) X(mask_update) X(mask_smallest) X(mask_zeros)        \
    X(mask_pattern) X(bucket_gradient) X(rate_forward) X(rate_mean) X(rate_backward)               \
    X(optimizer_step) X(project_counts) X(rms) X(weight_step) X(mix) X(hessian_factor) X(diagonal) \
    X(sparsegpt_slab) X(sparsegpt_push) X(score_rows) X(sparsegpt_given) X(hessian_whole)          \
    X(hessian_product) X(refit_begin) X(refit_step) X(refit_end)                                   \
    X(quantize_range) X(quantize_grid) X(quantize) X(quantize_gradient)                            \
    X(logits) X(nll_update) X(nll_sum)                                                             \
    X(geglu_forward) X(geglu_backward) X(residual) X(shift) X(softcap) X(divergence_update)

typedef struct besa_cpu_options {
    int threads;                                /* 0: as many as OpenMP would use; 1 without OpenMP */
    int bf16;                                   /* products on operands rounded to bf16, sums in float: twice the speed
                                                   with AVX512-BF16, the same numbers without */
} besa_cpu_options;

/* Fill in the CPU backend, which is the definition of every operation. options may be NULL; the backend holds no
 * memory until an operation needs its workspace; be->destroy(be) ends it. BESA_ERROR_OPTION, BESA_ERROR_MEMORY. */
BESA_API besa_result besa_cpu_backend(besa_backend *be, const besa_cpu_options *options, besa_error *error);

typedef struct besa_cuda_options {
    int device;
    int fp32;                                   /* 1: activations and products in float; default: bf16 with float sums.
                                                   Devices below sm_80 always use float */
} besa_cuda_options;

/* Fill in the CUDA backend: defined by besa_cuda.cuh in the one .cu file that defines BESA_IMPLEMENTATION and BESA_CUDA,
 * and callable from C. options may be NULL: device 0. BESA_ERROR_DEVICE where there is no driver or no such device. */
#if defined(BESA_IMPLEMENTATION) && !defined(BESA_CUDA)
extern besa_result besa_cuda_backend(besa_backend *be, const besa_cuda_options *options, besa_error *error); /* elsewhere */
extern void *besa_cuda_stream(const besa_backend *be, besa_queue queue);
#else
BESA_API besa_result besa_cuda_backend(besa_backend *be, const besa_cuda_options *options, besa_error *error);
/* The cudaStream_t of a queue of this backend, for work of the caller's own in order with it, such as a besa_comm's sums. */
BESA_API void *besa_cuda_stream(const besa_backend *be, besa_queue queue);
#endif

/* ============================================================================================
 * // >>api-layer             level 3: rates of any linear layers, in a training loop of your own
 * ============================================================================================
 *
 *   besa_rates_create(&rates, be, shapes, count, &options, &error);
 *   for each layer:   besa_rates_rank(rates, i, W, importance, statistic, scratch, &error)   once
 *   for each step:    besa_rates_forward(rates, &error)                              theta -> alpha, n
 *                     for each layer: besa_rates_mask(rates, i, W, What, &error);    What = W M
 *                     ... your forward and backward pass with What gives dW = dL/dWhat ...
 *                     for each layer: besa_rates_gradient(rates, i, W, dW, &error)   adds: call it per micro-batch
 *                     besa_rates_step(rates, &error)                                 optimiser, penalty included
 *   besa_rates_project(rates, &error);                                               exact counts from the last theta
 *   for each layer:   besa_rates_mask(rates, i, W, What, &error)
 *
 * The defaults are those of whole models. For one layer with a gradient of little noise rates may move further:
 * examples/layer.c has form ROW, row_scale 2 and d_coef 1. The penalty is added to your loss as it is, so lambda is to be
 * seen beside the loss's size.
 *
 * These functions bring their own workspace and leave be->workspace as it was. The backend must outlive the rates.
 */

/* What a score needs to know of a layer's input columns. */
typedef enum besa_statistic {
    BESA_STATISTIC_NONE,
    BESA_STATISTIC_SUMSQ,                       /* sum of X_j^2 over the tokens: be->column_sumsq */
    BESA_STATISTIC_FACTOR                       /* U_jj, U'U = inv(2/T X'X + damping): be->hessian_factor, be->diagonal */
} besa_statistic;

/* The importances: X(value, name, statistic, power, exponent, gradient, relative) scores a weight |W|^power statistic_j^exponent,
 * power 1 or 2, times G^gradient where that is not 0: G is the sum over calibration sequences of (dL/dWhat)^2, of the block's
 * loss with the mask that the score has without G. relative 1: times the weight's share of its row and of its column,
 * 1 / sum_j |W_rj| + 1 / sum_r |W_rj|. All that the library and the command line know of an importance is its row. */
#define BESA_IMPORTANCES(X)                                                                        \
    X(BESA_IMPORTANCE_WANDA, "wanda", BESA_STATISTIC_SUMSQ, 1, 0.5f, 0.0f, 0)     /* |W| l2(X_j), the default */ \
    X(BESA_IMPORTANCE_MAGNITUDE, "magnitude", BESA_STATISTIC_NONE, 1, 0.0f, 0.0f, 0) /* |W| */     \
    X(BESA_IMPORTANCE_SPARSEGPT, "sparsegpt", BESA_STATISTIC_FACTOR, 2, -1.0f, 0.0f, 0) /* W^2 / U_jj, as the published code */ \
    X(BESA_IMPORTANCE_SPARSEGPT_SQUARED, "sparsegpt-squared", BESA_STATISTIC_FACTOR, 2, -2.0f, 0.0f, 0) /* W^2 / U_jj^2, the paper */ \
    X(BESA_IMPORTANCE_GRADIENT, "gradient", BESA_STATISTIC_SUMSQ, 1, 0.3f, 0.2f, 0) /* |W| l2(X_j)^0.6 rms(dL/dWhat)^0.4 */ \
    X(BESA_IMPORTANCE_RELATIVE, "relative", BESA_STATISTIC_SUMSQ, 1, 0.25f, 0.0f, 1) /* of row and column, l2(X_j)^0.5: RIA, ICLR 2024 */

typedef enum besa_importance {
#define BESA__ENUM(value, name, statistic, power, exponent, gradient, relative) value,
    BESA_IMPORTANCES(BESA__ENUM)
#undef BESA__ENUM
    BESA_IMPORTANCE_COUNT
} besa_importance;

typedef enum besa_rate_form {
    BESA_RATES_HIERARCHICAL,                    /* a rate logit vector per layer and one per row group: the default */
    BESA_RATES_ROW,                             /* row groups only: the paper's row-wise form */
    BESA_RATES_LAYER                            /* one rate per layer: the paper's layer-wise form */
} besa_rate_form;

/* How the learning rate goes once it has risen. */
typedef enum besa_schedule {
    BESA_SCHEDULE_CONSTANT,
    BESA_SCHEDULE_COSINE                        /* half a cosine, which would reach 0 one step after the last */
} besa_schedule;

/* How rates are parametrised and learned. A zero-filled struct means the defaults, in brackets. */
typedef struct besa_rate_options {
    double target;                              /* sparsity in (0, 1); required, but where an n:m pattern gives it */
    besa_rate_form form;
    double layer_scale, row_scale;              /* s_L, s_R [1 each, NONE], as far as the form has them */
    int plain_softmax;                          /* softmax(theta) instead of softmax(sigmoid(theta)) */
    int zero_start;                             /* start where all logits are 0 (rate 1/2) instead of at the target */
    int candidates;                             /* D [100]: D + 1 rates 1, 1 - 1/D, ..., 0; 1 .. 65535 */
    int64_t group_rows;                         /* rows per rate [1]; BESA_ALL_ROWS: all rows of a layer */
    double penalty;                             /* lambda [1, NONE] */
    besa_optimizer_kind optimizer;
    double lr;                                  /* [1 for Prodigy, 0.01 for AdamW] */
    double beta1, beta2;                        /* [0.9, 0.999, NONE]; Prodigy's beta3 is sqrt(beta2) */
    double weight_decay;                        /* [0], decoupled */
    double d0, d_coef;                          /* Prodigy [1e-6, 5] */
    besa_schedule schedule;                     /* of lr over the steps [constant] */
    double warmup;                              /* share of the steps in which lr rises to its full value [0]; below 1 */
    int64_t steps;                              /* that there will be, for schedule and warmup [1; besa_prune and
                                                   besa_pruner count them themselves] */
} besa_rate_options;

/* One linear layer: W (rows, columns), y = x W'. */
typedef struct besa_layer_shape {
    int64_t rows, columns;
    besa_dtype dtype;
} besa_layer_shape;

typedef struct besa_rates besa_rates;           /* the rates of a set of layers and their optimiser */

/* Bytes of backend memory that besa_rates_create will take for these layers; 0 if an option is out of range, SIZE_MAX if
 * it is more than can be addressed. */
BESA_API size_t besa_rates_size(besa_backend *be, const besa_layer_shape *layers, int count,
                                const besa_rate_options *options);

/* Create the rates of `count` layers that share one optimiser and one target. Ranks (2 bytes per
 * weight, 4 above 65536 columns), bucket sums (4 R D bytes), theta and optimiser state live in one allocation of the
 * backend, owned by *rates until besa_rates_destroy.
 * BESA_ERROR_OPTION names the option; BESA_ERROR_MEMORY. Equations: sections "rates" and "parameters" below. */
BESA_API besa_result besa_rates_create(besa_rates **rates, besa_backend *be, const besa_layer_shape *layers,
                                       int count, const besa_rate_options *options, besa_error *error);
BESA_API void besa_rates_destroy(besa_rates *rates); /* NULL is fine */

/* Score the weights of one layer and keep each weight's rank in its row; resets nothing else.
 *   w           (R,C) device, the layer's dtype
 *   statistic   (C) device floats, the statistic of the importance's row in BESA_IMPORTANCES: for wanda the sums of squares
 *               of the input columns (be->column_sumsq), for the sparsegpt forms U_jj (be->hessian_factor, be->diagonal);
 *               NULL for magnitude. Its numbers are not looked at: what is not finite or negative makes ranks arbitrary
 *   scratch     (R + 1, C) device floats, with importance relative (R + 2, C); free to use again on return
 * NaN and infinite weights are counted: besa_rates_project and besa_rates_status report them as
 * BESA_ERROR_NOT_FINITE. Does not wait for the device. */
BESA_API besa_result besa_rates_rank(besa_rates *rates, int layer, const void *w, besa_importance importance,
                                     const float *statistic, float *scratch, besa_error *error);

/* Hold one layer at a sparsity of its own (0: dense): no theta, not part of the target. A negative sparsity makes
 * it learn again. Before the first step, else BESA_ERROR_OPTION. */
BESA_API besa_result besa_rates_fix(besa_rates *rates, int layer, double sparsity, besa_error *error);

/* Start again for other weights: theta and optimiser as after besa_rates_create, no layer fixed. */
BESA_API besa_result besa_rates_reset(besa_rates *rates, besa_error *error);

/* theta -> alpha_g = sum_d beta_d p_d of every group, n_r = max(floor(alpha_g C), source zeros of r) of every row. */
BESA_API besa_result besa_rates_forward(besa_rates *rates, besa_error *error);

/* pruned(R,C) = W where rank >= n, +0 elsewhere. w, pruned: device, the layer's dtype; pruned may be w. */
BESA_API besa_result besa_rates_mask(besa_rates *rates, int layer, const void *w, void *pruned, besa_error *error);

/* Add dW * W into each row's bucket sums: all of dL/dbeta comes from these (straight-through estimator).
 *   w    (R,C) device: the dense weight, as it was ranked
 *   dw   (R,C) device floats: dL/dWhat. Ignored for a fixed layer */
BESA_API besa_result besa_rates_gradient(besa_rates *rates, int layer, const void *w, const float *dw,
                                         besa_error *error);

/* One optimiser step: besa_rates_backward, then besa_rates_optimize. alpha and n change with the next forward. */
BESA_API besa_result besa_rates_step(besa_rates *rates, besa_error *error);

/* Bucket sums -> gradient of all theta, the penalty's included; empties the sums. */
BESA_API besa_result besa_rates_backward(besa_rates *rates, besa_error *error);

/* The optimiser's step from that gradient. */
BESA_API besa_result besa_rates_optimize(besa_rates *rates, besa_error *error);

/* The number of parameters, and where they and their gradient lie: device, one flat array each over all layers, per
 * layer theta_L (D+1) and then theta_g (groups, D+1), as far as the form has them. For an optimiser of your own, or to
 * sum gradients over processes. Either pointer may be NULL. */
BESA_API int64_t besa_rates_parameters(besa_rates *rates, float **theta, float **grad);

/* From theta as it is, choose n of every row so that exactly floor(target N + 1/2) of the N weights of all layers that are
 * not fixed go: one constant is added to every logit(alpha), remainders go to the largest fractional parts, ties by
 * (layer, row). No row prunes more than its columns or fewer than its source zeros; BESA_ERROR_TARGET where those alone
 * exceed the count, BESA_ERROR_NOT_FINITE for weights or rates. Waits for the device. */
BESA_API besa_result besa_rates_project(besa_rates *rates, besa_error *error);

/* Copy out a layer's alpha (rows) and n (rows) as of the last forward or projection; host memory or NULL; waits. */
BESA_API besa_result besa_rates_read(besa_rates *rates, int layer, float *alpha, int32_t *n, besa_error *error);

/* Prodigy's d, and the mean alpha of the learned layers as of the last forward, weighted by their sizes; waits for the
 * device. Both may be NULL. BESA_ERROR_NOT_FINITE if a weight or a gradient was not finite. */
BESA_API besa_result besa_rates_status(besa_rates *rates, double *d, double *mean_rate, besa_error *error);

/* ============================================================================================
 * // >>api-block             level 2: one decoder block whose weights are in the caller's memory
 * ============================================================================================ */

enum { BESA_Q, BESA_K, BESA_V, BESA_O, BESA_GATE, BESA_UP, BESA_DOWN, BESA_LAYERS };

/* A block's vectors: the biases, under their layers' numbers, and the norms. */
enum { BESA_NORM1 = BESA_LAYERS, BESA_NORM2, BESA_Q_NORM, BESA_K_NORM, BESA_NORM1_OUT, BESA_NORM2_OUT, BESA_VECTORS };

typedef enum besa_rope_type {
    BESA_ROPE_DEFAULT, BESA_ROPE_LINEAR, BESA_ROPE_LLAMA3, BESA_ROPE_DYNAMIC, BESA_ROPE_YARN, BESA_ROPE_LONGROPE
} besa_rope_type;
enum { BESA_MAX_ROPE_FACTORS = 256 };

typedef struct besa_rope {
    besa_rope_type type;
    double theta;                               /* base */
    double factor;                              /* all but default and longrope */
    double low_freq_factor, high_freq_factor;   /* llama3 */
    double original_max_position_embeddings;    /* tokens of the longest sequences in training; not of default, linear */
    double attention_factor;                    /* of cos and sin; 0: 1 */
    double beta_fast, beta_slow;                /* yarn: pairs that turn so often over the original length are as they were,
                                                   and stretched */
    int no_truncate;                            /* yarn: 1: the ramp between these need not begin and end at whole pairs */
    float short_factor[BESA_MAX_ROPE_FACTORS];  /* longrope: a pair's wavelength is so much longer in sequences of up to */
    float long_factor[BESA_MAX_ROPE_FACTORS];   /* original_max_position_embeddings tokens; in longer ones */
} besa_rope;

/* What of a sublayer (attention, MLP) is normed: what it reads, or what it puts out before that is added, or both. */
typedef enum besa_norms { BESA_NORMS_IN, BESA_NORMS_OUT, BESA_NORMS_BOTH } besa_norms;

typedef struct besa_block_shape {
    int64_t hidden_size, intermediate_size;
    int64_t num_attention_heads, num_key_value_heads, head_dim;
    int64_t sliding_window;                     /* 0: none */
    double rms_norm_eps;
    besa_rope rope;
    /* where a block differs from Llama's; 0 is Llama */
    besa_norms norms;                           /* what of a sublayer is normed */
    int qk_norm_whole;                          /* q_norm and k_norm are over all heads together */
    int no_rope;                                /* q and k are not turned; rope_cos and rope_sin are not looked at */
    int gelu;                                   /* GeGLU instead of SwiGLU: gelu in its form with tanh */
    int64_t rotary_dim;                         /* of a head's elements, the first so many are turned; 0: all */
    double attention_scale, attention_softcap;  /* as in besa_attention_shape */
    double residual_scale;                      /* of a sublayer's output where it is added; 0: 1 */
} besa_block_shape;

/* A decoder block: device pointers, owned by the caller. Biases are NULL where the model has none, q_norm and k_norm
 * (head_dim, or that of all heads with qk_norm_whole) too; they are applied before rope. Norms and biases are float whatever
 * the dtype. */
typedef struct besa_block {
    besa_block_shape shape;
    besa_dtype dtype;
    const void *weight[BESA_LAYERS];            /* (R,C) of besa_block_layer() */
    const float *bias[BESA_LAYERS];             /* (R) or NULL */
    const float *norm1, *norm2;                 /* (hidden_size); NULL with BESA_NORMS_OUT */
    const float *q_norm, *k_norm;               /* (head_dim) or NULL */
    const float *norm1_out, *norm2_out;         /* (hidden_size); NULL with BESA_NORMS_IN */
    const float *rope_cos, *rope_sin;           /* (seqlen, rotary_dim / 2), from besa_rope_table() */
} besa_block;

/* What a forward pass leaves for the backward pass, device, carved from one buffer by besa_activations_init(). For T
 * tokens: a, h1, m, dm (T, hidden_size); q, q_raw, attn, dattn, dq (T, heads * head_dim); k, k_raw, v, dk, dv
 * (T, kv_heads * head_dim); gate, up, z, dz (T, intermediate_size); inv_rms1, inv_rms2 (T), inv_rms_q (T * heads),
 * inv_rms_k (T * kv_heads); tail, out1, out2 (T, hidden_size), inv_rms1_out, inv_rms2_out (T). */
typedef struct besa_activations {
    void *a, *q, *k, *v, *attn, *h1, *m, *gate, *up, *z; /* act; q, k after norm and rope */
    void *q_raw, *k_raw;                        /* before the q/k norms; NULL without them */
    float *inv_rms1, *inv_rms2, *inv_rms_q, *inv_rms_k;
    void *out1, *out2;                          /* what the sublayers put out, before the norm; NULL with BESA_NORMS_IN */
    float *inv_rms1_out, *inv_rms2_out;
    void *tail;                                 /* a sublayer's output on its way to the sum, and its gradient; NULL where
                                                   it is added as it is */
    void *dz, *dm, *dattn, *dq, *dk, *dv;       /* backward only; NULL where not asked for */
    float *dw;                                  /* (R,C) of the largest layer; backward only */
    int64_t dw_count;                           /* floats that dw has room for, a row of any layer at least: with less
                                                   than all, gradients come in pieces */
    besa_dtype dw_dtype;                        /* of what dw receives: BESA_F32 after init; or be->gradient_dtype */
    float *dw_sum[BESA_LAYERS];                 /* the caller's, NULL after init: where (R,C) floats are given, the layer's
                                                   gradient is added to them instead of being handed out */
    float *dvector[BESA_VECTORS];               /* likewise: where floats are given, the gradient of that norm or bias is
                                                   added to them */
} besa_activations;

/* Receives rows first .. first+rows-1 of dL/dW of one layer, dw (rows, C) of acts->dw_dtype, floats unless that was set
 * otherwise: all R at once where acts->dw has room for them. dw is used again on return. Anything but BESA_OK ends the backward pass with that result. */
typedef besa_result (*besa_weight_gradient)(void *user, int layer, int64_t first, int64_t rows, const void *dw);

/* "q_proj" .. "down_proj". */
BESA_API const char *besa_layer_name(int layer);

/* Rows and columns of a layer's weight. */
BESA_API void besa_block_layer(const besa_block_shape *shape, int layer, int64_t *rows, int64_t *columns);

/* Fill cosine, sine (seqlen, rotary_dim / 2), host memory, with the angles t * inv_freq_i of the shape's rope, times its
 * attention_factor. A dynamic rope, and longrope, is another for sequences of another length. */
BESA_API void besa_rope_table(const besa_block_shape *shape, int64_t seqlen, float *cosine, float *sine);

/* Bytes of a buffer for besa_activations_init(), device memory of the caller, 256-byte aligned. tokens = batch * seqlen;
 * qk_norm 1: the block has q/k norms; backward 1: besa_block_backward will be called. SIZE_MAX: more than can be addressed. */
BESA_API size_t besa_activations_size(const besa_backend *be, const besa_block_shape *shape, int qk_norm,
                                      int64_t tokens, int backward);
BESA_API void besa_activations_init(besa_activations *acts, void *device, const besa_backend *be,
                                    const besa_block_shape *shape, int qk_norm, int64_t tokens, int backward);

/* The workload of a block's passes, for be->workspace_size(). */
BESA_API besa_workload besa_block_workload(const besa_block_shape *shape, int64_t batch, int64_t seqlen);

/* Y(T,d) = F(W, X) for T = batch * seqlen tokens: attention and gated MLP as section "block" writes them out.
 * x, y: device, act; y may be x (then there is no dx in the backward pass), or NULL where only acts are wanted.
 * be->workspace must hold be->workspace_size(be, besa_block_workload(shape, batch, seqlen)). */
BESA_API besa_result besa_block_forward(besa_backend *be, const besa_block *block, besa_activations *acts,
                                        const void *x, void *y, int64_t batch, int64_t seqlen, besa_error *error);

/* From dY(T,d) the gradient of every weight, handed to `gradient` one layer at a time (down, gate, up, o, q, k, v),
 * and dX(T,d) where dx is not NULL. A weight whose gradient is handed out has been read for the last time. Needs acts as
 * the forward pass left them and overwrites gate and up; on return dy is dL/dh1, h1 = x + attn Wo'. dx may be dy.
 * Workspace as for the forward pass. */
BESA_API besa_result besa_block_backward(besa_backend *be, const besa_block *block, besa_activations *acts,
                                         const void *x, void *dy, void *dx, int64_t batch, int64_t seqlen,
                                         besa_weight_gradient gradient, void *user, besa_error *error);

#define BESA_METHODS(X)                                                                            \
    X(BESA_METHOD_BESA, "besa") X(BESA_METHOD_WANDA, "wanda") X(BESA_METHOD_SPARSEGPT, "sparsegpt") \
    X(BESA_METHOD_MAGNITUDE, "magnitude") X(BESA_METHOD_KEEP, "keep")

typedef enum besa_method {
#define BESA__ENUM(value, name) value,
    BESA_METHODS(BESA__ENUM)
#undef BESA__ENUM
    BESA_METHOD_COUNT
} besa_method;

/* "besa" .. "keep". */
BESA_API const char *besa_method_name(besa_method method);

/* What is done with a block, and its name in progress and report. A progress report names dense to commit, and of a
 * resumed block commit alone; read and write are only in besa_block_report.seconds. */
#define BESA_PASSES(X)                                                                             \
    X(BESA_PASS_READ, "read")                                                                      \
    X(BESA_PASS_DENSE, "dense")                                                                    \
    X(BESA_PASS_RANK, "rank")                                                                      \
    X(BESA_PASS_LEARN, "learn")                                                                    \
    X(BESA_PASS_WEIGHTS, "weights")                                                                \
    X(BESA_PASS_COMMIT, "commit")                                                                  \
    X(BESA_PASS_WRITE, "write")

typedef enum besa_pass {
#define BESA__ENUM(name, text) name,
    BESA_PASSES(BESA__ENUM)
#undef BESA__ENUM
    BESA_PASS_COUNT
} besa_pass;

/* "read" .. "write". */
BESA_API const char *besa_pass_name(besa_pass pass);

typedef struct besa_progress {
    int64_t block, blocks;
    besa_pass pass;
    double fraction;                            /* of the whole run, or of besa_pruner_run's one block, 0 .. 1 */
    double seconds, seconds_left;
} besa_progress;

/* Called often; return non-zero to stop the run with BESA_ERROR_CANCELLED. */
typedef int (*besa_progress_callback)(void *user, const besa_progress *progress);

/* Called after every learning step of a block: a place to trace it with besa_rates_read and besa_rates_status. */
typedef struct besa_step {
    int64_t block, step, steps;                 /* step counts from 1; alpha is that of the step's forward pass */
    besa_rates *rates;                          /* NULL: the method has none */
    besa_backend *be;
    const float *loss;                          /* (1) device: the step's reconstruction loss, without the penalty, or the
                                                   sum of the parts'; read it with be->download and be->synchronize */
    double lr, weight_lr;                       /* of this step: of the rates; of kept weights, in the units of the option.
                                                   0: they do not learn in it */
} besa_step;

/* A step's figures; NaN where there are no rates. */
typedef struct besa_trace {
    double loss;                                /* the step's own, and */
    double penalty;                             /* what is added for rates that are not at the target: lambda ((S - t) / t)^2 */
    double mean_rate;                           /* S, of all parts together */
    double d;                                   /* Prodigy's, its estimate of the distance to the solution; 1 with AdamW */
} besa_trace;

/* Bring them home; waits for the device, and so makes a GPU's steps slower. BESA_ERROR_NOT_FINITE as besa_rates_status. */
BESA_API besa_result besa_step_trace(const besa_step *step, besa_trace *trace, besa_error *error);

typedef besa_result (*besa_step_callback)(void *user, const besa_step *step);

/* Level 1, called once all blocks are done: returns the text of the output's README.md, which stays the caller's, or NULL.
 * The report is complete but for the seconds; nothing in the text should depend on these, or on resumed_blocks and notes:
 * a run that is interrupted now writes it again. */
struct besa_report;
typedef const char *(*besa_card_callback)(void *user, const struct besa_report *report);

/* A layer, or all layers that a pattern matches, held at a sparsity of its own; 0 keeps it dense. */
typedef struct besa_fixed_rate {
    const char *pattern;                        /* glob over the tensor name, or whole dotted parts of it:
                                                   "v_proj", "layers.0", "*.mlp.*" */
    double sparsity;                            /* 0 <= sparsity < 1 */
} besa_fixed_rate;

/* What learns: with method besa the rates, and after or together with them the kept weights; with others the kept weights. */
#define BESA_LEARNING(X)                                                                           \
    X(BESA_LEARN_RATES, "rates") X(BESA_LEARN_WEIGHTS, "weights") X(BESA_LEARN_BOTH, "both")

typedef enum besa_learn {
#define BESA__ENUM(value, name) value,
    BESA_LEARNING(BESA__ENUM)
#undef BESA__ENUM
    BESA_LEARN_COUNT
} besa_learn;

/* Whose outputs the loss of learning is measured on: the block's; those of attention and MLP, of which each learns by its own
 * loss alone, attention's at h1 = x + attn Wo' and the MLP's at the block's output; or every layer's, on the inputs that the
 * pruned layers before it leave. References are what dense weights put out, and channel norms theirs. */
#define BESA_GRANULARITIES(X)                                                                      \
    X(BESA_GRANULARITY_BLOCK, "block") X(BESA_GRANULARITY_ATTN_MLP, "attn-mlp") X(BESA_GRANULARITY_LAYER, "layer")

typedef enum besa_granularity {
#define BESA__ENUM(value, name) value,
    BESA_GRANULARITIES(BESA__ENUM)
#undef BESA__ENUM
    BESA_GRANULARITY_COUNT
} besa_granularity;

/* How the kept weights of a layer are fitted to what it puts out with dense weights, once the mask is there. */
#define BESA_REFITS(X)                                                                             \
    X(BESA_REFIT_NONE, "none")                                                                     \
    X(BESA_REFIT_OBS, "obs")   /* SparseGPT's update, column by column (arXiv 2301.00774) */       \
    X(BESA_REFIT_CG, "cg")     /* conjugate gradients (arXiv 2406.07831, its second stage) */

typedef enum besa_refit {
#define BESA__ENUM(value, name) value,
    BESA_REFITS(BESA__ENUM)
#undef BESA__ENUM
    BESA_REFIT_COUNT
} besa_refit;

/* Clips of the grids that kept weights are put on: learned where something else is, not, or in any case. */
#define BESA_CLIPPINGS(X)                                                                          \
    X(BESA_CLIPPING_AUTO, "auto") X(BESA_CLIPPING_NONE, "none") X(BESA_CLIPPING_LEARNED, "learned")

typedef enum besa_clipping {
#define BESA__ENUM(value, name) value,
    BESA_CLIPPINGS(BESA__ENUM)
#undef BESA__ENUM
    BESA_CLIPPING_COUNT
} besa_clipping;

/* One run in several processes, on one machine or many: each of `size` ranks calls the same functions with the same arguments,
 * a backend of its own and these five, which the caller fills in (examples/mpi.c, examples/nccl.cu). Every rank holds all
 * weights and a share of the sequences; what section comm lists is summed over ranks, and from equal sums every rank makes
 * equal masks. Rank 0 writes. The calls of all ranks come in the same order. A call that fails fills in *error, and the
 * rank's run ends with it. */
typedef struct besa_comm {
    int rank, size;                             /* 0 <= rank < size */
    void *user;                                 /* of the functions */
    /* data(count) = its sum over all ranks, the same bits on each; device memory, in order on queue q of be, and may return
     * before it is done. The same bytes for the same ranks and data, if runs are to be repeatable. */
    besa_result (*reduce)(void *user, besa_backend *be, besa_queue q, float *data, int64_t count, besa_error *error);
    /* host memory of all ranks becomes that of rank `root`; done on return */
    besa_result (*broadcast)(void *user, void *data, size_t bytes, int root, besa_error *error);
    /* returns when every rank has called it */
    besa_result (*barrier)(void *user, besa_error *error);
    /* This rank's run ends with an error: calls of the others that wait for it, or come to, are to fail with its message
     * (BESA_ERROR_COMM), or their processes to end. Called again by later functions that fail, by every rank. */
    void (*fail)(void *user, const besa_error *error);
} besa_comm;

/* How to prune. A zero-filled struct with rates.target set prunes with BESA's default preset. */
typedef struct besa_prune_options {
    besa_rate_options rates;                    /* rates.target is the sparsity of every method */
    besa_method method;
    const struct besa_checkpoint *masks;        /* level 1, BESA_METHOD_KEEP: what is 0 in this checkpoint of the same shape, of
                                                   any dtype, pruned by whatever program, is to be 0. Or masks alone, from a
                                                   file: besa_masks_open */
    int pattern_n, pattern_m;                   /* n of every m consecutive weights pruned; 0: unstructured; BESA: not
                                                   with BESA_LEARN_RATES */
    int magnitude_per_row;                      /* magnitude: each row at the target instead of each layer */
    besa_importance importance;                 /* BESA only */
    double damping;                             /* [0.01] of the mean diagonal is added to Hessians: method sparsegpt, the
                                                   importances of BESA_STATISTIC_FACTOR, and refit */
    besa_refit refit;                           /* [none] of every layer that does not stay dense; before kept weights learn.
                                                   Not with bits or BESA_LEARN_BOTH; BESA_REFIT_OBS not with sparsegpt */
    int64_t refit_steps;                        /* [10] BESA_REFIT_CG */
    int64_t epochs, batch_size;                 /* BESA [1, 1]; batch in sequences */
    besa_granularity granularity;               /* [block] others: not with dense_stream or dense_share, layer not with
                                                   learn_vectors. Rates of each part reach the target for themselves */
    int whole_target;                           /* granularity: they reach it together */
    int norm_all;                               /* channel norms of the loss over all tokens, not per batch */
    int dense_stream;                           /* Yref from the dense model's own stream, not from the pruned prefix */
    double dense_share;                         /* [0] of the dense model's own stream in Yref; the rest is the dense block's
                                                   output on the pruned prefix */
    besa_learn learn;                           /* BESA_LEARN_WEIGHTS: kept weights learn once the masks are final;
                                                   BESA_LEARN_BOTH, BESA only: with the rates as well */
    int64_t weight_epochs;                      /* [3] over the sequences with final masks */
    int64_t rank_interval;                      /* [1] BESA_LEARN_BOTH: learning steps from one ranking of the weights, as they
                                                   have become, to the next; BESA_NONE: the dense weights' ranks stay */
    double weight_lr;                           /* [0.2] of Adam's steps, in rms(W) / sqrt(C) of a layer, on grids a sixth: the share
                                                   of its outputs' size that a step changes where all inputs agree on it */
    double weight_warmup;                       /* [0] share of the steps in which it rises; then it goes down a half cosine */
    int learn_vectors;                          /* the block's norms and biases learn wherever its kept weights do */
    int no_projection;                          /* leave the sparsity where learning ended, as the paper's code does */
    int bits;                                   /* [0: none] 2 to 8: weights that are kept lie on grids of 2^bits levels */
    int64_t group_size;                         /* [0: a row] columns that share a grid */
    besa_clipping clipping;                     /* whether grids learn how far they reach; with final masks, weight_epochs */
    double clip_lr;                             /* [0.05] AdamW's learning rate of their logits; falls as a half cosine that the
                                                   steps of all passes bring to 0: clips that begin later end before that */
    int quantize_first;                         /* scores are those of quantised weights, as in the paper; BESA_LEARN_BOTH: weights
                                                   are on their grids from the first step on, not only with final masks */
    int64_t first_block, num_blocks;            /* level 1: prune these [0; all from there on] and leave the others dense: a
                                                   quick look at anything else */
    double depth_slope;                         /* level 1: [0] the blocks' sparsities rise by this from the first of them to the
                                                   last, evenly, around the target (arXiv 2502.14770) */
    const double *block_targets;                /* level 1: (num_block_targets, all pruned blocks) a sparsity for each, and
                                                   their mean is the target; NULL: none */
    int64_t num_block_targets;
    const besa_fixed_rate *fixed;               /* the first match counts; these layers are not part of the target */
    int64_t num_fixed;
    size_t device_memory;                       /* bytes of backend memory [31/32 of what is free; CPU: no limit] */
    const besa_comm *comm;                      /* [NULL] one process. Else every rank needs one sequence, where something
                                                   learns one of every batch: batch_size is `size` or more, and so many are
                                                   in the last batch too. Sums are cut by rank: another number of ranks
                                                   rounds otherwise */
    besa_progress_callback progress;
    besa_step_callback step;
    void *user;                                 /* of all callbacks */
    const char *preset;                         /* level 1: that besa_preset began with, for besa.json; NULL: none */
    besa_card_callback card;                    /* level 1: [none] */
} besa_prune_options;

/* A row of the table of all options that are numbers: what it may be, and how programs offer it. A new option is a field
 * above and a row in section "options". */
typedef enum besa_option_kind { BESA_OPTION_FLAG, BESA_OPTION_ENUM, BESA_OPTION_INT, /* all three are an int */
                                BESA_OPTION_INT64, BESA_OPTION_DOUBLE } besa_option_kind;
enum { BESA_OPTION_ABOVE = 1, BESA_OPTION_BELOW = 2, /* least, most themselves are outside */
       BESA_OPTION_NONE = 4,                    /* BESA_NONE asks for a true 0 */
       BESA_OPTION_ALL = 8,                     /* BESA_ALL_ROWS is a value too */
       BESA_OPTION_REQUIRED = 16,               /* 0 is no default but a value like others */
       BESA_OPTION_BESA = 32,                   /* method besa looks at it, */
       BESA_OPTION_WEIGHTS = 64,                /* or whatever lets weights or clips learn; others do not */
       BESA_OPTION_WHERE = 128,                 /* which part of the model, and how much of it: presets keep it */
       BESA_OPTION_BITS = 256 };                /* a run with bits looks at it, others do not */

typedef struct besa_option {
    const char *name;                           /* of the field, in besa_prune_options or its rates */
    besa_option_kind kind;
    size_t offset;                              /* in besa_prune_options */
    double standard;                            /* what 0 stands for; of lr: with Prodigy */
    double least, most;
    int flags;                                  /* of BESA_OPTION_ABOVE .. */
    const char *range;                          /* least .. most in words: "above 0 and below 1" */
    const char *flag;                           /* on a command line, without "--"; NULL: not offered */
    const char *value;                          /* what follows there: "X"; of an enum its names, "prodigy|adamw" */
    const char *help;                           /* one line, the default in brackets */
} besa_option;

/* The table, ended by a row without a name: for programs that take options from elsewhere. Every one of these options
 * decides the output's bytes, and is part of what a resumed run must agree in. The library checks options by it, fills in
 * what 0 stands for, and writes the report's record of a run. */
BESA_API const besa_option *besa_option_table(void);

typedef struct besa_layer_report {
    int64_t weights, pruned;                    /* pruned counts every zero that is written */
    int64_t source_zeros;
    double rate_min, rate_mean, rate_max, rate_std; /* n / C over the rows */
} besa_layer_report;

typedef struct besa_block_report {
    besa_layer_report layer[BESA_LAYERS];
    double sparsity, target;                    /* reached, and asked for; a block that stays dense has target 0 */
    /* Reconstruction losses (1/d) sum ((Yref - Y) / norm)^2, averaged over sequences: the first 8, and all in loss_all.
     * Where nothing learns all are of the mask, and loss_all is of the first 8. NaN in a block that stays dense, and in blocks
     * taken over from a complete output that was killed before its last rename. */
    double loss_uniform;                        /* the importance's mask with floor(target C) weights of every row */
    double loss_before, loss_after;             /* the masks before learning, and what is written */
    double loss_masks;                          /* the final masks, with the weights as they then are: pass `weights` begins */
    double loss_all;
    double d;                                   /* Prodigy's d at the end */
    double mean_rate;                           /* mean alpha when learning ended, before the projection */
    double seconds[BESA_PASS_COUNT];            /* read, write: of the host's threads, beside the passes; others: the
                                                   device's, between marks */
} besa_block_report;

typedef struct besa_pruner besa_pruner;         /* the memory and state that pruning a block takes */

/* Make what is needed to prune blocks of one shape on `nsamples` sequences of `seqlen` tokens, those of all ranks: one allocation
 * on the device, one on the host. The backend, comm, and options->fixed with its strings, must outlive the pruner.
 * BESA_ERROR_OPTION names the option, BESA_ERROR_MEMORY the bytes wanted. */
BESA_API besa_result besa_pruner_create(besa_pruner **pruner, besa_backend *be, const besa_block_shape *shape,
                                        besa_dtype dtype, int qk_norm, const besa_prune_options *options,
                                        int64_t nsamples, int64_t seqlen, besa_error *error);
BESA_API void besa_pruner_destroy(besa_pruner *pruner); /* NULL is fine */

/* How many of the sequences are this rank's, and the number among all that its sequence `index` has; without a comm all, and
 * index. */
BESA_API int64_t besa_pruner_sequences(const besa_pruner *pruner);
BESA_API int64_t besa_pruner_sequence(const besa_pruner *pruner, int64_t index);

/* Prune one block.
 *   block    the dense weights, device; rope tables for at least seqlen positions, of dynamic and longrope for as many
 *   name     prefix of tensor names for options.fixed, such as "model.layers.3."; NULL: none
 *   x        (besa_pruner_sequences() * seqlen, hidden_size) device, act: in, the block's inputs; out, the pruned block's outputs
 *   dense_x  the same of the dense stream, in and out; NULL unless options.dense_stream or dense_share
 *   pruned   device, room for each layer's weight in the block's dtype: the result, +0 where pruned; not the weights
 *            themselves. For BESA_METHOD_KEEP it comes in as the mask: what is 0 there is to be 0
 *   report   may be NULL
 * The block has the shape, dtype and q/k norms given at create (BESA_ERROR_OPTION). After an error x and dense_x are
 * undefined. Brings its own workspace; waits for the device once, at its end. */
BESA_API besa_result besa_pruner_run(besa_pruner *pruner, const besa_block *block, const char *name, void *x,
                                     void *dense_x, void *const pruned[BESA_LAYERS], besa_block_report *report,
                                     besa_error *error);

/* The block that the last run has left, as its own commit pass read it: the weights are `pruned`; norms and biases that
 * learned are the pruner's, floats rounded to the block's dtype, in its device memory until the next run or its end; all
 * else is the caller's. Of no meaning before the first run and after one that failed. */
BESA_API const besa_block *besa_pruner_block(const besa_pruner *pruner);

/* ============================================================================================
 * // >>api-checkpoint        level 1: a Hugging Face directory in, a pruned one out
 * ============================================================================================ */

#define BESA_MAX_LAYERS 1024

/* config.json as far as the forward pass needs it. */
typedef struct besa_config {
    const char *model_type;                     /* as in config.json; lives as long as the library */
    const char *prefix;                         /* of all tensors' names but the head's: "model.", or "" where the file has
                                                   none; likewise */
    const char *head;                           /* the head's: "lm_head.weight" */
    int64_t vocab_size, num_hidden_layers, max_position_embeddings;
    besa_block_shape block;                     /* sliding_window and no_rope 0 here: see window[], no_rope[] */
    int64_t sliding_window;                     /* of the layers that have one */
    uint8_t window[BESA_MAX_LAYERS];            /* 1: this layer slides */
    uint8_t no_rope[BESA_MAX_LAYERS];           /* 1: this layer does without rope */
    int has_local_rope;                         /* the layers that slide have a rope of their own: */
    besa_rope local_rope;
    int bias[BESA_LAYERS];                      /* 1: the layer has a bias */
    int qk_norm;                                /* q and k are normed before rope */
    int unit_norms;                             /* norms are stored as what they are above 1 */
    double embedding_scale;                     /* of what the embedding gives; 0: 1 */
    double logits_scale, logits_softcap;        /* logits l are softcap tanh(scale l / softcap); 0: 1; none */
    int tie_word_embeddings;                    /* 1: the embedding is the head; 0 too where the file's head differs */
    int is_part;                                /* of a model that reads images too: the language model, and the rest stays */
    int tie_contradicted;                       /* config.json and its text_config have other tie_word_embeddings */
} besa_config;

typedef struct besa_tensor {
    const char *name;                           /* owned by the checkpoint, as is data */
    const char *dtype_name;                     /* as in the file: "F32", "BF16", "I64", ... */
    int supported;                              /* dtype below is valid: F32, F16 or BF16 */
    besa_dtype dtype;
    int ndim;
    int64_t shape[8];
    const void *data;                           /* mapped; any alignment */
    size_t bytes;
    int file;                                   /* which shard, and where in it */
    uint64_t offset;
} besa_tensor;

typedef struct besa_checkpoint besa_checkpoint; /* an open checkpoint: mapped files, tensor table, config */

/* Open a directory with config.json and model.safetensors, or its shards with model.safetensors.index.json. Names may lack
 * their prefix "model."; then there may be no head either, and so no perplexity. A model whose embedding is its head may have
 * either name for it. Every header is checked; weights are mapped, not read, but for a head beside an embedding that the config ties it to: the two
 * are compared, and a head that differs is used, as transformers 5 does. Close with besa_checkpoint_close.
 * Errors: NOT_FOUND, READ, JSON, FORMAT, UNSUPPORTED, TENSOR, MEMORY; the message names file, key or tensor. */
BESA_API besa_result besa_checkpoint_open(besa_checkpoint **checkpoint, const char *directory, besa_error *error);
BESA_API void besa_checkpoint_close(besa_checkpoint *checkpoint); /* NULL is fine */

/* What opening found that its user should know, as lines ("" if there is nothing): a head that is not the embedding, an
 * adapter that is not applied. Plans and reports begin with them. */
BESA_API const char *besa_checkpoint_notes(const besa_checkpoint *checkpoint);
/* What the model is called: "organisation/model" where its config.json says so (_name_or_path), else its directory's name. */
BESA_API const char *besa_checkpoint_name(const besa_checkpoint *checkpoint);
BESA_API const besa_config *besa_checkpoint_config(const besa_checkpoint *checkpoint);
BESA_API int64_t besa_checkpoint_tensor_count(const besa_checkpoint *checkpoint);
BESA_API const besa_tensor *besa_checkpoint_tensor(const besa_checkpoint *checkpoint, int64_t index); /* file order */
BESA_API const besa_tensor *besa_checkpoint_find(const besa_checkpoint *checkpoint, const char *name); /* or NULL */
/* The weights (R, C) of a block's layer, BESA_Q .. BESA_DOWN; NULL where there is no such block or layer. Layers that a file
 * holds as one tensor, such as qkv_proj, are tensors of their own here: rows of it. */
BESA_API const besa_tensor *besa_checkpoint_layer(const besa_checkpoint *checkpoint, int64_t block, int layer);

/* A token file: .npy (uint16, int32, uint32 or int64; 1-D stream or 2-D sequences), raw little-endian .u16 / .i32 / .bin
 * (uint16; refused where it looks like 32-bit ids), or a file of llm.c's, which says its width in its header. */
typedef struct besa_tokens {
    int32_t *ids;                               /* (count), owned */
    int64_t count;
    int64_t rows, columns;                      /* of a 2-D file; 0, 0 for a stream */
    int id_bytes;                               /* of an id in the file; 0: not from a file */
    char file[64];                              /* the end of its path, for messages */
    char sha256[65];                            /* of its bytes, in hexadecimal digits; "": not from a file */
} besa_tokens;

BESA_API besa_result besa_tokens_load(besa_tokens *tokens, const char *path, besa_error *error);
BESA_API void besa_tokens_free(besa_tokens *tokens);

/* Cut (nsamples, seqlen) ids out of tokens, into memory of the caller. A 2-D file gives the first seqlen ids of its
 * first nsamples rows. A stream is cut from its start where seed is 0; else window i starts at
 * splitmix64(seed, i) mod (count - seqlen + 1). BESA_ERROR_TOKENS, BESA_ERROR_TOKEN names position and id, or a file
 * whose ids are too narrow for the vocabulary. */
BESA_API besa_result besa_tokens_sample(const besa_tokens *tokens, int64_t nsamples, int64_t seqlen, uint64_t seed,
                                        int64_t vocab_size, int32_t *ids, besa_error *error);

/* What a model predicts on windows of tokens, for others to be held against: besa_reference_create fills it in. */
typedef struct besa_reference {
    const besa_checkpoint *checkpoint;          /* the model: its head is read again, so it must stay open */
    int64_t windows, seqlen;                    /* with the checkpoint all that a plan needs */
    int32_t *ids;                               /* (windows, seqlen) owned, as are the others */
    void *hidden;                               /* host (windows * seqlen, hidden_size) what the head reads */
    besa_dtype dtype;                           /* of hidden: that of the backend's activations */
    double *nll, perplexity;                    /* nll (windows), as of besa_perplexity */
} besa_reference;

/* One window of a test. All but nll are about the reference, P, where there is one; the model is Q. */
typedef struct besa_window {
    double nll;                                 /* mean negative log-likelihood of ids 2 .. seqlen */
    double reference_nll;                       /* P's */
    double kl;                                  /* mean over these positions of KL(P || Q) = sum p log(p / q), in nats */
    double same;                                /* share of them where both have the same most likely id */
} besa_window;

/* What windows say together. Standard errors are those of means over windows: sqrt(sum (x - mean)^2 / (n - 1) / n), and 0
 * where there is one window. */
typedef struct besa_divergence {
    int64_t windows, positions;
    double perplexity, perplexity_error;        /* exp of the mean nll; times the error of that mean */
    double reference_perplexity, reference_perplexity_error;
    double difference, difference_error;        /* mean of nll - reference_nll of the same window, and its error */
    double kl, kl_error, kl_99, kl_most;        /* of all positions the mean, 99th percentile, largest */
    double same, same_error;
} besa_divergence;

typedef struct besa_report {
    int64_t num_blocks;
    besa_block_report *block;                   /* (num_blocks), owned */
    int64_t weights, pruned;                    /* of all prunable layers */
    double sparsity, target;
    double seconds;
    double perplexity, dense_perplexity;        /* of test_ids, and the calibration's; 0 where not asked for */
    int64_t resumed_blocks;                     /* taken over from an unfinished run */
    char *notes;                                /* lines: warnings, files not copied; owned, NULL if there are none */
    char *record;                               /* what was pruned, on what, by which method: members of besa.json; owned */
    besa_prune_options options;                 /* of the run, to be read: defaults are filled in, BESA_NONE is 0, and fixed
                                                   (num_fixed of them) and callbacks are NULL */
    int64_t test_windows;                       /* those of the test; 0 where not asked for */
    besa_window *window;                        /* (test_windows) owned; nll alone without `against` */
    float *kl;                                  /* (test_windows, test_seqlen - 1) owned, of every position; NULL without it */
    int measured;                               /* 1: by besa_report_measured: there are no options, counts and blocks */
    /* the caller's, for besa_report_json; NULL, 0: not known */
    const char *command;
    int threads;
    const struct besa_plan_result *plan;
} besa_report;

/* The run's memory and cost, worked out from shapes before anything is allocated. */
typedef struct besa_plan_result {
    size_t device_bytes;                        /* the backend arena, to the byte */
    size_t host_bytes;                          /* staging, and activations that live on the host: pinned, to the byte */
    int x_on_host, yref_on_host, test_on_host;  /* 1: the budget sends X, Yref (or the dense stream), the test's
                                                   activations to the host, and they come to the device batch by batch */
    size_t mapped_block_bytes;                  /* checkpoint pages resident at a time, at most: one block's, or a part of
                                                   the embedding or head */
    uint64_t disk_bytes;                        /* of the output's weight files */
    int64_t micro_batch;                        /* sequences per forward pass */
    double flop;                                /* of all products, a dense stream's included, the report's losses not: */
    double pass_flop[BESA_PASS_COUNT], test_flop; /* a dense stream's, and Gram matrices, are part of pass dense; of the test */
    double reduced_bytes;                       /* with a comm, in which all figures are one rank's: what it gives to sums over
                                                   ranks, but for what norms, biases and clips that learn add */
    char notes[2048];                           /* the warnings that the report will begin with, a line each */
    size_t reference_bytes;                     /* the host's memory that besa_reference_create takes, to the byte; 0 without */
} besa_plan_result;

/* What to prune on. ids (nsamples, seqlen) from besa_tokens_sample. */
typedef struct besa_calibration {
    const int32_t *ids;
    int64_t nsamples, seqlen;
    const int32_t *test_ids;                    /* (test_windows, test_seqlen) measured on the way */
    int64_t test_windows, test_seqlen;          /* 0 windows: no perplexity */
    const besa_reference *against;              /* of the test's windows: the report says how far the pruned model is from
                                                   it; NULL: only its perplexity */
    /* What besa.json says of them beside; it decides nothing. NULL, 0: not known */
    const char *file, *sha256;                  /* where ids are from: a file, of whose path the last part counts, and the hash
                                                   of its bytes, as in besa_tokens */
    uint64_t seed;                              /* as in besa_tokens_sample */
    const char *test_file, *test_sha256;        /* likewise, of test_ids */
    double dense_perplexity;                    /* of the dense model on test_ids */
} besa_calibration;

/* Prune the checkpoint into a new directory.
 *   be            NULL: the CPU backend with its defaults
 *   output        must not exist; appears when it is complete. NULL: nothing is written (measure only).
 *                 An interrupted run leaves output.partial and goes on from it when called again with the same
 *                 arguments; any other arguments there are BESA_ERROR_RESUME, and named. Killed at its very end, it
 *                 leaves output.partial.RUN.HASH, hashes of these arguments and of what was written, and ends from there.
 *                 Files are as readable as the source's, as far as the umask allows. besa.json in it says what was done, see
 *                 section report: the same bytes for the same weights, whatever the threads and however often it was
 *                 interrupted. The source's README.md, a card of another model, becomes README.dense.md
 *   report        may be NULL; release with besa_report_free
 * Errors: all of them; the message names the culprit, and nothing that looks valid is left: an output.partial that has
 * finished blocks stays, to be gone on from or deleted, any other is removed, but for files that are not its own.
 * A source file whose contents change while the run reads it is BESA_ERROR_READ. */
BESA_API besa_result besa_prune(const besa_checkpoint *checkpoint, const char *output, besa_backend *be,
                                const besa_calibration *calibration, const besa_prune_options *options,
                                besa_report *report, besa_error *error);

/* What besa_prune would take, for the same arguments; ids need not be set. */
BESA_API besa_result besa_plan(const besa_checkpoint *checkpoint, besa_backend *be, const besa_calibration *calibration,
                               const besa_prune_options *options, besa_plan_result *plan, besa_error *error);

/* Start from a preset, before other options are set: "default"; "best": rates and kept weights learn together, and then
 * the weights; "weights": masks as by default, and then the kept weights learn, for any method; "published-row",
 * "published-layer": the paper's code, zero start and no exact projection, with the d_coef that it has for LLaMA-1-7B
 * (OPTIONS lists the others). Kept are rates.target, fixed rates, masks, which blocks and their sparsities, budget and callbacks.
 * BESA_ERROR_OPTION. */
BESA_API besa_result besa_preset(besa_prune_options *options, const char *name, besa_error *error);

/* The outliers of every block that options prune, for besa_outlier_targets: the dense model runs over the calibration
 * sequences, and of the block's weights that no rate is fixed for
 *     shares = weights whose score |W_ij| l2(X_j) exceeds `threshold` times the mean of these scores / all of them,
 * X_j a column of the layer's inputs over all tokens.
 *   shares      (options.block_targets' number: num_blocks, or all from first_block on) host; -1 of a block whose layers
 *               are all fixed; undefined after an error
 *   threshold   M of OWL (arXiv 2310.05175) [5]
 * Of options count which blocks and layers there are to prune, the budget and the progress callback, and of the calibration
 * its ids. Memory is that of besa_prune with method wanda. BESA_ERROR_OPTION, also where options have a depth_slope,
 * a pattern or method keep, which leave nothing to choose; BESA_ERROR_NOT_FINITE, BESA_ERROR_CANCELLED, and those of
 * memory and files. */
BESA_API besa_result besa_outliers(const besa_checkpoint *checkpoint, besa_backend *be, const besa_calibration *calibration,
                                   const besa_prune_options *options, double threshold, double *shares, besa_error *error);

/* options.block_targets from these shares: blocks with more outliers D_b keep more,
 *     targets_b = target + 2 lambda (mean D - D_b) / (max D - min D),
 * as OWL's published code has it. Their mean is the target, and 2 lambda lies between the least and the largest. The paper's
 * text has them within lambda of the target: so they are where the mean share is half way, and else one end is farther off.
 * A block with share -1 gets the target, as all do where shares are equal.
 *   targets   (count) and shares (count): may be the same memory
 *   lambda    [0.08]
 * BESA_ERROR_OPTION, also where a target would not be above 0 and below 1. */
BESA_API besa_result besa_outlier_targets(double *targets, const double *shares, int64_t count, double target, double lambda,
                                          besa_error *error);

/* Perplexity of (windows, seqlen) ids, block by block: exp of the mean over windows of the mean negative
 * log-likelihood of ids 2 .. seqlen given those before, as WikiText-2 perplexities are reported.
 *   nll   (windows) host, the mean of each window, or NULL */
BESA_API besa_result besa_perplexity(const besa_checkpoint *checkpoint, besa_backend *be, const int32_t *ids,
                                     int64_t windows, int64_t seqlen, double *perplexity, double *nll,
                                     besa_progress_callback progress, void *user, besa_error *error);

/* Run a model over (windows, seqlen) ids as besa_perplexity does, and keep what its head reads, for comparisons. Memory that
 * stays: windows * seqlen * (hidden_size * activation + 4) + 8 * windows bytes of the host. Free it before the checkpoint is
 * closed; after an error there is nothing to free. */
BESA_API besa_result besa_reference_create(besa_reference *reference, const besa_checkpoint *checkpoint, besa_backend *be,
                                           const int32_t *ids, int64_t windows, int64_t seqlen, besa_progress_callback progress,
                                           void *user, besa_error *error);
BESA_API void besa_reference_free(besa_reference *reference); /* NULL and zeros are fine */

/* How far a model's predictions are from a reference's on its windows, block by block and then both heads by chunks of the
 * vocabulary. The models may differ in all but their vocabulary; with the same backend, or one with the same activations.
 *   window   (windows) host
 *   kl       (windows, seqlen - 1) host, KL(P || Q) of every position; or NULL
 * BESA_ERROR_OPTION where the vocabularies differ, or the activations; and those of besa_perplexity. */
BESA_API besa_result besa_compare_models(const besa_checkpoint *checkpoint, besa_backend *be, const besa_reference *reference,
                                         besa_window *window, float *kl, besa_progress_callback progress, void *user,
                                         besa_error *error);

/* These windows in figures, with kl (positions) of all of them, which is put in order. kl NULL: they have no reference, and
 * only windows and perplexity are set. */
BESA_API void besa_summarize(besa_divergence *divergence, const besa_window *window, int64_t windows, float *kl,
                             int64_t positions);

/* The logits of every position (count * seqlen, vocab_size), host floats of the caller: for tests and small models. */
BESA_API besa_result besa_logits(const besa_checkpoint *checkpoint, besa_backend *be, const int32_t *ids,
                                 int64_t count, int64_t seqlen, float *logits, besa_error *error);

/* What is 0 in a checkpoint, pruned by whatever program, as a safetensors file: of every layer NAME.weight (R, C)
 *     NAME.alpha F32 (R)  and  NAME.n I32 (R)     with BESA_FILE_RATES: weights of the row that are 0, n, and their share n / C
 *     NAME.mask U8 (R, ceil(C / 8))               with BESA_FILE_MASKS: bit j % 8, from the lowest, of byte j / 8 is 1 where
 *                                                 weight j is not 0
 * The file appears when it is complete, in place of one that is there. BESA_ERROR_MEMORY, BESA_ERROR_WRITE. */
enum { BESA_FILE_RATES = 1, BESA_FILE_MASKS = 2 };
BESA_API besa_result besa_masks_save(const besa_checkpoint *checkpoint, const char *file, int what, besa_error *error);

/* Masks of such a file, for options.masks of a run that prunes `model`, by whose names they are found; other tensors in it are
 * not looked at. Close with besa_checkpoint_close; of no use for anything else. BESA_ERROR_NOT_FOUND, _READ, _FORMAT, _JSON,
 * _TENSOR, _MEMORY. */
BESA_API besa_result besa_masks_open(besa_checkpoint **masks, const char *file, const besa_checkpoint *model, besa_error *error);

/* The report as a JSON text, owned by the caller (BESA_FREE), or NULL without memory. It begins with all that is in besa.json. */
BESA_API char *besa_report_json(const besa_report *report);

/* A report of besa_perplexity's results, in the same form: of the calibration its test_ids count and what is said of them, and
 * nll is its (test_windows). Release with besa_report_free. BESA_ERROR_MEMORY. */
BESA_API besa_result besa_report_measured(besa_report *report, const besa_checkpoint *checkpoint, const besa_backend *be,
                                          const besa_calibration *calibration, double perplexity, const double *nll,
                                          besa_error *error);
BESA_API void besa_report_free(besa_report *report);

#ifdef __cplusplus
}
#endif
#endif /* BESA_H */

#ifdef BESA_IMPLEMENTATION
#ifndef BESA_IMPLEMENTATION_DONE
#define BESA_IMPLEMENTATION_DONE

#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(_WIN32) && !defined(BESA_SECONDS)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

/* The results rest on float arithmetic as it is written. What these checks cannot see, besa_cpu_backend tries out. */
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ != 0)
#error "besa.h: fast math gives wrong results: compile without -ffast-math, -Ofast, -ffinite-math-only (or /fp:fast)"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 /* 16: only half floats are wider or narrower */
#error "besa.h: float must be computed in float (FLT_EVAL_METHOD 0); for 32-bit x86 compile with -msse2 -mfpmath=sse"
#endif

#if defined(BESA_MALLOC) != defined(BESA_FREE) || defined(BESA_MALLOC) != defined(BESA_REALLOC)
#error "besa.h: define all of BESA_MALLOC, BESA_REALLOC and BESA_FREE, or none"
#endif
#ifndef BESA_MALLOC
#define BESA_MALLOC(bytes) malloc(bytes)
#define BESA_REALLOC(pointer, bytes) realloc(pointer, bytes)
#define BESA_FREE(pointer) free(pointer)
#endif
#ifndef BESA_ASSERT
#include <assert.h>
#define BESA_ASSERT(condition) assert(condition)
#endif

/* ============================================================================================
 * // >>base                  results, errors, numbers as text, hashes
 * ============================================================================================
 * Everything below uses these; they use only libc. */

#define BESA__TRY(call)                                                                            \
    do {                                                                                           \
        besa_result besa__try = (call);                                                            \
        if (besa__try != BESA_OK) return besa__try;                                                \
    } while (0)

/* Parallel loops: the iteration space is cut by size, so results never depend on the number of threads. */
#define BESA__PRAGMA(text) _Pragma(#text)
#if defined(_OPENMP)
#define BESA__PARALLEL_FOR(threads) BESA__PRAGMA(omp parallel for schedule(dynamic, 1) num_threads(threads))
#define BESA__THREAD_INDEX() omp_get_thread_num()
#else
#define BESA__PARALLEL_FOR(threads) (void)(threads);
#define BESA__THREAD_INDEX() 0
#endif

#if defined(__MINGW32__) && !defined(__clang__) /* there "printf" would mean Microsoft's, which knows no %zu */
#define BESA__PRINTF(text, first) __attribute__((__format__(__gnu_printf__, text, first)))
#define BESA__UNUSED __attribute__((unused))
#elif defined(__GNUC__)
#define BESA__PRINTF(text, first) __attribute__((__format__(__printf__, text, first)))
#define BESA__UNUSED __attribute__((unused))
#else
#define BESA__PRINTF(text, first)
#define BESA__UNUSED
#endif

#define BESA__TEXT(value, text) text,           /* of a list's row, as BESA__ENUM takes its value */

BESA_API const char *besa_result_string(besa_result code)
{
    static const char *const text[] = {BESA_RESULTS(BESA__TEXT)};
    return (unsigned)code < BESA_RESULT_COUNT ? text[code] : "unknown result";
}

/* Neither NaN nor infinite, told by the exponent's bits: compilers may take comparisons for granted. */
static inline int besa__is_finite(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return (u >> 52 & 0x7FF) != 0x7FF;
}

static inline int besa__is_nan(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return (u & 0x7FFFFFFFFFFFFFFFu) > 0x7FF0000000000000u;
}

/* ---- text ---------------------------------------------------------------------------------- */

/* Text that is written into a buffer; length goes on counting where the buffer is full. */
typedef struct besa__print {
    char *text;
    size_t size, length;
} besa__print;

static void besa__put(besa__print *out, const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++, out->length++)
        if (out->length + 1 < out->size) out->text[out->length] = s[i];
}

/* In base 10 or 16, with zeros in front up to `width` digits. */
static void besa__put_integer(besa__print *out, unsigned long long value, unsigned base, int width)
{
    char digits[32];
    int n = 0;
    do {
        digits[31 - n++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (n < 31 && (value || n < width));
    besa__put(out, digits + 32 - n, (size_t)n);
}

/* As %.*g, or %.*f, with a point in every locale: whatever is neither digit, sign nor exponent is the locale's. */
static void besa__put_number(besa__print *out, double value, int precision, char conversion)
{
    char number[400];
    int length = snprintf(number, sizeof number, conversion == 'f' ? "%.*f" : "%.*g", precision < 0 ? 6 : precision, value);
    int finite = besa__is_finite(value), point = 0;
    for (int i = 0; i < length && i < (int)sizeof number - 1; i++) {
        int plain = !finite || strchr("0123456789+-e", number[i]) != NULL;
        if (plain || !point) besa__put(out, plain ? &number[i] : ".", 1);
        point |= !plain;
    }
}

static int besa__format_number(const char **format)
{
    int n = 0;
    for (; **format >= '0' && **format <= '9'; (*format)++) n = n * 10 + (**format - '0');
    return n;
}

/* One conversion; size 0 int, 1 long, 2 long long, 3 size_t */
static void besa__format_value(besa__print *out, char conversion, int width, int precision, int size, va_list *args)
{
    if (conversion == 's') {
        const char *s = va_arg(*args, const char *);
        size_t n = 0;
        while ((precision < 0 || n < (size_t)precision) && s[n]) n++;
        besa__put(out, s, n);
    } else if (conversion == 'd') {
        long long value = size == 0 ? va_arg(*args, int) : size == 1 ? va_arg(*args, long) : va_arg(*args, long long);
        if (value < 0) besa__put(out, "-", 1);
        besa__put_integer(out, value < 0 ? 0 - (unsigned long long)value : (unsigned long long)value, 10, width);
    } else if (conversion == 'u' || conversion == 'x') {
        unsigned long long value = size == 3 ? va_arg(*args, size_t) : size == 2 ? va_arg(*args, unsigned long long)
                                 : size == 1 ? va_arg(*args, unsigned long) : va_arg(*args, unsigned);
        besa__put_integer(out, value, conversion == 'x' ? 16 : 10, width);
    } else if (conversion == 'g' || conversion == 'f') besa__put_number(out, va_arg(*args, double), precision, conversion);
    else {
        char c = conversion == 'c' ? (char)va_arg(*args, int) : conversion;
        BESA_ASSERT(conversion == 'c' || conversion == '%');
        besa__put(out, &c, 1);
    }
}

/* printf, the same in any locale and C library. Of conversions there are those that this file uses: %s %.*s %c %d %u
 * %x %f %g and %%, with h, l, ll or z, a precision, and for integers zeros in front (%016llx). */
static size_t besa__format(char *text, size_t size, const char *format, va_list *args)
{
    besa__print out = {text, size, 0};
    while (*format) {
        int width, precision = -1, size_of = 0;
        if (*format != '%') {
            besa__put(&out, format++, 1);
            continue;
        }
        BESA_ASSERT(format[1] < '1' || format[1] > '9'); /* no blanks in front */
        format++;
        width = besa__format_number(&format);
        if (*format == '.') {
            precision = *++format == '*' ? va_arg(*args, int) : besa__format_number(&format);
            format += *format == '*';
        }
        for (; *format == 'l' || *format == 'z' || *format == 'h'; format++) size_of += *format == 'l' ? 1 : *format == 'z' ? 3 : 0;
        if (*format) besa__format_value(&out, *format++, width, precision, size_of, args);
    }
    if (size) text[out.length < size ? out.length : size - 1] = 0;
    return out.length;
}

static void besa__write_text(char *text, size_t size, const char *format, ...) BESA__PRINTF(3, 4);
static void besa__write_text(char *text, size_t size, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    besa__format(text, size, format, &args);
    va_end(args);
}

/* Names in files may hold anything: control characters, C1 in UTF-8 too, become question marks where they would reach a
 * terminal. */
static void besa__make_printable(char *text)
{
    for (unsigned char *s = (unsigned char *)text; *s; s++) {
        if (*s < 0x20 || *s == 0x7F) *s = '?';
        if (s[0] == 0xC2 && s[1] >= 0x80 && s[1] < 0xA0) s[0] = s[1] = '?';
    }
}

/* Fill in *error (may be NULL) and return the code. */
static besa_result besa__fail(besa_error *error, besa_result code, const char *format, ...) BESA__PRINTF(3, 4);
static besa_result besa__fail(besa_error *error, besa_result code, const char *format, ...)
{
    if (error) {
        va_list args;
        va_start(args, format);
        error->code = code;
        besa__format(error->message, sizeof error->message, format, &args);
        va_end(args);
        besa__make_printable(error->message);
    }
    return code;
}

/* Append a line to a text that grows by BESA_REALLOC; without memory the line is lost. */
BESA__UNUSED static void besa__notes_add(char **notes, const char *format, ...) BESA__PRINTF(2, 3);
static void besa__notes_add(char **notes, const char *format, ...)
{
    char line[512];
    va_list args;
    va_start(args, format);
    besa__format(line, sizeof line, format, &args);
    va_end(args);
    besa__make_printable(line);
    size_t n = *notes ? strlen(*notes) : 0, m = strlen(line);
    char *text = (char *)BESA_REALLOC(*notes, n + m + 2);
    if (!text) return;
    memcpy(text + n, line, m);
    memcpy(text + n + m, "\n", 2);
    *notes = text;
}

/* 64-bit FNV-1a over words of 8 bytes, then single bytes, with a shift so that high bits reach low ones. Data may be
 * hashed in pieces if all but the last are multiples of 8. */
#define BESA__HASH_START 0xCBF29CE484222325u
BESA__UNUSED static uint64_t besa__hash(uint64_t h, const void *data, size_t bytes)
{
    const unsigned char *s = (const unsigned char *)data;
    for (; bytes >= 8; bytes -= 8, s += 8) {
        uint64_t word;
        memcpy(&word, s, 8);
        h = (h ^ word) * 0x100000001B3u;
        h ^= h >> 29;
    }
    for (; bytes; bytes--, s++) h = (h ^ *s) * 0x100000001B3u;
    return h;
}

/* ---- SHA-256 (FIPS 180-4) -------------------------------------------------------------------- */

static const uint32_t besa__sha256_round[64] = { /* fractions of the cube roots of the first primes */
    0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5,
    0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174,
    0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA, 0x5CB0A9DC, 0x76F988DA,
    0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967,
    0x27B70A85, 0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85,
    0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070,
    0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
    0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2
};

static uint32_t besa__rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* Take in 64 bytes. */
static void besa__sha256_block(uint32_t h[8], const unsigned char *bytes)
{
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)bytes[4 * i] << 24 | (uint32_t)bytes[4 * i + 1] << 16 | (uint32_t)bytes[4 * i + 2] << 8 | bytes[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (besa__rotate(a, 7) ^ besa__rotate(a, 18) ^ (a >> 3)) + w[i - 7] +
               (besa__rotate(b, 17) ^ besa__rotate(b, 19) ^ (b >> 10));
    }
    memcpy(s, h, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t a = s[0], e = s[4], first, second;
        first = s[7] + (besa__rotate(e, 6) ^ besa__rotate(e, 11) ^ besa__rotate(e, 25)) + ((e & s[5]) ^ (~e & s[6])) +
                besa__sha256_round[i] + w[i];
        second = (besa__rotate(a, 2) ^ besa__rotate(a, 13) ^ besa__rotate(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += first;
        s[0] = first + second;
    }
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

/* The hash of some bytes as hexadecimal digits. */
BESA__UNUSED static void besa__sha256(char digits[65], const void *data, size_t bytes)
{
    uint32_t h[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                     0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19}; /* square roots */
    const unsigned char *at = (const unsigned char *)data;
    unsigned char last[128];
    size_t whole = bytes / 64 * 64, rest = bytes - whole, end = rest < 56 ? 64 : 128;
    for (size_t i = 0; i < whole; i += 64) besa__sha256_block(h, at + i);
    memset(last, 0, sizeof last);
    if (rest) memcpy(last, at + whole, rest);
    last[rest] = 0x80;
    for (int i = 0; i < 8; i++) last[end - 1 - (size_t)i] = (unsigned char)((uint64_t)bytes * 8 >> (8 * i) & 255);
    for (size_t i = 0; i < end; i += 64) besa__sha256_block(h, last + i);
    for (int i = 0; i < 8; i++) besa__write_text(digits + 8 * i, 9, "%08x", (unsigned)h[i]);
}

/* ============================================================================================
 * // >>memory                sizes, arenas, element types, the backend's workspace
 * ============================================================================================
 * Owns how memory is counted and handed out, and how elements are converted. Uses base. */

/* Sizes are counted in 64 bits, whatever size_t is, and stay at UINT64_MAX where even that is too little: no memory is
 * ever asked for by a size that has wrapped round. */
static inline uint64_t besa__add_sizes(uint64_t a, uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }
static inline uint64_t besa__multiply_sizes(uint64_t a, uint64_t b) { return b && a > UINT64_MAX / b ? UINT64_MAX : a * b; }

/* The same for counts, which are not negative: INT64_MAX stands for more. */
static inline int64_t besa__product(int64_t a, int64_t b) { return b > 0 && a > INT64_MAX / b ? INT64_MAX : a * b; }

static inline int64_t besa__sum(int64_t a, int64_t b) { return a > INT64_MAX - b ? INT64_MAX : a + b; }

/* Bytes of so many elements. */
static inline uint64_t besa__bytes(int64_t count, size_t element) { return besa__multiply_sizes((uint64_t)count, element); }

/* A size as public functions return it: SIZE_MAX stands for more than can be addressed. */
static inline size_t besa__size(uint64_t bytes) { return bytes < SIZE_MAX ? (size_t)bytes : SIZE_MAX; }

/* Whether so many bytes can be addressed at all. */
static besa_result besa__check_size(uint64_t bytes, const char *what, besa_error *error)
{
    if (bytes < SIZE_MAX) return BESA_OK;
    return besa__fail(error, BESA_ERROR_MEMORY, "%llu bytes needed for %s, this process can address %llu: %s",
                      (unsigned long long)bytes, what, (unsigned long long)SIZE_MAX,
                      sizeof(void *) < 8 ? "build for a 64-bit machine" : "make the sizes smaller");
}

/* BESA_MALLOC with an error that says what the memory was for. */
static besa_result besa__malloc(void **memory, uint64_t bytes, const char *what, besa_error *error)
{
    *memory = NULL;
    BESA__TRY(besa__check_size(bytes, what, error));
    if (bytes <= PTRDIFF_MAX) *memory = BESA_MALLOC(bytes ? (size_t)bytes : 1); /* no object is larger */
    if (*memory) return BESA_OK;
    return besa__fail(error, BESA_ERROR_MEMORY, "out of host memory: %llu bytes for %s", (unsigned long long)bytes, what);
}

/* A block of memory handed out from its start. With base NULL it only counts: sizes are worked out by the very code
 * that later places the arrays, so that a plan is right to the byte. */
typedef struct besa__arena {
    unsigned char *base;
    uint64_t used;
} besa__arena;

#define BESA__ALIGN 256

static void *besa__take(besa__arena *arena, uint64_t bytes)
{
    void *p = arena->base ? arena->base + arena->used : NULL;
    uint64_t padding = (BESA__ALIGN - bytes % BESA__ALIGN) % BESA__ALIGN;
    arena->used = besa__add_sizes(arena->used, besa__add_sizes(bytes, padding));
    return p;
}

static void *besa__take_array(besa__arena *arena, int64_t count, size_t element)
{
    return besa__take(arena, besa__bytes(count, element));
}

static float *besa__take_floats(besa__arena *arena, int64_t count)
{
    return (float *)besa__take_array(arena, count, sizeof(float));
}

/* Take `parts` times what `one` has used. */
static void besa__take_parts(besa__arena *arena, const besa__arena *one, int64_t parts)
{
    arena->used = besa__add_sizes(arena->used, besa__multiply_sizes(one->used, (uint64_t)parts));
}

/* Wait for all that is under way, whatever comes of it: memory is about to go. */
static void besa__settle(besa_backend *be)
{
    for (int q = 0; q < BESA_QUEUE_COUNT; q++) be->synchronize(be, (besa_queue)q);
}

/* A clock that nobody sets back; only differences mean anything. Where a strict -std hides such a clock, the time of day. */
static double besa__seconds(void)
{
#if defined(BESA_SECONDS)
    return BESA_SECONDS();
#elif defined(_WIN32)
    LARGE_INTEGER now, frequency;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&frequency);
    return (double)now.QuadPart / (double)frequency.QuadPart;
#elif defined(CLOCK_MONOTONIC)
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#elif defined(TIME_UTC)
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#else
    return (double)time(NULL);
#endif
}

BESA_API size_t besa_dtype_size(besa_dtype dtype) { return dtype == BESA_F32 ? 4 : 2; }

/* Bytes of a rank in a row of so many columns. */
static size_t besa__rank_bytes(int64_t columns) { return columns > 65536 ? 4 : 2; }

/* A pointer moved by a number of elements. */
static void *besa__at(void *base, besa_dtype dtype, int64_t elements)
{
    return (unsigned char *)base + (size_t)elements * besa_dtype_size(dtype);
}

static const void *besa__at_const(const void *base, besa_dtype dtype, int64_t elements)
{
    return (const unsigned char *)base + (size_t)elements * besa_dtype_size(dtype);
}

static inline uint32_t besa__float_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float besa__bits_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline int besa__is_little_endian(void)
{
    uint16_t number = 1;
    unsigned char first;
    memcpy(&first, &number, 1);
    return first == 1;
}

static inline float besa__bf16_to_f32(uint16_t h) { return besa__bits_float((uint32_t)h << 16); }

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t besa__f32_to_bf16(float x)
{
    uint32_t u = besa__float_bits(x);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    uint32_t quiet_nan = (u >> 16) | 0x40u;
    return (uint16_t)((u & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

/* Exact: half's exponent is moved by a multiplication, which also renormalises subnormals. */
static inline float besa__f16_to_f32(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7FFFu) << 13, sign = (uint32_t)(h & 0x8000u) << 16;
    float scaled = besa__bits_float(magnitude) * 5.192296858534828e33f; /* 2^112 */
    uint32_t special = 0x7F800000u | magnitude;                          /* infinity and NaN */
    return besa__bits_float(((h & 0x7C00u) == 0x7C00u ? special : besa__float_bits(scaled)) | sign);
}

/* Round to nearest even, overflow to infinity, subnormals kept; NaN stays NaN. */
static inline uint16_t besa__f32_to_f16(float x)
{
    uint32_t u = besa__float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu, h;
    if (magnitude > 0x7F800000u) h = 0x7E00u;
    else if (magnitude >= 0x477FF000u) h = 0x7C00u;
    else if (magnitude < 0x38800000u) { /* subnormal half: adding 1/2 aligns and rounds the bits that stay */
        h = besa__float_bits(besa__bits_float(magnitude) + 0.5f) - 0x3F000000u;
    } else h = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    return (uint16_t)(sign | h);
}

static inline int64_t besa__min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t besa__max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t besa__parts(int64_t n, int64_t size) { return n / size + (n % size > 0); } /* of at most size each */

/* The error of a failed backend operation, handed on. */
static besa_result besa__pass_error(const besa_backend *be, besa_result result, besa_error *error)
{
    if (result == BESA_OK || !error) return result;
    if (be->error.code == result) *error = be->error;
    else besa__fail(error, result, "%s", besa_result_string(result)); /* from a callback of the caller */
    return result;
}

/* Return from a function with the error of a backend operation that failed. */
#define BESA__TRY_ON(be, call, error) BESA__TRY(besa__pass_error(be, call, error))

/* A table that somebody filled in: nothing may be missing. */
static besa_result besa__check_backend(const besa_backend *be, besa_error *error)
{
    const char *name = be->name ? be->name : "without a name";
#define BESA__CHECK(operation)                                                                     \
    if (!be->operation)                                                                            \
        return besa__fail(error, BESA_ERROR_OPTION, "backend %s has no operation %s", name, #operation);
    BESA_OPERATIONS(BESA__CHECK)
#undef BESA__CHECK
    return BESA_OK;
}

/* Operations take scratch memory from be->workspace. Public functions put their own there while they run, and what was
 * there before back when they return. */
typedef struct besa__workspace {
    void *memory;
    size_t bytes;
} besa__workspace;

static besa__workspace besa__use_workspace(besa_backend *be, void *memory, size_t bytes)
{
    besa__workspace before = {be->workspace, be->workspace_bytes};
    be->workspace = memory;
    be->workspace_bytes = bytes;
    return before;
}

/* ============================================================================================
 * // >>layers                the layers of a block, and the ranges of its sizes
 * ============================================================================================
 * Owns what there is to know of a block's seven layers and of its sizes, a row each. */

/* The prunable layers of a block, in the order of BESA_Q .. BESA_DOWN: where a Hugging Face checkpoint has them, which of
 * the block's widths their rows and columns are, what they read, and which belong together. */
enum { BESA__WIDTH_HIDDEN, BESA__WIDTH_QUERY, BESA__WIDTH_KEY_VALUE, BESA__WIDTH_INTERMEDIATE, BESA__WIDTH_HEAD };
enum { BESA__INPUT_A, BESA__INPUT_ATTN, BESA__INPUT_M, BESA__INPUT_Z, BESA__INPUTS }; /* names as in besa_activations */
enum { BESA__GROUP_QKV, BESA__GROUP_O, BESA__GROUP_MLP, BESA__GROUPS };

typedef struct besa__layer_row {
    const char *path;
    int rows, columns, input, group;
} besa__layer_row;

static const besa__layer_row besa__layers[BESA_LAYERS] = {
    {"self_attn.q_proj", BESA__WIDTH_QUERY, BESA__WIDTH_HIDDEN, BESA__INPUT_A, BESA__GROUP_QKV},
    {"self_attn.k_proj", BESA__WIDTH_KEY_VALUE, BESA__WIDTH_HIDDEN, BESA__INPUT_A, BESA__GROUP_QKV},
    {"self_attn.v_proj", BESA__WIDTH_KEY_VALUE, BESA__WIDTH_HIDDEN, BESA__INPUT_A, BESA__GROUP_QKV},
    {"self_attn.o_proj", BESA__WIDTH_HIDDEN, BESA__WIDTH_QUERY, BESA__INPUT_ATTN, BESA__GROUP_O},
    {"mlp.gate_proj", BESA__WIDTH_INTERMEDIATE, BESA__WIDTH_HIDDEN, BESA__INPUT_M, BESA__GROUP_MLP},
    {"mlp.up_proj", BESA__WIDTH_INTERMEDIATE, BESA__WIDTH_HIDDEN, BESA__INPUT_M, BESA__GROUP_MLP},
    {"mlp.down_proj", BESA__WIDTH_HIDDEN, BESA__WIDTH_INTERMEDIATE, BESA__INPUT_Z, BESA__GROUP_MLP},
};

/* The norms of a block, in the order of BESA_NORM1 .. BESA_NORM2_OUT: their names for each of besa_norms, NULL where a block
 * has no such norm; the width, and that with qk_norm_whole. */
static const struct { const char *path[3]; int width, whole; } besa__norm_rows[BESA_VECTORS - BESA_LAYERS] = {
    {{"input_layernorm", NULL, "input_layernorm"}, BESA__WIDTH_HIDDEN, BESA__WIDTH_HIDDEN},
    {{"post_attention_layernorm", NULL, "pre_feedforward_layernorm"}, BESA__WIDTH_HIDDEN, BESA__WIDTH_HIDDEN},
    {{"self_attn.q_norm", "self_attn.q_norm", "self_attn.q_norm"}, BESA__WIDTH_HEAD, BESA__WIDTH_QUERY},
    {{"self_attn.k_norm", "self_attn.k_norm", "self_attn.k_norm"}, BESA__WIDTH_HEAD, BESA__WIDTH_KEY_VALUE},
    {{NULL, "post_attention_layernorm", "post_attention_layernorm"}, BESA__WIDTH_HIDDEN, BESA__WIDTH_HIDDEN},
    {{NULL, "post_feedforward_layernorm", "post_feedforward_layernorm"}, BESA__WIDTH_HIDDEN, BESA__WIDTH_HIDDEN}};

BESA_API const char *besa_layer_name(int layer)
{
    if (layer < 0 || layer >= BESA_LAYERS) return "?";
    return strchr(besa__layers[layer].path, '.') + 1;
}

/* A width of the block: of rows, columns and inputs. */
static int64_t besa__width(const besa_block_shape *s, int width)
{
    switch (width) {
    case BESA__WIDTH_QUERY: return besa__product(s->num_attention_heads, s->head_dim);
    case BESA__WIDTH_KEY_VALUE: return besa__product(s->num_key_value_heads, s->head_dim);
    case BESA__WIDTH_INTERMEDIATE: return s->intermediate_size;
    case BESA__WIDTH_HEAD: return s->head_dim;
    default: return s->hidden_size;
    }
}

BESA_API void besa_block_layer(const besa_block_shape *shape, int layer, int64_t *rows, int64_t *columns)
{
    *rows = besa__width(shape, besa__layers[layer].rows);
    *columns = besa__width(shape, besa__layers[layer].columns);
}

/* The name of a norm; NULL where blocks of the shape have none. */
static const char *besa__norm_path(const besa_block_shape *shape, int vector)
{
    return besa__norm_rows[vector - BESA_LAYERS].path[shape->norms];
}

/* Elements of a norm or bias. */
static int64_t besa__vector_count(const besa_block_shape *shape, int vector)
{
    int norm = vector - BESA_LAYERS;
    if (norm < 0) return besa__width(shape, besa__layers[vector].rows);
    if (!besa__norm_path(shape, vector)) return 0;
    return besa__width(shape, shape->qk_norm_whole ? besa__norm_rows[norm].whole : besa__norm_rows[norm].width);
}

/* Where a block has it. */
static const float **besa__block_vector(besa_block *block, int vector)
{
    switch (vector) {
    case BESA_NORM1: return &block->norm1;
    case BESA_NORM2: return &block->norm2;
    case BESA_Q_NORM: return &block->q_norm;
    case BESA_K_NORM: return &block->k_norm;
    case BESA_NORM1_OUT: return &block->norm1_out;
    case BESA_NORM2_OUT: return &block->norm2_out;
    default: return &block->bias[vector];
    }
}

/* The first layer that reads an input. */
static const besa__layer_row *besa__reader(int input)
{
    int layer = 0;
    while (besa__layers[layer].input != input) layer++;
    return &besa__layers[layer];
}

/* Columns of the layers that read an input. */
static int64_t besa__input_columns(const besa_block_shape *shape, int input)
{
    return besa__width(shape, besa__reader(input)->columns);
}

/* The numbers that describe a model, by their keys in config.json, with the range that each may have; a block's shape has
 * fields of the same names. */
typedef struct besa__range {
    char key[40];
    double least, most;
    int is_integer;
} besa__range;

static const besa__range besa__ranges[] = {
    { "vocab_size", 1, 16777216, 1 },
    { "hidden_size", 1, 16777216, 1 },
    { "intermediate_size", 1, 16777216, 1 },
    { "num_hidden_layers", 1, BESA_MAX_LAYERS, 1 },
    { "num_attention_heads", 1, 65536, 1 },
    { "num_key_value_heads", 1, 65536, 1 },
    { "head_dim", 2, 65536, 1 },
    { "max_position_embeddings", 1, 1099511627776.0, 1 },
    { "sliding_window", 1, 1099511627776.0, 1 },
    { "max_window_layers", 0, 1099511627776.0, 1 },
    { "rms_norm_eps", 1e-30, 1, 0 },            /* not 0 as a float */
    { "rope_theta", 1e-6, 1e15, 0 },
    { "factor", 1e-6, 1e15, 0 },                /* this and the next: of rope_scaling or rope_parameters */
    { "low_freq_factor", 1e-6, 1e15, 0 },
    { "high_freq_factor", 1e-6, 1e15, 0 },
    { "original_max_position_embeddings", 1e-6, 1e15, 0 },
    { "attention_factor", 1e-6, 1e15, 0 },      /* of longrope; and this and the next: of yarn */
    { "beta_fast", 1e-6, 1e15, 0 },
    { "beta_slow", 1e-6, 1e15, 0 },
    { "mscale", 1e-6, 1e15, 0 },
    { "mscale_all_dim", 1e-6, 1e15, 0 },
    { "partial_rotary_factor", 1, 1, 0 },
    { "no_rope_layer_interval", 1, 1099511627776.0, 1 },
    { "embedding_multiplier", 1e-6, 1e15, 0 },
    { "attention_multiplier", 1e-6, 1e15, 0 },
    { "residual_multiplier", 1e-6, 1e15, 0 },
    { "logits_scaling", 1e-6, 1e15, 0 },
    { "query_pre_attn_scalar", 1e-6, 1e15, 0 },
    { "attn_logit_softcapping", 1e-6, 1e15, 0 },
    { "final_logit_softcapping", 1e-6, 1e15, 0 },
    { "sliding_window_pattern", 1, 1099511627776.0, 1 },
    { "rope_local_base_freq", 1e-6, 1e15, 0 },
};

/* The range of one of the keys above. */
static const besa__range *besa__find_range(const char *key)
{
    const besa__range *range = besa__ranges;
    while (strcmp(range->key, key)) range++;
    return range;
}

static int besa__in_range(const besa__range *range, double value)
{
    return value >= range->least && value <= range->most;
}

/* A range in words; returns buffer. */
static const char *besa__range_text(const besa__range *range, char *buffer, size_t size)
{
    if (range->is_integer) snprintf(buffer, size, "an integer from %.0f to %.0f", range->least, range->most);
    else if (range->least < range->most) besa__write_text(buffer, size, "a number from %g to %g", range->least, range->most);
    else besa__write_text(buffer, size, "%g", range->least);
    return buffer;
}

/* ============================================================================================
 * // >>options               what every option may be, and what 0 stands for
 * ============================================================================================
 * One table of all options that are numbers. Options that contradict each other are for the sections that use them. */

#define BESA__RATE(kind, field) #field, BESA_OPTION_##kind, \
                                offsetof(besa_prune_options, rates) + offsetof(besa_rate_options, field)
#define BESA__PRUNE(kind, field) #field, BESA_OPTION_##kind, offsetof(besa_prune_options, field)
#define BESA__BESA BESA_OPTION_BESA
#define BESA__WEIGHTS BESA_OPTION_WEIGHTS
#define BESA__OPEN (BESA_OPTION_ABOVE | BESA_OPTION_BELOW)
#define BESA__FROM_0 (BESA_OPTION_BELOW | BESA_OPTION_NONE)
#define BESA__NO_LIMIT 1e300
#define BESA__BAR(value, name) "|" name
#define BESA__BAR_OF_SEVEN(value, name, statistic, power, exponent, gradient, relative) "|" name

static const char besa__method_names[] = BESA_METHODS(BESA__BAR); /* these begin with a bar */
static const char besa__learn_names[] = BESA_LEARNING(BESA__BAR);
static const char besa__granularity_names[] = BESA_GRANULARITIES(BESA__BAR);
static const char besa__refit_names[] = BESA_REFITS(BESA__BAR);
static const char besa__clipping_names[] = BESA_CLIPPINGS(BESA__BAR);
static const char besa__importance_names[] = BESA_IMPORTANCES(BESA__BAR_OF_SEVEN);

/* field, default, least, most, flags, range in words, on the command line, what follows there, help */
static const besa_option besa__options[] = {
    {BESA__PRUNE(ENUM, method), 0, 0, BESA_METHOD_COUNT - 1, 0, "a value of besa_method",
     "method", &besa__method_names[1], "how to choose what goes [besa]"},
    {BESA__RATE(DOUBLE, target), 0, 0, 1, BESA__OPEN | BESA_OPTION_REQUIRED | BESA_OPTION_WHERE, "above 0 and below 1",
     "sparsity", "S", "share of the weights that become zero [0.5]"},
    {BESA__PRUNE(FLAG, magnitude_per_row), 0, 0, 1, 0, "0 or 1",
     "per-row", "", "magnitude: each row has the sparsity, not only the layer"},
    {BESA__PRUNE(DOUBLE, damping), 0.01, 0, 1e30, BESA__OPEN, "above 0 and below 1e30",
     "damping", "X", "sparsegpt, its importances, refit: share of a Hessian's mean diagonal added to it [0.01]"},
    {BESA__PRUNE(ENUM, refit), 0, 0, BESA_REFIT_COUNT - 1, 0, "a value of besa_refit",
     "refit", &besa__refit_names[1], "fit the kept weights of each layer to its dense outputs [none]"},
    {BESA__PRUNE(INT64, refit_steps), 10, 1, 1e6, 0, "1 to 1000000",
     "refit-steps", "N", "refit cg: steps of conjugate gradients [10]"},
    {BESA__PRUNE(INT, pattern_n), 0, 0, 63, 0, "0 to 63", NULL, NULL, NULL},
    {BESA__PRUNE(INT, pattern_m), 0, 0, 64, 0, "0 to 64", NULL, NULL, NULL},
    {BESA__PRUNE(INT64, num_fixed), 0, 0, BESA__NO_LIMIT, BESA_OPTION_WHERE, "0 or more", NULL, NULL, NULL},
    {BESA__PRUNE(INT64, first_block), 0, 0, BESA__NO_LIMIT, BESA_OPTION_WHERE, "0 or more", NULL, NULL, NULL},
    {BESA__PRUNE(INT64, num_blocks), 0, 0, BESA__NO_LIMIT, BESA_OPTION_WHERE, "0 or more", NULL, NULL, NULL},
    {BESA__PRUNE(DOUBLE, depth_slope), 0, -1, 1, BESA__OPEN | BESA_OPTION_WHERE, "above -1 and below 1",
     "depth-slope", "X", "sparsity of the last block less that of the first, around S [0]"},
    {BESA__PRUNE(INT64, num_block_targets), 0, 0, BESA__NO_LIMIT, BESA_OPTION_WHERE, "0 or more", NULL, NULL, NULL},
    {BESA__RATE(ENUM, form), 0, 0, BESA_RATES_LAYER, BESA__BESA, "a value of besa_rate_form",
     "rates", "hierarchical|row|layer", "what has learned rates [hierarchical]"},
    {BESA__RATE(DOUBLE, layer_scale), 1, 0, 1e4, BESA_OPTION_NONE | BESA__BESA, "0 to 10000",
     "layer-scale", "X", "how far the rates of layers move [1]"},
    {BESA__RATE(DOUBLE, row_scale), 1, 0, 1e4, BESA_OPTION_NONE | BESA__BESA, "0 to 10000",
     "row-scale", "X", "how far the rates of rows move [1]"},
    {BESA__RATE(INT64, group_rows), 1, 1, BESA__NO_LIMIT, BESA_OPTION_ALL | BESA__BESA, "1 or more",
     "group-rows", "N|all", "rows that share a rate [1]"},
    {BESA__RATE(INT, candidates), 100, 1, 65535, BESA__BESA, "1 to 65535",
     "candidates", "D", "rates are mixtures of 1, 1 - 1/D, ..., 0 [100]"},
    {BESA__RATE(FLAG, plain_softmax), 0, 0, 1, BESA__BESA, "0 or 1",
     "plain-softmax", "", "softmax of the logits, without the sigmoid"},
    {BESA__RATE(FLAG, zero_start), 0, 0, 1, BESA__BESA, "0 or 1",
     "zero-start", "", "start at a rate of 1/2 instead of at the sparsity"},
    {BESA__PRUNE(ENUM, importance), 0, 0, BESA_IMPORTANCE_COUNT - 1, BESA__BESA, "a value of besa_importance",
     "importance", &besa__importance_names[1], "which weights of a row go first [wanda]"},
    {BESA__RATE(ENUM, optimizer), 0, 0, BESA_ADAMW, BESA__BESA, "a value of besa_optimizer_kind",
     "optimizer", "prodigy|adamw", "what learns the rates [prodigy]"},
    {BESA__RATE(DOUBLE, lr), 1, 0, 1e30, BESA__OPEN | BESA__BESA, "above 0 and below 1e30",
     "lr", "X", "learning rate [prodigy 1, adamw 0.01]"},
    {BESA__RATE(ENUM, schedule), 0, 0, BESA_SCHEDULE_COSINE, BESA__BESA, "a value of besa_schedule",
     "schedule", "constant|cosine", "how the learning rate goes on [constant]"},
    {BESA__RATE(DOUBLE, warmup), 0, 0, 1, BESA__FROM_0 | BESA__BESA, "0 or more and below 1",
     "warmup", "X", "share of the learning steps in which the learning rate rises [0]"},
    {BESA__RATE(INT64, steps), 1, 1, BESA__NO_LIMIT, BESA__BESA, "1 or more", NULL, NULL, NULL},
    {BESA__RATE(DOUBLE, beta1), 0.9, 0, 1, BESA__FROM_0 | BESA__BESA, "0 or more and below 1", NULL, NULL, NULL},
    {BESA__RATE(DOUBLE, beta2), 0.999, 0, 1, BESA__FROM_0 | BESA__BESA, "0 or more and below 1", NULL, NULL, NULL},
    {BESA__RATE(DOUBLE, d0), 1e-6, 0, 1e30, BESA__OPEN | BESA__BESA, "above 0 and below 1e30", NULL, NULL, NULL},
    {BESA__RATE(DOUBLE, d_coef), 5, 0, 1e30, BESA__OPEN | BESA__BESA, "above 0 and below 1e30",
     "d-coef", "X", "Prodigy: factor on the step size that it finds [5]"},
    {BESA__RATE(DOUBLE, weight_decay), 0, 0, 1e30, BESA__FROM_0 | BESA__BESA, "0 or more and below 1e30",
     "weight-decay", "X", "decoupled weight decay [0]"},
    {BESA__RATE(DOUBLE, penalty), 1, 0, 1e30, BESA__FROM_0 | BESA__BESA, "0 or more and below 1e30",
     "lambda", "X", "weight of the sparsity penalty [1]"},
    {BESA__PRUNE(INT64, epochs), 1, 1, 1e6, BESA__BESA, "1 to 1000000",
     "epochs", "N", "passes over the calibration sequences [1]"},
    {BESA__PRUNE(INT64, batch_size), 1, 1, BESA__NO_LIMIT, BESA__BESA | BESA__WEIGHTS, "1 or more",
     "batch-size", "N", "sequences of a learning step [1]"},
    {BESA__PRUNE(ENUM, granularity), 0, 0, BESA_GRANULARITY_COUNT - 1, BESA__BESA | BESA__WEIGHTS,
     "a value of besa_granularity", "granularity", &besa__granularity_names[1], "whose outputs the loss of learning is measured on [block]"},
    {BESA__PRUNE(FLAG, whole_target), 0, 0, 1, BESA__BESA, "0 or 1",
     "whole-target", "", "granularity: the sparsity is the block's, not that of every part"},
    {BESA__PRUNE(FLAG, norm_all), 0, 0, 1, BESA__BESA | BESA__WEIGHTS, "0 or 1",
     "norm-all", "", "channel norms of the loss from all sequences, not the batch"},
    {BESA__PRUNE(FLAG, dense_stream), 0, 0, 1, BESA__BESA | BESA__WEIGHTS, "0 or 1",
     "dense-stream", "", "aim at the dense model, not at the dense block on pruned inputs"},
    {BESA__PRUNE(DOUBLE, dense_share), 0, 0, 1, BESA_OPTION_BELOW | BESA__BESA | BESA__WEIGHTS, "0 or more and below 1",
     "dense-share", "X", "share of the dense model's output in what is aimed at [0]"},
    {BESA__PRUNE(ENUM, learn), 0, 0, BESA_LEARN_COUNT - 1, 0, "a value of besa_learn",
     "learn", &besa__learn_names[1], "what learns: besa's rates, kept weights with final masks, or both [rates]"},
    {BESA__PRUNE(INT64, weight_epochs), 3, 1, 1e6, BESA__WEIGHTS, "1 to 1000000",
     "weight-epochs", "N", "passes over the calibration sequences once masks are final [3]"},
    {BESA__PRUNE(INT64, rank_interval), 1, 0, BESA__NO_LIMIT, BESA_OPTION_NONE | BESA__WEIGHTS, "0 or more",
     "rank-interval", "N", "learn both: steps until the moving weights are ranked anew, 0: never [1]"},
    {BESA__PRUNE(DOUBLE, weight_lr), 0.2, 0, 1e30, BESA__OPEN | BESA__WEIGHTS, "above 0 and below 1e30",
     "weight-lr", "X", "learning rate of weights, in units of a layer's rms / sqrt(columns), with bits of a sixth [0.2]"},
    {BESA__PRUNE(DOUBLE, weight_warmup), 0, 0, 1, BESA__FROM_0 | BESA__WEIGHTS, "0 or more and below 1",
     "weight-warmup", "X", "share of the steps in which that rises [0]"},
    {BESA__PRUNE(FLAG, learn_vectors), 0, 0, 1, BESA__WEIGHTS, "0 or 1",
     "learn-vectors", "", "norms and biases learn wherever kept weights do"},
    {BESA__PRUNE(FLAG, no_projection), 0, 0, 1, BESA__BESA, "0 or 1",
     "no-projection", "", "leave the sparsity where learning ends, near S"},
    {BESA__PRUNE(INT, bits), 0, 2, 8, 0, "0 or 2 to 8",
     "bits", "N", "put kept weights on grids of 2^N levels [0: do not]"},
    {BESA__PRUNE(INT64, group_size), 0, 0, BESA__NO_LIMIT, BESA_OPTION_BITS, "0 or more",
     "group-size", "G", "columns of a row that share a grid [0: all]"},
    {BESA__PRUNE(ENUM, clipping), 0, 0, BESA_CLIPPING_COUNT - 1, BESA_OPTION_BITS, "a value of besa_clipping",
     "clipping", &besa__clipping_names[1], "whether grids learn how far they reach [auto: where something else learns]"},
    {BESA__PRUNE(DOUBLE, clip_lr), 0.05, 0, 1e30, BESA__OPEN | BESA_OPTION_BITS, "above 0 and below 1e30",
     "clip-lr", "X", "learning rate of their clips [0.05]"},
    {BESA__PRUNE(FLAG, quantize_first), 0, 0, 1, BESA_OPTION_BITS, "0 or 1",
     "quantize-first", "", "choose masks by quantised weights, as the paper has it; not for sparsegpt"},
    {NULL, BESA_OPTION_FLAG, 0, 0, 0, 0, 0, NULL, NULL, NULL, NULL},
};

BESA_API const besa_option *besa_option_table(void) { return besa__options; }

BESA_API const char *besa_method_name(besa_method method)
{
    static const char *const name[] = {BESA_METHODS(BESA__TEXT)};
    return (unsigned)method < BESA_METHOD_COUNT ? name[method] : "?";
}

static double besa__option_get(const besa_option *o, const void *field)
{
    int i;
    int64_t whole;
    double real;
    if (o->kind == BESA_OPTION_DOUBLE) return memcpy(&real, field, sizeof real), real;
    if (o->kind == BESA_OPTION_INT64) return memcpy(&whole, field, sizeof whole), (double)whole;
    return memcpy(&i, field, sizeof i), i;
}

static void besa__option_set(const besa_option *o, void *field, double value)
{
    int i = (int)value;
    int64_t whole = (int64_t)value;
    if (o->kind == BESA_OPTION_DOUBLE) memcpy(field, &value, sizeof value);
    else if (o->kind == BESA_OPTION_INT64) memcpy(field, &whole, sizeof whole);
    else memcpy(field, &i, sizeof i);
}

static besa_result besa__option_check(const besa_option *o, double x, besa_error *error)
{
    if (x == 0 && !(o->flags & BESA_OPTION_REQUIRED)) return BESA_OK;
    if (x == BESA_NONE && (o->flags & (BESA_OPTION_NONE | BESA_OPTION_ALL))) return BESA_OK;
    int above = x > o->least || (x == o->least && !(o->flags & BESA_OPTION_ABOVE));
    int below = x < o->most || (x == o->most && !(o->flags & BESA_OPTION_BELOW));
    if (above && below) return BESA_OK;
    if (besa__is_nan(x)) return besa__fail(error, BESA_ERROR_OPTION, "%s is NaN, expected %s", o->name, o->range);
    return besa__fail(error, BESA_ERROR_OPTION, "%s is %.15g, expected %s", o->name, x, o->range);
}

/* The row of a field. */
static const besa_option *besa__find_option(const char *name)
{
    const besa_option *o = besa__options;
    while (strcmp(o->name, name)) o++;
    return o;
}

/* Do the grids' clips learn? */
static int besa__clips_learn(const besa_prune_options *o)
{
    if (!o->bits || o->clipping == BESA_CLIPPING_NONE) return 0;
    return o->clipping == BESA_CLIPPING_LEARNED || o->method == BESA_METHOD_BESA || o->learn != BESA_LEARN_RATES;
}

/* Are there rates to learn? A pattern leaves none. */
static int besa__has_rates(const besa_prune_options *o) { return o->method == BESA_METHOD_BESA && !o->pattern_m; }

/* Does a run with these options look at that one? */
BESA__UNUSED static int besa__option_used(const besa_option *row, const besa_prune_options *o)
{
    const size_t in_rates = row->offset - offsetof(besa_prune_options, rates); /* beyond them where it lies before them, too */
    if (row->flags & BESA_OPTION_BITS) return o->bits != 0;
    if (!(row->flags & (BESA_OPTION_BESA | BESA_OPTION_WEIGHTS))) return 1;
    if (in_rates < sizeof o->rates || row->offset == offsetof(besa_prune_options, no_projection))
        return besa__has_rates(o);
    return (row->flags & BESA_OPTION_BESA && o->method == BESA_METHOD_BESA) ||
           (row->flags & BESA_OPTION_WEIGHTS && (o->learn != BESA_LEARN_RATES || besa__clips_learn(o)));
}

/* Check the options that lie at bytes begin .. end-1 of besa_prune_options, and fill in what 0 and BESA_NONE stand for:
 * once only: BESA_NONE becomes 0, which a second call would take for the default. bytes: where byte `begin` is. */
static besa_result besa__options_fill(void *bytes, size_t begin, size_t end, besa_error *error)
{
    for (const besa_option *o = besa__options; o->name; o++) {
        if (o->offset < begin || o->offset >= end) continue;
        void *field = (unsigned char *)bytes + (o->offset - begin);
        double x = besa__option_get(o, field);
        BESA__TRY(besa__option_check(o, x, error));
        if (x == 0) besa__option_set(o, field, o->standard);
        else if (x == BESA_NONE && (o->flags & BESA_OPTION_NONE)) besa__option_set(o, field, 0);
    }
    return BESA_OK;
}

/* What the presets set; what is not here has its default. */
static const struct { const char *preset, *option; double value; } besa__presets[] = {
    {"default", NULL, 0},
    /* Tried for "best", of four epochs in all: one to three with the rates; ranks kept, anew every 4th step, or every step, and
     * on while masks are final; weight_lr 0.15 to 0.4; dense_share 0 to 1; an importance with gradients; learn_vectors; more
     * sparsity towards the end, or by outliers; Adam's beta2 0.95 and 0.99; pruned weights that move as well, or shrink. */
    {"best", "learn", BESA_LEARN_BOTH}, {"best", "dense_share", 0.5}, {"best", "epochs", 2}, {"best", "weight_epochs", 2},
    {"best", "weight_lr", 0.3},
    {"weights", "learn", BESA_LEARN_WEIGHTS}, {"weights", "dense_share", 0.5},
    {"published-row", "form", BESA_RATES_ROW}, {"published-row", "zero_start", 1}, {"published-row", "penalty", 5},
    {"published-row", "d_coef", 5}, {"published-row", "no_projection", 1},
    {"published-layer", "form", BESA_RATES_LAYER}, {"published-layer", "zero_start", 1}, {"published-layer", "penalty", 5},
    {"published-layer", "d_coef", 50}, {"published-layer", "dense_stream", 1}, {"published-layer", "no_projection", 1},
};

BESA_API besa_result besa_preset(besa_prune_options *options, const char *name, besa_error *error)
{
    besa_prune_options preset = *options;
    int known = 0;
    for (const besa_option *o = besa__options; o->name; o++)
        if (!(o->flags & BESA_OPTION_WHERE))
            besa__option_set(o, (unsigned char *)&preset + o->offset, 0);
    for (size_t i = 0; i < sizeof besa__presets / sizeof *besa__presets; i++) {
        if (strcmp(besa__presets[i].preset, name)) continue;
        known = 1;
        preset.preset = besa__presets[i].preset;
        if (!besa__presets[i].option) continue;
        const besa_option *o = besa__find_option(besa__presets[i].option);
        besa__option_set(o, (unsigned char *)&preset + o->offset, besa__presets[i].value);
    }
    if (!known)
        return besa__fail(error, BESA_ERROR_OPTION, "preset is \"%s\", expected default, best, weights, published-row or "
                          "published-layer",
                          name);
    *options = preset;
    return BESA_OK;
}

/* ============================================================================================
 * // >>masks                 importance, ranks, counts and masks
 * ============================================================================================
 * Owns which weights of a row go first and how many of them go: scores, ranks, the counts n, and the masks that follow.
 * Where n comes from is not its affair: a baseline sets it, section rates learns it. Calls the backend table. */

typedef struct besa__mask_layer {
    const char *name;                           /* for messages; NULL: its number */
    besa_layer_shape shape;
    int64_t units;                              /* of a row: what ranks and counts count, its C weights */
    double fixed;                               /* a sparsity known beforehand, the user's or a baseline's; or negative */
    int ranked;
    void *rank;                                 /* (R,C) 16 or 32 bits */
    int32_t *zeros, *n;                         /* (R) source zeros; weights pruned */
    int32_t *masked;                            /* (R) n when besa__masks_update masked last; zeros, n and masked point into
                                                   the set's arrays */
} besa__mask_layer;

/* The ranks and counts of a set of layers. */
typedef struct besa__masks {
    besa_backend *be;
    int count;
    besa__mask_layer *layer;                    /* (count) */
    int64_t rows;                               /* of all layers */
    int32_t *zeros, *n, *masked;                /* (rows) */
    int32_t *not_finite;                        /* (count) NaN and infinite weights of each layer */
} besa__masks;

/* Place the arrays of these layers; with arena->base NULL this only counts. layer: host memory, (count). */
static void besa__masks_place(besa__masks *masks, besa_backend *be, besa__mask_layer *layer, const besa_layer_shape *shapes,
                              int count, besa__arena *arena)
{
    masks->be = be;
    masks->layer = layer;
    masks->count = count;
    masks->rows = 0;
    memset(layer, 0, (size_t)count * sizeof *layer);
    for (int i = 0; i < count; i++) {
        int64_t weights = besa__product(shapes[i].rows, shapes[i].columns);
        layer[i].shape = shapes[i];
        layer[i].units = shapes[i].columns;
        layer[i].fixed = -1;
        layer[i].rank = besa__take_array(arena, weights, besa__rank_bytes(shapes[i].columns));
        masks->rows += shapes[i].rows;
    }
    masks->zeros = (int32_t *)besa__take_array(arena, masks->rows, sizeof(int32_t));
    masks->n = (int32_t *)besa__take_array(arena, masks->rows, sizeof(int32_t));
    masks->masked = (int32_t *)besa__take_array(arena, masks->rows, sizeof(int32_t));
    masks->not_finite = (int32_t *)besa__take_array(arena, count, sizeof(int32_t));
    if (!arena->base) return;
    for (int64_t i = 0, first = 0; i < count; first += layer[i++].shape.rows) {
        layer[i].zeros = masks->zeros + first;
        layer[i].n = masks->n + first;
        layer[i].masked = masks->masked + first;
    }
}

/* No ranks, nothing pruned, no layer fixed. Does not wait for the device. */
static besa_result besa__masks_reset(besa__masks *masks)
{
    besa_backend *be = masks->be;
    for (int i = 0; i < masks->count; i++) {
        masks->layer[i].fixed = -1;
        masks->layer[i].ranked = 0;
    }
    BESA__TRY(be->fill(be, masks->n, 0, masks->rows));
    return be->zero(be, BESA_QUEUE_COMPUTE, masks->not_finite, (size_t)masks->count * sizeof(int32_t));
}

typedef struct besa__importance {
    const char *name;
    besa_statistic statistic;
    int power;                                  /* of |W| */
    float exponent;                             /* of the statistic */
    float gradient;                             /* exponent of the gradients' squares; 0: they are not asked for */
    int relative;                               /* by the weight's share of its row and column */
} besa__importance;

/* An importance that has been checked: its row. */
static const besa__importance *besa__importance_row(besa_importance importance)
{
    static const besa__importance rows[] = {
#define BESA__ROW(value, name, statistic, power, exponent, gradient, relative) {name, statistic, power, exponent, gradient, relative},
        BESA_IMPORTANCES(BESA__ROW)
#undef BESA__ROW
    };
    BESA_ASSERT((unsigned)importance < BESA_IMPORTANCE_COUNT);
    return &rows[importance];
}

/* scale(C): the score's factor per column, from the importance's statistic; may be statistic itself. */
static besa_result besa__importance_scale(besa_backend *be, float *scale, const float *statistic,
                                          besa_importance importance, int64_t columns)
{
    return be->power(be, scale, statistic, besa__importance_row(importance)->exponent, columns);
}

/* The ranks of a layer from one row on. */
static void *besa__layer_rank(const besa__mask_layer *layer, int64_t row)
{
    int64_t columns = layer->shape.columns;
    return (unsigned char *)layer->rank + (size_t)(row * columns) * besa__rank_bytes(columns);
}

/* Count the zeros of a layer's rows: as many weights of each go at least. */
static besa_result besa__masks_zeros(besa__masks *masks, int index, const void *w)
{
    const besa__mask_layer *layer = &masks->layer[index];
    besa_backend *be = masks->be;
    BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, masks->not_finite + index, sizeof(int32_t)));
    return be->count_zeros(be, layer->zeros, masks->not_finite + index, w, layer->shape.dtype, layer->shape.rows,
                           layer->shape.columns);
}

/* What scores a layer's weights: |W|^power scale (C; NULL: 1) factor (R,C; NULL: 1); sums (C), of the columns of |W|: relative
 * to these and to the row's, NULL: not. */
typedef struct besa__scoring {
    int power;
    const float *scale, *factor;
    float *sums;                                /* besa__scoring_begin works them out */
} besa__scoring;

static besa_result besa__scoring_begin(besa_backend *be, const besa__scoring *by, const void *w, besa_dtype dtype, int64_t rows,
                                       int64_t columns)
{
    return by->sums ? be->absolute_sums(be, by->sums, w, dtype, rows, columns) : BESA_OK;
}

/* scores (count, C) of rows first .. of W(R,C) */
static besa_result besa__scoring_rows(besa_backend *be, const besa__scoring *by, float *scores, const void *w, besa_dtype dtype,
                                      int64_t first, int64_t count, int64_t columns)
{
    const void *from = besa__at_const(w, dtype, first * columns);
    BESA__TRY(be->score(be, scores, from, dtype, by->scale, by->power, count, columns));
    if (by->sums) BESA__TRY(be->score_relative(be, scores, from, dtype, by->sums, count, columns));
    return by->factor ? be->score_scale(be, scores, by->factor + first * columns, count * columns) : BESA_OK;
}

/* Rank a layer by its scores, and no more than that: zeros are counted apart. scratch receives the scores of as many rows as
 * `room` floats hold, again and again. */
static besa_result besa__masks_rank(besa__masks *masks, int index, const void *w, const besa__scoring *by, float *scratch,
                                    int64_t room)
{
    besa_backend *be = masks->be;
    besa__mask_layer *layer = &masks->layer[index];
    besa_dtype dtype = layer->shape.dtype;
    int64_t rows = layer->shape.rows, columns = layer->shape.columns, piece = besa__min(rows, room / columns);
    BESA_ASSERT(piece > 0);
    layer->ranked = 1;
    BESA__TRY(besa__scoring_begin(be, by, w, dtype, rows, columns));
    for (int64_t r = 0, count; r < rows; r += count) {
        count = besa__min(piece, rows - r);
        BESA__TRY(besa__scoring_rows(be, by, scratch, w, dtype, r, count, columns));
        BESA__TRY(be->rank_rows(be, besa__layer_rank(layer, r), scratch, count, columns));
    }
    return BESA_OK;
}

/* n_r = floor(rate units) of every row. */
static besa_result besa__masks_uniform(besa__masks *masks, int index, double rate)
{
    const besa__mask_layer *layer = &masks->layer[index];
    int32_t n = (int32_t)floor(rate * (double)layer->units);
    return masks->be->fill(masks->be, layer->n, n, layer->shape.rows);
}

/* Hold a layer at a sparsity of its own, or (negative) leave it to the method. */
static besa_result besa__masks_fix(besa__masks *masks, int index, double sparsity)
{
    masks->layer[index].fixed = sparsity;
    return sparsity < 0 ? BESA_OK : besa__masks_uniform(masks, index, sparsity);
}

/* What = W where rank >= n, +0 elsewhere. */
static besa_result besa__masks_apply(besa__masks *masks, int index, const void *w, void *pruned)
{
    const besa__mask_layer *layer = &masks->layer[index];
    return masks->be->mask_apply(masks->be, pruned, w, layer->shape.dtype, layer->rank, layer->n, layer->shape.rows,
                                 layer->shape.columns);
}

/* The same where `pruned` holds the last mask: only what has changed since. full: all, as is needed the first time. */
static besa_result besa__masks_update(besa__masks *masks, int index, const void *w, void *pruned, int full)
{
    const besa__mask_layer *layer = &masks->layer[index];
    besa_backend *be = masks->be;
    if (full) {
        BESA__TRY(be->copy(be, BESA_QUEUE_COMPUTE, layer->masked, layer->n, (size_t)layer->shape.rows * sizeof(int32_t)));
        return besa__masks_apply(masks, index, w, pruned);
    }
    return be->mask_update(be, pruned, w, layer->shape.dtype, layer->rank, layer->n, layer->masked, layer->shape.rows,
                           layer->shape.columns);
}

/* Weights that were ranked must be finite. Waits for the device. */
static besa_result besa__masks_check(besa__masks *masks)
{
    besa_backend *be = masks->be;
    for (int i = 0; i < masks->count; i++) {
        int32_t count;
        BESA__TRY(be->download(be, BESA_QUEUE_COMPUTE, &count, masks->not_finite + i, sizeof count));
        BESA__TRY(be->synchronize(be, BESA_QUEUE_COMPUTE));
        if (count != 0)
            return besa__fail(&be->error, BESA_ERROR_NOT_FINITE, "%d NaN or infinite weights in layer %d", (int)count, i);
    }
    return BESA_OK;
}

/* ============================================================================================
 * // >>parameters            what learns: values, gradient, optimiser, schedule
 * ============================================================================================
 * Owns a set of parameters that one optimiser moves together: one flat array of values, one of their gradient, and the
 * optimiser's state. What they mean is their owners' affair: each reserves its part, fills in the gradient and reads the
 * values. Several owners may share a set (Prodigy's d then spans them all) or have one each.
 *
 * Prodigy (arXiv 2306.06101) estimates its own step size d from how far theta has come along the gradients:
 *     dlr = d lr,     gain = (d / d0) dlr,     num = beta3 num + gain <g, theta0 - theta>
 *     m = beta1 m + (1 - beta1) d g,   v = beta2 v + (1 - beta2) d^2 g^2,   s = beta3 s + gain g
 *     dhat = d_coef num / sum|s|,   d = max(d, dhat)
 *     theta -= dlr (m / (sqrt(v) + d eps) + weight_decay theta)   with dlr from before, d as it is now; nothing moves while
 *                                                                 sum|s| = 0
 * Gradients are 1e-8 and below: eps = 1e-8 matters, and a loss scale would have to be undone first. */

typedef struct besa__parameters {
    besa_backend *be;
    besa_optimizer_step step;                   /* settings, arrays (n), and how many steps there have been */
    float *theta0, *grad;                       /* (n) start values; the gradient that the next step follows */
    double *scalars0;                           /* device: what step.scalars start from */
    double lr;                                  /* before the schedule */
    besa_schedule schedule;
    double warmup;                              /* share of the steps */
    int64_t steps;                              /* that there will be; only the schedule wants to know */
} besa__parameters;

/* An optimiser of its own for a set without parameters yet: which, its learning rate, and the rest as the options have it.
 * To be called anew before each time that room is reserved and placed. */
static void besa__parameters_init(besa__parameters *p, besa_backend *be, besa_optimizer_kind kind, double lr,
                                  const besa_rate_options *o)
{
    memset(p, 0, sizeof *p);
    p->be = be;
    p->lr = lr;
    p->schedule = o->schedule;
    p->warmup = o->warmup;
    p->steps = o->steps;
    p->step.kind = kind;
    p->step.beta1 = o->beta1;
    p->step.beta2 = o->beta2;
    p->step.beta3 = sqrt(o->beta2);
    p->step.eps = 1e-8;
    p->step.weight_decay = o->weight_decay;
    p->step.d0 = o->d0;
    p->step.d_coef = o->d_coef;
}

/* Room for n more; returns where they begin. To be called before the arrays are placed. */
static int64_t besa__parameters_reserve(besa__parameters *p, int64_t n)
{
    int64_t first = p->step.n;
    p->step.n = besa__sum(first, n);
    return first;
}

static void besa__parameters_place(besa__parameters *p, besa__arena *arena)
{
    besa_optimizer_step *s = &p->step;
    s->theta = besa__take_floats(arena, s->n);
    s->theta0 = p->theta0 = besa__take_floats(arena, s->n);
    s->grad = p->grad = besa__take_floats(arena, s->n);
    s->m = besa__take_floats(arena, s->n);
    s->v = besa__take_floats(arena, s->n);
    s->s = besa__take_floats(arena, s->n);
    s->scalars = (double *)besa__take(arena, BESA_OPTIMIZER_SCALARS * sizeof(double));
    p->scalars0 = (double *)besa__take(arena, BESA_OPTIMIZER_SCALARS * sizeof(double));
}

/* Once after placing: start values 0, which an owner may change. Waits for the device. */
static besa_result besa__parameters_start(besa__parameters *p)
{
    besa_backend *be = p->be;
    const double scalars[BESA_OPTIMIZER_SCALARS] = {p->step.d0, 0};
    BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, p->theta0, (size_t)p->step.n * sizeof(float)));
    BESA__TRY(be->upload(be, BESA_QUEUE_COMPUTE, p->scalars0, scalars, sizeof scalars));
    return be->synchronize(be, BESA_QUEUE_COMPUTE);
}

/* Back to the start values, the optimiser as before its first step. Does not wait for the device. */
static besa_result besa__parameters_reset(besa__parameters *p)
{
    besa_backend *be = p->be;
    size_t bytes = (size_t)p->step.n * sizeof(float);
    float *zero[4] = {p->grad, p->step.m, p->step.v, p->step.s};
    p->step.step = 0;
    for (int i = 0; i < 4; i++) BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, zero[i], bytes));
    BESA__TRY(be->copy(be, BESA_QUEUE_COMPUTE, p->step.theta, p->theta0, bytes));
    return be->copy(be, BESA_QUEUE_COMPUTE, p->step.scalars, p->scalars0, BESA_OPTIMIZER_SCALARS * sizeof(double));
}

/* The factor on the learning rate of step 1 .. steps: a straight rise over the first warmup steps, then 1, or half a
 * cosine from 1 down to 0. */
static double besa__schedule_factor(besa_schedule schedule, double warmup, int64_t step, int64_t steps)
{
    double rise = floor(warmup * (double)steps), after = (double)(step - 1) - rise, left = (double)steps - rise;
    if (after < 0) return (double)step / (rise + 1);
    return schedule == BESA_SCHEDULE_COSINE ? 0.5 * (1 + cos(3.141592653589793 * after / left)) : 1;
}

/* One step of the optimiser along the gradient, which is left as it is: its owners fill it in anew for each step. */
static besa_result besa__parameters_step(besa__parameters *p)
{
    p->step.step++;
    p->step.lr = p->lr * besa__schedule_factor(p->schedule, p->warmup, besa__min(p->step.step, p->steps), p->steps);
    return p->be->optimizer_step(p->be, &p->step);
}

/* An array over the parameters from `offset` on; NULL where there are none (negative). */
static float *besa__parameters_at(float *array, int64_t offset) { return offset < 0 ? NULL : array + offset; }

/* ============================================================================================
 * // >>rates                 learnable rates: theta -> alpha -> n, and their gradient
 * ============================================================================================
 * Owns how many weights of each row go, as something that can be learned: it sets the counts of section masks from a part
 * of section parameters, and fills in that part's gradient.
 *
 * Per group g of rows the rate is alpha_g = sum_d beta_d p_d with beta = softmax(z), p_d = 1 - d/D and
 *     z_d = c p_d + s_L u(theta_L[d]) + s_R u(theta_g[d]),      u(x) = sigmoid(x) - 1/2.
 * Row r prunes its n_r = floor(alpha C) lowest ranks. c makes the rate at theta = 0 the target, any in (0, 1), so
 * that learning starts there; the published form is c = 0, which confines alpha to 0.376 .. 0.624. Backward, with
 * k_d = ((D - d) C) / D the weights of a row that a rate of p_d prunes:
 *     dbeta_d = - sum of dL/dWhat W over rank < k_d [+ the penalty's],   dz = beta (dbeta - sum_d beta_d dbeta_d),
 *     dtheta = s u'(theta) dz,   theta_L summed over the layer's groups.
 * The first comes from D sums a row: bucket b has the weights that are pruned by candidates 0 .. b. Once learned, all rows are
 * shifted together in logit space until exactly floor(target N + 1/2) of the N learned weights go (be->project_counts). Where
 * the layers are in parts, each part has S, N and the shift for itself. */

typedef struct besa__rate_layer {
    besa_rate_shape shape;
    int part;                                   /* 0 .. parts - 1; the layers of a part follow one another */
    double share, part_share;                   /* of the learned weights, of all and of its part; 0 where it is fixed */
    int64_t theta_layer, theta_row;             /* first parameter; negative: none */
    uint16_t *bucket;                           /* (units) */
    int32_t *units;                             /* (R) the units of each row, 0 where the layer is fixed */
    float *alpha;                               /* (R); units, alpha: parts of the rates' arrays */
    float *sums;                                /* (R,D) bucket sums of dW * W */
} besa__rate_layer;

struct besa_rates {
    besa__masks *masks;                         /* whose counts these rates set */
    besa__parameters *parameters;               /* theta is a part of them */
    const besa_rate_options *options;           /* with the defaults filled in */
    float tilt;                                 /* c */
    besa__rate_layer *layer;                    /* (masks->count) */
    int32_t *units;                             /* (masks->rows) */
    float *alpha;                               /* (masks->rows) */
    int parts;                                  /* [1] parts of the layers that each have the target for themselves */
    float *mean;                                /* (1) mean rate of the learned layers */
    float *part_mean;                           /* (parts) S: of each part's; mean itself where that is all */
    int64_t *excess;                            /* (parts) whether the projection worked, from be->project_counts */
    void *workspace;                            /* what operations use in a call of the caller's; NULL: what is set */
    size_t workspace_bytes;
};

/* Mean rate at theta = 0 for a tilt c: sum_d softmax(c p)_d p_d, rising in c. */
static double besa__tilted_rate(double c, int candidates)
{
    double sum = 0, rate = 0;
    for (int d = 0; d <= candidates; d++) {
        double p = 1.0 - (double)d / candidates;
        double beta = exp(c > 0 ? c * (p - 1) : c * p);
        sum += beta;
        rate += beta * p;
    }
    return rate / sum;
}

static float besa__solve_tilt(double target, int candidates)
{
    double low = -1e7, high = 1e7;
    for (int i = 0; i < 200; i++) {
        double c = 0.5 * (low + high);
        if (besa__tilted_rate(c, candidates) < target) low = c;
        else high = c;
    }
    return (float)(fabs(high) < 1e-6 ? 0.0 : 0.5 * (low + high));
}

/* The extreme mean rate that sigmoids can reach: every candidate's logit moves by at most s/2 either way, and the
 * best choice raises all candidates on one side of a cut. high 1: the largest rate; 0: the smallest. */
BESA__UNUSED static double besa__reachable_rate(const besa_rates *rates, int high)
{
    double scale = fmin(rates->options->layer_scale + rates->options->row_scale, 500), best = high ? 0 : 1;
    double all[2] = {0, 0}, upper[2] = {0, 0}; /* sums of exp(c p) and exp(c p) p over all candidates; over d <= cut */
    int last = rates->options->candidates;
    for (int pass = 0; pass < 2; pass++)
        for (int d = 0; d <= last; d++) {
            double p = 1.0 - (double)d / last, weight = exp((double)rates->tilt * (p - (rates->tilt > 0)));
            double *sums = pass ? upper : all, up = exp(high ? 0.5 * scale : -0.5 * scale);
            sums[0] += weight;
            sums[1] += weight * p;
            if (!pass) continue;
            double rate = (up * upper[1] + (all[1] - upper[1]) / up) / (up * upper[0] + (all[0] - upper[0]) / up);
            if (high ? rate > best : rate < best) best = rate;
        }
    return best;
}

/* Check the options and fill in what 0 stands for: once only, as besa__options_fill. */
static besa_result besa__rate_defaults(besa_rate_options *o, besa_error *error)
{
    const size_t begin = offsetof(besa_prune_options, rates);
    if (o->lr == 0 && o->optimizer == BESA_ADAMW) o->lr = 0.01;
    BESA__TRY(besa__options_fill(o, begin, begin + sizeof *o, error));
    if (o->form == BESA_RATES_ROW) o->layer_scale = 0;
    if (o->form == BESA_RATES_LAYER) o->row_scale = 0;
    if (o->layer_scale + o->row_scale > 0) return BESA_OK;
    return besa__fail(error, BESA_ERROR_OPTION, "layer_scale and row_scale: expected one above 0 that the "
                      "form has, found none");
}

/* The penalty's gradient has 2 lambda / t^2 as a float. o: with the defaults filled in. */
static besa_result besa__check_penalty(const besa_rate_options *o, besa_error *error)
{
    double most = 1e37 * o->target * o->target;
    if (o->penalty <= most) return BESA_OK;
    return besa__fail(error, BESA_ERROR_OPTION, "penalty is %g, expected at most %g (1e37 times target squared) for a target of "
                      "%g; BESA_NONE: no penalty", o->penalty, most, o->target);
}

/* Fill in one layer and place its arrays, with room for its theta among the parameters. */
static void besa__rate_layer_place(besa_rates *rates, int index, besa__arena *arena)
{
    const besa_rate_options *o = rates->options;
    besa__rate_layer *layer = &rates->layer[index];
    besa_rate_shape *s = &layer->shape;
    int64_t rows = rates->masks->layer[index].shape.rows;
    s->rows = rows;
    s->units = rates->masks->layer[index].units;
    s->group_rows = o->group_rows == BESA_ALL_ROWS || o->group_rows > rows ? rows : o->group_rows;
    s->logits = o->candidates + 1;
    s->tilt = rates->tilt;
    s->layer_scale = (float)o->layer_scale;
    s->row_scale = (float)o->row_scale;
    s->plain = o->plain_softmax;
    layer->bucket = (uint16_t *)besa__take_array(arena, s->units, sizeof(uint16_t));
    layer->sums = besa__take_floats(arena, besa__product(rows, o->candidates));
    int64_t logits = besa__product(besa__parts(rows, s->group_rows), s->logits);
    layer->theta_layer = s->layer_scale > 0 ? besa__parameters_reserve(rates->parameters, s->logits) : -1;
    layer->theta_row = s->row_scale > 0 ? besa__parameters_reserve(rates->parameters, logits) : -1;
}

/* Place everything that the rates of these masks keep on the device, but for the parameters; with arena->base NULL this
 * only counts. layer: host memory, (masks->count). */
static void besa__rates_place(besa_rates *rates, besa__rate_layer *layer, besa__arena *arena)
{
    const besa__masks *masks = rates->masks;
    rates->layer = layer;
    memset(layer, 0, (size_t)masks->count * sizeof *layer);
    for (int i = 0; i < masks->count; i++) besa__rate_layer_place(rates, i, arena);
    rates->units = (int32_t *)besa__take_array(arena, masks->rows, sizeof(int32_t));
    rates->alpha = besa__take_floats(arena, masks->rows);
    rates->mean = besa__take_floats(arena, 1);
    rates->part_mean = rates->parts > 1 ? besa__take_floats(arena, rates->parts) : rates->mean;
    rates->excess = (int64_t *)besa__take_array(arena, rates->parts, sizeof(int64_t));
    if (!arena->base) return;
    for (int64_t i = 0, first = 0; i < masks->count; first += layer[i++].shape.rows) {
        layer[i].units = rates->units + first;
        layer[i].alpha = rates->alpha + first;
    }
}

/* Weights of the learned layers, in units: of a part, or (negative) of all. */
static int64_t besa__rates_learned(const besa_rates *rates, int part)
{
    int64_t total = 0;
    for (int i = 0; i < rates->masks->count; i++)
        if (rates->masks->layer[i].fixed < 0 && (part < 0 || rates->layer[i].part == part))
            total += rates->layer[i].shape.rows * rates->layer[i].shape.units;
    return total;
}

/* Each layer's share of them. */
static void besa__rates_share(besa_rates *rates)
{
    double total = (double)besa__rates_learned(rates, -1);
    for (int i = 0; i < rates->masks->count; i++) {
        besa__rate_layer *layer = &rates->layer[i];
        double weights = rates->masks->layer[i].fixed < 0 ? (double)(layer->shape.rows * layer->shape.units) : 0;
        layer->share = weights > 0 ? weights / total : 0;
        layer->part_share = weights > 0 ? weights / (double)besa__rates_learned(rates, layer->part) : 0;
    }
}

/* bucket[rank] = the largest candidate d with rank < k_d = ((D - d) units) / D: the weight is pruned by candidates 0 .. d. */
static besa_result besa__upload_buckets(besa_backend *be, const besa__rate_layer *layer)
{
    int64_t buckets = layer->shape.logits - 1, units = layer->shape.units, d = buckets - 1;
    size_t bytes = (size_t)units * sizeof(uint16_t);
    void *memory;
    BESA__TRY(besa__malloc(&memory, bytes, "a bucket table", &be->error));
    uint16_t *table = (uint16_t *)memory;
    for (int64_t rank = 0; rank < units; rank++) {
        while (rank >= ((buckets - d) * units) / buckets) d--;
        table[rank] = (uint16_t)d;
    }
    besa_result result = be->upload(be, BESA_QUEUE_COMPUTE, layer->bucket, table, bytes);
    if (result == BESA_OK) result = be->synchronize(be, BESA_QUEUE_COMPUTE);
    BESA_FREE(table);
    return result;
}

/* Once after placing: what never changes. Waits for the device. */
static besa_result besa__rates_start(besa_rates *rates)
{
    for (int i = 0; i < rates->masks->count; i++)
        BESA__TRY(besa__upload_buckets(rates->masks->be, &rates->layer[i]));
    return BESA_OK;
}

static size_t besa__sums_bytes(const besa_rate_shape *s)
{
    return (size_t)(s->rows * (s->logits - 1)) * sizeof(float);
}

/* Sums empty, no rate yet, shares as the masks' fixed layers have them. Call besa__masks_reset and besa__parameters_reset first.
 * Does not wait for the device. */
static besa_result besa__rates_reset(besa_rates *rates)
{
    besa_backend *be = rates->masks->be;
    for (int i = 0; i < rates->masks->count; i++) {
        besa__rate_layer *layer = &rates->layer[i];
        BESA__TRY(be->fill(be, layer->units, (int32_t)layer->shape.units, layer->shape.rows));
        BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, layer->sums, besa__sums_bytes(&layer->shape)));
    }
    besa__rates_share(rates);
    BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, rates->alpha, (size_t)rates->masks->rows * sizeof(float)));
    BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, rates->mean, sizeof(float)));
    return be->zero(be, BESA_QUEUE_COMPUTE, rates->excess, (size_t)rates->parts * sizeof(int64_t));
}

/* A layer has been fixed at a sparsity of its own, or (negative) made to learn. */
static besa_result besa__rates_fix(besa_rates *rates, int index)
{
    const besa__rate_layer *layer = &rates->layer[index];
    int32_t units = rates->masks->layer[index].fixed < 0 ? (int32_t)layer->shape.units : 0;
    besa__rates_share(rates);
    return rates->masks->be->fill(rates->masks->be, layer->units, units, layer->shape.rows);
}

/* theta -> alpha, n and the mean rates. */
static besa_result besa__rates_forward(besa_rates *rates)
{
    besa_backend *be = rates->masks->be;
    float *theta = rates->parameters->step.theta;
    int first = 1, part = -1;
    for (int i = 0; i < rates->masks->count; i++) {
        const besa__rate_layer *layer = &rates->layer[i];
        const besa__mask_layer *mask = &rates->masks->layer[i];
        if (mask->fixed >= 0) continue;
        BESA__TRY(be->rate_forward(be, layer->alpha, mask->n, besa__parameters_at(theta, layer->theta_layer),
                                   besa__parameters_at(theta, layer->theta_row), mask->zeros, &layer->shape));
        BESA__TRY(be->rate_mean(be, rates->mean, layer->alpha, (float)layer->share, !first, layer->shape.rows));
        if (rates->parts > 1)
            BESA__TRY(be->rate_mean(be, rates->part_mean + layer->part, layer->alpha, (float)layer->part_share,
                                    layer->part == part, layer->shape.rows));
        first = 0;
        part = layer->part;
    }
    return BESA_OK;
}

/* Add to the bucket sums of `rows` rows from `first` on: w (R,C), dw (rows, C). */
static besa_result besa__rates_gradient(besa_rates *rates, int index, const void *w, int64_t first, int64_t rows,
                                        const void *dw, besa_dtype dw_dtype)
{
    const besa__rate_layer *layer = &rates->layer[index];
    const besa__mask_layer *mask = &rates->masks->layer[index];
    besa_backend *be = rates->masks->be;
    int64_t columns = mask->shape.columns, buckets = layer->shape.logits - 1;
    if (mask->fixed >= 0) return BESA_OK;
    return be->bucket_gradient(be, layer->sums + first * buckets, dw, dw_dtype,
                               besa__at_const(w, mask->shape.dtype, first * columns), mask->shape.dtype,
                               besa__layer_rank(mask, first), layer->bucket, rows, columns, buckets);
}

/* From the bucket sums, which are emptied, to dtheta, with the penalty lambda ((S - t)/t)^2:
 * dL/dalpha_g = 2 lambda (S - t)/t^2 (n_layer / N) (rows_g / R). */
static besa_result besa__rates_backward(besa_rates *rates)
{
    besa_backend *be = rates->masks->be;
    float *theta = rates->parameters->step.theta, *grad = rates->parameters->grad;
    double t = rates->options->target;
    for (int i = 0; i < rates->masks->count; i++) {
        const besa__rate_layer *layer = &rates->layer[i];
        besa_penalty penalty;
        if (rates->masks->layer[i].fixed >= 0) continue;
        penalty.mean = rates->part_mean + (rates->parts > 1 ? layer->part : 0);
        penalty.coefficient = (float)(2 * rates->options->penalty / (t * t) * layer->part_share);
        penalty.target = (float)t;
        BESA__TRY(be->rate_backward(be, besa__parameters_at(grad, layer->theta_layer),
                                    besa__parameters_at(grad, layer->theta_row), layer->sums,
                                    besa__parameters_at(theta, layer->theta_layer),
                                    besa__parameters_at(theta, layer->theta_row), &penalty, &layer->shape));
        BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, layer->sums, besa__sums_bytes(&layer->shape)));
    }
    return BESA_OK;
}

/* How many weights of a part's learned layers are to go. */
static int64_t besa__rates_count(const besa_rates *rates, int part)
{
    return (int64_t)floor(rates->options->target * (double)besa__rates_learned(rates, part) + 0.5);
}

/* From theta to exact counts. Does not wait: rates->excess says whether it worked. */
static besa_result besa__rates_project(besa_rates *rates)
{
    const besa__masks *masks = rates->masks;
    BESA__TRY(besa__rates_forward(rates));
    for (int64_t i = 0, first = 0, rows; i < masks->count; first += rows) {
        int part = rates->layer[i].part;
        for (rows = 0; i < masks->count && rates->layer[i].part == part; i++) rows += rates->layer[i].shape.rows;
        BESA__TRY(masks->be->project_counts(masks->be, masks->n + first, rates->excess + part, rates->alpha + first,
                                            masks->zeros + first, rates->units + first, besa__rates_count(rates, part), rows));
    }
    return BESA_OK;
}

/* Is any of n floats on the device not finite? Waits; for what goes wrong. */
static int besa__any_not_finite(besa_backend *be, const float *device, int64_t n)
{
    float part[1024];
    for (int64_t first = 0, count; first < n; first += count) {
        count = besa__min(1024, n - first);
        if (be->download(be, BESA_QUEUE_COMPUTE, part, device + first, (size_t)count * sizeof(float)) != BESA_OK) return 0;
        if (be->synchronize(be, BESA_QUEUE_COMPUTE) != BESA_OK) return 0;
        for (int64_t i = 0; i < count; i++)
            if (!besa__is_finite((double)part[i])) return 1;
    }
    return 0;
}

/* Is any of a layer's parameters, or of their gradients, not finite? Its two parts lie one after the other. */
static int besa__theta_not_finite(const besa_rates *rates, const float *array, int index)
{
    const besa__rate_layer *layer = &rates->layer[index];
    int64_t first = layer->theta_layer < 0 ? layer->theta_row : layer->theta_layer;
    int64_t groups = layer->theta_row < 0 ? 0 : besa__parts(layer->shape.rows, layer->shape.group_rows);
    int64_t vectors = groups + (layer->theta_layer >= 0);
    return besa__any_not_finite(rates->masks->be, array + first, vectors * layer->shape.logits);
}

/* What is not finite of the learned rates, in words: the last gradient, or else the logits, and of which layers. Waits for
 * the device. */
static void besa__describe_rates(const besa_rates *rates, char *text, size_t size)
{
    const float *arrays[2] = {rates->parameters->grad, rates->parameters->step.theta};
    static const char *const what[2] = {"the gradient", "the step (lr, d_coef, weight_decay or penalty may be too large)"};
    snprintf(text, size, "a gradient was not");
    for (int k = 0; k < 2; k++) {
        char first[32] = "";
        int bad = 0, learned = 0;
        for (int i = 0; i < rates->masks->count; i++) {
            const besa__mask_layer *layer = &rates->masks->layer[i];
            if (layer->fixed >= 0) continue;
            learned++;
            if (!besa__theta_not_finite(rates, arrays[k], i) || bad++) continue;
            if (layer->name) snprintf(first, sizeof first, "%s", layer->name);
            else snprintf(first, sizeof first, "layer %d", i);
        }
        if (bad == 0) continue;
        snprintf(text, size, "%s of %s%s is not", what[k], bad == learned && bad > 1 ? "every layer" : first,
                 bad > 1 && bad < learned ? " and others" : "");
        return;
    }
}

/* What came back in rates->excess, of one part. */
static besa_result besa__check_excess(const besa_rates *rates, int part, int64_t excess, besa_error *error)
{
    if (excess == 0) return BESA_OK;
    if (excess < 0) {
        char text[160];
        besa__describe_rates(rates, text, sizeof text);
        return besa__fail(error, BESA_ERROR_NOT_FINITE, "rates are not finite: %s", text);
    }
    int64_t count = besa__rates_count(rates, part);
    int first = 0;
    while (rates->layer[first].part != part) first++;
    return besa__fail(error, BESA_ERROR_TARGET, "target asks for %lld pruned weights%s%s, but %lld weights are zero already",
                      (long long)count, rates->parts > 1 ? " of the part that begins with " : "",
                      rates->parts > 1 ? rates->masks->layer[first].name : "", (long long)(count + excess));
}

/* d and mean: as the device has them after the last step. */
static besa_result besa__check_status(const besa_rates *rates, double d, float mean, besa_error *error)
{
    char text[160];
    if (besa__is_finite(d) && besa__is_finite(mean)) return BESA_OK;
    besa__describe_rates(rates, text, sizeof text);
    return besa__fail(error, BESA_ERROR_NOT_FINITE, "%s not finite: %s", besa__is_finite(d) ? "the mean rate is"
                      : besa__is_finite(mean) ? "Prodigy's d is" : "the mean rate and Prodigy's d are", text);
}

/* The error of a projection; weights that are not finite are told of first. Waits for the device. */
static besa_result besa__check_projection(besa_rates *rates)
{
    besa_backend *be = rates->masks->be;
    int64_t excess;
    BESA__TRY(besa__masks_check(rates->masks));
    BESA__TRY(be->download(be, BESA_QUEUE_COMPUTE, &excess, rates->excess, sizeof excess));
    BESA__TRY(be->synchronize(be, BESA_QUEUE_COMPUTE));
    return besa__check_excess(rates, 0, excess, &be->error);
}

/* Another target for the passes to come, from the next reset on. */
static void besa__rates_retarget(besa_rates *rates)
{
    rates->tilt = rates->options->zero_start ? 0 : besa__solve_tilt(rates->options->target, rates->options->candidates);
    for (int i = 0; rates->layer && i < rates->masks->count; i++) rates->layer[i].shape.tilt = rates->tilt;
}

/* Rates of these masks, whose theta will be a part of these parameters; nothing is placed yet. options: checked, with
 * their defaults. */
static void besa__rates_init(besa_rates *rates, besa__masks *masks, besa__parameters *parameters,
                             const besa_rate_options *options)
{
    memset(rates, 0, sizeof *rates);
    rates->masks = masks;
    rates->parameters = parameters;
    rates->options = options;
    rates->parts = 1;
    besa__rates_retarget(rates);
}

/* ============================================================================================
 * // >>layer-functions       the public functions of level 3
 * ============================================================================================
 * Masks, parameters and rates of the caller's layers in one allocation, with a workspace of their own. */

typedef struct besa__rates_owner {
    besa_rates rates;                           /* first: besa_rates is all that the caller sees */
    besa__masks masks;
    besa__parameters parameters;
    besa_rate_options options;
    void *memory;                               /* device */
} besa__rates_owner;

static besa_result besa__check_layers(const besa_layer_shape *layers, int count, besa_error *error)
{
    if (count < 1) return besa__fail(error, BESA_ERROR_OPTION, "count of layers is %d, expected 1 or more", count);
    for (int i = 0; i < count; i++)
        if (layers[i].rows < 1 || layers[i].columns < 1 || layers[i].rows > INT32_MAX || layers[i].columns > INT32_MAX)
            return besa__fail(error, BESA_ERROR_OPTION, "layer %d is %lld x %lld, expected 1 .. 2^31 - 1 each way", i,
                              (long long)layers[i].rows, (long long)layers[i].columns);
        else if (layers[i].rows > ((int64_t)1 << 48) / layers[i].columns || (unsigned)layers[i].dtype > BESA_BF16)
            return besa__fail(error, BESA_ERROR_OPTION, "layer %d is %lld x %lld of dtype %d: expected 2^48 weights at most "
                              "and a value of besa_dtype", i, (long long)layers[i].rows, (long long)layers[i].columns,
                              (int)layers[i].dtype);
    return BESA_OK;
}

static besa_workload besa__layers_workload(const besa_layer_shape *layers, int count)
{
    besa_workload work;
    memset(&work, 0, sizeof work);
    for (int i = 0; i < count; i++) {
        work.rows = besa__max(work.rows, layers[i].rows);
        work.columns = besa__max(work.columns, layers[i].columns);
    }
    return work;
}

/* Everything besa_rates_create allocates on the device; with memory NULL this only counts. The layers' structs lie behind
 * the owner's. */
static uint64_t besa__rates_layout(besa__rates_owner *o, besa_backend *be, const besa_layer_shape *layers, int count,
                                 void *memory)
{
    besa__mask_layer *mask_layer = (besa__mask_layer *)(void *)(o + 1);
    besa_workload work = besa__layers_workload(layers, count);
    besa__arena arena;
    arena.base = (unsigned char *)memory;
    arena.used = 0;
    besa__parameters_init(&o->parameters, be, o->options.optimizer, o->options.lr, &o->options);
    besa__masks_place(&o->masks, be, mask_layer, layers, count, &arena);
    besa__rates_place(&o->rates, (besa__rate_layer *)(void *)(mask_layer + count), &arena);
    besa__parameters_place(&o->parameters, &arena);
    work.rate_logits = o->options.candidates + 1;
    work.projected_rows = o->masks.rows;
    o->rates.workspace_bytes = be->workspace_size(be, &work);
    o->rates.workspace = besa__take(&arena, o->rates.workspace_bytes);
    return arena.used;
}

/* The owner and its layers' structs, laid out on nothing; *bytes: what it wants on the device. */
static besa_result besa__rates_make(besa__rates_owner **owner, besa_backend *be, const besa_layer_shape *layers, int count,
                                    const besa_rate_options *options, uint64_t *bytes, besa_error *error)
{
    besa_rate_options filled = *options;
    void *memory;
    BESA__TRY(besa__check_backend(be, error));
    BESA__TRY(besa__check_layers(layers, count, error));
    BESA__TRY(besa__rate_defaults(&filled, error));
    BESA__TRY(besa__check_penalty(&filled, error));
    uint64_t layer_bytes = besa__bytes(count, sizeof(besa__mask_layer) + sizeof(besa__rate_layer));
    BESA__TRY(besa__malloc(&memory, besa__add_sizes(sizeof **owner, layer_bytes), "rates", error));
    besa__rates_owner *o = *owner = (besa__rates_owner *)memset(memory, 0, sizeof **owner);
    o->options = filled;
    besa__rates_init(&o->rates, &o->masks, &o->parameters, &o->options);
    *bytes = besa__rates_layout(o, be, layers, count, NULL);
    return BESA_OK;
}

BESA_API size_t besa_rates_size(besa_backend *be, const besa_layer_shape *layers, int count,
                                const besa_rate_options *options)
{
    besa__rates_owner *owner;
    uint64_t bytes;
    if (besa__rates_make(&owner, be, layers, count, options, &bytes, NULL) != BESA_OK) return 0;
    BESA_FREE(owner);
    return besa__size(bytes);
}

/* Every public function on rates begins with enter and ends with leave: between them operations use the rates' own
 * workspace, after them the caller's again. */
static besa__workspace besa__rates_enter(besa_rates *rates)
{
    besa_backend *be = rates->masks->be;
    be->error.code = BESA_OK;                   /* a failure that an earlier call has told of is not this one's */
    return rates->workspace ? besa__use_workspace(be, rates->workspace, rates->workspace_bytes)
                            : besa__use_workspace(be, be->workspace, be->workspace_bytes);
}

static besa_result besa__rates_leave(besa_rates *rates, besa__workspace callers, besa_result result, besa_error *error)
{
    besa_backend *be = rates->masks->be;
    besa__use_workspace(be, callers.memory, callers.bytes);
    return besa__pass_error(be, result, error);
}

/* Everything as before the first step. */
static besa_result besa__owner_reset(besa_rates *rates)
{
    BESA__TRY(besa__masks_reset(rates->masks));
    BESA__TRY(besa__parameters_reset(rates->parameters));
    return besa__rates_reset(rates);
}

/* Once after placing: what never changes, and the first reset. */
static besa_result besa__owner_start(besa_rates *rates)
{
    BESA__TRY(besa__parameters_start(rates->parameters));
    BESA__TRY(besa__rates_start(rates));
    return besa__owner_reset(rates);
}

BESA_API besa_result besa_rates_create(besa_rates **rates, besa_backend *be, const besa_layer_shape *layers,
                                       int count, const besa_rate_options *options, besa_error *error)
{
    besa__rates_owner *o;
    uint64_t bytes;
    *rates = NULL;
    BESA__TRY(besa__rates_make(&o, be, layers, count, options, &bytes, error));
    besa_result result = besa__check_size(bytes, "these rates", error);
    if (result == BESA_OK) result = besa__pass_error(be, be->alloc(be, &o->memory, (size_t)bytes), error);
    if (result == BESA_OK) {
        besa__rates_layout(o, be, layers, count, o->memory);
        besa__workspace callers = besa__rates_enter(&o->rates);
        result = besa__rates_leave(&o->rates, callers, besa__owner_start(&o->rates), error);
    }
    if (result != BESA_OK) besa_rates_destroy(&o->rates);
    else *rates = &o->rates;
    return result;
}

BESA_API void besa_rates_destroy(besa_rates *rates)
{
    if (!rates) return;
    besa__rates_owner *o = (besa__rates_owner *)(void *)rates;
    besa_backend *be = rates->masks->be;
    if (o->memory) besa__settle(be);
    if (o->memory) be->free(be, o->memory);
    BESA_FREE(o);
}

static besa_result besa__check_layer(const besa_rates *rates, int layer, int ranked, besa_error *error)
{
    if (layer < 0 || layer >= rates->masks->count)
        return besa__fail(error, BESA_ERROR_OPTION, "layer is %d, expected 0 .. %d", layer, rates->masks->count - 1);
    if (ranked && !rates->masks->layer[layer].ranked)
        return besa__fail(error, BESA_ERROR_OPTION, "layer %d has no ranks yet: call besa_rates_rank first", layer);
    return BESA_OK;
}

/* Neither the weights of a call nor its other array may be NULL. */
static besa_result besa__check_arrays(const void *w, const void *other, const char *name, besa_error *error)
{
    return w && other ? BESA_OK : besa__fail(error, BESA_ERROR_OPTION, "%s is NULL", w ? name : "w");
}

BESA_API besa_result besa_rates_rank(besa_rates *rates, int layer, const void *w, besa_importance importance,
                                     const float *statistic, float *scratch, besa_error *error)
{
    BESA__TRY(besa__check_layer(rates, layer, 0, error));
    if ((unsigned)importance >= BESA_IMPORTANCE_COUNT)
        return besa__fail(error, BESA_ERROR_OPTION, "importance is %d, expected a value of besa_importance", (int)importance);
    const besa__importance *row = besa__importance_row(importance);
    if (row->gradient != 0)
        return besa__fail(error, BESA_ERROR_OPTION, "importance is %s, which needs gradients of a whole block: expected one of "
                          "the others, or besa_pruner_run", row->name);
    BESA__TRY(besa__check_arrays(w, scratch, "scratch", error));
    if (row->statistic != BESA_STATISTIC_NONE && !statistic)
        return besa__fail(error, BESA_ERROR_OPTION, "statistic is NULL, which the importance %s needs", row->name);
    const besa_layer_shape *shape = &rates->masks->layer[layer].shape;
    int64_t weights = shape->rows * shape->columns;
    float *scale = row->statistic != BESA_STATISTIC_NONE ? scratch + weights : NULL;
    besa__scoring by = {row->power, scale, NULL, row->relative ? scratch + weights + shape->columns : NULL};
    besa_result result = BESA_OK;
    besa__workspace callers = besa__rates_enter(rates);
    if (scale) result = besa__importance_scale(rates->masks->be, scale, statistic, importance, shape->columns);
    if (result == BESA_OK) result = besa__masks_rank(rates->masks, layer, w, &by, scratch, weights);
    if (result == BESA_OK) result = besa__masks_zeros(rates->masks, layer, w);
    return besa__rates_leave(rates, callers, result, error);
}

BESA_API besa_result besa_rates_fix(besa_rates *rates, int layer, double sparsity, besa_error *error)
{
    BESA__TRY(besa__check_layer(rates, layer, 0, error));
    if (!(sparsity < 1))
        return besa__fail(error, BESA_ERROR_OPTION, "sparsity of a fixed layer is %g, expected below 1", sparsity);
    if (rates->parameters->step.step > 0)
        return besa__fail(error, BESA_ERROR_OPTION, "layer %d is fixed after %lld steps, expected before the first: call "
                          "besa_rates_reset", layer, (long long)rates->parameters->step.step);
    besa__workspace callers = besa__rates_enter(rates);
    besa_result result = besa__masks_fix(rates->masks, layer, sparsity);
    if (result == BESA_OK) result = besa__rates_fix(rates, layer);
    return besa__rates_leave(rates, callers, result, error);
}

BESA_API besa_result besa_rates_reset(besa_rates *rates, besa_error *error)
{
    besa__workspace callers = besa__rates_enter(rates);
    return besa__rates_leave(rates, callers, besa__owner_reset(rates), error);
}

BESA_API besa_result besa_rates_forward(besa_rates *rates, besa_error *error)
{
    besa__workspace callers = besa__rates_enter(rates);
    return besa__rates_leave(rates, callers, besa__rates_forward(rates), error);
}

BESA_API besa_result besa_rates_mask(besa_rates *rates, int layer, const void *w, void *pruned, besa_error *error)
{
    BESA__TRY(besa__check_layer(rates, layer, 1, error));
    BESA__TRY(besa__check_arrays(w, pruned, "pruned", error));
    besa__workspace callers = besa__rates_enter(rates);
    return besa__rates_leave(rates, callers, besa__masks_apply(rates->masks, layer, w, pruned), error);
}

BESA_API besa_result besa_rates_gradient(besa_rates *rates, int layer, const void *w, const float *dw,
                                         besa_error *error)
{
    BESA__TRY(besa__check_layer(rates, layer, 1, error));
    BESA__TRY(besa__check_arrays(w, dw, "dw", error));
    besa__workspace callers = besa__rates_enter(rates);
    besa_result result = besa__rates_gradient(rates, layer, w, 0, rates->layer[layer].shape.rows, dw, BESA_F32);
    return besa__rates_leave(rates, callers, result, error);
}

BESA_API besa_result besa_rates_backward(besa_rates *rates, besa_error *error)
{
    besa__workspace callers = besa__rates_enter(rates);
    return besa__rates_leave(rates, callers, besa__rates_backward(rates), error);
}

BESA_API besa_result besa_rates_optimize(besa_rates *rates, besa_error *error)
{
    besa__workspace callers = besa__rates_enter(rates);
    return besa__rates_leave(rates, callers, besa__parameters_step(rates->parameters), error);
}

BESA_API besa_result besa_rates_step(besa_rates *rates, besa_error *error)
{
    BESA__TRY(besa_rates_backward(rates, error));
    return besa_rates_optimize(rates, error);
}

BESA_API int64_t besa_rates_parameters(besa_rates *rates, float **theta, float **grad)
{
    if (theta) *theta = rates->parameters->step.theta;
    if (grad) *grad = rates->parameters->grad;
    return rates->parameters->step.n;
}

BESA_API besa_result besa_rates_project(besa_rates *rates, besa_error *error)
{
    for (int i = 0; i < rates->masks->count; i++) BESA__TRY(besa__check_layer(rates, i, 1, error));
    besa__workspace callers = besa__rates_enter(rates);
    besa_result result = besa__rates_project(rates);
    if (result == BESA_OK) result = besa__check_projection(rates);
    return besa__rates_leave(rates, callers, result, error);
}

BESA_API besa_result besa_rates_read(besa_rates *rates, int layer, float *alpha, int32_t *n, besa_error *error)
{
    BESA__TRY(besa__check_layer(rates, layer, 0, error));
    const besa__mask_layer *mask = &rates->masks->layer[layer];
    besa_backend *be = rates->masks->be;
    besa_result result = BESA_OK;
    size_t rows = (size_t)mask->shape.rows;
    if (alpha) result = be->download(be, BESA_QUEUE_COMPUTE, alpha, rates->layer[layer].alpha, rows * sizeof(float));
    if (n && result == BESA_OK) result = be->download(be, BESA_QUEUE_COMPUTE, n, mask->n, rows * sizeof(int32_t));
    if (result == BESA_OK) result = be->synchronize(be, BESA_QUEUE_COMPUTE);
    for (size_t r = 0; alpha && mask->fixed >= 0 && r < rows; r++) alpha[r] = (float)mask->fixed;
    return besa__pass_error(be, result, error);
}

BESA_API besa_result besa_rates_status(besa_rates *rates, double *d, double *mean_rate, besa_error *error)
{
    besa_backend *be = rates->masks->be;
    double scalars[BESA_OPTIMIZER_SCALARS];
    float mean;
    besa_result result = be->download(be, BESA_QUEUE_COMPUTE, scalars, rates->parameters->step.scalars, sizeof scalars);
    if (result == BESA_OK) result = be->download(be, BESA_QUEUE_COMPUTE, &mean, rates->mean, sizeof mean);
    if (result == BESA_OK) result = be->synchronize(be, BESA_QUEUE_COMPUTE);
    if (result == BESA_OK) result = besa__masks_check(rates->masks);
    if (result != BESA_OK) return besa__pass_error(be, result, error);
    BESA__TRY(besa__check_status(rates, scalars[0], mean, error));
    if (d) *d = scalars[0];
    if (mean_rate) *mean_rate = (double)mean;
    return BESA_OK;
}

/* lambda ((S - t) / t)^2, of all parts; waits. */
static besa_result besa__rates_penalty(const besa_rates *rates, double *penalty, besa_error *error)
{
    besa_backend *be = rates->masks->be;
    float mean[BESA_LAYERS];
    double target = rates->options->target;
    BESA__TRY(besa__pass_error(be, be->download(be, BESA_QUEUE_COMPUTE, mean, rates->part_mean, (size_t)rates->parts * sizeof *mean), error));
    BESA__TRY(besa__pass_error(be, be->synchronize(be, BESA_QUEUE_COMPUTE), error));
    *penalty = 0;
    for (int i = 0; i < rates->parts; i++) {
        double off = ((double)mean[i] - target) / target;
        *penalty += rates->options->penalty * off * off;
    }
    return BESA_OK;
}

BESA_API besa_result besa_step_trace(const besa_step *step, besa_trace *trace, besa_error *error)
{
    besa_backend *be = step->be;
    float loss = 0;
    trace->penalty = trace->mean_rate = trace->d = (double)NAN;
    BESA__TRY(besa__pass_error(be, be->download(be, BESA_QUEUE_COMPUTE, &loss, step->loss, sizeof loss), error));
    BESA__TRY(besa__pass_error(be, be->synchronize(be, BESA_QUEUE_COMPUTE), error));
    trace->loss = (double)loss;
    if (!step->rates) return BESA_OK;
    BESA__TRY(besa_rates_status(step->rates, &trace->d, &trace->mean_rate, error));
    return besa__rates_penalty(step->rates, &trace->penalty, error);
}

/* ============================================================================================
 * // >>weights               kept weights that learn
 * ============================================================================================
 * Owns weights that move along the gradient where they are not pruned: a float copy of each layer's, with Adam's moments.
 * Adam moves every weight by about its learning rate, whatever the gradient's size (a weight that comes back begins with
 * the moments that it went with, and for some steps moves by a few times that: moments of all weights did no better).
 * Where the C inputs of an output agree, a step of r changes it by r C |x|, and it is of the size rms(W) sqrt(C) |x|: in
 * units of rms(W) / sqrt(C), of the dense weights, one learning rate suits all layers and models. The forward pass reads
 * them masked and rounded to the checkpoint's dtype, and the gradient there counts as that of the float copy. Pruned
 * weights keep their values, which are what ranks are made of and masks applied to: they may come back.
 * Norms and biases, a block's vectors, move likewise, but have no mask. A norm's weight scales a column of the layers
 * behind it: in units of rms / sqrt(count) of the norm, a step changes that column by the share by which one of the weights
 * changes it. A bias is the weight of an input that is 1, and has the unit of its layer's weights. */

typedef struct besa__weight_layer {
    int64_t count, columns;                     /* R C, C */
    besa_dtype dtype;
    float *value, *m, *v;                       /* (R,C) */
    void *source;                               /* (R,C) value in the dtype; value itself where that is float */
    float *rms;                                 /* (1) */
} besa__weight_layer;

typedef struct besa__vector {
    int64_t count, columns;                     /* columns: of the unit of the learning rate */
    besa_dtype dtype;                           /* of the checkpoint's tensor */
    float offset;                               /* of the vector above what that tensor holds */
    const float *dense;                         /* (count) as the block came; NULL: it has none, or vectors do not learn */
    float *value;                               /* (count) what the block reads: w rounded to the dtype */
    float *w, *m, *v, *grad;                    /* (count) */
    float *rms;                                 /* (1) of the norm, or of the bias's layer */
} besa__vector;

typedef struct besa__weights {
    besa_backend *be;
    besa__weight_layer layer[BESA_LAYERS];
    besa__vector vector[BESA_VECTORS];
    void *rounded;                              /* the longest vector in 16 bits, on its way from w to value */
    double lr, warmup;
    int64_t step, steps;                        /* how many there have been, and will be */
} besa__weights;

static void besa__weights_place(besa__weights *weights, const besa_block_shape *shape, besa_dtype dtype, besa__arena *arena)
{
    for (int i = 0; i < BESA_LAYERS; i++) {
        besa__weight_layer *layer = &weights->layer[i];
        int64_t rows, columns;
        besa_block_layer(shape, i, &rows, &columns);
        layer->count = besa__product(rows, columns);
        layer->columns = columns;
        layer->dtype = dtype;
        layer->value = besa__take_floats(arena, layer->count);
        layer->m = besa__take_floats(arena, layer->count);
        layer->v = besa__take_floats(arena, layer->count);
        layer->source = dtype == BESA_F32 ? layer->value
                        : besa__take(arena, besa__bytes(layer->count, besa_dtype_size(dtype)));
        layer->rms = besa__take_floats(arena, 1);
    }
}

/* Before the first step: the weights w (R,C) of a layer, whose dense weights give the unit of the learning rate. */
static besa_result besa__weights_reset(besa__weights *weights, int index, const void *w, const void *dense)
{
    besa__weight_layer *layer = &weights->layer[index];
    besa_backend *be = weights->be;
    size_t bytes = (size_t)layer->count * sizeof(float);
    weights->step = 0;
    BESA__TRY(be->convert(be, layer->value, BESA_F32, dense, layer->dtype, layer->count));
    BESA__TRY(be->rms(be, layer->rms, layer->value, layer->count));
    BESA__TRY(be->convert(be, layer->value, BESA_F32, w, layer->dtype, layer->count));
    if (layer->source != layer->value)
        BESA__TRY(be->copy(be, BESA_QUEUE_COMPUTE, layer->source, w, (size_t)layer->count * besa_dtype_size(layer->dtype)));
    BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, layer->m, bytes));
    return be->zero(be, BESA_QUEUE_COMPUTE, layer->v, bytes);
}

static void besa__vectors_place(besa__weights *weights, const besa_block_shape *shape, besa__arena *arena)
{
    int64_t longest = 0;
    for (int i = 0; i < BESA_VECTORS; i++) {
        besa__vector *vector = &weights->vector[i];
        vector->count = besa__vector_count(shape, i);
        vector->columns = i < BESA_LAYERS ? weights->layer[i].columns : vector->count;
        if (vector->count == 0) continue;
        vector->value = besa__take_floats(arena, vector->count);
        vector->w = besa__take_floats(arena, vector->count);
        vector->m = besa__take_floats(arena, vector->count);
        vector->v = besa__take_floats(arena, vector->count);
        vector->grad = besa__take_floats(arena, vector->count);
        vector->rms = i < BESA_LAYERS ? weights->layer[i].rms : besa__take_floats(arena, 1);
        longest = besa__max(longest, vector->count);
    }
    weights->rounded = besa__take(arena, besa__bytes(longest, sizeof(uint16_t)));
}

/* Before anything reads them: all as the block came. */
static besa_result besa__vectors_reset(besa__weights *weights)
{
    besa_backend *be = weights->be;
    for (int i = 0; i < BESA_VECTORS; i++) {
        const besa__vector *vector = &weights->vector[i];
        size_t bytes = (size_t)vector->count * sizeof(float);
        if (!vector->dense) continue;
        BESA__TRY(be->copy(be, BESA_QUEUE_COMPUTE, vector->value, vector->dense, bytes));
        BESA__TRY(be->copy(be, BESA_QUEUE_COMPUTE, vector->w, vector->dense, bytes));
        BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, vector->m, bytes));
        BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, vector->v, bytes));
        if (i >= BESA_LAYERS) BESA__TRY(be->rms(be, vector->rms, vector->dense, vector->count));
    }
    return BESA_OK;
}

/* What every step of a pass over weights or vectors has in common; lr in units of rms / sqrt(columns). */
static besa_weight_step besa__weights_step(const besa__weights *weights, int64_t columns)
{
    besa_weight_step o;
    memset(&o, 0, sizeof o);
    o.lr = weights->lr / sqrt((double)columns) *
           besa__schedule_factor(BESA_SCHEDULE_COSINE, weights->warmup, weights->step, weights->steps);
    o.beta1 = 0.9, o.beta2 = 0.999, o.eps = 1e-12;
    o.step = weights->step;
    return o;
}

/* value = w, as the tensor would hold it in its dtype. */
static besa_result besa__vector_round(besa__weights *weights, const besa__vector *vector)
{
    besa_backend *be = weights->be;
    const float *from = vector->w;
    if (vector->offset != 0.0f) {
        BESA__TRY(be->copy(be, BESA_QUEUE_COMPUTE, vector->value, vector->w, (size_t)vector->count * sizeof(float)));
        BESA__TRY(be->shift(be, vector->value, -vector->offset, vector->count));
        from = vector->value;
    }
    const void *rounded = vector->dtype == BESA_F32 ? (const void *)from : weights->rounded;
    if (rounded != from) BESA__TRY(be->convert(be, weights->rounded, vector->dtype, from, BESA_F32, vector->count));
    if (rounded != vector->value) BESA__TRY(be->convert(be, vector->value, BESA_F32, rounded, vector->dtype, vector->count));
    return vector->offset != 0.0f ? be->shift(be, vector->value, vector->offset, vector->count) : BESA_OK;
}

/* Move the norms and biases along their gradients. */
static besa_result besa__vectors_move(besa__weights *weights)
{
    besa_backend *be = weights->be;
    for (int i = 0; i < BESA_VECTORS; i++) {
        const besa__vector *vector = &weights->vector[i];
        besa_weight_step o = besa__weights_step(weights, vector->columns);
        if (!vector->dense) continue;
        o.n = vector->count;
        o.w = vector->w, o.m = vector->m, o.v = vector->v;
        o.grad = vector->grad;
        o.rms = vector->rms;
        BESA__TRY(be->weight_step(be, &o));
        BESA__TRY(besa__vector_round(weights, vector));
    }
    return BESA_OK;
}

/* Move `count` kept weights of a layer from `first` on, in `masked` (R,C) too, along grad (count). */
static besa_result besa__weights_move(besa__weights *weights, int index, int64_t first, int64_t count, const float *grad,
                                      void *masked)
{
    const besa__weight_layer *layer = &weights->layer[index];
    besa_weight_step o = besa__weights_step(weights, layer->columns);
    o.n = count;
    o.w = layer->value + first, o.m = layer->m + first, o.v = layer->v + first;
    o.grad = grad;
    o.rms = layer->rms;
    o.dtype = layer->dtype;
    o.masked = besa__at(masked, layer->dtype, first);
    o.source = besa__at(layer->source, layer->dtype, first);
    return weights->be->weight_step(weights->be, &o);
}

/* ============================================================================================
 * // >>quantization          kept weights on grids of few levels
 * ============================================================================================
 * Owns the grids that kept weights are put on, with the paper's learned clipping (section 3.3 there; OmniQuant, arXiv
 * 2308.13137). A group of columns of a row, max and min the largest and smallest of its dense weights and 0, has
 *     h = (g0 max - g1 min) / (2^bits - 1),   z = -round(g1 min / h),   Q(w) = h (clamp(round(w / h) + z, 0, 2^bits - 1) - z),
 * and 0 is a level: pruned weights, masked before, stay 0. g0 and g1 are sigmoids of logits that begin at 4, or 1 where
 * clips do not learn. Backward, rounding is passed straight through and z is constant, and masked weights, being on their level
 * at any h, take no part. Other sections make and learn masked weights W M as without bits; the forward pass reads Q(W M). */

#define BESA__CLIP_START 4.0f                   /* sigmoid: 0.982 */

typedef struct besa__quantization {
    besa_backend *be;
    int learns;                                 /* the clips do */
    besa_dtype dtype;
    besa__parameters clips;                     /* logits, (R,G,2) of one layer after the other */
    besa_quantizer layer[BESA_LAYERS];
    float *range[BESA_LAYERS];                  /* (R,G,2) */
    int64_t first[BESA_LAYERS];                 /* parameter; negative: none */
    void *masked[BESA_LAYERS];                  /* (R,C) W M */
} besa__quantization;

/* Groups of all rows of a layer. */
static int64_t besa__grids(const besa_quantizer *q)
{
    return besa__product(q->rows, besa__parts(q->columns, q->group));
}

/* AdamW for the logits, with steps of their own. Gradients are 1e-8 and below, and so must eps be. */
static void besa__clips_init(besa__quantization *q, double lr, int64_t steps)
{
    besa_rate_options o;
    memset(&o, 0, sizeof o);
    o.schedule = BESA_SCHEDULE_COSINE;
    o.steps = steps;
    o.beta1 = 0.9, o.beta2 = 0.999;
    besa__parameters_init(&q->clips, q->be, BESA_ADAMW, lr, &o);
    q->clips.step.eps = 1e-16;
}

/* Place everything; with arena->base NULL this only counts. group: 0 for whole rows. */
static void besa__quantization_place(besa__quantization *q, const besa_block_shape *shape, besa_dtype dtype, int bits,
                                     int64_t group, double lr, int64_t steps, besa__arena *arena)
{
    q->dtype = dtype;
    besa__clips_init(q, lr, steps);
    for (int i = 0; i < BESA_LAYERS; i++) {
        besa_quantizer *layer = &q->layer[i];
        besa_block_layer(shape, i, &layer->rows, &layer->columns);
        layer->bits = bits;
        layer->group = group == 0 || group > layer->columns ? layer->columns : group;
        int64_t grids = besa__grids(layer);
        layer->range = q->range[i] = besa__take_floats(arena, besa__product(2, grids));
        layer->scale = besa__take_floats(arena, grids);
        layer->zero = besa__take_floats(arena, grids);
        q->masked[i] = besa__take(arena, besa__bytes(besa__product(layer->rows, layer->columns), besa_dtype_size(dtype)));
        q->first[i] = q->learns ? besa__parameters_reserve(&q->clips, besa__product(2, grids)) : -1;
    }
    if (!q->learns) return;
    besa__parameters_place(&q->clips, arena);
    if (!arena->base) return;
    for (int i = 0; i < BESA_LAYERS; i++) q->layer[i].logit = besa__parameters_at(q->clips.step.theta, q->first[i]);
}

/* Once after placing. Waits for the device. */
static besa_result besa__quantization_start(besa__quantization *q)
{
    if (!q->learns) return BESA_OK;
    BESA__TRY(besa__parameters_start(&q->clips));
    return q->be->fill(q->be, (int32_t *)q->clips.theta0, (int32_t)besa__float_bits(BESA__CLIP_START), q->clips.step.n);
}

/* Every layer's grids, as the clips are now. */
static besa_result besa__quantization_grids(const besa__quantization *q)
{
    for (int i = 0; i < BESA_LAYERS; i++) BESA__TRY(q->be->quantize_grid(q->be, &q->layer[i]));
    return BESA_OK;
}

/* Before a block's masks are chosen: grids of its dense weights, clips as they begin. */
static besa_result besa__quantization_reset(besa__quantization *q, const void *const dense[BESA_LAYERS])
{
    besa_backend *be = q->be;
    if (q->learns) BESA__TRY(besa__parameters_reset(&q->clips));
    for (int i = 0; i < BESA_LAYERS; i++) {
        const besa_quantizer *layer = &q->layer[i];
        BESA__TRY(be->quantize_range(be, q->range[i], dense[i], q->dtype, layer->group, layer->rows, layer->columns));
    }
    return besa__quantization_grids(q);
}

/* The grids of `rows` rows from `first` on. */
static besa_quantizer besa__quantizer_rows(const besa_quantizer *q, int64_t first, int64_t rows)
{
    besa_quantizer some = *q;
    int64_t at = first * besa__parts(q->columns, q->group);
    some.rows = rows;
    some.range += 2 * at;
    some.scale += at;
    some.zero += at;
    if (some.logit) some.logit += 2 * at;
    return some;
}

/* `rows` rows of levels (R,C) from `first` on = those of w (R,C) on their grids. */
static besa_result besa__quantize(const besa__quantization *q, int index, void *levels, const void *w, int64_t first,
                                  int64_t rows)
{
    besa_quantizer some = besa__quantizer_rows(&q->layer[index], first, rows);
    int64_t at = first * some.columns;
    return q->be->quantize(q->be, besa__at(levels, q->dtype, at), besa__at_const(w, q->dtype, at), q->dtype, &some);
}

/* Before the first gradient of a step. */
static besa_result besa__clips_clear(const besa__quantization *q)
{
    return q->be->zero(q->be, BESA_QUEUE_COMPUTE, q->clips.grad, (size_t)q->clips.step.n * sizeof(float));
}

/* Add to the clips' gradient from dw (rows, C), that of `rows` rows of a layer from `first` on. */
static besa_result besa__clips_gradient(const besa__quantization *q, int index, int64_t first, int64_t rows, const float *dw)
{
    besa_quantizer some = besa__quantizer_rows(&q->layer[index], first, rows);
    float *grad = q->clips.grad + (some.logit - q->clips.step.theta);
    return q->be->quantize_gradient(q->be, grad, dw, besa__at_const(q->masked[index], q->dtype, first * some.columns), q->dtype,
                                    &some);
}

/* One step of the clips, and the grids that they make. */
static besa_result besa__clips_step(besa__quantization *q)
{
    BESA__TRY(besa__parameters_step(&q->clips));
    return besa__quantization_grids(q);
}

/* ============================================================================================
 * // >>block                 one decoder block, forward and backward (level 2)
 * ============================================================================================
 * Owns the order of the pieces and which buffer holds what; the pieces themselves are backend operations.
 *
 *   a = rmsnorm(x; g1)     q, k, v = a Wq', a Wk', a Wv'     q, k = rope(norm(q)), rope(norm(k))
 *   attn = softmax_causal(q k' / sqrt(dh)) v                 h1 = x + attn Wo'
 *   m = rmsnorm(h1; g2)    z = silu(m Wg') * (m Wu')         y = h1 + z Wd'
 *
 * and as the shape has it otherwise: no norm of x and h1, but one of attn Wo' and z Wd' before they are added, or both;
 * these times residual_scale; gelu for silu; no rope; other scores, see besa_attention_shape. */

/* Whether sequences of different lengths are turned differently. */
BESA__UNUSED static int besa__rope_by_length(const besa_rope *rope)
{
    return rope->type == BESA_ROPE_DYNAMIC || rope->type == BESA_ROPE_LONGROPE;
}

/* The share of pair i that yarn stretches (arXiv 2309.00071): 0 to the pair that turns beta_fast times over the original
 * length, 1 from the one that turns beta_slow times, a ramp between them. */
static double besa__yarn_share(const besa_rope *rope, int64_t pair, int64_t head_dim)
{
    double whole = rope->original_max_position_embeddings / 6.283185307179586, scale = 2 * log(rope->theta);
    double low = (double)head_dim * log(whole / rope->beta_fast) / scale;
    double high = (double)head_dim * log(whole / rope->beta_slow) / scale;
    low = fmax(rope->no_truncate ? low : floor(low), 0);
    high = fmin(rope->no_truncate ? high : ceil(high), (double)(head_dim - 1));
    double width = high - low != 0 ? high - low : 0.001;
    return fmin(fmax(((double)pair - low) / width, 0), 1);
}

/* The wavelength of pair i is 2 pi theta^(2 i / dh). llama3 and yarn stretch long wavelengths by `factor`, leave short ones
 * and blend between; dynamic raises theta for sequences that are longer than those in training; longrope
 * stretches each wavelength by a factor of its own (arXiv 2402.13753). */
static double besa__inverse_frequency(const besa_rope *rope, int64_t pair, int64_t head_dim, int64_t seqlen)
{
    double f = pow(rope->theta, -2.0 * (double)pair / (double)head_dim);
    double longer = (double)seqlen / rope->original_max_position_embeddings; /* of dynamic, longrope */
    if (rope->type == BESA_ROPE_LONGROPE) return f / (double)(longer > 1 ? rope->long_factor : rope->short_factor)[pair];
    if (rope->type == BESA_ROPE_LINEAR) return f / rope->factor;
    if (rope->type == BESA_ROPE_DEFAULT || (rope->type == BESA_ROPE_DYNAMIC && longer <= 1)) return f;
    if (rope->type == BESA_ROPE_DYNAMIC)
        return f * pow(rope->factor * longer - (rope->factor - 1), -2.0 * (double)pair / (double)(head_dim - 2));
    double turns = rope->original_max_position_embeddings * f / 6.283185307179586; /* over the original context */
    if (rope->type == BESA_ROPE_LLAMA3 && turns < rope->low_freq_factor) return f / rope->factor;
    if (rope->type == BESA_ROPE_LLAMA3 && turns > rope->high_freq_factor) return f;
    double smooth = (turns - rope->low_freq_factor) / (rope->high_freq_factor - rope->low_freq_factor);
    if (rope->type == BESA_ROPE_YARN) smooth = 1 - besa__yarn_share(rope, pair, head_dim);
    return (1 - smooth) * f / rope->factor + smooth * f;
}

/* Elements of a head that are turned. */
static int64_t besa__rotary_dim(const besa_block_shape *s) { return s->rotary_dim ? s->rotary_dim : s->head_dim; }

BESA_API void besa_rope_table(const besa_block_shape *shape, int64_t seqlen, float *cosine, float *sine)
{
    int64_t half = besa__rotary_dim(shape) / 2;
    double scale = shape->rope.attention_factor != 0 ? shape->rope.attention_factor : 1;
    for (int64_t i = 0; i < half; i++) {
        float f = (float)besa__inverse_frequency(&shape->rope, i, 2 * half, seqlen);
        for (int64_t t = 0; t < seqlen; t++) {
            double angle = (double)((float)t * f); /* in float, as the models were trained */
            cosine[t * half + i] = (float)(scale * cos(angle));
            sine[t * half + i] = (float)(scale * sin(angle));
        }
    }
}

BESA_API besa_workload besa_block_workload(const besa_block_shape *shape, int64_t batch, int64_t seqlen)
{
    besa_workload work;
    memset(&work, 0, sizeof work);
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(shape, i, &rows, &columns);
        if (rows > work.rows) work.rows = rows;
        if (columns > work.columns) work.columns = columns;
    }
    work.tokens = besa__product(batch, seqlen);
    work.seqlen = seqlen;
    work.num_attention_heads = shape->num_attention_heads;
    work.num_key_value_heads = shape->num_key_value_heads;
    work.head_dim = shape->head_dim;
    return work;
}

static int64_t besa__largest_layer(const besa_block_shape *shape)
{
    int64_t most = 0, rows, columns;
    for (int i = 0; i < BESA_LAYERS; i++) {
        besa_block_layer(shape, i, &rows, &columns);
        most = besa__max(most, besa__product(rows, columns));
    }
    return most;
}

/* Whether what a sublayer puts out is more than added. */
static int besa__has_tail(const besa_block_shape *s) { return s->norms != BESA_NORMS_IN || s->residual_scale != 0; }

static float besa__residual_scale(const besa_block_shape *s)
{
    return s->residual_scale != 0 ? (float)s->residual_scale : 1.0f;
}

/* Place the activations of `tokens` tokens; with room for dw_count floats of a weight's gradient, 0: forward only. */
static void besa__activations_place(besa_activations *acts, besa__arena *arena, besa_dtype dtype,
                                    const besa_block_shape *s, int qk_norm, int64_t tokens, int64_t dw_count)
{
    uint64_t e = besa__bytes(tokens, besa_dtype_size(dtype));
    uint64_t d = besa__multiply_sizes(e, (uint64_t)s->hidden_size), i = besa__multiply_sizes(e, (uint64_t)s->intermediate_size);
    uint64_t q = besa__multiply_sizes(e, (uint64_t)besa__product(s->num_attention_heads, s->head_dim));
    uint64_t kv = besa__multiply_sizes(e, (uint64_t)besa__product(s->num_key_value_heads, s->head_dim));
    memset(acts, 0, sizeof *acts);
    acts->a = besa__take(arena, d);
    acts->q = besa__take(arena, q);
    acts->k = besa__take(arena, kv);
    acts->v = besa__take(arena, kv);
    acts->attn = besa__take(arena, q);
    acts->h1 = besa__take(arena, d);
    acts->m = besa__take(arena, d);
    acts->gate = besa__take(arena, i);
    acts->up = besa__take(arena, i);
    acts->z = besa__take(arena, i);
    acts->inv_rms1 = besa__take_floats(arena, tokens);
    acts->inv_rms2 = besa__take_floats(arena, tokens);
    if (besa__has_tail(s)) acts->tail = besa__take(arena, d);
    if (s->norms != BESA_NORMS_IN) {
        acts->out1 = besa__take(arena, d);
        acts->out2 = besa__take(arena, d);
        acts->inv_rms1_out = besa__take_floats(arena, tokens);
        acts->inv_rms2_out = besa__take_floats(arena, tokens);
    }
    if (qk_norm) {
        acts->q_raw = besa__take(arena, q);
        acts->k_raw = besa__take(arena, kv);
        acts->inv_rms_q = besa__take_floats(arena, besa__product(tokens, s->num_attention_heads));
        acts->inv_rms_k = besa__take_floats(arena, besa__product(tokens, s->num_key_value_heads));
    }
    if (dw_count == 0) return;
    acts->dz = besa__take(arena, i);
    acts->dm = besa__take(arena, d);
    acts->dattn = besa__take(arena, q);
    acts->dq = besa__take(arena, q);
    acts->dk = besa__take(arena, kv);
    acts->dv = besa__take(arena, kv);
    acts->dw = besa__take_floats(arena, dw_count);
    acts->dw_count = dw_count;
}

BESA_API size_t besa_activations_size(const besa_backend *be, const besa_block_shape *shape, int qk_norm,
                                      int64_t tokens, int backward)
{
    besa_activations acts;
    besa__arena arena = {NULL, 0};
    besa__activations_place(&acts, &arena, be->activation_dtype, shape, qk_norm, tokens,
                            backward ? besa__largest_layer(shape) : 0);
    return besa__size(arena.used);
}

BESA_API void besa_activations_init(besa_activations *acts, void *device, const besa_backend *be,
                                    const besa_block_shape *shape, int qk_norm, int64_t tokens, int backward)
{
    besa__arena arena;
    arena.base = (unsigned char *)device;
    arena.used = 0;
    besa__activations_place(acts, &arena, be->activation_dtype, shape, qk_norm, tokens,
                            backward ? besa__largest_layer(shape) : 0);
}

/* y = x W' of one layer of the block, or y += */
static besa_result besa__layer_forward(besa_backend *be, const besa_block *b, int layer, void *y, const void *x,
                                       int64_t tokens, int accumulate)
{
    int64_t rows, columns;
    besa_block_layer(&b->shape, layer, &rows, &columns);
    return be->linear_forward(be, y, x, b->weight[layer], b->dtype, b->bias[layer], tokens, rows, columns, accumulate);
}

static besa_result besa__layer_backward_input(besa_backend *be, const besa_block *b, int layer, void *dx, const void *dy,
                                              int64_t tokens, int accumulate)
{
    int64_t rows, columns;
    besa_block_layer(&b->shape, layer, &rows, &columns);
    return be->linear_backward_input(be, dx, dy, b->weight[layer], b->dtype, tokens, rows, columns, accumulate);
}

static besa_attention_shape besa__attention_shape(const besa_block_shape *shape, int64_t batch, int64_t seqlen)
{
    besa_attention_shape s;
    s.batch = batch;
    s.seqlen = seqlen;
    s.num_attention_heads = shape->num_attention_heads;
    s.num_key_value_heads = shape->num_key_value_heads;
    s.head_dim = shape->head_dim;
    s.sliding_window = shape->sliding_window;
    s.scale = (float)shape->attention_scale;
    s.softcap = (float)shape->attention_softcap;
    return s;
}

/* Rope of q and k, or dq and dk. */
static besa_result besa__rope(besa_backend *be, const besa_block *b, void *q, void *k, int64_t tokens, int64_t seqlen,
                              int direction)
{
    const besa_block_shape *s = &b->shape;
    int64_t turned = besa__rotary_dim(s);
    if (s->no_rope) return BESA_OK;
    BESA__TRY(be->rope(be, q, b->rope_cos, b->rope_sin, tokens, seqlen, s->num_attention_heads, s->head_dim, turned, direction));
    return be->rope(be, k, b->rope_cos, b->rope_sin, tokens, seqlen, s->num_key_value_heads, s->head_dim, turned, direction);
}

/* Rows of a norm of q or k, and their width. */
static void besa__qk_norm_sizes(const besa_block_shape *s, int64_t heads, int64_t tokens, int64_t *n, int64_t *d)
{
    *n = s->qk_norm_whole ? tokens : tokens * heads;
    *d = s->qk_norm_whole ? heads * s->head_dim : s->head_dim;
}

/* y = rmsnorm(x), or x where there is no norm g. */
static besa_result besa__norm_in(besa_backend *be, const besa_block *b, void *y, float *inv_rms, const void *x, const float *g,
                                 int64_t tokens)
{
    int64_t d = b->shape.hidden_size;
    if (g) return be->rmsnorm_forward(be, y, inv_rms, x, g, tokens, d, (float)b->shape.rms_norm_eps);
    return be->copy(be, BESA_QUEUE_COMPUTE, y, x, besa_dtype_size(be->activation_dtype) * (size_t)(tokens * d));
}

/* y = x + what a sublayer puts out, whose last layer, o or down, reads z. y may be x. */
static besa_result besa__sublayer_out(besa_backend *be, const besa_block *b, besa_activations *acts, int layer, void *y,
                                      const void *x, const void *z, int64_t tokens)
{
    const besa_block_shape *s = &b->shape;
    int64_t d = s->hidden_size;
    if (!besa__has_tail(s)) {
        size_t bytes = besa_dtype_size(be->activation_dtype) * (size_t)(tokens * d);
        if (y != x) BESA__TRY(be->copy(be, BESA_QUEUE_COMPUTE, y, x, bytes));
        return besa__layer_forward(be, b, layer, y, z, tokens, 1);
    }
    void *out = s->norms == BESA_NORMS_IN ? acts->tail : layer == BESA_O ? acts->out1 : acts->out2;
    BESA__TRY(besa__layer_forward(be, b, layer, out, z, tokens, 0));
    if (s->norms != BESA_NORMS_IN)
        BESA__TRY(be->rmsnorm_forward(be, acts->tail, layer == BESA_O ? acts->inv_rms1_out : acts->inv_rms2_out, out,
                                      layer == BESA_O ? b->norm1_out : b->norm2_out, tokens, d, (float)s->rms_norm_eps));
    return be->residual(be, y, x, acts->tail, besa__residual_scale(s), tokens * d);
}

/* q, k, v from a = rmsnorm(x), with the q/k norms where the model has them, and rope. */
static besa_result besa__qkv_forward(besa_backend *be, const besa_block *b, besa_activations *acts, int64_t tokens,
                                     int64_t seqlen)
{
    const besa_block_shape *s = &b->shape;
    int64_t n, d;
    float eps = (float)s->rms_norm_eps;
    void *q = b->q_norm ? acts->q_raw : acts->q, *k = b->k_norm ? acts->k_raw : acts->k;
    BESA__TRY(besa__layer_forward(be, b, BESA_Q, q, acts->a, tokens, 0));
    BESA__TRY(besa__layer_forward(be, b, BESA_K, k, acts->a, tokens, 0));
    BESA__TRY(besa__layer_forward(be, b, BESA_V, acts->v, acts->a, tokens, 0));
    besa__qk_norm_sizes(s, s->num_attention_heads, tokens, &n, &d);
    if (b->q_norm) BESA__TRY(be->rmsnorm_forward(be, acts->q, acts->inv_rms_q, q, b->q_norm, n, d, eps));
    besa__qk_norm_sizes(s, s->num_key_value_heads, tokens, &n, &d);
    if (b->k_norm) BESA__TRY(be->rmsnorm_forward(be, acts->k, acts->inv_rms_k, k, b->k_norm, n, d, eps));
    return besa__rope(be, b, acts->q, acts->k, tokens, seqlen, 1);
}

/* m = rmsnorm(h1) and z = silu(m Wg') * (m Wu'). */
static besa_result besa__mlp_forward(besa_backend *be, const besa_block *b, besa_activations *acts, const void *h1,
                                     int64_t tokens)
{
    int64_t n = tokens * b->shape.intermediate_size;
    BESA__TRY(besa__norm_in(be, b, acts->m, acts->inv_rms2, h1, b->norm2, tokens));
    BESA__TRY(besa__layer_forward(be, b, BESA_GATE, acts->gate, acts->m, tokens, 0));
    BESA__TRY(besa__layer_forward(be, b, BESA_UP, acts->up, acts->m, tokens, 0));
    return (b->shape.gelu ? be->geglu_forward : be->swiglu_forward)(be, acts->z, acts->gate, acts->up, n);
}

/* h1 = x + attn Wo', with the attention layers' inputs on the way; may be x. */
static besa_result besa__attention_half(besa_backend *be, const besa_block *b, besa_activations *acts, const void *x, void *h1,
                                        int64_t batch, int64_t seqlen)
{
    int64_t tokens = batch * seqlen;
    besa_attention_shape attention = besa__attention_shape(&b->shape, batch, seqlen);
    BESA__TRY(besa__norm_in(be, b, acts->a, acts->inv_rms1, x, b->norm1, tokens));
    BESA__TRY(besa__qkv_forward(be, b, acts, tokens, seqlen));
    BESA__TRY(be->attention_forward(be, acts->attn, acts->q, acts->k, acts->v, &attention));
    return besa__sublayer_out(be, b, acts, BESA_O, h1, x, acts->attn, tokens);
}

/* y NULL: stop after the layers' inputs. keep 1: leave h1 in acts for a backward pass; 0: y holds h1 on the way, which
 * saves a copy. */
static besa_result besa__block_forward(besa_backend *be, const besa_block *b, besa_activations *acts, const void *x,
                                       void *y, int64_t batch, int64_t seqlen, int keep)
{
    int64_t tokens = batch * seqlen;
    void *h1 = keep || !y ? acts->h1 : y;
    BESA__TRY(besa__attention_half(be, b, acts, x, h1, batch, seqlen));
    BESA__TRY(besa__mlp_forward(be, b, acts, h1, tokens));
    return y ? besa__sublayer_out(be, b, acts, BESA_DOWN, y, h1, acts->z, tokens) : BESA_OK;
}

/* What the backward pass needs at every layer. */
typedef struct besa__backward {
    besa_backend *be;
    const besa_block *block;
    besa_activations *acts;
    int64_t batch, seqlen, tokens;
    unsigned layers;                            /* bit i: layer i's gradient is wanted */
    besa_weight_gradient gradient;
    besa_result (*at_h1)(void *user, void *dh1); /* for a second loss, at h1 (in acts): adds its derivative to dh1 (T, d),
                                                   act, or puts it in its place; NULL: none */
    void *user;                                 /* of both */
} besa__backward;

/* A backward pass through a block, of all gradients; the batch is set apart. A layer's gradient is handed out when the
 * layer's weights have been read for the last time. */
static besa__backward besa__backward_of(besa_backend *be, const besa_block *block, besa_activations *acts, int64_t seqlen)
{
    besa__backward p;
    memset(&p, 0, sizeof p);
    p.be = be;
    p.block = block;
    p.acts = acts;
    p.seqlen = seqlen;
    p.layers = (1u << BESA_LAYERS) - 1;
    return p;
}

static void besa__backward_batch(besa__backward *p, int64_t batch)
{
    p->batch = batch;
    p->tokens = batch * p->seqlen;
}

/* The gradient of a norm's weight, where it is wanted, from dy and the norm's inputs x (n, d). */
static besa_result besa__norm_gradient(const besa__backward *p, int vector, const void *dy, const void *x,
                                       const float *inv_rms, int64_t n, int64_t d)
{
    float *sum = p->acts->dvector[vector];
    return sum ? p->be->column_sum(p->be, sum, dy, x, inv_rms, n, d) : BESA_OK;
}

/* dW = dy' x of one layer, handed to the caller in pieces of as many rows as there is room for; and that of its bias. */
static besa_result besa__layer_gradient(const besa__backward *p, int layer, const void *dy, const void *x)
{
    int64_t rows, columns;
    if (!(p->layers >> layer & 1u)) return BESA_OK;
    besa_block_layer(&p->block->shape, layer, &rows, &columns);
    float *sum = p->acts->dw_sum[layer], *bias = p->block->bias[layer] ? p->acts->dvector[layer] : NULL;
    if (bias) BESA__TRY(p->be->column_sum(p->be, bias, dy, NULL, NULL, p->tokens, rows));
    if (sum) return p->be->linear_backward_weight(p->be, sum, BESA_F32, dy, x, p->tokens, rows, columns, 0, rows, 1);
    int64_t piece = besa__min(rows, p->acts->dw_count / columns);
    BESA_ASSERT(piece > 0);
    if (piece < rows && piece > 128) piece = piece / 128 * 128; /* whole tiles of the product */
    for (int64_t first = 0, count; first < rows; first += count) {
        count = besa__min(piece, rows - first);
        BESA__TRY(p->be->linear_backward_weight(p->be, p->acts->dw, p->acts->dw_dtype, dy, x, p->tokens, rows, columns, first,
                                                count, 0));
        BESA__TRY(p->gradient(p->user, layer, first, count, p->acts->dw));
    }
    return BESA_OK;
}

/* From dy, where a sublayer's output has been added, to *dout, where its last layer, o or down, puts it out: dy itself, or
 * acts->tail. */
static besa_result besa__sublayer_back(const besa__backward *p, int layer, const void *dy, const void **dout)
{
    besa_backend *be = p->be;
    const besa_block *b = p->block;
    const besa_block_shape *s = &b->shape;
    besa_activations *acts = p->acts;
    int64_t d = s->hidden_size;
    const void *out = layer == BESA_O ? acts->out1 : acts->out2;
    const float *inv_rms = layer == BESA_O ? acts->inv_rms1_out : acts->inv_rms2_out;
    *dout = dy;
    if (s->residual_scale != 0) {
        *dout = acts->tail;
        BESA__TRY(be->residual(be, acts->tail, NULL, dy, (float)s->residual_scale, p->tokens * d));
    }
    if (s->norms == BESA_NORMS_IN) return BESA_OK;
    const float *g = layer == BESA_O ? b->norm1_out : b->norm2_out;
    BESA__TRY(besa__norm_gradient(p, layer == BESA_O ? BESA_NORM1_OUT : BESA_NORM2_OUT, *dout, out, inv_rms, p->tokens, d));
    BESA__TRY(be->rmsnorm_backward(be, acts->tail, *dout, out, g, inv_rms, p->tokens, d, 0));
    *dout = acts->tail;
    return BESA_OK;
}

/* dx += what dm, at the inputs of a sublayer's layers, is at the sublayer's: through the norm g of x, or as it is. */
static besa_result besa__norm_in_backward(const besa__backward *p, void *dx, const void *dm, const void *x, const float *g,
                                          const float *inv_rms)
{
    int64_t d = p->block->shape.hidden_size;
    if (!g) return p->be->residual(p->be, dx, dx, dm, 1.0f, p->tokens * d);
    return p->be->rmsnorm_backward(p->be, dx, dm, x, g, inv_rms, p->tokens, d, 1);
}

/* From dy at the block's output to dy at h1; gate and up become their own gradients. */
static besa_result besa__mlp_backward(const besa__backward *p, void *dy)
{
    besa_backend *be = p->be;
    const besa_block *b = p->block;
    besa_activations *acts = p->acts;
    int64_t d = b->shape.hidden_size, n = p->tokens * b->shape.intermediate_size;
    const void *dout;
    BESA__TRY(besa__sublayer_back(p, BESA_DOWN, dy, &dout));
    BESA__TRY(besa__layer_backward_input(be, b, BESA_DOWN, acts->dz, dout, p->tokens, 0));
    BESA__TRY(besa__layer_gradient(p, BESA_DOWN, dout, acts->z));
    BESA__TRY((b->shape.gelu ? be->geglu_backward : be->swiglu_backward)(be, acts->gate, acts->up, acts->dz, acts->gate,
                                                                         acts->up, n));
    BESA__TRY(besa__layer_backward_input(be, b, BESA_GATE, acts->dm, acts->gate, p->tokens, 0));
    BESA__TRY(besa__layer_backward_input(be, b, BESA_UP, acts->dm, acts->up, p->tokens, 1));
    BESA__TRY(besa__layer_gradient(p, BESA_GATE, acts->gate, acts->m));
    BESA__TRY(besa__layer_gradient(p, BESA_UP, acts->up, acts->m));
    if (b->norm2) BESA__TRY(besa__norm_gradient(p, BESA_NORM2, acts->dm, acts->h1, acts->inv_rms2, p->tokens, d));
    return besa__norm_in_backward(p, dy, acts->dm, acts->h1, b->norm2, acts->inv_rms2);
}

/* From dattn to the gradients of q, k and v; dq, dk, dv are left at the projections' outputs. */
static besa_result besa__attention_backward(const besa__backward *p)
{
    besa_backend *be = p->be;
    const besa_block *b = p->block;
    const besa_block_shape *s = &b->shape;
    besa_activations *acts = p->acts;
    int64_t n, d;
    besa_attention_shape attention = besa__attention_shape(s, p->batch, p->seqlen);
    BESA__TRY(be->attention_backward(be, acts->dq, acts->dk, acts->dv, acts->dattn, acts->q, acts->k, acts->v,
                                     &attention));
    BESA__TRY(besa__rope(be, b, acts->dq, acts->dk, p->tokens, p->seqlen, -1));
    besa__qk_norm_sizes(s, s->num_attention_heads, p->tokens, &n, &d);
    if (b->q_norm) {
        BESA__TRY(besa__norm_gradient(p, BESA_Q_NORM, acts->dq, acts->q_raw, acts->inv_rms_q, n, d));
        BESA__TRY(be->rmsnorm_backward(be, acts->dq, acts->dq, acts->q_raw, b->q_norm, acts->inv_rms_q, n, d, 0));
    }
    besa__qk_norm_sizes(s, s->num_key_value_heads, p->tokens, &n, &d);
    if (b->k_norm) {
        BESA__TRY(besa__norm_gradient(p, BESA_K_NORM, acts->dk, acts->k_raw, acts->inv_rms_k, n, d));
        BESA__TRY(be->rmsnorm_backward(be, acts->dk, acts->dk, acts->k_raw, b->k_norm, acts->inv_rms_k, n, d, 0));
    }
    return BESA_OK;
}

/* The gradient through q, k and v: of the first norm's weight, and dx = dy + that through the norm where dx is not NULL. */
static besa_result besa__input_backward(const besa__backward *p, const void *x, const void *dy, void *dx)
{
    besa_backend *be = p->be;
    const besa_block *b = p->block;
    besa_activations *acts = p->acts;
    int64_t d = b->shape.hidden_size;
    BESA__TRY(besa__layer_backward_input(be, b, BESA_Q, acts->dm, acts->dq, p->tokens, 0));
    BESA__TRY(besa__layer_backward_input(be, b, BESA_K, acts->dm, acts->dk, p->tokens, 1));
    BESA__TRY(besa__layer_backward_input(be, b, BESA_V, acts->dm, acts->dv, p->tokens, 1));
    if (b->norm1) BESA__TRY(besa__norm_gradient(p, BESA_NORM1, acts->dm, x, acts->inv_rms1, p->tokens, d));
    if (!dx) return BESA_OK;
    BESA__TRY(be->copy(be, BESA_QUEUE_COMPUTE, dx, dy, besa_dtype_size(be->activation_dtype) * (size_t)(p->tokens * d)));
    return besa__norm_in_backward(p, dx, acts->dm, x, b->norm1, acts->inv_rms1);
}

static besa_result besa__block_backward(const besa__backward *p, const void *x, void *dy, void *dx)
{
    const unsigned qkv = 1u << BESA_Q | 1u << BESA_K | 1u << BESA_V;
    float *const *wanted = p->acts->dvector;
    BESA__TRY(besa__mlp_backward(p, dy)); /* dy has come to h1 */
    if (p->at_h1) BESA__TRY(p->at_h1(p->user, dy));
    int further = dx || (p->layers & qkv) || wanted[BESA_NORM1] || wanted[BESA_Q_NORM] || wanted[BESA_K_NORM];
    const void *dout;
    BESA__TRY(besa__sublayer_back(p, BESA_O, dy, &dout));
    if (further) BESA__TRY(besa__layer_backward_input(p->be, p->block, BESA_O, p->acts->dattn, dout, p->tokens, 0));
    BESA__TRY(besa__layer_gradient(p, BESA_O, dout, p->acts->attn));
    if (!further) return BESA_OK;
    BESA__TRY(besa__attention_backward(p));
    if (dx || wanted[BESA_NORM1]) BESA__TRY(besa__input_backward(p, x, dy, dx));
    BESA__TRY(besa__layer_gradient(p, BESA_Q, p->acts->dq, p->acts->a));
    BESA__TRY(besa__layer_gradient(p, BESA_K, p->acts->dk, p->acts->a));
    return besa__layer_gradient(p, BESA_V, p->acts->dv, p->acts->a);
}

BESA_API besa_result besa_block_forward(besa_backend *be, const besa_block *block, besa_activations *acts,
                                        const void *x, void *y, int64_t batch, int64_t seqlen, besa_error *error)
{
    return besa__pass_error(be, besa__block_forward(be, block, acts, x, y, batch, seqlen, 1), error);
}

BESA_API besa_result besa_block_backward(besa_backend *be, const besa_block *block, besa_activations *acts,
                                         const void *x, void *dy, void *dx, int64_t batch, int64_t seqlen,
                                         besa_weight_gradient gradient, void *user, besa_error *error)
{
    besa__backward pass = besa__backward_of(be, block, acts, seqlen);
    besa__backward_batch(&pass, batch);
    pass.gradient = gradient;
    pass.user = user;
    be->error.code = BESA_OK;
    return besa__pass_error(be, besa__block_backward(&pass, x, dy, dx), error);
}

/* ============================================================================================
 * // >>streams               activations of all sequences, on the device or streamed from the host
 * ============================================================================================
 * Owns where the activations of a set of sequences lie. Passes walk over them in chunks: open, compute, close. A
 * resident stream is one array on the device. A streamed one lies in pinned host memory and comes through two slots on
 * the device: while one is computed on, the next chunk is on its way up and the last on its way home. */

/* How many sequences the chunk that begins at `first` has. */
typedef int64_t (*besa__cut)(const void *cutter, int64_t first);

/* A walk in chunks:  for (besa__walk w = besa__walk_over(...); besa__walk_next(&w);)  sees chunk after chunk. */
typedef struct besa__walk {
    besa__cut cut;
    const void *cutter;
    int64_t end, again;                         /* where it ends, and where the next one will begin; again -1: nowhere */
    int64_t first, count;                       /* the sequences of this chunk */
    int64_t next_first, next_count;             /* of the chunk after it, which can be sent for; next_count 0: none */
} besa__walk;

/* Over sequences first .. end - 1. */
static besa__walk besa__walk_over(besa__cut cut, const void *cutter, int64_t first, int64_t end, int64_t again)
{
    besa__walk w;
    memset(&w, 0, sizeof w);
    w.cut = cut;
    w.cutter = cutter;
    w.end = end;
    w.again = again;
    w.next_first = first;
    return w;
}

/* On to the next chunk; 0: there is none. */
static int besa__walk_next(besa__walk *w)
{
    w->first = w->count ? w->first + w->count : w->next_first;
    if (w->first >= w->end) return 0;
    w->count = besa__min(w->cut(w->cutter, w->first), w->end - w->first);
    w->next_first = w->first + w->count < w->end ? w->first + w->count : w->again;
    w->next_count = w->next_first < 0 ? 0 : w->cut(w->cutter, w->next_first);
    return 1;
}

enum { BESA__STREAM_EVENTS = 6 };               /* of each slot: it is filled, computed on, home */

typedef struct besa__stream {
    besa_backend *be;
    int64_t count, seqlen, width;               /* (count, seqlen, width) act */
    int64_t micro_batch;                        /* most sequences at a time */
    int streamed, event;                        /* event: the first of BESA__STREAM_EVENTS */
    void *x;                                    /* all of it: device, or host where streamed */
    void *slot[2];                              /* (micro_batch, seqlen, width) device, where streamed */
    int64_t first[2], held[2];                  /* the sequences in a slot; held 0: none */
    int open;                                   /* the slot that was opened last */
} besa__stream;

static void besa__stream_init(besa__stream *s, besa_backend *be, int event, int64_t count, int64_t seqlen, int64_t width)
{
    memset(s, 0, sizeof *s);
    s->be = be;
    s->count = s->micro_batch = count;
    s->seqlen = seqlen;
    s->width = width;
    s->event = event;
    BESA_ASSERT(event + BESA__STREAM_EVENTS <= BESA_EVENT_COUNT);
}

static int besa__stream_filled(const besa__stream *s, int slot) { return s->event + slot; }
static int besa__stream_computed(const besa__stream *s, int slot) { return s->event + 2 + slot; }
static int besa__stream_home(const besa__stream *s, int slot) { return s->event + 4 + slot; }

/* Bytes of so many sequences. */
static uint64_t besa__stream_bytes(const besa__stream *s, int64_t sequences)
{
    return besa__bytes(besa__product(besa__product(sequences, s->seqlen), s->width), besa_dtype_size(s->be->activation_dtype));
}

/* Sequence `index` of an array like the stream's. */
static void *besa__stream_at(const besa__stream *s, void *x, int64_t index)
{
    return besa__at(x, s->be->activation_dtype, index * s->seqlen * s->width);
}

/* Chunks as large as the stream admits. */
static int64_t besa__stream_cut(const void *stream, int64_t first)
{
    const besa__stream *s = (const besa__stream *)stream;
    return besa__min(s->micro_batch, s->count - first);
}

/* Over all of it; again: where the next walk will begin, or -1. */
BESA__UNUSED static besa__walk besa__stream_walk(const besa__stream *s, int64_t again)
{
    return besa__walk_over(besa__stream_cut, s, 0, s->count, again);
}

/* Let it live on the host, or not. Up to two chunks always fit the device: the slots would take as much. */
static void besa__stream_send(besa__stream *s, int to_host, int64_t micro_batch)
{
    s->streamed = to_host && s->count > 2 * micro_batch;
}

static void besa__stream_place(besa__stream *s, besa__arena *device, besa__arena *host)
{
    uint64_t all = besa__stream_bytes(s, s->count), chunk = besa__stream_bytes(s, besa__min(s->micro_batch, s->count));
    s->x = besa__take(s->streamed ? host : device, all);
    for (int i = 0; i < 2; i++) s->slot[i] = s->streamed ? besa__take(device, chunk) : NULL;
}

/* Send a chunk on its way up into a slot: after what computes on the slot, and after both slots' last downloads, as the
 * chunk may be what they brought home. */
static besa_result besa__stream_fetch(besa__stream *s, int slot, int64_t first, int64_t count)
{
    besa_backend *be = s->be;
    BESA__TRY(be->wait(be, BESA_QUEUE_UPLOAD, besa__stream_computed(s, slot)));
    for (int i = 0; i < 2; i++) BESA__TRY(be->wait(be, BESA_QUEUE_UPLOAD, besa__stream_home(s, i)));
    BESA__TRY(be->upload(be, BESA_QUEUE_UPLOAD, s->slot[slot], besa__stream_at(s, s->x, first),
                         (size_t)besa__stream_bytes(s, count)));
    s->first[slot] = first;
    s->held[slot] = count;
    return be->record(be, BESA_QUEUE_UPLOAD, besa__stream_filled(s, slot));
}

/* The slot that holds the chunk, or -1. */
static int besa__stream_find(const besa__stream *s, int64_t first, int64_t count)
{
    for (int i = 0; i < 2; i++)
        if (s->held[i] == count && s->first[i] == first) return i;
    return -1;
}

/* *x = the walk's chunk, on the device until close. The chunk after it is sent for in advance, as far as the stream has
 * it. A chunk that is found in its slot may still be on its way home. */
static besa_result besa__stream_open(besa__stream *s, const besa__walk *w, void **x)
{
    besa_backend *be = s->be;
    *x = besa__stream_at(s, s->x, w->first);
    if (!s->streamed) return BESA_OK;
    int slot = besa__stream_find(s, w->first, w->count);
    if (slot < 0) BESA__TRY(besa__stream_fetch(s, slot = 1 - s->open, w->first, w->count));
    BESA__TRY(be->wait(be, BESA_QUEUE_COMPUTE, besa__stream_filled(s, slot)));
    BESA__TRY(be->wait(be, BESA_QUEUE_COMPUTE, besa__stream_home(s, slot))); /* x may be written to */
    s->open = slot;
    *x = s->slot[slot];
    int64_t next = w->next_first + w->next_count <= s->count ? w->next_count : 0;
    if (next < 1 || besa__stream_find(s, w->next_first, next) >= 0) return BESA_OK;
    return besa__stream_fetch(s, 1 - slot, w->next_first, next);
}

/* The same for a chunk that will be overwritten: what it holds does not matter. */
static besa_result besa__stream_begin(besa__stream *s, const besa__walk *w, void **x)
{
    besa_backend *be = s->be;
    *x = besa__stream_at(s, s->x, w->first);
    if (!s->streamed) return BESA_OK;
    s->open = 1 - s->open;
    s->first[s->open] = w->first;
    s->held[s->open] = w->count;
    *x = s->slot[s->open];
    BESA__TRY(be->wait(be, BESA_QUEUE_COMPUTE, besa__stream_filled(s, s->open)));
    return be->wait(be, BESA_QUEUE_COMPUTE, besa__stream_home(s, s->open));
}

/* The open chunk is computed on; changed: it is other than it was, and goes home. */
static besa_result besa__stream_close(besa__stream *s, int changed)
{
    besa_backend *be = s->be;
    int slot = s->open, other = 1 - slot;
    if (!s->streamed) return BESA_OK;
    BESA__TRY(be->record(be, BESA_QUEUE_COMPUTE, besa__stream_computed(s, slot)));
    if (!changed) return BESA_OK;
    if (s->first[other] < s->first[slot] + s->held[slot] && s->first[slot] < s->first[other] + s->held[other])
        s->held[other] = 0; /* it has become out of date */
    BESA__TRY(be->wait(be, BESA_QUEUE_DOWNLOAD, besa__stream_computed(s, slot)));
    BESA__TRY(be->download(be, BESA_QUEUE_DOWNLOAD, besa__stream_at(s, s->x, s->first[slot]), s->slot[slot],
                           (size_t)besa__stream_bytes(s, s->held[slot])));
    return be->record(be, BESA_QUEUE_DOWNLOAD, besa__stream_home(s, slot));
}

/* All of it through a block, in the walk's chunks: X = F(W, X). */
BESA__UNUSED static besa_result besa__stream_forward(besa__stream *s, besa__walk walk, const besa_block *block,
                                                     besa_activations *acts)
{
    while (besa__walk_next(&walk)) {
        void *x;
        BESA__TRY(besa__stream_open(s, &walk, &x));
        BESA__TRY(besa__block_forward(s->be, block, acts, x, x, walk.count, s->seqlen, 0));
        BESA__TRY(besa__stream_close(s, 1));
    }
    return BESA_OK;
}

/* ============================================================================================
 * // >>comm                  several processes: whose sequences are which, what is summed over all
 * ============================================================================================
 * Owns how a run's sequences are shared by ranks, and all calls of a besa_comm. Of every batch of the optimiser each rank has
 * a share, so that a step sees the same sequences however many ranks there are; where nothing learns, of all sequences. What
 * is not in this list every rank computes by itself, all alike, from weights and sums that are the same everywhere:
 *
 *     dense pass   channel norms of the references; sums of squares or Gram matrices   besa__reduce_statistics
 *                  of the layers' inputs (also for besa_outliers)
 *     learn pass   squares of single sequences' gradients, where scores see them       besa__rank_by_gradients
 *                  bucket sums, each layer's beside the rest of the backward pass      besa__learn_complete
 *                  dL/dWhat itself where weights learn: bucket sums and clips then     besa__learn_gradient
 *                  follow from it
 *                  the step's loss; gradients of clips, norms and biases               besa__reduce_step
 *     all passes   losses that the report shows                                        besa__report_loss, besa__commit_pass
 *     a block      whether all ranks have come to the same                             besa__same_results
 *     level 1      arguments, blocks done, micro-batch, weights of finished blocks,
 *                  log-likelihoods of test windows: broadcasts of host memory          sections run, head and prune */

enum { BESA__EVENT_SUMS = BESA_EVENT_COUNT - 2, BESA__EVENT_REDUCED }; /* data is there; reductions are done */

/* A run's sequences and this rank's among them. */
typedef struct besa__shares {
    const besa_comm *comm;                      /* NULL: one process */
    int64_t all, unit;                          /* sequences of all ranks; of every `unit` of them each rank has a share */
} besa__shares;

static int besa__ranks(const besa_comm *comm) { return comm ? comm->size : 1; }

/* A rank's share of n things that follow one another, and where it begins: the first ranks have one more. */
static int64_t besa__share_of(const besa_comm *comm, int64_t n)
{
    return comm ? n / comm->size + (comm->rank < n % comm->size) : n;
}

static int64_t besa__share_first(const besa_comm *comm, int64_t n)
{
    return comm ? comm->rank * (n / comm->size) + besa__min(comm->rank, n % comm->size) : 0;
}

/* How many of the first n sequences are this rank's. */
static int64_t besa__local_count(const besa__shares *s, int64_t n)
{
    int64_t unit = n / s->unit, size = besa__min(s->unit, s->all - unit * s->unit);
    int64_t in_unit = n % s->unit - besa__share_first(s->comm, size);
    return unit * besa__share_of(s->comm, s->unit) + besa__max(0, besa__min(in_unit, besa__share_of(s->comm, size)));
}

/* The number among all of this rank's sequence `index`. */
static int64_t besa__global_sequence(const besa__shares *s, int64_t index)
{
    int64_t share = besa__share_of(s->comm, s->unit), unit = index / share;
    return unit * s->unit + besa__share_first(s->comm, besa__min(s->unit, s->all - unit * s->unit)) + index % share;
}

/* How many of this rank's from `index` on follow one another among all, at least. */
BESA__UNUSED static int64_t besa__following(const besa__shares *s, int64_t index)
{
    int64_t share = besa__share_of(s->comm, s->unit);
    return share - index % share;
}

/* Sequences of the rank that has the most, which is the first. */
static int64_t besa__largest_share(const besa__shares *s)
{
    int64_t ranks = besa__ranks(s->comm);
    return s->all / s->unit * besa__parts(s->unit, ranks) + besa__parts(s->all % s->unit, ranks);
}

/* batch: of the optimiser; 0: nothing learns. */
static besa_result besa__shares_init(besa__shares *s, const besa_comm *comm, int64_t nsamples, int64_t batch, besa_error *error)
{
    int64_t last = batch ? nsamples % batch : 0;
    memset(s, 0, sizeof *s);
    s->all = nsamples;
    s->unit = batch ? batch : nsamples;
    if (!comm) return BESA_OK;
    if (comm->size < 1 || comm->rank < 0 || comm->rank >= comm->size)
        return besa__fail(error, BESA_ERROR_OPTION, "comm has rank %d of %d, expected 0 .. size - 1", comm->rank, comm->size);
    if (comm->size == 1) return BESA_OK;
    if (!comm->reduce || !comm->broadcast || !comm->barrier || !comm->fail)
        return besa__fail(error, BESA_ERROR_OPTION, "comm lacks reduce, broadcast, barrier or fail: expected all four");
    s->comm = comm;
    if (nsamples < comm->size)
        return besa__fail(error, BESA_ERROR_OPTION, "%lld calibration sequences for %d processes: expected one for each, or more",
                          (long long)nsamples, comm->size);
    if (batch && batch < comm->size)
        return besa__fail(error, BESA_ERROR_OPTION, "batch_size is %lld, but %d processes share the sequences of a learning step: "
                          "expected batch_size %d (--batch-size) or more", (long long)batch, comm->size, comm->size);
    if (last && last < comm->size)
        return besa__fail(error, BESA_ERROR_OPTION, "batch_size is %lld, and the last batch of %lld sequences has %lld, for %d "
                          "processes: expected one for each; a batch_size (--batch-size) that divides the number of sequences does",
                          (long long)batch, (long long)nsamples, (long long)last, comm->size);
    return BESA_OK;
}

/* Begin to sum data(count) over ranks, once all that compute holds now is done, and beside what it does then; compute must
 * not touch data before besa__reduce_end. */
static besa_result besa__reduce_begin(const besa_comm *comm, besa_backend *be, float *data, int64_t count)
{
    if (!comm) return BESA_OK;
    BESA__TRY(be->record(be, BESA_QUEUE_COMPUTE, BESA__EVENT_SUMS));
    BESA__TRY(be->wait(be, BESA_QUEUE_REDUCE, BESA__EVENT_SUMS));
    BESA__TRY(comm->reduce(comm->user, be, BESA_QUEUE_REDUCE, data, count, &be->error));
    return be->record(be, BESA_QUEUE_REDUCE, BESA__EVENT_REDUCED);
}

/* Compute goes on when all reductions are done. */
static besa_result besa__reduce_end(const besa_comm *comm, besa_backend *be)
{
    return comm ? be->wait(be, BESA_QUEUE_COMPUTE, BESA__EVENT_REDUCED) : BESA_OK;
}

static besa_result besa__reduce(const besa_comm *comm, besa_backend *be, float *data, int64_t count)
{
    BESA__TRY(besa__reduce_begin(comm, be, data, count));
    return besa__reduce_end(comm, be);
}

static besa_result besa__broadcast(const besa_comm *comm, void *data, size_t bytes, int root, besa_error *error)
{
    return comm ? comm->broadcast(comm->user, data, bytes, root, error) : BESA_OK;
}

/* Tell the others that this rank has failed. comm: of the options, not yet checked. */
static void besa__comm_fail(const besa_comm *comm, besa_result result, const besa_error *error)
{
    besa_error unknown;
    if (result == BESA_OK || !comm || comm->size < 2 || !comm->fail) return;
    if (!error) besa__fail(&unknown, result, "%s", besa_result_string(result));
    comm->fail(comm->user, error ? error : &unknown);
}

/* *value = the least of all ranks'. */
static besa_result besa__least(const besa_comm *comm, int64_t *value, besa_error *error)
{
    int64_t mine = *value;
    for (int rank = 0; comm && rank < comm->size; rank++) {
        int64_t theirs = mine;
        BESA__TRY(besa__broadcast(comm, &theirs, sizeof theirs, rank, error));
        *value = besa__min(*value, theirs);
    }
    return BESA_OK;
}

/* Rank 0's hash of something is every rank's; expected: what to do where it is not. */
static besa_result besa__same(const besa_comm *comm, uint64_t hash, const char *what, const char *expected, besa_error *error)
{
    uint64_t first = hash;
    BESA__TRY(besa__broadcast(comm, &first, sizeof first, 0, error));
    if (first == hash) return BESA_OK;
    return besa__fail(error, BESA_ERROR_COMM, "rank %d has other %s than rank 0: expected %s", comm->rank, what, expected);
}

/* ============================================================================================
 * // >>pruner                what pruning one block keeps: options, arrays, progress (level 2)
 * ============================================================================================
 * Owns the memory that the passes over one block share, and how far a run is. The passes are in the sections that follow,
 * their order in section passes. Nothing in a block waits for the device: results come back once, at its end. */

/* Losses: with the uniform mask, before learning, with the final masks, and of what is written, of the sequences that the
 * report shows; the last of the others too; from BESA__LOSS_STEP on one for each learning step, up to BESA__STEP_LOSSES. */
enum { BESA__LOSS_UNIFORM, BESA__LOSS_BEFORE, BESA__LOSS_MASKS, BESA__LOSS_AFTER, BESA__LOSS_REST, BESA__LOSS_STEP };

/* Events of the backend: marks of the passes' ends (section passes), then those of the streams, first this section's. */
enum { BESA__EVENT_MARKS = 0, BESA__EVENT_YREF = 6, BESA__PRUNER_EVENTS = BESA__EVENT_YREF + BESA__STREAM_EVENTS };

#define BESA__REPORT_SEQUENCES 8                /* the report's losses come from the first sequences */
#define BESA__GRADIENT_SEQUENCES 32             /* an importance with gradients takes them from the first sequences: more of
                                                   them did no better */
#define BESA__STEP_LOSSES 65536                 /* losses of learning steps that are kept; later steps share the last one */
#define BESA__SLAB 128                          /* columns that SparseGPT treats together */
#define BESA__REFIT_ROWS 512                    /* rows of a layer that are fitted at a time */
#ifndef BESA__CHUNK_TOKENS
#define BESA__CHUNK_TOKENS 2048                 /* passes without an optimiser go by about so many tokens */
#endif

/* Where a run is, for the progress callback. The unit of work is one forward pass over the calibration tokens. */
typedef struct besa__meter {
    besa_progress_callback callback;
    void *user;
    besa_result (*meanwhile)(void *run, double fraction, besa_error *error); /* what else there is to do while a block
                                                   computes, as far as this fraction of the block; NULL: nothing */
    void *run;
    int64_t block, blocks, first_block;
    double start, began;                        /* clock at the run's start, and at its first_block's */
    besa_pass pass;
    double pass_cost;                           /* of work, of this pass */
    double cost, done;                          /* of this block */
} besa__meter;

enum { BESA__DENSE, BESA__WRITTEN };            /* weights that zeros are counted of */
enum { BESA__COUNT_INPUTS = 2 * BESA_LAYERS, BESA__COUNT_NORMS = BESA__COUNT_INPUTS + BESA__INPUTS, BESA__COUNTS };

/* What comes back of a block, in pinned host memory. */
typedef struct besa__results {
    float mean;
    double scalars[BESA_OPTIMIZER_SCALARS];
    int64_t excess[BESA_LAYERS];                /* of each part of the rates */
    int32_t not_finite[BESA__COUNTS];           /* (2, BESA_LAYERS) of the dense weights, of those written; of the layers'
                                                   inputs' statistics (BESA__INPUTS); of the reference's channel norms */
} besa__results;

struct besa_pruner {
    besa_backend *be;
    besa_prune_options options;                 /* with the defaults filled in */
    besa_block_shape shape;
    besa_dtype dtype, written_dtype;            /* of weights here; of those that the caller makes of the result */
    int qk_norm;
    besa__shares shares;                        /* of the sequences among ranks */
    int64_t nsamples, seqlen, micro_batch, reference; /* this rank's sequences: all, at a time, with a reference output */
    int64_t batch, all_reference;               /* of a batch, this rank's; with a reference, of all ranks */
    int64_t rows;                               /* of all layers */
    besa__meter meter;
    void *memory, *host_memory;                 /* owned; NULL inside larger arenas */
    void *workspace;
    size_t workspace_bytes;
    besa_activations acts;
    besa__masks masks;                          /* of the block's layers; count 0 for methods without ranks */
    besa__mask_layer mask_layer[BESA_LAYERS];
    besa_rates rates;                           /* these three for BESA only */
    besa__rate_layer rate_layer[BESA_LAYERS];
    besa__parameters parameters;                /* theta */
    besa__weights weights;                      /* where kept weights learn */
    besa__quantization quantization;            /* where there are bits */
    int on_grids;                               /* with bits: the forward pass reads weights on their grids */
    double fixed[BESA_LAYERS];                  /* of this block: sparsity, or negative: the method decides */
    besa__stream yref;                          /* (reference, seqlen, d); not placed where there is a dense stream */
    void *y;                                    /* (micro_batch, seqlen, d) act: the masked block's output, then dL/dy,
                                                   which the backward pass turns into dL/dh1 */
    float *channel_sumsq;                       /* (norms, d) of Yref: of every optimiser's batch, or one of all */
    float *part_sumsq[BESA_LAYERS];             /* granularity layer: (norms, R) of every layer's dense outputs; attn-mlp: the
                                                   first (norms, d) of h1; else NULL */
    void *part, *part_ref;                      /* (micro_batch, seqlen, width) act, of the widest of these: outputs, for
                                                   granularity layer alone, and their reference */
    float *losses;                              /* (BESA__LOSS_STEP + step_losses) */
    int64_t steps, step_losses;                 /* of learning, all; as many losses are kept */
    float *statistic[BESA__INPUTS];             /* (columns) sums of squares of the inputs, where there is no gram; from the
                                                   rank pass on the scores' factors */
    float *gram[BESA__INPUTS];                  /* (columns, columns), where Hessians are used: H; from the rank pass on the
                                                   factor U of its inverse */
    int32_t *dead[BESA__INPUTS];                /* (columns) with gram: inputs that were always 0 */
    float *whole[BESA__INPUTS];                 /* (columns, columns) refit cg: H, damped, from the rank pass on; gram itself
                                                   where nothing needs the factor */
    float *whole_scale[BESA__INPUTS];           /* (columns) refit cg: 1 / H_jj */
    besa_refit_step fit;                        /* refit: arrays for (512, columns) of any layer; obs uses x and p */
    float *fit_q;                               /* refit cg, the same */
    float *scores;                              /* scores of a layer, or SparseGPT's weights as floats: the largest (R,C);
                                                   where there is a learn pass it is acts.dw, not used yet, and may hold less */
    int64_t scores_count;                       /* floats that scores has room for */
    float *score_sums;                          /* (columns) of |W|; NULL: the importance is not relative */
    float *score_factor[BESA_LAYERS];           /* (R,C) what the gradients make of the scores; NULL: the importance has none */
    float *slab_error;                          /* (R, 128), SparseGPT; (512, 128), refit obs */
    int32_t *counts, *not_finite;               /* (2, rows) zeros: DENSE, WRITTEN; (BESA__COUNTS) as in results */
    int32_t *ignored;                           /* (norms) where count_zeros puts zeros when only not_finite is wanted */
    besa__results *results;                     /* host */
    float *results_losses;                      /* host, as losses */
    int32_t *results_counts;                    /* host (2, rows) */
    float *results_vectors;                     /* host, one vector after the other: what learned has come to */
    besa_block masked;                          /* this run's block, with `pruned` for its weights, and what vectors learn */
};

/* What the passes over a block work on. */
typedef struct besa__work {
    besa_pruner *pruner;
    const besa_block *dense, *masked;           /* the block as it came; the pruner's */
    void *const *pruned;                        /* (BESA_LAYERS) masked weights: those of `masked`, or with bits what these are
                                                   quantised from */
    void *const *levels;                        /* (BESA_LAYERS) with bits: the weights of `masked`; else NULL */
    besa__stream *x, *yref;                     /* its inputs; the outputs aimed at: the pruner's yref or the dense stream */
    besa__stream *own;                          /* the dense model's own stream, or NULL */
} besa__work;

static int besa__learns_rates(const besa_pruner *p) { return besa__has_rates(&p->options); }

static int besa__learns_weights(const besa_pruner *p) { return p->options.learn != BESA_LEARN_RATES; }

static int besa__learns_vectors(const besa_pruner *p) { return besa__learns_weights(p) && p->options.learn_vectors; }

static int besa__learns_clips(const besa_pruner *p) { return besa__clips_learn(&p->options); }

static int besa__moves_clips(const besa_pruner *p) { return p->quantization.learns && p->on_grids; }

static int besa__learns(const besa_pruner *p)
{
    return besa__learns_rates(p) || besa__learns_weights(p) || besa__learns_clips(p);
}

/* With learn both grids come when masks are final, unless masks are to be chosen by quantised weights: SmolLM2, 64 x 512 tokens,
 * 50 %, preset best, perplexity on WikiText-2 and C4: 46.4 / 44.4 with 4 bits and 83 / 67 with 3, with grids from the first step
 * on 56.5 / 50.3 and 138 / 94. */
static int besa__grids_wait(const besa_pruner *p)
{
    return p->options.bits && p->options.learn == BESA_LEARN_BOTH && !p->options.quantize_first;
}

/* Does something learn with final masks? The clips alone do where they have had no rates to learn with. */
static int besa__learns_last(const besa_pruner *p)
{
    return besa__learns_weights(p) || (besa__learns_clips(p) && !besa__learns_rates(p));
}

/* The part of the block that a layer learns in, whose rates reach the target together: 0, 1, .. */
static int besa__part(const besa_pruner *p, int layer)
{
    if (p->options.whole_target) return 0;
    if (p->options.granularity == BESA_GRANULARITY_LAYER) return layer;
    return p->options.granularity == BESA_GRANULARITY_ATTN_MLP && layer >= BESA_GATE;
}

/* Epochs of the learn pass: of rates, or of weights whose N:M masks are chosen anew as they move. */
static int64_t besa__mask_epochs(const besa_pruner *p)
{
    return besa__learns_rates(p) || p->options.learn == BESA_LEARN_BOTH ? p->options.epochs : 0;
}

/* Is the dense model's own stream needed? */
static int besa__uses_own(const besa_prune_options *o) { return o->dense_stream || o->dense_share > 0; }

/* A share of the pass is done: do what else is due, and tell the callback. */
static besa_result besa__tick(besa__meter *meter, double share, besa_error *error)
{
    meter->done += share * meter->pass_cost;
    double in_block = meter->cost > 0 && meter->done < meter->cost ? meter->done / meter->cost : 1;
    if (meter->meanwhile) BESA__TRY(meter->meanwhile(meter->run, in_block, error));
    if (!meter->callback) return BESA_OK;
    besa_progress now;
    double ran = (double)(meter->block - meter->first_block) + in_block;
    now.block = meter->block;
    now.blocks = meter->blocks;
    now.pass = meter->pass;
    now.fraction = ((double)meter->first_block + ran) / (double)meter->blocks;
    now.seconds = besa__seconds() - meter->start;
    double left = (double)(meter->blocks - meter->first_block) - ran;
    now.seconds_left = ran > 0 ? (besa__seconds() - meter->began) / ran * left : 0;
    if (!meter->callback(meter->user, &now)) return BESA_OK;
    return besa__fail(error, BESA_ERROR_CANCELLED, "stopped by the progress callback in block %lld of %lld",
                      (long long)meter->block, (long long)meter->blocks);
}

/* ---- options ------------------------------------------------------------------------------- */

static int besa__glob(const char *pattern, const char *text)
{
    const char *star = NULL, *retry = NULL;
    while (*text) {
        if (*pattern == '*') {
            star = ++pattern;
            retry = text;
        } else if (*pattern == '?' || *pattern == *text) {
            pattern++;
            text++;
        } else if (star) {
            pattern = star;
            text = ++retry;
        } else return 0;
    }
    while (*pattern == '*') pattern++;
    return *pattern == 0;
}

/* A pattern with * or ? is a glob over the whole name; any other must be one or more whole dotted parts of it. */
static int besa__match(const char *pattern, const char *name)
{
    size_t length = strlen(pattern);
    if (length == 0) return 0;
    if (strpbrk(pattern, "*?")) return besa__glob(pattern, name);
    for (const char *at = strstr(name, pattern); at; at = strstr(at + 1, pattern))
        if ((at == name || at[-1] == '.') && (at[length] == 0 || at[length] == '.')) return 1;
    return 0;
}

static besa_result besa__pattern_defaults(besa_prune_options *o, const besa_block_shape *shape, besa_error *error)
{
    int n = o->pattern_n, m = o->pattern_m;
    if (n < 1 || m < 2 || n >= m || m > 64)
        return besa__fail(error, BESA_ERROR_OPTION, "pattern %d:%d, expected 1 <= n < m <= 64", n, m);
    if (o->method == BESA_METHOD_BESA && o->learn == BESA_LEARN_RATES)
        return besa__fail(error, BESA_ERROR_OPTION,
                          "pattern %d:%d with method besa leaves no rates to learn: expected learn weights or both, which "
                          "preset best has", n, m);
    if (o->rates.target != 0 && !(fabs(o->rates.target - (double)n / m) <= 1e-3))
        return besa__fail(error, BESA_ERROR_OPTION, "target sparsity %g contradicts the pattern %d:%d, which is %g",
                          o->rates.target, n, m, (double)n / m);
    o->rates.target = (double)n / m;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(shape, i, &rows, &columns);
        if (columns % m != 0)
            return besa__fail(error, BESA_ERROR_OPTION, "pattern %d:%d: %s has %lld input columns, not a multiple of %d",
                              n, m, besa_layer_name(i), (long long)columns, m);
    }
    return BESA_OK;
}

static besa_result besa__check_fixed_rates(const besa_prune_options *o, besa_error *error)
{
    if (o->num_fixed > 0 && !o->fixed)
        return besa__fail(error, BESA_ERROR_OPTION, "num_fixed is %lld, but fixed is NULL", (long long)o->num_fixed);
    for (int64_t i = 0; i < o->num_fixed; i++) {
        if (!o->fixed[i].pattern)
            return besa__fail(error, BESA_ERROR_OPTION, "fixed[%lld].pattern is NULL, expected a name", (long long)i);
        if (!(o->fixed[i].sparsity >= 0 && o->fixed[i].sparsity < 1))
            return besa__fail(error, BESA_ERROR_OPTION, "fixed[%lld].sparsity is %g for \"%s\", expected 0 or more and below 1",
                              (long long)i, o->fixed[i].sparsity, o->fixed[i].pattern);
    }
    return BESA_OK;
}

/* What a method scores weights by; SparseGPT has scores of its own, and masks that are kept need none. */
static besa_importance besa__scored_by(const besa_prune_options *o)
{
    if (o->method == BESA_METHOD_BESA) return o->importance;
    return o->method == BESA_METHOD_WANDA ? BESA_IMPORTANCE_WANDA : BESA_IMPORTANCE_MAGNITUDE;
}

/* What a method chooses by, of the layers' inputs; SparseGPT needs the whole factor. */
static besa_statistic besa__statistic(const besa_prune_options *o)
{
    if (o->method == BESA_METHOD_SPARSEGPT) return BESA_STATISTIC_FACTOR;
    return besa__importance_row(besa__scored_by(o))->statistic;
}

/* Is the factor of the inverse Hessian needed? */
static int besa__uses_factor(const besa_prune_options *o)
{
    return besa__statistic(o) == BESA_STATISTIC_FACTOR || o->refit == BESA_REFIT_OBS;
}

static int besa__uses_gram(const besa_prune_options *o) { return besa__uses_factor(o) || o->refit == BESA_REFIT_CG; }

static int besa__uses_sums(const besa_prune_options *o) { return besa__statistic(o) == BESA_STATISTIC_SUMSQ; }

static int besa__uses_inputs(const besa_prune_options *o) { return besa__uses_gram(o) || besa__uses_sums(o); }

/* Scores that see the block's loss. */
static int besa__uses_gradients(const besa_prune_options *o)
{
    return o->method == BESA_METHOD_BESA && besa__importance_row(o->importance)->gradient != 0;
}

/* Does BESA find masks in a pass of its own, learn? All others are the rank pass's. */
static int besa__finds_masks(const besa_pruner *p) { return besa__mask_epochs(p) > 0 || besa__uses_gradients(&p->options); }

/* Masks that are kept have their own sparsity everywhere. */
static besa_result besa__keep_defaults(besa_prune_options *o, besa_error *error)
{
    const char *other = o->pattern_m ? "a pattern" : o->num_block_targets ? "block_targets" : o->depth_slope != 0 ? "depth_slope" : NULL;
    for (int64_t i = 0; i < o->num_fixed; i++)
        if (o->fixed[i].sparsity > 0) other = "a fixed sparsity above 0";
    if (other)
        return besa__fail(error, BESA_ERROR_OPTION, "%s is given, but method keep takes the masks as they are: expected none", other);
    o->rates.target = 0.5;                      /* which nothing looks at; reports have what was reached */
    return BESA_OK;
}

static besa_result besa__check_refit(const besa_prune_options *o, besa_error *error)
{
    if (o->refit == BESA_REFIT_OBS && o->method == BESA_METHOD_SPARSEGPT)
        return besa__fail(error, BESA_ERROR_OPTION, "refit is obs, which method sparsegpt does by itself: expected none or cg");
    if (o->refit != BESA_REFIT_NONE && o->learn == BESA_LEARN_BOTH)
        return besa__fail(error, BESA_ERROR_OPTION, "refit is given, but with learn both the kept weights have learned when masks "
                          "are final: expected learn rates or weights, or refit none");
    if (o->refit != BESA_REFIT_NONE && o->bits)
        return besa__fail(error, BESA_ERROR_OPTION, "refit is given, but weights with bits are put on grids afterwards, where they "
                          "no longer fit: expected one of refit and bits");
    return BESA_OK;
}

static besa_result besa__check_granularity(const besa_prune_options *o, besa_error *error)
{
    if (o->granularity == BESA_GRANULARITY_BLOCK) return BESA_OK;
    if (o->dense_stream || o->dense_share > 0)
        return besa__fail(error, BESA_ERROR_OPTION, "granularity is not block, but %s aims at the dense model's blocks: "
                          "expected none of it, or granularity block", o->dense_stream ? "dense_stream" : "dense_share");
    if (o->granularity == BESA_GRANULARITY_LAYER && o->learn_vectors)
        return besa__fail(error, BESA_ERROR_OPTION, "granularity is layer, but learn_vectors is set, and norms are in no "
                          "layer: expected block or attn-mlp");
    return BESA_OK;
}

/* Check the options and fill in what 0 stands for. */
static besa_result besa__prune_defaults(besa_prune_options *o, const besa_block_shape *shape, besa_error *error)
{
    const size_t begin = offsetof(besa_prune_options, rates) + sizeof o->rates;
    BESA__TRY(besa__options_fill((unsigned char *)o + begin, begin, sizeof *o, error));
    if (o->pattern_n != 0 || o->pattern_m != 0) BESA__TRY(besa__pattern_defaults(o, shape, error));
    BESA__TRY(besa__check_fixed_rates(o, error));
    if (o->method == BESA_METHOD_KEEP) BESA__TRY(besa__keep_defaults(o, error));
    BESA__TRY(besa__rate_defaults(&o->rates, error));
    if (o->learn == BESA_LEARN_BOTH && o->method != BESA_METHOD_BESA)
        return besa__fail(error, BESA_ERROR_OPTION, "learn is both, but method %s has no rates to learn: expected weights",
                          besa_method_name(o->method));
    if (o->dense_stream && o->dense_share > 0)
        return besa__fail(error, BESA_ERROR_OPTION, "dense_share is %g, but dense_stream aims at the dense model's output alone: "
                          "expected one of them", o->dense_share);
    BESA__TRY(besa__check_refit(o, error));
    BESA__TRY(besa__check_granularity(o, error));
    return besa__has_rates(o) ? besa__check_penalty(&o->rates, error) : BESA_OK;
}

/* The sparsity that the caller fixed for a layer of the block called name, or -1. */
static double besa__fixed_rate(const besa_prune_options *o, const char *name, int layer)
{
    char full[256];
    snprintf(full, sizeof full, "%s%s", name ? name : "", besa__layers[layer].path);
    for (int64_t i = 0; i < o->num_fixed; i++)
        if (besa__match(o->fixed[i].pattern, full)) return o->fixed[i].sparsity;
    return -1;
}

/* ---- memory -------------------------------------------------------------------------------- */

/* Ranks and counts of the block's layers, and what BESA learns. A pattern has neither, but for layers that are held at a
 * sparsity. */
static void besa__pruner_place_masks(besa_pruner *p, besa__arena *arena)
{
    besa_layer_shape shapes[BESA_LAYERS];
    if (p->options.method == BESA_METHOD_SPARSEGPT || p->options.method == BESA_METHOD_KEEP) return;
    if (p->options.pattern_m && !p->options.num_fixed) return;
    for (int i = 0; i < BESA_LAYERS; i++) {
        besa_block_layer(&p->shape, i, &shapes[i].rows, &shapes[i].columns);
        shapes[i].dtype = p->dtype;
    }
    besa__masks_place(&p->masks, p->be, p->mask_layer, shapes, BESA_LAYERS, arena);
    for (int i = 0; i < BESA_LAYERS; i++) p->mask_layer[i].name = besa__layers[i].path;
    if (!besa__learns_rates(p)) return;
    besa__parameters_init(&p->parameters, p->be, p->options.rates.optimizer, p->options.rates.lr, &p->options.rates);
    p->rates.parts = besa__part(p, BESA_LAYERS - 1) + 1;
    besa__rates_place(&p->rates, p->rate_layer, arena);
    for (int i = 0; i < BESA_LAYERS; i++) p->rate_layer[i].part = besa__part(p, i);
    besa__parameters_place(&p->parameters, arena);
}

/* Channel norms of Yref are kept for every batch of the optimiser, or once for all tokens. */
static int64_t besa__norms(const besa_pruner *p)
{
    return p->options.norm_all ? 1 : besa__max(1, besa__parts(p->reference, p->batch));
}

/* What losses within the block are measured with. */
static void besa__pruner_place_parts(besa_pruner *p, besa__arena *arena)
{
    int64_t widest = p->shape.hidden_size, rows = widest, columns;
    if (p->options.granularity == BESA_GRANULARITY_BLOCK) return;
    int layers = p->options.granularity == BESA_GRANULARITY_LAYER;
    for (int i = 0; i < (layers ? BESA_LAYERS : 1); i++) {
        if (layers) besa_block_layer(&p->shape, i, &rows, &columns);
        p->part_sumsq[i] = besa__take_floats(arena, besa__product(besa__norms(p), rows));
        widest = besa__max(widest, rows);
    }
    size_t size = besa_dtype_size(p->be->activation_dtype);
    int64_t count = besa__product(p->micro_batch * p->seqlen, widest);
    p->part_ref = besa__take(arena, besa__bytes(count, size));
    if (layers) p->part = besa__take(arena, besa__bytes(count, size));
}

static void besa__pruner_place_statistics(besa_pruner *p, besa__arena *arena, besa_workload *work)
{
    for (int i = 0; i < BESA__INPUTS; i++) {
        int64_t columns = besa__input_columns(&p->shape, i);
        p->statistic[i] = besa__take_floats(arena, columns);
        if (!besa__uses_gram(&p->options)) continue;
        p->gram[i] = besa__take_floats(arena, besa__product(columns, columns));
        p->dead[i] = (int32_t *)besa__take_array(arena, columns, sizeof(int32_t));
        if (columns > work->hessian_columns) work->hessian_columns = columns;
        if (p->options.refit != BESA_REFIT_CG) continue;
        int apart = besa__uses_factor(&p->options);
        p->whole[i] = apart ? besa__take_floats(arena, besa__product(columns, columns)) : p->gram[i];
        p->whole_scale[i] = besa__take_floats(arena, columns);
    }
    for (int i = 0; i < BESA_LAYERS && besa__uses_gradients(&p->options); i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        p->score_factor[i] = besa__take_floats(arena, besa__product(rows, columns));
    }
}

/* What a refit of some rows takes, of the layer where that is the most. */
static void besa__pruner_place_refit(besa_pruner *p, besa__arena *arena)
{
    int64_t most = 0, all = 0;
    if (p->options.refit == BESA_REFIT_NONE) return;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        rows = besa__min(rows, BESA__REFIT_ROWS);
        most = besa__max(most, rows * columns);
        all = besa__max(all, rows);
    }
    p->fit.x = besa__take_floats(arena, most);
    p->fit.p = besa__take_floats(arena, most);
    if (p->options.refit == BESA_REFIT_OBS) {
        p->slab_error = besa__take_floats(arena, besa__product(all, BESA__SLAB));
        return;
    }
    p->fit.r = besa__take_floats(arena, most);
    p->fit_q = besa__take_floats(arena, most);
    p->fit.q = p->fit_q;
    p->fit.rho = besa__take_floats(arena, 2 * all);
}

/* Rates sum each row's gradients; whatever else learns from them, weight by weight, has them as floats. With bf16 the rates'
 * gradient in SmolLM2's first block is 1.6e-4 of itself away from that with floats, in the second and third, whose inputs the
 * blocks before have changed, 0.6 to 1 %; one sequence's is 7 to 18 % away from another's. */
static besa_dtype besa__gradient_dtype(const besa_pruner *p)
{
    int rates_alone = besa__learns_rates(p) && !besa__learns_weights(p) && !besa__learns_clips(p);
    return rates_alone && besa__importance_row(p->options.importance)->gradient == 0 ? p->be->gradient_dtype : BESA_F32;
}

/* Floats of the largest piece of a weight gradient, as be->gradient_bytes asks for: whole rows, 128 at least. */
static int64_t besa__gradient_piece(const besa_backend *be, const besa_block_shape *s)
{
    int64_t most = 0, room = (int64_t)(be->gradient_bytes / sizeof(float));
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(s, i, &rows, &columns);
        int64_t piece = room == 0 ? rows : besa__min(rows, besa__max(1, room / columns / 128) * 128);
        if (piece * columns > most) most = piece * columns;
    }
    return most;
}

/* Weights that learn, and whole gradients where those of a batch come in several pieces. */
static void besa__pruner_place_weights(besa_pruner *p, besa__arena *arena)
{
    besa__weights_place(&p->weights, &p->shape, p->dtype, arena);
    for (int i = 0; i < BESA_LAYERS; i++) {
        int sums = besa__parts(p->options.batch_size, besa__ranks(p->shares.comm)) > p->micro_batch; /* on any rank */
        p->acts.dw_sum[i] = sums ? besa__take_floats(arena, p->weights.layer[i].count) : NULL;
    }
    if (besa__learns_vectors(p)) besa__vectors_place(&p->weights, &p->shape, arena);
}

/* Elements of all norms and biases that a block of this shape may have. */
static int64_t besa__vector_counts(const besa_block_shape *shape)
{
    int64_t counts = 0;
    for (int i = 0; i < BESA_VECTORS; i++) counts += besa__vector_count(shape, i);
    return counts;
}

/* Place every array of the pruner, on the device and on the host; arenas without memory only count. */
static void besa__pruner_place(besa_pruner *p, besa__arena *arena, besa__arena *host)
{
    const besa_block_shape *s = &p->shape;
    int rates = besa__learns_rates(p), finds = besa__finds_masks(p);
    besa_workload work = besa_block_workload(s, p->micro_batch, p->seqlen);
    work.rate_logits = rates ? p->options.rates.candidates + 1 : 1;
    work.projected_rows = rates ? p->rows : 0;
    int64_t piece = besa__learns(p) ? besa__gradient_piece(p->be, s) : 0;
    besa__activations_place(&p->acts, arena, p->be->activation_dtype, s, p->qk_norm, p->micro_batch * p->seqlen, piece);
    p->acts.dw_dtype = besa__gradient_dtype(p);
    besa__pruner_place_masks(p, arena);
    if (besa__learns_weights(p)) besa__pruner_place_weights(p, arena);
    if (p->options.bits)
        besa__quantization_place(&p->quantization, s, p->dtype, p->options.bits, p->options.group_size, p->options.clip_lr,
                                 p->steps, arena);
    p->yref.micro_batch = p->micro_batch;
    if (!p->options.dense_stream) besa__stream_place(&p->yref, arena, host);
    p->y = besa__take(arena, besa__stream_bytes(&p->yref, p->micro_batch));
    p->channel_sumsq = besa__take_floats(arena, besa__product(besa__norms(p), s->hidden_size));
    besa__pruner_place_parts(p, arena);
    p->losses = besa__take_floats(arena, BESA__LOSS_STEP + p->step_losses);
    besa__pruner_place_statistics(p, arena, &work);
    p->scores_count = finds ? piece : besa__largest_layer(s);
    p->scores = finds ? p->acts.dw : besa__take_floats(arena, p->scores_count);
    p->score_sums = besa__importance_row(besa__scored_by(&p->options))->relative ? besa__take_floats(arena, work.columns) : NULL;
    p->slab_error = p->options.method == BESA_METHOD_SPARSEGPT ? besa__take_floats(arena, besa__product(work.rows, BESA__SLAB)) : NULL;
    besa__pruner_place_refit(p, arena);
    p->counts = (int32_t *)besa__take_array(arena, besa__product(2, p->rows), sizeof(int32_t));
    p->not_finite = (int32_t *)besa__take(arena, sizeof p->results->not_finite);
    p->ignored = (int32_t *)besa__take(arena, (size_t)besa__norms(p) * sizeof(int32_t));
    p->workspace_bytes = p->be->workspace_size(p->be, &work);
    p->workspace = besa__take(arena, p->workspace_bytes);
    p->results = (besa__results *)besa__take(host, sizeof(besa__results));
    p->results_losses = besa__take_floats(host, BESA__LOSS_STEP + p->step_losses);
    p->results_counts = (int32_t *)besa__take_array(host, besa__product(2, p->rows), sizeof(int32_t));
    p->results_vectors = besa__learns_vectors(p) ? besa__take_floats(host, besa__vector_counts(s)) : NULL;
}

/* Sequences that go through a pass together: about 2048 tokens. A larger batch is accumulated over several. */
static int64_t besa__preferred_micro_batch(int64_t nsamples, int64_t seqlen)
{
    return besa__min(nsamples, besa__max(1, BESA__CHUNK_TOKENS / seqlen));
}

/* Sizes whose products with a model's widths stay within 63 bits. */
static besa_result besa__check_tokens(const char *what, int64_t count, int64_t seqlen, besa_error *error)
{
    if (count < 1)
        return besa__fail(error, BESA_ERROR_OPTION, "%lld %s: expected 1 or more", (long long)count, what);
    if (seqlen < 1)
        return besa__fail(error, BESA_ERROR_OPTION, "%s of %lld tokens: expected 1 or more", what, (long long)seqlen);
    if (count <= ((int64_t)1 << 36) / seqlen) return BESA_OK;
    return besa__fail(error, BESA_ERROR_OPTION, "%lld %s of %lld tokens: expected 2^36 tokens in all at most",
                      (long long)count, what, (long long)seqlen);
}

static besa_result besa__check_shape(const besa_block_shape *s, besa_dtype dtype, besa_error *error)
{
    const struct { const char *key; double value; } field[] = {
        { "hidden_size", (double)s->hidden_size }, { "intermediate_size", (double)s->intermediate_size },
        { "num_attention_heads", (double)s->num_attention_heads }, { "head_dim", (double)s->head_dim },
        { "num_key_value_heads", (double)s->num_key_value_heads }, { "rms_norm_eps", s->rms_norm_eps },
        { "sliding_window", s->sliding_window ? (double)s->sliding_window : 1 } };
    const int64_t most = (int64_t)1 << 24;
    char expected[64];
    if ((unsigned)dtype > BESA_BF16)
        return besa__fail(error, BESA_ERROR_OPTION, "dtype is %d: not a value of besa_dtype", (int)dtype);
    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        const besa__range *range = besa__find_range(field[i].key);
        if (!besa__in_range(range, field[i].value))
            return besa__fail(error, BESA_ERROR_OPTION, "%s is %.10g, expected %s", field[i].key, field[i].value,
                              besa__range_text(range, expected, sizeof expected));
    }
    if (s->num_attention_heads % s->num_key_value_heads != 0)
        return besa__fail(error, BESA_ERROR_OPTION, "num_attention_heads is %lld, expected a multiple of "
                          "num_key_value_heads, %lld", (long long)s->num_attention_heads, (long long)s->num_key_value_heads);
    if (s->head_dim % 2 != 0)
        return besa__fail(error, BESA_ERROR_OPTION, "head_dim is %lld, expected an even number", (long long)s->head_dim);
    if (s->rotary_dim < 0 || s->rotary_dim > s->head_dim || s->rotary_dim % 2 != 0)
        return besa__fail(error, BESA_ERROR_OPTION, "rotary_dim is %lld, expected an even number up to head_dim, %lld",
                          (long long)s->rotary_dim, (long long)s->head_dim);
    if ((unsigned)s->norms > BESA_NORMS_BOTH)
        return besa__fail(error, BESA_ERROR_OPTION, "norms is %d: not a value of besa_norms", (int)s->norms);
    if (s->num_attention_heads * s->head_dim > most)
        return besa__fail(error, BESA_ERROR_OPTION, "head_dim is %lld in %lld heads, expected 2^24 in all at most",
                          (long long)s->head_dim, (long long)s->num_attention_heads);
    return BESA_OK;
}
/* This rank's part of the sequences, and how many of them go through a pass together. */
static besa_result besa__pruner_share(besa_pruner *p, int64_t nsamples, besa_error *error)
{
    int learns = besa__learns(p);
    BESA__TRY(besa__shares_init(&p->shares, p->options.comm, nsamples, learns ? p->options.batch_size : 0, error));
    p->nsamples = besa__local_count(&p->shares, nsamples);
    p->batch = learns ? besa__share_of(p->shares.comm, p->options.batch_size) : 1;
    p->micro_batch = besa__preferred_micro_batch(besa__largest_share(&p->shares), p->seqlen);
    p->all_reference = learns || nsamples < BESA__REPORT_SEQUENCES ? nsamples : BESA__REPORT_SEQUENCES;
    p->reference = besa__local_count(&p->shares, p->all_reference);
    return BESA_OK;
}

/* Everything but memory. */
static besa_result besa__pruner_init(besa_pruner *p, besa_backend *be, const besa_block_shape *shape, besa_dtype dtype,
                                     int qk_norm, const besa_prune_options *options, int64_t nsamples, int64_t seqlen,
                                     besa_error *error)
{
    memset(p, 0, sizeof *p);
    p->be = be;
    p->options = *options;
    p->shape = *shape;
    p->dtype = p->written_dtype = dtype;
    p->qk_norm = qk_norm;
    p->seqlen = seqlen;
    BESA__TRY(besa__check_backend(be, error));
    BESA__TRY(besa__check_shape(shape, dtype, error));
    BESA__TRY(besa__check_tokens("calibration sequences", nsamples, seqlen, error));
    BESA__TRY(besa__prune_defaults(&p->options, shape, error));
    besa_prune_options *o = &p->options;
    int learns = besa__learns(p);
    if (!learns) o->dense_stream = 0, o->dense_share = 0, o->granularity = BESA_GRANULARITY_BLOCK, o->batch_size = 1;
    if (o->batch_size > nsamples) o->batch_size = nsamples;
    BESA__TRY(besa__pruner_share(p, nsamples, error));
    int64_t batches = besa__parts(nsamples, o->batch_size), weight_epochs = besa__learns_last(p) ? o->weight_epochs : 0;
    o->rates.steps = besa__mask_epochs(p) * batches;
    p->weights.be = p->quantization.be = be;
    p->quantization.learns = besa__learns_clips(p);
    p->weights.warmup = o->weight_warmup;
    for (int i = 0; i < BESA_VECTORS; i++) p->weights.vector[i].dtype = dtype;
    p->weights.steps = weight_epochs * batches + (o->learn == BESA_LEARN_BOTH ? o->rates.steps : 0);
    p->steps = weight_epochs * batches + o->rates.steps;
    p->step_losses = besa__min(p->steps, BESA__STEP_LOSSES);
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(shape, i, &rows, &columns);
        p->rows += rows;
    }
    besa__stream_init(&p->yref, be, BESA__EVENT_YREF, p->reference, seqlen, shape->hidden_size);
    p->meter.callback = o->progress;
    p->meter.user = o->user;
    p->meter.blocks = 1;
    p->meter.start = p->meter.began = besa__seconds();
    if (besa__learns_rates(p)) besa__rates_init(&p->rates, &p->masks, &p->parameters, &o->rates);
    return BESA_OK;
}

/* Find what fits into `budget` bytes of the device (0: what can be addressed): the largest micro-batch, and for it the lowest
 * level of `levels`, each of which moves more to the host. size(user, level) makes the level so and gives its bytes. */
static besa_result besa__fit_budget(int64_t *micro_batch, uint64_t (*size)(void *, int level), int levels, void *user,
                                    size_t budget, const char *whose, besa_error *error)
{
    uint64_t limit = budget ? budget : SIZE_MAX - 1;
    for (uint64_t least = UINT64_MAX;; *micro_batch = (*micro_batch + 1) / 2) {
        for (int level = 0; level < levels; level++) {
            uint64_t bytes = size(user, level);
            if (bytes <= limit) return BESA_OK;
            if (bytes < least) least = bytes;
        }
        if (*micro_batch <= 1 && budget == 0) return besa__check_size(least, "the run's arrays", error);
        if (*micro_batch <= 1)
            return besa__fail(error, BESA_ERROR_MEMORY, "%s %zu bytes, the smallest that works here is %llu", whose, budget,
                              (unsigned long long)least);
    }
}

/* The same, and as much as fits on every rank. */
static besa_result besa__fit_ranks(const besa__shares *shares, int64_t *micro_batch, uint64_t (*size)(void *, int level),
                                   int levels, void *user, size_t budget, const char *whose, besa_error *error)
{
    BESA__TRY(besa__fit_budget(micro_batch, size, levels, user, budget, whose, error));
    if (!shares->comm) return BESA_OK;
    int64_t mine = *micro_batch;
    BESA__TRY(besa__least(shares->comm, micro_batch, error));
    if (*micro_batch < mine) BESA__TRY(besa__fit_budget(micro_batch, size, levels, user, budget, whose, error));
    return besa__same(shares->comm, (uint64_t)*micro_batch, "numbers of sequences that fit into memory at a time",
                      "a device_memory that is the same everywhere", error);
}

/* The budget where the caller gave none: what the device has free, less a little for the driver. */
static besa_result besa__default_budget(besa_backend *be, size_t *budget, const char **whose, besa_error *error)
{
    size_t free_bytes, total_bytes;
    *whose = "device_memory is";
    if (*budget != 0 || be->unified_memory) return BESA_OK;
    BESA__TRY_ON(be, be->memory_info(be, &free_bytes, &total_bytes), error);
    *whose = "the device can give";
    *budget = free_bytes - free_bytes / 32;
    return BESA_OK;
}

/* Once the arrays are placed: what is the same for all blocks. */
static besa_result besa__pruner_start(besa_pruner *p)
{
    besa_result result = BESA_OK;
    besa__workspace callers = besa__use_workspace(p->be, p->workspace, p->workspace_bytes);
    if (besa__learns_rates(p)) result = besa__parameters_start(&p->parameters);
    if (result == BESA_OK && besa__learns_rates(p)) result = besa__rates_start(&p->rates);
    if (result == BESA_OK) result = besa__quantization_start(&p->quantization);
    besa__use_workspace(p->be, callers.memory, callers.bytes);
    return result;
}

/* The sparsity of the blocks to come. */
BESA__UNUSED static void besa__pruner_retarget(besa_pruner *p, double target)
{
    if (target == p->options.rates.target) return;
    p->options.rates.target = target;
    if (besa__learns_rates(p)) besa__rates_retarget(&p->rates);
}

/* As before the block's first pass. */
static besa_result besa__pruner_reset(besa_pruner *p)
{
    if (p->masks.count > 0) BESA__TRY(besa__masks_reset(&p->masks));
    BESA__TRY(besa__vectors_reset(&p->weights));
    if (!besa__learns_rates(p)) return BESA_OK;
    BESA__TRY(besa__parameters_reset(&p->parameters));
    return besa__rates_reset(&p->rates);
}

/* ============================================================================================
 * // >>statistics            the dense pass: what layers read, and what the block is to put out
 * ============================================================================================
 * Owns how calibration sequences are cut, the reference output with its channel norms, the reconstruction loss, and the
 * statistics of the layers' inputs. */

/* Sequence `index` of an array of (.., seqlen, d); yref has these sizes with a dense stream too. */
static void *besa__sequence(const besa_pruner *p, void *x, int64_t index) { return besa__stream_at(&p->yref, x, index); }

/* Sequences whose gradients the scores see, this rank's. */
static int64_t besa__gradient_sequences(const besa_pruner *p)
{
    int64_t all = besa__uses_gradients(&p->options) ? besa__min(BESA__GRADIENT_SEQUENCES, p->shares.all) : 0;
    return besa__local_count(&p->shares, all);
}

/* Sequences that the report's losses are of: of all ranks; this rank's. */
static int64_t besa__all_shown(const besa_pruner *p) { return besa__min(BESA__REPORT_SEQUENCES, p->all_reference); }

static int64_t besa__shown(const besa_pruner *p) { return besa__local_count(&p->shares, besa__all_shown(p)); }

/* The passes' chunks: the report's sequences are kept apart, and those with a reference. */
static int64_t besa__pass_cut(const void *pruner, int64_t first)
{
    const besa_pruner *p = (const besa_pruner *)pruner;
    int64_t shown = besa__shown(p), end = first < shown ? shown : first < p->reference ? p->reference : p->nsamples;
    return besa__min(p->micro_batch, end - first);
}

/* Over the first `count` sequences as the passes cut them. */
static besa__walk besa__pass_walk(const besa_pruner *p, int64_t count)
{
    return besa__walk_over(besa__pass_cut, p, 0, count, -1);
}

/* Open a chunk of the inputs and, where there is one (else NULL), of the reference. */
static besa_result besa__work_open(const besa__work *work, const besa__walk *chunk, void **x, void **yref)
{
    *yref = NULL;
    BESA__TRY(besa__stream_open(work->x, chunk, x));
    return chunk->first < work->pruner->reference ? besa__stream_open(work->yref, chunk, yref) : BESA_OK;
}

static besa_result besa__work_close(const besa__work *work, int x_changed, const void *yref)
{
    BESA__TRY(besa__stream_close(work->x, x_changed));
    return yref ? besa__stream_close(work->yref, 0) : BESA_OK;
}

/* A run of `count` sequences with the same channel norms: row `norms` of channel_sumsq, summed over `of` sequences, of all
 * ranks. */
typedef struct besa__normed {
    int64_t norms, count, of;
} besa__normed;

static besa__normed besa__normed_at(const besa_pruner *p, int64_t sequence, int64_t end)
{
    int64_t start = sequence / p->batch * p->batch, batch = p->options.batch_size;
    besa__normed n;
    n.norms = p->options.norm_all ? 0 : sequence / p->batch;
    n.count = (p->options.norm_all ? end : besa__min(end, start + p->batch)) - sequence;
    n.of = p->options.norm_all ? p->all_reference : besa__min(batch, p->all_reference - n.norms * batch);
    return n;
}

static float *besa__channel_sumsq(const besa_pruner *p, int64_t norms)
{
    return p->channel_sumsq + norms * p->shape.hidden_size;
}

/* Add a chunk of the reference to its channel norms. */
static besa_result besa__add_norms(besa_pruner *p, void *yref, int64_t first, int64_t count)
{
    besa__normed n;
    for (int64_t s = first; s < first + count; s += n.count) {
        n = besa__normed_at(p, s, first + count);
        BESA__TRY(p->be->column_sumsq(p->be, besa__channel_sumsq(p, n.norms), besa__sequence(p, yref, s - first),
                                      n.count * p->seqlen, p->shape.hidden_size));
    }
    return BESA_OK;
}

/* The reconstruction loss of `count` sequences from `first`, whose outputs are y and references yref (count, seqlen, d):
 *     L = (1/d) sum over tokens t and channels c of ((Yref[t,c] - Y[t,c]) / l2(Yref[:,c]))^2
 * is added to *loss, and its derivative goes to dy (NULL: not wanted; may be y). Channel norms are those of the
 * optimiser's batch that a sequence belongs to, or of all tokens (norm_all).
 * mean_over 0: the plain sum is added, for learning. Else mean_over is how many sequences, of all ranks, the report's loss is a
 * mean of: losses of batches are weighted by their sequences. */
static besa_result besa__pruner_loss(besa_pruner *p, float *loss, void *dy, void *y, void *yref, int64_t first,
                                     int64_t count, int64_t mean_over)
{
    besa__normed n;
    for (int64_t s = first; s < first + count; s += n.count) {
        n = besa__normed_at(p, s, first + count);
        float scale = mean_over ? (float)((double)n.of / (double)mean_over) : 1.0f;
        BESA__TRY(p->be->block_loss(p->be, loss, dy ? besa__sequence(p, dy, s - first) : NULL,
                                    besa__sequence(p, y, s - first), besa__sequence(p, yref, s - first),
                                    besa__channel_sumsq(p, n.norms), scale, n.count * p->seqlen, p->shape.hidden_size, 0));
    }
    return BESA_OK;
}

/* What the layers of the block have read in the last forward pass. */
static const void *besa__layer_input(const besa_pruner *p, int input)
{
    const void *at[BESA__INPUTS];
    at[BESA__INPUT_A] = p->acts.a;
    at[BESA__INPUT_ATTN] = p->acts.attn;
    at[BESA__INPUT_M] = p->acts.m;
    at[BESA__INPUT_Z] = p->acts.z;
    return at[input];
}

/* Where sequence `index` of outputs x (.., seqlen, width) begins. */
static void *besa__part_at(const besa_pruner *p, void *x, int64_t index, int64_t width)
{
    return (unsigned char *)x + (size_t)(index * p->seqlen * width) * besa_dtype_size(p->be->activation_dtype);
}

/* Add a chunk of reference outputs (count, seqlen, width) within the block to their channel norms sumsq (norms, width). */
static besa_result besa__add_part_norms(besa_pruner *p, float *sumsq, void *yref, int64_t width, int64_t first, int64_t count)
{
    besa__normed n;
    for (int64_t s = first; s < first + count; s += n.count) {
        n = besa__normed_at(p, s, first + count);
        BESA__TRY(p->be->column_sumsq(p->be, sumsq + n.norms * width, besa__part_at(p, yref, s - first, width),
                                      n.count * p->seqlen, width));
    }
    return BESA_OK;
}

/* The same of all outputs that losses within the block are measured on, after the dense block's forward pass. */
static besa_result besa__add_parts(const besa__work *work, int64_t first, int64_t count)
{
    besa_pruner *p = work->pruner;
    if (p->options.granularity == BESA_GRANULARITY_ATTN_MLP)
        return besa__add_part_norms(p, p->part_sumsq[0], p->acts.h1, p->shape.hidden_size, first, count);
    for (int i = 0; i < BESA_LAYERS && p->options.granularity == BESA_GRANULARITY_LAYER; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        const void *x = besa__layer_input(p, besa__layers[i].input);
        BESA__TRY(besa__layer_forward(p->be, work->dense, i, p->part_ref, x, count * p->seqlen, 0));
        BESA__TRY(besa__add_part_norms(p, p->part_sumsq[i], p->part_ref, rows, first, count));
    }
    return BESA_OK;
}

/* The loss of a chunk's outputs y (count, seqlen, width) within the block, as besa__pruner_loss has it of the block's. */
static besa_result besa__part_loss(besa_pruner *p, float *loss, void *dy, void *y, void *yref, const float *sumsq,
                                   int64_t width, int64_t first, int64_t count)
{
    besa__normed n;
    for (int64_t s = first; s < first + count; s += n.count) {
        n = besa__normed_at(p, s, first + count);
        BESA__TRY(p->be->block_loss(p->be, loss, besa__part_at(p, dy, s - first, width), besa__part_at(p, y, s - first, width),
                                    besa__part_at(p, yref, s - first, width), sumsq + n.norms * width, 1.0f,
                                    n.count * p->seqlen, width, 0));
    }
    return BESA_OK;
}

/* Add one chunk's layer inputs to the statistics. */
static besa_result besa__add_statistics(besa_pruner *p, int64_t tokens)
{
    besa_backend *be = p->be;
    float scale = (float)(2.0 / (double)(p->shares.all * p->seqlen)); /* H = 2/T X'X */
    for (int i = 0; i < BESA__INPUTS; i++) {
        int64_t columns = besa__input_columns(&p->shape, i);
        const void *x = besa__layer_input(p, i);
        if (p->gram[i]) BESA__TRY(be->gram(be, p->gram[i], x, scale, tokens, columns));
        if (besa__uses_sums(&p->options)) BESA__TRY(be->column_sumsq(be, p->statistic[i], x, tokens, columns));
    }
    return BESA_OK;
}

/* Everything that a block's passes add to. */
static besa_result besa__clear_sums(besa_pruner *p)
{
    besa_backend *be = p->be;
    size_t norms = (size_t)(besa__norms(p) * p->shape.hidden_size) * sizeof(float);
    for (int i = 0; i < BESA__INPUTS; i++) {
        size_t columns = (size_t)besa__input_columns(&p->shape, i), bytes = columns * sizeof(float);
        BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, p->statistic[i], bytes));
        if (p->gram[i]) BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, p->gram[i], bytes * columns));
    }
    BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, p->channel_sumsq, norms));
    for (int i = 0; i < BESA_LAYERS && p->part_sumsq[i]; i++) {
        int64_t rows = p->shape.hidden_size, columns;
        if (p->options.granularity == BESA_GRANULARITY_LAYER) besa_block_layer(&p->shape, i, &rows, &columns);
        BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, p->part_sumsq[i], (size_t)(besa__norms(p) * rows) * sizeof(float)));
    }
    BESA__TRY(be->zero(be, BESA_QUEUE_COMPUTE, p->not_finite, sizeof p->results->not_finite));
    return be->zero(be, BESA_QUEUE_COMPUTE, p->losses, (size_t)(BESA__LOSS_STEP + p->step_losses) * sizeof(float));
}

/* All that the dense pass has summed, over all ranks. Where nothing learns, every sequence has channel norms of its own. */
static besa_result besa__reduce_statistics(besa_pruner *p)
{
    const besa_comm *comm = p->shares.comm;
    int64_t d = p->shape.hidden_size, norms = p->options.norm_all || besa__learns(p) ? besa__norms(p) : 0;
    for (int i = 0; i < BESA__INPUTS; i++) {
        int64_t columns = besa__input_columns(&p->shape, i);
        if (p->gram[i]) BESA__TRY(besa__reduce(comm, p->be, p->gram[i], columns * columns));
        if (besa__uses_sums(&p->options)) BESA__TRY(besa__reduce(comm, p->be, p->statistic[i], columns));
    }
    for (int i = 0; i < BESA_LAYERS && p->part_sumsq[i]; i++) {
        int64_t rows = d, columns;
        if (p->options.granularity == BESA_GRANULARITY_LAYER) besa_block_layer(&p->shape, i, &rows, &columns);
        BESA__TRY(besa__reduce(comm, p->be, p->part_sumsq[i], norms * rows));
    }
    return norms ? besa__reduce(comm, p->be, p->channel_sumsq, norms * d) : BESA_OK;
}

/* Count what is not finite in those sums: an infinite norm would silence its channel, an infinite statistic its column. */
static besa_result besa__count_sums(besa_pruner *p)
{
    besa_backend *be = p->be;
    for (int i = 0; i < BESA__INPUTS && besa__uses_inputs(&p->options); i++) {
        int64_t columns = besa__input_columns(&p->shape, i);
        int32_t *zeros = p->gram[i] ? p->dead[i] : p->ignored; /* hessian_factor overwrites dead */
        BESA__TRY(be->count_zeros(be, zeros, p->not_finite + BESA__COUNT_INPUTS + i,
                                  p->gram[i] ? p->gram[i] : p->statistic[i], BESA_F32, p->gram[i] ? columns : 1, columns));
    }
    return be->count_zeros(be, p->ignored, p->not_finite + BESA__COUNT_NORMS, p->channel_sumsq, BESA_F32, besa__norms(p),
                           p->shape.hidden_size);
}

/* One chunk of the dense pass. */
static besa_result besa__dense_chunk(const besa__work *work, const besa__walk *chunk)
{
    besa_pruner *p = work->pruner;
    besa_backend *be = p->be;
    int statistics = besa__uses_inputs(&p->options), apart = work->yref != work->own;
    void *x, *y = NULL, *own;
    BESA__TRY(besa__stream_open(work->x, chunk, &x));
    if (apart && chunk->first < p->reference) BESA__TRY(besa__stream_begin(work->yref, chunk, &y));
    int keep = p->options.granularity == BESA_GRANULARITY_ATTN_MLP;
    if (y || statistics) BESA__TRY(besa__block_forward(be, work->dense, &p->acts, x, y, chunk->count, p->seqlen, keep));
    if (y) BESA__TRY(besa__add_parts(work, chunk->first, chunk->count));
    if (statistics) BESA__TRY(besa__add_statistics(p, chunk->count * p->seqlen));
    BESA__TRY(besa__stream_close(work->x, 0));
    if (work->own) {
        BESA__TRY(besa__stream_open(work->own, chunk, &own));
        BESA__TRY(besa__block_forward(be, work->dense, &p->acts, own, own, chunk->count, p->seqlen, 0));
        if (y) BESA__TRY(be->mix(be, y, own, (float)p->options.dense_share, chunk->count * p->seqlen * p->shape.hidden_size));
        if (apart) BESA__TRY(besa__stream_close(work->own, 1));
        else y = own;
    }
    if (!y) return BESA_OK;
    BESA__TRY(besa__add_norms(p, y, chunk->first, chunk->count));
    return besa__stream_close(work->yref, 1);
}

/* Zeros of every row, and what is not finite, of the dense weights or of those written. */
static besa_result besa__count_layers(besa_pruner *p, const void *const weight[BESA_LAYERS], int which)
{
    int32_t *counts = p->counts + which * p->rows;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        BESA__TRY(p->be->count_zeros(p->be, counts, p->not_finite + which * BESA_LAYERS + i, weight[i], p->dtype, rows,
                                     columns));
        counts += rows;
    }
    return BESA_OK;
}

/* Pass 1. The dense block over the sequences: statistics, and Yref as far as it is needed. */
static besa_result besa__dense_pass(const besa__work *work, besa_error *error)
{
    besa_pruner *p = work->pruner;
    besa__walk walk = besa__pass_walk(p, besa__uses_inputs(&p->options) ? p->nsamples : p->reference);
    BESA__TRY_ON(p->be, besa__clear_sums(p), error);
    while (besa__walk_next(&walk)) {
        BESA__TRY_ON(p->be, besa__dense_chunk(work, &walk), error);
        BESA__TRY(besa__tick(&p->meter, (double)walk.count / (double)p->nsamples, error));
    }
    BESA__TRY_ON(p->be, besa__reduce_statistics(p), error);
    BESA__TRY_ON(p->be, besa__count_layers(p, work->dense->weight, BESA__DENSE), error);
    return besa__pass_error(p->be, besa__count_sums(p), error);
}

/* ============================================================================================
 * // >>refit                 kept weights fitted anew to the layer's inputs, with masks as they are
 * ============================================================================================
 * Owns what comes after a layer's mask, where option refit asks for it. Of the weights What (R,C) that are not 0 the values
 * are sought that put out most nearly what the dense weights W do: the least
 *     tr((W - What) H (W - What)'), H = 2/T X'X + damping mean(diag).
 * obs goes through the columns from left to right, as SparseGPT does (arXiv 2301.00774): what a pruned weight leaves is taken
 * off the columns right of it. cg takes some steps of conjugate gradients towards the least itself, from What as it is, all
 * rows of a piece at once (ALPS, arXiv 2406.07831, second stage); none makes the sum greater, but for rounding. Masks stay
 * as they are: a kept weight that would be written as 0 keeps its value (besa_weight_step has the same rule). */

/* Rows w (rows, C) of a layer's dense weights, and what (rows, C), columns from left to right. */
static besa_result besa__refit_obs(besa_pruner *p, const void *w, void *what, int input, int64_t rows, int64_t columns)
{
    besa_backend *be = p->be;
    float *wf = p->fit.x, *kept = p->fit.p;
    BESA__TRY(be->convert(be, wf, BESA_F32, w, p->dtype, rows * columns));
    BESA__TRY(be->convert(be, kept, BESA_F32, what, p->dtype, rows * columns));
    for (int64_t first = 0; first < columns; first += BESA__SLAB) {
        int64_t width = besa__min(BESA__SLAB, columns - first);
        BESA__TRY(be->sparsegpt_given(be, wf, p->slab_error, p->gram[input], kept, first, width, rows, columns));
        if (first + width < columns)
            BESA__TRY(be->sparsegpt_push(be, wf, p->slab_error, p->gram[input], first, width, rows, columns));
    }
    return be->refit_end(be, what, wf, p->dtype, rows * columns);
}

/* The same by conjugate gradients: the gradient of half the sum is -(W - What) H in the weights that are kept, which
 * is the residual that begins; H_jj is the preconditioner. */
static besa_result besa__refit_cg(besa_pruner *p, const void *w, void *what, int input, int64_t rows, int64_t columns)
{
    besa_backend *be = p->be;
    besa_refit_step *fit = &p->fit;
    fit->rows = rows;
    fit->columns = columns;
    fit->scale = p->whole_scale[input];
    BESA__TRY(be->refit_begin(be, fit->x, fit->p, w, what, p->dtype, rows * columns));
    for (int64_t step = 0; step <= p->options.refit_steps; step++) {
        fit->first = step == 0;
        BESA__TRY(be->hessian_product(be, p->fit_q, fit->p, p->whole[input], rows, columns));
        BESA__TRY(be->refit_step(be, fit));
    }
    return be->refit_end(be, what, fit->x, p->dtype, rows * columns);
}

/* The kept weights of a layer whose mask is final, a piece of its rows after another; rows are systems of their own. */
static besa_result besa__refit_layer(const besa__work *work, int layer)
{
    besa_pruner *p = work->pruner;
    int64_t rows, columns;
    if (p->options.refit == BESA_REFIT_NONE || p->fixed[layer] == 0) return BESA_OK;
    besa_block_layer(&p->shape, layer, &rows, &columns);
    for (int64_t first = 0; first < rows; first += BESA__REFIT_ROWS) {
        int64_t count = besa__min(BESA__REFIT_ROWS, rows - first);
        const void *w = besa__at_const(work->dense->weight[layer], p->dtype, first * columns);
        void *what = besa__at(work->pruned[layer], p->dtype, first * columns);
        int input = besa__layers[layer].input;
        if (p->options.refit == BESA_REFIT_OBS) BESA__TRY(besa__refit_obs(p, w, what, input, count, columns));
        else BESA__TRY(besa__refit_cg(p, w, what, input, count, columns));
    }
    return BESA_OK;
}

/* Of a block's Gram matrix, before it becomes the factor: H as conjugate gradients take it. */
static besa_result besa__refit_hessian(besa_pruner *p, int input)
{
    besa_backend *be = p->be;
    int64_t columns = besa__input_columns(&p->shape, input);
    size_t bytes = (size_t)columns * (size_t)columns * sizeof(float);
    if (p->whole[input] != p->gram[input])
        BESA__TRY(be->copy(be, BESA_QUEUE_COMPUTE, p->whole[input], p->gram[input], bytes));
    return be->hessian_whole(be, p->whole[input], p->whole_scale[input], (float)p->options.damping, columns);
}

/* FLOP of the products of a block's refits. */
BESA__UNUSED static double besa__refit_flop(const besa_pruner *p)
{
    double flop = 0, products = p->options.refit == BESA_REFIT_CG ? 2 * (double)(p->options.refit_steps + 1) : 1;
    if (p->options.refit == BESA_REFIT_NONE) return 0;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        flop += products * (double)rows * (double)columns * (double)columns;
    }
    return flop;
}

/* ============================================================================================
 * // >>baselines             the rank pass: ranks for BESA, masks of the other methods
 * ============================================================================================
 * Owns what each method does with the statistics of the dense pass; for BESA these are the ranks. */

/* Turn Gram matrices into what refits take and into factors, and column sums into the scores' factors. */
static besa_result besa__finish_statistics(besa_pruner *p)
{
    besa_backend *be = p->be;
    const besa_prune_options *o = &p->options;
    if (!besa__uses_inputs(o)) return BESA_OK;
    for (int i = 0; i < BESA__INPUTS; i++) {
        int64_t columns = besa__input_columns(&p->shape, i);
        if (p->whole[i]) BESA__TRY(besa__refit_hessian(p, i));
        if (besa__uses_factor(o)) BESA__TRY(be->hessian_factor(be, p->gram[i], p->dead[i], (float)o->damping, columns));
        if (o->method == BESA_METHOD_SPARSEGPT || besa__statistic(o) == BESA_STATISTIC_NONE) continue;
        if (!besa__uses_sums(o)) BESA__TRY(be->diagonal(be, p->statistic[i], p->gram[i], p->dead[i], columns));
        BESA__TRY(besa__importance_scale(be, p->statistic[i], p->statistic[i], besa__scored_by(o), columns));
    }
    return BESA_OK;
}

/* SparseGPT: slabs of columns from left to right; a slab's errors are pushed to all columns right of it. With bits,
 * where clips do not learn to suit the weights afterwards, kept ones go to their levels in the same sweep, whose errors are
 * pushed too. */
static besa_result besa__sparsegpt_layer(besa_pruner *p, const void *w, void *pruned, int layer, double target, int n,
                                         int m)
{
    besa_backend *be = p->be;
    int input = besa__layers[layer].input;
    int64_t rows, columns;
    besa_block_layer(&p->shape, layer, &rows, &columns);
    int64_t slab = m > 0 ? BESA__SLAB / m * m : BESA__SLAB; /* no group of m is split */
    /* levels in the sweep where nothing learns from what it leaves */
    const besa_quantizer *levels = p->options.bits && !besa__learns_last(p) ? &p->quantization.layer[layer] : NULL;
    BESA__TRY(be->convert(be, p->scores, BESA_F32, w, p->dtype, rows * columns));
    for (int64_t first = 0; first < columns; first += slab) {
        int64_t width = besa__min(slab, columns - first);
        BESA__TRY(be->sparsegpt_slab(be, p->scores, p->slab_error, p->gram[input], p->dead[input], first, width, target, n,
                                     m, levels, rows, columns));
        if (first + width < columns)
            BESA__TRY(be->sparsegpt_push(be, p->scores, p->slab_error, p->gram[input], first, width, rows, columns));
    }
    return be->convert(be, pruned, p->dtype, p->scores, BESA_F32, rows * columns);
}

/* The factor of a layer's scores per column; NULL: none. */
static const float *besa__score_scale(const besa_pruner *p, int layer)
{
    return besa__statistic(&p->options) != BESA_STATISTIC_NONE ? p->statistic[besa__layers[layer].input] : NULL;
}

/* The weights of a layer that scores are of: the dense ones, or those on their grids, which go where the result will be. */
static besa_result besa__scored_weights(const besa__work *work, int layer, const void *w, const void **scored)
{
    const besa_pruner *p = work->pruner;
    const besa_prune_options *o = &p->options;
    *scored = w;
    if (!o->bits || !o->quantize_first) return BESA_OK;
    BESA__TRY(besa__quantize(&p->quantization, layer, work->levels[layer], *scored, 0, p->quantization.layer[layer].rows));
    *scored = work->levels[layer];
    return BESA_OK;
}

static besa__scoring besa__scoring_of(const besa_pruner *p, int layer)
{
    besa__scoring by;
    by.power = besa__importance_row(besa__scored_by(&p->options))->power;
    by.scale = besa__score_scale(p, layer);
    by.factor = p->score_factor[layer];
    by.sums = p->score_sums;
    return by;
}

/* The ranks of a layer's rows with the weights w, as scores are of them. */
static besa_result besa__rank_weights(const besa__work *work, int layer, const void *w)
{
    besa_pruner *p = work->pruner;
    besa__scoring by = besa__scoring_of(p, layer);
    const void *scored;
    BESA__TRY(besa__scored_weights(work, layer, w, &scored));
    return besa__masks_rank(&p->masks, layer, scored, &by, p->scores, p->scores_count);
}

/* The ranks of a layer's rows; where its rate is known beforehand (not negative), its pruned weights too. */
static besa_result besa__rank_layer(const besa__work *work, int layer, double rate)
{
    besa_pruner *p = work->pruner;
    const void *w = work->dense->weight[layer];
    BESA__TRY(besa__rank_weights(work, layer, w));
    BESA__TRY(besa__masks_zeros(&p->masks, layer, w));
    if (rate < 0) return BESA_OK;
    BESA__TRY(besa__masks_fix(&p->masks, layer, rate));
    return besa__masks_apply(&p->masks, layer, w, work->pruned[layer]);
}

/* The mask of a layer that the pattern has, by the scores of the weights w: the n smallest of every m go. */
static besa_result besa__mask_by_pattern(const besa__work *work, int layer, const void *w)
{
    besa_pruner *p = work->pruner;
    besa_backend *be = p->be;
    besa__scoring by = besa__scoring_of(p, layer);
    int64_t rows, columns;
    besa_block_layer(&p->shape, layer, &rows, &columns);
    const void *scored;
    BESA__TRY(besa__scored_weights(work, layer, w, &scored));
    BESA__TRY(besa__scoring_begin(be, &by, scored, p->dtype, rows, columns));
    for (int64_t r = 0, count; r < rows; r += count) {
        count = besa__min(p->scores_count / columns, rows - r);
        int64_t at = r * columns;
        BESA__TRY(besa__scoring_rows(be, &by, p->scores, scored, p->dtype, r, count, columns));
        BESA__TRY(be->mask_pattern(be, besa__at(work->pruned[layer], p->dtype, at), besa__at_const(w, p->dtype, at), p->dtype,
                                   p->scores, p->options.pattern_n, p->options.pattern_m, count, columns));
    }
    return BESA_OK;
}

/* The smallest scores of the whole layer. */
static besa_result besa__prune_layer(const besa__work *work, int layer, double target)
{
    besa_pruner *p = work->pruner;
    besa_backend *be = p->be;
    const void *w = work->dense->weight[layer];
    void *pruned = work->pruned[layer];
    int64_t rows, columns;
    besa_block_layer(&p->shape, layer, &rows, &columns);
    const void *scored;
    int power = besa__importance_row(besa__scored_by(&p->options))->power;
    BESA__TRY(besa__scored_weights(work, layer, w, &scored));
    BESA__TRY(be->score(be, p->scores, scored, p->dtype, besa__score_scale(p, layer), power, rows, columns));
    int64_t count = (int64_t)floor(target * (double)(rows * columns));
    return be->mask_smallest(be, pruned, w, p->dtype, p->scores, count, rows, columns);
}

/* Pass 2 for one layer. */
static besa_result besa__rank_or_prune(const besa__work *work, int layer)
{
    besa_pruner *p = work->pruner;
    const besa_prune_options *o = &p->options;
    const void *w = work->dense->weight[layer];
    int64_t rows, columns;
    besa_block_layer(&p->shape, layer, &rows, &columns);
    int is_fixed = p->fixed[layer] >= 0;
    double target = is_fixed ? p->fixed[layer] : o->rates.target;
    int n = is_fixed ? 0 : o->pattern_n, m = is_fixed ? 0 : o->pattern_m;
    if (is_fixed && target == 0) {
        if (p->masks.count > 0) BESA__TRY(besa__masks_fix(&p->masks, layer, 0));
        size_t bytes = besa_dtype_size(p->dtype) * (size_t)(rows * columns);
        return p->be->copy(p->be, BESA_QUEUE_COMPUTE, work->pruned[layer], w, bytes);
    }
    if (o->method == BESA_METHOD_KEEP) return p->be->mask_zeros(p->be, work->pruned[layer], w, p->dtype, rows * columns);
    if (o->method == BESA_METHOD_SPARSEGPT) return besa__sparsegpt_layer(p, w, work->pruned[layer], layer, target, n, m);
    if (m > 0) return besa__mask_by_pattern(work, layer, w);
    if (o->method == BESA_METHOD_MAGNITUDE && !o->magnitude_per_row) return besa__prune_layer(work, layer, target);
    return besa__rank_layer(work, layer, besa__learns_rates(p) ? p->fixed[layer] : target);
}

/* With bits: grids for the block's weights. Masks that are kept have come in where the result will be. */
static besa_result besa__quantization_begin(const besa__work *work)
{
    besa_pruner *p = work->pruner;
    for (int i = 0; i < BESA_LAYERS && p->options.method == BESA_METHOD_KEEP; i++) {
        const besa_quantizer *layer = &p->quantization.layer[i];
        size_t bytes = (size_t)(layer->rows * layer->columns) * besa_dtype_size(p->dtype);
        BESA__TRY(p->be->copy(p->be, BESA_QUEUE_COMPUTE, work->pruned[i], work->levels[i], bytes));
    }
    return besa__quantization_reset(&p->quantization, work->dense->weight);
}

/* Pass 2. Every layer is ranked, or pruned at once. Gradients come later: their factor is 1 until then, and stays so for
 * layers that do not learn. */
static besa_result besa__rank_pass(const besa__work *work, besa_error *error)
{
    besa_pruner *p = work->pruner;
    BESA__TRY_ON(p->be, besa__finish_statistics(p), error);
    if (p->options.bits) BESA__TRY_ON(p->be, besa__quantization_begin(work), error);
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        int32_t one = (int32_t)besa__float_bits(1.0f);
        if (p->score_factor[i])
            BESA__TRY_ON(p->be, p->be->fill(p->be, (int32_t *)(void *)p->score_factor[i], one, rows * columns), error);
        BESA__TRY_ON(p->be, besa__rank_or_prune(work, i), error);
        if (!besa__finds_masks(p)) BESA__TRY_ON(p->be, besa__refit_layer(work, i), error);
        if (besa__learns_rates(p) && p->fixed[i] >= 0) BESA__TRY_ON(p->be, besa__rates_fix(&p->rates, i), error);
        BESA__TRY(besa__tick(&p->meter, 1 / (double)BESA_LAYERS, error));
    }
    return BESA_OK;
}

/* ============================================================================================
 * // >>learning              the learn pass: forward, loss, backward, step
 * ============================================================================================
 * Owns what happens to one batch of sequences, and BESA's use of it. besa__batch_gradient knows nothing of what its
 * gradients are for. */

/* A batch, and what is wanted of it. */
typedef struct besa__batch {
    int64_t first, end;                         /* sequences first .. end - 1 */
    int64_t again;                              /* where the batch after it begins */
    float *loss;                                /* (1) device: the batch's loss is added */
    unsigned layers;                            /* bit i: layer i's gradient is wanted */
    besa_weight_gradient gradient;              /* receives them, piece by piece of the batch */
    besa_result (*complete)(void *user, int layer); /* then, once all of a layer's have come; NULL: none */
    void *user;                                 /* of both */
} besa__batch;

/* Sequences of the next piece of an optimiser's batch, as many as memory has room for. */
static int64_t besa__batch_cut(const void *pruner, int64_t first)
{
    const besa_pruner *p = (const besa_pruner *)pruner;
    int64_t end = besa__min(first / p->batch * p->batch + p->batch, p->nsamples);
    return besa__min(p->micro_batch, end - first);
}

/* With bits: whether the forward pass reads weights on their grids from now on, and how fast these learn: through grids large
 * steps fit the calibration text alone (as above, half of weight_lr instead of a sixth: 59.7 / 53.5, 123 / 85). */
static void besa__use_grids(const besa__work *work, int on)
{
    besa_pruner *p = work->pruner;
    p->on_grids = work->levels && on;
    p->weights.lr = p->on_grids ? p->options.weight_lr / 6 : p->options.weight_lr;
    for (int i = 0; i < BESA_LAYERS; i++) p->masked.weight[i] = p->on_grids ? work->levels[i] : work->pruned[i];
}

/* With bits: the weights that the forward pass reads, from the masked ones. */
static besa_result besa__put_on_grids(const besa__work *work)
{
    const besa_pruner *p = work->pruner;
    for (int i = 0; i < BESA_LAYERS && p->on_grids; i++)
        BESA__TRY(besa__quantize(&p->quantization, i, work->levels[i], work->pruned[i], 0, p->quantization.layer[i].rows));
    return BESA_OK;
}

/* A piece of a batch on its way back through the block. */
typedef struct besa__piece {
    besa_pruner *pruner;
    const besa__batch *batch;
    const besa__walk *walk;
} besa__piece;

static besa_result besa__piece_gradient(void *user, int layer, int64_t first, int64_t rows, const void *dw)
{
    const besa__piece *piece = (const besa__piece *)user;
    const besa__batch *batch = piece->batch;
    int64_t all, columns;
    besa_block_layer(&piece->pruner->shape, layer, &all, &columns);
    int last = first + rows == all && piece->walk->first + piece->walk->count == batch->end;
    BESA__TRY(batch->gradient(batch->user, layer, first, rows, dw));
    return last && batch->complete ? batch->complete(batch->user, layer) : BESA_OK;
}

/* Granularity attn-mlp: at h1 attention's own loss takes the place of what comes back from the MLP's. */
static besa_result besa__attention_loss(void *user, void *dh1)
{
    const besa__piece *piece = (const besa__piece *)user;
    besa_pruner *p = piece->pruner;
    return besa__part_loss(p, piece->batch->loss, dh1, p->acts.h1, p->part_ref, p->part_sumsq[0], p->shape.hidden_size,
                           piece->walk->first, piece->walk->count);
}

/* Granularity layer: the loss of every layer on its inputs in the masked block, and the gradient of its weights. */
static besa_result besa__layer_losses(const besa__work *work, const besa__backward *backward, const besa__piece *piece,
                                      const void *x)
{
    besa_pruner *p = work->pruner;
    const besa__walk *walk = piece->walk;
    BESA__TRY(besa__block_forward(p->be, work->masked, &p->acts, x, NULL, walk->count, p->seqlen, 1));
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        const void *read = besa__layer_input(p, besa__layers[i].input);
        if (!(piece->batch->layers >> i & 1u)) continue;
        besa_block_layer(&p->shape, i, &rows, &columns);
        BESA__TRY(besa__layer_forward(p->be, work->masked, i, p->part, read, backward->tokens, 0));
        BESA__TRY(besa__layer_forward(p->be, work->dense, i, p->part_ref, read, backward->tokens, 0));
        BESA__TRY(besa__part_loss(p, piece->batch->loss, p->part, p->part, p->part_ref, p->part_sumsq[i], rows, walk->first,
                                  walk->count));
        BESA__TRY(besa__layer_gradient(backward, i, p->part, read));
    }
    return BESA_OK;
}

/* The masked block's loss on a batch, and the gradients of its weights: L and dL/dWhat, sums over the batch. */
static besa_result besa__batch_gradient(const besa__work *work, const besa__batch *batch)
{
    besa_pruner *p = work->pruner;
    besa__walk walk = besa__walk_over(besa__batch_cut, p, batch->first, batch->end, batch->again);
    besa__backward backward = besa__backward_of(p->be, work->masked, &p->acts, p->seqlen);
    besa__piece piece = {p, batch, &walk};
    int halves = p->options.granularity == BESA_GRANULARITY_ATTN_MLP;
    int layers = p->options.granularity == BESA_GRANULARITY_LAYER;
    backward.layers = batch->layers;
    backward.gradient = besa__piece_gradient;
    backward.at_h1 = halves ? besa__attention_loss : NULL;
    backward.user = &piece;
    while (besa__walk_next(&walk)) {
        void *x, *yref;
        besa__backward_batch(&backward, walk.count);
        BESA__TRY(besa__put_on_grids(work));
        BESA__TRY(besa__work_open(work, &walk, &x, &yref));
        if (halves) BESA__TRY(besa__attention_half(p->be, work->dense, &p->acts, x, p->part_ref, walk.count, p->seqlen));
        if (layers) BESA__TRY(besa__layer_losses(work, &backward, &piece, x));
        else {
            BESA__TRY(besa__block_forward(p->be, work->masked, &p->acts, x, p->y, walk.count, p->seqlen, 1));
            BESA__TRY(besa__pruner_loss(p, batch->loss, p->y, p->y, yref, walk.first, walk.count, 0));
            BESA__TRY(besa__block_backward(&backward, x, p->y, NULL));
        }
        BESA__TRY(besa__work_close(work, 0, yref));
    }
    return BESA_OK;
}

/* The weights of a layer that masks are applied to: those that learn, or the dense ones. */
static const void *besa__unmasked(const besa__work *work, int layer)
{
    const besa_pruner *p = work->pruner;
    return besa__learns_weights(p) ? p->weights.layer[layer].source : work->dense->weight[layer];
}

/* The masks of every learned layer, as the rates have them now: in full, or what has changed since. Those of a pattern are
 * made where weights are ranked. */
static besa_result besa__mask_learned(const besa__work *work, int full)
{
    besa_pruner *p = work->pruner;
    for (int i = 0; i < BESA_LAYERS && besa__learns_rates(p); i++)
        if (p->fixed[i] < 0)
            BESA__TRY(besa__masks_update(&p->masks, i, besa__unmasked(work, i), work->pruned[i], full));
    return BESA_OK;
}

/* The loss of the masked block on the report's sequences, into one slot. */
static besa_result besa__report_loss(const besa__work *work, int slot)
{
    besa_pruner *p = work->pruner;
    besa__walk walk = besa__pass_walk(p, besa__shown(p));
    BESA__TRY(besa__put_on_grids(work));
    while (besa__walk_next(&walk)) {
        void *x, *yref;
        BESA__TRY(besa__work_open(work, &walk, &x, &yref));
        BESA__TRY(besa__block_forward(p->be, work->masked, &p->acts, x, p->y, walk.count, p->seqlen, 0));
        BESA__TRY(besa__pruner_loss(p, p->losses + slot, NULL, p->y, yref, walk.first, walk.count, besa__all_shown(p)));
        BESA__TRY(besa__work_close(work, 0, yref));
    }
    return besa__reduce(p->shares.comm, p->be, p->losses + slot, 1);
}

/* The ranks of a layer that learns, by its weights as they have become, or the mask itself where there is a pattern. */
static besa_result besa__rank_learned(const besa__work *work, int layer)
{
    const void *w = besa__unmasked(work, layer);
    return work->pruner->options.pattern_m ? besa__mask_by_pattern(work, layer, w) : besa__rank_weights(work, layer, w);
}

/* The uniform mask, floor(target C) of every row, and the mask at the start of learning: measured once where learning
 * starts at the target: then the two masks are equal, or differ by one weight in every row of a layer, by rounding. Both are
 * the pattern's where there is one. */
static besa_result besa__losses_before(const besa__work *work)
{
    besa_pruner *p = work->pruner;
    for (int i = 0; i < BESA_LAYERS && besa__learns_rates(p); i++)
        if (p->fixed[i] < 0) BESA__TRY(besa__masks_uniform(&p->masks, i, p->options.rates.target));
    BESA__TRY(besa__mask_learned(work, 1));
    BESA__TRY(besa__report_loss(work, BESA__LOSS_UNIFORM));
    if (!besa__learns_rates(p) || !p->options.rates.zero_start)
        return p->be->copy(p->be, BESA_QUEUE_COMPUTE, p->losses + BESA__LOSS_BEFORE, p->losses + BESA__LOSS_UNIFORM,
                           sizeof(float));
    BESA__TRY(besa__rates_forward(&p->rates));
    BESA__TRY(besa__mask_learned(work, 0));
    return besa__report_loss(work, BESA__LOSS_BEFORE);
}

/* What learns in a pass over the sequences. */
typedef struct besa__learning {
    const besa__work *work;
    int rates, weights;                         /* whether these do */
    int masks;                                  /* whether masks are not final: they follow the rates, or moving weights */
    int64_t done, steps;                        /* steps of earlier passes, and of this one */
    int64_t before;                             /* this rank's sequences that gradients for scores come from, before the steps */
} besa__learning;

/* Bucket sums of some rows of a layer: dL/dWhat * W, or with bits Q(W), which takes the place of what nothing reads any more
 * before weights are put on their grids again. */
static besa_result besa__learn_rates(const besa__work *work, int layer, int64_t first, int64_t rows, const void *dw)
{
    besa_pruner *p = work->pruner;
    const void *w = besa__unmasked(work, layer);
    if (p->fixed[layer] >= 0) return BESA_OK;
    if (p->on_grids) {
        BESA__TRY(besa__quantize(&p->quantization, layer, work->levels[layer], w, first, rows));
        w = work->levels[layer];
    }
    return besa__rates_gradient(&p->rates, layer, w, first, rows, dw, p->acts.dw_dtype);
}

/* What the gradient of a layer's weights is for, some rows or all: its rows' bucket sums, the clips, and a step of the
 * weights themselves, which nothing in this step reads any more. Through grids it is passed as it is. Where weights learn it
 * is that of all ranks. */
static besa_result besa__learn_gradient(void *user, int layer, int64_t first, int64_t rows, const void *dw)
{
    const besa__learning *l = (const besa__learning *)user;
    besa_pruner *p = l->work->pruner;
    int64_t all, columns;
    besa_block_layer(&p->shape, layer, &all, &columns);
    float *summed = p->acts.dw_sum[layer] ? p->acts.dw_sum[layer] : p->acts.dw; /* dw is the first of it */
    if (l->weights) BESA__TRY(besa__reduce(p->shares.comm, p->be, summed, rows * columns));
    if (l->rates) BESA__TRY(besa__learn_rates(l->work, layer, first, rows, dw));
    if (besa__moves_clips(p)) BESA__TRY(besa__clips_gradient(&p->quantization, layer, first, rows, (const float *)dw));
    if (!l->weights || p->fixed[layer] == 0) return BESA_OK;
    return besa__weights_move(&p->weights, layer, first * columns, rows * columns, (const float *)dw, l->work->pruned[layer]);
}

/* A layer's bucket sums are there: with those of the other ranks, while the rest of the backward pass runs. Those of weights
 * that learn come from gradients of all ranks. */
static besa_result besa__learn_complete(void *user, int layer)
{
    const besa__learning *l = (const besa__learning *)user;
    besa_pruner *p = l->work->pruner;
    const besa__rate_layer *rates = &p->rate_layer[layer];
    if (!l->rates || l->weights || p->fixed[layer] >= 0) return BESA_OK;
    return besa__reduce_begin(p->shares.comm, p->be, rates->sums, rates->shape.rows * (rates->shape.logits - 1));
}

/* What else a step needs of all ranks, once its gradients are there; then all that has been begun is done. */
static besa_result besa__reduce_step(const besa__learning *l, const besa__batch *batch)
{
    besa_pruner *p = l->work->pruner;
    const besa_comm *comm = p->shares.comm;
    const besa__parameters *clips = &p->quantization.clips;
    BESA__TRY(besa__reduce_begin(comm, p->be, batch->loss, 1));
    for (int i = 0; i < BESA_VECTORS; i++)
        if (p->acts.dvector[i]) BESA__TRY(besa__reduce_begin(comm, p->be, p->acts.dvector[i], p->weights.vector[i].count));
    if (besa__moves_clips(p) && !l->weights) BESA__TRY(besa__reduce_begin(comm, p->be, clips->grad, clips->step.n));
    return besa__reduce_end(comm, p->be);
}

/* The layers whose gradients a pass needs, as bits; those that stay dense are left as they are, but for their clips. */
static unsigned besa__learned_layers(const besa_pruner *p, int weights)
{
    unsigned layers = 0;
    if (besa__moves_clips(p)) return (1u << BESA_LAYERS) - 1;
    for (int i = 0; i < BESA_LAYERS; i++)
        if (weights ? p->fixed[i] != 0 : p->fixed[i] < 0) layers |= 1u << i;
    return layers;
}

/* Where the loss of a step goes, counted from 0. */
static float *besa__step_loss(const besa_pruner *p, int64_t step)
{
    return p->losses + BESA__LOSS_STEP + besa__min(step, p->step_losses - 1);
}

/* Gradients that are summed over a batch's pieces: before and after them. */
static besa_result besa__clear_gradients(besa_pruner *p, const besa__batch *batch)
{
    for (int i = 0; i < BESA_LAYERS; i++)
        if (p->acts.dw_sum[i] && batch->layers >> i & 1u)
            BESA__TRY(p->be->zero(p->be, BESA_QUEUE_COMPUTE, p->acts.dw_sum[i],
                                  (size_t)p->weights.layer[i].count * sizeof(float)));
    for (int i = 0; i < BESA_VECTORS; i++)
        if (p->acts.dvector[i])
            BESA__TRY(p->be->zero(p->be, BESA_QUEUE_COMPUTE, p->acts.dvector[i],
                                  (size_t)p->weights.vector[i].count * sizeof(float)));
    return BESA_OK;
}

static besa_result besa__use_gradients(besa_pruner *p, const besa__batch *batch)
{
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        if (!p->acts.dw_sum[i] || !(batch->layers >> i & 1u)) continue;
        BESA__TRY(batch->gradient(batch->user, i, 0, rows, p->acts.dw_sum[i]));
        if (batch->complete) BESA__TRY(batch->complete(batch->user, i));
    }
    return BESA_OK;
}

/* The ranks and masks of the next step, `steps` after the first. Where weights learn with the rates they are ranked as they
 * have become: a weight that has shrunk goes, and what is now the larger one comes back. */
static besa_result besa__rank_and_mask(const besa__learning *l, int64_t steps)
{
    besa_pruner *p = l->work->pruner;
    int64_t interval = p->options.rank_interval;
    int anew = l->weights && interval > 0 && steps > 0 && steps % interval == 0;
    for (int i = 0; i < BESA_LAYERS && anew; i++)
        if (p->fixed[i] < 0) BESA__TRY(besa__rank_learned(l->work, i));
    return besa__mask_learned(l->work, anew);
}

/* One optimiser step on a batch, `steps` after the pass's first. */
static besa_result besa__learn_step(besa__learning *l, const besa__batch *batch, int64_t steps)
{
    besa_pruner *p = l->work->pruner;
    if (l->weights) p->weights.step++;
    if (l->rates) BESA__TRY(besa__rates_forward(&p->rates));
    if (l->masks) BESA__TRY(besa__rank_and_mask(l, steps));
    BESA__TRY(p->be->zero(p->be, BESA_QUEUE_COMPUTE, batch->loss, sizeof(float)));
    BESA__TRY(besa__clear_gradients(p, batch));
    if (besa__moves_clips(p)) BESA__TRY(besa__clips_clear(&p->quantization));
    BESA__TRY(besa__batch_gradient(l->work, batch));
    BESA__TRY(besa__use_gradients(p, batch));
    BESA__TRY(besa__reduce_step(l, batch));
    if (l->weights) BESA__TRY(besa__vectors_move(&p->weights));
    if (besa__moves_clips(p)) BESA__TRY(besa__clips_step(&p->quantization));
    if (l->rates) BESA__TRY(besa__rates_backward(&p->rates));
    return l->rates ? besa__parameters_step(&p->parameters) : BESA_OK;
}

/* Tell the caller's callback of a step. */
static besa_result besa__tell_step(const besa__learning *l, int64_t step, const float *loss, besa_error *error)
{
    besa_pruner *p = l->work->pruner;
    if (!p->options.step) return BESA_OK;
    besa_step now = {p->meter.block, step, p->steps, besa__learns_rates(p) ? &p->rates : NULL, p->be, loss,
                     l->rates ? p->parameters.step.lr : 0, l->weights ? besa__weights_step(&p->weights, 1).lr : 0};
    besa_result result = p->options.step(p->options.user, &now);
    if (result == BESA_OK) return BESA_OK;
    return besa__fail(error, result, "the step callback returned: %s", besa_result_string(result));
}

/* One optimiser step per batch of sequences, again and again over all of them. */
static besa_result besa__learn(besa__learning *l, besa_error *error)
{
    besa_pruner *p = l->work->pruner;
    int64_t size = p->batch, batches = besa__parts(p->nsamples, size);
    besa__batch batch = {0, 0, 0, NULL, besa__learned_layers(p, l->weights), besa__learn_gradient, besa__learn_complete, l};
    for (int i = 0; i < BESA_VECTORS; i++) {
        int learns = l->weights && p->weights.vector[i].dense && (i >= BESA_LAYERS || p->fixed[i] != 0);
        p->acts.dvector[i] = learns ? p->weights.vector[i].grad : NULL;
    }
    for (int64_t s = 0; s < l->steps && batch.layers; s++) {
        batch.first = s % batches * size;
        batch.end = besa__min(batch.first + size, p->nsamples);
        batch.again = batch.end < p->nsamples ? batch.end : 0; /* of this epoch, or the next one's first */
        batch.loss = besa__step_loss(p, l->done + s);
        BESA__TRY_ON(p->be, besa__learn_step(l, &batch, s), error);
        BESA__TRY(besa__tick(&p->meter, 1 / (double)(l->before + l->steps), error));
        BESA__TRY(besa__tell_step(l, l->done + s + 1, batch.loss, error));
    }
    return BESA_OK;
}

/* Add the squares of a layer's gradient, some rows or all. */
static besa_result besa__square_gradient(void *user, int layer, int64_t first, int64_t rows, const void *dw)
{
    const besa_pruner *p = (const besa_pruner *)user;
    int64_t all, columns;
    besa_block_layer(&p->shape, layer, &all, &columns);
    return p->be->accumulate_squares(p->be, p->score_factor[layer] + first * columns, (const float *)dw, rows * columns);
}

/* The squares of the gradients of single sequences, with uniform masks, or the rank pass's by the pattern. */
static besa_result besa__gradient_squares(const besa__learning *l, besa_error *error)
{
    besa_pruner *p = l->work->pruner;
    besa_backend *be = p->be;
    besa__batch batch = {0, 0, -1, besa__step_loss(p, 0), 0, besa__square_gradient, NULL, p};
    for (int i = 0; i < BESA_VECTORS; i++) p->acts.dvector[i] = NULL;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        if (p->fixed[i] >= 0) continue;
        batch.layers |= 1u << i;
        BESA__TRY_ON(be, be->zero(be, BESA_QUEUE_COMPUTE, p->score_factor[i], (size_t)(rows * columns) * sizeof(float)), error);
        if (besa__learns_rates(p)) BESA__TRY_ON(be, besa__masks_uniform(&p->masks, i, p->options.rates.target), error);
    }
    BESA__TRY_ON(be, besa__mask_learned(l->work, 1), error);
    for (; batch.first < l->before; batch.first++) {
        batch.end = batch.first + 1;
        BESA__TRY_ON(be, besa__clear_gradients(p, &batch), error);
        BESA__TRY_ON(be, besa__batch_gradient(l->work, &batch), error);
        BESA__TRY_ON(be, besa__use_gradients(p, &batch), error);
        BESA__TRY(besa__tick(&p->meter, 1 / (double)(l->before + l->steps), error));
    }
    return BESA_OK;
}

/* Rank anew by scores that see the block's loss: the squares become the factor of the scores. */
static besa_result besa__rank_by_gradients(const besa__learning *l, besa_error *error)
{
    besa_pruner *p = l->work->pruner;
    BESA__TRY(besa__gradient_squares(l, error));
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        if (p->fixed[i] >= 0) continue;
        float *factor = p->score_factor[i], exponent = besa__importance_row(p->options.importance)->gradient;
        BESA__TRY_ON(p->be, besa__reduce(p->shares.comm, p->be, factor, rows * columns), error);
        BESA__TRY_ON(p->be, p->be->power(p->be, factor, factor, exponent, rows * columns), error);
        BESA__TRY_ON(p->be, besa__rank_learned(l->work, i), error);
    }
    return BESA_OK;
}

/* Final masks: the rates as learned, projected onto the exact count unless that is not wanted, and the last ranks; and the
 * kept weights, where they are fitted anew. */
static besa_result besa__final_masks(const besa__learning *l)
{
    besa_pruner *p = l->work->pruner;
    if (l->rates && p->options.no_projection) BESA__TRY(besa__rates_forward(&p->rates));
    else if (l->rates) BESA__TRY(besa__rates_project(&p->rates));
    BESA__TRY(besa__rank_and_mask(l, p->options.rank_interval));
    for (int i = 0; i < BESA_LAYERS; i++) BESA__TRY(besa__refit_layer(l->work, i));
    return BESA_OK;
}

/* Pass 3. BESA: learn the rates, and the weights with them where both learn, then the final masks. With a pattern weights
 * alone learn here, and masks follow them. */
static besa_result besa__learn_pass(const besa__work *work, besa_error *error)
{
    besa_pruner *p = work->pruner;
    besa__learning l = {work, besa__learns_rates(p), p->options.learn == BESA_LEARN_BOTH, 1, 0, p->options.rates.steps,
                        besa__gradient_sequences(p)};
    besa__use_grids(work, !besa__grids_wait(p));
    for (int i = 0; i < BESA_LAYERS && besa__learns_weights(p); i++)
        BESA__TRY_ON(p->be, besa__weights_reset(&p->weights, i, work->dense->weight[i], work->dense->weight[i]), error);
    if (!besa__learned_layers(p, 0)) l.before = 0;
    else if (besa__uses_gradients(&p->options)) BESA__TRY(besa__rank_by_gradients(&l, error));
    if (besa__learned_layers(p, 0)) BESA__TRY_ON(p->be, besa__losses_before(work), error);
    BESA__TRY(besa__learn(&l, error));
    return besa__pass_error(p->be, besa__final_masks(&l), error);
}

/* Pass 4. The kept weights, or clips alone, learn with the final masks. */
static besa_result besa__weights_pass(const besa__work *work, besa_error *error)
{
    besa_pruner *p = work->pruner;
    besa__learning l = {work, 0, besa__learns_weights(p), 0, p->options.rates.steps, 0, 0};
    l.steps = p->steps - l.done;
    besa__use_grids(work, 1);
    BESA__TRY_ON(p->be, besa__report_loss(work, BESA__LOSS_MASKS), error);
    int reset = !besa__finds_masks(p) || p->options.refit != BESA_REFIT_NONE; /* else they are as masks are applied to them */
    for (int i = 0; i < BESA_LAYERS && l.weights && reset; i++)
        BESA__TRY_ON(p->be, besa__weights_reset(&p->weights, i, work->pruned[i], work->dense->weight[i]), error);
    return besa__learn(&l, error);
}

/* ============================================================================================
 * // >>results               the commit pass, and what comes back of a block
 * ============================================================================================
 * Owns the step to the next block, and the report of this one. */

/* Weights that have moved become what the file will hold of them: F16 has fewer bits than bf16 near 0. */
static besa_result besa__round_written(const besa__work *work)
{
    besa_pruner *p = work->pruner;
    besa_backend *be = p->be;
    if (p->written_dtype == p->dtype || !besa__learns_weights(p)) return BESA_OK;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        for (int64_t at = 0, n; at < rows * columns; at += n) {
            void *w = besa__at(work->pruned[i], p->dtype, at);
            n = besa__min(p->acts.dw_count, rows * columns - at);
            BESA__TRY(be->convert(be, p->acts.dw, p->written_dtype, w, p->dtype, n));
            BESA__TRY(be->convert(be, w, p->dtype, p->acts.dw, p->written_dtype, n));
        }
    }
    return BESA_OK;
}

/* Pass 5. X = F(What, X), and the loss on the way. */
static besa_result besa__commit_pass(const besa__work *work, besa_error *error)
{
    besa_pruner *p = work->pruner;
    besa_backend *be = p->be;
    int64_t shown = besa__shown(p);
    besa__walk walk = besa__pass_walk(p, p->nsamples);
    BESA__TRY_ON(be, besa__round_written(work), error);
    BESA__TRY_ON(be, besa__put_on_grids(work), error);
    while (besa__walk_next(&walk)) {
        void *x, *yref;
        int64_t of = walk.first < shown ? besa__all_shown(p) : p->all_reference - besa__all_shown(p);
        float *loss = p->losses + (walk.first < shown ? BESA__LOSS_AFTER : BESA__LOSS_REST);
        BESA__TRY_ON(be, besa__work_open(work, &walk, &x, &yref), error);
        BESA__TRY_ON(be, besa__block_forward(be, work->masked, &p->acts, x, x, walk.count, p->seqlen, 0), error);
        if (yref) BESA__TRY_ON(be, besa__pruner_loss(p, loss, NULL, x, yref, walk.first, walk.count, of), error);
        BESA__TRY_ON(be, besa__work_close(work, 1, yref), error);
        BESA__TRY(besa__tick(&p->meter, (double)walk.count / (double)p->nsamples, error));
    }
    BESA__TRY_ON(be, besa__reduce(p->shares.comm, be, p->losses + BESA__LOSS_AFTER, 2), error); /* and BESA__LOSS_REST */
    /* weights that have become infinite lie on a level as all others: they are looked for before that */
    if (work->levels) BESA__TRY_ON(be, besa__count_layers(p, (const void *const *)work->pruned, BESA__WRITTEN), error);
    return besa__pass_error(be, besa__count_layers(p, work->masked->weight, BESA__WRITTEN), error);
}

/* Bring home what is to be known of a block: here the host waits for it. */
static besa_result besa__fetch_results(besa_pruner *p)
{
    besa_backend *be = p->be;
    besa__results *r = p->results;
    const besa_queue q = BESA_QUEUE_COMPUTE;
    const size_t losses = (size_t)(BESA__LOSS_STEP + p->step_losses) * sizeof(float);
    memset(r, 0, sizeof *r);
    BESA__TRY(be->download(be, q, p->results_losses, p->losses, losses));
    BESA__TRY(be->download(be, q, r->not_finite, p->not_finite, sizeof r->not_finite));
    BESA__TRY(be->download(be, q, p->results_counts, p->counts, 2 * (size_t)p->rows * sizeof(int32_t)));
    for (int64_t i = 0, at = 0; i < BESA_VECTORS; at += p->weights.vector[i++].count)
        if (p->weights.vector[i].dense)
            BESA__TRY(be->download(be, q, p->results_vectors + at, p->weights.vector[i].value,
                                   (size_t)p->weights.vector[i].count * sizeof(float)));
    if (besa__learns_rates(p)) {
        BESA__TRY(be->download(be, q, r->scalars, p->parameters.step.scalars, sizeof r->scalars));
        BESA__TRY(be->download(be, q, &r->mean, p->rates.mean, sizeof r->mean));
        BESA__TRY(be->download(be, q, r->excess, p->rates.excess, (size_t)p->rates.parts * sizeof *r->excess));
    }
    BESA__TRY(be->synchronize(be, BESA_QUEUE_UPLOAD));
    BESA__TRY(be->synchronize(be, BESA_QUEUE_DOWNLOAD));
    return be->synchronize(be, q);
}

static void besa__rate_spread(besa_layer_report *r, const int32_t *counts, int64_t rows, int64_t columns)
{
    double sum = 0, squares = 0;
    r->weights = rows * columns;
    r->pruned = 0;
    r->rate_min = 1;
    r->rate_max = 0;
    for (int64_t i = 0; i < rows; i++) {
        double rate = (double)counts[i] / (double)columns;
        r->pruned += counts[i];
        sum += rate;
        squares += rate * rate;
        if (rate < r->rate_min) r->rate_min = rate;
        if (rate > r->rate_max) r->rate_max = rate;
    }
    r->rate_mean = sum / (double)rows;
    double variance = squares / (double)rows - r->rate_mean * r->rate_mean;
    r->rate_std = variance > 0 ? sqrt(variance) : 0;
}

static besa_result besa__check_layers_finite(const besa_pruner *p, const char *name, int which, besa_error *error)
{
    const int32_t *count = p->results->not_finite + which * BESA_LAYERS;
    for (int i = 0; i < BESA_LAYERS; i++)
        if (count[i] != 0)
            return besa__fail(error, BESA_ERROR_NOT_FINITE, "%s%s.weight: %d %sweights are NaN or infinite%s",
                              name ? name : "", besa__layers[i].path, (int)count[i], which == BESA__DENSE ? "" : "pruned ",
                              which == BESA__WRITTEN && besa__learns_weights(p) ? ": weight_lr may be too large" : "");
    return BESA_OK;
}

/* The same of norms and biases that learned. */
static besa_result besa__check_vectors_finite(const besa_pruner *p, const char *name, besa_error *error)
{
    const float *at = p->results_vectors;
    for (int i = 0; i < BESA_VECTORS && at; at += p->weights.vector[i++].count) {
        int64_t count = 0;
        for (int64_t k = 0; k < p->weights.vector[i].count && p->weights.vector[i].dense; k++)
            count += !besa__is_finite((double)at[k]);
        if (count != 0)
            return besa__fail(error, BESA_ERROR_NOT_FINITE, "%s%s.%s: %lld elements have become NaN or infinite: weight_lr "
                              "may be too large", name ? name : "", i < BESA_LAYERS ? besa__layers[i].path
                              : besa__norm_path(&p->shape, i), i < BESA_LAYERS ? "bias" : "weight", (long long)count);
    }
    return BESA_OK;
}

/* ---- what was not finite, and where -------------------------------------------------------- */

static besa_result besa__check_sums(const besa_pruner *p, const char *name, besa_error *error)
{
    const int32_t *bad = p->results->not_finite;
    int64_t norms = besa__norms(p), batch = p->options.norm_all ? p->all_reference : p->options.batch_size, n = 0;
    for (int i = 0; i < BESA__INPUTS; i++)
        if (bad[BESA__COUNT_INPUTS + i] != 0)
            return besa__fail(error, BESA_ERROR_NOT_FINITE, "%s%s: the sums of squares of its inputs are not finite in "
                              "the dense pass: activations overflow", name ? name : "", besa__reader(i)->path);
    if (bad[BESA__COUNT_NORMS] == 0) return BESA_OK;
    while (n + 1 < norms && !besa__any_not_finite(p->be, besa__channel_sumsq(p, n), p->shape.hidden_size)) n++;
    return besa__fail(error, BESA_ERROR_NOT_FINITE, "%s%s: the channel norms of the reference for sequences %lld .. "
                      "%lld are not finite in the dense pass: activations overflow", name ? name : "the block", name ? "*" : "",
                      (long long)(n * batch),
                      (long long)besa__min(n * batch + batch, p->all_reference) - 1);
}

/* One loss, of sequences first .. end-1; when: "in the commit pass". */
static besa_result besa__check_loss(float loss, const char *name, int64_t first, int64_t end, const char *when,
                                    besa_error *error)
{
    if (besa__is_finite(loss)) return BESA_OK;
    return besa__fail(error, BESA_ERROR_NOT_FINITE, "%s%s: the reconstruction loss of sequences %lld .. %lld is not "
                      "finite %s: activations overflow", name ? name : "the block", name ? "*" : "", (long long)first,
                      (long long)end - 1, when);
}

/* Losses of learning, in the order in which they were measured. */
static besa_result besa__check_learning(const besa_pruner *p, const char *name, besa_error *error)
{
    const float *loss = p->results_losses;
    int64_t shown = besa__all_shown(p), batch = p->options.batch_size, all = p->shares.all;
    BESA__TRY(besa__check_loss(loss[BESA__LOSS_UNIFORM], name, 0, shown, "before learning, with uniform masks", error));
    BESA__TRY(besa__check_loss(loss[BESA__LOSS_BEFORE], name, 0, shown, "before learning, with the first masks", error));
    for (int64_t s = 0; s < p->step_losses; s++) {
        if (besa__is_finite((double)loss[BESA__LOSS_STEP + s])) continue;
        char when[96];
        int64_t first = s % besa__parts(all, batch) * batch, end = besa__min(first + batch, all);
        snprintf(when, sizeof when, "in learning step %lld%s", (long long)s + 1,
                 besa__learns_weights(p) ? " (weight_lr may be too large)" : "");
        if (s + 1 == BESA__STEP_LOSSES) {
            snprintf(when, sizeof when, "in learning step %lld or a later one", (long long)s + 1);
            first = 0, end = all;
        }
        return besa__check_loss(loss[BESA__LOSS_STEP + s], name, first, end, when, error);
    }
    return BESA_OK;
}

static besa_result besa__check_commit(const besa_pruner *p, const char *name, besa_error *error)
{
    int64_t shown = besa__all_shown(p);
    BESA__TRY(besa__check_loss(p->results_losses[BESA__LOSS_AFTER], name, 0, shown, "in the commit pass", error));
    return besa__check_loss(p->results_losses[BESA__LOSS_REST], name, shown, p->all_reference, "in the commit pass", error);
}

/* ---- the report ---------------------------------------------------------------------------- */

/* Source zeros and the spread of the rates. */
static void besa__report_layers(const besa_pruner *p, besa_block_report *report)
{
    const int32_t *dense = p->results_counts, *written = dense + p->rows;
    int64_t weights = 0, zeros = 0;
    for (int i = 0; i < BESA_LAYERS; i++) {
        besa_layer_report *layer = &report->layer[i];
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        for (int64_t r = 0; r < rows; r++) layer->source_zeros += dense[r];
        besa__rate_spread(layer, written, rows, columns);
        weights += layer->weights;
        zeros += layer->pruned;
        dense += rows;
        written += rows;
    }
    report->sparsity = (double)zeros / (double)weights;
    report->target = p->options.method == BESA_METHOD_KEEP ? report->sparsity : p->options.rates.target;
}

static void besa__report_losses(const besa_pruner *p, besa_block_report *report)
{
    const float *loss = p->results_losses;
    int learned = 0;
    for (int i = 0; i < BESA_LAYERS; i++) learned |= besa__finds_masks(p) && p->fixed[i] < 0;
    double shown = (double)besa__all_shown(p), all = (double)p->all_reference;
    report->loss_after = (double)loss[BESA__LOSS_AFTER];
    report->loss_masks = besa__learns_last(p) ? (double)loss[BESA__LOSS_MASKS] : report->loss_after;
    report->loss_uniform = learned ? (double)loss[BESA__LOSS_UNIFORM] : report->loss_masks;
    report->loss_before = learned ? (double)loss[BESA__LOSS_BEFORE] : report->loss_masks;
    report->loss_all = (shown * report->loss_after + (all - shown) * (double)loss[BESA__LOSS_REST]) / all;
}

/* Equal sums make equal masks only on equal machines: what came back of a block is the same on all ranks. */
static besa_result besa__same_results(const besa_pruner *p, besa_error *error)
{
    const besa__results *r = p->results;
    if (!p->shares.comm) return BESA_OK;
    uint64_t hash = besa__hash(BESA__HASH_START, p->results_counts, 2 * (size_t)p->rows * sizeof *p->results_counts);
    hash = besa__hash(hash, p->results_losses, (size_t)(BESA__LOSS_STEP + p->step_losses) * sizeof *p->results_losses);
    hash = besa__hash(hash, r->scalars, sizeof r->scalars);
    return besa__same(p->shares.comm, hash, "masks or losses", "ranks on equal processors, with the same program and libraries", error);
}

/* From what has come back to the report, or to what went wrong; the earliest cause counts. */
static besa_result besa__report_block(besa_pruner *p, const char *name, besa_block_report *report, besa_error *error)
{
    const besa__results *r = p->results;
    BESA__TRY(besa__check_layers_finite(p, name, BESA__DENSE, error));
    BESA__TRY(besa__check_sums(p, name, error));
    BESA__TRY(besa__check_learning(p, name, error));
    BESA__TRY(besa__check_vectors_finite(p, name, error));
    if (besa__learns_rates(p)) {
        BESA__TRY(besa__check_status(&p->rates, r->scalars[0], r->mean, error));
        for (int i = 0; i < p->rates.parts; i++) BESA__TRY(besa__check_excess(&p->rates, i, r->excess[i], error));
        report->d = r->scalars[0];
        report->mean_rate = (double)r->mean;
    }
    BESA__TRY(besa__check_commit(p, name, error));
    besa__report_layers(p, report);
    besa__report_losses(p, report);
    return besa__check_layers_finite(p, name, BESA__WRITTEN, error);
}

/* ============================================================================================
 * // >>passes                the order of the passes; the public functions of level 2's pruner
 * ============================================================================================
 * Owns the table of passes, from which progress, marks and the report's seconds follow. */

static double besa__cost_one(const besa_pruner *p)
{
    (void)p;
    return 1;
}

static double besa__cost_rank(const besa_pruner *p)
{
    (void)p;
    return 0.5;
}

/* An epoch costs about three forward passes. */
static double besa__cost_learn(const besa_pruner *p)
{
    return 3 * ((double)besa__mask_epochs(p) + (double)besa__gradient_sequences(p) / (double)p->nsamples);
}

static double besa__cost_weights(const besa_pruner *p)
{
    return besa__learns_last(p) ? 3 * (double)p->options.weight_epochs : 0;
}

typedef struct besa__pass_row {
    besa_pass pass;
    double (*cost)(const besa_pruner *p);       /* of work, see besa__meter; 0: the method does without */
    besa_result (*run)(const besa__work *work, besa_error *error);
} besa__pass_row;

static const besa__pass_row besa__passes[] = {
    {BESA_PASS_DENSE, besa__cost_one, besa__dense_pass},
    {BESA_PASS_RANK, besa__cost_rank, besa__rank_pass},
    {BESA_PASS_LEARN, besa__cost_learn, besa__learn_pass},
    {BESA_PASS_WEIGHTS, besa__cost_weights, besa__weights_pass},
    {BESA_PASS_COMMIT, besa__cost_one, besa__commit_pass},
};

enum { BESA__PASSES = (int)(sizeof besa__passes / sizeof *besa__passes) };

BESA_API const char *besa_pass_name(besa_pass pass)
{
    static const char *const name[] = {BESA_PASSES(BESA__TEXT)};
    return (unsigned)pass < BESA_PASS_COUNT ? name[pass] : "?";
}

/* A mark after pass `index`, counted from 0; -1: before the first. */
static besa_result besa__mark(besa_pruner *p, int index)
{
    BESA_ASSERT(BESA__EVENT_MARKS + BESA__PASSES < BESA__EVENT_YREF);
    return p->be->record(p->be, BESA_QUEUE_COMPUTE, BESA__EVENT_MARKS + index + 1);
}

/* The device's seconds between the marks, which have passed. */
static besa_result besa__pass_seconds(besa_pruner *p, double seconds[BESA_PASS_COUNT])
{
    for (int i = 0; i < BESA__PASSES; i++)
        BESA__TRY(p->be->elapsed(p->be, BESA__EVENT_MARKS + i, BESA__EVENT_MARKS + i + 1, &seconds[besa__passes[i].pass]));
    return BESA_OK;
}

/* Every pass in turn. */
static besa_result besa__run_passes(const besa__work *work, besa_error *error)
{
    besa_pruner *p = work->pruner;
    besa__meter *meter = &p->meter;
    BESA__TRY_ON(p->be, besa__mark(p, -1), error);
    BESA__TRY_ON(p->be, besa__pruner_reset(p), error);
    meter->cost = meter->done = 0;
    for (int i = 0; i < BESA__PASSES; i++) meter->cost += besa__passes[i].cost(p);
    for (int i = 0; i < BESA__PASSES; i++) {
        meter->pass = besa__passes[i].pass;
        meter->pass_cost = besa__passes[i].cost(p);
        if (meter->pass_cost > 0) BESA__TRY(besa__passes[i].run(work, error));
        BESA__TRY_ON(p->be, besa__mark(p, i), error);
    }
    return BESA_OK;
}

/* After the passes, or after one that failed for a reason that may lie in the weights: what came back. */
static besa_result besa__finish_block(besa_pruner *p, const char *name, besa_result result, besa_block_report *report,
                                      besa_error *error)
{
    if (result != BESA_OK && result != BESA_ERROR_NUMERIC) return result;
    besa_result fetched = besa__pass_error(p->be, besa__fetch_results(p), result ? NULL : error);
    if (result == BESA_OK) result = fetched;    /* a backend may say it only when it is waited for */
    if (result == BESA_ERROR_NUMERIC) { /* because the weights or the activations were not finite? */
        BESA__TRY(besa__check_layers_finite(p, name, BESA__DENSE, error));
        BESA__TRY(besa__check_sums(p, name, error));
        return result;
    }
    BESA__TRY(result);
    BESA__TRY(besa__report_block(p, name, report, error));
    BESA__TRY(besa__same_results(p, error));
    return besa__pass_error(p->be, besa__pass_seconds(p, report->seconds), error);
}

/* dense: the dense model's own stream, or NULL. */
static besa_result besa__pruner_run(besa_pruner *p, const besa_block *block, const char *name, besa__stream *x,
                                    besa__stream *dense, void *const pruned[BESA_LAYERS], besa_block_report *report,
                                    besa_error *error)
{
    besa__work work = {p, block, &p->masked, p->options.bits ? p->quantization.masked : pruned, p->options.bits ? pruned : NULL, x,
                       p->options.dense_stream ? dense : &p->yref, dense};
    memset(report, 0, sizeof *report);
    p->masked = *block;
    x->micro_batch = work.yref->micro_batch = p->micro_batch;
    if (dense) dense->micro_batch = p->micro_batch;
    besa__use_grids(&work, 1);
    for (int i = 0; i < BESA_LAYERS; i++) p->fixed[i] = besa__fixed_rate(&p->options, name, i);
    for (int i = 0; i < BESA_VECTORS && besa__learns_vectors(p); i++) {
        const float **vector = besa__block_vector(&p->masked, i);
        p->weights.vector[i].dense = *vector;
        if (*vector) *vector = p->weights.vector[i].value;
    }
    p->be->error.code = BESA_OK;
    besa__workspace callers = besa__use_workspace(p->be, p->workspace, p->workspace_bytes);
    besa_result result = besa__finish_block(p, name, besa__run_passes(&work, error), report, error);
    besa__comm_fail(p->options.comm, result, error); /* before the device is waited for: others may have to let go of it */
    if (result != BESA_OK) besa__settle(p->be);
    besa__use_workspace(p->be, callers.memory, callers.bytes);
    return result;
}

/* ---- the public functions ------------------------------------------------------------------ */

/* Level 1: Yref is on the host. */
static uint64_t besa__pruner_size(void *pruner, int level)
{
    besa_pruner *p = (besa_pruner *)pruner;
    besa__arena device = {NULL, 0}, host = {NULL, 0};
    besa__stream_send(&p->yref, level > 0, p->micro_batch);
    besa__pruner_place(p, &device, &host);
    return device.used;
}

static besa_result besa__pruner_allocate(besa_pruner *p, besa_error *error)
{
    besa_backend *be = p->be;
    besa__arena device = {NULL, 0}, host = {NULL, 0};
    size_t budget = p->options.device_memory;
    const char *whose;
    int levels = be->unified_memory || p->options.dense_stream ? 1 : 2;
    BESA__TRY(besa__default_budget(be, &budget, &whose, error));
    BESA__TRY(besa__fit_ranks(&p->shares, &p->micro_batch, besa__pruner_size, levels, p, budget, whose, error));
    besa__pruner_place(p, &device, &host);
    BESA__TRY(besa__check_size(host.used, "the host's arrays", error));
    BESA__TRY_ON(be, be->alloc(be, &p->memory, (size_t)device.used), error);
    BESA__TRY_ON(be, be->host_alloc(be, &p->host_memory, (size_t)host.used), error);
    device.base = (unsigned char *)p->memory;
    host.base = (unsigned char *)p->host_memory;
    device.used = host.used = 0;
    besa__pruner_place(p, &device, &host);
    return besa__pass_error(be, besa__pruner_start(p), error);
}

BESA_API besa_result besa_pruner_create(besa_pruner **pruner, besa_backend *be, const besa_block_shape *shape,
                                        besa_dtype dtype, int qk_norm, const besa_prune_options *options,
                                        int64_t nsamples, int64_t seqlen, besa_error *error)
{
    void *memory;
    *pruner = NULL;
    if (options->masks || options->first_block || options->num_blocks || options->num_block_targets || options->depth_slope != 0)
        return besa__fail(error, BESA_ERROR_OPTION, "%s: a pruner has one block, expected none of it (masks come in `pruned`, a "
                          "sparsity in rates.target)", options->masks ? "masks" : options->num_block_targets ? "block_targets"
                          : options->depth_slope != 0 ? "depth_slope" : "first_block, num_blocks");
    BESA__TRY(besa__malloc(&memory, sizeof(besa_pruner), "a pruner", error));
    besa_pruner *made = (besa_pruner *)memory;
    besa_result result = besa__pruner_init(made, be, shape, dtype, qk_norm, options, nsamples, seqlen, error);
    if (result == BESA_OK) result = besa__pruner_allocate(made, error);
    besa__comm_fail(options->comm, result, error);
    if (result != BESA_OK) besa_pruner_destroy(made);
    else *pruner = made;
    return result;
}

BESA_API void besa_pruner_destroy(besa_pruner *pruner)
{
    if (!pruner) return;
    besa_backend *be = pruner->be;
    if (pruner->memory) besa__settle(be);
    if (pruner->memory) be->free(be, pruner->memory);
    if (pruner->host_memory) be->host_free(be, pruner->host_memory);
    BESA_FREE(pruner);
}

BESA_API int64_t besa_pruner_sequences(const besa_pruner *pruner) { return pruner->nsamples; }

BESA_API int64_t besa_pruner_sequence(const besa_pruner *pruner, int64_t index)
{
    return besa__global_sequence(&pruner->shares, index);
}

/* Nothing that a block needs is NULL, and pruned weights have memory of their own. */
static besa_result besa__check_block(const besa_pruner *p, const besa_block *block, const char *name, const void *x,
                                     const void *dense_x, void *const pruned[BESA_LAYERS], besa_error *error)
{
    const besa_block_shape *s = &block->shape;
    int in = s->norms != BESA_NORMS_OUT, out = s->norms != BESA_NORMS_IN, turned = !s->no_rope;
    const char *missing = in && !block->norm1 ? "norm1" : in && !block->norm2 ? "norm2" : out && !block->norm1_out ? "norm1_out"
                          : out && !block->norm2_out ? "norm2_out" : turned && !block->rope_cos ? "rope_cos"
                          : turned && !block->rope_sin ? "rope_sin" : !x ? "x" : besa__uses_own(&p->options) && !dense_x
                          ? "dense_x, with dense_stream or dense_share set," : NULL;
    if (missing) return besa__fail(error, BESA_ERROR_OPTION, "%s is NULL", missing);
    if (name && strlen(name) > 200)
        return besa__fail(error, BESA_ERROR_OPTION, "the block's name has %zu characters, expected at most 200", strlen(name));
    for (int i = 0; i < BESA_LAYERS; i++)
        if (!block->weight[i] || !pruned[i] || block->weight[i] == pruned[i])
            return besa__fail(error, BESA_ERROR_OPTION, "%s of %s is %s", block->weight[i] ? "pruned" : "weight", besa_layer_name(i),
                              block->weight[i] && pruned[i] ? "the weight itself, expected memory of its own" : "NULL");
    return BESA_OK;
}

BESA_API besa_result besa_pruner_run(besa_pruner *pruner, const besa_block *block, const char *name, void *x,
                                     void *dense_x, void *const pruned[BESA_LAYERS], besa_block_report *report,
                                     besa_error *error)
{
    besa_block_report local;
    besa__stream inputs, dense;
    BESA__TRY(besa__check_block(pruner, block, name, x, dense_x, pruned, error));
    const besa_block_shape *s = &block->shape, *made = &pruner->shape;
    if (s->hidden_size != made->hidden_size || s->intermediate_size != made->intermediate_size ||
        s->num_attention_heads != made->num_attention_heads || s->num_key_value_heads != made->num_key_value_heads ||
        s->head_dim != made->head_dim || block->dtype != pruner->dtype || (block->q_norm && !pruner->qk_norm) ||
        (block->k_norm && !pruner->qk_norm) || s->norms != made->norms || s->qk_norm_whole != made->qk_norm_whole ||
        besa__has_tail(s) != besa__has_tail(made))
        return besa__fail(error, BESA_ERROR_OPTION, "the block's shape, dtype or q/k norms are not those of the pruner");
    pruner->meter.start = pruner->meter.began = besa__seconds();
    besa__stream_init(&inputs, pruner->be, 0, pruner->nsamples, pruner->seqlen, made->hidden_size); /* resident: they use */
    besa__stream_init(&dense, pruner->be, 0, pruner->nsamples, pruner->seqlen, made->hidden_size);  /* no events */
    inputs.x = x;
    dense.x = dense_x;
    return besa__pruner_run(pruner, block, name, &inputs, besa__uses_own(&pruner->options) ? &dense : NULL, pruned,
                            report ? report : &local, error);
}

BESA_API const besa_block *besa_pruner_block(const besa_pruner *pruner) { return &pruner->masked; }

#ifndef BESA_NO_STDIO
/* ============================================================================================
 * // >>json                  a strict reader of JSON texts
 * ============================================================================================
 * Owns the parsed form of config.json, of shard indices and of safetensors headers. Uses base and memory;
 * never touches files. UTF-8 and escapes are checked, duplicate keys refused, errors give the byte position. */
#define BESA__JSON_DEPTH 64

typedef enum besa__json_type {
    BESA__JSON_NULL, BESA__JSON_FALSE, BESA__JSON_TRUE, BESA__JSON_NUMBER, BESA__JSON_STRING, BESA__JSON_ARRAY,
    BESA__JSON_OBJECT
} besa__json_type;

static const char *const besa__json_words[] = { "null", "false", "true" }; /* of the first three types */

/* A text is parsed into words of 4 bytes, values in the order of the text. A value is one word, the byte at which it
 * begins in the text; an array or object has a second, the number of the first word behind its last element; a member's
 * key is the word before its value. The rest is read from the text when it is asked for, so that a text costs at
 * most four times its size beside itself; eight, until it is refused, where it is all opening brackets. */
typedef struct besa__json_value {
    uint32_t at;
} besa__json_value;

typedef struct besa__json {
    besa__json_value *values;                   /* the first is the root */
    uint32_t count, room;
    char *text;                                 /* owned; strings are decoded in place */
    size_t size, position;
    const char *name;                           /* for messages: the file */
    besa_error *error;
} besa__json;

typedef struct besa__json_number {
    double value;
    int64_t integer;
    int is_integer;                             /* written without fraction or exponent, and fits */
    size_t length;                              /* of its text */
} besa__json_number;

static besa_result besa__json_fail(const besa__json *json, const char *what)
{
    return besa__fail(json->error, BESA_ERROR_JSON, "%s: byte %zu: %s", json->name, json->position, what);
}

static void besa__json_skip_space(besa__json *json)
{
    const char *s = json->text + json->position;
    while (*s == ' ' || *s == '\t' || *s == '\n' || *s == '\r') s++;
    json->position = (size_t)(s - json->text);
}

/* Bytes of the UTF-8 character at s, 0 if it is not one. A NUL ends the text, so no byte past the end is used. */
static size_t besa__utf8_length(const unsigned char *s)
{
    size_t n = s[0] < 0x80 ? 1 : s[0] >= 0xC2 && s[0] <= 0xDF ? 2 : (s[0] & 0xF0) == 0xE0 ? 3
               : s[0] >= 0xF0 && s[0] <= 0xF4 ? 4 : 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F)) return 0; /* overlong, surrogates */
    if ((s[0] == 0xF0 && s[1] < 0x90) || (s[0] == 0xF4 && s[1] > 0x8F)) return 0; /* overlong, above U+10FFFF */
    return n;
}

static int besa__json_hex4(const char *s, uint32_t *code)
{
    *code = 0;
    for (int i = 0; i < 4; i++) {
        int c = (unsigned char)s[i], digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f'
                                             ? (c | 32) - 'a' + 10 : -1;
        if (digit < 0) return 0;
        *code = *code * 16 + (uint32_t)digit;
    }
    return 1;
}

/* Decode the escape at json->position to *w, which it moves; a decoded escape is never longer than its text. */
static besa_result besa__json_escape(besa__json *json, unsigned char **w)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *s = json->text + json->position, *simple = s[1] ? strchr(from, s[1]) : NULL;
    if (simple) {
        *(*w)++ = (unsigned char)to[simple - from];
        json->position += 2;
        return BESA_OK;
    }
    uint32_t code, low;
    if (s[1] != 'u' || !besa__json_hex4(s + 2, &code)) return besa__json_fail(json, "malformed escape");
    json->position += 6;
    if (code >= 0xD800 && code <= 0xDFFF) {
        int pair = code < 0xDC00 && s[6] == '\\' && s[7] == 'u' && besa__json_hex4(s + 8, &low) && low >= 0xDC00 &&
                   low <= 0xDFFF;
        if (!pair) return besa__json_fail(json, "half of a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        json->position += 6;
    }
    if (code == 0) return besa__json_fail(json, "NUL characters in strings are not supported");
    if (code < 0x80) *(*w)++ = (unsigned char)code;
    else if (code < 0x800) *(*w)++ = (unsigned char)(0xC0 | code >> 6);
    else if (code < 0x10000) *(*w)++ = (unsigned char)(0xE0 | code >> 12);
    else {
        *(*w)++ = (unsigned char)(0xF0 | code >> 18);
        *(*w)++ = (unsigned char)(0x80 | (code >> 12 & 0x3F));
    }
    if (code >= 0x800) *(*w)++ = (unsigned char)(0x80 | (code >> 6 & 0x3F));
    if (code >= 0x80) *(*w)++ = (unsigned char)(0x80 | (code & 0x3F));
    return BESA_OK;
}

static besa_result besa__json_read_string(besa__json *json, const char **string)
{
    unsigned char *w = (unsigned char *)json->text + ++json->position;
    *string = (const char *)w;
    for (;;) {
        const unsigned char *r = (const unsigned char *)json->text + json->position;
        if (*r == '"') break;
        if (*r < 0x20)
            return besa__json_fail(json, json->position >= json->size ? "the text ends in a string"
                                                                      : "control character in a string");
        if (*r == '\\') {
            BESA__TRY(besa__json_escape(json, &w));
            continue;
        }
        size_t n = besa__utf8_length(r);
        if (!n) return besa__json_fail(json, "not UTF-8");
        memmove(w, r, n);
        w += n;
        json->position += n;
    }
    *w = 0;
    json->position++;
    return BESA_OK;
}

static size_t besa__json_digits(const char *s)
{
    size_t n = 0;
    while (s[n] >= '0' && s[n] <= '9') n++;
    return n;
}

/* The number at s; what is wrong with it, or NULL. Digits are handed to strtod without a decimal point, as "12345e-2":
 * right in any locale. */
static const char *besa__json_scan_number(const char *s, besa__json_number *number)
{
    char digits[352];
    const char *start = s;
    size_t whole, fraction = 0, sign = *s == '-';
    long exponent = 0;
    memset(number, 0, sizeof *number);
    s += sign;
    whole = besa__json_digits(s);
    if (!whole || (*s == '0' && whole > 1)) return "malformed number";
    s += whole;
    if (*s == '.') {
        fraction = besa__json_digits(++s);
        if (!fraction) return "malformed number";
        s += fraction;
    }
    if (whole + fraction > 320) return "a number of more than 320 digits";
    memcpy(digits, start, sign + whole);
    if (fraction) memcpy(digits + sign + whole, start + sign + whole + 1, fraction);
    number->is_integer = !fraction && *s != 'e' && *s != 'E';
    if (*s == 'e' || *s == 'E') {
        int negative = *++s == '-';
        s += *s == '-' || *s == '+';
        size_t n = besa__json_digits(s);
        if (!n) return "malformed number";
        for (size_t i = 0; i < n && exponent < 100000; i++) exponent = exponent * 10 + (s[i] - '0');
        if (negative) exponent = -exponent;
        s += n;
    }
    snprintf(digits + sign + whole + fraction, 24, "e%ld", exponent - (long)fraction);
    number->value = strtod(digits, NULL);
    if (!(fabs(number->value) <= 1.7976931348623157e308)) return "number out of range";
    for (size_t i = sign; i < sign + whole && number->is_integer; i++) {
        int digit = digits[i] - '0';
        if (number->integer < (INT64_MIN + digit) / 10) number->is_integer = 0; /* negative: reaches INT64_MIN */
        else number->integer = number->integer * 10 - digit;
    }
    if (!sign && number->integer == INT64_MIN) number->is_integer = 0;
    else if (!sign) number->integer = -number->integer;
    number->length = (size_t)(s - start);
    return NULL;
}

/* ---- values ----------------------------------------------------------------------------------- */

static besa__json_type besa__json_type_of(const besa__json *json, const besa__json_value *value)
{
    switch (json->text[value->at]) {
    case '{': return BESA__JSON_OBJECT;
    case '[': return BESA__JSON_ARRAY;
    case '"': return BESA__JSON_STRING;
    case 'n': return BESA__JSON_NULL;
    case 'f': return BESA__JSON_FALSE;
    case 't': return BESA__JSON_TRUE;
    default: return BESA__JSON_NUMBER;
    }
}

static int besa__json_is(const besa__json *json, const besa__json_value *value, besa__json_type type)
{
    return value && besa__json_type_of(json, value) == type;
}

/* The decoded string that a value is (no NUL inside), or NULL. */
static const char *besa__json_string(const besa__json *json, const besa__json_value *value)
{
    return besa__json_is(json, value, BESA__JSON_STRING) ? json->text + value->at + 1 : NULL;
}

/* The number that a value is; of anything else zeros, and no integer. */
static besa__json_number besa__json_number_of(const besa__json *json, const besa__json_value *value)
{
    besa__json_number number;
    memset(&number, 0, sizeof number);
    if (besa__json_is(json, value, BESA__JSON_NUMBER)) besa__json_scan_number(json->text + value->at, &number);
    return number;
}

/* The key of an object's member. */
static const char *besa__json_key(const besa__json *json, const besa__json_value *member)
{
    return json->text + member[-1].at;
}

/* The element or member that begins at `value`, or NULL at the parent's end. */
static const besa__json_value *besa__json_child(const besa__json *json, const besa__json_value *parent,
                                                const besa__json_value *value)
{
    if (value == json->values + parent[1].at) return NULL;
    return value + (besa__json_type_of(json, parent) == BESA__JSON_OBJECT);
}

/* The first element of an array or member of an object; NULL where there is none. */
static const besa__json_value *besa__json_first(const besa__json *json, const besa__json_value *parent)
{
    return besa__json_type_of(json, parent) >= BESA__JSON_ARRAY ? besa__json_child(json, parent, parent + 2) : NULL;
}

static const besa__json_value *besa__json_next(const besa__json *json, const besa__json_value *parent,
                                               const besa__json_value *value)
{
    int scalar = besa__json_type_of(json, value) < BESA__JSON_ARRAY;
    return besa__json_child(json, parent, scalar ? value + 1 : json->values + value[1].at);
}

/* The number of elements or members. */
static uint32_t besa__json_count(const besa__json *json, const besa__json_value *parent)
{
    uint32_t count = 0;
    const besa__json_value *value = besa__json_first(json, parent);
    for (; value; value = besa__json_next(json, parent, value)) count++;
    return count;
}

/* A member by its key, or NULL. */
static const besa__json_value *besa__json_get(const besa__json *json, const besa__json_value *object, const char *key)
{
    const besa__json_value *value = NULL;
    if (besa__json_is(json, object, BESA__JSON_OBJECT)) value = besa__json_first(json, object);
    while (value && strcmp(besa__json_key(json, value), key)) value = besa__json_next(json, object, value);
    return value;
}

/* A value as text for a message; returns buffer. */
static const char *besa__json_show(const besa__json *json, const besa__json_value *value, char *buffer, size_t size)
{
    besa__json_type type = value ? besa__json_type_of(json, value) : BESA__JSON_NULL;
    besa__json_number number = besa__json_number_of(json, value);
    if (!value) snprintf(buffer, size, "(absent)");
    else if (type == BESA__JSON_STRING) snprintf(buffer, size, "\"%.100s\"", besa__json_string(json, value));
    else if (type == BESA__JSON_NUMBER)         /* as it is written: 64.0 is no integer */
        besa__write_text(buffer, size, "%.*s", (int)(number.length < 100 ? number.length : 100), json->text + value->at);
    else if (type == BESA__JSON_ARRAY)
        snprintf(buffer, size, "a list of %lu", (unsigned long)besa__json_count(json, value));
    else if (type == BESA__JSON_OBJECT)
        snprintf(buffer, size, "an object of %lu", (unsigned long)besa__json_count(json, value));
    else snprintf(buffer, size, "%s", besa__json_words[type]);
    return buffer;
}

/* ---- parsing ---------------------------------------------------------------------------------- */

static int besa__compare_strings(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static besa_result besa__json_check_unique(besa__json *json, const besa__json_value *object)
{
    uint32_t count = besa__json_count(json, object), n = 0;
    const char *few[8], **keys = few, *twice = NULL;
    if (count > 8) {
        void *memory;
        BESA__TRY(besa__malloc(&memory, count * sizeof *keys, "the keys of a JSON object", json->error));
        keys = (const char **)memory;
    }
    const besa__json_value *member = besa__json_first(json, object);
    for (; member; member = besa__json_next(json, object, member)) keys[n++] = besa__json_key(json, member);
    if (count > 1) qsort(keys, count, sizeof *keys, besa__compare_strings);
    for (uint32_t i = 1; i < count && !twice; i++)
        if (!strcmp(keys[i - 1], keys[i])) twice = keys[i];
    if (keys != few) BESA_FREE(keys);
    if (!twice) return BESA_OK;
    return besa__fail(json->error, BESA_ERROR_JSON,
                      "%s: byte %zu: the object that ends here has the key \"%.200s\" twice",
                      json->name, json->position, twice);
}

/* Words that a text can come to: one each for the root, behind a comma or a colon, and two for an array or object with
 * something in it. Strings are left out. */
static size_t besa__json_room(const char *text, size_t size)
{
    size_t words = 1;
    int quoted = 0;
    for (size_t i = 0; i < size; i++) {
        char c = text[i], closed = c == '{' ? '}' : ']';
        if (c == '"') quoted = !quoted;
        else if (quoted) i += c == '\\';
        else if (c == ',' || c == ':') words++;
        else if (c == '[' || c == '{') words += text[i + 1] == closed ? 1 : 2;
    }
    return words;
}

/* Append a word; besa__json_room has counted it. */
static void besa__json_push(besa__json *json, size_t at)
{
    BESA_ASSERT(json->count < json->room);
    json->values[json->count++].at = (uint32_t)at;
}

static besa_result besa__json_read_value(besa__json *json, int depth);

static besa_result besa__json_read_key(besa__json *json)
{
    const char *key;
    besa__json_skip_space(json);
    if (json->text[json->position] != '"') return besa__json_fail(json, "expected a key");
    BESA__TRY(besa__json_read_string(json, &key));
    besa__json_skip_space(json);
    if (json->text[json->position] != ':') return besa__json_fail(json, "expected ':'");
    json->position++;
    besa__json_push(json, (size_t)(key - json->text));
    return BESA_OK;
}

/* The array or object whose first word has just been appended. */
static besa_result besa__json_read_container(besa__json *json, int depth)
{
    char close = json->text[json->position++] == '{' ? '}' : ']';
    uint32_t self = json->count - 1;
    besa__json_push(json, 0);
    besa__json_skip_space(json);
    for (int first = 1; json->text[json->position] != close; first = 0) {
        if (!first && json->text[json->position] != ',')
            return besa__json_fail(json, close == '}' ? "expected ',' or '}'" : "expected ',' or ']'");
        json->position += !first;
        if (close == '}') BESA__TRY(besa__json_read_key(json));
        BESA__TRY(besa__json_read_value(json, depth + 1));
        besa__json_skip_space(json);
    }
    json->position++;
    json->values[self + 1].at = json->count;
    return close == '}' ? besa__json_check_unique(json, json->values + self) : BESA_OK;
}

static besa_result besa__json_read_value(besa__json *json, int depth)
{
    if (depth > BESA__JSON_DEPTH) return besa__json_fail(json, "nested too deeply");
    besa__json_skip_space(json);
    const char *s = json->text + json->position;
    besa__json_push(json, json->position);
    if (*s == '{' || *s == '[') return besa__json_read_container(json, depth);
    if (*s == '"') return besa__json_read_string(json, &s);
    if (*s == '-' || (*s >= '0' && *s <= '9')) {
        besa__json_number number;
        const char *wrong = besa__json_scan_number(s, &number);
        json->position += number.length;
        return wrong ? besa__json_fail(json, wrong) : BESA_OK;
    }
    for (int i = 0; i < 3; i++) {
        if (strncmp(s, besa__json_words[i], strlen(besa__json_words[i]))) continue;
        json->position += strlen(besa__json_words[i]);
        return BESA_OK;
    }
    return besa__json_fail(json, json->position >= json->size ? "the text ends too early" : "expected a value");
}

/* Parse text (size bytes, less than 2^32, and a NUL), which json takes over. besa__json_free in any case. */
static besa_result besa__json_parse(besa__json *json, char *text, size_t size, const char *name, besa_error *error)
{
    void *memory;
    size_t room = besa__json_room(text, size);
    memset(json, 0, sizeof *json);
    json->text = text;
    json->size = size;
    json->name = name;
    json->error = error;
    BESA__TRY(besa__malloc(&memory, room * sizeof *json->values, name, error));
    json->values = (besa__json_value *)memory;
    json->room = (uint32_t)room;
    BESA__TRY(besa__json_read_value(json, 0));
    besa__json_skip_space(json);
    return json->position == size ? BESA_OK : besa__json_fail(json, "unexpected text after the end");
}

static void besa__json_free(besa__json *json)
{
    BESA_FREE(json->values);
    BESA_FREE(json->text);
    memset(json, 0, sizeof *json);
}

/* ============================================================================================
 * // >>safetensors           mapped checkpoint files and their tensor table
 * ============================================================================================
 * Owns struct besa_checkpoint: the shards' mappings and every tensor's name, shape and place. A file is 8 bytes of
 * header length, the header (JSON) and the data, which the tensors fill without overlap or hole. Uses json and POSIX;
 * knows nothing of models. The index may only name files of its own directory; links are followed. */
#include <errno.h>
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#if defined(__GLIBC__) && !defined(__USE_MISC)
#error "besa.h: POSIX is hidden: with BESA_IMPLEMENTATION include it before other headers, or use -std=gnu11"
#endif

#define BESA__HEADER_LIMIT 100000000u           /* bytes, the format's own limit; ours for any JSON file */
typedef char besa__off_t_is_64_bits[sizeof(off_t) >= 8 ? 1 : -1];

typedef struct besa__shard {
    char *name;                                 /* in the directory */
    struct stat stat;                           /* before it was opened */
    unsigned char *base;                        /* mapping */
    size_t size;
    size_t data;                                /* where the tensors begin: 8 + header length */
    uint64_t hash;                              /* of all before that, as it was parsed */
    char *text;                                 /* the header, decoded in place: names of tensors live here */
} besa__shard;

/* A small file as it was read on opening: the output gets these bytes, whatever becomes of the file. */
typedef struct besa__kept {
    struct stat stat;                           /* before it was opened */
    unsigned char *bytes;
    size_t size;
} besa__kept;

struct besa_checkpoint {
    char *directory, *name;
    const char *index;                          /* name of the index file, NULL for a single file */
    besa__kept config_file, index_file;
    besa__shard *shards;
    int64_t num_shards;
    besa_tensor *tensors;                       /* by shard and offset */
    int64_t num_tensors;
    const besa_tensor **sorted;                 /* by name */
    char *part_names;                           /* of layers that are rows of a tensor that a file holds; NULL: none */
    int is_masks;                               /* a file of masks, by the names of the model whose config this is */
    besa_config config;
    char notes[2048];                           /* lines */
};

static const char besa__head_name[] = "lm_head.weight";
static const char besa__single_name[] = "model.safetensors";
static const char besa__index_name[] = "model.safetensors.index.json";

/* Append a line to a checkpoint's notes. */
static void besa__checkpoint_note(besa_checkpoint *checkpoint, const char *format, ...) BESA__PRINTF(2, 3);
static void besa__checkpoint_note(besa_checkpoint *checkpoint, const char *format, ...)
{
    size_t length = strlen(checkpoint->notes), room = sizeof checkpoint->notes - length;
    va_list args;
    va_start(args, format);
    int n = vsnprintf(checkpoint->notes + length, room, format, args);
    va_end(args);
    BESA_ASSERT(n >= 0 && (size_t)n + 1 < room); /* a few lines of constant text fit */
    memcpy(checkpoint->notes + length + n, "\n", 2);
}

/* Nanoseconds of a file's last change, of its bytes and of anything about it; what a file system does not keep is 0. */
#ifdef __APPLE__
#define BESA__NANOSECONDS(st, which) ((int64_t)(st)->st_##which##timespec.tv_nsec)
#else
#define BESA__NANOSECONDS(st, which) ((int64_t)(st)->st_##which##tim.tv_nsec)
#endif

/* Same file: by device and number. */
static int besa__is_same(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* Whether a file may have other contents than it had: replaced, or written since. */
static int besa__has_moved(const struct stat *then, const struct stat *now)
{
    return !besa__is_same(then, now) || then->st_size != now->st_size || then->st_mtime != now->st_mtime ||
           BESA__NANOSECONDS(then, m) != BESA__NANOSECONDS(now, m) || then->st_ctime != now->st_ctime ||
           BESA__NANOSECONDS(then, c) != BESA__NANOSECONDS(now, c);
}

/* The first n characters of text, for BESA_FREE; what: for the message. */
static besa_result besa__copy_text(char **copy, const char *text, size_t n, const char *what, besa_error *error)
{
    void *memory;
    BESA__TRY(besa__malloc(&memory, n + 1, what, error));
    *copy = (char *)memcpy(memory, text, n);
    (*copy)[n] = 0;
    return BESA_OK;
}

/* directory/name, for BESA_FREE. */
static besa_result besa__join(char **path, const char *directory, const char *name, besa_error *error)
{
    size_t n = strlen(directory), m = strlen(name);
    void *memory;
    BESA__TRY(besa__malloc(&memory, n + m + 2, "a path", error));
    *path = (char *)memory;
    memcpy(*path, directory, n);
    (*path)[n] = '/';
    memcpy(*path + n + 1, name, m + 1);
    return BESA_OK;
}

/* Open a regular file for reading. */
static besa_result besa__open_file(int *fd, size_t *size, const char *path, besa_error *error)
{
    struct stat st;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* O_NONBLOCK: a FIFO must not hang us */
    if (*fd < 0)
        return besa__fail(error, errno == ENOENT || errno == ENOTDIR ? BESA_ERROR_NOT_FOUND : BESA_ERROR_READ,
                          "%s: %s", path, strerror(errno));
    int failed = fstat(*fd, &st);
    besa_result result = BESA_OK;
    if (failed || !S_ISREG(st.st_mode))
        result = besa__fail(error, BESA_ERROR_READ, "%s: %s", path, failed ? strerror(errno) : "not a regular file");
    else if ((uint64_t)st.st_size > SIZE_MAX / 2)
        result = besa__fail(error, BESA_ERROR_READ, "%s: %llu bytes, this process can map %llu: build for a 64-bit machine",
                            path, (unsigned long long)st.st_size, (unsigned long long)(SIZE_MAX / 2));
    else *size = (size_t)st.st_size;
    if (result != BESA_OK) close(*fd);
    return result;
}

/* Map a file; base is NULL where it is empty. */
static besa_result besa__map_file(unsigned char **base, size_t *size, const char *path, besa_error *error)
{
    int fd, reason;
    *base = NULL;
    BESA__TRY(besa__open_file(&fd, size, path, error));
    void *map = *size ? mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    reason = errno;
    close(fd);
    if (map == MAP_FAILED)
        return besa__fail(error, BESA_ERROR_READ, "%s: cannot map %zu bytes: %s", path, *size, strerror(reason));
    *base = (unsigned char *)map;
    return BESA_OK;
}

static void besa__unmap(unsigned char *base, size_t size)
{
    if (base) munmap(base, size);
}

/* Read count bytes at offset; short reads and EINTR are gone on with. */
static besa_result besa__read_at(int fd, void *memory, size_t count, uint64_t offset, const char *path,
                                 besa_error *error)
{
    for (size_t done = 0; done < count;) {
        size_t part = count - done < (1u << 30) ? count - done : (1u << 30);
        ssize_t n = pread(fd, (unsigned char *)memory + done, part, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            return besa__fail(error, BESA_ERROR_READ, "%s: %s", path, n ? strerror(errno) : "shorter than it was");
        done += (size_t)n;
    }
    return BESA_OK;
}

/* What the system keeps of a file, taken before the file is opened: of one that is replaced in between the older state is
 * kept, and it will be seen to have moved. A file that is not there is for opening to report. */
static void besa__stat_before(struct stat *st, const char *path)
{
    if (stat(path, st)) memset(st, 0, sizeof *st);
}

/* Read a small file whole. *kept is the caller's to free, whatever comes of it. */
static besa_result besa__keep_file(besa__kept *kept, const char *path, besa_error *error)
{
    int fd;
    void *memory;
    size_t size = 0;
    besa__stat_before(&kept->stat, path);
    BESA__TRY(besa__open_file(&fd, &size, path, error));
    besa_result result = BESA_OK;
    if (size > BESA__HEADER_LIMIT)
        result = besa__fail(error, BESA_ERROR_JSON, "%s: %zu bytes, more than %u", path, size, BESA__HEADER_LIMIT);
    if (result == BESA_OK) result = besa__malloc(&memory, size, path, error);
    if (result == BESA_OK) {
        kept->bytes = (unsigned char *)memory;
        kept->size = size;
        result = besa__read_at(fd, memory, size, 0, path, error);
    }
    close(fd);
    return result;
}

/* Read and parse a JSON file, whose bytes are kept. besa__json_free in any case. */
static besa_result besa__json_load(besa__json *json, besa__kept *kept, const char *path, besa_error *error)
{
    void *text;
    memset(json, 0, sizeof *json);
    BESA__TRY(besa__keep_file(kept, path, error));
    BESA__TRY(besa__malloc(&text, kept->size + 1, path, error));
    memcpy(text, kept->bytes, kept->size);
    ((char *)text)[kept->size] = 0;
    return besa__json_parse(json, (char *)text, kept->size, path, error);
}

/* Advise the system of the pages of a range of a mapped shard. */
static void besa__advise(const besa__shard *shard, uint64_t offset, size_t bytes, int advice)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), first = (size_t)offset / page * page;
    if (bytes) madvise(shard->base + first, (size_t)offset + bytes - first, advice);
}

enum { BESA__PAGES_AROUND = 65536 };            /* bytes that the system brings in around a page that is touched, at most */

/* Give the pages of a range back to the system; they can be read again. Their neighbours, which came in with them, too:
 * what is left of each range would add up over the blocks. */
static void besa__release_range(const besa__shard *shard, uint64_t offset, size_t bytes)
{
    uint64_t around = BESA__PAGES_AROUND, first = offset > around ? offset - around : 0, end = besa__add_sizes(offset + bytes, around);
    if (end > shard->size) end = shard->size;
    besa__advise(shard, first, (size_t)(end - first), MADV_DONTNEED);
}

/* A tensor whose bytes will be read soon: the system may begin. */
static void besa__expect_pages(const besa_checkpoint *checkpoint, const besa_tensor *tensor)
{
    besa__advise(checkpoint->shards + tensor->file, tensor->offset, tensor->bytes, MADV_WILLNEED);
}

/* The pages of a tensor that is not needed for now. */
static void besa__release_pages(const besa_checkpoint *checkpoint, const besa_tensor *tensor)
{
    if (tensor) besa__release_range(checkpoint->shards + tensor->file, tensor->offset, tensor->bytes);
}

static const struct {
    char name[16];
    unsigned bits;
} besa__safetensors_dtypes[] = {
    { "F32", 32 }, { "F16", 16 }, { "BF16", 16 }, /* the supported ones, in the order of besa_dtype */
    { "F64", 64 }, { "I64", 64 }, { "U64", 64 }, { "C64", 64 }, { "I32", 32 }, { "U32", 32 }, { "I16", 16 },
    { "U16", 16 }, { "I8", 8 }, { "U8", 8 }, { "BOOL", 8 }, { "F8_E4M3", 8 }, { "F8_E5M2", 8 }, { "F8_E8M0", 8 },
    { "F8_E4M3FNUZ", 8 }, { "F8_E5M2FNUZ", 8 }, { "F6_E2M3", 6 }, { "F6_E3M2", 6 }, { "F4", 4 },
};

/* Shape and dtype of one entry; the bytes they come to are compared by the caller. */
static besa_result besa__parse_shape(besa_tensor *tensor, uint64_t *bytes, const besa__json *json,
                                     const besa__json_value *entry, const char *path, besa_error *error)
{
    const besa__json_value *dtype = besa__json_get(json, entry, "dtype"), *shape = besa__json_get(json, entry, "shape");
    const char *dtype_name = besa__json_string(json, dtype);
    size_t known = sizeof besa__safetensors_dtypes / sizeof *besa__safetensors_dtypes, kind = 0;
    uint64_t elements = 1, bits;
    if (!dtype_name || !besa__json_is(json, shape, BESA__JSON_ARRAY))
        return besa__fail(error, BESA_ERROR_FORMAT, "%s: tensor %.200s: no dtype or no shape", path, tensor->name);
    while (kind < known && strcmp(dtype_name, besa__safetensors_dtypes[kind].name)) kind++;
    if (kind == known)
        return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s: tensor %.200s: unknown dtype \"%.40s\"", path,
                          tensor->name, dtype_name);
    if (besa__json_count(json, shape) > 8)
        return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s: tensor %.200s: %lu dimensions, at most 8 are supported",
                          path, tensor->name, (unsigned long)besa__json_count(json, shape));
    tensor->dtype_name = besa__safetensors_dtypes[kind].name;
    tensor->supported = kind < 3;
    tensor->dtype = kind < 3 ? (besa_dtype)kind : BESA_F32;
    bits = besa__safetensors_dtypes[kind].bits;
    const besa__json_value *element = besa__json_first(json, shape);
    for (; element; element = besa__json_next(json, shape, element)) {
        besa__json_number size = besa__json_number_of(json, element);
        if (!size.is_integer || size.integer < 0)
            return besa__fail(error, BESA_ERROR_FORMAT, "%s: tensor %.200s: a size in its shape is no count", path,
                              tensor->name);
        if (size.integer && elements > (uint64_t)INT64_MAX / bits / (uint64_t)size.integer)
            return besa__fail(error, BESA_ERROR_FORMAT, "%s: tensor %.200s: its shape overflows 64 bits", path,
                              tensor->name);
        elements *= (uint64_t)size.integer;
        tensor->shape[tensor->ndim++] = size.integer;
    }
    if (elements * bits % 8)
        return besa__fail(error, BESA_ERROR_FORMAT, "%s: tensor %.200s: its elements do not fill whole bytes", path,
                          tensor->name);
    *bytes = elements * bits / 8;
    return BESA_OK;
}

/* One entry of a header: appended to the checkpoint's tensors, which have room for it. */
static besa_result besa__parse_tensor(besa_checkpoint *checkpoint, int64_t file, const besa__json *json,
                                      const besa__json_value *entry, const char *path, besa_error *error)
{
    const besa__shard *shard = checkpoint->shards + file;
    const besa__json_value *offsets = besa__json_get(json, entry, "data_offsets"), *begin = NULL, *end;
    uint64_t bytes = 0, available = shard->size - shard->data;
    besa_tensor *tensor = checkpoint->tensors + checkpoint->num_tensors;
    memset(tensor, 0, sizeof *tensor);
    tensor->name = besa__json_key(json, entry);
    tensor->file = (int)file;
    BESA__TRY(besa__parse_shape(tensor, &bytes, json, entry, path, error));
    if (besa__json_is(json, offsets, BESA__JSON_ARRAY)) begin = besa__json_first(json, offsets);
    end = begin ? besa__json_next(json, offsets, begin) : NULL;
    besa__json_number first = besa__json_number_of(json, begin), last = besa__json_number_of(json, end);
    if (!end || besa__json_next(json, offsets, end) || !first.is_integer || !last.is_integer || first.integer < 0 ||
        last.integer < first.integer)
        return besa__fail(error, BESA_ERROR_FORMAT, "%s: tensor %.200s: data_offsets are not [begin, end]", path,
                          tensor->name);
    if ((uint64_t)last.integer > available)
        return besa__fail(error, BESA_ERROR_FORMAT,
                          "%s: tensor %.200s: ends at byte %lld of the data, the file has %llu: "
                          "truncated?", path, tensor->name, (long long)last.integer, (unsigned long long)available);
    if ((uint64_t)(last.integer - first.integer) != bytes)
        return besa__fail(error, BESA_ERROR_FORMAT, "%s: tensor %.200s: %lld bytes by its data_offsets, %llu by its "
                          "shape and dtype", path, tensor->name, (long long)(last.integer - first.integer),
                          (unsigned long long)bytes);
    tensor->bytes = (size_t)bytes;
    tensor->offset = shard->data + (uint64_t)first.integer;
    tensor->data = shard->base + tensor->offset;
    checkpoint->num_tensors++;
    return BESA_OK;
}

static int besa__compare_offsets(const void *a, const void *b)
{
    const besa_tensor *x = (const besa_tensor *)a, *y = (const besa_tensor *)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    if (x->bytes != y->bytes) return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* Every byte of a shard's data belongs to exactly one tensor; first is the shard's first tensor in the table. */
static besa_result besa__check_layout(besa_checkpoint *checkpoint, const besa__shard *shard, int64_t first,
                                      const char *path, besa_error *error)
{
    uint64_t end = shard->data;
    const char *before = "the header";
    int64_t count = checkpoint->num_tensors - first;
    if (count) qsort(checkpoint->tensors + first, (size_t)count, sizeof(besa_tensor), besa__compare_offsets);
    for (int64_t i = first; i < checkpoint->num_tensors; i++) {
        const besa_tensor *tensor = checkpoint->tensors + i;
        if (tensor->offset != end)
            return besa__fail(error, BESA_ERROR_FORMAT,
                              "%s: tensor %.200s begins at byte %llu, %.200s ends at %llu: %s",
                              path, tensor->name, (unsigned long long)tensor->offset, before, (unsigned long long)end,
                              tensor->offset < end ? "they overlap" : "a hole");
        end += tensor->bytes;
        before = tensor->name;
    }
    if (end == shard->size) return BESA_OK;
    return besa__fail(error, BESA_ERROR_FORMAT, "%s: %llu bytes after the last tensor", path,
                      (unsigned long long)(shard->size - end));
}

/* The format allows strings alone as metadata. */
static besa_result besa__check_metadata(const besa__json *json, const besa__json_value *metadata, const char *path,
                                        besa_error *error)
{
    const besa__json_value *entry = besa__json_first(json, metadata);
    for (; entry; entry = besa__json_next(json, metadata, entry))
        if (!besa__json_is(json, entry, BESA__JSON_STRING))
            return besa__fail(error, BESA_ERROR_FORMAT, "%s: __metadata__: %.200s is not a string", path,
                              besa__json_key(json, entry));
    return BESA_OK;
}

/* All entries of a parsed header. */
static besa_result besa__parse_header(besa_checkpoint *checkpoint, int64_t file, const besa__json *json,
                                      const char *path, besa_error *error)
{
    const besa__json_value *root = json->values, *entry = besa__json_first(json, root);
    int64_t first = checkpoint->num_tensors, most = first + (int64_t)besa__json_count(json, root);
    if (!entry) return besa__check_layout(checkpoint, checkpoint->shards + file, first, path, error);
    void *more = BESA_REALLOC(checkpoint->tensors, (size_t)most * sizeof(besa_tensor));
    if (!more) return besa__fail(error, BESA_ERROR_MEMORY, "out of host memory for %lld tensors", (long long)most);
    checkpoint->tensors = (besa_tensor *)more;
    for (; entry; entry = besa__json_next(json, root, entry)) {
        const char *name = besa__json_key(json, entry);
        if (!besa__json_is(json, entry, BESA__JSON_OBJECT))
            return besa__fail(error, BESA_ERROR_FORMAT, "%s: header entry %.200s is not an object", path, name);
        if (!strcmp(name, "__metadata__")) {
            BESA__TRY(besa__check_metadata(json, entry, path, error));
            continue;
        }
        BESA__TRY(besa__parse_tensor(checkpoint, file, json, entry, path, error));
    }
    return besa__check_layout(checkpoint, checkpoint->shards + file, first, path, error);
}

/* Whether a file is what git leaves in the place of a large one. */
static int besa__is_pointer(const unsigned char *base, size_t size)
{
    static const char begin[] = "version https://git-lfs.";
    return size >= sizeof begin - 1 && !memcmp(base, begin, sizeof begin - 1);
}

/* Read the header of a shard whose base and size are set, and add its tensors to the table. */
static besa_result besa__read_header(besa_checkpoint *checkpoint, int64_t file, const char *path, besa_error *error)
{
    besa__shard *shard = checkpoint->shards + file;
    besa__json json;
    void *text;
    uint64_t length = 0;
    if (besa__is_pointer(shard->base, shard->size))
        return besa__fail(error, BESA_ERROR_FORMAT, "%s: a git-lfs pointer instead of the weights: fetch them, git -C %s lfs pull",
                          path, checkpoint->directory);
    for (size_t i = 0; i < 8 && shard->size >= 8; i++) length |= (uint64_t)shard->base[i] << (8 * i);
    if (shard->size < 8 || length > shard->size - 8)
        return besa__fail(error, BESA_ERROR_FORMAT,
                          "%s: truncated, or no safetensors file: %zu bytes, a header of %llu",
                          path, shard->size, (unsigned long long)length);
    if (length > BESA__HEADER_LIMIT || length < 2 || shard->base[8] != '{')
        return besa__fail(error, BESA_ERROR_FORMAT, "%s: no safetensors file: its header of %llu bytes %s", path,
                          (unsigned long long)length,
                          length > BESA__HEADER_LIMIT ? "is too long" : "is no JSON object");
    BESA__TRY(besa__malloc(&text, (size_t)length + 1, path, error));
    memcpy(text, shard->base + 8, (size_t)length);
    ((char *)text)[length] = 0;
    shard->data = 8 + (size_t)length;
    shard->hash = besa__hash(besa__hash(BESA__HASH_START, &length, sizeof length), text, (size_t)length);
    besa_result result = besa__json_parse(&json, (char *)text, (size_t)length, path, error);
    if (result == BESA_OK) result = besa__parse_header(checkpoint, file, &json, path, error);
    shard->text = json.text;
    json.text = NULL;
    besa__json_free(&json);
    return result;
}

static int besa__compare_names(const void *a, const void *b)
{
    return strcmp((*(const besa_tensor *const *)a)->name, (*(const besa_tensor *const *)b)->name);
}

static besa_result besa__sort_tensors(besa_checkpoint *checkpoint, besa_error *error)
{
    void *memory;
    size_t count = (size_t)checkpoint->num_tensors;
    BESA__TRY(besa__malloc(&memory, count * sizeof *checkpoint->sorted, "the tensor table", error));
    checkpoint->sorted = (const besa_tensor **)memory;
    for (size_t i = 0; i < count; i++) checkpoint->sorted[i] = checkpoint->tensors + i;
    if (count > 1) qsort(checkpoint->sorted, count, sizeof *checkpoint->sorted, besa__compare_names);
    for (size_t i = 1; i < count; i++) {
        const besa_tensor *a = checkpoint->sorted[i - 1], *b = checkpoint->sorted[i];
        if (!strcmp(a->name, b->name))
            return besa__fail(error, BESA_ERROR_FORMAT, "%s: tensor %.200s is in two shards: %.200s and %.200s",
                              checkpoint->directory, a->name, checkpoint->shards[a->file].name,
                              checkpoint->shards[b->file].name);
    }
    return BESA_OK;
}

BESA_API const besa_tensor *besa_checkpoint_find(const besa_checkpoint *checkpoint, const char *name)
{
    int64_t low = 0, high = checkpoint->num_tensors;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        int order = strcmp(name, checkpoint->sorted[middle]->name);
        if (!order) return checkpoint->sorted[middle];
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

/* A shard is a plain file name of the index's own directory. */
static int besa__is_shard_name(const char *name)
{
    size_t n = strlen(name), m = strlen(".safetensors");
    return n > m && !strcmp(name + n - m, ".safetensors") && !strpbrk(name, "/\\") && name[0] != '.';
}

/* The distinct file names of a weight_map, sorted, become the checkpoint's shards. */
static besa_result besa__list_shards(besa_checkpoint *checkpoint, const besa__json *json, const besa__json_value *map,
                                     const char *path, besa_error *error)
{
    void *memory;
    size_t count = 0, distinct = 0;
    BESA__TRY(besa__malloc(&memory, besa__json_count(json, map) * sizeof(char *), "the shards' names", error));
    const char **names = (const char **)memory;
    besa_result result = BESA_OK;
    const besa__json_value *v = besa__json_first(json, map);
    for (; v && result == BESA_OK; v = besa__json_next(json, map, v)) {
        const char *key = besa__json_key(json, v), *name = besa__json_string(json, v);
        if (!name)
            result = besa__fail(error, BESA_ERROR_FORMAT, "%s: weight_map: tensor %.200s names no file", path, key);
        else if (!besa__is_shard_name(name))
            result = besa__fail(error, BESA_ERROR_FORMAT, "%s: weight_map: tensor %.200s is in \"%.200s\", which is no "
                                "*.safetensors file of the same directory", path, key, name);
        else names[count++] = name;
    }
    if (result == BESA_OK) {
        qsort(names, count, sizeof *names, besa__compare_strings);
        for (size_t i = 0; i < count; i++)
            if (!i || strcmp(names[i], names[i - 1])) names[distinct++] = names[i];
        result = besa__malloc(&memory, distinct * sizeof(besa__shard), "the shards", error);
    }
    if (result == BESA_OK) {
        checkpoint->shards = (besa__shard *)memory;
        checkpoint->num_shards = (int64_t)distinct;
        memset(memory, 0, distinct * sizeof(besa__shard));
    }
    for (size_t i = 0; i < distinct && result == BESA_OK; i++)
        result = besa__copy_text(&checkpoint->shards[i].name, names[i], strlen(names[i]), "a shard's name", error);
    BESA_FREE(names);
    return result;
}

static besa_result besa__map_shard(besa_checkpoint *checkpoint, int64_t file, besa_error *error)
{
    char *path = NULL;
    BESA__TRY(besa__join(&path, checkpoint->directory, checkpoint->shards[file].name, error));
    besa__shard *shard = checkpoint->shards + file;
    besa__stat_before(&shard->stat, path);
    besa_result result = besa__map_file(&shard->base, &shard->size, path, error);
    if (result == BESA_OK) {
        result = besa__read_header(checkpoint, file, path, error);
        besa__release_range(shard, 0, shard->data);
    }
    if (result == BESA_ERROR_NOT_FOUND && checkpoint->index)
        besa__fail(error, result, "%s: the shard is missing that %s names", path, checkpoint->index);
    BESA_FREE(path);
    return result;
}

/* The weight_map of a parsed index, which is not empty. */
static besa_result besa__index_map(const besa__json_value **map, const besa__json *json, const char *path,
                                   besa_error *error)
{
    *map = besa__json_get(json, json->values, "weight_map");
    if (besa__json_is(json, *map, BESA__JSON_OBJECT) && besa__json_first(json, *map)) return BESA_OK;
    return besa__fail(error, BESA_ERROR_FORMAT, "%s: no weight_map, or an empty one", path);
}

/* Every tensor of a weight_map that is there is in the shard that it names. One that is nowhere may be needed by nobody. */
static besa_result besa__check_index(const besa_checkpoint *checkpoint, const besa__json *json,
                                     const besa__json_value *map, const char *path, besa_error *error)
{
    const besa__json_value *v = besa__json_first(json, map);
    for (; v; v = besa__json_next(json, map, v)) {
        const char *key = besa__json_key(json, v), *name = besa__json_string(json, v);
        const besa_tensor *tensor = besa_checkpoint_find(checkpoint, key);
        if (tensor && strcmp(checkpoint->shards[tensor->file].name, name))
            return besa__fail(error, BESA_ERROR_FORMAT, "%s: tensor %.200s should be in %.200s, but is in %.200s", path,
                              key, name, checkpoint->shards[tensor->file].name);
    }
    return BESA_OK;
}

/* A tensor that is needed is nowhere: an error where the index has it in a shard, or has another that is nowhere. */
static besa_result besa__check_missing(const besa_checkpoint *checkpoint, const char *name, besa_error *error)
{
    const besa__kept *file = &checkpoint->index_file;
    const besa__json_value *map, *v = NULL, *entry;
    void *text;
    besa__json json;
    if (!checkpoint->index || checkpoint->part_names) return BESA_OK; /* an index has no names of parts */
    BESA__TRY(besa__malloc(&text, file->size + 1, checkpoint->index, error));
    memcpy(text, file->bytes, file->size);
    ((char *)text)[file->size] = 0;
    besa_result result = besa__json_parse(&json, (char *)text, file->size, checkpoint->index, error);
    if (result == BESA_OK) result = besa__index_map(&map, &json, checkpoint->index, error);
    if (result == BESA_OK) v = besa__json_get(&json, map, name);
    for (entry = result == BESA_OK && !v ? besa__json_first(&json, map) : NULL; entry && !v; entry = besa__json_next(&json, map, entry))
        if (!besa_checkpoint_find(checkpoint, besa__json_key(&json, entry))) v = entry;
    if (v)
        result = besa__fail(error, BESA_ERROR_FORMAT, "%s/%s: tensor %.200s should be in %.200s, but is missing there%s%s",
                            checkpoint->directory, checkpoint->index, besa__json_key(&json, v), besa__json_string(&json, v),
                            strcmp(besa__json_key(&json, v), name) ? ", and so is " : "",
                            strcmp(besa__json_key(&json, v), name) ? name : "");
    besa__json_free(&json);
    return result;
}

static besa_result besa__open_indexed(besa_checkpoint *checkpoint, const besa__json *json, const char *path,
                                      besa_error *error)
{
    const besa__json_value *map;
    BESA__TRY(besa__index_map(&map, json, path, error));
    BESA__TRY(besa__list_shards(checkpoint, json, map, path, error));
    for (int64_t i = 0; i < checkpoint->num_shards; i++) BESA__TRY(besa__map_shard(checkpoint, i, error));
    BESA__TRY(besa__sort_tensors(checkpoint, error));
    return besa__check_index(checkpoint, json, map, path, error);
}

/* The first name, in order, of a file of a directory that begins and ends so; "" where there is none. */
static void besa__list_name(char name[256], const char *directory, const char *begin, const char *end)
{
    DIR *list = opendir(directory);
    struct dirent *entry;
    name[0] = 0;
    while (list && (entry = readdir(list)) != NULL) {
        const char *found = entry->d_name;
        size_t n = strlen(found), m = strlen(end);
        if (found[0] == '.' || n > 255 || n < m || strcmp(found + n - m, end) || strncmp(found, begin, strlen(begin))) continue;
        if (!name[0] || strcmp(found, name) < 0) memcpy(name, found, n + 1);
    }
    if (list) closedir(list);
}

/* A directory without weights that can be read: which others lie in it? */
static besa_result besa__check_formats(const char *directory, besa_error *error)
{
    char name[256];
    besa__list_name(name, directory, "pytorch_model", ".bin");
    if (name[0])
        return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s: its weights are in %s, not in safetensors: convert them, "
                          "python3 examples/convert.py %s NEW", directory, name, directory);
    besa__list_name(name, directory, "", ".gguf");
    if (name[0])
        return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s: its weights are in a GGUF file, not in safetensors: convert it, "
                          "python3 examples/convert.py %s/%s NEW", directory, directory, name);
    besa__list_name(name, directory, "adapter_model", "");
    if (name[0])
        return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s: an adapter (%s) without its model: merge it into the model, peft's "
                          "merge_and_unload()", directory, name);
    return BESA_OK;
}

/* Map model.safetensors, or else the shards of model.safetensors.index.json, and build the tensor table. */
static besa_result besa__open_weights(besa_checkpoint *checkpoint, besa_error *error)
{
    char *single = NULL, *index = NULL;
    besa__json json;
    struct stat st;
    memset(&json, 0, sizeof json);
    besa_result result = besa__join(&single, checkpoint->directory, besa__single_name, error);
    if (result == BESA_OK) result = besa__join(&index, checkpoint->directory, besa__index_name, error);
    if (result != BESA_OK) { /* no memory */
    } else if (!lstat(single, &st)) {
        void *memory;
        result = besa__malloc(&memory, sizeof(besa__shard), "the shards", error);
        if (result == BESA_OK) {
            checkpoint->shards = (besa__shard *)memset(memory, 0, sizeof(besa__shard));
            checkpoint->num_shards = 1;
            result = besa__copy_text(&checkpoint->shards->name, besa__single_name, strlen(besa__single_name),
                                     "a shard's name", error);
        }
        if (result == BESA_OK) result = besa__map_shard(checkpoint, 0, error);
        if (result == BESA_OK) result = besa__sort_tensors(checkpoint, error);
    } else if (!lstat(index, &st)) {
        checkpoint->index = besa__index_name;
        result = besa__json_load(&json, &checkpoint->index_file, index, error);
        if (result == BESA_OK) result = besa__open_indexed(checkpoint, &json, index, error);
    } else {
        result = besa__check_formats(checkpoint->directory, error);
        if (result == BESA_OK)
            result = besa__fail(error, BESA_ERROR_NOT_FOUND, "%s: neither %s nor %s in it: download them, hf download NAME "
                                "--local-dir %s", checkpoint->directory, besa__single_name, besa__index_name,
                                checkpoint->directory);
    }
    besa__json_free(&json);
    BESA_FREE(single);
    BESA_FREE(index);
    return result;
}

BESA_API void besa_checkpoint_close(besa_checkpoint *checkpoint)
{
    if (!checkpoint) return;
    for (int64_t i = 0; i < checkpoint->num_shards; i++) {
        besa__unmap(checkpoint->shards[i].base, checkpoint->shards[i].size);
        BESA_FREE(checkpoint->shards[i].text);
        BESA_FREE(checkpoint->shards[i].name);
    }
    BESA_FREE(checkpoint->config_file.bytes);
    BESA_FREE(checkpoint->index_file.bytes);
    BESA_FREE(checkpoint->shards);
    BESA_FREE(checkpoint->tensors);
    BESA_FREE(checkpoint->sorted);
    BESA_FREE(checkpoint->part_names);
    BESA_FREE(checkpoint->directory);
    BESA_FREE(checkpoint->name);
    BESA_FREE(checkpoint);
}

BESA_API const besa_config *besa_checkpoint_config(const besa_checkpoint *checkpoint) { return &checkpoint->config; }

BESA_API const char *besa_checkpoint_notes(const besa_checkpoint *checkpoint) { return checkpoint->notes; }
BESA_API const char *besa_checkpoint_name(const besa_checkpoint *checkpoint) { return checkpoint->name; }

BESA_API int64_t besa_checkpoint_tensor_count(const besa_checkpoint *checkpoint) { return checkpoint->num_tensors; }

BESA_API const besa_tensor *besa_checkpoint_tensor(const besa_checkpoint *checkpoint, int64_t index)
{
    return index >= 0 && index < checkpoint->num_tensors ? checkpoint->tensors + index : NULL;
}

/* ============================================================================================
 * // >>tokens                token files and the sequences cut out of them
 * ============================================================================================
 * Owns the reading of .npy and raw token files. Uses the file helpers of safetensors. */

/* How the ids lie in a token file of any kind. */
typedef struct besa__npy {
    size_t data;                                /* where the elements begin */
    size_t width;                               /* bytes of one */
    int is_signed;
    int64_t dims[2];
    int ndim;
} besa__npy;

typedef struct besa__npy_parser {
    const char *s, *path;
    besa__npy *npy;
    besa_error *error;
} besa__npy_parser;

static besa_result besa__npy_fail(const besa__npy_parser *p, const char *what)
{
    return besa__fail(p->error, BESA_ERROR_FORMAT, "%s: malformed .npy header: %s", p->path, what);
}

static void besa__npy_space(besa__npy_parser *p)
{
    while (*p->s == ' ' || *p->s == '\t' || *p->s == '\n' || *p->s == '\r') p->s++;
}

/* Skip space, then one expected character; 0 if it is another. */
static int besa__npy_accept(besa__npy_parser *p, char c)
{
    besa__npy_space(p);
    if (*p->s != c) return 0;
    p->s++;
    return 1;
}

/* A quoted string of up to 31 plain characters. */
static besa_result besa__npy_string(besa__npy_parser *p, char text[32])
{
    size_t n = 0;
    besa__npy_space(p);
    char quote = *p->s;
    if (quote != '\'' && quote != '"') return besa__npy_fail(p, "expected a string");
    for (p->s++; *p->s && *p->s != quote; p->s++) {
        if (n == 31 || *p->s == '\\') return besa__npy_fail(p, "a string that no token file has");
        text[n++] = *p->s;
    }
    if (!*p->s) return besa__npy_fail(p, "a string without end");
    p->s++;
    text[n] = 0;
    return BESA_OK;
}

static besa_result besa__npy_shape(besa__npy_parser *p)
{
    if (!besa__npy_accept(p, '(')) return besa__npy_fail(p, "shape is no tuple");
    while (!besa__npy_accept(p, ')')) {
        int64_t size = 0;
        if (p->npy->ndim == 2)
            return besa__fail(p->error, BESA_ERROR_UNSUPPORTED, "%s: more than 2 dimensions; supported are 1 and 2",
                              p->path);
        if (!besa__json_digits(p->s)) return besa__npy_fail(p, "a size in shape is no number");
        for (; *p->s >= '0' && *p->s <= '9'; p->s++) {
            if (size > INT64_MAX / 16 / 10) return besa__npy_fail(p, "shape overflows 64 bits");
            size = size * 10 + (*p->s - '0');
        }
        p->npy->dims[p->npy->ndim++] = size;
        if (besa__npy_accept(p, ',')) besa__npy_space(p);
        else if (*p->s != ')' || p->npy->ndim == 1) return besa__npy_fail(p, "shape is no tuple");
    }
    return p->npy->ndim ? BESA_OK : besa__npy_fail(p, "a scalar");
}

static besa_result besa__npy_descr(besa__npy_parser *p)
{
    char text[32];
    BESA__TRY(besa__npy_string(p, text));
    if (!strcmp(text, "<u2")) p->npy->width = 2;
    else if (!strcmp(text, "<i4") || !strcmp(text, "<u4")) p->npy->width = 4;
    else if (!strcmp(text, "<i8")) p->npy->width = 8;
    else
        return besa__fail(p->error, BESA_ERROR_UNSUPPORTED,
                          "%s: dtype '%s' (descr); supported are '<u2', '<i4', '<u4' and "
                          "'<i8': save it as numpy.uint16, int32, uint32 or int64", p->path, text);
    p->npy->is_signed = text[1] == 'i';
    return BESA_OK;
}

/* {'descr': '<u2', 'fortran_order': False, 'shape': (3, 4), }, keys in any order, each once. */
static besa_result besa__npy_dict(besa__npy_parser *p)
{
    int seen = 0;
    char key[32];
    if (!besa__npy_accept(p, '{')) return besa__npy_fail(p, "no dictionary");
    while (!besa__npy_accept(p, '}')) {
        BESA__TRY(besa__npy_string(p, key));
        int which = !strcmp(key, "descr") ? 1 : !strcmp(key, "fortran_order") ? 2 : !strcmp(key, "shape") ? 4 : 0;
        if (!which || (seen & which)) return besa__npy_fail(p, "an unknown key, or one twice");
        seen |= which;
        if (!besa__npy_accept(p, ':')) return besa__npy_fail(p, "expected ':'");
        besa__npy_space(p);
        if (which == 1) BESA__TRY(besa__npy_descr(p));
        else if (which == 4) BESA__TRY(besa__npy_shape(p));
        else if (!strncmp(p->s, "False", 5)) p->s += 5;
        else if (!strncmp(p->s, "True", 4))
            return besa__fail(p->error, BESA_ERROR_UNSUPPORTED, "%s: fortran_order is True; save it in C order",
                              p->path);
        else return besa__npy_fail(p, "fortran_order is neither True nor False");
        if (!besa__npy_accept(p, ',') && *p->s != '}') return besa__npy_fail(p, "expected ',' or '}'");
    }
    besa__npy_space(p);
    return seen == 7 && !*p->s ? BESA_OK : besa__npy_fail(p, "a key is missing, or text follows");
}

static besa_result besa__npy_header(besa__npy *npy, const unsigned char *file, size_t size, const char *path,
                                    besa_error *error)
{
    besa__npy_parser p = { NULL, path, npy, error };
    size_t at = 10, length;
    void *text;
    if (size < 12 || memcmp(file, "\x93NUMPY", 6)) return besa__npy_fail(&p, "no .npy file, or truncated");
    if (file[6] < 1 || file[6] > 3 || file[7] != 0)
        return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s: .npy version %d.%d; supported are 1.0, 2.0 and 3.0", path,
                          file[6], file[7]);
    length = (size_t)file[8] | (size_t)file[9] << 8;
    if (file[6] > 1) {
        length |= (size_t)file[10] << 16 | (size_t)file[11] << 24;
        at = 12;
    }
    if (length > size - at || length > 65536) return besa__npy_fail(&p, "truncated, or too long");
    BESA__TRY(besa__malloc(&text, length + 1, path, error));
    memcpy(text, file + at, length);
    ((char *)text)[length] = 0;
    p.s = (const char *)text;
    npy->data = at + length;
    besa_result result = strlen(p.s) == length ? besa__npy_dict(&p) : besa__npy_fail(&p, "a NUL character");
    BESA_FREE(text);
    return result;
}

static int64_t besa__token_at(const unsigned char *s, size_t width, int is_signed)
{
    uint64_t u = 0;
    for (size_t b = 0; b < width; b++) u |= (uint64_t)s[b] << (8 * b);
    if (width == 4 && is_signed && (u & 0x80000000u)) u |= 0xFFFFFFFF00000000u;
    return u <= INT64_MAX ? (int64_t)u : -(int64_t)~u - 1;
}

/* A file of llm.c's begins with 256 int32: magic, version, number of ids, zeros. npy->data stays 0 where it is none. */
static besa_result besa__llmc_header(besa__npy *npy, const unsigned char *file, size_t size, const char *path,
                                     besa_error *error)
{
    enum { HEADER = 1024, GPT2 = 20240520, LLAMA3 = 20240801 };
    if (size < 12) return BESA_OK;
    int64_t magic = besa__token_at(file, 4, 1), version = besa__token_at(file + 4, 4, 1);
    int64_t count = besa__token_at(file + 8, 4, 1), width = magic == GPT2 ? 2 : 4;
    if (magic / 10000 != 2024 || version < 0 || version > 255) return BESA_OK; /* their magics are dates */
    if ((magic != GPT2 || version != 1) && (magic != LLAMA3 || version != 7))
        return besa__fail(error, BESA_ERROR_UNSUPPORTED,
                          "%s: begins as a file of llm.c's with magic %lld, version %lld; supported are its token files: "
                          "%d, version 1, and %d, version 7", path, (long long)magic, (long long)version, GPT2, LLAMA3);
    if (size < HEADER || count < 0 || (uint64_t)count * (uint64_t)width != size - HEADER)
        return besa__fail(error, BESA_ERROR_FORMAT,
                          "%s: the header of llm.c's asks for %lld tokens of %lld bytes after its 1024, the file has "
                          "%zu bytes in all: truncated?", path, (long long)count, (long long)width, size);
    npy->data = HEADER;
    npy->width = (size_t)width;
    npy->is_signed = 0;
    return BESA_OK;
}

/* A raw .bin may hold uint16 or, of a larger vocabulary, uint32. The second can be told by the upper halves of its ids,
 * which are 0 or next to it: in a text of uint16 no such run of every second id occurs. */
static besa_result besa__check_raw_bin(const unsigned char *file, size_t size, const char *path, besa_error *error)
{
    int64_t low = 0, high = 0;
    if (!size || size % 4) return BESA_OK;
    for (size_t at = 0; at < size && high < 16; at += 4) {
        int64_t first = besa__token_at(file + at, 2, 0), second = besa__token_at(file + at + 2, 2, 0);
        low = first > low ? first : low;
        high = second > high ? second : high;
    }
    if (high && (high >= 16 || low < 256 || size < 128)) return BESA_OK;
    return besa__fail(error, BESA_ERROR_FORMAT,
                      "%s: a .bin is read as uint16, but every second number in it is %s, as of 32-bit ids; name it .i32 "
                      "if its ids have 32 bits, .u16 if they have 16", path, high ? "below 16" : "0");
}

/* Raw files have one element kind by their name, unless they begin as llm.c's do. */
static besa_result besa__token_format(besa__npy *npy, const unsigned char *file, size_t size, const char *path,
                                      besa_error *error)
{
    const char *dot = strrchr(path, '.');
    memset(npy, 0, sizeof *npy);
    npy->ndim = 1;
    if (dot && (!strcmp(dot, ".u16") || !strcmp(dot, ".bin"))) npy->width = 2;
    else if (dot && !strcmp(dot, ".i32")) npy->width = 4, npy->is_signed = 1;
    else if (dot && !strcmp(dot, ".npy")) {
        npy->ndim = 0;
        BESA__TRY(besa__npy_header(npy, file, size, path, error));
    } else {
        return besa__fail(error, BESA_ERROR_UNSUPPORTED,
                          "%s: no known kind of token file; supported are .npy, raw .u16 and .bin (uint16) and .i32: make one "
                          "of a text, python3 examples/tokenize.py %s tokens.npy --tokenizer MODEL", path, path);
    }
    int raw = dot[1] != 'n';
    if (raw) BESA__TRY(besa__llmc_header(npy, file, size, path, error));
    size_t bytes = size - npy->data;
    if (raw) {
        if (!npy->data && dot[1] == 'b') BESA__TRY(besa__check_raw_bin(file, size, path, error));
        npy->dims[0] = (int64_t)(bytes / npy->width);
        if (bytes % npy->width)
            return besa__fail(error, BESA_ERROR_FORMAT,
                              "%s: %zu bytes are no whole number of %zu-byte tokens: truncated?",
                              path, bytes, npy->width);
        return BESA_OK;
    }
    uint64_t rows = (uint64_t)npy->dims[0], columns = npy->ndim == 2 ? (uint64_t)npy->dims[1] : 1;
    if ((columns && rows > bytes / npy->width / columns) || rows * columns * npy->width != bytes)
        return besa__fail(error, BESA_ERROR_FORMAT,
                          "%s: %zu bytes after the header, its shape asks for %llu x %llu tokens "
                          "of %zu: truncated?", path, bytes, (unsigned long long)rows,
                          (unsigned long long)columns, npy->width);
    return BESA_OK;
}

static besa_result besa__tokens_read(besa_tokens *tokens, const unsigned char *file, size_t size, const char *path,
                                     besa_error *error)
{
    besa__npy npy;
    void *memory;
    BESA__TRY(besa__token_format(&npy, file, size, path, error));
    int64_t count = npy.dims[0] * (npy.ndim == 2 ? npy.dims[1] : 1);
    if (!count) return besa__fail(error, BESA_ERROR_TOKENS, "%s: holds no tokens", path);
    BESA__TRY(besa__malloc(&memory, besa__bytes(count, sizeof(int32_t)), path, error));
    int32_t *ids = (int32_t *)memory;
    for (int64_t i = 0; i < count; i++) {
        int64_t id = besa__token_at(file + npy.data + (size_t)i * npy.width, npy.width, npy.is_signed);
        if (id < 0 || id > INT32_MAX) {
            BESA_FREE(ids);
            return besa__fail(error, BESA_ERROR_TOKEN, "%s: token %lld is %lld; ids are 0 .. 2147483647", path,
                              (long long)i, (long long)id);
        }
        ids[i] = (int32_t)id;
    }
    tokens->ids = ids;
    tokens->count = count;
    tokens->rows = npy.ndim == 2 ? npy.dims[0] : 0;
    tokens->columns = npy.ndim == 2 ? npy.dims[1] : 0;
    tokens->id_bytes = (int)npy.width;
    size_t length = strlen(path), room = sizeof tokens->file - 1;
    snprintf(tokens->file, sizeof tokens->file, "%s", path + (length > room ? length - room : 0));
    besa__sha256(tokens->sha256, file, size);
    return BESA_OK;
}

BESA_API besa_result besa_tokens_load(besa_tokens *tokens, const char *path, besa_error *error)
{
    unsigned char *file;
    size_t size = 0;
    memset(tokens, 0, sizeof *tokens);
    if (!path) return besa__fail(error, BESA_ERROR_OPTION, "no token file given");
    BESA__TRY(besa__map_file(&file, &size, path, error));
    besa_result result = besa__is_pointer(file, size)
                             ? besa__fail(error, BESA_ERROR_FORMAT, "%s: a git-lfs pointer instead of tokens: git lfs pull", path)
                             : besa__tokens_read(tokens, file, size, path, error);
    besa__unmap(file, size);
    return result;
}

BESA_API void besa_tokens_free(besa_tokens *tokens)
{
    if (!tokens) return;
    BESA_FREE(tokens->ids);
    memset(tokens, 0, sizeof *tokens);
}

/* Output i (0, 1, ...) of the splitmix64 generator started with seed. */
static uint64_t besa__splitmix64(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

BESA_API besa_result besa_tokens_sample(const besa_tokens *tokens, int64_t nsamples, int64_t seqlen, uint64_t seed,
                                        int64_t vocab_size, int32_t *ids, besa_error *error)
{
    if (nsamples < 1 || seqlen < 1 || vocab_size < 1)
        return besa__fail(error, BESA_ERROR_OPTION,
                          "nsamples = %lld, seqlen = %lld, vocab_size = %lld: each must be at "
                          "least 1", (long long)nsamples, (long long)seqlen, (long long)vocab_size);
    if (tokens->id_bytes == 2 && vocab_size > 65536)
        return besa__fail(error, BESA_ERROR_TOKEN,
                          "%s: its ids have 16 bits, which cannot hold the model's vocabulary of %lld; make it again with "
                          "32-bit ids (.npy of uint32), or name a raw file .i32 if it has them", tokens->file,
                          (long long)vocab_size);
    if (tokens->columns && (nsamples > tokens->rows || seqlen > tokens->columns))
        return besa__fail(error, BESA_ERROR_TOKENS,
                          "%s%s%lld sequences of %lld tokens asked for, the file has %lld of %lld: these are the most",
                          tokens->file, tokens->file[0] ? ": " : "", (long long)nsamples, (long long)seqlen, (long long)tokens->rows, (long long)tokens->columns);
    if (!tokens->columns && (seqlen > tokens->count || (!seed && nsamples > tokens->count / seqlen)))
        return besa__fail(error, BESA_ERROR_TOKENS, "%s%s%lld sequences of %lld tokens asked for, the file has %lld tokens: the "
                          "most is %s %lld", tokens->file, tokens->file[0] ? ": " : "", (long long)nsamples, (long long)seqlen, (long long)tokens->count,
                          seqlen > tokens->count ? "a seqlen of" : "nsamples",
                          (long long)(seqlen > tokens->count ? tokens->count : tokens->count / seqlen));
    for (int64_t i = 0; i < nsamples; i++) {
        int64_t start = tokens->columns ? i * tokens->columns : i * seqlen;
        if (!tokens->columns && seed)
            start = (int64_t)(besa__splitmix64(seed, (uint64_t)i) % (uint64_t)(tokens->count - seqlen + 1));
        for (int64_t t = 0; t < seqlen; t++) {
            int32_t id = tokens->ids[start + t];
            if (id < 0 || id >= vocab_size)
                return besa__fail(error, BESA_ERROR_TOKEN, "%s%stoken %lld is %ld, the vocabulary has %lld: the file was made "
                                  "with another tokenizer, make it again with the model's own", tokens->file,
                                  tokens->file[0] ? ": " : "", (long long)(start + t), (long)id, (long long)vocab_size);
            ids[i * seqlen + t] = id;
        }
    }
    return BESA_OK;
}

/* ============================================================================================
 * // >>config                config.json, and the tensors a model of its shape must have
 * ============================================================================================
 * Owns the meaning of config.json: keys, their defaults and what is refused follow Hugging Face transformers (4 and
 * 5). Binds tensor names to blocks and opens checkpoints. Uses json and safetensors. */
typedef struct besa__config_reader {
    const besa__json *json;
    const besa__json_value *root;
    const char *path;
    besa_error *error;
} besa__config_reader;

/* A block's tensors; NULL where the model has none. */
typedef struct besa__block_tensors {
    const besa_tensor *weight[BESA_LAYERS];
    const besa_tensor *vector[BESA_VECTORS];
} besa__block_tensors;

typedef struct besa__model {
    const besa_tensor *embedding;               /* (vocab, d) */
    const besa_tensor *norm;                    /* (d) */
    const besa_tensor *head;                    /* (vocab, d); the embedding where tied; NULL where there is none */
    besa_dtype dtype;                           /* of all prunable weights */
} besa__model;

static besa_result besa__config_refuse(const besa__config_reader *r, const char *key, const besa__json_value *value,
                                       const char *supported)
{
    char text[128];
    return besa__fail(r->error, BESA_ERROR_UNSUPPORTED, "%s: %s = %s is not supported; supported: %s", r->path, key,
                      besa__json_show(r->json, value, text, sizeof text), supported);
}

/* A member of the root that is there and not null, or NULL. */
static const besa__json_value *besa__config_get(const besa__config_reader *r, const char *key)
{
    const besa__json_value *value = besa__json_get(r->json, r->root, key);
    return besa__json_is(r->json, value, BESA__JSON_NULL) ? NULL : value;
}

/* Whether a value is this string. */
static int besa__config_is(const besa__config_reader *r, const besa__json_value *value, const char *expected)
{
    const char *string = besa__json_string(r->json, value);
    return string && !strcmp(string, expected);
}

/* An integer of the root, in its range. fallback is taken where the key is absent or null; 0 makes the key required. */
static besa_result besa__config_integer(const besa__config_reader *r, const char *key, int64_t fallback, int64_t *out)
{
    const besa__json_value *value = besa__config_get(r, key);
    const besa__range *range = besa__find_range(key);
    besa__json_number number = besa__json_number_of(r->json, value);
    char supported[64];
    *out = fallback;
    if (!value && fallback) return BESA_OK;
    if (!number.is_integer || !besa__in_range(range, (double)number.integer))
        return besa__config_refuse(r, key, value, besa__range_text(range, supported, sizeof supported));
    *out = number.integer;
    return BESA_OK;
}

static besa_result besa__config_bool(const besa__config_reader *r, const char *key, int *out)
{
    const besa__json_value *value = besa__config_get(r, key);
    *out = besa__json_is(r->json, value, BESA__JSON_TRUE);
    if (value && !*out && !besa__json_is(r->json, value, BESA__JSON_FALSE))
        return besa__config_refuse(r, key, value, "true, false");
    return BESA_OK;
}

/* A number of an object (shown as prefix.key), in its range; fallback 0 makes it required. */
static besa_result besa__config_number(const besa__config_reader *r, const besa__json_value *object,
                                       const char *prefix, const char *key, double fallback, double *out)
{
    const besa__json_value *value = besa__json_get(r->json, object, key);
    const besa__range *range = besa__find_range(key);
    char name[96], supported[64];
    *out = fallback;
    if (besa__json_is(r->json, value, BESA__JSON_NULL)) value = NULL;
    if (!value && fallback > 0) return BESA_OK;
    snprintf(name, sizeof name, "%s%s", prefix, key);
    *out = besa__json_number_of(r->json, value).value;
    if (besa__json_is(r->json, value, BESA__JSON_NUMBER) && besa__in_range(range, *out)) return BESA_OK;
    return besa__config_refuse(r, name, value, besa__range_text(range, supported, sizeof supported));
}

/* Where a family's biases come from: its layers never have one, and the key is ignored (NONE) or must be false (REFUSED);
 * they always have one; the key says so. */
enum { BESA__BIAS_NONE, BESA__BIAS_REFUSED, BESA__BIAS_ALWAYS, BESA__BIAS_BY_KEY };
/* Which layers have a sliding window: none, and the key must be null or 0; all, where it is set; those that layer_types
 * names, or from max_window_layers on, or those without rope, where use_sliding_window is true; all but every so many-th. */
enum { BESA__WINDOW_NONE, BESA__WINDOW_ALL, BESA__WINDOW_CHOSEN, BESA__WINDOW_UNTURNED, BESA__WINDOW_PATTERN };
/* What a family has that Llama has not. */
enum {
    BESA__TIED = 1,                             /* the embedding is the head where config.json does not say */
    BESA__NO_ROPE_LAYERS = 2,                   /* no_rope_layers, and no_rope_layer_interval */
    BESA__MULTIPLIERS = 4,                      /* of embedding, attention, residual and logits */
    BESA__FUSED = 8,                            /* q, k and v are one tensor, as are gate and up */
    BESA__LONGROPE = 16,                        /* partial_rotary_factor; original_max_position_embeddings at the root */
    BESA__GEMMA = 32,                           /* GeGLU, norms above 1, scaled embedding, capped logits */
    BESA__CAPPED = 64,                          /* attn_logit_softcapping */
    BESA__LOCAL_ROPE = 128,                     /* another rope where layers slide */
    BESA__MROPE = 256                           /* a rope by three positions, which are one for text */
};
enum { BESA__QK_NORM_HEAD = 1, BESA__QK_NORM_WHOLE }; /* over a head, over all heads */

/* A family of models, by its model_type in config.json. One that differs from the others only in what stands here is one
 * more row. Values are those of Hugging Face transformers. */
typedef struct besa__architecture {
    const char *model_type;
    const char *class_name, *former_class;      /* in `architectures`; former_class NULL: none */
    const char *prefix;                         /* of all tensor names but lm_head's; some files have none */
    int bias[BESA__GROUPS];                     /* BESA__BIAS_..: of q, k, v; of o; of gate, up, down */
    int qk_norm;                                /* BESA__QK_NORM_..: q and k are normed before rope; 0: they are not */
    int window;                                 /* BESA__WINDOW_.. */
    unsigned ropes;                             /* bits of besa_rope_type */
    /* where config.json has no such key; 0: as many as attention heads, hidden_size / num_attention_heads, no window */
    int64_t num_key_value_heads, head_dim, sliding_window, max_position_embeddings;
    double rope_theta, rms_norm_eps;
    besa_norms norms;
    unsigned traits;                            /* BESA__TIED .. */
    int64_t pattern;                            /* every so many-th layer has no window, or no rope; 0: no such pattern */
} besa__architecture;

#define BESA__ROPES (1u << BESA_ROPE_DEFAULT | 1u << BESA_ROPE_LINEAR | 1u << BESA_ROPE_LLAMA3 | 1u << BESA_ROPE_DYNAMIC | \
                     1u << BESA_ROPE_YARN)

static const besa__architecture besa__architectures[] = {
    {"llama", "LlamaForCausalLM", "LLaMAForCausalLM", "model.", {BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY}, 0,
     BESA__WINDOW_NONE, BESA__ROPES, 0, 0, 0, 2048, 1e4, 1e-6, BESA_NORMS_IN, 0, 0},
    {"mistral", "MistralForCausalLM", NULL, "model.", {BESA__BIAS_REFUSED, BESA__BIAS_REFUSED, BESA__BIAS_REFUSED}, 0,
     BESA__WINDOW_ALL, BESA__ROPES, 8, 0, 4096, 131072, 1e4, 1e-6, BESA_NORMS_IN, 0, 0},
    {"qwen2", "Qwen2ForCausalLM", NULL, "model.", {BESA__BIAS_ALWAYS, BESA__BIAS_NONE, BESA__BIAS_REFUSED}, 0,
     BESA__WINDOW_CHOSEN, BESA__ROPES, 32, 0, 4096, 32768, 1e4, 1e-6, BESA_NORMS_IN, 0, 0},
    {"qwen3", "Qwen3ForCausalLM", NULL, "model.", {BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY, BESA__BIAS_REFUSED}, BESA__QK_NORM_HEAD,
     BESA__WINDOW_CHOSEN, BESA__ROPES, 32, 128, 4096, 32768, 1e4, 1e-6, BESA_NORMS_IN, 0, 0},
    {"qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", NULL, "model.", {BESA__BIAS_ALWAYS, BESA__BIAS_NONE, BESA__BIAS_REFUSED},
     0, BESA__WINDOW_CHOSEN, BESA__ROPES, 8, 0, 4096, 32768, 1e6, 1e-5, BESA_NORMS_IN, BESA__MROPE, 0},
    {"qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration", NULL, "model.", {BESA__BIAS_ALWAYS, BESA__BIAS_NONE, BESA__BIAS_REFUSED},
     0, BESA__WINDOW_CHOSEN, BESA__ROPES, 8, 0, 4096, 32768, 1e6, 1e-5, BESA_NORMS_IN, BESA__MROPE, 0},
    {"smollm3", "SmolLM3ForCausalLM", NULL, "model.", {BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY}, 0,
     BESA__WINDOW_UNTURNED, BESA__ROPES, 4, 0, 0, 32768, 2e6, 1e-6, BESA_NORMS_IN, BESA__TIED | BESA__NO_ROPE_LAYERS, 4},
    {"granite", "GraniteForCausalLM", NULL, "model.", {BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY}, 0,
     BESA__WINDOW_NONE, BESA__ROPES, 0, 0, 0, 2048, 1e4, 1e-6, BESA_NORMS_IN, BESA__MULTIPLIERS, 0},
    {"olmo2", "Olmo2ForCausalLM", NULL, "model.", {BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY, BESA__BIAS_REFUSED}, BESA__QK_NORM_WHOLE,
     BESA__WINDOW_NONE, BESA__ROPES, 0, 0, 0, 2048, 1e4, 1e-5, BESA_NORMS_OUT, 0, 0},
    {"phi3", "Phi3ForCausalLM", NULL, "model.", {BESA__BIAS_REFUSED, BESA__BIAS_REFUSED, BESA__BIAS_REFUSED}, 0,
     BESA__WINDOW_ALL, 1u << BESA_ROPE_DEFAULT | 1u << BESA_ROPE_LONGROPE, 0, 0, 0, 4096, 1e4, 1e-5, BESA_NORMS_IN,
     BESA__FUSED | BESA__LONGROPE, 0},
    {"gemma2", "Gemma2ForCausalLM", NULL, "model.", {BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY, BESA__BIAS_REFUSED}, 0,
     BESA__WINDOW_PATTERN, BESA__ROPES, 4, 256, 4096, 8192, 1e4, 1e-6, BESA_NORMS_BOTH, BESA__TIED | BESA__GEMMA | BESA__CAPPED, 2},
    {"gemma3_text", "Gemma3ForCausalLM", NULL, "model.", {BESA__BIAS_BY_KEY, BESA__BIAS_BY_KEY, BESA__BIAS_REFUSED},
     BESA__QK_NORM_HEAD, BESA__WINDOW_PATTERN, BESA__ROPES, 4, 256, 4096, 131072, 1e6, 1e-6, BESA_NORMS_BOTH,
     BESA__TIED | BESA__GEMMA | BESA__LOCAL_ROPE, 6},
};

enum { BESA__ARCHITECTURES = (int)(sizeof besa__architectures / sizeof *besa__architectures) };

/* The row of a model_type, or NULL. */
static const besa__architecture *besa__find_architecture(const char *model_type)
{
    for (int i = 0; i < BESA__ARCHITECTURES; i++)
        if (model_type && !strcmp(model_type, besa__architectures[i].model_type)) return &besa__architectures[i];
    return NULL;
}

/* Models of several parts, whose language model is a family's: what there is of it in config.json is in text_config, but for
 * what it has by default. */
static const struct { const char *model_type, *part; int64_t vocab_size, num_attention_heads; int tied; } besa__wrappers[] = {
    {"gemma3", "gemma3_text", 262208, 8, 1}, {"mistral3", "mistral", 0, 0, 1}, {"qwen2_5_vl", "qwen2_5_vl_text", 0, 0, 0}};

enum { BESA__WRAPPERS = (int)(sizeof besa__wrappers / sizeof *besa__wrappers) };

/* "a", "b", "c": the model types of all rows, and of wrappers that are none. */
static const char *besa__model_types(char *text, size_t size)
{
    size_t n = 0;
    for (int i = 0; i < BESA__ARCHITECTURES && n < size; i++)
        n += (size_t)snprintf(text + n, size - n, "%s\"%s\"", i ? ", " : "", besa__architectures[i].model_type);
    for (int i = 0; i < BESA__WRAPPERS && n < size; i++)
        if (!besa__find_architecture(besa__wrappers[i].model_type))
            n += (size_t)snprintf(text + n, size - n, ", \"%s\"", besa__wrappers[i].model_type);
    return text;
}

/* The name of a block's tensor: the prefix, layers.N. and a path such as "mlp.up_proj". */
static void besa__tensor_name(char *name, size_t size, const besa_config *config, int64_t block, const char *path)
{
    snprintf(name, size, "%slayers.%lld.%s", config->prefix, (long long)block, path);
}

/* The name of a layer's tensor: kind is "weight" or "bias". */
static void besa__layer_tensor_name(char *name, size_t size, const besa_config *config, int64_t block, int layer,
                                    const char *kind)
{
    char path[48];
    snprintf(path, sizeof path, "%s.%s", besa__layers[layer].path, kind);
    besa__tensor_name(name, size, config, block, path);
}

/* A model_type that has no row: what it is, where config.json tells. */
static besa_result besa__config_refuse_model(const besa__config_reader *r, const besa__json_value *type, const char *supported)
{
    static const struct { const char *key, *what; } told[] = {
        { "text_config", "a language model among parts that read images or sound" },
        { "vision_config", "a language model among parts that read images" }, { "num_local_experts", "a mixture of experts" },
        { "num_experts", "a mixture of experts" }, { "n_routed_experts", "a mixture of experts" } };
    char name[128];
    for (size_t i = 0; i < sizeof told / sizeof *told; i++)
        if (besa__config_get(r, told[i].key))
            return besa__fail(r->error, BESA_ERROR_UNSUPPORTED, "%s: model_type = %s, %s (%s), is not supported; supported: %s",
                              r->path, besa__json_show(r->json, type, name, sizeof name), told[i].what, told[i].key, supported);
    return besa__config_refuse(r, "model_type", type, supported);
}

/* The architecture by model_type; `architectures` must agree. */
static besa_result besa__config_architecture(const besa__config_reader *r, besa_config *config,
                                             const besa__architecture **out)
{
    const besa__json_value *type = besa__config_get(r, "model_type"), *list = besa__config_get(r, "architectures");
    const besa__architecture *a = *out = besa__find_architecture(besa__json_string(r->json, type));
    char known[384];
    if (!a) return besa__config_refuse_model(r, type, besa__model_types(known, sizeof known));
    config->model_type = a->model_type;
    config->prefix = a->prefix;
    if (!list) return BESA_OK;
    const besa__json_value *name = besa__json_is(r->json, list, BESA__JSON_ARRAY) && besa__json_count(r->json, list) == 1
                                       ? besa__json_first(r->json, list) : NULL;
    if (besa__config_is(r, name, a->class_name) || (a->former_class && besa__config_is(r, name, a->former_class)))
        return BESA_OK;
    return besa__config_refuse(r, "architectures", name ? name : list, a->class_name);
}

/* Whether a description of how weights are stored says that they are stored as they are: in a dense format. */
static int besa__config_is_dense(const besa__config_reader *r, const besa__json_value *stored)
{
    static const char *const empty[] = { "config_groups", "kv_cache_scheme", "transform_config" };
    const besa__json *json = r->json;
    const besa__json_value *method = besa__json_get(json, stored, "quant_method"), *format = besa__json_get(json, stored, "format");
    const besa__json_value *sparse = besa__json_get(json, besa__json_get(json, stored, "sparsity_config"), "format");
    for (size_t i = 0; i < sizeof empty / sizeof *empty; i++) {
        const besa__json_value *value = besa__json_get(json, stored, empty[i]);
        int is_empty = besa__json_is(json, value, BESA__JSON_OBJECT) && !besa__json_first(json, value);
        if (value && !is_empty && !besa__json_is(json, value, BESA__JSON_NULL)) return 0;
    }
    if (method && !besa__config_is(r, method, "compressed-tensors")) return 0;
    if ((format && !besa__config_is(r, format, "dense")) || (sparse && !besa__config_is(r, sparse, "dense"))) return 0;
    return format || sparse;
}

/* Weights are not quantised, or otherwise compressed. */
static besa_result besa__config_stored(const besa__config_reader *r)
{
    static const char *const keys[] = { "quantization_config", "compression_config" };
    static const char *const kinds[] = { "quant_method", "format", "bits", "load_in_4bit", "load_in_8bit" };
    for (int i = 0; i < 2; i++) {
        const besa__json_value *stored = besa__config_get(r, keys[i]), *value;
        char said[512] = "", text[128];
        const char *slash = strrchr(r->path, '/');
        size_t n = 0, length = slash ? (size_t)(slash - r->path) : 0;
        if (!stored || besa__json_is(r->json, stored, BESA__JSON_FALSE) || besa__config_is_dense(r, stored)) continue;
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++)
            if ((value = besa__json_get(r->json, stored, kinds[k])) != NULL)
                n += (size_t)snprintf(said + n, sizeof said - n, "%s%s = %s", n ? ", " : "", kinds[k],
                                      besa__json_show(r->json, value, text, sizeof text));
        return besa__fail(r->error, BESA_ERROR_UNSUPPORTED, "%s: %s%s%s: weights that are quantised or compressed are not "
                          "supported: dequantise first, python3 examples/convert.py %.*s NEW", r->path, keys[i], n ? " has " : "",
                          said, (int)length, r->path);
    }
    return BESA_OK;
}

/* Settings that change the forward pass and are not implemented: only their neutral values pass. */
static besa_result besa__config_refuse_unknown(const besa__config_reader *r, const besa__architecture *a)
{
    static const struct { const char *key; unsigned traits; } absent[] = {
        { "num_local_experts", 0 }, { "num_experts", 0 },
        { "n_routed_experts", 0 }, { "attn_logit_softcapping", BESA__GEMMA }, { "final_logit_softcapping", BESA__GEMMA },
        { "no_rope_layers", BESA__NO_ROPE_LAYERS }, { "attention_chunk_size", 0 }, { "use_qk_norm", 0 }, { "use_mrope", 0 },
        { "is_encoder_decoder", 0 }, { "alibi", 0 }, { "use_bidirectional_attention", 0 }
    };
    const char *act = a->traits & BESA__GEMMA ? "hidden_activation" : "hidden_act";
    const besa__json_value *value = besa__config_get(r, act);
    double unused;
    if (a->traits & BESA__GEMMA && value && !besa__config_is(r, value, "gelu_pytorch_tanh"))
        return besa__config_refuse(r, act, value, "\"gelu_pytorch_tanh\"");
    if (!(a->traits & BESA__GEMMA) && value && !besa__config_is(r, value, "silu") && !besa__config_is(r, value, "swish"))
        return besa__config_refuse(r, act, value, "\"silu\"");
    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++) {
        value = besa__config_get(r, absent[i].key);
        if (value && !(a->traits & absent[i].traits) && !besa__json_is(r->json, value, BESA__JSON_FALSE))
            return besa__config_refuse(r, absent[i].key, value, "null, or no such key");
    }
    if (!(a->traits & BESA__LONGROPE)) BESA__TRY(besa__config_number(r, r->root, "", "partial_rotary_factor", 1, &unused));
    if (a->window != BESA__WINDOW_NONE) return BESA_OK;
    value = besa__config_get(r, "sliding_window");
    besa__json_number window = besa__json_number_of(r->json, value);
    char supported[64];
    snprintf(supported, sizeof supported, "null or 0, for %s", a->model_type);
    if (value && (!window.is_integer || window.integer))
        return besa__config_refuse(r, "sliding_window", value, supported);
    return BESA_OK;
}

static const char *const besa__rope_names[] = {"default", "linear", "llama3", "dynamic", "yarn", "longrope"}; /* by besa_rope_type */

/* The type of a rope that the architecture has; 0: it has no such type. */
static int besa__find_rope(const besa__config_reader *r, const besa__architecture *a, const besa__json_value *value,
                           besa_rope_type *type)
{
    for (unsigned i = 0; i < sizeof besa__rope_names / sizeof *besa__rope_names; i++)
        if ((a->ropes >> i & 1u) && besa__config_is(r, value, besa__rope_names[i])) {
            *type = (besa_rope_type)i;
            return 1;
        }
    return 0;
}

/* "a", "b": the types that the architecture has. */
static const char *besa__rope_types(const besa__architecture *a, char *text, size_t size)
{
    size_t n = 0;
    for (unsigned i = 0; i < sizeof besa__rope_names / sizeof *besa__rope_names && n < size; i++)
        if (a->ropes >> i & 1u)
            n += (size_t)snprintf(text + n, size - n, "%s\"%s\"", n ? ", " : "", besa__rope_names[i]);
    return text;
}

/* As besa__config_number, of a key that may be absent, null or 0: then *out is the fallback, which may be 0. */
static besa_result besa__config_choice(const besa__config_reader *r, const besa__json_value *object, const char *prefix,
                                       const char *key, double fallback, double *out)
{
    const besa__json_value *value = besa__json_get(r->json, object, key);
    *out = fallback;
    if (!value || besa__json_is(r->json, value, BESA__JSON_NULL)) return BESA_OK;
    if (besa__json_is(r->json, value, BESA__JSON_NUMBER) && besa__json_number_of(r->json, value).value == 0) return BESA_OK;
    return besa__config_number(r, object, prefix, key, 0, out);
}

/* The length of the longest sequences in training: by the root, or else by the object, or else the fallback (0: required). */
static besa_result besa__config_original(const besa__config_reader *r, const besa__json_value *object, const char *prefix,
                                         double fallback, double *out)
{
    static const char key[] = "original_max_position_embeddings";
    if (besa__config_get(r, key)) return besa__config_number(r, r->root, "", key, 0, out);
    return besa__config_number(r, object, prefix, key, fallback, out);
}

/* How much yarn scales cos and sin for a stretch by `factor`. */
static double besa__yarn_attention(double factor, double mscale)
{
    return factor > 1 ? 0.1 * mscale * log(factor) + 1 : 1;
}

/* How far yarn stretches, between which pairs, and how much it scales cos and sin. */
static besa_result besa__config_yarn(const besa__config_reader *r, const besa__json_value *object, const char *prefix,
                                     double positions, besa_rope *rope)
{
    const besa__json_value *truncate = besa__json_get(r->json, object, "truncate");
    double *original = &rope->original_max_position_embeddings, mscale, all_dim;
    BESA__TRY(besa__config_original(r, object, prefix, positions, original));
    BESA__TRY(besa__config_number(r, object, prefix, "factor", positions / *original, &rope->factor));
    BESA__TRY(besa__config_choice(r, object, prefix, "beta_fast", 32, &rope->beta_fast));
    BESA__TRY(besa__config_choice(r, object, prefix, "beta_slow", 1, &rope->beta_slow));
    BESA__TRY(besa__config_choice(r, object, prefix, "mscale", 0, &mscale));
    BESA__TRY(besa__config_choice(r, object, prefix, "mscale_all_dim", 0, &all_dim));
    double standard = besa__yarn_attention(rope->factor, 1);
    if (mscale > 0 && all_dim > 0)
        standard = besa__yarn_attention(rope->factor, mscale) / besa__yarn_attention(rope->factor, all_dim);
    BESA__TRY(besa__config_number(r, object, prefix, "attention_factor", standard, &rope->attention_factor));
    rope->no_truncate = truncate && !besa__json_is(r->json, truncate, BESA__JSON_TRUE);
    if (rope->no_truncate && !besa__json_is(r->json, truncate, BESA__JSON_FALSE) &&
        !besa__json_is(r->json, truncate, BESA__JSON_NULL))
        return besa__config_refuse(r, "truncate", truncate, "true, false");
    if (rope->theta > 1) return BESA_OK;
    return besa__config_refuse(r, "rope_theta", besa__config_get(r, "rope_theta"), "a number above 1 with a yarn rope");
}

/* What a rope of its type has beside theta. */
static besa_result besa__config_scaling(const besa__config_reader *r, const besa__json_value *object, const char *prefix,
                                        const besa_config *config, besa_rope *rope)
{
    double positions = (double)config->max_position_embeddings;
    if (rope->type == BESA_ROPE_DEFAULT) return BESA_OK;
    if (rope->type == BESA_ROPE_YARN) return besa__config_yarn(r, object, prefix, positions, rope);
    BESA__TRY(besa__config_number(r, object, prefix, "factor", 0, &rope->factor));
    if (rope->type == BESA_ROPE_LINEAR) return BESA_OK;
    if (rope->type == BESA_ROPE_DYNAMIC) {
        rope->original_max_position_embeddings = positions;
        if (config->block.head_dim > 2) return BESA_OK;
        return besa__config_refuse(r, "head_dim", besa__config_get(r, "head_dim"), "above 2 with a dynamic rope");
    }
    BESA__TRY(besa__config_number(r, object, prefix, "low_freq_factor", 0, &rope->low_freq_factor));
    BESA__TRY(besa__config_number(r, object, prefix, "high_freq_factor", 0, &rope->high_freq_factor));
    BESA__TRY(besa__config_original(r, object, prefix, 0, &rope->original_max_position_embeddings));
    if (rope->high_freq_factor > rope->low_freq_factor) return BESA_OK;
    return besa__config_refuse(r, "high_freq_factor", besa__json_get(r->json, object, "high_freq_factor"),
                               "a number above low_freq_factor");
}

/* The factors of all pairs, a list of as many numbers above 0. */
static besa_result besa__config_factors(const besa__config_reader *r, const besa__json_value *object, const char *prefix,
                                        const char *key, int64_t pairs, float *out)
{
    const besa__json_value *list = besa__json_get(r->json, object, key), *v = NULL;
    const besa__range *range = besa__find_range("factor");
    char name[128], supported[96];
    int64_t count = 0;
    snprintf(supported, sizeof supported, "a list of %lld numbers above 0, one for each turned pair", (long long)pairs);
    if (besa__json_is(r->json, list, BESA__JSON_ARRAY)) v = besa__json_first(r->json, list);
    for (; v && count < pairs && pairs <= BESA_MAX_ROPE_FACTORS; v = besa__json_next(r->json, list, v)) {
        double factor = besa__json_number_of(r->json, v).value;
        if (!besa__json_is(r->json, v, BESA__JSON_NUMBER) || !besa__in_range(range, factor)) {
            snprintf(name, sizeof name, "%s%s[%lld]", prefix, key, (long long)count);
            return besa__config_refuse(r, name, v, besa__range_text(range, supported, sizeof supported));
        }
        out[count++] = (float)factor;
    }
    snprintf(name, sizeof name, "%s%s", prefix, key);
    return v || count < pairs ? besa__config_refuse(r, name, list, supported) : BESA_OK;
}

/* How much of a head is turned, and of longrope its factors; by transformers cos and sin are scaled by
 * sqrt(1 + log(s) / log(original length)), s how much longer the model's sequences may be. */
static besa_result besa__config_longrope(const besa__config_reader *r, const besa__json_value *object, const char *prefix,
                                         const besa_config *config, besa_block_shape *shape)
{
    const besa__json_value *part = besa__json_get(r->json, object, "partial_rotary_factor");
    besa_rope *rope = &shape->rope;
    double factor, standard = 1;
    if (!part) part = besa__config_get(r, "partial_rotary_factor");
    if (part && !besa__json_is(r->json, part, BESA__JSON_NULL)) {
        double share = besa__json_number_of(r->json, part).value;
        if (besa__json_is(r->json, part, BESA__JSON_NUMBER) && share > 0 && share <= 1)
            shape->rotary_dim = (int64_t)((double)shape->head_dim * share);
        if (shape->rotary_dim < 2 || shape->rotary_dim % 2 != 0)
            return besa__config_refuse(r, "partial_rotary_factor", part, "a number up to 1 that turns an even part of head_dim");
    }
    if (rope->type != BESA_ROPE_LONGROPE) return BESA_OK;
    int64_t pairs = besa__rotary_dim(shape) / 2;
    BESA__TRY(besa__config_number(r, r->root, "", "original_max_position_embeddings", 4096,
                                  &rope->original_max_position_embeddings));
    factor = (double)config->max_position_embeddings / rope->original_max_position_embeddings;
    BESA__TRY(besa__config_number(r, object, prefix, "factor", factor, &factor));
    if (factor > 1) standard = sqrt(1 + log(factor) / log(rope->original_max_position_embeddings));
    BESA__TRY(besa__config_number(r, object, prefix, "attention_factor", standard, &rope->attention_factor));
    BESA__TRY(besa__config_factors(r, object, prefix, "short_factor", pairs, rope->short_factor));
    return besa__config_factors(r, object, prefix, "long_factor", pairs, rope->long_factor);
}

/* A rope by an object of config.json, shown as prefix; NULL: none. theta: where it has none. */
static besa_result besa__config_rope_of(const besa__config_reader *r, const besa__architecture *a,
                                        const besa__json_value *object, const char *prefix, double theta, besa_config *config,
                                        besa_rope *rope)
{
    const besa__json *json = r->json;
    double unused;
    BESA__TRY(besa__config_number(r, object, prefix, "rope_theta", theta, &rope->theta));
    if (object && !(a->traits & BESA__LONGROPE))
        BESA__TRY(besa__config_number(r, object, prefix, "partial_rotary_factor", 1, &unused));
    const besa__json_value *type = besa__json_get(json, object, "rope_type");
    if (!type) type = besa__json_get(json, object, "type");
    if (type && a->traits & BESA__MROPE && besa__config_is(r, type, "mrope")) type = NULL;
    if (type && a->traits & BESA__LONGROPE && (besa__config_is(r, type, "su") || besa__config_is(r, type, "yarn")))
        rope->type = BESA_ROPE_LONGROPE; /* its names in early configs */
    else if (type && !besa__find_rope(r, a, type, &rope->type)) {
        char name[96], known[128];
        snprintf(name, sizeof name, "%s%s", prefix, besa__json_key(json, type));
        return besa__config_refuse(r, name, type, besa__rope_types(a, known, sizeof known));
    }
    if (a->traits & BESA__LONGROPE) return besa__config_longrope(r, object, prefix, config, &config->block);
    return besa__config_scaling(r, object, prefix, config, rope);
}

/* A value that has the parameters of one rope: an object without objects, or null. */
static besa_result besa__config_one_rope(const besa__config_reader *r, const char *key, const besa__json_value *object)
{
    if (object && !besa__json_is(r->json, object, BESA__JSON_OBJECT) && !besa__json_is(r->json, object, BESA__JSON_NULL))
        return besa__config_refuse(r, key, object, "an object, or null");
    const besa__json_value *v = besa__json_is(r->json, object, BESA__JSON_OBJECT) ? besa__json_first(r->json, object) : NULL;
    for (; v; v = besa__json_next(r->json, object, v))
        if (besa__json_is(r->json, v, BESA__JSON_OBJECT))
            return besa__config_refuse(r, besa__json_key(r->json, v), v, "one set of rope parameters for all layers");
    return BESA_OK;
}

/* Where layers that slide have a rope of their own: rope_parameters has an object for either kind of layers, and a kind
 * without one has the family's rope. The older rope_theta and rope_scaling are of the layers that do not slide. */
static besa_result besa__config_two_ropes(const besa__config_reader *r, const besa__architecture *a, besa_config *config)
{
    static const struct { const char *key, *path, *theta; } kinds[] = {
        { "sliding_attention", "rope_parameters.sliding_attention", "rope_local_base_freq" },
        { "full_attention", "rope_parameters.full_attention", "rope_theta" } };
    const besa__json_value *scaling = besa__config_get(r, "rope_scaling"), *both = besa__config_get(r, "rope_parameters");
    if (both && !besa__json_is(r->json, both, BESA__JSON_OBJECT))
        return besa__config_refuse(r, "rope_parameters", both, "an object, or null");
    BESA__TRY(besa__config_one_rope(r, "rope_scaling", scaling));
    if (scaling && !besa__json_first(r->json, scaling)) scaling = NULL;
    if (both && besa__json_first(r->json, both) && !besa__json_get(r->json, both, kinds[0].key) &&
        !besa__json_get(r->json, both, kinds[1].key))
        return besa__config_refuse(r, "rope_parameters", both, "an object with full_attention and sliding_attention, "
                                   "which have the parameters (transformers looks at no others)");
    for (int i = 0; i < 2; i++) {
        const besa__json_value *object = besa__json_get(r->json, both, kinds[i].key);
        double theta;
        char prefix[64];
        BESA__TRY(besa__config_one_rope(r, kinds[i].path, object));
        BESA__TRY(besa__config_number(r, r->root, "", kinds[i].theta, i ? a->rope_theta : 10000, &theta));
        if (!besa__json_is(r->json, object, BESA__JSON_OBJECT)) object = NULL;
        if (i && scaling && object)
            return besa__config_refuse(r, "rope_scaling", scaling, "null beside rope_parameters.full_attention");
        snprintf(prefix, sizeof prefix, "%s.", i && scaling ? "rope_scaling" : kinds[i].path);
        BESA__TRY(besa__config_rope_of(r, a, i && scaling ? scaling : object, prefix, theta, config,
                                       i ? &config->block.rope : &config->local_rope));
    }
    return BESA_OK;
}

/* rope_parameters, or the older rope_theta and rope_scaling. */
static besa_result besa__config_rope(const besa__config_reader *r, const besa__architecture *a, besa_config *config)
{
    const besa__json_value *object = besa__config_get(r, "rope_scaling");
    const char *key = "rope_scaling";
    char prefix[64];
    double theta;
    config->has_local_rope = (a->traits & BESA__LOCAL_ROPE) != 0;
    if (config->has_local_rope) return besa__config_two_ropes(r, a, config);
    if (!object || (besa__json_is(r->json, object, BESA__JSON_OBJECT) && !besa__json_first(r->json, object))) {
        key = "rope_parameters";
        object = besa__config_get(r, key);
    }
    BESA__TRY(besa__config_one_rope(r, key, object));
    BESA__TRY(besa__config_number(r, r->root, "", "rope_theta", a->rope_theta, &theta));
    snprintf(prefix, sizeof prefix, "%s.", key);
    return besa__config_rope_of(r, a, object, prefix, theta, config, &config->block.rope);
}

/* Which layers do without rope. */
static besa_result besa__config_no_rope(const besa__config_reader *r, besa_config *config, const besa__architecture *a)
{
    const besa__json_value *list = besa__config_get(r, "no_rope_layers");
    int64_t interval, layers = config->num_hidden_layers, i = 0;
    if (!(a->traits & BESA__NO_ROPE_LAYERS)) return BESA_OK;
    BESA__TRY(besa__config_integer(r, "no_rope_layer_interval", a->pattern, &interval));
    if (list && (!besa__json_is(r->json, list, BESA__JSON_ARRAY) || besa__json_count(r->json, list) < (uint64_t)layers))
        return besa__config_refuse(r, "no_rope_layers", list, "a list of num_hidden_layers numbers, 0 for a layer without rope");
    for (; !list && i < layers; i++) config->no_rope[i] = (i + 1) % interval == 0;
    const besa__json_value *v = list ? besa__json_first(r->json, list) : NULL;
    for (; v && i < layers; v = besa__json_next(r->json, list, v), i++) {
        besa__json_number number = besa__json_number_of(r->json, v);
        if (!number.is_integer || number.integer < 0 || number.integer > 1)
            return besa__config_refuse(r, "no_rope_layers", v, "0, 1");
        config->no_rope[i] = !number.integer;
    }
    return BESA_OK;
}

/* A number that is 0, as if there were none, where the key is there and null. */
static besa_result besa__config_cap(const besa__config_reader *r, const char *key, double fallback, double *out)
{
    *out = 0;
    if (besa__json_get(r->json, r->root, key) ? !besa__config_get(r, key) : fallback <= 0) return BESA_OK;
    return besa__config_number(r, r->root, "", key, fallback, out);
}

/* What else a family has. */
static besa_result besa__config_traits(const besa__config_reader *r, besa_config *config, const besa__architecture *a)
{
    besa_block_shape *b = &config->block;
    double scale;
    b->norms = a->norms;
    config->qk_norm = a->qk_norm != 0;
    b->qk_norm_whole = a->qk_norm == BESA__QK_NORM_WHOLE;
    BESA__TRY(besa__config_no_rope(r, config, a));
    if (a->traits & BESA__MULTIPLIERS) {
        BESA__TRY(besa__config_number(r, r->root, "", "embedding_multiplier", 1, &config->embedding_scale));
        BESA__TRY(besa__config_number(r, r->root, "", "attention_multiplier", 1, &b->attention_scale));
        BESA__TRY(besa__config_number(r, r->root, "", "residual_multiplier", 1, &b->residual_scale));
        BESA__TRY(besa__config_number(r, r->root, "", "logits_scaling", 1, &scale));
        config->logits_scale = 1 / scale;
    }
    if (!(a->traits & BESA__GEMMA)) return BESA_OK;
    b->gelu = config->unit_norms = 1;
    config->embedding_scale = sqrt((double)b->hidden_size);
    BESA__TRY(besa__config_number(r, r->root, "", "query_pre_attn_scalar", 256, &scale));
    b->attention_scale = 1 / sqrt(scale);
    if (a->traits & BESA__CAPPED) BESA__TRY(besa__config_cap(r, "attn_logit_softcapping", 50, &b->attention_softcap));
    if (config->is_part) return BESA_OK; /* Gemma3ForConditionalGeneration caps no logits */
    return besa__config_cap(r, "final_logit_softcapping", a->traits & BESA__CAPPED ? 30 : 0, &config->logits_softcap);
}

/* Which layers slide. */
static besa_result besa__config_windows(const besa__config_reader *r, besa_config *config, const besa__architecture *a)
{
    const besa__json_value *types = besa__config_get(r, "layer_types");
    int64_t first = 0, window = 0, pattern = a->window == BESA__WINDOW_PATTERN ? a->pattern : 0;
    int sliding = a->window == BESA__WINDOW_ALL || a->window == BESA__WINDOW_PATTERN;
    int given = besa__json_get(r->json, r->root, "sliding_window") != NULL;
    if (a->window == BESA__WINDOW_CHOSEN || a->window == BESA__WINDOW_UNTURNED)
        BESA__TRY(besa__config_bool(r, "use_sliding_window", &sliding));
    if (a->window == BESA__WINDOW_UNTURNED && types) sliding = 1; /* the list alone decides */
    if (a->window == BESA__WINDOW_CHOSEN)
        BESA__TRY(besa__config_integer(r, "max_window_layers", a->traits & BESA__MROPE ? 80 : 28, &first));
    if (a->window == BESA__WINDOW_PATTERN && a->traits & BESA__LOCAL_ROPE)
        BESA__TRY(besa__config_integer(r, "sliding_window_pattern", a->pattern, &pattern));
    if (sliding && (besa__config_get(r, "sliding_window") || (!given && a->sliding_window)))
        BESA__TRY(besa__config_integer(r, "sliding_window", a->sliding_window, &window));
    for (int64_t i = 0; i < config->num_hidden_layers; i++) {
        int full = i < first || (pattern && (i + 1) % pattern == 0) || (a->window == BESA__WINDOW_UNTURNED && !config->no_rope[i]);
        config->window[i] = (uint8_t)(window && !full);
    }
    if (types && (!besa__json_is(r->json, types, BESA__JSON_ARRAY) ||
                  besa__json_count(r->json, types) != (uint64_t)config->num_hidden_layers))
        return besa__config_refuse(r, "layer_types", types, "a list of num_hidden_layers strings");
    int64_t i = 0;
    const besa__json_value *v = types ? besa__json_first(r->json, types) : NULL;
    for (; v; v = besa__json_next(r->json, types, v), i++) {
        char name[40];
        int slides = besa__config_is(r, v, "sliding_attention"), full = besa__config_is(r, v, "full_attention");
        snprintf(name, sizeof name, "layer_types[%lld]", (long long)i);
        if (!slides && !full) return besa__config_refuse(r, name, v, "\"full_attention\", \"sliding_attention\"");
        if (slides && !window)
            return besa__config_refuse(r, name, v, "\"full_attention\", as no sliding_window is in use");
        if (full && a->window == BESA__WINDOW_ALL && window)
            return besa__config_refuse(r, name, v, "\"sliding_attention\", as sliding_window is set and of all layers");
        config->window[i] = (uint8_t)slides;
    }
    for (i = 0; i < config->num_hidden_layers; i++)
        if (config->window[i]) config->sliding_window = window;
    return BESA_OK;
}

/* Sizes of the model and of its attention. */
static besa_result besa__config_sizes(const besa__config_reader *r, besa_config *config, const besa__architecture *a)
{
    besa_block_shape *b = &config->block;
    const int64_t most = 1 << 24;
    int heads_given = besa__json_get(r->json, r->root, "num_key_value_heads") != NULL;
    int dim_given = besa__json_get(r->json, r->root, "head_dim") != NULL;
    BESA__TRY(besa__config_integer(r, "vocab_size", config->vocab_size, &config->vocab_size));
    BESA__TRY(besa__config_integer(r, "hidden_size", 0, &b->hidden_size));
    BESA__TRY(besa__config_integer(r, "intermediate_size", 0, &b->intermediate_size));
    BESA__TRY(besa__config_integer(r, "num_hidden_layers", 0, &config->num_hidden_layers));
    BESA__TRY(besa__config_integer(r, "max_position_embeddings", a->max_position_embeddings,
                                   &config->max_position_embeddings));
    BESA__TRY(besa__config_integer(r, "num_attention_heads", b->num_attention_heads, &b->num_attention_heads));
    int64_t groups = heads_given || !a->num_key_value_heads ? b->num_attention_heads : a->num_key_value_heads;
    BESA__TRY(besa__config_integer(r, "num_key_value_heads", groups, &b->num_key_value_heads));
    if (b->num_key_value_heads > b->num_attention_heads || b->num_attention_heads % b->num_key_value_heads)
        return besa__fail(r->error, BESA_ERROR_UNSUPPORTED, "%s: num_attention_heads = %lld is no multiple of "
                          "num_key_value_heads = %lld", r->path, (long long)b->num_attention_heads,
                          (long long)b->num_key_value_heads);
    int64_t derived = b->hidden_size / b->num_attention_heads;
    if (a->head_dim && !dim_given) derived = a->head_dim;
    else if (!besa__config_get(r, "head_dim") && b->hidden_size % b->num_attention_heads)
        return besa__fail(r->error, BESA_ERROR_UNSUPPORTED,
                          "%s: hidden_size = %lld is no multiple of num_attention_heads "
                          "= %lld, and head_dim is not given", r->path, (long long)b->hidden_size,
                          (long long)b->num_attention_heads);
    BESA__TRY(besa__config_integer(r, "head_dim", derived, &b->head_dim));
    if (b->head_dim % 2 || b->head_dim * b->num_attention_heads > most)
        return besa__fail(r->error, BESA_ERROR_UNSUPPORTED,
                          "%s: head_dim = %lld with %lld heads; supported: an even number, "
                          "heads * head_dim up to %lld", r->path, (long long)b->head_dim,
                          (long long)b->num_attention_heads, (long long)most);
    return BESA_OK;
}

/* Which layers have a bias. */
static besa_result besa__config_biases(const besa__config_reader *r, const besa__architecture *a, int bias[BESA_LAYERS])
{
    for (int i = 0; i < BESA_LAYERS; i++) {
        int rule = a->bias[besa__layers[i].group], by_key;
        const char *key = besa__layers[i].group == BESA__GROUP_MLP ? "mlp_bias" : "attention_bias";
        char supported[32];
        BESA__TRY(besa__config_bool(r, key, &by_key));
        snprintf(supported, sizeof supported, "false, for %s", a->model_type);
        if (rule == BESA__BIAS_REFUSED && by_key)
            return besa__config_refuse(r, key, besa__config_get(r, key), supported);
        bias[i] = rule == BESA__BIAS_ALWAYS || (rule == BESA__BIAS_BY_KEY && by_key);
    }
    return BESA_OK;
}

/* Where the language model's settings are: at the root, or in text_config of a known wrapper. */
static besa_result besa__config_part(const besa__config_reader *r, besa_config *config, besa__config_reader *part, int *tied)
{
    const besa__json_value *type = besa__config_get(r, "model_type"), *text = besa__config_get(r, "text_config");
    *part = *r;
    for (int i = 0; i < BESA__WRAPPERS && besa__json_is(r->json, text, BESA__JSON_OBJECT); i++) {
        const besa__json_value *of_text = besa__json_get(r->json, text, "model_type");
        char supported[64];
        if (!besa__config_is(r, type, besa__wrappers[i].model_type)) continue;
        snprintf(supported, sizeof supported, "\"%s\", for %s", besa__wrappers[i].part, besa__wrappers[i].model_type);
        if (!besa__config_is(r, of_text, besa__wrappers[i].part))
            return besa__config_refuse(r, "text_config.model_type", of_text, supported);
        part->root = text;
        config->is_part = 1;
        config->vocab_size = besa__wrappers[i].vocab_size;
        config->block.num_attention_heads = besa__wrappers[i].num_attention_heads;
        *tied = besa__wrappers[i].tied;
    }
    return BESA_OK;
}

/* Whether the embedding is the head; fallback: where config.json does not say. Of a wrapper the root says it, as transformers
 * 5 reads it; where by the root it is not by default, true in text_config says it too. */
static besa_result besa__config_tied(const besa__config_reader *whole, const besa__config_reader *text, int fallback,
                                     besa_config *config)
{
    static const char key[] = "tie_word_embeddings";
    int own, *tied = &config->tie_word_embeddings;
    BESA__TRY(besa__config_bool(whole, key, tied));
    if (!besa__config_get(whole, key)) *tied = fallback;
    if (!config->is_part) return BESA_OK;
    BESA__TRY(besa__config_bool(text, key, &own));
    config->tie_contradicted = besa__config_get(whole, key) && besa__config_get(text, key) && own != *tied;
    if (!fallback && own) *tied = 1;
    return BESA_OK;
}

static besa_result besa__config_read(const besa__config_reader *whole, besa_config *config)
{
    const besa__architecture *a;
    if (!besa__json_is(whole->json, whole->root, BESA__JSON_OBJECT))
        return besa__fail(whole->error, BESA_ERROR_JSON, "%s: no JSON object", whole->path);
    besa__config_reader part, *r = &part;
    int tied = 0;
    BESA__TRY(besa__config_part(whole, config, &part, &tied));
    BESA__TRY(besa__config_architecture(r, config, &a));
    BESA__TRY(besa__config_stored(whole));
    BESA__TRY(besa__config_refuse_unknown(r, a));
    BESA__TRY(besa__config_sizes(r, config, a));
    BESA__TRY(besa__config_rope(r, a, config));
    BESA__TRY(besa__config_traits(r, config, a));
    BESA__TRY(besa__config_windows(r, config, a));
    BESA__TRY(besa__config_number(r, r->root, "", "rms_norm_eps", a->rms_norm_eps, &config->block.rms_norm_eps));
    BESA__TRY(besa__config_tied(whole, r, config->is_part ? tied : (a->traits & BESA__TIED) != 0, config));
    return besa__config_biases(r, a, config->bias);
}

static besa_result besa__config_load(besa_config *config, besa__kept *kept, const char *directory, besa_error *error)
{
    char *path;
    besa__json json;
    memset(config, 0, sizeof *config);
    BESA__TRY(besa__join(&path, directory, "config.json", error));
    besa_result result = besa__json_load(&json, kept, path, error);
    besa__config_reader reader = { &json, json.values, path, error };
    if (result == BESA_OK) result = besa__config_read(&reader, config);
    besa__json_free(&json);
    BESA_FREE(path);
    return result;
}

/* The error of a tensor that is not there. */
static besa_result besa__need_missing(const besa_checkpoint *checkpoint, const char *name, besa_error *error)
{
    char quantized[128];
    BESA__TRY(besa__check_missing(checkpoint, name, error));
    snprintf(quantized, sizeof quantized, "%.*s.qweight", (int)(strrchr(name, '.') - name), name);
    if (besa_checkpoint_find(checkpoint, quantized))
        return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s: its layers are quantised (%s): dequantise first, python3 "
                          "examples/convert.py %s NEW", checkpoint->directory, quantized, checkpoint->directory);
    return besa__fail(error, BESA_ERROR_TENSOR, "%s: tensor %s is missing; config.json asks for it", checkpoint->directory, name);
}

/* Find a tensor and check it: (rows, columns), or (rows) where columns is 0. */
static besa_result besa__need(const besa_tensor **out, const besa_checkpoint *checkpoint, const char *name,
                              int64_t rows, int64_t columns, besa_error *error)
{
    const besa_tensor *tensor = *out = besa_checkpoint_find(checkpoint, name);
    char found[96] = "";
    size_t n = 0;
    if (!tensor) return besa__need_missing(checkpoint, name, error);
    if (tensor->ndim == (columns ? 2 : 1) && tensor->shape[0] == rows && (!columns || tensor->shape[1] == columns)) {
        if (tensor->supported) return BESA_OK;
        return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s: tensor %s has dtype %s; supported: F32, F16, BF16: convert it, "
                          "python3 examples/convert.py %s NEW", checkpoint->directory, name, tensor->dtype_name,
                          checkpoint->directory);
    }
    for (int i = 0; i < tensor->ndim && n < sizeof found - 24; i++)
        n += (size_t)snprintf(found + n, sizeof found - n, "%s%lld", i ? ", " : "", (long long)tensor->shape[i]);
    return besa__fail(error, BESA_ERROR_TENSOR,
                      columns ? "%s: tensor %s has shape [%s], config.json asks for [%lld, %lld]"
                                                        : "%s: tensor %s has shape [%s], config.json asks for [%lld]",
                      checkpoint->directory, name, found, (long long)rows, (long long)columns);
}

/* The same for a tensor of a block that is only there if the config says so. */
static besa_result besa__need_if(int wanted, const besa_tensor **out, const besa_checkpoint *checkpoint,
                                 const char *name, int64_t rows, besa_error *error)
{
    *out = NULL;
    if (wanted) return besa__need(out, checkpoint, name, rows, 0, error);
    if (!besa_checkpoint_find(checkpoint, name)) return BESA_OK;
    return besa__fail(error, BESA_ERROR_TENSOR, "%s: tensor %s is there, but by config.json a %s has none",
                      checkpoint->directory, name, checkpoint->config.model_type);
}

/* The tensors of one block, each checked against the config. */
static besa_result besa__block_bind(besa__block_tensors *tensors, const besa_checkpoint *checkpoint, int64_t block,
                                    besa_error *error)
{
    const besa_block_shape *s = &checkpoint->config.block;
    char name[96];
    int64_t rows, columns;
    memset(tensors, 0, sizeof *tensors);
    for (int i = 0; i < BESA_LAYERS; i++) {
        besa_block_layer(s, i, &rows, &columns);
        besa__layer_tensor_name(name, sizeof name, &checkpoint->config, block, i, "weight");
        BESA__TRY(besa__need(&tensors->weight[i], checkpoint, name, rows, columns, error));
        besa__layer_tensor_name(name, sizeof name, &checkpoint->config, block, i, "bias");
        BESA__TRY(besa__need_if(checkpoint->config.bias[i], &tensors->vector[i], checkpoint, name, rows, error));
    }
    for (int i = BESA_LAYERS; i < BESA_VECTORS; i++) {
        int wanted = (i != BESA_Q_NORM && i != BESA_K_NORM) || checkpoint->config.qk_norm;
        const char *path = besa__norm_path(s, i);
        if (!path) continue;
        besa__tensor_name(name, sizeof name, &checkpoint->config, block, path);
        size_t length = strlen(name);
        snprintf(name + length, sizeof name - length, ".weight");
        BESA__TRY(besa__need_if(wanted, &tensors->vector[i], checkpoint, name, besa__vector_count(s, i), error));
    }
    return BESA_OK;
}

BESA_API const besa_tensor *besa_checkpoint_layer(const besa_checkpoint *checkpoint, int64_t block, int layer)
{
    char name[96];
    if (block < 0 || block >= checkpoint->config.num_hidden_layers || layer < 0 || layer >= BESA_LAYERS) return NULL;
    besa__layer_tensor_name(name, sizeof name, &checkpoint->config, block, layer, "weight");
    return besa_checkpoint_find(checkpoint, name);
}

/* No tensor may be of a block beyond those that config.json counts. */
static besa_result besa__check_block_numbers(const besa_checkpoint *checkpoint, besa_error *error)
{
    const besa_config *c = &checkpoint->config;
    char layers[64];
    int length = snprintf(layers, sizeof layers, "%slayers.", c->prefix);
    for (int64_t i = 0; i < checkpoint->num_tensors; i++) {
        const char *name = checkpoint->tensors[i].name, *digits = name + length;
        if (strncmp(name, layers, (size_t)length) || *digits < '0' || *digits > '9') continue;
        if (strtoll(digits, NULL, 10) >= c->num_hidden_layers)
            return besa__fail(error, BESA_ERROR_TENSOR, "%s: tensor %.200s is there, but config.json says num_hidden_layers "
                              "= %lld", checkpoint->directory, name, (long long)c->num_hidden_layers);
    }
    return BESA_OK;
}

/* Names without the prefix, as models saved without their head have them. */
static void besa__find_prefix(besa_checkpoint *checkpoint)
{
    static const char *const others[] = { "", "language_model.model.", "model.language_model." };
    besa_config *c = &checkpoint->config;
    char name[96];
    snprintf(name, sizeof name, "%snorm.weight", c->prefix);
    for (int i = 0; i < (c->is_part ? 3 : 1) && !besa_checkpoint_find(checkpoint, name); i++) {
        snprintf(name, sizeof name, "%snorm.weight", others[i]);
        if (besa_checkpoint_find(checkpoint, name)) c->prefix = others[i];
    }
    c->head = besa__head_name;
    if (c->is_part && besa_checkpoint_find(checkpoint, "language_model.lm_head.weight"))
        c->head = "language_model.lm_head.weight";
}

/* Tensors that hold the rows of several layers, one layer after another. */
static const struct { const char *path; int first, count; } besa__fused[] = {
    {"self_attn.qkv_proj", BESA_Q, 3}, {"mlp.gate_up_proj", BESA_GATE, 2}};

/* Which of besa__fused a tensor is of; -1: of none. *block: its block. */
static int besa__fused_row(const besa_checkpoint *checkpoint, const besa_tensor *tensor, int64_t *block)
{
    char name[96];
    const char *layers = strstr(tensor->name, "layers.");
    if (!layers) return -1;
    *block = strtoll(layers + strlen("layers."), NULL, 10);
    for (int i = 0; i < (int)(sizeof besa__fused / sizeof *besa__fused); i++) {
        besa__tensor_name(name, sizeof name, &checkpoint->config, *block, besa__fused[i].path);
        size_t length = strlen(name);
        if (!strncmp(tensor->name, name, length) && !strcmp(tensor->name + length, ".weight")) return i;
    }
    return -1;
}

/* The parts of a tensor to *out, which moves on, with names at *names. */
static besa_result besa__split_tensor(const besa_checkpoint *checkpoint, const besa_tensor *whole, int row, int64_t block,
                                      besa_tensor **out, char **names, besa_error *error)
{
    int64_t rows = 0, part, columns;
    for (int i = 0; i < besa__fused[row].count; i++) {
        besa_block_layer(&checkpoint->config.block, besa__fused[row].first + i, &part, &columns);
        rows += part;
    }
    if (whole->ndim != 2 || whole->shape[0] != rows || whole->shape[1] != columns)
        return besa__fail(error, BESA_ERROR_TENSOR, "%s: tensor %.200s is not of the shape [%lld, %lld] that config.json asks for",
                          checkpoint->directory, whole->name, (long long)rows, (long long)columns);
    size_t at = 0;
    for (int i = 0; i < besa__fused[row].count; i++, (*out)++) {
        besa_block_layer(&checkpoint->config.block, besa__fused[row].first + i, &part, &columns);
        **out = *whole;
        (*out)->name = *names;
        (*out)->shape[0] = part;
        (*out)->bytes = whole->bytes / (size_t)rows * (size_t)part;
        (*out)->data = (const unsigned char *)whole->data + at;
        (*out)->offset += at;
        at += (*out)->bytes;
        besa__layer_tensor_name(*names, 96, &checkpoint->config, block, besa__fused[row].first + i, "weight");
        *names += strlen(*names) + 1;
    }
    return BESA_OK;
}

/* Where a family's files hold several layers as one tensor: the tensor table has the layers, each some of its rows. */
static besa_result besa__split_fused(besa_checkpoint *checkpoint, besa_error *error)
{
    void *memory;
    int64_t block;
    besa_result result = BESA_OK;
    if (!(besa__find_architecture(checkpoint->config.model_type)->traits & BESA__FUSED)) return BESA_OK;
    int64_t most = besa__sum(checkpoint->num_tensors, 3 * checkpoint->config.num_hidden_layers);
    uint64_t bytes = besa__bytes(checkpoint->config.num_hidden_layers, BESA_LAYERS * 96);
    BESA__TRY(besa__malloc(&memory, bytes, "the parts' names", error));
    char *names = checkpoint->part_names = (char *)memory;
    BESA__TRY(besa__malloc(&memory, besa__bytes(most, sizeof(besa_tensor)), "the tensor table", error));
    besa_tensor *tensors = (besa_tensor *)memory, *out = tensors;
    for (int64_t i = 0; i < checkpoint->num_tensors && result == BESA_OK; i++) {
        const besa_tensor *tensor = &checkpoint->tensors[i];
        int row = besa__fused_row(checkpoint, tensor, &block);
        if (row < 0 || block < 0 || block >= checkpoint->config.num_hidden_layers) *out++ = *tensor;
        else result = besa__split_tensor(checkpoint, tensor, row, block, &out, &names, error);
    }
    BESA_FREE(checkpoint->tensors);
    BESA_FREE(checkpoint->sorted);
    checkpoint->sorted = NULL;
    checkpoint->tensors = tensors;
    checkpoint->num_tensors = out - tensors;
    return result == BESA_OK ? besa__sort_tensors(checkpoint, error) : result;
}

/* Embedding, norm and head, and a check of every tensor of every block. */
static besa_result besa__model_bind(besa__model *model, const besa_checkpoint *checkpoint, besa_error *error)
{
    const besa_config *c = &checkpoint->config;
    char name[96];
    besa__block_tensors block;
    memset(model, 0, sizeof *model);
    snprintf(name, sizeof name, "%sembed_tokens.weight", c->prefix);
    if (c->tie_word_embeddings && !besa_checkpoint_find(checkpoint, name) && besa_checkpoint_find(checkpoint, c->head))
        snprintf(name, sizeof name, "%s", c->head); /* the two are one, under either name */
    BESA__TRY(besa__need(&model->embedding, checkpoint, name, c->vocab_size, c->block.hidden_size, error));
    snprintf(name, sizeof name, "%snorm.weight", c->prefix);
    BESA__TRY(besa__need(&model->norm, checkpoint, name, c->block.hidden_size, 0, error));
    model->head = model->embedding;
    if (!c->tie_word_embeddings && !*c->prefix && !besa_checkpoint_find(checkpoint, c->head)) model->head = NULL;
    else if (!c->tie_word_embeddings)
        BESA__TRY(besa__need(&model->head, checkpoint, c->head, c->vocab_size, c->block.hidden_size, error));
    for (int64_t i = 0; i < c->num_hidden_layers; i++) {
        BESA__TRY(besa__block_bind(&block, checkpoint, i, error));
        if (!i) model->dtype = block.weight[0]->dtype;
        for (int j = 0; j < BESA_LAYERS; j++)
            if (block.weight[j]->dtype != model->dtype)
                return besa__fail(error, BESA_ERROR_UNSUPPORTED,
                                  "%s: tensor %s has dtype %s, others of the layers another; "
                                  "supported: one dtype for all of them", checkpoint->directory, block.weight[j]->name,
                                  block.weight[j]->dtype_name);
    }
    return besa__check_block_numbers(checkpoint, error);
}

/* Whether two tensors of one shape hold the same bytes of one type; their pages are given back. */
static int besa__same_tensor(const besa_checkpoint *checkpoint, const besa_tensor *a, const besa_tensor *b)
{
    const size_t chunk = (size_t)8 << 20;
    int same = a->dtype == b->dtype;
    for (size_t at = 0; at < a->bytes && same; at += chunk) {
        size_t part = a->bytes - at < chunk ? a->bytes - at : chunk;
        same = !memcmp((const unsigned char *)a->data + at, (const unsigned char *)b->data + at, part);
        besa__release_range(checkpoint->shards + a->file, a->offset + at, part);
        besa__release_range(checkpoint->shards + b->file, b->offset + at, part);
    }
    return same;
}

/* A head that the config ties to the embedding and that the file holds all the same: where the two differ, transformers 5
 * takes the config for wrong and uses the head. */
static besa_result besa__check_tied_head(besa_checkpoint *checkpoint, const besa_tensor *embedding, besa_error *error)
{
    besa_config *c = &checkpoint->config;
    const besa_tensor *head;
    if (!c->tie_word_embeddings || !besa_checkpoint_find(checkpoint, c->head)) return BESA_OK;
    BESA__TRY(besa__need(&head, checkpoint, c->head, c->vocab_size, c->block.hidden_size, error));
    if (besa__same_tensor(checkpoint, head, embedding)) return BESA_OK;
    c->tie_word_embeddings = 0;
    besa__checkpoint_note(checkpoint, "note: by config.json tie_word_embeddings is true, but %s differs from %s: the head "
                          "is used, as transformers 5 does (earlier versions use the embedding)",
                          head->name, embedding->name);
    return BESA_OK;
}

/* Scales of a weight, or an adapter's factors, as tensors beside a prunable weight: config.json knows of none. */
static void besa__check_companions(besa_checkpoint *checkpoint)
{
    static const char *const kinds[] = { "_proj.weight_scale", "_proj.lora_A", "_proj.lora_B" };
    const char *first = NULL;
    char layers[64];
    int length = snprintf(layers, sizeof layers, "%slayers.", checkpoint->config.prefix);
    int64_t count = 0;
    for (int64_t i = 0; i < checkpoint->num_tensors; i++) {
        const char *name = checkpoint->tensors[i].name;
        int found = 0;
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) found |= strstr(name, kinds[k]) != NULL;
        if (strncmp(name, layers, (size_t)length) || !found) continue;
        if (!count++) first = name;
    }
    if (count)
        besa__checkpoint_note(checkpoint, "note: %.200s lies beside a layer's weight, %lld such tensor%s in all: not "
                              "applied; convert or merge the model first if they belong to it",
                              first, (long long)count, count > 1 ? "s" : "");
}

/* An adapter beside the model belongs to other weights, or was never merged: that cannot be told. */
static besa_result besa__check_adapter(besa_checkpoint *checkpoint, besa_error *error)
{
    static const char *const names[] = { "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        struct stat st;
        char *path;
        BESA__TRY(besa__join(&path, checkpoint->directory, names[i], error));
        int missing = lstat(path, &st);
        BESA_FREE(path);
        if (missing) continue;
        besa__checkpoint_note(checkpoint, "note: an adapter lies beside the model (%s): it is not applied, and not part "
                              "of an output; merge it into the model (peft: merge_and_unload) if it belongs to it", names[i]);
        return BESA_OK;
    }
    return BESA_OK;
}

/* What is not there may be the name of a model on the Hub: owner/model. */
static besa_result besa__check_absent(const char *directory, int reason, besa_error *error)
{
    const char *slash = strchr(directory, '/');
    int is_name = slash && slash > directory && slash[1] && !strchr(slash + 1, '/') && directory[0] != '.' && directory[0] != '~';
    if (is_name && reason == ENOENT)
        return besa__fail(error, BESA_ERROR_NOT_FOUND, "%s: no such directory: a model of the Hub of that name is downloaded by hf "
                          "download %s --local-dir %s", directory, directory, slash + 1);
    return besa__fail(error, reason == ENOENT || reason == ENOTDIR ? BESA_ERROR_NOT_FOUND : BESA_ERROR_READ, "%s: %s", directory,
                      strerror(reason));
}

/* A file in the place of a directory. */
static besa_result besa__check_file(const char *path, besa_error *error)
{
    size_t n = strlen(path), m = strlen(".safetensors");
    unsigned char *base;
    besa_error unread;
    int is_gguf = 0;
    if (besa__map_file(&base, &n, path, &unread) == BESA_OK) {
        is_gguf = n >= 4 && !memcmp(base, "GGUF", 4);
        besa__unmap(base, n);
    }
    if (is_gguf)
        return besa__fail(error, BESA_ERROR_NOT_FOUND, "%s: a GGUF file, not a directory: convert it, python3 examples/convert.py "
                          "%s NEW", path, path);
    n = strlen(path);
    if (n > m && !strcmp(path + n - m, ".safetensors"))
        return besa__fail(error, BESA_ERROR_NOT_FOUND, "%s: not a directory: name the one that it lies in, with config.json", path);
    return besa__fail(error, BESA_ERROR_NOT_FOUND, "%s: not a directory", path);
}

/* A directory without config.json may be one of the Hub's cache, whose snapshots are models, or hold other formats. */
static besa_result besa__check_cache(const char *directory, besa_error *error)
{
    char *config = NULL, *snapshots = NULL, *head = NULL, name[256];
    besa__kept kept;
    struct stat st;
    memset(&kept, 0, sizeof kept);
    besa_result result = besa__join(&config, directory, "config.json", error);
    if (result == BESA_OK) result = besa__join(&snapshots, directory, "snapshots", error);
    if (result == BESA_OK) result = besa__join(&head, directory, "refs/main", error);
    if (result == BESA_OK && lstat(config, &st)) {
        besa__list_name(name, snapshots, "", "");
        if (name[0] && besa__keep_file(&kept, head, error) == BESA_OK && kept.size > 0) {
            size_t n = kept.size < sizeof name ? kept.size : sizeof name - 1;
            snprintf(name, sizeof name, "%.*s", (int)n, (const char *)kept.bytes);
            name[strcspn(name, "\r\n ")] = 0;
        }
        if (name[0])
            result = besa__fail(error, BESA_ERROR_NOT_FOUND, "%s: a folder of the Hub's cache: name its snapshot, %s/%s", directory,
                                snapshots, name);
        else result = besa__check_formats(directory, error);
    }
    BESA_FREE(kept.bytes);
    BESA_FREE(config);
    BESA_FREE(snapshots);
    BESA_FREE(head);
    return result;
}

/* The last part of a path. */
static const char *besa__base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* The model's name, once its config has been read. */
static besa_result besa__find_model_name(besa_checkpoint *checkpoint, besa_error *error)
{
    const besa__kept *config = &checkpoint->config_file;
    besa__json json;
    char *copy, *place;
    memset(&json, 0, sizeof json);
    BESA__TRY(besa__copy_text(&copy, (const char *)config->bytes, config->size, "config.json", error));
    besa_result result = besa__json_parse(&json, copy, config->size, "config.json", error);
    const char *name = NULL;
    if (result == BESA_OK) name = besa__json_string(&json, besa__json_get(&json, json.values, "_name_or_path"));
    const char *slash = name ? strchr(name, '/') : NULL;
    int is_hubs = slash && slash > name && slash[1] && !strchr(slash + 1, '/') && !strchr(".~", *name);
    place = is_hubs ? NULL : realpath(checkpoint->directory, NULL);
    if (!is_hubs) name = besa__base_name(place ? place : checkpoint->directory);
    if (result == BESA_OK) result = besa__copy_text(&checkpoint->name, name, strlen(name), "a name", error);
    free(place);
    besa__json_free(&json);
    return result;
}

static besa_result besa__checkpoint_load(besa_checkpoint *checkpoint, const char *directory, besa_error *error)
{
    besa__model model;
    struct stat st;
    size_t n = strlen(directory);
    while (n > 1 && directory[n - 1] == '/') n--;
    BESA__TRY(besa__copy_text(&checkpoint->directory, directory, n, "a path", error));
    if (stat(checkpoint->directory, &st)) return besa__check_absent(checkpoint->directory, errno, error);
    if (!S_ISDIR(st.st_mode)) return besa__check_file(checkpoint->directory, error);
    BESA__TRY(besa__check_cache(checkpoint->directory, error));
    BESA__TRY(besa__config_load(&checkpoint->config, &checkpoint->config_file, checkpoint->directory, error));
    BESA__TRY(besa__find_model_name(checkpoint, error));
    BESA__TRY(besa__open_weights(checkpoint, error));
    besa__find_prefix(checkpoint);
    if (checkpoint->config.is_part)
        besa__checkpoint_note(checkpoint, "note: the language model alone is used and pruned (%s*); the other parts stay as "
                              "they are", checkpoint->config.prefix);
    if (checkpoint->config.tie_contradicted)
        besa__checkpoint_note(checkpoint, "note: config.json and its text_config contradict each other in "
                              "tie_word_embeddings: %s, as transformers 5 has it",
                              checkpoint->config.tie_word_embeddings ? "true" : "false");
    BESA__TRY(besa__split_fused(checkpoint, error));
    BESA__TRY(besa__model_bind(&model, checkpoint, error));
    BESA__TRY(besa__check_tied_head(checkpoint, model.embedding, error));
    besa__check_companions(checkpoint);
    return besa__check_adapter(checkpoint, error);
}

BESA_API besa_result besa_checkpoint_open(besa_checkpoint **checkpoint, const char *directory, besa_error *error)
{
    void *memory;
    *checkpoint = NULL;
    if (!directory || !*directory) return besa__fail(error, BESA_ERROR_OPTION, "no checkpoint directory given");
    if (!besa__is_little_endian())
        return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s: checkpoints are little-endian, this machine is big-endian: "
                          "prune it on a little-endian machine, such as x86-64 or ARM64", directory);
    BESA__TRY(besa__malloc(&memory, sizeof **checkpoint, "a checkpoint", error));
    besa_checkpoint *opened = (besa_checkpoint *)memset(memory, 0, sizeof **checkpoint);
    besa_result result = besa__checkpoint_load(opened, directory, error);
    if (result == BESA_OK) *checkpoint = opened;
    else besa_checkpoint_close(opened);
    return result;
}

/* ============================================================================================
 * // >>journal               files of the unfinished output, and its journal
 * ============================================================================================
 * Owns OUT.partial, which becomes OUT by a rename once all is on disk. It starts as a copy of the source without the
 * prunable weights, and without norms and biases that learn; blocks come in one after another, and with bits the blocks'
 * codes into a file of their own (section codes). Its journal has one line
 * per step that is on disk,
 *     besa-journal 2 | run FINGERPRINT | copied | block 0 HASH FIGURES | block 1 HASH FIGURES ...
 * each ending in the hash of its own text, so that a torn line counts for nothing. FIGURES are the bits of numbers that belong to
 * the report and cannot be found again in what is written: section report says which. A step's bytes are synced before
 * its line is. OUT has no journal, so the journal must go before the last rename: for that moment the directory's name says
 * what it did. When all is done OUT.partial becomes OUT.partial.RUN.HASH, RUN being a hash of the fingerprint and HASH
 * one of all blocks' hashes; then the journal goes, and the directory becomes OUT. A run that finds OUT.partial.RUN.HASH
 * trusts no byte of it: pruned weights are read back, all else is written again. So a kill at any point leaves something
 * to go on from, or the finished output and nothing beside it.
 * Whoever writes into the directory has locked it. Names that no run has made are never written to or deleted.
 * The output is made of what was read: before the last rename the sources are looked at again, and one whose contents are
 * no longer those that were read is an error. Uses safetensors, config and POSIX; knows nothing of pruning. */

#include <limits.h>
#include <sys/file.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#define BESA__JOURNAL "besa-journal"
#define BESA__CONFIG "config.json"
#define BESA__CODES "besa_quantization.safetensors"
#define BESA__RECORD "besa.json"
#define BESA__CARD "README.md"
#define BESA__DENSE_CARD "README.dense.md"
#define BESA__PARTIAL ".partial"
#define BESA__READY_BYTES 35                    /* of ".RUN.HASH", RUN and HASH of 16 digits each */
#define BESA__LINE 2048                         /* bytes of the journal's longest line, the fingerprint's */
#ifndef BESA__CHUNK                             /* a test's is smaller than its tensors */
#define BESA__CHUNK ((size_t)8 << 20)           /* bytes copied or hashed at a time; a multiple of 8 */
#endif
#define BESA__SYNC ((size_t)64 << 20)           /* bytes of a block that are written between syncs */

/* Tensors of a block: its weights, and then its norms and biases. */
enum { BESA__BLOCK_TENSORS = BESA_LAYERS + BESA_VECTORS };

enum { BESA__FIGURES = 7 };                     /* of a block: losses, Prodigy's d, mean rate */

/* A block that is on disk. */
typedef struct besa__finished {
    uint64_t hash;                              /* of its tensors that come in with it, and of its codes */
    uint64_t figure[BESA__FIGURES];             /* their bits */
    uint64_t line;                              /* where its line begins in the journal */
} besa__finished;

/* A file that lies beside the weights and is read: what it was then. */
typedef struct besa__side {
    char *name;
    const char *as;                             /* what its copy in the output is called; NULL: there is none */
    struct stat stat;
    uint64_t hash;
} besa__side;

/* Bytes of a source tensor that this run has read, and their hash. */
typedef struct besa__source {
    uint64_t hash;
    size_t bytes;
} besa__source;

/* The file of quantised weights' codes, section codes. */
typedef struct besa__codes_shape {
    int bits;
    int64_t group, first, end;                  /* columns of a group, 0: a row; blocks first .. end - 1 have codes */
} besa__codes_shape;

typedef struct besa__codes {
    besa__codes_shape shape;
    char *header;                               /* owned, `data` bytes */
    uint64_t data, block_bytes;                 /* where the first block's bytes begin, and how many a block has */
    int fd;                                     /* -1: not open */
    uint64_t at, hash;                          /* in the current block: bytes written, their hash */
    size_t held;                                /* bytes in the buffer that are yet to be written */
    unsigned char buffer[16384];
} besa__codes;

typedef struct besa__writer {
    const besa_checkpoint *checkpoint;
    char *output;                               /* OUT */
    char *partial;                              /* where the unfinished output lies: OUT.partial, or with .RUN.HASH */
    const char *name, *partial_name;            /* their last parts, in the parent directory */
    uint64_t run;                               /* hash of the fingerprint */
    int vectors;                                /* norms and biases come in with their block; else weights alone */
    unsigned char *prunable;                    /* (num_tensors) 1: comes in with its block */
    besa__source *sources;                      /* (num_tensors) */
    besa__side *sides;                          /* (num_sides) */
    int64_t num_sides;
    int *files;                                 /* (num_shards) descriptors, as are the next three; -1: not open */
    int parent, directory, journal;
    int created, locked;                        /* we made the directory; nobody else writes into it */
    int is_ready;                               /* the directory is OUT.partial.RUN.HASH */
    int worthless;                              /* nothing in it is worth keeping: a failure deletes it */
    int copied;                                 /* all but what comes in with its block is on disk */
    int64_t blocks, done;
    besa__finished *finished;                   /* (blocks) the first `done` of them */
    uint64_t journal_begun, journal_end;        /* its size with the line "run"; now */
    besa__block_tensors current;                /* of block number done */
    uint64_t hash[BESA__BLOCK_TENSORS];         /* of its tensors, as far as written */
    size_t written[BESA__BLOCK_TENSORS];        /* bytes */
    size_t unsynced;                            /* bytes since the last sync */
    besa__codes *codes;                         /* of quantised weights; NULL: there are none */
    char *source_record;                        /* besa.json of a source that was pruned itself, an object; NULL: none */
    char *record, *card;                        /* owned: the output's besa.json and README.md; NULL: none */
} besa__writer;

/* A failed system call on partial/name. */
static besa_result besa__writer_fail(const besa__writer *w, const char *name, int reason, besa_error *error)
{
    return besa__fail(error, BESA_ERROR_WRITE, "%s/%s: %s", w->partial, name, strerror(reason));
}

static besa_result besa__write_at(const besa__writer *w, int fd, const char *name, const void *bytes, size_t count,
                                  uint64_t offset, besa_error *error)
{
    for (size_t done = 0; done < count;) {
        size_t part = count - done < BESA__CHUNK ? count - done : BESA__CHUNK;
        ssize_t n = pwrite(fd, (const unsigned char *)bytes + done, part, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return besa__writer_fail(w, name, n ? errno : ENOSPC, error);
        done += (size_t)n;
    }
    return BESA_OK;
}

static besa_result besa__sync(const besa__writer *w, int fd, const char *name, besa_error *error)
{
    int failed;
    do failed = fsync(fd);
    while (failed && errno == EINTR);
    if (!failed || errno == EINVAL || errno == ENOTSUP) return BESA_OK; /* some file systems do not sync directories */
    return besa__writer_fail(w, name, errno, error);
}

/* Give a new file its full size, on disk where the file system can promise that. */
static besa_result besa__allocate(const besa__writer *w, int fd, const char *name, uint64_t size, besa_error *error)
{
    int reason = EOPNOTSUPP;
#if defined(__linux__) && defined(SYS_fallocate) && LONG_MAX > 2147483647 /* posix_fallocate writes where this cannot promise */
    do reason = syscall(SYS_fallocate, fd, 0, (off_t)0, (off_t)size) ? errno : 0;
    while (reason == EINTR);
#elif !defined(__APPLE__)
    do reason = posix_fallocate(fd, 0, (off_t)size);
    while (reason == EINTR);
#endif
    if (reason == EOPNOTSUPP || reason == EINVAL || reason == ENOSYS) reason = ftruncate(fd, (off_t)size) ? errno : 0;
    return reason ? besa__writer_fail(w, name, reason, error) : BESA_OK;
}

/* Copy a range of a source shard, giving its pages back. *hash becomes that of its bytes. */
static besa_result besa__copy_range(const besa__writer *w, int64_t file, uint64_t offset, uint64_t bytes, uint64_t *hash,
                                    besa_error *error)
{
    const besa__shard *shard = w->checkpoint->shards + file;
    *hash = BESA__HASH_START;
    for (uint64_t at = offset, end = offset + bytes; at < end;) {
        size_t part = end - at < BESA__CHUNK ? (size_t)(end - at) : BESA__CHUNK;
        *hash = besa__hash(*hash, shard->base + at, part);
        BESA__TRY(besa__write_at(w, w->files[file], shard->name, shard->base + at, part, at, error));
        besa__release_range(shard, at, part);
        at += part;
    }
    return BESA_OK;
}

/* Hash a range of an open file; buffer: BESA__CHUNK bytes. */
static besa_result besa__hash_range(int fd, uint64_t offset, uint64_t bytes, void *buffer, uint64_t *hash, const char *path,
                                    besa_error *error)
{
    *hash = BESA__HASH_START;
    for (uint64_t at = 0; at < bytes; at += BESA__CHUNK) {
        size_t part = bytes - at < BESA__CHUNK ? (size_t)(bytes - at) : BESA__CHUNK;
        BESA__TRY(besa__read_at(fd, buffer, part, offset + at, path, error));
        *hash = besa__hash(*hash, buffer, part);
    }
    return BESA_OK;
}

/* Append a line and its hash to the journal, and sync it. */
static besa_result besa__journal_add(besa__writer *w, const char *text, besa_error *error)
{
    char line[BESA__LINE];
    int n = snprintf(line, sizeof line, "%s %016llx\n", text,
                     (unsigned long long)besa__hash(BESA__HASH_START, text, strlen(text)));
    BESA__TRY(besa__write_at(w, w->journal, BESA__JOURNAL, line, (size_t)n, w->journal_end, error));
    BESA__TRY(besa__sync(w, w->journal, BESA__JOURNAL, error));
    w->journal_end += (uint64_t)n;
    return BESA_OK;
}

/* The next line's text, or NULL at the end or at a line that is torn; moves *at past it. */
static const char *besa__journal_line(char **at)
{
    char *line = *at, *end = strchr(line, '\n'), hash[17];
    if (!end || end - line < 18) return NULL;
    char *split = end - 17;
    snprintf(hash, sizeof hash, "%016llx",
             (unsigned long long)besa__hash(BESA__HASH_START, line, (size_t)(split - line)));
    if (*split != ' ' || memcmp(hash, split + 1, 16)) return NULL;
    *split = 0;
    *at = end + 1;
    return line;
}

/* The words in which two fingerprints differ, as "lr=1 (this run: lr=2)", whose: "run"; both have the same names in the same
 * order. */
static void besa__name_differences(char *text, size_t size, const char *theirs, const char *ours, const char *whose)
{
    size_t length = 0;
    while (*theirs || *ours) {
        size_t n = strcspn(theirs, " "), m = strcspn(ours, " ");
        if (n != m || memcmp(theirs, ours, n)) {
            besa__write_text(text + length, size - length, "%s%.*s (this %s: %.*s)", length ? ", " : "", (int)n, theirs,
                             whose, (int)m, ours);
            length = strlen(text);
        }
        theirs += n + (theirs[n] == ' ');
        ours += m + (ours[m] == ' ');
    }
    if (length + 1 == size) memcpy(text + length - 3, "...", 3);
}

static besa_result besa__other_run(const besa__writer *w, const char *line, const char *run, besa_error *error)
{
    char what[500] = "another version of the library";
    if (!strncmp(line, "run ", 4)) besa__name_differences(what, sizeof what, line + 4, run + 4, "run");
    else if (strncmp(line, BESA__JOURNAL " ", sizeof BESA__JOURNAL))
        return besa__fail(error, BESA_ERROR_RESUME, "%s: its journal is damaged; remove the directory to start again", w->partial);
    return besa__fail(error, BESA_ERROR_RESUME, "%s: an unfinished run with other options, tokens, checkpoint or "
                      "micro-batches (as the memory allows): %s. Finish it with the same arguments, or remove the "
                      "directory to start again", w->partial, what);
}

/* "block N HASH FIGURES" */
static void besa__journal_block(char *line, size_t size, const besa__finished *block, int64_t index)
{
    besa__write_text(line, size, "block %lld %016llx", (long long)index, (unsigned long long)block->hash);
    for (int i = 0; i < BESA__FIGURES; i++) {
        size_t length = strlen(line);
        besa__write_text(line + length, size - length, " %016llx", (unsigned long long)block->figure[i]);
    }
}

/* Take over what the journal says: whether the copy is complete, and the blocks done with their hashes. */
static besa_result besa__journal_parse(besa__writer *w, char *text, const char *run, besa_error *error)
{
    char *at = text;
    const char *line = besa__journal_line(&at);
    if (strncmp(text, BESA__JOURNAL, strlen(text) < 12 ? strlen(text) : 12))
        return besa__fail(error, BESA_ERROR_EXISTS, "%s: holds a %s that is none; move the directory away", w->partial,
                          BESA__JOURNAL);
    if (line && strcmp(line, BESA__JOURNAL " 2")) return besa__other_run(w, line, run, error);
    if (line) line = besa__journal_line(&at);
    if (!line) return BESA_OK; /* killed before anything else was written */
    if (strcmp(line, run)) return besa__other_run(w, line, run, error);
    w->journal_begun = w->journal_end = (uint64_t)(at - text);
    line = besa__journal_line(&at);
    w->copied = line && !strcmp(line, "copied");
    if (w->copied) w->journal_end = (uint64_t)(at - text);
    while (w->copied && w->done < w->blocks && (line = besa__journal_line(&at)) != NULL) {
        char expected[256], *number = (char *)(uintptr_t)strrchr(line, ' ');
        besa__finished *block = &w->finished[w->done];
        block->line = w->journal_end;
        if (strlen(line) > 6) strtoull(line + 6, &number, 10);
        block->hash = number ? strtoull(number, &number, 16) : 0;
        for (int i = 0; i < BESA__FIGURES; i++) block->figure[i] = number ? strtoull(number, &number, 16) : 0;
        besa__journal_block(expected, sizeof expected, block, w->done);
        if (strcmp(line, expected)) break;
        w->journal_end = (uint64_t)(at - text);
        w->done++;
    }
    return BESA_OK;
}

static besa_result besa__journal_read(besa__writer *w, const char *fingerprint, besa_error *error)
{
    struct stat st;
    void *text;
    char run[BESA__LINE];
    snprintf(run, sizeof run, "run %s", fingerprint);
    if (fstat(w->journal, &st)) return besa__writer_fail(w, BESA__JOURNAL, errno, error);
    size_t size = (size_t)besa__min(besa__max((int64_t)st.st_size, 0), 1 << 20);
    BESA__TRY(besa__malloc(&text, size + 1, "the journal", error));
    ((char *)text)[size] = 0;
    besa_result result = besa__read_at(w->journal, text, size, 0, w->partial, error);
    if (result == BESA_OK) result = besa__journal_parse(w, (char *)text, run, error);
    BESA_FREE(text);
    BESA__TRY(result);
    w->worthless = !w->copied;
    if (ftruncate(w->journal, (off_t)w->journal_end)) return besa__writer_fail(w, BESA__JOURNAL, errno, error);
    if (w->journal_end) return BESA_OK;
    BESA__TRY(besa__journal_add(w, BESA__JOURNAL " 2", error));
    BESA__TRY(besa__journal_add(w, run, error));
    w->journal_begun = w->journal_end;
    BESA__TRY(besa__sync(w, w->directory, ".", error));
    return besa__sync(w, w->parent, "..", error);
}

/* OUT must not exist, its parent must, and lie outside the source. Opens the parent. */
static besa_result besa__writer_open_parent(besa__writer *w, besa_error *error)
{
    struct stat out, source;
    char *slash = strrchr(w->output, '/'), *real_parent, *real_source;
    const char *parent = slash == w->output ? "/" : ".";
    if (slash && slash != w->output) {
        *slash = 0;
        parent = w->output;
    }
    w->parent = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int reason = errno;
    real_parent = realpath(parent, NULL);
    real_source = realpath(w->checkpoint->directory, NULL);
    if (slash) *slash = '/';
    size_t n = real_source ? strlen(real_source) : 0;
    int inside = real_parent && n && !strncmp(real_parent, real_source, n) &&
                 (real_parent[n] == '/' || !real_parent[n]);
    free(real_parent);
    free(real_source);
    if (w->parent < 0)
        return besa__fail(error, reason == ENOENT || reason == ENOTDIR ? BESA_ERROR_NOT_FOUND : BESA_ERROR_WRITE,
                          "%s: its parent directory: %s", w->output, strerror(reason));
    int is_source = !stat(w->checkpoint->directory, &source) && !fstatat(w->parent, w->name, &out, 0) &&
                    besa__is_same(&out, &source);
    if (!*w->name || !fstatat(w->parent, w->name, &out, AT_SYMLINK_NOFOLLOW))
        return besa__fail(error, BESA_ERROR_EXISTS, "%s: %s", w->output,
                          is_source ? "the output is the input" : "exists already: remove it, or name another");
    if (inside) return besa__fail(error, BESA_ERROR_EXISTS, "%s: the output lies inside the input %s", w->output,
                                  w->checkpoint->directory);
    return BESA_OK;
}

/* The first name in a directory that is_wanted, or "". */
static besa_result besa__find_name(const besa__writer *w, int directory,
                                   int (*is_wanted)(const besa__writer *, const char *), char found[256],
                                   besa_error *error)
{
    int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *list = fd < 0 ? NULL : fdopendir(fd);
    int reason = errno;
    *found = 0;
    while (list && !*found) {
        errno = 0;
        struct dirent *entry = readdir(list);
        reason = errno;
        if (!entry) break;
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") && is_wanted(w, entry->d_name))
            snprintf(found, 256, "%s", entry->d_name);
    }
    if (list) closedir(list);
    else if (fd >= 0) close(fd);
    return list && !reason ? BESA_OK : besa__writer_fail(w, directory == w->parent ? ".." : ".", reason, error);
}

static int besa__is_any(const besa__writer *w, const char *name)
{
    (void)w, (void)name;
    return 1;
}

/* Whether a name is OUT.partial.RUN.HASH, of whatever run. */
static int besa__is_ready_name(const besa__writer *w, const char *name)
{
    static const char digits[] = "0123456789abcdef";
    size_t n = strlen(w->partial_name);         /* OUT.partial still */
    if (strncmp(name, w->partial_name, n)) return 0;
    name += n;
    return strlen(name) == BESA__READY_BYTES - 1 && name[0] == '.' && strspn(name + 1, digits) == 16 && name[17] == '.' &&
           strspn(name + 18, digits) == 16;
}

/* What follows OUT.partial in the name of the complete output. */
static void besa__ready_ending(const besa__writer *w, char ending[BESA__READY_BYTES])
{
    uint64_t hash = BESA__HASH_START;
    for (int64_t b = 0; b < w->blocks; b++) hash = besa__hash(hash, &w->finished[b].hash, sizeof hash);
    snprintf(ending, BESA__READY_BYTES, ".%016llx.%016llx", (unsigned long long)w->run, (unsigned long long)hash);
}

/* What lies under a name that the output needs must be a regular file, and have no other name that would be written too. */
static besa_result besa__check_entry(const besa__writer *w, const char *name, const struct stat *st, besa_error *error)
{
    if (S_ISREG(st->st_mode) && st->st_nlink <= 1) return BESA_OK;
    return besa__fail(error, BESA_ERROR_EXISTS, "%s/%s: %s; move it away", w->partial, name,
                      S_ISREG(st->st_mode) ? "has other names (hard links), whose contents would change with it"
                                           : "not a regular file, and none that a run has made");
}

/* A descriptor in place of 0, 1 or 2: those a program takes for its terminal even where they were closed when it began, and
 * what it prints must not get into a file. */
static int besa__above_standard(int fd)
{
    if (fd < 0 || fd > 2) return fd;
    int above = fcntl(fd, F_DUPFD_CLOEXEC, 3), reason = errno;
    close(fd);
    errno = reason;
    return above;
}

/* Open a file of the unfinished output; *fd is -1 where there is none. A file that its owner may not write, as the source's,
 * may be written for a moment. O_NONBLOCK: whatever has taken its place must not hang us. */
static besa_result besa__open_entry(const besa__writer *w, int *fd, const char *name, besa_error *error)
{
    struct stat st, opened;
    *fd = -1;
    if (fstatat(w->directory, name, &st, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT ? BESA_OK : besa__writer_fail(w, name, errno, error);
    BESA__TRY(besa__check_entry(w, name, &st, error));
    mode_t mode = st.st_mode & 0777;
    int guarded = (mode & 0600) != 0600;
    if (guarded && fchmodat(w->directory, name, mode | 0600, 0)) return besa__writer_fail(w, name, errno, error);
    *fd = besa__above_standard(openat(w->directory, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
    if (*fd < 0 || fstat(*fd, &opened)) return besa__writer_fail(w, name, errno, error);
    if (!besa__is_same(&st, &opened))
        return besa__fail(error, BESA_ERROR_RESUME, "%s/%s: another process is changing it", w->partial, name);
    return guarded && fchmod(*fd, mode) ? besa__writer_fail(w, name, errno, error) : BESA_OK;
}

/* A new file in place of what a run has left there, with the source's permissions as far as the umask leaves them. */
static besa_result besa__create_entry(const besa__writer *w, int *fd, const char *name, mode_t mode, besa_error *error)
{
    struct stat st;
    *fd = -1;
    if (!fstatat(w->directory, name, &st, AT_SYMLINK_NOFOLLOW)) {
        if (!S_ISREG(st.st_mode)) return besa__check_entry(w, name, &st, error);
        if (unlinkat(w->directory, name, 0)) return besa__writer_fail(w, name, errno, error);
    } else if (errno != ENOENT) return besa__writer_fail(w, name, errno, error);
    *fd = besa__above_standard(openat(w->directory, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode & 0777));
    return *fd < 0 ? besa__writer_fail(w, name, errno, error) : BESA_OK;
}

/* Lock a file of the unfinished output, or its directory, and see that the latter is still what its name says. */
static besa_result besa__writer_lock(besa__writer *w, int fd, besa_error *error)
{
    struct stat a, b;
    if (flock(fd, LOCK_EX | LOCK_NB)) {
        if (errno != EWOULDBLOCK) return besa__writer_fail(w, ".", errno, error);
        return besa__fail(error, BESA_ERROR_RESUME, "%s: another process is writing it", w->partial);
    }
    if (fstat(w->directory, &a) || fstatat(w->parent, w->partial_name, &b, AT_SYMLINK_NOFOLLOW) ||
        !besa__is_same(&a, &b) || !fstatat(w->parent, w->name, &b, AT_SYMLINK_NOFOLLOW))
        return besa__fail(error, BESA_ERROR_RESUME, "%s: another process has just finished it", w->partial);
    w->locked = 1;
    return BESA_OK;
}

/* Open and lock the complete output of a run that was killed before its last rename, or else OUT.partial, which is made
 * as private as the source is. */
static besa_result besa__writer_open_directory(besa__writer *w, besa_error *error)
{
    char ready[256], ending[BESA__READY_BYTES];
    struct stat source;
    size_t n = strlen(w->partial_name);
    BESA__TRY(besa__find_name(w, w->parent, besa__is_ready_name, ready, error));
    w->is_ready = *ready != 0;
    if (w->is_ready) memcpy(w->partial + strlen(w->partial), ready + n, BESA__READY_BYTES);
    mode_t mode = stat(w->checkpoint->directory, &source) ? 0777 : (source.st_mode & 0777) | 0700;
    w->created = !w->is_ready && !mkdirat(w->parent, w->partial_name, mode);
    if (!w->is_ready && !w->created && errno != EEXIST)
        return besa__fail(error, BESA_ERROR_WRITE, "%s: %s", w->partial, strerror(errno));
    w->directory = openat(w->parent, w->partial_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (w->directory < 0)
        return besa__fail(error, errno == ENOTDIR || errno == ELOOP ? BESA_ERROR_EXISTS : BESA_ERROR_WRITE,
                          "%s: %s; it is needed for the unfinished output", w->partial, strerror(errno));
    BESA__TRY(besa__writer_lock(w, w->directory, error));
    besa__ready_ending(w, ending);
    if (w->is_ready && memcmp(ready + n, ending, 17)) /* its RUN */
        return besa__fail(error, BESA_ERROR_RESUME, "%s: the complete output of a run with other options or input. "
                          "Finish it with the same arguments, or remove the directory to start again", w->partial);
    if (w->is_ready) return BESA_OK;
    BESA__TRY(besa__find_name(w, w->parent, besa__is_ready_name, ready, error)); /* once more, now that we have the lock */
    if (!*ready) return BESA_OK;
    return besa__fail(error, BESA_ERROR_RESUME, "%s: another process is finishing it", w->partial);
}

/* Open, or begin, the journal of OUT.partial. It is locked too: on a network file system other machines may not see that
 * the directory is. */
static besa_result besa__journal_open(besa__writer *w, besa_error *error)
{
    char found[256];
    BESA__TRY(besa__open_entry(w, &w->journal, BESA__JOURNAL, error));
    if (w->journal < 0) {
        BESA__TRY(besa__find_name(w, w->directory, besa__is_any, found, error));
        if (*found)
            return besa__fail(error, BESA_ERROR_EXISTS, "%s: exists and is no unfinished output: %s lies in it; move it "
                              "away", w->partial, found);
        BESA__TRY(besa__create_entry(w, &w->journal, BESA__JOURNAL, 0666, error));
    }
    return besa__writer_lock(w, w->journal, error);
}

/* ============================================================================================
 * // >>beside                what lies beside the weights: which files are copied
 * ============================================================================================
 * Owns which files of the source become part of the output, and which are foreign in an unfinished one. The source's card and
 * its besa.json, if it was pruned itself, are not true of the output: the one is kept under another name, README.dense.md, but
 * where a dense model's lies under that name already; the other is kept within the output's own besa.json. */

/* Files that would be wrong beside pruned weights: other weights, and what lists, counts or describes weights that are not
 * there. Patterns are separated by spaces. Tokenizers, generation_config.json, chat templates,
 * licences and code are copied: they are as true of the output as of the source. */
static const struct {
    const char *patterns, *why;
} besa__left_out[] = {
    { "adapter_*", "an adapter, which is not applied" }, /* by its config alone, peft looks for its weights */
    { "*.safetensors *.bin *.pth *.pt *.ckpt *.h5 *.msgpack *.ot *.onnx *.onnx_data *.gguf *.ggml *.npz *.pkl *.nemo "
      "*.engine *.tflite *.pdparams pytorch_model* consolidated*", "not part of this checkpoint" },
    { "*.index.json *.index.*.json ndarray-cache*.json tensor-cache*.json params.json openvino_* genai_config.json",
      "describes weights that are not part of this checkpoint" },
    { "trainer_state.json trainer_log.jsonl training_args.* events.out.tfevents.* zero_to_fp32.py latest",
      "of the source's training" },
    { "*_results.json *imatrix* measurement.json", "measured on the source" },
    { "quantize_config.json quant_config.json quantization_config.json hf_quant_config.json quant_log.csv kv_cache_scales*",
      "of a quantised form of the source" },
    { "*.chk *.md5 *.sha1 *.sha256 *.sha512 *sums *sums.txt *.sig", "sums of the source's bytes" },
    { "*.npy *.u16 *.i32", "tokens" },
};

static int besa__lower(char c) { return c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c; }

/* Whether a name is that of a pattern of so many characters, which is in lower case, whatever the name's case. */
static int besa__name_matches(const char *pattern, size_t length, const char *name)
{
    if (!length) return !*name;
    if (*pattern == '*')
        return besa__name_matches(pattern + 1, length - 1, name) ||
               (*name && besa__name_matches(pattern, length, name + 1));
    return besa__lower(*name) == *pattern && besa__name_matches(pattern + 1, length - 1, name + 1);
}

/* Why a file of the source directory is not part of the output; NULL if it is. */
static const char *besa__why_left_out(const besa_checkpoint *checkpoint, const char *name, const struct stat *st)
{
    if (name[0] == '.') return "hidden";
    if (!st) return "a dangling link";
    if (S_ISDIR(st->st_mode)) return "a subdirectory";
    if (!S_ISREG(st->st_mode)) return "not a regular file";
    if (checkpoint->index && !strcmp(name, checkpoint->index)) return NULL;
    if (!strcmp(name, BESA__JOURNAL)) return "of an unfinished run";
    for (size_t i = 0; i < sizeof besa__left_out / sizeof *besa__left_out; i++)
        for (const char *p = besa__left_out[i].patterns; *p; p += *p == ' ') {
            size_t length = strcspn(p, " ");
            if (besa__name_matches(p, length, name)) return besa__left_out[i].why;
            p += length;
        }
    return NULL;
}

/* A whole file of the output: written, synced, closed. */
static besa_result besa__write_file(const besa__writer *w, const char *name, const void *bytes, size_t size, mode_t mode,
                                    besa_error *error)
{
    int fd;
    besa_result result = besa__create_entry(w, &fd, name, mode, error);
    if (result == BESA_OK) result = besa__write_at(w, fd, name, bytes, size, 0, error);
    if (result == BESA_OK) result = besa__sync(w, fd, name, error);
    if (fd >= 0 && close(fd) && result == BESA_OK) result = besa__writer_fail(w, name, errno, error);
    return result;
}

/* Keep the record of a source that was pruned itself; what is no object of JSON is not kept. */
static besa_result besa__keep_record(besa__writer *w, const unsigned char *bytes, size_t size, char **notes, besa_error *error)
{
    char *copy;                                 /* for the reader, which decodes it in place */
    besa__json json;
    while (size && (bytes[size - 1] == '\n' || bytes[size - 1] == ' ')) size--;
    if (!size || size >= BESA__HEADER_LIMIT) return BESA_OK;
    BESA__TRY(besa__copy_text(&copy, (const char *)bytes, size, BESA__RECORD, error));
    besa_result result = besa__json_parse(&json, copy, size, BESA__RECORD, error);
    int is_object = result == BESA_OK && besa__json_is(&json, json.values, BESA__JSON_OBJECT);
    besa__json_free(&json);
    if (result == BESA_ERROR_MEMORY) return result;
    if (is_object) return besa__copy_text(&w->source_record, (const char *)bytes, size, BESA__RECORD, error);
    if (notes) besa__notes_add(notes, "not kept: the source's %s (no object of JSON)", BESA__RECORD);
    return BESA_OK;
}

static besa_result besa__copy_side(besa__writer *w, besa__side *side, char **notes, besa_error *error)
{
    char *path;
    unsigned char *bytes = NULL;
    size_t size = 0;
    BESA__TRY(besa__join(&path, w->checkpoint->directory, side->name, error));
    besa__stat_before(&side->stat, path);
    besa_result result = besa__map_file(&bytes, &size, path, error);
    if (result == BESA_OK) {
        side->hash = besa__hash(BESA__HASH_START, bytes, size);
        if (side->as) result = besa__write_file(w, side->as, bytes, size, side->stat.st_mode, error);
        else if (!strcmp(side->name, BESA__RECORD)) result = besa__keep_record(w, bytes, size, notes, error);
    }
    besa__unmap(bytes, size);
    BESA_FREE(path);
    return result;
}

/* Add a file to the list of those that are copied. */
static besa_result besa__add_side(besa__writer *w, const char *name, besa_error *error)
{
    char *copy;
    size_t count = (size_t)w->num_sides;
    void *more = BESA_REALLOC(w->sides, (count + 1) * sizeof *w->sides);
    if (!more) return besa__fail(error, BESA_ERROR_MEMORY, "out of host memory for %zu files' names", count + 1);
    w->sides = (besa__side *)more;
    BESA__TRY(besa__copy_text(&copy, name, strlen(name), "a file's name", error));
    memset(w->sides + count, 0, sizeof *w->sides);
    w->sides[count].as = w->sides[count].name = copy;
    w->num_sides++;
    return BESA_OK;
}

/* The file of that name among those that are read; NULL: there is none. */
static besa__side *besa__find_side(const besa__writer *w, const char *name)
{
    for (int64_t i = 0; i < w->num_sides; i++)
        if (!strcmp(w->sides[i].name, name)) return &w->sides[i];
    return NULL;
}

/* What would not be true of the output has another name there, or none. */
static void besa__rename_sides(const besa__writer *w, char **notes)
{
    besa__side *card = besa__find_side(w, BESA__CARD), *record = besa__find_side(w, BESA__RECORD);
    const int has_dense = besa__find_side(w, BESA__DENSE_CARD) != NULL;
    if (record) record->as = NULL;
    if (card) card->as = has_dense ? NULL : BESA__DENSE_CARD;
    if (card && has_dense && notes)
        besa__notes_add(notes, "not copied: %s (of a pruned source; the dense model's is %s)", BESA__CARD, BESA__DENSE_CARD);
}

/* Whether a name belongs to the checkpoint itself: what was read when it was opened. */
static int besa__is_checkpoint_file(const besa_checkpoint *c, const char *name)
{
    int is = !strcmp(name, BESA__CONFIG) || (c->index && !strcmp(name, c->index));
    for (int64_t i = 0; i < c->num_shards; i++) is = is || !strcmp(name, c->shards[i].name);
    return is;
}

/* What lies beside the weights and will be copied; note what is left out. */
static besa_result besa__list_sides(besa__writer *w, char **notes, besa_error *error)
{
    struct dirent **list = NULL;
    const char *directory = w->checkpoint->directory;
    int count = scandir(directory, &list, NULL, alphasort);
    int source = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    besa_result result = BESA_OK;
    if (count < 0 || source < 0) result = besa__fail(error, BESA_ERROR_READ, "%s: %s", directory, strerror(errno));
    for (int i = 0; i < count && result == BESA_OK; i++) {
        struct stat st;
        const char *name = list[i]->d_name, *why;
        if (!strcmp(name, ".") || !strcmp(name, "..") || besa__is_checkpoint_file(w->checkpoint, name)) continue;
        int dangling = fstatat(source, name, &st, 0) != 0;
        if (dangling && errno != ENOENT && errno != ENOTDIR && errno != ELOOP) {
            result = besa__fail(error, BESA_ERROR_READ, "%s/%s: %s", directory, name, strerror(errno));
            break;
        }
        why = besa__why_left_out(w->checkpoint, name, dangling ? NULL : &st);
        if (!why) result = besa__add_side(w, name, error);
        else if (notes) besa__notes_add(notes, "not copied: %s (%s)", name, why);
    }
    for (int i = 0; i < count; i++) free(list[i]);
    free(list);
    if (source >= 0) close(source);
    besa__rename_sides(w, notes);
    return result;
}

/* Whether a file of the unfinished output is none that runs make there. */
static int besa__is_foreign(const besa__writer *w, const char *name)
{
    struct stat st;
    int ours = !strcmp(name, BESA__JOURNAL) || (w->codes && !strcmp(name, BESA__CODES)) || !strcmp(name, BESA__RECORD) ||
               !strcmp(name, BESA__CARD) || besa__is_checkpoint_file(w->checkpoint, name);
    for (int64_t i = 0; i < w->num_sides; i++) ours = ours || (w->sides[i].as && !strcmp(name, w->sides[i].as));
    return !ours || fstatat(w->directory, name, &st, AT_SYMLINK_NOFOLLOW) || !S_ISREG(st.st_mode);
}

/* The index as it was read, and what lies beside the weights. */
static besa_result besa__copy_sides(besa__writer *w, char **notes, besa_error *error)
{
    const besa__kept *index = &w->checkpoint->index_file;
    char foreign[256];
    BESA__TRY(besa__find_name(w, w->directory, besa__is_foreign, foreign, error));
    if (*foreign && notes)
        besa__notes_add(notes, "warning: %s lay in %s and is none of this run's files: it stays there", foreign,
                        w->partial);
    if (w->checkpoint->index)
        BESA__TRY(besa__write_file(w, w->checkpoint->index, index->bytes, index->size, index->stat.st_mode, error));
    for (int64_t i = 0; i < w->num_sides; i++) BESA__TRY(besa__copy_side(w, &w->sides[i], notes, error));
    return BESA_OK;
}

/* ============================================================================================
 * // >>codes                 quantised weights as whole numbers, in a file of their own
 * ============================================================================================
 * Owns besa_quantization.safetensors, beside weights that lie on grids: of a layer NAME.weight (R, C) with G grids a row
 *     NAME.scale (R, G) F32    NAME.zero (R, G) U8    NAME.codes (R, C) U8, a byte each
 * so that weight[r,j] = scale[r,g] (codes[r,j] - zero[r,g]), g = j / group_size, computed in float and rounded to the weight's
 * dtype, bit for bit; pruned weights have the code `zero`. Bits and group_size (0: a row) are in the metadata. All sizes are known
 * before the first block, whose bytes follow one another: scales of its layers, zeros, codes. A block's bytes are part of its
 * hash. Codes are worked out from the weights on their way into their own file. */

enum { BESA__CODES_SCALE, BESA__CODES_ZERO, BESA__CODES_CODES, BESA__CODES_KINDS };

/* Grids of all rows of a layer. */
static int64_t besa__layer_grids(const besa_block_shape *shape, int layer, int64_t group)
{
    int64_t rows, columns;
    besa_block_layer(shape, layer, &rows, &columns);
    return besa__product(rows, group ? besa__parts(columns, group) : 1);
}

/* The header's text, from its first tensor on, as far as `size` bytes hold it; returns its length. */
static size_t besa__codes_header(const besa__codes *codes, const besa_config *config, char *text, size_t size)
{
    static const struct { const char *name, *dtype; int bytes; } kind[BESA__CODES_KINDS] = {
        {"scale", "F32", 4}, {"zero", "U8", 1}, {"codes", "U8", 1}};
    char none[1];
    size_t length = 0;
    if (!text) text = none;                     /* only its length is asked for */
    uint64_t at = 0;
    for (int64_t b = codes->shape.first; b < codes->shape.end; b++)
        for (int k = 0; k < BESA__CODES_KINDS; k++)
            for (int i = 0; i < BESA_LAYERS; i++) {
                char name[128];
                int64_t rows, columns;
                besa_block_layer(&config->block, i, &rows, &columns);
                if (k != BESA__CODES_CODES) columns = besa__layer_grids(&config->block, i, codes->shape.group) / rows;
                uint64_t bytes = (uint64_t)(rows * columns) * (uint64_t)kind[k].bytes;
                besa__tensor_name(name, sizeof name, config, b, besa__layers[i].path);
                int n = snprintf(text + (length < size ? length : size), length < size ? size - length : 0,
                                 ",\"%s.%s\":{\"dtype\":\"%s\",\"shape\":[%lld,%lld],\"data_offsets\":[%llu,%llu]}", name,
                                 kind[k].name, kind[k].dtype, (long long)rows, (long long)columns, (unsigned long long)at,
                                 (unsigned long long)(at + bytes));
                length += (size_t)n;
                at += bytes;
            }
    return length;
}

static uint64_t besa__codes_block_bytes(const besa_block_shape *shape, int64_t group)
{
    uint64_t bytes = 0;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns, grids = besa__layer_grids(shape, i, group);
        besa_block_layer(shape, i, &rows, &columns);
        bytes += 5 * (uint64_t)grids + (uint64_t)(rows * columns);
    }
    return bytes;
}

/* Bytes of the file, to a few hundred. */
static uint64_t besa__codes_bytes(const besa_config *config, const besa__codes_shape *shape)
{
    uint64_t blocks = (uint64_t)(shape->end - shape->first);
    return blocks * (besa__codes_block_bytes(&config->block, shape->group) + 3 * BESA_LAYERS * 128) + 256;
}

/* The file's header: its length, and JSON filled up with blanks to a multiple of 8. */
static besa_result besa__codes_new(besa__codes **made, const besa_checkpoint *checkpoint, const besa__codes_shape *shape,
                                   besa_error *error)
{
    void *memory;
    char begin[128];
    *made = NULL;
    for (int64_t i = 0; i < checkpoint->num_shards; i++)
        if (!strcmp(checkpoint->shards[i].name, BESA__CODES))
            return besa__fail(error, BESA_ERROR_UNSUPPORTED, "%s/%s: weights under the name that codes have",
                              checkpoint->directory, BESA__CODES);
    BESA__TRY(besa__malloc(&memory, sizeof **made, "the codes' file", error));
    besa__codes *codes = *made = (besa__codes *)memset(memory, 0, sizeof **made);
    codes->fd = -1;
    codes->shape = *shape;
    codes->block_bytes = besa__codes_block_bytes(&checkpoint->config.block, shape->group);
    size_t n = (size_t)snprintf(begin, sizeof begin, "{\"__metadata__\":{\"format\":\"pt\",\"bits\":\"%d\","
                                "\"group_size\":\"%lld\"}", shape->bits, (long long)shape->group);
    size_t length = besa__codes_header(codes, &checkpoint->config, NULL, 0), text = (n + length + 1 + 7) / 8 * 8;
    BESA__TRY(besa__malloc(&memory, 8 + text + 1, "the codes' header", error));
    codes->header = (char *)memset(memory, ' ', 8 + text + 1);
    codes->data = 8 + text;
    for (int i = 0; i < 8; i++) codes->header[i] = (char)((uint64_t)text >> (8 * i) & 255);
    memcpy(codes->header + 8, begin, n);
    besa__codes_header(codes, &checkpoint->config, codes->header + 8 + n, length + 1);
    codes->header[8 + n + length] = '}';
    return BESA_OK;
}

static void besa__codes_free(besa__codes *codes)
{
    if (!codes) return;
    if (codes->fd >= 0) close(codes->fd);
    BESA_FREE(codes->header);
    BESA_FREE(codes);
}

static uint64_t besa__codes_size(const besa__codes *codes)
{
    return codes->data + (uint64_t)(codes->shape.end - codes->shape.first) * codes->block_bytes;
}

/* Does a block have codes? */
static int besa__has_codes(const besa__writer *w, int64_t block)
{
    return w->codes && block >= w->codes->shape.first && block < w->codes->shape.end;
}

static uint64_t besa__codes_offset(const besa__codes *codes, int64_t block)
{
    return codes->data + (uint64_t)(block - codes->shape.first) * codes->block_bytes;
}

/* Open what an earlier run has left; *whole becomes 0 where it is not there in full. */
static besa_result besa__codes_open(besa__writer *w, int *whole, besa_error *error)
{
    struct stat st;
    BESA__TRY(besa__open_entry(w, &w->codes->fd, BESA__CODES, error));
    if (w->codes->fd >= 0 && fstat(w->codes->fd, &st)) return besa__writer_fail(w, BESA__CODES, errno, error);
    if (w->codes->fd < 0 || (uint64_t)st.st_size != besa__codes_size(w->codes)) *whole = 0;
    return BESA_OK;
}

static besa_result besa__codes_create(besa__writer *w, besa_error *error)
{
    if (w->codes->fd >= 0) close(w->codes->fd);
    return besa__create_entry(w, &w->codes->fd, BESA__CODES, w->checkpoint->shards[0].stat.st_mode, error);
}

static besa_result besa__codes_begin(besa__writer *w, besa_error *error)
{
    const besa__codes *codes = w->codes;
    BESA__TRY(besa__write_at(w, codes->fd, BESA__CODES, codes->header, (size_t)codes->data, 0, error));
    return besa__sync(w, codes->fd, BESA__CODES, error);
}

/* Write what is held; all pieces of a block but its last are of the buffer's size, a multiple of 8. */
static besa_result besa__codes_flush(besa__writer *w, besa_error *error)
{
    besa__codes *codes = w->codes;
    uint64_t offset = besa__codes_offset(codes, w->done) + codes->at;
    BESA__TRY(besa__write_at(w, codes->fd, BESA__CODES, codes->buffer, codes->held, offset, error));
    codes->hash = besa__hash(codes->at ? codes->hash : BESA__HASH_START, codes->buffer, codes->held);
    codes->at += codes->held;
    codes->held = 0;
    return BESA_OK;
}

/* The next bytes of the current block. */
static besa_result besa__codes_put(besa__writer *w, const void *bytes, size_t size, besa_error *error)
{
    besa__codes *codes = w->codes;
    const unsigned char *from = (const unsigned char *)bytes;
    while (size > 0) {
        size_t part = sizeof codes->buffer - codes->held < size ? sizeof codes->buffer - codes->held : size;
        memcpy(codes->buffer + codes->held, from, part);
        codes->held += part, from += part, size -= part;
        if (codes->held == sizeof codes->buffer) BESA__TRY(besa__codes_flush(w, error));
    }
    return BESA_OK;
}

/* The current block's are complete: on return they are on disk. */
static besa_result besa__codes_end(besa__writer *w, besa_error *error)
{
    besa__codes *codes = w->codes;
    if (codes->held) BESA__TRY(besa__codes_flush(w, error));
    BESA_ASSERT(codes->at == codes->block_bytes);
    codes->at = 0;
    return besa__sync(w, codes->fd, BESA__CODES, error);
}

/* The bits of x in a dtype. */
static uint32_t besa__bits_of(float x, besa_dtype dtype)
{
    return dtype == BESA_F32 ? besa__float_bits(x) : dtype == BESA_F16 ? besa__f32_to_f16(x) : besa__f32_to_bf16(x);
}

/* The code of the level whose bits these are, the nearest one that has them: at 8 bits two levels may be one number of bf16. */
static int besa__code_of(uint32_t bits, besa_dtype dtype, float scale, float zero, int most)
{
    float x = dtype == BESA_F32 ? besa__bits_float(bits) : dtype == BESA_F16 ? besa__f16_to_f32((uint16_t)bits)
              : besa__bf16_to_f32((uint16_t)bits);
    float place = scale > 0 ? x / scale + zero + 0.5f : zero;
    int near = place > 0 ? place < (float)most ? (int)place : most : 0;
    for (int step = 0; step <= most; step++)
        for (int side = -1; side <= 1; side += 2) {
            int code = near + side * step;
            if (code < 0 || code > most) continue;
            if (besa__bits_of(scale * ((float)code - zero), dtype) == bits) return code;
        }
    return near;
}

/* ============================================================================================
 * // >>writer                blocks into the output, one after another
 * ============================================================================================
 * Owns the copy of what is not pruned, the blocks that come in, and what an earlier run has left of them. */

static besa_result besa__ready_damaged(const besa__writer *w, besa_error *error)
{
    return besa__fail(error, BESA_ERROR_EXISTS, "%s: complete, as its name says, but its weights are not what was "
                      "written; remove the directory to start again", w->partial);
}

/* Open the output's shards. A copy that is said to be complete, but whose files are not there in full, is none. */
static besa_result besa__writer_open_files(besa__writer *w, besa_error *error)
{
    for (int64_t i = 0; i < w->checkpoint->num_shards && w->copied; i++) {
        struct stat st;
        const besa__shard *shard = w->checkpoint->shards + i;
        BESA__TRY(besa__open_entry(w, &w->files[i], shard->name, error));
        if (w->files[i] >= 0 && fstat(w->files[i], &st)) return besa__writer_fail(w, shard->name, errno, error);
        if (w->files[i] < 0 || (uint64_t)st.st_size != shard->size) w->copied = 0;
    }
    if (w->codes && w->copied) BESA__TRY(besa__codes_open(w, &w->copied, error));
    if (w->is_ready) return w->copied ? BESA_OK : besa__ready_damaged(w, error);
    w->worthless = !w->copied;
    for (int64_t i = 0; i < w->checkpoint->num_shards && !w->copied; i++) {
        const besa__shard *shard = w->checkpoint->shards + i;
        if (w->files[i] >= 0) close(w->files[i]);
        BESA__TRY(besa__create_entry(w, &w->files[i], shard->name, shard->stat.st_mode, error));
    }
    return w->codes && !w->copied ? besa__codes_create(w, error) : BESA_OK;
}

static besa_result besa__source_changed(const besa__writer *w, const char *name, besa_error *error)
{
    return besa__fail(error, BESA_ERROR_READ, "%s/%s: has changed since this run read it. Finished blocks are in %s: run again "
                      "with the file as it was, or remove that directory to start again", w->checkpoint->directory, name,
                      w->partial);
}

/* Tensor number `index` of the current block, if it is one of those that come in with it, else NULL. */
static const besa_tensor *besa__coming(const besa__writer *w, int index)
{
    if (index < BESA_LAYERS) return w->current.weight[index];
    return w->vectors ? w->current.vector[index - BESA_LAYERS] : NULL;
}

/* Headers, and every tensor that does not come in with a block. */
static besa_result besa__copy_unpruned(besa__writer *w, besa_error *error)
{
    const besa_checkpoint *c = w->checkpoint;
    for (int64_t i = 0; i < c->num_shards; i++) {
        uint64_t hash;
        BESA__TRY(besa__copy_range(w, i, 0, c->shards[i].data, &hash, error));
        if (hash != c->shards[i].hash) return besa__source_changed(w, c->shards[i].name, error);
    }
    for (int64_t i = 0; i < c->num_tensors; i++) {
        const besa_tensor *t = &c->tensors[i];
        if (w->prunable[i]) continue;
        BESA__TRY(besa__copy_range(w, t->file, t->offset, t->bytes, &w->sources[i].hash, error));
        w->sources[i].bytes = t->bytes;
    }
    for (int64_t i = 0; i < c->num_shards; i++) BESA__TRY(besa__sync(w, w->files[i], c->shards[i].name, error));
    return w->codes ? besa__codes_begin(w, error) : BESA_OK;
}

/* The run has read these bytes of a source tensor, one piece after another from its start (at 0); all pieces but the last are
 * multiples of 8. */
static void besa__writer_saw(besa__writer *w, const besa_tensor *tensor, size_t at, const void *bytes, size_t size)
{
    besa__source *source = w->sources + (tensor - w->checkpoint->tensors);
    source->hash = besa__hash(at ? source->hash : BESA__HASH_START, bytes, size);
    source->bytes = at + size;
}

/* Whether a small tensor that is about to be used is still as it was copied; one that comes in with its block is not copied,
 * but seen now. */
static besa_result besa__check_copy(besa__writer *w, const besa_tensor *tensor, besa_error *error)
{
    if (w->prunable[tensor - w->checkpoint->tensors]) {
        besa__writer_saw(w, tensor, 0, tensor->data, tensor->bytes);
        return BESA_OK;
    }
    uint64_t hash = besa__hash(BESA__HASH_START, tensor->data, tensor->bytes);
    if (hash == w->sources[tensor - w->checkpoint->tensors].hash) return BESA_OK;
    return besa__source_changed(w, w->checkpoint->shards[tensor->file].name, error);
}

/* Everything but what comes in with its block, and the room for that. */
static besa_result besa__writer_copy(besa__writer *w, besa_error *error)
{
    const besa_checkpoint *c = w->checkpoint;
    w->done = 0;
    w->journal_end = w->journal_begun;
    if (ftruncate(w->journal, (off_t)w->journal_end)) return besa__writer_fail(w, BESA__JOURNAL, errno, error);
    for (int64_t i = 0; i < c->num_shards; i++)
        BESA__TRY(besa__allocate(w, w->files[i], c->shards[i].name, c->shards[i].size, error));
    if (w->codes) BESA__TRY(besa__allocate(w, w->codes->fd, BESA__CODES, besa__codes_size(w->codes), error));
    BESA__TRY(besa__copy_unpruned(w, error));
    BESA__TRY(besa__sync(w, w->directory, ".", error));
    BESA__TRY(besa__journal_add(w, "copied", error));
    w->copied = 1;
    w->worthless = 0;
    return BESA_OK;
}

static besa_result besa__writer_read(besa__writer *w, const besa_tensor *tensor, void *memory, size_t at, size_t size,
                                     besa_error *error)
{
    return besa__read_at(w->files[tensor->file], memory, size, tensor->offset + at, w->partial, error);
}

/* The hash of the current block is that of the hashes of its tensors that come in with it, and of its codes' (NULL: none). */
static uint64_t besa__block_hash(const besa__writer *w, const uint64_t hash[BESA__BLOCK_TENSORS], const uint64_t *codes)
{
    uint64_t all = BESA__HASH_START;
    for (int i = 0; i < BESA__BLOCK_TENSORS; i++)
        if (besa__coming(w, i)) all = besa__hash(all, &hash[i], sizeof *hash);
    return codes ? besa__hash(all, codes, sizeof *codes) : all;
}

/* The hash of a block as it is on disk; buffer: BESA__CHUNK bytes. */
static besa_result besa__hash_block(besa__writer *w, int64_t block, void *buffer, uint64_t *hash, besa_error *error)
{
    uint64_t one[BESA__BLOCK_TENSORS];
    BESA__TRY(besa__block_bind(&w->current, w->checkpoint, block, error));
    for (int i = 0; i < BESA__BLOCK_TENSORS; i++) {
        const besa_tensor *t = besa__coming(w, i);
        if (t) BESA__TRY(besa__hash_range(w->files[t->file], t->offset, t->bytes, buffer, &one[i], w->partial, error));
    }
    uint64_t codes = 0;
    int has = besa__has_codes(w, block);
    if (has)
        BESA__TRY(besa__hash_range(w->codes->fd, besa__codes_offset(w->codes, block), w->codes->block_bytes, buffer, &codes, w->partial,
                                   error));
    *hash = besa__block_hash(w, one, has ? &codes : NULL);
    return BESA_OK;
}

/* Keep the leading blocks whose bytes on disk are those that were written; of a complete output, all or none. */
static besa_result besa__writer_verify(besa__writer *w, besa_error *error)
{
    void *buffer;
    char ending[BESA__READY_BYTES];
    int64_t good = 0;
    besa_result result = BESA_OK;
    BESA__TRY(besa__malloc(&buffer, BESA__CHUNK, "reading back", error));
    for (; good < w->done; good++) {
        uint64_t hash = 0;
        result = besa__hash_block(w, good, buffer, &hash, error);
        if (w->is_ready) w->finished[good].hash = hash;
        if (result != BESA_OK || hash != w->finished[good].hash) break;
    }
    BESA_FREE(buffer);
    BESA__TRY(result);
    besa__ready_ending(w, ending);
    if (w->is_ready && strcmp(w->partial + strlen(w->partial) + 1 - BESA__READY_BYTES, ending))
        return besa__ready_damaged(w, error);
    if (good == w->done) return BESA_OK;
    w->done = good;
    w->journal_end = w->finished[good].line;
    return ftruncate(w->journal, (off_t)w->journal_end) ? besa__writer_fail(w, BESA__JOURNAL, errno, error) : BESA_OK;
}

/* Turn to block number done. */
static besa_result besa__writer_next(besa__writer *w, besa_error *error)
{
    memset(&w->current, 0, sizeof w->current);
    memset(w->written, 0, sizeof w->written);
    return w->done < w->blocks ? besa__block_bind(&w->current, w->checkpoint, w->done, error) : BESA_OK;
}

static void besa__writer_close(besa__writer *w)
{
    for (int64_t i = 0; w->files && i < w->checkpoint->num_shards; i++)
        if (w->files[i] >= 0) close(w->files[i]);
    if (w->journal >= 0) close(w->journal);
    if (w->directory >= 0) close(w->directory); /* the locks go with them */
    if (w->parent >= 0) close(w->parent);
    for (int64_t i = 0; i < w->num_sides; i++) BESA_FREE(w->sides[i].name);
    BESA_FREE(w->sides);
    BESA_FREE(w->sources);
    BESA_FREE(w->files);
    BESA_FREE(w->prunable);
    BESA_FREE(w->finished);
    BESA_FREE(w->output);
    BESA_FREE(w->partial);
    besa__codes_free(w->codes);
    BESA_FREE(w->source_record);
    BESA_FREE(w->record);
    BESA_FREE(w->card);
    BESA_FREE(w);
}

/* Delete a file of OUT.partial. Returns whether it is gone, or was none of ours. */
static int besa__remove_entry(const besa__writer *w, const char *name)
{
    struct stat st;
    if (fstatat(w->directory, name, &st, AT_SYMLINK_NOFOLLOW)) return errno == ENOENT;
    return !S_ISREG(st.st_mode) || !unlinkat(w->directory, name, 0);
}

/* Delete what runs have made in OUT.partial, and the directory. As long as anything of that is left the journal stays,
 * which says whose it is. That the directory stays, as with a file of somebody else's, is added to *error, which says
 * already why the run ended. */
static void besa__writer_discard(besa__writer *w, besa_error *error)
{
    const besa_checkpoint *c = w->checkpoint;
    char foreign[256];
    int gone = besa__remove_entry(w, BESA__CONFIG);
    if (c->index) gone &= besa__remove_entry(w, c->index);
    for (int64_t i = 0; i < c->num_shards; i++) gone &= besa__remove_entry(w, c->shards[i].name);
    for (int64_t i = 0; i < w->num_sides; i++) gone &= !w->sides[i].as || besa__remove_entry(w, w->sides[i].as);
    gone &= besa__remove_entry(w, BESA__RECORD);
    gone &= besa__remove_entry(w, BESA__CARD);
    if (w->codes) gone &= besa__remove_entry(w, BESA__CODES);
    if (gone) besa__remove_entry(w, BESA__JOURNAL);
    if (!unlinkat(w->parent, w->partial_name, AT_REMOVEDIR) || !error) return;
    besa__find_name(w, w->directory, besa__is_foreign, foreign, NULL);
    size_t length = strlen(error->message);
    besa__write_text(error->message + length, sizeof error->message - length, "; %s stays%s%s%s", w->partial,
                     *foreign ? ": " : "", foreign, *foreign ? " in it is no file of this run; move it away" : "");
}

/* The paths: OUT without a slash at its end, OUT.partial, with room for .RUN.HASH. */
static besa_result besa__writer_name(besa__writer *w, const char *output, const char *fingerprint, besa_error *error)
{
    size_t n = strlen(output), size;
    void *memory;
    if (strchr(fingerprint, '\n') || strlen(fingerprint) > BESA__LINE - 64)
        return besa__fail(error, BESA_ERROR_OPTION, "fingerprint: not one line of up to %d characters", BESA__LINE - 64);
    while (n > 1 && output[n - 1] == '/') n--;
    BESA__TRY(besa__copy_text(&w->output, output, n, "a path", error));
    size = n + sizeof BESA__PARTIAL + BESA__READY_BYTES;
    BESA__TRY(besa__malloc(&memory, size, "a path", error));
    w->partial = (char *)memory;
    besa__write_text(w->partial, size, "%s" BESA__PARTIAL, w->output);
    const char *slash = strrchr(w->output, '/');
    w->name = slash ? slash + 1 : w->output;
    w->partial_name = w->partial + (w->name - w->output);
    w->run = besa__hash(BESA__HASH_START, fingerprint, strlen(fingerprint));
    if (strlen(w->partial_name) + BESA__READY_BYTES <= 256) return BESA_OK;
    return besa__fail(error, BESA_ERROR_OPTION, "%s: a name of %d characters, expected up to %d, as the unfinished output "
                      "has a longer one", w->output, (int)strlen(w->name),
                      257 - (int)sizeof BESA__PARTIAL - BESA__READY_BYTES);
}

/* Memory, and which tensors come in with their blocks. */
static besa_result besa__writer_init(besa__writer *w, besa_error *error)
{
    const besa_checkpoint *c = w->checkpoint;
    void *memory;
    BESA__TRY(besa__malloc(&memory, besa__bytes(w->blocks, sizeof *w->finished), "the journal", error));
    w->finished = (besa__finished *)memset(memory, 0, (size_t)w->blocks * sizeof *w->finished);
    BESA__TRY(besa__malloc(&memory, besa__bytes(c->num_shards, sizeof(int)), "the shards", error));
    w->files = (int *)memset(memory, 0xFF, (size_t)c->num_shards * sizeof(int));
    BESA__TRY(besa__malloc(&memory, (size_t)c->num_tensors, "the tensor table", error));
    w->prunable = (unsigned char *)memset(memory, 0, (size_t)c->num_tensors);
    BESA__TRY(besa__malloc(&memory, (size_t)c->num_tensors * sizeof *w->sources, "the tensor table", error));
    w->sources = (besa__source *)memset(memory, 0, (size_t)c->num_tensors * sizeof *w->sources);
    for (int64_t b = 0; b < w->blocks; b++) {
        BESA__TRY(besa__block_bind(&w->current, c, b, error));
        for (int i = 0; i < BESA__BLOCK_TENSORS; i++)
            if (besa__coming(w, i)) w->prunable[besa__coming(w, i) - c->tensors] = 1;
    }
    return BESA_OK;
}

static besa_result besa__writer_start(besa__writer *w, const char *output, const char *fingerprint, char **notes,
                                      besa_error *error)
{
    BESA__TRY(besa__writer_name(w, output, fingerprint, error));
    BESA__TRY(besa__writer_init(w, error));
    BESA__TRY(besa__writer_open_parent(w, error));
    BESA__TRY(besa__writer_open_directory(w, error));
    BESA__TRY(besa__list_sides(w, notes, error));
    if (w->is_ready) {
        w->copied = 1;
        w->done = w->blocks;
    } else {
        BESA__TRY(besa__journal_open(w, error));
        BESA__TRY(besa__journal_read(w, fingerprint, error));
    }
    BESA__TRY(besa__writer_open_files(w, error));
    BESA__TRY(besa__copy_sides(w, notes, error));
    if (!w->copied) BESA__TRY(besa__writer_copy(w, error));
    else {
        BESA__TRY(besa__writer_verify(w, error));     /* finished blocks by their checksums, */
        BESA__TRY(besa__copy_unpruned(w, error));     /* and what has none is written again */
        BESA__TRY(besa__sync(w, w->directory, ".", error));
    }
    return besa__writer_next(w, error);
}

/* Begin an output, or go on with an unfinished one of the same fingerprint (one line). vectors 1: norms and biases come in
 * with their blocks, as weights do. codes: of which blocks there are any; NULL: none. done_blocks are on disk already. Lines are
 * appended to *notes (NULL to start with, for BESA_FREE); notes may be NULL.
 * Errors: EXISTS, NOT_FOUND, RESUME, READ, WRITE, MEMORY. A failed begin leaves nothing new behind. */
static besa_result besa__writer_open(besa__writer **writer, const besa_checkpoint *checkpoint, const char *output,
                                     const char *fingerprint, int64_t blocks, int vectors, const besa__codes_shape *codes,
                                     int64_t *done_blocks, char **notes, besa_error *error)
{
    void *memory;
    *writer = NULL;
    *done_blocks = 0;
    if (!output || !*output) return besa__fail(error, BESA_ERROR_OPTION, "no output directory given");
    BESA__TRY(besa__malloc(&memory, sizeof **writer, "the writer", error));
    besa__writer *w = (besa__writer *)memset(memory, 0, sizeof **writer);
    w->checkpoint = checkpoint;
    w->blocks = blocks;
    w->vectors = vectors;
    w->parent = w->directory = w->journal = -1;
    besa_result result = codes ? besa__codes_new(&w->codes, checkpoint, codes, error) : BESA_OK;
    if (result == BESA_OK) result = besa__writer_start(w, output, fingerprint, notes, error);
    if (result == BESA_OK) {
        *writer = w;
        *done_blocks = w->done;
        return BESA_OK;
    }
    if (w->locked && (w->worthless || w->created)) besa__writer_discard(w, error);
    else if (w->created && !w->locked) unlinkat(w->parent, w->partial_name, AT_REMOVEDIR);
    besa__writer_close(w);
    return result;
}

/* The next `size` new bytes of one tensor that comes in with the current block; all pieces but the last are multiples of 8.
 * Tensors that never come keep the source's bytes. What was written is synced from time to time, so that no sync takes
 * long. */
static besa_result besa__writer_write(besa__writer *w, const besa_tensor *tensor, const void *bytes, size_t size,
                                      besa_error *error)
{
    int i = 0;
    while (i < BESA__BLOCK_TENSORS && besa__coming(w, i) != tensor) i++;
    if (i == BESA__BLOCK_TENSORS)
        return besa__fail(error, BESA_ERROR_OPTION, "%s: not a prunable weight of block %lld", tensor->name,
                          (long long)w->done);
    BESA_ASSERT(size <= tensor->bytes - w->written[i]);
    const char *name = w->checkpoint->shards[tensor->file].name;
    BESA__TRY(besa__write_at(w, w->files[tensor->file], name, bytes, size, tensor->offset + w->written[i], error));
    w->hash[i] = besa__hash(w->written[i] ? w->hash[i] : BESA__HASH_START, bytes, size);
    w->written[i] += size;
    w->unsynced += size;
    if (w->unsynced < BESA__SYNC) return BESA_OK;
    w->unsynced = 0;
    return besa__sync(w, w->files[tensor->file], name, error);
}

/* The current block is complete: on return it is on disk and in the journal. */
static besa_result besa__writer_block_done(besa__writer *w, int64_t block, besa_error *error)
{
    char line[256];
    if (block != w->done || block >= w->blocks)
        return besa__fail(error, BESA_ERROR_OPTION, "block %lld is not the current one", (long long)block);
    for (int i = 0; i < BESA__BLOCK_TENSORS; i++) {
        const besa_tensor *t = besa__coming(w, i);
        if (!t || w->written[i] == t->bytes) continue;
        w->written[i] = 0;
        besa__writer_saw(w, t, 0, t->data, t->bytes);
        BESA__TRY(besa__writer_write(w, t, t->data, t->bytes, error));
        besa__release_pages(w->checkpoint, t);
    }
    for (int i = 0; i < BESA__BLOCK_TENSORS; i++) {
        const besa_tensor *t = besa__coming(w, i);
        int synced = 0;
        for (int j = 0; j < i && t; j++) synced = synced || (besa__coming(w, j) && besa__coming(w, j)->file == t->file);
        if (t && !synced) BESA__TRY(besa__sync(w, w->files[t->file], w->checkpoint->shards[t->file].name, error));
    }
    int has = besa__has_codes(w, block);
    if (has) BESA__TRY(besa__codes_end(w, error));
    w->finished[block].hash = besa__block_hash(w, w->hash, has ? &w->codes->hash : NULL);
    w->finished[block].line = w->journal_end;
    besa__journal_block(line, sizeof line, &w->finished[block], block);
    BESA__TRY(besa__journal_add(w, line, error));
    w->done++;
    w->unsynced = 0;
    return besa__writer_next(w, error);
}

/* ============================================================================================
 * // >>finish                the sources once more, and the rename
 * ============================================================================================
 * Owns the end of an output: it appears under its name only if the sources are still what was read. */

/* Whether a shard holds what was read of it. */
static besa_result besa__compare_shard(const besa__writer *w, int64_t file, int fd, size_t size, void *buffer,
                                       besa_error *error)
{
    const besa_checkpoint *c = w->checkpoint;
    const besa__shard *shard = c->shards + file;
    uint64_t hash;
    if (size != shard->size) return besa__source_changed(w, shard->name, error);
    BESA__TRY(besa__hash_range(fd, 0, shard->data, buffer, &hash, shard->name, error));
    if (hash != shard->hash) return besa__source_changed(w, shard->name, error);
    for (int64_t i = 0; i < c->num_tensors; i++) {
        const besa_tensor *t = &c->tensors[i];
        if (t->file != file || w->sources[i].bytes < t->bytes) continue;
        BESA__TRY(besa__hash_range(fd, t->offset, t->bytes, buffer, &hash, shard->name, error));
        if (hash != w->sources[i].hash) return besa__source_changed(w, shard->name, error);
    }
    return BESA_OK;
}

/* Look at a source file again. One that has moved is compared with what was read: a shard (file >= 0), or a small file by
 * its hash. */
static besa_result besa__check_source(const besa__writer *w, const char *name, const struct stat *then, int64_t file,
                                      uint64_t small_hash, besa_error *error)
{
    char *path;
    int fd = -1;
    void *buffer = NULL;
    struct stat now;
    size_t size = 0;
    uint64_t hash = 0;
    BESA__TRY(besa__join(&path, w->checkpoint->directory, name, error));
    besa__stat_before(&now, path);
    besa_result result = BESA_OK;
    if (besa__has_moved(then, &now)) {
        result = besa__open_file(&fd, &size, path, error);
        if (result == BESA_ERROR_NOT_FOUND) result = besa__source_changed(w, name, error);
        if (result == BESA_OK) result = besa__malloc(&buffer, BESA__CHUNK, "looking at the source again", error);
        if (result == BESA_OK && file >= 0) result = besa__compare_shard(w, file, fd, size, buffer, error);
        else if (result == BESA_OK) {
            result = besa__hash_range(fd, 0, size, buffer, &hash, path, error);
            if (result == BESA_OK && (size != (size_t)then->st_size || hash != small_hash))
                result = besa__source_changed(w, name, error);
        }
        if (fd >= 0) close(fd);
        BESA_FREE(buffer);
    }
    BESA_FREE(path);
    return result;
}

static uint64_t besa__kept_hash(const besa__kept *kept) { return besa__hash(BESA__HASH_START, kept->bytes, kept->size); }

/* The output is of one state of the source: that which was read is there still. */
static besa_result besa__check_sources(const besa__writer *w, besa_error *error)
{
    const besa_checkpoint *c = w->checkpoint;
    BESA__TRY(besa__check_source(w, BESA__CONFIG, &c->config_file.stat, -1, besa__kept_hash(&c->config_file), error));
    if (c->index)
        BESA__TRY(besa__check_source(w, c->index, &c->index_file.stat, -1, besa__kept_hash(&c->index_file), error));
    for (int64_t i = 0; i < w->num_sides; i++)
        BESA__TRY(besa__check_source(w, w->sides[i].name, &w->sides[i].stat, -1, w->sides[i].hash, error));
    for (int64_t i = 0; i < c->num_shards; i++)
        BESA__TRY(besa__check_source(w, c->shards[i].name, &c->shards[i].stat, i, 0, error));
    return BESA_OK;
}

/* Rename within the parent directory; what has the new name already is not replaced (errno EEXIST). Where the system cannot
 * promise that, an empty directory that comes to be at this very moment is. */
static int besa__rename_new(const besa__writer *w, const char *from, const char *to)
{
    struct stat st;
#if defined(__linux__) && defined(SYS_renameat2)
    const unsigned noreplace = 1;
    if (!syscall(SYS_renameat2, w->parent, from, w->parent, to, noreplace)) return 0;
    if (errno != ENOSYS && errno != EINVAL && errno != ENOTSUP) return -1; /* EINVAL: not on this file system */
#elif defined(__APPLE__) && defined(RENAME_EXCL)
    if (!renameatx_np(w->parent, from, w->parent, to, RENAME_EXCL)) return 0;
    if (errno != ENOTSUP) return -1;
#endif
    if (!fstatat(w->parent, to, &st, AT_SYMLINK_NOFOLLOW)) return errno = EEXIST, -1;
    return renameat(w->parent, from, w->parent, to);
}

/* All is on disk: OUT.partial becomes OUT.partial.RUN.HASH, and then needs no journal. */
static besa_result besa__writer_make_ready(besa__writer *w, besa_error *error)
{
    char ending[BESA__READY_BYTES], ready[256];
    BESA__TRY(besa__sync(w, w->directory, ".", error));
    if (!w->is_ready) {
        besa__ready_ending(w, ending);
        besa__write_text(ready, sizeof ready, "%s%s", w->partial_name, ending);
        if (besa__rename_new(w, w->partial_name, ready))
            return besa__fail(error, BESA_ERROR_WRITE, "%s: renaming to %s: %s", w->partial, ready, strerror(errno));
        memcpy(w->partial + strlen(w->partial), ending, sizeof ending);
        w->is_ready = 1;
    }
    BESA__TRY(besa__sync(w, w->parent, "..", error));
    if (unlinkat(w->directory, BESA__JOURNAL, 0) && errno != ENOENT)
        return besa__writer_fail(w, BESA__JOURNAL, errno, error);
    return besa__sync(w, w->directory, ".", error);
}

/* A text of the run's own, as readable as config.json; of NULL nothing is left that a run before may have written. */
static besa_result besa__write_words(const besa__writer *w, const char *name, const char *text, besa_error *error)
{
    if (text) return besa__write_file(w, name, text, strlen(text), w->checkpoint->config_file.stat.st_mode, error);
    return besa__remove_entry(w, name) ? BESA_OK : besa__writer_fail(w, name, errno, error);
}

static besa_result besa__writer_rename(besa__writer *w, besa_error *error)
{
    const besa__kept *config = &w->checkpoint->config_file;
    if (w->done != w->blocks)
        return besa__fail(error, BESA_ERROR_OPTION, "%s: %lld of %lld blocks are done", w->partial, (long long)w->done,
                          (long long)w->blocks);
    BESA__TRY(besa__check_sources(w, error));
    BESA__TRY(besa__write_words(w, BESA__RECORD, w->record, error));
    BESA__TRY(besa__write_words(w, BESA__CARD, w->card, error));
    /* only with its config does the directory look like a checkpoint */
    BESA__TRY(besa__write_file(w, BESA__CONFIG, config->bytes, config->size, config->stat.st_mode, error));
    BESA__TRY(besa__writer_make_ready(w, error));
    if (besa__rename_new(w, w->partial_name, w->name)) {
        if (errno == EEXIST || errno == ENOTEMPTY || errno == ENOTDIR)
            return besa__fail(error, BESA_ERROR_EXISTS, "%s: has come to exist; the complete output is %s", w->output,
                              w->partial);
        return besa__fail(error, BESA_ERROR_WRITE, "%s: renaming %s: %s", w->output, w->partial, strerror(errno));
    }
    besa_result result = besa__sync(w, w->parent, "..", NULL);
    if (result == BESA_OK) return BESA_OK;
    return besa__fail(error, result, "%s: complete, but its parent directory could not be synced", w->output);
}

/* All blocks are done: OUT.partial becomes OUT. Closes the writer in any case; a failure leaves what can be resumed. */
static besa_result besa__writer_finish(besa__writer *w, besa_error *error)
{
    besa_result result = besa__writer_rename(w, error);
    besa__writer_close(w);
    return result;
}

/* Stop without an output. OUT.partial stays and can be resumed, or is deleted if no block is done, not even by an earlier
 * run. *error says why the run stops, and what cannot be deleted is added to it. NULL, both, are fine. */
static void besa__writer_abandon(besa__writer *w, besa_error *error)
{
    if (!w) return;
    if (!w->done) besa__writer_discard(w, error);
    besa__writer_close(w);
}

/* ============================================================================================
 * // >>report                the report and besa.json
 * ============================================================================================
 * Owns two texts of JSON about one run. What they have in common says what decided the output and how it came out; of that
 * besa.json has sparsities of blocks and layers, and the report everything, with what may differ from one machine, or one
 * attempt, to the next. tests/besa.schema.json describes both. */

/* Text that grows; after a failed allocation text is NULL and everything more is ignored. */
typedef struct besa__text {
    char *text;
    size_t length, room;
} besa__text;

static void besa__append(besa__text *t, const char *format, ...) BESA__PRINTF(2, 3);
static void besa__append(besa__text *t, const char *format, ...)
{
    for (int attempt = 0; t->text && attempt < 2; attempt++) {
        va_list args;
        va_start(args, format);
        size_t wrote = besa__format(t->text + t->length, t->room - t->length, format, &args);
        va_end(args);
        if (wrote < t->room - t->length) {
            t->length += wrote;
            return;
        }
        t->room = 2 * t->room + wrote;
        char *grown = (char *)BESA_REALLOC(t->text, t->room);
        if (!grown) BESA_FREE(t->text);
        t->text = grown;
    }
}

/* JSON has no NaN: null stands for it. */
static void besa__append_number(besa__text *t, const char *key, double value, const char *after)
{
    if (besa__is_finite(value)) besa__append(t, "\"%s\": %.9g%s", key, value, after);
    else besa__append(t, "\"%s\": null%s", key, after);
}

static void besa__append_string(besa__text *t, const char *string)
{
    besa__append(t, "\"");
    for (; *string; string++) {
        unsigned char c = (unsigned char)*string;
        int length = (int)besa__utf8_length((const unsigned char *)string);
        if (length != 1) { /* a file's name may be anything */
            besa__append(t, length ? "%.*s" : "%.*s\\ufffd", length, string);
            string += length > 0 ? length - 1 : 0;
            continue;
        }
        if (c == '\n') besa__append(t, "\\n");
        else if (c == '"' || c == '\\') besa__append(t, "\\%c", c);
        else if (c < 0x20) besa__append(t, "\\u%04x", c);
        else besa__append(t, "%c", c);
    }
    besa__append(t, "\"");
}

static void besa__append_layer(besa__text *t, const besa_layer_report *layer, int index)
{
    double weights = layer->weights > 0 ? (double)layer->weights : 1;
    besa__append(t, "      {\"name\": \"%s\", \"weights\": %lld, \"pruned\": %lld, \"source_zeros\": %lld, ",
                 besa__layers[index].path, (long long)layer->weights, (long long)layer->pruned,
                 (long long)layer->source_zeros);
    besa__append_number(t, "sparsity", (double)layer->pruned / weights, ", ");
    besa__append_number(t, "rate_min", layer->rate_min, ", ");
    besa__append_number(t, "rate_mean", layer->rate_mean, ", ");
    besa__append_number(t, "rate_max", layer->rate_max, ", ");
    besa__append_number(t, "rate_std", layer->rate_std, index + 1 < BESA_LAYERS ? "},\n" : "}\n");
}

static void besa__append_block(besa__text *t, const besa_block_report *b, int64_t index)
{
    besa__append(t, "    {\"block\": %lld, ", (long long)index);
    besa__append_number(t, "sparsity", b->sparsity, ", ");
    besa__append_number(t, "target", b->target, ", ");
    besa__append_number(t, "loss_uniform", b->loss_uniform, ", ");
    besa__append_number(t, "loss_before", b->loss_before, ", ");
    besa__append_number(t, "loss_masks", b->loss_masks, ", ");
    besa__append_number(t, "loss_after", b->loss_after, ", ");
    besa__append_number(t, "loss_all", b->loss_all, ",\n     ");
    besa__append_number(t, "prodigy_d", b->d, ", ");
    besa__append_number(t, "mean_rate", b->mean_rate, ",\n     \"seconds\": {");
    for (int i = 0; i < BESA_PASS_COUNT; i++)
        besa__append_number(t, besa_pass_name((besa_pass)i), b->seconds[i], i + 1 < BESA_PASS_COUNT ? ", " : "},\n     \"layers\": [\n");
    for (int i = 0; i < BESA_LAYERS; i++) besa__append_layer(t, &b->layer[i], i);
    besa__append(t, "     ]}");
}

/* The name of an enum's value, from the row's "a|b|c"; returns buffer. */
static const char *besa__option_word(const besa_option *o, int value, char *buffer, size_t size)
{
    const char *word = o->value;
    for (; value > 0; value--) word += strcspn(word, "|") + 1;
    snprintf(buffer, size, "%.*s", (int)strcspn(word, "|"), word);
    return buffer;
}

/* "key": "string" or null */
static void besa__append_member(besa__text *t, const char *key, const char *string, const char *after)
{
    besa__append(t, "\"%s\": ", key);
    if (string) besa__append_string(t, string);
    else besa__append(t, "null");
    besa__append(t, "%s", after);
}

static void besa__append_sha256(besa__text *t, const char *key, const void *bytes, size_t size, const char *after)
{
    char digits[65];
    besa__sha256(digits, bytes, size);
    besa__append_member(t, key, digits, after);
}

/* A checkpoint by its name and the hash of its config.json; with the record of how it was pruned itself, or NULL. */
static void besa__append_checkpoint(besa__text *t, const char *key, const besa_checkpoint *checkpoint, const char *record)
{
    const besa__kept *config = &checkpoint->config_file;
    besa__append(t, "\"%s\": {", key);
    besa__append_member(t, "name", checkpoint->name, ", ");
    if (checkpoint->is_masks) besa__append_sha256(t, "sha256", checkpoint->shards->base, checkpoint->shards->size, "");
    else besa__append_sha256(t, "config_sha256", config->bytes, config->size, "");
    if (record) besa__append(t, ",\n  \"besa\": %s", record);
    besa__append(t, "},\n  ");
}

/* Token ids (count, seqlen), and the file that they are from. */
static void besa__append_tokens(besa__text *t, const char *count_key, int64_t count, int64_t seqlen, const int32_t *ids,
                                const char *file, const char *sha256)
{
    besa__append_member(t, "file", file ? besa__base_name(file) : NULL, ", ");
    besa__append_member(t, "sha256", sha256 && *sha256 ? sha256 : NULL, ", ");
    besa__append(t, "\"%s\": %lld, \"seqlen\": %lld, ", count_key, (long long)count, (long long)seqlen);
    besa__append_sha256(t, "ids_sha256", ids, (size_t)(count * seqlen) * sizeof *ids, "},\n  ");
}

/* Which layers are fixed, and the sparsities of blocks that were asked for one by one. */
static void besa__append_lists(besa__text *t, const besa_prune_options *o)
{
    if (o->num_fixed) besa__append(t, "\"fixed\": [");
    for (int64_t i = 0; i < o->num_fixed; i++) {
        besa__append(t, "{");
        besa__append_member(t, "pattern", o->fixed[i].pattern, ", ");
        besa__append_number(t, "sparsity", o->fixed[i].sparsity, i + 1 < o->num_fixed ? "}, " : "}],\n  ");
    }
    if (o->num_block_targets) besa__append(t, "\"block_targets\": [");
    for (int64_t i = 0; i < o->num_block_targets; i++)
        besa__append(t, "%.17g%s", o->block_targets[i], i + 1 < o->num_block_targets ? ", " : "],\n  ");
}

/* Version, machine and model. */
static void besa__append_machine(besa__text *t, const besa_backend *be)
{
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    char device[16];
    size_t n = 0;
    for (; n + 1 < sizeof device && ((be->name[n] | 32) >= 'a' && (be->name[n] | 32) <= 'z'); n++) device[n] = (char)(be->name[n] | 32);
    device[n] = 0;
    besa__append(t, "\"besa\": \"%d.%d\",\n  ", BESA_VERSION_MAJOR, BESA_VERSION_MINOR);
    besa__append_member(t, "device", device, ",\n  ");
    besa__append_member(t, "backend", be->name, ",\n  ");
    besa__append_member(t, "activations", dtypes[be->activation_dtype], ",\n  ");
}

static void besa__append_test(besa__text *t, const besa_calibration *c)
{
    if (!c->test_windows) return;
    besa__append(t, "\"test\": {");
    besa__append_tokens(t, "windows", c->test_windows, c->test_seqlen, c->test_ids, c->test_file, c->test_sha256);
}

/* What decided an output, but for the options that are numbers: members, each with a comma behind it. source_record: besa.json
 * of the source, or NULL. The caller frees it; NULL without memory. */
static char *besa__record_begin(const besa_checkpoint *checkpoint, const besa_backend *be, const besa_calibration *c,
                                const besa_prune_options *o, const char *source_record)
{
    besa__text t = {(char *)BESA_MALLOC(1024), 0, 1024};
    besa__append_machine(&t, be);
    besa__append_checkpoint(&t, "source", checkpoint, source_record);
    besa__append_member(&t, "method", besa_method_name(o->method), ",\n  ");
    besa__append_member(&t, "preset", o->preset, ",\n  ");
    if (o->masks) besa__append_checkpoint(&t, "masks", o->masks, NULL);
    besa__append(&t, "\"calibration\": {\"seed\": %llu, ", (unsigned long long)c->seed);
    besa__append_tokens(&t, "nsamples", c->nsamples, c->seqlen, c->ids, c->file, c->sha256);
    besa__append_test(&t, c);
    besa__append_lists(&t, o);
    return t.text;
}

BESA_API besa_result besa_report_measured(besa_report *report, const besa_checkpoint *checkpoint, const besa_backend *be,
                                          const besa_calibration *calibration, double perplexity, const double *nll,
                                          besa_error *error)
{
    besa__text t = {(char *)BESA_MALLOC(1024), 0, 1024};
    memset(report, 0, sizeof *report);
    report->measured = 1;
    report->perplexity = perplexity;
    besa__append_machine(&t, be);
    besa__append_checkpoint(&t, "source", checkpoint, NULL);
    besa__append_test(&t, calibration);
    besa__append(&t, "\"nll\": [");
    for (int64_t i = 0; i < calibration->test_windows; i++) besa__append(&t, i ? ", %.9g" : "%.9g", nll[i]);
    besa__append(&t, "],\n  ");
    report->record = t.text;
    return t.text ? BESA_OK : besa__fail(error, BESA_ERROR_MEMORY, "out of memory for the report");
}

/* What the run was asked for, an option a member; those that it does not look at are left out. */
static void besa__append_options(besa__text *t, const besa_prune_options *options)
{
    const char *between = "";
    besa__append(t, "\"options\": {");
    for (const besa_option *o = besa__options; o->name; o++) {
        double value = besa__option_get(o, (const unsigned char *)options + o->offset);
        char word[32];
        if (!besa__option_used(o, options)) continue;
        besa__append(t, "%s", between);
        between = ", ";
        if (o->kind == BESA_OPTION_ENUM)
            besa__append(t, "\"%s\": \"%s\"", o->name, besa__option_word(o, (int)value, word, sizeof word));
        else besa__append_number(t, o->name, value, "");
    }
    besa__append(t, "}");
}

/* What besa.json and the report begin with; a comma follows. */
static besa__text besa__append_common(const besa_report *report)
{
    besa__text t = {(char *)BESA_MALLOC(4096), 0, 4096};
    besa__append(&t, "{\n  %s", report->record ? report->record : "");
    if (!report->measured) {
        besa__append_options(&t, &report->options);
        besa__append(&t, ",\n  ");
        besa__append_number(&t, "target", report->target, ",\n  ");
        besa__append_number(&t, "sparsity", report->sparsity, ",\n  ");
        besa__append(&t, "\"weights\": %lld,\n  \"pruned\": %lld,\n  ", (long long)report->weights, (long long)report->pruned);
    }
    if (report->perplexity > 0) besa__append_number(&t, "perplexity", report->perplexity, ",\n  ");
    if (report->dense_perplexity > 0) besa__append_number(&t, "dense_perplexity", report->dense_perplexity, ",\n  ");
    return t;
}

/* Seconds of every pass over all blocks, and its FLOP where they are known. */
static void besa__append_passes(besa__text *t, const besa_report *report)
{
    const besa_plan_result *plan = report->plan;
    besa__append(t, "\"passes\": {");
    for (int i = 0; i < BESA_PASS_COUNT; i++) {
        double seconds = 0;
        for (int64_t b = 0; b < report->num_blocks; b++) seconds += report->block[b].seconds[i];
        besa__append(t, "%s\"%s\": {", i ? ", " : "", besa_pass_name((besa_pass)i));
        if (plan) besa__append_number(t, "flop", plan->pass_flop[i], ", ");
        besa__append_number(t, "seconds", seconds, "}");
    }
    besa__append(t, "},\n  ");
    if (!plan) return;
    besa__append_number(t, "test_flop", plan->test_flop, ",\n  ");
    besa__append_number(t, "flop", plan->flop, ",\n  ");
    besa__append(t, "\"device_bytes\": %llu,\n  \"host_bytes\": %llu,\n  \"micro_batch\": %lld,\n  ", (unsigned long long)plan->device_bytes,
                 (unsigned long long)plan->host_bytes, (long long)plan->micro_batch);
}

BESA_API char *besa_report_json(const besa_report *report)
{
    besa__text t = besa__append_common(report);
    besa__append_member(&t, "command", report->command, ",\n  ");
    if (report->threads) besa__append(&t, "\"threads\": %d,\n  ", report->threads);
    besa__append_number(&t, "seconds", report->seconds, ",\n  ");
    if (!report->measured) {
        besa__append_passes(&t, report);
        besa__append(&t, "\"resumed_blocks\": %lld,\n  ", (long long)report->resumed_blocks);
    }
    besa__append_member(&t, "notes", report->notes ? report->notes : "", ",\n  \"blocks\": [");
    for (int64_t i = 0; i < report->num_blocks; i++) {
        besa__append(&t, i ? ",\n" : "\n");
        besa__append_block(&t, &report->block[i], i);
    }
    besa__append(&t, "\n  ]\n}\n");
    return t.text;
}

/* The text of besa.json, for BESA_FREE; NULL without memory. */
static char *besa__record_json(const besa_report *report)
{
    besa__text t = besa__append_common(report);
    besa__append(&t, "\"blocks\": [");
    for (int64_t i = 0; i < report->num_blocks; i++) {
        const besa_block_report *b = &report->block[i];
        besa__append(&t, "%s\n    {\"block\": %lld, ", i ? "," : "", (long long)i);
        besa__append_number(&t, "target", b->target, ", ");
        besa__append_number(&t, "sparsity", b->sparsity, ", \"layers\": [");
        for (int k = 0; k < BESA_LAYERS; k++) {
            const besa_layer_report *layer = &b->layer[k];
            besa__append(&t, "%s\n      {\"name\": \"%s\", \"weights\": %lld, \"pruned\": %lld, ", k ? "," : "",
                         besa__layers[k].path, (long long)layer->weights, (long long)layer->pruned);
            besa__append_number(&t, "sparsity", (double)layer->pruned / (double)layer->weights, "}");
        }
        besa__append(&t, "\n    ]}");
    }
    besa__append(&t, "\n  ]\n}\n");
    return t.text;
}

BESA_API void besa_report_free(besa_report *report)
{
    if (!report) return;
    BESA_FREE(report->block);
    BESA_FREE(report->notes);
    BESA_FREE(report->window);
    BESA_FREE(report->kl);
    BESA_FREE(report->record);
    memset(report, 0, sizeof *report);
}

/* ============================================================================================
 * // >>mask-files            rates and masks of a pruned checkpoint, in a file of their own
 * ============================================================================================
 * Owns the file that besa_masks_save describes. All of it follows from the zeros of a checkpoint, so that it can be made at any
 * time, and is the same however the checkpoint came about. Tensors of a kind follow one another: all of 4 bytes come first. */

enum { BESA__KIND_ALPHA, BESA__KIND_N, BESA__KIND_MASK, BESA__MASK_KINDS };

typedef struct besa__mask_file {
    const besa_checkpoint *checkpoint;
    FILE *file;
    int what;
    int32_t *n;                                 /* of every row of all layers */
    unsigned char *bits;                        /* (row_bytes) of one row */
    size_t row_bytes;
} besa__mask_file;

static int besa__has_kind(const besa__mask_file *m, int kind)
{
    return (m->what & (kind == BESA__KIND_MASK ? BESA_FILE_MASKS : BESA_FILE_RATES)) != 0;
}

/* The file's header, filled up with blanks to a multiple of 8. */
static void besa__mask_header(const besa__mask_file *m, besa__text *t)
{
    static const struct { const char *name, *dtype; } kinds[BESA__MASK_KINDS] = {{"alpha", "F32"}, {"n", "I32"}, {"mask", "U8"}};
    uint64_t at = 0;
    char name[128];
    besa__append(t, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int kind = 0; kind < BESA__MASK_KINDS; kind++)
        for (int64_t b = 0; b < m->checkpoint->config.num_hidden_layers && besa__has_kind(m, kind); b++)
            for (int i = 0; i < BESA_LAYERS; i++) {
                int64_t rows, columns;
                besa_block_layer(&m->checkpoint->config.block, i, &rows, &columns);
                columns = kind == BESA__KIND_MASK ? besa__parts(columns, 8) : 1;
                uint64_t bytes = (uint64_t)(rows * columns) * (kind == BESA__KIND_MASK ? 1 : 4);
                besa__layer_tensor_name(name, sizeof name, &m->checkpoint->config, b, i, kinds[kind].name);
                besa__append(t, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld", name, kinds[kind].dtype, (long long)rows);
                if (kind == BESA__KIND_MASK) besa__append(t, ",%lld", (long long)columns);
                besa__append(t, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at, (unsigned long long)(at + bytes));
                at += bytes;
            }
    besa__append(t, "}");
    while (t->text && t->length % 8) besa__append(t, " ");
}

/* The weights of a row that are 0, and in bits (ceil(C / 8)) those that are not. */
static int32_t besa__row_mask(const besa_tensor *tensor, int64_t row, unsigned char *bits)
{
    size_t size = besa_dtype_size(tensor->dtype);
    int64_t columns = tensor->shape[1];
    const unsigned char *at = (const unsigned char *)tensor->data + (size_t)(row * columns) * size;
    int32_t zeros = 0;
    memset(bits, 0, (size_t)besa__parts(columns, 8));
    for (int64_t j = 0; j < columns; j++, at += size) {
        uint32_t value = 0;                     /* of either sign, as floats are stored from the lowest byte on */
        memcpy(&value, at, size);
        int kept = (value << (33 - 8 * size)) != 0;
        bits[j / 8] = (unsigned char)(bits[j / 8] | kept << (j % 8));
        zeros += !kept;
    }
    return zeros;
}

/* Go over all rows: count their zeros, or write their masks. Returns whether all was written. */
static int besa__walk_masks(const besa__mask_file *m, int write)
{
    int32_t *n = m->n;
    int good = 1;
    for (int64_t b = 0; b < m->checkpoint->config.num_hidden_layers; b++)
        for (int i = 0; i < BESA_LAYERS; i++) {
            const besa_tensor *tensor = besa_checkpoint_layer(m->checkpoint, b, i);
            for (int64_t r = 0; r < tensor->shape[0]; r++) {
                size_t bytes = (size_t)besa__parts(tensor->shape[1], 8);
                *n++ = besa__row_mask(tensor, r, m->bits);
                if (write) good = good && fwrite(m->bits, 1, bytes, m->file) == bytes;
            }
            besa__release_pages(m->checkpoint, tensor);
        }
    return good;
}

/* alpha or n of all rows. */
static int besa__write_rates(const besa__mask_file *m, int kind)
{
    const int32_t *n = m->n;
    int good = 1;
    for (int64_t b = 0; b < m->checkpoint->config.num_hidden_layers; b++)
        for (int i = 0; i < BESA_LAYERS; i++) {
            int64_t rows, columns;
            besa_block_layer(&m->checkpoint->config.block, i, &rows, &columns);
            for (int64_t r = 0; r < rows; r++, n++) {
                float alpha = (float)((double)*n / (double)columns);
                good = good && fwrite(kind == BESA__KIND_N ? (const void *)n : (const void *)&alpha, 4, 1, m->file) == 1;
            }
        }
    return good;
}

static int besa__write_mask_file(const besa__mask_file *m, const besa__text *header)
{
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header->length >> (8 * i) & 255);
    if (fwrite(length, 1, 8, m->file) != 8 || fwrite(header->text, 1, header->length, m->file) != header->length) return 0;
    if (m->what & BESA_FILE_RATES) {
        besa__walk_masks(m, 0);
        if (!besa__write_rates(m, BESA__KIND_ALPHA) || !besa__write_rates(m, BESA__KIND_N)) return 0;
    }
    if (m->what & BESA_FILE_MASKS && !besa__walk_masks(m, 1)) return 0;
    return fflush(m->file) == 0 && (fsync(fileno(m->file)) == 0 || errno == EINVAL || errno == ENOTSUP);
}

/* The memory that a file takes; n is NULL still. */
static besa_result besa__mask_file_init(besa__mask_file *m, const besa_checkpoint *checkpoint, int what, besa_error *error)
{
    void *memory;
    int64_t all = 0;
    memset(m, 0, sizeof *m);
    m->checkpoint = checkpoint;
    m->what = what;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&checkpoint->config.block, i, &rows, &columns);
        all += rows;
        if (m->row_bytes < (size_t)besa__parts(columns, 8)) m->row_bytes = (size_t)besa__parts(columns, 8);
    }
    all = besa__product(all, checkpoint->config.num_hidden_layers);
    BESA__TRY(besa__malloc(&memory, besa__bytes(all, sizeof *m->n), "counts of rows", error));
    m->n = (int32_t *)memory;
    BESA__TRY(besa__malloc(&memory, m->row_bytes, "a row's mask", error));
    m->bits = (unsigned char *)memory;
    return BESA_OK;
}

BESA_API besa_result besa_masks_save(const besa_checkpoint *checkpoint, const char *file, int what, besa_error *error)
{
    besa__mask_file m;
    void *memory = NULL;
    size_t size = strlen(file) + sizeof BESA__PARTIAL;
    besa__text header = {(char *)BESA_MALLOC(4096), 0, 4096};
    besa_result result = besa__mask_file_init(&m, checkpoint, what, error);
    if (result == BESA_OK) besa__mask_header(&m, &header);
    if (result == BESA_OK && !header.text) result = besa__fail(error, BESA_ERROR_MEMORY, "%s: out of memory for its header", file);
    if (result == BESA_OK) result = besa__malloc(&memory, size, "a path", error);
    if (result == BESA_OK) {
        char *partial = (char *)memory;
        besa__write_text(partial, size, "%s" BESA__PARTIAL, file);
        m.file = fopen(partial, "wb");
        int good = m.file && besa__write_mask_file(&m, &header), reason = errno;
        if (m.file && fclose(m.file)) good = 0, reason = errno;
        if (good && rename(partial, file)) good = 0, reason = errno;
        if (!good && m.file) unlink(partial);
        if (!good) result = besa__fail(error, BESA_ERROR_WRITE, "%s: %s", partial, strerror(reason));
    }
    BESA_FREE(memory);
    BESA_FREE(header.text);
    BESA_FREE(m.n);
    BESA_FREE(m.bits);
    return result;
}

/* The mask of a block's layer; NULL with a message where there is none of its shape. */
static const besa_tensor *besa__mask_of(const besa_checkpoint *masks, int64_t block, int layer, besa_error *error)
{
    char name[128];
    int64_t rows, columns;
    besa__layer_tensor_name(name, sizeof name, &masks->config, block, layer, "mask");
    besa_block_layer(&masks->config.block, layer, &rows, &columns);
    const besa_tensor *t = besa_checkpoint_find(masks, name);
    if (t && !strcmp(t->dtype_name, "U8") && t->ndim == 2 && t->shape[0] == rows && t->shape[1] == besa__parts(columns, 8)) return t;
    besa__fail(error, BESA_ERROR_TENSOR, "%s: %s is %s, expected U8 of %lld x %lld: a bit for every weight", masks->shards->name, name,
               t ? "of another shape or type" : "missing", (long long)rows, (long long)besa__parts(columns, 8));
    return NULL;
}

static besa_result besa__masks_load(besa_checkpoint *masks, const char *file, besa_error *error)
{
    void *memory;
    const char *name = besa__base_name(file);
    size_t n = (size_t)(name - file);
    BESA__TRY(besa__copy_text(&masks->directory, n ? file : ".", n ? n : 1, "a path", error));
    BESA__TRY(besa__copy_text(&masks->name, name, strlen(name), "a name", error));
    BESA__TRY(besa__malloc(&memory, sizeof(besa__shard), "a file", error));
    masks->shards = (besa__shard *)memset(memory, 0, sizeof(besa__shard));
    masks->num_shards = 1;
    BESA__TRY(besa__copy_text(&masks->shards->name, name, strlen(name), "a name", error));
    BESA__TRY(besa__map_shard(masks, 0, error));
    BESA__TRY(besa__sort_tensors(masks, error));
    for (int64_t b = 0; b < masks->config.num_hidden_layers; b++)
        for (int i = 0; i < BESA_LAYERS; i++)
            if (!besa__mask_of(masks, b, i, error)) return BESA_ERROR_TENSOR;
    return BESA_OK;
}

BESA_API besa_result besa_masks_open(besa_checkpoint **masks, const char *file, const besa_checkpoint *model, besa_error *error)
{
    void *memory;
    *masks = NULL;
    if (!file || !*file) return besa__fail(error, BESA_ERROR_OPTION, "no file of masks given");
    BESA__TRY(besa__malloc(&memory, sizeof **masks, "masks", error));
    besa_checkpoint *opened = (besa_checkpoint *)memset(memory, 0, sizeof **masks);
    opened->config = model->config;
    opened->is_masks = 1;
    besa_result result = besa__masks_load(opened, file, error);
    if (result == BESA_OK) *masks = opened;
    else besa_checkpoint_close(opened);
    return result;
}

/* ============================================================================================
 * // >>background            work that waits for files, in a thread of its own
 * ============================================================================================
 * Owns a queue of jobs that are done one after the other. Where the CUDA backend is built a POSIX thread does them, so that the
 * thread that launches kernels waits for no disk; elsewhere, and with BESA_NO_THREADS, a job is done when it is given. */

#if defined(BESA_CUDA) && !defined(BESA_NO_THREADS)
#define BESA__THREADS
#include <pthread.h>
#endif

enum { BESA__JOBS = 8 /* that may wait */ };

/* size bytes of a tensor from byte `at` on, in memory; or, where that is all, the end of a block. */
typedef struct besa__job {
    besa_result (*work)(void *user, const struct besa__job *job, besa_error *error);
    void *user;
    const besa_tensor *tensor;
    void *memory;
    size_t at, size;
    int layer;
    int64_t block;
    double *seconds;                            /* what it took is added here */
} besa__job;

typedef struct besa__background {
    besa__job job[BESA__JOBS];                  /* number n is in n % BESA__JOBS */
    int64_t given, done;                        /* how many: the next one's number; all before it are done */
    besa_result result;                         /* the first failure: nothing is done after it */
    besa_error error;
    int has_thread, stop;
#ifdef BESA__THREADS
    pthread_t thread;
    pthread_mutex_t lock;                       /* over all of the above */
    pthread_cond_t change;
#endif
} besa__background;

static besa_result besa__background_work(besa__background *b, int64_t number, besa_error *error)
{
    const besa__job *job = &b->job[number % BESA__JOBS];
    double start = besa__seconds();
    besa_result result = job->work(job->user, job, error);
    *job->seconds += besa__seconds() - start;
    return result;
}

#ifdef BESA__THREADS
static void besa__background_lock(besa__background *b) { if (b->has_thread) pthread_mutex_lock(&b->lock); }
static void besa__background_unlock(besa__background *b) { if (b->has_thread) pthread_mutex_unlock(&b->lock); }
static void besa__background_pause(besa__background *b) { pthread_cond_wait(&b->change, &b->lock); }
static void besa__background_tell(besa__background *b) { if (b->has_thread) pthread_cond_broadcast(&b->change); }

static void *besa__background_main(void *user)
{
    besa__background *b = (besa__background *)user;
    besa__background_lock(b);
    while (b->done < b->given || !b->stop) {
        besa_error error;
        besa_result result = b->result;
        if (b->done == b->given) {
            besa__background_pause(b);
            continue;
        }
        besa__background_unlock(b);
        if (result == BESA_OK) result = besa__background_work(b, b->done, &error);
        besa__background_lock(b);
        if (b->result == BESA_OK && result != BESA_OK) {
            b->result = result;
            b->error = error;
        }
        b->done++;
        besa__background_tell(b);
    }
    besa__background_unlock(b);
    return NULL;
}

static void besa__background_create(besa__background *b)
{
    if (pthread_mutex_init(&b->lock, NULL)) return;
    if (!pthread_cond_init(&b->change, NULL)) {
        b->has_thread = 1; /* before the thread looks */
        if (!pthread_create(&b->thread, NULL, besa__background_main, b)) return;
        b->has_thread = 0;
        pthread_cond_destroy(&b->change);
    }
    pthread_mutex_destroy(&b->lock);
}

static void besa__background_join(besa__background *b)
{
    pthread_join(b->thread, NULL);
    pthread_cond_destroy(&b->change);
    pthread_mutex_destroy(&b->lock);
}
#else
static void besa__background_lock(besa__background *b) { (void)b; }
static void besa__background_unlock(besa__background *b) { (void)b; }
static void besa__background_pause(besa__background *b) { (void)b; }
static void besa__background_tell(besa__background *b) { (void)b; }
static void besa__background_create(besa__background *b) { (void)b; }
static void besa__background_join(besa__background *b) { (void)b; }
#endif

/* Where the system has no thread to give, jobs are done as they are given. */
static void besa__background_start(besa__background *b)
{
    memset(b, 0, sizeof *b);
    besa__background_create(b);
}

/* Whether the first n jobs are done. */
static int besa__background_has(besa__background *b, int64_t n)
{
    besa__background_lock(b);
    int has = b->done >= n;
    besa__background_unlock(b);
    return has;
}

/* The first n jobs are done; the first failure of any. */
static besa_result besa__background_wait(besa__background *b, int64_t n, besa_error *error)
{
    besa__background_lock(b);
    while (b->done < n) besa__background_pause(b);
    besa_result result = b->result;
    if (result != BESA_OK && error) *error = b->error;
    besa__background_unlock(b);
    return result;
}

/* One job more; waits where too many do. */
static besa_result besa__background_give(besa__background *b, const besa__job *job, besa_error *error)
{
    BESA__TRY(besa__background_wait(b, b->given - BESA__JOBS + 1, error));
    b->job[b->given % BESA__JOBS] = *job;
    besa__background_lock(b);
    b->given++;
    besa__background_tell(b);
    besa__background_unlock(b);
    if (b->has_thread) return BESA_OK;
    b->result = besa__background_work(b, b->done, &b->error);
    b->done++;
    return besa__background_wait(b, b->done, error);
}

/* What was given is done, and the thread is gone. Stopping twice is fine. */
static void besa__background_stop(besa__background *b)
{
    if (!b->has_thread) return;
    besa__background_lock(b);
    b->stop = 1;
    besa__background_tell(b);
    besa__background_unlock(b);
    besa__background_join(b);
    b->has_thread = 0;
}

/* ============================================================================================
 * // >>run                   the whole model, block by block (level 1): layout, opening, closing
 * ============================================================================================
 * Owns one block's weights on the device, the way of blocks in and out, and the streams of activations that pass
 * through; calls the pruner, the checkpoint and the writer. One layout function places every array, and the plan is that
 * function run on nothing.
 *
 * Where the device has memory of its own, there are two of each: while a block computes, the next one's weights come in and
 * the last one's results go out, piece by piece through pinned host memory, a share at every tick of the pruner. */

#define BESA__VOCAB_CHUNK 4096                  /* rows of the output head at a time */
#define BESA__STATES 9                          /* of a position: nll_state, divergence, best */

/* Events of the run's streams, after those of its pruner. */
enum { BESA__EVENT_X = BESA__PRUNER_EVENTS, BESA__EVENT_DENSE = BESA__EVENT_X + BESA__STREAM_EVENTS,
       BESA__EVENT_TEST = BESA__EVENT_DENSE + BESA__STREAM_EVENTS };

/* A block's weights and vectors on the device. */
typedef struct besa__room {
    void *weight[BESA_LAYERS];
    float *vector[BESA_VECTORS];
} besa__room;

/* Rope tables of as many positions, for layers without a window or all, and for those with one where these have a rope of
 * their own. */
typedef struct besa__turns {
    int64_t positions;                          /* 0: there are none */
    float *cosine[2], *sine[2];
} besa__turns;

enum { BESA__SLOTS = 2 /* pieces of weights in pinned host memory, each way */ };

/* How far a block's weights have come: all of the layers before `layer`, and `at` bytes of that one; so many pieces. */
typedef struct besa__cursor {
    int layer;
    size_t at, moved;                           /* bytes: of this layer, of all */
    int64_t pieces;                             /* number n goes through slot n % BESA__SLOTS */
} besa__cursor;

/* A block's weights on their way. In: a piece begins when the host is to read it, and ends when it goes up. Out: it begins when
 * it comes down, and ends when it is given to be written. */
typedef struct besa__transfer {
    int64_t block;                              /* -1: none */
    besa__block_tensors tensors;
    besa__cursor begun, ended;
    size_t total;                               /* bytes */
    int64_t job[BESA__SLOTS];                   /* jobs given with that of the slot's piece */
    int64_t last;                               /* out: with the end of the block; 0: not yet given */
    double seconds, copying;                    /* of its jobs; that the host has spent on copies beside them */
} besa__transfer;

typedef struct besa__run {
    const besa_checkpoint *checkpoint;
    const besa_config *config;
    besa__model model;
    besa_dtype dtype;                           /* of weights on the device: the file's, or see besa__run_dtype */
    besa_backend *be, cpu;                      /* cpu: what be points to where the caller gave none */
    besa__workspace callers;                    /* the backend's workspace before the run */
    int has_pruner, has_dense, has_test;
    besa_pruner pruner;
    besa__stream calibration, dense, test;      /* this rank's sequences */
    const int32_t *ids, *test_ids;              /* of calibration and dense, all ranks'; of test, this rank's. Host */
    int64_t windows;                            /* of the test, all ranks' */
    besa__turns turns, test_turns;              /* rope of all sequences; of the test's, where it depends on their length */
    double target;                              /* of the model */
    besa__writer *writer;                       /* NULL: nothing is written */
    besa__background background;                /* reads and writes pieces */
    besa__transfer in, out;
    /* device */
    void *device;
    besa__room room[2];                         /* block b lies in b % 2, or in 0 with unified memory: b is out before
                                                   b + 2 comes in */
    void *pruned[2][BESA_LAYERS];               /* likewise */
    void *rows;                                 /* embedding rows of one chunk, or head rows, in the file's dtype */
    besa_activations acts;                      /* the test stream's */
    void *workspace;
    size_t workspace_bytes;
    float *logits, *nll_state;
    int32_t *targets;
    double *nll_sums;
    const besa_reference *against;              /* NULL: none */
    besa__model against_model;
    void *against_x, *against_rows;             /* what its head reads of a chunk of tokens, and rows of its head */
    float *against_logits, *divergence;
    int32_t *best;
    /* host */
    void *host;
    void *staging;                              /* rows, tables and sums */
    float *vectors;                             /* norms and biases on their way in */
    void *piece_in[BESA__SLOTS], *piece_out[BESA__SLOTS]; /* of weights; NULL with unified memory */
    float *scales[BESA_LAYERS], *zeros[BESA_LAYERS]; /* (R,G) with bits: the grids of the block that goes out */
} besa__run;

/* ---- layout -------------------------------------------------------------------------------- */

static int64_t besa__vocab_chunk(const besa__run *run)
{
    return besa__min(run->config->vocab_size, BESA__VOCAB_CHUNK);
}

static void besa__turns_place(besa__turns *turns, const besa_config *config, besa__arena *arena)
{
    int64_t count = besa__product(turns->positions, besa__rotary_dim(&config->block) / 2);
    for (int i = 0; i <= config->has_local_rope && turns->positions; i++) {
        turns->cosine[i] = besa__take_floats(arena, count);
        turns->sine[i] = besa__take_floats(arena, count);
    }
}

/* One block's weights and vectors, and with a pruner its pruned weights; two of each where transfers overlap. */
static void besa__run_place_blocks(besa__run *run, besa__arena *arena)
{
    const besa_block_shape *s = &run->config->block;
    for (int r = 0; r < (run->be->unified_memory ? 1 : 2); r++) {
        besa__room *room = &run->room[r];
        for (int i = 0; i < BESA_LAYERS; i++) {
            int64_t rows, columns;
            besa_block_layer(s, i, &rows, &columns);
            uint64_t bytes = besa__bytes(besa__product(rows, columns), besa_dtype_size(run->dtype));
            room->weight[i] = besa__take(arena, bytes);
            if (run->has_pruner) run->pruned[r][i] = besa__take(arena, bytes);
        }
        for (int i = 0; i < BESA_VECTORS; i++) room->vector[i] = besa__take_floats(arena, besa__vector_count(s, i));
    }
    besa__turns_place(&run->turns, run->config, arena);
    besa__turns_place(&run->test_turns, run->config, arena);
}

/* The head of the model that the test is held against. */
static void besa__run_place_against(besa__run *run, besa__arena *arena, int64_t chunk_tokens, int64_t tokens)
{
    int64_t d = besa_checkpoint_config(run->against->checkpoint)->block.hidden_size, ids = besa__vocab_chunk(run);
    run->against_x = besa__take(arena, besa__bytes(besa__product(chunk_tokens, d), besa_dtype_size(run->be->activation_dtype)));
    run->against_rows = besa__take(arena, besa__bytes(besa__product(ids, d), besa_dtype_size(run->against_model.head->dtype)));
    run->against_logits = besa__take_floats(arena, besa__product(chunk_tokens, ids));
    run->divergence = besa__take_floats(arena, besa__product(4, tokens));
    run->best = (int32_t *)besa__take_array(arena, besa__product(2, tokens), sizeof(int32_t));
}

/* The test stream's activations and what the head needs. */
static void besa__run_place_test(besa__run *run, besa__arena *arena, besa__arena *host)
{
    const besa_block_shape *s = &run->config->block;
    int64_t chunk_tokens = run->test.micro_batch * run->test.seqlen, tokens = run->test.count * run->test.seqlen;
    besa_workload work = besa_block_workload(s, run->test.micro_batch, run->test.seqlen);
    work.rows = besa__max(work.rows, besa__vocab_chunk(run));
    if (run->against)
        work.columns = besa__max(work.columns, besa_checkpoint_config(run->against->checkpoint)->block.hidden_size);
    besa__stream_place(&run->test, arena, host);
    besa__activations_place(&run->acts, arena, run->be->activation_dtype, s, run->config->qk_norm, chunk_tokens, 0);
    run->logits = besa__take_floats(arena, besa__product(chunk_tokens, besa__vocab_chunk(run)));
    run->nll_state = besa__take_floats(arena, besa__product(3, tokens));
    run->targets = (int32_t *)besa__take_array(arena, tokens, sizeof(int32_t));
    run->nll_sums = (double *)besa__take_array(arena, run->test.count, sizeof(double));
    if (run->against) besa__run_place_against(run, arena, chunk_tokens, tokens);
    run->workspace_bytes = run->be->workspace_size(run->be, &work);
    run->workspace = besa__take(arena, run->workspace_bytes);
}

/* Bytes of weights that are staged at a time. */
static size_t besa__piece_bytes(const besa__run *run)
{
    uint64_t largest = besa__bytes(besa__largest_layer(&run->config->block), besa_dtype_size(run->dtype));
    return largest < BESA__CHUNK ? ((size_t)largest + 7) / 8 * 8 : BESA__CHUNK;
}

/* Host memory: the largest of embedding rows, the rope tables, and the test's targets; a block's vectors; pieces of
 * weights. */
static void besa__run_place_host(besa__run *run, besa__arena *host)
{
    const besa_block_shape *s = &run->config->block;
    int64_t vectors = besa__vector_counts(s);
    int64_t tables = besa__product(besa__max(run->turns.positions, run->test_turns.positions), besa__rotary_dim(s));
    int64_t rows = BESA__CHUNK_TOKENS * s->hidden_size, test = run->test.count * run->test.seqlen; /* 2 or more a window */
    int64_t states = run->against ? BESA__STATES * run->test.seqlen : 0;
    run->staging = besa__take_floats(host, besa__max(besa__max(rows, tables), run->has_test ? besa__max(test, states) : 0));
    run->vectors = besa__take_floats(host, vectors);
    for (int i = 0; i < BESA_LAYERS && run->has_pruner && run->pruner.options.bits; i++) {
        int64_t grids = besa__layer_grids(s, i, run->pruner.options.group_size);
        run->scales[i] = besa__take_floats(host, grids);
        run->zeros[i] = besa__take_floats(host, grids);
    }
    if (run->be->unified_memory) return;
    for (int i = 0; i < BESA__SLOTS; i++) {
        run->piece_in[i] = besa__take(host, besa__piece_bytes(run));
        if (run->has_pruner) run->piece_out[i] = besa__take(host, besa__piece_bytes(run));
    }
}

/* Rows of the embedding or the head that are on the device at a time. */
static int64_t besa__staged_rows(const besa__run *run)
{
    return besa__max(BESA__CHUNK_TOKENS, besa__vocab_chunk(run));
}

/* Place every array of the run; arenas without memory only count. */
static void besa__run_place(besa__run *run, besa__arena *arena, besa__arena *host)
{
    besa__run_place_host(run, host);
    besa__run_place_blocks(run, arena);
    run->rows = besa__take_floats(arena, besa__product(besa__staged_rows(run), run->config->block.hidden_size));
    run->calibration.micro_batch = run->dense.micro_batch = run->pruner.micro_batch;
    if (run->has_pruner) besa__stream_place(&run->calibration, arena, host);
    if (run->has_dense) besa__stream_place(&run->dense, arena, host);
    if (run->has_test) besa__run_place_test(run, arena, host);
    if (run->has_pruner) besa__pruner_place(&run->pruner, arena, host);
}

/* Levels of a run: activations move to the host, those first that are used least. */
enum { BESA__LEVEL_DEVICE, BESA__LEVEL_TEST, BESA__LEVEL_YREF, BESA__LEVEL_X, BESA__LEVELS };

static int besa__levels(const besa_backend *be) { return be->unified_memory ? 1 : BESA__LEVELS; }

static uint64_t besa__run_size(void *user, int level)
{
    besa__arena device = {NULL, 0}, host = {NULL, 0};
    besa__run *run = (besa__run *)user;
    if (run->has_test && run->has_pruner) {
        int64_t as_many = run->pruner.micro_batch * run->pruner.seqlen / run->test.seqlen; /* as pruning has tokens at a time */
        run->test.micro_batch = besa__min(run->test.micro_batch, besa__max(1, as_many));
    }
    besa__stream_send(&run->test, level >= BESA__LEVEL_TEST, run->test.micro_batch);
    besa__stream_send(&run->pruner.yref, level >= BESA__LEVEL_YREF, run->pruner.micro_batch);
    besa__stream_send(&run->dense, level >= BESA__LEVEL_YREF, run->pruner.micro_batch);
    besa__stream_send(&run->calibration, level >= BESA__LEVEL_X, run->pruner.micro_batch);
    besa__run_place(run, &device, &host);
    return device.used;
}

/* ---- opening and closing a run ------------------------------------------------------------- */

static besa_result besa__run_init(besa__run *run, const besa_checkpoint *checkpoint, besa_backend *be, besa_error *error)
{
    memset(run, 0, sizeof *run);
    run->checkpoint = checkpoint;
    run->config = besa_checkpoint_config(checkpoint);
    run->in.block = run->out.block = -1;
    run->be = be ? be : &run->cpu;
    if (!be) BESA__TRY(besa_cpu_backend(&run->cpu, NULL, error));
    run->callers = besa__use_workspace(run->be, NULL, 0);
    BESA__TRY(besa__check_backend(run->be, error));
    BESA__TRY(besa__model_bind(&run->model, checkpoint, error));
    run->dtype = run->model.dtype;
    return BESA_OK;
}

static besa_result besa__run_test(besa__run *run, const int32_t *ids, int64_t windows, int64_t seqlen, besa_error *error)
{
    if (windows < 1 || seqlen < 2)
        return besa__fail(error, BESA_ERROR_TOKENS, "%lld windows of %lld tokens: expected at least 1 window of 2 tokens",
                          (long long)windows, (long long)seqlen);
    BESA__TRY(besa__check_tokens("test windows", windows, seqlen, error));
    if (!run->model.head)
        return besa__fail(error, BESA_ERROR_TENSOR, "%s: there is no %s, as in models of embeddings: it can be pruned, but measure "
                          "nothing on the way", run->checkpoint->directory, besa__head_name);
    run->has_test = 1;
    run->test_ids = ids;
    run->windows = windows;
    besa__stream_init(&run->test, run->be, BESA__EVENT_TEST, windows, seqlen, run->config->block.hidden_size);
    run->test.micro_batch = besa__min(windows, besa__max(1, BESA__CHUNK_TOKENS / seqlen));
    int by_length = besa__rope_by_length(&run->config->block.rope) ||
                    (run->config->has_local_rope && besa__rope_by_length(&run->config->local_rope));
    if (run->has_pruner && by_length) run->test_turns.positions = seqlen;
    else run->turns.positions = besa__max(run->turns.positions, seqlen);
    return BESA_OK;
}

/* Weights of F16 that the steps of learning would convert in every product, where products are of bf16, are converted once, on
 * their way in; on the way out those that have not moved are the file's again. Not those on grids, which are the file's dtype. */
static besa_dtype besa__run_dtype(const besa__run *run, const besa_prune_options *options)
{
    int learns = besa__has_rates(options) || options->learn != BESA_LEARN_RATES;
    int converts = run->model.dtype == BESA_F16 && run->be->activation_dtype == BESA_BF16;
    return converts && learns && options->bits == 0 ? BESA_BF16 : run->model.dtype;
}

/* Hold the test against a reference, if there is one. */
static besa_result besa__run_against(besa__run *run, const besa_reference *against, besa_error *error)
{
    if (!against) return BESA_OK;
    const besa__stream *s = &run->test;
    int64_t vocab = run->config->vocab_size, other = besa_checkpoint_config(against->checkpoint)->vocab_size;
    if (vocab != other)
        return besa__fail(error, BESA_ERROR_OPTION, "%s has a vocabulary of %lld tokens, and %s, which it is to be held against, "
                          "one of %lld: expected the same", run->checkpoint->directory, (long long)vocab,
                          against->checkpoint->directory, (long long)other);
    if (!run->has_test || against->windows != s->count || against->seqlen != s->seqlen)
        return besa__fail(error, BESA_ERROR_OPTION, "the test is %lld windows of %lld tokens, and what it is to be held against "
                          "%lld of %lld: expected the same", (long long)(run->has_test ? s->count : 0),
                          (long long)(run->has_test ? s->seqlen : 0), (long long)against->windows, (long long)against->seqlen);
    if (against->hidden && against->dtype != run->be->activation_dtype)
        return besa__fail(error, BESA_ERROR_OPTION, "the reference was made with other activations than backend %s has",
                          run->be->name);
    if (against->ids && run->test_ids && memcmp(against->ids, run->test_ids, (size_t)(s->count * s->seqlen) * sizeof(int32_t)))
        return besa__fail(error, BESA_ERROR_OPTION, "the test's tokens are not those of the reference");
    run->against = against;
    BESA__TRY(besa__model_bind(&run->against_model, against->checkpoint, error));
    if (run->against_model.head) return BESA_OK;
    return besa__fail(error, BESA_ERROR_TENSOR, "%s: there is no %s: nothing can be held against it", against->checkpoint->directory,
                      besa__head_name);
}

/* This rank's share of the test's windows, which may be none. What is held against a reference every rank measures whole. */
static void besa__run_share_test(besa__run *run)
{
    const besa_comm *comm = run->pruner.shares.comm;
    besa__stream *s = &run->test;
    if (!comm || run->against) return;
    s->count = besa__share_of(comm, run->windows);
    s->micro_batch = besa__min(s->micro_batch, s->count);
    run->test_ids = run->test_ids ? run->test_ids + besa__share_first(comm, run->windows) * s->seqlen : NULL;
    run->has_test = s->count > 0;
}

static besa_result besa__run_calibration(besa__run *run, const besa_calibration *c, const besa_prune_options *options,
                                         besa_error *error)
{
    int64_t d = run->config->block.hidden_size;
    run->has_pruner = 1;
    run->dtype = besa__run_dtype(run, options);
    BESA__TRY(besa__pruner_init(&run->pruner, run->be, &run->config->block, run->dtype, run->config->qk_norm,
                                options, c->nsamples, c->seqlen, error));
    run->pruner.written_dtype = run->model.dtype;
    run->ids = c->ids;
    besa__stream_init(&run->calibration, run->be, BESA__EVENT_X, run->pruner.nsamples, c->seqlen, d);
    besa__stream_init(&run->dense, run->be, BESA__EVENT_DENSE, run->pruner.nsamples, c->seqlen, d);
    run->turns.positions = c->seqlen;
    run->has_dense = besa__uses_own(&run->pruner.options);
    run->target = run->pruner.options.rates.target;
    run->pruner.meter.blocks = run->config->num_hidden_layers;
    if (c->test_windows != 0) BESA__TRY(besa__run_test(run, c->test_ids, c->test_windows, c->test_seqlen, error));
    BESA__TRY(besa__run_against(run, c->against, error));
    besa__run_share_test(run);
    return BESA_OK;
}

/* The micro-batch and the level that fit the budget here; besa__run_agree has what fits on all ranks. */
static besa_result besa__run_fit(besa__run *run, int64_t *micro_batch, size_t budget, besa_error *error)
{
    const char *whose;
    besa__arena device = {NULL, 0}, host = {NULL, 0};
    BESA__TRY(besa__default_budget(run->be, &budget, &whose, error));
    BESA__TRY(besa__fit_budget(micro_batch, besa__run_size, besa__levels(run->be), run, budget, whose, error));
    besa__run_place(run, &device, &host);
    return besa__check_size(host.used, "the host's arrays", error);
}

/* Before memory is taken, as all ranks do at once. */
static besa_result besa__run_agree(besa__run *run, besa_error *error)
{
    besa_pruner *p = &run->pruner;
    size_t budget = p->options.device_memory;
    const char *whose;
    if (!p->shares.comm) return BESA_OK;
    BESA__TRY(besa__default_budget(run->be, &budget, &whose, error));
    return besa__fit_ranks(&p->shares, &p->micro_batch, besa__run_size, besa__levels(run->be), run, budget, whose, error);
}

static besa_result besa__run_allocate(besa__run *run, besa_error *error)
{
    besa_backend *be = run->be;
    besa__arena device = {NULL, 0}, host = {NULL, 0};
    besa__run_place(run, &device, &host);
    BESA__TRY_ON(be, be->alloc(be, &run->device, (size_t)device.used), error);
    BESA__TRY_ON(be, be->host_alloc(be, &run->host, (size_t)host.used), error);
    device.base = (unsigned char *)run->device;
    host.base = (unsigned char *)run->host;
    device.used = host.used = 0;
    besa__run_place(run, &device, &host);
    besa__background_start(&run->background);
    return run->has_pruner ? besa__pass_error(be, besa__pruner_start(&run->pruner), error) : BESA_OK;
}

static void besa__run_close(besa__run *run)
{
    besa_backend *be = run->be;
    besa__background_stop(&run->background);
    besa__use_workspace(be, run->callers.memory, run->callers.bytes);
    if (be->destroy) {
        if (run->device) besa__settle(be);
        if (run->host) be->host_free(be, run->host);
        if (run->device) be->free(be, run->device);
    }
    if (be == &run->cpu && be->destroy) be->destroy(be);
}

/* ============================================================================================
 * // >>transfers             a block's weights in, its pruned weights out
 * ============================================================================================
 * Owns how far a block has come: one layer after the other, piece by piece where they go through pinned host memory. */

/* Add the seconds since *clock to *total and move *clock on. */
static void besa__lap(double *clock, double *total)
{
    double now = besa__seconds();
    *total += now - *clock;
    *clock = now;
}

/* Whether no element is infinite or NaN; the address may be odd. */
static int besa__words_finite(const void *words, besa_dtype dtype, int64_t count)
{
    const unsigned char *at = (const unsigned char *)words;
    uint32_t bad = 0, exponent = dtype == BESA_F16 ? 0x7C00u : 0x7F80u; /* loops without a branch: a vocabulary goes through here */
    for (int64_t i = 0; i < count && dtype == BESA_F32; i++) {
        uint32_t word;
        memcpy(&word, at + 4 * i, 4);
        bad |= (word & 0x7F800000u) == 0x7F800000u;
    }
    for (int64_t i = 0; i < count && dtype != BESA_F32; i++) {
        uint16_t word;
        memcpy(&word, at + 2 * i, 2);
        bad |= (word & exponent) == exponent;
    }
    return !bad;
}

/* count elements of a mapped tensor from `first`, as floats; the tensor's address may be odd. */
static besa_result besa__tensor_floats(float *out, const besa_tensor *tensor, int64_t first, int64_t count,
                                       besa_error *error)
{
    size_t size = besa_dtype_size(tensor->dtype);
    const unsigned char *at = (const unsigned char *)tensor->data + (size_t)first * size;
    if (tensor->dtype == BESA_F32) memcpy(out, at, (size_t)count * size);
    for (int64_t i = 0; i < count && tensor->dtype == BESA_BF16; i++) {
        uint16_t half;
        memcpy(&half, at + 2 * i, 2);
        out[i] = besa__bf16_to_f32(half);
    }
    for (int64_t i = 0; i < count && tensor->dtype == BESA_F16; i++) {
        uint16_t half;
        memcpy(&half, at + 2 * i, 2);
        out[i] = besa__f16_to_f32(half);
    }
    if (besa__words_finite(at, tensor->dtype, count)) return BESA_OK;
    for (int64_t i = 0; i < count; i++)
        if (!besa__is_finite((double)out[i]))
            return besa__fail(error, BESA_ERROR_NOT_FINITE, "%s: element %lld is %g: the file is damaged, download it again",
                              tensor->name, (long long)(first + i), (double)out[i]);
    return BESA_OK;
}

/* A tensor must be finite. */
static besa_result besa__check_finite(const besa__run *run, const besa_tensor *t, besa_error *error)
{
    int64_t size = (int64_t)besa_dtype_size(t->dtype), count = (int64_t)t->bytes / size;
    for (int64_t first = 0; first < count; first += 4096) {
        float part[4096];
        uint64_t offset = t->offset + (uint64_t)(first * size);
        BESA__TRY(besa__tensor_floats(part, t, first, besa__min(4096, count - first), error));
        besa__release_range(run->checkpoint->shards + t->file, offset, sizeof part);
    }
    return BESA_OK;
}

/* What a norm is above its tensor. */
static float besa__norm_offset(const besa__run *run, int vector)
{
    return run->config->unit_norms && vector >= BESA_LAYERS ? 1.0f : 0.0f;
}

/* One norm or bias, its tensor and offset, to the device through the host's vectors; none where the model has no such
 * tensor. */
static besa_result besa__bring_vector(besa__run *run, float **vectors, float *device, const besa_tensor *tensor, float offset,
                                      besa_error *error)
{
    if (!tensor) return BESA_OK;
    int64_t count = tensor->shape[0];
    BESA__TRY(besa__tensor_floats(*vectors, tensor, 0, count, error));
    for (int64_t i = 0; i < count && offset != 0.0f; i++) (*vectors)[i] += offset;
    if (run->writer) BESA__TRY(besa__check_copy(run->writer, tensor, error));
    besa__release_pages(run->checkpoint, tensor);
    BESA__TRY(besa__pass_error(run->be, run->be->upload(run->be, BESA_QUEUE_STAGE, device, *vectors,
                                                    (size_t)count * sizeof(float)), error));
    *vectors += count;
    return BESA_OK;
}

/* Where block `index` lies on the device. */
static int besa__room_of(const besa__run *run, int64_t index) { return run->be->unified_memory ? 0 : (int)(index % 2); }

static besa_result besa__transfer_begin(besa__transfer *t, const besa__run *run, int64_t index, besa_error *error)
{
    memset(t, 0, sizeof *t);
    BESA__TRY(besa__block_bind(&t->tensors, run->checkpoint, index, error));
    for (int i = 0; i < BESA_LAYERS; i++) t->total += t->tensors.weight[i]->bytes;
    t->block = index;
    return BESA_OK;
}

/* The next piece at a cursor: of one layer, and no more than a slot holds, where memory is not unified. */
static besa__job besa__piece_at(besa__run *run, besa__transfer *t, const besa__cursor *at)
{
    besa__job piece;
    memset(&piece, 0, sizeof piece);
    piece.user = run;
    piece.tensor = t->tensors.weight[at->layer];
    piece.at = at->at;
    piece.size = piece.tensor->bytes - at->at;
    if (!run->be->unified_memory && piece.size > besa__piece_bytes(run)) piece.size = besa__piece_bytes(run);
    piece.layer = at->layer;
    piece.block = t->block;
    piece.seconds = &t->seconds;
    return piece;
}

/* Past a piece. */
static void besa__cursor_move(besa__cursor *at, const besa__job *piece)
{
    at->at += piece->size;
    at->moved += piece->size;
    at->pieces++;
    if (at->at < piece->tensor->bytes) return;
    at->layer++;
    at->at = 0;
}

/* Begin to bring a block to the device: its vectors, which the last block's are through with (besa__in_finish); the system
 * is told of its weights. */
static besa_result besa__in_begin(besa__run *run, int64_t index, besa_error *error)
{
    besa__room *room = &run->room[besa__room_of(run, index)];
    float *vectors = run->vectors;
    BESA__TRY(besa__transfer_begin(&run->in, run, index, error));
    const besa__block_tensors *t = &run->in.tensors;
    for (int i = 0; i < BESA_LAYERS && !run->be->unified_memory; i++) besa__expect_pages(run->checkpoint, t->weight[i]);
    for (int i = 0; i < BESA_VECTORS; i++)
        BESA__TRY(besa__bring_vector(run, &vectors, room->vector[i], t->vector[i], besa__norm_offset(run, i), error));
    return BESA_OK;
}

/* F16 into bf16, `bytes` of either, in place too; `from` may be odd. Without a branch: a model goes through here while the
 * device computes. Below 2^-14 F16 counts in 2^-24, above it has three bits more of the fraction than bf16. */
static void besa__halves_in(void *to, const void *from, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += 2) {
        uint16_t half;
        memcpy(&half, (const unsigned char *)from + at, 2);
        uint32_t size = half & 0x7FFFu, low = besa__float_bits((float)(int32_t)size * 5.9604644775390625e-8f);
        uint32_t normal = ((size + 3 + (size >> 3 & 1)) >> 3) + (112u << 7), tiny = (low + 0x7FFF + (low >> 16 & 1)) >> 16;
        uint32_t bits = size < 0x400 ? tiny : size < 0x7C00 ? normal : size == 0x7C00 ? 0x7F80u : 0x7FC0u;
        half = (uint16_t)(bits | (half & 0x8000u));
        memcpy((unsigned char *)to + at, &half, 2);
    }
}

/* The way back, in place: what is still the rounded `source` is the source's own, 0 is 0. */
static void besa__halves_out(void *weights, const void *source, size_t bytes, int moved)
{
    for (size_t at = 0; at < bytes && !moved; at += 2) {
        uint16_t half, own;
        memcpy(&half, (const unsigned char *)weights + at, 2);
        memcpy(&own, (const unsigned char *)source + at, 2);
        half = half == 0 ? 0 : own;
        memcpy((unsigned char *)weights + at, &half, 2);
    }
    for (size_t at = 0; at < bytes && moved; at += 2) {
        uint16_t half, own;
        memcpy(&half, (const unsigned char *)weights + at, 2);
        memcpy(&own, (const unsigned char *)source + at, 2);
        half = half == besa__f32_to_bf16(besa__f16_to_f32(own)) ? own : besa__f32_to_f16(besa__bf16_to_f32(half));
        memcpy((unsigned char *)weights + at, &half, 2);
    }
}

/* A piece of the source: into its slot, if it has one, and into the hash of what was read. */
static besa_result besa__read_piece(void *user, const besa__job *piece, besa_error *error)
{
    const besa__run *run = (const besa__run *)user;
    const void *bytes = (const unsigned char *)piece->tensor->data + piece->at;
    (void)error;
    if (run->dtype == run->model.dtype && piece->memory) bytes = memcpy(piece->memory, bytes, piece->size);
    if (run->writer) besa__writer_saw(run->writer, piece->tensor, piece->at, bytes, piece->size);
    if (run->dtype != run->model.dtype) besa__halves_in(piece->memory, bytes, piece->size);
    if (piece->memory)
        besa__release_range(run->checkpoint->shards + piece->tensor->file, piece->tensor->offset + piece->at, piece->size);
    return BESA_OK;
}

/* Have the next pieces read, while there are slots; those that went up from them have left. */
static besa_result besa__in_ahead(besa__run *run, besa_error *error)
{
    besa__transfer *in = &run->in;
    while (in->begun.moved < in->total && in->begun.pieces < in->ended.pieces + BESA__SLOTS) {
        besa__job piece = besa__piece_at(run, in, &in->begun);
        int64_t slot = in->begun.pieces % BESA__SLOTS;
        double clock = besa__seconds();
        if (in->begun.pieces >= BESA__SLOTS && run->piece_in[slot])
            BESA__TRY_ON(run->be, run->be->synchronize(run->be, BESA_QUEUE_STAGE), error);
        besa__lap(&clock, &in->copying);
        piece.work = besa__read_piece;
        piece.memory = run->piece_in[slot];
        BESA__TRY(besa__background_give(&run->background, &piece, error));
        in->job[slot] = run->background.given;
        besa__cursor_move(&in->begun, &piece);
    }
    return BESA_OK;
}

/* Bring weights until `target` bytes of them are on their way, or, short of all, as many as have been read. The host waits here
 * for copies, never for compute. */
static besa_result besa__in_share(besa__run *run, size_t target, besa_error *error)
{
    besa_backend *be = run->be;
    besa__transfer *in = &run->in;
    while (in->block >= 0 && in->ended.moved < in->total && in->ended.moved < target) {
        BESA__TRY(besa__in_ahead(run, error));
        besa__job piece = besa__piece_at(run, in, &in->ended);
        int64_t slot = in->ended.pieces % BESA__SLOTS;
        void *to = (unsigned char *)run->room[besa__room_of(run, in->block)].weight[piece.layer] + piece.at;
        const void *from = run->piece_in[slot] ? run->piece_in[slot] : (const unsigned char *)piece.tensor->data + piece.at;
        if (target < in->total && !besa__background_has(&run->background, in->job[slot])) break;
        BESA__TRY(besa__background_wait(&run->background, in->job[slot], error));
        double clock = besa__seconds();
        BESA__TRY_ON(be, be->upload(be, BESA_QUEUE_STAGE, to, from, piece.size), error);
        besa__lap(&clock, &in->copying);
        if (!run->piece_in[slot])
            besa__release_range(run->checkpoint->shards + piece.tensor->file, piece.tensor->offset + piece.at, piece.size);
        besa__cursor_move(&in->ended, &piece);
    }
    return BESA_OK;
}

static void besa__block_turns(besa_block *block, const besa_config *config, const besa__turns *turns)
{
    int local = config->has_local_rope && block->shape.sliding_window > 0;
    block->rope_cos = turns->cosine[local];
    block->rope_sin = turns->sine[local];
}

/* Block `index` is on the device, whole; *seconds is what the host spent on that. */
static besa_result besa__in_finish(besa__run *run, int64_t index, besa_block *block, double *seconds, besa_error *error)
{
    const besa__room *room = &run->room[besa__room_of(run, index)];
    if (run->in.block != index) BESA__TRY(besa__in_begin(run, index, error));
    BESA__TRY(besa__in_share(run, run->in.total, error));
    double clock = besa__seconds();
    BESA__TRY_ON(run->be, run->be->synchronize(run->be, BESA_QUEUE_STAGE), error);
    besa__lap(&clock, &run->in.copying);
    const besa__block_tensors *t = &run->in.tensors;
    memset(block, 0, sizeof *block);
    block->shape = run->config->block;
    block->shape.sliding_window = run->config->window[index] ? run->config->sliding_window : 0;
    block->dtype = run->dtype;
    block->shape.no_rope = run->config->no_rope[index];
    besa__block_turns(block, run->config, &run->turns);
    for (int i = 0; i < BESA_LAYERS; i++) block->weight[i] = room->weight[i];
    for (int i = 0; i < BESA_VECTORS; i++) {
        *besa__block_vector(block, i) = t->vector[i] ? room->vector[i] : NULL;
        if (run->has_pruner && t->vector[i]) run->pruner.weights.vector[i].dtype = t->vector[i]->dtype;
        run->pruner.weights.vector[i].offset = besa__norm_offset(run, i);
    }
    *seconds = run->in.seconds + run->in.copying;
    run->in.block = -1;
    return BESA_OK;
}

/* ---- blocks out ---------------------------------------------------------------------------- */

/* The grids of the block that begins to go out, from the device into the codes' file: scales, then zeros. */
static besa_result besa__grids_out(besa__run *run, besa_error *error)
{
    besa_backend *be = run->be;
    const besa_quantizer *layer = run->pruner.quantization.layer;
    for (int i = 0; i < BESA_LAYERS; i++) {
        size_t bytes = (size_t)besa__grids(&layer[i]) * sizeof(float);
        BESA__TRY_ON(be, be->download(be, BESA_QUEUE_COMPUTE, run->scales[i], layer[i].scale, bytes), error);
        BESA__TRY_ON(be, be->download(be, BESA_QUEUE_COMPUTE, run->zeros[i], layer[i].zero, bytes), error);
    }
    BESA__TRY_ON(be, be->synchronize(be, BESA_QUEUE_COMPUTE), error);
    for (int i = 0; i < BESA_LAYERS; i++)
        BESA__TRY(besa__codes_put(run->writer, run->scales[i], (size_t)besa__grids(&layer[i]) * sizeof(float), error));
    for (int i = 0; i < BESA_LAYERS; i++)
        for (int64_t g = 0; g < besa__grids(&layer[i]); g++) {
            unsigned char zero = (unsigned char)run->zeros[i][g];
            BESA__TRY(besa__codes_put(run->writer, &zero, 1, error));
        }
    return BESA_OK;
}

/* The codes of a piece of weights. */
static besa_result besa__codes_out(const besa__run *run, const besa__job *piece, besa_error *error)
{
    const unsigned char *bytes = (const unsigned char *)piece->memory;
    const besa_quantizer *q = &run->pruner.quantization.layer[piece->layer];
    const float *scale = run->scales[piece->layer], *zero = run->zeros[piece->layer];
    besa_dtype dtype = run->model.dtype;
    size_t width = besa_dtype_size(dtype);
    int64_t first = (int64_t)(piece->at / width), count = (int64_t)(piece->size / width), groups = besa__parts(q->columns, q->group);
    for (int64_t i = 0; i < count;) {
        unsigned char codes[512];
        int64_t column = (first + i) % q->columns, g = (first + i) / q->columns * groups + column / q->group, n = 0;
        int64_t left = besa__min(besa__min(q->group - column % q->group, q->columns - column), besa__min(512, count - i));
        for (; n < left; n++) {
            uint32_t bits = 0; /* floats are stored from the lowest byte on */
            memcpy(&bits, bytes + (size_t)(i + n) * width, width);
            codes[n] = (unsigned char)besa__code_of(bits, dtype, scale[g], zero[g], (1 << q->bits) - 1);
        }
        BESA__TRY(besa__codes_put(run->writer, codes, (size_t)n, error));
        i += n;
    }
    return BESA_OK;
}

static besa_result besa__write_piece(void *user, const besa__job *piece, besa_error *error)
{
    const besa__run *run = (const besa__run *)user;
    const besa_tensor *source = piece->tensor;
    if (run->dtype != run->model.dtype) {
        besa__halves_out(piece->memory, (const unsigned char *)source->data + piece->at, piece->size,
                         besa__learns_weights(&run->pruner));
        besa__release_range(run->checkpoint->shards + source->file, source->offset + piece->at, piece->size);
    }
    BESA__TRY(besa__writer_write(run->writer, source, piece->memory, piece->size, error));
    return besa__has_codes(run->writer, piece->block) ? besa__codes_out(run, piece, error) : BESA_OK;
}

static besa_result besa__write_end(void *user, const besa__job *job, besa_error *error)
{
    return besa__writer_block_done(((const besa__run *)user)->writer, job->block, error);
}

/* Bring the next piece down, where it has to: into a slot that is written, for which only the last share waits. *is_there:
 * there is one. */
static besa_result besa__out_ahead(besa__run *run, int last, int *is_there, besa_error *error)
{
    besa_backend *be = run->be;
    besa__transfer *out = &run->out;
    int64_t slot = out->begun.pieces % BESA__SLOTS;
    *is_there = !run->piece_out[slot] || out->begun.pieces > out->ended.pieces;
    if (*is_there) return BESA_OK;
    if (!last && !besa__background_has(&run->background, out->job[slot])) return BESA_OK;
    BESA__TRY(besa__background_wait(&run->background, out->job[slot], error));
    besa__job piece = besa__piece_at(run, out, &out->begun);
    void *const *pruned = run->pruned[besa__room_of(run, out->block)];
    const void *from = (const unsigned char *)pruned[piece.layer] + piece.at;
    double clock = besa__seconds();
    BESA__TRY_ON(be, be->download(be, BESA_QUEUE_STAGE, run->piece_out[slot], from, piece.size), error);
    besa__lap(&clock, &out->copying);
    besa__cursor_move(&out->begun, &piece);
    *is_there = last; /* else it will be there when the next share is due */
    return BESA_OK;
}

/* Take pruned weights out until `target` bytes of them are given to be written, and with the last the end of the block. The host
 * waits here for copies, never for compute. */
static besa_result besa__out_share(besa__run *run, size_t target, besa_error *error)
{
    besa_backend *be = run->be;
    besa__transfer *out = &run->out;
    int is_there;
    while (out->block >= 0 && out->ended.moved < out->total && out->ended.moved < target) {
        BESA__TRY(besa__out_ahead(run, target >= out->total, &is_there, error));
        if (!is_there) return BESA_OK;
        besa__job piece = besa__piece_at(run, out, &out->ended);
        int64_t slot = out->ended.pieces % BESA__SLOTS;
        piece.work = besa__write_piece;
        piece.memory = run->piece_out[slot];
        double clock = besa__seconds();
        if (piece.memory) BESA__TRY_ON(be, be->synchronize(be, BESA_QUEUE_STAGE), error);
        besa__lap(&clock, &out->copying);
        if (!piece.memory) piece.memory = (unsigned char *)run->pruned[besa__room_of(run, out->block)][piece.layer] + piece.at;
        BESA__TRY(besa__background_give(&run->background, &piece, error));
        out->job[slot] = run->background.given;
        besa__cursor_move(&out->ended, &piece);
    }
    if (out->block < 0 || out->ended.moved < out->total || out->last) return BESA_OK;
    besa__job end;
    memset(&end, 0, sizeof end);
    end.work = besa__write_end;
    end.user = run;
    end.block = out->block;
    end.seconds = &out->seconds;
    BESA__TRY(besa__background_give(&run->background, &end, error));
    out->last = run->background.given;
    return BESA_OK;
}

/* Norms and biases that learned, which came home with the block's results, into the output: as they are, since the block
 * was read with them rounded. Their memory holds the tensors' bytes afterwards. */
static besa_result besa__out_vectors(besa__run *run, besa_error *error)
{
    const besa__vector *vector = run->pruner.weights.vector;
    float *at = run->pruner.results_vectors;
    for (int i = 0; i < BESA_VECTORS; at += vector[i++].count) {
        const besa_tensor *tensor = run->out.tensors.vector[i];
        float offset = besa__norm_offset(run, i);
        if (!tensor) continue;
        for (int64_t k = 0; k < vector[i].count && offset != 0.0f; k++) at[k] -= offset;
        for (int64_t k = 0; k < vector[i].count && tensor->dtype != BESA_F32; k++) {
            uint16_t half = tensor->dtype == BESA_F16 ? besa__f32_to_f16(at[k]) : besa__f32_to_bf16(at[k]);
            memcpy((unsigned char *)at + (size_t)k * sizeof half, &half, sizeof half);
        }
        BESA__TRY(besa__writer_write(run->writer, tensor, at, tensor->bytes, error));
    }
    return BESA_OK;
}

/* The block that is on its way out is on disk. */
static besa_result besa__out_finish(besa__run *run, besa_report *report, besa_error *error)
{
    int64_t index = run->out.block;
    if (index < 0) return BESA_OK;
    BESA__TRY(besa__out_share(run, run->out.total, error));
    BESA__TRY(besa__background_wait(&run->background, run->out.last, error));
    report->block[index].seconds[BESA_PASS_WRITE] = run->out.seconds + run->out.copying;
    run->out.block = -1;
    return BESA_OK;
}

/* What is due when `fraction` of a block's work is under way: the same fraction of the next block in, of the last out. */
static besa_result besa__run_share(void *user, double fraction, besa_error *error)
{
    besa__run *run = (besa__run *)user;
    BESA__TRY(besa__in_share(run, (size_t)(fraction * (double)run->in.total), error));
    return besa__out_share(run, (size_t)(fraction * (double)run->out.total), error);
}

/* ============================================================================================
 * // >>head                  embedding, final norm, output head, perplexity, divergence
 * ============================================================================================
 * Owns what lies before the first block and behind the last one, over whole streams of activations. */

static besa_result besa__load_turns(besa__run *run, const besa__turns *turns, besa_error *error)
{
    besa_backend *be = run->be;
    besa_block_shape shape = run->config->block;
    int64_t count = turns->positions * (besa__rotary_dim(&shape) / 2);
    size_t bytes = (size_t)count * sizeof(float);
    float *cosine = (float *)run->staging, *sine = cosine + count;
    for (int i = 0; i <= run->config->has_local_rope && count > 0; i++) {
        if (i) shape.rope = run->config->local_rope;
        besa_rope_table(&shape, turns->positions, cosine, sine);
        besa_result result = be->upload(be, BESA_QUEUE_COMPUTE, turns->cosine[i], cosine, bytes);
        if (result == BESA_OK) result = be->upload(be, BESA_QUEUE_COMPUTE, turns->sine[i], sine, bytes);
        if (result == BESA_OK) result = be->synchronize(be, BESA_QUEUE_COMPUTE);
        BESA__TRY_ON(be, result, error);
    }
    return BESA_OK;
}

static besa_result besa__load_rope(besa__run *run, besa_error *error)
{
    BESA__TRY(besa__load_turns(run, &run->turns, error));
    return besa__load_turns(run, &run->test_turns, error);
}

/* Ids are checked before anything is written. */
static besa_result besa__check_ids(const besa__run *run, const int32_t *ids, int64_t count, const char *what,
                                   besa_error *error)
{
    if (!ids) return besa__fail(error, BESA_ERROR_OPTION, "%s ids are NULL", what);
    for (int64_t t = 0; t < count; t++)
        if (ids[t] < 0 || ids[t] >= run->config->vocab_size)
            return besa__fail(error, BESA_ERROR_TOKEN, "%s token %lld is %lld, expected 0 .. %lld: was it made with another "
                              "tokenizer?", what, (long long)t, (long long)ids[t], (long long)run->config->vocab_size - 1);
    return BESA_OK;
}

/* What the embedding's rows are multiplied with. Gemma's is of the dtype of activations, as these models were trained. */
static float besa__embedding_scale(const besa__run *run)
{
    float scale = (float)run->config->embedding_scale;
    if (scale == 0.0f) return 1.0f;
    int rounded = run->config->unit_norms && run->be->activation_dtype == BESA_BF16;
    return rounded ? besa__bf16_to_f32(besa__f32_to_bf16(scale)) : scale;
}

/* Rows of the embedding, (count, d), into the staging memory: as the file has them, or scaled as floats. Its dtype. */
static besa_result besa__gather_rows(besa__run *run, const int32_t *ids, int64_t count, besa_dtype *dtype, besa_error *error)
{
    const besa_tensor *table = run->model.embedding;
    int64_t d = run->config->block.hidden_size;
    float *rows = (float *)run->staging, scale = besa__embedding_scale(run);
    *dtype = scale == 1.0f ? table->dtype : BESA_F32;
    size_t bytes = (size_t)d * besa_dtype_size(table->dtype);
    for (int64_t t = 0; t < count; t++) {
        const unsigned char *row = (const unsigned char *)table->data + (size_t)ids[t] * bytes;
        if (scale != 1.0f || !besa__words_finite(row, table->dtype, d)) /* which names the element that is not */
            BESA__TRY(besa__tensor_floats(rows + t * d, table, ids[t] * d, d, error));
        else memcpy((unsigned char *)rows + (size_t)t * bytes, row, bytes);
    }
    for (int64_t k = 0; k < count * d && scale != 1.0f; k++) rows[k] *= scale;
    return BESA_OK;
}

/* x(tokens, d) = rows of the embedding, gathered on the host and converted on the device. */
static besa_result besa__embed(besa__run *run, void *x, const int32_t *ids, int64_t tokens, besa_error *error)
{
    besa_backend *be = run->be;
    const besa_tensor *table = run->model.embedding;
    int64_t d = run->config->block.hidden_size;
    for (int64_t i = 0; i < tokens; i += BESA__CHUNK_TOKENS) {
        int64_t count = besa__min(BESA__CHUNK_TOKENS, tokens - i);
        besa_dtype dtype;
        BESA__TRY(besa__gather_rows(run, ids + i, count, &dtype, error));
        void *to = besa__at(x, be->activation_dtype, i * d);
        size_t bytes = (size_t)(count * d) * besa_dtype_size(dtype);
        besa_result result = be->upload(be, BESA_QUEUE_COMPUTE, run->rows, run->staging, bytes);
        if (result == BESA_OK) result = be->convert(be, to, be->activation_dtype, run->rows, dtype, count * d);
        if (result == BESA_OK) result = be->synchronize(be, BESA_QUEUE_COMPUTE); /* rows are used again */
        BESA__TRY_ON(be, result, error);
        besa__release_pages(run->checkpoint, table);
    }
    return BESA_OK;
}

/* ids: of this rank's sequences; with shares, those of all ranks. */
static besa_result besa__stream_embed(besa__run *run, besa__stream *s, const int32_t *ids, const besa__shares *shares,
                                      besa_error *error)
{
    besa__walk walk = besa__stream_walk(s, -1);
    while (besa__walk_next(&walk)) {
        void *x;
        BESA__TRY_ON(run->be, besa__stream_begin(s, &walk, &x), error);
        for (int64_t i = 0, count; i < walk.count; i += count) {
            int64_t first = walk.first + i, from = shares ? besa__global_sequence(shares, first) : first;
            count = besa__min(walk.count - i, shares && shares->comm ? besa__following(shares, first) : walk.count);
            BESA__TRY(besa__embed(run, besa__stream_at(s, x, i), ids + from * s->seqlen, count * s->seqlen, error));
        }
        BESA__TRY_ON(run->be, besa__stream_close(s, 1), error);
    }
    return BESA_OK;
}

/* The test stream through a block. Waits, as the block's memory may be used for another afterwards. */
static besa_result besa__test_forward(besa__run *run, const besa_block *block, besa_error *error)
{
    besa_backend *be = run->be;
    besa_block turned = *block;
    if (!run->has_test) return BESA_OK;
    if (run->test_turns.positions > 0) besa__block_turns(&turned, run->config, &run->test_turns);
    besa__use_workspace(be, run->workspace, run->workspace_bytes);
    BESA__TRY_ON(be, besa__stream_forward(&run->test, besa__stream_walk(&run->test, -1), &turned, &run->acts), error);
    return besa__pass_error(be, be->synchronize(be, BESA_QUEUE_COMPUTE), error);
}

/* ---- the head ------------------------------------------------------------------------------ */

/* target of a position = the id after it in its window, -1 at the end. */
static besa_result besa__load_targets(besa__run *run)
{
    const besa__stream *s = &run->test;
    int32_t *targets = (int32_t *)run->staging;
    int64_t tokens = s->count * s->seqlen;
    for (int64_t t = 0; t < tokens; t++) targets[t] = (t + 1) % s->seqlen == 0 ? -1 : run->test_ids[t + 1];
    BESA__TRY(run->be->upload(run->be, BESA_QUEUE_COMPUTE, run->targets, targets, (size_t)tokens * sizeof(int32_t)));
    return run->be->synchronize(run->be, BESA_QUEUE_COMPUTE);
}

/* What a model makes of its logits(n). */
static besa_result besa__cap_logits(besa_backend *be, float *logits, const besa_config *config, int64_t n)
{
    double scale = config->logits_scale, cap = config->logits_softcap;
    if (scale == 0 && cap == 0) return BESA_OK;
    return be->softcap(be, logits, scale != 0 ? (float)scale : 1.0f, (float)cap, n);
}

/* The reference's logits of the same, beside those that the chunk has just had. */
static besa_result besa__against_chunk(besa__run *run, int64_t first_id, int64_t ids, const besa__walk *chunk)
{
    besa_backend *be = run->be;
    const besa_config *config = besa_checkpoint_config(run->against->checkpoint);
    int64_t seqlen = run->test.seqlen, d = config->block.hidden_size, tokens = chunk->count * seqlen, t0 = chunk->first * seqlen;
    const void *hidden = besa__at(run->against->hidden, be->activation_dtype, t0 * d);
    size_t bytes = (size_t)(tokens * d) * besa_dtype_size(be->activation_dtype);
    float *logits = run->against_logits;
    BESA__TRY(be->upload(be, BESA_QUEUE_COMPUTE, run->against_x, hidden, bytes));
    BESA__TRY(be->logits(be, logits, run->against_x, run->against_rows, run->against_model.head->dtype, tokens, ids, d));
    BESA__TRY(besa__cap_logits(be, logits, config, tokens * ids));
    return be->divergence_update(be, run->divergence + 4 * t0, run->best + 2 * t0, logits, run->logits, first_id, ids, tokens,
                                 first_id == 0);
}

/* Logits of one chunk of sequences, x, and one chunk of the vocabulary: into the running log-sum-exp, or to the host. */
static besa_result besa__head_chunk(besa__run *run, int64_t first_id, int64_t ids, const void *x, const besa__walk *chunk,
                                    float *out)
{
    besa_backend *be = run->be;
    int64_t seqlen = run->test.seqlen, d = run->config->block.hidden_size, vocab = run->config->vocab_size;
    int64_t tokens = chunk->count * seqlen, t0 = chunk->first * seqlen;
    BESA__TRY(be->logits(be, run->logits, x, run->rows, run->model.head->dtype, tokens, ids, d));
    BESA__TRY(besa__cap_logits(be, run->logits, run->config, tokens * ids));
    if (!out && run->against) BESA__TRY(besa__against_chunk(run, first_id, ids, chunk));
    if (!out)
        return be->nll_update(be, run->nll_state + 3 * t0, run->logits, run->targets + t0, first_id, ids, tokens,
                              first_id == 0);
    for (int64_t t = 0; t < tokens; t++)
        BESA__TRY(be->download(be, BESA_QUEUE_COMPUTE, out + (t0 + t) * vocab + first_id, run->logits + t * ids,
                               (size_t)ids * sizeof(float)));
    return be->synchronize(be, BESA_QUEUE_COMPUTE);
}

/* The block's vector that the final norm takes the place of. */
static int besa__final_vector(const besa__run *run)
{
    return run->config->block.norms == BESA_NORMS_OUT ? BESA_NORM1_OUT : BESA_NORM1;
}

/* The final norm over the test stream. */
static besa_result besa__final_norm(besa__run *run, besa_error *error)
{
    besa_backend *be = run->be;
    besa__stream *s = &run->test;
    float *vectors = run->vectors, *norm = run->room[0].vector[besa__final_vector(run)];
    BESA__TRY(besa__bring_vector(run, &vectors, norm, run->model.norm, besa__norm_offset(run, BESA_NORM1), error));
    BESA__TRY_ON(be, be->synchronize(be, BESA_QUEUE_STAGE), error);
    besa__walk walk = besa__stream_walk(s, -1);
    while (besa__walk_next(&walk)) {
        void *x;
        BESA__TRY_ON(be, besa__stream_open(s, &walk, &x), error);
        BESA__TRY_ON(be, be->rmsnorm_forward(be, x, run->acts.inv_rms1, x, norm, walk.count * s->seqlen, s->width,
                                             (float)run->config->block.rms_norm_eps), error);
        BESA__TRY_ON(be, besa__stream_close(s, 1), error);
    }
    return BESA_OK;
}

/* Rows of a head on their way to the device. */
static besa_result besa__head_rows(besa__run *run, void *rows, const besa_tensor *head, int64_t first_id, int64_t ids)
{
    size_t size = besa_dtype_size(head->dtype) * (size_t)head->shape[1];
    const unsigned char *from = (const unsigned char *)head->data + (size_t)first_id * size;
    return run->be->upload(run->be, BESA_QUEUE_COMPUTE, rows, from, (size_t)ids * size);
}

/* The final norm and the output head over the test stream; the head is read once, a chunk of rows at a time. */
static besa_result besa__head_pass(besa__run *run, float *out, besa_error *error)
{
    besa_backend *be = run->be;
    besa__stream *s = &run->test;
    const besa_tensor *head = run->model.head;
    int64_t vocab = run->config->vocab_size, step = besa__vocab_chunk(run);
    besa__use_workspace(be, run->workspace, run->workspace_bytes);
    BESA__TRY(besa__final_norm(run, error));
    BESA__TRY_ON(be, besa__load_targets(run), error);
    for (int64_t id = 0; id < vocab; id += step) {
        int64_t ids = besa__min(step, vocab - id);
        BESA__TRY_ON(be, besa__head_rows(run, run->rows, head, id, ids), error);
        if (run->against) BESA__TRY_ON(be, besa__head_rows(run, run->against_rows, run->against_model.head, id, ids), error);
        besa__walk walk = besa__stream_walk(s, 0); /* again for the next ids */
        while (besa__walk_next(&walk)) {
            void *x;
            BESA__TRY_ON(be, besa__stream_open(s, &walk, &x), error);
            BESA__TRY_ON(be, besa__head_chunk(run, id, ids, x, &walk, out), error);
            BESA__TRY_ON(be, besa__stream_close(s, 0), error);
        }
        BESA__TRY_ON(be, be->synchronize(be, BESA_QUEUE_COMPUTE), error);
        besa__release_pages(run->checkpoint, head);
        if (run->against) besa__release_pages(run->against->checkpoint, run->against_model.head);
    }
    return BESA_OK;
}

/* The negative log-likelihoods of this rank's windows, summed over the tokens of each, to run->staging. */
static besa_result besa__own_windows(besa__run *run, besa_error *error)
{
    besa_backend *be = run->be;
    const besa__stream *s = &run->test;
    if (!run->has_test) return BESA_OK;
    BESA__TRY(besa__head_pass(run, NULL, error));
    besa_result result = be->nll_sum(be, run->nll_sums, run->nll_state, run->targets, s->count, s->seqlen);
    if (result == BESA_OK)
        result = be->download(be, BESA_QUEUE_COMPUTE, run->staging, run->nll_sums, (size_t)s->count * sizeof(double));
    if (result == BESA_OK) result = be->synchronize(be, BESA_QUEUE_COMPUTE);
    return besa__pass_error(be, result, error);
}

/* The comm where ranks have a share of the windows each. */
static const besa_comm *besa__test_comm(const besa__run *run) { return run->against ? NULL : run->pruner.shares.comm; }

/* Those of all ranks, (windows), in the order of the text; in one process window is run->staging. */
static besa_result besa__all_windows(besa__run *run, double *window, besa_error *error)
{
    const besa_comm *comm = besa__test_comm(run);
    BESA__TRY(besa__own_windows(run, error));
    if (comm) memcpy(window + besa__share_first(comm, run->windows), run->staging, (size_t)run->test.count * sizeof *window);
    for (int root = 0; comm && root < comm->size; root++) {
        besa_comm theirs = *comm;
        theirs.rank = root;
        BESA__TRY(besa__broadcast(comm, window + besa__share_first(&theirs, run->windows),
                                  (size_t)besa__share_of(&theirs, run->windows) * sizeof *window, root, error));
    }
    return BESA_OK;
}

/* exp of the mean over windows; nll (windows), `stride` doubles from one to the next, may be NULL. */
static besa_result besa__mean_windows(const besa__run *run, const double *window, double *perplexity, double *nll, int stride,
                                      besa_error *error)
{
    double sum = 0;
    for (int64_t i = 0; i < run->windows; i++) {
        double mean = window[i] / (double)(run->test.seqlen - 1);
        if (!besa__is_finite(mean))
            return besa__fail(error, BESA_ERROR_NOT_FINITE, "the log-likelihood of window %lld is %g", (long long)i, mean);
        sum += mean;
        if (nll) nll[i * stride] = mean;
    }
    *perplexity = exp(sum / (double)run->windows);
    if (besa__is_finite(*perplexity)) return BESA_OK;
    return besa__fail(error, BESA_ERROR_NOT_FINITE, "the perplexity overflows: mean negative log-likelihood is %g",
                      sum / (double)run->windows);
}

static besa_result besa__test_perplexity(besa__run *run, double *perplexity, double *nll, int stride, besa_error *error)
{
    void *window = run->staging, *all = NULL;
    if (besa__test_comm(run)) {
        BESA__TRY(besa__malloc(&all, besa__bytes(run->windows, sizeof(double)), "the windows' log-likelihoods", error));
        window = all;
    }
    besa_result result = besa__all_windows(run, (double *)window, error);
    if (result == BESA_OK) result = besa__mean_windows(run, (const double *)window, perplexity, nll, stride, error);
    BESA_FREE(all);
    return result;
}

/* KL(P || Q) = sum p (P - Q) - log sum exp P + log sum exp Q of one position, from its states; rounding does not leave it
 * below 0. */
static double besa__divergence(const float *divergence, const float *nll_state)
{
    double sum = (double)divergence[1], p = (double)divergence[0] + log(sum);
    double q = (double)nll_state[0] + log((double)nll_state[1]), kl = (double)divergence[2] / sum - p + q;
    return kl < 0 ? 0 : kl;
}

/* What the head has left of one window, in host memory: a position after the other. */
static besa_result besa__window_states(besa__run *run, int64_t window, float *divergence, float *nll_state, int32_t *best)
{
    besa_backend *be = run->be;
    int64_t seqlen = run->test.seqlen, t0 = window * seqlen;
    size_t bytes = (size_t)seqlen * sizeof(float);
    BESA__TRY(be->download(be, BESA_QUEUE_COMPUTE, divergence, run->divergence + 4 * t0, 4 * bytes));
    BESA__TRY(be->download(be, BESA_QUEUE_COMPUTE, nll_state, run->nll_state + 3 * t0, 3 * bytes));
    BESA__TRY(be->download(be, BESA_QUEUE_COMPUTE, best, run->best + 2 * t0, 2 * bytes));
    return be->synchronize(be, BESA_QUEUE_COMPUTE);
}

/* The test's windows, window (windows), and with a reference the divergence from it; kl (windows, seqlen - 1) or NULL. */
static besa_result besa__test_windows(besa__run *run, double *perplexity, besa_window *window, float *kl, besa_error *error)
{
    const besa__stream *s = &run->test;
    int64_t positions = s->seqlen - 1;
    float *divergence = (float *)run->staging, *nll_state = divergence + 4 * s->seqlen;
    int32_t *best = (int32_t *)(void *)(nll_state + 3 * s->seqlen);
    BESA__TRY(besa__test_perplexity(run, perplexity, &window[0].nll, (int)(sizeof *window / sizeof(double)), error));
    for (int64_t i = 0; i < s->count && run->against; i++) {
        double sum = 0, same = 0;
        BESA__TRY_ON(run->be, besa__window_states(run, i, divergence, nll_state, best), error);
        for (int64_t t = 0; t < positions; t++) {
            double x = besa__divergence(divergence + 4 * t, nll_state + 3 * t);
            sum += x;
            same += best[2 * t] == best[2 * t + 1];
            if (kl) kl[i * positions + t] = (float)x;
        }
        if (!besa__is_finite(sum))
            return besa__fail(error, BESA_ERROR_NOT_FINITE, "the divergence of window %lld is %g", (long long)i, sum);
        window[i].reference_nll = run->against->nll[i];
        window[i].kl = sum / (double)positions;
        window[i].same = same / (double)positions;
    }
    return BESA_OK;
}

/* The dense model over the test stream. */
static besa_result besa__run_test_blocks(besa__run *run, besa_progress_callback progress, void *user, besa_error *error)
{
    besa__meter meter;
    memset(&meter, 0, sizeof meter);
    meter.callback = progress;
    meter.user = user;
    meter.blocks = run->config->num_hidden_layers;
    meter.pass = BESA_PASS_DENSE;
    meter.cost = meter.pass_cost = 1;
    meter.start = meter.began = besa__seconds();
    BESA__TRY(besa__load_rope(run, error));
    BESA__TRY(besa__stream_embed(run, &run->test, run->test_ids, NULL, error));
    for (int64_t i = 0; i < run->config->num_hidden_layers; i++) {
        besa_block block;
        double seconds;
        meter.block = i;
        meter.done = 0;
        BESA__TRY(besa__in_finish(run, i, &block, &seconds, error));
        BESA__TRY(besa__test_forward(run, &block, error));
        BESA__TRY(besa__tick(&meter, 1, error));
    }
    return BESA_OK;
}

static besa_result besa__open_test(besa__run *run, const besa_checkpoint *checkpoint, besa_backend *be,
                                    const int32_t *ids, int64_t windows, int64_t seqlen, const besa_reference *against,
                                    besa_error *error)
{
    BESA__TRY(besa__run_init(run, checkpoint, be, error));
    BESA__TRY(besa__run_test(run, ids, windows, seqlen, error));
    BESA__TRY(besa__run_against(run, against, error));
    BESA__TRY(besa__check_ids(run, ids, windows * seqlen, "test", error));
    BESA__TRY(besa__run_fit(run, &run->test.micro_batch, 0, error));
    return besa__run_allocate(run, error);
}

/* A perplexity that is not finite: the error of the first weight that is not, if there is one. */
static besa_result besa__find_not_finite(const besa__run *run, besa_error *error)
{
    besa__block_tensors block;
    for (int64_t i = 0; i < run->config->num_hidden_layers; i++) {
        BESA__TRY(besa__block_bind(&block, run->checkpoint, i, error));
        for (int l = 0; l < BESA_LAYERS; l++) BESA__TRY(besa__check_finite(run, block.weight[l], error));
    }
    return besa__check_finite(run, run->model.head, error);
}

BESA_API besa_result besa_perplexity(const besa_checkpoint *checkpoint, besa_backend *be, const int32_t *ids,
                                     int64_t windows, int64_t seqlen, double *perplexity, double *nll,
                                     besa_progress_callback progress, void *user, besa_error *error)
{
    besa__run run;
    besa_result result = besa__open_test(&run, checkpoint, be, ids, windows, seqlen, NULL, error);
    if (result == BESA_OK) result = besa__run_test_blocks(&run, progress, user, error);
    if (result == BESA_OK) result = besa__test_perplexity(&run, perplexity, nll, 1, error);
    if (result == BESA_ERROR_NOT_FINITE) besa__find_not_finite(&run, error);
    besa__run_close(&run);
    return result;
}

/* ---- one model against another ------------------------------------------------------------- */

/* Host bytes of what a reference holds beside its ids and nll. */
static uint64_t besa__hidden_bytes(const besa_config *config, const besa_backend *be, int64_t tokens)
{
    return besa__bytes(besa__product(tokens, config->block.hidden_size), besa_dtype_size(be->activation_dtype));
}

static besa_result besa__reference_allocate(besa_reference *r, const besa__run *run, besa_error *error)
{
    int64_t tokens = r->windows * r->seqlen;
    void *ids, *hidden, *nll;
    uint64_t bytes = besa__hidden_bytes(run->config, run->be, tokens);
    BESA__TRY(besa__check_size(bytes, "the reference", error));
    BESA__TRY(besa__malloc(&ids, besa__bytes(tokens, sizeof *r->ids), "the reference's tokens", error));
    r->ids = (int32_t *)ids;
    BESA__TRY(besa__malloc(&nll, besa__bytes(r->windows, sizeof *r->nll), "the reference's windows", error));
    r->nll = (double *)nll;
    BESA__TRY(besa__malloc(&hidden, bytes, "the reference", error));
    r->hidden = hidden;
    return BESA_OK;
}

/* The test stream, as the final norm has left it, to the host. */
static besa_result besa__take_hidden(besa__run *run, void *hidden, besa_error *error)
{
    besa_backend *be = run->be;
    besa__stream *s = &run->test;
    besa__walk walk = besa__stream_walk(s, 0);
    while (besa__walk_next(&walk)) {
        void *x, *to = besa__at(hidden, be->activation_dtype, walk.first * s->seqlen * s->width);
        size_t bytes = (size_t)(walk.count * s->seqlen * s->width) * besa_dtype_size(be->activation_dtype);
        BESA__TRY_ON(be, besa__stream_open(s, &walk, &x), error);
        BESA__TRY_ON(be, be->download(be, BESA_QUEUE_COMPUTE, to, x, bytes), error);
        BESA__TRY_ON(be, besa__stream_close(s, 0), error);
    }
    return besa__pass_error(be, be->synchronize(be, BESA_QUEUE_COMPUTE), error);
}

BESA_API void besa_reference_free(besa_reference *reference)
{
    if (!reference) return;
    BESA_FREE(reference->ids);
    BESA_FREE(reference->hidden);
    BESA_FREE(reference->nll);
    memset(reference, 0, sizeof *reference);
}

BESA_API besa_result besa_reference_create(besa_reference *reference, const besa_checkpoint *checkpoint, besa_backend *be,
                                           const int32_t *ids, int64_t windows, int64_t seqlen, besa_progress_callback progress,
                                           void *user, besa_error *error)
{
    besa__run run;
    besa_reference *r = reference;
    memset(r, 0, sizeof *r);
    besa_result result = besa__open_test(&run, checkpoint, be, ids, windows, seqlen, NULL, error);
    r->checkpoint = checkpoint;
    r->windows = windows;
    r->seqlen = seqlen;
    r->dtype = run.be->activation_dtype;
    if (result == BESA_OK) result = besa__reference_allocate(r, &run, error);
    if (result == BESA_OK) memcpy(r->ids, ids, (size_t)(windows * seqlen) * sizeof *ids);
    if (result == BESA_OK) result = besa__run_test_blocks(&run, progress, user, error);
    if (result == BESA_OK) result = besa__test_perplexity(&run, &r->perplexity, r->nll, 1, error);
    if (result == BESA_OK) result = besa__take_hidden(&run, r->hidden, error);
    if (result == BESA_ERROR_NOT_FINITE) besa__find_not_finite(&run, error);
    besa__run_close(&run);
    if (result != BESA_OK) besa_reference_free(r);
    return result;
}

/* What has been computed must be there. */
static besa_result besa__check_reference(const besa_reference *reference, besa_error *error)
{
    if (!reference || (reference->hidden && reference->ids && reference->nll)) return BESA_OK;
    return besa__fail(error, BESA_ERROR_OPTION, "the reference is empty: besa_reference_create fills it in");
}

BESA_API besa_result besa_compare_models(const besa_checkpoint *checkpoint, besa_backend *be, const besa_reference *reference,
                                         besa_window *window, float *kl, besa_progress_callback progress, void *user,
                                         besa_error *error)
{
    besa__run run;
    double perplexity;
    if (!reference) return besa__fail(error, BESA_ERROR_OPTION, "the reference is NULL");
    BESA__TRY(besa__check_reference(reference, error));
    besa_result result = besa__open_test(&run, checkpoint, be, reference->ids, reference->windows, reference->seqlen, reference, error);
    if (result == BESA_OK) result = besa__run_test_blocks(&run, progress, user, error);
    if (result == BESA_OK) result = besa__test_windows(&run, &perplexity, window, kl, error);
    if (result == BESA_ERROR_NOT_FINITE) besa__find_not_finite(&run, error);
    besa__run_close(&run);
    return result;
}

/* The mean of number `field` of the windows, less that of number `less` where it is not negative; *deviation: its standard
 * error. */
static double besa__window_mean(const besa_window *window, int64_t windows, int field, int less, double *deviation)
{
    double mean = 0, squares = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = 0; i < windows; i++) {
            const double number[] = {window[i].nll, window[i].reference_nll, window[i].kl, window[i].same};
            double x = number[field] - (less < 0 ? 0 : number[less]);
            if (pass == 0) mean += x;
            else squares += (x - mean / (double)windows) * (x - mean / (double)windows);
        }
    *deviation = windows > 1 ? sqrt(squares / (double)(windows - 1) / (double)windows) : 0;
    return mean / (double)windows;
}

static int besa__compare_floats(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

BESA_API void besa_summarize(besa_divergence *divergence, const besa_window *window, int64_t windows, float *kl,
                             int64_t positions)
{
    besa_divergence *d = divergence;
    memset(d, 0, sizeof *d);
    d->windows = windows;
    d->perplexity = exp(besa__window_mean(window, windows, 0, -1, &d->perplexity_error));
    d->perplexity_error *= d->perplexity;
    if (!kl) return;
    d->positions = positions;
    d->reference_perplexity = exp(besa__window_mean(window, windows, 1, -1, &d->reference_perplexity_error));
    d->reference_perplexity_error *= d->reference_perplexity;
    d->difference = besa__window_mean(window, windows, 0, 1, &d->difference_error);
    d->kl = besa__window_mean(window, windows, 2, -1, &d->kl_error);
    d->same = besa__window_mean(window, windows, 3, -1, &d->same_error);
    if (positions < 1) return;
    qsort(kl, (size_t)positions, sizeof *kl, besa__compare_floats);
    double at = 0.99 * (double)(positions - 1); /* between two of them: as numpy.percentile */
    int64_t below = (int64_t)at, above = besa__min(below + 1, positions - 1);
    d->kl_99 = (double)kl[below] + (at - (double)below) * ((double)kl[above] - (double)kl[below]);
    d->kl_most = (double)kl[positions - 1];
}

BESA_API besa_result besa_logits(const besa_checkpoint *checkpoint, besa_backend *be, const int32_t *ids,
                                 int64_t count, int64_t seqlen, float *logits, besa_error *error)
{
    besa__run run;
    besa_result result = besa__open_test(&run, checkpoint, be, ids, count, seqlen, NULL, error);
    if (result == BESA_OK) result = besa__run_test_blocks(&run, NULL, NULL, error);
    if (result == BESA_OK) result = besa__head_pass(&run, logits, error);
    besa__run_close(&run);
    return result;
}

/* ============================================================================================
 * // >>prune                 resumed runs, the whole run
 * ============================================================================================
 * Owns the order of a run: what is taken over from an unfinished output, what is pruned, when it is written. */

/* Numbers as parts of a hash: their bits, so that nothing depends on how they would be printed. */
static uint64_t besa__hash_integer(uint64_t hash, int64_t value) { return besa__hash(hash, &value, sizeof value); }

static uint64_t besa__hash_double(uint64_t hash, double value)
{
    value += 0.0; /* -0 and 0 are the same option */
    return besa__hash(hash, &value, sizeof value);
}

/* Blocks first .. end - 1 are pruned. */
static int64_t besa__first_block(const besa__run *run) { return run->pruner.options.first_block; }

static int64_t besa__end_block(const besa__run *run)
{
    const besa_prune_options *o = &run->pruner.options;
    return o->num_blocks ? o->first_block + o->num_blocks : run->config->num_hidden_layers;
}

/* The sparsity that a block is to have; 0: it stays dense. */
static double besa__block_target(const besa__run *run, int64_t index)
{
    const besa_prune_options *o = &run->pruner.options;
    int64_t first = besa__first_block(run), count = besa__end_block(run) - first;
    if (index < first || index >= first + count) return 0;
    if (o->num_block_targets) return o->block_targets[index - first];
    if (count == 1) return run->target;
    return run->target + o->depth_slope * ((double)(index - first) / (double)(count - 1) - 0.5);
}

/* Of all blocks together. */
static double besa__model_target(const besa__run *run)
{
    int64_t count = besa__end_block(run) - besa__first_block(run), blocks = run->config->num_hidden_layers;
    return count == blocks ? run->target : run->target * (double)count / (double)blocks;
}

/* The blocks that are pruned are there, and their sparsities are such, and as the target has them in all. */
static besa_result besa__check_depth(const besa__run *run, besa_error *error)
{
    const besa_prune_options *o = &run->pruner.options;
    int64_t blocks = run->config->num_hidden_layers, first = o->first_block, end;
    double sum = 0;
    if (first >= blocks || o->num_blocks > blocks - first)
        return besa__fail(error, BESA_ERROR_OPTION, "%lld blocks from number %lld on are to be pruned, but the model has blocks 0 to "
                          "%lld", (long long)(o->num_blocks ? o->num_blocks : 1), (long long)first, (long long)blocks - 1);
    end = besa__end_block(run);
    if (o->num_block_targets && o->depth_slope != 0)
        return besa__fail(error, BESA_ERROR_OPTION, "depth_slope is %g, but block_targets has a sparsity for every block: "
                          "expected one of them", o->depth_slope);
    if (o->num_block_targets && (!o->block_targets || o->num_block_targets != end - first))
        return besa__fail(error, BESA_ERROR_OPTION, "block_targets %s, expected one for each of the %lld blocks that are pruned",
                          o->block_targets ? "is a list of another length" : "is NULL", (long long)(end - first));
    if ((o->num_block_targets || o->depth_slope != 0) && o->pattern_m)
        return besa__fail(error, BESA_ERROR_OPTION, "a pattern of %d:%d has one sparsity: expected no block_targets and no "
                          "depth_slope", o->pattern_n, o->pattern_m);
    for (int64_t i = first; i < end; i++) {
        double target = besa__block_target(run, i);
        if (!(target > 0 && target < 1))
            return besa__fail(error, BESA_ERROR_OPTION, "block %lld would have a sparsity of %g by %s, expected above 0 and below "
                              "1", (long long)i, target, o->num_block_targets ? "block_targets" : "target and depth_slope");
        sum += target;
        besa_rate_options rates = o->rates;
        rates.target = target;
        if (o->method == BESA_METHOD_BESA) BESA__TRY(besa__check_penalty(&rates, error));
    }
    if (fabs(sum / (double)(end - first) - run->target) <= 1e-3) return BESA_OK;
    return besa__fail(error, BESA_ERROR_OPTION, "block_targets has a mean of %.6g, but the target is %.6g: expected the same",
                      sum / (double)(end - first), run->target);
}

/* The masks that a method keeps are there, and of this model's shape. */
static besa_result besa__check_masks(const besa__run *run, besa_error *error)
{
    const besa_prune_options *o = &run->pruner.options;
    const besa_config *masks = o->masks ? &o->masks->config : NULL;
    if (o->method != BESA_METHOD_KEEP && !o->masks) return BESA_OK;
    if (o->method != BESA_METHOD_KEEP)
        return besa__fail(error, BESA_ERROR_OPTION, "masks are given, but method %s makes its own: expected method keep",
                          besa_method_name(o->method));
    if (!masks) return besa__fail(error, BESA_ERROR_OPTION, "masks is NULL, expected the checkpoint whose zeros method keep takes");
    if (masks->num_hidden_layers != run->config->num_hidden_layers)
        return besa__fail(error, BESA_ERROR_OPTION, "the masks' checkpoint has %lld blocks, the model %lld",
                          (long long)masks->num_hidden_layers, (long long)run->config->num_hidden_layers);
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns, has_rows, has_columns;
        besa_block_layer(&run->config->block, i, &rows, &columns);
        besa_block_layer(&masks->block, i, &has_rows, &has_columns);
        if (rows != has_rows || columns != has_columns)
            return besa__fail(error, BESA_ERROR_OPTION, "%s of the masks' checkpoint is %lld x %lld, of the model %lld x %lld",
                              besa_layer_name(i), (long long)has_rows, (long long)has_columns, (long long)rows, (long long)columns);
    }
    return BESA_OK;
}

/* A hash of the source as it was opened: the contents of its config and index, every shard's header (with all tensors' names,
 * dtypes and places), size and time of the last change. */
static uint64_t besa__source_hash(const besa_checkpoint *checkpoint)
{
    uint64_t hash = besa__hash(besa__kept_hash(&checkpoint->config_file), checkpoint->index_file.bytes,
                               checkpoint->index_file.size);
    for (int64_t i = 0; i < checkpoint->num_shards; i++) {
        const besa__shard *shard = &checkpoint->shards[i];
        hash = besa__hash_integer(hash, (int64_t)shard->hash);
        hash = besa__hash_integer(hash, (int64_t)shard->size);
        hash = besa__hash_integer(hash, (int64_t)shard->stat.st_mtime);
        hash = besa__hash_integer(hash, BESA__NANOSECONDS(&shard->stat, m));
    }
    return hash;
}

/* What the method does not look at gets its default: no resumed run is refused for it. */
static void besa__ignore_options(besa_prune_options *o)
{
    const besa_prune_options given = *o;
    for (const besa_option *row = besa__options; row->name; row++)
        if (!besa__option_used(row, &given)) besa__option_set(row, (unsigned char *)o + row->offset, row->standard);
    if (o->method != BESA_METHOD_MAGNITUDE) o->magnitude_per_row = 0;
    if (o->granularity == BESA_GRANULARITY_BLOCK) o->whole_target = 0;
    if (given.learn == BESA_LEARN_RATES) {      /* clips learn, if anything */
        o->weight_lr = besa__find_option("weight_lr")->standard;
        o->weight_warmup = besa__find_option("weight_warmup")->standard;
        o->learn_vectors = 0;
        if (besa__has_rates(o)) o->weight_epochs = (int64_t)besa__find_option("weight_epochs")->standard;
    }
    if (!besa__has_rates(o) && given.learn != BESA_LEARN_BOTH) o->epochs = (int64_t)besa__find_option("epochs")->standard;
    if (given.learn != BESA_LEARN_BOTH) o->rank_interval = (int64_t)besa__find_option("rank_interval")->standard;
    if (o->method == BESA_METHOD_SPARSEGPT || o->method == BESA_METHOD_KEEP) o->quantize_first = 0;
    if (!besa__clips_learn(&given)) o->clip_lr = besa__find_option("clip_lr")->standard;
    if (!besa__uses_gram(&given)) o->damping = besa__find_option("damping")->standard;
    if (o->refit != BESA_REFIT_CG) o->refit_steps = (int64_t)besa__find_option("refit_steps")->standard;
    if (o->rates.optimizer != BESA_PRODIGY) {
        o->rates.d0 = besa__find_option("d0")->standard;
        o->rates.d_coef = besa__find_option("d_coef")->standard;
    }
}

/* Append " name=value" of an option, under its name on the command line if it has one; exact. */
static void besa__add_option(char *line, size_t size, const besa_option *o, double value)
{
    char text[40];
    besa__json_number back;
    const char *word = text;
    if (o->kind == BESA_OPTION_ENUM) {
        word = o->value;
        for (int i = (int)value; i > 0; i--) word = strchr(word, '|') + 1;
    } else {
        besa__write_text(text, sizeof text, "%.15g", value);
        if (besa__json_scan_number(text, &back) || back.value != value)
            besa__write_text(text, sizeof text, "%.17g", value);
    }
    size_t length = strlen(line);
    besa__write_text(line + length, size - length, " %s=%.*s", o->flag ? o->flag : o->name, (int)strcspn(word, "|"),
                     word);
}

/* All that decides the output's bytes, as one line for the journal: name=value, with a blank between. An option that the
 * method does not look at has its default. */
static void besa__fingerprint(char *line, size_t size, const besa__run *run, const besa_calibration *c)
{
    besa_prune_options used = run->pruner.options;
    char backend[64];
    int64_t tokens = besa__product(c->nsamples, c->seqlen);
    uint64_t ids = besa__hash(BESA__HASH_START, c->ids, (size_t)tokens * sizeof(int32_t)), fixed = BESA__HASH_START;
    for (int64_t i = 0; i < used.num_fixed; i++) {
        fixed = besa__hash(fixed, used.fixed[i].pattern, strlen(used.fixed[i].pattern) + 1);
        fixed = besa__hash_double(fixed, used.fixed[i].sparsity);
    }
    for (int64_t i = 0; i < used.num_block_targets; i++) fixed = besa__hash_double(fixed, used.block_targets[i]);
    if (used.masks) fixed = besa__hash_integer(fixed, (int64_t)besa__source_hash(used.masks));
    besa__write_text(backend, sizeof backend, "%s", run->be->name);
    for (char *at = backend; *at; at++) *at = (char)(*at <= ' ' ? '_' : *at);
    besa__write_text(line, size, "version=%d.%d", BESA_VERSION_MAJOR, BESA_VERSION_MINOR);
    besa__ignore_options(&used);
    for (const besa_option *o = besa__options; o->name; o++)
        besa__add_option(line, size, o, besa__option_get(o, (const unsigned char *)&used + o->offset));
    size_t length = strlen(line);
    besa__write_text(line + length, size - length, " fixed=%016llx backend=%s activations=%d micro-batch=%lld "
                     "sequences=%lldx%lld tokens=%016llx checkpoint=%016llx processes=%d", (unsigned long long)fixed, backend,
                     (int)run->be->activation_dtype, (long long)run->pruner.micro_batch, (long long)c->nsamples,
                     (long long)c->seqlen, (unsigned long long)ids,
                     (unsigned long long)besa__source_hash(run->checkpoint), besa__ranks(run->pruner.shares.comm));
}

/* Masks of some weights of a layer, from number `first` on, as weights of `to_size` bytes, 0 or not. */
static void besa__mask_weights(unsigned char *to, size_t to_size, const besa_tensor *tensor, int is_bits, int64_t columns, int64_t first,
                               int64_t count)
{
    const unsigned char *data = (const unsigned char *)tensor->data;
    size_t size = is_bits ? 1 : besa_dtype_size(tensor->dtype);
    int64_t row_bytes = besa__parts(columns, 8), row = first / columns, column = first % columns;
    for (int64_t k = 0; k < count; k++) {
        uint32_t bits = 0;                      /* of either sign, as floats are stored from the lowest byte on */
        memcpy(&bits, data + (is_bits ? (size_t)(row * row_bytes + column / 8) : (size_t)(first + k) * size), size);
        int kept = is_bits ? (int)(bits >> (column % 8) & 1) : (bits << (33 - 8 * size)) != 0;
        memset(to + (size_t)k * to_size, kept, to_size);
        if (++column == columns) column = 0, row++;
    }
}

/* The masks of a block to where its pruned weights will be, as weights of its dtype, 0 or not, by way of the staging. */
static besa_result besa__read_masks(besa__run *run, int64_t index, besa_error *error)
{
    besa_backend *be = run->be;
    besa__block_tensors t;
    const besa_checkpoint *masks = run->pruner.options.masks;
    size_t to_size = besa_dtype_size(run->dtype);
    int64_t most = BESA__CHUNK_TOKENS * run->config->block.hidden_size;
    if (!masks->is_masks) BESA__TRY(besa__block_bind(&t, masks, index, error));
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&run->config->block, i, &rows, &columns);
        const besa_tensor *tensor = masks->is_masks ? besa__mask_of(masks, index, i, error) : t.weight[i];
        for (int64_t first = 0, count; first < rows * columns; first += count) {
            count = besa__min(most, rows * columns - first);
            besa__mask_weights((unsigned char *)run->staging, to_size, tensor, masks->is_masks, columns, first, count);
            BESA__TRY_ON(be, be->upload(be, BESA_QUEUE_COMPUTE, besa__at(run->pruned[besa__room_of(run, index)][i],
                                        run->dtype, first), run->staging, (size_t)count * to_size), error);
            BESA__TRY_ON(be, be->synchronize(be, BESA_QUEUE_COMPUTE), error);
        }
        besa__release_pages(masks, tensor);
    }
    return BESA_OK;
}

/* Bytes of a finished block's tensor out of the unfinished output, which rank 0 has, to memory of the host. */
static besa_result besa__read_finished(besa__run *run, const besa_tensor *tensor, void *memory, size_t at, size_t size,
                                       besa_error *error)
{
    if (run->writer) BESA__TRY(besa__writer_read(run->writer, tensor, memory, at, size, error));
    return besa__broadcast(run->pruner.shares.comm, memory, size, 0, error);
}

/* Weights of a finished block, from the unfinished output to the device. */
static besa_result besa__read_pruned(besa__run *run, int64_t index, besa_error *error)
{
    besa_backend *be = run->be;
    besa__block_tensors t;
    BESA__TRY(besa__block_bind(&t, run->checkpoint, index, error));
    for (int i = 0; i < BESA_LAYERS; i++) {
        unsigned char *to = (unsigned char *)run->pruned[besa__room_of(run, index)][i];
        void *slot = run->piece_out[0];
        size_t piece = slot ? besa__piece_bytes(run) : t.weight[i]->bytes;
        for (size_t at = 0, size; at < t.weight[i]->bytes; at += size) {
            size = t.weight[i]->bytes - at < piece ? t.weight[i]->bytes - at : piece;
            BESA__TRY(besa__read_finished(run, t.weight[i], slot ? slot : to, at, size, error));
            if (!slot) continue;
            if (run->dtype != run->model.dtype) besa__halves_in(slot, slot, size);
            besa_result result = be->upload(be, BESA_QUEUE_COMPUTE, to + at, slot, size);
            if (result == BESA_OK) result = be->synchronize(be, BESA_QUEUE_COMPUTE);
            BESA__TRY_ON(be, result, error);
        }
    }
    return BESA_OK;
}

/* Norms and biases of a finished block, where they learned: from the unfinished output to where the pruner has them. */
static besa_result besa__read_vectors(besa__run *run, int64_t index, besa_block *block, besa_error *error)
{
    besa_backend *be = run->be;
    besa__block_tensors t;
    const besa__vector *vector = run->pruner.weights.vector;
    float *at = run->pruner.results_vectors;
    BESA__TRY(besa__block_bind(&t, run->checkpoint, index, error));
    for (int i = 0; i < BESA_VECTORS; at += vector[i++].count) {
        if (!t.vector[i]) continue;
        besa_tensor written = *t.vector[i];
        size_t bytes = (size_t)vector[i].count * sizeof(float);
        unsigned char *end = (unsigned char *)at + (bytes - written.bytes); /* read there, the bytes lie ahead of the floats */
        BESA__TRY(besa__read_finished(run, &written, end, 0, written.bytes, error));
        written.data = end;
        BESA__TRY(besa__tensor_floats(at, &written, 0, vector[i].count, error));
        for (int64_t k = 0; k < vector[i].count && besa__norm_offset(run, i) != 0.0f; k++) at[k] += besa__norm_offset(run, i);
        BESA__TRY_ON(be, be->upload(be, BESA_QUEUE_COMPUTE, vector[i].value, at, bytes), error);
        *besa__block_vector(block, i) = vector[i].value;
    }
    return besa__pass_error(be, be->synchronize(be, BESA_QUEUE_COMPUTE), error);
}

/* The figures of a block, in the journal's order. */
static void besa__block_figures(besa_block_report *report, double *figure[BESA__FIGURES])
{
    double *all[BESA__FIGURES] = {&report->loss_uniform, &report->loss_before, &report->loss_masks, &report->loss_after,
                                  &report->loss_all, &report->d, &report->mean_rate};
    memcpy(figure, all, sizeof all);
}

/* Before a block begins to go out: its figures, for the journal. */
static void besa__keep_figures(besa__run *run, int64_t index, besa_block_report *report)
{
    double *figure[BESA__FIGURES];
    besa__block_figures(report, figure);
    for (int i = 0; i < BESA__FIGURES; i++) memcpy(&run->writer->finished[index].figure[i], figure[i], sizeof(double));
}

/* The report of a block that an earlier run finished, or that stays dense: weights are counted again; figures are in the journal
 * of the former (known 1), as long as there is one, and NaN of the latter. */
static besa_result besa__report_reloaded(besa__run *run, int64_t index, int known, const besa_block *block,
                                         void *const pruned[BESA_LAYERS], besa_block_report *report, besa_error *error)
{
    besa_pruner *p = &run->pruner;
    const void *written[BESA_LAYERS];
    double *figure[BESA__FIGURES], value[BESA__FIGURES];
    memset(report, 0, sizeof *report);
    besa__block_figures(report, figure);
    int in_journal = known && run->writer && !run->writer->is_ready; /* which rank 0 has */
    for (int i = 0; i < BESA__FIGURES; i++) value[i] = (double)NAN;
    for (int i = 0; i < BESA__FIGURES && in_journal; i++) memcpy(&value[i], &run->writer->finished[index].figure[i], sizeof(double));
    if (known) BESA__TRY(besa__broadcast(run->pruner.shares.comm, value, sizeof value, 0, error));
    for (int i = 0; i < BESA__FIGURES; i++) *figure[i] = value[i];
    for (int i = 0; i < BESA_LAYERS; i++) written[i] = pruned[i];
    besa_result result = besa__clear_sums(p);
    if (result == BESA_OK) result = besa__count_layers(p, block->weight, BESA__DENSE);
    if (result == BESA_OK) result = besa__count_layers(p, written, BESA__WRITTEN);
    if (result == BESA_OK) result = besa__fetch_results(p);
    besa__report_layers(p, report);
    return besa__pass_error(run->be, result, error);
}

/* A block whose pruned weights are known: the streams go through it; *block comes in dense and leaves pruned. finished 1: an
 * earlier run has written it. */
static besa_result besa__pass_block(besa__run *run, int64_t index, int finished, besa_block *block, besa_block_report *report,
                                    besa_error *error)
{
    besa_backend *be = run->be;
    besa_pruner *p = &run->pruner;
    char name[64];
    void *const *pruned = run->pruned[besa__room_of(run, index)];
    besa__walk walk = besa__pass_walk(p, p->nsamples); /* cut as the passes cut it: the same bytes */
    if (run->has_dense) BESA__TRY_ON(be, besa__stream_forward(&run->dense, walk, block, &p->acts), error);
    BESA__TRY(besa__report_reloaded(run, index, finished, block, pruned, report, error));
    besa__tensor_name(name, sizeof name, run->config, index, "");
    BESA__TRY(besa__check_layers_finite(p, name, BESA__DENSE, error));
    report->target = besa__block_target(run, index);
    if (p->options.masks && report->target > 0) report->target = report->sparsity;
    for (int i = 0; i < BESA_LAYERS; i++) block->weight[i] = pruned[i];
    if (finished && besa__learns_vectors(p)) BESA__TRY(besa__read_vectors(run, index, block, error));
    BESA__TRY_ON(be, besa__stream_forward(&run->calibration, walk, block, &p->acts), error);
    return besa__pass_error(be, be->synchronize(be, BESA_QUEUE_COMPUTE), error);
}

/* A block that is finished, by an earlier run or because it stays dense: its weights, and what it does to the streams. */
static besa_result besa__take_block(besa__run *run, int64_t index, int64_t done, besa_block *block, besa_block_report *report,
                                    besa_error *error)
{
    besa_backend *be = run->be;
    besa__meter *meter = &run->pruner.meter;
    meter->pass = BESA_PASS_COMMIT;
    meter->cost = 1;
    meter->done = 0;
    BESA__TRY(besa__tick(meter, 0, error));
    besa__use_workspace(be, run->pruner.workspace, run->pruner.workspace_bytes);
    if (index < done) BESA__TRY(besa__read_pruned(run, index, error));
    for (int i = 0; i < BESA_LAYERS && index >= done; i++) {
        int64_t rows, columns;
        besa_block_layer(&run->config->block, i, &rows, &columns);
        size_t bytes = (size_t)(rows * columns) * besa_dtype_size(run->dtype);
        BESA__TRY_ON(be, be->copy(be, BESA_QUEUE_COMPUTE, run->pruned[besa__room_of(run, index)][i], block->weight[i], bytes),
                     error);
    }
    return besa__pass_block(run, index, index < done, block, report, error);
}

/* Prune block `index` and begin to write it; meanwhile the next comes in and the last one goes out. */
static besa_result besa__prune_block(besa__run *run, int64_t index, besa_block *block, besa_report *report,
                                     besa_error *error)
{
    char name[64];
    void *const *pruned = run->pruned[besa__room_of(run, index)];
    double target = besa__block_target(run, index);
    besa__tensor_name(name, sizeof name, run->config, index, "");
    if (target > 0) {
        if (run->pruner.options.masks) BESA__TRY(besa__read_masks(run, index, error));
        besa__pruner_retarget(&run->pruner, target);
        besa_result result = besa__pruner_run(&run->pruner, block, name, &run->calibration, run->has_dense ? &run->dense : NULL,
                                              pruned, &report->block[index], error);
        besa__pruner_retarget(&run->pruner, run->target);
        BESA__TRY(result);
        *block = *besa_pruner_block(&run->pruner);
    } else BESA__TRY(besa__take_block(run, index, 0, block, &report->block[index], error));
    BESA__TRY(besa__out_finish(run, report, error));
    if (!run->writer) return BESA_OK;
    besa__keep_figures(run, index, &report->block[index]);
    BESA__TRY(besa__transfer_begin(&run->out, run, index, error));
    if (target > 0 && besa__learns_vectors(&run->pruner)) BESA__TRY(besa__out_vectors(run, error));
    if (besa__has_codes(run->writer, index)) BESA__TRY(besa__grids_out(run, error));
    return run->be->unified_memory ? besa__out_finish(run, report, error) : BESA_OK;
}

/* Prune, or take over, block `index`. */
static besa_result besa__run_block(besa__run *run, int64_t index, int64_t done, besa_report *report, besa_error *error)
{
    besa_block block;
    double clock = besa__seconds(), read;
    run->pruner.meter.block = index;
    BESA__TRY(besa__in_finish(run, index, &block, &read, error));
    if (!run->be->unified_memory && index + 1 < run->config->num_hidden_layers)
        BESA__TRY(besa__in_begin(run, index + 1, error));
    if (index == done) run->pruner.meter.began = clock;
    if (index < done) BESA__TRY(besa__take_block(run, index, done, &block, &report->block[index], error));
    else BESA__TRY(besa__prune_block(run, index, &block, report, error));
    report->block[index].seconds[BESA_PASS_READ] = read;
    return besa__test_forward(run, &block, error);
}

/* A warning where learning alone cannot reach the target. */
static void besa__note_range(const besa__run *run, char **notes)
{
    const besa_prune_options *o = &run->pruner.options;
    if (!besa__has_rates(o) || o->rates.plain_softmax || !o->no_projection) return;
    double low = besa__reachable_rate(&run->pruner.rates, 0), high = besa__reachable_rate(&run->pruner.rates, 1);
    if (o->rates.target >= low && o->rates.target <= high) return;
    besa__notes_add(notes,
                    "warning: target %g is outside the rates %.3f .. %.3f that these options can reach without projection",
                    o->rates.target, low, high);
}

/* Learning steps before which rates hardly move: logits have to change by about 0.3. AdamW changes them by lr a step.
 * Prodigy's step is d lr, and d grows from d0 by a factor of about 1 + 1.2 (d_coef lr)^0.72 from the third step on, as
 * measured for d_coef 0.05 to 500. */
static double besa__steps_needed(const besa_rate_options *o)
{
    if (o->optimizer == BESA_ADAMW) return ceil(0.3 / o->lr);
    double growth = 1 + 1.2 * pow(o->d_coef * o->lr, 0.72), distance = log(0.3 / (o->d0 * o->lr));
    return ceil(2 + fmax(distance, 0) / log(growth));
}

/* A warning where learning ends before rates have moved. */
static void besa__note_steps(const besa_pruner *p, char **notes)
{
    const besa_prune_options *o = &p->options;
    const char *larger = o->rates.optimizer == BESA_ADAMW ? "lr" : "d_coef";
    int64_t steps = o->rates.steps;
    double needed = besa__steps_needed(&o->rates);
    if (!besa__has_rates(o) || (double)steps >= needed) return;
    besa__notes_add(notes, "warning: %lld learning step%s a block (sequences x epochs / batch size): rates hardly move before "
                    "step %.0f, and masks are nearly those of uniform rates by importance %s; more sequences or epochs, a "
                    "smaller batch or a larger %s help", (long long)steps, steps == 1 ? "" : "s", needed,
                    besa__importance_row(o->importance)->name, larger);
}

/* Warnings that a run can give before it begins. */
static void besa__note_settings(const besa__run *run, char **notes)
{
    int64_t longest = run->config->max_position_embeddings;
    const char *line = besa_checkpoint_notes(run->checkpoint), *end;
    for (; (end = strchr(line, '\n')) != NULL; line = end + 1) besa__notes_add(notes, "%.*s", (int)(end - line), line);
    besa__note_range(run, notes);
    besa__note_steps(&run->pruner, notes);
    int64_t positions = besa__max(run->turns.positions, run->test_turns.positions);
    if (positions > longest)
        besa__notes_add(notes, "warning: sequences of %lld tokens, the model's max_position_embeddings is %lld",
                        (long long)positions, (long long)longest);
}

/* A line where fixed layers did not come out within a thousandth of their sparsity. */
static void besa__note_fixed(const besa__run *run, const besa_prune_options *o, besa_report *report)
{
    char name[128], farthest[128] = "";
    double least = 1e-3, has = 0, wanted = 0;
    for (int64_t b = besa__first_block(run); b < besa__end_block(run) && o->num_fixed > 0 && !o->bits; b++)
        for (int i = 0; i < BESA_LAYERS; i++) {
            const besa_layer_report *layer = &report->block[b].layer[i];
            besa__tensor_name(name, sizeof name, run->config, b, "");
            double rate = besa__fixed_rate(o, name, i), got = (double)layer->pruned / (double)layer->weights;
            if (rate <= 0 || fabs(got - rate) <= least) continue; /* not fixed, or dense */
            least = fabs(got - rate);
            has = got;
            wanted = rate;
            snprintf(farthest, sizeof farthest, "%s%s", name, besa__layers[i].path);
        }
    if (farthest[0])
        besa__notes_add(&report->notes, "%s has sparsity %.4f, not the %g that it is fixed at: rows hold whole weights, and zeros "
                        "of the source stay; no fixed layer is farther off", farthest, has, wanted);
}

/* A warning where what was learned of the weights is worse than the masks alone. */
static void besa__note_learned(const besa__run *run, besa_report *report)
{
    int64_t worse = 0, first = 0;
    int weights = besa__learns_weights(&run->pruner);
    for (int64_t b = 0; b < report->num_blocks; b++)
        if (report->block[b].loss_after > report->block[b].loss_masks && worse++ == 0) first = b;
    if (worse == 0) return;
    besa__notes_add(&report->notes, "warning: learning made the loss of %lld block%s larger than with the masks alone, in block %lld "
                    "%.3g instead of %.3g; a %s below %g may help", (long long)worse, worse == 1 ? "" : "s", (long long)first,
                    report->block[first].loss_after, report->block[first].loss_masks, weights ? "weight_lr" : "clip_lr",
                    weights ? run->pruner.options.weight_lr : run->pruner.options.clip_lr);
}

static void besa__report_totals(besa_report *report, double target)
{
    report->weights = report->pruned = 0;
    for (int64_t b = 0; b < report->num_blocks; b++)
        for (int i = 0; i < BESA_LAYERS; i++) {
            report->weights += report->block[b].layer[i].weights;
            report->pruned += report->block[b].layer[i].pruned;
        }
    report->sparsity = (double)report->pruned / (double)report->weights;
    report->target = target;
}

/* The run's options as the report has them, without what is the caller's. */
static void besa__report_options(const besa__run *run, besa_report *report)
{
    besa_prune_options *o = &report->options;
    *o = run->pruner.options;
    if (o->method == BESA_METHOD_KEEP) o->rates.target = report->sparsity;
    o->fixed = NULL;
    o->block_targets = NULL;
    o->masks = NULL;
    o->preset = NULL;
    o->comm = NULL;
    o->progress = NULL;
    o->step = NULL;
    o->card = NULL;
    o->user = NULL;
}

/* All blocks are done: the whole report but for the seconds, and the texts that go into the output. */
static besa_result besa__report_run(besa__run *run, const besa_calibration *calibration, besa_report *report, besa_error *error)
{
    const besa_prune_options *o = &run->pruner.options;
    besa__writer *w = run->writer;
    int keeps = o->method == BESA_METHOD_KEEP;
    besa__report_totals(report, besa__model_target(run));
    if (keeps) report->target = report->sparsity;
    besa__note_fixed(run, o, report);
    besa__note_learned(run, report);
    if (keeps && report->pruned == 0) besa__notes_add(&report->notes, "warning: nothing is pruned: the masks' checkpoint has no zeros");
    if (o->num_fixed == 0 && !o->no_projection && !o->bits && fabs(report->sparsity - report->target) > 0.02)
        besa__notes_add(&report->notes, "warning: sparsity %.4f is not the target %.4f: tied scores or zeros in the source",
                        report->sparsity, report->target);
    besa__report_options(run, report);
    report->dense_perplexity = calibration->dense_perplexity;
    report->record = besa__record_begin(run->checkpoint, run->be, calibration, o, w ? w->source_record : NULL);
    if (!w || !report->record) return report->record ? BESA_OK : besa__fail(error, BESA_ERROR_MEMORY, "out of memory for the report");
    w->record = besa__record_json(report);
    if (!w->record) return besa__fail(error, BESA_ERROR_MEMORY, "out of memory for " BESA__RECORD);
    const char *card = o->card ? o->card(o->user, report) : NULL;
    return card ? besa__copy_text(&w->card, card, strlen(card), BESA__CARD, error) : BESA_OK;
}

/* Where it happened, behind a message that does not say so. */
static void besa__add_block(const besa__run *run, besa_error *error, int64_t index)
{
    char name[128];
    if (!error) return;
    besa__tensor_name(name, sizeof name, run->config, index, "");
    name[strlen(name) - 1] = 0; /* the dot */
    size_t length = strlen(error->message);
    if (!strstr(error->message, name)) snprintf(error->message + length, sizeof error->message - length, " [%s]", name);
}

/* All blocks, and the perplexity where it is asked for. */
static besa_result besa__run_prune(besa__run *run, int64_t done, besa_report *report, besa_error *error)
{
    BESA__TRY(besa__load_rope(run, error));
    const besa__shares *shares = &run->pruner.shares;
    BESA__TRY(besa__stream_embed(run, &run->calibration, run->ids, shares, error));
    if (run->has_dense) BESA__TRY(besa__stream_embed(run, &run->dense, run->ids, shares, error));
    if (run->has_test) BESA__TRY(besa__stream_embed(run, &run->test, run->test_ids, NULL, error));
    run->pruner.meter.first_block = done;
    run->pruner.meter.meanwhile = besa__run_share;
    run->pruner.meter.run = run;
    for (int64_t i = 0; i < run->config->num_hidden_layers; i++) {
        besa_result result = besa__run_block(run, i, done, report, error);
        if (result == BESA_ERROR_NUMERIC || result == BESA_ERROR_TARGET || result == BESA_ERROR_NOT_FINITE)
            besa__add_block(run, error, i);
        if (result != BESA_OK && result != BESA_ERROR_DEVICE && result != BESA_ERROR_WRITE)
            besa__out_finish(run, report, NULL); /* the block before is whole: keep it, if that works */
        BESA__TRY(result);
    }
    BESA__TRY(besa__out_finish(run, report, error));
    return run->windows ? besa__test_windows(run, &report->perplexity, report->window, report->kl, error) : BESA_OK;
}

/* Which blocks have codes. */
static besa__codes_shape besa__run_codes(const besa__run *run)
{
    const besa_prune_options *o = &run->pruner.options;
    besa__codes_shape codes = {o->bits, o->group_size, besa__first_block(run), besa__end_block(run)};
    return codes;
}

/* All ranks run with the same arguments as rank 0; line (BESA__LINE): this one's. */
static besa_result besa__same_arguments(const besa_comm *comm, const char *line, besa_error *error)
{
    char first[BESA__LINE] = "", what[500];
    besa__write_text(first, sizeof first, "%s", line);
    BESA__TRY(besa__broadcast(comm, first, sizeof first, 0, error));
    if (!strcmp(first, line)) return BESA_OK;
    besa__name_differences(what, sizeof what, first, line, "rank");
    return besa__fail(error, BESA_ERROR_COMM, "rank %d has other arguments, tokens or files than rank 0: %s. Expected the same; "
                      "copies of a checkpoint need the times of the original (cp -p, rsync -a)", comm->rank, what);
}

/* Once memory is there: open the output, run, and close the output as the result asks. Rank 0 has the output, and all end when
 * it is complete. */
static besa_result besa__prune_into(besa__run *run, const char *output, const besa_calibration *calibration,
                                    besa_report *report, besa_error *error)
{
    const besa_comm *comm = run->pruner.shares.comm;
    int64_t done = 0, blocks = run->config->num_hidden_layers;
    char fingerprint[BESA__LINE - 64], complete = 1;
    besa__note_settings(run, &report->notes);
    if (output || comm) besa__fingerprint(fingerprint, sizeof fingerprint, run, calibration);
    if (comm) BESA__TRY(besa__same_arguments(comm, fingerprint, error));
    if (output && (!comm || comm->rank == 0)) {
        besa__codes_shape codes = besa__run_codes(run);
        BESA__TRY(besa__writer_open(&run->writer, run->checkpoint, output, fingerprint, blocks, besa__learns_vectors(&run->pruner),
                                    codes.bits ? &codes : NULL, &done, &report->notes, error));
    }
    besa_result result = besa__broadcast(comm, &done, sizeof done, 0, error);
    report->resumed_blocks = done;
    if (result == BESA_OK) result = besa__run_prune(run, done, report, error);
    besa__background_stop(&run->background); /* the writer is this thread's again */
    if (result == BESA_OK) result = besa__report_run(run, calibration, report, error);
    if (result == BESA_OK && comm) result = comm->barrier(comm->user, error);
    besa__comm_fail(comm, result, error);
    if (run->writer && result == BESA_OK) result = besa__writer_finish(run->writer, error);
    else besa__writer_abandon(run->writer, error); /* finished blocks are kept */
    return result == BESA_OK ? besa__broadcast(comm, &complete, 1, 0, error) : result;
}

/* A fixed rate that matches no layer is a slip of the pen. */
static besa_result besa__check_fixed(const besa__run *run, const besa_prune_options *options, besa_error *error)
{
    char name[128];
    for (int64_t f = 0; f < options->num_fixed; f++) {
        int matches = 0;
        for (int64_t b = besa__first_block(run); b < besa__end_block(run) && !matches; b++)
            for (int i = 0; i < BESA_LAYERS && !matches; i++) {
                besa__tensor_name(name, sizeof name, run->config, b, besa__layers[i].path);
                matches = besa__match(options->fixed[f].pattern, name);
            }
        besa__tensor_name(name, sizeof name, run->config, 0, besa__layers[0].path);
        if (!matches)
            return besa__fail(error, BESA_ERROR_OPTION, "layers fixed at %g: \"%s\" matches none; layers have names such as %s",
                              options->fixed[f].sparsity, options->fixed[f].pattern, name);
    }
    return BESA_OK;
}

/* Tensors that are copied as they are must be finite too. */
static besa_result besa__check_copied(const besa__run *run, besa_error *error)
{
    const besa_tensor *copied[3] = {run->model.embedding, run->model.norm, run->model.head};
    for (int i = 0; i < 3; i++) {
        const besa_tensor *t = copied[i];
        if (!t || (i == 2 && t == run->model.embedding)) continue;
        BESA__TRY(besa__check_finite(run, t, error));
    }
    return BESA_OK;
}

static besa_result besa__prune_start(besa__run *run, const besa_checkpoint *checkpoint, besa_backend *be,
                                     const besa_calibration *calibration, const besa_prune_options *options,
                                     besa_error *error)
{
    BESA__TRY(besa__run_init(run, checkpoint, be, error));
    BESA__TRY(besa__run_calibration(run, calibration, options, error));
    BESA__TRY(besa__check_depth(run, error));
    BESA__TRY(besa__check_fixed(run, options, error));
    BESA__TRY(besa__check_masks(run, error));
    return besa__run_fit(run, &run->pruner.micro_batch, options->device_memory, error);
}

/* Zeroed memory of count elements of the report. */
static besa_result besa__report_array(void **array, int64_t count, size_t size, besa_error *error)
{
    BESA__TRY(besa__malloc(array, besa__bytes(count, size), "the report", error));
    memset(*array, 0, (size_t)count * size);
    return BESA_OK;
}

static besa_result besa__report_allocate(besa_report *report, const besa__run *run, besa_error *error)
{
    void *array;
    report->num_blocks = run->config->num_hidden_layers;
    BESA__TRY(besa__report_array(&array, report->num_blocks, sizeof *report->block, error));
    report->block = (besa_block_report *)array;
    if (!run->windows) return BESA_OK;
    report->test_windows = run->windows;
    BESA__TRY(besa__report_array(&array, report->test_windows, sizeof *report->window, error));
    report->window = (besa_window *)array;
    if (!run->against) return BESA_OK;
    BESA__TRY(besa__report_array(&array, report->test_windows * (run->test.seqlen - 1), sizeof *report->kl, error));
    report->kl = (float *)array;
    return BESA_OK;
}

/* What is known to be wrong before memory is taken. */
static besa_result besa__prune_check(besa__run *run, const besa_calibration *calibration, besa_error *error)
{
    BESA__TRY(besa__check_ids(run, run->ids, calibration->nsamples * calibration->seqlen, "calibration", error));
    if (run->windows) BESA__TRY(besa__check_ids(run, calibration->test_ids, run->windows * run->test.seqlen, "test", error));
    BESA__TRY(besa__check_reference(run->against, error));
    BESA__TRY(besa__check_copied(run, error));
    return besa__run_agree(run, error);
}

BESA_API besa_result besa_prune(const besa_checkpoint *checkpoint, const char *output, besa_backend *be,
                                const besa_calibration *calibration, const besa_prune_options *options,
                                besa_report *report, besa_error *error)
{
    besa__run run;
    besa_report local;
    double start = besa__seconds();
    if (!report) report = &local;
    memset(report, 0, sizeof *report);
    besa_result result = besa__prune_start(&run, checkpoint, be, calibration, options, error);
    if (result == BESA_OK) result = besa__prune_check(&run, calibration, error);
    if (result == BESA_OK) result = besa__run_allocate(&run, error);
    if (result == BESA_OK) result = besa__report_allocate(report, &run, error);
    if (result == BESA_OK) result = besa__prune_into(&run, output, calibration, report, error);
    if (result == BESA_OK) report->seconds = besa__seconds() - start;
    besa__comm_fail(options->comm, result, error);
    besa__run_close(&run);
    if (result != BESA_OK || report == &local) besa_report_free(report);
    return result;
}

/* ============================================================================================
 * // >>plan                  what a run would take
 * ============================================================================================
 * Owns no memory: the layout of section run on nothing, and FLOP counted from shapes. */

/* FLOP of a learning step that losses within the block add, per token: attention's half of the dense block; or every layer's
 * outputs twice, without the way back. */
static double besa__parts_flop(const besa__run *run, double weights, double qkv, double attention)
{
    const besa_block_shape *s = &run->config->block;
    double o = (double)(s->num_attention_heads * s->head_dim) * (double)s->hidden_size;
    double down = (double)s->intermediate_size * (double)s->hidden_size;
    if (run->pruner.options.granularity == BESA_GRANULARITY_ATTN_MLP) return 2 * (qkv + o) + attention;
    if (run->pruner.options.granularity == BESA_GRANULARITY_LAYER) return 2 * (weights - down + qkv) - 2.5 * attention;
    return 0;
}

/* FLOP of all products: 2 per weight and token forward, 3.7 more in the learning step (q, k and v need no input
 * gradient, but where the first norm learns), attention's causal half, Gram matrices, and a block's refits. */
static void besa__plan_flop(const besa__run *run, besa_plan_result *plan)
{
    double *pass = plan->pass_flop, blocks = (double)(besa__end_block(run) - besa__first_block(run));
    const besa_block_shape *s = &run->config->block;
    const besa_prune_options *o = &run->pruner.options;
    double tokens = (double)(run->pruner.nsamples * run->pruner.seqlen), weights = 0, gram = 0, qkv = 0;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(s, i, &rows, &columns);
        weights += (double)rows * (double)columns;
        if (besa__layers[i].group == BESA__GROUP_QKV) qkv += (double)rows * (double)columns;
    }
    for (int i = 0; i < BESA__INPUTS; i++) gram += (double)besa__input_columns(s, i) * (double)besa__input_columns(s, i);
    double per_key = 2 * (double)(s->num_attention_heads * s->head_dim), attention = per_key * (double)run->pruner.seqlen;
    double forward = 2 * weights + attention, backward = 4 * weights - 2 * qkv + 2.5 * attention;
    double dense = besa__uses_inputs(o) ? 1 : (double)run->pruner.reference / (double)run->pruner.nsamples;
    double scores = (double)besa__gradient_sequences(&run->pruner) / (double)run->pruner.nsamples, all = (double)run->config->num_hidden_layers;
    double step = forward + backward + besa__parts_flop(run, weights, qkv, attention);
    int vectors = besa__learns_vectors(&run->pruner), layers = o->granularity == BESA_GRANULARITY_LAYER;
    pass[BESA_PASS_DENSE] = blocks * tokens * (dense * forward + (besa__uses_gram(o) ? gram : 0) + (layers ? 2 * weights : 0)) +
                            run->has_dense * all * tokens * forward; /* layers: their dense outputs, for channel norms */
    pass[BESA_PASS_LEARN] = blocks * tokens * (((double)besa__mask_epochs(&run->pruner) + scores) * step +
                            (vectors && o->learn == BESA_LEARN_BOTH ? 2 * qkv * (double)o->epochs : 0));
    pass[BESA_PASS_WEIGHTS] = blocks * tokens * (double)o->weight_epochs *
                              ((besa__learns_last(&run->pruner) ? step : 0) + (vectors ? 2 * qkv : 0));
    pass[besa__finds_masks(&run->pruner) ? BESA_PASS_LEARN : BESA_PASS_RANK] += blocks * besa__refit_flop(&run->pruner);
    pass[BESA_PASS_COMMIT] = all * tokens * forward;
    double head = 2 * (double)run->config->vocab_size * (double)s->hidden_size, block = 2 * weights + per_key * (double)run->test.seqlen;
    if (run->against)
        head += 2 * (double)run->config->vocab_size * (double)besa_checkpoint_config(run->against->checkpoint)->block.hidden_size;
    if (run->has_test) plan->test_flop = (double)(run->test.count * run->test.seqlen) * (head + block * all);
    plan->flop = plan->test_flop;
    for (int i = 0; i < BESA_PASS_COUNT; i++) plan->flop += pass[i];
}

/* Bytes that section comm's list has of a run: statistics of every block that is pruned, and of every step the bucket sums, or
 * the gradient where weights learn. */
static double besa__plan_reduced(const besa__run *run)
{
    const besa_pruner *p = &run->pruner;
    const besa_prune_options *o = &p->options;
    double weights = 0, sums = 0, floats = 0, batches = (double)besa__parts(p->shares.all, o->batch_size);
    for (int i = 0; i < BESA__INPUTS; i++) {
        double columns = (double)besa__input_columns(&p->shape, i);
        floats += (besa__uses_gram(o) ? columns * columns : 0) + (besa__uses_sums(o) ? columns : 0);
    }
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        weights += (double)rows * (double)columns;
        sums += (double)rows * (double)o->rates.candidates;
        if (besa__learns(p) && o->granularity == BESA_GRANULARITY_LAYER) floats += (double)besa__norms(p) * (double)rows;
    }
    if (besa__learns(p)) floats += (double)besa__norms(p) * (double)p->shape.hidden_size;
    if (besa__uses_gradients(o)) floats += weights;
    floats += (double)besa__mask_epochs(p) * batches * (o->learn == BESA_LEARN_BOTH ? weights : besa__learns_rates(p) ? sums : 0);
    if (besa__learns_last(p) && besa__learns_weights(p)) floats += (double)o->weight_epochs * batches * weights;
    return p->shares.comm ? 4 * floats * (double)(besa__end_block(run) - besa__first_block(run)) : 0;
}

/* Pages of the checkpoint that are resident at a time, at most: a block's weights; for embedding, a row of each token of a
 * chunk, each with the pages around it; for the head, a chunk of rows. */
static size_t besa__plan_mapped(const besa__run *run)
{
    const besa_tensor *table = run->model.embedding, *head = run->model.head;
    uint64_t row = table->bytes / (uint64_t)table->shape[0], block = 0, rows = 0;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t r, c;
        besa_block_layer(&run->config->block, i, &r, &c);
        block = besa__add_sizes(block, besa__bytes(besa__product(r, c), besa_dtype_size(run->model.dtype)));
    }
    uint64_t embedded = besa__bytes(BESA__CHUNK_TOKENS, row + BESA__PAGES_AROUND);
    if (embedded > table->bytes) embedded = table->bytes;
    if (run->has_test) rows = besa__bytes(besa__vocab_chunk(run), (uint64_t)head->bytes / (uint64_t)head->shape[0]);
    head = run->against_model.head;
    if (run->against)
        rows = besa__add_sizes(rows, besa__bytes(besa__vocab_chunk(run), (uint64_t)head->bytes / (uint64_t)head->shape[0]));
    if (rows < embedded) rows = embedded;
    return besa__size(block > rows ? block : rows);
}

static size_t besa__reference_bytes(const besa__run *run)
{
    int64_t windows = run->against->windows, tokens = windows * run->against->seqlen;
    uint64_t bytes = besa__hidden_bytes(besa_checkpoint_config(run->against->checkpoint), run->be, tokens);
    bytes = besa__add_sizes(bytes, besa__bytes(tokens, sizeof(int32_t)));
    return besa__size(besa__add_sizes(bytes, besa__bytes(windows, sizeof(double))));
}

BESA_API besa_result besa_plan(const besa_checkpoint *checkpoint, besa_backend *be, const besa_calibration *calibration,
                               const besa_prune_options *options, besa_plan_result *plan, besa_error *error)
{
    besa__run run;
    memset(plan, 0, sizeof *plan);
    besa_result result = besa__prune_start(&run, checkpoint, be, calibration, options, error);
    if (result == BESA_OK) {
        besa__arena device = {NULL, 0}, host = {NULL, 0};
        besa__run_place(&run, &device, &host);
        plan->device_bytes = (size_t)device.used;
        plan->host_bytes = (size_t)host.used;
        plan->x_on_host = run.calibration.streamed;
        plan->yref_on_host = run.has_dense ? run.dense.streamed : run.pruner.yref.streamed;
        plan->test_on_host = run.has_test && run.test.streamed;
        char *notes = NULL;
        besa__note_settings(&run, &notes);
        if (notes) snprintf(plan->notes, sizeof plan->notes, "%s", notes);
        BESA_FREE(notes);
        plan->micro_batch = run.pruner.micro_batch;
        if (run.against) plan->reference_bytes = besa__reference_bytes(&run);
        besa__plan_flop(&run, plan);
        plan->reduced_bytes = besa__plan_reduced(&run);
        plan->mapped_block_bytes = besa__plan_mapped(&run);
        for (int64_t i = 0; i < checkpoint->num_shards; i++) plan->disk_bytes += checkpoint->shards[i].size;
        besa__codes_shape codes = besa__run_codes(&run);
        if (codes.bits) plan->disk_bytes += besa__codes_bytes(run.config, &codes);
    }
    besa__run_close(&run);
    return result;
}

/* ============================================================================================
 * // >>outliers              sparsities of the blocks from their outliers
 * ============================================================================================
 * Owns a run of the dense model that prunes nothing: laid out as one of method wanda, over the calibration stream. What is
 * measured and the rule are OWL's (arXiv 2310.05175), as its published code has them: a "layer" there is a block, the mean is
 * that of all its scores together, and a score is Wanda's. New are fixed layers, which are left out, and the case of equal
 * shares. */

/* Of the block's scores, all rows of its layers one after another, to p->results_counts: as doubles their sums, or as int32_t
 * how many exceed the limit. Waits. */
static besa_result besa__score_layers(besa_pruner *p, const besa_block *block, int sums, float limit)
{
    besa_backend *be = p->be;
    double *sum = (double *)(void *)p->counts; /* (2, rows) int32_t are as many bytes */
    int32_t *above = p->counts;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        BESA__TRY(be->score_rows(be, sums ? sum : NULL, sums ? NULL : above, block->weight[i], p->dtype,
                                 besa__score_scale(p, i), limit, rows, columns));
        sum += rows;
        above += rows;
    }
    size_t bytes = (size_t)p->rows * (sums ? sizeof *sum : sizeof *above);
    BESA__TRY(be->download(be, BESA_QUEUE_COMPUTE, p->results_counts, p->counts, bytes));
    return be->synchronize(be, BESA_QUEUE_COMPUTE);
}

/* What besa__score_layers has left, summed over all rows of layers that are not fixed; the number of their scores. */
static double besa__sum_layers(const besa_pruner *p, int sums, double *weights)
{
    const double *sum = (const double *)(const void *)p->results_counts;
    const int32_t *above = p->results_counts;
    double total = 0;
    *weights = 0;
    for (int i = 0; i < BESA_LAYERS; i++) {
        int64_t rows, columns;
        besa_block_layer(&p->shape, i, &rows, &columns);
        for (int64_t r = 0; r < rows && p->fixed[i] < 0; r++) total += sums ? sum[r] : (double)above[r];
        if (p->fixed[i] < 0) *weights += (double)rows * (double)columns;
        sum += rows;
        above += rows;
    }
    return total;
}

/* The share of a block's outliers, from the sums of its layers' inputs. */
static besa_result besa__outlier_share(besa_pruner *p, const char *name, const besa_block *block, double threshold,
                                       double *share, besa_error *error)
{
    double weights;
    for (int i = 0; i < BESA_LAYERS; i++) p->fixed[i] = besa__fixed_rate(&p->options, name, i);
    BESA__TRY_ON(p->be, besa__finish_statistics(p), error);
    BESA__TRY_ON(p->be, besa__score_layers(p, block, 1, 0), error);
    double mean = besa__sum_layers(p, 1, &weights) / weights;
    *share = -1;
    if (weights == 0) return BESA_OK;
    if (!besa__is_finite(mean))
        return besa__fail(error, BESA_ERROR_NOT_FINITE, "the scores |W| l2(X) have a mean of %g: a weight or an input of a layer "
                          "is not finite", mean);
    BESA__TRY_ON(p->be, besa__score_layers(p, block, 0, (float)(threshold * mean)), error);
    *share = besa__sum_layers(p, 0, &weights) / weights;
    return BESA_OK;
}

/* The dense block's outputs in the place of its inputs, and the sums of its layers' inputs. */
static besa_result besa__outlier_pass(besa__run *run, const besa_block *block, besa_error *error)
{
    besa_pruner *p = &run->pruner;
    besa__walk walk = besa__pass_walk(p, p->nsamples);
    besa__use_workspace(p->be, p->workspace, p->workspace_bytes);
    BESA__TRY_ON(p->be, besa__clear_sums(p), error);
    while (besa__walk_next(&walk)) {
        void *x;
        BESA__TRY_ON(p->be, besa__stream_open(&run->calibration, &walk, &x), error);
        BESA__TRY_ON(p->be, besa__block_forward(p->be, block, &p->acts, x, x, walk.count, p->seqlen, 0), error);
        BESA__TRY_ON(p->be, besa__add_statistics(p, walk.count * p->seqlen), error);
        BESA__TRY_ON(p->be, besa__stream_close(&run->calibration, 1), error);
        BESA__TRY(besa__tick(&p->meter, (double)walk.count / (double)p->nsamples, error));
    }
    return besa__pass_error(p->be, besa__reduce_statistics(p), error);
}

/* All blocks to the last that is pruned; while one computes, the next comes in. */
static besa_result besa__run_outliers(besa__run *run, double threshold, double *shares, besa_error *error)
{
    besa__meter *meter = &run->pruner.meter;
    int64_t first = besa__first_block(run), end = besa__end_block(run);
    meter->blocks = end;
    meter->pass = BESA_PASS_DENSE;
    meter->cost = meter->pass_cost = 1;
    meter->meanwhile = besa__run_share;
    meter->run = run;
    BESA__TRY(besa__load_rope(run, error));
    BESA__TRY(besa__stream_embed(run, &run->calibration, run->ids, &run->pruner.shares, error));
    for (int64_t i = 0; i < end; i++) {
        besa_block block;
        char name[64];
        double seconds;
        meter->block = i;
        meter->done = 0;
        besa__tensor_name(name, sizeof name, run->config, i, "");
        BESA__TRY(besa__in_finish(run, i, &block, &seconds, error));
        if (!run->be->unified_memory && i + 1 < end) BESA__TRY(besa__in_begin(run, i + 1, error));
        besa_result result = besa__outlier_pass(run, &block, error);
        if (result == BESA_OK && i >= first)
            result = besa__outlier_share(&run->pruner, name, &block, threshold, &shares[i - first], error);
        if (result == BESA_ERROR_NOT_FINITE) besa__add_block(run, error, i);
        BESA__TRY(result);
        BESA__TRY_ON(run->be, run->be->synchronize(run->be, BESA_QUEUE_COMPUTE), error); /* its memory is used again */
    }
    return BESA_OK;
}

/* The options of the run: what the caller's say of where, how much memory, and whom to tell. */
static besa_result besa__outlier_options(besa_prune_options *o, const besa_prune_options *given, besa_error *error)
{
    const char *other = given->depth_slope != 0 ? "a depth_slope is" : given->pattern_n || given->pattern_m ? "a pattern is"
                        : given->method == BESA_METHOD_KEEP ? "method keep is" : NULL;
    if (other)
        return besa__fail(error, BESA_ERROR_OPTION, "%s given, but the sparsity of every block is to come from its outliers: "
                          "expected one of them", other);
    memset(o, 0, sizeof *o);
    o->method = BESA_METHOD_WANDA;
    o->rates.target = 0.5;                      /* which nothing looks at */
    o->first_block = given->first_block;
    o->num_blocks = given->num_blocks;
    o->fixed = given->fixed;
    o->num_fixed = given->num_fixed;
    o->device_memory = given->device_memory;
    o->comm = given->comm;
    o->progress = given->progress;
    o->user = given->user;
    return BESA_OK;
}

BESA_API besa_result besa_outliers(const besa_checkpoint *checkpoint, besa_backend *be, const besa_calibration *calibration,
                                   const besa_prune_options *options, double threshold, double *shares, besa_error *error)
{
    besa__run run;
    besa_prune_options used;
    besa_calibration data = *calibration;
    data.test_windows = 0;
    data.against = NULL;
    BESA__TRY(besa__outlier_options(&used, options, error));
    if (threshold == 0) threshold = 5;
    if (!(threshold > 0 && besa__is_finite(threshold)))
        return besa__fail(error, BESA_ERROR_OPTION, "the threshold of outliers is %g times the mean score, expected above 0",
                          threshold);
    besa_result result = besa__prune_start(&run, checkpoint, be, &data, &used, error);
    if (result == BESA_OK) result = besa__check_ids(&run, run.ids, data.nsamples * data.seqlen, "calibration", error);
    if (result == BESA_OK) result = besa__run_agree(&run, error);
    if (result == BESA_OK) result = besa__run_allocate(&run, error);
    if (result == BESA_OK) result = besa__run_outliers(&run, threshold, shares, error);
    besa__comm_fail(options->comm, result, error);
    besa__run_close(&run);
    return result;
}

BESA_API besa_result besa_outlier_targets(double *targets, const double *shares, int64_t count, double target, double lambda,
                                          besa_error *error)
{
    double least = 1, most = 0, sum = 0, blocks = 0;
    if (lambda == 0) lambda = 0.08;
    if (!(target > 0 && target < 1 && lambda > 0 && lambda < 1))
        return besa__fail(error, BESA_ERROR_OPTION, "sparsities from outliers: a target of %g and lambda %g, expected both above "
                          "0 and below 1", target, lambda);
    for (int64_t i = 0; i < count; i++) {
        if (!((shares[i] >= 0 && shares[i] <= 1) || shares[i] == -1))
            return besa__fail(error, BESA_ERROR_OPTION, "the share of outliers number %lld is %g, expected 0 to 1, or -1",
                              (long long)i, shares[i]);
        if (shares[i] < 0) continue;
        if (shares[i] < least) least = shares[i];
        if (shares[i] > most) most = shares[i];
        sum += shares[i];
        blocks++;
    }
    for (int64_t i = 0; i < count; i++) {
        double above = shares[i] < 0 || most <= least ? 0 : (sum / blocks - shares[i]) / (most - least);
        targets[i] = target + 2 * lambda * above;
        if (!(targets[i] > 0 && targets[i] < 1))
            return besa__fail(error, BESA_ERROR_OPTION, "block %lld of those that are pruned would have a sparsity of %g by its "
                              "outliers, expected above 0 and below 1: a lambda below %g helps", (long long)i, targets[i], lambda);
    }
    return BESA_OK;
}

#endif /* BESA_NO_STDIO */

/* ============================================================================================
 * // >>cpu-tiles             tiles of the CPU's matrix product, per instruction set
 * ============================================================================================
 * Owns the innermost loops: a tile of C from packed panels of A and B, and the packing, in portable C, NEON, AVX2 and AVX-512;
 * the one that the processor has is chosen at run time. Section cpu-gemm has the scheme around them. */

typedef struct besa__gemm_args {       /* C (m,n) = alpha A (m,k) B (k,n) [+ C] [+ bias] */
    int64_t m, n, k;
    const void *a; int64_t a_row, a_col; besa_dtype a_dtype;   /* A(i,p) = a[i*a_row + p*a_col] */
    const void *b; int64_t b_row, b_col; besa_dtype b_dtype;   /* B(p,j) = b[p*b_row + j*b_col] */
    float *c; int64_t c_row;           /* C(i,j) = c[i*c_row + j] */
    float alpha;
    int accumulate;                    /* 1: added to C, 0: C is overwritten (never read) */
    const float *bias;                 /* (n) added to every row, or NULL */
    int lower;                         /* 1: only tiles that touch i >= j are computed (Gram matrices) */
} besa__gemm_args;

enum {
    BESA__GEMM_MC = 192, BESA__GEMM_KC = 512,                          /* multiples of every MR; the longest panel */
    BESA__GEMM_A = BESA__GEMM_MC * BESA__GEMM_KC, BESA__GEMM_B = 1024 * BESA__GEMM_KC,    /* floats of packed memory */
    BESA__GEMM_TILE_MAX = 12 * 32                                      /* the largest MR x NR */
};

/* One operand as packing sees it: `outer` runs over the rows of A or the columns of B. */
typedef struct besa__gemm_operand {
    const void *data; besa_dtype dtype;
    int64_t outer_step, k_step;        /* in elements */
    int round;                         /* 1: round to bf16 */
} besa__gemm_operand;

/* dst (panels)(units, width) = `count` outer positions and `k` positions from element `at` on, in panels of `width`;
   zeros beyond. A unit is one float, or two bf16 that follow each other in k. */
typedef void besa__gemm_pack_fn(float *dst, int64_t width, const besa__gemm_operand *x, int64_t at,
                                int64_t count, int64_t k);

/* C tile (MR, NR) = alpha sum_u a(u, MR) b(u, NR) [+ C if add] [+ bias (NR) if not NULL] */
typedef void besa__gemm_tile_fn(int64_t units, const float *a, const float *b, float *c, int64_t c_row,
                                float alpha, int add, const float *bias);

typedef struct besa__gemm_kernel {
    int64_t mr, nr, unit;              /* unit: elements of k in four bytes, 1 or 2 */
    besa__gemm_pack_fn *pack;
    besa__gemm_tile_fn *tile;
    int64_t kc;                        /* units of k that a panel has at most */
} besa__gemm_kernel;

#if defined(__GNUC__)
#define BESA__INLINE static inline __attribute__((__always_inline__))
#else
#define BESA__INLINE static inline
#endif

/* ---- what the processor has ---- */

#ifndef BESA_SIMD_MAX
#define BESA_SIMD_MAX 2                         /* an expression: tests change it */
#endif

/* GCC for Windows keeps the stack aligned to 16 bytes only: its AVX code faults. */
#if defined(__GNUC__) && !defined(BESA_NO_SIMD) && (!defined(_WIN32) || defined(__clang__))
#if defined(__x86_64__)
#define BESA__SIMD_X86 1
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define BESA__SIMD_NEON 1
#endif
#endif

/* 2: AVX-512; 1: AVX2 with FMA, or NEON; 0: what the compiler makes of plain C */
static inline int besa__cpu_simd(void)
{
#if defined(BESA__SIMD_X86)
    if (BESA_SIMD_MAX >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return 2;
    return BESA_SIMD_MAX >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
#elif defined(BESA__SIMD_NEON)
    return BESA_SIMD_MAX >= 1;
#else
    return 0;
#endif
}

/* ---- portable C ---- */

/* dst (count) = fp32 of the elements at, at + step, ... */
static void besa__gemm_read(float *dst, const besa__gemm_operand *x, int64_t at, int64_t step, int64_t count)
{
    if (x->dtype == BESA_F32) {
        const float *s = (const float *)x->data + at;
        for (int64_t i = 0; i < count; i++) dst[i] = s[i * step];
    } else {
        const uint16_t *s = (const uint16_t *)x->data + at;
        if (x->dtype == BESA_BF16) for (int64_t i = 0; i < count; i++) dst[i] = besa__bf16_to_f32(s[i * step]);
        else                       for (int64_t i = 0; i < count; i++) dst[i] = besa__f16_to_f32(s[i * step]);
    }
    if (x->round && x->dtype != BESA_BF16)
        for (int64_t i = 0; i < count; i++) dst[i] = besa__bf16_to_f32(besa__f32_to_bf16(dst[i]));
}

static void besa__gemm_pack_c(float *dst, int64_t width, const besa__gemm_operand *x, int64_t at,
                              int64_t count, int64_t k)
{
    float run[64];
    for (; count > 0; dst += width * k, at += width * x->outer_step, count -= width) {
        int64_t real = besa__min(count, width);
        if (real < width) memset(dst, 0, (size_t)(width * k) * sizeof *dst);
        for (int64_t p = 0; x->outer_step == 1 && p < k; p++)
            besa__gemm_read(dst + p * width, x, at + p * x->k_step, 1, real);
        for (int64_t p0 = 0; x->outer_step != 1 && p0 < k; p0 += 64) {
            int64_t length = besa__min(64, k - p0);
            for (int64_t i = 0; i < real; i++) {
                besa__gemm_read(run, x, at + i * x->outer_step + p0 * x->k_step, x->k_step, length);
                for (int64_t p = 0; p < length; p++) dst[(p0 + p) * width + i] = run[p];
            }
        }
    }
}

/* 4 x 8, plain loops that a compiler vectorises for any instruction set */
static inline void besa__gemm_tile_c(int64_t units, const float *a, const float *b, float *c, int64_t c_row,
                                     float alpha, int add, const float *bias)
{
    float sum[4][8];
    memset(sum, 0, sizeof sum);
    for (int64_t p = 0; p < units; p++, a += 4, b += 8)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 8; j++) sum[i][j] += a[i] * b[j];
    for (int i = 0; i < 4; i++, c += c_row)
        for (int j = 0; j < 8; j++) {
            float base = (bias ? bias[j] : 0.0f) + (add ? c[j] : 0.0f);
            c[j] = base + alpha * sum[i][j];
        }
}

/* ---- AArch64: 8 x 8 in NEON ---- */
#if defined(BESA__SIMD_NEON)
#include <arm_neon.h>

#define BESA__GEMM_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define BESA__GEMM_ZERO(i) float32x4_t l##i = vdupq_n_f32(0.0f), h##i = vdupq_n_f32(0.0f);
#define BESA__GEMM_STEP(i) l##i = vfmaq_n_f32(l##i, bl, a[i]); h##i = vfmaq_n_f32(h##i, bh, a[i]);
#define BESA__GEMM_SAVE(i)                                                                           \
    vst1q_f32(c, vfmaq_n_f32(add ? vaddq_f32(bias_l, vld1q_f32(c)) : bias_l, l##i, alpha));           \
    vst1q_f32(c + 4, vfmaq_n_f32(add ? vaddq_f32(bias_h, vld1q_f32(c + 4)) : bias_h, h##i, alpha));   \
    c += c_row;

static void besa__gemm_tile_neon(int64_t units, const float *a, const float *b, float *c, int64_t c_row,
                                 float alpha, int add, const float *bias)
{
    float32x4_t bias_l = bias ? vld1q_f32(bias) : vdupq_n_f32(0.0f);
    float32x4_t bias_h = bias ? vld1q_f32(bias + 4) : vdupq_n_f32(0.0f);
    BESA__GEMM_ROWS(BESA__GEMM_ZERO)
    for (int64_t p = 0; p < units; p++, a += 8, b += 8) {
        float32x4_t bl = vld1q_f32(b), bh = vld1q_f32(b + 4);
        BESA__GEMM_ROWS(BESA__GEMM_STEP)
    }
    BESA__GEMM_ROWS(BESA__GEMM_SAVE)
}
#undef BESA__GEMM_ROWS
#undef BESA__GEMM_ZERO
#undef BESA__GEMM_STEP
#undef BESA__GEMM_SAVE
#endif

/* ---- x86-64: AVX2 and AVX-512, compiled for any target and chosen at run time ---- */
#if defined(BESA__SIMD_X86)
#include <immintrin.h>
#ifndef __clang__                      /* g++ 12 warns of its own _mm512_undefined_epi32 */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define BESA__GEMM_AVX2 __attribute__((target("avx2,fma")))
#define BESA__GEMM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define BESA__GEMM_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

/* 6 x 16: twelve of the sixteen registers hold C. The rows are written out by macros so that they
   stay in registers at every level of optimisation. */
#define BESA__GEMM_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5)
#define BESA__GEMM_ZERO(i) __m256 l##i = _mm256_setzero_ps(), h##i = _mm256_setzero_ps();
#define BESA__GEMM_STEP(i)                                                                           \
    ai = _mm256_broadcast_ss(a + i);                                                                 \
    l##i = _mm256_fmadd_ps(ai, bl, l##i); h##i = _mm256_fmadd_ps(ai, bh, h##i);
#define BESA__GEMM_SAVE(i)                                                                           \
    bl = bias_l; bh = bias_h;                                                                        \
    if (add) { bl = _mm256_add_ps(bl, _mm256_loadu_ps(c)); bh = _mm256_add_ps(bh, _mm256_loadu_ps(c + 8)); } \
    _mm256_storeu_ps(c, _mm256_fmadd_ps(ai, l##i, bl));                                              \
    _mm256_storeu_ps(c + 8, _mm256_fmadd_ps(ai, h##i, bh));                                          \
    c += c_row;

BESA__GEMM_AVX2 static void besa__gemm_tile_avx2(int64_t units, const float *a, const float *b, float *c,
                                                 int64_t c_row, float alpha, int add, const float *bias)
{
    __m256 ai, bl, bh, bias_l, bias_h;
    BESA__GEMM_ROWS(BESA__GEMM_ZERO)
    for (int64_t p = 0; p < units; p++, a += 6, b += 16) {
        bl = _mm256_load_ps(b);
        bh = _mm256_load_ps(b + 8);
        BESA__GEMM_ROWS(BESA__GEMM_STEP)
    }
    ai = _mm256_set1_ps(alpha);
    bias_l = bias ? _mm256_loadu_ps(bias) : _mm256_setzero_ps();
    bias_h = bias ? _mm256_loadu_ps(bias + 8) : _mm256_setzero_ps();
    BESA__GEMM_ROWS(BESA__GEMM_SAVE)
}
#undef BESA__GEMM_ROWS
#undef BESA__GEMM_ZERO
#undef BESA__GEMM_STEP
#undef BESA__GEMM_SAVE

/* besa__f16_to_f32 of 8 lanes */
BESA__GEMM_AVX2 static inline __m256i besa__gemm_half_avx2(__m256i v)
{
    __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(v, _mm256_set1_epi32(0x7fff)), 13);
    __m256i special = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x0f7fffff));
    __m256 scaled = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(5.192296858534828e33f)); /* 2^112 */
    special = _mm256_and_si256(special, _mm256_set1_epi32(0x7f800000));
    v = _mm256_slli_epi32(_mm256_srli_epi32(v, 15), 31);
    return _mm256_or_si256(v, _mm256_or_si256(_mm256_castps_si256(scaled), special));
}

/* The fp32 of 8 elements that follow each other, of which `count` are read; zeros beyond. */
BESA__GEMM_AVX2 static inline __m256 besa__gemm_load_avx2(const besa__gemm_operand *x, int64_t at, int64_t count)
{
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i v, up, number, nan;
    if (x->dtype == BESA_F32) {
        const float *s = (const float *)x->data + at;
        if (count >= 8) v = _mm256_castps_si256(_mm256_loadu_ps(s));
        else {
            up = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)besa__max(count, 0)), lanes);
            v = _mm256_castps_si256(_mm256_maskload_ps(s, up));
        }
    } else {
        const uint16_t *s = (const uint16_t *)x->data + at;
        uint16_t few[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (count < 8) {
            for (int64_t i = 0; i < count; i++) few[i] = s[i];
            s = few;
        }
        v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)s));
        if (x->dtype == BESA_BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
        v = besa__gemm_half_avx2(v);
    }
    if (!x->round) return _mm256_castsi256_ps(v);
    /* to the nearest bf16, ties to even: add 0x7fff plus the lowest bit that stays; a NaN stays quiet */
    up = _mm256_and_si256(_mm256_srli_epi32(v, 16), _mm256_set1_epi32(1));
    number = _mm256_add_epi32(v, _mm256_add_epi32(up, _mm256_set1_epi32(0x7fff)));
    nan = _mm256_castps_si256(_mm256_cmp_ps(_mm256_castsi256_ps(v), _mm256_castsi256_ps(v), _CMP_UNORD_Q));
    number = _mm256_blendv_epi8(number, _mm256_or_si256(v, _mm256_set1_epi32(0x400000)), nan);
    return _mm256_castsi256_ps(_mm256_and_si256(number, _mm256_set1_epi32((int)0xffff0000u)));
}

/* The same, where 8 can be read. form: 1 fp32 as it is, 2 bf16, 0 any */
BESA__INLINE BESA__GEMM_AVX2 __m256 besa__gemm_load_form_avx2(const besa__gemm_operand *x, int64_t at, int64_t count,
                                                              int form)
{
    if (form == 1) return _mm256_loadu_ps((const float *)x->data + at);
    if (form == 2) {
        __m128i half = _mm_loadu_si128((const __m128i *)(const void *)((const uint16_t *)x->data + at));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    return besa__gemm_load_avx2(x, at, count);
}

/* The first `count` of 8 lanes; masked stores are slow on some processors. */
BESA__GEMM_AVX2 static inline void besa__gemm_store_avx2(float *dst, __m256 v, int64_t count)
{
    __m128 part = _mm256_castps256_ps128(v);
    if (count >= 8) {
        _mm256_storeu_ps(dst, v);
        return;
    }
    if (count & 4) {
        _mm_storeu_ps(dst, part);
        part = _mm256_extractf128_ps(v, 1), dst += 4;
    }
    if (count & 2) {
        _mm_storel_pi((__m64 *)(void *)dst, part);
        part = _mm_movehl_ps(part, part), dst += 2;
    }
    if (count & 1) _mm_store_ss(dst, part);
}

/* `rows` steps of k of panels whose outer positions follow each other in memory: copies. A row of a narrow panel is
   stored with what lies beyond it, where the next row of that panel goes; the last is stored alone. */
BESA__INLINE BESA__GEMM_AVX2 void besa__gemm_rows_avx2(float *dst, int64_t width, const besa__gemm_operand *x, int64_t at,
                                                       int64_t count, int64_t rows, int64_t panel, int form)
{
    for (int64_t i0 = 0; i0 < count; i0 += width, dst += panel)
        for (int64_t i = 0; i < width; i += 8) {
            int64_t from = at + i0 + i, left = count - i0 - i, p = 0;
            int64_t whole = form && left >= 8 ? rows - (i + 8 > width) : 0;
            float *to = dst + i;
            for (; p < whole; p++, from += x->k_step, to += width)
                _mm256_storeu_ps(to, besa__gemm_load_form_avx2(x, from, 8, form));
            for (; p < rows; p++, from += x->k_step, to += width)
                besa__gemm_store_avx2(to, besa__gemm_load_avx2(x, from, left), width - i);
        }
}

BESA__GEMM_AVX2 static void besa__gemm_pack_rows_avx2(float *dst, int64_t width, const besa__gemm_operand *x,
                                                      int64_t at, int64_t count, int64_t k)
{
    int form = x->dtype == BESA_BF16 ? 2 : x->dtype == BESA_F32 && !x->round;
    int64_t size = x->dtype == BESA_F32 ? 4 : 2, rows = 16;
    uintptr_t step = (uintptr_t)(x->k_step * size), ahead = (uintptr_t)x->data + (uintptr_t)(at * size) + 16 * step;
    for (int64_t p = 0; p < k; p += rows, dst += rows * width, at += rows * x->k_step, ahead += 16 * step) {
        for (uintptr_t i = 0; i < (uintptr_t)(count * size); i += 64)
            for (uintptr_t q = 0; q < 16; q++) _mm_prefetch((const char *)(ahead + q * step + i), _MM_HINT_T0);
        rows = besa__min(rows, k - p);
        if (form == 1 && width == 6) besa__gemm_rows_avx2(dst, 6, x, at, count, rows, 6 * k, 1);
        else if (form == 1 && width == 16) besa__gemm_rows_avx2(dst, 16, x, at, count, rows, 16 * k, 1);
        else if (form == 2 && width == 16) besa__gemm_rows_avx2(dst, 16, x, at, count, rows, 16 * k, 2);
        else besa__gemm_rows_avx2(dst, width, x, at, count, rows, width * k, 0);
    }
}

/* Asks for lines of the next panel, `lines` runs of `length` along k, while this one is packed. */
BESA__INLINE void besa__gemm_ahead(const besa__gemm_operand *x, int64_t at, int64_t lines, int64_t length)
{
    int64_t size = x->dtype == BESA_F32 ? 4 : 2;
    for (int64_t i = 0; i < lines; i++, at += x->outer_step)
        for (int64_t p = 0; p < length; p += 64 / size)
            __builtin_prefetch((const void *)((uintptr_t)x->data + (uintptr_t)((at + p) * size)));
}

/* dst (columns, width) = lines of 8, `real` of them, transposed; `lines` go to the panel */
BESA__INLINE BESA__GEMM_AVX2 void besa__gemm_transpose_avx2(float *dst, int64_t width, const besa__gemm_operand *x,
                                                            int64_t at, int64_t real, int64_t lines, int64_t columns,
                                                            int form)
{
    __m256 r[8], s[8], t[8];
    for (int i = 0; i < 8; i++) {
        int64_t from = at + i * x->outer_step;
        if (i >= real) r[i] = _mm256_setzero_ps();
        else r[i] = besa__gemm_load_form_avx2(x, from, columns, form);
    }
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        t[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        t[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
        t[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        t[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        s[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
        s[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
    }
    for (int i = 0; i < 8 && i < columns; i++)
        besa__gemm_store_avx2(dst + i * width, s[i], form && i < 7 && width > 4 && width < 8 ? 8 : lines);
}

/* k follows each other in memory: 8 lines at a time are transposed. */
BESA__GEMM_AVX2 static void besa__gemm_pack_columns_avx2(float *dst, int64_t width, const besa__gemm_operand *x,
                                                         int64_t at, int64_t count, int64_t k)
{
    int form = x->dtype == BESA_BF16 ? 2 : x->dtype == BESA_F32 && !x->round;
    for (int64_t i0 = 0; i0 < count; i0 += width, dst += width * k)
        for (int64_t i = 0; i < width; i += 8) {
            int64_t lines = besa__min(8, width - i), real = besa__min(lines, count - i0 - i);
            int64_t from = at + (i0 + i) * x->outer_step;
            int full = real == width - i || real == 8 ? form : 0;
            float *to = dst + i;
            for (int64_t p = 0; p < k; p += 8, to += 8 * width, from += 8) {
                if (p % 32 == 0) besa__gemm_ahead(x, from + width * x->outer_step, lines, besa__min(32, k - p));
                if (k - p < 8) full = 0;
                if (full == 1 && width == 16) besa__gemm_transpose_avx2(to, 16, x, from, 8, 8, 8, 1);
                else if (full == 2 && width == 16) besa__gemm_transpose_avx2(to, 16, x, from, 8, 8, 8, 2);
                else if (full == 1 && width == 6) besa__gemm_transpose_avx2(to, 6, x, from, 6, 6, 8, 1);
                else besa__gemm_transpose_avx2(to, width, x, from, real, lines, k - p, 0);
            }
        }
}

BESA__GEMM_AVX2 static void besa__gemm_pack_avx2(float *dst, int64_t width, const besa__gemm_operand *x, int64_t at,
                                                 int64_t count, int64_t k)
{
    if (x->outer_step == 1) besa__gemm_pack_rows_avx2(dst, width, x, at, count, k);
    else if (x->k_step == 1) besa__gemm_pack_columns_avx2(dst, width, x, at, count, k);
    else besa__gemm_pack_c(dst, width, x, at, count, k);
}

/* 12 x 32: twenty-four of the thirty-two registers hold C. One unit of k is a float, or, in the second
   kernel, a pair of bf16 whose two products are added in one step: the same loop, twice the k. */
#define BESA__GEMM_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define BESA__GEMM_ZERO(i) __m512 l##i = _mm512_setzero_ps(), h##i = _mm512_setzero_ps();
#define BESA__GEMM_STEP(i)                                                                           \
    ai = _mm512_set1_ps(a[i]);                                                                       \
    l##i = _mm512_fmadd_ps(ai, bl, l##i); h##i = _mm512_fmadd_ps(ai, bh, h##i);
#define BESA__GEMM_STEP_BF16(i)                                                                      \
    ai = _mm512_set1_ps(a[i]);                                                                       \
    l##i = _mm512_dpbf16_ps(l##i, (__m512bh)ai, (__m512bh)bl);                                       \
    h##i = _mm512_dpbf16_ps(h##i, (__m512bh)ai, (__m512bh)bh);
#define BESA__GEMM_SAVE(i)                                                                           \
    bl = bias_l; bh = bias_h;                                                                        \
    if (add) { bl = _mm512_add_ps(bl, _mm512_loadu_ps(c)); bh = _mm512_add_ps(bh, _mm512_loadu_ps(c + 16)); } \
    _mm512_storeu_ps(c, _mm512_fmadd_ps(ai, l##i, bl));                                              \
    _mm512_storeu_ps(c + 16, _mm512_fmadd_ps(ai, h##i, bh));                                         \
    c += c_row;
#define BESA__GEMM_BODY(step)                                                                        \
    __m512 ai, bl, bh, bias_l, bias_h;                                                               \
    BESA__GEMM_ROWS(BESA__GEMM_ZERO)                                                                 \
    for (int64_t p = 0; p < units; p++, a += 12, b += 32) {                                          \
        bl = _mm512_load_ps(b);                                                                      \
        bh = _mm512_load_ps(b + 16);                                                                 \
        BESA__GEMM_ROWS(step)                                                                        \
    }                                                                                                \
    ai = _mm512_set1_ps(alpha);                                                                      \
    bias_l = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();                                     \
    bias_h = bias ? _mm512_loadu_ps(bias + 16) : _mm512_setzero_ps();                                \
    BESA__GEMM_ROWS(BESA__GEMM_SAVE)

BESA__GEMM_AVX512 static void besa__gemm_tile_avx512(int64_t units, const float *a, const float *b, float *c,
                                                     int64_t c_row, float alpha, int add, const float *bias)
{
    BESA__GEMM_BODY(BESA__GEMM_STEP)
}
BESA__GEMM_AVX512_BF16 static void besa__gemm_tile_avx512_bf16(int64_t units, const float *a, const float *b,
                                                               float *c, int64_t c_row, float alpha, int add,
                                                               const float *bias)
{
    BESA__GEMM_BODY(BESA__GEMM_STEP_BF16)
}
#undef BESA__GEMM_ROWS
#undef BESA__GEMM_ZERO
#undef BESA__GEMM_STEP
#undef BESA__GEMM_STEP_BF16
#undef BESA__GEMM_SAVE
#undef BESA__GEMM_BODY

static inline uint16_t besa__gemm_mask(int64_t count) {     /* of the first `count` of 16 lanes */
    return (uint16_t)(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u);
}

/* The fp32 bits of up to 16 elements that follow each other; nothing is read beyond `count`. */
BESA__GEMM_AVX512 static inline __m512i besa__gemm_load_avx512(const besa__gemm_operand *x, int64_t at,
                                                               int64_t count)
{
    __mmask16 mask = besa__gemm_mask(count);
    __m512i v, up, number;
    if (x->dtype == BESA_F32) v = _mm512_maskz_loadu_epi32(mask, (const float *)x->data + at);
    else {
        __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x->data + at);
        if (x->dtype == BESA_BF16) return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
        v = _mm512_castps_si512(_mm512_cvtph_ps(half));
    }
    if (!x->round) return v;
    /* to the nearest bf16, ties to even: add 0x7fff plus the lowest bit that stays; a NaN stays quiet */
    up = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
    number = _mm512_add_epi32(v, _mm512_add_epi32(up, _mm512_set1_epi32(0x7fff)));
    mask = _mm512_cmp_ps_mask(_mm512_castsi512_ps(v), _mm512_castsi512_ps(v), _CMP_UNORD_Q);
    number = _mm512_mask_or_epi32(number, mask, v, _mm512_set1_epi32(0x400000));
    return _mm512_and_si512(number, _mm512_set1_epi32((int)0xffff0000u));
}

/* Rows of panels whose outer positions follow each other in memory: copies. plain: fp32, to be left as it is */
BESA__INLINE BESA__GEMM_AVX512 void besa__gemm_rows_avx512(float *dst, int64_t width, const besa__gemm_operand *x,
                                                           int64_t at, int64_t count, int64_t k, int64_t panel,
                                                           int64_t unit, int plain)
{
    for (int64_t i0 = 0; i0 < count; i0 += width, dst += panel)
        for (int64_t i = 0; i < width; i += 16) {
            int64_t from = at + i0 + i, left = count - i0 - i;
            float *to = dst + i;
            for (int64_t p = 0; p < k; p += unit, from += unit * x->k_step, to += width) {
                __m512i v;
                if (plain && left >= 16) v = _mm512_loadu_si512((const float *)x->data + from);
                else v = besa__gemm_load_avx512(x, from, left);
                if (unit == 2) {
                    __m512i odd = _mm512_setzero_si512();
                    if (p + 1 < k) odd = besa__gemm_load_avx512(x, from + x->k_step, left);
                    v = _mm512_or_si512(_mm512_srli_epi32(v, 16), odd);
                }
                _mm512_mask_storeu_epi32(to, besa__gemm_mask(width - i), v);
            }
        }
}

/* The rows may lie a page apart, where no prefetcher of the hardware follows: they are asked for ahead. */
BESA__GEMM_AVX512 static void besa__gemm_pack_rows_avx512(float *dst, int64_t width, const besa__gemm_operand *x,
                                                          int64_t at, int64_t count, int64_t k, int64_t unit)
{
    int plain = x->dtype == BESA_F32 && !x->round;
    int64_t size = x->dtype == BESA_F32 ? 4 : 2, rows = 8, panel = width * ((k + unit - 1) / unit);
    uintptr_t step = (uintptr_t)(x->k_step * size), ahead = (uintptr_t)x->data + (uintptr_t)(at * size) + 16 * step;
    for (int64_t p = 0; p < k; p += rows, dst += rows / unit * width, at += rows * x->k_step, ahead += 8 * step) {
        for (uintptr_t i = 0; i < (uintptr_t)(count * size); i += 64)
            for (int64_t q = 0; q < rows; q++) _mm_prefetch((const char *)(ahead + (uintptr_t)q * step + i), _MM_HINT_T0);
        if (unit == 2) besa__gemm_rows_avx512(dst, width, x, at, count, besa__min(rows, k - p), panel, 2, 0);
        else if (plain && width == 12) besa__gemm_rows_avx512(dst, 12, x, at, count, besa__min(rows, k - p), panel, 1, 1);
        else if (plain && width == 32) besa__gemm_rows_avx512(dst, 32, x, at, count, besa__min(rows, k - p), panel, 1, 1);
        else besa__gemm_rows_avx512(dst, width, x, at, count, besa__min(rows, k - p), panel, 1, 0);
    }
}

/* dst (units) = one run along k */
BESA__GEMM_AVX512 static void besa__gemm_run_avx512(uint32_t *dst, const besa__gemm_operand *x, int64_t at,
                                                    int64_t k, int64_t unit)
{
    static const uint16_t odd_words[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                           33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    __m512i upper = _mm512_loadu_si512(odd_words);
    for (int64_t p = 0; p < k; p += 16 * unit, dst += 16) {
        __m512i v = besa__gemm_load_avx512(x, at + p, k - p);
        if (unit == 2) v = _mm512_permutex2var_epi16(v, upper, besa__gemm_load_avx512(x, at + p + 16, k - p - 16));
        _mm512_storeu_si512(dst, v);
    }
}

BESA__GEMM_AVX512 static inline __m128i besa__gemm_quarter(const char *from)
{
    return _mm_loadu_si128((const __m128i *)(const void *)from);
}

/* dst (4, width) = four columns of `rows` lines that lie `stride` bytes apart: 4 x 4 blocks, transposed side by side */
BESA__GEMM_AVX512 static inline void besa__gemm_transpose_avx512(float *dst, int64_t width, const char *from,
                                                                 int64_t stride, int64_t rows, int64_t columns)
{
    __m512i r[4], lo01, hi01, lo23, hi23;
    __mmask16 mask = besa__gemm_mask(rows);
    for (int q = 0; q < 4; q++, from += stride) {
        __m512i v = _mm512_castsi128_si512(besa__gemm_quarter(from));
        v = _mm512_mask_broadcast_i32x4(v, 0x00f0, besa__gemm_quarter(from + 4 * stride));
        v = _mm512_mask_broadcast_i32x4(v, 0x0f00, besa__gemm_quarter(from + 8 * stride));
        if (rows > 12) v = _mm512_mask_broadcast_i32x4(v, 0xf000, besa__gemm_quarter(from + 12 * stride));
        r[q] = v;
    }
    lo01 = _mm512_unpacklo_epi32(r[0], r[1]), hi01 = _mm512_unpackhi_epi32(r[0], r[1]);
    lo23 = _mm512_unpacklo_epi32(r[2], r[3]), hi23 = _mm512_unpackhi_epi32(r[2], r[3]);
    _mm512_mask_storeu_epi32(dst, mask, _mm512_unpacklo_epi64(lo01, lo23));
    if (columns > 1) _mm512_mask_storeu_epi32(dst + width, mask, _mm512_unpackhi_epi64(lo01, lo23));
    if (columns > 2) _mm512_mask_storeu_epi32(dst + 2 * width, mask, _mm512_unpacklo_epi64(hi01, hi23));
    if (columns > 3) _mm512_mask_storeu_epi32(dst + 3 * width, mask, _mm512_unpackhi_epi64(hi01, hi23));
}

/* run (16, 64) = 16 outer positions from `at` on, `count` of them real, and `k` positions: in units, one line each */
BESA__GEMM_AVX512 static void besa__gemm_stage_avx512(uint32_t *run, const besa__gemm_operand *x, int64_t at,
                                                      int64_t count, int64_t k, int64_t unit)
{
    float line[128];
    besa__gemm_operand copied = {line, BESA_F32, 0, 1, 0};
    for (int64_t i = 0; i < 16; i++, run += 64, at += x->outer_step)
        if (i >= count) memset(run, 0, 64 * sizeof *run);
        else if (x->k_step == 1) besa__gemm_run_avx512(run, x, at, k, unit);
        else {
            besa__gemm_read(line, x, at, x->k_step, k);
            besa__gemm_run_avx512(run, &copied, 0, k, unit);
        }
}

/* Any other stride: 16 outer positions at a time are brought to lines of 64 units along k, unless they
   have that form already, and transposed. */
BESA__GEMM_AVX512 static void besa__gemm_pack_columns_avx512(float *dst, int64_t width, const besa__gemm_operand *x,
                                                             int64_t at, int64_t count, int64_t k, int64_t unit)
{
    int ready = x->k_step == 1 && (unit == 2 ? x->dtype == BESA_BF16 : x->dtype == BESA_F32 && !x->round);
    int64_t size = x->dtype == BESA_F32 ? 4 : 2;
    uint32_t run[16 * 64];
    for (int64_t i0 = 0; i0 < width; i0 += 16)
        for (int64_t p0 = 0; p0 < k; p0 += 64 * unit) {
            int64_t length = besa__min(64 * unit, k - p0), units = (length + unit - 1) / unit;
            int64_t from = at + i0 * x->outer_step + p0 * x->k_step, stride = 64 * 4;
            const char *lines = (const char *)run;
            if (ready && count == width && length % (4 * unit) == 0) {
                lines = (const char *)x->data + from * size;
                stride = x->outer_step * size;
            } else besa__gemm_stage_avx512(run, x, from, count - i0, length, unit);
            besa__gemm_ahead(x, from + width * x->outer_step, besa__min(16, width - i0), length);
            for (int64_t u = 0; u < units; u += 4)
                besa__gemm_transpose_avx512(dst + (p0 / unit + u) * width + i0, width, lines + 4 * u, stride,
                                            besa__min(16, width - i0), units - u);
        }
}

BESA__GEMM_AVX512 static void besa__gemm_pack_avx512(float *dst, int64_t width, const besa__gemm_operand *x,
                                                     int64_t at, int64_t count, int64_t k)
{
    if (x->outer_step == 1) besa__gemm_pack_rows_avx512(dst, width, x, at, count, k, 1);
    else for (; count > 0; dst += width * k, at += width * x->outer_step, count -= width)
        besa__gemm_pack_columns_avx512(dst, width, x, at, besa__min(count, width), k, 1);
}
BESA__GEMM_AVX512 static void besa__gemm_pack_avx512_bf16(float *dst, int64_t width, const besa__gemm_operand *x,
                                                          int64_t at, int64_t count, int64_t k)
{
    if (x->outer_step == 1) besa__gemm_pack_rows_avx512(dst, width, x, at, count, k, 2);
    else for (; count > 0; dst += width * ((k + 1) / 2), at += width * x->outer_step, count -= width)
        besa__gemm_pack_columns_avx512(dst, width, x, at, besa__min(count, width), k, 2);
}
#ifndef __clang__
#pragma GCC diagnostic pop
#endif
#endif /* BESA__SIMD_X86 */

static besa__gemm_kernel besa__gemm_choose(int bf16)
{
    besa__gemm_kernel kernel = {4, 8, 1, besa__gemm_pack_c, besa__gemm_tile_c, BESA__GEMM_KC};
    int simd = besa__cpu_simd();
    (void)bf16, (void)simd;
#if defined(BESA__SIMD_NEON)
    if (simd == 1) kernel.mr = 8, kernel.tile = besa__gemm_tile_neon;
#elif defined(BESA__SIMD_X86)
    if (simd == 2) {
        int paired = bf16 && __builtin_cpu_supports("avx512bf16");
        kernel.mr = 12, kernel.nr = 32, kernel.unit = paired ? 2 : 1;
        kernel.pack = paired ? besa__gemm_pack_avx512_bf16 : besa__gemm_pack_avx512;
        kernel.tile = paired ? besa__gemm_tile_avx512_bf16 : besa__gemm_tile_avx512;
    } else if (simd == 1) {
        kernel.mr = 6, kernel.nr = 16, kernel.kc = 320;
        kernel.pack = besa__gemm_pack_avx2, kernel.tile = besa__gemm_tile_avx2;
    }
#endif
    return kernel;
}

/* ============================================================================================
 * // >>cpu-gemm              the CPU's matrix product: C = alpha A B [+ C] [+ bias]
 * ============================================================================================
 * The scheme is the one of GotoBLAS and BLIS. The product is cut into blocks of nc columns and kc steps of k. Both
 * operands are packed: converted to fp32 (or rounded to bf16), and laid out as panels in the order in which the
 * micro-kernel reads them, MR rows of A or NR columns of B side by side. The micro-kernel keeps an MR x NR tile of C in
 * registers and runs over k:
 *
 *     kc          the kernel's: a tile of C is read and written once per kc steps of k, which hides it. For 6 x 16 a panel
 *                 of B (20 KB) stays in a first-level cache of 32 KB beside one of A; for 12 x 32 that of A (24 KB) does,
 *                 and B's (64 KB) comes from the second level, which has 1 MB or more where there is AVX-512
 *     MC          a thread packs a strip of up to 192 rows of A (240 or 384 KB), which stays in its second-level cache,
 *                 and runs it along the panels of B
 *     nc          the block of B (2 MB) lives in the last-level cache, for all threads
 *
 * A phase multiplies block t - 1 and packs B of block t, in tasks that the threads take as they become free: hence two
 * buffers for B, one barrier a block, and none for one thread. Short products have strips enough for all threads, and
 * groups of columns where rows are few. The sum behind one element of C is cut by k alone, and every tile takes its steps
 * in the same order: the bytes do not depend on the number of threads. Ragged edges are packed with zeros.
 *
 * Calls: the number formats and nothing else. Owns no memory: the caller gives the scratch. */

/* A product and how it is cut: block t has columns t / k_blocks * nc .. and steps t % k_blocks * kc .. of k. */
typedef struct besa__gemm_job {
    const besa__gemm_args *g;
    besa__gemm_kernel kernel;
    besa__gemm_operand a, b;
    int64_t nc, kc, k_blocks, blocks;
    int64_t strips, groups;            /* tasks of a block: strips of rows times groups of columns */
    int64_t pack;                      /* columns that one task packs */
    int64_t buffers;                   /* of B: 2, or 1 for one thread */
    float *a_packed, *b_packed;        /* a strip per thread, (m / MR)(units, MR); blocks, (n / NR)(units, NR) */
} besa__gemm_job;

/* One block. */
typedef struct besa__gemm_block {
    int64_t j0, p0, n, k, units;
    float *b_packed;
} besa__gemm_block;

static besa__gemm_block besa__gemm_block_at(const besa__gemm_job *s, int64_t t)
{
    besa__gemm_block block;
    block.j0 = t / s->k_blocks * s->nc, block.p0 = t % s->k_blocks * s->kc;
    block.n = besa__min(s->nc, s->g->n - block.j0);
    block.k = besa__min(s->kc, s->g->k - block.p0);
    block.units = besa__parts(block.k, s->kernel.unit);
    block.b_packed = s->b_packed + t % s->buffers * BESA__GEMM_B;
    return block;
}

/* A tile at the edge, (rows, columns) of it in C, is computed whole, on the stack, thus with the same arithmetic. */
static void besa__gemm_edge(const besa__gemm_job *s, int64_t units, const float *a, const float *b, float *c,
                            int64_t rows, int64_t columns, int add, const float *bias)
{
    float edge[BESA__GEMM_TILE_MAX], edge_bias[BESA__GEMM_TILE_MAX];
    int64_t nr = s->kernel.nr, step = s->g->c_row;
    size_t bytes = (size_t)columns * sizeof *c;
    memset(edge, 0, sizeof edge);
    memset(edge_bias, 0, (size_t)nr * sizeof *edge_bias);
    if (bias) memcpy(edge_bias, bias, bytes);
    for (int64_t r = 0; add && r < rows; r++) memcpy(edge + r * nr, c + r * step, bytes);
    s->kernel.tile(units, a, b, edge, nr, s->g->alpha, add, bias ? edge_bias : NULL);
    for (int64_t r = 0; r < rows; r++) memcpy(c + r * step, edge + r * nr, bytes);
}

/* Rows i0 .. i1 - 1 of C by the panel b of the block, columns j .. of C; a has the panels of these rows. */
static void besa__gemm_column(const besa__gemm_job *s, const besa__gemm_block *block, const float *a, const float *b,
                              int64_t i0, int64_t i1, int64_t j)
{
    const besa__gemm_args *g = s->g;
    int64_t mr = s->kernel.mr, nr = s->kernel.nr, columns = besa__min(nr, g->n - j);
    const float *bias = g->bias && block->p0 == 0 ? g->bias + j : NULL;
    int add = g->accumulate || block->p0 > 0;
    for (int64_t i = i0; i < i1; i += mr, a += mr * block->units) {
        float *c = g->c + i * g->c_row + j;
        int64_t rows = besa__min(mr, g->m - i);
        if (g->lower && i + mr <= j) continue;            /* wholly above the diagonal */
#ifdef __GNUC__
        for (int64_t r = 0; r < rows; r++)                /* C comes from afar: it arrives while the sums are formed */
            for (int64_t q = 0; q < columns; q += 16) __builtin_prefetch(c + r * g->c_row + q, 1);
#endif
        if (rows == mr && columns == nr) s->kernel.tile(block->units, a, b, c, g->c_row, g->alpha, add, bias);
        else besa__gemm_edge(s, block->units, a, b, c, rows, columns, add, bias);
    }
}

/* Task `index` of block t: a strip of rows, packed by the thread that needs it, times a group of panels of B. */
static void besa__gemm_strip(const besa__gemm_job *s, int64_t t, int64_t index, float *a)
{
    besa__gemm_block block = besa__gemm_block_at(s, t);
    int64_t mr = s->kernel.mr, nr = s->kernel.nr, strip = index % s->strips, group = index / s->strips;
    int64_t a_panels = besa__parts(s->g->m, mr), b_panels = besa__parts(block.n, nr);
    int64_t i0 = strip * a_panels / s->strips * mr, i1 = besa__min((strip + 1) * a_panels / s->strips * mr, s->g->m);
    int64_t j0 = group * b_panels / s->groups * nr, j1 = (group + 1) * b_panels / s->groups * nr;
    if (s->g->lower) j1 = besa__min(j1, i1 - block.j0);
    if (i0 >= i1 || j0 >= j1) return;
    s->kernel.pack(a, mr, &s->a, i0 * s->a.outer_step + block.p0 * s->a.k_step, i1 - i0, block.k);
    for (int64_t j = j0; j < j1; j += nr)
        besa__gemm_column(s, &block, a, block.b_packed + j * block.units, i0, i1, block.j0 + j);
}

/* Some panels of B of block t. */
static void besa__gemm_pack_b(const besa__gemm_job *s, int64_t t, int64_t index)
{
    besa__gemm_block block = besa__gemm_block_at(s, t);
    int64_t j = index * s->pack, n = besa__min(s->pack, block.n - j);
    int64_t at = (block.j0 + j) * s->b.outer_step + block.p0 * s->b.k_step;
    s->kernel.pack(block.b_packed + j * block.units, s->kernel.nr, &s->b, at, n, block.k);
}

/* In phase t block t - 1 is multiplied, and block t packed for the next. The number of its tasks: */
static int64_t besa__gemm_tasks(const besa__gemm_job *s, int64_t t)
{
    int64_t tasks = t > 0 ? s->strips * s->groups : 0;
    if (t < s->blocks) tasks += besa__parts(besa__gemm_block_at(s, t).n, s->pack);
    return tasks;
}

static void besa__gemm_task(const besa__gemm_job *s, int64_t t, int64_t index, int thread)
{
    int64_t strips = t > 0 ? s->strips * s->groups : 0;
    if (index < strips) besa__gemm_strip(s, t - 1, index, s->a_packed + thread * (int64_t)BESA__GEMM_A);
    else besa__gemm_pack_b(s, t, index - strips);
}

/* The length of equal blocks, a multiple of `grain` and at most `most`. */
static int64_t besa__gemm_equal(int64_t total, int64_t most, int64_t grain)
{
    int64_t length = besa__parts(total, besa__parts(total > 0 ? total : 1, most));
    return besa__parts(length > 0 ? length : 1, grain) * grain;
}

/* How a block is shared: strips of at most MC rows, two tasks or more for each thread. Strips are not made shorter than
   four panels, which would read B too often: then the columns are cut into groups as well. */
static void besa__gemm_cut(besa__gemm_job *s, int threads)
{
    int64_t panels = besa__parts(s->g->m, s->kernel.mr), least = besa__parts(panels, BESA__GEMM_MC / s->kernel.mr);
    int64_t most = besa__max(besa__parts(panels, 4), least), tasks = threads * (s->g->lower ? 4 : 2);
    s->strips = least, s->groups = 1, s->pack = s->nc;
    if (threads == 1) return;
    s->strips = besa__min(besa__parts(besa__max(least, tasks), threads) * threads, most);
    s->groups = besa__min(besa__parts(threads, s->strips), besa__parts(s->nc, s->kernel.nr));
    s->pack = besa__gemm_equal(s->nc, besa__max(s->nc / threads, s->kernel.nr), s->kernel.nr);
}

static void besa__gemm_run(const besa__gemm_args *g, int threads, int bf16, void *scratch)
{
    besa__gemm_job s;
    s.g = g;
    s.kernel = besa__gemm_choose(bf16);
    s.a.data = g->a, s.a.dtype = g->a_dtype, s.a.outer_step = g->a_row, s.a.k_step = g->a_col, s.a.round = bf16;
    s.b.data = g->b, s.b.dtype = g->b_dtype, s.b.outer_step = g->b_col, s.b.k_step = g->b_row, s.b.round = bf16;
    s.kc = besa__gemm_equal(g->k, s.kernel.kc * s.kernel.unit, 8 * s.kernel.unit);
    s.nc = besa__gemm_equal(g->n, BESA__GEMM_B / s.kernel.kc / s.kernel.nr * s.kernel.nr, s.kernel.nr);
    s.k_blocks = besa__max(besa__parts(g->k, s.kc), 1);      /* k = 0: C is still assigned */
    s.blocks = besa__parts(g->n, s.nc) * s.k_blocks;
    s.buffers = threads > 1 ? 2 : 1;
    s.b_packed = (float *)scratch;
    s.a_packed = s.b_packed + s.buffers * BESA__GEMM_B;
    besa__gemm_cut(&s, threads);
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        for (int64_t t = 0; t <= s.blocks; t++) {
            int64_t tasks = besa__gemm_tasks(&s, t);
#pragma omp for schedule(dynamic)
            for (int64_t index = 0; index < tasks; index++) besa__gemm_task(&s, t, index, BESA__THREAD_INDEX());
        }
        return;
    }
#endif
    for (int64_t t = 0; t <= s.blocks; t++)
        for (int64_t index = 0, tasks = besa__gemm_tasks(&s, t); index < tasks; index++) besa__gemm_task(&s, t, index, 0);
}

/* Bytes of 64-byte aligned scratch that a product with that many threads needs. */
static size_t besa__gemm_scratch(int threads)
{
    return ((size_t)threads * BESA__GEMM_A + (threads > 1 ? 2u : 1u) * (size_t)BESA__GEMM_B) * sizeof(float);
}

#ifdef BESA_CBLAS
#include <cblas.h>

enum { BESA__GEMM_BLAS_N = 1024, BESA__GEMM_BLAS_K = 256 };      /* two converted blocks fill the scratch of one for B */

/* The lines of an operand: along k where k is contiguous, else along the outer index. */
static int64_t besa__gemm_line_step(const besa__gemm_operand *x) { return x->k_step == 1 ? x->outer_step : x->k_step; }

static int besa__gemm_blas_can(const besa__gemm_operand *x, int64_t outer, int64_t k)
{
    int64_t step = besa__gemm_line_step(x);
    if (outer < 1 || k < 1 || outer > INT32_MAX || k > INT32_MAX) return 0;
    if (x->dtype != BESA_F32) return 1;
    return (x->k_step == 1 || x->outer_step == 1) && step >= (x->k_step == 1 ? k : outer) && step <= INT32_MAX;
}

/* The block (outer, k) at `at` in fp32: where it lies, or line by line converted to `room`. */
static const float *besa__gemm_blas_operand(const besa__gemm_operand *x, int64_t at, int64_t outer, int64_t k,
                                            float *room, int *ld)
{
    int along_k = x->k_step == 1;
    int64_t lines = along_k ? outer : k, length = along_k ? k : outer, step = besa__gemm_line_step(x);
    *ld = (int)(x->dtype == BESA_F32 ? step : length);
    if (x->dtype == BESA_F32) return (const float *)x->data + at;
    for (int64_t i = 0; i < lines; i++)
        besa__gemm_read(room + i * length, x, at + i * step, along_k ? 1 : x->outer_step, length);
    return room;
}

/* The product by the BLAS the user links, whole or, where operands are converted, block by block.
   Returns 0 if BLAS has no words for the strides. */
static int besa__gemm_blas(const besa__gemm_args *g, float *scratch)
{
    besa__gemm_operand a = {g->a, g->a_dtype, g->a_row, g->a_col, 0}, b = {g->b, g->b_dtype, g->b_col, g->b_row, 0};
    int convert = a.dtype != BESA_F32 || b.dtype != BESA_F32;
    int64_t mc = g->m, nc = g->n, kc = g->k;
    if (!besa__gemm_blas_can(&a, g->m, g->k) || !besa__gemm_blas_can(&b, g->n, g->k) || g->c_row > INT32_MAX) return 0;
    if (convert || g->lower) mc = nc = BESA__GEMM_BLAS_N;
    if (convert) kc = BESA__GEMM_BLAS_K;
    for (int64_t i = 0; g->bias && i < g->m; i++)
        for (int64_t j = 0; j < g->n; j++)
            g->c[i * g->c_row + j] = g->bias[j] + (g->accumulate ? g->c[i * g->c_row + j] : 0.0f);
    for (int64_t j0 = 0; j0 < g->n; j0 += nc)
        for (int64_t p0 = 0; p0 < g->k; p0 += kc)
            for (int64_t i0 = 0; i0 < g->m; i0 += mc) {
                int64_t m = besa__min(mc, g->m - i0), n = besa__min(nc, g->n - j0);
                int64_t k = besa__min(kc, g->k - p0);
                const float *x, *y;
                int x_ld, y_ld;
                if (g->lower && i0 + m <= j0) continue;
                x = besa__gemm_blas_operand(&a, i0 * a.outer_step + p0 * a.k_step, m, k, scratch, &x_ld);
                y = besa__gemm_blas_operand(&b, j0 * b.outer_step + p0 * b.k_step, n, k,
                                            scratch + BESA__GEMM_BLAS_N * BESA__GEMM_BLAS_K, &y_ld);
                cblas_sgemm(CblasRowMajor, a.k_step == 1 ? CblasNoTrans : CblasTrans,
                            b.k_step == 1 ? CblasTrans : CblasNoTrans, (int)m, (int)n, (int)k, g->alpha, x, x_ld,
                            y, y_ld, g->accumulate || g->bias || p0 > 0 ? 1.0f : 0.0f, g->c + i0 * g->c_row + j0,
                            (int)g->c_row);
            }
    return 1;
}
#endif

enum { BESA__GEMM_SERIAL = 1 << 22 };   /* multiply-adds that are done before a second thread has woken up */

/* The product by `threads` threads; bf16 = 1 rounds both operands to bf16 and sums in fp32. */
static void besa__gemm(const besa__gemm_args *g, int threads, int bf16, void *scratch)
{
#ifdef BESA_CBLAS
    if (!bf16 && besa__gemm_blas(g, (float *)scratch)) return;
#endif
    if ((double)g->m * (double)g->n * (double)g->k < (double)BESA__GEMM_SERIAL) threads = 1;
    besa__gemm_run(g, threads, bf16, scratch);
}

/* ============================================================================================
 * // >>cpu-kernels           the CPU backend: loops for any instruction set, workspace, memory
 * ============================================================================================
 * A kernel is a plain loop over contiguous floats. BESA__KERNEL compiles its one body three times, for AVX-512, for
 * AVX2 with FMA and for the target of the build, and calls what the processor has. Sums run in 32 lanes that are
 * added up pairwise in the end. Calls base and memory only; the operations below are made of these kernels. */

/* Before a loop whose output may be its input: element i depends on no other element. */
#if defined(__clang__)
#define BESA__ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define BESA__ELEMENTWISE _Pragma("GCC ivdep")
#else
#define BESA__ELEMENTWISE
#endif
#if defined(__clang__) /* without optimisation clang warns that it did not vectorise */
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpass-failed"
#endif

#if defined(BESA__SIMD_X86)
#define BESA__KERNEL_AS(type, give, name, params, args)                                            \
    __attribute__((__target__("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))                     \
    static type name##_avx512 params { give name##_body args; }                                    \
    __attribute__((__target__("avx2,fma"))) static type name##_avx2 params { give name##_body args; } \
    static type name params                                                                        \
    {                                                                                              \
        int simd = besa__cpu_simd();                                                               \
        if (simd == 2) give name##_avx512 args;                                                    \
        else if (simd == 1) give name##_avx2 args;                                                 \
        else give name##_body args;                                                                \
    }
#else
#define BESA__KERNEL_AS(type, give, name, params, args) static type name params { give name##_body args; }
#endif
#define BESA__KERNEL(name, params, args) BESA__KERNEL_AS(void, , name, params, args)
#define BESA__KERNEL_FLOAT(name, params, args) BESA__KERNEL_AS(float, return, name, params, args)

enum { BESA__LANES = 32 };

BESA__INLINE float besa__lanes_sum(float *lane /* (32), overwritten */)
{
    for (int width = BESA__LANES / 2; width > 0; width /= 2)
        for (int l = 0; l < width; l++) lane[l] += lane[l + width];
    return lane[0];
}

/* The body of a kernel that returns the sum of term(i), i = 0 .. n - 1: lane l has i = l, l + LANES, ... */
#define BESA__SUM_BODY(n, term)                                                                    \
    float lane[BESA__LANES];                                                                       \
    int64_t i0 = 0;                                                                                \
    for (int l = 0; l < BESA__LANES; l++) lane[l] = 0.0f;                                          \
    for (; i0 + BESA__LANES <= n; i0 += BESA__LANES)                                               \
        for (int l = 0; l < BESA__LANES; l++) lane[l] += term(i0 + l);                             \
    for (; i0 < n; i0++) lane[i0 % BESA__LANES] += term(i0);                                       \
    return besa__lanes_sum(lane);

/* exp(x) to about one ulp, in a form that vectorises: x = k ln 2 + r, |r| <= ln 2 / 2, exp(x) = 2^k exp(r).
 * Overflow gives infinity, underflow 0 by way of subnormals, NaN stays NaN. Limits are kept by comparing bits. */
BESA__INLINE float besa__exp(float x)
{
    const float magic = 12582912.0f; /* 1.5 2^23: adding it rounds to an integer */
    uint32_t bits = besa__float_bits(x);
    uint32_t nan = (uint32_t)((int32_t)(0x7F800000u - (bits & 0x7FFFFFFFu)) >> 31); /* all ones for NaN */
    uint32_t low = bits < 0xC2D20000u ? bits : 0xC2D20000u;                         /* max(x, -105) */
    int32_t high = (int32_t)low < 0x42B20000 ? (int32_t)low : 0x42B20000;           /* min(x, 89) */
    float y = besa__bits_float((uint32_t)high), t = y * 1.44269504f + magic, n = t - magic;
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f, p = 1.98412698e-4f;
    int32_t k = (int32_t)(besa__float_bits(t) - besa__float_bits(magic)), half = k >> 1;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r;
    p = p + 1.0f;
    p = p * besa__bits_float((uint32_t)(half + 127) << 23) * besa__bits_float((uint32_t)(k - half + 127) << 23);
    return besa__bits_float(besa__float_bits(p) | nan);
}

BESA__INLINE float besa__sigmoid(float x) { return 1.0f / (1.0f + besa__exp(-x)); }

/* tanh(x) to about two ulp: a polynomial in x^2 for small x, where 1 - 2 / (exp(2x) + 1) would lose digits. */
BESA__INLINE float besa__tanh(float x)
{
    float y = besa__bits_float(besa__float_bits(x) & 0x7FFFFFFFu), s = x * x, p = -5.70498872745e-3f;
    float large = 1.0f - 2.0f / (besa__exp(2.0f * y) + 1.0f);
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    large = besa__bits_float(besa__float_bits(large) | (besa__float_bits(x) & 0x80000000u));
    return y < 0.625f ? x + x * s * p : large;
}

/* 2 c (1 + 0.044715 x^2) and the derivative of x times that, c = sqrt(2 / pi): gelu(x) = x sigmoid(2 c (x + 0.044715 x^3)) */
BESA__INLINE float besa__gelu_slope(float x) { return 1.59576912f + 0.0713548163f * x * x; }
BESA__INLINE float besa__gelu_steepness(float x) { return 1.59576912f + 0.214064449f * x * x; }

/* sqrt(x), x >= 0, to about one ulp: libm's may set errno, which keeps loops from being vectorised.
 * y -> 1 / sqrt(x) by Newton's iteration from a first guess that halves the exponent. */
BESA__INLINE float besa__sqrt(float x)
{
    float y = besa__bits_float(0x5F375A86u - (besa__float_bits(x) >> 1)), root;
    y = y * (1.5f - 0.5f * x * y * y); /* no loop: clang at -O1 would not see through it */
    y = y * (1.5f - 0.5f * x * y * y);
    y = y * (1.5f - 0.5f * x * y * y);
    root = x * y;
    return root + 0.5f * y * (x - root * root);
}

/* sum x y */
BESA__INLINE float besa__cpu_dot_body(const float *x, const float *y, int64_t n)
{
#define BESA__TERM(i) (x[i] * y[i])
    BESA__SUM_BODY(n, BESA__TERM)
#undef BESA__TERM
}
BESA__KERNEL_FLOAT(besa__cpu_dot, (const float *x, const float *y, int64_t n), (x, y, n))

/* max x; n >= 1 */
BESA__INLINE float besa__cpu_row_max_body(const float *x, int64_t n)
{
    float lane[BESA__LANES], m;
    int64_t i = 0;
    for (int l = 0; l < BESA__LANES; l++) lane[l] = x[0];
    for (; i + BESA__LANES <= n; i += BESA__LANES)
        for (int l = 0; l < BESA__LANES; l++) lane[l] = lane[l] < x[i + l] ? x[i + l] : lane[l];
    for (; i < n; i++) lane[i % BESA__LANES] = lane[i % BESA__LANES] < x[i] ? x[i] : lane[i % BESA__LANES];
    m = lane[0];
    for (int l = 1; l < BESA__LANES; l++) m = m < lane[l] ? lane[l] : m;
    return m;
}
BESA__KERNEL_FLOAT(besa__cpu_row_max, (const float *x, int64_t n), (x, n))

/* y = exp(x - shift), their sum returned; y may be x */
BESA__INLINE float besa__cpu_exp_sum_body(float *y, const float *x, float shift, int64_t n)
{
    float lane[BESA__LANES];
    int64_t i = 0;
    for (int l = 0; l < BESA__LANES; l++) lane[l] = 0.0f;
    for (; i + BESA__LANES <= n; i += BESA__LANES) {
        float e[BESA__LANES];
        for (int l = 0; l < BESA__LANES; l++) e[l] = besa__exp(x[i + l] - shift);
        for (int l = 0; l < BESA__LANES; l++) lane[l] += e[l];
        for (int l = 0; l < BESA__LANES; l++) y[i + l] = e[l];
    }
    for (; i < n; i++) {
        y[i] = besa__exp(x[i] - shift);
        lane[i % BESA__LANES] += y[i];
    }
    return besa__lanes_sum(lane);
}
BESA__KERNEL_FLOAT(besa__cpu_exp_sum, (float *y, const float *x, float shift, int64_t n), (y, x, shift, n))

/* sum exp(x - shift) */
BESA__INLINE float besa__cpu_sum_exp_body(const float *x, float shift, int64_t n)
{
#define BESA__TERM(i) besa__exp(x[i] - shift)
    BESA__SUM_BODY(n, BESA__TERM)
#undef BESA__TERM
}
BESA__KERNEL_FLOAT(besa__cpu_sum_exp, (const float *x, float shift, int64_t n), (x, shift, n))

/* sum exp(x - shift) (x - y) */
BESA__INLINE float besa__cpu_sum_exp_by_body(const float *x, const float *y, float shift, int64_t n)
{
#define BESA__TERM(i) (besa__exp(x[i] - shift) * (x[i] - y[i]))
    BESA__SUM_BODY(n, BESA__TERM)
#undef BESA__TERM
}
BESA__KERNEL_FLOAT(besa__cpu_sum_exp_by, (const float *x, const float *y, float shift, int64_t n), (x, y, shift, n))

/* y += a x */
BESA__INLINE void besa__cpu_axpy_body(float *y, float a, const float *x, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}
BESA__KERNEL(besa__cpu_axpy, (float *y, float a, const float *x, int64_t n), (y, a, x, n))

/* x *= a */
BESA__INLINE void besa__cpu_scale_body(float *x, float a, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] *= a;
}
BESA__KERNEL(besa__cpu_scale, (float *x, float a, int64_t n), (x, a, n))

/* y = x in float */
BESA__INLINE void besa__cpu_widen_bf16_body(float *y, const uint16_t *x, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) y[i] = besa__bf16_to_f32(x[i]);
}
BESA__KERNEL(besa__cpu_widen_bf16, (float *y, const uint16_t *x, int64_t n), (y, x, n))

BESA__INLINE void besa__cpu_widen_f16_body(float *y, const uint16_t *x, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) y[i] = besa__f16_to_f32(x[i]);
}
BESA__KERNEL(besa__cpu_widen_f16, (float *y, const uint16_t *x, int64_t n), (y, x, n))

BESA__INLINE void besa__cpu_narrow_bf16_body(uint16_t *y, const float *x, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) y[i] = besa__f32_to_bf16(x[i]);
}
BESA__KERNEL(besa__cpu_narrow_bf16, (uint16_t *y, const float *x, int64_t n), (y, x, n))

/* y (n) = elements at .. at + n - 1 of x, in float */
static void besa__cpu_widen(float *y, const void *x, besa_dtype dtype, int64_t at, int64_t n)
{
    const void *from = besa__at_const(x, dtype, at);
    if (dtype == BESA_BF16) besa__cpu_widen_bf16(y, (const uint16_t *)from, n);
    else if (dtype == BESA_F16) besa__cpu_widen_f16(y, (const uint16_t *)from, n);
    else memcpy(y, from, (size_t)n * sizeof *y);
}

/* elements at .. at + n - 1 of y = x (n), rounded to nearest even */
static void besa__cpu_narrow(void *y, besa_dtype dtype, int64_t at, const float *x, int64_t n)
{
    void *to = besa__at(y, dtype, at);
    if (dtype == BESA_BF16) besa__cpu_narrow_bf16((uint16_t *)to, x, n);
    else if (dtype == BESA_F32) memcpy(to, x, (size_t)n * sizeof *x);
    else for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = besa__f32_to_f16(x[i]);
}

/* ---- context, tasks, workspace ------------------------------------------------------------- */

typedef struct besa__cpu {
    int threads, bf16;
    double event[BESA_EVENT_COUNT];             /* clock when it was recorded */
} besa__cpu;

static inline const besa__cpu *besa__cpu_of(const besa_backend *be) { return (const besa__cpu *)be->context; }

/* The number of threads for so many tasks. */
static int besa__cpu_team(const besa_backend *be, int64_t tasks)
{
    int threads = besa__cpu_of(be)->threads;
    return tasks < threads ? (int)besa__max(tasks, 1) : threads;
}

/* Rows of one task: about 32768 elements. */
static int64_t besa__cpu_grain(int64_t columns) { return besa__max(32768 / besa__max(columns, 1), 1); }

/* The workspace as an empty arena; BESA__CPU_FITS checks what was taken of it. */
static besa__arena besa__cpu_work(const besa_backend *be)
{
    besa__arena work;
    work.base = (unsigned char *)be->workspace;
    work.used = 0;
    return work;
}

/* For each operation with workspace a function `..._place` takes its arrays from an arena; workspace_size runs it on
 * an arena without memory. */
#define BESA__CPU_FITS(be, work) BESA_ASSERT((work).used <= (be)->workspace_bytes)

static besa_result besa__cpu_alloc(besa_backend *be, void **device, size_t bytes)
{
    void *raw;
    unsigned char *aligned;
    *device = NULL;
    BESA__TRY(besa__malloc(&raw, besa__add_sizes(bytes, 2 * BESA__ALIGN), "the CPU backend", &be->error));
    aligned = (unsigned char *)raw + (2 * BESA__ALIGN - (uintptr_t)raw % BESA__ALIGN);
    memcpy(aligned - sizeof raw, &raw, sizeof raw);
    *device = aligned;
    return BESA_OK;
}

static void besa__cpu_free(besa_backend *be, void *device)
{
    void *raw;
    (void)be;
    if (!device) return;
    memcpy(&raw, (unsigned char *)device - sizeof raw, sizeof raw); /* alloc left it there */
    BESA_FREE(raw);
}

static besa_result besa__cpu_memory_info(besa_backend *be, size_t *free_bytes, size_t *total_bytes)
{
    (void)be;
    *free_bytes = *total_bytes = 0; /* not known */
    return BESA_OK;
}

static besa_result besa__cpu_upload(besa_backend *be, besa_queue q, void *dst, const void *src, size_t bytes)
{
    (void)be, (void)q;
    if (bytes) memmove(dst, src, bytes);
    return BESA_OK;
}

static besa_result besa__cpu_zero(besa_backend *be, besa_queue q, void *dst, size_t bytes)
{
    (void)be, (void)q;
    if (bytes) memset(dst, 0, bytes);
    return BESA_OK;
}

/* Operations are done when they return: an event is the time of its record, and nothing waits. */
static besa_result besa__cpu_record(besa_backend *be, besa_queue q, int event)
{
    (void)q;
    BESA_ASSERT(event >= 0 && event < BESA_EVENT_COUNT);
    ((besa__cpu *)be->context)->event[event] = besa__seconds();
    return BESA_OK;
}

static besa_result besa__cpu_wait(besa_backend *be, besa_queue q, int event)
{
    (void)be, (void)q, (void)event;
    return BESA_OK;
}

static besa_result besa__cpu_elapsed(besa_backend *be, int first, int second, double *seconds)
{
    const besa__cpu *cpu = besa__cpu_of(be);
    BESA_ASSERT(first >= 0 && first < BESA_EVENT_COUNT && second >= 0 && second < BESA_EVENT_COUNT);
    *seconds = cpu->event[second] - cpu->event[first];
    return BESA_OK;
}

static besa_result besa__cpu_synchronize(besa_backend *be, besa_queue q)
{
    (void)be, (void)q;
    return BESA_OK;
}

/* dst(n) = src(n) */
static besa_result besa__cpu_convert(besa_backend *be, void *dst, besa_dtype dst_dtype, const void *src,
                                     besa_dtype src_dtype, int64_t n)
{
    int64_t grain = 32768, tasks = besa__parts(n, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t end = besa__min(n, (task + 1) * grain);
        for (int64_t i = task * grain; i < end; i += 512) {
            float part[512];
            int64_t count = besa__min(512, end - i);
            if (dst_dtype == src_dtype)
                memmove(besa__at(dst, dst_dtype, i), besa__at_const(src, src_dtype, i),
                        (size_t)count * besa_dtype_size(src_dtype));
            else {
                besa__cpu_widen(part, src, src_dtype, i, count);
                besa__cpu_narrow(dst, dst_dtype, i, part, count);
            }
        }
    }
    return BESA_OK;
}

/* ============================================================================================
 * // >>cpu-block             matrix products, norms and rope on the CPU
 * ============================================================================================
 * T tokens, C columns, R rows; activations are float. Products go to section cpu-gemm; the rest are the formulas of
 * api-backend over kernels. Tasks are runs of rows whose length depends on the sizes alone. */

/* ---- matrix products ----------------------------------------------------------------------- */

static besa__gemm_args besa__cpu_product(float *c, int64_t m, int64_t n, int64_t k)
{
    besa__gemm_args g;
    memset(&g, 0, sizeof g);
    g.m = m, g.n = n, g.k = k;
    g.c = c, g.c_row = n;
    g.alpha = 1.0f;
    return g;
}

/* A(i,p) = a[i row + p column], and B likewise */
static void besa__cpu_operand_a(besa__gemm_args *g, const void *a, besa_dtype dtype, int64_t row, int64_t column)
{
    g->a = a, g->a_dtype = dtype, g->a_row = row, g->a_col = column;
}

static void besa__cpu_operand_b(besa__gemm_args *g, const void *b, besa_dtype dtype, int64_t row, int64_t column)
{
    g->b = b, g->b_dtype = dtype, g->b_row = row, g->b_col = column;
}

static void *besa__cpu_gemm_place(besa__arena *work, int threads)
{
    return besa__take(work, besa__gemm_scratch(threads));
}

/* The product by all threads, with its scratch at the start of the workspace. */
static void besa__cpu_multiply(besa_backend *be, const besa__gemm_args *g, int bf16)
{
    const besa__cpu *cpu = besa__cpu_of(be);
    besa__arena work = besa__cpu_work(be);
    void *scratch = besa__cpu_gemm_place(&work, cpu->threads);
    BESA__CPU_FITS(be, work);
    besa__gemm(g, cpu->threads, bf16, scratch);
}

/* Y(T,R) = X(T,C) W(R,C)' [+ Y] [+ bias(R)] */
static besa_result besa__cpu_linear_forward(besa_backend *be, void *y, const void *x, const void *w, besa_dtype dtype,
                                            const float *bias, int64_t tokens, int64_t rows, int64_t columns,
                                            int accumulate)
{
    besa__gemm_args g = besa__cpu_product((float *)y, tokens, rows, columns);
    besa__cpu_operand_a(&g, x, BESA_F32, columns, 1);
    besa__cpu_operand_b(&g, w, dtype, 1, columns);
    g.bias = bias;
    g.accumulate = accumulate;
    besa__cpu_multiply(be, &g, besa__cpu_of(be)->bf16);
    return BESA_OK;
}

/* dX(T,C) = dY(T,R) W(R,C) [+ dX] */
static besa_result besa__cpu_linear_backward_input(besa_backend *be, void *dx, const void *dy, const void *w,
                                                   besa_dtype dtype, int64_t tokens, int64_t rows, int64_t columns,
                                                   int accumulate)
{
    besa__gemm_args g = besa__cpu_product((float *)dx, tokens, columns, rows);
    besa__cpu_operand_a(&g, dy, BESA_F32, rows, 1);
    besa__cpu_operand_b(&g, w, dtype, columns, 1);
    g.accumulate = accumulate;
    besa__cpu_multiply(be, &g, besa__cpu_of(be)->bf16);
    return BESA_OK;
}

/* dW(count,C): rows first .. of dY(T,R)' X(T,C) */
static besa_result besa__cpu_linear_backward_weight(besa_backend *be, void *dw, besa_dtype dw_dtype, const void *dy,
                                                    const void *x, int64_t tokens, int64_t rows, int64_t columns,
                                                    int64_t first, int64_t count, int accumulate)
{
    (void)dw_dtype;                             /* float */
    besa__gemm_args g = besa__cpu_product((float *)dw, count, columns, tokens);
    g.accumulate = accumulate;
    besa__cpu_operand_a(&g, (const float *)dy + first, BESA_F32, 1, rows);
    besa__cpu_operand_b(&g, x, BESA_F32, columns, 1);
    besa__cpu_multiply(be, &g, besa__cpu_of(be)->bf16);
    return BESA_OK;
}

/* H(C,C) += scale X(T,C)' X(T,C), the lower triangle */
static besa_result besa__cpu_gram(besa_backend *be, float *h, const void *x, float scale, int64_t tokens,
                                  int64_t columns)
{
    besa__gemm_args g = besa__cpu_product(h, columns, columns, tokens);
    besa__cpu_operand_a(&g, x, BESA_F32, 1, columns);
    besa__cpu_operand_b(&g, x, BESA_F32, columns, 1);
    g.alpha = scale;
    g.accumulate = 1;
    g.lower = 1;
    besa__cpu_multiply(be, &g, besa__cpu_of(be)->bf16);
    return BESA_OK;
}

/* logits(T,V) = H(T,d) W(V,d)' */
static besa_result besa__cpu_logits(besa_backend *be, float *out, const void *h, const void *w, besa_dtype dtype,
                                    int64_t tokens, int64_t vocab, int64_t d)
{
    return besa__cpu_linear_forward(be, out, h, w, dtype, NULL, tokens, vocab, d, 0);
}

/* ---- rmsnorm ------------------------------------------------------------------------------- */

/* y = x r g */
BESA__INLINE void besa__cpu_norm_row_body(float *y, const float *x, const float *g, float r, int64_t d)
{
    BESA__ELEMENTWISE
    for (int64_t c = 0; c < d; c++) y[c] = x[c] * r * g[c];
}
BESA__KERNEL(besa__cpu_norm_row, (float *y, const float *x, const float *g, float r, int64_t d), (y, x, g, r, d))

/* sum x y g */
BESA__INLINE float besa__cpu_dot3_body(const float *x, const float *y, const float *g, int64_t d)
{
#define BESA__TERM(i) (x[i] * y[i] * g[i])
    BESA__SUM_BODY(d, BESA__TERM)
#undef BESA__TERM
}
BESA__KERNEL_FLOAT(besa__cpu_dot3, (const float *x, const float *y, const float *g, int64_t d), (x, y, g, d))

/* dx = [dx +] r g dy - x t */
BESA__INLINE void besa__cpu_norm_back_row_body(float *dx, const float *dy, const float *x, const float *g, float r,
                                               float t, int64_t d, int accumulate)
{
    if (accumulate) {
        BESA__ELEMENTWISE
        for (int64_t c = 0; c < d; c++) dx[c] += r * g[c] * dy[c] - x[c] * t;
    } else {
        BESA__ELEMENTWISE
        for (int64_t c = 0; c < d; c++) dx[c] = r * g[c] * dy[c] - x[c] * t;
    }
}
BESA__KERNEL(besa__cpu_norm_back_row,
             (float *dx, const float *dy, const float *x, const float *g, float r, float t, int64_t d, int accumulate),
             (dx, dy, x, g, r, t, d, accumulate))

/* Y(N,d) = X inv_rms g, inv_rms(N) = 1 / sqrt(mean(X^2) + eps) */
static besa_result besa__cpu_rmsnorm_forward(besa_backend *be, void *y, float *inv_rms, const void *x, const float *g,
                                             int64_t n, int64_t d, float eps)
{
    int64_t grain = besa__cpu_grain(d), tasks = besa__parts(n, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t i = task * grain; i < besa__min(n, (task + 1) * grain); i++) {
            const float *row = (const float *)x + i * d;
            inv_rms[i] = 1.0f / sqrtf(besa__cpu_dot(row, row, d) / (float)d + eps);
            besa__cpu_norm_row((float *)y + i * d, row, g, inv_rms[i], d);
        }
    return BESA_OK;
}

/* dX(N,d) = inv_rms (g dY - X inv_rms^2 mean(g dY X)) [+ dX] */
static besa_result besa__cpu_rmsnorm_backward(besa_backend *be, void *dx, const void *dy, const void *x, const float *g,
                                              const float *inv_rms, int64_t n, int64_t d, int accumulate)
{
    int64_t grain = besa__cpu_grain(d), tasks = besa__parts(n, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t i = task * grain; i < besa__min(n, (task + 1) * grain); i++) {
            const float *x_row = (const float *)x + i * d, *dy_row = (const float *)dy + i * d;
            float r = inv_rms[i], mean = besa__cpu_dot3(dy_row, x_row, g, d) / (float)d;
            besa__cpu_norm_back_row((float *)dx + i * d, dy_row, x_row, g, r, r * r * r * mean, d, accumulate);
        }
    return BESA_OK;
}

/* ---- rope ---------------------------------------------------------------------------------- */

/* the heads of one token: (a, b) = (a cos - b sin, b cos + a sin), sin negated for direction -1; `half` pairs of each head */
BESA__INLINE void besa__cpu_rope_row_body(float *x, const float *cosine, const float *sine, float direction,
                                          int64_t heads, int64_t head_dim, int64_t half)
{
    for (int64_t h = 0; h < heads; h++, x += head_dim) {
        float *y = x + half;
        BESA__ELEMENTWISE
        for (int64_t i = 0; i < half; i++) {
            float a = x[i], b = y[i], s = direction * sine[i];
            x[i] = a * cosine[i] - b * s;
            y[i] = b * cosine[i] + a * s;
        }
    }
}
BESA__KERNEL(besa__cpu_rope_row,
             (float *x, const float *cosine, const float *sine, float direction, int64_t heads, int64_t head_dim, int64_t half),
             (x, cosine, sine, direction, heads, head_dim, half))

/* X(T, heads * dh) in place, token t at position t % seqlen of cos, sin (seqlen, r / 2) */
static besa_result besa__cpu_rope(besa_backend *be, void *x, const float *cosine, const float *sine, int64_t tokens,
                                  int64_t seqlen, int64_t heads, int64_t head_dim, int64_t rotary_dim, int direction)
{
    int64_t grain = besa__cpu_grain(heads * head_dim), tasks = besa__parts(tokens, grain), half = rotary_dim / 2;
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t t = task * grain; t < besa__min(tokens, (task + 1) * grain); t++)
            besa__cpu_rope_row((float *)x + t * heads * head_dim, cosine + t % seqlen * half,
                               sine + t % seqlen * half, (float)direction, heads, head_dim, half);
    return BESA_OK;
}

/* ============================================================================================
 * // >>cpu-attention         attention on the CPU: a block of queries at a time
 * ============================================================================================
 * Made of the micro-tiles of section cpu-tiles. K and V of a kv head are packed once, for all query heads of its group.
 * One step takes a block of queries of one head: their scores fill a strip, a panel (queries, NR) for every NR keys,
 * which stays in the second-level cache, beside it the strip of their gradient:
 *
 *     S = Q K' / sqrt(dh)                     A: rows of Q, B: K by keys         P = softmax(S) in place, S capped or not
 *     O = P V                                 A: rows of P, packed anew, B: V by dims
 *     dP = dO V'                              A: rows of dO, B: V by keys        dS = P (dP - rowsum(P dP)) in place
 *     dQ = dS K / sqrt(dh)                    A: rows of dS, packed anew, B: K by dims
 *     dV' += dO' P, dK' += Q' dS / sqrt(dh)   A: columns of dO and Q, B: the strip as it is
 *
 * All of them leave out the micro-tiles in which no query sees a key. dK' and dV' are sums over query heads and blocks:
 * the steps of a kv head are dealt out to pieces, as many as sizes alone say. Each piece has sums of its own, and these
 * are added in order: the bytes do not depend on the number of threads. */

enum {
    BESA__CPU_QUERIES = 48,            /* most queries of a block, a multiple of every MR */
    BESA__CPU_SCORES = 96 << 10,       /* floats of a block's strips, unless MR queries need more */
    BESA__CPU_KEYS = 256,              /* keys for which rows of a strip are packed at a time, a multiple of every NR */
    BESA__CPU_PIECES = 12,             /* least pieces of a sequence, where there are as many steps */
    BESA__CPU_KV = 8 << 20             /* bytes of the kv heads at work, unless one for each thread takes more */
};

typedef struct besa__cpu_attention {
    const besa_attention_shape *s;
    besa__gemm_kernel kernel;
    int bf16, backward;
    float scale;                       /* 1 / sqrt(dh), or as the shape has it */
    const float *q, *k, *v, *d_o;
    float *out, *dk, *dv;              /* out: O or dQ */
    int64_t q_step, k_step;            /* from token to token */
    int64_t group;                     /* query heads of a kv head */
    int64_t keys, queries, blocks;     /* keys of a sequence in whole NR; queries of a block; blocks */
    int64_t pieces;
    int64_t rows, columns;             /* head_dim in whole MR, in whole NR */
} besa__cpu_attention;

/* One kv head of one sequence. */
typedef struct besa__cpu_kv {
    float *k_keys, *v_keys;            /* panels (keys / NR)(dh, NR) */
    float *dims;                       /* V, in the backward pass K: panels (columns / NR)(keys, NR) */
    float *dk, *dv;                    /* (pieces)(keys / NR)(rows, NR) */
} besa__cpu_kv;

/* One block of queries: the arrays are one thread's. */
typedef struct besa__cpu_queries {
    const besa__cpu_attention *x;
    int64_t i0, n, rows;               /* first query, how many, these in whole MR */
    int64_t j0, j1;                    /* the keys that they see; j0 in whole NR */
    float *q, *d_o;                    /* panels (rows / MR)(dh, MR) */
    float *q_columns, *d_o_columns;    /* panels (dh / MR)(n, MR) */
    float *p, *dp;                     /* the strips: panels ((j1 - j0) / NR)(queries, NR) */
    float *max, *sum, *dot;            /* (rows, NR), by lanes: row maxima, row sums of P, of P dP */
    float *packed;                     /* (KEYS, MR) */
    float *out;                        /* (rows, columns) */
} besa__cpu_queries;

/* A panel of the strips: keys j .. j + NR - 1, and of the queries, in whole MR, those that see one of them. */
typedef struct besa__cpu_panel {
    int64_t j, from, rows;
    float *p, *dp;                     /* (rows, NR) */
} besa__cpu_panel;

static int64_t besa__cpu_whole(int64_t n, int64_t size) { return besa__product(besa__parts(n, size), size); }

/* The sizes of an operation; its arrays are still to be set. */
static besa__cpu_attention besa__cpu_attention_sizes(const besa_attention_shape *s, int bf16, int backward)
{
    besa__cpu_attention x;
    int64_t mr, nr, seen;
    memset(&x, 0, sizeof x);
    x.s = s, x.kernel = besa__gemm_choose(bf16), x.bf16 = bf16, x.backward = backward;
    mr = x.kernel.mr, nr = x.kernel.nr;
    x.scale = s->scale != 0.0f ? s->scale : 1.0f / sqrtf((float)s->head_dim);
    x.q_step = besa__product(s->num_attention_heads, s->head_dim);
    x.k_step = besa__product(s->num_key_value_heads, s->head_dim);
    x.group = s->num_attention_heads / s->num_key_value_heads;
    x.rows = besa__cpu_whole(s->head_dim, mr), x.columns = besa__cpu_whole(s->head_dim, nr);
    x.keys = seen = besa__cpu_whole(s->seqlen, nr);
    if (s->sliding_window > 0) seen = besa__min(seen, besa__sum(s->sliding_window, BESA__CPU_QUERIES + 2 * nr));
    x.queries = besa__max(BESA__CPU_SCORES / (1 + backward) / seen / mr, 1) * mr;
    x.queries = besa__min(x.queries, besa__min(BESA__CPU_QUERIES, besa__cpu_whole(s->seqlen, mr)));
    x.blocks = besa__parts(s->seqlen, x.queries);
    x.pieces = besa__min(besa__parts(BESA__CPU_PIECES, s->num_key_value_heads), besa__product(x.group, x.blocks));
    return x;
}

/* What a kv head needs while it is worked on, and what a thread needs: no less for a longer sequence. */
static void besa__cpu_kv_place(besa__arena *work, besa__cpu_kv *kv, const besa__cpu_attention *x)
{
    int64_t sums = x->backward ? besa__product(x->pieces, besa__product(x->keys, x->rows)) : 0;
    kv->k_keys = besa__take_floats(work, besa__product(x->keys, x->s->head_dim));
    kv->v_keys = besa__take_floats(work, x->backward ? besa__product(x->keys, x->s->head_dim) : 0);
    kv->dims = besa__take_floats(work, besa__product(x->keys, x->columns));
    kv->dk = besa__take_floats(work, sums);
    kv->dv = besa__take_floats(work, sums);
}

static void besa__cpu_queries_place(besa__arena *work, besa__cpu_queries *b, const besa__cpu_attention *x)
{
    int64_t n = BESA__CPU_QUERIES, lanes = n * x->kernel.nr, back = x->backward;
    int64_t rows = besa__product(n, x->s->head_dim), columns = besa__product(back * n, x->rows);
    int64_t strip = besa__max(BESA__CPU_SCORES / (1 + back), besa__product(x->kernel.mr, x->keys));
    strip = besa__min(strip, besa__product(n, x->keys));
    b->x = x;
    b->q = besa__take_floats(work, rows);
    b->d_o = besa__take_floats(work, besa__product(back, rows));
    b->q_columns = besa__take_floats(work, columns);
    b->d_o_columns = besa__take_floats(work, columns);
    b->p = besa__take_floats(work, strip);
    b->dp = besa__take_floats(work, besa__product(back, strip));
    b->max = besa__take_floats(work, lanes);
    b->sum = besa__take_floats(work, lanes);
    b->dot = besa__take_floats(work, back * lanes);
    b->packed = besa__take_floats(work, BESA__CPU_KEYS * x->kernel.mr);
    b->out = besa__take_floats(work, besa__product(n, x->columns));
}

/* Packs NR keys of one kv head, K and V. */
static void besa__cpu_kv_pack(const besa__cpu_attention *x, const besa__cpu_kv *kv, int64_t head, int64_t panel)
{
    int64_t nr = x->kernel.nr, dh = x->s->head_dim, heads = x->s->num_key_value_heads;
    int64_t j = panel * nr, n = besa__min(nr, x->s->seqlen - j), to = j * besa__parts(dh, x->kernel.unit);
    int64_t at = (head / heads * x->s->seqlen + j) * x->k_step + head % heads * dh;
    besa__gemm_operand k = {x->k, BESA_F32, x->k_step, 1, x->bf16}, v = {x->v, BESA_F32, x->k_step, 1, x->bf16};
    besa__gemm_operand dims = {x->backward ? x->k : x->v, BESA_F32, 1, x->k_step, x->bf16};
    x->kernel.pack(kv->k_keys + to, nr, &k, at, n, dh);
    if (x->backward) x->kernel.pack(kv->v_keys + to, nr, &v, at, n, dh);
    for (int64_t d = 0; d < dh; d += nr)
        x->kernel.pack(kv->dims + (d * x->keys + j * nr) / x->kernel.unit, nr, &dims, at + d, besa__min(nr, dh - d), n);
}

/* Panels of a block's rows, and of its columns; `from` is its first row. */
static void besa__cpu_queries_pack(const besa__cpu_queries *b, float *rows, float *columns, const float *from)
{
    const besa__cpu_attention *x = b->x;
    int64_t mr = x->kernel.mr, unit = x->kernel.unit, dh = x->s->head_dim;
    besa__gemm_operand row = {from, BESA_F32, x->q_step, 1, x->bf16}, column = {from, BESA_F32, 1, x->q_step, x->bf16};
    for (int64_t r = 0; r < b->n; r += mr)
        x->kernel.pack(rows + r * besa__parts(dh, unit), mr, &row, r * x->q_step, besa__min(mr, b->n - r), dh);
    for (int64_t d = 0; x->backward && d < dh; d += mr)
        x->kernel.pack(columns + d * besa__parts(b->n, unit), mr, &column, d, besa__min(mr, dh - d), b->n);
}

/* The first key that query i sees. */
static int64_t besa__cpu_first_key(const besa__cpu_attention *x, int64_t i)
{
    int64_t window = x->s->sliding_window;
    return window > 0 ? besa__max(0, i - window + 1) : 0;
}

static besa__cpu_panel besa__cpu_panel_at(const besa__cpu_queries *b, int64_t j)
{
    int64_t mr = b->x->kernel.mr, nr = b->x->kernel.nr, window = b->x->s->sliding_window, end = b->rows, at;
    besa__cpu_panel c;
    if (window > 0) end = besa__min(end, besa__sum(j + nr - 1, window) - b->i0);
    c.j = j, c.from = besa__max(j - b->i0, 0) / mr * mr;
    c.rows = besa__cpu_whole(end, mr) - c.from;
    at = (j - b->j0) * b->x->queries + c.from * nr;
    c.p = b->p + at, c.dp = b->x->backward ? b->dp + at : NULL;
    return c;
}

/* C(rows, NR) = alpha A B [+ C], A in panels of MR rows `step` apart */
static void besa__cpu_tiles(const besa__gemm_kernel *kernel, float *c, int64_t rows, const float *a, int64_t step,
                            const float *b, int64_t units, float alpha, int add)
{
    for (int64_t r = 0; r < rows; r += kernel->mr, a += step, c += kernel->mr * kernel->nr)
        kernel->tile(units, a, b, c, kernel->nr, alpha, add, NULL);
}

/* What a query does not see becomes -inf. */
static void besa__cpu_attention_mask(const besa__cpu_queries *b, const besa__cpu_panel *c)
{
    const float hidden = besa__bits_float(0xFF800000u);
    int64_t nr = b->x->kernel.nr, first = b->i0 + c->from, end = first + c->rows;
    if (b->x->s->sliding_window <= 0) end = besa__min(end, c->j + nr);    /* the others see all of the panel */
    for (int64_t i = first; i < end; i++) {
        float *row = c->p + (i - first) * nr;
        int64_t before = besa__min(besa__cpu_first_key(b->x, i) - c->j, nr);
        for (int64_t l = 0; l < before; l++) row[l] = hidden;
        for (int64_t l = besa__max(i + 1 - c->j, 0); l < nr; l++) row[l] = hidden;
    }
}

/* x = cap tanh(x / cap) */
BESA__INLINE void besa__cpu_softcap_run_body(float *x, float scale, float cap, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) x[i] = cap * besa__tanh(x[i] * scale / cap);
}
BESA__KERNEL(besa__cpu_softcap_run, (float *x, float scale, float cap, int64_t n), (x, scale, cap, n))

/* ds = ds (1 - tanh(s / cap)^2): the derivative by what was capped */
BESA__INLINE void besa__cpu_softcap_back_body(float *ds, const float *s, float cap, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float t = besa__tanh(s[i] / cap);
        ds[i] *= 1.0f - t * t;
    }
}
BESA__KERNEL(besa__cpu_softcap_back, (float *ds, const float *s, float cap, int64_t n), (ds, s, cap, n))

/* max = max(max, x) */
BESA__INLINE void besa__cpu_lanes_max_body(float *max, const float *x, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) max[i] = max[i] < x[i] ? x[i] : max[i];
}
BESA__KERNEL(besa__cpu_lanes_max, (float *max, const float *x, int64_t n), (max, x, n))

/* exp(x) of x <= 0 as in besa__exp, but 0 where it would be subnormal: there k = -127, whose 2^k has no bits set. */
BESA__INLINE float besa__exp_falling(float x)
{
    const float magic = 12582912.0f;
    uint32_t low = 0u - (uint32_t)(x < -88.0f); /* max(x, -88) by bits, which vectorises; NaN stays NaN */
    float y = besa__bits_float((besa__float_bits(x) & ~low) | (0xC2B00000u & low)), t = y * 1.44269504f + magic;
    float n = t - magic, r = (y - n * 0.693359375f) + n * 2.12194440e-4f, p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r;
    return (p + 1.0f) * besa__bits_float((besa__float_bits(t) + 127) << 23);
}

/* x = exp(x - max), sum += x */
BESA__INLINE void besa__cpu_lanes_exp_body(float *sum, float *x, const float *max, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float e = besa__exp_falling(x[i] - max[i]);
        x[i] = e;
        sum[i] += e;
    }
}
BESA__KERNEL(besa__cpu_lanes_exp, (float *sum, float *x, const float *max, int64_t n), (sum, x, max, n))

/* sum += x y */
BESA__INLINE void besa__cpu_lanes_dot_body(float *sum, const float *x, const float *y, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) sum[i] += x[i] * y[i];
}
BESA__KERNEL(besa__cpu_lanes_dot, (float *sum, const float *x, const float *y, int64_t n), (sum, x, y, n))

/* p = p scale, dp = p (dp - dot scale): the derivative of the softmax */
BESA__INLINE void besa__cpu_lanes_back_body(float *p, float *dp, const float *scale, const float *dot, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float probability = p[i] * scale[i];
        p[i] = probability;
        dp[i] = probability * (dp[i] - dot[i] * scale[i]);
    }
}
BESA__KERNEL(besa__cpu_lanes_back, (float *p, float *dp, const float *scale, const float *dot, int64_t n),
             (p, dp, scale, dot, n))

/* Every lane of a row, NR of them, a multiple of 8, becomes the row's maximum (kind 0), sum (1), or 1 / sum (2). */
BESA__INLINE void besa__cpu_lanes_join_body(float *lane, int64_t rows, int64_t nr, int kind)
{
    for (; rows > 0; rows--, lane += nr) {
        float a[8];
        memcpy(a, lane, sizeof a);
        for (int64_t at = 8; at < nr; at += 8)
            for (int l = 0; l < 8; l++) a[l] = kind ? a[l] + lane[at + l] : a[l] < lane[at + l] ? lane[at + l] : a[l];
        for (int width = 4; width > 0; width /= 2)
            for (int l = 0, m = width; l < width; l++, m++) a[l] = kind ? a[l] + a[m] : a[l] < a[m] ? a[m] : a[l];
        if (kind == 2) a[0] = 1.0f / a[0];
        for (int64_t l = 0; l < nr; l++) lane[l] = a[0];
    }
}
BESA__KERNEL(besa__cpu_lanes_join, (float *lane, int64_t rows, int64_t nr, int kind), (lane, rows, nr, kind))

/* The strips = S and dP, -inf where masked, and the row maxima. */
static void besa__cpu_attention_scores(const besa__cpu_queries *b, const besa__cpu_kv *kv)
{
    const besa__cpu_attention *x = b->x;
    int64_t nr = x->kernel.nr, units = besa__parts(x->s->head_dim, x->kernel.unit), step = x->kernel.mr * units;
    for (int64_t i = 0; i < b->rows * nr; i++) b->max[i] = besa__bits_float(0xFF800000u);
    for (int64_t j = b->j0; j < b->j1; j += nr) {
        besa__cpu_panel c = besa__cpu_panel_at(b, j);
        int64_t at = c.from * units;
        besa__cpu_tiles(&x->kernel, c.p, c.rows, b->q + at, step, kv->k_keys + j * units, units, x->scale, 0);
        if (x->s->softcap != 0.0f) besa__cpu_softcap_run(c.p, 1.0f, x->s->softcap, c.rows * nr);
        if (x->backward) besa__cpu_tiles(&x->kernel, c.dp, c.rows, b->d_o + at, step, kv->v_keys + j * units, units, 1.0f, 0);
        besa__cpu_attention_mask(b, &c);
        besa__cpu_lanes_max(b->max + c.from * nr, c.p, c.rows * nr);
    }
    besa__cpu_lanes_join(b->max, b->rows, nr, 0);
}

/* The strips = exp(S - row maximum) and dP, sum = 1 / the row sums; in the backward pass P and dS */
static void besa__cpu_attention_softmax(const besa__cpu_queries *b)
{
    int64_t nr = b->x->kernel.nr;
    memset(b->sum, 0, (size_t)(b->rows * nr) * sizeof *b->sum);
    if (b->x->backward) memset(b->dot, 0, (size_t)(b->rows * nr) * sizeof *b->dot);
    for (int64_t j = b->j0; j < b->j1; j += nr) {
        besa__cpu_panel c = besa__cpu_panel_at(b, j);
        besa__cpu_lanes_exp(b->sum + c.from * nr, c.p, b->max + c.from * nr, c.rows * nr);
        if (b->x->backward) besa__cpu_lanes_dot(b->dot + c.from * nr, c.p, c.dp, c.rows * nr);
    }
    besa__cpu_lanes_join(b->sum, b->rows, nr, 2);
    if (!b->x->backward) return;
    besa__cpu_lanes_join(b->dot, b->rows, nr, 1);
    for (int64_t j = b->j0; j < b->j1; j += nr) {
        besa__cpu_panel c = besa__cpu_panel_at(b, j);
        besa__cpu_lanes_back(c.p, c.dp, b->sum + c.from * nr, b->dot + c.from * nr, c.rows * nr);
    }
}

/* dS through the cap: the scores are made once more, where the row maxima were. */
static void besa__cpu_attention_uncap(const besa__cpu_queries *b, const besa__cpu_kv *kv)
{
    const besa__cpu_attention *x = b->x;
    int64_t nr = x->kernel.nr, units = besa__parts(x->s->head_dim, x->kernel.unit), step = x->kernel.mr * units;
    for (int64_t j = b->j0; j < b->j1; j += nr) {
        besa__cpu_panel c = besa__cpu_panel_at(b, j);
        besa__cpu_tiles(&x->kernel, b->max, c.rows, b->q + c.from * units, step, kv->k_keys + j * units, units, x->scale, 0);
        besa__cpu_softcap_back(c.dp, b->max, x->s->softcap, c.rows * nr);
    }
}

/* to (n, dh) = strip V / row sums, in the backward pass strip K / sqrt(dh) */
static void besa__cpu_attention_mix(const besa__cpu_queries *b, const besa__cpu_kv *kv, const float *strip, float *to)
{
    const besa__cpu_attention *x = b->x;
    int64_t mr = x->kernel.mr, nr = x->kernel.nr, unit = x->kernel.unit, dh = x->s->head_dim;
    besa__gemm_operand rows = {strip, BESA_F32, nr, 1, x->bf16};
    for (int64_t j0 = b->j0; j0 < b->j1; j0 += BESA__CPU_KEYS)
        for (int64_t r = 0; r < b->rows; r += mr) {
            int64_t first = besa__cpu_first_key(x, b->i0 + r) / nr * nr, begin = besa__max(j0, first);
            int64_t end = besa__min(besa__min(j0 + BESA__CPU_KEYS, b->i0 + r + mr), x->s->seqlen);
            for (int64_t j = begin; j < end; j += nr)
                x->kernel.pack(b->packed + (j - begin) * mr / unit, mr, &rows, (j - b->j0) * x->queries + r * nr, mr,
                               besa__min(nr, end - j));
            for (int64_t d = 0; begin < end && d < dh; d += nr)
                x->kernel.tile(besa__parts(end - begin, unit), b->packed, kv->dims + (d * x->keys + begin * nr) / unit,
                               b->out + r * x->columns + d, x->columns, 1.0f, begin > first, NULL);
        }
    for (int64_t r = 0; r < b->n; r++) {
        besa__cpu_scale(b->out + r * x->columns, x->backward ? x->scale : b->sum[r * nr], dh);
        memcpy(to + r * x->q_step, b->out + r * x->columns, (size_t)dh * sizeof *to);
    }
}

/* Rows of NR floats as bf16, in place: rounded, or (unit 2) two rows as one row of pairs */
BESA__INLINE void besa__cpu_round_rows_body(float *p, int64_t rows, int64_t nr, int64_t unit)
{
    for (int64_t r = 0; r < rows; r += unit)
        BESA__ELEMENTWISE
        for (int64_t l = 0; l < nr; l++) {
            uint32_t low = besa__f32_to_bf16(p[r * nr + l]), high = besa__f32_to_bf16(p[(r + unit - 1) * nr + l]);
            p[r / unit * nr + l] = besa__bits_float(high << 16 | (unit == 2 ? low : 0));
        }
}
BESA__KERNEL(besa__cpu_round_rows, (float *p, int64_t rows, int64_t nr, int64_t unit), (p, rows, nr, unit))

/* dV' += dO' P, dK' += Q' dS / sqrt(dh) */
static void besa__cpu_attention_gather(const besa__cpu_queries *b, float *dk, float *dv)
{
    const besa__cpu_attention *x = b->x;
    int64_t mr = x->kernel.mr, nr = x->kernel.nr, unit = x->kernel.unit, step = besa__parts(b->n, unit) * mr;
    for (int64_t j = b->j0; j < b->j1; j += nr) {
        besa__cpu_panel c = besa__cpu_panel_at(b, j);
        int64_t units = besa__parts(besa__min(c.rows, b->n - c.from), unit), at = c.from / unit * mr;
        if (x->bf16) besa__cpu_round_rows(c.p, c.rows, nr, unit), besa__cpu_round_rows(c.dp, c.rows, nr, unit);
        besa__cpu_tiles(&x->kernel, dv + j * x->rows, x->rows, b->d_o_columns + at, step, c.p, units, 1.0f, 1);
        besa__cpu_tiles(&x->kernel, dk + j * x->rows, x->rows, b->q_columns + at, step, c.dp, units, x->scale, 1);
    }
}

/* Step `step` of a kv head, the longest first: O of a block of queries, or dQ and what it adds to dK' and dV' */
static void besa__cpu_attention_step(besa__cpu_queries *b, const besa__cpu_kv *kv, int64_t head, int64_t step, float *dk,
                                     float *dv)
{
    const besa__cpu_attention *x = b->x;
    int64_t heads = x->s->num_key_value_heads, at = (head % heads * x->group + step % x->group) * x->s->head_dim;
    b->i0 = (x->blocks - 1 - step / x->group) * x->queries;
    b->n = besa__min(x->queries, x->s->seqlen - b->i0), b->rows = besa__cpu_whole(b->n, x->kernel.mr);
    b->j0 = besa__cpu_first_key(x, b->i0) / x->kernel.nr * x->kernel.nr, b->j1 = b->i0 + b->n;
    at += (head / heads * x->s->seqlen + b->i0) * x->q_step;
    besa__cpu_queries_pack(b, b->q, b->q_columns, x->q + at);
    if (x->backward) besa__cpu_queries_pack(b, b->d_o, b->d_o_columns, x->d_o + at);
    besa__cpu_attention_scores(b, kv);
    besa__cpu_attention_softmax(b);
    if (x->backward && x->s->softcap != 0.0f) besa__cpu_attention_uncap(b, kv);
    besa__cpu_attention_mix(b, kv, x->backward ? b->dp : b->p, x->out + at);
    if (x->backward) besa__cpu_attention_gather(b, dk, dv);
}

static void besa__cpu_attention_piece(besa__cpu_queries *b, const besa__cpu_kv *kv, int64_t head, int64_t piece)
{
    const besa__cpu_attention *x = b->x;
    int64_t size = x->keys * x->rows;
    float *dk = kv->dk + piece * size, *dv = kv->dv + piece * size;
    memset(dk, 0, (size_t)size * sizeof *dk);
    memset(dv, 0, (size_t)size * sizeof *dv);
    for (int64_t step = piece; step < x->group * x->blocks; step += x->pieces)
        besa__cpu_attention_step(b, kv, head, step, dk, dv);
}

/* NR keys of dK or dV of one kv head = the pieces' sums, transposed; part is (pieces)(keys / NR)(rows, NR) */
static void besa__cpu_attention_sum(const besa__cpu_queries *b, float *dst, float *part, int64_t head, int64_t panel)
{
    const besa__cpu_attention *x = b->x;
    besa__gemm_kernel kernel = besa__gemm_choose(0);
    int64_t nr = x->kernel.nr, dh = x->s->head_dim, heads = x->s->num_key_value_heads, j = panel * nr;
    int64_t n = besa__min(nr, x->s->seqlen - j);
    besa__gemm_operand sum = {part + j * x->rows, BESA_F32, nr, 1, 0};
    for (int64_t piece = 1; piece < x->pieces; piece++)
        besa__cpu_axpy(part + j * x->rows, 1.0f, part + (piece * x->keys + j) * x->rows, x->rows * nr);
    dst += (head / heads * x->s->seqlen + j) * x->k_step + head % heads * dh;
    for (int64_t d = 0; d < dh; d += nr) {
        int64_t width = besa__min(nr, dh - d);
        kernel.pack(b->p, nr, &sum, d * nr, width, n);
        for (int64_t i = 0; i < n; i++) memcpy(dst + i * x->k_step + d, b->p + i * nr, (size_t)width * sizeof *dst);
    }
}

/* kv heads head .. head + heads - 1 are worked on: their arrays and those of the threads */
typedef struct besa__cpu_attention_round {
    const besa__cpu_attention *x;
    besa__arena work, kv, thread;      /* the workspace; the sizes of one kv head's part of it, and of one thread's */
    int64_t head, heads;
} besa__cpu_attention_round;

/* All panels are packed (stage 0), all steps taken (1), the pieces added up (2). */
static void besa__cpu_attention_stage(besa_backend *be, const besa__cpu_attention_round *a, int stage)
{
    const besa__cpu_attention *x = a->x;
    int64_t panels = x->keys / x->kernel.nr, steps = x->backward ? x->pieces : x->group * x->blocks;
    int64_t tasks = a->heads * (stage == 1 ? steps : panels);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t index = task % a->heads, head = a->head + index, part = task / a->heads;
        besa__arena kv_work = {a->work.base + a->work.used + (size_t)a->kv.used * (size_t)index, 0};
        besa__arena mine = {a->work.base + (size_t)a->thread.used * (size_t)BESA__THREAD_INDEX(), 0};
        besa__cpu_kv kv;
        besa__cpu_queries b;
        besa__cpu_kv_place(&kv_work, &kv, x);
        besa__cpu_queries_place(&mine, &b, x);
        if (stage == 0) besa__cpu_kv_pack(x, &kv, head, part);
        else if (stage == 2) {
            besa__cpu_attention_sum(&b, x->dk, kv.dk, head, part);
            besa__cpu_attention_sum(&b, x->dv, kv.dv, head, part);
        } else if (x->backward) besa__cpu_attention_piece(&b, &kv, head, part);
        else besa__cpu_attention_step(&b, &kv, head, part, NULL, NULL);
    }
}

/* As many kv heads at a time as the workspace holds and as stay in the last-level cache, but one for each thread: the
 * fewer rounds, the less do threads wait for each other. */
static besa_result besa__cpu_attention_run(besa_backend *be, const besa__cpu_attention *x)
{
    int64_t all = x->s->batch * x->s->num_key_value_heads, threads = besa__cpu_of(be)->threads, most;
    besa__arena none = {NULL, 0};
    besa__cpu_attention_round a;
    besa__cpu_queries b;
    besa__cpu_kv kv;
    a.x = x, a.work = besa__cpu_work(be), a.kv = a.thread = none;
    besa__cpu_queries_place(&a.thread, &b, x);
    besa__cpu_kv_place(&a.kv, &kv, x);
    besa__take_parts(&a.work, &a.thread, threads);
    BESA_ASSERT(a.work.used + a.kv.used <= be->workspace_bytes);
    most = besa__max(threads, (int64_t)(BESA__CPU_KV / a.kv.used));
    most = besa__min(most, (int64_t)((be->workspace_bytes - a.work.used) / a.kv.used));
    for (a.head = 0; a.head < all; a.head += a.heads) {
        a.heads = besa__min(most, all - a.head);
        for (int stage = 0; stage < 2 + x->backward; stage++) besa__cpu_attention_stage(be, &a, stage);
    }
    return BESA_OK;
}

/* O(T, heads * dh) = softmax_causal(Q K' / sqrt(dh)) V */
static besa_result besa__cpu_attention_forward(besa_backend *be, void *o, const void *q, const void *k, const void *v,
                                               const besa_attention_shape *s)
{
    besa__cpu_attention x = besa__cpu_attention_sizes(s, besa__cpu_of(be)->bf16, 0);
    x.q = (const float *)q, x.k = (const float *)k, x.v = (const float *)v;
    x.out = (float *)o;
    return besa__cpu_attention_run(be, &x);
}

/* dQ(T, heads * dh), dK, dV (T, kv_heads * dh) */
static besa_result besa__cpu_attention_backward(besa_backend *be, void *dq, void *dk, void *dv, const void *d_o,
                                                const void *q, const void *k, const void *v,
                                                const besa_attention_shape *s)
{
    besa__cpu_attention x = besa__cpu_attention_sizes(s, besa__cpu_of(be)->bf16, 1);
    x.q = (const float *)q, x.k = (const float *)k, x.v = (const float *)v, x.d_o = (const float *)d_o;
    x.out = (float *)dq, x.dk = (float *)dk, x.dv = (float *)dv;
    return besa__cpu_attention_run(be, &x);
}

/* ============================================================================================
 * // >>cpu-loss              SwiGLU, GeGLU, sums, residuals, loss and head on the CPU
 * ============================================================================================
 * What is left of a block: one pass over memory each. */

BESA__INLINE void besa__cpu_swiglu_run_body(float *z, const float *gate, const float *up, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) z[i] = gate[i] * besa__sigmoid(gate[i]) * up[i];
}
BESA__KERNEL(besa__cpu_swiglu_run, (float *z, const float *gate, const float *up, int64_t n), (z, gate, up, n))

/* silu'(x) = s (1 + x (1 - s)), s = sigmoid(x) */
BESA__INLINE void besa__cpu_swiglu_back_run_body(float *dgate, float *dup, const float *dz, const float *gate,
                                                 const float *up, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float x = gate[i], s = besa__sigmoid(x), u = up[i], d = dz[i];
        dgate[i] = d * u * s * (1.0f + x * (1.0f - s));
        dup[i] = d * x * s;
    }
}
BESA__KERNEL(besa__cpu_swiglu_back_run,
             (float *dgate, float *dup, const float *dz, const float *gate, const float *up, int64_t n),
             (dgate, dup, dz, gate, up, n))

/* A gate's kernel over runs of elements, a task each */
static besa_result besa__cpu_gate(besa_backend *be, void (*run)(float *, const float *, const float *, int64_t), void *z,
                                  const void *gate, const void *up, int64_t n)
{
    int64_t grain = 16384, tasks = besa__parts(n, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * grain;
        run((float *)z + at, (const float *)gate + at, (const float *)up + at, besa__min(grain, n - at));
    }
    return BESA_OK;
}

static besa_result besa__cpu_gate_back(besa_backend *be,
                                       void (*run)(float *, float *, const float *, const float *, const float *, int64_t),
                                       void *dgate, void *dup, const void *dz, const void *gate, const void *up, int64_t n)
{
    int64_t grain = 16384, tasks = besa__parts(n, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * grain;
        run((float *)dgate + at, (float *)dup + at, (const float *)dz + at, (const float *)gate + at, (const float *)up + at,
            besa__min(grain, n - at));
    }
    return BESA_OK;
}

/* Z(n) = silu(G) U */
static besa_result besa__cpu_swiglu_forward(besa_backend *be, void *z, const void *gate, const void *up, int64_t n)
{
    return besa__cpu_gate(be, besa__cpu_swiglu_run, z, gate, up, n);
}

/* dG = dZ U silu'(G), dU = dZ silu(G) */
static besa_result besa__cpu_swiglu_backward(besa_backend *be, void *dgate, void *dup, const void *dz, const void *gate,
                                             const void *up, int64_t n)
{
    return besa__cpu_gate_back(be, besa__cpu_swiglu_back_run, dgate, dup, dz, gate, up, n);
}

/* z = gelu(gate) up */
BESA__INLINE void besa__cpu_geglu_run_body(float *z, const float *gate, const float *up, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) z[i] = gate[i] * besa__sigmoid(gate[i] * besa__gelu_slope(gate[i])) * up[i];
}
BESA__KERNEL(besa__cpu_geglu_run, (float *z, const float *gate, const float *up, int64_t n), (z, gate, up, n))

/* gelu'(x) = s + x s (1 - s) u', gelu(x) = x s, s = sigmoid(u(x)) */
BESA__INLINE void besa__cpu_geglu_back_run_body(float *dgate, float *dup, const float *dz, const float *gate,
                                                const float *up, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float x = gate[i], s = besa__sigmoid(x * besa__gelu_slope(x)), u = up[i], d = dz[i];
        dgate[i] = d * u * s * (1.0f + x * besa__gelu_steepness(x) * (1.0f - s));
        dup[i] = d * x * s;
    }
}
BESA__KERNEL(besa__cpu_geglu_back_run,
             (float *dgate, float *dup, const float *dz, const float *gate, const float *up, int64_t n),
             (dgate, dup, dz, gate, up, n))

/* Z(n) = gelu(G) U */
static besa_result besa__cpu_geglu_forward(besa_backend *be, void *z, const void *gate, const void *up, int64_t n)
{
    return besa__cpu_gate(be, besa__cpu_geglu_run, z, gate, up, n);
}

/* dG = dZ U gelu'(G), dU = dZ gelu(G) */
static besa_result besa__cpu_geglu_backward(besa_backend *be, void *dgate, void *dup, const void *dz, const void *gate,
                                            const void *up, int64_t n)
{
    return besa__cpu_gate_back(be, besa__cpu_geglu_back_run, dgate, dup, dz, gate, up, n);
}

/* y = x + scale z */
BESA__INLINE void besa__cpu_residual_run_body(float *y, const float *x, const float *z, float scale, int64_t n)
{
    if (x) {
        BESA__ELEMENTWISE
        for (int64_t i = 0; i < n; i++) y[i] = x[i] + scale * z[i];
    } else {
        BESA__ELEMENTWISE
        for (int64_t i = 0; i < n; i++) y[i] = scale * z[i];
    }
}
BESA__KERNEL(besa__cpu_residual_run, (float *y, const float *x, const float *z, float scale, int64_t n), (y, x, z, scale, n))

/* Y(n) = X + scale Z, X NULL: 0 */
static besa_result besa__cpu_residual(besa_backend *be, void *y, const void *x, const void *z, float scale, int64_t n)
{
    int64_t grain = 16384, tasks = besa__parts(n, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * grain;
        besa__cpu_residual_run((float *)y + at, x ? (const float *)x + at : NULL, (const float *)z + at, scale,
                               besa__min(grain, n - at));
    }
    return BESA_OK;
}

/* y(n) = scale y; where cap is not 0, cap tanh(scale y / cap) */
static besa_result besa__cpu_softcap(besa_backend *be, float *y, float scale, float cap, int64_t n)
{
    int64_t grain = 16384, tasks = besa__parts(n, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * grain, count = besa__min(grain, n - at);
        if (cap != 0.0f) besa__cpu_softcap_run(y + at, scale, cap, count);
        else besa__cpu_scale(y + at, scale, count);
    }
    return BESA_OK;
}

/* ---- statistics and loss ------------------------------------------------------------------- */

/* acc += x^2 */
BESA__INLINE void besa__cpu_add_squares_body(float *acc, const float *x, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) acc[i] += x[i] * x[i];
}
BESA__KERNEL(besa__cpu_add_squares, (float *acc, const float *x, int64_t n), (acc, x, n))

enum { BESA__CPU_SUM_PARTS = 32, BESA__CPU_LOSS_ROWS = 16, BESA__CPU_STEP_RUN = 8192 }; /* the last: elements of a task */

/* Partial sums (parts, d) over runs of rows */
static float *besa__cpu_column_sumsq_place(besa__arena *work, int64_t tokens, int64_t d)
{
    return besa__take_floats(work, besa__product(besa__min(BESA__CPU_SUM_PARTS, tokens), d));
}

/* out(d) += column sums of X(T,d)^2 */
static besa_result besa__cpu_column_sumsq(besa_backend *be, float *out, const void *x, int64_t tokens, int64_t d)
{
    int64_t run = besa__max(besa__parts(tokens, BESA__CPU_SUM_PARTS), 1);
    int64_t tasks = besa__parts(tokens, run);
    besa__arena work = besa__cpu_work(be);
    float *part = besa__cpu_column_sumsq_place(&work, tokens, d);
    BESA__CPU_FITS(be, work);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        memset(part + task * d, 0, (size_t)d * sizeof *part);
        for (int64_t t = task * run; t < besa__min(tokens, (task + 1) * run); t++)
            besa__cpu_add_squares(part + task * d, (const float *)x + t * d, d);
    }
    for (int64_t task = 0; task < tasks; task++) besa__cpu_axpy(out, 1.0f, part + task * d, d);
    return BESA_OK;
}

/* acc += factor x y */
BESA__INLINE void besa__cpu_add_products_body(float *acc, const float *x, const float *y, float factor, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) acc[i] += factor * x[i] * y[i];
}
BESA__KERNEL(besa__cpu_add_products, (float *acc, const float *x, const float *y, float factor, int64_t n),
             (acc, x, y, factor, n))

/* out(d) += column sums of dY(N,d), or of dY X inv_rms(N) */
static besa_result besa__cpu_column_sum(besa_backend *be, float *out, const void *dy, const void *x, const float *inv_rms,
                                        int64_t n, int64_t d)
{
    int64_t run = besa__max(besa__parts(n, BESA__CPU_SUM_PARTS), 1), tasks = besa__parts(n, run);
    const float *a = (const float *)dy, *b = (const float *)x;
    besa__arena work = besa__cpu_work(be);
    float *part = besa__cpu_column_sumsq_place(&work, n, d);
    BESA__CPU_FITS(be, work);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        float *sum = part + task * d;
        memset(sum, 0, (size_t)d * sizeof *sum);
        for (int64_t i = task * run; i < besa__min(n, (task + 1) * run); i++)
            if (b) besa__cpu_add_products(sum, a + i * d, b + i * d, inv_rms[i], d);
            else besa__cpu_axpy(sum, 1.0f, a + i * d, d);
    }
    for (int64_t task = 0; task < tasks; task++) besa__cpu_axpy(out, 1.0f, part + task * d, d);
    return BESA_OK;
}

/* sum w (a - b)^2 */
BESA__INLINE float besa__cpu_loss_row_body(const float *a, const float *b, const float *w, int64_t d)
{
#define BESA__TERM(i) (w[i] * ((a[i] - b[i]) * (a[i] - b[i])))
    BESA__SUM_BODY(d, BESA__TERM)
#undef BESA__TERM
}
BESA__KERNEL_FLOAT(besa__cpu_loss_row, (const float *a, const float *b, const float *w, int64_t d), (a, b, w, d))

/* dy = factor w (a - b) [+ dy] */
BESA__INLINE void besa__cpu_loss_back_row_body(float *dy, const float *a, const float *b, const float *w, float factor,
                                               int64_t d, int accumulate)
{
    BESA__ELEMENTWISE
    for (int64_t c = 0; c < d; c++) {
        float g = factor * w[c] * (a[c] - b[c]);
        dy[c] = accumulate ? dy[c] + g : g;
    }
}
BESA__KERNEL(besa__cpu_loss_back_row,
             (float *dy, const float *a, const float *b, const float *w, float factor, int64_t d, int accumulate),
             (dy, a, b, w, factor, d, accumulate))

/* weight(d) = 1 / sumsq, or 0, and the partial sums of runs of rows */
static void besa__cpu_block_loss_place(besa__arena *work, float **weight, double **part, int64_t tokens, int64_t d)
{
    *weight = besa__take_floats(work, d);
    *part = (double *)besa__take_array(work, besa__parts(tokens, BESA__CPU_LOSS_ROWS), sizeof **part);
}

/* loss(1) += scale / d * sum_{t,c} (Yref - Y)^2 / sumsq_c; dY = 2 scale / d * (Y - Yref) / sumsq_c */
static besa_result besa__cpu_block_loss(besa_backend *be, float *loss, void *dy, const void *y, const void *yref,
                                        const float *sumsq, float scale, int64_t tokens, int64_t d, int accumulate)
{
    int64_t grain = BESA__CPU_LOSS_ROWS, tasks = besa__parts(tokens, grain);
    besa__arena work = besa__cpu_work(be);
    float *weight;
    double *part, sum = 0.0;
    besa__cpu_block_loss_place(&work, &weight, &part, tokens, d);
    BESA__CPU_FITS(be, work);
    for (int64_t c = 0; c < d; c++) weight[c] = sumsq[c] > 0.0f ? 1.0f / sumsq[c] : 0.0f;
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        part[task] = 0.0;
        for (int64_t t = task * grain; t < besa__min(tokens, (task + 1) * grain); t++) {
            const float *a = (const float *)y + t * d, *b = (const float *)yref + t * d;
            part[task] += (double)besa__cpu_loss_row(a, b, weight, d);
            if (dy) besa__cpu_loss_back_row((float *)dy + t * d, a, b, weight, 2.0f * scale / (float)d, d, accumulate);
        }
    }
    for (int64_t task = 0; task < tasks; task++) sum += part[task];
    *loss += (float)((double)scale / (double)d * sum);
    return BESA_OK;
}

/* ---- head ---------------------------------------------------------------------------------- */

/* state (3) = max, sum of exp(. - max), logit of the target, with `count` more logits */
static void besa__cpu_nll_row(float *state, const float *logits, int64_t target, int64_t count, int first)
{
    float largest = besa__cpu_row_max(logits, count);
    double sum = 0.0;
    if (first) state[0] = largest, state[1] = state[2] = 0.0f;
    if (largest > state[0]) {
        state[1] *= expf(state[0] - largest);
        state[0] = largest;
    }
    for (int64_t i = 0; i < count; i += 4096)
        sum += (double)besa__cpu_sum_exp(logits + i, state[0], besa__min(4096, count - i));
    state[1] = (float)((double)state[1] + sum);
    if (target >= 0 && target < count) state[2] = logits[target];
}

/* state(T,3) with logits(T,count) of ids first_id .. */
static besa_result besa__cpu_nll_update(besa_backend *be, float *state, const float *logits, const int32_t *target,
                                        int64_t first_id, int64_t count, int64_t tokens, int first)
{
    int64_t grain = besa__cpu_grain(count), tasks = besa__parts(tokens, grain);
    if (count < 1) return BESA_OK;
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t t = task * grain; t < besa__min(tokens, (task + 1) * grain); t++)
            besa__cpu_nll_row(state + 3 * t, logits + t * count, target[t] < 0 ? -1 : target[t] - first_id, count,
                              first);
    return BESA_OK;
}

/* sum(windows) = over the window's tokens with a target of max + log(sum) - logit */
static besa_result besa__cpu_nll_sum(besa_backend *be, double *sum, const float *state, const int32_t *target,
                                     int64_t windows, int64_t seqlen)
{
    BESA__PARALLEL_FOR(besa__cpu_team(be, windows))
    for (int64_t w = 0; w < windows; w++) {
        double total = 0.0;
        for (int64_t t = w * seqlen; t < (w + 1) * seqlen; t++)
            if (target[t] >= 0)
                total += (double)state[3 * t] + log((double)state[3 * t + 1]) - (double)state[3 * t + 2];
        sum[w] = total;
    }
    return BESA_OK;
}

/* The first id of the largest, of x(count) from first_id on. */
static int32_t besa__cpu_first_of(const float *x, float largest, int64_t first_id, int64_t count)
{
    int64_t i = 0;
    while (i + 1 < count && x[i] != largest) i++;
    return (int32_t)(first_id + i);
}

/* state (4) and best (2) of one position with `count` more logits of both models */
static void besa__cpu_divergence_row(float *state, int32_t *best, const float *p, const float *q, int64_t first_id,
                                     int64_t count, int first)
{
    float largest = besa__cpu_row_max(p, count), other = besa__cpu_row_max(q, count);
    double sum = 0.0, by = 0.0;
    if (first || largest > state[0]) best[0] = besa__cpu_first_of(p, largest, first_id, count);
    if (first || other > state[3]) best[1] = besa__cpu_first_of(q, other, first_id, count);
    if (first || other > state[3]) state[3] = other;
    if (first) state[0] = largest, state[1] = state[2] = 0.0f;
    if (largest > state[0]) {
        float factor = expf(state[0] - largest);
        state[1] *= factor;
        state[2] *= factor;
        state[0] = largest;
    }
    for (int64_t i = 0; i < count; i += 4096) {
        int64_t n = besa__min(4096, count - i);
        sum += (double)besa__cpu_sum_exp(p + i, state[0], n);
        by += (double)besa__cpu_sum_exp_by(p + i, q + i, state[0], n);
    }
    state[1] = (float)((double)state[1] + sum);
    state[2] = (float)((double)state[2] + by);
}

/* state(T,4), best(T,2) with P and Q(T,count) of ids first_id .. */
static besa_result besa__cpu_divergence_update(besa_backend *be, float *state, int32_t *best, const float *p, const float *q,
                                               int64_t first_id, int64_t count, int64_t tokens, int first)
{
    int64_t grain = besa__cpu_grain(count), tasks = besa__parts(tokens, grain);
    if (count < 1) return BESA_OK;
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t t = task * grain; t < besa__min(tokens, (task + 1) * grain); t++)
            besa__cpu_divergence_row(state + 4 * t, best + 2 * t, p + t * count, q + t * count, first_id, count, first);
    return BESA_OK;
}

/* ============================================================================================
 * // >>cpu-scores            scores, zeros and ranks on the CPU
 * ============================================================================================
 * Formulas stand beside the table of operations. Ranks have 16 bits, 32 above 65536 columns. Sums over rows that go to one
 * number are cut into parts whose number depends on the sizes alone, and added in order. */

/* ---- scores and zeros ---------------------------------------------------------------------- */

/* s = |w|^power scale, -1 where w is 0; scale NULL: 1; s may be w */
BESA__INLINE void besa__cpu_score_run_body(float *s, const float *w, const float *scale, int power, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t j = 0; j < n; j++) {
        float magnitude = w[j] < 0.0f ? -w[j] : w[j];
        float value = (power == 2 ? magnitude * magnitude : magnitude) * (scale ? scale[j] : 1.0f);
        s[j] = w[j] == 0.0f ? -1.0f : value;
    }
}
BESA__KERNEL(besa__cpu_score_run, (float *s, const float *w, const float *scale, int power, int64_t n),
             (s, w, scale, power, n))

/* S(R,C) = |W|^power scale(C) */
static besa_result besa__cpu_score(besa_backend *be, float *s, const void *w, besa_dtype dtype, const float *scale,
                                   int power, int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++)
            for (int64_t j = 0; j < columns; j += 512) {
                float part[512];
                int64_t n = besa__min(512, columns - j);
                besa__cpu_widen(part, w, dtype, r * columns + j, n);
                besa__cpu_score_run(s + r * columns + j, part, scale ? scale + j : NULL, power, n);
            }
    return BESA_OK;
}

BESA__INLINE void besa__cpu_score_scale_run_body(float *s, const float *g, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) s[i] = s[i] > 0.0f ? s[i] * g[i] : s[i];
}
BESA__KERNEL(besa__cpu_score_scale_run, (float *s, const float *g, int64_t n), (s, g, n))

/* kernel(y, x, count) over runs of y(n) and x(n), a task each */
static besa_result besa__cpu_by_runs(besa_backend *be, void (*kernel)(float *, const float *, int64_t), float *y, const float *x,
                                     int64_t n)
{
    int64_t tasks = besa__parts(n, BESA__CPU_STEP_RUN);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * BESA__CPU_STEP_RUN;
        kernel(y + at, x + at, besa__min(BESA__CPU_STEP_RUN, n - at));
    }
    return BESA_OK;
}

/* S(n) = S G where S is above 0 */
static besa_result besa__cpu_score_scale(besa_backend *be, float *s, const float *g, int64_t n)
{
    return besa__cpu_by_runs(be, besa__cpu_score_scale_run, s, g, n);
}

/* y(n) += x(n)^2 */
static besa_result besa__cpu_accumulate_squares(besa_backend *be, float *y, const float *x, int64_t n)
{
    return besa__cpu_by_runs(be, besa__cpu_add_squares, y, x, n);
}

/* sums(C) of the columns of |W|(R,C): a run of columns a task, its rows in their order */
static besa_result besa__cpu_absolute_sums(besa_backend *be, float *sums, const void *w, besa_dtype dtype, int64_t rows,
                                           int64_t columns)
{
    int64_t tasks = besa__parts(columns, 128);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        double sum[128] = {0};
        float part[128];
        int64_t j = 128 * task, n = besa__min(128, columns - j);
        for (int64_t r = 0; r < rows; r++) {
            besa__cpu_widen(part, w, dtype, r * columns + j, n);
            for (int64_t k = 0; k < n; k++) sum[k] += fabs((double)part[k]);
        }
        for (int64_t k = 0; k < n; k++) sums[j + k] = (float)sum[k];
    }
    return BESA_OK;
}

/* S(R,C) = S (1 / sum_j |W_rj| + 1 / sums_j) where S is above 0 */
static besa_result besa__cpu_score_relative(besa_backend *be, float *s, const void *w, besa_dtype dtype, const float *sums,
                                            int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            double sum = 0;
            for (int64_t j = 0; j < columns; j += 512) {
                float part[512];
                int64_t n = besa__min(512, columns - j);
                besa__cpu_widen(part, w, dtype, r * columns + j, n);
                for (int64_t k = 0; k < n; k++) sum += fabs((double)part[k]);
            }
            float *row = s + r * columns, share = 1.0f / (float)sum;
            for (int64_t j = 0; j < columns; j++) row[j] = row[j] > 0.0f ? row[j] * (share + 1.0f / sums[j]) : row[j];
        }
    return BESA_OK;
}

/* sum += what a score adds to its row's, -1 of a weight that is 0 left out; the number of scores above the limit */
static int32_t besa__cpu_score_rows_run(double *sum, const float *s, float limit, int64_t n)
{
    int32_t above = 0;
    for (int64_t j = 0; j < n; j++) {
        *sum += s[j] < 0.0f ? 0.0 : (double)s[j];
        above += s[j] > limit;
    }
    return above;
}

/* sums(R) and above(R) of S(R,C) = |W| scale(C) */
static besa_result besa__cpu_score_rows(besa_backend *be, double *sums, int32_t *above, const void *w, besa_dtype dtype,
                                        const float *scale, float limit, int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            double sum = 0;
            int32_t count = 0;
            for (int64_t j = 0; j < columns; j += 512) {
                float part[512];
                int64_t n = besa__min(512, columns - j);
                besa__cpu_widen(part, w, dtype, r * columns + j, n);
                besa__cpu_score_run(part, part, scale + j, 1, n);
                count += besa__cpu_score_rows_run(&sum, part, limit, n);
            }
            if (sums) sums[r] = sum;
            if (above) above[r] = count;
        }
    return BESA_OK;
}

/* y(n) = x(n)^exponent */
static besa_result besa__cpu_power(besa_backend *be, float *y, const float *x, float exponent, int64_t n)
{
    int64_t tasks = besa__parts(n, BESA__CPU_STEP_RUN);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * BESA__CPU_STEP_RUN, end = besa__min(n, at + BESA__CPU_STEP_RUN);
        for (int64_t i = at; i < end; i++) y[i] = powf(x[i], exponent);
    }
    return BESA_OK;
}

/* y(n) = value */
static besa_result besa__cpu_fill(besa_backend *be, int32_t *y, int32_t value, int64_t n)
{
    (void)be;
    for (int64_t i = 0; i < n; i++) y[i] = value;
    return BESA_OK;
}

/* counts (2) += elements that are +0 or -0, that are infinite or NaN; `exponent` has the bits of the exponent set */
#define BESA__CPU_COUNT_KERNEL(name, type)                                                         \
    BESA__INLINE void name##_body(int32_t *counts, const type *w, type exponent, int64_t n)        \
    {                                                                                              \
        int32_t zeros = 0, special = 0;                                                            \
        for (int64_t j = 0; j < n; j++) {                                                          \
            zeros += (type)(w[j] << 1) == 0;                                                       \
            special += (type)(w[j] & exponent) == exponent;                                        \
        }                                                                                          \
        counts[0] += zeros, counts[1] += special;                                                  \
    }                                                                                              \
    BESA__KERNEL(name, (int32_t *counts, const type *w, type exponent, int64_t n), (counts, w, exponent, n))
BESA__CPU_COUNT_KERNEL(besa__cpu_count_run16, uint16_t)
BESA__CPU_COUNT_KERNEL(besa__cpu_count_run32, uint32_t)

static int32_t *besa__cpu_count_zeros_place(besa__arena *work, int64_t rows)
{
    return (int32_t *)besa__take_array(work, rows, sizeof(int32_t));
}

/* zeros(R); not_finite(1) += */
static besa_result besa__cpu_count_zeros(besa_backend *be, int32_t *zeros, int32_t *not_finite, const void *w,
                                         besa_dtype dtype, int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain);
    besa__arena work = besa__cpu_work(be);
    int32_t *special = besa__cpu_count_zeros_place(&work, rows);
    BESA__CPU_FITS(be, work);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            const void *row = besa__at_const(w, dtype, r * columns);
            int32_t counts[2] = {0, 0};
            if (dtype == BESA_F32) besa__cpu_count_run32(counts, (const uint32_t *)row, 0x7F800000u, columns);
            else besa__cpu_count_run16(counts, (const uint16_t *)row, dtype == BESA_BF16 ? 0x7F80u : 0x7C00u, columns);
            zeros[r] = counts[0];
            special[r] = counts[1];
        }
    int64_t sum = *not_finite;
    for (int64_t r = 0; r < rows; r++) sum += special[r];
    *not_finite = (int32_t)besa__min(sum, INT32_MAX);
    return BESA_OK;
}

/* ---- ranks --------------------------------------------------------------------------------- */

/* Keys in the order of the numbers: negative ones are complemented, -0 becomes +0. */
BESA__INLINE void besa__cpu_keys_body(uint32_t *key, const float *s, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        uint32_t u = besa__float_bits(s[j] + 0.0f);
        key[j] = u ^ ((uint32_t)((int32_t)u >> 31) | 0x80000000u);
    }
}
BESA__KERNEL(besa__cpu_keys, (uint32_t *key, const float *s, int64_t n), (key, s, n))

/* A thread's arrays for sorting a row: keys and positions, (C) each, twice */
typedef struct besa__cpu_sort {
    uint32_t *key[2], *position[2];
} besa__cpu_sort;

static void besa__cpu_sort_place(besa__arena *work, besa__cpu_sort *sort, int64_t columns)
{
    for (int i = 0; i < 2; i++) {
        sort->key[i] = (uint32_t *)besa__take_array(work, columns, sizeof(uint32_t));
        sort->position[i] = (uint32_t *)besa__take_array(work, columns, sizeof(uint32_t));
    }
}

/* Stable radix sort of key[0], byte by byte from the lowest; returns the positions in ascending order. */
static const uint32_t *besa__cpu_sort_row(besa__cpu_sort *sort, int64_t columns)
{
    uint32_t count[4][256];
    int now = 0;
    memset(count, 0, sizeof count);
    for (int64_t j = 0; j < columns; j++) {
        uint32_t key = sort->key[0][j];
        sort->position[0][j] = (uint32_t)j;
        for (int b = 0; b < 4; b++) count[b][(key >> (8 * b)) & 255u]++;
    }
    for (int b = 0; b < 4; b++) {
        const uint32_t *key = sort->key[now], *position = sort->position[now];
        uint32_t *next_key = sort->key[1 - now], *next_position = sort->position[1 - now], start = 0;
        if (count[b][(key[0] >> (8 * b)) & 255u] == (uint32_t)columns) continue; /* all the same */
        for (int i = 0; i < 256; i++) {
            uint32_t n = count[b][i];
            count[b][i] = start;
            start += n;
        }
        for (int64_t j = 0; j < columns; j++) {
            uint32_t to = count[b][(key[j] >> (8 * b)) & 255u]++;
            next_key[to] = key[j];
            next_position[to] = position[j];
        }
        now = 1 - now;
    }
    return sort->position[now];
}

/* rank(R,C) = position of j in the stable ascending order of row r of S */
static besa_result besa__cpu_rank_rows(besa_backend *be, void *rank, const float *s, int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain);
    besa__arena work = besa__cpu_work(be), one = {NULL, 0};
    besa__cpu_sort sizes;
    besa__cpu_sort_place(&one, &sizes, columns);
    besa__take_parts(&work, &one, besa__cpu_of(be)->threads);
    BESA__CPU_FITS(be, work);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        besa__cpu_sort sort;
        besa__arena mine;
        mine.base = work.base + (size_t)one.used * (size_t)BESA__THREAD_INDEX();
        mine.used = 0;
        besa__cpu_sort_place(&mine, &sort, columns);
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            const uint32_t *order;
            besa__cpu_keys(sort.key[0], s + r * columns, columns);
            order = besa__cpu_sort_row(&sort, columns);
            if (columns > 65536)
                for (int64_t j = 0; j < columns; j++) ((uint32_t *)rank)[r * columns + order[j]] = (uint32_t)j;
            else
                for (int64_t j = 0; j < columns; j++) ((uint16_t *)rank)[r * columns + order[j]] = (uint16_t)j;
        }
    }
    return BESA_OK;
}

/* ============================================================================================
 * // >>cpu-masks             masks and bucketed gradients on the CPU
 * ============================================================================================
 * One pass over the weights each. */

/* what = rank >= n ? w : 0; what may be w */
#define BESA__CPU_MASK_KERNEL(name, weight_type, rank_type)                                        \
    BESA__INLINE void name##_body(weight_type *what, const weight_type *w, const rank_type *rank, rank_type n, \
                                  int64_t columns)                                                 \
    {                                                                                              \
        BESA__ELEMENTWISE                                                                          \
        for (int64_t j = 0; j < columns; j++) what[j] = rank[j] >= n ? w[j] : 0;                   \
    }                                                                                              \
    BESA__KERNEL(name, (weight_type *what, const weight_type *w, const rank_type *rank, rank_type n, int64_t columns), \
                 (what, w, rank, n, columns))
BESA__CPU_MASK_KERNEL(besa__cpu_mask_16_16, uint16_t, uint16_t)
BESA__CPU_MASK_KERNEL(besa__cpu_mask_16_32, uint16_t, uint32_t)
BESA__CPU_MASK_KERNEL(besa__cpu_mask_32_16, uint32_t, uint16_t)
BESA__CPU_MASK_KERNEL(besa__cpu_mask_32_32, uint32_t, uint32_t)

/* one row, weights of any dtype as bits */
static void besa__cpu_mask_row(void *what, const void *w, besa_dtype dtype, const void *rank, int64_t n,
                               int64_t columns)
{
    const uint16_t *rank16 = (const uint16_t *)rank;
    const uint32_t *rank32 = (const uint32_t *)rank;
    if (n >= columns) memset(what, 0, (size_t)columns * besa_dtype_size(dtype));
    else if (dtype == BESA_F32 && columns > 65536)
        besa__cpu_mask_32_32((uint32_t *)what, (const uint32_t *)w, rank32, (uint32_t)n, columns);
    else if (dtype == BESA_F32)
        besa__cpu_mask_32_16((uint32_t *)what, (const uint32_t *)w, rank16, (uint16_t)n, columns);
    else if (columns > 65536)
        besa__cpu_mask_16_32((uint16_t *)what, (const uint16_t *)w, rank32, (uint32_t)n, columns);
    else
        besa__cpu_mask_16_16((uint16_t *)what, (const uint16_t *)w, rank16, (uint16_t)n, columns);
}

/* What = rank >= n[r] ? W : +0; with before(R), which becomes n, only rows where the two differ */
static void besa__cpu_mask_rows(besa_backend *be, void *what, const void *w, besa_dtype dtype, const void *rank,
                                const int32_t *n, int32_t *before, int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            if (before && before[r] == n[r]) continue;
            if (before) before[r] = n[r];
            besa__cpu_mask_row(besa__at(what, dtype, r * columns), besa__at_const(w, dtype, r * columns), dtype,
                               (const unsigned char *)rank + (size_t)(r * columns) * besa__rank_bytes(columns),
                               n[r] > 0 ? n[r] : 0, columns);
        }
}

/* n weights of an unsigned type as wide as they are, all bits but the sign in `magnitude` */
#define BESA__CPU_ZEROS_KERNEL(name, type, magnitude)                                              \
    BESA__INLINE void name##_body(void *what, const void *w, int64_t n)                            \
    {                                                                                              \
        type *y = (type *)what;                                                                    \
        const type *x = (const type *)w;                                                           \
        BESA__ELEMENTWISE                                                                          \
        for (int64_t i = 0; i < n; i++) y[i] = (type)((y[i] & (magnitude)) && (x[i] & (magnitude)) ? x[i] : 0); \
    }                                                                                              \
    BESA__KERNEL(name, (void *what, const void *w, int64_t n), (what, w, n))

BESA__CPU_ZEROS_KERNEL(besa__cpu_zeros_16, uint16_t, 0x7FFFu)
BESA__CPU_ZEROS_KERNEL(besa__cpu_zeros_32, uint32_t, 0x7FFFFFFFu)

static besa_result besa__cpu_mask_zeros(besa_backend *be, void *what, const void *w, besa_dtype dtype, int64_t n)
{
    const int64_t run = 8192;
    int64_t tasks = besa__parts(n, run);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * run, count = besa__min(run, n - at);
        if (dtype == BESA_F32) besa__cpu_zeros_32(besa__at(what, dtype, at), besa__at_const(w, dtype, at), count);
        else besa__cpu_zeros_16(besa__at(what, dtype, at), besa__at_const(w, dtype, at), count);
    }
    return BESA_OK;
}

static besa_result besa__cpu_mask_apply(besa_backend *be, void *what, const void *w, besa_dtype dtype, const void *rank,
                                        const int32_t *n, int64_t rows, int64_t columns)
{
    besa__cpu_mask_rows(be, what, w, dtype, rank, n, NULL, rows, columns);
    return BESA_OK;
}

static besa_result besa__cpu_mask_update(besa_backend *be, void *what, const void *w, besa_dtype dtype, const void *rank,
                                         const int32_t *n, int32_t *before, int64_t rows, int64_t columns)
{
    besa__cpu_mask_rows(be, what, w, dtype, rank, n, before, rows, columns);
    return BESA_OK;
}

/* Radix select: the key that stands at place `place` in the order of all keys, 11 bits at a time from the top, and how
 * many keys are smaller. Each thread counts rows into a histogram of its own; counts are integers, so their sum does
 * not depend on who counted what. */
typedef struct besa__cpu_select {
    void (*keys)(const struct besa__cpu_select *select, uint32_t *key, int64_t row); /* the keys of one row */
    const void *data;                  /* for keys */
    int64_t rows, columns;
    uint32_t *key, *count;             /* (threads, columns), (threads, 2048) */
} besa__cpu_select;

static void besa__cpu_select_place(besa__arena *work, besa__cpu_select *select, int64_t columns, int threads)
{
    select->key = (uint32_t *)besa__take_array(work, besa__product(columns, threads), sizeof(uint32_t));
    select->count = (uint32_t *)besa__take_array(work, (int64_t)threads * 2048, sizeof(uint32_t));
}

/* count(threads, 2048) = keys whose bits above `shift + bits` are those of prefix, by the `bits` bits from shift */
static void besa__cpu_select_count(besa_backend *be, besa__cpu_select *select, uint32_t prefix, int shift, int bits)
{
    int64_t grain = besa__cpu_grain(select->columns), tasks = besa__parts(select->rows, grain);
    memset(select->count, 0, (size_t)besa__cpu_of(be)->threads * 2048 * sizeof(uint32_t));
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        uint32_t *key = select->key + BESA__THREAD_INDEX() * select->columns;
        uint32_t *count = select->count + (int64_t)BESA__THREAD_INDEX() * 2048, digits = (1u << bits) - 1u;
        for (int64_t r = task * grain; r < besa__min(select->rows, (task + 1) * grain); r++) {
            select->keys(select, key, r);
            for (int64_t j = 0; j < select->columns; j++)
                if (shift + bits == 32 || key[j] >> (shift + bits) == prefix >> (shift + bits))
                    count[(key[j] >> shift) & digits]++;
        }
    }
}

static uint32_t besa__cpu_select_run(besa_backend *be, besa__cpu_select *select, int64_t place, int64_t *smaller)
{
    static const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
    uint32_t prefix = 0;
    *smaller = 0;
    for (int pass = 0; pass < 3; pass++) {
        uint32_t digit = 0;
        besa__cpu_select_count(be, select, prefix, shifts[pass], widths[pass]);
        for (;; digit++) {
            int64_t here = 0;
            for (int t = 0; t < besa__cpu_of(be)->threads; t++) here += select->count[(int64_t)t * 2048 + digit];
            if (*smaller + here > place || digit == (1u << widths[pass]) - 1u) break;
            *smaller += here;
        }
        prefix |= digit << shifts[pass];
    }
    return prefix;
}

static void besa__cpu_score_keys(const besa__cpu_select *select, uint32_t *key, int64_t row)
{
    besa__cpu_keys(key, (const float *)select->data + row * select->columns, select->columns);
}

/* the select's arrays and for each row the number of its keys that equal the threshold */
static void besa__cpu_mask_smallest_place(besa__arena *work, besa__cpu_select *select, int64_t **ties, int64_t rows,
                                          int64_t columns, int threads)
{
    besa__cpu_select_place(work, select, columns, threads);
    *ties = (int64_t *)besa__take_array(work, rows, sizeof(int64_t));
}

/* What's bits = W's with those of column j zeroed */
static void besa__cpu_zero_weight(void *what, besa_dtype dtype, int64_t j)
{
    if (dtype == BESA_F32) ((uint32_t *)what)[j] = 0;
    else ((uint16_t *)what)[j] = 0;
}

/* one row: keys below the threshold go, and the first `ties` that equal it */
static void besa__cpu_mask_below(void *what, besa_dtype dtype, const uint32_t *key, uint32_t threshold, int64_t ties,
                                 int64_t columns)
{
    for (int64_t j = 0; j < columns; j++) {
        if (key[j] > threshold || (key[j] == threshold && ties <= 0)) continue;
        if (key[j] == threshold) ties--;
        besa__cpu_zero_weight(what, dtype, j);
    }
}

/* What = W without its `count` smallest scores, ties by position */
static besa_result besa__cpu_mask_smallest(besa_backend *be, void *what, const void *w, besa_dtype dtype,
                                           const float *s, int64_t count, int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain), smaller, *ties, left;
    besa__arena work = besa__cpu_work(be);
    besa__cpu_select select;
    uint32_t threshold;
    if (count <= 0) return besa__cpu_upload(be, BESA_QUEUE_COMPUTE, what, w, (size_t)(rows * columns) * besa_dtype_size(dtype));
    select.keys = besa__cpu_score_keys;
    select.data = s;
    select.rows = rows, select.columns = columns;
    besa__cpu_mask_smallest_place(&work, &select, &ties, rows, columns, besa__cpu_of(be)->threads);
    BESA__CPU_FITS(be, work);
    threshold = besa__cpu_select_run(be, &select, count - 1, &smaller);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        uint32_t *key = select.key + BESA__THREAD_INDEX() * columns;
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            besa__cpu_score_keys(&select, key, r);
            ties[r] = 0;
            for (int64_t j = 0; j < columns; j++) ties[r] += key[j] == threshold;
        }
    }
    left = count - smaller;
    for (int64_t r = 0; r < rows; r++) { /* the ties that may still go when row r begins */
        int64_t here = ties[r];
        ties[r] = left;
        left -= here;
    }
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        uint32_t *key = select.key + BESA__THREAD_INDEX() * columns;
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            void *row = besa__at(what, dtype, r * columns);
            besa__cpu_score_keys(&select, key, r);
            memmove(row, besa__at_const(w, dtype, r * columns), (size_t)columns * besa_dtype_size(dtype));
            besa__cpu_mask_below(row, dtype, key, threshold, ties[r], columns);
        }
    }
    return BESA_OK;
}

/* The place of element j in the stable ascending order of s (m). */
static int besa__cpu_place(const float *s, int m, int j)
{
    int place = 0;
    for (int i = 0; i < m; i++) place += s[i] < s[j] || (i < j && !(s[i] > s[j]));
    return place;
}

/* In every m consecutive columns the n smallest scores are pruned, ties by position */
static besa_result besa__cpu_mask_pattern(besa_backend *be, void *what, const void *w, besa_dtype dtype, const float *s,
                                          int n, int m, int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            void *row = besa__at(what, dtype, r * columns);
            memmove(row, besa__at_const(w, dtype, r * columns), (size_t)columns * besa_dtype_size(dtype));
            for (int64_t j = 0; j + m <= columns; j += m)
                for (int i = 0; i < m; i++)
                    if (besa__cpu_place(s + r * columns + j, m, i) < n) besa__cpu_zero_weight(row, dtype, j + i);
        }
    return BESA_OK;
}

/* ---- bucketed gradient --------------------------------------------------------------------- */

BESA__INLINE void besa__cpu_times_bf16_body(float *y, const float *x, const uint16_t *w, int64_t n)
{
    for (int64_t j = 0; j < n; j++) y[j] = x[j] * besa__bf16_to_f32(w[j]);
}
BESA__KERNEL(besa__cpu_times_bf16, (float *y, const float *x, const uint16_t *w, int64_t n), (y, x, w, n))

BESA__INLINE void besa__cpu_times_f16_body(float *y, const float *x, const uint16_t *w, int64_t n)
{
    for (int64_t j = 0; j < n; j++) y[j] = x[j] * besa__f16_to_f32(w[j]);
}
BESA__KERNEL(besa__cpu_times_f16, (float *y, const float *x, const uint16_t *w, int64_t n), (y, x, w, n))

BESA__INLINE void besa__cpu_times_f32_body(float *y, const float *x, const float *w, int64_t n)
{
    for (int64_t j = 0; j < n; j++) y[j] = x[j] * w[j];
}
BESA__KERNEL(besa__cpu_times_f32, (float *y, const float *x, const float *w, int64_t n), (y, x, w, n))

/* y (n) += sum over i of x (rows, n) */
BESA__INLINE void besa__cpu_add_rows_body(float *y, const float *x, int64_t rows, int64_t n)
{
    int64_t j = 0;
    for (; j + BESA__LANES <= n; j += BESA__LANES) {
        float lane[BESA__LANES];
        for (int l = 0; l < BESA__LANES; l++) lane[l] = 0.0f;
        for (int64_t i = 0; i < rows; i++)
            for (int l = 0; l < BESA__LANES; l++) lane[l] += x[i * n + j + l];
        for (int l = 0; l < BESA__LANES; l++) y[j + l] += lane[l];
    }
    for (int64_t i = 0; i < rows && j < n; i++) {
        BESA__ELEMENTWISE
        for (int64_t k = j; k < n; k++) y[k] += x[i * n + k];
    }
}
BESA__KERNEL(besa__cpu_add_rows, (float *y, const float *x, int64_t rows, int64_t n), (y, x, rows, n))

enum { BESA__CPU_BUCKETS = 65536 }; /* the most */

/* Ranks of a row are all different, so the products of a row can be stored by rank, without reading a sum back: element
 * i of bucket b at (i, b) of a cell array, which is then summed over i. */
typedef struct besa__cpu_cells {
    uint32_t *cell;                    /* (C) of each rank: i * buckets + b */
    uint32_t *fill;                    /* (buckets) how many ranks each bucket has */
    float *value;                      /* per thread: (length, buckets); the cells of no rank stay 0 */
    int64_t length;                    /* of the fullest bucket */
} besa__cpu_cells;

/* Returns the bytes of a thread's value. A bucket has at most ceil(C / buckets) ranks. */
static uint64_t besa__cpu_cells_place(besa__arena *work, besa__cpu_cells *cells, int64_t columns, int64_t buckets)
{
    besa__arena one = {NULL, 0};
    cells->cell = (uint32_t *)besa__take_array(work, columns, sizeof(uint32_t));
    cells->fill = (uint32_t *)besa__take_array(work, buckets, sizeof(uint32_t));
    cells->value = (float *)(void *)(work->base ? work->base + work->used : NULL);
    besa__take_floats(&one, columns + buckets);
    return one.used;
}

static void besa__cpu_cells_set(besa__cpu_cells *cells, const uint16_t *bucket, int64_t columns, int64_t buckets)
{
    cells->length = 0;
    memset(cells->fill, 0, (size_t)buckets * sizeof(uint32_t));
    for (int64_t j = 0; j < columns; j++) {
        int64_t i = cells->fill[bucket[j]]++;
        cells->cell[j] = (uint32_t)(i * buckets + bucket[j]);
        cells->length = besa__max(cells->length, i + 1);
    }
    BESA_ASSERT(cells->length * buckets <= columns + buckets);
}

/* value[cell[rank]] = g; n elements from `at` of the ranks */
static void besa__cpu_cells_store(float *value, const uint32_t *cell, const float *g, const void *rank, int64_t at,
                                  int64_t n, int64_t columns)
{
    const uint16_t *rank16 = (const uint16_t *)rank + at;
    const uint32_t *rank32 = (const uint32_t *)rank + at;
    if (columns > 65536)
        for (int64_t j = 0; j < n; j++) value[cell[rank32[j]]] = g[j];
    else
        for (int64_t j = 0; j < n; j++) value[cell[rank16[j]]] = g[j];
}

/* Asks for `bytes` bytes that will be read about 1024 elements later. */
static inline void besa__cpu_ahead(const void *p, int64_t size, int64_t bytes)
{
#if defined(__GNUC__)
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch((const void *)((uintptr_t)p + (uintptr_t)(1024 * size + b)));
#else
    (void)p, (void)size, (void)bytes;
#endif
}

/* sums(R,D)[r, bucket[rank[r,j]]] += dW[r,j] W[r,j] */
static besa_result besa__cpu_bucket_gradient(besa_backend *be, float *sums, const void *gradient, besa_dtype dw_dtype,
                                             const void *w, besa_dtype dtype, const void *rank, const uint16_t *bucket,
                                             int64_t rows, int64_t columns, int64_t buckets)
{
    const float *dw = (const float *)gradient;
    (void)dw_dtype;                             /* float */
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain);
    int64_t width = (int64_t)besa_dtype_size(dtype), rank_width = (int64_t)besa__rank_bytes(columns);
    besa__arena work = besa__cpu_work(be);
    besa__cpu_cells cells;
    size_t stride = (size_t)besa__cpu_cells_place(&work, &cells, columns, buckets);
    work.used += (uint64_t)stride * (uint64_t)besa__cpu_of(be)->threads;
    BESA__CPU_FITS(be, work);
    besa__cpu_cells_set(&cells, bucket, columns, buckets);
    memset(cells.value, 0, stride * (size_t)besa__cpu_of(be)->threads);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        float *value = cells.value + (size_t)BESA__THREAD_INDEX() * (stride / sizeof(float));
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            for (int64_t j = 0; j < columns; j += 512) {
                float g[512];
                int64_t at = r * columns + j, n = besa__min(512, columns - j);
                const void *part = besa__at_const(w, dtype, at);
                if (dtype == BESA_BF16) besa__cpu_times_bf16(g, dw + at, (const uint16_t *)part, n);
                else if (dtype == BESA_F16) besa__cpu_times_f16(g, dw + at, (const uint16_t *)part, n);
                else besa__cpu_times_f32(g, dw + at, (const float *)part, n);
                for (int64_t k = 0; k < n; k += 32) { /* the stores take longer than the reading, if that goes on meanwhile */
                    besa__cpu_ahead(dw + at + k, 4, 128);
                    besa__cpu_ahead(besa__at_const(part, dtype, k), width, 32 * width);
                    besa__cpu_ahead((const unsigned char *)rank + (at + k) * rank_width, rank_width, 32 * rank_width);
                    besa__cpu_cells_store(value, cells.cell, g + k, rank, at + k, besa__min(32, n - k), columns);
                }
            }
            besa__cpu_add_rows(sums + r * buckets, value, cells.length, buckets);
        }
    }
    return BESA_OK;
}

/* ============================================================================================
 * // >>cpu-rates             rates, optimiser and exact count on the CPU
 * ============================================================================================
 * A few numbers a row: sums in double, cut by size. */

/* z = base + scale u(theta), u(x) = sigmoid(x) - 1/2, or x where plain is set */
BESA__INLINE void besa__cpu_logits_run_body(float *z, const float *base, const float *theta, float scale, int plain,
                                            int64_t n)
{
    if (plain) {
        BESA__ELEMENTWISE
        for (int64_t d = 0; d < n; d++) z[d] = base[d] + scale * theta[d];
    } else {
        BESA__ELEMENTWISE
        for (int64_t d = 0; d < n; d++) z[d] = base[d] + scale * (besa__sigmoid(theta[d]) - 0.5f);
    }
}
BESA__KERNEL(besa__cpu_logits_run,
             (float *z, const float *base, const float *theta, float scale, int plain, int64_t n),
             (z, base, theta, scale, plain, n))

/* dtheta = dz scale u'(theta) */
BESA__INLINE void besa__cpu_logits_back_body(float *dtheta, const float *dz, const float *theta, float scale, int plain,
                                             int64_t n)
{
    if (plain) {
        BESA__ELEMENTWISE
        for (int64_t d = 0; d < n; d++) dtheta[d] = dz[d] * scale;
    } else {
        BESA__ELEMENTWISE
        for (int64_t d = 0; d < n; d++) {
            float u = besa__sigmoid(theta[d]);
            dtheta[d] = dz[d] * scale * (u * (1.0f - u));
        }
    }
}
BESA__KERNEL(besa__cpu_logits_back,
             (float *dtheta, const float *dz, const float *theta, float scale, int plain, int64_t n),
             (dtheta, dz, theta, scale, plain, n))

/* sums (2) = sum x, sum x y in double */
BESA__INLINE void besa__cpu_moments_body(double *sums, const float *x, const float *y, int64_t n)
{
    double a[8], b[8];
    int64_t i = 0;
    for (int l = 0; l < 8; l++) a[l] = b[l] = 0.0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) {
            a[l] += (double)x[i + l];
            b[l] += (double)x[i + l] * (double)y[i + l];
        }
    for (; i < n; i++) {
        a[i % 8] += (double)x[i];
        b[i % 8] += (double)x[i] * (double)y[i];
    }
    sums[0] = ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
    sums[1] = ((b[0] + b[1]) + (b[2] + b[3])) + ((b[4] + b[5]) + (b[6] + b[7]));
}
BESA__KERNEL(besa__cpu_moments, (double *sums, const float *x, const float *y, int64_t n), (sums, x, y, n))

/* dz = (dbeta - mean) beta */
BESA__INLINE void besa__cpu_beta_back_body(float *dz, const float *dbeta, const float *beta, float mean, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t d = 0; d < n; d++) dz[d] = (dbeta[d] - mean) * beta[d];
}
BESA__KERNEL(besa__cpu_beta_back, (float *dz, const float *dbeta, const float *beta, float mean, int64_t n),
             (dz, dbeta, beta, mean, n))

/* p(D+1) candidates and base(D+1) = c p + s_L u(theta_L): shared; then per thread */
typedef struct besa__cpu_rates {
    float *p, *base;
    float *part;                       /* backward: sums of dz over runs of groups, (parts, D+1) */
    float *beta, *dbeta;               /* (D+1) of a thread */
} besa__cpu_rates;

/* Runs of groups whose dz are summed on their own: fewer the more candidates there are. */
static int64_t besa__cpu_rate_parts(int64_t groups, int64_t candidates)
{
    int64_t most = besa__max(1, besa__min(64, BESA__CPU_BUCKETS / candidates));
    return besa__min(groups, most);
}

static uint64_t besa__cpu_rates_place(besa__arena *work, besa__cpu_rates *rates, int64_t candidates, int64_t parts)
{
    besa__arena one = {NULL, 0};
    rates->p = besa__take_floats(work, candidates);
    rates->base = besa__take_floats(work, candidates);
    rates->part = besa__take_floats(work, besa__product(parts, candidates));
    rates->beta = (float *)(work->base ? work->base + work->used : NULL);
    besa__take_floats(&one, candidates);
    besa__take_floats(&one, candidates);
    return one.used;
}

/* Set p and base; returns the groups. `stride` bytes lie between the threads' arrays from rates->beta on. */
static int64_t besa__cpu_rates_begin(besa_backend *be, besa__cpu_rates *rates, size_t *stride, int64_t parts,
                                     const float *theta_layer, const besa_rate_shape *s)
{
    besa__arena work = besa__cpu_work(be);
    int64_t last = s->logits - 1;
    *stride = (size_t)besa__cpu_rates_place(&work, rates, s->logits, parts);
    work.used += (uint64_t)*stride * (uint64_t)besa__cpu_of(be)->threads;
    BESA__CPU_FITS(be, work);
    for (int64_t d = 0; d <= last; d++) {
        rates->p[d] = last > 0 ? (float)((double)(last - d) / (double)last) : 1.0f;
        rates->base[d] = s->tilt * rates->p[d];
    }
    if (theta_layer)
        besa__cpu_logits_run(rates->base, rates->base, theta_layer, s->layer_scale, s->plain, s->logits);
    return besa__parts(s->rows, s->group_rows);
}

/* This thread's beta and dbeta. */
static besa__cpu_rates besa__cpu_rates_mine(const besa__cpu_rates *rates, size_t stride)
{
    besa__cpu_rates mine = *rates;
    mine.beta = (float *)(void *)((unsigned char *)(void *)rates->beta + stride * (size_t)BESA__THREAD_INDEX());
    mine.dbeta = (float *)(void *)((unsigned char *)(void *)mine.beta + stride / 2);
    return mine;
}

/* beta = softmax(z) of group g; returns alpha = sum beta p */
static double besa__cpu_rates_beta(const besa__cpu_rates *rates, const float *theta_row, int64_t g,
                                   const besa_rate_shape *s)
{
    double sums[2];
    if (theta_row)
        besa__cpu_logits_run(rates->beta, rates->base, theta_row + g * s->logits, s->row_scale, s->plain,
                             s->logits);
    else memcpy(rates->beta, rates->base, (size_t)s->logits * sizeof(float));
    besa__cpu_exp_sum(rates->beta, rates->beta, besa__cpu_row_max(rates->beta, s->logits), s->logits);
    besa__cpu_moments(sums, rates->beta, rates->p, s->logits);
    besa__cpu_scale(rates->beta, (float)(1.0 / sums[0]), s->logits);
    return sums[1] / sums[0];
}

enum { BESA__CPU_GROUPS = 32 }; /* of one task */

/* alpha(R), n(R) = max(floor(alpha units), zeros), the product in float as the published code has it */
static besa_result besa__cpu_rate_forward(besa_backend *be, float *alpha, int32_t *n, const float *theta_layer,
                                          const float *theta_row, const int32_t *zeros, const besa_rate_shape *s)
{
    besa__cpu_rates rates;
    size_t stride;
    int64_t groups = besa__cpu_rates_begin(be, &rates, &stride, 0, s->layer_scale == 0.0f ? NULL : theta_layer, s);
    int64_t tasks = besa__parts(groups, BESA__CPU_GROUPS);
    if (s->row_scale == 0.0f) theta_row = NULL;
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        besa__cpu_rates mine = besa__cpu_rates_mine(&rates, stride);
        for (int64_t g = task * BESA__CPU_GROUPS; g < besa__min(groups, (task + 1) * BESA__CPU_GROUPS); g++) {
            float rate = (float)besa__cpu_rates_beta(&mine, theta_row, g, s), share = floorf(rate * (float)s->units);
            int64_t pruned = share > 0.0f ? besa__min((int64_t)share, s->units) : 0; /* 0 where alpha is NaN */
            for (int64_t r = g * s->group_rows; r < besa__min(s->rows, (g + 1) * s->group_rows); r++) {
                alpha[r] = rate;
                if (n) n[r] = (int32_t)(zeros ? besa__max(pruned, zeros[r]) : pruned);
            }
        }
    }
    return BESA_OK;
}

/* mean(1) [+]= share * sum_r alpha_r / R */
static besa_result besa__cpu_rate_mean(besa_backend *be, float *mean, const float *alpha, float share, int accumulate,
                                       int64_t rows)
{
    double sum = 0.0;
    (void)be;
    for (int64_t r = 0; r < rows; r++) sum += (double)alpha[r];
    *mean = (accumulate ? *mean : 0.0f) + (float)((double)share * sum / (double)rows);
    return BESA_OK;
}

/* mine->dbeta = dL/dz of group g, from dL/dbeta_d = - sum over rows and buckets b >= d of sums[r,b] + slope p_d with
 * slope = slope_of_row times the rows of g */
static void besa__cpu_rate_group_backward(const besa__cpu_rates *mine, const float *sums, const float *theta_row,
                                          int64_t g, double slope_of_row, const besa_rate_shape *s)
{
    int64_t last = s->logits - 1, end = besa__min(s->rows, (g + 1) * s->group_rows);
    double run = 0.0, moments[2], slope = slope_of_row * (double)(end - g * s->group_rows);
    memset(mine->dbeta, 0, (size_t)s->logits * sizeof(float));
    for (int64_t r = g * s->group_rows; r < end; r++) besa__cpu_axpy(mine->dbeta, 1.0f, sums + r * last, last);
    for (int64_t d = last; d >= 0; d--) {
        run += (double)mine->dbeta[d];
        mine->dbeta[d] = (float)(slope * (double)mine->p[d] - run);
    }
    besa__cpu_rates_beta(mine, theta_row, g, s);
    besa__cpu_moments(moments, mine->beta, mine->dbeta, s->logits);
    besa__cpu_beta_back(mine->dbeta, mine->dbeta, mine->beta, (float)(moments[1] / moments[0]), s->logits);
}

/* dtheta_row(G,D+1) and dtheta_layer(D+1), assigned */
static besa_result besa__cpu_rate_backward(besa_backend *be, float *dtheta_layer, float *dtheta_row, const float *sums,
                                           const float *theta_layer, const float *theta_row,
                                           const besa_penalty *penalty, const besa_rate_shape *s)
{
    besa__cpu_rates rates;
    size_t stride;
    int64_t groups = besa__parts(s->rows, s->group_rows), n = s->logits;
    int64_t parts = besa__cpu_rate_parts(groups, n), run = besa__parts(groups, parts);
    double slope = 0.0;
    besa__cpu_rates_begin(be, &rates, &stride, parts, s->layer_scale == 0.0f ? NULL : theta_layer, s);
    if (s->row_scale == 0.0f) theta_row = dtheta_row = NULL;
    if (s->layer_scale == 0.0f) dtheta_layer = NULL;
    if (penalty && penalty->coefficient != 0.0f)
        slope = (double)penalty->coefficient * ((double)*penalty->mean - (double)penalty->target) / (double)s->rows;
    parts = besa__parts(groups, run);
    BESA__PARALLEL_FOR(besa__cpu_team(be, parts))
    for (int64_t part = 0; part < parts; part++) {
        besa__cpu_rates mine = besa__cpu_rates_mine(&rates, stride);
        memset(mine.part + part * n, 0, (size_t)n * sizeof(float));
        for (int64_t g = part * run; g < besa__min(groups, (part + 1) * run); g++) {
            besa__cpu_rate_group_backward(&mine, sums, theta_row, g, slope, s);
            if (dtheta_layer) besa__cpu_axpy(mine.part + part * n, 1.0f, mine.dbeta, n);
            if (dtheta_row)
                besa__cpu_logits_back(dtheta_row + g * n, mine.dbeta, theta_row + g * n, s->row_scale, s->plain, n);
        }
    }
    if (!dtheta_layer) return BESA_OK;
    memset(dtheta_layer, 0, (size_t)n * sizeof(float));
    for (int64_t part = 0; part < parts; part++) besa__cpu_axpy(dtheta_layer, 1.0f, rates.part + part * n, n);
    besa__cpu_logits_back(dtheta_layer, dtheta_layer, theta_layer, s->layer_scale, s->plain, n);
    return BESA_OK;
}

/* ---- optimisers ---------------------------------------------------------------------------- */

/* Prodigy's m, v, s: x = beta x + c g; v with g^2 */
BESA__INLINE void besa__cpu_prodigy_state_body(const besa_optimizer_step *o, int64_t at, int64_t n, float d, float gain)
{
    float *m = o->m + at, *v = o->v + at, *s = o->s + at;
    float b1 = (float)o->beta1, b2 = (float)o->beta2, b3 = (float)o->beta3;
    float c1 = d * (float)(1.0 - o->beta1), c2 = d * d * (float)(1.0 - o->beta2);
    const float *grad = o->grad + at;
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i];
        m[i] = b1 * m[i] + c1 * g;
        v[i] = b2 * v[i] + c2 * g * g;
        s[i] = b3 * s[i] + gain * g;
    }
}
BESA__KERNEL(besa__cpu_prodigy_state, (const besa_optimizer_step *o, int64_t at, int64_t n, float d, float gain),
             (o, at, n, d, gain))

/* sums (2) += <g, theta0 - theta>, sum |s| */
BESA__INLINE void besa__cpu_prodigy_sums_body(double *sums, const besa_optimizer_step *o, int64_t at, int64_t n)
{
    const float *g = o->grad + at, *x0 = o->theta0 + at, *x = o->theta + at, *s = o->s + at;
    double a[8], b[8];
    int64_t i = 0;
    for (int l = 0; l < 8; l++) a[l] = b[l] = 0.0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) {
            a[l] += (double)g[i + l] * (double)(x0[i + l] - x[i + l]);
            b[l] += (double)besa__bits_float(besa__float_bits(s[i + l]) & 0x7FFFFFFFu);
        }
    for (; i < n; i++) {
        a[i % 8] += (double)g[i] * (double)(x0[i] - x[i]);
        b[i % 8] += (double)besa__bits_float(besa__float_bits(s[i]) & 0x7FFFFFFFu);
    }
    for (int l = 0; l < 8; l++) sums[0] += a[l], sums[1] += b[l];
}
BESA__KERNEL(besa__cpu_prodigy_sums, (double *sums, const besa_optimizer_step *o, int64_t at, int64_t n),
             (sums, o, at, n))

/* theta = theta keep - rate m / (sqrt(v) / root + eps) */
BESA__INLINE void besa__cpu_optimizer_move_body(const besa_optimizer_step *o, int64_t at, int64_t n, float keep,
                                                float rate, float root, float eps)
{
    float *x = o->theta + at, *m = o->m + at, *v = o->v + at;
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) x[i] = keep * x[i] - rate * m[i] / (besa__sqrt(v[i]) / root + eps);
}
BESA__KERNEL(besa__cpu_optimizer_move,
             (const besa_optimizer_step *o, int64_t at, int64_t n, float keep, float rate, float root, float eps),
             (o, at, n, keep, rate, root, eps))

/* AdamW's m = beta1 m + (1-beta1) g, v = beta2 v + (1-beta2) g^2 */
BESA__INLINE void besa__cpu_adamw_state_body(const besa_optimizer_step *o, int64_t at, int64_t n)
{
    float *m = o->m + at, *v = o->v + at, b1 = (float)o->beta1, b2 = (float)o->beta2;
    float c1 = (float)(1.0 - o->beta1), c2 = (float)(1.0 - o->beta2);
    const float *grad = o->grad + at;
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i];
        m[i] = b1 * m[i] + c1 * g;
        v[i] = b2 * v[i] + c2 * g * g;
    }
}
BESA__KERNEL(besa__cpu_adamw_state, (const besa_optimizer_step *o, int64_t at, int64_t n), (o, at, n))

enum { BESA__CPU_STEP_PARTS = 1024 };

static double *besa__cpu_optimizer_place(besa__arena *work)
{
    return (double *)besa__take(work, 2 * BESA__CPU_STEP_PARTS * sizeof(double));
}

/* Decoupled weight decay, bias correction: theta = theta (1 - lr decay) - lr / c1 m / (sqrt(v / c2) + eps) */
static besa_result besa__cpu_adamw(besa_backend *be, const besa_optimizer_step *o, int64_t run, int64_t tasks)
{
    double c1 = 1.0 - pow(o->beta1, (double)o->step), c2 = 1.0 - pow(o->beta2, (double)o->step);
    float keep = (float)(1.0 - o->lr * o->weight_decay);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * run, n = besa__min(run, o->n - at);
        besa__cpu_adamw_state(o, at, n);
        besa__cpu_optimizer_move(o, at, n, keep, (float)(o->lr / c1), (float)sqrt(c2), (float)o->eps);
    }
    return BESA_OK;
}

/* One step over n parameters. Prodigy (arXiv 2306.06101) or AdamW; scalars = d, numerator */
static besa_result besa__cpu_optimizer_step(besa_backend *be, const besa_optimizer_step *o)
{
    int64_t run = besa__max(BESA__CPU_STEP_RUN, besa__parts(o->n, BESA__CPU_STEP_PARTS));
    int64_t tasks = besa__parts(o->n, run);
    double sum[2] = {0.0, 0.0}, d, dlr, gain, numerator, estimate, *part;
    besa__arena work = besa__cpu_work(be);
    if (o->kind != BESA_PRODIGY) return besa__cpu_adamw(be, o, run, tasks);
    d = o->scalars[0], dlr = d * o->lr, gain = d / o->d0 * dlr;
    part = besa__cpu_optimizer_place(&work);
    BESA__CPU_FITS(be, work);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * run, n = besa__min(run, o->n - at);
        part[2 * task] = part[2 * task + 1] = 0.0;
        besa__cpu_prodigy_state(o, at, n, (float)d, (float)gain);
        besa__cpu_prodigy_sums(part + 2 * task, o, at, n);
    }
    for (int64_t task = 0; task < tasks; task++) sum[0] += part[2 * task], sum[1] += part[2 * task + 1];
    if (sum[1] == 0.0) return BESA_OK; /* no gradient yet: nothing moves */
    numerator = o->beta3 * o->scalars[1] + gain * sum[0];
    estimate = o->d_coef * numerator / sum[1];
    if (estimate > d) o->scalars[0] = estimate;
    o->scalars[1] = numerator;
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        besa__cpu_optimizer_move(o, task * run, besa__min(run, o->n - task * run),
                                 (float)(1.0 - dlr * o->weight_decay), (float)dlr, 1.0f,
                                 (float)(o->scalars[0] * o->eps));
    return BESA_OK;
}

/* ---- weights that learn -------------------------------------------------------------------- */

/* Weights at .. at + n - 1; type: an unsigned integer as wide as the dtype, all bits but the sign in `magnitude`. */
#define BESA__CPU_WEIGHT_KERNEL(name, type, round, magnitude)                                      \
    BESA__INLINE void name##_body(const besa_weight_step *o, int64_t at, int64_t n, float rate, float root) \
    {                                                                                              \
        float *w = o->w + at, *m = o->m + at, *v = o->v + at, b1 = (float)o->beta1, b2 = (float)o->beta2; \
        float c1 = (float)(1.0 - o->beta1), c2 = (float)(1.0 - o->beta2), eps = (float)o->eps;     \
        type *masked = (type *)o->masked + at, *source = (type *)o->source + at;                   \
        const float *grad = o->grad + at;                                                          \
        BESA__ELEMENTWISE                                                                          \
        for (int64_t i = 0; i < n; i++) {                                                          \
            float g = grad[i], w0 = w[i], m0 = m[i], v0 = v[i];                                    \
            float m1 = b1 * m0 + c1 * g, v1 = b2 * v0 + c2 * g * g;                                \
            float w1 = w0 - rate * m1 / (besa__sqrt(v1) / root + eps);                             \
            type now = (type)round(w1), old = masked[i], unmasked = source[i];                     \
            int kept = ((old & (magnitude)) != 0) & ((now & (magnitude)) != 0);                    \
            m[i] = kept ? m1 : m0;                                                                 \
            v[i] = kept ? v1 : v0;                                                                 \
            masked[i] = kept ? now : old;                                                          \
            w[i] = kept ? w1 : w0;                                                                 \
            if (sizeof(type) == 2) source[i] = kept ? now : unmasked; /* else w itself */          \
        }                                                                                          \
    }                                                                                              \
    BESA__KERNEL(name, (const besa_weight_step *o, int64_t at, int64_t n, float rate, float root), (o, at, n, rate, root))

BESA__CPU_WEIGHT_KERNEL(besa__cpu_weights_f32, uint32_t, besa__float_bits, 0x7FFFFFFFu)
BESA__CPU_WEIGHT_KERNEL(besa__cpu_weights_f16, uint16_t, besa__f32_to_f16, 0x7FFFu)
BESA__CPU_WEIGHT_KERNEL(besa__cpu_weights_bf16, uint16_t, besa__f32_to_bf16, 0x7FFFu)

/* Norms and biases: no masks. */
BESA__INLINE void besa__cpu_vectors_run_body(const besa_weight_step *o, int64_t at, int64_t n, float rate, float root)
{
    float *w = o->w + at, *m = o->m + at, *v = o->v + at, b1 = (float)o->beta1, b2 = (float)o->beta2;
    float c1 = (float)(1.0 - o->beta1), c2 = (float)(1.0 - o->beta2), eps = (float)o->eps;
    const float *grad = o->grad + at;
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i];
        m[i] = b1 * m[i] + c1 * g;
        v[i] = b2 * v[i] + c2 * g * g;
        w[i] -= rate * m[i] / (besa__sqrt(v[i]) / root + eps);
    }
}
BESA__KERNEL(besa__cpu_vectors_run, (const besa_weight_step *o, int64_t at, int64_t n, float rate, float root),
             (o, at, n, rate, root))

static besa_result besa__cpu_weight_step(besa_backend *be, const besa_weight_step *o)
{
    int64_t tasks = besa__parts(o->n, BESA__CPU_STEP_RUN);
    double c1 = 1.0 - pow(o->beta1, (double)o->step), c2 = 1.0 - pow(o->beta2, (double)o->step);
    float rate = (float)(o->lr * (double)*o->rms / c1), root = (float)sqrt(c2);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * BESA__CPU_STEP_RUN, n = besa__min(BESA__CPU_STEP_RUN, o->n - at);
        if (!o->masked) besa__cpu_vectors_run(o, at, n, rate, root);
        else if (o->dtype == BESA_F32) besa__cpu_weights_f32(o, at, n, rate, root);
        else if (o->dtype == BESA_F16) besa__cpu_weights_f16(o, at, n, rate, root);
        else besa__cpu_weights_bf16(o, at, n, rate, root);
    }
    return BESA_OK;
}

static besa_result besa__cpu_rms(besa_backend *be, float *out, const float *w, int64_t n)
{
    double sum = 0.0;
    (void)be;
    for (int64_t at = 0; at < n; at += BESA__CPU_STEP_RUN) {
        int64_t count = besa__min(BESA__CPU_STEP_RUN, n - at);
        sum += (double)besa__cpu_dot(w + at, w + at, count);
    }
    *out = (float)sqrt(sum / (double)n);
    return BESA_OK;
}

BESA__INLINE void besa__cpu_mix_run_body(float *y, const float *x, float share, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) y[i] = (1.0f - share) * y[i] + share * x[i];
}
BESA__KERNEL(besa__cpu_mix_run, (float *y, const float *x, float share, int64_t n), (y, x, share, n))

static besa_result besa__cpu_mix(besa_backend *be, void *y, const void *x, float share, int64_t n)
{
    int64_t tasks = besa__parts(n, BESA__CPU_STEP_RUN);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * BESA__CPU_STEP_RUN;
        besa__cpu_mix_run((float *)y + at, (const float *)x + at, share, besa__min(BESA__CPU_STEP_RUN, n - at));
    }
    return BESA_OK;
}

/* y(n) += value */
BESA__INLINE void besa__cpu_shift_run_body(float *y, float value, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) y[i] += value;
}
BESA__KERNEL(besa__cpu_shift_run, (float *y, float value, int64_t n), (y, value, n))

static besa_result besa__cpu_shift(besa_backend *be, float *y, float value, int64_t n)
{
    (void)be;
    besa__cpu_shift_run(y, value, n);
    return BESA_OK;
}

/* ---- the exact count ----------------------------------------------------------------------- */

typedef struct besa__cpu_projected {
    double logit, exact;                        /* of the row's rate; shifted rate times columns */
    int64_t columns, least, n, row;
} besa__cpu_projected;

/* n = floor(exact) within least .. columns of every row for one shift; returns the sum. */
static int64_t besa__cpu_project_shift(besa__cpu_projected *p, int64_t rows, double shift)
{
    int64_t total = 0;
    for (int64_t i = 0; i < rows; i++) {
        p[i].exact = (double)p[i].columns / (1 + exp(-(p[i].logit + shift)));
        p[i].n = besa__min(p[i].columns, besa__max(p[i].least, (int64_t)floor(p[i].exact)));
        total += p[i].n;
    }
    return total;
}

static int besa__cpu_by_fraction(const void *left, const void *right)
{
    const besa__cpu_projected *a = (const besa__cpu_projected *)left, *b = (const besa__cpu_projected *)right;
    double fa = a->exact - (double)a->n, fb = b->exact - (double)b->n;
    if (fa != fb) return fa > fb ? -1 : 1;
    return a->row < b->row ? -1 : 1;
}

/* Choose n of every row so that their sum is count. */
static void besa__cpu_project(besa__cpu_projected *p, int64_t rows, int64_t count)
{
    double low = -60, high = 60;
    for (int i = 0; i < 80; i++) {
        double shift = 0.5 * (low + high);
        if (besa__cpu_project_shift(p, rows, shift) <= count) low = shift;
        else high = shift;
    }
    int64_t missing = count - besa__cpu_project_shift(p, rows, low), before = -1;
    qsort(p, (size_t)rows, sizeof *p, besa__cpu_by_fraction);
    while (missing > 0 && missing != before) {
        before = missing;
        for (int64_t i = 0; i < rows && missing > 0; i++)
            if (p[i].n < p[i].columns) {
                p[i].n++;
                missing--;
            }
    }
}

static besa__cpu_projected *besa__cpu_project_place(besa__arena *work, int64_t rows)
{
    return (besa__cpu_projected *)besa__take_array(work, rows, sizeof(besa__cpu_projected));
}

/* n(R) whose sum is count; excess(1) says whether that can be */
static besa_result besa__cpu_project_counts(besa_backend *be, int32_t *n, int64_t *excess, const float *alpha,
                                            const int32_t *least, const int32_t *columns, int64_t count, int64_t rows)
{
    besa__arena work = besa__cpu_work(be);
    besa__cpu_projected *p = besa__cpu_project_place(&work, rows);
    int64_t used = 0, sum = 0;
    BESA__CPU_FITS(be, work);
    *excess = 0;
    for (int64_t r = 0; r < rows; r++) {
        double rate = (double)alpha[r];
        if (columns[r] == 0) continue;
        if (!besa__is_finite(rate)) *excess = -1;
        rate = rate < 1e-7 ? 1e-7 : rate > 1 - 1e-7 ? 1 - 1e-7 : rate;
        p[used].logit = log(rate / (1 - rate));
        p[used].columns = columns[r];
        p[used].least = least[r];
        p[used++].row = r;
        sum += least[r];
    }
    if (*excess == 0 && sum > count) *excess = sum - count;
    if (*excess != 0) return BESA_OK;
    besa__cpu_project(p, used, count);
    for (int64_t i = 0; i < used; i++) n[p[i].row] = (int32_t)p[i].n;
    return BESA_OK;
}

/* ============================================================================================
 * // >>cpu-quantization      weights on a grid of levels on the CPU
 * ============================================================================================
 * A group of columns at a time, in parts of it. All in float; a level comes out as it is rounded to the dtype. */

enum { BESA__CPU_QUANTIZED = 512 /* weights of a part */ };

/* Groups of a row; where group g begins, and how many columns it has. */
static int64_t besa__groups(int64_t columns, int64_t group) { return besa__parts(columns, group); }

static int64_t besa__group_columns(int64_t columns, int64_t group, int64_t g)
{
    return besa__min(group, columns - g * group);
}

/* range(2): the larger of the first and all x, the smaller of the second and all x */
BESA__INLINE void besa__cpu_range_body(float *range, const float *x, int64_t n)
{
    float high[BESA__LANES], low[BESA__LANES];
    int64_t i = 0;
    for (int l = 0; l < BESA__LANES; l++) high[l] = range[0], low[l] = range[1];
    for (; i + BESA__LANES <= n; i += BESA__LANES)
        for (int l = 0; l < BESA__LANES; l++) {
            high[l] = high[l] < x[i + l] ? x[i + l] : high[l];
            low[l] = low[l] > x[i + l] ? x[i + l] : low[l];
        }
    for (; i < n; i++) {
        int64_t l = i % BESA__LANES;
        high[l] = high[l] < x[i] ? x[i] : high[l];
        low[l] = low[l] > x[i] ? x[i] : low[l];
    }
    for (int l = 0; l < BESA__LANES; l++) {
        range[0] = range[0] < high[l] ? high[l] : range[0];
        range[1] = range[1] > low[l] ? low[l] : range[1];
    }
}
BESA__KERNEL(besa__cpu_range, (float *range, const float *x, int64_t n), (range, x, n))

static besa_result besa__cpu_quantize_range(besa_backend *be, float *range, const void *w, besa_dtype dtype, int64_t group,
                                            int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(columns), tasks = besa__parts(rows, grain), groups = besa__groups(columns, group);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t i = task * grain * groups; i < besa__min(rows, (task + 1) * grain) * groups; i++) {
            float part[BESA__CPU_QUANTIZED], *out = range + 2 * i;
            int64_t at = i / groups * columns + i % groups * group, n = besa__group_columns(columns, group, i % groups);
            out[0] = out[1] = 0.0f;
            for (int64_t j = 0, count; j < n; j += count) {
                count = besa__min(BESA__CPU_QUANTIZED, n - j);
                besa__cpu_widen(part, w, dtype, at + j, count);
                besa__cpu_range(out, part, count);
            }
        }
    return BESA_OK;
}

/* The nearest whole number, of two the even one; |x| < 2^22. */
BESA__INLINE float besa__round(float x)
{
    const float magic = 12582912.0f; /* 1.5 2^23 */
    return (x + magic) - magic;
}

BESA__INLINE void besa__cpu_grid_body(float *scale, float *zero, const float *range, const float *logit, float most, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float low = logit ? besa__sigmoid(logit[2 * i + 1]) * range[2 * i + 1] : range[2 * i + 1];
        float high = logit ? besa__sigmoid(logit[2 * i]) * range[2 * i] : range[2 * i];
        float h = (high - low) / most, z = besa__round(-low / h);
        scale[i] = h > 0.0f ? h : 0.0f;
        zero[i] = h > 0.0f ? z : 0.0f;
    }
}
BESA__KERNEL(besa__cpu_grid, (float *scale, float *zero, const float *range, const float *logit, float most, int64_t n),
             (scale, zero, range, logit, most, n))

static float besa__cpu_most(const besa_quantizer *q) { return (float)((1 << q->bits) - 1); }

static besa_result besa__cpu_quantize_grid(besa_backend *be, const besa_quantizer *q)
{
    int64_t n = q->rows * besa__groups(q->columns, q->group), run = 4096, tasks = besa__parts(n, run);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * run;
        besa__cpu_grid(q->scale + at, q->zero + at, q->range + 2 * at, q->logit ? q->logit + 2 * at : NULL, besa__cpu_most(q),
                       besa__min(run, n - at));
    }
    return BESA_OK;
}

/* The place u of x on the grid, kept within one of its ends: -1 .. most + 1; what x / h is there goes to *t. */
BESA__INLINE float besa__grid_place(float x, float h, float z, float most, float *t)
{
    float low = -1.0f - z, high = most + 1.0f - z;
    *t = x / h;
    *t = *t < low ? low : *t > high ? high : *t;
    return besa__round(*t) + z;
}

/* y = h (clamp(u, 0, most) - z); y may be x */
BESA__INLINE void besa__cpu_levels_body(float *y, const float *x, float h, float z, float most, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float t, u = besa__grid_place(x[i], h, z, most, &t);
        u = u < 0.0f ? 0.0f : u > most ? most : u;
        y[i] = h * (u - z);
    }
}
BESA__KERNEL(besa__cpu_levels, (float *y, const float *x, float h, float z, float most, int64_t n), (y, x, h, z, most, n))

static besa_result besa__cpu_quantize(besa_backend *be, void *what, const void *w, besa_dtype dtype, const besa_quantizer *q)
{
    int64_t columns = q->columns, grain = besa__cpu_grain(columns), tasks = besa__parts(q->rows, grain);
    int64_t groups = besa__groups(columns, q->group);
    float most = besa__cpu_most(q);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t i = task * grain * groups; i < besa__min(q->rows, (task + 1) * grain) * groups; i++) {
            float part[BESA__CPU_QUANTIZED];
            int64_t at = i / groups * columns + i % groups * q->group, n = besa__group_columns(columns, q->group, i % groups);
            for (int64_t j = 0, count; j < n; j += count) {
                count = besa__min(BESA__CPU_QUANTIZED, n - j);
                besa__cpu_widen(part, w, dtype, at + j, count);
                if (q->scale[i] > 0.0f) besa__cpu_levels(part, part, q->scale[i], q->zero[i], most, count);
                else memset(part, 0, sizeof part);
                besa__cpu_narrow(what, dtype, at + j, part, count);
            }
        }
    return BESA_OK;
}

/* dWhat/dh of one weight */
BESA__INLINE float besa__level_slope(float x, float h, float z, float most)
{
    float t, u = besa__grid_place(x, h, z, most, &t);
    float clamped = (u < 0.0f ? 0.0f : u > most ? most : u) - z, within = u - z - t;
    return u > 0.0f && u < most ? within : clamped;
}

/* sum of dw dWhat/dh */
BESA__INLINE float besa__cpu_slopes_body(const float *dw, const float *x, float h, float z, float most, int64_t n)
{
#define BESA__TERM(i) (dw[i] * besa__level_slope(x[i], h, z, most))
    BESA__SUM_BODY(n, BESA__TERM)
#undef BESA__TERM
}
BESA__KERNEL_FLOAT(besa__cpu_slopes, (const float *dw, const float *x, float h, float z, float most, int64_t n),
                   (dw, x, h, z, most, n))

/* dh/dlogit: max g0 (1 - g0) / most, and -min g1 (1 - g1) / most */
static besa_result besa__cpu_quantize_gradient(besa_backend *be, float *dlogit, const float *dw, const void *w, besa_dtype dtype,
                                               const besa_quantizer *q)
{
    int64_t columns = q->columns, grain = besa__cpu_grain(columns), tasks = besa__parts(q->rows, grain);
    int64_t groups = besa__groups(columns, q->group);
    float most = besa__cpu_most(q);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t i = task * grain * groups; i < besa__min(q->rows, (task + 1) * grain) * groups; i++) {
            float part[BESA__CPU_QUANTIZED], sum = 0.0f;
            int64_t at = i / groups * columns + i % groups * q->group, n = besa__group_columns(columns, q->group, i % groups);
            float g0 = besa__sigmoid(q->logit[2 * i]), g1 = besa__sigmoid(q->logit[2 * i + 1]);
            for (int64_t j = 0, count; j < n && q->scale[i] > 0.0f; j += count) {
                count = besa__min(BESA__CPU_QUANTIZED, n - j);
                besa__cpu_widen(part, w, dtype, at + j, count);
                sum += besa__cpu_slopes(dw + at + j, part, q->scale[i], q->zero[i], most, count);
            }
            dlogit[2 * i] += sum * (q->range[2 * i] * g0 * (1.0f - g0) / most);
            dlogit[2 * i + 1] -= sum * (q->range[2 * i + 1] * g1 * (1.0f - g1) / most);
        }
    return BESA_OK;
}

/* ============================================================================================
 * // >>cpu-sparsegpt         SparseGPT on the CPU: factor of the inverse Hessian, slabs of weights
 * ============================================================================================
 * SparseGPT (arXiv 2301.00774). All in float; products go to section cpu-gemm, never in bf16. The factor: H = W'W with
 * W lower triangular (Cholesky, last block of rows first), Z = W^-1, U = Z' : then U'U = Z Z' = inv(H), U upper. */

enum { BESA__CPU_FACTOR = 128 /* rows of a block */, BESA__CPU_STRIP = 1024 /* columns of one product */ };

typedef struct besa__cpu_factor {
    float *h;                          /* (C,C) */
    int64_t columns;
    float *inverse;                    /* (FACTOR, FACTOR) of the diagonal block */
    float *panel;                      /* (FACTOR, C) */
} besa__cpu_factor;

static void besa__cpu_factor_place(besa__arena *work, besa__cpu_factor *f, int threads, int64_t columns)
{
    besa__cpu_gemm_place(work, threads); /* first, where besa__cpu_multiply has it */
    f->columns = columns;
    f->inverse = besa__take_floats(work, BESA__CPU_FACTOR * BESA__CPU_FACTOR);
    f->panel = besa__take_floats(work, besa__product(BESA__CPU_FACTOR, columns));
}

/* dead(C), ones on the diagonal there, then damping * mean(diag) on all of it */
static void besa__cpu_hessian_damp(const besa__cpu_factor *f, int32_t *dead, float damping)
{
    double sum = 0.0;
    float add;
    for (int64_t j = 0; j < f->columns; j++) {
        float *diagonal = f->h + j * f->columns + j;
        dead[j] = *diagonal == 0.0f;
        if (dead[j]) *diagonal = 1.0f;
        sum += (double)*diagonal;
    }
    add = (float)((double)damping * sum / (double)f->columns);
    for (int64_t j = 0; j < f->columns; j++) f->h[j * f->columns + j] += add;
}

/* In place D(n,n) -> W, D = W'W, lower triangles, rows `step` apart. Returns -1, or the column whose pivot is bad. */
static int64_t besa__cpu_factor_block(float *d, int64_t n, int64_t step)
{
    for (int64_t p = n - 1; p >= 0; p--) {
        float *row = d + p * step, pivot = row[p];
        if (!(pivot > 0.0f) || pivot > 3.0e38f) return p;
        besa__cpu_scale(row, 1.0f / sqrtf(pivot), p);
        row[p] = sqrtf(pivot);
        for (int64_t i = 0; i < p; i++) besa__cpu_axpy(d + i * step, -row[i], row, i + 1);
    }
    return -1;
}

/* Z(n,n) = W^-1, lower triangular, zeros above; rows of W `step` apart */
static void besa__cpu_invert_block(float *z, const float *w, int64_t n, int64_t step)
{
    memset(z, 0, (size_t)(n * n) * sizeof *z);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t k = 0; k < i; k++) besa__cpu_axpy(z + i * n, w[i * step + k], z + k * n, k + 1);
        besa__cpu_scale(z + i * n, -1.0f / w[i * step + i], i);
        z[i * n + i] = 1.0f / w[i * step + i];
    }
}

/* H -> W in the lower triangle, blocks of rows from the last to the first; -1 or the bad column */
static int64_t besa__cpu_factor_lower(besa_backend *be, const besa__cpu_factor *f)
{
    int64_t c = f->columns, blocks = besa__parts(c, BESA__CPU_FACTOR);
    for (int64_t block = blocks - 1; block >= 0; block--) {
        int64_t i0 = block * BESA__CPU_FACTOR, n = besa__min(BESA__CPU_FACTOR, c - i0);
        float *rows = f->h + i0 * c;
        int64_t bad = besa__cpu_factor_block(rows + i0, n, c);
        besa__gemm_args g = besa__cpu_product(rows, n, i0, n);
        if (bad >= 0) return i0 + bad;
        if (i0 == 0) break;
        besa__cpu_invert_block(f->inverse, rows + i0, n, c);
        for (int64_t i = 0; i < n; i++) memcpy(f->panel + i * i0, rows + i * c, (size_t)i0 * sizeof(float));
        besa__cpu_operand_a(&g, f->inverse, BESA_F32, 1, n); /* the block's rows: (W_bb^-1)' H_b */
        besa__cpu_operand_b(&g, f->panel, BESA_F32, i0, 1);
        g.c_row = c;
        besa__cpu_multiply(be, &g, 0);
        g = besa__cpu_product(f->h, i0, i0, n); /* what is above: H -= W_b' W_b */
        besa__cpu_operand_a(&g, rows, BESA_F32, 1, c);
        besa__cpu_operand_b(&g, rows, BESA_F32, c, 1);
        g.c_row = c;
        g.alpha = -1.0f;
        g.accumulate = 1;
        g.lower = 1;
        besa__cpu_multiply(be, &g, 0);
    }
    return -1;
}

/* W -> Z = W^-1 in place, blocks of rows from the first to the last: Z_b = W_bb^-1 (-W_b Z_before | 1) */
static void besa__cpu_invert_lower(besa_backend *be, const besa__cpu_factor *f)
{
    int64_t c = f->columns;
    for (int64_t i0 = 0; i0 < c; i0 += BESA__CPU_FACTOR) {
        int64_t n = besa__min(BESA__CPU_FACTOR, c - i0);
        float *rows = f->h + i0 * c;
        besa__gemm_args g;
        besa__cpu_invert_block(f->inverse, rows + i0, n, c);
        for (int64_t j0 = 0; j0 < i0; j0 += BESA__CPU_STRIP) { /* Z_before is 0 above row j0 */
            g = besa__cpu_product(f->panel + j0, n, besa__min(BESA__CPU_STRIP, i0 - j0), i0 - j0);
            besa__cpu_operand_a(&g, rows + j0, BESA_F32, c, 1);
            besa__cpu_operand_b(&g, f->h + j0 * c + j0, BESA_F32, c, 1);
            g.c_row = i0;
            besa__cpu_multiply(be, &g, 0);
        }
        if (i0 > 0) {
            g = besa__cpu_product(rows, n, i0, n);
            besa__cpu_operand_a(&g, f->inverse, BESA_F32, n, 1);
            besa__cpu_operand_b(&g, f->panel, BESA_F32, i0, 1);
            g.c_row = c;
            g.alpha = -1.0f;
            besa__cpu_multiply(be, &g, 0);
        }
        for (int64_t i = 0; i < n; i++)
            memcpy(rows + i * c + i0, f->inverse + i * n, (size_t)n * sizeof(float));
    }
}

/* The strict upper triangle: zeros, or (transpose) what is below, which becomes zero. */
static void besa__cpu_upper(besa_backend *be, const besa__cpu_factor *f, int transpose)
{
    int64_t c = f->columns, tile = 64, tasks = besa__parts(c, tile);
    float *h = f->h;
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t i1 = besa__min(c, (task + 1) * tile);
        for (int64_t j0 = task * tile; j0 < c; j0 += tile)
            for (int64_t i = task * tile; i < i1; i++)
                for (int64_t j = besa__max(i + 1, j0); j < besa__min(c, j0 + tile); j++) {
                    h[i * c + j] = transpose ? h[j * c + i] : 0.0f;
                    if (transpose) h[j * c + i] = 0.0f;
                }
    }
}

/* H(C,C) -> U, U'U = inv(H + damping mean(diag)) */
static besa_result besa__cpu_hessian_factor(besa_backend *be, float *h, int32_t *dead, float damping, int64_t columns)
{
    besa__arena work = besa__cpu_work(be);
    besa__cpu_factor f;
    int64_t bad;
    besa__cpu_factor_place(&work, &f, besa__cpu_of(be)->threads, columns);
    BESA__CPU_FITS(be, work);
    f.h = h;
    besa__cpu_hessian_damp(&f, dead, damping);
    bad = besa__cpu_factor_lower(be, &f);
    if (bad >= 0)
        return besa__fail(&be->error, BESA_ERROR_NUMERIC,
                          "the Hessian of %lld columns is not positive definite at column %lld (a larger option "
                          "damping or more calibration tokens may help)", (long long)columns, (long long)bad);
    besa__cpu_upper(be, &f, 0);
    besa__cpu_invert_lower(be, &f);
    besa__cpu_upper(be, &f, 1);
    return BESA_OK;
}

/* diag(C) = U_jj, infinity where dead */
static besa_result besa__cpu_diagonal(besa_backend *be, float *diag, const float *u, const int32_t *dead,
                                      int64_t columns)
{
    (void)be;
    for (int64_t j = 0; j < columns; j++) diag[j] = dead[j] ? besa__bits_float(0x7F800000u) : u[j * columns + j];
    return BESA_OK;
}

/* ---- slabs --------------------------------------------------------------------------------- */

typedef struct besa__cpu_slab {
    float *w, *err;                    /* of row 0: (R, width), rows `columns` and `width` apart */
    const float *u;                    /* (width, width) on U's diagonal, rows `columns` apart */
    const int32_t *dead;               /* (width) */
    float *scale;                      /* (width) = 1 / U_jj^2 */
    int64_t width, columns;
    uint32_t threshold;                /* of keys */
    int n, m;
    const besa_quantizer *q;           /* NULL: kept weights stay as they are */
    int64_t first;                     /* column of Wf */
} besa__cpu_slab;

static void besa__cpu_slab_place(besa__arena *work, besa__cpu_slab *slab, besa__cpu_select *select, int64_t width,
                                 int threads)
{
    besa__cpu_select_place(work, select, width, threads);
    slab->scale = besa__take_floats(work, width);
}

/* key = key of w^2 scale */
BESA__INLINE void besa__cpu_saliency_keys_body(uint32_t *key, const float *w, const float *scale, int64_t n)
{
    for (int64_t j = 0; j < n; j++) key[j] = besa__float_bits(w[j] * w[j] * scale[j]) | 0x80000000u;
}
BESA__KERNEL(besa__cpu_saliency_keys, (uint32_t *key, const float *w, const float *scale, int64_t n), (key, w, scale, n))

static void besa__cpu_slab_keys(const besa__cpu_select *select, uint32_t *key, int64_t row)
{
    const besa__cpu_slab *slab = (const besa__cpu_slab *)select->data;
    besa__cpu_saliency_keys(key, slab->w + row * slab->columns, slab->scale, slab->width);
}

/* go[i] = 1 for the n smallest w^2 scale of columns first .. first+m-1, as far as the slab reaches; 0 for the others */
static void besa__cpu_slab_group(const besa__cpu_slab *slab, uint32_t *go, const float *w, int64_t first)
{
    int64_t end = besa__min(slab->width, first + slab->m);
    for (int64_t j = first; j < end; j++) {
        float s = w[j] * w[j] * slab->scale[j];
        int place = 0;
        for (int64_t i = first; i < end; i++) {
            float other = w[i] * w[i] * slab->scale[i];
            place += other < s || (i < j && !(other > s));
        }
        go[j] = place < slab->n;
    }
}

/* The level of a kept weight in column i of the slab. */
static float besa__cpu_slab_level(const besa__cpu_slab *slab, float w, int64_t row, int64_t i)
{
    const besa_quantizer *q = slab->q;
    int64_t g = row * besa__groups(q->columns, q->group) + (slab->first + i) / q->group;
    float most = besa__cpu_most(q), z = q->zero[g], t, u;
    if (!(q->scale[g] > 0.0f)) return 0.0f;
    u = besa__grid_place(w, q->scale[g], z, most, &t);
    return q->scale[g] * ((u < 0.0f ? 0.0f : u > most ? most : u) - z);
}

/* One row, left to right: the error e = (w - what stays of it) / U_ii is taken off the later columns along U[i, i+1:]. */
static void besa__cpu_slab_row(const besa__cpu_slab *slab, uint32_t *go, int64_t row)
{
    float *w = slab->w + row * slab->columns, *err = slab->err + row * slab->width;
    besa__cpu_saliency_keys(go, w, slab->scale, slab->width);
    for (int64_t i = 0; i < slab->width; i++) go[i] = go[i] <= slab->threshold;
    for (int64_t i = 0; i < slab->width; i++) {
        const float *u = slab->u + i * slab->columns;
        if (slab->m > 0 && i % slab->m == 0) besa__cpu_slab_group(slab, go, w, i);
        float stays = go[i] ? 0.0f : slab->q ? besa__cpu_slab_level(slab, w[i], row, i) : w[i];
        err[i] = (w[i] - stays) / u[i];
        if (err[i] != 0.0f) besa__cpu_axpy(w + i + 1, -err[i], u + i + 1, slab->width - i - 1);
        w[i] = stays;
    }
}

/* Dead columns of the slab become 0. */
static void besa__cpu_slab_bury(const besa__cpu_slab *slab, int64_t rows)
{
    for (int64_t j = 0; j < slab->width; j++)
        for (int64_t r = 0; slab->dead[j] && r < rows; r++) slab->w[r * slab->columns + j] = 0.0f;
}

/* Columns first .. first+width-1 of Wf(R,C) */
static besa_result besa__cpu_sparsegpt_slab(besa_backend *be, float *wf, float *err, const float *u,
                                            const int32_t *dead, int64_t first, int64_t width, double target, int n,
                                            int m, const besa_quantizer *q, int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(width * 16), tasks = besa__parts(rows, grain), smaller;
    besa__arena work = besa__cpu_work(be);
    besa__cpu_select select;
    besa__cpu_slab slab;
    slab.w = wf + first, slab.err = err, slab.u = u + first * columns + first, slab.dead = dead + first;
    slab.width = width, slab.columns = columns, slab.n = n, slab.m = m, slab.q = q, slab.first = first;
    besa__cpu_slab_place(&work, &slab, &select, width, besa__cpu_of(be)->threads);
    BESA__CPU_FITS(be, work);
    for (int64_t j = 0; j < width; j++) slab.scale[j] = 1.0f / (slab.u[j * columns + j] * slab.u[j * columns + j]);
    besa__cpu_slab_bury(&slab, rows);
    slab.threshold = 0;
    if (m == 0) {
        double place = floor((double)width * (double)rows * target);
        select.keys = besa__cpu_slab_keys;
        select.data = &slab;
        select.rows = rows, select.columns = width;
        slab.threshold = besa__cpu_select_run(be, &select, besa__min((int64_t)place, width * rows - 1), &smaller);
    }
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++)
            besa__cpu_slab_row(&slab, select.key + BESA__THREAD_INDEX() * width, r);
    return BESA_OK;
}

/* The same where what is 0 in kept(R,C) goes */
static besa_result besa__cpu_sparsegpt_given(besa_backend *be, float *wf, float *err, const float *u, const float *kept,
                                             int64_t first, int64_t width, int64_t rows, int64_t columns)
{
    int64_t grain = besa__cpu_grain(width * 16), tasks = besa__parts(rows, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t r = task * grain; r < besa__min(rows, (task + 1) * grain); r++) {
            float *w = wf + r * columns + first, *e = err + r * width;
            const float *keep = kept + r * columns + first;
            for (int64_t i = 0; i < width; i++) {
                const float *row = u + (first + i) * columns + first;
                e[i] = keep[i] == 0.0f ? w[i] / row[i] : 0.0f;
                if (e[i] != 0.0f) besa__cpu_axpy(w + i + 1, -e[i], row + i + 1, width - i - 1);
                if (keep[i] == 0.0f) w[i] = 0.0f;
            }
        }
    return BESA_OK;
}

/* Wf[:, first+width:] -= err(R,width) U[first:first+width, first+width:] */
static besa_result besa__cpu_sparsegpt_push(besa_backend *be, float *wf, const float *err, const float *u,
                                            int64_t first, int64_t width, int64_t rows, int64_t columns)
{
    int64_t next = first + width;
    besa__gemm_args g = besa__cpu_product(wf + next, rows, columns - next, width);
    if (next >= columns) return BESA_OK;
    besa__cpu_operand_a(&g, err, BESA_F32, width, 1);
    besa__cpu_operand_b(&g, u + first * columns + next, BESA_F32, columns, 1);
    g.c_row = columns;
    g.alpha = -1.0f;
    g.accumulate = 1;
    besa__cpu_multiply(be, &g, 0);
    return BESA_OK;
}

/* ============================================================================================
 * // >>cpu-refit             kept weights fitted anew on the CPU: steps of conjugate gradients
 * ============================================================================================
 * All in float; the product goes to section cpu-gemm, never in bf16. Tasks are runs of rows or of weights. */

/* H(C,C): the lower triangle to both, damping mean(diag) onto the diagonal; scale(C) = 1 / H_jj or 0 */
static besa_result besa__cpu_hessian_whole(besa_backend *be, float *h, float *scale, float damping, int64_t columns)
{
    int64_t tile = 64, tasks = besa__parts(columns, tile);
    double sum = 0.0;
    for (int64_t j = 0; j < columns; j++) sum += (double)h[j * columns + j];
    float add = (float)((double)damping * sum / (double)columns);
    for (int64_t j = 0; j < columns; j++) {
        h[j * columns + j] += add;
        scale[j] = h[j * columns + j] != 0.0f ? 1.0f / h[j * columns + j] : 0.0f;
    }
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t j0 = task * tile; j0 < columns; j0 += tile)
            for (int64_t i = task * tile; i < besa__min(columns, (task + 1) * tile); i++)
                for (int64_t j = besa__max(i + 1, j0); j < besa__min(columns, j0 + tile); j++)
                    h[i * columns + j] = h[j * columns + i];
    return BESA_OK;
}

/* Y(R,C) = X(R,C) H(C,C) */
static besa_result besa__cpu_hessian_product(besa_backend *be, float *y, const float *x, const float *h, int64_t rows,
                                             int64_t columns)
{
    besa__gemm_args g = besa__cpu_product(y, rows, columns, columns);
    besa__cpu_operand_a(&g, x, BESA_F32, columns, 1);
    besa__cpu_operand_b(&g, h, BESA_F32, columns, 1);
    besa__cpu_multiply(be, &g, 0);
    return BESA_OK;
}

/* p -= x */
BESA__INLINE void besa__cpu_less_body(float *p, const float *x, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) p[i] -= x[i];
}
BESA__KERNEL(besa__cpu_less, (float *p, const float *x, int64_t n), (p, x, n))

/* x(n) = What, p(n) = W - What */
static besa_result besa__cpu_refit_begin(besa_backend *be, float *x, float *p, const void *w, const void *what,
                                         besa_dtype dtype, int64_t n)
{
    int64_t tasks = besa__parts(n, BESA__CPU_STEP_RUN);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * BESA__CPU_STEP_RUN, count = besa__min(BESA__CPU_STEP_RUN, n - at);
        besa__cpu_widen(x + at, what, dtype, at, count);
        besa__cpu_widen(p + at, w, dtype, at, count);
        besa__cpu_less(p + at, x + at, count);
    }
    return BESA_OK;
}

/* r = q where x is not 0, else 0 */
BESA__INLINE void besa__cpu_refit_residual_body(float *r, const float *x, const float *q, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) r[i] = x[i] != 0.0f ? q[i] : 0.0f;
}
BESA__KERNEL(besa__cpu_refit_residual, (float *r, const float *x, const float *q, int64_t n), (r, x, q, n))

/* Where x is not 0: x += alpha p, which 0 is not, and r -= alpha q */
BESA__INLINE void besa__cpu_refit_move_body(float *x, float *r, const float *p, const float *q, float alpha, int64_t n)
{
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float x0 = x[i], r0 = r[i], x1 = x0 + alpha * p[i], r1 = r0 - alpha * q[i];
        x1 = x1 != 0.0f ? x1 : 1.17549435e-38f;
        x[i] = x0 != 0.0f ? x1 : x0;
        r[i] = x0 != 0.0f ? r1 : r0;
    }
}
BESA__KERNEL(besa__cpu_refit_move, (float *x, float *r, const float *p, const float *q, float alpha, int64_t n),
             (x, r, p, q, alpha, n))

/* p = scale r + beta p; p is not read where beta is 0, as at the first */
BESA__INLINE void besa__cpu_refit_turn_body(float *p, const float *r, const float *scale, float beta, int64_t n)
{
    if (beta == 0.0f) {
        BESA__ELEMENTWISE
        for (int64_t i = 0; i < n; i++) p[i] = scale[i] * r[i];
        return;
    }
    BESA__ELEMENTWISE
    for (int64_t i = 0; i < n; i++) p[i] = scale[i] * r[i] + beta * p[i];
}
BESA__KERNEL(besa__cpu_refit_turn, (float *p, const float *r, const float *scale, float beta, int64_t n),
             (p, r, scale, beta, n))

static void besa__cpu_refit_row(const besa_refit_step *o, int64_t row)
{
    int64_t n = o->columns, at = row * n;
    float *x = o->x + at, *r = o->r + at, *p = o->p + at, *rho = o->rho + row, *rho0 = rho + o->rows, beta = 0.0f;
    const float *q = o->q + at;
    if (o->first) {
        besa__cpu_refit_residual(r, x, q, n);
        *rho = *rho0 = besa__cpu_dot3(r, r, o->scale, n);
    } else {
        float curved = besa__cpu_dot(p, q, n), alpha = curved > 1e-30f && *rho > 1e-14f * *rho0 ? *rho / curved : 0.0f;
        if (!(alpha > 0.0f && alpha < 3.0e38f)) {
            *rho = 0.0f;
            return;
        }
        besa__cpu_refit_move(x, r, p, q, alpha, n);
        float now = besa__cpu_dot3(r, r, o->scale, n);
        beta = now / *rho;
        *rho = now;
    }
    besa__cpu_refit_turn(p, r, o->scale, beta, n);
}

/* See besa_refit_step */
static besa_result besa__cpu_refit_step(besa_backend *be, const besa_refit_step *o)
{
    int64_t grain = besa__cpu_grain(o->columns * 4), tasks = besa__parts(o->rows, grain);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t r = task * grain; r < besa__min(o->rows, (task + 1) * grain); r++) besa__cpu_refit_row(o, r);
    return BESA_OK;
}

/* type: an unsigned integer as wide as the dtype, all bits but the sign in `magnitude`. */
#define BESA__CPU_REFIT_KERNEL(name, type, round, magnitude)                                       \
    BESA__INLINE void name##_body(type *what, const float *x, int64_t n)                           \
    {                                                                                              \
        BESA__ELEMENTWISE                                                                          \
        for (int64_t i = 0; i < n; i++) {                                                          \
            type now = (type)round(x[i]), old = what[i];                                           \
            type kept = (now & (magnitude)) != 0 ? now : old;                                      \
            what[i] = (old & (magnitude)) != 0 ? kept : (type)0;                                   \
        }                                                                                          \
    }                                                                                              \
    BESA__KERNEL(name, (type *what, const float *x, int64_t n), (what, x, n))

BESA__CPU_REFIT_KERNEL(besa__cpu_refitted_f32, uint32_t, besa__float_bits, 0x7FFFFFFFu)
BESA__CPU_REFIT_KERNEL(besa__cpu_refitted_f16, uint16_t, besa__f32_to_f16, 0x7FFFu)
BESA__CPU_REFIT_KERNEL(besa__cpu_refitted_bf16, uint16_t, besa__f32_to_bf16, 0x7FFFu)

/* What(n) = x where it is not 0, rounded, unless that is 0 */
static besa_result besa__cpu_refit_end(besa_backend *be, void *what, const float *x, besa_dtype dtype, int64_t n)
{
    int64_t tasks = besa__parts(n, BESA__CPU_STEP_RUN);
    BESA__PARALLEL_FOR(besa__cpu_team(be, tasks))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t at = task * BESA__CPU_STEP_RUN, count = besa__min(BESA__CPU_STEP_RUN, n - at);
        void *to = besa__at(what, dtype, at);
        if (dtype == BESA_F32) besa__cpu_refitted_f32((uint32_t *)to, x + at, count);
        else if (dtype == BESA_F16) besa__cpu_refitted_f16((uint16_t *)to, x + at, count);
        else besa__cpu_refitted_bf16((uint16_t *)to, x + at, count);
    }
    return BESA_OK;
}

/* ============================================================================================
 * // >>cpu-backend           the CPU's table of operations
 * ============================================================================================ */

/* Bytes of scratch of the operations, in groups that have some. */

static uint64_t besa__cpu_gemm_bytes(const besa_workload *w, int threads)
{
    besa__arena work = {NULL, 0};
    if (w->tokens > 0) besa__cpu_gemm_place(&work, threads);
    return work.used;
}

/* One kv head for each thread, or more of them where they are small; no more than there are. */
static uint64_t besa__cpu_attention_bytes(const besa_workload *w, int threads)
{
    besa_attention_shape s = {1, w->seqlen, w->num_attention_heads, w->num_key_value_heads, w->head_dim, 0, 0, 0};
    uint64_t most = 0;
    if (w->num_key_value_heads <= 0 || w->tokens <= 0 || w->seqlen <= 0) return 0;
    for (int backward = 0; backward < 2; backward++) {
        besa__cpu_attention x = besa__cpu_attention_sizes(&s, 0, backward);
        besa__arena work = {NULL, 0}, one = {NULL, 0}, team = {NULL, 0}, all = {NULL, 0};
        besa__cpu_queries b;
        besa__cpu_kv kv;
        besa__cpu_queries_place(&one, &b, &x);
        besa__take_parts(&work, &one, threads);
        one.used = 0;
        besa__cpu_kv_place(&one, &kv, &x);
        besa__take_parts(&team, &one, threads);
        x.keys = besa__cpu_whole(besa__max(w->tokens, w->seqlen), x.kernel.nr);
        one.used = 0;
        besa__cpu_kv_place(&one, &kv, &x);
        besa__take_parts(&all, &one, s.num_key_value_heads);
        if (team.used < BESA__CPU_KV) team.used = BESA__CPU_KV;
        work.used = besa__add_sizes(work.used, team.used < all.used ? team.used : all.used);
        most = work.used > most ? work.used : most;
    }
    return most;
}

static uint64_t besa__cpu_column_sumsq_bytes(const besa_workload *w, int threads)
{
    besa__arena work = {NULL, 0};
    (void)threads;
    besa__cpu_column_sumsq_place(&work, BESA__CPU_SUM_PARTS, w->columns); /* of any number of tokens */
    return work.used;
}

static uint64_t besa__cpu_block_loss_bytes(const besa_workload *w, int threads)
{
    besa__arena work = {NULL, 0};
    float *weight;
    double *part;
    (void)threads;
    besa__cpu_block_loss_place(&work, &weight, &part, w->tokens, w->columns);
    return work.used;
}

static uint64_t besa__cpu_sort_bytes(const besa_workload *w, int threads)
{
    besa__arena work = {NULL, 0};
    besa__cpu_sort sort;
    besa__cpu_sort_place(&work, &sort, w->columns);
    return besa__multiply_sizes(work.used, (uint64_t)threads);
}

/* And count_zeros. */
static uint64_t besa__cpu_mask_smallest_bytes(const besa_workload *w, int threads)
{
    besa__arena work = {NULL, 0};
    besa__cpu_select select;
    int64_t *ties;
    besa__cpu_mask_smallest_place(&work, &select, &ties, w->rows, w->columns, threads);
    return work.used;
}

/* Rates, bucket sums and the optimiser; 0 candidates: as many as there may be. */
static uint64_t besa__cpu_rates_bytes(const besa_workload *w, int threads)
{
    besa__arena work = {NULL, 0}, cell_work = {NULL, 0}, step_work = {NULL, 0};
    besa__cpu_rates rates;
    besa__cpu_cells cells;
    int64_t n = w->rate_logits > 0 ? w->rate_logits : (int64_t)BESA__CPU_BUCKETS;
    uint64_t stride = besa__cpu_rates_place(&work, &rates, n, besa__cpu_rate_parts(INT64_MAX, n));
    work.used = besa__add_sizes(work.used, besa__multiply_sizes(stride, (uint64_t)threads));
    stride = besa__cpu_cells_place(&cell_work, &cells, w->columns, n);
    cell_work.used = besa__add_sizes(cell_work.used, besa__multiply_sizes(stride, (uint64_t)threads));
    besa__cpu_optimizer_place(&step_work);
    uint64_t most = work.used > cell_work.used ? work.used : cell_work.used;
    return most > step_work.used ? most : step_work.used;
}

static uint64_t besa__cpu_project_bytes(const besa_workload *w, int threads)
{
    besa__arena work = {NULL, 0};
    (void)threads;
    besa__cpu_project_place(&work, w->projected_rows);
    return work.used;
}

static uint64_t besa__cpu_hessian_bytes(const besa_workload *w, int threads)
{
    besa__arena work = {NULL, 0}, slab_work = {NULL, 0};
    besa__cpu_factor factor;
    besa__cpu_slab slab;
    besa__cpu_select select;
    if (w->hessian_columns <= 0) return 0;
    besa__cpu_factor_place(&work, &factor, threads, w->hessian_columns);
    besa__cpu_slab_place(&slab_work, &slab, &select, w->hessian_columns, threads);
    return work.used > slab_work.used ? work.used : slab_work.used;
}

/* The most that any operation takes. */
static size_t besa__cpu_workspace_size(besa_backend *be, const besa_workload *w)
{
    static uint64_t (*const bytes[])(const besa_workload *, int) = {
        besa__cpu_gemm_bytes, besa__cpu_attention_bytes, besa__cpu_column_sumsq_bytes, besa__cpu_block_loss_bytes,
        besa__cpu_sort_bytes, besa__cpu_mask_smallest_bytes, besa__cpu_rates_bytes, besa__cpu_project_bytes,
        besa__cpu_hessian_bytes};
    uint64_t largest = 0;
    for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++) {
        uint64_t one = bytes[i](w, besa__cpu_of(be)->threads);
        if (one > largest) largest = one;
    }
    return besa__size(largest);
}

static void besa__cpu_destroy(besa_backend *be)
{
    BESA_FREE(be->context);
    memset(be, 0, sizeof *be);
}

/* Memory is memory: what moves, copies; what is pinned, allocates. */
#define besa__cpu_host_alloc besa__cpu_alloc
#define besa__cpu_host_free besa__cpu_free
#define besa__cpu_download besa__cpu_upload
#define besa__cpu_copy besa__cpu_upload

/* Whether float arithmetic is as written, with subnormal numbers. Options such as -funsafe-math-optimizations set no macro,
 * yet fold the exponential's rounding constant away. Inputs are volatile: nothing is worked out by the compiler. */
static besa_result besa__check_arithmetic(besa_error *error)
{
    enum { TRIED = 3 * BESA__LANES + 5, HALVES = 5 };
    static const float special[3] = {-200, 200, (float)NAN};
    volatile float step = 1.75f;
    volatile uint16_t half = 0x8001;            /* -2^-24, subnormal in 16 bits */
    float x[TRIED], y[TRIED], limits[3], halves[HALVES];
    uint16_t bits[HALVES];
    int wrong = 0;
    for (int i = 0; i < TRIED; i++) x[i] = step * (float)(i - TRIED / 2); /* -87.5 .. 87.5: exp's results from subnormal up */
    besa__cpu_exp_sum(y, x, 0.0f, TRIED);
    for (int i = 0; i < TRIED; i++) wrong += !(fabs((double)y[i] - exp((double)x[i])) <= 1e-6 * exp((double)x[i]));
    for (int i = 0; i < TRIED; i++) y[i] = besa__sqrt(x[i] * x[i]);
    for (int i = 0; i < TRIED; i++) wrong += !(fabs((double)y[i] - fabs((double)x[i])) <= 1e-6 * fabs((double)x[i]));
    besa__cpu_exp_sum(limits, special, step - 1.75f, 3);
    wrong += limits[0] != 0 || besa__float_bits(limits[1]) != 0x7F800000u;
    wrong += (besa__float_bits(limits[2]) & 0x7FFFFFFFu) <= 0x7F800000u;
    for (int i = 0; i < HALVES; i++) bits[i] = (uint16_t)(half + i);
    besa__cpu_widen_f16(halves, bits, HALVES);
    for (int i = 0; i < HALVES; i++) wrong += (double)halves[i] != ldexp(-1 - i, -24);
    if (!wrong) return BESA_OK;
    return besa__fail(error, BESA_ERROR_UNSUPPORTED, "float arithmetic of this program is not as written, %d of its results are "
                      "wrong: compile without -funsafe-math-optimizations, and let subnormal numbers not be flushed to zero "
                      "(linking with -ffast-math has them flushed)", wrong);
}

BESA_API besa_result besa_cpu_backend(besa_backend *be, const besa_cpu_options *options, besa_error *error)
{
    besa__cpu *cpu;
    void *memory;
    int threads = options ? options->threads : 0;
    memset(be, 0, sizeof *be);
    if (threads < 0 || threads > 1024)
        return besa__fail(error, BESA_ERROR_OPTION, "threads is %d, expected 0 to 1024", threads);
#if defined(_OPENMP)
    if (threads == 0) threads = omp_get_max_threads();
#else
    threads = 1;
#endif
    BESA__TRY(besa__check_arithmetic(error));
    BESA__TRY(besa__malloc(&memory, sizeof *cpu, "the CPU backend", error));
    cpu = (besa__cpu *)memset(memory, 0, sizeof *cpu);
    cpu->threads = threads;
    cpu->bf16 = options && options->bf16;
    be->name = cpu->bf16 ? "CPU, bf16 products" : "CPU";
    be->context = cpu;
    be->activation_dtype = BESA_F32;
    be->unified_memory = 1;
#define BESA__FILL(operation) be->operation = besa__cpu_##operation;
    BESA_OPERATIONS(BESA__FILL)
#undef BESA__FILL
    return BESA_OK;
}

#if defined(__clang__)
#pragma clang diagnostic pop
#endif

#if defined(BESA_CUDA) && defined(__CUDACC__)
#include "besa_cuda.cuh"
#endif
#endif /* BESA_IMPLEMENTATION_DONE */
#endif /* BESA_IMPLEMENTATION */
