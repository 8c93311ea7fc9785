"""Random and mutated messages, and servicers that are called with them as a server of ours would, without a network.

A message is filled by its descriptor, with values that code likes to trip over, or taken from a corpus; half of them then get
bytes changed, cut out, doubled or put in. Numbers come from a seed, so that a message that does harm can be made again. They are
not hypothesis' own: it takes a millisecond to make an example, and shrinks what is small already.
"""

import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from protos.access import EVERYBODY, Access
from protos.rpc import ErrorInterceptor

_INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    16,
    63,
    255,
    256,
    1000,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
    -1,
    -(2**31),
    -(2**63),
)
_FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 3e38, math.inf, -math.inf, math.nan, 100.0, 2.0)
_TEXTS = (
    *(
        "",
        " ",
        "a",
        "In the beginning",
        "\x00",
        "\n" * 3,
        "é",
        "🙂" * 5,
        "\u202e",
        "a" * 300,
        "../..",
        "/",
        "%s%n",
        "{{ 7 }}",
    ),
    *("user", "assistant", "0" * 64, "f" * 64, "upload://" + "0" * 64, "~", "-1", "None"),
)
_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}
_DEEPEST = 4


class Messages:
    """Messages by a seed.

    Args:
        words: texts that mean something to the service, such as a model's name.
    """

    def __init__(self, seed: int, words: Sequence[str] = ()) -> None:
        self._random = random.Random(seed)
        self._texts = (*_TEXTS, *words, *words, *words)

    def data(self, kind: type[Message], good: Sequence[Message] = ()) -> bytes:
        """A message on the wire, or what was one.

        Args:
            good: those that the service would take.
        """
        choose = self._random
        if good and choose.random() < 0.5:
            message = kind()
            message.CopyFrom(choose.choice(good))
            if choose.random() < 0.8:
                self._fill(message, 0, few=True)
        else:
            message = kind()
            self._fill(message, 0)
        data = message.SerializeToString()
        return self._mutated(data) if choose.random() < 0.5 else data

    def _fill(self, message: Any, depth: int, *, few: bool = False) -> None:
        fields = message.DESCRIPTOR.fields
        share = 1.5 / len(fields) if few and fields else 0.5
        for field in fields:
            if self._random.random() < share:
                self._set(message, field, depth)

    def _set(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        choose = self._random
        if field.message_type and field.message_type.GetOptions().map_entry:
            target = getattr(message, field.name)
            parts = field.message_type.fields_by_name
            for _ in range(choose.choice((0, 1, 3))):
                target[self._value(parts["key"])] = self._value(parts["value"])
        elif field.is_repeated:
            target = getattr(message, field.name)
            count = choose.choice((0, 1, 2, 5, 5, 40))
            if field.message_type:
                for _ in range(min(count, 3) if depth < _DEEPEST else 0):
                    self._fill(target.add(), depth + 1)
            else:
                target.extend(self._value(field) for _ in range(count))
        elif field.message_type:
            if depth < _DEEPEST:
                getattr(message, field.name).SetInParent()
                self._fill(getattr(message, field.name), depth + 1)
        else:
            setattr(message, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        choose, kind = self._random, field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            text = choose.choice(self._texts)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return choose.random() < 0.5
        if kind in _BOUNDS:
            low, high = _BOUNDS[kind]
            return min(max(choose.choice(_INTEGERS), low), high)
        return choose.choice(_FLOATS)

    def _mutated(self, data: bytes) -> bytes:
        choose, found = self._random, bytearray(data)
        for _ in range(choose.choice((1, 1, 2, 8))):
            at, end = (choose.randrange(len(found) + 1) for _ in range(2))
            what = choose.randrange(5)
            if what == 0 and at < len(found):
                found[at] ^= 1 << choose.randrange(8)
            elif what == 1:
                del found[at : at + choose.choice((1, 2, 20))]
            elif what == 2:
                found[at:at] = choose.randbytes(choose.choice((1, 2, 8, 40)))
            elif what == 3:
                found[end:end] = found[at : at + 30]
            elif at < len(found):
                found[at] = choose.choice((0, 0x7F, 0x80, 0xFF))
        return bytes(found)


class Ended(grpc.aio.AbortError):
    """A call ended with a status."""


class Context:
    """What a servicer sees of a call that has a deadline."""

    def __init__(self) -> None:
        self.status = "OK"
        self.callbacks: list[Callable[[Any], None]] = []

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def send_initial_metadata(self, metadata: object) -> None:
        pass

    def time_remaining(self) -> float:
        return 60.0

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def code(self) -> Any:
        return grpc.StatusCode[self.status]

    async def abort_with_status(self, status: Any) -> None:
        self.status, self.details = status.code.name, status.details
        raise Ended


class Servicer:
    """The methods of a service, behind the interceptor that all of ours have.

    Attributes:
        methods: their names.
    """

    def __init__(self, register: Callable[[Any], None], package: Any, access: Access = EVERYBODY) -> None:
        """Takes what adds the servicer to a server, and the module of the service's messages."""
        self._handlers: dict[str, Any] = {}
        self._interceptor = ErrorInterceptor(access=access)
        (service,) = package.DESCRIPTOR.services_by_name.values()
        self._name = service.full_name
        self._kinds = {method.name: getattr(package, method.input_type.name, None) for method in service.methods}
        if any(kind is None for kind in self._kinds.values()):
            raise LookupError(f"a message of {self._name} is in another module")
        self.methods = list(self._kinds)
        self._generic: list[Any] = []
        register(self)

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """As a server has it."""
        self._generic += handlers

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """As a server has it; the same handlers come as generic ones."""

    def kind(self, method: str) -> type[Message]:
        """What it takes."""
        found: type[Message] = self._kinds[method]
        return found

    async def call(self, method: str, *data: bytes) -> str:
        """The status that a call with these messages, one unless it takes a stream, ends with."""
        handler = self._handlers.get(method)
        if handler is None:
            handler = self._handlers[method] = await self._intercepted(method)
        context = Context()
        request: Any = _stream(data) if handler.request_streaming else data[0]
        try:
            if handler.response_streaming:
                run = handler.stream_stream if handler.request_streaming else handler.unary_stream
                async for _ in run(request, context):
                    pass
            else:
                await (handler.stream_unary if handler.request_streaming else handler.unary_unary)(request, context)
        except Ended:
            pass
        finally:
            for callback in context.callbacks:
                callback(context)
        return context.status

    async def _intercepted(self, method: str) -> Any:
        class Details:
            pass

        details: Any = Details()
        details.method, details.invocation_metadata = f"/{self._name}/{method}", ()

        async def find(found: Any) -> Any:
            return next(handler for generic in self._generic if (handler := generic.service(found)))

        return await self._interceptor.intercept_service(find, details)


async def _stream(data: Sequence[bytes]) -> AsyncIterator[bytes]:
    for each in data:
        yield each
