"""Whether registries have the images of a manifest: found out before anything is stored."""

from supercloud.control.controllers.plane import Plane
from supercloud.control.images import source_of
from supercloud.control.manifest import refuse
from supercloud.model.errors import UserError
from supercloud.model.resources import UCloud, replica_names, split_image


async def check_registries(plane: Plane, spec: UCloud, text: str, file: str) -> None:
    """Raise for images that their registries do not have, or do not give us, at their places.

    An EE that has its image goes on with that: no registry is asked for it. One that cannot be
    reached refuses nothing: the pull is tried again until it can be.
    """
    made = {
        (item.name, item.image_of)
        for item in await plane.state.environments(spec.name)
        if item.image is not None and plane.images.complete(item.image)
    }
    wanted = {
        index: item.image
        for index, item in enumerate(spec.environments)
        if split_image(item.image)[0] == "docker"
        and any((name, source_of(item.image, "")) not in made for name in replica_names(item))
    }
    refused = await plane.images.refused(sorted(set(wanted.values())))
    errors = {
        f"environments[{index}].image": _found(image, refused[image])
        for index, image in wanted.items()
        if image in refused
    }
    if errors:
        refuse(text, file=file, errors=errors)


def _found(image: str, error: UserError) -> UserError:
    return type(error)(f"found {image!r:.200}: {error.message}", hint=error.hint)
