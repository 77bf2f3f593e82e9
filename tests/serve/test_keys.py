"""API keys: what is on disk, who is let in, and that a change shows without a restart."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from tests.engine.scripted import scripted_engine, scripted_llm
from tests.serve.served import serve, wait_until

from pelagos.cli import main
from pelagos.errors import ConfigError
from pelagos.serve import Settings
from pelagos.serve.keys import Key, KeyFile

CHAT = "/v1/chat/completions"


def ask(client: httpx.Client, secret: str | None, path: str = CHAT, **body: Any) -> httpx.Response:
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    given = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "thinking": {"type": "disabled"}}
    return client.post(path, json=given | body, headers=headers)


def test_a_key_is_stored_as_a_hash_that_only_its_owner_can_read(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "deep" / "keys.json")
    assert keys.read() == ()
    secret = keys.add("alice", concurrency=2, per_minute=60)
    assert keys.is_needed()
    assert len(secret) >= 43  # 256 bits
    assert stat.S_IMODE(os.stat(keys.path).st_mode) == 0o600
    assert secret not in keys.path.read_text(encoding="utf-8")
    assert [each.name for each in keys.path.parent.iterdir()] == ["keys.json"]
    found = keys.find(secret)
    assert found is not None
    assert (found.name, found.concurrency, found.per_minute) == ("alice", 2, 60)
    assert keys.find(secret[:-1]) is None
    with pytest.raises(ConfigError, match="'alice' exists"):
        keys.add("alice")
    with pytest.raises(ConfigError, match="no key named 'bob'; it has alice"):
        keys.revoke("bob")
    keys.revoke("alice")
    assert keys.is_needed()
    assert keys.find(secret) is None
    keys.path.unlink()
    assert keys.is_needed()  # a file that is gone does not open the server


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"version": 2, "keys": []}', '{"version": 1, "keys": [{"name": "a"}]}', '{"version": 1}',
             '{"version": 1, "keys": [{"name": "../a", "digest": "", "created": ""}]}'],
)  # fmt: skip
def test_a_damaged_file_admits_nobody_and_says_so(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secret = keys.add("alice")
    keys.path.write_text(text, encoding="utf-8")
    assert keys.is_needed()
    assert keys.find(secret) is None
    assert "not a file of keys" in caplog.text
    with pytest.raises(ConfigError, match="not a file of keys"):
        keys.add("bob")


@bounds(deadline=None)
@given(st.text(max_size=70))
def test_names_are_safe_everywhere(name: str) -> None:
    try:
        key = Key(name, "", "")
    except ConfigError:
        return
    assert key.name.isascii()
    assert not set(key.name) & set("\0/\n :\"'\\")


def test_many_writers_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    threads = [threading.Thread(target=KeyFile(path).add, args=(f"key-{i}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in KeyFile(path).read()} == {f"key-{i}" for i in range(12)}


def test_the_command_makes_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--file", str(tmp_path / "keys.json")]
    assert main(["keys", *file, "add", "alice", "--per-minute", "5"]) == 0
    secret = capsys.readouterr().out.strip()
    keys = KeyFile(tmp_path / "keys.json")
    assert keys.is_needed()
    found = keys.find(secret)
    assert found is not None
    assert main(["keys", *file, "list"]) == 0
    assert json.loads(capsys.readouterr().out) == found.about
    assert main(["keys", *file, "revoke", "alice"]) == 0
    assert main(["keys", *file, "revoke", "alice"]) == 1
    assert "no key named 'alice'" in capsys.readouterr().err


def test_who_is_let_in(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secret = keys.add("alice")
    llm = scripted_llm("Hello")
    with serve(llm, keys=keys) as served:
        client = served.client
        for path in ("/", "/health", "/ready", "/openapi.json", "/page/app.js"):
            assert client.get(path).status_code == 200, path
        for path in ("/v1/models", "/metrics", "/stats", "/v1/models/nano", "/nothing"):
            assert client.get(path).status_code == 401, path
        for wrong in (None, "x", "pk-wrong", secret + "x"):
            refused = ask(client, wrong)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert "API key" in refused.json()["error"]["message"]
        assert ask(client, secret, user_id="u1").status_code == 200
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert client.post(CHAT, json=body, headers={"x-api-key": secret}).status_code == 200
        both = {"x-api-key": "wrong", "authorization": f"bearer {secret}"}
        assert client.post(CHAT, json=body, headers=both).status_code == 200
        # Prefixes of two keys never meet, whatever user ids they choose.
        other = keys.add("bob")
        assert ask(client, other, user_id="u1").status_code == 200
        users = [call["user_id"] for call in scripted_engine(llm).calls]
        assert users[0] == "alice\0u1"
        assert users[-1] == "bob\0u1"
        keys.revoke("alice")
        assert ask(client, secret).status_code == 401
        assert ask(client, other).status_code == 200
        keys.revoke("bob")
        assert ask(client, other).status_code == 401


def test_bounds_of_a_key(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    slow, few, free = keys.add("slow", concurrency=1), keys.add("few", per_minute=2), keys.add("free")
    llm = scripted_llm("one two three " * 50, delay=0.02)
    with serve(llm, keys=keys, settings=Settings(max_requests=1, max_queued=2)) as served:
        with served.client.stream(
            "POST", CHAT, headers={"x-api-key": slow},
            json={"messages": [{"role": "user", "content": "Hi"}], "stream": True},
        ) as answer:  # fmt: skip
            lines = answer.iter_lines()  # kept: its end would close the connection
            next(lines)
            refused = ask(served.client, slow)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            assert "1 requests at a time" in refused.json()["error"]["message"]
            assert ask(served.client, free).status_code == 200
        wait_until(lambda: served.app.traffic.in_flight == 0)
        assert ask(served.client, slow).status_code == 200
        began = time.monotonic()
        assert [ask(served.client, few).status_code for _ in range(3)] == [200, 200, 429]
        wait = int(ask(served.client, few).headers["retry-after"])
        assert 30 - (time.monotonic() - began) <= wait <= 30
        assert served.app.traffic.in_flight == 0
