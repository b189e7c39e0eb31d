"""A pipeline: a typed function whose parameters are the options of a run and whose result is the last stage.

    def pipeline(teacher: AnyTeacher = ..., rationale_weight: float = 1.0) -> Stage[Report]:
        rationales = Annotate(teacher=teacher, ...)
        ...

    if __name__ == "__main__":
        main(pipeline)

`python pipelines/x.py ...` and `llmdistill run pipelines/x.py ...` are the same.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmdistill.core import options
from llmdistill.core.artifacts import Artifact
from llmdistill.core.graph import Graph, to_build
from llmdistill.core.latest import Latest
from llmdistill.core.launch import STOPPED_CODE, Processes, StageFailed, work
from llmdistill.core.lock import BuilderGone
from llmdistill.core.options import Pipeline, UsageError
from llmdistill.core.processes import is_launched, rank
from llmdistill.core.run import RUN_BEGAN, NotBuilt, Run, Stopped
from llmdistill.core.stage import Stage
from llmdistill.core.store import State, Store

log = logging.getLogger(__name__)


def main(pipeline: Pipeline) -> None:
    """The foot of a pipeline's file: run it with the options on the command line."""
    if pipeline.__name__ != "pipeline":
        raise ValueError(f"main() was given {pipeline.__name__}(); a file's pipeline is the function that is called pipeline")
    command([inspect.getfile(pipeline), *sys.argv[1:]])


def command(words: Sequence[str]) -> None:
    """`run` as a process: logs to stderr, and ends with a message and a code instead of a traceback where there is no bug to find."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("llmdistill").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run(words)
    except UsageError as error:
        _end(str(error), 2)
    except StageFailed as error:
        _end(str(error), 1)
    except BuilderGone as error:
        _end(str(error), 70)
    except Stopped as error:
        _end(str(error), STOPPED_CODE)
    except KeyboardInterrupt:
        _end("interrupted; the same command goes on from here", 130)


def runs_folder() -> Path:
    """Where everything is kept: $LLMDISTILL_RUNS, or ./runs."""
    return Path(os.environ.get("LLMDISTILL_RUNS", "runs"))


def find(file_or_name: str) -> Path:
    """A pipeline's file, by path or by the name of one that is here or shipped with llmdistill."""
    if file_or_name.endswith(".py"):
        path = Path(file_or_name)
        if not path.is_file():
            raise UsageError(f"there is no pipeline file {path}")
        return path
    package = Path(__file__).parent.parent
    folders = [Path("pipelines"), package / "shipped" / "pipelines", package.parent / "pipelines"]
    for folder in folders:
        if (folder / f"{file_or_name}.py").is_file():
            return folder / f"{file_or_name}.py"
    names = sorted({path.stem for folder in folders for path in folder.glob("*.py")})
    raise UsageError(f"there is no pipeline {file_or_name!r}; give a .py file or one of {', '.join(names) or 'those in pipelines/'}")


def load(path: Path) -> Pipeline:
    """The function `pipeline` of a file.

    The module is named after the file, however it was started, so that the stages it defines have the same names in every process.
    """
    name = f"pipelines.{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    sys.path.append(str(path.resolve().parent))  # for modules that lie beside it
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, "pipeline", None)):
        raise UsageError(f"{path} has no function called pipeline; it should return the last stage")
    return module.pipeline


def run(words: Sequence[str]) -> None:
    """`llmdistill run FILE|NAME ...`, or one stage of it in a process that it started (--build-key KEY, always last)."""
    key = ""
    if len(words) > 2 and words[-2] == "--build-key":
        *words, _, key = words
    path = find(words[0])
    pipeline = load(path)
    words = options.with_config(pipeline, words[1:])
    how, chosen = options.read(pipeline, words, f"llmdistill run {path}")
    if how.accelerate_args and is_launched() and not key:
        raise UsageError(f"--accelerate-args {how.accelerate_args!r}: the processes are launched already; give these flags to the launcher")
    store = Store(runs_folder() / "store")
    try:
        graph = Graph.above(pipeline(**chosen))
        target = _target(graph, how.until)
        if how.dry_run:
            if rank() == 0:
                print(dry_run(graph, target, store))
            return
    except (ValueError, RuntimeError) as error:  # a setting out of range, a file or package that is not there, a recording that cannot be read
        raise UsageError(str(error)) from error
    if key:
        work(graph.with_key(key), store)
    else:
        processes = Processes(store, ["run", str(path), *words], how.accelerate_args)
        build(graph, target, processes, runs_folder() / path.stem, options.resolved(pipeline, chosen))


def build(graph: Graph, target: Stage[Artifact], processes: Processes, folder: Path, chosen: dict[str, Any]) -> None:
    """Build what is missing for the target, stage by stage."""
    import yaml

    os.environ[RUN_BEGAN] = str(time.time())
    store = processes.store
    options_yaml = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)
    latest = Latest(folder, graph, store)
    if rank() == 0:
        latest.begin(options_yaml)
    missing = to_build(target, store)
    for number, stage in enumerate(missing, start=1):
        log.info("[%d/%d] %s (%s)%s", number, len(missing), stage.name, stage.key, " goes on" if store.partial(stage).is_dir() else "")
        start = time.monotonic()
        processes.build(stage, {"options.yaml": options_yaml} if stage.key == graph.last.key else {})
        log.info("[%d/%d] %s done in %.1f s", number, len(missing), stage.name, time.monotonic() - start)
        if rank() == 0:
            latest.link()
    if rank() == 0:
        print(latest.where(target))


def dry_run(graph: Graph, target: Stage[Artifact], store: Store) -> str:
    """A table of what a run would do and what it would cost, found without building anything."""
    missing = {stage.key for stage in to_build(target, store)}
    words = {State.COMPLETE: "cached", State.BUILDING: "another run builds it", State.PARTIAL: "goes on", State.MISSING: "to build"}
    rows = [("stage", "key", "state", "plan")]
    for stage in graph.stages:
        state = store.state(stage.key)
        figures = ""
        if stage.key in missing:
            try:
                figures = ", ".join(f"{name}={_figure(value)}" for name, value in stage.plan(Run(stage, store)).items())
            except NotBuilt as error:
                figures = str(error)
        is_needed = state is State.COMPLETE or stage.key in missing
        rows.append((stage.name, stage.key, words[state] if is_needed else "not needed", figures))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]).rstrip() for row in rows]
    return "\n".join([*lines, f"{len(missing)} of {len(graph.stages)} stages to build"])


def _target(graph: Graph, until: str) -> Stage[Artifact]:
    by_name = {stage.name: stage for stage in graph.stages}
    if until and until not in by_name:
        raise UsageError(f"--until {until}: no stage is called so; this pipeline has {', '.join(by_name)}")
    return by_name[until] if until else graph.last


def _figure(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
