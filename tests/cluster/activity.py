"""Run beside a server: prints as JSON what its routers and engine replicas hold, by deployment."""

from __future__ import annotations

from serve_app.environment import prepare_environment

prepare_environment()

import json  # noqa: E402 - the environment first: parts of Ray read it when they are imported
import logging  # noqa: E402
from dataclasses import asdict  # noqa: E402

import ray  # noqa: E402
from ray import serve  # noqa: E402

from serve_app.app import APP_NAME  # noqa: E402

if __name__ == "__main__":
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    found = {
        name: [
            asdict(answer)
            for answer in serve.get_deployment_handle(name, APP_NAME).broadcast("activity").results()
        ]
        for name in ("router", "engine-tone")
    }
    print(json.dumps(found))  # noqa: T201 - its whole purpose
