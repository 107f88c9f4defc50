#!/usr/bin/env python3
"""Make token files for besa out of text. Needs the packages tokenizers and numpy.

    python tokenize.py text.txt tokens.npy --tokenizer llama/           the file as it is, one stream
    python tokenize.py wiki.txt tokens.npy --tokenizer llama/ --join '\\n\\n'
    python tokenize.py c4-train.00000-of-01024.json.gz tokens.npy --tokenizer llama/ --published
    python tokenize.py ptb.test.txt tokens.npy --tokenizer llama/ --test ptb
    python tokenize.py chats.jsonl tokens.npy --tokenizer llama-instruct/ --chat

Text is UTF-8. --join, --published and --test take it as documents: the fields "text" or "sentence" of .jsonl, .json,
.json.gz or .parquet (which needs pyarrow), else lines.
--published draws windows out of single documents with Python's generator, as the published code of the pruning papers
does, and writes them as a 2-D file (nsamples, seqlen), which besa takes as it stands.
--test makes the one stream that those papers measure perplexity on, from the test set's file:
    wikitext2  every line of WikiText-2's raw test set, blank ones too, joined by two newlines
    ptb        every sentence of the Penn Treebank's test set, joined by a space
    c4         the first 1100 documents of C4's validation set (its first file), joined by a space, cut to 256 windows
--chat is for instruct models: conversations, the fields "messages" (role, content) or "conversations" (from, value), through the
tokenizer's own chat template (transformers applies it, and jinja2). What the template begins a conversation with, as <s>, is there
once: nothing is added to it. Windows of a 2-D file (nsamples, seqlen) each begin with a conversation, and others follow until
the window is full; of the last one the rest is left out.
"""
import os
import sys

# This file has the name of a module of Python's library that others import: let them find theirs.
sys.path = [folder for folder in sys.path if os.path.realpath(folder) != os.path.dirname(os.path.realpath(__file__))]

import argparse
import gzip
import itertools
import json
import pathlib
import random


# what --test puts between documents; how many of them and how many windows it takes, None for all
TEST_SETS = {"wikitext2": ("\n\n", None, None), "ptb": (" ", None, None), "c4": (" ", 1100, 256)}


def has_fields(path):
    return path.suffix in (".jsonl", ".json", ".parquet") or path.name.endswith((".jsonl.gz", ".json.gz"))


def field(names):
    return "sentence" if "sentence" in names and "text" not in names else "text"


def read_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError as error:
        sys.exit(f"{path}: a .parquet file needs the package pyarrow: pip install pyarrow ({error})")
    table = pyarrow.parquet.read_table(path)
    return table[field(table.column_names)].to_pylist()


def read_documents(path, most=None):
    """The text of JSON lines or of Parquet's rows; else lines as the datasets library has WikiText's: with newline, blank
    ones empty. The first `most` of them, None for all."""
    if path.suffix == ".parquet":
        return read_parquet(path)[:most]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        if has_fields(path):
            rows = map(json.loads, itertools.islice(filter(str.strip, file), most))
            return [row[field(row)] for row in rows]
        return [line if line.strip() else "" for line in itertools.islice(file, most)]


def encode_test_set(path, name, encode, seqlen):
    separator, most, windows = TEST_SETS[name]
    documents = read_documents(path, most)
    if name == "ptb":
        documents = [sentence.strip() for sentence in documents]
    ids = encode(separator.join(documents))
    if most and (len(documents) < most or len(ids) < windows * seqlen):
        print(f"tokenize.py: {path} has {len(documents)} documents of {len(ids)} tokens: the papers take {most} of "
              f"{windows} x {seqlen}", file=sys.stderr)
    return ids[:windows and windows * seqlen]


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


ROLES = {"human": "user", "gpt": "assistant"}


def read_conversations(path):
    """Lists of messages {"role", "content"}."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [row["messages"] if "messages" in row else
            [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in row["conversations"]]
            for row in rows]


def pack(conversations, nsamples, seqlen):
    """Rows of seqlen ids that each begin with the next conversation; as many as the conversations fill."""
    rows, row = [], []
    for ids in conversations:
        row += ids
        if len(row) >= seqlen:
            rows.append(row[:seqlen])
            row = []
        if len(rows) == nsamples:
            break
    return rows


def apply_template(directory, conversations):
    try:
        import jinja2  # which transformers wants, and asks for late
        from transformers import AutoTokenizer
        assert jinja2
    except ImportError as error:
        sys.exit(f"--chat needs the packages transformers and jinja2: pip install transformers jinja2 ({error})")
    if not directory.is_dir():
        sys.exit(f"--chat: {directory} is no directory: the chat template lies beside tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not tokenizer.chat_template:
        sys.exit(f"{directory} has no chat template: calibrate a base model on text, without --chat")
    return (tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path, help="UTF-8 text, or JSON lines or Parquet with a field text")
    parser.add_argument("output", type=pathlib.Path, help=".npy file to write")
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True, help="tokenizer.json, or a directory with one")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--join", metavar="TEXT", help=r"put TEXT between documents; \n is a newline")
    ways.add_argument("--published", action="store_true", help="draw windows of single documents")
    ways.add_argument("--test", choices=TEST_SETS, help="a test set as the papers join it")
    ways.add_argument("--chat", action="store_true", help="conversations, through the tokenizer's chat template")
    parser.add_argument("--nsamples", type=int, default=128, help="windows of --published and --chat [128]")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of a window of these and of --test c4 [2048]")
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
    if not path.is_file() and (path.parent / "tokenizer.model").is_file():
        make = f't.AutoTokenizer.from_pretrained("{path.parent}").save_pretrained("{path.parent}")'
        sys.exit(f"{path} does not exist, tokenizer.model alone: make it, pip install transformers sentencepiece protobuf; "
                 f"python -c 'import transformers as t; {make}'")
    if not path.is_file():
        sys.exit(f"{path} does not exist: copy the tokenizer.json that belongs to the model")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=not args.no_special_tokens).ids

    if args.published:
        ids = draw_published(read_documents(args.text), encode, args.nsamples, args.seqlen, args.seed)
    elif args.chat:
        texts = apply_template(args.tokenizer, read_conversations(args.text))
        ids = pack((tokenizer.encode(text, add_special_tokens=False).ids for text in texts), args.nsamples, args.seqlen)
        if not ids:
            sys.exit(f"{args.text} does not fill one window of {args.seqlen} tokens")
        if len(ids) < args.nsamples:
            print(f"tokenize.py: {args.text} fills {len(ids)} windows of {args.seqlen} tokens, not {args.nsamples}", file=sys.stderr)
    elif args.test:
        ids = encode_test_set(args.text, args.test, encode, args.seqlen)
    elif args.join is not None or has_fields(args.text):
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
