"""Which bytes each token of a model stands for: what guided output needs to know of a tokenizer, and no more."""

import msgspec

from engine.errors import FailedPrecondition

FILE = "token_bytes.msgpack"  # among an engine's tokenizer files


class TokenTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tokens of a vocabulary.

    Attributes:
        tokens: by token id, one for each row of the model's logits: the bytes that it adds to a text that it continues, of a
            special token its name; b"" for a row that no token has.
        special: ids of special tokens, in order, which are no text: a text that reads the same is made of other tokens.
    """

    tokens: tuple[bytes, ...]
    special: tuple[int, ...]

    def to_bytes(self) -> bytes:
        """As engines carry it, msgpack."""
        return msgspec.msgpack.encode(self)

    @staticmethod
    def from_bytes(data: bytes) -> "TokenTable":
        """Raises FailedPrecondition for what is none."""
        try:
            table = msgspec.msgpack.decode(data, type=TokenTable)
        except msgspec.MsgspecError as error:
            raise FailedPrecondition(
                f"{FILE} of the engine cannot be read ({error}): build the engine again", reason="TOKEN_TABLE_INVALID"
            ) from None
        if any(token >= len(table.tokens) for token in table.special):
            raise FailedPrecondition(
                f"{FILE} of the engine names special tokens beyond its {len(table.tokens)}: build the engine again",
                reason="TOKEN_TABLE_INVALID",
            )
        return table
