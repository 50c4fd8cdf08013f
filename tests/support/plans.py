"""Plans and studies for tests: any points in any storage, without a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.connection.ray_session import Node
from train_fn.contract.trials import TrialParams
from tuner.config.schema import Config
from tuner.search.expected_gain import ModelSettings
from tuner.search.step_limit import StepLimit
from tuner.study.plan import Plan
from tuner.study.storage import Rescued
from tuner.study.study import TuningStudy
from tuner.study.study import open_study as open_planned


def plan_of(
    points: Sequence[TrialParams],
    sampler: str = "grid",
    seed: int = 0,
    max_trials: int = 100,
    *,
    name: str = "demo",
    storage: str = "sqlite://",
    fingerprint: dict[str, Any] | None = None,
    settings: ModelSettings | None = None,
    skip_proven: bool = True,
    identity: dict[str, str | None] | None = None,
    repeat_disturbed: bool = True,
    limit: StepLimit | None = None,
    nodes: Sequence[Node] = (),
) -> Plan:
    """A plan whose fingerprint, identity, settings and limit need not follow from its configuration."""
    settings = settings or ModelSettings(device="cpu", seed=seed)
    fingerprint = fingerprint or {"global_batch_size": 16}
    config = Config.model_validate(
        {
            "global_batch_size": fingerprint["global_batch_size"],
            "search": {
                "sampler": sampler,
                "seed": seed,
                "max_trials": max_trials,
                "skip_proven": skip_proven,
                "loss_tolerance": settings.loss_tolerance,
                "memory_headroom": settings.memory_headroom,
            },
            "study": {"name": name, "storage": storage},
            "cluster": {"disturbance_check": repeat_disturbed},
        }
    )
    return Plan(
        config=config,
        device=settings.device,
        nodes=list(nodes),
        points=list(points),
        fingerprint=fingerprint,
        identity=identity or {},
        settings=settings,
        step_limit=limit,
    )


def open_study(
    name: str,
    storage: str,
    points: Sequence[TrialParams],
    sampler: str = "grid",
    seed: int = 0,
    max_trials: int = 100,
    fingerprint: dict[str, Any] | None = None,
    settings: ModelSettings | None = None,
    *,
    rescued: Rescued | None = None,
    **rest: Any,
) -> TuningStudy:
    """The study of such a plan."""
    given: dict[str, Any] = {"fingerprint": fingerprint, "settings": settings, **rest}
    plan = plan_of(points, sampler, seed, max_trials, name=name, storage=storage, **given)
    return open_planned(plan, rescued)


def open_points(study: TuningStudy) -> list[TrialParams]:
    """Candidates that are neither measured, nor running, nor proven infeasible."""
    return study._state().open
