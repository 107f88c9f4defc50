/* The method of BESA on one linear layer y = x W' of 4 x 8 weights, by hand: every formula of the manual in besa.h as a loop,
 * and every number printed. besa.h computes the same beside it; python/besa_by_hand.py has it in NumPy.
 * r: rows of W, j: its columns, t: tokens, d: candidate rates 1 - d/D. besa_by_hand TARGET takes another target than 0.5, above 1/C. */
#define BESA_IMPLEMENTATION
#include "besa.h"

enum { T = 6, R = 4, C = 8, D = 4, STEPS = 20 };
static double s_R = 4, lambda = 0.5, lr = 0.1, target = 0.5; /* options of besa_rate_options */
static const double X[T][C] = {{1, 2, 0, -1, 3, 0, 1, 1}, {0, 1, 1, 2, -2, 1, 0, -1}, {-1, 0, 2, 1, 1, 0, -1, 2},
                               {2, -1, 1, 0, 0, 1, 1, 0}, {1, 1, -1, -2, 2, 0, 0, 1}, {0, 2, 1, 1, -1, 1, 2, 0}};
static const double W[R][C] = {{.9, -.1, .2, -1.1, .1, .3, -.2, .1}, {.5, -.6, .4, .6, -.5, .4, -.6, .5},
                               {-.2, .8, .1, .1, -.7, .2, .3, -.1}, {.3, -.3, 1.2, .2, .4, -.9, .1, .5}};
static double XX[C][C], rank[R][C], p[D + 1], k[D + 1], bucket[C], theta[R][D + 1], m[R][D + 1], v[R][D + 1];
static double c, beta[R][D + 1], alpha[R], n[R], What[R][C], E, dWhat[R][C], dtheta[R][D + 1];
static int32_t found[R]; /* n as besa.h has it */

static void print(const char *formula, const double *a, int rows, int columns)
{
    printf("\n%s\n", formula);
    for (int i = 0; i < rows * columns; i++) printf(columns == R ? "%14.8g%s" : "%10.3g%s", a[i] + 0., (i + 1) % columns ? "" : "\n");
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

static void score_and_rank(void)
{
    double score[R][C];
    for (int i = 0; i < C * C; i++)
        for (int t = 0; t < T; t++) XX[i / C][i % C] += X[t][i / C] * X[t][i % C];
    for (int i = 0; i < R * C; i++) score[i / C][i % C] = fabs(W[i / C][i % C]) * sqrt(XX[i % C][i % C]);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < C * C; i++) /* how many of its row are smaller, or as large and before it */
            rank[r][i / C] += score[r][i % C] < score[r][i / C] || (score[r][i % C] == score[r][i / C] && i % C < i / C);
    print("inputs X[t][j]", &X[0][0], T, C);
    print("weights W[r][j]", &W[0][0], R, C);
    print("score[r][j] = |W[r][j]| sqrt(sum_t X[t][j]^2)", &score[0][0], R, C);
    print("rank[r][j]: its position in the row, by score", &rank[0][0], R, C);
}

static void candidates(void)
{
    double low = -60, high = 60;
    for (int d = 0; d <= D; d++) {
        p[d] = 1 - (double)d / D, k[d] = (D - d) * C / D;
        for (int i = 0; i < k[d]; i++) bucket[i] = d;
    }
    print("candidates p[d] = 1 - d/D", p, 1, D + 1);
    print("k[d] = (D - d) C / D: how many weights of a row candidate d prunes", k, 1, D + 1);
    for (int i = 0; i < 80; i++) { /* by halving: the mean rises with c */
        double sum = 0, mean = 0;
        c = (low + high) / 2;
        for (int d = 0; d <= D; d++) sum += exp(c * p[d]), mean += exp(c * p[d]) * p[d];
        *(mean / sum <= target ? &low : &high) = c;
    }
    c = fabs(c) < 1e-12 ? 0 : (float)c;
    print("bucket of ranks 0, 1, ...: the last d with rank < k[d], which prunes it", bucket, 1, C);
    print("c, for rates that begin at the target: sum_d exp(c p[d]) p[d] / sum_d exp(c p[d]) = t", &c, 1, 1);
}

