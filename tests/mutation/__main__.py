"""Mutation testing: does a test fail when a line of the package is wrong?

    pip install '.[mutation]'
    python -m tests.mutation --mutants 200 --seed 0 --output runs/mutation

Cosmic Ray makes the mutants (a changed operator, comparison, number, decorator, or a dropped ``not``).
A seeded sample of them is drawn from every area of the package. Each is written into a copy of the
repository, and the tests of its area run on it until one fails, then those that all areas share.
``results.jsonl`` has a line per mutant, and a run that was stopped goes on where it was. Survivors are
printed with their lines.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Area: (files of the package, arguments of pytest that test them quickly).
AREAS: dict[str, tuple[list[str], list[str]]] = {
    "engine": (
        ["_engine.py", "_stages.py", "sharpness_aware.py", "_axes.py", "_masks.py", "_gradients.py"],
        ["tests/test_masks.py", "tests/test_silent_mistakes.py", "tests/test_parallelism.py",
         "tests/test_peer_bugs.py"],
    ),
    "wrappers": (["wrappers.py", "methods.py"], ["tests/test_wrappers.py", "tests/test_references.py"]),
    "perturbations": (
        ["perturbations/adaptive.py", "perturbations/moving_averages.py",
         "perturbations/noise_compensation.py", "perturbations/normalized.py",
         "perturbations/projection.py", "perturbations/loss_budget.py",
         "perturbations/preconditioning.py", "_tree.py", "_norms.py"],
        ["tests/test_perturbations.py", "tests/test_tree.py", "tests/test_references.py"],
    ),
    "combinations": (
        ["combinations/decomposition.py", "combinations/down_weighting.py",
         "combinations/extrapolation.py", "combinations/coordinates.py",
         "combinations/decoupling.py", "combinations/renormalization.py",
         "combinations/_coordinates.py", "combinations/_clean_gradients.py"],
        ["tests/test_combinations.py"],
    ),
    "objectives": (
        ["objectives.py", "_loss_checks.py", "_microbatches.py", "_batches.py", "loss_scaling.py",
         "evaluations.py"],
        ["tests/test_objectives.py", "tests/test_microbatches.py",
         "tests/test_weights_and_penalties.py", "tests/test_loss_scaling.py",
         "tests/test_evaluations.py"],
    ),
    "groups": (["groups.py"], ["tests/test_groups.py", "tests/test_weights_and_penalties.py"]),
    "per_example": (
        ["per_example/ascent.py", "per_example/descent.py", "per_example/factors.py",
         "per_example/gradient.py", "per_example/multiples.py", "per_example/places.py",
         "per_example/plan.py", "per_example/sites.py", "per_example/trace.py",
         "per_example/table.py", "per_example/uses.py", "per_example/walk.py", "independence.py",
         "_batch_axis.py", "_jaxprs.py", "convolutions.py"],
        ["tests/per_example/test_behaviour.py", "tests/per_example/test_multiples.py",
         "tests/per_example/test_loops.py", "tests/per_example/test_equality.py"],
    ),
    "explain": (["explain.py", "_cost.py"], ["tests/test_explain.py"]),
    "penalties": (["penalties.py"], ["tests/test_penalties.py"]),
    "linen": (["linen.py"], ["tests/test_linen.py"]),
    "nnx": (["nnx.py"], ["tests/test_nnx.py"]),
    "equinox": (["equinox.py"], ["tests/test_equinox.py"]),
    "diagnostics": (
        ["diagnostics/_labels.py", "diagnostics/memorization.py", "diagnostics/coordinates.py",
         "diagnostics/dynamics.py",
         "diagnostics/suspects.py", "diagnostics/sharpness.py", "diagnostics/curvature.py",
         "diagnostics/spectrum.py", "diagnostics/slices.py", "diagnostics/label_gradients.py",
         "diagnostics/gradient_factors.py", "diagnostics/compensation.py",
         "diagnostics/_compiled.py"],
        ["tests/test_diagnostics.py", "tests/test_dynamics.py", "tests/test_sharpness.py",
         "tests/test_mechanisms.py"],
    ),
    "plots": (["plots.py"], ["tests/test_plots.py"]),
    "label_noise": (["label_noise.py"], ["tests/test_label_noise.py"]),
    "hyperparameters": (
        ["_hyperparameters.py", "_checks.py"],
        ["tests/test_hyperparameters.py", "tests/test_label_noise.py", "tests/test_bad_input.py"],
    ),
}  # fmt: skip

# What runs where an area's own tests pass: the promises that all methods and arguments share.
SHARED = [
    "tests/test_bad_input.py", "tests/test_limits.py", "tests/test_documentation.py",
    "tests/test_contracts.py", "tests/test_groups.py", "tests/test_explain.py",
    "tests/test_optax_wrappers.py",
]  # fmt: skip

# What no mutant runs: slow, or about programs and pages, or the areas' own tests again.
LEFT_OUT_TESTS = [
    "tests/benchmarks", "tests/clients", "tests/composition", "tests/examples",
    "tests/per_example/test_convolutions.py", "tests/per_example/test_convolutions_of_groups.py",
    "tests/test_docs_pages.py", "tests/test_golden.py", "tests/test_many_leaves.py",
    "tests/test_ncsam_labels.py", "tests/test_notebooks.py", "tests/test_processes.py",
    "tests/test_published_updates.py", "tests/test_sharding.py",
]  # fmt: skip

# Unions in annotations look like arithmetic, and one variant per place is enough.
LEFT_OUT = ("BitOr", "ExceptionReplacer", "ReplaceUnaryOperator_Delete_Invert")


def mutants_of(root: Path, area: str, count: int, seed: int) -> list[dict[str, object]]:
    """A seeded sample of places, spread over the files of an area, and one mutation of each."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    files, _ = AREAS[area]
    places: dict[tuple[str, object], list[dict[str, object]]] = collections.defaultdict(list)
    for file in files:
        path = root / "optax_sam" / file
        nodes = list(ast_nodes(get_ast(path.read_text(encoding="utf-8"))))
        for name in operator_names():
            if any(part in name for part in LEFT_OUT):
                continue
            if get_operator(name).arguments():
                continue
            operator = get_operator(name)()
            occurrence = 0
            for node in nodes:
                for start, stop in operator.mutation_positions(node):
                    places[(file, (start, stop))].append(
                        {"file": file, "operator": name, "occurrence": occurrence, "line": start[0]}
                    )
                    occurrence += 1
    generator = random.Random(f"{seed}/{area}")
    chosen = [generator.choice(options) for _, options in sorted(places.items(), key=str)]
    generator.shuffle(chosen)
    return chosen[:count]


