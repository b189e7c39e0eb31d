"""OpenVINO's side of benchmarks/int8.py, run by the Python of a virtual environment that optimum-intel has to itself (it wants transformers below 5.6).

    python openvino_side.py FOLDER THREADS TOKENS_OUT

FOLDER holds a T5; optimum-intel exports it with its weights in int8, and OpenVINO quantizes activations as it does by itself. The first line of standard input
holds the prompts, as JSON lists of token ids of one length; each further line asks for one decoding of them, and a line of standard output answers it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(folder: str, num_threads: int, num_tokens: int) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # so that what the libraries print is no answer
    import torch
    from optimum.intel import OVModelForSeq2SeqLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(num_threads)
    how = {"INFERENCE_NUM_THREADS": num_threads, "PERFORMANCE_HINT": "LATENCY"}
    model: Any = OVModelForSeq2SeqLM.from_pretrained(folder, export=True, load_in_8bit=True, ov_config=how)
    prompts = torch.tensor(json.loads(sys.stdin.readline()))
    mask = torch.ones_like(prompts)
    for _ in sys.stdin:
        model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
        print("decoded", file=answers, flush=True)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
