# sections.awk - read besa.h twice: awk -f sections.awk besa.h besa.h. Fails where the contents and the markers disagree, and
# where a section of the implementation uses what a later one defines. besa_cpu_backend and besa_cuda_backend are the tables
# that the others call through.
function complain(text) { print "FAIL " FILENAME ":" FNR ": " text; failed = 1 }
function define(name) { if (!(name in home)) { home[name] = section; place[name] = FNR } }

# a line without its comments and strings
function code_of(line,   out, i) {
    out = ""
    while (length(line) > 0) {
        if (in_comment) {
            if ((i = index(line, "*/")) == 0) break
            line = substr(line, i + 2); in_comment = 0
        } else if (match(line, /\/\*|\/\/|"([^"\\]|\\.)*"/)) {
            out = out substr(line, 1, RSTART - 1) " "
            i = substr(line, RSTART, 2)
            line = substr(line, RSTART + (i == "/*" ? 2 : RLENGTH))
            if (i == "/*") in_comment = 1
            if (i == "//") break
        } else { out = out line; break }
    }
    return out
}

FNR == 1 { pass++; section = 0; implementation = 0; in_comment = 0 }
/^ \*     >>[a-z]/ && pass == 1 { contents[++listed] = substr($2, 3) }
/^ \* \/\/ >>[a-z]/ {
    section++
    if (pass == 1 && substr($3, 3) != contents[section])
        complain("section " section " is >>" substr($3, 3) ", but >>" contents[section] " in the contents")
    title[section] = substr($3, 3)
}
/^#ifdef BESA_IMPLEMENTATION$/ { implementation = 1 }
!implementation { next }
{ code = code_of($0) }
pass == 1 && /^#define BESA__[A-Za-z_0-9]+/ { name = $2; sub(/\(.*/, "", name); define(name) }
pass == 1 && code ~ /^(static|BESA_API|BESA__INLINE|BESA__UNUSED|typedef|struct|BESA__KERNEL|BESA__TILE)/ && code !~ /\);[ ]*$/ {
    if (match(code, /besa_[A-Za-z_0-9]+\(/)) define(substr(code, RSTART, RLENGTH - 1))
}
pass == 1 && code ~ /^BESA__KERNEL/ && match(code, /besa__[a-z_0-9]+/) { define(substr(code, RSTART, RLENGTH)) }
pass == 1 && code ~ /^} besa__[a-z_0-9]+;/ { name = $2; sub(/;/, "", name); define(name) }
pass == 2 {
    while (match(code, /(besa|BESA)_[A-Za-z_0-9]+/)) {
        name = substr(code, RSTART, RLENGTH)
        code = substr(code, RSTART + RLENGTH)
        if (name in home && home[name] > section && name !~ /^besa_c(pu|uda)_backend$/)
            complain(">>" title[section] " uses " name " of the later >>" title[home[name]])
    }
}
END {
    if (section != listed) complain("the contents list " listed " sections, there are " section " markers")
    if (length(home) < 500) complain("only " length(home) " definitions found: this test does not see the code")
    if (!failed) print "PASS sections: contents and markers agree, none uses a later one"
    exit failed
}
