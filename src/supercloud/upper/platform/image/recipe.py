"""What goes into the images, as data: Debian packages, paths to keep, kernel modules, our code."""

import re

KERNEL_META = "linux-image-cloud-amd64"
PYTHON = "usr/bin/python3.13"
PYTHON_LIB = "usr/lib/python3.13"
_LIB = "usr/lib/x86_64-linux-gnu"

# Asked of apt; the lock holds these and all that they depend on.
WANTED = (
    "busybox-static",
    "criu",
    "crun",
    "cryptsetup-bin",
    "dmsetup",
    "dnsmasq-base",
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "ipxe-qemu",
    "iptables",
    "kmod",
    "libpython3.13-stdlib",
    "lz4",
    "nftables",
    "openssl",
    "openssl-provider-legacy",
    "passt",
    "python3.13-minimal",
    "qemu-system-x86",
    "qemu-utils",
    "runc",
    "seabios",
    "skopeo",
    "swtpm",
    "tar",
    "zstd",
)

# Never read from a package: documentation, translations, other machines' firmware.
SKIP = re.compile(
    r"usr/share/(doc|man|info|locale|lintian|bash-completion|zsh|bug|menu|applications|pixmaps"
    r"|icons|common-licenses|qemu/keymaps/[^e])|usr/lib/systemd|var/|etc/(init|cron|logrotate"
    r"|apt|default|pam|security|apparmor)"
    rf"|{PYTHON_LIB}/(test|idlelib|lib2to3|tkinter|turtle|ensurepip|pydoc_data|config-3|curses"
    r"|_pyrepl|sqlite3|dbm|venv|unittest|doctest|_pydecimal|_pyio|wsgiref|xmlrpc"
    r"|antigravity|sitecustomize|__phello__|_aix|_android|_apple|_ios|_osx|EXTERNALLY|LICENSE)"
    r"|.*/__pycache__"
)

_PYTHON_ROOTS = (PYTHON, f"{PYTHON_LIB}/*.py", f"{PYTHON_LIB}/lib-dynload/*.so")
_OPENSSL_ROOTS = ("usr/bin/openssl", "etc/ssl/openssl.cnf", "usr/lib/ssl/openssl.cnf")
_QEMU_ROOTS = (
    "usr/bin/qemu-system-x86_64",
    "usr/bin/qemu-img",
    "usr/bin/qemu-storage-daemon",
    "usr/share/seabios/bios-256k.bin",
    "usr/share/seabios/bios-microvm.bin",
    "usr/share/seabios/vgabios-stdvga.bin",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/multiboot_dma.bin",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/qemu/efi-virtio.rom",
    "usr/share/qemu/keymaps/en-us",
)

RUNTIME_ROOTS = (
    *_PYTHON_ROOTS,
    *_OPENSSL_ROOTS,
    *_QEMU_ROOTS,
    "usr/bin/busybox",
    "usr/bin/mkfs.erofs",
    "usr/bin/passt",
    "usr/bin/passt.avx2",
    "usr/bin/swtpm",
)

L1_ROOTS = (
    *_PYTHON_ROOTS,
    *_OPENSSL_ROOTS,
    *_QEMU_ROOTS,
    f"{_LIB}/ossl-modules/legacy.so",  # cryptsetup hashes with it
    f"{_LIB}/xtables/*.so",
    "usr/bin/busybox",
    "usr/bin/crun",
    "usr/bin/ip",
    "usr/bin/kmod",
    "usr/bin/mkfs.erofs",
    "usr/bin/ss",
    "usr/bin/tar",
    "usr/sbin/bridge",
    "usr/sbin/criu",
    "usr/sbin/cryptsetup",
    "usr/sbin/dmsetup",
    "usr/sbin/dnsmasq",
    "usr/sbin/e2fsck",
    "usr/sbin/mke2fs",
    "usr/sbin/nft",
    "usr/sbin/resize2fs",
    "usr/sbin/runc",
    "usr/sbin/tc",
    "usr/sbin/xtables-legacy-multi",
    "usr/sbin/xtables-nft-multi",
    "etc/mke2fs.conf",
)

