"""The method of BESA on one linear layer by hand, as ../besa_by_hand.c has it, in NumPy: it prints the same numbers."""
import numpy as np

D, s_R, lam, lr, target, steps = 4, 4, 0.5, 0.1, 0.5, 20
X = np.array([[1, 2, 0, -1, 3, 0, 1, 1], [0, 1, 1, 2, -2, 1, 0, -1], [-1, 0, 2, 1, 1, 0, -1, 2],
              [2, -1, 1, 0, 0, 1, 1, 0], [1, 1, -1, -2, 2, 0, 0, 1], [0, 2, 1, 1, -1, 1, 2, 0]], float)
W = np.array([[.9, -.1, .2, -1.1, .1, .3, -.2, .1], [.5, -.6, .4, .6, -.5, .4, -.6, .5],
              [-.2, .8, .1, .1, -.7, .2, .3, -.1], [.3, -.3, 1.2, .2, .4, -.9, .1, .5]])
R, C = W.shape


def show(*arrays):
    for a in map(np.atleast_2d, arrays):
        print("\n" + "\n".join("".join(f"{x + 0.0:{'14.8g' if a.shape[1] == R else '10.3g'}}" for x in row) for row in a))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loss_and_gradient(What):
    E = ((X @ W.T) ** 2).sum()
    return ((X @ (What - W).T) ** 2).sum() / E, 2 / E * (What - W) @ X.T @ X


score = np.abs(W) * np.sqrt((X ** 2).sum(0))
rank = np.argsort(np.argsort(score, 1, kind="stable"), 1)
p = 1 - np.arange(D + 1) / D
k = (D - np.arange(D + 1)) * C // D
bucket = np.array([np.flatnonzero(i < k)[-1] for i in range(C)])
show(X, W, score, rank, p, k, bucket)
theta, m, v = np.zeros((3, R, D + 1))
for i in range(1, steps + 1):
    beta = np.exp(s_R * (sigmoid(theta) - 0.5))
    beta /= beta.sum(1, keepdims=True)
    alpha = beta @ p
    n = np.floor(alpha.astype(np.float32) * C)
    What = np.where(rank >= n[:, None], W, 0)
    loss, dWhat = loss_and_gradient(What)
    sums = np.stack([np.where(bucket[rank] == b, dWhat * W, 0).sum(1) for b in range(D + 1)], 1)
    dbeta = 2 * lam * (alpha.mean() - target) / target ** 2 * p / R - sums[:, ::-1].cumsum(1)[:, ::-1]
    s = sigmoid(theta)
    dtheta = beta * (dbeta - (beta * dbeta).sum(1, keepdims=True)) * s_R * s * (1 - s)
    m, v = 0.9 * m + 0.1 * dtheta, 0.999 * v + 0.001 * dtheta ** 2
    theta = theta - lr * m / (1 - 0.9 ** i) / (np.sqrt(v / (1 - 0.999 ** i)) + 1e-8)
    if i <= 2:
        show(beta, alpha, n, What)
    if i == 1:
        show(dWhat, sums, dbeta, dtheta, theta)
    print(f"step {i:2}: L = {loss:.4f}, pruned {n.sum():g} of {R * C}")

beta = np.exp(s_R * (sigmoid(theta) - 0.5))
alpha, count, low, high = (beta / beta.sum(1, keepdims=True)) @ p, int(target * R * C + 0.5), -60, 60
for _ in range(100):                        # the largest shift that does not prune too many
    exact = C * sigmoid(np.log(alpha / (1 - alpha)) + (low + high) / 2)
    low, high = ((low + high) / 2, high) if np.floor(exact).sum() <= count else (low, (low + high) / 2)
exact = C * sigmoid(np.log(alpha / (1 - alpha)) + low)
n = np.floor(exact)
n[np.argsort(n - exact, kind="stable")[: int(count - n.sum())]] += 1  # what is missing: to the largest fractional parts
What = np.where(rank >= n[:, None], W, 0)
show(n, What)
print(f"\nL = {loss_and_gradient(What)[0]:.4f}")
