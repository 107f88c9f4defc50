#!/bin/sh
# test_snippets.sh HEADER README WORK - what is written for readers is true: the header's contents name its sections
# in their order, no section uses a later one, options and operations are complete, the quick start in its manual compiles,
# and so does every C block of the README. And the builds that its limits rule out are refused.
header=$1 readme=$2 work=$3 cc=${CC:-cc}
include=$(dirname "$header")
rm -rf "$work" && mkdir -p "$work" || exit 1

verdict() { if [ "$1" -eq 0 ]; then echo "PASS $2"; else echo "FAIL $2"; failed=1; fi; }
failed=0

# The contents and the markers agree, and sections use only earlier ones.
awk -f sections.awk "$header" "$header"
verdict $? "sections in order"

# The manual names functions that exist.
missing=""
for name in $(sed '/define BESA_H$/q' "$header" | grep -o 'besa__[a-z0-9_]*' | sort -u); do
    grep -q "^static .*[ *]$name(" "$header" || missing="$missing $name"
done
[ -z "$missing" ]
verdict $? "functions that the manual names${missing:+, but$missing}"

# The manual's table of formulas names operations, and what it counts as the version is that of its first line.
missing="" found=0
for name in $(sed -n '/^ \*     The arithmetic is/,/^ \* CONTENTS/p' "$header" | sed 's/^ \*         \([a-z_]*\) .*   \([a-z]*_[a-z]*\)  .*/\1 \2/p;d'); do
    found=$((found + 1))
    sed -n '/^#define BESA_OPERATIONS/,/^$/p' "$header" | grep -q "X($name)" || missing="$missing $name"
done
[ $found -ge 14 ] && [ -z "$missing" ]
verdict $? "the manual's formulas are operations: $found${missing:+, but$missing}"
version=$(sed -n 's/^#define BESA_VERSION_M[AI][JN]OR //p' "$header" | paste -sd .)
head -1 "$header" | grep -q "besa.h - v$version " && sed -n '/^ \* HISTORY/,/\*\//p' "$header" | sed -n 3p | grep -q " $version " &&
    grep -q "^version = \"$version\"" "$include/examples/python/pyproject.toml"
verdict $? "the version is $version in all places"

# The fields of a struct in the header, one a line.
fields() { sed -n "/^typedef struct $1 {/,/^} $1;/p" "$header" | sed '1d;$d; s,/\*.*,,; s/.*\*\///' |
           sed -n 's/^ *\(const \|struct \)*[a-z_0-9]* \**\(.*\);.*/\2/p' | tr -d '* ' | tr ',' '\n'; }

# Every option has a row in the table, but for pointers, callbacks, and what is about memory or another file alone.
missing=""
for field in $(fields besa_rate_options) $(fields besa_prune_options); do
    case $field in rates|fixed|masks|block_targets|keep_rates|device_memory|comm|progress|step|card|user|preset) continue ;; esac
    grep -q "BESA__\(RATE\|PRUNE\)([A-Z0-9]*, $field)" "$header" || missing="$missing $field"
done
[ "$(fields besa_prune_options | wc -l)" -gt 12 ] && [ -z "$missing" ]
verdict $? "every option has a row${missing:+, but$missing}"

# Every operation has a case in backend_ops.h; those about order and memory are tested where they are used.
missing=""
for operation in $(sed -n '/^#define BESA_OPERATIONS/,/^$/p' "$header" | grep -o 'X([a-z_]*)' | tr -d 'X()'); do
    case $operation in destroy|host_alloc|host_free|memory_info|record|wait|elapsed) continue ;; esac
    grep -q "be->$operation(" backend_ops.h || missing="$missing $operation"
done
[ "$(sed -n '/^#define BESA_OPERATIONS/,/^$/p' "$header" | grep -o 'X(' | wc -l)" -gt 45 ] && [ -z "$missing" ]
verdict $? "every operation has a case${missing:+, but$missing}"

# Wrap a snippet that has no function of its own: its preprocessor lines first, the rest in a function.
compile()
{
    if grep -q '^{' "$1"; then cp "$1" "$1.c"
    else
        { grep '^ *#' "$1"; grep -q 'include "besa.h"' "$1" || echo '#include "besa.h"'
          echo 'void snippet(void);'; echo 'void snippet(void)'; echo '{'; grep -v '^ *#' "$1"; echo '}'; } >"$1.c"
    fi
    $cc -std=gnu11 -Wall -Wextra -Wno-unused -I"$include" -fsyntax-only "$1.c" 2>"$1.log"
    status=$?
    [ $status -eq 0 ] || sed 's/^/    /' "$1.log" | head -20
    return $status
}

awk -v work="$work" '/^```c$/ { n++; f = sprintf("%s/readme%d", work, n); next } /^```/ { f = "" } f { print >f }' "$readme"
found=0
for block in "$work"/readme?*; do
    [ -f "$block" ] || continue
    case $block in *.c|*.log) continue ;; esac
    found=1
    compile "$block"
    verdict $? "README, C block $(basename "$block" | tr -dc 0-9)"
done
[ $found -eq 1 ] || { echo "FAIL the README has no C block"; failed=1; }

