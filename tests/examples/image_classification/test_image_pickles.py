"""Pickles from the internet are data: they run nothing, and damage gives one kind of error."""

import functools
import io
import pickle
import tracemalloc
import zipfile

import image_files
import numpy as np
import pytest

from examples.image_classification.data import cifar_n, load, pickles, torch_files


class Reduces:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def as_batch(path, pickled):
    path.write_bytes(pickled)
    return pickles.read(path)


def as_torch(path, pickled):
    return torch_files.read(image_files.write_torch(path, pickled))


def as_legacy_torch(path, pickled):
    return torch_files.read(image_files.write_legacy_torch(path, pickled))


READERS = [as_batch, as_torch, as_legacy_torch]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_function_is_called(read, protocol, tmp_path):
    target = tmp_path / "written"
    call = Reduces(open, str(target), "w")
    path = tmp_path / "file"

    with pytest.raises(
        ValueError, match=rf"{path} .* asks for .*open, which is not needed .* not run"
    ):
        read(path, pickle.dumps({"data": call}, protocol))

    assert not target.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "builtins list",
        "os system",
        "numpy load",
        "numpy fromfile",
        "numpy.core.multiarray fromfile",
        "torch.storage _load_from_bytes",
        "torch load",
        "_codecs lookup",
        "collections OrderedDict.fromkeys",
        "examples.image_classification.data.pickles STAND_INS",
    ],
)
def test_names_outside_the_table_are_refused(name, tmp_path):
    module, attribute = name.split()
    for pickled in (
        f"c{module}\n{attribute}\n.".encode(),  # GLOBAL
        b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
        + b"\x8c" + bytes([len(attribute)]) + attribute.encode() + b"\x93.",  # STACK_GLOBAL
        f"(i{module}\n{attribute}\n.".encode(),  # INST
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"asks for {module}.{attribute}, which is not needed"):
            as_batch(tmp_path / "file", pickled)


def test_label_file_that_calls_a_function(tmp_path):
    data = image_files.arrays()
    image_files.write_cifar10(tmp_path, data)
    human = image_files.human_labels(data[1]) | {"worse_label": Reduces(print, "run")}
    image_files.write_npy(tmp_path / "CIFAR-10_human_ordered.npy", human)

    with pytest.raises(ValueError, match=r"asks for (__builtin__|builtins).print"):
        load(tmp_path)


def test_a_pickle_cannot_change_how_the_next_one_is_read(tmp_path):
    change = b"c_codecs\nencode\nN}X\x07\x00\x00\x00__new__K\x01s\x86b."  # encode.__new__ = 1
    with pytest.raises(ValueError, match=r"tries to change _Bytes\.__new__"):
        as_batch(tmp_path / "file", change)

    values = np.arange(3)
    contents = as_batch(tmp_path / "file", pickle.dumps({"values": values}, protocol=2))
    np.testing.assert_array_equal(contents["values"], values)


def test_no_stand_in_can_pose_as_memory_for_numpy(tmp_path):
    """NumPy reads the address that an object's ``__array_interface__`` gives."""
    interface = b"N}X\x13\x00\x00\x00__array_interface__}s\x86b"
    storage = b"(X\x07\x00\x00\x00storagectorch\nLongStorage\nX\x01\x00\x00\x000NK\x01tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x01\x85K\x01\x85tR"
    for target in (storage, tensor):
        path = image_files.write_torch(tmp_path / "a.pt", b"\x80\x02" + target + interface + b".")
        with pytest.raises(ValueError, match=r"no attribute '__array_interface__'"):
            torch_files.read(path)
    for call in (b"cnumpy\nndarray\n)R", b"cnumpy\ndtype\nX\x02\x00\x00\x00i8\x85R"):
        with pytest.raises(ValueError, match=r"is damaged"):
            as_batch(tmp_path / "file", b"\x80\x02" + call + interface + b".")


def test_object_arrays_and_structured_dtypes_are_not_made(tmp_path):
    structured = np.zeros(2, dtype=[("a", "i4"), ("b", "f8")])
    for values in (
        structured,
        np.array(["a", "b"]),
        np.array(["2020"], "M8[D]"),
        np.zeros(2, complex),
    ):
        with pytest.raises(ValueError, match="array of dtype"):
            as_batch(tmp_path / "file", pickle.dumps({"values": values}))


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", ["u1", ">i4", "<i8", "f4", "?"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_every_layout(protocol, dtype, order, tmp_path):
    values = np.asarray(np.arange(6).reshape(2, 3), dtype, order=order)

    contents = as_batch(tmp_path / "file", pickle.dumps({"values": values}, protocol))

    assert contents["values"].dtype == values.dtype
    np.testing.assert_array_equal(contents["values"], values)


