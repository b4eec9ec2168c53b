"""Converting a container image, packing a VM's kernel: each in a process of its own.

They hold a whole image's tree and the image builder in memory; the control plane should have
neither while it idles. ``python -m supercloud.control.convert REFERENCE CACHE`` prints
``{"image": ...}`` or ``{"error": ...}``, one JSON object; ``... pack OUT NAME FILE ...`` ``{}``.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from supercloud.control.images import Converted
from supercloud.model.errors import Permanent, SupercloudError, Temporary, from_wire, to_wire
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import Process

TIMEOUT_S: Final = 1800
MAX_ANSWER_BYTES: Final = 4 << 20


def in_process(reference: str, cache: Path) -> Converted:
    """Convert ``reference`` in a process of its own; blocking. Raises what the conversion does."""
    answer = _ask(reference, reference, str(cache))
    return decode(Converted, answer["image"], "image")


def pack_in_process(files: Mapping[str, Path], out: Path) -> None:
    """``upper.environments.packing.pack`` in a process of its own; blocking."""
    pairs = [text for name, path in files.items() for text in (name, str(path))]
    _ask(f"the image of {', '.join(files)}", "pack", str(out), *pairs)


def _ask(what: str, *arguments: str) -> dict[str, Any]:
    """The answer of this module run as a program. Raises what it says, Temporary, Permanent."""
    command = [sys.executable, "-m", "supercloud.control.convert", *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise Temporary(f"{what} was not converted in {TIMEOUT_S} s", delay_s=60) from error
    try:
        answer: dict[str, Any] = json.loads(done.stdout[:MAX_ANSWER_BYTES])
    except ValueError:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise Permanent(f"converting {what} ended with {done.returncode}: {said}") from None
    if "error" in answer:
        raise from_wire(answer["error"])
    return answer


def main(arguments: list[str]) -> int:
    """Convert and print."""
    try:
        if arguments[0] == "pack":
            answer = _pack(*arguments[1:])
        else:
            reference, cache = arguments
            answer = {"image": encode(_convert(reference, Path(cache)))}
    except SupercloudError as error:
        answer = {"error": to_wire(error)}
    print(json.dumps(answer))
    return 0


def _pack(out: str, *pairs: str) -> dict[str, Any]:
    from supercloud.upper.environments.packing import pack  # noqa: PLC0415 - only in this process
    from supercloud.upper.platform.image.tools import ToolTree  # noqa: PLC0415 - likewise

    names, paths = pairs[::2], map(Path, pairs[1::2])
    pack(dict(zip(names, paths, strict=True)), Path(out), ToolTree())
    return {}


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
