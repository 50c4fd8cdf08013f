"""A terminal of 80 columns with a program in it: keys can be pressed, and it can be closed."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

COLUMNS, LINES = 80, 30
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
_CURSOR_SHOWN = "\x1b[?25h"


class Terminal:
    """The program is the session's leader, as a shell's foreground job is the group that keys go to."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "TERM": "xterm-256color"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.output, self._closing = "", False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._closing:
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    chunk = os.read(self._master, 1 << 16)
                except OSError:  # everyone on the other side has gone
                    return
                self.output += chunk.decode(errors="replace")

    def press(self, key: str) -> None:
        """Type; `\\x03` is Ctrl-C, which the kernel makes a signal of."""
        os.write(self._master, key.encode())

    def hang_up(self) -> None:
        """Close the terminal under the program, as a dropped SSH connection does."""
        self._closing = True
        self._reader.join()  # a read in progress would keep it open
        os.close(self._master)

    def wait(self, timeout_seconds: float = 120) -> int:
        """The exit code, once all output has been read."""
        code = self.process.wait(timeout_seconds)
        if not self._closing:
            self._reader.join(5)
            self.hang_up()
        return code

    def wait_for(self, condition: Callable[[], object], timeout_seconds: float = 120) -> None:
        """Poll until it holds, while the program goes on."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert self.process.poll() is None, f"it ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"gave up waiting:\n{self.output}"
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """The program's descendants."""
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def lines(self) -> list[str]:
        """What stays on the screen after the live panel has gone, without colours."""
        return _CONTROL.sub("", self.output.rpartition(_CURSOR_SHOWN)[2]).split("\n")

    def end(self) -> None:
        """Leave nothing behind."""
        for process in [*self.family(), self.process] if self.process.poll() is None else []:
            process.kill()
        self.wait()
