"""Guides by themselves: what is refused and in which words, what is bounded, what is remembered, which tokens are allowed."""

import random
import select
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, ResourceExhausted
from engine.token_table import TokenTable
from executor_svc.core import Batch, Reason, Sampled, Sampling, Scheduled, SchedulerConfig, Sequence
from executor_svc.grammars import vocabulary
from executor_svc.guides import Guides
from executor_svc.kernels import choose
from executor_svc.processors import _masks, edit
from executor_svc.sampler import sample
from executor_svc.scheduler import Scheduler
from protos.v1.common_pb2 import GuidedDecoding
from tests.guided import guided

EOS = 256
TABLE = TokenTable((*(bytes([byte]) for byte in range(256)), b"</s>", b"<tool>", b"ab", b"", b"abc"), (256, 257))
SLOW = '{"type": "integer", "multipleOf": 9999991}'  # takes minutes


@pytest.fixture(scope="module")
def guides() -> Iterator[Guides]:
    made = Guides(TABLE, seconds=20)
    yield made
    made.close()


def request(prompt: str = "x", **fields: Any) -> Sequence:
    return Sequence(0, 0, list(prompt.encode()), len(prompt), 50, eos_ids=frozenset({EOS}), **fields)


def allowed(sequence: Sequence) -> list[int]:
    sequence.guide.bits()
    bits = np.unpackbits(sequence.guide.mask, count=len(TABLE.tokens), bitorder="little")
    return np.nonzero(bits)[0].tolist()


def follow(sequence: Sequence, text: bytes) -> bool:
    """Whether the completion ends with the last of these tokens."""
    return [sequence.guide.accept(byte) for byte in text][-1]


def test_every_token_that_a_text_may_go_on_with_is_allowed(guides: Guides) -> None:
    """However a tokenizer would write it; the end where the text may end; at its end nothing is waited for."""
    sequence = guided(request(), guides, regex="abcd?")
    assert allowed(sequence) == [ord("a"), 258, 260]
    assert not sequence.guide.accept(258)
    assert allowed(sequence) == [ord("c")]
    assert not follow(sequence, b"c")
    assert allowed(sequence) == [ord("d"), EOS]
    assert follow(sequence, b"d")


def test_special_tokens_are_no_text(guides: Guides) -> None:
    assert allowed(guided(request(), guides, ["</s>", "<tool>"])) == [ord("<")]
    named = guided(request(), guides, grammar='start: <tool> "x"')
    assert allowed(named) == [257]
    assert not named.guide.accept(257)
    assert allowed(named) == [ord("x")]


def test_ends_are_those_of_the_request(guides: Guides) -> None:
    ends = guided(request(stop_ids=frozenset({ord("b"), 257})), guides, regex="a*b?")
    assert allowed(ends) == [ord("a"), ord("b"), EOS, 257, 258]
    none = guided(Sequence(0, 0, [1], 1, 5), guides, regex="a*")
    assert allowed(none) == [ord("a")]


