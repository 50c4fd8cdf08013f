"""What `loggers` needs before anything starts: its packages, and for W&B a key."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.parse import urlsplit

from train_fn.contract.faults import Fault
from tuner.config.schema import Config

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow-skinny", "wandb": "wandb"}
"""What to install with pip, where the module of that name is missing."""
_MODULES = {"tensorboard": "tensorboardX"}


def check_loggers(config: Config) -> Iterator[Fault]:
    """One fault for each logger that could not log."""
    for name in config.loggers:
        if find_spec(_MODULES.get(name, name)) is None:
            problem = f"{name} needs a package that is not installed: pip install {PACKAGES[name]}"
            yield Fault("loggers", f"{problem}; or leave it out")
        elif name == "wandb" and not _has_wandb_key():
            yield Fault(
                "loggers", "wandb has no key; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
            )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:  # where `wandb login` puts it
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
