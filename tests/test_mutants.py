"""The tables of the mutation sweep stand on today's code; the sweep itself is tests/mutate.py."""

import ast
import functools
import runpy
from pathlib import Path

import pytest

import rlloss

ROOT = Path(__file__).parent.parent
MUTATE = runpy.run_path(str(Path(__file__).with_name("mutate.py")))
MUTANTS = MUTATE["mutants"]()
GROUPS = list(dict.fromkeys(mutant.group for mutant in MUTANTS))

EVERY_LOSS = {"sign", "stop", "unit", "mask", "weight", "default", "coefficient", "swap"}
# of those that have no hyperparameters
NOT_APPLICABLE = {"plackett_luce": {"default"}, "reward_regression": {"default"}}


@functools.cache
def code(file):
    source = (ROOT / file).read_text()
    return source, ast.dump(ast.parse(source))


@pytest.mark.parametrize("group", GROUPS)
def test_mutants_are_changes_of_todays_code(group):
    for mutant in MUTANTS:
        if mutant.group == group:
            source, syntax = code(mutant.file)
            mutated = ast.parse(mutant.applied(source))  # raises where the text has moved
            assert ast.dump(mutated) != syntax, mutant


def test_no_mutant_stands_twice():
    changes = [(m.group, m.file, m.applied(code(m.file)[0])) for m in MUTANTS]
    assert len(set(changes)) == len(changes)
    assert len({str(m) for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("loss", rlloss.list_losses())
def test_every_loss_has_every_kind_of_mutant(loss):
    kinds = {mutant.kind for mutant in MUTANTS if mutant.group == loss}
    assert EVERY_LOSS - NOT_APPLICABLE.get(loss, set()) <= kinds


def test_every_file_of_an_equation_has_mutants():
    folders = [ROOT / "rlloss" / "losses", ROOT / "rlloss" / "advantages"]
    files = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.glob("[!_]*.py")}
    assert files <= {mutant.file for mutant in MUTANTS}


@pytest.mark.parametrize("group", GROUPS)
def test_the_page_counts_every_mutant(group):
    page = (ROOT / "docs" / "mutants.md").read_text()
    section = page.partition(f"## {group}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[:2] for line in section.splitlines()[3:] if line]
    mutants = [mutant for mutant in MUTANTS if mutant.group == group]
    assert rows == [[f"| {mutant.kind}", mutant.change] for mutant in mutants]
    assert section.count("**survives**") == sum(bool(mutant.reason) for mutant in mutants)
    for mutant in mutants:
        assert mutant.reason in section
