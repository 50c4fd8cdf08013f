"""Our training function against ms-swift 4.6 (`swift sft`): time of an optimizer step on two CPU ranks.

    python tests/benchmarks/bench_swift.py --venv DIR --model FOLDER --train train.jsonl \
        --validation test.jsonl --prompt question --response answer --max-length 512

ms-swift pins other versions than we do, so it lives in a virtual environment of its own, made in `--venv`
(some minutes) unless it is there, with our version of torch; its transformers is another. What is compared,
at each pair in fresh processes, one side after the other, the order alternating:

- the same rows, in the same optimizer steps (shuffling is off there, and the file is in our order); that both
  sides make equally long samples of them is checked; prompts are not supervised on either side;
- LoRA r 8, alpha 16, no dropout, on all linear layers; AdamW at a constant rate; fp32; no checkpointing; two
  ranks over gloo, one thread per core; per-device 4, global 32 by default; all else is each side's default;
- seconds per optimizer step, the first one excluded as warm-up: ours from `TrialResult.step_seconds` (the
  slowest rank), theirs from `train_speed(s/it)` of logging.jsonl, the time since training began by the number
  of steps, hence differences. Start-up, loading and tokenising are in neither. Theirs logs every step.

Losses are not compared: on two ranks ms-swift's log shows about twice its loss of the same samples on one.
A pair's ratio is their mean seconds by ours: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.contract.environment import worker_environment
from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.trials import TrialResult
from train_fn.data.batching import global_batches
from train_fn.data.demo.demo import demo

WORLD_SIZE = 2
PACKAGES = ["ms-swift==4.6.*", "torch==2.13.0", "numpy>=2"]
VARIABLES = {"OMP_NUM_THREADS": str(max((os.cpu_count() or WORLD_SIZE) // WORLD_SIZE, 1))}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, required=True, help="folder of ms-swift's virtual environment")
    parser.add_argument("--model", help="folder of a Llama; default: the demo")
    parser.add_argument("--train", type=Path, help="JSONL; default: the demo's")
    parser.add_argument("--validation", type=Path, help="JSONL; needed with --train")
    parser.add_argument("--prompt", default="prompt", help="column")
    parser.add_argument("--response", default="response", help="column")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--per-device", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="timed optimizer steps of a run, after one more")
    return parser.parse_args()


def main() -> None:
    """Run the pairs and print their ratios."""
    args = parse()
    install(args.venv)
    train, validation = args.train or demo().train, args.validation or demo().validation
    lines = [json.loads(line) for line in Path(train).read_text(encoding="utf-8").splitlines()]
    per_pair = (1 + args.steps) * args.global_batch
    ratios = []
    for number in range(args.pairs):
        rows = lines[number * per_pair :][:per_pair]
        with tempfile.TemporaryDirectory() as folder:
            took = measure(args, rows, validation, Path(folder), swift_first=number % 2 == 1)
        ratios.append(took["ms-swift"] / took["ours"])
        named = ", ".join(f"{side} {seconds:.2f} s" for side, seconds in sorted(took.items()))
        print(f"pair {number + 1}: {named} per step, {ratios[-1]:.3f}", flush=True)
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"ms-swift's step by ours: median {middle:.3f}, min {low:.3f}, max {high:.3f}, {args.pairs} pairs")


def measure(
    args: argparse.Namespace, rows: list[Any], validation: Path, folder: Path, swift_first: bool
) -> dict[str, float]:
    """Mean seconds per timed step of both sides, over the same rows."""
    job = write_inputs(args, rows, validation, folder)
    sides = [("ours", ours), ("ms-swift", swift)]
    return {name: run_side(args, job, folder) for name, run_side in (sides[::-1] if swift_first else sides)}


def install(folder: Path) -> None:
    """Make the virtual environment, unless it is there."""
    if (folder / "bin" / "swift").exists():
        return
    print(f"installing {', '.join(PACKAGES)} in {folder}", flush=True)
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)


def write_inputs(args: argparse.Namespace, rows: list[Any], validation: Path, folder: Path) -> JobSpec:
    """ours.jsonl, and the same rows for ms-swift in the order in which our optimizer steps take them."""
    steps = 1 + args.steps
    if len(rows) != steps * args.global_batch:
        raise SystemExit("--train has too few rows for so many pairs")
    job = JobSpec(
        model=args.model,
        data=DataSpec(
            train=str(folder / "ours.jsonl"),
            validation=str(validation),
            prompt=args.prompt,
            response=args.response,
            max_length=args.max_length,
            max_validation_samples=2 * WORLD_SIZE,
        ),
        global_batch_size=args.global_batch,
        steps=steps,
        warmup_steps=1,
        timeout_seconds=3600,
    )
    one_epoch = np.ones(len(rows), dtype=int)  # of which all batches are taken, however long they are
    order = np.concatenate(global_batches(one_epoch, job))
    roles = (("user", args.prompt), ("assistant", args.response))
    chats = [
        {"messages": [{"role": role, "content": rows[i][column]} for role, column in roles]} for i in order
    ]
    for name, content in (("ours.jsonl", rows), ("swift.jsonl", chats)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    return job


def ours(args: argparse.Namespace, job: JobSpec, folder: Path) -> float:
    """Mean seconds of our timed steps."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={WORLD_SIZE}",
    ]
    options = ["--per-device", args.per_device, "--accumulation", accumulation(args)]
    output = run(
        [*command, "-m", "train_fn", "--job", folder / "job.json", *options],
        {**os.environ, **worker_environment("cpu"), **VARIABLES},
    )
    result = TrialResult.from_dict(json.loads(output[output.index("{") :]))
    if result.status != "complete":
        raise SystemExit(f"our trial is {result.status}: {result.detail}")
    return statistics.fmean(result.step_seconds)


