#!/bin/sh
# Does one task of the default queue, and ends: a worker of nothing but POSIX's shell and flock(1) of util-linux.
#
#     worker.sh CONFIG
#
# CONFIG is the profile's directory. It needs no pipe: the lock is a life, `mv` is rename(2), and an outcome that is left
# on the disk is found by whoever waits for it within ten seconds. Exits with 1 if it has done none. A shell cannot read
# JSON: it does tasks that begin and end as Python writes them, fails those that begin or end as no JSON object does, and
# gives back all others. The numbers are those of PROTOCOL.md.
set -eu
umask 077 # D6
export LC_ALL=C # a byte is a byte, and A-Z are 26 of them
die() { printf '%s\n' "$1" >&2; exit 1; }
hex() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

[ $# = 1 ] || die "usage: worker.sh CONFIG"
config=$(CDPATH='' cd "$1" && pwd -P) || exit 1
queue=$config/coordinator
pipes=$(readlink "$config/pipes/directory") && [ -e "$pipes" ] ||
    die "no broker runs in $config: start its coordinator" # D1
set -- $(ls -ldn "$pipes") # its mode, its links and its owner
case $1 in d???--[-S]--[-T]*) ;; *) die "$pipes is no directory for its user alone: $1" ;; esac # D2
[ "$3" = "$(id -u)" ] || die "$pipes is another user's"
[ "$(readlink "$pipes/.config")" = "$config" ] || die "$pipes is not for $config"
[ -f "$queue/format" ] && grep -q '^{ *"format": *1 *[,}]' "$queue/format" ||
    die "$queue has a format that this program does not know" # D7

# What is ours stands last in a task (F5), so that sed can find it.
end='"no_reply": *false, *"reply_to": *"\(reply_[0-9][0-9]*_[0-9a-f]\{32\}\)", *"correlation_id": *"\([0-9a-f]*\)"\(, *"dressed": *true\)*}'
unheard='"no_reply": *true, *"reply_to": *null, *"correlation_id": *null\(, *"dressed": *true\)*}'

is_ours() { # whether the text of task $1 is one line that begins and ends as Python writes it
    [ "$(sed -n '$=' "$1")" = 1 ] && grep -q "^{\"body\":.*\($end\|$unheard\)\$" "$1"
}
may_be_json() { # whether it begins and ends as a JSON object that has a field
    [ "$(tr -d ' \t\r\n' < "$1" | sed 's/^\(..\).*\(.\)$/\1\2/')" = '{"}' ]
}
answer() { # whoever sent the task $1, if its text says who, with the text $3 as its $2 (A1, A3)
    reply_to=$(sed -n "\$s/.*$end\$/\\1/p" "$1")
    [ -n "$reply_to" ] || return 0
    correlation_id=$(sed -n "\$s/.*$end\$/\\2/p" "$1")
    body=body_$reply_to.$(hex)
    printf '{"%s":"%s","correlation_id":"%s"}' "$2" "$3" "$correlation_id" > "$pipes/.$body.$(hex)"
    mv "$pipes/.$body".* "$pipes/$body"
}
settle() { # the task $1, in the state $2 (W4, W5); $3 is kept beside it
    mkdir -p "$queue/$2"
    [ -z "$3" ] || printf '%s' "$3" > "$queue/$2/task_$name.reason"
    mv "$1" "$queue/$2/"
}

id=sh-$$-$(hex)
claims=$queue/claimed/$id
draft=$queue/claimed/.$id.$(hex)
exec 9<> "$draft"
flock -n 9 # L1: until we end
mkdir "$claims"
# L2: an empty directory may be removed meanwhile. If it cannot be made, or is there still, `ln` has said what is wrong.
until ln "$draft" "$claims/lock"; do mkdir "$claims" 2> /dev/null || exit 1; done
rm "$draft"

status=1
for waiting in "$queue"/task_*.json; do
    name=${waiting##*/task_}
    name=${name%.json}
    task=${name%%.*}
    case $name in '' | .* | *. | *[!0-9A-Za-z_.-]* | *.*[!0-9]*) continue ;; esac # D5: {id} or {id}.{deaths}
    [ ${#task} -le 80 ] || continue # T1
    [ ! -e "$queue/paused" ] || break # W3
    claimed=$claims/task_$name.json
    mv "$waiting" "$claimed" 2> /dev/null || continue # W2: somebody else has it
    if [ -e "$queue/paused" ] || [ -L "$claimed" ] || [ ! -f "$claimed" ]; then
        mv "$claimed" "$waiting" # W3, W6
    elif is_ours "$claimed"; then
        answer "$claimed" result "a task of $(($(wc -c < "$claimed"))) bytes" # W5: before it is completed
        settle "$claimed" completed ""
        status=0
        break
    elif may_be_json "$claimed"; then
        mv "$claimed" "$waiting" # W6: it is for somebody who can read it
    else
        why="it is no JSON object with a body"
        answer "$claimed" exception "$why" # W4
        settle "$claimed" failed "$why"
    fi
done

rm "$claims/lock" # L6
rmdir "$claims"
exit $status
