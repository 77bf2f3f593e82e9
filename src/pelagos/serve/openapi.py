"""The OpenAPI document of the server, and a page that lists it."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

from pelagos.serve.ask import Api

_READ = {
    "/health": "Whether the process lives, and what it is doing.",
    "/ready": "200 once the model is loaded and has answered once; 503 before, and while the server ends.",
    "/stats": "The engine's statistics and rates.",
    "/metrics": "The same in the Prometheus text format.",
    "/v1/models": "The models served: one.",
    "/v1/models/{id}": "One model.",
}


def document(apis: Iterable[Api]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document; request schemas are those beside the protocols."""
    failed = {
        "description": "An error object of the protocol.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
    paths: dict[str, Any] = {}
    for path, about in _READ.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        answers = {"200": {"description": "As asked.", "content": {kind: {}}}, "default": failed}
        paths[path] = {"get": {"summary": about, "responses": answers}}
        if "{id}" in path:
            paths[path]["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    for api in apis:
        for path in (*api.paths, *api.count_paths):
            whole: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
            answer = {"description": "The answer.", "content": whole}
            if path in api.paths:
                whole["text/event-stream"] = {"schema": {"type": "string"}}
            body = {"required": True, "content": {"application/json": {"schema": api.schema}}}
            responses = {"200": answer, "default": failed}
            paths[path] = {"post": {"summary": api.summary, "requestBody": body, "responses": responses}}
    schemes = {
        "key": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pelagos", "version": "1", "description": "Paths also answer without /v1."},
        "paths": paths,
        "components": {"securitySchemes": schemes},
        "security": [{}, {"key": []}, {"x-api-key": []}],
    }


def listing(apis: Iterable[Api]) -> str:
    """Return the document as a page without scripts, styles or anything from elsewhere."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Pelagos: HTTP interface</title><h1>HTTP interface</h1>"
    ]
    for path, verbs in document(apis)["paths"].items():
        for verb, what in verbs.items():
            if verb != "parameters":
                parts.append(f"<h2>{verb.upper()} {html.escape(path)}</h2><p>{html.escape(what['summary'])}</p>")
                if body := what.get("requestBody"):
                    schema = json.dumps(body["content"]["application/json"]["schema"], indent=1)
                    parts.append(f"<details><summary>Request body</summary><pre>{html.escape(schema)}</pre></details>")
    return "".join([*parts, '<p><a href="openapi.json">openapi.json</a></html>'])
