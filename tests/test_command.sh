#!/bin/sh
# test_command.sh BESA STORIES README WORK - the command line program BESA: which options it takes, how it reads numbers,
# what it does with hostile text and with an output that cannot be written; and README's commands on the bundled model.
besa=$1 stories=$2 readme=$3 work=$4
rm -rf "$work" && mkdir -p "$work" || exit 1
. ./verdict.sh

# besa's output and status, in $work/log and $got
run()
{
    "$besa" "$@" >"$work/log" 2>&1
    got=$?
}

# check STATUS PATTERN ARGUMENTS...: besa ends so, and a line of what it says has the pattern; else $bad grows.
check()
{
    status=$1 pattern=$2
    shift 2
    run "$@"
    [ $got -eq "$status" ] && grep -q -e "$pattern" "$work/log" && return
    bad="$bad; $*: status $got, $(head -1 "$work/log")"
}

# done_with NAME: the checks since the last one are a test
done_with()
{
    [ -z "$bad" ]
    verdict $? "$1$bad"
    bad=""
}
bad=""

data="--tokens $stories/calibration_tokens.npy --nsamples 2 --seqlen 32"
text="--test $stories/test_tokens.npy --windows 2"

# ---- options ----

# Every option that a command's help does not list is refused, and the message names the commands that list it.
commands="prune plan compare eval info"
for command in $commands; do
    run $command --help
    sed -n 's/^  --\([a-z0-9-]*\).*/\1/p' "$work/log" >"$work/$command.options"
