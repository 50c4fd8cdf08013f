"""Every precision, in the order that studies keep. Standard library only."""

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "nf4")
"""Every precision that a trial can name; which of them a device offers is decided in `tuner.space.points`.
New ones go to the end: studies keep the list that they began with. `nf4` is bf16 over a base in 4 bits
(QLoRA)."""
