#!/usr/bin/env python3
"""mutate.py - deliberate mistakes in besa.h and besa_cuda.cuh, one at a time: do the tests notice?

    mutate.py                              the mistakes of mutants.txt
    mutate.py --generate 200 --seed 1      mistakes made by chance; those that do not compile are not counted
    mutate.py --check                      only that every mistake of the list still applies, exactly once
    mutate.py --only WORD                  those whose name contains WORD

    -j N            workers, of one core each (1)
    --file HEADER   those of one header
    --quick         only tests of a few seconds: who survives them is to be tried by the others
    --plain         no sanitizers, which take the longest: who survives is to be tried by them in a later run
    --again         those that were not caught last time, and whatever is new
    --fresh         nothing is remembered
    --stop          the first survivor ends the run

A mutant is a copy of the headers with one place changed. The test programs are built from it by tests/Makefile and run, the
narrowest and quickest tests first; the first failed check, crash or test that takes five times as long has caught it. Which
tests run which line is measured beforehand, so that only those are run that can notice. Survivors go through
AddressSanitizer in the end, those of kernels through ThreadSanitizer, too. Mutants of besa_cuda.cuh run on the stand-in
runtime.
Results are remembered in build/mutate: an interrupted run goes on. A first run measures all tests, which takes minutes."""
import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import source

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
ROOT = os.path.dirname(TESTS)
WORK = os.path.join(TESTS, "build", "mutate")
HEADERS = ("besa.h", "besa_cuda.cuh")
FAILED = re.compile(rb"^(FAIL|    \w+\.(c|h|cpp):\d+: |.*(ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error:))")
QUICK = {"test_cuda": 31.0}                     # seconds: longer tests come last, and not under sanitizers
LATER = ("the quick tests pass", "the plain tests pass")        # how one survives --quick, --plain
COVERAGE = "-O1 --coverage"
ADDRESS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# what is compiled and run sooner without optimisation
LEVEL = {"test_forms": "-O0", "test_reference": "-O0", "test_io": "-O0", "test_portable": "-O0"}


def make(*arguments):
    """make in tests/; its output, or None where it failed."""
    run = subprocess.run(["make", "-s", "--no-print-directory", "-C", TESTS, "OPENMP=-fopenmp", "WARNINGS=-w"] + list(arguments),
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        make.error = run.stdout                 # of the last failure
    return run.stdout if run.returncode == 0 else None


class Program:
    """A test program: how it is built from the headers of a directory, and what it is called with."""

    def __init__(self, name, arguments):
        self.name, self.arguments = name, arguments
        self.cuda = name == "test_cuda"

    def files(self):
        """All that it is made of but the headers."""
        own = (self.name + ".cpp", "cuda.mk") if self.cuda else (self.name + ".c", "fuzz_io.c")
        paths = [os.path.join(TESTS, name) for name in os.listdir(TESTS) if name in own or name.endswith(".h")]
        standin = os.path.join(TESTS, "cuda_standin")
        return paths + [os.path.join(standin, name) for name in os.listdir(standin) if self.cuda and name[-3:] in ("cpp", "cuh")]

    def build(self, directory, variant="plain"):
        """Its path, or None where it does not compile. Variants: plain, fast, coverage, address, thread."""
        out = os.path.join(directory, variant)
        options = ["BESA=" + directory, "BUILD=" + out, "CC=gcc", "CXX=g++"]
        if not self.cuda:
            flags = {"plain": LEVEL.get(self.name, "-O1"), "fast": "-O3", "coverage": COVERAGE, "address": ADDRESS}[variant]
            path = os.path.join(out, self.name)
            options += ["CFLAGS=%s -ffile-prefix-map=%s=." % (flags, directory)]
        else:
            kind = variant if variant in ("address", "thread") else "plain"     # the stand-in's builds
            path = os.path.join(out, "cuda", "test_cuda-" + kind)
            make(*options, os.path.join(out, "cuda", "standin-%s.o" % kind))    # with its own flags
            if kind == "plain":
                options += ["cuda_plain_FLAGS=" + (COVERAGE if variant == "coverage" else "-O1")]
            options += ["CUDA_FLAGS=-std=c++17 -w -g0 -I%s/cuda_standin/include -I%s -I." % (TESTS, directory)]
        if os.path.exists(path):
            os.remove(path)
        return path if make(*options, path) is not None else None


def programs():
    """All of them; each is described by a line of `make describe`."""
    described = make("describe", "STORIES=%s/examples/stories260K" % ROOT)
    every = [Program(line.split()[0], line.split()[1:]) for line in described.split("\n") if line]
    return [p for p in every if p.name != "test_memory"]        # a minute for what hardly any mistake changes


def limits(seconds, address_space):
    def set_limits():
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 30, 4 << 30))
        if address_space:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    return set_limits


