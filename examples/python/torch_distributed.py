"""Prunes one checkpoint in several processes, whose sums torch.distributed makes.

    torchrun --nproc-per-node 4 torch_distributed.py llama pruned --tokens c4.npy sparsity=0.5 batch_size=8
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 torch_distributed.py ...

What follows the paths are options of besa.prune, as name=value. Every process computes on its processors; sums go by gloo,
or by NCCL with --backend nccl, where each process has a GPU for that. On several machines the paths are of a directory that
all see.
"""
import argparse
import ast
import os
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import besa


class Comm:
    """A comm of besa.prune. A process that fails leaves its message in the store; the others' calls fail as its connections
    close, and find the message."""

    def __init__(self, backend: str = "gloo"):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"    # torchrun has a store already
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self.size,
                                   self.rank == 0 and not agent, timedelta(seconds=300))
        self.device = "cpu"
        if backend == "nccl":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(self.device)
        dist.init_process_group(backend, store=dist.PrefixStore("besa", self.store), rank=self.rank, world_size=self.size)
        self.barrier()                                                      # all are connected

    def call(self, operation, array: np.ndarray, **arguments) -> None:
        try:
            tensor = torch.from_numpy(array)
            sent = tensor.to(self.device)                                   # tensor itself on the CPU
            operation(sent, **arguments)
            if sent is not tensor:
                tensor.copy_(sent)
        except RuntimeError as problem:
            if self.store.check(["failed"]):
                raise RuntimeError(self.store.get("failed").decode()) from problem
            raise

    def reduce(self, data: np.ndarray) -> None:
        self.call(dist.all_reduce, data)

    def broadcast(self, data: np.ndarray, root: int) -> None:
        self.call(dist.broadcast, data, src=root)

    def barrier(self) -> None:
        self.call(dist.all_reduce, np.zeros(1, np.float32))

    def fail(self, message: str) -> None:
        if self.store.check(["failed"]):
            return
        self.store.set("failed", f"{message} (rank {self.rank})")
        if dist.is_initialized():
            dist.destroy_process_group()                                    # closes the connections


def value(text: str):
    """3 and [1, 2] as Python has them; else the words."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--test")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("options", nargs="*", help="name=value")
    given = parser.parse_intermixed_args()
    options = {name: value(text) for name, _, text in (option.partition("=") for option in given.options)}
    comm = Comm(given.backend)
    try:
        report = besa.prune(given.source, given.output, given.tokens, test=given.test, comm=comm, progress=comm.rank == 0,
                            **options)
    except (besa.Error, ValueError, TypeError) as problem:
        print(f"rank {comm.rank}: {problem}", file=sys.stderr)
        comm.fail(str(problem))
        return 1
    if comm.rank == 0:
        print(f"{given.output}: sparsity {report['sparsity']:.6f}, perplexity {report.get('perplexity')}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
