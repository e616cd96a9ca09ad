"""Both towers as ONNX files, for runtimes without PyTorch."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastclip._version import __version__
from fastclip.atomic import new_folder
from fastclip.models.build import load
from fastclip.models.clip import Model
from fastclip.models.compare import TEXTS, require_same, sample_images
from fastclip.models.lm_tokenizer import PADDING, LanguageModelTokenizer
from fastclip.models.system import System

# of normalized features: onnxruntime orders and fuses operations in its own way
TOLERANCE = 1e-4
# bytes of weights that go into the file itself, which ONNX limits to 2 GiB
_INSIDE = 1 << 30
# rows that are traced; the check has others
_TRACED = 2


def export_onnx(
    source: Path,
    target: Path,
    *,
    check: bool = True,
    average: bool = False,
    trust_checkpoint: bool = False,
) -> list[str]:
    """Write a model's encoders into a folder: image.onnx and text.onnx.

    `image` (N, 3, H, W) float32, as the run's transform gives it, becomes `image_features` (N, D),
    and `text` (N, L) int64, as its tokenizer gives it, `text_features` (N, D); both are normalized,
    for any N. A system's heads are part of its encoders. The metadata of both files has
    logit_scale, with which the cosine is multiplied, logit_bias where there is one, and how inputs
    are prepared. The tokenizer goes beside them where it is one of Hugging Face's.

    Args:
        source: a run directory (its latest checkpoint is used), RUN@best, a checkpoint of a run, or
            a folder that `export_hub` made.
        target: the folder to make.
        check: compare with onnxruntime's features, which may differ by 1e-4.
        average: take the averaged weights of a run with --ema.
        trust_checkpoint: whether DeepSpeed's files may be read, which can run any code.

    Returns:
        The names of the encoders, "image" and "text"; "image" alone of a model without texts.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint. FileExistsError: the target exists.
        ModuleNotFoundError: what exports or checks is not installed; the message says how to.
        ValueError: the model cannot be exported, or onnxruntime gives other features.
    """
    _require_packages(check)
    with new_folder(target) as folder:
        model = load(source, average=average, trust_checkpoint=trust_checkpoint)
        inputs = {"image": sample_images(model, len(TEXTS))}
        if not (isinstance(model.model, System) and model.model.text_views == 0):
            inputs["text"] = model.tokenizer(TEXTS)
        facts = _facts(model)
        for name, given in inputs.items():
            encoder = _Encoder(model.model, name)
            _export(encoder, name, given, folder / f"{name}.onnx", facts, source)
            if check:
                _check(encoder, name, given, folder / f"{name}.onnx", source)
        save = getattr(model.tokenizer, "save_pretrained", None)
        if save and "text" in inputs:
            save(str(folder))
    return list(inputs)


class _Encoder(nn.Module):
    """One of a model's two encoders, whose output is normalized."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, inputs: Tensor) -> Tensor:
        encode = getattr(self.model, f"encode_{self.name}")
        features: Tensor = encode(inputs, normalize=True)
        return features


def _require_packages(check: bool) -> None:
    try:
        for name in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
            import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"exporting to ONNX needs {error.name}: pip install 'fastclip-kernels[onnx]'",
            name=error.name,
        ) from error


def _facts(model: Model) -> dict[str, str]:
    """The metadata of the files."""
    module: Any = model.model
    facts: dict[str, Any] = {"preprocess": model.preprocess_config, "fastclip": __version__}
    if not isinstance(module, System):
        facts["logit_scale"] = module.logit_scale.exp().item()
        if module.logit_bias is not None:
            facts["logit_bias"] = module.logit_bias.item()
    else:
        facts["logit_scale"] = module.logit_scale(module.get_parameter)
        facts["logit_bias"] = module.image_text_bias(module.get_parameter)
    if isinstance(model.tokenizer, LanguageModelTokenizer):
        facts["padding"] = PADDING
    known = {name: value for name, value in facts.items() if value is not None}
    return {name: v if isinstance(v, str) else json.dumps(v) for name, v in known.items()}


def _export(
    encoder: nn.Module, name: str, given: Tensor, file: Path, facts: dict[str, str], source: Path
) -> None:
    with _quietly(), torch.no_grad():
        try:
            program = torch.onnx.export(
                encoder,
                (given[:_TRACED],),
                input_names=[name],
                output_names=[f"{name}_features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            # a page with every attempt
            why = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"the {name} tower of {source} cannot be exported to ONNX: {why}"
            ) from error
        assert program is not None
        # where a tower reads the batch's size as a number, the exporter takes it for the only one
        shape = program.model.graph.inputs[0].shape
        if shape is None or isinstance(shape[0], int):
            raise ValueError(
                f"the {name} tower of {source} cannot be exported to ONNX for batches of any size; "
                "please report it with its --model"
            )
        program.model.metadata_props.update(facts)
        size = sum(value.nbytes for value in encoder.state_dict().values())
        program.save(file, external_data=size > _INSIDE)


def _check(encoder: nn.Module, name: str, given: Tensor, file: Path, source: Path) -> None:
    """Compare onnxruntime's features with the model's.

    Raises:
        ValueError: they differ.
    """
    import onnxruntime

    with torch.inference_mode():
        wanted = encoder(given)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run([f"{name}_features"], {name: given.numpy()})
    require_same(torch.from_numpy(found), wanted, TOLERANCE, f"the ONNX {name} tower of {source}")


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter speaks of its own development."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
