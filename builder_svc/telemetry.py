"""The builder's metrics."""

from builder_svc.jobs import Jobs
from protos.histogram import BUILD, PHASE
from protos.metrics import Metrics
from protos.v1.builder_pb2 import BUILD_STATE_CANCELLED, BUILD_STATE_FAILED, BUILD_STATE_SUCCEEDED, Build

_OUTCOMES = {BUILD_STATE_SUCCEEDED: "succeeded", BUILD_STATE_FAILED: "failed", BUILD_STATE_CANCELLED: "cancelled"}
_LEFT = "left"  # to another builder, because this one stops or was taken for dead


class Telemetry:
    """Counts what this builder has done; what others of the same store have done, they count."""

    def __init__(self, metrics: Metrics) -> None:
        self._builds = metrics.counter("builder_builds_total", "Builds that this builder has had.", "outcome")
        self._found = metrics.counter(
            "builder_builds_found_total", "Builds whose engine was in the store already, of those that succeeded."
        )
        self._seconds = metrics.histograms(
            "builder_build_duration_seconds", "From taking a build to its end.", BUILD, "outcome"
        )
        self._phases = metrics.histograms(
            "builder_phase_duration_seconds", "From a phase's first progress to the next one's.", PHASE, "phase"
        )
        self._uploaded = metrics.counter("builder_upload_bytes_total", "Bytes of checkpoints that clients have sent.")
        self._metrics = metrics
        for outcome in (*_OUTCOMES.values(), _LEFT):
            self._builds.add(outcome, by=0)

    def watch(self, jobs: Jobs) -> None:
        """Shows how many builds run here, and how many wait at all builders together."""
        self._metrics.gauge("builder_builds_running", "Builds that this builder has.", lambda: {(): jobs.num_running})
        self._metrics.gauge(
            "builder_queue_length",
            "Builds that wait, as this builder last saw the queue.",
            lambda: {(): jobs.num_queued},
        )

    def ended(self, build: Build, seconds: float) -> None:
        """This builder has no longer a build that it had."""
        outcome = _OUTCOMES.get(build.state, _LEFT)
        self._builds.add(outcome)
        self._seconds.of(outcome).observe(seconds)
        if outcome == "succeeded" and build.reused:
            self._found.add()

    def uploaded_bytes(self, count: int) -> None:
        """Bytes of a checkpoint have come."""
        self._uploaded.add(by=count)

    def phase(self, name: str, seconds: float) -> None:
        """A phase is over."""
        self._phases.of(name).observe(seconds)
