"""The script that an export for slime carries: slime's own converter, with a value head in place of its vocabulary's.

slime loads critics from Megatron checkpoints (`torch_dist`) and draws a new head where `output_layer.weight` or
`output_layer.bias` is missing or has another shape. Its converter builds an actor and reads `lm_head.weight`; read in
slime 624b824, `tools/convert_hf_to_torch_dist.py` and `slime/backends/megatron_utils/hf_to_megatron`. It was not run:
it needs Megatron and a GPU.
"""

SCRIPT_NAME = "to_torch_dist.py"

SCRIPT = '''"""Make a Megatron checkpoint of the critic in this directory, with slime's own code, for slime.

Run it where slime runs, with the arguments of slime's tools/convert_hf_to_torch_dist.py:

    PYTHONPATH=$SLIME:$SLIME/tools python to_torch_dist.py ${MODEL_ARGS[@]} \\\\
        --untie-embeddings-and-output-weights --hf-checkpoint THIS_DIRECTORY --save OUT
"""

from functools import partial

import torch
from transformers import AutoConfig


def load_critic_weights(args, model, path):
    """Copy the trunk as slime does, and score.weight and score.bias into output_layer."""
    from slime.backends.megatron_utils.hf_to_megatron import _LOADERS
    from slime.backends.megatron_utils.hf_to_megatron import common
    from slime.backends.megatron_utils.update_weight.common import named_params_and_buffers

    config = AutoConfig.from_pretrained(path)
    trunk_tensor, reader = _LOADERS[config.model_type], common.SafetensorReader(path)
    with torch.no_grad():
        for name, parameter in named_params_and_buffers(args, model):
            part = common.strip_mcore_wrappers(name)
            if part in ("output_layer.weight", "output_layer.bias"):
                tensor = reader.get_tensor("score." + part.removeprefix("output_layer."))
            else:
                tensor = common._pad_vocab(args, name, trunk_tensor(name, reader, config))
                tensor = common.shard_mcore_tensor(name, tensor, parameter)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} is stored, {tuple(parameter.shape)} is needed")
            parameter.copy_(tensor.to(device=parameter.device, dtype=parameter.dtype))


if __name__ == "__main__":
    import convert_hf_to_torch_dist as converter

    converter.get_model_provider_func = partial(converter.get_model_provider_func, role="critic")
    converter.load_hf_weights = load_critic_weights
    converter.main()
'''
