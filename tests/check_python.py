#!/usr/bin/env python3
"""examples/python: besa.h from Python, installed by pip from a copy, and the programs beside it.

    check_python.py REPOSITORY STORIES260K

Prints SKIP for what needs packages that are not installed.
"""
import gc
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile

from check_examples import FAILED, missing, np, run, verdict

DATA = {"nsamples": 64, "seqlen": 64, "progress": False}


def install(repository, work):
    """pip install of a copy, into a directory of its own: nothing is left in the sources. What failed, or None."""
    source = work / "source"
    shutil.copytree(repository / "examples" / "python", source / "examples" / "python",
                    ignore=shutil.ignore_patterns("build", "*.egg-info"))
    shutil.copy(repository / "besa.h", source)
    done = run("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "--target", work / "site",
               source / "examples" / "python")
    verdict("pip install ./examples/python", (done.returncode, done.stderr[-3000:] if done.returncode else ""), (0, ""))
    sys.path[:0] = [str(work / "site"), str(repository / "examples" / "python")]
    os.environ["PYTHONPATH"] = str(work / "site")
    return done.returncode == 0


def raised(function, *arguments, **keywords):
    """The type's name and the text of what a call raises."""
    try:
        function(*arguments, **keywords)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def says(name, found, *expected):
    verdict(name, found if not all(word in found for word in expected) else expected, expected)


# ---- whole checkpoints ----

def check_prune(besa, program, stories, work):
    tokens, trace = stories / "calibration_tokens.npy", []
    report = besa.prune(stories, work / "pruned", tokens, trace=trace.append, rates=work / "rates", **DATA)
    verdict("besa.prune returns the report", (report["sparsity"], report["options"]["target"], len(report["blocks"])),
            (0.5, 0.5, 5))
    verdict("besa.prune calls trace after every learning step", ([(t["block"], t["step"]) for t in trace],
            all(t["loss"] > 0 and t["d"] > 0 and 0 < t["mean_rate"] < 1 and t["steps"] == 64 and 0 <= t["penalty"] < 1 and
                t["lr"] == 1 and t["weight_lr"] is None for t in trace)),
            ([(block, step) for block in range(5) for step in range(1, 65)], True))
    raw = (work / "rates").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    alpha = {name: np.frombuffer(raw[begin:][slice(*tensor["data_offsets"])], np.float32)
             for name, tensor in json.loads(raw[8:begin]).items() if name.startswith("model.layers.0.") and name.endswith(".alpha")}
    weights = {layer["name"]: layer["weights"] for layer in report["blocks"][0]["layers"]}
    mean = sum(rates.mean() * weights[".".join(name.split(".")[3:5])] for name, rates in alpha.items()) / sum(weights.values())
    verdict("besa.prune writes the learned rates", (len(alpha), abs(mean - report["blocks"][0]["mean_rate"]) < 1e-6,
            (work / "pruned/besa-rates").exists()), (7, True, False))
    if program.exists():
        subprocess.run([program, "prune", stories, work / "by-program", "--tokens", tokens, "--nsamples", "64", "--seqlen", "64",
                        "--quiet", "--save-rates", work / "by-program.rates"], check=True, capture_output=True)
        verdict("besa.prune writes the command line program's bytes",
                [(work / a).read_bytes() == (work / b).read_bytes() for a, b in (("rates", "by-program.rates"),
                 ("pruned/model.safetensors", "by-program/model.safetensors"))], [True, True])
    else:
        print("SKIP besa.prune writes the command line program's bytes: examples/besa is not built")
    array = np.load(tokens)[: 64 * 64].reshape(64, 64)
    np.save(work / "array.npy", array.ravel())
    besa.prune(stories, work / "by-file", work / "array.npy", **DATA)
    besa.prune(stories, work / "by-array", array, sparsity=0.5, epochs=1, form="hierarchical", threads=1, progress=False)
    verdict("besa.prune takes tokens as an array, options by name and threads",
            (work / "by-file/model.safetensors").read_bytes() == (work / "by-array/model.safetensors").read_bytes(), True)
    text = stories / "test_tokens.npy"
    report = besa.prune(stories, None, tokens, pattern="2:4", method="wanda", skip=["v_proj"], fixed={"*.0.mlp.down_proj*": 0.25},
                        test=text, windows=4, **DATA)
    rates = [layer["sparsity"] for layer in report["blocks"][0]["layers"]]
    verdict("besa.prune takes pattern, skip, fixed and test, and writes nothing without output",
            ([round(rate, 2) for rate in rates], report["perplexity"] > 5), ([0.5, 0.5, 0, 0.5, 0.5, 0.5, 0.25], True))
    again = besa.prune(stories, None, tokens, method="wanda", skip="v_proj", **DATA)
    verdict("besa.prune takes one pattern of skip as it is", [layer["sparsity"] for layer in again["blocks"][1]["layers"]][2], 0)
    verdict("besa.prune writes no card, and keeps the source's", [(work / "pruned" / name).exists() for name in ("README.md", "README.dense.md")],
            [False, True])
    kept = besa.prune(stories, work / "kept", tokens, method="keep", masks=work / "pruned", **DATA)
    besa.save_masks(work / "pruned", work / "masks.safetensors")
    again = besa.prune(stories, work / "kept-again", tokens, method="keep", masks=work / "masks.safetensors", **DATA)
    verdict("besa.prune takes a file of masks", ((work / "kept" / "model.safetensors").read_bytes() ==
            (work / "kept-again" / "model.safetensors").read_bytes(), again["masks"]["name"], again["calibration"]["file"],
            len(again["calibration"]["sha256"])), (True, "masks.safetensors", "calibration_tokens.npy", 64))
    verdict("besa.prune takes masks", (kept["sparsity"], besa.masks(work / "kept").keys() == besa.masks(work / "pruned").keys()),
            (0.5, True))
    report = besa.prune(stories, None, tokens, preset="published-row", method="besa", block_targets=[.3, .35, .4, .45, .5],
                        nsamples=8, seqlen=64, progress=False)
    verdict("besa.prune takes a preset and sparsities of blocks",
            ([block["target"] for block in report["blocks"]], report["options"]["zero_start"]), ([.3, .35, .4, .45, .5], 1))


