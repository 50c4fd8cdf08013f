"""Our training function against Hugging Face's `Trainer`: time of an optimizer step, and peak memory.

    python -m tests.benchmarks.bench_train_fn --model FOLDER --train train.jsonl --validation test.jsonl \
        --prompt question --response answer --max-length 512 --case 4x32 --case 8x64 --case equal

Without `--model` and `--train` it takes the built-in demo; `--random-llama N` is a random Llama of N layers
with SmolLM2-135M's width and vocabulary. A case is PER_DEVICExGLOBAL; `equal` is 4x32 on samples of one
length, everything supervised, where neither padding nor prompts can be saved.

Time: both sides in the same two ranks (gloo), in turn, on one resident base model, with the same global
batches, per-device batch, accumulation, precision, adapter and optimizer; after a pair that warms up,
`--pairs` pairs, the order alternating. A step runs from fetching its samples to the end of the optimizer's
step, and the slowest rank counts. A pair's ratio is the `Trainer`'s seconds by ours: above 1 we are faster.

With `--compile` the other side is ours with `torch_compile` (padded, where ours may pack), and time alone is
measured; what compiling takes is told apart. With `--unfused` it is ours without `train_fn.model.fused`.

Memory: each side in fresh processes, live memory at its worst (the longest samples, optimizer state in
place), base model included, see `side_by_side.trainer_peak_bytes`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from train_fn.contract.environment import worker_environment
from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.precisions import PRECISIONS

WORLD_SIZE = 2
GIB = 1 << 30
RUNS = {"Trainer": "run_trainer", "compiled": "run_compiled", "unfused": "run_unfused"}
"""The other side, and what `side_by_side` calls it."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder of a causal language model; default: the demo")
    model.add_argument("--random-llama", type=int, metavar="LAYERS", help="a random model instead")
    parser.add_argument("--train", help="file; default: the demo's data")
    parser.add_argument("--validation", help="file; needed with --train")
    parser.add_argument("--prompt", default="prompt", help="column")
    parser.add_argument("--response", default="response", help="column")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--case", action="append", help="PER_DEVICExGLOBAL or equal; may be repeated")
    parser.add_argument("--equal-length", type=int, default=128, help="tokens of a sample in case `equal`")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batching", choices=("balanced", "plain"), default="balanced")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a side in a pair, all timed")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--compile", action="store_true", help="ours compiled in place of the Trainer")
    other.add_argument("--unfused", action="store_true", help="ours without fused operations instead")
    parser.add_argument("--only", choices=("time", "memory"), help="default: both")
    return parser.parse_args()


# The driver: one torchrun per measurement.


def main() -> None:
    """Run every case and print what came of it."""
    if "RANK" in os.environ:
        rank_main(Path(sys.argv[1]))
        return
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        model = random_llama(args, Path(folder) / "model") if args.random_llama else args.model
        for case in args.case or ["4x32"]:
            run_case(args, case, model, Path(folder))


