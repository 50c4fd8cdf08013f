"""Accelerate's own parser and launcher take what is written for them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.export_cases import every_setting, named, quiet_environment, setting
from tuner.trainers.write import accelerate
from tuner.trainers.write.setting import Setting


@pytest.mark.parametrize("given", list(every_setting()), ids=named)
def test_accelerate_reads_its_file(given: Setting, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = tmp_path / "accelerate.yaml"
    file.write_text(accelerate.render(given))
    config = load_config_from_file(str(file))
    assert config.num_processes == given.job.num_workers
    assert config.mixed_precision == {"bf16": "bf16", "nf4": "bf16", "fp16": "fp16"}.get(
        given.params.precision, "no"
    )
    assert config.use_cpu == (given.job.device == "cpu")
    assert bool(config.dynamo_config) == bool(given.params.knobs.get("torch_compile"))


LAUNCHED = """
import os
from accelerate import Accelerator
a = Accelerator()
said = (a.num_processes, a.gradient_accumulation_steps, a.mixed_precision, a.device.type, a.state.backend)
os.write(1, (" ".join(map(str, said)) + "\\n").encode())  # at once, or the processes' words are mixed
a.end_training()
"""


@pytest.mark.slow
def test_accelerate_launches_as_many_processes_as_were_measured(tmp_path: Path) -> None:
    given = setting(2, 4, precision="bf16", device="cpu")
    file, script = tmp_path / "accelerate.yaml", tmp_path / "your_script.py"
    file.write_text(accelerate.render(given))
    script.write_text(LAUNCHED)
    line = re.search(r"#   (ACCELERATE_.*)", file.read_text())[1]  # type: ignore[index]
    environment = {**quiet_environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    line = line.replace("accelerate launch", "accelerate launch --main_process_port 0")
    out = subprocess.check_output(["bash", "-c", line], cwd=tmp_path, env=environment, text=True)
    assert out.splitlines() == ["2 4 bf16 cpu gloo"] * 2
