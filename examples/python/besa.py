"""BESA from Python: the library besa.h, compiled into the module _besa. Install it by `pip install ./examples/python`.

    import besa
    report = besa.prune("MODEL", "PRUNED", "calibration.npy", sparsity=0.5, nsamples=128, seqlen=2048)
    print(report["sparsity"], besa.eval("PRUNED", "wikitext2.npy", seqlen=2048).perplexity)

Functions of whole checkpoints: prune, plan, eval, divergence, compare, info, masks, rates, save_masks, logits. Class Rates is level 3
of besa.h: learned sparsities of any linear layers, in a training loop of your own; torch_layer.py makes an autograd.Function of it.

Tokens are a file as `besa` takes it (.npy, .u16, .i32, .bin), or an array of whole numbers: 1-D a stream, 2-D sequences.
Options are those of `besa prune` under the names that besa.h has for them: besa.options() lists them. Arrays may be
NumPy's or torch's on the CPU; they are read and written where they lie, and must be contiguous.

Errors of the library are besa.Error, whose text names the file, tensor or option, what was expected and what was found;
TypeError and ValueError say the same of arrays. Ctrl-C stops a run; the same call of prune goes on after the last finished
block. Results are the same bytes as those of the command line program. Everything runs on the CPU.
"""
from __future__ import annotations

import json
import os
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from _besa import ffi, lib

__version__ = f"{lib.BESA_VERSION_MAJOR}.{lib.BESA_VERSION_MINOR}"
# eval is left out: `from besa import *` is not to hide Python's own
__all__ = ["Error", "Evaluation", "Rates", "compare", "divergence", "info", "logits", "masks", "options", "plan", "prune", "rates",
           "save_masks"]

Path = Union[str, "os.PathLike[str]"]
Tokens = Union[Path, np.ndarray, Sequence[int]]
Progress = Union[bool, Callable[[Dict[str, Any]], None]]

BITS = {lib.BESA_F32: (np.uint32, 0x7FFFFFFF), lib.BESA_F16: (np.uint16, 0x7FFF), lib.BESA_BF16: (np.uint16, 0x7FFF)}
DTYPES = {"float32": lib.BESA_F32, "float16": lib.BESA_F16, "bfloat16": lib.BESA_BF16}


# ---- errors --------------------------------------------------------------------------------

class Error(Exception):
    """A call of the library failed. code: its besa_result; the text is what besa_error says."""

    def __init__(self, code: int, message: str):
        super().__init__(message or _text(lib.besa_result_string(code)))
        self.code = code


def _text(pointer) -> str:
    return ffi.string(pointer).decode("utf-8", "replace")


def _call(function, *arguments) -> None:
    """function(*arguments, error), and an exception where it fails."""
    error = ffi.new("besa_error *")
    code = function(*arguments, error)
    if code != lib.BESA_OK:
        raise Error(code, _text(error.message))


# ---- progress, and callbacks ---------------------------------------------------------------

class _Run:
    """What callbacks of one run have: where progress goes, and the exception that stopped it."""

    def __init__(self, label: str, progress: Progress, trace: Optional[Callable[[Dict[str, Any]], None]] = None):
        self.handle = ffi.new_handle(self)
        self.trace, self.exception, self.bar = trace, None, None
        self.report = progress if callable(progress) else None
        if progress is True:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=100, desc=label, unit="%", disable=None, leave=False,
                            bar_format="{desc} {percentage:3.0f} %|{bar}| {postfix} [{elapsed}<{remaining}]")

    def tell(self, p) -> None:
        pass_name = _text(lib.besa_pass_name(getattr(p, "pass")))
        if self.report:
            self.report({"block": p.block, "blocks": p.blocks, "pass": pass_name, "fraction": p.fraction,
                         "seconds": p.seconds, "seconds_left": p.seconds_left, "resumed_blocks": p.resumed_blocks})
        if self.bar is not None:
            self.bar.set_postfix_str(f"block {p.block + 1}/{p.blocks} {pass_name}", refresh=False)
            self.bar.update(round(100 * p.fraction, 2) - self.bar.n)

    def call(self, function, *arguments) -> None:
        """function(*arguments, error); what a callback raised is raised here."""
        try:
            _call(function, *arguments)
        except Error:
            if self.exception is not None:
                raise self.exception from None
            raise
        finally:
            if self.bar is not None:
                self.bar.close()


def _stopped(kind, value, traceback) -> None:
    """An exception in a callback, Ctrl-C's too: kept until the library has returned."""
    ffi.from_handle(traceback.tb_frame.f_locals["user"]).exception = value


@ffi.def_extern(error=1, onerror=_stopped)
def besa_python_progress(user, progress):
    ffi.from_handle(user).tell(progress)
    return 0


@ffi.def_extern(error=lib.BESA_ERROR_CANCELLED, onerror=_stopped)
def besa_python_step(user, step):
    read = ffi.new("besa_trace *")
    _call(lib.besa_step_trace, step, read)
    figures = {name: getattr(read, name) if step.rates else None for name in ("penalty", "mean_rate", "d")}
    ffi.from_handle(user).trace({"block": step.block, "step": step.step, "steps": step.steps, "loss": read.loss, **figures,
                                 "lr": step.lr or None, "weight_lr": step.weight_lr or None})
    return lib.BESA_OK


