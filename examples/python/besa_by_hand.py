"""The method of BESA on one linear layer, as ../besa_by_hand.c has it, in NumPy; besa_by_hand.py TARGET takes another than 0.5.
It prints the same numbers, but where a rate times the columns is a whole number: there rounding may take another weight."""
import sys

import numpy as np

D, s_R, lam, lr, steps = 4, 4, 0.5, 0.1, 20
target = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
X = np.array([[1, 2, 0, -1, 3, 0, 1, 1], [0, 1, 1, 2, -2, 1, 0, -1], [-1, 0, 2, 1, 1, 0, -1, 2],
              [2, -1, 1, 0, 0, 1, 1, 0], [1, 1, -1, -2, 2, 0, 0, 1], [0, 2, 1, 1, -1, 1, 2, 0]], float)
W = np.array([[.9, -.1, .2, -1.1, .1, .3, -.2, .1], [.5, -.6, .4, .6, -.5, .4, -.6, .5],
              [-.2, .8, .1, .1, -.7, .2, .3, -.1], [.3, -.3, 1.2, .2, .4, -.9, .1, .5]])
R, C = W.shape
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def show(*arrays):
    for a in map(np.atleast_2d, arrays):
        print("\n" + "\n".join("".join(f"{x + 0.0:{'14.8g' if a.shape[1] == R else '10.3g'}}" for x in row) for row in a))


def solve(excess):                          # the largest x with excess(x) <= 0
    low, high = -60.0, 60.0
    for _ in range(80):
        low, high = ((low + high) / 2, high) if excess((low + high) / 2) <= 0 else (low, (low + high) / 2)
    return low if abs(low) > 1e-12 else 0.0


score = np.abs(W) * np.sqrt((X ** 2).sum(0))
rank = np.argsort(np.argsort(score, 1, kind="stable"), 1)
p, k = 1 - np.arange(D + 1) / D, (D - np.arange(D + 1)) * C // D
bucket = np.array([np.flatnonzero(i < k)[-1] for i in range(C)])
E = ((X @ W.T) ** 2).sum()
c = np.float32(solve(lambda c: (np.exp(c * p) * p).sum() / np.exp(c * p).sum() - target))
show(X, W, score, rank, p, k, bucket, c)
theta, m, v = np.zeros((3, R, D + 1))
for i in range(1, steps + 1):
    beta = np.exp(c * p + s_R * (sigmoid(theta) - 0.5))
    beta /= beta.sum(1, keepdims=True)
    alpha = beta @ p
    n = np.floor(alpha.astype(np.float32) * C)
    What = np.where(rank >= n[:, None], W, 0)
    loss, dWhat = ((X @ (What - W).T) ** 2).sum() / E, 2 / E * (What - W) @ X.T @ X
    sums = np.stack([np.where(bucket[rank] == b, dWhat * W, 0).sum(1) for b in range(D + 1)], 1)
    dbeta = 2 * lam * (alpha.mean() - target) / target ** 2 * p / R - sums[:, ::-1].cumsum(1)[:, ::-1]
    s = sigmoid(theta)
    dtheta = beta * (dbeta - (beta * dbeta).sum(1, keepdims=True)) * s_R * s * (1 - s)
    m, v = 0.9 * m + 0.1 * dtheta, 0.999 * v + 0.001 * dtheta ** 2
    theta = theta - lr * m / (1 - 0.9 ** i) / (np.sqrt(v / (1 - 0.999 ** i)) + 1e-8)
    show(*(beta, alpha, n, What)[: 4 * (i <= 2)], *(E, dWhat, sums, dbeta, dtheta, theta)[: 6 * (i == 1)])
    print(f"step {i:2}: L = {loss:.4f}, pruned {n.sum():g} of {R * C}")
beta = np.exp(c * p + s_R * (sigmoid(theta) - 0.5))
alpha, count = (beta / beta.sum(1, keepdims=True)) @ p, np.floor(target * R * C + 0.5)
shifted = lambda shift: C * sigmoid(np.log(alpha / (1 - alpha)) + shift)
exact = shifted(solve(lambda shift: np.floor(shifted(shift)).sum() - count))
n = np.floor(exact)
n[np.argsort(n - exact, kind="stable")[: int(count - n.sum())]] += 1
What = np.where(rank >= n[:, None], W, 0)
show(n, What)
print(f"\nL = {((X @ (What - W).T) ** 2).sum() / E:.4f}")
