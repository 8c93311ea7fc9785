"""`enginehouse unload`: an engine out of executors that run."""

import asyncio
from collections.abc import Sequence

from engine.errors import FailedPrecondition, InvalidArgument
from enginehouse.client import ExecutorClient
from enginehouse.commands.load import executors_of
from enginehouse.home import Home
from enginehouse.progress import stderr
from enginehouse.tables import print_json


def run(engine: str, executors: Sequence[str], home: Home, drain: float, *, as_json: bool = False) -> None:
    """Unloads an engine, by the first digits of its id, from these executors, or from those of the running local cluster.

    Args:
        drain: seconds that its requests may take to end.

    Raises:
        FailedPrecondition: there is no executor, or one has not loaded it.
        InvalidArgument: several engines of an executor begin with these digits.
    """
    addresses = executors_of(executors, home, "nothing is to be unloaded")
    engine_id = asyncio.run(_unload(engine, addresses, drain))
    if as_json:
        print_json({"engine_id": engine_id, "executors": list(addresses)})
    else:
        stderr().print(f"{engine_id[:12]}: unloaded by {len(addresses)} executor{'' if len(addresses) == 1 else 's'}")


async def _unload(engine: str, executors: Sequence[str], drain: float) -> str:
    return (await asyncio.gather(*(_unload_at(address, engine, drain) for address in executors)))[0]


async def _unload_at(address: str, engine: str, drain: float) -> str:
    async with ExecutorClient(address) as executor:
        loaded = [found.engine_id for found in (await executor.status()).engines]
        matching = [engine_id for engine_id in loaded if engine_id.startswith(engine)]
        if not matching:
            have = ", ".join(engine_id[:12] for engine_id in loaded) or "none"
            raise FailedPrecondition(
                f"executor {address} has no engine {engine!r} loaded; it has: {have}", reason="ENGINE_NOT_LOADED"
            )
        if len(matching) > 1:
            raise InvalidArgument(f"{engine!r} begins the ids of {len(matching)} engines: give more digits")
        await executor.unload(matching[0], drain)
        return matching[0]
