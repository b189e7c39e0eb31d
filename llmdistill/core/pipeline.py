"""A pipeline: a typed function whose parameters are the options of a run and whose result is the last stage.

    def pipeline(teacher: AnyTeacher = ..., rationale_weight: float = 1.0) -> Stage[Report]:
        rationales = Annotate(teacher=teacher, ...)
        ...

    if __name__ == "__main__":
        main(pipeline)

`python pipelines/x.py ...` and `llmdistill run pipelines/x.py ...` are the same. What a run leaves for people to find:

    runs/<pipeline>/latest/<stage>    a link to the stage's folder in runs/store
    runs/<pipeline>/options.yaml      every option of the last run, to read and to run again with --config; a copy lies beside the report
    runs/<pipeline>/graph.json        its stages, for `llmdistill status`
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llmdistill
from llmdistill.core import options
from llmdistill.core.artifacts import Artifact, Checkpoint, Report
from llmdistill.core.graph import Graph, to_build
from llmdistill.core.launch import STOPPED_CODE, Processes, StageFailed, work
from llmdistill.core.lock import BuilderGone
from llmdistill.core.options import Pipeline, UsageError
from llmdistill.core.processes import rank
from llmdistill.core.run import RUN_BEGAN, NotBuilt, Run, Stopped
from llmdistill.core.stage import Stage, upstream
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
    package = Path(llmdistill.__file__).parent
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
    last = pipeline(**chosen)
    try:
        graph = Graph.above(last)
    except (ValueError, RuntimeError) as error:  # a file that is not there, a recording that cannot be read, a name given twice
        raise UsageError(str(error)) from error
    store = Store(runs_folder() / "store")
    target = _target(graph, how.until)
    if key:
        work(graph.with_key(key), store)
    elif how.dry_run:
        print(dry_run(graph, target, store))
    else:
        processes = Processes(store, ["run", str(path), *words], how.accelerate_args)
        build(graph, target, processes, runs_folder() / path.stem, options.resolved(pipeline, chosen))


def build(graph: Graph, target: Stage[Artifact], processes: Processes, folder: Path, chosen: dict[str, Any]) -> None:
    """Build what is missing for the target, stage by stage."""
    import yaml

    os.environ[RUN_BEGAN] = str(time.time())
    store = processes.store
    options_yaml = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "options.yaml", options_yaml)
        _replace(folder / "graph.json", json.dumps(_describe(graph), indent=2))
        _link(graph, store, folder / "latest")
    missing = to_build(target, store)
    for number, stage in enumerate(missing, start=1):
        log.info("[%d/%d] %s (%s)%s", number, len(missing), stage.name, stage.key, " goes on" if store.partial(stage).is_dir() else "")
        start = time.monotonic()
        processes.build(stage, {"options.yaml": options_yaml} if stage.key == graph.last.key else {})
        log.info("[%d/%d] %s done in %.1f s", number, len(missing), stage.name, time.monotonic() - start)
        if rank() == 0:
            _link(graph, store, folder / "latest")
    if rank() == 0:
        print(_where(graph, target, store, folder / "latest"))


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


def _describe(graph: Graph) -> list[dict[str, Any]]:
    return [{"name": stage.name, "key": stage.key, "upstream": [above.key for above in upstream(stage)]} for stage in graph.stages]


def _link(graph: Graph, store: Store, folder: Path) -> None:
    """Make the folder link the finished stages of this graph, and nothing else."""
    folder.mkdir(exist_ok=True)
    finished = {stage.name: os.path.relpath(store.folder(stage), folder) for stage in graph.stages if store.is_complete(stage)}
    for link in folder.iterdir():
        if link.name not in finished:
            link.unlink(missing_ok=True)
    for name, destination in finished.items():
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.symlink_to(destination)
        temporary.rename(folder / name)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def _where(graph: Graph, target: Stage[Artifact], store: Store, folder: Path) -> str:
    """Where to look, and what to do next."""
    lines = [f"{target.name}: {folder / target.name}"]
    for stage in graph.stages:
        if store.is_complete(stage) and issubclass(stage.artifact, Checkpoint):
            lines.append(f"to serve {stage.name}: {_program()} serve {folder / stage.name}")
        if store.is_complete(stage) and issubclass(stage.artifact, Report):
            lines.append(f"the report: {(folder / stage.name / 'report.html').resolve()}")
    return "\n".join(lines)


def _program() -> str:
    """How to call llmdistill from here."""
    if shutil.which("llmdistill"):
        return "llmdistill"
    python = Path(sys.executable)
    return f"{python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python} -m llmdistill"


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
