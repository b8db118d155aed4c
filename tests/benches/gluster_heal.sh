#!/bin/bash
# gluster_heal.sh DIR MIB: how long GlusterFS takes to make a lost brick again: a dispersed volume of
# 4+2 on this machine with its bricks in DIR, MIB of data in files of 64 MiB, one brick killed, emptied
# and started again, `heal full`. The clock runs from `start force` until the new brick has been
# written all its bytes. Needs root, glusterd, gluster, attr. Prints
#     seconds cpu_seconds survivors_read_mib
# Everything runs in namespaces of its own, which end with this script: no daemon, mount or state of
# the machine's own GlusterFS is touched, and nothing stays but DIR.
set -eu -o pipefail
if [ "${1-}" != inside ]; then
    exec unshare --mount --net --pid --fork --kill-child --mount-proc -- "$0" inside "$@"
fi
dir=$2 mib=$3 files=$((($3 + 63) / 64))
host=10.99.0.1 volume=heal
for state in /var/lib/glusterd /var/log/glusterfs /run; do
    mkdir -p $state && mount -t tmpfs none $state
done
mkdir -p /run/gluster
ip link set lo up && ip address add $host/32 dev lo
glusterd
gl() { gluster --mode=script "$@" > /dev/null; }
until gl volume list 2> /dev/null; do sleep 0.2; done
bricks=()
for brick in 1 2 3 4 5 6; do
    mkdir -p "$dir/b$brick" && bricks+=("$host:$dir/b$brick")
done
gl volume create $volume disperse 6 redundancy 2 "${bricks[@]}" force
gl volume start $volume
mkdir -p "$dir/mnt" && mount -t glusterfs $host:/$volume "$dir/mnt"
for file in $(seq "$files"); do
    head -c $((64 << 20)) /dev/urandom > "$dir/mnt/$file" && sync "$dir/mnt/$file"
done

brick_pid() { gluster volume status $volume "$host:$dir/b$1" detail | awk '/^Pid/ { print $3 }'; }
cpu_ticks() { # of every GlusterFS process here
    cat /proc/[0-9]*/stat 2> /dev/null | awk '/gluster/ { sub(/.*\) /, ""); n += $12 + $13 } END { print n + 0 }'
}
read_bytes() {
    for brick in 1 2 4 5 6; do cat "/proc/$(brick_pid $brick)/io"; done |
        awk '/^rchar/ { n += $2 } END { print n }'
}
written() { awk '/^wchar/ { print $2 }' "/proc/$1/io" 2> /dev/null || echo 0; }
seconds() { awk '{ print $1 }' /proc/uptime; }

pid=$(brick_pid 3)
kill -9 "$pid"
while kill -0 "$pid" 2> /dev/null; do sleep 0.1; done
id=$(getfattr --absolute-names --only-values -n trusted.glusterfs.volume-id -e hex "$dir/b1")
rm -rf "$dir/b3" && mkdir -p "$dir/b3/.glusterfs" && chmod 700 "$dir/b3/.glusterfs"
setfattr -n trusted.glusterfs.volume-id -v "$id" "$dir/b3"
sync
read_before=$(read_bytes) cpu_before=$(cpu_ticks) begun=$(seconds)
gl volume start $volume force
until pid=$(brick_pid 3) && [ "$pid" -gt 0 ] 2> /dev/null; do sleep 0.1; done
gl volume heal $volume full
want=$((files * (16 << 20)))
until [ "$(written "$pid")" -ge $want ]; do
    sleep 0.05
    awk -v now="$(seconds)" -v begun="$begun" 'BEGIN { exit now - begun > 600 }' ||
        { echo "not healed in 600 s: $(written "$pid") of $want bytes" >&2; exit 1; }
done
ended=$(seconds) cpu_after=$(cpu_ticks) read_after=$(read_bytes)
awk -v t="$ended" -v t0="$begun" -v c="$cpu_after" -v c0="$cpu_before" -v r="$read_after" \
    -v r0="$read_before" 'BEGIN { printf "%.2f %.1f %.0f\n", t - t0, (c - c0) / 100, (r - r0) / 1048576 }'