# ---- several processes ---------------------------------------------------------------------

def _meet(user, error, call: Callable[[Any], None]) -> int:
    """A call of a comm; what it raises becomes the library's error."""
    try:
        call(ffi.from_handle(user))
        return lib.BESA_OK
    except BaseException as problem:
        if error:
            error.code = lib.BESA_ERROR_COMM
            error.message = (str(problem) or type(problem).__name__).encode()[:1000]
        return lib.BESA_ERROR_COMM


@ffi.def_extern(error=lib.BESA_ERROR_COMM)
def besa_python_reduce(user, be, q, data, count, error):
    return _meet(user, error, lambda comm: comm.reduce(np.frombuffer(ffi.buffer(data, 4 * count), np.float32)))


@ffi.def_extern(error=lib.BESA_ERROR_COMM)
def besa_python_broadcast(user, data, size, root, error):
    return _meet(user, error, lambda comm: comm.broadcast(np.frombuffer(ffi.buffer(data, size), np.uint8), root))


@ffi.def_extern(error=lib.BESA_ERROR_COMM)
def besa_python_barrier(user, error):
    return _meet(user, error, lambda comm: comm.barrier())


@ffi.def_extern()
def besa_python_fail(user, error):
    _meet(user, ffi.NULL, lambda comm: comm.fail(_text(error.message)))


# ---- options -------------------------------------------------------------------------------

def _rows() -> Iterator[Any]:
    row = lib.besa_option_table()
    while row.name:
        yield row
        row += 1


# What stands in the library's table, but comes by a parameter of another name.
BY_PARAMETER = {"target": "sparsity", "num_fixed": "fixed", "num_block_targets": "block_targets"}


def options() -> Dict[str, Dict[str, Any]]:
    """All options that prune, plan, compare and Rates take by keyword: for each its default, range, values (words, or None) and
    help. They come from the library's own table. Beside them there are sparsity (of rates.target), pattern, fixed, skip, masks,
    block_targets and memory: see prune."""
    return {_text(row.name): {"default": row.standard, "range": _text(row.range),
                              "values": _text(row.value).split("|") if row.kind == lib.BESA_OPTION_ENUM else None,
                              "help": _text(row.help) if row.help else ""}
            for row in _rows() if _text(row.name) not in BY_PARAMETER}


def _option_value(row, name: str, value: Any) -> Union[int, float]:
    """A keyword's value as the number that the field holds."""
    if isinstance(value, str):
        if row.flags & lib.BESA_OPTION_ALL and value == "all":
            return lib.BESA_ALL_ROWS
        words = _text(row.value).split("|") if row.kind == lib.BESA_OPTION_ENUM else []
        if value not in words:
            raise ValueError(f"{name} is {value!r}, expected {'one of ' + ', '.join(words) if words else _text(row.range)}")
        return words.index(value)
    if row.kind != lib.BESA_OPTION_DOUBLE and value != int(value):
        raise ValueError(f"{name} is {value!r}, expected a whole number, {_text(row.range)}")
    if value == 0 and row.flags & lib.BESA_OPTION_NONE:
        return lib.BESA_NONE                # 0 in the struct asks for the default
    return value


def _set(struct, keywords: Mapping[str, Any]) -> None:
    """Fields of a besa_prune_options by the names in the table."""
    rows = {_text(row.name): row for row in _rows()}
    kinds = {lib.BESA_OPTION_INT64: "int64_t *", lib.BESA_OPTION_DOUBLE: "double *"}
    for name, value in keywords.items():
        if name not in rows:
            raise TypeError(f"there is no option {name!r}: besa.options() has them")
        row = rows[name]
        kind = kinds.get(row.kind, "int *")
        number = _option_value(row, name, value)
        ffi.cast(kind, ffi.cast("char *", struct) + row.offset)[0] = float(number) if kind == "double *" else int(number)


def _pattern(pattern: Union[str, Tuple[int, int]]) -> Dict[str, int]:
    n, m = (int(x) for x in pattern.split(":")) if isinstance(pattern, str) else pattern
    return {"pattern_n": n, "pattern_m": m}


