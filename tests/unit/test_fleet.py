"""Nodes: what Serve and the replicas say about themselves, in the words of the v3 gateway."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from ray.serve._private.common import ReplicaState
from ray.serve._private.exceptions import ExternalScalerDisabledError
from ray.serve.exceptions import RayServeException

from serve_app.config import EngineSettings
from serve_app.errors import NodeNotFound, ScalesItself, Unavailable
from serve_app.ingress.fleet import Controller, Fleet, NodeStatus
from serve_app.protocol import ReplicaFigures


def figures(replica: str, rows_open: int = 0, slots: int = 2) -> ReplicaFigures:
    return ReplicaFigures(
        replica,
        cpu_s=1,
        uptime_s=4,
        memory_percent=2,
        rows_open=rows_open,
        slots=slots,
        spoken=3,
        failed=1,
        busy_s=6,
    )


class FakeController(Controller):
    """Serve, as this test says it is."""

    def __init__(self, **engines: Any) -> None:
        self.engines = engines
        self.asked = 0
        self.scaled: list[tuple[str, int]] = []
        self.error: Exception | None = None
        self.threads: set[int] = set()

    def deployments(self) -> dict[str, Any]:
        self.asked += 1
        self.threads.add(threading.get_ident())
        if self.error:
            raise self.error
        return {f"engine-{name}": details for name, details in self.engines.items()}

    def scale(self, deployment: str, replicas: int) -> None:
        if self.error:
            raise self.error
        self.scaled.append((deployment, replicas))


def replica(replica_id: str, state: object = "RUNNING") -> dict[str, Any]:
    return {"replica_id": replica_id, "state": state, "node_ip": "10.0.0.1", "start_time_s": 7.0, "pid": 1}


class Clock:
    now_s = 100.0


def fleet_of(
    controller: FakeController, known: list[ReplicaFigures] | None = None, **replicas: int
) -> tuple[Fleet, Clock]:
    class Router:
        async def replica_figures(self) -> dict[str, list[ReplicaFigures]]:
            return {"tone": known or []}

    router: Any = Router()
    engines = {
        name: EngineSettings.model_validate({"engine": "tone", "replicas": replicas})
        for name in controller.engines
    }
    clock = Clock()
    return Fleet(router, engines, controller, lambda: clock.now_s), clock


@pytest.mark.parametrize(
    ("state", "known", "status"),
    [
        ("STARTING", None, "loading"),
        ("RECOVERING", None, "loading"),
        ("UPDATING", None, "loading"),
        ("PENDING_MIGRATION", None, "loading"),
        ("RUNNING", None, "ready"),
        (ReplicaState.RUNNING, None, "ready"),
        ("RUNNING", figures("ab", 1), "ready"),
        ("RUNNING", figures("ab", 2), "busy"),
        ("STARTING", figures("ab", 2), "loading"),
        ("STOPPING", None, "offline"),
        (ReplicaState.STOPPING, figures("ab"), "offline"),
    ],
)
async def test_states_have_their_old_names(state: object, known: ReplicaFigures | None, status: str) -> None:
    controller = FakeController(tone={"status": "HEALTHY", "replicas": [replica("ab", state)]})
    fleet, _ = fleet_of(controller, [known] if known else None)
    (node,) = await fleet.nodes()
    assert (node.node_id, node.engine, node.status, node.host) == ("ab", "tone", status, "10.0.0.1")
    assert node.is_online == (status in ("ready", "busy"))
    assert node.figures == known


@pytest.mark.parametrize(
    ("details", "status"),
    [
        ({"status": "HEALTHY", "replicas": []}, NodeStatus.STANDBY),
        ({"status": "UNHEALTHY", "replicas": []}, NodeStatus.ERROR),
        ({"status": "DEPLOY_FAILED", "replicas": []}, NodeStatus.ERROR),
        ({}, NodeStatus.STANDBY),
    ],
)
async def test_an_engine_without_replicas_is_a_node_to_command(
    details: dict[str, Any], status: NodeStatus
) -> None:
    fleet, _ = fleet_of(FakeController(tone=details))
    (node,) = await fleet.nodes()
    assert (node.node_id, node.status) == ("tone", status)


async def test_serve_is_asked_once_a_second_in_a_thread_however_many_ask() -> None:
    controller = FakeController(tone={"replicas": [replica("ab")]})
    fleet, clock = fleet_of(controller)
    await asyncio.gather(*(fleet.nodes() for _ in range(20)))
    clock.now_s += 0.9
    await fleet.nodes()
    assert controller.asked == 1
    clock.now_s += 0.2
    await fleet.nodes()
    assert controller.asked == 2
    assert threading.get_ident() not in controller.threads


async def test_whoever_leaves_does_not_take_the_answer_of_the_others_along() -> None:
    fleet, _ = fleet_of(FakeController(tone={"replicas": [replica("ab")]}))
    leaving = asyncio.create_task(fleet.nodes())
    staying = asyncio.create_task(fleet.nodes())
    await asyncio.sleep(0)
    leaving.cancel()
    assert len(await staying) == 1


async def test_nodes_are_found_by_id_and_by_engine() -> None:
    controller = FakeController(tone={"replicas": [replica("ab"), replica("cd")]}, other={"replicas": []})
    fleet, _ = fleet_of(controller)
    assert (await fleet.node("cd")).node_id == "cd"
    assert (await fleet.node("tone")).node_id == "ab"
    assert (await fleet.node("other")).status is NodeStatus.STANDBY
    with pytest.raises(NodeNotFound, match="GET /api/nodes"):
        await fleet.node("ef")


async def test_commands_scale_and_what_is_seen_next_is_new() -> None:
    controller = FakeController(tone={"replicas": [replica("ab")]})
    fleet, _ = fleet_of(controller, min_replicas=2, max_replicas=2)
    await fleet.nodes()
    await fleet.stand_by("tone")
    await fleet.nodes()
    await fleet.activate("tone")
    assert controller.scaled == [("engine-tone", 0), ("engine-tone", 2)]
    assert controller.asked == 2


async def test_an_engine_that_scales_by_itself_takes_no_commands() -> None:
    controller = FakeController(tone={"replicas": []})
    fleet, _ = fleet_of(controller, min_replicas=0, max_replicas=3)
    for command in (fleet.activate, fleet.stand_by):
        with pytest.raises(ScalesItself, match="0 to 3 replicas"):
            await command("tone")
    fixed, _ = fleet_of(controller)
    controller.error = ExternalScalerDisabledError("no")
    with pytest.raises(ScalesItself, match="external_scaler_enabled: true"):
        await fixed.stand_by("tone")
    assert not controller.scaled


@pytest.mark.parametrize("error", [RayServeException("gone"), KeyError("applications")])
async def test_a_controller_that_is_away_is_a_typed_error_and_forgotten(error: Exception) -> None:
    controller = FakeController(tone={"replicas": [replica("ab")]})
    fleet, clock = fleet_of(controller)
    controller.error = error
    with pytest.raises(Unavailable):
        await fleet.nodes()
    controller.error = None
    clock.now_s += 2
    assert len(await fleet.nodes()) == 1
