"""Templates as the control plane asks for them: after the first up, for the next, with no secret."""

from typing import Any

import pytest

from support.control import World, environment, manifest_of

SECRET = "b7-not-in-a-template"
WISH = [
    environment("web", env={"TOKEN": SECRET}, command=["serve", SECRET]),
    environment("db", kind="vm", image="vm", ports=[]),
]


@pytest.fixture
async def world(tmp_path: Any) -> Any:
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def up(world: World, wish: Any = WISH, **more: Any) -> None:
    assert world.app is not None
    await world.app.service.up(manifest_of(world.directory, wish, **more))
    await world.ready()


async def wishes(world: World) -> Any:
    assert world.app is not None
    document = await world.app.plane.state.templates("test")
    return document.wishes if document else []


async def until_ready(world: World, state: str = "ready") -> Any:
    async def true() -> bool:
        found = await wishes(world)
        return bool(found) and all(wish.state == state for wish in found)

    await world.until(true, f"templates are {state}")
    return await wishes(world)


async def test_what_runs_is_ready_in_the_template_without_its_secrets(world: World) -> None:
    await up(world)
    found = await until_ready(world)
    prepared = {spec.name for wish in found for spec in wish.environments}
    assert prepared == {"web"}  # the VM's image does not wait to be told who it is
    assert SECRET not in repr(found)
    rows, _ = await world.store.list("templates/")  # type: ignore[union-attr]
    assert SECRET.encode() not in b"".join(row.value for row in rows)


async def test_it_is_there_for_the_next_up_after_a_down_and_a_restart(world: World) -> None:
    await up(world)
    await until_ready(world)
    assert world.app is not None
    await world.app.service.down("test")
    await world.gone()
    await world.stop()
    await world.start()  # the pretended host has forgotten: it is asked again
    await until_ready(world)
    assert world.app is not None
    checks = [check for check in await world.app.doctor() if check.name.startswith("template")]
    assert [check.found.split(":")[0] for check in checks] == ["ready"] * len(checks)
    assert checks


async def test_it_goes_with_the_volumes(world: World) -> None:
    await up(world)
    await until_ready(world)
    assert world.app is not None
    await world.app.service.purge("test")
    await world.gone()

    async def none() -> bool:
        return not await wishes(world)

    await world.until(none, "no template is wished for")


async def test_another_wish_is_another_template_and_the_old_one_is_not_asked_for(
    world: World,
) -> None:
    await up(world)
    before = await until_ready(world)
    await up(world, [environment("web", image="oci:web2")])

    async def changed() -> bool:
        found = await wishes(world)
        return [wish.environments for wish in found] != [wish.environments for wish in before]

    await world.until(changed, "the wish is another one")
    found = await until_ready(world)
    assert {spec.name for wish in found for spec in wish.environments} == {"web"}


async def test_a_host_without_templates_is_tolerated(world: World) -> None:
    await up(world, options={"hosts": "1", "templates": "0"})
    (wish,) = await until_ready(world, "unsupported")
    assert wish.reason == "its options say so"
