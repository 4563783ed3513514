"""Progress bars with a rate and the time left; silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Advance", "Reporter", "progress", "silent"]

Advance = Callable[[int], None]
Reporter = Callable[[str, int], Advance]


def silent(label: str, total: int) -> Advance:
    """A reporter that shows nothing."""
    return lambda n: None


@contextmanager
def progress(enabled: bool | None = None) -> Iterator[Reporter]:
    """A reporter: ``report(label, total)`` opens a bar and returns its ``advance(n)``.

    Args:
        enabled: show bars; by default only where standard error is a terminal.
    """
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Items a second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "-", style="dim")

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def report(label: str, total: int) -> Advance:
            bar = bars.add_task(label, total=total)

            def advance(n: int) -> None:
                bars.advance(bar, n)
                if bars.tasks and any(t.id == bar and t.finished for t in bars.tasks):
                    bars.remove_task(bar)

            return advance

        yield report
