"""A recording: the completions of a real teacher in two small files, so that a pipeline runs without any teacher.

    completions.jsonl.gz   one object a line: row id, sample, digest of the prompt (which can be rendered again), text, tokens, seconds, finish reason
    manifest.json          model, revision (sha256 of the weights), template, sampling, date, counts, sha256 of the completions

A recording answers the prompts that it holds and asks nobody; one that it does not hold is an error that says which and what to do. Its identity is its
content, so that the same pipeline with the teacher itself is another stage, which really asks.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from llmdistill.teach.cache import CompletionCache, Question
from llmdistill.teach.prompt import Prompt
from llmdistill.teach.teacher import Completion, Request, Sampling, Teacher, TeacherError

COMPLETIONS = "completions.jsonl.gz"
MANIFEST = "manifest.json"
FORMAT = "llmdistill recording 1"
PROMPT_DIGITS = 24  # of the prompt's sha256: two of a million prompts share them with a chance of 1e-17


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The teacher that a recording was made from, as far as the recording goes."""

    kind: ClassVar[str] = "recorded"

    folder: Path

    @property
    def model(self) -> str:
        """The model that was recorded."""
        return self.manifest["model"]

    @property
    def revision(self) -> str:
        """The revision of the model that was recorded."""
        return self.manifest["revision"]

    @property
    def dollars_per_million_tokens_in(self) -> float:
        """What the recorded teacher cost: this one is free, and the report states what its completions were worth."""
        return self.manifest["dollars_per_million_tokens_in"]

    @property
    def dollars_per_million_tokens_out(self) -> float:
        """See dollars_per_million_tokens_in."""
        return self.manifest["dollars_per_million_tokens_out"]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """manifest.json, checked."""
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TeacherError(f"cannot read the recording's {path}: {error}. Give a folder with {MANIFEST} and {COMPLETIONS}, or ask a teacher") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise TeacherError(f"{path} is not the manifest of a recording: its format should be {FORMAT!r}")
        return manifest

    def render(self, prompt: str) -> str:
        """The prompt itself: a recording knows prompts, whatever chat template the teacher put around them."""
        return prompt

    def fingerprint(self) -> dict[str, object]:
        """The recorded model and the digest of the recording."""
        return {"model": self.model, "revision": self.revision, "completions_sha256": self.manifest["completions_sha256"]}

    def find(self, questions: Sequence[Question]) -> Mapping[str, Completion]:
        """The completions that the recording holds, by the fingerprint of the question; like a cache's `find`."""
        self._check_sampling({question.sampling for question in questions})
        held = ((question, self._completions.get((_digits(question.prompt), question.sample_index))) for question in questions)
        return {question.fingerprint: completion for question, completion in held if completion is not None}

    def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
        """Hand over the recorded completions; the first prompt that is not recorded is an error."""
        self._check_sampling({sampling})
        for index, request in enumerate(requests):
            completion = self._completions.get((_digits(request.prompt), request.sample_index))
            if completion is None:
                raise self.missing(request.prompt, request.sample_index)
            done(index, completion)

    def missing(self, prompt: str, sample_index: int) -> TeacherError:
        """The error for a prompt that is not recorded."""
        template = self.manifest["template"]
        return TeacherError(
            f"the recording {self.folder} has no sample {sample_index} for the prompt that ends with {prompt[-200:]!r}. It was made with the template "
            f"{template['path']} (sha256 {template['sha256'][:12]}...) and holds {self.manifest['num_rows']} rows: if you changed the template or the rows, "
            "ask a teacher, for example --teacher transformers:MODEL"
        )

    def _check_sampling(self, asked: set[Sampling]) -> None:
        recorded = self.manifest["sampling"]
        for sampling in asked:
            for name, value in dataclasses.asdict(sampling).items():
                value = list(value) if isinstance(value, tuple) else value
                if value != recorded.get(name):
                    raise TeacherError(
                        f"the recording {self.folder} was made with {name} {recorded.get(name)!r}, not {value!r}: "
                        f"set it to that, or ask a teacher, for example --teacher transformers:MODEL"
                    )

    @cached_property
    def _completions(self) -> dict[tuple[str, int], Completion]:
        path = self.folder / COMPLETIONS
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TeacherError(f"cannot read the recording's {path}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != self.manifest["completions_sha256"]:
            raise TeacherError(f"{path} is not the file that its manifest describes (sha256 {self.manifest['completions_sha256'][:12]}...): fetch it again")
        completions = {}
        for line in gzip.decompress(data).decode().rstrip("\n").split("\n"):  # not splitlines: texts may hold other line ends
            row = json.loads(line)
            completions[row["prompt"], row["sample"]] = Completion(
                text=row["text"], tokens_in=row["tokens_in"], tokens_out=row["tokens_out"], seconds=row["seconds"], finish_reason=row["finish_reason"]
            )
        return completions


def export_recording(
    cache: CompletionCache,
    folder: Path,
    *,
    teacher: Teacher,
    prompt: Prompt,
    prompts: Mapping[str, str],
    sampling: Sampling,
    num_samples: int,
    date: str,
) -> Path:
    """Write the completions that the cache holds for these prompts (by row id, not rendered by the teacher) as a recording; returns the folder.

    sampling is what the teacher was asked with, its stop strings included. The bytes depend on nothing but the arguments and the completions.
    """
    questions = {
        (row_id, sample): Question(model=teacher.model, revision=teacher.revision, prompt=teacher.render(text), sampling=sampling, sample_index=sample)
        for row_id, text in prompts.items()
        for sample in range(num_samples)
    }
    found = cache.find(list(questions.values()))
    missing = [key for key, question in questions.items() if question.fingerprint not in found]
    if missing:
        row_id, sample = missing[0]
        raise ValueError(
            f"{len(missing)} of {len(questions)} completions are not in the cache, the first for row {row_id!r}, sample {sample}: "
            "annotate with this teacher first"
        )
    lines = [_line(row_id, sample, prompts[row_id], found[question.fingerprint]) for (row_id, sample), question in questions.items()]
    data = gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0)
    completions = list({question.fingerprint: found[question.fingerprint] for question in questions.values()}.values())
    manifest = {
        "format": FORMAT,
        "model": teacher.model,
        "revision": teacher.revision,
        "template": {"path": Path(*prompt.path.parts[-2:]).as_posix(), "sha256": prompt.sha256, "answer_marker": prompt.answer_marker},
        "sampling": dataclasses.asdict(sampling),
        "date": date,
        "num_rows": len(prompts),
        "num_samples": num_samples,
        "num_completions": len(completions),
        "tokens_in": sum(completion.tokens_in for completion in completions),
        "tokens_out": sum(completion.tokens_out for completion in completions),
        "seconds": round(sum(completion.seconds for completion in completions), 3),
        "dollars_per_million_tokens_in": teacher.dollars_per_million_tokens_in,
        "dollars_per_million_tokens_out": teacher.dollars_per_million_tokens_out,
        "completions_sha256": hashlib.sha256(data).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / COMPLETIONS, data)
    _write(folder / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
    return folder


def _line(row_id: str, sample: int, prompt: str, completion: Completion) -> str:
    values = {"id": row_id, "sample": sample, "prompt": _digits(prompt), **dataclasses.asdict(completion), "seconds": round(completion.seconds, 4)}
    return json.dumps(values, ensure_ascii=False) + "\n"


def _digits(prompt: str) -> str:
    return hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:PROMPT_DIGITS]


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
