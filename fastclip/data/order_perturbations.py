"""Captions with their words out of order: the cases of COCO-Order and Flickr30k-Order.

Yuksekgonul et al. 2023, "When and why vision-language models behave like bags-of-words, and what to
do about it?". The authors' code takes nltk's tokens for trigrams, here the tagger's are taken for
all, and shuffles are drawn from other random numbers: these cases are like the published ones, but
not the same.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fastclip.atomic import write_text
from fastclip.bounded import ANNOTATIONS, read_object

# (word, tag of the Penn Treebank) of each word
Tagged = list[tuple[str, str]]
Tagger = Callable[[str], Tagged]

SPACY_MODEL = "en_core_web_sm"
MAX_WORDS = 30

_NOUNS = {"NN", "NNS", "NNP", "NNPS"}
_ADJECTIVES = {"JJ", "JJR", "JJS"}
_MARKS = re.compile(r'[.!"()*#:;~]')


def pre_caption(caption: str, max_words: int = MAX_WORDS) -> str:
    """A caption as ARO gives it to models: in lower case, without marks, cut after `max_words`.

    Commas, question marks, hyphens and apostrophes stay.
    """
    words = _MARKS.sub(" ", caption.lower()).split()
    return " ".join(words[:max_words])


def perturb(tokens: Tagged, rng: np.random.Generator) -> list[str]:
    """The four perturbations of a caption; one can equal the caption.

    Args:
        tokens: the caption's words in order with their tags.
        rng: draws the permutations.

    Returns:
        The caption with nouns among nouns and adjectives among adjectives shuffled; with all other
        words shuffled; with words shuffled within each three; with the threes shuffled.
    """
    words = [word for word, _ in tokens]
    nouns = [place for place, (_, tag) in enumerate(tokens) if tag in _NOUNS]
    adjectives = [place for place, (_, tag) in enumerate(tokens) if tag in _ADJECTIVES]
    others = sorted({*range(len(words))} - {*nouns} - {*adjectives})
    trigrams = [words[start : start + 3] for start in range(0, len(words), 3)]
    perturbed = [
        _shuffle(_shuffle(words, nouns, rng), adjectives, rng),
        _shuffle(words, others, rng),
        [word for three in trigrams for word in _shuffle(three, range(len(three)), rng)],
        [word for number in rng.permutation(len(trigrams)) for word in trigrams[number]],
    ]
    return [" ".join(shuffled) for shuffled in perturbed]


def _shuffle(words: list[str], places: Sequence[int], rng: np.random.Generator) -> list[str]:
    """The words, those at the places among one another shuffled."""
    shuffled = list(words)
    for place, source in zip(places, rng.permutation(places), strict=True):
        shuffled[place] = words[int(source)]
    return shuffled


def write_order_cases(source: Path, target: Path, tagger: Tagger, seed: int = 0) -> int:
    """Write the cases of a data set's test split for `fastclip eval aro`.

    Args:
        source: captions as Karpathy published them: dataset_coco.json or dataset_flickr30k.json.
        target: the JSON file, a list of {image_path, caption_options: [true, 4 perturbations]}.
        tagger: a caption's words and their tags.
        seed: of the shuffles; with the image's path and the caption it decides on a case's, so
            that other captions have no part in them.

    Returns:
        The number of cases, one a caption.

    Raises:
        ValueError: the source is no such file, or has no test split.
        FileNotFoundError: there is no source.
    """
    cases = []
    for path, caption in _test_captions(source):
        rng = np.random.default_rng([seed, zlib.crc32(f"{path}\n{caption}".encode())])
        options = [caption, *perturb(tagger(caption), rng)]
        cases.append({"image_path": path, "caption_options": [*map(pre_caption, options)]})
    if not cases:
        raise ValueError(f"{source} has no captions of the split 'test'; give the whole file")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(cases))
    return len(cases)


def _test_captions(source: Path) -> Iterator[tuple[str, str]]:
    """(path of the image, caption) of the test split."""
    try:
        content = read_object(source, ANNOTATIONS)
        for image in content["images"]:
            if image["split"] == "test":
                # Flickr30k's images are all in one folder, which the file does not name
                path = "/".join(filter(None, [image.get("filepath"), image["filename"]]))
                yield from ((path, sentence["raw"]) for sentence in image["sentences"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{source} holds no captions in Karpathy's format ({what}); give dataset_coco.json or "
            "dataset_flickr30k.json, with images: [{filename, split, sentences: [{raw}]}]"
        ) from error


def spacy_tagger(name: str = SPACY_MODEL) -> Tagger:
    """A tagger of spaCy's, as ARO's authors used it.

    Args:
        name: of spaCy's model.

    Raises:
        ModuleNotFoundError: spaCy is not installed.
        ValueError: the model is not.
    """
    try:
        import spacy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tags need spaCy: pip install 'fastclip-kernels[tagger]' and python -m spacy download "
            f"{name}",
            name="spacy",
        ) from error
    try:
        language = spacy.load(name)
    except OSError as error:
        raise ValueError(f"spaCy has no model {name!r}: python -m spacy download {name}") from error
    return lambda caption: [(token.text, token.tag_) for token in language(caption)]
