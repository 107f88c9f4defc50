#!/usr/bin/env python3
"""The Python programs of examples/, on small files made here.

    check_examples.py EXAMPLES STORIES260K

Prints SKIP for what needs packages that are not installed.
"""
import gzip
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

FAILED = []


def verdict(name, found, expected):
    good = found == expected
    print(f"{'PASS' if good else 'FAIL'} {name}{'' if good else f': {found!r}, expected {expected!r}'}", flush=True)
    if not good:
        FAILED.append(name)


def missing(*packages):
    return ", ".join(package for package in packages if importlib.util.find_spec(package) is None)


def run(program, *arguments):
    return subprocess.run([sys.executable, str(program), *map(str, arguments)], capture_output=True, text=True)


# ---- tokenize.py ----

def bytes_tokenizer(path):
    """Saves a tokenizer of one token a byte, with <s> before a text, and returns what turns tokens back into text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet + ["<s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(alphabet))])
    tokenizer.save(str(path))
    return lambda ids: tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def check_tokenize(examples, work):
    if missing("tokenizers", "numpy"):
        print(f"SKIP tokenize.py: no {missing('tokenizers', 'numpy')}")
        return
    import numpy as np
    text_of = bytes_tokenizer(work / "tokenizer.json")

    def tokens(path, *arguments):
        done = run(examples / "tokenize.py", path, work / "tokens.npy", "--tokenizer", work, *arguments)
        return (np.load(work / "tokens.npy"), done.stderr) if done.returncode == 0 else (None, done.stderr)

    def check(name, path, expected, *arguments):
        found, errors = tokens(path, *arguments)
        verdict(f"tokenize.py {name}", errors if found is None else (text_of(found), errors), (expected, ""))

    wiki = work / "wiki.txt"
    wiki.write_bytes(" \n = Title = \n \n Some text \u2014 more . \n".encode())
    check("takes a file as it is", wiki, "<s> \n = Title = \n \n Some text \u2014 more . \n")
    joined = "<s>\n\n = Title = \n\n\n\n\n Some text \u2014 more . \n"
    check("--test wikitext2 joins lines, blank ones empty, by two newlines", wiki, joined, "--test", "wikitext2")
    check("--join does the same", wiki, joined, "--join", r"\n\n")
    check("--no-special-tokens leaves out <s>", wiki, joined[3:], "--test", "wikitext2", "--no-special-tokens")
    ptb, sentences = work / "ptb.test.txt", work / "ptb.jsonl"
    ptb.write_text(" no it was n't black monday \n but while the <unk> N \n")
    sentences.write_text('{"sentence": "no it was n\'t black monday"}\n{"sentence": "but while the <unk> N"}\n')
    for path in (ptb, sentences):
        check(f"--test ptb joins sentences of {path.suffix} by one space", path,
              "<s>no it was n't black monday but while the <unk> N", "--test", "ptb")
    check_c4(check, tokens, work)
    check_parquet(check, work)
    found, errors = tokens(wiki, "--test", "ptb", "--join", " ")
    verdict("tokenize.py refuses --test with --join", found is None and "not allowed with" in errors, True)
    found, errors = tokens(wiki, "--published", "--seqlen", 100)
    verdict("tokenize.py --published refuses documents that are too short", (found, errors.strip()),
            (None, "no document is longer than 100 tokens"))


def check_c4(check, tokens, work):
    """256 windows of 16 are 4096 tokens: <s> and 4095 bytes out of documents of 6 with their space."""
    documents = [f"{i:05d}" for i in range(1200)]
    c4, few, long = (work / f"{name}.json.gz" for name in ("c4", "few", "long"))
    for path, texts in ((c4, documents), (few, documents[:3]), (long, ["0123456789"] * 400)):
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "url": "none"}) + "\n" for text in texts)
    check("--test c4 joins documents by a space and cuts them to 256 windows", c4, "<s>" + " ".join(documents)[:4095],
          "--test", "c4", "--seqlen", 16)
    found, errors = tokens(c4, "--test", "c4", "--seqlen", 2048)
    verdict("tokenize.py --test c4 takes 1100 documents", found is not None and found.size, 1100 * 6)
    verdict("tokenize.py --test c4 says where there is less than the papers' windows",
            errors, f"tokenize.py: {c4} has 1100 documents of 6600 tokens: the papers take 1100 of 256 x 2048\n")
    found, errors = tokens(few, "--test", "c4")
    verdict("tokenize.py --test c4 says how many documents there are", errors.split(" has ")[-1],
            "3 documents of 18 tokens: the papers take 1100 of 256 x 2048\n")
    found, errors = tokens(long, "--test", "c4", "--seqlen", 16)
    verdict("tokenize.py --test c4 says that documents are missing where the windows are full",
            (found is not None and found.size, errors.split(" has ")[-1]),
            (4096, "400 documents of 4400 tokens: the papers take 1100 of 256 x 16\n"))


def check_parquet(check, work):
    if missing("pyarrow"):
        print("SKIP tokenize.py reads Parquet: no pyarrow")
        return
    import pyarrow
    import pyarrow.parquet
    for column, name, expected in (("text", "wikitext2", "<s> = T = \n\n\n\n\n x \n"), ("sentence", "ptb", "<s>= T =  x")):
        path = work / f"{column}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({column: [" = T = \n", "", " x \n"]}), path)
        check(f"--test {name} reads Parquet", path, expected, "--test", name)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    examples = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as temp:
        check_tokenize(examples, pathlib.Path(temp))
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
