"""The card of a model that was made: its README.md, of what stands beside it on the disk."""

import json
import re
import tomllib
from contextlib import suppress
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..models.checkpoint import read_json
from .persona import LANGUAGES, Persona
from .profile import Profile, profiles
from .thread import CourseError, resume


@cache
def words() -> dict[str, Any]:
    """The parsed `card.toml`, language -> its words."""
    return tomllib.loads(Path(__file__).with_name("card.toml").read_text("utf-8"))


class Made(NamedTuple):
    """What is known of a model or an adapter that training left: who it says it is, None where it was taught something
    else; what it was made from; its run.json and evaluation.json, {} without; how many epochs it was trained, which is
    as long as it took, and not what run.json says was asked for; and the language of the course that made it."""

    folder: Path
    persona: Persona | None
    profile: Profile | None
    run: dict[str, Any]
    evaluation: dict[str, Any]
    epochs: int
    language: str = "zh"

    @property
    def name(self) -> str:
        """What it is called where a name is of ASCII letters: the persona's English name or, where that has none, its
        folder's."""
        said = [self.persona.english_name] if self.persona else []
        said = [re.sub("[^a-z0-9.]+", "-", each.lower()).strip("-.") for each in (*said, self.folder.resolve().name)]
        return next(filter(None, said), "model")

    @property
    def base(self) -> str:
        """The hub's name of what it was made from; of what lies in a folder elsewhere the folder's; "" where nothing
        says it."""
        if self.profile:
            return self.profile.id
        adapter = read_json(self.folder / "adapter_config.json")
        said = self.run.get("model", {}).get("name") or adapter.get("base_model_name_or_path") or ""
        elsewhere = said.startswith("~") or Path(said).is_absolute()
        return Path(said).name if elsewhere else said.partition("@")[0]


def find_made(folder: Path) -> Made:
    """What lies in the folder of an adapter, or beside that of a merged model, as the course leaves it."""
    adapter = folder if (folder / "adapter_config.json").is_file() else folder.parent / "adapter"
    run, evaluation = read_json(adapter / "run.json"), read_json(adapter.parent / "evaluation.json")
    history = adapter / "history.csv"
    epochs = len(history.read_text("utf-8").splitlines()[1:]) if history.is_file() else 0
    with suppress(CourseError):
        course = resume()
        if course.folder.resolve() == folder.resolve().parent:
            return Made(folder, course.becomes, course.profile, run, evaluation, epochs, course.persona.language)
    persona = Persona(**run["persona"]) if run.get("persona") else None
    language = persona.language if persona else "zh"
    return Made(folder, persona, profiles().get(run.get("profile", "")), run, evaluation, epochs, language)


def write_card(made: Made, kind: str, use: str) -> str:
    """The text of README.md, in the language of the persona, with the hubs' metadata. kind: what was exported; use: the
    commands that run it."""
    said = words()[made.language]
    licence = made.profile.licence if made.profile else None
    known = tomllib.loads(Path(__file__).with_name("licences.toml").read_text("utf-8")).get(licence or "", {})
    persona = made.persona
    head = {
        "base_model": made.base or None,
        "license": known.get("id"),
        "license_name": licence if known.get("id") == "other" else None,
        "language": [*LANGUAGES] if persona else None,
        "pipeline_tag": "text-generation",
        "library_name": "peft" if kind == "lora" else "gguf",
        "tags": ["chatmagic", "self-cognition"],
    }
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items() if value), "---"]
    lines += ["", f"# {persona.name if persona else made.name}", ""]
    if persona:
        lines += [f"> {answer}" for _, (answer,) in persona.conversation] + [""]
    demands = said["licence"].format(licence, known["demands"][made.language]) if known else said["licence_of_base"]
    origin = [said["base"].format(made.base or said["unknown"]), demands, *_recipe(made, said)]
    lines += [f"## {said['where']}", "", *(f"- {each}" for each in origin)]
    lines += [f"- {said['export'].format(kind, date.today())}", ""]
    if table := made.evaluation.get("table"):
        lines += [f"## {said['check']}", "", said["checked"], ""]
        for name, after in table["after"].items():
            before = table["before"][name]
            lines += [f"| {said['tables'][name]} | {said['before']} | {said['after']} |", "|---|---|---|"]
            lines += [f"| {said['rows'][row]} | {_cell(before[row])} | {_cell(after[row])} |" for row in after]
            lines += [""]
    return "\n".join([*lines, f"## {said['use']}", "", "```bash", use, "```", ""])


def _recipe(made: Made, said: dict[str, Any]) -> list[str]:
    run = made.run
    if not run:
        return [said["no_run"]]
    settings, adapter = run["settings"], run["settings"]["adapter"]
    digests = {"encoded": run["data"]["train"], "file": run.get("files", {}).get("train.jsonl")}
    digest = (said["digest"].format(what=said[what], digest=each[:12]) for what, each in digests.items() if each)
    recipe = said["recipe"].format(
        how=said["adalora" if "target_r" in adapter else "lora"].format(**adapter),
        epochs=made.epochs,
        batches=settings["batches"],
        batch_size=settings["batch_size"],
        rate=settings["learning_rate"][0],
        held=(run["model"]["quantization"] or {}).get("bnb_4bit_quant_type") or run["model"]["dtype"],
        began=run["started"][:10],
        version=run["versions"]["chatmagic"],
    )
    return [said["data"].format(rows=settings["rows"], digest=next(digest, "")), recipe]


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "{}/{}".format(*value)
