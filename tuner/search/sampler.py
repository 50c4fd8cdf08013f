"""The Optuna sampler of this project: it proposes open points of a finite list, and none of them twice.

`CandidateSampler` is told which candidates are still open and lets a *strategy* choose one:

- `grid`: the candidates' own order;
- `random`: uniform over the open points;
- `tpe`: the first proposal of Optuna's multi-objective TPE that is open;
- `model`: the largest expected gain under cost models of memory and time. As that decides, too, when to stop
  and what to repeat, its point is settled before a trial begins (`tuner.search.strategy`).

Every strategy is a pure function of the study's record and a seed, so a study that is resumed in another
process goes on as if it had never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from train_fn.contract.precisions import PRECISIONS
from train_fn.contract.trials import Knob, Reason, TrialParams, TrialResult
from tuner.config.splits import factorisations
from tuner.space.points import Measured, knobs_of
from tuner.space.state import SearchState

TPE_EI_CANDIDATES = (24, 4, 1)
"""TPE proposes the best of so many draws from the density of good points: on a small grid the best of 24 (its
default) is nearly always one that is measured already, so fewer are drawn until an open point comes."""

TPE_TRIES = 8
"""How many proposals are made for each of these numbers."""

Strategy = Callable[[SearchState, optuna.Study, FrozenTrial], TrialParams]
"""Chooses one of `state.open`, which is never empty."""


DIMENSIONS = ("per_device_train_batch_size", "precision", "gradient_checkpointing")
"""What every study has; all other parameters of its trials are knobs."""


def distributions(
    samples_per_worker: int,
    precisions: Sequence[str] = PRECISIONS,
    knobs: Mapping[str, Sequence[Knob]] | None = None,
) -> dict[str, BaseDistribution]:
    """The Optuna dimensions of a study.

    They name *every* divisor and precision whatever this run searches: Optuna refuses a study whose
    categorical choices change, and a resumed run may search a narrower or wider part. Accumulation is no
    dimension, it follows from the batch.

    Args:
        samples_per_worker: The share of the global batch that one worker trains on.
        precisions: Those that the study began with; a study of an earlier version knows fewer.
        knobs: Further settings that the study began with, each with all its values.
    """
    sizes = [size for size, _ in factorisations(samples_per_worker, 1)]
    return {
        "per_device_train_batch_size": CategoricalDistribution(sizes),
        "precision": CategoricalDistribution(precisions),
        "gradient_checkpointing": CategoricalDistribution([False, True]),
        **{name: CategoricalDistribution(values) for name, values in (knobs or {}).items()},
    }


def precisions_known_to(trials: Iterable[FrozenTrial]) -> tuple[str, ...]:
    """The choices that a study's trials were made with; all of today's where there is none yet."""
    known = (t.distributions.get("precision") for t in trials)
    return next((d.choices for d in known if isinstance(d, CategoricalDistribution)), PRECISIONS)


def samples_per_worker(candidates: Sequence[TrialParams]) -> int:
    """The share of the global batch that one worker trains on, equal in all candidates."""
    samples = {c.per_device_train_batch_size * c.gradient_accumulation_steps for c in candidates}
    if len(samples) != 1:
        raise ValueError(f"candidates must share one global batch, got per-worker shares {sorted(samples)}")
    return samples.pop()


def params_of(values: dict[str, Any], samples: int) -> TrialParams | None:
    """The point of an Optuna trial; None where its driver was killed before all parameters were set."""
    if not values.keys() >= set(DIMENSIONS):
        return None
    accumulation = samples // values["per_device_train_batch_size"]
    knobs = {name: value for name, value in values.items() if name not in DIMENSIONS}
    return TrialParams.from_dict({**values, "gradient_accumulation_steps": accumulation, "knobs": knobs})


def values_of(point: TrialParams) -> dict[str, Any]:
    """A point as Optuna's parameters, the inverse of `params_of`."""
    return {**{name: getattr(point, name) for name in DIMENSIONS}, **point.knobs}


def result_of(trial: FrozenTrial) -> TrialResult | None:
    """The result that `TuningStudy.tell` stored; None while there is none."""
    if "status" not in trial.user_attrs:
        return None
    return TrialResult.from_dict({key: _read(value) for key, value in trial.user_attrs.items()})


