"""Hugging Face's own classes take what is written for them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.export_cases import every_setting, named, quiet_environment, setting
from train_fn.contract.job import JobSpec
from train_fn.data.demo.demo import demo
from tuner.trainers.write import hf
from tuner.trainers.write.setting import Setting


def executed(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(text, "hf.py", "exec"), names)
    return names


def test_training_arguments_take_what_was_measured_on_a_cpu() -> None:
    given = setting(device="cpu", num_workers=1)
    names = executed(hf.render(given))
    arguments, lora = names["training_arguments"], names["lora_config"]
    size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert size * names["NUM_PROCESSES"] == given.global_batch_size
    assert arguments.device.type == "cpu"
    assert arguments.bf16
    assert arguments.activation_checkpointing
    assert arguments.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (3e-5, 0.02, 0.7)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 12, 0.1)
    assert lora.target_modules == "all-linear"


@pytest.mark.parametrize("given", [s for s in every_setting() if s.job.device == "cuda"], ids=named)
def test_training_arguments_take_every_setting(given: Setting) -> None:
    # What is there only on a GPU is refused without one, as it should be: bf16 unless on a CPU, and tf32.
    text = hf.render(given).replace("    optim=", "    use_cpu=True,\n    optim=")
    if given.params.precision == "tf32":
        text = text.replace("tf32=True", "tf32=False")
    names = executed(text)
    arguments, loading = names["training_arguments"], names["from_pretrained"]
    assert arguments.bf16 == (given.params.precision in ("bf16", "nf4"))
    assert arguments.fp16 == (given.params.precision == "fp16")
    assert arguments.activation_checkpointing == given.params.gradient_checkpointing
    assert arguments.optim == given.params.knobs.get("optimizer", "adamw_torch_fused")
    assert arguments.torch_compile == given.params.knobs.get("torch_compile", False)
    assert arguments.dataloader_num_workers == given.params.knobs.get("dataloader_num_workers", 0)
    assert loading.get("attn_implementation") == given.params.knobs.get("attn_implementation")
    if given.params.precision == "nf4":
        assert names["quantization_config"].load_in_4bit
        assert names["quantization_config"].bnb_4bit_quant_type == "nf4"


TRAIN = """
import json, sys, torch, transformers, datasets
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, **from_pretrained), lora_config)
ids = [tokenizer(f"{i} + {i} = {2 * i}")["input_ids"][:MAX_LENGTH] for i in range(int(sys.argv[2]))]
rows = datasets.Dataset.from_list([{"input_ids": i, "labels": i} for i in ids])
training_arguments.output_dir = sys.argv[1]
training_arguments.num_train_epochs = 1
training_arguments.save_strategy = "no"
training_arguments.report_to = []
trainer = Trainer(model, training_arguments, DataCollatorForSeq2Seq(tokenizer), rows)
trainer.train()
if training_arguments.process_index == 0:
    said = {"steps": trainer.state.global_step, "ranks": training_arguments.world_size}
    said["dtype"] = str(next(p for p in model.parameters() if not p.requires_grad).dtype)
    print(json.dumps(said), flush=True)
torch.distributed.destroy_process_group()  # its threads, left to the end of a process, may abort it
"""


@pytest.mark.slow
def test_the_launcher_line_trains_two_global_batches_in_two_steps(tmp_path: Path) -> None:
    job = JobSpec(model=str(demo().model), num_workers=2, device="cpu", batching="plain")
    given = setting(2, 3, **{name: getattr(job, name) for name in ("model", "num_workers", "device")})
    script = tmp_path / "train.py"
    script.write_text(hf.render(given) + TRAIN)
    line = re.search(r"#   (torchrun .*)", script.read_text())[1]  # type: ignore[index]
    launcher = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
    command = shlex.split(launcher.replace("your_script.py", str(script)))
    rows = 2 * given.global_batch_size
    out = subprocess.check_output([*command, tmp_path / "out", str(rows)], env=quiet_environment(), text=True)
    said = json.loads(out.splitlines()[-1])
    assert said == {"steps": 2, "ranks": 2, "dtype": "torch.bfloat16"}
