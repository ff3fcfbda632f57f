"""Which parameter of the model each tensor of a checkpoint is loaded into.

Names differ between the two, and several tensors may make one parameter: transformers' own loader
is asked, so that no architecture needs a table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from flexmoe.checkpoint import Checkpoint
from flexmoe.errors import FlexmoeError

Patterns = dict[str | None, list[str]]  # names by the converter's pattern, None: as they are


class Names:
    """Which parameter a checkpoint name is loaded into, as transformers' own loader sees it."""

    def __init__(self, model: PreTrainedModel):
        conversions = get_model_conversion_mapping(model)
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.prefix, self.state = model.base_model_prefix, model.state_dict()

    def groups(self, names: Iterable[str]) -> defaultdict[str, Patterns]:
        """Names by parameter and pattern, in the order in which the loader stacks them."""
        groups: defaultdict[str, Patterns] = defaultdict(dict)
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(
                name, self.renamings, self.converters, self.prefix, self.state
            )
            if target not in self.state and name in self.state:
                target, pattern = name, None
            groups[target].setdefault(pattern, []).append(name)
        return groups


def parameter_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """The model parameter that each checkpoint tensor is, for those stored one to one."""
    state = model.state_dict()
    return {
        stored[0]: parameter
        for parameter, stored in names_by_parameter(checkpoint, model).items()
        if [checkpoint.tensors[name].shape for name in stored] == [tuple(state[parameter].shape)]
    }


def names_by_parameter(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, list[str]]:
    """The checkpoint tensors that each parameter of ``model`` is made of (where a converter makes
    several of the same tensors, the first one); those that the model does not have are left out."""
    names = Names(model)
    return {
        parameter: [name for group in patterns.values() for name in group]
        for parameter, patterns in names.groups(checkpoint.tensors).items()
        if parameter in names.state
    }


def missing_parameters(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raise `FlexmoeError` naming the parameters of ``model`` that no tensor of ``checkpoint`` is
    loaded into, or one of another shape: transformers would go on with random numbers."""
    names = Names(model)
    stored = names.groups(checkpoint.tensors)
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    # of two that are tied either may be stored
    tied = set(ties) | {source for target, source in ties.items() if target in stored}
    optional = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or []]
    # a tensor that is split into several parameters is listed under the first of them
    several = [c.target_patterns for c in names.converters if len(c.target_patterns) > 1]
    parts = [p.split("*")[-1].strip("^.$") for patterns in several for p in patterns]
    lost, other = [], []
    for name, parameter in model.named_parameters():
        found = [one for group in stored.get(name, {}).values() for one in group]
        absent = not found and name not in tied and not any(part in name for part in parts)
        if absent and not any(p.search(name) for p in optional):
            lost.append(name)
        plain = len(found) == 1 and list(stored[name]) == [None]
        if plain and checkpoint.tensors[found[0]].shape != tuple(parameter.shape):
            other.append(
                f"{found[0]} is {list(checkpoint.tensors[found[0]].shape)}, expected "
                f"{list(parameter.shape)}"
            )
    if lost or other:
        what = [f"{len(lost)} parameters are in no file ({', '.join(lost[:3])})"] if lost else []
        raise FlexmoeError(
            f"the weights in {checkpoint.path} are not those of its config.json: "
            + "; ".join(what + other[:3])
            + ". A file is missing or of another model, download or make it again"
        )
