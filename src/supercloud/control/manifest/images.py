"""Where a manifest's images are: paths made absolute, and those that are not there noted.

Whether a registry has an image takes it to be asked: ``control.looking``.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from supercloud.control.manifest.problems import Problems
from supercloud.model.errors import Invalid, UserError
from supercloud.model.resources import Environment, split_image
from supercloud.upper.environments import layouts, references
from supercloud.upper.environments.limits import LIMITS

Look = Callable[[str, Path, str], None]
"""``look``, or one that looks once at what several environments have."""

CONTAINER_FORMS = "oci:PATH[:TAG], docker-archive:PATH or docker://REFERENCE"
VM_FORMS = "the path of a disk image (qcow2, raw), or of a directory with kernel and initrd"


def located(
    environment: Environment, path: str, directory: Path, problems: Problems, look: Look
) -> Environment:
    """The environment with its image's path absolute; notes an image that cannot be used."""
    transport, rest, tag = split_image(environment.image)
    found = f"found {environment.image!r:.200}"
    forms = CONTAINER_FORMS if environment.kind == "container" else VM_FORMS
    if (transport == "") == (environment.kind == "container") or not rest:
        hint = f"oci:{environment.image}" if transport == "" else ""
        message = f"{found}, allowed for a {environment.kind} is {forms}"
        problems.at_path(path, message, hint=f"did you mean {hint!r:.200}?" if hint else "")
        return environment
    absolute = Path(os.path.normpath(directory / rest))
    try:
        if transport == "docker":
            _check(environment.image)
        elif reason := _unusable(transport, absolute):
            problems.at_path(path, f"{found}: {reason}", hint=_hint(transport, rest, directory))
        elif transport:
            look(transport, absolute, tag)
    except UserError as error:
        problems.at_path(path, f"{found}: {error.message}", hint=error.hint)
    except OSError as error:
        problems.at_path(path, f"{found}: {error.filename} cannot be read: {error.strerror}")
    if transport == "docker":
        return environment
    image = f"{transport}:{absolute}" if transport else str(absolute)
    return replace(environment, image=f"{image}:{tag}" if tag else image)


def _unusable(transport: str, path: Path) -> str:
    """Why there is no such image at ``path``; nothing when there is."""
    try:
        if not path.exists():
            return f"there is no {path}"
        if transport == "oci" and not (path / "index.json").is_file():
            return f"{path} is not an OCI layout: it has no index.json"
        if transport == "docker-archive" and not path.is_file():
            return f"{path} is not a file"
        if transport == "" and path.is_dir() and not (path / "image.json").is_file():
            lacking = [name for name in ("kernel", "initrd") if not (path / name).is_file()]
            return f"{path} has no {' and no '.join(lacking)}" if lacking else ""
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return ""


def _hint(transport: str, rest: str, directory: Path) -> str:
    before, colon, tag = rest.rpartition(":")
    if transport == "docker-archive" and colon and (directory / before).is_file():
        return f"an archive has one image, which has no tag here: leave :{tag} out"
    return "" if os.path.isabs(rest) else f"a path is relative to the manifest's {directory}"


def _check(reference: str) -> None:
    """Raise Invalid for what names nothing in any registry."""
    if not reference.startswith("docker://"):
        raise Invalid("this is not an image reference", hint=references.HINT)
    references.parse_reference(reference)


def look(transport: str, path: Path, tag: str) -> None:
    """Raise what a container image would be refused for when it is converted."""
    if transport == "oci":
        layouts.open_layout(path, tag, LIMITS, where=str(path))
        return
    from supercloud.upper.environments import archives  # noqa: PLC0415 - with tarfile; seldom

    archives.look(path, LIMITS)
