"""What statistics see of a layer: its routed pairs, and what stands around its experts, found
without names of architectures: the router and what it says, the residual stream it adds to, and
the ids of the tokens.

The router is the module that owns a matrix with a row for each expert. The residual stream is what
entered the norm whose output the experts were given: a pair of tensors, whatever their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, Seen


def router_weights(layer: ExpertLayer) -> dict[str, nn.Parameter]:
    """Matrices with a row for each expert, in the module that holds the experts or in the decoder
    layer around it, by their names in the model. A few architectures have none."""
    assert layer.model is not None
    path = layer.name
    for _ in range(2):
        path = path.rpartition(".")[0]
        found = {
            name: p
            for within, p in layer.model.get_submodule(path).named_parameters()
            if not (name := f"{path}.{within}").startswith(f"{layer.name}.")
            and p.dim() == 2
            and p.shape[0] == layer.E
            and any(word in within for word in ("gate", "router"))
        }
        if found:
            return found
    return {}


def router_rows(layer: ExpertLayer) -> Tensor:
    """The router's matrix [E, H] in float64 on the CPU; a `FlexmoeError` if there is none."""
    found = router_weights(layer)
    if len(found) != 1:
        raise FlexmoeError(
            f"layer {layer.index}: this method reads the router's matrix, but beside the experts "
            f"stand {', '.join(found) or 'none'} with a row for each of the {layer.E} experts"
        )
    return next(iter(found.values())).detach().double().cpu()


