"""What an executor has sent for one request and its client has not read yet."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from engine.errors import EnginehouseError, ResourceExhausted
from protos.v1.common_pb2 import FinishInfo

MAX_PENDING_TOKENS = 65_536


class Delta(NamedTuple):
    """News of one request.

    Attributes:
        token_ids: new tokens.
        finish: with the last delta.
    """

    token_ids: list[int]
    finish: FinishInfo | None


class Inbox:
    """Filled by the link, emptied by the request's handler. Steps that the handler was too slow for become one delta.

    Attributes:
        engine_id: of the request.
        cached_tokens: of the prompt, found in the executor's prefix cache.
        closed: the executor sends nothing more.
    """

    def __init__(self, engine_id: str) -> None:
        self.engine_id = engine_id
        self.cached_tokens = 0
        self.closed = False
        self._token_ids: list[int] = []
        self._finish: FinishInfo | None = None
        self._error: EnginehouseError | None = None
        self._news = asyncio.Event()

    def push(self, token_ids: Sequence[int]) -> None:
        """Takes a step's tokens. More than MAX_PENDING_TOKENS unread ones fail the request and close the inbox."""
        self._token_ids += token_ids
        if len(self._token_ids) > MAX_PENDING_TOKENS:
            self._token_ids.clear()
            self.fail(
                ResourceExhausted(
                    f"the client left more than {MAX_PENDING_TOKENS} tokens unread: read faster, or ask for fewer",
                    reason="CLIENT_TOO_SLOW",
                )
            )
        self._news.set()

    def finish(self, finish: FinishInfo) -> None:
        """The request has ended well."""
        self._finish, self.closed = finish, True
        self._news.set()

    def fail(self, error: EnginehouseError) -> None:
        """The request has failed; tokens that came before are still delivered."""
        self._error, self.closed = error, True
        self._news.set()

    async def wait(self) -> None:
        """Waits until there is something to take."""
        await self._news.wait()

    def take(self) -> Delta:
        """Everything that is there. Raises what the request failed with, after the tokens that came before."""
        self._news.clear()
        token_ids, self._token_ids = self._token_ids, []
        if self._error:
            if not token_ids:
                raise self._error
            self._news.set()
        return Delta(token_ids, self._finish)
