"""Ranks that are told to use a GPU of the stand-in driver compute on the CPU: there is no CUDA behind it.

On the path of a process that is to do so; all that the product decides and starts stays as it is. Asked
whether it can use the GPUs, torch says yes.
"""

import os
import sys

if "train_fn.server" in sys.orig_argv:
    sys.argv[sys.argv.index("--device") + 1] = "cpu"
elif "train_fn.memory.cuda_check" in sys.orig_argv:
    print('\n{"problem": null}', flush=True)
    os._exit(0)
