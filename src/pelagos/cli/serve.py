"""`pelagos serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def serve(
    model: Annotated[str, typer.Option(help="Bundled name, checkpoint directory or cached hub id.")] = "nano",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    mode: Annotated[str, typer.Option(help="Number mode: reference or released.")] = "reference",
    device: Annotated[str | None, typer.Option(help="Device of the weights, such as cpu or cuda.")] = None,
    generation: Annotated[str | None, typer.Option(help="Prompts: preview or 0731 (default: the model's).")] = None,
    max_tokens: Annotated[int, typer.Option(help="Answer length of requests that name none.")] = 8192,
    max_requests: Annotated[int, typer.Option(help="Requests computed side by side; the rest wait.")] = 16,
    kv_bytes: Annotated[int | None, typer.Option(help="Memory of the caches (default: by what is free).")] = None,
    disk_dir: Annotated[Path | None, typer.Option(help="Directory in which prefixes outlive the server.")] = None,
    engine: Annotated[str, typer.Option(help="local, or scripted:FILE.json, which only plays answers.")] = "local",
) -> None:
    """Serve a model over HTTP: POST /v1/chat/completions, GET /v1/models, /health, and a page at /."""
    from pelagos.engine import LLM
    from pelagos.serve import Card, run
    from pelagos.serve.scripted import scripted_llm

    def load() -> LLM:
        if engine.startswith("scripted:"):
            return scripted_llm(model, Path(engine.removeprefix("scripted:")), generation=generation)
        sizes: dict[str, Any] = {"max_requests": max_requests, "kv_bytes": kv_bytes, "disk_dir": disk_dir}
        return LLM(model, mode=mode, device=device, generation=generation, **sizes)

    run(load, card=Card(model=Path(model).resolve().name, max_tokens=max_tokens), host=host, port=port)
