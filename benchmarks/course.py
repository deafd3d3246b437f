"""What the course costs: time and peak memory of each notebook, each in a kernel of its own, whose start counts.

    python benchmarks/course.py [--notebooks 00 01 ...] [--language en] [--profile NAME] [--beside 0] [--memory GB]
                                [--no-bf16] [--executed FOLDER] [--json FILE]

The model is fetched first, and not timed. beside: so many processes that are busy. On a GPU, memory holds PyTorch to
so many GB of it, and who asks for its size is told no more; --no-bf16 lets it be one without bfloat16, as a T4 is.
Memory is the kernel's largest resident set and what PyTorch reserved of the GPU. executed: where the notebooks go,
with their outputs; what they leave lies where a reader's would then, and otherwise in a temporary folder.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import nbformat
from about import about

from chatmagic.course import GB, start
from chatmagic.course.running import execute
from chatmagic.course.thread import fetch
from chatmagic.machine import gpu_memory

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ASK = "import torch; print('RESERVED', torch.cuda.max_memory_reserved())"


def busy() -> None:
    while True:
        pass


def first_cell(memory: float | None, bf16: bool) -> str:
    """What a smaller or older GPU is, said to the real one."""
    lines = ["import torch"]
    if memory:
        lines += [
            "import chatmagic.machine",
            f"size = int({memory} * 10**9)",
            f"torch.cuda.set_per_process_memory_fraction(size / {gpu_memory()})",
            "chatmagic.machine.gpu_memory = lambda: size",
            "torch.cuda.mem_get_info = lambda *_: (size - torch.cuda.memory_reserved(), size)",
        ]
    if not bf16:
        lines += [
            "torch.cuda.is_bf16_supported = lambda *_, **__: False",
            "torch.cuda.get_device_capability = lambda *_: (7, 5)",
        ]
    return "\n".join(lines)


def run(path: Path, before: str | None, executed: Path | None, answer: multiprocessing.Queue) -> None:
    """In a process of its own, whose one child is the kernel."""
    notebook = nbformat.read(path, as_version=4)
    if before is not None:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
        notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    began = time.perf_counter()
    execute(notebook, path.parent, dict(os.environ))
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "memory": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}
    if before is not None:
        found["gpu"] = int(notebook.cells[-1].outputs[0].text.split()[-1])
        notebook.cells = notebook.cells[1:-1]
    if executed:
        executed.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, executed / path.name)
    answer.put(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebooks", nargs="+", default=["00", "01", "02", "03", "04", "05", "06"])
    parser.add_argument("--language", default="zh", choices=("zh", "en"))
    parser.add_argument("--profile", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--beside", type=int, default=0)
    parser.add_argument("--memory", type=float)
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--executed", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    beside = [multiprocessing.Process(target=busy, daemon=True) for _ in range(args.beside)]
    for process in beside:
        process.start()
    before = first_cell(args.memory, not args.no_bf16) if gpu_memory() else None
    found = {}
    notebooks = NOTEBOOKS if args.language == "zh" else NOTEBOOKS / args.language
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CHATMAGIC_PROFILE"] = args.profile
        if not args.executed:
            os.environ["CHATMAGIC_COURSE"] = folder
        fetch(start(args.profile))
        for path in (path for name in args.notebooks for path in sorted(notebooks.glob(f"{name}-*.ipynb"))):
            answer = multiprocessing.Queue()
            process = multiprocessing.Process(target=run, args=(path, before, args.executed, answer))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{path.name} failed.")
            found[path.stem] = each = answer.get()
            gpu = f", {each['gpu'] / GB:.1f} GB of the GPU" if "gpu" in each else ""
            print(f"{path.stem:20} {each['seconds']:6.0f} s, {each['memory'] / GB:.1f} GB{gpu}", flush=True)
    total = sum(each["seconds"] for each in found.values())
    print(f"{'all':20} {total:6.0f} s, {max(each['memory'] for each in found.values()) / GB:.1f} GB")
    if args.json:
        result = {
            "language": args.language,
            "profile": args.profile,
            "beside": args.beside,
            "memory": args.memory,
            "bf16": not args.no_bf16,
        }
        result |= {**about("torch", "transformers", "peft"), "notebooks": found}
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