def check_measures(besa, program, stories, work):
    pruned, text = work / "pruned", stories / "test_tokens.npy"
    found = besa.eval(pruned, text, seqlen=256, windows=10, progress=False)
    verdict("besa.eval: perplexity is exp of the mean of nll",
            (found.nll.shape, abs(np.exp(found.nll.mean()) / found.perplexity - 1) < 1e-9), ((10,), True))
    ids = np.load(text).ravel()[:512].reshape(2, 256)
    logits = besa.logits(pruned, ids).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits[:, :-1], ids[:, 1:, None], 2)[..., 0]
    nll = (np.log(np.exp(logits - top).sum(-1)) + top[..., 0])[:, :-1] - chosen
    verdict("besa.logits agrees with besa.eval", bool(np.allclose(nll.mean(1), found.nll[:2], rtol=1e-5)), True)
    information, masks, rates = besa.info(pruned), besa.masks(pruned), besa.rates(pruned)
    verdict("besa.masks are the zeros that besa.info counts",
            (sum(int((~mask).sum()) for mask in masks.values()), [layer["name"] for layer in information["layers"]]),
            (information["zeros"], list(masks)))
    worst = max(abs(rate.mean() - (1 - masks[name].mean())) for name, rate in rates.items())
    verdict("besa.rates are those of rows", (worst < 1e-9, rates["model.layers.0.mlp.down_proj.weight"].shape), (True, (64,)))
    plan = besa.plan(stories, nsamples=64, seqlen=256)
    if program.exists():
        said = json.loads(subprocess.run([program, "info", "--json", pruned], capture_output=True, text=True).stdout)
        for layer in information["layers"]:
            layer["sparsity"] = round(layer["sparsity"], 6)
        information["sparsity"] = round(information["sparsity"], 6)
        verdict("besa.info says what the command line program says", information, said)
        said = subprocess.run([program, "plan", stories, "--nsamples", "64", "--seqlen", "256"], capture_output=True,
                              text=True).stdout
        words = [f"{plan['memory'] / 1e6:.3g} MB", f"{plan['disk'] / 1e6:.3g} MB", f"{plan['flop'] / 1e9:.3g} GFLOP"]
        says("besa.plan says what the command line program says", said, *words)
    rows = besa.compare(stories, stories / "calibration_tokens.npy", text, sparsity=[0.5, 0.6], method=["wanda", "besa:best"],
                        windows=10, weight_epochs=1, epochs=1, **DATA)
    verdict("besa.compare has a row for each run", [(row["method"], row["sparsity"]) for row in rows],
            [("dense", 0), ("wanda", .5), ("wanda", .6), ("besa:best", .5), ("besa:best", .6)])
    alone = besa.prune(stories, None, stories / "calibration_tokens.npy", method="wanda", test=text, windows=10, **DATA)
    verdict("besa.compare measures what besa.prune measures",
            (float(f"{rows[1]['perplexity']:.9g}"), rows[3]["perplexity"] < 0.5 * rows[1]["perplexity"]), (alone["perplexity"], True))
    whole = besa.prune(stories, work / "wanda", stories / "calibration_tokens.npy", method="wanda", **DATA)
    apart = besa.divergence(work / "wanda", stories, text, seqlen=DATA["seqlen"], windows=10, progress=False)
    verdict("besa.divergence of an output is what besa.compare says", {name: rows[1][name] for name in apart}, apart)
    found = besa.eval(work / "wanda", text, seqlen=DATA["seqlen"], windows=10, progress=False)
    verdict("besa.eval has the standard error of perplexity", (round(found.error, 9), whole["sparsity"]),
            (round(apart["perplexity_error"], 9), rows[1]["reached"]))
    verdict("besa.compare holds the better method nearer", rows[3]["kl"] < rows[1]["kl"] and rows[3]["same_top"] > rows[1]["same_top"], True)
    if missing("pandas"):
        return print("SKIP besa.compare as a DataFrame: no pandas")
    import pandas
    frame = pandas.DataFrame(rows).pivot(index="method", columns="sparsity", values="perplexity")
    verdict("besa.compare as a DataFrame", frame.loc["wanda", 0.5], rows[1]["perplexity"])
    kl = pandas.DataFrame(rows).set_index(["method", "sparsity"])["kl"]
    verdict("besa.compare's divergences as a DataFrame", (kl["besa:best", 0.6], np.isnan(kl["dense", 0.0])), (rows[4]["kl"], True))


