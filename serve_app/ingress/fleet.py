"""Fleet: the replicas of all engines as Ray Serve and they themselves see them, and how many there shall be.

Serve's public ``status()`` counts replicas; the details it is made of name them. Asking for them blocks, and
costs the controller some milliseconds: it is done in a thread, and what comes back is good for a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.common import DeploymentID
from ray.serve._private.exceptions import ExternalScalerDisabledError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from serve_app.config import EngineSettings
from serve_app.errors import NodeNotFound, ScalesItself, Unavailable, VoiceCloneError
from serve_app.handle import RouterHandle
from serve_app.protocol import ReplicaFigures

_FRESH_S = 1.0


class NodeStatus(StrEnum):
    """States of a worker of the v3 system."""

    STANDBY = "standby"
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    ERROR = "error"
    OFFLINE = "offline"


#: Serve's states of a replica; what is missing is loading in one way or another.
_STATUS = {"RUNNING": NodeStatus.READY, "STOPPING": NodeStatus.OFFLINE, "STOPPED": NodeStatus.OFFLINE}
_FAILED = ("UNHEALTHY", "DEPLOY_FAILED")
ONLINE = (NodeStatus.READY, NodeStatus.BUSY)


@dataclass(frozen=True, slots=True)
class Node:
    """One replica; or, for an engine that has none, the engine."""

    node_id: str
    engine: str
    status: NodeStatus
    host: str = ""
    started_at: float = 0.0
    figures: ReplicaFigures | None = None

    @property
    def is_online(self) -> bool:
        """True if it can be spoken with."""
        return self.status in ONLINE


def _client() -> ServeControllerClient:
    client = _get_global_client()
    if client is None:
        raise RayServeException("There is no controller.")
    return client


class Controller:
    """Serve's controller, as far as the fleet needs it. Its methods block."""

    def deployments(self) -> Mapping[str, Any]:
        """Deployments of this application by name, in the form of Serve's ``DeploymentDetails``."""
        details = _client().get_serve_details()
        deployments: Mapping[str, Any] = details["applications"][_app_name()]["deployments"]
        return deployments

    def scale(self, deployment: str, replicas: int) -> None:
        """Have so many replicas, until the application is deployed again."""
        controller = _client()._controller
        ray.get(controller.update_deployment_replicas.remote(DeploymentID(deployment, _app_name()), replicas))


class Fleet:
    """All replicas, and one hand on their number."""

    def __init__(
        self,
        router: RouterHandle,
        engines: Mapping[str, EngineSettings],
        controller: Controller | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._router = router
        self._engines = engines
        self._controller = controller or Controller()
        self._now_s = now_s
        self._asking: asyncio.Task[tuple[Node, ...]] | None = None
        self._asked_s = 0.0

    async def nodes(self) -> tuple[Node, ...]:
        """All nodes, by engine; at most a second old. Raises ``Unavailable`` if Serve does not answer."""
        if self._asking is None or self._now_s() - self._asked_s > _FRESH_S:
            self._asked_s = self._now_s()
            self._asking = asyncio.create_task(self._look())
        # One look is for all who ask meanwhile: none of them may take it with them when they leave.
        return await asyncio.shield(self._asking)

    async def node(self, node_id: str) -> Node:
        """One node by its id, or by the name of an engine the first of it. Raises ``NodeNotFound``."""
        for node in await self.nodes():
            if node_id in (node.node_id, node.engine):
                return node
        raise NodeNotFound("There is no such node. List them: GET /api/nodes.", param="node_id")

    async def activate(self, engine: str) -> None:
        """Have the configured number of replicas of ``engine``, at least one."""
        await self._scale(engine, max(1, self._engines[engine].replicas.min_replicas))

    async def stand_by(self, engine: str) -> None:
        """Have no replica of ``engine``: its memory is free, and it speaks no more until it is activated."""
        await self._scale(engine, 0)

    async def _scale(self, engine: str, replicas: int) -> None:
        configured = self._engines[engine].replicas
        if configured.min_replicas != configured.max_replicas:
            raise ScalesItself(
                f"Engine '{engine}' has {configured.min_replicas} to {configured.max_replicas} replicas, as "
                "its load demands. To command it, configure equal 'min_replicas' and 'max_replicas'."
            )
        try:
            await asyncio.to_thread(self._controller.scale, _deployment(engine), replicas)
        except ExternalScalerDisabledError as error:
            raise ScalesItself(
                "This application is deployed so that nobody may scale it. "
                "Deploy it with 'external_scaler_enabled: true'."
            ) from error
        except (RayError, RayServeException) as error:
            raise _no_answer() from error
        # What was seen before is no longer so.
        self._asking = None

    async def _look(self) -> tuple[Node, ...]:
        try:
            deployments, figures = await asyncio.gather(
                asyncio.to_thread(self._controller.deployments), self._router.replica_figures()
            )
        except (RayError, RayServeException, KeyError) as error:
            raise _no_answer() from error
        by_replica = {one.replica: one for answers in figures.values() for one in answers}
        return tuple(
            node
            for engine in self._engines
            for node in _nodes(engine, deployments.get(_deployment(engine), {}), by_replica)
        )


def _nodes(engine: str, details: Mapping[str, Any], figures: Mapping[str, ReplicaFigures]) -> list[Node]:
    nodes = []
    for replica in details.get("replicas", ()):
        known = figures.get(replica["replica_id"])
        status = _STATUS.get(_text(replica["state"]), NodeStatus.LOADING)
        if status is NodeStatus.READY and known is not None and known.rows_open >= known.slots:
            status = NodeStatus.BUSY
        nodes.append(
            Node(
                node_id=replica["replica_id"],
                engine=engine,
                status=status,
                host=replica.get("node_ip") or "",
                started_at=replica.get("start_time_s") or 0.0,
                figures=known,
            )
        )
    if not nodes:
        failed = _text(details.get("status", "")) in _FAILED
        nodes.append(Node(engine, engine, NodeStatus.ERROR if failed else NodeStatus.STANDBY))
    return nodes


def _text(state: object) -> str:
    """Serve's states are enumerations or their values, by the way they came."""
    return str(getattr(state, "value", state))


def _deployment(engine: str) -> str:
    return f"engine-{engine}"


def _app_name() -> str:
    return serve.get_replica_context().app_name


def _no_answer() -> VoiceCloneError:
    return Unavailable("Ray Serve does not say what runs. Try again in a moment.", retry_after_s=1.0)
