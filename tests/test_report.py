import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlloss.loop import curves
from rlloss.loop.curves import plot_curves
from rlloss.loop.report import RunLog, before_after_table, read_metrics
from rlloss.output import Mean


def logged(folder: Path, steps: range, **options: Any) -> None:
    with RunLog(folder, progress=False, **options) as log:
        for step in steps:
            log.log(step, {"reward": step / 10})


def steps_in(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder)]


def pixels(path: Path) -> Any:
    image = pytest.importorskip("matplotlib.image")
    return image.imread(path)[..., :3]


def test_every_call_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    file = tmp_path / "new" / "run" / "metrics.jsonl"
    log = RunLog(file.parent, progress=False)
    log.log(0, {"reward": 0.1, "tokens": 512, "note": "first\nline"})
    first = '{"step": 0, "reward": 0.1, "tokens": 512, "note": "first\\nline"}\n'
    assert file.read_text() == first  # flushed, while the log is open
    log.log(0, {"accuracy": torch.tensor(0.5)})
    log.log(2, {"entropy": Mean(torch.tensor(3.0), torch.tensor(4.0))})
    log.close()
    assert file.read_text() == first + '{"step": 0, "accuracy": 0.5}\n{"step": 2, "entropy": 0.75}\n'
    assert read_metrics(file) == read_metrics(file.parent)
    assert read_metrics(file)[1] == {"step": 0, "accuracy": 0.5}


def test_number_that_is_not_finite_is_null_and_warned_of_once(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "rlloss"), RunLog(tmp_path, progress=False) as log:
        log.log(0, {"kl": math.nan, "reward": 1.0})
        log.log(1, {"kl": -math.inf, "reward": math.inf})
        log.log(2, {"kl": 0.5, "reward": 1.0})
    assert [record["kl"] for record in read_metrics(tmp_path)] == [None, None, 0.5]
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("rlloss", "RunLog: kl is nan at step 0; written as null, here and from now on"),
        ("rlloss", "RunLog: reward is inf at step 1; written as null, here and from now on"),
    ]

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)  # plain Python would accept NaN, which no other reader does


def test_existing_folder_is_appended_to(tmp_path: Path) -> None:
    logged(tmp_path, range(3))
    logged(tmp_path, range(3, 5))
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4]


def test_resume_drops_the_steps_that_are_run_again(tmp_path: Path, caplog: Any) -> None:
    logged(tmp_path, range(6))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    logged(tmp_path, range(4, 7), resume_from=4)
    after = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert after[:4] == before[:4]
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    assert "dropped 2 lines" in caplog.text
    logged(tmp_path, range(1), resume_from=0)
    assert steps_in(tmp_path) == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file is left


def test_interrupted_cut_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    logged(tmp_path, range(6))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            RunLog(tmp_path, progress=False, resume_from=2)
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_torn_last_line_is_left_out_and_not_built_upon(tmp_path: Path) -> None:
    logged(tmp_path, range(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert steps_in(tmp_path) == [0, 1]
    logged(tmp_path, range(2, 4))
    assert steps_in(tmp_path) == [0, 1, 2, 3]


def test_step_that_goes_back_is_refused(tmp_path: Path) -> None:
    logged(tmp_path, range(5))
    with pytest.raises(ValueError, match="step 0 came after step 4 was logged; resume_from=0 drops"):
        logged(tmp_path, range(5))
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4]


def test_log_refuses_what_would_be_lost(tmp_path: Path) -> None:
    log = RunLog(tmp_path, progress=False)
    with pytest.raises(ValueError, match="name of the step itself"):
        log.log(0, {"step": 3})
    log.close()
    log.close()
    with pytest.raises(ValueError, match=r"step 1 came after close\(\)"):
        log.log(1, {})


def test_malformed_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": oops}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: malformed JSON"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"reward": 0}\n')
    with pytest.raises(ValueError, match=r'line 1: needs an object with an integer "step"'):
        read_metrics(tmp_path)


def test_bar_shows_progress_and_the_last_numbers(capsys: Any) -> None:
    with RunLog(None, total_steps=20, bar_keys=("reward", "ref_kl", "accuracy", "note"), resume_from=18) as log:
        log.log(18, {"reward": 0.1, "ref_kl": 0.00002, "accuracy": 0.25, "loss": 7.0})
        log.log(19, {"reward": 0.75, "ref_kl": math.nan, "note": "warm"})
    first, *_, last = capsys.readouterr().err.strip().split("\r")
    assert first.startswith("18/20 ")
    assert last.startswith("20/20 ")
    assert last.endswith("reward 0.750 kl nan acc 0.250 note warm")


def test_bar_fits_eighty_columns(capsys: Any) -> None:
    keys = ("reward", "accuracy", "ref_kl", "entropy", "clip_frac")
    with RunLog(None, total_steps=200) as log:
        log.log(199, dict.fromkeys(keys, 0.125))
    last = capsys.readouterr().err.strip().split("\r")[-1]
    assert last.endswith("reward 0.125 acc 0.125 kl 0.125 ent 0.125 clip 0.125")
    assert len(last.replace("█", "")) <= 75  # the bar itself takes what is left of a terminal's line


def test_bar_without_a_total_counts(capsys: Any) -> None:
    with RunLog(None) as log:
        log.log(6, {"reward": 2500.0})
    assert re.search(r"7 steps 00:00, reward 2\.5e\+03$", capsys.readouterr().err.strip())


