"""``python -m lightning_compress`` is ``lc``."""

from lightning_compress.cli.main import main

main()
