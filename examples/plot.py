#!/usr/bin/env python3
"""Pictures of what besa did. Needs matplotlib and numpy.

    plot.py layers   REPORT.json            -o layers.png      sparsity of every layer, block by block
    plot.py rates    PRUNED                 -o rates.png       how the sparsities of rows are spread, by kind of layer
    plot.py learning TRACE.jsonl            -o learning.png    loss over the learning steps, a line for each block
    plot.py losses   REPORT.json            -o losses.png      each block's loss: uniform masks, before and after learning
    plot.py compare  TABLE [TABLE ...]      -o compare.png     perplexity over sparsity, a line for each method
    plot.py cost     TABLE.json [...]       -o cost.png        perplexity over the work of pruning, a mark for each method
    plot.py study    TABLE.json [...]       -o study.png       perplexity over the values of one option
    plot.py memory   PLAN [PLAN ...]        -o memory.png      what runs take of GPU and host, a bar for each plan

REPORT.json is `besa prune --report`; for layers `besa info --json` too, or the besa.json of a pruned directory. PRUNED is a
pruned directory, or a safetensors file with the alpha of every row, as NAME.alpha. TRACE.jsonl is what `besa prune --trace` wrote:
a line for each learning step with block, step and loss. TABLE is what `besa compare` printed, or what it wrote with --json; of
several seeds, in one file or in several, the mean is drawn and the standard deviation as a bar; of one, a run's standard error over
the windows of its test. What differs in model, text, calibration or options is a line of its own; what the files do not tell apart,
as two runs of one seed, or runs beside other dense models, is refused. A study has rows METHOD:KEY=VALUE: --option says which KEY,
where there are several, or nsamples; a row without it stands at the value that it ran with, and a method that has no such option is
a line. PLAN is what `besa plan` printed, in a file whose name will stand at the bar. -o takes several files: .png, .svg, .pdf.
--title puts a line above.

Colours are those of Okabe and Ito, which colour-blind readers tell apart, and lines have marks of their own.
"""
import argparse
import collections
import json
import math
import os
import pathlib
import re
import sys

# tokenize.py beside this file has the name of a module of Python's library that others import: let them find theirs.
sys.path = [folder for folder in sys.path if os.path.realpath(folder) != os.path.dirname(os.path.realpath(__file__))]

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
except ImportError as error:
    sys.exit(f"plot.py needs matplotlib and numpy: pip install matplotlib ({error})")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
LAYER = re.compile(r"(?:layers\.(\d+)\.)?(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\b")
BITS = {"F32": (np.uint32, 0x7FFFFFFF), "F16": (np.uint16, 0x7FFF), "BF16": (np.uint16, 0x7FFF)}  # without the sign
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
         "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
         "svg.hashsalt": "besa", "svg.fonttype": "none", "figure.constrained_layout.use": True}


# ---- what files say ----

def read_json(path):
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")


def blocks_of(path):
    """The blocks of a report: dicts with losses."""
    value = read_json(path)
    blocks = value.get("blocks") if isinstance(value, dict) else None
    if not blocks or not isinstance(blocks, list) or "loss_after" not in blocks[0]:
        sys.exit(f"{path} has no blocks with losses: expected what `besa prune --report` writes")
    return blocks


def layers_of(value, block=None):
    """Yields (block, kind, sparsity) of all layers in a JSON value: dicts with name and sparsity, or names with numbers, whose
    block is in their name or beside them."""
    if isinstance(value, dict):
        block = value["block"] if isinstance(value.get("block"), int) else block
        named = {value["name"]: value.get("sparsity")} if isinstance(value.get("name"), str) else value
        for name, sparsity in named.items():
            layer = LAYER.search(name)
            if layer and isinstance(sparsity, (int, float)):
                yield int(layer.group(1)) if layer.group(1) else block, layer.group(2), sparsity
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from layers_of(child, block)


def layer_table(path):
    """(kinds, blocks) the sparsity of each layer; NaN of one that a report does not have."""
    layers = [layer for layer in layers_of(read_json(path)) if layer[0] is not None]
    if not layers:
        sys.exit(f"{path} has no sparsities of layers: expected what `besa prune --report` or `besa info --json` writes")
    table = np.full((len(KINDS), 1 + max(block for block, _, _ in layers)), np.nan)
    for block, kind, sparsity in layers:
        table[KINDS.index(kind), block] = sparsity
    return table


