"""The record of a tuning run: one durable Optuna study, and nothing beside it.

What was measured is in the study's storage before a trial counts as finished, so that a run that is killed at
any moment goes on from it and measures nothing twice. Readable with any Optuna tool: parameters, two
objectives, constraints, and everything else of a `TrialResult` as user attributes.

One driver works on a study at a time: opening it declares the trials that are still running to be dead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult, TrialSpec
from tuner.search.expected_gain import ModelSettings, beliefs_of
from tuner.search.expected_memory import expected_budget
from tuner.search.ledger import Ledger
from tuner.search.predictions import Beliefs
from tuner.search.sampler import (
    CandidateSampler,
    finished,
    make_sampler,
    params_of,
    result_of,
    samples_per_worker,
)
from tuner.search.step_limit import StepLimit
from tuner.search.strategy import Step, next_step, spec_of
from tuner.space.points import Measured, SearchState
from tuner.study.compatibility import DIRECTIONS, check_fingerprint, stored_knobs, stored_precisions
from tuner.study.endings import ending_of, with_finite_objectives
from tuner.study.generations import Generation, generation_for
from tuner.study.identity import Identity
from tuner.study.optuna_view import LISTED_CONSTRAINTS
from tuner.study.storage import PatientStorage, Rescued, open_storage, parse_storage, why_not_opened

INTERRUPTED = TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED)

optuna.logging.set_verbosity(optuna.logging.WARNING)


class TuningStudy:
    """Asks for points and records what came of them. Made by `open_study`; for use from one thread.

    Attributes:
        news: In a line, why this is not the study that the last run worked on; None where it is.
        compared_with: What is known of the generation before, see `tuner.study.generations.Generation`.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: PatientStorage,
        sampler: CandidateSampler,
        candidates: Sequence[TrialParams],
        max_trials: int,
        global_batch_size: int,
        settings: ModelSettings | None = None,
        skip_proven: bool = True,
        rescued: Rescued | None = None,
        generation: Generation | None = None,
        repeat_disturbed: bool = True,
        limit: StepLimit | None = None,
    ) -> None:
        """See `open_study`; `settings` are those of the `model` strategy, None where another one searches."""
        self.news = generation.news if generation else None
        self.compared_with = generation.compared_with if generation else None
        self._study, self._name = study, str(study.study_name)
        self._storage = storage
        self._sampler = study.sampler = sampler
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._candidates = list(candidates)
        self._samples_per_worker = samples_per_worker(candidates)
        self._max_trials = max_trials
        self._global_batch_size = global_batch_size
        self._settings = settings
        self._step: tuple[SearchState, Step] | None = None
        self._asked: dict[int, optuna.Trial] = {}  # those in flight, by number
        self._times: dict[int, tuple[datetime | None, datetime | None]] = {}
        self._settle_orphans(rescued or {})
        self._ledger = self._read(Ledger(self._candidates, skip_proven, repeat_disturbed, limit))

    @property
    def name(self) -> str:
        """The study's name."""
        return self._name

    @property
    def candidates(self) -> list[TrialParams]:
        """The points that this run considers."""
        return list(self._candidates)

    @property
    def max_trials(self) -> int:
        """How many trials the whole study may have, interrupted ones not counted."""
        return self._max_trials

    def ask(self) -> TrialSpec | None:
        """The next trial; None while there is none, see `has_work`."""
        state = self._state()
        if self._settings is None:
            is_open = bool(state.open) and state.turn < self._max_trials
            if (not is_open and not state.to_repeat) or self._steps_are_undecided(state):
                return None
            number, params = self._new_trial(None if is_open else state.to_repeat[0].params, state)
            return TrialSpec(number=number, params=params, steps=state.steps)
        step = self._next_step(state)
        if step.point is None:
            return None
        number, params = self._new_trial(step.point, state)
        return spec_of(state, number, params, self._settings, step.in_full)

    @staticmethod
    def _steps_are_undecided(state: SearchState) -> bool:
        """Whether a trial in flight may still be the first one to end, and with another number of steps."""
        decided = any(m.result.status == Status.COMPLETE for m in state.measured)
        return state.steps is not None and bool(state.running) and not decided

    def has_work(self) -> bool:
        """Whether there will be something to measure, now or once the trials in flight have ended."""
        state = self._state()
        if state.running:
            return True  # what comes of it may open a point, be measured again, or in full
        if self._settings is None:
            is_open = bool(state.open) and state.turn < self._max_trials
            return is_open or bool(state.to_repeat)
        return self._next_step(state).point is not None

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to measure, neither in flight nor to come."""
        return not self._asked and not self.has_work()

    @property
    def stopped(self) -> str | None:
        """Why the search has ended although points are open, in a sentence; None where it has not."""
        return self._next_step(self._state()).stopped if self._settings is not None else None

    def beliefs(self) -> Beliefs:
        """What the measurements say about the points that are not measured."""
        return beliefs_of(self._state(), self._settings or ModelSettings())

    def _next_step(self, state: SearchState) -> Step:
        """Asked for often while lanes wait; decided once for each state of the record."""
        assert self._settings is not None
        if self._step is None or self._step[0] is not state:
            self._step = state, next_step(state, self._max_trials, self._settings)
        return self._step[1]

    def _new_trial(self, point: TrialParams | None, state: SearchState) -> tuple[int, TrialParams]:
        """A running trial in the record, of this point or of the one that the sampler chooses."""
        self._sampler.plan(state, point)
        insist = self._storage.insist
        trial = insist(self._study.ask)
        for name, dimension in self._sampler.distributions.items():
            insist(trial.suggest_categorical, name, dimension.choices)
        point = params_of(trial.params, self._samples_per_worker)
        assert point is not None
        insist(trial.set_user_attr, "gradient_accumulation_steps", point.gradient_accumulation_steps)
        insist(trial.set_user_attr, "global_batch_size", self._global_batch_size)
        insist(trial.set_user_attr, "setting", str(point))
        self._asked[trial.number] = trial
        self._times[trial.number] = trial.datetime_start, None
        self._ledger.start(trial.number, point)
        return trial.number, point

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """Record what came of a trial; telling a finished one again changes nothing.

        Raises:
            StorageLostError: The storage did not take it; it may be told again.
        """
        trial = self._asked.get(spec.number)
        if trial is None:
            if spec.number in self._times:
                return
            raise ValueError(f"trial {spec.number} was not asked for in this run")
        # As the storage gives it back, so that a resumed study is the same to the last type.
        result = TrialResult.from_dict(dataclasses.asdict(with_finite_objectives(result)))
        ended = self._end(trial, result)
        del self._asked[spec.number]
        self._times[spec.number] = ended.datetime_start, ended.datetime_complete
        self._ledger.finish(spec.number, spec.params, result)

    def measured(self) -> list[Measured]:
        """Every finished trial as (number, params, result), by number; interrupted ones are left out."""
        return self._state().measured

    def times(self) -> dict[int, tuple[datetime | None, datetime | None]]:
        """When every trial was asked for and told, by number."""
        return dict(self._times)

    def skipped(self) -> list[tuple[TrialParams, str]]:
        """Candidates that need no trial, each with the reason: a smaller batch ran out of memory."""
        return self._ledger.skipped()

    @property
    def steps(self) -> int | None:
        """How many optimizer steps the next trials take; None: all that are configured."""
        return self._state().steps

    def expect_memory(self, free_bytes: int | None) -> None:
        """Hear what workers can hold now, where they may hold all that is free; None: it is not known."""
        state = self._state()
        is_complete = any(m.result.status == Status.COMPLETE for m in state.measured)
        if (budget_bytes := expected_budget(state.budget_bytes, free_bytes, is_complete)) is not None:
            self._ledger.expect(budget_bytes)

    def close(self) -> None:
        """Give the storage's connection back."""
        self._storage.remove_session()

    def be_patient(self, seconds: float, say: Callable[[str], None]) -> None:
        """From here on, wait so long for a storage that does not answer, and say so; see `PatientStorage`."""
        self._storage.be_patient(seconds, say)

    def _state(self) -> SearchState:
        return self._ledger.state()

    def _read(self, ledger: Ledger) -> Ledger:
        """What the storage holds; every later change is this driver's own."""
        trials = self._study.get_trials(deepcopy=False)
        self._times = {trial.number: (trial.datetime_start, trial.datetime_complete) for trial in trials}
        for number, params, result in finished(trials, self._samples_per_worker):
            ledger.finish(number, params, result)
        return ledger

    def _settle_orphans(self, rescued: Rescued) -> None:
        """Finish what a killed driver left running: told where its result is known, else interrupted."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            result = result_of(trial)
            if result is None:
                params = params_of(trial.params, self._samples_per_worker)
                result = rescued.get((trial.number, str(params)), INTERRUPTED)
            self._end(optuna.Trial(self._study, self._id_of(trial.number)), result)

    def _id_of(self, number: int) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number))

    def _end(self, trial: optuna.Trial, result: TrialResult) -> FrozenTrial:
        """Give a running trial all that came of it; as often as need be, a finished one stays as it is."""
        insist, ending = self._storage.insist, ending_of(result)
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            insist(self._constrain, trial, ending.constraints)
            for key, value in ending.attributes.items():
                insist(trial.set_user_attr, key, value)
        return insist(self._study.tell, trial, ending.values, ending.state, skip_if_finished=True)

    def _constrain(self, trial: optuna.Trial, constraints: Mapping[str, float]) -> None:
        if constraints:
            listed = [value for _, value in sorted(constraints.items())]
            self._storage.set_trial_system_attr(self._id_of(trial.number), LISTED_CONSTRAINTS, listed)
        for name in constraints.keys() - trial.constraints.keys():
            trial.set_constraint(name, constraints[name])


def open_study(
    name: str,
    storage_url: str,
    candidates: Sequence[TrialParams],
    sampler_name: str,
    seed: int,
    max_trials: int,
    fingerprint: dict[str, Any],
    settings: ModelSettings | None = None,
    skip_proven: bool = True,
    rescued: Rescued | None = None,
    identity: Identity | None = None,
    repeat_disturbed: bool = True,
    limit: StepLimit | None = None,
) -> TuningStudy:
    """Open or create a study, or its generation that this run can go on with.

    Args:
        name: Its name within the storage.
        storage_url: SQLAlchemy URL; the folder of an SQLite file is made.
        candidates: The points that this run considers; a later run may consider others.
        sampler_name: `model`, `tpe`, `random` or `grid`.
        seed: Seeds the sampler.
        max_trials: Of the whole study, all its runs together.
        fingerprint: Everything that must be equal for two measurements to be comparable, as JSON values;
            at least `global_batch_size`; flat, by configuration key.
        settings: Of the `model` sampler; None: its defaults.
        skip_proven: Leave out points that a smaller one's out-of-memory proves infeasible.
        rescued: Results that the storage did not take from the last driver, see `tuner.study.storage`.
        identity: What it is measured with, see `tuner.study.identity`.
        repeat_disturbed: Measure points again whose trial was disturbed.
        limit: How many steps a trial has, and the time for them; None: trials always take all.

    Raises:
        InputError: The storage can't be opened, the study was measured under another fingerprint, or it is
            older than a precision or a knob that is searched.
    """
    url = parse_storage(storage_url)
    try:
        storage = open_storage(url)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=list(DIRECTIONS.values()),
            load_if_exists=True,
            pruner=optuna.pruners.NopPruner(),
        )
        settings = settings or ModelSettings(seed=seed)
        check_fingerprint(study, fingerprint)
        generation = generation_for(study, storage, identity or {}, candidates, settings.loss_tolerance)
        study = generation.study
        check_fingerprint(study, fingerprint)
        precisions = stored_precisions(study, candidates)
        knobs = stored_knobs(study, candidates)
        sampler = make_sampler(sampler_name, candidates, seed, precisions, knobs)
        if study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(DIRECTIONS))
        model = settings if sampler_name == "model" else None
        batch = fingerprint["global_batch_size"]
        return TuningStudy(
            study,
            storage,
            sampler,
            candidates,
            max_trials,
            batch,
            model,
            skip_proven,
            rescued,
            generation,
            repeat_disturbed,
            limit,
        )
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError, RuntimeError) as error:
        raise InputError(Fault("study.storage", why_not_opened(url, error))) from error
