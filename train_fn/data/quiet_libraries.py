"""Keeps the Hugging Face libraries from drawing progress bars and warnings over the tuner's own output."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Silence transformers, datasets and huggingface_hub in this process; real errors still raise."""
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # datasets logs the error that it is about to raise, too
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
