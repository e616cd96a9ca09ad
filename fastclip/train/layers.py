"""The flags --attention and --layer-norm: other kernels under the towers' own weights."""

from torch import nn

from fastclip.integrations import apex
from fastclip.integrations.attention import exchange_attention
from fastclip.integrations.patch import PatchHandle
from fastclip.train.options import ModelOptions


def exchange_layers(model: nn.Module, options: ModelOptions) -> None:
    """Give the towers what the flags name, for the rest of the run.

    Raises:
        ValueError: apex is asked for and not there, or nothing in the model could be exchanged.
    """
    handle = PatchHandle()
    if options.attention != "tower" and not exchange_attention(model, handle, options.attention):
        raise ValueError(
            f"--attention {options.attention}: {options.model} has no attention that could be "
            "exchanged; leave the flag out"
        )
    if options.layer_norm == "apex":
        apex.exchange_layer_norms(model, handle)
