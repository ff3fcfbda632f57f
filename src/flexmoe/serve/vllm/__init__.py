"""vLLM plug-in: ragged experts, a budget for every request, switching without a reload.

vLLM finds `register` through the entry point ``vllm.general_plugins`` and calls it in the API
server, the engine and every worker.
"""


def register() -> None:
    """Make the quantization method ``flexmoe`` known to vLLM. May be called again."""
    from vllm.model_executor.layers import quantization

    from flexmoe.serve.vllm import compat

    if "flexmoe" in quantization.QUANTIZATION_METHODS:
        return
    compat.check_version()
    from flexmoe.serve.vllm.config import FlexmoeConfig
    from flexmoe.serve.vllm.requests import pin

    quantization.register_quantization_config("flexmoe")(FlexmoeConfig)
    compat.ask_for_amx()
    compat.patch_runner()
    compat.patch_requests(pin)
