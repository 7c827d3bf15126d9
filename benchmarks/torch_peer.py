"""The same networks and steps in PyTorch, where it is installed: eager, as its users run them.

Two forms of SAM: the two-step optimizer that most PyTorch code uses (perturb, second backward pass,
restore, step), written here from the formula, and that of the package ``pytorch_optimizer``.
"""

import os
from collections.abc import Callable
from importlib import metadata

import numpy as np

# Read when torch is loaded. By default its idle threads spin for a while and take the processor from
# those of XLA, and where another process is running too they slow torch itself down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn
from torch.nn import functional

from benchmarks import architectures
from benchmarks.architectures import CLASSES, Network, Problem
from benchmarks.training_steps import RHO

try:
    import pytorch_optimizer
except ImportError:
    pytorch_optimizer = None


def versions() -> str:
    """What is measured, in words."""
    packages = ["torch"] + (["pytorch_optimizer"] if pytorch_optimizer else [])
    names = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return f"{names}, {torch.get_num_threads()} threads"


def norm_of(norm: str, width: int) -> nn.Module:
    """GroupNorm in eight groups, or BatchNorm."""
    return nn.GroupNorm(8, width) if norm == "group" else nn.BatchNorm2d(width)


def convolution(norm: str, before: int, width: int, size: int = 3, stride: int = 1) -> nn.Module:
    """A convolution and its norm."""
    layer = nn.Conv2d(before, width, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, norm_of(norm, width))


def mlp(module: architectures.MLP, inputs: int) -> nn.Module:
    """The twin of :class:`benchmarks.architectures.MLP`."""
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(module.depth):
        layers += [nn.Linear(inputs, module.width), nn.ReLU()]
        inputs = module.width
    return nn.Sequential(*layers, nn.Linear(inputs, CLASSES))


def cnn(module: architectures.CNN, channels: int) -> nn.Module:
    """The twin of :class:`benchmarks.architectures.CNN`."""
    layers: list[nn.Module] = []
    for stage in range(3):
        for _ in range(module.depth):
            layers += [convolution(module.norm, channels, module.width * 2**stage), nn.ReLU()]
            channels = module.width * 2**stage
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *head(channels))


def head(channels: int) -> list[nn.Module]:
    """The mean over the image, and the last layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


class Block(nn.Module):
    """The twin of :class:`benchmarks.architectures.Block`."""

    def __init__(self, norm: str, before: int, width: int, stride: int):
        super().__init__()
        self.first = convolution(norm, before, width, 3, stride)
        self.second = convolution(norm, width, width)
        same = before == width and stride == 1
        self.shortcut = nn.Identity() if same else convolution(norm, before, width, 1, stride)

    def forward(self, x):
        y = self.second(functional.relu(self.first(x)))
        return functional.relu(self.shortcut(x) + y)


def resnet18(module: architectures.ResNet18, channels: int) -> nn.Module:
    """The twin of :class:`benchmarks.architectures.ResNet18`."""
    layers = [convolution(module.norm, channels, module.width), nn.ReLU()]
    before = module.width
    for stage in range(4):
        for block in range(2):
            width = module.width * 2**stage
            layers.append(Block(module.norm, before, width, 2 if stage and not block else 1))
            before = width
    return nn.Sequential(*layers, *head(before))


def twin(network: Network) -> nn.Module:
    """The same network."""
    if isinstance(network.module, architectures.MLP):
        return mlp(network.module, int(np.prod(network.shape)))
    build = {architectures.CNN: cnn, architectures.ResNet18: resnet18}[type(network.module)]
    return build(network.module, network.shape[-1])


class TwoStepSAM:
    """SAM as an optimizer of two steps around the second backward pass."""

    def __init__(self, params, base: torch.optim.Optimizer, rho: float):
        self.params, self.base, self.rho = list(params), base, rho

    @torch.no_grad()
    def first_step(self) -> None:
        """Saves w and moves to ``w + ρ g / ‖g‖``."""
        norm = torch.stack([p.grad.norm() for p in self.params]).norm()
        self.saved = [p.clone() for p in self.params]
        for p in self.params:
            p.add_(p.grad * (self.rho / (norm + 1e-12)))

    @torch.no_grad()
    def second_step(self) -> None:
        """Goes back to w and descends."""
        for p, saved in zip(self.params, self.saved, strict=True):
            p.copy_(saved)
        self.base.step()


def steps(network: Network, problem: Problem) -> dict[str, Callable[[], None]]:
    """The training steps by name; each call is one."""
    inputs = np.asarray(problem.inputs)
    if inputs.ndim == 4:
        inputs = inputs.transpose(0, 3, 1, 2).copy()  # channels first, PyTorch's default
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.from_numpy(inputs.copy()).to(device)
    labels = torch.from_numpy(np.asarray(problem.labels).astype(np.int64)).to(device)

    def make(optimizer_of):
        model = twin(network).to(device)
        optimizer = optimizer_of(model.parameters())

        def loss_and_backward():
            for parameter in model.parameters():
                parameter.grad = None
            loss = functional.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        return optimizer, loss_and_backward

    def sgd_optimizer(params):
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def sgd():
        optimizer, loss_and_backward = make(sgd_optimizer)

        def step():
            loss = loss_and_backward()
            optimizer.step()
            return loss

        return step

    def two_step_sam():
        def optimizer_of(params):
            params = list(params)
            return TwoStepSAM(params, sgd_optimizer(params), RHO)

        optimizer, loss_and_backward = make(optimizer_of)

        def step():
            loss = loss_and_backward()
            optimizer.first_step()
            loss_and_backward()
            optimizer.second_step()
            return loss

        return step

    def package_sam():
        def optimizer_of(params):
            return pytorch_optimizer.SAM(params, torch.optim.SGD, RHO, lr=0.1, momentum=0.9)

        optimizer, loss_and_backward = make(optimizer_of)

        def step():
            loss = loss_and_backward()
            optimizer.step(loss_and_backward)
            return loss

        return step

    found = {"PyTorch SGD": sgd(), "PyTorch SAM": two_step_sam()}
    if pytorch_optimizer is not None:
        found["pytorch_optimizer.SAM"] = package_sam()
    # Reading the loss waits for the device, as block_until_ready does.
    return {name: lambda step=step: step().item() for name, step in found.items()}
