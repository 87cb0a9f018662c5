"""Health for whatever watches the server. Liveness asks nobody, readiness asks the default engine."""

from __future__ import annotations

from fastapi import APIRouter

from serve_app.handle import RouterHandle


def routes(router: RouterHandle) -> APIRouter:
    """``/health/live`` and ``/health/ready``."""
    api = APIRouter(prefix="/health", tags=["operations"])

    @api.get("/live")
    async def live() -> dict[str, str]:
        """This process answers."""
        return {"status": "live"}

    @api.get("/ready")
    async def ready() -> dict[str, str]:
        """Speech can be asked for; 503 if not."""
        await router.ready()
        return {"status": "ready"}

    return api
