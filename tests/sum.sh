#!/bin/sh
# sum.sh LOG... - adds up the PASS, FAIL and SKIP lines; a program's own last "N passed, N failed, N skipped" counts
# instead where it counted more than it printed. Fails if anything did, or if nothing was there.
cat_log() { for log in "$@"; do echo "@"; cat "$log" || echo "FAIL no $log"; done; echo "@"; }
cat_log "$@" | awk '
    function more(a, b) { return a > b ? a : b }
    /^@$/ { passed += more(p, op); failed += more(f, of); skipped += more(s, os); p = f = s = op = of = os = 0 }
    /^PASS/ { p++ } /^FAIL/ { f++ } /^SKIP/ { s++ }
    /^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ { op = $1; of = $3; os = $5 }
    END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped; exit failed > 0 || passed + skipped == 0 }'
