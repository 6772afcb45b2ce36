"""Signals that end a run after the step it is in: SIGTERM, as schedulers send it, and Ctrl-C; a second ends at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
AT_ONCE = "stopped; with checkpoints (training.save_steps) --resume goes on"


class Stopped(KeyboardInterrupt):
    """A signal ended what was on; the message says what is left and how to go on."""

    def __init__(self, number: int, message: str = AT_ONCE) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell makes of the signal."""
        return 128 + self.number


@contextmanager
def signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Give every signal that asks for an end to `handle`; afterwards they do what they did.

    In another thread than the main one nothing is changed, as Python lets only that one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        handle(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    # Who was told to ignore a hang-up (nohup), or is started in the background, still does.
    ours = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def stop_at_once(number: int) -> None:
    """End what is on with `Stopped`."""
    raise Stopped(number)


class StopRequest:
    """What the first signal leaves: `number`, which a loop asks for between two steps. The second ends at once."""

    def __init__(self, answer: str) -> None:
        self.number: int | None = None
        self._answer = answer

    def __call__(self, number: int) -> None:
        if self.number is not None:
            raise Stopped(number)
        self.number = number
        # Not by print, which the signal may have come into.
        os.write(2, f"\napt: {self._answer}\n".encode())
