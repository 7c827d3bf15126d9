"""Every published format gives the arrays that were written into it."""

import functools
import io
import itertools
import os
import pickle
import shutil

import image_files
import numpy as np
import pytest

from examples.image_classification.data import Dataset, digits, load
from examples.image_classification.data.npz import CIFAR10_CLASSES
from examples.label_noise import data as label_noise_data


def check(dataset, data, name, num_classes):
    """The data set has exactly the arrays of ``data``, in its documented types."""
    assert isinstance(dataset, Dataset)
    assert (dataset.name, dataset.num_classes) == (name, num_classes)
    found = (dataset.images, dataset.labels, dataset.test_images, dataset.test_labels)
    for values, expected, dtype in zip(found, data, (np.uint8, np.int32) * 2, strict=True):
        assert values.dtype == dtype
        assert values.flags.c_contiguous
        np.testing.assert_array_equal(values, expected)


def python3_dumps_with_keys_in_bytes(contents):
    return pickle.dumps({key.encode(): value for key, value in contents.items()})


DUMPS = {
    "python 2": image_files.python2_dumps,
    "protocol 2": functools.partial(pickle.dumps, protocol=2),
    "protocol 4": functools.partial(pickle.dumps, protocol=4),
    "protocol 5": functools.partial(pickle.dumps, protocol=5),
    "keys in bytes": python3_dumps_with_keys_in_bytes,
}


@pytest.mark.parametrize("dump", DUMPS.values(), ids=DUMPS)
def test_cifar10(dump, tmp_path):
    data = image_files.arrays()
    image_files.write_cifar10(tmp_path, data, dump)

    check(load(tmp_path), data, "cifar10", 10)
    assert load(tmp_path).human_labels == {}


@pytest.mark.parametrize("dump", DUMPS.values(), ids=DUMPS)
def test_cifar100(dump, tmp_path):
    data = image_files.arrays(num_classes=100)
    image_files.write_cifar100(tmp_path, data, dump)

    check(load(str(tmp_path)), data, "cifar100", 100)


@pytest.mark.parametrize(
    ("write", "folder", "num_classes"),
    [
        (image_files.write_cifar10, "cifar-10-batches-py", 10),
        (image_files.write_cifar100, "cifar-100-python", 100),
    ],
)
def test_the_folder_that_cifar_was_extracted_into(write, folder, num_classes, tmp_path):
    data = image_files.arrays(num_classes=num_classes)
    write(tmp_path / folder, data)

    dataset = load(tmp_path)

    check(dataset, data, dataset.name, num_classes)


@pytest.mark.parametrize("separator", "-.")
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx(ending, separator, tmp_path):
    data = image_files.arrays(28, 1)
    image_files.write_idx(tmp_path, data, ending, separator)

    check(load(tmp_path), data, "idx", 10)


def test_idx_images_need_not_be_square(tmp_path):
    images, labels, test_images, test_labels = image_files.arrays(28, 1)
    data = images[:, :20], labels, test_images[:, :20], test_labels

    check(load(image_files.write_idx(tmp_path, data)), data, "idx", 10)


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("images", "labels", "test_images", "test_labels"),
    ],
)
def test_npz_names(names, tmp_path):
    images, labels, test_images, test_labels = data = image_files.arrays(14, 3, num_classes=4)
    column = labels[:, None].astype(np.uint8)  # as in the files of Keras and MedMNIST
    values = images, column, test_images, test_labels
    np.savez(tmp_path / "data.npz", **dict(zip(names, values, strict=True)), val_images=images)

    check(load(tmp_path / "data.npz"), data, "npz", 4)


def test_npz_of_gray_images_without_a_channel_axis(tmp_path):
    data = image_files.arrays(8, 1, num_classes=3)
    gray = data[0][..., 0], data[1], data[2][..., 0], data[3]
    np.savez_compressed(
        tmp_path / "a.npz", images=gray[0], labels=gray[1], x_test=gray[2], y_test=gray[3]
    )

    check(load(tmp_path / "a.npz"), data, "npz", 3)


