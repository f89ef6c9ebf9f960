"""One module per ``qwen-vla train`` job: ``add_arguments(parser)`` and ``run(args)``; heavy imports inside ``run``."""
