"""Generate with vLLM in a process of its own: the engine starts once a process.

    python tests/on_vllm/run_offline.py MODEL OUT.json SETTINGS.json

SETTINGS: ``llm`` (arguments of vllm.LLM), ``budgets`` (one for all prompts, or one each), in runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from served import NEW_TOKENS, prompts


def main(model: str, out: str, settings: str) -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(settings).read_text())
    llm = LLM(
        model=model,
        max_model_len=256,
        max_num_seqs=16,
        seed=0,
        **{"dtype": "float32", "enforce_eager": True, **asked["llm"]},
    )
    found = []
    for budgets in asked["runs"]:
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=NEW_TOKENS,
                ignore_eos=True,
                extra_args={"flexmoe_budget": budget} if budget is not None else None,
            )
            for budget in budgets
        ]
        inputs = [{"prompt_token_ids": ids} for ids in prompts()]
        answers = llm.generate(inputs, params, use_tqdm=False)
        found.append([list(answer.outputs[0].token_ids) for answer in answers])
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
