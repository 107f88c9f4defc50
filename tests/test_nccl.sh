#!/bin/sh
# test_nccl.sh BESA BESA_NCCL STORIES WORK - examples/nccl.cu: one run in several processes, on stand-ins for CUDA and NCCL.
one=$1 many=$2 stories=$3 work=$4
rm -rf "$work" && mkdir -p "$work" || exit 1
. ./verdict.sh
export TMPDIR="$work" BESA_PORT=$((20000 + $$ % 20000)) OMP_WAIT_POLICY=passive LOCAL_RANK=0
data="--tokens $stories/calibration_tokens.npy --seqlen 16 --nsamples 4 --batch-size 2 --quiet --device cuda --fp32"
text="--test $stories/test_tokens.npy --windows 3 --test-seqlen 32"

perplexity() { sed -n 's/^perplexity \([0-9.]*\).*/\1/p' "$1"; }

# two OUTPUT ARGUMENTS...: in two processes, whose output goes to $work/rank-0 and $work/rank-1; the sum of their status
two()
{
    output=$1
    shift
    WORLD_SIZE=2 RANK=1 "$many" prune "$stories" "$output" "$@" $second >"$work/rank-1" 2>&1 &
    WORLD_SIZE=2 RANK=0 "$many" prune "$stories" "$output" "$@" >"$work/rank-0" 2>&1
    status=$?
    wait $!
    status=$((status + $?))
    cat "$work/rank-0" "$work/rank-1" >"$work/log"
}
second=""

"$one" prune "$stories" "$work/one" $data $text >"$work/log" 2>&1
cp "$work/log" "$work/alone"
two "$work/two" $data $text
awk "BEGIN { apart = $(perplexity "$work/rank-0") / $(perplexity "$work/alone") - 1; exit !(apart * apart < 9e-6) }" 2>>"$work/log"
verdict $? "nccl: perplexity of two processes is within 0.3 % of one"
second="--epochs 2"
two "$work/other" $data
[ $status -eq 2 ] && grep -q 'rank 1 has other arguments' "$work/rank-0" && grep -q 'rank 1 has other arguments' "$work/log"
verdict $? "nccl: processes with other arguments are told so"
second=""

# Killed in the creation of NCCL's communicator, at its first sum and in the middle: the other ends, and says of whom.
for call in 0 1 20; do
    NCCL_STANDIN_KILL=$call WORLD_SIZE=2 RANK=1 "$many" prune "$stories" "$work/killed" $data >"$work/rank-1" 2>&1 &
    WORLD_SIZE=2 RANK=0 timeout 100 "$many" prune "$stories" "$work/killed" $data >"$work/log" 2>&1
    [ $? -eq 1 ] && grep -q 'rank 1 has ended without a word' "$work/log"
    verdict $? "nccl: a process that is killed in call $call ends the other"
    wait $!
done
exit $failed