def accumulation(args: argparse.Namespace) -> int:
    return int(args.global_batch // (args.per_device * WORLD_SIZE))


def swift(args: argparse.Namespace, job: JobSpec, folder: Path) -> float:
    """Mean seconds of ms-swift's timed steps."""
    out = folder / "swift"
    shutil.rmtree(out, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment.update(VARIABLES, NPROC_PER_NODE=str(WORLD_SIZE), MASTER_PORT=str(free_port()))
    run(
        [args.venv / "bin" / "swift", "sft", *swift_options(args, job, folder), "--output_dir", out],
        environment,
    )
    logs = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    check_lengths(job, logs[-1]["train_dataset"])
    speeds = [log["train_speed(s/it)"] for log in logs if "loss" in log]
    elapsed = [speed * (step + 1) for step, speed in enumerate(speeds)]
    if len(elapsed) != job.steps:
        raise SystemExit(f"ms-swift made {len(elapsed)} steps instead of {job.steps}")
    return (elapsed[-1] - elapsed[0]) / args.steps


def swift_options(args: argparse.Namespace, job: JobSpec, folder: Path) -> list[Any]:
    settings: dict[str, Any] = {
        "model": args.model or demo().model,
        "use_hf": "true",
        "model_type": "llama",
        "template": "dummy",  # prompt, response, end of sequence, as they are
        "dataset": folder / "swift.jsonl",
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "max_length": args.max_length,
        "truncation_strategy": "right",
        "ddp_backend": "gloo",
        "torch_dtype": "float32",
        "tuner_type": "lora",
        "lora_rank": job.lora.r,
        "lora_alpha": job.lora.alpha,
        "lora_dropout": job.lora.dropout,
        "target_modules": job.lora.target_modules,
        "learning_rate": job.optimizer.learning_rate,
        "weight_decay": job.optimizer.weight_decay,
        "max_grad_norm": job.optimizer.max_grad_norm,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": "false",
        "per_device_train_batch_size": args.per_device,
        "gradient_accumulation_steps": accumulation(args),
        "max_steps": job.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "add_version": "false",
    }
    return [part for key, value in settings.items() for part in (f"--{key}", value)]


def check_lengths(job: JobSpec, reported: str) -> None:
    """Both sides must have made the same of the rows: number, mean, shortest and longest sample."""
    from transformers import AutoTokenizer

    from train_fn.data import samples
    from train_fn.data.demo.demo import model_source

    lengths = samples.load(job.data, AutoTokenizer.from_pretrained(model_source(job)), None).train.lengths
    parts = [f"{lengths.mean():.6f}", f"min={lengths.min():.6f}", f"max={lengths.max():.6f}"]
    if not all(part in reported for part in [*parts, f"size={len(lengths)}"]):
        raise SystemExit(f"samples differ: ours {parts}, {len(lengths)} of them, ms-swift's {reported}")


def run(command: list[Any], environment: dict[str, str]) -> str:
    """Standard output of a command that must succeed; what it said is shown when it does not."""
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}\n{command[0]} failed")
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
