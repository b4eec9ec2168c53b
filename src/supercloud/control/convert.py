"""Converting a container image, packing a VM's kernel: each in a process of its own.

They hold a whole image's tree and the image builder in memory; the control plane should have
neither while it idles. ``python -m supercloud.control.convert REFERENCE CACHE`` prints
``{"image": ...}`` or ``{"error": ...}``, one JSON object; ``... pack OUT NAME FILE ...`` ``{}``;
``... look CACHE`` with references on stdin ``{"refused": {REFERENCE: error}}``.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from supercloud.control.images import Converted
from supercloud.model.errors import (
    Permanent,
    SupercloudError,
    Temporary,
    UserError,
    from_wire,
    to_wire,
)
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import Process

TIMEOUT_S: Final = 1800
LOOK_S: Final = 10
"""So long registries are given to say that they have an image, before anything is stored."""
LOOK_TIMEOUT_S: Final = 3 * LOOK_S  # an index takes another answer
LOOKS_AT_ONCE: Final = 4
MAX_ANSWER_BYTES: Final = 4 << 20

log = logging.getLogger("supercloud.control.convert")


def in_process(reference: str, cache: Path) -> Converted:
    """Convert ``reference`` in a process of its own; blocking. Raises what the conversion does."""
    answer = _ask(reference, reference, str(cache))
    return decode(Converted, answer["image"], "image")


def pack_in_process(files: Mapping[str, Path], out: Path) -> None:
    """``upper.environments.packing.pack`` in a process of its own; blocking."""
    pairs = [text for name, path in files.items() for text in (name, str(path))]
    _ask(f"the image of {', '.join(files)}", "pack", str(out), *pairs)


def look_in_process(references: Sequence[str], cache: Path) -> dict[str, UserError]:
    """Those of the references that no pull will get, and why; blocking.

    What cannot be found out now is not among them: the pull is tried again, and says so.
    """
    given = json.dumps(list(references)).encode()
    try:
        answer = _ask("images", "look", str(cache), given=given, timeout_s=LOOK_TIMEOUT_S)
    except SupercloudError as error:
        log.warning("whether registries have their images is not known: %s", error)
        return {}
    errors = {name: from_wire(wire) for name, wire in answer["refused"].items()}
    return {name: error for name, error in errors.items() if isinstance(error, UserError)}


def _ask(
    what: str, *arguments: str, given: bytes = b"", timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """The answer of this module run as a program. Raises what it says, Temporary, Permanent."""
    command = [sys.executable, "-m", "supercloud.control.convert", *arguments]
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise Temporary(f"{what} was not converted in {timeout_s:g} s", delay_s=60) from error
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
        elif arguments[0] == "look":
            answer = {"refused": _look(json.load(sys.stdin), Path(arguments[1]))}
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


def _look(references: Sequence[str], cache: Path) -> dict[str, Any]:
    from supercloud.upper.environments.oci import look  # noqa: PLC0415 - only in this process
    from supercloud.upper.platform.image.tools import ToolTree  # noqa: PLC0415 - likewise

    tools = ToolTree()
    tools.argv("skopeo")  # once, and what fails here says nothing of an image
    end_s = time.monotonic() + LOOK_S

    def one(reference: str) -> dict[str, Any] | None:
        try:
            left_s = max(0.01, end_s - time.monotonic())
            look(reference, cache=cache, tools=tools, timeout_s=left_s)
        except UserError as error:
            return to_wire(error)
        except SupercloudError as error:
            print(error, file=sys.stderr)
        return None

    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        found = zip(references, pool.map(one, references), strict=True)
        return {reference: wire for reference, wire in found if wire is not None}


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
