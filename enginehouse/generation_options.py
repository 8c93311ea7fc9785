"""Options of the commands that generate text, in the sections under which --help shows them."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from enginehouse.options import MOST

_Function = TypeVar("_Function", bound=Callable[..., Any])

_LIMITS = (MOST, 2**31 - 1, 2**64 - 1)
_CHOOSING, _ENDING, _SEVERAL, _TELLING = "Choosing tokens", "Length and end", "Several completions", "What is told"
_GUIDED = "Guided output"
GUIDES = ("json_schema", "json_object", "regex", "choice", "grammar")


class SectionedCommand(click.Command):
    """Shows its options by section; those without one under "Options"."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


class _Option(click.Option):
    def __init__(self, *arguments: Any, section: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        if getattr(self.type, "max", None) in _LIMITS:  # what a number of the wire holds teaches nobody
            extra.pop("range", None)
        return extra


class _TokenValue(click.ParamType[tuple[int, float]]):
    """TOKEN=VALUE as a pair."""

    name = "token=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, number = value.partition("=")
        try:
            bias = float(number)
        except ValueError:
            bias = math.nan
        if not (token.isascii() and token.isdigit() and int(token) <= MOST) or not abs(bias) <= 100:
            self.fail(
                f"{value!r} is not TOKEN=VALUE, a token id and a number from -100 to 100, like 256=-5", param, ctx
            )
        return int(token), bias


def _option(section: str, *names: str, **options: Any) -> Callable[[_Function], _Function]:
    return click.option(*names, cls=_Option, section=section, **options)


def choosing(max_tokens: str) -> Callable[[_Function], _Function]:
    """How tokens are chosen, and when to end: of every command that generates."""
    return _all(
        _option(
            _CHOOSING, "--temperature", metavar="X", type=click.FloatRange(min=0), help="0 is greedy.  [default: 1]"
        ),
        _option(
            _CHOOSING,
            "--top-k",
            metavar="K",
            type=click.IntRange(0, MOST),
            help="Choose among the k most probable tokens.",
        ),
        _option(
            _CHOOSING,
            "--top-p",
            metavar="P",
            type=click.FloatRange(min=0, max=1, min_open=True),
            help="Choose among the fewest tokens that have this probability together.",
        ),
        _option(
            _CHOOSING,
            "--min-p",
            metavar="P",
            type=click.FloatRange(min=0, max=1),
            help="Choose among tokens with at least this share of the most probable one's probability.",
        ),
        _option(
            _CHOOSING,
            "--repetition-penalty",
            metavar="X",
            type=click.FloatRange(min=0, min_open=True),
            help="Above 1, such as 1.1, makes tokens of prompt and completion rarer.",
        ),
        _option(
            _CHOOSING,
            "--presence-penalty",
            metavar="X",
            type=click.FloatRange(min=-2, max=2),
            help="Above 0 makes tokens rarer that the completion holds.",
        ),
        _option(
            _CHOOSING,
            "--frequency-penalty",
            metavar="X",
            type=click.FloatRange(min=-2, max=2),
            help="The same, the more so the more often it holds them.",
        ),
        _option(
            _CHOOSING,
            "--logit-bias",
            type=_TokenValue(),
            metavar="TOKEN=VALUE",
            multiple=True,
            help="Add VALUE, -100 to 100, to this token's logit; may be repeated.",
        ),
        _option(
            _CHOOSING, "bad_words", "--bad-word", metavar="S", multiple=True, help="Never write this; may be repeated."
        ),
        _option(
            _CHOOSING,
            "--seed",
            metavar="N",
            type=click.IntRange(min=0, max=2**64 - 1),
            help="The same seed gives the same text.",
        ),
        _option(
            _ENDING,
            "--max-tokens",
            metavar="N",
            type=click.IntRange(1, MOST),
            help=f"Tokens to generate at most.  [default: {max_tokens}]",
        ),
        _option(
            _ENDING,
            "--min-tokens",
            metavar="N",
            type=click.IntRange(0, MOST),
            help="Tokens before which the text does not end.",
        ),
        _option(_ENDING, "--stop", metavar="S", multiple=True, help="End before this string; may be repeated."),
        _option(_ENDING, "--ignore-eos", is_flag=True, help="Go on where the model would end the text."),
        _option(
            _ENDING,
            "--priority",
            metavar="N",
            type=click.IntRange(-(2**31), 2**31 - 1),
            default=0,
            help="Higher is served before lower.  [default: 0]",
        ),
    )


def guided() -> Callable[[_Function], _Function]:
    """What the text must be; at most one of them, which `given_guides` tells."""
    return _all(
        _option(
            _GUIDED,
            "--json-schema",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False),
            help="The text is JSON by this schema.",
        ),
        _option(_GUIDED, "--json-object", is_flag=True, help="The text is a JSON object."),
        _option(_GUIDED, "--regex", metavar="R", help="The whole text matches this regular expression."),
        _option(_GUIDED, "--choice", metavar="S", multiple=True, help="The text is one of these; may be repeated."),
        _option(
            _GUIDED,
            "--grammar",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False),
            help="The text follows this grammar, in Lark's syntax or in EBNF with ::=.",
        ),
    )


def check_guides(guides: dict[str, Any]) -> None:
    """Raises UsageError for more than one option of `guided`."""
    given = [f"--{name.replace('_', '-')}" for name, value in guides.items() if value]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other: give one of them")


def several() -> Callable[[_Function], _Function]:
    """More than one completion, and what is told beside the text."""
    return _all(
        _option(
            _SEVERAL,
            "--n",
            metavar="N",
            type=click.IntRange(1, 16),
            help="So many completions of the prompt.  [default: 1]",
        ),
        _option(
            _SEVERAL,
            "--best-of",
            metavar="N",
            type=click.IntRange(1, 16),
            help="Make so many and give the n with the highest log-probability a token; nothing comes before all are there.",
        ),
        _option(
            _SEVERAL,
            "--beams",
            metavar="N",
            type=click.IntRange(1, 16),
            help="Search for the most probable text with so many beams, instead of choosing at random.",
        ),
        _option(
            _SEVERAL,
            "--length-penalty",
            metavar="X",
            type=click.FloatRange(min=-10, max=10),
            help="Of a beam search: above 1 favours long texts, below 1 short ones.  [default: 1]",
        ),
        _option(
            _SEVERAL,
            "--early-stopping",
            type=click.Choice(["enough", "heuristic", "never"]),
            help="Of a beam search: end with as many hypotheses as beams, when no beam is likely to be better, or when none can "
            "be.  [default: heuristic]",
        ),
        _option(
            _SEVERAL,
            "--diversity-rate",
            metavar="X",
            type=click.FloatRange(min=0),
            help="Of a beam search: how much less the next best children of one beam count.  [default: 0]",
        ),
        _option(_TELLING, "--echo", is_flag=True, help="Print the prompt before its completion."),
        _option(
            _TELLING,
            "--logprobs",
            metavar="K",
            type=click.IntRange(0, 20),
            help="Log-probability of each token and of the K most probable ones in its place: a table on stderr, or in --json.",
        ),
        _option(
            _TELLING,
            "--prompt-logprobs",
            metavar="K",
            type=click.IntRange(0, 20),
            help="The same of the prompt's tokens.",
        ),
        _option(
            _TELLING, "--token-ids", is_flag=True, help="PROMPT is token ids ('12 345'), and token ids are printed."
        ),
        _option(_TELLING, "--stats", is_flag=True, help="Say on stderr how fast it was and why it ended."),
    )


def _all(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    def add(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add
