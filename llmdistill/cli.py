"""The command line: finds what a command needs and calls it; no logic of its own.

What a command needs is imported when it runs, so that help comes at once.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmdistill import __version__

USAGE = f"""llmdistill {__version__}: from unlabelled rows and a large teacher to a small student that is served.

usage: llmdistill COMMAND ...

  run FILE|NAME     run a pipeline: a file, or one by name (quickstart). --help shows its options, --dry-run
                    what would be built and what it would cost, --until STAGE stops early
  status [NAME]     what is built, how long it took and how large it is, as a tree
  init NAME         write a pipeline, a prompt and a task card for your own rows (--data rows.jsonl)
  report NAME       print the figures of a pipeline's report, or of a report's folder
  serve FOLDER      serve a checkpoint: OpenAI's API, and /v1/predict for the task
  extract FOLDER    take a sub-network out of an elastic checkpoint, as a checkpoint of its own (OUT --subnet TEXT)
  import PATH       take over rationales that were made elsewhere
  export FOLDER     write a checkpoint or rationales in the format of another program (OUT --to ctranslate2|gguf|rationales)

`llmdistill COMMAND --help` says more.
"""


def main(words: Sequence[str] | None = None) -> None:
    """Run one command."""
    words = list(sys.argv[1:] if words is None else words)
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": _run,
        "status": _status,
        "init": _init,
        "report": _report,
        "serve": _serve,
        "extract": _extract,
        "import": _import,
        "export": _export,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
    elif words[0] == "--version":
        print(__version__)
    elif words[0] not in commands:
        _end(f"there is no command {words[0]!r}; use one of {', '.join(commands)}")
    else:
        try:
            commands[words[0]](words[1:])
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read our output has enough of it, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


def _run(words: list[str]) -> None:
    from llmdistill.core.pipeline import command

    if not words or words[0].startswith("-"):
        _end("usage: llmdistill run FILE|NAME [options]; `llmdistill run quickstart --help` shows the options of that pipeline", 0 if words else 2)
    command(words)


def _status(words: list[str]) -> None:
    import tyro

    from llmdistill.core.pipeline import runs_folder
    from llmdistill.core.status import status

    def command(pipeline: tyro.conf.Positional[str] = "") -> None:
        """What is built of each pipeline, or of one.

        Args:
            pipeline: Its name; all where none is given.
        """
        print(status(runs_folder(), pipeline))

    _call(command, "status", words)


def _init(words: list[str]) -> None:
    import tyro

    from llmdistill.starter.guess import Said
    from llmdistill.starter.write import write

    def command(name: tyro.conf.Positional[str], data: Path, said: tyro.conf.OmitArgPrefixes[Said] = Said()) -> None:
        """Write pipelines/NAME.py, prompts/NAME.jinja and tasks/NAME.md for a file of rows; they are yours to edit.

        Args:
            name: Of the pipeline.
            data: The rows: a .jsonl, .json, .csv, .tsv or .parquet file, with or without labels.
        """
        pipeline, prompt, card = write(name, data, said, Path())
        print(f"{pipeline}\n{prompt}\n{card}\n\nnext: put true reasons into the prompt's examples, then\n  llmdistill run {pipeline} --dry-run")

    _call(command, "init", words)


def _report(words: list[str]) -> None:
    import tyro

    def command(report: tyro.conf.Positional[str]) -> None:
        """Print the figures of a report.

        Args:
            report: A pipeline's name, or the folder of a report.
        """
        from llmdistill.core.artifacts import Report
        from llmdistill.report.text import summary

        found = Report(_finished(report, "report.json"))
        print(f"{summary(found.data())}\n\n{found.page.resolve()}")

    _call(command, "report", words)


def _serve(words: list[str]) -> None:
    import tyro

    from llmdistill.serve.app import serve

    _call(serve, "serve", words, tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)


def _extract(words: list[str]) -> None:
    import tyro

    def command(checkpoint: tyro.conf.Positional[Path], out: tyro.conf.Positional[str] = "", subnet: str = "") -> None:
        """Take a sub-network out of an elastic checkpoint, as a checkpoint of its own; without --subnet, list the values of each axis.

        Args:
            checkpoint: The folder of an elastic checkpoint.
            out: The folder to write, which must not exist.
            subnet: AXIS=VALUE with commas between, as in encoder.depth=2,ffn=256; or largest or smallest.
        """
        from llmdistill.elastic.described import legal_values, taken_out
        from llmdistill.elastic.kept import read

        space, active = read(checkpoint)
        if not subnet:
            print(legal_values(space, active))
            return
        if not out:
            raise ValueError("name the folder to write: llmdistill extract CHECKPOINT OUT --subnet TEXT")
        from llmdistill.elastic.extract import extract, is_stock

        chosen = extract(checkpoint, subnet, Path(out))
        print(f"{taken_out(space, chosen, stock=is_stock(space, chosen))}\n\n{out}")

    _call(command, "extract", words)


def _import(words: list[str]) -> None:
    import tyro

    from llmdistill.tasks.options import TaskOption

    def command(path: tyro.conf.Positional[Path], task: TaskOption, published: bool = False, model: str = "imported") -> None:
        """Take over rationales that were made elsewhere: check them, count them, keep them in runs/store.

        A pipeline that has the same stage, as pipelines/svamp.py does, finds it built.

        Args:
            path: A .jsonl or .parquet file or a dataset's folder, with columns input, label and rationale; or the folder of published completions.
            task: The task that they belong to; rows that do not say their id or split are found among its rows by their text.
            published: The folder holds train_CoT_0.json and so on, as published with Distilling step-by-step, in the order of the task's rows.
            model: Who wrote them; pipelines/svamp.py says "PaLM 540B".
        """
        import json

        from llmdistill.core.pipeline import runs_folder
        from llmdistill.core.store import Store
        from llmdistill.stages.import_rationales import ImportRationales
        from llmdistill.stages.published_rationales import PublishedRationales

        found = task.task()
        stage = PublishedRationales(task=found, folder=path, model=model) if published else ImportRationales(path=path, task=found, model=model)
        rationales = Store(runs_folder() / "store").build(stage)
        print(f"{json.dumps(rationales.summary(), indent=2)}\n\n{rationales.folder}")

    _call(command, "import", words)


def _export(words: list[str]) -> None:
    import tyro

    from llmdistill.export.formats import ExportFormat

    def command(source: tyro.conf.Positional[str], out: tyro.conf.Positional[Path], to: ExportFormat) -> None:
        """Write a checkpoint or a pipeline's rationales in the format of another program; what cannot be written is told before any work.

        Args:
            source: A checkpoint's folder; for rationales a pipeline's name, or the folder of its annotate stage.
            out: What to write, which must not exist: a folder (ctranslate2), a .gguf file, or for rationales a .jsonl or .parquet file or a folder.
            to: The format, as gguf:Q8_0 or ctranslate2:INT8; matrices are F32 where nothing is said.
        """
        to.write(_finished(source, to.source_file), out)
        print(out)

    _call(command, "export", words)


def _finished(name: str, file: str) -> Path:
    """The folder of a finished stage: named itself, or the one that holds this file in a pipeline's latest run."""
    from llmdistill.core.pipeline import runs_folder

    if (Path(name) / file).is_file():
        return Path(name)
    folders = [path.parent for path in (runs_folder() / name / "latest").glob(f"*/{file}")]
    if len(folders) != 1:
        found = f"{len(folders)} stages of {name!r} have" if folders else f"neither a folder nor a finished pipeline {name!r} has"
        raise ValueError(f"{found} a {file}; name one folder{': ' + ', '.join(map(str, folders)) if folders else ''}")
    return folders[0]


def _call(command: Callable[..., None], name: str, words: Sequence[str], *markers: Any) -> None:
    """Read the words by the command's signature and call it; what it finds wrong is told without a traceback."""
    import tyro

    from llmdistill.core.options import description, registry

    try:
        tyro.cli(command, args=list(words), prog=f"llmdistill {name}", description=description(command), config=markers, registry=registry())
    except ValueError as error:
        _end(str(error))


def _end(message: str, code: int = 2) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
