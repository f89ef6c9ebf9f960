"""Human hands: one intermediate for all corpora, a 45-number finger pose, and eigengrasps."""
