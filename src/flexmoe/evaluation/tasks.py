"""Tasks of lm-evaluation-harness, through its API: any of its own, or files in its format."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.intervals import (
    Array,
    Interval,
    Z,
    interval,
    resampled_means,
    share_interval,
)
from flexmoe.evaluation.members import Key, Members

FILES = (".yaml", ".yml")
RESAMPLES = 1000  # by the harness, for metrics that are no means
# the very sum may be taken in another order
SAME_MEAN = {"rel_tol": 1e-9, "abs_tol": 1e-12}


def load_tasks(names: Sequence[str]) -> list[Any]:
    """Tasks and groups of tasks with their documents, in the order asked for.

    A name that ends in .yaml is a file. Raises `FlexmoeError` where the harness is not installed,
    a name is unknown, or a task cannot be loaded (its data is on the hub and not in the cache).
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise FlexmoeError("tasks need lm-evaluation-harness: pip install 'flexmoe[eval]'")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # the harness has thousands of files to look through: not where all that is asked for is here
    manager = TaskManager(include_defaults=not all(name.endswith(FILES) for name in names))
    return [task for name in names for task in _load(manager, name)]


def _load(manager: Any, name: str) -> list[Any]:
    try:
        found = manager.load([name])
    except KeyError:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.6)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise FlexmoeError(
            f"there is no task '{name}'.{hint} Give a file of a task (./my_task.yaml), or one of "
            "the names that `lm-eval ls tasks` lists"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FlexmoeError(
            f"task '{name}' cannot be loaded: {reason}. A task takes its data from the hub or its "
            "cache; data_files in a task file are relative to the folder you are in"
        ) from None
    for task in found["tasks"].values():
        if task.get_config("unsafe_code"):
            raise FlexmoeError(
                f"task '{task.task_name}' runs code that the model writes: run it with lm-eval on "
                "an export, in a sandbox"
            )
    below = {child for children in found["group_map"].values() for child in children}
    return [task for of in ("groups", "tasks") for n, task in found[of].items() if n not in below]


def check_kept(tasks: Sequence[Any]) -> None:
    """`FlexmoeError` for a task no share of which can be kept: less is better of all metrics."""
    for task in tasks:  # a group has no metrics before it has run
        better = task.higher_is_better() if hasattr(task, "higher_is_better") else {}
        if better and not any(better.values()):
            raise FlexmoeError(
                f"of task '{task.task_name}' less is better ({', '.join(better)}): there is no "
                "share of its score to keep. Leave it out, or use another --by"
            )


def run_tasks(
    members: Members,
    tasks: Sequence[Any],
    tokenizer: Any,
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[Key, dict[str, Any]]:
    """What the harness finds for each member: its results, with the values of every document of
    the first ``limit`` (None: all) of a task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    none = TaskManager(include_defaults=False)  # the tasks are loaded: nothing to look for
    found: dict[Key, dict[str, Any]] = {}
    for key in members:
        lm = HFLM(pretrained=members[key](), tokenizer=tokenizer, batch_size=batch_size)
        found[key] = simple_evaluate(
            lm, tasks=list(tasks), limit=limit, bootstrap_iters=RESAMPLES, task_manager=none
        )
        del lm  # it holds the model, which has to go before the next one comes
    return found


def task_rows(
    found: Mapping[Key, Mapping[str, Any]], base: Key | None = 0.0
) -> dict[Key, dict[str, dict[str, Any]]]:
    """What `run_tasks` come to, by member and name of a task; of a group that has a value of its
    own by that name, without its parts.

    ``metric``, the first one that the task lists, its ``value`` with a 95 % ``interval`` and the
    number ``n`` of documents; ``metrics``, all of them. Where ``base`` is among the members and a
    larger value is a better one, ``ratio`` to the base's value with a paired interval over
    documents. Where the metric is a mean over documents, its interval is that of a share if they
    are right or wrong, else resampled; for other metrics it is from the harness' standard error;
    None where there is none.
    """
    keys = list(found)
    rows: dict[Key, dict[str, dict[str, Any]]] = {key: {} for key in keys}
    first = found[keys[0]]
    metrics = {
        name: next((m for m in of if _is_metric(m)), None) for name, of in first["results"].items()
    }
    groups = {name: of for name, of in first["group_subtasks"].items() if metrics.get(name)}
    below = {child for children in groups.values() for child in children}
    for name, metric in metrics.items():
        if metric is None or name in below:
            continue
        values = [float(found[key]["results"][name][metric]) for key in keys]
        items_NB = _items([found[key] for key in keys], name, metric, values)
        drawn_RB = None if items_NB is None else resampled_means([items_NB])
        whole = keys.index(base) if base is not None and base in found else None
        better = first["higher_is_better"].get(name, {}).get(metric.split(",")[0])
        for b, key in enumerate(keys):
            results = found[key]["results"][name]
            row: dict[str, Any] = {
                "metric": metric.removesuffix(",none"),
                "value": values[b],
                "interval": _interval(items_NB, drawn_RB, b, results, metric),
                "n": _documents(found[key], name),
                "metrics": {
                    m.removesuffix(",none"): float(v) for m, v in results.items() if _is_metric(m)
                },
                "ratio": None,
                "ratio_interval": None,
            }
            if whole is not None and better and values[whole] > 0:
                row["ratio"] = values[b] / values[whole]
                # where no document tells them apart, resampling would be certain of it
                if drawn_RB is not None and (
                    b == whole or (drawn_RB[:, b] != drawn_RB[:, whole]).any()
                ):
                    with np.errstate(divide="ignore", invalid="ignore"):
                        row["ratio_interval"] = interval(drawn_RB[:, b] / drawn_RB[:, whole])
            rows[key][name] = row
    return rows


def _is_metric(name: str) -> bool:
    return "," in name and "_stderr," not in name


def _documents(results: Mapping[str, Any], name: str) -> int:
    if name in results["n-samples"]:
        return results["n-samples"][name]["effective"]
    return sum(_documents(results, child) for child in results["group_subtasks"][name])


def _items(
    found: Sequence[Mapping[str, Any]], name: str, metric: str, values: Sequence[float]
) -> Array | None:
    """Values [N, B] of the documents; None where the metric is no mean of them."""
    kind, which = metric.split(",", 1)
    columns = []
    for results, value in zip(found, values, strict=True):
        samples = [s for s in results["samples"].get(name, ()) if s["filter"] == which]
        items = [s[kind] for s in samples if isinstance(s.get(kind), bool | int | float)]
        if not items or not math.isclose(sum(items) / len(items), value, **SAME_MEAN):
            return None
        columns.append(np.array(items, dtype=np.float64))
    return np.stack(columns, 1)


def _interval(
    items_NB: Array | None, drawn_RB: Array | None, b: int, results: Mapping[str, Any], metric: str
) -> Interval | None:
    if items_NB is not None and np.isin(items_NB, (0, 1)).all():
        return share_interval(int(items_NB[:, b].sum()), len(items_NB))
    if drawn_RB is not None:
        return interval(drawn_RB[:, b])
    kind, which = metric.split(",", 1)
    error = results.get(f"{kind}_stderr,{which}")
    if not isinstance(error, float):
        return None
    return results[metric] - Z * error, results[metric] + Z * error