static void rates_and_masks(int say)
{
    for (int r = 0; r < R; r++) {
        double sum = alpha[r] = 0;
        for (int d = 0; d <= D; d++) sum += beta[r][d] = exp(c * p[d] + s_R * (sigmoid(theta[r][d]) - 0.5));
        for (int d = 0; d <= D; d++) beta[r][d] /= sum, alpha[r] += beta[r][d] * p[d];
        n[r] = fabs(alpha[r] * C - round(alpha[r] * C)) < 1e-4 ? found[r] : floor(alpha[r] * C); /* whole but for rounding: besa.h decides */
        for (int j = 0; j < C; j++) What[r][j] = rank[r][j] < n[r] ? 0 : W[r][j];
    }
    if (!say) return; /* only at the first steps */
    print("beta[r][d] = exp(z[d]) / sum_d exp(z[d]), z[d] = c p[d] + s_R (sigmoid(theta[r][d]) - 1/2)", &beta[0][0], R, D + 1);
    print("alpha[r] = sum_d beta[r][d] p[d]: the row's rate", alpha, 1, R);
    print("n[r] = floor(alpha[r] C): weights of the row that go", n, 1, R);
    print("What[r][j] = W[r][j] where rank >= n[r], else 0", &What[0][0], R, C);
}

/* Your network's part. Here L = 1/E sum ((X (What - W)')^2) with E = sum ((X W')^2), and dL/dWhat = 2/E (What - W) X'X. */
static double loss_and_gradient(void)
{
    double L = E = 0;
    for (int i = 0; i < R * C; i++) {
        const int r = i / C;
        double whole = 0, difference = 0;
        for (int j = 0; j < C; j++) whole += W[r][j] * XX[j][i % C], difference += (What[r][j] - W[r][j]) * XX[j][i % C];
        E += whole * W[r][i % C], L += difference * (What[r][i % C] - W[r][i % C]), dWhat[r][i % C] = 2 * difference;
    }
    for (int i = 0; i < R * C; i++) dWhat[i / C][i % C] /= E;
    return L / E;
}

static void gradient_and_step(int number)
{
    double sums[R][D + 1] = {{0}}, dbeta[R][D + 1], S = (alpha[0] + alpha[1] + alpha[2] + alpha[3]) / R;
    const double penalty = 2 * lambda * (S - target) / (target * target); /* of lambda ((S - t) / t)^2, by S */
    for (int r = 0; r < R; r++) {
        double below = 0, mean = 0;
        for (int j = 0; j < C; j++) sums[r][(int)bucket[(int)rank[r][j]]] += dWhat[r][j] * W[r][j];
        for (int d = D; d >= 0; d--) /* candidate d prunes the buckets d, d + 1, ... */
            dbeta[r][d] = penalty * p[d] / R - (below += sums[r][d]);
        for (int d = 0; d <= D; d++) mean += beta[r][d] * dbeta[r][d];
        for (int d = 0; d <= D; d++) {
            const double s = sigmoid(theta[r][d]), g = dtheta[r][d] = beta[r][d] * (dbeta[r][d] - mean) * s_R * s * (1 - s);
            m[r][d] = 0.9 * m[r][d] + 0.1 * g, v[r][d] = 0.999 * v[r][d] + 0.001 * g * g;
            theta[r][d] -= lr * m[r][d] / (1 - pow(0.9, number)) / (sqrt(v[r][d] / (1 - pow(0.999, number))) + 1e-8);
        }
    }
    if (number > 1) return;
    print("E = sum_tr (X W')[t][r]^2, the size of the layer's outputs; L = 1/E sum_tr (X (What - W)')[t][r]^2", &E, 1, 1);
    print("dL/dWhat = 2/E (What - W) X'X: your network's backward pass", &dWhat[0][0], R, C);
    print("sums[r][b] = sum of dL/dWhat W over the weights in bucket b", &sums[0][0], R, D + 1);
    print("dL/dbeta[r][d] = - sum_{b >= d} sums[r][b] + 2 lambda (S - t)/t^2 p[d]/R, S = mean alpha", &dbeta[0][0], R, D + 1);
    print("dL/dtheta = beta (dL/dbeta - sum_d beta dL/dbeta) s_R sigmoid'(theta)", &dtheta[0][0], R, D + 1);
    print("theta -= lr m' / (sqrt(v') + eps), m' = m / (1 - .9^i), v' = v / (1 - .999^i): Adam, at first by lr everywhere", &theta[0][0], R, D + 1);
}

