"""BESA on linear layers of a torch network: masks forward, gradients of the rates backward. Needs besa and torch.

    python torch_layer.py         learns the masks of one layer, y = x W' then silu, and prints the loss on the way

MaskedWeights is the autograd.Function; it goes into any network in place of the weights. Everything else here is yours.
"""
import torch

import besa


class MaskedWeights(torch.autograd.Function):
    """MaskedWeights.apply(theta, rates, *weights) -> the pruned weights of all layers of rates.

    Forward: What = W where rank >= n, else 0. Backward, from dL/dWhat: the gradient of theta (that of the sparsity penalty
    in it), as if a weight were kept by 1 - sum_d beta_d [rank < k_d], and of W that of the weights that are kept.
    theta is torch.from_numpy(rates.theta), so that the library sees the steps of torch's optimisers."""

    @staticmethod
    def forward(ctx, theta, rates, *weights):
        rates.forward()
        pruned = tuple(rates.mask(i, w.detach(), torch.empty_like(w)) for i, w in enumerate(weights))
        ctx.rates = rates
        ctx.save_for_backward(*weights)
        return pruned

    @staticmethod
    def backward(ctx, *gradients):
        rates, weights = ctx.rates, ctx.saved_tensors
        for i, (w, dw) in enumerate(zip(weights, gradients)):
            rates.gradient(i, w.detach(), dw.float().contiguous())
        rates.backward()
        kept = [dw * torch.from_numpy(rates.kept(i)) if ctx.needs_input_grad[2 + i] else None
                for i, dw in enumerate(gradients)]
        return torch.from_numpy(rates.grad.copy()), None, *kept


def main(tokens=256, rows=96, columns=128, steps=100):
    torch.manual_seed(1)
    x = torch.randn(tokens, columns) * torch.exp(torch.arange(columns) % 5 - 2.0)
    w = torch.randn(rows, columns) * torch.exp(torch.arange(rows) % 4 - 3.0)[:, None]
    target = torch.nn.functional.silu(x @ w.T)

    # row_scale, d_coef: one layer with an exact gradient may go further than a whole model's rows
    rates = besa.Rates([(rows, columns)], sparsity=0.5, form="row", row_scale=2, d_coef=1)
    rates.rank(0, w, statistic=(x * x).sum(0))
    theta = torch.from_numpy(rates.theta).requires_grad_()

    def loss_of(pruned):
        return ((torch.nn.functional.silu(x @ pruned.T) - target) ** 2).sum() / (target ** 2).sum()

    for step in range(steps):
        loss = loss_of(*MaskedWeights.apply(theta, rates, w))
        loss.backward()
        rates.optimize()                    # Prodigy; or an optimiser of torch's over theta
        theta.grad = None
        if step % 10 == 0:
            n = rates.read(0)[1]
            print(f"step {step:3}  loss {loss.item():.5f}  sparsity {n.mean() / columns:.4f}  "
                  f"rows {n.min() / columns:.3f} .. {n.max() / columns:.3f}")
    rates.project()                         # the last masks have the target exactly
    pruned = rates.mask(0, w, torch.empty_like(w))
    print(f"final     loss {loss_of(pruned).item():.5f}  sparsity {(pruned == 0).float().mean().item():.4f}")


if __name__ == "__main__":
    main()
