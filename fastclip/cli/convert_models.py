"""`fastclip convert`: models out of fastclip's runs, and into them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.messages import logger

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Target = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


@dataclass(frozen=True)
class ToHub:
    """Export a run's model as a folder that open_clip loads as it is, ready for publishing.

    It holds open_clip_config.json, open_clip_model.safetensors, a model card and, where it is one
    of Hugging Face's, the tokenizer. What open_clip builds from it is compared with the run's model
    before the folder appears. For example:

    fastclip convert to-hub logs/first@best first-clip --license apache-2.0
    """

    source: Run
    """A run directory, whose latest checkpoint is used, RUN@best, or a checkpoint."""
    target: Folder
    """Folder to make."""
    license: str = "unknown"
    """License of the weights, for the card, e.g. apache-2.0 or cc-by-nc-4.0."""
    data_license: str = "unknown"
    """License of the training data, for the card."""
    repository: str | None = None
    """ORG/NAME where you will publish it, for the card's example. open_clip looks there for the
    architecture of a --text-lm that was given as a folder; without this flag, in DIR."""
    average: bool = False
    """Take the averaged weights of a run with --ema."""
    trust_checkpoint: bool = False
    """Read a DeepSpeed checkpoint: pickles, which can run arbitrary code when they are loaded."""

    def run(self) -> None:
        """Export, and say how it is loaded."""
        from fastclip.models.hub import export_hub
        from fastclip.train.card import model_card

        card = model_card(
            self.source,
            self.target,
            license=self.license,
            data_license=self.data_license,
            repository=self.repository,
            average=self.average,
        )
        export_hub(
            self.source,
            self.target,
            card=card,
            repository=self.repository,
            average=self.average,
            trust_checkpoint=self.trust_checkpoint,
        )
        logger.info(
            f'open_clip.create_model_and_transforms("local-dir:{self.target}") loads it; read '
            f"{self.target / 'README.md'} before you publish it, it names your data"
        )


@dataclass(frozen=True)
class ToOnnx:
    """Export a run's encoders as image.onnx and text.onnx, for batches of any size.

    Features are normalized; the metadata of the files has the logit scale and bias, and how images
    are prepared. Needs the extra onnx. For example:

    fastclip convert to-onnx logs/first@best first-onnx
    """

    source: Run
    """A run directory, whose latest checkpoint is used, RUN@best, a checkpoint, or a folder made by
    to-hub."""
    target: Folder
    """Folder to make."""
    check: bool = True
    """Compare the features with onnxruntime's before the folder appears."""
    average: bool = False
    """Take the averaged weights of a run with --ema."""
    trust_checkpoint: bool = False
    """Read a DeepSpeed checkpoint: pickles, which can run arbitrary code when they are loaded."""

    def run(self) -> None:
        """Export, and say which encoders there are."""
        from fastclip.models.export_onnx import TOLERANCE, export_onnx

        names = export_onnx(
            self.source,
            self.target,
            check=self.check,
            average=self.average,
            trust_checkpoint=self.trust_checkpoint,
        )
        if "text" not in names:
            logger.info("the model was trained without texts: there is no text.onnx")
        checked = f", equal to onnxruntime's within {TOLERANCE:.0e}" if self.check else ""
        logger.info(f"features of {' and '.join(names)}{checked}")


@dataclass(frozen=True)
class ToOpenClip:
    """Export a run's weights for open_clip, OUT.safetensors or OUT.pt, and OUT.json beside them.

    open_clip has to be given the architecture, OUT.json, which it does not know by name; what it
    then needs is printed. `fastclip convert to-hub` makes a folder that it loads as it is.
    """

    source: Source
    """A run directory, whose latest checkpoint is used, RUN@best, or a checkpoint."""
    target: Target
    """The file of weights: safetensors if it ends in .safetensors, else torch's format."""
    average: bool = False
    """Take the averaged weights of a run with --ema."""
    trust_checkpoint: bool = False
    """Read a DeepSpeed checkpoint: pickles, which can run arbitrary code when they are loaded."""

    def run(self) -> None:
        """Export, and say what open_clip needs to load it."""
        from fastclip.models.convert import export_open_clip

        described = export_open_clip(
            self.source, self.target, average=self.average, trust_checkpoint=self.trust_checkpoint
        )
        name = self.target.stem
        add = f'open_clip.add_model_config("{described}")\n' if described else ""
        logger.info(
            f"to load it:\n{add}open_clip.create_model_and_transforms("
            f'"{name if described else "ARCHITECTURE"}", pretrained="{self.target}")'
        )


@dataclass(frozen=True)
class FromOpenClip:
    """Import an open_clip checkpoint as a run directory, e.g. for `fastclip eval`."""

    source: Source
    """The checkpoint."""
    target: Target
    """Run directory to write."""
    model: str | None = None
    """Architecture of the checkpoint (required)."""

    def run(self) -> None:
        """Convert."""
        from fastclip.models.convert import import_open_clip

        if self.model is None:
            raise ValueError("from-open-clip needs --model, the checkpoint's architecture")
        import_open_clip(self.source, self.model, self.target)


@dataclass(frozen=True)
class ToUniversal:
    """Convert a DeepSpeed checkpoint to its universal format, for any number of processes."""

    source: Source
    """A run directory, whose latest checkpoint is used, or a checkpoint."""
    target: Target
    """Folder for the universal checkpoint."""
    trust_checkpoint: bool = False
    """Read the checkpoint: pickles, which can run arbitrary code when they are loaded."""

    def run(self) -> None:
        """Convert."""
        from fastclip.models.convert import export_universal

        export_universal(self.source, self.target, trust_checkpoint=self.trust_checkpoint)