done
options=$(cat "$work"/*.options | sort -u)
count=0
for option in $options; do
    takers=""
    for command in $commands; do
        if grep -qx -e "$option" "$work/$command.options"; then takers="${takers:+$takers, }$command"; fi
    done
    for command in $commands; do
        if grep -qx -e "$option" "$work/$command.options"; then continue; fi
        count=$((count + 1))
        check 2 "^besa $command: --$option is for $takers\$" $command "$stories" --$option 1
    done
done
[ $count -gt 50 ] || bad="$bad; only $count pairs"
check 2 '^besa plan: --no-quiet is for prune, compare, eval$' plan "$stories" --no-quiet
check 2 '^besa plan: unknown option --reports$' plan "$stories" --reports X
check 2 '^besa plan: --report is for prune, eval$' plan "$stories" --report "$work/report.json"
[ ! -e "$work/report.json" ] || bad="$bad; plan wrote a report"
done_with "an option that a command has no use for"

# a report that a link would put in the place of what is read, or that is no file
cp -r "$stories" "$work/linked"
ln -s linked/config.json "$work/to_config"; ln "$work/linked/model.safetensors" "$work/to_model"
ln -s linked/calibration_tokens.npy "$work/to_tokens"; mkfifo "$work/fifo"
set -- prune "$work/linked" "$work/linked_out" --tokens "$work/linked/calibration_tokens.npy" --seqlen 64 --nsamples 2 --method wanda
check 2 'to_config is config.json in .*, by another name' "$@" --report "$work/to_config"
check 2 'to_model is .* in .*, by another name' "$@" --report "$work/to_model"
check 2 'to_tokens is ' "$@" --report "$work/to_tokens"
check 2 'fifo is no file' "$@" --report "$work/fifo"
check 2 'to_model is .* in .*, by another name' "$@" --trace "$work/to_model"
check 2 'report and --trace are one file' "$@" --trace "$work/one" --report "$work/one"
cmp -s "$work/linked/config.json" "$stories/config.json" || bad="$bad; config.json is another"
done_with "a report by another name"

# files that come beside the output: two in one place, one in no place, one where a link leads
check 2 'report and --trace are one file' "$@" --trace "$work/./two" --report "$work/two"
check 2 'save-rates and --report are one file' "$@" --save-rates "$work/two" --report "$work/../$(basename "$work")/two"
check 1 'nodir/masks: .*nodir/: No such file' "$@" --save-masks "$work/nodir/masks"
[ -e "$3" ] && bad="$bad; an output though its masks have no place"
ln -s leads_here "$work/a_link"
check 0 '' info "$stories" --save-masks "$work/a_link"
[ -L "$work/a_link" ] && [ -s "$work/leads_here" ] || bad="$bad; a link gave way to masks"
check 2 'memory is more than --device-memory' plan "$stories" --device cuda --device-memory 1G --memory 2G
check 1 'the device has 100000 bytes free, of which a run takes 31/32' plan "$stories" --device cuda --device-memory 100000
least=$(sed -n 's/.* works here is \([0-9]*\) free$/\1/p' "$work/log")
check 0 '^device ' plan "$stories" --device cuda --device-memory $least
check 1 "works here is $least free" plan "$stories" --device cuda --device-memory $((least - 1))
done_with "files beside the output, and a GPU with less memory than is asked for"

# without the three standard descriptors: what is printed does not get into the output
( exec <&- >&- 2>&-; exec "$besa" "$@" )
"$besa" prune "$work/linked" "$work/linked_other" --tokens "$work/linked/calibration_tokens.npy" --seqlen 64 --nsamples 2 --method wanda --quiet \
    >"$work/log" 2>&1
cmp -s "$work/linked_out/model.safetensors" "$work/linked_other/model.safetensors" || bad="$bad; the outputs differ"
done_with "closed standard descriptors"

check 2 '--seed is about --tokens' plan "$stories" --seed 3
check 2 '--test-seqlen is about --test' plan "$stories" --test-seqlen 64
check 0 '^memory ' plan "$stories" --seqlen 64 --windows 4 --test-seqlen 64
check 2 '--lr is for --method besa' compare "$stories" $data $text --method wanda,magnitude --lr 2
check 2 '--per-row is for --method magnitude' compare "$stories" $data $text --method wanda --per-row
check 2 '--damping is for --method sparsegpt' compare "$stories" $data $text --method wanda,besa --damping 0.1
check 2 '--damping is for --method sparsegpt' prune "$stories" "$work/no" $data --damping 0.1
done_with "an option that no method of the run has a use for"

# ---- refusals with their remedy ----

# What was mistyped is said with the nearest name, and every command has help under both of its names.
check 2 "^besa: unknown command 'prunne': did you mean prune?\$" prunne
check 2 "^besa: unknown command 'pnal'; besa --help lists them\$" pnal
check 2 "^besa: unknown command 'evla': did you mean eval?\$" evla
check 2 "^besa: unknown command 'complete'; besa --help lists them\$" help complete
check 2 '^besa plan: unknown option --sparsty: did you mean --sparsity?$' plan "$stories" --sparsty .5
check 2 '^besa plan: unknown option --sqelen: did you mean --seqlen?$' plan "$stories" --sqelen=64
check 2 '^besa eval: unknown option --token: did you mean --tokens?$' eval "$stories" --token x
check 2 '^besa info: unknown option --xyz$' info "$stories" --xyz
for command in $commands; do
    run $command --help
    cp "$work/log" "$work/help"
    run help $command
    [ $got -eq 0 ] && cmp -s "$work/log" "$work/help" || bad="$bad; help $command"
done
done_with "mistyped names, and help"

# More windows than a file has, longer ones than it is: the most is the last word.
all=$stories/test_tokens.npy
echo "Once upon a time" >"$work/text.txt"
check 1 '^besa eval: .*test_tokens.npy: 9999 sequences of 64 tokens asked for, it has 1018 of them: the most is --windows 1018$' \
    eval "$stories" --tokens $all --seqlen 64 --windows 9999
check 1 '^besa eval: .*test_tokens.npy: sequences of 65194 tokens asked for, it has 65193: the most is --seqlen 65193$' \
    eval "$stories" --tokens $all --seqlen 65194
check 1 '9999 sequences of 256 tokens asked for, it has 254 of them: the most is --nsamples 254$' plan "$stories" --tokens $all \
    --seqlen 256 --nsamples 9999
check 0 '^memory ' plan "$stories" --tokens $all --seqlen 256 --nsamples 254
check 0 '^memory ' plan "$stories" --tokens $all --seqlen 256 --nsamples 9999 --seed 1
check 1 ': the most is --windows 254$' plan "$stories" $data --test $all --test-seqlen 256 --windows 255
check 1 ': the most is --test-seqlen 65193$' plan "$stories" $data --test $all --test-seqlen 65194
check 1 'text.txt: no known kind of token file.*: make one of a text, python3 examples/tokenize.py .*text.txt tokens.npy --tokenizer MODEL$' \
    plan "$stories" --tokens "$work/text.txt"
done_with "too few tokens"

# ---- numbers ----

for number in '' ' 0.5' '0.5 ' +0.5 -0.5 0x1p-1 nan inf 1e999 1e .e1 . 0.5.5 0,5 5e-1e 0.5f ½ 0 1; do
    check 2 '^besa plan: --' plan "$stories" "--sparsity=$number"
    check 2 '^besa compare: --' compare "$stories" $data $text "--sparsity=0.5,$number"
    case $number in 0) continue ;; esac
    check 2 '^besa plan: --' plan "$stories" --fix "v_proj=$number"
done
for number in '' ' 3' '3 ' +3 -3 3.0 3e0 0x3 nan inf 3x 0; do
    for option in --nsamples --seqlen --epochs --threads --group-rows; do
        check 2 "^besa plan: $option" plan "$stories" "$option=$number"
    done
    case $number in 0) continue ;; esac
    check 2 '^besa plan: --device' plan "$stories" "--device=cuda:$number"
done
for number in '' ' 8G' '8 G' +8G 8g 8GB 8Gi G 0x8G nan inf -1 1e30; do
    check 2 '^besa plan: --memory' plan "$stories" "--memory=$number"
done
for pattern in '' 2 2: :4 '2: 4' ' 2:4' '2:4 ' '2 :4' +2:4 2:+4 -2:4 2:4:8 2x4 0:4 4:4 4:2 2:65 0x2:4 2.0:4 2:4294967300 \
               99999999999:4; do
    check 2 '^besa plan: --pattern' plan "$stories" --method wanda "--pattern=$pattern"
done
done_with "what is no number"

for number in 0.5 .5 5e-1 5E-1 0.05e1 0.05e+1 0.500; do
    check 0 '^memory ' plan "$stories" --seqlen 32 --sparsity $number
done
for bytes in 100000000 100000K 100M 0.1G 1e8 .1e1G 0.0001T; do
    check 0 '^memory ' plan "$stories" --seqlen 32 --memory $bytes
done
check 0 '^memory ' plan "$stories" --seqlen 032 --group-rows all --seed 9000000000000000 $data --method=besa
check 0 '^memory ' plan "$stories" --seqlen 32 --method wanda --pattern 2:4 --fix v_proj=0 --fix q_proj=1e-3
done_with "what is a number"

# A GPU that is not here can be planned for, in a program without CUDA too; and nothing runs on it.
check 0 '^device .* for the run' plan "$stories" --device cuda --device-memory 24G
cp "$work/log" "$work/h100"
check 0 '^device .* for the run' plan "$stories" --device cuda --device-memory 24G --processors 132 --capability 9.0
cmp -s "$work/log" "$work/h100" || bad="$bad; the defaults are not an H100's"
check 0 '^device .* for the run' plan "$stories" --device cuda --device-memory 24G --processors 128 --capability 8.9
cmp -s "$work/log" "$work/h100" && bad="$bad; --processors changes nothing"
check 1 'the smallest that works here is' plan "$stories" --device cuda --device-memory 1M
check 2 '--device-memory is for --device cuda' plan "$stories" --device-memory 24G
check 2 '--capability is of a GPU that is not here' plan "$stories" --device cuda --capability 8.9
check 2 '^besa plan: --capability' plan "$stories" --device cuda --device-memory 24G --capability 6.1
check 2 '^besa plan: --processors' plan "$stories" --device cuda --device-memory 24G --processors 0
check 2 '^besa prune: --device-memory is for plan$' prune "$stories" "$work/no" $data --device cuda --device-memory 24G
check 1 '--device-memory 24G$' plan "$stories" --device cuda
done_with "a plan for a GPU that is not here"

# ---- runs ----

# What cannot work is refused before any work: nothing is printed but the message.
for wrong in "--method wanda,besa --pattern 2:4" "--method wanda --pattern 2:4 --sparsity .5,.6" "--fix nothing=0.5"; do
    check 1 '^besa compare: ' compare "$stories" $data $text $wrong
    [ "$(wc -l <"$work/log")" -eq 1 ] || bad="$bad; $wrong: $(head -3 "$work/log")"
done
for wrong in "--method wanda," "--method wanda,,besa" "--method wanda,besa:published" "--sparsity .5,"; do
    check 2 '^besa compare: --' compare "$stories" $data $text $wrong
done
check 0 '^wanda .* 0.2500 ' compare "$stories" $data $text --pattern 1:4 --quiet
grep -q '^besa is left out: with a pattern it has no rates to learn; --preset best: its weights$' "$work/log" || bad="$bad; it does not say what is left out"
! grep -q '^besa  ' "$work/log" || bad="$bad; a row for besa"
check 0 '^besa .* 0.2500 ' compare "$stories" $data $text --pattern 1:4 --preset best --quiet
! grep -q 'left out' "$work/log" || bad="$bad; it leaves out what has weights to learn"
check 0 'target 0.75, 3:4 (3 of 4 pruned, 1 kept), by besa' prune "$stories" "$work/pattern.out" $data --pattern 3:4 --preset best --quiet
check 1 'leaves no rates to learn: expected learn weights or both' plan "$stories" $data --pattern 2:4
done_with "a comparison with a pattern"

# ---- comparisons ----

# the columns after the last blank-separated TEXT of a line of the last table: reached perplexity +/- KL KL-99 same seconds
column() { awk -v label="$1" -v n="$2" '$1 == label { print $(n + 2); exit }' "$work/log"; }
short="$data $text --quiet"

# Options of a row are those of the command line, whatever is between; what a row has no use for is refused.
run compare "$stories" $short --method besa --epochs 2 --lr 30 --sparsity .6
alone=$(column besa 3)
check 0 '^besa:epochs=2,lr=30 ' compare "$stories" $short --method wanda,besa:epochs=2,lr=30,besa:best:projection=no,besa:projection=yes,wanda:refit=cg --sparsity .6
[ "$(column besa:epochs=2,lr=30 3)" = "$alone" ] && [ -n "$alone" ] || bad="$bad; epochs=2,lr=30: $(column besa:epochs=2,lr=30 3), alone $alone"
[ "$(column besa:best:projection=no 3)" != "$(column besa:projection=yes 3)" ] || bad="$bad; a preset and flags change nothing"
[ "$(column wanda 3)" != "$(column wanda:refit=cg 3)" ] || bad="$bad; refit=cg changes nothing"
check 0 '^wanda:skip=v_proj,pattern=2:4  *50 %  *0.4[78]' compare "$stories" $short --method wanda:skip=v_proj,pattern=2:4,magnitude
grep -q '^magnitude  *50 %  *0.5000 ' "$work/log" || bad="$bad; what a row sets is there in the next: $(cat "$work/log")"
check 2 "'besa:epohcs=2': a row has no option epohcs: did you mean epochs?" compare "$stories" $short --method besa:epohcs=2
check 2 'a row has no option device' compare "$stories" $short --method besa:device=cuda
check 2 'a row has no option sparsity' compare "$stories" $short --method besa:sparsity=.5
check 2 "'wanda:batch-size=2': batch-size is for what learns" compare "$stories" $short --method wanda:batch-size=2
check 2 "'wanda:d-coef=2': d-coef is for " compare "$stories" $short --method wanda:d-coef=2
check 2 'weight-lr is for weights that learn' compare "$stories" $short --method besa:weight-lr=1
check 2 'group-size is for bits=N' compare "$stories" $short --method besa:group-size=8
check 2 'projection is yes or no' compare "$stories" $short --method besa:projection=1
check 2 'epochs needs a value' compare "$stories" $short --method besa:epochs=
check 2 'a preset or an option is missing behind a colon' compare "$stories" $short --method besa:
check 2 'two presets' compare "$stories" $short --method besa:best:weights
check 2 "is not one of besa|" compare "$stories" $short --method epochs=2
check 2 'epochs is ' compare "$stories" $short --method besa:epochs=x
done_with "options of a row of a comparison"

# Several texts, calibration sizes and seeds are what each is alone.
check 0 '^wanda .* 0.5000 ' compare "$stories" $short --method wanda
first=$(column wanda 3)
check 0 '^wanda .* 0.5000 ' compare "$stories" --tokens "$all" --nsamples 4 --seqlen 32 $text --quiet --method wanda --seed 5
other=$(column wanda 3)
check 0 ' test_tokens ' compare "$stories" $short --test "cal=$stories/calibration_tokens.npy" --method wanda
[ "$(awk '$1 == "wanda" && $4 == "test_tokens" { print $6 }' "$work/log")" = "$first" ] || bad="$bad; a text beside another: $(cat "$work/log")"
grep -q '^wanda .* cal  *0.5' "$work/log" || bad="$bad; no row of the second text"
check 0 '^mean and standard deviation of 2 seeds' compare "$stories" --tokens "$all" --seqlen 32 $text --quiet --method wanda --nsamples 2,4 --seeds 0,5 \
    --markdown "$work/table.md" --json "$work/table.json"
[ "$(awk '$1 == "wanda" && $4 == 4 && $5 == 5 { print $7 }' "$work/log")" = "$other" ] || bad="$bad; 4 sequences by seed 5: $(cat "$work/log")"
awk '$1 == "wanda" && $4 == 4 && $5 != "mean" { a[n++] = $7 }
     $1 == "wanda" && $4 == 4 && $5 == "mean" { mean = $7; sd = $8 }
     END { d = (a[0] - a[1]) / sqrt(2); if (d < 0) d = -d
           e = mean - (a[0] + a[1]) / 2; exit !(n == 2 && e * e < 1e-5 && (sd - d) ^ 2 < 1e-4 && sd > 0) }' "$work/log" || bad="$bad; mean or deviation: $(cat "$work/log")"
[ "$(grep -c '^| wanda | 50 % | [24] | [05m]' "$work/table.md")" -eq 6 ] || bad="$bad; Markdown: $(cat "$work/table.md")"
legend=': standard error over the windows; of a mean: standard deviation of 2 seeds$'
grep -q "^+/-$legend" "$work/log" && [ "$(grep -c "^±$legend" "$work/table.md")" -eq 1 ] || bad="$bad; it does not say what ± is"
[ "$(grep -c '"perplexity_sd": [0-9]' "$work/table.json")" -eq 2 ] && [ "$(grep -c '^  {"method": "wanda".*"perplexity_error": [0-9].*"options": {"method": "wanda"' "$work/table.json")" -eq 4 ] ||
    bad="$bad; JSON: $(cat "$work/table.json")"
check 2 'two files are called test_tokens' compare "$stories" $short --test "$all" --test "$all"
check 2 '^besa compare: --sparsity: 0.50 is there twice: expected different values$' compare "$stories" $short --sparsity .5,.6,0.50
check 2 '^besa compare: --seeds: 0 is there twice' compare "$stories" $short --seeds 0,0
check 2 '^besa compare: --nsamples: 2 is there twice' compare "$stories" $short --nsamples 4,2,2
check 2 '^besa compare: --method: besa:lr=2 is there twice' compare "$stories" $short --method besa:lr=2,wanda,besa:lr=2
check 2 '--seed and --seeds' compare "$stories" $short --seed 1 --seeds 1,2
check 1 'the most is --nsamples' compare "$stories" $data $text --nsamples 2,9999 --method wanda
done_with "texts, calibration sizes and seeds of a comparison"

# A comparison that goes on has the figures of one that did not stop; what does not belong to it is refused.
rows() { sed -n 's/"seconds": [^,]*, //; s/,$//; /^  {"method"/p' "$1"; }
check 0 '' compare "$stories" $short --method wanda,besa --sparsity .5,.6 --json "$work/whole.json"
check 0 '' compare "$stories" $short --method wanda --sparsity .6,.5 --resume "$work/part.json"
check 0 'part.json: 2 of 4 runs are there' compare "$stories" $data $text --method wanda,besa --sparsity .5,.6 --resume "$work/part.json" --threads 1
rows "$work/whole.json" >"$work/whole.rows"; rows "$work/part.json" >"$work/part.rows"
cmp -s "$work/whole.rows" "$work/part.rows" && [ "$(wc -l <"$work/part.rows")" -eq 5 ] || bad="$bad; other rows: $(diff "$work/whole.rows" "$work/part.rows")"
cp "$work/part.json" "$work/kept.json"
check 1 'another comparison: it has none and this one "lr=2"$' compare "$stories" $short --lr 2 --resume "$work/part.json"
check 1 'another comparison: it has {"name": "test_tokens".*"windows": 2, .* and this one .*"windows": 3, ' compare "$stories" $data --test "$all" --windows 3 --resume "$work/part.json"
check 1 'another comparison: it has "tokens": ' compare "$stories" --tokens "$all" --nsamples 2 --seqlen 32 $text --resume "$work/part.json"
cmp -s "$work/part.json" "$work/kept.json" || bad="$bad; a refused file has changed"
sed 's/"method": "dense"\(.*\)"perplexity": [0-9.]*/"method": "dense"\1"perplexity": 3/' "$work/part.json" >"$work/strange.json"
check 1 'of another model or machine: perplexity of dense on test_tokens is 3 there' compare "$stories" $short --resume "$work/strange.json"
sed '$d' "$work/part.json" >"$work/cut.json"
check 1 'has no end' compare "$stories" $short --resume "$work/cut.json"
check 1 'none/x.json could not be written: ' compare "$stories" $short --json "$work/none/x.json"
check 2 "lies in" compare "$stories" $short --json "$stories/x.json"
cp "$all" "$work/text.npy"
check 2 'is a file of tokens' compare "$stories" $data --test "$work/text.npy" --markdown "$work/text.npy"
check 0 'method wanda\|^wanda ' compare "$stories" $short --method wanda --resume "$work/part.json" # the others' rows stay
[ "$(rows "$work/part.json" | wc -l)" -eq 5 ] || bad="$bad; rows are lost"
check 0 '^[0-9]* runs, .*FLOP in matrix products' compare "$stories" $data $text --method wanda,magnitude
grep -q '^the other runs: ' "$work/log" || bad="$bad; no estimate of time"
grep -q '^+/-: standard error over the windows$' "$work/log" || bad="$bad; it does not say what +/- is"
check 0 '^wanda ' compare "$stories" $data --test "$all" --windows 1 --method wanda --quiet
! grep -q '+/-:' "$work/log" || bad="$bad; it says what +/- is where there is none"
done_with "a comparison that goes on"

# A file that is written takes no place of one that is read: what a comparison goes on with, the model it is against, masks, targets.
cp -r "$stories" "$work/read" && printf '.5 .5 .5 .5 .5' >"$work/read.targets" && ln -s read/config.json "$work/read.link"
set -- compare "$stories" $data $text --method wanda --quiet
check 0 '' info "$stories" --save-masks "$work/read.masks"
check 0 '' "$@" --resume "$work/read.json"
check 2 'resume and --markdown are one file' "$@" --resume "$work/read.json" --markdown "$work/./read.json"
check 0 '' "$@" --resume "$work/read.json" --json "$work/read.json"
check 2 'config.json lies in ' "$@" --against "$work/read" --json "$work/read/config.json"
check 2 'read.link is config.json in .*, by another name' "$@" --against "$work/read" --json "$work/read.link"
check 2 'config.json lies in ' "$@" --method keep --masks "$work/read" --markdown "$work/read/config.json"
check 2 'config.json lies in ' eval "$stories" --tokens "$stories/test_tokens.npy" --against "$work/read" --report "$work/read/config.json"
check 2 'read.masks is the file of --masks' "$@" --method keep --masks "$work/read.masks" --json "$work/read.masks"
check 2 'read.targets is the file of --block-targets' "$@" --block-targets "$work/read.targets" --json "$work/read.targets"
check 2 'read.targets is the file of --block-targets' prune "$stories" "$work/no" $data --block-targets "$work/read.targets" --trace "$work/read.targets"
cmp -s "$work/read/config.json" "$stories/config.json" || bad="$bad; config.json is another"
done_with "files that are read, and files of results"

# Where a comparison goes on, its model is known by its name and its config.json, texts by their tokens, options by their values.
mkdir "$work/other" "$work/moved" && cp -r "$stories" "$work/moved" && cp -r "$stories" "$work/other" || exit 1
moved=$work/moved/$(basename "$stories") other=$work/other/$(basename "$stories")
mv "$moved/calibration_tokens.npy" "$moved/c4.npy"
sed -i 's/"rope_theta": *[0-9.]*/"rope_theta": 20000.0/' "$other/config.json"
printf '.4 .5\n.6 0.5 5e-1\n' >"$work/by_value" && printf '0.40 .5 .6 .5 .5' >"$work/same_value" && printf '.5 .4 .6 .5 .5' >"$work/another_value"
set -- --block-targets "$work/by_value" --skip v_proj --fix o_proj=0.50 --lr 2.0 --no-projection --batch-size=2
check 0 '' compare "$stories" $short --method besa:lr=30,epochs=2,wanda "$@" --resume "$work/value.json"
set -- --batch-size 2 --projection --lr=5 --skip=v_proj --no-projection --fix o_proj=.5 --lr 2e0 --block-targets "$work/same_value"
check 0 'value.json: 2 of 2 runs are there' compare "$moved" --tokens "$moved/c4.npy" --nsamples 2 --seqlen 32 --test "$moved/test_tokens.npy" --windows 2 \
    --method besa:epochs=2,lr=3e1,wanda "$@" --resume "$work/value.json"
[ "$(grep -c '^  {"method": "besa:epochs=2,lr=3e1", .*"reached": ' "$work/value.json")" -eq 1 ] && ! grep -q 'lr=30,epochs' "$work/value.json" ||
    bad="$bad; the row has no name of this run's: $(cat "$work/value.json")"
check 0 'value.json: 1 of 2 runs are there' compare "$stories" $data $text --method besa:epochs=2,lr=31,wanda "$@" --resume "$work/value.json"
cp "$work/value.json" "$work/kept.json"
check 1 'it has "lr=2" and this one "lr=3"$' compare "$stories" $short --method besa,wanda "$@" --lr 3 --resume "$work/value.json"
check 1 'it has "no-projection=yes" and this one "no-projection=no"$' compare "$stories" $short --method besa,wanda "$@" --projection --resume "$work/value.json"
check 1 'it has "lr=2" and this one "fix=q_proj=0.25"$' compare "$stories" $short --method besa,wanda "$@" --fix q_proj=.25 --resume "$work/value.json"
check 1 'it has "block-targets=0.4 0.5 .* and this one "block-targets=0.5 0.4 ' compare "$stories" $short --method besa,wanda "$@" \
    --block-targets "$work/another_value" --resume "$work/value.json"
check 1 'it has "model": {"name": "'$(basename "$stories")'", "config_sha256": .* and this one "model": {"name": "'$(basename "$stories")'", ' \
    compare "$other" $short --method besa,wanda "$@" --resume "$work/value.json"
check 1 'it has "model": .* and this one "model": {"name": "linked", ' compare "$work/linked" $short --method besa,wanda "$@" --resume "$work/value.json"
check 1 'it has "against": .* and this one "against": {"name": "linked", ' compare "$stories" $short --method besa,wanda "$@" --against "$work/linked" \
    --resume "$work/value.json"
cmp -s "$work/value.json" "$work/kept.json" || bad="$bad; a refused file has changed"
check 0 '' info "$stories" --save-masks "$work/keep_a" && cp "$work/keep_a" "$work/moved/keep_a"
check 0 '' compare "$stories" $short --method wanda,keep --masks "$work/keep_a" --resume "$work/keep.json"
check 0 'keep.json: 2 of 2 runs are there' compare "$stories" $data $text --method wanda,keep --masks "$work/moved/keep_a" --resume "$work/keep.json"
check 1 'it has "masks=keep_a [0-9a-f]*" and this one "masks='$(basename "$stories")' ' compare "$stories" $short --method wanda,keep --masks "$stories" --resume "$work/keep.json"
done_with "what a comparison that goes on is known by"

# What a file of results is called and holds: text that is no UTF-8, a row's options in any order, one seed of several, nothing.
bytes=$(printf 'a\377\303\251')
check 0 '' compare "$stories" $data --test "$bytes=$all" --windows 2 --quiet --method wanda:pattern=2:4,skip=v_proj --resume "$work/bytes.json"
LC_ALL=C grep -q "\"test\": \"a\\\\ufffd$(printf '\303\251')\"" "$work/bytes.json" || bad="$bad; JSON that is no UTF-8: $(cat -v "$work/bytes.json")"
check 0 'bytes.json: 1 of 1 runs are there' compare "$stories" $data --test "$bytes=$all" --windows 2 --method wanda:skip=v_proj,pattern=2:4 --resume "$work/bytes.json"
: >"$work/empty.json"; echo '{"text": 1}' >"$work/other.json"; head -4 "$work/bytes.json" >"$work/cut.json"
check 1 'empty.json is empty, expected a file of this command' compare "$stories" $short --method wanda --resume "$work/empty.json"
check 1 'other.json is of something else, expected a file of this command' compare "$stories" $short --method wanda --resume "$work/other.json"
check 1 'cut.json has no end' compare "$stories" $short --method wanda --resume "$work/cut.json"
[ ! -s "$work/empty.json" ] && [ "$(wc -l <"$work/other.json")" -eq 1 ] || bad="$bad; a refused file has changed"
long="--tokens $stories/calibration_tokens.npy --nsamples 48 --seqlen 64 --quiet"
# once PATTERN FILE COMMAND ARGUMENTS...: besa, and the command when a line of FILE has the pattern
once()
{
    pattern=$1 file=$2 then=$3
    shift 3
    "$besa" "$@" >"$work/log" 2>&1 &
    running=$!
    while kill -0 $running 2>/dev/null; do
        grep -q "$pattern" "$file" 2>/dev/null && eval "$then" && then=false
        sleep 0.02
    done
    wait $running 2>/dev/null
    got=$?
}
once 'sd": ' "$work/seed.json" 'kill -9 $running' compare "$stories" $long $text --method wanda,besa:epochs=20 --seeds 1,2 --json "$work/seed.json" --markdown "$work/seed.md"
grep -q '"method": "wanda".* "seeds": 1, .*"perplexity_sd": null, .*"kl_sd": null, .*"same_top_sd": null, .*"nll_difference_sd": null}' "$work/seed.json" ||
    bad="$bad; the deviation of one seed: $(tail -2 "$work/seed.json")"
! grep -q '^| wanda .* mean .*±' "$work/seed.md" || bad="$bad; the deviation of one seed: $(cat "$work/seed.md")"
(ulimit -f 0; "$besa" compare "$stories" $short --method wanda 2>&1) | cat >"$work/log"
grep -q '^wanda .* 0.5000 ' "$work/log" || bad="$bad; a comparison without files where none can be written: $(cat "$work/log")"
done_with "what is in a file of results"

# And what it is refused by: other zeros of masks that have one name, another order of --fix and --skip, other sequences of one text.
mkdir -p "$work/m1" "$work/m2" "$work/m3"
check 0 '' prune "$stories" "$work/m1/masks" $data --method wanda --quiet
check 0 '' prune "$stories" "$work/m2/masks" $data --method magnitude --quiet
check 0 '' compare "$stories" $short --method keep --masks "$work/m1/masks" --resume "$work/zeros.json"
check 1 'it has "masks=masks [0-9a-f]*" and this one "masks=masks [0-9a-f]*"$' compare "$stories" $short --method keep --masks "$work/m2/masks" --resume "$work/zeros.json"
cp -r "$work/m1/masks" "$work/m3/masks"
check 0 'zeros.json: 1 of 1 runs are there' compare "$stories" $data $text --method keep --masks "$work/m3/masks" --resume "$work/zeros.json"
set -- --method wanda --resume "$work/order.json"
check 0 '' compare "$stories" $short "$@" --fix layers.0=0.3 --skip v_proj
check 0 'order.json: 1 of 1 runs are there' compare "$stories" $data $text "$@" --fix layers.0=.3 --fix v_proj=0
check 1 'it has "fix=layers.0=0.3" and this one "fix=v_proj=0"' compare "$stories" $short "$@" --skip v_proj --fix layers.0=0.3
check 0 '' compare "$stories" $short --method wanda:fix=layers.0=.3,skip=v_proj --resume "$work/rows.json"
check 0 'rows.json: 0 of 1 runs are there' compare "$stories" $data $text --method wanda:skip=v_proj,fix=layers.0=.3 --resume "$work/rows.json"
check 0 'rows.json: 1 of 1 runs are there' compare "$stories" $data $text --method wanda:fix=layers.0=0.3,fix=v_proj=0 --resume "$work/rows.json"
npy() { printf '\223NUMPY\001\000v\000%-117s\n' "{'descr': '<u2', 'fortran_order': False, 'shape': ($1), }"; tail -c +129 "$all" | head -c 512; }
npy '4, 64' >"$work/tokens.npy"; npy '8, 32' >"$work/m3/tokens.npy"; npy '256,' >"$work/m2/tokens.npy"
set -- --nsamples 2 --seqlen 32 --method wanda $text --resume "$work/shape.json"
check 0 '' compare "$stories" --tokens "$work/tokens.npy" "$@"
for tokens in m3 m2; do check 1 'it has "tokens": .* and this one "tokens": ' compare "$stories" --tokens "$work/$tokens/tokens.npy" "$@"; done
check 0 '' compare "$stories" --tokens "$work/tokens.npy" --quiet "$@"
done_with "what a comparison that goes on is refused by"

# A text that is moved meanwhile, and one that changes before it is read for another seed: what is done is kept, as of the first.
# meanwhile COMMAND ARGUMENTS...: besa, and the command once the row of wanda is in $work/while.json
meanwhile() { once '"wanda"' "$work/while.json" "$@"; }
set -- "$stories" $text --nsamples 48 --seqlen 64 --quiet --tokens "$work/text_now.npy" --resume "$work/while.json"
cp "$stories/calibration_tokens.npy" "$work/text_now.npy"
meanwhile 'mv "$work/text_now.npy" "$work/text_old.npy"' compare "$@" --method wanda,besa:epochs=2
[ $got -eq 0 ] && grep -q '"method": "besa:epochs=2"' "$work/while.json" || bad="$bad; a moved text: $(tail -1 "$work/log")"
cp "$work/text_old.npy" "$work/text_now.npy" && rm "$work/while.json"
meanwhile 'cp "$all" "$work/text_now.npy"' compare "$@" --method wanda,besa:epochs=2 --seeds 1,2
[ $got -eq 1 ] && grep -q 'text_now.npy has changed since this comparison began' "$work/log" || bad="$bad; a text that changes: $(tail -1 "$work/log")"
cp "$work/text_old.npy" "$work/text_now.npy"
check 0 '^wanda ' compare "$@" --method wanda --seeds 1
done_with "a text that changes during a comparison"

# Two comparisons that write one file, by either of its names: the second is refused, and may come when the first has ended. A link
# stays a link; a comparison that is refused leaves no file.
ln -s linked.json "$work/link.json"
rm -f "$work/while.json"
meanwhile 'kill -STOP $running; "$besa" "$@" --method magnitude >"$work/second" 2>&1; echo "status $?" >>"$work/second"; ln -s while.json "$work/by_link.json"
           "$besa" compare '"$stories $short"' --method magnitude --json "$work/by_link.json" >"$work/third" 2>&1; echo "status $?" >>"$work/third"; kill -CONT $running' \
    compare "$stories" $text --nsamples 48 --seqlen 64 --quiet --tokens "$work/text_now.npy" --resume "$work/while.json" --method wanda,besa:epochs=2
for file in second third; do
    grep -q '\.json: another comparison is writing it: expected one at a time$' "$work/$file" && grep -q '^status 1$' "$work/$file" || bad="$bad; $file: $(head -1 "$work/$file")"
done
[ $got -eq 0 ] || bad="$bad; the first: $(tail -1 "$work/log")"
check 0 '^magnitude' compare "$stories" $text --nsamples 48 --seqlen 64 --quiet --tokens "$work/text_now.npy" --resume "$work/while.json" --method magnitude
[ "$(rows "$work/while.json" | wc -l)" -eq 4 ] || bad="$bad; rows are lost: $(cat "$work/while.json")"
for i in 1 2; do
    check 0 '' compare "$stories" $short --method wanda --resume "$work/link.json" --json "$work/link.json"
    [ -L "$work/link.json" ] && [ ! -L "$work/linked.json" ] && [ "$(rows "$work/linked.json" | wc -l)" -eq 2 ] || bad="$bad; a link gave way to results"
done
check 1 'matches none' compare "$stories" $short --method wanda --fix none=.5 --resume "$work/no.json"
[ ! -e "$work/no.json" ] || bad="$bad; results of nothing"
check 0 '^wanda ' compare "$stories" $short --method wanda --json /dev/null
if [ -e /dev/stdout ]; then # which is a file here
    check 0 '^wanda ' compare "$stories" $short --method wanda --json /dev/stdout
    grep -q '"rows"' "$work/log" && grep -q '^method ' "$work/log" || bad="$bad; /dev/stdout: $(head -c 200 "$work/log")"
fi
done_with "comparisons at one time"

# A new run leaves nothing in its trace of the one before; a report is written though the masks beside it cannot be, is whole or not
# there, and a link to one stays.
set -- --tokens "$stories/calibration_tokens.npy" --nsamples 8 --seqlen 32 --quiet
check 0 '' prune "$stories" "$work/trace_a" "$@" --blocks 0-1 --trace "$work/one.jsonl"
check 0 '' prune "$stories" "$work/trace_b" "$@" --blocks 1-3 --trace "$work/one.jsonl"
check 0 '' prune "$stories" "$work/trace_c" "$@" --blocks 1-3 --trace "$work/three.jsonl"
[ -s "$work/three.jsonl" ] && cmp -s "$work/one.jsonl" "$work/three.jsonl" || bad="$bad; a trace of two runs: $(head -1 "$work/one.jsonl")"
ln -s linked_report.json "$work/report_link"
check 0 '' prune "$stories" "$work/report_a" "$@" --method wanda --report "$work/report_link"
check 0 '' prune "$stories" "$work/report_b" "$@" --method wanda --report "$work/report_link"
[ -L "$work/report_link" ] && [ "$(tail -c 2 "$work/linked_report.json")" = "}" ] && [ ! -L "$work/linked_report.json" ] || bad="$bad; a link gave way to a report"
(ulimit -f 1; "$besa" eval "$stories" --tokens "$all" --seqlen 32 --windows 99 --report "$work/report_link" 2>&1) | cat >"$work/log"
grep -q 'report_link could not be written: File too large' "$work/log" && grep -q '"sparsity"' "$work/linked_report.json" && [ ! -e "$work/linked_report.json.partial" ] ||
    bad="$bad; a report that cannot be written: $(cat "$work/log")"
if [ -w /dev/full ]; then
    check 1 'dev/full: ' prune "$stories" "$work/report_c" "$@" --method wanda --report "$work/full.json" --save-masks /dev/full
    [ "$(tail -c 2 "$work/full.json")" = "}" ] || bad="$bad; the report is lost with the masks"
fi
done_with "a trace and a report in the place of others"

# How far a model is from another.
check 0 '^perplexity [0-9.]* +/- [0-9.]* over 3 windows of 64 tokens' eval "$stories" --tokens "$all" --seqlen 64 --windows 3
check 0 '^perplexity [0-9.]* over 1 windows' eval "$stories" --tokens "$all" --seqlen 64 --windows 1
check 0 'KL divergence  *0.00000 +/- 0.00000, 99th percentile 0.0000' eval "$stories" --tokens "$all" --seqlen 64 --windows 3 --against "$stories"
check 0 'the same in 100.00 %' eval "$stories" --tokens "$all" --seqlen 64 --windows 1 --against "$stories"
check 0 '' compare "$stories" $short --method wanda --json "$work/wanda.json"
check 0 '' prune "$stories" "$work/wanda" $data --method wanda --quiet
check 0 '' eval "$work/wanda" --tokens "$all" --seqlen 32 --windows 2 --against "$stories" --json --quiet
figures() { tr ',' '\n' | sed -n 's/.*\("perplexity.*\|"kl.*\|"same_top.*\|"nll_difference.*\)/\1/p'; }
[ "$(figures <"$work/log")" = "$(grep '"wanda"' "$work/wanda.json" | figures)" ] || bad="$bad; compare has other figures: $(cat "$work/log")"
check 0 '^b: perplexity ' eval "$stories" --tokens "a=$all" --tokens "b=$all" --seqlen 64 --windows 2 --quiet
check 0 '^wanda  *50 %' compare "$stories" $short --method wanda --against "$work/wanda"
grep -q '^against ' "$work/log" && grep -q '^dense .* [0-9.]* *[0-9.]*$' "$work/log" && grep -q '^wanda .* 0.000 .* 100.0 ' "$work/log" ||
    bad="$bad; against a pruned model: $(cat "$work/log")"
check 1 '--against .* has a vocabulary of 199 tokens, and .* one of 512: ' eval "$stories" --tokens "$all" --seqlen 64 --windows 1 \
    --against data/reference/checkpoints/llama_mha_f16
check 1 'a vocabulary of 199' compare "$stories" $short --against data/reference/checkpoints/llama_mha_f16
done_with "one model against another"

# Presets, and what learns, are for those who can: best's rates are besa's alone.
check 2 '--d-coef is about rates, and --pattern leaves none' plan "$stories" --preset best --pattern 2:4 --d-coef 7
check 2 '--preset best is for --method besa' plan "$stories" --method wanda --preset best
check 2 '--learn both is for --method besa' plan "$stories" --method wanda --learn both
check 2 '--weight-lr is for --learn weights or both' plan "$stories" --weight-lr 0.1
check 2 '--learn-vectors is for --learn weights or both' plan "$stories" --learn-vectors
check 2 '--batch-size is for what learns' plan "$stories" --method wanda --batch-size 2
check 2 'only besa has presets other than weights' compare "$stories" $data $text --method wanda:best
check 2 '--refit-steps is for --refit cg' plan "$stories" --refit obs --refit-steps 3
check 1 'method sparsegpt does by itself' plan "$stories" --seqlen 32 --method sparsegpt --refit obs
check 1 'learn both' plan "$stories" --seqlen 32 --refit cg --learn both
check 0 '^memory ' plan "$stories" --seqlen 32 --method wanda --refit cg --refit-steps 3 --damping 0.1
check 0 '^memory ' plan "$stories" --seqlen 32 --method sparsegpt --preset weights --weight-lr 0.1 --batch-size 2
check 0 '^besa:best ' compare "$stories" $data $text --method wanda:weights,besa:best,besa:weights --quiet
grep -q '^wanda:weights ' "$work/log" || bad="$bad; no row wanda:weights"
check 0 '^wanda ' compare "$stories" $data $text --method wanda,besa --preset best --quiet
done_with "presets, and what learns"

# Some blocks, a sparsity for each.
for wrong in 3-1 a-b 1- -2 1-2-3 1024 ''; do
    check 2 '^besa plan: --blocks' plan "$stories" "--blocks=$wrong"
done
check 1 'the model has blocks 0 to 4' plan "$stories" --blocks 3-5
check 0 'sparsity 0.200000 .* target 0.2' prune "$stories" "$work/blocks" $data --blocks 1-2 --quiet
printf '.4 .5\n.6 0.5 5e-1\n' >"$work/targets"
check 0 'sparsity 0.500' prune "$stories" "$work/targets.out" $data --block-targets "$work/targets" --preset best --quiet
for wrong in '.4 .5' '.4 .5 .6 .5 x' '.4 .5 .6 .5 1' ''; do
    printf '%s' "$wrong" >"$work/wrong"
    run plan "$stories" --block-targets "$work/wrong"
    [ $got -ne 0 ] && grep -q 'block.targets' "$work/log" || bad="$bad; targets '$wrong': $(head -1 "$work/log")"
done
check 2 'No such file' plan "$stories" --block-targets "$work/none"
check 0 'target 0.5' prune "$stories" "$work/slope" $data --depth-slope -0.2 --quiet
for owl in owl owl:.05 owl:0.1:3; do
    check 0 'by their outliers: 0\.[0-9]* 0\.[0-9]* 0\.[0-9]* 0\.[0-9]* 0\.[0-9]*$' prune "$stories" "$work/$owl" $data --block-targets $owl --method wanda --quiet
    check 0 '^work ' plan "$stories" --block-targets $owl
done
cmp -s "$work/owl/model.safetensors" "$work/owl:.05/model.safetensors" && bad="$bad; lambda changes nothing"
check 0 'by their outliers: 0\.[0-9]* 0\.[0-9]*$' compare "$stories" $data $text --block-targets owl --blocks 1-2 --method wanda --sparsity .4,.6
[ "$(grep -c 'by their outliers' "$work/log")" -eq 2 ] || bad="$bad; compare does not say the sparsities"
printf '.4 .5\n.6 0.5 5e-1\n' >"$work/owl.txt" # what owl is not, and what is given last counts
check 0 'outliers' prune "$stories" "$work/last" $data --block-targets "$work/owl.txt" --block-targets owl --method wanda --quiet
cmp -s "$work/owl/model.safetensors" "$work/last/model.safetensors" || bad="$bad; owl after a file is not owl"
run prune "$stories" "$work/file" $data --block-targets owl --block-targets "$work/owl.txt" --method wanda --quiet
{ [ $got -ne 0 ] || grep -q outliers "$work/log"; } && bad="$bad; a file after owl is not the file"
for wrong in owl: owl:0 owl:-1 owl:.1: owl:.1:0 owl:.1:5:1 owl:.1x; do check 2 'is not owl, owl:L or owl:L:M' plan "$stories" --block-targets $wrong; done
check 2 'depth-slope has its own' prune "$stories" "$work/refused" $data --block-targets owl --depth-slope .1
check 2 'pattern has its own' plan "$stories" --block-targets owl --pattern 2:4 --method wanda
check 2 'method keep has its own' plan "$stories" --block-targets owl --method keep --masks "$work/slope"
check 1 'a lambda below 0.9 helps' prune "$stories" "$work/refused" $data --block-targets owl:.9
done_with "blocks and their sparsities"

# One row's outliers are all rows': none chooses other layers, which is said before any work; a run that goes on has the same.
for setting in blocks=1-2 skip=v_proj fix=v_proj=.3 pattern=2:4 depth-slope=.1; do
    check 2 "'wanda:$setting': --block-targets owl finds sparsities for all rows at once: expected no blocks, skip, " compare "$stories" $short \
        --method wanda,wanda:$setting --block-targets owl
    check 0 "^wanda:$setting " compare "$stories" $short --method wanda,wanda:$setting
done
set -- --block-targets owl --skip v_proj --blocks 1-3
check 0 '' compare "$stories" $short --method magnitude,wanda "$@" --json "$work/owl.json"
check 0 '' compare "$stories" $short --method magnitude "$@" --resume "$work/owl.part.json"
check 0 'owl.part.json: 1 of 2 runs are there' compare "$stories" $data $text --method magnitude,wanda "$@" --resume "$work/owl.part.json"
rows "$work/owl.json" >"$work/owl.rows"; rows "$work/owl.part.json" >"$work/owl.part.rows"
cmp -s "$work/owl.rows" "$work/owl.part.rows" && [ "$(wc -l <"$work/owl.rows")" -eq 3 ] || bad="$bad; other rows: $(cat "$work/owl.rows" "$work/owl.part.rows")"
done_with "outliers of a comparison"

# Masks of another checkpoint.
check 2 'wants --masks' plan "$stories" --method keep
check 2 '--masks is for --method keep' plan "$stories" --masks "$work/slope"
check 2 '--sparsity is not for --method keep' plan "$stories" --method keep --masks "$work/slope" --sparsity .5
check 0 'sparsity 0.2000' prune "$stories" "$work/kept" $data --method keep --masks "$work/blocks" --quiet
cmp -s "$work/kept/model.safetensors" "$work/blocks/model.safetensors" || bad="$bad; other weights than those whose zeros were kept"
run info "$work/blocks" --save-masks "$work/masks" --save-rates "$work/rates"
check 0 'sparsity 0.2000' prune "$stories" "$work/again.masks" $data --method keep --masks "$work/masks" --quiet --save-masks "$work/same" --save-rates "$work/same"
cmp -s "$work/again.masks/model.safetensors" "$work/blocks/model.safetensors" || bad="$bad; other weights than by a file of masks"
[ "$(wc -c <"$work/masks")" -gt 28000 ] && [ "$(wc -c <"$work/same")" -gt $(($(wc -c <"$work/masks") + 10000)) ] || bad="$bad; not both kinds in one file"
grep -q 'save' "$work/again.masks/README.md" && bad="$bad; the card says what else was written"
check 2 'to_model is .* in .*, by another name' prune "$work/linked" "$work/no" $data --save-masks "$work/to_model"
check 1 'mask is missing' plan "$stories" --method keep --masks "$work/rates"
check 0 'sparsity 0.2000' prune "$stories" "$work/learned" $data --method keep --masks "$work/blocks" --learn weights --quiet
check 0 'nothing is pruned' prune "$stories" "$work/nothing" $data --method keep --masks "$stories" --quiet
done_with "masks that are kept"

# Rows of 64 and 172 weights cannot have 0.99 of them zero; half of them they can.
check 0 'down_proj has sparsity 0.9884, not the 0.99 that it is fixed at' prune "$stories" "$work/narrow" $data \
    --method wanda --fix down_proj=0.99
check 0 'sparsity 0.5' prune "$stories" "$work/half" $data --method wanda --fix '*=0.5' --quiet
! grep -q 'fixed at' "$work/log" || bad="$bad; a note about 0.5"
done_with "a fixed sparsity that rows cannot have"

# ---- what an output says of itself ----

# A model with a card of its own, whose licence goes on; a run that is killed and goes on in one thread leaves the same output,
# and the same trace, as one that is not.
cp -r "$stories" "$work/model" && rm "$work/model"/*.npy
printf '%s\n' --- 'license: other' 'license_name: ours' 'license_link: >-' 'tags: [x]' --- '# Model' 'license: no' >"$work/model/README.md"
mkdir "$work/a" "$work/b"
long="--tokens $stories/calibration_tokens.npy --nsamples 48 --seqlen 64 --preset best --test $stories/test_tokens.npy --windows 2 --test-dense --quiet"
check 0 '^perplexity [0-9.]* +/- [0-9.]*, of the dense model [0-9.]*$' prune "$work/model" "$work/a/out" $long --threads 2 --trace "$work/a.jsonl" --report "$work/a.json" --save-rates "$work/a.rates"
once '^block 1 ' "$work/b/out.partial/besa-journal" 'kill -9 $running' prune "$work/model" "$work/b/out" $long --threads 2 \
    --trace "$work/b.jsonl" --save-rates "$work/b.rates"
cp -r "$work/b/out.partial" "$work/b/told.partial"
check 1 'other options.*: save-rates=1 (this run: save-rates=0)' prune "$work/model" "$work/b/told" $long --no-quiet
check 0 '^resuming at block [2-5] of 5$' prune "$work/model" "$work/b/told" $long --no-quiet --save-rates "$work/told.rates"
at=$(sed -n 's/^resuming at block \([2-5]\) of 5$/\1/p' "$work/log")
grep -q "^blocks taken over from the run before: $((at - 1))\$" "$work/log" || bad="$bad; at block $at: $(tail -3 "$work/log")"
check 0 '^blocks taken over from the run before: [1-4]$' prune "$work/model" "$work/b/out" $long --threads 1 --trace "$work/b.jsonl" --report "$work/b.json" \
    --save-rates "$work/b.rates"
! grep -q '^resuming' "$work/log" || bad="$bad; it is not quiet"
diff -r "$work/a/out" "$work/b/out" >"$work/diff" 2>&1 || bad="$bad; $(head -1 "$work/diff")"
cmp -s "$work/a.jsonl" "$work/b.jsonl" || bad="$bad; the traces differ"
cmp -s "$work/a.rates" "$work/b.rates" && cmp -s "$work/a.rates" "$work/told.rates" || bad="$bad; the learned rates differ"
check 0 '' info "$work/a/out" --save-rates "$work/shares"
[ "$(wc -c <"$work/shares")" -eq "$(wc -c <"$work/a.rates")" ] && ! cmp -s "$work/shares" "$work/a.rates" || bad="$bad; what was learned is not in the file of rates"
[ ! -e "$work/a/out/besa-rates" ] || bad="$bad; learned rates are left in the output"
[ "$(wc -l <"$work/a.jsonl")" -eq 960 ] || bad="$bad; $(wc -l <"$work/a.jsonl") lines of trace"
grep -q '^{"block": 4, "step": 192, "steps": 192, "loss": [0-9.e-]*, "penalty": [0-9.e-]*, "mean_rate": 0.[0-9]*, "d": [0-9.e-]*, "lr": null, "weight_lr": [0-9.e-]*}$' \
    "$work/a.jsonl" || bad="$bad; $(tail -1 "$work/a.jsonl")"
for file in a b; do sed 's/"seconds": {[^}]*}//; s/"seconds": [^,}]*//g; /"command"\|"threads"\|"passes"\|"resumed_blocks"\|"device_bytes"/d' "$work/$file.json" >"$work/$file.same"; done
cmp -s "$work/a.same" "$work/b.same" || bad="$bad; reports differ: $(diff "$work/a.same" "$work/b.same" | head -3)"
check 0 'sparsity' prune "$work/model" "$work/none" $data --method wanda --trace "$work/b.jsonl" # where nothing learns there are no steps
[ ! -s "$work/b.jsonl" ] || bad="$bad; a trace of another run"
check 1 'matches none' prune "$work/model" "$work/c" $data --trace "$work/c.jsonl" --fix none=0.5
[ ! -e "$work/c.jsonl" ] || bad="$bad; a trace of nothing"
done_with "a killed run goes on to the same output, trace and report"

# A run that ends behind its last block, before the output has its name: here as a file of the source has changed meanwhile. With
# the file as it was the next run prunes nothing, and its output is the same.
mkdir "$work/e" && cp -p "$work/model/README.md" "$work/card.md"
"$besa" prune "$work/model" "$work/e/out" $long >"$work/log" 2>&1 &
ended=$!
while kill -0 $ended 2>/dev/null; do
    cmp -s "$work/model/README.md" "$work/card.md" && [ -s "$work/e/out.partial/README.dense.md" ] &&
        echo 'license: another' >>"$work/model/README.md"
    sleep 0.02
done
wait $ended && bad="$bad; a source that changes is not seen"
grep -q 'README.md: has changed since this run read it' "$work/log" || bad="$bad; $(tail -1 "$work/log")"
cp -p "$work/card.md" "$work/model/README.md"
[ "$(grep -c '^block ' "$work/e/out.partial/besa-journal")" -eq 5 ] || bad="$bad; not all blocks are done"
check 0 '^resuming: all 5 blocks are done$' prune "$work/model" "$work/e/out" $long --no-quiet
grep -q '^blocks taken over from the run before: 5$' "$work/log" || bad="$bad; $(tail -3 "$work/log")"
diff -r "$work/a/out" "$work/e/out" >"$work/diff" 2>&1 || bad="$bad; $(head -1 "$work/diff")"
done_with "a run goes on behind its last block"

# A record of the source that is too large for one of JSON: it is said that it is not kept.
cp -r "$work/model" "$work/large" && truncate -s 100000001 "$work/large/besa.json"
check 0 "^not kept: the source's besa.json (100000001 bytes, 100000000 or more)\$" prune "$work/large" "$work/large_out" $data --method wanda --quiet
rm -r "$work/large"
done_with "a source whose besa.json is large"

card=$work/a/out/README.md
for line in 'base_model: "model"' 'base_model_relation: finetune' 'license: other' 'license_name: ours' '- pruned' \
    '| method | besa, preset best |' '| sparsity | 0.5000: 113280 of 226560 weights are 0 |' \
    '    besa prune model out --tokens calibration_tokens.npy --nsamples 48 --seqlen 64 --preset best --test test_tokens.npy --windows 2 --test-dense'; do
    grep -qxF -e "$line" "$card" || bad="$bad; no line $line"
done
grep -q '^| perplexity | [0-9.]*, of the dense model [0-9.]*; on 2 windows of 64 tokens of test_tokens.npy |$' "$card" || bad="$bad; no perplexities"
grep -q 'license: no' "$card" && bad="$bad; a licence from the text"
grep -q 'license_link' "$card" && bad="$bad; a line whose value is below it"
cmp -s "$work/model/README.md" "$work/a/out/README.dense.md" || bad="$bad; the dense model's card is not kept"
check 0 '^perplexity' eval "$work/a/out" --tokens "$stories/test_tokens.npy" --windows 2 --seqlen 64 --report "$work/eval.json" --quiet
check 2 '--test-dense is about --test' prune "$work/model" "$work/c" $data --test-dense
for word in '"perplexity": ' '"nll": \[' '"command": "besa eval ' '"blocks": \['; do grep -q "$word" "$work/eval.json" || bad="$bad; eval's report without $word"; done
[ "$(grep '"perplexity"' "$work/eval.json")" = "$(grep '"perplexity"' "$work/a.json")" ] || bad="$bad; eval's perplexity is not the run's"
check 0 'kept' prune "$work/a/out" "$work/again" $data --method magnitude --bits 4 --pattern 2:4 --learn weights --weight-epochs 1 \
    --learn-vectors --quiet "--tokens=$stories/calibration_tokens.npy"
version=$("$besa" --version | sed 's/ (.*//')
for line in 'base_model: "out"' 'base_model_relation: quantized' 'license: other' '- "2:4"' '- 4-bit' '- magnitude' \
    "Weights of the linear layers in the decoder's blocks were set to 0, and the others fitted to that, and rounded to grids; norms and biases were fitted too, by $version; all else is as it was."; do
    grep -qxF -e "$line" "$work/again/README.md" || bad="$bad; a second time: no line $line"
done
cmp -s "$work/model/README.md" "$work/again/README.dense.md" || bad="$bad; the dense model's card is lost the second time"
done_with "the card of an output"

# The licence in the forms that YAML has for a word, or a list of them; of another form it is said that it is not kept.
cp -r "$stories" "$work/licensed" && rm -f "$work/licensed"/*.npy
bom=$(printf '\357\273\277')
while IFS='|' read -r front expected; do
    printf %b "$front" >"$work/licensed/README.md"
    rm -rf "$work/licensed_out"
    check 0 '' prune "$work/licensed" "$work/licensed_out" $data --method wanda --quiet
    got=$(sed -n '/^license/,/^library_name/p' "$work/licensed_out/README.md" | sed '$d')
    [ "$got" = "$(printf %b "$expected")" ] && ! grep -q '^not kept' "$work/log" || bad="$bad; of '$front': $got $(grep '^not kept' "$work/log")"
done <<END
---\nlicense: mit  # see LICENSE\n---\n|license: mit
---\nlicense: "mit" # x\nlicense_name: 'a b'\t# c\n---\n|license: "mit"\nlicense_name: 'a b'
---\nlicense:\n- mit\n- "apache-2.0" # too\nlicense_link: https://x.org/#a # b\n---\n|license:\n- mit\n- "apache-2.0"\nlicense_link: https://x.org/#a
---\nlicense: # two\n  - mit\n  - C#\ntags: [a]\n---\n|license:\n- mit\n- C#
$bom---\r\nlicense: mit\r\nlicense_name: ours \r\n  # a comment\r\n---\r\n|license: mit\nlicense_name: ours
---\nlicenses: x\nx: 1\n---\nlicense: no\n|
END
for value in '>-\n  mit' '[mit]' '&a mit' '"m\\"it"' 'mit\n  or so' 'a: b' '' '\n- mit\n- [x]' '\n- mit\n  or so' "'it''s'" '"mit'; do
    printf %b "---\nlicense: $value\nlicense_name: ours\n---\n" >"$work/licensed/README.md"
    rm -rf "$work/licensed_out"
    check 0 "^not kept: license of the source's README.md (" prune "$work/licensed" "$work/licensed_out" $data --method wanda --quiet
    ! grep -q '^license:\|mit' "$work/licensed_out/README.md" && grep -q '^license_name: ours$' "$work/licensed_out/README.md" ||
        bad="$bad; $value: $(head -8 "$work/licensed_out/README.md")"
done
done_with "the licence in an output's card"

# A card that is no file, which must not hang who reads it: a FIFO, a directory.
for kind in mkfifo mkdir; do
    cp -r "$stories" "$work/$kind" && rm -f "$work/$kind/README.md" && $kind "$work/$kind/README.md"
    timeout 100 "$besa" prune "$work/$kind" "$work/$kind.out" $data --method wanda >"$work/log" 2>&1
    [ $? -eq 0 ] && grep -q '^not copied: README.md (' "$work/log" && grep -q '^base_model: "'$kind'"$' "$work/$kind.out/README.md" &&
        ! grep -q '^license:' "$work/$kind.out/README.md" && [ ! -e "$work/$kind.out/README.dense.md" ] || bad="$bad; $kind: $(tail -1 "$work/log")"
    timeout 100 "$besa" eval "$work/$kind" --tokens "$stories/test_tokens.npy" --windows 2 --seqlen 32 >"$work/log" 2>&1 || bad="$bad; eval with $kind"
done
done_with "a source whose card is no file"

# ---- hostile text ----

# No control character that comes from a file or an argument reaches the terminal: C0, DEL, or C1 in UTF-8.
esc=$(printf '\033')
hostile='\\u001b[2J\\u0007\\u009b31m\\u007f\\nbesa: all is well'
mkdir -p "$work/hostile" && cp "$stories"/*.safetensors "$work/hostile"
sed "s/\"model_type\": *\"[a-z]*\"/\"model_type\": \"$hostile\"/" "$stories/config.json" >"$work/hostile/config.json"
check 1 'model_type = "?\[2J.*besa: all is well" is not supported' info "$work/hostile"
others=$(LC_ALL=C tr -d '\n\040-\176' <"$work/log" | wc -c)
[ $others -eq 0 ] && [ "$(wc -l <"$work/log")" -eq 1 ] || bad="$bad; model_type: $(cat -v "$work/log")"
for arguments in "plan $stories --method x${esc}[2J" "plan $work/no${esc}[2J" "x${esc}[2J" "plan $stories --x${esc}[2J" \
                 "compare $stories $data $text --method besa:${esc}[2J"; do
    run $arguments
    [ $got -ne 0 ] && grep -q '?\[2J' "$work/log" && ! grep -q "$esc" "$work/log" || bad="$bad; $(cat -v "$work/log")"
done
cp "$stories/config.json" "$work/hostile"
: >"$work/hostile/weights${esc}[2J.bin"
check 0 'out?\[2J: sparsity 0.5' prune "$work/hostile" "$work/out${esc}[2J" $data --method wanda
grep -q 'weights?\[2J.bin' "$work/log" && ! grep -q "$esc" "$work/log" || bad="$bad; $(cat -v "$work/log")"
done_with "control characters"

# ---- output that cannot be written ----

if [ -w /dev/full ]; then
    for arguments in --help --version "prune --help" "plan $stories --seqlen 32" "info $stories" "info $stories --json"; do
        "$besa" $arguments >/dev/full 2>"$work/log"
        [ $? -eq 1 ] && grep -q 'standard output: ' "$work/log" || bad="$bad; $arguments"
    done
    done_with "standard output on a full device"
else echo "SKIP standard output on a full device: no /dev/full"; fi

# ---- README ----

# README's commands on the bundled model print, as they stand there, what the block below them says.
mkdir -p "$work/readme/examples" && cp -r "$stories" "$work/readme/examples" && cp "$besa" "$work/readme/examples" || exit 1
awk -v commands="$work/commands" -v printed="$work/printed" '
    /^```/ && !inside { inside = 1; kind = $0; text = ""; next }
    /^```/ { inside = 0 }
    /^```/ && kind == "```sh" && text ~ /besa prune examples\/stories260K/ { print text >commands; found = 1; next }
    /^```/ && kind == "```" && found { printf "%s", text >printed; exit }
    inside && !/^make / { text = text $0 "\n" }' "$readme"
(cd "$work/readme" && sh -e ../commands) >"$work/log" 2>"$work/errors"
status=$?
[ $status -eq 0 ] || cp "$work/errors" "$work/log"
verdict $status "README's commands on the bundled model"
# Numbers to a tenth, as processors round differently and learning amplifies it; minutes:seconds are free.
paste -d '\n' "$work/printed" "$work/log" | awk '
    NR % 2 { n = split($0, word, " "); next }
    { if (split($0, got, " ") != n) exit bad = 1
      for (i = 1; i <= n; i++) {
          same = word[i] == got[i] || (word[i] ~ /^[0-9]+:[0-9]+$/ && got[i] ~ /^[0-9]+:[0-9]+$/)
          error = i > 1 && word[i - 1] == "+/-"
          if (!same && (word[i] ~ /^[1-9][0-9.]*$/ || error) && got[i] ~ /^[0-9.]+$/) {
              ratio = got[i] / word[i]
              same = ratio > 0.9 && ratio < 1.1
          }
          if (!same) exit bad = 1
      } }
    END { exit bad || NR < 4 || NR % 2 }'
verdict $? "README says what they print"

# All commands with besa that stand in files for readers run as they stand, on less: 8 x 32 tokens of the bundled model.
all=$work/all
mkdir -p "$all/examples" && cp "$besa" "$all/examples/besa" && cp -r "$stories" "$all/MODEL" && rm "$all"/MODEL/*.npy &&
    cp -r "$all/MODEL" "$all/Llama-2-7b" && cp -r "$stories" "$all/examples" || exit 1
for tokens in c4 c4-stream c4-tail c4-validation calibration chats; do cp "$stories/calibration_tokens.npy" "$all/$tokens.npy"; done
cp "$stories/test_tokens.npy" "$all/wikitext2.npy"
awk -f readme_lines.awk "$readme" "$(dirname "$readme")"/examples/*.md | grep '^examples/besa ' | awk '!seen[$0]++' >"$work/lines"
awk '{ into = ""; less = $2 == "info" ? "" : " --seqlen 32"
       if (match($0, / >[^ ]*$/)) { into = substr($0, RSTART); $0 = substr($0, 1, RSTART - 1) }
       if ($2 ~ /^(prune|plan|compare)$/) less = less " --nsamples 8"
       if ($2 == "compare") less = less " --test-seqlen 32"
       if ($2 ~ /^(compare|eval)$/) less = less " --windows 2"
       if (/--blocks/) less = less " --blocks 0-1"
       if ($2 == "prune") print "rm -rf " $4
       print $0 less into }' "$work/lines" >"$work/less"
grep -v '^examples/besa \(eval\|info\)' "$work/less" >"$work/first"     # what is pruned comes first
grep '^examples/besa \(eval\|info\)' "$work/less" >"$work/then"
for part in first then; do
    (cd "$all" && sh -e "../$part" 2>&1) >"$work/log" || bad="$bad; $(tail -1 "$work/log")"
done
# The options of README's table of presets are taken.
sed -n '/^## Which preset/,/^## /s/^| [^|]* | \([^|]*\) |.*/\1/p' "$readme" | grep -o '`--[^`]*`' | tr -d '`' | sed 's/DIR/MODEL/' >"$work/presets"
while read -r options; do
    (cd "$all" && examples/besa plan MODEL --seqlen 32 $options) >"$work/log" 2>&1 || bad="$bad; $options: $(head -1 "$work/log")"
done <"$work/presets"
[ "$(wc -l <"$work/presets")" -ge 8 ] || bad="$bad; only $(wc -l <"$work/presets") presets"
for picture in $(grep -o '](examples/[^)]*png)' "$readme" | tr -d ']()'); do
    [ "$(wc -c <"$(dirname "$readme")/$picture")" -lt 100000 ] || bad="$bad; $picture is not there, or large"
done
[ "$(wc -l <"$readme")" -le 300 ] || bad="$bad; README has more than 300 lines"
[ "$(wc -l <"$work/lines")" -ge 12 ] || bad="$bad; only $(wc -l <"$work/lines") commands"
done_with "all commands with besa in README and examples/*.md"
exit $failed
