"""Raw completions: text goes on from a prompt, or between a prompt and a suffix (fill in the middle)."""

from itertools import accumulate
from typing import Any

from pelagos.chat.parser import Event
from pelagos.errors import RequestError
from pelagos.serve.answer import Answer
from pelagos.serve.ask import Ask, Card
from pelagos.serve.protocols import wire
from pelagos.serve.protocols.chat import ChoiceWriter

_MAX_TOKENS = 4_096  # of the official API; here the default too


class CompletionsWriter(ChoiceWriter):
    """text_completion objects, one at the end or one for each piece of text."""

    def __init__(self, ask: Ask, answer: Answer, card: Card) -> None:
        super().__init__(ask, answer, card)
        self._offset, self._repeats = 0, ask.echo and not ask.suffix
        self._frame["object"] = "text_completion"

    def open(self) -> list[str]:
        return [self._chunk(self._prompt())] if self._ask.echo else []

    def push(self, event: Event) -> list[str]:
        return [self._chunk(event.text)] if event.kind == "content" else []

    def close(self) -> list[str]:
        last = wire.frame(self._frame | {"choices": [], "usage": self._usage()})
        return [self._chunk("", self._reason), *([last] if self._wants_usage else []), wire.DONE]

    def whole(self) -> dict[str, Any]:
        text = (self._prompt() if self._ask.echo else "") + self._answer.message["content"]
        return self._frame | {"choices": [self._choice(text, self._reason)], "usage": self._usage()}

    def _prompt(self) -> str:
        prompt = self._ask.prompt or ""
        return prompt if isinstance(prompt, str) else self._answer.tokenizer.decode(prompt)

    def _chunk(self, text: str, reason: str | None = None) -> str:
        chunk = self._frame | {"choices": [self._choice(text, reason)]}
        if self._wants_usage or reason is not None:
            chunk["usage"] = None if reason is None or self._wants_usage else self._usage()
        return wire.frame(chunk)

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": reason, "logprobs": self._logprobs()}

    def _logprobs(self) -> dict[str, Any] | None:
        """Log-probabilities of the tokens since the last call; at first the prompt's too, if it is repeated."""
        if self._ask.logprobs is None:
            return None
        answer, picks = self._answer, list[tuple[int, float | None, Any]](p[1:] for p in self._new_logprobs())
        if self._repeats:
            self._repeats = False
            known = list(zip(answer.prompt_ids, answer.stream.prompt_logprobs or (), strict=False))
            skipped = isinstance(self._ask.prompt, str) and known and known[0][0] in answer.tokenizer.special_tokens
            picks = [*((*each, ()) for each in known[1 if skipped else 0 :]), *picks]
        told = wire.spelled(answer.tokenizer, picks)
        ends = list(accumulate((len(each["token"]) for each in told), initial=self._offset))
        self._offset = ends[-1]
        return {
            "tokens": [each["token"] for each in told],
            "token_logprobs": [each["logprob"] for each in told],
            "top_logprobs": [{top["token"]: top["logprob"] for top in each["top_logprobs"]} or None for each in told],
            "text_offset": ends[:-1],
        }


class Completions(wire.Api):
    """`POST /v1/completions`."""

    summary = "Completion of raw text, or of the middle between a prompt and a suffix"
    paths = ("/v1/completions",)
    writer = CompletionsWriter
    content = "prompt"
    required = ("prompt",)
    fields = {  # noqa: RUF012
        "prompt": {"type": ["string", "array"]},
        "suffix": wire.TEXT,
        "max_tokens": wire.TOKENS,
        "stop": {"type": ["string", "array"]},
        "echo": wire.BOOLEAN,
        "logprobs": {**wire.LOGPROBS, "type": ["integer", "boolean"]},  # some clients send chat's form
        "n": {"type": "integer"},
        "stream_options": wire.OBJECT,
        **wire.COMMON,
    }

    def read(self, body: dict[str, Any], card: Card) -> Ask:
        """Return with Ask.options `usage`: whether a stream ends with a chunk of nothing but usage."""
        wire.check(body, self.fields)
        logprobs, asked = body.get("logprobs"), body.get("max_tokens")
        named = {} if type(logprobs) is not int else {"logprobs": True, "top_logprobs": logprobs}
        wire.check_settings({**body, "logprobs": None} | named, card)
        if card.strict:
            probe = {key: body[key] for key in ("model", "stream", "stream_options") if key in body}
            message = {"role": "user", "content": ""}
            wire.converted("ChatCompletionRequest", probe | {"messages": [message]}, card, official=True)
        if card.strict and asked and asked > _MAX_TOKENS:
            raise RequestError(f"Invalid max_tokens value, the valid range of max_tokens is [1, {_MAX_TOKENS}]")
        limit = min(asked, wire.MAX_TOKENS) if asked else card.max_tokens or _MAX_TOKENS
        return Ask(
            body=wire.sampling(body) | {"max_tokens": limit},
            prompt=_prompt(body.get("prompt")),
            suffix=body.get("suffix") or None,
            echo=bool(body.get("echo")),
            stream=bool(body.get("stream")),
            user_id=str(wire.first(body.get("user_id"), body.get("user"), "")),
            logprobs=None if logprobs is None or logprobs is False else int(logprobs) * (logprobs is not True),
            clamp=not (card.strict and asked),
            options={"usage": bool(wire.mapping(body, "stream_options").get("include_usage"))},
        )


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    if isinstance(prompt, list) and len(prompt) > 1 and all(isinstance(each, str | list) for each in prompt):
        raise RequestError(f"prompt: {len(prompt)} prompts in one request; send one request for each")
    if not isinstance(prompt, str):
        raise wire.malformed("prompt", prompt, "a string or a list of token ids")
    return prompt
