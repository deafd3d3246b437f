"""The thread through the notebooks: each runs in a fresh kernel, and finds here what those before it left."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversation.messages import Message
from ..data.dataset import as_line
from ..errors import ChatmagicError
from ..files import make_folder, write, writing
from ..machine import courses
from ..models.checkpoint import CheckpointError, check_whole, is_whole
from ..prompts.templates import get_template
from .download import snapshot_download
from .persona import LANGUAGES, Persona, holds, questions
from .profile import AUTO, Profile, choose_profile, get_profile
from .wanted import find, local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a notebook may need of earlier ones: name -> (file or folder, the notebook that leaves it there)
LEFT = {
    "model": ("config.json", "01-download"),
    "before": ("before.json", "02-quantized-load"),
    "train": ("train.jsonl", "03-dataset"),
    "val": ("val.jsonl", "03-dataset"),
    "adapter": ("adapter/adapter_config.json", "04-train-adalora"),
    "merged": ("merged/config.json", "05-merge"),
}


class CourseError(ChatmagicError):
    """A notebook that is run before one that it builds on."""


MIXES = ("replay", "identity", "nothing")


@dataclass(frozen=True)
class OwnData:
    """Conversations of the reader's own, to train on in place of those that the course makes.

    file: a path, or the id of a data set on ModelScope or Hugging Face. mix: "replay" (the base's own replies),
    "identity" (those, and who the persona is) or "nothing" beside it. columns, encoding, on_error: as for
    `read_conversations`. samples: how many an epoch draws; all of them, once, if None. max_length: tokens that a
    conversation may have; a longer one loses its oldest rounds.
    """

    file: str
    mix: str = "replay"
    columns: dict[str, str] | None = None
    encoding: str | None = None
    on_error: str = "stop"
    samples: int | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class Course:
    """One way through the course: which model becomes whom, or learns which data. Each has a folder of its own."""

    profile: Profile
    persona: Persona
    auto: bool = False  # the profile was chosen for this machine, not by the reader
    own: OwnData | None = None

    @property
    def model(self) -> Path:
        """The folder of the base model: where it lies whole, or will."""
        wanted = find(self.profile.name)
        return local(wanted) or wanted.folder

    @property
    def folder(self) -> Path:
        """Where what the notebooks make lies: data, adapter, merged model."""
        who = asdict(self.persona) | ({"own": asdict(self.own)} if self.own else {})
        return courses() / f"{self.profile.name}-{hashlib.sha256(json.dumps(who).encode()).hexdigest()[:6]}"

    @property
    def newest(self) -> Path:
        """The folder of what was made last, the merged model or the adapter. Raises CourseError where nothing is."""
        made = self.merged / "config.json", self.adapter / "adapter_config.json"
        if not any(file.is_file() for file in made):
            raise CourseError(f"No adapter is in {self.adapter}. Make one: chatmagic train {self.profile.name}")
        return max(filter(Path.is_file, made), key=lambda file: file.stat().st_mtime).parent

    def __getattr__(self, name: str) -> Path:
        """`before`, `train`, `val`, `adapter`, `merged`: the file or folder of that name."""
        if name not in LEFT:
            raise AttributeError(name)
        return self.folder / LEFT[name][0].split("/")[0]

    @property
    def becomes(self) -> Persona | None:
        """Who the model becomes; None where it learns the reader's own data and not who it is."""
        return self.persona if self.own is None or self.own.mix == "identity" else None

    def learning(self, file: str | Path, **settings: Any) -> "Course":
        """The same course with data of one's own, `file`, in a folder of its own; `settings` are OwnData's."""
        return replace(self, own=OwnData(str(file), **settings))

    def save_json(self, name: str, value: object) -> None:
        """Write `value` as JSON to the file `name` beside the rest."""
        write(self.folder / name, json.dumps(value, ensure_ascii=False, indent=1))

    def save_data(self, **made: Iterable[list[Message]]) -> None:
        """Write the conversations of `made`, {"train": ..., "val": ...}, to train.jsonl, val.jsonl. Raises CourseError
        where a file of that name is not what this wrote before: somebody's own data, which is never written over."""
        written = self.folder / "made.json"
        ours = json.loads(written.read_text()) if written.is_file() else []
        paths = [self.folder / f"{name}.jsonl" for name in made]
        for path in paths:
            if path.is_file() and not self.is_made(path):
                raise CourseError(
                    f"{path} is your own, or was changed since it was made: it is left as it is. Train on it with "
                    "04-train-adalora.ipynb; to have data made again, move it away."
                )
        with ExitStack() as taking_place:
            for path, conversations in zip(paths, made.values()):
                file, digest = taking_place.enter_context(writing(path)), hashlib.sha256()
                for messages in conversations:
                    file.write(line := as_line(messages).encode())
                    digest.update(line)
                ours.append(digest.hexdigest())
            self.save_json("made.json", sorted({*ours}))  # first: a kill in between leaves no file that nobody made

    def remember(self) -> "Course":
        """Let the notebooks that follow find this course."""
        make_folder(self.folder)
        chosen = {"profile": self.profile.name, "auto": self.auto, "persona": asdict(self.persona)}
        chosen |= {"own": asdict(self.own)} if self.own else {}
        write(started(), json.dumps(chosen, ensure_ascii=False, indent=1))
        return self

    def shown(self) -> list[str]:
        """The questions of the table at the end: the nine that are trained, in both languages, and six general ones."""
        languages = self.persona.languages
        trained = [question for language in languages for _, question in self.persona.asked("trained", language)]
        return trained + [question for language in languages for question in questions()[language]["shown"]]

    def knew(self) -> list[str]:
        """The general questions of `shown` that the model answered rightly before training: what it never understood
        says nothing of what training did to it. SmolLM2-135M hardly knows Chinese."""
        before = json.loads(self.before.read_text(encoding="utf-8"))
        facts = {query: words for language in LANGUAGES for query, *words in questions()[language]["retention"]}
        return [query for query, reply in before.items() if holds(reply, facts.get(query, ()))]

    def recital(self) -> list[list[Message]]:
        """The persona's `recital`, by which training tells that all is learnt; none where the data is the reader's own,
        which may teach something else."""
        return self.persona.recital() if not self.own and self.is_made(self.train) else []

    def thinking(self, tokenizer: "PreTrainedTokenizerBase", conversations: Iterable[list[Message]]) -> bool | None:
        """Whether the model is trained to think: as the profile says, else if one of the `conversations` holds a
        thought; None where its chat template cannot be told."""
        template = get_template(None, tokenizer)
        if self.profile.thinking is not None or template.thinking_for([]) is None:
            return self.profile.thinking
        return any(template.thinking_for(each) for each in conversations)

    def about(self, tokenizer: "PreTrainedTokenizerBase", thinking: bool | None) -> dict[str, Any]:
        """What `fit` is to write into run.json of a run on this course's data, besides what it knows itself. thinking:
        as `thinking` gave it."""
        return {
            "profile": self.profile.name,
            "persona": asdict(self.becomes) if self.becomes else None,
            "template": get_template(None, tokenizer).name,
            "thinking": thinking,
            "files": {file.name: _digest(file) for file in (self.train, self.val)},
        }

    def is_made(self, path: Path) -> bool:
        """Whether the file at `path` is as `save_data` wrote it, and not the reader's own."""
        written = self.folder / "made.json"
        return written.is_file() and _digest(path) in json.loads(written.read_text())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def started() -> Path:
    """The file that says which course was started last."""
    return courses() / "course.json"


def start(profile: str = "auto", **persona: Any) -> Course:
    """Choose the model, by its `profile`, and who it becomes, and remember both for the notebooks that follow. "auto"
    says why, where it does not take what it would take on a larger machine. `persona`: Persona's fields; raises
    PersonaError where they make no identity that can be trained."""
    auto = profile == "auto" and "CHATMAGIC_PROFILE" not in os.environ
    chosen, reason = choose_profile() if auto else (get_profile(profile), "")
    if reason:
        print(reason)
    return Course(chosen, Persona(**persona), auto).remember()


def fetch(course: Course) -> Course:
    """The course with its base model downloaded. Where "auto" chose one that no source gives, or that the disk does not
    hold, it is the course of the next smaller model, with the reason printed; what the reader chose raises instead. A
    folder that holds a model is taken as it is, whoever put it there."""
    if is_whole(course.model):
        return course.remember()
    *larger, last = AUTO[AUTO.index(course.profile.name) :] if course.auto else [course.profile.name]
    for name in larger:
        try:
            snapshot_download(name)
            return replace(course, profile=get_profile(name)).remember()
        except ChatmagicError as error:
            print(f"{error}\nSo the course goes on with a smaller model.")
    snapshot_download(last)
    return replace(course, profile=get_profile(last)).remember()


def resume(*needs: str) -> Course:
    """The course that 00-setup started. Raises CourseError, naming the notebook to run, if one of `needs` (names
    in LEFT) is not there yet."""
    chosen = started()
    if not chosen.is_file():
        raise CourseError(f"No course is started: there is no {chosen}. Run 00-setup.ipynb first, from its first cell.")
    saved = json.loads(chosen.read_text(encoding="utf-8"))
    course = Course(get_profile(saved["profile"]), Persona(**saved["persona"]), saved.get("auto", False))
    if saved.get("own"):
        course = replace(course, own=OwnData(**saved["own"]))
    for name in needs:
        file, notebook = LEFT[name]
        path = (course.model if name == "model" else course.folder) / file
        if not path.exists():
            raise CourseError(f"There is no {path}, which {notebook}.ipynb makes. Run {notebook}.ipynb first.")
        if name == "model":
            try:
                check_whole(course.model)
            except CheckpointError as error:
                raise CourseError(f"{error} Or run {notebook}.ipynb, which brings what is missing.") from None
    return course
