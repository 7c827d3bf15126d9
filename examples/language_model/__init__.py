"""Trains a decoder transformer on bytes of text: fully sharded, its layers in a scan."""
