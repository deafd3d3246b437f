"""What was trained, as others take it: a GGUF file, a folder for Ollama, or a LoRA adapter; each with its card."""

import json
from pathlib import Path

from ..files import new_folder, remove, write
from ..machine import short
from ..models.adapter import FACTORS
from ..models.checkpoint import read_json, weight_files
from ..models.gguf import ExportError, write_gguf
from ..models.plain_lora import NothingToFold, adalora_to_lora
from ..models.provenance import BASE_HERE, PROVENANCE
from .card import Made, find_made, write_card
from .converter import find_converter
from .hubs import HUBS, without_password

EXPORTED = "export.json"  # says that this wrote the folder, and may write it again
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for


def export_model(source: Path, to: str, kind: str = "q8_0", output: Path | None = None) -> Path:
    """Export a merged model, `to` "gguf" or "ollama" with its matrices as `kind` (see `models.gguf.MATRIX_TYPES`), or
    an adapter, to "lora"; returns `output`, a folder, by default beside the source, which is there once it is complete.

    An older export in its place goes; anything else stays. Raises ExportError for a source that cannot become that,
    MergeError as `adalora_to_lora`, WriteError.
    """
    is_adapter = (source / "adapter_config.json").is_file()
    if is_adapter != (to == "lora") or not is_adapter and not (source / "config.json").is_file():
        wanted, mend = ("an adapter", "chatmagic train") if to == "lora" else ("a merged model", "chatmagic merge")
        raise ExportError(f"{source} is not the folder of {wanted}, which --to {to} takes. Make one: {mend}")
    made = find_made(source)
    output = output or source.absolute().parent / f"export-{to}{'' if to == 'lora' else f'-{kind}'}"
    if source.resolve().is_relative_to(output.expanduser().resolve()):  # the older export, which goes, has the source
        raise ExportError(f"{output} is where {source} lies, and would take its place. Name another: --output FOLDER")
    size = sum(file.stat().st_size for file in weight_files(source)) if to != "lora" else 0
    with new_folder(output, needed=2 * size, over=(output / EXPORTED).is_file()) as folder:
        use = _lora(made, folder) if to == "lora" else _gguf(made, folder, kind, to == "ollama")
        write(folder / "README.md", write_card(made, to if to == "lora" else f"{to} {kind}", use))
        write(folder / EXPORTED, json.dumps({"to": to, "kind": kind, "source": made.name}))
    return output


def push(folder: Path, hub: str, id: str) -> str:
    """Put an export on a hub, "modelscope" or "huggingface", as OWNER/NAME; returns its address. Raises ExportError
    with what the hub answered; the export stays."""
    chosen = next(each for each in HUBS if each.name == hub)
    try:
        return chosen.push(id, folder)
    except Exception as error:  # both clients raise their HTTP library's, their own and OSError
        said = without_password(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise ExportError(
            f"{hub} did not take {id}: {said} If it does not know you: {chosen.login}. The export is in "
            f"{short(folder)}."
        ) from None


def _gguf(made: Made, folder: Path, kind: str, ollama: bool) -> str:
    """Fill the folder; returns how to use it."""
    from transformers import AutoTokenizer

    from ..models.ollama import write_modelfile
    from ..prompts.templates import get_template

    tokenizer, file = AutoTokenizer.from_pretrained(made.folder), f"{made.name}-{kind}.gguf"
    if ollama:  # first: it may be that Ollama cannot, and the file takes minutes
        generation = read_json(made.folder / "generation_config.json")
        write(folder / "Modelfile", write_modelfile(file, tokenizer, generation))
    stops = get_template(None, tokenizer).stop_token_ids(tokenizer)
    write_gguf(made.folder, folder / file, kind, find_converter(), made.name, stops)
    if ollama:
        return f"ollama create {made.name} -f Modelfile\nollama run {made.name}"
    return f"llama-server -m {file} --jinja --temp 0"


def _lora(made: Made, folder: Path) -> str:
    """As `_gguf`: of an AdaLoRA adapter, or one whose names differ from its base's files, what vLLM reads; others as
    they are."""
    try:
        files = adalora_to_lora(made.folder, folder / "lora")
    except NothingToFold:
        files = made.folder
    for name in ("adapter_config.json", *FACTORS, PROVENANCE):
        if (files / name).is_file():
            write(folder / name, (files / name).read_bytes())
    remove(folder / "lora")
    config = read_json(folder / "adapter_config.json")
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    least = next((rank for rank in RANKS if rank >= max(ranks)), max(ranks))
    base = made.base or "BASE_MODEL"
    if made.profile and made.profile.packed:  # was unpacked here: nobody can download it
        base = made.profile.name
    elif made.profile:
        write(folder / "adapter_config.json", json.dumps(config | {"base_model_name_or_path": base}, indent=2))
        noted = read_json(folder / PROVENANCE) | {BASE_HERE: made.profile.name}  # so that it is found here, too
        write(folder / PROVENANCE, json.dumps(noted))
    return f"vllm serve {base} --enable-lora --max-lora-rank {least} --lora-modules {made.name}=."
