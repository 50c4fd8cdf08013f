"""Your own training function: what it gets, what it must report, and how it is found.

    train_fn: my_package.training:train       # in the configuration

`TrainFunction` is the whole contract. Every rank calls the function once per trial, in a process that stays
from trial to trial, so what a module keeps in its globals (a model, a dataset) is loaded once.

    python -m train_fn.custom my_package.training:train      # what is wrong with it, as JSON

imports a function and looks at it: the driver asks a process of its own, since an import may take a GPU,
change the process or end it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from train_fn.contract.faults import Fault, InputError, first_line
from train_fn.contract.job import DataSpec, LoraSpec, OptimizerSpec
from train_fn.contract.trials import TrialParams

if TYPE_CHECKING:
    import torch

KEY = "train_fn"
FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
EXPECTED = "expected module:function, such as my_package.training:train"
IMPORT_SECONDS = 120.0
"""How long the import may take in the driver's check."""


class TrainFunction(Protocol):
    """One trial on one rank: train `context.steps` optimizer steps, report each, validate.

    The default process group is initialised (gloo on a CPU, NCCL on CUDA); don't destroy it. The function
    keeps to `context.params`, knobs included: an optimizer step takes `gradient_accumulation_steps`
    micro-batches of `per_device_train_batch_size` samples on this rank. It calls `context.report_step` after
    every optimizer step. Running out of memory needs no care: let the error rise.
    """

    def __call__(self, context: TrialContext, /) -> tuple[float, float]:
        """Train and validate.

        Returns:
            The summed validation loss and what it is summed over (tokens, or samples), of this rank's share
            of the validation set. Both are summed over ranks, and divided: the trial's validation loss.
        """
        ...


class Recorder(Protocol):
    """The service's side of a `TrialContext`."""

    def report_step(self, num_samples: int, loss: float) -> None:
        """See `TrialContext`."""

    def probe(self, work: Callable[[], object]) -> None:
        """See `TrialContext`."""

    def autocast(self) -> torch.autocast:
        """See `TrialContext`."""


@dataclass(frozen=True, kw_only=True)
class TrialContext:
    """What a training function gets.

    Attributes:
        params: The point to measure. What `search.knobs` adds is in `params.knobs`, under any names: what
            they mean is up to the function.
        global_batch_size: Samples per optimizer step over all ranks.
        rank: This rank, from 0.
        world_size: How many ranks there are.
        device: This rank's device; on CUDA it is the current one.
        steps: Optimizer steps to train, warm-up included.
        warmup_steps: How many of them, at the start, are not timed.
        seed: The same in every trial; Python, NumPy and PyTorch have been seeded with it.
        model: As in the configuration; None where it names none.
        data: As in the configuration.
        lora: As in the configuration.
        optimizer: As in the configuration.
        recorder: What takes the reports; call the methods below instead.
    """

    params: TrialParams
    global_batch_size: int
    rank: int
    world_size: int
    device: torch.device
    steps: int
    warmup_steps: int
    seed: int
    model: str | None
    data: DataSpec
    lora: LoraSpec
    optimizer: OptimizerSpec
    recorder: Recorder

    def report_step(self, *, num_samples: int, loss: float) -> None:
        """Say that an optimizer step is done. Collective: every rank calls it after each of its steps.

        The time from one report to the next is the step's time; the slowest rank counts. The first report
        starts the clock, so the first step is never timed. A trial that is over ends in here, by an exception
        that must not be caught.

        Args:
            num_samples: How many samples this rank has put into the step; over all ranks they must be
                `global_batch_size`.
            loss: Their mean loss.
        """
        self.recorder.report_step(num_samples, loss)

    def probe(self, work: Callable[[], object]) -> None:
        """Optional: run the largest micro-batch that can come, before the first step. Collective.

        Without it, "feasible" means that the steps of the trial fitted, not the whole dataset. On a CPU it is
        also what makes training run at full speed, since exact accounting of memory ends with it.

        Args:
            work: One forward and backward pass at this per-device batch, on the longest samples, and one
                evaluation batch. It must not talk to other ranks (`DistributedDataParallel`: under
                `no_sync()`) and should leave gradients at zero.
        """
        self.recorder.probe(work)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass in the trial's precision; fp16 needs your `GradScaler` as well."""
        return self.recorder.autocast()


def load_function(name: str) -> TrainFunction:
    """Import a function by its name, `module:function`.

    Raises:
        InputError: There is no such function, or it can't take a trial.
    """
    if not FUNCTION_NAME.fullmatch(name):
        raise _fault(f"{EXPECTED}, got {name!r}")
    module_name, _, function_name = name.partition(":")
    module = _import(module_name)
    function = getattr(module, function_name, None)
    if function is None:
        raise _fault(f"{module_name} has no {function_name!r}{_nearest(module, function_name)}")
    if not callable(function):
        raise _fault(f"{name} is no function but of type {type(function).__name__}; {EXPECTED}")
    _check_signature(name, function)
    loaded: TrainFunction = function
    return loaded


def check_function(name: str) -> list[Fault]:
    """What is wrong with a function, found out in a process of its own."""
    command = [sys.executable, "-m", "train_fn.custom", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [
            Fault(KEY, f"importing {name} took longer than {IMPORT_SECONDS:g} s; load data in the function")
        ]
    try:
        problem = json.loads(done.stdout.splitlines()[-1])["problem"]
    except (IndexError, ValueError, TypeError, KeyError):
        problem = f"importing {name} ended the process with exit code {done.returncode}"
    return [Fault(KEY, problem)] if problem else []


def _import(module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            advice = "start from the folder that holds it, or install it"
            raise _fault(
                f"there is no module {error.name!r} in {Path.cwd()} or installed; {advice}"
            ) from error
        raise _fault(f"{module_name} can't be imported: {_described(error)}") from error
    except (Exception, SystemExit) as error:
        raise _fault(f"{module_name} can't be imported: {_described(error)}") from error


def _described(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({Path(frame.filename).name}:{frame.lineno})"
    return f"{type(error).__name__}: {first_line(error)}{where}"


def _nearest(module: Any, function_name: str) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    near = difflib.get_close_matches(function_name, own, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; it has {', '.join(own[:12])}" if own else ""


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have none
        return
    try:
        signature.bind(object())
    except TypeError:
        raise _fault(f"{name}{signature} must take one argument, the trial's context") from None


def _fault(problem: str) -> InputError:
    return InputError(Fault(KEY, problem))


def main() -> int:
    """Import the function that is named on the command line, print what is wrong with it."""
    problem = None
    try:
        load_function(sys.argv[1])
    except InputError as error:
        problem = error.faults[0].problem
    print("\n" + json.dumps({"problem": problem}), flush=True)
    os._exit(0)  # what the import has started must not keep this process


if __name__ == "__main__":
    sys.exit(main())