def check_readme(repository, stories, work):
    """The lines of examples/README.md, on less."""
    text = (repository / "examples/README.md").read_text().split("```python\n")[1].split("```")[0]
    for old, new in (("MODEL", stories), ("PRUNED", work / "readme"), ("calibration.npy", stories / "calibration_tokens.npy"),
                     ("wikitext2.npy", stories / "test_tokens.npy"), ("nsamples=128, seqlen=2048", "nsamples=4, seqlen=64"),
                     ("seqlen=2048", "seqlen=256"), ('method=["wanda", "besa"]', 'method=["wanda"], nsamples=4, seqlen=64, windows=4')):
        verdict(f"examples/README.md has {old}", old in text, True)
        text = text.replace(old, str(new))
    done = run("-c", text)
    words = done.stdout.split()
    verdict("examples/README.md: its lines of Python run", (words[:1], len(words), done.stderr), (["0.5"], 2, ""))


def check_compare(besa, stories, work):
    """What besa.compare refuses, before it computes anything; and what it takes."""
    tokens, begun = stories / "calibration_tokens.npy", []

    def compare(**keywords):
        return raised(besa.compare, stories, tokens, tokens, **{**DATA, "nsamples": 2, "windows": 1, "progress": begun.append, **keywords})

    for name, keywords, words in (("an option of the last row alone", {"method": ["wanda", "keep"]}, "Error: masks is NULL"),
                                  ("a preset that there is not", {"method": ["wanda", "besa:beast"]}, "beast"),
                                  ("a method that there is not", {"method": ["wanda", "bes"]}, "ValueError: method is 'bes'"),
                                  ("a sparsity that is none", {"sparsity": [.5, 1.5], "method": ["wanda"]}, "Error: target is 1.5"),
                                  ("an option that there is not", {"epoch": 2}, "TypeError: there is no option 'epoch'"),
                                  ("a preset beside the methods", {"preset": "best"}, "presets stand in the names of methods"),
                                  ("masks without method keep", {"method": ["wanda"], "masks": work / "pruned"}, "ValueError: masks are given, but method is wanda")):
        begun.clear()
        says(f"besa.compare refuses {name}", compare(**keywords), words)
        verdict(f"besa.compare refuses {name} before it computes", begun, [])
    data = {**DATA, "nsamples": 2, "windows": 1}
    rows = besa.compare(stories, tokens, tokens, method=["keep", "wanda"], masks=work / "pruned", sparsity=[.6], **data)
    verdict("besa.compare gives masks to method keep alone", [(row["method"], round(row["reached"], 1)) for row in rows[1:]],
            [("keep", .5), ("wanda", .6)])
    rows = besa.compare(stories, tokens, tokens, method="wanda", sparsity=.5, skip="v_proj", **data)
    verdict("besa.compare takes one method, sparsity and pattern as they are", [(row["method"], row["sparsity"]) for row in rows[1:]], [("wanda", .5)])


