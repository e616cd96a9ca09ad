"""What all patches share: undoing them, and giving one module another forward."""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn

MARK = "_fastclip_original"
"""Attribute of a patched class or function: the original."""


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
    """Give one module `forward(module, ...)`; False where it was given one before.

    Its class becomes a subclass of the same name, so weights, `isinstance` and torch.compile see
    what they saw; the original is `super(type(module), module).forward`.

    Args:
        module: the module to change.
        forward: what it does from now on.
        handle: takes it back.
        made_by: (factory, arguments), of which `factory(*arguments)` gives `forward`: an unpickled
            module calls it. Without it the module cannot be pickled.
    """
    original = type(module)
    if hasattr(original, MARK):
        return False
    module.__class__ = _subclass(original, forward, made_by)
    handle.on_undo(partial(setattr, module, "__class__", original))
    return True


def _subclass(original: type[nn.Module], forward: Callable[..., Any], made_by: Any) -> Any:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # pickle finds classes by name, and of this name it would find the original
        reduced: Any = original.__reduce_ex__(self, protocol)
        return (_new, (original, made_by or forward), *reduced[2:])

    attributes = {
        "forward": forward,
        "__reduce_ex__": reduce,
        MARK: original,
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
    return getattr(type(module), MARK).forward(module, *arguments, **options)