class _Options:
    """A besa_prune_options and what it points to."""

    def __init__(self, preset: Optional[str] = None, sparsity: Optional[float] = None, pattern=None,
                 fixed: Optional[Mapping[str, float]] = None, skip: Union[str, Iterable[str]] = (), masks: Optional[Path] = None,
                 block_targets: Optional[Sequence[float]] = None, memory: int = 0, comm: Any = None, **keywords: Any):
        struct = self.struct = ffi.new("besa_prune_options *")
        for name in BY_PARAMETER.keys() & keywords.keys():
            raise TypeError(f"{name} is no keyword here: give {BY_PARAMETER[name]}")
        if masks is not None and sparsity is not None:
            raise ValueError(f"sparsity is {sparsity:g}, but masks have one of their own: expected one of sparsity and masks")
        if preset is not None:
            _call(lib.besa_preset, struct, preset.encode())
        if pattern is not None:
            keywords.update(_pattern(pattern))
        elif sparsity is None:
            sparsity = 0.5 if block_targets is None else float(np.mean(block_targets))
        if sparsity is not None:
            keywords["target"] = sparsity
        _set(struct, keywords)
        skip = [skip] if isinstance(skip, str) else skip
        fixed = [*dict.fromkeys(skip, 0.0).items(), *(fixed or {}).items()]
        self.patterns = [ffi.new("char[]", pattern.encode()) for pattern, _ in fixed]
        self.fixed = ffi.new("besa_fixed_rate[]", [(text, rate) for text, (_, rate) in zip(self.patterns, fixed)])
        struct.fixed, struct.num_fixed = self.fixed, len(fixed)
        self.masks_path = masks
        if block_targets is not None:
            self.targets = ffi.new("double[]", [float(x) for x in block_targets])
            struct.block_targets, struct.num_block_targets = self.targets, len(self.targets)
        struct.device_memory = memory
        if comm is not None:
            self.handle = ffi.new_handle(comm)
            self.comm = ffi.new("besa_comm *", {"rank": comm.rank, "size": comm.size, "user": self.handle,
                                                "reduce": lib.besa_python_reduce, "broadcast": lib.besa_python_broadcast,
                                                "barrier": lib.besa_python_barrier, "fail": lib.besa_python_fail})
            struct.comm = self.comm

    def bind(self, model: "_Checkpoint") -> "_Options":
        """Open what depends on the model: masks, a checkpoint or a file of save_masks."""
        if self.masks_path is not None:
            opened = ffi.new("besa_checkpoint **")
            path = os.fsencode(self.masks_path)
            if os.path.isfile(path):
                _call(lib.besa_masks_open, opened, path, model.pointer)
            else:
                _call(lib.besa_checkpoint_open, opened, path)
            self.masks = self.struct.masks = ffi.gc(opened[0], lib.besa_checkpoint_close)
        return self

    def attach(self, run: _Run) -> None:
        self.struct.user = run.handle
        self.struct.progress = lib.besa_python_progress
        self.struct.step = lib.besa_python_step if run.trace else ffi.NULL


# ---- checkpoints, tokens, backend ----------------------------------------------------------

class _Checkpoint:
    def __init__(self, directory: Path):
        opened = ffi.new("besa_checkpoint **")
        _call(lib.besa_checkpoint_open, opened, os.fsencode(directory))
        self.pointer = ffi.gc(opened[0], lib.besa_checkpoint_close)
        self.config = lib.besa_checkpoint_config(self.pointer)

    def layers(self) -> Iterator[Tuple[str, Any, np.ndarray]]:
        """(name, besa_tensor, which weights are not 0 (rows, columns)) of every layer that can be pruned."""
        for block in range(self.config.num_hidden_layers):
            for layer in range(lib.BESA_LAYERS):
                tensor = lib.besa_checkpoint_layer(self.pointer, block, layer)
                kind, magnitude = BITS[tensor.dtype]
                bits = np.frombuffer(ffi.buffer(tensor.data, tensor.bytes), kind)
                yield _text(tensor.name), tensor, (bits & magnitude != 0).reshape(tensor.shape[0], tensor.shape[1])

    def windows(self, tokens: Tokens, count: Optional[int], seqlen: Optional[int], seed: int = 0,
                most: Optional[int] = None) -> np.ndarray:
        """ids (count, seqlen) int32 as the command line program cuts them; sizes of None are the file's own."""
        source, self.read = ffi.new("besa_tokens *"), (ffi.NULL, ffi.NULL)  # the file's name and its hash
        if isinstance(tokens, (str, os.PathLike)):
            _call(lib.besa_tokens_load, source, os.fsencode(tokens))
            source = ffi.gc(source, lib.besa_tokens_free)
            self.read = ffi.new("char[]", os.fsencode(tokens)), ffi.new("char[]", ffi.string(source.sha256))
        else:
            array = np.asarray(tokens)
            if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
                raise ValueError(f"tokens have {array.ndim} dimensions of {array.dtype}, expected 1 or 2 of whole numbers")
            if array.size and not -2 ** 31 <= int(array.min()) <= int(array.max()) < 2 ** 31:
                raise ValueError("tokens are outside of 32 bits")
            array = np.ascontiguousarray(array, np.int32)
            source.ids, source.count = ffi.from_buffer("int32_t *", array), array.size
            if array.ndim == 2:
                source.rows, source.columns = array.shape
        longest = min(2048, self.config.max_position_embeddings)
        seqlen = seqlen or source.columns or min(longest, source.count) or 1
        fits = source.count // seqlen
        if not count:
            count = source.rows or (fits if most is None else most if seed else min(fits, most)) or 1
        if source.rows and count > source.rows or not source.rows and not seed and fits and count > fits:
            raise ValueError(f"tokens: {count} sequences of {seqlen} asked for, there are {source.rows or fits}")
        ids = np.empty((count, seqlen), np.int32)
        _call(lib.besa_tokens_sample, source, count, seqlen, seed, self.config.vocab_size, ffi.from_buffer("int32_t *", ids))
        return ids


