#!/bin/sh
# portable.sh BESA_DIRECTORY WORK STORIES REFERENCE [part of a name] - the header on other machines, C libraries and
# compilers, as far as they are installed: 32 bits, musl, C99, tcc, mingw, OpenBLAS, another locale, AArch64 and
# big-endian s390x under qemu; and that builds are refused, or right, whose float arithmetic is not as written.
besa=$1 work=$2 stories=$3 reference=$4 only=$5
warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror"
mkdir -p "$work"
failed=0

verdict() { if [ "$1" -eq 0 ]; then echo "PASS $2"; else echo "FAIL $2"; failed=1; fi; }
skip() { echo "SKIP $1: $2"; }
wanted() { case $1 in *"$only"*) return 0 ;; *) return 1 ;; esac; }

# has COMPILER FLAGS...: it makes programs
has() { echo '#include <stdio.h>
int main(void) { return 0; }' >"$work/empty.c" && "$@" -o "$work/empty" "$work/empty.c" >/dev/null 2>&1; }

# run NAME COMMAND...: its own PASS, FAIL and SKIP lines are shown where it fails; else one line is
run()
{
    name=$1
    shift
    OMP_NUM_THREADS=2 "$@" >"$work/log" 2>&1 && ! grep -q '^FAIL' "$work/log" && grep -q '^PASS' "$work/log"
    status=$?
    [ $status -eq 0 ] || grep -v '^PASS' "$work/log" | sed 's/^/    /' | head -20
    verdict $status "$name"
}

# build NAME PROGRAM COMPILER FLAGS...: 0 where $work/PROGRAM was made; without a level among the flags operations are optimised
# as users have them, what runs for a moment is compiled soon, and what computes little sooner
build()
{
    name=$1 program=$2 compiler=$3 level=-O1
    shift 3
    case $program in test_ops) level=-O2 ;; test_forms|test_io) level=-O0 ;; esac
    rm -f "$work/$program"
    $compiler $level "$@" -I"$besa" -I. -o "$work/$program" "$program.c" $libraries -lm >"$work/log" 2>&1 && return 0
    grep -E 'error|warning|undefined' "$work/log" | head -5 | sed 's/^/    /'
    verdict 1 "$name builds"
    return 1
}

# suite NAME RUNNER COMPILER FLAGS...: the test programs in $programs
suite()
{
    suite=$1 runner=$2
    shift 2
    wanted "$suite" || return
    if ! has "$@"; then skip "$suite" "$1 makes no such programs"; return; fi
    for program in $programs; do
        case $program in
        test_portable) arguments=$stories ;;
        test_ops) arguments="--cases test 2" ;;
        test_reference) arguments="$reference $(dirname "$reference")/cases" ;;
        test_forms) arguments="$(dirname "$reference")/cases" ;;
        test_io) arguments="$reference/checkpoints $(cd "$work" && pwd)" ;; # it makes links
        test_pipeline) arguments="$stories $reference" ;;
        esac
        build "$suite, $program" $program "$@" && run "$suite, $program" $runner "$work/$program" $arguments
    done
}

# refused NAME WORDS COMPILER FLAGS...: an #error that says why
refused()
{
    name=$1 words=$2
    shift 2
    wanted "$name" || return
    printf '#define BESA_IMPLEMENTATION\n#include "besa.h"\n' >"$work/refused.c"
    if ! command -v "$1" >/dev/null; then skip "$name" "no $1"; return; fi
    ! "$@" -I"$besa" -E -o "$work/refused.i" "$work/refused.c" >"$work/log" 2>&1 && grep -q "besa.h: .*$words" "$work/log"
    verdict $? "$name"
}

for cc in gcc clang; do
    for flag in -ffast-math -Ofast -ffinite-math-only; do refused "$cc $flag is refused" "-ffast-math" $cc $flag; done
    refused "$cc -m32 with x87 is refused" "-msse2 -mfpmath=sse" $cc -m32 -mno-sse
    programs=test_portable libraries=
    for level in -O0 -O3; do suite "$cc $level -funsafe-math-optimizations" "" $cc $level -funsafe-math-optimizations; done
    suite "$cc -std=c99" "" $cc -std=c99 -O1 $warnings -Wno-conversion -Wno-sign-conversion -Wno-shadow
done

programs="test_portable test_ops test_forms test_reference test_io ${PIPELINE-test_pipeline}" # PIPELINE=: without it
suite "32-bit" "" gcc -std=gnu11 -m32 -msse2 -mfpmath=sse -D_FILE_OFFSET_BITS=64
programs="test_portable test_forms test_reference test_io"
suite "musl" "" musl-gcc -std=gnu11 -static
programs="test_portable"
suite "tcc" "" tcc
suite "no-simd" "" gcc -DBESA_NO_SIMD
programs="test_ops test_reference" libraries=-lopenblas
suite "OpenBLAS" "" gcc -std=gnu11 -DBESA_CBLAS
programs="test_portable" libraries=

name="mingw"
if wanted "$name"; then
    for cc in x86_64-w64-mingw32-gcc x86_64-w64-mingw32-g++; do
        case $cc in *g++) std="-xc++ -std=c++17" ;; *) std=-std=c99 ;; esac
        if ! has $cc; then skip "$name, $cc" "not installed"; continue; fi
        $cc $std -O2 $warnings -DBESA_NO_STDIO -I"$besa" -o "$work/mingw.exe" strict/first.c strict/second.c >"$work/log" 2>&1
        status=$?
        [ $status -eq 0 ] || head -5 "$work/log"
        verdict $status "$name, $cc builds levels 2 and 3"
    done
    if has x86_64-w64-mingw32-gcc && command -v wine >/dev/null; then
        build "$name, test_portable" test_portable x86_64-w64-mingw32-gcc -std=gnu11 -O2 -static -DBESA_NO_STDIO &&
            run "$name, test_portable under wine" wine "$work/test_portable"
    fi
fi

# A locale with a decimal comma, made for the test.
name="locale"
if wanted "$name"; then
    if localedef -i de_DE -f UTF-8 "$work/de_DE.UTF-8" >/dev/null 2>&1 || [ -d "$work/de_DE.UTF-8" ]; then
        build "$name" test_portable gcc -O1 && run "$name" env LOCPATH="$work" "$work/test_portable" "$stories" "a locale"
    else skip "$name" "localedef cannot make it"; fi
fi

# qemu TARGET RUNNER: gcc for the target, or clang and the target's libc
qemu()
{
    target=$1 runner=$2
    shift 2
    if ! command -v "$runner" >/dev/null; then skip "$target" "no $runner"; return; fi
    if has "$target-gcc"; then suite "$target under qemu" "$runner" "$target-gcc" -O1 -static
    else suite "$target under qemu" "$runner" clang --target=$target -O1 -static; fi
}
programs="test_portable test_ops"
qemu aarch64-linux-gnu qemu-aarch64
programs="test_portable"
qemu s390x-linux-gnu qemu-s390x
exit $failed
