"""The ``voice-clone`` command: serve, speak, voices, models, doctor."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engines.contract import EngineError
from engines.weights import weights_dir
from serve_app.client import SAVED_AS, HttpClient
from serve_app.config import ConfigError, Settings, load_settings, reference
from serve_app.environment import prepare_environment
from serve_app.errors import VoiceCloneError
from serve_app.models import GOOD, PullFailed, Weights, check, files_here, load_catalogue, pull
from serve_app.voices.store import StoreNotUsable

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Voice Clone TTS.")
voices_app = typer.Typer(no_args_is_help=True, help="Enrol, list and delete voices.")
app.add_typer(voices_app, name="voices")
models_app = typer.Typer(no_args_is_help=True, help="Fetch and check the weights of engines.")
app.add_typer(models_app, name="models")

#: People read standard error; standard output carries results only, so that it can be piped.
console = Console(stderr=True)
out = Console()

ServerOption = Annotated[
    str, typer.Option("--server", envvar="VOICE_CLONE_SERVER", help="Root URL of the server.")
]
DEFAULT_SERVER = "http://127.0.0.1:8000"


def _audio_path(path: Path) -> Path:
    """Refuse a file that could not be written before anything is spoken for it."""
    if path.suffix.lower() not in SAVED_AS:
        raise typer.BadParameter(f"must end in one of {' '.join(SAVED_AS)}")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"the directory {path.absolute().parent} does not exist")
    return path


def main() -> None:
    """Entry point: what can go wrong is said in a sentence, with exit status 1."""
    try:
        app()
    except (VoiceCloneError, ConfigError, StoreNotUsable, EngineError, PullFailed, OSError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file with the settings tree.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="GATEWAY_PORT", help="Port to listen on.")] = 8000,
    address: Annotated[
        str, typer.Option(help="'local' starts Ray here; 'auto' or HOST:PORT joins one that runs.")
    ] = "local",
) -> None:
    """Start the graph on this machine and serve until interrupted."""
    prepare_environment()
    from serve_app.server import run_server

    run_server(_settings(config), host=host, port=port, address=address, console=console)


@app.command()
def speak(
    text: Annotated[str, typer.Argument(help="What to say.")],
    voice: Annotated[str, typer.Option(help="Id, name or alias of an enrolled voice.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=_audio_path, help="File to write: .wav .flac .mp3 .ogg")
    ],
    engine: Annotated[str | None, typer.Option(help="Engine; default the server's.")] = None,
    language: Annotated[str | None, typer.Option(help="BCP-47; default found from the text.")] = None,
    speed: Annotated[float, typer.Option(min=0.25, max=4.0, help="Speaking rate.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same samples.")] = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Speak a text in a voice and write the audio to a file."""
    with HttpClient(server) as tts, console.status("Speaking…"):
        speech = tts.speak(text, voice, engine=engine, language=language, speed=speed, seed=seed)
        path = speech.save(output)
    console.print(f"{path}: {speech.duration_s:.1f} s by {speech.engine}, seed {speech.seed}")


@voices_app.command("add")
def voices_add(
    name: Annotated[str, typer.Argument(help="Name of the new voice.")],
    recording: Annotated[Path, typer.Argument(help="Recording of one speaker, 1 to 30 s.")],
    consent: Annotated[str, typer.Option(help="The speaker's consent statement.")] = "",
    transcript: Annotated[str, typer.Option(help="What is said in the recording.")] = "",
    language: Annotated[str, typer.Option(help="BCP-47 language of the recording.")] = "",
    replace: Annotated[bool, typer.Option(help="Replace a voice of this name.")] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Enrol a voice; its id goes to standard output."""
    with HttpClient(server) as tts, console.status("Enrolling…"):
        voice = tts.enrol(
            name, recording, consent=consent, transcript=transcript, language=language, replace=replace
        )
    for warning in voice.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    out.print(voice.id)


@voices_app.command("list")
def voices_list(server: ServerOption = DEFAULT_SERVER) -> None:
    """List the enrolled voices, and those that come with an engine."""
    with HttpClient(server) as tts:
        voices = tts.voices()
    table = Table("id", "name", "language", "seconds", "engine")
    for voice in voices:
        seconds = f"{voice.duration_s:.1f}" if voice.duration_s else ""
        table.add_row(voice.id, voice.name, voice.language, seconds, voice.engine or "any")
    out.print(table)


@voices_app.command("delete")
def voices_delete(
    voice: Annotated[str, typer.Argument(help="Id or name.")], server: ServerOption = DEFAULT_SERVER
) -> None:
    """Delete a voice."""
    with HttpClient(server) as tts:
        tts.delete_voice(voice)


EngineArgument = Annotated[str, typer.Argument(help="Engine the weights belong to.")]


@models_app.command("list")
def models_list() -> None:
    """List the weights that can be fetched, and which are here."""
    table = Table("engine", "files here", "MB", "licence")
    for engine, weights in load_catalogue().items():
        here = f"{files_here(weights, weights_dir(engine))} of {len(weights.files)}"
        table.add_row(engine, here, f"{weights.size_bytes / 1e6:.0f}", weights.licence.name)
    out.print(table)


@models_app.command("pull")
def models_pull(
    engine: EngineArgument,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="You accept the licence of these weights.")
    ] = False,
) -> None:
    """Fetch the weights of an engine, or what is missing of them, and check them."""
    weights = _weights(engine)
    folder = weights_dir(engine)
    pull(
        engine,
        weights,
        folder,
        accept_licence=accept_license,
        say=lambda sentence: console.print(sentence, highlight=False),
    )
    console.print(f"The weights of '{engine}' are in {folder}", highlight=False, soft_wrap=True)


@models_app.command("verify")
def models_verify(engine: EngineArgument) -> None:
    """Compare the weights of an engine with the catalogue; exit status 1 if any file is missing or wrong."""
    states = []
    for file, state in check(_weights(engine), weights_dir(engine)):
        out.print(f"{file.path}: {state}", highlight=False)
        states.append(state)
    if any(state not in GOOD for state in states):
        raise typer.Exit(1)


@models_app.command("path")
def models_path(engine: EngineArgument) -> None:
    """Print the folder the weights of an engine lie in."""
    _weights(engine)
    typer.echo(weights_dir(engine))


@app.command()
def settings() -> None:
    """Print every setting with its default and meaning, as Markdown."""
    typer.echo(reference())


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="YAML file with the settings tree.")] = None,
    port: Annotated[int, typer.Option(envvar="GATEWAY_PORT", help="Port the server would use.")] = 8000,
) -> None:
    """Look for what would stop the server here; each finding comes with its fix."""
    from serve_app.doctor import examine

    findings = list(examine(_settings(config), port=port))
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[red]FAIL[/red]"
        out.print(f"{mark} {finding.subject}: {finding.detail}", highlight=False, soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _settings(config: Path | None) -> Settings:
    if config is not None:
        os.environ["VOICE_CLONE_CONFIG"] = str(config.resolve())
    return load_settings()


def _weights(engine: str) -> Weights:
    catalogue = load_catalogue()
    if engine not in catalogue:
        raise typer.BadParameter(
            f"there are no weights for '{engine}'; there are for: {', '.join(catalogue)}"
        )
    return catalogue[engine]