def run_case(args: argparse.Namespace, case: str, model: str | None, folder: Path) -> None:
    per_device, global_batch = map(int, ("4x32" if case == "equal" else case).split("x"))
    other = "compiled" if args.compile else "unfused" if args.unfused else "Trainer"
    order = {
        "job": job_of(args, case, model, global_batch, folder),
        "point": [per_device, global_batch // (WORLD_SIZE * per_device), args.precision],
        "pairs": args.pairs,
        "other": other,
    }
    print(
        f"{case}: per-device {per_device}, global {global_batch}, {args.precision}, {args.batching}",
        flush=True,
    )
    if args.only != "memory":
        found = torchrun({**order, "what": "time"}, folder)
        print(f"  {other} step by ours: {found['ratio']} in {found['pairs']} pairs")
        named = f"ours {found['ours']}, {other} {found['theirs']}; lengths {found['lengths']}"
        print(f"  seconds per step: {named}", flush=True)
        if args.compile:
            print(f"  seconds of compiling and setting up: {found['setup']}", flush=True)
    if args.only != "time" and other == "Trainer":
        ours, theirs = (torchrun({**order, "what": w}, folder)["peak"] for w in ("our peak", "trainer peak"))
        print(f"  peak of the larger rank: {peaks(ours, theirs)}", flush=True)


def peaks(ours: list[int] | None, theirs: list[int] | None) -> str:
    if ours is None or theirs is None:
        return f"ours {ours}, Trainer {theirs} (None: out of memory)"
    ratio = max(theirs) / max(ours)
    return f"ours {max(ours) / GIB:.3f} GiB, Trainer {max(theirs) / GIB:.3f} GiB, {ratio:.2f} times ours"


def job_of(args: argparse.Namespace, case: str, model: str | None, global_batch: int, folder: Path) -> Any:
    import dataclasses

    from train_fn.data.demo.demo import demo

    train, validation = args.train, args.validation
    columns: dict[str, Any] = {
        "prompt": args.prompt,
        "response": args.response,
        "max_length": args.max_length,
    }
    if case == "equal":
        train = equal_lengths(train or demo().train, args, folder / "equal.jsonl")
        validation, columns = train, {"text": "text", "max_length": args.equal_length}
    job = JobSpec(
        model=model,
        data=DataSpec(train=train, validation=validation, max_validation_samples=2 * WORLD_SIZE, **columns),
        global_batch_size=global_batch,
        steps=args.steps,
        warmup_steps=0,
        batching=args.batching,
        timeout_seconds=3600,
    )
    return dataclasses.asdict(job)


def equal_lengths(source: str | Path, args: argparse.Namespace, path: Path) -> str:
    """Join samples to texts that are longer than `--equal-length` tokens; loading cuts them to it."""
    texts, text = [], ""
    for line in Path(source).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text += f"{row[args.prompt]}\n{row[args.response]}\n"
        if len(text) > 8 * args.equal_length:
            texts.append(text)
            text = ""
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def torchrun(order: dict[str, Any], folder: Path) -> Any:
    """Let two ranks carry out an order; what rank 0 found. Their warnings go to standard error."""
    (folder / "order.json").write_text(json.dumps(order))
    (folder / "found.json").unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={WORLD_SIZE}",
    ]
    threads = max((os.cpu_count() or WORLD_SIZE) // WORLD_SIZE, 1)
    environment = {**os.environ, **worker_environment("cpu"), "OMP_NUM_THREADS": str(threads)}
    subprocess.run(
        [*command, "-m", "tests.benchmarks.bench_train_fn", str(folder)], env=environment, check=True
    )
    return json.loads((folder / "found.json").read_text())


def random_llama(args: argparse.Namespace, folder: Path) -> str:
    from transformers import LlamaConfig

    from tests.benchmarks.side_by_side import save_random_model

    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=args.random_llama,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
    )
    return save_random_model(config, folder, "cpu", "float32")


# A rank.


def rank_main(folder: Path) -> None:
    """Do what order.json says; rank 0 writes found.json."""
    import torch
    import torch.distributed as dist

    from tests.benchmarks import side_by_side
    from train_fn.session import open_worker

    order = json.loads((folder / "order.json").read_text())
    dist.init_process_group("gloo")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    worker = open_worker(JobSpec.from_dict(order["job"]), torch.device("cpu"))
    params = side_by_side.point(*order["point"])
    if order["what"] == "time":
        found = timed(worker, params, order["pairs"], getattr(side_by_side, RUNS[order["other"]]))
    elif order["what"] == "our peak":
        found = {"peak": side_by_side.our_peak_bytes(worker, params)}
    else:
        found = {"peak": side_by_side.trainer_peak_bytes(worker, params)}
    if worker.ranks.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def timed(worker: Any, params: Any, count: int, run_theirs: Any) -> dict[str, Any]:
    """Seconds and ratios of all pairs, the same on every rank."""
    from tests.benchmarks.side_by_side import pairs, spread

    ours, theirs, setup = [], [], []
    for one, other in pairs(worker, params, count, run_theirs):
        if one.out_of_memory or other.out_of_memory:
            raise SystemExit("out of memory: take a smaller batch")
        ours.append(one.mean_seconds)
        theirs.append(other.mean_seconds)
        setup.append(other.setup_seconds)
        if worker.ranks.rank == 0:
            print(f"  pair {len(ours)}: ours {ours[-1]:.2f} s, other {theirs[-1]:.2f} s", flush=True)
    lengths = worker.samples.train.lengths
    return {
        "ratio": spread([t / o for o, t in zip(ours, theirs, strict=True)]),
        "ours": spread(ours),
        "theirs": spread(theirs),
        "setup": spread(setup),
        "pairs": len(ours),
        "lengths": f"{lengths.mean():.0f} ({lengths.min()} to {lengths.max()})",
    }


if __name__ == "__main__":
    main()
