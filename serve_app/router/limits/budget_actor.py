"""The actor that keeps the books for all replicas of the router. Serve starts it, watches it, replaces it.

It belongs to the router deployment: it starts before the first replica and ends with the deployment. While a
new version of the code replaces an old one, each has its own actor, so each may use a limit in full.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import DeploymentActorConfig
from ray.serve.exceptions import RayServeException
from ulid import ULID

from serve_app.router.limits.budget import Answer, Books, Spent, Statement
from serve_app.router.limits.leases import BooksAway

_NAME = "budget"


class BudgetActor:
    """The books, under one clock. Each instance has a name of its own, so that a replaced one is noticed."""

    def __init__(self) -> None:
        self._books = Books(str(ULID()))

    def answer(self, statement: Statement) -> Answer:
        """See ``Books.answer``."""
        return self._books.answer(statement, time.monotonic())

    def introduce(self, router: str, history: Sequence[Spent]) -> None:
        """See ``Books.introduce``."""
        self._books.introduce(router, history, time.monotonic())


def budget_actor() -> DeploymentActorConfig:
    """What the router deployment needs for ``ActorBooks`` to find the actor."""
    # The actor waits for statements and adds numbers: a reserved core would stand idle.
    return DeploymentActorConfig(
        name=_NAME, actor_class=ray.remote(BudgetActor), actor_options={"num_cpus": 0}
    )


class ActorBooks:
    """The actor's books, from within a replica of the router."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def answer(self, statement: Statement) -> Answer:
        """See ``Books.answer``. Raises ``BooksAway``."""
        return cast(Answer, await self._call("answer", statement))

    async def introduce(self, router: str, history: Sequence[Spent]) -> None:
        """See ``Books.introduce``. Raises ``BooksAway``."""
        await self._call("introduce", router, history)

    async def _call(self, method: str, *args: object) -> object:
        try:
            if self._actor is None:
                # Asks Ray's control store, which blocks.
                self._actor = await asyncio.to_thread(serve.get_deployment_actor, _NAME)
            return await getattr(self._actor, method).remote(*args)
        except (RayError, RayServeException, ValueError) as error:
            # A handle stays bound to an actor that has died; its successor must be looked up.
            self._actor = None
            raise BooksAway(type(error).__name__) from error
