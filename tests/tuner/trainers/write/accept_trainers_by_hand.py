"""The trainers themselves accept what `tuner.export` writes, each in a virtual environment of its own.

    python -m tests.tuner.trainers.write.accept_trainers_by_hand ms-swift --venv DIR
    python -m tests.tuner.trainers.write.accept_trainers_by_hand llamafactory --venv DIR
    python -m tests.tuner.trainers.write.accept_trainers_by_hand axolotl --venv DIR

They pin other versions than we do, so this is run by hand; the environment is made (some minutes) unless it
is there. A tiny Qwen2 of random weights and a file of exactly two global batches are made, a run's folder
is written with some points, and each is exported as a person would. ms-swift and LLaMA-Factory then really
train one epoch on two CPU ranks: it must be two optimizer steps, at the exported settings. Axolotl trains
on GPUs only: its own configuration classes read and check the file, once with the abilities of a GPU and
once without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.support.trainer_environments import PACKAGES, install, run

ROOT = Path(__file__).parents[4]
WORLD_SIZE, GLOBAL_BATCH, MAX_LENGTH = 2, 8, 128
KEYS = Path(__file__).parent / "trainer_keys.json"
QUIET = {"DISABLE_VERSION_CHECK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
"""Not all that the packages pin is there, see `PACKAGES`; nobody is told of the run."""
POINTS = [
    {"per_device_train_batch_size": 2, "precision": "fp32", "gradient_checkpointing": True},
    {"per_device_train_batch_size": 4, "precision": "bf16", "gradient_checkpointing": False},
    {"per_device_train_batch_size": 1, "precision": "bf16", "gradient_checkpointing": True,
     "knobs": {"attn_implementation": "eager", "optimizer": "adamw_torch"}},
]  # fmt: skip


def main() -> None:
    """Accept every point, or stop at the first that is not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trainer", choices=list(PACKAGES))
    parser.add_argument(
        "--venv", type=Path, required=True, help="folder of the trainer's virtual environment"
    )
    parser.add_argument("--points", type=int, nargs="*", default=range(len(POINTS)), help="their numbers")
    parser.add_argument(
        "--write-keys",
        action="store_true",
        help="write what the trainer knows of our keys to trainer_keys.json",
    )
    args = parser.parse_args()
    install(args.trainer, args.venv)
    if args.write_keys:
        write_keys(args.trainer, args.venv.absolute())
        return
    accept = {"ms-swift": accept_swift, "llamafactory": accept_llamafactory, "axolotl": accept_axolotl}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        for number in args.points:
            found = accept[args.trainer](args.venv.absolute(), folder, number)
            print(f"point {number}: {POINTS[number]}: {found}", flush=True)


def write_inputs(folder: Path) -> None:
    """A tiny model, data of two global batches, and the folder of a run that measured the points."""
    from transformers import Qwen2Config

    from tests.benchmarks.side_by_side import save_random_model

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=1280, num_hidden_layers=2, max_position_embeddings=256, **size)
    model = save_random_model(config, folder / "model", "cpu", "float32")
    # The demo's tokenizer is saved as it is; ms-swift asks for a chat template even where it uses none.
    rows = [
        {"question": f"What is {i} + {i}?", "answer": f" It is {2 * i}."} for i in range(2 * GLOBAL_BATCH)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / "run"
    run.mkdir()
    config_values = {
        "model": model,
        "data": {
            "train": str(folder / "train.jsonl"),
            "prompt": "question",
            "response": "answer",
            "max_length": MAX_LENGTH,
        },
        "global_batch_size": GLOBAL_BATCH,
        "num_workers": WORLD_SIZE,
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
        "optimizer": {"learning_rate": 2e-4, "weight_decay": 0.01, "max_grad_norm": 0.5},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config_values))
    trials = [
        {"number": number, "params": params_of(number), "status": "complete", "reason": None}
        for number in range(len(POINTS))
    ]
    result = {"study": "accepted", "global_batch_size": GLOBAL_BATCH, "num_workers": WORLD_SIZE}
    result |= {"device": "cpu", "trials": trials, "recommended": 0, "why": "the first"}
    (run / "result.json").write_text(json.dumps(result))


