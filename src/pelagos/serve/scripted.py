"""An engine that writes a script instead of thinking: clients and servers are tried against it without a model.

A script is a JSON file: `{"rules": [{"when": REGEX, "reply": TEXT, ...}], "token_delay_ms": 0}`. The first rule whose
`when` is found in the prompt's text (absent: always) answers; `\\g<name>` in a reply stands for a group of its match. A
spelled special token in a reply is that token. A rule may also have `token_delay_ms`, `first_delay_ms` and `fail` (an
error in place of the end).
"""

import dataclasses
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pelagos.chat.tokenizer import Tokenizer
from pelagos.checkpoint import resolve_model
from pelagos.config import ModelConfig
from pelagos.engine import LLM, EngineStats, SamplingParams, Stream
from pelagos.engine.api import check_context
from pelagos.engine.output import TextStream
from pelagos.engine.sampler import Pick
from pelagos.errors import CapacityError, ConfigError, PelagosError, RequestError

PAGE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Reply:
    """What one prompt is answered with."""

    text: str
    token_s: float = 0.0
    first_s: float = 0.0
    fail: str | None = None


def read_script(path: Path) -> Callable[[str], Reply]:
    """Return the rules of a script file as a function from a prompt's text; raises ConfigError for a wrong file."""
    try:
        script = json.loads(path.read_text(encoding="utf-8"))
        rules = [(re.compile(rule.get("when", ""), re.DOTALL), str(rule["reply"]), rule) for rule in script["rules"]]
        usual = float(script.get("token_delay_ms", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        form = '{"rules": [{"when": REGEX, "reply": TEXT}], "token_delay_ms": 0}'
        raise ConfigError(f"{path}: not a script ({type(error).__name__}: {error}); expected {form}") from None

    def reply(prompt: str) -> Reply:
        for when, text, rule in rules:
            if found := when.search(prompt):
                token_ms, first_ms = rule.get("token_delay_ms", usual), rule.get("first_delay_ms", 0)
                text = re.sub(r"\\g<(\w+)>", lambda name, found=found: found[name[1]] or "", text)
                return Reply(text, token_ms / 1e3, first_ms / 1e3, rule.get("fail"))
        raise RequestError("no rule of the script meets this prompt")

    return reply


class ScriptedEngine:
    """An `Engine` that answers each prompt by `reply`, then the end token; each stream has a thread that writes it.

    It counts prefixes it has read or written, by user and in pages of 128 tokens, as cached. `fail` is raised in place
    of the next token of every stream; `calls` holds the options of each submit.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, reply: Callable[[str], Reply | str], *, delay: float = 0
    ) -> None:
        """`delay` is the seconds a token takes where the reply names none."""
        self.config, self.delay = config, delay
        self.fail: Exception | None = None
        self.calls: list[dict[str, Any]] = []
        self._tokenizer, self._reply = tokenizer, reply
        self._cuts = re.compile(f"({'|'.join(map(re.escape, tokenizer.special_tokens.values()))})")
        self._names = itertools.count(1)
        self._running: dict[Stream, threading.Thread] = {}
        self._lock = threading.Lock()
        self._seen: set[int] = set()
        self._stats = EngineStats()
        self._closed = False

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, on_step: Callable[[], None] | None = None,
        user_id: str = "", **options: Any,
    ) -> Stream:  # fmt: skip
        """See `Engine.submit`; deadlines and priorities are only noted in `calls`."""
        check_context(self.config.max_position_embeddings, len(prompt_ids), params.max_tokens)
        reply, eos = self._reply(self._tokenizer.decode(prompt_ids)), self.config.eos_token_id
        reply = Reply(reply, self.delay) if isinstance(reply, str) else reply
        text, tokens = TextStream(self._tokenizer.stream_decoder(), params, eos), [*self._spell(reply.text), eos]
        keys = _page_keys(prompt_ids[:-1], user_id)
        with self._lock:
            if self._closed:
                raise CapacityError("the engine is closed and takes no more requests")
            self.calls.append({"user_id": user_id, **options})
            stream = Stream(f"req-{next(self._names)}", on_step=on_step)
            seen = itertools.takewhile(self._seen.__contains__, keys)
            stream.cached_tokens = PAGE_TOKENS * len(list(seen))
            self._seen.update(keys)
            self._stats.prompt_tokens += len(prompt_ids)
            self._stats.cached_tokens += stream.cached_tokens
            work = (stream, tokens, text, reply, list(prompt_ids), user_id)
            self._running[stream] = threading.Thread(target=self._write, args=work, daemon=True)
            self._running[stream].start()
        return stream

    def abort(self, request_id: str) -> None:
        """Cancel a request."""
        with self._lock:
            for stream in self._running:
                if stream.request_id == request_id:
                    stream.cancel()

    def stats(self) -> EngineStats:
        """Return the counters; there are no pages."""
        with self._lock:
            return dataclasses.replace(self._stats, requests_running=len(self._running))

    def close(self) -> None:
        """Cancel everything and end the threads."""
        with self._lock:
            self._closed = True
            running = dict(self._running)
        for stream, thread in running.items():
            stream.cancel()
            thread.join()

    def _spell(self, text: str) -> Iterator[int]:
        for at, part in enumerate(self._cuts.split(text)):
            yield from [self._tokenizer.id(part)] if at % 2 else self._tokenizer.encode(part)

    def _write(
        self, stream: Stream, tokens: Sequence[int], text: TextStream, reply: Reply, ids: list[int], user_id: str
    ) -> None:
        due, error = time.monotonic() + reply.first_s, None
        for token in tokens:
            due += reply.token_s
            while (wait := due - time.monotonic()) > 0 and not stream.is_cancelled:
                time.sleep(min(wait, 0.05))  # a cancelled stream is noticed meanwhile
            error = self.fail
            if token == self.config.eos_token_id and reply.fail is not None:
                error = error or PelagosError(reply.fail)
            if error is not None or stream.is_cancelled:
                break
            ids.append(token)
            steps = text.push([Pick(token, 0.0)])
            with self._lock:
                self._stats.generated_tokens += 1
                if text.finish_reason is not None:
                    self._seen.update(_page_keys(ids, user_id))
            for step in steps:
                stream.put(step)
            if text.finish_reason is not None:
                break
        with self._lock:
            self._stats.requests_done += 1
            del self._running[stream]
        stream.close(None if error else text.finish_reason or "cancelled", error)


def _page_keys(ids: Sequence[int], user_id: str) -> list[int]:
    """Return a key for each whole page of a user's token ids, which all before it go into."""
    keys = [hash(user_id)]
    for end in range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS):
        keys.append(hash((keys[-1], *ids[end - PAGE_TOKENS : end])))
    return keys[1:]


def scripted_llm(model: str, script: Path, *, generation: str | None = None) -> LLM:
    """Return an LLM with the tokenizer and configuration of `model` whose answers come from a script file."""
    path = resolve_model(model)
    config, tokenizer = ModelConfig.load(path), Tokenizer.load(path)
    return LLM.over(ScriptedEngine(config, tokenizer, read_script(script)), config, tokenizer, generation=generation)
