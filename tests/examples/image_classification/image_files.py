"""Writes tiny data sets in the published formats, byte for byte as the original tools do."""

import gzip
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

CIFAR10_BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
HUMAN_KEYS = ("aggre_label", "worse_label", "random_label1", "random_label2", "random_label3")


def arrays(size=32, channels=3, num_classes=10, train=20, test=10, seed=0):
    """Random images and labels; every class is among the training labels if they suffice."""
    random = np.random.default_rng(seed)
    shape = (size, size, channels)
    images = random.integers(0, 256, (train, *shape), dtype=np.uint8)
    test_images = random.integers(0, 256, (test, *shape), dtype=np.uint8)
    labels = random.permutation(np.arange(train) % num_classes)
    return images, labels, test_images, random.integers(0, num_classes, test)


def rows(images):
    """One image a row, as in CIFAR: all red values, then green, then blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_cifar10(folder: Path, data, dump=pickle.dumps):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels, test_images, test_labels = data
    parts = [
        *zip(np.split(images, 5), np.split(labels, 5), strict=True),
        (test_images, test_labels),
    ]
    for name, (part, part_labels) in zip(CIFAR10_BATCHES, parts, strict=True):
        batch = {"batch_label": name, "labels": part_labels.tolist(), "data": rows(part)}
        (folder / name).write_bytes(dump(batch))
    meta = {"num_cases_per_batch": 4, "label_names": [f"class {c}" for c in range(10)]}
    (folder / "batches.meta").write_bytes(dump(meta))
    return folder


def write_cifar100(folder: Path, data, dump=pickle.dumps):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels, test_images, test_labels = data
    for name, part, fine in (("train", images, labels), ("test", test_images, test_labels)):
        batch = {"fine_labels": fine.tolist(), "coarse_labels": [0] * len(fine), "data": rows(part)}
        (folder / name).write_bytes(dump(batch))
    meta = {"fine_label_names": [f"class {c}" for c in range(100)], "coarse_label_names": ["all"]}
    (folder / "meta").write_bytes(dump(meta))
    return folder


def idx_bytes(values):
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}i", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, data, ending=".gz", separator="-"):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels, test_images, test_labels = data
    for stem, values in {
        f"train-images{separator}idx3-ubyte": images[..., 0],
        f"train-labels{separator}idx1-ubyte": labels,
        f"t10k-images{separator}idx3-ubyte": test_images[..., 0],
        f"t10k-labels{separator}idx1-ubyte": test_labels,
    }.items():
        content = idx_bytes(values)
        (folder / f"{stem}{ending}").write_bytes(gzip.compress(content) if ending else content)
    return folder


def write_npz(path: Path, data, **more):
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(path, **dict(zip(names, data, strict=True)), **more)
    return path


def human_labels(labels, keys=HUMAN_KEYS, num_classes=10, seed=0):
    """What a CIFAR-N file holds: the clean labels and several annotations."""
    random = np.random.default_rng(seed)
    contents = {"clean_label": np.array(labels, np.int64)}
    return contents | {key: random.integers(0, num_classes, len(labels)) for key in keys}


def write_npy(path: Path, contents):
    np.save(path, np.array(contents, dtype=object), allow_pickle=True)
    return path


def write_torch(path: Path, pickled: bytes, storages=()):
    """The zip archive of ``torch.save`` around a pickle made elsewhere."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", pickled)
        archive.writestr(f"{path.stem}/version", b"3\n")
        for key, values in enumerate(storages):
            archive.writestr(f"{path.stem}/data/{key}", values.tobytes())
    return path


def write_legacy_torch(path: Path, pickled: bytes, storages=()):
    """The five pickles and raw storages of ``torch.save`` before version 1.6."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}}
    content = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    content += [pickled, pickle.dumps([str(key) for key in range(len(storages))], 2)]
    content += [struct.pack("<q", values.size) + values.tobytes() for values in storages]
    path.write_bytes(b"".join(content))
    return path


def tensors_pickle(names, count, storage="LongStorage", strides=1, legacy=False):
    """The pickle of a dictionary of 1-D tensors, one storage each, opcode by opcode."""
    items = b""
    for index, name in enumerate(names):
        storage_id = b"(" + _text("storage")
        storage_id += b"ctorch\n" + storage.encode() + b"\n" + _text(str(index)) + _text("cpu")
        storage_id += _integer(count) + (b"N" if legacy else b"") + b"tQ"
        view = b"K\x00" + _integer(count) + b"\x85" + _integer(strides) + b"\x85"
        hooks = b"\x89ccollections\nOrderedDict\n)R"
        items += (
            _text(name)
            + b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage_id
            + view
            + hooks
            + b"tR"
        )
    return b"\x80\x02}(" + items + b"u."


def python2_dumps(contents):
    """``cPickle.dumps(contents, 2)`` of Python 2: text and the bytes of arrays are 8-bit strings."""
    return b"\x80\x02" + _python2(contents) + b"."


def _python2(value):
    match value:
        case dict():
            return b"}(" + b"".join(_python2(key) + _python2(value[key]) for key in value) + b"u"
        case list():
            return b"](" + b"".join(map(_python2, value)) + b"e"
        case str():
            return b"U" + bytes([len(value)]) + value.encode("latin1")
        case int():
            return _integer(value)
        case np.ndarray():
            empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ" + b"\xff" * 4
            dtype += b"J" + b"\xff" * 4 + b"K\x00tb"
            shape = _integer(value.shape[0]) + _integer(value.shape[1]) + b"\x86"
            data = b"T" + struct.pack("<i", value.nbytes) + value.tobytes()
            return empty + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


def _integer(value):
    return b"J" + struct.pack("<i", value)


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def jpeg_arrays(split, images):
    """The concatenated JPEG files of images and their offsets."""
    from PIL import Image

    files = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image.squeeze()).save(stream, "JPEG", quality=95)
        files.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    return {
        f"{split}_jpeg": np.frombuffer(b"".join(files), np.uint8),
        f"{split}_offsets": offsets,
    }
