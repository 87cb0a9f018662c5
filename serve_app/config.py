"""The settings tree: one schema for YAML, environment and builder arguments.

Whoever is more explicit wins: arguments of ``build_app`` (the ``args:`` of ``serve_config.yaml``), then
environment variables (``VOICE_CLONE__LIMITS__MAX_INPUT_CHARS=2000``), then the YAML file named by
``VOICE_CLONE_CONFIG``, then the defaults written here. An unknown key anywhere stops the start.
"""

import os
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from engines.contract import EngineError
from engines.registry import engine_class, engine_names
from serve_app.voices.reference import ReferenceLimits

CONFIG_VARIABLE = "VOICE_CLONE_CONFIG"
#: Names that OpenAI clients hard-code; each means "the default engine" unless configured otherwise.
OPENAI_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15")


class ConfigError(Exception):
    """The configuration cannot be used. The message names the source, the key and the fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Replicas(_Section):
    """How many copies of a deployment run, and what each reserves."""

    min_replicas: int = Field(default=1, ge=0, description="Copies kept running; 0 scales to zero.")
    max_replicas: int = Field(default=1, ge=1, description="Copies at most.")
    num_cpus: float = Field(default=0.0, ge=0, description="CPU cores each copy reserves.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPU share each copy reserves.")
    memory_mb: int | None = Field(default=None, ge=1, description="Memory each copy reserves.")
    upscale_delay_s: float = Field(default=5.0, ge=0, description="Sustained load before a copy is added.")
    downscale_delay_s: float = Field(default=300.0, ge=0, description="Sustained idleness before one goes.")

    @model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        return self


class BatchSettings(_Section):
    """How utterances are sent to an engine's replicas. ``user_config`` changes all but ``form_in`` live."""

    form_in: Literal["router", "replica"] = Field(
        default="router",
        description="Where utterances wait for an engine: in the router, which reserves a place and then "
        "takes what is next, or in the replicas, without reservations and first come, first served.",
    )
    max_rows: int | None = Field(
        default=None, ge=1, le=1024, description="Utterances of one batch; the engine's slots if left out."
    )
    max_chars: int | None = Field(
        default=None, ge=1, description="Characters of one batch; unbounded if left out."
    )
    chunk_timeout_s: float = Field(
        default=15.0,
        gt=0,
        description="A replica that yields nothing for this long is given up and its work done elsewhere.",
    )


class EngineSettings(_Section):
    """One served engine."""

    engine: str | None = Field(
        default=None, description="Registry name of the engine; the key itself if left out."
    )
    config: dict[str, Any] = Field(default_factory=dict, description="The engine's own settings.")
    replicas: Replicas = Field(
        default_factory=lambda: Replicas(num_cpus=1.0), description="Copies and reservations."
    )
    runtime_env: dict[str, Any] | None = Field(
        default=None, description="Ray runtime environment of this engine's replicas."
    )
    batching: BatchSettings = Field(default_factory=BatchSettings, description="Batches.")
    fallback: tuple[str, ...] = Field(
        default=(), description="Served engines that speak in its place if it cannot begin, in order."
    )


class VoiceSettings(_Section):
    """Where voices live and what is accepted as one."""

    store: str = Field(
        default="~/.local/share/voice-clone/voices",
        description="Absolute directory or URL (s3://, gs://, az://, memory://) of the voice store.",
    )
    consent: Literal["required", "recorded", "off"] = Field(
        default="recorded", description="Whether enrolment must carry a consent statement."
    )
    reference: ReferenceLimits = Field(
        default_factory=ReferenceLimits, description="What is accepted as a recording."
    )
    aliases: dict[str, str] = Field(
        default_factory=dict, description="Extra names of voices: alias -> id or name."
    )
    conditioning_cache_mb: int = Field(
        default=256, ge=1, description="Memory a router may use for conditioning."
    )
    conditioning_ttl_s: float = Field(
        default=30.0, gt=0, description="Age at which a router reads conditioning again from the store."
    )

    @field_validator("store")
    @classmethod
    def _absolute(cls, store: str) -> str:
        # A relative path would mean another directory on every worker that resolves it.
        if "://" in store or Path(store).expanduser().is_absolute():
            return store
        raise ValueError("must be an absolute path, a path starting with ~, or a URL")


