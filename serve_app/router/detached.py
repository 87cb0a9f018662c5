"""Work that the router does for several requests, started by whichever comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")


def start_detached(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task that belongs to no request. The caller has to keep it.

    A task inherits the context it is started in, and Ray finds there whose request it serves: if the client
    of that one leaves, Ray cancels every call made in its name, in whatever task, and so the work of others.
    """
    return asyncio.create_task(work, context=Context())
