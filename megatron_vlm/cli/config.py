"""`mvlm config`: what a recipe and overrides come to, every default written out."""

from __future__ import annotations

import argparse

HELP = """Print the resolved configuration of a recipe as YAML, every default written out.

example:
  mvlm config demo training.train_iters=100 model.language.num_layers=8 > mine.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `RECIPE [key=value ...]`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or a shipped recipe's name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.train_iters=100"
    )


def run(args: argparse.Namespace) -> int:
    """Print the YAML; raises ConfigError when the recipe or an override is wrong."""
    from megatron_vlm.config import dump_yaml, load_recipe

    print(dump_yaml(load_recipe(args.recipe, args.overrides)), end="")
    return 0
