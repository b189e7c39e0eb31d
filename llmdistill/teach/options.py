"""The teachers that a pipeline's option may name: `--teacher openai:gpt-4o-mini?concurrency=32`, `--teacher recorded:FOLDER`."""

from __future__ import annotations

from llmdistill.teach.openai_teacher import OpenAITeacher
from llmdistill.teach.recorded import Recorded
from llmdistill.teach.transformers_teacher import TransformersTeacher
from llmdistill.teach.vllm_teacher import VLLMTeacher

TeacherOption = TransformersTeacher | VLLMTeacher | OpenAITeacher | Recorded
