#!/bin/sh
# sum.sh LOG... - adds up the PASS, FAIL and SKIP lines. Fails if anything did, or if nothing was there.
for log in "$@"; do cat "$log" || echo "FAIL no $log"; done | awk '
    /^PASS/ { passed++ } /^FAIL/ { failed++ } /^SKIP/ { skipped++ }
    END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped; exit failed > 0 || passed + skipped == 0 }'
