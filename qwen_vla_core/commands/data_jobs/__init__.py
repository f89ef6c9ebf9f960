"""One module per ``qwen-vla data`` job: ``add_arguments(parser)`` and ``run(args)``; heavy imports inside ``run``."""