def check_errors(besa, stories, work):
    tokens = stories / "calibration_tokens.npy"

    def prune(**keywords):
        return raised(besa.prune, stories, None, tokens, **{**DATA, **keywords})

    says("an error of the library names the file", raised(besa.info, work / "nowhere"), "Error: ", "nowhere")
    error = None
    try:
        besa.info(work / "nowhere")
    except besa.Error as caught:
        error = caught
    verdict("an error has the library's code", error.code != 0, True)
    says("an option out of range", prune(sparsity=1.5), "Error: ", "target is 1.5", "above 0 and below 1")
    says("an option that does not exist", prune(sparsty=.5), "TypeError: ", "sparsty")
    for name, call in (("prune", prune), ("plan", lambda **keywords: raised(besa.plan, stories, tokens, **keywords)),
                       ("Rates", lambda **keywords: raised(besa.Rates, [(6, 16)], **keywords)),
                       ("compare", lambda **keywords: raised(besa.compare, stories, tokens, tokens, **{**DATA, "windows": 1, **keywords}))):
        says(f"besa.{name}: target is sparsity", call(target=.5), "TypeError: target is no keyword here: give sparsity")
    for name, call in (("prune", besa.prune), ("plan", besa.plan)):
        paths = (stories, None, tokens) if name == "prune" else (stories, tokens)
        says(f"besa.{name}: masks have their own sparsity", raised(call, *paths, method="keep", masks=work / "pruned", sparsity=0.7),
             "ValueError: sparsity is 0.7, but masks have one of their own")
    says("masks without method keep", prune(masks=work / "pruned", method="wanda"), "Error: masks are given, but method wanda makes its own")
    check_compare(besa, stories, work)
    says("a word that an option does not have", prune(method="wand"), "ValueError: method is 'wand'", "besa, wanda")
    says("a fraction for a whole number", prune(epochs=1.5), "ValueError: epochs is 1.5", "whole number")
    says("too many sequences", prune(nsamples=10 ** 6), "ValueError: tokens: 1000000 sequences")
    says("tokens that are not whole numbers", raised(besa.eval, stories, np.zeros(300)),
         "ValueError: tokens have 1 dimensions of float64")
    says("tokens outside of the vocabulary", raised(besa.eval, stories, np.full(300, 512), progress=False), "Error: ", "512")
    (work / "there").mkdir()
    says("an output that exists", raised(besa.prune, stories, work / "there", tokens, **DATA), "Error: ", "there")
    verdict("0 is not the default where it means something", besa.prune(stories, None, tokens, penalty=0, group_rows="all",
            **{**DATA, "nsamples": 2})["options"]["penalty"], 0)
    table = besa.options()
    verdict("besa.options has what `besa prune` has",
            (table["method"]["values"][:2], table["epochs"]["default"], table["warmup"]["range"], "target" in table),
            (["besa", "wanda"], 1.0, "0 or more and below 1", False))


