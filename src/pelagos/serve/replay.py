"""Byte-exact replay: a turn with tool calls goes back into later prompts as the very tokens the model wrote.

A client sends calls back as JSON; rendering them again seldom gives the tokens that were sampled, and then the cached
prefix ends there. Turns are kept by user and call ids. A record is used only where it says, field by field, what the
rendered message says, with the same special tokens in the same order: it changes the spelling, never the meaning.
"""

import array
import contextlib
import hashlib
import json
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pelagos.chat.render import Prompt
from pelagos.chat.tokenizer import Tokenizer
from pelagos.chat.tokens import ASSISTANT, DSML, EOS, MARKS
from pelagos.engine import ChatTurn
from pelagos.errors import CacheError

_D = MARKS[DSML]
_PARAMETER = re.compile(f'<{_D}parameter name="([^"{_D}]*)" string="(true|false)">([^{_D}]*)</{_D}parameter>\n')
_INVOKE = re.compile(f'<{_D}invoke name="([^"{_D}]*)">\n((?:{_PARAMETER.pattern})*)</{_D}invoke>\n')
_BLOCK = re.compile(f"{_D}tool_calls>\n((?:{_INVOKE.pattern})+)</{_D}tool_calls>")
_TABLE = (
    "CREATE TABLE IF NOT EXISTS turns (key BLOB PRIMARY KEY, ids BLOB NOT NULL, used INTEGER NOT NULL)",
    "CREATE INDEX IF NOT EXISTS by_use ON turns (used, length(ids))",
)
_PRUNE = """DELETE FROM turns WHERE used <= (SELECT used FROM (
    SELECT used, row_number() OVER by_use AS turns, sum(length(ids)) OVER by_use AS bytes FROM turns
    WINDOW by_use AS (ORDER BY used DESC)) WHERE turns > ? OR bytes > ? ORDER BY used DESC LIMIT 1)"""
_log = logging.getLogger(__name__)
_Piece = tuple[str, bool]
_Values = dict[str, tuple[str, str]]  # of one call: whether the value is a string ("true", "false"), and the value
_T = TypeVar("_T")


class Replay:
    """A bounded table of turns, in memory or in a file that survives a killed process; one serves all threads.

    A file that is found broken is set aside and counted in `damaged`.
    """

    def __init__(self, path: Path | None = None, *, max_turns: int = 20_000, max_bytes: int = 256 << 20) -> None:
        """Open or create; what was not used for longest goes first. Raises CacheError where no file can be made."""
        self.damaged = 0
        self._path, self._bounds = path, (max_turns, max_bytes)
        self._written = 0  # bytes since rows were last dropped; a small row counts as one of mean size
        self._lock = threading.Lock()
        self._open()

    def remember(self, user_id: str, call_ids: Sequence[str], ids: Sequence[int]) -> None:
        """Keep the tokens of a turn, from the one behind the assistant's mark up to its end, under its call ids."""
        row = _key(user_id, call_ids), array.array("I", ids).tobytes(), time.time_ns()

        def write() -> None:
            self._database.execute("REPLACE INTO turns VALUES (?, ?, ?)", row)
            turns, size = self._bounds
            self._written += max(len(row[1]), size // turns)
            if self._written * 16 > size:  # now and then: it reads the whole index
                self._database.execute(_PRUNE, self._bounds)
                self._written = 0

        self._try(write, None)

    def recall(self, user_id: str, turns: Sequence[Sequence[str]]) -> list[list[int] | None]:
        """Return the tokens of each turn by its call ids, None for what is not there."""
        keys = [_key(user_id, call_ids) for call_ids in turns]

        def read() -> list[list[int] | None]:
            self._database.executemany("UPDATE turns SET used = ? WHERE key = ?", ((time.time_ns(), k) for k in keys))
            rows = [self._database.execute("SELECT ids FROM turns WHERE key = ?", (key,)).fetchone() for key in keys]
            return [None if not row or len(row[0]) % 4 else array.array("I", row[0]).tolist() for row in rows]

        return self._try(read, [None] * len(keys))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _try(self, work: Callable[[], _T], otherwise: _T) -> _T:
        with self._lock:
            try:
                with self._database:
                    return work()
            except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:  # locked, full, closed
                _log.warning("turns for replay: %s", error)
            except sqlite3.DatabaseError as error:
                self._set_aside(error)
        return otherwise

    def _open(self) -> None:
        try:
            if self._path is not None:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            self._database = sqlite3.connect(self._path or ":memory:", timeout=1.0, check_same_thread=False)
            # Without waiting for the disk: what is lost with the machine's power is only speed.
            for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = OFF", *_TABLE):
                self._database.execute(statement)
            if self._database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("the quick check failed")
        except (OSError, sqlite3.OperationalError) as error:
            raise CacheError(f"{self._path}: cannot keep turns for replay there ({error})") from None
        except sqlite3.DatabaseError as error:
            self._set_aside(error)

    def _set_aside(self, error: Exception) -> None:
        _log.warning("%s is damaged and set aside: %s", self._path, error)
        self.damaged += 1
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
        if self._path is not None:
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self._path}{suffix}", f"{self._path}{suffix}.damaged")
        self._open()


def _key(user_id: str, call_ids: Sequence[str]) -> bytes:
    # Some clients strip what is no letter and no digit from the ids they send back.
    call_ids = ["".join(filter(str.isalnum, call_id)) for call_id in call_ids]
    return hashlib.sha256(json.dumps([user_id, call_ids]).encode()).digest()


