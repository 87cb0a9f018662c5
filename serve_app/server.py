"""Run the graph from a terminal: checks first, then Ray, then Serve, then wait for a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from ipaddress import ip_address
from pathlib import Path

import ray
from ray import serve
from ray._common.utils import get_ray_address_file, reset_ray_address
from ray._private.utils import write_ray_address
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from rich.console import Console

from serve_app.app import APP_NAME, build_app, router_handle
from serve_app.config import ConfigError, Settings, load_settings
from serve_app.errors import Unavailable
from serve_app.handle import RouterHandle
from serve_app.voices.store import VoiceStore


def check_port(host: str, port: int) -> None:
    """Raise ``ConfigError`` if the port cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Port {port} on {host} cannot be used ({error.strerror}). "
                f"Stop what listens there, or choose another with --port."
            ) from error


def exposure(settings: Settings, host: str) -> str | None:
    """What to tell whoever starts a server that others can reach and that asks nobody who they are."""
    try:
        reachable = not ip_address(host).is_loopback
    except ValueError:
        reachable = host != "localhost"
    if not reachable or settings.keys:
        return None
    return (
        f"Everybody who can reach {host} can speak, enrol and delete voices: there are no API keys. "
        "Make one with 'voice-clone keys new NAME'."
    )


def check_ray(address: str) -> None:
    """Raise ``ConfigError`` if starting Ray here would surprise the user."""
    other = os.environ.get("RAY_ADDRESS")
    if other and address == "local":
        raise ConfigError(
            f"RAY_ADDRESS points to {other}. "
            f"Unset it to start Ray here, or pass --address {other} to join it."
        )
    running = running_cluster()
    if running and address == "local":
        raise ConfigError(
            f"Ray is already running on this machine at {running}. "
            f"Pass --address {running} to join it, or stop it with 'ray stop'."
        )


def running_cluster() -> str | None:
    """Address of a Ray head that answers on this machine, if there is one."""
    try:
        # Written by whoever starts a cluster; names the newest one on this machine.
        address = Path(get_ray_address_file(None)).read_text().strip()
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=1.0):
            return address
    except (OSError, ValueError):
        # No file, a stale file or a dead head: nothing runs.
        return None


def ensure_graph(settings: Settings | None = None) -> None:
    """Have a graph in reach of this process: the one that runs, or a new one. For notebooks and scripts.

    Joins a Ray that runs on this machine or at ``RAY_ADDRESS``, else starts one. A new graph is reached by
    handle only (``serve_app.client.HandleClient``): no port is opened.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or running_cluster() or "local"
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    if APP_NAME not in serve.status().applications:
        serve.start(proxy_location=ProxyLocation.Disabled)
        serve.run(build_app(settings or load_settings()), name=APP_NAME, external_scaler_enabled=True)


def run_server(settings: Settings, *, host: str, port: int, address: str, console: Console) -> None:
    """Serve until SIGINT or SIGTERM. Raises ``ConfigError`` for what the user can mend."""
    check_ray(address)
    check_port(host, port)
    asyncio.run(VoiceStore.open(settings.voices.store).check())
    stop = threading.Event()
    _stop_on_signals(stop)
    with console.status("Starting Ray…"):
        _start_ray(address)
    try:
        with console.status("Loading engines…"):
            _start_graph(settings, host, port)
        # `serve.run` installs handlers of its own; ours must be the last word.
        _stop_on_signals(stop)
        console.print(f"Voice Clone TTS listens on http://{host}:{port} ({', '.join(settings.engines)}).")
        if warning := exposure(settings, host):
            console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
        console.print("Stop with Ctrl-C.")
        stop.wait()
        with console.status("Finishing running speeches…"):
            _finish(settings.limits.shutdown_grace_s, console)
    finally:
        with console.status("Stopping…"):
            # Serve calls it an error that the loop its handle was used in has ended.
            logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
            serve.delete(APP_NAME)
            if address == "local":
                reset_ray_address()
            # Ends a Ray that was started here, and only lets go of one that was joined.
            ray.shutdown()


def _finish(grace_s: float, console: Console) -> None:
    """Let running speeches end before the graph is taken down; a second signal does not shorten it."""

    async def drain() -> int:
        # Made inside the loop: in Serve's throughput mode a handle belongs to the loop that runs.
        return await RouterHandle(router_handle()).drain(grace_s)

    try:
        left = asyncio.run(drain())
    except Unavailable as error:
        console.print(f"Running speeches could not be waited for: {error.message}")
    else:
        if left:
            console.print(f"{left} speeches did not end within {grace_s:g} s and are cut off.")


def _stop_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _start_ray(address: str) -> None:
    for attempts_left in (1, 0):
        try:
            ray.init(
                address=address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            raise ConfigError(
                f"No Ray answers at {address}. Check the address, or pass --address local."
            ) from error
        except Exception as error:
            # Ray raises a bare exception if a busy machine needs longer than its daemons are given; its files
            # are in the page cache by then, so a second start is quicker.
            ray.shutdown()
            if not attempts_left:
                raise ConfigError(f"Ray could not be started: {error} Try again.") from error
        else:
            if address == "local":
                # Ray announces only what `ray start` made; notebooks and a second server look for ours.
                write_ray_address(ray.get_runtime_context().gcs_address)
            return


def _start_graph(settings: Settings, host: str, port: int) -> None:
    # What this process does is said by `run_server`; what the replicas do is in Ray's log directory.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port))
        # So that operators can have an engine stand by.
        serve.run(build_app(settings), name=APP_NAME, external_scaler_enabled=True)
    except (RuntimeError, TimeoutError, RayError) as error:
        # Ray's message carries the traceback of the process that failed; its last line is the reason.
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"The graph could not be started: {reason}") from error
