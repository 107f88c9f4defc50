#!/bin/sh
# exercises.sh BESA_DIRECTORY WORK CC PYTHON [NAME] - the diffs of examples/exercises, each applied to a copy, built and run on the
# bundled model; what the new architecture computes, against transformers where that is installed. With NAME, importance, option
# or architecture: the same of that exercise alone, as it is solved in BESA_DIRECTORY.
besa=$(cd "$1" && pwd) work=$2 cc=$3 python=$4 own=$5 self=$(cd "$(dirname "$0")" && pwd)/exercises.sh
rm -rf "$work" && mkdir -p "$work" && work=$(cd "$work" && pwd) || exit 1
failed=0
verdict() { if [ "$1" -eq 0 ]; then echo "PASS $2"; else echo "FAIL $2"; sed 's/^/    /' "$work/log" | tail -20; failed=1; fi; }
[ -n "$own" ] || command -v git >/dev/null || { echo "SKIP exercises: no git"; exit 0; }
stories=$besa/examples/stories260K
data="--tokens $stories/calibration_tokens.npy --nsamples 4 --seqlen 64"

# solve NAME: the program as the diff makes it, or as it is
solve()
{
    mkdir -p "$work/$1/examples" && cd "$work/$1" && cp "$besa/besa.h" . && cp "$besa"/examples/*.[ch] examples || exit 1
    { { [ -n "$own" ] || { git apply "$besa/examples/exercises/$1.diff" && grep -q "$1.diff" "$besa/examples/README.md"; }; } &&
      $cc -std=c11 -O0 -ffp-contract=off -Wall -Wextra -Werror examples/besa.c -o besa -lm; } >"$work/log" 2>&1
    status=$?
    verdict $status "exercise $1: $([ -n "$own" ] || echo "the diff applies and ")compiles without a warning"
    [ $status -eq 0 ] || exit 1
}
prune() { output=$1; shift; ./besa prune "$stories" "$output" $data --quiet "$@" >"$work/log" 2>&1; }
differ() { ! cmp -s "$1/model.safetensors" "$2/model.safetensors"; }

check_importance()
{
    prune wanda && prune magnitude --importance magnitude && prune root --importance root --report root.json &&
        differ wanda root && differ magnitude root && grep -q '"importance": "root"' root.json && ./besa prune --help | grep -q '|root|'
    verdict $? "exercise importance: --importance root has masks of its own"
}

check_option()
{
    learning="--optimizer adamw --lr 0.5"
    prune default $learning && prune same $learning --eps 1e-8 --report same.json && prune other $learning --eps 0.01 &&
        ! differ default same && differ default other &&
        grep -q '"eps": 1e-08' same.json
    verdict $? "exercise option: --eps is 1e-8 by default, decides the output and is recorded"
    ! prune refused --eps 2 && grep -q -- "--eps is '2', expected a number, above 0 and below 1" "$work/log"
    verdict $? "exercise option: --eps 2 is refused"
}

cat >"$work/gemma.py" <<'END'
import math, sys
import numpy as np
import torch
from transformers import GemmaConfig, GemmaForCausalLM
torch.manual_seed(1)
model = GemmaForCausalLM(GemmaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)).eval()
for name, weight in model.named_parameters():
    torch.nn.init.normal_(weight, std=0.2)
model.save_pretrained("gemma")
ids = np.random.default_rng(1).integers(0, 96, (3, 32))
np.save("ids.npy", ids.astype(np.int32))
batch = torch.from_numpy(ids)
with torch.no_grad():
    print(math.exp(float(model(batch, labels=batch).loss)))
END

check_architecture()
{
    mkdir gemma
    if $python -c 'import torch, transformers' 2>/dev/null; then
        $python ../gemma.py >expected 2>"$work/log" && ./besa eval gemma --tokens ids.npy --quiet >found 2>"$work/log" &&
            awk 'NR == 1 { x = $1 } NR == 2 { exit !(x > 1 && $2 / x > 0.9999 && $2 / x < 1.0001) }' expected found &&
            ./besa info gemma | grep -q '^model_type *gemma$'
        status=$?
        cat expected found >>"$work/log" 2>/dev/null
        verdict $status "exercise architecture: Gemma's perplexity is that of transformers"
    else echo "SKIP exercise architecture: no torch, transformers"; fi
}

case $own in importance|option|architecture) solve "$own" && "check_$own"; exit $failed ;; esac
[ -z "$own" ] || { echo "FAIL no exercise $own: importance, option or architecture"; exit 1; }
for name in importance option architecture; do solve $name && check_$name; done

# The command that checks one's own solution: it passes where there is one, and fails where there is none.
cd "$work" && cp -r "$besa/examples/stories260K" importance/examples || exit 1
"$self" "$work/importance" "$work/own" "$cc" "$python" importance >"$work/log" 2>&1 && [ "$(grep -c ^PASS "$work/log")" -eq 2 ] &&
    ! "$self" "$besa" "$work/none" "$cc" "$python" importance >"$work/log" 2>&1 && grep -q '^FAIL exercise importance: --importance root' "$work/log"
verdict $? "exercise importance: a solution is told from none"
exit $failed
