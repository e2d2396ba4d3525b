"""Checkpoints on disk: committed in one step, verified, bounded in number, and never run when they are read."""

from __future__ import annotations

import enum
import errno
import io
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_MODEL, small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from made_choices import VOCAB, choices
from ranks import run_ranks

from sip_engine.config.schema import ObjectiveConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy import checkpoint_tensors
from sip_engine.policy.checkpoint import (
    CheckpointState,
    CheckpointWriter,
    load_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
    stored_dtype,
)
from sip_engine.policy.checkpoint_files import (
    DamagedCheckpoint,
    complete_checkpoints,
    newest_intact,
    prune,
    remove_stale,
    verify,
    write_manifest,
)
from sip_engine.policy.policy import Policy
from sip_engine.utils.errors import CheckpointError

CFG = small_run(model=SMALL_MODEL.model_dump() | {"precision": "fp32"})


def state_of(step: int) -> CheckpointState:
    return CheckpointState(step, CFG.model, VOCAB, {"stream": {}, "config": {}, "elapsed": 1.0})


@pytest.fixture(scope="module")
def policy(mesh: Mesh) -> Policy:
    return Policy(CFG, VOCAB, mesh)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["the quick brown fox jumps over the lazy dog"] * 20
    return Tokenizer.train(texts, 290, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def written(policy: Policy, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("written"), policy, None, state_of(4), tokenizer, keep=1)


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoints" / written.name))


def train_once(policy: Policy, seed: int) -> None:
    objective = open_objective(ObjectiveConfig(kind="rf_nll"))
    update(policy, None, [objective.row_of_choice(c) for c in choices(seed, 2)], objective)


# Names and numbers


def fake(folder: Path, name: str) -> Path:
    """A folder that looks complete."""
    path = folder / name
    (path / "sharded").mkdir(parents=True)
    for file in ("state.json", "tokenizer.model", "sharded/a"):
        (path / file).write_text(name)
    write_manifest(path)
    return path


def test_only_our_names_are_ours(tmp_path: Path) -> None:
    """A user's copy of a checkpoint is neither the newest nor counted, pruned or cleaned."""
    for name in (
        "step_00000002",
        "step_00000004",
        "step_24.bak",
        "step_00000009.damaged",
        "step_9",
        "step_0000000x",
    ):
        fake(tmp_path, name)
    for name in (".step_00000006.tmp", ".step_00000002.old.tmp", ".step_6.tmp", ".mine.tmp"):
        (tmp_path / name).mkdir()
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]
    remove_stale(tmp_path)
    prune(tmp_path, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".mine.tmp",
        ".step_6.tmp",
        "step_00000004",
        "step_00000009.damaged",
        "step_0000000x",
        "step_24.bak",
        "step_9",
    ]


@pytest.mark.parametrize(
    ("keep", "keep_every", "stay"),
    [(2, 0, [9, 10]), (1, 5, [5, 10]), (2, 4, [4, 8, 9, 10]), (20, 0, list(range(1, 11)))],
)
def test_the_newest_and_every_nth_stay(tmp_path: Path, keep: int, keep_every: int, stay: list[int]) -> None:
    for step in range(1, 11):
        fake(tmp_path, f"step_{step:08d}")
    prune(tmp_path, keep=keep, keep_every=keep_every)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert [int(p.name[5:]) for p in complete_checkpoints(tmp_path)] == stay


