"""The manifest's JSON Schema, from the declarations of ``model.resources``."""

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from supercloud.control.manifest.decode import HEADER, hints_of
from supercloud.model.resources import API_VERSION, Port, UCloud
from supercloud.model.rules import Rule, manifest_key, rule_of
from supercloud.model.sizes import format_size

DURATION_PATTERN = r"^[0-9]{1,9}[smhd]$"
SIZE_PATTERN = r"^[0-9]{1,18}(\.[0-9]{1,6})?(KiB|MiB|GiB|TiB)$|^[0-9]{1,18}$"


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a manifest; editors complete and check with it."""
    top = _object(UCloud)
    header = {key: {"const": value} for key, value in HEADER.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://{API_VERSION}/manifest.schema.json",
        "title": "A supercloud manifest",
        **top,
        "properties": {**header, **top["properties"]},
        "required": [*HEADER, *top["required"]],
    }


def _object(cls: Any) -> dict[str, Any]:
    properties = {}
    for field in fields(cls):
        rule = rule_of(field)
        described = {"description": rule.doc, **_schema(hints_of(cls)[field.name], rule)}
        if (default := default_of(field)) is not None:
            described["default"] = default
        properties[manifest_key(field)] = described
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": [manifest_key(field) for field in fields(cls) if is_required(field)],
    }


def is_required(field: "Field[Any]") -> bool:
    """Whether a manifest must have it."""
    return field.default is MISSING and field.default_factory is MISSING


def default_of(field: "Field[Any]") -> Any:
    """What a manifest gets that leaves it out, as it would write it; None: nothing to show."""
    rule = rule_of(field)
    if field.default in (MISSING, "") or (not field.default and (rule.ge or 0) > 0):
        return None  # what is not allowed to be given stands for that it is not given
    return format_size(field.default) if rule.size else field.default


def _schema(hint: Any, rule: Rule) -> dict[str, Any]:
    origin = get_origin(hint)
    if origin is list:
        items = _schema(get_args(hint)[0], rule)
        return {"type": "array", "items": items, **_items(rule)}
    if origin is dict:
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^({rule.key_pattern})$"},
            "additionalProperties": {"type": ["string", "number", "boolean"]},
            "maxProperties": rule.max_items,
        }
    if is_dataclass(hint):
        whole = _object(hint)
        return {"oneOf": [_schema(int, rule_of(fields(Port)[0])), whole]} if hint is Port else whole
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    return _scalar(hint, rule)


def _items(rule: Rule) -> dict[str, int]:
    return {"maxItems": rule.max_items, **({"minItems": rule.min_items} if rule.min_items else {})}


def _scalar(hint: Any, rule: Rule) -> dict[str, Any]:
    bounds = {
        key: value
        for key, value in (("minimum", rule.ge), ("maximum", rule.le))
        if value is not None
    }
    if rule.size:
        text = {"type": "string", "pattern": SIZE_PATTERN}
        return {"oneOf": [{"type": "integer", **bounds}, text]}
    if rule.duration:
        return {"type": "string", "pattern": DURATION_PATTERN}
    if hint is bool:
        return {"type": "boolean"}
    if hint in (int, float):
        return {"type": "integer" if hint is int else "number", **bounds}
    described: dict[str, Any] = {"type": "string", "maxLength": rule.max_length}
    if rule.min_length:
        described["minLength"] = rule.min_length
    if rule.pattern:
        described["pattern"] = f"^({rule.pattern})$"
    return described
