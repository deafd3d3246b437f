"""The models of the course, from `profiles.toml`, and whether this machine can hold one."""

import os
import shutil
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..errors import ChatmagicError
from ..files import nearest_existing
from ..machine import GB, gpu_memory, home, ram, room
from ..text import did_you_mean, fit

CARDS = {"8 GB": 8 * GB, "12 GB": 12 * GB, "T4": 15.8 * GB, "24 GB": 24 * GB, "48 GB": 48 * GB, "80 GB": 80 * GB}
THINKS = {"no": "no", "told": "as told", "always": "always"}
AUTO = ("baichuan2-7b-chat", "qwen2.5-coder-0.5b-instruct", "smollm2-135m")  # the first is for GPUs


class ProfileError(ChatmagicError):
    """A profile that does not exist, or that this machine cannot hold."""


@dataclass(frozen=True)
class Profile:
    """One table of `profiles.toml`, whose head explains the fields."""

    name: str
    id: str
    source: str
    revision: str
    bytes: int
    licence: str
    quantize: str
    why: dict[str, str] = field(hash=False)
    conversations: int
    samples: int
    epochs: int
    batch_size: int
    learning_rate: float
    init_r: int
    target_r: int
    lora_alpha: int
    lora_dropout: float
    general: float
    thinks: str
    sees: bool = False
    embedded: int | None = None
    architecture: str | None = None
    thinking: bool | None = None
    huggingface: str | None = None
    file: str | None = None
    packed: int = 0
    sha256: str = ""
    wheels: dict[str, str] = field(default_factory=dict, hash=False)

    def rate(self, method: str) -> float:
        """The peak learning rate for "adalora" or "lora", which wants a fifth (`benchmarks/recipe.py`): AdaLoRA starts
        with factors of 0.02 and singular values of 0."""
        return self.learning_rate / (5 if method == "lora" else 1)

    @property
    def disk(self) -> int:
        """Bytes that the whole course takes: the base, the merged model, and a gigabyte for adapter and states; what
        sees is a gigabyte or so more, twice."""
        return 2 * self.bytes + (3 if self.sees else 1) * GB

    @property
    def memory(self) -> int:
        """Bytes of GPU memory (without a GPU: of RAM) that a machine should have to train, roughly: weights,
        activations, adapter, and what else runs there."""
        nf4 = 0.35 if self.embedded is None else 0.26 + 0.74 * self.embedded / self.bytes
        return int(self.bytes * (nf4 if self.quantize == "nf4" else 2.4)) + 3 * GB

    @property
    def memory_merged(self) -> int:
        """The same for merging and for talking to what was merged, which is 16 bit."""
        return self.bytes + 2 * GB


ROOMY = 15 * GB
"""Of GPU memory, for what a profile's table `gpu` says: the embedded model reserves 12.2 (`benchmarks/course.py`)."""


