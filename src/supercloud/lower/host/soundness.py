"""What the compiler of a host's grant manifest vouches for, so that the core need not check it.

The core reads the types strictly and refuses what its own promises hang from; that paths are plain
and that names refer to something is looked at here, before a keeper is started.
"""

import json
import os.path
from typing import Any

from supercloud.lower.core.manifest import Kind, Manifest, parse
from supercloud.model.errors import Invalid
from supercloud.wire.frames import DOMAIN_NAME, NAME


def check(document: dict[str, Any]) -> None:
    """Invalid, with the place, unless the core will take it and all of it makes sense."""
    manifest = parse(json.dumps(document).encode())
    names = [name for name, _ in manifest.domains]
    for name in (*names, *manifest.kinds):
        if not DOMAIN_NAME.match(name):
            raise Invalid(f"{name!r} is no name", where="manifest")
    if len({*names}) != len(names):
        raise Invalid("a domain twice", where="manifest.domains")
    if not {kind for _, kind in manifest.domains} <= {*manifest.kinds}:
        raise Invalid("a domain of an unknown kind", where="manifest.domains")
    _check_grants(manifest, names)
    for name, kind in manifest.kinds.items():
        _check_kind(kind, f"manifest.kinds.{name}")


def _check_grants(manifest: Manifest, names: list[str]) -> None:
    for number, grant in enumerate(manifest.grants):
        kind, _, name = grant.object.partition(":")
        known = kind == "inherited" or (kind == "domain" and name in names)
        if grant.to not in names or not known or not NAME.match(grant.name):
            raise Invalid("it names what is not there", where=f"manifest.grants[{number}]")


def _check_kind(kind: Kind, where: str) -> None:
    for path in (kind.argv[0], *(bind.source for bind in kind.binds)):
        _check_path(path, "/", where)
    for bind in kind.binds:
        _check_path(bind.target, "/run/", where)
    for device in kind.devices:
        _check_path(device, "/dev/", where)
    if not all(map(NAME.match, kind.descriptors)):
        raise Invalid("a descriptor has a bad name", where=where)


def _check_path(path: str, below: str, where: str) -> None:
    if os.path.normpath(path) != path or not path.startswith(below) or "\0" in path:
        raise Invalid(f"{path!r} is not a plain path below {below}", where=where)