def test_everything_is_on_the_disk_before_the_name_and_old_ones_go_last(
    policy: Policy, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder is synced under its temporary name; then the rename, the parent's sync, the pruning."""
    save_checkpoint(tmp_path, policy, None, state_of(1), tokenizer, keep=1)
    events: list[tuple[str, str]] = []
    real_fsync, real_rename, real_rmtree = os.fsync, Path.rename, shutil.rmtree

    def fsync(handle: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        real_fsync(handle)

    def rename(self: Path, target: Path) -> Path:
        events.append(("rename", str(self)))
        return real_rename(self, target)

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).exists():
            events.append(("remove", str(path)))
        real_rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    final = save_checkpoint(tmp_path, policy, None, state_of(2), tokenizer, keep=1)
    monkeypatch.undo()
    temporary = tmp_path / ".step_00000002.tmp"
    named = events.index(("rename", str(temporary)))
    before = {path for what, path in events[:named] if what == "sync"}
    inside = {str(temporary / p.relative_to(final)) for p in (final, *final.rglob("*"))}
    assert inside <= before
    assert events[named + 1] == ("sync", str(tmp_path))
    assert not [path for what, path in events[: named + 2] if what == "remove"]
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


def test_a_checkpoint_of_the_same_step_is_replaced(
    policy: Policy, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = save_checkpoint(tmp_path, policy, None, state_of(1), tokenizer, keep=1)
    (first / "manifest.json").unlink()
    again = save_checkpoint(tmp_path, policy, None, state_of(1), tokenizer, keep=1)
    verify(again)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


# Damage


KINDS = ["manifest.json", "state.json", "tokenizer.model", "sharded/.metadata", "sharded/common.pt"]
KINDS += ["sharded/metadata.json", "sharded/__0_0.distcp", "sharded/__0_*.distcp"]  # the last of these


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flip", "cut", "unlink"])
def test_every_damage_is_seen(copy: Path, kind: str, damage: Callable[[Path], None]) -> None:
    file = max(copy.glob(kind))
    damage(file)
    with pytest.raises(CheckpointError, match=f"{copy.name}|{file.relative_to(copy)}") as seen:
        read_state(copy)
    assert "\n" not in str(seen.value)


def test_a_damaged_newest_is_set_aside(mesh: Mesh, copy: Path) -> None:
    folder = copy.parent
    newer = Path(shutil.copytree(copy, folder / "step_00000006"))
    newest = Path(shutil.copytree(copy, folder / "step_00000008"))
    cut(newer / "state.json")
    flip(newest / "sharded/__0_0.distcp")
    path, faults = newest_intact(folder, mesh)
    assert path == copy
    assert ["__0_0.distcp: missing or damaged" in faults[0], "state.json: missing" in faults[1]] == [
        True,
        True,
    ]
    assert sorted(p.name for p in folder.iterdir()) == [
        "step_00000004",
        "step_00000006.damaged",
        "step_00000008.damaged",
    ]


def test_the_only_checkpoint_is_not_set_aside(mesh: Mesh, copy: Path) -> None:
    cut(copy / "state.json")
    with pytest.raises(DamagedCheckpoint, match=r"state\.json: missing or damaged"):
        newest_intact(copy.parent, mesh)
    assert copy.is_dir()


def test_a_file_that_the_manifest_does_not_list_is_refused(copy: Path) -> None:
    (copy / "sharded" / "more.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"more\.pt: manifest\.json does not list it"):
        read_state(copy)
    (copy / "sharded" / "more.pt").unlink()
    (copy / "link").symlink_to(copy.parent)
    with pytest.raises(CheckpointError, match=r"link: manifest\.json does not list it"):
        read_state(copy)


def test_a_manifest_that_leaves_the_folder_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["../other/state.json"] = manifest["state.json"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"'\.\./other/state\.json' is no name inside the folder"):
        read_state(copy)


# Odd types


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "format",
    "step",
    "model",
    "vocab_size",
    "has_reference",
    "distributed_optimizer",
    "dtype",
    "run",
    None,
]


@given(key=st.sampled_from(KEYS), value=JSON)
@settings(max_examples=80)
def test_odd_types_in_state_json_are_one_line(written: Path, key: str | None, value: Any) -> None:
    """Also at the top (key None); whatever is accepted has the types it should have."""
    from sip_engine.policy.checkpoint_state import read_state_file

    folder = written.parent / "odd"
    folder.mkdir(exist_ok=True)
    state = json.loads((written / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(value if key is None else state | {key: value}))
    try:
        read = read_state_file(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert type(read.step) is type(read.vocab_size) is int and type(read.run) is dict


def test_a_newer_format_is_refused_with_the_remedy(copy: Path) -> None:
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"format": 3}))
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"format 3, this version reads up to 2; .* install that one"):
        read_state(copy)


def test_the_first_format_is_read(policy: Policy, copy: Path) -> None:
    state = json.loads((copy / "state.json").read_text())
    del state["has_average"]
    (copy / "state.json").write_text(json.dumps(state | {"format": 1}))
    write_manifest(copy)
    assert load_checkpoint(copy, policy, None, CFG.model, VOCAB).step == 4


# Malicious files


class Runs:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.folder),))


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def index_of(path: Path) -> Any:
    return pickle.loads((path / "sharded/.metadata").read_bytes())


def with_code(path: Path, marker: Path) -> bytes:
    index = index_of(path)
    index.planner_data = Runs(marker)
    return pickle.dumps(index)


def with_outside_file(path: Path, marker: Path) -> bytes:
    index = index_of(path)
    for place in index.storage_data.values():
        place.relative_path = f"../../../{path.name}/sharded/{place.relative_path}"
    return pickle.dumps(index)