def _read(value: Any) -> Any:
    """The inverse of `tuner.study.optuna_view.writable`."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, dict):
        return {key: _read(v) for key, v in value.items()}
    return [_read(v) for v in value] if isinstance(value, list) else value


def finished(trials: Iterable[FrozenTrial], samples: int) -> Iterator[Measured]:
    """The finished trials of a study; interrupted ones are left out.

    Args:
        trials: Of the study, any of them.
        samples: The share of the global batch that one worker trains on.
    """
    for trial in trials:
        params, result = params_of(trial.params, samples), result_of(trial)
        if params is None or result is None or not trial.state.is_finished():
            continue
        if result.reason != Reason.INTERRUPTED:
            yield Measured(trial.number, params, result)


class CandidateSampler(optuna.samplers.BaseSampler):
    """Proposes open candidates only, as a whole: `plan` says of which, `choose` decides which."""

    def __init__(
        self,
        candidates: Sequence[TrialParams],
        choose: Strategy | None,
        precisions: Sequence[str] = PRECISIONS,
        knobs: Mapping[str, Sequence[Knob]] | None = None,
    ) -> None:
        self._choose = choose
        self._state = SearchState(candidates)
        self._point: TrialParams | None = None
        knobs = knobs_of(candidates) if knobs is None else knobs
        self.distributions = distributions(samples_per_worker(candidates), precisions, knobs)

    def plan(self, state: SearchState, point: TrialParams | None) -> None:
        """Say what the next trial is about.

        Args:
            state: The record that its point is chosen from.
            point: What it is, where that is settled.
        """
        self._state, self._point = state, point

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Name all dimensions, always: a point is chosen as a whole."""
        return self.distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point that is settled, or an open one."""
        point = self._point
        if point is None:
            if not self._state.open or self._choose is None:
                raise RuntimeError("no candidate is open: all are measured, running or proven infeasible")
            point = self._choose(self._state, study, trial)
        values = values_of(point)
        return {name: values[name] for name in search_space}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> NoReturn:
        """Refuse: a parameter outside the search space is a mistake in the caller."""
        raise ValueError(f"{param_name} is not a dimension of this search")


def choose_by_grid(state: SearchState, study: optuna.Study, trial: FrozenTrial) -> TrialParams:
    """The first open candidate."""
    return state.open[0]


def choose_at_random(
    state: SearchState, study: optuna.Study, trial: FrozenTrial, *, seed: int
) -> TrialParams:
    """Uniform over the open points, the same for the same seed and turn in every process."""
    return _random_of_turn(state, seed).choice(state.open)


def choose_by_tpe(
    state: SearchState,
    study: optuna.Study,
    trial: FrozenTrial,
    *,
    seed: int,
    precisions: Sequence[str] = PRECISIONS,
    knobs: Mapping[str, Sequence[Knob]] | None = None,
) -> TrialParams:
    """The first open point that Optuna's multivariate TPE proposes, else (and at its start) a random one.

    A fresh TPE per turn makes the choice independent of the process. No constant liar: points in flight are
    closed anyway, and it would write every rejected proposal to the storage.
    """
    every = distributions(samples_per_worker(state.candidates), precisions, knobs)
    space = {name: distribution for name, distribution in every.items() if not distribution.single()}
    open_by_values = {tuple(values_of(point)[name] for name in space): point for point in state.open}
    tpe_seed = _random_of_turn(state, seed).getrandbits(32)
    for num_ei_candidates in TPE_EI_CANDIDATES:
        tpe = optuna.samplers.TPESampler(
            seed=tpe_seed, n_ei_candidates=num_ei_candidates, multivariate=True, constant_liar=False
        )
        for _ in range(TPE_TRIES):
            proposal = tpe.sample_relative(study, trial, space)
            point = open_by_values.get(tuple(proposal.get(name) for name in space))
            if point is not None:
                return point
    return choose_at_random(state, study, trial, seed=seed)


def _random_of_turn(state: SearchState, seed: int) -> random.Random:
    return random.Random(f"{seed}/{state.turn}")


def make_sampler(
    name: str,
    candidates: Sequence[TrialParams],
    seed: int,
    precisions: Sequence[str] = PRECISIONS,
    knobs: Mapping[str, Sequence[Knob]] | None = None,
) -> CandidateSampler:
    """The sampler that `search.sampler` names, for a study that began with these `precisions` and `knobs`.

    Args:
        name: `model`, `tpe`, `random` or `grid`.
        candidates: The points that it may propose.
        seed: Of its random choices.
        precisions: See `distributions`.
        knobs: The same; None: those of the candidates.
    """
    knobs = knobs_of(candidates) if knobs is None else knobs
    strategies: dict[str, Strategy | None] = {
        "model": None,
        "tpe": partial(choose_by_tpe, seed=seed, precisions=precisions, knobs=knobs),
        "random": partial(choose_at_random, seed=seed),
        "grid": choose_by_grid,
    }
    if name not in strategies:
        raise ValueError(f"no sampler {name!r}; there are {', '.join(strategies)}")
    return CandidateSampler(candidates, strategies[name], precisions, knobs)
