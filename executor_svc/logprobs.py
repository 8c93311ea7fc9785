"""Log-probabilities of tokens and of their alternatives, from logits."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from executor_svc.core import Logprobs, Scheduled

# Logits that are worked on at a time: 16 MiB, which an allocator gives again without asking the system.
_SLICE = 1 << 22


def slices(rows: list[int], vocab_size: int) -> Iterator[list[int]]:
    """Rows of logits, as many at a time as are worked on at once."""
    size = max(_SLICE // vocab_size, 1)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[N, vocab] -> the `count` largest of each row and their token ids, [N, count], equal ones by their ids."""
    values, ids = scores.topk(min(count, scores.shape[-1]))
    ids, order = ids.sort(-1)
    values, order = values.gather(-1, order).sort(stable=True, dim=-1, descending=True)
    return values, ids.gather(-1, order)


def log_probabilities(logits: Tensor, rows: list[int], token_ids: list[int], top: int) -> list[Logprobs]:
    """The log-probability of a token and of the `top` most probable ones, for each of some rows.

    Args:
        logits: float32 [N, vocab].
        token_ids: one for each of the rows.
    """
    found: list[Logprobs] = []
    supply = iter(token_ids)
    for part in slices(rows, logits.shape[-1]):
        scores = torch.log_softmax(logits[part], -1)
        chosen = torch.tensor(list(itertools.islice(supply, len(part))), device=scores.device)
        own = scores.gather(-1, chosen[:, None]).squeeze(-1).tolist()
        values, ids = best(scores, top)
        found += [
            Logprobs([logprob], len(row_ids), row_ids, row_values)
            for logprob, row_ids, row_values in zip(own, ids.tolist(), values.tolist(), strict=True)
        ]
    return found


def of_prompts(logits: Tensor, items: tuple[Scheduled, ...]) -> dict[int, Logprobs]:
    """What is wanted of a batch's prompt tokens, by index into its items.

    Args:
        logits: float32 [rows, vocab], of the items' prompt_rows one after another.
    """
    found: dict[int, Logprobs] = {}
    begin = 0
    for index, item in enumerate(items):
        if not item.prompt_rows:
            continue
        end = begin + len(item.prompt_rows)
        behind = item.sequence.token_ids[item.prompt_rows.start + 1 : item.prompt_rows.stop + 1]
        each = log_probabilities(logits, list(range(begin, end)), behind, item.sequence.prompt_logprobs or 0)
        found[index] = Logprobs(
            [row.logprobs[0] for row in each],
            each[0].top,
            [token for row in each for token in row.top_token_ids],
            [logprob for row in each for logprob in row.top_logprobs],
        )
        begin = end
    return found