def _backend(threads: int = 0, bf16: bool = False):
    be = ffi.new("besa_backend *")
    _call(lib.besa_cpu_backend, be, ffi.new("besa_cpu_options *", {"threads": threads, "bf16": bool(bf16)}))
    return ffi.gc(be, lambda pointer: pointer.destroy(pointer))


class _Calibration:
    """A besa_calibration and the arrays that it points to."""

    def __init__(self, model: _Checkpoint, tokens: Optional[Tokens], nsamples: Optional[int], seqlen: Optional[int],
                 seed: int, test: Optional[Tokens], windows: Optional[int], test_seqlen: Optional[int]):
        struct = self.struct = ffi.new("besa_calibration *")
        if tokens is not None:
            self.ids = model.windows(tokens, nsamples, seqlen, seed, 128)
            nsamples, seqlen = self.ids.shape
            struct.ids = ffi.from_buffer("int32_t *", self.ids)
            struct.file, struct.sha256 = self.about = model.read
            struct.seed = seed
        struct.nsamples = nsamples or 128
        struct.seqlen = seqlen or min(2048, model.config.max_position_embeddings)
        if test is not None:
            self.test = model.windows(test, windows, test_seqlen or struct.seqlen)
            struct.test_windows, struct.test_seqlen = self.test.shape
            struct.test_ids = ffi.from_buffer("int32_t *", self.test)
            struct.test_file, struct.test_sha256 = self.test_about = model.read


# ---- whole checkpoints ---------------------------------------------------------------------

def _prune(model: _Checkpoint, output: Optional[Path], be, data: _Calibration, chosen: _Options, run: _Run,
           figures: Optional[Dict[str, float]] = None) -> Dict[str, Any]:
    """The report; `figures` gets those of the test against data.struct.against."""
    chosen.attach(run)
    report = ffi.new("besa_report *")
    run.call(lib.besa_prune, model.pointer, ffi.NULL if output is None else os.fsencode(output), be, data.struct,
             chosen.struct, report)
    text = lib.besa_report_json(report)
    if figures is not None:
        figures.update(_figures(report.window, report.test_windows, report.kl, data.struct.test_seqlen))
    lib.besa_report_free(report)
    if not text:
        raise MemoryError("the report")
    try:
        return json.loads(_text(text))
    finally:
        lib.free(text)


def prune(source: Path, output: Optional[Path], tokens: Tokens, *, sparsity: Optional[float] = None,
          preset: Optional[str] = None, nsamples: Optional[int] = None, seqlen: Optional[int] = None, seed: int = 0,
          test: Optional[Tokens] = None, windows: Optional[int] = None, test_seqlen: Optional[int] = None,
          threads: int = 0, bf16: bool = False, progress: Progress = True,
          trace: Optional[Callable[[Dict[str, Any]], None]] = None, rates: Optional[Path] = None,
          **options: Any) -> Dict[str, Any]:
    """Prune the checkpoint in directory source into the new directory output, and return the report.

    output      must not exist; None: nothing is written
    tokens      calibration text; nsamples sequences [128, or all there are] of seqlen tokens [2048, or what the model takes]
    sparsity    share of the weights that become zero [0.5]
    preset      "default", "best", "weights", "published-row" or "published-layer": what the options start from
    seed        0: sequences follow one another from the start; else they are drawn
    test        a text to measure the pruned model's perplexity on: report["perplexity"]
    progress    True: a bar, by tqdm where it is installed and stderr is a terminal; or a function of a dict with block,
                blocks, pass, fraction, seconds, seconds_left, resumed_blocks (taken over from an unfinished run, which goes
                on at this block). What it raises stops the run
    trace       a function of a dict with block, step, steps, loss, penalty, mean_rate, d, lr, weight_lr, called after each
                learning step; None: there are no rates, or what that is about does not learn in it
    rates       a file to write as `besa prune --save-rates` does: of each row of every layer NAME NAME.n, how many weights are 0,
                and NAME.alpha, the rate that was learned, or where none was their share
    options     those of besa.options() by name (method="wanda", refit="cg", epochs=2), and
                pattern "2:4"; fixed {pattern: sparsity}; skip, a pattern or several, layers that stay dense; masks, a
                directory whose zeros method="keep" takes, or a file of save_masks, without a sparsity beside it;
                block_targets [sparsity of each block], whose mean is the sparsity; memory, most bytes of the run's arrays;
                comm, where several processes call this alike: an object with rank, size and the methods
                reduce(float32 array), which becomes the sum over processes; broadcast(uint8 array, root); barrier(); and
                fail(message), which makes the others' calls raise (torch_distributed.py has one)
    threads     0: as many as there are processors

    Returns the report of `besa prune --report` as a dict: sparsity, weights, pruned, seconds, notes, options, and blocks with
    their losses and layers; but without the command line, threads, and FLOP and memory, which plan has. The output has no
    README.md, the model card that `besa prune` writes: the source's is its README.dense.md, and besa.json says how it was made.
    Raises Error, ValueError or TypeError of an option or of tokens, and KeyboardInterrupt. An interrupted run leaves
    output.partial, and the same call goes on from it."""
    model = _Checkpoint(source)
    chosen = _Options(preset, sparsity, **options).bind(model)
    data = _Calibration(model, tokens, nsamples, seqlen, seed, test, windows, test_seqlen)
    if rates is not None and output is None:
        raise ValueError("rates are of an output, and output is None")
    chosen.struct.keep_rates = rates is not None
    report = _prune(model, output, _backend(threads, bf16), data, chosen, _Run("prune", progress, trace))
    comm, learned = chosen.struct.comm, os.path.join(output or "", "besa-rates")
    if rates is not None and (comm == ffi.NULL or comm.rank == 0):
        save_masks(output, rates, masks=False)
        if os.path.exists(learned):
            os.remove(learned)
    return report