def tensors_of(path):
    """Yields (name, its entry of the header, its bytes) of the safetensors files of a directory, or of one file."""
    path = pathlib.Path(path)
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    for file in files:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            for name, entry in json.loads(opened.read(size)).items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    yield name, entry, np.fromfile(file, np.uint8, last - first, offset=8 + size + first)


def row_rates(path):
    """{kind: sparsities of rows, of all blocks}: zeros of a checkpoint's weights, or `alpha` of a file of rates."""
    rates = collections.defaultdict(list)
    for name, entry, data in tensors_of(path):
        layer = LAYER.search(name)
        if not layer:
            continue
        if name.endswith(".alpha") and entry["dtype"] == "F32":
            rates[layer.group(2)].append(data.view(np.float32))
        elif len(entry["shape"]) == 2 and name.endswith(".weight") and entry["dtype"] in BITS:
            dtype, magnitude = BITS[entry["dtype"]]
            rates[layer.group(2)].append(1 - ((data.view(dtype) & magnitude) != 0).reshape(entry["shape"]).mean(1))
    if not rates:
        sys.exit(f"{path} has no weights of layers, and no rates")
    return {kind: np.concatenate(rates[kind]) for kind in KINDS if kind in rates}


def trace_of(path):
    """{block: (steps, losses)}"""
    found = collections.defaultdict(lambda: ([], []))
    try:
        for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line) if line.strip() else {}
            if row.get("loss") is not None and "step" in row:
                found[int(row.get("block", 0))][0].append(int(row["step"]))
                found[int(row.get("block", 0))][1].append(float(row["loss"]))
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    if not found:
        sys.exit(f"{path} has no lines with step and loss")
    return dict(sorted(found.items()))


def number_of(value):
    """A number, or the mean of a dict of numbers, and its deviation where there is one."""
    if isinstance(value, dict):
        return value.get("mean"), value.get("std", value.get("sd"))
    return value, None


def dicts_of(value, found):
    """All dicts in a JSON value that have method and perplexity."""
    if isinstance(value, dict) and "method" in value and value.get("perplexity") is not None:
        found.append(value)
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        dicts_of(child, found)
    return found


# What rows differ in beside method and sparsity; of the model that is not pruned only the first two count.
KEYS = ("model", "test", "tokens", "nsamples", "seqlen", "given")
UNPRUNED = ("dense", "against")
WORDS = {"nsamples": "{} sequences".format, "seqlen": "of {} tokens".format, "sparsity": lambda share: f"{100 * share:.4g}%"}


def keys_of(row, keys):
    return [key for key in keys if row["method"] not in UNPRUNED or key in KEYS[:2]]


def label_of(row, rows, keys=KEYS, name=None):
    """Its method, or name, and what else it has of its own: of these keys those that have several values among the rows."""
    several = {key: {other.get(key) for other in rows if key in keys_of(other, keys)} - {None} for key in keys_of(row, keys)}
    words = [WORDS.get(key, str)(row[key]) for key, values in several.items() if len(values) > 1 and row.get(key)]
    return ", ".join([name or str(row["method"]), *words])


SEEDS, WINDOWS = "standard deviation over seeds", "standard error over windows"


def figures_of(row):
    """A row's perplexity, how far it is from certain, and by which of the two measures above; None where it does not say."""
    perplexity, deviation = number_of(row["perplexity"])
    deviation, error = row.get("perplexity_std", deviation), row.get("perplexity_error")
    if row["method"] == "dense":
        return perplexity, None, None   # it is a line without bars
    return (perplexity, error, WINDOWS) if deviation is None else (perplexity, deviation, SEEDS)


def mean_of(several, bars):
    """The mean of figures and the bar at it; into bars goes what that is."""
    perplexities = [perplexity for perplexity, _, _ in several]
    _, deviation, kind = several[-1]
    if len(several) > 1:
        deviation, kind = float(np.std(perplexities, ddof=1)), SEEDS
    if deviation:
        bars.add(kind)
    return float(np.mean(perplexities)), deviation or 0


