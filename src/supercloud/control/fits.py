"""What the providers say that a manifest's author should hear at its place in the file."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields

from supercloud.control.manifest import where
from supercloud.control.offers import Offer
from supercloud.model.errors import Invalid, UserError
from supercloud.model.resources import UCloud
from supercloud.model.rules import manifest_key
from supercloud.model.sizes import format_size

PLACES = tuple(manifest_key(field) for field in fields(UCloud))


def check_sizes(spec: UCloud, offers: Sequence[Offer]) -> None:
    """Raise Invalid for a platform larger than any host is, be it empty.

    What is only too full at the moment is for the placement to say.
    """
    hosts = [host for offer in offers for host in offer.hosts]
    if not hosts or any(offer.unreachable for offer in offers):
        return
    memory_bytes = max(host.memory_total_bytes for host in hosts)
    if spec.platform.memory_bytes > memory_bytes:
        _too_large("memory", format_size(spec.platform.memory_bytes), format_size(memory_bytes))
    disk_bytes = max(host.disk_total_bytes for host in hosts)
    if spec.platform.scratch_bytes > disk_bytes:
        _too_large("scratch", format_size(spec.platform.scratch_bytes), format_size(disk_bytes))
    cpus = max(host.cpus_total for host in hosts)
    if spec.platform.cpus > cpus:
        _too_large("cpus", str(spec.platform.cpus), f"{cpus:g}")


def _too_large(field: str, found: str, most: str) -> None:
    message = f"found {found}, allowed is at most {most}, what the largest host allows"
    raise Invalid(message, where=f"platform.{field}")


@contextlib.contextmanager
def at_its_place(text: str, file: str) -> Iterator[None]:
    """Errors at a field (``platform.memory``, ``environments.NAME``) get file, line and column."""
    try:
        yield
    except UserError as error:
        if error.where.partition(".")[0] in PLACES:
            error.where = where(text, file=file, path=error.where)
        raise
