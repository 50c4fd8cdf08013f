"""What another trainer can't do as the tuner did it, in lines for people."""

from __future__ import annotations

from textwrap import wrap

from train_fn.contract.knobs import DEFAULTS
from tuner.trainers.write.setting import Setting

_WIDTH = 100


def one_line(text: object) -> str:
    """Text that stays within its comment, whatever a model or a study is called."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def comment(*lines: str) -> str:
    """Lines as comments with `#`; long ones are folded."""
    folded = [
        part for line in lines for part in (wrap(one_line(line), _WIDTH, break_on_hyphens=False) or [""])
    ]
    return "".join(f"# {part}".rstrip() + "\n" for part in folded)


def head(setting: Setting) -> list[str]:
    """Which measurement this is, and how its global batch comes about."""
    params, workers = setting.params, setting.job.num_workers
    batch = (
        f"Global batch {setting.global_batch_size} = {workers} process{'es' if workers > 1 else ''} x "
        f"{params.per_device_train_batch_size} per device x {params.gradient_accumulation_steps} accumulated."
    )
    return [*setting.origin, batch]


def notes(setting: Setting, *, lean_loss: str, compiles_layers: bool = False) -> list[str]:
    """What differs from the measurement in any trainer.

    Args:
        setting: The configuration.
        lean_loss: What the trainer has against logits of all positions at once, as one switches it on.
        compiles_layers: It compiles layer by layer, as the tuner does.
    """
    job, knobs = setting.job, setting.params.knobs
    found = ["The rate was constant; a schedule changes neither speed nor memory."]
    if job.train_fn is not None:
        found = [
            f"Measured with your own training function {job.train_fn}: what it made of model, data, adapter "
            "and optimizer, and what it does with memory, only it knows."
        ]
    else:
        if job.batching == "balanced":
            found.append(
                "Measured with trial.batching: balanced, which this trainer can't do: it deals the samples "
                "of a global batch so that padding is least. Where lengths differ, expect less than was "
                "measured; tune with trial.batching: plain to choose for the trainer's order of samples."
            )
        found.append(
            "Verdict, peak and speed are those of the tuner's own training step. A trainer that makes the "
            "logits of all positions at once needs far more memory: what just fits here can be 4 to 8 times "
            "too large there. Before a long run, take a quarter of the per-device batch and four times the "
            "accumulation, which is the same global batch, and double it while your longest samples fit; or "
            f"{lean_loss}."
        )
    if knobs.get("torch_compile") and not compiles_layers:
        found.append("The tuner compiles the decoder's layers one by one, this trainer the model as a whole.")
    if knobs.get("optimizer") == "adafactor":
        found.append("Measured with torch.optim.Adafactor; transformers has an Adafactor of its own.")
    if knobs.get("dataloader_num_workers"):
        found.append("The tuner loads data ahead in threads, this trainer in processes.")
    found += [f"Your knob {name}: {value!r}" for name, value in knobs.items() if name not in DEFAULTS]
    return found