def named(known, path, what, entry, *keys):
    """The name of a model or text in a file; ends the program where another file has another thing by it, which these keys tell.
    known: {(what, name): (what the keys say, path)}"""
    if not isinstance(entry, dict):
        return entry if isinstance(entry, str) else None
    name = entry.get("name", entry.get("file"))
    meaning = ", ".join(f"{key} {entry[key]}" for key in keys if key in entry)
    other, first = known.setdefault((what, name), (meaning, path)) if meaning else (meaning, path)
    if other != meaning:
        sys.exit(f"{what} {name} has {other} in {first}, and {meaning} in {path}: draw them apart, or under other names")
    return name


def rows_of_json(value, path, known):
    """The rows of a JSON value, and in each what the file says of its model, texts and options."""
    head = value if isinstance(value, dict) else {}
    model = named(known, path, "model", head.get("model"), "config_sha256")
    common = {"file": path, "tokens": named(known, path, "calibration text", head.get("tokens"), "hash"), "seqlen": head.get("seqlen"),
              "given": ", ".join(head["options"]) if isinstance(head.get("options"), list) else None}
    for test in head.get("tests") or ():
        named(known, path, "test", test, "windows", "seqlen", "hash")
    return [{**common, "model": None if row["method"] == "against" else model, **row} for row in dicts_of(value, [])
            if figures_of(row)[0] is not None]


def rows_of_text(text, path):
    """The same of the table that `besa compare` prints, up to the means over seeds. A table without seeds is of one of its own."""
    found, columns = [], None
    sizes = re.search(r"^calibrated on ([0-9, ]+) x ([0-9]+) tokens", text, re.M)
    common = {"file": path, "seed": f"that of {path}", "seqlen": int(sizes.group(2)) if sizes else None}
    common["nsamples"] = int(sizes.group(1)) if sizes and sizes.group(1).isdigit() else None
    for line in text.splitlines():
        if " reached  perplex." in line:
            columns = line.index(" reached"), line.index("perplex.") + len("perplex.")
            numbers = [key for word, key in ((" calib.", "nsamples"), (" seed", "seed")) if word in line[:columns[0]]]
        elif columns and not line.strip():
            break
        elif columns:
            reached, end = columns
            before, figures = line[:reached], line[reached:end].split()
            if not figures or not re.fullmatch(r"[0-9.]+", figures[-1]):
                continue    # a line of make's, or of what else there is around the table
            sparsity = re.search(r" ([0-9.]+) %", before)
            name = before[:sparsity.start()].strip() if sparsity else before.split()[0]
            own = numbers if sparsity else []
            words = before[sparsity.end() if sparsity else len(name):].strip().split(None, len(own))
            row = {**common, "method": name, **dict(zip(own, map(int, words))), "test": " ".join(words[len(own):]) or None}
            found.append({**row, "sparsity": float(sparsity.group(1)) / 100 if sparsity else 0.0, "perplexity": float(figures[-1])})
    return found


def rows_of(paths, printed=False):
    """The rows of the tables in all these files: in JSON, with `printed` also as `besa compare` prints them."""
    rows, known = [], {}
    for path in paths:
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"{path}: {error}")
        try:
            found = rows_of_json(json.loads(text), path, known)
        except ValueError as error:
            found = rows_of_text(text, path) if printed else sys.exit(f"{path}: {error}")
        if printed and not found:
            sys.exit(f"{path} has no table of `besa compare`")
        rows += found
    return rows


def gather(values, line, at, row, figures):
    """Put a row's figures, perplexity first, to those of other seeds: values is {(line, at): {seed: (figures, file)}}. A run that is
    in two files counts once."""
    seed = None if row["method"] in UNPRUNED else row.get("seed")
    first, file = values[line, at].setdefault(seed, (figures, row["file"]))
    near = 1e-3 if row["method"] in UNPRUNED else 1e-6      # another machine's dense model is no other model
    if not math.isclose(first[0], figures[0], rel_tol=near):
        files = " and ".join(dict.fromkeys(map(str, (file, row["file"]))))
        where = "" if row["method"] in UNPRUNED else f" at {at}, seed {seed}"
        sys.exit(f"{files}: {line}{where} has two perplexities, {first[0]:.6g} and {figures[0]:.6g}: they differ in more than their seed, "
                 "draw them apart")