class Quota(_Section):
    """How much may be asked for: per minute over a moving window, and at once. null is unlimited."""

    requests_per_minute: int | None = Field(default=None, ge=1, description="Requests in any 60 s.")
    characters_per_minute: int | None = Field(default=None, ge=1, description="Characters in any 60 s.")
    concurrent: int | None = Field(default=None, ge=1, description="Requests being answered at once.")


class TotalQuota(Quota):
    """What all callers together may ask for."""

    requests_per_minute: int | None = Field(default=1000, ge=1, description="Requests in any 60 s.")
    concurrent: int | None = Field(default=50, ge=1, description="Requests being answered at once.")


class AddressQuota(Quota):
    """What one address may ask for."""

    requests_per_minute: int | None = Field(default=100, ge=1, description="Requests in any 60 s.")


class ApiKey(Quota):
    """A caller who is known by a key. What is left out here is taken from ``limits.per_key``."""

    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the secret, in hexadecimal; never the secret."
    )
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Share under load, relative to other callers."
    )
    bulk_only: bool = Field(default=False, description="Every request of this key is bulk work.")


class LimitSettings(_Section):
    """What one request may ask for, and what callers may ask for together."""

    total: TotalQuota = Field(default_factory=TotalQuota, description="All callers together.")
    per_key: Quota = Field(default_factory=Quota, description="Each API key that has no limit of its own.")
    per_ip: AddressQuota = Field(
        default_factory=AddressQuota, description="Each address (IPv6: each /64) of callers without a key."
    )
    state: str = Field(
        default="leases",
        pattern=r"^(leases|rediss?://\S+)$",
        description="Where routers share what was used: 'leases' (an actor of this application) or a Redis "
        "URL, for several clusters behind one limit. Not changed while running.",
    )

    max_input_chars: int = Field(default=4096, ge=1, description="Longest text of one speech request.")
    max_body_bytes: int = Field(default=1 << 20, ge=1024, description="Largest JSON body.")
    max_batch_items: int = Field(default=32, ge=1, le=1024, description="Texts of one batch request.")
    max_batch_chars: int = Field(
        default=32_768, ge=1, description="Characters of all texts of one batch request."
    )
    max_queued_requests: int = Field(
        default=256, ge=1, description="Requests that may wait for their first audio from one engine."
    )
    max_queue_wait_s: float = Field(
        default=20.0, gt=0, description="A request that no engine begins within this long is answered 503."
    )
    max_redo_wait_s: float = Field(
        default=60.0, gt=0, description="Wait for another replica after one was lost while speaking."
    )
    look_ahead_utterances: int = Field(
        default=8, ge=1, le=256, description="Utterances of one request worked on at once."
    )
    look_ahead_s: float = Field(
        default=60.0, gt=0, description="Audio of one request made ahead of its reader; more waits for it."
    )
    shutdown_grace_s: float = Field(
        default=60.0, ge=0, description="Time running speeches get to end when the server is stopped."
    )
    stall_timeout_s: float = Field(
        default=300.0, gt=0, description="A reader that takes nothing for this long loses its connection."
    )
    first_audio_timeout_s: float = Field(
        default=25.0, gt=0, description="A request without sound after this long is answered 503."
    )


class LiveSettings(_Section):
    """Live sessions over a WebSocket."""

    max_sessions: int = Field(default=256, ge=1, description="Open sessions of one ingress replica.")
    config_timeout_s: float = Field(default=10.0, gt=0, description="Wait for the first message.")
    idle_timeout_s: float = Field(
        default=60.0, gt=0, description="A session in which nobody says anything for this long is closed."
    )
    max_pending_chars: int = Field(
        default=16_384, ge=1, description="Text of one session that may wait to be spoken."
    )


class BrowserSettings(_Section):
    """Which web pages may use the server. Programs other than browsers are not concerned."""

    allowed_origins: tuple[str, ...] = Field(
        default=(),
        description="Origins of pages that may open a live session beside the server's own: "
        "`https://app.example`; `*` is all.",
    )


class CacheSettings(_Section):
    """Finished audio kept for the next request that asks for the same."""

    max_mb: int = Field(default=0, ge=0, description="Memory of one router for finished audio; 0 is off.")
    unseeded: bool = Field(
        default=False,
        description="Cache requests without a seed too: the same text then always sounds the same.",
    )


