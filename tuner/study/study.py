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
from collections.abc import Callable, Mapping
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult, TrialSpec
from tuner.search.expected_gain import beliefs_of
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
from tuner.search.strategy import Step, next_step, spec_of
from tuner.space.points import Measured
from tuner.space.state import SearchState
from tuner.study.compatibility import DIRECTIONS, check_fingerprint, stored_knobs, stored_precisions
from tuner.study.endings import ending_of, with_finite_objectives
from tuner.study.generations import Generation, generation_for
from tuner.study.optuna_view import LISTED_CONSTRAINTS
from tuner.study.plan import Plan
from tuner.study.storage import PatientStorage, Rescued, open_storage, parse_storage, why_not_opened

INTERRUPTED = TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED)

optuna.logging.set_verbosity(optuna.logging.WARNING)


class TuningStudy:
    """Asks for points and records what came of them. Made by `open_study`; for use from one thread.

    Attributes:
        plan: What this run measures.
        news: In a line, why this is not the study that the last run worked on; None where it is.
        compared_with: What is known of the generation before, see `tuner.study.generations.Generation`.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: PatientStorage,
        sampler: CandidateSampler,
        plan: Plan,
        rescued: Rescued | None = None,
        generation: Generation | None = None,
    ) -> None:
        """See `open_study`."""
        self.plan = plan
        self.news = generation.news if generation else None
        self.compared_with = generation.compared_with if generation else None
        self._study, self._name = study, str(study.study_name)
        self._storage = storage
        self._sampler = study.sampler = sampler
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._samples_per_worker = samples_per_worker(plan.points)
        self._max_trials = plan.config.search.max_trials
        self._settings = plan.settings if plan.config.search.sampler == "model" else None
        self._step: tuple[SearchState, Step] | None = None
        self._asked: dict[int, optuna.Trial] = {}  # those in flight, by number
        self._times: dict[int, tuple[datetime | None, datetime | None]] = {}
        self._settle_orphans(rescued or {})
        skip_proven, again = plan.config.search.skip_proven, plan.config.cluster.disturbance_check
        self._ledger = self._read(Ledger(plan.points, skip_proven, again, plan.step_limit))

    @property
    def name(self) -> str:
        """The study's name."""
        return self._name

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
        return beliefs_of(self._state(), self.plan.settings)

    def _next_step(self, state: SearchState) -> Step:
        """What to do next, decided once for each state of the record: lanes that wait ask often."""
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
        insist(trial.set_user_attr, "global_batch_size", self.plan.config.global_batch_size)
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


def open_study(plan: Plan, rescued: Rescued | None = None) -> TuningStudy:
    """Open or create the study of a plan, or its generation that this run can go on with.

    Args:
        plan: What to measure, and where it is kept; the folder of an SQLite file is made.
        rescued: Results that the storage did not take from the last driver, see `tuner.study.storage`.

    Raises:
        InputError: The storage can't be opened, the study was measured under another fingerprint, or it is
            older than a precision or a knob that is searched.
    """
    search = plan.config.search
    url = parse_storage(plan.storage)
    try:
        storage = open_storage(url)
        study = optuna.create_study(
            storage=storage,
            study_name=plan.name,
            directions=list(DIRECTIONS.values()),
            load_if_exists=True,
            pruner=optuna.pruners.NopPruner(),
        )
        check_fingerprint(study, plan.fingerprint)
        generation = generation_for(study, storage, plan.identity, plan.points, search.loss_tolerance)
        study = generation.study
        check_fingerprint(study, plan.fingerprint)
        precisions, knobs = stored_precisions(study, plan.points), stored_knobs(study, plan.points)
        sampler = make_sampler(search.sampler, plan.points, search.seed, precisions, knobs)
        if study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(DIRECTIONS))
        return TuningStudy(study, storage, sampler, plan, rescued, generation)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError, RuntimeError) as error:
        raise InputError(Fault("study.storage", why_not_opened(url, error))) from error
