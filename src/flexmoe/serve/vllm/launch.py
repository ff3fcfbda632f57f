"""``flexmoe serve --engine vllm``: vLLM's own server, with flexmoe's plug-ins named."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence

from flexmoe.errors import FlexmoeError
from flexmoe.family import find_folder, find_weights
from flexmoe.plan import JSON_NAME, read_manifest
from flexmoe.serve.engine import ServeSettings
from flexmoe.serve.vllm.endpoint import SETTINGS, FlexmoeEndpoint

# what `flexmoe serve` sets, and vLLM's option for it
OURS = (
    "--model",
    "--served-model-name",
    "--host",
    "--port",
    "--api-key",
    "--quantization",
    "--dtype",
    "--hf-overrides",
)


def launch(settings: ServeSettings, options: Sequence[str]) -> None:
    """Become vLLM's server, with the `arguments`. Does not return: signals and the exit code are
    vLLM's."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    os.execve(sys.executable, command, environment(settings))


def arguments(settings: ServeSettings, more: Sequence[str] = ()) -> list[str]:
    """vLLM's command line for these settings; ``more`` are options of vLLM's own. Raises
    `FlexmoeError` for what cannot be."""
    check_options(more)
    if settings.device != "auto":
        raise FlexmoeError("vLLM chooses its device itself: leave --device out")
    folder = find_folder(settings.model)
    model, overrides = settings.model, {}
    asked: dict[str, object] = {}
    if settings.patterns is not None:
        asked |= {"patterns": settings.patterns, "keep": settings.keep}
    if (folder / JSON_NAME).is_file():
        asked["shares"] = [member.pruned for member in settings.members]
        if not read_manifest(folder).ranked:
            model, asked["plan"] = str(find_weights(folder, settings.base)), str(folder)
    if asked:
        overrides = {"quantization_config": {"quant_method": "flexmoe", **asked}}
    found = ["--model", model, "--served-model-name", settings.name]
    found += ["--host", settings.host, "--port", str(settings.port), "--dtype", settings.dtype]
    if overrides:
        found += ["--hf-overrides", json.dumps(overrides)]
    return [*found, *more]


def check_options(more: Sequence[str]) -> None:
    """`FlexmoeError` for options of vLLM's that are ours to set, or that its workers would refuse
    later and less plainly."""
    # as vLLM does: --a_b is --a-b
    names = [option.partition("=") for option in more]
    spelled = [a.replace("_", "-") + b + c if a[:1] == "-" else a + b + c for a, b, c in names]
    for option in spelled:
        if option.partition("=")[0] in OURS:
            raise FlexmoeError(f"{option} is set by flexmoe serve: use its own options")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--data-parallel-size", "-dp", default="1")
    parser.add_argument("--enable-dbo", action="store_true")
    parser.add_argument("--api-server-count", "-asc", default="1")
    try:
        asked, _ = parser.parse_known_args(spelled)
    except argparse.ArgumentError as error:
        raise FlexmoeError(f"an option of vLLM's: {error}") from None
    if asked.data_parallel_size != "1":
        raise FlexmoeError(
            "--data-parallel-size: vLLM's replicas of a MoE model share its experts, and tokens "
            "reach those of other replicas without their budget. Start a server for each replica"
        )
    if asked.api_server_count != "1":
        raise FlexmoeError("--api-server-count: there is one server, which has the dial")
    if asked.enable_dbo:
        raise FlexmoeError("--enable-dbo splits a batch into two without its budgets: leave it out")


def environment(settings: ServeSettings, outer: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment vLLM runs in. The settings go here and not on the command line, which every
    user of the machine can read: they may hold a key."""
    # an allow-list: where it is set, it names plug-ins beside ours
    plugins = [name for name in outer.get("VLLM_PLUGINS", "").split(",") if name]
    plugins += ["flexmoe", FlexmoeEndpoint.name]
    return {
        **outer,
        SETTINGS: settings.model_dump_json(),
        "VLLM_PLUGINS": ",".join(dict.fromkeys(plugins)),
        # budgets per request hook into the first runner; the second was not tried
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