class UserConfig(_Section):
    """What ``user_config`` of the router may change while the server runs: parts of the tree above it."""

    limits: dict[str, Any] = Field(default_factory=dict, description="Some of `limits`.")
    batching: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Some of `engines.NAME.batching`, by engine name."
    )


class Settings(BaseSettings):
    """Everything the server can be told."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix="VOICE_CLONE__",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    engines: dict[str, EngineSettings] = Field(
        default_factory=lambda: {"mosaic": EngineSettings()}, description="Served engines by name."
    )
    default_engine: str | None = Field(
        default=None, description="Engine of requests that name none; the first served one if left out."
    )
    model_aliases: dict[str, str] = Field(
        default_factory=dict, description="Extra names of engines: alias -> served name."
    )
    ingress: Replicas = Field(default_factory=Replicas, description="Copies of the HTTP front.")
    router: Replicas = Field(default_factory=Replicas, description="Copies of the router.")
    voices: VoiceSettings = Field(default_factory=VoiceSettings, description="Voices.")
    limits: LimitSettings = Field(default_factory=LimitSettings, description="Request limits.")
    live: LiveSettings = Field(default_factory=LiveSettings, description="Live sessions.")
    browsers: BrowserSettings = Field(
        default_factory=BrowserSettings, description="Web pages that may use the server."
    )
    cache: CacheSettings = Field(default_factory=CacheSettings, description="Cache of finished audio.")
    keys: dict[str, ApiKey] = Field(default_factory=dict, description="API keys by the name of their holder.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default_factory=lambda: os.environ.get("LOG_LEVEL", "INFO").upper(),
        validate_default=True,
        description="Least severe messages that replicas log; the variable `LOG_LEVEL` if left out.",
    )
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = Field(
        default=(),
        description="Addresses and networks of proxies in front, whose `X-Forwarded-For` is believed.",
    )

    _file: ClassVar[str] = CONFIG_VARIABLE

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then the YAML file."""
        yaml_file = os.environ.get(CONFIG_VARIABLE)
        return (init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=yaml_file))

    @field_validator("engines")
    @classmethod
    def _engines_exist(cls, engines: dict[str, EngineSettings]) -> dict[str, EngineSettings]:
        if not engines:
            raise ValueError("at least one engine must be served")
        for name, settings in engines.items():
            try:
                kind = engine_class(settings.engine or name)
            except EngineError as error:
                raise ValueError(str(error)) from error
            device = os.environ.get("DEVICE")
            if device and "device" in kind.Config.model_fields:
                settings.config.setdefault("device", device)
            kind.Config.model_validate(settings.config)
        return engines

    @field_validator("keys")
    @classmethod
    def _secrets_differ(cls, keys: dict[str, ApiKey]) -> dict[str, ApiKey]:
        holders: dict[str, str] = {}
        for name, key in keys.items():
            if key.sha256 in holders:
                raise ValueError(f"'{holders[key.sha256]}' and '{name}' have the same secret")
            holders[key.sha256] = name
        return keys

    @model_validator(mode="after")
    def _names_resolve(self) -> "Settings":
        names = {**self.model_aliases, "default_engine": self.default_name}
        for name, engine in self.engines.items():
            names.update({f"engines.{name}.fallback": target for target in engine.fallback})
        for name, target in names.items():
            if target not in self.engines:
                raise ValueError(f"'{name}' points to engine '{target}', which is not served")
        return self

    def reconfigured(self, user_config: dict[str, Any]) -> "Settings":
        """These settings with the parts of ``user_config`` in their place. Raises ``ConfigError``."""
        try:
            changes = UserConfig.model_validate(user_config)
            if unknown := sorted(set(changes.batching) - set(self.engines)):
                raise ConfigError(f"user_config: 'batching.{unknown[0]}': no such engine is served.")
            if fixed := [name for name, batching in changes.batching.items() if "form_in" in batching]:
                raise ConfigError(
                    f"user_config: 'batching.{fixed[0]}.form_in' cannot change while the server runs. "
                    "Set it in 'engines' and deploy again."
                )
            limits = LimitSettings.model_validate({**self.limits.model_dump(), **changes.limits})
            engines = {
                name: engine.model_copy(
                    update={
                        "batching": BatchSettings.model_validate(
                            {**engine.batching.model_dump(), **changes.batching.get(name, {})}
                        )
                    }
                )
                for name, engine in self.engines.items()
            }
        except ValidationError as error:
            raise ConfigError(describe(error, "user_config")) from error
        return self.model_copy(update={"limits": limits, "engines": engines})

    @property
    def default_name(self) -> str:
        """Name of the engine that speaks when a request names none."""
        return self.default_engine or next(iter(self.engines))

    def served_engine(self, model: str | None) -> str | None:
        """The served engine a client means by ``model``, or None if there is no such engine."""
        if model is None or model in self.engines:
            return model or self.default_name
        if model in self.model_aliases:
            return self.model_aliases[model]
        return self.default_name if model in OPENAI_MODELS else None