def plan(source: Path, tokens: Optional[Tokens] = None, *, sparsity: Optional[float] = None, preset: Optional[str] = None,
         nsamples: Optional[int] = None, seqlen: Optional[int] = None, test: Optional[Tokens] = None,
         windows: Optional[int] = None, test_seqlen: Optional[int] = None, threads: int = 0, bf16: bool = False,
         **options: Any) -> Dict[str, Any]:
    """What prune would take with these arguments, from shapes alone: memory (bytes of the run's arrays), mapped (bytes of the
    checkpoint at a time), disk (bytes of the output's weights), flop, micro_batch (sequences at a time), notes.
    Raises as prune does."""
    model = _Checkpoint(source)
    chosen = _Options(preset, sparsity, **options).bind(model)
    data = _Calibration(model, tokens, nsamples, seqlen, 0, test, windows, test_seqlen)
    result = ffi.new("besa_plan_result *")
    _call(lib.besa_plan, model.pointer, _backend(threads, bf16), data.struct, chosen.struct, result)
    return {"memory": result.device_bytes + result.host_bytes, "mapped": result.mapped_block_bytes,
            "disk": result.disk_bytes, "flop": result.flop, "micro_batch": result.micro_batch, "notes": _text(result.notes)}


class Evaluation(NamedTuple):
    """perplexity: exp of the mean of nll; nll (windows): mean negative log-likelihood of each window's tokens."""
    perplexity: float
    nll: np.ndarray

    @property
    def error(self) -> float:
        """The standard error of perplexity over the windows; NaN of one window."""
        return self.perplexity * float(np.std(self.nll, ddof=1)) / len(self.nll) ** 0.5 if len(self.nll) > 1 else np.nan


def _figures(window, windows: int, kl, seqlen: int) -> Dict[str, float]:
    """besa_summarize, under the names that `besa compare --json` has. Errors of one window are NaN."""
    d = ffi.new("besa_divergence *")
    lib.besa_summarize(d, window, windows, kl, windows * (seqlen - 1))
    found = {"perplexity": d.perplexity, "perplexity_error": d.perplexity_error, "kl": d.kl, "kl_error": d.kl_error, "kl_99": d.kl_99,
             "kl_most": d.kl_most, "same_top": d.same, "same_top_error": d.same_error, "nll_difference": d.difference,
             "nll_difference_error": d.difference_error}
    return {name: np.nan if windows == 1 and name.endswith("_error") else value for name, value in found.items()}


class _Reference:
    """A besa_reference of a model on windows of tokens."""

    def __init__(self, model: _Checkpoint, be, ids: np.ndarray, run: _Run):
        self.model, self.struct = model, ffi.gc(ffi.new("besa_reference *"), lib.besa_reference_free)
        run.call(lib.besa_reference_create, self.struct, model.pointer, be, ffi.from_buffer("int32_t *", ids), *ids.shape,
                 lib.besa_python_progress, run.handle)

    def measure(self, model: _Checkpoint, be, run: _Run) -> Dict[str, float]:
        windows, seqlen = self.struct.windows, self.struct.seqlen
        window, kl = ffi.new("besa_window[]", windows), ffi.new("float[]", windows * (seqlen - 1))
        run.call(lib.besa_compare_models, model.pointer, be, self.struct, window, kl, lib.besa_python_progress, run.handle)
        return _figures(window, windows, kl, seqlen)


def divergence(directory: Path, against: Path, tokens: Tokens, *, seqlen: Optional[int] = None, windows: Optional[int] = None,
               threads: int = 0, bf16: bool = False, progress: Progress = True) -> Dict[str, float]:
    """How far the predictions of the model in a directory are from those of another, on the windows that eval has: a dict with
    perplexity; kl, the mean of KL(other || model) over all positions in nats, kl_99 its 99th percentile and kl_most the largest;
    same_top, the share of positions with the same most likely token; nll_difference, the mean over windows of this model's
    negative log-likelihood less the other's; and standard errors over the windows, perplexity_error and so on. Raises as eval
    does, and Error where vocabularies differ."""
    model, be = _Checkpoint(directory), _backend(threads, bf16)
    ids = model.windows(tokens, windows, seqlen)
    return _Reference(_Checkpoint(against), be, ids, _Run("against", progress)).measure(model, be, _Run("eval", progress))


