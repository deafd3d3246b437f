"""What `chatmagic doctor` finds: each thing that may be wrong on a machine, what is said of it and what mends it."""

import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from chatmagic import machine
from chatmagic.cli import main
from chatmagic.course import doctor
from chatmagic.course import profile as profiles
from chatmagic.course.doctor import BAD, NOTE, OK, diagnose
from tiny_hub import model, read

NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def machine_without_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "models"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    for name in (
        "PIP_INDEX_URL",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(machine, "has_driver", lambda: False)
    monkeypatch.setattr(doctor, "PORTS", {})
    for module in (doctor, profiles):
        monkeypatch.setattr(module, "gpu_memory", lambda: 0)


def found(what: str, profile: str = NAME) -> doctor.Finding:
    """The last finding about that."""
    return [each for each in diagnose(profile) if each.what == what][-1]


def test_it_says_all_in_three_seconds_without_torch(tmp_path):
    """In a process of its own; with nothing bad, and once more as JSON."""
    code = (
        "import sys; from chatmagic import machine; machine.has_driver = lambda: False\n"
        "from chatmagic.cli import main; status = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'modelscope', 'bitsandbytes'} & set(sys.modules); sys.exit(status)"
    )
    said = []
    for more in ((), ("--json",)):
        began = time.monotonic()
        command = [sys.executable, "-c", code, "doctor", "--profile", NAME, *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and time.monotonic() - began < 3, done.stderr
        said.append(done.stdout)
    assert f"{NAME}: fits this machine" in said[0] and "\nThe course runs here: chatmagic tutorial FOLDER" in said[0]
    report = json.loads(said[1])
    assert report["runs"] is True and {each["state"] for each in report["findings"]} <= {OK, NOTE}
    assert {"what": "profile", "found": f"{NAME}: fits this machine", "state": OK, "mend": ""} in report["findings"]


def test_a_machine_that_cannot_run_the_course_is_an_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 1))
    assert main(["doctor", "--profile", NAME]) == 1
    said = capsys.readouterr().out
    assert "bad  Python" in said and "-> make PYTHON=python3.12" in said and "does not run here" in said
    assert main(["doctor", "--profile", NAME, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["runs"] is False
    assert main(["doctor", "--profile", "qwen-14"]) == 1
    assert "did you mean 'qwen-14b-chat'" in capsys.readouterr().err


def test_a_model_for_gpus_does_not_fit_a_cpu(monkeypatch):
    monkeypatch.setattr(profiles, "ram", lambda: 200 * 10**9)
    monkeypatch.setattr(profiles.shutil, "disk_usage", lambda _: machine.shutil._ntuple_diskusage(10**12, 0, 10**12))
    assert found("profile", "qwen-14b-chat").state == BAD
    assert "needs a GPU: on a CPU" in found("profile", "qwen-14b-chat").found
    monkeypatch.setattr(profiles, "ram", lambda: 24 * 10**9)
    assert "needs 30.3 GB of RAM" in found("profile", "qwen-14b-chat").found, "merging takes more than training"
    assert found("profile", "qwen-14b-chat").mend == "chatmagic doctor --profile auto"
    monkeypatch.setattr(profiles, "ram", lambda: 10**9)
    assert (found("profile", "auto").state, found("profile", "auto").mend) == (BAD, ""), "there is no smaller one"


@pytest.mark.parametrize("gpu", [0, 8 * 10**9])
def test_it_says_what_chatmagic_models_says(monkeypatch, capsys, gpu):
    """Of every profile: in the list, in the rows of one, and here."""
    monkeypatch.setattr(profiles, "gpu_memory", lambda: gpu)
    monkeypatch.setattr(profiles, "ram", lambda: 24 * 10**9)
    monkeypatch.setattr(profiles.shutil, "disk_usage", lambda _: machine.shutil._ntuple_diskusage(10**12, 0, 10**12))
    known = [*profiles.profiles().values()]
    fits = [profile.name for profile in known if doctor._fit(profile).state == OK]
    assert main(["models"]) == 0
    listed, _, others = capsys.readouterr().out.partition("more than this machine has:")
    assert [line.split()[0] for line in listed.splitlines()[2:] if line] == fits and fits
    assert {line.split()[0] for line in others.splitlines() if line} == {each.name for each in known} - set(fits)
    assert [each.name for each in known if ("this machine", "fits") in profiles.all_of(each)] == fits
    assert ("qwen3-1.7b" in fits) is bool(gpu), "NF4 wants a GPU"


@pytest.mark.parametrize(
    "installed, state, mend",
    [
        ("0.1", BAD, "pip install -U 'peft>="),
        (None, BAD, "pip install -U peft"),
        ("99.0", NOTE, "tested with "),
    ],
)
def test_versions(monkeypatch, installed, state, mend):
    real = doctor.version

    def version(package):
        if package == "peft" and installed is None:
            raise doctor.PackageNotFoundError(package)
        return installed if package == "peft" else real(package)

    monkeypatch.setattr(doctor, "version", version)
    assert found("peft").state == state and mend in found("peft").mend
    assert found("ipython").state == OK or "tested with" in found("ipython").mend


def gpu(monkeypatch, cuda="12.8", seen=True, holders=()):
    """A machine with a GPU, for what asks torch and nvidia-smi."""
    import torch

    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (5 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(doctor, "gpu_memory", lambda: 24 * 10**9 * seen)
    monkeypatch.setattr(machine, "_nvidia_smi", lambda what, fields: ["Some GPU"] if what == "gpu" else list(holders))


@pytest.mark.parametrize(
    "cuda, said, mend", [(None, "has no CUDA", "--index-url"), ("13.0", "too old", "newer driver")]
)
def test_a_gpu_that_torch_does_not_see(monkeypatch, cuda, said, mend):
    gpu(monkeypatch, cuda, seen=False)
    finding = found("GPU")
    assert finding.state == NOTE and "found by the driver" in finding.found and said in finding.found
    assert mend in finding.mend


def test_who_holds_the_gpu(monkeypatch):
    gpu(monkeypatch, holders=["4242, python, 19000 MiB", f"{os.getpid()}, python, 1 MiB"])
    rows = [each for each in diagnose(NAME) if each.what == "GPU"]
    assert "5.0 GB free of 24.0" in rows[0].found and rows[0].state == OK
    assert "held by process 4242" in rows[1].found and "kill 4242" in rows[1].mend
    assert rows[2].found.endswith("(this one)") and rows[2].state == OK


@pytest.mark.parametrize("cuda, state", [("12.8", OK), ("11.8", NOTE)])
def test_bitsandbytes_against_cuda(monkeypatch, tmp_path, cuda, state):
    gpu(monkeypatch, cuda)
    for name in (
        "libbitsandbytes_cuda126.so",
        "libbitsandbytes_cuda128.so",
        "libbitsandbytes_cuda130.so",
        "cuda_specs.py",
    ):
        (tmp_path / name).touch()
    real = doctor.find_spec
    fake = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor, "find_spec", lambda name: fake if name == "bitsandbytes" else real(name))
    finding = found("bitsandbytes")
    assert finding.state == state and (
        state == OK or "for CUDA 126, 128, 130, and torch is built with 11.8" in finding.found
    )


@pytest.mark.parametrize("whose", ["nobody's", "another's", "another environment's", "broken", "ours"])
def test_the_kernel(tmp_path, monkeypatch, whose):
    """In environments that are made of one Python, below a folder of a Chinese name."""
    pythons = [tmp_path / "环境" / name / "bin" / "python" for name in ("ours", "another")]
    for python in pythons:
        python.parent.mkdir(parents=True)
        python.symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setattr(doctor.sys, "executable", str(pythons[0]))
    spec = tmp_path / "jupyter/kernels/chatmagic"
    if whose != "nobody's":
        spec.mkdir(parents=True)
        of = {"another's": "/usr/bin/python3", "another environment's": str(pythons[1])}.get(whose, str(pythons[0]))
        (spec / "kernel.json").write_text(
            json.dumps({"argv": [of, "-m", "ipykernel_launcher"]} if whose != "broken" else [])
        )
    finding = found("kernel")
    assert finding.state == (OK if whose == "ours" else NOTE)
    assert whose == "ours" or "-m ipykernel install --user --name chatmagic" in finding.mend


def test_the_letters_of_the_plots_are_there():
    assert found("fonts").state == OK


def test_the_mirror_and_the_proxies_are_shown_without_their_passwords(tmp_path, monkeypatch):
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://me:secret@pip.example/simple\n")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example")
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.example:3128")
    rows = {each.what: each for each in diagnose(NAME)}
    assert rows["pip"].found == "asks https://pip.example/simple"
    assert rows["https_proxy"].found == "http://proxy.example:3128"
    assert "secret" not in str(diagnose(NAME))
    monkeypatch.setenv("https_proxy", "socks5://me:secret@proxy.example:1080")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    finding = found("https_proxy")
    assert finding.state == BAD and "pip install pysocks" in finding.mend and "secret" not in finding.found


def test_hugging_face_told_to_stay_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found("HF_HUB_OFFLINE").mend == "unset HF_HUB_OFFLINE"


def test_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(doctor, "PORTS", {(port := server.getsockname()[1]): "JupyterLab"})
        assert found("port").found == f"{port} (JupyterLab) is taken" and f"--port {port + 1}" in found("port").mend


def test_write_rights_and_the_data_disk(tmp_path, monkeypatch):
    assert found("models").state == found("courses").state == OK
    monkeypatch.setattr(doctor, "AUTODL", tmp_path)
    assert "data disk" not in [each.what for each in diagnose(NAME)]
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(doctor, "AUTODL", tmp_path / "disk")
    assert found("data disk").mend == f"export CHATMAGIC_HOME={tmp_path / 'disk'}"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: mode == os.R_OK)  # root may write everywhere
    assert (found("courses").state, found("courses").mend) == (BAD, "export CHATMAGIC_COURSE=FOLDER, one of your own")
    assert found("models").state == BAD
    assert "data disk" not in [each.what for each in diagnose(NAME)], "what is not to be written is no advice"
    (tmp_path / "models").mkdir()
    assert found("models").state == NOTE, "what is whole in a share is used"


def test_a_model_that_is_not_whole(tmp_path):
    assert found("model").mend == f"chatmagic download {NAME}" and found("model").state == OK
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    for name, content in read(model()).items():
        (folder / name).write_bytes(content)
    assert found("model").found == f"{NAME} is whole, {machine.short(folder)}"
    weights = folder / "model-00002-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert found("model").state == NOTE and f"{weights} is cut short" in found("model").found


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_memory(tmp_path, monkeypatch, version):
    limit = tmp_path / "limit"
    limit.write_text("2000000000\n")
    monkeypatch.setattr(machine, "CGROUPS", [str(tmp_path / "none"), str(limit)][:: 1 if version == 1 else -1])
    assert machine.ram() == 2 * 10**9
    assert "2.0 GB (this container's; the machine has" in found("RAM").found
    limit.write_text(["9223372036854771712", "max"][version - 1])
    assert machine.ram() > 2 * 10**9


def test_a_system_without_sysconf(monkeypatch):
    """As Windows."""
    monkeypatch.delattr(os, "sysconf")
    assert "GB" in dict(machine.report(machine.home()))["RAM"]
