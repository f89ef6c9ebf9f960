"""One module per simulated robot; the rest of the package reaches them through ``qwen_vla_core.sim.registry``."""
