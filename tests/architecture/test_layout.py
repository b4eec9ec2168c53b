"""The tree is the architecture: every box of the design has its module, and the core its budget."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from supercloud.lower.service import SERVICES

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "supercloud"
CORE_BUDGET_LINES = 2500

BOXES = {
    "keeper": "lower/core/keeper.py",
    "MH core": "lower/core/broker.py",
    "VMM": "lower/vmm",
    "user domain": "lower/user_domain",
    "front door": "lower/provider/front_door.py",
    "resources multiplexing": "lower/provider/multiplexing.py",
    "device drivers: disk": "lower/provider/disk.py",
    "device drivers: uplink": "lower/provider/uplink.py",
    "admin console": "lower/provider/admin.py",
    "start of a host": "lower/host",
    "a platform's link domain": "lower/vmm/link.py",
    "infrastructure services: block": "services/block",
    "infrastructure services: protection": "services/protection",
    "infrastructure services: its engine": "services/protection/native/engine.h",
    "infrastructure services: replication": "services/replication",
    "infrastructure services: checkpoint": "services/checkpoint",
    "infrastructure services: objects": "services/objects",
    "launcher of services": "lower/service.py",
    "tunnel between hosts": "lower/user_domain/tunnel.py",
    "start from memory": "lower/user_domain/templates.py",
    "runtime and L1 images": "upper/platform/image",
    "L1 platform's agent": "upper/platform/agent",
    "L1 platform's saver": "upper/platform/saver",
    "agent link": "upper/platform/link",
    "environments": "upper/environments",
    "federation: placement": "upper/federation/placement.py",
    "legacy and LL providers": "providers/base.py",
    "providers: lower layer": "providers/lower_layer",
    "providers: fake": "providers/fake",
    "manifest": "control/manifest",
    "plan": "control/plan.py",
    "store": "control/store",
    "work queue": "control/reconcile.py",
    "reconcilers: ucloud": "control/controllers/ucloud.py",
    "reconcilers: platform": "control/controllers/platform.py",
    "reconcilers: environment": "control/controllers/environment.py",
    "reconcilers: volume": "control/controllers/volume.py",
    "reconcilers: replication": "control/controllers/replication.py",
    "reconcilers: checkpoint": "control/controllers/checkpoint.py",
    "reconcilers: object store": "control/controllers/store.py",
    "reconcilers: template": "control/controllers/template.py",
    "reconcilers: failover": "control/controllers/failover.py",
    "effects": "control/effects.py",
    "API": "control/api",
    "control plane": "control/main.py",
    "CLI": "cli/start.py",
    "CLI of a host": "cli/host.py",
    "isolation tables": "isolation",
    "trust": "trust",
    "messages": "wire/messages.py",
    "model": "model/resources.py",
}


@pytest.mark.parametrize("box", BOXES)
def test_every_box_of_the_design_has_its_module(box: str) -> None:
    path = SRC / BOXES[box]
    assert (path if path.suffix else path / "__init__.py").is_file()


def test_every_service_that_is_launched_is_a_box() -> None:
    packages = {name.removeprefix("supercloud.").split(".")[1] for name in SERVICES.values()}
    assert packages == {path.parent.name for path in (SRC / "services").glob("*/__init__.py")}
    assert {f"services/{name}" for name in packages} <= set(BOXES.values())


def core_closure() -> set[Path]:
    """The core's files and all of ours that they import, transitively."""
    todo, seen = sorted((SRC / "lower" / "core").glob("*.py")), set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                file = (SRC.parent / name.replace(".", "/")).with_suffix(".py")
                if name.startswith("supercloud.") and file.exists():
                    todo.append(file)
    return seen


def test_the_core_keeps_to_its_closure() -> None:
    outside = {
        str(p.relative_to(SRC)) for p in core_closure() if SRC / "lower" / "core" not in p.parents
    }
    assert outside <= {"model/capability.py", "model/refusals.py", "wire/frames.py"}


def test_the_core_keeps_to_its_budget() -> None:
    """Lines as ``wc -l`` counts them: code, comments, docstrings and blanks."""
    lines = sum(len(path.read_text().splitlines()) for path in core_closure())
    assert 300 < lines <= CORE_BUDGET_LINES


def test_no_line_of_the_core_is_wider_than_100() -> None:
    for path in core_closure():
        assert max(map(len, path.read_text().splitlines()), default=0) <= 100, path


@pytest.mark.parametrize("folder", ["src", "tests", "bench"])
def test_no_file_grew_past_500_lines(folder: str) -> None:
    big = [p for p in (ROOT / folder).rglob("*.py") if len(p.read_text().splitlines()) > 500]
    assert not big


def test_the_core_imports_the_standard_library_alone() -> None:
    names = "supercloud.lower.core.keeper, supercloud.lower.core.broker"
    code = f"import sys; sys.path.insert(0, {str(SRC.parent)!r}); import {names}"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
