"""What is read from the server: probes, statistics, models, and the OpenAPI document that lists all of it."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from pelagos.serve.protocols import APIS

if TYPE_CHECKING:
    from pelagos.serve.app import App


def find_read(path: str) -> Callable[[App], tuple[int, Any]] | None:
    """Return what answers GET of a path, without prefixes, with a status and a body; None where nothing does."""
    name = path.removeprefix("/models/")
    if name != path:
        return lambda app: (200, _model(app, name))
    return READS[path][1] if path in READS else None


def _state(app: App) -> dict[str, Any]:
    return {"status": app.status, "model": app.card.model, "context_length": app.card.context_length}


def _model(app: App, name: str | None = None) -> dict[str, Any]:
    card = app.card
    if name not in (None, card.model):
        raise HTTPException(404, f"model {name!r} is not here; this server has {card.model!r}")
    about = {"id": card.model, "object": "model", "created": 0, "owned_by": "pelagos"}
    return about | {"context_length": card.context_length}


def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document; the schemas of requests are those beside the protocols."""
    answers = {"200": {"description": "As asked."}, "default": {"description": "An error object of the protocol."}}
    paths: dict[str, Any] = {}
    for path, (about, _) in READS.items():
        paths[path] = {"get": {"summary": about, "responses": answers}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    found = {"summary": "The model of that name.", "parameters": [name], "responses": answers}
    paths["/models/{name}"] = {"get": found}
    for api in APIS:
        for path in (*api.paths, *api.count_paths):
            body = {"required": True, "content": {"application/json": {"schema": api.schema}}}
            paths[path] = {"post": {"summary": api.summary, "requestBody": body, "responses": answers}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pelagos", "version": "1", "description": "Every path answers with /v1 and without."},
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
        "security": [{}, {"key": []}, {"header": []}],
    }


def listing() -> bytes:
    """Return the document as a page to read: each path, what it is for, and the fields of its body."""
    rows = []
    for path, ways in document()["paths"].items():
        for method, about in ways.items():
            content = about.get("requestBody", {}).get("content", {}).get("application/json", {})
            fields = ", ".join(content.get("schema", {}).get("properties", ()))
            cells = (f"{method.upper()} {path}", about["summary"], fields)
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "<!doctype html><html lang=en><meta charset=utf-8><title>Pelagos API</title><h1>Pelagos API</h1>"
    return f'{head}<p><a href="/openapi.json">openapi.json</a></p><table>{"".join(rows)}</table></html>'.encode()


READS: dict[str, tuple[str, Callable[[App], tuple[int, Any]]]] = {
    "/health": ("What the server is doing; it lives.", lambda app: (200, _state(app))),
    "/ready": (
        "200 once the model is there and has answered once; 503 before, and while the server ends.",
        lambda app: (200 if app.status == "ready" else 503, _state(app)),
    ),
    "/stats": (
        "The engine's statistics, and how fast they grow.",
        lambda app: (200, _state(app) | app.metrics.report(app.traffic.in_flight)),
    ),
    "/metrics": ("The same in the Prometheus text format.", lambda app: (200, app.metrics.text(app.traffic.in_flight))),
    "/models": ("The models served: one.", lambda app: (200, {"object": "list", "data": [_model(app)]})),
    "/openapi.json": ("This document.", lambda app: (200, document())),
    "/docs": ("This document as a page.", lambda app: (200, listing())),
}
