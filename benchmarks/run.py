"""The benchmark: one command, every case in its own process, correctness before time.

    python benchmarks/run.py                             all cases; appends to benchmarks/results
    python benchmarks/run.py --cases "head-bf16-*"       those whose name matches; patterns are joined by commas
    python benchmarks/run.py --list                      names them
    python benchmarks/run.py --quick                     small shapes: a dry run, its times mean nothing
    python benchmarks/run.py --sweep                     along tokens and vocabulary, for benchmarks/plot.py

First the gate: outputs and gradients of every implementation against float64 of the same inputs. Where ours is out of
bounds the case is FAILED, nothing is timed, and the command's exit code is 1. Then interleaved rounds, and the peak
memory of each implementation's first call in a fresh process. inputs.py says what the inputs are, measure.py how a
ratio is formed. Run nothing else meanwhile: a case that was not alone on the machine says so.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from cases import Case, every_case, quick, selected, sweep_cases

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no compiler's processes beside the clock


def main() -> int:
    arguments = _arguments()
    cases = selected(sweep_cases() if arguments.sweep else every_case(), arguments.cases)
    cases = [_shaped(quick(case) if arguments.quick else case, arguments) for case in cases]
    if not cases:
        sys.exit(f"no case matches {arguments.cases!r}; --list names them")
    if arguments.list:
        for case in cases:
            print(f"{case.name:28}{case.shape}")
        return 0
    from peers import PEERS, loaded  # torch and the peers: seconds that --list does without

    if arguments.quick and not arguments.implementations:
        print("compiled: left out of quick runs; compiling takes longer than all the rest")
    peers = {name for kind in PEERS.values() for name in kind}
    loaded(sorted(peers & set(arguments.implementations) if arguments.implementations else peers))
    failed = [case.name for case in cases if _failed(case, arguments)]
    return int(bool(failed))


def _failed(case: Case, arguments: argparse.Namespace) -> bool:
    """Runs one case, prints and appends what came out, and says whether ours was wrong."""
    from jobs import in_a_process, peak, timed
    from report import appended, lines, results_file, table

    threads = arguments.threads
    print(f"\n{case.name}  {case.shape} {case.dtype}, {threads} threads", flush=True)
    record = in_a_process(timed, case, _names(case, arguments), arguments.rounds, threads, arguments.time_failures)
    if "error" in record:
        print(f"FAILED {case.name}\n{record['error']}")
        return True
    for name, reason in record["left_out"].items():
        print(f"  {name}: left out: {reason}")
    if record["skipped"]:
        print(f"  skipped: {record['skipped']}")
        return False
    for name, row in record["rows"].items() if arguments.time_failures or not record["failures"] else ():
        memory = in_a_process(peak, case, name, threads)
        if "error" in memory:
            print(f"  {name}: no memory figure: {memory['error'].strip().splitlines()[-1]}")
        else:
            row |= memory
    appended(results_file(arguments.results), lines(case, record, threads=threads, quick=arguments.quick))
    print(table(case, record))
    for failure in record["failures"]:
        print(f"FAILED {case.name}: {failure}")
    return bool(record["failures"])


def _names(case: Case, arguments: argparse.Namespace) -> tuple[str, ...]:
    from peers import implementations

    every = implementations(case, tuple(arguments.implementations))
    return tuple(
        name for name, one in every.items() if arguments.implementations or not (arguments.quick and one.compiles)
    )


def _shaped(case: Case, arguments: argparse.Namespace) -> Case:
    given = {name: getattr(arguments, name) for name in ("tokens", "hidden", "vocabulary")}
    return replace(
        case, scale=arguments.scale, seed=arguments.seed, **{k: v for k, v in given.items() if v is not None}
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="*", metavar="GLOB", help="names of cases, patterns joined by commas")
    parser.add_argument("--list", action="store_true", help="names of the cases and their shapes")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--sweep", action="store_true", help="the cases along tokens and vocabulary instead")
    parser.add_argument(
        "--implementations", nargs="+", default=[], metavar="NAME", help="ours and others; default: all"
    )
    parser.add_argument(
        "--time-failures", action="store_true", help="time what the gate stopped too; it counts as failed all the same"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.5, help="standard deviation of the logits")
    for name in ("tokens", "hidden", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, help="instead of the case's own")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
