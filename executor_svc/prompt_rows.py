"""Which log-probabilities of its prompt a sequence is told by which step. Pure Python."""

from collections.abc import Sequence as SequenceOf

from executor_svc.core import Scheduled, Sequence

MAX_PROMPT_ROWS = 256  # logits of prompt tokens that one step makes at most: a row is as long as the vocabulary


def prompt_rows(sequence: Sequence, count: int, items: SequenceOf[Scheduled]) -> range:
    """The positions whose logits are wanted of a sequence that goes on with up to `count` tokens, beside a step's items.

    What has been asked before is not asked again, though a preempted sequence computes it again. Where the range ends before
    the prompt's last token, the step must not go beyond its end: it could not be asked for the rest.
    """
    begin, start = sequence.prompt_told, sequence.num_computed
    left = MAX_PROMPT_ROWS - sum(len(item.prompt_rows) for item in items)
    last = sequence.prompt_len - 1  # behind the last prompt token stands the completion
    return range(begin, max(begin, min(begin + left, start + count, last)))
