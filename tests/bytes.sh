#!/bin/sh
# bytes.sh BESA MODELS WORK [DEVICE] - one line per run of the command line program BESA: a hash of all that it wrote, its
# report (times and machine aside) included but for the list of options, and the run's name. Two versions of the library compute the same where the lists agree:
#     make bytes >before; ...; make bytes | diff before -
# Lists differ between processors and compilers: compare only what one machine made. MODELS holds stories260K and the
# reference checkpoints; DEVICE: cuda, for a program built on the stand-in runtime.
besa=$1 stories=$2 checkpoints=$3 work=$4 device=${5:-cpu}
mkdir -p "$work"
failed=0
set -f
OMP_WAIT_POLICY=passive
export OMP_WAIT_POLICY

# run NAME MODEL TOKENS OPTIONS...
run()
{
    name=$1 model=$2 tokens=$3
    shift 3
    rm -rf "$work/out" "$work/out.partial" "$work/report"
    if "$besa" prune "$model" "$work/out" --tokens "$tokens" --device $device --report "$work/report" --quiet "$@" \
        >"$work/said" 2>&1
    then
        {
            (cd "$work/out" && find . -type f | LC_ALL=C sort | while read -r file; do
                echo "$file"
                case $file in ./besa.json) sed '/"options": {/d' "$file" ;; *) cat "$file" ;; esac
            done)
            sed -E '/"(options|command|threads|device_bytes|host_bytes)": /d; s/"seconds": (\{[^}]*\}|[0-9.e+-]+)//g' "$work/report"
        } | sha256sum | sed "s|-\$|$device $name|"
    else
        echo "failed: $device $name: $(tail -1 "$work/said")"
        failed=1
    fi
}

# small NAME OPTIONS...: on stories260K
small()
{
    name=$1
    shift
    run "stories260K $name" "$stories" "$stories/calibration_tokens.npy" --nsamples 9 --seqlen 48 "$@"
}

while read -r options; do
    case $options in ''|'#'*) continue ;; esac
    small "$options" $options
done <<'END'
--method magnitude
--method magnitude --per-row --sparsity 0.37
--method magnitude --pattern 2:4
--method wanda
--method wanda --sparsity 0.73 --skip layers.1 --fix v_proj=0.25
--method wanda --pattern 1:4
--method sparsegpt
--method sparsegpt --sparsity 0.61 --fix down_proj=0.3
--method sparsegpt --pattern 2:4
--sparsity 0.5
--sparsity 0.7 --epochs 2
--sparsity 0.31 --batch-size 4
--batch-size 4 --norm-all --epochs 2
--batch-size 9
--preset published-row
--preset published-layer
--preset published-row --projection
--rates row --row-scale 2
--rates layer --layer-scale 3
--layer-scale 2 --row-scale 0.5
--group-rows 3
--group-rows all
--candidates 7
--plain-softmax --optimizer adamw
--optimizer adamw --lr 0.05 --weight-decay 0.01
--zero-start --lambda 0
--d-coef 1 --weight-decay 0.1 --lambda 20
--importance magnitude
--importance sparsegpt
--importance sparsegpt-squared --sparsity 0.6
--importance gradient
--learn both --rank-interval 0 --weight-epochs 1
--learn both --rank-interval 2 --importance gradient --weight-epochs 1
--dense-stream --batch-size 2
--norm-all
--no-projection
--skip v_proj --fix layers.2=0.7
--skip *.mlp.* --sparsity 0.4
--preset best
--learn weights --batch-size 4 --weight-epochs 1 --weight-warmup 0.2
--bits 4
--bits 3 --group-size 24 --method wanda --clipping learned --batch-size 4
--bits 4 --method sparsegpt
--method wanda --preset weights --pattern 2:4
--preset best --pattern 2:4
--preset best --bits 4
--preset best --bits 3 --quantize-first
--learn weights --pattern 1:4 --importance gradient --fix down_proj=0.3 --weight-epochs 1
--granularity attn-mlp --batch-size 2
--granularity layer --learn both --weight-epochs 1
--dense-share 0.3 --depth-slope 0.2
--blocks 1-2 --learn both --weight-lr 0.1
--method wanda --refit cg
--method sparsegpt --pattern 2:4 --refit cg --refit-steps 4
--refit obs --learn weights --weight-epochs 1
END
run "stories260K with a test" "$stories" "$stories/calibration_tokens.npy" --nsamples 6 --seqlen 64 \
    --test "$stories/test_tokens.npy" --test-seqlen 64 --windows 5
if [ $device = cpu ]; then
    small "--bf16" --bf16
    small "--threads 1" --threads 1
    small "--memory 11M --batch-size 5" --memory 11M --batch-size 5
else
    small "--fp32" --fp32
    small "--fp32 --method sparsegpt" --fp32 --method sparsegpt
    small "--memory 3M --batch-size 3" --memory 3M --batch-size 3
    small "--memory 3M --dense-stream" --memory 3M --dense-stream
fi
set +f
for model in "$checkpoints"/*/; do
    model=${model%/}
    for options in "--sparsity 0.5" "--sparsity 0.45 --batch-size 2 --epochs 2" "--method wanda" "--method sparsegpt"; do
        run "$(basename "$model") $options" "$model" "$model/ids.npy" --nsamples 2 --seqlen 40 $options
    done
done
exit $failed
