"""Compares training methods on digits with wrong labels.

python examples/label_noise/main.py
python examples/label_noise/main.py --methods sgd saner --noise-rate 0.2 --seeds 0 1 2
python examples/label_noise/main.py --help
"""

import tyro
from config import Config
from data import load_digits
from report import live_progress, print_table, write_results
from train import compare


def main(config: Config) -> None:
    """Trains every method, prints the table and writes the results."""
    data = load_digits(config.noise, config.noise_rate, config.seeds)
    epochs = []
    with live_progress(config) as show:
        for epoch in compare(config, data):
            epochs.append(epoch)
            show(epoch)
    print_table(config, epochs)
    write_results(config, data, epochs)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.splitlines()[0]))
