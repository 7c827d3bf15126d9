"""Every public name is documented with an example, and every example runs."""

import doctest
import importlib
import inspect
import pkgutil
import typing
from pathlib import Path

import pytest

import optax_sam
from optax_sam import label_noise

MODULES = ["optax_sam", *(m.name for m in pkgutil.walk_packages(optax_sam.__path__, "optax_sam."))]


OTHERS = ("linen", "nnx", "equinox", "plots")  # public, and imported by themselves
for other in OTHERS:
    importlib.import_module(f"optax_sam.{other}")


def public_names():
    """Functions and classes that users call: of the package, and of its public modules."""
    for name in (*optax_sam.__all__, *OTHERS):
        value = getattr(optax_sam, name)
        if not inspect.ismodule(value):
            yield f"optax_sam.{name}", value
            continue
        for inner in vars(value).get("__all__", vars(value)):
            member = getattr(value, inner)
            here = getattr(member, "__module__", "").startswith(value.__name__)
            if here and not inner.startswith("_"):
                yield f"{value.__name__}.{inner}", member


def fields_of(value):
    """The names in a named tuple or a dictionary of options."""
    options = value.__annotations__ if typing.is_typeddict(value) else ()
    return getattr(value, "_fields", tuple(options))


PUBLIC = dict(public_names())
every_public_name = pytest.mark.parametrize("name", PUBLIC)

# Results and states are read, not called: their fields are documented instead of an example.
RECORDS = {
    name
    for name, value in PUBLIC.items()
    if inspect.isclass(value) and (fields_of(value) or getattr(value, "_is_protocol", 0))
}


def test_mutation_testing_knows_every_module_and_every_test():
    root = Path(optax_sam.__file__).parent
    files = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    areas = importlib.import_module("tests.mutation.__main__")
    known = {file for files, _ in areas.AREAS.values() for file in files}
    assert known == {file for file in files if not file.endswith("__init__.py")}
    tests = {*areas.SHARED, *(test for _, tests in areas.AREAS.values() for test in tests)}
    folder = root.parent / "tests"
    found = {path.relative_to(root.parent).as_posix() for path in folder.rglob("test_*.py")}
    left_out = {test for test in found if test.startswith(tuple(areas.LEFT_OUT_TESTS))}
    assert not tests & left_out
    assert tests | left_out == found


def test_every_exported_name_exists_once():
    assert len(set(optax_sam.__all__)) == len(optax_sam.__all__)
    assert all(hasattr(optax_sam, name) for name in optax_sam.__all__)
    assert {"optax_sam.sam", "optax_sam.label_noise.symmetric"} <= PUBLIC.keys()
    assert "optax_sam.label_noise.instance_dependent" in PUBLIC


@every_public_name
def test_has_a_docstring_with_an_example(name):
    documentation = inspect.getdoc(PUBLIC[name]) or ""
    assert len(documentation.splitlines()[0]) > 10
    if name in RECORDS:
        for field in fields_of(PUBLIC[name]):
            assert f"{field}:" in documentation.split("Attributes:")[1], field
        return
    assert "Example:" in documentation
    assert ">>>" in documentation


@every_public_name
def test_documents_every_argument(name):
    value = PUBLIC[name]
    if name in RECORDS:
        return
    documented = inspect.getdoc(value).split("Example:")[0]
    for argument in own_arguments(value):
        assert f"{argument}:" in documented, argument


def own_arguments(value):
    """The arguments that a function was written with."""
    code = (value.__init__ if inspect.isclass(value) else value).__code__
    count = code.co_argcount + code.co_kwonlyargcount
    return [name for name in code.co_varnames[:count] if name != "self"]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    """Doctests of the module itself; they import what they need."""
    imported = importlib.import_module(module)
    assert imported.__doc__, f"{module} has no docstring"
    failures = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder(exclude_empty=True).find(imported, module, globs={}):
        result = runner.run(test, out=failures.append, clear_globs=True)
        assert result.failed == 0, "".join(failures)


def test_the_examples_are_many():
    """A finder that finds nothing would pass the test above."""
    count = sum(
        bool(test.examples)
        for module in MODULES
        for test in doctest.DocTestFinder().find(importlib.import_module(module), module)
    )
    assert count >= len(PUBLIC) - len(RECORDS)


def test_label_noise_names_its_functions():
    functions = {
        name
        for name, value in vars(label_noise).items()
        if inspect.isfunction(value) and not name.startswith("_")
        if value.__module__ == label_noise.__name__
    }
    assert functions == {"symmetric", "pair_flip", "asymmetric", "instance_dependent"}
