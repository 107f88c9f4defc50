#!/bin/sh
# link_processes.sh NVCC OBJECT BESA WORK - `make nccl` and `make mpi CUDA=1` of the examples, in a copy: compiled and linked with
# the real NCCL and MPI, warnings are errors; nothing runs. OBJECT: besa_cuda.cuh, compiled by nvcc for one architecture.
nvcc=$1 object=$2 besa=$3 work=$4
rm -rf "$work" && mkdir -p "$work/examples" || exit 1
. ./verdict.sh
cp "$besa/besa.h" "$besa/besa_cuda.cuh" "$work" && cp "$besa/examples/"*.[ch] "$besa/examples/"*.cu "$besa/examples/Makefile" "$work/examples" || exit 1
echo '#include <nccl.h>' >"$work/nccl.cu"

# build TARGET ARGUMENTS...
build()
{
    cp "$object" "$work/examples/besa_cuda.o" # newer than its sources: not made again
    env -u MAKEFLAGS make -C "$work/examples" "$@" CC="${CC:-cc}" NVCC="$nvcc" CUDA_ARCHS=80 CFLAGS='-O1 -Werror' \
        NVCCFLAGS='-Werror all-warnings' >"$work/log" 2>&1
}

name="processes: examples/nccl.cu with the real NCCL"
if ! command -v "$nvcc" >/dev/null || [ ! -e "$object" ]; then echo "SKIP $name: no $nvcc"
elif ! "$nvcc" -E "$work/nccl.cu" >/dev/null 2>&1; then echo "SKIP $name: no nccl.h"
else
    build nccl && [ -x "$work/examples/besa_nccl" ]
    verdict $? "$name"
fi
name="processes: examples/mpi.c with CUDA"
if ! command -v "$nvcc" >/dev/null || [ ! -e "$object" ]; then echo "SKIP $name: no $nvcc"
elif ! command -v mpicc >/dev/null; then echo "SKIP $name: no mpicc (openmpi-bin, libopenmpi-dev)"
else
    build mpi CUDA=1 && [ -x "$work/examples/besa_mpi" ]
    verdict $? "$name"
fi
exit $failed
