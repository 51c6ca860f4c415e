# ruff: noqa: NPY002 (the global NumPy generator is what is saved)
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlloss.loop import state as state_module
from rlloss.loop.checkpoint import (
    has_checkpoint,
    optimizer_tensors,
    read_checkpoint,
    restore_model,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    write_checkpoint,
)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False

    def raw(x: Tensor) -> Tensor:
        return x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    return torch.equal(raw(a), raw(b))


def all_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(same_bits(a[name], b[name]) for name in a)


class Shard(Tensor):
    """Stands for DTensor and its like, whose own memory is a part of them."""


TENSORS = {
    "zero_dim": lambda: torch.tensor(-0.0),
    "step": lambda: torch.tensor(7, dtype=torch.int64),
    "bool": lambda: torch.tensor([True, False]),
    "bfloat16": lambda: torch.randn(5).bfloat16(),
    "float16": lambda: torch.randn(3).half(),
    "float64": lambda: torch.randn(2, 3, dtype=torch.float64),
    "uint8": lambda: torch.arange(256, dtype=torch.uint8),
    "non_finite": lambda: torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45]),
    "nan_payload": lambda: torch.tensor([0x7FC12345, -0x00000001], dtype=torch.int32).view(torch.float32),
    "transposed": lambda: torch.randn(3, 4).t(),
    "strided": lambda: torch.randn(10)[::3],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "empty": lambda: torch.empty(0, 3),
    "empty_too": lambda: torch.empty(2, 0, dtype=torch.int16),
    "parameter": lambda: nn.Parameter(torch.randn(2)),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(1, dtype=torch.complex64).conj().imag,  # one element, so that it is contiguous
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_survives_bit_for_bit(tmp_path: Path, name: str) -> None:
    tensor = TENSORS[name]()
    back, info = read_checkpoint(write_checkpoint(tmp_path / "c", {name: tensor, "other": torch.ones(1)}, {}))
    assert same_bits(back[name], tensor)
    assert list(back) == [name, "other"]
    assert info == {}


def test_no_tensors_at_all_survive(tmp_path: Path) -> None:
    assert read_checkpoint(write_checkpoint(tmp_path / "c", {}, {"step": 1})) == ({}, {"step": 1})


def test_an_interrupted_write_leaves_a_checkpoint(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path / "c")
    write_checkpoint(tmp_path / "c", {}, {"step": 1})
    assert has_checkpoint(tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / ".c.old")  # between the writer's two renames
    assert has_checkpoint(tmp_path / "c")
    assert read_checkpoint(tmp_path / "c") == ({}, {"step": 1})


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.randn(30, 30)
    views = {"row": weight[3], "rows": weight[:10], "columns": weight.t(), "bits": weight.view(torch.int32)}
    empty = {"no rows": weight[:0], "no columns": weight[:, :0], "nothing": torch.empty(0)}
    tensors = {"embed": nn.Parameter(weight), "head": weight, **views, **empty}
    folder = write_checkpoint(tmp_path / "c", tensors, {})
    back, _ = read_checkpoint(folder)
    assert all_same_bits(tensors, back)
    assert back["head"] is back["embed"]
    back["row"].zero_()  # a view is a tensor of its own after reading
    assert same_bits(back["embed"], weight)
    size = (folder / "tensors.safetensors").stat().st_size
    assert 3 * weight.nbytes < size < 4 * weight.nbytes  # embed, columns, bits and some rows, but no head