def with_objects(path: Path, marker: Path) -> bytes:
    """Every weight said to be a pickled object; the files hold such objects."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    index, content = index_of(path), torch_file(Runs(marker))
    place = next(iter(index.storage_data.values()))
    place.offset, place.length = 0, len(content)
    (path / "sharded" / place.relative_path).write_bytes(content)
    names = list(index.state_dict_metadata)
    index.state_dict_metadata = {name: BytesStorageMetadata() for name in names}
    index.storage_data = {MetadataIndex(name): place for name in names}
    return pickle.dumps(index)


class Attribute:
    """Pickles as an attribute of something an index may name."""

    def __reduce__(self) -> Any:
        return getattr, (torch.Size, "numel")


def with_attribute(path: Path, marker: Path) -> bytes:
    index = index_of(path)
    index.planner_data = Attribute()
    return pickle.dumps(index)


MALICIOUS: dict[str, tuple[str, Callable[[Path, Path], bytes], str]] = {
    "a pickle for an index": (
        "sharded/.metadata",
        lambda _, m: pickle.dumps(Runs(m)),
        "asks for posix.mkdir",
    ),
    "a pickle in the index": ("sharded/.metadata", with_code, "asks for posix.mkdir"),
    "an attribute in the index": (
        "sharded/.metadata",
        with_attribute,
        "asks for numel of <class 'torch.Size'>",
    ),
    "an index of other files": ("sharded/.metadata", with_outside_file, "not the checkpoint's"),
    "objects for tensors": ("sharded/.metadata", with_objects, "cannot be loaded"),
    "a pickle for tensors": ("sharded/__0_0.distcp", lambda _, m: torch_file(Runs(m)), "cannot be loaded"),
    "a pickle for the common part": (
        "sharded/common.pt",
        lambda _, m: torch_file(Runs(m)),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_nothing_runs_when_a_checkpoint_is_read(
    policy: Policy, copy: Path, tmp_path: Path, case: str
) -> None:
    """The manifest is made to agree, as whoever wrote the rest would. Both loaders: a run's, and everyone else's."""
    file, content, words = MALICIOUS[case]
    (copy / file).write_bytes(content(copy, tmp_path / "ran"))
    write_manifest(copy)
    loaders: list[Callable[[], object]] = [lambda: load_checkpoint(copy, policy, None, CFG.model, VOCAB)]
    loaders.append(lambda: load_weights(copy, policy.model, CFG.model, VOCAB))
    if file == "sharded/.metadata":
        loaders.append(lambda: stored_dtype(copy))
    for load in loaders:
        with pytest.raises(CheckpointError, match=words) as seen:
            load()
        assert "\n" not in str(seen.value)
    assert not (tmp_path / "ran").exists()


class AsOlderPythons(pickle.Pickler):
    """Writes a member of an enumeration as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, obj: object) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_an_index_of_an_older_python_is_read(policy: Policy, copy: Path) -> None:
    buffer = io.BytesIO()
    AsOlderPythons(buffer).dump(index_of(copy))
    assert b"getattr" in buffer.getvalue()
    (copy / "sharded/.metadata").write_bytes(buffer.getvalue())
    write_manifest(copy)
    load_checkpoint(copy, policy, None, CFG.model, VOCAB)
    assert stored_dtype(copy) == next(policy.model.parameters()).dtype


def test_the_malicious_files_would_have_run(copy: Path, tmp_path: Path) -> None:
    """Read as torch reads an index, one of them runs: the tests above test something."""
    pickle.loads(with_code(copy, tmp_path / "ran"))
    assert (tmp_path / "ran").is_dir()


def moments_of(policy: Policy) -> list[torch.Tensor]:
    optimizer: Any = policy.optimizer
    parts = [part.optimizer for part in optimizer.chained_optimizers]
    return [state["exp_avg"] for part in parts for state in part.state.values()]


@pytest.mark.parametrize("is_distributed", [False, True])
def test_a_run_goes_on_with_the_rates_and_decay_of_now(
    mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path, is_distributed: bool
) -> None:
    """And with the moments of then: Megatron-core 0.19 looks for groups of the same rates."""
    parallel = CFG.parallel.model_copy(update={"distributed_optimizer": is_distributed})
    then = CFG.model_copy(update={"parallel": parallel})
    other = then.optimizer.model_copy(update={"lr": 7e-5, "min_lr_ratio": 0.5, "weight_decay": 0.3})
    policy, later = (
        Policy(then, VOCAB, mesh),
        Policy(then.model_copy(update={"optimizer": other}), VOCAB, mesh),
    )
    train_once(policy, 3)
    path = save_checkpoint(tmp_path / "checkpoints", policy, None, state_of(1), tokenizer, keep=1)
    load_checkpoint(path, later, None, CFG.model, VOCAB)
    for group in later.optimizer.param_groups:
        assert (group["max_lr"], group["min_lr"]) == (7e-5, 3.5e-5)
        assert group["weight_decay"] == 0.3 * group["wd_mult"]
    moments = [moments_of(one) for one in (policy, later)]
    assert len(moments[0]) == len(moments[1]) > 0 and any(moment.any() for moment in moments[0])
    assert all(map(torch.equal, *moments))


# Full disks


