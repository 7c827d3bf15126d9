"""Steps compiled for pods: what is read from a program's text, and the whole program at tiny size."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import apart, compiled_text, layouts, pod_tables, pods, tpu
from benchmarks.architectures import MLP
from benchmarks.chips import CHIPS, roofline
from benchmarks.compiled_text import Collective, Program, count_once
from benchmarks.pod_networks import Decoder, PodNetwork, ResNet, ViT

ROUNDS = 5
ADAMW = optax.adamw(1e-3)
TINY = {
    "decoder": PodNetwork(Decoder(32, 16, 2, 2), ADAMW, "AdamW", 1, (8,), jnp.int32, (8,)),
    "ViT-B": PodNetwork(MLP(256), ADAMW, "AdamW", 16, (4, 4, 4)),
}


def text_of(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def in_scan(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


class TestText:
    def test_loops_count_as_often_as_they_run(self):
        x, weights = jnp.ones((4, 64)), jnp.ones((ROUNDS, 64, 64))
        program = Program(text_of(in_scan, x, weights))
        once = count_once("flops")
        flops = once(program.module(program.entry)) * program.in_loops(once)
        assert flops == pytest.approx(ROUNDS * 2 * 4 * 64 * 64, rel=0.05)

    def test_the_gradient_of_a_maximum_over_windows_brings_its_computations_along(self):
        text = """HloModule module
%greater (a: f32[], b: f32[]) -> pred[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=GE
}
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
ENTRY %main (x: f32[4], g: f32[2]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %g = f32[2]{0} parameter(1)
  %o = f32[] constant(0)
  ROOT %y = f32[4]{0} select-and-scatter(%x, %g, %o), window={size=2 stride=2}, select=%greater, scatter=%sum
}
"""  # noqa: E501
        assert Program(text).in_loops(count_once("bytes accessed")) == 1

    def test_a_loop_of_unknown_length_counts_once(self):
        text = text_of(
            lambda x: jax.lax.while_loop(lambda x: x[0] < 5, lambda x: 2 * x, x), jnp.ones(3)
        )
        assert Program(text).in_loops(count_once("flops")) == 1

    def test_collectives_in_a_loop(self):
        """The weights are gathered in every round, and one sum crosses the devices."""
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        cut = [NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "data"))]
        arguments = jax.device_put((jnp.ones((64, 8)), jnp.ones((ROUNDS, 8, 8))), tuple(cut))

        def mean(x, weights):
            def layer(x, w):
                whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
                return jax.lax.with_sharding_constraint(jnp.tanh(x @ whole), cut[0]), None

            return jnp.mean(jax.lax.scan(layer, x, weights)[0])

        found = Program(text_of(mean, *arguments)).collectives()
        gathers = [one for one in found if one.kind == "all-gather"]
        assert sum(one.times * one.size for one in gathers) == ROUNDS * 8 * 8 * 4
        assert [one for one in found if one.kind == "all-reduce"] == [
            Collective("all-reduce", 4, 4, 1)
        ]

    @pytest.mark.parametrize(
        ("kind", "sent"), [("all-reduce", 1.5), ("all-gather", 0.75), ("collective-permute", 1)]
    )
    def test_what_a_chip_sends(self, kind, sent):
        assert Collective(kind, 1, 4, 1).sent == sent

    @pytest.mark.parametrize(
        "groups",
        [
            "replica_groups={{0,1,2,3},{4,5,6,7}}",
            "replica_groups=[2,4]<=[8]",
            "replica_groups=mesh['data'=2,'model'=4] {'model'}",
            "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
        ],
    )
    def test_how_many_take_part(self, groups):
        assert compiled_text._group_size(f"channel_id=1, {groups}, use_global_device_ids=true") == 4

    def test_pieces_of_an_asynchronous_collective_are_one(self):
        text = """HloModule m
