"""`python -m trainer CONFIG.toml`, as `echolab train` without the rest of echolab's command line."""

from __future__ import annotations

import argparse
import sys

from echolab.errors import EcholabError, WrongUsage
from trainer.config import load, show


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m trainer", description="Train as CONFIG.toml says.")
    options.add_argument("config", help="a TOML file, or the name of a preset")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key: optimizer.lr=1e-5")
    options.add_argument("--show-config", action="store_true", help="print the resolved configuration, and stop")
    o = options.parse_args()
    try:
        config = load(o.config, o.set)
        if o.show_config:
            print(show(config), end="")
            return 0
        from trainer.loop import train

        train(config)
    except EcholabError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, WrongUsage) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
