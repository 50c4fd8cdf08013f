"""Points and outcomes in words."""

import pytest

from tests.support.console import out_of_memory, point
from train_fn.contract.trials import Status, TrialResult
from tuner.space.in_words import outcome, training_arguments


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_training_arguments_switch_on_the_precision_alone(precision):
    switched_on = [line.split("=")[0].strip() for line in training_arguments(point(4, precision)).splitlines()
                   if line.endswith("=True,")]  # fmt: skip
    assert switched_on == ([] if precision == "fp32" else [precision])


def test_nf4_says_how_the_model_is_loaded():
    text = training_arguments(point(4, "nf4"))
    assert "    bf16=True,\n    fp16=False," in text
    comments = [line.strip() for line in text.splitlines() if line.lstrip().startswith("#")]
    assert all(len(line) < 80 for line in text.splitlines())
    call = " ".join(comments).replace("# ", "").partition("quantization_config=")[2]
    assert " ".join(call.split()) == (
        "BitsAndBytesConfig( load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
        "bnb_4bit_compute_dtype='bfloat16', ))"
    )


def test_outcomes_in_words():
    assert outcome(out_of_memory()) == "infeasible (oom)"
    assert outcome(TrialResult(status=Status.PRUNED)) == "pruned"
