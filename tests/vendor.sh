#!/bin/sh
# vendor.sh BESA_DIRECTORY WORK NVCC - the lines of examples/README.md for a project of one's own, each run in such a project.
# SKIP where a compiler or CMake is not there.
besa=$(cd "$1" && pwd) work=$2 nvcc=$3 readme=$besa/examples/README.md
rm -rf "$work" && mkdir -p "$work/project/besa" && work=$(cd "$work" && pwd) || exit 1
failed=0
verdict() { if [ "$1" -eq 0 ]; then echo "PASS $2"; else echo "FAIL $2"; sed 's/^/    /' "$work/log" | tail -20; failed=1; fi; }

# what stands in a project: the copy, the file with the implementation, and for CUDA the file without it
cd "$work/project" || exit 1
mkdir besa/examples && cp "$besa/besa.h" "$besa/besa_cuda.cuh" besa && cp -r "$besa/examples/cmake" besa/examples || exit 1
cp "$besa/examples/quickstart.c" program.c && grep -v BESA_IMPLEMENTATION program.c |
    sed 's,#include "besa.h",&\n#include <stdio.h>,; s/besa_error error;/&\n    besa_backend be;\n    (void)besa_cuda_backend(\&be, NULL, NULL);/' >main.c
printf '#define BESA_IMPLEMENTATION\n#define BESA_CUDA\n#include "besa.h"\n' >besa_cuda.cu

# The blocks of the section, a file each, in their order.
awk -v work="$work" '/^## / { section = /In a project of your own/ } section && /^```[a-z]/ { n++; f = work "/block" n "." substr($0, 4); next }
    /^```/ { f = "" } f { print >f }' "$readme"
: >"$work/log"
[ "$(ls "$work"/block*.sh | wc -l)" -eq 3 ] && [ "$(ls "$work"/block*.cmake | wc -l)" -eq 2 ]
verdict $? "examples/README.md has three lines for compilers and two files for CMake"

# The program that was built says how it is used.
runs() { "$1" >"$work/log" 2>&1; [ $? -eq 2 ] && grep -q '^usage: quickstart' "$work/log"; }

for block in "$work"/block*.sh; do
    compiler=$(sed -n '1s/ .*//p' "$block")
    [ "$compiler" != nvcc ] || compiler=$nvcc
    name="$(basename "$compiler"): the line for a project of one's own"
    if ! command -v "$compiler" >/dev/null || { [ "$compiler" = clang ] &&
         ! echo 'int main(void){return 0;}' | clang -fopenmp -xc - -o "$work/probe" 2>/dev/null; }; then
        echo "SKIP $name: no $compiler, or no OpenMP"; continue
    fi
    rm -f program
    # native asks for a GPU
    sed "s,^nvcc,$nvcc,; s/-arch=native/-arch=sm_80/; s/-O3/-O0/" "$block" >"$work/run.sh"
    sh -e "$work/run.sh" >"$work/log" 2>&1 && [ ! -s "$work/log" ] && runs ./program
    verdict $? "$name"
done

for block in "$work"/block*.cmake; do
    name="CMake: $(sed -n 's/^\(add_subdirectory\|FetchContent_Declare\).*/\1/p' "$block")"
    if ! command -v cmake >/dev/null || ! command -v git >/dev/null; then echo "SKIP $name: no cmake, or no git"; continue; fi
    rm -rf build origin && cp -r besa origin && git init -q -b main origin && git -C origin add -A &&
        git -C origin -c user.name=a -c user.email=a@b commit -qm a
    sed "s,GIT_REPOSITORY URL,GIT_REPOSITORY file://$PWD/origin,; s,GIT_TAG COMMIT,GIT_TAG $(git -C origin rev-parse HEAD)," "$block" >CMakeLists.txt
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS_RELEASE=-O0 >"$work/log" 2>&1 && cmake --build build >>"$work/log" 2>&1 &&
        ! grep -i warning "$work/log" && { ! grep -q OpenMP_C_FOUND:.*TRUE build/CMakeCache.txt || ldd build/program | grep -q omp; } &&
        runs build/program
    verdict $? "$name"
done
# A project of C++ alone, where there is no C compiler.
name="CMake: a project of C++ alone"
if ! command -v cmake >/dev/null || ! command -v c++ >/dev/null; then echo "SKIP $name: no cmake, or no c++"; exit $failed; fi
rm -rf build && cp program.c program.cpp && sed -i 's/ = {0}/ = {}/' program.cpp
sed 's/LANGUAGES C)/CXX)/; s/program\.c)/program.cpp)/' "$work"/block4.cmake >CMakeLists.txt
grep -q '^project(program CXX)' CMakeLists.txt && grep -q 'program.cpp' CMakeLists.txt &&
    CC=/no/compiler cmake -B build -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O0 >"$work/log" 2>&1 && cmake --build build >>"$work/log" 2>&1 &&
    ! grep -i warning "$work/log" && { ! grep -q OpenMP_CXX_FOUND:.*TRUE build/CMakeCache.txt || ldd build/program | grep -q omp; } &&
    runs build/program
verdict $? "$name"
exit $failed
