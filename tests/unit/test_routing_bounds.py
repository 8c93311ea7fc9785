"""What routing must give, held on simulated time: the same numbers come out everywhere (`bench/routing.py` has more of them)."""

import json

import pytest

from bench import routing, simulated


def test_conversations_are_served_faster_than_by_chance() -> None:
    chosen, chance = routing.conversations(routing.ours), routing.conversations(routing.by_chance)
    assert chosen.throughput >= routing.LEAST_THROUGHPUT * chance.throughput
    assert chosen.first_token <= routing.MOST_FIRST_TOKEN * chance.first_token
    assert len(chosen.first_tokens) == len(chance.first_tokens) == 64 * 8


@pytest.mark.parametrize("load", ["64 at a time", "100 a second", "8 gateways, 60 a second"])
def test_strangers_are_served_as_by_the_least_loaded(load: str) -> None:
    more = routing.LOADS[load]
    chosen, least = (routing.strangers(policy, count=500, **more) for policy in (routing.ours, routing.least_loaded))
    assert least.throughput <= routing.MOST_WORSE * chosen.throughput
    assert chosen.first_token <= routing.MOST_WORSE * least.first_token


def test_the_cost_of_a_step_is_what_was_measured() -> None:
    cost = simulated.Cost()
    told = json.loads(simulated.MEASURED.read_text())
    few, many = told["itl_ms_b64"], told["itl_ms_b256"]
    assert simulated._between(cost._rows, 64) == few and simulated._between(cost._tokens, 4096) == told["ttft_ms_4096"]
    assert few < simulated._between(cost._rows, 100) < many < simulated._between(cost._rows, 300)
