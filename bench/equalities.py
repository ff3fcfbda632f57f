"""compress, all exports and switching on the shipped model and four random families.

python bench/equalities.py         # prints what equals what, writes results/equalities.json
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from common import save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from transformers import AutoModelForCausalLM
from transformers.utils import logging

import flexmoe
from flexmoe.checkpoint import resolve
from flexmoe.data import TINY
from flexmoe.experts import experts_function
from helpers import difference, ids_of, logits, masked_logits, tensors
from zoo import tiny_model

NAMES = ("tiny", "mixtral", "olmoe", "deepseek_v2", "gpt_oss")
SHARES = (0.2, 0.4, 0.6, 0.8)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(walk(name, Path(folder)))
        print()
    save("equalities", {"rows": rows})


def stock(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def walk(name: str, root: Path) -> dict:
    base = resolve("tiny")
    if name != "tiny":
        base = root / "base"
        tiny_model(name, vocab_size=4096).save_pretrained(base)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / "model" / file, base)
    config = flexmoe.CompressConfig(samples=16, seq_len=64, pruned=SHARES, device="cpu", quantum=2)
    plan = flexmoe.compress(base, root / "family", config)
    original, ids = stock(base), ids_of(stock(base))
    model = flexmoe.load(root / "family", dtype=torch.float32, device="cpu")
    full = logits(model, ids)
    row: dict = {"model": name, "budgets": {}, "exports": {}}

    def tell(key: str, value: float | bool | str) -> None:
        row[key] = value
        shown = f"{value:.1e}" if isinstance(value, float) else str(value)
        print(f"{name:12} {key:58} {shown}", flush=True)

    with experts_function(original, "eager"):
        tell(
            "ranked checkpoint, stock class, vs original eager",
            difference(full, logits(original, ids)),
        )
    tell(
        "budget 0 equals the stock class bit for bit",
        torch.equal(full, logits(stock(root / "family"), ids)),
    )
    worst = 0.0
    for share in SHARES:
        row["budgets"][share] = flexmoe.set_budget(model, share).achieved
        worst = max(
            worst, difference(logits(model, ids), masked_logits(original, plan, share, ids))
        )
    tell("switched to 20, 40, 60, 80 %, vs masked (worst)", worst)
    beside = max(abs(achieved - share) for share, achieved in row["budgets"].items())
    tell("budgets hit, worst deviation (share of routed parameters)", beside)
    flexmoe.set_budget(model, 0)
    tell("back at 0: bit for bit", torch.equal(logits(model, ids), full))
    plan.save(root / "plan")
    flexmoe.set_budget(model, 0.4)
    at_40 = logits(model, ids)
    alone = flexmoe.load(root / "plan", 0.4, base=base, dtype=torch.float32, device="cpu")
    tell(
        "plan alone on the untouched base at 40 %: bit for bit",
        torch.equal(logits(alone, ids), at_40),
    )
    for layout in ("masked", "ragged", "uniform"):
        try:
            done = flexmoe.export(root / "family", root / layout, pruned=0.4, layout=layout)
        except flexmoe.FlexmoeError as error:
            tell(f"{layout} export", f"refused: {error}")
            continue
        row["exports"][layout] = {"pruned": done.pruned, "bytes": done.bytes}
        exported = stock(done.path)
        if layout == "uniform":
            order = {
                i: torch.arange(r.channels).expand(r.experts, -1) for i, r in plan.layers.items()
            }
            width = {
                i: torch.full((r.experts,), round((1 - done.pruned) * r.channels))
                for i, r in plan.layers.items()
            }
            want = masked_logits(stock(root / "family"), width, 0.4, ids, order)
        else:
            want = masked_logits(original, plan, 0.4, ids)
        tell(
            f"{layout} export at {done.pruned:.1%}, vs masked",
            difference(logits(exported, ids), want),
        )
        if layout == "ragged":
            stored = AutoModelForCausalLM.from_pretrained(done.path, dtype="auto")
            stored.save_pretrained(root / "again")
            first, again = tensors(done.path), tensors(root / "again")
            same = first.keys() == again.keys() and all(
                torch.equal(first[k], again[k]) for k in first
            )
            tell("ragged export loaded and saved: bit-equal tensors", same)
    return row


if __name__ == "__main__":
    main()