def test_no_bar_is_silent(capsys: Any) -> None:
    with RunLog(None, total_steps=3, progress=False) as log:
        log.log(0, {"reward": 1.0})
    assert capsys.readouterr() == ("", "")


def run_of(folder: Path, steps: int, **series: Any) -> Path:
    with RunLog(folder, progress=False) as log:
        for step in range(steps):
            metrics = {key: value(step) for key, value in series.items()}
            log.log(step, {key: value for key, value in metrics.items() if value is not None})
    return folder


@pytest.mark.parametrize("steps", [1, 2, 30, 200])
def test_curves_are_a_picture_of_the_run(tmp_path: Path, steps: int) -> None:
    folder = run_of(
        tmp_path,
        steps,
        reward=lambda s: math.tanh(s / 50),
        ref_kl=lambda s: math.nan if s == 15 else s / 1000,
        accuracy=lambda s: s / 200 if s % 10 == 0 else None,
    )
    path = plot_curves(folder)
    assert path == folder / "curves.png"
    image = pixels(path)
    assert (image[0, 0] == 1).all()  # white paper
    blue = image[..., 2] - image[..., 0] > 0.3
    thirds = [blue[:, part * image.shape[1] // 3 : (part + 1) * image.shape[1] // 3] for part in range(3)]
    assert all(third.any() for third in thirds)  # a curve in each of the three panels


def test_curves_mark_the_steps_of_a_sparse_key(tmp_path: Path) -> None:
    sparse = run_of(tmp_path / "a", 40, reward=lambda s: 0.5, accuracy=lambda s: 0.5 if s % 10 == 0 else None)
    dense = run_of(tmp_path / "b", 40, reward=lambda s: 0.5, accuracy=lambda s: 0.5)

    def tallest_mark(folder: Path) -> int:
        image = pixels(plot_curves(folder, ["accuracy"]))
        return int((image[..., 2] - image[..., 0] > 0.3).sum(0).max())

    assert tallest_mark(sparse) > tallest_mark(dense) + 2


def test_curves_have_a_gap_where_a_number_was_not_finite(tmp_path: Path) -> None:
    folder = run_of(tmp_path, 31, reward=lambda s: math.nan if s == 15 else 0.5)
    image = pixels(plot_curves(folder))
    [columns] = (image[..., 2] - image[..., 0] > 0.3).any(0).nonzero()
    assert max(columns[1:] - columns[:-1]) > (columns[-1] - columns[0]) / 30  # two steps' width, less the markers


def test_curves_default_to_the_panels_of_the_run(tmp_path: Path) -> None:
    def width(folder: Path, keys: list[str] | None = None) -> int:
        return pixels(plot_curves(folder, keys)).shape[1]

    online = run_of(tmp_path / "a", 3, loss=float, reward=float, entropy=float)
    offline = run_of(tmp_path / "b", 3, loss=float, margin=float, accuracy=float, tokens=float)
    assert width(online) == width(online, ["reward", "entropy"]) < width(offline) == width(online, ["reward"] * 3)


def test_curves_ask_for_keys_that_exist(tmp_path: Path) -> None:
    folder = run_of(tmp_path, 2, tokens=float, note=str)
    with pytest.raises(ValueError, match=r"under \['reward', 'note'\]; keys= may name any of \['tokens'\]"):
        plot_curves(folder, ["reward", "tokens", "note"])
    with pytest.raises(ValueError, match=r"may name any of \['tokens'\]"):
        plot_curves(folder)


def test_curves_are_white_whatever_the_style_and_leave_pyplot_alone(tmp_path: Path) -> None:
    run_of(tmp_path, 3, reward=float)
    script = f"""
import sys
import matplotlib
from matplotlib import style
style.use("dark_background")
import runpy
runpy.run_path({curves.__file__!r})["plot_curves"]({str(tmp_path)!r})
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams["axes.facecolor"] == "black"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    image = pixels(tmp_path / "curves.png")
    assert (image > 0.9).all(-1).mean() > 0.9


def test_missing_matplotlib_or_tqdm_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path, 3, reward=float)
    for module in ("matplotlib", "matplotlib.figure", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "rlloss\[examples\]"'):
        plot_curves(tmp_path)
    with pytest.raises(ImportError, match=r'pip install "rlloss\[loop\]", or pass progress=False'):
        RunLog(None)


def test_table_columns_line_up() -> None:
    table = before_after_table(
        ["12+35=", "東京は", "a longer prompt than that"],
        ["47", "é́", "42"],
        ["4\n7", "", "x" * 50],
        ["47", "yes", "42"],
        headline={"accuracy": (0.03125, 1.0), "mean completion length": (12, 3)},
        max_width=12,
    )
    assert table.split("\n") == [
        "prompt        target  before        after",
        "------------  ------  ------------  -----",
        "12+35=        47      4\\n7          47",
        "東京は        é́                     yes",
        "a longer pr…  42      xxxxxxxxxxx…  42",
        "",
        "                        before  after",
        "accuracy                 0.031  1.000",
        "mean completion length      12      3",
    ]


def test_table_without_headline_ends_with_its_rows() -> None:
    assert before_after_table(["q"], ["t"], ["b"], ["a"]).split("\n")[2:] == ["q       t       b       a"]
    assert len(before_after_table([], [], [], []).split("\n")) == 2


def test_table_refuses_columns_of_unequal_length() -> None:
    with pytest.raises(ValueError, match=r"one text per prompt, got .*'after': 1"):
        before_after_table(["a", "b"], ["1", "2"], ["1", "2"], ["1"])
