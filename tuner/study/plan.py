"""What a run is going to do, settled before anything starts: made once, read by everything after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from train_fn.contract.trials import TrialParams
from tuner.config.resolve import Fingerprint
from tuner.config.schema import Config
from tuner.search.expected_gain import ModelSettings
from tuner.search.step_limit import StepLimit
from tuner.study.identity import Identity

if TYPE_CHECKING:
    from cluster.connection.ray_session import Node
    from cluster.node.nvml import Gpu


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The study that a run works on, and what it measures with. Made by `tuner.driver.planning`.

    Attributes:
        config: Resolved.
        device: `cpu` or `cuda`.
        nodes: Those that may have lanes.
        address: Of the Ray to join where there is work; None: a local one is started.
        points: What this run considers; a later run of the study may consider others.
        fingerprint: All that must be equal for two measurements to be comparable, flat, by configuration key.
        identity: What it is measured with, see `tuner.study.identity`.
        settings: Of the sampler `model`.
        step_limit: How many steps a trial has, and the time for them; None: trials always take all.
    """

    config: Config
    device: str
    nodes: list[Node] = field(default_factory=list)
    address: str | None = None
    points: Sequence[TrialParams]
    fingerprint: Fingerprint
    identity: Identity
    settings: ModelSettings
    step_limit: StepLimit | None = None

    @property
    def name(self) -> str:
        """The study's name; a later generation of it has a number behind."""
        return str(self.config.study.name)

    @property
    def storage(self) -> str:
        """The URL of the study's storage."""
        return str(self.config.study.storage)

    @property
    def gpus(self) -> list[Gpu]:
        """The GPUs that lanes can run on."""
        return [gpu for node in self.nodes for gpu in node.gpus] if self.device == "cuda" else []
