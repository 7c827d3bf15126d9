"""Damaged, incomplete and unknown data: an error that names the file, and never half a data set."""

import gzip
import io
import pickle
import re
import struct
import tracemalloc
import zipfile

import image_files
import numpy as np
import pytest
from PIL import Image

from examples.image_classification.data import load


def edit(path, **changes):
    """Changes entries of a pickled dictionary; None removes one."""
    contents = pickle.loads(path.read_bytes()) | changes
    contents = {key: value for key, value in contents.items() if value is not None}
    path.write_bytes(pickle.dumps(contents))


def cut(path, keep):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def complaint(path, *args):
    """The message of the error for a data set."""
    with pytest.raises(ValueError) as error:
        load(path, *args)
    return str(error.value)


CIFAR10_DAMAGE = {
    "empty": ("data_batch_3", lambda path: cut(path, 0), "cut short"),
    "cut in the images": ("data_batch_3", lambda path: cut(path, 0.5), "cut short"),
    "cut at the end": ("test_batch", lambda path: cut(path, 0.999), "cut short"),
    "meta cut": ("batches.meta", lambda path: cut(path, 0.9), "cut short"),
    "not a pickle": ("data_batch_1", lambda path: path.write_bytes(b"<html>"), "damaged"),
    "a pickled list": (
        "data_batch_1",
        lambda path: path.write_bytes(pickle.dumps([1])),
        "root is a list",
    ),
    "no images": ("data_batch_2", lambda path: edit(path, data=None), "labels, but no data"),
    "no labels": ("data_batch_2", lambda path: edit(path, labels=None), "no labels"),
    "no class names": ("batches.meta", lambda path: edit(path, label_names=None), "no label_names"),
    "class names in a number": (
        "batches.meta",
        lambda path: edit(path, label_names=10),
        "has 10, expected the names",
    ),
    "wrong width": (
        "data_batch_2",
        lambda path: edit(path, data=np.zeros((4, 3071), np.uint8)),
        r"shape \(4, 3071\), expected \(n, 3072\)",
    ),
    "images in a list": ("data_batch_2", lambda path: edit(path, data=[1]), "a list, expected"),
    "wrong dtype": (
        "test_batch",
        lambda path: edit(path, data=np.zeros((10, 3072), np.float32)),
        "dtype float32, expected uint8",
    ),
    "no image at all": (
        "test_batch",
        lambda path: edit(path, data=np.zeros((0, 3072), np.uint8), labels=[]),
        r"shape \(0, 32, 32, 3\)",
    ),
    "too few labels": (
        "data_batch_5",
        lambda path: edit(path, labels=[1]),
        "1 labels for 4 images",
    ),
    "large label": ("data_batch_5", lambda path: edit(path, labels=[0, 1, 10, 2]), "from 0 to 10"),
    "negative label": ("test_batch", lambda path: edit(path, labels=[-1] * 10), "from -1 to -1"),
    "real labels": ("test_batch", lambda path: edit(path, labels=[1.0] * 10), "dtype float64"),
    "labels in words": ("test_batch", lambda path: edit(path, labels=["cat"] * 10), "dtype <U3"),
    "ragged labels": ("test_batch", lambda path: edit(path, labels=[[1], [1, 2]]), "not one list"),
    "11 classes": (
        "batches.meta",
        lambda path: edit(path, label_names=["?"] * 11),
        "has 11 classes",
    ),
}


@pytest.mark.parametrize(("name", "damage", "found"), CIFAR10_DAMAGE.values(), ids=CIFAR10_DAMAGE)
def test_damaged_cifar10(name, damage, found, tmp_path):
    image_files.write_cifar10(tmp_path, image_files.arrays())
    load(tmp_path)
    damage(tmp_path / name)

    message = complaint(tmp_path)

    assert str(tmp_path / name) in message
    assert re.search(found, message)
    assert re.search(r"again\.$|Save the original|Move a leading|Take the argmax", message)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("train", {"fine_labels": None}, "no fine_labels"),
        ("test", {"fine_labels": [100] * 10}, r"from 100 to 100, expected the range \[0, 100\)"),
        ("meta", {"fine_label_names": ["apple"] * 20}, "has 20 classes, expected the names of 100"),
    ],
)
def test_damaged_cifar100(name, change, found, tmp_path):
    image_files.write_cifar100(tmp_path, image_files.arrays(num_classes=100))
    edit(tmp_path / name, **change)

    message = complaint(tmp_path)

    assert str(tmp_path / name) in message
    assert re.search(found, message)


