"""The card of a model that was made: its README.md, of what stands beside it on the disk."""

import json
import re
import tomllib
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from ..models.checkpoint import read_json
from .persona import LANGUAGES, Persona
from .profile import Profile, profiles
from .thread import CourseError, resume

ROWS = {
    "alone": "单独问的九个身份问题",
    "after identity": "先问过另一个身份问题",
    "after general": "先问过一般问题",
    "heldout": "没训练过的问法",
    "retained": "原来答得对、还答得对的一般问题",
    "leaked": "一般问题里冒出新身份的（越少越好）",
    "near": "问别人、问别的东西时冒出新身份的（越少越好）",
    "still thinks": "原来会思考、还会思考的",
    "perplexity": "一段没训练过的文字的困惑度",
    "held-out loss": "自己的数据里没训练过的对话上的损失",
}
TABLES = {"zh": "中文", "en": "英文", "own data": "自己的数据"}


class Made(NamedTuple):
    """What is known of a model or an adapter that training left: who it says it is, None where it was taught something
    else; what it was made from; its run.json and evaluation.json, {} without; and how many epochs it was trained, which
    is as long as it took, and not what run.json says was asked for."""

    folder: Path
    persona: Persona | None
    profile: Profile | None
    run: dict[str, Any]
    evaluation: dict[str, Any]
    epochs: int

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
            return Made(folder, course.becomes, course.profile, run, evaluation, epochs)
    persona = Persona(**run["persona"]) if run.get("persona") else None
    return Made(folder, persona, profiles().get(run.get("profile", "")), run, evaluation, epochs)


def write_card(made: Made, kind: str, use: str) -> str:
    """The text of README.md, in Chinese, with the hubs' metadata. kind: what was exported; use: the commands that run
    it."""
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
    lines += ["## 从哪里来", "", f"- 原模型：{made.base or '没有记录'}"]
    lines += [f"- 许可：{licence}。{known['demands']}" if known else "- 许可：同原模型，请照它的要求。"]
    lines += [*_recipe(made), f"- 导出：{kind}，{date.today()}", ""]
    if table := made.evaluation.get("table"):
        lines += ["## 检验", "", "量的是导出以前的模型，贪心解码。", ""]
        for name, after in table["after"].items():
            before = table["before"][name]
            lines += [f"| {TABLES[name]} | 训练前 | 训练后 |", "|---|---|---|"]
            lines += [f"| {ROWS[row]} | {_cell(before[row])} | {_cell(after[row])} |" for row in after]
            lines += [""]
    return "\n".join([*lines, "## 怎么用", "", "```bash", use, "```", ""])


def _recipe(made: Made) -> list[str]:
    run = made.run
    if not run:
        return ["- 数据、配方：没有记录"]
    settings, adapter = run["settings"], run["settings"]["adapter"]
    how = (
        f"AdaLoRA（秩 {adapter['init_r']} 到 {adapter['target_r']}）"
        if "target_r" in adapter
        else f"LoRA（秩 {adapter['r']}）"
    )
    held = (run["model"]["quantization"] or {}).get("bnb_4bit_quant_type") or run["model"]["dtype"]
    digests = {"编码后": run["data"]["train"], "train.jsonl ": run.get("files", {}).get("train.jsonl")}
    digest = next((f"（{what}的 SHA-256：{each[:12]}…）" for what, each in digests.items() if each), "")
    return [
        f"- 数据：{settings['rows']} 段对话{digest}",
        f"- 配方：{how}，{made.epochs} 轮，每轮 {settings['batches']} 批，每批 {settings['batch_size']} 条，"
        f"学习率 {settings['learning_rate'][0]}，原模型以 {held} 训练；"
        f"{run['started'][:10]}，chatmagic {run['versions']['chatmagic']}",
    ]


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "{}/{}".format(*value)
