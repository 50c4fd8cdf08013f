"""Ranks that are to use a GPU of the stand-in driver compute on the CPU: there is no CUDA behind it.

On the path of a process that is to do so; all that the product decides and starts stays as it is. Asked
whether it can use the GPUs, torch says yes. A rank that begins, which is after its GPUs are quiet, notes what
it would have used beside the state of the stand-in driver (see `noted`).
"""

import builtins
import json
import os
import sys
from pathlib import Path

_import = builtins.__import__


def _importing(name, *arguments):
    module = _import(name, *arguments)
    workers = sys.modules.get("cluster.lanes.workers")
    if hasattr(workers, "seen") and builtins.__import__ is not _import:  # it is loaded to its end
        builtins.__import__ = _import
        _open = workers.Rank.open

        def open_on_cpu(self):
            note = {"pid": os.getpid(), "rank": self.number, "device": self.device, "shown": self.shown}
            Path(os.environ["FAKE_NVML_STATE"] + f".rank-{os.getpid()}").write_text(json.dumps(note))
            self.device = "cpu"
            return _open(self)

        workers.Rank.open = open_on_cpu
    return module


if any(word.endswith("default_worker.py") for word in sys.orig_argv):
    builtins.__import__ = _importing
elif "train_fn.memory.cuda_check" in sys.orig_argv:
    print('\n{"problem": null}', flush=True)
    os._exit(0)
