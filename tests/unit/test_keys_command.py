"""``voice-clone keys new``, and what a server that asks for no keys says of itself."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.cli import app
from serve_app.config import ConfigError, Settings
from serve_app.ingress.callers import Callers
from serve_app.protocol import KeyScope
from serve_app.server import exposure

DOCS = Path(__file__).parents[2] / "docs"


def made(*arguments: str) -> tuple[str, dict[str, object]]:
    """The key that is printed, and the configuration."""
    result = CliRunner().invoke(app, ["keys", "new", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    secret, _, config = result.stdout.partition("\n")
    return secret, yaml.safe_load(config)


def test_a_new_key_is_known_by_the_lines_it_comes_with() -> None:
    secret, config = made("studio", "--scopes", "speak, admin", "--bulk-only")
    settings = Settings.model_validate(config)
    key = settings.keys["studio"]
    assert key.scopes == (KeyScope.SPEAK, KeyScope.ADMIN)
    assert key.bulk_only
    headers = [(b"authorization", f"Bearer {secret}".encode())]
    scope = {"type": "http", "client": ("10.0.0.1", 1), "headers": headers}
    assert Callers(settings.keys, []).caller(scope).key == "studio"
    assert secret not in yaml.safe_dump(config)
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()


def test_keys_are_long_random_and_of_one_form() -> None:
    secrets = {made("studio")[0] for _ in range(20)}
    assert len(secrets) == 20
    # 43 characters of base64 are 256 bits.
    assert all(re.fullmatch(r"vc_[A-Za-z0-9_-]{43}", secret) for secret in secrets)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("stu dio",), "letters, digits"),
        (("../x",), "letters, digits"),
        (("public",), "public"),
        (("PUBLIC",), "public"),
        (("voice_" + "0" * 26,), "looks like the id"),
        (("studio", "--scopes", "god"), "'speak', 'voices' or 'admin'"),
        (("studio", "--scopes", ""), "'speak', 'voices' or 'admin'"),
    ],
)
def test_what_cannot_be_a_key_is_said(arguments: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        CliRunner().invoke(app, ["keys", "new", *arguments], catch_exceptions=False)


KEY = {"sha256": "ab" * 32}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"Studio": KEY, "studio": {"sha256": "cd" * 32}}, "differ in case only"),
        ({"a": {**KEY, "owner": "b/c"}}, "letters, digits"),
        ({"a": {**KEY, "owner": "Team"}, "b": {"sha256": "cd" * 32, "owner": "team"}}, "differ in case only"),
        ({"a": {**KEY, "scopes": []}}, "at least 1"),
    ],
)
def test_keys_whose_voices_would_mix_stop_the_start(keys: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Settings.model_validate({"keys": keys})


def test_keys_can_share_an_owner() -> None:
    keys = {"old": {**KEY, "owner": "team"}, "new": {"sha256": "cd" * 32, "owner": "team"}}
    assert len(Settings.model_validate({"keys": keys}).keys) == 2


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [
        ("127.0.0.1", {}, False),
        ("127.8.8.8", {}, False),
        ("::1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {}, True),
        ("::", {}, True),
        ("192.168.1.5", {}, True),
        ("example.org", {}, True),
        ("0.0.0.0", {"studio": KEY}, False),
    ],
)
def test_a_server_that_asks_nobody_and_that_others_reach_says_so(
    host: str, keys: dict[str, object], warned: bool
) -> None:
    warning = exposure(Settings.model_validate({"keys": keys}), host)
    assert (warning is not None) == warned
    if warning:
        assert host in warning
        assert "voice-clone keys new" in warning


@pytest.mark.parametrize("page", ["security.md", "limits.md"])
def test_the_configuration_in_the_documentation_is_valid(page: str) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        Settings.model_validate(yaml.safe_load(block))


def test_the_key_in_the_documentation_is_that_of_its_digest() -> None:
    text = (DOCS / "security.md").read_text()
    (secret,) = re.findall(r"^(vc_\S+)$", text, re.MULTILINE)
    assert hashlib.sha256(secret.encode()).hexdigest() in text