def check_stopping(besa, stories, work):
    """Ctrl-C in the middle, an exception of a callback, a bar."""
    tokens, seen = stories / "calibration_tokens.npy", []

    def interrupt(progress):
        if progress["fraction"] > 0.5 and not seen:
            seen.append(progress)
            signal.raise_signal(signal.SIGINT)

    arguments = {**DATA, "progress": interrupt, "rates": work / "stopped-rates"}
    signal.signal(signal.SIGINT, signal.default_int_handler)    # it is ignored where tests were started in the background
    found = raised(besa.prune, stories, work / "stopped", tokens, **arguments)
    verdict("Ctrl-C stops besa.prune", (found, (work / "stopped").exists(), (work / "stopped.partial").exists()),
            ("KeyboardInterrupt: ", False, True))
    again = []
    report = besa.prune(stories, work / "stopped", tokens, **{**arguments, "progress": again.append})
    verdict("the same call goes on and writes the same bytes", (report["resumed_blocks"] > 0,
            (work / "stopped/model.safetensors").read_bytes() == (work / "pruned/model.safetensors").read_bytes(),
            (work / "stopped-rates").read_bytes() == (work / "rates").read_bytes()), (True, True, True))
    verdict("progress tells of block, pass and time", (sorted(seen[0]), seen[0]["blocks"]),
            (["block", "blocks", "fraction", "pass", "resumed_blocks", "seconds", "seconds_left"], 5))
    verdict("progress tells of the blocks that were taken over", (seen[0]["resumed_blocks"], {p["resumed_blocks"] for p in again}),
            (0, {report["resumed_blocks"]}))

    def fail(_):
        raise LookupError("mine")

    verdict("what progress raises comes out", raised(besa.eval, stories, tokens, seqlen=256, progress=fail), "LookupError: mine")
    verdict("what trace raises comes out", raised(besa.prune, stories, None, tokens, **DATA, trace=fail), "LookupError: mine")
    if missing("tqdm"):
        return print("SKIP a bar of tqdm's: no tqdm")
    program = "import sys, besa; besa.eval(sys.argv[1], sys.argv[1] + '/test_tokens.npy', seqlen=256)"
    verdict("no bar where stderr is no terminal", run("-c", program, stories).stderr, "")
    import tqdm.auto
    bars, own = [], tqdm.auto.tqdm

    class Bar(own):
        def __init__(self, **keywords):
            bars.append(self)
            super().__init__(**{**keywords, "disable": False, "file": open(os.devnull, "w")})

    tqdm.auto.tqdm = Bar
    besa.eval(stories, tokens, seqlen=256)
    tqdm.auto.tqdm = own
    verdict("a bar of tqdm's", (len(bars), round(bars[0].n), "block 5/5" in bars[0].postfix), (1, 100, True))


# ---- level 3 ----

