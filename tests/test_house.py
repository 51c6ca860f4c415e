"""The house: who may import whom, what an import costs, what every public name owes, and what no file does."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rlloss

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"_typing", "_checks", "_scoring", "output", "parallel", "protocol"},
    {"reduce"},
    {"logprobs", "divergence", "surrogate", "advantages", "correction", "selection", "top_k", "preference_inputs"},
    {"likelihood", "policy", "policy_surrogates", "preference", "preference_margins", "scored_pairs", "unpaired"},
    {"losses"},
    {"registry", "reference", "testing", "doctor", "heads", "models", "scalar"},
    {"loop", "rewards"},
    {"trainer", "adapters", "__main__"},
    {"__init__"},
]
REACHES_THE_KERNELS = {"logprobs", "divergence", "advantages.gae"}
LIGHT = {"jaxtyping", "numpy", "rlloss_kernels", "torch"}
HEAVY = {"datasets", "peft", "safetensors", "transformers"}


def modules(package):
    """Every file of a package by its dotted name below it: `losses.grpo`; a folder's own file has the folder's name."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        yield ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts), path


RLLOSS = dict(modules(ROOT / "rlloss"))
KERNELS = dict(modules(ROOT / "kernels" / "rlloss_kernels"))


def imports(path):
    """The dotted names that a file imports anywhere, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the import out in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner(name):
    """`losses.grpo` for `rlloss.losses.grpo.GRPOLoss`; None for what is not rlloss's."""
    parts = name.split(".")
    if parts[0] != "rlloss":
        return None
    while len(parts) > 1 and ".".join(parts[1:]) not in RLLOSS:
        parts.pop()
    return ".".join(parts[1:]) or "__init__"


def outer(name):
    """The top-level package of an import from elsewhere, the standard library aside."""
    top = name.partition(".")[0]
    return None if top in sys.stdlib_module_names or top == "rlloss" else top


def floor(module):
    floors = [i for i, names in enumerate(FLOORS) if module.partition(".")[0] in names]
    assert floors, f"rlloss.{module} has no floor: put it into FLOORS"
    return floors[0]


@pytest.mark.parametrize("module", RLLOSS)
def test_imports_go_down(module):
    for name in filter(None, map(inner, imports(RLLOSS[module]))):
        assert floor(name) <= floor(module), f"rlloss.{module} imports rlloss.{name}, which lies above it"
        if module.startswith("losses.") and name.startswith("losses."):
            pytest.fail(f"losses never import each other: rlloss.{module} imports rlloss.{name}")


@pytest.mark.parametrize("module", RLLOSS)
def test_the_library_outside_the_loop_is_light(module):
    foreign = set(filter(None, map(outer, imports(RLLOSS[module]))))
    if floor(module) < floor("loop"):
        assert foreign <= LIGHT
        assert "jaxtyping" not in foreign or module == "_typing"
        assert "rlloss_kernels" not in foreign or module in REACHES_THE_KERNELS
    if not module.startswith("loop"):
        assert not foreign & HEAVY


@pytest.mark.parametrize("module", KERNELS)
def test_the_kernels_know_torch_and_triton_alone(module):
    assert set(filter(None, map(outer, imports(KERNELS[module])))) <= {"torch", "triton", "rlloss_kernels"}
    assert not any(inner(name) for name in imports(KERNELS[module]))
    assert module.startswith("gpu") or not any(name.startswith("triton") for name in imports(KERNELS[module]))


def files(suffix=""):
    for path in ROOT.rglob(f"*{suffix}"):
        if not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts):
            yield path


def test_no_folder_of_ours_is_mistaken_for_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path for path in files() if path.is_dir() and path.name == "kernels"] == [ROOT / "kernels"]


def test_our_folder_kernels_is_not_importable():
    # transformers imports a package of that name
    found = importlib.util.find_spec("kernels")
    assert found is None or "site-packages" in str(found.origin)


def test_tests_are_flat():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


IMPORT_COST = """
import sys, time
start = time.process_time()
import torch
before, own_start = set(sys.modules), time.process_time()
import rlloss
print((time.process_time() - own_start) / (own_start - start), *(set(sys.modules) - before))
"""


