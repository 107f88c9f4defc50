#!/usr/bin/env python3
"""Make token files for besa out of text. Needs the packages tokenizers and numpy.

    python tokenize.py text.txt tokens.npy --tokenizer llama/           the file as it is, one stream
    python tokenize.py wiki.txt tokens.npy --tokenizer llama/ --join '\\n\\n'
    python tokenize.py c4-train.00000-of-01024.json.gz tokens.npy --tokenizer llama/ --published

Text is UTF-8. --join and --published take it as documents: the "text" fields of .jsonl, .json or .json.gz, else lines.
--published draws windows out of single documents with Python's generator, as the published code of the pruning papers
does, and writes them as a 2-D file (nsamples, seqlen), which besa takes as it stands.
"""
import os
import sys

# This file has the name of a module of Python's library that others import: let them find theirs.
sys.path = [folder for folder in sys.path if os.path.abspath(folder) != os.path.dirname(os.path.abspath(__file__))]

import argparse
import gzip
import json
import pathlib
import random


def is_json(path):
    return path.suffix in (".jsonl", ".json") or path.name.endswith((".jsonl.gz", ".json.gz"))


def read_documents(path):
    """The text of JSON lines; else lines as the datasets library has WikiText's: with newline, blank ones empty."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        if is_json(path):
            return [json.loads(line)["text"] for line in file if line.strip()]
        return [line if line.strip() else "" for line in file]


def draw_published(documents, encode, nsamples, seqlen, seed):
    """For each sample random documents until one is longer than seqlen, then a random window of it."""
    random.seed(seed)
    too_short, rows = set(), []
    while len(rows) < nsamples:
        i = random.randint(0, len(documents) - 1)
        ids = [] if i in too_short else encode(documents[i])
        if len(ids) > seqlen:
            start = random.randint(0, len(ids) - seqlen - 1)
            rows.append(ids[start:start + seqlen])
        else:
            too_short.add(i)
            if len(too_short) == len(documents):
                sys.exit(f"no document is longer than {seqlen} tokens")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path, help="UTF-8 text, or JSON lines with a field text")
    parser.add_argument("output", type=pathlib.Path, help=".npy file to write")
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True, help="tokenizer.json, or a directory with one")
    parser.add_argument("--join", metavar="TEXT", help=r"put TEXT between documents; \n is a newline")
    parser.add_argument("--published", action="store_true", help="draw windows of single documents")
    parser.add_argument("--nsamples", type=int, default=128, help="windows of --published [128]")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of such a window [2048]")
    parser.add_argument("--seed", type=int, default=0, help="of --published [0]")
    parser.add_argument("--no-special-tokens", action="store_true", help="leave out what the tokenizer adds, as <s>")
    args = parser.parse_args()
    try:
        import numpy as np
        from tokenizers import Tokenizer
    except ImportError as error:
        sys.exit(f"tokenize.py needs the packages tokenizers and numpy: pip install tokenizers numpy ({error})")

    if args.output.suffix != ".npy":
        sys.exit(f"{args.output}: the output must end in .npy")
    path = args.tokenizer / "tokenizer.json" if args.tokenizer.is_dir() else args.tokenizer
    if not path.is_file():
        sys.exit(f"{path} does not exist")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=not args.no_special_tokens).ids

    if args.published:
        ids = draw_published(read_documents(args.text), encode, args.nsamples, args.seqlen, args.seed)
    elif args.join is not None or is_json(args.text):
        separator = (args.join or "").replace(r"\n", "\n").replace(r"\t", "\t")
        ids = encode(separator.join(read_documents(args.text)))
    else:
        ids = encode(args.text.read_text(encoding="utf-8"))
    array = np.array(ids, np.uint16 if tokenizer.get_vocab_size() < 65536 else np.int32)
    np.save(args.output, array)
    print(f"{args.output}: {' x '.join(map(str, array.shape))} tokens, {array.dtype}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"tokenize.py: {type(error).__name__}: {error} (JSON: one object with a field text on every line)")