def test_masks_that_were_begun_with_a_batch_are_the_same(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [b'{"a": ', b"{", b'{"b": [1,', b'{"c": "\xc3']
    run, again = ([guided(request(), guides, json_object=True) for _ in texts] for _ in range(2))
    monkeypatch.setattr("executor_svc.guide._TOO_SLOW", -1000)
    for sequence, text in zip(run, texts, strict=True):
        assert not follow(sequence, text)
    monkeypatch.undo()
    monkeypatch.setattr("executor_svc.guide._QUICK", 60)
    for sequence, text in zip(again, texts, strict=True):
        assert not follow(sequence, text)
    items = [Scheduled(sequence, 0, 1, True) for sequence in run]
    guides.prepare(Batch(1, (*items, Scheduled(request(), 0, 1, True), Scheduled(again[0], 0, 1, False))))
    assert all(sequence.guide.begun is None and sequence.guide.ready for sequence in again)
    assert all(sequence.guide.begun is not None for sequence in run)
    assert [allowed(sequence) for sequence in run] == [allowed(sequence) for sequence in again]


def test_masks_are_the_bits() -> None:
    bits = np.random.default_rng(0).integers(0, 256, (3, 8), dtype=np.uint8)
    for count in (64, 61, 57):
        wanted = [
            [0.0 if row[token >> 3] >> (token & 7) & 1 else -np.inf for token in range(count)] for row in bits.tolist()
        ]
        assert _masks(bits, count, torch.device("cpu")).tolist() == wanted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_token_costs(temperature: float, guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the matcher for the token, one for the next mask, none for the end where the text cannot end; no float masks."""
    monkeypatch.setattr("executor_svc.guide._QUICK", 60)
    monkeypatch.setattr("executor_svc.sampler.edit", None if choose.serves(torch.zeros(1, 1)) else edit)
    monkeypatch.setattr(guides, "_masks", None)
    run = [guided(request(sampling=Sampling(temperature)), guides, regex="[a-c]{200}") for _ in range(32)]
    calls: Counter[str] = Counter()

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            calls[name] += 1
            return call(*arguments)

        return count

    for sequence in run:
        sequence.guide.bits()
        for name in ("_consume", "_compute", "_is_stopped"):
            setattr(sequence.guide, name, counted(name, getattr(sequence.guide, name)))
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        guides.prepare(Batch(step, tuple(Scheduled(sequence, 0, 1, True) for sequence in run)))
        logits = torch.randn(len(run), len(TABLE.tokens), generator=generator)
        for sequence, token in zip(run, sample(logits, run, [1] * len(run)).token_ids, strict=True):
            assert not sequence.guide.accept(token)
    assert calls == {"_consume": 20 * len(run), "_compute": 20 * len(run)}


def test_masks_that_take_long_are_left_to_the_thread(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of them: now and then one is tried again, and when they are quick, they are computed at once again."""
    one = guided(request(), guides, regex="a{1,500}").guide

    def computed_at_once(tokens: int) -> int:
        return sum(not one.accept(ord("a")) and one.ready for _ in range(tokens))

    monkeypatch.setattr("executor_svc.guide._QUICK", -1)
    assert computed_at_once(100) < 10
    monkeypatch.setattr("executor_svc.guide._QUICK", 60)
    computed_at_once(100)
    assert computed_at_once(100) == 100


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(), Sampling(1.0, 3, 0.9, min_p=0.1), Sampling(repetition_penalty=3)]
)
def test_only_allowed_tokens_are_chosen_beside_free_rows(
    guides: Guides, sampling: Sampling, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(choose, "_library", None)
    free, held = request(sampling=sampling), guided(request(sampling=sampling), guides, regex="[pqr]")
    logits = torch.randn(40, len(TABLE.tokens), generator=torch.Generator().manual_seed(0)) * 4
    logits[:, ord("q")] = -50.0
    kept = logits.clone()
    tokens = sample(logits, [free, held] * 20, list(range(1, 41))).token_ids
    assert torch.equal(logits, kept)
    assert set(tokens[1::2]) <= {ord("p"), ord("q"), ord("r")}
    assert tokens[::2] == sample(logits, [free, free] * 20, list(range(1, 41))).token_ids[::2]


@pytest.mark.parametrize("native", [True, False])
def test_frequencies_are_those_of_what_is_allowed(
    guides: Guides, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chi-square, as in test_sampler.py; and the same token for a seed and position alone as beside other rows."""
    if not native:
        monkeypatch.setattr(choose, "_library", None)
    count, temperature = 5000, 0.7
    logits = torch.randn(1, len(TABLE.tokens), generator=torch.Generator().manual_seed(0)).expand(count, -1)
    held = guided(request(sampling=Sampling(temperature, seed=3)), guides, regex="[k-p]")
    tokens = sample(logits, [held] * count, list(range(1, count + 1))).token_ids
    places = list(range(ord("k"), ord("p") + 1))
    assert set(tokens) <= set(places)
    wanted = count * torch.softmax(logits[0, places].double() / temperature, -1).numpy()
    counts = np.bincount(tokens, minlength=len(TABLE.tokens))[places]
    assert ((counts - wanted) ** 2 / wanted).sum() < 5 + 4 * np.sqrt(2 * 5) + 12
    others = [
        request(sampling=Sampling(0.0)),
        request(),
        guided(request(sampling=Sampling(0.0)), guides, regex="[k-p]"),
    ]
    mixed = sample(logits[:400], [*others, held] * 100, [at // 4 + 1 for at in range(400)]).token_ids
    assert mixed[3::4] == tokens[:100]
    assert [sample(logits[:1], [held], [at]).token_ids[0] for at in range(1, 101)] == tokens[:100]


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        ({"regex": "("}, "guided_decoding.regex cannot be used: invalid regex .* unclosed group"),
        ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"grammar": "start: foo"}, r"guided_decoding.grammar cannot be used: at 1\(8\): unknown name: \"foo\""),
        ({"grammar": 'foo: "a"'}, "no start rule"),
        ({"grammar": "root ::= foo"}, "Rule 'foo' not found"),
        ({"grammar": 'root ::= "a'}, "Unexpected end of input"),
        ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "too deeply nested"),
        ({"regex": "(" * 20_000 + "a" + ")" * 20_000}, "cannot be used"),
        ({"json_schema": '{"type": "foo"}'}, "guided_decoding.json_schema cannot be used: .*Invalid type: foo"),
        ({"json_schema": '{"not": {}}'}, "Unimplemented keys"),
        ({"json_schema": '{"oneOf": [{"type": "object"}, {"type": "object"}]}'}, "oneOf constraints are not supported"),
        ({"json_schema": '{"enum": []}'}, "Unsatisfiable schema"),
        ({"json_schema": '{"$ref": "#"}'}, "matches no text"),
        ({"json_schema": '{"$ref": "http://127.0.0.1:1/x"}'}, "not present in a registry"),
        ({"json_schema": '{"$ref": "file:///etc/passwd"}'}, "not present in a registry"),
        ({"json_schema": '{"not": {}, "x-guidance": {"lenient": true}}'}, "Unimplemented keys"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_is_no_grammar(guides: Guides, guide: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says) as caught:
        guided(request(), guides, **guide)
    assert caught.value.reason == "GUIDED_DECODING_INVALID"
    assert len(caught.value.message) < 600 and "no_forcing" not in caught.value.message


@pytest.mark.parametrize(
    "guide",
    [
        {"regex": "(a+)+b"},
        {"regex": "(a|a|ab)*c"},
        {"regex": "[ab]*a[ab]{200}"},
        {"regex": "(a{1,1000}){1,1000}"},
        {"json_schema": '{"type": "array", "items":' * 60 + "{}" + "}" * 60},
        {"json_schema": '{"type": "array", "minItems": 1000000, "items": {"type": "string", "minLength": 1000000}}'},
        {"json_schema": '{"$defs": {"a": {"type": "object", "properties": {"l": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"}'},
        {"grammar": 'start: start start | "a" |'},
        {"grammar": "start: r0\n" + "\n".join(f'r{i}: r{i + 1} "a" | r{i + 1}' for i in range(300)) + '\nr300: "b"'},
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_looks_dangerous_and_is_bounded(guides: Guides, guide: dict[str, str]) -> None:
    """Compiled, or refused as too complex: at once, or when it is; then it is refused from then on."""
    try:
        sequence = guided(request(), guides, **guide)
    except ResourceExhausted as error:
        assert error.reason == "GUIDED_DECODING_TOO_COMPLEX"
        return
    numbers = random.Random(0)
    for _ in range(100):
        if sequence.guide.accept(numbers.choice([token for token in allowed(sequence) if token != EOS] or [EOS])):
            break
    if sequence.guide.error:
        assert sequence.guide.error.reason == "GUIDED_DECODING_TOO_COMPLEX"
        with pytest.raises(ResourceExhausted, match="too complex"):
            guides.begin(request(), GuidedDecoding(**guide))  # type: ignore[arg-type]


def test_a_grammar_that_takes_too_long_is_refused_and_stops_no_other() -> None:
    guides = Guides(TABLE, seconds=1.0)
    try:
        slow, quick = request(), request()
        assert not guides.begin(slow, GuidedDecoding(json_schema=SLOW))
        assert not guides.begin(quick, GuidedDecoding(regex="abc"))
        found: list[tuple[Sequence, EnginehouseError | None]] = []
        while len(found) < 2:
            assert select.select([guides], [], [], 60)[0]
            found += guides.take()
        assert {sequence: error and error.reason for sequence, error in found} == {
            slow: "GUIDED_DECODING_TOO_COMPLEX",
            quick: None,
        }
        with pytest.raises(ResourceExhausted, match="takes more than 1 s to compile, or too much memory"):  # remembered
            guides.begin(request(), GuidedDecoding(json_schema=SLOW))
        assert guides.begin(request(), GuidedDecoding(regex="abc"))
        assert guided(request(), guides, regex="abcd").guide  # the process that was ended is followed by another
    finally:
        guides.close()


def test_grammars_are_kept_up_to_a_number_and_those_who_wait_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor_svc.guides._MOST_GRAMMARS", 2)
    monkeypatch.setattr("executor_svc.guides._MOST_PENDING", 1)
    guides = Guides(TABLE)
    try:
        for text in ("a", "b", "c"):
            guided(request(), guides, [text])
        assert guides.begin(request(), _choice("c")) and guides.begin(request(), _choice("b"))
        waiting = request()
        assert not guides.begin(waiting, _choice("a"))
        assert guides.num_pending == 1
        with pytest.raises(ResourceExhausted, match="1 requests wait for their grammar") as caught:
            guides.begin(request(), _choice("d"))
        assert caught.value.retry_after
        assert guides.forget(waiting) and not guides.forget(waiting)
        assert guided(request(), guides, ["e"]).guide  # behind it, of which nothing is told
    finally:
        guides.close()


def test_a_vocabulary_is_made_for_the_first_grammar_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TokenTable] = []
    monkeypatch.setattr("executor_svc.guides.vocabulary", lambda table: made.append(table) or vocabulary(table))
    guides = Guides(TABLE)
    try:
        guides.prepare(Batch(1, (Scheduled(request(), 0, 1, True),)))
        with pytest.raises(InvalidArgument):
            guided(request(), guides, regex="(")
        assert not made
        waiting = {request(), request()}
        for sequence, text in zip(waiting, "ab", strict=True):  # at the same time
            assert not guides.begin(sequence, _choice(text))
        while waiting:
            assert select.select([guides], [], [], 60)[0]
            found = guides.take()
            assert all(error is None for _, error in found)
            waiting -= {sequence for sequence, _ in found}
        assert made == [TABLE]
    finally:
        guides.close()


def test_who_waits_beyond_the_deadline_waits_no_more(guides: Guides) -> None:
    late, patient, endless = request(deadline=5.0), request(deadline=50.0), request()
    for number, sequence in enumerate((late, patient, endless)):
        assert not guides.begin(sequence, GuidedDecoding(regex=f"[a-z]{{{number + 3}}}"))
    assert guides.take_overdue(4.0) == [] and guides.take_overdue(5.0) == [late]
    assert guides.num_pending == 2 and not guides.forget(late)
    while guides.num_pending:
        assert select.select([guides], [], [], 60)[0]
        assert late not in [sequence for sequence, _ in guides.take()]


def _choice(text: str) -> GuidedDecoding:
    message = GuidedDecoding()
    message.choices.choices.append(text)
    return message


def test_an_engine_without_a_table_refuses() -> None:
    guides = Guides(None)
    with pytest.raises(FailedPrecondition, match="build it again with this release") as caught:
        guides.begin(request(), GuidedDecoding(json_object=True))
    assert caught.value.reason == "TOKEN_TABLE_MISSING"
    guides.close()


def test_a_vocabulary_that_cannot_go_on_ends_the_request_with_an_error() -> None:
    """No token of it is told; whoever runs beside it goes on."""
    guides = Guides(TokenTable((b"a", b"b", b"</s>"), (2,)))
    try:
        stuck = guided(Sequence(0, 0, [1], 1, 9, Sampling(0.0), frozenset({2})), guides, ["ac"])
        scheduler = Scheduler(SchedulerConfig(8, 4, 4, 16, 16))
        scheduler.add(stuck)
        scheduler.add(Sequence(0, 1, [1], 1, 3))
        reasons = []
        while batch := scheduler.schedule():
            sequences = [item.sequence for item in batch.items]
            tokens = sample(torch.zeros(len(sequences), 3), sequences, [1] * len(sequences)).token_ids
            for emitted in scheduler.commit(batch, Sampled(tokens)):
                reasons += [emitted.finish.reason] if emitted.finish else []
        assert reasons == [Reason.ERROR, Reason.LENGTH]
        assert isinstance(stuck.guide.error, InvalidArgument)
        assert "where no token of this model can follow" in stuck.guide.error.message
    finally:
        guides.close()
