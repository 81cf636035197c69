"""Changes the code, one small thing at a time, and counts the changes that no test notices.

    python tests/mutants/run.py [TARGET ...]        every target by default; see TARGETS

The changes are those of cosmic-ray's operators, and statements dropped (`DropStatement`); the wording of messages is
left alone. Each is written into a copy of the repository and put to the target's tests in a process forked from one
that has torch and transformers loaded. Ends with 1 where fewer than `ENOUGH` of a target's mutants are killed, or where
its survivors are not exactly those of survivors.md.
"""

from __future__ import annotations

import ast
import difflib
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SURVIVORS = Path(__file__).with_name("survivors.md")
ENOUGH = 0.95
LOADED_ONCE = (
    "benchmarks",  # before transformers
    "transformers",
    "transformers.trainer",
    "transformers.masking_utils",
    "transformers.core_model_loading",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_pil_clip",
    "torch.distributed",
    "datasets",
    "peft",
    "pytest",
)


@dataclass(frozen=True)
class Target:
    """A file, the tests that must notice its mutants (fastest first), and which functions if not all."""

    file: str
    tests: tuple[str, ...]
    functions: tuple[str, ...] = ()
    joins_paths: bool = False


TARGETS = {
    "positions": Target("hf_mm/nn/positions.py", ("tests/nn/test_positions_edges.py", "tests/nn/test_positions.py")),
    "loss": Target(
        "hf_mm/losses/contrastive.py",
        ("tests/losses/test_contrastive_edges.py", "tests/losses/test_contrastive.py"),
    ),
    "crop": Target(
        "hf_mm/models/clip/image_processing_clip.py",
        ("tests/models/clip/test_crop_edges.py", "tests/models/clip/test_image_processing_clip.py"),
        functions=("_middle_of_strip", "_crop_follows_size"),
    ),
    "center": Target(
        "hf_mm/image_utils.py",
        ("tests/models/clip/test_crop_edges.py", "tests/models/clip/test_image_processing_clip.py"),
        functions=("center_crop",),
    ),
    "resume": Target(
        "hf_mm/trainers/checkpointing.py",
        ("tests/trainers/test_checkpointing_edges.py", "tests/trainers/test_checkpointing.py"),
        joins_paths=True,
    ),
    "text": Target(
        "hf_mm/models/clip/modeling_clip.py",
        ("tests/models/clip/test_text_pooling.py", "tests/models/clip/test_modeling_clip.py"),
        functions=(
            "end_positions",
            "check_mask_shape",
            "drop_right_padding",
            "last_kept_positions",
            "get_text_features",
        ),
    ),
}


@dataclass(frozen=True)
class Mutant:
    function: str
    was: str
    becomes: str
    code: str

    def __str__(self) -> str:
        return f"{self.function}: `{self.was}` → `{self.becomes}`"


def operators(target: Target):
    """cosmic-ray's, and `DropStatement`. Arithmetic is swapped with arithmetic only, and the / of paths with nothing."""
    import cosmic_ray.plugins
    import parso
    from cosmic_ray.operators.operator import Operator

    class DropStatement(Operator):
        """Replaces by `pass` a call made for its effect, or the setting of an attribute."""

        def mutation_positions(self, node):
            statement = node.children[0] if node.type == "simple_stmt" else node
            call = statement.type == "atom_expr"
            sets = statement.type == "expr_stmt" and statement.children[0].type == "atom_expr"
            if statement is not node and (call or sets):
                yield node.start_pos, node.end_pos

        def mutate(self, node, index):
            dropped = parso.parse("pass\n").children[0]
            dropped.get_first_leaf().prefix = node.get_first_leaf().prefix
            return dropped

        @classmethod
        def examples(cls):
            return ()

    arithmetic = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}
    for name in cosmic_ray.plugins.operator_names():
        operator = cosmic_ray.plugins.get_operator(name)
        swapped = set(re.findall(r"ReplaceBinaryOperator_(\w+)_(\w+)", name)[0]) if "BinaryOperator" in name else set()
        across = swapped and len(swapped & arithmetic) == 1
        if not operator.arguments() and not across and not (target.joins_paths and "BinaryOperator_Div_" in name):
            yield operator()
    yield DropStatement()


