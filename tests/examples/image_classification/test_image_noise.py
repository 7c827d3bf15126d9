"""Wrong labels of the image-classification example, and its stratified subsets."""

import hashlib

import numpy as np
import pytest

from examples.image_classification.data import Dataset, load, noisy_labels, subset
from examples.image_classification.data.noise import CIFAR100_SUPERCLASSES, CLASS_MAPS, NOISE
from examples.label_noise import data as label_noise_data
from optax_sam import label_noise


def dataset_of(labels, name="npz", num_classes=10, **human_labels):
    labels = np.asarray(labels, np.int32)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 4, 1), dtype=np.uint8)
    human = {key: np.asarray(values, np.int32) for key, values in human_labels.items()}
    return Dataset(name, images, labels, images[:2], labels[:2], num_classes, human)


TEN = dataset_of(np.arange(1000) % 10, "cifar10")


@pytest.mark.parametrize("noise", ["symmetric", "asymmetric", "pair_flip", "instance_dependent"])
def test_simulated_noise_is_that_of_the_library(noise):
    found = noisy_labels(TEN, noise, rate=0.3, seed=7)

    arguments = {
        "symmetric": (TEN.labels, 0.3, 10),
        "asymmetric": (TEN.labels, 0.3, label_noise.CIFAR10_CLASS_MAP, 10),
        "pair_flip": (TEN.labels, 0.3, 10),
        "instance_dependent": (TEN.images, TEN.labels, 0.3, 10),
    }
    expected = getattr(label_noise, noise)(*arguments[noise], seed=7)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.changed, expected.changed)
    assert found.labels.dtype == np.int32
    assert found.changed.sum() == (150 if noise == "asymmetric" else 300)


def test_no_noise():
    found = noisy_labels(TEN, "none", rate=0.5, seed=0)

    np.testing.assert_array_equal(found.labels, TEN.labels)
    assert not found.changed.any()
    assert not np.shares_memory(found.labels, TEN.labels)


def test_human_noise_is_the_annotation():
    data = dataset_of([0, 1, 2, 3], worse=[0, 9, 2, 5], aggregate=[0, 1, 2, 4])

    found = noisy_labels(data, "human:worse", rate=0.9, seed=0)

    assert found.labels.tolist() == [0, 9, 2, 5]
    assert found.labels.dtype == np.int32
    assert found.changed.tolist() == [False, True, False, True]
    assert not np.shares_memory(found.labels, data.human_labels["worse"])


def test_missing_human_annotation():
    data = dataset_of([0, 1], worse=[0, 1], aggregate=[0, 1])
    with pytest.raises(
        ValueError, match=r"worse, aggregate, not 'worst'\. Put .* with --human-labels"
    ):
        noisy_labels(data, "human:worst", 0.0, 0)
    with pytest.raises(ValueError, match=r"this cifar10 data has .* \(none\), not 'worse'"):
        noisy_labels(TEN, "human:worse", 0.0, 0)


def test_unknown_noise():
    with pytest.raises(ValueError, match=r"must be none, .* or human:<annotation>, got 'sym'"):
        noisy_labels(TEN, "sym", 0.1, 0)


def test_rate_out_of_range():
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got 40"):
        noisy_labels(TEN, "symmetric", 40, 0)


def test_asymmetric_noise_needs_a_map():
    with pytest.raises(ValueError, match=r"cifar10, cifar100, digits, not for 'idx' data\. Take"):
        noisy_labels(TEN._replace(name="idx"), "asymmetric", 0.1, 0)


@pytest.mark.parametrize("noise", NOISE)
def test_the_digest_tells_whether_two_runs_saw_the_same_labels(noise):
    first, same, other = (noisy_labels(TEN, noise, 0.3, seed) for seed in (1, 1, 2))

    assert first.digest == same.digest
    assert (first.digest == other.digest) == (noise == "none")
    assert len(first.digest) == 64


def test_the_digest_is_of_the_labels_and_the_mask():
    data = dataset_of([0, 1, 2], worse=[0, 2, 2])
    found = noisy_labels(data, "human:worse", 0.0, 0)

    content = np.array([0, 2, 2], "<i4").tobytes() + bytes([0b01000000])
    assert found.digest == hashlib.sha256(content).hexdigest()


def test_classes_of_cifar10_are_confused_as_in_the_literature():
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
    assert {(names[a], names[b]) for a, b in CLASS_MAPS["cifar10"].items()} == {
        ("truck", "automobile"),
        ("bird", "airplane"),
        ("deer", "horse"),
        ("cat", "dog"),
        ("dog", "cat"),
    }