ENTRY %main (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), channel_id=7, replica_groups={{0,1,2,3}}
  %g = f32[16]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %d = f32[16]{0} all-gather-done(%s)
}
"""
        assert Program(text).collectives() == [Collective("all-gather", 64, 4, 1)]


def test_lines_that_nobody_can_tell_apart_are_one():
    nan = float("nan")
    lines = {"a": [1.0, 2.0], "b": [1.01, 2.0], "c": [1.1, 2.0], "d": [1.0, nan], "e": [nan, nan]}
    assert list(pod_tables.merged(lines)) == ["a, b", "c", "d"]


class TestLayouts:
    def axes(self, layout, path, shape):
        mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
        return layouts.parameter_axes(layout, mesh, path, shape)

    def test_parameters(self):
        tensor, shape = layouts.LAYOUTS[2], (3, 256, 512)
        assert self.axes(tensor, ("layers", "up", "kernel"), shape) == [None, "data", "model"]
        assert self.axes(tensor, ("layers", "down", "kernel"), shape) == [None, "model", "data"]
        assert self.axes(tensor, ("layers", "norm", "scale"), (3, 256)) == [None, None]
        assert self.axes(layouts.LAYOUTS[0], ("head", "kernel"), (256, 512)) == [None, None]

    def test_states_lie_as_their_parameters(self):
        mesh = layouts.mesh_of(layouts.LAYOUTS[1], jax.devices()[:4])
        params = jax.eval_shape(lambda: {"head": {"kernel": jnp.ones((128, 256))}})
        params = layouts.shard_parameters(layouts.LAYOUTS[1], mesh, params)
        state = layouts.shard_state(mesh, jax.eval_shape(ADAMW.init, params), params)
        assert state[0].mu["head"]["kernel"].sharding.spec == P(None, "data")
        assert state[0].count.sharding.spec == P()


def test_the_slowest_part_bounds_the_step():
    chip = CHIPS["v5e"]
    assert roofline(chip, 2 * chip.flops, chip.memory_bandwidth, 0) == (2, "compute")
    assert roofline(chip, 0, 0, 3 * chip.link_bandwidth) == (3, "links")


def test_networks_have_the_published_sizes():
    def millions(module, shape, dtype=jnp.float32):
        variables = jax.eval_shape(
            module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype)
        )
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) / 1e6

    assert millions(ResNet("batch"), (1, 224, 224, 3)) == pytest.approx(25.6, abs=0.1)
    assert millions(ViT(), (1, 224, 224, 3)) == pytest.approx(86, abs=1)
    assert millions(Decoder(), (1, 16), jnp.int32) > 1000


class Here(contextlib.nullcontext):
    """In place of a process of its own, which would not have the small networks."""

    def __enter__(self):
        return lambda function, *arguments: function(*arguments)


@pytest.fixture
def tiny(monkeypatch):
    """Small networks, and four simulated devices in place of every slice."""
    level = jax.config.jax_optimization_level
    monkeypatch.setattr(tpu, "Apart", Here)
    monkeypatch.setattr(tpu, "NETWORKS", TINY)
    monkeypatch.setattr(pod_tables, "NETWORKS", TINY)
    monkeypatch.setattr(tpu, "devices_of", lambda cell: jax.devices()[:4])
    monkeypatch.setattr(layouts, "SMALL", 64)
    yield
    jax.config.update("jax_optimization_level", level)


@pytest.mark.programs
def test_the_whole_program(tiny, tmp_path, monkeypatch):
    flags = ["--networks", "ViT-B", "--chip", "v5e", "--output", str(tmp_path)]
    flags += ["--layouts", "data parallel", "fully sharded", "--steps", "SGD", "SAM by hand", "sam"]
    tpu.main([*flags, "--chips", "16"])
    records = tpu.read(tmp_path / "steps.jsonl")
    assert len(records) == 6
    assert records[0]["jax"] == jax.__version__
    known = {(r["layout"], r["step"]): pod_tables.measures(r) for r in records}
    for layout in ("data parallel", "fully sharded"):
        sgd, by_hand, sam = (known[layout, step] for step in ("SGD", "SAM by hand", "sam"))
        assert by_hand["flops"] == pytest.approx(2 * sgd["flops"], rel=0.2)
        assert sam["flops"] <= 1.02 * by_hand["flops"]
        assert sam["collectives"] > sgd["collectives"] > 0
    assert "| sam | 1.0" in (tmp_path / "steps_ViT-B.md").read_text()
    assert (tmp_path / "chosen.md").read_text() == (tmp_path / "steps_ViT-B.md").read_text()
    assert "ViT-B, fully sharded" in (tmp_path / "aims.md").read_text()
    assert not (tmp_path / "chips.svg").exists()  # one number of chips is no curve

    monkeypatch.setattr(tpu, "compile_cell", lambda *_: pytest.fail("it is there already"))
    tpu.main([*flags, "--chips", "16"])
    larger = [record | {"chips": 64} for record in records]
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in larger)
    tpu.main([*flags, "--minutes", "0"])
    assert (tmp_path / "chips.svg").stat().st_size > 0

    # Another level of optimization has its own records, and no table mixes the two.
    monkeypatch.setattr(tpu, "compile_cell", lambda cell, *_: records[0] | cell._asdict())
    tpu.main([*flags, "--chips", "16", "--level", "UNKNOWN"])
    assert len(tpu.read(tmp_path / "steps.jsonl")) == 18
    assert (tmp_path / "UNKNOWN" / "steps_ViT-B.md").read_text().count("| sam |") == 2
    assert (tmp_path / "steps_ViT-B.md").read_text().count("| sam |") == 4
    assert (tmp_path / "chosen.md").read_text().count("| sam |") == 2


def test_examples_of_1_sam_one_at_a_time(tiny, tmp_path):
    """The loop over microbatches reduces the gradients of each."""
    flags = ["--networks", "ViT-B", "--chip", "v5e", "--layouts", "data parallel", "--chips", "16"]
    steps = ["--steps", "1-SAM, one example per chip at a time"]
    tpu.main([*flags, *steps, "--output", str(tmp_path)])
    (record,) = tpu.read(tmp_path / "steps.jsonl")
    rounds = max(Collective(*one).times for one in record["collectives"])
    assert rounds == TINY["ViT-B"].per_chip


def test_groups_that_the_chips_could_divide(monkeypatch):
    """Groups of four on four chips: the batch's constraint does not belong on the examples of one."""
    monkeypatch.setattr(layouts, "SMALL", 64)
    network = TINY["decoder"]._replace(per_chip=2)
    cell = pods.Cell("decoder", "fully sharded", "v5e", 4, "m-SAM, m = 4")
    assert pods.compile_cell(cell, network, jax.devices()[:4])["flops"] > 0


