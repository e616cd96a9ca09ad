"""What a model's description may say: the only gate between such files and calls made of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SCALARS = (str, int, float, bool, type(None))
# of keyword arguments that open_clip passes on as they are
_PASSED_ON = {
    "tokenizer_kwargs": {"clean", "strip_sep_token"},
    "act_kwargs": {"approximate"},
    "norm_kwargs": {"eps"},
}


def check(model_config: Any, origin: str) -> dict[str, Any]:
    """The configuration of a model, for open_clip to build it from.

    A description comes with the weights, from anywhere. Only numbers and names that shape the
    model pass; nothing that makes a library run code of the folder does.

    Args:
        model_config: what "model_cfg" holds, or a model's config file.
        origin: the file, for the message.

    Raises:
        ValueError: it has another form, or a key that is not known to be harmless.
    """
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    if not isinstance(model_config, dict):
        raise ValueError(f"{origin} describes no model: it must hold an object")
    parts = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
    for name in ("embed_dim", "vision_cfg", "text_cfg"):
        if name not in model_config:
            raise ValueError(f"{origin} describes no model: it has no {name}")
    plain = {"embed_dim", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"}
    plain |= {"nonscalar_logit_scale"}
    _check_keys(model_config, plain | parts.keys(), origin, "")
    for name, kind in parts.items():
        part = model_config.get(name, {})
        if not isinstance(part, dict):
            raise ValueError(f"{origin}: {name} must be an object")
        _check_keys(part, set(kind.__dataclass_fields__), origin, f"{name}.")
        for key, value in part.items():
            if isinstance(value, dict) and key in _PASSED_ON:
                _check_keys(value, _PASSED_ON[key], origin, f"{name}.{key}.")
                value = list(value.values())
            _check_plain(value, origin, f"{name}.{key}")
    for key in model_config.keys() & plain:
        _check_plain(model_config[key], origin, key)
    return model_config


def _check_keys(values: dict[str, Any], allowed: set[str], origin: str, where: str) -> None:
    for key in values:
        if key not in allowed:
            raise ValueError(
                f"{origin} has {where}{key}, which is not allowed in a model's description; "
                f"take it out (allowed: {', '.join(sorted(allowed))})"
            )


def _check_plain(value: Any, origin: str, where: str) -> None:
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, _SCALARS) for item in items):
        raise ValueError(f"{origin}: {where} must be a number, a text or a list of them")


@contextmanager
def without_remote_code() -> Iterator[None]:
    """Have transformers refuse code that comes with a model, where open_clip lets it ask.

    A tokenizer or a text tower by name would otherwise ask at the terminal, amid a run.
    """
    try:
        from transformers import dynamic_module_utils
    except ModuleNotFoundError:
        yield
        return
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    # seconds that it waits for an answer; with none it does not ask
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def harmless(config: Any) -> Any:
    """A language model's configuration without what names code: classes, kernels, quantizers."""
    if isinstance(config, dict):
        return {key: harmless(value) for key, value in config.items() if not _names_code(key)}
    return [harmless(item) for item in config] if isinstance(config, list) else config


def require_harmless(config: Any, origin: str) -> None:
    """Refuse a language model's configuration that names code, as `harmless` leaves it out.

    Raises:
        ValueError: it does.
    """
    parts = config if isinstance(config, dict) else dict(enumerate(config))
    for key, value in parts.items():
        if isinstance(key, str) and _names_code(key):
            raise ValueError(
                f"{origin} has {key}, which may name code and is not allowed; take it out"
            )
        if isinstance(value, dict | list):
            require_harmless(value, origin)


def _names_code(key: str) -> bool:
    named = ("auto_map", "quantization_config", "trust_remote_code", "custom_pipelines")
    # attn_implementation and its kin may name kernels of a hub
    return key in named or "_implementation" in key
