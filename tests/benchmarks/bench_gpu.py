"""Our training function against Hugging Face's `Trainer` on one GPU: samples per second and peak memory.

    python -m tests.benchmarks.bench_gpu [--shape 0.5b --shape 7b] [--length 512 --length 2048]
    python -m tests.benchmarks.bench_gpu --device cpu --shape tiny --length 64      # the same code, anywhere

Models have the shapes of Qwen2.5 and random weights in bf16; they are written to a temporary folder first
(16 GB for 7b, see `--scratch`). Lengths are those of GSM8K, drawn from a seed and stretched by length / 512,
or come from `--train`. Prompts are not supervised. World size 1: ours in a process group of one (nccl), the
`Trainer` without one, as an ordinary script. Both sides as in side_by_side.py: pairs over the same batches
after one that warms up, in alternating order; memory at its worst. What runs out of memory is a row that says
so; the other side's rate is then that of the pair in which it happened.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

# Before torch looks: the `Trainer` would spread over all the GPUs that it sees.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import numpy as np
import torch
import torch.distributed as dist
import transformers

from tests.benchmarks import side_by_side
from tests.benchmarks.side_by_side import MIB, Measured
from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.precisions import PRECISIONS
from train_fn.data.demo.demo import demo
from train_fn.memory.out_of_memory import is_out_of_memory
from train_fn.session import open_worker

SHAPES = {  # of Qwen2.5: layers, hidden, intermediate, heads, key-value heads, vocabulary, tied embeddings
    "tiny": (2, 64, 128, 4, 2, 2_048, True),
    "0.5b": (24, 896, 4_864, 14, 2, 151_936, True),
    "7b": (28, 3_584, 18_944, 28, 4, 152_064, False),
}
PROMPT_LOG_TOKENS, RESPONSE_LOG_TOKENS = (4.04, 0.35), (4.74, 0.42)
"""Mean and deviation of the logarithm of GSM8K's lengths, in tokens of SmolLM2's tokenizer."""
NUM_SAMPLES = 1_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: 0.5b and 7b")
    parser.add_argument("--length", type=int, action="append", help="max_length; default: 512 and 2048")
    parser.add_argument("--train", help="file with --prompt and --response; default: drawn lengths")
    parser.add_argument("--prompt", default="prompt", help="column")
    parser.add_argument("--response", default="response", help="column")
    parser.add_argument("--per-device", type=int, action="append", help="default: 4 and 8")
    parser.add_argument("--global-batch", type=int, default=32)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps of a side in a pair")
    parser.add_argument("--scratch", help="folder for the models; default: the system's temporary one")
    return parser.parse_args()


def main() -> None:
    """Measure every combination and print a table in Markdown."""
    args = parse()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --device cpu --shape tiny runs the same code")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    print(machine(device), flush=True)
    print(
        "\n| model | length | per-device | ours, samples/s | Trainer, samples/s | Trainer's step by ours "
        "| our peak | Trainer's peak |\n|---|---|---|---|---|---|---|---|"
    )
    for shape in args.shape or ("0.5b", "7b"):
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            model = side_by_side.save_random_model(
                config(shape), Path(folder) / "model", str(device), "bfloat16"
            )
            for length in args.length or (512, 2048):
                measure(args, shape, model, length, device, Path(folder))
    dist.destroy_process_group()


def measure(
    args: argparse.Namespace, shape: str, model: str, length: int, device: torch.device, folder: Path
) -> None:
    """The rows of one model at one length."""
    train = args.train or write_samples(folder / f"{length}.jsonl", length)
    job = JobSpec(
        model=model,
        data=DataSpec(
            train=train,
            validation=train,
            prompt=args.prompt if args.train else "prompt",
            response=args.response if args.train else "response",
            max_length=length,
            max_validation_samples=8,
        ),
        global_batch_size=args.global_batch,
        num_workers=1,
        steps=args.steps + 1,
        warmup_steps=1,
        timeout_seconds=3600,
        device=args.device,
    )
    try:
        worker = open_worker(job, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"| {shape} | {length} | - | the base alone runs out of memory | | | | |", flush=True)
        return
    for per_device in args.per_device or (4, 8):
        params = side_by_side.point(
            per_device, args.global_batch // per_device, args.precision, args.gradient_checkpointing
        )
        print(f"| {shape} | {length} | {per_device} | {row(worker, params, args.pairs)} |", flush=True)
    worker.base.drop()
    worker.memory.release()


def row(worker: Any, params: Any, count: int) -> str:
    """Rates, ratio and peaks of one point."""
    measured = list(side_by_side.pairs(worker, params, count))
    ours, theirs = ([pair[side] for pair in measured] for side in (0, 1))
    both = [(o, t) for o, t in measured if not (o.out_of_memory or t.out_of_memory)]
    ratio = side_by_side.spread([t.mean_seconds / o.mean_seconds for o, t in both]) if both else "-"
    peaks = (side_by_side.our_peak_bytes(worker, params), side_by_side.trainer_peak_bytes(worker, params))
    samples = worker.job.global_batch_size
    return " | ".join([rate(ours, samples), rate(theirs, samples), ratio, *map(mebibytes, peaks)])


def rate(runs: list[Measured], samples: int) -> str:
    if any(run.out_of_memory for run in runs):
        return "out of memory"
    return f"{samples / statistics.fmean(run.mean_seconds for run in runs):.2f}"


def mebibytes(peaks: list[int] | None) -> str:
    return "out of memory" if peaks is None else f"{max(peaks) / MIB:,.0f} MiB"


def config(shape: str) -> Any:
    layers, hidden, intermediate, heads, key_value_heads, vocabulary, tied = SHAPES[shape]
    return transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=tied,
    )


def write_samples(path: Path, length: int) -> str:
    """Prompts and responses of drawn lengths, of words that are one token each in the demo's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo().model)
    spelled = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    words = [w for w in spelled if w[:1] == " " and w[1:].isalpha() and len(tokenizer(w)["input_ids"]) == 1]
    rng = np.random.default_rng(0)

    def text(mean: float, deviation: float) -> str:
        tokens = max(int(rng.lognormal(mean, deviation) * length / 512), 2)
        return "".join(rng.choice(words, tokens))

    rows = [
        {"prompt": text(*PROMPT_LOG_TOKENS), "response": text(*RESPONSE_LOG_TOKENS)}
        for _ in range(NUM_SAMPLES)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def machine(device: torch.device) -> str:
    """Card, driver and versions, in one line."""
    name = "CPU"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        total = torch.cuda.get_device_properties(device).total_memory / (1 << 30)
        name = f"{torch.cuda.get_device_name(device)}, {total:.0f} GiB, driver {driver or 'unknown'}"
    import peft

    versions = (
        f"CUDA {torch.version.cuda}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return f"{name}, {versions}, peft {peft.__version__}"


if __name__ == "__main__":
    main()