def params_of(number: int) -> dict[str, Any]:
    point = POINTS[number]
    accumulation = GLOBAL_BATCH // (WORLD_SIZE * point["per_device_train_batch_size"])
    return {"gradient_accumulation_steps": accumulation, **point}


def export(folder: Path, number: int, trainer: str, name: str) -> Path:
    """The file that `tuner.export` writes, from the command line."""
    output = folder / name
    command = [sys.executable, "-m", "tuner.export", str(folder / "run"), "--format", trainer]
    subprocess.run([*command, "--trial", str(number), "--output", str(output)], check=True, cwd=ROOT)
    return output


def must(found: dict[str, Any], expected: dict[str, Any]) -> None:
    wrong = {name: found.get(name) for name, value in expected.items() if found.get(name) != value}
    if wrong:
        raise SystemExit(f"expected {expected}, found {wrong}")


KNOWN = {
    "ms-swift": """
from dataclasses import fields
from swift.arguments import SftArguments
names, package = [f.name for f in fields(SftArguments)], "ms_swift"
""",
    "llamafactory": """
from dataclasses import fields
from llamafactory.hparams.parser import _TRAIN_ARGS
names, package = [f.name for kind in _TRAIN_ARGS for f in fields(kind)], "llamafactory"
""",
    "axolotl": """
from axolotl.utils.schemas.config import AxolotlInputConfig
names, package = list(AxolotlInputConfig.model_fields), "axolotl"
""",
}
"""What prints the names that a trainer's own classes have."""


def write_keys(trainer: str, python: Path) -> None:
    """Note which of our keys the trainer knows; test_registry holds every setting against them."""
    from tests.support.export_cases import every_setting
    from tuner.trainers.write import axolotl, llamafactory, ms_swift

    modules = {"ms-swift": ms_swift, "llamafactory": llamafactory, "axolotl": axolotl}
    used = {key for setting in every_setting() for key in modules[trainer].settings(setting)}
    tail = "import json; from importlib.metadata import version; print(json.dumps([names, version(package)]))"
    with tempfile.TemporaryDirectory() as folder:
        printed = run(["python", "-c", KNOWN[trainer] + tail], Path(folder), python, **QUIET)
    names, version = json.loads(printed.splitlines()[-1])
    if unknown := sorted(used - set(names)):
        raise SystemExit(f"{trainer} {version} does not know {unknown}")
    recorded = json.loads(KEYS.read_text()) if KEYS.exists() else {}
    recorded = {name: keys for name, keys in recorded.items() if name.split()[0] != trainer}
    recorded[f"{trainer} {version}"] = sorted(used)
    KEYS.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")
    print(f"{trainer} {version} knows all {len(used)} keys")


# --- ms-swift ---


def accept_swift(python: Path, folder: Path, number: int) -> str:
    """Train one epoch with the exported script."""
    script, out = export(folder, number, "ms-swift", "swift.sh"), folder / f"swift-{number}"
    extra = [
        "--model_type",
        "qwen2",
        "--num_train_epochs",
        "1",
        "--logging_steps",
        "1",
        "--save_strategy",
        "no",
    ]
    extra += ["--report_to", "none", "--output_dir", str(out), "--add_version", "false"]
    run(["bash", script, *extra], folder, python, MASTER_PORT="29611")
    logs = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    steps = [log["global_step/max_steps"] for log in logs if "loss" in log]
    if steps != ["1/2", "2/2"]:
        raise SystemExit(f"expected two optimizer steps, found {steps}")
    given, point = json.loads((out / "args.json").read_text()), params_of(number)
    is_bf16 = point["precision"] == "bf16"
    must(
        given,
        {
            "per_device_train_batch_size": point["per_device_train_batch_size"],
            "gradient_accumulation_steps": point["gradient_accumulation_steps"],
            "global_world_size": WORLD_SIZE,
            "bf16": is_bf16,
            "fp16": False,
            "torch_dtype": "bfloat16" if is_bf16 else "float32",
            "gradient_checkpointing": point["gradient_checkpointing"],
            "max_length": MAX_LENGTH,
            "truncation_strategy": "right",
            "lora_rank": 4,
            "lora_alpha": 8.0,
            "lora_dropout": 0.0,
            "target_modules": ["q_proj", "v_proj"],
            "learning_rate": 2e-4,
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
            "adam_beta2": 0.999,
            "optim": point.get("knobs", {}).get("optimizer", "adamw_torch_fused"),
            "attn_impl": point.get("knobs", {}).get("attn_implementation"),
        },
    )
    return f"two steps, losses {[round(log['loss'], 4) for log in logs if 'loss' in log]}"


