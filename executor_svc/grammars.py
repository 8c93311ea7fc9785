"""Grammars by llguidance: from a wire's GuidedDecoding to a matcher over an engine's vocabulary. Imports no torch."""

import json
import re
from typing import NamedTuple

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.errors import InvalidArgument
from engine.token_table import TokenTable
from protos.guidance import parse_schema
from protos.v1.common_pb2 import GuidedDecoding

# What bounds the work of one grammar: of compiling it, of one token's mask, and of what it keeps (1 to 2 kB a state).
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=25_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
_EBNF = "::="
_SPECIAL = b"\xff"  # before the name of a special token
_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")
_EXCERPT = re.compile(r"\n *\d+ \| ")
_LONGEST_ERROR = 400  # characters
# A model that is not sure of JSON would fill its tokens with white space: a line break and an indentation is all that text needs.
_WHITE_SPACE = r"[ ]?|\n[ ]{0,20}"


class Grammar(NamedTuple):
    """What a caller has asked for: the kind of guide, and its text. Equal ones mean the same."""

    kind: str
    text: str

    @staticmethod
    def of(guided: GuidedDecoding) -> "Grammar":
        """Of a checked message."""
        kind = guided.WhichOneof("guide") or ""
        if kind == "json_object":
            return Grammar("json_schema", '{"type": "object"}')
        return Grammar(kind, json.dumps(list(guided.choices.choices)) if kind == "choices" else getattr(guided, kind))


class _Vocabulary(llguidance.TokenizerWrapper):
    """A table as llguidance takes it, with one token more: the end of a text, wherever the grammar allows one."""

    def __init__(self, table: TokenTable) -> None:
        self.is_tokenizer_wrapper, self.bos_token_id = True, None
        special = set(table.special)
        self.eos_token_id = len(table.tokens)
        self.tokens = [_SPECIAL + token if i in special else _text(token) for i, token in enumerate(table.tokens)]
        self.tokens.append(_SPECIAL + b"<|end of text|>")
        self.special_token_ids = [*table.special, self.eos_token_id]

    def __call__(self, s: str) -> list[int]:
        """Tokens of a text: never asked for, since grammars force none."""
        raise NotImplementedError(f"a text of {len(s)} bytes would have to be tokenized")


def _text(token: bytes) -> bytes:
    """What llguidance takes for text: the byte that marks its special tokens is in no UTF-8."""
    return b"" if token.startswith(_SPECIAL) else token


def vocabulary(table: TokenTable) -> llguidance.LLTokenizer:
    """The vocabulary of matchers. Takes some 5 us a token, in which no other thread runs."""
    return llguidance.LLTokenizer(_Vocabulary(table), n_vocab=len(table.tokens) + 1)


def compile_grammar(tokens: llguidance.LLTokenizer, grammar: Grammar) -> llguidance.LLMatcher:
    """A matcher at the beginning of its text. Without the interpreter's lock; how long it takes is not bounded.

    Raises:
        InvalidArgument: why it is no grammar, or what in it is not supported.
    """
    matcher = llguidance.LLMatcher(tokens, _lark(grammar), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise _invalid(grammar, matcher.get_error())
    return matcher


def describe(error: str) -> str:
    """What llguidance says, in one line, without an excerpt of the grammar."""
    line = " ".join(_EXCERPT.split(error.replace("<non-verbose/>", ""))[0].split())
    return line if len(line) <= _LONGEST_ERROR else line[: _LONGEST_ERROR - 3] + "..."


def _invalid(grammar: Grammar, error: str) -> InvalidArgument:
    said = describe(error)
    if grammar.kind != "grammar":  # places are those of a grammar that nobody has written
        said = _PLACE.sub("", said)
    return InvalidArgument(f"guided_decoding.{grammar.kind} cannot be used: {said}", reason="GUIDED_DECODING_INVALID")


def _lark(grammar: Grammar) -> str:
    """In llguidance's dialect of Lark.

    No text is forced: llguidance would choose its tokens by itself, where a model may prefer others.
    """
    kind, text = grammar
    if kind == "json_schema":
        schema = parse_schema(text)
        schema["x-guidance"] = {"whitespace_pattern": _WHITE_SPACE}
        body = f"start: %json {json.dumps(schema)}"
    elif kind == "regex":
        body = f"start: /{llguidance.regex_to_lark(text)}/".replace("\n", "\\n")
    elif kind == "choices":
        body = "start: " + " | ".join(map(json.dumps, json.loads(text)))
    elif _EBNF in text:
        try:
            body = gbnf_to_lark(text)
        except Exception as error:  # its own, and Python's for what it has not thought of
            raise _invalid(grammar, str(error)) from None
    else:
        body = text
    return body + '\n%llguidance {"no_forcing": true}'