@cache
def profiles() -> dict[str, Profile]:
    """Every profile by its name."""
    tables = tomllib.loads(Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8"))
    default = tables.pop("default")
    otherwise = {name: table.pop("gpu", {}) for name, table in tables.items()}
    if gpu_memory() >= ROOMY:
        tables = {name: table | otherwise[name] for name, table in tables.items()}
    return {name: Profile(name, **default | table) for name, table in tables.items()}


def get_profile(name: str = "auto") -> Profile:
    """The profile of that name. "auto" is CHATMAGIC_PROFILE if set, else what `choose_profile` chooses. Raises
    ProfileError, with the nearest names, for one that is unknown.
    """
    name = os.environ.get("CHATMAGIC_PROFILE", name) if name == "auto" else name
    if name == "auto":
        return choose_profile()[0]
    if name not in profiles():
        within = [known for known in profiles() if name.lower() in known]
        meant = did_you_mean(name, within or profiles(), cutoff=0.3) or "."
        raise ProfileError(f"There is no profile {name!r}{meant} All of them: chatmagic models.")
    return profiles()[name]


def choose_profile() -> tuple[Profile, str]:
    """The first of AUTO with which every notebook fits this machine, and in a sentence why none before it is taken, ""
    for the first. Without a GPU the first is the embedded model; the last is taken whatever there is."""
    reasons = ""
    for name in (AUTO if gpu_memory() else AUTO[1:])[:-1]:
        profile = profiles()[name]
        problems = unfit(profile)
        if not problems:
            break
        reasons += f"{name} needs {'; it needs '.join(problems)}. "
    else:
        profile = profiles()[AUTO[-1]]
    return profile, reasons and f"{reasons}The course takes {profile.name}."


def smallest_card(needed: int) -> str:
    """The name of the smallest usual graphics card with so many bytes."""
    return next((name for name, memory in CARDS.items() if needed <= memory), "several")


def overview() -> list[str]:
    """Lines of a table of all profiles, those whose every notebook fits this machine first."""

    def row(profile: Profile) -> str:
        needed = [f"{size / GB:.1f} GB" for size in (profile.bytes, profile.memory, profile.memory_merged)]
        cells = [*needed, smallest_card(max(profile.memory, profile.memory_merged)), THINKS[profile.thinks]]
        return line(profile.name, *cells, profile.licence)

    def line(name: str, *cells: str) -> str:
        return fit(name, 31) + "".join(fit(cell, 9) for cell in cells[:-1]) + cells[-1]

    head = line("profile", "16 bit", "train", "merged", "card", "thinks", "licence")
    fits = {profile: not unfit(profile) for profile in profiles().values()}
    here, others = ([row(profile) for profile, does in fits.items() if does is want] for want in (True, False))
    return [head, "", *here, *(["", "more than this machine has:", ""] if others else []), *others]


def all_of(profile: Profile) -> list[tuple[str, str]]:
    """(what, said) rows of one profile."""
    how = {"nf4": "NF4", "int8": "int8", "no": "16 bit"}[profile.quantize]
    size = f"{profile.bytes / GB:.1f} GB in 16 bit" + (", by its published shape" if profile.architecture else "")
    problems = unfit(profile)
    return [
        ("ModelScope", profile.id if profile.source == "modelscope" else "-"),
        ("Hugging Face", profile.huggingface or "-"),
        ("PyPI", ", ".join(profile.wheels) or "-"),
        ("licence", profile.licence),
        ("architecture", profile.architecture or "-"),
        ("weights", size + ("; what it sees or hears with is downloaded too, and not used" if profile.sees else "")),
        ("thinks", {"no": "no", "told": "or not, as it is told to", "always": "before every answer"}[profile.thinks]),
        ("trains", f"in {how}, in {profile.memory / GB:.1f} GB: {smallest_card(profile.memory)} or more"),
        (
            "merged",
            f"in 16 bit, in {profile.memory_merged / GB:.1f} GB: {smallest_card(profile.memory_merged)} or more",
        ),
        ("disk", f"{profile.disk / GB:.1f} GB for the whole course"),
        ("this machine", "fits" if not problems else f"lacks {'; and '.join(problems)}"),
        (
            "steps",
            f"{profile.epochs} epochs of {profile.samples} conversations, learning rate {profile.learning_rate:g}",
        ),
    ]


def check_machine(profile: Profile, folder: Path) -> None:
    """Raise ProfileError, before a byte is downloaded, if this machine has not the disk for a course with this profile,
    or the memory that training takes."""
    if problems := lacking(profile, folder, profile.memory):
        fits = [name for name, other in profiles().items() if not unfit(other, folder.with_name(name))]
        advice = f"Fits here: {', '.join(fits)}." if fits else "Free some disk, and run this again."
        other = f"To have it all the same, for another machine: chatmagic download {profile.name} --any-machine"
        raise ProfileError(f"{profile.name} needs {'; it needs '.join(problems)}. {advice} {other}")


def unfit(profile: Profile, folder: Path | None = None) -> list[str]:
    """What this machine lacks for every step of the course with the profile, merging included; [] where it fits.
    `folder`: where its model is or will be, if not with the others."""
    problems = lacking(profile, folder or home() / profile.name, max(profile.memory, profile.memory_merged))
    if profile.quantize != "no" and not gpu_memory():
        problems.append(f"a GPU: on a CPU, {profile.quantize.upper()} unpacks every weight at every step")
    return problems


def lacking(profile: Profile, folder: Path, needed: int) -> list[str]:
    """What this machine lacks for the profile: of `needed` bytes of memory, and of disk where `folder` is or will
    be."""
    where, memory = ("GPU memory", gpu_memory()) if gpu_memory() else ("RAM", ram())
    problems = []
    if memory < needed:
        problems.append(f"{needed / GB:.1f} GB of {where}, and there are {memory / GB:.1f}")
    here = (folder, folder.with_name(f".{folder.name}.download"))  # the second where a download was broken off
    present = sum(path.stat().st_size for place in here for path in place.rglob("*") if path.is_file())
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < profile.disk - present:
        problems.append(
            f"{(profile.disk - present) / GB:.1f} GB of disk at {folder}, and {free / GB:.1f} are free "
            f"({room(profile.disk)})"
        )
    return problems
