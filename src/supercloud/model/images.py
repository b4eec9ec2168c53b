"""Names of L1 images: one digest for the three files that a host boots a platform from."""

import hashlib
import json
from collections.abc import Mapping

L1_FILES = ("vmlinux", "initrd", "root.erofs")


def l1_digest(sha256_by_file: Mapping[str, str]) -> str:
    """``sha256:...`` of an L1 image, from the bare hexadecimal sha256 of each of ``L1_FILES``."""
    named = {name: sha256_by_file[name] for name in L1_FILES}
    text = json.dumps(named, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
