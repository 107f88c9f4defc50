"""Fine-tune a pruned model, and keep its zeros. Needs torch, transformers and numpy.

    python finetune_sparse.py PRUNED TUNED tokens.npy --steps 200

hold_zeros is all that a training loop of your own needs.
"""
import argparse

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def hold_zeros(model):
    """Weights of linear layers that are 0 stay 0: their gradients are 0 from now on, and so are the steps of SGD and Adam,
    weight decay too. Call it before the optimiser is made, which must have no momentum from before. Returns the masks."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (module.weight == 0).any():
            masks[name] = kept = module.weight != 0
            module.weight.register_hook(lambda gradient, kept=kept: torch.where(kept, gradient, 0))
    return masks


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="PRUNED")
    parser.add_argument("output", metavar="TUNED")
    parser.add_argument("tokens", help="token ids of the text to learn from, .npy")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).train()
    masks = hold_zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    ids = torch.from_numpy(np.load(arguments.tokens).astype(np.int64).ravel())
    for step in range(arguments.steps):
        starts = torch.randint(len(ids) - arguments.seqlen + 1, (arguments.batch_size,))
        batch = torch.stack([ids[start:start + arguments.seqlen] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step + 1 == arguments.steps:
            print(f"step {step:4}  loss {loss.item():.4f}", flush=True)
    model.save_pretrained(arguments.output)
    zeros = sum((mask == 0).sum().item() for mask in masks.values())
    print(f"{arguments.output}: {zeros} zeros held in {len(masks)} layers")


if __name__ == "__main__":
    main()