def _perplexity(model: _Checkpoint, be, ids: np.ndarray, run: _Run) -> Evaluation:
    nll, value = np.empty(len(ids)), ffi.new("double *")
    run.call(lib.besa_perplexity, model.pointer, be, ffi.from_buffer("int32_t *", ids), *ids.shape, value,
             ffi.from_buffer("double *", nll), lib.besa_python_progress, run.handle)
    return Evaluation(value[0], nll)


def eval(directory: Path, tokens: Tokens, *, seqlen: Optional[int] = None, windows: Optional[int] = None, threads: int = 0,
         bf16: bool = False, progress: Progress = True) -> Evaluation:
    """Perplexity of the model in a directory on a text, in windows of seqlen tokens [2048, or what the model takes] that
    follow one another [all of them]. Raises Error, ValueError of tokens, and KeyboardInterrupt."""
    model = _Checkpoint(directory)
    return _perplexity(model, _backend(threads, bf16), model.windows(tokens, windows, seqlen), _Run("eval", progress))


def _compared(model: _Checkpoint, label: str, sparsity: Optional[float], options: Mapping[str, Any]) -> _Options:
    """The options of a row of compare. Masks, which have a sparsity of their own, are those of method keep alone."""
    name, _, preset = label.partition(":")
    options = {**options, "method": name}
    if name == "keep":
        sparsity = None
    else:
        options.pop("masks", None)
    chosen = _Options(preset or None, sparsity, **options).bind(model)
    if name != "besa" and options.get("learn") == "both":
        _set(chosen.struct, {"learn": "weights"})  # others have no rates
    return chosen


def compare(source: Path, tokens: Tokens, test: Tokens, *, sparsity: Union[float, Sequence[float]] = (0.5,),
            method: Union[str, Sequence[str]] = ("magnitude", "wanda", "sparsegpt", "besa"), nsamples: Optional[int] = None,
            seqlen: Optional[int] = None, seed: int = 0, windows: Optional[int] = None, test_seqlen: Optional[int] = None,
            threads: int = 0, bf16: bool = False, progress: Progress = True, **options: Any) -> List[Dict[str, Any]]:
    """Prune in memory by every method at every sparsity, and measure each: what `besa compare` prints.

    method    names, each with a preset after a colon if you like: "wanda", "besa:best"
    options   as in prune, for every row; they come after the preset. masks are for method "keep", which has their sparsity

    Returns a row for the dense model and one for each run: a dict with method, sparsity (asked for), seed, reached, what
    divergence returns (from the dense model), and seconds. pandas.DataFrame(rows) makes a table of them, as it does of the
    rows in a file of `besa compare --json`. Raises as prune does, of all runs before the first begins."""
    labels = [method] if isinstance(method, str) else list(method)
    if "preset" in options:
        raise TypeError("preset is no keyword here: presets stand in the names of methods, as in method=['wanda', 'besa:best']")
    if options.get("masks") is not None and "keep" not in (label.partition(":")[0] for label in labels):
        raise ValueError(f"masks are given, but method is {', '.join(labels)}: expected keep among them")
    model, be = _Checkpoint(source), _backend(threads, bf16)
    data = _Calibration(model, tokens, nsamples, seqlen, seed, test, windows, test_seqlen)
    runs = [(label, float(target), _compared(model, label, target, options)) for label in labels for target in np.atleast_1d(sparsity)]
    for _, _, chosen in runs:   # what would be refused is so before the first hour
        _call(lib.besa_plan, model.pointer, be, data.struct, chosen.struct, ffi.new("besa_plan_result *"))
    reference = _Reference(model, be, data.test, _Run("dense", progress))
    data.struct.against = reference.struct
    dense = Evaluation(reference.struct.perplexity, np.frombuffer(ffi.buffer(reference.struct.nll, 8 * len(data.test))))
    rows = [{"method": "dense", "sparsity": 0.0, "seed": None, "reached": 0.0, "perplexity": dense.perplexity,
             "perplexity_error": dense.error, "seconds": None}]
    for label, target, chosen in runs:
        figures: Dict[str, float] = {}
        report = _prune(model, None, be, data, chosen, _Run(f"{label} {100 * target:g} %", progress), figures)
        rows.append({"method": label, "sparsity": target, "seed": seed, "reached": report["sparsity"], **figures,
                     "seconds": report["seconds"]})
    return rows


def info(directory: Path) -> Dict[str, Any]:
    """The shape of a model and the share of zeros of each layer: a dict as `besa info --json` prints it. Raises Error."""
    model = _Checkpoint(directory)
    c, weights, zeros = model.config, 0, 0
    found = {"model_type": _text(c.model_type), "num_hidden_layers": c.num_hidden_layers}
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        found[key] = getattr(c.block, key)
    found.update(vocab_size=c.vocab_size, notes=_text(lib.besa_checkpoint_notes(model.pointer)), layers=[])
    for name, tensor, kept in model.layers():
        pruned = kept.size - int(np.count_nonzero(kept))
        weights, zeros = weights + kept.size, zeros + pruned
        found["layers"].append({"name": name, "dtype": _text(tensor.dtype_name), "shape": list(kept.shape),
                                "sparsity": pruned / kept.size})
    return {**found, "weights": weights, "zeros": zeros, "sparsity": zeros / weights}