def annotated(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the type annotations are: nothing runs there."""
    nodes = []
    for node in ast.walk(ast.parse(source)):
        nodes += [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes if n is not None]


def mutants_of(target: Target, source: str) -> list[Mutant]:
    """The mutants of a file's text that compile, each once."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.ast.ast_query import ASTQuery
    from cosmic_ray.mutating import mutate_code

    tree, silent, found = get_ast(source), annotated(source), {}
    for operator in operators(target):
        places = [(node, start) for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, (node, start) in enumerate(places):
            function = ASTQuery(node).get_definition_name() or "module"
            if any(begin <= start < end for begin, end in silent):
                continue
            if target.functions and function not in target.functions:
                continue
            code = mutate_code(source, operator, occurrence)
            try:
                if ast.dump(ast.parse(code)) == ast.dump(ast.parse(source)):
                    continue
            except SyntaxError:
                continue
            changes = list(difflib.ndiff(source.splitlines(), code.splitlines()))
            was, becomes = (" ".join(line[2:] for line in changes if line[0] == sign) for sign in "-+")
            found.setdefault(code, Mutant(function, was.strip(), becomes.strip(), code))
    return list(found.values())


def try_tests(tests: tuple[str, ...], limit: float | None) -> tuple[str, float]:
    """("killed", "survived" or "timeout", seconds) of one run of the tests."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        import pytest

        options = ["-x", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-m", "not gpu and not slow"]
        os._exit(pytest.main([*options, *tests]))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if done:
            return "survived" if status == 0 else "killed", seconds
        if limit and seconds > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", seconds
        time.sleep(0.02)


def listed_survivors(file: str) -> set[str]:
    """The survivors of a file that survivors.md gives a reason for, as `str` of a Mutant."""
    section = SURVIVORS.read_text().partition(f"\n## {file}\n")[2].partition("\n## ")[0]
    return {match[1] for match in re.finditer(r"^- (\S+: `.+` → `.*`): \S.+", section, re.MULTILINE)}


def run(target: Target, copy: Path) -> bool:
    """Tests every mutant of a target and prints the counts; whether they are as they should be."""
    file = copy / target.file
    source = file.read_text()
    outcome, clean = try_tests(target.tests, None)
    if outcome != "survived":
        sys.exit(f"the tests of {target.file} fail without any mutant.")
    mutants, begin = mutants_of(target, source), time.monotonic()
    survivors, timeouts = [], 0
    for number, mutant in enumerate(mutants, 1):
        file.write_text(mutant.code)
        outcome, seconds = try_tests(target.tests, 30 + 5 * clean)
        timeouts += outcome == "timeout"
        if outcome == "survived":
            survivors.append(str(mutant))
        print(f"  {number}/{len(mutants)} {outcome} after {seconds:.1f} s: {mutant}", flush=True)
    file.write_text(source)
    share = 1 - len(survivors) / len(mutants)
    print(
        f"{target.file}: {len(mutants)} mutants, {len(mutants) - len(survivors)} killed ({share:.1%}; {timeouts} of them "
        f"by the time limit), {len(survivors)} survive; {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    listed = listed_survivors(target.file)
    for text, missing in (
        ("survives without a reason", set(survivors) - listed),
        ("has a reason but is killed", listed - set(survivors)),
    ):
        for mutant in sorted(missing):
            print(f"  {text}: {mutant}")
    return share >= ENOUGH and set(survivors) == listed


def main(names: list[str]) -> int:
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "outputs", "shared", "__pycache__"))
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        for module in LOADED_ONCE:
            importlib.import_module(module)
        gc.freeze()  # or every fork copies the heap at its first collection
        results = [run(TARGETS[name], copy) for name in names or TARGETS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
