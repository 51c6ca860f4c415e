"""The classic examples learn what they are for, cut short, and say so."""

import re
import runpy
import sys
from pathlib import Path

import pytest

CLASSIC = Path(__file__).parents[1] / "examples" / "classic"


def printed(monkeypatch, capsys, tmp_path, script, *arguments):
    """What it prints of every algorithm: its name, and the numbers."""
    monkeypatch.syspath_prepend(CLASSIC)  # as python does for a script
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--folder", str(tmp_path)])
    runpy.run_path(str(CLASSIC / script), run_name="__main__")
    *lines, plot = capsys.readouterr().out.splitlines()
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    found = {}
    for line in lines:
        name, said = re.split(r" +(?=reward|earns|walks)", line, maxsplit=1)
        found[name] = [float(x) for x in re.findall(r"-?\d+\.?\d*", said)]
    return found


def test_bandits_explore(monkeypatch, capsys, tmp_path):
    found = printed(monkeypatch, capsys, tmp_path, "bandits.py", "--bandits", 300, "--steps", 250)
    reward, best = zip(*found.values(), strict=True)
    assert list(found) == ["greedy", "epsilon-greedy, 0.1", "UCB, c = 2", "gradient, 0.1"]
    assert max(reward[0], best[0] + 0.7) < 1.2
    assert all(r > 1.2 for r in reward[1:])
    assert all(b > 0.6 for b in best[1:])


def test_q_learning_takes_the_edge_and_sarsa_keeps_away_from_it(monkeypatch, capsys, tmp_path):
    found = printed(monkeypatch, capsys, tmp_path, "tabular.py", "--episodes", 300, "--runs", 8)
    (exploring, greedy), (safe_exploring, safe_greedy) = found["Q-learning"], found["SARSA"]
    assert greedy == -13 > safe_greedy
    assert safe_exploring > exploring + 10


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("dqn.py", ("--updates", 1200), {"DQN": 10, "double DQN": 10}),
        ("actor_critic.py", ("--updates", 50), {"Monte-Carlo policy gradient": -10, "A2C": -10}),
    ],
)
def test_walkers_find_the_shortest_way_through_the_rooms(monkeypatch, capsys, tmp_path, script, arguments, expected):
    found = printed(monkeypatch, capsys, tmp_path, script, *arguments)
    assert {name: numbers[-1] for name, numbers in found.items()} == expected
