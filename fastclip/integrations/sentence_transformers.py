"""`patch_sentence_transformers()`: its ranking losses without the matrix of all similarities."""

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.functional.ranking import RankingOptions, mean_of_own_rows
from fastclip.integrations.patch import MARK, PatchHandle

OLDEST = "5.3"
"""The first version with `directions` and `hardness_mode`."""


def patch_sentence_transformers() -> PatchHandle:
    """Make sentence-transformers compute its multiple-negatives ranking losses with fastclip.

    The losses follow wherever they were imported to, instances that exist already and the
    symmetric ones among them: MultipleNegativesRankingLoss in `compute_loss_from_embeddings`,
    CachedMultipleNegativesRankingLoss in `calculate_loss`, which becomes one walk over all
    similarities instead of one for each mini-batch. Every direction, partition, hardness and
    `gather_across_devices` has the values and gradients there. A `similarity_fct` other than
    `cos_sim` and `dot_score` keeps their code, with a warning.

    Returns:
        A handle with `undo()` that is also a context manager. Patching twice is harmless: the
        second handle restores nothing.

    Raises:
        ModuleNotFoundError: sentence-transformers is not installed.
        ImportError: it is older than 5.3, whose losses have neither directions nor hardness.

    Examples:
        >>> import fastclip, torch
        >>> from sentence_transformers.sentence_transformer import losses
        >>> loss = losses.MultipleNegativesRankingLoss(torch.nn.Identity())
        >>> with fastclip.patch_sentence_transformers():
        ...     found = loss.compute_loss_from_embeddings([torch.eye(3), torch.eye(3)], None)
        >>> found < 1e-6
        tensor(True)
    """
    handle = PatchHandle()
    for name, (method, exchange) in _METHODS.items():
        kind = _library_class(name)
        original = getattr(kind, method)
        if not hasattr(original, MARK):
            setattr(kind, method, exchange(original))
            handle.on_undo(functools.partial(setattr, kind, method, original))
    return handle


def __getattr__(name: str) -> Any:
    """The losses themselves, as subclasses of the library's, made when they are first asked for."""
    if name not in _METHODS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    method, exchange = _METHODS[name]
    kind = _library_class(name)
    original = getattr(kind, method)
    ours = exchange(getattr(original, MARK, original))
    made = type(name, (kind,), {method: ours, "__module__": __name__, "__doc__": kind.__doc__})
    globals()[name] = made
    return made


def _library_class(name: str) -> Any:
    import sentence_transformers

    # where they are from 5.4 on, and where they were before
    places = "sentence_transformers.sentence_transformer", "sentence_transformers"
    place = next(one for one in places if importlib.util.find_spec(one) is not None)
    losses = importlib.import_module(f"{place}.losses")
    kind = getattr(losses, name)
    if "hardness_mode" not in inspect.signature(kind.__init__).parameters:
        raise ImportError(
            f"sentence-transformers is {sentence_transformers.__version__}, whose losses have no "
            f"hardness_mode; install {OLDEST} or newer: pip install "
            f"'sentence-transformers>={OLDEST}'"
        )
    return kind


def _loss(theirs: Any, embeddings: list[Tensor]) -> Tensor | None:
    """Of embeddings, a block a column of the data; None where it is left to the library."""
    from sentence_transformers.util import cos_sim, dot_score

    if theirs.similarity_fct not in (cos_sim, dot_score):
        warnings.warn(
            f"sentence-transformers' own loss is kept: similarity_fct is "
            f"{theirs.similarity_fct!r}, fastclip computes cos_sim and dot_score",
            stacklevel=3,
        )
        return None
    if len(embeddings) < 2:
        # its own error says so
        return None
    if theirs.similarity_fct is cos_sim:
        embeddings = [F.normalize(block, dim=-1) for block in embeddings]
    # their strength is of no meaning without a mode
    strength = 0.0 if theirs.hardness_mode is None else theirs.hardness_strength
    choice = RankingOptions.checked(
        theirs.directions, theirs.partition_mode, theirs.hardness_mode, strength
    )
    is_shared = theirs.gather_across_devices and torch.distributed.is_initialized()
    return mean_of_own_rows(
        embeddings[0], embeddings[1:], theirs.scale, choice, "gather" if is_shared else None
    )


def _of_embeddings(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def compute_loss_from_embeddings(
        self: Any, embeddings: list[Tensor], *arguments: Any, **options: Any
    ) -> Tensor:
        loss = _loss(self, embeddings)
        return original(self, embeddings, *arguments, **options) if loss is None else loss

    setattr(compute_loss_from_embeddings, MARK, original)
    return compute_loss_from_embeddings


def _of_mini_batches(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # labels came between the representations and with_backward in 6.0
    signature = inspect.signature(original)

    @functools.wraps(original)
    def calculate_loss(self: Any, *arguments: Any, **options: Any) -> Tensor:
        call = signature.bind(self, *arguments, **options)
        call.apply_defaults()
        loss = _loss(self, [torch.cat(list(column)) for column in call.arguments["reps"]])
        if loss is None:
            return original(self, *arguments, **options)
        if call.arguments["with_backward"]:
            loss.backward()
            loss = loss.detach()
        return loss

    setattr(calculate_loss, MARK, original)
    return calculate_loss


_METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "MultipleNegativesRankingLoss": ("compute_loss_from_embeddings", _of_embeddings),
    "CachedMultipleNegativesRankingLoss": ("calculate_loss", _of_mini_batches),
}
