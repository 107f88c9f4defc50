#!/usr/bin/env python3
"""Kept weights that learn, by PyTorch's autograd in double precision: what test_reference compares besa.h with.

    pip install torch numpy
    python3 trace_weights.py            writes data/trace_weights

Two blocks, the second on what the first leaves. Both have the weights of data/reference/trace_published_penalty, the second
with the rows of every layer turned by one. Two runs, each on its first 8 sequences, one a step:
  wanda   Wanda's mask at 50 % of each row, then one epoch of the kept weights
  both    rates (AdamW, 0.05) and kept weights together for one epoch at 47 %, the exact count, then one epoch of the weights
  moving  the same, with the weights ranked anew after every step of the first epoch; both has the dense weights' ranks
Aimed at is 3/4 of the dense block's output on the pruned prefix and 1/4 of the dense model's. Arrays: loss_RUN (2, steps),
RUN_BLOCK_LAYER the weights that learning ends with.
"""
import json, math, pathlib
import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
SOURCE, OUT = HERE / "data/reference/trace_published_penalty", HERE / "data/trace_weights"
LAYERS = ["q", "k", "v", "o", "gate", "up", "down"]
SEQUENCES, SHARE, LR, RATE_LR, CANDIDATES, PENALTY = 8, 0.25, 0.2, 0.05, 100, 1.0
shape = json.loads((SOURCE / "shape.json").read_text())
T, D, HEADS, KV, DH = (shape[k] for k in ("seqlen", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
torch.set_default_dtype(torch.float64)


def load(name):
    return torch.from_numpy(np.load(SOURCE / f"{name}.npy").astype(np.float64))


def norm(x, g):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape["rms_norm_eps"]) * g


def rope(x):  # (heads, T, DH), halves apart
    angle = torch.arange(T)[:, None] * shape["rope_theta"] ** (-torch.arange(0, DH, 2) / DH)[None]
    a, b = x[..., : DH // 2], x[..., DH // 2:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def block(w, x, inputs=None):  # x (T, D)
    split = lambda y: y.view(T, -1, DH).transpose(0, 1)
    a = norm(x, NORM1)
    q, k, v = rope(split(a @ w["q"].T)), rope(split(a @ w["k"].T)), split(a @ w["v"].T)
    k, v = k.repeat_interleave(HEADS // KV, 0), v.repeat_interleave(HEADS // KV, 0)
    scores = q @ k.transpose(1, 2) / math.sqrt(DH) + torch.full((T, T), -math.inf).triu(1)
    attn = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
    h1 = x + attn @ w["o"].T
    m = norm(h1, NORM2)
    gate = m @ w["gate"].T
    z = gate * torch.sigmoid(gate) * (m @ w["up"].T)
    if inputs is not None:
        for name, value in zip(LAYERS, [a, a, a, attn, m, m, z]):
            inputs[name] = inputs.get(name, 0) + value.pow(2).sum(0)
    return h1 + z @ w["down"].T


class Adam:
    def __init__(self, value, lr, eps):
        self.value, self.lr, self.eps, self.step = value, lr, eps, 0
        self.m, self.v = torch.zeros_like(value), torch.zeros_like(value)

    def move(self, grad, where, scale=1.0):
        self.step += 1
        self.m = torch.where(where, 0.9 * self.m + 0.1 * grad, self.m)
        self.v = torch.where(where, 0.999 * self.v + 0.001 * grad**2, self.v)
        step = self.m / (1 - 0.9**self.step) / ((self.v / (1 - 0.999**self.step)).sqrt() + self.eps)
        self.value = torch.where(where, self.value - self.lr * scale * step, self.value)


def tilt(target):
    low, high, p = -1e3, 1e3, 1 - torch.arange(CANDIDATES + 1) / CANDIDATES
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if ((c * p).softmax(0) * p).sum() < target else (low, c)
    return c


def project(alpha, columns, count):
    logit = np.log(alpha) - np.log1p(-alpha)
    low, high = -60.0, 60.0
    for _ in range(200):
        shift = (low + high) / 2
        n = np.floor(columns / (1 + np.exp(-(logit + shift))))
        low, high = (shift, high) if n.sum() <= count else (low, shift)
    exact = columns / (1 + np.exp(-(logit + low)))
    n = np.floor(exact)
    for r in np.argsort(-(exact - n), kind="stable")[: int(count - n.sum())]:
        n[r] += 1
    return n.astype(int)


def ranks(w, sums):
    return {l: (w[l].abs() * sums[l].sqrt()).argsort(dim=1, stable=True).argsort(1) for l in LAYERS}


def learn(w, xs, yref, sums, method, losses):
    """The weights that learning ends with, pruned."""
    both, target = method != "wanda", 0.5 if method == "wanda" else 0.47
    rank = ranks(w, sums)
    steps, sizes = (2 if both else 1) * SEQUENCES, {l: w[l].shape[1] for l in LAYERS}
    value = {l: Adam(w[l], LR, 1e-12) for l in LAYERS}
    unit = {l: w[l].pow(2).mean().sqrt() / math.sqrt(sizes[l]) for l in LAYERS}
    n = {l: torch.full((w[l].shape[0],), int(0.5 * sizes[l])) for l in LAYERS}
    p, c, total = 1 - torch.arange(CANDIDATES + 1) / CANDIDATES, tilt(target), sum(v.numel() for v in w.values())
    thetas = {l: (Adam(torch.zeros(CANDIDATES + 1), RATE_LR, 1e-8), Adam(torch.zeros(len(w[l]), CANDIDATES + 1), RATE_LR, 1e-8))
              for l in LAYERS}
    cuts = {l: torch.tensor([(CANDIDATES - d) * sizes[l] // CANDIDATES for d in range(CANDIDATES + 1)]) for l in LAYERS}

    def rates(theta):
        u = lambda t: torch.sigmoid(t) - 0.5
        return {l: (c * p + u(theta[l][0]) + u(theta[l][1])).softmax(-1) for l in LAYERS}

    for s in range(steps):
        together = both and s < SEQUENCES
        if method == "moving" and s <= SEQUENCES:
            rank = ranks({l: value[l].value for l in LAYERS}, sums)
        theta = {l: [t.value.clone().requires_grad_() for t in thetas[l]] for l in LAYERS}
        leaf = {l: value[l].value.clone().requires_grad_() for l in LAYERS}
        if together:
            beta = rates(theta)
            alpha = {l: beta[l] @ p for l in LAYERS}
            n = {l: (alpha[l].detach() * sizes[l]).floor().long() for l in LAYERS}
        mask = {l: (rank[l] >= n[l][:, None]).double() for l in LAYERS}
        what = {l: leaf[l] * mask[l] for l in LAYERS}
        if together:
            keep = {l: 1 - ((rank[l][:, :, None] < cuts[l]) * beta[l][:, None]).sum(-1) for l in LAYERS}
            what = {l: leaf[l] * (mask[l] + keep[l] - keep[l].detach()) for l in LAYERS}
        ref = yref[s % SEQUENCES]
        loss = ((ref - block(what, xs[s % SEQUENCES])) ** 2 / ref.pow(2).sum(0)).sum() / D
        losses.append(loss.item())
        if together:
            mean = sum(alpha[l].mean() * w[l].numel() for l in LAYERS) / total
            loss = loss + PENALTY * ((mean - target) / target) ** 2
        loss.backward()
        for l in LAYERS:
            value[l].move(leaf[l].grad, mask[l] > 0, unit[l] * 0.5 * (1 + math.cos(math.pi * s / steps)))
            for k in range(2 if together else 0):
                thetas[l][k].move(theta[l][k].grad, torch.ones_like(theta[l][k], dtype=torch.bool))
        if together and s == SEQUENCES - 1:
            beta = rates({l: [t.value for t in thetas[l]] for l in LAYERS})
            alpha = torch.cat([beta[l] @ p for l in LAYERS]).numpy()
            columns = np.concatenate([np.full(len(w[l]), sizes[l]) for l in LAYERS])
            counts = torch.from_numpy(project(alpha, columns, math.floor(target * total + 0.5)))
            n = dict(zip(LAYERS, counts.split([len(w[l]) for l in LAYERS])))
    return {l: value[l].value * (rank[l] >= n[l][:, None]) for l in LAYERS}


def run(method, out):
    x, dense, losses = load("h")[:SEQUENCES], load("h")[:SEQUENCES], []
    for b in range(2):
        w = {l: load(f"w_{l}").roll(b, 0) for l in LAYERS}
        sums, losses_here = {}, []
        with torch.no_grad():
            own = torch.stack([block(w, s, sums) for s in x])
            dense = torch.stack([block(w, s) for s in dense])
            yref = (1 - SHARE) * own + SHARE * dense
        pruned = learn(w, x, yref, sums, method, losses_here)
        losses.append(losses_here)
        with torch.no_grad():
            x = torch.stack([block(pruned, s) for s in x])
        for l in LAYERS:
            out[f"{method}_{b}_{l}"] = pruned[l].numpy().astype(np.float32)
    out[f"loss_{method}"] = np.array(losses)


NORM1, NORM2 = load("norm1"), load("norm2")
arrays = {}
for name in ("wanda", "both", "moving"):
    run(name, arrays)
OUT.mkdir(exist_ok=True)
for name, array in arrays.items():
    np.save(OUT / f"{name}.npy", array)
    if name.startswith("loss"):
        print(name, array)
