#!/bin/sh
# test_mpi.sh BESA BESA_MPI STORIES WORK - examples/mpi.c: one run in several processes by MPI, on this machine.
one=$1 many=$2 stories=$3 work=$4
rm -rf "$work" && mkdir -p "$work" || exit 1
. ./verdict.sh

if ! command -v mpirun >/dev/null || [ ! -x "$many" ]; then
    echo "SKIP processes by MPI: no mpirun or mpicc (openmpi-bin, libopenmpi-dev)"
    exit 0
fi
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
data="--tokens $stories/calibration_tokens.npy --seqlen 32 --nsamples 24 --batch-size 4 --quiet"
text="--test $stories/test_tokens.npy --windows 5 --test-seqlen 64"

# ranks N ARGUMENTS...: in N processes
ranks()
{
    count=$1
    shift
    mpirun --allow-run-as-root --oversubscribe -n "$count" "$many" "$@" >"$work/log" 2>&1
}

perplexity() { sed -n 's/^perplexity \([0-9.]*\).*/\1/p' "$work/log"; }

"$one" prune "$stories" "$work/0" $data $text >"$work/log" 2>&1
alone=$(perplexity)
for n in 1 2 3 4; do
    ranks $n prune "$stories" "$work/$n" $data $text
    awk "BEGIN { apart = $(perplexity) / $alone - 1; exit !(apart * apart < 9e-6) }" 2>>"$work/log"
    verdict $? "mpi: perplexity of $n processes is within 0.3 % of one"
done
cmp "$work/0/model.safetensors" "$work/1/model.safetensors" >"$work/log" 2>&1
verdict $? "mpi: one process by MPI gives the bytes of besa"
ranks 3 prune "$stories" "$work/again" $data --save-rates "$work/rates" && [ -s "$work/rates" ] && [ ! -e "$work/again/besa-rates" ] &&
    cmp "$work/3/model.safetensors" "$work/again/model.safetensors" >>"$work/log" 2>&1
verdict $? "mpi: as many processes give the same bytes again, and learned rates once"

# Killed: the others end at once, and the run goes on from there.
slow="$data --epochs 6"
ranks 3 prune "$stories" "$work/whole" $slow
(ranks 3 prune "$stories" "$work/killed" $slow; echo $? >"$work/status") &
while ! grep -q 'block 0' "$work/killed.partial/besa-journal" 2>/dev/null && [ ! -e "$work/status" ]; do sleep 0.05; done
victim=$(ps -eo pid,args | awk -v out="$work/killed" '$2 ~ /besa_mpi$/ && index($0, out " ") { print $1 }' | tail -1)
kill -9 $victim 2>>"$work/log"
for i in $(seq 60); do [ -e "$work/status" ] || sleep 1; done
[ "$(cat "$work/status" 2>/dev/null)" != 0 ] && [ -e "$work/status" ] && [ ! -e "$work/killed" ]
verdict $? "mpi: a process that is killed ends the others"
ranks 2 prune "$stories" "$work/killed" $slow
[ $? -ne 0 ] && grep -q 'processes=3 (this run: processes=2)' "$work/log"
verdict $? "mpi: another number of processes does not go on with it"
ranks 3 prune "$stories" "$work/killed" $slow && grep -q 'taken over' "$work/log" &&
    cmp "$work/whole/model.safetensors" "$work/killed/model.safetensors" >>"$work/log" 2>&1
verdict $? "mpi: as many go on with it, to the same bytes"

# One of them has other arguments: all are told which.
mpirun --allow-run-as-root --oversubscribe -n 1 "$many" prune "$stories" "$work/other" $data : \
    -n 1 "$many" prune "$stories" "$work/other" $data --epochs 2 >"$work/log" 2>&1
[ $? -ne 0 ] && grep -q 'rank 1 has other arguments, tokens or files than rank 0: .*epochs=1 (this rank: epochs=2)' "$work/log" &&
    [ ! -e "$work/other" ] && [ ! -e "$work/other.partial" ]
verdict $? "mpi: processes with other arguments are told so"

# Other commands: eval and info are the first one's, plan is of all, compare of one alone.
ranks 3 eval "$work/2" --tokens "$stories/test_tokens.npy" --windows 5 --seqlen 64 --quiet
status=$?
cp "$work/log" "$work/many"
"$one" eval "$work/2" --tokens "$stories/test_tokens.npy" --windows 5 --seqlen 64 --quiet >"$work/log" 2>&1
[ $status -eq 0 ] && [ "$(grep -c ^perplexity "$work/many")" -eq 1 ] && grep -qxF "$(cat "$work/log")" "$work/many"
verdict $? "mpi: eval says once what besa says"
"$one" info "$work/2" >"$work/info" 2>&1 && ranks 3 info "$work/2" && grep -xFf "$work/info" "$work/log" | cmp - "$work/info" >>"$work/log" 2>&1
verdict $? "mpi: info says once what besa says"
ranks 3 plan "$stories" --nsamples 24 --seqlen 32 --batch-size 4 && [ "$(grep -c '^work ' "$work/log")" -eq 1 ] &&
    grep -q '^sums .* over 3 processes' "$work/log"
verdict $? "mpi: plan says once what the first takes, and the sums"
compare="--tokens $stories/calibration_tokens.npy --seqlen 32 --nsamples 4 --test $stories/test_tokens.npy --windows 2 --method wanda"
! ranks 3 compare "$stories" $compare && [ "$(grep -c '^besa compare: compare runs in one process' "$work/log")" -eq 1 ] &&
    ! grep -q '^wanda' "$work/log"
verdict $? "mpi: compare is refused in several processes, once"
ranks 1 compare "$stories" $compare && grep -q '^wanda ' "$work/log"
verdict $? "mpi: compare runs in one"
mpirun --allow-run-as-root --oversubscribe -n 1 "$many" info "$stories" : -n 1 "$many" prune "$stories" "$work/other" $data >"$work/log" 2>&1
[ $? -ne 0 ] && grep -q 'rank 0 was given another command than prune' "$work/log" && [ ! -e "$work/other" ]
verdict $? "mpi: processes with other commands are told so"
exit $failed
