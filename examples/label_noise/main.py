"""Compares training methods on digits with wrong labels.

python examples/label_noise/main.py
python examples/label_noise/main.py --methods sgd saner --noise-rate 0.2 --seeds 0 1 2
python examples/label_noise/main.py --help
"""

import shlex
import sys

import tyro
from config import Config
from data import load_digits
from output_folder import explain, held
from report import live_progress, print_table, write_results
from train import compare

INTERRUPTED = 130  # what shells expect of a program that was stopped by Ctrl-C


def main(config: Config) -> None:
    """Trains every method, prints the table and writes the results."""
    with held(config.output):
        if (config.output / "results.json").exists():
            print(f"{config.output} has earlier results. They are replaced at the end.")
        data = load_digits(config.noise, config.noise_rate, config.seeds)
        epochs = []
        with live_progress(config) as show:
            for epoch in compare(config, data):
                epochs.append(epoch)
                show(epoch)
        print_table(config, epochs)
        write_results(config, data, epochs)


def command_line(arguments: list[str]) -> None:
    """Runs the program; ends with a message and an exit code where something goes wrong."""
    program = shlex.join(["python", sys.argv[0]])
    again = shlex.join([sys.executable, sys.argv[0], *arguments])
    try:
        main(tyro.cli(Config, prog=program, args=arguments, description=__doc__.splitlines()[0]))
    except OSError as error:
        sys.exit(f"error: {explain(error, again)}")
    except KeyboardInterrupt:
        print(f"\ninterrupted, and not to be resumed. To begin again:\n{again}", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    command_line(sys.argv[1:])
