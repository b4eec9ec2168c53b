"""Why EEs cannot be checkpointed on this platform: which depends on its image and kernel alone."""

import functools
import os


@functools.cache
def of_checkpoints() -> dict[str, str]:
    """By the EE's kind; empty if it can."""
    criu = "" if os.path.exists("/usr/sbin/criu") else "CRIU is not in this image"
    return {"container": criu, "vm": _of_tracking()}


def _of_tracking() -> str:
    """Why the kernel cannot say which pages of a VM were written; empty if it can."""
    with open("/proc/self/smaps") as file:
        flags = next((line.split() for line in file if line.startswith("VmFlags:")), [])
    if "sd" not in flags:
        return "the platform's kernel has no soft-dirty bits"
    release = [int(part) for part in os.uname().release.split("-")[0].split(".")[:2]]
    return "" if release >= [6, 7] else "the platform's kernel is older than 6.7"
