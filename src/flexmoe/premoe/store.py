"""Store: a folder with the patterns of one model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.files import refuse_existing
from flexmoe.headers import resolve
from flexmoe.plan import JSON_NAME
from flexmoe.premoe.pattern import Pattern
from flexmoe.trace import fingerprint, same_weights, trace

FOLDER = "patterns"  # where a store is unless said otherwise
TASK = re.compile(r"\w[\w.-]*")
RESERVED = ("auto", "none")  # model id and header of retrieval, see `flexmoe.serve`


class Store:
    """The patterns in the folder ``path``, which need not exist yet; ``tasks`` are their names."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise FlexmoeError(f"'{self.path}' is a file: a store of patterns is a folder")
        if any((self.path / name).is_file() for name in ("config.json", JSON_NAME)):
            raise FlexmoeError(f"'{self.path}' is a model or a plan: no store of patterns")

    @property
    def tasks(self) -> list[str]:
        """Names of all patterns, sorted."""
        return sorted(file.stem for file in self.path.glob("[!.]*.json"))

    def load(self, task: str) -> Pattern:
        """The pattern of a task; a `FlexmoeError` if there is none, or it is damaged."""
        if task not in self.tasks:
            raise did_you_mean(task, self.tasks, f"task in '{self.path}'")
        return Pattern.load(self.path, task)

    def load_all(self, tasks: Sequence[str] | None = None) -> list[Pattern]:
        """The patterns of these tasks, by default of all; a `FlexmoeError` if there are none."""
        if not self.tasks:
            raise FlexmoeError(
                f"there are no patterns in '{self.path}': make one with flexmoe profile MODEL "
                f"--task NAME --data FILE --store {self.path}"
            )
        wanted = self.tasks if tasks is None else tasks
        if not wanted or len(set(wanted)) < len(wanted):
            found = ", ".join(wanted) or "none"
            raise FlexmoeError(f"the tasks to use are each named once, found {found}")
        return [self.load(task) for task in wanted]

    @staticmethod
    def check_name(task: str) -> None:
        """`FlexmoeError` unless a pattern can have this name."""
        if not TASK.fullmatch(task):
            raise FlexmoeError(
                f"'{task}' cannot be the name of a task: letters, digits, '_', '-' and '.' can be "
                "in it, as in 'code-review'"
            )
        if task in RESERVED or task.replace(".", "", 1).isdigit():
            raise FlexmoeError(
                f"'{task}' cannot be the name of a task: servers call so what they find "
                "('auto', 'none') and their budgets (numbers). Give another name, such as "
                f"'task-{task}'"
            )

    def check_new(self, task: str) -> None:
        """`FlexmoeError` if there is a pattern of this name, or none can be written."""
        if task in self.tasks:
            raise FlexmoeError(
                f"'{self.path}' has a pattern of '{task}' already: give another name, or remove "
                f"{task}.json and {task}.safetensors there"
            )
        refuse_existing(self.path / f"{task}.json")

    def check_weights(self, found: str, model: str | Path) -> None:
        """`FlexmoeError` unless ``found``, the fingerprint of the weights of ``model``, is that of
        all patterns here."""
        for pattern in map(self.load, self.tasks):
            wanted = pattern.recipe.weights_sha256
            if not same_weights(found, wanted):
                raise FlexmoeError(
                    f"'{self.path}' is a store of another model: '{pattern.task}' was profiled on "
                    f"{pattern.recipe.base_model} (weights sha256 {wanted[:12]}), those of "
                    f"'{model}' are {found[:12]}. Give the store of this model, or profile it into "
                    "a folder of its own"
                )


def fingerprint_of(model: str | Path) -> str:
    """The `trace.fingerprint` of a model: of its experts no more than one a layer is read."""
    folder = resolve(model)
    checkpoint = Checkpoint(folder)
    return fingerprint(checkpoint, trace(checkpoint, meta_model(folder)))