def test_npz_with_class_names_may_lack_training_images_of_a_class(tmp_path):
    images, _, test_images, test_labels = image_files.arrays(8, 1, num_classes=2)
    data = images, np.zeros(20, int), test_images, test_labels
    path = image_files.write_npz(tmp_path / "a.npz", data, class_names=np.array(["a", "b", "c"]))

    check(load(path), data, "npz", 3)


def test_npz_with_the_class_names_of_cifar10_is_cifar10_and_may_have_human_labels(tmp_path):
    data = image_files.arrays()
    human = image_files.human_labels(data[1])
    path = image_files.write_npz(tmp_path / "a.npz", data, class_names=CIFAR10_CLASSES, **human)

    dataset = load(path)

    check(dataset, data, "cifar10", 10)
    check_human(dataset, human)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_of_jpeg_files(channels, tmp_path):
    from PIL import Image

    images, labels, test_images, test_labels = image_files.arrays(16, channels)
    packed = image_files.jpeg_arrays("train", images) | image_files.jpeg_arrays("test", test_images)
    human = image_files.human_labels(labels)
    del human["clean_label"]
    np.savez(tmp_path / "a.npz", train_label=labels, test_label=test_labels, **packed, **human)

    dataset = load(tmp_path / "a.npz")

    def decode(split):
        offsets = packed[f"{split}_offsets"]
        for start, stop in itertools.pairwise(offsets):
            file = io.BytesIO(packed[f"{split}_jpeg"][start:stop].tobytes())
            yield np.asarray(Image.open(file)).reshape(16, 16, channels)

    data = np.stack([*decode("train")]), labels, np.stack([*decode("test")]), test_labels
    check(dataset, data, "npz", 10)
    check_human(dataset, human)


ANNOTATIONS = {
    "aggregate": "aggre_label",
    "worse": "worse_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
}


def check_human(dataset, contents, annotations=ANNOTATIONS):
    assert set(dataset.human_labels) == set(annotations)
    for annotation, key in annotations.items():
        assert dataset.human_labels[annotation].dtype == np.int32
        np.testing.assert_array_equal(dataset.human_labels[annotation], contents[key])


def torch_of_arrays(path, contents):
    return image_files.write_torch(path, pickle.dumps(contents, protocol=2))


def torch_of_tensors(path, contents):
    pickled = image_files.tensors_pickle(contents, 20)
    return image_files.write_torch(path, pickled, contents.values())


def torch_of_small_tensors(path, contents):
    pickled = image_files.tensors_pickle(contents, 20, storage="ByteStorage")
    return image_files.write_torch(path, pickled, [v.astype(np.uint8) for v in contents.values()])


def legacy_torch_of_arrays(path, contents):
    return image_files.write_legacy_torch(path, pickle.dumps(contents, protocol=2))


def legacy_torch_of_tensors(path, contents):
    pickled = image_files.tensors_pickle(contents, 20, legacy=True)
    return image_files.write_legacy_torch(path, pickled, contents.values())


@pytest.mark.parametrize(
    "write",
    [
        torch_of_arrays,
        torch_of_tensors,
        torch_of_small_tensors,
        legacy_torch_of_arrays,
        legacy_torch_of_tensors,
    ],
)
def test_human_labels_in_a_torch_file_of_the_data_folder_are_found(write, tmp_path):
    data = image_files.arrays()
    human = image_files.human_labels(data[1])
    write(image_files.write_cifar10(tmp_path, data) / "CIFAR-10_human.pt", human)

    dataset = load(tmp_path)

    check(dataset, data, "cifar10", 10)
    check_human(dataset, human)


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-py"])
def test_human_labels_beside_the_extracted_folder_or_in_it_are_found(folder, tmp_path):
    data = image_files.arrays()
    image_files.write_cifar10(tmp_path / "cifar-10-batches-py", data)
    human = image_files.human_labels(data[1])
    torch_of_arrays(tmp_path / folder / "CIFAR-10_human.pt", human)

    check_human(load(tmp_path), human)