def masks(directory: Path) -> Dict[str, np.ndarray]:
    """The masks of a checkpoint: for the name of each layer's weights an array of bool (rows, columns), true where a weight
    is not 0. Raises Error."""
    return {name: kept for name, _, kept in _Checkpoint(directory).layers()}


def save_masks(directory: Path, file: Path, *, masks: bool = True, rates: bool = True) -> None:
    """Write what is 0 in a checkpoint as a safetensors file: of each layer NAME NAME.mask, a bit for every weight that is kept
    (np.unpackbits with axis=1, bitorder="little", count=columns), and of its rows NAME.n, how many are 0, and NAME.alpha, their
    share, or the rate that was learned where prune with rates was stopped before it had written them. Raises Error."""
    what = masks * lib.BESA_FILE_MASKS | rates * lib.BESA_FILE_RATES
    _call(lib.besa_masks_save, _Checkpoint(directory).pointer, os.fsencode(file), what)


def rates(directory: Path) -> Dict[str, np.ndarray]:
    """The sparsity of each row: for the name of each layer's weights an array of float (rows). Raises Error."""
    return {name: 1 - kept.mean(1) for name, _, kept in _Checkpoint(directory).layers()}


def logits(directory: Path, ids: Tokens, *, threads: int = 0) -> np.ndarray:
    """float32 (sequences, tokens, vocabulary): the logits behind every position of ids (sequences, tokens). For small
    models: all of them are in memory. Raises Error, ValueError of ids."""
    model = _Checkpoint(directory)
    ids = model.windows(np.atleast_2d(np.asarray(ids)), None, None)
    out = np.empty((*ids.shape, model.config.vocab_size), np.float32)
    _call(lib.besa_logits, model.pointer, _backend(threads), ffi.from_buffer("int32_t *", ids), *ids.shape,
          ffi.from_buffer("float *", out))
    return out


# ---- level 3 -------------------------------------------------------------------------------

def _pointer(array: Any, name: str, shape: Tuple[int, ...], dtype: str, writable: bool = False):
    """Where the elements of a NumPy array or a torch tensor on the CPU lie, once it is what it has to be."""
    is_torch = hasattr(array, "data_ptr")
    if not is_torch and not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}, expected an array of NumPy's or a tensor of torch's")
    if is_torch and array.device.type != "cpu":
        raise ValueError(f"{name} lies on {array.device}, expected the CPU")
    found = str(array.dtype).replace("torch.", "")
    if tuple(array.shape) != shape or found != dtype:
        raise ValueError(f"{name} is {found} {tuple(array.shape)}, expected {dtype} {shape}")
    if not (array.is_contiguous() if is_torch else array.flags.c_contiguous):
        raise ValueError(f"{name} is not contiguous")
    if writable and not is_torch and not array.flags.writeable:
        raise ValueError(f"{name} cannot be written to")
    return ffi.cast("void *", array.data_ptr() if is_torch else array.ctypes.data)


class _View:
    """Memory of an object that lives as long as arrays that look at it."""

    def __init__(self, owner: Any, pointer, shape: Tuple[int, ...], typestr: str):
        self.owner = owner
        address = int(ffi.cast("uintptr_t", pointer))
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": typestr, "version": 3}


