"""What the server measures about itself, in Prometheus' form.

Each app has a registry of its own, so that two apps in one process (tests do that) do not add up.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
LAYERS_BUCKETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64, 80)
ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The server's counters, gauges and histograms."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("llmdistill_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.request_seconds = Histogram(
            "llmdistill_request_seconds", "From the request's headers to the answer's last byte.", ["path"], buckets=SECONDS_BUCKETS, registry=self.registry
        )
        self.open_requests = Gauge("llmdistill_open_requests", "Requests that are being answered.", registry=self.registry)
        self.disconnects = Counter("llmdistill_disconnects", "Clients that went away before their answer was complete.", registry=self.registry)

        self.queue_rows = Gauge("llmdistill_queue_rows", "Rows that wait for a place in the batch.", registry=self.registry)
        self.active_rows = Gauge("llmdistill_active_rows", "Rows that are being decoded.", registry=self.registry)
        self.rows = Counter("llmdistill_rows", "Rows that left, by reason: stop, length, cancelled, failed.", ["reason"], registry=self.registry)
        self.queue_seconds = Histogram("llmdistill_queue_seconds", "A row's wait for its place.", buckets=SECONDS_BUCKETS, registry=self.registry)
        self.first_token_seconds = Histogram(
            "llmdistill_time_to_first_token_seconds", "From a row's submission to its first token.", buckets=SECONDS_BUCKETS, registry=self.registry
        )

        self.prompt_tokens = Counter("llmdistill_prompt_tokens", "Tokens of the prompts that were given to the engine.", registry=self.registry)
        self.generated_tokens = Counter("llmdistill_generated_tokens", "Tokens decoded.", registry=self.registry)
        self.step_seconds = Histogram("llmdistill_step_seconds", "One step of the engine.", buckets=SECONDS_BUCKETS, registry=self.registry)
        self.step_rows = Histogram("llmdistill_step_rows", "Rows that one step moved on.", buckets=ROWS_BUCKETS, registry=self.registry)

        self.layers_per_token = Histogram(
            "llmdistill_layers_per_token", "Decoder layers that a token of a row went through, on average.", buckets=LAYERS_BUCKETS, registry=self.registry
        )
        self.rows_at_point = Counter(
            "llmdistill_rows_at_point", "Rows that got a place, by sub-network and exit risk.", ["subnet", "exit_risk"], registry=self.registry
        )
        self.controller_position = Gauge(
            "llmdistill_controller_position", "Steps along the front away from the best point, to keep the p95 target.", registry=self.registry
        )
        self.controller_steps = Gauge("llmdistill_controller_steps", "Steps that there are along the front.", registry=self.registry)

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
