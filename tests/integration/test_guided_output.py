"""Guided output of the bundled checkpoint: always valid, and in every situation the same."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import torch

from engine import blobs
from engine.directory import DirectoryStore
from engine.errors import InvalidArgument
from engine.token_table import TokenTable
from executor_svc.core import Reason, Sampling, Sequence
from executor_svc.guides import Guides
from executor_svc.loader import LoadedEngine
from tests.guided import guided, random_schema
from tests.running import Engine, make_engine

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
EOS = frozenset({1})
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 40, "maxLength": 60},
            "age": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    return make_engine(DEMO, tmp_path_factory.mktemp("guided"), dtype="float32", max_seq_len=512, max_num_tokens=64)


@pytest.fixture(scope="module")
def table(loaded: LoadedEngine, tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    file = loaded.manifest.token_table
    assert file is not None
    store = DirectoryStore(next(tmp_path_factory.getbasetemp().glob("guided*")))
    return TokenTable.from_bytes(blobs.read(store, file))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is small: threads would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def guides(table: TokenTable) -> Iterator[Guides]:
    made = Guides(table)
    yield made
    made.close()


def request(seed: int = 0, temperature: float = 1.0, max_tokens: int = 96, **fields: object) -> Sequence:
    sampling = Sampling(temperature, seed=seed)
    values = {"sampling": sampling, "eos_ids": EOS, "max_tokens": max_tokens, **fields}
    return Sequence(0, seed, [5, 6, 7 + seed], 3, **values)  # type: ignore[arg-type]


def text_of(sequence: Sequence, table: TokenTable) -> str:
    tokens = sequence.token_ids[sequence.prompt_len :]
    return b"".join(table.tokens[token] for token in tokens if token not in table.special).decode()


def reason(sequence: Sequence) -> Reason:
    assert sequence.finish is not None
    return sequence.finish.reason


def test_output_is_valid_for_200_schemas(loaded: LoadedEngine, table: TokenTable, guides: Guides) -> None:
    """Greedy and at temperature 1; whatever ends before max_tokens."""
    numbers = random.Random(0)
    schemas = [random_schema(numbers) for _ in range(200)]
    run = [
        guided(request(row, float(row % 2), 128), guides, json_schema=json.dumps(schema))
        for row, schema in enumerate(schemas)
    ]
    Engine(loaded, guides=guides).run(run)
    ended = [reason(sequence) in (Reason.STOP, Reason.EOS) for sequence in run]
    assert sum(ended) > 140  # the others are still within a string or a number
    assert {reason(sequence) for sequence in run} <= {Reason.STOP, Reason.EOS, Reason.LENGTH}
    checker = jsonschema.FormatChecker()
    for sequence, schema, whole in zip(run, schemas, ended, strict=True):
        if whole:
            value = json.loads(text_of(sequence, table))
            jsonschema.validate(value, schema, jsonschema.Draft202012Validator, format_checker=checker)


def test_json_objects_choices_expressions_and_grammars(loaded: LoadedEngine, table: TokenTable, guides: Guides) -> None:
    choices = ["yes", "no", 'perhaps "so"\n', "größer", "🙂"]
    sums = 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,2}/'
    ebnf = 'root ::= "<" [a-c]+ ">" | "é" "\\n"'
    run = {
        "object": [guided(request(row), guides, json_object=True) for row in range(4)],
        "choice": [guided(request(row), guides, choices) for row in range(12)],
        "regex": [guided(request(row), guides, regex=r"(\d{2}/){2}\d{4}|[x-z]+!") for row in range(8)],
        "lark": [guided(request(row), guides, grammar=sums) for row in range(8)],
        "ebnf": [guided(request(row), guides, grammar=ebnf) for row in range(8)],
        "free": [request(row) for row in range(4)],
    }
    Engine(loaded, guides=guides).run([sequence for rows in run.values() for sequence in rows])
    texts = {
        kind: [text_of(sequence, table) for sequence in rows if reason(sequence) is not Reason.LENGTH]
        for kind, rows in run.items()
    }
    assert len(texts["choice"]) == 12
    assert set(texts["choice"]) <= set(choices)
    assert len(set(texts["choice"])) > 1
    for kind, pattern in {
        "regex": r"([0-9]{2}/){2}[0-9]{4}|[x-z]+!",
        "lark": r"[0-9]{1,2}(\+[0-9]{1,2})*",
        "ebnf": "<[a-c]+>|é\n",
    }.items():
        assert texts[kind]
        assert all(re.fullmatch(pattern, text) for text in texts[kind]), texts[kind]
    assert all(isinstance(json.loads(text), dict) for text in texts["object"])
    alone = [request(row) for row in range(4)]
    Engine(loaded).run(alone)
    assert [sequence.token_ids for sequence in run["free"]] == [sequence.token_ids for sequence in alone]


def test_preemption_and_batches_change_nothing(loaded: LoadedEngine, guides: Guides) -> None:
    def made() -> list[Sequence]:
        return [guided(request(row), guides, json_schema=PERSON) for row in range(20)]

    alone, tight = made(), made()
    engine = Engine(loaded, guides=guides)
    for sequence in alone:
        engine.run([sequence])
    engine = Engine(loaded, kv_blocks=32, guides=guides)
    engine.run(tight)
    assert engine.scheduler.num_preemptions > 0
    assert [sequence.token_ids for sequence in tight] == [sequence.token_ids for sequence in alone]


def test_a_completion_goes_on_where_it_was_resumed(loaded: LoadedEngine, guides: Guides) -> None:
    whole = guided(request(3), guides, json_schema=PERSON)
    Engine(loaded, guides=guides).run([whole])
    assert reason(whole) is Reason.STOP
    for place in range(1, whole.num_completion, 5):
        resumed = request(3)
        resumed.token_ids += whole.token_ids[3 : 3 + place]
        Engine(loaded, guides=guides).run([guided(resumed, guides, json_schema=PERSON)])
        assert resumed.token_ids == whole.token_ids
    ended = request(3)
    ended.token_ids = list(whole.token_ids)
    with pytest.raises(InvalidArgument, match="nothing to go on with"):
        guided(ended, guides, json_schema=PERSON)
    wrong = request(3)
    wrong.token_ids += [2, 2]
    with pytest.raises(InvalidArgument, match="token 2 at place 0"):
        guided(wrong, guides, json_schema=PERSON)


def test_ends(loaded: LoadedEngine, table: TokenTable, guides: Guides) -> None:
    """By end of sequence where the grammar allows one, by its own end, by max_tokens; min_tokens as far as it can be kept."""
    a, z = table.tokens.index(b"a"), table.tokens.index(b"z")
    bias, towards_a = (Sampling(0.0, logit_bias=((token, 90.0),)) for token in (1, a))
    run = {
        "at once": guided(request(0, sampling=bias), guides, regex="a*"),
        "not before": guided(request(1, sampling=bias, min_tokens=4), guides, regex="a*"),
        "never": guided(request(2, eos_ids=frozenset(), max_tokens=9), guides, regex="a*"),
        "its own": guided(request(3, eos_ids=frozenset(), max_tokens=9), guides, regex="a{3}"),
        "too short": guided(request(4, min_tokens=8), guides, regex="z"),
        "cut": guided(request(5, max_tokens=2, sampling=towards_a), guides, regex="a{5}"),
        "stop": guided(request(6, stop_ids=frozenset({a}), sampling=towards_a), guides, regex="z(az)*"),
        "no stop within": guided(request(6, stop_ids=frozenset({a}), sampling=towards_a), guides, regex="qa1|qb"),
        "but a stop": guided(request(6, stop_ids=frozenset({a}), sampling=towards_a), guides, regex="qa1"),
        "banned": guided(request(7, sampling=Sampling(bad_words=((z,),))), guides, ["z", "y"]),
        "all banned": guided(request(8, sampling=Sampling(bad_words=((z,),))), guides, ["z"]),
    }
    Engine(loaded, guides=guides).run(list(run.values()))
    found = {name: (reason(sequence), text_of(sequence, table)) for name, sequence in run.items()}
    assert found["at once"] == (Reason.EOS, "")
    assert found["not before"][0] is Reason.EOS
    assert run["not before"].num_completion == 5
    assert found["never"][0] is Reason.LENGTH
    assert set(found["never"][1]) == {"a"}
    assert found["its own"] == (Reason.STOP, "aaa")
    assert found["too short"] == (Reason.STOP, "z")
    assert found["cut"] == (Reason.LENGTH, "aa")
    assert found["stop"] == (Reason.STOP, "za")
    assert found["no stop within"] == (Reason.STOP, "qb")
    assert found["but a stop"] == (Reason.STOP, "qa")  # nothing else could follow
    assert found["banned"] == (Reason.STOP, "y")
    assert found["all banned"] == (Reason.STOP, "z")


def test_log_probabilities_are_the_models_own(loaded: LoadedEngine, guides: Guides) -> None:
    """Of a token that is all but impossible without guidance, the log-probability is small."""
    free, held = request(0, 0.0, 1, logprobs=3), guided(request(0, 0.0, 1, logprobs=3), guides, ["🙂"])
    told = []
    for sequence in (free, held):
        engine = Engine(loaded, guides=guides)
        engine.scheduler.add(sequence)
        batch = engine.scheduler.schedule()
        assert batch is not None
        engine.runner.start(batch)
        (emitted,) = engine.scheduler.commit(batch, engine.runner.finish())
        assert emitted.logprobs is not None
        told.append(emitted.logprobs)
    assert told[0].top_logprobs == told[1].top_logprobs
    assert told[0].logprobs == told[0].top_logprobs[:1]
    assert told[1].logprobs[0] < told[1].top_logprobs[-1]
