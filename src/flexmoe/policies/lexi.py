"""LExI (arXiv 2509.02753): every layer its own number of experts a token, found without data.

D_l(k) is how far the output of layer l's experts moves when only the best k of a token are
computed, for inputs drawn from a normal distribution. The numbers that add up to the wanted total
with the least sum of D are found exactly by dynamic programming (the paper searches them by
evolution). A router that normalises does so over the k.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.experts import Seen, experts_function, unchanged
from flexmoe.policies import LayerFacts, places, policy
from flexmoe.routing.edits import Routed

TOKENS = 256  # drawn inputs a layer


def sensitivity(facts: LayerFacts) -> Tensor:
    """D(k) for k = 1..K, float64 [K]: Frobenius norms of the differences; the last one is 0."""
    module, model = facts.layer.module, facts.layer.model
    assert model is not None
    block = model.get_submodule(facts.layer.name.rpartition(".")[0])
    caught: list[Seen] = []

    class Catch:
        __call__ = staticmethod(unchanged)

        def see(self, seen: Seen) -> None:
            caught.append(seen)

    generator = torch.Generator().manual_seed(facts.layer.index)
    weight = next(block.parameters())
    hidden = model.config.get_text_config().hidden_size
    x_1TH = torch.randn(1, TOKENS, hidden, generator=generator).to(weight)
    module.flexmoe_observer = Catch()
    try:
        with torch.no_grad(), experts_function(model, "flexmoe_observe"):
            block(x_1TH)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise FlexmoeError(
            f"policy 'lexi' gives drawn inputs to {facts.layer.name.rpartition('.')[0]}, which "
            f"does not take them ({error}): use another policy"
        ) from None
    finally:
        del module.flexmoe_observer
    (seen,) = caught
    T, K = seen.index_TK.shape
    y_TKH = seen.y_SH.new_zeros(T * K, seen.y_SH.shape[1])
    y_TKH = y_TKH.index_copy(0, seen.routing.position_S, seen.y_SH).view(T, K, -1).double()
    routed = Routed(seen.index_TK, seen.weight_TK, facts.layer.E)
    whole_TH = torch.einsum("tk,tkh->th", seen.weight_TK.double(), y_TKH)
    found = []
    for k in range(1, K + 1):
        kept = best(routed, facts, k)
        weight_TK = kept.weight_TK.double() * (kept.index_TK < kept.E)
        found.append((torch.einsum("tk,tkh->th", weight_TK, y_TKH) - whole_TH).norm())
    return torch.stack(found).cpu()


def search(cost_LK: Tensor, total: int) -> list[int]:
    """The numbers of experts, 1 to K a layer, that add up to ``total`` at the least cost."""
    L, K = cost_LK.shape
    least = torch.full((L + 1, total + 1), torch.inf, dtype=torch.float64)
    least[0, 0] = 0
    choice = torch.zeros(L, total + 1, dtype=torch.long)
    for i in range(L):
        for k in range(1, K + 1):
            with_k = torch.full_like(least[i], torch.inf)
            with_k[k:] = least[i, : total + 1 - k] + cost_LK[i, k - 1]
            better = with_k < least[i + 1]
            least[i + 1] = torch.where(better, with_k, least[i + 1])
            choice[i][better] = k
    found: list[int] = []
    for i in reversed(range(L)):
        k = int(choice[i, total])
        found.insert(0, k)
        total -= k
    return found


def numbers(facts: Sequence[LayerFacts], mean: float) -> list[float]:
    """The number of each layer, ``mean`` of them a token on average."""
    cost_LK = torch.stack([sensitivity(f) for f in facts])
    total = max(len(facts), round(mean * len(facts)))
    return [float(k) for k in search(cost_LK, total)]


def best(routed: Routed, facts: LayerFacts, k: int) -> Routed:
    """The best ``k`` experts of every token."""
    return facts.keep(routed, places(routed.weight_TK) < k)


@policy(
    "lexi",
    paper="LExI, arXiv:2509.02753",
    argument="the experts of a token on average over the layers",
    least=0.999,
    most=None,
    fit=numbers,
)
def rule(routed: Routed, facts: LayerFacts, number: float) -> Routed:
    """The best experts of a token, as many as the layer needs by its response to noise."""
    return best(routed, facts, int(number))
