"""What is refused, through the real command line and on a real host, before anything has happened."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.model.errors import STATUS
from support.inventory import Inventory, inventory, uids_of
from support.stack import HEADER, Stack, stack

pytestmark = pytest.mark.root

INVALID, NO_RESOURCES, UNSUPPORTED = (
    STATUS[code][1] for code in ("invalid", "no_resources", "unsupported")
)
WEB = "  - {{name: {name}, kind: container, image: 'oci:{examples}/web', memory: {memory}}}\n"
BOMB = "".join(f"x{n}: &x{n} [{f'*x{n - 1}, ' * 10 if n else '1, ' * 10}]\n" for n in range(9))


@pytest.fixture(scope="module")
def made(product_images: Path) -> Iterator[Stack]:
    with stack(product_images) as made:
        made.enrol("small", "here", memory="1GiB", vms=2, cpus=2)
        yield made


@pytest.fixture
def untouched(made: Stack) -> Iterator[None]:
    """Nothing has come of what the test asked for."""
    before = state(made)
    yield
    assert state(made) == before
    assert made.json("ps") == []
    assert made.cli("ls", "--quiet").stdout == ""


def state(made: Stack) -> tuple[Inventory, object, str]:
    """The host's processes and groups, what users have in use, what the disk driver has done."""
    host = made.hosts["here"]
    found = inventory(host.instance, uids_of(host.instance), host.ports)
    used = [held(user["used"]) for user in host.json("user", "list")]
    return found, used, (host.state / "log/disk.log").read_text().partition("disk here-")[2]


def held(used: dict[str, int]) -> dict[str, int]:
    return {name: amount for name, amount in used.items() if name != "cpu_us"}


def web(examples: Path, name: str = "web", memory: str = "64MiB") -> str:
    return WEB.format(name=name, examples=examples, memory=memory)


def refused(made: Stack, body: str, status: int, name: str = "small") -> str:
    """What ``up`` of a manifest with this body says."""
    return made.cli("up", made.manifest(name, body), status=status).stderr


@pytest.mark.usefixtures("untouched")
def test_a_platform_larger_than_the_quota_is_told_at_its_place(
    made: Stack, example_images: Path
) -> None:
    body = f"environments:\n{web(example_images)}platform: {{memory: 2GiB}}\n"
    said = refused(made, body, INVALID)
    assert re.search(r"small.yaml:8:\d+ platform.memory: found 2GiB, allowed is at most 1GiB", said)


@pytest.mark.usefixtures("untouched")
def test_more_than_the_quota_in_all_is_refused_with_the_reason(
    made: Stack, example_images: Path
) -> None:
    several = "".join(web(example_images, f"web{n}", "600MiB") for n in range(3))
    said = refused(made, f"environments:\n{several}platform: {{memory: 1GiB}}\n", NO_RESOURCES)
    assert "memory" in said
    assert "here" in said


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("environments:\n{web}{web}", INVALID, r":8:\d+ environments\[1\].name: .*twice"),
        ("environments:\n{lost}", INVALID, r":7:\d+ environments\[0\].image: .*there is no"),
        (
            "networks:\n  - {{name: a, range: 10.1.0.0/16}}\n  - {{name: b, range: 10.1.2.0/24}}\n",
            INVALID,
            r":8:\d+ networks\[1\].range: .*overlaps",
        ),
        (
            "environments:\n{web}survive: []\n",
            UNSUPPORTED,
            r":8:\d+ survive: .*not supported yet",
        ),
        (BOMB, INVALID, r":\d+:\d+: .*aliases"),
        ("environments: [\n", INVALID, r":\d+:\d+: not YAML"),
    ],
    ids=["twice", "no-image", "overlap", "reserved", "bomb", "syntax"],
)
@pytest.mark.usefixtures("untouched")
def test_a_bad_manifest_is_told_by_line_and_column(
    made: Stack, example_images: Path, body: str, status: int, message: str
) -> None:
    lost = web(Path("/nowhere"))
    if "{" in body:
        body = body.format(web=web(example_images), lost=lost)
    said = refused(made, body, status)
    assert re.search(f"error: .*/small.yaml{message}", said), said


@pytest.mark.usefixtures("untouched")
def test_a_file_of_100_mb_is_refused_at_once(made: Stack) -> None:
    path = made.home / "large.yaml"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    said = made.cli("up", str(path), status=INVALID).stderr
    assert "found 104857600 bytes, allowed are at most 1048576" in said


@pytest.mark.usefixtures("untouched")
def test_a_u_cloud_that_the_provider_does_not_know(made: Stack, example_images: Path) -> None:
    said = made.cli(
        "up", made.manifest("unknown", f"environments:\n{web(example_images)}"), status=None
    )
    assert said.returncode not in (0, 70)
    assert "is unknown enrolled there?" in said.stderr


def test_a_u_cloud_that_was_enrolled_with_somebody_elses_certificate(
    made: Stack, example_images: Path
) -> None:
    made.hosts["here"].command("user", "add", "other", "--ca", str(root_certificate(made)))
    try:
        file = made.manifest("other", f"environments:\n{web(example_images)}")
        said = made.cli("up", file, status=None)
        assert said.returncode not in (0, 70)
        assert re.search("refuses our certificate|hung up: was other enrolled", said.stderr), said
        assert made.cli("ls", "--quiet").stdout == ""
    finally:
        made.hosts["here"].command("user", "remove", "other")


def test_what_is_no_certificate_is_not_enrolled(made: Stack) -> None:
    path = made.directory / "nonsense.pem"
    path.write_text("no certificate at all\n")
    host = made.hosts["here"]
    said = host.command("user", "add", "nobody", "--ca", str(path), status=INVALID)
    assert "certificate" in said
    assert [user["name"] for user in host.json("user", "list")] == ["small"]


def test_an_endpoint_where_nobody_listens(made: Stack, example_images: Path) -> None:
    path = made.home / "away.yaml"
    provider = "  - {name: away, kind: lower_layer, endpoint: '127.0.0.1:9'}\n"
    body = f"name: away\nproviders:\n{provider}environments:\n{web(example_images)}"
    path.write_text(HEADER + body)
    said = made.cli("up", str(path), status=None)
    assert said.returncode not in (0, 70)
    assert "127.0.0.1:9" in said.stderr
    assert made.cli("ls", "--quiet").stdout == ""


def root_certificate(made: Stack) -> Path:
    """A root certificate, well made, of somebody else."""
    path = made.directory / "other.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", "/dev/null", "-subj", "/CN=somebody else", "-days", "30"]
    subprocess.run([*command, "-out", str(path)], check=True, capture_output=True)
    return path
