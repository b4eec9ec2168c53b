"""The kinds of providers there are, by the name that the manifest uses."""

from collections.abc import Callable

from supercloud.model.errors import Unsupported
from supercloud.providers.base import Provider
from supercloud.providers.context import Context

__all__ = ["FACTORIES", "Context", "make"]


def _fake(context: Context) -> Provider:
    from supercloud.providers.fake import provider  # noqa: PLC0415 - only who uses it loads it

    return provider.from_context(context)


def _lower_layer(context: Context) -> Provider:
    from supercloud.providers.lower_layer import provider  # noqa: PLC0415 - likewise

    return provider.from_context(context)


FACTORIES: dict[str, Callable[[Context], Provider]] = {
    "fake": _fake,
    "lower_layer": _lower_layer,
}


def make(context: Context) -> Provider:
    """The entry's provider object; Unsupported for an unknown kind, Invalid for bad options."""
    kind = context.entry.kind
    factory = FACTORIES.get(kind)
    if factory is None:
        known = ", ".join(sorted(FACTORIES))
        raise Unsupported(f"there is no provider of kind {kind!r:.80}; there are {known}")
    return factory(context)
