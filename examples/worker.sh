#!/bin/sh
# Does one task of the default queue, and ends: a worker of nothing but POSIX's shell and flock(1) of util-linux.
#
#     worker.sh CONFIG
#
# CONFIG is the profile's directory. It needs no pipe: the lock is a life, `mv` is rename(2), and an outcome that is left
# on the disk is found by whoever waits for it within ten seconds. Exits with 1 if it has done none. A shell cannot read
# JSON: it does tasks that end as Python writes them, and gives back all others. The numbers are those of PROTOCOL.md.
set -eu
umask 077 # D6
queue=$1/coordinator
pipes=$(readlink "$1/pipes/directory") # D1
hex() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }
id=sh-$$-$(hex)
# What is ours stands last in a task (F5), so that sed can find it.
end='"no_reply": *false, *"reply_to": *"\(reply_[0-9]*_[0-9a-f]*\)", *"correlation_id": *"\([0-9a-f]*\)"\(, *"dressed": *true\)*}'
unheard='"no_reply": *true, *"reply_to": *null, *"correlation_id": *null\(, *"dressed": *true\)*}'

draft=$queue/claimed/.$id.$(hex)
exec 9<> "$draft"
flock -n 9 # L1: until we end
until mkdir -p "$queue/claimed/$id" && ln "$draft" "$queue/claimed/$id/lock"; do :; done # L2
rm "$draft"

status=1
for waiting in "$queue"/task_*.json; do
    case ${waiting##*/} in *[!0-9A-Za-z_.-]*) continue ;; esac # D5, T1
    [ ! -e "$queue/paused" ] || break # W3
    claimed=$queue/claimed/$id/${waiting##*/}
    mv "$waiting" "$claimed" 2> /dev/null || continue # W2: somebody else has it
    if [ -e "$queue/paused" ] || [ -L "$claimed" ] || [ ! -f "$claimed" ] ||
        ! grep -q "^{\"body\":.*\($end\|$unheard\)\$" "$claimed"; then
        mv "$claimed" "$waiting" # W3, W6: it is for somebody who can do it
        continue
    fi
    reply_to=$(sed -n "s/.*$end\$/\\1/p" "$claimed")
    correlation_id=$(sed -n "s/.*$end\$/\\2/p" "$claimed")
    size=$(wc -c < "$claimed")
    if [ -n "$reply_to" ]; then # A1
        name=body_$reply_to.$(hex)
        printf '{"result":"a task of %s bytes","correlation_id":"%s"}' "$size" "$correlation_id" > "$pipes/.$name.$(hex)"
        mv "$pipes"/.$name.* "$pipes/$name" # A3, and W5: before it is completed
    fi
    mv "$claimed" "$queue/completed/" # W5
    status=0
    break
done

rm "$queue/claimed/$id/lock" # L6
rmdir "$queue/claimed/$id"
exit $status
