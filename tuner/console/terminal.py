"""Rich's console, for streams that may be pipes, and text in it that stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def console_on(stream: TextIO) -> Console:
    """Rich's console; it finds out about NO_COLOR, the terminal and its width (80 where there is none)."""
    from rich.console import Console

    class PipeAware(Console):
        """Rich would leave the program with exit code 1 when `| head` has seen enough."""

        def on_broken_pipe(self) -> None:
            raise

    return PipeAware(file=stream, highlight=False, soft_wrap=False)


def plain_text(text: object) -> RenderableType:
    """Text in which brackets are brackets, not rich's markup."""
    from rich.text import Text

    return Text(str(text))
