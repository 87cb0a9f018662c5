"""Ingress: the HTTP deployment. Stateless; everything it knows is in the router or in the request."""

# No postponed annotations: Serve inspects this class when it is deployed.
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import Settings
from serve_app.handle import RouterHandle
from serve_app.ingress.api import build_api


@serve.ingress()
class Ingress:
    """Builds the API around the router handle when the replica starts."""

    def __init__(self, router: DeploymentHandle[Any], settings: Settings) -> None:
        self._router = RouterHandle(router)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return build_api(self._router, self._settings)
