"""A network whose weights FSDP has spread over processes, in one piece again."""

from __future__ import annotations

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from edge_memllm.modeling.network import MemoryLLMForCausalLM


def whole_network(network: MemoryLLMForCausalLM) -> MemoryLLMForCausalLM:
    """The network itself, or where its weights are spread a whole copy on the CPU.

    Every process has to call it; only that of the main one is then of use.
    """
    if not any(isinstance(weight, DTensor) for weight in network.parameters()):
        return network
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(network, options=options)
    whole = MemoryLLMForCausalLM(network.config)
    whole.generation_config = network.generation_config
    if weights:  # there are none in the other processes
        whole.load_state_dict(weights)
    return whole
