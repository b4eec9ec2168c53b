"""Every error that a user meets says what to do: by its hint, or by the place that is to change."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.model.errors import BY_CODE

SRC = Path(__file__).parents[2] / "src" / "supercloud"
SHOWN = {cls.__name__ for cls in BY_CODE.values()} | {"UserError", "Unavailable"}
SAYS = {"hint", "where"}

AGENT = "told to a platform's agent"
PROGRAM = "only a program's mistake: the command line asks otherwise"
INNER = "caught, or a mistake of ours: the control plane asks otherwise"
# By file, or by file and a part of the message: why it needs none.
NEEDS_NONE = {
    "control/agents.py": AGENT,
    "control/deposits.py": AGENT,
    "control/api/declare.py": PROGRAM,
    "control/api/streams.py": PROGRAM,
    "control/api/server.py: the body is larger": PROGRAM,
    "control/api/server.py: error.reason": PROGRAM,
    "control/api/access.py: the connection is gone": "nobody is there to read it",
    "control/controllers/standstill.py: no snapshot": AGENT,
    "control/images.py: no blob": AGENT,
    "control/controllers/checkpoint.py: removes no checkpoints": "an event's text",
    "control/controllers/template.py: templates": "a template's reason: platforms boot instead",
    "control/controllers/sealing.py: its host does not have it": "the halted volume's hint is shown",
    "control/controllers/replication.py: has no mirror": INNER,
    "control/controllers/replication.py: is gone": INNER,
    "control/controllers/volume.py: nothing is asked": INNER,
    "control/pool.py: another key is pinned": INNER,
    "control/store/base.py: not a key": INNER,
    "control/store/leases.py": INNER,
}


def made_without(path: Path) -> Iterator[str]:
    """``file: source`` of each error in ``path`` that says neither."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        given = {keyword.arg for keyword in node.keywords}
        if node.func.id in SHOWN and not given & SAYS and None not in given:
            source = " ".join((ast.get_source_segment(text, node) or "").split())
            yield f"{path.relative_to(SRC)}: {source}"


def is_excused(made: str, by: str) -> bool:
    file, _, part = by.partition(": ")
    return made.startswith(f"{file}: ") and part in made


@pytest.fixture(scope="module")
def found() -> list[str]:
    files = [path for room in ("cli", "control") for path in sorted((SRC / room).rglob("*.py"))]
    return [made for path in files for made in made_without(path)]


def test_every_error_says_what_to_do(found: list[str]) -> None:
    silent = [made for made in found if not any(is_excused(made, by) for by in NEEDS_NONE)]
    assert not silent, "give a hint (what the user can do) or a place:\n" + "\n".join(silent)


def test_no_excuse_outlives_its_error(found: list[str]) -> None:
    assert not [by for by in NEEDS_NONE if not any(is_excused(made, by) for made in found)]


def test_one_that_says_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SRC", tmp_path)
    path = tmp_path / "a.py"
    path.write_text('raise Busy("it is")\nraise Busy("x", hint="y")\nraise Invalid("x", where="y")')
    assert list(made_without(path)) == ['a.py: Busy("it is")']
