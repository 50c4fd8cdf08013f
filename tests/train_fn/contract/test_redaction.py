"""What must not be read by others does not leave the process."""

from __future__ import annotations

import sys
import time

import pytest

from train_fn.contract import redaction
from train_fn.contract.redaction import know, know_url, redact, redact_url, redacted_output


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(redaction, "_named", set())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN_PATH", "HF_HOME", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:pw@db:5432/optuna", "postgresql://me:***@db:5432/optuna"),
        (
            "at postgresql+psycopg://me:p@ss/w:rd@db/optuna, again",
            "at postgresql+psycopg://me:***@db/optuna, again",
        ),
        (
            '{"a": "ftp://u:pw@h/x", "b": "ftp://u:pw@h/y"}',
            '{"a": "ftp://u:***@h/x", "b": "ftp://u:***@h/y"}',
        ),
        ("postgresql://h/d?user=me&sslpassword=hid&x=1", "postgresql://h/d?user=me&sslpassword=***&x=1"),
        ("host=db user=me password=hidden dbname=x", "host=db user=me password=*** dbname=x"),
        ("https://h/f?token=abc&v=1", "https://h/f?token=***&v=1"),
        ("Authorization: Bearer abc.def-1", "Authorization: Bearer ***"),
        ("login with hf_abcdefGHIJKL0123456789 failed", "login with *** failed"),
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////data/runs/study.db",
        "postgresql://me@db:5432/optuna",
        "http://127.0.0.1:8265/#/jobs/demo-1",
        "user@host: 3 tokens=512 of max_length: 512",
        "output_dir: s3://bucket/runs",
        "2x4 fp32: 99.5 samples/s",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_a_long_text_without_blanks_is_searched_in_no_time() -> None:
    text = "a+B.c" * 200_000 + "secret" * 50_000 + "://" * 50_000
    started = time.perf_counter()
    assert redact(text) == text
    assert time.perf_counter() - started < 5.0  # minutes, where the time grows with the square


def test_a_url_by_itself_may_hold_any_password() -> None:
    assert redact_url('postgresql://me:it\'s "mine"@db/x') == "postgresql://me:***@db/x"
    assert redact_url("/a/folder") == "/a/folder"


def test_secrets_of_the_environment_and_of_token_files(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    monkeypatch.setenv("PGPASSWORD", "brief")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of+the/cloud")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert redact("file-token") == "file-token"
    (tmp_path / "token").write_text("file-token\n")
    text = "from-the-environment, file-token, of+the/cloud; brief is too short, and file-tokens another word"
    assert redact(text) == "***, ***, ***; brief is too short, and file-tokens another word"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("default-token")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert redact("file-token default-token") == "file-token ***"


def test_secrets_that_somebody_named() -> None:
    know("open sesame", None, "")
    assert redact("say open sesame!") == "say ***!"
    assert redact("a pw b", "pw", None) == "a *** b"
    know_url("postgresql://me:open%20door@db/x?sslpassword=back+door&sslmode=require")
    know_url("sqlite:////data/study.db")
    text = redact("no route for open%20door, open door, back door, require or /data/study.db")
    assert text == "no route for ***, ***, ***, require or /data/study.db"


def test_output_is_free_of_secrets_within_the_block(capsys: pytest.CaptureFixture[str]) -> None:
    know("open sesame")
    with redacted_output():
        print("say", "open sesame", "ftp://u:pw@h")
        print("open sesame", file=sys.stderr)
        sys.stdout.writelines(["open sesame\n"])
        assert sys.stdout.encoding
        assert not sys.stdout.isatty()
        know("secret")
        assert redact("holds a secret") == "holds a ***"
    print("ftp://u:pw@h")
    assert redact("holds a secret, open sesame") == "holds a secret, ***"
    out, err = capsys.readouterr()
    assert out == "say *** ftp://u:***@h\n***\nftp://u:pw@h\n"
    assert err == "***\n"
