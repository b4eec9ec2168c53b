"""A U-Cloud with volumes on the fake provider, and what its tests wait for."""

from support.control import environment, manifest_of

VOLUMES = [{"name": "data", "size": "64MiB"}]
DATA = environment("web", volumes=[{"name": "data", "path": "/data"}])
PLAIN = environment("web")


def manifest(world, wish=(DATA,), volumes=VOLUMES, **more):
    return manifest_of(world.directory, list(wish), volumes=volumes, **more)


async def up(world, wish=(DATA,), volumes=VOLUMES, **more):
    applied = await world.app.service.up(manifest(world, wish, volumes, **more))
    await world.ready()
    return applied


async def down(world, *, purge=False):
    service = world.app.service
    await (service.purge("test") if purge else service.down("test"))
    await world.gone()


async def host(world):
    """The pretended host's side of volumes."""
    (volume, *_) = await world.app.plane.state.volumes("test")
    return world.app.plane.pool.get("test", volume.provider).cloud.volumes


async def document(world, name="data"):
    return await world.app.plane.state.volume("test", name)


async def reaches(world, state, name="data"):
    async def there():
        volume = await document(world, name)
        return volume is not None and volume.state == state

    await world.until(there, f"volume {name} is {state}")
    return await document(world, name)


async def sealed(world, name="data"):
    """Until the control plane knows the host's present seal."""
    pretended = await host(world)

    async def known():
        return (await document(world, name)).seal == pretended.volumes[name].seal

    await world.until(known, "the seal is known")


def told(world, code):
    return [e for e in world.app.plane.events.since() if e.code == f"control.volume.{code}"]


async def tells(world, code):
    """Until an event tells of it, which comes after it is written down; all that did."""

    async def said():
        return bool(told(world, code))

    await world.until(said, f"an event tells of {code}")
    return told(world, code)


async def spec_of(world, name="web"):
    """The EE as its platform was told of it."""
    (platform,) = await world.app.plane.state.platforms("test")
    machine = world.app.plane.pool.get("test", platform.wish.provider).cloud.platforms
    return next(spec for spec in machine[platform.name].specs if spec.name == name)


async def vanishes(world):
    """Until nobody has the volume any more."""

    async def gone():
        return await document(world) is None

    await world.until(gone, "the volume is gone")
