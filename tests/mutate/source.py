"""source.py - a C or CUDA header as text: its functions, the mutants of the list, and mutants by chance."""
import difflib
import random
import re
from collections import namedtuple

# name: what is broken; text: the whole mutated file; lines: numbers of the lines that differ; order: whether
# a barrier, an event or a wait is changed; known: why it may survive
Mutant = namedtuple("Mutant", "name file text lines order known")
ORDER = re.compile(r"__sync(threads|warp)|->(wait|record|synchronize)\(|besa__settle\(")      # what only a device notices


def blank(text):
    """The text with comments, strings and preprocessor lines replaced by spaces: every place stays where it is."""
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|^[ \t]*#(?:\\\n|[^\n])*'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S | re.M)


def functions(code):
    """name -> (begin, end) of every function's definition in blanked text: from its name to its last brace."""
    spans, depth, begin = {}, 0, None
    for m in re.finditer(r"[{}]", code):
        if m.group() == "{":
            head = code[:m.start()].rstrip() if depth == 0 else ""
            if head.endswith(")"):
                level, i = 0, len(head) - 1
                while level or head[i] == ")":      # back to the parenthesis that opens the parameters
                    level += (head[i] == ")") - (head[i] == "(")
                    i -= 1
                    if not level:
                        break
                name = re.compile(r"(\w+)\s*$").search(head[:i + 1], max(0, i - 100))      # from the start it takes long
                begin = (name.group(1), name.start(1)) if name else None
            depth += not (depth == 0 and head.endswith("extern"))
        elif depth:
            depth -= 1
            if depth == 0 and begin:
                spans[begin[0]] = (begin[1], m.end())
                begin = None
    return spans


def definition_at(text, code, at):
    """Name of the constant table or of the macro of several lines that the line at this place is in; None where there is none."""
    lines, row = text.split("\n"), text.count("\n", 0, at)
    while row and lines[row - 1].endswith("\\"):
        row -= 1
    macro = re.match(r"#define (\w+)", lines[row])
    if macro:
        return macro.group(1)
    tables = list(re.finditer(r"\b(\w+)(?:\[[^\]\n]*\])+ = \{[^\n]*\n", code[:at]))
    return tables[-1].group(1) if tables and "\n}" not in code[tables[-1].end() - 1:at] else None


def lines_of(code, begin, end):
    return range(code.count("\n", 0, begin) + 1, code.count("\n", 0, end) + 2)


def mutant(name, file, text, begin, end, new, known=None):
    old = text[begin:end]
    new += "\n" * (old.count("\n") - new.count("\n"))        # other lines keep their numbers
    first = text.count("\n", 0, begin) + 1
    changed = text[:begin] + new + text[end:]
    return Mutant(name, file, changed, range(first, first + old.count("\n") + 1), bool(ORDER.search(old)), known)


def diff(text, m):
    lines = difflib.unified_diff(text.split("\n"), m.text.split("\n"), m.file, m.file, lineterm="", n=0)
    return "\n".join(list(lines)[2:])


# ---- the list ----

def read_list(path, texts):
    """Mutants of a list (its own head describes the form), and a message for each that does not apply exactly once."""
    mutants, lost = [], []
    spans = {file: functions(blank(text)) for file, text in texts.items()}
    for block in re.split(r"\n\s*\n", open(path, encoding="utf-8").read()):
        lines = [line for line in block.split("\n") if line.strip() and not line.startswith("#")]
        if not lines:
            continue
        file, *function = lines[1].split()
        old, new, known = ("\n".join(line[2:] for line in lines[2:] if line[0] == mark) for mark in "-+?")
        begin, end = spans[file].get(function[0], (0, 0)) if function else (0, len(texts[file]))
        words = r"\s+".join(re.escape(word) for word in old.split())    # however it is broken into lines
        found = list(re.compile(words).finditer(texts[file], begin, end))
        if function and not end:
            lost.append("%s: %s has no function %s" % (lines[0], file, function[0]))
        elif len(found) != 1:
            where = "%s in %s" % (file, function[0]) if function else file
            lost.append("%s: found %d times, expected once, in %s:\n    %s" % (lines[0], len(found), where, old))
        else:
            mutants.append(mutant(lines[0], file, texts[file], found[0].start(), found[0].end(), new, known or None))
    return mutants, lost


# ---- by chance ----

SWAPS = {" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == ",
         " + ": " - ", " - ": " + ", " * ": " + ", " / ": " * ", " % ": " / ", " += ": " -= ", " -= ": " += ",
         " *= ": " += ", " && ": " || ", " || ": " && ", " << ": " >> ", " >> ": " << ", " & ": " | ", " | ": " & ",
         " ^ ": " | "}
# for speed or for messages alone: what changes there changes no result
IDLE_FUNCTIONS = re.compile(r"besa__(cpu_(grain|team|ahead)|advise|release_\w+|expect_pages|fail|pass_error|cuda_row_threads"
                            r"|cuda_flat_blocks|vocab_chunk|piece_bytes|stream_send)$")
