"""What all patches share: undoing them, and giving one module another forward."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

MARK = "_fastclip_original"
"""Attribute of what was put in another's place: that other."""


class PatchHandle:
    """What a patch changed; `undo()`, or the end of a `with` block, restores it."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []

    def on_undo(self, restore: Callable[[], None]) -> None:
        """Remember `restore`, which takes one change back; the last is taken back first."""
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


def exchange_forward(module: nn.Module, forward: Callable[..., Any], handle: PatchHandle) -> bool:
    """Give one module `forward(module, ...)`; False where it was given one before.

    Its class becomes a subclass of the same name, so weights, `isinstance` and torch.compile see
    what they saw; the original is `super(type(module), module).forward`.
    """
    original = type(module)
    if hasattr(original, MARK):
        return False
    attributes = {"forward": forward, MARK: original, "__module__": original.__module__}
    module.__class__ = type(original.__name__, (original,), attributes)

    def restore() -> None:
        module.__class__ = original

    handle.on_undo(restore)
    return True


def original_forward(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """What the module did before `exchange_forward`."""
    return getattr(type(module), MARK).forward(module, *arguments, **options)