def check_rates(besa):
    random = np.random.default_rng(1)
    w, x = (random.standard_normal(shape).astype(np.float32) for shape in ((6, 16), (40, 16)))
    w[0, 3] = 0
    rates = besa.Rates([(6, 16)], sparsity=0.5, form="row", d_coef=1)
    rates.rank(0, w, statistic=(x * x).sum(0))
    rates.forward()
    score = np.abs(w) * np.sqrt((x * x).sum(0))
    rank = np.argsort(np.argsort(score, 1, kind="stable"), 1)
    alpha, n = rates.read(0)
    pruned = rates.mask(0, w, np.full_like(w, np.nan))
    verdict("besa.Rates begins with the smallest scores of every row", (np.array_equal(pruned, np.where(rank >= 8, w, 0)),
            n.tolist(), bool(np.allclose(alpha, 0.5))), (True, [8] * 6, True))
    verdict("besa.Rates.kept", np.array_equal(rates.kept(0), rank >= 8), True)
    dw = random.standard_normal((6, 16)).astype(np.float32)
    for _ in range(3):
        rates.forward()
        rates.gradient(0, w, dw)
        rates.step()
    theta = rates.theta
    before = theta.copy()
    theta[:101] += np.linspace(2, -2, 101, dtype=np.float32)  # row 0 prunes more
    rates.forward()
    verdict("theta is the library's own memory",
            (bool(np.any(before)), np.array_equal(rates.theta, theta), rates.read(0)[1][0] > 8), (True, True, True))
    rates.project()
    verdict("besa.Rates.project has the count exactly", int(rates.read(0)[1].sum()), 48)
    verdict("besa.Rates.status", (rates.status()[0] > 1e-6, 0 < rates.status()[1] < 1), (True, True))
    for name, call, expected in (
            ("dtype", lambda: rates.mask(0, w.astype(np.float64), w), "w is float64 (6, 16), expected float32 (6, 16)"),
            ("shape", lambda: rates.gradient(0, w, dw[:5]), "dw is float32 (5, 16), expected float32 (6, 16)"),
            ("contiguity", lambda: rates.mask(0, np.asfortranarray(w), w), "ValueError: w is not contiguous"),
            ("type", lambda: rates.mask(0, [1, 2], w), "TypeError: w is a list"),
            ("layer", lambda: rates.kept(1), "IndexError: layer 1 of 1"),
            ("statistic", lambda: rates.rank(0, w), "ValueError: importance wanda wants a statistic"),
            ("option", lambda: besa.Rates([(6, 16)], form="rows"), "ValueError: form is 'rows'"),
            ("range", lambda: besa.Rates([(6, 16)], candidates=0.5), "ValueError: candidates is 0.5")):
        says(f"besa.Rates refuses a wrong {name}", raised(call), expected)
    for importance, relative, power in (("wanda", 0, .5), ("relative", 1, .25)):
        other = besa.Rates([(6, 16)], sparsity=0.5, form="row", d_coef=1)
        other.rank(0, w, importance, (x * x).sum(0))
        other.forward()
        score = np.abs(w) * ((x * x).sum(0)) ** power
        if relative:
            score *= 1 / np.abs(w).sum(0) + 1 / np.abs(w).sum(1, keepdims=True)
        rank = np.argsort(np.argsort(score, 1, kind="stable"), 1)
        verdict(f"besa.Rates ranks by {importance}", np.array_equal(other.kept(0), rank >= 8), True)
    says("besa.Rates has no gradients to rank by", raised(rates.rank, 0, w, "gradient", (x * x).sum(0)), "importance is gradient")
    read_only = np.zeros_like(w)
    read_only.flags.writeable = False
    says("besa.Rates writes into nothing that is read-only", raised(rates.mask, 0, w, read_only),
         "ValueError: pruned cannot be written to")
    del rates
    gc.collect()
    verdict("theta outlives its besa.Rates", bool(np.isfinite(theta).all()), True)
    half = besa.Rates([(6, 16), (4, 16)], dtype="float16", form="layer")
    half.rank(1, np.ones((4, 16), np.float16), "magnitude")
    half.fix(0, 0.25)
    half.rank(0, w.astype(np.float16), "magnitude")
    half.project()
    verdict("besa.Rates takes half floats, several layers and a layer that is fixed",
            [int((~half.kept(i)).sum()) for i in (0, 1)], [24, 32])


