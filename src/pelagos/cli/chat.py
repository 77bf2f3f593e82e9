"""`pelagos chat`: a conversation in the terminal; answers go to stdout, thinking and the rest to stderr."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pelagos.cli.options import SAMPLING, shared, tell
from pelagos.errors import RequestError

if TYPE_CHECKING:
    from pelagos.engine import LLM

_HELP = (
    "/think [off|low|high|max]  thinking and its effort   /clear  start over   /exit  leave   Ctrl-C  stop an answer"
)
_EFFORTS = ("low", "high", "max")


def main(argv: Sequence[str]) -> None:
    """Talk with a model; reads lines from the terminal or a pipe."""
    from pelagos.engine import LLM

    parser = argparse.ArgumentParser(prog="pelagos chat", description="Talk with a model in the terminal.")
    shared(parser, "model", "mode", "device", *SAMPLING)
    about = "let the model think before it answers (default: it does)"
    parser.add_argument("--think", action=argparse.BooleanOptionalAction, default=True, help=about)
    parser.add_argument("--effort", default="high", help="how hard it thinks: low, high (default) or max")
    parser.add_argument("--system", help="system text")
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="longest answer, thinking included")
    args = parser.parse_args(argv)
    params = {name: getattr(args, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    llm = LLM(args.model, mode=args.mode, device=args.device)
    talk = Talk(llm, params, system=args.system, effort=args.effort if args.think else "off")
    for line in talk.lines():
        talk.take(line)


class Talk:
    """One conversation: the messages so far, the settings, and how they look in a terminal."""

    def __init__(self, llm: LLM, params: dict[str, Any], *, system: str | None, effort: str) -> None:
        self._llm = llm
        self._params = params
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, Any]] = list(self._system)
        self._set_effort(effort)

    def lines(self) -> Iterator[str]:
        """Yield what the person writes until /exit or the end of the input; Ctrl-C at the prompt drops the line."""
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  # gives input() history and editing

            tell(_HELP)
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                tell("\n/exit or Ctrl-D leaves")
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
                tell(f"thinking: {self._effort}")
            elif command == "/clear":
                self._messages = list(self._system)
            elif command.startswith("/"):
                tell(_HELP)
            else:
                self._answer(line)
        except RequestError as error:
            tell(str(error), "31")

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
                    tell("\n")
                last = event.kind
                if event.kind == "reasoning":
                    tell(printable(event.text), "2;3", end="")
                elif event.kind == "content":
                    print(printable(event.text), end="", flush=True)
        except KeyboardInterrupt:
            tell(" [stopped]", end="")
        print()
        self._messages += [question, turn.message]


def printable(text: str) -> str:
    """Text without the control characters that would command a terminal."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