# --- LLaMA-Factory ---


def accept_llamafactory(python: Path, folder: Path, number: int) -> str:
    """Train one epoch with the exported file."""
    file, out = export(folder, number, "llamafactory", "llamafactory.yaml"), folder / f"llamafactory-{number}"
    info = next(line for line in file.read_text().splitlines() if line.startswith('#   {"tuned"'))
    (folder / "dataset_info.json").write_text(info.removeprefix("#"))
    extra = [
        f"output_dir={out}",
        "num_train_epochs=1",
        "logging_steps=1",
        "save_strategy='no'",  # without quotes it is YAML's false
        "report_to=none",
    ]
    run(
        ["llamafactory-cli", "train", file, *extra],
        folder,
        python,
        FORCE_TORCHRUN="1",
        NPROC_PER_NODE=str(WORLD_SIZE),
        MASTER_PORT="29613",
        **QUIET,
    )
    logs = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    steps = [(log["current_steps"], log["total_steps"]) for log in logs if "loss" in log]
    if steps != [(1, 2), (2, 2)]:
        raise SystemExit(f"expected two optimizer steps, found {steps}")
    adapter, point = json.loads((out / "adapter_config.json").read_text()), params_of(number)
    must(adapter, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    code = (
        "import json, sys, torch; a = torch.load(sys.argv[1], weights_only=False); "
        "print(json.dumps({k: v for k, v in vars(a).items() if isinstance(v, (int, float, bool, str))}))"
    )
    given = json.loads(
        run(["python", "-c", code, out / "training_args.bin"], folder, python).splitlines()[-1]
    )
    must(
        given,
        {
            "per_device_train_batch_size": point["per_device_train_batch_size"],
            "gradient_accumulation_steps": point["gradient_accumulation_steps"],
            "bf16": point["precision"] == "bf16",
            "fp16": False,
            "learning_rate": 2e-4,
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
        },
    )
    return f"two steps, losses {[round(log['loss'], 4) for log in logs if 'loss' in log]}"


# --- Axolotl ---

CHECK_AXOLOTL = """
import json, sys, yaml
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
given = yaml.safe_load(open(sys.argv[1]))
able = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 2, "n_node": 1, "compute_capability": "sm_89"}
for capabilities in (None, able):
    env = {"torch_version": "2.13.0"} if capabilities else None
    cfg = validate_config(DictDefault(given), capabilities=capabilities, env_capabilities=env)
unknown = sorted(set(given) - set(type(cfg)(cfg).keys()))
print(json.dumps({"unknown": unknown, "cfg": {k: cfg[k] for k in given if k in cfg}}, default=str))
"""


def accept_axolotl(python: Path, folder: Path, number: int) -> str:
    """Have its own classes read and check the exported file."""
    file = export(folder, number, "axolotl", "axolotl.yaml")
    printed = run(["python", "-c", CHECK_AXOLOTL, file], folder, python, **QUIET)
    answer = json.loads(printed.splitlines()[-1])
    cfg, point = answer["cfg"], params_of(number)
    must(
        cfg,
        {
            "micro_batch_size": point["per_device_train_batch_size"],
            "gradient_accumulation_steps": point["gradient_accumulation_steps"],
            "bf16": point["precision"] == "bf16",
            "fp16": False,
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_modules": ["q_proj", "v_proj"],
            "sequence_len": MAX_LENGTH,
            "gradient_checkpointing": point["gradient_checkpointing"],
            "learning_rate": 2e-4,
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
        },
    )
    given = yaml.safe_load(file.read_text())
    lost = [key for key in answer["unknown"] if given[key] is not None]
    if lost:
        raise SystemExit(f"it does not know {lost}")
    return f"read and checked, all {len(given)} keys known"


if __name__ == "__main__":
    main()
