"""What can be typed about benchmarks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from enginehouse.completion import complete_model
from enginehouse.options import with_data, with_gateway, with_json

_Number = TypeVar("_Number", int, float)


def _numbers(kind: Callable[[str], _Number], what: str, most: float) -> Callable[..., tuple[_Number, ...]]:
    """Callback of an option that takes a comma list and may be repeated."""

    def read(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[_Number, ...]:
        found = []
        for part in (part for value in values for part in value.split(",")):
            try:
                number = kind(part)
            except ValueError:
                raise click.BadParameter(f"{part!r} is no {what}: write it like 1 or 1,4,16") from None
            if not 0 < number <= most:
                raise click.BadParameter(f"{part} is not above 0 and at most {most:g}")
            found.append(number)
        return tuple(dict.fromkeys(found))

    return read


def _length(_: click.Context, __: click.Parameter, value: str) -> Any:
    from enginehouse.benchmark.workload import Length

    try:
        return Length.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _picture(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix not in (".png", ".svg"):
        raise click.BadParameter(f"{str(value)!r} is neither .png nor .svg")
    return value


@click.command()
@click.option(
    "--model",
    metavar="NAME",
    shell_complete=complete_model,
    help="The model's name.  [default: the only one that is served]",
)
@with_gateway
@click.option(
    "--requests",
    metavar="N",
    type=click.IntRange(1, 10**7),
    default=100,
    show_default=True,
    help="For each load; many times the concurrency, so that its beginning and end count little.",
)
@click.option(
    "--concurrency",
    metavar="C,...",
    multiple=True,
    callback=_numbers(int, "number of requests", 10_000),
    help="Requests at the same time: as soon as one ends the next begins. Several are a sweep.  [default: 1]",
)
@click.option(
    "--rate",
    metavar="R,...",
    multiple=True,
    callback=_numbers(float, "rate", 1e6),
    help="Instead: requests a second, at random times (Poisson), however many run. Several are a sweep.",
)
@click.option(
    "--input-len", metavar="N|LOW-HIGH", default="128", show_default=True, callback=_length, help="Tokens of a prompt."
)
@click.option(
    "--output-len", metavar="N|LOW-HIGH", default="64", show_default=True, callback=_length, help="Tokens to generate."
)
@click.option(
    "--prompts",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Prompts instead of synthetic ones, in turn: a text a line, or of FILE.jsonl a string, token ids, or an object with "
    "one of them as prompt, text or token_ids.",
)
@click.option(
    "--shared-prefix",
    metavar="LEN",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The first LEN tokens of --input-len are the same in all prompts, so that the prefix cache helps.",
)
@click.option(
    "--warmup",
    metavar="N",
    type=click.IntRange(0, 10**6),
    default=2,
    show_default=True,
    help="Requests before, not measured.",
)
@click.option(
    "--seed", metavar="N", type=click.IntRange(0, 2**64 - 1), help="Of prompts, lengths and times.  [default: drawn]"
)
@click.option(
    "--ignore-eos/--stop-at-eos",
    default=True,
    show_default=True,
    help="Generate all of --output-len, whatever the model says.",
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--out", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON here, too."
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_picture,
    help="Draw the sweep into a .png or .svg. Needs: pip install 'enginehouse[plot]'.",
)
@with_json
@with_data
def bench(
    model: str | None,
    gateway: str | None,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
    data: str | None,
    concurrency: tuple[int, ...],
    rate: tuple[float, ...],
    **settings: Any,
) -> None:
    """Measure throughput and latency of a running cluster.

    Through its gateway, to compare settings, sizes and releases. A load is a --concurrency or a --rate; each has
    --requests requests of its own, whose synthetic prompts are token ids drawn from those that the model's tokenizer
    gives for a text of ours, no two alike: the prefix cache helps only with --shared-prefix.

    \b
    seconds         from the first request's beginning to the end of the last
    output tokens   all that came in this time
    first token     from the request (at a --rate: from when it was due) to the
                    first message with tokens
    next token      for each token: the time between two messages over the
                    tokens in the later one
    p90, p99        90% and 99% were at most so slow

    The client is one process on one core: a message costs it 0.06 to 0.13 ms of that, so that it takes in some 10,000 a
    second. It warns when it used more than 90% of a core, for its numbers are then its own. On the machine of the cluster
    it takes that core away from it.

    Ctrl-C cancels what runs and shows what has been measured so far. The status is 1 if a load had no request
    completed.
    """
    from enginehouse.commands import bench as command
    from enginehouse.home import Home, gateway_address

    if concurrency and rate:
        raise click.UsageError("--concurrency and --rate exclude each other: at a rate requests do not wait for others")
    if concurrency and max(concurrency) > settings["requests"]:
        raise click.UsageError(f"--requests {settings['requests']} cannot be {max(concurrency)} at the same time")
    ctx = click.get_current_context()
    lengths = settings["input_len"]
    if settings["prompts"]:
        given = [name for name in ("input_len", "shared_prefix") if _is_typed(ctx, name)]
        if given:
            raise click.UsageError(
                f"--prompts and --{given[0].replace('_', '-')} exclude each other: prompts have a length"
            )
    elif settings["shared_prefix"] >= lengths.low:
        raise click.UsageError(f"--shared-prefix {settings['shared_prefix']} must be less than --input-len {lengths}")
    status = command.run(
        command.Settings(concurrency=concurrency or (1,), rate=rate, **settings),
        model=model,
        gateway=gateway_address(gateway, Home.find(data)),
        as_json=as_json,
        out=out,
        plot=plot,
    )
    ctx.exit(status)


def _is_typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
