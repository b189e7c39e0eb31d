"""A recording gives back what was recorded, whole and checked, and nothing else."""

import gzip
import json
from pathlib import Path

import pytest

from llmdistill.teach.cache import CompletionCache, Question
from llmdistill.teach.prompt import Prompt
from llmdistill.teach.recorded import COMPLETIONS, MANIFEST, Recorded, export_recording
from llmdistill.teach.teacher import Completion, Request, Sampling, Teacher, TeacherError

SAMPLING = Sampling(max_tokens=9, temperature=0.5, stop=("\n",))
PROMPTS = {f"row-{number}": f"Message: number {number}\nReason:" for number in range(20)}
TEXTS = ["plain", "two\u2028lines \x85 of \r\n it", "émoji 🙂", ""]


class ChatTeacher:
    """Renders what it is asked, so that the cache knows other prompts than the recording."""

    model, revision = "some/model", "sha256:abc"
    dollars_per_million_tokens_in, dollars_per_million_tokens_out = 1.0, 2.0

    def render(self, prompt: str) -> str:
        return f"<user>{prompt}<assistant>"

    def complete(self, requests, sampling, done) -> None:
        raise AssertionError("nobody is asked")

    def fingerprint(self) -> dict[str, object]:
        return {"model": self.model}


@pytest.fixture
def prompt(tmp_path: Path) -> Prompt:
    path = tmp_path / "prompts" / "p.jinja"
    path.parent.mkdir()
    path.write_text("{{ message }} The answer is")
    return Prompt(path=path)


def export(folder: Path, prompt: Prompt, *, num_prompts: int = 20, name: str = "recording") -> Path:
    teacher = ChatTeacher()
    with CompletionCache(folder / "cache") as cache:
        for number, text in enumerate(list(PROMPTS.values())[:num_prompts]):
            for sample in range(2):
                question = Question(model=teacher.model, revision=teacher.revision, prompt=teacher.render(text), sampling=SAMPLING, sample_index=sample)
                answer = TEXTS[(number + sample) % len(TEXTS)]
                cache.record(question, Completion(text=answer, tokens_in=number, tokens_out=3, seconds=0.25, finish_reason="stop"))
        return export_recording(cache, folder / name, teacher=teacher, prompt=prompt, prompts=PROMPTS, sampling=SAMPLING, num_samples=2, date="2026-01-31")


def answers(teacher: Teacher, requests: list[Request], sampling: Sampling = SAMPLING) -> dict[int, Completion]:
    found: dict[int, Completion] = {}
    teacher.complete(requests, sampling, found.__setitem__)
    return found


def test_what_was_recorded_comes_back(tmp_path: Path, prompt: Prompt) -> None:
    recorded = Recorded(folder=export(tmp_path, prompt))
    requests = [Request(prompt=text, sample_index=sample) for text in PROMPTS.values() for sample in (1, 0)]
    found = answers(recorded, requests)
    for index in range(len(requests)):
        number, sample = index // 2, 1 - index % 2
        assert found[index] == Completion(text=TEXTS[(number + sample) % 4], tokens_in=number, tokens_out=3, seconds=0.25, finish_reason="stop")
    assert (recorded.model, recorded.revision, recorded.dollars_per_million_tokens_out) == ("some/model", "sha256:abc", 2.0)
    questions = [Question(model="any", revision="any", prompt=text, sampling=SAMPLING) for text in [*PROMPTS.values(), "unknown"]]
    assert set(recorded.find(questions)) == {question.fingerprint for question in questions[:-1]}


def test_the_manifest_says_how_it_was_made_and_the_bytes_depend_on_nothing_else(tmp_path: Path, prompt: Prompt) -> None:
    one, other = export(tmp_path, prompt), export(tmp_path, prompt, name="again")
    manifest = json.loads((one / MANIFEST).read_text())
    assert manifest["template"] == {"path": "prompts/p.jinja", "sha256": prompt.sha256, "answer_marker": "The answer is"}
    assert manifest["sampling"] == {"max_tokens": 9, "temperature": 0.5, "top_p": 1.0, "seed": 0, "stop": ["\n"]}
    assert (manifest["num_rows"], manifest["num_completions"], manifest["tokens_in"], manifest["date"]) == (20, 40, 2 * sum(range(20)), "2026-01-31")
    for name in (COMPLETIONS, MANIFEST):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert Recorded(folder=one).fingerprint() == Recorded(folder=other).fingerprint()


def test_a_recording_is_small(tmp_path: Path, prompt: Prompt) -> None:
    folder = export(tmp_path, prompt)
    assert b"number 1" not in gzip.decompress((folder / COMPLETIONS).read_bytes()), "prompts are not stored"
    assert (folder / COMPLETIONS).stat().st_size < 40 * 100


def test_the_first_missing_prompt_is_named_with_the_remedy(tmp_path: Path, prompt: Prompt) -> None:
    recorded = Recorded(folder=export(tmp_path, prompt))
    with pytest.raises(TeacherError, match="Message: other") as failure:
        answers(recorded, [Request(prompt=PROMPTS["row-0"]), Request(prompt="Message: other"), Request(prompt="Message: third")])
    assert "--teacher" in str(failure.value)
    with pytest.raises(TeacherError, match="no sample 2"):
        answers(recorded, [Request(prompt=PROMPTS["row-0"], sample_index=2)])
    with pytest.raises(TeacherError, match="max_tokens 9, not 10"):
        answers(recorded, [Request(prompt=PROMPTS["row-0"])], Sampling(max_tokens=10, temperature=0.5, stop=("\n",)))


def test_damage_is_found(tmp_path: Path, prompt: Prompt) -> None:
    folder = export(tmp_path, prompt)
    data = (folder / COMPLETIONS).read_bytes()
    (folder / COMPLETIONS).write_bytes(data[:-7])
    with pytest.raises(TeacherError, match="is not the file that its manifest describes"):
        answers(Recorded(folder=folder), [Request(prompt=PROMPTS["row-0"])])
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(TeacherError, match="not the manifest of a recording"):
        _ = Recorded(folder=folder).model
    with pytest.raises(TeacherError, match=r"manifest\.json"):
        _ = Recorded(folder=tmp_path / "nowhere").model


def test_only_a_whole_annotation_is_exported(tmp_path: Path, prompt: Prompt) -> None:
    with pytest.raises(ValueError, match=r"2 of 40 completions are not in the cache, the first for row 'row-19'"):
        export(tmp_path, prompt, num_prompts=19)
