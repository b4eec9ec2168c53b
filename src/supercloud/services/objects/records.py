"""What the service keeps of itself, in its own journal: buckets and who may use them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from supercloud.model.errors import Invalid
from supercloud.services.objects.requests import BUCKET
from supercloud.services.objects.weed import credentials, identity
from supercloud.wire.portal import Request

MAX_BUCKETS: Final = 256
MAX_USERS: Final = 256
MAX_EXPIRE_DAYS: Final = 3650
RESERVED: Final = "supercloud-ready"
_ACTIONS: Final = {
    "read": ("Read", "List"),
    "write": ("Read", "List", "Write", "Tagging"),
}


@dataclass(frozen=True, slots=True)
class Bucket:
    """As it was applied last. ``expire_days`` 0: never."""

    name: str
    quota_bytes: int
    versioning: bool = False
    expire_days: int = 0


@dataclass(frozen=True, slots=True)
class User:
    """Whoever has credentials: ``buckets`` to ``read`` or ``write``; a new generation, new keys."""

    name: str
    buckets: dict[str, str]
    generation: int = 1


@dataclass(slots=True)
class Records:
    """All of it."""

    buckets: dict[str, Bucket] = field(default_factory=dict)
    users: dict[str, User] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """For the journal."""
        rows = [[asdict(row) for row in t.values()] for t in (self.buckets, self.users)]
        return json.dumps(dict(zip(("buckets", "users"), rows, strict=True))).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Records":
        """From the journal, which vouches for it."""
        rows = json.loads(data) if data else {"buckets": [], "users": []}
        return cls(
            {row["name"]: Bucket(**row) for row in rows["buckets"]},
            {row["name"]: User(**row) for row in rows["users"]},
        )

    def identities(self, secret: bytes) -> Iterator[dict[str, Any]]:
        """Rows for weed."""
        for user in self.users.values():
            actions = [
                f"{action}:{bucket}"
                for bucket, access in user.buckets.items()
                for action in _ACTIONS[access]
            ]
            yield identity(identity_name(user.name), credentials(secret, key_name(user)), actions)


def identity_name(user_name: str) -> str:
    """A user's name at weed, where root has one as well."""
    return f"user-{user_name}"


def key_name(user: User) -> str:
    """What a user's credentials follow from."""
    return f"user {user.name} {user.generation}"


def bucket_of(request: Request) -> Bucket:
    """The bucket that a request describes; Invalid."""
    versioning = request.untrusted.get("versioning", False)
    if not isinstance(versioning, bool):
        raise Invalid("versioning must be true or false", where="versioning")
    days = (
        request.number("expire_days", 0, MAX_EXPIRE_DAYS)
        if "expire_days" in request.untrusted
        else 0
    )
    return Bucket(bucket_name(request), request.number("quota_bytes"), versioning, days)


def bucket_name(request: Request) -> str:
    """The name in a request; Invalid."""
    name = request.name("name")
    if not BUCKET.fullmatch(name) or name == RESERVED:
        raise Invalid(f"{name!r} cannot be a bucket's name (3 to 63 of a-z, 0-9, -)", where="name")
    return name


def user_of(request: Request, records: Records) -> User:
    """The user that a request describes, of buckets that are there; Invalid."""
    untrusted = request.untrusted.get("buckets")
    if not isinstance(untrusted, dict) or len(untrusted) > MAX_BUCKETS:
        raise Invalid("buckets must say read or write for each", where="buckets")
    for name, access in untrusted.items():
        if name not in records.buckets or not isinstance(access, str) or access not in _ACTIONS:
            raise Invalid(
                f"{str(name)[:64]!r} is no bucket, or not to read or write", where="buckets"
            )
    generation = request.number("generation", 1) if "generation" in request.untrusted else 1
    return User(request.name("name"), dict(untrusted), generation)
