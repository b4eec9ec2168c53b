"""What the service does at weed's S3 port in its own name: buckets and what they are set to."""

import time
import urllib.parse
from collections.abc import Callable
from typing import Final
from xml.etree import ElementTree as ET

from supercloud.model.errors import BadState, Permanent, Temporary
from supercloud.services.objects.records import RESERVED, Bucket
from supercloud.services.objects.sigv4 import Credentials, call
from supercloud.services.objects.weed import Weed

_OK: Final = frozenset((200, 204))
_CONFLICT, _MISSING = 409, 404
_PROBE_S: Final = 2.0
_AT_ONCE: Final = 200  # a second or so of deleting, in one call of the service
_RELOAD_S: Final = 10.0
_XMLNS: Final = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


def ready(weed: Weed) -> bool:
    """Whether an object can be stored: the port answers before that."""
    try:
        made = _call(weed, "PUT", f"/{RESERVED}", timeout_s=_PROBE_S)[0]
        if made not in _OK | {_CONFLICT}:
            return False
        return _call(weed, "PUT", f"/{RESERVED}/ready", body=b"1", timeout_s=_PROBE_S)[0] in _OK
    except OSError:
        return False


def accepts(weed: Weed, theirs: Credentials) -> bool:
    """Whether weed knows these credentials."""
    try:
        status, _ = call(("127.0.0.1", weed.ports.s3), theirs, "GET", "/", timeout_s=_PROBE_S)
    except OSError:
        return False
    return status in _OK


def wait_for(done: Callable[[], bool]) -> None:
    """Return when it is so; Temporary."""
    deadline_s = time.monotonic() + _RELOAD_S
    while not done():
        if time.monotonic() > deadline_s:
            raise Temporary("the S3 server has not taken up the change yet")
        time.sleep(0.01)


def apply(weed: Weed, bucket: Bucket, before: Bucket | None) -> None:
    """Make a bucket, and set what it is to be; safe to repeat."""
    path = f"/{bucket.name}"
    _must(weed, "PUT", path, also=_CONFLICT)
    if bucket.versioning or before is None or before.versioning:
        status = "Enabled" if bucket.versioning else "Suspended"
        if bucket.versioning or before is not None:
            inner = f"<Status>{status}</Status>"
            _must(weed, "PUT", path, "versioning", _element("VersioningConfiguration", inner))
    if bucket.expire_days:
        _must(weed, "PUT", path, "lifecycle", _lifecycle(bucket))
    elif before is None or before.expire_days:
        _must(weed, "DELETE", path, "lifecycle", also=_MISSING)


def delete(weed: Weed, name: str) -> None:
    """Remove an empty bucket; BadState when it is not empty."""
    full = not is_empty(weed, name)
    status, answer = (_CONFLICT, b"") if full else _call(weed, "DELETE", f"/{name}")
    if status == _CONFLICT:
        raise BadState(
            f"bucket {name} is not empty", hint="delete its objects, all versions, first"
        )
    if status not in _OK | {_MISSING}:
        raise _unexpected("DELETE", status, answer)


def empty(weed: Weed, name: str) -> bool:
    """Delete some of what is in a bucket, older versions and unfinished uploads too; True: no more.

    One by one, as a client would: only so are their chunks given back.
    """
    versions, uploads = _versions(weed, name), _uploads(weed, name)
    for key, version in versions:
        _must(weed, "DELETE", f"/{name}/{key}", f"versionId={version}", also=_MISSING)
    for key, upload in uploads:
        _must(weed, "DELETE", f"/{name}/{key}", f"uploadId={upload}", also=_MISSING)
    return not versions and not uploads


def is_empty(weed: Weed, name: str) -> bool:
    """Whether there is nothing in it; weed says so of a bucket that has versions only."""
    return not _versions(weed, name) and not _uploads(weed, name)


def _versions(weed: Weed, name: str) -> list[tuple[str, str]]:
    query = f"max-keys={_AT_ONCE}&versions="
    return _listed(weed, name, query, ("Version", "DeleteMarker"), "VersionId")


def _uploads(weed: Weed, name: str) -> list[tuple[str, str]]:
    query = f"max-uploads={_AT_ONCE}&uploads="
    return _listed(weed, name, query, ("Upload",), "UploadId")


def _listed(
    weed: Weed, name: str, query: str, kinds: tuple[str, ...], identity: str
) -> list[tuple[str, str]]:
    """Key and identity of each, the identity as a query has it."""
    status, answer = _call(weed, "GET", f"/{name}", query)
    if status == _MISSING:
        return []
    if status not in _OK:
        raise _unexpected(f"GET {query}", status, answer)
    root = ET.fromstring(answer)  # noqa: S314 - weed's own words, over loopback
    found = [item for item in root if item.tag.rpartition("}")[2] in kinds]
    return [(_text(item, "Key"), urllib.parse.quote(_text(item, identity))) for item in found]


def _text(item: ET.Element, name: str) -> str:
    return next((i.text or "" for i in item if i.tag.rpartition("}")[2] == name), "")


def _lifecycle(bucket: Bucket) -> str:
    days = bucket.expire_days
    older = f"<NoncurrentDays>{days}</NoncurrentDays>"
    older = f"<NoncurrentVersionExpiration>{older}</NoncurrentVersionExpiration>"
    rule = (
        "<ID>expire</ID><Filter><Prefix></Prefix></Filter><Status>Enabled</Status>"
        f"<Expiration><Days>{days}</Days></Expiration>{older if bucket.versioning else ''}"
    )
    return _element("LifecycleConfiguration", f"<Rule>{rule}</Rule>")


def _element(name: str, inner: str) -> str:
    return f"<{name} {_XMLNS}>{inner}</{name}>"


def _must(
    weed: Weed, method: str, path: str, query: str = "", text: str = "", *, also: int = 0
) -> None:
    status, answer = _call(weed, method, path, query, text.encode())
    if status not in _OK | {also}:
        raise _unexpected(f"{method} {query}", status, answer)


def _unexpected(what: str, status: int, answer: bytes) -> Permanent:
    return Permanent(f"the S3 server answered {what} with {status}: {answer[:300]!r}")


def _call(
    weed: Weed,
    method: str,
    path: str,
    query: str = "",
    body: bytes = b"",
    *,
    timeout_s: float = 20.0,
) -> tuple[int, bytes]:
    address = ("127.0.0.1", weed.ports.s3)
    return call(address, weed.root, method, path, query, body, timeout_s=timeout_s)
