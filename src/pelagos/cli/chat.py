"""`pelagos chat`: a conversation in the terminal; answers go to stdout, thinking and the rest to stderr."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pelagos.errors import RequestError

if TYPE_CHECKING:
    from pelagos.engine import LLM

_HELP = (
    "/think [off|low|high|max]  thinking and its effort   /clear  start over   /exit  leave   Ctrl-C  stop an answer"
)
_EFFORTS = ("low", "high", "max")


def chat(
    model: Annotated[str, typer.Option(help="Bundled name, checkpoint directory or cached hub id.")] = "nano",
    think: Annotated[bool, typer.Option("--think/--no-think", help="Let the model think before it answers.")] = True,
    effort: Annotated[str, typer.Option(help="How hard it thinks: low, high or max.")] = "high",
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability to sample from.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, thinking included.")] = 1024,
    seed: Annotated[int | None, typer.Option(help="Makes the answers repeatable.")] = None,
    mode: Annotated[str, typer.Option(help="Number mode: reference or released.")] = "reference",
    device: Annotated[str | None, typer.Option(help="Device of the weights, such as cpu or cuda.")] = None,
) -> None:
    """Talk with a model; reads lines from the terminal or a pipe."""
    from pelagos.engine import LLM

    params = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    talk = Talk(LLM(model, mode=mode, device=device), params, system=system, effort=effort if think else "off")
    for line in talk.lines():
        talk.take(line)


class Talk:
    """One conversation: the messages so far, the settings, and how they look in a terminal."""

    def __init__(self, llm: LLM, params: dict[str, Any], *, system: str | None, effort: str) -> None:
        from rich.console import Console

        self._llm = llm
        self._params = params
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, Any]] = list(self._system)
        self._out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)
        self._effort = effort
        self._set_effort(effort)

    def lines(self) -> Iterator[str]:
        """Yield what the person writes until /exit or the end of the input; Ctrl-C at the prompt drops the line."""
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  # gives input() history and editing

            self._err.print(_HELP, style="dim")
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                self._err.print("\n/exit or Ctrl-D leaves", style="dim")
                continue
            if line.strip() == "/exit":
                return
            if line.strip():
                yield line

    def take(self, line: str) -> None:
        """Obey a command, or answer a message; what cannot be served is said, and the conversation goes on."""
        command, _, argument = line.strip().partition(" ")
        try:
            if command == "/think":
                self._set_effort(argument.strip() or ("high" if self._effort == "off" else "off"))
                self._err.print(f"thinking: {self._effort}", style="dim")
            elif command == "/clear":
                self._messages = list(self._system)
            elif command.startswith("/"):
                self._err.print(_HELP, style="dim")
            else:
                self._answer(line)
        except RequestError as error:
            self._err.print(str(error), style="red")

    def _set_effort(self, effort: str) -> None:
        if effort not in ("off", *_EFFORTS):
            raise RequestError(f"thinking effort {effort!r}: expected off, {', '.join(_EFFORTS)}")
        self._effort = effort

    def _answer(self, text: str) -> None:
        mode = {"thinking": {"type": "disabled"}} if self._effort == "off" else {"reasoning_effort": self._effort}
        question = {"role": "user", "content": text}
        turn = self._llm.chat({"messages": [*self._messages, question], **mode, **self._params})
        try:
            last = ""
            for event in turn:
                if last == "reasoning" != event.kind:
                    self._err.print("\n")
                last = event.kind
                if event.kind == "reasoning":
                    self._err.print(printable(event.text), style="dim italic", end="")
                elif event.kind == "content":
                    self._out.print(printable(event.text), end="")
        except KeyboardInterrupt:
            self._err.print(" [stopped]", style="dim", end="")
        self._out.print()
        self._messages += [question, turn.message]


def printable(text: str) -> str:
    """Text without the control characters that would command a terminal."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