@pytest.mark.parametrize(
    ("spec", "examples", "expected"),
    [
        (P("data"), 8, '[{"data"}, {?}, {?}, {?}]'),
        (P(), 3, "[{}, {?}, {?}, {?}]"),  # of one group
        (P("data"), 3, None),  # some of the batch
    ],
)
def test_after_every_convolution_it_is_said_how_the_examples_lie(spec, examples, expected):
    """And the channels are left to the compiler."""
    mesh = layouts.mesh_of("data parallel", jax.devices()[:4])
    network = ResNet("group", (1,), 8, 4, NamedSharding(mesh, spec))
    images = jnp.ones((examples, 8, 8, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    text = jax.jit(network.apply).lower(variables, images).as_text()
    found = [line for line in text.splitlines() if "sharding_constraint" in line]
    convolutions = text.count("stablehlo.convolution")
    assert len(found) == (0 if expected is None else convolutions)
    assert all(expected in line for line in found)


def test_which_steps_a_network_allows():
    def allowed(network, step):
        return tpu.allowed(pods.Cell(network, "data parallel", "v5e", 16, step))

    ncsam = "ncsam, flip ratio 0.2, logits passed"
    assert allowed("ViT-B", ncsam)
    assert not allowed("decoder", ncsam)  # it flips one label per example
    assert allowed("ResNet-50, GroupNorm", "1-SAM")
    assert not allowed("ResNet-50, BatchNorm", "1-SAM")


def test_of_group_norm_what_batch_norm_does_not_tell():
    steps = {cell.step for cell in tpu.cells() if cell.network == "ResNet-50, GroupNorm"}
    assert {"SAM by hand", "1-SAM", "m-SAM, m = 8"} <= steps
    assert "saner" not in steps


def test_aims_are_of_methods_that_take_two_gradients():
    record = {"network": "ViT-B", "layout": "fully sharded", "chip": "v5e", "chips": 16}
    costs = dict.fromkeys(("flops", "bytes", "memory", "sent", "roofline"), 1.0)
    steps = {
        "SAM by hand": 1,
        "sam": 1.01,
        "SAM by hand, both losses": 3,
        "sam, two ascent steps": 3,
    }
    records = [
        record | costs | {"step": step, "flops": flops, "collectives": []}
        for step, flops in steps.items()
    ]
    assert "| 1.01 sam | 1.00 sam |" in pod_tables.aims(records)
    more = [r | {"chips": 64, "flops": r["flops"] ** 5} for r in records]
    (row,) = [line for line in pod_tables.aims([*records, *more]).splitlines() if "ViT-B" in line]
    assert "| ViT-B, fully sharded, v5e | **1.05 sam**, 1 of 2 | 1.00 sam |" in row
    # The aim for the least time is for groups only.
    assert row.endswith("| – |")
    slow = [record | costs | {"step": "1-SAM", "flops": 1, "collectives": [], "roofline": 2.0}]
    assert "| **2.00 1-SAM**, 1 of 1 |" in pod_tables.aims([*records, *slow])


def test_large_collectives_are_counted_with_their_bytes():
    large, small = Collective("all-gather", 2.0e6, 4, 3), Collective("all-gather", 10.0, 4, 3)
    other = Collective("all-to-all", 4.0e6, 4, 1)
    costs = dict.fromkeys(("flops", "bytes", "memory", "sent", "roofline"), 1.0)
    found = pod_tables.measures(costs | {"collectives": [large, small, other]})
    assert found["collectives"] == 7
    assert (found["gathers"], found["others"]) == ((3, 6.0e6), (1, 4.0e6))
    assert found["all-reduces"] == (0, 0)


def test_steps_that_vary_are_named():
    """The compiler counts both branches of a step that takes the second gradient sometimes."""
    record = {"network": "ViT-B", "step": "sam, every 5"}
    assert pod_tables.name_of(record) == "sam, every 5 (a step with g′)"
    assert pod_tables.name_of(record | {"step": "sam"}) == "sam"


def test_what_does_not_fit_is_told(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G of 16G hbm\nreport")

    monkeypatch.setattr(pods, "compile_step", full)
    tpu.main(["--networks", "decoder", "--chips", "4", "--steps", "SGD", "--output", str(tmp_path)])
    assert "20G of 16G hbm |" in (tmp_path / "steps_decoder.md").read_text()
    error = "the total memory required for HLO temporaries (16.28G) exceeds available HBM (15.75G)."
    assert pod_tables.why_not(error) == "does not fit: HLO temporaries need 16.28GB of 15.75GB"


def test_a_step_that_makes_the_compiler_crash_is_told_and_the_next_follows(
    tiny, tmp_path, monkeypatch
):
    def compiled(cell, *_):
        if cell.step == "sam":
            raise apart.Aborted
        return cell._asdict() | {"error": "no"}

    monkeypatch.setattr(tpu, "compile_cell", compiled)
    flags = ["--networks", "ViT-B", "--chip", "v5e", "--chips", "16", "--layouts", "data parallel"]
    tpu.main([*flags, "--steps", "sam", "asam", "--output", str(tmp_path)])
    aborted, other = tpu.read(tmp_path / "steps.jsonl")
    assert aborted["error"] == "the compiler crashes"
    assert {*aborted} == {*other, "batch"}
    assert (
        "| sam | does not compile: the compiler crashes"
        in (tmp_path / "steps_ViT-B.md").read_text()
    )


def test_methods_are_not_tried_where_sam_by_hand_does_not_fit(tiny, tmp_path, monkeypatch):
    """But for those that take a part of the batch at a time; a second run knows it too.

    One reference alone decides nothing: each may need a little more than the other.
    """

    def compiled(cell, *_):
        too_large = {
            "data parallel": {"SGD", "SAM by hand", loop},
            "fully sharded": {"SGD"},
            "fully sharded × tensor parallel": {"SAM by hand"},
        }
        is_full = cell.step in too_large[cell.layout]
        return cell._asdict() | ({"error": "no"} if is_full else {"compile": 1.0})

    monkeypatch.setattr(tpu, "compile_cell", compiled)
    monkeypatch.setattr(pod_tables, "write", lambda *_: None)
    loop = "1-SAM, one example per chip at a time"
    flags = ["--networks", "ViT-B", "--chip", "v5e", "--chips", "16", "--output", str(tmp_path)]
    flags += ["--steps", *(references := ("SGD", "SAM by hand")), "sam", "saner", loop]
    others = "fully sharded", "fully sharded × tensor parallel"
    for _ in range(2):
        tpu.main(flags)
        found = [(r["layout"], r["step"]) for r in tpu.read(tmp_path / "steps.jsonl")]
        assert sorted(found) == [
            ("data parallel", loop),
            *(("data parallel", step) for step in sorted(references)),
            *(
                (layout, s)
                for layout in others
                for s in (loop, *sorted(references), "sam", "saner")
            ),
        ]


def test_every_method_on_every_size_is_compiled_where_it_is_asked_for(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tpu, "compile_cell", lambda cell, *_: cell._asdict() | {"error": "no"})
    flags = ["--networks", "ViT-B", "--chip", "v5e", "--layouts", "data parallel"]
    flags += ["--chips", "4", "--steps", "asam", "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        tpu.main(flags)
    assert "no step is chosen" in capsys.readouterr().err
    tpu.main([*flags, "--all-sizes"])
    assert [(r["step"], r["chips"]) for r in tpu.read(tmp_path / "steps.jsonl")] == [("asam", 4)]


def test_what_was_killed_goes_on_and_other_compilers_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tpu, "compile_cell", lambda cell, *_: cell._asdict() | {"error": "no"})
    path = tmp_path / "steps.jsonl"
    flags = ["--networks", "ViT-B", "--chip", "v5e", "--chips", "16", "--layouts", "data parallel"]
    flags += ["--output", str(tmp_path), "--steps", "SAM by hand", "sam"]
    tpu.main(flags)
    whole = path.read_text()
    path.write_text(whole[:-9])
    tpu.main([*flags, "--minutes", "0"])
    tpu.main(flags)
    assert path.read_text() == whole
    monkeypatch.setattr(tpu, "versions", lambda: {"jax": "9", "libtpu": None, "optax_sam": "0"})
    path.write_text(whole.replace("}", ', "libtpu": null}'))
    with pytest.raises(SystemExit, match=r"was compiled by \{'jax': .*'jax': '9'"):
        tpu.main(flags)


def test_without_the_compiler_it_says_what_to_install(tiny, tmp_path, monkeypatch, capsys):
    def missing(cell):
        raise RuntimeError("no libtpu.so")

    monkeypatch.setattr(tpu, "devices_of", missing)
    tpu.main(["--output", str(tmp_path)])
    output = capsys.readouterr().out
    assert "no libtpu.so" in output
    assert "pip install -e '.[tpu]'" in output


def test_the_most_informative_steps_come_first():
    cells = list(tpu.cells())
    assert len(set(cells)) == len(cells)
    larger = list(tpu.cells(all_sizes=True))
    assert set(cells) < set(larger)
    assert {cell.chips for cell in larger if cell.step == "asam"} == {4, 16, 64, 256}
    assert {cell.chips for cell in cells if cell.step == "asam"} == {16}
    assert [cell.step for cell in cells[:3]] == ["SGD"] * 3
    assert {cell.layout for cell in cells[:3]} == set(layouts.LAYOUTS)
    assert all(cell.step in tpu.SCALING for cell in cells if cell.chips != 16)
