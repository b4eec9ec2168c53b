#!/usr/bin/env bash
# A Docker daemon of its own, for `docker ps -a` as the baseline of bench/ps.py: dockerd.sh DIRECTORY.
# Run under `unshare --mount --net --pid --fork --kill-child --mount-proc`: nothing of it is seen outside.
set -eu
mount --make-rprivate /
umount /sys/fs/cgroup/unified 2>/dev/null || true # docker refuses cgroups in hybrid mode
ip link set lo up
exec dockerd --data-root "$1/data" --exec-root "$1/exec" --pidfile "$1/pid" -H "unix://$1/docker.sock" \
  --iptables=false --ip-forward=false --ip-masq=false --bridge=none --storage-driver=vfs