def comparison(paths, bars):
    """{method: {sparsity: (mean, bar)}} of the tables in these files; into bars goes what the bars are."""
    values, rows = collections.defaultdict(dict), rows_of(paths, printed=True)
    for row in rows:
        gather(values, label_of(row, rows), round(float(row.get("sparsity") or 0), 6), row, figures_of(row))
    found = collections.defaultdict(dict)
    for (method, sparsity), several in values.items():
        found[method][sparsity] = mean_of([figures for figures, _ in several.values()], bars)
    return found


# Options whose fields in a row's "options" have other names than theirs with a "_" for each "-", and those that are yes or no.
FIELDS = {"sparsity": "target", "per-row": "magnitude_per_row", "rates": "form", "lambda": "penalty"}
FLAGS = ("per-row", "plain-softmax", "zero-start", "whole-target", "norm-all", "dense-stream", "learn-vectors", "no-projection",
         "quantize-first")
OPPOSITE = {"yes": "no", "no": "yes"}


def opposite_of(key):
    return key[3:] if key.startswith("no-") else f"no-{key}"


def settings_of(method):
    """A row's name without its options, and these: "besa:best:epochs=2,lr=3" is "besa:best", {"epochs": "2", "lr": "3"}."""
    words = str(method).split(":")
    first = next((i for i, word in enumerate(words) if "=" in word), len(words))
    pairs = [pair.partition("=") for pair in ":".join(words[first:]).split(",") if pair]
    return ":".join(words[:first]), {key: value for key, _, value in pairs}


def recorded(row, option):
    """What a row says that it ran with, or None."""
    record = row.get("options") or {}
    if option == "nsamples":
        return row.get("nsamples")
    if option == "pattern" and "pattern_m" in record:
        return "{pattern_n}:{pattern_m}".format(**record) if record["pattern_m"] else "none"
    if option == "blocks" and "num_blocks" in record:
        first, count = record["first_block"], record["num_blocks"]
        return f"{first}-{first + count - 1}" if count else "all"
    if opposite_of(option) in FLAGS:
        return OPPOSITE.get(recorded(row, opposite_of(option)))
    value = record.get(FIELDS.get(option, option.replace("-", "_")))
    if option in FLAGS and value is not None:
        return "yes" if value else "no"
    return "all" if option == "group-rows" and value == -1 else value


def option_of(rows, asked):
    """The option that a study is of: what was asked for, or the only one of which rows have several values."""
    names = list(dict.fromkeys(key for row in rows for key in settings_of(row["method"])[1])) + ["nsamples"]
    names = [name for name in names if len({setting_of(row, name)[0] for row in rows} - {None}) > 1]
    if asked and asked not in names:
        sys.exit(f"--option {asked} has no two values in the rows: expected one of {', '.join(names) or 'METHOD:KEY=VALUE'}")
    if not names:
        sys.exit("no option has two values in the rows: expected METHOD:KEY=VALUE, as `besa compare --method besa,besa:epochs=2 --json` "
                 "writes them, or several --nsamples")
    if not asked and len(names) > 1:
        sys.exit(f"rows differ in {', '.join(names)}: say by --option which one the picture is of")
    return asked or names[0]


def setting_of(row, option):
    """The option's value in a row, as a text, and the row's name without it; None where its method has no such option."""
    name, settings = settings_of(row["method"])
    own, opposite = settings.pop(option, None), OPPOSITE.get(settings.pop(opposite_of(option), None))
    value = next((value for value in (recorded(row, option), own, opposite) if value is not None), None)
    rest = ",".join(f"{key}={setting}" for key, setting in settings.items())
    number = number_or_none(value)
    return value if value is None else str(value) if number is None else f"{number:.15g}", name + (rest and ":" + rest)


