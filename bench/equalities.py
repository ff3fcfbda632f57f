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

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import flexmoe
from flexmoe.checkpoint import meta_model
from flexmoe.data import TINY
from flexmoe.experts import expert_layers, experts_function
from flexmoe.headers import resolve
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


def stock(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def walk(name: str, root: Path) -> dict:
    base = resolve("tiny")
    if name != "tiny":
        base = root / "base"
        tiny_model(name, vocab_size=4096).save_pretrained(base)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / "model" / file, base)
    config = flexmoe.CompressConfig(
        samples=16, seq_len=64, pruned=SHARES, device="cpu", quantum=2, allocate="global"
    )
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
        eager = logits(original, ids)
    tell("ranked checkpoint, stock class, vs original eager", difference(full, eager))
    ranked = stock(root / "family")
    tell("budget 0 equals the stock class bit for bit", torch.equal(full, logits(ranked, ids)))
    worst = 0.0
    for share in SHARES:
        row["budgets"][share] = flexmoe.set_budget(model, share).achieved
        masked = masked_logits(original, plan, share, ids)
        worst = max(worst, difference(logits(model, ids), masked))
    tell("switched to 20, 40, 60, 80 %, vs masked (worst)", worst)
    beside = max(abs(achieved - share) for share, achieved in row["budgets"].items())
    tell("budgets hit, worst deviation (share of routed parameters)", beside)
    flexmoe.set_budget(model, 0)
    tell("back at 0: bit for bit", torch.equal(logits(model, ids), full))
    plan.save(root / "plan")
    flexmoe.set_budget(model, 0.4)
    at_40 = logits(model, ids)
    alone = flexmoe.load(root / "plan", 0.4, base=base, dtype=torch.float32, device="cpu")
    tell("plan alone on the base at 40 %: bit for bit", torch.equal(logits(alone, ids), at_40))
    for layout in ("masked", "ragged", "uniform"):
        try:
            done = flexmoe.export(root / "family", root / layout, pruned=0.4, layout=layout)
        except flexmoe.FlexmoeError as error:
            tell(f"{layout} export", f"refused: {error}")
            continue
        row["exports"][layout] = {"pruned": done.pruned, "bytes": done.bytes}
        got = logits(stock(done.path), ids)
        want = uniformly_masked(ranked, done.path, ids) if layout == "uniform" else at_40
        tell(f"{layout} export at {done.pruned:.1%}, vs masked", difference(got, want))
        if layout == "ragged":
            stored = AutoModelForCausalLM.from_pretrained(done.path, dtype="auto")
            stored.save_pretrained(root / "again")
            first, again = tensors(done.path), tensors(root / "again")
            same = first.keys() == again.keys()
            same = same and all(torch.equal(first[key], again[key]) for key in first)
            tell("ragged export loaded and saved: bit-equal tensors", same)
    return row


def uniformly_masked(ranked: PreTrainedModel, exported: Path, ids: Tensor) -> Tensor:
    """Logits of the ranked model with every expert masked to the exported model's width."""
    order, width = {}, {}
    cut = expert_layers(meta_model(exported))
    for narrow, layer in zip(cut, expert_layers(ranked), strict=True):
        order[layer.index] = torch.arange(layer.I).expand(layer.E, -1)
        width[layer.index] = torch.full((layer.E,), narrow.I)
    return masked_logits(ranked, width, 0.4, ids, order)


if __name__ == "__main__":
    main()
