"""What each thread has for itself, in an object that threads share."""

import threading
from typing import Any


class PerThread(threading.local):
    """Base of slots of which every thread has its own.

    ``__init__`` runs in each thread and says what it finds there. Not class attributes: `torch.compile` would
    read them in place of what a thread has stored. A copy or a pickle starts anew: what a pass in flight left belongs
    to that pass.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