class FullDisk:
    """Stands in for the writing of a tensor; the disk is full after `room` of them."""

    def __init__(self, room: int) -> None:
        self.room, self._real = room, checkpoint_tensors._write_item

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._real(*args, **kwargs)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(
    policy: Policy,
    tokenizer: Tokenizer,
    mesh: Mesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
) -> None:
    writer = CheckpointWriter(tmp_path, mesh, keep=1, asynchronous=asynchronous)
    first = writer.save(policy, None, state_of(1), tokenizer)
    writer.finish()
    monkeypatch.setattr(checkpoint_tensors, "_write_item", FullDisk(3))
    with pytest.raises(
        CheckpointError, match=r"step_00000002: cannot be saved \(No space left on device\); free"
    ):
        writer.save(policy, None, state_of(2), tokenizer)
        writer.finish()
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    verify(first)
    writer.save(policy, None, state_of(3), tokenizer)  # and it goes on when there is room again
    writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("file", ["common.pt", "metadata.json", ".metadata", "tokenizer.model", "state.json"])
def test_a_disk_that_is_full_for_a_small_file(
    policy: Policy, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    real = io.open

    def full(name: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(name, int) and file in Path(name).name and ".step_" in str(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(name))
        return real(name, *args, **kwargs)

    monkeypatch.setattr(io, "open", full)
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(CheckpointError, match=r"cannot be saved \(.*No space left on device"):
        save_checkpoint(tmp_path, policy, None, state_of(2), tokenizer, keep=1)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def full_disk_on_the_second_rank(folder: Path) -> None:
    mesh = start_mesh()
    policy = Policy(
        CFG.model_copy(update={"parallel": CFG.parallel.model_copy(update={"distributed_optimizer": True})}),
        VOCAB,
        mesh,
    )
    tokenizer = Tokenizer.train(["a b c d e f g"] * 20, 270, folder / f"tokenizer-{mesh.rank}.model")
    save_checkpoint(folder / "checkpoints", policy, None, state_of(1), tokenizer, keep=1)
    verify(folder / "checkpoints" / "step_00000001", part=mesh.rank, parts=mesh.size)
    if mesh.rank == 1:
        checkpoint_tensors.TensorSave.write = lambda self: FullDisk(0)()  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(folder / "checkpoints", policy, None, state_of(2), tokenizer, keep=1)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000001"]


def test_every_process_learns_of_a_full_disk(tmp_path: Path) -> None:
    run_ranks("test_checkpoint:full_disk_on_the_second_rank", 2, tmp_path)


# Saving beside the training


class Gate:
    """Holds every write of a tensor back until it is opened."""

    def __init__(self) -> None:
        self.opened, self._real = threading.Event(), checkpoint_tensors._write_item

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.opened.wait(60)
        return self._real(*args, **kwargs)


def test_an_asynchronous_save_is_of_its_moment(
    policy: Policy, tokenizer: Tokenizer, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates made while it is written do not reach it; it is committed by a later poll; a second one waits."""
    train_once(policy, 1)
    want = save_checkpoint(tmp_path / "blocking", policy, None, state_of(7), tokenizer, keep=1)
    gate = Gate()
    monkeypatch.setattr(checkpoint_tensors, "_write_item", gate)
    writer = CheckpointWriter(tmp_path / "beside", mesh, keep=5, asynchronous=True)
    path = writer.save(policy, None, state_of(7), tokenizer)
    train_once(policy, 2)
    writer.poll()
    assert not path.exists()
    gate.opened.set()
    second = writer.save(policy, None, state_of(8), tokenizer)
    assert path.is_dir()
    writer.finish()
    verify(second)
    ours, theirs = (tensors_of(p, mesh) for p in (path, want))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    later = tensors_of(second, mesh)
    assert not all(torch.equal(ours[name], later[name]) for name in ours)


def tensors_of(path: Path, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Parameters and Adam's state of a checkpoint."""
    policy = Policy(CFG, VOCAB, mesh)
    load_checkpoint(path, policy, None, CFG.model, VOCAB)
    found = {name: p.detach() for name, p in policy.model.named_parameters()}
    for number, state in enumerate(policy.optimizer.chained_optimizers[0].optimizer.state.values()):  # type: ignore
        found |= {f"{number}.{name}": value for name, value in state.items()}
    return found


def test_the_copy_in_memory_is_one(policy: Policy, tokenizer: Tokenizer, mesh: Mesh, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, mesh, keep=1, asynchronous=True)
    places = []
    for step in (1, 2):
        writer.save(policy, None, state_of(step), tokenizer)
        writer.finish()
        assert writer._copies is not None
        places.append({key: buffer.data_ptr() for key, buffer in writer._copies._buffers.items()})
    assert places[0] == places[1] and places[0]
    parameters = sum(p.nbytes for p in policy.model.parameters())
    assert 2.9 * parameters < writer.host_bytes < 4.1 * parameters, "weights, masters and Adam's two moments"