def run_test(path, program, only, directory, seconds=600.0, slower=1, passed=None):
    """Run a program, or one test of it. What it failed by, or None; and the processor time it took. Names of the tests that
    passed are added to `passed`."""
    temporary = os.path.join(directory, "tmp")
    os.makedirs(temporary, exist_ok=True)
    arguments = [temporary if a == "/dev/shm" else a for a in program.arguments] + ([only] if only else [])
    environment = dict(os.environ, TMPDIR=temporary, OMP_WAIT_POLICY="passive", OMP_NUM_THREADS="2",
                       LSAN_OPTIONS="suppressions=%s/lsan.supp:print_suppressions=0" % TESTS)
    allowed = (10 + 5 * seconds) * slower
    child = subprocess.Popen([path] + arguments, cwd=TESTS, env=environment, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             preexec_fn=limits(allowed, 0 if program.cuda or slower > 1 else 8 << 30))
    late = threading.Timer((30 + 10 * seconds) * slower, os.killpg, (child.pid, signal.SIGKILL))
    late.start()
    reason = None
    for line in child.stdout:
        if passed is not None and line.startswith(b"PASS "):
            passed.append(line[5:].decode().strip())
        if FAILED.match(line):
            reason = line.decode("utf-8", "replace").strip()[:160]
            break
    try:
        if reason:
            os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    late.cancel()
    child.stdout.close()
    for line in open("/proc/mounts"):           # of a test that was ended while it had a small file system of its own
        if line.split()[1].startswith(temporary + "/"):
            subprocess.run(["umount", line.split()[1]], stderr=subprocess.DEVNULL)
    shutil.rmtree(temporary, ignore_errors=True)
    if not reason and status:
        reason = "took too long" if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (9, 24) else "ended with status %d" % status
    return reason, usage.ru_utime + usage.ru_stime


# ---- what the tests take, and which lines they run ----

