# The direct way to what examples/hello.yaml asks for, inside a platform of the same image: what somebody would
# script by hand with dmsetup, iproute2, nftables, dnsmasq, crun and QEMU. Same mounts, namespaces, limits and order of
# parallelism as the agent: uplink and scratch disk at once, then container and VM at once.
# Runs behind tests/support/guest.PRELUDE; files beside it in /guest, images on the disk "images".
set -e
ip() { /usr/bin/ip "$@"; } # busybox's shell would take its own
mke2fs() { /usr/sbin/mke2fs "$@"; }
uplink() {
  ip link set eth0 up
  udhcpc -i eth0 -n -q -t 10 -T 1 -s /guest/udhcpc.sh >/dev/null
}
scratch() {
  modprobe -a dm_crypt
  disk=$(disk scratch)
  key=$(head -c 64 /dev/urandom | hexdump -v -e '/1 "%02x"')
  dmsetup create scratch --table "0 $(cat /sys/block/${disk#/dev/}/size) crypt aes-xts-plain64 $key 0 $disk 0"
  dmsetup mknodes
  mke2fs -q -F -t ext4 -b 4096 -m 0 -O '^has_journal,^resize_inode,^metadata_csum' -E lazy_itable_init=1,nodiscard /dev/mapper/scratch
  mkdir -p /data
  mount -t ext4 -o nosuid,nodev,noatime,nodiscard /dev/mapper/scratch /data
}
network() {
  modprobe -a bridge veth tun nf_tables nft_chain_nat nft_masq nft_ct
  echo 1 > /proc/sys/net/ipv4/ip_forward
  ip -batch - <<EOF
link add ee0 type bridge
addr add 10.64.0.1/24 dev ee0
link set ee0 up
netns add web
link add veweb type veth peer name eth0 netns web
link set veweb master ee0 up
tuntap add tpvm mode tap vnet_hdr
link set tpvm master ee0 up
EOF
  ip -n web -batch - <<EOF
link set lo up
addr add 10.64.0.2/24 dev eth0
link set eth0 up
route add default via 10.64.0.1
EOF
  nft -f - <<EOF
table inet direct {
  chain prerouting {
    type nat hook prerouting priority dstnat
    iifname "eth0" tcp dport $PORT_WEB dnat ip to 10.64.0.2:8080
    iifname "eth0" tcp dport $PORT_VM dnat ip to 10.64.0.3:8080
  }
  chain postrouting {
    type nat hook postrouting priority srcnat
    ip saddr 10.64.0.0/24 oifname "eth0" masquerade
  }
  chain forward {
    type filter hook forward priority filter; policy drop
    ct state established,related accept
    iifname "eth0" ct status dnat accept
    iifname "ee0" accept
  }
}
EOF
  dnsmasq --conf-file=/guest/dnsmasq.conf
}
container() {
  mkdir -p /data/lower /data/layer/data /data/layer/work /bundle/rootfs
  mount -t erofs -o ro,nodev /images/web.erofs /data/lower
  mount -t overlay -o lowerdir=/data/lower,upperdir=/data/layer/data,workdir=/data/layer/work overlay /bundle/rootfs
  cp /guest/config.json /bundle/
  crun --cgroup-manager=cgroupfs run --detach --bundle /bundle web </dev/null >/data/web.log 2>&1 || cat /data/web.log
}
machine() {
  modprobe kvm_amd 2>/dev/null || modprobe kvm_intel 2>/dev/null || true
  accel=kvm cpu=host
  [ -e /dev/kvm ] || accel=tcg,thread=multi,tb-size=64 cpu=max
  exec qemu-system-x86_64 -name machine -nodefaults -no-user-config -display none -L /usr/share/qemu -L /usr/share/seabios \
    -machine pc,usb=off,hpet=off,vmport=off -accel $accel -cpu $cpu -smp 1 -m 128M -device virtio-rng-pci \
    -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
    -serial file:/data/vm.log -qmp unix:/run/vm.qmp,server=on,wait=off \
    -kernel /images/kernel -initrd /images/initrd -append "console=ttyS0 quiet panic=-1" \
    -netdev tap,id=n0,ifname=tpvm,script=no,downscript=no -device virtio-net-pci,netdev=n0,mac=02:64:00:00:00:03,romfile=
}
mkdir -p /images
modprobe -a virtio_net
mount -t erofs -o ro "$(disk images)" /images
uplink & network & scratch & wait
container & machine & 
sleep 86400
