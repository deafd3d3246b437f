"""The real clients of both hubs against a server that speaks as they do, through a proxy that does what networks do."""

import json
import os
import shutil
import signal
import time
from operator import itemgetter

import pytest

from disk import small_disk
from hub import Hubs, Repository, commit, proxied
from quick import first
from tiny_hub import ID, download, here, model, read, schedule

FOLDER = "org/tiny-model"


def run(proxy, home, *arguments, **more):
    """(exit status, output, error output) of a download."""
    process = download(proxy, home, *arguments, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out.strip(), err


@pytest.fixture
def hubs():
    old, new = model(1, 3000), model(2, 3000)
    return Hubs({ID: Repository({"master": new, "v1.0": old}, {"main": new, "v2.0": old})})


@pytest.mark.parametrize("source", first(1, ["modelscope", "huggingface"]))
def test_only_what_the_course_reads_is_fetched_and_noted(hubs, tmp_path, source):
    files = hubs.repositories[ID].modelscope["master"]
    with proxied(hubs) as proxy:
        status, out, err = run(proxy.replace("//", "//me:secret@"), tmp_path, ID, "--source", source, "--verify")
    assert status == 0 and out == str(tmp_path / FOLDER), err
    assert here(tmp_path / FOLDER) == read(files)
    noted = json.loads((tmp_path / FOLDER / ".complete").read_text())
    assert {name: each["bytes"] for name, each in noted["files"].items()} == {
        name: len(content) for name, content in read(files).items()
    }
    revision = {"modelscope": ("master", ""), "huggingface": ("main", commit(files))}[source]
    assert (noted["model"], noted["source"], noted["revision"], noted["commit"]) == (ID, source, *revision)
    fetched = [path for _, path, _ in hubs.asked if "FilePath" in path or "/resolve/" in path]
    assert len(fetched) == len(read(files)), "each once"
    assert "6 files, 0.00 GB, from http" in err and f"through the proxy {proxy} at" in err and "secret" not in err
    assert "6 files, each as downloaded from" in err and err.count("| ") <= 3 * err.count(ID), "one bar, ours"


@pytest.mark.slow
def test_a_revision_is_the_hubs_own_and_each_has_its_folder(hubs, tmp_path):
    old = read(hubs.repositories[ID].modelscope["v1.0"])
    with proxied(hubs) as proxy:
        assert run(proxy, tmp_path, ID)[0] == 0
        status, out, err = run(proxy, tmp_path, ID, "--revision", "v1.0")
        assert status == 0 and out == f"{tmp_path / FOLDER}@v1.0" and here(tmp_path / f"{FOLDER}@v1.0") == old
        changed = tmp_path / f"{FOLDER}@v1.0/tokenizer.json"
        changed.write_bytes(b"[]" + changed.read_bytes()[2:])
        status, out, err = run(proxy, tmp_path, ID, "--revision", "v1.0", "--verify")
        assert status == 1 and err.endswith(f"rm {changed}; chatmagic download {ID} --revision v1.0\n")
        # what the first hub does not have the second may
        status, out, err = run(proxy, tmp_path, ID, "--revision", "v2.0")
        noted = json.loads((tmp_path / f"{FOLDER}@v2.0/.complete").read_text())
        assert status == 0 and (noted["source"], noted["revision"]) == ("huggingface", "v2.0")
        # and none is taken for another
        status, out, err = run(proxy, tmp_path, ID, "--revision", "v1.0", "--source", "huggingface")
        assert status == 1 and "is there, of modelscope at v1.0; asked for was v1.0 of huggingface" in err
        status, out, err = run(proxy, tmp_path, ID, "--revision", "v3")
        assert status == 1 and "modelscope says: " in err and "huggingface says: " in err and "Traceback" not in err
        assert not (tmp_path / f"{FOLDER}@v3").exists()


def test_what_is_whole_asks_nobody(hubs, tmp_path):
    with proxied(hubs) as proxy:
        run(proxy, tmp_path, ID)
        hubs.asked.clear()
        for more in ((), ("--verify",), ("--source", "local"), ("--source", "modelscope")):
            assert run(proxy, tmp_path, ID, *more)[0] == 0
    assert not hubs.asked


@pytest.mark.parametrize("damage", first(1, ["cut", "gone", "changed"]))
@pytest.mark.parametrize("source", first(1, ["modelscope", "huggingface"]))
def test_a_file_that_was_lost_since_is_fetched_alone(hubs, tmp_path, damage, source):
    name = "model-00002-of-00002.safetensors"
    folder = tmp_path / FOLDER
    with proxied(hubs) as proxy:
        assert run(proxy, tmp_path, ID, "--source", source)[0] == 0
        (folder / "mine.txt").write_text("mine")
        content = (folder / name).read_bytes()
        if damage == "gone":
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content[:-9] if damage == "cut" else content[:-9] + b"123456789")
        if damage == "changed":
            status, _, err = run(proxy, tmp_path, ID, "--verify")
            assert status == 1 and f"{name} has the checksum" in err and f"rm {folder / name}; chatmagic" in err
            (folder / name).unlink()
        hubs.asked.clear()
        status, _, err = run(proxy, tmp_path, ID, "--verify", "--source", source)
    assert status == 0, err
    assert (folder / name).read_bytes() == content and (folder / "mine.txt").read_text() == "mine"
    fetched = [path for _, path, _ in hubs.asked if "FilePath" in path or "/resolve/" in path]
    assert len(fetched) == 1 and name in fetched[0]