def differentiable(torch, theta, weights, ranks, target, scales, penalty):
    """The pruned weights and the penalty in torch's own operations, from the formulas of besa.h: hierarchical rates with
    groups of a row, D = 10."""
    p = 1 - torch.arange(11, dtype=torch.float64) / 10
    low, high = -100.0, 100.0
    for _ in range(200):                    # c: where all logits are 0 the mean rate is the target
        tilt = (low + high) / 2
        mean = float((torch.softmax(tilt * p, 0) * p).sum())
        low, high = (tilt, high) if mean < target else (low, tilt)
    out, at, mean, count = [], 0, 0, sum(w.numel() for w in weights)
    for w, rank in zip(weights, ranks):
        rows, columns = w.shape
        own = theta[at: at + 11 * (1 + rows)].reshape(1 + rows, 11).double()
        at += 11 * (1 + rows)
        u = torch.sigmoid(own) - 0.5
        beta = torch.softmax(tilt * p + scales[0] * u[0] + scales[1] * u[1:], 1)
        alpha = beta @ p
        mean = mean + alpha.sum() * columns / count
        k = (10 - torch.arange(11)) * columns // 10
        keep = 1 - (beta[:, None, :] * (rank[:, :, None] < k)).sum(-1)
        hard = rank >= torch.floor(alpha * columns)[:, None]
        straight = w.detach().double() * (hard + keep - keep.detach())  # the mask's value, the probability's gradient
        out.append(straight + (w.double() * hard - (w.double() * hard).detach()))
    return out, penalty * ((mean - target) / target) ** 2


def check_torch(besa, repository, stories, work):
    if missing("torch"):
        return print("SKIP besa.Rates in torch: no torch")
    import torch
    from torch_layer import MaskedWeights
    torch.manual_seed(3)
    for target, penalty in ((0.5, 0), (0.5, 1), (0.3, 2)):
        x = torch.randn(50, 20)
        weights = [torch.randn(8, 20, requires_grad=True), torch.randn(5, 8, requires_grad=True)]
        scales = (1.5, 3.0)
        rates = besa.Rates([w.shape for w in weights], sparsity=target, layer_scale=scales[0], row_scale=scales[1],
                           candidates=10, penalty=penalty)
        statistic = (x * x).sum(0)
        rates.rank(0, weights[0].detach(), statistic=statistic)
        rates.rank(1, weights[1].detach(), "magnitude")
        ranks = [torch.argsort(torch.argsort(score, dim=1, stable=True), dim=1)
                 for score in (weights[0].detach().abs() * statistic.sqrt(), weights[1].detach().abs())]
        theta = torch.from_numpy(rates.theta)
        theta += torch.randn_like(theta)
        theta.requires_grad_()

        def loss_of(first, second):
            return (torch.nn.functional.silu(x.to(first.dtype) @ first.T) @ second.T).square().mean()

        loss = loss_of(*MaskedWeights.apply(theta, rates, *weights))
        found = torch.autograd.grad(loss, [theta, *weights])
        pruned, extra = differentiable(torch, theta, weights, ranks, target, scales, penalty)
        other = loss_of(*pruned)
        expected = torch.autograd.grad(other + extra, [theta, *weights])
        close = [bool(torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5 * float(b.abs().max())))
                 for a, b in zip(found, expected)]
        verdict(f"MaskedWeights against torch's autograd, sparsity {target}, lambda {penalty}",
                (abs(loss.item() - other.item()) < 1e-5 * other.item(), close), (True, [True] * 3))
    w = torch.randn(4, 8).to(torch.bfloat16)
    rates = besa.Rates([w.shape], dtype="bfloat16")
    rates.rank(0, w, "magnitude")
    rates.forward()
    place = w.data_ptr()
    pruned = rates.mask(0, w, w)
    verdict("besa.Rates prunes a bfloat16 tensor where it lies", (pruned.data_ptr() == place, int((w == 0).sum())), (True, 16))
    done = run(repository / "examples/python/torch_layer.py")
    losses = [float(line.split("loss")[1].split()[0]) for line in done.stdout.splitlines()]
    verdict("torch_layer.py learns", (losses and losses[-1] < 0.5 * losses[0], done.stdout.split()[-1:], done.stderr),
            (True, ["0.5000"], ""))
    check_finetune(besa, repository, stories, work)


