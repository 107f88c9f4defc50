#!/usr/bin/env python3
"""Cycles that a sparse accelerator would need for the layers of a pruned model. Needs the package numpy.

    python vitcod.py PRUNED/                 the work of each layer, counted in full
    python vitcod.py PRUNED/ --published     counted as the published code of the BESA paper does, to compare with its table

The accelerator is ViTCoD's, as the BESA paper simulates it (arXiv 2402.16880): one token's product with each layer, on
64 x 64 processing elements of one product a cycle. Columns of a weight (out, in) with more kept weights than a threshold
are dense: all their weights are multiplied. Of the other columns only kept weights are. Two engines share the elements'
64 columns by work, and the slower one's cycles count. The threshold is half of the rows at first, and moves by a tenth
of them, for five thresholds at most, until the dense columns have 40 to 60 % of the kept weights; the best one counts.
A dense layer takes all elements. Printed are means over blocks.

The published code differs, and --published does the same:
  - it counts a dense column's work as the inputs of the layer, not its outputs: wrong where the two differ, so in gate,
    up and down, and in k and v of grouped heads. gate of a 7B model is 4096 dense cycles there, 11008 here;
  - it cuts down into square pieces, and adds up their cycles: 10128 dense cycles for a 7B model, 11008 here;
  - it gives an engine no elements where its share is less than one column of them, and then counts no dense cycles;
  - it moves dense columns to the front, and rows of the same numbers with them, by way of number 200: what was there is
    merged with others, and rows moved past the last one are lost.
"""
import argparse
import json
import math
import pathlib
import re
import sys

try:
    import numpy as np
except ImportError as missing:
    sys.exit(f"vitcod.py needs the package numpy: pip install numpy ({missing})")

SIDE = 64                                   # processing elements in a row and in a column
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight$")
TYPES = {"F32": (np.uint32, 0x7fffffff), "F16": (np.uint16, 0x7fff), "BF16": (np.uint16, 0x7fff)}  # bits without the sign


# ---- checkpoint ----

def safetensors_files(directory):
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file() or not index.is_file():
        return [directory / "model.safetensors"]
    return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def read_masks(directory):
    """Yields (kind, array of bool (out, in): true where a weight is not zero) for each pruned kind of layer."""
    for path in safetensors_files(directory):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, tensor in header.items():
            layer = LAYER.search(name)
            if layer:
                if tensor["dtype"] not in TYPES:
                    sys.exit(f"{path}: {name} has type {tensor['dtype']}: expected one of {', '.join(TYPES)}")
                dtype, bits = TYPES[tensor["dtype"]]
                rows, cols = tensor["shape"]
                values = np.fromfile(path, dtype, rows * cols, offset=8 + size + tensor["data_offsets"][0])
                yield layer.group(1), (values.reshape(rows, cols) & bits) != 0


# ---- cycles ----

def engine_cycles(dense_work, dense_full, sparse_work, least):
    """The larger of two engines' cycles. Elements are shared by dense_full and sparse_work; the dense engine's work is
    counted as dense_work. An engine with work gets `least` columns of elements at least."""
    if dense_full + sparse_work == 0:
        return 0
    width = int(SIDE * (dense_full / (dense_full + sparse_work)))
    width = max(width, least) if dense_full else 0
    dense = math.ceil(dense_work / (width * SIDE)) if width else 0
    sparse = math.ceil(sparse_work / ((SIDE - width) * SIDE)) if width < SIDE else 0
    return max(dense, sparse)


def thresholds(kept, rows):
    """Yields which columns are dense. Single precision, as a threshold may be a whole number of kept weights."""
    ratio, total = 0.5, kept.sum()
    for _ in range(5):
        dense = kept > np.float32(ratio * rows)
        yield dense
        share = kept[dense].sum() / max(total, 1)
        if 0.4 < share < 0.6:
            return
        ratio += 0.1 if share >= 0.6 else -0.1


def sparse_cycles(mask):
    """Cycles of one product with a weight whose kept entries are true in mask (out, in)."""
    rows, kept = mask.shape[0], np.count_nonzero(mask, axis=0)
    return min(engine_cycles(rows * int(dense.sum()), rows * int(dense.sum()), int(kept[~dense].sum()), 1)
               for dense in thresholds(kept, rows))


def dense_cycles(rows, cols):
    return math.ceil(rows * cols / SIDE ** 2)


# ---- cycles as the published code counts them ----

def published_labels(dense, count):
    """The number that each row and column ends with, where dense column i goes to number i by way of number 200."""
    holds = [[number] for number in range(max(count, 201))]

    def move(source, target):
        if source != target:
            holds[target] += holds[source]
            holds[source] = []

    for i, column in enumerate(np.flatnonzero(dense)):
        move(i, 200)
        move(column, i)
        move(200, column)
    labels = np.empty(len(holds), int)
    for label, numbers in enumerate(holds):
        labels[numbers] = label
    return labels


def merge(mask, labels, axis):
    """Rows (axis 0) or columns of one label as one; also the labels that are left, ascending."""
    order = np.argsort(labels, kind="stable")
    left, first = np.unique(labels[order], return_index=True)
    return np.logical_or.reduceat(mask.take(order, axis), first, axis), left


def published_piece(mask):
    rows, cols = mask.shape
    kept = np.count_nonzero(mask, axis=0)
    best = math.inf
    for dense in thresholds(kept, rows):
        count = int(dense.sum())
        labels = published_labels(dense, max(rows, cols))
        moved, row = merge(mask, labels[:rows], 0)
        moved, column = merge(moved, labels[:cols], 1)
        sparse = np.count_nonzero(moved[row < rows][:, column >= count])
        best = min(best, engine_cycles(cols * count, rows * count, int(sparse), 0))
    return best


def published_pieces(rows, cols, kind):
    """The column ranges that the published code counts one by one."""
    step = rows if kind == "down" else cols
    return [(first, min(first + step, cols)) for first in range(0, cols, step)]


def published_sparse_cycles(mask, kind):
    return sum(published_piece(mask[:, first:last]) for first, last in published_pieces(*mask.shape, kind))


def published_dense_cycles(rows, cols, kind):
    return sum(math.ceil((last - first) ** 2 / SIDE ** 2) for first, last in published_pieces(rows, cols, kind))


# ---- table ----

def measure(masks, published):
    """For each kind of layer a list of (sparsity, dense cycles, cycles), one a block."""
    found = {}
    for kind, mask in masks:
        if published:
            cycles = published_dense_cycles(*mask.shape, kind), published_sparse_cycles(mask, kind)
        else:
            cycles = dense_cycles(*mask.shape), sparse_cycles(mask)
        found.setdefault(kind, []).append((1 - np.count_nonzero(mask) / mask.size, *cycles))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, help="pruned checkpoint")
    parser.add_argument("--published", action="store_true", help="count as the published code does")
    args = parser.parse_args()
    found = measure(read_masks(args.directory), args.published)
    if not found:
        sys.exit(f"{args.directory} has no layer of the names of Llama's")
    print("layer      sparsity  dense cycles  average cycles  speed-up")
    for kind in filter(found.get, KINDS):
        sparsity, dense, cycles = np.mean(found[kind], axis=0)
        speedup = dense / cycles if cycles else math.inf
        print(f"{kind + '_proj':10} {sparsity:8.4f}  {dense:12.0f}  {cycles:14.2f}  {speedup:7.2f}x")
    if args.published:
        print("counted as the published code does, which is not the work where inputs and outputs differ: see --help")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"vitcod.py: {type(error).__name__}: {error}")
