"""New captions for webdataset shards by an image-to-text model, grounded in what the web says.

The model sees an image with its alt-text and the title of its page, as in "Learning Visual
Composition through Improved Semantic Guidance": so it makes up less, and corrects wrong alt-texts.
"""

import re
import zlib
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from fastclip.data.editing import Journal, ShardEditor, claim_folder, folders_of
from fastclip.data.faults import FaultLog
from fastclip.data.index import Fault
from fastclip.data.order import hash64
from fastclip.data.regular import open_regular
from fastclip.data.remote import ShardCache, file_name, is_remote
from fastclip.data.samples import UnreadableSample
from fastclip.data.shards import expand_shards
from fastclip.device import choose_device

CHAT_PROMPT = (
    'The web page that shows this image is titled "{title}", which may not fit it. '
    'The alt-text of the image is "{alt_text}", which may be wrong. '
    "Describe the image in a few plain sentences: objects, their attributes, how they relate, and "
    "text that can be read. Leave out what cannot be seen. Answer with the description alone."
)
PREFIX_PROMPT = "Title: {title}. Alt-text: {alt_text}. A photo of"

# Of a title or alt-text, some 35 words: captioners such as BLIP take 512 tokens in all.
GROUNDING_CHARACTERS = 200

_GENERATION = ("max_new_tokens", "num_beams", "temperature")
_PLACE = re.compile(r"\{(\w*)\}")
_SENTENCE_END = re.compile(r"""((?<=[.!?])\s+|(?<=[.!?]["')])\s+|\s*\n\s*)""")


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are made.

    Raises:
        ValueError: a number is out of range, or the prompt has another place than its two.
    """

    model: str
    """Image-to-text model of transformers: a folder, or a name on the Hugging Face Hub such as
    Salesforce/blip-image-captioning-large or Qwen/Qwen2.5-VL-3B-Instruct. Code that comes with a
    model is never run."""
    prompt: str | None = None
    """The model's prompt. {alt_text} stands for KEY.txt, {title} for "title" in KEY.json; a
    sentence with one that a sample lacks is left out. A chat model is asked it; other captioners
    continue it, and it is cut off again. By default a request for a description that names both, or
    'Title: {title}. Alt-text: {alt_text}. A photo of'."""
    key: str = "recaption"
    """Key of KEY.json that gets the caption; to train on it: --captions 'txt=1,recaption=3'."""
    batch_size: int = 16
    """Images captioned at a time."""
    max_new_tokens: int = 128
    """Length at which a caption is cut off; about 90 words."""
    num_beams: int = 1
    """Beams of beam search; with 1, the likeliest token is taken each time."""
    temperature: float = 0.0
    """Above 0, e.g. at 0.7, tokens are drawn at random instead."""
    seed: int = 0
    """Of the tokens drawn."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto is bfloat16 on a GPU and float32 on a CPU."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name)}; give at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature is {self.temperature}; give 0 or more, e.g. 0.7")
        if unknown := set(_PLACE.findall(self.prompt or "")) - {"alt_text", "title"}:
            raise ValueError(f"--prompt names {{{min(unknown)}}}, not {{alt_text}} or {{title}}")


@dataclass
class Recaptioned:
    """Captions made, of how many samples in how many shards; shards that were there before, or are
    left to the process that is writing them; what stays without a caption."""

    captions: int = 0
    samples: int = 0
    shards: int = 0
    finished: int = 0
    busy: int = 0
    faults: FaultLog = field(default_factory=FaultLog)


def fill_prompt(template: str, texts: dict[str, str]) -> str:
    """The template with {name} replaced; a sentence or line that names an empty text is dropped."""
    pieces = _SENTENCE_END.split(template)
    kept = [
        _PLACE.sub(lambda place: texts[place[1]], sentence) + space
        for sentence, space in zip_longest(pieces[::2], pieces[1::2], fillvalue="")
        if all(texts[name] for name in _PLACE.findall(sentence))
    ]
    return "".join(kept).strip()


