"""A U-Cloud with checkpoints on the fake provider, and what its tests wait for."""

from support.control import environment, manifest_of

WEB = environment("web", checkpoint={"keep": 3})
PLAIN = environment("web")


def manifest(world, wish=(WEB,), **more):
    return manifest_of(world.directory, list(wish), **more)


async def up(world, wish=(WEB,), **more):
    applied = await world.app.service.up(manifest(world, wish, **more))
    await world.ready()
    return applied


async def down(world, *, purge=False):
    service = world.app.service
    await (service.purge("test") if purge else service.down("test"))
    await world.gone()


async def document(world, name="web"):
    return await world.app.plane.state.checkpoints_of("test", name)


async def cloud(world, name="fake"):
    """The pretended world of a provider."""
    owner = await world.app.plane.state.ucloud("test")
    entry = next(entry for entry in owner.spec.providers if entry.name == name)
    return world.app.plane.pool.get("test", entry).cloud


async def until(world, true, what, name="web"):
    async def there():
        return true(await document(world, name))

    await world.until(there, what)
    return await document(world, name)


async def take(world, name="web"):
    """Ask for one, and wait until it is there; what became of it."""
    asked = await world.app.service.checkpoints.take("test", name)
    kept = await until(
        world, lambda d: d.task is not None and d.task.id == asked.id and d.task.done, "one is taken", name
    )  # fmt: skip
    return kept.task


async def restore(world, number=0, name="web", to=""):
    """Go back, and wait until it runs."""
    done = await world.app.service.restores.restore("test", name, number, to)

    async def back():
        return await world.app.plane.restoring("test", name) is None

    await world.until(back, f"{name} is restored")
    await world.ready()
    return done


async def collected(world, numbers, name="web"):
    """Until the store has these checkpoints of it, and no others."""
    pretended = await cloud(world)

    async def there():
        found = [
            number for of in pretended.checkpoints.all().values() for ee, number in of if ee == name
        ]
        return found == list(numbers)  # fmt: skip

    await world.until(there, f"{name} has {numbers} in the store")


def told(world, code):
    return [e for e in world.app.plane.events.since() if e.code == f"control.{code}"]
