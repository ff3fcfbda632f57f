"""What is mended of vLLM while flexmoe serves, and what is looked at before it loads."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm import _custom_ops

from flexmoe.errors import FlexmoeError
from flexmoe.hf import FORMAT
from flexmoe.serve.vllm.compat import mend_rotary_on_cpu
from flexmoe.serve.vllm.config import FlexmoeConfig


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_positions_are_rotated_in_a_slice_of_wider_rows(tokens: int) -> None:
    """As DeepSeek's attention gives them: a key of one head, cut out of a row of other things."""
    mend_rotary_on_cpu()
    random = torch.Generator().manual_seed(0)
    wide, query = (torch.randn(tokens, 3, 24, generator=random) for _ in range(2))
    table = torch.randn(16, 8, generator=random)
    positions = torch.arange(tokens) + 3
    alone = wide[:, 1:2, 16:].clone()
    for t in range(tokens):  # token by token, in rows of their own
        row = alone[t : t + 1].flatten(1).clone()
        _custom_ops.rotary_embedding(
            positions[t : t + 1], query[t : t + 1].flatten(1).clone(), row, 8, table, False
        )
        alone[t] = row.view(1, 8)
    before = wide.clone()
    _custom_ops.rotary_embedding(positions, query[:, :, 16:], wide[:, 1:2, 16:], 8, table, False)
    assert torch.allclose(wide[:, 1:2, 16:], alone, atol=1e-6)
    assert not torch.equal(alone, before[:, 1:2, 16:])
    wide[:, 1:2, 16:] = before[:, 1:2, 16:]
    assert torch.equal(wide, before)  # and nothing beside it


def test_a_kernel_that_is_none_is_refused_before_weights_load(monkeypatch) -> None:
    """`flexmoe serve` says so too; `vllm serve` alone has only this."""
    export = FlexmoeConfig({"widths": {}, "format": FORMAT})
    export.maybe_update_config("any")
    monkeypatch.setattr("flexmoe.kernels.interface.FORCED", "tritn")
    with pytest.raises(FlexmoeError, match="unknown FLEXMOE_KERNEL 'tritn'"):
        export.maybe_update_config("any")
