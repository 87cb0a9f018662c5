"""The operators' side of v3: status, nodes, announcements, and ``/ws``, which tells of their changes.

A node is a replica of an engine, and Ray Serve's controller is the registry: nodes come and go by its
decision, their states are named as they were. What workers of the old system called, to register and to send
heartbeats, is gone and says so.

Messages of ``/ws`` are JSON objects with ``type``, ``data`` and ``timestamp``:

- server: ``system_status`` at once, every two seconds and when asked for; ``node_online``, ``node_offline``
  and ``node_status_changed``; ``announcement`` for each new one; ``request_start``, ``request_complete`` and
  ``request_error`` as batches of the same caller advance; ``pong``.
- client: ``{"type": "ping"}``, ``{"type": "get_status"}``. Anything else is passed over.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, Field

from serve_app.errors import Gone, Unavailable, UnsupportedOption, VoiceCloneError
from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.ingress.fleet import Fleet, Node, NodeStatus
from serve_app.protocol import BatchProgress, Caller
from serve_app.voices.announcements import Announcement

#: What the old gateway took; each client costs a status in that time.
_STATUS_EVERY_S = 2.0
_WATCH_EVERY_S = 1.0
#: Sockets of one ingress replica. Each is a task that asks a router every second.
_MOST_SOCKETS = 200
_MOST_MESSAGE_CHARS = 1000
_TRY_AGAIN_LATER = 1013
_STARTED_S = time.monotonic()

NodeId = Annotated[str, Path(max_length=200)]


class CommandBody(BaseModel):
    """Body of ``POST /api/nodes/{node_id}/command``."""

    command: Literal["activate", "load_model", "standby", "unload_model", "start", "stop"]
    params: dict[str, Any] = Field(default_factory=dict, description="Ignored: no command takes any.")


def routes(router: RouterHandle, callers: Callers, fleet: Fleet) -> APIRouter:
    """Status, nodes, commands, announcements and ``/ws``."""
    api = APIRouter(tags=["v3 operations"])
    watcher = _Watcher(router, fleet)

    @api.get("/api/health")
    async def health(response: Response) -> dict[str, Any]:
        """Whether anything can be spoken with; 503 if not."""
        nodes = await fleet.nodes()
        online = [node for node in nodes if node.status is not NodeStatus.STANDBY]
        ready = [node for node in nodes if node.is_online]
        status = "healthy" if ready else "degraded" if online else "unhealthy"
        if status == "unhealthy":
            response.status_code = Unavailable.status
        figures = await router.figures()
        return {
            "status": status,
            "version": version("voice-clone-tts"),
            "uptime_seconds": time.monotonic() - _STARTED_S,
            "timestamp": time.time(),
            "components": {
                "registry": {
                    "total_nodes": len(nodes),
                    "online_nodes": len(online),
                    "ready_nodes": len(ready),
                },
                "limiter": {"current_concurrent": figures.running},
            },
        }

    @api.get("/api/status")
    async def status() -> dict[str, Any]:
        """Counts of nodes and requests, and the announcements."""
        return await watcher.status()

    @api.get("/api/nodes")
    async def list_nodes(
        engine: Annotated[str | None, Query(max_length=100)] = None,
        status: Annotated[NodeStatus | None, Query()] = None,
    ) -> dict[str, Any]:
        """The replicas of all engines; an engine that has none is one node in standby."""
        nodes = [
            node
            for node in await fleet.nodes()
            if engine in (None, node.engine) and status in (None, node.status)
        ]
        return {"nodes": [_node_info(node) for node in nodes]}

    @api.get("/api/nodes/{node_id}")
    async def get_node(node_id: NodeId) -> dict[str, Any]:
        """One node by its id, or the first of an engine by the engine's name."""
        return _node_info(await fleet.node(node_id))

    @api.post("/api/nodes/{node_id}/command")
    async def command(node_id: NodeId, body: CommandBody) -> dict[str, Any]:
        """Activate the engine of a node, or have it stand by. It is for all nodes of that engine."""
        node = await fleet.node(node_id)
        if body.command in ("start", "stop"):
            raise UnsupportedOption(
                "Ray Serve starts replicas and replaces those that stop. Use 'activate' or 'standby'.",
                param="command",
            )
        if body.command in ("activate", "load_model"):
            await fleet.activate(node.engine)
        else:
            await fleet.stand_by(node.engine)
        return {"success": True, "engine": node.engine}

    @api.post("/api/nodes/register")
    @api.delete("/api/nodes/{node_id}")
    @api.post("/api/nodes/{node_id}/heartbeat")
    async def of_workers() -> None:
        """What workers of the old system called."""
        raise Gone(
            "Workers register no more: Ray Serve starts the replicas of the engines in the configuration. "
            "To add a machine, join it to the Ray cluster."
        )

    @api.get("/api/announcements")
    async def list_announcements() -> dict[str, Any]:
        """What is announced and not over."""
        return {"announcements": [one.model_dump(mode="json") for one in await router.announcements()]}

    @api.post("/api/announcements")
    async def announce(body: Announcement) -> dict[str, Any]:
        """Announce something; it is kept until it expires or is deleted."""
        await router.announce(body)
        return {"success": True, "id": body.id}

    @api.delete("/api/announcements/{announcement_id}")
    async def withdraw(announcement_id: str) -> dict[str, Any]:
        """Remove an announcement."""
        await router.withdraw(announcement_id)
        return {"success": True}

    @api.websocket("/ws")
    async def watch(socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols", [])
        await socket.accept(offered[0] if offered else None)
        await watcher.serve(socket, callers.caller(socket.scope))

    return api


class _Watcher:
    """Tells those who watch what has changed."""

    def __init__(self, router: RouterHandle, fleet: Fleet) -> None:
        self._router = router
        self._fleet = fleet
        self._sockets = 0

    async def status(self) -> dict[str, Any]:
        nodes = await self._fleet.nodes()
        figures, announcements = await asyncio.gather(self._router.figures(), self._router.announcements())
        engines: dict[str, dict[str, int]] = {}
        for node in nodes:
            counts = engines.setdefault(node.engine, {"total": 0, "online": 0, "ready": 0})
            counts["total"] += 1
            counts["online"] += node.is_online
            counts["ready"] += node.status is NodeStatus.READY
        return {
            "online_nodes": sum(node.is_online for node in nodes),
            "total_nodes": len(nodes),
            "total_requests": figures.answered + figures.running,
            "current_concurrent": figures.running,
            "avg_response_time_ms": 1000 * figures.answering_s / figures.answered
            if figures.answered
            else 0.0,
            "engines": engines,
            "announcements": [one.model_dump(mode="json") for one in announcements],
        }

    async def serve(self, socket: WebSocket, caller: Caller) -> None:
        """Talk to one client until it leaves."""
        if self._sockets >= _MOST_SOCKETS:
            await socket.close(_TRY_AGAIN_LATER, "too many watch already")
            return
        self._sockets += 1
        # Reading beside writing: one that only writes never learns that its client has gone.
        reading = asyncio.create_task(self._answer(socket))
        writing = asyncio.create_task(self._tell(socket, caller))
        try:
            done, _ = await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._sockets -= 1
            reading.cancel()
            writing.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
        for task in done:
            error = None if task.cancelled() else task.exception()
            # What a socket raises that its client has closed is no defect.
            if error is not None and not isinstance(error, (WebSocketDisconnect, RuntimeError)):
                raise error

    async def _answer(self, socket: WebSocket) -> None:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            wanted = _type_of(message.get("text") or "")
            if wanted == "ping":
                await socket.send_json({"type": "pong"})
            elif wanted == "get_status":
                await self._send_status(socket)

    async def _send_status(self, socket: WebSocket) -> None:
        # If Serve or the routers are away, the next one may come through.
        with suppress(VoiceCloneError):
            await _send(socket, "system_status", await self.status())

    async def _tell(self, socket: WebSocket, caller: Caller) -> None:
        nodes: dict[str, Node] | None = None
        announced: set[str] | None = None
        batches: dict[str, BatchProgress] = {}
        status_due_s = 0.0
        while True:
            if time.monotonic() >= status_due_s:
                status_due_s = time.monotonic() + _STATUS_EVERY_S
                await self._send_status(socket)
            try:
                # An engine in standby is no node that could come or go.
                now = {
                    node.node_id: node
                    for node in await self._fleet.nodes()
                    if node.status is not NodeStatus.STANDBY
                }
                current = await self._router.announcements()
                mine = {one.request_id: one for one in await self._router.batches(caller)}
            except VoiceCloneError:
                await asyncio.sleep(_WATCH_EVERY_S)
                continue
            for kind, data in _changes(nodes, now):
                await _send(socket, kind, data)
            for announcement in current:
                if announced is not None and announcement.id not in announced:
                    await _send(socket, "announcement", announcement.model_dump(mode="json"))
            for kind, data in _progress(batches, mine):
                await _send(socket, kind, data)
            nodes, announced, batches = now, {one.id for one in current}, mine
            await asyncio.sleep(_WATCH_EVERY_S)


async def _send(socket: WebSocket, kind: str, data: Mapping[str, Any]) -> None:
    await socket.send_json({"type": kind, "data": data, "timestamp": time.time()})


def _type_of(text: str) -> object:
    """The ``type`` of a message of a client; None for what is none."""
    if len(text) > _MOST_MESSAGE_CHARS:
        return None
    try:
        message = json.loads(text)
    except ValueError:
        return None
    return message.get("type") if isinstance(message, dict) else None


def _changes(before: Mapping[str, Node] | None, now: Mapping[str, Node]) -> list[tuple[str, dict[str, Any]]]:
    if before is None:
        return []
    changes: list[tuple[str, dict[str, Any]]] = []
    for node_id in now.keys() | before.keys():
        new, old = now.get(node_id), before.get(node_id)
        if new is None:
            changes.append(("node_offline", {"node_id": node_id}))
        elif old is None:
            data = {"node_id": node_id, "engine_type": new.engine, "status": new.status}
            changes.append(("node_online", data))
        elif new.status != old.status:
            data = {"node_id": node_id, "old_status": old.status, "new_status": new.status}
            changes.append(("node_status_changed", data))
    return changes


def _progress(
    before: Mapping[str, BatchProgress], now: Mapping[str, BatchProgress]
) -> list[tuple[str, dict[str, Any]]]:
    """One event for each batch that has begun or come further; how many texts that were is in it."""
    events: list[tuple[str, dict[str, Any]]] = []
    for request_id, batch in now.items():
        old = before.get(request_id)
        if old == batch:
            continue
        has_failed = batch.failed > (old.failed if old else 0)
        has_spoken = batch.succeeded > (old.succeeded if old else 0)
        kind = "request_error" if has_failed else "request_complete" if has_spoken else "request_start"
        data = {
            "request_id": request_id,
            "total": batch.total,
            "succeeded": batch.succeeded,
            "failed": batch.failed,
        }
        events.append((kind, data))
    return events


def _node_info(node: Node) -> dict[str, Any]:
    """A node in the fields of the v3 gateway. What nobody measures is null: it was always 0 there too."""
    figures = node.figures
    spoken = figures.spoken if figures else 0
    failed = figures.failed if figures else 0
    return {
        "node_id": node.node_id,
        "engine_type": node.engine,
        "host": node.host,
        # Replicas are reached through Ray, not at a port of their own.
        "port": 0,
        "status": node.status,
        "model_loaded": node.is_online,
        "registered_at": node.started_at,
        "last_heartbeat": time.time(),
        "cpu_percent": 100 * figures.cpu_s / figures.uptime_s if figures else None,
        "memory_percent": figures.memory_percent if figures else None,
        "gpu_percent": None,
        "gpu_memory_percent": None,
        "request_count": spoken + failed,
        "error_count": failed,
        "avg_response_time": figures.busy_s / spoken if figures and spoken else 0.0,
        "current_concurrent": figures.rows_open if figures else 0,
    }
