"""Trains image classifiers on wrong labels: CIFAR-10 and CIFAR-100, human labels, any image arrays."""
