"""Where a manifest's images are: paths made absolute, and those that are not there noted."""

import os
from dataclasses import replace
from pathlib import Path

from supercloud.control.manifest.problems import Problems
from supercloud.model.resources import Environment, split_image

CONTAINER_FORMS = "oci:PATH[:TAG], docker-archive:PATH or docker://REFERENCE"
VM_FORMS = "the path of a disk image (qcow2, raw), or of a directory with kernel and initrd"


def located(
    environment: Environment, path: str, directory: Path, problems: Problems
) -> Environment:
    """The environment with its image's path absolute; notes an image that cannot be used."""
    transport, rest, tag = split_image(environment.image)
    forms = CONTAINER_FORMS if environment.kind == "container" else VM_FORMS
    if (transport == "") == (environment.kind == "container") or not rest:
        hint = f"oci:{environment.image}" if transport == "" else ""
        message = f"found {environment.image!r:.200}, allowed for a {environment.kind} is {forms}"
        problems.at_path(path, message, hint=f"did you mean {hint!r:.200}?" if hint else "")
        return environment
    if transport == "docker":
        return environment  # whether a registry has it is asked when it is pulled
    absolute = Path(os.path.normpath(directory / rest))
    if reason := _unusable(transport, absolute):
        problems.at_path(path, f"found {environment.image!r:.200}: {reason}")
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
