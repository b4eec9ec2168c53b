"""Converting a container image, in a process of its own.

The conversion holds a whole image's tree and the image builder in memory; the control plane
should have neither while it idles. ``python -m supercloud.control.convert REFERENCE CACHE``
prints ``{"image": ...}`` or ``{"error": ...}``, one JSON object.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from supercloud.control.images import Converted
from supercloud.model.errors import Permanent, SupercloudError, Temporary, from_wire, to_wire
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import Process

TIMEOUT_S: Final = 1800
MAX_ANSWER_BYTES: Final = 4 << 20


def in_process(reference: str, cache: Path) -> Converted:
    """Convert ``reference`` in a process of its own; blocking. Raises what the conversion does."""
    command = [sys.executable, "-m", "supercloud.control.convert", reference, str(cache)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise Temporary(f"{reference} was not converted in {TIMEOUT_S} s", delay_s=60) from error
    try:
        answer = json.loads(done.stdout[:MAX_ANSWER_BYTES])
    except ValueError:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise Permanent(f"converting {reference} ended with {done.returncode}: {said}") from None
    if "error" in answer:
        raise from_wire(answer["error"])
    return decode(Converted, answer["image"], "image")


def main(arguments: list[str]) -> int:
    """Convert and print."""
    reference, cache = arguments
    try:
        answer = {"image": encode(_convert(reference, Path(cache)))}
    except SupercloudError as error:
        answer = {"error": to_wire(error)}
    print(json.dumps(answer))
    return 0


def _convert(reference: str, cache: Path) -> Converted:
    from supercloud.upper.environments.oci import convert  # noqa: PLC0415 - only in this process
    from supercloud.upper.platform.image.tools import ToolTree  # noqa: PLC0415 - likewise

    made = convert(reference, cache=cache, tools=ToolTree())
    config = made.config
    process = Process(
        argv=[*config.entrypoint, *config.cmd],
        env=dict(item.partition("=")[::2] for item in config.env),
        workdir=config.workdir,
        user=config.user,
    )
    return Converted(made.digest, str(made.path), made.size_bytes, process)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
