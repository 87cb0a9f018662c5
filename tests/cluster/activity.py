"""Run beside a server: prints as JSON what its routers and engine replicas hold and have counted."""

from __future__ import annotations

from serve_app.environment import prepare_environment

prepare_environment()

import json  # noqa: E402 - the environment first: parts of Ray read it when they are imported
import logging  # noqa: E402
from collections import Counter  # noqa: E402
from dataclasses import asdict  # noqa: E402

import httpx  # noqa: E402
import ray  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from ray import serve  # noqa: E402

from serve_app.app import APP_NAME  # noqa: E402


def ended() -> Counter[str]:
    """Speeches by the way they ended."""
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
    outcomes: Counter[str] = Counter()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "ray_tts_requests_total":
                outcomes[sample.labels["outcome"]] += int(sample.value)
    return outcomes


if __name__ == "__main__":
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    held = {
        name: [
            asdict(answer)
            for answer in serve.get_deployment_handle(name, APP_NAME).broadcast("activity").results()
        ]
        for name in serve.status().applications[APP_NAME].deployments
        if name != "ingress"
    }
    print(json.dumps({"held": held, "ended": ended()}))  # noqa: T201 - its whole purpose