# Fine classes in alphabetical order, as in the data set's meta file, with their superclass.
CIFAR100 = """
apple 4, aquarium_fish 1, baby 14, bear 8, beaver 0, bed 6, bee 7, beetle 7, bicycle 18, bottle 3,
bowl 3, boy 14, bridge 9, bus 18, butterfly 7, camel 11, can 3, castle 9, caterpillar 7, cattle 11,
chair 6, chimpanzee 11, clock 5, cloud 10, cockroach 7, couch 6, crab 13, crocodile 15, cup 3,
dinosaur 15, dolphin 0, elephant 11, flatfish 1, forest 10, fox 12, girl 14, hamster 16, house 9,
kangaroo 11, keyboard 5, lamp 5, lawn_mower 19, leopard 8, lion 8, lizard 15, lobster 13, man 14,
maple_tree 17, motorcycle 18, mountain 10, mouse 16, mushroom 4, oak_tree 17, orange 4, orchid 2,
otter 0, palm_tree 17, pear 4, pickup_truck 18, pine_tree 17, plain 10, plate 3, poppy 2,
porcupine 12, possum 12, rabbit 16, raccoon 12, ray 1, road 9, rocket 19, rose 2, sea 10, seal 0,
shark 1, shrew 16, skunk 12, skyscraper 9, snail 13, snake 15, spider 13, squirrel 16, streetcar 19,
sunflower 2, sweet_pepper 4, table 6, tank 19, telephone 5, television 5, tiger 8, tractor 19,
train 18, trout 1, tulip 2, turtle 15, wardrobe 6, whale 0, willow_tree 17, wolf 8, woman 14, worm 13
"""


def test_classes_of_cifar100_are_confused_within_their_superclass():
    classes = [entry.split() for entry in CIFAR100.replace("\n", " ").split(",")]
    assert [name for name, _ in classes] == sorted(name for name, _ in classes)
    superclass = [int(number) for _, number in classes]
    assert (
        tuple(
            tuple(label for label in range(100) if superclass[label] == number)
            for number in range(20)
        )
        == CIFAR100_SUPERCLASSES
    )
    for members in CIFAR100_SUPERCLASSES:
        label = members[0]
        circle = [label := CLASS_MAPS["cifar100"][label] for _ in members]
        assert tuple(circle) == (*members[1:], members[0])


def test_asymmetric_noise_on_cifar100_leaves_the_superclasses_right():
    data = dataset_of(np.arange(1000) % 100, "cifar100", 100)

    found = noisy_labels(data, "asymmetric", 0.4, seed=0)

    assert found.changed.sum() == 400
    superclass = np.empty(100, int)
    for number, members in enumerate(CIFAR100_SUPERCLASSES):
        superclass[[*members]] = number
    np.testing.assert_array_equal(superclass[found.labels], superclass[data.labels])


@pytest.mark.parametrize("noise", label_noise_data.NOISE)
def test_digits_have_the_noise_of_the_label_noise_example(noise):
    found = noisy_labels(load("digits"), noise, 0.4, seed=3)

    expected = label_noise_data.load_digits(noise, 0.4, (3,))
    np.testing.assert_array_equal(found.labels, expected.labels[0])
    np.testing.assert_array_equal(found.changed, expected.changed[0])


UNEVEN = dataset_of(np.repeat([0, 1, 2], [600, 300, 90]), num_classes=3, worse=np.arange(990) % 3)


@pytest.mark.parametrize("count", [3, 100, 331, 989, 990])
def test_every_class_has_its_share_of_a_subset(count):
    part = subset(UNEVEN, count, seed=4)

    shares = np.bincount(part.labels, minlength=3) / np.bincount(UNEVEN.labels) * 990
    assert len(part.labels) == len(part.images) == len(part.human_labels["worse"]) == count
    assert np.all(np.abs(shares - count) * np.array([600, 300, 90]) / 990 <= 1)


def test_a_subset_keeps_images_and_labels_together():
    numbered = UNEVEN._replace(
        images=np.arange(990, dtype=np.int64)[:, None, None, None],
        human_labels={"worse": np.arange(990)},
    )

    part = subset(numbered, 100)

    chosen = part.images.ravel()
    assert np.all(np.diff(chosen) > 0)  # in their order, none twice
    np.testing.assert_array_equal(part.labels, UNEVEN.labels[chosen])
    np.testing.assert_array_equal(part.human_labels["worse"], chosen)
    for field in ("name", "test_images", "test_labels", "num_classes"):
        assert getattr(part, field) is getattr(numbered, field)


def test_a_subset_is_that_of_its_seed_and_part_of_a_larger_one():
    numbered = UNEVEN._replace(images=np.arange(990)[:, None, None, None])

    def chosen(count, seed):
        return set(subset(numbered, count, seed).images.ravel().tolist())

    assert chosen(100, 0) == chosen(100, 0) != chosen(100, 1)
    assert chosen(100, 0) < chosen(101, 0) < chosen(500, 0)
    assert chosen(990, 0) == set(range(990))


@pytest.mark.parametrize("count", [-1, 0, 2, 991])
def test_a_subset_has_at_least_one_image_per_class_and_at_most_all(count):
    with pytest.raises(ValueError, match=rf"--subset: {count} is .* lies in \[3, 990\]"):
        subset(UNEVEN, count)
