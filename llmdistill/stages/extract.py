"""Extract: an elastic checkpoint in, one of its sub-networks out as a checkpoint of its own, named as text or as a search chose it."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmdistill.core.artifacts import Checkpoint, FoundSubnets
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage


@dataclass(frozen=True, kw_only=True)
class Extract(Stage[Checkpoint]):
    """A sub-network as an ordinary checkpoint."""

    artifact = Checkpoint

    checkpoint: Stage[Checkpoint]
    subnet: str | Stage[FoundSubnets] = "smallest"
    """As elastic/choice.py writes it, or the search whose choice it is."""

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.elastic.choice import write
        from llmdistill.elastic.cost import num_parameters
        from llmdistill.elastic.extract import extract
        from llmdistill.elastic.kept import read

        folder = run.artifact(self.checkpoint).folder
        text = self.subnet if isinstance(self.subnet, str) else str(run.artifact(self.subnet).found()["chosen"])
        out = run.folder / "extracted"
        subnet = extract(folder, text, out)
        for file in out.iterdir():
            file.replace(run.folder / file.name)
        out.rmdir()
        space, _ = read(folder)
        return {"subnet": write(subnet, space), "parameters": num_parameters(space, subnet), "parameters_before": num_parameters(space, space.largest())}
