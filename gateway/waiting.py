"""The requests of each tenant that are under way or wait, for `admission.py`, which decides among tenants."""

from collections.abc import Callable

from engine.errors import EnginehouseError
from gateway.bucket import TokenBucket
from protos.keys import Tenant

_WEIGHT = 1 / 16  # of the newest value in a mean
_GUESS = 1000.0  # tokens of a tenant's request, before any has ended


class Mean:
    """A mean of late: each value counts less as newer ones come. None before the first."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        """The newest."""
        self.value = value if self.value is None else self.value + _WEIGHT * (value - self.value)


class Line:
    """A tenant's requests: how many are under way, and those that wait, in their order."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.running = 0
        self.turn = 0  # rises with each request of any tenant that begins
        self.waiting: list[Ticket] = []
        self.bucket: TokenBucket | None = None
        self.durations = Mean()  # seconds
        self.tokens = Mean()  # of a request, prompt and completion

    def follow(self, tenant: Tenant, now: float) -> None:
        """Takes over what the file of keys says now."""
        rate, had = tenant.tokens_per_minute, self.tenant.tokens_per_minute
        if rate is None:
            self.bucket = None
        elif self.bucket is None:
            self.bucket = TokenBucket(rate / 60, rate, now)
        elif rate != had:
            self.bucket.change(rate / 60, rate, now)
        self.tenant = tenant

    @property
    def full(self) -> bool:
        """Whether as many are under way as may be."""
        return self.tenant.max_streams is not None and self.running >= self.tenant.max_streams

    @property
    def guess(self) -> float:
        """Tokens that its next request will use, as far as one can tell."""
        return _GUESS if self.tokens.value is None else self.tokens.value

    def debt(self, now: float) -> float:
        """Seconds until its rate lets another begin."""
        return self.bucket.ready_in(now) if self.bucket else 0.0


class Ticket:
    """A request that waits."""

    def __init__(self, line: Line, priority: int, number: int, call: Callable[[EnginehouseError | None], None]) -> None:
        self.line, self.priority = line, priority
        self.call = call  # with None when it may begin, else with why it may not
        self.waits = self.begun = False
        self.charged = 0.0  # tokens that were taken from the tenant's rate
        self._place = (-priority, number)

    def charge(self, tokens: float, now: float) -> None:
        """It uses so many tokens in all, as far as is known now."""
        if self.line.bucket:
            self.line.bucket.take(tokens - self.charged, now)
        self.charged = tokens

    def __lt__(self, other: "Ticket") -> bool:
        return self._place < other._place
