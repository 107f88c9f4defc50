# readme_lines.awk - the commands of the blocks marked sh in files for readers, one a line: lines that go on are joined, remarks
# left out.
/^```sh$/ { inside = 1; next }
/^```/ { inside = 0 }
!inside { next }
{ sub(/ +#.*$/, ""); line = line $0 }
line ~ /\\$/ { sub(/ *\\$/, " ", line); next }
{ gsub(/  +/, " ", line); if (line != "") print line; line = "" }