def study_of(paths, asked, bars):
    """The option, and {line: {value: (mean, bar)}}; of a method without the option the value is None."""
    rows = rows_of(paths)
    option = option_of([row for row in rows if row["method"] != "dense"], asked)
    keys = [key for key in ("sparsity", *KEYS) if key != option]
    values = collections.defaultdict(dict)
    for row in rows:
        value, name = setting_of(row, option) if row["method"] != "dense" else (None, "dense")
        gather(values, label_of(row, rows, keys, name), value, row, figures_of(row))
    found = collections.defaultdict(dict)
    for (name, value), several in values.items():
        found[name][value] = mean_of([figures for figures, _ in several.values()], bars)
    return option, found


# ---- pictures ----

def style_of(i):
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)], "markersize": 4, "linewidth": 1.4}


def legend_beside(figure, axes):
    """Beside the axes: never over what they show."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")


def draw_layers(paths):
    table = layer_table(paths[0])
    rows, columns = table.shape
    figure, axes = plt.subplots(figsize=(min(9, max(4, 1.6 + 0.45 * columns)), 2.9))
    image = axes.imshow(table, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_yticks(range(rows), KINDS)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set_xlabel("block")
    if columns <= 12:
        middle = (np.nanmin(table) + np.nanmax(table)) / 2
        for (y, x), value in np.ndenumerate(table):
            if np.isfinite(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if value < middle else "black")
    figure.colorbar(image, label="share of zeros")
    return figure


def draw_rates(paths):
    rates = row_rates(paths[0])
    figure, axes = plt.subplots(len(rates), 1, figsize=(4.8, 0.75 * len(rates) + 0.7), sharex=True, squeeze=False)
    low, high = min(r.min() for r in rates.values()), max(r.max() for r in rates.values())
    # n of C columns can only be multiples of 1/C: bins are as wide as the coarsest of these, or some of them
    steps = [np.diff(np.unique(r)).min() for r in rates.values() if np.ptp(r) > 0]
    width = max(steps, default=0.01)
    width *= math.ceil((high - low) / width / 40) or 1
    edges = np.arange(low - width / 2, high + width, width)
    for ax, (kind, values) in zip(axes[:, 0], rates.items()):
        ax.hist(values, edges, color=COLOURS[0])
        ax.axvline(values.mean(), color=COLOURS[1], linewidth=1.4)
        ax.set_yticks([])
        ax.set_ylabel(kind, rotation=0, ha="right", va="center")
        ax.spines["left"].set_visible(False)
    axes[-1, 0].set_xlabel("share of zeros in a row; orange: the mean")
    return figure


def draw_learning(paths):
    """Losses of steps are of one batch each: a running mean over a sixteenth of them."""
    trace = trace_of(paths[0])
    figure, axes = plt.subplots(figsize=(6.2, 3.2))
    colours = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, len(trace)))
    for i, (block, (steps, losses)) in enumerate(trace.items()):
        width = max(1, len(losses) // 16)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        style = style_of(i) if len(trace) <= len(COLOURS) else {"color": colours[i], "linewidth": 1}
        axes.plot(steps[width - 1:], smooth, **{**style, "marker": None}, label=f"block {block}")
    width = max(1, max(len(losses) for _, losses in trace.values()) // 16)
    axes.set_xlabel("learning step")
    axes.set_ylabel("loss of the block" + (f", mean of {width} steps" if width > 1 else ""))
    losses = [loss for _, several in trace.values() for loss in several if loss > 0]
    if losses and max(losses) > 8 * min(losses):
        axes.set_yscale("log")
        plain_ticks(axes)
    else:
        axes.set_ylim(bottom=0)
    if len(trace) <= 16:
        legend_beside(figure, axes)
    else:
        colour = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(min(trace), max(trace)),
                                              matplotlib.colors.ListedColormap(colours))
        figure.colorbar(colour, ax=axes, label="block")
    return figure


def draw_losses(paths):
    blocks = blocks_of(paths[0])
    figure, axes = plt.subplots(figsize=(6.2, 3.2))
    words = (("loss_uniform", "the same rate in every row"), ("loss_before", "before learning"), ("loss_after", "as written"))
    for i, (key, label) in enumerate(words):
        losses = [math.nan if block.get(key) is None else block[key] for block in blocks]
        style = {**style_of(i), **({"markersize": 8, "markerfacecolor": "none", "linewidth": 3, "alpha": 0.6} if i == 0 else {})}
        axes.plot(range(len(blocks)), losses, **style, label=label)  # the first two are often the same: one is seen behind
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set_xlabel("block")
    axes.set_ylabel("reconstruction loss")
    axes.set_ylim(bottom=0)
    legend_beside(figure, axes)
    return figure


def plain_ticks(axes):
    """Numbers as they are, 20 and not 2 x 10^1, and few of them."""
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def perplexity_axis(axes, found, bars):
    """Its label, and logarithmic where values are far apart. found: {line: {x: (mean, bar)}}"""
    values = [mean for points in found.values() for mean, _ in points.values()]
    axes.set_ylabel("perplexity" + (f"; bars: {' or '.join(sorted(bars))}" if bars else ""))
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
        plain_ticks(axes)


def draw_compare(paths):
    bars = set()
    found = comparison(paths, bars)
    dense = {name: found.pop(name)[0.0][0] for name in list(found) if name.split(",")[0] == "dense" and 0.0 in found[name]}
    if not found:
        sys.exit(f"{', '.join(map(str, paths))}: no method but dense")
    figure, axes = plt.subplots(figsize=(6.2, 3.4))
    for i, (method, points) in enumerate(found.items()):
        sparsities = sorted(points)
        mean, spread = np.array([points[s] for s in sparsities]).T
        axes.errorbar([100 * s for s in sparsities], mean, spread if spread.any() else None, capsize=3, label=method,
                      **style_of(i))
    for i, (name, perplexity) in enumerate(dense.items()):
        axes.axhline(perplexity, color="#666666", linewidth=1, linestyle=(0, (4, 3 + 4 * i)), label=f"{name}, {perplexity:.4g}")
    perplexity_axis(axes, found, bars)
    axes.set_xlabel("sparsity, %")
    axes.set_xticks(sorted({100 * s for points in found.values() for s in points}))
    legend_beside(figure, axes)
    return figure


def number_or_none(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def draw_study(paths, asked=None):
    bars = set()
    option, found = study_of(paths, asked, bars)
    names = list(dict.fromkeys(value for points in found.values() for value in points if value is not None))
    numbers = [number_or_none(name) for name in names]
    words = None in numbers         # which stand side by side, with no line between them
    if words:
        numbers = list(range(len(names)))
    at = dict(zip(names, numbers))
    figure, axes = plt.subplots(figsize=(6.2, 3.4))
    lines = 0
    for name, points in found.items():
        if None in points:
            style = {"color": "#666666" if name.startswith("dense") else COLOURS[lines % len(COLOURS)], "linestyle": (0, (4, 3))}
            axes.axhline(points[None][0], linewidth=1, label=f"{name}, {points[None][0]:.4g}", **style)
        there = sorted(points.keys() - {None}, key=at.get)
        if there:
            mean, spread = np.array([points[value] for value in there]).T
            axes.errorbar([at[value] for value in there], mean, spread if spread.any() else None, capsize=3, label=name,
                          **style_of(lines), **({"linestyle": "none"} if words else {}))
        lines += not name.startswith("dense")
    perplexity_axis(axes, found, bars)
    if not words and min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xticks(numbers, names)
    axes.set_xlabel({"nsamples": "calibration sequences"}.get(option, option))
    legend_beside(figure, axes)
    return figure


def work_of(paths):
    """{sparsity: {method: (FLOP, perplexity)}} of tables in JSON, means over seeds."""
    values, rows = collections.defaultdict(dict), rows_of(paths)
    for row in rows:
        perplexity, flop = number_of(row["perplexity"])[0], number_of(row.get("flop"))[0]
        if flop:
            gather(values, label_of(row, rows), float(row.get("sparsity") or 0), row, (float(perplexity), float(flop)))
    if not values:
        sys.exit(f"{', '.join(map(str, paths))}: no rows with flop and perplexity: expected what `besa compare --json` writes")
    found = collections.defaultdict(dict)
    for (method, sparsity), several in values.items():
        perplexity, flop = np.mean([figures for figures, _ in several.values()], axis=0)
        found[sparsity][method] = (flop, perplexity)
    return dict(sorted(found.items()))


def draw_cost(paths):
    found = work_of(paths)
    methods = list(dict.fromkeys(method for points in found.values() for method in points))
    figure, all_axes = plt.subplots(1, len(found), figsize=(1.6 + 2.6 * len(found), 3.2), squeeze=False)
    for axes, (sparsity, points) in zip(all_axes[0], found.items()):
        for method, (flop, perplexity) in points.items():
            style = {**style_of(methods.index(method)), "markersize": 7}
            axes.plot([1e-12 * flop], [perplexity], **style, linestyle="none", label=method)
        values = [perplexity for _, perplexity in points.values()]
        if max(values) > 4 * min(values):
            axes.set_yscale("log")
            plain_ticks(axes)
        axes.margins(0.12)
        axes.set_xlim(left=0)   # the right margin stays: no mark is cut
        axes.set_title(f"{100 * sparsity:g} %")
        axes.set_xlabel("work of pruning, TFLOP")
    all_axes[0, 0].set_ylabel("perplexity")
    handles = {label: handle for axes in all_axes[0] for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


PLANNED = (("GPU", r"^device\s+([0-9.e+]+) ([kMGTPE]?)B"), ("host, pinned", r"^host\s+([0-9.e+]+) ([kMGTPE]?)B"),
           ("host", r"^memory\s+([0-9.e+]+) ([kMGTPE]?)B"), ("checkpoint, mapped", r"^\s+([0-9.e+]+) ([kMGTPE]?)B  of the mapped"))


def plan_of(path):
    """{what: bytes} of a text that `besa plan` printed."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        sys.exit(f"{path}: {error}")
    matches = {what: re.search(pattern, text, re.M) for what, pattern in PLANNED}
    found = {what: float(m.group(1)) * 1000 ** " kMGTPE".index(m.group(2) or " ") for what, m in matches.items() if m}
    if not found:
        sys.exit(f"{path} has no line with memory: expected what `besa plan` prints")
    return found


