#!/usr/bin/env python3
"""What `besa prune` writes, loaded by transformers with no extra argument, has the perplexity that `besa eval` says.

    check_transformers.py BESA STORIES260K CHECKPOINTS CASES [MODEL TOKENS.npy]

BESA is the command line program, CHECKPOINTS a directory of small checkpoints, CASES one of folders with a model and
tokens.npy, and of families, MODEL one more checkpoint to try.
Needs torch, transformers and numpy, and compressed-tensors 0.12 for 2:4; prints SKIP without them.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
except ImportError as e:
    print(f"SKIP comparison with transformers: {e}")
    sys.exit(0)

TOLERANCE = 1e-3


def besa(program, *arguments):
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"besa {' '.join(map(str, arguments))}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def transformers_perplexity(directory, tokens, seqlen, windows):
    parts = "vision_config" in json.loads((pathlib.Path(directory) / "config.json").read_text())
    kind = AutoModelForImageTextToText if parts else AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor(tokens[: windows * seqlen].astype(np.int64)).view(windows, seqlen)
    total = 0.0
    with torch.no_grad():
        for row in ids:
            logits = model(row[None]).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, row[1:]).item()
    return float(np.exp(total / windows))


def check(program, source, tokens_file, method, extra, nsamples, seqlen, windows, work):
    name = f"transformers loads {source.name}, {method}{' ' + ' '.join(extra) if extra else ''}"
    output = work / f"{source.name}-{method}-{len(extra)}"
    try:
        if method == "dense":
            output = source
        else:
            besa(program, "prune", source, output, "--tokens", tokens_file, "--method", method, "--sparsity", 0.5,
                 "--nsamples", nsamples, "--seqlen", seqlen, *extra)
        ours = json.loads(besa(program, "eval", output, "--tokens", tokens_file, "--seqlen", seqlen, "--windows", windows,
                               "--json"))
        theirs = transformers_perplexity(output, np.load(tokens_file).reshape(-1), seqlen, windows)
        close = ours["windows"] == windows and abs(ours["perplexity"] / theirs - 1) < TOLERANCE
        print(f"{'PASS' if close else 'FAIL'} {name}: {ours['perplexity']:.5f}, transformers {theirs:.5f}", flush=True)
        return close
    except Exception as e:  # whatever stops one model must not stop the others
        print(f"FAIL {name}: {type(e).__name__}: {e}", flush=True)
        return False


def readme_python():
    """What the block of Python on quantised weights in examples/README.md defines."""
    text = (pathlib.Path(__file__).resolve().parent.parent / "examples" / "README.md").read_text()
    names = {}
    exec(text.split("## Quantised weights")[1].split("```python\n")[1].split("```")[0], names)
    return names


def check_codes(program, source, tokens_file, extra, work):
    """The lines of examples/README.md rebuild the weights of a quantised output from its codes."""
    name = f"codes of {source.name} {' '.join(extra)}"
    output = work / f"{source.name}-{'-'.join(extra)}"
    try:
        besa(program, "prune", source, output, "--tokens", tokens_file, "--nsamples", 8, "--seqlen", 64, *extra)
        model = AutoModelForCausalLM.from_pretrained(output, torch_dtype="auto").state_dict()
        wrong = count = 0
        for tensor, weight in readme_python()["quantised_weights"](output):
            wrong += int((torch.from_numpy(weight).to(model[tensor].dtype) != model[tensor]).sum())
            count += 1
        good = wrong == 0 and count > 0 and count % 7 == 0
        print(f"{'PASS' if good else 'FAIL'} {name}: {count} layers, {wrong} weights differ", flush=True)
        return good
    except Exception as e:
        print(f"FAIL {name}: {type(e).__name__}: {e}", flush=True)
        return False


def check_packed(program, source, tokens_file, extra, work):
    """A 2:4 output, packed as compressed-tensors stores 2:4 weights, and as CUTLASS reads them (in 16 bits, 64 rows and 32 columns),
    and unpacked again, is what it was, to the byte."""
    name = f"2:4 formats hold {source.name} {' '.join(extra)}"
    try:  # releases after 0.12 have no 2:4 formats any more
        from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskTensor
        from compressed_tensors.utils import (sparse_semi_structured_from_dense_cutlass,
                                              sparse_semi_structured_to_dense_cutlass)
    except ImportError as e:
        print(f"SKIP {name}: {e}", flush=True)
        return True
    output = work / f"{source.name}-packed-{'-'.join(extra)}"
    packed = wrong = 0
    try:
        besa(program, "prune", source, output, "--tokens", tokens_file, "--nsamples", 8, "--seqlen", 64, "--pattern", "2:4", *extra)
        for tensor, w in AutoModelForCausalLM.from_pretrained(output, torch_dtype="auto").state_dict().items():
            if not tensor.endswith("_proj.weight"):
                continue
            file = Sparse24BitMaskTensor.from_dense(w).dict(tensor)
            back = Sparse24BitMaskTensor.from_compressed_data(*(file[tensor.replace("weight", part)]
                                                                for part in ("shape", "compressed", "bitmask"))).decompress()
            wrong += not torch.equal(back.view(torch.uint8), w.view(torch.uint8))
            packed += 1
            half = w if w.dtype != torch.float32 else w.bfloat16()
            half = torch.nn.functional.pad(half, (0, -w.shape[1] % 32, 0, -w.shape[0] % 64))
            back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(half))
            wrong += not torch.equal(back.view(torch.uint8), half.view(torch.uint8))
        good = wrong == 0 and packed > 0 and packed % 7 == 0
        print(f"{'PASS' if good else 'FAIL'} {name}: {packed} layers, {wrong} differ", flush=True)
        return good
    except Exception as e:
        print(f"FAIL {name}: {type(e).__name__}: {e}", flush=True)
        return False


def main():
    if len(sys.argv) not in (5, 7):
        sys.exit(__doc__)
    program, stories, checkpoints, cases = (pathlib.Path(a).resolve() for a in sys.argv[1:5])
    good = True
    with tempfile.TemporaryDirectory() as temp:
        work = pathlib.Path(temp)
        for method, extra in (("dense", []), ("besa", []), ("wanda", []), ("sparsegpt", []), ("magnitude", []),
                              ("wanda", ["--pattern", "2:4"])):
            good &= check(program, stories, stories / "test_tokens.npy", method, extra, 16, 128, 20, work)
        for extra in (["--preset", "best"], ["--method", "wanda", "--preset", "weights"], ["--method", "sparsegpt"]):
            good &= check_packed(program, stories, stories / "test_tokens.npy", extra, work)
        for source in sorted(p for p in checkpoints.iterdir() if p.is_dir()):
            vocab = json.loads((source / "config.json").read_text())["vocab_size"]
            tokens = work / f"{source.name}.npy"
            np.save(tokens, np.random.default_rng(1).integers(0, vocab, 8 * 64).astype(np.uint16))
            for method in ("dense", "besa", "sparsegpt"):
                good &= check(program, source, tokens, method, [], 8, 64, 8, work)
            for extra in (["--bits", "4"], ["--bits", "8", "--group-size", "5"], ["--bits", "3", "--method", "sparsegpt"]):
                good &= check_codes(program, source, tokens, extra, work)
            good &= check_packed(program, source, tokens, ["--preset", "best"], work)
        for case in sorted(p for p in cases.iterdir() if (p / "model").is_dir()):
            source = work / case.name  # of the case's name; transformers may refuse the dense one
            source.symlink_to(case / "model")
            good &= check(program, source, case / "tokens.npy", "besa", [], 4, 64, 4, work)
        for source in sorted(p for p in (cases / "families").iterdir()):
            for method, extra in (("dense", []), ("besa", ["--preset", "best", "--learn-vectors"]), ("wanda", [])):
                good &= check(program, source, source / "ids_96.npy", method, extra, 3, 96, 3, work)
        if len(sys.argv) == 7:
            model, tokens = (pathlib.Path(a).resolve() for a in sys.argv[5:7])
            for method in ("dense", "besa"):
                good &= check(program, model, tokens, method, [], 4, 256, 4, work)
    sys.exit(not good)


if __name__ == "__main__":
    main()
