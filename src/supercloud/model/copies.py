"""Volumes that are copies of others: part of the resources of a U-Cloud (``model.resources``)."""

from dataclasses import dataclass

from supercloud.model.rules import SHORT_LABEL, SHORT_NAME, Rule, declared

SNAPSHOT_NAME = r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Clone:
    """What a volume begins as: a copy of a snapshot, made once, under a key of its own."""

    of: str = declared(
        Rule(
            doc="a volume that there is when the clone is made, of the same size and host",
            pattern=SHORT_NAME,
            wanted=SHORT_LABEL,
        )
    )
    snapshot: str = declared(
        Rule(doc="its snapshot (`supercloud volumes snapshot`)", pattern=SNAPSHOT_NAME)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """What a volume is a backup of. It has a key of its own, and nothing uses it.

    The first backup copies all, later ones what has changed since. After each one a snapshot can be
    taken of it, and another volume can begin as a clone of that.
    """

    of: str = declared(
        Rule(
            doc="another volume of this manifest, of the same size; both are on one host",
            pattern=SHORT_NAME,
            wanted=SHORT_LABEL,
        )
    )
    every_s: int = declared(
        Rule(
            doc="how often; if not given once, and when `supercloud volumes backup` asks",
            key="every",
            duration=True,
            ge=10,
            le=30 * 86400,
            example="1h",
        ),
        0,
    )
