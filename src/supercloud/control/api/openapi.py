"""The OpenAPI document, generated from the declared routes."""

import re
from dataclasses import fields
from typing import Any

import msgspec

from supercloud import __version__
from supercloud.control.api.declare import Nothing, Route
from supercloud.model.errors import STATUS

_REF = "#/components/schemas/{name}"


def document(routes: tuple[Route, ...]) -> dict[str, Any]:
    """OpenAPI 3.1, as JSON-able data."""
    described = [item for route in routes for item in (route.params, route.result)]
    types = [item for item in described if item is not None and item is not Nothing]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = {id(item): schema for item, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "supercloud control plane", "version": __version__},
        "paths": paths,
        "components": {"schemas": dict(components) | {"Error": _ERROR}},
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string", "enum": sorted(STATUS)},
                "message": {"type": "string"},
                "hint": {"type": "string"},
                "where": {"type": "string"},
                "details": {"type": "object"},
            },
        }
    },
}


def _operation(route: Route, by_type: dict[int, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _name(route),
        "summary": route.doc,
        "parameters": _parameters(route),
        "responses": {
            "101" if route.stream == "websocket" else "200": _answer(route, by_type),
            "default": {
                "description": "an error",
                "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}},
            },
        },
    }
    if route.method == "POST" and route.params is not Nothing:
        schema = by_type[id(route.params)]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _name(route: Route) -> str:
    words = re.findall(r"[a-z0-9.]+", route.path.removeprefix("/v1/"))
    return "_".join([route.method.lower(), *words]).replace(".", "_")


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    if route.method == "GET" and route.params is not Nothing:
        schema = msgspec.json.schema(route.params)
        properties = schema["$defs"][route.params.__name__]["properties"]
        found += [
            {"name": item.name, "in": "query", "schema": properties[item.name]}
            for item in fields(route.params)
        ]
    return found


def _answer(route: Route, by_type: dict[int, Any]) -> dict[str, Any]:
    if route.stream == "websocket":
        return {"description": "a WebSocket"}
    if route.stream:
        return {"description": "a stream", "content": {route.stream: {}}}
    schema = {} if route.result is None else by_type[id(route.result)]
    return {"description": "done", "content": {"application/json": {"schema": schema}}}
