"""The scenes world: determinism, truth of every text, and pixels that show what the graph says."""

import colorsys
import hashlib
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from fastclip.data import scenes as S
from fastclip.data.scenes.render import PALETTE_RGB, TINT_JITTER

COUNT = 2000
EDGE = 1e-9  # rounding of a sum of four-decimal coordinates


@pytest.fixture(scope="module")
def train() -> list[S.Scene]:
    return [S.sample_scene(seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def compositional() -> list[S.Scene]:
    return [S.sample_scene(seed, split="compositional") for seed in range(COUNT // 4)]


GOLDEN = {
    (0, "train", None, None): "3707aa2939e47295",
    (1, "val", None, 3): "f6d8dac0eadc526c",
    (2**64 - 1, "test", "style", None): "9444542d962419dd",
    (123456789, "train", "palette", 1): "2b74b9790e380a5e",
    (7, "compositional", "viewpoint", 3): "82409de5549978e9",
    (8, "val", "corruption", None): "73fe4acab3de9457",
    (9, "val", "background", 2): "e042199a3e4b0cdd",
}


@pytest.mark.parametrize("arguments", GOLDEN, ids=str)
def test_scene_of_a_seed_never_changes(arguments):
    seed, split, shift, objects = arguments
    scene = S.sample_scene(seed, split=split, shift=shift, objects=objects)
    assert hashlib.sha256(repr(scene).encode()).hexdigest()[:16] == GOLDEN[arguments]


def test_sampling_render_and_captions_are_pure(train):
    for seed in range(20):
        again = S.sample_scene(seed)
        assert again == train[seed] == S.sample_scene(np.int64(seed))
        assert S.render(again).tobytes() == S.render(train[seed]).tobytes()
        for quality in S.QUALITIES:
            assert S.caption(again, quality, 3) == S.caption(train[seed], quality, 3)


def test_splits_are_disjoint(train):
    seen = set(train)
    assert len(seen) == COUNT
    for split in ("val", "test", "compositional"):
        assert seen.isdisjoint(S.sample_scene(seed, split=split) for seed in range(COUNT))


def test_number_of_objects_and_forced_number(train):
    shares = np.bincount([len(scene.objects) for scene in train], minlength=4) / COUNT
    # Four standard deviations of a share of 0.4 over 2000 draws are 0.044.
    np.testing.assert_allclose(shares, [0.0, 0.4, 0.4, 0.2], atol=0.045)
    for number in (1, 2, 3):
        assert all(len(S.sample_scene(i, objects=number).objects) == number for i in range(30))


def test_vocabulary_is_used_evenly(train):
    objects = [obj for scene in train for obj in scene.objects]
    for values, used in (
        (S.COLORS, [obj.color for obj in objects]),
        (S.SHAPES, [obj.shape for obj in objects]),
        (S.RELATIONS, [scene.relation for scene in train if scene.relation]),
        (S.BACKGROUNDS, [scene.background for scene in train]),
        (S.STYLES, [scene.style for scene in train]),
    ):
        for value in values:
            assert used.count(value) > 0.75 * len(used) / len(values), value
    assert 0.35 < [obj.size for obj in objects].count("large") / len(objects) < 0.65


def test_held_out_pairs_occur_only_in_the_compositional_split(train, compositional):
    assert {color for color, _ in S.HELD_OUT} == set(S.COLORS)
    assert {shape for _, shape in S.HELD_OUT} == set(S.SHAPES)
    others = [S.sample_scene(i, split=split) for split in ("val", "test") for i in range(500)]
    for scene in train + others:
        assert not S.HELD_OUT & {(obj.color, obj.shape) for obj in scene.objects}
    for scene in compositional:
        assert len(S.HELD_OUT & {(obj.color, obj.shape) for obj in scene.objects}) == 1


def test_negatives_of_training_scenes_do_not_name_held_out_pairs(train):
    for scene in train[:500]:
        for kind in S.NEGATIVE_KINDS:
            for text in S.hard_negatives(scene, kind):
                parsed = parse_short(text)
                assert not S.HELD_OUT & {(m.color, m.shape) for m in parsed.objects}, text


def test_objects_are_apart_in_the_frame_and_different(train, compositional):
    for scene in train + compositional:
        pairs = {(obj.color, obj.shape) for obj in scene.objects}
        assert len(pairs) == len(scene.objects)
        for obj in scene.objects:
            assert obj.radius <= min(obj.x, obj.y, 1 - obj.x, 1 - obj.y) + EDGE
        for a, b in combinations(scene.objects, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_views_keep_objects_in_the_frame_and_relations_true():
    for seed in range(1000):
        scene = S.sample_scene(seed, split="val", shift="viewpoint")
        a, b, c, d = scene.view.matrix()
        growth = np.linalg.norm([[a, b], [c, d]], 2)
        seen = [scene.view.apply(obj.x, obj.y) for obj in scene.objects]
        for obj, (x, y) in zip(scene.objects, seen, strict=True):
            assert growth * obj.radius <= min(x, y, 1 - x, 1 - y) + EDGE
        for i, j in combinations(range(len(seen)), 2):
            relation = S.relation_between(scene.objects[i], scene.objects[j])
            if relation is not None:
                axis, sign = DIRECTION[relation]
                # A tenth of the side at the least, more than six pixels of 64.
                assert sign * (seen[i][axis] - seen[j][axis]) > 0.1
    smallest = 0.75 * S.SIZES["large"]
    assert smallest > 1.15 * S.SIZES["small"]


# The relation's axis, and the sign of subject minus object along it (y downwards).
DIRECTION = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def test_relations_are_true_by_a_margin(train):
    for scene in train:
        if len(scene.objects) == 1:
            assert scene.relation is None
            continue
        a, b = ((obj.x, obj.y) for obj in scene.objects[:2])
        axis, sign = DIRECTION[scene.relation]
        along, across = sign * (a[axis] - b[axis]), abs(a[1 - axis] - b[1 - axis])
        assert along >= 0.2 and along >= 2 * across
        for third in scene.objects[2:]:
            assert any(S.relation_between(third, other) for other in scene.objects[:2])


def shape_at(shape, x, y, size="small", color="red"):
    return S.Object(shape, color, size, x, y)


PAIR = S.Scene(
    (shape_at("circle", 0.25, 0.5), shape_at("square", 0.7, 0.5, "large", "blue")), "left of"
)
CIRCLE, SQUARE = S.Mention("red", "circle"), S.Mention("blue", "square")


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        (S.Claim(), True),
        (S.Claim((CIRCLE,)), True),
        (S.Claim((S.Mention(shape="star"),)), False),
        (S.Claim((S.Mention("red", "square"),)), False),
        (S.Claim((S.Mention("red", "circle", "large"),)), False),
        (S.Claim((SQUARE, CIRCLE)), True),
        (S.Claim((CIRCLE, CIRCLE)), False),
        (S.Claim((S.Mention(), S.Mention())), True),
        (S.Claim((S.Mention(), S.Mention(), S.Mention())), False),
        (S.Claim((CIRCLE, SQUARE), "left of"), True),
        (S.Claim((SQUARE, CIRCLE), "right of"), True),
        (S.Claim((SQUARE, CIRCLE), "left of"), False),
        (S.Claim((CIRCLE, SQUARE), "above"), False),
        (S.Claim((S.Mention(), S.Mention("red")), "right of"), True),
        (S.Claim(background="white", style="filled", count=2), True),
        (S.Claim(background="black"), False),
        (S.Claim(style="sketch"), False),
        (S.Claim(count=1), False),
    ],
)
def test_holds(claim, truth):
    assert S.holds(claim, PAIR) is truth


def parse_short(text: str) -> S.Claim:
    """The claim of a short caption, read from its words with nothing of the package's phrasing."""
    alone = text.endswith(" by itself")
    text = re.sub(r"^(a picture of |there is )|( by itself)$", "", text)
    noun = r"a (?:(small|large) )?(\w+) (\w+)"
    relation = r"(?:to the )?(left of|right of|above|below)"
    text, _, last = text.partition(", ")
    third = re.fullmatch(rf"(?:plus|and also) {noun}", last)
    assert bool(last) == bool(third), text

    def mention(size, color, shape):
        assert color in S.COLORS and shape in S.SHAPES
        return S.Mention(color, shape, size)

    rest = (mention(*third.groups()),) if third else ()
    if match := re.fullmatch(noun, text):
        return S.Claim((mention(*match.groups()), *rest), count=1 if alone else None)
    if match := re.fullmatch(rf"{noun} with {noun} {relation} it", text):
        words = match.groups()
        return S.Claim((mention(*words[3:6]), mention(*words[:3]), *rest), words[6])
    match = re.fullmatch(rf"{noun} (?:is )?{relation} {noun}", text)
    assert match, text
    words = match.groups()
    return S.Claim((mention(*words[:3]), mention(*words[4:]), *rest), words[3])


@pytest.mark.parametrize("quality", S.QUALITIES)
def test_every_caption_is_true(train, compositional, quality):
    for i, scene in enumerate(train + compositional):
        text, claims = S.caption_claims(scene, quality, seed=i % 5)
        assert text == S.caption(scene, quality, seed=i % 5)
        assert all(S.holds(claim, scene) for claim in claims), (text, scene)
        # Whatever the claims say, the text itself names no attribute that no object has.
        words = set(re.findall("[a-z]+", text.lower()))
        objects = scene.objects
        assert words & set(S.SHAPES) <= {obj.shape for obj in objects}, text
        assert words & set(S.SIZES) <= {obj.size for obj in objects}, text
        colors = {obj.color for obj in objects}
        assert words & set(S.COLORS) <= colors, text
        if quality == "short":
            assert (parse_short(text),) == claims


def test_dense_captions_cover_the_scene(train):
    for scene in train:
        _, claims = S.caption_claims(scene, "dense")
        said = {mention for claim in claims for mention in claim.objects}
        assert {S.Mention(obj.color, obj.shape, obj.size) for obj in scene.objects} <= said
        assert {claim.background for claim in claims} >= {scene.background}
        assert {claim.style for claim in claims} >= {scene.style}
        assert {claim.count for claim in claims} >= {len(scene.objects)}
        related = {
            frozenset((m.color, m.shape) for m in claim.objects)
            for claim in claims
            if claim.relation
        }
        for a, b in combinations(scene.objects, 2):
            if S.relation_between(a, b):
                assert frozenset(((a.color, a.shape), (b.color, b.shape))) in related


def test_dense_captions_name_every_background_and_style():
    def words(**drawn):
        return S.caption(replace(PAIR, **drawn), "dense")

    backgrounds = S.BACKGROUNDS + S.SHIFTED_BACKGROUNDS
    assert len({words(background=name) for name in backgrounds}) == len(backgrounds)
    styles = S.STYLES + S.SHIFTED_STYLES
    assert len({words(style=name) for name in styles}) == len(styles)


def test_phrasings_vary_with_the_seed():
    for quality, least in (("short", 8), ("alt", 25), ("dense", 40)):
        assert len({S.caption(PAIR, quality, seed) for seed in range(100)}) >= least


@pytest.mark.parametrize("kind", S.NEGATIVE_KINDS)
def test_every_hard_negative_is_false(train, compositional, kind):
    for i, scene in enumerate(train + compositional):
        negatives = S.hard_negative_claims(scene, kind, seed=i % 5)
        assert [text for text, _ in negatives] == S.hard_negatives(scene, kind, seed=i % 5)
        assert bool(negatives) == (kind == "attribute" or len(scene.objects) > 1)
        assert len(dict(negatives)) == len(negatives)
        for text, claims in negatives:
            assert not all(S.holds(claim, scene) for claim in claims), (text, scene)
            assert (parse_short(text),) == claims


def test_hard_negatives_change_one_thing(train):
    for scene in train:
        (positive,) = S.caption_claims(scene, "short")[1]
        for _, (claim,) in S.hard_negative_claims(scene, "relation"):
            assert claim.objects == positive.objects
            assert {claim.relation, positive.relation} in (
                {"left of", "right of"},
                {"above", "below"},
            )
        for _, (claim,) in S.hard_negative_claims(scene, "order"):
            assert claim.relation == positive.relation
            assert claim.objects[:2] == positive.objects[1::-1]
            assert claim.objects[2:] == positive.objects[2:]
        for _, (claim,) in S.hard_negative_claims(scene, "attribute"):
            assert replace(claim, objects=positive.objects) == positive
            changed = [
                name
                for name in ("color", "shape", "size")
                if any(
                    getattr(a, name) != getattr(b, name)
                    for a, b in zip(claim.objects, positive.objects, strict=True)
                )
            ]
            assert len(changed) == 1


def pixels(scene: S.Scene, size: int = 64) -> np.ndarray:
    return np.asarray(S.render(scene, size), dtype=np.int64)


def test_filled_objects_have_their_color(train):
    names = list(S.COLORS)
    palette = np.array([PALETTE_RGB["standard"][name] for name in names])
    checked = 0
    for scene in train[:900]:
        if scene.style != "filled":
            continue
        image = pixels(scene)
        for obj in scene.objects:
            # The middle of a ring is its hole; its band is centered at 0.725 of the radius.
            x = obj.x + (0.725 * obj.radius if obj.shape == "ring" else 0.0)
            level = image[int(obj.y * 64), int(x * 64)]
            nearest = np.abs(palette - level).sum(1).argmin()
            assert names[nearest] == obj.color
            assert np.abs(palette[nearest] - level).max() <= TINT_JITTER + 1
            checked += 1
    assert checked > 300


def test_every_style_and_palette_shows_the_color():
    rows, columns = np.mgrid[:64, :64] + 0.5
    for seed in range(300):
        for shift in (None, "style", "palette", "background", "viewpoint"):
            scene = S.sample_scene(seed, split="val", shift=shift)
            image = pixels(scene)
            for obj in scene.objects:
                x, y = scene.view.apply(obj.x, obj.y)
                near = np.hypot(columns - 64 * x, rows - 64 * y) < 64 * obj.radius
                named = np.array(PALETTE_RGB[scene.palette][obj.color])
                # Thin strokes are blended with the background, shades are darker or lighter.
                assert np.abs(image[near] - named).max(1).min() < 60, (scene, obj)


def test_palettes_keep_names_and_backgrounds_stay_neutral():
    def hue(rgb):
        return colorsys.rgb_to_hsv(*(level / 255 for level in rgb))[0]

    standard = {name: hue(rgb) for name, rgb in PALETTE_RGB["standard"].items()}
    for palette in PALETTE_RGB.values():
        for name, rgb in palette.items():
            away = {key: abs((hue(rgb) - value + 0.5) % 1 - 0.5) for key, value in standard.items()}
            assert min(away, key=away.__getitem__) == name
            assert max(rgb) - min(rgb) >= 70
    # A corner of the frame that the only object, in the middle, does not reach.
    middle = (shape_at("circle", 0.5, 0.5),)
    for name in S.BACKGROUNDS + S.SHIFTED_BACKGROUNDS:
        for seed in range(10):
            corner = pixels(S.Scene(middle, None, background=name, seed=seed))[:16, :16]
            assert (corner.max(2) - corner.min(2)).max() <= 40


@pytest.mark.parametrize("shift", S.SHIFTS)
def test_shifts_change_pixels_and_no_claim(shift):
    field = {"viewpoint": "view"}.get(shift, shift)
    kinds = set()
    for seed in range(200):
        scene = S.sample_scene(seed, split="val")
        shifted = S.sample_scene(seed, split="val", shift=shift)
        assert getattr(shifted, field) != getattr(scene, field)
        same = {field: getattr(scene, field), "severity": scene.severity}
        assert replace(shifted, **same) == scene
        kinds.add(getattr(shifted, field))
        assert S.caption(shifted, "short") == S.caption(scene, "short")
        assert S.caption(shifted, "alt") == S.caption(scene, "alt")
        for _, claims in (S.caption_claims(shifted, quality) for quality in S.QUALITIES):
            assert all(S.holds(claim, shifted) for claim in claims)
        if seed < 60:
            assert np.abs(pixels(shifted) - pixels(scene)).max() > 16
    unseen = {
        "style": S.SHIFTED_STYLES,
        "background": S.SHIFTED_BACKGROUNDS,
        "palette": S.PALETTES[1:],
        "corruption": S.CORRUPTIONS,
    }
    assert shift == "viewpoint" or kinds == set(unseen[shift])


@pytest.mark.parametrize("size", [16, 64, 97, 224])
def test_render_size_and_antialiasing(size):
    image = S.render(PAIR, size)
    assert image.mode == "RGB" and image.size == (size, size)
    # Between the circle's red and the near white there must be mixtures of the two.
    green = np.asarray(image)[:, : size // 2, 1]
    assert ((green > 70) & (green < 225)).any()


def test_class_index():
    assert len(set(S.CLASSES)) == len(S.COLORS) * len(S.SHAPES)
    assert S.class_index(PAIR) is None
    for seed in range(200):
        scene = S.sample_scene(seed, objects=1)
        (obj,) = scene.objects
        assert S.CLASSES[S.class_index(scene)] == f"{obj.color} {obj.shape}"
    for template in S.TEMPLATES:
        words = set(template.split())
        assert template.count("{}") == 1
        assert not words & {*S.SIZES, *S.COLORS, *S.SHAPES}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S.sample_scene(-1), "seed is -1"),
        (lambda: S.sample_scene(2**64), "seed is"),
        (lambda: S.sample_scene(0, split="dev"), "split is 'dev'; use one of train"),
        (lambda: S.sample_scene(0, shift="color"), "shift is 'color'"),
        (lambda: S.sample_scene(0, objects=4), "objects is 4"),
        (lambda: S.caption(PAIR, "long"), "quality is 'long'"),
        (lambda: S.hard_negatives(PAIR, "swap"), "kind is 'swap'"),
        (lambda: S.render(PAIR, 8), "size is 8"),
        (lambda: S.Object("blob", "red", "small", 0.5, 0.5), "shape is 'blob'"),
        (lambda: S.Object("star", "red", "small", 1.5, 0.5), "the center is"),
        (lambda: S.Scene((), None), "0 objects"),
        (lambda: replace(PAIR, relation="above"), "centers show 'left of'"),
        (lambda: replace(PAIR, severity=4), "severity is 4"),
        (lambda: S.Claim((CIRCLE,), "above"), "two mentions"),
    ],
)
def test_errors_name_the_value_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
