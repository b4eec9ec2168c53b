"""The manifest's reference and schema, written from the declarations.

``python -m supercloud.control.manifest.docs [DIRECTORY]`` writes ``manifest.md`` and
``manifest.schema.json`` there (``docs``); a test compares them.
"""

import json
import sys
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from supercloud.control.manifest.decode import HEADER, hints_of
from supercloud.control.manifest.schema import default_of, is_required, schema
from supercloud.control.manifest.tree import MAX_BYTES, MAX_DEPTH, MAX_NODES
from supercloud.model import durations
from supercloud.model.durations import format_duration
from supercloud.model.resources import RESERVED, UCloud
from supercloud.model.rules import Rule, manifest_key, rule_of
from supercloud.model.sizes import UNITS, format_size

INTRODUCTION = f"""\
# Manifest

<!-- Written by python -m supercloud.control.manifest.docs; edit model/resources.py instead. -->

A manifest describes one U-Cloud, in YAML: `supercloud plan FILE` shows what it would change,
`supercloud up FILE` makes it so. `docs/manifest.schema.json` is its JSON Schema, for editors.
`examples/` has some.

- It begins with {" and ".join(f"`{key}: {value}`" for key, value in HEADER.items())}.
- Sizes are numbers of bytes, or texts with a unit: {", ".join(f"`{unit}`" for unit in UNITS)}
  (`128MiB`, `1.5GiB`).
- Durations are texts with a unit: {", ".join(f"`{unit}`" for unit in durations.UNITS)} (`90s`,
  `10m`).
- What a plain word means is decided by the field that it stands in: `jurisdiction: NO` is Norway,
  and a number in `env` is a text.
- Limits: {format_size(MAX_BYTES)}, {MAX_DEPTH} levels, {MAX_NODES} values with aliases counted in
  full; one document; no tags.
- Reserved for later versions, and refused until then, at the top and in environments:
  {", ".join(f"`{word}`" for word in RESERVED)}.

All that is wrong is told at once, each with file, line, column and field; nothing is changed then,
and the exit status is 2 (9 if only reserved words are used).
"""


def reference() -> str:
    """The reference, in Markdown."""
    parts = [INTRODUCTION]
    for path, cls in _sections(UCloud, ""):
        doc = (cls.__doc__ or "").strip().replace("``", "`")
        heading = f"## `{path}`" if path else "## The manifest"
        parts.append(f"{heading}\n\n{doc}\n\n{_table(cls)}\n")
    return "\n".join(parts)


def _sections(cls: Any, path: str) -> list[tuple[str, Any]]:
    found = [(path, cls)]
    for field in fields(cls):
        hint = hints_of(cls)[field.name]
        below = f"{path}.{manifest_key(field)}" if path else manifest_key(field)
        inner = get_args(hint)[0] if get_origin(hint) is list else hint
        if is_dataclass(inner):
            found += _sections(inner, below + ("[]" if inner is not hint else ""))
    return found


def _table(cls: Any) -> str:
    rows = ["| field | what it is | allowed | if left out |", "| --- | --- | --- | --- |"]
    for field in fields(cls):
        rule = rule_of(field)
        hint = hints_of(cls)[field.name]
        cells = (f"`{manifest_key(field)}`", rule.doc, _allowed(hint, rule), _left_out(field))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _left_out(field: "Field[Any]") -> str:
    if is_required(field):
        return "required"
    default = default_of(field)
    return "" if default is None else f"`{json.dumps(default)}`".replace('"', "")


def _allowed(hint: Any, rule: Rule) -> str:
    origin = get_origin(hint)
    if origin is list:
        inner = get_args(hint)[0]
        of = "mappings, see below" if is_dataclass(inner) else _allowed(inner, rule)
        least = f"{rule.min_items} to " if rule.min_items else "at most "
        return f"a list of {least}{rule.max_items}: {of}"
    if origin is dict:
        return f"a mapping of at most {rule.max_items}; names `{rule.key_pattern}`"
    if is_dataclass(hint):
        return "a mapping, see below"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    return _scalar(hint, rule)


def _scalar(hint: Any, rule: Rule) -> str:
    if rule.size:
        return f"{format_size(int(rule.ge or 0))} to {format_size(int(rule.le or 0))}"
    if rule.duration:
        return f"{format_duration(int(rule.ge or 0))} to {format_duration(int(rule.le or 0))}"
    if hint is bool:
        return "`true`, `false`"
    if hint in (int, float):
        return f"{'whole number, ' if hint is int else ''}{rule.ge:g} to {rule.le:g}"
    return rule.wanted or f"a text of at most {rule.max_length} characters"


def write(directory: Path) -> None:
    """Write both files."""
    directory.joinpath("manifest.md").write_text(reference(), encoding="utf-8")
    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    directory.joinpath("manifest.schema.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
