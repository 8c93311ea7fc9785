"""The executor; at SIGUSR2 its front writes to $COUNTS how many asyncio tasks it has and how many streams it knows."""

import asyncio
import gc
import os
import signal
import sys
from pathlib import Path

from executor_svc.__main__ import main


def tell(*_: object) -> None:
    from executor_svc.clients import Client

    gc.collect()
    clients = sum(isinstance(found, Client) for found in gc.get_objects())
    whole = Path(os.environ["COUNTS"])
    part = whole.with_suffix(".part")
    part.write_text(f"{len(asyncio.all_tasks())} {clients}")
    part.rename(whole)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, tell)
    sys.exit(main())
