"""Where things are in a platform. ``RUN`` is memory and outlives the agent, ``DATA`` is scratch."""

from typing import Final

RUN: Final = "/run/supercloud"
DATA: Final = "/var/lib/supercloud"

ENVIRONMENTS: Final = f"{RUN}/ee"
IMAGES: Final = f"{RUN}/images"
VOLUMES: Final = f"{RUN}/volumes"
CRUN: Final = f"{RUN}/crun"
DESIRED: Final = f"{RUN}/desired.json"
ACCELERATOR: Final = f"{RUN}/accelerator.json"
NETWORKS: Final = f"{RUN}/networks.json"
FIREWALL: Final = f"{RUN}/firewall.nft"
RESOLVERS: Final = f"{RUN}/resolv.conf"
KEY: Final = f"{RUN}/identity/key.pem"
CERTIFICATE: Final = f"{RUN}/identity/cert.pem"
BOOT: Final = f"{RUN}/boot"
IDENTIFIED: Final = f"{RUN}/identified"
PREPARED: Final = f"{RUN}/prepared"
SPARES: Final = f"{RUN}/spares"
SCRATCH: Final = f"{RUN}/scratch"

BLOBS: Final = f"{DATA}/blobs"
LAYERS: Final = f"{DATA}/ee"
CHECKPOINTS: Final = f"{DATA}/checkpoints"

CGROUP: Final = "/sys/fs/cgroup/ee"