def load_settings(path: Path | None = None, **arguments: Any) -> Settings:
    """Read the settings. Raises ``ConfigError`` with source, key and reason in one sentence each."""
    if path is not None:
        os.environ[CONFIG_VARIABLE] = str(path)
    source = os.environ.get(CONFIG_VARIABLE)
    if source and not Path(source).is_file():
        raise ConfigError(
            f"The configuration file {source} does not exist. Fix the path or unset {CONFIG_VARIABLE}."
        )
    refuse_unknown_variables()
    try:
        return Settings(**arguments)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    except ValidationError as error:
        raise ConfigError(describe(error, source or "the arguments or the environment")) from error


def refuse_unknown_variables() -> None:
    """Raise ``ConfigError`` for a ``VOICE_CLONE__`` variable that names no setting.

    pydantic-settings only looks up the variables it knows, so a misspelt one would be silently ignored.
    """
    prefix = "VOICE_CLONE__"
    for variable in os.environ:
        section = variable.removeprefix(prefix).split("__")[0].lower()
        if variable.startswith(prefix) and section not in Settings.model_fields:
            known = ", ".join(sorted(Settings.model_fields))
            raise ConfigError(
                f"Environment variable {variable}: there is no section '{section}'. Sections: {known}."
            )


def describe(error: ValidationError, source: str) -> str:
    """All findings of a validation as sentences that name source and key."""
    findings = []
    for finding in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in finding["loc"]) or "(top level)"
        reason = "is not a known key" if finding["type"] == "extra_forbidden" else finding["msg"]
        findings.append(f"{source}: '{key}': {reason}.")
    return "\n".join(findings)


def reference() -> str:
    """Every setting with its default and meaning, as Markdown tables, one per section."""
    engines = [(f"engines.{name}.config", engine_class(name).Config) for name in engine_names()]
    sections: list[tuple[str, type[BaseModel]]] = [("", Settings), *engines]
    lines: list[str] = []
    while sections:
        path, model = sections.pop(0)
        lines += [
            f"## `{path}`" if path else "## Top level",
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for name, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            inner = _section_of(field.annotation)
            if inner is not None:
                key = f"{path}.{name}" if path else name
                sections.append((f"{key}.NAME" if get_origin(field.annotation) is dict else key, inner))
            sections.extend((f"{path}.{name}[{kind}]", entry) for kind, entry in _kinds_of(field.annotation))
            if field.is_required():
                shown = "required"
            else:
                shown = "see below" if isinstance(default, BaseModel) else _as_yaml(default)
            lines.append(f"| `{name}` | {shown} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The model behind an annotation that is one, or that is a mapping of names to one."""
    candidates = (annotation, *get_args(annotation))
    models = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return models[0] if models else None


def _kinds_of(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """The models of a list whose entries say by ``kind`` which of them they are."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if kind := annotation.model_fields.get("kind"):
            yield get_args(kind.annotation)[0], annotation
        return
    for part in get_args(annotation):
        yield from _kinds_of(part)


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict) and any(isinstance(item, BaseModel) for item in value.values()):
        value = {name: {} for name in value}
    if isinstance(value, tuple):
        value = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    shown = yaml.safe_dump(value, default_flow_style=True, width=1000)
    # PyYAML ends a bare scalar with a document marker.
    return f"`{shown.removesuffix('...' + chr(10)).strip()}`"
