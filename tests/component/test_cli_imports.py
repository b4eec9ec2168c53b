"""What ``supercloud ps`` loads, listed: it is to start faster than the command it is measured by."""

import subprocess
import sys

import pytest

from support.commandline import CommandLine, control_plane

OURS = {
    "supercloud",
    "supercloud.cli",
    "supercloud.cli.client",
    "supercloud.cli.commands",
    "supercloud.cli.failure",
    "supercloud.cli.listing",
    "supercloud.cli.table",
    "supercloud.cli.user",
    "supercloud.model",
    "supercloud.model.errors",
    "supercloud.model.refusals",
    "supercloud.model.sizes",
}
HEAVY = {
    "aiohttp", "asyncio", "contextvars", "cryptography", "dataclasses", "email", "http", "inspect",
    "logging", "msgspec", "rich", "shutil", "ssl", "subprocess", "typer", "urllib", "yaml",
}  # fmt: skip
COUNT_MAX = 90  # 85 on Python 3.11


def loaded(line: CommandLine, *words: str) -> set[str]:
    """The modules that a command has loaded when it is done."""
    code = (
        "import sys; from supercloud.cli.user import main; status = main(sys.argv[1:]); "
        "print('\\n'.join(sys.modules), file=sys.stderr); sys.exit(status)"
    )
    # -S and a path: without what a development environment loads by its .pth files.
    path = ":".join(part for part in sys.path if part)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *words], capture_output=True, text=True, timeout=30,
        env={**line.environment, "PYTHONPATH": path}, check=True,
    )  # fmt: skip
    return set(done.stderr.split())


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    line = CommandLine(tmp_path_factory.mktemp("imports"))
    with control_plane(line):
        line.run("up", line.manifest())
        yield line


def test_ps_loads_the_standard_library_and_little_of_ours(line):
    modules = loaded(line, "ps")
    assert {name for name in modules if name.split(".")[0] == "supercloud"} == OURS
    assert not {name.split(".")[0] for name in modules} & HEAVY
    assert len(modules) <= COUNT_MAX, sorted(modules)


@pytest.mark.parametrize("words", [["ps"], ["version"], ["inspect", "hello/web"], ["logs", "web"]])
def test_what_only_reads_loads_nothing_that_is_not_the_standard_librarys(line, words):
    foreign = {name.split(".")[0] for name in loaded(line, *words)} - sys.stdlib_module_names
    assert {name for name in foreign if not name.startswith("_")} == {"supercloud"}