def idx_damage(content, position, value):
    return content[:position] + bytes([value]) + content[position + 1 :]


IDX_DAMAGE = {
    "empty": ("train-images-idx3-ubyte", lambda content: b"", "damaged"),
    "cut header": ("train-images-idx3-ubyte", lambda content: content[:9], "damaged"),
    "cut": ("train-images-idx3-ubyte", lambda content: content[:-1], "fewer values than its shape"),
    "too long": ("t10k-labels-idx1-ubyte", lambda content: content + b"\0", "more values than its"),
    "not idx": ("train-labels-idx1-ubyte", lambda content: b"<html></html>", "damaged"),
    "signed": ("train-images-idx3-ubyte", lambda c: idx_damage(c, 2, 9), "type 9 and 3 axes"),
    "labels for images": (
        "train-images-idx3-ubyte",
        lambda content: image_files.idx_bytes(np.zeros(20)),
        "1 axes",
    ),
    "negative size": (
        "train-labels-idx1-ubyte",
        lambda c: idx_damage(c, 4, 255),
        "header says shape",
    ),
    "no image": (
        "t10k-images-idx3-ubyte",
        lambda content: image_files.idx_bytes(np.zeros((0, 28, 28))),
        r"shape \(0, 28, 28\)",
    ),
    "too few labels": (
        "train-labels-idx1-ubyte",
        lambda content: image_files.idx_bytes(np.arange(19)),
        "19 labels for 20 images",
    ),
    "a new class": (
        "train-labels-idx1-ubyte",
        lambda content: idx_damage(content, 8, 173),
        "different values, up to 173",
    ),
    "a class of the test set only": (
        "t10k-labels-idx1-ubyte",
        lambda content: idx_damage(content, 8, 10),
        r"to 10, expected the range \[0, 10\)",
    ),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(("name", "damage", "found"), IDX_DAMAGE.values(), ids=IDX_DAMAGE)
def test_damaged_idx(name, damage, found, ending, tmp_path):
    image_files.write_idx(tmp_path, image_files.arrays(28, 1), ending)
    path = tmp_path / f"{name}{ending}"
    content = damage(gzip.decompress(path.read_bytes()) if ending else path.read_bytes())
    path.write_bytes(gzip.compress(content) if ending else content)

    message = complaint(tmp_path)

    assert str(path) in message
    assert re.search(found, message)


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.999])
def test_gzip_stream_cut_short(keep, tmp_path):
    image_files.write_idx(tmp_path, image_files.arrays(28, 1))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    cut(path, keep)

    message = complaint(tmp_path)

    assert f"{path} is damaged, cut short" in message
    assert message.endswith("Download or write the file again.")


def test_a_plain_file_with_the_name_of_a_compressed_one(tmp_path):
    image_files.write_idx(tmp_path, image_files.arrays(28, 1))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))

    assert "Not a gzipped file" in complaint(tmp_path)


def test_images_of_two_sizes(tmp_path):
    images, labels, *_ = image_files.arrays(28, 1)
    *_, test_images, test_labels = image_files.arrays(14, 1)
    image_files.write_idx(tmp_path, (images, labels, test_images, test_labels))

    assert "(28, 28, 1) and the test images (14, 14, 1)" in complaint(tmp_path)


def with_arrays(**changes):
    """Writes an .npz file with some arrays changed; None leaves one out."""

    def write(path):
        names = ("x_train", "y_train", "x_test", "y_test")
        arrays = dict(zip(names, image_files.arrays(8, 3), strict=True)) | changes
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})

    return write


