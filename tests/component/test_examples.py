"""The examples as they are shipped: each comes up, on providers that pretend, and stays so."""

from pathlib import Path

import pytest

from supercloud.control.manifest import dump, parse
from supercloud.control.service import Manifest
from support.control import World

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))


@pytest.fixture
async def world(tmp_path):
    """Images that stand in for those that scripts/up builds are where the examples look."""
    made = World(tmp_path / "build" / "examples")
    await made.start()
    yield made
    await made.stop()


def example(world, name, *, pretended):
    text = (EXAMPLES / name).read_text()
    if pretended:
        text = text.replace("kind: lower_layer", "kind: fake")
    directory = world.directory.parents[1] / "examples"
    return Manifest(manifest=text, file=name, directory=str(directory))


def test_none_was_forgotten():
    shipped = {"hello.yaml", "fake.yaml", "volumes.yaml", "buckets.yaml", "checkpoints.yaml"}
    assert shipped <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
async def test_it_parses_and_is_the_same_when_it_is_written_anew(world, name):
    asked = example(world, name, pretended=False)
    ucloud = parse(asked.manifest.encode(), file=name, directory=Path(asked.directory))
    assert ucloud.environments
    for item in ucloud.environments:
        assert item.image.removeprefix("oci:").startswith(str(world.directory))
    assert parse(dump(ucloud), file="again", directory=Path("/")) == ucloud


@pytest.mark.parametrize("name", NAMES)
async def test_it_comes_up_and_then_there_is_nothing_to_change(world, name):
    asked = example(world, name, pretended=True)
    ucloud = parse(asked.manifest.encode(), file=name, directory=Path(asked.directory))
    service = world.app.service
    planned = await service.plan(asked)
    subjects = {change.subject for change in planned.changes}
    for kind in ("environment", "volume", "bucket", "network"):
        wished = getattr(ucloud, f"{kind}s")
        assert {f"{kind}/{item.name}" for item in wished} <= subjects
    assert all("nothing really runs here" in warning for warning in planned.warnings)
    assert (await service.up(asked)).plan == planned
    await world.ready(ucloud.name)
    again = await service.plan(asked)
    assert again.changes == []
    await service.down(ucloud.name)
    await world.gone()
