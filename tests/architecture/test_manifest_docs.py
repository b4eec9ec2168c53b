"""The manifest's reference and schema are what the declarations say."""

import json
from pathlib import Path

from supercloud.control.manifest.docs import write
from supercloud.control.manifest.schema import schema
from supercloud.model.resources import RESERVED

DOCS = Path(__file__).parents[2] / "docs"


def test_they_are_current(tmp_path):
    write(tmp_path)
    for name in ("manifest.md", "manifest.schema.json"):
        assert (DOCS / name).read_text() == (tmp_path / name).read_text(), (
            f"docs/{name} is old: python -m supercloud.control.manifest.docs"
        )


def test_the_schema_describes_each_field_and_no_other():
    described = json.loads(json.dumps(schema()))
    assert described["required"] == ["apiVersion", "kind", "name", "providers"]
    environment = described["properties"]["environments"]["items"]
    assert environment["additionalProperties"] is False
    assert all(field["description"] for field in environment["properties"].values())
    assert environment["properties"]["memory"]["default"] == "128MiB"
    assert not environment["properties"].keys() & set(RESERVED)
