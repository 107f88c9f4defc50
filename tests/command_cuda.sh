#!/bin/sh
# command_cuda.sh BESA WORK STANDIN NVCC [ARCHITECTURE] - the command line's --device in three builds: without CUDA, STANDIN,
# which is the program on the stand-in runtime, and `make cuda` where there is an NVCC, with or without a GPU; with ARCHITECTURE
# for that one alone, instead of all that the Makefile lists.
besa=$1 work=$2 standin=$3 nvcc=$4 architecture=$5
rm -rf "$work" && mkdir -p "$work/examples" || exit 1
cp "$besa/besa.h" "$besa/besa_cuda.cuh" "$work" || exit 1
cp "$besa"/examples/*.[ch] "$besa"/examples/*.cu "$besa/examples/Makefile" "$work/examples" || exit 1
stories=$besa/examples/stories260K
built=$work/examples/besa
data="--tokens $stories/calibration_tokens.npy --nsamples 2 --seqlen 32"
test="--tokens $stories/test_tokens.npy --windows 8 --seqlen 32 --quiet"
. ./verdict.sh

# expect NAME STATUS PATTERN COMMAND...: it ends with that status, and a line of its output has the pattern.
expect()
{
    name=$1 status=$2 pattern=$3
    shift 3
    "$@" >"$work/log" 2>&1
    got=$?
    [ $got -eq "$status" ] && grep -q -e "$pattern" "$work/log"
    verdict $? "$name"
}

perplexity() { "$@" $test 2>"$work/log" | awk '/^perplexity/ { print $2 }'; }

# pruned NAME PROGRAM OUTPUT: prune on the device; what is written has half of the weights and works on the CPU.
pruned()
{
    expect "$1: prune --device cuda" 0 'sparsity 0.500000' "$2" prune "$stories" "$3" $data --quiet --device cuda
    expect "$1: half of the weights are zero" 0 '^226560 weights, 113280 of them zero' "$2" info "$3"
    expect "$1: the CPU measures a finite perplexity" 0 '^perplexity [0-9.]* +/- [0-9.]* over 8 windows' "$2" eval "$3" $test
    echo "$(perplexity "$2" eval "$3") $(perplexity "$2" eval "$3" --device cuda:0 --fp32)" >"$work/log"
    awk '{ d = $1 - $2; ok = $1 > 1 && $2 > 1 && d < 1e-3 * $1 && d > -1e-3 * $1 } END { exit !ok }' "$work/log"
    verdict $? "$1: eval --device cuda:0 --fp32 measures the same"
    expect "$1: plan --device cuda" 0 '^besa on 2 sequences' "$2" plan "$stories" $data --device cuda
    expect "$1: compare --device cuda" 0 '^wanda  *50 %  *0.5000' "$2" compare "$stories" $data --quiet --device cuda \
        --test "$stories/test_tokens.npy" --windows 1 --method wanda
}

env -u MAKEFLAGS make -C "$work/examples" besa CFLAGS=-O1 >"$work/log" 2>&1
verdict $? "built without CUDA"
for command in "prune $stories $work/plain $data" "plan $stories" "eval $stories $test"; do
    expect "${command%% *} --device cuda says how to build it" 1 'make -C examples cuda' "$built" $command --device cuda
done
expect "--device cpu" 0 'sparsity 0.500000' "$built" prune "$stories" "$work/plain" $data --device cpu
for wrong in "--device gpu" "--device cuda:" "--device cuda:x" "--device cuda:-1" "--fp32" "--device cuda --threads 2" \
             "--bf16 --device=cuda"; do
    expect "plan $wrong is refused" 2 'besa plan: --' "$built" plan "$stories" $wrong
done

pruned "stand-in" "$standin" "$work/standin"

# A plan for a GPU that is not here is the plan of the one that is: stand-in's has 16 GiB, 4 multiprocessors and 99 KB
# of shared memory for a block.
here="17179869184 --processors 4 --capability 8.6"
for run in "--nsamples 128 --seqlen 2048" "--method sparsegpt --seqlen 256 --windows 4" "--preset best --bits 4 --fp32" "--memory 40M"; do
    "$standin" plan "$stories" $run --device cuda >"$work/there" 2>"$work/log" &&
        "$built" plan "$stories" $run --device cuda --device-memory $here >"$work/absent" 2>"$work/log" && cmp -s "$work/there" "$work/absent"
    verdict $? "the plan of an absent GPU: $run"
done
expect "stand-in: a GPU that does not exist" 1 'CUDA device 3 does not exist' "$standin" plan "$stories" --device cuda:3

if ! command -v "$nvcc" >/dev/null; then
    echo "SKIP make -C examples cuda: no $nvcc"
    exit $failed
fi
env -u MAKEFLAGS -u CUDA_ARCHS make -n -C "$work/examples" cuda NVCC="$nvcc" >"$work/log" 2>&1
missing=""
for a in 75 80 90 100; do
    ! "$nvcc" --list-gpu-arch | grep -qx "compute_$a" || grep -q -- "-gencode arch=compute_$a,code=sm_$a " "$work/log" || missing="$missing $a"
done
[ -z "$missing" ]
verdict $? "make cuda: every architecture from 75 on that this nvcc has${missing:+, but$missing}"
env -u MAKEFLAGS make -C "$work/examples" cuda NVCC="$nvcc" ${architecture:+CUDA_ARCHS=$architecture} CFLAGS=-O1 >"$work/log" 2>&1 && ! grep -i 'warning' "$work/log"
verdict $? "make -C examples cuda, without a warning"
expect "make cuda: prune on the CPU" 0 'sparsity 0.500000' "$built" prune "$stories" "$work/cpu" $data
if "$built" plan "$stories" --device cuda >"$work/log" 2>&1; then pruned "GPU" "$built" "$work/gpu"
else
    expect "make cuda: no GPU, and it says so" 1 '^besa prune: no CUDA device: ' \
        "$built" prune "$stories" "$work/gpu" $data --device cuda
    echo "SKIP make cuda: prune on a GPU: $(sed 's/^besa prune: //' "$work/log")"
fi
exit $failed