# CRIU calls iptables-restore; alternatives would be set up by a maintainer script.
_XTABLES = ("iptables", "iptables-restore", "iptables-save")
L1_LINKS = {
    **{f"usr/sbin/{name}": "xtables-legacy-multi" for name in _XTABLES},
    **{f"usr/sbin/{name.replace('ip', 'ip6', 1)}": "xtables-legacy-multi" for name in _XTABLES},
    **{f"usr/sbin/{name}": "../bin/kmod" for name in ("modprobe", "insmod", "rmmod", "depmod")},
    "usr/bin/lsmod": "kmod",
    "usr/sbin/ip": "../bin/ip",
    "usr/sbin/mkfs.ext4": "mke2fs",
    "usr/bin/runc": "../sbin/runc",
    "usr/bin/python3": "python3.13",
}
RUNTIME_LINKS = {"usr/bin/sh": "busybox", "usr/bin/python3": "python3.13"}

# Mount points, and directories that programs expect.
DIRECTORIES = tuple(
    "dev etc mnt opt proc root run sys tmp usr/bin usr/sbin usr/lib usr/lib64 var/lib var/log "
    "var/tmp".split()
)
TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/protocols": "ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\n",
}

# The initramfs: enough to find the root. The second group serves foreign disks only.
BOOT_MODULES = ("virtio_blk", "erofs", "overlay")
BOOT_MODULES_LEGACY = ("virtio_scsi", "sd_mod", "ahci", "ata_piix", "xen_blkfront")

MODULES = (
    *BOOT_MODULES,
    *"""
    virtio_net virtio_balloon virtio_scsi virtio_mem virtio_rng loop isofs vfat nls_ascii
    nls_cp437 nls_utf8 squashfs
    kvm kvm_amd kvm_intel irqbypass vhost_net vhost_vsock vsock_loopback
    vmw_vsock_virtio_transport tun macvlan ipvlan veth bridge br_netfilter vxlan geneve wireguard
    dummy sch_netem sch_tbf sch_htb sch_ingress cls_bpf cls_u32 act_mirred
    dm_mod dm_crypt dm_integrity dm_verity dm_thin_pool dm_snapshot nbd raid1 dm_raid
    xts essiv authenc aesni_intel sha256_ssse3 crc32c_intel
    chacha20poly1305 algif_skcipher algif_hash af_alg
    nf_tables nft_ct nft_nat nft_chain_nat nft_masq nft_fib_inet nft_reject_inet nft_limit
    nft_log nft_redir nft_compat nft_numgen nft_hash nft_queue nft_tproxy nft_socket
    nf_conntrack nf_conntrack_netlink nfnetlink_queue
    ip_tables ip6_tables iptable_filter ip6table_filter iptable_nat iptable_raw
    xt_mark xt_tcpudp xt_conntrack xt_comment xt_MASQUERADE xt_nat xt_addrtype
    unix_diag inet_diag tcp_diag udp_diag netlink_diag af_packet_diag
    openvswitch vfio_pci ptp_kvm tpm_vtpm_proxy
    ahci ata_piix sd_mod sr_mod ena vmxnet3 hv_netvsc hv_storvsc
    xen_blkfront xen_netfront gve
    """.split(),
)

# Our code, as paths below the package.
OWN_RUNTIME = ("__init__.py", "model", "wire", "trust", "isolation", "services", "lower")
OWN_L1 = (
    *OWN_RUNTIME,
    "upper/__init__.py",
    "upper/platform/__init__.py",
    "upper/platform/agent",
)

# The tool tree: run on the building machine through its own loader.
TOOL_ROOTS = (
    *_PYTHON_ROOTS,
    *_QEMU_ROOTS,
    "usr/bin/busybox",
    "usr/bin/dump.erofs",
    "usr/bin/fsck.erofs",
    "usr/bin/kmod",
    "usr/bin/lz4",
    "usr/bin/mkfs.erofs",
    "usr/bin/skopeo",
    "usr/bin/zstd",
    "usr/sbin/mke2fs",
)
TOOL_LINKS = {"usr/sbin/depmod": "../bin/kmod"}