def turn_ids(turn: ChatTurn, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a finished turn from behind the assistant's mark on, without the end token."""
    mark, prompt = tokenizer.id(ASSISTANT), turn.prompt_ids
    begin = next(at for at in range(len(prompt), 0, -1) if prompt[at - 1] == mark)
    ids = [*prompt[begin:], *turn.output_ids]
    return ids[:-1] if ids[-1] == tokenizer.id(EOS) else ids


def replayed_ids(
    replay: Replay, tokenizer: Tokenizer, prompt: Prompt, messages: Iterable[Any], user_id: str
) -> list[int]:
    """Tokenise a rendered conversation, with the turns that were recorded for this user in their own tokens."""
    pieces = prompt.pieces
    turns = [turn for turn in _turns(pieces) if (DSML, True) in pieces[slice(*turn)]]
    calls = [message["tool_calls"] for message in messages if _has_calls(message)]
    if len(turns) != len(calls) or not turns:
        return tokenizer.encode_prompt(prompt)
    names = [[str(call.get("id")) if isinstance(call, dict) else "" for call in each] for each in calls]
    usual = {tool["name"]: _defaults(tool["parameters"]) for tool in prompt.tools or ()}
    ids: list[int] = []
    done = 0
    for (begin, end), record in zip(turns, replay.recall(user_id, names), strict=True):
        kept = None if record is None else _fit(record, pieces[begin:end], tokenizer, usual)
        if kept is not None:
            ids += _encode(pieces[done : begin + kept[0]], tokenizer) + kept[1]
            done = end
    return ids + _encode(pieces[done:], tokenizer)


def _has_calls(message: Any) -> bool:
    calls = isinstance(message, dict) and message.get("role") == "assistant" and message.get("tool_calls")
    return isinstance(calls, list) and len(calls) > 0


def _encode(pieces: Iterable[_Piece], tokenizer: Tokenizer) -> list[int]:
    each = ([tokenizer.id(text)] if special else tokenizer.encode(text) for text, special in pieces)
    return [index for ids in each for index in ids]


def _turns(pieces: Sequence[_Piece]) -> list[tuple[int, int]]:
    """Return where the finished assistant turns lie in the pieces, between the assistant's mark and the end token."""
    turns: list[tuple[int, int]] = []
    begin = None
    for at, (text, special) in enumerate(pieces):
        if special and text == ASSISTANT:
            begin = at + 1
        elif special and text == EOS and begin is not None:
            turns.append((begin, at))
            begin = None
    return turns


def _fit(
    record: list[int], pieces: Sequence[_Piece], tokenizer: Tokenizer, usual: Mapping[str, _Values]
) -> tuple[int, list[int]] | None:
    """Return how many pieces of a turn to keep, and recorded tokens for the rest; None where they say another thing.

    `usual` are the declared defaults of each function: clients fill them in.
    """
    mark = tokenizer.id(DSML)
    if mark not in record or max(record) >= tokenizer.vocab_size:
        return None
    own = _split(record, tokenizer)
    start, own_start = pieces.index((DSML, True)), own.index((DSML, True))
    said, shown = _calls(own[own_start:]), _calls(pieces[start:])
    if said is None or shown is None or [name for name, _ in said] != [name for name, _ in shown]:
        return None
    for (name, values), (_, others) in zip(said, shown, strict=True):
        if {**usual.get(name, {}), **values} != {**usual.get(name, {}), **others}:
            return None
    if _head(own[:own_start]) == _head(pieces[:start]):
        return 0, record
    return start, record[record.index(mark) :]


def _defaults(schema: Any) -> _Values:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    given = properties.items() if isinstance(properties, dict) else ()
    values = {key: each["default"] for key, each in given if isinstance(each, dict) and "default" in each}
    return {
        key: ("true", value) if isinstance(value, str) else ("false", _canonical(json.dumps(value)))
        for key, value in values.items()
    }


def _split(ids: Sequence[int], tokenizer: Tokenizer) -> list[_Piece]:
    pieces: list[_Piece] = []
    begin = 0
    for at, index in enumerate([*ids, -1]):
        if index < 0 or index in tokenizer.special_tokens:
            if at > begin:
                pieces.append((tokenizer.decode(ids[begin:at]), False))
            if index >= 0:
                pieces.append((tokenizer.special_tokens[index], True))
            begin = at + 1
    return pieces


def _head(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Return what comes before a block, less the newlines around texts: they mean nothing, and clients drop them."""
    kept = [(text if special else text.strip("\n"), special) for text, special in pieces]
    if kept[-1:] and kept[-1][0].endswith("<") and not kept[-1][1]:  # the opening of the tag, behind newlines again
        kept[-1] = (kept[-1][0][:-1].rstrip("\n") + "<", False)
    return [piece for piece in kept if piece[0]]


def _calls(pieces: Sequence[_Piece]) -> list[tuple[str, _Values]] | None:
    """Read a block from its first DSML token on; None for anything but the form that the model was taught."""
    if any(special and text != DSML for text, special in pieces):
        return None
    block = _BLOCK.fullmatch("".join(_D if special else text for text, special in pieces))
    if block is None:
        return None
    calls: list[tuple[str, _Values]] = []
    for invoke in _INVOKE.finditer(block[1]):
        given = _PARAMETER.findall(invoke[2])
        values = {key: (kind, value if kind == "true" else _canonical(value)) for key, kind, value in given}
        if len(values) != len(given):
            return None
        calls.append((invoke[1], values))
    return calls


def _canonical(text: str) -> str:
    """Return JSON text in one spelling: sorted keys, 1.0 as 1; what is no JSON stays as it is."""

    def number(digits: str) -> Any:
        value = float(digits)
        return int(value) if value.is_integer() else value

    try:
        return json.dumps(json.loads(text, parse_float=number), sort_keys=True, allow_nan=False)
    except (ValueError, RecursionError):
        return text
