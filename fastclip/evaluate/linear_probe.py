"""A linear classifier on frozen image features (Radford et al. 2021, section 3.2)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastclip.evaluate.features import ImageFeatures
from fastclip.evaluate.zeroshot import classification_metrics, labeled

# inverse strengths of the penalty, as scikit-learn counts them
REGULARIZATION = tuple(10.0**exponent for exponent in range(-2, 5))
HELD_OUT = 0.2
MAX_ITERATIONS = 1000


def linear_probe(
    train: ImageFeatures,
    test: ImageFeatures,
    *,
    regularization: Sequence[float] = REGULARIZATION,
    seed: int = 0,
) -> dict[str, float]:
    """Multinomial logistic regression by scikit-learn's L-BFGS; unlabeled images are left out.

    The features are those of the common space, normalized; CLIP's paper took the image tower's,
    before the projection, so its figures are not comparable. The strength of the penalty is chosen
    on a fifth of the training images, with every class in it alike if each has two or more images
    and the fifth is no smaller than the number of classes; then all of them are fitted.

    Args:
        train, test: features with labels; of a classifier embed them with `classify=False`.
        regularization: inverse strengths to choose from; of equally good ones the smallest.
        seed: of the part that is held out.

    Returns:
        lp_acc1, lp_acc5, lp_mean_per_class_recall (ties count against the truth; a class that was
        not trained on is never right), regularization, validation_acc1, and unseen_labels: test
        images of such classes.

    Raises:
        ValueError: there are no labels, the training images are of fewer than two classes, a
            feature is not finite, or a strength is not positive.
    """
    from sklearn.model_selection import train_test_split

    features, labels = labeled(train)
    tested, truth = labeled(test)
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(
            f"the training images are all of class {int(labels[0])}; a probe takes two classes"
        )
    _require_finite(features, "training")
    _require_finite(tested, "test")
    x, y = features.numpy(), labels.numpy()
    stratify = y if int(counts.min()) > 1 and HELD_OUT * len(y) >= len(classes) else None
    strengths = sorted(regularization)
    if not strengths or not all(strength > 0 for strength in strengths):
        raise ValueError(f"regularization is {strengths}; give positive numbers, e.g. (0.1, 1, 10)")
    chosen, accuracy = strengths[0], float("nan")
    if len(strengths) > 1:
        parts = train_test_split(x, y, test_size=HELD_OUT, random_state=seed, stratify=stratify)
        fitted, held_out, fitted_y, held_out_y = parts
        if len(np.unique(fitted_y)) < 2:
            raise ValueError(
                f"{len(y)} training images are too few to hold a fifth out; give more, or one "
                "regularization"
            )
        accuracy = -1.0
        for strength in strengths:
            logits = _fit_and_score(fitted, fitted_y, held_out, strength)
            width = int(max(classes.max(), held_out_y.max())) + 1
            found = classification_metrics(_widen(*logits, width), torch.from_numpy(held_out_y))
            if found["acc1"] > accuracy:
                chosen, accuracy = strength, found["acc1"]
    logits = _fit_and_score(x, y, tested.numpy(), chosen)
    width = int(max(classes.max(), truth.max())) + 1
    metrics = classification_metrics(_widen(*logits, width), truth)
    return {
        **{f"lp_{name}": value for name, value in metrics.items()},
        "regularization": chosen,
        "validation_acc1": accuracy,
        "unseen_labels": float((~torch.isin(truth, classes)).sum()),
    }


def _require_finite(features: Tensor, which: str) -> None:
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise ValueError(
            f"the features of {broken} of {len(features)} {which} images are NaN or infinite; the "
            "model's weights may be, or give --precision fp32"
        )


def _fit_and_score(
    x: np.ndarray, y: np.ndarray, tested: np.ndarray, strength: float
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) of the classes fitted, and those classes' labels (C,)."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(x, y)
    logits = model.decision_function(tested)
    if logits.ndim == 1:
        # of two classes scikit-learn gives the second one's alone
        logits = np.stack((np.zeros_like(logits), logits), axis=1)
    return torch.from_numpy(logits), torch.from_numpy(model.classes_)


def _widen(logits: Tensor, classes: Tensor, width: int) -> Tensor:
    """Logits over all labels, those not fitted below every other."""
    wide = torch.full((len(logits), width), -torch.inf, dtype=logits.dtype)
    wide[:, classes] = logits
    return wide
