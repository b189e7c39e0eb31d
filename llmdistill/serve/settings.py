"""Every limit of the server in one place.

A server that is open to the world is asked for everything at once: each number below bounds one thing that a client could otherwise grow without end
(bytes, tokens, rows, seconds), so the memory and the time that the server may take can be read off this page.
"""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits of the server; all are positive."""

    model_name: str = ""  # what /v1/models lists; empty: the name of the checkpoint's folder

    max_batch_rows: int = 32  # rows that decode together
    max_queue_rows: int = 256  # rows that wait for a place in the batch; beyond it 429
    max_open_requests: int = 1024  # requests inside the server at once, waiting ones and slow ones counted; beyond it 503

    max_body_bytes: int = 1 << 20  # beyond it 413
    max_header_bytes: int = 64 << 10
    max_prompt_tokens: int = 2048  # beyond it 400; a model with fewer positions lowers it
    max_new_tokens: int = 512  # the most that max_tokens may ask for
    max_label_tokens: int = 32  # /v1/predict: tokens of the label
    max_rationale_tokens: int = 128  # /v1/predict: tokens of the rationale

    target_p95_ms: float = math.inf  # under load, answers become cheaper along the front so that 95 of 100 rows take no longer than this

    header_timeout_seconds: float = 10.0  # to send the request line and the headers
    body_timeout_seconds: float = 10.0  # to send the body; beyond it 408
    write_timeout_seconds: float = 30.0  # a client that reads nothing for so long is cut off
    keep_alive_seconds: float = 5.0  # an idle connection
    request_timeout_seconds: float = 300.0  # from acceptance to the last token; beyond it 503 (still waiting) or 504 (decoding)
    stall_seconds: float = 60.0  # one step of the engine that takes longer makes /health fail
    drain_seconds: float = 30.0  # after SIGTERM, what runs has so long to finish

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "model_name" and not value > 0:
                raise ValueError(f"{field.name} is {value}; it must be above 0")
