# The direct way from an image to a running container, inside a platform: what somebody would script with
# mount, iproute2 and crun. Same image, kinds of mounts and namespaces, limits and profile as the agent's.
# /tmp/bundle/config.json and the image's blob ($1) are there. Prints the seconds that it took.
set -e
bundle=/tmp/bundle name=direct
modprobe -a loop 2>/dev/null || true
mkdir -p /tmp/image /data/upper $bundle/rootfs
mountpoint -q /tmp/image || mount -t erofs -o ro "$1" /tmp/image
read -r start rest < /proc/uptime
layer=/var/lib/supercloud/$name
mkdir -p $layer/upper $layer/work
mount -t overlay -o lowerdir=/tmp/image,upperdir=$layer/upper,workdir=$layer/work overlay $bundle/rootfs
/usr/bin/ip -batch - <<EOF
netns add $name
link add ve$name type veth peer name eth0 netns $name
link set ve$name master ee0 up
EOF
/usr/bin/ip -n $name -batch - <<EOF
link set lo up
addr add 10.64.0.99/24 dev eth0
link set eth0 up
route add default via 10.64.0.1
EOF
crun --root /run/direct --cgroup-manager=cgroupfs run --detach --bundle $bundle --pid-file /tmp/pid $name > /tmp/out 2>&1
read -r end rest < /proc/uptime
echo "took $start $end"
crun --root /run/direct --cgroup-manager=cgroupfs delete --force $name
umount $bundle/rootfs
/usr/bin/ip netns delete $name
rm -rf $layer