def test_importing_rlloss_is_cheap_and_loads_nothing_heavy():
    costs = []  # of the import, in those of torch's
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", IMPORT_COST], capture_output=True, text=True, check=True, cwd=ROOT)
        cost, *loaded = run.stdout.split()
        assert not {name.partition(".")[0] for name in loaded} & (HEAVY | {"triton", "einops"})
        costs.append(float(cost))
    assert min(costs) < 0.35  # the least of three: load adds to a cost and never takes from it


NO_DOCTEST = {
    "Loss": "a base class",
    "PolicyLoss": "a base class",
    "ClippedPolicyLoss": "a base class",
    "QuadraticPolicyLoss": "a base class",
    "SelectivePolicyLoss": "a base class",
    "TruncatedPolicyLoss": "a base class",
    "WeightedPolicyLoss": "a base class",
    "LikelihoodLoss": "a base class",
    "PreferenceLoss": "a base class",
    "MarginLoss": "a base class",
    "MeanPreferenceLoss": "a base class",
    "RankedLoss": "a base class",
    "ReferenceFreeLoss": "a base class",
    "StepStatisticLoss": "a base class",
    "MarginOptions": "a table of hyperparameters",
    "ScoredPairLoss": "a base class",
    "TiedPairLoss": "a base class",
    "UnpairedLoss": "a base class",
    "PolicyBatch": "what PolicyLoss hands to its subclasses",
    "PolicyOptions": "a table of hyperparameters",
    "LossOutput": "what every loss's own example shows",
    "Counts": "what the example of `count` shows",
    "TokenDivergences": "what the example of `token_divergences` shows",
    "TokenStats": "what the example of `token_logprobs` shows",
    "Max": "read as Mean is",
    "Min": "read as Mean is",
    "Correction": "what `importance_correction` shows",
    "Metric": "the union of the kinds",
    "Session": "needs a model and a tokenizer",
    "model_logprobs": "needs a model",
    "train_offline": "needs a model and a tokenizer",
    "train_online": "needs a model and a tokenizer",
}


@pytest.mark.parametrize("name", rlloss.__all__)
def test_a_public_name_explains_itself(name):
    public = getattr(rlloss, name)
    if inspect.isclass(public) or inspect.isfunction(public):
        assert public.__doc__, f"rlloss.{name} has no docstring"
        assert ">>>" in public.__doc__ or name in NO_DOCTEST, f"rlloss.{name} has no doctest"
        for part in vars(public).values() if inspect.isclass(public) else ():
            if inspect.isfunction(part) and not part.__name__.startswith("_"):
                assert inspect.getdoc(part), f"rlloss.{name}.{part.__name__} has no docstring"


def test_the_public_names_are_complete():
    assert len(set(rlloss.__all__)) == len(rlloss.__all__)
    assert set(dir(rlloss)) == set(rlloss.__all__)
    assert set(NO_DOCTEST) <= set(rlloss.__all__)
    for module in (
        "advantages.gae",
        "advantages.group",
        "advantages.running",
        "advantages.shaping",
        "output",
        "policy",
        "preference",
        *(m for m in RLLOSS if m.startswith("losses.")),
    ):
        for name in importlib.import_module(f"rlloss.{module}").__all__:
            assert name in rlloss.__all__, f"rlloss.{module}.{name} is not a name of rlloss"


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg for keyword in node.keywords}


PIECES = {
    "advantages.gae",
    "advantages.shaping",
    "divergence",
    "policy",
    "preference",
    "preference_inputs",
    "preference_margins",
    "reduce",
    "selection",
    "surrogate",
}
HOT = [m for m in RLLOSS if m in PIECES or m.startswith("losses.")]


@pytest.mark.parametrize("module", HOT)
def test_no_loss_waits_for_its_device(module):
    waits = {"cpu", "item", "numpy", "tolist", "nonzero", "synchronize"}
    assert not {name for name, _ in calls(RLLOSS[module]) if name.rpartition(".")[2] in waits}


@pytest.mark.parametrize(
    "path", [p for p in files(".py") if p.parts[len(ROOT.parts)] != "tests"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_pickles(path):
    assert not {name.partition(".")[0] for name in imports(path)} & {
        "cloudpickle",
        "dill",
        "joblib",
        "pickle",
        "shelve",
    }
    for name, keywords in calls(path):
        assert name not in {"torch.load", "torch.save"}
        assert "allow_pickle" not in keywords
