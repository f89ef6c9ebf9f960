"""One module per ``qwen-vla data`` job: ``add_arguments(parser)`` and ``run(args) -> int``; heavy imports inside ``run``."""
