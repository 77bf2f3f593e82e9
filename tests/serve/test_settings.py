"""Settings: files, flags, what is refused; and that docs/server.md names every one."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from pelagos.engine import LLM, EngineOptions
from pelagos.errors import ConfigError
from pelagos.serve.settings import Settings, read_config, read_settings

ROOT = Path(__file__).resolve().parents[2]


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('[server]\nport = 9001\nkeys_file = "keys.json"\n[limits]\nmax_queued = 7\nwrite_s = 3\n', "utf-8")
    settings = read_settings(
        ["--config", str(file), "--port", "9002", "--strict", "--cors-origins", "http://a, http://b"]
    )
    assert (settings.port, settings.max_queued, settings.write_s, settings.strict) == (9002, 7, 3, True)
    assert settings.keys_file == tmp_path / "keys.json"  # paths in a file are seen from the file
    assert settings.cors_origins == ("http://a", "http://b")
    assert settings.host == Settings().host
    assert read_settings([]) == Settings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nprot = 1", r"\[server\] has no setting 'prot'; did you mean port in \[server\]\?"),
        ("[server]\nmax_queued = 1", r"did you mean max_queued in \[limits\]\?"),
        ("[sever]\nport = 1", r"\[sever\] has no setting 'port'; did you mean port in \[server\]\?"),
        ("port = 1", r"did you mean port in \[server\]\?"),
        ("[server\n", "not readable as TOML"),
        ('[server]\nport = "80"', "port='80': expected a whole number"),
        ("[server]\nport = 70000", "port=70000"),
        ("[server]\nport = true", "port=True"),
        ("[server]\nallow_open = 1", "allow_open=1: expected true or false"),
        ("[limits]\nwrite_s = 0.0", r"write_s=0\.0: expected a number > 0"),
        ("[limits]\nbody_bytes = -1", "body_bytes=-1"),
        ("[server]\ncors_origins = [1]", "cors_origins"),
        ('[server]\nlog_level = "loud"', "log_level='loud'"),
        ('[engine]\nengine = "remote"', "engine='remote'"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        read_settings(["--config", str(file)])


NAMES = st.sampled_from([field.name for field in dataclasses.fields(Settings)]) | st.text(
    "abc_", min_size=1, max_size=8
)
VALUES = st.integers() | st.booleans() | st.text(max_size=5) | st.floats() | st.lists(st.text(max_size=3), max_size=2)


@bounds(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["server", "engine", "limits", "x"]), st.dictionaries(NAMES, VALUES, max_size=4))
)
def test_any_file_gives_settings_or_a_config_error(tables: dict[str, dict[str, Any]]) -> None:
    lines = [
        [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in each.items())]
        for table, each in tables.items()
    ]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "server.toml"
        file.write_text("\n".join(itertools.chain(*lines)), encoding="utf-8")
        with contextlib.suppress(ConfigError):
            settings = read_settings(["--config", str(file)])
            assert all(getattr(settings, key) == value for key, value in read_config(file).items())


def test_every_setting_is_documented_with_its_table_and_default() -> None:
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Settings):
        row = re.search(
            rf"^\| `{field.name}` \| {field.metadata['table']} \| ([^|]*) \| {re.escape(field.metadata['help'])}",
            text,
            re.M,
        )
        assert row is not None, f"docs/server.md has no row for {field.name}"
        shown = "" if field.default in (None, ()) else str(field.default)
        assert row[1].strip("` ") == shown, field.name


def test_the_example_files_are_valid(tmp_path: Path) -> None:
    for file in (ROOT / "deploy").glob("*.toml"):
        assert Settings(**read_config(file)).host


def test_engine_options_are_those_of_the_model() -> None:
    known = {*inspect.signature(LLM.__init__).parameters, *(each.name for each in dataclasses.fields(EngineOptions))}
    assert set(Settings().engine_options) <= known
