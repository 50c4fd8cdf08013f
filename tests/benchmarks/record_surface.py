"""Records a surface: every point of a grid, measured several times by the tuner's own `grid` sampler.

    python -m tests.benchmarks.record_surface NAME [--repeats 3] -- ARGUMENTS OF tuner.run
    python -m tests.benchmarks.record_surface --planned           # what is planned, with its arguments
    python -m tests.benchmarks.record_surface NAME                # one that is planned
    python -m tests.benchmarks.record_surface --all               # the planned ones that are not there yet

Each repeat is a run of its own (fresh Ray, workers and study), one lane, one after the other. The file,
`surfaces/NAME.json`, holds how and on what it was made, but no host names or folders.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import surface
from tests.benchmarks.surface import FOLDER, Surface
from train_fn.contract.trials import Status, TrialParams, TrialResult
from tuner.driver.command_line import load as load_config
from tuner.results.files import load_result
from tuner.results.output import RESULT_FILE
from tuner.space.points import candidates

ROOT = Path(__file__).parents[2]
REPEATS = 3
WITHOUT_LIMIT = 100_000

COMMON = "--cluster.device cpu --global-batch-size 24 --num-workers 2 --data.max-validation-samples 16"
KNOB = "--search.precision fp32 --search.knobs.attn_implementation sdpa,eager"
LLAMA = "--llama 2x192x49152"
PLANNED = {
    "cpu-demo": f"--repeats 2 -- {COMMON} --trial.steps 12 --cluster.memory-budget 48MiB",
    "cpu-demo-tight": f"-- {COMMON} --trial.steps 20 {KNOB} --cluster.memory-budget 26MiB",
    # bf16 would be twenty times slower with this vocabulary on a CPU without such instructions.
    "cpu-llama49k-96": f"{LLAMA} -- {COMMON} --trial.steps 12 {KNOB}"
    " --data.max-length 96 --cluster.memory-budget 130MiB",
    "cpu-llama49k-192": f"--repeats 2 {LLAMA} -- {COMMON} --trial.steps 12 {KNOB}"
    " --data.max-length 192 --cluster.memory-budget 170MiB",
}
"""Arguments by name. Budgets are such that about a third of the points run out of memory (tight: half).

A processor without bf16 units takes several times as long in bf16, which decides how long a grid takes.
"""

FORCED = {
    "--search.sampler": "grid",
    "--search.skip-proven": "false",
    "--search.max-trials": str(WITHOUT_LIMIT),
    "--cluster.lanes": "1",
    "--study.time-budget": "24h",
}


def parse(argv: list[str]) -> argparse.Namespace:
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="of the surface")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--llama", metavar="LAYERSxWIDTHxVOCABULARY", help="a random model, on the demo data")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the file")
    parser.add_argument("--planned", action="store_true", help="print the plan and end")
    parser.add_argument("--all", action="store_true", help="record what is planned and not there yet")
    args = parser.parse_args(argv[:end])
    args.tuner = argv[end + 1 :]
    if not (args.planned or args.all) and not (args.name and (args.tuner or args.name in PLANNED)):
        parser.error(f"expected arguments of the tuner after --, or a planned name: {', '.join(PLANNED)}")
    return args


def record(name: str, argv: list[str]) -> Path:
    """Record one surface and return its file.

    Args:
        name: Of the surface.
        argv: This command's arguments after the name.

    Raises:
        RuntimeError: A run ended without having measured everything.
    """
    args = parse([name, *argv])
    with tempfile.TemporaryDirectory() as folder:
        tuner = [*args.tuner, *_model_arguments(args.llama, Path(folder))]
        results = [_run(name, tuner, Path(folder) / str(repeat)) for repeat in range(args.repeats)]
    path = args.out / f"{name}.json"
    surface.save(merged(name, ["record_surface.py", name, *argv], args.tuner, results), path)
    return path


def merged(name: str, command: list[str], tuner: list[str], results: list[dict[str, Any]]) -> Surface:
    """The surface that several runs' `result.json` make.

    Args:
        name: Of the surface.
        command: That made it.
        tuner: The tuner's arguments, for what the results don't say.
        results: One per repeat.
    """
    trials: dict[TrialParams, list[TrialResult]] = {}
    for result in results:
        for trial in result["trials"]:
            point = TrialParams.from_dict(trial["params"])
            trials.setdefault(point, []).append(TrialResult.from_dict(trial))
    counts = {str(point): len(repeats) for point, repeats in trials.items() if len(repeats) != len(results)}
    if counts:
        raise RuntimeError(f"not measured in every one of {len(results)} repeats: {counts}")
    for point, repeats in trials.items():
        for repeat in repeats:
            if repeat.status == Status.FAILED:
                print(f"warning: {point} failed: {repeat.reason}: {repeat.detail}", file=sys.stderr)
    config, _ = load_config(tuner)
    first = results[0]
    return Surface(
        name=name,
        global_batch_size=first["global_batch_size"],
        num_workers=first["num_workers"],
        warmup_steps=config.trial.warmup_steps,
        points=list(trials),
        repeats=list(trials.values()),
        about={
            "command": " ".join(Path(word).name if word.startswith("/") else word for word in command),
            "date": datetime.date.today().isoformat(),
            "device": first["device"],
            "machine": machine(first["device"]),
            "versions": first["versions"],
            "wall_seconds": [round(result["wall_seconds"]) for result in results],
        },
    )


def machine(device: str) -> dict[str, Any]:
    """What the trials ran on: the processor's model and cores, and the GPU's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {"cpu": models[0] if models else "unknown", "cores": os.cpu_count()}
    if device == "cuda":
        import torch

        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def _model_arguments(llama: str | None, folder: Path) -> list[str]:
    """Of a random Llama on the demo's data; none for the tuner's own choice."""
    if llama is None:
        return []
    from transformers import LlamaConfig

    from tests.benchmarks.side_by_side import save_random_model
    from train_fn.data.demo.demo import demo

    layers, width, vocabulary = map(int, llama.split("x"))
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_attention_heads=max(width // 64, 1),
        num_key_value_heads=max(width // 64, 1),
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    model = save_random_model(config, folder / "model", "cpu", "float32")
    paths = demo()
    return ["--model", model, "--data.train", str(paths.train), "--data.validation", str(paths.validation)]


def _run(name: str, tuner: list[str], output_dir: Path) -> dict[str, Any]:
    forced = {**FORCED, "--study.name": f"surface-{name}", "--output-dir": str(output_dir)}
    command = [sys.executable, "-m", "tuner.run", *tuner, *(word for pair in forced.items() for word in pair)]
    environment = {"RAY_AUTH_MODE": "disabled", **os.environ}
    done = subprocess.run(command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, check=False)
    if done.returncode not in (0, 3):  # 3: nothing is feasible, which is a surface, too
        raise RuntimeError(f"the tuner ended with exit code {done.returncode}")
    return load_result(output_dir / RESULT_FILE)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.planned:
        for name, arguments in PLANNED.items():
            config, _ = load_config(parse([name, *arguments.split()]).tuner)
            device = config.for_device("cpu")
            points = candidates(device.global_batch_size, device.num_workers, ("fp32", "bf16"), (False, True))
            print(f"{name}: {len(points)} points: {arguments}")
        return
    if args.all:
        plan = {n: a.split() for n, a in PLANNED.items() if not (FOLDER / f"{n}.json").exists()}
    else:
        given = [a for a in sys.argv[1:] if a != args.name]
        plan = {args.name: given if args.tuner else [*given, *PLANNED[args.name].split()]}
    for name, argv in plan.items():
        path = record(name, argv)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
