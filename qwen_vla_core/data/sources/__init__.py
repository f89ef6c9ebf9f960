"""One short module per family: `add_arguments(parser)` and `convert(src, out, options, workers, progress) -> dict`."""