def test_human_labels_in_a_numpy_file_as_a_list_of_numpy_integers(tmp_path):
    data = image_files.arrays(num_classes=100)
    human = image_files.human_labels(data[1], keys=("noise_label",), num_classes=100)
    folder = image_files.write_cifar100(tmp_path, data)
    lists = {key: list(values) for key, values in human.items()}
    image_files.write_npy(folder / "CIFAR-100_human_ordered.npy", lists)

    check_human(load(folder), human, {"noisy_fine": "noise_label"})


def test_coarse_labels_of_cifar100n_are_left_out(tmp_path):
    data = image_files.arrays(num_classes=100)
    human = image_files.human_labels(data[1], keys=("noisy_label",), num_classes=100)
    coarse = {"clean_coarse_label": [0] * 20, "noisy_coarse_label": [500] * 20}
    folder = image_files.write_cifar100(tmp_path, data)
    torch_of_arrays(folder / "CIFAR-100_human.pt", human | coarse)

    check_human(load(folder), human, {"noisy_fine": "noisy_label"})


def test_a_named_label_file_takes_precedence_over_the_ones_that_lie_there(tmp_path):
    data = image_files.arrays()
    folder = image_files.write_cifar10(tmp_path / "data", data)
    torch_of_arrays(folder / "CIFAR-10_human.pt", image_files.human_labels(data[1]))
    other = image_files.human_labels(data[1], keys=("worse_label",), seed=1)
    path = image_files.write_npy(tmp_path / "other.npy", other)

    check_human(load(folder, human_labels=path), other, {"worse": "worse_label"})


def test_the_torch_file_is_preferred_because_the_ordered_one_has_another_order(tmp_path):
    data = image_files.arrays()
    folder = image_files.write_cifar10(tmp_path, data)
    human = image_files.human_labels(data[1])
    torch_of_arrays(folder / "CIFAR-10_human.pt", human)
    reordered = {key: values[::-1] for key, values in human.items()}
    image_files.write_npy(folder / "CIFAR-10_human_ordered.npy", reordered)

    check_human(load(folder), human)


def test_human_labels_for_an_npz_file(tmp_path):
    data = image_files.arrays()
    human = image_files.human_labels(data[1])
    path = image_files.write_npz(tmp_path / "data.npz", data)

    named = load(path, human_labels=torch_of_arrays(tmp_path / "CIFAR-10_human.pt", human))

    check_human(named, human)
    assert (
        load(path).human_labels == {}
    )  # which of the files beside an .npz belong to it is unknown


def test_digits_are_those_of_the_label_noise_example():
    dataset = load("digits")

    expected = label_noise_data.load_digits("symmetric", 0.0, (0,))
    assert dataset.images.shape == (digits.NUM_TRAIN, 8, 8, 1)
    assert dataset.images.max() == 16
    images = dataset.images.astype(np.float32)
    mean, deviation = images.mean(), images.std()
    np.testing.assert_array_equal((images - mean) / deviation, expected.inputs)
    np.testing.assert_array_equal((dataset.test_images - mean) / deviation, expected.test_inputs)
    np.testing.assert_array_equal(dataset.labels, expected.labels[0])
    np.testing.assert_array_equal(dataset.test_labels, expected.test_labels)
    assert dataset.labels.dtype == dataset.test_labels.dtype == np.int32
    assert (dataset.name, dataset.num_classes, dataset.human_labels) == ("digits", 10, {})


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    data = image_files.arrays(8, 1)
    image_files.write_npz(tmp_path / "data.npz", data)
    monkeypatch.setenv("HOME", os.fspath(tmp_path))

    check(load("~/data.npz"), data, "npz", 10)


def test_a_plain_idx_file_is_taken_before_its_compressed_copy(tmp_path):
    old, new = (image_files.arrays(28, 1, seed=seed) for seed in (1, 2))
    image_files.write_idx(tmp_path, old, ".gz")
    image_files.write_idx(tmp_path / "plain", new, "")
    shutil.copytree(tmp_path / "plain", tmp_path, dirs_exist_ok=True)

    check(load(tmp_path), new, "idx", 10)