IDLE_LINES = re.compile(r"ASSERT|_FITS|prefetch|grain =|int vector =|cpu_supports|release_|expect_pages|\(void\)")
IDLE_CALLS = re.compile(r"\b\w*(_fail|_refuse|notes_add|_show)\(")


def idle_spans(code, begin, end):
    """Calls that make messages, and lines that IDLE_LINES describes."""
    spans = []
    for m in IDLE_CALLS.finditer(code, begin, end):
        level, i = 1, m.end()
        while level:
            level += (code[i] == "(") - (code[i] == ")")
            i += 1
        spans.append((m.start(), i))
    for m in re.compile(r"[^\n]+").finditer(code, begin, end):
        if IDLE_LINES.search(m.group()):
            spans.append(m.span())
    return spans


def other_number(number, chance):
    if number.lower().startswith("0x"):
        return re.sub(r"[0-9A-Fa-f](?=[uU]?[lL]*$)", lambda m: "%X" % (int(m.group(), 16) ^ 1), number)
    value = re.match(r"[\d.]+(?:[eE][-+]?\d+)?", number).group()
    suffix = number[len(value):]
    if "." in value or "e" in value.lower() or suffix in ("f", "F"):
        return (repr(float(value) * 2) if float(value) else "1.0") + suffix
    return str(chance.choice([int(value) + 1, abs(int(value) - 1)])) + suffix


def statements(code, begin, end):
    """Places of statements that can be left out: calls, assignments, jumps, an if with its one statement; no declarations."""
    for m in re.compile(r"^[ \t]+(?=[A-Za-z_*(+-])", re.M).finditer(code, begin, end):
        level, i = 0, m.end()
        while i < end and (level or code[i] not in ";{}"):
            level += (code[i] in "([") - (code[i] in ")]")
            i += 1
        text = code[m.end():i]
        declared = re.match(r"(const |static |unsigned )?[A-Za-z_]\w*(<\w+>)? \**(const )?[A-Za-z_]\w*\s*([=,\[(]|$)", text)
        kept = re.match(r"(else|for|while|do|return|typedef|BESA__\w*(ROWS|EIGHTS|FLAT|UNROLL))\b", text)
        if i < end and code[i] == ";" and not kept and (text.startswith("if (") or not declared):
            yield m.end(), i + 1


def candidates(file, text, chance):
    """kind -> [(begin, end, replacement)] of every place that can be mutated."""
    code = blank(text)
    kinds = {"operator": [], "comparison": [], "bound": [], "constant": [], "statement": [], "barrier": []}
    for name, (begin, end) in functions(code).items():
        if IDLE_FUNCTIONS.match(name):
            continue
        idle = idle_spans(code, begin, end)
        body = code.index("{", begin)

        def add(kind, first, last, new):
            if not any(a <= first < b for a, b in idle):
                kinds[kind].append((first, last, new))
        for m in re.compile("|".join(map(re.escape, SWAPS))).finditer(code, body, end):
            if m.group() == " * " and re.search(r"(const|float|void|char|int\w*|T)$", code[max(0, m.start() - 40):m.start()]):
                continue
            line = code[code.rfind("\n", 0, m.start()) + 1:m.start()]
            kind = "operator" if m.group()[1] not in "<>=!" or m.group() in (" << ", " >> ") else "comparison"
            add("bound" if kind == "comparison" and "for (" in line else kind, m.start(), m.end(), SWAPS[m.group()])
        for m in re.compile(r"(?<![\w.\[])(0x[0-9A-Fa-f]+|\d+(\.\d+)?([eE][-+]?\d+)?)[uUlLfF]*\b(?!\])").finditer(code, body, end):
            line = code[code.rfind("\n", 0, m.start()) + 1:m.start()]
            add("bound" if "for (" in line else "constant", m.start(), m.end(), other_number(m.group(), chance))
        for first, last in statements(code, body, end):
            add("barrier" if re.search(ORDER.pattern + r"|besa__sync\(", code[first:last]) else "statement", first, last, ";")
    return kinds


def generate(texts, seed):
    """Mutants without end in an order that the seed decides, each at most once."""
    chance = random.Random(seed)
    kinds = {}
    for file in sorted(texts):
        for kind, places in candidates(file, texts[file], chance).items():
            kinds.setdefault(kind, []).extend((file,) + place for place in places)
    for places in kinds.values():
        chance.shuffle(places)
    weight = {"operator": 20, "comparison": 25, "bound": 10, "constant": 20, "statement": 20, "barrier": 5}
    while any(kinds.values()):
        kind = chance.choices(list(weight), weight.values())[0]
        if kinds[kind]:
            file, begin, end, new = kinds[kind].pop()
            old = re.sub(r"\s+", " ", texts[file][begin:end].strip())
            line = texts[file].count("\n", 0, begin) + 1
            column = begin - texts[file].rfind("\n", 0, begin)
            name = "%s %s:%d:%d: %s -> %s" % (kind, file, line, column, old[:60], new.strip())
            yield mutant(name, file, texts[file], begin, end, new)
