"""False captions as further columns (NegCLIP), against the formula written out in float64."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.models.system import Criterion, Features, System
from fastclip.train.config import TrainConfig
from fastclip.train.objective import ClipObjective, objective_of

ROWS, FALSE, WIDTH = 5, 2, 4


class Towers(nn.Module):
    """Looks features up, as open_clip's models call them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = nn.Parameter(torch.randn(ROWS, WIDTH, generator=generator).double())
        self.texts = nn.Parameter(torch.randn(40, WIDTH, generator=generator).double())
        self.logit_scale = nn.Parameter(torch.tensor(1.3).double())

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        unit = nn.functional.normalize
        return {
            "image_features": unit(self.images[image], dim=-1),
            "text_features": unit(self.texts[text], dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def slow(towers: Towers, texts: Tensor, negatives: Tensor, smoothing: float) -> Tensor:
    """Images choose among all texts; texts, the true ones alone, among images."""

    def unit(row: Tensor) -> Tensor:
        return row / row.norm()

    def term(logits: list[Tensor], truth: int) -> Tensor:
        """Cross-entropy with `smoothing` spread over as many candidates as are no false text's."""
        log_total = torch.stack(logits).exp().sum().log()
        spread = sum(log_total - value for value in logits) / len(logits)
        return (1 - smoothing) * (log_total - logits[truth]) + smoothing * spread

    scale = towers.logit_scale.exp()
    columns = [unit(towers.texts[t]) for t in (*texts, *negatives.flatten())]
    images = [unit(row) for row in towers.images]
    rows = [term([scale * (i @ t) for t in columns], k) for k, i in enumerate(images)]
    back = [term([scale * (i @ columns[k]) for i in images], k) for k in range(ROWS)]
    return (sum(rows) + sum(back)) / (2 * ROWS)


def inputs() -> dict[str, Any]:
    images, texts = torch.arange(ROWS), torch.arange(ROWS)
    negatives = torch.arange(ROWS, ROWS + ROWS * FALSE).view(ROWS, FALSE)
    return {"images": [images], "texts": [texts], "negatives": negatives}


def test_false_captions_are_columns_of_every_image() -> None:
    for smoothing in (0.0, 0.1):
        fast, reference = Towers(), Towers()
        objective = ClipObjective(
            fast, TrainConfig.from_flat(hard_negatives=2, label_smoothing=smoothing)
        )
        output = objective.outputs(fast, inputs())
        assert output["false_features"].shape == (ROWS, FALSE, WIDTH)
        found = objective.loss(output)
        expected = slow(reference, inputs()["texts"][0], inputs()["negatives"], smoothing)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        found.backward()
        expected.backward()
        for one, other in zip(fast.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-13)


def test_a_system_is_its_own_objective() -> None:
    class Half(System):
        def features(self, batch: Mapping[str, Any]) -> Features:
            return Features([batch["images"][0] / 2])

    criterion = Criterion()
    criterion.weight = nn.Parameter(torch.tensor(3.0))
    criterion.bounds = {"weight": (0.0, 5.0)}
    system = Half(criterion, image_views=1, text_views=0)
    objective = objective_of(system, TrainConfig())
    assert objective is system
    batch = {"images": [torch.ones(2, 1)], "texts": []}
    output = objective.outputs(system, batch)
    assert output.keys() == {"image.0", "criterion.weight"}
    assert set(objective.shared) == {"criterion.weight"}
    assert objective.bounds == {"criterion.weight": (0.0, 5.0)}
    assert objective.logit_scale(system.get_parameter) is None
    assert objective.chance(2) is None and not objective.needs_teacher
    rounded: dict[str, Tensor] = {"criterion.weight": criterion.weight.bfloat16() + 0.1}
    objective.exact(rounded, {"criterion.weight": torch.tensor(3.07)})
    torch.testing.assert_close(rounded["criterion.weight"], torch.tensor(3.07))
    rounded["criterion.weight"].backward()
    assert criterion.weight.grad == 1
    values = torch.linspace(-5, 5, 1001)
    rounded = {"criterion.weight": values.bfloat16()}
    objective.exact(rounded, {"criterion.weight": values})
    # to the bit: a sum from the left would round twice
    assert rounded["criterion.weight"].equal(values)


def test_what_is_bounded_and_shared() -> None:
    towers = Towers()
    objective = ClipObjective(towers, TrainConfig())
    assert objective.bounds.keys() == {"logit_scale"}
    assert objective.logit_scale(towers.get_parameter) == torch.tensor(1.3).double().exp().item()
    output: dict[str, Tensor] = {"logit_scale": torch.tensor(3.6699, dtype=torch.bfloat16)}
    objective.exact(output, {"logit_scale": torch.tensor(1.3)})
    torch.testing.assert_close(output["logit_scale"], torch.tensor(1.3).exp())
