"""The end of an executor that was told to stop: what runs may end, nothing new is taken, the rest goes on elsewhere."""

import asyncio
import time
from collections.abc import Mapping

from engine.errors import Unavailable
from executor_svc.clients import Client
from protos.v1.executor_pb2 import StepOutput
from protos.v1.worker_pb2 import ClientDone, ToWorker

_LOOK = 0.02  # seconds between two looks at whether all has ended


def take_no_more(client: Client, hold: bool = False) -> None:
    """Nothing more comes from the client, or is taken of it: its workers say when they have told all.

    Args:
        hold: as `Client.drain` has it.
    """
    client.drain({worker.engine_id for worker in client.used if not worker.ended.done()}, hold)
    for worker in client.used:
        worker.send(ToWorker(client=client.number, client_done=ClientDone()))


class Drain:
    """Run streams stand until the last request of any has ended: their clients see by them what happens.

    Attributes:
        begun: it has.

    Args:
        clients: all streams of the front, by number.
    """

    def __init__(self, clients: Mapping[int, Client]) -> None:
        self.begun = False
        self._clients = clients

    def check(self) -> None:
        """Raises Unavailable once it has begun."""
        if self.begun:
            raise Unavailable(
                "this executor is being stopped and takes nothing new: send it to another one",
                reason="EXECUTOR_DRAINING",
            )

    def joined(self, client: Client) -> None:
        """A stream begins."""
        if self.begun:
            take_no_more(client, hold=True)

    async def run(self, seconds: float) -> None:
        """Returns when all requests have ended; after so many seconds, or when it is cancelled, it ends the rest."""
        self.begun = True
        for client in list(self._clients.values()):
            client.put(StepOutput(draining=True).SerializeToString())
            take_no_more(client, hold=True)
        deadline = time.monotonic() + seconds
        try:
            while not all(client.idle for client in self._clients.values()) and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK)
        finally:
            for client in list(self._clients.values()):
                if client.idle:
                    client.drain(set())
                else:
                    client.fail(
                        Unavailable(
                            "this executor was stopped: go on at another one, with the tokens so far as resume_token_ids",
                            reason="EXECUTOR_DRAINING",
                        )
                    )
