"""The Optuna sampler of this project: it proposes open points of a finite list, and none of them twice.

`CandidateSampler` works out from the study's trials which candidates are still open and lets a *strategy*
choose one:

- `grid`: the candidates' own order;
- `random`: uniform over the open points;
- `tpe`: the first proposal of Optuna's multi-objective TPE that is open;
- `model`: climbs the batch in the setting that looks fastest, see `choose_by_model`.

Every strategy is a pure function of the study's record and a seed, so a study that is resumed in another
process goes on as if it had never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from train_fn.spec import PRECISIONS, Reason, Status, TrialParams, TrialResult
from tuner.space import Measured, factorisations, is_out_of_memory, proven_infeasible, same_setting

TPE_EI_CANDIDATES = (24, 4, 1)
"""TPE proposes the best of so many draws from the density of good points: on a small grid the best of 24 (its
default) is nearly always one that is measured already, so fewer are drawn until an open point comes."""

TPE_TRIES = 8
"""Proposals for each of these numbers."""

FASTEST_FIRST = ("bf16", "fp16", "nf4", "tf32", "fp32")
"""Precisions in the order in which they usually train: fewer bytes to move and faster matrix units first.
nf4 is bf16 that unpacks its weights before each use."""


@dataclass(frozen=True)
class SearchState:
    """What the study knows, as far as a strategy needs it.

    Attributes:
        candidates: The points that this run considers, in order.
        measured: Finished trials by number, interrupted ones left out.
        running: Points in flight.
        open: Candidates that are neither measured nor running nor proven infeasible.
    """

    candidates: Sequence[TrialParams]
    measured: list[Measured] = field(default_factory=list)
    running: list[TrialParams] = field(default_factory=list)
    open: list[TrialParams] = field(default_factory=list)

    @property
    def turn(self) -> int:
        """How many points were tried before this one; not interrupted ones, so a resumed run repeats them."""
        return len(self.measured) + len(self.running)


Strategy = Callable[[SearchState, optuna.Study, FrozenTrial], TrialParams]
"""Chooses one of `state.open`, which is never empty."""


def distributions(
    samples_per_worker: int, precisions: Sequence[str] = PRECISIONS
) -> dict[str, BaseDistribution]:
    """The Optuna dimensions of a study.

    They name *every* divisor and precision whatever this run searches: Optuna refuses a study whose
    categorical choices change, and a resumed run may search a narrower or wider part. Accumulation is no
    dimension, it follows from the batch.

    Args:
        samples_per_worker: The share of the global batch that one worker trains on.
        precisions: Those that the study began with; a study of an earlier version knows fewer.
    """
    sizes = [size for size, _ in factorisations(samples_per_worker, 1)]
    return {
        "per_device_train_batch_size": CategoricalDistribution(sizes),
        "precision": CategoricalDistribution(precisions),
        "gradient_checkpointing": CategoricalDistribution([False, True]),
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
    if not {"per_device_train_batch_size", "precision", "gradient_checkpointing"} <= values.keys():
        return None
    accumulation = samples // values["per_device_train_batch_size"]
    return TrialParams.from_dict({**values, "gradient_accumulation_steps": accumulation})


def result_of(trial: FrozenTrial) -> TrialResult | None:
    """The result that `TuningStudy.tell` stored; None while there is none. `status` is stored last."""
    return TrialResult.from_dict(trial.user_attrs) if "status" in trial.user_attrs else None


def search_state(
    candidates: Sequence[TrialParams], trials: Iterable[FrozenTrial], skip_proven: bool = True
) -> SearchState:
    """Read the study's record; unless `skip_proven`, what is proven infeasible is open all the same."""
    samples = samples_per_worker(candidates)
    measured, running = [], []
    for trial in trials:
        params, result = params_of(trial.params, samples), result_of(trial)
        if params is None:
            continue
        if not trial.state.is_finished():
            running.append(params)
        elif result is not None and result.reason != Reason.INTERRUPTED:
            measured.append(Measured(trial.number, params, result))
    measured.sort(key=lambda m: m.number)
    closed = {m.params for m in measured} | set(running)
    proofs = [(m.params, m.result) for m in measured if skip_proven and is_out_of_memory(m.result)]
    still_open = [c for c in candidates if c not in closed and proven_infeasible(c, proofs) is None]
    return SearchState(candidates, measured, running, still_open)


