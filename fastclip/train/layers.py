"""The flags --attention and --layer-norm: other kernels under the towers' own weights."""

from torch import nn

from fastclip.integrations import apex
from fastclip.integrations.attention import replace_attention
from fastclip.integrations.patch import PatchHandle
from fastclip.train.options import ModelOptions


def replace_layers(model: nn.Module, options: ModelOptions) -> None:
    """Give the towers what the flags name, for the rest of the run.

    Raises:
        ValueError: apex is asked for and not there, or nothing in the model could be replaced.
    """
    handle = PatchHandle()
    if options.attention != "tower" and not replace_attention(model, handle, options.attention):
        raise ValueError(
            f"--attention {options.attention}: {options.model} has no attention that could be "
            "replaced; leave the flag out"
        )
    if options.layer_norm == "apex":
        apex.replace_layer_norms(model, handle)
