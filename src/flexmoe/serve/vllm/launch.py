"""``flexmoe serve --engine vllm``: vLLM's own server, with flexmoe's plug-ins named."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence

from flexmoe.checkpoint import resolve
from flexmoe.errors import FlexmoeError
from flexmoe.family import find_folder
from flexmoe.plan import JSON_NAME, read_manifest
from flexmoe.serve.engine import ServeSettings
from flexmoe.serve.vllm import compat
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


def launch(settings: ServeSettings, more: Sequence[str] = ()) -> None:
    """Become vLLM's server; ``more`` are options of vLLM's own. Does not return: signals and the
    exit code are vLLM's. Raises `FlexmoeError` for a vLLM that is missing or not one we know."""
    compat.check_version()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    os.execve(sys.executable, command + arguments(settings, more), environment(settings))


def arguments(settings: ServeSettings, more: Sequence[str] = ()) -> list[str]:
    """vLLM's command line for these settings."""
    for option in more:
        if option.partition("=")[0] in OURS:
            raise FlexmoeError(f"{option} is set by flexmoe serve: use its own options")
    if settings.device != "auto":
        raise FlexmoeError("vLLM chooses its device itself: leave --device out")
    folder = find_folder(settings.model)
    model, overrides = settings.model, {}
    if (folder / JSON_NAME).is_file():
        asked: dict[str, object] = {"quant_method": "flexmoe"}
        asked["shares"] = [member.pruned for member in settings.members]
        manifest = read_manifest(folder)
        if not manifest.ranked:
            base = settings.base or manifest.recipe.base_model
            model, asked["plan"] = str(resolve(base)), str(folder)
        overrides = {"quantization_config": asked}
    found = ["--model", model, "--served-model-name", settings.name]
    found += ["--host", settings.host, "--port", str(settings.port), "--dtype", settings.dtype]
    if overrides:
        found += ["--hf-overrides", json.dumps(overrides)]
    return [*found, *more]


def environment(settings: ServeSettings, outer: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment vLLM runs in. The settings go here and not on the command line, which every
    user of the machine can read: they may hold a key."""
    # an allow-list: where it is set, it names plug-ins beside ours
    plugins = [name for name in outer.get("VLLM_PLUGINS", "").split(",") if name]
    plugins += ["flexmoe", FlexmoeEndpoint.name]
    return {
        **outer,
        SETTINGS: settings.to_json(),
        "VLLM_PLUGINS": ",".join(dict.fromkeys(plugins)),
        # budgets per request hook into the first runner; the second was not tried
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
