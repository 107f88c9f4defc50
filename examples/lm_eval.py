#!/usr/bin/env python3
"""Zero-shot accuracy of a pruned model by EleutherAI's lm-eval. Needs the packages that pip install "lm-eval[hf]" brings.

    python lm_eval.py PRUNED/                                  the six tasks of the BESA paper
    python lm_eval.py PRUNED/ --tasks piqa,boolq --limit 100
    python lm_eval.py PRUNED/ --tasks mine --include tasks/    a task of yours: tasks/mine.yaml, as lm-eval's guide has it

The directory needs a tokenizer, which besa copies with the weights. lm-eval loads the tasks' data from the Hugging Face
hub. The paper's figures are the column acc: acc_norm, where a task has it, divides an answer's log likelihood by its
length. The average is that of acc.
"""
import os
import sys

# This file has the name of the package that it needs.
sys.path = [folder for folder in sys.path if os.path.realpath(folder) != os.path.dirname(os.path.realpath(__file__))]

import argparse
import importlib.util
import pathlib

PAPER = "piqa,boolq,hellaswag,winogrande,arc_easy,arc_challenge"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def need_packages():
    missing = [name for name in ("lm_eval", "torch", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'lm_eval.py needs the packages that are missing here: {", ".join(missing)}: pip install "lm-eval[hf]"')


def evaluate(args):
    """lm-eval's results: for each task its metrics, as "acc,none" and "acc_stderr,none"."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = simple_evaluate(
        model="hf", model_args={"pretrained": str(args.directory), "dtype": "auto"}, tasks=args.tasks.split(","),
        num_fewshot=0, batch_size=args.batch_size, device=device, limit=args.limit, log_samples=False,
        task_manager=TaskManager(include_path=str(args.include) if args.include else None))
    return found["results"]


def print_table(results):
    names = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    print("task                 acc    stderr  acc_norm    stderr")
    for task, metrics in results.items():
        cells = [metrics.get(f"{name},none") for name in names]
        print(f"{task:14}" + "".join(f"{cell:10.4f}" if isinstance(cell, float) else f"{'-':>10}" for cell in cells))
    accuracies = [metrics["acc,none"] for metrics in results.values() if "acc,none" in metrics]
    if len(accuracies) > 1:
        print(f"{'average':14}{sum(accuracies) / len(accuracies):10.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, help="checkpoint with its tokenizer")
    parser.add_argument("--tasks", default=PAPER, help=f"names with commas between [{PAPER}]")
    parser.add_argument("--include", type=pathlib.Path, metavar="FOLDER", help="more tasks, as .yaml files")
    parser.add_argument("--device", help="as cuda:1 [cuda where there is one, else cpu]")
    parser.add_argument("--batch-size", default=8, help="sequences at a time, or auto [8]")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task, as a trial")
    args = parser.parse_args()
    need_packages()
    if not (args.directory / "config.json").is_file():
        sys.exit(f"{args.directory} is no checkpoint: it has no config.json")
    if not any((args.directory / name).is_file() for name in TOKENIZERS):
        sys.exit(f"{args.directory} has no tokenizer: copy that of the model, one of {', '.join(TOKENIZERS)}, into it")
    print_table(evaluate(args))


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f'lm_eval.py: {error}: pip install "lm-eval[hf]"')
