"""Resources back to a manifest."""

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import yaml

from supercloud.model.durations import format_duration
from supercloud.model.resources import API_VERSION, KIND, UCloud
from supercloud.model.rules import Rule, manifest_key, rule_of
from supercloud.model.sizes import format_size


def dump(ucloud: UCloud) -> str:
    """A manifest that ``parse`` reads as ``ucloud``; defaults are left out."""
    document = {"apiVersion": API_VERSION, "kind": KIND, **_plain(ucloud)}
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not is_dataclass(value):
        return value
    result = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if item != _default(field):
            result[manifest_key(field)] = _written(rule_of(field), item)
    return result


def _written(rule: Rule, item: Any) -> Any:
    if rule.size:
        return format_size(item)
    return format_duration(item) if rule.duration else _plain(item)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