class Captioner:
    """A model of transformers with its processor.

    Attributes:
        settings: what the captions depend on.
        chat: whether the model is asked the prompt, by its chat template; else it continues it.

    Raises:
        ValueError, OSError: there is no such model, or it is none for images and texts.
    """

    def __init__(self, options: CaptionOptions, device: torch.device) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.options = options
        self.device = device
        self.processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=False)
        self.tokenizer: Any = getattr(self.processor, "tokenizer", None)
        if self.tokenizer is None or not hasattr(self.processor, "image_processor"):
            raise ValueError(
                f"{options.model} does not take images with texts; give another --model"
            )
        # what is generated begins where the prompt ends
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.chat = bool(getattr(self.processor, "chat_template", None))
        # a text that spelled one of these would pass for an image, or for the end of the prompt
        tokens = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        tokens |= {getattr(self.processor, "image_token", "<image>")} - {None}
        self._tokens = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        usual = "bfloat16" if device.type == "cuda" else "float32"
        dtype = usual if options.dtype == "auto" else options.dtype
        self.dtype = getattr(torch, dtype)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            options.model, dtype=self.dtype, trust_remote_code=False
        )
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(device).eval()
        self.settings = asdict(options) | {"dtype": dtype}
        self.settings["prompt"] = options.prompt or (CHAT_PROMPT if self.chat else PREFIX_PROMPT)
        self.settings["revision"] = getattr(model.config, "_commit_hash", None)
        if not options.temperature:
            # matters to rounding alone, and may have to be lowered on the way
            del self.settings["batch_size"]

    def prompt(self, alt_text: str, title: str) -> str:
        """The prompt for an image; a text is empty where there is none."""
        texts = {"alt_text": alt_text, "title": title}
        for name, text in texts.items():
            # JSON may spell half a surrogate pair, which no tokenizer takes
            plain = self._tokens.sub(" ", text.encode("utf-8", "ignore").decode())
            texts[name] = " ".join(plain.split())[:GROUNDING_CHARACTERS].strip()
        return fill_prompt(self.settings["prompt"], texts)

    @torch.inference_mode()
    def captions(self, images: list[Image.Image], prompts: list[str], seed: int) -> list[str]:
        """A caption for each image on one line; a ValueError where memory does not hold so many."""
        inputs = self._inputs(images, prompts).to(self.device, self.dtype)
        how: dict[str, Any] = {name: self.settings[name] for name in _GENERATION}
        how |= {"do_sample": how["temperature"] > 0, "top_p": None, "top_k": None}
        how["temperature"] = how["temperature"] or None
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                output = self.model.generate(**inputs, **how)
            except torch.OutOfMemoryError as error:
                wanted = f"--batch-size {self.options.batch_size}: the GPU's memory is too small"
                drawn = self.options.temperature > 0
                done = "begin a new folder" if drawn else "finished batches are kept"
                raise ValueError(f"{wanted}; lower it; {done}") from error
        # decoded alike, the prompt is found where the model repeats it
        given, made = (
            self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for tokens in (inputs["input_ids"], output)
        )
        texts = [t.strip().removeprefix(p.strip()) for p, t in zip(given, made, strict=True)]
        # what is cut off may end in the midst of a character
        return [" ".join(text.replace("\ufffd", " ").split()) for text in texts]

    def _inputs(self, images: list[Image.Image], prompts: list[str]) -> Any:
        form: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if not self.chat:
            return self.processor(images=images, text=prompts, **form)
        contents = [[{"type": "image"}, {"type": "text", "text": prompt}] for prompt in prompts]
        chats = [[{"role": "user", "content": content}] for content in contents]
        template = self.processor.apply_chat_template
        texts = [template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            form["add_special_tokens"] = False
        return self.processor(images=[[image] for image in images], text=texts, **form)


def recaption_shards(
    pattern: str, target: Path, options: CaptionOptions, *, device: str = "auto"
) -> Recaptioned:
    """Write shards anew with captions in their KEY.json; all else in them stays as it is.

    Samples that cannot be captioned are copied and reported. What is done of a shard is kept in a
    journal beside it: a run that was killed loses a batch and, taken up again, writes the same
    bytes. Shards that are there are passed over, those that another process is writing left to it.

    Args:
        pattern: see `expand_shards`; for device see `choose_device`.
        target: folder for the shards under their names, and the settings as `recaption.json`.

    Raises:
        ValueError: the target holds captions made otherwise or of shards of other folders, or two
            shards have one name.
        FileExistsError: the target holds such shards that were not written here.
        OSError, ModuleNotFoundError: a shard or the model cannot be read, or transformers is not.
    """
    names = expand_shards(pattern)
    paths = [target / file_name(name) for name in names]
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"two shards of {pattern} have the same name; give them in two commands, with a folder "
            "for each"
        )
    captioner = Captioner(options, choose_device(device))
    identity = captioner.settings | {"folders": folders_of(names)}
    claim_folder(target, "recaption.json", identity, paths)
    cache, done = ShardCache(), Recaptioned()
    for name, path in zip(names, paths, strict=True):
        with closing(Journal(path)) as journal:
            if path.exists():
                done.finished += 1
            elif journal.mine:
                with cache.open(name) if is_remote(name) else open_regular(name) as file:
                    _recaption(ShardEditor(file, name), path, captioner, journal, done)
            else:
                done.busy += 1
            if journal.mine:
                journal.path.unlink(missing_ok=True)
    return done


