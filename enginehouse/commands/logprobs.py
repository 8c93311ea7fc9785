"""Log-probabilities as a table for a person: what stood in a token's place, and how sure the model was."""

import asyncio
import json
import math
import sys
from collections.abc import Sequence

from enginehouse.answer import Answer, TokenLogprob
from enginehouse.client import GatewayClient
from enginehouse.tables import print_table

_CALLS = 32  # under way at a time
_HEAD = ("token", "id", "logprob", "probability", "most probable")


async def print_logprobs(gateway: GatewayClient, model: str, answer: Answer) -> None:
    """Prints what was asked for to stderr; nothing if nothing was."""
    tables = [("of the prompt", answer.prompt_logprobs)]
    many = len(answer.completions) > 1
    for number, completion in enumerate(answer.completions, 1):
        tables.append((f"of completion {number}" if many else "of the completion", completion.logprobs))
    rows = [row for _, table in tables for row in table]
    ids = {row.token_id for row in rows if row.token_id is not None} | {i for row in rows for i, _ in row.top}
    order = sorted(ids)
    few = asyncio.Semaphore(_CALLS)

    async def text(token_id: int) -> str:
        async with few:
            return await gateway.detokenize(model, [token_id], skip_special_tokens=False)

    said = await asyncio.gather(*map(text, order))
    texts = dict(zip(order, said, strict=True))
    for name, table in tables:
        if table:
            print(f"log-probabilities {name}:", file=sys.stderr)
            print_table(_HEAD, [_line(row, texts) for row in table], "", sys.stderr)


def _line(row: TokenLogprob, texts: dict[int, str]) -> Sequence[str]:
    known = row.token_id is not None
    return (
        _quoted(texts[row.token_id]) if row.token_id is not None else "-",
        str(row.token_id) if known else "-",
        f"{row.logprob:.3f}",
        f"{100 * math.exp(row.logprob):.1f}%",
        "  ".join(f"{_quoted(texts[token_id])} {100 * math.exp(logprob):.1f}%" for token_id, logprob in row.top),
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
