"""A store's rows as one stream of JSON lines, to be adopted by another store."""

import base64
import binascii
import json
from collections.abc import Iterable
from typing import TextIO

from supercloud.control.store.base import Store
from supercloud.model.errors import Exists, Invalid

FORMAT = 1
_HINT = "export again: this file was cut or changed"
LEFT_OUT = ("lease/",)  # a lease is somebody's who is not here


async def export(store: Store, to: TextIO) -> int:
    """Write every row to ``to``; how many."""
    rows, revision = await store.list("")
    rows = [row for row in rows if not row.key.startswith(LEFT_OUT)]
    header = {"format": FORMAT, "revision": revision, "rows": len(rows)}
    to.write(json.dumps(header) + "\n")
    for row in rows:
        value = base64.b64encode(row.value).decode()
        to.write(json.dumps({"key": row.key, "value": value}) + "\n")
    return len(rows)


async def adopt(store: Store, untrusted_lines: Iterable[str]) -> int:
    """Put the rows of an export into an empty store; how many.

    Everything is checked before the first row is written. Raises Exists when the store is not
    empty, Invalid when the lines are not a whole export.
    """
    if (await store.list(""))[0]:
        raise Exists("the store is not empty", hint="adopt into a fresh state directory")
    rows = _parse(list(untrusted_lines))
    for key, value in rows.items():
        await store.put_if_version(key, value, 0)
    return len(rows)


def _parse(lines: list[str]) -> dict[str, bytes]:
    try:
        header, *bodies = [json.loads(line) for line in lines if line.strip()]
        rows = {str(body["key"]): base64.b64decode(body["value"], validate=True) for body in bodies}
        if header["format"] != FORMAT:
            raise Invalid(
                f"an export of format {header['format']!r:.20}; known is {FORMAT}",
                hint="adopt it with the version of supercloud that wrote it",
            )
        wanted = header["rows"]
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise Invalid("these lines are not an export of a store", hint=_HINT) from error
    if len(rows) != wanted:
        raise Invalid(f"the export is not whole: {len(rows)} of {wanted} rows", hint=_HINT)
    return rows
