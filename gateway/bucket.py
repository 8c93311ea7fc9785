"""A rate of tokens, held on average: the token bucket of traffic shaping (RFC 2697), with tokens of a language model."""


class TokenBucket:
    """Fills at `rate` tokens a second up to `burst`. What is taken may leave it in debt.

    How many tokens a completion will have nobody knows when it begins. So a request may begin while the bucket owes nothing; a
    guess is taken then, and put right when the number is known. A debt delays the next request, so that over any time not more
    is used than filled in, plus the burst and what requests use beyond their guess. Times are seconds of a clock that does not
    go back.
    """

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate, self.burst = rate, burst
        self._level, self._at = burst, now

    def change(self, rate: float, burst: float, now: float) -> None:
        """Another rate from now on; what is owed stays owed."""
        self._level, self._at = min(self.level(now), burst), now
        self.rate, self.burst = rate, burst

    def level(self, now: float) -> float:
        """Tokens that it holds, or owes if negative."""
        return min(self._level + (now - self._at) * self.rate, self.burst)

    def take(self, tokens: float, now: float) -> None:
        """Takes tokens, more than there are, too; gives them back if negative."""
        self._level, self._at = min(self.level(now) - tokens, self.burst), now

    def ready_in(self, now: float) -> float:
        """Seconds until it owes nothing; 0 if it does not."""
        return max(-self.level(now), 0.0) / self.rate