class _Task(NamedTuple):
    key: str
    prompt: str
    length: int


def _recaption(
    shard: ShardEditor, path: Path, captioner: Captioner, journal: Journal, done: Recaptioned
) -> None:
    journal.begin(shard.identity | captioner.settings)
    done.faults.add(shard.faults)
    tasks = _tasks(shard, captioner, done.faults)
    before = {key for piece in journal.pieces for key in piece["captions"]}
    batches = _batches([task for task in tasks if task.key not in before], captioner)
    ahead = shard.images_ahead([task.key for task in batch] for batch in batches)
    with tqdm(total=len(tasks), initial=len(before), desc=path.name, unit=" samples") as bar:
        for batch, (images, faults) in zip(batches, ahead, strict=True):
            # the same at every attempt, whatever was drawn for other batches
            place = zlib.crc32(f"{path.name}:{batch[0].key}".encode())
            seed = hash64(captioner.options.seed, place)
            prompts = [task.prompt for task in batch if task.key in images]
            texts = captioner.captions([*images.values()], prompts, seed) if images else []
            made = dict.fromkeys([task.key for task in batch], "")
            made |= zip(images, texts, strict=True)
            faults += [Fault("empty answer", f"{shard.name}:{k}") for k in images if not made[k]]
            journal.add({"captions": made, "faults": [astuple(fault) for fault in faults]})
            bar.update(len(batch))
    captions: dict[str, str] = {}
    for piece in journal.pieces:
        captions |= piece["captions"]
        done.faults.add([Fault(*fault) for fault in piece["faults"]])
    captions = {key: text for key, text in captions.items() if text}
    shard.write(path, captioner.options.key, captions)
    done.captions += len(captions)
    done.samples += len(shard.samples)
    done.shards += 1


def _tasks(shard: ShardEditor, captioner: Captioner, faults: FaultLog) -> list[_Task]:
    """The samples that can be captioned, those with the shortest prompts first."""
    prompts: dict[str, str] = {}
    for key in shard.samples:
        try:
            content = shard.json(key)[1]
            if captioner.options.key in content:
                raise UnreadableSample(Fault("has the key already", f"{shard.name}:{key}.json"))
        except UnreadableSample as error:
            faults.add([error.fault])
            continue
        title = content.get("title")
        prompts[key] = captioner.prompt(shard.text(key), title if isinstance(title, str) else "")
    tokens = captioner.tokenizer([*prompts.values()])["input_ids"] if prompts else []
    tasks = map(_Task, prompts, prompts.values(), map(len, tokens))
    return sorted(tasks, key=lambda task: task.length)


def _batches(tasks: list[_Task], captioner: Captioner) -> list[list[_Task]]:
    """Batches in order; of one length where the model may ignore padding."""
    size = captioner.options.batch_size
    groups = groupby(tasks, lambda task: 0 if captioner.chat else task.length)
    listed = [[*group] for _, group in groups]
    return [group[i : i + size] for group in listed for i in range(0, len(group), size)]
