"""llama.cpp's own converter, out of the source distribution of llama-cpp-python on PyPI. Nothing of it is installed."""

import tarfile
from pathlib import Path

from ..files import FULL, new_folder, remove
from ..machine import home
from ..models.checkpoint import sha256
from ..models.gguf import CONVERTER, ExportError
from .download import pip_download

RELEASE = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ARCHIVE = f"llama_cpp_python-{RELEASE}.tar.gz"
INSIDE = f"llama_cpp_python-{RELEASE}/vendor/llama.cpp/"
NEEDED = ("conversion/", "gguf-py/gguf/", CONVERTER, "LICENSE")


def find_converter() -> Path:
    """The folder of llama.cpp's converter, unpacked below `home()` on the first call: 77 MB are downloaded, 2 MB stay.
    Raises ExportError, with what to type, where it cannot be had."""
    folder = home() / f"llama.cpp-{RELEASE}"
    if (folder / CONVERTER).is_file():
        return folder
    with new_folder(folder, over=folder.is_dir()) as staging:
        archive = home() / ARCHIVE
        if archive.is_file() and sha256(archive) != SHA256:
            raise ExportError(f"{archive} is not the file of that name on PyPI, or not all of it. Copy it again.")
        if not archive.is_file():
            archive = staging / ARCHIVE
            try:
                pip_download(f"llama-cpp-python=={RELEASE}", SHA256, staging, source=True)
            except OSError as error:
                if error.errno in FULL:
                    raise
                raise ExportError(
                    f"llama.cpp's converter could not be downloaded: {error} On a machine with a network: pip download "
                    f"--no-deps --no-binary llama-cpp-python llama-cpp-python=={RELEASE}. Copy {ARCHIVE} to {home()} "
                    "here, and run this again."
                ) from None
        with tarfile.open(archive) as packed:
            for member in packed:
                name = member.name.removeprefix(INSIDE)
                if member.isfile() and member.name != name and name.startswith(NEEDED):
                    member.name = name
                    packed.extract(member, staging, filter="data")
        remove(staging / ARCHIVE)
    return folder
