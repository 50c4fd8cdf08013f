"""Present training settings as a configuration to tune (`tuner.run --from-...`), one file per trainer.

Explicit flags and the file of `--config` win over what is found there.
"""