@pytest.mark.parametrize("source", first(1, ["huggingface", "modelscope"]))
@pytest.mark.slow
def test_half_a_file_is_gone_on_with_after_a_kill(tmp_path, source):
    """The line is cut in the middle of a shard; the process is killed before it can try again."""
    files = model(3, 25_000_000)  # huggingface_hub writes ten megabytes at a time
    hubs = Hubs({ID: Repository({"master": files}, {"main": files})})
    shard = "model-00001-of-00002.safetensors"
    with proxied(hubs, lambda url: "stall" if shard in url else "") as proxy:
        process = download(proxy, tmp_path, ID, "--source", source, HF_HUB_DOWNLOAD_TIMEOUT="30")
        staging, deadline = tmp_path / "org/.tiny-model.download", time.monotonic() + 30
        while not any(path.stat().st_size > 9_000_000 for path in staging.rglob(f"{shard}*") if path.is_file()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    hubs.asked.clear()
    with proxied(hubs) as proxy:
        status, _, err = run(proxy, tmp_path, ID, "--source", source)
    assert status == 0 and here(tmp_path / FOLDER) == read(files), err
    again = [part for _, path, part in hubs.asked if shard in path]  # more than one where a busy machine was too slow
    assert again and all(int(part.removeprefix("bytes=").split("-")[0]) > 9_000_000 for part in again)


@pytest.mark.parametrize("source", first(1, ["modelscope", "huggingface"]))
@pytest.mark.parametrize("times", first(1, [2, 1]))
def test_a_wrong_file_is_fetched_again_once(hubs, tmp_path, source, times):
    seen = []

    def mischief(url):
        wrong = "model-00001" in url
        seen.extend([url] * wrong)
        return "corrupt" if wrong and len(seen) <= times else ""

    with proxied(hubs, mischief) as proxy:
        status, _, err = run(proxy, tmp_path, ID, "--source", source)
    assert len(seen) == 2
    if times == 1:
        assert status == 0, err
    else:
        assert status == 1 and "model-00001-of-00002.safetensors has the checksum" in err
        assert "when it was fetched again" in err and not (tmp_path / FOLDER).exists()
        assert not (tmp_path / "org/.tiny-model.download/model-00001-of-00002.safetensors").exists()


@pytest.mark.slow
def test_two_processes_take_turns(hubs, tmp_path):
    with proxied(hubs, lambda url: "delay") as proxy:
        both = [download(proxy, tmp_path, ID) for _ in range(2)]
        said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("this one waits" in err for _, err in said) == 1
    fetched = [path for _, path, _ in hubs.asked if "FilePath" in path]
    assert len(fetched) == len({*fetched}) == 6
    assert [path.name for path in (tmp_path / "org").iterdir()] == ["tiny-model"]


def test_what_somebody_else_put_there_is_used_in_place(hubs, tmp_path):
    """A folder without a manifest, and the caches of both clients, closed to writing; half of one is no model."""
    files = hubs.repositories[ID].modelscope["master"]
    places = {
        "a teacher's": tmp_path / "share" / FOLDER,
        "modelscope's": tmp_path / ".cache/modelscope/models/org--tiny-model/snapshots/master",
        "modelscope's of old": tmp_path / ".cache/modelscope/hub/models/org/tiny-model",
        "huggingface's": tmp_path / f".cache/huggingface/hub/models--org--tiny-model/snapshots/{commit(files)}",
    }
    refs = tmp_path / ".cache/huggingface/hub/models--org--tiny-model/refs"
    for whose, folder in places.items():
        folder.mkdir(parents=True)
        for name, content in read(files).items():
            (folder / name).write_bytes(content)
        home = tmp_path / ("share" if whose == "a teacher's" else "empty")
        if whose == "huggingface's":
            refs.mkdir()
            (refs / "main").write_text(commit(files))
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with proxied(hubs) as proxy:
            status, out, err = run(proxy, tmp_path, ID, CHATMAGIC_HOME=str(home))
        assert (status, out) == (0, str(folder)) and not hubs.asked, (whose, err)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        weights = folder / "model-00001-of-00002.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        if whose == "a teacher's":
            with proxied(hubs) as proxy:
                status, out, err = run(proxy, tmp_path, ID, CHATMAGIC_HOME=str(home))
            assert status == 1 and f"{weights} is cut short" in err and "Nothing is written over it" in err
        shutil.rmtree(folder)


@pytest.mark.slow
def test_what_is_nowhere_says_how_to_carry_it_over(hubs, tmp_path):
    with proxied(hubs, lambda url: "503 for all") as proxy:
        status, _, err = run(proxy, tmp_path, ID)
        asked = len(hubs.asked)
        assert run(proxy, tmp_path, ID, "--source", "local")[0] == 1 and len(hubs.asked) == asked
    assert status == 1 and f"On a machine with a network: chatmagic download {ID} --any-machine" in err
    assert f"to {tmp_path / FOLDER} here" in err and [*(tmp_path / "org").iterdir()] == []


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(tmp_path):
    files = model(4, 3_000_000)
    hubs = Hubs({ID: Repository({"master": files}, {"main": files})})
    (small := tmp_path / "small").mkdir()
    with small_disk(small, "5m") as mounted, proxied(hubs) as proxy:
        if not mounted:
            pytest.skip("mounting a small disk wants root")
        status, _, err = run(proxy, tmp_path, ID, CHATMAGIC_HOME=str(small))
    assert status == 1 and "needs 0.01 GB more at" in err and "CHATMAGIC_HOME names another disk: " in err
    assert not [path for _, path, _ in hubs.asked if "FilePath" in path or "/resolve/" in path]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_schedules(tmp_path, seed):
    """Two hundred of them: benchmarks/download.py."""
    assert schedule(seed, tmp_path) in ("whole", "refused")


OTHER = {"model_type": "chatglm", "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMModel"}}
QUANTISED = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}


