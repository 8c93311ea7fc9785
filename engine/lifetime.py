"""What an object leaves behind, put away when nobody has the object any more."""

import os
import weakref
from collections.abc import Callable


def at_end(owner: object, action: Callable[[], object]) -> "weakref.finalize[[], object]":
    """Calls `action` once: when it is called itself, when `owner` is collected, or at the interpreter's exit.

    A forked child has a copy of everything, and puts away nothing that is its parent's.
    """
    process = os.getpid()

    def act() -> None:
        if os.getpid() == process:
            action()

    return weakref.finalize(owner, act)
