"""Try to open models with vLLM and keep what it says.

    python tests/on_vllm/run_refused.py OUT.json MODELS.json

MODELS: a name and the arguments of vllm.LLM for each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(out: str, models: str) -> None:
    from vllm import LLM

    said = {}
    for name, llm in json.loads(Path(models).read_text()).items():
        try:
            LLM(dtype="float32", max_model_len=256, enforce_eager=True, **llm)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        else:
            said[name] = "opened"
    Path(out).write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