int main(int argc, char **argv)
{
    if (argc > 1) target = atof(argv[1]);
    if (argc > 2 || !(target > 1. / C && target < 1)) return fprintf(stderr, "usage: besa_by_hand [TARGET], above 1/8 and below 1\n"), 2;
    besa_backend be;
    besa_rates *rates;
    besa_layer_shape shape = {R, C, BESA_F32};
    besa_rate_options options = {.target = target, .form = BESA_RATES_ROW, .row_scale = s_R, .candidates = D,
                                 .penalty = lambda, .optimizer = BESA_ADAMW, .lr = lr};
    float w[R * C], f[R * C], statistic[C], scratch[(R + 1) * C], *grad;
    double worst = 0, L = 0; /* worst: the largest difference between ours and the library's */
    score_and_rank();
    candidates();
    for (int i = 0; i < R * C; i++) w[i] = (float)W[i / C][i % C], statistic[i % C] = (float)XX[i % C][i % C];
    if (besa_cpu_backend(&be, NULL, NULL) || besa_rates_create(&rates, &be, &shape, 1, &options, NULL)) return 1;
    besa_rates_parameters(rates, NULL, &grad);
    int failed = besa_rates_rank(rates, 0, w, BESA_IMPORTANCE_WANDA, statistic, scratch, NULL) != BESA_OK;
    for (int i = 1; i <= STEPS && !failed; i++) {
        failed |= besa_rates_forward(rates, NULL) || besa_rates_mask(rates, 0, w, f, NULL) || besa_rates_read(rates, 0, NULL, found, NULL);
        rates_and_masks(i <= 2);
        L = loss_and_gradient(), gradient_and_step(i);
        for (int j = 0; j < R * C; f[j] = (float)dWhat[j / C][j % C], j++) worst = fmax(worst, fabs(f[j] - What[j / C][j % C]));
        failed |= besa_rates_gradient(rates, 0, w, f, NULL) || besa_rates_backward(rates, NULL);
        for (int j = 0; j < R * (D + 1); j++) worst = fmax(worst, fabs(grad[j] - dtheta[j / (D + 1)][j % (D + 1)]));
        failed |= besa_rates_optimize(rates, NULL) != BESA_OK;
        printf("%sstep %2d: L = %.4f, pruned %g of %d\n", i < 3 ? "\n" : "", i, L, n[0] + n[1] + n[2] + n[3], R * C);
    }
    failed |= besa_rates_forward(rates, NULL) || besa_rates_project(rates, NULL) || besa_rates_read(rates, 0, NULL, found, NULL);
    for (int i = 0; i < R * C; i++) What[i / C][i % C] = rank[i / C][i % C] < (n[i / C] = found[i / C]) ? 0 : W[i / C][i % C];
    print("projection: logit(alpha[r]) + shift, the same for all rows, so that the sum of n is floor(t R C + 1/2)", n, 1, R);
    print("the pruned weights", &What[0][0], R, C);
    printf("\nL = %.4f; besa.h computes the same: %s\n", loss_and_gradient(), failed || worst > 1e-6 ? "no" : "yes");
    besa_rates_destroy(rates), be.destroy(&be);
    return failed || worst > 1e-6;
}
