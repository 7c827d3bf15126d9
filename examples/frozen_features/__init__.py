"""Trains a head on frozen features with wrong labels, and finds the wrong ones."""
