"""Manifests: YAML to resources and back.

::

    text --tree--> nodes with lines --decode--> fields by their declarations
         --checks, images--> what holds between them --> UCloud

All problems are collected (``problems``) and raised together, each with ``file:line:column`` and
field path. ``docs`` and ``schema`` are generated from the same declarations.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from supercloud.control.manifest import checks
from supercloud.control.manifest.decode import BAD, decode_top
from supercloud.control.manifest.dump import dump
from supercloud.control.manifest.images import located, look
from supercloud.control.manifest.problems import Problems, nearest
from supercloud.control.manifest.tree import MAX_BYTES, read_tree
from supercloud.model.errors import UserError
from supercloud.model.resources import DEFAULT_NETWORK, Network, UCloud

__all__ = ["MAX_BYTES", "dump", "parse", "refuse", "where"]


def parse(
    untrusted_text: str | bytes, *, file: str, directory: Path, images: bool = True
) -> UCloud:
    """The U-Cloud that a manifest describes, complete (see ``model.resources``).

    ``file`` is its name in messages; paths in it are relative to ``directory``; without ``images``
    it does not matter whether they are there. Raises Invalid or
    Unsupported with ``where`` and, in ``details["errors"]``, all that is wrong: a list of
    ``{"where", "message", "hint"}``.
    """
    problems = Problems(file)
    values = decode_top(read_tree(untrusted_text, file=file), problems)
    checks.check(values, problems)
    if images:
        values["environments"] = _located(values.get("environments", BAD), directory, problems)
    problems.raise_if_any()
    return _complete(UCloud(**values))


def where(text: str | bytes, *, file: str, path: str) -> str:
    """``file:line:column path`` of a field of a manifest that has been parsed before.

    An item is given by its index or its name: ``environments[0].image``, ``environments.web``.
    """
    problems = Problems(file)
    decode_top(read_tree(text, file=file), problems)
    path = _by_index(path, problems)
    node = nearest(problems.marks, path)
    return f"{file}:{node.line}:{node.column} {path}"


def refuse(text: str | bytes, *, file: str, errors: Mapping[str, UserError]) -> None:
    """Raise what was found out of fields, by path, of a manifest that has been parsed before."""
    problems = Problems(file)
    decode_top(read_tree(text, file=file), problems)
    for path, error in errors.items():
        problems.at_path(path, error.message, hint=error.hint, kind=type(error))
    problems.raise_if_any()


def _by_index(path: str, problems: Problems) -> str:
    """``environments.web.image`` as ``environments[0].image``."""
    kind, _, rest = path.partition(".")
    name, dot, rest = rest.partition(".")
    node = problems.marks.get(kind)
    for index, item in enumerate(node.items or [] if node else []):
        entry = (item.entries or {}).get("name")
        if entry and entry[1].text == name:
            return f"{kind}[{index}]{dot}{rest}"
    return path


def _located(environments: Any, directory: Path, problems: Problems) -> Any:
    if environments is BAD:
        return BAD
    base, once = Path(os.path.abspath(directory)), functools.cache(look)
    return [
        item if item is BAD else located(item, f"environments[{index}].image", base, problems, once)
        for index, item in enumerate(environments)
    ]


def _complete(ucloud: UCloud) -> UCloud:
    """With everything filled in that the manifest may leave out."""
    networks = ucloud.networks or [Network(name=DEFAULT_NETWORK)]
    return replace(
        ucloud,
        networks=networks,
        providers=[replace(p, user=p.user or ucloud.name) for p in ucloud.providers],
        environments=[
            replace(e, network=e.network or networks[0].name) for e in ucloud.environments
        ],
    )