@pytest.mark.parametrize(
    "config, status, said",
    first(
        1,
        [
            (
                OTHER,
                1,
                "chatmagic: %s asks for a model of type 'chatglm', which transformers does not have, and for its own",
            ),
            (
                {"model_type": "mixtral", "num_local_experts": 8},
                0,
                "%s is a mixture of experts: they are not quantised",
            ),
            (QUANTISED, 0, "%s is published quantised (mxfp4): no adapter can be merged into it."),
        ],
        of=itemgetter(1),
    ),
)
@pytest.mark.slow
def test_what_nothing_here_reads_is_refused_before_its_weights(tmp_path, config, status, said):
    """The config comes first: of another architecture nothing else, and what another is not good for is told."""
    files = model(1, 3000) | {"config.json": json.dumps(config).encode()}
    hubs = Hubs({ID: Repository({"master": files}, {"main": files})})
    with proxied(hubs) as proxy:
        ended, _, err = run(proxy, tmp_path, ID, "--source", "huggingface")
    assert ended == status and said % ID in err
    fetched = [path for _, path, _ in hubs.asked if "/resolve/" in path]
    assert "/config.json" in fetched[0] and len(fetched) == (1 if status else len(read(files)))
    assert (tmp_path / FOLDER).exists() is (status == 0)
