"""Arguments of an order that make no sense."""

import pytest

from fastclip.data.order import Order


def test_a_window_is_not_negative() -> None:
    with pytest.raises(ValueError, match="window is -1"):
        Order((3,), seed=0, window=-1)
