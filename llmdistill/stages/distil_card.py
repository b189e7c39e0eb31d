"""What a distilled checkpoint says about itself: the section in config.json that programs read, and the model card that people read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmdistill.losses.multitask import LABEL, RATIONALE, LabelOnly, Multitask, RationaleOnly
from llmdistill.losses.prompts import EXPLAIN, PREDICT
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.task import Task

if TYPE_CHECKING:
    from llmdistill.batches import Example

_TASK_OF_PART = {LABEL: PREDICT, RATIONALE: EXPLAIN}


@dataclass(frozen=True, kw_only=True)
class Learned:
    """One entry of lineage.json."""

    technique: str
    settings: Mapping[str, Any]
    teacher: Mapping[str, Any]
    measured: Mapping[str, Any]

    def lineage_entry(self) -> dict[str, Any]:
        """As JSON."""
        return {"technique": self.technique, "settings": dict(self.settings), "teacher": dict(self.teacher), "measured": dict(self.measured)}


def task_section(task: Task, loss: Multitask | LabelOnly | RationaleOnly, config: Any, examples: "Sequence[Example]") -> dict[str, Any]:
    """`llmdistill` in config.json: the task, how the student is asked, which tasks it was taught, and the longest answer it was taught for each."""
    longest = {_TASK_OF_PART[part]: 1 for part in loss.parts}
    for example in examples:
        for pair in example:
            name = _TASK_OF_PART[loss.parts[pair.part]]
            longest[name] = max(longest[name], len(pair.target))
    taught = [_TASK_OF_PART[part] for part in loss.parts]
    prompts = {  # every student can be asked for a label, and its accuracy is what it is
        name: {task_name: item for task_name, item in value.items() if task_name in (PREDICT, *taught)} if isinstance(value, dict) else value
        for name, value in loss.prompts(config).to_config().items()
    }
    return {
        "task": task.name,
        "input_template": task.input_template,
        "choices": list(task.answer.choices) if isinstance(task.answer, Choice) else [],
        **prompts,
        "taught": taught,
        "max_new_tokens": longest,
    }


def model_card(name: str, task: Task, section: Mapping[str, Any], lineage: Sequence[Mapping[str, Any]]) -> str:
    """README.md of the checkpoint."""
    last = lineage[-1]
    measured = last["measured"]
    steps = "\n".join(f"{number}. {entry['technique']}" for number, entry in enumerate(lineage, start=1))
    figures = "\n".join(f"| {figure} | {value} |" for figure, value in measured.items())
    example = section["input_template"]
    return f"""---
library_name: transformers
tags: [llmdistill, distillation]
---
# {name}

A student for the task `{task.name}`, distilled from {last["teacher"]["model"]} (revision {last["teacher"]["revision"]}) with llmdistill.

It reads `{section["prefixes"][PREDICT]}{example}{section["suffix"]}` and writes the label{_explains(section)}
An ordinary Hugging Face folder: `AutoTokenizer` and `AutoModelForSeq2SeqLM` or `AutoModelForCausalLM` read it, and `llmdistill serve` serves it.

## How it came to be
{steps}

`lineage.json` has every setting. The last step:

```json
{json.dumps(last["settings"], indent=2, ensure_ascii=False)}
```

## Measured
Of the training; the accuracy on test rows is in the pipeline's report.

| figure | value |
|---|---|
{figures}
"""


def _explains(section: Mapping[str, Any]) -> str:
    if EXPLAIN not in section["taught"]:
        return "."
    start = section.get("decoder_start_token_ids", {}).get(EXPLAIN)
    how = f"with `decoder_start_token_id={start}`" if start is not None else f"behind `{section['prefixes'][EXPLAIN]}`"
    return f"; asked {how} it writes the reason."