def covered(directory):
    """header -> lines that ran since the last call, header -> lines with code."""
    ran, code = {h: set() for h in HEADERS}, {h: set() for h in HEADERS}
    for folder, _, names in os.walk(directory):
        for name in names:
            if not name.endswith(".gcda"):
                continue
            path = os.path.join(folder, name)
            report = subprocess.run(["gcov", "-t", "-j", path], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            os.remove(path)
            for file in json.loads(report.stdout or b'{"files": []}')["files"]:
                header = os.path.basename(file["file"])
                for line in file["lines"] if header in HEADERS else []:
                    code[header].add(line["line_number"])
                    if line["count"]:
                        ran[header].add(line["line_number"])
    return ran, code


def tests_of(path, program, directory):
    """Names of a program's tests: those that stand in its source where all do, else those that it prints."""
    source_of = open(os.path.join(TESTS, program.name + (".cpp" if program.cuda else ".c"))).read()
    names = re.findall(r'\bTEST\("([^"]+)"\)', source_of)
    if len(names) != len(re.findall(r"\bTEST\(", source_of)):
        names = []
        run_test(path, program, None, directory, passed=names)
    return list(dict.fromkeys(names))           # in their order, each once


def measure(directory, program):
    """[program, test, seconds, header -> lines] of its tests, and header -> lines with code."""
    print("measuring %s ..." % program.name, flush=True)
    units, code, path = [], {h: set() for h in HEADERS}, program.build(directory, "coverage")
    if not path:
        sys.exit("mutate.py: %s does not compile:\n%s" % (program.name, make.error))
    names = tests_of(path, program, directory)
    covered(os.path.join(directory, "coverage"))
    for name in names:
        passed = []
        reason, seconds = run_test(path, program, name, directory, passed=passed)
        ran, known = covered(os.path.join(directory, "coverage"))
        if not reason and not passed and any(n in name for n in names if n != name):
            continue                            # it needs what another leaves, which runs it, too: it is named by a part of its name
        if reason or not passed:
            print("%s %s is left out: it fails without a mistake: %s" % (program.name, name, reason or "nothing ran"))
            continue
        units.append([program.name, name, seconds, {h: sorted(ran[h]) for h in HEADERS}])
        for h in HEADERS:
            code[h] |= known[h]
    return {"units": units, "code": {h: sorted(code[h]) for h in HEADERS}}


def digest(paths):
    h = hashlib.sha1()
    for path in sorted(paths):
        h.update(open(path, "rb").read())
    return h.hexdigest()


def profile(texts, everything, fresh):
    """What was measured of all programs, remembered until the headers or a program's own files change."""
    known, directory = {"units": [], "code": {h: [] for h in HEADERS}}, os.path.join(WORK, "measure")
    headers = [os.path.join(ROOT, h) for h in HEADERS]
    write_headers(directory, texts)
    for program in everything:
        key = digest(headers + program.files())
        path = os.path.join(WORK, program.name + ".json")
        one = json.load(open(path)) if os.path.exists(path) and not fresh else {}
        if one.get("key") != key:
            one = dict(measure(directory, program), key=key)
            json.dump(one, open(path, "w"))
        known["units"] += one["units"]
        for h in HEADERS[program.cuda:]:        # the stand-in's build has no parallel loops, and lines that others do not count
            known["code"][h] = sorted(set(known["code"][h] + one["code"][h]))
    shutil.rmtree(directory)
    return known


# ---- one mutant ----

def write_headers(directory, texts):
    os.makedirs(directory, exist_ok=True)
    for header, text in texts.items():
        with open(os.path.join(directory, header), "w", encoding="utf-8") as file:
            file.write(text)


def relevant_lines(m, known, texts):
    """Lines whose tests can notice: those that were changed; where they are not counted, as those of a parallel loop are not,
    all of the function or of the functions that name the table or macro; None: any test may."""
    code = set(known["code"][m.file])
    lines = set(m.lines) & code
    if lines:
        return lines
    bare = source.blank(texts[m.file])
    spans, at = source.functions(bare), [i for i, c in enumerate(bare) if c == "\n"][m.lines[0] - 2] + 1
    users = [(begin, end) for begin, end in spans.values() if begin <= at < end]
    name = None if users else source.definition_at(texts[m.file], bare, at)
    if name:
        users = [span for span in spans.values() if re.search(r"\b%s\b" % name, bare[slice(*span)])]
    return {line for span in users for line in source.lines_of(bare, *span) if line in code} or None


def is_cuda(m, texts):
    """Besides besa_cuda.cuh itself, the sizes in besa.h that it works by."""
    return m.file == "besa_cuda.cuh" or m.lines[0] > texts["besa.h"][:texts["besa.h"].index("// >>cuda-sizes ")].count("\n")


def units_of(m, known, texts):
    """The tests that run the mutant's lines: those first that are quick and run little else."""
    lines = relevant_lines(m, known, texts)
    units = []
    for unit in known["units"]:
        fits = m.order or (unit[0] == "test_cuda") == is_cuda(m, texts)
        if fits and (lines is None or lines & set(unit[3][m.file])):
            units.append(unit)
    return sorted(units, key=lambda u: (is_long(u), (u[2] + 0.3) * sum(map(len, u[3].values()))))


def is_long(unit):
    return unit[2] >= QUICK.get(unit[0], 9.0)


def same_code(m, directory, texts, before={}):
    """Does the compiler make the same code of it? `before` remembers what it makes of the headers as they are."""
    def code_of(text):
        write_headers(directory, dict(texts, **{m.file: text}))
        if m.file == "besa.h":
            call = ["gcc", "-std=gnu11", "-c", os.path.join(TESTS, "strict", "first.c")]
        else:
            call = ["g++", "-std=c++17", "-I%s/cuda_standin/include" % TESTS, "-I" + TESTS, "-c",
                    os.path.join(TESTS, "test_cuda.cpp")]
        out = os.path.join(directory, "code.o")
        run = subprocess.run(call + ["-O2", "-w", "-fopenmp", "-I" + directory, "-o", out], stderr=subprocess.DEVNULL)
        return None if run.returncode else digest([out])
    if (directory, m.file) not in before:
        before[directory, m.file] = code_of(texts[m.file])
    return code_of(m.text) == before[directory, m.file]


def try_mutant(m, directory, known, texts, everything, options):
    """(result, how): caught, survived, equal (the same machine code) or uncompiled."""
    os.makedirs(directory, exist_ok=True)
    by_name, built = {p.name: p for p in everything}, {}
    units = units_of(m, known, texts)
    equal = "equal", "the compiler makes the same code of it"
    if not units:
        return "survived", "no test runs this line"
    if relevant_lines(m, known, texts) is None and same_code(m, directory, texts):
        return equal                            # code for another machine
    write_headers(directory, dict(texts, **{m.file: m.text}))

    def first_failure(variant, some, slower):
        for name, only, seconds, _ in some:
            if (name, variant) not in built:
                built[name, variant] = by_name[name].build(directory, variant)
            if not built[name, variant]:
                return "uncompiled"
            reason, _ = run_test(built[name, variant], by_name[name], only, directory, seconds, slower)
            if reason:
                return "%s%s: %s" % (name, ", " + variant if variant in ("address", "thread") else "", reason)
    cuda, how = m.file == "besa_cuda.cuh", None
    if m.order and cuda:                        # hardly anything else notices, and it takes the longest for all tests
        how = first_failure("thread", [u for u in units if u[2] < 6], 40)
    how = how or first_failure("plain", [u for u in units if not is_long(u)], 1)
    if not how and options.quick:
        return "survived", LATER[0]
    how = how or first_failure("fast", [u for u in units if is_long(u)], 1)
    if how == "uncompiled":
        return how, make.error.strip().split("\n")[0][:160]
    if not how and same_code(m, directory, texts):
        return equal
    if not how and options.plain:
        return "survived", LATER[1]
    write_headers(directory, dict(texts, **{m.file: m.text}))
    how = how or first_failure("address", [u for u in units if cuda or not is_long(u)], 8)
    if not how and cuda:                        # of a barrier, the narrow ones have been tried
        how = first_failure("thread", [u for u in units if (u[2] >= 6) == m.order], 40)
    return ("caught", how) if how else ("survived", "%d tests pass" % len(units))


# ---- all of them ----

class Results:
    """Lines of JSON, one for each mutant that was tried; the last one of a name counts."""

    def __init__(self, path, key, fresh):
        self.path, self.key, self.lock, self.known = path, key, threading.Lock(), {}
        if fresh and os.path.exists(path):
            os.remove(path)
        for line in open(path) if os.path.exists(path) else []:
            entry = json.loads(line)
            self.known[entry["name"]] = entry

    def get(self, m, options):
        """What is known of it; nothing where it or the tests have changed, nor of a survivor that is to be tried again."""
        entry = self.known.get(m.name)
        if not entry or entry["text"] != digest_text(m.text):
            return None
        if options.again:
            return entry if entry["result"] == "caught" else None
        tried = LATER.index(entry["how"]) if entry["how"] in LATER else len(LATER)
        return entry if entry["key"] == self.key and tried >= (0 if options.quick else 1 if options.plain else 2) else None

    def add(self, m, result, how, seconds):
        entry = {"name": m.name, "result": result, "how": how, "seconds": round(seconds, 1), "key": self.key,
                 "text": digest_text(m.text)}
        with self.lock, open(self.path, "a") as file:
            self.known[m.name] = entry
            file.write(json.dumps(entry) + "\n")
        return entry


def digest_text(text):
    return hashlib.sha1(text.encode()).hexdigest()


def work(todo, results, options, known, texts, everything, number, done):
    directory = os.path.join(WORK, "worker%d" % number)
    while True:
        try:
            m = todo()
        except StopIteration:
            break
        entry = results.get(m, options)
        if not entry:
            start = time.time()
            result, how = try_mutant(m, directory, known, texts, everything, options)
            entry = results.add(m, result, how, time.time() - start)
        done(m, entry)
    shutil.rmtree(directory, ignore_errors=True)


def run_all(mutants, count, results, options, known, texts, everything):
    """Entries of `count` mutants that compile (None: of all), with their mutants."""
    lock, entries = threading.Lock(), []

    def todo():
        with lock:
            counted = [e for _, e in entries if e["result"] in ("caught", "survived")]
            if count is not None and len(counted) >= count:
                raise StopIteration
            if options.stop and any(e["result"] == "survived" and not m.known for m, e in entries):
                raise StopIteration
            return next(mutants)

    def done(m, entry):
        with lock:
            entries.append((m, entry))
            print("%-10s %6.1f s  %s (%s)" % (entry["result"], entry["seconds"], m.name, entry["how"]), flush=True)
    threads = [threading.Thread(target=work, args=(todo, results, options, known, texts, everything, i, done))
               for i in range(options.j)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return entries


def report(entries, texts, listed):
    """Survivors with their change; then the sums. The exit status: 1 where one survived that no line explains, or where
    one of the list is no mistake at all."""
    sums, wrong = dict.fromkeys(("caught", "survived", "equal", "uncompiled"), 0), 0
    for m, entry in entries:
        result = entry["result"]
        sums[result] += 1
        wrong += not m.known if result == "survived" else listed and result != "caught"
        if m.known and result == "caught":
            print("\n%s: is caught now; take its ? line out of the list" % m.name)
        if result == "survived" or (listed and result != "caught"):
            print("\n%s: %s, %s:%d (%s)\n%s" % (result, m.name, m.file, m.lines[0], m.known or entry["how"],
                                               source.diff(texts[m.file], m)))
    seconds = sum(e["seconds"] for _, e in entries) / max(1, len(entries))
    print("\n%d caught, %d survived, %d did not compile, %d equal; %.1f s each" %
          (sums["caught"], sums["survived"], sums["uncompiled"], sums["equal"], seconds))
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--file", choices=HEADERS)
    parser.add_argument("-j", type=int, default=1)
    for flag in ("check", "quick", "plain", "again", "fresh", "stop"):
        parser.add_argument("--" + flag, action="store_true")
    options = parser.parse_args()
    texts = {h: open(os.path.join(ROOT, h), encoding="utf-8").read() for h in HEADERS}
    if options.generate:
        mutants, name = source.generate(texts, options.seed), "generated-%d" % options.seed
    else:
        mutants, lost = source.read_list(os.path.join(HERE, "mutants.txt"), texts)
        if lost:
            sys.exit("mutate.py: mutants.txt does not fit the headers any more; mend these anchors:\n" + "\n".join(lost))
        print("%d mutants apply" % len(mutants))
        if options.check:
            return 0
        mutants, name = (m for m in mutants if options.only in m.name), "list"
    mutants = (m for m in mutants if options.file in (None, m.file))
    os.makedirs(WORK, exist_ok=True)
    everything = [p for p in programs() if p.cuda or options.file != "besa_cuda.cuh"]
    known = profile(texts, everything, options.fresh)
    key = digest([path for p in everything for path in p.files()])
    results = Results(os.path.join(WORK, name + ".jsonl"), key, options.fresh)
    entries = run_all(mutants, options.generate, results, options, known, texts, everything)
    return report(entries, texts, not options.generate)


if __name__ == "__main__":
    sys.exit(main())
