# verdict STATUS NAME: the line of a test, for sum.sh; of one that failed also the end of $work/log. For scripts to source.
failed=0
verdict()
{
    if [ "$1" -eq 0 ]; then echo "PASS $2"; return; fi
    echo "FAIL $2"
    tail -8 "$work/log" | sed 's/^/    /'
    failed=1
}