def test_info_comes_back_as_it_was(tmp_path: Path) -> None:
    info = {
        "float": 0.1 + 0.2,
        "inf": float("inf"),
        "big": 2**200,
        "none": None,
        "text": "ü\u2028\ud800",
        "tuple": (1, (2.0, [3, ()])),
        "int keys": {1: {"a": (True,)}, -2: "b", (3, 4): []},
        "$tuple": [1],
        "reserved": [{"$tuple": [1]}, {"$dict": [[1, 2]]}],
        "empty": {},
    }
    assert repr(read_checkpoint(write_checkpoint(tmp_path / "c", {}, info))[1]) == repr(info)
    assert json.loads((tmp_path / "c" / "checkpoint.json").read_text())["version"] == 1


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.ones(2), r"info\['a'\]\[1\]\['b'\] is of type Tensor.*put it into `tensors`"),
        (np.int64(3), "of type int64, which JSON cannot hold; convert"),
        ({1, 2}, "of type set"),
        (Path("x"), "of type PosixPath"),
    ],
)
def test_info_that_json_cannot_hold_is_refused_by_its_path(tmp_path: Path, value: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        write_checkpoint(tmp_path / "c", {}, {"a": [0, {"b": value}]})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.ones(2).as_subclass(Shard), "plain dense tensor, got Shard; gather it first"),
        (torch.eye(2).to_sparse(), "got torch.sparse_coo on cpu"),
        (torch.empty(2, device="meta"), "on meta"),
        (torch.zeros(2, dtype=torch.complex128), "no torch.complex128"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_tensor_that_cannot_be_stored_is_refused_by_its_name(tmp_path: Path, tensor: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        write_checkpoint(tmp_path / "c", {"x": tensor}, {})
    assert os.listdir(tmp_path) == []


def test_extra_files_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    def extra(path: Path) -> None:
        (path / "model").mkdir()
        (path / "model" / "note.txt").write_text("new")

    folder = write_checkpoint(tmp_path / "a" / "b", {}, {}, extra=extra)
    assert (folder / "model" / "note.txt").read_text() == "new"
    write_checkpoint(folder, {}, {"step": 2})
    assert sorted(os.listdir(folder)) == ["checkpoint.json", "tensors.safetensors"]  # replaced, not merged
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(ValueError, match=r"extra wrote checkpoint\.json"):
        write_checkpoint(folder, {}, {}, extra=lambda path: (path / "checkpoint.json").touch())


def test_raising_extra_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", {"x": torch.ones(2)}, {"step": 1})

    def extra(path: Path) -> None:
        (path / "half").write_text("written")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, {"x": torch.zeros(2)}, {"step": 2}, extra=extra)
    tensors, info = read_checkpoint(folder)
    assert info == {"step": 1}
    assert tensors["x"].tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["c"]


def test_writer_killed_at_any_moment_leaves_one_whole_checkpoint(tmp_path: Path) -> None:
    # The script forks a writer for every file-system event of a write and kills it just before that event.
    script = """
        import os, signal, sys
        from pathlib import Path
        import torch
        from rlloss.loop.checkpoint import read_checkpoint, write_checkpoint

        folder = Path(sys.argv[1])
        written = lambda step: ({"x": torch.full((1000,), step)}, {"step": step})
        extra = lambda path: (path / "note").write_text("note")
        left = [1000000]

        def kill(event, args):
            if event in {"open", "os.mkdir", "os.rename", "os.chmod", "os.rmdir", "os.remove", "shutil.rmtree"}:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        write_checkpoint(folder, *written(0), extra=extra)
        seen, kills, step = [], 0, 0
        while True:
            step += 1
            child = os.fork()
            if child == 0:
                left[0] = kills
                write_checkpoint(folder, *written(step), extra=extra)
                os._exit(0)
            is_done = os.waitpid(child, 0)[1] == 0
            tensors, info = read_checkpoint(folder)
            assert info["step"] in (step - 1, step) and tensors["x"].eq(info["step"]).all(), (kills, info)
            seen.append(info["step"] == step)
            if is_done:
                break
            write_checkpoint(folder, *written(step), extra=extra)
            assert os.listdir(folder.parent) == [folder.name], os.listdir(folder.parent)
            kills += 1
        assert seen == sorted(seen) and kills > 15, seen
        print(kills, seen.index(True))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kills, first_new = map(int, done.stdout.split())
    assert 0 < first_new < kills


def test_crash_between_the_renames_is_reported_and_healed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path / "c", {}, {"step": 1})
    rename = os.rename

    def broken(source: Path, target: Path) -> None:
        if target.name == "c":
            raise OSError("disk on fire")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="disk on fire"):
        write_checkpoint(folder, {}, {"step": 2})
    monkeypatch.undo()
    assert not folder.exists()
    assert read_checkpoint(folder)[1] == {"step": 1}
    assert "a write to" in caplog.text
    write_checkpoint(folder, {}, {"step": 3})
    assert os.listdir(tmp_path) == ["c"]
    assert read_checkpoint(folder)[1] == {"step": 3}


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(os.fstat(descriptor).st_ino)

    def noted_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append("rename")

    def extra(path: Path) -> None:
        (path / "model").mkdir()
        (path / "model" / "note").touch()
        (path / "link").symlink_to("gone")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    folder = write_checkpoint(tmp_path / "c", {}, {}, extra=extra)
    paths = [folder, *(path for path in folder.rglob("*") if not path.is_symlink())]
    assert len(paths) == 5
    assert sorted(path.stat().st_ino for path in paths) == sorted(x for x in events[:5] if isinstance(x, int))
    assert events[5:] == ["rename", tmp_path.stat().st_ino]


def test_checkpoint_is_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = write_checkpoint(tmp_path / "c", {"x": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_folder_with_other_content_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds no checkpoint but \['thesis.tex'\]"):
        write_checkpoint(tmp_path, {}, {})
    with pytest.raises(ValueError, match="is a file"):
        write_checkpoint(tmp_path / "thesis.tex", {}, {})
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_link_to_a_checkpoint_is_followed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "real", {}, {"step": 1})
    (tmp_path / "latest").symlink_to(folder)
    write_checkpoint(tmp_path / "latest", {}, {"step": 2})
    assert (tmp_path / "latest").is_symlink()
    assert read_checkpoint(folder)[1] == {"step": 2}


def test_reading_what_is_no_checkpoint_teaches(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "runs" / "step-10", {"x": torch.ones(3)}, {})
    with pytest.raises(FileNotFoundError, match="does not exist; did you mean 'step-10'"):
        read_checkpoint(tmp_path / "runs" / "step10")
    with pytest.raises(ValueError, match=r"pass one of its checkpoints \['step-10'\]"):
        read_checkpoint(tmp_path / "runs")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a model, which transformers reads"):
        read_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_checkpoint(folder / "checkpoint.json")
    path = folder / "checkpoint.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(ValueError, match="version 99, this rlloss reads 'rlloss checkpoint' version 1"):
        read_checkpoint(folder)
    path.write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"checkpoint.json is damaged"):
        read_checkpoint(folder)
    path.write_text(json.dumps(content)[:-5])
    with pytest.raises(ValueError, match=r"checkpoint.json is damaged"):
        read_checkpoint(folder)
    path.write_text(json.dumps(content | {"tensors": {"x": "y"}}))
    with pytest.raises(ValueError, match=r"tensors.safetensors is damaged: 'y'"):
        read_checkpoint(folder)
    path.write_text(json.dumps(content))
    file = folder / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"tensors.safetensors is damaged"):
        read_checkpoint(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"tensors.safetensors is damaged"):
        read_checkpoint(folder)


def tiny(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Tanh(), nn.Linear(width, 1))


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 6, bias=False))
    model[1].weight = model[0].weight
    one = torch.ones(3)[::2][:1]  # contiguous, with a stride of 2
    model.register_buffer("one", one)
    model.register_buffer("same", one)
    return model


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95)),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw_foreach_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "weight_decay": 0.3}, {"params": p[1:], "lr": 0.02}], betas=(0.8, 0.9)
    ),
}
SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),  # its state has int keys
    "warmup": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    for _ in range(3):
        x = torch.randn(5, 3) + random.random() + np.random.rand()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**model.state_dict(), **optimizer_tensors(optimizer)[0], **rng_tensors()[0]}


@pytest.mark.parametrize("scheduling", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, name: str, scheduling: str) -> None:
    model = tiny()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    scheduler = SCHEDULERS[scheduling](optimizer)
    random.seed(1)
    random.gauss(0, 1)  # leaves a second draw in the generator's state
    np.random.seed(2)
    np.random.randn()
    steps(model, optimizer, scheduler)
    state, rest = optimizer_tensors(optimizer)
    rng, rng_rest = rng_tensors()
    parts = {"model": model.state_dict(), "optimizer": state, "rng": rng}
    tensors = {f"{part}/{key}": x for part, entries in parts.items() for key, x in entries.items()}
    info = {"optimizer": rest, "rng": rng_rest, "scheduler": scheduler.state_dict()}
    write_checkpoint(tmp_path / "c", tensors, info)
    steps(model, optimizer, scheduler)
    expected = everything(model, optimizer)
    drawn = random.gauss(0, 1), np.random.randn(), torch.randn(2).tolist()
    groups = optimizer.state_dict()["param_groups"], scheduler.get_last_lr()

    tensors, info = read_checkpoint(tmp_path / "c")

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}/"): x for key, x in tensors.items() if key.startswith(f"{name}/")}

    fresh = tiny()
    optimizer = OPTIMIZERS[name](list(fresh.parameters()))
    scheduler = SCHEDULERS[scheduling](optimizer)
    restore_model(fresh, part("model"))
    restore_optimizer(optimizer, part("optimizer"), info["optimizer"])
    scheduler.load_state_dict(info["scheduler"])
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    restore_rng(part("rng"), info["rng"])
    steps(fresh, optimizer, scheduler)
    assert all_same_bits(expected, everything(fresh, optimizer))
    assert drawn == (random.gauss(0, 1), np.random.randn(), torch.randn(2).tolist())
    assert repr(groups) == repr((optimizer.state_dict()["param_groups"], scheduler.get_last_lr()))


def trained(model: nn.Module, name: str = "adamw", input_shape: tuple[int, ...] = (5, 3)) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    model(torch.randn(*input_shape)).square().mean().backward()
    optimizer.step()
    return optimizer


def test_restored_optimizer_shares_no_memory_with_the_tensors() -> None:
    model = tiny()
    tensors, info = optimizer_tensors(trained(model))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    restore_optimizer(optimizer, tensors, info)
    optimizer.step()
    assert all_same_bits(tensors, kept)
    assert not all_same_bits(optimizer_tensors(optimizer)[0], kept)


def test_state_in_higher_precision_than_its_parameter_is_not_rounded() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = torch.randn(3)  # float32, as mixed-precision optimisers keep it
    tensors, info = optimizer_tensors(optimizer)
    other = torch.optim.SGD([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], lr=0.1, momentum=0.9)
    restore_optimizer(other, tensors, info)
    assert all_same_bits(optimizer_tensors(other)[0], tensors)


def test_state_keeps_the_strides_of_its_parameter(tmp_path: Path) -> None:
    def conv() -> nn.Module:
        model = nn.Conv2d(3, 4, 3)
        model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
        return model

    model = conv()
    tensors, info = optimizer_tensors(trained(model, input_shape=(1, 3, 5, 5)))
    stride = tensors["state.0.exp_avg"].stride()
    assert stride == next(model.parameters()).stride() != tensors["state.0.exp_avg"].contiguous().stride()
    write_checkpoint(tmp_path / "c", tensors, info)
    optimizer = OPTIMIZERS["adamw"](list(conv().parameters()))
    restore_optimizer(optimizer, *read_checkpoint(tmp_path / "c"))
    restored, _ = optimizer_tensors(optimizer)
    assert all_same_bits(restored, tensors)
    assert restored["state.0.exp_avg"].stride() == stride


def test_learning_rate_that_is_a_tensor_survives(tmp_path: Path) -> None:
    optimizer = torch.optim.Adam(tiny().parameters(), lr=torch.tensor(0.1))
    folder = write_checkpoint(tmp_path / "c", *optimizer_tensors(optimizer))
    other = torch.optim.Adam(tiny().parameters(), lr=torch.tensor(0.3))
    restore_optimizer(other, *read_checkpoint(folder))
    assert same_bits(other.param_groups[0]["lr"], torch.tensor(0.1))


def test_optimizer_of_nested_state_survives(tmp_path: Path) -> None:
    def lbfgs() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 1)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    model, optimizer = lbfgs()
    x = torch.randn(5, 3)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    tensors, info = optimizer_tensors(optimizer)
    write_checkpoint(tmp_path / "c", tensors, info)
    back, back_info = read_checkpoint(tmp_path / "c")
    _, other = lbfgs()
    restore_optimizer(other, back, back_info)
    again, again_info = optimizer_tensors(other)
    assert all_same_bits(again, tensors)
    assert repr(again_info) == repr(info)


def test_restoring_another_optimizer_names_the_first_mismatch() -> None:
    tensors, info = optimizer_tensors(trained(tiny()))
    parameters = list(tiny().parameters())
    with pytest.raises(ValueError, match="saved optimizer is AdamW, got SGD"):
        restore_optimizer(OPTIMIZERS["sgd"](parameters), tensors, info)
    with pytest.raises(ValueError, match=r"parameters per group is \[4\], got \[1, 3\]"):
        restore_optimizer(OPTIMIZERS["groups"](parameters), tensors, info)
    with pytest.raises(ValueError, match=r"parameter 0 was saved as \[4, 3\] torch.float32 and is \[5, 3\]"):
        restore_optimizer(OPTIMIZERS["adamw"](list(tiny(5).parameters())), tensors, info)
    with pytest.raises(ValueError, match=r"parameter 0 .* is \[4, 3\] torch.float64 in this"):
        restore_optimizer(OPTIMIZERS["adamw"](list(tiny().double().parameters())), tensors, info)
    optimizer = OPTIMIZERS["adamw"](parameters)
    with pytest.raises(ValueError, match=r"the checkpoint has no 'state\.1\.exp_avg'; did you mean"):
        restore_optimizer(optimizer, {k: v for k, v in tensors.items() if k != "state.1.exp_avg"}, info)
    with pytest.raises(ValueError, match="the checkpoint's 'momentum' has no place here"):
        restore_optimizer(optimizer, {**tensors, "momentum": torch.ones(1)}, info)
    assert optimizer.state_dict()["state"] == {}


def test_restoring_another_model_names_the_first_mismatch() -> None:
    tensors = tiny().state_dict()
    with pytest.raises(ValueError, match=r"'0.weight' was saved as \[4, 3\] torch.float32 and is \[5, 3\]"):
        restore_model(tiny(5), tensors)
    with pytest.raises(ValueError, match=r"'0.weight' .* and is \[4, 3\] torch.bfloat16 in this model"):
        restore_model(tiny().bfloat16(), tensors)
    with pytest.raises(ValueError, match=r"the checkpoint has no '4.weight'; did you mean"):
        restore_model(nn.Sequential(*tiny(), nn.Linear(1, 1)), tensors)
    with pytest.raises(ValueError, match=r"the checkpoint's '3.weight' has no place here"):
        restore_model(tiny()[:3], tensors)


def test_tied_model_refuses_weights_that_were_untied(tmp_path: Path) -> None:
    model = tied()
    back, _ = read_checkpoint(write_checkpoint(tmp_path / "c", model.state_dict(), {}))
    other = tied()
    restore_model(other, back)
    restore_model(other, model.state_dict())
    assert all_same_bits(other.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"ties '1.weight' to '0.weight', but they were saved with different values"):
        restore_model(tied(), {**back, "1.weight": back["1.weight"] + 1})


def test_cuda_generators_are_kept_where_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.arange(16, dtype=torch.uint8), torch.arange(16, 32, dtype=torch.uint8)]
    put: dict[int, Tensor] = {}
    monkeypatch.setattr(state_module.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(state_module.torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(state_module.torch.cuda, "set_rng_state", lambda state, device: put.update({device: state}))
    monkeypatch.setattr(state_module.torch.cuda, "device_count", lambda: 2)
    tensors, info = rng_tensors()
    restore_rng(tensors, info)
    assert all(same_bits(put[i], states[i]) for i in range(2))
    monkeypatch.setattr(state_module.torch.cuda, "device_count", lambda: 1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="2 CUDA generators were saved and this machine has 1 device"):
        restore_rng(tensors, info)
    assert same_bits(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_run_on_a_gpu_resumes_bit_for_bit(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny().cuda()
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.randn(5, 3, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = fresh()
    step(model, optimizer)
    state, rest = optimizer_tensors(optimizer)
    rng, rng_rest = rng_tensors()
    folder = write_checkpoint(tmp_path / "c", {**model.state_dict(), **state}, {"optimizer": rest})
    step(model, optimizer)
    expected = {**model.state_dict(), **optimizer_tensors(optimizer)[0]}
    tensors, info = read_checkpoint(folder)
    model, optimizer = fresh()
    names = set(model.state_dict())
    restore_model(model, {name: x for name, x in tensors.items() if name in names})
    restore_optimizer(optimizer, {name: x for name, x in tensors.items() if name not in names}, info["optimizer"])
    restore_rng(rng, rng_rest)
    step(model, optimizer)
    assert all_same_bits(expected, {**model.state_dict(), **optimizer_tensors(optimizer)[0]})