class CandidateSampler(optuna.samplers.BaseSampler):
    """Proposes open candidates only; `choose` decides which."""

    def __init__(
        self,
        candidates: Sequence[TrialParams],
        choose: Strategy,
        precisions: Sequence[str] = PRECISIONS,
        skip_proven: bool = True,
    ) -> None:
        self._candidates = list(candidates)
        self._choose = choose
        self._skip_proven = skip_proven
        self.distributions = distributions(samples_per_worker(candidates), precisions)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All dimensions, always: a point is chosen as a whole."""
        return self.distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Choose an open point; `TuningStudy.ask` has made sure that there is one."""
        others = (t for t in study.get_trials(deepcopy=False) if t.number != trial.number)
        state = search_state(self._candidates, others, self._skip_proven)
        if not state.open:
            raise RuntimeError("no candidate is open: every point is measured, running or proven infeasible")
        point = self._choose(state, study, trial)
        return {name: getattr(point, name) for name in search_space}

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
) -> TrialParams:
    """The first open point that Optuna's multivariate TPE proposes, else (and at its start) a random one.

    A fresh TPE per turn makes the choice independent of the process. No constant liar: points in flight are
    closed anyway, and it would write every rejected proposal to the storage.
    """
    every = distributions(samples_per_worker(state.candidates), precisions)
    space = {name: distribution for name, distribution in every.items() if not distribution.single()}
    open_by_values = {tuple(getattr(point, name) for name in space): point for point in state.open}
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


def choose_by_model(state: SearchState, study: optuna.Study, trial: FrozenTrial) -> TrialParams:
    """A good order that reacts to what fits and to what is fast.

    0. Every precision once, at its smallest batch without checkpointing: the safest point there is.
    1. Then one precision after the other, the fastest so far first. Without checkpointing, double the batch
       while it fits; then the batches on both sides of the largest that fits; then, with checkpointing, the
       batches that ran out of memory without it, from the smallest up.
    2. When that is done in every precision, the rest, large batches first.
    """
    return min(state.open, key=partial(_model_rank, state))


def _model_rank(state: SearchState, point: TrialParams) -> tuple[float, ...]:
    """The place of a point in the order of `choose_by_model`: phase, precision, step in it, batch."""
    precision = _precision_rank(state, point.precision)
    size, checkpointing = point.per_device_train_batch_size, point.gradient_checkpointing
    plain = [c for c in state.candidates if c.precision == point.precision and not c.gradient_checkpointing]
    if not checkpointing or not plain:  # where only checkpointing is searched, it is the one that climbs
        reached, ceiling = _reached(state, point)
        if reached == 0 and ceiling is None:
            return (0, *precision, 0, size)
        if ceiling is None and size >= 2 * reached:
            return (1, *precision, 0, size)
        if size in _beside(state, point, reached):
            return (1, *precision, 1, -size)
    elif _plain_runs_out(state, point):
        return (1, *precision, 2, size)
    return (2, *precision, checkpointing, -size)


def _precision_rank(state: SearchState, precision: str) -> tuple[float, float]:
    """Fastest measured first; before that, the order in which hardware usually is."""
    speeds = [m.result.samples_per_second or 0.0 for m in state.measured if m.params.precision == precision]
    return (-max(speeds, default=0.0), FASTEST_FIRST.index(precision))


def _reached(state: SearchState, point: TrialParams) -> tuple[int, int | None]:
    """In the point's setting: the largest batch that fits or is in flight, the smallest that does not."""
    tried = [m for m in state.measured if same_setting(m.params, point) and m.result.status != Status.FAILED]
    sizes = [m.params.per_device_train_batch_size for m in tried if not is_out_of_memory(m.result)]
    sizes += [p.per_device_train_batch_size for p in state.running if same_setting(p, point)]
    ceilings = [m.params.per_device_train_batch_size for m in tried if is_out_of_memory(m.result)]
    return max(sizes, default=0), min(ceilings, default=None)


def _beside(state: SearchState, point: TrialParams, reached: int) -> list[int]:
    """The candidate batches just below and just above the largest that fits."""
    sizes = sorted(c.per_device_train_batch_size for c in state.candidates if same_setting(c, point))
    return [*[s for s in sizes if s < reached][-1:], *[s for s in sizes if s > reached][:1]]


def _plain_runs_out(state: SearchState, point: TrialParams) -> bool:
    """Whether the same point without checkpointing is known to run out of memory."""
    outs = [
        m.params for m in state.measured if is_out_of_memory(m.result) and not m.params.gradient_checkpointing
    ]
    return any(
        p.precision == point.precision and p.per_device_train_batch_size <= point.per_device_train_batch_size
        for p in outs
    )


def make_sampler(
    name: str,
    candidates: Sequence[TrialParams],
    seed: int,
    precisions: Sequence[str] = PRECISIONS,
    skip_proven: bool = True,
) -> CandidateSampler:
    """The sampler that `search.sampler` names, for a study that began with these `precisions`."""
    strategies: dict[str, Strategy] = {
        "model": choose_by_model,
        "tpe": partial(choose_by_tpe, seed=seed, precisions=precisions),
        "random": partial(choose_at_random, seed=seed),
        "grid": choose_by_grid,
    }
    if name not in strategies:
        raise ValueError(f"no sampler {name!r}; there are {', '.join(strategies)}")
    return CandidateSampler(candidates, strategies[name], precisions, skip_proven)