def damaged_jpeg(damage):
    """Writes an .npz file of JPEG files after ``damage`` has changed its arrays in place."""

    def write(path):
        images, labels, test_images, test_labels = image_files.arrays(16, 3)
        contents = image_files.jpeg_arrays("train", images) | image_files.jpeg_arrays(
            "test", test_images
        )
        contents["train_jpeg"] = contents["train_jpeg"].copy()
        damage(contents)
        np.savez(path, train_label=labels, test_label=test_labels, **contents)

    return write


def break_third_jpeg(contents):
    contents["train_jpeg"][contents["train_offsets"][2] : contents["train_offsets"][3]] = 0


def join_two_jpegs(contents):
    """As many images, but the third and the fourth have another size."""
    other = image_files.jpeg_arrays("train", image_files.arrays(8, 3)[0])
    contents["train_jpeg"] = np.concatenate([contents["train_jpeg"], other["train_jpeg"]])
    more = other["train_offsets"][1:] + contents["train_offsets"][-1]
    contents["train_offsets"] = np.concatenate([contents["train_offsets"], more])


def npy_bytes(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


NPZ_DAMAGE = {
    "not a zip": (lambda path: path.write_bytes(b"not a zip"), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "one array": (lambda path: path.write_bytes(npy_bytes(np.zeros(3))), "single array"),
    "no images": (
        with_arrays(x_train=None),
        "exactly one of x_train, train_images, images, got y_t",
    ),
    "no test labels": (with_arrays(y_test=None), "exactly one of y_test, test_labels"),
    "two sets of labels": (with_arrays(labels=np.arange(20)), "exactly one of y_train"),
    "real images": (with_arrays(x_train=np.zeros((20, 8, 8, 3))), "x_train: .* dtype float64"),
    "flat images": (
        with_arrays(x_test=np.zeros((10, 192), np.uint8)),
        r"x_test: .* shape \(10, 192\)",
    ),
    "channels first": (
        with_arrays(x_train=np.zeros((20, 3, 8, 8), np.uint8)),
        r"\(20, 3, 8, 8\).*Move a leading channel axis to the end",
    ),
    "one-hot labels": (with_arrays(y_train=np.eye(20, dtype=int)), "y_train: .*argmax of one-hot"),
    "real labels": (with_arrays(y_test=np.zeros(10)), "y_test: .*dtype float64"),
    "too many labels": (with_arrays(y_test=np.zeros(11, int)), "y_test: 11 labels for 10 images"),
    "gap in the classes": (
        with_arrays(y_train=np.arange(20) % 4 * 2),
        "4 different values, up to 6.*Renumber",
    ),
    "one class": (with_arrays(y_train=np.zeros(20, int), y_test=np.zeros(10, int)), "at least 2"),
    "label outside the class names": (
        with_arrays(class_names=np.array(["a", "b"])),
        r"y_train: .*range \[0, 2\)",
    ),
    "huge label": (with_arrays(y_test=np.full(10, 2**63, np.uint64)), "from 9223372036854775808"),
    "pickled array": (with_arrays(y_test=np.array([{}], dtype=object)), "allow_pickle"),
    "human labels of other images": (
        with_arrays(worse_label=np.zeros(19, int)),
        "worse_label: 19 labels for 20 images",
    ),
    "broken jpeg": (damaged_jpeg(break_third_jpeg), "train_jpeg: image 2 is damaged"),
    "jpeg of another size": (damaged_jpeg(join_two_jpegs), "image 20 has shape"),
    "no offsets": (
        damaged_jpeg(lambda contents: contents.pop("test_offsets")),
        "test_offsets must",
    ),
    "offsets beyond the end": (
        damaged_jpeg(lambda contents: contents["train_offsets"].__setitem__(-1, 10**6)),
        "train_offsets must",
    ),
    "offsets that fall": (
        damaged_jpeg(lambda contents: contents["train_offsets"].__setitem__(5, 0)),
        "train_offsets must",
    ),
}


@pytest.mark.parametrize(("write", "found"), NPZ_DAMAGE.values(), ids=NPZ_DAMAGE)
def test_damaged_npz(write, found, tmp_path):
    path = tmp_path / "data.npz"
    write(path)

    message = complaint(path)

    assert str(path) in message
    assert re.search(found, message)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_npz_cut_short(keep, tmp_path):
    path = image_files.write_npz(tmp_path / "data.npz", image_files.arrays(8, 3))
    cut(path, keep)

    assert f"{path} is damaged, cut short" in complaint(path)


def test_npz_with_a_flipped_byte(tmp_path):
    path = image_files.write_npz(tmp_path / "data.npz", image_files.arrays(8, 3))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)

    assert "CRC" in complaint(path)


def zeros_npz(path, shape):
    """Writes an .npz file whose images are all black."""
    _, labels, test_images, test_labels = image_files.arrays(8, 3)
    names = ("y_train", "x_test", "y_test")
    few = dict(zip(names, (labels, test_images, test_labels), strict=True))
    np.savez_compressed(path, x_train=np.zeros(shape, np.uint8), **few)


def gzip_bomb(path):
    """An idx file of black images, as its header says."""
    header = image_files.idx_bytes(np.zeros((0, 1000, 1000)))[:4] + struct.pack(
        ">3i", 80, 1000, 1000
    )
    with gzip.open(path, "wb") as stream:
        stream.write(header)
        for _ in range(80):
            stream.write(bytes(10**6))


def black_jpeg(contents):
    """One picture of 8,000 x 8,000 pixels in some hundred kilobytes."""
    stream = io.BytesIO()
    Image.new("L", (8000, 8000)).save(stream, "JPEG")
    contents["train_jpeg"] = np.frombuffer(stream.getvalue(), np.uint8)
    contents["train_offsets"] = np.array([0, contents["train_jpeg"].size])


@pytest.mark.parametrize("kind", ["npz", "idx", "torch", "jpeg"])
def test_a_file_that_would_unpack_to_much_more_is_refused_before_it_is_read(
    kind, tmp_path, monkeypatch
):
    """As a file of 2.9 MB that takes 3.2 GB of memory."""
    path, arguments = tmp_path / "data.npz", ()
    if kind == "npz":
        zeros_npz(path, (80, 1000, 1000))
    elif kind == "jpeg":
        damaged_jpeg(black_jpeg)(path)
    elif kind == "idx":
        image_files.write_idx(tmp_path, image_files.arrays(28, 1))
        gzip_bomb(tmp_path / "train-images-idx3-ubyte.gz")
        path = tmp_path
    else:
        arguments = (tmp_path / "human.pt",)
        with zipfile.ZipFile(arguments[0], "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("human/data.pkl", bytes(8 * 10**7))
        path = "digits"
    tracemalloc.start()
    message = complaint(path, *arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.search(r"its [\d,]+ bytes would unpack to [\d,]{10,}", message)
    assert peak < 3e7


def test_an_array_of_another_size_than_its_header_says(tmp_path):
    """Such as one that was written over by a shorter one; nothing of it is used."""
    path = tmp_path / "data.npz"
    header = npy_bytes(np.zeros((20, 8, 8, 3), np.uint8))
    for content in (header[:-1], header + b"\0"):
        with_arrays(x_train=None)(path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("x_train.npy", content)
        message = rf"x_train.npy has {len(content):,} bytes where its shape needs {len(header):,}"
        assert message in complaint(path)


def test_a_member_that_is_no_array(tmp_path):
    path = image_files.write_npz(tmp_path / "data.npz", image_files.arrays(8, 3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("class_names.txt", "cat dog")
    assert f"{path} is damaged" in complaint(path)


HUMAN_DAMAGE = {
    "another order": (
        lambda human: human["clean_label"].sort(),
        "differs from the data set's labels",
    ),
    "no clean labels": (lambda human: human.pop("clean_label"), "but no clean_label"),
    "no annotation": (
        lambda human: [human.pop(key) for key in image_files.HUMAN_KEYS],
        r"but no human labels \(aggre_label",
    ),
    "label out of range": (
        lambda human: human["worse_label"].__setitem__(3, 10),
        r"worse_label: .* to 10, expected the range \[0, 10\)",
    ),
    "too short": (
        lambda human: human.update(random_label2=human["random_label2"][:-1]),
        "random_label2: 19 labels for 20 images",
    ),
    "clean labels too short": (
        lambda human: human.update(clean_label=human["clean_label"][:-1]),
        "clean_label: 19 labels for 20 images",
    ),
    "real numbers": (
        lambda human: human.update(aggre_label=human["aggre_label"] / 2),
        "aggre_label: .* dtype float64",
    ),
}


@pytest.mark.parametrize(("damage", "found"), HUMAN_DAMAGE.values(), ids=HUMAN_DAMAGE)
def test_damaged_human_labels(damage, found, tmp_path):
    data = image_files.arrays()
    human = image_files.human_labels(data[1])
    damage(human)
    image_files.write_cifar10(tmp_path, data)
    path = image_files.write_npy(tmp_path / "CIFAR-10_human_ordered.npy", human)

    message = complaint(tmp_path)

    assert str(path) in message
    assert re.search(found, message)


def test_wrong_clean_labels_inside_an_npz(tmp_path):
    data = image_files.arrays(8, 3)
    path = image_files.write_npz(tmp_path / "a.npz", data, clean_label=(data[1] + 1) % 10)

    assert "differs from the data set's labels for 20 of 20 images" in complaint(path)


def test_label_file_of_another_kind(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("1,2,3")

    assert f"{path} is not a CIFAR-N label file: give a .pt or .npy file." in complaint(
        "digits", path
    )


def test_missing_label_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"CIFAR-10_human.pt is missing; its folder has no files"
    ):
        load("digits", tmp_path / "CIFAR-10_human.pt")


@pytest.mark.parametrize("name", [*image_files.CIFAR10_BATCHES, "batches.meta"])
def test_missing_cifar10_file(name, tmp_path):
    image_files.write_cifar10(tmp_path, image_files.arrays())
    (tmp_path / name).unlink()

    with pytest.raises(FileNotFoundError, match=f"{name} is missing; its folder has .*Extract"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_missing_cifar100_file(name, tmp_path):
    image_files.write_cifar100(tmp_path, image_files.arrays(num_classes=100))
    (tmp_path / name).unlink()

    with pytest.raises(FileNotFoundError, match=f"/{name} is missing; its folder has"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["train-images-idx3", "t10k-labels-idx1"])
def test_missing_idx_file(name, tmp_path):
    image_files.write_idx(tmp_path, image_files.arrays(28, 1))
    (tmp_path / f"{name}-ubyte.gz").unlink()

    with pytest.raises(
        FileNotFoundError, match=rf"{name}-ubyte or {name}-ubyte.gz is missing; the"
    ):
        load(tmp_path)


def test_missing_path(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist\. Give a folder with CIFAR"
    ):
        load(tmp_path / "nowhere")


def test_unknown_folder(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.jpg").touch()

    assert "got 0.jpg, 1.jpg" in (message := complaint(tmp_path))
    assert "7.jpg and 2 more. Give a folder with CIFAR" in message


def test_unknown_file(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.touch()

    assert "is a file of an unknown format" in (message := complaint(path))
    assert "Extract other archives first" in message


def test_two_data_sets_in_one_folder(tmp_path):
    image_files.write_cifar10(tmp_path / "cifar-10-batches-py", image_files.arrays())
    image_files.write_cifar100(tmp_path / "cifar-100-python", image_files.arrays(num_classes=100))

    message = complaint(tmp_path)

    assert "must have one data set, got several" in message
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert str(tmp_path / "cifar-100-python") in message
