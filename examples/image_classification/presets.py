"""The papers' settings by name, at full length and in a short form of a tenth of the epochs.

Where a paper's network is not offered here, the nearest one is taken: PreAct ResNet-18 for ResNet-18.
What depends on the number of epochs is a share of them, so the short form keeps its shape.
"""

import dataclasses

from .config import Config

_SANER = Config(
    model="preact_resnet18",
    norm="batch",
    augmentation=("crop", "flip"),
    method="saner",
    rho=0.1,
    down_weight_warmup=0.25,  # 50 of 200 epochs; α is saner's own 0.5
    epochs=200,
    checkpoint_every=10,
    schedule="multistep",
    noise_rate=0.5,
)

_NCSAM = dataclasses.replace(
    _SANER,
    method="ncsam",
    rho=0.05,
    down_weight_warmup=0.0,
    kappa=0.1,  # the paper's lie between 0.03 and 0.4, by data set and noise
    method_starts=0.25,  # 50 of 200 epochs of SGD
    learning_rate=0.05,
    schedule="cosine",  # not stated
    weight_decay=1e-3,
    noise_rate=0.4,
)

_J_SAM = dataclasses.replace(
    _SANER,
    norm="layer",
    method="jsam",
    rho=0.01,
    group_size=1,
    down_weight_warmup=0.0,
    learning_rate=0.01,
    schedule="constant",  # not stated
    noise_rate=0.3,
)

_FULL: dict[str, tuple[str, Config]] = {
    "saner-cifar10": ("SANER on CIFAR-10, 50 % symmetric noise (arXiv 2411.17132)", _SANER),
    "saner-cifar100": ("SANER on CIFAR-100, 50 % symmetric noise (arXiv 2411.17132)", _SANER),
    "ncsam-cifar10": ("NCSAM on CIFAR-10, 40 % symmetric noise (arXiv 2601.19947)", _NCSAM),
    "ncsam-cifar100": ("NCSAM on CIFAR-100, 40 % symmetric noise (arXiv 2601.19947)", _NCSAM),
    "jsam-cifar10": ("1-J-SAM on CIFAR-10, 30 % symmetric noise (arXiv 2405.03676)", _J_SAM),
    "1-sam-cifar10": (
        "1-SAM on CIFAR-10, 30 % symmetric noise, the J-SAM paper's (arXiv 2405.03676)",
        dataclasses.replace(_J_SAM, method="sam"),
    ),
}

_DIGITS = Config(
    width=32,
    method_starts=0.1,  # or the first steps, far from any minimum, only climb
    epochs=30,
    batch_size=64,
    learning_rate=0.02,
)

_CIFAR_CPU = dataclasses.replace(
    _DIGITS, data="data/cifar10", subset=4000, epochs=20, evaluate_every=2
)

PRESETS: dict[str, tuple[str, Config]] = {
    "digits": ("SANER on scikit-learn's digits, 40 % symmetric noise: seconds on a CPU", _DIGITS),
    "cifar10-cpu": (
        "the small CNN on 4,000 images of CIFAR-10, 20 epochs: a minute on two CPU cores",
        _CIFAR_CPU,
    ),
}
for _name, (_what, _config) in _FULL.items():
    _config = dataclasses.replace(_config, data="data/" + _name.rsplit("-", 1)[1])
    PRESETS[_name] = (f"{_what}, {_config.epochs} epochs", _config)
    _short = dataclasses.replace(_config, epochs=_config.epochs // 10)
    PRESETS[f"{_name}-short"] = (f"{_what}, {_short.epochs} epochs", _short)
