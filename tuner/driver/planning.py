"""Makes the plan of a run out of its configuration and its cluster, or says what is wrong with them."""

from __future__ import annotations

import os

from cluster.connection import ray_session
from train_fn.contract.faults import InputError
from tuner.config.resolve import fingerprint, resolve
from tuner.config.schema import Config
from tuner.driver import places, preflight
from tuner.results.findings import versions
from tuner.search.expected_gain import ModelSettings
from tuner.search.step_limit import StepLimit
from tuner.space.points import candidates
from tuner.study.identity import identity
from tuner.study.lease import refuse_if_held
from tuner.study.plan import Plan


def make_plan(config: Config, *, is_for_a_run: bool = True) -> Plan:
    """Look at the cluster, resolve the configuration, check both. Starts nothing.

    Args:
        config: As the user gave it.
        is_for_a_run: Else nobody minds that another run works on the study.

    Raises:
        InputError: Something is wrong with the input.
        StudyHeldError: Another run works on the study.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or None
    # Joining a Ray that runs already starts nothing, and only it knows which devices there are.
    nodes = ray_session.look(address, places.sources(config) if address else {})
    device = preflight.choose_device(config, nodes)
    config = resolve(config, device)
    if is_for_a_run:
        refuse_if_held(str(config.study.storage), str(config.study.name))
    if faults := preflight.check(config, nodes, device, address):
        raise InputError(*faults)
    nodes = preflight.of_type(nodes, config.cluster.accelerator_type)
    search, trial = config.search, config.trial
    return Plan(
        config=config,
        device=device,
        nodes=nodes,
        address=address,
        points=candidates(
            config.global_batch_size,
            config.num_workers,
            search.precision or preflight.device_precisions(device, nodes),
            search.gradient_checkpointing,
            search.per_device_train_batch_size,
            search.knobs,
        ),
        fingerprint=fingerprint(config, device),
        identity=identity(config, device, nodes, versions()),
        settings=ModelSettings(
            device=device,
            loss_tolerance=search.loss_tolerance,
            memory_headroom=search.memory_headroom,
            stop_within=search.stop_within,
            reuse_loss=search.reuse_loss,
            prune=search.prune,
            seed=search.seed,
        ),
        step_limit=StepLimit(trial.steps, trial.warmup_steps, trial.timeout),
    )
