#!/bin/sh
# strict.sh BESA_DIRECTORY WORK CC CXX OPENMP - the header alone, in two translation units, as C11 and C++17, with and
# without OpenMP and stdio, included twice, whatever came before it: not one warning.
besa=$1 work=$2 cc=$3 cxx=$4 openmp=$5
flags="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror -I$besa"
# gcc's optimiser has warnings of its own (maybe-uninitialized, array-bounds): one build of each language has it. All other
# warnings, and all of clang's, come without it.
case $($cc --version) in *clang*) optimised=-O0 ;; *) optimised=-O1 ;; esac
mkdir -p "$work"
failed=0

# try NAME COMPILER FLAGS...: flags come after -O0
try()
{
    name=$1 compiler=$2
    shift 2
    if $compiler -O0 $flags "$@" -o "$work/program" strict/first.c strict/second.c -lm >"$work/log" 2>&1 && "$work/program"
    then echo "PASS $name"
    else echo "FAIL $name"; grep -E 'error|warning' "$work/log" | head -5 | sed 's/^/    /'; failed=1; fi
}

before="-include stdio.h -include stdlib.h -include string.h -include math.h -include errno.h -include unistd.h"
for omp in "" $openmp; do
    [ "$omp" = "$openmp" ] && level=$optimised || level=-O0
    try "$cc -std=c11 $omp" "$cc" -std=c11 $omp $level
    try "$cxx -std=c++17 $omp" "$cxx" -xc++ -std=c++17 $omp $level
    try "$cc -std=c11 $omp -DBESA_NO_STDIO" "$cc" -std=c11 $omp -DBESA_NO_STDIO
done
try "$cc -std=gnu11 $openmp" "$cc" -std=gnu11 $openmp
for std in c99 gnu11; do try "$cc -std=$std $openmp -DBESA_NO_STDIO" "$cc" -std=$std $openmp -DBESA_NO_STDIO; done
try "$cxx -std=c++17 $openmp -DBESA_NO_STDIO" "$cxx" -xc++ -std=c++17 $openmp -DBESA_NO_STDIO
try "$cc -std=gnu11 $openmp after other headers" "$cc" -std=gnu11 $openmp $before
try "$cxx -std=gnu++17 $openmp after other headers" "$cxx" -xc++ -std=gnu++17 $openmp $before

# All in one file: what it does not use is no warning.
for language in "$cc -std=c11" "$cxx -xc++ -std=c++17"; do
    for without in "" -DBESA_NO_STDIO; do
        if $language $flags -O0 $without "-DBESA_API=static inline" -c -o "$work/static.o" strict/first.c >"$work/log" 2>&1
        then echo "PASS $language $without BESA_API static inline"
        else echo "FAIL $language $without BESA_API static inline"; grep -E 'error|warning' "$work/log" | head -5 | sed 's/^/    /'; failed=1; fi
    done
done

# Strict C11 hides POSIX once another header came first: besa.h must cope, or say so itself.
name="$cc -std=c11 after other headers: works or says why"
if $cc -O0 $flags -std=c11 -include stdio.h -include stdlib.h -o "$work/program" strict/first.c strict/second.c -lm >"$work/log" 2>&1 ||
   grep -q 'error:.*#error\|#error.*besa\|error: "besa' "$work/log"
then echo "PASS $name"; else echo "FAIL $name"; head -5 "$work/log"; failed=1; fi

# The hooks come together or not at all.
if $cc -I"$besa" '-DBESA_MALLOC(n)=malloc(n)' -c -o "$work/hooks.o" strict/first.c >"$work/log" 2>&1
then echo "FAIL BESA_MALLOC without BESA_FREE is refused"; failed=1; else echo "PASS BESA_MALLOC without BESA_FREE is refused"; fi
exit $failed