def check_finetune(besa, repository, stories, work):
    if missing("transformers", "safetensors"):
        return print(f"SKIP finetune_sparse.py: no {missing('transformers', 'safetensors')}")
    done = run(repository / "examples/python/finetune_sparse.py", work / "pruned", work / "tuned",
               stories / "calibration_tokens.npy", "--steps", 30, "--lr", 1e-3)
    if done.returncode:
        return verdict("finetune_sparse.py", done.stderr[-2000:], "")
    before, after = besa.masks(work / "pruned"), besa.masks(work / "tuned")
    verdict("finetune_sparse.py holds zeros, and no other weight becomes one",
            (before.keys() == after.keys(), all(np.array_equal(before[name], after[name]) for name in before)), (True, True))
    text = stories / "test_tokens.npy"
    scores = [besa.eval(work / name, text, seqlen=256, windows=40, progress=False).perplexity for name in ("pruned", "tuned")]
    verdict("finetune_sparse.py improves the model", scores[1] < 0.8 * scores[0], True)


def numbers(text):
    """Of lines that are numbers alone, and those of each step."""
    lines = [line.replace("step", "").replace(": L =", "").replace(", pruned", "").replace(" of", "") for line in text.splitlines()]
    return [[float(word) for word in line.split()] for line in lines
            if line.strip() and not any(c.isalpha() and c != "e" for c in line)]


def check_distributed(besa, repository, stories, work):
    name = "torch_distributed.py prunes in two processes as one does"
    if missing("torch"):
        return print(f"SKIP {name}: no torch")
    tokens, test = stories / "calibration_tokens.npy", stories / "test_tokens.npy"
    found = run("-m", "torch.distributed.run", "--nproc-per-node", "2", repository / "examples/python/torch_distributed.py", stories,
                work / "distributed", "--tokens", tokens, "--test", test, "nsamples=24", "seqlen=32", "batch_size=4", "windows=5",
                "test_seqlen=64", "threads=1", "skip=layers.0")
    report = besa.prune(stories, None, tokens, test=test, nsamples=24, seqlen=32, batch_size=4, windows=5, test_seqlen=64,
                        skip=["layers.0"], progress=False)
    value = found.stdout.split("perplexity ")[-1].strip()
    near = found.returncode == 0 and abs(float(value) / report["perplexity"] - 1) < 3e-3
    verdict(name, (near, "" if near else found.stdout + found.stderr[-3000:]), (True, ""))


def check_by_hand(repository):
    if missing("numpy"):
        return print("SKIP besa_by_hand.py: no numpy")
    found = run(repository / "examples/python/besa_by_hand.py")
    expected = numbers((repository / "tests/data/besa_by_hand.txt").read_text())
    same = [len(a) == len(b) and np.allclose(a, b, rtol=2e-3, atol=1e-9) for a, b in zip(numbers(found.stdout), expected)]
    verdict("besa_by_hand.py prints the numbers of besa_by_hand.c", (len(expected) > 80, len(same), all(same), found.stderr),
            (True, len(expected), True, ""))


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    repository, stories = (pathlib.Path(path).resolve() for path in sys.argv[1:])
    check_by_hand(repository)
    if missing("numpy", "cffi", "setuptools", "pip"):
        print(f"SKIP examples/python: no {missing('numpy', 'cffi', 'setuptools', 'pip')}")
        sys.exit(bool(FAILED))
    if not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists():
        print("SKIP examples/python: no Python.h (Debian: python3-dev)")
        sys.exit(bool(FAILED))
    with tempfile.TemporaryDirectory() as temp:
        work = pathlib.Path(temp)
        if install(repository, work):
            import besa
            program = repository / "examples" / "besa"
            check_prune(besa, program, stories, work)
            check_measures(besa, program, stories, work)
            check_readme(repository, stories, work)
            check_errors(besa, stories, work)
            check_stopping(besa, stories, work)
            check_rates(besa)
            check_torch(besa, repository, stories, work)
            check_distributed(besa, repository, stories, work)
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
