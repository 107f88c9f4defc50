#!/bin/sh
# run.sh LOG COMMAND... - run one test program, keep its lines in LOG. A program that fails without a FAIL line
# (a crash, a sanitizer's report) counts as one failure. The models are small: threads that spin between their short
# loops would only take the processor from each other.
log=$1
shift
OMP_WAIT_POLICY=passive "$@" >"$log" 2>&1
status=$?
if [ $status -ne 0 ] && ! grep -q '^FAIL' "$log"; then echo "FAIL $(basename "$1") ended with status $status" >>"$log"; fi
cat "$log"
exit 0
