"""A progress bar on stderr, without dependencies."""

import sys
import time
from types import TracebackType


class Progress:
    """Show how far a loop is: one line that redraws itself; outside of a terminal, a plain line now and then.

    Args:
      total: number of steps.
      label: what the steps are of.

    Example:
      >>> from pallas_kernels.progress import Progress
      >>> with Progress(3, "training") as progress:
      ...     for step in range(3):
      ...         progress.advance(f"step {step}")
    """

    def __init__(self, total: int, label: str):
        self.total, self.label = total, label
        self.done, self.shown, self.start = 0, float("-inf"), time.monotonic()
        self.live = sys.stderr.isatty()

    def advance(self, message: str = "") -> None:
        """One more step is done; `message` says what there is to say about it."""
        self.done += 1
        now = time.monotonic()
        if self.done < self.total and now - self.shown < (0.1 if self.live else 15):
            return
        self.shown = now
        left = (now - self.start) * (self.total - self.done) / self.done
        filled = 24 * self.done // self.total
        bar = f"{'━' * filled}{' ' * (24 - filled)} " if self.live else ""
        line = f"{self.label} {bar}{self.done}/{self.total}  {message}  {left:.0f} s left"
        sys.stderr.write(f"\r{line}\033[K" if self.live else f"{line}\n")
        sys.stderr.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        # An error or Ctrl-C, too, starts on a line of its own.
        if self.live and self.done:
            sys.stderr.write("\n")
