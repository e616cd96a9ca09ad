"""What all patches share: undoing them, and giving one module another forward."""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn

MARK = "_fastclip_original"
"""Attribute of a patched class or function: the original."""
MADE_BY = "_fastclip_made_by"
"""Attribute of a patched class: what its forward was made by, None where that is not known."""

# by the class that was patched, and what its forward was made by
_SUBCLASSES: dict[tuple[Any, Any], Any] = {}


class PatchHandle:
    """What a patch changed; `undo()`, or the end of a `with` block, restores it.

    Pickled or copied together with its model, as `(model, handle)`, it undoes the copy's patch; not
    where the patch changed classes of a library (the open_clip losses).

    Examples:
        >>> from fastclip.integrations.patch import PatchHandle
        >>> class Layer:
        ...     scale = 1
        >>> Layer.scale, handle = 2, PatchHandle()
        >>> handle.on_undo(lambda: setattr(Layer, "scale", 1))
        >>> with handle:
        ...     print(Layer.scale)
        2
        >>> Layer.scale
        1
    """

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []

    def on_undo(self, restore: Callable[[], None]) -> None:
        """Remember how to take one change back; the last is taken back first.

        Args:
            restore: called without arguments by `undo`.
        """
        self._restore.append(restore)

    def undo(self) -> None:
        """Restore the originals; a second call does nothing."""
        while self._restore:
            self._restore.pop()()

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def replace_forward(
    module: nn.Module,
    forward: Callable[..., Any],
    handle: PatchHandle,
    made_by: tuple[Callable[..., Any], tuple[Any, ...]] | None = None,
) -> bool:
    """Give one module `forward(module, ...)`; False where it was given the same one before.

    Its class becomes a subclass of the same name, so weights and `isinstance` see what they saw.
    Modules with equal `made_by` share one: torch.compile compiles anew for each class.

    Args:
        module: the module to change.
        forward: what it does from now on.
        handle: takes it back.
        made_by: (factory, arguments), of which `factory(*arguments)` gives `forward`: an unpickled
            module calls it. Without it the module cannot be pickled.

    Raises:
        ValueError: it was given another one before, or has a forward of its own.
    """
    original = type(module)
    if hasattr(original, MARK):
        if getattr(original, MADE_BY) != made_by:
            raise ValueError(
                f"{original.__name__} was patched before with other options; undo that patch first"
            )
        return False
    if "forward" in vars(module):
        raise ValueError(
            f"this {original.__name__} has a forward of its own, as accelerate gives one to what "
            "it prepares; patch the model before that"
        )
    module.__class__ = _subclass(original, forward, made_by)
    handle.on_undo(partial(_restore_class, module, original))
    return True


def _restore_class(module: nn.Module, original: type[nn.Module]) -> None:
    if MARK not in vars(type(module)):
        raise RuntimeError(
            f"{original.__name__} was given another class after it was patched, as by fully_shard "
            "or parametrizations; undo the patch before that, or keep it"
        )
    module.__class__ = original


def _subclass(original: type[nn.Module], forward: Callable[..., Any], made_by: Any) -> Any:
    try:
        known = _SUBCLASSES.get((original, made_by))
    except TypeError:
        # options that cannot be compared, of a whole model
        return _made_subclass(original, forward, made_by)
    if known is None:
        known = _made_subclass(original, forward, made_by)
        if made_by is not None:
            _SUBCLASSES[original, made_by] = known
    return known


def _made_subclass(original: type[nn.Module], forward: Callable[..., Any], made_by: Any) -> Any:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # pickle finds classes by name, and of this name it would find the original
        reduced: Any = original.__reduce_ex__(self, protocol)
        return (_new, (original, made_by or forward), *reduced[2:])

    attributes = {
        "forward": forward,
        "__reduce_ex__": reduce,
        MARK: original,
        MADE_BY: made_by,
        "__module__": original.__module__,
    }
    return type(original.__name__, (original,), attributes)


def _new(original: type[nn.Module], source: Any) -> nn.Module:
    """A module of the patched class, without its state."""
    if isinstance(source, tuple):
        make, arguments = source
        kind = _subclass(original, make(*arguments), source)
    else:
        kind = _subclass(original, source, None)
    new: nn.Module = kind.__new__(kind)
    return new


def forward_owner(module: nn.Module) -> type:
    """The class whose `forward` a module has, patched or not.

    Args:
        module: any.
    """
    kinds = getattr(type(module), MARK, type(module)).__mro__
    return next(kind for kind in kinds if "forward" in vars(kind))


def original_forward(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """What the module did before `replace_forward`."""
    # accelerate keeps a module's forward, also after the patch is undone
    kind = getattr(type(module), MARK, type(module))
    return kind.forward(module, *arguments, **options)
