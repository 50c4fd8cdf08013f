"""Trainers in virtual environments of their own: they pin other versions than we do."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path
from typing import Any

PACKAGES = {
    "ms-swift": ["ms-swift==4.6.*", "torch==2.13.0", "numpy>=2"],
    # Without what only its web interface, audio and video need.
    "llamafactory": [
        *(
            "torch==2.13.0",
            "numpy",
            "transformers==5.6.0",
            "peft==0.18.1",
            "accelerate==1.11.0",
            "trl==0.24.0",
        ),
        *(
            "datasets==4.0.0",
            "omegaconf",
            "einops",
            "sentencepiece",
            "tiktoken",
            "pandas",
            "matplotlib",
            "scipy",
        ),
        "fire",
    ],
    "axolotl": [
        *("torch==2.13.0", "numpy<3", "transformers==5.16.1", "peft==0.20.0", "accelerate==1.13.0"),
        *(
            "datasets==4.8.4",
            "pydantic==2.12.5",
            "trl==1.9.0",
            "addict",
            "fire",
            "einops",
            "colorama",
            "requests",
        ),
        *("psutil", "pyyaml", "typer", "rich-click", "click", "python-dotenv", "posthog", "pillow"),
    ],
}
WITHOUT_DEPENDENCIES = {"llamafactory": "llamafactory==0.9.5", "axolotl": "axolotl==0.19.0"}


def install(trainer: str, folder: Path) -> None:
    """Make the virtual environment, unless it is there."""
    if (folder / "bin" / "pip").exists():
        return
    print(f"installing {trainer} in {folder}", flush=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet"]
    subprocess.run([*pip, *PACKAGES[trainer]], check=True)
    if trainer in WITHOUT_DEPENDENCIES:
        subprocess.run([*pip, "--no-deps", WITHOUT_DEPENDENCIES[trainer]], check=True)
    if trainer == "llamafactory":
        # PyPI's torchaudio needs CUDA's libraries. It is for sound only, of which there is none.
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "torchaudio.py").touch()


def run(command: list[Any], folder: Path, python: Path, **variables: str) -> str:
    """What a command of the trainer's environment prints; it must succeed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PATH": f"{python / 'bin'}:{environment['PATH']}", "OMP_NUM_THREADS": "1", **variables}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        first = max(done.stderr.find("Traceback"), 0)  # the launcher's own come after it
        raise SystemExit(f"{done.stdout[-3000:]}\n{done.stderr[first:][:6000]}\n{command} failed")
    return done.stdout
