"""A service's metrics, as Prometheus scrapes them: http://HOST:PORT/metrics.

The instruments are our own, since a token may cost no more than a bisection (those of prometheus_client take a lock for each
value, and take no counts that were made elsewhere); format, registry, HTTP and the process' own metrics are prometheus_client's.
Instruments are filled by one thread, the event loop's, and read by the server's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.errors import Unavailable
from protos.histogram import Histogram

PREFIX = "enginehouse_"

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A metric: its name as it is scraped, what it means, the names of its labels; `kind` as Prometheus calls it."""

    kind: str
    name: str
    meaning: str
    labels: Labels


class Counter:
    """A number for each combination of labels, which only grows."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._values: dict[Labels, float] = {} if family.labels else {(): 0}

    def add(self, *labels: str, by: float = 1) -> None:
        """Counts; 0 makes it visible."""
        self._values[labels] = self._values.get(labels, 0) + by

    def collect(self) -> Metric:
        """As it is now."""
        found = CounterMetricFamily(self.family.name, self.family.meaning, labels=self.family.labels)
        for labels, value in list(self._values.items()):
            found.add_metric(labels, value)
        return found


class Histograms:
    """A histogram for each combination of labels."""

    def __init__(self, family: Family, bounds: Sequence[float]) -> None:
        self.family = family
        self._bounds = bounds
        self._values: dict[Labels, Histogram] = {}
        if not family.labels:
            self.of()

    def of(self, *labels: str) -> Histogram:
        """The one with these labels, to be filled."""
        found = self._values.get(labels)
        if found is None:
            found = self._values[labels] = Histogram(self._bounds)
        return found

    def collect(self) -> Metric:
        """As they are now."""
        found = HistogramMetricFamily(self.family.name, self.family.meaning, labels=self.family.labels)
        for labels, histogram in list(self._values.items()):
            total, counts, buckets = histogram.sum, list(histogram.counts), []
            for place, bound in enumerate((*self._bounds, float("inf"))):
                buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(sum(counts[: place + 1]))))
            found.add_metric(labels, buckets, total)
        return found


class Gauge:
    """What is read when somebody scrapes, in the server's thread."""

    def __init__(self, family: Family, read: Callable[[], Mapping[Labels, float]]) -> None:
        self.family = family
        self._read = read

    def collect(self) -> Metric:
        """As it is now."""
        found = GaugeMetricFamily(self.family.name, self.family.meaning, labels=self.family.labels)
        for labels, value in self._read().items():
            found.add_metric(labels, value)
        return found


class Metrics(Collector):
    """All metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self._instruments: list[Counter | Histograms | Gauge] = []
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._registry.register(self)

    @property
    def families(self) -> list[Family]:
        """What there is beside the process' own metrics."""
        return [instrument.family for instrument in self._instruments]

    def counter(self, name: str, meaning: str, *labels: str) -> Counter:
        """A new counter; the name without prefix."""
        made = Counter(Family("counter", PREFIX + name, meaning, labels))
        self._instruments.append(made)
        return made

    def histograms(self, name: str, meaning: str, bounds: Sequence[float], *labels: str) -> Histograms:
        """New histograms; the name without prefix, upper bounds of the buckets."""
        made = Histograms(Family("histogram", PREFIX + name, meaning, labels), bounds)
        self._instruments.append(made)
        return made

    def gauge(self, name: str, meaning: str, read: Callable[[], Mapping[Labels, float]], *labels: str) -> None:
        """A new gauge; the name without prefix. `read` is called in another thread: it must not wait, nor change anything."""
        self._instruments.append(Gauge(Family("gauge", PREFIX + name, meaning, labels), read))

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would otherwise read the gauges before there is anything to read."""
        return []

    def collect(self) -> Iterable[Metric]:
        """As prometheus_client asks for them."""
        return [instrument.collect() for instrument in self._instruments]

    @contextmanager
    def served(self, service: str, host: str, port: int | None) -> Iterator[None]:
        """Answers scrapes until the context ends; does nothing if `port` is None, takes a free one if it is 0.

        Prints one line "enginehouse <service> metrics on http://<host>:<port>/metrics" to stdout.

        Raises:
            Unavailable: the port cannot be bound.
        """
        if port is None:
            yield
            return
        running = version("enginehouse")
        self.gauge("info", "1, of the version that runs.", lambda: {(service, running): 1.0}, "service", "version")
        try:
            server, thread = start_http_server(port, host.strip("[]"), self._registry)
        except OSError as error:
            raise Unavailable(
                f"cannot serve metrics on {host}:{port} ({error.strerror or error}); choose another port with --metrics-port",
                reason="PORT_TAKEN",
            ) from None
        try:
            print(f"enginehouse {service} metrics on http://{host}:{server.server_port}/metrics", flush=True)
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
