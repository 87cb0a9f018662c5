"""build_app: the only place where deployments are bound together."""

# No postponed annotations: Serve reads the type of `args` to build it from serve_config.yaml.
from typing import Any, cast

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from engines.registry import make_engine
from serve_app.config import EngineSettings, Replicas, Settings, refuse_unknown_variables
from serve_app.ingress.ingress import Ingress
from serve_app.replica import EngineReplica
from serve_app.router.dispatch import calls_per_replica
from serve_app.router.limits.budget_actor import budget_actor
from serve_app.router.router import Router

#: Name of the Serve application and of the router in it: what a notebook connects to.
APP_NAME = "voice-clone"
ROUTER = "router"

#: Ingress and router only hand values over; their limits are in `limits`, not here.
_LIGHT_MAX_ONGOING = 1000
#: Longest synthesis a replica is given to finish when it is taken away.
_DRAIN_S = 60.0


def build_app(args: Settings) -> serve.Application:
    """The graph ingress -> router -> one deployment per engine. Takes the settings tree, pure otherwise."""
    refuse_unknown_variables()
    # The ingress logs every request: a line at each further hop costs time and says nothing new.
    quiet = LoggingConfig(log_level=args.log_level, enable_access_log=False)
    engines = {name: _engine(name, settings, quiet) for name, settings in args.engines.items()}
    router = _deployment(
        Router,
        name=ROUTER,
        max_ongoing_requests=_LIGHT_MAX_ONGOING,
        logging_config=quiet,
        deployment_actors=[budget_actor()] if args.limits.state == "leases" else None,
        **_scale(args.router, busy_requests=100),
    )
    ingress = _deployment(
        Ingress,
        name="ingress",
        max_ongoing_requests=_LIGHT_MAX_ONGOING,
        logging_config=LoggingConfig(log_level=args.log_level),
        **_scale(args.ingress, busy_requests=100),
    )
    return ingress.bind(router.bind(engines, args), args)


def _deployment(kind: type, **options: Any) -> serve.Deployment:
    # The stub of serve.deployment knows only its decorator form.
    deployment = cast(serve.Deployment, serve.deployment(kind))
    return deployment.options(graceful_shutdown_timeout_s=_DRAIN_S, **options)


def _engine(name: str, settings: EngineSettings, logging_config: LoggingConfig) -> serve.Application:
    # Only to ask it: a replica makes and loads its own.
    engine = make_engine(settings.engine or name, settings.config)
    # The next batch waits inside the replica: it starts without a trip to the router.
    max_calls = calls_per_replica(engine.config.slots, engine.concurrent_batches)
    # Serve's default backoff grows to 0.5 s: a freed slot would stay empty that long.
    backoff = {"initial_backoff_s": 0.02, "max_backoff_s": 0.03}
    deployment = _deployment(
        EngineReplica,
        name=f"engine-{name}",
        max_ongoing_requests=max_calls,
        logging_config=logging_config,
        request_router_config=RequestRouterConfig.model_validate(backoff),
        **_scale(settings.replicas, busy_requests=max_calls, runtime_env=settings.runtime_env),
    )
    return deployment.bind(
        settings.engine or name, settings.config, settings.batching.chunk_timeout_s, served_as=name
    )


def _scale(
    replicas: Replicas, *, busy_requests: int, runtime_env: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Serve options for reservations and for a fixed or an elastic number of copies."""
    actor: dict[str, Any] = {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus}
    if replicas.memory_mb is not None:
        actor["memory"] = replicas.memory_mb << 20
    if runtime_env is not None:
        actor["runtime_env"] = runtime_env
    if replicas.min_replicas == replicas.max_replicas:
        return {"ray_actor_options": actor, "num_replicas": replicas.min_replicas}
    return {
        "ray_actor_options": actor,
        "autoscaling_config": {
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": busy_requests,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
        },
    }


def router_handle(app_name: str = APP_NAME) -> DeploymentHandle[Any]:
    """The handle of a running graph's router."""
    return serve.get_deployment_handle(ROUTER, app_name=app_name)
