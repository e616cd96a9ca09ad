"""Towers that are frozen, but for their last groups of layers: what open_clip calls locked.

Source: Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image text Tuning", arXiv:2111.07991.
"""

from typing import Any

from torch import nn

from fastclip.models.options import SystemOptions


def lock_towers(model: nn.Module, options: SystemOptions) -> None:
    """Freeze what --lock-image and --lock-text name, of an open_clip model or one like it.

    Of fewer groups than are to stay unlocked, all do.
    """
    if options.lock_image:
        lock_image(model, options)
    if options.lock_text:
        lock_text(model, options)


def lock_image(model: nn.Module, options: SystemOptions) -> None:
    """Freeze the image tower but for its last groups of layers.

    In open_clip's groups: a transformer's stem, each of its blocks, its projection; of timm's
    towers those that timm makes; of a ModifiedResNet, which open_clip locks whole, its stem, each
    of its stages, and its attention pool.
    """
    from open_clip.modified_resnet import ModifiedResNet

    visual: Any = model.visual
    unlocked = options.lock_image_unlocked_groups
    if isinstance(visual, ModifiedResNet):
        visual.lock()
        names = "layer1", "layer2", "layer3", "layer4", "attnpool"
        # the stem has no module of its own
        stem = [child for name, child in visual.named_children() if name not in names]
        groups = [nn.ModuleList(stem), *map(visual.get_submodule, names)]
        for group in groups[max(0, len(groups) - unlocked) :]:
            group.requires_grad_(True)
    else:
        # open_clip's own freezing of statistics takes timm's normalizations for plain ones, and
        # drops the activations that they hold
        model.lock_image_tower(unlocked_groups=unlocked)  # type: ignore[operator]
    if options.lock_image_freeze_bn_stats:
        _freeze_statistics(visual)


def lock_text(model: nn.Module, options: SystemOptions) -> None:
    """Freeze the text tower but for its last groups of layers.

    In open_clip's groups: embeddings, each block, the projection; of Hugging Face's models
    embeddings and each layer, with layer norms that are frozen on request.

    Raises:
        ValueError: open_clip does not know the layers of this Hugging Face model.
    """
    from open_clip.hf_model import HFTextEncoder

    # of its own towers open_clip freezes the layer norms in any case, and insists on being asked to
    asked = options.lock_text_freeze_layer_norm
    freeze = asked or not isinstance(getattr(model, "text", None), HFTextEncoder)
    try:
        model.lock_text_tower(options.lock_text_unlocked_layers, freeze)  # type: ignore[operator]
    except KeyError as error:
        raise ValueError(
            f"--lock-text-unlocked-layers: open_clip does not know the layers of this text tower "
            f"({error}); leave the flag out, or name the language model by --text-lm"
        ) from error


def _freeze_statistics(tower: nn.Module) -> None:
    """Replace locked batch normalization by the affine map that its running statistics make it."""
    from timm.layers import freeze_batch_norm_2d

    for parent in list(tower.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and not child.weight.requires_grad:
                setattr(parent, name, freeze_batch_norm_2d(child))