# The manual's quick start: the indented lines below its title; a line of prose in it begins with "...".
sed -n '/^ \* QUICK START/,/^ \* [^ ]/p' "$header" | sed -n 's/^ \*     //p' | grep -v '^ *\.\.\.' >"$work/quickstart"
if [ "$(wc -l <"$work/quickstart")" -gt 5 ]; then
    { grep '^ *#' "$work/quickstart"; printf '#include <stdio.h>\nvoid quick_start(int32_t *ids);\nvoid quick_start(int32_t *ids)\n{\n'
      grep -v '^ *#' "$work/quickstart"; echo '}'; } >"$work/quick.c"
    $cc -std=gnu11 -Wall -Wextra -I"$include" -fsyntax-only "$work/quick.c" 2>"$work/quick.log"
    status=$?
    [ $status -eq 0 ] || sed 's/^/    /' "$work/quick.log" | head
    verdict $status "the quick start in the header compiles"
else echo "FAIL the header's manual has no quick start"; failed=1; fi

# The header refuses float arithmetic that is not as written. only_if STATUS VALUE FLAGS...: what the preprocessor makes of it
only_if()
{
    expected=$1 value=$2
    shift 2
    printf '#include <float.h>\n#undef FLT_EVAL_METHOD\n#define FLT_EVAL_METHOD %s\n' "$value" >"$work/float.c"
    printf '#define BESA_IMPLEMENTATION\n#include "besa.h"\n' >>"$work/float.c"
    $cc "$@" -I"$include" -E -o "$work/float.i" "$work/float.c" 2>"$work/float.log"
    found=$?
    [ $found -eq 0 ] || grep -q 'besa.h: f' "$work/float.log" || found=2
    [ $((found > 0)) -eq "$expected" ] && [ $found -lt 2 ]
    verdict $? "FLT_EVAL_METHOD $value $*: $([ "$expected" -eq 1 ] && echo refused || echo compiles)"
}
only_if 0 0
only_if 0 16
only_if 1 1
only_if 1 2
only_if 1 -1
only_if 1 0 -ffast-math
only_if 1 0 -ffinite-math-only

# The method by hand prints what it printed when it was looked at; python/besa_by_hand.py is compared with it too.
$cc -std=c11 -O1 -ffp-contract=off -I"$include" "$include/examples/besa_by_hand.c" -o "$work/by_hand" -lm 2>"$work/by_hand.log" &&
    "$work/by_hand" >"$work/by_hand.txt" && cmp "$work/by_hand.txt" data/besa_by_hand.txt
verdict $? "besa_by_hand.c prints data/besa_by_hand.txt"
[ "$(wc -l <"$include/examples/besa_by_hand.c")" -lt 150 ] && [ "$(wc -l <"$include/examples/python/besa_by_hand.py")" -le 60 ]
verdict $? "the method by hand: under 150 lines of C, at most 60 of NumPy"
wrong=""
for target in 0.126 0.2 0.25 0.3 0.375 0.4 0.5 0.5625 0.6 0.7 0.75 0.875 0.9 0.99 0.9999; do
    "$work/by_hand" $target >"$work/by_hand.txt" && grep -q 'besa.h computes the same: yes$' "$work/by_hand.txt" || wrong="$wrong $target"
done
for target in 0 1 0.125 x -0.5 nan "0.5 0.5"; do
    "$work/by_hand" $target >"$work/by_hand.txt" 2>&1
    [ $? -eq 2 ] && grep -q '^usage: ' "$work/by_hand.txt" || wrong="$wrong $target"
done
[ -z "$wrong" ]
verdict $? "besa_by_hand.c takes other targets as besa.h does${wrong:+, but$wrong}"

# Level 3's example: what was learned is better than Wanda and has the target.
$cc -std=c11 -O0 -ffp-contract=off -I"$include" "$include/examples/layer.c" -o "$work/layer" -lm 2>"$work/layer.log" &&
    "$work/layer" >"$work/layer.txt" && awk '/^wanda/ { wanda = $3 } /^step 100/ { good = $4 < wanda && $6 == "0.5000" }
                                             /^sparsegpt/ { good2 = $3 < wanda } END { exit !(good && good2) }' "$work/layer.txt"
verdict $? "layer.c learns, and has Wanda and SparseGPT beside it"
sed -n 's/^row 0: column \([0-9]*\) goes first; likeliest rate \([01]\.[0-9]*\), beta \(0\.[0-9]*\); dL.dbeta of rate 1 \([-0-9.e]*\)$/\1 \2 \3 \4/p' \
    "$work/layer.txt" | awk '{ good = $1 < 128 && $2 <= 1 && $3 > 1 / 101 && $3 < 1 && $4 != 0 } END { exit !(NR == 1 && good) }'
verdict $? "layer.c reads ranks, beta and sums of a row"

# Level 2's example prunes, stops where it is asked to, and says what is wrong.
$cc -std=c11 -O1 -ffp-contract=off -I"$include" "$include/examples/block.c" -o "$work/block" -lm 2>"$work/block.log" &&
    "$work/block" >"$work/block.txt" 2>"$work/block.log" && grep -q '^sparsity 0.6000 of the block$' "$work/block.txt" &&
    awk '/^loss/ { good = $2 > $10 } END { exit !good }' "$work/block.txt"
verdict $? "block.c prunes a block"
"$work/block" cancel >"$work/block.txt" 2>"$work/block.log"
[ $? -eq 130 ] && grep -q 'stopped by the progress callback in block 0 of 1' "$work/block.log" && [ ! -s "$work/block.txt" ]
verdict $? "block.c stops"
"$work/block" error >"$work/block.txt" 2>"$work/block.log"
[ $? -eq 1 ] && grep -q 'target is 1.6, expected above 0 and below 1' "$work/block.log"
verdict $? "block.c says what is wrong"
exit $failed