def draw_memory(paths):
    plans = [(pathlib.Path(path).stem, plan_of(path)) for path in paths]
    figure, axes = plt.subplots(figsize=(6.2, 1 + 0.4 * len(plans)))
    left = np.zeros(len(plans))
    for i, (what, _) in enumerate(PLANNED):
        sizes = np.array([1e-9 * plan.get(what, 0) for _, plan in plans])
        if sizes.any():
            axes.barh(range(len(plans)), sizes, 0.6, left=left, color=COLOURS[i], label=what)
        left += sizes
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:.3g} GB", va="center", fontsize=8)
    axes.set_yticks(range(len(plans)), [name for name, _ in plans])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("GB")
    legend_beside(figure, axes)
    return figure


SEVERAL = ("compare", "cost", "study", "memory")
DRAW = {"layers": draw_layers, "rates": draw_rates, "learning": draw_learning, "losses": draw_losses, "compare": draw_compare,
        "cost": draw_cost, "study": draw_study, "memory": draw_memory}


def draw(kind, paths, title=None, option=None):
    """The figure of matplotlib; any more paths than a kind reads are refused."""
    if len(paths) > 1 and kind not in SEVERAL:
        sys.exit(f"{kind} takes one file, {len(paths)} were given")
    if option and kind != "study":
        sys.exit(f"--option is for study, not for {kind}")
    with plt.rc_context(STYLE):
        figure = DRAW[kind](paths, option) if kind == "study" else DRAW[kind](paths)
        if title:
            figure.suptitle(title)
    return figure


def save(figure, path):
    with plt.rc_context(STYLE):
        # no date in the file: the same picture is the same bytes
        figure.savefig(path, dpi=200, metadata={"Date": None} if str(path).endswith(".svg") else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=DRAW)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("-o", "--output", nargs="+", required=True, metavar="PICTURE")
    parser.add_argument("--title")
    parser.add_argument("--option", metavar="KEY", help="of a study: lr, epochs, nsamples, ..")
    arguments = parser.parse_args()
    for path in arguments.output:
        try:
            save(draw(arguments.kind, arguments.files, arguments.title, arguments.option), path)
        except (OSError, ValueError) as error:
            sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    main()
