/* BESA on one linear layer of a network of your own: y = x W', then silu, then whatever follows.
 *
 * Everything that is not a besa_ call is yours and may be anything; besa.h gives masks and takes dL/dWhat, the
 * gradient at the masked weights. Here the loss is the squared distance to what the dense layer gives behind the silu,
 * relative to the size of that. First come the methods that learn nothing: one call each. */
#define BESA_IMPLEMENTATION
#include "besa.h"

enum { T = 256, C = 128, R = 96, STEPS = 100, D = 100 }; /* tokens, input columns, output rows; D: rates 1, 0.99 .. 0 */
static float x[T * C], w[R * C], pruned[R * C], target[T * R], dw[R * C], scratch[(R + 1) * C], squares[C];
static double energy; /* sum of target^2 */

#define CHECK(call)                                                                                \
    do {                                                                                           \
        if (call) return fprintf(stderr, "%s\n", error.message), 1;                                \
    } while (0)

static double uniform(void) /* in [-1, 1) */
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (double)(state >> 8) / 8388608.0 - 1;
}

static double sigmoid(double y) { return 1 / (1 + exp(-y)); }

/* Your forward and backward pass: the loss with weights v, and dv = dloss/dv. */
static double loss_and_gradient(const float *v, float *dv)
{
    double loss = 0;
    memset(dv, 0, sizeof dw);
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            double y = 0;
            for (int c = 0; c < C; c++) y += (double)x[t * C + c] * v[r * C + c];
            double s = sigmoid(y), error = y * s - target[t * R + r];
            double dy = 2 * error * (s + y * s * (1 - s)) / energy;
            loss += error * error / energy;
            for (int c = 0; c < C; c++) dv[r * C + c] += (float)(dy * x[t * C + c]);
        }
    return loss;
}

/* Inputs and rows of different size, as real layers have them; target is what the dense layer gives. */
static void make_layer(void)
{
    for (int i = 0; i < T * C; i++) x[i] = (float)(uniform() * exp(i % C % 5 - 2.0));
    for (int i = 0; i < R * C; i++) w[i] = (float)(uniform() * exp(i / C % 4 - 3.0));
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            double y = 0;
            for (int c = 0; c < C; c++) y += (double)x[t * C + c] * w[r * C + c];
            target[t * R + r] = (float)(y * sigmoid(y));
            energy += target[t * R + r] * target[t * R + r];
        }
    for (int i = 0; i < T * C; i++) squares[i % C] += x[i] * x[i];
}

/* Wanda and SparseGPT at half of the weights: what to compare with. */
static int try_baselines(besa_backend *be, const besa_layer_shape *shape)
{
    static const besa_method methods[] = {BESA_METHOD_WANDA, BESA_METHOD_SPARSEGPT};
    static float statistic[C * C];
    besa_error error;
    besa_prune_options options = {0};
    options.rates.target = 0.5;
    for (int i = 0; i < 2; i++) {
        options.method = methods[i];
        memset(statistic, 0, sizeof statistic); /* of C numbers with Wanda */
        CHECK(besa_layer_inputs(be, &options, statistic, x, T, T, C, &error));
        CHECK(besa_layer_prune(be, shape, &options, w, statistic, pruned, &error));
        printf("%-9s loss %.5f\n", besa_method_name(methods[i]), loss_and_gradient(pruned, dw));
    }
    return 0;
}

/* A look inside, where a run does not do what it should: which weights of a row go first, how far its rates have learned
 * (beta begins about even), and which way the loss pulls them. Between besa_rates_gradient and besa_rates_step: that empties
 * the sums. */
static int show_row(besa_rates *rates, int row)
{
    static int32_t rank[R * C];
    static float beta[R * (D + 1)], sums[R * D];
    besa_error error;
    int first = 0, likely = 0;
    double all = 0;
    CHECK(besa_rates_ranks(rates, 0, rank, &error));
    CHECK(besa_rates_beta(rates, 0, beta, &error));
    CHECK(besa_rates_sums(rates, 0, sums, &error));
    while (rank[row * C + first] > 0) first++;
    for (int d = 1; d <= D; d++) likely = beta[row * (D + 1) + d] > beta[row * (D + 1) + likely] ? d : likely;
    for (int b = 0; b < D; b++) all += sums[row * D + b]; /* all buckets: candidate 0, which prunes the whole row */
    printf("row %d: column %d goes first; likeliest rate %.2f, beta %.4f; dL/dbeta of rate 1 %.3g\n", row, first,
           1 - (double)likely / D, beta[row * (D + 1) + likely], -all);
    return 0;
}

int main(void)
{
    besa_error error;
    besa_backend be;
    besa_rates *rates;
    besa_layer_shape shape = {R, C, BESA_F32};
    besa_rate_options options = {0};
    options.target = 0.5;
    options.form = BESA_RATES_ROW;
    options.row_scale = 2; /* one layer with an exact gradient may go further than a whole model's rows */
    options.d_coef = 1;
    options.candidates = D;
    make_layer();
    CHECK(besa_cpu_backend(&be, NULL, &error));
    if (try_baselines(&be, &shape)) return 1;
    CHECK(besa_rates_create(&rates, &be, &shape, 1, &options, &error));
    CHECK(besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_WANDA, squares, scratch, &error));
    for (int step = 0; step <= STEPS; step++) {
        if (step == STEPS) CHECK(besa_rates_project(rates, &error)); /* the last masks have the target exactly */
        else CHECK(besa_rates_forward(rates, &error));
        CHECK(besa_rates_mask(rates, 0, w, pruned, &error));
        double loss = loss_and_gradient(pruned, dw);
        if (step % 10 == 0) {
            int32_t n[R], least = C, most = 0, sum = 0;
            CHECK(besa_rates_read(rates, 0, NULL, n, &error));
            for (int r = 0; r < R; r++) {
                sum += n[r];
                least = n[r] < least ? n[r] : least;
                most = n[r] > most ? n[r] : most;
            }
            printf("step %3d  loss %.5f  sparsity %.4f  rows %.3f .. %.3f\n", step, loss, (double)sum / (R * C),
                   (double)least / C, (double)most / C);
        }
        if (step == STEPS) break;
        CHECK(besa_rates_gradient(rates, 0, w, dw, &error));
        if (step == STEPS - 1 && show_row(rates, 0)) return 1;
        CHECK(besa_rates_step(rates, &error));
    }
    besa_rates_destroy(rates);
    be.destroy(&be);
    return 0;
}
