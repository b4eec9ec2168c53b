"""A container that checks itself: a hash chain in its shell's memory, each link written down.

What was lost, is there twice or was mixed up breaks it, wherever it was restored.
"""

import hashlib

from support.stack import Stack

_PROGRAM = (
    "/bin/serve & n=0; h=begin; : > {numbers}; while :; do n=$((n+1)); "
    "h=$(echo $h $n | busybox sha256sum); h=${{h%% *}}; echo $n >> {numbers}; "
    "echo $n $h > /tmp/.chain; mv /tmp/.chain /tmp/chain; sleep 0.1; done"
)


def chain(numbers: str = "/dev/null") -> str:
    """For the shell of the example container: it serves, and lists its numbers in a file."""
    return _PROGRAM.format(numbers=numbers)


def number(stack: Stack, name: str) -> int:
    """How far the chain of ``UCLOUD/ENVIRONMENT`` is, its link being the right one."""
    words = stack.cli("exec", name, "--", "cat", "/tmp/chain").stdout.split()
    assert words[1] == _link(int(words[0])), "the chain is broken"
    return int(words[0])


def _link(number: int) -> str:
    value = "begin"
    for n in range(1, number + 1):
        value = hashlib.sha256(f"{value} {n}\n".encode()).hexdigest()
    return value
