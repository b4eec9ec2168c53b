"""Who is enrolled at this host and with what quota: a file of the multiplexing's own."""

import binascii
import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass

from supercloud.model.errors import Invalid
from supercloud.wire.codec import decode, encode
from supercloud.wire.quota import Quota

MAX_CA_BYTES = 32 << 10
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class User:
    """An enrolled user; ``ca_pem`` is the root that its control plane's certificates come from."""

    name: str
    ca_pem: str
    quota: Quota

    @property
    def ca_sha256(self) -> str:
        """Names the root on listings."""
        return hashlib.sha256(self.ca_pem.encode()).hexdigest()


def check_user_name(untrusted: str) -> str:
    """A name is part of a server name and of the core's names; Invalid."""
    if not _LABEL.fullmatch(untrusted):
        message = f"{untrusted!r:.80} is no user's name (a-z, 0-9, -; at most 48)"
        raise Invalid(message, where="user")
    return untrusted


def check_ca(untrusted: str) -> str:
    """One certificate in PEM; Invalid."""
    text = untrusted.strip() + "\n"
    if len(text) > MAX_CA_BYTES or text.count("-----BEGIN CERTIFICATE-----") != 1:
        raise Invalid("a user's CA is one certificate in PEM", where="ca")
    if "PRIVATE KEY" in text:
        raise Invalid("this is a private key; give the certificate only", where="ca")
    body = text.partition("-----BEGIN CERTIFICATE-----")[2].partition("-----END CERTIFICATE-----")
    try:
        der = binascii.a2b_base64(body[0], strict_mode=False)
    except binascii.Error as error:
        raise Invalid("a user's CA is one certificate in PEM", where="ca") from error
    if not body[1] or not der.startswith(b"\x30"):
        raise Invalid("a user's CA is one certificate in PEM", where="ca")
    return text


class UserStore:
    """The users, saved whole at each change; ``leaving`` are no more, but the drivers hold theirs.

    That somebody's data may go is written down: no missing file and no domain's end says so.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.users: dict[str, User] = {}
        self.leaving: set[str] = set()
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            document = json.load(file)
            self.leaving = set(document.get("leaving", ()))
            for item in document["users"]:
                quota = decode(Quota, item["quota"], "quota", ignore_unknown=True)
                self.users[item["name"]] = User(item["name"], item["ca_pem"], quota)

    def put(self, user: User) -> None:
        """Add or replace."""
        self._save({**self.users, user.name: user}, self.leaving)

    def remove(self, name: str) -> None:
        """No longer a user, but ``leaving``."""
        others = {other: user for other, user in self.users.items() if other != name}
        self._save(others, self.leaving | {name})

    def gone(self, name: str) -> None:
        """The drivers have forgotten it too."""
        self._save(self.users, self.leaving - {name})

    def _save(self, users: dict[str, User], leaving: set[str]) -> None:
        """It is so once it is written, and not before."""
        listed = [
            {"name": user.name, "ca_pem": user.ca_pem, "quota": encode(user.quota)}
            for user in users.values()
        ]
        part = f"{self._path}.part"
        with open(part, "w", encoding="utf-8") as file:
            json.dump({"version": 1, "users": listed, "leaving": sorted(leaving)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)
        self.users, self.leaving = users, leaving
