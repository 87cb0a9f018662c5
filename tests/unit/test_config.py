"""Settings: what wins, what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.app import build_app
from serve_app.config import ConfigError, Settings, load_settings, reference

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from outside."""
    monkeypatch.delenv("VOICE_CLONE_CONFIG", raising=False)


def write(path: Path, text: str) -> str:
    """A configuration file."""
    path.write_text(text)
    return str(path)


def test_arguments_win_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = "limits: {max_input_chars: 1, max_queued_requests: 11, look_ahead_utterances: 3}\n"
    monkeypatch.setenv("VOICE_CLONE_CONFIG", write(tmp_path / "c.yaml", limits))
    monkeypatch.setenv("VOICE_CLONE__LIMITS__MAX_INPUT_CHARS", "2")
    monkeypatch.setenv("VOICE_CLONE__LIMITS__MAX_QUEUED_REQUESTS", "12")
    settings = load_settings(limits={"max_input_chars": 3}).limits
    assert (settings.max_input_chars, settings.max_queued_requests) == (3, 12)
    assert (settings.look_ahead_utterances, settings.first_audio_timeout_s) == (3, 25.0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("engins: {}", "engins"),
        ("engines: {tone: {config: {step: 1}}}", "step"),
        ("engines: {nope: {}}", "nope"),
        ("engines: {}", "at least one engine"),
        ("default_engine: tone", "tone"),
        ("model_aliases: {a: b}", "'a' points to engine 'b'"),
        ("limits: {max_input_chars: -1}", "limits.max_input_chars"),
        ("router: {min_replicas: 3, max_replicas: 2}", "min_replicas"),
        ("voices: {store: relative/path}", "absolute"),
        ("voices: {consent: maybe}", "voices.consent"),
        ("limits: [1", "YAML"),
        ("limits: {per_ip: {request_per_minute: 5}}", "limits.per_ip.request_per_minute"),
        ("limits: {total: {concurrent: 0}}", "limits.total.concurrent"),
        ("limits: {state: memcached://x}", "limits.state"),
        ("keys: {studio: {secret: x}}", "keys.studio.secret"),
        ("keys: {studio: {sha256: x}}", "keys.studio.sha256"),
        (f"keys: {{a: {{sha256: {'ab' * 32}}}, b: {{sha256: {'ab' * 32}}}}}", "'a' and 'b'"),
        (f"keys: {{a: {{sha256: {'ab' * 32}, weight: 0}}}}", "keys.a.weight"),
        ("trusted_proxies: [10.0.0.300]", "trusted_proxies.0"),
        ("trusted_proxies: [10.0.0.1/8]", "trusted_proxies.0"),
    ],
)
def test_mistakes_stop_the_start_with_file_and_key(
    text: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.yaml", text)
    monkeypatch.setenv("VOICE_CLONE_CONFIG", path)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert named in str(caught.value)
    assert path in str(caught.value)


def test_missing_file_and_misspelt_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOICE_CLONE__LIMITZ__X", "1")
    with pytest.raises(ConfigError, match="VOICE_CLONE__LIMITZ__X"):
        load_settings()
    with pytest.raises(ConfigError, match="LIMITZ"):
        build_app(Settings())
    monkeypatch.delenv("VOICE_CLONE__LIMITZ__X")
    monkeypatch.setenv("VOICE_CLONE__LIMITS__MAX_INPUT", "1")
    with pytest.raises(ConfigError, match=r"limits\.max_input"):
        load_settings()
    monkeypatch.delenv("VOICE_CLONE__LIMITS__MAX_INPUT")
    monkeypatch.setenv("VOICE_CLONE_CONFIG", "/nowhere.yaml")
    with pytest.raises(ConfigError, match=r"/nowhere\.yaml does not exist"):
        load_settings()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_profiles_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOICE_CLONE_CONFIG", str(path))
    build_app(load_settings())


def test_models_resolve() -> None:
    settings = Settings.model_validate(
        {"engines": {"tone": {}, "slow": {"engine": "tone"}}, "model_aliases": {"x": "slow"}}
    )
    assert settings.served_engine(None) == "tone"
    assert settings.served_engine("slow") == "slow"
    assert settings.served_engine("x") == "slow"
    assert settings.served_engine("tts-1") == "tone"
    assert settings.served_engine("TONE") is None


def test_defaults_of_limits_stay_where_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOICE_CLONE__LIMITS__PER_IP__CONCURRENT", "4")
    limits = load_settings(limits={"total": {"characters_per_minute": 9}}).limits
    assert limits.total.model_dump() == {
        "requests_per_minute": 1000,
        "characters_per_minute": 9,
        "concurrent": 50,
    }
    assert limits.per_ip.model_dump() == {
        "requests_per_minute": 100,
        "characters_per_minute": None,
        "concurrent": 4,
    }
    assert set(limits.per_key.model_dump().values()) == {None}


def test_documentation_is_what_the_command_prints() -> None:
    assert reference() in (ROOT / "docs" / "configuration.md").read_text()


def test_user_config_changes_what_it_names_and_nothing_else() -> None:
    settings = Settings.model_validate({"limits": {"max_input_chars": 7, "look_ahead_s": 3}})
    changed = settings.reconfigured(
        {"limits": {"max_input_chars": 9}, "batching": {"mosaic": {"max_rows": 2}}}
    )
    assert (changed.limits.max_input_chars, changed.limits.look_ahead_s) == (9, 3)
    assert changed.engines["mosaic"].batching.max_rows == 2
    assert settings.limits.max_input_chars == 7
    assert settings.reconfigured({}) == settings


@pytest.mark.parametrize(
    ("user_config", "named"),
    [
        ({"limit": {}}, "limit"),
        ({"limits": {"max_input_char": 1}}, "max_input_char"),
        ({"limits": {"max_input_chars": 0}}, "max_input_chars"),
        ({"batching": {"nope": {}}}, "batching.nope"),
        ({"batching": {"mosaic": {"rows": 1}}}, "rows"),
    ],
)
def test_mistake_in_user_config_is_named(user_config: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match="user_config") as caught:
        Settings().reconfigured(user_config)
    assert named in str(caught.value)


def test_fallback_has_to_be_served() -> None:
    with pytest.raises(ValidationError, match=r"engines\.mosaic\.fallback"):
        Settings.model_validate({"engines": {"mosaic": {"fallback": ["nope"]}}})


def test_variables_of_the_old_server_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("LOG_LEVEL", "warning")
    engines = {"xtts": {}, "on_gpu": {"engine": "xtts", "config": {"device": "cuda:1"}}, "tone": {}}
    settings = load_settings(engines=engines)
    assert {name: engine.config.get("device") for name, engine in settings.engines.items()} == {
        "xtts": "cpu",
        "on_gpu": "cuda:1",
        "tone": None,
    }
    assert settings.log_level == "WARNING"
    assert load_settings(log_level="DEBUG").log_level == "DEBUG"
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="log_level"):
        load_settings()