def test_fewer_bytes_than_the_shape_needs(tmp_path):
    pickled = pickle.dumps({"values": np.zeros(100, np.uint8)}, protocol=2)
    assert pickled.count(b"Kd\x85") == 1  # the shape (100,)

    with pytest.raises(ValueError, match="cannot reshape array of size 100"):
        as_batch(tmp_path / "file", pickled.replace(b"Kd\x85", b"Ke\x85"))


def test_tensor_storage_of_the_wrong_length(tmp_path):
    pickled = image_files.tensors_pickle(["clean_label"], 20)
    path = image_files.write_torch(tmp_path / "a.pt", pickled, [np.arange(19)])
    with pytest.raises(ValueError, match=r"cannot reshape array of size 19"):
        torch_files.read(path)
    path = image_files.write_legacy_torch(tmp_path / "a.pt", pickled, [np.arange(21)])
    with pytest.raises(ValueError, match=r"the length of storage '0' is wrong"):
        torch_files.read(path)


def test_tensor_without_its_storage(tmp_path):
    path = image_files.write_torch(
        tmp_path / "a.pt", image_files.tensors_pickle(["clean_label"], 20)
    )
    with pytest.raises(ValueError, match=r"no item named 'a/data/0'"):
        torch_files.read(path)


def test_tensor_with_gaps(tmp_path):
    pickled = image_files.tensors_pickle(["clean_label"], 20, strides=2)
    path = image_files.write_torch(tmp_path / "a.pt", pickled, [np.arange(20)])
    with pytest.raises(ValueError, match=r"tensor with strides \(2,\)"):
        torch_files.read(path)


def test_zip_archive_that_is_not_from_torch(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros(3))
    path = (tmp_path / "a.npz").rename(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a zip archive with 0 data.pkl"):
        torch_files.read(path)


def test_numpy_file_of_numbers_is_no_label_file(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(5))
    with pytest.raises(ValueError, match=r"array of shape \(5,\) and dtype int64"):
        load("digits", path)


def label_files():
    """The bytes of one label file in each format."""
    labels = load("digits").labels[:20]
    human = image_files.human_labels(labels, keys=("worse_label",))
    pickled = pickle.dumps(human, protocol=2)
    stream = io.BytesIO()
    np.save(stream, np.array(human, dtype=object), allow_pickle=True)
    return {
        "batch": pickled,
        "npy": stream.getvalue(),
        "torch": functools.partial(image_files.write_torch, pickled=pickled),
        "legacy": functools.partial(
            image_files.write_legacy_torch,
            pickled=image_files.tensors_pickle(human, 20, legacy=True),
            storages=[*human.values()],
        ),
    }


@pytest.mark.parametrize("kind", ["batch", "npy", "torch", "legacy"])
def test_any_damage_gives_a_value_error_or_the_data(kind, tmp_path):
    """500 random changes of a byte and 100 cuts in each format."""
    path = tmp_path / "file"
    written = label_files()[kind]
    if callable(written):
        written(path)
        written = path.read_bytes()
    read = {"batch": pickles.read, "npy": cifar_n._read_npy}.get(kind, torch_files.read)
    random = np.random.default_rng(0)
    refused = passed = 0
    for trial in range(600):
        content = bytearray(written)
        if trial < 500:
            content[random.integers(len(content))] ^= 1 << random.integers(8)
        else:
            content = content[: random.integers(len(content))]
        path.write_bytes(content)
        try:
            passed += isinstance(read(path), dict)
        except ValueError as error:
            refused += str(path) in str(error)
    assert refused + passed == 600
    assert refused > 100  # the cuts and some of the changes


def test_a_large_memo_index_takes_no_memory(tmp_path):
    tracemalloc.start()
    as_batch(tmp_path / "file", b"\x80\x02}r\x00\x00\x40\x00.")  # LONG_BINPUT at 4,194,304
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_zip_checksums_are_compared(tmp_path):
    path = image_files.write_torch(
        tmp_path / "a.pt", pickle.dumps({"a": np.arange(1000)}, protocol=4)
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert zipfile.is_zipfile(path)

    with pytest.raises(ValueError, match="CRC"):
        torch_files.read(path)