def mutated(root: Path, mutant: dict[str, object]) -> str | None:
    """The source of the mutant's file."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = (root / "optax_sam" / str(mutant["file"])).read_text(encoding="utf-8")
    operator = get_operator(str(mutant["operator"]))()
    result = mutate_code(code, operator, mutant["occurrence"])
    return result if isinstance(result, str) or result is None else str(result)


def run_tests(copy: Path, tests: list[str], timeout: float) -> tuple[str, str]:
    """``(outcome, first failing test)`` in a forked process that has imported JAX already."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(read)
        os.chdir(copy)
        sys.path[:0] = [str(copy)]
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not programs"]
            code = pytest.main([*tests, *options])
        failed = [
            line for line in text.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))
        ]
        os.write(write, json.dumps([int(code), (failed or [""])[0][:200]]).encode())
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, _ = os.waitpid(child, os.WNOHANG)
        if done:
            answer = os.read(read, 65536)
            os.close(read)
            if not answer:
                return "killed", "the process ended"
            code, failed = json.loads(answer)
            if code in (4, 5):  # a wrong option, no tests: nothing was tested
                return "broken", f"pytest ended with {code}"
            return ("survived" if code == 0 else "killed"), failed
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    return "killed", "timeout"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=200, help="number of mutants in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/mutation"))
    parser.add_argument("--areas", nargs="*", default=list(AREAS), choices=list(AREAS))
    parser.add_argument("--timeout", type=float, default=300, help="seconds per mutant")
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    results = arguments.output / "results.jsonl"
    finished = {}
    if results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            finished[(record["file"], record["operator"], record["occurrence"])] = record
    copy = (arguments.output / "copy").resolve()
    shutil.rmtree(copy, ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "site", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str((arguments.output / "compiled").resolve())
    )
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    import jax  # noqa: F401  # imported once; the forked processes start with it
    import optax  # noqa: F401

    per_area = -(-arguments.mutants // len(arguments.areas))
    for area in arguments.areas:
        _, tests = AREAS[area]
        outcome, by = run_tests(copy, [*tests, *SHARED], 10 * arguments.timeout)
        if outcome != "survived":
            sys.exit(f"error: without a mutant the tests of {area} do not pass: {by}")
        for mutant in mutants_of(copy, area, per_area, arguments.seed):
            key = (mutant["file"], mutant["operator"], mutant["occurrence"])
            if key in finished:
                continue
            source = mutated(copy, mutant)
            if source is None:
                continue
            target = copy / "optax_sam" / str(mutant["file"])
            original = target.read_text(encoding="utf-8")
            started = time.monotonic()
            target.write_text(source, encoding="utf-8")
            try:
                outcome, by = run_tests(copy, tests, arguments.timeout)
                if outcome == "survived":
                    outcome, by = run_tests(copy, SHARED, arguments.timeout)
            finally:
                target.write_text(original, encoding="utf-8")
            changed = _changed_line(original, source)
            record = mutant | {"area": area, "outcome": outcome, "by": by, "change": changed}
            record["seconds"] = round(time.monotonic() - started, 1)
            with results.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
            finished[key] = record
            print(f"{outcome:9} {mutant['file']}:{mutant['line']}  {changed}", flush=True)
    _summary(list(finished.values()))


def _changed_line(before: str, after: str) -> str:
    for old, new in zip(before.splitlines(), after.splitlines(), strict=False):
        if old != new:
            return f"{old.strip()}  ->  {new.strip()}"
    return "a line was dropped"


def _summary(records: list[dict[str, object]]) -> None:
    counts = collections.Counter((record["area"], record["outcome"]) for record in records)
    for area in dict.fromkeys(record["area"] for record in records):
        killed, survived = counts[(area, "killed")], counts[(area, "survived")]
        print(f"{area:16} killed {killed:3}  survived {survived:3}")
    total = sum(record["outcome"] == "killed" for record in records)
    print(f"all: {total} of {len(records)} killed")


if __name__ == "__main__":
    main()