@dataclass
class Around:
    """Remembers, while a decoder layer runs, what its router and its norms gave last; ``target_TH``
    is what its experts give in the unpruned model, where that is another one."""

    layer: ExpertLayer
    ids: Tensor | None = None
    target_TH: Tensor | None = None
    logits: Tensor | None = None
    decoder: Any = None  # the module of the decoder layer
    normed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def router_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        for part in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(part, Tensor) and part.shape[-1] == self.layer.E:
                self.logits = part.detach()
                return

    def ids_hook(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.ids = kwargs.get("input_ids", args[0] if args else None)

    def norm_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(output, Tensor) and isinstance(args[0], Tensor):
            # both are kept, so that no other tensor gets this address meanwhile
            self.normed[output.data_ptr()] = (output.detach(), args[0].detach())

    def logits_TE(self, tokens: int) -> Tensor:
        """The router's first output for the tokens that the experts are given now."""
        found = self.logits
        if found is None or found.numel() != tokens * self.layer.E:
            raise FlexmoeError(
                f"layer {self.layer.index}: this method reads the router's logits, but no module "
                f"beside {self.layer.name} gave [{tokens}, {self.layer.E}] of them (a statistic of "
                'your own must say reads=("router",))'
            )
        return found.reshape(tokens, self.layer.E).float()

    def ids_T(self, tokens: int) -> Tensor:
        """The ids of the tokens that the experts are given now."""
        if self.ids is None or self.ids.numel() != tokens:
            raise FlexmoeError(
                f"layer {self.layer.index}: this method reads token ids, and the experts are given "
                f"{tokens} tokens that are not those of the model's input (a statistic of your own "
                'must say reads=("ids",))'
            )
        return self.ids.flatten()

    def residual_TH(self, x_TH: Tensor) -> Tensor:
        """What entered the norm that gave the experts ``x_TH``, in units of what they give: where
        the decoder layer adds them up with factors, divided by these, so that the direction of the
        sum, and of each part its share, are the model's."""
        if x_TH.data_ptr() not in self.normed:
            raise FlexmoeError(
                f"layer {self.layer.index}: this method reads the residual stream before the "
                f"experts' norm, but no norm gave {self.layer.name} its input (a statistic of your "
                'own must say reads=("residual",))'
            )
        decoder = self.decoder
        if hasattr(decoder, "mlp_alpha_factor"):  # MiniMax, where what the norm gave goes on
            return x_TH * (decoder.mlp_alpha_factor / decoder.mlp_beta_factor)
        _, residual = self.normed[x_TH.data_ptr()]
        return residual.reshape(x_TH.shape[0], -1) / getattr(decoder, "residual_multiplier", 1.0)

    def clear(self) -> None:
        self.logits = None
        self.normed.clear()


@dataclass(frozen=True)
class Pairs:
    """What a statistic sees of one layer and batch: S routed pairs sorted by expert.

    ``weight_S`` the routing weight the model really used; ``h_SI`` channel activations, the input
    of the down projection; ``grad_SI`` the gradient of the summed token loss at them. Statistics of
    the backward pass get these three, all others everything but ``grad_SI``.
    """

    weight_S: Tensor
    h_SI: Tensor
    grad_SI: Tensor | None = None
    layer: ExpertLayer | None = None
    seen: Seen | None = None
    around: Around | None = None

    @property
    def all(self) -> Seen:
        """Arguments and result of the experts module, see `Seen`."""
        assert self.seen is not None, "statistics of the backward pass see weight, h and grad only"
        return self.seen

    @property
    def token_S(self) -> Tensor:
        """The token (row of ``all.x_TH``) of every pair."""
        return self.all.routing.token_S

    @property
    def y_SH(self) -> Tensor:
        """The expert's output, before its routing weight."""
        return self.all.y_SH

    @property
    def pre_SI(self) -> list[Tensor]:
        """What enters the activation: [gate, up], or [up] where experts have no gate."""
        assert self.layer is not None
        name = "gate_up_proj" if self.layer.module.has_gate else "up_proj"
        return self.layer.channel_major(f"{name}_bias", self.all.pre_S)

    @property
    def logits_TE(self) -> Tensor:
        """The router's raw output for every token (of statistics that read ``router``)."""
        assert self.around is not None
        return self.around.logits_TE(self.all.x_TH.shape[0])

    @property
    def target_TH(self) -> Tensor:
        """What the experts give for these tokens in the unpruned model (for those that read
        ``target``): where that is the model that runs, what they gave."""
        assert self.around is not None
        return self.all.out_TH if self.around.target_TH is None else self.around.target_TH

    @property
    def ids_T(self) -> Tensor:
        """The id of every token (for those that read ``ids``)."""
        assert self.around is not None
        return self.around.ids_T(self.all.x_TH.shape[0])

    @property
    def residual_TH(self) -> Tensor:
        """The residual stream before the experts' norm, in units of their output (for those that
        read ``residual``)."""
        assert self.around is not None
        return self.around.residual_TH(self.all.x_TH)


class Reader(Protocol):
    """A statistic, as far as it says what it ``reads``: ``router``, ``residual``, ``ids``."""

    @property
    def reads(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Reads:
    """A `Reader` that is no statistic."""

    reads: tuple[str, ...]


@contextmanager
def around_experts(
    layers: Sequence[ExpertLayer], wanted: Iterable[Reader]
) -> Iterator[dict[int, Around]]:
    """Inside the block every layer's `Around` follows its router and norms, as far as one that is
    ``wanted`` reads them."""
    reads = {what for reader in wanted for what in reader.reads}
    with ExitStack() as stack:
        found = {layer.index: Around(layer) for layer in layers}
        for layer in layers:
            assert layer.model is not None
            watch = found[layer.index]
            for name in router_weights(layer) if "router" in reads else ():
                router = layer.model.get_submodule(name.rpartition(".")[0])
                stack.callback(router.register_forward_hook(watch.router_hook).remove)
            if "ids" in reads:
                watching = layer.model.register_forward_pre_hook(watch.ids_hook, with_kwargs=True)
                stack.callback(watching.remove)
            if "residual" not in reads:
                continue
            decoder = re.match(r".*?\.\d+(?=\.)", layer.name)
            assert decoder is not None  # see expert_layers
            watch.decoder = layer.model.get_submodule(decoder[0])
            for module in watch.decoder.modules():
                if "norm" in type(module).__name__.lower():
                    stack.callback(module.register_forward_hook(watch.norm_hook).remove)
        yield found