class Rates:
    """Learned sparsities of linear layers y = x W', which share one target and one optimiser: level 3 of besa.h.

        rates = besa.Rates([(R, C)], sparsity=0.5)
        rates.rank(0, w, statistic=(x * x).sum(0))
        for each step:  rates.forward();  rates.mask(0, w, pruned);  dw = your gradient of the loss by pruned
                        rates.gradient(0, w, dw);  rates.step()
        rates.project();  rates.mask(0, w, pruned)

    shapes    (rows, columns) of each layer
    dtype     "float32", "float16" or "bfloat16": of all weights
    options   those of besa.options() that besa_rate_options has: form, row_scale, candidates, penalty, lr, d_coef, ...
    threads   0: as many as there are processors

    Weights w and pruned are (rows, columns) of dtype. Raises Error, and TypeError or ValueError of arguments."""

    def __init__(self, shapes: Sequence[Tuple[int, int]], *, sparsity: float = 0.5, dtype: str = "float32", threads: int = 0,
                 **options: Any):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.shapes = [(int(rows), int(columns)) for rows, columns in shapes]
        self.dtype = dtype
        layers = ffi.new("besa_layer_shape[]", [{"rows": r, "columns": c, "dtype": DTYPES[dtype]} for r, c in self.shapes])
        chosen, be, made = _Options(None, sparsity, **options), _backend(threads), ffi.new("besa_rates **")
        _call(lib.besa_rates_create, made, be, layers, len(self.shapes), ffi.addressof(chosen.struct, "rates"))
        self._rates = ffi.gc(made[0], lambda pointer, be=be: lib.besa_rates_destroy(pointer))  # before its backend

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < len(self.shapes):
            raise IndexError(f"layer {layer} of {len(self.shapes)}")
        return layer

    def _weights(self, layer: int, array: Any, name: str, writable: bool = False):
        return _pointer(array, name, self.shapes[self._layer(layer)], self.dtype, writable)

    def rank(self, layer: int, w: Any, importance: str = "wanda", statistic: Any = None) -> None:
        """Score the weights w and keep each one's rank in its row. statistic float32 (columns): for "wanda" and "relative" sums
        of squares of the layer's inputs, for "sparsegpt" U_jj, U'U = inv(H + damping); None for "magnitude". "gradient" is
        refused: its gradients are a whole block's."""
        words = options()["importance"]["values"]
        if importance not in words:
            raise ValueError(f"importance is {importance!r}, expected one of {', '.join(words)}")
        if statistic is None and importance != "magnitude":
            raise ValueError(f"importance {importance} wants a statistic")
        rows, columns = self.shapes[self._layer(layer)]
        at = ffi.NULL if statistic is None else _pointer(statistic, "statistic", (columns,), "float32")
        scratch = np.empty((rows + 2, columns), np.float32)
        _call(lib.besa_rates_rank, self._rates, layer, self._weights(layer, w, "w"), words.index(importance), at,
              ffi.from_buffer("float *", scratch))

    def fix(self, layer: int, sparsity: float) -> None:
        """Hold a layer at a sparsity of its own, which the target does not count; below 0: learn again. Only before the
        first step."""
        _call(lib.besa_rates_fix, self._rates, self._layer(layer), sparsity)

    def reset(self) -> None:
        """Start again: theta and optimiser as they began, no layer fixed."""
        _call(lib.besa_rates_reset, self._rates)

    def forward(self) -> None:
        """theta to the rate alpha and the number n of pruned weights of every row."""
        _call(lib.besa_rates_forward, self._rates)

    def mask(self, layer: int, w: Any, pruned: Any) -> Any:
        """pruned = w where its rank is n or more, else 0; returns pruned, which may be w."""
        _call(lib.besa_rates_mask, self._rates, self._layer(layer), self._weights(layer, w, "w"),
              self._weights(layer, pruned, "pruned", True))
        return pruned

    def kept(self, layer: int) -> np.ndarray:
        """The mask: bool (rows, columns), true where a weight stays."""
        kind = np.uint32 if self.dtype == "float32" else np.uint16
        bits = np.ones(self.shapes[self._layer(layer)], kind)  # 1 is the smallest number that is not 0
        at = ffi.cast("void *", bits.ctypes.data)
        _call(lib.besa_rates_mask, self._rates, layer, at, at)
        return bits != 0

    def gradient(self, layer: int, w: Any, dw: Any) -> None:
        """Add the gradient of your loss by pruned, float32 dw (rows, columns), to the layer's sums. w as it was ranked."""
        _call(lib.besa_rates_gradient, self._rates, self._layer(layer), self._weights(layer, w, "w"),
              ffi.cast("float *", _pointer(dw, "dw", self.shapes[layer], "float32")))

    def backward(self) -> None:
        """The sums to grad, that of the sparsity penalty added; empties the sums."""
        _call(lib.besa_rates_backward, self._rates)

    def optimize(self) -> None:
        """The optimiser's step along grad."""
        _call(lib.besa_rates_optimize, self._rates)

    def step(self) -> None:
        """backward and optimize."""
        _call(lib.besa_rates_step, self._rates)

    def project(self) -> None:
        """n of every row, so that exactly floor(sparsity N + 1/2) weights of all layers that are not fixed go."""
        _call(lib.besa_rates_project, self._rates)

    def _parameters(self, which: int) -> np.ndarray:
        pointers = ffi.new("float *[2]")
        count = lib.besa_rates_parameters(self._rates, pointers, pointers + 1)
        return np.asarray(_View(self._rates, pointers[which], (count,), "<f4"))

    @property
    def theta(self) -> np.ndarray:
        """float32 (parameters), the library's own memory: per layer theta of the layer (D + 1), then of its groups
        (groups, D + 1), as far as the form has them. What is written here counts from the next forward on."""
        return self._parameters(0)

    @property
    def grad(self) -> np.ndarray:
        """float32 (parameters), the library's own memory: the gradient that backward left."""
        return self._parameters(1)

    def read(self, layer: int) -> Tuple[np.ndarray, np.ndarray]:
        """alpha float32 (rows) and n int32 (rows), as of the last forward or project."""
        rows = self.shapes[self._layer(layer)][0]
        alpha, n = np.empty(rows, np.float32), np.empty(rows, np.int32)
        _call(lib.besa_rates_read, self._rates, layer, ffi.from_buffer("float *", alpha), ffi.from_buffer("int32_t *", n))
        return alpha, n

    def status(self) -> Tuple[float, float]:
        """Prodigy's d, and the mean rate of the layers that learn as of the last forward."""
        d, mean = ffi.new("double *"), ffi.new("double *")
        _call(lib.besa_rates_status, self._rates, d, mean)
        return d[0], mean[0]
