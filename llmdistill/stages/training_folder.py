"""The folder `training/` of a stage that trains: what the student was when it began, the state of the training, and their end.

    training/initial       written once, by the main process, and renamed when whole: a rerun begins with the same student
    training.finished      what is left of it while it is removed: a killed removal must not leave a state without its weights

The stage's own checkpoint is written within; a stage that is killed before its end finds the folder again.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmdistill.core.run import Run


@contextmanager
def training_folder(run: Run, write_initial: Callable[[Path], object]) -> Iterator[tuple[Path, Any]]:
    """The folder, with the initial student in it, and this process among those that train. It is gone when all of them have come to the end."""
    from llmdistill.train_setup import this_process

    folder, finished = run.folder / "training", run.folder / "training.finished"
    process = this_process()
    with process.main_process_first():
        if process.is_main_process:
            shutil.rmtree(finished, ignore_errors=True)
            if not (folder / "initial").exists():
                writing = folder / "initial.writing"
                shutil.rmtree(writing, ignore_errors=True)
                write_initial(writing)
                writing.rename(folder / "initial")
    yield folder, process
    if process.is_main_process:
        folder.rename(finished)
        shutil.rmtree(finished)
    process.wait_for_everyone()


def load_to_train(folder: Path) -> tuple[Any, Any]:
    """A checkpoint's model in float32, as students are trained, and its tokenizer."""
    import torch

    from llmdistill.models import checkpoint

    return checkpoint.load(folder, dtype=torch.float32)
