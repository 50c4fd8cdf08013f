"""GPUs that a lane has taken, so that no lane of another run on this machine starts its processes there, too.

Two lanes that look at quiet GPUs at the same time would both start: NVML knows of a process only once it has
opened the GPU. Then each would wait for the other's processes to go away.

A claim is a socket with a name made from the GPU's UUID, in Linux's abstract namespace: it needs no folder
that every user may write to, and is gone with its process. Containers with networks of their own do not see
each other's; there a lane that waits ends its processes (`cluster.lanes.guard`).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable

TAKEN = "another run of the tuner has taken it"


class Claim:
    """All GPUs of one lane, or none of them."""

    def __init__(self, uuids: Iterable[str]) -> None:
        # In the same order in every lane: of several that want the same ones, one gets them.
        self._uuids = sorted(uuids)
        self._held: list[socket.socket] = []

    def take(self) -> dict[str, str]:
        """Take them, unless that is done; otherwise say, by UUID, why one can't be had."""
        if self._held:
            return {}
        for uuid in self._uuids:
            ours = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._held.append(ours)
            try:
                ours.bind(f"\0lora-batch-tuner {uuid}")
            except OSError as error:
                self.release()
                if error.errno != errno.EADDRINUSE:
                    raise
                return {uuid: TAKEN}
        return {}

    def release(self) -> None:
        """Let others have them."""
        for ours in self._held:
            ours.close()
        self._held.clear()
