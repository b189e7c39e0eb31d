"""The operating points of a checkpoint: its sub-networks, taken out of it, times the risks that its exits were calibrated for, each with its pace here.

Which sub-networks: of an elastic checkpoint those that a search has measured (search.json), with their accuracies; without a search the largest, the chosen and
the smallest. Any other checkpoint is its own largest. Each has the risks that it was calibrated for by itself (stages/calibrate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmdistill.core.artifacts import SEARCH, read_json
from llmdistill.models.exit_settings import NEVER, Calibration, Point
from llmdistill.serve.engines import PlacedDecoding
from llmdistill.serve.pace import Stopwatch, run
from llmdistill.serve.points import LARGEST, OperatingPoint, Points, with_exits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.serve.scheduler import BatchEngine

ALWAYS_LEAVES = 0.0


@dataclass(frozen=True, kw_only=True)
class Offered:
    """One sub-network that is to be served."""

    subnet: str
    names: tuple[str, ...]
    accuracy: float | None
    model: PreTrainedModel


def offered(model: PreTrainedModel, front: str) -> list[Offered]:
    """The sub-networks of a model, each with weights of its own."""
    from llmdistill.elastic.choice import parse, write
    from llmdistill.elastic.extract import extracted
    from llmdistill.elastic.kept import active_of, is_elastic, space_of

    if not is_elastic(model):
        if front:
            raise ValueError(f"front is {front!r}, but the checkpoint is not elastic and has no sub-networks to choose among; leave it out")
        return [Offered(subnet=LARGEST, names=(), accuracy=None, model=model)]
    space = space_of(model)
    largest, smallest = space.largest(), space.smallest()
    chosen, accuracies = write(active_of(model), space), dict.fromkeys([write(one, space) for one in (largest, active_of(model), smallest)])
    if front:
        chosen, accuracies = read_front(Path(front))
    named = {LARGEST: write(largest, space), "smallest": write(smallest, space), "chosen": chosen}
    found = []
    for text, accuracy in accuracies.items():
        try:
            subnet = parse(text, space)
        except ValueError as error:
            raise ValueError(f"{front} is not of this checkpoint: it has the sub-network {text}, but {error}") from None
        names = tuple(name for name, of in named.items() if of == text and name != text)
        found.append(Offered(subnet=text, names=names, accuracy=accuracy, model=model if subnet == largest else extracted(model, subnet).eval()))
    return found


def read_front(path: Path) -> tuple[str, dict[str, float | None]]:
    """The chosen sub-network and all that were measured with their accuracies, from a search's folder or its search.json."""
    file = path / SEARCH if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"front is {str(path)!r}, and there is no {file}; give the folder of a search, as runs/PIPELINE/latest/search")
    found = read_json(file)
    try:
        return str(found["chosen"]), {str(point["subnet"]): float(point["measured_accuracy"]) for point in found["points"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no search's: {type(error).__name__}: {error}; give the search.json that the stage SearchSubnets has written") from None


def measure_points(
    found: Sequence[Offered], make_engines: Callable[[Mapping[str, PreTrainedModel]], BatchEngine], *, num_positions: int, max_rows: int
) -> Points:
    """The points of the sub-networks; each is timed alone, at full depth and where all tokens leave at the first exit."""

    def watch(one: Offered, engine: BatchEngine, threshold: float) -> Stopwatch:
        decoding = partial(PlacedDecoding, subnet=one.subnet, exit_threshold=threshold, stop_token_ids=())
        vocabulary_size = int(one.model.config.vocab_size)
        return Stopwatch(engine, lambda num: decoding(max_new_tokens=num), vocabulary_size=vocabulary_size, num_positions=num_positions, max_rows=max_rows)

    whole, early, calibrated = {}, {}, {one.subnet: _calibrated(one.model) for one in found}
    for one in found:
        engine = make_engines({one.subnet: one.model})
        whole[one.subnet] = watch(one, engine, NEVER)
        if calibrated[one.subnet]:
            early[one.subnet] = watch(one, engine, ALWAYS_LEAVES)
    run([*whole.values(), *early.values()])
    points: list[OperatingPoint] = []
    for one in found:
        point = OperatingPoint(
            subnet=one.subnet,
            names=one.names,
            num_layers=round(whole[one.subnet].mean_layers),
            weight_bytes=sum({tensor.data_ptr(): tensor.nbytes for tensor in one.model.state_dict().values()}.values()),  # a tied one once
            accuracy=one.accuracy,
            pace=whole[one.subnet].pace,
        )
        if one.subnet in early:
            first = early[one.subnet]
            points += with_exits(point, (first.pace, first.mean_layers), calibrated[one.subnet])
        else:
            points.append(point)
    return Points(points)


def _calibrated(model: PreTrainedModel) -> Sequence[Point]:
    """The thresholds of a model's exits; ValueError where they were calibrated for other weights, or for these in another precision."""
    from llmdistill.models.exits import check_calibration

    calibration = Calibration.read(model.config)
    if calibration is None:
        return ()
    check_calibration(model)
    return calibration.points
