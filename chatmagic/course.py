"""The thread through the notebooks: each runs in a fresh kernel, and finds here what those before it left."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from .download import home
from .errors import ChatmagicError
from .persona import Persona, questions
from .profiles import Profile, get_profile

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


@dataclass(frozen=True)
class Course:
    """One way through the course: which model becomes whom. Another persona or model has a folder of its own."""

    profile: Profile
    persona: Persona

    @property
    def model(self) -> Path:
        """The folder of the base model."""
        return home() / self.profile.name

    @property
    def folder(self) -> Path:
        """Where what the notebooks make lies: data, adapter, merged model."""
        who = hashlib.sha256(json.dumps(asdict(self.persona)).encode()).hexdigest()[:6]
        return home() / "course" / f"{self.profile.name}-{who}"

    def __getattr__(self, name: str) -> Path:
        """`before`, `train`, `val`, `adapter`, `merged`: the file or folder of that name."""
        if name not in LEFT:
            raise AttributeError(name)
        return self.folder / LEFT[name][0].split("/")[0]

    def save_json(self, name: str, value) -> None:
        """Write `value` beside the rest, whole or not at all."""
        path = self.folder / name
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
        part.replace(path)

    def shown(self) -> list[str]:
        """The questions of the table at the end: the nine that are trained, and six general ones."""
        return [question for _, question in self.persona.asked("trained")] + questions()["general"]["shown"]


def start(profile: str = "auto", **persona) -> Course:
    """Choose the model and who it becomes, and remember both for the notebooks that follow."""
    course = Course(get_profile(profile), Persona(**persona))
    course.folder.mkdir(parents=True, exist_ok=True)
    chosen = {"profile": course.profile.name, "persona": asdict(course.persona)}
    path = home() / "course" / "course.json"
    part = path.with_name("course.json.part")
    part.write_text(json.dumps(chosen, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(part, path)
    return course


def resume(*needs: str) -> Course:
    """The course that 00-setup started. Raises CourseError, naming the notebook to run, if one of `needs` (names
    in LEFT) is not there yet."""
    chosen = home() / "course" / "course.json"
    if not chosen.is_file():
        raise CourseError(f"No course is started: there is no {chosen}. Run 00-setup.ipynb first, from its first cell.")
    saved = json.loads(chosen.read_text(encoding="utf-8"))
    course = Course(get_profile(saved["profile"]), Persona(**saved["persona"]))
    for name in needs:
        file, notebook = LEFT[name]
        path = (course.model if name == "model" else course.folder) / file
        if not path.exists():
            raise CourseError(f"There is no {path}, which {notebook}.ipynb makes. Run {notebook}.ipynb first.")
    return course


def before_after(before: dict[str, str], after: dict[str, str]):
    """A pandas DataFrame of the replies: question, before, after."""
    import pandas as pd

    rows = [(question, before[question], after[question]) for question in before]
    return pd.DataFrame(rows, columns=["question", "before", "after"])
