"""A route declared once: dispatch, checks of its parameters, and its part of the API document."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web

from supercloud.control.api.access import Caller
from supercloud.model.errors import Invalid
from supercloud.wire.codec import decode

MAX_BODY_BYTES = 4 << 20
MAX_QUERY_CHARS = 8192
Params = TypeVar("Params")


@dataclass(frozen=True, slots=True)
class Nothing:
    """No parameters."""


@dataclass(slots=True)
class Asked(Generic[Params]):
    """A request as its handler sees it; ``params`` are checked, ``at`` are the path's parts."""

    request: web.Request
    caller: Caller
    params: Params
    at: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One method and path. ``params`` come from the body (POST) or the query (GET).

    ``result`` is answered as JSON, unless ``stream`` says what comes instead (``websocket``, or a
    content type).
    """

    method: str
    path: str
    doc: str
    params: type = Nothing
    result: Any = None
    stream: str = ""
    handle: Callable[[Asked[Any]], Awaitable[Any]]


async def params_of(route: Route, request: web.Request) -> Any:
    """The request's parameters as ``route.params``. Raises Invalid."""
    if route.method == "POST":
        if route.params is Nothing:
            return Nothing()
        return decode(route.params, await _json(request), "")
    if len(request.query_string) > MAX_QUERY_CHARS:
        raise Invalid(f"the query is longer than {MAX_QUERY_CHARS} characters")
    return decode(route.params, _from_query(route.params, request), "query")


async def _json(request: web.Request) -> Any:
    try:
        return msgspec.json.decode(await request.read())
    except msgspec.MsgspecError as error:
        raise Invalid(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise Invalid("the body is nested too deeply") from error


def _from_query(cls: type, request: web.Request) -> dict[str, Any]:
    kinds = {item.name: item.type for item in fields(cls)} if is_dataclass(cls) else {}
    return {name: _scalar(kinds.get(name), text) for name, text in request.query.items()}


def _scalar(kind: Any, untrusted: str) -> Any:
    """The text as what the parameter is; one that cannot be stays a text, and is refused."""
    if kind is bool:
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        return words.get(untrusted.lower(), untrusted)
    if kind is int and len(untrusted) < 20 and untrusted.lstrip("-").isdecimal():
        return int(untrusted)
    return untrusted
